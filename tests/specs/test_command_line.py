"""The verbs of `fp8c` that need no model: results, exit codes, and that none of them imports torch."""

from __future__ import annotations

import json
import os
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from fp8c import cli
from fp8c.diagnostics import ExitCode

ROOT = Path(__file__).parents[2]
BUDGET_S = 0.25  # of CPU time


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        check=False,
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, **environment},
        timeout=60,
    )


LIGHT = [
    ("--help",),
    ("spec", "check", "deepseek_v3"),
    ("spec", "fmt", "--check", "specs/deepseek_v3.fp8"),
    ("explain", "E0203"),
    ("targets",),
]


@pytest.mark.parametrize("arguments", LIGHT, ids=" ".join)
def test_light_verbs_do_not_import_torch(arguments: tuple[str, ...]) -> None:
    done = run("-X", "importtime", "-m", "fp8c", *arguments)
    assert done.returncode == 0, done.stderr[-2000:]
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "click" in imported
    assert imported.isdisjoint({"torch", "numpy", "pydantic", "transformers", "networkx"})


@pytest.mark.parametrize("arguments", LIGHT, ids=" ".join)
def test_light_verbs_stay_within_the_budget(arguments: tuple[str, ...], tmp_path: Path) -> None:
    # Neighbours on the same cores take caches and clock away, so a busy machine says nothing about fp8c.
    if os.getloadavg()[0] > (os.cpu_count() or 1):
        pytest.skip(f"the machine is busy: load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")
    # Bytecode is compiled once, as in any installation; the fastest run is what fp8c needs, the rest is noise.
    environment = {"PYTHONPYCACHEPREFIX": str(tmp_path), "PYTHONDONTWRITEBYTECODE": ""}
    assert run("-m", "fp8c", *arguments, **environment).returncode == 0
    fastest = float("inf")
    for _ in range(8):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        run("-m", "fp8c", *arguments, **environment)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        fastest = min(fastest, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
        if fastest < BUDGET_S:
            return
    pytest.fail(f"{' '.join(arguments)} takes {fastest:.2f} s of CPU time, budget {BUDGET_S} s")


def test_check_prints_a_line_for_a_good_spec(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["spec", "check", "deepseek_v3", "bf16"]) == ExitCode.OK
    out, err = capsys.readouterr()
    assert re.fullmatch(r"deepseek_v3: ok: spec deepseek_v3, \d+ rules, for sm90, sm100", out.splitlines()[0])
    assert err == ""


def test_check_of_a_bad_spec_exits_3_and_says_why(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "bad.fp8"
    path.write_text("version 1;\nspec a { fporp; }\n")
    assert cli.main(["spec", "check", str(path)]) == ExitCode.SPEC
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == [
        f"{path}:2:10: error[E0101]: unknown word `fporp` in a spec",
        "   |",
        " 2 | spec a { fporp; }",
        "   |          ^^^^^",
    ]


def test_check_reports_conflicts_of_sections_without_a_model(tmp_path: Path) -> None:
    path = tmp_path / "a.fp8"
    path.write_text('version 1; use "std:deepseek_v3" as ds; spec a extends ds { schedule { comm_sms = 24; } }')
    assert cli.main(["spec", "check", str(path)]) == ExitCode.SPEC
    path.write_text(
        'version 1; use "std:deepseek_v3" as ds; spec a extends ds { override schedule { comm_sms = 24; } }'
    )
    assert cli.main(["spec", "check", str(path)]) == ExitCode.OK


def test_json_is_one_document_with_a_schema(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "bad.fp8"
    path.write_text("version 1;\nspec a { fporp; }\n")
    assert cli.main(["spec", "check", "--json", "bf16", str(path)]) == ExitCode.SPEC
    out, err = capsys.readouterr()
    document = json.loads(out)
    assert document["schema"] == "fp8c.spec-check/1" and err == ""
    good, bad = document["specs"]
    assert good["ok"] and not bad["ok"]
    assert bad["diagnostics"][0]["span"] == {"file": str(path), "line": 2, "column": 10, "length": 5}
    for arguments in (["targets", "--json"], ["spec", "list", "--json"], ["explain", "w0410", "--json"]):
        assert cli.main(arguments) == ExitCode.OK
        assert json.loads(capsys.readouterr().out)["schema"].startswith("fp8c.")


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["nope"], ExitCode.USAGE),
        (["spec", "check"], ExitCode.USAGE),
        (["explain", "E9999"], ExitCode.USAGE),
        (["spec", "check", "--wrong", "bf16"], ExitCode.USAGE),
        (["spec", "check", "nowhere.fp8"], ExitCode.SPEC),
        (["spec", "show", "deepsek"], ExitCode.SPEC),
        (["targets", "h20"], ExitCode.TARGET),
        (["--version"], ExitCode.OK),
    ],
)
def test_exit_codes(arguments: list[str], code: ExitCode, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(arguments) == code
    assert "Traceback" not in capsys.readouterr().err


def test_bug_exits_70_with_a_traceback(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from fp8c.specs import summary

    def broken(spec: str) -> None:
        raise ZeroDivisionError("oops")

    monkeypatch.setattr(summary, "summarize", broken)
    assert cli.main(["spec", "check", "bf16"]) == ExitCode.BUG
    err = capsys.readouterr().err
    assert "Traceback" in err and err.splitlines()[-1].startswith("fp8c: this is a bug in fp8c")


def test_no_colour_without_a_terminal_or_under_no_color() -> None:
    for environment in ({}, {"NO_COLOR": "1"}, {"FORCE_COLOR": ""}):
        assert "\033" not in run("-m", "fp8c", "spec", "check", "nowhere.fp8", **environment).stderr


def test_closed_pipe_is_no_error() -> None:
    done = subprocess.run(
        f"{sys.executable} -m fp8c spec show deepseek_v3 | head -c 5; echo ${{PIPESTATUS[0]}}",
        check=False,
        shell=True,
        executable="/bin/bash",
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.stdout.startswith("versi") and "Traceback" not in done.stderr


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_reader_that_left_is_no_failed_check(unbuffered: str) -> None:
    """`fp8c ... | head` under pipefail: 1 would say that a check failed."""
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, "-m", "fp8c", "spec", "show", "deepseek_v3"],
        check=False,
        stdout=write,
        stderr=subprocess.PIPE,
        cwd=ROOT,
        env={**os.environ, "PYTHONUNBUFFERED": unbuffered},
    )
    os.close(write)
    assert (done.returncode, done.stderr) == (0, b"")


@pytest.mark.parametrize("closing, code", [(">&-", 0), ("2>&-", 0), ("<&-", 0), (">/dev/full", 2)])
def test_streams_that_are_closed_or_full_are_no_bug(closing: str, code: int) -> None:
    command = f"{sys.executable} -m fp8c spec list {closing}"
    done = subprocess.run(command, check=False, shell=True, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == code and "Traceback" not in done.stderr
    assert ("no space left on device" in done.stderr) == (code == 2)


def test_a_file_name_that_is_no_text_is_printed_escaped(tmp_path: Path) -> None:
    path = os.fsencode(tmp_path) + b"/n\xff.fp8"
    Path(os.fsdecode(path)).write_text("version 1;\nspec a { }\n")
    for more in ([], ["--json"]):
        done = subprocess.run(
            [sys.executable, "-m", "fp8c", "spec", "check", path, *more], capture_output=True, cwd=ROOT
        )
        assert done.returncode == 0 and rb"n\udcff.fp8: ok" in done.stdout


def test_list_prints_whole_sentences_within_the_terminal() -> None:
    done = run("-m", "fp8c", "spec", "list", COLUMNS="60")
    assert max(map(len, done.stdout.splitlines())) <= 60
    text = " ".join(done.stdout.split())
    assert "so every tile can be tiled again without a scale's rounding. hybrid_delayed" in text


def test_fmt_of_what_is_no_text_on_stdin_is_named() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "fp8c", "spec", "fmt", "-"], input=b"version 1;\n\xff", capture_output=True, cwd=ROOT
    )
    assert done.returncode == 3 and b"byte 11 is no UTF-8 text" in done.stderr


def test_diff_says_so_where_no_line_changes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "bom.fp8"
    path.write_bytes(b"\xef\xbb\xbfversion 1;\nspec a { }\n")
    assert cli.main(["spec", "fmt", "--diff", str(path)]) == ExitCode.CHECK_FAILED
    assert "byte order mark or line ends" in capsys.readouterr().out


def test_new_spec_checks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["spec", "new", "my_run"]) == ExitCode.OK
    assert cli.main(["spec", "check", "my_run.fp8"]) == ExitCode.OK
    assert cli.main(["spec", "fmt", "--check", "my_run.fp8"]) == ExitCode.OK
    assert cli.main(["spec", "new", "my_run"]) == ExitCode.USAGE, "an existing file is not overwritten"
    assert cli.main(["spec", "new", "my-run"]) == ExitCode.USAGE
    assert cli.main(["spec", "new", "other", "--extends", "nope"]) == ExitCode.SPEC


def test_fmt_rewrites_in_place_and_check_and_diff_do_not(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "a.fp8"
    text = "version   1;\nspec a{ }"
    path.write_text(text)
    path.chmod(0o640)
    assert cli.main(["spec", "fmt", "--check", str(path)]) == ExitCode.CHECK_FAILED
    assert cli.main(["spec", "fmt", "--diff", str(path)]) == ExitCode.CHECK_FAILED
    assert "-version   1;" in capsys.readouterr().out and path.read_text() == text
    assert cli.main(["spec", "fmt", str(path)]) == ExitCode.OK
    assert path.read_text() == "version 1;\nspec a { }\n"
    assert path.stat().st_mode & 0o777 == 0o640
    assert list(tmp_path.iterdir()) == [path], "no temporary file is left"
    assert cli.main(["spec", "fmt", "--check", str(path)]) == ExitCode.OK


def test_passes_are_listed_in_order(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["passes"]) == ExitCode.OK
    lines = capsys.readouterr().out.splitlines()
    from fp8c.passes import ALL_PASSES

    assert [line.split()[:2] for line in lines] == [
        [str(i), p.name]  # type: ignore[attr-defined]
        for i, p in enumerate(ALL_PASSES, 1)
    ]

"""inspect, export, explain and diff as somebody types them: results, exit codes, and builds that are none."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from fp8c import build as b
from fp8c.cli import main


def write(path: Path) -> Path:
    files = {"plan.lock.json": b"{}", "graphs/forward.txt": b"graph forward\n"}
    b.write_build(path, {"spec": {"files": {}}}, files, {"argv": []}, {})
    return path


def damage(build: Path, how: str) -> None:
    manifest = build / b.MANIFEST
    document = json.loads(manifest.read_text())
    if how == "truncated":
        (build / "plan.lock.json").write_bytes(b"{")
    elif how == "file gone":
        (build / "graphs" / "forward.txt").unlink()
    elif how == "manifest cut":
        manifest.write_text(manifest.read_text()[:40])
    elif how == "no manifest":
        manifest.unlink()
    elif how == "newer":
        manifest.write_text(json.dumps({**document, "schema": "fp8c.build/99"}))
    elif how == "foreign":
        manifest.write_text(json.dumps({"schema": "something/1"}))
    elif how == "a list":
        manifest.write_text("[]")
    elif how == "no files":
        manifest.write_text(json.dumps({"schema": b.SCHEMA}))


DAMAGES = {
    "truncated": "was changed after the build",
    "file gone": "no such file",
    "manifest cut": "cannot read",
    "no manifest": "is not a build",
    "newer": "was written by a newer fp8c",
    "foreign": "has the schema 'something/1'",
    "a list": "has the schema None",
    "no files": "lists no files",
}
VERBS = (("inspect", "-o", "x.html"), ("export", "--format", "dot"), ("explain", "lm_head"), ("diff", "bf16"))


@pytest.mark.parametrize("how", DAMAGES)
@pytest.mark.parametrize("verb", VERBS, ids=lambda v: v[0])
def test_a_damaged_build_is_an_error_for_every_verb(
    how: str, verb: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    damage(write(tmp_path / "build"), how)
    name, *rest = verb
    assert main([name, "build", *rest]) == 2
    said = capsys.readouterr().err
    assert "E0612" in said and DAMAGES[how] in said
    assert "Traceback" not in said


LOCK = {"uses": {}, "sections": {}, "spec": "s", "spec_hash": "h", "target": "h200"}
WRONG = {
    "an empty plan": {"plan.lock.json": b"{}"},
    "a list": {"plan.lock.json": b"[]"},
    "no JSON": {"plan.lock.json": b"{"},
    "a use without fields": {"plan.lock.json": json.dumps({**LOCK, "uses": {"a": {"op": "linear"}}}).encode()},
    "a decision without a reason": {
        "plan.lock.json": json.dumps({**LOCK, "sections": {"dispatch": {"payload": {"value": "bf16"}}}}).encode()
    },
    "no plan": {"other.json": b"{}"},
}


@pytest.mark.parametrize("files", WRONG.values(), ids=WRONG)
@pytest.mark.parametrize("verb", VERBS, ids=lambda v: v[0])
def test_whole_files_that_hold_something_else_are_an_error(
    files: dict[str, bytes],
    verb: tuple[str, ...],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    graphs = {f"graphs/{name}.txt": b"graph x\n" for name in ("captured", "forward", "backward")}
    keys = ("model", "spec", "target", "versions", "parameters", "plan")
    b.write_build(tmp_path / "build", {key: {} for key in keys}, {**graphs, **files}, {"argv": []}, {})
    name, *rest = verb
    assert main([name, "build", *rest]) == 2
    said = capsys.readouterr().err
    assert "E0612" in said and "Traceback" not in said


def test_explain_needs_a_code_or_a_build_and_a_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain"]) == 2
    assert main(["explain", "E0612"]) == 0
    assert "not a build" in capsys.readouterr().out
    assert main(["explain", str(tmp_path)]) == 2
    assert "say what to explain" in capsys.readouterr().err
    assert main(["explain", "E9999"]) == 2


def test_inspect_writes_nothing_where_it_may_not(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from fp8c.diagnostics import DiagnosticError
    from fp8c.files import write_file

    (tmp_path / "file").write_text("")
    with pytest.raises(DiagnosticError, match="E0610"):
        write_file(tmp_path / "file" / "page.html", b"")


def test_none_of_the_verbs_imports_torch() -> None:
    modules = "fp8c.tools.viewer.page_data, fp8c.tools.viewer.page, fp8c.tools.viewer.export, fp8c.tools.viewer.text"
    code = f"import sys, {modules}, fp8c.tools.explain, fp8c.tools.build_diff, fp8c.cli; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_a_target_file_of_ones_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from fp8c.backends.target import load_target

    shipped = Path(sys.modules[load_target.__module__].__file__ or "").parent / "targets" / "h200.toml"
    mine = tmp_path / "mine.toml"
    mine.write_text(shipped.read_text().replace('name = "h200"', 'name = "mine"'))
    assert main(["targets", str(mine), "--json"]) == 0
    [record] = json.loads(capsys.readouterr().out)["targets"]
    assert record["name"] == "mine" and record["architecture"] == "sm90"
    mine.write_text("name = [")
    assert main(["targets", str(mine)]) == 5
    assert "mine.toml" in capsys.readouterr().err


@pytest.mark.parametrize("name, found", [("nothing", "no such folder"), ("file", "it is a file"), (".", "no manifest")])
def test_what_is_no_build_is_told_from_a_damaged_one(
    name: str, found: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    assert main(["inspect", str(tmp_path / name)]) == 2
    error = capsys.readouterr().err
    assert found in error and "build it again" not in error


def test_json_nested_too_deep_is_a_damaged_build(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (write(tmp_path / "build") / b.MANIFEST).write_text("[" * 100_000)
    assert main(["inspect", str(tmp_path / "build")]) == 2
    assert "E0612" in capsys.readouterr().err


@pytest.mark.parametrize("verb", [("targets",), ("diff", "BUILD"), ("compile", "-o", "out")], ids=lambda v: v[0])
def test_a_path_that_the_file_system_refuses_is_no_bug(
    verb: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    build = str(write(tmp_path / "build"))
    end = ".py" if verb[0] == "compile" else ".toml"
    assert main([*(build if w == "BUILD" else w for w in verb), "a" * 5000 + end]) == 2
    assert "file name too long" in capsys.readouterr().err

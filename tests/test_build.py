"""The build folder: whole or not at all, ours or refused, the same bytes for the same inputs."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fp8c import build as b
from fp8c.diagnostics import DiagnosticError, ExitCode

FILES = {"plan.lock.json": b"{}\n", "graphs/forward.txt": b"graph forward\n"}


def write(out: Path, text: bytes = b"a", *, force: bool = False) -> None:
    b.write_build(out, {"plan": "p"}, {**FILES, "text": text}, {"argv": []}, {"report.html": b"<p>"}, force=force)


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def test_a_build_reads_back_as_written(tmp_path: Path) -> None:
    write(tmp_path / "deep" / "build")
    read = b.read_build(tmp_path / "deep" / "build")
    assert read.manifest["schema"] == b.SCHEMA
    assert read.read("text") == b"a"
    assert read.graph_text("forward") == "graph forward\n"
    assert names(tmp_path / "deep") == ["build"]


def test_a_second_build_replaces_the_first_whole(tmp_path: Path) -> None:
    out = tmp_path / "build"
    b.write_build(out, {}, {"only/in/first": b"1"}, {}, {})
    write(out, b"second")
    assert b.read_build(out).read("text") == b"second"
    assert not (out / "only").exists()
    assert names(tmp_path) == ["build"]


def test_it_is_replaced_without_an_atomic_exchange_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "build", b"first")
    monkeypatch.setattr(b, "_exchange", lambda a, c: False)
    write(tmp_path / "build", b"second")
    assert b.read_build(tmp_path / "build").read("text") == b"second"
    assert names(tmp_path) == ["build"]


def test_a_linked_folder_is_replaced_where_it_lies(tmp_path: Path) -> None:
    write(tmp_path / "real", b"first")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    write(tmp_path / "link", b"second")
    assert (tmp_path / "link").is_symlink()
    assert b.read_build(tmp_path / "real").read("text") == b"second"


def test_a_foreign_folder_is_refused_unless_forced(tmp_path: Path) -> None:
    out = tmp_path / "mine"
    out.mkdir()
    (out / "thesis.tex").write_text("years of work")
    with pytest.raises(DiagnosticError, match="E0611.*it is not empty, and fp8c did not write it") as caught:
        write(out)
    assert caught.value.exit_code is ExitCode.USAGE
    assert names(out) == ["thesis.tex"]
    write(out, force=True)
    assert b.read_build(out).read("text") == b"a"


def test_files_added_to_a_build_are_not_lost(tmp_path: Path) -> None:
    write(tmp_path / "build")
    (tmp_path / "build" / "notes.md").write_text("do not lose")
    with pytest.raises(DiagnosticError, match="E0611.*it also holds notes.md"):
        write(tmp_path / "build")
    assert (tmp_path / "build" / "notes.md").read_text() == "do not lose"


def test_an_empty_folder_is_used(tmp_path: Path) -> None:
    (tmp_path / "build").mkdir()
    write(tmp_path / "build")
    b.read_build(tmp_path / "build")


def test_a_file_in_the_way_is_refused(tmp_path: Path) -> None:
    (tmp_path / "build").write_text("a file")
    with pytest.raises(DiagnosticError, match="E0611.*it is a file"):
        write(tmp_path / "build")
    with pytest.raises(DiagnosticError, match="E0610.*file exists") as caught:
        write(tmp_path / "build" / "below")
    assert caught.value.exit_code is ExitCode.USAGE
    assert (tmp_path / "build").read_text() == "a file"


def test_a_full_disk_leaves_the_old_build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "build", b"old")

    def full(path: Path, data: bytes) -> None:
        if path.name == "text":
            raise OSError(28, "No space left on device", str(path))
        original(path, data)

    original = b._write_file
    monkeypatch.setattr(b, "_write_file", full)
    with pytest.raises(DiagnosticError, match="E0610.*no space left on device"):
        write(tmp_path / "build", b"new")
    assert b.read_build(tmp_path / "build").read("text") == b"old"
    assert names(tmp_path) == ["build"]


def test_a_changed_file_is_found(tmp_path: Path) -> None:
    write(tmp_path / "build")
    (tmp_path / "build" / "text").write_bytes(b"b")
    with pytest.raises(DiagnosticError, match=r"E0612.*text was changed after the build"):
        b.read_build(tmp_path / "build")
    (tmp_path / "build" / "text").unlink()
    with pytest.raises(DiagnosticError, match="E0612.*no such file"):
        b.read_build(tmp_path / "build")


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"schema": "fp8c.build/99"}', "\x00"])
def test_what_is_no_build_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / b.MANIFEST).write_text(text)
    with pytest.raises(DiagnosticError, match="E0612"):
        b.read_build(tmp_path)
    with pytest.raises(DiagnosticError, match="E0612.*is not a build"):
        b.read_build(tmp_path / "nowhere")


def test_the_same_inputs_give_the_same_bytes(tmp_path: Path) -> None:
    for name, argv in (("a", ["x"]), ("b", ["y"])):
        b.write_build(tmp_path / name, {"plan": "p"}, FILES, {"argv": argv}, {"report.html": argv[0].encode()})
    first, second = b.read_build(tmp_path / "a").manifest, b.read_build(tmp_path / "b").manifest
    assert {k: v for k, v in first.items() if k != "run"} == {k: v for k, v in second.items() if k != "run"}


def test_large_graphs_are_compressed_the_same_way_every_time() -> None:
    text = "line\n" * (b.GZIP_ABOVE_BYTES // 5 + 1)
    name, first = b.graph_file("joint", text)
    assert name == "graphs/joint.txt.gz" and len(first) < 100_000
    time.sleep(1.1)  # gzip stamps whole seconds
    assert b.graph_file("joint", text) == (name, first)
    assert b.graph_file("joint", "short")[0] == "graphs/joint.txt"


_WRITER = """
import sys
from pathlib import Path
from fp8c.build import write_build
out, text = Path(sys.argv[1]), sys.argv[2].encode()
files = {f"graphs/{i}.txt": text * 2000 for i in range(30)} | {"text": text}
print("ready", flush=True)
while True:
    write_build(out, {}, files, {}, {})
"""


def test_killed_at_any_moment_there_is_the_old_build_or_the_new_one(tmp_path: Path) -> None:
    out, rng = tmp_path / "build", random.Random(0)
    write(out, b"first")
    expected = {b"first"}
    killed_with_leftovers = 0
    for round in range(24):
        text = f"round-{round}".encode()
        writer = subprocess.Popen(
            [sys.executable, "-c", _WRITER, str(out), text.decode()],
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        )
        assert writer.stdout is not None
        assert writer.stdout.readline() == b"ready\n"
        time.sleep(rng.uniform(0.0, 0.05))
        writer.kill()
        writer.wait()
        writer.stdout.close()
        found = b.read_build(out).read("text")  # every hash is checked
        assert found in expected | {text}
        expected = {found}
        killed_with_leftovers += len(names(tmp_path)) > 1
    assert killed_with_leftovers, "no kill came in the middle of a build: the test shows nothing"
    write(out, b"last", force=True)
    assert names(tmp_path) == ["build"]


def test_a_living_writer_keeps_its_scratch_folder(tmp_path: Path) -> None:
    place = tmp_path / "build"
    with b._scratch_folder(place) as scratch:
        (scratch / "half").write_text("half")
        write(place)
        assert (scratch / "half").exists()
    assert names(tmp_path) == ["build"]


def test_manifest_is_plain_json_with_every_hash(tmp_path: Path) -> None:
    write(tmp_path / "build")
    manifest = json.loads((tmp_path / "build" / "manifest.json").read_text())
    assert set(manifest["files"]) == {*FILES, "text"}
    assert set(manifest["run"]["files"]) == {"report.html"}
    assert all(len(h) == 64 for h in manifest["files"].values())

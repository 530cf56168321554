"""Files of the command line: what is wrong with one, and that none is left half written."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from fp8c.diagnostics import DiagnosticError, ExitCode
from fp8c.files import check_writable, reason, write_file


def test_a_file_is_replaced_whole_with_its_rights(tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    path.write_text("old")
    path.chmod(0o600)
    write_file(path, "new")
    assert path.read_text() == "new" and path.stat().st_mode & 0o777 == 0o600
    assert os.listdir(tmp_path) == ["page.html"]


def test_a_full_disk_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "page.html"
    path.write_text("old")

    def full(self: Path, data: bytes) -> int:
        with self.open("wb") as file:
            file.write(data[:1])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(DiagnosticError, match="no space left on device"):
        write_file(path, "new")
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["page.html"]


def test_a_link_is_written_where_it_leads_and_a_device_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "file")
    write_file(tmp_path / "link", b"x")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "file").read_bytes() == b"x"
    write_file(Path("/dev/null"), "x")
    assert not Path("/dev/null").is_file()


def test_what_cannot_be_written_is_found_before_the_work(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    check_writable(tmp_path / "new" / "page.html")
    assert os.listdir(tmp_path / "new") == []
    for path in (tmp_path, tmp_path / "file" / "page.html"):
        with pytest.raises(DiagnosticError, match="E0610") as caught:
            check_writable(path)
        assert caught.value.exit_code == ExitCode.USAGE


def test_a_reason_has_no_number_and_no_path() -> None:
    with pytest.raises(OSError) as caught:
        Path("/nothing/here").read_text()
    assert reason(caught.value) == "no such file or directory"

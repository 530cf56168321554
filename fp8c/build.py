"""The build folder: written beside its place and swapped in whole, read back with every file checked. No torch here.

    manifest.json     what was built, from what, by which versions, with the SHA-256 of every other file
    plan.lock.json    every decision with its reason
    spec/             the spec's files; those that came with fp8c in spec/std/
    graphs/*.txt      the step before and after the rewrites; `.txt.gz` above 4 MB
    graphs/notes.json source lines, roles of the captured graph, why values are saved; older builds lack it
    schedule.trace.json  the schedule, for Perfetto; where the step has collectives
    report.json       every table, report.html shows them

`manifest["run"]`, and the files it names, hold times and the command line; all else is the same for the same inputs.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import gzip
import hashlib
import json
import os
import secrets
import shutil
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fp8c.diagnostics import DiagnosticError, ExitCode, fail
from fp8c.files import reason

SCHEMA = "fp8c.build/1"
MANIFEST = "manifest.json"

#: Graph texts above this are compressed: a 671B model's joint graph is several megabytes of text.
GZIP_ABOVE_BYTES = 4_000_000

_RENAME_EXCHANGE = 2  # linux/fs.h
_AT_FDCWD = -100  # linux/fcntl.h


@dataclass(frozen=True)
class Build:
    """A build on disk whose files are those its manifest names."""

    path: Path
    manifest: Mapping[str, Any]

    def read(self, name: str) -> bytes:
        return (self.path / name).read_bytes()

    def json(self, name: str) -> Any:
        """A file's JSON. Raises: DiagnosticError E0612 when the build has no such file, or it is no JSON."""
        try:
            return json.loads(self.read(name))
        except (OSError, ValueError, RecursionError) as error:
            raise _damaged(f"cannot read {self.path / name}: {reason(error)}") from None

    def has(self, name: str) -> bool:
        return name in self.manifest["files"]

    def graph_text(self, name: str) -> str:
        """Text of a graph by its name, `captured`, `joint`, `forward` or `backward`."""
        file = f"graphs/{name}.txt"
        packed = f"{file}.gz"
        return (gzip.decompress(self.read(packed)) if packed in self.manifest["files"] else self.read(file)).decode()


def spec_file(name: str) -> str:
    """Where a build keeps a spec's file: `std:deepseek_v3` in spec/std/deepseek_v3.fp8, the user's under spec/."""
    return f"spec/std/{name.removeprefix('std:')}.fp8" if name.startswith("std:") else f"spec/{name}"


def json_bytes(value: Any) -> bytes:
    return (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace")


def packed_json(value: Any) -> bytes:
    """JSON for programs: no layout."""
    return (json.dumps(value, separators=(",", ":"), ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace")


def graph_file(name: str, text: str) -> tuple[str, bytes]:
    """File name and content of a graph's text."""
    data = text.encode("utf-8", "backslashreplace")
    if len(data) <= GZIP_ABOVE_BYTES:
        return f"graphs/{name}.txt", data
    return f"graphs/{name}.txt.gz", gzip.compress(data, mtime=0)


# --- writing ----------------------------------------------------------------------------------------------------------


def write_build(
    out: Path,
    manifest: Mapping[str, Any],
    files: Mapping[str, bytes],
    run: Mapping[str, Any],
    run_files: Mapping[str, bytes],
    *,
    force: bool = False,
) -> None:
    """Write a build to `out`, replacing the build there. At every moment `out` is the old build or the new one.

    files, run_files: contents by relative path; the latter may differ between two builds of the same inputs
    force:            replace a folder that fp8c did not write
    Raises: DiagnosticError E0610 (cannot write), E0611 (something else is there), exit code USAGE.
    """
    full = {
        "schema": SCHEMA,
        **manifest,
        "files": {name: _digest(files[name]) for name in sorted(files)},
        "run": {**run, "files": {name: _digest(run_files[name]) for name in sorted(run_files)}},
    }
    check_output(out, force=force)
    place = Path(os.path.realpath(out))
    with _explained(out), _scratch_folder(place) as scratch:
        for name, data in sorted({**files, **run_files}.items()):
            _write_file(scratch / name, data)
        _write_file(scratch / MANIFEST, json_bytes(full))  # last: a folder with a manifest is complete
        for folder in {scratch, *(p.parent for p in scratch.rglob("*"))}:
            _sync(folder)
        _swap(scratch, place)
        _sync(place.parent)


def check_output(out: Path, *, force: bool = False) -> None:
    """Fail now, before the work, when `out` could not be written or holds something else; clean up after killed runs.

    Raises: DiagnosticError E0610, E0611, exit code USAGE.
    """
    with _explained(out):
        place = Path(os.path.realpath(out))
        if place.exists() and not place.is_dir():
            raise _foreign(out, "it is a file", "name a folder")
        if place.is_dir() and not force:
            _check_is_ours(out, place)
        place.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(place)
        probe = _leftover_path(place)
        probe.mkdir()
        probe.rmdir()


def _check_is_ours(out: Path, place: Path) -> None:
    found = {p.relative_to(place).as_posix() for p in place.rglob("*") if not p.is_dir()}
    if not found:
        return
    try:
        manifest = json.loads((place / MANIFEST).read_bytes())
        known = {MANIFEST, *manifest["files"], *manifest["run"]["files"]}
        ours = str(manifest["schema"]).startswith("fp8c.build/")
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        ours, known = False, set()
    if not ours:
        raise _foreign(out, "it is not empty, and fp8c did not write it", "choose another folder, or pass --force")
    extra = sorted(found - known)
    if extra:
        names = ", ".join(extra[:3]) + (f" and {len(extra) - 3} more" if len(extra) > 3 else "")
        raise _foreign(out, f"it also holds {names}, which fp8c did not write", "move them away, or pass --force")


def _foreign(out: Path, why: str, help: str) -> DiagnosticError:
    return fail("E0611", f"'{out}' would be replaced, but {why}", help=help, exit_code=ExitCode.USAGE)


@contextlib.contextmanager
def _explained(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        where = f" ({error.filename})" if error.filename and str(error.filename) != str(out) else ""
        raise fail(
            "E0610",
            f"cannot write the build to '{out}': {reason(error)}{where}",
            help="name another folder with -o",
            exit_code=ExitCode.USAGE,
        ) from None


def _leftover_prefix(place: Path) -> str:
    return f".{place.name}.fp8c-"


def _leftover_path(place: Path) -> Path:
    return place.parent / f"{_leftover_prefix(place)}{secrets.token_hex(6)}"


@contextlib.contextmanager
def _scratch_folder(place: Path) -> Iterator[Path]:
    """A new folder beside `place`, locked while this process lives, and gone afterwards whatever it then holds."""
    while True:
        scratch = _leftover_path(place)
        scratch.mkdir()
        try:
            lock = _try_lock(scratch)
        except OSError:  # a file system without locks
            lock = os.open(scratch, os.O_RDONLY | os.O_DIRECTORY)
        if lock is not None:
            break
    try:
        yield scratch
    finally:
        os.close(lock)
        shutil.rmtree(scratch, ignore_errors=True)


def _try_lock(folder: Path) -> int | None:
    """An open descriptor that locks the folder, or None when another process has it or it is gone."""
    descriptor = -1
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(descriptor), os.stat(folder)):
            kept, descriptor = descriptor, -1
            return kept
        return None
    except (BlockingIOError, FileNotFoundError):
        return None
    finally:
        if descriptor >= 0:
            os.close(descriptor)


def _remove_leftovers(place: Path) -> None:
    """Delete what killed runs left beside `place`. A folder that a living process holds is locked, and stays."""
    for folder in [p for p in place.parent.iterdir() if p.name.startswith(_leftover_prefix(place))]:
        with contextlib.suppress(OSError):  # no locks here: nobody can know whether its owner lives
            lock = _try_lock(folder)
            if lock is not None:
                shutil.rmtree(folder, ignore_errors=True)
                os.close(lock)


def _write_file(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _swap(scratch: Path, place: Path) -> None:
    """Make `scratch` the folder at `place`; what was there is at `scratch` afterwards."""
    try:
        os.rename(scratch, place)  # nothing there, or an empty folder
        return
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
    if _exchange(scratch, place):
        return
    # No atomic exchange on this file system. Between the two renames nothing is at `place`: never half a build.
    old = _leftover_path(place)
    os.rename(place, old)
    os.rename(scratch, place)
    shutil.rmtree(old, ignore_errors=True)


def _exchange(a: Path, b: Path) -> bool:
    """Exchange two folders in one step; False where the system or the file system can't."""
    libc = ctypes.CDLL(None, use_errno=True)
    left, right = os.fsencode(a), os.fsencode(b)
    if sys.platform == "darwin" and hasattr(libc, "renamex_np"):
        failed = libc.renamex_np(left, right, ctypes.c_uint(_RENAME_EXCHANGE))  # RENAME_SWAP is 2 as well
    elif hasattr(libc, "renameat2"):
        failed = libc.renameat2(_AT_FDCWD, left, _AT_FDCWD, right, ctypes.c_uint(_RENAME_EXCHANGE))
    else:
        return False
    if not failed:
        return True
    number = ctypes.get_errno()
    if number in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EXDEV):
        return False
    raise OSError(number, os.strerror(number), str(b))


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


# --- reading ----------------------------------------------------------------------------------------------------------


def read_build(path: str | Path) -> Build:
    """Read a build and check every file's hash.

    Raises: DiagnosticError E0612 (no build, another version of the format, or a file that was changed).
    """
    folder = Path(path)
    try:
        manifest = json.loads((folder / MANIFEST).read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        found = (
            f"it has no {MANIFEST}"
            if folder.is_dir()
            else "it is a file"
            if folder.exists()
            else "there is no such folder"
        )
        help = "name the folder that `fp8c compile -o` wrote"
        raise fail("E0612", f"'{path}' is not a build: {found}", help=help, exit_code=ExitCode.USAGE) from None
    except (OSError, ValueError, RecursionError) as error:
        raise _damaged(f"cannot read {folder / MANIFEST}: {reason(error)}") from None
    schema = manifest.get("schema") if isinstance(manifest, dict) else None
    if schema != SCHEMA:
        raise _other_schema(path, schema)
    try:
        listed = {**manifest["files"], **manifest["run"]["files"]}
    except (KeyError, TypeError):
        raise _damaged(f"{folder / MANIFEST} lists no files") from None
    for name, digest in listed.items():
        try:
            data = (folder / name).read_bytes()
        except OSError as error:
            raise _damaged(f"{folder / name}: {reason(error)}") from None
        if _digest(data) != digest:
            raise _damaged(f"{folder / name} was changed after the build")
    return Build(folder, manifest)


def _other_schema(path: str | Path, schema: Any) -> DiagnosticError:
    """A newer fp8c's build, or a manifest of something else."""
    family, _, version = str(schema).rpartition("/")
    mine, _, known = SCHEMA.rpartition("/")
    if family == mine and version.isdecimal() and int(version) > int(known):
        message = f"'{path}' was written by a newer fp8c: its schema is {schema!r}, this one reads {SCHEMA!r}"
        return fail("E0612", message, help="read it with the fp8c that wrote it", exit_code=ExitCode.USAGE)
    return _damaged(f"'{path}' has the schema {schema!r}, expected {SCHEMA!r}")


def _damaged(message: str) -> DiagnosticError:
    return fail("E0612", message, help="build it again with `fp8c compile`", exit_code=ExitCode.USAGE)

"""From an instance of a kernel (`GemmConfig`, `FusedConfig`) to machine code: NVRTC (or nvcc) behind a cache on disk. Needs no GPU.

The cache is a folder of files named by a hash of everything that went into them: sources, options, compiler version,
architecture. A file is a SHA-256 digest followed by the cubin; it is written beside and renamed into place under a lock,
checked whenever it is read, and rebuilt when the check fails. Several processes may share it.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from importlib import metadata
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path
from typing import Protocol

from filelock import FileLock

from fp8c.backends.cuda.sass import with_yields
from fp8c.cache import cache_folder
from fp8c.diagnostics import Diagnostic, ExitCode, Severity, fail, render

_LOG = logging.getLogger(__name__)
ARCHITECTURE = "sm_90a"
SOURCES = (
    "gemm.cu",
    "gemm_consumer.cuh",
    "gemm_epilogue.cuh",
    "gemm_producer.cuh",
    "gemm_shared.cuh",
    "ptx.cuh",
    "schedule.cuh",
)

# Those of the GEMM. register-usage-level 10: ptxas may use registers up to the limit instead of saving them for occupancy.
OPTIONS = ("-std=c++17", "--ptxas-options=--register-usage-level=10")

_SASS = "sass.py"  # changes the machine code of instances with `yield_every`
_DIGEST_BYTES = hashlib.sha256().digest_size


class Instance(Protocol):
    """What is compiled: files of this folder, the first of them including the others and the generated headers."""

    @property
    def sources(self) -> tuple[str, ...]: ...

    @property
    def kernel(self) -> str:
        """The name of the function."""

    @property
    def options(self) -> tuple[str, ...]: ...

    @property
    def shared_bytes(self) -> int: ...

    @property
    def yield_every(self) -> int:
        """Of the multiplications that follow one another in the machine code (`sass.with_yields`); 0: as the compiler has it."""

    def headers(self) -> dict[str, str]: ...

    def __hash__(self) -> int: ...


def cubin(config: Instance, folder: Path | None = None) -> bytes:
    """Machine code of one kernel, from the cache in `folder` (default: the user's) or freshly compiled into it.

    Raises: E0430 when neither NVRTC nor nvcc is installed, E0431 when the compiler rejects the kernel.
    """
    folder = folder or cache_folder("kernels")
    path = folder / f"{_key(config)}.cubin"
    code = _read_checked(path) or _read_checked(folder / f"{source_key(config)}.cubin")
    if code is not None:
        return code
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_suffix(".lock")):
            code = _read_checked(path)  # another process may have built it while this one waited
            if code is None:
                code = compile_cubin(config)
                _write_checked(path, code)
    except OSError as error:
        _remark(f"the kernel cache can't be written, so kernels are compiled in every process: {error}")
    return code or compile_cubin(config)


def install(key: str, code: bytes, folder: Path | None = None) -> None:
    """Put machine code that was compiled elsewhere into the cache, under the `source_key` of its instance."""
    folder = folder or cache_folder("kernels")
    path = folder / f"{key}.cubin"
    if _read_checked(path) != code:
        folder.mkdir(parents=True, exist_ok=True)
        _write_checked(path, code)


def build_all(configs: Iterable[Instance]) -> None:
    """Fill the cache, one process a core: before a benchmark, or ahead of time on a machine without a GPU."""
    # Not forked: the parent may hold a CUDA context.
    with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn")) as pool:
        list(pool.map(cubin, configs))


def has_compiler() -> bool:
    return _compiler() is not None


@cache
def _compiler() -> tuple[str, str] | None:
    """(name, version) of the compiler in use. Reading the version must stay cheap: it is part of every cache key."""
    if find_spec("cuda") is not None and find_spec("cuda.bindings") is not None:
        for package in ("nvidia-cuda-nvrtc", "nvidia-cuda-nvrtc-cu12"):
            try:
                return "nvrtc", metadata.version(package)
            except metadata.PackageNotFoundError:
                continue
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        return None
    text = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    return "nvcc", text.strip().splitlines()[-1]


@cache
def _source_texts(names: tuple[str, ...]) -> dict[str, str]:
    here = Path(__file__).parent
    return {name: (here / name).read_text() for name in names}


@cache
def source_digest() -> str:
    """Of the GEMM's sources and options: what a measured time of it belongs to."""
    parts = [*OPTIONS, *(text for _, text in sorted(_source_texts((*SOURCES, _SASS)).items()))]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:12]


def source_key(config: Instance) -> str:
    """Names an instance by what it is compiled from, whichever compiler that is: what a build brings along."""
    return _key(config, compiler="any")


def _key(config: Instance, compiler: str = "") -> str:
    parts = [compiler or str(_compiler()), ARCHITECTURE, *config.options]
    for name, text in sorted({**_source_texts(config.sources), **config.headers()}.items()):
        parts += [name, text]
    if config.yield_every:
        parts += [f"yield every {config.yield_every}", _source_texts((_SASS,))[_SASS]]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]


def _read_checked(path: Path) -> bytes | None:
    """The machine code in a file of the cache; None when there is none that can be trusted."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        _remark(f"a file of the kernel cache can't be read, and is made again: {error}")
        return None
    digest, code = content[:_DIGEST_BYTES], content[_DIGEST_BYTES:]
    if code and hashlib.sha256(code).digest() == digest:
        return code
    _remark(f"a file of the kernel cache is damaged, and is made again: {path}")
    return None


@cache
def _remark(message: str) -> None:
    _LOG.warning("%s", render(Diagnostic("R0438", message, severity=Severity.REMARK)))


def _write_checked(path: Path, code: bytes) -> None:
    handle, name = tempfile.mkstemp(dir=path.parent, suffix=".part")
    with os.fdopen(handle, "wb") as file:
        file.write(hashlib.sha256(code).digest() + code)
    os.replace(name, path)


def compile_cubin(config: Instance) -> bytes:
    """Compile without the cache. Raises as `cubin` does."""
    texts, main = _source_texts(config.sources), config.sources[0]
    headers = {name: text for name, text in texts.items() if name != main} | config.headers()
    code = compile_source(texts[main], headers, main, config.options)
    return with_yields(code, config.kernel, config.yield_every) if config.yield_every else code


def compile_source(
    source: str, headers: dict[str, str], name: str = "kernel.cu", options: tuple[str, ...] = OPTIONS
) -> bytes:
    """Compile one CUDA source with the headers it includes. Raises as `cubin` does."""
    compiler = _compiler()
    if compiler is None:
        raise fail(
            "E0430",
            "no compiler for the CUDA kernels: neither NVRTC nor nvcc was found",
            help="pip install cuda-bindings nvidia-cuda-nvrtc, or fill the cache with fp8c.backends.cuda.build.cubin "
            "where a compiler is",
            exit_code=ExitCode.TARGET,
        )
    compile_with = _compile_nvrtc if compiler[0] == "nvrtc" else _compile_nvcc
    return compile_with(source, headers, name, options)


def _rejected(name: str, log: str) -> Exception:
    return fail("E0431", f"the CUDA compiler rejected {name}: {log.strip()}", exit_code=ExitCode.BUG)


def _compile_nvrtc(source: str, headers: dict[str, str], name: str, options: tuple[str, ...]) -> bytes:
    from cuda.bindings import nvrtc

    names = [name.encode() for name in headers]
    texts = [text.encode() for text in headers.values()]
    error, program = nvrtc.nvrtcCreateProgram(source.encode(), name.encode(), len(names), texts, names)
    assert error == nvrtc.nvrtcResult.NVRTC_SUCCESS, error
    flags = [o.encode() for o in (f"--gpu-architecture={ARCHITECTURE}", *options)]
    (error,) = nvrtc.nvrtcCompileProgram(program, len(flags), flags)
    if error != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        _, size = nvrtc.nvrtcGetProgramLogSize(program)
        log = b" " * size
        nvrtc.nvrtcGetProgramLog(program, log)
        raise _rejected(name, log.decode(errors="replace"))
    _, size = nvrtc.nvrtcGetCUBINSize(program)
    code = b" " * size
    nvrtc.nvrtcGetCUBIN(program, code)  # fills the bytes in place
    nvrtc.nvrtcDestroyProgram(program)
    return bytes(code)


def _compile_nvcc(source: str, headers: dict[str, str], name: str, options: tuple[str, ...]) -> bytes:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for file, text in {**headers, name: source}.items():
            (folder / file).write_text(text)
        target = f"-gencode=arch=compute_{ARCHITECTURE[3:]},code={ARCHITECTURE}"
        command = ["nvcc", *options, target, "-cubin", "-o", "kernel.cubin", name]
        result = subprocess.run(command, cwd=folder, capture_output=True, text=True)
        if result.returncode != 0:
            raise _rejected(name, result.stderr)
        return (folder / "kernel.cubin").read_bytes()

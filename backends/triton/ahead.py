"""Compile the Triton kernels of a step for a GPU that is not present: PTX and cubin, and what ptxas says of each.

The launchers themselves say which kernels they start: they run on meta tensors while their launches are recorded instead
of made. Needs triton, no driver.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import re
import subprocess
import tempfile
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from threading import get_ident
from typing import Any

import torch
import triton
from torch import Tensor, fx
from triton._C.libtriton import native_specialize_impl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.compiler.compiler import get_cache_invalidating_env_vars, make_backend
from triton.runtime.cache import get_cache_key, get_cache_manager
from triton.runtime.jit import JITFunction

from fp8c import graph as g
from fp8c.backends.gemms.unsupported import Unsupported
from fp8c.backends.triton import KERNELS, gemm

CAPABILITY = {"sm90": 90, "sm100": 100}  # of the architectures that targets name
_POINTERS = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.uint8: "*u8",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.float8_e4m3fn: "*fp8e4nv",
    torch.float8_e5m2: "*fp8e5",
}
_OPTIONS = ("num_warps", "num_stages")
_BACKEND = type(make_backend(GPUTarget("cuda", 90, 32)))


@dataclass(frozen=True)
class Launch:
    """One specialisation of a kernel, as Triton's own launcher would choose it."""

    kernel: Any
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[int, Any], ...]
    divisible: tuple[int, ...]  # arguments that are multiples of 16
    options: tuple[tuple[str, int], ...]

    @property
    def name(self) -> str:
        text = repr((self.signature, self.constants, self.divisible, self.options))
        return f"{self.kernel.fn.__name__}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"

    def to_json(self) -> dict[str, Any]:
        """What `launch_from` makes the launch of again; `source` is Triton's hash of the kernel and all it calls."""
        return {
            "kernel": f"{self.kernel.fn.__module__}:{self.kernel.fn.__name__}",
            "source": self.kernel.cache_key,
            "signature": [list(pair) for pair in self.signature],
            "constants": [list(pair) for pair in self.constants],
            "divisible": list(self.divisible),
            "options": [list(pair) for pair in self.options],
        }


def launch_from(entry: Mapping[str, Any]) -> Launch:
    module, _, name = str(entry["kernel"]).partition(":")
    return Launch(
        getattr(importlib.import_module(module), name),
        tuple((a, t) for a, t in entry["signature"]),
        tuple((i, v) for i, v in entry["constants"]),
        tuple(entry["divisible"]),
        tuple((k, v) for k, v in entry["options"]),
    )


@dataclass(frozen=True)
class Compiled:
    """`spilled_bytes`: the stack frame of a thread, 0 unless registers ran out. `metadata`: what Triton's loader reads."""

    name: str
    ptx: str
    cubin: bytes
    registers: int
    spilled_bytes: int
    metadata: str
    launch: Launch


def compile_step(
    graphs: Iterable[fx.Graph], architecture: str, gemms: Iterable[fx.Node] = (), without: Container[fx.Node] = ()
) -> list[Compiled]:
    """The kernels of every fp8c operator in these graphs, each specialisation once; symbolic sizes by their examples.

    gemms: the scaled GEMMs that Triton serves (`triton_serves`); none of the others are compiled here
    without: operators that something else serves
    """
    launches = launches_of(graphs, architecture, gemms, without)
    return [compile_launch(launch, CAPABILITY[architecture]) for launch in launches]


def launches_of(
    graphs: Iterable[fx.Graph], architecture: str, gemms: Iterable[fx.Node] = (), without: Container[fx.Node] = ()
) -> list[Launch]:
    """What `compile_step` compiles, with the same arguments."""
    launches: dict[str, Launch] = {}
    with recording(launches), gemm.compiled_for(architecture):
        for node in (node for graph in graphs for node in graph.nodes):
            launcher = KERNELS.get(operator_name(node))
            if launcher is not None and node not in without:
                launcher(*fx.map_arg(node.args, as_meta), **fx.map_arg(node.kwargs, as_meta))
        for node in gemms:
            getattr(gemm, operator_name(node))(*fx.map_arg(node.args, as_meta))
    return list(launches.values())


def triton_serves(node: fx.Node, architecture: str) -> bool:
    """Whether the Triton GEMMs take this node's operands."""
    with recording({}), gemm.compiled_for(architecture):
        try:
            getattr(gemm, operator_name(node))(*fx.map_arg(node.args, as_meta))
        except Unsupported:
            return False
    return True


def operator_name(node: fx.Node) -> str:
    target = node.target
    is_ours = isinstance(target, torch._ops.OpOverload) and target.namespace == "fp8c"
    return target._schema.name.removeprefix("fp8c::") if is_ours else ""  # type: ignore[union-attr]


def as_meta(node: fx.Node) -> Any:
    value = g.value(node)
    if not isinstance(value, Tensor):
        return g.size_hint(value)
    sizes, strides = ([g.size_hint(n) for n in ns] for ns in (value.shape, value.stride()))
    return torch.empty_strided(sizes, strides, dtype=value.dtype, device="meta")


@contextlib.contextmanager
def recording(launches: dict[str, Launch]) -> Iterator[None]:
    """Collect this thread's launches instead of making them."""
    thread = get_ident()

    def record(kernel: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        if get_ident() != thread:
            return original(kernel, *args, grid=grid, warmup=warmup, **kwargs)
        launch = launch_of(kernel, args, kwargs)
        return launches.setdefault(launch.name, launch)

    original: Callable[..., Any] = JITFunction.run
    JITFunction.run = record
    try:
        yield
    finally:
        JITFunction.run = original


def launch_of(kernel: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Launch:
    """What Triton would specialise on: constants, arguments that are 1, arguments that 16 divides."""
    options = {key: kwargs.pop(key) for key in _OPTIONS if key in kwargs}
    values = dict(zip(kernel.arg_names, args)) | kwargs
    declared = {p.name for p in kernel.params if p.is_constexpr}
    signature: dict[str, str] = {}
    constants: dict[int, Any] = {}
    divisible = []
    for index, name in enumerate(kernel.arg_names):
        value = values[name]
        if name in declared:
            signature[name], constants[index] = "constexpr", value
        elif isinstance(value, Tensor):
            signature[name] = _POINTERS[value.dtype]
            divisible.append(index)  # PyTorch's allocations are
        else:
            is_special = name not in unspecialized(kernel)
            signature[name], attribute = native_specialize_impl(_BACKEND, value, False, is_special, True)
            constants |= {index: value} if signature[name] == "constexpr" else {}
            divisible += [index] if attribute == "D" else []
    return Launch(
        kernel, tuple(signature.items()), tuple(constants.items()), tuple(divisible), tuple(sorted(options.items()))
    )


def unspecialized(kernel: Any) -> set[str]:
    return {p.name for p in kernel.params if p.do_not_specialize}


def compile_launch(launch: Launch, capability: int) -> Compiled:
    source = source_of(launch, capability)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=dict(launch.options))
    registers, spilled_bytes = resources(compiled.asm["cubin"])
    name = launch.kernel.fn.__name__
    group = get_cache_manager(compiled.hash).get_group(f"{name}.json") or {}
    metadata = Path(group[f"{name}.json"]).read_text(encoding="utf-8")
    return Compiled(launch.name, compiled.asm["ptx"], compiled.asm["cubin"], registers, spilled_bytes, metadata, launch)


def fill_cache(launch: Launch, capability: int) -> None:
    """Put a kernel, and on a machine with its GPU the launcher of its signature, into Triton's cache."""
    target = GPUTarget("cuda", capability, 32)
    compiled = triton.compile(source_of(launch, capability), target=target, options=dict(launch.options))
    if torch.cuda.is_available():
        triton.runtime.driver.active.launcher_cls(compiled.src, compiled.metadata)


def source_of(launch: Launch, capability: int) -> ASTSource:
    """As Triton's launcher states it: attributes are part of the key, and versions differ in how they state them."""
    constants = dict(launch.constants)
    bound = {name: constants.get(index) for index, (name, _) in enumerate(launch.signature)}
    plain = unspecialized(launch.kernel)
    specialization = [
        (
            kind,
            None if kind[0] not in "*iu" or kind == "u1" or name in plain else "D" if index in launch.divisible else "",
        )
        for index, (name, kind) in enumerate(launch.signature)
    ]
    backend = make_backend(GPUTarget("cuda", capability, 32))
    _, signature, constexprs, attrs = launch.kernel._pack_args(
        backend, dict(launch.options), bound, specialization, None
    )
    return ASTSource(fn=launch.kernel, signature=signature, constexprs=constexprs, attrs=attrs)


def install(entry: Mapping[str, Any], cubin: bytes, metadata: str, capability: int) -> bool:
    """Put a kernel that was compiled elsewhere where Triton looks for it. False when its source is not this one's.

    Triton's key holds a hash of its own installation, so it is computed here anew; what makes the machine code, the
    kernel's source and Triton's version, is compared.
    """
    launch = launch_from(entry)
    if launch.kernel.cache_key != entry["source"]:
        return False
    backend, source = make_backend(GPUTarget("cuda", capability, 32)), source_of(launch, capability)
    options = backend.parse_options(dict(launch.options) | source.parse_options())
    key = get_cache_key(source, backend, options, env_vars=get_cache_invalidating_env_vars())
    digest = hashlib.sha256(key.encode("utf-8")).hexdigest()
    cache, name = get_cache_manager(digest), launch.kernel.fn.__name__
    known = cache.get_file(f"{name}.cubin")
    if cache.get_group(f"{name}.json") and known is not None and Path(known).read_bytes() == cubin:
        return True
    files = {f"{name}.json": metadata, f"{name}.cubin": cubin}
    cache.put_group(f"{name}.json", {file: cache.put(content, file) for file, content in files.items()})
    return True


def resources(cubin: bytes) -> tuple[int, int]:
    """Registers and stack bytes of a thread, as cuobjdump of Triton's own package reads them."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "kernel.cubin"
        path.write_bytes(cubin)
        text = subprocess.run([str(tool), "-res-usage", str(path)], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    assert found is not None, text
    return int(found[1]), int(found[2])

"""A step that was compiled once is not compiled again by the next process: PyTorch's AOTAutograd cache keeps its halves.

    with remembering(identity, restored) as compiler:      around the call of AOTAutograd
        aot_autograd(fw_compiler=compiler(lower_forward), ...)(gm, inputs)

AOTAutograd finds a graph of Dynamo's by its code, its inputs and PyTorch's settings. What a step depends on besides
is added to its key: fp8c's own source, the session's settings (`identity`), and where in the model each operator stands,
because rules name modules and remarks name lines. A hit skips all that lies behind Dynamo: the joint graph, the passes,
Inductor. Where PyTorch's cache is off (TORCHINDUCTOR_FORCE_DISABLE_CACHES=1), or a graph is none it takes, everything is as
without it.

It lies in PyTorch's cache folder (TORCHINDUCTOR_CACHE_DIR), because Inductor's code does.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import hashlib
import importlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import fx
from torch._functorch import config as functorch_config
from torch._functorch._aot_autograd.autograd_cache import BypassAOTAutogradCache
from torch._functorch._aot_autograd.schemas import SerializableAOTDispatchCompiler
from torch._inductor.codecache import FxGraphCache
from torch._inductor.output_code import CompiledFxGraph, CompiledFxGraphConstants, OutputCode
from torch._inductor.utils import BoxedBool

import fp8c
from fp8c.diagnostics import Diagnostic
from fp8c.kept_weights import Chain

Lowered = Callable[..., Any]
Compiler = Callable[..., OutputCode]

compiler_config: Any = importlib.import_module("torch.compiler.config")  # its `patch` is put in when it is imported

#: Folders whose files decide what a graph becomes, and the kernels it calls: those have caches of their own, but only a step that
#: is made anew has them compiled beside Inductor.
_PACKAGES = ("fp8c", "passes", "backends", "specs")
_SUFFIXES = {".py", ".fp8", ".lark", ".toml", ".cu", ".cuh"}


@dataclass(kw_only=True)
class LoweredHalf(OutputCode):
    """A half as it runs, and as AOTAutograd's cache keeps it.

    run:          boxed; kept between processes where Inductor made it
    chains:       weight quantizes taken out of it, whose results it takes as further inputs
    releases:     it frees those
    accumulators: parameters whose `main_grad` it takes behind them, with the result that each is
    is_backward:  backward of a step
    is_inference: a forward without a backward
    remarks:      what the passes noticed
    communicates: it exchanges something with other ranks
    bound:        `run` behind what belongs to one session; None until it is bound
    """

    run: Lowered
    chains: tuple[Chain, ...] = ()
    releases: bool = False
    accumulators: Mapping[str, int] = field(default_factory=dict)
    is_backward: bool = False
    is_inference: bool = False
    remarks: tuple[Diagnostic, ...] = ()
    communicates: bool = False
    bound: Lowered | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        self._boxed_call = True  # of the instance, because wrappers copy what is there

    def __call__(self, inputs: Any) -> Any:
        assert self.bound is not None
        return self.bound(inputs)

    def prepare_for_serialization(self) -> None:
        """Of a shallow copy that is to be pickled.

        Raises: BypassAOTAutogradCache for a half that only this process can run
        """
        if not isinstance(self.run, CompiledFxGraph):
            raise BypassAOTAutogradCache("a half of fp8c's was not lowered by Inductor")
        if self.communicates:  # ranks compare their graphs first, which a cached one has none of
            raise BypassAOTAutogradCache("a half of fp8c's exchanges rows with other ranks")
        self.run = copy.copy(as_stored(self.run))
        self.run.prepare_for_serialization()
        self.bound = None

    def post_compile(
        self, example_inputs: Sequence[Any], constants: CompiledFxGraphConstants, graph_kwargs: Mapping[str, Any]
    ) -> None:
        """Of a half that was read from the cache.

        Raises: RuntimeError where Inductor's code is gone, for AOTAutograd, which then compiles
        """
        assert isinstance(self.run, CompiledFxGraph)
        settings: Any = {**graph_kwargs, "cudagraphs": BoxedBool(False)}  # as it was compiled, whatever the setting now
        search = _search.get()
        with search.for_inductor():
            graph, _ = FxGraphCache.cache_hit_post_compile(self.run, {}, constants)
            if graph is None:
                raise RuntimeError("Inductor's code of a half is gone")
            graph.post_compile(example_inputs, constants, settings)
        self.run = graph
        search.restored(self)


def as_stored(graph: CompiledFxGraph) -> CompiledFxGraph:
    """What can be pickled of Inductor's code.

    Code that Inductor found in its own cache holds kernels that are loaded by now, which can't be pickled; its file can be read once
    more. So it is where a step is new, but its graph had been compiled before: with another version or option of fp8c's, say.

    Raises: BypassAOTAutogradCache where Inductor's file is gone
    """
    bundle = graph._triton_bundle
    if bundle is None or not any(found.kernel.launchers for found in bundle.static_autotuners or ()):
        return graph
    key = graph._fx_graph_cache_key
    stored = FxGraphCache.iterate_over_candidates(True, None, key) if key else ()
    for candidate, *_ in stored:
        if (candidate.source_code, candidate.guards_expr) == (graph.source_code, graph.guards_expr):
            return candidate
    raise BypassAOTAutogradCache("Inductor's code of a half of fp8c's is no longer in its cache")


@dataclass(frozen=True)
class Search:
    """What goes with one look into the cache.

    tag:      what the user adds to PyTorch's keys (TORCH_COMPILE_CACHE_KEY_TAG)
    restored: called with each half that was found
    """

    tag: str
    restored: Callable[[LoweredHalf], None]

    @contextlib.contextmanager
    def for_inductor(self) -> Iterator[None]:
        """Inductor keeps what it compiles in a cache of its own, where a graph is the same in any model."""
        with compiler_config.patch(cache_key_tag=self.tag), functorch_config.patch(bundled_autograd_cache=False):
            yield


_search: ContextVar[Search] = ContextVar("fp8c_search")


@contextlib.contextmanager
def remembering(
    identity: Mapping[str, Any], gm: fx.GraphModule, restored: Callable[[LoweredHalf], None]
) -> Iterator[Callable[[Compiler], Compiler]]:
    """Let the AOTAutograd call inside find what an earlier process compiled, and keep what this one compiles.

    identity: what distinguishes this session's steps from others of the same graph; values for json
    restored: called with each half that was found, to be bound
    Gives:    what the halves' compilers have to be wrapped in
    """
    search = Search(compiler_config.cache_key_tag, restored)
    tag = f"{search.tag} fp8c {digest({**identity, 'places': places(gm)})}"
    settings = {
        "bundled_autograd_cache": True,  # the halves themselves, not Inductor's keys for them
        "force_non_lazy_backward_lowering": True,  # a step is kept when both are there
    }

    def cacheable(compile_half: Compiler) -> Compiler:
        def compiled(gm: fx.GraphModule, inputs: Sequence[Any]) -> OutputCode:
            with search.for_inductor():
                return compile_half(gm, inputs)

        return SerializableAOTDispatchCompiler(OutputCode, compiled)

    token = _search.set(search)
    try:
        with functorch_config.patch(settings), compiler_config.patch(cache_key_tag=tag):
            yield cacheable
    finally:
        _search.reset(token)


def places(gm: fx.GraphModule) -> list[Any]:
    """Where each operator stands: the modules it was called in and the lines of Python."""
    found: list[Any] = []
    for node in gm.graph.nodes:
        stack = node.meta.get("nn_module_stack") or {}
        modules = [(path, getattr(kind, "__qualname__", str(kind))) for path, kind in stack.values()]
        found.append((modules, node.meta.get("stack_trace")))
    return found


def digest(identity: Mapping[str, Any]) -> str:
    text = json.dumps({"source": source_digest(), **identity}, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


@functools.cache
def source_digest() -> str:
    """Of the files that decide what a graph becomes and how it runs."""
    root = Path(fp8c.__file__).parent
    found = hashlib.sha256(torch.__version__.encode())
    for package in _PACKAGES:
        folder = root if package == "fp8c" else root / package
        for path in sorted(folder.resolve().rglob("*")):
            if path.suffix in _SUFFIXES:
                found.update(path.name.encode() + b"\0" + path.read_bytes())
    return found.hexdigest()

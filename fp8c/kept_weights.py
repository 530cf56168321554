"""FP8 weights are quantized once for each value they have, not once for each forward and backward.

    main, chains = split_weights(half)     the half without its weight quantizes, which become further inputs
    store.values(chain, weights)           their results: computed when a weight has changed, else those at hand

A half's weight quantizes read nothing but parameters, so their results hold until an optimizer writes the parameter.
That shows in the tensor's version, which every in-place operation counts up, also under `no_grad` (PyTorch's optimizers,
fused ones too, `load_state_dict`, `copy_`), in its address, and in whether the memory there is still the same one (a new
tensor may come to lie where a freed one lay). What goes around the version (`p.data.add_`) is seen when
it happens inside the `step()` of a `torch.optim.Optimizer`, behind the step of one that holds none of these weights and so
may hold their FP32 masters (`p.data.copy_(master)`), or where a backward has run and its gradient is gone (`p.grad = None`), as
in a loop without an optimizer (`p.data -= lr * p.grad`); otherwise call `fp8c.weights_changed(step)`.
"""

from __future__ import annotations

import ctypes
import operator
import threading
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.optim.optimizer import register_optimizer_step_post_hook

from fp8c import graph as g
from fp8c import ops
from fp8c.ops.transpose import TRANSPOSED

#: Operators whose results are kept when they read nothing but weights: `fp8c::quantize` and its fused forms.
_QUANTIZER = "quantize"


@dataclass(frozen=True)
class Chain:
    """One weight quantize with what lies in front of it (casts, stacks, transposes).

    key:     the parameters' names and what is computed of them, the same in forward, backward and other graphs
    weights: places of the parameters among the half's inputs
    run:     weights -> all results of the quantize, also those that only another half reads
    reads:   places of the results this half reads
    """

    key: str
    weights: tuple[int, ...]
    run: fx.GraphModule
    reads: tuple[int, ...]


@dataclass
class Entry:
    state: tuple[tuple[int, int], ...]  # (address, version) of each weight
    values: tuple[Tensor, ...]
    storages: tuple[StorageWeakRef, ...]  # of the weights: whether their memory was freed since
    backwards: int = 0  # that had run when it was quantized
    is_stale: bool = False

    def is_of(self, state: tuple[tuple[int, int], ...]) -> bool:
        if self.is_stale or self.state != state:
            return False
        return not any(storage.expired() for storage in self.storages)  # type: ignore[no-untyped-call]


@dataclass
class WeightStore:
    """The quantized weights of one compiled model. `refreshed` counts quantizations, for tests and reports."""

    entries: dict[str, Entry] = field(default_factory=dict)
    refreshed: int = 0
    backwards: int = 0  # that have run
    _lock: threading.Lock = field(default_factory=threading.Lock)  # backward runs in another thread

    def __post_init__(self) -> None:
        store = weakref.ref(self)

        def stepped(optimizer: torch.optim.Optimizer, *_: Any) -> None:
            alive = store()
            if alive is not None and alive.entries:
                parameters = [p for group in optimizer.param_groups for p in group["params"]]
                addresses = {p.data_ptr() for p in parameters if _has_address(p)}
                # It may hold masters, which are copied into the weights through `.data`, or be another model's: who knows.
                alive.invalidate(addresses if alive.holds(addresses) else None)

        handle = register_optimizer_step_post_hook(stepped)
        weakref.finalize(self, handle.remove)

    def __deepcopy__(self, memo: dict[int, Any]) -> WeightStore:
        return WeightStore()

    @property
    def size_bytes(self) -> int:
        return sum(v.numel() * v.element_size() for entry in self.entries.values() for v in entry.values)

    def invalidate(self, addresses: set[int] | None = None) -> None:
        """Quantize the weights at these addresses (all of them by default) again when they are next read."""
        with self._lock:
            for entry in self.entries.values():
                if addresses is None or any(address in addresses for address, _ in entry.state):
                    entry.is_stale = True

    def holds(self, addresses: set[int]) -> bool:
        """Whether a weight at one of these addresses is among those kept."""
        with self._lock:
            return any(address in addresses for entry in self.entries.values() for address, _ in entry.state)

    def values(self, chain: Chain, weights: Sequence[Tensor], *, is_backward: bool = False) -> tuple[Tensor, ...]:
        """All results of the chain's quantize for these weights."""
        if any(w.is_inference() for w in weights):  # made under inference_mode: they count no version
            return self.computed(chain, weights)
        state = tuple((w.data_ptr(), w._version) for w in weights)
        if weights[0].is_cuda and torch.cuda.is_current_stream_capturing():
            # A captured graph is replayed without this code: it must quantize by itself, once.
            state += ((0, capture_id()),)
        with self._lock:
            entry = self.entries.get(chain.key)
            if (
                entry is not None
                and not is_backward
                and entry.backwards < self.backwards
                and _gradients_are_gone(weights)
            ):
                entry.is_stale = True
            if entry is None or not entry.is_of(state):
                self.entries.pop(chain.key, None)
                del entry  # frees the old values first
                storages = tuple(StorageWeakRef(w.untyped_storage()) for w in weights)  # type: ignore[no-untyped-call]
                entry = self.entries[chain.key] = Entry(state, self.computed(chain, weights), storages, self.backwards)
            return entry.values

    def release(self, chain: Chain) -> None:
        """Keep the chain's results no longer. Who reads them next computes them again."""
        with self._lock:
            self.entries.pop(chain.key, None)

    def clear(self) -> None:
        """Keep nothing: for a model that is gone, whose compiled code Dynamo keeps."""
        with self._lock:
            self.entries.clear()

    def computed(self, chain: Chain, weights: Sequence[Tensor]) -> tuple[Tensor, ...]:
        self.refreshed += 1
        with torch.inference_mode(False), torch.no_grad():
            return tuple(chain.run(*(w.detach() for w in weights)))


def capture_id() -> int:
    """The number of the CUDA graph that the current stream is being captured into."""
    status, number = ctypes.c_int(), ctypes.c_uint64()
    stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
    driver = ctypes.CDLL("libcuda.so.1")
    code = driver.cuStreamGetCaptureInfo_v2(stream, ctypes.byref(status), ctypes.byref(number), None, None, None)
    if code:
        raise RuntimeError(f"cuStreamGetCaptureInfo failed with {code}")
    return number.value


def _gradients_are_gone(weights: Sequence[Tensor]) -> bool:
    """Whether these are trained, and hold no gradient: somebody took it, and may have changed them by it."""
    trained = all(w.is_leaf and w.requires_grad and not hasattr(w, "main_grad") for w in weights)
    return trained and all(w.grad is None for w in weights)


def _has_address(tensor: Any) -> bool:
    return isinstance(tensor, Tensor) and tensor.layout is torch.strided and not hasattr(tensor, "device_mesh")


def split_weights(gm: fx.GraphModule) -> tuple[fx.GraphModule, list[Chain]]:
    """Take the weight quantizes out of a half.

    Returns: the half with one more input for each of their results, in order, and the chains that compute those
    """
    graph = g.copy_graph(gm.graph)
    places = {n: i for i, n in enumerate(graph.find_nodes(op="placeholder"))}
    of_weights: set[fx.Node] = set()
    chains: list[Chain] = []
    last = max(places, key=lambda n: places[n], default=None)
    for node in graph.nodes:
        if node.op == "placeholder":
            if node.meta.get("fp8c_name") and isinstance(node.meta.get("val"), Tensor):
                of_weights.add(node)
        elif node.op == "call_function" and node.all_input_nodes and _is_pure(node):
            if all(n in of_weights for n in node.all_input_nodes):
                of_weights.add(node)
    for node in list(graph.nodes):
        if node not in of_weights or not _is_quantizer(node):
            continue
        node = _in_one_orientation(graph, node)
        of_weights.add(node)
        results = sorted(node.users, key=lambda n: int(str(n.args[1])))
        chain = _chain(gm, graph, node, results, places)
        assert last is not None
        for i, result in enumerate(results):
            with graph.inserting_after(last):
                kept = last = graph.placeholder(f"{node.name}_kept_{i}")
            kept.meta["val"] = result.meta["val"]
            result.replace_all_uses_with(kept)
        chains.append(chain)
    if chains:
        graph.eliminate_dead_code()
        graph.lint()
    return fx.GraphModule(gm, graph), chains


def _in_one_orientation(graph: fx.Graph, node: fx.Node) -> fx.Node:
    """A weight is kept as it is stored. What reads it transposed (dgrad) gets a transposed copy for as long as it needs it:
    a second kept copy would cost a byte for each weight all the time, and the copy takes less time than quantizing.
    """
    data_of = {"quantize_transposed": 0, "quantize_weight": 1}.get(_name(node))
    if data_of is None:
        return node
    scale_of = {"quantize_transposed": 1, "quantize_weight": 2}[_name(node)]
    with graph.inserting_before(node):
        pair = g.emit(graph, ops.QUANTIZE, *node.args, like=node)
        kept = [g.emit(graph, operator.getitem, pair, i, like=node) for i in range(2)]
    for user in list(node.users):
        if user.args[1] == data_of:
            with graph.inserting_before(user):
                user.replace_all_uses_with(g.emit(graph, TRANSPOSED, kept[0], like=user))
        else:
            user.replace_all_uses_with(kept[1] if user.args[1] == scale_of else kept[0])
        graph.erase_node(user)
    graph.erase_node(node)
    for result in kept:
        if not result.users:
            graph.erase_node(result)
    return pair


def _is_pure(node: fx.Node) -> bool:
    target = node.target
    if target is torch.ops.fp8c.quantize_delayed.default:  # reads and writes a history: once in every forward
        return False
    return not isinstance(target, torch._ops.OpOverload) or not (
        target._schema.is_mutable or torch.Tag.nondeterministic_seeded in target.tags
    )


def _is_quantizer(node: fx.Node) -> bool:
    return _name(node).startswith(_QUANTIZER)


def _name(node: fx.Node) -> str:
    """Name of the fp8c operator a node calls; "" for anything else."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload) or target.namespace != "fp8c":
        return ""
    return target._schema.name.split("::")[1]


def _chain(
    gm: fx.GraphModule, graph: fx.Graph, node: fx.Node, results: list[fx.Node], places: dict[fx.Node, int]
) -> Chain:
    """The part of the graph that computes the results of one weight quantize."""
    needed, frontier = set[fx.Node](), [node]
    while frontier:
        n = frontier.pop()
        if n not in needed:
            needed.add(n)
            frontier += n.all_input_nodes
    part = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    weights: list[fx.Node] = []
    for n in graph.nodes:
        if n in needed and n.op == "placeholder":
            env[n] = part.placeholder(f"weight_{len(weights)}")  # the name must not depend on the graph it came from
            env[n].meta.update(n.meta)
            weights.append(n)
        elif n in needed:
            env[n] = part.node_copy(n, env.__getitem__)
    part.output(env[node])
    names = " ".join(n.meta["fp8c_name"] for n in weights)
    key = f"{names} {g.structural_hash(part)}"
    reads = tuple(r.args[1] for r in results)
    return Chain(key, tuple(places[n] for n in weights), fx.GraphModule(gm, part), reads)  # type: ignore[arg-type]


def run_with_kept(
    run: Callable[..., Any],
    chains: Sequence[Chain],
    store: WeightStore,
    releases: bool = False,
    *,
    is_backward: bool = False,
) -> Callable[..., Any]:
    """A half's compiled function, `run`, behind one that adds the kept weights to its inputs. Boxed, as `run` is.

    releases: hand them over, so that `run` frees each behind its last use
    """

    def boxed(inputs: list[Any]) -> Any:
        for chain in chains:
            values = store.values(chain, [inputs[i] for i in chain.weights], is_backward=is_backward)
            inputs += [values[i] for i in chain.reads]
            if releases:
                store.release(chain)
            del values
        if is_backward:
            store.backwards += 1
        return run(inputs)

    boxed._boxed_call = True  # type: ignore[attr-defined]
    return boxed


def reason_not_to_keep(module: nn.Module) -> str:
    """Why quantized weights of this module can't be kept; "" when they can.

    FSDP2 gathers a parameter anew for each layer's forward and backward, without counting its version up; the parts of a
    tensor subclass have no version of their own.
    """
    from torch.distributed.fsdp import FSDPModule

    if any(isinstance(m, FSDPModule) for m in module.modules()):
        return "FSDP gathers the weights anew for every forward"
    if any(hasattr(p, "device_mesh") for p in module.parameters()):
        return "parameters are distributed tensors"
    return ""

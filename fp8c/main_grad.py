"""FP32 gradients: backward adds each weight gradient to its parameter's `main_grad` inside the GEMM that computes it.

    Before:  %dw = fp8c.scaled_mm(%dyq, %dys, %xq, %xs, ..., bfloat16)      returned as the parameter's gradient
    After:   fp8c.scaled_mm_add_(%main_grad, %dyq, %dys, %xq, %xs, ...)     f32[N, K] += FP32 product; None is returned

    Before:  %de = aten.embedding_dense_backward(%dy, %ids, V, -1, False)    bf16[V, H], most of it zeros
    After:   aten.index_put_(%main_grad, [%ids], %dy, accumulate=True)       the rows of the batch's words, in FP32

`p.main_grad` is an FP32 tensor of the parameter's shape, zero at first, as Megatron-LM has it; `p.grad` stays None. What
is neither (norms, biases) is added as it is, so every trained parameter follows one convention, and a
gradient that reaches a parameter outside the compiled step is moved over by a hook.

An expert that a mesh shards has a DTensor as its `main_grad`; the graph adds to this rank's part of it. AOTAutograd makes
DTensors of such gradients and takes no None for them, so the graph returns zeros, which the hook throws away.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.distributed.tensor import DTensor
from torch.optim.optimizer import register_optimizer_step_pre_hook

from fp8c import graph as g
from fp8c import ops
from fp8c.diagnostics import ExitCode, fail
from fp8c.graph import aten

log = logging.getLogger("fp8c")

#: On the backward half's output node: for each result the parameter whose gradient it is, "" for anything else.
GRADIENT_OF = "fp8c_gradient_of"

_ADDING: dict[Any, Any] = {ops.SCALED_MM: ops.SCALED_MM_ADD_, ops.SCALED_GROUPED_WGRAD: ops.SCALED_GROUPED_WGRAD_ADD_}


_EMBEDDING = aten.embedding_dense_backward.default


def add_main_grads(module: nn.Module) -> None:
    """Give every trained parameter of a module an FP32 `main_grad`, unless it has one.

    Raises: DiagnosticError E0843 for parameters that are sharded, but for experts over a mesh's dimension "ep"
    """
    warn_of_unread_gradients()
    for name, p in module.named_parameters():
        if not p.requires_grad or p.is_meta:
            continue
        if hasattr(p, "device_mesh") and not is_sharded_expert(p):
            raise fail(
                "E0843",
                f"main_grad=True needs whole parameters or sharded experts, but '{name}' is sharded otherwise",
                help="compile without main_grad: FSDP2 reduces gradients in FP32 with MixedPrecisionPolicy(reduce_dtype=...)",
                exit_code=ExitCode.MODEL,
            )
        accumulator_of(p)


def warn_of_unread_gradients() -> None:
    """From now on a step of an optimizer that finds no `grad` because main_grad holds it is remarked, once for each.

    Optimizers that read `main_grad` say so with an attribute `reads_main_grad = True`.
    """
    global _is_watching
    if not _is_watching:
        _is_watching = True
        register_optimizer_step_pre_hook(_look_at_gradients)


_is_watching = False
_told: weakref.WeakSet[torch.optim.Optimizer] = weakref.WeakSet()  # those that were remarked


def _look_at_gradients(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    if getattr(optimizer, "reads_main_grad", False) or optimizer in _told:
        return
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    if any(p.grad is None and getattr(p, "_fp8c_moves_grad", False) and p.requires_grad for p in parameters):
        _told.add(optimizer)
        name = type(optimizer).__name__
        log.warning(
            "W0843: %s reads `grad`, which main_grad=True leaves empty: it trains nothing of this step (use "
            "fp8c.optim.AdamW, compile without main_grad, or set `reads_main_grad = True` on an optimizer that reads it)",
            name,
        )


def _move_grad(p: Tensor) -> None:
    """A gradient that came past the compiled step: an uncompiled call, or the other side of a graph break."""
    if p.grad is not None and getattr(p, "main_grad", None) is not None:
        gradient, placeholder = local(p.grad), p.__dict__.pop("_fp8c_placeholder", None)
        if placeholder is None or gradient.untyped_storage().data_ptr() != placeholder.untyped_storage().data_ptr():
            local(p.main_grad).add_(gradient)  # type: ignore[attr-defined]
        p.grad = None


def is_sharded_expert(p: Tensor) -> bool:
    """Whether a parameter's shards lie over a mesh's dimension "ep" alone, one along its first axis each."""
    return isinstance(p, DTensor) and p.device_mesh.mesh_dim_names == ("ep",)


def local(t: Tensor) -> Tensor:
    """The part of a DTensor on this rank; any other tensor as it is."""
    return t._local_tensor if isinstance(t, DTensor) else t


#: On the gradient of an expert that a mesh shards: True where `distributed.reduce_gradients` has divided it, False where
#: a backward has added to it since. An optimizer's step and zeroing take it off.
IS_MEAN = "_fp8c_is_mean"


def zero_main_grads(parameters: Iterable[Tensor]) -> None:
    """Set every `main_grad` to zero in place."""
    by_device: dict[torch.device, list[Tensor]] = {}
    for found in (getattr(p, "main_grad", None) for p in parameters):
        if isinstance(found, Tensor):
            found.__dict__.pop(IS_MEAN, None)
            by_device.setdefault(found.device, []).append(local(found))
    with torch.no_grad():
        for tensors in by_device.values():
            torch._foreach_zero_(tensors)


def mark_gradients(backward: fx.Graph, primals: Sequence[str], inputs: Mapping[str, str]) -> None:
    """Note on the backward half which result is whose gradient. Results come in the order of the joint graph's primals."""
    output = g.output_node(backward)
    results = output.args[0]
    assert isinstance(results, (list, tuple))
    names = [inputs.get(primal, "") for primal in primals]
    output.meta[GRADIENT_OF] = [
        name if isinstance(result, fx.Node) else ""
        for result, name in zip(results, names + [""] * (len(results) - len(names)))
    ]


def split_gradients(gm: fx.GraphModule, sharded: Collection[str] = ()) -> tuple[fx.GraphModule, dict[str, int]]:
    """Let a backward half add its weight gradients to further inputs instead of returning them.

    sharded: parameters that are DTensors
    Returns: the half, with None for those results (zeros for DTensors), and the parameters whose accumulators it takes,
             in order, with the result that each of them is
    """
    owners: list[str] = g.output_node(gm.graph).meta.get(GRADIENT_OF, [])
    if not any(owners):
        return gm, {}
    graph = g.copy_graph(gm.graph)
    output = g.output_node(graph)
    results = list(output.args[0])  # type: ignore[arg-type]
    last = graph.find_nodes(op="placeholder")[-1]
    names: dict[str, int] = {}
    for i, (result, name) in enumerate(zip(results, owners)):
        if not name:
            continue
        with graph.inserting_after(last):
            accumulator = last = graph.placeholder(f"main_grad_{i}")
        with g.value(result).fake_mode:
            accumulator.meta["val"] = torch.empty(
                g.value(result).shape, dtype=torch.float32, device=g.value(result).device
            )
        add_to(graph, accumulator, result, output)
        results[i] = _zeros_like(graph, result, output) if name in sharded else None
        names[name] = i
    output.args = (tuple(results) if isinstance(output.args[0], tuple) else results,)
    graph.eliminate_dead_code()
    graph.lint()
    return fx.GraphModule(gm, graph), names


def _zeros_like(graph: fx.Graph, gradient: fx.Node, output: fx.Node) -> fx.Node:
    val = g.value(gradient)
    with graph.inserting_before(output):
        zeros = graph.call_function(aten.full.default, (list(val.shape), 0), {"dtype": val.dtype, "device": val.device})
    with val.fake_mode:
        zeros.meta["val"] = torch.zeros(val.shape, dtype=val.dtype, device=val.device)
    return zeros


def add_to(graph: fx.Graph, accumulator: fx.Node, gradient: fx.Node, output: fx.Node) -> None:
    """Insert `accumulator += gradient`: in the GEMM that computes it where that is one, row by row for an embedding, else
    right behind it."""
    source, transposed = behind_views(gradient)
    adding = _ADDING.get(source.target) if source.op == "call_function" else None
    if adding is not None and len(source.users) == 1:
        operands, (a_fmt, b_fmt, promote_every, _) = list(source.args[:-4]), source.args[-4:]
        if transposed:  # (A B^T)^T = B A^T
            operands[:4] = [*operands[2:4], *operands[:2]]
            a_fmt, b_fmt = b_fmt, a_fmt
        with graph.inserting_before(source):
            g.emit(graph, adding, accumulator, *operands, a_fmt, b_fmt, promote_every, like=source)
        return
    if source.target is _EMBEDDING and len(source.users) == 1 and not transposed and source.args[3:] == (-1, False):
        dy, indices = source.args[:2]
        with graph.inserting_before(source):
            wide = g.emit(graph, aten._to_copy.default, dy, dtype=torch.float32, like=source)
            g.emit(graph, aten.index_put_.default, accumulator, [indices], wide, True, like=source)
        return
    with graph.inserting_before(g.after(gradient) if gradient.op != "placeholder" else output):
        g.emit(graph, aten.add_.Tensor, accumulator, gradient, like=gradient)


def behind_views(node: fx.Node) -> tuple[fx.Node, bool]:
    """The node behind transposes of the last two axes and casts that nothing else reads; whether their number is odd."""
    odd = False
    while (
        node.op == "call_function" and len(node.users) == 1 and isinstance(node.args[0] if node.args else None, fx.Node)
    ):
        if node.target in g.TRANSPOSES and g.swaps_last_two(node):
            odd = not odd
        elif node.target not in g.CASTS:
            break
        node = node.args[0]  # type: ignore[assignment]
    return node, odd


def run_with_accumulators(
    run: Callable[..., Any], names: Mapping[str, int], module: nn.Module, note: Callable[[Tensor], None] | None = None
) -> Callable[..., Any]:
    """A backward's compiled function behind one that adds the accumulators to its inputs. Boxed, as `run` is.

    names: from `split_gradients`;  note: called with every parameter that got a gradient

    Parameters are looked up in the module for each call, because one may have been replaced. What autograd was not asked
    for (`torch.autograd.grad` of an input, `backward(inputs=...)`) goes to memory of its own.
    """
    places = {g.canonical_path(name): name.split(".") for name, _ in module.named_parameters(remove_duplicate=False)}
    owners = [(places[name], at) for name, at in names.items()]
    # Dynamo keeps compiled functions when their module is gone: nothing here may keep it, or its parameters, alive.
    root = weakref.ref(module)
    known = [weakref.ref(_parameter_at(module, place)) for place, _ in owners]

    def boxed(inputs: list[Any]) -> Any:
        alive = root()
        if alive is not None:
            known[:] = [weakref.ref(_parameter_at(alive, place)) for place, _ in owners]
        parameters = [(p, at) for find, (_, at) in zip(known, owners) if (p := find()) is not None]
        assert len(parameters) == len(owners), "autograd's graph holds the parameters that it has a backward for"
        # false under autograd.grad and backward(inputs=...), which reentrant checkpoints can't have either
        wants_all = torch.autograd._is_checkpoint_valid()  # type: ignore[no-untyped-call]
        wanted = [wants_all or _is_asked_for(p) for p, _ in parameters]
        for (p, _), is_wanted in zip(parameters, wanted):
            accumulator = local(accumulator_of(p))
            inputs.append(accumulator if is_wanted else torch.zeros_like(accumulator))
            del accumulator
        results = run(inputs)
        for (p, at), is_wanted in zip(parameters, wanted):
            if isinstance(p, DTensor):
                p._fp8c_placeholder = results[at]  # type: ignore[attr-defined]
            if note is not None and is_wanted:
                note(p)
        return results

    boxed._boxed_call = True  # type: ignore[attr-defined]
    return boxed


def _parameter_at(module: nn.Module, place: Sequence[str]) -> nn.Parameter:
    for name in place[:-1]:
        found = module._modules[name]
        assert found is not None
        module = found
    parameter = module._parameters[place[-1]]
    assert parameter is not None
    return parameter


def _is_asked_for(p: Tensor) -> bool:
    """Whether the backward that runs now accumulates this parameter's gradient."""
    node = torch.autograd.graph.get_gradient_edge(p).node
    try:
        return bool(torch._C._will_engine_execute_node(node))
    except RuntimeError as error:  # autograd.grad of this parameter: its gradient is returned, not accumulated
        return "autograd.grad" not in str(error)


def accumulator_of(p: Tensor) -> Tensor:
    """The parameter's `main_grad`; a new one where it has none: at first, and where the optimizer has taken it away.

    Raises: DiagnosticError E0843 for one of another type or shape, or whose gradient a hook wants to see
    """
    if p._backward_hooks:
        raise fail(
            "E0843",
            f"a parameter {list(p.shape)} has a hook of register_hook, which main_grad would leave without its gradient",
            help="use register_post_accumulate_grad_hook and read p.main_grad there, or compile without main_grad",
        )
    found = getattr(p, "main_grad", None)
    if found is None:
        found = torch.zeros_like(p, dtype=torch.float32, requires_grad=False)
        p.main_grad = found  # type: ignore[attr-defined]
    if not getattr(p, "_fp8c_moves_grad", False):
        p._fp8c_moves_grad = True  # type: ignore[attr-defined]
        p.register_post_accumulate_grad_hook(_move_grad)  # type: ignore[no-untyped-call]
    if not isinstance(found, Tensor) or found.dtype is not torch.float32 or found.shape != p.shape:
        shown = g.type_text(found) if isinstance(found, Tensor) else type(found).__name__
        raise fail(
            "E0843", f"main_grad is {shown}, expected f32{list(p.shape)}", help="leave main_grad to fp8c.compile"
        )
    return found

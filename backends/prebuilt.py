"""The kernels of a step, compiled for a GPU that is not present, as files of a build; and back into the caches of a machine.

    kernels/index.json          {"schema", "architecture", "triton", "kernels": [...], "cuda": [...], "gemms": [...]}
    kernels/NAME.ptx, .cubin    Triton's; NAME.json is what its loader reads
    kernels/gemm-KEY.cubin      the CUDA GEMMs, for Hopper; SOURCE-KEY.cubin its fused kernels

`gemms` says of each GEMM which implementation serves it by default (`backends.gemms.candidates.DEFAULT`).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.util import find_spec
from typing import Any

from torch import fx

from fp8c import graph as g
from fp8c.backends.cuda import ahead as cuda
from fp8c.backends.cuda.config import GemmConfig
from fp8c.backends.cuda.fused import FusedConfig
from fp8c.backends.cuda.operators import CONFIGS
from fp8c.backends.gemms.candidates import OPERATORS, PORTABLE
from fp8c.backends.gemms.unsupported import Unsupported
from fp8c.diagnostics import Diagnostic, ExitCode, Severity, fail
from fp8c.kept_weights import split_weights
from fp8c.main_grad import split_gradients
from fp8c.target_record import TargetRecord

SCHEMA = "fp8c.kernels/1"
INDEX = "kernels/index.json"
_HOPPER = "sm90"  # the architecture that the CUDA GEMMs are written for
_ARCHITECTURES = ("sm90", "sm100")


def kernel_files(halves: tuple[fx.GraphModule, fx.GraphModule], target: TargetRecord) -> dict[str, bytes]:
    """Machine code of everything of fp8c's that the step runs on `target`, by file name in a build.

    Raises: DiagnosticError E0433 (exit code TARGET) for a target without kernels, or without triton; E0430 without a
            compiler for the CUDA GEMMs
    """
    if find_spec("triton") is None or target.architecture not in _ARCHITECTURES:
        raise fail(
            "E0433",
            f"no kernels can be compiled for {target.name} here"
            + ("" if find_spec("triton") else ": triton is not installed"),
            help="pip install triton, and name a GPU as the target: h100, h200, h800 or b200",
            exit_code=ExitCode.TARGET,
        )
    import triton

    from fp8c.backends.triton import ahead

    graphs = list(graphs_that_run(halves))
    served = serve_gemms(graphs, target)
    fused = serve_fused(graphs, target)
    by_triton = [n for n, who in served.items() if who == "triton"]
    compiled = ahead.compile_step(graphs, target.architecture, by_triton, fused)
    files: dict[str, bytes] = {}
    kernels = []
    for kernel in compiled:
        files[f"kernels/{kernel.name}.ptx"] = kernel.ptx.encode()
        files[f"kernels/{kernel.name}.cubin"] = kernel.cubin
        files[f"kernels/{kernel.name}.json"] = kernel.metadata.encode()
        resources = {"registers": kernel.registers, "spilled_bytes": kernel.spilled_bytes}
        kernels.append({"name": kernel.name, **resources, "launch": kernel.launch.to_json()})
    configs = [who for who in served.values() if isinstance(who, GemmConfig)]
    instances = cuda.compile_instances([*configs, *fused.values()])
    names = {made.config: made.name for made in instances if isinstance(made.config, GemmConfig)}
    entries = []
    for made in instances:
        files[f"kernels/{made.name}.cubin"] = made.cubin
        registers, spilled_bytes = ahead.resources(made.cubin)
        entry = {"name": made.name, "key": made.key, "registers": registers, "spilled_bytes": spilled_bytes}
        if isinstance(made.config, GemmConfig):
            entry |= {"tile": f"{made.config.tile_m}x{made.config.tile_n}"}
        entries.append(entry)
    index = {
        "schema": SCHEMA,
        "architecture": target.architecture,
        "triton": triton.__version__,
        "kernels": kernels,
        "cuda": entries,
        "gemms": list(dict.fromkeys(json.dumps(described(node, who, names)) for node, who in served.items())),
    }
    index["gemms"] = [json.loads(text) for text in index["gemms"]]
    files[INDEX] = (json.dumps(index, indent=1, ensure_ascii=False) + "\n").encode()
    return files


def graphs_that_run(halves: tuple[fx.GraphModule, fx.GraphModule]) -> Iterator[fx.Graph]:
    """The halves as they are, and as the driver splits them: with kept weights, with FP32 accumulators."""
    for half in halves:
        yield half.graph
        rest, chains = split_weights(split_gradients(half)[0])
        yield rest.graph
        yield from (chain.run.graph for chain in chains)


def serve_gemms(graphs: Sequence[fx.Graph], target: TargetRecord) -> dict[fx.Node, GemmConfig | str]:
    """Who serves each GEMM: an instance of the CUDA kernel, "triton", or "portable"."""
    from fp8c.backends.triton import ahead

    served: dict[fx.Node, GemmConfig | str] = {}
    for node in (node for graph in graphs for node in graph.nodes if ahead.operator_name(node) in OPERATORS):
        arguments = fx.map_arg(node.args, ahead.as_meta)
        try:
            if target.architecture != _HOPPER:
                raise Unsupported("the CUDA GEMMs are for Hopper")
            served[node] = cuda.instance(ahead.operator_name(node), arguments, target.sms)
        except Unsupported:
            served[node] = "triton" if ahead.triton_serves(node, target.architecture) else PORTABLE
    return served


def serve_fused(graphs: Sequence[fx.Graph], target: TargetRecord) -> dict[fx.Node, FusedConfig]:
    """The fused operators that are not Triton's on this target."""
    from fp8c.backends.triton import ahead

    if target.architecture != _HOPPER:
        return {}
    served: dict[fx.Node, FusedConfig] = {}
    for node in (node for graph in graphs for node in graph.nodes if ahead.operator_name(node) in CONFIGS):
        config = cuda.fused_instance(ahead.operator_name(node), fx.map_arg(node.args, ahead.as_meta))
        if config is not None:
            served[node] = config
    return served


def described(node: fx.Node, who: GemmConfig | str, names: Mapping[GemmConfig, str]) -> dict[str, Any]:
    from fp8c.backends.triton import ahead

    op = ahead.operator_name(node)
    operands = node.all_input_nodes[1:] if op.endswith("_add_") else node.all_input_nodes
    a, b = g.value(operands[0]), g.value(operands[2])
    implementation = "cuda" if isinstance(who, GemmConfig) else who
    entry = {"op": op, "a": g.type_text(a), "b": g.type_text(b), "implementation": implementation}
    return entry | ({"kernel": names[who]} if isinstance(who, GemmConfig) else {})


def install(read: Callable[[str], bytes], architecture: str) -> list[Diagnostic]:
    """Put a build's kernels into this machine's caches, so that nothing of them is compiled again.

    read: a file of the build by its name, its hash already checked
    Returns: R0438 for kernels that fit no more: those are compiled at their first call, as without a build
    """
    from fp8c.backends.cuda import build

    index = json.loads(read(INDEX))
    if index["architecture"] != architecture:
        message = f"the build's kernels are for {index['architecture']}, this GPU is {architecture}"
        return [Diagnostic("R0438", message, severity=Severity.REMARK)]
    for made in index["cuda"]:
        build.install(made["key"], read(f"kernels/{made['name']}.cubin"))
    stale = stale_triton(index, read, architecture)
    if not stale:
        return []
    message = f"{stale} of {len(index['kernels'])} Triton kernels of the build are compiled again"
    return [Diagnostic("R0438", f"{message}: their sources or Triton's version changed", severity=Severity.REMARK)]


def stale_triton(index: Mapping[str, Any], read: Callable[[str], bytes], architecture: str) -> int:
    """Install the Triton kernels; how many can't be."""
    if find_spec("triton") is None:
        return len(index["kernels"])
    import triton

    if triton.__version__ != index["triton"]:
        return len(index["kernels"])
    from fp8c.backends.triton import ahead

    capability = ahead.CAPABILITY[architecture]
    installed = [
        ahead.install(
            kernel["launch"],
            read(f"kernels/{kernel['name']}.cubin"),
            read(f"kernels/{kernel['name']}.json").decode(),
            capability,
        )
        for kernel in index["kernels"]
    ]
    return installed.count(False)

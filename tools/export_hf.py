"""`fp8c export --format hf`: a checkpoint of a training run as an FP8 Hugging Face checkpoint, and back.

Weights whose GEMMs the plan runs in FP8 are written as E4M3 with one FP32 scale for each 128x128 block, in `X.weight`
and `X.weight_scale_inv` (value = weight * scale), under the names the model has on the Hugging Face hub, experts one by
one: the format of DeepSeek-V3's release, which transformers, vLLM and SGLang read. The bytes are those the training
step computes with, because both quantize the BF16 parameter. Everything else stays in its own type.

A weight with a partial block (a side that 128 does not divide) stays BF16 unless asked for: transformers finds the size
of a block by dividing the weight's side by the number of scales, which is wrong there.

Source: DeepSeek-V3's README_WEIGHTS.md; transformers, quantizers/quantizer_finegrained_fp8.py.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import fp8c.backends.reference  # noqa: F401  (quantize on the CPU)
from fp8c.build import check_output, read_build
from fp8c.diagnostics import Diagnostic, ExitCode, Severity, fail
from fp8c.formats import Element, Format, ScaleKind
from fp8c.models import load_model
from fp8c.optim import checkpoint
from fp8c.tools.compile_command import Request

BLOCK = 128
INDEX = "model.safetensors.index.json"
#: Transformers keeps fused experts in one parameter, `X.experts.gate_up_proj`; the hub has
#: `X.experts.3.up_proj.weight`.
_EXPERT = re.compile(r"^(?P<module>.*\.experts)\.\d+\..+$")
_MTP = re.compile(r"^mtp\.(?:(?P<number>\d+)\.)?(?P<rest>.+)$")


@dataclass(frozen=True)
class ExportRequest:
    """model: a build or a model reference; checkpoint: a folder of `fp8c.optim.checkpoint`; source: "model" or
    "ema".
    """

    model: str
    checkpoint: Path
    out: Path
    spec: str = "deepseek_v3"
    overrides: Mapping[str, Any] = field(default_factory=dict)
    source: str = "model"
    mtp: bool = False
    partial_blocks: bool = False
    shard_gib: float = 4.0
    force: bool = False


@dataclass(frozen=True)
class Exported:
    out: Path
    quantized: int
    kept: int
    dropped: tuple[str, ...]
    size_bytes: int
    remarks: tuple[Diagnostic, ...]

    def text(self) -> str:
        lines = [
            f"{self.out}: {self.quantized} weights in FP8, {self.kept} tensors kept, {self.size_bytes / 2**20:.1f} MiB"
        ]
        if self.dropped:
            lines.append(
                f"left out: {len(self.dropped)} tensors of the multi-token prediction ({self.dropped[0]}, ...)"
            )
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        return {
            "out": str(self.out),
            "quantized": self.quantized,
            "kept": self.kept,
            "dropped": list(self.dropped),
            "size_bytes": self.size_bytes,
        }


def export(request: ExportRequest) -> Exported:
    """Write the checkpoint, beside what is there, and swap it in whole.

    Raises: DiagnosticError E1140 (no transformers model), E1141 (tensors that the model does not have, or lacks), E1142
            (the plan's weights are in another format), E0611 (a folder that is not ours to replace), E1131 (no
            checkpoint)
    """
    check_output(request.out, force=request.force or (request.out / "fp8c_export.json").is_file())
    reference, formats = planned_weights(request)
    model = hugging_face_model(reference, request.overrides)
    tensors = checkpoint.model_tensors(request.checkpoint)
    if request.source != "model":  # buffers have no average
        tensors |= checkpoint.model_tensors(request.checkpoint, request.source)
    own, extra = split(tensors, model)
    if extra and not all(is_mtp(name, model) for name in extra):
        unknown = sorted(name for name in extra if not is_mtp(name, model))
        raise fail(
            "E1141",
            f"the checkpoint has {', '.join(unknown[:4])}, which {reference} does not have",
            help="name the model that was trained, with the same -a settings",
            exit_code=ExitCode.MODEL,
        )
    model.load_state_dict(own, assign=True, strict=False)
    scratch = request.out.with_name(f".{request.out.name}.exporting")
    shutil.rmtree(scratch, ignore_errors=True)
    model.save_pretrained(scratch, max_shard_size=f"{request.shard_gib}GB")
    remarks: list[Diagnostic] = []
    done = convert(scratch, formats, request, remarks, {mtp_name(k, model): v for k, v in extra.items()}, model)
    write_config(scratch, done.not_converted, formats, request.mtp and bool(extra))
    (scratch / "fp8c_export.json").write_text(
        json.dumps({"schema": "fp8c.export/1", "model": reference, "checkpoint": str(request.checkpoint.name)})
    )
    swap_in(scratch, request.out)
    size = sum(file.stat().st_size for file in request.out.iterdir())
    dropped = () if request.mtp else tuple(sorted(extra))
    return Exported(request.out, done.quantized, done.kept, dropped, size, tuple(remarks))


# --- which weights ----------------------------------------------------------------------------------------------------


def planned_weights(request: ExportRequest) -> tuple[str, dict[str, Format]]:
    """The model's reference, and the format of each parameter that the plan quantizes for its forward GEMM."""
    path = Path(request.model)
    if (path / "manifest.json").is_file():
        build = read_build(path)
        uses = build.json("plan.lock.json")["uses"].values()
        found = {
            use["param"]: Format.parse(use["fields"]["fprop.w"]["value"])
            for use in uses
            if use["param"] and "fprop.w" in use["fields"]
        }
        return str(build.manifest["model"]["reference"]), only_blocks(found)
    from fp8c.tools.spec_command import check_on_model

    overrides = dict(request.overrides)
    planned = check_on_model(Request(request.model, request.spec, "cpu", None, overrides=overrides, weights="meta"))
    if planned.plan is None:
        from fp8c.diagnostics import DiagnosticError

        raise DiagnosticError(planned.diagnostics, planned.exit_code)
    weights = {use.use.param: use.value("fprop.w") for use in planned.plan.uses.values() if use.use.param}
    return request.model, only_blocks({k: v for k, v in weights.items() if isinstance(v, Format)})


def only_blocks(formats: Mapping[str, Format]) -> dict[str, Format]:
    """Drops what is not quantized. Raises: DiagnosticError E1142 for FP8 in other groups than 128x128."""
    quantized = {name: fmt for name, fmt in formats.items() if fmt.is_quantized}
    for name, fmt in quantized.items():
        if fmt.element is not Element.E4M3 or fmt.group != (BLOCK, BLOCK):
            raise fail(
                "E1142",
                f"{name} is trained as {fmt.text}: this format holds e4m3 in 128x128 blocks only",
                help="export from a spec whose weights are e4m3 [128x128], such as deepseek_v3",
                exit_code=ExitCode.SPEC,
            )
    return quantized


def hugging_face_model(reference: str, overrides: Mapping[str, Any]) -> Any:
    """The transformers model on the meta device. Raises: DiagnosticError E1140 for any other model."""
    if not reference.startswith("hf:"):
        raise fail(
            "E1140",
            f"{reference} is no transformers model, and the format is one of their classes' weights",
            help="train an `hf:` model to export it so",
            exit_code=ExitCode.MODEL,
        )
    return load_model(reference, weights="meta", overrides=dict(overrides)).module


def split(tensors: Mapping[str, Tensor], model: nn.Module) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Tensors of the model by its names, and the rest. Raises: DiagnosticError E1141 when one is missing or differs."""
    expected = model.state_dict()
    roots = ("", "model.", "module.")  # a model inside a wrapper that adds its loss
    root = max(roots, key=lambda r: sum(f"{r}{name}" in tensors for name in expected))
    own = {name: tensors[f"{root}{name}"] for name in expected if f"{root}{name}" in tensors}
    missing = sorted(expected.keys() - own.keys())
    differ = [name for name, tensor in own.items() if tensor.shape != expected[name].shape]
    wrong = [f"{name} is {list(own[name].shape)}, expected {list(expected[name].shape)}" for name in differ]
    if missing or wrong:
        lacks = [f"lacks {', '.join(missing[:4])}"] if missing else []
        raise fail("E1141", "the checkpoint " + "; ".join(lacks + wrong[:4]), exit_code=ExitCode.MODEL)
    extra = {name: tensor for name, tensor in tensors.items() if name.removeprefix(root) not in expected}
    return {n: t.to(expected[n].dtype) for n, t in own.items()}, extra


def is_mtp(name: str, model: Any) -> bool:
    """Multi-token prediction: a module `mtp` beside the model, or layers behind its last, as DeepSeek-V3 has it."""
    layer = re.search(r"model\.layers\.(\d+)\.", name)
    return bool(_MTP.match(name.removeprefix("model."))) or bool(
        layer and int(layer[1]) >= model.config.num_hidden_layers
    )


def mtp_name(name: str, model: Any) -> str:
    """`mtp.0.X` is DeepSeek-V3's `model.layers.61.X`."""
    found = _MTP.match(name.removeprefix("model."))
    if not found:
        return name
    return f"model.layers.{model.config.num_hidden_layers + int(found['number'] or 0)}.{found['rest']}"


# --- files ------------------------------------------------------------------------------------------------------------


@dataclass
class Conversion:
    quantized: int = 0
    kept: int = 0
    not_converted: set[str] = field(default_factory=set)


def convert(
    folder: Path,
    formats: Mapping[str, Format],
    request: ExportRequest,
    remarks: list[Diagnostic],
    mtp: Mapping[str, Tensor],
    model: nn.Module,
) -> Conversion:
    """Quantize the shards in a folder, one at a time, and write their index again."""
    done = Conversion()
    places: dict[str, str] = {}
    linears = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    files = sorted(folder.glob("*.safetensors"))
    partial: list[str] = []
    total = 0
    for number, file in enumerate(files):
        shard = load_file(file)
        if number == len(files) - 1 and request.mtp:
            shard |= {name: tensor.contiguous() for name, tensor in mtp.items()}
        written: dict[str, Tensor] = {}
        for name, tensor in shard.items():
            fmt = format_of(name, formats, mtp)
            whole = tensor.dim() == 2 and all(side % BLOCK == 0 for side in tensor.shape)
            if fmt is not None and tensor.dim() == 2 and (whole or request.partial_blocks):
                data, scale = torch.ops.fp8c.quantize(tensor, fmt.text)
                written[name] = data.contiguous()
                written[f"{name.removesuffix('.weight')}.weight_scale_inv"] = stored_scale(scale, fmt)
                done.quantized += 1
                continue
            written[name] = tensor
            done.kept += 1
            module = module_of(name)
            if fmt is not None or module in linears:
                done.not_converted.add(module)
            if fmt is not None and tensor.dim() == 2:
                partial.append(name)
        places |= {name: file.name for name in written}
        total += sum(t.numel() * t.element_size() for t in written.values())
        save_file(written, file, metadata={"format": "pt"})
    if len(files) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
        (folder / INDEX).write_text(json.dumps(index, indent=2), encoding="utf-8")
    if partial:
        remarks.append(
            Diagnostic(
                "R1143",
                f"{len(partial)} weights with a side that {BLOCK} does not divide stay BF16: {', '.join(partial[:3])}",
                severity=Severity.REMARK,
                help="--partial-blocks writes them in FP8 as DeepSeek's own files are; transformers misreads them",
            )
        )
    return done


def format_of(name: str, formats: Mapping[str, Format], mtp: Mapping[str, Tensor]) -> Format | None:
    """The plan's format of a tensor of the hub; experts have the format of their fused parameters.

    MTP layers repeat the model's: what is a GEMM's weight there is in a layer's plan under the same last names.
    """
    if name in formats:
        return formats[name]
    if name in mtp:
        tail = re.sub(r"^model\.layers\.\d+\.", "", name)
        known = {re.sub(r"^model\.layers\.\d+\.", "", key): fmt for key, fmt in formats.items()}
        return format_of(tail, known, {})
    expert = _EXPERT.match(name)
    if expert is None:
        return None
    return next((fmt for key, fmt in formats.items() if key.startswith(f"{expert['module']}.")), None)


def module_of(name: str) -> str:
    """The module that transformers would convert: the experts of a layer together."""
    expert = _EXPERT.match(name)
    return expert["module"] if expert else name.rsplit(".", 1)[0]


def stored_scale(scale: Tensor, fmt: Format) -> Tensor:
    return scale.contiguous() if fmt.scale is ScaleKind.E8M0 else scale.float().contiguous()


def write_config(folder: Path, kept: set[str], formats: Mapping[str, Format], has_mtp: bool) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    is_e8m0 = any(fmt.scale is ScaleKind.E8M0 for fmt in formats.values())
    config["quantization_config"] = {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [BLOCK, BLOCK],
        "scale_fmt": "ue8m0" if is_e8m0 else "float",
        "modules_to_not_convert": sorted(kept),
    }
    if "num_nextn_predict_layers" in config and not has_mtp:
        config["num_nextn_predict_layers"] = 0
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def swap_in(scratch: Path, out: Path) -> None:
    if out.exists():
        old = out.with_name(f".{out.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        os.replace(out, old)
        os.replace(scratch, out)
        shutil.rmtree(old)
    else:
        out.parent.mkdir(parents=True, exist_ok=True)
        os.replace(scratch, out)


# --- and back ---------------------------------------------------------------------------------------------------------


def shards(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of a Hugging Face checkpoint, one at a time."""
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            for name in opened.keys():
                yield name, opened.get_tensor(name)


def dequantized(folder: Path, dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:
    """The weights of an FP8 checkpoint by their names on the hub: value = weight * scale, rounded once to `dtype`.

    Partial blocks are handled; other tensors come as they are.
    """
    tensors = dict(shards(folder))
    suffix = "_scale_inv"
    found = {}
    for name, tensor in tensors.items():
        if name.endswith(suffix):
            continue
        scale = tensors.get(f"{name}{suffix}")
        if scale is not None:
            rows, cols = tensor.shape
            grid = scale.float().repeat_interleave(BLOCK, 0)[:rows].repeat_interleave(BLOCK, 1)[:, :cols]
            tensor = (tensor.float() * grid).to(dtype)
        found[name] = tensor
    return found


def load_hf(folder: str | Path, dtype: torch.dtype = torch.bfloat16) -> Any:
    """A transformers model with the weights of an (FP8 or plain) checkpoint in BF16, ready to be compiled and trained
    on.

    The quantization is undone, so the model has ordinary parameters; an FP8 step quantizes them again. The dequantized
    weights are written beside the checkpoint for the time of loading.
    Raises: DiagnosticError E1140 for a folder without a configuration
    """
    import tempfile

    from transformers import AutoModelForCausalLM

    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise fail("E1140", f"{folder} has no config.json", exit_code=ExitCode.MODEL)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    with tempfile.TemporaryDirectory() as scratch:
        config.pop("quantization_config", None)
        (Path(scratch) / "config.json").write_text(json.dumps(config), encoding="utf-8")
        save_file(dequantized(folder, dtype), Path(scratch) / "model.safetensors", metadata={"format": "pt"})
        model = AutoModelForCausalLM.from_pretrained(scratch, dtype=dtype, local_files_only=True)
    model.config.use_cache = False
    return model.train()

"""fp8c export --format hf: transformers loads it, the bytes are the training step's, what does not fit is named."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fp8c.backends.reference  # noqa: F401
from fp8c.cli import main
from fp8c.diagnostics import DiagnosticError
from fp8c.models import load_model
from fp8c.optim import EMA, AdamW, checkpoint
from fp8c.tools import export_hf
from fp8c.tools.export_hf import ExportRequest, export

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")  # transformers' FP8 loading asks for it

TINY: dict[str, Any] = dict(
    vocab_size=256, hidden_size=256, intermediate_size=384, moe_intermediate_size=128, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=4, n_routed_experts=4, q_lora_rank=128, kv_lora_rank=128,
    qk_rope_head_dim=64, qk_nope_head_dim=64, v_head_dim=64, first_k_dense_replace=1, n_group=1, topk_group=1,
    num_experts_per_tok=2, n_shared_experts=1,
)  # fmt: skip
OPTIONS = [part for name, value in TINY.items() for part in ("-a", f"{name}={value}")]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[nn.Module, Path]]:
    """A model after one optimizer step, and its checkpoint with MTP weights beside it."""
    folder = tmp_path_factory.mktemp("run")
    module: Any = load_model("hf:deepseek_v3", weights="random", overrides=TINY, seq=128).module
    module.mtp = nn.ModuleDict({"eh_proj": nn.Linear(512, 256, bias=False), "mlp": nn.ModuleDict()}).bfloat16()
    module.mtp["mlp"]["gate_proj"] = nn.Linear(256, 384, bias=False).bfloat16()
    optimizer = AdamW(module, lr=1e-2, spec="deepseek_v3")
    ema = EMA(module, 0.5)
    for p in module.parameters():
        p.main_grad = torch.randn(p.shape)  # type: ignore[attr-defined]
    optimizer.step()
    ema.update()
    checkpoint.save(folder, 1, module, optimizer, ema)
    ema.close()
    yield module, folder


@pytest.fixture(scope="module", autouse=True)
def planned_once() -> Iterator[None]:
    """Planning captures the model; the same question has the same answer."""
    plan, known = export_hf.planned_weights, {}

    def planned(request: ExportRequest) -> Any:
        key = (request.model, request.spec, tuple(request.overrides.items()))
        if key not in known:
            known[key] = plan(request)
        return known[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export_hf, "planned_weights", planned)
        yield


@pytest.fixture(scope="module")
def exported(trained: tuple[nn.Module, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("hf") / "out"
    assert main(["export", "--format", "hf", "hf:deepseek_v3", str(trained[1]), "-o", str(out), *OPTIONS]) == 0
    return out


def values(folder: Path) -> dict[str, Tensor]:
    return dict(export_hf.shards(folder))


def test_the_bytes_are_those_the_step_computes_with(trained: tuple[nn.Module, Path], exported: Path) -> None:
    tensors, weights = values(exported), trained[0].state_dict()
    fmt = "e4m3[128x128] fp32"
    plain = "model.layers.0.mlp.gate_proj.weight"
    data, scale = torch.ops.fp8c.quantize(weights[plain], fmt)
    assert torch.equal(tensors[plain].view(torch.uint8), data.view(torch.uint8))
    assert torch.equal(tensors[plain + "_scale_inv"], scale) and tensors[plain].dtype == torch.float8_e4m3fn
    fused = weights["model.layers.1.mlp.experts.gate_up_proj"]
    data, scale = torch.ops.fp8c.quantize(fused, fmt)
    up = "model.layers.1.mlp.experts.2.up_proj.weight"
    assert torch.equal(tensors[up].view(torch.uint8), data[2, 128:].view(torch.uint8))
    assert torch.equal(tensors[up + "_scale_inv"], scale[2, 1:])
    for kept in ("lm_head.weight", "model.embed_tokens.weight", "model.layers.1.mlp.gate.weight"):
        assert torch.equal(tensors[kept], weights[kept])


def test_transformers_loads_it_and_so_do_we(trained: tuple[nn.Module, Path], exported: Path) -> None:
    config = json.loads((exported / "config.json").read_text())["quantization_config"]
    assert config["weight_block_size"] == [128, 128] and config["quant_method"] == "fp8"
    theirs = transformers.AutoModelForCausalLM.from_pretrained(exported, dtype=torch.bfloat16)
    ours = export_hf.load_hf(exported)
    weights = trained[0].state_dict()
    for name, value in ours.state_dict().items():
        assert torch.equal(value, theirs.state_dict()[name]), name
        exact = weights[name].float()
        # E4M3 rounds by at most 2^-4 of a value, or half the smallest step, 2^-10, of a scale that is amax / 448; BF16
        # adds 2^-9.
        bound = exact.abs() * (2.0**-4 + 2.0**-8) + exact.abs().max() / 448 * 2.0**-10
        assert bool(((value.float() - exact).abs() <= bound).all()), name
    ids = torch.randint(256, (1, 16))
    assert torch.isfinite(ours(input_ids=ids, labels=ids).loss)


def test_mtp_is_left_out_unless_asked_for(trained: tuple[nn.Module, Path], exported: Path, tmp_path: Path) -> None:
    assert not [name for name in values(exported) if "layers.2" in name or "mtp" in name]
    request = ExportRequest("hf:deepseek_v3", trained[1], tmp_path / "mtp", overrides=TINY, mtp=True)
    assert export(request).dropped == ()
    tensors = values(tmp_path / "mtp")
    assert tensors["model.layers.2.mlp.gate_proj.weight"].dtype == torch.float8_e4m3fn
    assert tensors["model.layers.2.eh_proj.weight"].dtype == torch.bfloat16  # no layer of the plan has one


def test_the_average_is_exported(trained: tuple[nn.Module, Path], tmp_path: Path) -> None:
    export(ExportRequest("hf:deepseek_v3", trained[1], tmp_path / "ema", overrides=TINY, source="ema"))
    average = checkpoint.model_tensors(trained[1], "ema")
    found = values(tmp_path / "ema")
    assert torch.equal(found["lm_head.weight"], average["lm_head.weight"].bfloat16())


def test_partial_blocks_stay_bf16_unless_asked_for(
    trained: tuple[nn.Module, Path], exported: Path, tmp_path: Path
) -> None:
    name = "model.layers.0.self_attn.kv_a_proj_with_mqa"
    config = json.loads((exported / "config.json").read_text())["quantization_config"]
    assert name in config["modules_to_not_convert"] and values(exported)[name + ".weight"].dtype == torch.bfloat16
    request = ExportRequest("hf:deepseek_v3", trained[1], tmp_path / "all", overrides=TINY, partial_blocks=True)
    export(request)
    tensors = values(tmp_path / "all")
    assert tensors[name + ".weight"].dtype == torch.float8_e4m3fn
    assert tensors[name + ".weight_scale_inv"].shape == (2, 2)  # 192 rows: one and a half blocks
    back = export_hf.dequantized(tmp_path / "all")[name + ".weight"].float()
    exact = trained[0].state_dict()[name + ".weight"].float()
    assert (back - exact).norm() < exact.norm() * 2.0**-4


def test_what_does_not_fit_is_named(trained: tuple[nn.Module, Path], tmp_path: Path) -> None:
    folder = trained[1]

    def run(**changes: Any) -> None:
        given: dict[str, Any] = {
            "model": "hf:deepseek_v3",
            "checkpoint": folder,
            "out": tmp_path / "x",
            "overrides": TINY,
        }
        export(ExportRequest(**{**given, **changes}))

    with pytest.raises(DiagnosticError, match="E1131"):
        run(checkpoint=tmp_path / "nothing")
    with pytest.raises(DiagnosticError, match="E1142.*rowwise|E1142.*\\[row\\]|E1142"):
        run(spec="rowwise")
    with pytest.raises(DiagnosticError, match="E1141"):
        run(overrides={**TINY, "intermediate_size": 512})
    with pytest.raises(DiagnosticError, match="E1140"):
        run(model="examples/moe_transformer.py", overrides={})
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("")
    with pytest.raises(DiagnosticError, match="E0611"):
        run(out=tmp_path / "mine")
    assert (tmp_path / "mine" / "notes.txt").exists()

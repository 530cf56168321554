"""The example through the whole compiler: latent attention, loops over experts, sigmoid routing, MTP."""

from __future__ import annotations

import pytest

from fp8c.models import load_model
from tests.models.harness import check, train_both


@pytest.mark.slow
def test_the_example_trains_in_fp8() -> None:
    loaded = load_model("examples/moe_transformer.py", batch=1, seq=64)
    outcome = train_both(loaded.module, lambda m: m(**loaded.example_inputs).loss)
    check(outcome, depth=28)
    uses = {key: plan.use for key, plan in outcome.rewritten.plan.uses.items()}
    by_kind = {kind: [k for k, u in uses.items() if kind in u.kinds] for kind in ("lm_head", "router", "mtp", "moe")}
    assert len(by_kind["lm_head"]) == 2  # the model's and the MTP module's, one weight
    assert {uses[k].param for k in by_kind["lm_head"]} == {uses[by_kind["lm_head"][0]].param}
    assert by_kind["router"] and by_kind["mtp"]
    assert any("moe_up" in uses[k].roles for k in by_kind["moe"])
    roles = {role for use in uses.values() for role in use.roles}
    assert {"mla_up_proj", "mla_down_proj", "latent_norm", "attn_out_proj", "moe_swiglu", "mlp_swiglu"} <= roles

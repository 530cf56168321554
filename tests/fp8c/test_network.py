"""The two-level network and the routing sampler: published rates, bounds, roles, skew."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from fp8c.diagnostics import DiagnosticError
from fp8c.network import Network, assign_warps, simulate_combine, simulate_dispatch, transfer_bound_us
from fp8c.routing import RoutingSpec, Traffic, balanced_traffic, sample_traffic

V3 = RoutingSpec(experts=256, top_k=8, nodes=8, gpus_per_node=8, tokens=4096, nodes_per_token=4, sampled_tokens=128)
H800 = Network(nic_gb_s=45.0, nvlink_gb_s=160.0)
FP8_TOKEN, BF16_TOKEN = 7168 * (1 + 4 / 128), 7168 * 2


def test_even_transfers_come_out_at_deepeps_published_rates() -> None:
    """DeepEP, H800, EP64, 4096 tokens to 4 nodes: 51 GB/s for dispatch, 50 GB/s for combine (`docs/legacy.md`), counted
    as 4096 x 4 tokens of payload."""
    traffic = balanced_traffic(V3)
    dispatch = simulate_dispatch(H800, traffic, FP8_TOKEN).duration_us
    combine = simulate_combine(H800, traffic, BF16_TOKEN).duration_us
    assert 4096 * 4 * FP8_TOKEN / dispatch / 1e3 == pytest.approx(51, rel=0.05)
    assert 4096 * 4 * BF16_TOKEN / combine / 1e3 == pytest.approx(50, rel=0.05)


@pytest.mark.parametrize("zipf", [0.0, 0.4, 0.8])
def test_no_transfer_beats_its_links(zipf: float) -> None:
    traffic = sample_traffic(replace(V3, zipf=zipf), 1)
    for simulate, size in ((simulate_dispatch, FP8_TOKEN), (simulate_combine, BF16_TOKEN)):
        result = simulate(H800, traffic, size)
        assert result.duration_us >= transfer_bound_us(H800, traffic, size) * (1 - 1e-9)
        assert 0.0 < result.nic_busy <= 1.0


def test_more_sms_never_slow_a_transfer_and_few_starve_it() -> None:
    traffic = balanced_traffic(V3)
    times = [simulate_dispatch(replace(H800, comm_sms=s), traffic, FP8_TOKEN).duration_us for s in (2, 4, 8, 20)]
    assert times == sorted(times, reverse=True)
    assert times[0] > 2 * times[-1], "2 SMs cannot copy what a NIC sends"


def test_warps_by_load_beat_equal_shares_when_sms_are_scarce() -> None:
    traffic = balanced_traffic(V3)
    scarce = replace(H800, comm_sms=2)
    assert (
        simulate_dispatch(scarce, traffic, FP8_TOKEN).duration_us
        < simulate_dispatch(scarce, traffic, FP8_TOKEN, by_load=False).duration_us
    )


def test_bytes_over_the_nic_are_those_of_the_node_limit() -> None:
    """Each token goes to at most 4 of 8 nodes, 7 of 8 of them away: 4096 x 64 x 4 x 7/8 tokens at most."""
    traffic = sample_traffic(V3, 3)
    assert (traffic.to_node.sum(axis=1) <= 4 * 4096 + 1e-6).all()
    sent = simulate_dispatch(H800, traffic, FP8_TOKEN).nic_bytes
    assert sent == pytest.approx(4096 * 64 * 4 * 7 / 8 * FP8_TOKEN, rel=0.03)


def test_one_node_needs_no_nic() -> None:
    traffic = balanced_traffic(replace(V3, nodes=1, nodes_per_token=0))
    result = simulate_dispatch(H800, traffic, FP8_TOKEN)
    assert result.nic_bytes == 0.0
    assert result.duration_us >= transfer_bound_us(H800, traffic, FP8_TOKEN)


def test_a_single_token_pays_every_hop_once() -> None:
    """One token from GPU 0 of node 0 to GPU 3 of node 1: send, NIC out, hop, NIC in, forward, NVLink, receive."""
    to_gpu, to_node = np.zeros((16, 16)), np.zeros((16, 2))
    to_gpu[0, 11] = to_node[0, 1] = 1.0
    traffic = Traffic(to_gpu, to_node, np.full(16, 1.0), 8)
    size = 8000.0
    result = simulate_dispatch(H800, traffic, size)
    copies = [size / (w / 32 * 10 * 50.0 * 1e3) for w in result.warps]
    nic, nvlink = size / 45e3, size / 160e3
    assert result.finish_us[11] == pytest.approx(copies[0] + 2 * nic + 5.0 + copies[1] + 2 * nvlink + copies[2])
    assert result.finish_us.sum() == result.finish_us[11]


def test_simulation_is_deterministic() -> None:
    first, second = (simulate_dispatch(H800, sample_traffic(V3, 5), FP8_TOKEN).finish_us for _ in range(2))
    assert (first == second).all()
    assert not np.array_equal(sample_traffic(V3, 5).to_gpu, sample_traffic(V3, 6).to_gpu)


def test_sampled_counts_add_up() -> None:
    traffic = sample_traffic(V3, 2)
    assert traffic.rows.sum() == pytest.approx(64 * 4096 * 8)
    assert (traffic.to_gpu.sum(axis=1) <= 8 * 4096 + 1e-6).all()
    assert (traffic.to_gpu.reshape(64, 8, 8).max(axis=2) <= traffic.to_node + 1e-9).all()


def test_measured_loads_take_the_place_of_a_law() -> None:
    """Expert 0 is asked for ten times as often: its GPU has the most rows, and the drawn loads follow the given ones."""
    loads = (10.0, *[1.0] * 255)
    spec = replace(V3, popularity=loads, nodes_per_token=0, top_k=1, sampled_tokens=2048)
    rows = sample_traffic(spec, 1).rows
    assert rows.argmax() == 0
    assert rows[0] / rows[1:].mean() == pytest.approx(13 / 4, rel=0.1)
    for wrong in ((1.0,) * 255, (-1.0, *[1.0] * 255), (0.0,) * 256):
        with pytest.raises(DiagnosticError) as caught:
            sample_traffic(replace(V3, popularity=wrong), 1)
        assert caught.value.diagnostics[0].code == "E0924"


def test_imbalance_grows_with_the_exponent() -> None:
    found = [sample_traffic(replace(V3, zipf=z), 1).imbalance for z in (0.0, 0.3, 0.6, 0.9)]
    assert found == sorted(found)
    assert found[0] < 1.1


def test_warps_follow_load_and_none_is_left_out() -> None:
    assert assign_warps((1.0, 2.0, 1.0), 8) == (2, 4, 2)
    assert assign_warps((0.0, 5.0, 0.0), 8) == (1, 6, 1)
    assert assign_warps((0.0, 0.0), 5) in ((3, 2), (2, 3))
    for loads in ((3.0, 1.0, 7.0), (1e9, 1.0, 1.0)):
        assert sum(assign_warps(loads, 32)) == 32
    with pytest.raises(DiagnosticError) as caught:
        assign_warps((1.0, 1.0, 1.0), 2)
    assert caught.value.diagnostics[0].code == "E0923"


@pytest.mark.parametrize(
    "change,code",
    [({"experts": 250}, "E0921"), ({"top_k": 9, "nodes_per_token": 1, "experts": 64}, "E0922")],
)
def test_routings_that_cannot_be_are_named(change: dict[str, Any], code: str) -> None:
    with pytest.raises(DiagnosticError) as caught:
        sample_traffic(replace(V3, **change), 0)
    assert caught.value.diagnostics[0].code == code

"""A two-level network, event by event: dispatch and combine of one expert-parallel group, hop by hop.

Dispatch: a GPU sends a token once per target node over its NIC to the GPU of the same place on that node (IB send);
that GPU forwards it over NVLink to each GPU there that holds one of its experts (forward); the target copies it from
its receive buffer (receive). Combine goes the same way back and adds on the way. All of it is done by `comm_sms` SMs,
split into channels; on each channel, warps are given to the three roles by load.
Source: DeepSeek-V3 (arXiv 2412.19437), section 3.2.2. Times are microseconds; 1 GB/s moves 1000 bytes per microsecond.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fp8c.diagnostics import fail
from fp8c.routing import Array, Traffic

WARPS_PER_SM = 32


@dataclass(frozen=True)
class Network:
    """Rates one GPU gets, per direction, in GB/s.

    sm_read_gb_s, sm_write_gb_s: what one SM copies (DeepEP, `elastic.py`: 200 read, 50 written)
    hop_us: latency of an IB hop; the NVLink hop is counted within the copy
    sms_per_channel: SMs that form one channel (2 in DeepSeek-V3: 20 SMs, 10 channels)
    chunk_tokens: tokens that travel together, over all channels
    """

    nic_gb_s: float
    nvlink_gb_s: float
    gpus_per_node: int = 8
    comm_sms: int = 20
    sm_read_gb_s: float = 200.0
    sm_write_gb_s: float = 50.0
    hop_us: float = 5.0
    sms_per_channel: int = 2
    chunk_tokens: int = 128

    @property
    def channels(self) -> int:
        return max(1, self.comm_sms // self.sms_per_channel)


@dataclass(frozen=True)
class Transfer:
    """The result of one all-to-all. `finish_us` f64 [GPU]: when each GPU has all it waits for, counted from a common
    start. `warps`: warps per channel for (first, second, third) role. `nic_busy` is the share of the whole time the
    busiest NIC was sending or receiving."""

    finish_us: Array
    warps: tuple[int, int, int]
    nic_busy: float
    nic_bytes: float

    @property
    def duration_us(self) -> float:
        return float(self.finish_us.max())


def assign_warps(loads: Sequence[float], warps: int) -> tuple[int, ...]:
    """Split `warps` over roles in proportion to their loads, at least one each, by largest remainder.

    Raises: E0923 when there are fewer warps than roles.
    """
    if warps < len(loads):
        raise fail("E0923", f"{warps} warps cannot serve {len(loads)} roles", help="give communication more SMs")
    total = sum(loads)
    spare = warps - len(loads)
    exact = [spare * load / total if total > 0 else spare / len(loads) for load in loads]
    given = [1 + int(e) for e in exact]
    by_remainder = sorted(range(len(loads)), key=lambda i: (int(exact[i]) - exact[i], i))
    for i in by_remainder[: warps - sum(given)]:
        given[i] += 1
    return tuple(given)


class _Servers:
    """First come, first served; `free_us` says when each server has done what it was given."""

    def __init__(self, shape: int | tuple[int, ...]) -> None:
        self.free_us = np.zeros(shape)
        self.busy_us = np.zeros(shape)

    def serve(self, key: int | tuple[int, int], at_us: float, needs_us: float) -> float:
        end = max(at_us, float(self.free_us[key])) + needs_us
        self.free_us[key] = end
        self.busy_us[key] += needs_us
        return end


def simulate_dispatch(net: Network, traffic: Traffic, token_bytes: float, *, by_load: bool = True) -> Transfer:
    """Send tokens to their experts. Shapes: traffic over R GPUs -> finish_us [R].

    `by_load` False gives each role a third of the warps instead of sizing roles by what they copy.
    """
    copies = traffic.to_gpu.sum() * token_bytes
    over_ib = _remote(traffic).sum() * token_bytes
    warps = _roles(net, (over_ib, copies, copies), by_load)
    return _run(net, traffic, token_bytes, warps, is_combine=False)


def simulate_combine(net: Network, traffic: Traffic, token_bytes: float, *, by_load: bool = True) -> Transfer:
    """Bring expert outputs back and add them: NVLink send, forward with accumulation and IB send, receive with
    accumulation. Shapes as `simulate_dispatch`."""
    copies = traffic.to_gpu.sum() * token_bytes
    reduced = traffic.to_node.sum() * token_bytes
    # Roles that add read all copies and write one, so they are charged for the slower of the two.
    forward = max(copies * net.sm_write_gb_s / net.sm_read_gb_s, reduced)
    warps = _roles(net, (copies, forward, reduced), by_load)
    return _run(net, traffic, token_bytes, warps, is_combine=True)


def _roles(net: Network, loads: tuple[float, float, float], by_load: bool) -> tuple[int, int, int]:
    per_channel = WARPS_PER_SM * net.comm_sms // net.channels
    first, second, third = assign_warps(loads if by_load else (1.0, 1.0, 1.0), per_channel)
    return first, second, third


def _remote(traffic: Traffic) -> Array:
    """Tokens that leave their node: f64 [source GPU, target node], own node zeroed."""
    out = traffic.to_node.copy()
    nodes = np.arange(traffic.ranks) // traffic.gpus_per_node
    out[np.arange(traffic.ranks), nodes] = 0.0
    return out


def _run(net: Network, traffic: Traffic, token_bytes: float, warps: tuple[int, int, int], is_combine: bool) -> Transfer:
    """All chunks of all (source, node) pairs through their hops, in time order.

    The relay of a pair is the GPU of the source's place on the target node. In dispatch data flows source, relay,
    targets; in combine targets, relay, source.
    """
    ranks, width = traffic.ranks, traffic.gpus_per_node
    role_gb_s = [w / WARPS_PER_SM * net.channels * net.sm_write_gb_s for w in warps]
    read_gain = net.sm_read_gb_s / net.sm_write_gb_s
    first, second, third = _Servers(ranks), _Servers(ranks), _Servers(ranks)
    nic_out, nic_in, nv_out, nv_in = _Servers(ranks), _Servers(ranks), _Servers(ranks), _Servers(ranks)
    finish = np.zeros(ranks)
    heap: list[tuple[float, int, int, int, int, float]] = []  # (time, order, stage, source, node, share of its tokens)
    parts = np.maximum(1, np.ceil(traffic.to_node / net.chunk_tokens)).astype(int)
    nodes = traffic.to_node.shape[1]
    for part in range(int(parts.max())):
        for step in range(nodes):
            for source in range(ranks):
                # Each source starts with the node after its own, so that NICs are not all aimed at the same one.
                node = (source // width + 1 + step) % nodes
                if part < parts[source, node] and traffic.to_node[source, node] > 0.0:
                    heap.append((0.0, len(heap), 0, source, node, 1.0 / float(parts[source, node])))
    pair_copies = traffic.to_gpu.reshape(ranks, -1, width)  # [source, node, place]
    remote_bytes = _remote(traffic) * token_bytes
    while heap:
        time, key, stage, source, node, share = heapq.heappop(heap)
        relay = node * width + source % width
        ib = float(remote_bytes[source, node]) * share
        copies = pair_copies[source, node] * (token_bytes * share)  # bytes by place [width]
        total = float(copies.sum())
        group = slice(node * width, (node + 1) * width)
        if not is_combine:
            if stage == 0:
                if ib:
                    time = first.serve(source, time, ib / (role_gb_s[0] * 1e3))
                    time = nic_out.serve(source, time, ib / (net.nic_gb_s * 1e3))
                    time += net.hop_us
            elif stage == 1:
                if ib:
                    time = nic_in.serve(relay, time, ib / (net.nic_gb_s * 1e3))
            elif stage == 2:
                time = second.serve(relay, time, total / (role_gb_s[1] * 1e3))
                time = nv_out.serve(relay, time, total / (net.nvlink_gb_s * 1e3))
            else:
                arrived = np.maximum(nv_in.free_us[group], time) + copies / (net.nvlink_gb_s * 1e3)
                nv_in.free_us[group] = arrived
                done = np.maximum(third.free_us[group], arrived) + copies / (role_gb_s[2] * 1e3)
                third.free_us[group] = done
                finish[group] = np.maximum(finish[group], np.where(copies > 0.0, done, 0.0))
                continue
        else:
            if stage == 0:
                sent = np.maximum(first.free_us[group], time) + copies / (role_gb_s[0] * 1e3)
                first.free_us[group] = sent
                sent = np.maximum(nv_out.free_us[group], sent) + copies / (net.nvlink_gb_s * 1e3)
                nv_out.free_us[group] = sent
                time = float(sent.max())
            elif stage == 1:
                time = nv_in.serve(relay, time, total / (net.nvlink_gb_s * 1e3))
                reduced = ib or float(traffic.to_node[source, node]) * token_bytes * share
                work = max(total / read_gain, reduced)
                time = second.serve(relay, time, work / (role_gb_s[1] * 1e3))
                if ib:
                    time = nic_out.serve(relay, time, ib / (net.nic_gb_s * 1e3))
                    time += net.hop_us
            elif stage == 2:
                if ib:
                    time = nic_in.serve(source, time, ib / (net.nic_gb_s * 1e3))
            else:
                reduced = float(traffic.to_node[source, node]) * token_bytes * share
                # A token's parts from up to `nodes_per_token` nodes are read, one sum is written.
                time = third.serve(source, time, reduced / read_gain / (role_gb_s[2] * 1e3))
                finish[source] = max(finish[source], time)
                continue
        heapq.heappush(heap, (time, key, stage + 1, source, node, share))
    busy = max(float(nic_out.busy_us.max()), float(nic_in.busy_us.max()))
    duration = float(finish.max())
    return Transfer(
        finish, (warps[0], warps[1], warps[2]), busy / duration if duration else 0.0, float(remote_bytes.sum())
    )


def transfer_bound_us(net: Network, traffic: Traffic, token_bytes: float) -> float:
    """What no schedule of hops can beat: the busiest NIC and the busiest NVLink port, each at its full rate."""
    remote = _remote(traffic)
    relay_in = np.zeros(traffic.ranks)
    nv_out = np.zeros(traffic.ranks)
    width = traffic.gpus_per_node
    for source in range(traffic.ranks):
        relays = np.arange(remote.shape[1]) * width + source % width
        relay_in[relays] += remote[source]
        nv_out[relays] += traffic.to_gpu[source].reshape(-1, width).sum(axis=1)
    nic = max(float(remote.sum(axis=1).max()), float(relay_in.max())) * token_bytes / (net.nic_gb_s * 1e3)
    nvlink = max(float(nv_out.max()), float(traffic.to_gpu.sum(axis=0).max())) * token_bytes / (net.nvlink_gb_s * 1e3)
    return max(nic, nvlink)

"""Which expert each token goes to, sampled: node-limited top-k routing with expert loads from even to Zipf-skewed.

What the network and the experts see of a routing is counts only; `Traffic` holds those for one expert-parallel group.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from fp8c.diagnostics import fail

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class RoutingSpec:
    """`zipf` is the exponent of expert popularity: the expert of rank r is asked for in proportion to r ** -zipf; 0.0
    is even. `popularity`, one number per expert in the order they lie on the GPUs, takes its place where it is given.
    `sampled_tokens` of each rank's tokens are drawn and scaled up."""

    experts: int
    top_k: int
    nodes: int
    gpus_per_node: int
    tokens: int  # per GPU
    nodes_per_token: int = 0  # 0: no limit
    zipf: float = 0.0
    sampled_tokens: int = 512
    popularity: tuple[float, ...] = ()

    @property
    def ranks(self) -> int:
        return self.nodes * self.gpus_per_node


@dataclass(frozen=True)
class Traffic:
    """Tokens from each GPU of an expert-parallel group; a token is counted once per place, however many of its experts
    live there.

    to_gpu:  f64 [source GPU, target GPU]    to_node: f64 [source GPU, target node]
    rows:    f64 [GPU] token-expert pairs its experts compute
    """

    to_gpu: Array
    to_node: Array
    rows: Array
    gpus_per_node: int

    @property
    def ranks(self) -> int:
        return len(self.rows)

    @property
    def imbalance(self) -> float:
        """Rows of the most loaded GPU over the mean."""
        return float(self.rows.max() / self.rows.mean())

    def scaled(self, factor: float) -> Traffic:
        return Traffic(self.to_gpu * factor, self.to_node * factor, self.rows * factor, self.gpus_per_node)


def sample_traffic(spec: RoutingSpec, seed: int) -> Traffic:
    """Draw one layer's routing of one micro-batch.

    A token scores every expert with log popularity plus Gumbel noise, so its top-1 follows the popularity exactly. With
    a node limit it keeps the nodes with the largest sum of their best top_k / nodes_per_token scores and takes its top
    experts there (DeepSeek-V3, section 2.1.2). With `zipf`, popular experts are spread over GPUs at random.
    Raises: E0921 when the mesh does not divide the experts, E0922 when top-k cannot be met, E0924 wrong popularity.
    """
    check_routing(spec)
    rng = np.random.default_rng(seed)
    per_gpu = spec.experts // spec.ranks
    if spec.popularity:
        asked = np.array(spec.popularity, dtype=np.float64)
        asked = np.maximum(asked / asked.sum(), 1e-12)  # an expert nobody asked for may still be chosen, last of all
    else:
        asked = rng.permutation(np.arange(1, spec.experts + 1, dtype=np.float64) ** -spec.zipf)
    log_p = np.log(asked)
    drawn = min(spec.tokens, spec.sampled_tokens)
    to_gpu = np.zeros((spec.ranks, spec.ranks))
    to_node = np.zeros((spec.ranks, spec.nodes))
    rows = np.zeros(spec.ranks)
    for source in range(spec.ranks):
        waiting = rng.standard_exponential((drawn, spec.experts), dtype=np.float32)
        gumbel = -np.log(np.maximum(waiting, np.finfo(np.float32).tiny))
        scores = log_p.astype(np.float32) + gumbel
        if 0 < spec.nodes_per_token < spec.nodes:
            scores = _limit_nodes(scores, spec)
        chosen = np.argpartition(-scores, spec.top_k - 1, axis=1)[:, : spec.top_k]
        gpus = chosen // per_gpu
        on_gpu = np.zeros((drawn, spec.ranks), dtype=bool)
        np.put_along_axis(on_gpu, gpus, True, axis=1)
        to_gpu[source] = on_gpu.sum(axis=0)
        to_node[source] = on_gpu.reshape(drawn, spec.nodes, -1).any(axis=2).sum(axis=0)
        rows += np.bincount(gpus.ravel(), minlength=spec.ranks)
    return Traffic(to_gpu, to_node, rows, spec.gpus_per_node).scaled(spec.tokens / drawn)


@lru_cache(maxsize=16)
def balanced_traffic(spec: RoutingSpec, seed: int = 0) -> Traffic:
    """The mean of even routing: sampled, then averaged over everything that is alike by symmetry."""
    sample = sample_traffic(spec, seed)
    own = np.arange(spec.ranks) // spec.gpus_per_node
    same = own[:, None] == np.arange(spec.nodes)[None, :]
    # Every node holds as many experts as every other, so own and foreign nodes are alike.
    to_node = np.full_like(sample.to_node, sample.to_node[same | ~same].mean())
    to_gpu = np.full_like(sample.to_gpu, sample.to_gpu.mean())
    return Traffic(to_gpu, to_node, np.full_like(sample.rows, sample.rows.mean()), spec.gpus_per_node)


def _limit_nodes(scores: npt.NDArray[np.float32], spec: RoutingSpec) -> npt.NDArray[np.float32]:
    best_of = max(1, spec.top_k // spec.nodes_per_token)
    by_node = scores.reshape(len(scores), spec.nodes, -1)
    strength = np.partition(by_node, -best_of, axis=2)[:, :, -best_of:].sum(axis=2)
    kept = np.argpartition(-strength, spec.nodes_per_token - 1, axis=1)[:, : spec.nodes_per_token]
    allowed = np.zeros(strength.shape, dtype=bool)
    np.put_along_axis(allowed, kept, True, axis=1)
    limited: npt.NDArray[np.float32] = np.where(allowed[:, :, None], by_node, -np.inf).reshape(scores.shape)
    return limited


def check_routing(spec: RoutingSpec) -> None:
    if spec.ranks < 1 or spec.experts % spec.ranks:
        raise fail(
            "E0921",
            f"{spec.experts} experts cannot be spread evenly over {spec.ranks} GPUs",
            help="choose an expert parallel size that divides the number of experts",
        )
    counts = spec.popularity
    if counts and (len(counts) != spec.experts or not all(0.0 <= c < float("inf") for c in counts) or sum(counts) <= 0):
        raise fail(
            "E0924",
            f"expected a load, 0 or more, for each of {spec.experts} experts, found {len(counts)} of sum {sum(counts):g}",
            help="give a JSON list with one number per expert",
        )
    reach = spec.nodes_per_token or spec.nodes
    if spec.top_k > min(reach, spec.nodes) * (spec.experts // spec.nodes):
        raise fail(
            "E0922",
            f"a token cannot choose {spec.top_k} experts on {reach} nodes of {spec.experts // spec.nodes} experts each",
            help="raise nodes_per_token, or lower top_k",
        )

"""Role records: what the compiler knows of one operator use. No torch here: the resolver reads nothing else.

An operator use is one forward operator of the model (a GEMM, an attention, a norm, ...). Its backward GEMMs belong to
it. Records are derived from the joint graph (`fp8c.graph`), so they can always be rebuilt.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

from fp8c.diagnostics import Span


class Op(enum.Enum):
    """What an operator use computes; the names are those of the spec language's `op(...)`."""

    LINEAR = "linear"  # a 2-D GEMM with a parameter
    GROUPED_MM = "grouped_mm"  # a GEMM per expert over a ragged token axis
    BMM = "bmm"  # a product of two activations (hand-written attention, rotary tables)
    ATTENTION = "attention"
    NORM = "norm"
    SWIGLU = "swiglu"  # silu(gate) * up, or another gated activation
    EMBEDDING = "embedding"
    DISPATCH = "dispatch"  # tokens to experts: a collective, or the gather by expert on one device
    COMBINE = "combine"


#: Values of `kind(...)`: which part of the model the use belongs to.
KINDS = frozenset({"embedding", "lm_head", "router", "norm", "attention", "mlp", "moe", "shared_expert", "mtp"})

#: Values of `role(...)`: the structural position of the use, found from data flow, never from a name.
ROLES = frozenset(
    {
        "attn_in_proj",  # a GEMM whose output reaches attention
        "attn_out_proj",  # a GEMM that reads attention's output
        "mla_down_proj",  # a GEMM whose (normed) output feeds an MLA up-projection
        "mla_up_proj",  # latent -> norm -> this GEMM -> attention
        "mlp_up",  # gate, up, or both fused: feeds a SwiGLU
        "mlp_down",  # reads a SwiGLU's output
        "moe_up",  # grouped: feeds the experts' SwiGLU
        "moe_down",  # grouped: reads the experts' SwiGLU
        "mlp_swiglu",
        "moe_swiglu",
        "latent_norm",  # the norm in front of an MLA up-projection
    }
)

OPERANDS = {"fprop": ("x", "w"), "dgrad": ("dy", "w"), "wgrad": ("x", "dy")}


@dataclass(frozen=True)
class OpUse:
    """One operator use.

    key:    unique within the graph and stable across runs: module path, operator, and `#n` for a repeated use
    path:   module path without wrappers (`_orig_mod`, FSDP, checkpoint), e.g. `model.layers.3.mlp.experts`
    layer:  index of the enclosing decoder layer, None outside of layers
    param:  fully qualified name of the weight, None when there is none
    m,n,k:  GEMM sizes (tokens, outputs, reduction); None where symbolic or no GEMM
    experts: number of experts of a grouped GEMM, 1 otherwise
    no_dgrad, no_wgrad: why the backward GEMM does not exist (frozen, input needs no gradient); "" when it does
    """

    key: str
    op: Op
    path: str
    kinds: frozenset[str] = frozenset()
    roles: frozenset[str] = frozenset()
    layer: int | None = None
    layer_count: int = 0  # how many decoder layers the model has, for negative indices in `layers(...)`
    param: str | None = None
    m: int | None = None
    n: int | None = None
    k: int | None = None
    experts: int = 1
    no_dgrad: str = ""
    no_wgrad: str = ""
    source: Span | None = field(default=None, compare=False)

    @property
    def is_gemm(self) -> bool:
        return self.op in (Op.LINEAR, Op.GROUPED_MM, Op.BMM)

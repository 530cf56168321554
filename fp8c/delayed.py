"""Delayed scaling: a tensor's scale comes from the largest magnitudes of earlier steps instead of from the tensor at hand.

    scale = max(history) * 2**margin / MAX      `algo = most_recent`: history[0] instead of the maximum

One site (an operand of one GEMM of the model) keeps the last `history` magnitudes. Quantizing reads the scale and then
notes the tensor's own magnitude, so what a step notes counts from the next step on: Transformer Engine's DelayedScaling
(transformer_engine/common/recipe, pytorch/quantization.py), with these differences:

    first step   a site without a history takes its scale from the tensor at hand; there it is 1, which loses gradients
                 below E5M2's 2**-16
    NaN, Inf     the tensor becomes NaN as a whole, as with every other format here; the history does not note it
    all zero     as there: the scale stays what it was
    ranks        magnitudes are not reduced over ranks: every rank scales what it quantizes itself, and a scale always
                 travels with its data; there they are (reduce_amax), so that all ranks use one scale

A quantize that backward computes again *replays* the scale of the last forward and notes nothing.

Histories are state of the compiled step, not of the model: `fp8c.driver.session_of(step).scales`, with `state_dict` and
`load_state_dict`, belongs into a checkpoint beside the optimizer's state (`fp8c.optim.checkpoint` puts it there). Without it
a run that is continued starts with empty histories, as its first step did.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fp8c.diagnostics import fail
from fp8c.formats import Delayed


@dataclass
class DelayedScales:
    """The histories of one compiled step by site: magnitudes, the latest first, f32 [n] or [n, E] for a stack of weights.

    last: the scale each site used last, f32 [] or [E]
    """

    histories: dict[str, Tensor] = field(default_factory=dict)
    last: dict[str, Tensor] = field(default_factory=dict)

    def scale(
        self, site: str, amax: Tensor, how: Delayed, scale_of: Callable[[Tensor], Tensor], *, replay: bool
    ) -> Tensor:
        """The scale to quantize with; notes `amax` unless this replays a forward.

        scale_of: magnitudes to scales, as the format rounds them
        """
        history = self.histories.get(site)
        known = self.last.get(site)
        if known is not None and known.shape != amax.shape:  # another model, or other experts
            history = known = None
        if replay:
            return scale_of(amax) if known is None else self._marked(known, amax)
        if history is None:
            used = scale_of(amax * 2.0**how.margin) if how.margin else scale_of(amax)
        else:
            magnitude = history[0] if how.algo == "most_recent" else history.amax(0)
            assert known is not None
            used = torch.where(magnitude > 0, scale_of(magnitude * 2.0**how.margin), known)
        is_sound = amax.isfinite()
        noted = torch.where(is_sound, amax, 0.0)[None]
        self.histories[site] = noted if history is None else torch.cat((noted, history))[: how.history]
        self.last[site] = torch.where(is_sound, used, torch.ones_like(used) if known is None else known)
        return self._marked(used, amax)

    @staticmethod
    def _marked(scale: Tensor, amax: Tensor) -> Tensor:
        return torch.where(amax.isfinite(), scale, torch.nan)

    def state_dict(self) -> dict[str, Tensor]:
        """All histories and scales, for a checkpoint: plain tensors by name."""
        histories = {f"{site} history": t.clone() for site, t in self.histories.items()}
        return histories | {f"{site} scale": t.clone() for site, t in self.last.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Replace everything. Raises: DiagnosticError E0422 for a site with a history and no scale, or the reverse."""
        histories = {n.removesuffix(" history"): t.clone() for n, t in state.items() if n.endswith(" history")}
        last = {n.removesuffix(" scale"): t.clone() for n, t in state.items() if n.endswith(" scale")}
        if histories.keys() != last.keys() or len(histories) + len(last) != len(state):
            raise fail(
                "E0422", f"the state of delayed scales is not whole: {len(histories)} histories, {len(last)} scales"
            )
        self.histories, self.last = histories, last

    def around(self, run: Callable[..., Any]) -> Callable[..., Any]:
        """`run` (a boxed function of one list) with these histories in force, in whichever thread it is called."""

        def wrapped(values: list[Any]) -> Any:
            with self.active():
                return run(values)

        wrapped._boxed_call = True  # type: ignore[attr-defined]
        return wrapped

    @contextmanager
    def active(self) -> Iterator[None]:
        token = _ACTIVE.set(self)
        try:
            yield
        finally:
            _ACTIVE.reset(token)


_ACTIVE: ContextVar[DelayedScales | None] = ContextVar("delayed_scales", default=None)


def active_scales() -> DelayedScales:
    """The histories in force; outside of a compiled step new ones, so that every call is a first step."""
    return _ACTIVE.get() or DelayedScales()

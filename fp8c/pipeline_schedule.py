"""Pipeline schedules as plain data: what every rank runs, in order. No torch here.

Orders are those `torch.distributed.pipelining` executes (1F1B, interleaved, interleaved zero bubble, ZBV, DualPipeV) and
those of github.com/deepseek-ai/DualPipe for DualPipe, so a simulated step is the step that runs; tests compare them
action by action. A rank's list holds no idle slots: when an action starts follows from its inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from fp8c.diagnostics import fail

FORWARD, INPUT_GRADIENT, WEIGHT_GRADIENT, BACKWARD = "F", "I", "W", "B"


@dataclass(frozen=True)
class Action:
    """One chunk of work: forward (F), whole backward (B), or its input (I) or weight (W) part, of one micro-batch on
    one stage. `way` is the direction in DualPipe, where two pipelines run towards each other: 0 enters at rank 0."""

    kind: str
    stage: int
    micro_batch: int
    way: int = 0

    def __str__(self) -> str:
        return f"{self.stage}{self.kind}{self.micro_batch}" + ("'" if self.way else "")


@dataclass(frozen=True)
class Pair:
    """A forward and a whole backward of different micro-batches, run as one overlapped chunk."""

    forward: Action
    backward: Action

    def __str__(self) -> str:
        return f"({self.forward};{self.backward})"


Step = Action | Pair


@dataclass(frozen=True)
class Pipeline:
    """`ranks[r]` is what rank r runs. `stages[r]` are the (stage, way) pairs it holds; `ways` is 2 for DualPipe."""

    name: str
    stage_count: int
    micro_batches: int
    ranks: tuple[tuple[Step, ...], ...]
    ways: int = 1

    def rank_of(self, stage: int, way: int = 0) -> int:
        return self._owner[(stage, way)]

    @property
    def _owner(self) -> dict[tuple[int, int], int]:
        if "_owners" not in self.__dict__:
            owners = {
                (action.stage, action.way): rank
                for rank, steps in enumerate(self.ranks)
                for step in steps
                for action in actions_of(step)
            }
            object.__setattr__(self, "_owners", owners)
        found: dict[tuple[int, int], int] = self.__dict__["_owners"]
        return found

    @property
    def pair_count(self) -> int:
        return sum(isinstance(step, Pair) for steps in self.ranks for step in steps)


def actions_of(step: Step) -> tuple[Action, ...]:
    return (step.forward, step.backward) if isinstance(step, Pair) else (step,)


@dataclass
class _Writer:
    """Writes one rank's list; counts micro-batches per stage and kind and keeps the queue of delayed weight work."""

    steps: list[Step] = field(default_factory=list)
    counts: dict[tuple[str, int, int], int] = field(default_factory=dict)
    delayed: list[Action] = field(default_factory=list)

    def _next(self, kind: str, stage: int, way: int) -> Action:
        counted = INPUT_GRADIENT if kind == BACKWARD else kind
        micro_batch = self.counts.get((counted, stage, way), 0)
        self.counts[(counted, stage, way)] = micro_batch + 1
        return Action(kind, stage, micro_batch, way)

    def forward(self, stage: int, way: int = 0) -> None:
        self.steps.append(self._next(FORWARD, stage, way))

    def backward(self, stage: int, way: int = 0, *, is_split: bool = False) -> None:
        """`is_split`: only the input part now; the weight part waits for `weight`."""
        action = self._next(INPUT_GRADIENT if is_split else BACKWARD, stage, way)
        self.steps.append(action)
        if is_split:
            self.delayed.append(Action(WEIGHT_GRADIENT, action.stage, action.micro_batch, way))

    def pair(self, forward: tuple[int, int], backward: tuple[int, int]) -> None:
        self.steps.append(Pair(self._next(FORWARD, *forward), self._next(BACKWARD, *backward)))

    def forwards(self, stage: int) -> int:
        """How many forwards of a stage are written."""
        return self.counts.get((FORWARD, stage, 0), 0)

    def backward_in_parts(self, stage: int) -> None:
        """Input part and weight part, one after the other."""
        self.backward(stage, is_split=True)
        self.steps.append(self.delayed.pop())

    def weight(self) -> None:
        """The oldest delayed weight part, if there is one."""
        if self.delayed:
            self.steps.append(self.delayed.pop(0))


def one_f_one_b(ranks: int, micro_batches: int) -> Pipeline:
    """1F1B: rank r runs ahead by its distance from the last rank, then alternates."""
    lists = []
    for rank in range(ranks):
        writer = _Writer()
        ahead = min(ranks - 1 - rank, micro_batches)
        for _ in range(ahead):
            writer.forward(rank)
        for _ in range(micro_batches - ahead):
            writer.forward(rank)
            writer.backward(rank)
        for _ in range(ahead):
            writer.backward(rank)
        lists.append(tuple(writer.steps))
    return Pipeline("1f1b", ranks, micro_batches, tuple(lists))


def _looped(name: str, ranks: int, micro_batches: int, local_stages: int, reach: int, is_split: bool) -> Pipeline:
    """Interleaved schedules: `local_stages` stages per rank, visited round after round.

    reach: forwards a rank runs ahead per hop from the last rank: 2 for 1F1B order, 1 when the backward is split.
    """
    rounds = max(1, micro_batches // ranks)
    if micro_batches % rounds:
        raise fail(
            "E0941",
            f"{name} needs micro-batches in {rounds} equal rounds, found {micro_batches} on {ranks} ranks",
            help=f"use a multiple of {rounds}",
        )
    per_round = micro_batches // rounds
    total = local_stages * micro_batches
    lists = []
    for rank in range(ranks):
        writer = _Writer()
        warmup = min((local_stages - 1) * per_round + reach * (ranks - 1 - rank), total)

        for turn in range(total + warmup):
            if turn < total:
                writer.forward(turn // per_round % local_stages * ranks + rank)
            back = turn - warmup
            if back >= 0:
                local = local_stages - 1 - back // per_round % local_stages
                writer.backward(local * ranks + rank, is_split=is_split)
                if back >= rank:  # the first `rank` weight parts wait for the bubble at the end
                    writer.weight()
        while writer.delayed:
            writer.weight()
        lists.append(tuple(writer.steps))
    return Pipeline(name, ranks * local_stages, micro_batches, tuple(lists))


def interleaved(ranks: int, micro_batches: int, local_stages: int = 2) -> Pipeline:
    """Interleaved 1F1B: stage s is on rank s mod ranks."""
    return _looped("interleaved", ranks, micro_batches, local_stages, 2, is_split=False)


def zero_bubble(ranks: int, micro_batches: int, local_stages: int = 1) -> Pipeline:
    """Interleaved zero bubble (ZB1P with one stage per rank): weight parts fill the drain."""
    return _looped("zb", ranks, micro_batches, local_stages, 1, is_split=True)


def zero_bubble_v(ranks: int, micro_batches: int) -> Pipeline:
    """ZBV (arXiv 2401.10241, section 6): stages in a V over the ranks, two per rank. The order is that for at least
    2 x ranks - 1 micro-batches; with fewer, the surplus is left out."""
    enough = max(2 * ranks - 1, micro_batches)
    lists = []
    for rank in range(ranks):
        down, up = rank, 2 * ranks - 1 - rank
        writer = _Writer()

        for _ in range(2 * (ranks - rank) - 1):
            writer.forward(down)
        for _ in range(rank):
            writer.forward(up)
            writer.forward(down)
        for _ in range(ranks - rank):
            writer.forward(up)
            writer.backward_in_parts(up)
        while writer.forwards(up) < writer.forwards(down) or writer.forwards(down) < enough:
            if writer.forwards(down) < enough:
                writer.forward(down)
            writer.backward_in_parts(down)
            writer.forward(up)
            writer.backward_in_parts(up)
        for _ in range(rank):
            writer.backward(down, is_split=True)
            writer.backward(up, is_split=True)
        for _ in range(ranks - rank):
            writer.backward(down, is_split=True)
            oldest = next(a for a in writer.delayed if a.stage == down)
            writer.delayed.remove(oldest)
            writer.steps.append(oldest)
        for stage in (up, down):
            writer.steps += [a for a in writer.delayed if a.stage == stage]
        kept = [s for s in writer.steps if isinstance(s, Action) and s.micro_batch < micro_batches]
        lists.append(tuple(kept))
    return Pipeline("zbv", 2 * ranks, micro_batches, tuple(lists))


def _dual(ranks: int, position: int, turns: int, a: tuple[int, int], b: tuple[int, int]) -> tuple[Step, ...]:
    """One rank of DualPipe or DualPipeV: `a` and `b` are its two (stage, way), `a` being entered first.

    ranks: ranks on one arm of the V; position: place on the arm, the turning point last; turns: repetitions of the
    main phase on position 0, less one. Phases are numbered as in DeepSeek's code.
    """
    writer = _Writer()
    left = ranks - position - 1
    for _ in range(2 * left):  # 1: forwards of `a`
        writer.forward(*a)
    for _ in range(position + 1):  # 2: both forwards in turn
        writer.forward(*a)
        writer.forward(*b)
    for _ in range(left):  # 3: backwards of `b` with their weight work put off by one step
        writer.backward(*b, is_split=True)
        writer.weight()
        writer.forward(*b)
    for turn in range(turns + position + 1):  # 4: forward of one beside backward of the other
        if turn == 0 and left == 0:
            writer.forward(*a)  # at the turning point the first two run apart: the backward waits for this forward
            writer.backward(*b)
        else:
            writer.pair(a, b)
        writer.pair(b, a)
    for _ in range(left):  # 5: forwards run out
        writer.backward(*b)
        writer.pair(b, a)
    is_split = False  # 6: backwards; in the second half weight work is put off to fill the drain
    for turn in range(position + 1):
        half = (position + 1) // 2
        is_split = is_split or (turn == half and position % 2 == 1)
        writer.backward(*b, is_split=is_split)
        is_split = is_split or (turn == half and position % 2 == 0)
        writer.backward(*a, is_split=is_split)
    for _ in range(left):  # 7
        writer.weight()
        writer.backward(*a, is_split=is_split)
    for _ in range(position + 1):  # 8
        writer.weight()
    return tuple(writer.steps)


def dualpipe_v(ranks: int, micro_batches: int) -> Pipeline:
    """DualPipeV: stages in a V, stage r and stage 2 x ranks - 1 - r on rank r."""
    if micro_batches < 2 * ranks:
        raise fail(
            "E0942",
            f"dualpipev on {ranks} ranks needs at least {2 * ranks} micro-batches, found {micro_batches}",
            help="lower the micro-batch size, or use fewer pipeline ranks",
        )
    lists = tuple(
        _dual(ranks, rank, micro_batches - 2 * ranks, (rank, 0), (2 * ranks - 1 - rank, 0)) for rank in range(ranks)
    )
    return Pipeline("dualpipev", 2 * ranks, micro_batches, lists)


def dualpipe(ranks: int, micro_batches: int) -> Pipeline:
    """DualPipe: half of the micro-batches enter at rank 0 (way 0), half at the last rank (way 1); rank r holds stage r
    of way 0 and stage ranks - 1 - r of way 1."""
    if ranks % 2 or micro_batches % 2 or micro_batches < 2 * ranks:
        raise fail(
            "E0942",
            f"dualpipe needs an even number of ranks and an even number of at least {2 * ranks} micro-batches,"
            f" found {ranks} ranks and {micro_batches} micro-batches",
            help="lower the micro-batch size, or use fewer pipeline ranks",
        )
    lists = []
    for rank in range(ranks):
        near, far = (rank, 0), (ranks - 1 - rank, 1)
        is_first_half = rank < ranks // 2
        position = min(rank, ranks - 1 - rank)
        first, second = (near, far) if is_first_half else (far, near)
        lists.append(_dual(ranks // 2, position, micro_batches // 2 - ranks, first, second))
    return Pipeline("dualpipe", ranks, micro_batches, tuple(lists), ways=2)


SCHEDULES: dict[str, Callable[[int, int], Pipeline]] = {
    "1f1b": one_f_one_b,
    "interleaved": interleaved,
    "zb": zero_bubble,
    "zbv": zero_bubble_v,
    "dualpipe": dualpipe,
    "dualpipev": dualpipe_v,
}


def make_pipeline(name: str, ranks: int, micro_batches: int) -> Pipeline:
    """A pipeline by name. Raises: E0940 unknown schedule, E0941 and E0942 sizes a schedule cannot take."""
    if name not in SCHEDULES:
        raise fail("E0940", f"there is no pipeline schedule {name!r}", help=f"known are {', '.join(SCHEDULES)}")
    return SCHEDULES[name](ranks, micro_batches)


def inputs_of(action: Action, stage_count: int) -> Iterator[Action]:
    """The actions whose results `action` reads: neighbours of the same micro-batch, and its own earlier parts. A
    backward may have been run whole (B) or in parts (I): the input part of the next stage is named, as kind I."""
    stage, mb, way = action.stage, action.micro_batch, action.way
    if action.kind == FORWARD:
        if stage > 0:
            yield Action(FORWARD, stage - 1, mb, way)
    elif action.kind == WEIGHT_GRADIENT:
        yield Action(INPUT_GRADIENT, stage, mb, way)
    else:
        yield Action(FORWARD, stage, mb, way)
        if stage < stage_count - 1:
            yield Action(INPUT_GRADIENT, stage + 1, mb, way)

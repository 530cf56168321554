"""The barriers between producer, scale warp, consumers and store warp of the GEMM (backends/cuda/gemm*.cuh), played on the CPU in random orders: nobody waits forever, and
no memory is written while somebody reads it.

The players follow the code function by function; what they touch is a set of named pieces of shared memory. Loads and
stores by TMA begin when issued and end whenever the dice say so; stores of one thread are read in order.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest

GROUPS = 2  # consumer warpgroups, each played as one warp


@dataclass
class Barrier:
    """An mbarrier: `count` arrivals end a phase."""

    count: int
    arrived: int = 0
    phases: int = 0

    def arrive(self, count: int = 1) -> None:
        self.arrived += count
        assert self.arrived <= self.count
        if self.arrived == self.count:
            self.arrived, self.phases = 0, self.phases + 1

    def passed(self, parity: int) -> bool:
        """try_wait.parity: the phase of this parity is over."""
        return self.phases % 2 != parity


@dataclass
class Block:
    """One thread block. `held`: stages that take the output, 0 or 1; `lead`: k-blocks of a tile that the first warpgroup does
    before the second one begins it; `waves` of each warpgroup, `chunks` of columns of the output."""

    stages: int
    held: int
    lead: int
    tiles: list[int]  # k-blocks of each
    dice: random.Random
    waves: int = 2
    chunks: int = 2
    early: bool = False
    stop_after: int | None = None  # k-blocks, then consumers stand still
    reading: dict[str, int] = field(default_factory=dict)
    writing: set[str] = field(default_factory=set)
    in_flight: list[tuple[str, list[str], Barrier | None]] = field(default_factory=list)
    store_groups: list[list[str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.full = [Barrier(3) for _ in range(self.stages)]  # the producer's arrival, the bytes, the scale warp's
        self.empty = [Barrier(GROUPS) for _ in range(self.stages)]
        self.staged = [Barrier(1) for _ in range(GROUPS)]
        self.b_read, self.led = Barrier(1), Barrier(1)

    def piece(self, chunk: int, wave: int, group: int) -> str:
        if chunk == 0:
            return f"A {self.stages - 1} {wave} {group}"
        place = (chunk - 1) * self.waves + wave
        return f"staging {place}" if group == 0 else f"B {self.stages - 1} {place}"

    def pieces_of_b(self, stage: int) -> list[str]:
        """As long as a wave's half chunk; a piece more or less doesn't matter to anybody."""
        return [f"B {stage} {place}" for place in range((self.chunks - 1) * self.waves + 1)]

    def rounds(self, blocks: int) -> int:
        return -(-max(blocks, 1) // self.stages)

    # What TMA and the tensor core do to memory ------------------------------------------------------------------

    def begin_write(self, pieces: list[str]) -> None:
        for p in pieces:
            assert not self.reading.get(p) and p not in self.writing, p
            self.writing.add(p)

    def begin_read(self, pieces: list[str]) -> None:
        for p in pieces:
            assert p not in self.writing, p
            self.reading[p] = self.reading.get(p, 0) + 1

    def end_read(self, pieces: list[str]) -> None:
        for p in pieces:
            self.reading[p] -= 1

    def end_something(self) -> bool:
        """One transfer of the copy engine, if any is under way."""
        loads = [("load", i) for i in range(len(self.in_flight))]
        choices = loads + ([("store", 0)] if any(self.store_groups) else [])
        if not choices:
            return False
        kind, i = self.dice.choice(choices)
        if kind == "load":
            _, pieces, barrier = self.in_flight.pop(i)
            self.writing -= set(pieces)
            assert barrier is not None
            barrier.arrive()
        else:
            self.end_read(next(g for g in self.store_groups if g)[:])
            next(g for g in self.store_groups if g).clear()
        return True

    def pending_groups(self) -> int:
        unread = [i for i, g in enumerate(self.store_groups) if g]
        return len(self.store_groups) - unread[0] if unread else 0

    # Players: each yields a condition to wait for -----------------------------------------------------------------

    def producer(self) -> Iterator[object]:
        uses = 0
        for blocks in self.tiles:
            for k in range(self.rounds(blocks) * self.stages):
                s, parity = uses % self.stages, uses // self.stages % 2
                yield lambda s=s, parity=parity: self.empty[s].passed(parity ^ 1)
                uses += 1
                if k >= blocks:
                    self.full[s].arrive(2)  # as if the bytes had come
                    continue
                pieces = [f"A {s} {w} {g}" for w in range(self.waves) for g in range(GROUPS)] + self.pieces_of_b(s)
                self.begin_write(pieces)
                self.in_flight.append(("load", pieces, self.full[s]))
                self.full[s].arrive()

    def scale_warp(self) -> Iterator[object]:
        together = self.stages if self.lead else 1
        uses = 0
        for blocks in self.tiles:
            for _ in range(self.rounds(blocks) * self.stages // together):
                stages = [(u % self.stages, u // self.stages % 2) for u in range(uses, uses + together)]
                yield lambda stages=stages: all(self.empty[s].passed(parity ^ 1) for s, parity in stages)
                uses += together
                for s, _ in stages:
                    self.full[s].arrive()

    def operands(self, stage: int, group: int) -> list[str]:
        return [f"A {stage} {w} {group}" for w in range(self.waves)] + self.pieces_of_b(stage)

    def consumer(self, group: int) -> Iterator[object]:
        parity, done, begun = 0, 0, False
        for index, blocks in enumerate(self.tiles):
            of_tile = index % 2
            if group == 1 and self.lead:
                yield lambda p=of_tile: self.led.passed(p)
            for r in range(self.rounds(blocks)):
                is_last = r == self.rounds(blocks) - 1
                for s in range(self.stages):
                    if r == 0 and group == 0 and blocks >= self.stages and s == self.lead > 0:
                        self.led.arrive()
                    if not begun:
                        yield lambda s=s, parity=parity: self.full[s].passed(parity)
                    if begun or r * self.stages + s < blocks:
                        if not begun:
                            self.begin_read(self.operands(s, group))
                        begun = False
                        yield lambda: True
                        self.end_read(self.operands(s, group))
                    if s < self.stages - self.held or not is_last:
                        self.empty[s].arrive()
                    done += 1
                    if done == self.stop_after:
                        return
                parity ^= 1
            if group == 0 and self.lead and blocks < self.stages:
                self.led.arrive()
            if self.early and index + 1 < len(
                self.tiles
            ):  # also of a tile without k-blocks: of old numbers, for nobody
                yield lambda parity=parity: self.full[0].passed(parity)
                self.begin_read(self.operands(0, group))
                begun = True
            if not self.held:
                continue
            if group == 0:
                self.b_read.arrive()
            for chunk in range(self.chunks):
                if chunk == 1 and group == 1:
                    yield lambda p=of_tile: self.b_read.passed(p)
                for wave in range(self.waves):
                    piece = [self.piece(chunk, wave, group)]
                    self.begin_write(piece)
                    yield lambda: True
                    self.writing -= set(piece)
            self.staged[group].arrive()

    def store_warp(self) -> Iterator[object]:
        for index, _ in enumerate(self.tiles if self.held else []):
            for group in range(GROUPS):
                yield lambda g=group, p=index % 2: self.staged[g].passed(p)
                pieces = [self.piece(chunk, wave, group) for chunk in range(self.chunks) for wave in range(self.waves)]
                self.begin_read(pieces)
                self.store_groups.append(pieces)
            yield lambda: self.pending_groups() <= 0
            self.empty[self.stages - 1].arrive(GROUPS)

    def play(self) -> None:
        everybody = (self.producer(), self.scale_warp(), self.consumer(0), self.consumer(1), self.store_warp())
        players = {p: next(p, None) for p in everybody}
        while any(c is not None for c in players.values()):
            ready = [p for p, c in players.items() if c is not None and c()]  # type: ignore[operator]
            if (not ready or self.dice.random() < 0.3) and self.end_something():
                continue
            if not ready and self.stop_after is not None:
                return
            assert ready, "everybody waits"
            p = self.dice.choice(ready)
            players[p] = next(p, None)


@pytest.mark.parametrize(("lead", "early"), [(0, False), (1, False), (2, False), (0, True)])
@pytest.mark.parametrize(("stages", "waves", "chunks"), [(3, 2, 2), (4, 2, 2)])
@pytest.mark.parametrize("held", [0, 1])
def test_nobody_waits_forever_and_nothing_is_overwritten(
    stages: int, waves: int, chunks: int, held: int, lead: int, early: bool
) -> None:
    for seed in range(12):
        dice = random.Random(seed)
        tiles = [dice.choice((0, 1, stages - 1, stages, stages + 1, 2 * stages, 11)) for _ in range(5)]
        Block(stages, held, lead, tiles, dice, waves, chunks, early).play()


@pytest.mark.parametrize("done", [1, 2, 3, 4, 5, 6, 7])
def test_a_stage_fills_again_as_soon_as_it_is_free(done: int) -> None:
    """Were scales handed over for a round of stages at a time, the ring would run empty at the end of each round."""
    block = Block(4, held=0, lead=0, tiles=[12], dice=random.Random(done), stop_after=done)
    block.play()
    assert sum(barrier.phases for barrier in block.full) == done + 4

"""Two streams beside each other: the times an issue order takes when compute and transfers slow each other down. No torch.

A schedule (`fp8c/schedule.py`) gives every task its own time. On a GPU a task takes longer while the other stream is
busy: a transfer's thread blocks take SMs from compute, and both share L2 and memory. `replay` runs an issue order with
those factors in force exactly while both streams work.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace

from fp8c.diagnostics import fail
from fp8c.schedule import COMM, COMPUTE, EPSILON_US, Slot, Task


@dataclass(frozen=True)
class Interference:
    """A task's time while the other stream is busy, over its time alone: of compute beside transfers, and of transfers
    beside compute. Both at least 1."""

    compute: float = 1.0
    comm: float = 1.0


def replay(issued: Sequence[Task], interference: Interference) -> tuple[Slot, ...]:
    """Run tasks in the order a host issues them onto two streams; `duration_us` of each is its time alone.

    A stream runs its tasks in issue order. Every task waits for what it names in `after`; a transfer also for all
    compute issued before it, as NCCL's stream waits for the stream it is called from. Slots come back with the time
    each task really took, by start.

    Raises: E0902 when the order waits for itself.
    """
    waits = _waits(issued)
    queues = {stream: deque(t for t in issued if t.resource == stream) for stream in (COMPUTE, COMM)}
    slow = {COMPUTE: interference.compute, COMM: interference.comm}
    running: dict[str, tuple[Task, float, float]] = {}  # stream -> task, its start, its time alone still to come
    done: set[str] = set()
    slots: list[Slot] = []
    now_us = 0.0
    while running or any(queues.values()):
        for stream, queue in queues.items():
            if stream not in running and queue and waits[queue[0].name] <= done:
                task = queue.popleft()
                running[stream] = task, now_us, task.duration_us
        if not running:
            raise fail("E0902", f"{next(q for q in queues.values() if q)[0].name!r} waits for a task issued behind it")
        rate = {stream: 1.0 / slow[stream] if len(running) > 1 else 1.0 for stream in running}
        step_us = min(left / rate[stream] for stream, (_, _, left) in running.items())
        now_us += step_us
        for stream, (task, start_us, left) in list(running.items()):
            left -= step_us * rate[stream]
            if left > EPSILON_US:
                running[stream] = task, start_us, left
                continue
            del running[stream]
            done.add(task.name)
            slots.append(Slot(replace(task, duration_us=now_us - start_us), start_us))
    return tuple(sorted(slots, key=lambda s: s.start_us))


def _waits(issued: Sequence[Task]) -> dict[str, frozenset[str]]:
    last_compute: frozenset[str] = frozenset()
    found = {}
    for task in issued:
        found[task.name] = frozenset(task.after)
        if task.resource == COMM:
            found[task.name] |= last_compute
        else:
            last_compute = frozenset({task.name})  # it ends after all compute before it
    return found

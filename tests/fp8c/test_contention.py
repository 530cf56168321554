"""Times of two streams that slow each other down, against sums done by hand."""

from __future__ import annotations

import pytest

from fp8c.contention import Interference, replay
from fp8c.diagnostics import DiagnosticError
from fp8c.overlap import exposure
from fp8c.schedule import COMM, COMPUTE, Task


def spans(tasks: list[Task], interference: Interference) -> dict[str, tuple[float, float]]:
    return {s.task.name: (s.start_us, s.end_us) for s in replay(tasks, interference)}


def test_streams_that_do_not_meet_take_the_times_they_take_alone() -> None:
    tasks = [Task("a", COMPUTE, 10.0), Task("send", COMM, 5.0, ("a",)), Task("b", COMPUTE, 3.0, ("send",))]
    assert spans(tasks, Interference(2.0, 3.0)) == {"a": (0.0, 10.0), "send": (10.0, 15.0), "b": (15.0, 18.0)}


def test_tasks_slow_down_only_while_the_other_stream_works() -> None:
    """10 us of transfer at 1.2 last 12 us, in which 9.6 us of compute get done; the rest of it runs alone."""
    tasks = [Task("send", COMM, 10.0), Task("a", COMPUTE, 20.0)]
    found = spans(tasks, Interference(1.25, 1.2))
    assert found["send"] == pytest.approx((0.0, 12.0))
    assert found["a"] == pytest.approx((0.0, 12.0 + (20.0 - 12.0 / 1.25)))


def test_a_transfer_waits_for_compute_issued_before_it() -> None:
    tasks = [Task("a", COMPUTE, 10.0), Task("send", COMM, 5.0), Task("b", COMPUTE, 10.0)]
    assert spans(tasks, Interference())["send"] == (10.0, 15.0)
    early = [tasks[1], tasks[0], tasks[2]]
    assert spans(early, Interference())["send"] == (0.0, 5.0)


def test_exposure_of_what_was_replayed() -> None:
    tasks = [Task("send", COMM, 10.0), Task("a", COMPUTE, 4.0)]
    found = exposure(replay(tasks, Interference(1.5, 2.0)))
    # 6 us beside each other move the transfer by 3 us; 7 us of it are left.
    assert (found.compute_us, found.makespan_us, found.exposed_us) == pytest.approx((6.0, 13.0, 7.0))


def test_an_order_that_waits_for_itself() -> None:
    with pytest.raises(DiagnosticError) as raised:
        replay([Task("a", COMPUTE, 1.0, ("b",)), Task("b", COMPUTE, 1.0)], Interference())
    assert raised.value.diagnostics[0].code == "E0902"

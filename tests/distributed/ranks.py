"""Run functions on several processes that form a gloo group: a pool that stays up for a module's tests."""

from __future__ import annotations

import importlib.util
import multiprocessing as mp
import os
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

TIMEOUT_S = 240.0


@contextmanager
def pool(world: int) -> Iterator[Callable[..., list[Any]]]:
    """A function `run(job, *args)`: calls the function of that name in jobs.py on every rank, with pickled arguments;
    returns the results by rank, raises what one raised."""
    context = mp.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        ends = [context.Pipe() for _ in range(world)]
        store = str(Path(folder) / "store")
        processes = [
            context.Process(target=_serve, args=(rank, world, store, ends[rank][1]), daemon=True)
            for rank in range(world)
        ]
        for process in processes:
            process.start()

        def run(job: str, *args: Any) -> list[Any]:
            for end, _ in ends:
                end.send((job, args))
            answers = [end.recv() if end.poll(TIMEOUT_S) else (False, "no answer in time") for end, _ in ends]
            failed = [f"rank {rank}:\n{text}" for rank, (ok, text) in enumerate(answers) if not ok]
            assert not failed, "\n".join(failed)
            return [result for _, result in answers]

        try:
            yield run
        finally:
            for end, _ in ends:
                end.send(None)
            for process in processes:
                process.join(20)
                if process.is_alive():
                    process.kill()


def load_jobs() -> ModuleType:
    spec = importlib.util.spec_from_file_location("distributed_jobs", Path(__file__).with_name("jobs.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _serve(rank: int, world: int, store: str, end: Any) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    jobs = load_jobs()
    dist.init_process_group("gloo", rank=rank, world_size=world, init_method=f"file://{store}")
    while (request := end.recv()) is not None:
        job, args = request
        torch._dynamo.reset()
        try:
            end.send((True, getattr(jobs, job)(*args)))
        except BaseException:  # noqa: BLE001 - reported to the test
            end.send((False, traceback.format_exc()))
    dist.destroy_process_group()

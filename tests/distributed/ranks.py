"""Run functions on several processes that form a gloo group: a pool that stays up for a module's tests."""

from __future__ import annotations

import importlib.util
import os
import pickle
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Client, Listener
from pathlib import Path
from typing import Any

#: For one job on a machine whose few cores do other work as well: the longest took 100 s on two cores with a load of 11.
TIMEOUT_S = 480.0
ROOT = Path(__file__).parents[2]


@contextmanager
def pool(world: int, group_timeout_s: float = 300.0) -> Iterator[Callable[..., list[Any]]]:
    """A function `run(job, *args)`: calls the function of that name in jobs.py or jobs_training.py on every rank, with pickled arguments;
    returns the results by rank, raises what one raised. A rank that dies gives the result `(exit code,)`."""
    with tempfile.TemporaryDirectory() as folder, Listener(str(Path(folder) / "socket")) as listener:
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
        command = [sys.executable, __file__, str(world), folder, str(group_timeout_s)]
        processes = [subprocess.Popen([*command, str(rank)], env=environment) for rank in range(world)]
        connections = {}
        for _ in processes:
            connection = listener.accept()
            connections[connection.recv()] = connection
        ends = [connections[rank] for rank in range(world)]

        def answer(rank: int) -> tuple[bool, Any]:
            try:
                if not ends[rank].poll(TIMEOUT_S):
                    return False, "no answer in time"
                found: tuple[bool, Any] = pickle.loads(ends[rank].recv_bytes())
                return found
            except EOFError:
                return True, (processes[rank].wait(10),)

        def run(job: str, *args: Any) -> list[Any]:
            for end in ends:
                end.send((job, args))
            answers = [answer(rank) for rank in range(world)]
            failed = [f"rank {rank}:\n{text}" for rank, (ok, text) in enumerate(answers) if not ok]
            assert not failed, "\n".join(failed)
            return [result for _, result in answers]

        try:
            yield run
        finally:
            for end, process in zip(ends, processes):
                if process.poll() is None:
                    end.send(None)
            for process in processes:
                try:
                    process.wait(20)
                except subprocess.TimeoutExpired:
                    process.kill()


def find_job(name: str) -> Callable[..., Any]:
    """The function of that name in jobs_training.py or in jobs.py."""
    file = Path(__file__).with_name("jobs_training.py")
    if file.stem not in sys.modules:
        spec = importlib.util.spec_from_file_location(file.stem, file)
        assert spec is not None and spec.loader is not None
        sys.modules[file.stem] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[file.stem])
    training = sys.modules[file.stem]
    found: Callable[..., Any] = getattr(training, name, None) or getattr(training.jobs, name)
    return found


def serve(world: int, folder: str, group_timeout_s: float, rank: int) -> None:
    import datetime

    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    with Client(str(Path(folder) / "socket")) as end:
        end.send(rank)
        dist.init_process_group(
            "gloo",
            rank=rank,
            world_size=world,
            init_method=f"file://{folder}/store",
            timeout=datetime.timedelta(seconds=group_timeout_s),
        )
        while (request := end.recv()) is not None:
            job, args = request
            torch._dynamo.reset()
            try:
                answer = (True, find_job(job)(*args))
            except BaseException:  # noqa: BLE001 - reported to the test
                answer = (False, traceback.format_exc())
            end.send_bytes(pickle.dumps(answer))  # tensors by value: the ranks share no memory with the test
        dist.destroy_process_group()


if __name__ == "__main__":
    serve(int(sys.argv[1]), sys.argv[2], float(sys.argv[3]), int(sys.argv[4]))

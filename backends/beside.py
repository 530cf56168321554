"""Compile a step's kernels in threads while Inductor lowers its graphs: the first step finds them in the kernel caches.

The CUDA compiler, LLVM, ptxas and the C compiler run without Python's lock. A call that comes before its kernel is done waits
for it (CUDA, `build.cubin`) or compiles it as well (Triton). Nothing here fails a step: a kernel that could not be compiled is
compiled again by its call, which says what is wrong.
"""

from __future__ import annotations

import atexit
import logging
import os
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from threading import Thread

import torch
from torch import fx
from torch._subclasses.fake_tensor import unset_fake_temporarily

from fp8c.backends import prebuilt
from fp8c.backends.cuda import build
from fp8c.backends.gemms import choice
from fp8c.backends.gemms.candidates import DEFAULT
from fp8c.target_record import TargetRecord

Job = Callable[[], object]

_LOG = logging.getLogger(__name__)
_ARCHITECTURES = {(9, 0): "sm90", (10, 0): "sm100"}
_MOST_THREADS = 4


def compile_beside(graphs: Sequence[fx.Graph], target: TargetRecord) -> None:
    """Start compiling what `graphs` run on the current GPU. Nothing where that is no GPU of `target`'s architecture."""
    if find_spec("triton") is None or not torch.cuda.is_available():
        return
    if _ARCHITECTURES.get(torch.cuda.get_device_capability()) != target.architecture:
        return
    sms = torch.cuda.get_device_properties(torch.cuda.current_device()).multi_processor_count
    try:
        jobs = jobs_of(graphs, replace(target, sms=sms))
    except Exception:  # the calls compile what they need, and say what they lack
        _LOG.debug("kernels are compiled by their first calls", exc_info=True)
        return
    run_beside(jobs, threads())


def threads() -> int:
    """Half of this process's share of the machine: ranks of one machine compile the same kernels at the same time."""
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return max(1, min(_MOST_THREADS, (os.cpu_count() or 1) // (2 * ranks)))


def jobs_of(graphs: Sequence[fx.Graph], target: TargetRecord) -> list[Job]:
    """One for each kernel, CUDA's first: they take the longest."""
    from fp8c.backends.triton import ahead

    with unset_fake_temporarily():  # launchers are asked with tensors on the meta device
        served = prebuilt.serve_gemms(graphs, target)
        if choice.policy().first not in ("", *DEFAULT):
            served = {}  # by other implementations
        fused = prebuilt.serve_fused(graphs, target)
        by_triton = [node for node, who in served.items() if who == "triton"]
        launches = ahead.launches_of(graphs, target.architecture, by_triton, fused)
    instances = [who for who in (*served.values(), *fused.values()) if not isinstance(who, str)]
    compiled = dict.fromkeys(instances) if build.has_compiler() else {}
    capability = ahead.CAPABILITY[target.architecture]
    return [
        *(partial(build.cubin, instance) for instance in compiled),
        *(partial(ahead.fill_cache, launch, capability) for launch in launches),
    ]


def run_beside(jobs: Iterable[Job], threads: int) -> list[Thread]:
    """Do `jobs` in their order in threads that no exit of the program waits for longer than for one job."""
    pending = deque(jobs)

    def work() -> None:
        with suppress(IndexError):
            while True:
                job = pending.popleft()
                try:
                    job()
                except Exception:
                    _LOG.debug("a kernel is left to its first call", exc_info=True)

    started = [Thread(target=work, name="fp8c-kernels", daemon=True) for _ in range(min(threads, len(pending)))]

    def finish() -> None:
        pending.clear()
        for thread in started:
            thread.join()

    atexit.register(finish)
    for thread in started:
        thread.start()
    return started

"""Progress on stderr: one line for every stage that takes longer than a second. No torch here."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TextIO

#: Shorter stages say nothing.
QUIET_S = 1.0


@dataclass
class Progress:
    """Names and seconds of the stages so far, in order."""

    stages: list[tuple[str, float]] = field(default_factory=list)
    stream: TextIO = field(default_factory=lambda: sys.stderr)
    is_quiet: bool = False

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """On a terminal the line appears while the stage runs; in a log it appears when the stage is over."""
        started = time.perf_counter()
        is_live = self.stream.isatty() and not self.is_quiet
        timer = threading.Timer(QUIET_S, self._write, [f"fp8c: {name} ..."])
        timer.daemon = True
        if is_live:
            timer.start()
        try:
            yield
        finally:
            timer.cancel()
            seconds = time.perf_counter() - started
            self.stages.append((name, seconds))
            if seconds >= QUIET_S and not self.is_quiet:
                self._write(
                    f"\rfp8c: {name}: {seconds:.1f} s\033[K\n" if is_live else f"fp8c: {name}: {seconds:.1f} s\n"
                )

    def _write(self, text: str) -> None:
        self.stream.write(text)
        self.stream.flush()

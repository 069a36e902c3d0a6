"""Says on the console that training waits for its clips or prompts: storage that hangs, and storage that is slow."""

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

PATIENCE = 60.0
"""Seconds of one wait after which a line says so."""
STEPS, SHARE, LEAST = 10, 0.25, 0.1
"""A source is slow when the waits of ten steps take a quarter of their time, and a tenth of a second each."""


class Waits:
    """The waits of a worker for its share of a batch; each kind is reported once.

    Args:
        report: shows a line to the user.
        source: the setting ``data.source``, which the lines name.
        encodes: whether videos are encoded on the way.
    """

    def __init__(self, report: Callable[[str], None], source: str, encodes: bool = False) -> None:
        self._report, self._source, self._encodes = report, source, encodes
        self._remedy = (
            "raise data.encoders, set data.encoder_gpus, or encode the videos first with `rlvid encode`"
            if encodes
            else "the storage is slow, or the machine is busy"
        )
        self._waited, self._begun, self._hung, self._slow = 0.0, False, False, False
        self._steps: deque[tuple[float, float]] = deque(maxlen=STEPS)  # seconds waited, seconds of the step

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Measures the block, which waits for a share; says so while it takes longer than ``PATIENCE``."""
        timer = threading.Timer(PATIENCE, self._hangs)
        timer.daemon = True
        timer.start()
        started = time.perf_counter()
        try:
            yield
        finally:
            timer.cancel()
            self._waited += time.perf_counter() - started

    def end_step(self, seconds: float) -> None:
        """Takes the seconds of a step, the wait for its share among them.

        The first step does not count: its wait is the start of the source.
        """
        waited, self._waited = self._waited, 0.0
        if not self._begun:
            self._begun = True
            return
        self._steps.append((waited, seconds))
        waited, whole = map(sum, zip(*self._steps, strict=True))
        if not self._slow and len(self._steps) == STEPS and waited > max(SHARE * whole, LEAST * STEPS):
            self._slow = True
            self._report(
                f"reading data.source={self._source} is slower than training: a step takes {whole / STEPS:.1f} s, and "
                f"waits {waited / STEPS:.1f} s of it for its samples; {self._remedy}"
            )

    def _hangs(self) -> None:
        if not self._hung:
            self._hung = True
            self._report(
                f"has waited {PATIENCE:.0f} s for data.source={self._source} and still waits; check that its storage "
                f"answers{'; or ' + self._remedy if self._encodes else ''}"
            )

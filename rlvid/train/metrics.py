"""TensorBoard: scalars of every step and moving pictures, written by worker 0; resumed runs leave no zigzag."""

import math
import os
import re
import socket
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

import torch
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.plugins.text.summary_v2 import text_pb
from tensorboard.summary.writer.event_file_writer import EventFileWriter, _AsyncWriter
from tensorboard.summary.writer.record_writer import RecordWriter
from torch import Tensor

from rlvid.files import write_error
from rlvid.plots.video import gif_bytes

_STAMP = re.compile(r"events\.out\.tfevents\.(\d+)\.")


class _EventFile(EventFileWriter):
    """An event file that readers take after all earlier ones, whatever the clock says.

    They read files in the order of the seconds in their names, and lose the steps of one that comes out of turn.
    The files of one start of the run have names that end alike.
    """

    def __init__(self, folder: Path, earlier: Iterable[str], start: str) -> None:
        stamps = [int(match[1]) for name in earlier if (match := _STAMP.search(name))]
        stamp = max(int(time.time()), *(each + 1 for each in stamps), 0)
        name = f"events.out.tfevents.{stamp:010d}.{socket.gethostname()}.{os.getpid()}.{start}"
        self._logdir, self.path = str(folder), folder / name
        self._file = open(self.path, "wb")  # noqa: SIM115  # close() closes it
        self._async_writer = _AsyncWriter(RecordWriter(self._file))
        self.add_event(Event(wall_time=time.time(), file_version="brain.Event:2"))
        self.flush()

    def close(self) -> None:
        """Flushes, and closes the file even if that fails."""
        try:
            super().close()
        finally:
            self._file.close()


class TensorBoard:
    """Writes one run's events.

    Args:
        folder: where event files go; made when missing.
        first_step: what earlier writers of a resumed run wrote from this step on is purged by readers.
        elsewhere: names of the run's event files that are in a store and not in ``folder``.

    Raises:
        OSError: from any method: events could not be written (the disk is full, say).
    """

    def __init__(self, folder: Path, first_step: int, elsewhere: Iterable[str] = ()) -> None:
        self._folder, self._start = folder, uuid4().hex[:8]
        with self._naming():
            folder.mkdir(parents=True, exist_ok=True)
            earlier = [*elsewhere, *(path.name for path in folder.iterdir())]
            self._writer = _EventFile(folder, earlier, self._start)
        # At step 0 too: a run that was lost before its first checkpoint starts there again.
        start = SessionLog(status=SessionLog.START)
        self._add(Event(wall_time=time.time(), step=first_step, session_log=start))

    @property
    def path(self) -> Path:
        """The event file that is written now."""
        return self._writer.path

    def turn(self) -> None:
        """Ends the event file, and goes on in another; readers take both as one."""
        with self._naming():
            self._writer.close()
            self._writer = _EventFile(self._folder, [self.path.name], self._start)

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Writes finite and non-finite values alike, under their names."""
        summary = Summary(value=[Summary.Value(tag=name, simple_value=value) for name, value in values.items()])
        self._add(Event(wall_time=time.time(), step=step, summary=summary))

    def video(self, step: int, name: str, frames_FCHW: Tensor, fps: int) -> None:
        """Writes a clip in [0, 1] as a looping GIF, which the images page plays."""
        scale = max(1, 128 // frames_FCHW.shape[-1])
        height, width = (side * scale for side in frames_FCHW.shape[-2:])
        image = Summary.Image(
            height=height, width=width, colorspace=3, encoded_image_string=gif_bytes(frames_FCHW, fps, scale)
        )
        summary = Summary(value=[Summary.Value(tag=name, image=image)])
        self._add(Event(wall_time=time.time(), step=step, summary=summary))

    def text(self, step: int, name: str, words: str) -> None:
        """Writes a text (Markdown)."""
        self._add(Event(wall_time=time.time(), step=step, summary=text_pb(name, words)))

    def flush(self) -> None:
        """Pushes what was written to the file."""
        with self._naming():
            self._writer.flush()

    def close(self) -> None:
        """Flushes and ends."""
        with self._naming():
            self._writer.close()

    def _add(self, event: Event) -> None:
        with self._naming():
            self._writer.add_event(event)

    @contextmanager
    def _naming(self) -> Iterator[None]:
        """Names the events in an error of the block: a thread writes them, and its errors come later."""
        try:
            yield
        except OSError as error:
            raise write_error(f"TensorBoard events in {self._folder}", error, "make room, repair the folder") from error


def average(sums: dict[str, tuple[float, float]]) -> dict[str, float]:
    """Returns the means of summed metrics over all workers; every worker must call it with the same names."""
    names = sorted(sums)
    table = torch.tensor([sums[name] for name in names], dtype=torch.float64)
    if torch.distributed.is_initialized():
        device = "cuda" if torch.distributed.get_backend() == "nccl" else "cpu"
        table = table.to(device)
        torch.distributed.all_reduce(table)
    return {
        name: (total / count if count else math.nan) for name, (total, count) in zip(names, table.tolist(), strict=True)
    }


_ROLLOUT = ("chain", "decode", "reward", "held-out")
_TRAINING = ("replay", "value", "backward", "sync")
"""Stages of a step in which a method samples, and in which it trains on what it sampled."""


def speeds(values: dict[str, float], videos: int, samples_first: bool) -> dict[str, float]:
    """Returns videos a second of a step, and of its rollout and its training where the method has these apart.

    Args:
        values: the step's means over workers, ``seconds/STAGE`` among them.
        videos: videos of the step over all workers.
        samples_first: whether the method samples without gradient and then trains on its samples.
    """
    found = {"speed/videos_per_second": videos / max(values["seconds/step"], 1e-9)}
    if samples_first:
        for name, stages in (("rollout", _ROLLOUT), ("training", _TRAINING)):
            seconds = sum(values.get(f"seconds/{stage}", 0.0) for stage in stages)
            found[f"speed/{name}_videos_per_second"] = videos / max(seconds, 1e-9)
    return found

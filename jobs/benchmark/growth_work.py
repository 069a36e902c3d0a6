"""The work of each quantity of the benchmark of growth, at one size; runs in a process of its own.

Inputs are synthesised before the clock starts. Videos have two frames of 8 x 8 pixels and networks are miniatures, so
that what is measured is the growth of everything around them.
"""

import gc
import os
import random
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from jobs.benchmark.growth_inputs import draw_rows, evaluation_of, made_up_scores, tiny_clips, write_videos
from jobs.benchmark.parts import prepare, reset_peak
from rlvid.algorithms.base import peak_memory
from rlvid.cluster.connect import start_ray
from rlvid.data.archive import read_archive
from rlvid.data.chunks import SCHEMA, ArchiveFolder, table_of
from rlvid.data.parts import merge
from rlvid.evaluate.command import write_all
from rlvid.evaluate.workers import run_evaluation
from rlvid.report.write import write_report
from rlvid.runs.checkpoints import checkpoint_name

_CPU = torch.device("cpu")
_STEPS, _BATCH = 64, 8
"""Steps that the feed of clips serves, and clips of a step."""
_VIDEOS, _CHUNK = 8, 25
"""Videos of an archived step, and steps between two checkpoints."""
_PART = 8 * 2**20
"""Bytes of a merged part of the archive, of which the largest sizes have many."""


@dataclass
class Watch:
    """Costs of the stages of one size.

    ``seconds`` are of this process's CPU, for the clock counts the work of others too; ``peak`` is the largest resident
    set in bytes, and ``rise`` its rise since the stage began.
    """

    stages: dict[str, dict[str, float]] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Measures the block: the largest resident set of this process."""
        gc.collect()
        reset_peak(_CPU)
        before, began = peak_memory(_CPU), time.process_time()
        yield
        seconds, peak = time.process_time() - began, peak_memory(_CPU)
        rise = max(peak - before, 0)  # the kernel's two counts may differ by some pages
        self.stages[name] = {"seconds": seconds, "peak": peak, "rise": rise}


def step(frames: int, size: int, watch: Watch) -> None:
    """Takes two training steps of InstructVideo on a miniature in bare torch, after one that warms up."""
    options = Namespace(
        preset="tiny", device="cpu", precision="float32", frames=frames, size=size, segments=1, sampling_steps=5,
        batch=1,
    )  # fmt: skip
    bench = prepare(options)
    bench.meter.stage = lambda name: watch_nothing()  # type: ignore[method-assign]  # its stages would reset the peak
    bench.step("rlvid", 0)
    with watch.stage("step"):
        for index in (1, 2):
            bench.step("rlvid", index)


@contextmanager
def watch_nothing() -> Iterator[None]:
    """Measures nothing."""
    yield


def clips(size: int, folder: Path, watch: Watch) -> None:
    """Serves the steps of one worker from encoded clips through Ray Data.

    Seconds of the feed are of the clock, because several processes share the work, and its memory is the largest Ray
    worker's; those of the driver are of this process.
    """
    import ray

    from jobs.benchmark.growth_feed import largest_worker, read_shares
    from rlvid.data.batches import Shares
    from rlvid.data.feed import NAME, InOrder, feed
    from rlvid.data.order import clip_indices
    from rlvid.data.training_set import TrainingSet

    place = tiny_clips(folder, size)
    os.environ["RLVID_FORK_WORKERS"] = "0"  # forks would count the pages that they share as their own memory
    start_ray("local")
    try:
        reader, began = ray.remote(num_cpus=1)(read_shares).remote, time.perf_counter()
        with watch.stage("driver"):
            positions = clip_indices(np.arange(_STEPS * _BATCH), size, 0).reshape(_STEPS, _BATCH)
            dataset = feed(Shares(TrainingSet.of(place), 1, 0, positions))
            (shards,) = InOrder().configure({NAME: dataset}, 1, None, None)
            assert ray.get(reader(shards[NAME], _STEPS)) == _STEPS * _BATCH
        watch.stages["feed"] = {"seconds": time.perf_counter() - began, "peak": largest_worker(), "rise": 0}
    finally:
        ray.shutdown()


def archive(size: int, folder: Path, watch: Watch) -> None:
    """Archives rows as a run does, chunk by chunk between checkpoints, merges small files, and reads the archive."""
    place = ArchiveFolder(str(folder), "run")
    drawn, run = np.random.default_rng(0), folder / "run"
    common = {"run": "run", "algorithm": "instructvideo", "config_hash": "0", "seed": 0, "fps": 8.0, "model": "tiny"}

    def piece(first: int, count: int) -> dict[str, Any]:
        numbers = list(range(first, first + count))
        return {
            "step": first // _VIDEOS, "rank": 0, "serial": numbers, "prompt": [f"prompt {each}" for each in numbers],
            "reward": drawn.random(count).tolist(), "held_out": [None] * count, "scores": [[0.5]] * count,
            "frame_indices": [[0]] * count, "frames": drawn.integers(0, 256, (count, 1, 4, 4, 3), np.uint8),
        }  # fmt: skip

    with watch.stage("write"):
        place.begin(0, "epoch")
        kept = list[Path]()
        for first in range(0, size, _VIDEOS * _CHUNK):
            last = min(size, first + _VIDEOS * _CHUNK)
            starts = range(first, last, _VIDEOS)
            table = table_of(common, (piece(start, min(_VIDEOS, last - start)) for start in starts))
            place.commit("epoch", [place.stage("epoch", table)])
            kept.append(run / checkpoint_name(-(-last // _VIDEOS)))
            kept[-1].mkdir()
            if len(kept) > 2:
                kept.pop(0).rmdir()
            while merge(place, _PART):
                pass
        place.end()
    with watch.stage("read"):
        found = read_archive(run / "archive", [name for name in SCHEMA.names if name != "frames"])
        assert found.num_rows == size


def evaluation(size: int, folder: Path, watch: Watch) -> None:
    """Makes and scores the videos of a miniature and its fine-tuned version, in two steps each."""
    plan = evaluation_of(folder, size)
    with watch.stage("videos"):
        assert len(run_evaluation(plan)) == plan.count


def tables(size: int, folder: Path, watch: Watch) -> None:
    """Writes the tables of an evaluation from scores: means, and bootstraps over prompts."""
    plan = evaluation_of(folder, size)
    rows = draw_rows(plan)
    with watch.stage("tables"):
        write_all(plan, rows, {})


def report(size: int, folder: Path, watch: Watch) -> None:
    """Writes the report page of an evaluation, without films."""
    plan = evaluation_of(folder, size)
    write_videos(plan)
    write_all(plan, draw_rows(plan), {})
    with watch.stage("report"):
        write_report([plan.folder], moving=0)


def sweeps(size: int, folder: Path, watch: Watch) -> None:
    """Searches as Tune lets a sweep do, with drawn scores in place of trainings, and writes the report."""
    from ray.tune.schedulers import TrialScheduler

    from tuning.journal import BASE, Journal, scores_path, write_scores
    from tuning.load import load_sweep
    from tuning.report import write_report
    from tuning.resume import keep_description
    from tuning.search import Judge, Proposals

    ranges = ["space.reward.attenuation={uniform: [0, 4]}", "space.optimizer.lr={loguniform: [1.0e-4, 1.0e-2]}"]
    given = [f"storage={folder}", "algorithm=random", f"trials={size}", *ranges]
    sweep, drawn = load_sweep("toy", given), random.Random(0)
    with watch.stage("search"):
        planned = sweep.planned()
        sweep.folder.mkdir()
        keep_description(sweep)
        journal = Journal(sweep.folder)
        write_scores(sweep.folder / BASE, made_up_scores("base", 0, drawn))
        proposals, judge = Proposals(sweep, journal, planned), Judge(sweep, journal, lambda line: None)
        while isinstance(proposal := proposals.suggest(trial_id := f"{proposals.left}"), dict):
            for rung in sweep.rungs:
                name = proposal["run"]["name"]
                scores = made_up_scores(name, rung, drawn)
                write_scores(scores_path(sweep.folder, name, rung), scores)
                result = {"trial": proposal["trial"], "step": rung, "seconds": scores["seconds"], **scores["mean"]}
                decision = judge.on_trial_result(None, Namespace(config={"trial": proposal["trial"]}), result)
                if decision == TrialScheduler.STOP:
                    break
            proposals.on_trial_complete(trial_id)
    with watch.stage("report"):
        assert write_report(sweep, journal) is not None


Work = Callable[[int, Path, Watch], None]
WORK: dict[str, Work] = {
    "frames": lambda size, folder, watch: step(size, 32, watch),
    "size": lambda size, folder, watch: step(8, size, watch),
    "clips": clips,
    "archive": archive,
    "evaluation": evaluation,
    "tables": tables,
    "report": report,
    "sweeps": sweeps,
}


def measure(name: str, size: int, folder: Path) -> dict[str, dict[str, float]]:
    """Does the work of a quantity at a size, with files in a folder; returns its stages."""
    torch.set_num_threads(1)
    watch = Watch()
    WORK[name](size, folder, watch)
    return watch.stages

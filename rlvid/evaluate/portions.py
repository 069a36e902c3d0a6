"""Evaluating a run portion by portion, in this process or on many nodes: what is finished is kept and not made again.

A portion is up to 16 prompts of one set, for one model and number of steps: the batch in which ``evaluate_model`` makes
and scores them, so that the numbers are the same however the portions are shared out. Until the tables are written, the
rows of each lie in ``.evaluation-*`` in the run's folder, a Parquet file a portion, whole or not at all.
"""

import fcntl
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from rlvid.config import RunConfig
from rlvid.data.clips import digest
from rlvid.evaluate.clip import load_clip
from rlvid.evaluate.evaluate import Row, evaluate_model
from rlvid.evaluate.run import device, load_found
from rlvid.evaluate.tables import rows_table
from rlvid.models.folders import movable
from rlvid.reward.load import held_out_reward, load_reward, trained_reward
from rlvid.train.checkpoint import Found

Progress = Callable[[int, int], None]

_BATCH = 16  # videos of a portion, and of a batch of evaluate_model
_CPUS = 0.5  # of an actor; little, so that a pool fits beside other work even on two cores


@dataclass(frozen=True)
class Portion:
    """Prompts of one set for one model and number of steps; the first of them is the ``start``-th of the set."""

    model: str
    scale: float
    set: str
    steps: int
    start: int
    prompts: tuple[str, ...]


@dataclass(frozen=True)
class Evaluation:
    """What is to be evaluated, and where its rows are kept.

    Attributes:
        config: the run's settings, with paths that hold on every node.
        checkpoint: what is evaluated, in the run's folder.
        portions: the work, in the order of the rows.
        seed: of the noise.
        clip: what measures CLIPSIM and consistency, see ``rlvid.evaluate.clip.load_clip``.
    """

    config: RunConfig
    checkpoint: Found
    portions: tuple[Portion, ...]
    seed: int
    clip: str

    @staticmethod
    def of(
        config: RunConfig,
        checkpoint: Found,
        prompts_by_set: dict[str, list[str]],
        *,
        steps_list: list[int],
        scales: dict[str, float] | None = None,
        seed: int = 0,
        clip: str = "builtin-heldout",
    ) -> "Evaluation":
        """The base and the tuned model, or the ``scales`` of what was learned by the names that tables show."""
        places = {"path": movable(config.model.path)}
        everywhere = {"model": config.model.model_copy(update=places), "reward": config.reward.resolved()}
        portions = tuple(
            Portion(name, scale, set_name, steps, start, tuple(prompts[start : start + _BATCH]))
            for name, scale in (scales or {"base": 0.0, config.method.name: 1.0}).items()
            for steps in steps_list
            for set_name, prompts in prompts_by_set.items()
            for start in range(0, len(prompts), _BATCH)
        )
        found = Found(checkpoint.folder.resolve(), checkpoint.step)
        return Evaluation(config.model_copy(update=everywhere), found, portions, seed, _everywhere(clip))

    @property
    def run(self) -> Path:
        """The run's folder."""
        return self.checkpoint.folder.parent

    @property
    def videos(self) -> int:
        """How many videos there are in all."""
        return sum(len(portion.prompts) for portion in self.portions)

    @cached_property
    def folder(self) -> Path:
        """Where the rows are kept: named after everything that they depend on."""
        state = (self.checkpoint.folder / "state.json").read_text(encoding="utf-8")
        parts = [str(portion) for portion in self.portions]
        return self.run / f".evaluation-{digest([state, self.seed, self.clip, parts])}"

    def path(self, index: int) -> Path:
        """The file of a portion's rows."""
        return self.folder / f"portion-{index:05d}.parquet"

    def missing(self) -> list[int]:
        """The portions that are not finished."""
        return [index for index in range(len(self.portions)) if not self.path(index).is_file()]

    def rows(self) -> list[Row]:
        """All rows, once no portion is missing."""
        return [row for index in range(len(self.portions)) for row in read_rows(self.path(index))]

    def forget(self) -> None:
        """Removes what was kept."""
        shutil.rmtree(self.folder, ignore_errors=True)


def run_evaluation(
    evaluation: Evaluation,
    *,
    workers: int | None = None,
    address: str | None = None,
    progress: Progress | None = None,
) -> list[Row]:
    """Makes and scores what is missing, and gives all rows.

    Args:
        evaluation: what to evaluate; ``forget`` it when the rows are where they should be.
        workers: Ray actors, each with a model of its own; default: this process, without Ray.
        address: of the Ray cluster, as for training.
        progress: called with (videos done, all videos).

    Raises:
        ValueError: another process makes the same evaluation, or the cluster is too small.
    """
    with _alone(evaluation):
        missing = evaluation.missing()
        done = evaluation.videos - sum(len(evaluation.portions[index].prompts) for index in missing)
        for videos in _in_pool(evaluation, missing, workers, address) if workers else _here(evaluation, missing):
            done += videos
            if progress is not None:
                progress(done, evaluation.videos)
        return evaluation.rows()


class Scorer:
    """Scores portions one after the other with one model, which it loads.

    Args:
        evaluation: what the portions are of.
        workers: Ray actors that share the machine's cores; default: this process has them.
    """

    def __init__(self, evaluation: Evaluation, workers: int | None = None) -> None:
        if workers:  # Ray says 1 to actors that reserve less than a core
            torch.set_num_threads(max(1, (os.cpu_count() or 1) // workers))
        self._evaluation, self._tuned = evaluation, load_found(evaluation.config, evaluation.checkpoint)
        self._scale: float | None = None  # what the model is at now
        reward = evaluation.config.reward
        self._how: dict[str, Any] = {
            "reward": trained_reward(reward, device()),
            "held_out": held_out_reward(reward, device()) or load_reward("builtin-heldout", device()),
            "clip": load_clip(evaluation.clip, device()),
            "guidance": evaluation.config.sampling.guidance,
            "final": evaluation.config.sampling.final,
            "seed": evaluation.seed,
            "use_oracle": evaluation.config.model.path == "builtin",
            "batch": _BATCH,
        }

    def score(self, index: int) -> int:
        """Makes, scores and keeps a portion; returns its number of videos."""
        portion = self._evaluation.portions[index]
        if self._scale != portion.scale:
            self._scale, self._model = portion.scale, self._tuned.use(portion.scale)
        rows = evaluate_model(
            self._model, {portion.set: list(portion.prompts)}, name=portion.model, steps_list=[portion.steps],
            first_index=portion.start, **self._how,
        )  # fmt: skip
        write_rows(self._evaluation.path(index), rows)
        return len(rows)

    def __call__(self, batch: pa.Table) -> pa.Table:
        """As Ray Data wants it: column ``index`` in, column ``videos`` out."""
        return pa.table({"videos": [self.score(index) for index in batch["index"].to_pylist()]})


def _here(evaluation: Evaluation, missing: list[int]) -> Iterator[int]:
    scorer = Scorer(evaluation) if missing else None
    for index in missing:
        assert scorer is not None
        yield scorer.score(index)


def _in_pool(evaluation: Evaluation, missing: list[int], workers: int, address: str | None) -> Iterator[int]:
    """Videos of each portion that is finished; the actors write the rows themselves, so that none is lost."""
    if not missing:
        return
    import ray

    from rlvid.train.launch import start_ray
    from rlvid.train.nodes import check_nodes

    start_ray(address)
    check_nodes(str(evaluation.run.parent), evaluation.run.name)
    have = ray.cluster_resources()
    gpus = int(have.get("GPU", 0))
    if 0 < gpus < workers:
        raise ValueError(f"--workers {workers}: each takes a GPU, and the cluster has {gpus}; allowed: at most {gpus}")
    if workers * _CPUS > have.get("CPU", 0):
        raise ValueError(
            f"--workers {workers} needs {workers * _CPUS:g} CPU cores; the cluster has {have.get('CPU', 0):g}; "
            f"allowed: at most {int(have.get('CPU', 0) / _CPUS)}"
        )
    dataset = ray.data.from_items([{"index": index} for index in missing], override_num_blocks=len(missing))
    dataset.context.enable_progress_bars = False
    scored = dataset.map_batches(
        Scorer,
        fn_constructor_args=(evaluation, workers),
        compute=ray.data.ActorPoolStrategy(size=min(workers, len(missing))),
        batch_size=1,
        batch_format="pyarrow",
        num_cpus=_CPUS,
        num_gpus=1 if gpus else 0,
    )
    for batch in scored.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
        yield sum(batch["videos"].to_pylist())


def _everywhere(clip: str) -> str:
    """``--clip`` as a process in another working folder understands it."""
    architecture, colon, file = clip.partition(":")
    return f"{architecture}:{Path(file).resolve()}" if colon else movable(clip)


def write_rows(path: Path, rows: list[Row]) -> None:
    """Keeps rows with their frames, whole or not at all."""
    frames = [None if row.frames is None else row.frames.numpy().tobytes() for row in rows]
    shapes = [None if row.frames is None else list(row.frames.shape) for row in rows]
    table = rows_table(rows).append_column("frames", pa.array(frames, pa.binary()))
    table = table.append_column("shape", pa.array(shapes, pa.list_(pa.int64())))
    part = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    pq.write_table(table, part)
    os.replace(part, path)


def read_rows(path: Path) -> list[Row]:
    """What ``write_rows`` kept."""
    numbers = {each.name for each in fields(Row) if each.type is float}
    rows = []
    for kept in pq.ParquetFile(path).read().to_pylist():
        shape, frames = kept.pop("shape"), kept.pop("frames")
        values = {name: float("nan") if value is None and name in numbers else value for name, value in kept.items()}
        picture = None if frames is None else torch.frombuffer(bytearray(frames), dtype=torch.uint8).reshape(shape)
        rows.append(Row(**values, frames=picture))
    return rows


@contextmanager
def _alone(evaluation: Evaluation) -> Iterator[None]:
    folder = evaluation.folder
    try:
        folder.mkdir(exist_ok=True)
        with open(folder / "lock", "w", encoding="utf-8") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield
    except BlockingIOError:
        raise ValueError(f"{evaluation.run}: another process makes the same evaluation; wait for its end") from None

"""Evaluates shard by shard, in this process or on many nodes; keeps finished videos and scores.

First all missing videos are made, then all missing scores, from the 8-bit frames on disk: another reward or metric
needs no new video. A shard is the batch in which videos are made and scored, so the numbers do not depend on the
distribution of the shards.
"""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import pyarrow as pa
import torch

from rlvid.cluster.connect import start_ray
from rlvid.cluster.nodes import check_nodes
from rlvid.evaluate.cache import explain_full_disk, identity_of, read_part, write_part, write_rows
from rlvid.evaluate.load import device
from rlvid.evaluate.models import Loader
from rlvid.evaluate.results.rows import Row
from rlvid.evaluate.score import make_videos
from rlvid.evaluate.work import Evaluation
from rlvid.faults import one_line
from rlvid.files import held
from rlvid.models.folders import is_text_apart
from rlvid.models.text_apart import embed_apart
from rlvid.models.text_rows import TextEmbedder

Texts = Mapping[str, TextEmbedder | bool]
"""``model.precision`` -> the embeddings of an evaluation's prompts."""
Progress = Callable[[str, int, int], None]

_CPUS = 0.5  # of an actor; little, so that a pool fits beside other work even on two cores


def run_evaluation(
    evaluation: Evaluation,
    *,
    workers: int | None = None,
    address: str | None = None,
    progress: Progress | None = None,
    tell: Callable[[str], None] = lambda line: None,
) -> list[Row]:
    """Makes missing videos and scores, and returns all rows.

    Lock the folder with ``exclusive`` until the tables are written.

    Args:
        evaluation: what to evaluate; ``mark_complete`` it then.
        workers: Ray actors, each with a model of its own; default: this process, without Ray.
        address: of the Ray cluster, as for training.
        progress: called with ("made" or "scored", videos done, videos that were missing).
        tell: called with a line on existing videos.

    Raises:
        ValueError: a file in the folder is damaged, its disk is full, or the cluster is too small.
    """
    with explain_full_disk(evaluation.folder):
        evaluation.describe(complete=False)
        evaluation.adopt_cached()
        _tell_what_is_there(evaluation, tell)
        _work(evaluation, workers, address, progress)
        return evaluation.rows()


def _work(evaluation: Evaluation, workers: int | None, address: str | None, progress: Progress | None) -> None:
    for what, work in (("made", VideoWorker), ("scored", ScoreWorker)):
        missing = evaluation.missing_videos() if work is VideoWorker else evaluation.missing_scores()
        done, total = 0, evaluation.count_of(missing)
        for videos in (
            _in_pool(work, evaluation, missing, workers, address) if workers else _here(work, evaluation, missing)
        ):
            done += videos
            if progress is not None:
                progress(what, done, total)
        evaluation.copy_duplicates()


def _tell_what_is_there(evaluation: Evaluation, tell: Callable[[str], None]) -> None:
    there, missing = evaluation.count_of(evaluation.present_videos()), evaluation.count_of(evaluation.missing_videos())
    if there:
        tell(f"{there} of {evaluation.count} videos exist already, {missing} are missing")
    others = list(evaluation.stale_dir.glob("*.parquet"))
    if others:
        size = sum(path.stat().st_size for path in others) / 2**20
        tell(
            f"{len(others)} parts with videos of other models or settings are kept in {evaluation.stale_dir} "
            f"({size:.0f} MiB); a later evaluation reuses them if it needs them; you may delete them"
        )


class Worker:
    """Processes shards one after the other.

    Args:
        evaluation: what the shards are of.
        workers: Ray actors that share the machine's cores; default: this process has them.
    """

    def __init__(self, evaluation: Evaluation, workers: int | None = None) -> None:
        if workers:  # Ray says 1 to actors that reserve less than a core
            torch.set_num_threads(max(1, (os.cpu_count() or 1) // workers))
        self.evaluation = evaluation

    def do(self, index: int) -> int:
        """Processes a shard and keeps its result; returns its number of videos."""
        raise NotImplementedError

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Processes a batch of Ray Data: column ``index`` in, column ``videos`` out.

        An error is a row like any other, ``error`` and whether it is a ``mistake`` (a ValueError): Ray would wrap it in
        traces of its own.
        """
        videos, said, mistake = 0, None, False
        try:
            with explain_full_disk(self.evaluation.folder):
                videos = sum(self.do(index) for index in batch["index"].to_pylist())
        except (ValueError, RuntimeError) as error:
            said, mistake = one_line(error), isinstance(error, ValueError)
        return pa.table({"videos": [videos], "error": pa.array([said], pa.string()), "mistake": [mistake]})


class VideoWorker(Worker):
    """Makes the videos of shards.

    Args:
        evaluation: what the shards are of.
        workers: as for ``Worker``.
        texts: embeds their prompts; default: the models' own text encoders.
    """

    def __init__(self, evaluation: Evaluation, workers: int | None = None, texts: Texts | None = None) -> None:
        super().__init__(evaluation, workers)
        self._models = Loader(texts)

    def do(self, index: int) -> int:
        """Makes and keeps the videos of a shard."""
        evaluation, shard = self.evaluation, self.evaluation.shards[index]
        noise_of = [(evaluation.seed + copy, index_in_set) for index_in_set, copy, _ in shard.video_keys]
        model = self._models.use(shard.source)
        frames_BFCHW = make_videos(model, shard, noise_of, evaluation.guidance, evaluation.final)
        write_part(evaluation.part(index), shard.labels, frames_BFCHW, evaluation.identities[index])
        return len(noise_of)


class ScoreWorker(Worker):
    """Scores the videos of shards, as they are on disk."""

    def __init__(self, evaluation: Evaluation, workers: int | None = None) -> None:
        super().__init__(evaluation, workers)
        self._scorer = evaluation.scorers.load(device())

    def do(self, index: int) -> int:
        """Scores the videos of a shard and keeps the rows."""
        shard, part = self.evaluation.shards[index], self.evaluation.part(index)
        if identity_of(part) != self.evaluation.identities[index]:
            raise ValueError(
                f"{part}: another process has put other videos there meanwhile, such as an actor that outlived an "
                "evaluation which was killed; start the same command again"
            )
        frames_BFCHW = read_part(part)
        try:
            rows = self._scorer.rows(shard, frames_BFCHW, device())
        except RuntimeError as error:
            raise RuntimeError(f"{shard.model}, {shard.set}, D = {shard.steps}: {error}") from error
        write_rows(self.evaluation.scores(index), rows)
        return len(rows)


def _here(work: type[Worker], evaluation: Evaluation, missing: list[int]) -> Iterator[int]:
    if not missing:
        return
    worker = (
        VideoWorker(evaluation, None, embed_texts(evaluation, missing)) if work is VideoWorker else work(evaluation)
    )
    for index in missing:
        yield worker.do(index)


def embed_texts(evaluation: Evaluation, indices: Sequence[int]) -> dict[str, TextEmbedder | bool]:
    """Embeds the prompts of some shards, and negative prompts; see ``rlvid.models.text_apart.embed_apart``."""
    shards = [evaluation.shards[index] for index in indices]
    runs = [model.config for model in evaluation.models]
    prompts = [*(run.sampling.negative_prompt for run in runs), *(each for shard in shards for each in shard.prompts)]
    specs = {run.model.precision: run.model for run in runs}
    return {precision: embed_apart(spec, prompts, device=device()) for precision, spec in specs.items()}


def _in_pool(
    work: type[Worker], evaluation: Evaluation, missing: list[int], workers: int, address: str | None
) -> Iterator[int]:
    """Yields the number of videos of each finished shard; the actors write the files themselves, so none is lost."""
    if not missing:
        return
    import ray

    start_ray(address)
    for folder in dict.fromkeys([evaluation.folder, *(model.run for model in evaluation.models if model.checkpoint)]):
        check_nodes(str(folder.parent), folder.name)
    have = ray.cluster_resources()
    gpus = int(have.get("GPU", 0))
    if 0 < gpus < workers:
        raise ValueError(f"--workers {workers}: each takes a GPU, and the cluster has {gpus}; allowed: at most {gpus}")
    if workers * _CPUS > have.get("CPU", 0):
        raise ValueError(
            f"--workers {workers} needs {workers * _CPUS:g} CPU cores; the cluster has {have.get('CPU', 0):g}; "
            f"allowed: at most {int(have.get('CPU', 0) / _CPUS)}"
        )
    texts = _embedded_by_a_task(evaluation, missing, gpus) if work is VideoWorker else ()
    dataset = ray.data.from_items([{"index": index} for index in missing], override_num_blocks=len(missing))
    dataset.context.enable_progress_bars = False
    done = dataset.map_batches(
        work,
        fn_constructor_args=(evaluation, workers, *texts),
        # one shard at a time: the first actor to be ready would take a second one from those that are not yet
        compute=ray.data.ActorPoolStrategy(size=min(workers, len(missing)), max_tasks_in_flight_per_actor=1),
        batch_size=1,
        batch_format="pyarrow",
        num_cpus=_CPUS,
        num_gpus=1 if gpus else 0,
    )
    for batch in done.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
        for row in batch.to_pylist():
            if row["error"] is not None:
                raise (ValueError if row["mistake"] else RuntimeError)(row["error"])
            yield row["videos"]


def _embedded_by_a_task(evaluation: Evaluation, missing: list[int], gpus: int) -> tuple[Texts, ...]:
    """Embeds prompts once for all actors, on a GPU where there is one; nothing for models that do it themselves."""
    if not is_text_apart(evaluation.models[0].config.model.path):
        return ()
    import ray

    task = ray.remote(num_cpus=_CPUS, num_gpus=1 if gpus else 0)(embed_texts)
    try:
        return (ray.get(task.remote(evaluation, missing)),)
    except ray.exceptions.RayTaskError as error:
        raise error.cause from None


@contextmanager
def exclusive(evaluation: Evaluation) -> Iterator[None]:
    """Locks the folder for this process while the block runs.

    Raises:
        ValueError: another process evaluates into the folder.
        OSError: the folder cannot be written.
    """
    folder = evaluation.folder
    folder.mkdir(parents=True, exist_ok=True)
    otherwise = f"{folder}: another process evaluates into this folder; wait for its end"
    with held(folder / ".evaluation.lock", otherwise, folder):
        yield

"""Fits a reward: reads the pairs, starts Ray Train's workers, waits for them, and judges what came of it."""

import json
import os
import shutil
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from rich.console import Console

from rlvid import __version__
from rlvid.cluster.connect import start_ray
from rlvid.cluster.nodes import check_files, check_nodes, check_workers
from rlvid.config.fit import FitConfig
from rlvid.data.clips import EncodedClips, digest
from rlvid.data.find import Skipped
from rlvid.data.training_set import Source
from rlvid.files import held, read_mapping, size_and_ends, write_atomic
from rlvid.fitting.backbone import check_backbone, preprocess_for
from rlvid.fitting.looks import LOOKS
from rlvid.fitting.pairs import Pair
from rlvid.fitting.prepare import held_out_prompts, items, read_on_ray, write_pairs
from rlvid.fitting.read import AXIS, check_enough, read_pairs, told_left_out
from rlvid.fitting.report import MADE_WITH, REPORT, FitReport, judge_scores, show_left_out, write_report
from rlvid.fitting.texts import cut_prompts, held_out_of, text_limit
from rlvid.interrupt import kept
from rlvid.models.text_limit import notices
from rlvid.storage import is_uri
from rlvid.terminal import counter, short
from rlvid.text import printable
from rlvid.train.fit import fit_again, reason, run_fit

if TYPE_CHECKING:
    from ray.train.torch import TorchTrainer

    from rlvid.fitting.worker import FitJob, Scores

_PAIRS, _PLAN, _SKIPPED = "pairs", "plan.json", "skipped.json"
_FREE = {"workers", "readers", "cpus_per_worker", "use_gpu", "checkpoint_every", "max_failures", "grace_period"}
"""Settings that the result does not depend on."""
_LEAST = 2
"""Pairs with a vote that an axis needs on either side of the split."""


@dataclass(frozen=True)
class _Asked:
    """What is fitted: the settings with absolute paths, the votes, what all of it is made with, and what to say."""

    config: FitConfig
    axes: tuple[str, ...]
    pairs: list[Pair]
    skipped: list[Skipped]
    held_out: set[str]
    made_with: dict[str, Any]
    notes: list[str]


def fit_reward(
    config: FitConfig,
    source: Path,
    out: str | Path,
    console: Console,
    address: str | None = None,
    outside: bool = False,
) -> FitReport | None:
    """Fits a reward to preference pairs, or resumes an interrupted fit.

    Args:
        config: of the fit.
        source: what ``rlvid study export`` wrote, or a manifest; see ``rlvid.fitting.read``.
        out: folder to be made; what is not finished is in ``OUT.unfinished`` beside it.
        console: for progress.
        address: of the Ray cluster.
        outside: whether a manifest may name files outside its folder.

    Returns:
        The report; None where ``out`` holds this very fit already.

    Raises:
        ValueError: bad input, before anything heavy starts.
        RuntimeError: a worker failed more often than allowed, with the worker's own error.
    """
    out, work = _place(str(out))
    asked = _ask(config, _from_root(source, "PAIRS"), outside)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        _check_same(out, asked.made_with)
        _tidy(work, asked.made_with)
        return None
    for line in asked.notes:
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    show_left_out(asked.skipped, console)
    started = time.perf_counter()
    with _unfinished(work, asked.made_with), kept(lambda: _how_far(work)):
        start_ray(address)
        use_gpu = check_workers(asked.config.workers, asked.config.cpus_per_worker, asked.config.use_gpu)
        check_nodes(str(work.parent), work.name, "--out", "choose a folder that all nodes mount (NFS, EFS, FSx)")
        check_files([each for each in [asked.config.backbone.path] if each not in (None, "random")], "backbone.path")
        skipped = _prepare(asked, work, console)
        from rlvid.fitting.worker import RESULT, FitJob

        pairs = Source.of(work / _PAIRS)
        found = _fit(FitJob(asked.config, asked.axes, pairs, work, use_gpu), console)
        scored = dict(zip(found.rows_N, found.differences_NA, strict=True))
        verdicts = judge_scores(pairs.open(), asked.axes, asked.pairs, scored)
        report = FitReport(
            asked.axes, len(pairs.open()), [*asked.skipped, *skipped], verdicts, found.mean_A, found.deviation_A,
            found.samples, asked.config.base if _named(asked) else None, time.perf_counter() - started, asked.config,
            asked.notes,
        )  # fmt: skip
        write_report(work / RESULT, report, asked.made_with)
        shutil.copytree(work / "tensorboard", work / RESULT / "tensorboard")
        if out.is_dir():
            out.rmdir()  # it is empty
        os.replace(work / RESULT, out)
        shutil.rmtree(work, ignore_errors=True)  # the reward is there, whatever else stays
    return report


def _place(out: str) -> tuple[Path, Path]:
    """Returns the folder of a reward and the one of its fit, from the root.

    Raises:
        ValueError: they cannot be made.
    """
    if is_uri(out):
        raise ValueError(f"--out {out}: a fitted reward is a folder; name one that all nodes see")
    if "\0" in out:
        raise ValueError(f"--out {printable(out)}: a name has no NUL character; name another folder")
    try:
        path = Path(out).expanduser().resolve()
        if os.path.ismount(path):
            raise ValueError(
                f"--out {out}: is a whole file system, and nothing can take its place; name a folder in it"
            )
        work = path.with_name(f"{path.name}.unfinished")
        wrong = next((each for each in (work, *path.parents) if each.exists() and not each.is_dir()), None)
    except (OSError, RuntimeError) as error:  # a name is too long, or ~ of nobody
        raise ValueError(f"--out {printable(out)}: {getattr(error, 'strerror', None) or error}; name another") from None
    if wrong is not None:
        raise ValueError(f"--out {out}: {wrong} is a file, where a folder is to be; move it, or name another folder")
    return path, work


def _from_root(path: Path, what: str) -> Path:
    """Returns a path from the root.

    Raises:
        ValueError: it begins with the home of a user who is not there.
    """
    try:
        return path.expanduser().absolute()
    except RuntimeError as error:
        raise ValueError(f"{what} {printable(str(path))}: {error} Name another file.") from None


def _tidy(work: Path, made_with: dict[str, Any]) -> None:
    """Deletes what a fit left behind that was killed when its reward was there already."""
    if (work / _PLAN).is_file() and read_mapping(work / _PLAN) == made_with:
        with held(work / ".lock", f"another process fits into {work} at this moment; wait for its end"):
            shutil.rmtree(work, ignore_errors=True)


def _named(asked: _Asked) -> bool:
    return any(asked.config.base in pair.models for pair in asked.pairs)


def _ask(config: FitConfig, source: Path, outside: bool) -> _Asked:
    """Reads the votes and checks all that can be checked before Ray starts."""
    backbone = config.backbone
    if backbone.path not in (None, "random"):
        backbone = backbone.model_copy(update={"path": str(_from_root(Path(str(backbone.path)), "backbone.path"))})
    files = check_backbone(config.backbone)
    pairs, skipped = read_pairs(source, outside=outside)
    pairs = [_absolute(pair) for pair in pairs]
    known = sorted(set().union(*(pair.axes for pair in pairs)))
    axes = config.axes or tuple(known)
    if config.kind == "image" and len(axes) > 1:
        best = AXIS if AXIS in axes else axes[0]
        raise ValueError(
            f"{source}: has votes on the axes {', '.join(axes)}, and an image reward has one; set axes=[{best}], or "
            "kind=video"
        )
    if config.kind == "video" and pairs[0].a.is_image:
        raise ValueError(f"{source}: names images, and kind = 'video' needs videos; set kind=image")
    check_enough(pairs, axes, 2 * _LEAST, source, skipped)
    asked = [pair for pair in pairs if pair.axes & {*axes}]
    prompts, limit = {pair.prompt for pair in asked}, text_limit(config.backbone)
    stand_ins = cut_prompts(config.backbone, limit, prompts) if limit else {}
    try:
        held_out = held_out_of(prompts, stand_ins, config.held_out, config.seed)
    except ValueError as error:
        raise ValueError(f"{source}: {error}{told_left_out(skipped)}") from None
    made = items(asked, axes, held_out, config.base)
    _check_split([(each["held_out"], each["votes"]) for each in made], axes, told_left_out(skipped))
    _check_base(_samples(made), config.base, told_left_out(skipped))
    paths = sorted({item[f"{side}_path"] for item in made for side in "ab"})
    found = [_content(Path(path)) for path in paths]
    settings = config.model_dump(mode="json", exclude=_FREE | {"backbone"})
    unnamed = {"path"} | ({"towers"} if backbone.towers == "both" else set())  # so that earlier fits stay the same
    settings |= {"axes": axes, "backbone": backbone.model_dump(exclude=unnamed)}
    told = [{key: value for key, value in item.items() if key != "held_out"} for item in made]
    videos = any(media.row is None and not media.is_image for pair in asked for media in (pair.a, pair.b))
    # Earlier fits cut videos to squares, and their answers on several axes had another unit.
    version = f"{__version__}, second" if videos or len(axes) > 1 else __version__
    # Earlier fits divided prompts by their whole texts.
    other = [] if held_out == held_out_prompts(prompts, config.held_out, config.seed) else [sorted(held_out)]
    made_with = {
        "rlvid": version, "settings": settings, "pairs": digest([told, found, *other]),
        "backbone": [size_and_ends(path) for path in files] or backbone.path,
    }  # fmt: skip
    config = config.model_copy(update={"backbone": backbone, "axes": axes})
    notes = notices([limit], (pair.prompt for pair in asked)) if limit else []
    return _Asked(config, axes, asked, skipped, held_out, json.loads(json.dumps(made_with)), notes)


def _content(path: Path) -> object:
    """Returns what tells a file from another; of one that cannot be read why: the readers leave its pairs out."""
    try:
        return size_and_ends(path)
    except OSError as error:
        return error.strerror


def _absolute(pair: Pair) -> Pair:
    a, b = (replace(media, path=media.path.absolute()) for media in (pair.a, pair.b))
    return replace(pair, a=a, b=b)


def _check_same(out: Path, made_with: dict[str, Any]) -> None:
    """Raises ValueError unless a folder holds the reward that would be fitted."""
    there = read_mapping(out / REPORT).get(MADE_WITH) if (out / REPORT).is_file() else None
    if there is None:
        raise ValueError(f"{out}: is there already, and is no fitted reward; name another folder")
    if there != made_with:
        raise ValueError(
            f"{out}: holds a reward that was fitted otherwise ({_changes(there, made_with)}); name another folder, or "
            "delete it"
        )


def _changes(there: Any, now: dict[str, Any]) -> str:
    """Names what differs between two fits."""
    there = there if isinstance(there, dict) else {}
    before, after = (each.get("settings") or {} for each in (there, now))
    found = [f"{key} {before.get(key)} and now {after[key]}" for key in after if before.get(key) != after[key]]
    others = {"rlvid": "another version", "backbone": "another backbone", "pairs": "other pairs"}
    return ", ".join([*found, *(words for key, words in others.items() if there.get(key) != now[key])])


@contextmanager
def _unfinished(work: Path, made_with: dict[str, Any]) -> Iterator[None]:
    """Holds the folder of a fit, and refuses to go on with another one; one that took no step is replaced."""
    new = not work.exists()
    if not new and not (work / _PLAN).is_file() and any(path.name != ".lock" for path in work.iterdir()):
        raise ValueError(f"{work}: is in the way, and is no unfinished fit; move it, or name another folder")
    try:
        work.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--out: {work} cannot be made ({error.strerror}); name a folder elsewhere") from error
    with held(work / ".lock", f"another process fits into {work} at this moment; wait for its end", work):
        there = read_mapping(work / _PLAN) if (work / _PLAN).is_file() else None
        if there is not None and there != made_with:
            if _has_steps(work) or there.keys() != made_with.keys():  # of a fit, or of something else
                raise ValueError(
                    f"{work}: holds an unfinished fit ({_changes(there, made_with)}); finish it as it was begun, "
                    "delete it, or name another folder"
                )
            (work / _SKIPPED).unlink(missing_ok=True)
            for made in filter(Path.exists, [work / _PAIRS, work / LOOKS, work / "tensorboard"]):
                shutil.rmtree(made)
        if there != made_with:  # after the deletions: a process that is killed between them begins anew
            write_atomic(work / _PLAN, json.dumps(made_with).encode())
        yield


def _has_steps(work: Path) -> bool:
    return (work / "state.pt").is_file()


def _how_far(work: Path) -> str:
    there = "its steps up to the last checkpoint are kept" if _has_steps(work) else "it has no checkpoint"
    return f"the fit is in {short(work)}, and {there}"


def _prepare(asked: _Asked, work: Path, console: Console) -> list[Skipped]:
    """Reads the videos and images with Ray Data, unless they were read before; returns what is left out.

    Raises:
        ValueError: too few pairs are left.
    """
    config, place, kept_lines = asked.config, work / _PAIRS, work / _SKIPPED
    if not (place / "meta.json").is_file() or not kept_lines.is_file():
        made = items(asked.pairs, asked.axes, asked.held_out, config.base)
        check_files([item["a_path"] for item in made[:1]], "pairs")
        preprocess = preprocess_for(config.backbone)
        console.print(f"reading {len(made)} pairs", highlight=False)
        show = counter("pairs")
        read = read_on_ray(made, config.frames, preprocess, config.readers)
        skipped = write_pairs(
            read, place, asked.axes, config.frames, preprocess.size, lambda done: show(done, len(made))
        )
        write_atomic(kept_lines, json.dumps([[str(each.path), each.reason] for each in skipped]).encode())
    skipped = [Skipped(Path(path), why) for path, why in json.loads(kept_lines.read_text(encoding="utf-8"))]
    rows, unread = EncodedClips.open(place), told_left_out(skipped, "pairs could not be read")
    _check_split(list(zip(rows.column("held_out"), rows.column("votes"), strict=True)), asked.axes, unread)
    _check_base(sum(rows.column("a_base")) + sum(rows.column("b_base")), config.base, unread)
    return skipped


def _check_split(asked: Sequence[tuple[bool, Sequence[int]]], axes: Sequence[str], left_out: str) -> None:
    """Raises ValueError where an axis has too few pairs on one side of the split.

    Args:
        asked: of each pair whether it is held out, and its number of votes on each axis.
        axes: their names.
        left_out: the end of the message.
    """
    for number, axis in enumerate(axes):
        for held_out, which in ((False, "to fit on"), (True, "to judge by")):
            count = sum(votes[number] > 0 for each, votes in asked if each == held_out)
            if count < _LEAST:
                way = "raise" if held_out else "lower"
                raise ValueError(
                    f"the axis {axis!r} has {count} pairs {which}, and {_LEAST} are needed; ask about more prompts, or "
                    f"{way} held_out{left_out}"
                )


def _samples(made: Iterable[dict[str, Any]]) -> int:
    """Returns the number of different samples of the base model; scores of one sample have no deviation."""
    places = ("path", "row", "side")
    return len({
        (item["caption"], *(item[f"{side}_{place}"] for place in places))
        for item in made for side in "ab" if item[f"{side}_base"]
    })  # fmt: skip


def _check_base(count: int, base: str, left_out: str) -> None:
    """Raises ValueError where there are too few different samples of the base model."""
    if count < _LEAST:
        raise ValueError(
            f"base = {base!r}: the pairs show {count} samples of this model, and {_LEAST} different ones set the "
            f"unit of scores; name another base, or one that no pair names, for all samples{left_out}"
        )


def _fit(job: "FitJob", console: Console) -> "Scores":
    """Runs the workers to the last step; returns the scores of worker 0."""
    import ray.train

    from rlvid.train.progress import ProgressActor, ProgressLine

    progress = ProgressActor.remote()  # type: ignore[attr-defined]
    try:
        with ProgressLine(progress, job.config.steps, console, _describe):
            fit = _trainer(job, progress).fit
            again = partial(fit_again, fit, job.config.max_failures, lambda damaged: None)
            return run_fit(again, progress, job.config.grace_period, console)["scores"]
    except (ray.train.WorkerGroupError, ray.train.ControllerError, ray.exceptions.RayActorError) as error:
        raise RuntimeError(reason(error, job.work, progress, True, "the fit")) from error


def _describe(latest: dict[str, Any]) -> str:
    return f"loss {latest['loss']:.4f}  {latest['seconds']:.2f} s/step"


def _trainer(job: "FitJob", progress: Any) -> "TorchTrainer":
    import ray.train
    from ray.train.torch import TorchTrainer

    from rlvid.fitting.job import fit_worker

    config = job.config
    environment = {
        "OMP_NUM_THREADS": str(max(1, int(config.cpus_per_worker))),
        "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    }
    return TorchTrainer(
        partial(fit_worker, job, progress),
        scaling_config=ray.train.ScalingConfig(
            num_workers=config.workers,
            use_gpu=job.use_gpu,
            resources_per_worker={"CPU": config.cpus_per_worker} | ({"GPU": 1.0} if job.use_gpu else {}),
        ),
        run_config=ray.train.RunConfig(
            name=f"start-{uuid4().hex[:8]}",  # Ray Train resumes from nothing: the workers read state.pt
            storage_path=str(job.work / "ray"),
            failure_config=ray.train.FailureConfig(
                max_failures=config.max_failures, controller_failure_limit=max(3, config.max_failures)
            ),
            worker_runtime_env={"env_vars": environment},
        ),
    )

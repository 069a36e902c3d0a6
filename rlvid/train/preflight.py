"""Prepares a run: checks its settings, makes and locks its folder, records its settings and clips.

A run's folder, ``{storage}/{name}``::

    config.yaml       the settings, as validated; with a number for a floor that is base, see rlvid.train.floor
    clips.txt         a line for each source of its clips: fingerprint and number of rows
    rewards.json      a digest of each reward's file or folder
    ceiling.json      the reward.ceiling of the run where it is a quantile, see rlvid.train.ceiling
    step-000050/ ...  checkpoints
    tensorboard/      scalars and videos
    archive/          generated samples with their rewards, Parquet, see rlvid.data.chunks
    logs/             one full log a worker
    guard.jsonl, best/, ...   with a guard, see rlvid.train.guard_folder
"""

import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import yaml
from rich.console import Console

from rlvid.config import RunConfig
from rlvid.config.model import ModelConfig
from rlvid.config.reward import RewardConfig
from rlvid.data.encode import model_fingerprint
from rlvid.data.run_prompts import check_prompts
from rlvid.data.sources import check_folder
from rlvid.data.training_set import Source, TrainingSet
from rlvid.data.video_set import check_videos, is_videos
from rlvid.diffusion.schedule import check_chain
from rlvid.files import held, read_mapping, write_atomic
from rlvid.models.folders import UNET3D, model_folder
from rlvid.models.lora import IN_ALL, check_targets
from rlvid.models.text_limit import model_text_limit, notices
from rlvid.models.video_shape import resolved_shape
from rlvid.models.weights import headers
from rlvid.reward.load import check_one, check_reward
from rlvid.reward.text_limit import reward_text_limits
from rlvid.runs.checkpoints import latest_checkpoint, read_settings
from rlvid.runs.find import run_folder
from rlvid.runs.guard_log import read_lines
from rlvid.storage import Mirror, is_uri, run_mirror
from rlvid.train.guard_folder import GuardLog, forget, guard_prompts
from rlvid.train.record import check_resume, repair_record, reward_digest
from rlvid.train.resume import notice

_MIN_FREE_BYTES = 200 * 2**20
_CAPTIONS = 10_000
"""Captions that are looked at before a start; a large set is not read whole."""


@contextmanager
def open_run(config: RunConfig, console: Console) -> Iterator[tuple[Mirror, RunConfig]]:
    """Checks a run, makes its folder, and holds it for this process while the block runs.

    Damaged checkpoints are put aside, and the settings are written. Yields the folder and the settings: these have the
    floor that a run which has begun measured.

    Raises:
        ValueError: bad input, or another process trains the run.
    """
    check(config)
    mirror = run_mirror(config.output.storage, config.name)
    config = as_begun(config)
    folder = prepare(config)
    otherwise = (
        f"run {folder.name!r} in {folder} is being trained by another process; wait for its end, or choose another "
        "name=..."
    )
    with held(folder / ".lock", otherwise, folder, folder / "guard"):
        repair(config, mirror, console)
        if not _has_begun(folder):
            forget(folder)
        elif config.guard.every:
            _check_guard(folder, config)
        record_rewards(folder, config.reward)
        write_settings(folder, config)
        mirror.push()
        yield mirror, config


def _check_guard(folder: Path, config: RunConfig) -> None:
    """Checks the guard's evaluations so far; with captions as prompts, whose they are is checked after Ray has started.

    Raises:
        ValueError: see ``GuardLog``.
    """
    if config.guard.prompts is None:
        read_lines(folder)
    else:
        GuardLog(folder, guard_prompts(config, ()), config)


def write_settings(folder: Path, config: RunConfig) -> None:
    """Writes the settings of a run into its folder."""
    text = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)
    write_atomic(folder / "config.yaml", text.encode())


def as_begun(config: RunConfig) -> RunConfig:
    """Returns the settings with the floor that the run has measured, where it has begun with ``floor: base``."""
    folder = run_folder(config)
    if not (any(part.floor for part in config.reward.mixture) and _has_begun(folder)):
        return config
    try:
        floor = read_settings(folder).reward.measured_floor
    except ValueError:  # which ``prepare`` raises, with a way out
        return config
    return config if floor is None else config.model_copy(update={"reward": config.reward.with_floor(floor)})


def _has_begun(folder: Path) -> bool:
    """Returns whether workers of a run were ready once: they make its archive. A failed start is no run yet."""
    return (folder / "archive").is_dir()


def check(config: RunConfig) -> None:
    """Checks the settings of a run before a folder is made or Ray starts.

    Raises:
        ValueError: the model's folder is not one, segments do not fit its frames, no layer has the name of an adapter's
            target, the adapter acts at no step that is learned at, the held-out reward is trained on, a reward's file
            or function is not what it should be, or the clips or prompts are not there.
    """
    _check_structure(config.model)
    frames = resolved_shape(config.model).frames
    if config.reward.segments > frames:
        raise ValueError(
            f"reward.segments = {config.reward.segments} exceeds the {frames} frames of a video; allowed: 1 to {frames}"
        )
    check_chain(config)
    if config.reward.held_out is not None and config.reward.trains_on(
        config.reward.held_out, config.reward.held_out_path
    ):
        raise ValueError(
            f"reward.held_out = {config.reward.held_out!r} is the reward that is trained on, and shows no "
            "over-optimisation; name another one, or set reward.held_out=null"
        )
    check_reward(config.reward, config.method.needs_gradient)
    for source in config.data.sources:
        if source in ("prompts", "samples"):
            check_prompts(config)
        elif is_videos(source):
            check_videos(source, config.model)
        elif source != "builtin":
            check_folder(source)
            Source.of(source, model_fingerprint(config.model))
    if config.data.encoder_gpus and not (config.method.needs_clips and any(map(is_videos, config.data.sources))):
        raise ValueError(
            f"data.encoder_gpus = {config.data.encoder_gpus:g}: this run encodes no videos on the way; leave it out"
        )
    if config.guard.every and is_uri(config.output.storage):
        raise ValueError(
            f"guard.every = {config.guard.every}: the guard reads checkpoints from a folder, and output.storage = "
            f"{config.output.storage!r} is an object store; set guard.every=0, or a folder that all nodes mount"
        )
    if config.guard.every:
        for each in config.guard_rewards:
            check_one(each.name, each.path, f"guard.rewards {each.label}")
    if config.guard.every and config.guard.prompts is not None:
        guard_prompts(config, [])


def _check_structure(model: ModelConfig) -> None:
    """Checks that a model's weights fit its structure, and that layers have the names of the adapter's targets.

    The built-in model's structure is known, and so are its layers in ``IN_ALL``. Its files alone are looked at, which
    saves seconds of imports.
    """
    built_in = model.path == "builtin"
    if built_in:
        folder = model_folder(model.path)
        for part in UNET3D.networks:
            headers(folder / part, f"model.path = {model.path!r}: {part}")
    else:
        from rlvid.models.load import check_model

        check_model(model.path)
    if model.finetune == "lora" and not (built_in and IN_ALL.issuperset(model.lora.targets)):
        from rlvid.models.load import denoiser_outline

        check_targets(denoiser_outline(model.path), model.lora.targets)


def in_a_job(folder: Path) -> bool:
    """Returns whether a folder lies where Ray puts the copy of the working directory that a job runs in."""
    return "working_dir_files" in folder.parts


def prepare(config: RunConfig) -> Path:
    """Makes the run's folder, or checks that an existing one is of the same run; writes nothing into it.

    Raises:
        ValueError: the folder cannot be written, the disk is full, or the name belongs to another config.
    """
    folder = run_folder(config)
    if in_a_job(folder):
        raise ValueError(
            f"output.storage = {config.output.storage!r} lies in the job's own folder, which the cluster deletes; give "
            "an absolute path that all nodes share, or s3://BUCKET/FOLDER or gs://BUCKET/FOLDER"
        )
    known = folder / "config.yaml"
    if known.is_file():
        try:
            before = read_settings(folder)
        except ValueError as error:
            raise ValueError(f"{error}; or choose another name=...") from None
        if _has_begun(folder):
            check_resume(folder, before, config, resumable=not is_uri(config.output.storage))
    elif folder.is_dir() and any(not _of_a_killed_start(entry) for entry in folder.iterdir()):
        raise ValueError(f"{folder} exists and is not a run of rlvid; choose another name=... or output.storage=...")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            free = shutil.disk_usage(folder).free
    except OSError as error:
        raise ValueError(
            f"output.storage = {config.output.storage!r}: {folder} cannot be written ({error.strerror}); "
            "choose a folder that you may write to"
        ) from error
    if free < _MIN_FREE_BYTES:
        raise ValueError(
            f"output.storage = {config.output.storage!r}: {free >> 20} MiB are free and a run needs at least "
            f"{_MIN_FREE_BYTES >> 20}; free some space or choose another folder"
        )
    return folder


def record_rewards(folder: Path, reward: RewardConfig) -> None:
    """Notes which files the rewards of a run have. A function's file is free: it may be mended while a run lasts.

    Raises:
        ValueError: the run has begun with other ones; the message names the first.
    """
    note, paths = folder / "rewards.json", {*(path for _, path in reward.parts), reward.held_out_path}
    now = {path: found for path in paths if path and (found := reward_digest(path))}
    before = read_mapping(note) if note.is_file() else {}
    if _has_begun(folder):
        for path in sorted(now):
            if before.get(path, now[path]) != now[path]:
                raise ValueError(
                    f"run {folder.name!r} began with another reward than {path} now is; bring it back, or choose "
                    "another name=..."
                )
    if now != before:
        write_atomic(note, json.dumps(now, indent=2, sort_keys=True).encode())


def record_clips(folder: Path, clips: TrainingSet) -> None:
    """Notes which clips a run trains on: a line for each source, with its fingerprint and its number of rows.

    A note of an earlier version is a fingerprint alone.

    Raises:
        ValueError: the run has begun with others: a source shrank, or its prompts were edited; the message names it.
    """
    note = folder / "clips.txt"
    before = [line.split() for line in note.read_text(encoding="utf-8").splitlines()] if note.is_file() else []
    if before and _has_begun(folder):
        for source, (fingerprint, *count) in zip(clips.sources, before, strict=False):
            if fingerprint != source.fingerprint or count not in ([], [str(source.count)]):
                raise ValueError(_changed(folder.name, source, fingerprint, *count))
    write_atomic(note, "".join(f"{each.fingerprint} {each.count}\n" for each in clips.sources).encode())


def _changed(run: str, source: Source, fingerprint: str, count: str = "unknown") -> str:
    others, back = f"clips than those in {source.place} now are", "them (or the prompts they were sampled from)"
    if source.open().kind == "prompts":  # and no list of videos of which the captions are read
        others, back = "prompts than data.prompts gives now", "the prompts that it began with"
    return (
        f"run {run!r} began with other {others} (then: fingerprint {fingerprint}, number {count}; now: fingerprint "
        f"{source.fingerprint}, number {source.count}); bring {back} back, or choose another name=..."
    )


def cut_captions(config: RunConfig, clips: TrainingSet) -> list[str]:
    """Returns lines on the captions, the guard's prompts and the negative prompt, where they are read in part only."""
    limits = [model_text_limit(config.model.path), *reward_text_limits(config.reward)]
    kind = "captions" if clips.count <= _CAPTIONS else f"captions of the first {_CAPTIONS:,} clips"
    captions = clips.captions(_CAPTIONS)
    own = guard_prompts(config, []) if config.guard.every and config.guard.prompts is not None else []
    return [
        *notices(limits, captions, kind),
        *notices(limits, own, "guard.prompts"),
        *notices(limits[:1], config.sampling.negative_texts(), "negative prompts"),  # which no reward reads
    ]


def _of_a_killed_start(entry: Path) -> bool:
    """Returns whether a file is one that a first start leaves when it is killed before it has written the settings."""
    return entry.name[0] == "." or entry.name.endswith(".tmp")


def repair(config: RunConfig, mirror: Mirror, console: Console, damaged: dict[str, str] | None = None) -> None:
    """Puts damaged checkpoints aside; prints their names, and what a run with another split of work keeps.

    Args:
        config: the run's.
        mirror: the run's, brought to the store's state.
        console: prints.
        damaged: name -> what is wrong, of checkpoints that workers found damaged.

    Raises:
        ValueError: the checkpoint that is left is of a split that cannot be carried over.
    """
    for line in repair_record(mirror, damaged):
        console.print(line, style="bold", markup=False, highlight=False, soft_wrap=True)
    latest = latest_checkpoint(mirror.folder, resumable=not is_uri(config.output.storage))
    if latest and (text := notice(latest[0], config, latest[1])):
        console.print(text, style="bold" if text.startswith("WARNING") else None, markup=False, soft_wrap=True)

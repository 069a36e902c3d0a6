"""Checks of a run's folder: settings, checkpoints, archive, TensorBoard and guard, by their own readers."""

import io
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pyarrow as pa
from PIL import Image, UnidentifiedImageError

from rlvid.config import RunConfig
from rlvid.data.chunks import Part, part_paths
from rlvid.data.parquet import open_parquet
from rlvid.doctor.finding import Finding, examine_each, finding
from rlvid.runs.checkpoints import checkpoint_folders, checkpoint_name, flaw, read_settings, read_state
from rlvid.runs.guard_log import best_step, find_best, read_means
from rlvid.runs.scalars import read_events
from rlvid.train.audit import compare, step_faults
from rlvid.train.record import recorded
from rlvid.train.resume import carries_over

_PUT_ASIDE = "start the same `rlvid train` again: it puts damaged ones aside and continues from the newest intact one"
_PICTURES = 50
"""Parts of the archive whose pictures are opened too, spread over all."""


def check_run(run: str | Path) -> Iterator[Finding]:
    """Checks all parts of a run, by its folder or its name under ``runs``."""
    folder = next((p for p in (Path(run), Path("runs") / run) if (p / "config.yaml").is_file()), None)
    if folder is None:
        yield Finding(
            "run", "error", f"{run} is no run: it has no config.yaml", "name a run's folder, or one under runs/"
        )
        return
    try:
        config = read_settings(folder)
    except ValueError as error:
        yield Finding("run", "error", str(error), "bring back the file with which the run began")
        return
    yield Finding(
        "run", "ok", f"{folder}: {config.method.name} on {config.reward.name!r}, fingerprint {config.fingerprint}"
    )
    parts = {
        "checkpoints": (check_checkpoints, _PUT_ASIDE),
        "archive": (check_archive, "delete the damaged part; training continues without it"),
        "tensorboard": (check_tensorboard, "delete the damaged event file; the numbers are in logs/ too"),
        "guard": (check_guard, "delete guard.jsonl; the guard then starts anew"),
    }
    yield from examine_each({name: (partial(check, folder, config), way) for name, (check, way) in parts.items()})


def check_checkpoints(folder: Path, config: RunConfig) -> Iterator[Finding]:
    """Checks that each checkpoint matches its checksums and is of this run, also with other workers or ZeRO stages."""
    found = [each.folder for each in checkpoint_folders(folder)]
    bad, foreign = dict[str, str](), list[str]()
    for path in found:
        if why := flaw(path, read=True):
            bad[path.name] = why
            continue
        try:
            carries_over(read_state(path).settings, config, has_checkpoint=False)
        except ValueError as error:
            foreign.append(f"{path.name} is of {error}")
    gone = sorted(set(recorded(folder) or []) - {path.name for path in found})
    if bad or gone:
        lines = [*(f"{name} ({why})" for name, why in bad.items()), *(f"{name} (it is missing)" for name in gone)]
        way = f"{_PUT_ASIDE} (or the run is writing it at this moment)"
        yield Finding("checkpoints", "error", f"damaged or incomplete: {', '.join(lines)}", way)
    if foreign:
        way = "bring back the config.yaml that they were made under, or move them to a folder of their own"
        yield Finding("checkpoints", "error", "; ".join(foreign), way)
    if bad or gone or foreign:
        return
    if not found:
        yield Finding("checkpoints", "warning", "none yet", "one comes every output.checkpoint_every steps")
    else:
        yield Finding("checkpoints", "ok", f"{len(found)} whole ({', '.join(path.name for path in found)})")


def check_archive(folder: Path, config: RunConfig) -> Iterator[Finding]:
    """Checks that each part can be read, pictures included; no sample is there twice, and no step is missing."""
    paths = part_paths(folder / "archive")
    if not paths:
        way = "it comes with the first checkpoint; output.archive_every=0 would switch it off"
        yield finding("archive", config.output.archive_every == 0, "no samples", way, "warning")
        return
    keys: list[tuple[int, int]] = []
    bad = []
    opened = set(paths[:: max(1, len(paths) // _PICTURES)])
    for path in paths:
        try:
            file = open_parquet(path)
            rows = file.read(columns=["step", "serial"])
            steps_of_rows = rows["step"].to_pylist()
            keys += zip(steps_of_rows, rows["serial"].to_pylist(), strict=True)
            part = Part.of(path.name)
            if part and not (part.first <= min(steps_of_rows) <= max(steps_of_rows) <= part.last):
                raise ValueError("it holds other steps than its name says")
            if path in opened:
                frames = file.read_row_group(0, columns=["frames"])["frames"]
                Image.open(io.BytesIO(frames[0].as_py()[0])).load()
        except FileNotFoundError:  # a run that goes on has merged it
            yield from check_archive(folder, config)
            return
        except (pa.ArrowException, OSError, ValueError, KeyError, IndexError, UnidentifiedImageError) as error:
            bad.append(f"{path.name} ({' '.join(str(error).split())[:80]})")
    if bad:
        way = "delete these files; other parts are whole, and a resumed run writes again what it makes again"
        yield Finding("archive", "error", f"cannot be read: {', '.join(bad[:3])}{' ...' * (len(bad) > 3)}", way)
    twice, steps = compare(keys, keys).repeated, {step for step, _ in keys}
    expected = range(0, max(steps, default=0) + 1, config.output.archive_every or 1)
    gaps = compare(expected, steps).missing if not bad else []
    if twice or gaps:
        found = f"{len(twice)} samples twice, {len(gaps)} steps missing{f' (the first: {gaps[0]})' if gaps else ''}"
        way = "two processes wrote into one run, or files were deleted or copied by hand; averages by step suffer"
        yield Finding("archive", "warning", found, way)
    elif not bad:
        yield Finding("archive", "ok", f"{len(keys):,} samples of {len(steps)} steps in {len(paths)} parts")


def check_tensorboard(folder: Path, config: RunConfig) -> Iterator[Finding]:
    """Checks that the scalars can be read, every step is there once and in order, and DDPO's first ratio is 1."""
    found = read_events(folder / "tensorboard", lambda tag: True)
    if "reward/trained" not in found:
        started = any(folder.glob("step-*")) or any((folder / "archive").glob("*.parquet"))
        way = "the event files in tensorboard/ are damaged or gone" if started else "they come with the first step"
        yield Finding("tensorboard", "error" if started else "warning", "no scalars can be read", way)
        return
    steps = [step for step, _ in found["reward/trained"]]
    fine = not step_faults(steps, max(steps) + 1)
    way = "event files were deleted, damaged or copied; the numbers are in logs/ too"
    seen = f"{len(found)} scalars of {len(steps)} steps{'' if fine else ', with gaps or repetitions'}"
    yield finding("tensorboard", fine, seen, way, "warning")
    if "policy/first_ratio_error" in found:
        worst = max(value for _, value in found["policy/first_ratio_error"])
        way = "rollout and replay disagree: set model.precision=float32"
        yield finding("first-step ratio", worst < 1e-2, f"at most {worst:.1e} from 1 in the run", way, "warning")


def check_guard(folder: Path, config: RunConfig) -> Iterator[Finding]:
    """Checks that the guard's evaluations can be read, and its best checkpoint exists."""
    steps, _ = read_means(folder)
    if not steps:
        if config.guard.every:
            yield Finding("guard", "warning", "no looks yet", f"the first comes beside step {config.guard.every}")
        return
    best = best_step(folder)
    fine = best == 0 or ((found := find_best(folder)) is not None and found.step == best)
    way = f"start training again: it is brought back while {checkpoint_name(best or 0)} exists"
    yield finding("guard", fine, f"{len(steps)} evaluations, best: step {best}", way, "warning")

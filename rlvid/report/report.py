"""Writes the report's folder: sprites, drawings, strips, moving files and the page, whole or not at all."""

import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

import numpy as np
import torch

from rlvid.evaluate.pictures import evolution
from rlvid.evaluate.strips import comparison, side_by_side, write_moving
from rlvid.report.choice import Choice, choose
from rlvid.report.curves import Drawing, along_runs, pareto, reward_curves
from rlvid.report.evidence import Case
from rlvid.report.gather import Gathered, gather
from rlvid.report.page import Shown, render
from rlvid.report.videos import check_archive, read_videos, sprite
from rlvid.report.words import shown_set, title

MARK = '<meta name="generator" content="rlvid report">'
_OURS = {"index.html", "report.css", "report.js", "videos", "pictures", "moving"}
_OF_NOBODY = {".DS_Store", "Thumbs.db", "desktop.ini"}  # what systems leave in a folder that was looked at
Frames = dict[tuple[str, Case], np.ndarray]


@dataclass(frozen=True)
class Report:
    """What was written: the folder, how many videos and bytes it has, and what the reader must know."""

    folder: Path
    videos: int
    size: int
    notes: tuple[str, ...]


def write_report(
    targets: Sequence[str | Path],
    out: str | Path | None = None,
    *,
    moving: int = 6,
    progress: Callable[[int, int], None] | None = None,
) -> Report:
    """Writes one folder of static HTML that opens from disk and asks nothing of the network.

    Args:
        targets: evaluations and runs; see ``rlvid.report.gather``.
        out: the folder; an older report there is replaced. Default: ``report`` in the first evaluation.
        moving: cases that are also written as mp4, WebP and GIF: half those that gained most, half those that lost.
        progress: called with (videos done, all videos).

    Raises:
        ValueError: what is named cannot be shown, or ``out`` holds something that is no report.
        OSError: ``out`` cannot be written, or the disk is full; what was there is as it was.
    """
    gathered = gather(targets)
    evidence = gathered.evidence
    folder = Path(out) if out is not None else evidence.folders[0] / "report"
    _check_out(folder)
    check_archive(evidence)
    choice = choose(evidence, moving, gathered.pictured)
    with _whole(folder) as part:
        for name in ("videos", "pictures", "moving"):
            (part / name).mkdir()
        shown, kept = _sprites(gathered, choice, part, progress)
        _strips(gathered, choice, kept, shown, part)
        for number, case in enumerate(choice.moving):
            films = {m.label: kept[m.name, case] for m in gathered.pictured}
            name = f"{number + 1:02d}-{_file(case.set)}-{case.steps}-{case.index + 1:03d}-{case.copy + 1}"
            stem = part / "moving" / name
            made = write_moving(stem, side_by_side(evidence.prompt(case), films), evidence.fps)
            shown.files[case] = [path.name for path in made]
        _drawings(gathered, shown, part)
        for name, text in render(gathered, choice, shown).items():
            (part / name).write_text(text, encoding="utf-8")
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    return Report(folder, len(evidence.scores), size, gathered.notes)


def _sprites(
    gathered: Gathered, choice: Choice, part: Path, progress: Callable[[int, int], None] | None
) -> tuple[Shown, Frames]:
    """Writes a sprite a video; keeps the frames of chosen cases."""
    evidence, kept, shown = gathered.evidence, {}, Shown()
    numbers = {case: number for number, case in enumerate(evidence.cases)}
    places = {model.name: place for place, model in enumerate(evidence.models)}
    for done, video in enumerate(read_videos(evidence), 1):
        data, suffix, columns = sprite(video.frames)
        name = f"{numbers[video.case]:05d}-{places[video.model]:02d}{suffix}"
        (part / "videos" / name).write_bytes(data)
        shown.sprites[video.model, video.case] = name
        shown.columns, shown.shape = columns, video.frames.shape
        if video.case in choice.all:
            kept[video.model, video.case] = video.frames
        if progress is not None:
            progress(done, len(evidence.scores))
    return shown, kept


def _strips(gathered: Gathered, choice: Choice, kept: Frames, shown: Shown, part: Path) -> None:
    evidence = gathered.evidence
    judge = evidence.judge

    def strip(name: str, cases: list[Case], heading: str) -> None:
        prompts = [evidence.prompt(case) for case in cases]
        frames = {m.label: [_tensor(kept[m.name, case]) for case in cases] for m in gathered.pictured}
        values = {m.label: [evidence.scores[m.name, case][judge] for case in cases] for m in gathered.pictured}
        comparison(part / "pictures" / name, prompts, frames, values, value_name=title(judge).lower())
        told = f"Frames of {', '.join(frames)} for the prompts: {'; '.join(prompts)}."
        shown.strips.append((name, heading, told))

    for place, (name, cases) in enumerate(choice.fixed.items(), 1):
        strip(f"comparison-{place}-{_file(name)}.png", cases, f"{shown_set(name).capitalize()}: the first prompts")
    if choice.worst:
        heading = f"What lost most in {title(judge).lower()}"
        strip("comparison-worst.png", choice.worst, heading)
    for number, line in enumerate(choice.evolutions):
        for place, (name, cases) in enumerate(choice.fixed.items(), 1):
            prompts = [evidence.prompt(case) for case in cases]
            frames = {
                step: torch.stack([_tensor(kept[model.name, case]) for case in cases]) for step, model in line.items()
            }
            file = f"evolution-{number + 1}-{place}-{_file(name)}.png"
            evolution(part / "pictures" / file, prompts, frames)
            run = Path(next(m.path for m in line.values() if m.path)).name
            heading = f"{shown_set(name).capitalize()}: along the run {run}"
            told = f"The central frame at steps {', '.join(map(str, sorted(line)))} for: {'; '.join(prompts)}."
            shown.strips.append((file, heading, told))


def _drawings(gathered: Gathered, shown: Shown, part: Path) -> None:
    evidence = gathered.evidence
    groups = gathered.groups()

    def keep(where: list, name: str, heading: str, told: str, made: Drawing | None) -> None:
        if made is not None:
            (part / "pictures" / f"{name}.svg").write_bytes(made["light"])
            (part / "pictures" / f"{name}-dark.svg").write_bytes(made["dark"])
            (part / "pictures" / f"{name}.png").write_bytes(made["png"])
            where.append((name, heading, told))

    names = ", ".join(group.label for group in groups)
    called = {model.name: gathered.called(model.name) for model in evidence.models}
    for across in ("steps", "seconds") if groups else ():
        told = f"Trained and held-out reward of {names} against {across} of training."
        heading = f"Rewards in training against {across}"
        keep(shown.curves, f"rewards-{across}", heading, told, reward_curves(groups, across))
    for steps in evidence.steps if groups else ():
        for across in ("steps", "seconds"):
            told = f"Rewards of the evaluated checkpoints of {names} against {across} of training; the numbers are in the tables."  # noqa: E501
            heading = f"Evaluation along the runs against {across}, D = {steps}"
            keep(shown.along, f"along-{across}-{steps}", heading, told, along_runs(gathered, steps, across))
    for steps in evidence.steps:
        told = f"Each model's {title(evidence.judge).lower()} against temporal consistency and motion, D = {steps}; the numbers are in the tables."  # noqa: E501
        heading = f"What the gain costs, D = {steps}"
        keep(shown.paretos, f"pareto-{steps}", heading, told, pareto(evidence, gathered.looks, called, steps))


def _tensor(frames: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(frames).permute(0, 3, 1, 2)


def _file(name: str) -> str:
    """A set's name in a file's, where it neither leaves the folder nor means anything in an address; not unique."""
    return "".join(c if c.isascii() and c.isalnum() else "-" for c in name)


def _check_out(out: Path) -> None:
    """Only a report to which nobody has added anything, or nothing, is replaced."""
    page = out / "index.html"
    ours = page.is_file() and MARK in page.read_text(encoding="utf-8", errors="replace")[:1000]
    if out.exists() and not ours and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"--out {out} exists and is no report; choose another folder, or delete it")
    added = sorted(path.name for path in out.iterdir() if path.name not in _OURS | _OF_NOBODY) if ours else []
    if added:
        raise ValueError(f"--out {out} also holds {added[0]}, which no report wrote; move it away, or choose another")


@contextmanager
def _whole(out: Path) -> Iterator[Path]:
    """A folder to write into, that takes the place of ``out`` when all went well, and else is gone."""
    part, old = (out.with_name(f".{out.name}.{uuid4().hex[:8]}") for _ in range(2))
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        part.mkdir()
        yield part
        if out.exists():
            out.replace(old)
        part.replace(out)
    except OSError as error:
        reason = error.strerror or str(error)
        raise OSError(
            f"report {out} could not be written ({reason}); make room there, or choose another --out"
        ) from error
    finally:
        if old.exists() and not out.exists():  # ended between the two
            old.replace(out)
        shutil.rmtree(part, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)

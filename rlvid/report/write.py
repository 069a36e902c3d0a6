"""Writes the report's folder atomically: sprites, drawings, strips, moving files and the page."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from rlvid.evaluate.results.about import Case, VideoKey
from rlvid.files import atomic_folder
from rlvid.metric_names import metric_of, set_title
from rlvid.plots.curves import Drawing
from rlvid.plots.frames import draw_models, draw_steps, spread, write_moving
from rlvid.report.drawings import along_runs, pareto, reward_curves
from rlvid.report.inputs import ReportInputs, read_inputs
from rlvid.report.page import PageAssets, Strip, render
from rlvid.report.select import CaseSelection, select_cases
from rlvid.report.sprites import Video, crossed_out, read_videos, sprite

MARK = '<meta name="generator" content="rlvid report">'
_OURS = {"index.html", "report.css", "report.js", "videos", "pictures", "moving"}
_OF_NOBODY = {".DS_Store", "Thumbs.db", "desktop.ini"}  # what systems leave in a folder that was looked at
Frames = dict[VideoKey, np.ndarray]


@dataclass(frozen=True)
class Report:
    """A written report: its folder, its numbers of videos and bytes, and notes for the reader."""

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
    """Writes one folder of static HTML that opens from disk and needs no network.

    Args:
        targets: evaluations and runs; see ``rlvid.report.inputs``.
        out: the folder; an older report there is replaced. Default: ``report`` in the first evaluation.
        moving: cases that are also written as mp4, WebP and GIF beside the first prompt of each set: half those that
            gained most, half those that lost; 0 for no such files at all.
        progress: called with (videos done, all videos).

    Raises:
        ValueError: what is named cannot be shown, or ``out`` holds something that is no report.
        OSError: ``out`` cannot be written, or the disk is full; what was there is as it was.
    """
    inputs = read_inputs(targets)
    evaluation = inputs.evaluation
    folder = Path(out) if out is not None else evaluation.folders[0] / "report"
    _check_out(folder)
    selection = select_cases(evaluation, moving, inputs.pictured)
    with _whole(folder) as part:
        for name in ("videos", "pictures", "moving"):
            (part / name).mkdir()
        assets, kept = _sprites(inputs, selection, part, progress)
        for number, (case, model) in enumerate(selection.moving, 1):
            films = {m.label: kept[m.name, case] for m in (*inputs.pictured, *filter(None, [model]))}
            name = f"{number:02d}-{_file(case.set)}-{case.steps}-{case.index + 1:03d}-{case.copy + 1}"
            assets.files[case] = _moving(part, name, evaluation.prompt(case), films, evaluation.about.fps)
        _strips(inputs, selection, kept, assets, part)
        _evolving(inputs, selection, kept, assets, part, moving=bool(moving))
        _drawings(inputs, assets, part)
        for name, text in render(inputs, selection, assets).items():
            (part / name).write_text(text, encoding="utf-8")
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    return Report(folder, len(evaluation.scores), size, (*inputs.notes, *assets.notes))


def _sprites(
    inputs: ReportInputs, selection: CaseSelection, part: Path, progress: Callable[[int, int], None] | None
) -> tuple[PageAssets, Frames]:
    """Writes a sprite a video; keeps the frames of chosen cases."""
    evaluation, kept, assets = inputs.evaluation, {}, PageAssets()
    numbers = {case: number for number, case in enumerate(evaluation.cases)}
    places = {model.name: place for place, model in enumerate(evaluation.models)}

    def keep(video: Video, frames: np.ndarray) -> None:
        data, suffix, assets.columns = sprite(frames)
        name = f"{numbers[video.case]:05d}-{places[video.model]:02d}{suffix}"
        (part / "videos" / name).write_bytes(data)
        assets.sprites[video.model, video.case], assets.shape = name, frames.shape
        if video.case in selection.all:
            kept[video.model, video.case] = frames
        if progress is not None:
            progress(len(assets.sprites), len(evaluation.scores))

    blank = []
    for video in read_videos(evaluation):
        if video.frames is None:
            blank.append(video)
        else:
            keep(video, video.frames)
    if not assets.sprites:
        raise ValueError(
            f"{evaluation.folders[0]}: no video has a frame whose pixels are numbers; there is nothing to show"
        )
    for video in blank:
        keep(video, crossed_out(assets.shape))
    for name, many in Counter(video.model for video in blank).items():
        label = next(m.label for m in evaluation.models if m.name == name)
        assets.notes.append(f"{label}: {many} of its videos, crossed out here, had pixels that were no numbers.")
    return assets, kept


def _moving(part: Path, name: str, prompt: str, films: dict[str, np.ndarray], fps: float) -> list[str]:
    """Writes videos side by side as mp4, WebP and GIF; returns the files' names."""
    return [path.name for path in write_moving(part / "moving" / name, prompt, films, fps)]


def _strips(inputs: ReportInputs, selection: CaseSelection, kept: Frames, assets: PageAssets, part: Path) -> None:
    evaluation, judge = inputs.evaluation, inputs.evaluation.judge

    def strip(
        name: str, heading: str, prompts: list[str], columns: dict[str, list[tuple[str, Case]]], files: list[str]
    ) -> None:
        frames = {label: [_tensor(kept[key]) for key in keys] for label, keys in columns.items()}
        values = {label: [evaluation.scores[key][judge] for key in keys] for label, keys in columns.items()}
        draw_models(part / "pictures" / name, prompts, frames, values, metric=judge)
        alt = f"Frames of {', '.join(columns)} for the prompts: {'; '.join(prompts)}."
        assets.strips.append(Strip(name, heading, alt, files))

    for place, (name, cases) in enumerate(selection.fixed.items(), 1):
        columns = {m.label: [(m.name, case) for case in cases] for m in inputs.pictured}
        heading = f"{set_title(name).capitalize()}: the first prompts"
        prompts, files = [evaluation.prompt(case) for case in cases], assets.files.get(cases[0], [])
        strip(f"comparison-{place}-{_file(name)}.png", heading, prompts, columns, files)
    if selection.worst:
        prompts = [f"{e.model.label}, D = {e.case.steps}: {evaluation.prompt(e.case)}" for e in selection.worst]
        columns = {
            evaluation.base.label: [(evaluation.base.name, each.case) for each in selection.worst],
            "what lost most": [(each.model.name, each.case) for each in selection.worst],
        }
        strip(
            "comparison-worst.png", f"What lost most in {metric_of(judge).spoken}, of all models", prompts, columns, []
        )


def _evolving(
    inputs: ReportInputs, selection: CaseSelection, kept: Frames, assets: PageAssets, part: Path, *, moving: bool
) -> None:  # fmt: skip
    """Draws the fixed prompts along each run with several checkpoints; with ``moving``, writes each set's first."""
    evaluation = inputs.evaluation
    for number, line in enumerate(selection.evolutions, 1):
        for place, (name, cases) in enumerate(selection.fixed.items(), 1):
            prompts = [evaluation.prompt(case) for case in cases]
            frames = {s: torch.stack([_tensor(kept[m.name, case]) for case in cases]) for s, m in line.items()}
            stem = f"evolution-{number}-{place}-{_file(name)}"
            draw_steps(part / "pictures" / f"{stem}.png", prompts, frames)
            run = Path(next(m.path for m in line.values() if m.path)).name
            heading = f"{set_title(name).capitalize()}: along the run {run}"
            alt = f"The central frame at steps {', '.join(map(str, sorted(line)))} for: {'; '.join(prompts)}."
            films = {f"step {step}": kept[line[step].name, cases[0]] for step in spread(sorted(line), 6)}
            files = _moving(part, stem, prompts[0], films, evaluation.about.fps) if moving else []
            assets.strips.append(Strip(f"{stem}.png", heading, alt, files))


def _drawings(inputs: ReportInputs, assets: PageAssets, part: Path) -> None:
    evaluation = inputs.evaluation
    groups = inputs.groups()

    def keep(where: list[tuple[str, str, str]], name: str, heading: str, alt: str, made: Drawing | None) -> None:
        if made is not None:
            (part / "pictures" / f"{name}.svg").write_bytes(made["light"])
            (part / "pictures" / f"{name}-dark.svg").write_bytes(made["dark"])
            (part / "pictures" / f"{name}.png").write_bytes(made["png"])
            where.append((name, heading, alt))

    names = ", ".join(group.label for group in groups)
    lines = ", ".join(g.label for g in groups if any(len(inputs.line(run)) > 1 for run in g.runs))
    called = {model.name: inputs.called(model.name) for model in evaluation.models}
    for across in ("steps", "seconds") if groups else ():
        alt = f"Trained and held-out reward of {names} against {across} of training."
        heading = f"Rewards in training against {across}"
        keep(assets.curves, f"rewards-{across}", heading, alt, reward_curves(groups, across))
    for steps in evaluation.about.steps if groups else ():
        for across in ("steps", "seconds"):
            alt = f"Rewards, motion and oracle score of evaluated checkpoints of {lines} against {across} of training; the numbers are in the tables."  # noqa: E501
            heading = f"Evaluation along the runs against {across}, D = {steps}"
            keep(assets.along, f"along-{across}-{steps}", heading, alt, along_runs(inputs, steps, across))
    for steps in evaluation.about.steps:
        alt = f"Each model's {metric_of(evaluation.judge).spoken} against temporal consistency and motion, D = {steps}; the numbers are in the tables."  # noqa: E501
        heading = f"What the gain costs, D = {steps}"
        keep(assets.paretos, f"pareto-{steps}", heading, alt, pareto(evaluation, inputs.styles, called, steps))


def _tensor(frames: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(frames).permute(0, 3, 1, 2)


def _file(name: str) -> str:
    """Returns a set's name in a form that is safe in file names and addresses; not unique."""
    return "".join(c if c.isascii() and c.isalnum() else "-" for c in name)


def _check_out(out: Path) -> None:
    """Checks that the folder is missing, empty, or a report without foreign files."""
    page = out / "index.html"
    ours = page.is_file() and MARK in page.read_text(encoding="utf-8", errors="replace")[:1000]
    if out.exists() and not ours and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"--out {out} exists and is no report; choose another folder, or delete it")
    added = sorted(path.name for path in out.iterdir() if path.name not in _OURS | _OF_NOBODY) if ours else []
    if added:
        raise ValueError(f"--out {out} also holds {added[0]}, which no report wrote; move it away, or choose another")


@contextmanager
def _whole(out: Path) -> Iterator[Path]:
    """Yields a new folder that replaces ``out`` when the block succeeds, and is deleted when it fails."""
    try:
        with atomic_folder(out) as part:
            yield part
    except OSError as error:
        reason = error.strerror or str(error)
        raise OSError(
            f"report {out} could not be written ({reason}); make room there, or choose another --out"
        ) from error

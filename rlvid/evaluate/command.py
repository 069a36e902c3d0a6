"""Writes the results of an evaluation: tables, layouts, the trade-off, and the copies in an object store."""

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from rlvid.config import RunConfig
from rlvid.config.model import BUILT_IN
from rlvid.data.prompts import ANIMAL_SETS, resolve_prompts
from rlvid.evaluate.cache import explain_full_disk
from rlvid.evaluate.models import EvaluatedModel
from rlvid.evaluate.results.pairwise import MAX_PAIRWISE_ROWS, pairwise
from rlvid.evaluate.results.rows import Row, pooled
from rlvid.evaluate.results.seeds import seed_results
from rlvid.evaluate.results.summary import summarise
from rlvid.evaluate.tables.groups import write_pairwise, write_seeds
from rlvid.evaluate.tables.pages import write_results
from rlvid.evaluate.tables.paper import write_layouts
from rlvid.evaluate.tradeoff import draw_tradeoff
from rlvid.evaluate.work import Evaluation, check_distinct
from rlvid.metric_names import REWARD_PREFIX
from rlvid.storage import Mirror, split_uri
from rlvid.world.captions import PROMPT_SETS, prompts_in_set

OPTIONAL_FILES = (
    "tradeoff.png",
    *(f"{stem}.{suffix}" for stem in ("seeds", "versus") for suffix in ("md", "csv", "tex")),
)
"""Files that only some evaluations write."""
PROMPTS_DRAWN = 48
"""Default number of prompts from a set of the built-in world."""


def default_sets(config: RunConfig) -> tuple[str, ...]:
    """Returns a run's prompt sets: those of the built-in world for its model or clips, animals for any other."""
    return tuple(PROMPT_SETS) if {*BUILT_IN} & {config.model.path, *config.data.sources} else ANIMAL_SETS


def prompts_of(
    sets: Sequence[str], videos: int | None = None, tell: Callable[[str], None] = lambda line: None
) -> dict[str, list[str]]:
    """Returns the prompts of each set by its name; a file's set has the name of the file.

    Args:
        sets: names of shipped sets, or files.
        videos: most prompts of each; default: all of a file and of the animal sets, ``PROMPTS_DRAWN`` of a
            set that is drawn.
        tell: called with a line on each set that is cut.

    Raises:
        ValueError: no such set or file, two of one name, or an empty or repeated prompt.
    """
    found: dict[str, list[str]] = {}
    for spec in map(str.strip, sets):
        name = Path(spec).stem
        if name in found:
            raise ValueError(f"--sets {','.join(sets)}: two sets have one name; rename a file, results are kept by it")
        drawn = min(videos or PROMPTS_DRAWN, prompts_in_set(spec)) if spec in PROMPT_SETS else None
        prompts = resolve_prompts(spec, drawn)
        check_distinct(spec, prompts)
        found[name] = prompts[:videos]
        if len(found[name]) < len(prompts):
            tell(f"{Path(spec).name}: the first {videos} of {len(prompts)} prompts (--videos)")
    return found


def evaluation_folder(models: Sequence[EvaluatedModel], out: Path | None) -> Path:
    """Returns an evaluation's folder: ``out``, or the folder of the only run, or ``runs/evaluation``.

    Raises:
        ValueError: the folder holds something else.
    """
    runs = {model.run for model in models}
    folder = out.expanduser() if out else (models[0].run if len(runs) == 1 else Path("runs") / "evaluation")
    known = ("evaluation.yaml", ".evaluation.lock", "config.yaml")
    if folder.is_file():
        raise ValueError(f"--out {folder}: is a file; name a folder to be made")
    if folder.is_dir() and any(folder.iterdir()) and not any((folder / name).is_file() for name in known):
        raise ValueError(f"--out {folder}: holds something that is no evaluation; name a new or an empty folder")
    return folder


def write_all(evaluation: Evaluation, rows: list[Row], groups: Mapping[str, list[str]]) -> list[Path]:
    """Writes all tables and pictures into the evaluation's folder, ``evaluation.yaml`` last.

    Args:
        evaluation: whose rows they are.
        rows: of all videos.
        groups: of ``rlvid.evaluate.results.seeds.group_seeds``; none for no table over seeds.

    Returns:
        The paths.

    Raises:
        ValueError: the disk is full.
    """
    with explain_full_disk(evaluation.folder):
        written = _write(evaluation, rows, groups)
        evaluation.mark_complete()
    return [*written, evaluation.folder / "evaluation.yaml"]


def _write(evaluation: Evaluation, rows: list[Row], groups: Mapping[str, list[str]]) -> list[Path]:
    folder, models = evaluation.folder, evaluation.models
    base, scales = models[0].name, {model.name: model.scale for model in models[1:]}
    shown = groups or {name: [name] for name in scales}
    written = write_results(folder, rows, base=base, facts=_facts(evaluation))
    written += write_layouts(folder, rows, base, shown)
    if len(scales) > 1 and len({model.checkpoint for model in models}) == 1:
        draw_tradeoff(folder / "tradeoff.png", summarise(rows), scales)
        written.append(folder / "tradeoff.png")
    if groups:
        written += write_seeds(folder, seed_results(rows, groups, base))
    if 1 < len(shown) < MAX_PAIRWISE_ROWS:
        written += write_pairwise(folder, pairwise(pooled(rows), shown, base), shown)
    for name in OPTIONAL_FILES:
        if folder / name not in written:
            (folder / name).unlink(missing_ok=True)  # of an earlier evaluation in this folder
    return written


def _facts(evaluation: Evaluation) -> dict[str, object]:
    """Returns the settings that the tables' heads show: models, seeds, rewards, hardware."""
    models, config = evaluation.models, evaluation.models[0].config
    checkpoints = list(dict.fromkeys((model.config.name, model.step) for model in models[1:]))
    if not checkpoints:
        facts: dict[str, object] = {"base model": config.model.path}
    elif len(checkpoints) == 1:
        facts = {"run": config.name, "step": models[1].step}
    else:
        facts = {model.name: f"run {model.config.name}, step {model.step}" for model in models[1:]}
    rewards = evaluation.scorers.names
    further = {
        f"reward {metric.removeprefix(REWARD_PREFIX)}": rewards[metric]
        for metric in rewards
        if metric.startswith(REWARD_PREFIX)
    }
    return facts | {
        "seed": evaluation.seed,
        "videos of a prompt": evaluation.copies,
        "guidance": evaluation.guidance,
        "reward": rewards["reward"],
        "held-out reward": rewards["held_out"] or "none (reward.held_out is null)",
        **further,
        "CLIPSIM and consistency by": evaluation.scorers.clip,
    }


class Store:
    """Copies an evaluation to the object store of its run; does nothing for a run in a folder.

    Args:
        uri: of the run, or None.
        evaluation: whose videos are fetched, as far as the store has them.
    """

    def __init__(self, uri: str | None, evaluation: Evaluation) -> None:
        self.uri, self._began = uri, time.time()
        self._mirror = Mirror(*split_uri(uri)) if uri else None
        if self._mirror is not None:
            assert self._mirror.folder == evaluation.folder
            self._mirror.pull(_is_video_file, missing=True)

    def send(self, written: Sequence[Path]) -> None:
        """Uploads videos and tables; ``evaluation.yaml`` comes last, because it marks the evaluation as complete."""
        if self._mirror is not None:
            folder, stored, tables = self._mirror.folder, self._mirror.sizes() or {}, {path.name for path in written}
            videos = {f"videos/{p.name}": p.stat() for p in (folder / "videos").glob("[!.]*") if p.is_file()}
            changed = {
                name for name, now in videos.items() if stored.get(name) != now.st_size or now.st_ctime >= self._began
            }
            unwanted = {name for name in stored if _is_video_file(name)} - videos.keys() | {*OPTIONAL_FILES} - tables
            self._mirror.push(changed)
            self._mirror.push(tables - {"evaluation.yaml"})
            self._mirror.delete(lambda name: name in unwanted)
            self._mirror.push({"evaluation.yaml"})


def _is_video_file(name: str) -> bool:
    return name.rpartition("/")[0] == "videos"

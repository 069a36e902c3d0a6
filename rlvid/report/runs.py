"""A run for the report: its settings, its scalars over steps and seconds, and the costs of a step."""

from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path

from rlvid.config import RunConfig
from rlvid.evaluate.results.seeds import but_for_seed
from rlvid.metric_names import REWARD_TAGS
from rlvid.runs.checkpoints import CheckpointRef
from rlvid.runs.find import find_run
from rlvid.runs.scalars import read_scalars

_STEP = "seconds/step"


@dataclass(frozen=True)
class Run:
    """A run: ``scalars`` maps a tag to step -> value, of the tags ``reward/*`` and ``seconds/*``."""

    folder: Path
    config: RunConfig
    checkpoint: CheckpointRef
    scalars: dict[str, dict[int, float]] = field(repr=False)

    @property
    def name(self) -> str:
        """As the run calls itself."""
        return self.config.name

    @property
    def kind(self) -> str:
        """The same for runs that differ in seed alone, which are drawn as one with a band."""
        return but_for_seed(self.config)

    @property
    def clock(self) -> dict[int, float]:
        """Seconds of training up to the end of each step."""
        steps = self.scalars.get(_STEP, {})
        return dict(zip(sorted(steps), accumulate(steps[s] for s in sorted(steps)), strict=True))

    def costs(self) -> list[tuple[str, float, float]]:
        """(stage, mean seconds a step, share of the step) of every stage, the dearest first; then what is left."""
        whole = _mean(self.scalars.get(_STEP, {}))
        stages = {
            tag.removeprefix("seconds/").replace("_", " "): _mean(values)
            for tag, values in self.scalars.items()
            if tag.startswith("seconds/") and tag != _STEP
        }
        if not whole:
            return []
        rest = whole - sum(stages.values())
        ordered = sorted(stages.items(), key=lambda each: -each[1])
        ordered += [("everything else", rest)] if rest > 0.005 * whole else []
        return [(name, seconds, seconds / max(whole, sum(stages.values()))) for name, seconds in ordered]

    @property
    def seconds(self) -> float:
        """Of a step, on average."""
        return _mean(self.scalars.get(_STEP, {}))


def read_run(folder: str | Path) -> Run:
    """Reads a run.

    Raises:
        ValueError: there is no such run, it has no checkpoint, or its event files are damaged.
    """
    config, found = find_run(folder)
    run = found.folder.parent
    return Run(run, config, found, read_scalars(run / "tensorboard", _wanted))


def _wanted(tag: str) -> bool:
    return tag in REWARD_TAGS or tag.startswith("seconds/")


def _mean(values: dict[int, float]) -> float:
    return sum(values.values()) / len(values) if values else 0.0

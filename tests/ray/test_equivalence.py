"""Equivalence of all methods on both families; `make equivalence` prints the table.

Three steps of one run come to the same weights on one worker and on two, under ZeRO 0 to 3 and in plain torch, and
resumed from a checkpoint after step 2. Without --equivalence, a few runs are compared with plain torch alone. Three of
them are not slow; InstructVideo on the U-Net under each stage, in smaller micro-batches, is in test_training.py.
"""

import itertools
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from rich.table import Table
from runs import QUIET, STEPS, Trajectory, config, difference, plain_torch, tiny_state
from worker_runs import on_workers

from rlvid.config import RunConfig
from rlvid.data.sources import training_set
from rlvid.toy.tiny_wan import save_tiny_wan

_WAN = ("model.path={folder}/tiny-wan", "model.frames=9", "model.size=16")
FAMILIES = {"unet": (), "wan": _WAN, "wan-whole": (*_WAN, "model.finetune=full")}
"""Settings of the model by what is trained: an adapter, or all weights; those of the U-Net are in test_training.py."""
METHODS = {
    "instructvideo": (), "draft": (), "draft-lv": (), "alignprop": (), "ddpo": (), "dpok": (),
    "grpo": ("method={name: grpo, window: 2, same_start: true, kl: 0.1, step_weight: inverse}", "train.group_size=4"),
    "rwr": (), "raft": (),
}  # fmt: skip
STAGES = (0, 1, 2, 3)
ALWAYS = {
    ("unet", "instructvideo"): (2,), ("unet", "draft"): (2,), ("unet", "ddpo"): (2,), ("unet", "dpok"): (2,),
    ("unet", "raft"): (2,), ("unet", "grpo"): STAGES, ("wan", "instructvideo"): (2, 3), ("wan", "ddpo"): (2,),
    ("wan", "raft"): (2,), ("wan-whole", "instructvideo"): (2, 3),
}  # fmt: skip
"""The runs without --equivalence, and their ZeRO stages."""
QUICK = (("unet", "instructvideo"), ("unet", "ddpo"), ("wan", "instructvideo"))
AT_ONCE = 30
"""Most runs of one start of the workers."""
WEIGHTS, NORMS = 1e-6, 1e-3
"""Largest differences: of weights, which move by 1e-5 a step, and of a gradient's norm as a part of it."""

Run = tuple[str, str]


def marks_of(run: Run) -> list[pytest.MarkDecorator]:
    if run in QUICK:
        return []
    return [pytest.mark.slow if run in ALWAYS else pytest.mark.equivalence]


RUNS = [
    pytest.param(run, marks=marks_of(run), id="-".join(run))
    for run in (*itertools.product(("unet", "wan"), METHODS), ("wan-whole", "instructvideo"))
]


def settings(folder: Path, run: Run, *overrides: str) -> RunConfig:
    family, method = run
    own = METHODS[method] or (f"method={method}",)
    model = [each.format(folder=folder) for each in FAMILIES[family]]
    shared = ("train.workers=2", "train.micro_batch=2", "output.archive_every=0", "optimizer.clip_norm=0")
    return config(folder, f"{family}-{method}", *model, *own, *shared, *overrides)


class Results:
    """The trajectories of all selected runs, and the differences that tests found."""

    def __init__(self, folder: Path, runs: list[Run], whole: bool) -> None:
        self.folder, self.whole, self.cells = folder, whole, dict[Run, dict[str, str]]()
        # Stage 3 last: DeepSpeed then replaces torch's linear function in the process, whose sums have other bits.
        jobs = {
            (run, at): settings(folder, run, f"train.zero_stage={at}")
            for at in STAGES
            for run in runs
            if at in self.stages(run)
        }
        self.on_two = self._trained("two", 2, jobs)
        if not whole:
            return
        alone = {(run, 2): settings(folder, run, "train.workers=1", "train.zero_stage=2") for run in runs}
        self.on_one = self._trained("one", 1, alone)
        halves = {run: folder / "halves" / "-".join(run) / f"step-{STEPS - 1:06d}" for run in runs}
        begun = {(run, 2): settings(folder, run, "train.zero_stage=2", f"train.steps={STEPS - 1}") for run in runs}
        self._trained("begun", 2, begun, ends=halves)
        self.resumed = self._trained("resumed", 2, {(run, 2): jobs[run, 2] for run in runs}, starts=halves)

    def stages(self, run: Run) -> tuple[int, ...]:
        """Returns the ZeRO stages under which two workers train a run."""
        return STAGES if self.whole else ALWAYS[run]

    def _trained(
        self, name: str, workers: int, jobs: dict[tuple[Run, int], RunConfig], **places: dict[Run, Path]
    ) -> dict[tuple[Run, int], Trajectory]:
        found, keys = dict[tuple[Run, int], Trajectory](), list(jobs)
        for start in range(0, len(keys), AT_ONCE):
            named = {f"{name}-{'-'.join(run)}-{stage}": (run, stage) for run, stage in keys[start : start + AT_ONCE]}
            of_jobs = {kind: {key: of[run] for key, (run, _) in named.items()} for kind, of in places.items()}
            done = on_workers(self.folder, workers, {key: jobs[job] for key, job in named.items()}, [], **of_jobs)
            found |= {named[key]: trajectory for key, trajectory in done.items()}
        return found

    def compare(self, run: Run, column: str, found: Trajectory, expected: Trajectory) -> None:
        """Compares two trajectories; those that resume are compared from there on."""
        moved = difference(expected[0], tiny_state(self.folder, *self._model(run)))
        apart = difference(found[0], expected[0])
        norms = max(abs(a - b) / b for a, b in zip(found[1], expected[1][-len(found[1]) :], strict=True))
        self.cells.setdefault(run, {})[column] = f"{apart / moved:.0e}  {norms:.0e}"
        assert moved > 1e-5, "nothing was learned, so equality would prove nothing"
        assert apart <= WEIGHTS, column
        assert norms <= NORMS, column

    def _model(self, run: Run) -> list[str]:
        return [each.format(folder=self.folder) for each in FAMILIES[run[0]]]

    def table(self) -> Table:
        """Returns the largest differences: of weights, as a part of the largest movement, and of gradient norms."""
        table = Table(title="largest relative differences: of weights, and of the gradient's norm")
        columns = list(dict.fromkeys(column for cells in self.cells.values() for column in cells))
        for name in ("family", "method", *columns):
            table.add_column(name)
        for run, cells in self.cells.items():
            table.add_row(*run, *(cells.get(column, "not reached") for column in columns))
        return table


@pytest.fixture(scope="module")
def results(request: pytest.FixtureRequest, folder: Path, ray_cluster: Any) -> Iterator[Results]:
    """Runs what the selected tests compare, in as few starts of workers as possible; prints the table at the end."""
    save_tiny_wan(folder / "tiny-wan")
    here = [item for item in request.session.items if item.path == request.path]
    runs = list(dict.fromkeys(item.callspec.params["run"] for item in here))  # type: ignore[attr-defined]
    whole = bool(request.config.getoption("--equivalence"))
    found = Results(folder, runs, whole)
    yield found
    if whole:
        with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
            sys.stdout.write("\n")
            Console(file=sys.stdout, width=160).print(found.table())


@pytest.mark.parametrize("run", RUNS)
def test_workers_stages_and_interruptions_change_nothing(results: Results, run: Run) -> None:
    plain = settings(results.folder, run, "train.workers=1", "train.micro_batch=4")
    expected = plain_torch(plain, training_set(plain, QUIET))
    for stage in results.stages(run):
        results.compare(run, f"ZeRO {stage}, 2 workers", results.on_two[run, stage], expected)
    if not results.whole:
        return
    results.compare(run, "1 worker, 2 workers", results.on_one[run, 2], results.on_two[run, 2])
    results.compare(run, "resumed", results.resumed[run, 2], results.on_two[run, 2])
    assert difference(results.resumed[run, 2][0], results.on_two[run, 2][0]) == 0

"""Evaluations whose models have a run, with curves, for tests of the report."""

import shutil
from pathlib import Path

import yaml
from evaluations import write_evaluation
from helpers import save_run

from rlvid.train.metrics import TensorBoard


def another(run: Path, name: str, **changes: object) -> Path:
    """A copy of a run under another name, with other settings in its config."""
    target = run.with_name(name)
    shutil.copytree(run, target)
    config = yaml.safe_load((target / "config.yaml").read_text())
    (target / "config.yaml").write_text(yaml.safe_dump(config | {"name": name} | changes))
    return target


def curves(run: Path, shift: float) -> None:
    board = TensorBoard(run / "tensorboard", 0)
    for step in range(40):
        stages = {"seconds/step": 2.0, "seconds/chain": 1.5, "seconds/decode": 0.1}
        board.scalars(step, {"reward/trained": shift + step / 40, "reward/held_out": shift + step / 80} | stages)
    board.close()


def several_seeds(tmp_path: Path) -> Path:
    """An evaluation of two seeds of one method and of another method."""
    first, _ = save_run(tmp_path)
    models = [{"name": "base", "label": "base", "kind": "base", "path": None, "step": None, "scale": 0.0}]
    for name, changes in (("iv-seed0", {}), ("iv-seed1", {"seed": 1}), ("other", {"method": {"name": "draft"}})):
        run = another(first, name, **changes)
        curves(run, len(models) / 10)
        models.append({"name": name, "label": name, "kind": "run", "path": str(run), "step": 3, "scale": 1.0})
    return write_evaluation(tmp_path / "ev", models)

"""The sweep in TensorBoard: scores against settings in the HParams tab, and scores along the rungs as scalars."""

import math

from torch.utils.tensorboard import SummaryWriter

from tuning.description import Sweep
from tuning.outcomes import Outcome, columns
from tuning.space import label


def write_hparams(sweep: Sweep, outcomes: list[Outcome]) -> None:
    """Writes ``hparams/trial-007`` for each trial that was measured, instead of what was there.

    TensorBoard shows a setting as numbers only where all its values are finite ones: JSON knows no infinity.
    """
    numeric = {
        key for key in sweep.space
        if all(isinstance(one.trial.settings[key], int | float) and math.isfinite(one.trial.settings[key])
               for one in outcomes)
    }  # fmt: skip
    for one in outcomes:
        if one.step is None:
            continue
        folder = sweep.folder / "hparams" / one.trial.name
        for old in folder.glob("events.*"):
            old.unlink()
        settings = {k: v if k in numeric else label(v) for k, v in one.trial.settings.items()}
        names = columns(sweep, [one])
        with SummaryWriter(str(folder)) as writer:  # in the order of steps, or the curves go back and forth
            for step in sorted(one.scores)[:-1]:
                for name in names:
                    writer.add_scalar(f"sweep/{name}", one.value(name, step), step)
            metrics = {f"sweep/{name}": one.value(name) for name in names}
            writer.add_hparams(settings | {"end": one.trial.end or "open"}, metrics, run_name=".", global_step=one.step)

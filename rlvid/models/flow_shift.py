"""The shift of noise levels in the scheduler of a flow model's folder."""

import inspect
import json
import math
from pathlib import Path
from typing import Any

import diffusers

from rlvid.models.weights import read_json


def scheduler_file(folder: Path) -> Path:
    """Returns the scheduler's settings in a folder in diffusers' layout."""
    return folder / "scheduler" / "scheduler_config.json"


def shift_key(settings: dict[str, Any]) -> str:
    """Returns the key of the shift that the scheduler's class reads: ``flow_shift`` (UniPC) or ``shift`` (Euler).

    For a class that diffusers does not have, it is ``flow_shift`` where the settings have that key.
    """
    of = getattr(diffusers, str(settings.get("_class_name")), None)
    known = inspect.signature(of).parameters if isinstance(of, type) else settings
    return "flow_shift" if "flow_shift" in known else "shift"


def scheduler_class(settings: dict[str, Any]) -> str:
    """Returns diffusers' class for a scheduler: the one that the settings name, or else one that reads their shift."""
    readers = {"flow_shift": "UniPCMultistepScheduler", "shift": "FlowMatchEulerDiscreteScheduler"}
    named = str(settings.get("_class_name"))
    return named if hasattr(diffusers, named) else readers[shift_key(settings)]


def scheduler_shift(folder: Path) -> float | None:
    """Returns the shift that a model's scheduler has; None where its settings name none.

    Raises:
        ValueError: the settings are missing or damaged, or their shift is no number above 0.
    """
    file = scheduler_file(folder)
    settings = read_json(file, "scheduler")
    key = shift_key(settings)
    if key not in settings:
        return None
    value = settings[key]
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise ValueError(
            f"{file}: {key} = {json.dumps(value)}; allowed: numbers above 0; correct the file, or set model.shift, "
            "such as model.shift=3"
        )
    return float(value)


def stored_shift(folder: Path) -> float:
    """Returns the shift with which diffusers samples from a model's folder: 1, no shift, where its settings name none.

    Raises:
        ValueError: as ``scheduler_shift``.
    """
    return scheduler_shift(folder) or 1.0

"""Keeps the description of a sweep in its folder, and refuses to resume it with another one."""

from pathlib import Path
from typing import Any

import yaml

from rlvid.config import RunConfig, parse_config
from rlvid.files import damaged, read_mapping, write_atomic
from rlvid.train.resume import differences
from tuning.description import Sweep
from tuning.space import VARIANT

_FREE = {"concurrent", "trials", "storage", "config"}
"""Keys that may differ when a sweep is started again; ``trials`` may grow, and of ``config`` the content counts."""


def keep_description(sweep: Sweep) -> None:
    """Makes the sweep's folder and notes what it is.

    Raises:
        ValueError: the folder holds another sweep (names what has changed), or something else.
    """
    note, rung = sweep.folder / "sweep.yaml", sweep.rungs[-1]
    base = sweep.run({}, "base", rung)
    variants = {label: sweep.run({VARIANT: label}, "base", rung) for label in sweep.variants}
    if note.is_file():
        kept = read_mapping(note)
        try:
            changed = _changes(kept, sweep, base, variants)
        except (LookupError, TypeError) as error:
            raise damaged(note, error, "choose another name=..., or delete the folder to start anew") from None
        except ValueError as error:
            raise ValueError(
                f"{note}: {' '.join(str(error).split())}; the sweep is of another version of rlvid: choose another "
                "name=..., or delete the folder to start anew"
            ) from None
        if changed:
            raise ValueError(
                f"sweep {sweep.name!r} exists in {sweep.folder} with another description ({changed}); "
                "choose another name=..., or delete the folder to start anew"
            )
        began = kept["sweep"]["trials"]
        if began and (sweep.trials or 0) < began:
            raise ValueError(f"trials = {sweep.trials}: the sweep began with {began}, and cannot have fewer")
    elif sweep.folder.is_dir() and any(entry.name != ".lock" for entry in sweep.folder.iterdir()):
        raise ValueError(f"{sweep.folder} exists and is not a sweep; choose another name=... or storage=...")
    now = {"sweep": sweep.model_dump(mode="json"), "base": base.model_dump(mode="json"), "prompts": sweep.prompts}
    now["variants"] = {label: each.model_dump(mode="json") for label, each in variants.items()}
    write_atomic(note, yaml.safe_dump(now, sort_keys=False).encode())


def _changes(kept: dict[str, Any], sweep: Sweep, base: RunConfig, variants: dict[str, RunConfig]) -> str:
    """Returns the differences that make it another sweep than the kept one.

    Paths are compared as they are written and prompts by their texts: a job's working folder lies elsewhere each time.
    """
    noted = kept["sweep"]
    before = Sweep.model_validate(noted | {"evaluation": noted["evaluation"] | {"prompts": "in_domain"}})
    free = {key: getattr(before, key) for key in _FREE}
    old = _by_name(before, noted["evaluation"]["prompts"])
    new = _by_name(sweep.model_copy(update=free), sweep.evaluation.prompts)
    changed = differences(old, new) or _of_run(kept["base"], base)
    for label, now in variants.items():
        changed = changed or _of_run(kept["variants"][label], now)
    if not changed and list(before.space) != list(sweep.space):
        changed = f"the order of space: {', '.join(before.space)} -> {', '.join(sweep.space)}"
    if not changed and kept["prompts"] != sweep.prompts:
        here, there = next((a, b) for a, b in zip(kept["prompts"], sweep.prompts, strict=True) if a != b)
        changed = f"a text of evaluation.prompts: {here!r} -> {there!r}"
    return changed


def _of_run(kept: dict[str, Any], now: RunConfig) -> str:
    before = parse_config(kept)
    return differences(before, now.model_copy(update={"output": before.output}))


def _by_name(sweep: Sweep, prompts: str) -> Sweep:
    return sweep.model_copy(update={"evaluation": sweep.evaluation.model_copy(update={"prompts": Path(prompts).name})})

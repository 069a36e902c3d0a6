"""Reads the description of a sweep: a YAML file and ``key=value`` overrides."""

from pathlib import Path
from typing import Any

from pydantic import ValidationError

from rlvid.config import RunConfig
from rlvid.config.parse import explain, read_named, split_override
from rlvid.credentials import refuse_credentials, refuse_credentials_in_arguments
from rlvid.data.prompts import has_prompts
from tuning.description import Sweep, yaml_text


def shipped_sweeps() -> dict[str, Path]:
    """Sweeps beside this file, by name."""
    return {path.stem: path for path in sorted(Path(__file__).parent.glob("*.yaml"))}


def load_sweep(source: str, overrides: list[str] | None = None) -> Sweep:
    """Reads a sweep's description.

    Args:
        source: name of a shipped sweep, or path of a YAML file.
        overrides: ``key=value`` strings: keys of the sweep (``trials=12``, ``space.method.tau=[0.4, 0.6]``), or of
            the run (``train.batch_size=4``, the same as ``settings.train.batch_size=4``).

    Raises:
        ValueError: in one line: the file or key, the value, what is allowed.
    """
    path, data = read_named("sweep", source, shipped_sweeps(), "name, config, space, rungs, ...")
    evaluation = data.get("evaluation")
    if isinstance(evaluation, dict) and has_prompts(beside := path.parent / str(evaluation.get("prompts"))):
        data["evaluation"] = evaluation | {"prompts": str(beside)}
    refuse_credentials_in_arguments(overrides or [])
    for override in overrides or []:
        _override(data, override)
    refuse_credentials(data, "")
    try:
        return Sweep.model_validate(data)
    except ValidationError as error:
        raise ValueError(f"sweep {source}: " + "; ".join(explain(each, Sweep, {}) for each in error.errors())) from None


def split_source(arguments: list[str]) -> tuple[str, list[str]]:
    """Returns the source and the overrides among arguments of the command; without a source it is the sweep ``toy``."""
    named = bool(arguments) and "=" not in arguments[0]
    return (arguments[0], arguments[1:]) if named else ("toy", arguments)


def _override(data: dict[str, Any], text: str) -> None:
    key, parsed = split_override(text, "key=value, such as trials=12 or train.batch_size=4")
    section, _, rest = key.partition(".")
    if section in RunConfig.model_fields and key not in Sweep.model_fields:
        section, rest = "settings", key
    if section in ("space", "settings", "evaluation") and rest:
        if not isinstance(data.get(section), dict | None):
            raise ValueError(
                f"override {text!r}: {section} = {data[section]!r} has no keys; write it as a mapping, such as "
                f"{section}: {{{rest}: {yaml_text(parsed)}}}"
            )
        data[section] = {**(data.get(section) or {}), rest: parsed}
        _fix_or_vary(data, section, [rest])
    elif key in Sweep.model_fields:
        data[key] = parsed
        _fix_or_vary(data, key, list(parsed) if isinstance(parsed, dict) else [])
    else:
        allowed = ", ".join((*Sweep.model_fields, *(k for k in RunConfig.model_fields if k not in Sweep.model_fields)))
        raise ValueError(f"override {text!r}: {section!r} is a key neither of a sweep nor of a run; allowed: {allowed}")


def _fix_or_vary(data: dict[str, Any], section: str, keys: list[str]) -> None:
    """Removes keys from the other of settings and space: the last override decides whether a key varies."""
    other = {"space": "settings", "settings": "space"}.get(section, "")
    if isinstance(data.get(other), dict):
        data[other] = {key: value for key, value in data[other].items() if key not in keys}

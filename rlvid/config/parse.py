"""Reads descriptions: YAML files, ``key=value`` overrides, and errors of validation as one line each."""

from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from types import NoneType
from typing import Any, get_args

import yaml

from rlvid.config.methods import METHODS
from rlvid.files import read_yaml


def read_named(what: str, source: str, shipped: Mapping[str, Path], keys: str) -> tuple[Path, dict[str, Any]]:
    """Reads a description by the name of a shipped one, or by its path.

    Args:
        what: kind of description, for messages.
        source: the name or path.
        shipped: paths by name.
        keys: some keys of the mapping that the file must hold, for messages.

    Raises:
        ValueError: in one line: there is no such file, or it is no YAML mapping.
    """
    path = shipped.get(source, Path(source))
    if not path.is_file():
        raise ValueError(
            f"{what} {source!r} is neither a file nor a shipped description; shipped: {', '.join(shipped)}"
        )
    try:
        data = read_yaml(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{what} {path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(data, dict):
        raise ValueError(f"{what} {path} must be a mapping of {keys}")
    return path, data


def split_override(text: str, form: str) -> tuple[str, Any]:
    """Splits ``key=value`` into the key and the value, which is YAML; ``form`` says in messages how to write it.

    Raises:
        ValueError: there is no key, or the value is not YAML.
    """
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise ValueError(f"override {text!r} must have the form {form}")
    try:
        return key, read_yaml(value)
    except yaml.YAMLError as error:
        raise ValueError(f"override {text!r}: the value is not valid YAML") from error


def apply_override(data: dict[str, Any], text: str, form: str) -> None:
    """Sets the key of ``section.key=value`` in a description; see ``split_override``.

    Raises:
        ValueError: as ``split_override``; or a section of the key is a value.
    """
    key, value = split_override(text, form)
    *parents, last = key.split(".")
    here = data
    for parent in parents:
        inner = here.get(parent, {})
        if not isinstance(inner, dict | str | None):
            raise ValueError(f"override {text!r}: {parent} is a value and has no keys of its own")
        here[parent] = {"name": inner} if isinstance(inner, str) else dict(inner or {})
        here = here[parent]
    here[last] = value


def explain(error: Any, top: Any, former: Mapping[str, str]) -> str:
    """Describes the error of a key in one line.

    Args:
        error: one of pydantic's ``ValidationError.errors()``.
        top: the class that was validated.
        former: keys that are gone, and what to do about each.
    """
    where = ".".join(str(part) for part in error["loc"] if part not in METHODS)
    if error["type"] == "union_tag_invalid":
        return f"{where}.name = {error['ctx']['tag']!r} is not a method; allowed: {', '.join(METHODS)}"
    if error["type"] == "missing":
        *above, key = error["loc"]
        return f"{where} is missing: {_section(top, above).model_fields[key].description}"
    if error["type"] == "extra_forbidden":
        if where in former:
            return f"the key {where} {former[where]}"
        *above, key = error["loc"]
        keys = _section(top, above).model_fields
        guess = "".join(f"; do you mean {near}?" for near in get_close_matches(str(key), keys, 1))
        return f"unknown key {where}; allowed here: {', '.join(keys)}{guess}"
    if error["type"] == "model_type":
        keys = _section(top, error["loc"]).model_fields
        return f"{where} = {error['input']!r}: expected a section with keys of its own; allowed: {', '.join(keys)}"
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "value_error" and isinstance(error["input"], dict) and where:
        return f"{where}: {message}"
    return f"{where} = {error['input']!r}: {message[0].lower()}{message[1:]}" if where else message


def _section(section: Any, place: Sequence[str | int]) -> Any:
    """Returns the section that an error's place leads to."""
    for part in place:
        section = METHODS[part] if part in METHODS else _inner(section, part)
    return section


def _inner(section: Any, part: str | int) -> Any:
    """Returns the section that a key, or a place in a list of sections, leads to."""
    if isinstance(part, int):
        return get_args(section)[0]
    found = section.model_fields[part].annotation
    return next(each for each in get_args(found) if each is not NoneType) if NoneType in get_args(found) else found

"""Every key of a run, or of a fit, from the code's descriptions: tables for the docs, and a search."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from rlvid.config import RunConfig
from rlvid.config.fit import FitConfig
from rlvid.config.methods import METHODS

_HEAD = "| Key | Allowed | Default | What |\n|---|---|---|---|\n"
_METHOD = "which method; `method: ddpo` alone is short for it. Each has keys of its own, below"
_BOUNDS = (("minimum", "≥"), ("exclusiveMinimum", ">"), ("maximum", "≤"), ("exclusiveMaximum", "<"))
_KINDS = {"integer": "whole number", "number": "number", "string": "text", "boolean": "true, false"}


@dataclass(frozen=True)
class Key:
    """A key: its path, values (in backticks where they are literal), default and meaning."""

    path: str
    allowed: str
    default: str | None
    what: str

    def row(self) -> str:
        """Returns a row of a Markdown table."""
        default = f"`{self.default}`" if self.default is not None else "none: it must be given"
        return f"| `{self.path}` | {self.allowed} | {default} | {_escape(self.what)} |"


@dataclass(frozen=True)
class Section:
    """Keys under one title, in Markdown; ``method`` is the one that they belong to."""

    title: str
    about: str
    keys: list[Key]
    method: str | None = None

    def markdown(self) -> str:
        """Returns a heading and a table."""
        heading = f"{'###' if self.method else '##'} {self.title}"
        return f"{heading}\n\n{self.about}\n\n{_HEAD}" + "\n".join(key.row() for key in self.keys) + "\n"


def reference() -> str:
    """Returns the reference: a heading and a table for each section of a run, and one for the keys of each method."""
    return "\n".join(section.markdown() for section in sections())


def find_keys(words: str) -> dict[Key, list[str]]:
    """Returns the keys of a run that mention all words, and for keys of methods the methods that were found.

    A key mentions its path, meaning, values and method.
    """
    wanted, found = words.lower().split(), dict[Key, list[str]]()
    for section in sections():
        for key in section.keys:
            if all(word in f"{key.path} {key.what} {key.allowed} {section.title}".lower() for word in wanted):
                methods = found.setdefault(key, [])
                if section.method:
                    methods.append(section.method)
    return found


def sections() -> list[Section]:
    """Returns the sections of a run's description, and after ``method`` one for each method."""
    schema = RunConfig.model_json_schema()
    defs = schema["$defs"]
    whole = {name: field for name, field in schema["properties"].items() if "$ref" not in field and name != "method"}
    found = [Section("The run", schema["description"], list(_keys("", whole, defs)))]
    for name, field in schema["properties"].items():
        if name == "method":
            found += _methods(field, defs)
        elif "$ref" in field:
            section = _resolve(field, defs)
            found.append(Section(f"`{name}`", section["description"], list(_keys(f"{name}.", section, defs))))
    return found


def fit_reference() -> str:
    """Returns the table of the keys of a fit (``rlvid reward fit``)."""
    schema = FitConfig.model_json_schema()
    return _HEAD + "\n".join(key.row() for key in _keys("", schema, schema["$defs"])) + "\n"


def _methods(field: dict[str, Any], defs: dict[str, Any]) -> Iterator[Section]:
    names = ", ".join(f"`{name}`" for name in METHODS)
    which = Key("method.name", names, field["default"]["name"], _METHOD)
    yield Section("`method`", "What is done with the reward.", [which])
    for name, ref in zip(METHODS, field["oneOf"], strict=True):
        section = _resolve(ref, defs)
        properties = {key: value for key, value in section["properties"].items() if key != "name"}
        keys = list(_keys("method.", properties, defs))
        yield Section(f"`method: {name}`", section["description"], keys, method=name)


def _keys(prefix: str, section: dict[str, Any], defs: dict[str, Any]) -> Iterator[Key]:
    """Yields the keys; sections within the section, and the parts of a list, follow the key that holds them."""
    for name, field in section.get("properties", section).items():
        path = f"{prefix}{name}"
        if "$ref" in field:
            yield from _keys(f"{path}.", _resolve(field, defs), defs)
            continue
        default = _value(field["default"]) if "default" in field else None
        yield Key(path, _allowed(field, defs), default, field["description"])
        if "$ref" in field.get("items", {}):
            yield from _keys(f"{path}[].", _resolve(field["items"], defs), defs)
        for each in field.get("anyOf", []):
            if "$ref" in each:
                yield from _keys(f"{path}.", _resolve(each, defs), defs)


def _allowed(field: dict[str, Any], defs: dict[str, Any]) -> str:
    if "anyOf" in field:
        return ", or ".join(_allowed(each, defs) for each in field["anyOf"])
    if "$ref" in field:
        return "keys, see below"
    if "const" in field:
        return f"`{_value(field['const'])}`"
    if "enum" in field:
        return ", ".join(f"`{_value(each)}`" for each in field["enum"])
    if field["type"] == "null":
        return "`null`"
    if field["type"] == "array":
        inner = field.get("prefixItems") or [field["items"]]
        kind = "parts, see below" if "$ref" in inner[0] else _allowed(inner[0], defs)
        return f"{len(inner)} of: {kind}" if "prefixItems" in field else f"list of {kind}"
    bounds = [f"{sign} {field[key]:,}" for key, sign in _BOUNDS if key in field]
    shown = " ".join([_KINDS[field["type"]], ", ".join(bounds)]).strip()
    return f"{shown}, `{_escape(field['pattern'])}`" if "pattern" in field else shown


def _resolve(field: dict[str, Any], defs: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = defs[field["$ref"].rpartition("/")[2]]
    return found


def _value(value: Any) -> str:
    """Writes a value as YAML."""
    return value if isinstance(value, str) else json.dumps(value)


def _escape(text: str) -> str:
    """Escapes the characters that would end a table's cell or be markup."""
    return text.replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*")

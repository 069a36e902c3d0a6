"""The references of the docs: every key of a run, or of a fit, in Markdown tables, from the code's descriptions."""

import json
from collections.abc import Iterator
from typing import Any

from rlvid.config import RunConfig
from rlvid.config.fit import FitConfig
from rlvid.config.methods import METHODS

_HEAD = "| Key | Allowed | Default | What |\n|---|---|---|---|\n"
_METHOD = "which method; `method: ddpo` alone is short for it. Each has keys of its own, below"
_BOUNDS = (("minimum", "≥"), ("exclusiveMinimum", ">"), ("maximum", "≤"), ("exclusiveMaximum", "<"))
_KINDS = {"integer": "whole number", "number": "number", "string": "text", "boolean": "true, false"}


def reference() -> str:
    """Returns the reference: a heading and a table for each section of a run, and one for the keys of each method."""
    schema = RunConfig.model_json_schema()
    defs, parts = schema["$defs"], []
    whole = {name: field for name, field in schema["properties"].items() if "$ref" not in field and name != "method"}
    parts.append(_table("The run", schema["description"], list(_rows("", whole, defs))))
    for name, field in schema["properties"].items():
        if name == "method":
            parts.append(_methods(field, defs))
        elif "$ref" in field:
            section = _resolve(field, defs)
            parts.append(_table(f"`{name}`", section["description"], list(_rows(f"{name}.", section, defs))))
    return "\n".join(parts)


def fit_reference() -> str:
    """Returns the table of the keys of a fit (``rlvid reward fit``)."""
    schema = FitConfig.model_json_schema()
    return _HEAD + "\n".join(_rows("", schema, schema["$defs"])) + "\n"


def _methods(field: dict[str, Any], defs: dict[str, Any]) -> str:
    names = ", ".join(f"`{name}`" for name in METHODS)
    row = f"| `method.name` | {names} | `{field['default']['name']}` | {_METHOD} |"
    parts = [_table("`method`", "What is done with the reward.", [row])]
    for name, ref in zip(METHODS, field["oneOf"], strict=True):
        section = _resolve(ref, defs)
        properties = {key: value for key, value in section["properties"].items() if key != "name"}
        rows = list(_rows("method.", properties, defs))
        parts.append(_table(f"`method: {name}`", section["description"], rows, level=3))
    return "\n".join(parts)


def _table(title: str, about: str, rows: list[str], level: int = 2) -> str:
    return f"{'#' * level} {title}\n\n{about}\n\n{_HEAD}" + "\n".join(rows) + "\n"


def _rows(prefix: str, section: dict[str, Any], defs: dict[str, Any]) -> Iterator[str]:
    """Yields a row a key; sections within the section, and the parts of a list, follow the key that holds them."""
    for name, field in section.get("properties", section).items():
        path = f"{prefix}{name}"
        if "$ref" in field:
            yield from _rows(f"{path}.", _resolve(field, defs), defs)
            continue
        default = f"`{_value(field['default'])}`" if "default" in field else "none: it must be given"
        yield f"| `{path}` | {_allowed(field, defs)} | {default} | {_escape(field['description'])} |"
        if "$ref" in field.get("items", {}):
            yield from _rows(f"{path}[].", _resolve(field["items"], defs), defs)
        for each in field.get("anyOf", []):
            if "$ref" in each:
                yield from _rows(f"{path}.", _resolve(each, defs), defs)


def _allowed(field: dict[str, Any], defs: dict[str, Any]) -> str:
    if "anyOf" in field:
        return ", or ".join(_allowed(each, defs) for each in field["anyOf"])
    if "$ref" in field:
        return "keys, see below"
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

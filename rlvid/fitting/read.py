"""Reads preference pairs from what ``rlvid study export`` writes, or from a manifest, and pools the votes on a pair.

A manifest is a table (CSV, TSV, JSON lines or Parquet) with a row for each vote: ``prompt``, the files ``a`` and ``b``
(videos or images, relative to the manifest), ``preference`` (1 for ``a``, 0 for ``b``, 0.5 for a tie, or between), and
where it has them ``axis`` (all rows or none, which is "quality"), ``annotator``, ``kind``, by which accuracy is
reported, and ``a_model`` and ``b_model``, the names of the models that made them.

A vote that cannot be used is left out and named; the others count.
"""

import math
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from rlvid.data.find import EXTENSIONS, Skipped, check_file
from rlvid.data.images import IMAGES
from rlvid.data.pairs import PAIRS
from rlvid.data.parquet import open_parquet
from rlvid.data.prompts import check_prompt
from rlvid.data.tables import TABLES, Row, read_rows, table_files
from rlvid.files import stand_in
from rlvid.fitting.pairs import Answer, Media, Pair, Vote, pool
from rlvid.text import clean, is_blank, printable

AXIS = "quality"
"""The axis of votes where none names one."""
_COLUMNS, _OPTIONAL = ("prompt", "a", "b", "preference"), ("axis", "annotator", "kind", "a_model", "b_model")
_LIGHT = [name for name in PAIRS.names if name not in ("a", "b", "fps")]


def read_pairs(source: str | Path, *, outside: bool = False) -> tuple[list[Pair], list[Skipped]]:
    """Returns the pairs in the order of their first votes, and all votes and pairs that are left out.

    Args:
        source: what ``rlvid study export`` wrote, a folder ``NAME.parquet`` of several such files, or a manifest.
        outside: whether a manifest may name files outside its folder.

    Raises:
        ValueError: the file is missing or damaged, lacks a column or has one of another type, or no vote can be used.
    """
    path = Path(source)
    skipped: list[Skipped] = []
    files = table_files(path)
    if any(map(_is_export, files)):
        named = any(map(_names_axes, files))
        answers: Iterable[Answer] = chain.from_iterable(_from_export(file, named, skipped) for file in files)
    else:
        answers = _from_manifest(path, outside, skipped)
    pairs = list(pool(answers, path, skipped))
    if not pairs:
        reason = f"; the first reason: {skipped[0]}" if skipped else ""
        raise ValueError(f"{path}: has no preference pair that can be used{reason}")
    return pairs, skipped


def told_left_out(skipped: Sequence[Skipped], what: str = "votes were left out") -> str:
    """Returns the end of a message: how many were left out, and why the first; nothing where none was."""
    return f"; {len(skipped)} {what}, the first: {skipped[0]}" if skipped else ""


def check_enough(
    pairs: Iterable[Pair], axes: Iterable[str], least: int, where: str | Path, skipped: Sequence[Skipped] = ()
) -> None:
    """Raises ValueError where an axis has fewer than ``least`` pairs with a vote; ``skipped`` were left out."""
    asked = [pair.axes for pair in pairs]
    for axis in axes:
        count = sum(axis in each for each in asked)
        if count < least:
            known = ", ".join(sorted(set().union(*asked)))
            raise ValueError(
                f"{where}: the axis {axis!r} has {count} pairs with a vote, and {least} are needed (axes: {known}); "
                f"ask more, or leave the axis out{told_left_out(skipped)}"
            )


def _is_export(path: Path) -> bool:
    if path.suffix.lower() != ".parquet":
        return False
    try:
        with open_parquet(path) as file:
            kinds = {field.name: field.type for field in file.schema_arrow}
    except (pa.ArrowException, OSError):
        return False  # the reader of tables says what is wrong
    return "a" in kinds and (pa.types.is_list(kinds["a"]) or pa.types.is_large_list(kinds["a"]))


def _from_export(path: Path, named: bool, skipped: list[Skipped]) -> Iterator[Answer]:
    """Yields the votes of an export; of each pair, the frames of its first row count. Files have no pair in common."""
    first: dict[frozenset[object], tuple[int, str]] = {}
    number = -1
    with _export(path) as file:
        light = [*_LIGHT, *({"kind"} & {*file.schema_arrow.names})]
        for batch in file.iter_batches(columns=light):
            for values in batch.to_pylist():
                number += 1
                row = Row(f"{path}: row {number + 1}", values)
                case = tuple(values[name] for name in ("set", "steps", "index", "copy"))
                key = frozenset({(path, values["a_model"], case), (path, values["b_model"], case)})
                place, model = first.setdefault(key, (number, values["a_model"]))
                sides = ("a", "b") if values["a_model"] == model else ("b", "a")
                try:
                    if len(key) < 2:
                        raise ValueError(f"{row.where}: both sides are of the model {values['a_model']!r}")
                    yield _answer(row, key, Media(path, place, sides[0]), Media(path, place, sides[1]), named)
                except ValueError as error:
                    skipped.append(Skipped(path, str(error)))


def _names_axes(path: Path) -> bool:
    with _export(path) as file:
        batches = file.iter_batches(columns=["axis"])
        return any(_has_axis(Row("", values)) for batch in batches for values in batch.to_pylist())


@contextmanager
def _export(path: Path) -> Iterator[pq.ParquetFile]:
    """Opens an export.

    Raises:
        ValueError: it lacks a column or has one of another type, or cannot be read here or later.
    """
    try:
        with open_parquet(path) as file:
            if missing := [name for name in PAIRS.names if name not in file.schema_arrow.names]:
                raise ValueError(f"{path}: lacks {' and '.join(map(repr, missing))}; export the study again")
            for field in PAIRS:
                found, content = file.schema_arrow.field(field.name).type, _content(field.type)
                if _content(found) not in (content, "null"):
                    wrong = f"column {field.name!r} is of type {found}; it must hold {content}"
                    raise ValueError(f"{path}: {wrong}; export the study again")
            yield file
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        reason = stand_in(path) or " ".join(str(error).split())[:200]
        raise ValueError(f"{path}: is not a Parquet file, or a damaged one: {printable(reason)}") from error


def _content(kind: pa.DataType) -> str:
    """Returns what a column holds, the same for all widths of a type."""
    if pa.types.is_dictionary(kind):
        return _content(kind.value_type)
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return f"lists of {_content(kind.value_type)}"
    if pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind):
        return "text"
    if pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind):
        return "bytes"
    return "numbers" if pa.types.is_integer(kind) or pa.types.is_floating(kind) else str(kind)


def _from_manifest(path: Path, outside: bool, skipped: list[Skipped]) -> Iterator[Answer]:
    if not table_files(path):
        raise ValueError(f"{path}: no such file of preference pairs (allowed: {', '.join(TABLES)})")
    rows = list(read_rows(path, _COLUMNS, gaps=True, optional=_OPTIONAL, numbers=("preference", *_OPTIONAL)))
    named = any(map(_has_axis, rows))
    images: dict[bool, str] = {}
    for row in rows:
        try:
            if row.fault is not None:
                raise ValueError(f"{row.where}: {row.fault}")
            a, b = (_media(row, side, path.parent, outside) for side in ("a", "b"))
            if a == b:
                raise ValueError(f"{row.where}: both sides are {a}")
            if a.is_image != b.is_image:
                raise ValueError(f"{row.where}: one side is an image and the other a video")
            answer = _answer(row, frozenset({a, b}), a, b, named)
            images.setdefault(a.is_image, row.where)
            yield answer
        except ValueError as error:
            skipped.append(Skipped(path, str(error)))
    if len(images) > 1:
        raise ValueError(f"{images[True]} names images and {images[False]} videos; give them in two files")


def _media(row: Row, side: str, folder: Path, outside: bool) -> Media:
    name = row.values[side]
    if not isinstance(name, str) or not name.strip():
        raise ValueError(f"{row.where}: names no file for {side}")
    path = Path(os.path.normpath(folder / name.strip()))
    try:
        check_file(path, name, folder, outside, (*EXTENSIONS, *IMAGES), "video or image")
    except ValueError as error:
        raise ValueError(f"{row.where}: {side} = {printable(name)}: {error}") from None
    return Media(path)


def _answer(row: Row, key: frozenset[object], a: Media, b: Media, named: bool) -> Answer:
    """Makes a vote of a row; ``named``: whether any row names an axis."""
    prompt = check_prompt("" if row.values["prompt"] is None else row.values["prompt"], row.where)
    preference, axis = _preference(row), _text(row, "axis")
    if named and not axis:
        raise ValueError(f"{row.where}: its axis is empty, and other rows have one")
    vote = Vote(axis or AXIS, preference, _text(row, "annotator") or None, row.where)
    models = (_text(row, "a_model"), _text(row, "b_model"))
    return Answer(key, Pair(prompt, a, b, _text(row, "kind"), (vote,), models))


def _text(row: Row, column: str) -> str:
    """Returns a text or a number as one line; "" where there is none, or none that is visible."""
    given: Any = row.values.get(column)
    if given is None or (isinstance(given, float) and math.isnan(given)):  # a gap in a column of numbers
        return ""
    if isinstance(given, bool) or not isinstance(given, str | int | float):
        raise ValueError(f"{row.where}: its {column} is {printable(repr(given))[:40]}; it must be a text or a number")
    try:
        found = clean(str(given))
    except ValueError as error:
        raise ValueError(f"{row.where}: its {column} {error}") from None
    return "" if is_blank(found) else found


def _has_axis(row: Row) -> bool:
    try:
        return bool(_text(row, "axis"))
    except ValueError:
        return False


def _preference(row: Row) -> float:
    given: Any = row.values["preference"]
    try:
        found = math.nan if given is None or isinstance(given, bool) else float(given)
    except (TypeError, ValueError, OverflowError):
        found = math.nan
    if not 0 <= found <= 1:
        shown = printable(repr(given))[:40]
        raise ValueError(f"{row.where}: preference = {shown}; allowed: 1 for a, 0 for b, 0.5 for a tie, or between")
    return found

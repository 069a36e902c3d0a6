"""Escapes foreign text (labels, prompts, names of sets and files) for Markdown, LaTeX and CSV.

No such text becomes a link, a picture, a tag or a column of a page, a command of LaTeX, or a formula of a spreadsheet.
"""

import math
import re
import unicodedata
from collections.abc import Iterable

_INTERVAL = r"\[[-+−]?[\d.]+ ?%?, [-+−]?[\d.]+ ?%?\](?![(\[:])"  # as our own numbers have it: no link
_MARKDOWN = re.compile(
    rf"(?P<ours>{_INTERVAL})"
    r"|(?P<address>:)(?=//)|(?P<www>\bwww)(?=\.)"  # what GitHub makes a link without any brackets
    r"|[\\`*\[\]<|~$]|(?<![^\W_])_|_(?![^\W_])|&(?=#?\w+;)"
    r"|^(?:[-+#>]|\d{1,9}(?=[.)](?:\s|$)))"  # what begins a list, a heading or a quotation
)
_LATEX = {
    "\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "$": r"\$", "&": r"\&", "#": r"\#", "_": r"\_", "%": r"\%",
    "^": r"\textasciicircum{}", "~": r"\textasciitilde{}", "<": r"\textless{}", ">": r"\textgreater{}",
    '"': r"\textquotedbl{}", "|": r"\textbar{}", "[": "{[}", "]": "{]}",
    "±": r"$\pm$", "×": r"$\times$", "–": "--", "…": r"\ldots{}", "−": "$-$",
}  # fmt: skip
_NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?")


def one_line(value: object) -> str:
    """Returns text in one line, without control characters: a terminal, a page and LaTeX would each obey others."""
    line = " ".join(str(value).split())
    return line if line.isprintable() else "".join("\N{REPLACEMENT CHARACTER}" if _is_control(c) else c for c in line)


def _is_control(character: str) -> bool:
    return unicodedata.category(character) in ("Cc", "Cs") or character in "\u202a\u202b\u202d\u202e\u2066\u2067\u2068"


def markdown_text(value: object) -> str:
    """Escapes text for Markdown, in one line: for a paragraph, an item of a list or a cell.

    Intervals such as ``[0.110, 0.135]`` stay as they are, so that a page can be read without a renderer too.
    """
    return _MARKDOWN.sub(_escaped, one_line(value))


def _escaped(found: re.Match[str]) -> str:
    text = found[0]
    if found["ours"]:
        return text
    if found["address"] or found["www"] or text.isdigit():
        return text + "\\"  # before the slash or the point that follows
    if found.start() == 0 and text in "-+" and re.match(r"\S", found.string[1:]):
        return text  # a number, or a word
    return "\\" + text


def markdown_code(value: object) -> str:
    """Returns text as code of Markdown, in one line, which no backtick in it ends."""
    text = one_line(value).replace("|", r"\|")
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    aside = " " if text.startswith("`") or text.endswith("`") else ""
    return f"{fence}{aside}{text}{aside}{fence}"


def latex_text(text: str) -> str:
    """Returns text as LaTeX shows it literally, in one line."""
    return "".join(_LATEX.get(character, character) for character in one_line(text))


def csv_text(rows: Iterable[Iterable[object]]) -> str:
    """Returns rows as CSV: numbers stay numbers, what is None or NaN is empty, and no text is a formula.

    A spreadsheet runs a cell that begins with ``= + - @``, a tab or a line break; such a text gets an apostrophe in
    front, which spreadsheets know as the mark of text. Cells that hold the separator of any locale are quoted.
    """
    return "".join(",".join(map(_csv_cell, row)) + "\n" for row in rows)


def _csv_cell(value: object) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    text = str(value)
    if not isinstance(value, int | float) and _is_formula(text):
        text = f"'{text}"
    return '"' + text.replace('"', '""') + '"' if any(c in text for c in ',;\t"\r\n') else text


def _is_formula(text: str) -> bool:
    """Returns whether a spreadsheet may run a text; programs skip invisible characters, some read full-width signs."""
    visible = next((c for c in text if unicodedata.category(c)[0] not in "CZ"), "")
    begins = unicodedata.normalize("NFKC", visible)[:1] in ("=", "+", "-", "@") or text[:1] in ("\t", "\r", "\n")
    return begins and not _NUMBER.fullmatch(text)

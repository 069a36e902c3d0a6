"""A table of texts, as Markdown, as LaTeX and on the console, and numbers as JSON; the files that hold them.

Names and prompts are foreign text: what they hold stays text.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from pathlib import Path

from rich import box
from rich.markup import escape
from rich.table import Table

from rlvid.escape import latex_text, markdown_text
from rlvid.files import write_atomic

_PAGE, _GAP = 75, 3
"""Characters of a line of LaTeX's article in small type, and those that the space between two columns takes."""


@dataclass(frozen=True)
class Cell:
    """A text, bold or not."""

    text: str
    bold: bool = False


@dataclass(frozen=True)
class Grid:
    """Heads and rows; ``groups`` span the columns after the first ``words``, which are texts and no numbers.

    Attributes:
        heads: of all columns.
        rows: cells of all columns; a text is a cell that is not bold.
        words: columns at the left that hold words.
        groups: (text, number of columns) of a row above the heads; may be missing.
    """

    heads: Sequence[str]
    rows: Sequence[Sequence[Cell | str]]
    words: int = 1
    groups: Sequence[tuple[str, int]] = field(default_factory=list)

    @property
    def cells(self) -> list[list[Cell]]:
        """The rows, each text as a cell."""
        return [[cell if isinstance(cell, Cell) else Cell(cell) for cell in row] for row in self.rows]

    def markdown(self) -> str:
        """Returns the table in Markdown; a group stands in the head of each of its columns."""
        above = [""] * self.words + [f"{text}, " for text, span in self.groups for _ in range(span)]
        above += [""] * (len(self.heads) - len(above))
        heads = [markdown_text(a + head) for a, head in zip(above, self.heads, strict=True)]
        return markdown_table(heads, [marked(row, "**{}**", markdown_text) for row in self.cells], self.words)

    def latex(self, caption: str) -> str:
        """Returns a ``table`` with a ``tabular`` in the style of booktabs; a rule where the first word changes.

        One that is wider than a page is made as wide as its text.
        """
        lines = [r"\begin{table}[htbp]", r"\centering", rf"\caption{{{latex_text(caption)}}}", r"\small"]
        lines += [r"\resizebox{\linewidth}{!}{%"] if self._wide else []
        lines += [rf"\begin{{tabular}}{{{'l' * self.words}{'r' * (len(self.heads) - self.words)}}}", r"\toprule"]
        if self.groups:
            spans = [rf"\multicolumn{{{span}}}{{c}}{{{latex_text(text)}}}" for text, span in self.groups]
            lines.append(" & ".join([""] * self.words + spans) + r" \\")
            ends = list(accumulate((span for _, span in self.groups), initial=self.words))
            lines.append("".join(rf"\cmidrule(lr){{{a + 1}-{b}}}" for a, b in pairwise(ends)))
        lines += [" & ".join(map(latex_text, self.heads)) + r" \\", r"\midrule"]
        before = None
        for row in self.cells:
            if before not in (None, row[0].text) and self.words > 1:
                lines.append(r"\midrule")
            lines.append(" & ".join(marked(row, r"\textbf{{{}}}", latex_text)) + r" \\")
            before = row[0].text
        end = r"\end{tabular}}" if self._wide else r"\end{tabular}"
        return "\n".join([*lines, r"\bottomrule", end, r"\end{table}"])

    def console(self, title: str) -> Table:
        """Makes a table for a terminal."""
        table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, caption_justify="left")
        for place, head in enumerate(self.heads):
            table.add_column(head, justify="left" if place < self.words else "right")
        for row in self.cells:
            table.add_row(*marked(row, "[bold]{}[/bold]", escape))
        return table

    @property
    def _wide(self) -> bool:
        texts = [self.heads, *([cell.text for cell in row] for row in self.cells)]
        return sum(max(map(len, column)) + _GAP for column in zip(*texts, strict=True)) > _PAGE


@dataclass(frozen=True)
class Section:
    """A table with a heading above and a note below."""

    heading: str
    grid: Grid
    note: str


def markdown_table(heads: Sequence[str], rows: Sequence[Sequence[str]], words: int = 1) -> str:
    """Returns lines of a pipe table whose cells are Markdown already; see ``Grid`` for ``words``."""
    rules = ["---"] * words + ["---:"] * (len(heads) - words)
    return "\n".join("| " + " | ".join(line) + " |" for line in (heads, rules, *rows))


def marked(row: Sequence[Cell], bold: str, escaped: Callable[[str], str]) -> list[str]:
    """Returns the texts of a row in a language that has marks for what is bold."""
    return [bold.format(escaped(cell.text)) if cell.bold else escaped(cell.text) for cell in row]


def latex_page(tables: Sequence[str]) -> str:
    r"""Tables for ``\input``; what the document needs stands at the top."""
    return "\n\n".join([r"% needs \usepackage{booktabs,graphicx} and \usepackage[T1]{fontenc}", *tables]) + "\n"


def steps_page(title: str, grids: Mapping[int, Grid], legend: str) -> str:
    """Returns a page of Markdown with a table for each number of sampling steps, and how to read them."""
    lines = [f"# {title}", ""]
    for steps, grid in grids.items():
        lines += [f"## {steps} sampling steps", "", grid.markdown(), ""]
    return "\n".join([*lines, legend, ""])


def write_tables(folder: Path, stem: str, *, page: str, csv: str, latex: Sequence[str]) -> list[Path]:
    """Writes ``stem.md``, ``stem.csv`` and ``stem.tex``; returns their paths."""
    contents = {"md": page, "csv": csv, "tex": latex_page(latex)}
    for suffix, text in contents.items():
        write_atomic(folder / f"{stem}.{suffix}", text.encode())
    return [folder / f"{stem}.{suffix}" for suffix in contents]


def json_text(content: object) -> str:
    """Returns strict JSON: null where a number is not finite."""
    return json.dumps(_finite(content), indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def _finite(value: object) -> object:
    """Returns the same structure with None for every float that is not finite."""
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value

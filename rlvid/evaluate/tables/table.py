"""A table of texts, as Markdown and as LaTeX. Names and prompts are foreign text: what they hold stays text."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise

from rlvid.escape import latex_text, markdown_text

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
        rows: cells of all columns.
        words: columns at the left that hold words.
        groups: (text, number of columns) of a row above the heads; may be missing.
    """

    heads: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    words: int = 1
    groups: Sequence[tuple[str, int]] = field(default_factory=list)

    def markdown(self) -> str:
        """Lines of a pipe table; a group stands in the head of each of its columns."""
        above = [""] * self.words + [f"{text}, " for text, span in self.groups for _ in range(span)]
        above += [""] * (len(self.heads) - len(above))
        heads = [markdown_text(a + head) for a, head in zip(above, self.heads, strict=True)]
        rules = ["---"] * self.words + ["---:"] * (len(heads) - self.words)
        rows = [
            [f"**{markdown_text(cell.text)}**" if cell.bold else markdown_text(cell.text) for cell in row]
            for row in self.rows
        ]
        return "\n".join("| " + " | ".join(line) + " |" for line in (heads, rules, *rows))

    def latex(self, caption: str) -> str:
        """A ``table`` with a ``tabular`` in the style of booktabs; a rule where the first word changes.

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
        for place, row in enumerate(self.rows):
            if place and self.words > 1 and row[0].text != self.rows[place - 1][0].text:
                lines.append(r"\midrule")
            texts = [rf"\textbf{{{latex_text(cell.text)}}}" if cell.bold else latex_text(cell.text) for cell in row]
            lines.append(" & ".join(texts) + r" \\")
        end = r"\end{tabular}}" if self._wide else r"\end{tabular}"
        return "\n".join([*lines, r"\bottomrule", end, r"\end{table}"])

    @property
    def _wide(self) -> bool:
        texts = [self.heads, *([cell.text for cell in row] for row in self.rows)]
        return sum(max(map(len, column)) + _GAP for column in zip(*texts, strict=True)) > _PAGE


def latex_page(tables: Sequence[str]) -> str:
    r"""Tables for ``\input``; what the document needs stands at the top."""
    return "\n\n".join([r"% needs \usepackage{booktabs,graphicx} and \usepackage[T1]{fontenc}", *tables]) + "\n"

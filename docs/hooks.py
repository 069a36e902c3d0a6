"""What mkdocs calls while it builds: writes the config's keys into their page, and shows what a command needs."""

import re
from typing import Any

from rlvid.config.reference import reference

_KEYS = "<!-- every key of the config -->"
_NEEDS = re.compile(r"^<!-- needs: (.+?) -->$", re.MULTILINE)


def on_page_markdown(markdown: str, **_: Any) -> str:
    """The page's text with both filled in; mkdocs' own name and arguments."""
    return _NEEDS.sub(_shown, markdown.replace(_KEYS, reference()))


def _shown(found: re.Match[str]) -> str:
    kind, _, reason = found[1].partition(": ")
    return f"*{'Takes' if kind == 'minutes' else 'Needs'} {kind}{f' ({reason})' if reason else ''}:*\n"

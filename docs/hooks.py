"""What mkdocs calls while it builds: writes the config's keys into their page, shows what commands need and take."""

import re
from typing import Any

from rlvid.config.reference import fit_reference, reference

_KEYS, _KEYS_OF_FIT = "<!-- every key of the config -->", "<!-- every key of a fit -->"
_SHIM, _OURS = "https://unpkg.com/iframe-worker/shim", "offline-search.js"
_MARKER = re.compile(r"^<!-- (needs|takes): (.+?) -->$", re.MULTILINE)


def on_page_markdown(markdown: str, **_: Any) -> str:
    """The page's text with all of it filled in; mkdocs' own name and arguments."""
    return _MARKER.sub(_shown, markdown.replace(_KEYS, reference()).replace(_KEYS_OF_FIT, fit_reference()))


def on_post_page(output: str, **_: Any) -> str:
    """The page with a script of its own in place of the one that the theme fetches for search from disk."""
    return output.replace(_SHIM, _OURS)


def on_post_template(output_content: str, **_: Any) -> str:
    """The same of pages that are not made of Markdown."""
    return on_post_page(output_content)


def _shown(found: re.Match[str]) -> str:
    if found[1] == "takes":
        return f"*Takes {found[2]}:*\n"
    kind, _, reason = found[2].partition(": ")
    return f"*{'Takes' if kind == 'minutes' else 'Needs'} {kind}{f' ({reason})' if reason else ''}:*\n"

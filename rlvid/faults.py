"""Errors as one line: the error, and its place in a user's file."""

import re
import traceback
from pathlib import Path

from rlvid.text import printable

OF_A_REWARD = "rlvid_reward_"
"""The beginning of the names of modules that ``rlvid.reward.custom`` makes of a user's files."""
_PLAIN = (ValueError, RuntimeError, OSError)
_MAX = 600


def one_line(error: BaseException) -> str:
    """Returns an error's text as one line: of a traceback the end, with the cause; the type if there is no text."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", str(error))
    lines = [line for line in text.splitlines() if line.strip()]
    if "Traceback (most recent call last)" in text:
        indented = [place for place, line in enumerate(lines[:-1]) if line.startswith(("  ", "Traceback"))]
        lines = lines[indented[-1] + 1 :] if indented else lines[-1:]
    said = printable(" ".join(line.strip() for line in lines)) or type(error).__name__
    return said if len(said) <= _MAX else f"{said[:_MAX]}..."


def describe(error: BaseException) -> str:
    """Describes an error in one line: its type if useful, its text, and the line of a user's reward that raised it."""
    text, of_reward = one_line(error), place(error)
    if isinstance(error, SystemExit):
        text = f"sys.exit({'' if error.code is None else repr(error.code)})"
    elif str(error).strip() and (of_reward or not isinstance(error, _PLAIN)):
        text = f"{type(error).__name__}: {text}"
    elif not str(error).strip() and not of_reward and error.__traceback__:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        of_reward = f"{Path(frame.filename).name}:{frame.lineno}"
    return text + (f" at {of_reward}" if of_reward else "")


def place(error: BaseException) -> str | None:
    """FILE:LINE of the last frame in a user's reward, if the error came through one."""
    found = None
    for frame, line in traceback.walk_tb(error.__traceback__):
        if str(frame.f_globals.get("__name__", "")).startswith(OF_A_REWARD):
            found = f"{Path(frame.f_code.co_filename).name}:{line}"
    return found

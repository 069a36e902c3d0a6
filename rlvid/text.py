"""Checks of foreign text: the characters that a prompt may hold, and safe text for messages."""

import re
import unicodedata

# TAB and line ends are white space; a lone carriage return is a control character like any other.
_BREAKS = re.compile(r"[ \ufeff]*(?:\r\n|[\t\n\u2028\u2029\ufeff])(?:\r\n|[ \t\n\u2028\u2029\ufeff])*")
_REFUSED = re.compile(r"[\x00-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
_UNSAFE = re.compile(r"[\x00-\x1f\x7f-\x9f\u200b\u2028-\u202e\u2066-\u2069\ud800-\udfff\ufeff]")
_UNSAFE_IN_LINES = re.compile(rf"(?![\t\n]){_UNSAFE.pattern}")


def is_utf8(text: str) -> bool:
    """Returns whether a text can be written as UTF-8; a file name or an argument of other bytes cannot."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


def clean(text: str) -> str:
    """Returns the text on one line: line ends and tabs become one space, and none is left at either end.

    Raises:
        ValueError: it cannot be written as UTF-8, holds a control character or one that reverses the direction of
            writing; the message begins with a verb, for the caller to put the place before.
    """
    line = _BREAKS.sub(" ", text).strip()
    if found := _REFUSED.search(line):
        code = ord(found[0])
        if 0xDC80 <= code <= 0xDCFF:
            kind = f"the byte 0x{code - 0xDC00:02X}, which is not UTF-8"
        elif 0xD800 <= code <= 0xDFFF:
            kind = f"U+{code:04X}, half of a character, which cannot be written as UTF-8"
        elif code > 0xFF:
            kind = f"U+{code:04X} ({unicodedata.name(found[0])}), which changes the order of what is shown"
        else:
            kind = f"the control character U+{code:04X}"
        raise ValueError(f"has {kind}, after {printable(line[: found.start()][-20:])!r}; remove it")
    return line


def is_blank(text: str) -> bool:
    """Returns whether nothing of a text is visible: white space, or characters of no width."""
    return all(unicodedata.category(character) in ("Zs", "Zl", "Zp", "Cc", "Cf") for character in text)


def printable(text: str, *, lines: bool = False) -> str:
    r"""Returns text that is safe in a terminal or log: control characters become ``\x1b``, invalid bytes ``\xe9``.

    Args:
        text: anything, a path for example.
        lines: keep tabs and line ends.
    """
    return (_UNSAFE_IN_LINES if lines else _UNSAFE).sub(_escape, text)


def _escape(found: re.Match[str]) -> str:
    code = ord(found[0])
    if 0xDC80 <= code <= 0xDCFF:  # a byte that Python could not decode
        code -= 0xDC00
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"

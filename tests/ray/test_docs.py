"""Follows the README and docs/ as a reader would: every block of commands that needs nothing special, page by page.

The commands are those that are shown; runs are of the tiny model and two steps, evaluations of two videos.
"""

import pytest
from documents import PAGES, Reader, blocks

from rlvid.toy.tiny import save_tiny_model

FOLLOWED = [page for page in PAGES if any(block.performed for block in blocks(page))]


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Reader:
    """In an empty folder, but for the tiny model."""
    home = tmp_path_factory.mktemp("reader")
    save_tiny_model(home / "tiny")
    return Reader(home, FOLLOWED)


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize("page", FOLLOWED)
def test_what_a_page_says_works(page: str, reader: Reader) -> None:
    reader.follow(page)


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_what_the_first_hour_promises_is_there(reader: Reader) -> None:
    reader.follow("first-hour")  # nothing is done twice
    run = reader.home / "runs" / "tau8"
    for name in ("before-after.png", "reward.png", "config.yaml", "evaluation.md", "report/index.html"):
        assert (run / name).is_file(), name
    assert list((run / "archive").glob("*.parquet"))
    assert list((run / "tensorboard").glob("events.*"))
    assert (reader.home / "my-model" / "adapter" / "adapter_config.json").is_file()
    assert len(list((reader.home / "videos").glob("*a-red-star-moving-left-on-a-navy-background.mp4"))) == 1

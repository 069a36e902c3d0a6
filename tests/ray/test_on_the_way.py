"""Training on a folder of videos: what comes out is what their encoded clips give."""

from pathlib import Path

import pytest
from runs import QUIET, adapter, config, difference, tiny_state

from rlvid.config.model import ModelConfig
from rlvid.data.encode import encode_folder
from rlvid.data.sources import rendered_clip
from rlvid.plots.video import write_mp4
from rlvid.train.launch import train

ONE = ("train.workers=1", "train.zero_stage=0", "train.micro_batch=4", "output.archive_every=0")


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_videos_encoded_on_the_way_train_to_the_same_bits(folder: Path) -> None:
    """A group of two, so that a share holds one clip twice; two encoders, whose order does not count."""
    videos, clips = folder / "videos", folder / "encoded"
    videos.mkdir()
    for index in range(3):
        write_mp4(videos / f"{index}.mp4", rendered_clip(0, index, 8, 32)[1], 8)
        (videos / f"{index}.txt").write_text(f"this is {index}")
    encode_folder(videos, ModelConfig(path=str(folder / "tiny"), frames=4, size=16), clips, workers=2)
    group = (*ONE, "train.group_size=2")
    before = train(config(folder, "before", *group, f"data.source={clips}"), QUIET)
    own = (*group, f"data.source={videos}", "data.encoders=2")
    on_the_way = train(config(folder, "on-the-way", *own), QUIET)
    expected = adapter(before.folder, 3)
    assert difference(expected, tiny_state(folder)) > 2e-5, "nothing was learned, so equality would prove nothing"
    assert difference(adapter(on_the_way.folder, 3), expected) == 0
    assert len(list((folder / "runs" / "clips").glob("cache-*-cpu/*/*.arrow"))) == 3

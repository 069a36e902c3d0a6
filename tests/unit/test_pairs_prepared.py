"""Media of preference pairs: pixels as a reward sees them, rows in a folder, and pairs that cannot be read."""

import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image
from pyarrow import parquet

from rlvid.data.clips import EncodedClips
from rlvid.data.pairs import PAIRS
from rlvid.fitting.pairs import Media, Pair, Vote
from rlvid.fitting.prepare import held_out_prompts, items, read_batch, read_media, write_pairs
from rlvid.plots.video import write_mp4
from rlvid.reward.preprocess import Preprocess, preset
from rlvid.reward.segments import middle_frames

SIZE, PREPROCESS = 16, Preprocess(16)
RANDOM = np.random.default_rng(0)


def picture(path: Path, side: int = SIZE) -> Media:
    Image.fromarray(RANDOM.integers(0, 256, (side, side, 3), dtype=np.uint8)).save(path)
    return Media(path)


def pair(a: Media, b: Media, prompt: str = "a dog", kind: str = "", **preference: float) -> Pair:
    votes = tuple(Vote(axis, value, None, "here") for axis, value in (preference or {"quality": 1.0}).items())
    return Pair(prompt, a, b, kind, votes)


def test_images_and_exports_have_their_pixels_and_videos_are_read_from_end_to_end(tmp_path: Path) -> None:
    image = picture(tmp_path / "x.png")
    found = read_media(image, 8, PREPROCESS)
    assert found.dtype == torch.uint8
    assert np.array_equal(found[0].permute(1, 2, 0).numpy(), np.asarray(Image.open(image.path)))
    frames = RANDOM.integers(0, 256, (8, SIZE, SIZE, 3), dtype=np.uint8)
    files = []
    for pixels in frames:
        Image.fromarray(pixels).save(buffer := io.BytesIO(), "PNG")
        files.append(buffer.getvalue())
    row = {"prompt": "a dog", "a": files, "b": files[:4], "preference": 1.0, "axis": "quality", "annotator": "ada"}
    export = tmp_path / "export.parquet"
    parquet.write_table(pa.Table.from_pylist([row, row], PAIRS), export, row_group_size=1)
    for places, count in (([1, 3, 5, 7], 4), ([*range(8)], 8)):
        found = read_media(Media(export, 1, "a"), count, PREPROCESS)
        assert np.array_equal(found.permute(0, 2, 3, 1).numpy(), frames[places])
    found = read_media(Media(export, 0, "b"), 8, PREPROCESS)
    assert np.array_equal(found.permute(0, 2, 3, 1).numpy(), frames[[0, 0, 1, 1, 2, 2, 3, 3]]), "it repeats frames"
    grey = torch.arange(8)[:, None, None, None].expand(8, 3, 32, 32) * 30 / 255
    write_mp4(tmp_path / "x.mp4", grey, 8)
    levels = read_media(Media(tmp_path / "x.mp4"), 4, PREPROCESS).float().mean((1, 2, 3))
    assert (levels - torch.tensor([30.0, 90, 150, 210])).abs().max() < 8


@pytest.mark.parametrize("length", [3, 9, 16, 21])
def test_a_file_has_the_same_frames_as_an_export_and_as_a_reward_that_looks_at_it(tmp_path: Path, length: int) -> None:
    grey = torch.arange(length)[:, None, None, None].expand(length, 3, 32, 32) * 10 / 255
    write_mp4(tmp_path / "x.mp4", grey, 8)
    levels = read_media(Media(tmp_path / "x.mp4"), 8, PREPROCESS).float().mean((1, 2, 3))
    assert (levels / 10).round().int().tolist() == middle_frames(length, 8)


@pytest.mark.parametrize("policy", ["hpsv2", "videox_fun", "imagereward", "clip", "pickscore"])
@pytest.mark.parametrize("tall", [False, True])
def test_a_video_has_the_pixels_of_its_frames_as_pictures(tmp_path: Path, policy: str, tall: bool) -> None:
    frame_HWC = np.full((64, 128, 3), 128, np.uint8)
    frame_HWC[:, :32], frame_HWC[:, -32:], frame_HWC[48:] = 255, 0, 64
    frame_HWC = frame_HWC.swapaxes(0, 1) if tall else frame_HWC
    Image.fromarray(frame_HWC).save(tmp_path / "x.png")
    write_mp4(tmp_path / "x.mp4", torch.from_numpy(frame_HWC / 255).permute(2, 0, 1)[None].repeat(2, 1, 1, 1), 8)
    image, video = (read_media(Media(tmp_path / name), 2, preset(policy, SIZE)).int() for name in ("x.png", "x.mp4"))
    assert (video - image).abs().max() < 10


def test_rows_are_the_pairs_in_their_order_whatever_the_batches(tmp_path: Path) -> None:
    media = [picture(tmp_path / f"{place}.png", side) for place, side in enumerate((16, 20, 24, 16))]
    pairs = [
        pair(media[0], media[1], quality=0.25, motion=1.0),
        pair(media[1], media[2], "a cat", "structure"),
        pair(media[2], media[3], "a cow"),
    ]
    made = pa.Table.from_pylist(items(pairs, ["quality", "motion"], {"a cat"}))
    folders = []
    for size in (1, 3):
        read = (read_batch(made.slice(first, size), 8, PREPROCESS) for first in range(0, 3, size))
        assert write_pairs(read, tmp_path / f"by-{size}", ["quality", "motion"], 8, SIZE) == []
        folders.append(EncodedClips.open(tmp_path / f"by-{size}"))
    assert folders[0].meta["fingerprint"] == folders[1].meta["fingerprint"]
    assert folders[0].meta["axes"] == ["quality", "motion"]
    rows = folders[0].rows([2, 0, 1], ["caption", "a", "b", "shape", "preference", "votes", "kind", "held_out"])
    assert rows["caption"].to_pylist() == ["a cow", "a dog", "a cat"]
    assert rows["held_out"].to_pylist() == [False, False, True]
    assert rows["kind"].to_pylist() == ["", "", "structure"]
    assert rows["votes"].to_pylist() == [[1, 0], [1, 1], [1, 0]]
    assert rows["preference"][1].as_py() == [0.25, 1.0]
    assert np.isnan(rows["preference"][0].as_py()[1])
    assert rows["shape"][0].as_py() == [1, 3, SIZE, SIZE]
    assert rows["a"][1].as_py() == read_media(media[0], 8, PREPROCESS).numpy().tobytes()


def test_pairs_that_cannot_be_read_are_left_out_and_named(tmp_path: Path) -> None:
    good, same = picture(tmp_path / "good.png"), tmp_path / "same.png"
    same.write_bytes(good.path.read_bytes())
    (tmp_path / "cut.png").write_bytes(good.path.read_bytes()[:-50])
    (tmp_path / "cut.mp4").write_bytes(b"no video")
    export = tmp_path / "export.parquet"
    parquet.write_table(pa.Table.from_pylist([{"prompt": "a dog", "a": [b"x"], "b": []}], PAIRS), export)
    bad = {
        "cut.png": Media(tmp_path / "cut.png"), "cut.mp4": Media(tmp_path / "cut.mp4"), "same pixels": Media(same),
        "row 1, a": Media(export, 0, "a"), "row 1, b: has no frames": Media(export, 0, "b"),
        "has 1 rows": Media(export, 7, "a"),
    }  # fmt: skip
    pairs = [pair(good, other) for other in bad.values()]
    read = [read_batch(pa.Table.from_pylist(items(pairs, ["quality"], set())), 8, PREPROCESS)]
    with pytest.raises(ValueError, match=r"no pair can be read; the first reason: .*cut\.png"):
        write_pairs(read, tmp_path / "none", ["quality"], 8, SIZE)
    assert not (tmp_path / "none").exists()
    pairs.append(pair(good, picture(tmp_path / "other.png")))
    read = [read_batch(pa.Table.from_pylist(items(pairs, ["quality"], set())), 8, PREPROCESS)]
    skipped = write_pairs(read, tmp_path / "some", ["quality"], 8, SIZE)
    assert len(EncodedClips.open(tmp_path / "some")) == 1
    assert [words in str(each) for words, each in zip(bad, skipped, strict=True)] == [True] * len(bad)
    assert not any(str(each).startswith(str(tmp_path / "some")) for each in skipped), "the media are named"


def test_pairs_without_a_vote_on_the_fitted_axes_are_no_rows(tmp_path: Path) -> None:
    media = [picture(tmp_path / f"{place}.png") for place in range(3)]
    pairs = [pair(media[0], media[1], quality=1.0), pair(media[1], media[2], motion=0.0)]
    (made,) = items(pairs, ["motion"], set())
    assert (made["index"], made["preference"], made["a_path"]) == (0, [0.0], str(media[1].path))


def test_prompts_are_held_out_whole_and_by_the_seed() -> None:
    prompts = [f"a dog {place}" for place in range(40)]
    found = held_out_prompts(prompts * 3, 0.25, 0)
    assert len(found) == 10
    assert found == held_out_prompts(reversed(prompts), 0.25, 0)
    assert found != held_out_prompts(prompts, 0.25, 1)
    assert len(held_out_prompts(["a", "b"], 0.01, 0)) == len(held_out_prompts(["a", "b"], 0.99, 0)) == 1
    with pytest.raises(ValueError, match="all pairs have one prompt"):
        held_out_prompts(["a", "a"], 0.5, 0)

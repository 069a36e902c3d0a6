"""Clips are encoded once, by Ray Data: the good ones into Parquet, the bad ones into the report."""

import os
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch

from rlvid.config.model import ModelConfig
from rlvid.data.clips import EncodedClips
from rlvid.data.encode import encode_folder, model_fingerprint
from rlvid.data.encoders import encode_items
from rlvid.data.shares import tensors
from rlvid.data.sources import encode_builtin, read_rendered, rendered_clip
from rlvid.models.unet3d import load_model
from rlvid.plots.video import write_mp4
from rlvid.toy.tiny import save_tiny_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ModelConfig:
    folder = tmp_path_factory.mktemp("model")
    save_tiny_model(folder)
    return ModelConfig(path=str(folder), frames=4, size=16)


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("videos")
    for i in range(5):
        caption, frames_FCHW = rendered_clip(0, i, 8, 32)
        write_mp4(folder / f"{i}.mp4", frames_FCHW, 8)
        (folder / f"{i}.txt").write_text(caption if i else f"{caption}, {'very bright, ' * 99}and wide")
    whole = (folder / "0.mp4").read_bytes()
    for name, content in {"cut": whole[: len(whole) // 2], "fake": b"a text\n" * 99, "empty": b""}.items():
        (folder / f"{name}.mp4").write_bytes(content)
        (folder / f"{name}.txt").write_text("a caption")
    (folder / "notes.txt").write_text("not a caption")
    (folder / os.fsdecode(b"caf\xe9.dat")).touch()
    return folder


def test_a_folder_is_encoded_once_and_the_bad_files_are_named(
    ray_cluster: Any, model: ModelConfig, videos: Path, tmp_path: Path
) -> None:
    out, progress = tmp_path / "made" / "clips", []
    report = encode_folder(videos, model, out, workers=2, batch_size=2, on_progress=lambda *p: progress.append(p))
    assert (report.clips, report.encoded) == (5, 5)
    bad = {"cut.mp4", "fake.mp4", "empty.mp4", "notes.txt"}
    assert {s.path.name for s in report.skipped} == bad | {os.fsdecode(b"caf\xe9.dat")}
    said = (out / "report.txt").read_text()
    assert all(said.count(f"{videos}/{name}: ") == 1 for name in (*bad, r"caf\xe9.dat"))
    assert f"{videos}/empty.mp4: is empty\n" in said
    assert report.notes == said.splitlines()[-1:]
    assert "1 of 6 different captions are longer than 24 tokens" in report.notes[0]
    assert [done for done, _ in progress] == sorted(done for done, _ in progress)
    assert progress[-1] == (8, 8)
    assert list(out.parent.iterdir()) == [out]

    # the very numbers that the pure function gives, whatever the batches and workers
    loaded = load_model(model.path, frames=4, size=16)
    items = [
        {"index": i, "source": f"{videos}/{i}.mp4", "caption": (videos / f"{i}.txt").read_text()} for i in range(5)
    ]
    want = encode_items(loaded, items)
    got = pq.read_table(out / "part-00000.parquet")
    assert got.column_names == want.column_names[:-1]
    assert got.drop_columns(["mean", "std", "text"]).to_pylist() == (
        want.drop_columns(["mean", "std", "text", "error"]).to_pylist()
    )
    for name in ("mean", "std", "text"):
        for a, b in zip(got[name].to_pylist(), want[name].to_pylist(), strict=True):
            torch.testing.assert_close(*(torch.frombuffer(bytearray(x), dtype=torch.float32) for x in (a, b)))

    before = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    again = encode_folder(videos, model, out)
    assert (again.clips, again.encoded, again.fingerprint) == (5, 0, report.fingerprint)
    assert again.skipped == report.skipped
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == before

    with pytest.raises(ValueError, match="size 16 there, 32 now"):
        encode_folder(videos, model.model_copy(update={"size": 32}), out)
    assert len(EncodedClips.open(out, model_fingerprint(model))) == 5
    with pytest.raises(ValueError, match="encoded with another model or size"):
        EncodedClips.open(out, model_fingerprint(model.model_copy(update={"precision": "bfloat16"})))


@pytest.mark.slow
def test_built_in_clips_are_encoded(ray_cluster: Any, model: ModelConfig, tmp_path: Path) -> None:
    report = encode_builtin(6, 3, model, tmp_path / "clips", workers=1, batch_size=4)
    assert (report.clips, report.encoded, report.skipped) == (6, 6, [])
    clips = EncodedClips.open(tmp_path / "clips")
    captions, text_BLD, posterior = tensors(clips.rows([4, 1]))
    loaded = load_model(model.path, frames=4, size=16)
    want_captions, frames = zip(*(read_rendered(3, {"index": i}, loaded) for i in (4, 1)), strict=True)
    assert captions == list(want_captions)
    torch.testing.assert_close(posterior.mean, loaded.encode_frames(torch.stack(frames)).mean, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(text_BLD, loaded.encode_prompts(captions), atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="seed 3 there, 4 now"):
        encode_builtin(6, 4, model, tmp_path / "clips")


def test_what_cannot_be_encoded_is_said_before_anything_starts(
    model: ModelConfig, videos: Path, tmp_path: Path
) -> None:
    (tmp_path / "none").mkdir()
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="no clips to encode"):
        encode_folder(tmp_path / "none", model, tmp_path / "out")
    with pytest.raises(ValueError, match="cannot be written"):
        encode_folder(videos, model, tmp_path / "file" / "out")
    with pytest.raises(ValueError, match=r"has neither unet nor transformer"):
        encode_folder(videos, ModelConfig(path=str(tmp_path)), tmp_path / "out")
    with pytest.raises(ValueError, match=r"model.size = 17 is not a multiple of 2"):
        encode_folder(videos, model.model_copy(update={"size": 17}), tmp_path / "out")
    with pytest.raises(ValueError, match="both must be at least 1"):
        encode_builtin(4, 0, model, tmp_path / "out", workers=0)


def test_clips_of_which_none_can_be_read_leave_nothing(ray_cluster: Any, model: ModelConfig, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.mp4").write_bytes(b"no video")
    (tmp_path / "in" / "a.txt").write_text("a caption")
    with pytest.raises(ValueError, match=r"none of the 1 clips can be read: .*a\.mp4: cannot be decoded"):
        encode_folder(tmp_path / "in", model, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["in"]

"""Videos, the order of clips, encoded folders and the archive; no Ray."""

import io
import json
import os
import resource
import shutil
from collections.abc import Callable, Iterable
from concurrent.futures import wait
from fractions import Fraction
from pathlib import Path

import av
import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from rlvid.algorithms.base import Samples
from rlvid.config import parse_config
from rlvid.config.model import SamplingConfig
from rlvid.data import writing
from rlvid.data.archive import SCHEMA, ArchiveWriter, read_archive, trim
from rlvid.data.clips import EncodedClips, clip_index, digest
from rlvid.data.encode import encode_items
from rlvid.data.find import Skipped
from rlvid.data.prompts import resolve_prompts
from rlvid.data.sources import BaseSampler, read_rendered, rendered_clip, sample_prompts, samples_made_with
from rlvid.data.videos import VideoError, read_video
from rlvid.data.writing import ClipWriter, is_reusable
from rlvid.diffusion.chain import denoise
from rlvid.diffusion.schedule import timesteps
from rlvid.models.base import VideoModel
from rlvid.plots.video import gif_bytes, write_mp4
from rlvid.randomness import normal
from rlvid.toy.tiny import tiny_model
from rlvid.train.preflight import cut_captions, record_clips
from rlvid.world.captions import PROMPT_SETS, read_caption

FPS = 8.0


def ramp(count: int, height: int = 32, width: int = 32) -> torch.Tensor:
    """Frame i is flat at i / (count - 1), so that a frame read back tells its number."""
    return torch.linspace(0, 1, count)[:, None, None, None].expand(count, 3, height, width).contiguous()


def numbers(frames_FCHW: torch.Tensor, count: int) -> list[int]:
    return (frames_FCHW.mean((1, 2, 3)) * (count - 1)).round().int().tolist()


def write_video(
    path: Path,
    frames_FCHW: torch.Tensor,
    *,
    codec: str = "libx264",
    format: str = "yuv444p",
    rotation: int = 0,
    times_ms: list[int] | None = None,
    options: dict[str, str] | None = None,
) -> None:
    """Three channels, or four with an alpha channel."""
    with av.open(path, "w") as container:
        stream = container.add_stream(codec, rate=8, options=options or {})
        stream.height, stream.width, stream.pix_fmt = frames_FCHW.shape[2], frames_FCHW.shape[3], format
        if rotation:
            stream.set_display_rotation(rotation)
        for i, pixels in enumerate((frames_FCHW * 255).round().byte().permute(0, 2, 3, 1).numpy()):
            kind = "rgba" if pixels.shape[2] == 4 else "rgb24"
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format=kind)
            frame.time_base = Fraction(1, 1000)
            frame.pts = times_ms[i] if times_ms else i * 125
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


# -------------------------------------------------------------------------------------------- videos


def test_a_video_comes_back_within_the_codecs_tolerance(tmp_path: Path) -> None:
    _, frames_FCHW = rendered_clip(0, 3, 8, 64)
    write_mp4(tmp_path / "a.mp4", frames_FCHW, FPS)
    back_FCHW = read_video(tmp_path / "a.mp4", frames=8, size=64, fps=FPS)
    assert back_FCHW.dtype == torch.float32
    assert back_FCHW.shape == frames_FCHW.shape
    assert (back_FCHW - frames_FCHW).abs().mean() < 0.02
    assert [p.name for p in tmp_path.iterdir()] == ["a.mp4"]  # nothing left beside it


@pytest.mark.parametrize(
    ("rate", "count", "fps", "frames", "expected"),
    [
        (8, 8, 8, 8, [0, 1, 2, 3, 4, 5, 6, 7]),  # just so
        (8, 16, 8, 4, [6, 7, 8, 9]),  # the middle
        (24, 24, 8, 8, [1, 4, 7, 10, 13, 16, 19, 22]),  # every third
        (4, 8, 8, 8, [2, 2, 3, 3, 4, 4, 5, 5]),  # a slower clip repeats
        (30, 10, 8, 5, [1, 3, 5, 7, 9]),  # a third of a second, ten frames: evenly over the whole
    ],
)
def test_frames_are_chosen_by_time(
    tmp_path: Path, rate: int, count: int, fps: float, frames: int, expected: list[int]
) -> None:
    write_mp4(tmp_path / "a.mp4", ramp(count), rate)
    assert numbers(read_video(tmp_path / "a.mp4", frames=frames, size=16, fps=fps), count) == expected


def test_a_variable_frame_rate_is_read_by_timestamps(tmp_path: Path) -> None:
    # frame 0 shows for 1 s, 1 and 2 for 50 ms each, 3 until the end
    write_video(tmp_path / "a.mkv", ramp(5), times_ms=[0, 1000, 1050, 1100, 1875])
    got = numbers(read_video(tmp_path / "a.mkv", frames=8, size=16, fps=4), 5)
    assert got == [0, 0, 0, 0, 3, 3, 3, 4]


def test_a_clip_that_is_too_short_says_what_it_needs(tmp_path: Path) -> None:
    write_mp4(tmp_path / "a.mp4", ramp(4), FPS)
    with pytest.raises(
        VideoError, match=r"lasts 0\.50 s and has 4 frames; needed: 2\.00 s \(16 frames at 8 a second\)"
    ):
        read_video(tmp_path / "a.mp4", frames=16, size=16, fps=FPS)


@pytest.mark.parametrize(("height", "width"), [(48, 32), (32, 48), (33, 47), (16, 96), (21, 20)])
def test_the_middle_is_cut_from_any_shape(tmp_path: Path, height: int, width: int) -> None:
    frames_FCHW = torch.zeros(4, 3, height, width)
    frames_FCHW[:, 0, : height // 2] = 1  # red above, green on the left
    frames_FCHW[:, 1, :, : width // 2] = 1
    write_video(tmp_path / "a.mkv", frames_FCHW)
    got_FCHW = read_video(tmp_path / "a.mkv", frames=4, size=16, fps=FPS)
    assert got_FCHW.shape == (4, 3, 16, 16)
    corners = got_FCHW[1][:, [2, 2, 13, 13], [2, 13, 2, 13]].T
    assert torch.allclose(corners[:, :2], torch.tensor([[1.0, 1], [1, 0], [0, 1], [0, 0]]), atol=0.1)


def test_rotation_flags_and_transparency_are_honoured(tmp_path: Path) -> None:
    frames_FCHW = torch.zeros(4, 3, 32, 32)
    frames_FCHW[:, 0, :, :16] = 1  # red on the left
    write_video(tmp_path / "turned.mp4", frames_FCHW, format="yuv420p", rotation=90)
    got_FCHW = read_video(tmp_path / "turned.mp4", frames=4, size=32, fps=FPS)
    assert got_FCHW[0, 0, 28, 16] > 0.8  # a quarter counterclockwise: left becomes bottom
    assert got_FCHW[0, 0, 4, 16] < 0.2

    half = Image.new("RGBA", (32, 32), (255, 255, 255, 0))
    half.paste((255, 255, 255, 255), (0, 0, 16, 32))
    half.save(tmp_path / "a.gif", save_all=True, append_images=[half.rotate(180)] * 7, duration=120, disposal=2)
    got_FCHW = read_video(tmp_path / "a.gif", frames=4, size=32, fps=FPS)
    assert got_FCHW[0].amax() > 0.9
    assert got_FCHW[0].amin() < 0.1  # transparent white is black


@pytest.mark.parametrize(("codec", "options"), [("libvpx-vp9", {}), ("libvpx", {"auto-alt-ref": "0"})])
def test_the_transparency_of_webm_is_honoured(tmp_path: Path, codec: str, options: dict[str, str]) -> None:
    frames_FCHW = torch.ones(8, 4, 32, 32)
    frames_FCHW[:4, 3, :, :16] = 0  # white under it; first the left side is transparent, then the right one
    frames_FCHW[4:, 3, :, 16:] = 0
    write_video(tmp_path / "a.webm", frames_FCHW, codec=codec, format="yuva420p", options=options)
    got_FCHW = read_video(tmp_path / "a.webm", frames=8, size=32, fps=FPS)
    for half, kept in ((got_FCHW[:4], slice(20, 32)), (got_FCHW[4:], slice(0, 12))):
        assert half[..., kept].amin() > 0.9
        assert half.mean() < 0.6


@pytest.mark.parametrize(
    ("name", "codec", "format"), [("a.webm", "libvpx-vp9", "yuv420p"), ("a.avi", "mpeg4", "yuv420p")]
)
def test_webm_and_avi_are_read_by_time(tmp_path: Path, name: str, codec: str, format: str) -> None:
    write_video(tmp_path / name, ramp(16), codec=codec, format=format)  # 8 a second
    assert numbers(read_video(tmp_path / name, frames=4, size=16, fps=4), 16) == [5, 7, 9, 11]


def test_a_gif_loops_keeps_its_frames_and_is_read_as_a_video(tmp_path: Path) -> None:
    data = gif_bytes(ramp(8, 16, 16), fps=10, scale=2)
    with Image.open(io.BytesIO(data)) as image:
        assert (image.size, image.n_frames, image.info["loop"], image.info["duration"]) == ((32, 32), 8, 0, 100)
    (tmp_path / "a.gif").write_bytes(data)
    assert numbers(read_video(tmp_path / "a.gif", frames=8, size=16, fps=10), 8) == list(range(8))


def test_files_that_are_no_videos_are_refused_by_name(tmp_path: Path) -> None:
    write_mp4(tmp_path / "good.mp4", torch.rand(16, 3, 32, 32), FPS)
    write_video(tmp_path / "good.mkv", torch.rand(16, 3, 32, 32))
    whole = {name: (tmp_path / name).read_bytes() for name in ("good.mp4", "good.mkv")}
    image = io.BytesIO()
    Image.new("RGB", (32, 32)).save(image, "PNG")
    bad = {
        "cut.mp4": whole["good.mp4"][: len(whole["good.mp4"]) * 2 // 3],
        "cut.mkv": whole["good.mkv"][: len(whole["good.mkv"]) * 2 // 3],
        "text.mp4": b"this is a text\n" * 50,
        "list.mp4": b"ffconcat version 1.0\nfile good.mp4\n",  # a playlist would open another file
        "image.mp4": image.getvalue(),
        "empty.mp4": b"",
        "zeros.mp4": bytes(5000),
    }
    for name, content in bad.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "folder.mp4").mkdir()
    for name in [*bad, "folder.mp4", "missing.mp4"]:
        with pytest.raises(VideoError, match=name) as caught:
            read_video(tmp_path / name, frames=4, size=16, fps=FPS)
        assert "\n" not in str(caught.value)
    assert read_video(tmp_path / "good.mkv", frames=16, size=16, fps=FPS).shape == (16, 3, 16, 16)


def test_odd_sizes_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="even height and width; got 15 x 16"):
        write_mp4(tmp_path / "a.mp4", torch.rand(2, 3, 15, 16), FPS)
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------------------------- encoded clips


def test_every_epoch_is_a_permutation_whatever_was_asked_before() -> None:
    serials = list(range(35))
    forward = [clip_index(s, 7, seed=3) for s in serials]
    clip_index.__globals__["_order"].cache_clear()
    backward = [clip_index(s, 7, seed=3) for s in reversed(serials)][::-1]
    assert forward == backward
    epochs = [forward[i : i + 7] for i in range(0, 35, 7)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert len(set(map(tuple, epochs))) > 1
    assert forward != [clip_index(s, 7, seed=4) for s in serials]
    with pytest.raises(ValueError, match="and count at 1"):
        clip_index(0, 0, seed=0)


def test_built_in_clips_belong_to_their_index() -> None:
    first = [rendered_clip(5, i, 4, 16) for i in range(40)]
    caption, frames_FCHW = rendered_clip(5, 7, 4, 16)
    assert caption == first[7][0]
    assert torch.equal(frames_FCHW, first[7][1])
    subjects = {read_caption(caption).subject for caption, _ in first}
    assert subjects == set(PROMPT_SETS["in_domain"])
    assert len({caption for caption, _ in first}) > 30


def write_folder(
    out: Path, tables: Iterable[pa.Table], made_with: dict, skipped: Iterable[Skipped] = (), **meta: str
) -> int:
    with ClipWriter(out, made_with) as writer:
        for table in tables:
            writer.add(table)
        return writer.finish({"fingerprint": digest(made_with), **meta}, list(skipped))


@pytest.fixture(scope="module")
def encoded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict, pa.Table]:
    """A folder in two parts: eight clips of a tiny model, over and over; every sixth of eight cannot be read."""
    model = tiny_model(frames=2, size=8)

    def read(item: dict, model: VideoModel) -> tuple[str, torch.Tensor]:
        if item["index"] == 5:
            raise VideoError("clip 5: is cut off")
        return read_rendered(0, item, model)

    eight = encode_items(model, [{"index": i, "source": f"clip {i}", "caption": ""} for i in range(8)], read)
    table = pa.concat_tables([eight] * 40).set_column(0, "index", pa.array(range(320)))
    made_with = {"size": 8, "weights": "abc"}
    out = tmp_path_factory.mktemp("encoded") / "clips"
    assert write_folder(out, [table.slice(0, 150), table.slice(150)], made_with, model_fingerprint="m") == 280
    return out, made_with, table


def test_encoded_clips_are_what_the_model_said(encoded: tuple[Path, dict, pa.Table]) -> None:
    clips = EncodedClips.open(encoded[0], "m")
    model = tiny_model(frames=2, size=8)
    assert len(clips) == 280
    indices = [279, 0, 5, 0, 256]  # position 5 is clip 6, since clip 5 could not be read
    captions, text_BLD, posterior = clips.fetch(indices)
    drawn = [rendered_clip(0, i, 2, 8) for i in (7, 0, 6, 0, 4)]
    assert captions == [caption for caption, _ in drawn] == [clips.captions[i] for i in indices]
    want = model.encode_frames(torch.stack([frames for _, frames in drawn]))
    torch.testing.assert_close(posterior.mean, want.mean, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(posterior.std, want.std, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(text_BLD, model.encode_prompts(captions), atol=1e-5, rtol=1e-5)
    assert posterior.mean.shape[1:] == model.latent_shape == tuple(clips.meta["latent_shape"])
    assert posterior.sample(torch.ones_like(posterior.mean)).isfinite().all()
    for wrong in ([280], [-1], []):
        with pytest.raises(ValueError, match="allowed positions are 0 to 279"):
            clips.fetch(wrong)


def test_plain_arrow_reads_encoded_clips_and_the_report_names_the_rest(encoded: tuple[Path, dict, pa.Table]) -> None:
    out, _, table = encoded
    assert sorted(p.name for p in out.iterdir()) == [
        "meta.json", "part-00000.parquet", "part-00001.parquet", "report.json", "report.txt"
    ]  # fmt: skip
    row = pq.read_table(out / "part-00000.parquet").slice(3, 1).to_pylist()[0]
    mean = np.frombuffer(row["mean"], "<f4").reshape(row["latent_shape"])
    assert mean.shape == (4, 2, 4, 4)
    assert row["mean"] == table["mean"][3].as_py()
    skipped = json.loads((out / "report.json").read_text())["skipped"]
    assert skipped == [{"path": "clip 5", "reason": "clip 5: is cut off"}] * 40
    assert "clip 5: is cut off" in (out / "report.txt").read_text()


def test_a_folder_is_reused_replaced_or_refused(encoded: tuple[Path, dict, pa.Table], tmp_path: Path) -> None:
    source, made_with, table = encoded
    out = tmp_path / "clips"
    assert not is_reusable(out, made_with)
    shutil.copytree(source, out)
    assert is_reusable(out, made_with)
    with pytest.raises(ValueError, match=r"size 8 there, 16 now.*delete it or name another folder"):
        is_reusable(out, {**made_with, "size": 16})
    (out / "meta.json").unlink()
    assert not is_reusable(out, made_with)
    assert write_folder(out, [table.slice(0, 3)], made_with) == 3
    assert len(EncodedClips.open(out)) == 3
    assert list(tmp_path.iterdir()) == [out]
    (out / "meta.json").unlink()
    (out / "thesis.doc").touch()
    with pytest.raises(ValueError, match=r"is no folder of encoded clips \(it has thesis.doc\)"):
        is_reusable(out, made_with)
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="cannot be written"):
        write_folder(tmp_path / "file" / "clips", [table], made_with)
    with pytest.raises(ValueError, match="none of the 1 clips can be read: clip 5: is cut off"):
        write_folder(tmp_path / "none", [table.slice(5, 1)], made_with)
    assert {path.name for path in tmp_path.iterdir()} == {"clips", "file"}


class Killed(BaseException):
    """What no code of ours catches."""


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_an_encoding_killed_at_any_write_goes_on_to_the_same_bytes(
    encoded: tuple[Path, dict, pa.Table], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, made_with, table = encoded
    monkeypatch.setattr(writing, "_ROWS_IN_PART", 5)
    batches = [table.slice(start, 3) for start in (0, 6, 3, 15, 12, 9)]  # in the order in which workers finish
    skipped = [Skipped(Path("notes.txt"), "not a video")]
    assert write_folder(tmp_path / "whole", [table.slice(0, 18)], made_with, skipped) == 16
    want = contents(tmp_path / "whole")
    assert {"part-00000.parquet", "part-00003.parquet", "report.json"} < want.keys()

    replace, writes = os.replace, [0, 0]  # so many are left before the kill; made in all

    def replace_or_die(*paths: Path) -> None:
        if writes[0] == 0:
            raise Killed
        writes[0], writes[1] = writes[0] - 1, writes[1] + 1
        replace(*paths)

    def run(out: Path) -> int:
        """Encodes what is left; how many clips that is."""
        with ClipWriter(out, made_with) as writer:
            left = [b.filter([i not in writer.done for i in b["index"].to_pylist()]) for b in batches]
            for batch in left:
                writer.add(batch)
            writer.finish({"fingerprint": digest(made_with)}, skipped)
        return sum(batch.num_rows for batch in left)

    monkeypatch.setattr(writing.os, "replace", replace_or_die)
    kills = 0
    while True:
        out = tmp_path / f"killed-{kills}"
        writes[:] = [kills, 0]
        try:
            run(out)
            break
        except Killed:
            kept = {i for p in (tmp_path / f"{out.name}.unfinished").glob("*-*") for i in indices_in(p)}
            writes[0] = 10**6
            assert run(out) == 18 - len(kept)  # nothing twice
            assert contents(out) == want
            assert not out.with_name(f"{out.name}.unfinished").exists()
        kills += 1
    assert contents(out) == want
    assert kills > 12  # plan, six batches, two of them with errors, four parts, meta.json


def indices_in(path: Path) -> list[int]:
    if path.suffix == ".tmp":
        return []
    rows = json.loads(path.read_text()) if path.suffix == ".json" else pq.ParquetFile(path).read().to_pylist()
    return [row["index"] for row in rows]


def test_an_unfinished_encoding_takes_the_same_clips_only(encoded: tuple[Path, dict, pa.Table], tmp_path: Path) -> None:
    _, made_with, table = encoded
    out, work = tmp_path / "clips", tmp_path / "clips.unfinished"
    with ClipWriter(out, made_with) as writer:
        writer.add(table.slice(0, 8))
        with pytest.raises(ValueError, match=r"clips: another process .* is encoding into it"):
            ClipWriter(out, made_with)
    assert not out.exists()
    with pytest.raises(ValueError, match=r"clips.unfinished: holds an unfinished encoding .*\(size 8 there, 16 now\)"):
        ClipWriter(out, {**made_with, "size": 16})
    with ClipWriter(out, made_with) as writer:
        assert writer.done == set(range(8))
    rows = work / "rows-000000000.parquet"
    rows.write_bytes(rows.read_bytes()[:-50])
    with pytest.raises(ValueError, match=r"rows-000000000.parquet is damaged .*delete .*clips.unfinished"):
        ClipWriter(out, made_with)
    rows.unlink()
    for name, content in {
        "skipped-000000000.json": '[{"index": "first"}]', "skipped-000000008.json": "", "plan.json": "[]",
    }.items():  # fmt: skip
        (work / name).write_text(content)
        with pytest.raises(ValueError, match=rf"{name} is damaged .*delete .*clips.unfinished") as error:
            ClipWriter(out, made_with)
        assert "\n" not in str(error.value)
        (work / name).unlink()
        (work / "plan.json").write_text(json.dumps(made_with))
    (work / "plan.json").unlink()
    (work / "rows-000000000.parquet").touch()
    with pytest.raises(ValueError, match=r"clips\.unfinished: is in the way"):
        ClipWriter(out, made_with)


@pytest.mark.parametrize("content", ["", "[]", '{"clips": 2}', '{"clips": 2, "skipped": [{"path": 3}]}'])
def test_a_damaged_report_of_clips_is_named(content: str, tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text(content)
    with pytest.raises(ValueError, match=r"report\.json is damaged .*encode again") as error:
        writing.read_report(tmp_path)
    assert "\n" not in str(error.value)


def test_a_report_of_clips_holds_a_name_that_is_not_utf8(tmp_path: Path) -> None:
    skipped = [Skipped(Path("a\udcff.mp4"), "its name is not UTF-8")]
    writing._write_report(tmp_path, 5, skipped, [])
    assert writing.read_report(tmp_path) == (5, skipped)


def test_the_base_models_samples_belong_to_their_index() -> None:
    model, sampling = tiny_model(), SamplingConfig(steps=3)
    read = BaseSampler(7, sampling)
    prompts = ["a dog", "a red star", "a dog"]
    items = [{"index": i, "source": f"sample {i}", "caption": prompt} for i, prompt in enumerate(prompts)]
    table = encode_items(model, items, read)
    assert table["caption"].to_pylist() == prompts
    assert table["error"].null_count == 3
    got = torch.stack([torch.frombuffer(bytearray(m), dtype=torch.float32) for m in table["mean"].to_pylist()])
    noise = normal(model.latent_shape, 7, "base-sample", [(i,) for i in range(3)])
    text = model.encode_prompts(prompts)
    want = denoise(model, noise, text, timesteps(3), guidance=sampling.guidance)
    torch.testing.assert_close(got, want.flatten(1), atol=1e-5, rtol=1e-5)
    assert (got[0] - got[2]).abs().max() > 0.1  # one prompt, two samples
    assert not any(std.strip(b"\0") for std in table["std"].to_pylist())
    alone = encode_items(model, items[2:], read)
    assert alone["mean"][0] == table["mean"][2]


def test_a_sample_that_is_not_finite_is_left_out_and_named() -> None:
    model = tiny_model()
    torch.nn.init.constant_(model.denoiser.conv_out.weight, torch.inf)
    items = [{"index": 0, "source": "sample 0/0", "caption": "a dog"}]
    table = encode_items(model, items, BaseSampler(0, SamplingConfig(steps=2)))
    assert "sample 0/0: the model's latents are not finite" in table["error"][0].as_py()


def test_prompts_of_samples_go_round(tmp_path: Path) -> None:
    path = tmp_path / "p.txt"
    path.write_text("a\nb\nc\n")
    data = {"source": "samples", "count": 5}
    assert sample_prompts(parse_config({"data": data | {"prompts": str(path)}})) == ["a", "b", "c", "a", "b"]
    drawn = sample_prompts(parse_config({"data": data}))
    assert drawn == resolve_prompts("in_domain", 5, 0)
    assert drawn != sample_prompts(parse_config({"data": data, "seed": 1}))
    assert len(set(sample_prompts(parse_config({"data": data | {"prompts": "scenes"}})))) == 5
    with pytest.raises(ValueError, match="'in_domains' is neither a file of prompts nor a built-in set"):
        sample_prompts(parse_config({"data": data | {"prompts": "in_domains"}}))
    config = parse_config({"data": data})
    kept = samples_made_with(drawn, 0, config.sampling, config.model)
    for changed in (
        samples_made_with(drawn[::-1], 0, config.sampling, config.model),
        samples_made_with(drawn, 1, config.sampling, config.model),
        samples_made_with(drawn, 0, SamplingConfig(guidance=1), config.model),
    ):
        assert digest(changed) != digest(kept)


def test_a_run_goes_on_with_its_own_clips_only(encoded: tuple[Path, dict, pa.Table], tmp_path: Path) -> None:
    clips, made_with, table = encoded
    run, others = tmp_path / "run", tmp_path / "others"
    write_folder(others, [table.slice(0, 3)], {**made_with, "prompts": "edited"})
    run.mkdir()
    record_clips(run, others)
    record_clips(run, clips)  # nothing has been trained yet
    (run / "archive").mkdir()
    record_clips(run, clips)
    with pytest.raises(ValueError, match=r"run 'run' began with other clips than those in .*others now are"):
        record_clips(run, others)


def test_captions_and_prompts_of_the_guard_that_are_cut_are_counted(
    encoded: tuple[Path, dict, pa.Table], tmp_path: Path
) -> None:
    clips = encoded[0]
    (tmp_path / "p.csv").write_text("prompt\n" + "".join(f"{'wall ' * count}\n" for count in (1, 2, 30, 40)))
    guard = {"every": 20, "prompts": str(tmp_path / "p.csv")}
    (line,) = cut_captions(parse_config({"guard": guard, "output": {"checkpoint_every": 20}}), clips)
    assert line.startswith("2 of 4 different guard.prompts are longer than 24 tokens")
    assert cut_captions(parse_config({}), clips) == []


def break_meta(folder: Path) -> None:
    (folder / "meta.json").write_text("{")


def drop_column(folder: Path) -> None:
    path = folder / "part-00000.parquet"
    pq.write_table(pq.read_table(path).drop_columns(["std"]), path)


def cut_part(folder: Path) -> None:
    path = folder / "part-00001.parquet"
    path.write_bytes(path.read_bytes()[:-100])


def break_page(folder: Path) -> None:
    path = folder / "part-00001.parquet"
    content = bytearray(path.read_bytes())
    content[4:60] = bytes(56)
    path.write_bytes(content)


def break_caption(folder: Path) -> None:
    path = folder / "part-00001.parquet"
    table = pq.read_table(path)
    broken = pa.array([b"caf\xe9"] * len(table)).view(pa.string())
    pq.write_table(table.set_column(2, "caption", broken), path)


@pytest.mark.parametrize(
    ("harm", "fingerprint", "complaint"),
    [
        (shutil.rmtree, None, "no such folder"),
        (lambda f: (f / "meta.json").unlink(), None, "has no meta.json"),
        (break_meta, None, "meta.json is damaged"),
        (drop_column, None, "lacks std; columns found: index, source"),
        (cut_part, None, "part-00001.parquet is damaged"),
        (break_page, None, "clips is damaged"),
        (break_caption, None, "clips is damaged"),
        (lambda f: (f / "part-00001.parquet").unlink(), None, "holds 256 clips where meta.json says 280"),
        (lambda f: [p.unlink() for p in f.glob("part-*")], None, "holds 0 clips"),
        (lambda f: None, "other", "encoded with another model or size .size 8, weights abc"),
    ],
)
def test_bad_folders_are_refused(
    encoded: tuple[Path, dict, pa.Table],
    tmp_path: Path,
    harm: Callable[[Path], object],
    fingerprint: str | None,
    complaint: str,
) -> None:
    folder = shutil.copytree(encoded[0], tmp_path / "clips")
    harm(folder)
    with pytest.raises(ValueError, match=complaint) as caught:
        EncodedClips.open(folder, fingerprint)
    assert "\n" not in str(caught.value)


# ------------------------------------------------------------------------------------------- archive


def make_samples(first: int, count: int = 2, size: int = 16) -> Samples:
    return Samples(
        serials=list(range(first, first + count)),
        prompts=[f"prompt {i}" for i in range(count)],
        frames_BSCHW=torch.rand(count, 3, 3, size, size) * 1.2 - 0.1,
        frames_BS=torch.tensor([[0, 3, 6]] * count),
        scores_BS=torch.rand(count, 3),
        reward_B=torch.tensor([0.5] * count),
    )


def open_writer(folder: Path) -> ArchiveWriter:
    return ArchiveWriter(folder, "run", "instructvideo", "c0ffee", 7, FPS, model="builtin")


def test_the_archive_comes_back(tmp_path: Path) -> None:
    samples = {(step, rank): make_samples(4 * step + 2 * rank) for step in range(3) for rank in range(2)}
    with open_writer(tmp_path) as writer:
        for (step, rank), each in samples.items():
            writer.write(step, rank, each, held_out_B=torch.tensor([0.25, 0.75]) if step else None)
    table = read_archive(tmp_path)
    assert table.schema.equals(SCHEMA)
    assert table["serial"].to_pylist() == list(range(12))
    row = table.to_pylist()[7]
    kept = samples[1, 1]
    assert (row["run"], row["step"], row["rank"], row["prompt"]) == ("run", 1, 1, "prompt 1")
    assert (row["algorithm"], row["config_hash"], row["seed"], row["model"]) == (
        "instructvideo",
        "c0ffee",
        7,
        "builtin",
    )
    assert (row["reward"], row["held_out"], row["fps"], row["frame_indices"]) == (0.5, 0.75, FPS, [0, 3, 6])
    assert row["scores"] == kept.scores_BS[1].tolist()
    assert table["held_out"].to_pylist()[:4] == [None] * 4
    pixels = np.stack([np.asarray(Image.open(io.BytesIO(png))) for png in row["frames"]])
    want = (kept.frames_BSCHW[1].clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).numpy()
    np.testing.assert_array_equal(pixels, want)
    assert min(p.name for p in tmp_path.iterdir()) == "step-000000-rank-000.parquet"


def test_duckdb_and_arrow_read_the_archive_without_rlvid(tmp_path: Path) -> None:
    with open_writer(tmp_path) as writer:
        for step in range(3):
            writer.write(step, 0, make_samples(2 * step))
    found = duckdb.sql(
        f"select step, count(*), avg(reward), sum(len(frames)) from '{tmp_path}/*.parquet' group by step order by step"
    ).fetchall()
    assert found == [(0, 2, 0.5, 6), (1, 2, 0.5, 6), (2, 2, 0.5, 6)]
    ((png,),) = duckdb.sql(f"select frames[2] from '{tmp_path}/*.parquet' where serial = 3").fetchall()
    assert Image.open(io.BytesIO(png)).size == (16, 16)
    assert pq.read_table(tmp_path).num_rows == 6


def test_a_resumed_run_overwrites_and_trims(tmp_path: Path) -> None:
    folder = tmp_path / "archive"
    assert trim(folder, 0) == 0
    with open_writer(folder) as writer:
        for step in range(4):
            for rank in range(2):
                writer.write(step, rank, make_samples(0))
    with open_writer(folder) as writer:
        writer.write(3, 1, make_samples(90))
    assert read_archive(folder).num_rows == 16
    assert read_archive(folder, ["serial", "step"]).to_pylist()[-1] == {"serial": 91, "step": 3}
    (folder / ".step-000001-rank-000.parquet.12.tmp").touch()  # of a killed process
    assert trim(folder, 2) == 5
    assert sorted(set(read_archive(folder)["step"].to_pylist())) == [0, 1]
    assert len(list(folder.iterdir())) == 4


def test_a_full_disk_is_told_once_and_loses_nothing_else(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    writer = open_writer(tmp_path)
    writer.write(0, 0, make_samples(0))
    writer._pending[0][0].result()  # on disk, before the disk is full
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))  # a real write error, at 20 kB a file
    try:
        writer.write(1, 0, make_samples(2, size=128))
        wait([part for part, _ in writer._pending])
        with pytest.raises(OSError, match=r"step-000001-rank-000\.parquet could not be written \(File too large\)"):
            writer.write(2, 0, make_samples(4))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    writer.write(3, 0, make_samples(6))
    writer.close()
    writer.close()
    assert read_archive(tmp_path)["step"].to_pylist() == [0, 0, 3, 3]
    assert len(list(tmp_path.iterdir())) == 2  # no half-written part
    with pytest.raises(ValueError, match="closed"):
        writer.write(4, 0, make_samples(8))


def test_a_folder_that_vanishes_is_told_at_the_end(tmp_path: Path) -> None:
    folder = tmp_path / "archive"
    writer = open_writer(folder)
    folder.rmdir()
    folder.touch()
    writer.write(0, 0, make_samples(0))
    with pytest.raises(OSError, match="Not a directory"):
        writer.close()
    with pytest.raises(ValueError, match="cannot be made"):
        open_writer(folder / "below")


def test_bad_samples_and_foreign_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no parts"):
        read_archive(tmp_path)
    samples = make_samples(0)
    with open_writer(tmp_path) as writer:
        with pytest.raises(ValueError, match=r"differ in length.*'serial': 1, 'prompt': 2"):
            writer.write(0, 0, Samples(**{**vars(samples), "serials": [0]}))
        writer.write(0, 0, samples)
    with pytest.raises(ValueError, match="no column 'frame'; allowed: run, step"):
        read_archive(tmp_path, ["frame"])
    pq.write_table(pa.table({"step": [1]}), tmp_path / "step-000001-rank-000.parquet")
    with pytest.raises(ValueError, match=r"step-000001-rank-000\.parquet: is not a part"):
        read_archive(tmp_path)
    (tmp_path / "step-000001-rank-000.parquet").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match=r"step-000001-rank-000\.parquet: is not a part"):
        read_archive(tmp_path)

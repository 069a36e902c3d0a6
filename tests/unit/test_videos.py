"""Videos are read by time, cut and turned as players show them, and written; no Ray."""

import io
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import pytest
import torch
from PIL import Image

from rlvid.config import parse_config
from rlvid.data.sources import rendered_clip
from rlvid.data.videos import VideoError, read_video
from rlvid.plots.video import gif_bytes, shrunk, write_mp4
from rlvid.train import worker

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
        (8, 16, None, 4, [2, 6, 10, 14]),  # from end to end
        (8, 2, None, 4, [0, 0, 1, 1]),  # the same, with too few frames
    ],
)
def test_frames_are_chosen_by_time(
    tmp_path: Path, rate: int, count: int, fps: float | None, frames: int, expected: list[int]
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


def test_large_frames_are_shrunk_by_averages_and_small_ones_stay() -> None:
    small = torch.rand(2, 3, 3, 256, 96)
    assert shrunk(small, 256) is small
    large = torch.rand(2, 3, 3, 512, 64)
    means = large.unflatten(-1, (32, 2)).unflatten(-3, (256, 2)).mean((-1, -3))
    torch.testing.assert_close(shrunk(large, 256), means)
    assert shrunk(torch.rand(1, 2, 3, 480, 832), 256).shape == (1, 2, 3, 148, 256)
    assert shrunk(torch.rand(1, 2, 3, 2, 832), 256).shape == (1, 2, 3, 1, 256)


@pytest.mark.parametrize(("size", "shown"), [((480, 832), (148, 256)), ((256, 32), (256, 32))])
def test_tensorboard_gets_videos_of_256_pixels_at_most(
    size: tuple[int, int], shown: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    made, sent, written = torch.rand(2, 2, 3, *size), list[torch.Tensor](), list[torch.Tensor]()

    def gather(gathered: list[torch.Tensor], mine: torch.Tensor) -> None:
        sent.append(mine)
        gathered[:] = [mine] * len(gathered)

    monkeypatch.setattr(worker, "generate", lambda *_, **__: made)
    monkeypatch.setattr(worker.distributed, "all_gather_object", gather)
    board = SimpleNamespace(video=lambda *given: written.append(given[2]), flush=lambda: None)
    rank = SimpleNamespace(
        _prompts=["a", "b"], world=1, rank=0, config=parse_config({}), model=SimpleNamespace(fps=8), tensorboard=board
    )
    worker.Worker._show_videos(rank, 0)  # type: ignore[arg-type]
    assert sent[0].shape == (2, 2, 3, *shown), "the workers send each other small frames"
    assert [clip.shape for clip in written] == [(2, 3, *shown)] * 2
    assert size != shown or torch.equal(torch.stack(written), made)


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

"""A clip is read as players show it, or refused with the reason."""

from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from av.video.reformatter import ColorPrimaries, ColorTrc
from torch import Tensor

from rlvid.data.videos import VideoError, read_video

FPS = 8


def quarters(height: int = 32, width: int = 32) -> np.ndarray:
    """Red above, green on the left: yellow, red, green and black tell every orientation."""
    pixels_HWC = np.zeros((height, width, 3), np.uint8)
    pixels_HWC[: height // 2, :, 0] = pixels_HWC[:, : width // 2, 1] = 255
    return pixels_HWC


def flat(colour: tuple[int, int, int], height: int = 32, width: int = 32) -> np.ndarray:
    return np.full((height, width, 3), colour, np.uint8)


def add(container: Any, codec: str, shape: tuple[int, ...], format: str, **settings: Any) -> Any:
    stream = container.add_stream(codec, rate=FPS)
    stream.height, stream.width, stream.pix_fmt = shape[0], shape[1], format
    for name, value in settings.items():
        setattr(stream.codec_context, name, value)
    return stream


def put(container: Any, stream: Any, pixels_HWC: np.ndarray, count: int, start: int = 0) -> None:
    for index in range(count):
        frame = av.VideoFrame.from_ndarray(pixels_HWC, format="rgb24")
        frame.time_base, frame.pts = Fraction(1, FPS), start + index
        container.mux(stream.encode(frame))
    container.mux(stream.encode(None))


def write(
    path: Path,
    pixels_HWC: np.ndarray,
    *,
    codec: str = "libx264",
    format: str = "yuv444p",
    count: int = 16,
    start: int = 0,
    turn: tuple[int, bool, bool] | None = None,
    file_options: dict[str, str] | None = None,
    **settings: Any,
) -> Path:
    with av.open(path, "w", options=file_options or {}) as container:
        stream = add(container, codec, pixels_HWC.shape, format, **settings)
        if turn:
            stream.set_display_rotation(turn[0], hflip=turn[1], vflip=turn[2])
        put(container, stream, pixels_HWC, count, start)
    return path


def read(path: Path, size: int = 32) -> Tensor:
    return read_video(path, frames=4, size=size, fps=FPS)[0]


def corners(frame_CHW: Tensor) -> np.ndarray:
    """(2, 2, 2): red and green of the four quarters, 0 or 1."""
    where = [frame_CHW.shape[1] // 4, 3 * frame_CHW.shape[1] // 4]
    return frame_CHW[:2, where][:, :, where].permute(1, 2, 0).round().int().numpy()


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
@pytest.mark.parametrize("flips", [(False, False), (True, False), (False, True)])
@pytest.mark.parametrize("degrees", [0, 90, 180, 270])
def test_all_orientations_of_the_display_matrix(
    tmp_path: Path, degrees: int, flips: tuple[bool, bool], suffix: str
) -> None:
    pixels_HWC = quarters()
    got = corners(read(write(tmp_path / f"a{suffix}", pixels_HWC, turn=(degrees, *flips))))
    wanted = np.rot90(pixels_HWC[8::16, 8::16, :2] // 255, degrees // 90)
    wanted = wanted[:, ::-1] if flips[0] else wanted
    wanted = wanted[::-1] if flips[1] else wanted
    assert got.tolist() == wanted.tolist()


def test_other_turns_are_refused(tmp_path: Path) -> None:
    with pytest.raises(VideoError, match=r"a\.mp4: is turned by other than quarter turns"):
        read(write(tmp_path / "a.mp4", quarters(), turn=(30, False, False)))


def test_a_matrix_of_zeros_is_none(tmp_path: Path) -> None:
    path = write(tmp_path / "a.mp4", quarters())
    content = path.read_bytes()
    at = content.index(b"tkhd") + 44
    path.write_bytes(content[:at] + bytes(32) + content[at + 32 :])
    assert corners(read(path)).tolist() == (quarters()[8::16, 8::16, :2] // 255).tolist()


def test_stored_pixels_that_are_not_square_keep_their_shape_when_turned(tmp_path: Path) -> None:
    """A square on the screen, stored at half its width, with black beside it once it is turned."""
    pixels_HWC = flat((0, 0, 0), 64, 64)  # on the screen 128 wide and 64 high
    pixels_HWC[16:48, 24:40] = 255  # on the screen 32 x 32, in the middle
    path = write(tmp_path / "a.mp4", pixels_HWC, turn=(90, False, False), sample_aspect_ratio=Fraction(2, 1))
    whole = read_video(path, frames=4, size=lambda frames_FCHW: frames_FCHW, fps=FPS)[0]
    assert whole.shape == (3, 91, 45), "as many pixels as are stored"
    for frame in (read(path, size=64), whole):
        bright = frame[0] > 0.5
        assert abs(int(bright.any(1).sum()) - int(bright.any(0).sum())) <= 2


@pytest.mark.parametrize("suffix", [".mp4", ".mov", ".mkv", ".webm"])
def test_time_need_not_begin_at_zero(tmp_path: Path, suffix: str) -> None:
    codec = "libvpx-vp9" if suffix == ".webm" else "libx264"
    path = write(tmp_path / f"a{suffix}", quarters(), codec=codec, format="yuv420p", start=10 * FPS)
    assert corners(read(path)).tolist() == (quarters()[8::16, 8::16, :2] // 255).tolist()


def test_a_fragmented_recording_may_begin_late(tmp_path: Path) -> None:
    fragments = {"movflags": "frag_keyframe+empty_moov"}
    assert read(write(tmp_path / "a.mp4", quarters(), start=10 * FPS, file_options=fragments)).amax() > 0.9


def test_a_cut_off_film_that_begins_late_is_still_found(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
    path = write(tmp_path / "a.mkv", noise, count=80, start=10 * FPS, codec="mjpeg", format="yuvj444p")
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(VideoError, match=r"a\.mkv: (is cut off|frame \d+ is damaged)"):
        read(path)


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
@pytest.mark.parametrize("first", [True, False])
def test_the_film_is_read_beside_a_picture(tmp_path: Path, suffix: str, first: bool) -> None:
    path = tmp_path / f"a{suffix}"
    red, blue = flat((255, 0, 0)), flat((0, 0, 255))
    with av.open(path, "w") as container:
        order = [(red, 1), (blue, 16)] if first else [(blue, 16), (red, 1)]
        streams = [add(container, "libx264", red.shape, "yuv444p") for _ in order]
        for stream, (pixels, count) in zip(streams, order, strict=True):
            put(container, stream, pixels, count)
    assert read(path).mean((1, 2)).round().tolist() == [0, 0, 1]


def test_a_cover_alone_is_no_video(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    with av.open(path, "w") as container:
        cover = add(container, "mjpeg", (32, 32), "yuvj420p")
        cover.disposition = av.stream.Disposition.attached_pic
        put(container, cover, flat((255, 0, 0)), 1)
    with pytest.raises(VideoError, match=r"a\.mp4: has no video stream, only a cover picture"):
        read(path)


@pytest.mark.parametrize(
    ("curve", "name"),
    [(ColorTrc.SMPTE2084, r"HDR \(PQ\)"), (ColorTrc.ARIB_STD_B67, r"HDR \(HLG\)"), (ColorTrc.LINEAR, "linear light")],
)
def test_hdr_and_other_curves_are_refused(tmp_path: Path, curve: int, name: str) -> None:
    with pytest.raises(VideoError, match=rf"a\.mp4: is stored as {name}"):
        read(write(tmp_path / "a.mp4", quarters(), color_trc=curve))


def test_dolby_vision_without_a_common_base_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.mp4", quarters(), codec="mpeg4", format="yuv420p")
    assert read(path).amax() > 0.9
    options = {"x265-params": "log-level=none"}
    with av.open(tmp_path / "b.mp4", "w") as container:
        stream = add(container, "libx265", (32, 32), "yuv444p", options=options, codec_tag="hvc1")
        put(container, stream, quarters(), 16)
    path = tmp_path / "b.mp4"
    assert read(path).amax() > 0.9
    path.write_bytes(path.read_bytes().replace(b"hvc1", b"dvh1"))
    with pytest.raises(VideoError, match=r"b\.mp4: is stored as HDR \(Dolby Vision\)"):
        read(path)


def test_a_colour_matrix_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(VideoError, match=r"a\.mkv: has colour matrix 8"):
        read(write(tmp_path / "a.mkv", quarters(), codec="ffv1", colorspace=8))


def test_a_wide_gamut_is_converted(tmp_path: Path) -> None:
    """ITU-R BT.2087: white stays; a BT.709 red, stored in the primaries of BT.2020, comes back."""
    red = np.array([0.6274, 0.0691, 0.0164]) ** (1 / 2.4)  # first column of BT.2087's matrix from 709 to 2020
    for colour, wanted in [((1, 1, 1), (1, 1, 1)), (tuple(red), (1, 0, 0))]:
        pixels = flat(tuple(round(255 * value) for value in colour))
        path = write(
            tmp_path / "a.mkv", pixels, codec="libx264rgb", format="rgb24", color_primaries=ColorPrimaries.BT2020
        )
        assert torch.allclose(read(path).mean((1, 2)), torch.tensor(wanted).float(), atol=0.06)


@pytest.mark.parametrize(("height", "matrix"), [(720, 1), (480, 5)])
def test_the_matrix_that_nobody_named_is_the_one_of_the_size(tmp_path: Path, height: int, matrix: int) -> None:
    pixels = flat((230, 120, 40), height, height)
    frame = av.VideoFrame.from_ndarray(pixels, format="rgb24").reformat(format="yuv444p", dst_colorspace=matrix)
    frame.colorspace = 2
    with av.open(tmp_path / "a.mkv", "w") as container:
        stream = add(container, "ffv1", pixels.shape, "yuv444p")
        for index in range(8):
            frame.time_base, frame.pts = Fraction(1, FPS), index
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    assert torch.allclose(read(tmp_path / "a.mkv").mean((1, 2)), torch.tensor([230, 120, 40]) / 255, atol=0.012)


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".avi"])
def test_a_title_that_is_not_utf8_spoils_no_film(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    with av.open(path, "w") as container:
        container.metadata["title"] = "abcdefgh"
        put(container, add(container, "mpeg4", (32, 32), "yuv420p"), quarters(), 16)
    assert b"abcdefgh" in path.read_bytes()
    path.write_bytes(path.read_bytes().replace(b"abcdefgh", b"\xff\xfecdefgh"))
    assert read(path).amax() > 0.8


def test_a_small_file_cannot_ask_for_any_memory(tmp_path: Path) -> None:
    path = tmp_path / "a.gif"
    with av.open(path, "w") as container:
        put(container, add(container, "gif", (16, 16), "rgb8"), flat((0, 0, 0), 16, 16), 8)
    content = bytearray(path.read_bytes())
    content[6:10] = (60000).to_bytes(2, "little") * 2  # the size of the screen
    path.write_bytes(content)
    with pytest.raises(VideoError, match=r"a\.gif: (has 60000 x 60000 pixels|cannot be decoded)"):
        read(path)


def test_a_strip_is_scaled_in_its_middle_alone(tmp_path: Path) -> None:
    pixels = flat((0, 0, 0), 2, 4096)
    pixels[:, 2032:2064] = 255
    assert read(write(tmp_path / "a.mkv", pixels, codec="ffv1", format="bgr0"), size=32).mean() > 0.9

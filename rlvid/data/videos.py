"""Reads video files at a model's frame rate and size."""

from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from av.error import FFmpegError
from av.stream import Disposition
from torch import Tensor

from rlvid.data.pixels import problem, shown
from rlvid.files import stand_in

# A file named .mp4 may hold anything; a playlist, say, would make FFmpeg open other files.
_OPEN = {"format_whitelist": "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,gif", "protocol_whitelist": "file"}
# FFmpeg's own decoders of these drop the alpha channel, and show what lies under it.
_ALPHA_DECODERS = {"vp8": "libvpx", "vp9": "libvpx-vp9"}
_PICTURES = Disposition.attached_pic | Disposition.still_image | Disposition.timed_thumbnails


class VideoError(ValueError):
    """A file that cannot be read as a video; the message names the file and the reason."""


Resize = Callable[[Tensor], Tensor]
"""A policy that resizes images: (N, C, H, W) in [0, 1] to (N, C, H', W')."""


def read_video(path: str | Path, *, frames: int, size: int | tuple[int, int] | Resize, fps: float | None) -> Tensor:
    """Reads frames from the middle of a video.

    Frames are chosen by their timestamps, so a variable frame rate is fine: F moments, 1 / fps apart, around the middle
    of the clip, and for each the frame on show. A slower clip repeats frames. A clip shorter than F / fps seconds is
    sampled evenly from end to end, as long as it has F frames. Pixels are those that a player shows: of the main video
    stream (not of a cover picture), turned and mirrored by the display matrix, stretched where they are not square, and
    in the colours of BT.709. Transparent pixels are laid on black, the frame is scaled to cover ``size``
    with anti-aliasing, and the middle is cut out. A policy gets the whole frame instead, and of a frame longer than 32
    times its shorter side the middle.

    Args:
        path: mp4, mov, mkv, webm, avi or gif.
        frames: F.
        size: height and width of the result in pixels, one number for both, or a policy that resizes whole frames.
        fps: frames a second of the result; None takes the moments evenly from end to end, and repeats frames of a clip
            that has fewer.

    Returns:
        frames_FCHW, float32 in [0, 1].

    Raises:
        VideoError: missing, empty, damaged, cut off, not a video, too short, HDR, or stored in a way that cannot be
            shown.
    """
    path = Path(path)
    try:
        if not path.is_file() or not path.stat().st_size:
            raise VideoError(f"{path}: {'is empty' if path.is_file() else 'no such file'}")
        index = _main_stream(path)
        starts, end = _timestamps(path, index)
        size = (size, size) if isinstance(size, int) else size
        return _pick(path, index, _choose(starts, end, path, frames, fps), size)
    except VideoError:
        raise
    except (FFmpegError, OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        found = stand_in(path) if isinstance(error, ValueError) else None  # no video at all, says FFmpeg
        raise VideoError(f"{path}: {found or f'cannot be decoded as a video: {reason}'}") from error


def _open(path: Path) -> av.container.InputContainer:
    return av.open(path, options=_OPEN, metadata_errors="replace")  # a title that is not UTF-8 spoils no film


def _main_stream(path: Path) -> int:
    """Returns the index of the stream that a player shows: no cover picture, and no single frame beside a film."""
    with _open(path) as container:
        films = [s for s in container.streams.video if not s.disposition & _PICTURES]
        if not films:
            raise VideoError(f"{path}: has no video stream{', only a cover picture' * bool(container.streams.video)}")
        if len(films) > 1:
            packets = Counter(packet.stream.index for packet in container.demux(films) if packet.size)
            films = [s for s in films if packets[s.index] > 1] or films
        best = container.streams.best("video")
        return (best if best in films else films[0]).index


def _timestamps(path: Path, index: int) -> tuple[np.ndarray, float]:
    """Returns the start of each decodable frame, and the end of the last one, in seconds from the first one."""
    with _open(path) as container:
        stream = container.streams[index]
        assert isinstance(stream, av.VideoStream), "_main_stream chose it"
        tick = float(stream.time_base or 0)
        period = 1 / float(stream.average_rate or stream.guessed_rate or 25)
        pts: list[float] = []
        last = 0.0
        for frame in _decode(container, stream):
            if trouble := problem(frame, stream.codec_context.codec_tag):
                raise VideoError(f"{path}: {f'frame {len(pts)} ' if pts else ''}{trouble}")
            pts.append(len(pts) * period if frame.pts is None else frame.pts * tick)
            last = frame.duration * tick if frame.duration else period
        if not pts:
            raise VideoError(f"{path}: has no frames")
        starts = np.maximum.accumulate(np.array(pts)) - pts[0]
        end = float(starts[-1]) + last
        announced = [stream.duration * tick] if stream.duration else []
        if container.duration and (announced or len(container.streams) == 1):  # else it may be the sound's
            # Matroska counts it from zero, whenever the first frame is shown.
            announced.append(container.duration / av.time_base - max(0.0, pts[0]))
        if announced and end < 0.95 * min(announced) - 0.1:
            raise VideoError(f"{path}: is cut off: {end:.2f} s of {min(announced):.2f} s can be decoded")
    return starts, end


def _decode(container: av.container.InputContainer, stream: av.VideoStream) -> Iterator[av.VideoFrame]:
    """Yields the frames of a video stream, with their alpha channel if there is one."""
    stream.thread_type = "AUTO"
    name = stream.codec_context.name
    if stream.metadata.get("alpha_mode") != "1" or name not in _ALPHA_DECODERS:
        yield from container.decode(stream)
        return
    decoder: Any = av.CodecContext.create(_ALPHA_DECODERS[name], "r")
    for packet in container.demux(stream):
        yield from decoder.decode(packet if packet.size else None)


def _choose(starts: np.ndarray, end: float, path: Path, frames: int, fps: float | None) -> list[int]:
    """Returns the indices of the frames on show at the middles of F equal intervals."""
    step = end / frames
    if fps is not None:
        needed = frames / fps
        if end + 0.5 / fps < needed and len(starts) < frames:
            raise VideoError(
                f"{path}: lasts {end:.2f} s and has {len(starts)} frames; "
                f"needed: {needed:.2f} s ({frames} frames at {fps:g} a second), or {frames} frames"
            )
        step = min(1 / fps, step)
    moments = end / 2 + (np.arange(frames) + 0.5 - frames / 2) * step
    return np.maximum(np.searchsorted(starts, moments + 1e-6, side="right") - 1, 0).tolist()


def _pick(path: Path, index: int, chosen: list[int], size: tuple[int, int] | Resize) -> Tensor:
    """Decodes again and keeps the chosen frames only: a long clip would not fit into memory."""
    kept: dict[int, Tensor] = {}
    with _open(path) as container:
        stream = container.streams[index]
        assert isinstance(stream, av.VideoStream), "_main_stream chose it"
        wanted = set(chosen)
        for number, frame in enumerate(_decode(container, stream)):
            if number in wanted:
                aspect = float(stream.sample_aspect_ratio or 1)
                if callable(size):
                    kept[number] = size(shown(frame, None, aspect)[None])[0]
                else:
                    kept[number] = shown(frame, size, aspect)
            if len(kept) == len(wanted):
                break
    return torch.stack([kept[number] for number in chosen])

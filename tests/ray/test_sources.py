"""From clips of any kind and rewards of the user's own to a tuned model; an encoding that was killed."""

import csv
import io
import json
import os
import subprocess
import sys
import time
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pyarrow.dataset as pads
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from PIL import Image
from processes import HANG, started
from rich.console import Console
from safetensors.torch import load_file

from rlvid.config import RunConfig, load_config
from rlvid.config.model import ModelConfig
from rlvid.data.clips import EncodedClips
from rlvid.data.encode import encode_folder
from rlvid.data.shares import tensors
from rlvid.data.sources import rendered_clip
from rlvid.data.writing import unfinished
from rlvid.plots.video import write_mp4
from rlvid.runs.scalars import read_events
from rlvid.toy.tiny import save_tiny_model
from rlvid.train.launch import train

QUIET = Console(file=io.StringIO())


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds the tiny model, and the runs."""
    folder = tmp_path_factory.mktemp("sources")
    save_tiny_model(folder / "tiny")
    return folder


def config(home: Path, name: str, *overrides: str) -> RunConfig:
    """A run of two steps."""
    return load_config("toy", [
        f"name={name}", f"model.path={home / 'tiny'}", "model.frames=4", "model.size=16", "train.workers=1",
        f"output.storage={home / 'runs'}", "sampling.steps=3", "method.tau=1", "reward.segments=2", "train.steps=2",
        "train.batch_size=2", "train.zero_stage=0", "optimizer.lr=1e-3", "optimizer.warmup=0",
        "output.videos_every=0", *overrides,
    ])  # fmt: skip


def write_video(path: Path, codec: str, form: str, frames_FHWC: np.ndarray, seconds: list[float]) -> None:
    """Frames at their times; the rate is of the codec's book-keeping only."""
    with av.open(path, "w") as container:
        stream = container.add_stream(codec, rate=Fraction(30000, 1001))
        stream.height, stream.width, stream.pix_fmt = *frames_FHWC.shape[1:3], form
        stream.codec_context.time_base = Fraction(1, 30000)
        for pixels, second in zip(frames_FHWC, seconds, strict=True):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgba" if pixels.shape[-1] == 4 else "rgb24")
            frame.pts, frame.time_base = round(second * 30000), Fraction(1, 30000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


MINE = """
def warm(frames, prompts):
    return (frames[:, :, 0] - frames[:, :, 2]).mean((2, 3))
def moving(frames, prompts):
    return frames.diff(dim=1).abs().mean((1, 2, 3, 4))
moving.whole_video = True
"""
GOOD = ("odd.mp4", "portrait.webm", "wide.avi", "uneven.mkv", "animated.gif")


@pytest.fixture(scope="module")
def odd_videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What people have: odd sizes and rates, portrait and wide, transparent, of variable rate, too short, damaged."""
    folder, draw = tmp_path_factory.mktemp("odd"), np.random.default_rng(0)

    def noise(count: int, height: int, width: int, channels: int = 3) -> np.ndarray:
        return draw.integers(0, 256, (count, height, width, channels), dtype=np.uint8)

    ntsc = [index * 1001 / 30000 for index in range(45)]
    write_video(folder / "odd.mp4", "libx264", "yuv444p", noise(45, 33, 47), ntsc)
    write_video(folder / "portrait.webm", "libvpx-vp9", "yuva420p", noise(40, 64, 36, 4), [i / 24 for i in range(40)])
    write_video(folder / "wide.avi", "mpeg4", "yuv420p", noise(45, 20, 90), ntsc)
    uneven = np.cumsum(draw.uniform(0.01, 0.2, 20)).tolist()
    write_video(folder / "uneven.mkv", "libx264", "yuv420p", noise(20, 24, 32), uneven)
    images = [Image.fromarray(pixels) for pixels in noise(9, 21, 15)]
    images[0].save(folder / "animated.gif", save_all=True, append_images=images[1:], duration=[70, 110, 200] * 3)
    write_video(folder / "short.mp4", "libx264", "yuv420p", noise(3, 32, 32), [0, 0.03, 0.06])
    (folder / "damaged.webm").write_bytes((folder / "portrait.webm").read_bytes()[:500])
    names = (*GOOD, "short.mp4", "damaged.webm", "no.mp4")
    rows: list[dict[str, Any]] = [{"video": name, "caption": f"this is {name}"} for name in names]
    rows += [{"video": "odd.mp4"}, {"caption": "of nothing"}]
    (folder / "manifest.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_odd_videos_and_a_mixture_of_rewards_go_in_and_a_tuned_model_comes_out(
    home: Path, odd_videos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rewards' functions and the storage are given by relative paths, which workers see from other folders."""
    model, out = ModelConfig(path=str(home / "tiny"), frames=4, size=16), home / "odd-clips"
    report = encode_folder(odd_videos, model, out, batch_size=2)
    reasons = {(skipped.path.name, skipped.reason.rpartition("manifest.jsonl")[2]) for skipped in report.skipped}
    assert (report.clips, len(reasons)) == (5, 5)
    assert {("no.mp4", "no such file"), ("odd.mp4", ":9: has no caption")} < reasons
    assert ("manifest.jsonl", ":10: names no video") in reasons
    said = (out / "report.txt").read_text()
    assert "short.mp4: lasts 0.09 s and has 3 frames; needed: 0.50 s (4 frames at 8 a second), or 4 frames" in said
    assert "damaged.webm: has no frames" in said
    clips = EncodedClips.open(out)
    assert list(clips.captions()) == [f"this is {name}" for name in GOOD]
    assert tensors(clips.rows([0, 1, 2, 3, 4]))[2].mean.isfinite().all()

    monkeypatch.chdir(home)
    Path("mine.py").write_text(MINE)
    parts = "[{path: mine.py:warm, weight: 2}, {name: brightness, weight: -1}]"
    own = ("reward.name=mixture", f"reward.mixture={parts}", "reward.held_out=custom")
    own = (*own, "reward.held_out_path=mine.py:moving", "output.storage=runs")
    done = train(config(home, "odd", f"data.source={out}", *own), QUIET)
    assert (done.first_step, done.last_step) == (0, 2)
    adapter = load_file(done.checkpoint / "adapter" / "adapter_model.safetensors")
    assert all(bool(tensor.any()) for name, tensor in adapter.items() if "lora_B" in name)
    events = read_events(done.folder / "tensorboard", lambda tag: True)
    warm, bright, trained, held_out = (
        torch.tensor([value for _, value in events[f"reward/{tag}"]])
        for tag in ("part_warm", "part_brightness", "trained", "held_out")
    )
    torch.testing.assert_close(trained, 2 * warm - bright, atol=1e-5, rtol=0)
    assert (held_out > 0).all()
    rows = pads.dataset(done.folder / "archive", format="parquet").to_table()
    assert rows.num_rows == 4
    assert min(rows["held_out"].to_pylist()) > 0


@pytest.mark.slow
def test_a_killed_encoding_goes_on_and_ends_with_the_same_bytes(ray_cluster: Any, home: Path, tmp_path: Path) -> None:
    source, out, count = tmp_path / "in", tmp_path / "clips", 24
    source.mkdir()
    write_mp4(source / "a.mp4", rendered_clip(0, 0, 48, 256)[1], 24)  # takes long enough to be killed in
    with open(source / "manifest.csv", "w", encoding="utf-8") as file:
        csv.writer(file).writerows([("video", "caption"), *(("a.mp4", f"clip {index}") for index in range(count))])
    description = tmp_path / "tiny.yaml"
    model = {"path": str(home / "tiny"), "frames": 4, "size": 16}
    description.write_text(yaml.safe_dump({"model": model}))
    command = [sys.executable, "-m", "rlvid.cli", "encode", str(source), str(out), "--config", str(description)]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_API")}
    nowhere = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    with started(command, env=environment, **nowhere) as process:
        deadline = time.monotonic() + HANG
        while not (kept := list(unfinished(out).glob("rows-*.parquet"))):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.002)
        process.kill()
    before = sum(pq.read_metadata(path).num_rows for path in unfinished(out).glob("rows-*.parquet"))
    assert kept
    assert 0 < before < count
    assert not out.exists()

    again = encode_folder(source, ModelConfig(**model), out)
    assert (again.clips, again.encoded) == (count, count - before)  # so nothing twice
    whole = encode_folder(source, ModelConfig(**model), tmp_path / "whole")
    assert whole.encoded == count
    assert {p.name: p.read_bytes() for p in out.iterdir() if p.suffix == ".parquet"} == {
        p.name: p.read_bytes() for p in whole.folder.iterdir() if p.suffix == ".parquet"
    }
    assert json.loads((out / "report.json").read_text()) == json.loads((whole.folder / "report.json").read_text())
    assert not unfinished(out).exists()

"""Rewards of the user's own and mixtures in a whole run: files found from other folders, parts in TensorBoard."""

import io
from pathlib import Path

import pyarrow.dataset as pads
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from rlvid.config import load_config
from rlvid.runs.scalars import read_events
from rlvid.toy.tiny import save_tiny_model
from rlvid.train.launch import train

MINE = """
def warm(frames, prompts):
    return (frames[:, :, 0] - frames[:, :, 2]).mean((2, 3))
def moving(frames, prompts):
    return frames.diff(dim=1).abs().mean((1, 2, 3, 4))
moving.whole_video = True
"""


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_a_mixture_with_a_function_from_a_relative_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    save_tiny_model(tmp_path / "tiny")
    (tmp_path / "mine.py").write_text(MINE)
    parts = "[{path: mine.py:warm, weight: 2}, {name: brightness, weight: -1}]"
    overrides = [
        "name=mine", f"model.path={tmp_path / 'tiny'}", "model.frames=4", "model.size=16", "data.count=6",
        "output.storage=runs",
        "sampling.steps=5", "train.batch_size=4", "train.workers=1", "train.steps=2", "output.videos_every=0",
        "reward.segments=2", "reward.name=mixture", f"reward.mixture={parts}", "reward.held_out=custom",
        "reward.held_out_path=mine.py:moving",
    ]  # fmt: skip
    done = train(load_config("toy", overrides), Console(file=io.StringIO()))
    adapter = load_file(done.checkpoint / "adapter" / "adapter_model.safetensors")
    assert all(tensor.any() for name, tensor in adapter.items() if "lora_B" in name)
    events = read_events(done.folder / "tensorboard", lambda tag: True)
    warm, bright, trained, held_out = (
        torch.tensor([value for _, value in events[f"reward/{tag}"]])
        for tag in ("part_warm", "part_brightness", "trained", "held_out")
    )
    torch.testing.assert_close(trained, 2 * warm - bright, atol=1e-5, rtol=0)
    assert (held_out > 0).all()
    rows = pads.dataset(done.folder / "archive", format="parquet").to_table()
    assert rows.num_rows == 8
    assert min(rows["held_out"].to_pylist()) > 0

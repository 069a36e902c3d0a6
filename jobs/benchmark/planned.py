"""The memory that ``rlvid plan`` predicts for the steps that are measured."""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from rlvid.config import RunConfig, parse_config
from rlvid.plan.counts import count
from rlvid.plan.memory import resident, stages
from rlvid.plan.parts import outline_parts

STAGES = ("chain", "decode", "reward", "backward")
"""Stages of the loop; the plan's names of stages begin with them."""


class Planned:
    """The plan of the benchmark's own settings; the networks are measured on the meta device, once."""

    def __init__(self, options: argparse.Namespace) -> None:
        self._frames = options.frames
        with tempfile.TemporaryDirectory() as folder:
            paths = tiny_paths(Path(folder)) if options.preset == "tiny" else {"model": "random", "reward": "random"}
            self._config = described(options, paths)
            self._parts = outline_parts(self._config)

    def __call__(self, videos: int, recompute: bool) -> dict[str, int]:
        """Returns bytes at the peak of each stage of a step on so many videos."""
        update = {"batch_size": videos, "checkpoint_activations": recompute}
        config = self._config.model_copy(update={"train": self._config.train.model_copy(update=update)})
        fixed = sum(resident(self._parts, config).values())
        found = stages(self._parts, count(config, self._frames), config)
        return {name: fixed + max(size for stage, size in found.items() if stage.startswith(name)) for name in STAGES}


def described(options: argparse.Namespace, paths: dict[str, str]) -> RunConfig:
    """Returns the settings that ``parts.prepare`` builds by hand, as a run has them."""
    model = {"path": paths["model"], "precision": options.precision, "frames": options.frames, "size": options.size}
    reward: dict[str, Any] = {"path": paths["reward"], "held_out": None, "segments": options.segments}
    reward |= {"name": "clip" if options.preset == "tiny" else "hpsv2", "precision": options.precision}
    return parse_config(
        {"model": model, "sampling": {"steps": options.sampling_steps},
         "reward": reward | {"chunk": 64, "checkpoint_activations": False}, "train": {"batch_size": 1}}
    )  # fmt: skip


def tiny_paths(folder: Path) -> dict[str, str]:
    """Returns the miniatures as the plan looks at them: a model's folder, and the structure of a reward."""
    from rlvid.toy.tiny import save_tiny_model, tiny_reward

    save_tiny_model(folder)
    clip = tiny_reward().clip
    length, words = clip.positional_embedding.shape[0], clip.token_embedding.weight.shape[0]
    structure = {
        "embed_dim": 16,
        "vision_cfg": {"layers": 1, "width": 16, "head_width": 8, "image_size": 16, "patch_size": 4},
        "text_cfg": {"context_length": length, "vocab_size": words, "width": 16, "heads": 2, "layers": 1},
    }
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": structure}), encoding="utf-8")
    return {"model": str(folder), "reward": str(folder)}

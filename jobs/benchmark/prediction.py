"""The memory that ``rlvid plan`` predicts for the steps that are measured."""

import argparse
import json
import shutil
import tempfile
import weakref
from pathlib import Path

from jobs.benchmark.parts import config_of, with_batch
from rlvid.plan.counts import count
from rlvid.plan.memory import resident, stages
from rlvid.plan.parts import outline_parts

STAGES = ("chain", "decode", "reward", "backward")
"""Stages of the loop; the plan's names of stages begin with them."""


class PeakPrediction:
    """What the plan predicts for the benchmark's settings; the networks are measured on the meta device, once."""

    def __init__(self, options: argparse.Namespace) -> None:
        self._frames = options.frames
        folder = Path(tempfile.mkdtemp())
        weakref.finalize(self, shutil.rmtree, folder)  # not before: counting reads the structures in it again
        tiny = options.preset == "tiny"
        path = save_tiny(folder) if tiny else "random"
        name, kept = "clip" if tiny else "hpsv2", {"chunk": 64, "checkpoint_activations": False}
        reward = {"name": name, "path": path, "precision": options.precision, **kept}
        self._config = config_of(options, model={"path": path}, reward=reward)
        self._parts = outline_parts(self._config)

    def __call__(self, videos: int, recompute: bool) -> dict[str, int]:
        """Bytes at the peak of each stage of a step on so many videos."""
        config = with_batch(self._config, videos, recompute)
        fixed = sum(resident(self._parts, config).values())
        found = stages(self._parts, count(config, self._frames), config)
        return {name: fixed + max(size for stage, size in found.items() if stage.startswith(name)) for name in STAGES}


def save_tiny(folder: Path) -> str:
    """Writes the miniatures as the plan looks at them: a model's folder, and in it the structure of a reward."""
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
    return str(folder)

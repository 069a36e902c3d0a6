"""Writes clip_score.json: what torchmetrics' clip_score says of given frames, on a small CLIP of fixed random weights.

torchmetrics is no dependency of rlvid; where it is installed:

    pip install --no-deps --target /tmp/torchmetrics torchmetrics lightning-utilities
    PYTHONPATH=.:/tmp/torchmetrics python tests/golden/clip_score.py
"""

import json
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from rlvid.toy.tiny import save_tiny_clip

PROMPTS = ["a red circle moving left on a black background", "a dog", "a blue star growing, white background"]
SEEDS = (1, 6, 9, 20)  # of the CLIP's weights; with these no score is negative, which torchmetrics makes 0


def frames() -> torch.Tensor:
    """Three videos of five frames, uint8 (B, F, C, H, W), smooth enough that resizing matters and saturates nothing."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(15, 3, 6, 7, generator=generator)
    fine = torch.nn.functional.interpolate(coarse, (22, 31), mode="bilinear")
    return (fine * 255).round().to(torch.uint8).unflatten(0, (3, 5))


def main() -> None:
    import torchmetrics
    from torchmetrics.functional.multimodal import clip_score
    from transformers import CLIPModel, CLIPProcessor

    found: dict[str, Any] = {"torchmetrics": torchmetrics.__version__, "scores": {}}
    for seed in SEEDS:
        with tempfile.TemporaryDirectory() as folder:
            save_tiny_clip(Path(folder), seed)
            model, processor = CLIPModel.from_pretrained(folder), CLIPProcessor.from_pretrained(folder)

        # transformers 5 gives outputs where torchmetrics expects tensors
        given = SimpleNamespace(
            config=model.config,
            get_image_features=lambda *args, m=model: m.get_image_features(*args).pooler_output,
            get_text_features=lambda *args, m=model: m.get_text_features(*args).pooler_output,
        )
        given.to = lambda device, g=given: g
        scores = [
            [float(clip_score(frame, prompt, lambda g=given, p=processor: (g, p))) for frame in video]
            for video, prompt in zip(frames(), PROMPTS, strict=True)
        ]
        found["scores"][seed] = scores
    Path(__file__).with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

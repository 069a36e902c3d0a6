"""Metrics against the packages and publications that define them."""

import json
import logging
import runpy
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import CLIPModel, CLIPProcessor

from rlvid.evaluate import metrics
from rlvid.evaluate.clip import load_clip
from rlvid.toy.tiny import save_tiny_clip

log = logging.getLogger(__name__)
GOLDEN = Path(__file__).parents[1] / "golden"
RECIPE: dict[str, Any] = runpy.run_path(str(GOLDEN / "clip_score.py"))
PROMPTS, PIXELS = RECIPE["PROMPTS"], RECIPE["frames"]()  # uint8 (B, F, C, H, W)
BOUND = 1e-5


@pytest.mark.parametrize("seed", RECIPE["SEEDS"])
def test_clipsim_is_torchmetrics_clip_score(tmp_path: Path, seed: int) -> None:
    """The golden file holds 100 x the cosine of each frame; CLIPSIM is the mean cosine of a video."""
    save_tiny_clip(tmp_path, seed)
    scores_BF = np.array(json.loads((GOLDEN / "clip_score.json").read_text())["scores"][str(seed)]) / 100
    assert scores_BF.min() > 0
    found = metrics.clipsim(load_clip(str(tmp_path)), PIXELS / 255, PROMPTS).double().numpy()
    apart = np.abs(found - scores_BF.mean(1)).max()
    log.info("CLIPSIM, weights %d: %.1e", seed, apart)
    assert apart <= BOUND


def test_clipsim_is_a_computation_of_its_own_on_transformers(tmp_path: Path) -> None:
    save_tiny_clip(tmp_path, 1)
    model, processor = CLIPModel.from_pretrained(tmp_path).eval(), CLIPProcessor.from_pretrained(tmp_path)
    expected = []
    for video, prompt in zip(PIXELS, PROMPTS, strict=True):
        inputs = processor(text=[prompt], images=list(video), return_tensors="pt", padding=True)
        with torch.no_grad():
            expected.append(float((model(**inputs).logits_per_image[:, 0] / model.logit_scale.exp()).mean()))
    found = metrics.clipsim(load_clip(str(tmp_path)), PIXELS / 255, PROMPTS)
    assert np.abs(found.numpy() - expected).max() <= BOUND


def test_flickering_is_vbenchs() -> None:
    """(255 - mean over pairs of the mean absolute difference of consecutive uint8 frames) / 255."""
    video = PIXELS.numpy().astype(np.float64)
    expected = []
    for frames in video:
        errors = [np.abs(after - before).mean() for before, after in pairwise(frames)]
        expected.append((255.0 - np.mean(errors)) / 255.0)
    found = metrics.flickering(PIXELS / 255).double().numpy()
    log.info("temporal flickering: %.1e", np.abs(found - expected).max())
    assert np.abs(found - expected).max() <= BOUND
    between = PIXELS / 255 + torch.rand(PIXELS.shape) * 0.9 / 255 - 0.45 / 255  # what a file of 8 bits makes of it
    assert np.abs(metrics.flickering(between).double().numpy() - expected).max() <= BOUND
    assert metrics.flickering(PIXELS[:, :1].repeat(1, 3, 1, 1, 1) / 255).tolist() == [1, 1, 1]


@pytest.mark.parametrize("seed", RECIPE["SEEDS"])
def test_consistency_of_vbench_is_its_background_consistency(tmp_path: Path, seed: int) -> None:
    """Frame by frame: half the cosine with the frame before, half that with the first, negative ones as 0."""
    save_tiny_clip(tmp_path, seed)
    model, processor = CLIPModel.from_pretrained(tmp_path).eval(), CLIPProcessor.from_pretrained(tmp_path)
    clip = load_clip(str(tmp_path))
    for index, video in enumerate(PIXELS):
        pixel_values = processor.image_processor(images=list(video), return_tensors="pt").pixel_values
        with torch.no_grad():
            features = model.get_image_features(pixel_values).pooler_output.double().numpy()
        features /= np.linalg.norm(features, axis=1, keepdims=True)
        total = 0.0
        for i in range(1, len(features)):
            before, first = (max(0.0, float(features[j] @ features[i])) for j in (i - 1, 0))
            total += (before + first) / 2
        found = metrics.temporal_consistency(clip, PIXELS[index : index + 1] / 255, "vbench").item()
        log.info("background consistency, weights %d: %.1e", seed, abs(found - total / (len(features) - 1)))
        assert abs(found - total / (len(features) - 1)) <= BOUND

"""The full-size models against the official packages, by hand: they take gigabytes and minutes.

Make the packages' answers first, with --full (see make_golden_hpsv2.py and make_golden_imagereward.py), then:

    python tests/parity/full_size.py hpsv2 /tmp/hpsv2-full.safetensors
    python tests/parity/full_size.py imagereward /tmp/imagereward-full.safetensors

Writes the weights to a checkpoint of the public kind, loads it as a user would, and prints the largest differences.
"""

import argparse
import json
import resource
import tempfile
from pathlib import Path
from typing import Any

import recipe
import torch
from safetensors import safe_open

from rlvid.reward.load import load_reward
from rlvid.reward.preprocess import normalise


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=["hpsv2", "imagereward"])
    parser.add_argument("golden", type=Path)
    options = parser.parse_args()
    with safe_open(options.golden, "pt") as file:
        golden = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        shapes = json.loads(file.metadata()["shapes"])
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        path = folder / ("HPS_v2_compressed.pt" if options.name == "hpsv2" else "ImageReward.pt")
        weights = recipe.weights(shapes, seed=1 if options.name == "hpsv2" else 2)
        torch.save({"state_dict": weights}, path)
        del weights
        (folder / "vocab.txt").write_text("\n".join(recipe.vocabulary()) + "\n", encoding="utf-8")
        reward: Any = load_reward(options.name, path=str(path))
    prompts = list(recipe.PROMPTS[:2])
    tokens = reward.tokenise(prompts) if options.name == "hpsv2" else reward.tokens(prompts)[0]
    print("parameters", sum(each.numel() for each in reward.parameters()))  # noqa: T201
    print("tokens that differ", int((tokens != golden["tokens"]).sum()))  # noqa: T201
    for place, (height, width) in enumerate(recipe.FULL):
        frames = recipe.pixels(height, width)[None, None].requires_grad_()
        prepared = normalise(reward.preprocess(frames[0]))[0]
        score = reward(frames, prompts[:1])[0, 0]
        (gradient,) = torch.autograd.grad(score, frames)
        score, prepared = score.detach(), prepared.detach()
        expected = golden[f"gradient_{height}x{width}"]
        differences = {
            "image": (prepared - golden["images"][place]).abs().max(),
            "score": (score - golden["scores"][place, 0]).abs(),
            "gradient": (gradient[0, 0] - expected).abs().max(),
        }
        if options.name == "hpsv2":
            features = reward.image_features(frames.detach())[0, 0]
            differences["features"] = (features - golden["image_features"][place]).abs().max()
        shown = ", ".join(f"{key} {float(value):.2e}" for key, value in differences.items())
        sizes = f"score {float(score):.6f}, gradient up to {float(expected.abs().max()):.2e}"
        print(f"{height} x {width}: {shown} ({sizes})")  # noqa: T201
    print("peak memory", round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2), "GiB")  # noqa: T201


if __name__ == "__main__":
    main()

"""Runs the official `hpsv2` package and keeps what it answers, for the tests to compare with.

In an environment of its own, since the package brings an open_clip of its own; torch may be shared:

    pip install --no-deps --target /tmp/golden/hpsv2 hpsv2==1.2.0
    PYTHONPATH=/tmp/golden/hpsv2:tests/parity python tests/parity/make_golden_hpsv2.py tests/golden/hpsv2.safetensors

With --full it is the ViT-H-14 in full (986 M parameters, 5 GB of memory), for tests/parity/full_size.py.
"""

import argparse
import importlib
import importlib.util
import json
import shutil
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import recipe
import torch
from PIL import Image
from safetensors.torch import save_file


def reference() -> Any:
    """The package's open_clip, without its downloads, and with what its wheel lacks: the vocabulary.

    open_clip has the vocabulary as the same file.
    """
    sys.modules["turtle"] = ModuleType("turtle")  # imported by mistake, and it would want a display
    sys.modules["turtle"].forward = None  # type: ignore[attr-defined]
    ours, theirs = importlib.util.find_spec("open_clip"), importlib.util.find_spec("hpsv2")
    assert ours is not None
    assert ours.origin is not None
    assert theirs is not None
    assert theirs.origin is not None
    root, words = Path(theirs.origin).parent, "bpe_simple_vocab_16e6.txt.gz"
    shutil.copy(Path(ours.origin).parent / words, root / "src" / "open_clip" / words)
    sys.modules["hpsv2"] = ModuleType("hpsv2")
    sys.modules["hpsv2"].__path__ = [str(root)]
    return importlib.import_module("hpsv2.src.open_clip")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--full", action="store_true")
    options = parser.parse_args()
    open_clip = reference()
    config = open_clip.get_model_config("ViT-H-14") if options.full else recipe.HPS
    model = open_clip.CLIP(**config, output_dict=True).eval().requires_grad_(False)
    shapes = recipe.named(model)
    model.load_state_dict(recipe.weights(shapes, seed=1), assign=True)

    size = config["vision_cfg"]["image_size"]
    prepare = open_clip.image_transform(size, is_train=False, resize_longest_max=True)
    sizes, prompts = (recipe.FULL, recipe.PROMPTS[:2]) if options.full else (recipe.SIZES, recipe.PROMPTS)
    tokens = open_clip.tokenize(list(prompts))
    found = {"tokens": tokens}
    images = []
    for height, width in sizes:
        frame = recipe.pixels(height, width)
        picture = Image.fromarray(frame.mul(255).round().byte().permute(1, 2, 0).numpy())
        images.append(prepare(picture))
        if (height, width) in recipe.GRADIENTS + recipe.FULL:
            leaf = frame.clone().requires_grad_()
            prepared = leaf
            for step in prepare.transforms[2:]:  # after the conversion from PIL to a tensor
                prepared = step(prepared)
            answer = model(prepared[None], tokens[:1])
            score = (answer["image_features"] @ answer["text_features"].T).diagonal()[0]
            (found[f"gradient_{height}x{width}"],) = torch.autograd.grad(score, leaf)
    with torch.no_grad():
        answers = [model(image[None], tokens) for image in images]
    found["images"] = torch.stack(images)
    found["image_features"] = torch.cat([answer["image_features"] for answer in answers])
    found["text_features"] = answers[0]["text_features"]
    found["scores"] = found["image_features"] @ found["text_features"].T
    save_file(found, options.out, {"shapes": json.dumps(shapes), "torch": torch.__version__})
    print(options.out, {name: tuple(tensor.shape) for name, tensor in found.items()})  # noqa: T201


if __name__ == "__main__":
    main()

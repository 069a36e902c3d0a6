"""Runs the official `image-reward` package and keeps what it answers, for the tests to compare with.

In an environment of its own, since the package does not import under transformers 5; torch may be shared:

    pip install --no-deps --target /tmp/golden/imagereward image-reward==1.5 transformers==4.36.2 \
        'tokenizers<0.19' 'huggingface-hub<1' fairscale
    PYTHONPATH=/tmp/golden/imagereward:tests/parity python tests/parity/make_golden_imagereward.py \
        tests/golden/imagereward.safetensors

With --full it is the model in full (447 M parameters, 3 GB of memory), for tests/parity/full_size.py.
"""

import argparse
import importlib
import importlib.util
import json
import sys
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

import recipe
import torch
from safetensors.torch import save_file


def reference() -> Any:
    """The package's module `ImageReward.ImageReward`, without its training script and other scores' dependencies."""
    spec = importlib.util.find_spec("ImageReward")
    assert spec is not None
    assert spec.origin is not None
    root = Path(spec.origin).parent
    for name, folder in (("ImageReward", root), ("ImageReward.models", root / "models")):
        sys.modules[name] = ModuleType(name)
        sys.modules[name].__path__ = [str(folder)]
    return importlib.import_module("ImageReward.ImageReward")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--full", action="store_true")
    options = parser.parse_args()
    package = reference()
    parts = importlib.import_module("ImageReward.models.BLIP.blip_pretrain")
    from transformers import BertTokenizer

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "vocab.txt").write_text("\n".join(recipe.vocabulary()) + "\n", encoding="utf-8")
        sizes = recipe.BLIP if not options.full else recipe.FULL_BLIP
        vision, text = sizes["vision"], sizes["text"]
        med = {key: text[key] for key in text if key != "encoder_hidden_size"}
        med |= {"hidden_act": "gelu", "layer_norm_eps": 1e-12, "pad_token_id": 0, "add_type_embeddings": False}
        med |= {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1, "add_cross_attention": True}
        med |= {"model_type": "bert", "architectures": ["BertModel"], "encoder_width": text["encoder_hidden_size"]}
        (folder / "med_config.json").write_text(json.dumps(med), encoding="utf-8")

        def init_tokenizer() -> Any:  # as the package's own, but for the vocabulary, which it would download
            tokenizer = BertTokenizer(str(folder / "vocab.txt"))
            tokenizer.add_special_tokens({"bos_token": "[DEC]"})
            tokenizer.add_special_tokens({"additional_special_tokens": ["[ENC]"]})
            return tokenizer

        parts.init_tokenizer = init_tokenizer
        if not options.full:  # the package knows two sizes of image encoder, both big
            build = importlib.import_module("ImageReward.models.BLIP.vit").VisionTransformer
            parts.create_vit = lambda *_: (
                build(
                    img_size=vision["image_size"], patch_size=vision["patch_size"], embed_dim=vision["hidden_size"],
                    depth=vision["num_hidden_layers"], num_heads=vision["num_attention_heads"],
                ),
                vision["hidden_size"],
            )  # fmt: skip
        model = package.ImageReward(device="cpu", med_config=str(folder / "med_config.json"))
    model.mlp = package.MLP(text["hidden_size"])
    model.eval().requires_grad_(False)
    shapes = recipe.named(model)
    model.load_state_dict(recipe.weights(shapes, seed=2), assign=True)
    # As the package's training script prepares decoded tensors: the same steps, without the conversion from PIL.
    prepare = [step for step in package._transform(vision["image_size"]).transforms if not callable_on_pictures(step)]
    frames, prompts = (recipe.FULL, recipe.PROMPTS[:2]) if options.full else (recipe.SIZES, recipe.PROMPTS)
    words = model.blip.tokenizer(
        list(prompts), padding="max_length", truncation=True, max_length=35, return_tensors="pt"
    )
    found = {"tokens": words.input_ids, "mask": words.attention_mask}
    images, scores = [], []
    for height, width in frames:
        leaf = recipe.pixels(height, width).requires_grad_()
        image = leaf[None]
        for step in prepare:
            image = step(image)
        images.append(image.detach())
        rows = [
            model.score_gard(words.input_ids[i : i + 1], words.attention_mask[i : i + 1], image)[0, 0]
            for i in range(len(prompts))
        ]
        scores.append(torch.stack([row.detach() for row in rows]))
        if (height, width) in recipe.GRADIENTS + recipe.FULL:
            (found[f"gradient_{height}x{width}"],) = torch.autograd.grad(rows[0], leaf)
    found |= {"images": torch.cat(images), "scores": torch.stack(scores)}
    save_file(found, options.out, {"shapes": json.dumps(shapes), "torch": torch.__version__})
    print(options.out, {name: tuple(tensor.shape) for name, tensor in found.items()})  # noqa: T201


def callable_on_pictures(step: Any) -> bool:
    """Whether a step of the package's transform is for PIL images alone."""
    return getattr(step, "__name__", type(step).__name__) in ("_convert_image_to_rgb", "ToTensor")


if __name__ == "__main__":
    main()

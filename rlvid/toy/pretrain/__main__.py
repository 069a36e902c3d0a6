"""``python -m rlvid.toy.pretrain``: rebuilds all weights of the built-in world from a seed and prints their quality."""

import argparse
import json
import logging
import time
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from open_clip.model import CLIP
from transformers import CLIPTokenizer

from rlvid.models.stored import CLASSES, save_text_encoder, save_tokenizer
from rlvid.reward.clip import ClipReward
from rlvid.reward.fit.folder import Spec, load_fitted, save_fitted
from rlvid.reward.fit.models import Backbone, ImageScorer
from rlvid.reward.preprocess import Preprocess
from rlvid.toy.pretrain.autoencoder import clean_error, fit_autoencoder
from rlvid.toy.pretrain.common import log
from rlvid.toy.pretrain.denoiser import Phase, build_scheduler, fit_denoiser
from rlvid.toy.pretrain.preference import ARCHITECTURE, fit_reward, preference_accuracy
from rlvid.toy.pretrain.quality import quality_of_model, write_card
from rlvid.toy.pretrain.text import build_tokenizer

LOW_QUALITY = {"washed-out": 0.85, "blurred": 0.12}
"""Of the last phase's clips. Guidance repairs much of it: about half of the samples come out pale, a third good."""


def main() -> None:
    """Runs the stages in order; a stage whose folder is there already is loaded instead of trained."""
    parser = argparse.ArgumentParser(prog="python -m rlvid.toy.pretrain", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder of the weights; rlvid's own: rlvid/toy/weights")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scale", type=float, default=1.0, help="share of all steps and counts, for a quick trial")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    out, device, began = options.out, torch.device(options.device), time.perf_counter()

    def steps(count: int) -> int:
        return max(2, round(count * options.scale))

    (out / "model").mkdir(parents=True, exist_ok=True)
    tokenizer = build_tokenizer()
    save_tokenizer(tokenizer, out / "model" / "tokenizer")
    build_scheduler().save_pretrained(out / "model" / "scheduler")
    index = {"_class_name": "TextToVideoSDPipeline", **CLASSES}
    (out / "model" / "model_index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")

    folder = out / "model" / "vae"
    if not folder.is_dir():
        parts = (steps(3000), steps(1600), steps(3000))
        fit_autoencoder(options.seed, parts, device).save_pretrained(folder)
    vae = AutoencoderKL.from_pretrained(folder).to(device).eval().requires_grad_(False)

    figures = {}
    for name, seed in (("reward", options.seed + 100), ("heldout", options.seed + 200)):
        if not (out / name).is_dir():
            save_reward(fit_reward(seed, steps(400), steps(600), vae, tokenizer), tokenizer, out / name)
        figures[name] = preference_accuracy(load_reward_weights(out / name, device), vae, tokenizer)

    if not (out / "model" / "unet").is_dir():
        phases = [
            Phase(frames=1, batch=128, steps=steps(900), hidden=0.2, peak=1.5e-3),
            Phase(frames=3, batch=40, steps=steps(2000), hidden=1.0, peak=2e-3),
            Phase(frames=8, batch=16, steps=steps(1800), hidden=0.3, peak=1.5e-3),
            Phase(frames=8, batch=16, steps=steps(400), hidden=0.3, peak=1e-3, degraded=LOW_QUALITY),
        ]
        bank = max(64, steps(12288))
        unet, encoder = fit_denoiser(options.seed + 300, phases, vae, tokenizer, bank, text_steps=steps(400))
        save_text_encoder(encoder, out / "model" / "text_encoder")
        unet.save_pretrained(out / "model" / "unet")  # last: this folder says that the stage is done
    figures["autoencoder"] = {"L1 on clean frames in [-1, 1]": clean_error(vae)}
    figures["model"] = quality_of_model(out, max(4, steps(256)), max(4, steps(96)))
    for name, values in figures.items():
        log.info("%s: %s", name, ", ".join(f"{key} {value:.4f}" for key, value in values.items()))
    write_card(out, figures, options.seed)
    log.info("all in %.0f s on %s, in %s", time.perf_counter() - began, device, out)


def save_reward(model: CLIP, tokenizer: CLIPTokenizer, folder: Path) -> None:
    """Writes a reward in the layout of ``rlvid reward fit``; its answers are the plain cosine."""
    folder.mkdir(parents=True)
    structure = ARCHITECTURE | {"text_cfg": ARCHITECTURE["text_cfg"] | {"vocab_size": len(tokenizer)}}
    scorer = ImageScorer(Backbone(model, Preprocess(structure["vision_cfg"]["image_size"])))
    scale = float(scorer.backbone.scale)
    spec = Spec(axes=("quality",), preprocess=scorer.backbone.preprocess, base_mean=(0.0,), base_deviation=(scale,))
    save_fitted(folder, spec, scorer, structure, tokenizer)


def load_reward_weights(folder: Path, device: torch.device) -> CLIP:
    """Returns the open_clip model in a folder that ``save_reward`` wrote."""
    made = load_fitted(str(folder), device, where=str(folder))
    assert isinstance(made, ClipReward)
    return made.clip


if __name__ == "__main__":
    main()

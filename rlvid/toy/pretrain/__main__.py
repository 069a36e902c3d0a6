"""``python -m rlvid.toy.pretrain``: rebuilds all weights of the built-in world from a seed and prints their quality."""

import argparse
import json
import logging
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from diffusers import AutoencoderKL, AutoencoderKLWan

from rlvid.config.model import ModelConfig
from rlvid.files import atomic_folder
from rlvid.models.load import load_video_model
from rlvid.models.stored import CLASSES, save_text_encoder, save_tokenizer
from rlvid.toy.pretrain.autoencoder import clean_error, fit_autoencoder
from rlvid.toy.pretrain.common import log, scaled
from rlvid.toy.pretrain.denoiser import Phase, build_scheduler, fit_denoiser
from rlvid.toy.pretrain.plan import JUDGES, REWARDS, ROUNDS
from rlvid.toy.pretrain.quality import quality_of_model, write_card
from rlvid.toy.pretrain.rewards import Maker, accuracy_of_reward, check_work, digest
from rlvid.toy.pretrain.text import build_tokenizer
from rlvid.toy.pretrain.wan_autoencoder import FRAMES, SIZE, autoencoder_phases, clean_wan_error, fit_wan_autoencoder
from rlvid.toy.pretrain.wan_denoiser import embed, fit_wan_transformer, save_wan, transformer_phases, wan_bank
from rlvid.toy.pretrain.wan_text import fit_wan_text

LOW_QUALITY = {"washed-out": 0.85, "blurred": 0.12}
"""Of the last phase's clips. Guidance repairs much of it: about half of the samples come out pale, a third good."""
STAGES = ("autoencoder", "denoiser", "rewards", "judges", "wan-autoencoder", "wan-denoiser")


def main() -> None:
    """Runs the stages in order; a stage whose folder is there already is loaded instead of trained."""
    parser = argparse.ArgumentParser(prog="python -m rlvid.toy.pretrain", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder of the weights")
    parser.add_argument("--work", type=Path, help="folder of CLIPs, votes and runs of the rewards; default: OUT.work")
    parser.add_argument("--stage", choices=STAGES, help="run this stage alone, and measure nothing; default: all")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="of votes and fits of the rewards")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scale", type=float, default=1.0, help="share of all steps and counts, for a quick trial")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    if options.rounds < 1:
        parser.error(f"--rounds {options.rounds}: the rewards take 1 or more")
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    out, device, began = options.out.resolve(), torch.device(options.device), time.perf_counter()
    asked = (options.stage,) if options.stage else STAGES

    steps = partial(scaled, scale=options.scale)

    if "autoencoder" in asked:
        make_autoencoder(out, options.seed, steps, device)
    if "denoiser" in asked:
        make_denoiser(out, options.seed, steps, device)
    work = options.work.resolve() if options.work else out.with_name(f"{out.name}.work")
    maker = Maker(out, work, options.seed, options.scale, device)
    if "rewards" in asked:
        maker.make_rewards(options.rounds)
    if "judges" in asked:
        maker.make_judges()
    if "wan-autoencoder" in asked:
        make_wan_autoencoder(out, work, options.seed, options.scale, device)
    if "wan-denoiser" in asked:
        make_wan_denoiser(out, work, options.seed, options.scale, device)
    if not options.stage:
        figures = {plan.name: accuracy_of_reward(out / plan.name) for plan in (*REWARDS, *JUDGES)}
        figures["autoencoder"] = {"L1 on clean frames in [-1, 1]": clean_error(load_autoencoder(out, device))}
        figures["wan: autoencoder"] = {
            "L1 on clean frames in [-1, 1]": clean_wan_error(load_wan_autoencoder(out, device))
        }
        videos, others = max(4, steps(256)), max(4, steps(96))
        for name, frames in {"model": 8, "wan": FRAMES}.items():
            model = load_video_model(ModelConfig(path=str(out / name), frames=frames, size=SIZE))
            figures[name] = quality_of_model(model, videos, others)
        for name, values in figures.items():
            log.info("%s: %s", name, ", ".join(f"{key} {value:.4f}" for key, value in values.items()))
        write_card(out, figures, options.seed)
    log.info("all in %.0f s on %s, in %s", time.perf_counter() - began, device, out)


def make_autoencoder(out: Path, seed: int, steps: Callable[[int], int], device: torch.device) -> None:
    """Writes the parts of the model that nothing trains, and trains the autoencoder."""
    model = out / "model"
    model.mkdir(parents=True, exist_ok=True)
    save_tokenizer(build_tokenizer(), model / "tokenizer")
    build_scheduler().save_pretrained(model / "scheduler")
    index = {"_class_name": "TextToVideoSDPipeline", **CLASSES}
    (model / "model_index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    if not (model / "vae").is_dir():
        parts = (steps(3000), steps(1600), steps(3000))
        fit_autoencoder(seed, parts, device).save_pretrained(model / "vae")


def load_autoencoder(out: Path, device: torch.device) -> AutoencoderKL:
    """Returns the autoencoder, frozen."""
    return AutoencoderKL.from_pretrained(out / "model" / "vae").to(device).eval().requires_grad_(False)


def make_denoiser(out: Path, seed: int, steps: Callable[[int], int], device: torch.device) -> None:
    """Trains the text encoder and the denoiser."""
    if (out / "model" / "unet").is_dir():
        return
    phases = [
        Phase(frames=1, batch=128, steps=steps(900), hidden=0.2, peak=1.5e-3),
        Phase(frames=3, batch=40, steps=steps(2000), hidden=1.0, peak=2e-3),
        Phase(frames=8, batch=16, steps=steps(1800), hidden=0.3, peak=1.5e-3),
        Phase(frames=8, batch=16, steps=steps(400), hidden=0.3, peak=1e-3, degraded=LOW_QUALITY),
    ]
    vae, bank = load_autoencoder(out, device), max(64, steps(12288))
    unet, encoder = fit_denoiser(seed + 300, phases, vae, build_tokenizer(), bank, text_steps=steps(400))
    save_text_encoder(encoder, out / "model" / "text_encoder")
    unet.save_pretrained(out / "model" / "unet")  # last: this folder says that the stage is done


def make_wan_autoencoder(out: Path, work: Path, seed: int, scale: float, device: torch.device) -> None:
    """Trains the autoencoder of the model of Wan's classes; a stage that was interrupted continues.

    Raises:
        ValueError: ``work`` is of another seed or scale.
    """
    if (out / "wan" / "vae").is_dir():
        return
    check_work(work, {"seed": seed, "scale": scale})
    vae = fit_wan_autoencoder(seed + 500, autoencoder_phases(partial(scaled, scale=scale)), device, work)
    with atomic_folder(out / "wan" / "vae") as part:
        vae.save_pretrained(part)


def load_wan_autoencoder(out: Path, device: torch.device) -> AutoencoderKLWan:
    """Returns the autoencoder of the model of Wan's classes, frozen."""
    return AutoencoderKLWan.from_pretrained(out / "wan" / "vae").to(device).eval().requires_grad_(False)


def make_wan_denoiser(out: Path, work: Path, seed: int, scale: float, device: torch.device) -> None:
    """Trains text encoder and transformer of the model of Wan's classes; a stage that was interrupted continues.

    Raises:
        ValueError: ``work`` is of another seed, scale or autoencoder.
    """
    if (out / "wan" / "transformer").is_dir():
        return
    check_work(work, {"seed": seed, "scale": scale, "wan autoencoder": digest(out / "wan" / "vae")})
    steps, vae = partial(scaled, scale=scale), load_wan_autoencoder(out, device)
    text = fit_wan_text(seed + 600, steps(600), device)
    latents, captions = wan_bank(vae, max(64, steps(24576)), seed + 600, work / "wan-bank.pt")
    rows, empty = embed(text, captions), embed(text, [""])
    transformer = fit_wan_transformer(seed + 600, transformer_phases(steps), latents, rows, empty, device, work)
    save_wan(transformer, text, out / "wan")


if __name__ == "__main__":
    main()

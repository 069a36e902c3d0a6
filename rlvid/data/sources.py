"""Data without a source folder: rendered clips, the base model's own samples, and prompts alone.

Each source of a run is one of these, or a folder that ``rlvid encode`` made. They are encoded once and kept under
``{storage}/clips``, for all runs that ask for the same.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor
from torch.nn.functional import interpolate

from rlvid import randomness
from rlvid.config import RunConfig
from rlvid.config.model import ModelConfig, SamplingConfig
from rlvid.config.train import MADE
from rlvid.data.checksums import hash_weights
from rlvid.data.clips import digest
from rlvid.data.embeddings import embedder_of, kept_texts
from rlvid.data.encode import EncodeReport, encode_clips, model_fingerprint
from rlvid.data.encoders import Item
from rlvid.data.kept import encoded_once
from rlvid.data.run_prompts import kept_prompts, prompts_of_samples
from rlvid.data.tables import TABLES
from rlvid.data.training_set import Source, TrainingSet
from rlvid.data.video_set import is_videos, listed_videos
from rlvid.data.videos import VideoError
from rlvid.diffusion.chain import denoise
from rlvid.models.base import Posterior, VideoModel
from rlvid.models.folders import family, movable
from rlvid.storage import is_uri, place_of
from rlvid.world.captions import PROMPT_SETS, write_captions
from rlvid.world.render import RENDERER, degrade, render, sample_clips, sample_degradation


def rendered_clip(seed: int, index: int, frames: int, height: int, width: int | None = None) -> tuple[str, Tensor]:
    """Returns caption and frames_FCHW of a built-in clip: an in-domain subject, every second clip degraded.

    The renderer's clips are square; other shapes show them stretched.
    """
    draw = randomness.generator(seed, "clip", index)
    clips = sample_clips(1, draw, PROMPT_SETS["in_domain"])
    (caption,) = write_captions(clips, draw)
    kind_B, strength_B = sample_degradation(1, draw, share=0.5)
    width = width or height
    pixels_FCHW = degrade(render(clips, frames, max(height, width)), kind_B, strength_B, draw)[0]
    if height == width:
        return caption, pixels_FCHW
    return caption, interpolate(pixels_FCHW, (height, width), mode="bilinear", antialias=True)


def read_rendered(seed: int, item: Item, model: VideoModel) -> tuple[str, Tensor]:
    """Returns caption and frames_FCHW of a built-in clip, as the model needs them."""
    return rendered_clip(seed, item["index"], model.frames, model.height, model.width)


def encode_builtin(count: int, seed: int, model: ModelConfig, out: str | Path, **how: Any) -> EncodeReport:
    """Encodes ``count`` clips of the built-in renderer, see ``rendered_clip``; ``how`` as for ``encode_folder``."""
    if count < 1:
        raise ValueError(f"data.count = {count}: at least one clip is needed")
    items = [{"index": i, "source": f"built-in clip {seed}/{i}", "caption": ""} for i in range(count)]
    source = {"count": count, "seed": seed, "renderer": RENDERER}
    return encode_clips(items, partial(read_rendered, seed), source, [], model, Path(out), **how)


@dataclass(frozen=True)
class BaseSampler:
    """Makes a clip of an item's caption: the model's own sample, from noise that belongs to (seed, index) alone.

    Its latents are kept as they leave the chain, as a posterior without spread: nothing is decoded and encoded again.
    """

    seed: int
    sampling: SamplingConfig

    @torch.no_grad()
    def __call__(self, item: Item, model: VideoModel) -> tuple[str, Posterior]:
        """Returns caption and latents (1, C, F, h, w); raises ``VideoError`` where these are not finite."""
        index, caption = item["index"], item["caption"]
        model.set_negative_prompt(self.sampling.negative_prompt)
        noise = randomness.normal(model.latent_shape, self.seed, "base-sample", [(index,)])
        latents = denoise(
            model,
            noise.to(model.device),
            model.encode_prompts([caption]),
            model.path.grid(self.sampling.steps),
            guidance=self.sampling.guidance,
            final=self.sampling.final_level,
        )
        if not latents.isfinite().all():
            raise VideoError(f"{item['source']}: the model's latents are not finite; try model.precision=float32")
        return caption, Posterior(latents, torch.zeros_like(latents))


def encode_samples(
    prompts: list[str],
    seed: int,
    sampling: SamplingConfig,
    model: ModelConfig,
    out: str | Path,
    texts: str | None = None,
    **how: Any,
) -> EncodeReport:
    """Keeps a sample of the base model for each prompt, see ``BaseSampler``; ``how`` as for ``encode_folder``.

    ``texts`` is where embeddings of the prompts are kept, see ``rlvid.data.embeddings.kept_texts``.
    """
    items = [{"index": i, "source": f"sample {seed}/{i}", "caption": prompt} for i, prompt in enumerate(prompts)]
    source = samples_made_with(prompts, seed, sampling, model)
    embed = None if texts is None else partial(embedder_of, movable(model.path), texts)
    sampler = BaseSampler(seed, sampling)
    return encode_clips(items, sampler, source, [], model, Path(out), denoiser=True, texts=embed, **how)


def samples_made_with(prompts: list[str], seed: int, sampling: SamplingConfig, model: ModelConfig) -> dict[str, Any]:
    """Returns all that samples depend on, besides the parts of the model that encode."""
    chain: dict[str, Any] = {"steps": sampling.steps, "guidance": sampling.guidance, "final": sampling.final_level}
    denoiser = hash_weights(model.path, (family(model.path).denoiser, "scheduler"))
    if sampling.negative_prompt:
        chain["negative_prompt"] = sampling.negative_prompt
    if model.shift is not None:
        chain["shift"] = model.shift
    return {"prompts": digest({"prompts": prompts}), "count": len(prompts), "seed": seed, "denoiser": denoiser, **chain}


def check_folder(source: str) -> None:
    """Checks that a source which no run makes is a folder, or a URI, which is looked up later.

    Raises:
        ValueError: it is none; the message says what a source may be.
    """
    path = Path(source).expanduser()
    if is_uri(source) or path.is_dir():
        return
    raise ValueError(
        f"data.source = {source!r}: {'no table of videos' if path.exists() else 'no such folder or file'}; allowed: "
        f"{', '.join(MADE)}, a folder of encoded clips (made with `rlvid encode`), or a folder or manifest "
        f"({', '.join(TABLES)}) of videos"
    )


def training_set(config: RunConfig, console: Console) -> TrainingSet:
    """Returns the sources of a run: folders that the config names, and clips or prompts that are made once and kept.

    Raises:
        ValueError: they cannot be written, or data.prompts cannot be read.
    """
    sources = [Source.of(_place(config, source, console)) for source in config.data.sources]
    if not config.method.needs_clips:  # videos would be encoded for nothing: their captions are enough
        sources = [replace(source, kind="prompts") if source.kind == "videos" else source for source in sources]
    return TrainingSet(tuple(sources), config.data.weights)


def _place(config: RunConfig, source: str, console: Console) -> str:
    make: Callable[[Path], EncodeReport]
    if source == "prompts":
        return kept_prompts(config, console)
    count, seed, model = config.data.count, config.seed, config.model
    if source == "builtin":
        name = f"builtin{RENDERER}-{count}-seed{seed}-{model_fingerprint(model)[:8]}"
        make = partial(encode_builtin, count, seed, model)
    elif source == "samples":
        prompts = prompts_of_samples(config)
        made_with = samples_made_with(prompts, seed, config.sampling, model) | {"model": model_fingerprint(model)}
        name = f"samples-{count}-seed{seed}-{digest(made_with)[:8]}"
        workers: dict[str, Any] = {"workers": config.train.workers, "use_gpu": config.train.use_gpu, "batch_size": 1}
        workers["texts"] = kept_texts(config, [config.sampling.negative_prompt, *prompts], console)
        make = partial(encode_samples, prompts, seed, config.sampling, model, **workers)
    elif is_videos(source):
        return listed_videos(source, config, console)
    else:
        return place_of(source)
    return encoded_once(config, name, make, console)

"""The stages that make the model of Wan's classes, at a scale of seconds."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLWan, WanPipeline
from torch import Tensor, nn

from rlvid import randomness
from rlvid.config.model import ModelConfig
from rlvid.diffusion.chain import denoise
from rlvid.diffusion.generate import generate
from rlvid.models.noise_path import RectifiedFlow
from rlvid.models.wan_parts import check_wan, load_wan
from rlvid.toy.pretrain import __main__ as stages
from rlvid.toy.pretrain import common, wan_autoencoder, wan_denoiser
from rlvid.toy.pretrain.common import fit
from rlvid.toy.pretrain.wan_autoencoder import (
    AutoencoderPhase,
    build_wan_autoencoder,
    decode_whole,
    encode_whole,
    fit_wan_autoencoder,
    whole_clips,
)
from rlvid.toy.pretrain.wan_denoiser import (
    TransformerPhase,
    build_wan_transformer,
    draw_levels,
    fit_wan_transformer,
    wan_bank,
)
from rlvid.toy.pretrain.wan_text import TEXT_LENGTH, TEXT_WIDTH, build_wan_text_encoder, build_wan_tokenizer
from rlvid.world.captions import PROMPT_SETS, prompt_set, prompts_in_set

CPU, TINY = torch.device("cpu"), 0.0002


class Stop(Exception):
    """The end of an interrupted fit."""


def stops_after(monkeypatch: pytest.MonkeyPatch, module: Any, name: str, calls: int) -> None:
    """Lets a function raise ``Stop`` once it was called so many times."""
    real, made = getattr(module, name), []

    def stopping(*args: Any, **kwargs: Any) -> Any:
        made.append(name)
        if len(made) > calls:
            raise Stop
        return real(*args, **kwargs)

    monkeypatch.setattr(module, name, stopping)


def check_resumes(
    run: Callable[[Path], nn.Module], work: Path, monkeypatch: pytest.MonkeyPatch, module: Any, name: str, calls: int
) -> None:
    """A run that stops on its way and then continues ends with the bits of one that did not."""
    monkeypatch.setattr(common, "STORED_EVERY", 2)
    whole = run(work / "whole").state_dict()
    with monkeypatch.context() as patched:
        stops_after(patched, module, name, calls)
        with pytest.raises(Stop):
            run(work / "parts")
    resumed = run(work / "parts").state_dict()
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)


# ------------------------------------------------------------------------------------------------------- autoencoder


@pytest.mark.parametrize("frames", [1, 5, 9])
def test_whole_clips_are_encoded_and_decoded_as_in_chunks(frames: int) -> None:
    torch.manual_seed(0)
    vae = build_wan_autoencoder().eval()
    pixels = torch.rand(2, 3, frames, 32, 32) * 2 - 1
    with torch.no_grad():
        posterior = vae.encode(pixels).latent_dist
        decoded = vae.decode(posterior.mean).sample
        with whole_clips(vae):
            whole = encode_whole(vae, pixels)
            whole_decoded = decode_whole(vae, whole.mean)
        torch.testing.assert_close(whole.mean, posterior.mean, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(whole.std, posterior.std, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(whole_decoded.clamp(-1, 1), decoded, atol=1e-5, rtol=1e-4)
        assert torch.equal(vae.decode(posterior.mean).sample, decoded), "the layers were left changed"


def test_the_first_weights_pass_signals_on_and_gray_has_a_gradient() -> None:
    torch.manual_seed(0)
    vae = build_wan_autoencoder()
    noise = torch.rand(1, 3, 5, 32, 32) * 2 - 1
    gray = torch.zeros(1, 3, 5, 32, 32)
    with whole_clips(vae):
        posterior = encode_whole(vae, noise)
        assert posterior.mean.std() > 3 * posterior.std.mean()
        decode_whole(vae, encode_whole(vae, gray).mean).mean().backward()
    norms = [parameter.grad.norm() for parameter in vae.parameters() if parameter.grad is not None]
    assert torch.stack(norms).max() < 1e3


def test_an_autoencoder_that_was_interrupted_is_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    phases = [
        AutoencoderPhase(frames=5, batch=1, steps=3, peak=1e-3),
        AutoencoderPhase(frames=9, batch=1, steps=5, peak=1e-3, decoder=True),
    ]
    monkeypatch.setattr(wan_autoencoder, "STATISTICS", 1)

    def run(work: Path) -> AutoencoderKLWan:
        return fit_wan_autoencoder(3, phases, CPU, work)

    check_resumes(run, tmp_path, monkeypatch, wan_autoencoder, "draw_footage", 6)
    encoder = torch.load(tmp_path / "whole" / "wan-autoencoder-1.pt", weights_only=True)
    decoder = torch.load(tmp_path / "whole" / "wan-autoencoder-2.pt", weights_only=True)
    assert (encoder["step"], decoder["step"]) == (3, 5)
    assert len(decoder["weights"]) < len(encoder["weights"])


def test_latents_are_normalised_by_channel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wan_autoencoder, "STATISTICS", 1)
    vae = fit_wan_autoencoder(3, [], CPU)
    latents, captions = wan_bank(vae, 1, seed=5)
    assert latents.shape == (64, 8, 3, 8, 8)
    assert len(captions) == 64
    std_C, mean_C = torch.std_mean(latents, (0, 2, 3, 4))
    torch.testing.assert_close(std_C, torch.ones(8), atol=0.4, rtol=0)
    torch.testing.assert_close(mean_C, torch.zeros(8), atol=0.4, rtol=0)


# ---------------------------------------------------------------------------------------------------------- text


def test_every_caption_has_known_words_and_fits() -> None:
    tokenizer = build_wan_tokenizer()
    prompts = [each for name in PROMPT_SETS for each in prompt_set(name, prompts_in_set(name))]
    tokens = tokenizer(prompts).input_ids
    assert max(map(len, tokens)) <= TEXT_LENGTH - 2
    assert not any(tokenizer.unk_token_id in each for each in tokens)
    assert all(each[-1] == tokenizer.eos_token_id for each in tokens)
    assert len({tuple(each) for each in tokens}) == len(prompts)
    assert tokenizer("A Red zebra").input_ids == [
        *tokenizer("a red").input_ids[:-1], tokenizer.unk_token_id, tokenizer.eos_token_id
    ]  # fmt: skip


# ------------------------------------------------------------------------------------------------------- transformer


def test_levels_are_spread_evenly_and_hidden_clips_are_pure_noise() -> None:
    path = RectifiedFlow(3.0)
    levels = draw_levels(path, 46, 0.15, torch.Generator().manual_seed(0))
    assert (levels == 1.0).sum() == 6
    shown = levels[:40]
    uniform = shown / (3.0 - 2.0 * shown)  # the shift, undone
    assert torch.equal((uniform * 40).floor().long(), torch.arange(40))


def test_a_transformer_that_was_interrupted_is_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    latents, text, empty = torch.randn(4, 8, 3, 8, 8), torch.randn(4, 16, 64), torch.randn(1, 16, 64)
    phases = [
        TransformerPhase(frames=1, batch=4, steps=3, peak=1e-3),
        TransformerPhase(frames=3, batch=2, steps=5, peak=1e-3),
    ]

    def run(work: Path) -> nn.Module:
        return fit_wan_transformer(3, phases, latents, text, empty, CPU, work)

    check_resumes(run, tmp_path, monkeypatch, wan_denoiser, "draw_levels", 6)


@pytest.mark.slow
def test_the_transformer_learns_the_velocity() -> None:
    """Of clips that are all the same, pure noise tells all: v = eps - x0."""
    x0 = torch.randn(1, 8, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    text = torch.randn(1, 16, 64)
    phase = TransformerPhase(frames=1, batch=16, steps=120, peak=3e-3, hidden=1.0)
    made = fit_wan_transformer(0, [phase], x0, text, torch.zeros(1, 16, 64), CPU)
    noise = torch.randn(1, 8, 1, 8, 8, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        velocity = made(noise, torch.tensor([1000.0]), text, return_dict=False)[0]
    assert (velocity - (noise - x0)).square().mean() < 0.5 < 1.5 < (velocity + (noise - x0)).square().mean()


def test_the_parts_are_small() -> None:
    parts = build_wan_autoencoder(), build_wan_transformer(), build_wan_text_encoder(build_wan_tokenizer())
    count = sum(parameter.numel() for part in parts for parameter in part.parameters())
    assert 1_500_000 < count < 1_700_000
    assert build_wan_transformer().config.text_dim == TEXT_WIDTH


# ------------------------------------------------------------------------------------------------------------- stages


def test_a_loss_that_is_not_finite_ends_the_fit_and_is_not_stored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(common, "STORED_EVERY", 1)
    layer, state = nn.Linear(1, 1), tmp_path / "a.pt"

    def loss_of_step(step: int) -> Tensor:
        return layer(torch.ones(1)).sum() * (1.0 if step < 2 else float("nan"))

    with pytest.raises(FloatingPointError, match=r"layer: the loss of step 3 is nan"):
        fit([layer], loss_of_step, steps=5, peak=1e-3, name="layer", state=state)
    stored = torch.load(state, weights_only=True)
    assert stored["step"] == 2
    assert all(each.isfinite().all() for each in stored["weights"])


@pytest.mark.slow
def test_the_stages_write_a_model_that_samples_and_diffusers_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wan_autoencoder, "STATISTICS", 1)
    out, work = tmp_path / "out", tmp_path / "work"
    stages.make_wan_autoencoder(out, work, 0, TINY, CPU)
    stages.make_wan_denoiser(out, work, 0, TINY, CPU)
    spec = ModelConfig(path=str(out / "wan"), frames=9, size=32)
    check_wan(spec.path)
    model = load_wan(spec)
    assert model.latent_shape == (8, 3, 8, 8)
    assert model.path.shift == 3.0
    prompts = ["a red circle moving left", "blue stripes at rest, white background"]
    frames = generate(model, prompts, steps=2)
    assert frames.shape == (2, 9, 3, 32, 32)
    assert frames.isfinite().all()
    assert (frames[0] - frames[1]).abs().max() > 0

    pipeline = WanPipeline.from_pretrained(out / "wan")
    noise = randomness.normal(model.latent_shape, 0, "generate", [(0,)])
    own = denoise(model, noise, model.encode_prompts(prompts[:1]), model.path.grid(1), guidance=3.0)
    latents = pipeline(
        prompts[0], height=32, width=32, num_frames=9, num_inference_steps=1, guidance_scale=3.0, latents=noise,
        max_sequence_length=TEXT_LENGTH, output_type="latent",
    ).frames  # fmt: skip
    torch.testing.assert_close(own, latents, atol=1e-2, rtol=1e-2)

    files = {path: path.stat().st_mtime_ns for path in (out / "wan").rglob("*") if path.is_file()}
    assert sum(path.stat().st_size for path in files) < 6.5e6
    stages.make_wan_autoencoder(out, work, 0, TINY, CPU)
    stages.make_wan_denoiser(out, work, 0, TINY, CPU)
    assert files == {path: path.stat().st_mtime_ns for path in (out / "wan").rglob("*") if path.is_file()}


def test_a_state_of_another_seed_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, work = tmp_path / "out", tmp_path / "work"
    stops_after(monkeypatch, wan_autoencoder, "draw_footage", 0)
    with pytest.raises(Stop):
        stages.make_wan_autoencoder(out, work, 0, TINY, CPU)
    with pytest.raises(ValueError, match=rf"^{re.escape(str(work))}: was made with another seed; delete it"):
        stages.make_wan_autoencoder(out, work, 1, TINY, CPU)

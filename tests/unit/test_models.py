"""The tiny model's parts, the adapter in PEFT's layout, and loading from a folder."""

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import UNet3DConditionModel
from peft import LoraConfig, PeftModel, inject_adapter_in_model
from peft.utils import set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor

from rlvid.models.lora import inject_lora, load_lora, lora_parameters, lora_scale, lora_state, save_lora
from rlvid.models.unet3d import UNet3DModel, load_model
from rlvid.reward.video import plan_frames
from rlvid.toy.tiny import save_tiny_model, tiny_model, tiny_reward

PROMPTS = ["a red circle moving left", "a dog"]
TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]
PREFIX = "base_model.model."
EXPECTED = (
    "expected 'builtin', 'builtin-wan', 'random', a hub id such as 'ali-vilab/text-to-video-ms-1.7b', or a folder in "
    "diffusers' layout with unet or transformer, vae, text_encoder, tokenizer and scheduler"
)
LAYOUT = [(part, f"{part}/config.json, {part}/*.safetensors") for part in ("unet", "vae", "text_encoder")]
LAYOUT += [("tokenizer", "tokenizer/tokenizer_config.json, tokenizer/*[br].json")]
LAYOUT += [("scheduler", "scheduler/scheduler_config.json")]


@pytest.fixture(scope="module")
def base() -> UNet3DModel:
    return tiny_model()


def noise_of(model: UNet3DModel) -> Tensor:
    latents = torch.randn(2, *model.latent_shape, generator=torch.Generator().manual_seed(1))
    return model.predict(latents, 301, model.encode_prompts(PROMPTS), 3.0).eps


def adapted(rank: int = 4, seed: int = 0, random: bool = True) -> UNet3DModel:
    model = tiny_model()
    parameters = inject_lora(model.denoiser, rank, TARGETS, seed)
    if random:
        generator = torch.Generator().manual_seed(2)
        for p in parameters:
            p.data.copy_(torch.randn(p.shape, generator=generator) / 4)
    return model


# --------------------------------------------------------------------------------------------------------- decoding


@pytest.mark.parametrize("chunk", [1, 64])
def test_only_the_chosen_frames_are_decoded_and_the_gradient_is_that_of_all(base: UNet3DModel, chunk: int) -> None:
    """Select, then decode: the same reward and gradient as decode, then select; a fraction of the work."""
    reward, plan = tiny_reward(), plan_frames(torch.rand(2, 2), 4, 1.0)
    latents = torch.randn(2, *base.latent_shape).requires_grad_()
    decoded: list[int] = []
    hook = base.vae.decoder.register_forward_hook(lambda _, args, __: decoded.append(len(args[0])))
    base.decode_chunk = chunk
    try:
        chosen = base.decode_frames(latents, plan.frames_BS)
    finally:
        hook.remove()
        base.decode_chunk = 64
    assert sum(decoded) == 4
    assert max(decoded) == min(chunk, 4)
    every = base.vae.decode(latents.transpose(1, 2).flatten(0, 1) / base.vae.config.scaling_factor).sample
    every = (every / 2 + 0.5).unflatten(0, (2, 4))
    selected = torch.stack([every[row, plan.frames_BS[row]] for row in range(2)])
    torch.testing.assert_close(chosen, selected, atol=1e-5, rtol=0)
    got, expected = (
        torch.autograd.grad(plan.reward(reward(frames, PROMPTS)).sum(), latents)[0] for frames in (chosen, selected)
    )
    assert (got - expected).norm() < 1e-5 * expected.norm()
    touched = torch.zeros(2, 4).scatter(1, plan.frames_BS, 1.0)
    assert torch.equal(got.abs().sum((1, 3, 4)) > 0, touched.bool())


def test_frames_are_encoded_one_by_one_and_scaled(base: UNet3DModel) -> None:
    frames = torch.rand(2, 4, 3, 16, 16)
    posterior = base.encode_frames(frames)
    latent = base.vae.encode(frames[1, 2][None] * 2 - 1).latent_dist
    scale = base.vae.config.scaling_factor
    torch.testing.assert_close(posterior.mean[1, :, 2], latent.mean[0] * scale, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(posterior.std[1, :, 2], latent.std[0] * scale, atol=1e-6, rtol=1e-5)
    z = torch.randn(posterior.mean.shape)
    torch.testing.assert_close(posterior.sample(z), posterior.mean + posterior.std * z)
    assert posterior.mean.shape == (2, *base.latent_shape)
    assert not posterior.mean.requires_grad


# ---------------------------------------------------------------------------------------------------------- adapter


def test_the_papers_parameter_counts() -> None:
    """ModelScopeT2V is diffusers' default: 1.58 M trainable and 1,347.44 M in all, in units of 2^20."""
    with torch.device("meta"):
        unet = UNet3DConditionModel()
    assert sum(p.numel() for p in unet.parameters()) == 1_411_233_860
    parameters = inject_lora(unet, 4, TARGETS, seed=0)
    assert len(parameters) == 2 * 264
    assert sum(p.numel() for p in parameters) == 1_661_440
    assert {id(p) for p in unet.parameters() if p.requires_grad} == {id(p) for p in parameters}
    assert round(1_661_440 / 2**20, 2) == 1.58
    assert round(sum(p.numel() for p in unet.parameters()) / 2**20, 2) == 1347.44


def test_a_new_adapter_changes_nothing_and_is_drawn_as_the_paper_says(base: UNet3DModel) -> None:
    for rank in (4, 16):
        model = adapted(rank, random=False)
        assert torch.equal(noise_of(model), noise_of(base))
        named = {n: p for n, p in model.denoiser.named_parameters() if "lora_" in n}
        drawn = torch.cat([p.flatten() for n, p in named.items() if "lora_A" in n])
        assert drawn.mean().abs() < 5 / rank / len(drawn) ** 0.5
        assert float(drawn.detach().std()) == pytest.approx(1 / rank, rel=0.03)
        assert not any(p.any() for n, p in named.items() if "lora_B" in n)
        assert all(p.dtype == torch.float32 for p in named.values())


def test_an_adapter_depends_on_its_seed_alone() -> None:
    first = lora_state(adapted(seed=3, random=False).denoiser)
    torch.rand(7)
    again, other = (lora_state(adapted(seed=s, random=False).denoiser) for s in (3, 4))
    assert all(torch.equal(first[n], again[n]) for n in first)
    assert all(not torch.equal(first[n], other[n]) for n in first if "lora_A" in n)


def test_an_adapter_is_float32_and_its_base_stays_as_coarse_as_it_is() -> None:
    denoiser = tiny_model().denoiser.bfloat16()
    trained = inject_lora(denoiser, 2, TARGETS, seed=0)
    assert {p.dtype for p in trained} == {torch.float32}
    assert {p.dtype for n, p in denoiser.named_parameters() if "lora_" not in n} == {torch.bfloat16}


def test_scale_blends_from_the_base_model_to_the_tuned_one(base: UNet3DModel) -> None:
    model = adapted()
    tuned = noise_of(model)
    assert (tuned - noise_of(base)).abs().max() > 1e-2
    lora_scale(model.denoiser, 0.0)
    assert torch.equal(noise_of(model), noise_of(base))
    lora_scale(model.denoiser, 0.5)
    half = noise_of(model)
    lora_scale(model.denoiser, 1.0)
    assert torch.equal(noise_of(model), tuned)
    for name, p in model.denoiser.named_parameters():
        if "lora_B" in name:
            p.data /= 2
    torch.testing.assert_close(noise_of(model), half, atol=1e-5, rtol=0)


def test_an_adapter_survives_the_disk(tmp_path: Path) -> None:
    model = adapted()
    save_lora(lora_state(model.denoiser), 4, TARGETS, tmp_path / "new" / "adapter")
    assert sorted(p.name for p in (tmp_path / "new" / "adapter").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    told = json.loads((tmp_path / "new" / "adapter" / "adapter_config.json").read_text())
    assert (told["target_modules"], told["lora_alpha"], told["lora_dropout"]) == (TARGETS, 4, 0.0)
    save_lora(lora_state(model.denoiser), 4, TARGETS, tmp_path / "twice", 2.0)
    assert json.loads((tmp_path / "twice" / "adapter_config.json").read_text())["lora_alpha"] == 8
    other = adapted(seed=9, random=False)
    load_lora(other.denoiser, tmp_path / "new" / "adapter")
    assert torch.equal(noise_of(other), noise_of(model))
    assert len(lora_parameters(other.denoiser)) == len(lora_state(model.denoiser))


def test_peft_injects_a_saved_adapter(tmp_path: Path) -> None:
    model, other = adapted(), tiny_model()
    save_lora(lora_state(model.denoiser), 4, TARGETS, tmp_path)
    inject_adapter_in_model(LoraConfig.from_pretrained(str(tmp_path)), other.denoiser)
    state = load_file(tmp_path / "adapter_model.safetensors")
    assert all(name.startswith(PREFIX) for name in state)
    result = set_peft_model_state_dict(other.denoiser, {n.removeprefix(PREFIX): t for n, t in state.items()})
    assert not result.unexpected_keys
    assert torch.equal(noise_of(other), noise_of(model))


def test_peft_loads_a_saved_adapter(tmp_path: Path) -> None:
    model, other = adapted(), tiny_model()
    save_lora(lora_state(model.denoiser), 4, TARGETS, tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # missing keys are a warning of PEFT's own
        other.denoiser = PeftModel.from_pretrained(other.denoiser, str(tmp_path))
    torch.testing.assert_close(noise_of(other), noise_of(model), atol=1e-6, rtol=0)


def _rename(state: dict[str, Tensor], name: str) -> None:
    state["foreign.lora_A.weight"] = state.pop(name)


def _cut(state: dict[str, Tensor], name: str) -> None:
    state[name] = state[name][:1].contiguous()


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (_rename, r"1 keys missing \({name}\); 1 keys foreign \(foreign\.lora_A\.weight\)"),
        (_cut, r"1 keys of another shape \({name} "),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused_by_name(
    tmp_path: Path, spoil: Callable[[dict[str, Tensor], str], None], words: str
) -> None:
    model = adapted()
    before = {n: t.clone() for n, t in lora_state(model.denoiser).items()}
    state = {n: t + 1 for n, t in before.items()}
    name = next(iter(state))
    save_lora(state, 4, TARGETS, tmp_path)
    spoil(state, name)
    save_file(state, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=words.format(name=name.replace(".", r"\."))) as error:
        load_lora(model.denoiser, tmp_path)
    assert "\n" not in str(error.value)
    assert all(torch.equal(before[n], t) for n, t in lora_state(model.denoiser).items()), "half loaded"


def test_a_folder_without_an_adapter_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"{tmp_path} holds no adapter \(adapter_model\.safetensors\)"):
        load_lora(adapted().denoiser, tmp_path)


@pytest.mark.parametrize("targets", [["query"], ["to_q", "query"]])
def test_a_target_that_no_layer_has_is_refused(targets: list[str]) -> None:
    denoiser = tiny_model().denoiser
    words = r"model\.lora\.targets: no linear layer of the denoiser is called 'query'; the attentions have to_q"
    with pytest.raises(ValueError, match=words) as error:
        inject_lora(denoiser, 4, targets, seed=0)
    assert "\n" not in str(error.value)
    assert not lora_parameters(denoiser), "half injected"


# ---------------------------------------------------------------------------------------------------------- loading


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model in diffusers' layout."""
    folder = tmp_path_factory.mktemp("stored")
    save_tiny_model(folder)
    return folder


def test_a_stored_model_predicts_the_same(base: UNet3DModel, stored: Path) -> None:
    loaded = load_model(str(stored), frames=4)
    assert (loaded.latent_shape, loaded.height, loaded.width, loaded.fps) == (base.latent_shape, 16, 16, 8)
    assert torch.equal(loaded.path.abar, base.path.abar)
    assert torch.equal(noise_of(loaded), noise_of(base))
    latents = torch.randn(1, *base.latent_shape)
    frames = torch.tensor([[3, 0]])
    assert torch.equal(loaded.decode_frames(latents, frames), base.decode_frames(latents, frames))
    for part in (loaded.denoiser, loaded.vae, loaded.text_encoder):
        assert not part.training
        assert not any(p.requires_grad for p in part.parameters())


def test_frames_size_and_precision_are_chosen_at_loading(stored: Path) -> None:
    model = load_model(str(stored), size=24, precision="bfloat16")
    assert model.latent_shape == (4, 16, 12, 12)
    assert {p.dtype for part in (model.denoiser, model.vae, model.text_encoder) for p in part.parameters()} == {
        torch.bfloat16
    }
    latents = torch.randn(1, *model.latent_shape)
    prediction = model.predict(latents, 1, model.encode_prompts(["a dog"]), 1.0)
    assert prediction.eps.dtype == prediction.x0.dtype == torch.float32
    assert model.decode_frames(latents, torch.tensor([[5]])).dtype == torch.float32


def test_what_cannot_be_loaded_is_named_in_one_line(stored: Path, tmp_path: Path) -> None:
    def message(folder: Path, **options: int) -> str:
        with pytest.raises(ValueError, match=r".") as error:
            load_model(str(folder), **options)
        assert "\n" not in str(error.value)
        return str(error.value)

    nowhere = message(tmp_path / "nowhere")
    assert "nowhere" in nowhere
    assert f"there is no such folder, nor a model of that name; {EXPECTED}" in nowhere
    assert "has neither unet nor transformer" in message(tmp_path)

    folder = tmp_path / "model"
    shutil.copytree(stored, folder)
    assert "model.size = 17 is not a multiple of 2" in message(folder, size=17)
    for part, files in LAYOUT:
        shutil.rmtree(folder / part)
        lack = "has neither unet nor transformer" if part == "unet" else f"lacks {files}"
        assert message(folder) == f"model.path = '{folder}': {folder} {lack}; {EXPECTED}"
        shutil.copytree(stored / part, folder / part)
    (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    assert message(folder) == f"model.path = '{folder}': {folder} lacks unet/*.safetensors; {EXPECTED}"
    shutil.copytree(stored / "unet", folder / "unet", dirs_exist_ok=True)

    scheduler = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
    (folder / "scheduler" / "scheduler_config.json").write_text(
        json.dumps(scheduler | {"prediction_type": "v_prediction"})
    )
    assert "prediction_type 'v_prediction' is not supported; allowed: 'epsilon'" in message(folder)

    config = json.loads((folder / "unet" / "config.json").read_text())
    (folder / "unet" / "config.json").write_text(json.dumps(config | {"_class_name": "WanTransformer3DModel"}))
    assert "its denoiser is a WanTransformer3DModel; supported: UNet3DConditionModel" in message(folder)

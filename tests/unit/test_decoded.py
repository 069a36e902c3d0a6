"""The reward's gradient through a causal decoder: equal to that of one graph from the reward to the adapter."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import WanUpsample
from helpers import PROMPTS, Listener, check_slopes, close, flat_gradient, parameters
from torch import Tensor, nn

from rlvid import randomness
from rlvid.algorithms.base import Batch, Context, Stopwatch, Update
from rlvid.algorithms.catalogue import ALGORITHMS
from rlvid.algorithms.reward_gradient import SHARE_EVERY
from rlvid.algorithms.scoring import plan
from rlvid.config import parse_config
from rlvid.config.model import LOSS_SCALE, ModelConfig
from rlvid.config.train import OptimizerConfig
from rlvid.diffusion.schedule import check_chain
from rlvid.models.base import VideoModel
from rlvid.models.causal_decode import CausalDecoder, DecodeSettings
from rlvid.models.chunk_plan import ChunkPlan
from rlvid.models.decoded import Decoded, DecodedApart
from rlvid.models.decoder_cache import tensors
from rlvid.models.lora import inject_lora
from rlvid.models.wan_parts import decode_settings, load_wan
from rlvid.toy.tiny_wan import tiny_wan
from rlvid.train.engine import TorchEngine

METHODS: dict[str, dict[str, Any]] = {
    "instructvideo": {"tau": 0.5, "denoising": 0.1},
    "draft": {"gradient_steps": 2, "kl": 0.1},
    "draft-lv": {"repeats": 2},
    "alignprop": {"truncation": "fixed", "cut": 2},
}
SHARE = "decode/gradient_share"


class Look(nn.Module):
    """A reward that is not linear in the pixels, and not the same in each frame."""

    def __init__(self, whole_video: bool = False) -> None:
        super().__init__()
        self.whole_video = whole_video

    def forward(self, frames_BSCHW: Tensor, prompts: list[str]) -> Tensor:
        if self.whole_video:
            return torch.tanh(frames_BSCHW.diff(dim=1).square().mean((1, 2, 3, 4)))
        weights = torch.linspace(1, 2, frames_BSCHW[0, 0].numel()).view(frames_BSCHW.shape[2:]).to(frames_BSCHW)
        return torch.tanh((weights * frames_BSCHW).square().mean((2, 3, 4)))


def make(
    name: str = "draft",
    *,
    whole_video: bool = False,
    window: int | None = None,
    plain: bool = False,
    dtype: torch.dtype = torch.float32,
    **sections: dict[str, Any],
) -> Any:
    """A method on a tiny Wan with an adapter, in chains of three steps; ``plain``: in one graph with the decoder."""
    train = {"batch_size": 2, "checkpoint_activations": True}
    settings: dict[str, dict[str, Any]] = {
        "sampling": {"steps": 3, "eta": 0.0},
        "train": train,
        "reward": {"segments": 2},
    }
    more = {k: settings.get(k, {}) | sections.get(k, {}) for k in settings.keys() | sections.keys()}
    config = parse_config({"method": {"name": name} | METHODS[name] | more.pop("method", {})} | more)
    model = tiny_wan()
    assert model.text is not None
    for part in (model.denoiser, model.vae):
        nn.Module.to(part, dtype)  # diffusers' own warns of nothing
    model._dtype = dtype
    model._decoder.settings = DecodeSettings(window=window)
    generator = torch.Generator().manual_seed(2)
    for parameter in inject_lora(model.denoiser, 2, ["attention"], seed=0):
        parameter.data = (torch.randn(parameter.shape, generator=generator) / 4).to(dtype)
    if plain:
        model.decode = lambda *inputs, **how: VideoModel.decode(model, *inputs, recompute=False)
    return ALGORITHMS[name](Context(config, model, Look(whole_video), None, Stopwatch(torch.device("cpu"))))


def clips(method: Any, serials: tuple[int, ...] = (8, 9), step: int = 1) -> Batch:
    """A clip and a prompt for each serial."""
    model = method.context.model
    latents = randomness.normal(model.latent_shape, 0, "clip", [(s,) for s in serials])
    prompts = [PROMPTS[s % 4] for s in serials]
    return Batch(step, list(serials), prompts, model.encode_prompts(prompts), latents)


def gradient_of(method: Any, **batch: Any) -> tuple[Tensor, list[Update]]:
    return flat_gradient(method, clips(method, **batch))


@pytest.fixture
def _float64(monkeypatch: pytest.MonkeyPatch) -> None:
    """diffusers rounds to float32 before an upsampling, and between the layers of the transformer."""
    monkeypatch.setattr(WanUpsample, "forward", nn.Upsample.forward)
    rounded = Tensor.float
    monkeypatch.setattr(Tensor, "float", lambda x: x if x.dtype == torch.float64 else rounded(x))


# ---------------------------------------------------------------------------------------------------------- gradient


@pytest.mark.usefixtures("_float64")
@pytest.mark.parametrize("whole_video", [False, True])
@pytest.mark.parametrize("name", METHODS)
def test_the_gradient_is_that_of_one_graph(name: str, whole_video: bool) -> None:
    expected, others = gradient_of(make(name, whole_video=whole_video, plain=True, dtype=torch.float64))
    got, updates = gradient_of(make(name, whole_video=whole_video, dtype=torch.float64))
    assert got.dtype == torch.float64
    close(got, expected, 1e-10)
    for update, other in zip(updates, others, strict=True):
        assert float(update.loss.detach()) == pytest.approx(float(other.loss.detach()), rel=1e-12)
        assert update.metrics.keys() == other.metrics.keys()
        assert SHARE not in update.metrics, "nothing is left out"


@pytest.mark.usefixtures("_float64")
@pytest.mark.parametrize("whole_video", [False, True])
def test_the_gradient_of_the_whole_loss_is_that_of_finite_differences(whole_video: bool) -> None:
    """Of InstructVideo in float64, with every step in the window: a prefix without gradient is no constant."""
    steps = {"tau": 0.7, "gradient_steps": 2}
    method = make("instructvideo", method=steps, whole_video=whole_video, dtype=torch.float64)
    batch = clips(method)
    batch = replace(batch, text_BLD=batch.text_BLD.double(), latents_BCFhw=batch.latents_BCFhw.double())
    check_slopes(method, batch)


@pytest.mark.parametrize("whole_video", [False, True])
def test_the_gradient_is_that_of_one_graph_in_float32(whole_video: bool) -> None:
    expected, _ = gradient_of(make("instructvideo", whole_video=whole_video, plain=True))
    for recompute in (True, False):
        train = {"checkpoint_activations": recompute}
        got, _ = gradient_of(make("instructvideo", whole_video=whole_video, train=train))
        close(got, expected, 1e-5)


def test_parts_of_a_batch_add_up() -> None:
    expected, (one,) = gradient_of(make("instructvideo"))
    got, updates = gradient_of(make("instructvideo", train={"micro_batch": 1}))
    assert [update.step for update in updates] == [False, True]
    close(got, expected, 1e-5)
    assert float(sum(u.loss.detach() for u in updates)) == pytest.approx(float(one.loss.detach()), abs=1e-6)


def test_the_loss_is_the_one_of_the_reward_and_the_engine_sees_one_backward() -> None:
    method = make("instructvideo", method={"denoising": 0.0})
    engine = TorchEngine(method.context.model.denoiser, OptimizerConfig(lr=1e-2, warmup=0))
    before = [p.detach().clone() for p in parameters(method)]
    calls: list[int] = []
    decoder = method.context.model.vae.decoder
    hook = decoder.register_forward_hook(lambda *_: calls.append(1))
    (update,) = method.updates(clips(method))
    assert float(update.loss.detach()) == pytest.approx(1 - float(update.samples.reward_B.mean()), abs=1e-6)
    decoded = len(calls)
    engine.backward(update.loss, True)
    hook.remove()
    assert len(calls) == decoded, "the decoder's backward pass is over"
    assert not engine.step(0).skipped
    assert all((p != was).any() for p, was in zip(parameters(method), before, strict=True))


def test_a_loss_scale_changes_nothing_but_what_half_precision_loses(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[float] = []
    true = DecodedApart.pull_back

    def watched(self: DecodedApart, loss: Tensor, **how: Any) -> Any:
        seen.append(how["scale"])
        return true(self, loss, **how)

    monkeypatch.setattr(DecodedApart, "pull_back", watched)
    expected, _ = gradient_of(make())
    got, _ = gradient_of(make(model={"precision": "float16"}))  # of the settings; the weights are float32 here
    assert seen == [1.0, LOSS_SCALE["float16"]]
    close(got, expected, 1e-6)


# -------------------------------------------------------------------------------------------------- failing rewards


def test_a_video_without_a_reward_gives_no_gradient_and_breaks_no_other() -> None:
    def broken(frames_BSCHW: Tensor, prompts: list[str]) -> Tensor:
        scores_BS = Look()(frames_BSCHW, prompts)
        return scores_BS * torch.where(torch.tensor([s == PROMPTS[0] for s in prompts]), math.nan, 1.0)[:, None]

    method, plain = make(), make(plain=True)
    for each in (method, plain):
        each.context.reward, each.context.observer = broken, Listener()
    got, (update,) = gradient_of(method)
    expected, _ = gradient_of(plain)
    assert update.metrics["reward/excluded"] == (1.0, 1.0)
    assert got.isfinite().all()
    close(got, expected, 1e-5)


def test_a_reward_may_write_into_its_frames() -> None:
    method = make()
    expected, _ = gradient_of(method)
    method = make()
    method.context.reward = lambda frames, prompts: Look()(frames.mul_(1.0), prompts)
    got, (update,) = gradient_of(method)
    assert update.metrics["reward/excluded"] == (0.0, 1.0)
    close(got, expected, 1e-6)


def test_without_a_gradient_frames_are_only_decoded() -> None:
    model = tiny_wan()
    latents = torch.randn(1, *model.latent_shape)
    frames_BS = torch.tensor([[0, 5]])
    for decoded in (model.decode(latents, frames_BS), _without_graph(model, latents.requires_grad_(), frames_BS)):
        assert type(decoded) is Decoded
        assert not decoded.frames.requires_grad


@torch.no_grad()
def _without_graph(model: Any, latents: Tensor, frames_BS: Tensor) -> Decoded:
    return model.decode(latents, frames_BS)


# ------------------------------------------------------------------------------------------------------------ window


def cosines(method: Any, window: int, reward: Callable[..., Tensor]) -> Tensor:
    """Of the gradient in the latents with a window to the one without, for each video, by hand."""
    batch, model = clips(method, step=SHARE_EVERY), method.context.model
    with torch.no_grad():
        latents = method.sample(batch)
    chosen = plan(method.context, batch)
    found = []
    for settings in (DecodeSettings(window=window), DecodeSettings()):
        model._decoder.settings = settings
        held = latents.clone().requires_grad_()
        frames = model.decode_frames(held, chosen.frames_BS, recompute=True)
        loss = (1 - chosen.reward(reward(frames, batch.prompts).reshape(2, -1).expand(chosen.frames_BS.shape))).mean()
        found.append(torch.autograd.grad(loss, held)[0].flatten(1))
    return torch.cosine_similarity(*found)


@pytest.mark.parametrize("whole_video", [False, True])
def test_the_share_that_a_window_keeps_is_measured_on_some_steps(whole_video: bool) -> None:
    shares = []
    for window in (1, 2):
        method = make(window=window, whole_video=whole_video)
        _, (update,) = gradient_of(method, step=SHARE_EVERY)
        total, count = update.metrics[SHARE]
        assert count == 2
        assert 0 < total / count < 1 + 1e-6
        expected = cosines(method, window, Look(whole_video))
        assert total == pytest.approx(float(expected.sum()), rel=1e-4)
        shares.append(total)
        unmeasured, (update,) = gradient_of(make(window=window, whole_video=whole_video), step=SHARE_EVERY + 1)
        assert SHARE not in update.metrics
        assert unmeasured.isfinite().all()
    assert shares[0] < 2 - 1e-3
    assert shares[0] < shares[1] < 2 - 1e-3 or whole_video, "two chunks are all where each chunk is scored"


def test_a_window_changes_the_gradient_and_one_over_all_chunks_does_not() -> None:
    expected, _ = gradient_of(make("instructvideo"))
    close(gradient_of(make("instructvideo", window=3), step=1)[0], expected, 1e-5)
    short, _ = gradient_of(make("instructvideo", window=1))
    assert (short - expected).norm() > 1e-3 * expected.norm()


def test_videos_without_a_gradient_have_no_share() -> None:
    method = make(window=1)
    method.context.reward = lambda frames, prompts: Look()(frames, prompts) * torch.tensor([[1.0], [0.0]])
    _, (update,) = gradient_of(method, step=0)
    assert update.metrics[SHARE][1] == 1


def test_the_measurement_of_a_window_can_be_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    expected, _ = gradient_of(make(window=1), step=SHARE_EVERY + 1)
    monkeypatch.setattr(CausalDecoder, "gradient_share", lambda *_: pytest.fail("it was measured"))
    method = make()
    method.context.model._decoder.settings = decode_settings(ModelConfig(decode_window=1, decode_share=False))
    got, (update,) = gradient_of(method, step=SHARE_EVERY)
    assert SHARE not in update.metrics
    close(got, expected, 1e-6)


# ------------------------------------------------------------------------------------------------------------ caches


def test_caches_in_half_precision_take_half_the_memory_and_change_the_gradient_by_a_hundredth_at_most() -> None:
    """Of the learned decoder of the built-in world, over all chunks."""
    found = []
    for precision in ("float32", "bfloat16"):
        model = load_wan(ModelConfig(path="builtin-wan", decode_cache_precision=precision), text=False)
        latents = torch.randn(1, *model.latent_shape, generator=torch.Generator().manual_seed(1)).requires_grad_()
        decoded = model.decode(latents, torch.tensor([[0, 3, 8]]), recompute=True)
        loss, _ = decoded.pull_back(Look()(decoded.frames, [""]).sum())
        (gradient,) = torch.autograd.grad(loss, latents)
        with torch.no_grad():
            chunks = ChunkPlan.of(torch.tensor([[8]]), model.stride)
            _, borders = model._decoder.stream(model._decoder.features(latents), chunks, keep=True)
        size = sum(each.nbytes for _, cache in borders for each in tensors(cache))
        found.append((decoded.frames.detach(), gradient, size))
    (frames, exact, whole), (others, rounded, half) = found
    assert torch.equal(frames, others)
    assert whole == 2 * half > 0
    assert 0 < (rounded - exact).norm() < 0.01 * exact.norm()


# ---------------------------------------------------------------------------------------------------------- settings


def test_settings_of_chunks_are_for_causal_decoders() -> None:
    with pytest.raises(ValueError, match=r"^model\.decode_offload = true: .*'builtin'"):
        check_chain(parse_config({"model": {"decode_offload": True}}))
    kept = {"model": {"path": "builtin-wan", "decode_offload": True}, "train": {"checkpoint_activations": False}}
    with pytest.raises(ValueError, match=r"^model\.decode_offload = true: train\.checkpoint_activations = false"):
        check_chain(parse_config(kept))
    with pytest.raises(ValueError, match=r"^model\.decode_window = 2: .*'builtin'"):
        check_chain(parse_config({"model": {"decode_window": 2}}))
    for method in ("grpo", "ddpo", "dpok", "rwr", "raft"):
        for key, value in (("decode_window", 2), ("decode_offload", True)):
            settings = {"method": method, "model": {"path": "builtin-wan", key: value}, "train": {"group_size": 4}}
            with pytest.raises(ValueError, match=rf"^model\.{key} = .* is for .* '{method}' .*: leave it out$"):
                check_chain(parse_config(settings))
    with pytest.raises(ValueError, match=r"^model\.decode_chunk = 4: .*'builtin-wan'.*leave it out, or set .*=64"):
        check_chain(parse_config({"model": {"path": "builtin-wan", "decode_chunk": 4}}))
    check_chain(parse_config({"model": {"path": "builtin-wan", "decode_chunk": 64, "decode_window": 2}}))
    with pytest.raises(ValueError, match=r"^model\.decode_share = false: .*'builtin'"):
        check_chain(parse_config({"model": {"decode_share": False}}))
    with pytest.raises(ValueError, match=r"^model\.decode_cache_precision = bfloat16: .*'builtin'"):
        check_chain(parse_config({"model": {"decode_cache_precision": "bfloat16"}}))
    kept["model"] = {"path": "builtin-wan", "decode_cache_precision": "bfloat16"}
    with pytest.raises(ValueError, match=r"^model\.decode_cache_precision = bfloat16: train\.checkpoint_activations"):
        check_chain(parse_config(kept))
    check_chain(parse_config(kept | {"train": {}}))
    with pytest.raises(ValueError, match=r"^model\.decode_share = false: without model\.decode_window"):
        check_chain(parse_config({"model": {"path": "builtin-wan", "decode_share": False}}))
    with pytest.raises(ValueError, match=r"model\.decode_window = 0"):
        parse_config({"model": {"decode_window": 0}})


@pytest.mark.parametrize(("model", "chunks"), [({}, 3), ({"frames": 17}, 5), ({"path": "random-wan-1.3b"}, 21)])
def test_a_window_that_leaves_nothing_out_is_not_measured(model: dict[str, Any], chunks: int) -> None:
    for window, measured in ((chunks - 1, True), (chunks, False), (1000, False)):
        config = parse_config({"model": {"path": "builtin-wan", "decode_window": window} | model})
        check_chain(config)
        settings = decode_settings(config.model)
        assert (settings.window, settings.share) == (window, measured)


def test_a_window_is_part_of_a_run_and_its_default_is_not() -> None:
    plain, named, other = (
        parse_config({"model": model}).fingerprint for model in ({}, {"decode_window": None}, {"decode_window": 2})
    )
    assert plain == named != other
    assert parse_config({"model": {"decode_offload": True}}).fingerprint == plain


def test_settings_of_later_versions_change_no_run_at_their_defaults() -> None:
    plain, named = (
        parse_config({"model": model}) for model in ({}, {"decode_share": True, "decode_cache_precision": "float32"})
    )
    assert plain.fingerprint == named.fingerprint
    assert not {"decode_share", "decode_cache_precision"} & plain.model_dump()["model"].keys()
    other = parse_config({"model": {"decode_share": False, "decode_cache_precision": "bfloat16"}})
    assert parse_config(other.model_dump(mode="json")) == other
    assert other.fingerprint != plain.fingerprint
    assert parse_config({"model": {"decode_share": False}}).fingerprint == plain.fingerprint  # it changes no bit

"""The streamed decoder against diffusers' own: pixels, gradient, windows of gradient, and saved memory."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import WanUpsample
from torch import Tensor, nn

from rlvid.models.causal_decode import CausalDecoder, DecodeSettings, latent_statistics
from rlvid.models.chunk_plan import ChunkPlan
from rlvid.toy.tiny_wan import tiny_wan_vae

KINDS = ("2.1", "2.2")
LATENTS = 5  # chunks
EVERY = torch.arange(4 * LATENTS - 3)
ROWS = torch.tensor([[0, 3, 4], [16, 9, 0], [7, 7, 12]])  # last chunks 1, 4, 3; unordered, and one frame twice
TO_THE_END = torch.tensor([[0, 3, 14], [16, 9, 0], [7, 7, 13]])


def latents_of(vae: AutoencoderKLWan, batch: int = 3, frames: int = LATENTS) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, vae.config.z_dim, frames, 4, 4, generator=generator).to(vae.dtype)


def of_diffusers(vae: AutoencoderKLWan, latents: Tensor) -> Tensor:
    """All frames (B, F, C, H, W) by ``vae.decode``, in [0, 1]."""
    mean, std = latent_statistics(vae, latents.device)
    return vae.decode(latents * std + mean).sample.transpose(1, 2) / 2 + 0.5


def whole(vae: AutoencoderKLWan, latents: Tensor) -> Tensor:
    """The same without the clamp: the decoder on all chunks with its own cache, in one graph."""
    mean, std = latent_statistics(vae, latents.device)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "clamp", lambda x, **_: x)
        return vae.decode(latents * std + mean).sample.transpose(1, 2) / 2 + 0.5


def chosen(frames_BFCHW: Tensor, frames_BS: Tensor) -> Tensor:
    return frames_BFCHW[torch.arange(len(frames_BS))[:, None], frames_BS]


def gradient(frames_BSCHW: Tensor, latents: Tensor) -> Tensor:
    """Of a reward that is not linear in the pixels, and not the same in each frame."""
    weights = torch.linspace(1, 2, frames_BSCHW[0].numel(), dtype=latents.dtype).view(frames_BSCHW.shape[1:])
    return torch.autograd.grad((weights * frames_BSCHW.square()).sum(), latents)[0]


def difference(got: Tensor, expected: Tensor) -> float:
    assert expected.norm() > 0
    return float((got - expected).norm() / expected.norm())


@pytest.fixture
def _float64(monkeypatch: pytest.MonkeyPatch) -> None:
    """diffusers rounds to float32 before an upsampling."""
    monkeypatch.setattr(WanUpsample, "forward", nn.Upsample.forward)


# ------------------------------------------------------------------------------------------------------------ pixels


@pytest.mark.parametrize("kind", KINDS)
def test_the_pixels_are_those_of_diffusers(kind: str) -> None:
    vae = tiny_wan_vae(kind)
    latents = latents_of(vae)
    expected = of_diffusers(vae, latents)
    decoder = CausalDecoder(vae)
    every = decoder.decode(latents, EVERY.expand(3, -1), recompute=False)
    assert every.shape == expected.shape
    assert float(((every < 0) | (every > 1)).float().mean()) > 0.01, "nothing to clamp"
    assert float(((expected > 0) & (expected < 1)).float().mean()) > 0.05
    assert torch.equal(every.clamp(0, 1), expected)
    for recompute in (False, True):
        some = decoder.decode(latents.requires_grad_(), TO_THE_END, recompute=recompute)
        assert torch.equal(some.clamp(0, 1), chosen(expected, TO_THE_END))
    # torch's convolutions round by the number of videos, which is smaller in the later chunks here.
    some = decoder.decode(latents, ROWS, recompute=False)
    torch.testing.assert_close(some.clamp(0, 1), chosen(expected, ROWS), rtol=0, atol=2e-6)


def test_no_chunk_after_the_last_scored_one_is_decoded_in_any_row() -> None:
    decoder = CausalDecoder(tiny_wan_vae())
    rows: list[int] = []
    hook = decoder.vae.decoder.register_forward_hook(lambda _, inputs, __: rows.append(len(inputs[0])))
    decoder.decode(latents_of(decoder.vae), ROWS, recompute=False)
    hook.remove()
    assert rows == [3, 3, 2, 2, 1]


@pytest.mark.usefixtures("_float64")
@pytest.mark.parametrize("recompute", [False, True])
def test_a_video_does_not_depend_on_the_rest_of_its_batch(recompute: bool) -> None:
    decoder = CausalDecoder(tiny_wan_vae().double())
    latents = latents_of(decoder.vae).requires_grad_()
    frames = decoder.decode(latents, ROWS, recompute=recompute)
    expected = gradient(frames, latents)
    for row in range(3):
        alone = latents.detach()[row, None].requires_grad_()
        got = decoder.decode(alone, ROWS[row, None], recompute=recompute)
        torch.testing.assert_close(got[0], frames[row], rtol=0, atol=1e-13)
        assert difference(gradient(got, alone)[0], expected[row]) < 1e-12


def test_a_chunk_changes_nothing_that_it_is_given() -> None:
    decoder = CausalDecoder(tiny_wan_vae())
    features = decoder.features(latents_of(decoder.vae))
    cache = None
    for c in range(3):
        before = cache and list(cache)
        values = [each.clone() if isinstance(each, Tensor) else each for each in cache or ()]
        again = [decoder.chunk(features[:, :, c : c + 1], cache) for _ in range(2)]
        assert torch.equal(again[0][0], again[1][0])
        for each, kept, value in zip(cache or (), before or (), values, strict=True):
            assert each is kept
            assert torch.equal(each, value) if isinstance(each, Tensor) else each == value
        cache = again[0][1]


# ---------------------------------------------------------------------------------------------------------- gradient


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("blocks", [False, True])
def test_the_gradient_is_that_of_the_whole_graph(kind: str, blocks: bool) -> None:
    vae = tiny_wan_vae(kind)
    latents = latents_of(vae).requires_grad_()
    for frames_BS in (EVERY.expand(3, -1), ROWS, torch.zeros(3, 1, dtype=torch.int64)):
        expected = gradient(chosen(whole(vae, latents), frames_BS), latents)
        for recompute in (False, True):
            decoder = CausalDecoder(vae, DecodeSettings(recompute_blocks=blocks))
            got = gradient(decoder.decode(latents, frames_BS, recompute=recompute), latents)
            assert difference(got, expected) < 1e-6


@pytest.mark.usefixtures("_float64")
@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_is_exact_in_float64(kind: str) -> None:
    vae = tiny_wan_vae(kind).double()
    decoder = CausalDecoder(vae)
    latents = latents_of(vae).requires_grad_()
    expected = gradient(chosen(whole(vae, latents), ROWS), latents)
    assert difference(gradient(decoder.decode(latents, ROWS, recompute=True), latents), expected) < 1e-13

    def reward(latents: Tensor) -> Tensor:
        return decoder.decode(latents, ROWS, recompute=True).square().sum()

    (got,) = torch.autograd.grad(reward(latents), latents)
    direction = torch.randn_like(latents)
    step = 1e-6
    with torch.no_grad():
        slope = (reward(latents + step * direction) - reward(latents - step * direction)) / (2 * step)
    assert float((got * direction).sum()) == pytest.approx(float(slope), rel=1e-7)


def test_a_reward_of_the_whole_video_is_scored_on_detached_frames_first() -> None:
    decoder = CausalDecoder(tiny_wan_vae())
    latents = latents_of(decoder.vae).requires_grad_()
    frames = decoder.decode(latents, EVERY.expand(3, -1), recompute=True)
    held = frames.detach().requires_grad_()
    of_frames = gradient(held.diff(dim=1), held)
    (got,) = torch.autograd.grad(frames, latents, of_frames)
    plain = decoder.decode(latents, EVERY.expand(3, -1), recompute=False)
    assert difference(got, gradient(plain.diff(dim=1), latents)) < 1e-6


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_caches_may_be_kept_elsewhere_and_in_half_precision(dtype: torch.dtype | None) -> None:
    vae = tiny_wan_vae()
    latents = latents_of(vae).requires_grad_()
    exact, kept = (CausalDecoder(vae, s) for s in (DecodeSettings(), DecodeSettings(cache_dtype=dtype, offload=True)))
    frames, others = (each.decode(latents, ROWS, recompute=True) for each in (exact, kept))
    assert torch.equal(frames, others)
    error = difference(gradient(others, latents), gradient(frames, latents))
    assert error == 0 if dtype is None else 0 < error < 0.03


def test_no_gradient_is_computed_twice_or_kept_where_none_is_asked() -> None:
    decoder = CausalDecoder(tiny_wan_vae())
    latents = latents_of(decoder.vae).requires_grad_()
    with torch.no_grad():
        assert not decoder.decode(latents, ROWS, recompute=True).requires_grad
    assert not decoder.decode(latents.detach(), ROWS, recompute=True).requires_grad
    frames = decoder.decode(latents, ROWS, recompute=True)
    first, second = (torch.autograd.grad(frames.sum(), latents, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)
    assert not first[0, :, 2:].any(), "the first video ends with chunk 1"
    assert first[0, :, :2].any()


# ----------------------------------------------------------------------------------------------------------- windows


def with_constant_caches(decoder: CausalDecoder, latents: Tensor, frame: int, window: int) -> Tensor:
    """One frame of all videos, in a graph in which the cache is detached before the last ``window`` chunks."""
    features, last = decoder.features(latents), -(-frame // 4)
    cache = None
    for c in range(last + 1):
        if cache and c == last + 1 - window:
            cache = [each.detach() if isinstance(each, Tensor) else each for each in cache]
        pixels, cache = decoder.chunk(features[:, :, c : c + 1], cache)
    return pixels[:, None, :, (frame - 1) % 4] / 2 + 0.5


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("window", [1, 2, 3, LATENTS])
def test_a_window_is_a_graph_with_constant_caches(kind: str, window: int) -> None:
    vae = tiny_wan_vae(kind)
    decoder = CausalDecoder(vae, DecodeSettings(window=window))
    latents = latents_of(vae).requires_grad_()
    frames_BS = torch.full((3, 1), 15)
    expected = gradient(with_constant_caches(decoder, latents, 15, window), latents)
    for recompute in (False, True):
        got = gradient(decoder.decode(latents, frames_BS, recompute=recompute), latents)
        assert difference(got, expected) < 1e-6
    assert got.flatten(3).any(-1).any(1)[0].tolist() == [c >= LATENTS - window for c in range(LATENTS)]


def test_a_window_of_one_adds_up_over_frames_and_a_wide_one_is_exact() -> None:
    vae = tiny_wan_vae()
    latents = latents_of(vae).requires_grad_()

    def of(window: int | None, frames_BS: Tensor) -> Tensor:
        frames = CausalDecoder(vae, DecodeSettings(window=window)).decode(latents, frames_BS, recompute=True)
        return torch.autograd.grad(frames.square().sum(), latents)[0]

    apart = sum(of(1, ROWS[:, place, None]) for place in range(3))
    assert difference(of(1, ROWS), torch.as_tensor(apart)) < 1e-5
    assert torch.equal(of(LATENTS, ROWS), of(None, ROWS))
    assert difference(of(2, ROWS), of(None, ROWS)) > 1e-2


def test_the_share_of_the_gradient_is_measured() -> None:
    decoder = CausalDecoder(tiny_wan_vae())
    latents = latents_of(decoder.vae).requires_grad_()
    frames = decoder.decode(latents, ROWS, recompute=True)
    held = frames.detach().requires_grad_()
    of_frames = gradient(held, held)
    (exact,) = torch.autograd.grad(frames, latents, of_frames)
    shares = []
    for window in (1, 2, LATENTS):
        cosine_B, norm_B = decoder.gradient_share(latents, ROWS, of_frames, window)
        cut = gradient(
            CausalDecoder(decoder.vae, DecodeSettings(window=window)).decode(latents, ROWS, recompute=True), latents
        )
        torch.testing.assert_close(cosine_B, torch.cosine_similarity(cut.flatten(1), exact.flatten(1)))
        torch.testing.assert_close(norm_B, cut.flatten(1).norm(dim=1) / exact.flatten(1).norm(dim=1))
        shares.append(cosine_B)
    assert torch.equal(shares[-1].round(decimals=5), torch.ones(3))
    assert bool((shares[0] < shares[-1] - 1e-3).all())


def test_a_window_of_no_chunk_is_refused() -> None:
    with pytest.raises(ValueError, match=r"window = 0.*1 or more"):
        DecodeSettings(window=0)


def test_the_plan_of_frames() -> None:
    plan = ChunkPlan.of(torch.tensor([[0, 1, 4], [5, 8, 9]]), 4)
    assert plan.chunk_BS.tolist() == [[0, 1, 1], [2, 2, 3]]
    assert plan.place_BS.tolist() == [[0, 0, 3], [0, 3, 0]]
    assert plan.count == 4
    assert [plan.rows(c).tolist() for c in range(5)] == [[0, 1], [0, 1], [1], [1], []]
    assert [plan.recomputed(c, 1).tolist() for c in range(4)] == [[0], [0], [1], [1]]
    assert [plan.carried(c, 1).tolist() for c in range(4)] == [[], [], [], []]
    assert [plan.carried(c, 2).tolist() for c in range(4)] == [[], [0], [1], [1]]
    assert ChunkPlan.of(torch.tensor([[0, 1, 2, 3]]), 2).chunk_BS.tolist() == [[0, 1, 1, 2]]


# ------------------------------------------------------------------------------------------------------------ memory


class Meter:
    """Counts the bytes of activations that autograd holds; weights do not count."""

    def __init__(self, weights: Iterator[Tensor]) -> None:
        self.live = self.peak = 0
        self._weights = {each.data_ptr() for each in weights}

    @contextmanager
    def on(self) -> Iterator[None]:
        meter = self

        class Held:
            def __init__(self, tensor: Tensor) -> None:
                self.tensor = tensor.detach()  # an output that is saved would hold its own graph
                self.size = 0 if tensor.data_ptr() in meter._weights else tensor.nbytes
                meter.live += self.size
                meter.peak = max(meter.peak, meter.live)

            def __del__(self) -> None:
                meter.live -= self.size

        unpack: Callable[[Any], Tensor] = lambda held: held.tensor  # noqa: E731
        with torch.autograd.graph.saved_tensors_hooks(Held, unpack):
            yield


@pytest.mark.parametrize("kind", KINDS)
def test_saved_activations_do_not_grow_with_the_number_of_chunks(kind: str) -> None:
    vae = tiny_wan_vae(kind)

    def saved(chunks: int, recompute: bool, blocks: bool = False) -> int:
        decoder = CausalDecoder(vae, DecodeSettings(recompute_blocks=blocks))
        latents = latents_of(vae, 1, chunks).requires_grad_()
        meter = Meter(vae.parameters())
        with meter.on():
            frames = decoder.decode(latents, torch.tensor([[1, 4 * chunks - 4]]), recompute=recompute)
            frames.sum().backward()
        del frames
        return meter.peak - latents.nbytes

    four, eight = saved(4, True), saved(8, True)
    assert eight == pytest.approx(four, rel=0.02)
    assert saved(8, False) > 1.8 * saved(4, False) > 3 * four
    assert saved(8, True, blocks=True) < 0.7 * eight

"""The benchmark of published training steps: both sides come to one gradient; what each costs is counted and shown."""

import argparse
import json
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from jobs.benchmark import peers
from jobs.benchmark.live import LiveBytes
from jobs.benchmark.matchups import PEERS, RELEASED, RLVID, Matchup, Networks, matchup, of_bench, wan_networks
from jobs.benchmark.parts import prepare
from jobs.benchmark.step import distance, gradient
from rlvid.models.wan import WanModel

SMALL = ["--preset", "tiny", "--device", "cpu", "--steps", "1", "--sampling-steps", "3", "--rollouts", "2"]


def options(*arguments: str) -> argparse.Namespace:
    return peers.parse([*SMALL, *arguments])


@pytest.fixture(scope="module")
def networks() -> dict[bool, Networks]:
    """Miniatures in float64, by whether they are of Wan's classes."""
    made = {False: of_bench(prepare(options())), True: wan_networks(options())}
    for each in made.values():
        if isinstance(each.model, WanModel):
            each.model._dtype = torch.float64
        for part in (each.model.denoiser, each.model.vae, each.reward):
            nn.Module.to(part, torch.float64)
    return made


def gradients_of(steps: Matchup) -> dict[str, torch.Tensor]:
    found = {}
    for side in steps.ways:
        steps.step(side, 0, update=False)
        found[side] = gradient(steps)
    return found


@pytest.mark.parametrize("name", [name for name, peer in PEERS.items() if peer.model is not None])
def test_a_published_way_comes_to_the_gradient_of_rlvid(name: str, networks: dict[bool, Networks]) -> None:
    steps = matchup(PEERS[name], options("--batch", "2"), networks[PEERS[name].wan])
    found = gradients_of(steps)
    # Log-probabilities are float32; everything else is float64, and the gradient is compared in float32.
    bound = 1e-5 if name == "ddpo-pytorch" else 1e-6
    theirs = found.pop(RELEASED)
    assert theirs.norm() > 0
    for side, ours in found.items():
        assert distance(theirs, ours) < bound, side


@pytest.mark.slow
@pytest.mark.parametrize("name", ["UniRL", "ddpo-pytorch"])
def test_a_side_that_decodes_all_frames_counts_more_operations(name: str, networks: dict[bool, Networks]) -> None:
    steps = matchup(PEERS[name], options(), networks[False])
    decode, total = {}, {}
    for side in (RLVID, RELEASED):
        steps.meter.flops = {}
        with steps.meter.counting():
            steps.step(side, 0, update=False)
        decode[side], total[side] = steps.meter.flops["decode"], sum(steps.meter.flops.values())
        assert steps.meter.live > 0
        gradient(steps)
    assert decode[RELEASED] == 4 * decode[RLVID] > 0  # the reward looks at one frame of four
    assert total[RELEASED] > total[RLVID]


def test_published_code_keeps_the_decoders_activations_of_all_chunks(networks: dict[bool, Networks]) -> None:
    steps = matchup(PEERS["UniRL-Wan"], options(), networks[True])
    live = {}
    for side in (RLVID, RELEASED):
        with steps.meter.counting():
            steps.step(side, 0, update=False)
        live[side] = steps.meter.live
        gradient(steps)
    assert live[RELEASED] > live[RLVID]


@pytest.mark.parametrize("recompute", [False, True])
def test_live_bytes_are_those_of_all_tensors_that_are_held_at_once(recompute: bool) -> None:
    weight = torch.randn(16, 16, requires_grad=True)

    def layers(x: torch.Tensor) -> torch.Tensor:
        for _ in range(5):
            x = (x @ weight).tanh()
        return x

    inputs = torch.randn(16, 16)
    with LiveBytes() as live:
        outputs = checkpoint(layers, inputs, use_reentrant=False) if recompute else layers(inputs)
        forward = live.now
        outputs.sum().backward()
        del outputs
    size = 16 * 16 * 4
    assert forward == (1 if recompute else 5) * size  # tanh keeps its result; the products are gone
    assert 5 * size < live.peak < 10 * size
    assert live.now == size  # the weight's gradient
    weight.grad = None
    assert live.now == 0


@pytest.mark.slow
def test_the_command_prints_a_table_and_keeps_the_numbers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "peers.json"
    torch.set_num_threads(2)
    assert peers.main([*SMALL, "--peers", "VADER,VideoX-Fun", "--out", str(out)]) == 0
    found = json.loads(out.read_text())
    assert found["settings"]["threads"] == torch.get_num_threads() == 1
    assert found["settings"]["rollouts"] == 2
    assert found["peers"].keys() == {"VADER", "VideoX-Fun"}
    for peer in found["peers"].values():
        ratios = peer["ratios"][RLVID]
        assert ratios["of the ideal"] == pytest.approx(ratios["seconds"] / ratios["operations"])
        assert ratios["gradients"] <= peers.ALLOWED["float32"]
        assert peer["sides"][RELEASED]["flops"]["encode"] > 0
        assert "encode" not in peer["sides"][RLVID]["flops"]
    printed = capsys.readouterr().out
    for words in ("VADER", "VideoX-Fun", "x operations", "x seconds", "x tensors", "frames of 16 x 16"):
        assert words in printed, words


def test_gradients_that_differ_fail_the_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(peers.ALLOWED, "float32", -1.0)
    assert peers.main([*SMALL, "--peers", "UniRL-Wan"]) == 1
    assert "DIFFERENT: UniRL-Wan" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--peers", "VADER,other"], "--peers 'other'"),
        (["--rollouts", "1"], "--rollouts 1"),
        (["--steps", "0"], "--steps 0"),
        (["--sampling-steps", "1"], "--sampling-steps 1"),
        (["--out", "."], "--out ."),
        *([[f"--{name}", "0"], f"--{name} 0: must be at least 1"] for name in ("frames", "size", "segments")),
        (["--sampling-steps", "0"], "--sampling-steps 0: must be at least 1"),
    ],
)
def test_options_that_cannot_be_are_refused(arguments: list[str], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        peers.main([*SMALL, *arguments])

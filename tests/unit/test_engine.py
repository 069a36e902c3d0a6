"""The plain engine, and randomness that belongs to the sample."""

import math
import os
import pickle
from enum import Enum
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rlvid import randomness
from rlvid.config.train import OptimizerConfig, TrainConfig
from rlvid.train.engine import DeepSpeedEngine, StepOutcome, TorchEngine, load_plain
from rlvid.train.worker import used_up

# ----------------------------------------------------------------------------------------------------------- engine


def layer() -> nn.Linear:
    torch.manual_seed(3)
    module = nn.Linear(4, 3)
    module.bias.requires_grad_(False)
    return module


def loss_of(module: nn.Module, index: int) -> Tensor:
    x = torch.randn(5, 4, generator=torch.Generator().manual_seed(index))
    return module(x).square().sum()


@pytest.mark.parametrize("clip_norm", [0.0, 0.5])
def test_the_engine_is_adamw_with_warm_up_and_clipping(clip_norm: float) -> None:
    module, reference = layer(), layer()
    engine = TorchEngine(
        module, OptimizerConfig(lr=0.1, betas=(0.8, 0.9), weight_decay=0.3, warmup=4, clip_norm=clip_norm)
    )
    norms = []  # of what reaches AdamW, whose steps do not show a constant factor
    engine.optimizer.register_step_pre_hook(lambda *_: norms.append(float(module.weight.grad.norm())))
    optimizer = torch.optim.AdamW([reference.weight], betas=(0.8, 0.9), weight_decay=0.3)
    for index in range(6):
        engine.backward(loss_of(module, index), last=False)
        engine.backward(loss_of(module, index + 10), last=True)
        outcome = engine.step(index)
        (loss_of(reference, index) + loss_of(reference, index + 10)).backward()
        assert reference.weight.grad is not None
        norm = float(reference.weight.grad.norm())
        if clip_norm:
            reference.weight.grad *= clip_norm / norm
        optimizer.param_groups[0]["lr"] = 0.1 * [0.25, 0.5, 0.75, 1, 1, 1][index]
        optimizer.step()
        optimizer.zero_grad()
        assert outcome.gradient_norm == pytest.approx(norm, rel=1e-4)
        assert norms[index] == pytest.approx(min(norm, clip_norm or math.inf), rel=1e-4)
        assert outcome.lr == pytest.approx(optimizer.param_groups[0]["lr"])
        assert not outcome.skipped
        torch.testing.assert_close(module.weight, reference.weight, atol=1e-5, rtol=0)
    assert torch.equal(module.bias, reference.bias)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_skips_the_step(bad: float) -> None:
    module, reference = layer(), layer()
    engines = [TorchEngine(each, OptimizerConfig(lr=0.1, warmup=0)) for each in (module, reference)]
    for each, engine in zip((module, reference), engines, strict=True):
        engine.backward(loss_of(each, 0), last=True)
        engine.step(0)
    before = module.weight.detach().clone()
    engines[0].backward(loss_of(module, 1) * bad, last=True)
    outcome = engines[0].step(1)
    assert outcome.skipped
    assert not math.isfinite(outcome.gradient_norm)
    assert torch.equal(module.weight, before)
    for each, engine in zip((module, reference), engines, strict=True):
        engine.backward(loss_of(each, 2), last=True)
        assert not engine.step(2).skipped
    assert torch.equal(module.weight, reference.weight), "the skipped step left something behind"


def test_gradients_that_float16_would_lose_arrive() -> None:
    class Frozen16(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.adapter = nn.Linear(4, 4)
            self.frozen = nn.Linear(4, 1).half().requires_grad_(False)

        def forward(self, x: Tensor) -> Tensor:
            return self.frozen(self.adapter(x).half()).float().sum() * 1e-8

    x, config = torch.randn(3, 4, generator=torch.Generator().manual_seed(1)), OptimizerConfig(lr=0.1, clip_norm=0)
    exact = Frozen16()
    want = torch.autograd.grad((exact.adapter(x) @ exact.frozen.weight.float().T).sum() * 1e-8, exact.adapter.weight)[0]
    seen = {}
    for precision in ("float32", "float16"):
        module = Frozen16()
        engine = TorchEngine(module, config, precision)
        engine.backward(module(x), last=True)
        seen[precision] = module.adapter.weight.grad.clone()
    assert not seen["float32"].any(), "the case is too easy: nothing is lost without the scale"
    torch.testing.assert_close(seen["float16"], want, rtol=0.01, atol=0)


def test_an_interrupted_engine_ends_where_an_uninterrupted_one_does(tmp_path: Path) -> None:
    config = OptimizerConfig(lr=0.1, warmup=3, weight_decay=0.1)

    def run(module: nn.Module, engine: TorchEngine, steps: range) -> None:
        for index in steps:
            engine.backward(loss_of(module, index), last=True)
            engine.step(index)

    straight, first, second = layer(), layer(), layer()
    run(straight, TorchEngine(straight, config), range(6))
    engine = TorchEngine(first, config)
    run(first, engine, range(3))
    engine.save(tmp_path)
    second.weight.data.zero_()
    engine = TorchEngine(second, config)
    engine.load(tmp_path)
    assert torch.equal(second.weight, first.weight)
    run(second, engine, range(3, 6))
    assert torch.equal(second.weight, straight.weight)


# ------------------------------------------------------------------------------------------------------- randomness


@pytest.mark.parametrize("draw", [randomness.normal, randomness.uniform])
def test_a_row_depends_on_its_position_alone(draw: Any) -> None:
    positions = [(3, 0), (7, 1), (11, 0)]
    rows = draw((2, 5), 1, "noise", positions)
    torch.rand(10)
    assert rows.shape == (3, 2, 5)
    assert torch.equal(draw((2, 5), 1, "noise", positions[::-1]), rows.flip(0))
    assert torch.equal(draw((2, 5), 1, "noise", positions[1:2]), rows[1:2])
    others = [
        (1, "noise", (3, 1)),
        (1, "noise", (30,)),
        (1, "offset", (3, 0)),
        (2, "noise", (3, 0)),
        (13, "noise", (0,)),
    ]
    for seed, purpose, position in others:
        assert not torch.equal(draw((2, 5), seed, purpose, [position])[0], rows[0])


def test_draws_have_their_distribution() -> None:
    positions = [(i,) for i in range(2000)]
    normal, uniform = (draw((4,), 0, "x", positions) for draw in (randomness.normal, randomness.uniform))
    assert float(normal.mean()) == pytest.approx(0, abs=0.04)
    assert float(normal.std()) == pytest.approx(1, abs=0.04)
    assert 0 <= uniform.min() < 0.01 < 0.99 < uniform.max() < 1
    assert float(uniform.mean()) == pytest.approx(0.5, abs=0.02)
    assert torch.corrcoef(torch.stack([normal[:-1, 0], normal[1:, 0]]))[0, 1].abs() < 0.1


def test_a_permutation_is_one() -> None:
    order = randomness.permutation(100, 0, "order", 1)
    assert sorted(order.tolist()) == list(range(100))
    assert torch.equal(order, randomness.permutation(100, 0, "order", 1))
    assert not torch.equal(order, randomness.permutation(100, 0, "order", 2))
    assert not torch.equal(order, torch.arange(100))


@pytest.mark.parametrize(
    ("seconds", "steps", "ends"),
    [(0.0, 0, False), (94.0, 10, False), (96.0, 10, True), (95.3, 1, True), (66.0, 1, False), (67.0, 1, True)],
)
def test_a_budget_of_seconds_ends_at_the_nearest_step(seconds: float, steps: int, ends: bool) -> None:
    """By hand: of steps of 9.4 s the 11th ends at 103.4, nearer to 100 than 94; of 9.6 s at 105.6, further than 96."""
    assert used_up(seconds, steps, 100.0) is ends


# --------------------------------------------------------------------------------------------------- DeepSpeed's files


class Code:
    """A pickle that would run code."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch should-not-be-here",)


def zero(stage: int) -> DeepSpeedEngine:
    return DeepSpeedEngine(layer(), OptimizerConfig(lr=0.1, warmup=0), TrainConfig(zero_stage=stage, workers=1), 1)


def two_steps(engine: DeepSpeedEngine, first: int) -> Tensor:
    for index in (first, first + 1):
        engine.backward(loss_of(engine.module, index), last=True)
        engine.step(index)
    with engine.gathered():
        return engine.module.module.weight.detach().clone()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_resumed_engine_ends_with_the_same_bits_and_no_file_of_it_runs_code(
    stage: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    engine = zero(stage)
    start = two_steps(engine, 0)
    engine.save(tmp_path / "saved")
    expected = two_steps(engine, 2)
    resumed = zero(stage)
    resumed.load(tmp_path / "saved")
    assert torch.equal(two_steps(resumed, 2), expected)
    assert not torch.equal(start, expected)
    for file in sorted((tmp_path / "saved").rglob("*.pt")):
        whole = file.read_bytes()
        torch.save(Code(), file)
        with pytest.raises(ValueError, match=rf"{file.name} .*could run code") as error:
            zero(stage).load(tmp_path / "saved")
        assert "\n" not in str(error.value)
        file.write_bytes(whole)
    assert not Path("should-not-be-here").exists()


@pytest.mark.parametrize("legacy", [False, True])
def test_the_state_of_a_method_is_read_as_plain_values(
    legacy: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    state = {"mean": {"a dog": [0.5, 3]}, "weights": torch.ones(2)}
    torch.save(state, "algorithm.pt", _use_new_zipfile_serialization=not legacy)
    assert load_plain("algorithm.pt")["mean"] == state["mean"]
    whole = Path("algorithm.pt").read_bytes()
    torch.save(state | {"code": Code()}, "algorithm.pt", _use_new_zipfile_serialization=not legacy)
    poisoned = Path("algorithm.pt").read_bytes()
    for content in (poisoned, pickle.dumps(Code()), *(whole[:end] for end in range(0, len(whole), 5))):
        Path("algorithm.pt").write_bytes(content)
        with pytest.raises(ValueError, match=r"algorithm\.pt is damaged, or holds more than"):
            load_plain("algorithm.pt")
    assert not Path("should-not-be-here").exists()


class Colour(Enum):
    RED = 1


class Written:
    """Is pickled as ``getattr(of, name)``, as Python before 3.11.4 does with members of enumerations."""

    def __init__(self, of: type, name: str) -> None:
        self.of, self.name = of, name

    def __reduce__(self) -> Any:
        return getattr, (self.of, self.name)


def test_members_of_allowed_enumerations_are_read_however_python_wrote_them(tmp_path: Path) -> None:
    file = tmp_path / "state.pt"
    torch.save({"colour": Written(Colour, "RED")}, file)
    assert load_plain(file, (Colour, StepOutcome)) == {"colour": Colour.RED}
    for other in (Written(StepOutcome, "__init__"), Written(Colour, "mro")):
        torch.save(other, file)
        with pytest.raises(ValueError, match="could run code"):
            load_plain(file, (Colour, StepOutcome))
    torch.save(Written(Colour, "RED"), file)
    with pytest.raises(ValueError, match=r"could run code \(.*getattr"):
        load_plain(file)

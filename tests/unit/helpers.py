"""The tiny model, reward and batch that the tests of the methods share."""

import atexit
import json
import shutil
import struct
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from diffusers import DDIMScheduler
from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import masked_crc32c
from torch import Tensor, nn

from rlvid import randomness
from rlvid.algorithms.base import Algorithm, Batch, Context, Observer, Stopwatch, Update
from rlvid.algorithms.catalogue import ALGORITHMS
from rlvid.config import RunConfig, parse_config
from rlvid.files import sha256
from rlvid.models.lora import inject_lora, lora_parameters
from rlvid.models.noise_path import Prediction
from rlvid.models.trained import load_trainable
from rlvid.runs.checkpoints import checkpoint_name, state_digest
from rlvid.toy.tiny import save_tiny_model, tiny_model, tiny_reward
from rlvid.toy.tiny_wan import save_tiny_wan
from rlvid.train.checkpoint import save_checkpoint
from rlvid.train.engine import TorchEngine

PROMPTS = ["a red circle moving left", "a dog", "a blue star growing", "a red circle moving left"]
TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]


def scheduler(steps: int = 20, final: str = "paper") -> DDIMScheduler:
    """ModelScopeT2V's, of diffusers."""
    made = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=final == "exact",
        steps_offset=1,
    )
    made.set_timesteps(steps)
    return made


def make(
    method: dict[str, Any],
    *,
    random: bool = True,
    dtype: torch.dtype = torch.float32,
    held_out: bool = False,
    **sections: dict[str, Any],
) -> Any:
    """A method on the tiny model with an adapter, in chains of four steps, on batches of four videos.

    Activations are kept, which takes half the time; recomputed ones are tests of their own.
    """
    train = {"batch_size": 4, "checkpoint_activations": False} | (
        {"group_size": 2} if method.get("name") == "grpo" else {}
    )
    settings = {"sampling": {"steps": 4}, "train": train, "reward": {"segments": 2}}
    config = parse_config(
        {"method": method} | {k: settings.get(k, {}) | sections.get(k, {}) for k in settings.keys() | sections.keys()}
    )
    model = tiny_model()
    for part in (model.denoiser, model.vae, model.text_encoder):
        part.to(dtype)
    generator = torch.Generator().manual_seed(2)
    for parameter in inject_lora(model.denoiser, 2, TARGETS, seed=0):
        if random:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) / 4)
    other = tiny_reward(7) if held_out else None
    context = Context(config, model, tiny_reward(), other, Stopwatch(torch.device("cpu")))
    return ALGORITHMS[config.method.name](context)


def clips(method: Algorithm, serials: tuple[int, ...] = (8, 9, 10, 11)) -> Batch:
    """A clip and a prompt for each serial, whatever the others are."""
    model = method.context.model
    latents = randomness.normal(model.latent_shape, 0, "clip", [(s,) for s in serials])
    prompts = [PROMPTS[s % 4] for s in serials]
    return Batch(2, list(serials), prompts, model.encode_prompts(prompts), latents)


def parameters(method: Algorithm) -> list[nn.Parameter]:
    """The adapter's."""
    return lora_parameters(method.context.model.denoiser)


def flat_gradient(method: Algorithm, batch: Batch) -> tuple[Tensor, list[Update]]:
    """The accumulated gradient of all updates, without a step between them."""
    updates = []
    for update in method.updates(batch):
        update.loss.backward()
        updates.append(update)
    return torch.cat([p.grad.flatten() for p in parameters(method) if p.grad is not None]), updates


def one_gradient(method: Any, loss: Tensor) -> Tensor:
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters(method))])


def check_slopes(method: Any, batch: Batch) -> None:
    """Holds the gradient of a method's loss, in float64, to finite differences along three random directions."""
    loss = method.loss(batch).loss
    assert loss.dtype == torch.float64
    gradient = torch.autograd.grad(loss, parameters(method))
    start = [p.detach().clone() for p in parameters(method)]

    @torch.no_grad()
    def loss_at(direction: list[Tensor], distance: float) -> float:
        for p, origin, way in zip(parameters(method), start, direction, strict=True):
            p.copy_(origin + distance * way)
        return float(method.loss(batch).loss)

    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        way = [torch.randn(p.shape, generator=generator, dtype=torch.float64) for p in start]
        h = 1e-4
        slope = (8 * (loss_at(way, h) - loss_at(way, -h)) - (loss_at(way, 2 * h) - loss_at(way, -2 * h))) / (12 * h)
        found = float(sum((g * w).sum() for g, w in zip(gradient, way, strict=True)))
        assert slope == pytest.approx(found, rel=1e-6)


def close(got: Tensor, expected: Tensor, bound: float = 1e-4) -> None:
    assert expected.norm() > 0
    assert (got - expected).norm() < bound * expected.norm()


class Listener(Observer):
    """Keeps the lines that an observer receives."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def report(self, line: str) -> None:
        self.lines.append(line)


class TwoParameters:
    """A model whose clean latents and noise are two numbers everywhere."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner
        self.a, self.b = (torch.tensor(value, requires_grad=True) for value in (0.3, -0.2))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def predict(self, x: Tensor, t: Any, text: Tensor, guidance: float, **_: Any) -> Prediction:
        return Prediction(self.a.expand_as(x), self.b.expand_as(x))


SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {"frames": 4, "size": 16},
    "tiny-wan": {"frames": 9, "height": 16, "width": 32},
}
"""Folder of a tiny model, of a 3D U-Net and of Wan -> the shape of its videos."""


def save_run(home: Path, step: int = 3, *, base: str = "tiny", **model: Any) -> tuple[Path, RunConfig]:
    """A run's folder ``home/run`` with a checkpoint whose trained weights are random, and its settings."""
    made, config = _made_run(step, base, json.dumps(model)), _settings_of_run(home, base, model)
    if not (home / base).is_dir():
        shutil.copytree(made / base, home / base)
    shutil.copytree(made / "run", home / "run", dirs_exist_ok=True)
    settings, state = home / "run" / "config.yaml", home / "run" / checkpoint_name(step) / "state.json"
    settings.write_text(yaml.safe_dump(config.model_dump(mode="json")), encoding="utf-8")
    where = {str(made): str(home), _settings_of_run(made, base, model).fingerprint: config.fingerprint}
    text = state.read_text(encoding="utf-8")
    for before, after in where.items():
        assert before in text
        text = text.replace(before, after)
    state.write_text(text, encoding="utf-8")
    vouch(state.parent)
    return home / "run", config


def save_tiny(home: Path, base: str) -> Path:
    """Writes the tiny model of one of ``SHAPES`` into ``home``; returns its folder."""
    (save_tiny_wan if base == "tiny-wan" else save_tiny_model)(home / base)
    return home / base


def _settings_of_run(home: Path, base: str, model: dict[str, Any]) -> RunConfig:
    return parse_config(
        {
            "name": "run",
            "model": {"path": str(home / base), **SHAPES[base], "finetune": "lora"} | model,
            "sampling": {"steps": 4, "guidance": 2.0},
            "reward": {"segments": 2},
        }
    )


@cache
def _made_run(step: int, base: str, model: str) -> Path:
    """The folder that ``save_run`` copies; made once a process, as it takes most of a second."""
    home = Path(tempfile.mkdtemp(prefix="rlvid-run-"))
    atexit.register(shutil.rmtree, home, ignore_errors=True)
    save_tiny(home, base)
    config = _settings_of_run(home, base, json.loads(model))
    made = load_trainable(config.model, config.seed, config.model.path)
    generator = torch.Generator().manual_seed(step)
    for parameter in made.denoiser.parameters():
        if parameter.requires_grad:
            parameter.data += torch.randn(parameter.shape, generator=generator) / (
                8 if config.model.finetune == "lora" else 50
            )
    context = Context(config, made, tiny_reward(), None, Stopwatch(torch.device("cpu")))
    train_state = {"step": step, "workers": 2, "skipped": 1, "seconds": 75.5, "videos": 24}
    save_checkpoint(
        home / "run" / checkpoint_name(step), 0, train_state, config, TorchEngine(made.denoiser, config.optimizer),
        ALGORITHMS[config.method.name](context), made.denoiser,
    )  # fmt: skip
    return home


def vouch(checkpoint: Path) -> None:
    """Brings the checksums of a checkpoint up to what a test has made of its files."""
    state = json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))
    del state["sha256"]
    paths = {name: checkpoint / name for name in state["files"]}
    state["files"] = {name: (path.stat().st_size, sha256(path)) for name, path in paths.items()}
    (checkpoint / "state.json").write_text(json.dumps({"sha256": state_digest(state)} | state), encoding="utf-8")


def damaged_event(length: int = 4) -> bytes:
    """A record of TensorBoard's whose checksums are right, and whose four bytes are no event."""

    def sealed(data: bytes) -> bytes:
        return data + struct.pack("<I", masked_crc32c(data))

    return sealed(struct.pack("<Q", length)) + sealed(b"\x0a\xff\xff\xff")

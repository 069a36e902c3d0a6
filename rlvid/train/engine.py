"""The optimiser step: DeepSpeed ZeRO across workers, or plain torch in one process. No other file imports DeepSpeed."""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor, nn

from rlvid.collection import collection_paused
from rlvid.config.model import LOSS_SCALE
from rlvid.config.train import OptimizerConfig, TrainConfig
from rlvid.models.weights import DAMAGED

TAG = "engine"

BUCKET = 500_000_000
"""Largest number of gradients that ZeRO reduces at once."""


@dataclass(frozen=True)
class StepOutcome:
    """The outcome of an optimiser step: the gradient's norm before clipping, the rate, whether it was skipped."""

    gradient_norm: float
    lr: float
    skipped: bool


class Engine(ABC):
    """Back-propagates accumulated losses and steps AdamW over the trainable parameters of ``module``."""

    module: nn.Module
    config: OptimizerConfig
    loss_scale: float

    @abstractmethod
    def backward(self, loss: Tensor, last: bool) -> None:
        """Accumulates gradients; ``last`` marks the last part before ``step``."""

    @abstractmethod
    def step(self, index: int) -> StepOutcome:
        """Clips, steps at the rate of step ``index``, clears the gradients; all workers skip on a non-finite norm."""

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Writes the engine's state; every worker must call it."""

    @abstractmethod
    def load(self, folder: Path) -> None:
        """Restores what ``save`` wrote, with the same number of workers."""

    def gathered(self) -> AbstractContextManager[Any]:
        """Gathers the trainable parameters on every worker while the block runs (ZeRO-3 keeps slices)."""
        return nullcontext()

    def rate(self, index: int) -> float:
        """Learning rate of step ``index`` (from 0) under linear warm-up."""
        return self.config.lr * min(1.0, (index + 1) / max(1, self.config.warmup))


def _adamw(parameters: list[nn.Parameter], config: OptimizerConfig) -> torch.optim.AdamW:
    return torch.optim.AdamW(parameters, lr=config.lr, betas=config.betas, weight_decay=config.weight_decay)


def _unscale(parameters: list[nn.Parameter], loss_scale: float) -> None:
    if loss_scale != 1:
        for parameter in parameters:
            parameter.register_hook(lambda gradient: gradient / loss_scale)


def load_plain(path: str | Path, classes: Sequence[type] = (), map_location: Any = None) -> Any:
    """Loads what ``torch.save`` wrote of tensors, plain values and ``classes``; nothing that is read runs as code.

    Raises:
        ValueError: the file is damaged, or holds anything else.
    """
    enumerations = [each for each in classes if issubclass(each, Enum)]

    def member(of: type[Enum], name: str) -> Enum:
        """Stands in for ``getattr``, with which Python before 3.11.4 writes members of enumerations."""
        if of not in enumerations:
            raise UnpicklingError(f"GLOBAL getattr of {of}")
        return of[name]

    try:
        allowed: list[Any] = [*classes, *([(member, "builtins.getattr")] if enumerations else [])]
        with torch.serialization.safe_globals(allowed):
            return torch.load(path, map_location=map_location, weights_only=True)
    except (UnpicklingError, OSError, ValueError, *DAMAGED) as error:
        why = next((line.strip() for line in str(error).splitlines() if "GLOBAL" in line), type(error).__name__)
        raise ValueError(
            f"{path} is damaged, or holds more than tensors and plain values and could run code ({why[:200]}); it was "
            "not loaded. Put its checkpoint's folder aside, and the same command resumes from the one before"
        ) from error


class TorchEngine(Engine):
    """An engine in one process without DeepSpeed: the reference for the distributed engine."""

    def __init__(self, module: nn.Module, config: OptimizerConfig, precision: str = "float32") -> None:
        self.module, self.config, self.loss_scale = module, config, LOSS_SCALE[precision]
        self.parameters = [p for p in module.parameters() if p.requires_grad]
        _unscale(self.parameters, self.loss_scale)
        self.optimizer = _adamw(self.parameters, config)

    def backward(self, loss: Tensor, last: bool) -> None:
        """See ``Engine.backward``."""
        (loss * self.loss_scale).backward()

    def step(self, index: int) -> StepOutcome:
        """See ``Engine.step``."""
        limit = self.config.clip_norm or math.inf
        norm = float(nn.utils.clip_grad_norm_(self.parameters, limit))
        lr = self.optimizer.param_groups[0]["lr"] = self.rate(index)
        skipped = not math.isfinite(norm)
        if not skipped:
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return StepOutcome(norm, lr, skipped)

    def save(self, folder: Path) -> None:
        """See ``Engine.save``."""
        weights = {n: p for n, p in self.module.named_parameters() if p.requires_grad}
        torch.save({"optimizer": self.optimizer.state_dict(), "weights": weights}, folder / f"{TAG}.pt")

    def load(self, folder: Path) -> None:
        """See ``Engine.load``."""
        state = load_plain(folder / f"{TAG}.pt")
        self.module.load_state_dict(state["weights"], strict=False)
        self.optimizer.load_state_dict(state["optimizer"])


class DeepSpeedEngine(Engine):
    """ZeRO stage 0 to 3 over the process group that Ray Train has set up.

    Parameters keep the precision they come in (frozen ones may be of half precision, trainable ones are float32), so
    the engine runs in its float32 mode, and the loss scale of float16 is our own.
    """

    def __init__(
        self,
        module: nn.Module,
        config: OptimizerConfig,
        train: TrainConfig,
        micro_batch: int,
        precision: str = "float32",
    ) -> None:
        with collection_paused():
            import deepspeed

        # Its shared-memory all-reduce serves inference only; building it takes a C++ compiler and 40 s at first.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        self.config, self.loss_scale = config, LOSS_SCALE[precision]
        parameters = [p for p in module.parameters() if p.requires_grad]
        _unscale(parameters, self.loss_scale)
        self._stage, count = train.zero_stage, sum(p.numel() for p in parameters)
        self._engine, self._optimizer, _, _ = deepspeed.initialize(
            model=module,
            optimizer=_adamw(parameters, config),
            config={
                "train_micro_batch_size_per_gpu": micro_batch,
                "gradient_accumulation_steps": 1,
                "gradient_clipping": config.clip_norm,
                # A buffer of this many elements is set aside from stage 1 on, 2 GB by default.
                "zero_optimization": {"stage": train.zero_stage, "reduce_bucket_size": min(count, BUCKET)},
                "zero_allow_untested_optimizer": True,
                "steps_per_print": None,
            },
        )
        self._engine.checkpoint_engine = _plain_checkpoints()
        self.module = self._engine

    def backward(self, loss: Tensor, last: bool) -> None:
        """See ``Engine.backward``; gradients are averaged over workers at the last part."""
        self._engine.set_gradient_accumulation_boundary(last)
        self._engine.backward(loss * self.loss_scale)
        if not last:
            self._engine.step()

    def step(self, index: int) -> StepOutcome:
        """See ``Engine.step``."""
        lr = self.rate(index)
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        if self._stage == 0:
            parameters = [p for p in self._engine.module.parameters() if p.grad is not None]
            norm = float(torch.nn.utils.get_total_norm([p.grad for p in parameters]))
            if not math.isfinite(norm):
                self._engine.zero_grad()
                return StepOutcome(norm, lr, True)
            self._engine.step()
            return StepOutcome(norm, lr, False)
        self._engine.step()
        norm = float(self._engine.get_global_grad_norm())
        return StepOutcome(norm, lr, bool(self._optimizer.overflow))

    def save(self, folder: Path) -> None:
        """See ``Engine.save``; frozen weights are left out."""
        self._engine.save_checkpoint(str(folder), tag=TAG, exclude_frozen_parameters=True, save_latest=False)

    def load(self, folder: Path) -> None:
        """See ``Engine.load``.

        Raises:
            ValueError: the checkpoint is of another number of workers, or cannot be read.
        """
        from deepspeed.runtime.zero.utils import ZeRORuntimeException

        try:
            path, _ = self._engine.load_checkpoint(str(folder), tag=TAG, load_module_strict=False)
        except ZeRORuntimeException as error:
            raise ValueError(
                f"checkpoint {folder}: {error}; a ZeRO run resumes with its own number of workers"
            ) from error
        if path is None:
            raise ValueError(f"checkpoint {folder} holds no engine state")

    def gathered(self) -> AbstractContextManager[Any]:
        """See ``Engine.gathered``."""
        if self._stage < 3:
            return nullcontext()
        import deepspeed

        trainable = [p for p in self._engine.module.parameters() if p.requires_grad]
        return deepspeed.zero.GatheredParameters(trainable, modifier_rank=None)


def _plain_checkpoints() -> Any:
    """Makes what DeepSpeed writes and reads its files with; its own would unpickle any object, and so run code."""
    from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    class PlainCheckpoints(TorchCheckpointEngine):
        """Reads tensors, plain values and the three classes of numbers that ZeRO's state consists of."""

        def load(self, path: str, map_location: Any = None) -> Any:
            """Loads one of DeepSpeed's files; see ``load_plain``."""
            return load_plain(path, (LossScaler, ZeroStageEnum, fragment_address), map_location)

    made = PlainCheckpoints()
    made.zipfile_serialization = True
    return made

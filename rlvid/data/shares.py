"""The shares of global batches that workers train on, as tensors."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from rlvid.models.base import Posterior
from rlvid.models.text_rows import pad_rows


@dataclass(frozen=True)
class Share:
    """A worker's samples of a step; those of a run without clips have no ``text_BLD`` and no ``posterior``.

    ``serials``: places in the global order; tensors are float32 on the CPU. ``lost``: the serials whose clip cannot be
    read, and ``fault``: what is wrong with the first of them; ``note``: what else the user should know.
    """

    step: int
    serials: list[int]
    prompts: list[str]
    text_BLD: Tensor | None = None
    posterior: Posterior | None = None
    lost: frozenset[int] = frozenset()
    fault: str | None = None
    note: str | None = None

    @staticmethod
    def of(row: Mapping[str, Any] | None, step: int, rank: int) -> "Share":
        """Reads a row of the feed; None stands for its end.

        Raises:
            RuntimeError: it is of another step or of another worker, so that the order of samples is lost.
        """
        got = (row["step"], row["rank"]) if row else None
        if row is None or got != (step, rank):
            raise RuntimeError(
                f"worker {rank} expects its samples of step {step}, and Ray Data delivered (step, worker) = {got}; "
                "start the same command again to resume from the last checkpoint, and report this"
            )
        with pa.ipc.open_stream(row["clips"]) as stream:
            clips = stream.read_all()
        serials, lost, fault, note = row["serials"], frozenset(row["lost"]), row["fault"], row["note"]
        if clips.column_names == ["caption"]:
            return Share(step, serials, clips["caption"].to_pylist(), lost=lost, fault=fault, note=note)
        return Share(step, serials, *tensors(clips), lost, fault, note)


def tensors(clips: pa.Table) -> tuple[list[str], Tensor, Posterior]:
    """Returns captions, text_BLD and the posterior of encoded clips; float32 on the CPU.

    Embeddings of different lengths are padded with zeros to the longest of them.
    """
    mean, std = (torch.stack(column(clips, name, "latent_shape")) for name in ("mean", "std"))
    rows = column(clips, "text", "text_shape")
    return clips["caption"].to_pylist(), pad_rows(rows, max(map(len, rows))), Posterior(mean, std)


def column(clips: pa.Table, name: str, shape: str) -> list[Tensor]:
    """Returns the tensors of a column, of the shapes in another; float32 on the CPU."""
    return [_tensor(data, of) for data, of in zip(clips[name], clips[shape], strict=True)]


def _tensor(data: pa.BinaryScalar, shape: pa.ListScalar) -> Tensor:
    values = np.frombuffer(data.as_buffer(), dtype="<f4").reshape(shape.as_py())
    return torch.from_numpy(values.astype(np.float32))  # a copy: Arrow's memory is read-only

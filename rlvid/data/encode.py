"""Encodes clips once, with Ray Data: videos and captions in, posteriors and text embeddings out, as Parquet.

    items (path, caption) -> actors that hold the model: read, encode, keep rows -> tasks: parts in order

Every clip goes through the model by itself, so that the result depends neither on the batch nor on the number of
workers. The folder appears atomically, and is reused as long as the same would come out. What was encoded when
the process is killed is kept, and the next call goes on from there (see ``rlvid.data.writing``).
"""

import hashlib
import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from torch import Tensor

from rlvid import __version__
from rlvid.cluster.connect import start_ray
from rlvid.cluster.nodes import ask_nodes, nodes_possible, workers_that_fit
from rlvid.config.model import ModelConfig
from rlvid.data.clips import ROWS, digest
from rlvid.data.find import Skipped, find_clips, hash_contents, read_contents
from rlvid.data.row_files import keep_rows, make_part
from rlvid.data.videos import VideoError, read_video
from rlvid.data.writing import ClipWriter, is_reusable, read_report, unfinished
from rlvid.interrupt import kept
from rlvid.models.base import Posterior, VideoModel
from rlvid.models.folders import model_folder, movable, resolved_shape
from rlvid.models.text_limit import model_text_limit, notices
from rlvid.models.unet3d import load_model

log = logging.getLogger(__name__)

_CPUS = 0.5
"""CPU cores that an actor reserves: few, so that a pool fits beside other work on two cores."""
_PATIENCE = 60.0
"""Seconds that a node may take to say whether it sees a folder."""
MODEL_FPS = 8  # of every model that `load_model` gives; the actors assert it

Item = dict[str, Any]  # index, source (the path of a video, or a name), caption
Reader = Callable[[Item, VideoModel], tuple[str, Tensor | Posterior]]  # caption, and pixels or latents
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class EncodeReport:
    """The result of an encoding."""

    folder: Path
    clips: int  # in the folder
    encoded: int  # by this call; the others were there already
    skipped: list[Skipped]  # files that are not in it, and why
    fingerprint: str  # of everything that the content depends on
    seconds: float  # that the call took
    notes: list[str]  # on captions that are cut


def encode_folder(
    source: str | Path,
    model: ModelConfig,
    out: str | Path,
    *,
    workers: int = 1,
    batch_size: int = 8,
    use_gpu: bool | None = None,
    on_progress: Progress | None = None,
    outside: bool = False,
) -> EncodeReport:
    """Encodes videos with captions.

    Args:
        source: folder or manifest, see ``rlvid.data.find.find_clips``.
        model: whose autoencoder and text encoder are used; its length and size are what videos are brought to.
        out: folder to be made; on storage that all workers of the training see.
        workers: Ray actors, each with a model of its own.
        batch_size: clips that an actor takes at once; the result does not depend on it.
        use_gpu: a GPU for each actor; default: when the cluster has enough of them.
        on_progress: called with (clips done, clips in all).
        outside: also use what lies outside the source's folder, see ``find_clips``.

    Raises:
        ValueError: no clips, none that can be read, ``out`` cannot be made, or holds something else, or the model
            cannot be loaded.
    """
    clips, skipped = find_clips(Path(source).resolve(), outside=outside)
    skipped = [each for each in skipped if not each.path.is_relative_to(unfinished(Path(out).resolve()))]
    contents, unreadable = read_contents(clips)
    skipped += unreadable
    if not contents:
        why = "; ".join(map(str, skipped[:3])) or "the folder is empty"
        raise ValueError(
            f"{source}: no clips to encode ({why}); a clip is a video with its caption in a .txt beside it"
        )
    items = [{"index": i, "source": str(clip.path), "caption": clip.caption} for i, clip in enumerate(contents)]
    notes = notices([model_text_limit(model.path)], (clip.caption for clip in contents), "captions")
    return encode_clips(
        items, read_item, {"videos": hash_contents(contents)}, skipped, model, Path(out),
        workers=workers, batch_size=batch_size, use_gpu=use_gpu, on_progress=on_progress, notes=notes,
    )  # fmt: skip


def read_item(item: Item, model: VideoModel) -> tuple[str, Tensor]:
    """Returns caption and frames_FCHW of a video file, as the model needs them."""
    return item["caption"], read_video(item["source"], frames=model.frames, size=model.size, fps=model.fps)


def encode_items(model: VideoModel, items: list[Item], read: Reader = read_item, threads: int = 1) -> pa.Table:
    """Encodes a batch, as an actor does, without Ray.

    Args:
        model: encodes frames and prompts.
        items: rows with ``index``, ``source`` and ``caption``.
        read: gives caption and frames_FCHW of an item, or the posterior of its latents (1, C, F, h, w); or raises
            ``VideoError``.
        threads: that read videos side by side.

    Returns:
        A table of schema ``ROWS``, one row an item, in their order; a clip that cannot be read has an ``error``.
    """

    def attempt(item: Item) -> tuple[str, Tensor | Posterior] | VideoError:
        try:
            return read(item, model)
        except VideoError as error:
            return error

    with ThreadPoolExecutor(threads) as pool:
        found = list(pool.map(attempt, items))
    rows = []
    for item, clip in zip(items, found, strict=True):
        row = {name: item[name] for name in ("index", "source", "caption")}
        if isinstance(clip, VideoError):
            rows.append({**row, "error": str(clip)})
            continue
        caption, seen = clip
        posterior = seen if isinstance(seen, Posterior) else model.encode_frames(seen[None])
        text_LD = model.encode_prompts([caption])[0]
        rows.append(
            row
            | {"caption": caption, "latent_shape": list(posterior.mean[0].shape), "text_shape": list(text_LD.shape)}
            | {"mean": _bytes(posterior.mean), "std": _bytes(posterior.std), "text": _bytes(text_LD)}
        )
    return pa.Table.from_pylist(rows, ROWS)


class ClipEncoder:
    """The Ray actor: loads the model once, then encodes batch after batch.

    Args:
        config: of the model.
        read: see ``encode_items``.
        device: where the model runs.
        workers: actors in all; those of one machine share its cores.
        denoiser: whether ``read`` needs the model's denoiser, by far its largest part.
        work: folder of an encoding, in which the actor keeps its rows; without one it returns them.
    """

    def __init__(
        self,
        config: ModelConfig,
        read: Reader,
        device: str,
        workers: int,
        denoiser: bool = False,
        work: Path | None = None,
    ) -> None:
        self._read, self._work = read, work
        threads = max(1, min(8, (os.cpu_count() or 1) // workers))
        torch.set_num_threads(threads)  # Ray says 1 to actors that reserve less than a core
        self._readers = 1 if denoiser else threads
        shape: dict[str, Any] = {"frames": config.frames, "size": config.size, "decode_chunk": config.decode_chunk}
        self._model = load_model(config.path, **shape, precision=config.precision, device=device)
        if not denoiser:
            self._model.denoiser = torch.nn.Identity()
        assert self._model.fps == MODEL_FPS, f"the model runs at {self._model.fps} frames a second"

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Encodes a batch of items; returns rows of schema ``ROWS``, or what ``keep_rows`` returns."""
        rows = encode_items(self._model, batch.to_pylist(), self._read, self._readers)
        return rows if self._work is None else keep_rows(self._work, rows)

    def blank(self, caption: str) -> pa.Table:
        """Returns a row of schema ``ROWS`` that stands where a video cannot be read: latents of zeros."""
        zeros = torch.zeros(1, *self._model.latent_shape)
        item = {"index": 0, "source": "", "caption": caption}
        return encode_items(self._model, [item], lambda item, model: (caption, Posterior(zeros, zeros)))


def exact_model(model: ModelConfig) -> ModelConfig:
    """Returns the settings of a model for another process: with an absolute path, its length and its size."""
    frames, size = resolved_shape(model.path, model.frames, model.size)
    return model.model_copy(update={"frames": frames, "size": size, "path": movable(model.path)})


def model_fingerprint(model: ModelConfig) -> str:
    """Hashes all that encoded clips depend on: weights, precision, length, size, rate, but not the model's folder."""
    return digest(_made_with(model))


def encode_clips(
    items: list[Item],
    read: Reader,
    source: dict[str, Any],
    skipped: list[Skipped],
    model: ModelConfig,
    out: Path,
    *,
    workers: int = 1,
    batch_size: int = 8,
    use_gpu: bool | None = None,
    on_progress: Progress | None = None,
    denoiser: bool = False,
    notes: list[str] | None = None,
) -> EncodeReport:
    """Encodes clips into a folder, or resumes an unfinished encoding, or does nothing if the folder holds them.

    Args:
        items: what to encode, ``index`` counting from 0.
        read: see ``encode_items``.
        source: what the clips themselves are identified by.
        skipped: what is left out already; goes into the report.
        model: encodes them.
        out: folder to be made.
        workers: as for ``encode_folder``.
        batch_size: likewise.
        use_gpu: likewise.
        on_progress: likewise.
        denoiser: see ``ClipEncoder``.
        notes: what else the report says.

    Raises:
        ValueError: see ``encode_folder``.
    """
    if workers < 1 or batch_size < 1:
        raise ValueError(f"workers = {workers} and batch_size = {batch_size}: both must be at least 1")
    start, encoded, out = time.perf_counter(), 0, out.absolute()
    from_model = _made_with(model)
    made_with = from_model | source | {"rlvid": __version__}
    if is_reusable(out, made_with):
        log.info("%s holds these clips already; nothing is encoded", out)
    else:
        exact = exact_model(model)
        with ClipWriter(out, made_with, _make_part) as writer, kept(lambda: _kept(writer, len(items))):
            left = [item for item in items if item["index"] not in writer.done]
            for rows in _pipeline(left, writer.work, read, exact, workers, batch_size, use_gpu, denoiser):
                encoded += writer.add(rows) if "mean" in rows.column_names else writer.note(rows)
                if on_progress is not None:
                    on_progress(len(writer.done), len(items))
            fingerprints = {"fingerprint": digest(made_with), "model_fingerprint": digest(from_model)}
            writer.finish({**fingerprints, "model_path": model.path}, skipped, notes or [])
    clips, skipped = read_report(out)
    for each in skipped:
        log.warning("skipped %s", each)
    return EncodeReport(out, clips, encoded, skipped, digest(made_with), time.perf_counter() - start, notes or [])


def _make_part(files: Sequence[Path], indices: Sequence[int], path: Path) -> None:
    """Makes a part in a task: no clip goes through this process."""
    import ray

    start_ray()
    ray.get(ray.remote(num_cpus=0)(make_part).remote(files, indices, path))


def _pipeline(
    items: list[Item],
    work: Path,
    read: Reader,
    model: ModelConfig,
    workers: int,
    batch_size: int,
    use_gpu: bool | None,
    denoiser: bool,
) -> Iterator[pa.Table]:
    """Yields rows in the order in which they are ready: those that ``keep_rows`` returns, for they are kept already.

    Where another node does not see the folder, the rows themselves come through this process, which keeps them.
    """
    if not items:
        return
    import ray  # only here: everything else in this module works without it

    start_ray()
    if use_gpu is None:
        use_gpu = ray.cluster_resources().get("GPU", 0) >= workers
    fit = workers_that_fit(nodes_possible(), {"CPU": _CPUS} | ({"GPU": 1.0} if use_gpu else {}))
    if fit < workers:
        raise ValueError(f"workers = {workers}: the cluster has room for {fit:g} that encode; give that many at most")
    dataset = ray.data.from_items(items, override_num_blocks=min(10_000, -(-len(items) // batch_size)))
    dataset.context.enable_progress_bars = False
    encoded = dataset.map_batches(
        ClipEncoder,
        fn_constructor_args=(
            model,
            read,
            "cuda" if use_gpu else "cpu",
            workers,
            denoiser,
            work if _is_shared(work) else None,
        ),
        compute=ray.data.ActorPoolStrategy(size=workers),
        batch_size=batch_size,
        batch_format="pyarrow",
        num_cpus=_CPUS,
        num_gpus=1 if use_gpu else 0,
    )
    yield from encoded.iter_batches(batch_size=None, batch_format="pyarrow")


def _is_shared(work: Path) -> bool:
    """Returns whether all nodes see the folder of an encoding."""
    import ray

    nodes = [node["NodeID"] for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU")]
    if len(nodes) == 1:
        return True
    answers, _, _ = ask_nodes(os.path.isfile, {node: (str(work / "plan.json"),) for node in nodes}, _PATIENCE)
    return len(answers) == len(nodes) and all(answers.values())


def _kept(writer: ClipWriter, clips: int) -> str:
    return f"{len(writer.done)} of {clips} clips are encoded, in {writer.work}"


def _made_with(model: ModelConfig) -> dict[str, Any]:
    """Returns all properties of the model on which encoded clips depend."""
    frames, size = resolved_shape(model.path, model.frames, model.size)
    shape = {"frames": frames, "size": size, "fps": MODEL_FPS}
    weights = hash_weights(model.path, ("vae", "text_encoder", "tokenizer"))
    return {"weights": weights, "precision": model.precision, **shape}


def hash_weights(path: str, parts: tuple[str, ...]) -> str:
    """Returns sixteen hex digits over weights and settings of a model's parts."""
    folder, total = model_folder(path), hashlib.sha256()
    for part in parts:
        for file_path in sorted((folder / part).rglob("*")):
            if file_path.suffix in (".safetensors", ".bin", ".json", ".txt"):
                total.update(f"{file_path.relative_to(folder).as_posix()}\n".encode())
                with open(file_path, "rb") as file:
                    total.update(hashlib.file_digest(file, "sha256").digest())
    return total.hexdigest()[:16]


def _bytes(values: Tensor) -> bytes:
    return values.float().cpu().contiguous().numpy().astype("<f4").tobytes()

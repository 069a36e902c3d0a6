"""Encodes clips once, with Ray Data: videos and captions in, posteriors and text embeddings out, as Parquet.

    items (path, caption) -> actors that hold the model: read, encode, keep rows -> tasks: parts in order

Every clip goes through the model by itself, so that the result depends neither on the batch nor on the number of
workers. The folder appears atomically, and is reused as long as the same would come out. What was encoded when
the process is killed is kept, and the next call goes on from there (see ``rlvid.data.writing``).
"""

import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from rlvid import __version__
from rlvid.cluster.connect import start_ray
from rlvid.cluster.nodes import ask_nodes, nodes_possible, workers_that_fit
from rlvid.config.model import ModelConfig
from rlvid.data.checksums import hash_weights
from rlvid.data.clips import digest
from rlvid.data.encoders import ClipEncoder, Embedder, Item, Reader, read_item
from rlvid.data.find import Skipped, find_clips, hash_contents, read_contents
from rlvid.data.row_files import make_part
from rlvid.data.writing import ClipWriter, is_reusable, read_report, unfinished
from rlvid.interrupt import kept
from rlvid.models.folders import movable
from rlvid.models.text_limit import model_text_limit, notices
from rlvid.models.video_shape import resolved_shape

log = logging.getLogger(__name__)

_CPUS = 0.5
"""CPU cores that an actor reserves: few, so that a pool fits beside other work on two cores."""
_PATIENCE = 60.0
"""Seconds that a node may take to say whether it sees a folder."""

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
        workers: Ray actors at most, each with a model of its own; no more than there are batches.
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


def exact_model(model: ModelConfig) -> ModelConfig:
    """Returns the settings of a model for another process: with an absolute path, its length, height and width."""
    shape = resolved_shape(model)
    sides: dict[str, Any] = {"size": None, "height": shape.height, "width": shape.width}
    return model.model_copy(update={"frames": shape.frames, "path": movable(model.path), **sides})


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
    texts: Embedder | None = None,
    notes: list[str] | None = None,
    by: dict[str, Any] | None = None,
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
        texts: likewise.
        notes: what else the report says.
        by: the properties of the model on which the rows depend; default: all that encoded clips depend on.

    Raises:
        ValueError: see ``encode_folder``.
    """
    if workers < 1 or batch_size < 1:
        raise ValueError(f"workers = {workers} and batch_size = {batch_size}: both must be at least 1")
    start, encoded, out = time.perf_counter(), 0, out.absolute()
    from_model = by or _made_with(model)
    made_with = from_model | source | {"rlvid": __version__}
    if is_reusable(out, made_with):
        log.info("%s holds these clips already; nothing is encoded", out)
    else:
        exact = exact_model(model)
        with ClipWriter(out, made_with, _make_part) as writer, kept(lambda: _kept(writer, len(items))):
            left = [item for item in items if item["index"] not in writer.done]
            encoder = (exact, read, denoiser, texts)
            for rows in _pipeline(left, writer.work, encoder, workers, batch_size, use_gpu):
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
    """Makes a part in a task beside this process, which holds no clip."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    start_ray()
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    task = ray.remote(num_cpus=0, scheduling_strategy=here)(make_part)
    try:
        ray.get(task.remote(files, indices, path))
    except ray.exceptions.RayTaskError as error:
        raise error.cause from None


def _pipeline(
    items: list[Item],
    work: Path,
    encoder: tuple[ModelConfig, Reader, bool, Embedder | None],
    workers: int,
    batch_size: int,
    use_gpu: bool | None,
) -> Iterator[pa.Table]:
    """Yields rows in the order in which they are ready: those that ``keep_rows`` returns, for they are kept already.

    ``encoder`` is ``ClipEncoder``'s model, reader, ``denoiser`` and ``texts``.

    Where another node does not see the folder, the rows themselves come through this process, which keeps them.
    """
    if not items:
        return
    import ray  # only here: everything else in this module works without it

    start_ray()
    if use_gpu is None:
        use_gpu = ray.cluster_resources().get("GPU", 0) >= workers
    batches = -(-len(items) // batch_size)
    actors = min(workers, batches)  # each loads a model at once
    fit = workers_that_fit(nodes_possible(), {"CPU": _CPUS} | ({"GPU": 1.0} if use_gpu else {}))
    if fit < actors:
        raise ValueError(f"workers = {workers}: the cluster has room for {fit:g} that encode; give that many at most")
    device = "cuda" if use_gpu else "cpu"
    model, read, denoiser, texts = encoder
    kept_in = work if _is_shared(work) else None
    dataset = ray.data.from_items(items, override_num_blocks=min(10_000, batches))
    dataset.context.enable_progress_bars = False
    encoded = dataset.map_batches(
        ClipEncoder,
        # threads by ``workers``, so that bits do not depend on how much is left
        fn_constructor_args=(model, read, device, workers, denoiser, kept_in, texts),
        compute=ray.data.ActorPoolStrategy(size=actors),
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
    shape = resolved_shape(model)
    weights = hash_weights(model.path, ("vae", "text_encoder", "tokenizer"))
    made = {"weights": weights, "precision": model.precision, "frames": shape.frames}
    return made | shape.sides | {"fps": shape.fps}

"""Encodes the videos of shares on their way from the feed to the workers.

    shares with names of videos --actors that hold the model: cache, or read and encode--> shares of encoded clips

Each video goes through the model by itself, so that its bits depend on nothing else. A video that cannot be read keeps
its place: zeros stand there, and its samples get no reward.
"""

import hashlib
import warnings
from collections import OrderedDict
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import ray.data
from pyarrow import fs
from ray.util.annotations import RayDeprecationWarning

from rlvid.data.batches import row_of
from rlvid.data.clips import CLIP, SCHEMA
from rlvid.data.embeddings import embedder_of
from rlvid.data.encoders import ClipEncoder, read_item
from rlvid.data.encoding import Encoding
from rlvid.data.find import ClipFile, key_of, read_contents
from rlvid.files import atomic_file
from rlvid.storage import locate

_RECENT = 16
"""Encoded clips that an actor keeps in memory: those of a group lie in neighbouring shares."""
_RESTARTS = 3
"""Restarts of an encoder that has died; then the run's workers start again."""
_DIGEST = hashlib.sha256().digest_size
_ENCODED = pa.schema([SCHEMA.field(name) for name in CLIP])


class ClipCache:
    """Encoded clips in a folder or an object store, a file each; a fault of the storage ends its use.

    A file is an Arrow stream and the 32 bytes of its SHA-256, since Arrow does not see a flipped bit and reports a file
    that is cut off as a fault of the storage.

    Args:
        storage: folder or URI.
        under: place in it.

    Attributes:
        problem: the fault that has ended its use.
    """

    def __init__(self, storage: str, under: str) -> None:
        self._store, self._root = locate(storage, under)
        self._usable = True
        self.problem: str | None = None

    def read(self, key: str) -> pa.Table | None:
        """Returns a clip of the columns ``CLIP``; None if there is none, or a damaged one."""
        path = self._path(key)
        try:
            if not self._usable or self._store.get_file_info(path).type != fs.FileType.File:
                return None
            with self._store.open_input_stream(path) as file:
                content = file.read()
        except OSError as error:
            self._give_up(error)
            return None
        kept, digest = content[:-_DIGEST], content[-_DIGEST:]
        if hashlib.sha256(kept).digest() != digest:
            return None  # it is written anew
        with pa.ipc.open_stream(kept) as stream:
            found = stream.read_all()
        return found if found.num_rows == 1 and found.schema.equals(_ENCODED) else None

    def write(self, key: str, clip: pa.Table) -> None:
        """Keeps a clip of the columns ``CLIP``."""
        if not self._usable:
            return
        path, sink = self._path(key), pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, clip.schema) as stream:
            stream.write_table(clip)
        kept = sink.getvalue().to_pybytes()
        content = kept + hashlib.sha256(kept).digest()
        try:
            self._store.create_dir(path.rpartition("/")[0])
            if self._store.type_name == "local":
                with atomic_file(Path(path)) as part:
                    part.write_bytes(content)
            else:
                with self._store.open_output_stream(path) as file:
                    file.write(content)
        except OSError as error:
            self._give_up(error)

    def _path(self, key: str) -> str:
        return f"{self._root}/{key[:2]}/{key}.arrow"  # a file system is slow with 100,000 files in one folder

    def _give_up(self, error: OSError) -> None:
        self._usable = False
        self.problem = f"encoded videos are not kept any more: {self._root} cannot be used ({error.strerror or error})"


class ShareEncoder:
    """The Ray actor: loads the model once, then encodes share after share.

    Args:
        how: the settings.
    """

    def __init__(self, how: Encoding) -> None:
        device = "cuda" if how.gpus else "cpu"
        texts = partial(embedder_of, how.model.path, how.texts)
        self._encode = ClipEncoder(how.model, read_item, device, how.processes, texts=texts)
        self._cache = ClipCache(how.storage, f"{how.kept_in}-{device}") if how.storage else None
        self._recent = OrderedDict[str, tuple[pa.Table, str | None]]()

    def __call__(self, block: pa.Table) -> pa.Table:
        """Encodes the videos of shares, rows of ``rlvid.data.batches.row_of``."""
        return pa.concat_tables([self._share(row) for row in block.to_pylist()])

    def _share(self, row: dict[str, Any]) -> pa.Table:
        with pa.ipc.open_stream(row["clips"]) as stream:
            clips = stream.read_all()
        if "key" not in clips.column_names:  # all encoded already
            return row_of(row["step"], row["rank"], row["serials"], row["lost"], row["fault"], clips)
        tables, faults = list[pa.Table](), dict[int, str]()
        for place, (serial, key) in enumerate(zip(row["serials"], clips["key"].to_pylist(), strict=True)):
            clip = clips.slice(place, 1)
            if key is None:
                tables.append(clip.select(CLIP).cast(_ENCODED))
                continue
            encoded, fault = self._clip(key, clip["source"][0].as_py(), clip["caption"][0].as_py())
            tables.append(encoded)
            if fault is not None:
                faults[serial] = fault
        lost, fault = sorted({*row["lost"], *faults}), row["fault"] or next(iter(faults.values()), None)
        note, whole = self._cache.problem if self._cache else None, pa.concat_tables(tables).combine_chunks()
        return row_of(row["step"], row["rank"], row["serials"], lost, fault, whole, note)

    def _clip(self, key: str, source: str, caption: str) -> tuple[pa.Table, str | None]:
        """Returns a clip of the columns ``CLIP``, and what is wrong with its video."""
        if key in self._recent:
            self._recent.move_to_end(key)
            return self._recent[key]
        found = self._cache.read(key) if self._cache else None
        made = (found, None) if found is not None else self._made(key, source, caption)
        self._recent[key] = made
        if len(self._recent) > _RECENT:
            self._recent.popitem(last=False)
        return made

    def _made(self, key: str, source: str, caption: str) -> tuple[pa.Table, str | None]:
        """Encodes a video; storage that fails ends the run, a video that cannot be read or has changed does not."""
        before = _key(source, caption)
        rows = self._encode(pa.Table.from_pylist([{"index": 0, "source": source, "caption": caption}]))
        fault = rows["error"][0].as_py()
        if fault is None and not before == key == _key(source, caption):
            fault = f"{source}: has changed since the start of the run"
        if fault is not None:
            return self._encode.blank(caption).select(CLIP).cast(_ENCODED), fault
        clip = rows.select(CLIP).cast(_ENCODED)
        if self._cache:
            self._cache.write(key, clip)
        return clip, None


def _key(source: str, caption: str) -> str | None:
    """Returns the identity of a video as it is now; None where there is none."""
    clip = ClipFile(Path(source), caption)
    with suppress(FileNotFoundError), open(source, "rb"):
        contents, unreadable = read_contents([clip])
        if unreadable:
            raise OSError(str(unreadable[0]))
        return key_of(contents[clip])
    return None


def encoded(shares: ray.data.Dataset, how: Encoding) -> ray.data.Dataset:
    """Adds the actors to a feed; they reserve no CPU, as the tasks of the feed."""
    with warnings.catch_warnings():  # the two arguments at the end, which have no other way yet
        warnings.simplefilter("ignore", RayDeprecationWarning)
        return shares.map_batches(
            ShareEncoder,
            fn_constructor_args=(how,),
            compute=ray.data.ActorPoolStrategy(size=how.encoders, max_tasks_in_flight_per_actor=2),
            batch_size=None,
            batch_format="pyarrow",
            num_cpus=0,
            num_gpus=how.gpus,
            max_restarts=_RESTARTS,  # by default an encoder that a video kills starts again for ever
            max_task_retries=_RESTARTS,
        )

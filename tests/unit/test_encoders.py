"""Rows that several processes keep become parts, each row once."""

import hashlib
import os
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
import torch

from rlvid import files
from rlvid.config.model import ModelConfig
from rlvid.data import checksums, encode, encoders, writing
from rlvid.data.checksums import hash_weights
from rlvid.data.clips import EncodedClips, read_meta
from rlvid.data.encoders import ClipEncoder, encode_items
from rlvid.data.row_files import keep_rows
from rlvid.data.sources import read_rendered
from rlvid.data.writing import ClipWriter, unfinished
from rlvid.toy.tiny import save_tiny_model, tiny_model


@pytest.fixture(scope="module")
def table() -> pa.Table:
    items = [{"index": i, "source": f"clip {i}", "caption": ""} for i in range(12)]
    return encode_items(tiny_model(frames=2, size=8), items, lambda item, model: read_rendered(0, item, model))


def test_rows_of_a_process_of_a_killed_start_are_there_once(
    table: pa.Table, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writing, "_ROWS_IN_PART", 5)
    out = tmp_path / "clips"
    with ClipWriter(out, {}) as writer:
        first = keep_rows(writer.work, table.slice(0, 8), "-one")
        keep_rows(writer.work, table.slice(4, 8), "-late")  # by a process that this one knows nothing of
        assert writer.note(first) == 8
    with ClipWriter(out, {}) as writer:
        assert writer.done == set(range(12))
        writer.note(keep_rows(writer.work, table.slice(0, 4), "-two"))
        keep_rows(writer.work, table.slice(0, 4), "-later still")
        assert writer.finish({"fingerprint": "0" * 16}, []) == 12
    assert {path.name.partition("-")[0] for path in out.iterdir()} == {"part", "meta.json", "report.json", "report.txt"}
    rows = pa.concat_tables([pq.read_table(path) for path in sorted(out.glob("part-*"))])
    assert rows.to_pylist() == table.drop_columns("error").to_pylist()


def test_rows_that_this_machine_does_not_see_are_one_line(
    table: pa.Table, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writing, "_VISIBLE", 0.0)
    with ClipWriter(tmp_path / "clips", {}) as writer:
        kept = keep_rows(writer.work, table)
        (writer.work / "rows-000000000.parquet").unlink()
        with pytest.raises(
            ValueError, match="does not see what the others write there; choose a folder that all nodes"
        ):
            writer.note(kept)


def test_an_encoder_keeps_its_rows_or_gives_them_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_tiny_model(tmp_path / "tiny")
    model = ModelConfig(path=str(tmp_path / "tiny"), frames=2, size=16)
    monkeypatch.setattr(os, "cpu_count", lambda: 16)
    threads: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    work = unfinished(tmp_path / "clips")
    work.mkdir()
    encoder = ClipEncoder(model, lambda item, model: read_rendered(0, item, model), "cpu", 4, work=work)
    ClipEncoder(model, lambda item, model: read_rendered(0, item, model), "cpu", 1)
    assert threads == [4, 8], "the cores are shared; more than eight threads do not help"
    items = pa.Table.from_pylist([{"index": 3, "source": "clip 3", "caption": ""}])
    kept = encoder(items)
    assert kept.column_names == ["index", "source", "error", "file"]
    assert [path.name for path in work.iterdir()] == kept["file"].to_pylist()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(encoders, "keep_rows", full)
    assert "mean" in encoder(items).column_names, "who gathers the rows tries too, and says what is wrong"


def test_a_folder_of_an_earlier_version_is_read(table: pa.Table, tmp_path: Path) -> None:
    out = tmp_path / "clips"
    with ClipWriter(out, {}) as writer:
        writer.add(table)
        writer.finish({"fingerprint": "0" * 16}, [])
    meta = (out / "meta.json").read_text()
    expected = read_meta(out)
    head, _, _ = meta.partition('  "parts"')
    (out / "meta.json").write_text(head.rstrip().rstrip(",") + "}")
    assert read_meta(out) == expected
    assert len(EncodedClips.open(out)) == 12


def test_weights_are_read_once_by_a_process_and_anew_when_they_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_tiny_model(tmp_path)
    read, digest = list[str](), hashlib.file_digest
    monkeypatch.setattr(hashlib, "file_digest", lambda file, how: [read.append(file.name), digest(file, how)][1])
    parts = ("vae", "text_encoder", "tokenizer")
    found = [hash_weights(str(tmp_path), parts) for _ in range(2)]
    assert len(read) == len(set(read)) > 3
    (weights,) = (tmp_path / "vae").glob("*.safetensors")
    content, was = bytearray(weights.read_bytes()), weights.stat()
    for place in (-1, -2):
        content[place] ^= 1
        if place == -1:  # in place: another time
            weights.write_bytes(content)
            os.utime(weights, ns=(was.st_atime_ns, was.st_mtime_ns + 1))
        else:  # a file of the same time in its place: another inode
            (tmp_path / "other").write_bytes(content)
            shutil.copystat(weights, tmp_path / "other")
            (tmp_path / "other").replace(weights)
        read.clear()
        found.append(hash_weights(str(tmp_path), parts))
        assert read == [str(weights)]
    assert found[0] == found[1]
    assert len(set(found)) == 3


def test_large_weights_are_read_once_by_all_processes_and_anew_when_they_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_tiny_model(tmp_path / "tiny")
    monkeypatch.setenv("RLVID_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(checksums, "_LARGE", 0)
    read, digest = list[str](), hashlib.file_digest
    monkeypatch.setattr(hashlib, "file_digest", lambda file, how: [read.append(file.name), digest(file, how)][1])

    def start() -> str:
        files._sha256_as.cache_clear()  # as a process that begins
        read.clear()
        return hash_weights(str(tmp_path / "tiny"), ("vae",))

    first = start()
    assert read
    assert start() == first
    assert read == []
    (weights,) = (tmp_path / "tiny" / "vae").glob("*.safetensors")
    content, was = bytearray(weights.read_bytes()), weights.stat()
    content[len(content) // 2] ^= 1
    weights.write_bytes(content)
    os.utime(weights, ns=(was.st_atime_ns, was.st_mtime_ns))
    assert start() != first
    assert read == [str(weights)], "the time of a change cannot be set"
    for kept in (tmp_path / "cache").rglob("*"):
        if kept.is_file():
            kept.write_text("")
    second = start()
    assert read, "what is damaged is no checksum"
    shutil.rmtree(tmp_path / "cache")
    (tmp_path / "cache").write_text("in the way")
    assert start() == second, "without a cache files are read"


class Actors:
    """Stands in for Ray Data: notes how many actors a pool starts, and encodes nothing."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.context, self.sizes = self, list[int]()
        self.enable_progress_bars = True
        monkeypatch.setattr(ray.data, "from_items", lambda *_, **__: self)
        monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 64.0})
        monkeypatch.setattr(encode, "start_ray", lambda: None)
        monkeypatch.setattr(encode, "nodes_possible", lambda: [({"CPU": 64.0}, 1.0)])
        monkeypatch.setattr(encode, "_is_shared", lambda _: True)

    def map_batches(self, *_: Any, compute: ray.data.ActorPoolStrategy, **__: Any) -> "Actors":
        self.sizes.append(compute.initial_size)
        return self

    def iter_batches(self, **_: Any) -> list[pa.Table]:
        return []


@pytest.mark.parametrize(("items", "batch_size", "actors"), [(7, 8, 1), (9, 8, 2), (100, 8, 4), (3, 1, 3)])
def test_no_more_models_are_loaded_than_there_are_batches(
    items: int, batch_size: int, actors: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool, encoder = Actors(monkeypatch), (ModelConfig(), encoders.read_item, False, None)
    assert list(encode._pipeline([{"index": i} for i in range(items)], tmp_path, encoder, 4, batch_size, None)) == []
    assert pool.sizes == [actors]

"""Encoded clips as they are read: what is in them, damage, object stores, and the shares of workers; no Ray."""

import io
import itertools
import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from encoded_clips import Encoded, encoded_folder
from pyarrow import fs

from rlvid.data.batches import Shares
from rlvid.data.clips import SCHEMA, DamagedPart, EncodedClips
from rlvid.data.feed import Pace, rows
from rlvid.data.shares import Share, tensors
from rlvid.data.sources import rendered_clip
from rlvid.data.training_set import TrainingSet
from rlvid.toy.tiny import tiny_model


@pytest.fixture(scope="module")
def encoded(tmp_path_factory: pytest.TempPathFactory) -> Encoded:
    return encoded_folder(tmp_path_factory.mktemp("encoded") / "clips")


def test_encoded_clips_are_what_the_model_said(encoded: Encoded) -> None:
    clips = EncodedClips.open(encoded[0], "m")
    model = tiny_model(frames=2, size=8)
    assert len(clips) == 280
    indices = [279, 0, 5, 0, 256]  # position 5 is clip 6, since clip 5 could not be read
    captions, text_BLD, posterior = tensors(clips.rows(indices))
    drawn = [rendered_clip(0, i, 2, 8) for i in (7, 0, 6, 0, 4)]
    assert captions == [caption for caption, _ in drawn] == [list(clips.captions())[i] for i in indices]
    want = model.encode_frames(torch.stack([frames for _, frames in drawn]))
    torch.testing.assert_close(posterior.mean, want.mean, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(posterior.std, want.std, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(text_BLD, model.encode_prompts(captions), atol=1e-5, rtol=1e-5)
    assert posterior.mean.shape[1:] == model.latent_shape == tuple(clips.meta["latent_shape"])
    assert posterior.sample(torch.ones_like(posterior.mean)).isfinite().all()
    for wrong in ([280], [-1], []):
        with pytest.raises(ValueError, match="allowed positions are 0 to 279"):
            clips.rows(wrong)


def test_plain_arrow_reads_encoded_clips_and_the_report_names_the_rest(encoded: Encoded) -> None:
    out, _, table = encoded
    assert sorted(p.name for p in out.iterdir()) == [
        "meta.json", "part-00000.parquet", "part-00001.parquet", "report.json", "report.txt"
    ]  # fmt: skip
    row = pq.read_table(out / "part-00000.parquet").slice(3, 1).to_pylist()[0]
    mean = np.frombuffer(row["mean"], "<f4").reshape(row["latent_shape"])
    assert mean.shape == (4, 2, 4, 4)
    assert row["mean"] == table["mean"][3].as_py()
    skipped = json.loads((out / "report.json").read_text())["skipped"]
    assert skipped == [{"path": "clip 5", "reason": "clip 5: is cut off"}] * 40
    assert "clip 5: is cut off" in (out / "report.txt").read_text()


def break_meta(folder: Path) -> None:
    (folder / "meta.json").write_text("{")


def drop_column(folder: Path) -> None:
    path = folder / "part-00000.parquet"
    pq.write_table(pq.read_table(path).drop_columns(["std"]), path)


def cut_part(folder: Path) -> None:
    path = folder / "part-00001.parquet"
    path.write_bytes(path.read_bytes()[:-100])


def break_page(folder: Path) -> None:
    path = folder / "part-00001.parquet"
    content = bytearray(path.read_bytes())
    start = pq.read_metadata(path).row_group(0).column(2).data_page_offset
    content[start : start + 20] = bytes(20)
    path.write_bytes(content)


def break_caption(folder: Path) -> None:
    path = folder / "part-00001.parquet"
    table = pq.read_table(path)
    broken = pa.array([b"caf\xe9"] * len(table)).view(pa.string())
    pq.write_table(table.set_column(2, "caption", broken), path)


@pytest.mark.parametrize(
    ("harm", "fingerprint", "complaint"),
    [
        (shutil.rmtree, None, "no such folder"),
        (lambda f: (f / "meta.json").unlink(), None, "has no meta.json"),
        (break_meta, None, "meta.json is damaged"),
        (drop_column, None, r"part-00000.parquet is damaged \([0-9,]+ bytes, where"),
        (cut_part, None, r"part-00001.parquet is damaged \([0-9,]+ bytes, where meta.json says"),
        (break_page, None, "part-00001.parquet is damaged"),
        (break_caption, None, "part-00001.parquet is damaged"),
        (lambda f: (f / "part-00001.parquet").unlink(), None, r"part-00001.parquet is damaged \(missing, where"),
        (lambda f: [p.unlink() for p in f.glob("part-*")], None, r"part-00000.parquet is damaged \(missing, where"),
        (lambda f: None, "other", "encoded with another model or size .size 8, weights abc"),
    ],
)
def test_bad_folders_are_refused(
    encoded: Encoded,
    tmp_path: Path,
    harm: Callable[[Path], object],
    fingerprint: str | None,
    complaint: str,
) -> None:
    folder = shutil.copytree(encoded[0], tmp_path / "clips")
    harm(folder)
    with pytest.raises(ValueError, match=complaint) as caught:
        list(EncodedClips.open(folder, fingerprint).captions())
    assert "\n" not in str(caught.value)


def break_clip(folder: Path, position: int) -> None:
    """Damages the posterior of a clip of the first part, and so of its neighbour in the row group."""
    path = folder / "part-00000.parquet"
    content = bytearray(path.read_bytes())
    about = pq.read_metadata(path)
    group = position // about.row_group(0).num_rows
    start = about.row_group(group).column(SCHEMA.names.index("mean")).data_page_offset
    content[start : start + 20] = bytes(20)
    path.write_bytes(content)


def test_a_clip_that_cannot_be_read_keeps_its_place(encoded: Encoded, tmp_path: Path) -> None:
    folder = shutil.copytree(encoded[0], tmp_path / "clips")
    break_clip(folder, 4)
    order, local = np.array([[0, 4, 9, 5], [9, 0, 4, 1]]), EncodedClips.open(encoded[0])

    def read(clips: Path) -> list[Share]:
        shares = Shares(TrainingSet.of(clips), 2, 3, order)
        found = rows(SimpleNamespace(iter_batches=lambda **_: [*shares()]))
        return [
            Share.of(row, step, rank)
            for (step, rank), row in zip(itertools.product((3, 4), (0, 1)), found, strict=True)
        ]

    lost: list[set[int]] = [set(), {13, 15}, {18}, set()]
    for wanted, share, serials in zip(read(encoded[0]), read(folder), lost, strict=True):
        assert (share.step, share.serials) == (wanted.step, wanted.serials)
        assert share.lost == serials
        for place, serial in enumerate(share.serials):
            if serial in serials:
                stand_in = tensors(local.rows([6]))  # two places behind 4, and one behind 5
                assert share.prompts[place] == stand_in[0][0]
                assert torch.equal(share.text_BLD[place], stand_in[1][0])
                assert torch.equal(share.posterior.mean[place], stand_in[2].mean[0])
            else:
                assert share.prompts[place] == wanted.prompts[place]
                assert torch.equal(share.text_BLD[place], wanted.text_BLD[place])
                assert torch.equal(share.posterior.std[place], wanted.posterior.std[place])
        assert share.posterior.mean.shape == wanted.posterior.mean.shape
        assert (share.fault is None) == (not serials)
        assert wanted.fault is None
        assert not serials or f"{folder}/part-00000.parquet is damaged" in share.fault


def test_storage_that_fails_is_no_damage_of_a_clip(encoded: Encoded, tmp_path: Path) -> None:
    folder = shutil.copytree(encoded[0], tmp_path / "clips")
    read = Shares(TrainingSet.of(folder), 1, 0, np.array([[0, 1], [270, 2]]))()
    next(read)
    (folder / "part-00001.parquet").unlink()
    with pytest.raises(OSError, match="part-00001"):
        next(read)


class Store:
    """An object store, played by a folder: counts the bytes that are read of parts."""

    type_name, bytes, failures = "store", 0, 0

    def __getattr__(self, name: str) -> object:
        return getattr(fs.LocalFileSystem(), name)

    def open_input_file(self, path: str) -> pa.NativeFile:
        store = self

        class File(io.BytesIO):
            def read(self, count: int | None = -1) -> bytes:
                if store.failures:
                    store.failures -= 1
                    raise OSError("When reading: connection reset")
                data = super().read(-1 if count is None else count)
                store.bytes += len(data)
                return data

        return pa.PythonFile(File(Path(path).read_bytes()), mode="r")


def test_clips_in_an_object_store_are_read_where_they_lie(encoded: Encoded, monkeypatch: pytest.MonkeyPatch) -> None:
    store, local = Store(), EncodedClips.open(encoded[0])
    monkeypatch.setattr("rlvid.data.clips.locate", lambda place, under: (store, str(encoded[0])))
    clips = EncodedClips.open("s3://bucket/clips", "m")
    assert len(clips) == 280
    assert store.bytes == 0, "no part is read before one of its clips is wanted"
    indices = [279, 0, 5, 0, 256]
    assert clips.rows(indices).equals(local.rows(indices))
    row = len(local.rows([7])["mean"][0].as_py()) * 2 + len(local.rows([7])["text"][0].as_py())
    before = store.bytes
    clips.rows([100])
    assert row < store.bytes - before < 2.2 * row, "the footer is known: the clip and its neighbour in the row group"
    assert list(clips.captions()) == list(local.captions())
    shares = Shares(TrainingSet.of("s3://bucket/clips"), 1, 0, np.array([[3, 270]]))
    (block,) = rows(SimpleNamespace(iter_batches=lambda **_: [*shares()]))
    assert Share.of(block, 0, 0).prompts == [list(local.captions())[i] for i in (3, 270)]


def test_a_store_that_fails_once_is_asked_again_and_one_that_fails_on_is_no_damage(
    encoded: Encoded, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store()
    monkeypatch.setattr("rlvid.data.clips.locate", lambda place, under: (store, str(encoded[0])))
    shares = Shares(TrainingSet.of("s3://bucket/once"), 1, 0, np.array([[0, 1], [270, 2]]))()
    store.failures = 1
    (first,) = rows(SimpleNamespace(iter_batches=lambda **_: [next(shares)]))
    assert Share.of(first, 0, 0).fault is None
    store.failures = 100
    with pytest.raises(OSError, match="connection reset"):
        next(shares)


def test_a_flipped_bit_within_a_clip_is_seen(encoded: Encoded, tmp_path: Path) -> None:
    folder = shutil.copytree(encoded[0], tmp_path / "clips")
    path = folder / "part-00000.parquet"
    mean, content = EncodedClips.open(folder).rows([6])["mean"][0].as_py(), bytearray(path.read_bytes())
    content[content.index(mean) + len(mean) // 2] ^= 1
    path.write_bytes(content)
    clips = EncodedClips.open(folder)
    assert clips.rows([0, 8])
    with pytest.raises(DamagedPart, match=r"clips/part-00000.parquet is damaged"):
        clips.rows([6])


@pytest.mark.parametrize(("waiting", "rests"), [(0, 1), (1, 0)])
def test_ray_datas_loop_rests_unless_a_worker_waits(waiting: int, rests: int, monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[float] = []
    monkeypatch.setattr(time, "sleep", taken.append)
    Pace().on_execution_step(SimpleNamespace(_output_node=(None, SimpleNamespace(num_waiting_consumers=waiting))))
    assert len(taken) == rests


def test_a_share_of_another_step_or_worker_is_refused(encoded: Encoded) -> None:
    """Ray Data documents no order, so each row says where it belongs."""
    shares = Shares(TrainingSet.of(encoded[0]), 2, 7, np.array([[3, 1, 3]]))
    first, second = rows(SimpleNamespace(iter_batches=lambda **_: [*shares()]))
    assert Share.of(first, 7, 0).serials == [21, 23]
    assert Share.of(second, 7, 1).serials == [22]
    assert Share.of(first, 7, 0).prompts == [*EncodedClips.open(encoded[0]).captions()][3:4] * 2
    for row, step, rank in ((first, 7, 1), (first, 8, 0), (None, 7, 0)):
        with pytest.raises(RuntimeError, match=f"worker {rank} expects its samples of step {step}, and Ray Data"):
            Share.of(row, step, rank)

"""The order of clips, and encoded folders; no Ray."""

import io
import itertools
import json
import os
import shutil
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from pyarrow import fs
from rich.console import Console

from rlvid.config import parse_config
from rlvid.config.model import ModelConfig, SamplingConfig
from rlvid.data import writing
from rlvid.data.batches import Shares
from rlvid.data.clips import SCHEMA, DamagedPart, EncodedClips, digest
from rlvid.data.encode import EncodeReport
from rlvid.data.encoders import encode_items
from rlvid.data.feed import Pace, rows
from rlvid.data.find import Skipped
from rlvid.data.listing import write_prompts
from rlvid.data.order import clip_indices
from rlvid.data.prompts import resolve_prompts
from rlvid.data.run_prompts import prompts_of_samples
from rlvid.data.shares import Share, tensors
from rlvid.data.sources import (
    BaseSampler,
    read_rendered,
    rendered_clip,
    samples_made_with,
    training_set,
)
from rlvid.data.training_set import TrainingSet
from rlvid.data.videos import VideoError
from rlvid.data.writing import ClipWriter, is_reusable
from rlvid.diffusion.chain import denoise
from rlvid.models.base import VideoModel
from rlvid.randomness import normal, permutation
from rlvid.storage import Mirror
from rlvid.toy.tiny import tiny_model
from rlvid.train.preflight import cut_captions, record_clips
from rlvid.world.captions import PROMPT_SETS, read_caption


def test_every_epoch_is_a_permutation_whatever_was_asked_before() -> None:
    serials = list(range(35))
    forward = clip_indices(serials, 7, seed=3).tolist()
    assert forward == [int(clip_indices([s], 7, seed=3)[0]) for s in serials]
    assert forward == clip_indices(serials[::-1], 7, seed=3)[::-1].tolist()
    assert forward[:7] == permutation(7, 3, "order", 0).tolist()
    assert clip_indices([], 7, seed=3).tolist() == [], "a finished run has no step left"
    epochs = [forward[i : i + 7] for i in range(0, 35, 7)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert len(set(map(tuple, epochs))) > 1
    assert forward != clip_indices(serials, 7, seed=4).tolist()
    for wrong in (([0], 0), ([3, -1], 7)):
        with pytest.raises(ValueError, match="and count at 1"):
            clip_indices(*wrong, seed=0)


def test_built_in_clips_belong_to_their_index() -> None:
    first = [rendered_clip(5, i, 4, 16) for i in range(40)]
    caption, frames_FCHW = rendered_clip(5, 7, 4, 16)
    assert caption == first[7][0]
    assert torch.equal(frames_FCHW, first[7][1])
    subjects = {read_caption(caption).subject for caption, _ in first}
    assert subjects == set(PROMPT_SETS["in_domain"])
    assert len({caption for caption, _ in first}) > 30


def write_folder(
    out: Path, tables: Iterable[pa.Table], made_with: dict, skipped: Iterable[Skipped] = (), **meta: str
) -> int:
    with ClipWriter(out, made_with) as writer:
        for table in tables:
            writer.add(table)
        return writer.finish({"fingerprint": digest(made_with), **meta}, list(skipped))


@pytest.fixture(scope="module")
def encoded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict, pa.Table]:
    """A folder in two parts: eight clips of a tiny model, over and over; every sixth of eight cannot be read."""
    model = tiny_model(frames=2, size=8)

    def read(item: dict, model: VideoModel) -> tuple[str, torch.Tensor]:
        if item["index"] == 5:
            raise VideoError("clip 5: is cut off")
        return read_rendered(0, item, model)

    eight = encode_items(model, [{"index": i, "source": f"clip {i}", "caption": ""} for i in range(8)], read)
    table = pa.concat_tables([eight] * 40).set_column(0, "index", pa.array(range(320)))
    made_with = {"size": 8, "weights": "abc"}
    out = tmp_path_factory.mktemp("encoded") / "clips"
    assert write_folder(out, [table.slice(0, 150), table.slice(150)], made_with, model_fingerprint="m") == 280
    return out, made_with, table


def test_encoded_clips_are_what_the_model_said(encoded: tuple[Path, dict, pa.Table]) -> None:
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


def test_plain_arrow_reads_encoded_clips_and_the_report_names_the_rest(encoded: tuple[Path, dict, pa.Table]) -> None:
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


def test_a_folder_is_reused_replaced_or_refused(encoded: tuple[Path, dict, pa.Table], tmp_path: Path) -> None:
    source, made_with, table = encoded
    out = tmp_path / "clips"
    assert not is_reusable(out, made_with)
    shutil.copytree(source, out)
    assert is_reusable(out, made_with)
    with pytest.raises(ValueError, match=r"size 8 there, 16 now.*delete it or name another folder"):
        is_reusable(out, {**made_with, "size": 16})
    (out / "meta.json").unlink()
    assert not is_reusable(out, made_with)
    assert write_folder(out, [table.slice(0, 3)], made_with) == 3
    assert len(EncodedClips.open(out)) == 3
    assert list(tmp_path.iterdir()) == [out]
    (out / "meta.json").unlink()
    (out / "thesis.doc").touch()
    with pytest.raises(ValueError, match=r"is no folder of encoded clips \(it has thesis.doc\)"):
        is_reusable(out, made_with)
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="cannot be written"):
        write_folder(tmp_path / "file" / "clips", [table], made_with)
    with pytest.raises(ValueError, match="none of the 1 clips can be read: clip 5: is cut off"):
        write_folder(tmp_path / "none", [table.slice(5, 1)], made_with)
    assert {path.name for path in tmp_path.iterdir()} == {"clips", "file"}


class Killed(BaseException):
    """What no code of ours catches."""


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_an_encoding_killed_at_any_write_goes_on_to_the_same_bytes(
    encoded: tuple[Path, dict, pa.Table], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, made_with, table = encoded
    monkeypatch.setattr(writing, "_ROWS_IN_PART", 5)
    batches = [table.slice(start, 3) for start in (0, 6, 3, 15, 12, 9)]  # in the order in which workers finish
    skipped = [Skipped(Path("notes.txt"), "not a video")]
    assert write_folder(tmp_path / "whole", [table.slice(0, 18)], made_with, skipped) == 16
    want = contents(tmp_path / "whole")
    assert {"part-00000.parquet", "part-00003.parquet", "report.json"} < want.keys()

    replace, writes = os.replace, [0, 0]  # so many are left before the kill; made in all

    def replace_or_die(*paths: Path) -> None:
        if writes[0] == 0:
            raise Killed
        writes[0], writes[1] = writes[0] - 1, writes[1] + 1
        replace(*paths)

    def run(out: Path) -> int:
        """Encodes what is left; how many clips that is."""
        with ClipWriter(out, made_with) as writer:
            left = [b.filter([i not in writer.done for i in b["index"].to_pylist()]) for b in batches]
            for batch in left:
                writer.add(batch)
            writer.finish({"fingerprint": digest(made_with)}, skipped)
        return sum(batch.num_rows for batch in left)

    monkeypatch.setattr(writing.os, "replace", replace_or_die)
    kills = 0
    while True:
        out = tmp_path / f"killed-{kills}"
        writes[:] = [kills, 0]
        try:
            run(out)
            break
        except Killed:
            kept = {i for p in (tmp_path / f"{out.name}.unfinished").glob("*-*") for i in indices_in(p)}
            writes[0] = 10**6
            assert run(out) == 18 - len(kept)  # nothing twice
            assert contents(out) == want
            assert not out.with_name(f"{out.name}.unfinished").exists()
        kills += 1
    assert contents(out) == want
    assert kills > 12  # plan, six batches, two of them with errors, four parts, meta.json


def indices_in(path: Path) -> list[int]:
    if path.suffix == ".tmp":
        return []
    rows = json.loads(path.read_text()) if path.suffix == ".json" else pq.ParquetFile(path).read().to_pylist()
    return [row["index"] for row in rows]


def test_an_unfinished_encoding_takes_the_same_clips_only(encoded: tuple[Path, dict, pa.Table], tmp_path: Path) -> None:
    _, made_with, table = encoded
    out, work = tmp_path / "clips", tmp_path / "clips.unfinished"
    with ClipWriter(out, made_with) as writer:
        writer.add(table.slice(0, 8))
        with pytest.raises(ValueError, match=r"clips: another process .* is encoding into it"):
            ClipWriter(out, made_with)
    assert not out.exists()
    with pytest.raises(ValueError, match=r"clips.unfinished: holds an unfinished encoding .*\(size 8 there, 16 now\)"):
        ClipWriter(out, {**made_with, "size": 16})
    with ClipWriter(out, made_with) as writer:
        assert writer.done == set(range(8))
    rows = work / "rows-000000000.parquet"
    rows.write_bytes(rows.read_bytes()[:-50])
    with pytest.raises(ValueError, match=r"rows-000000000.parquet is damaged .*delete .*clips.unfinished"):
        ClipWriter(out, made_with)
    rows.unlink()
    for name, content in {
        "skipped-000000000.json": '[{"index": "first"}]', "skipped-000000008.json": "", "plan.json": "[]",
    }.items():  # fmt: skip
        (work / name).write_text(content)
        with pytest.raises(ValueError, match=rf"{name} is damaged .*delete .*clips.unfinished") as error:
            ClipWriter(out, made_with)
        assert "\n" not in str(error.value)
        (work / name).unlink()
        (work / "plan.json").write_text(json.dumps(made_with))
    (work / "plan.json").unlink()
    (work / "rows-000000000.parquet").touch()
    with pytest.raises(ValueError, match=r"clips\.unfinished: is in the way"):
        ClipWriter(out, made_with)


@pytest.mark.parametrize("content", ["", "[]", '{"clips": 2}', '{"clips": 2, "skipped": [{"path": 3}]}'])
def test_a_damaged_report_of_clips_is_named(content: str, tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text(content)
    with pytest.raises(ValueError, match=r"report\.json is damaged .*encode again") as error:
        writing.read_report(tmp_path)
    assert "\n" not in str(error.value)


def test_a_report_of_clips_holds_a_name_that_is_not_utf8(tmp_path: Path) -> None:
    skipped = [Skipped(Path("a\udcff.mp4"), "its name is not UTF-8")]
    writing._write_report(tmp_path, 5, skipped, [])
    assert writing.read_report(tmp_path) == (5, skipped)


def test_the_base_models_samples_belong_to_their_index() -> None:
    model, sampling = tiny_model(), SamplingConfig(steps=3)
    read = BaseSampler(7, sampling)
    prompts = ["a dog", "a red star", "a dog"]
    items = [{"index": i, "source": f"sample {i}", "caption": prompt} for i, prompt in enumerate(prompts)]
    table = encode_items(model, items, read)
    assert table["caption"].to_pylist() == prompts
    assert table["error"].null_count == 3
    got = torch.stack([torch.frombuffer(bytearray(m), dtype=torch.float32) for m in table["mean"].to_pylist()])
    noise = normal(model.latent_shape, 7, "base-sample", [(i,) for i in range(3)])
    text = model.encode_prompts(prompts)
    want = denoise(model, noise, text, model.path.grid(3), guidance=sampling.guidance)
    torch.testing.assert_close(got, want.flatten(1), atol=1e-5, rtol=1e-5)
    assert (got[0] - got[2]).abs().max() > 0.1  # one prompt, two samples
    assert not any(std.strip(b"\0") for std in table["std"].to_pylist())
    alone = encode_items(model, items[2:], read)
    assert alone["mean"][0] == table["mean"][2]


def test_a_sample_that_is_not_finite_is_left_out_and_named() -> None:
    model = tiny_model()
    torch.nn.init.constant_(model.denoiser.conv_out.weight, torch.inf)
    items = [{"index": 0, "source": "sample 0/0", "caption": "a dog"}]
    table = encode_items(model, items, BaseSampler(0, SamplingConfig(steps=2)))
    assert "sample 0/0: the model's latents are not finite" in table["error"][0].as_py()


def test_prompts_of_samples_go_round(tmp_path: Path) -> None:
    path = tmp_path / "p.txt"
    path.write_text("a\nb\nc\n")
    data = {"source": "samples", "count": 5}
    assert prompts_of_samples(parse_config({"data": data | {"prompts": str(path)}})) == [
        "a",
        "b",
        "c",
        "a",
        "b",
    ]
    drawn = prompts_of_samples(parse_config({"data": data}))
    assert drawn == resolve_prompts("in_domain", 5, 0)
    assert drawn != prompts_of_samples(parse_config({"data": data, "seed": 1}))
    assert len(set(prompts_of_samples(parse_config({"data": data | {"prompts": "scenes"}})))) == 5
    with pytest.raises(ValueError, match="'in_domains' is neither a file of prompts nor a built-in set"):
        prompts_of_samples(parse_config({"data": data | {"prompts": "in_domains"}}))
    config = parse_config({"data": data})
    kept = samples_made_with(drawn, 0, config.sampling, config.model)
    for changed in (
        samples_made_with(drawn[::-1], 0, config.sampling, config.model),
        samples_made_with(drawn, 1, config.sampling, config.model),
        samples_made_with(drawn, 0, SamplingConfig(guidance=1), config.model),
    ):
        assert digest(changed) != digest(kept)


def test_a_run_goes_on_with_its_own_clips_only(encoded: tuple[Path, dict, pa.Table], tmp_path: Path) -> None:
    clips, made_with, table = encoded
    run, others = tmp_path / "run", tmp_path / "others"
    write_folder(others, [table.slice(0, 3)], {**made_with, "prompts": "edited"})
    run.mkdir()
    record_clips(run, TrainingSet.of(others))
    record_clips(run, TrainingSet.of(clips))  # nothing has been trained yet
    (run / "archive").mkdir()
    record_clips(run, TrainingSet.of(clips))
    began = (
        r"run 'run' began with other clips than those in .*others now are \(then: fingerprint \w+, number 280; now: "
    )
    with pytest.raises(ValueError, match=began + r"fingerprint \w+, number 3\)"):
        record_clips(run, TrainingSet.of(others))


def test_captions_and_other_prompts_that_are_cut_are_counted(
    encoded: tuple[Path, dict, pa.Table], tmp_path: Path
) -> None:
    clips = encoded[0]
    (tmp_path / "p.csv").write_text("prompt\n" + "".join(f"{'wall ' * count}\n" for count in (1, 2, 30, 40)))
    guard = {"every": 20, "prompts": str(tmp_path / "p.csv")}
    (line,) = cut_captions(parse_config({"guard": guard, "output": {"checkpoint_every": 20}}), TrainingSet.of(clips))
    assert line.startswith("2 of 4 different guard.prompts are longer than 24 tokens")
    sampling = {"negative_prompt": "wall " * 30}
    (line,) = cut_captions(parse_config({"sampling": sampling}), TrainingSet.of(clips))
    assert line.startswith("1 of 1 different negative prompts are longer than 24 tokens")
    assert "this is the limit of the model's text encoder; for example 'wall wall" in line
    assert cut_captions(parse_config({"sampling": sampling | {"guidance": 1}}), TrainingSet.of(clips)) == []
    assert cut_captions(parse_config({}), TrainingSet.of(clips)) == []


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
    encoded: tuple[Path, dict, pa.Table],
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


def test_a_clip_that_cannot_be_read_keeps_its_place(encoded: tuple[Path, dict, pa.Table], tmp_path: Path) -> None:
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


def test_storage_that_fails_is_no_damage_of_a_clip(encoded: tuple[Path, dict, pa.Table], tmp_path: Path) -> None:
    folder = shutil.copytree(encoded[0], tmp_path / "clips")
    read = Shares(TrainingSet.of(folder), 1, 0, np.array([[0, 1], [270, 2]]))()
    next(read)
    (folder / "part-00001.parquet").unlink()
    with pytest.raises(OSError, match="part-00001"):
        next(read)


READ = partial(read_rendered, 0)


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


def test_clips_in_an_object_store_are_read_where_they_lie(
    encoded: tuple[Path, dict, pa.Table], monkeypatch: pytest.MonkeyPatch
) -> None:
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
    encoded: tuple[Path, dict, pa.Table], monkeypatch: pytest.MonkeyPatch
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


def test_a_flipped_bit_within_a_clip_is_seen(encoded: tuple[Path, dict, pa.Table], tmp_path: Path) -> None:
    folder = shutil.copytree(encoded[0], tmp_path / "clips")
    path = folder / "part-00000.parquet"
    mean, content = EncodedClips.open(folder).rows([6])["mean"][0].as_py(), bytearray(path.read_bytes())
    content[content.index(mean) + len(mean) // 2] ^= 1
    path.write_bytes(content)
    clips = EncodedClips.open(folder)
    assert clips.rows([0, 8])
    with pytest.raises(DamagedPart, match=r"clips/part-00000.parquet is damaged"):
        clips.rows([6])


def test_a_folder_of_prompts_is_read_like_clips_and_a_changed_file_is_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = [f"prompt {i}" for i in range(70_000)]  # two parts
    write_prompts(prompts, tmp_path / "prompts")
    found = EncodedClips.open(tmp_path / "prompts")
    assert len(found) == 70_000
    assert found.rows([69_999, 0, 65_536]).to_pydict() == {"caption": ["prompt 69999", "prompt 0", "prompt 65536"]}
    assert TrainingSet.of(tmp_path / "prompts").first_captions(2) == ("prompt 0", "prompt 1")
    shares = Shares(TrainingSet.of(tmp_path / "prompts"), 1, 0, np.array([[5, 7]]))
    share = Share.of(next(rows(SimpleNamespace(iter_batches=lambda **_: [*shares()]))), 0, 0)
    assert (share.prompts, share.text_BLD, share.posterior) == (["prompt 5", "prompt 7"], None, None)

    path, data = tmp_path / "own.txt", {"source": "prompts", "count": 5, "prompts": str(tmp_path / "own.txt")}
    path.write_text("a\nb\nc\n")
    run = parse_config({"method": "ddpo", "data": data, "output": {"storage": str(tmp_path / "runs")}})
    kept, console = tmp_path / "runs" / "run", Console(file=io.StringIO())
    (kept / "archive").mkdir(parents=True)
    folder = training_set(run, console)
    record_clips(kept, folder)
    assert [*folder.captions()] == ["a", "b", "c"], "each once, whatever data.count is"
    assert folder.fingerprint == digest({"prompts": ["a", "b", "c"]}), "as earlier versions computed it"
    with monkeypatch.context() as patch:
        patch.setattr("rlvid.data.run_prompts.iter_prompts", lambda path: pytest.fail("an unchanged file is read"))
        assert training_set(run, console) == folder
    path.write_text("a\nb\n")
    assert list(folder.captions()) == ["a", "b", "c"], "a run reads its own copy"
    with pytest.raises(ValueError, match=r"began with other prompts than data.prompts gives now"):
        record_clips(kept, training_set(run, console))


def test_prompts_of_a_run_in_a_store_are_read_from_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own.txt").write_text("a\nb\nc\n")
    (tmp_path / "store").mkdir()
    data, output = {"source": "prompts", "prompts": str(tmp_path / "own.txt")}, {"storage": f"file://{tmp_path}/store"}
    run, console = parse_config({"method": "ddpo", "data": data, "output": output}), Console(file=io.StringIO())
    monkeypatch.setenv("RLVID_CACHE", str(tmp_path / "one"))
    place = training_set(run, console)
    assert place.places.startswith(f"file://{tmp_path}/store/clips/prompts-")
    monkeypatch.setenv("RLVID_CACHE", str(tmp_path / "another"))
    assert training_set(run, console) == place
    assert not list((tmp_path / "another").rglob("part-*")), "another machine copies nothing"
    assert list(place.captions()) == ["a", "b", "c"]
    shutil.rmtree(tmp_path / "store" / "clips")
    monkeypatch.setenv("RLVID_CACHE", str(tmp_path / "one"))
    assert training_set(run, console) == place
    assert list(place.captions()) == ["a", "b", "c"], "what the store lost is sent again"


def test_clips_whose_way_to_the_store_was_cut_off_are_sent_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The driver is killed while it sends; the same machine and then another one start again."""
    store = tmp_path / "store"
    store.mkdir()
    run, console = parse_config({"output": {"storage": f"file://{store}"}}), Console(file=io.StringIO())
    made, sent = [], Mirror._upload

    def make(count: int, seed: int, model: ModelConfig, out: Path) -> EncodeReport:
        encoded = 0
        if not is_reusable(out, {"of": "the test"}):
            table = encode_items(tiny_model(frames=2, size=8), [{"index": 0, "source": "0", "caption": ""}], READ)
            encoded = write_folder(out, [table], {"of": "the test"})
            made.append(out)
        return EncodeReport(out, 1, encoded, [], "", 0.0, [])

    def cut_off(self: Mirror, name: str) -> None:
        if name == "report.txt":
            raise ConnectionError("killed")
        sent(self, name)

    monkeypatch.setattr("rlvid.data.sources.encode_builtin", make)
    monkeypatch.setattr("rlvid.data.sources.model_fingerprint", lambda model: "0" * 16)
    monkeypatch.setenv("RLVID_CACHE", str(tmp_path / "one"))
    with monkeypatch.context() as patch:
        patch.setattr(Mirror, "_upload", cut_off)
        with pytest.raises(ConnectionError):
            training_set(run, console)
    assert list(store.rglob("part-*"))
    assert not list(store.rglob("meta.json")), "it would say that the clips are complete"
    place = training_set(run, console)
    assert place.count == 1
    assert len(made) == 1, "they are encoded once"
    monkeypatch.setenv("RLVID_CACHE", str(tmp_path / "another"))
    assert training_set(run, console) == place
    assert len(made) == 1
    assert not list((tmp_path / "another").rglob("part-*")), "another machine copies nothing"


@pytest.mark.parametrize(("waiting", "rests"), [(0, 1), (1, 0)])
def test_ray_datas_loop_rests_unless_a_worker_waits(waiting: int, rests: int, monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[float] = []
    monkeypatch.setattr(time, "sleep", taken.append)
    Pace().on_execution_step(SimpleNamespace(_output_node=(None, SimpleNamespace(num_waiting_consumers=waiting))))
    assert len(taken) == rests


def test_a_share_of_another_step_or_worker_is_refused(encoded: tuple[Path, dict, pa.Table]) -> None:
    """Ray Data documents no order, so each row says where it belongs."""
    shares = Shares(TrainingSet.of(encoded[0]), 2, 7, np.array([[3, 1, 3]]))
    first, second = rows(SimpleNamespace(iter_batches=lambda **_: [*shares()]))
    assert Share.of(first, 7, 0).serials == [21, 23]
    assert Share.of(second, 7, 1).serials == [22]
    assert Share.of(first, 7, 0).prompts == [*EncodedClips.open(encoded[0]).captions()][3:4] * 2
    for row, step, rank in ((first, 7, 1), (first, 8, 0), (None, 7, 0)):
        with pytest.raises(RuntimeError, match=f"worker {rank} expects its samples of step {step}, and Ray Data"):
            Share.of(row, step, rank)

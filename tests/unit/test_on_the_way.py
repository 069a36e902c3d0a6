"""Videos as a source: their list, the actor that encodes them, and its cache; without Ray."""

import io
import shutil
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from rich.console import Console

from jobs.benchmark.workers import measure_in_workers
from rlvid.cluster import nodes
from rlvid.config import RunConfig, parse_config
from rlvid.config.model import ModelConfig
from rlvid.data.batches import Shares
from rlvid.data.clips import CLIP
from rlvid.data.embeddings import StoredEmbedder, embedder_of, kept_embeddings, kept_texts, read_prompt
from rlvid.data.encode import EncodeReport, exact_model
from rlvid.data.encoders import encode_items
from rlvid.data.encoding import Encoding
from rlvid.data.feed import NAME
from rlvid.data.on_the_way import ClipCache, ShareEncoder
from rlvid.data.shares import Share
from rlvid.data.sources import rendered_clip, training_set
from rlvid.data.training_set import TrainingSet
from rlvid.data.video_set import check_videos, is_videos, listed_videos
from rlvid.data.writing import ClipWriter
from rlvid.models.folders import builtin_folder
from rlvid.models.load import load_video_model
from rlvid.models.unet3d import load_model
from rlvid.plots.video import write_mp4
from rlvid.toy.tiny import save_tiny_model
from rlvid.train.feeding import RunFeed, _encoding
from rlvid.train.job import Job
from rlvid.train.launch import _trainer
from rlvid.train.preflight import check

QUIET = Console(file=io.StringIO())
SHAPE: dict[str, Any] = {"frames": 2, "size": 16}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model; a folder of three videos, of which the second is damaged, and a file that is none."""
    folder = tmp_path_factory.mktemp("on-the-way")
    save_tiny_model(folder / "tiny")
    (folder / "in").mkdir()
    for index, name in enumerate("abc"):
        write_mp4(folder / "in" / f"{name}.mp4", rendered_clip(0, index, 8, 32)[1], 8)
        (folder / "in" / f"{name}.txt").write_text(f"this is {name}")
    (folder / "in" / "b.mp4").write_bytes((folder / "in" / "b.mp4").read_bytes()[:300])
    (folder / "in" / "notes.md").write_text("no video")
    return folder


def run_of(home: Path, out: Path, **data: Any) -> RunConfig:
    model = {"path": str(home / "tiny"), **SHAPE}
    return parse_config({"model": model, "data": data, "output": {"storage": str(out)}, "reward": {"segments": 2}})


def blocks(clips: TrainingSet, positions: list[list[int]]) -> list[pa.Table]:
    return list(Shares(clips, 1, 0, np.array(positions))())


def shares_of(tables: list[pa.Table]) -> list[Share]:
    return [Share.of(row, row["step"], 0) for table in tables for row in table.to_pylist()]


def test_a_folder_of_videos_is_listed_once_and_encoded_as_encode_does(home: Path, tmp_path: Path) -> None:
    said = Console(file=io.StringIO(), width=400)
    run = run_of(home, tmp_path, source=str(home / "in"))
    check(run)
    clips = training_set(run, said)
    assert (clips.kinds, clips.count) == ({"videos"}, 3)
    assert "notes.md: not a video" in said.file.getvalue()
    assert training_set(run, QUIET) == clips
    assert [*clips.captions()] == ["this is a", "this is b", "this is c"]

    how = Encoding(exact_model(run.model), 1, 0, 1, str(tmp_path), "clips/cache")
    first, second = shares_of([ShareEncoder(how)(block) for block in blocks(clips, [[0, 2, 0, 1], [2, 2, 1, 0]])])
    assert (first.lost, second.lost) == ({3}, {6}), "the damaged video keeps its place"
    assert "b.mp4" in (first.fault or "")
    assert first.prompts == ["this is a", "this is c", "this is a", "this is b"]
    model = load_model(str(home / "tiny"), **SHAPE, precision="float32", device="cpu")
    for place, name in enumerate("aca"):
        item = {"index": 0, "source": str(home / "in" / f"{name}.mp4"), "caption": f"this is {name}"}
        (expected,) = encode_items(model, [item]).to_pylist()
        assert first.posterior is not None
        assert first.text_BLD is not None
        assert first.posterior.mean[place].numpy().tobytes() == expected["mean"]
        assert first.posterior.std[place].numpy().tobytes() == expected["std"]
        assert first.text_BLD[place].numpy().tobytes() == expected["text"]
    assert not first.posterior.mean[3].any()
    assert len(list((tmp_path / "clips" / "cache-cpu").rglob("*.arrow"))) == 2, "what is damaged is not kept"


def test_what_is_in_the_cache_or_was_just_encoded_is_not_encoded_again(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clips = training_set(run_of(home, tmp_path, source=str(home / "in")), QUIET)
    how = Encoding(exact_model(ModelConfig(path=str(home / "tiny"), **SHAPE)), 1, 0, 1, str(tmp_path), "clips/cache")
    calls = list[str]()

    def counted(model: Any, items: list[dict[str, Any]], *others: Any) -> pa.Table:
        calls.extend(item["source"] for item in items)
        return encode_items(model, items, *others)

    monkeypatch.setattr("rlvid.data.encoders.encode_items", counted)
    block, again = blocks(clips, [[0, 2, 0, 2]]), blocks(clips, [[2, 0, 0, 2]])
    encoder = ShareEncoder(how)
    expected = encoder(block[0])
    assert len(calls) == 2
    encoder(again[0])
    assert len(calls) == 2
    assert ShareEncoder(how)(block[0]).equals(expected)
    assert len(calls) == 2, "another process reads the cache"
    kept = sorted((tmp_path / "clips" / "cache-cpu").rglob("*.arrow"))
    kept[0].write_bytes(kept[0].read_bytes()[:100])
    kept[1].write_bytes(b"")
    assert ShareEncoder(how)(block[0]).equals(expected)
    assert len(calls) == 4, "damaged files are written anew"
    assert ShareEncoder(how)(block[0]).equals(expected)
    assert len(calls) == 4

    (tmp_path / "file").write_text("in the way")
    broken = Encoding(how.model, 1, 0, 1, str(tmp_path / "file"), "cache")
    (share,) = shares_of([ShareEncoder(broken)(block[0])])
    assert share.posterior is not None, "a cache that cannot be written ends nothing"
    assert "encoded videos are not kept any more" in (share.note or "")


def test_clips_beside_videos_come_as_they_are(home: Path, tmp_path: Path) -> None:
    run = run_of(home, tmp_path, source=str(home / "in"))
    how = Encoding(exact_model(run.model), 1, 0, 1, None, "")
    encoder = ShareEncoder(how)  # sets the number of threads, on which the last bits depend
    model = load_model(str(home / "tiny"), **SHAPE, precision="float32", device="cpu")
    item = {"index": 0, "source": str(home / "in" / "c.mp4"), "caption": "encoded before"}
    with ClipWriter(tmp_path / "clips", {}) as writer:
        writer.add(encode_items(model, [item]))
        writer.finish({"fingerprint": "0" * 16}, [])
    videos = TrainingSet.of(listed_videos(str(home / "in"), run, QUIET))
    mixed = TrainingSet((*TrainingSet.of(tmp_path / "clips").sources, *videos.sources))
    (share,) = shares_of([encoder(block) for block in blocks(mixed, [[3, 0]])])
    assert share.prompts == ["this is c", "encoded before"]
    assert share.posterior is not None
    assert torch.equal(share.posterior.mean[0], share.posterior.mean[1]), "the same video both ways"
    whole = ShareEncoder(how)(blocks(TrainingSet.of(tmp_path / "clips"), [[0, 0]])[0])
    assert Share.of(whole.to_pylist()[0], 0, 0).posterior is not None
    with pa.ipc.open_stream(whole["clips"][0].as_py()) as stream:
        assert stream.read_all().column_names == list(CLIP)


def embed(embedded: list[str], prompts: list[str], model: ModelConfig, out: Path, **_: Any) -> EncodeReport:
    """Does what ``encode_prompts`` does, without Ray, and takes note of the prompts."""
    embedded.extend(prompts)
    items = [{"index": i, "source": "", "caption": prompt} for i, prompt in enumerate(prompts)]
    with ClipWriter(out, {}) as writer:
        writer.add(encode_items(load_video_model(model, denoiser=False), items, read_prompt))
        writer.finish({"fingerprint": "0" * 16}, [])
    return EncodeReport(out, len(prompts), len(prompts), [], "0" * 16, 0.0, [])


def large_run(folder: Path, size: int = 32, **train: Any) -> RunConfig:
    """A run whose model counts as a large one: a copy of the built-in Wan model."""
    shutil.copytree(builtin_folder("builtin-wan"), folder / "wan", dirs_exist_ok=True)
    model, output = {"path": str(folder / "wan"), "frames": 5, "size": size}, {"storage": str(folder / "runs")}
    return parse_config({"model": model, "output": output, "train": {"use_gpu": False} | train})


@pytest.mark.parametrize("store", [False, True], ids=["folder", "store"])
def test_a_caption_is_embedded_once_for_all_runs_of_a_text_encoder(
    store: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, embedded = large_run(tmp_path), list[str]()
    other = large_run(tmp_path, size=16)
    if store:
        monkeypatch.setenv("RLVID_CACHE", str(tmp_path / "cache"))
        place = run.output.model_copy(update={"storage": (tmp_path / "store").as_uri()})
        run, other = (each.model_copy(update={"output": place}) for each in (run, other))
    monkeypatch.setattr("rlvid.data.embeddings.encode_prompts", partial(embed, embedded))
    first = kept_texts(run, ["", "a cat", "a dog"], QUIET)
    assert kept_texts(other, ["a dog", "a bird", "a bird", ""], QUIET) == first
    assert kept_texts(run, ["a bird", "a cat"], QUIET) == first
    assert embedded == ["", "a cat", "a dog", "a bird"]
    assert first is not None
    prompts = ["a bird", "a cat", "a cat", ""]
    expected = torch.cat([load_video_model(run.model, denoiser=False).encode_prompts([each]) for each in prompts])
    known = embedder_of(run.model.path, first)
    assert isinstance(known, StoredEmbedder)
    assert torch.equal(known.embed(prompts), expected)
    with pytest.raises(ValueError, match="no embedding of the prompt 'a fish'"):
        known.embed(["a fish"])


def test_what_another_device_embedded_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    embedded = list[str]()
    monkeypatch.setattr("rlvid.data.embeddings.encode_prompts", partial(embed, embedded))
    runs = [large_run(tmp_path, use_gpu=use_gpu) for use_gpu in (False, True)]
    texts = [kept_texts(run, ["a cat"], QUIET) for run in runs]
    assert embedded == ["a cat", "a cat"]
    assert texts[0] != texts[1]
    clips = {_encoding(runs[0], tmp_path / "runs" / "run", place).kept_in for place in (None, *texts)}
    assert len(clips) == 3, "encoded clips hold embeddings, too"


def test_a_benchmark_gives_its_workers_and_encoders_the_embeddings_as_training_does(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, embedded, jobs = large_run(tmp_path, workers=1, batch_size=2), list[str](), list[Job]()
    run = run.model_copy(update={"data": run.data.model_copy(update={"source": str(home / "in")})})
    given = dict[str, Any]()

    def trainer(measure: partial[None], **arguments: Any) -> SimpleNamespace:
        given.update(arguments)
        return SimpleNamespace(fit=measure)

    def measure(job: Job, how: dict[str, Any]) -> None:
        jobs.append(job)
        how["result"].write_text("{}")

    for name in ("cluster.connect.start_ray", "cluster.nodes.check_resources", "train.archivist.start_archivist"):
        monkeypatch.setattr(f"rlvid.{name}", lambda *_: None)
    monkeypatch.setattr("rlvid.train.progress.ProgressActor", SimpleNamespace(remote=lambda: None))
    monkeypatch.setattr("ray.train.torch.TorchTrainer", trainer)
    monkeypatch.setattr("rlvid.data.embeddings.encode_prompts", partial(embed, embedded))
    measure_in_workers(measure, run, steps=2)
    assert embedded == ["", "this is a", "this is b", "this is c"]
    assert (jobs[0].encodes, jobs[0].texts is None) == (True, False)
    assert given["datasets"][NAME].encoding.texts == jobs[0].texts


def test_a_large_text_encoder_is_not_loaded_beside_training(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A copy of the built-in Wan model counts as a large one."""
    shutil.copytree(builtin_folder("builtin-wan"), tmp_path / "wan")
    data, output = {"source": str(home / "in"), "cache": False}, {"storage": str(tmp_path / "runs")}
    model, train = (
        {"path": str(tmp_path / "wan"), "frames": 5},
        {"steps": 2, "batch_size": 2, "workers": 1, "use_gpu": False},
    )
    run = parse_config({"model": model, "data": data, "output": output, "train": train})
    videos, embedded = training_set(run, QUIET), list[str]()
    before = {"index": 0, "source": str(home / "in" / "c.mp4"), "caption": "encoded before"}
    with ClipWriter(tmp_path / "clips", {}) as writer:
        writer.add(encode_items(load_model(str(home / "tiny"), **SHAPE, precision="float32", device="cpu"), [before]))
        writer.finish({"fingerprint": "0" * 16}, [])
    mixed = TrainingSet((*TrainingSet.of(tmp_path / "clips").sources, *videos.sources))

    def encoding(texts: str | None) -> Encoding:
        job = Job.of(run, run=tmp_path / "runs" / "wan", use_gpu=False, progress=None, encodes=True, texts=texts)
        given: Any = _trainer(job, mixed, wait=False)
        found = given["datasets"][NAME].encoding
        assert isinstance(found, Encoding)
        return found

    monkeypatch.setattr("ray.train.torch.TorchTrainer", lambda *_, **given: given)
    monkeypatch.setattr("rlvid.data.embeddings.encode_prompts", partial(embed, embedded))
    (block,) = blocks(videos, [[0, 2, 1, 0]])
    expected = ShareEncoder(encoding(None))(block)  # sets the number of threads
    feed = RunFeed(run, mixed, tmp_path / "runs" / "wan")
    texts = kept_embeddings(run, mixed, ["shown"], feed.video_captions, QUIET)
    assert embedded == ["", "shown", "this is a", "this is b", "this is c"]
    one = run.train.model_copy(update={"steps": 1})
    few = RunFeed(run.model_copy(update={"train": one}), mixed, tmp_path).video_captions()
    assert set(few) < set(embedded), "a video that is not drawn costs nothing"
    monkeypatch.setattr("rlvid.models.wan_parts._stored_text", lambda *_: pytest.fail("the text encoder was loaded"))
    assert ShareEncoder(encoding(texts))(block).equals(expected)
    (share,) = shares_of([expected])
    assert share.lost == {2}, "the damaged video, whose caption is embedded too"


def test_a_video_that_changed_is_lost_and_not_kept_and_storage_that_fails_is_an_error(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(home / "in", tmp_path / "in")
    clips = training_set(run_of(home, tmp_path, source=str(tmp_path / "in")), QUIET)
    how = Encoding(exact_model(ModelConfig(path=str(home / "tiny"), **SHAPE)), 1, 0, 1, str(tmp_path), "clips/cache")
    (block,) = blocks(clips, [[0, 2]])
    shutil.copy(tmp_path / "in" / "c.mp4", tmp_path / "in" / "a.mp4")
    (share,) = shares_of([ShareEncoder(how)(block)])
    assert (share.lost, "a.mp4: has changed since the start of the run" in (share.fault or "")) == ({0}, True)
    assert len(list((tmp_path / "clips" / "cache-cpu").rglob("*.arrow"))) == 1
    (tmp_path / "in" / "a.mp4").unlink()
    (share,) = shares_of([ShareEncoder(how)(block)])
    assert (share.lost, "no such file" in (share.fault or "")) == ({0}, True)

    def fails(*_: Any) -> Any:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("rlvid.data.on_the_way.open", fails, raising=False)
    with pytest.raises(OSError, match="Input/output error"):
        ShareEncoder(how)(block)


def test_a_damaged_clip_beside_a_video_keeps_its_place(home: Path, tmp_path: Path) -> None:
    model = load_model(str(home / "tiny"), **SHAPE, precision="float32", device="cpu")
    items = [{"index": i, "source": str(home / "in" / "c.mp4"), "caption": f"clip {i}"} for i in range(4)]
    with ClipWriter(tmp_path / "clips", {}) as writer:
        writer.add(encode_items(model, items))
        writer.finish({"fingerprint": "0" * 16}, [])
    path = tmp_path / "clips" / "part-00000.parquet"
    columns = pq.read_metadata(path).row_group(0)
    (mean,) = (columns.column(i) for i in range(columns.num_columns) if columns.column(i).path_in_schema == "mean")
    content = bytearray(path.read_bytes())
    content[mean.data_page_offset + 100] ^= 1
    path.write_bytes(content)
    run = run_of(home, tmp_path, source=str(home / "in"))
    videos = TrainingSet.of(listed_videos(str(home / "in"), run, QUIET))
    mixed = TrainingSet((*TrainingSet.of(tmp_path / "clips").sources, *videos.sources))
    how = Encoding(exact_model(run.model), 1, 0, 1, None, "")
    (share,) = shares_of([ShareEncoder(how)(block) for block in blocks(mixed, [[1, 4, 2, 5]])])
    assert share.lost == {0, 3}, "the damaged clip and the damaged video"
    assert share.prompts[1:3] == ["this is a", "clip 2"]


def test_methods_that_start_from_noise_read_captions_of_videos_alone(home: Path, tmp_path: Path) -> None:
    run = run_of(home, tmp_path, source=str(home / "in"))
    noise = parse_config(run.model_dump(mode="json") | {"method": "ddpo"})
    assert training_set(noise, QUIET).kinds == {"prompts"}
    with pytest.raises(ValueError, match="this run encodes no videos on the way; leave it out"):
        check(parse_config(noise.model_dump(mode="json") | {"data": {"source": str(home / "in"), "encoder_gpus": 0.2}}))


def test_a_folder_that_moved_is_listed_at_its_new_place(home: Path, tmp_path: Path) -> None:
    shutil.copytree(home / "in", tmp_path / "one")
    before = training_set(run_of(home, tmp_path, source=str(tmp_path / "one")), QUIET)
    (tmp_path / "one").rename(tmp_path / "two")
    after = training_set(run_of(home, tmp_path, source=str(tmp_path / "two")), QUIET)
    assert after.fingerprint == before.fingerprint, "a run on it resumes"
    assert after.rows([0])["source"][0].as_py() == str(tmp_path / "two" / "a.mp4")


def test_sources_without_a_video_are_refused_before_a_start(home: Path, tmp_path: Path) -> None:
    assert is_videos(str(home / "in"))
    assert not is_videos("builtin")
    assert not is_videos(str(tmp_path / "nowhere"))
    assert not is_videos("s3://bucket/videos")
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "a.mp4").write_bytes(b"no video")
    (tmp_path / "bad" / "a.txt").write_text("a")
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad" / "meta.json").write_text('{"made": "by another tool"}')
    assert is_videos(str(tmp_path / "bad"))
    (tmp_path / "empty" / "meta.json").write_text('{"fingerprint": "0", "clips": 3}')
    assert not is_videos(str(tmp_path / "empty"))
    (tmp_path / "empty" / "meta.json").unlink()
    model = ModelConfig(path=str(home / "tiny"), **SHAPE)
    for name, said in (("bad", "none of the 1 videos that were tried .*a.mp4"), ("empty", "the folder is empty")):
        with pytest.raises(ValueError, match=said):
            check_videos(str(tmp_path / name), model)
    check_videos(str(home / "in"), model)


def test_a_cache_in_a_store_is_read_and_written(home: Path, tmp_path: Path) -> None:
    cache = ClipCache(f"file://{tmp_path}", "clips/cache")
    model = load_model(str(home / "tiny"), **SHAPE, precision="float32", device="cpu")
    clip = encode_items(model, [{"index": 0, "source": str(home / "in" / "a.mp4"), "caption": "a"}]).select(CLIP)
    assert cache.read("ab12") is None
    cache.write("ab12", clip)
    found = cache.read("ab12")
    assert found is not None
    assert found.to_pylist() == clip.to_pylist()


def test_a_damaged_file_of_the_cache_is_written_anew_wherever_the_damage_lies(home: Path, tmp_path: Path) -> None:
    cache = ClipCache(str(tmp_path), "cache")
    model = load_model(str(home / "tiny"), **SHAPE, precision="float32", device="cpu")
    item = {"index": 0, "source": str(home / "in" / "a.mp4"), "caption": "a"}
    clip = encode_items(model, [item]).select(CLIP)
    cache.write("ab12", clip)
    (path,) = (tmp_path / "cache").rglob("*.arrow")
    whole = path.read_bytes()
    places = range(0, len(whole), max(1, len(whole) // 97))
    flipped = [whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :] for place in places]
    for number, damaged in enumerate([*flipped, *(whole[:place] for place in places)]):
        path.write_bytes(damaged)
        assert cache.read("ab12") is None, f"damage {number}"
    cache.write("ab12", clip)
    found = cache.read("ab12")
    assert found is not None, "the cache is still used"
    assert found.equals(clip)


@pytest.mark.parametrize(
    ("workers", "data", "guard", "fault"),
    [
        (2, {"encoder_gpus": 0.2}, {}, None),
        (1, {"encoder_gpus": 0.7}, {}, None),
        (2, {"encoder_gpus": 0.2}, {"every": 50, "gpus": 0.2}, None),
        (2, {"encoder_gpus": 0.5}, {}, "data.encoder_gpus = 0.5 .*two workers could share one"),
        (2, {"encoder_gpus": 0.3}, {"every": 50, "gpus": 0.2}, "and guard.gpus = 0.2 .*two workers could share one"),
        (1, {"encoder_gpus": 0.6}, {"every": 50, "gpus": 0.4}, "leave the worker nothing"),
        (1, {"encoder_gpus": 0.2, "encoders": 2}, {}, "data.encoders = 2"),
    ],
)
def test_encoders_leave_each_worker_a_gpu_of_its_own(
    monkeypatch: pytest.MonkeyPatch, workers: int, data: dict[str, Any], guard: dict[str, Any], fault: str | None
) -> None:
    monkeypatch.setattr(nodes, "nodes_possible", lambda: [({"CPU": 4.0, "GPU": 4.0}, 1.0)])
    run = parse_config({"data": data, "guard": guard, "train": {"workers": workers, "use_gpu": True}})
    if fault is None:
        assert nodes.check_resources(run)
    else:
        with pytest.raises(ValueError, match=fault):
            nodes.check_resources(run)

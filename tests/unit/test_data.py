"""The order of clips, and how encoded folders come about; no Ray."""

import io
import json
import os
import shutil
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from encoded_clips import Encoded, encoded_folder, write_folder
from rich.console import Console

from rlvid.config import parse_config
from rlvid.config.model import ModelConfig, SamplingConfig
from rlvid.data import writing
from rlvid.data.batches import Shares
from rlvid.data.clips import EncodedClips, digest
from rlvid.data.encode import EncodeReport
from rlvid.data.encoders import encode_items
from rlvid.data.feed import rows
from rlvid.data.find import Skipped
from rlvid.data.listing import write_prompts
from rlvid.data.order import clip_indices
from rlvid.data.prompts import resolve_prompts
from rlvid.data.run_prompts import prompts_of_samples
from rlvid.data.shares import Share
from rlvid.data.sources import (
    BaseSampler,
    read_rendered,
    rendered_clip,
    samples_made_with,
    training_set,
)
from rlvid.data.training_set import TrainingSet
from rlvid.data.writing import ClipWriter, is_reusable
from rlvid.diffusion.chain import denoise
from rlvid.randomness import normal, permutation
from rlvid.storage import Mirror
from rlvid.toy.tiny import tiny_model
from rlvid.train.preflight import cut_captions, record_clips
from rlvid.world.captions import PROMPT_SETS, read_caption


@pytest.fixture(scope="module")
def encoded(tmp_path_factory: pytest.TempPathFactory) -> Encoded:
    return encoded_folder(tmp_path_factory.mktemp("encoded") / "clips")


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


def test_a_folder_is_reused_replaced_or_refused(encoded: Encoded, tmp_path: Path) -> None:
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
    encoded: Encoded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
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


def test_an_unfinished_encoding_takes_the_same_clips_only(encoded: Encoded, tmp_path: Path) -> None:
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


def test_a_run_goes_on_with_its_own_clips_only(encoded: Encoded, tmp_path: Path) -> None:
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


def test_captions_and_other_prompts_that_are_cut_are_counted(encoded: Encoded, tmp_path: Path) -> None:
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


READ = partial(read_rendered, 0)


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

"""A worker's loop in one process: Ray Train's part is played here, DeepSpeed and all else is the real one."""

import logging
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pyarrow.parquet as pq
import pytest
import ray
import ray.train
from runs import LocalShard, adapter, config, difference, plain_torch, tiny_state

from rlvid.config import RunConfig
from rlvid.data.clips import SCHEMA, EncodedClips, digest
from rlvid.data.encoders import encode_items
from rlvid.data.listing import write_prompts
from rlvid.data.sources import read_rendered
from rlvid.data.training_set import TrainingSet
from rlvid.data.writing import ClipWriter
from rlvid.models.unet3d import load_model
from rlvid.runs.checkpoints import step_of
from rlvid.toy.tiny import save_tiny_model
from rlvid.train.audit import starts, tensorboard_faults
from rlvid.train.begin import train_worker
from rlvid.train.job import Job
from rlvid.train.reporter import WorkerError

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("process_group")]

CHEAP = ("train.workers=1", "sampling.steps=2", "sampling.guidance=1", "reward.segments=1", "output.archive_every=0")
CHEAP += ("train.checkpoint_activations=false",)
SHORT = (*CHEAP, "method=draft", "method.gradient_steps=1", "train.batch_size=1", "train.steps=4")
SHORT += ("output.checkpoint_every=8",)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the tiny model and six encoded clips."""
    folder = tmp_path_factory.mktemp("loop")
    save_tiny_model(folder / "tiny")
    items = [{"index": i, "source": f"clip {i}", "caption": ""} for i in range(6)]
    model = load_model(str(folder / "tiny"), frames=4, size=16)
    with ClipWriter(folder / "clips", {}) as writer:
        writer.add(encode_items(model, items, lambda item, model: read_rendered(0, item, model)))
        writer.finish({"fingerprint": digest({})}, [])
    return folder


class Cluster:
    """What a worker sees of Ray: the run's folder keeps the checkpoints that it reports."""

    def __init__(self, patch: pytest.MonkeyPatch, home: Path) -> None:
        self.home, self.progress, self.patch = home, MagicMock(), patch
        self.reported: list[int] = []
        self.latest: Path | None = None
        self.ending: Callable[[], bool] = lambda: False
        self.leaving: list[list[str]] = []
        patch.setattr(ray, "get", lambda reference, timeout: self.ending())
        patch.setattr(ray.train, "report", self.report)
        alone = SimpleNamespace(get_world_rank=lambda: 0, get_world_size=lambda: 1)
        patch.setattr(ray.train, "get_context", lambda: alone)
        patch.setattr(
            ray.train, "get_checkpoint", lambda: self.latest and ray.train.Checkpoint.from_directory(str(self.latest))
        )
        patch.setattr(
            ray.train, "get_preemption_info", lambda: SimpleNamespace(preempted_node_ids=self.leaving.pop(0)), False
        )

    def report(self, metrics: dict[str, int], checkpoint: Any, checkpoint_dir_name: str) -> None:
        self.latest = shutil.copytree(checkpoint.path, self.run / checkpoint_dir_name)
        self.reported.append(metrics["step"])

    def train(self, settings: RunConfig, clips: str = "clips", **job: Any) -> dict[str, Any]:
        self.run = self.home / "runs" / settings.name
        self.run.mkdir(parents=True, exist_ok=True)
        first_step = (self.latest and step_of(self.latest.name)) or 0
        self.patch.setattr(
            ray.train,
            "get_dataset_shard",
            lambda _: LocalShard(settings, TrainingSet.of(self.home / clips), first_step=first_step),
        )
        return train_worker(Job.of(settings, run=self.run, use_gpu=False, progress=self.progress, **job))

    def told(self, name: str) -> list[float]:
        """A number of each step, from the worker's log."""
        log = (self.run / "logs" / "worker-00.log").read_text(encoding="utf-8")
        return [float(value) for value in re.findall(rf" {name}=(\S+)", log)]


@pytest.fixture
def cluster(home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    monkeypatch.setattr(sys, "stdout", sys.stdout)  # a worker's goes into its log
    root, before = logging.getLogger(), list(logging.getLogger().handlers)
    level = logging.getLogger("rlvid").level
    yield Cluster(monkeypatch, home)
    for handler in set(root.handlers) - set(before):
        root.removeHandler(handler)
        handler.close()
    logging.getLogger("rlvid").setLevel(level)
    logging.captureWarnings(False)


def test_a_run_takes_the_steps_of_plain_torch_and_resumes_to_the_same_bits(cluster: Cluster, home: Path) -> None:
    """Two optimiser steps a batch, each accumulated over micro-batches."""
    how = (*CHEAP, "method=raft", "method.inner_steps=2", "method.share=1", "optimizer.lr=1e-3", "train.steps=2")
    how += ("train.batch_size=2", "train.micro_batch=1", "output.checkpoint_every=1")
    run = config(home, "whole", *how)
    done = cluster.train(run)
    assert [done[name] for name in ("first_step", "skipped", "problem")] == [0, 0, None]
    assert cluster.reported == [1, 2]
    expected, norms = plain_torch(config(home, "plain", *how), TrainingSet.of(home / "clips"))
    whole = adapter(cluster.run, 2)
    assert difference(whole, expected) <= 1e-6
    assert difference(adapter(cluster.run, 1), expected) > 1e-4
    assert cluster.told("optimiser/gradient_norm") == pytest.approx(norms[1::2], rel=1e-4), "the last of each batch"
    assert [call.args[0]["step"] for call in cluster.progress.put.remote.call_args_list] == [1, 2]
    stages = [cluster.told(f"seconds/{name}") for name in ("step", "backward", "sync", "data")]
    assert all(len(each) == 2 and min(each) > 0 for each in stages)
    assert all(total >= sum(parts) for total, *parts in zip(*stages, strict=True))
    assert sum(stages[0]) <= done["seconds"], "no step takes longer than the whole"

    assert cluster.train(run)["first_step"] == 2, "a finished run is left as it is"
    assert cluster.reported == [1, 2]

    shutil.rmtree(cluster.run / "step-000002")
    cluster.latest = cluster.run / "step-000001"
    assert cluster.train(run)["first_step"] == 1
    assert cluster.reported == [1, 2, 2]
    assert difference(adapter(cluster.run, 2), whole) == 0

    file = cluster.run / "step-000002" / "adapter" / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\x01")
    cluster.progress.reset_mock()
    assert list(cluster.train(run)["damaged"]) == ["step-000002"]
    assert not cluster.progress.start.remote.called


def test_prompts_alone_train_a_method_that_starts_from_noise_as_clips_do(cluster: Cluster, home: Path) -> None:
    """Of the clips such a method reads the captions only; the worker embeds those of a run without clips."""
    write_prompts(list(EncodedClips.open(home / "clips").captions()), home / "prompts")
    how = (*CHEAP, "method=ddpo", "train.batch_size=2", "train.steps=2", "optimizer.lr=1e-3")
    cluster.train(config(home, "clips", *how))
    expected = adapter(cluster.run, 2)
    cluster.latest = None
    cluster.train(config(home, "prompts", *how, "data.source=prompts"), clips="prompts")
    assert difference(adapter(cluster.run, 2), expected) == 0
    assert difference(expected, tiny_state(home)) > 1e-4, "nothing was learned, so equality would prove nothing"


def test_a_damaged_clip_costs_its_samples_and_not_the_run(cluster: Cluster, home: Path) -> None:
    how = (*CHEAP, "method=instructvideo", "train.batch_size=3", "train.steps=2", "optimizer.lr=1e-3")
    folder = shutil.copytree(home / "clips", home / "damaged")
    about, content = pq.read_metadata(folder / "part-00000.parquet"), (folder / "part-00000.parquet").read_bytes()
    start = about.row_group(0).column(SCHEMA.names.index("std")).data_page_offset
    (folder / "part-00000.parquet").write_bytes(content[:start] + bytes(20) + content[start + 20 :])
    done = cluster.train(config(home, "damaged", *how), clips="damaged")
    assert done["problem"] is None
    assert cluster.reported == [2]
    assert sum(cluster.told("data/lost")) == about.row_group(0).num_rows
    lost = cluster.told("reward/excluded")
    share = about.row_group(0).num_rows / 3  # of the micro-batches of a step; an epoch has each clip once
    assert sum(lost) == pytest.approx(share, rel=1e-4)
    (line,) = [call.args[0] for call in cluster.progress.note.remote.call_args_list]
    assert "damaged/part-00000.parquet is damaged" in line
    assert line.endswith("get no reward")
    assert difference(adapter(cluster.run, 2), tiny_state(home)) > 1e-4, "the other clips are learned from"


def test_a_run_ends_early_with_a_checkpoint_when_it_is_asked_to(cluster: Cluster, home: Path) -> None:
    guarded = config(home, "guarded", *SHORT, "guard.every=8", "guard.stop=true")
    (home / "runs" / "guarded" / "guard").mkdir(parents=True)
    (home / "runs" / "guarded" / "guard" / "stop").touch()
    cluster.train(guarded)
    assert cluster.reported == [1]
    assert cluster.train(guarded, stop=True)["first_step"] == 1
    assert cluster.reported == [1], "the guard ended it before: not a step more"

    cluster.reported, cluster.latest = [], None
    cluster.train(config(home, "timed", *SHORT, "train.max_seconds=1e-6"))
    assert cluster.reported == [1]

    cluster.reported, cluster.latest, asked = [], None, iter([False, True])
    cluster.ending = lambda: next(asked)
    cluster.train(config(home, "interrupted", *SHORT))
    assert cluster.reported == [2]


def test_a_ceiling_that_the_driver_measured_caps_the_rewards(cluster: Cluster, home: Path) -> None:
    capped = config(home, "capped", *SHORT, "train.steps=2", "reward.ceiling=q0.5")
    cluster.train(capped, measured_ceiling=-1e6)
    assert cluster.told("reward/at_ceiling") == [1, 1]


def test_a_node_that_is_taken_away_costs_a_checkpoint_and_not_the_run(cluster: Cluster, home: Path) -> None:
    cluster.leaving = [[], ["a"], ["a"], ["a", "b"]]
    cluster.train(config(home, "moved", *SHORT), watched=True)
    assert cluster.reported == [2, 4]


@pytest.mark.slow
def test_a_run_in_a_store_resumes_with_each_step_once_and_its_whole_log(
    cluster: Cluster, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rlvid.storage.PART", 500)
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setenv("RLVID_CACHE", str(home / "cache"))
    store = home / "store" / "stored"
    stored = config(home, "stored", *SHORT, f"output.storage=file://{store.parent}", "output.checkpoint_every=1")
    report = cluster.report

    def copying(metrics: dict[str, int], checkpoint: Any, checkpoint_dir_name: str) -> None:
        report(metrics, checkpoint, checkpoint_dir_name)
        if metrics["step"] == 2:
            shutil.copytree(store, home / "killed")

    monkeypatch.setattr(ray.train, "report", copying)
    cluster.train(stored)
    monkeypatch.setattr(ray.train, "report", report)
    for step in (3, 4):
        shutil.rmtree(cluster.run / f"step-{step:06d}")
    cluster.latest = cluster.run / "step-000002"
    shutil.rmtree(store)
    (home / "killed").rename(store)
    assert cluster.train(stored)["first_step"] == 2
    assert tensorboard_faults(store / "tensorboard", 4) == []
    assert len(list((store / "tensorboard").iterdir())) > starts(store) == 2
    logs = sorted((store / "logs").iterdir())
    assert [path.name for path in logs] == ["worker-00.log", *(f"worker-00.log.{i:04d}" for i in range(1, len(logs)))]
    assert len(logs) > 3
    text = "".join(path.read_text() for path in logs)
    assert re.findall(r"rlvid\.train step (\d) ", text) == ["0", "1", "2", "3"]

    monkeypatch.setattr(ray.train, "report", lambda *_, **__: 1 / 0)
    cluster.latest = cluster.run / "step-000003"
    with pytest.raises(WorkerError, match="worker 0, step 3: "):
        cluster.train(stored)
    text = "".join(path.read_text() for path in sorted((store / "logs").iterdir()))
    assert text.count("this ends the worker\nTraceback") == 1


def test_a_run_of_non_finite_steps_ends_with_its_problem_and_without_a_checkpoint(
    cluster: Cluster, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rlvid.train.worker.MAX_SKIPPED", 1)
    lost = config(home, "lost", *SHORT, "optimizer.lr=1e30", "optimizer.clip_norm=0")
    done = cluster.train(lost)
    assert done["problem"].startswith("1 steps in a row had a non-finite loss or gradient")
    assert done["skipped"] == 1
    assert cluster.reported == []

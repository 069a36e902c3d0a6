"""The trust in training: workers and ZeRO stages change nothing; a continued run ends as one that is not."""

import logging
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from runs import QUIET, LocalShard, Trajectory, adapter, config, difference, plain_torch, tiny_state
from safetensors.torch import load_file

from rlvid.config import RunConfig
from rlvid.data.clips import EncodedClips
from rlvid.data.shares import tensors
from rlvid.data.sources import training_set
from rlvid.data.training_set import TrainingSet
from rlvid.doctor.cluster import check_cluster
from rlvid.evaluate.models import find_models
from rlvid.evaluate.work import Evaluation
from rlvid.evaluate.workers import run_evaluation
from rlvid.export.export import export_run
from rlvid.models.trained import trained_state
from rlvid.train import launch
from rlvid.train.audit import faults
from rlvid.train.job import Job
from rlvid.train.launch import train

log = logging.getLogger(__name__)


def trajectories(jobs: dict[str, Job], begun: list[Job], clips: dict[str, TrainingSet]) -> None:
    """Runs the product's worker loop for several jobs in the same processes; worker 0 writes the adapters.

    Runs that are begun here for others to continue leave a checkpoint each in Ray Train's storage.
    """
    import ray.train

    from rlvid.data.feed import own_rows
    from rlvid.train.begin import train_worker
    from rlvid.train.loop import run_step
    from rlvid.train.restore import temporary_folder
    from rlvid.train.worker import Worker

    def feed(job: Job) -> None:
        rank = ray.train.get_context().get_world_rank()
        ray.train.get_dataset_shard = lambda _: LocalShard(job.config, clips[job.config.name], rank)

    for job in jobs.values():
        feed(job)
        norms = []
        with temporary_folder(None, job.run) as temporary, Worker(job, temporary, own_rows()) as worker:
            for step in range(job.config.train.steps):
                updates, outcomes = run_step(worker, step)
                worker.record(step, updates, outcomes, 0.0)
                norms += [outcome.gradient_norm for outcome in outcomes]
            with worker.engine.gathered():
                state = trained_state(worker.network, job.config.model)
            if worker.rank == 0:
                torch.save((state, norms), f"{job.run}.pt")
    ray.train.get_checkpoint = lambda: None  # they would resume from one another's
    for job in begun:
        feed(job)
        train_worker(job)


def on_workers(folder: Path, workers: int, runs: dict[str, RunConfig], begun: list[RunConfig]) -> dict[str, Trajectory]:
    """What each run came to on so many Ray workers; those that are begun have one checkpoint, after their last step."""
    import ray.train
    from ray.train.torch import TorchTrainer

    from rlvid.train.archivist import start_archivist
    from rlvid.train.progress import ProgressActor

    name = f"{next(iter(runs))}-on-{workers}"
    shared = {"use_gpu": False, "progress": ProgressActor.remote()}
    clips = {run.name: training_set(run, QUIET) for run in [next(iter(runs.values())), *begun]}
    clips |= {run.name: next(iter(clips.values())) for run in runs.values()}
    jobs = {key: Job.of(run, run=folder / f"{name}-{key}", **shared) for key, run in runs.items()}
    places = {run.name: folder / "runs" / run.name for run in begun}
    others = [
        Job.of(run, run=places[run.name], archivist=start_archivist(run, places[run.name], None), **shared)
        for run in begun
    ]
    TorchTrainer(
        partial(trajectories, jobs, others, clips),
        scaling_config=ray.train.ScalingConfig(num_workers=workers),
        run_config=ray.train.RunConfig(name=name, storage_path=str(folder / "ray")),
    ).fit()
    for run in begun:
        own, checkpoint = folder / "runs" / run.name, f"step-{run.train.steps:06d}"
        shutil.copytree(folder / "ray" / name / checkpoint, own / checkpoint)
        (own / "config.yaml").write_text(yaml.safe_dump(run.model_dump(mode="json")), encoding="utf-8")
    return {key: torch.load(f"{job.run}.pt", weights_only=True) for key, job in jobs.items()}


WHOLE = "model.finetune=full"
OTHERS = ("draft", "ddpo", "dpok", "raft")  # of each family the one with the most of its own
GRPO = ("method={name: grpo, window: 2, same_start: true, kl: 0.1, step_weight: inverse}", "train.group_size=4")
OF_OTHERS = ("train.zero_stage=2", "train.micro_batch=2", "optimizer.clip_norm=0")


@pytest.fixture(scope="module")
def together(folder: Path, ray_cluster: Any) -> dict[str, Trajectory]:
    """Three steps by two workers, without an interruption: each ZeRO stage with an adapter, those that share gradients
    with all weights, and methods; and two runs that are begun. One start serves them all."""
    stages, two = (0, 1, 2, 3), ("train.workers=2", "output.archive_every=0")
    runs = {f"zero-{stage}": config(folder, "equal", *two, f"train.zero_stage={stage}") for stage in stages}
    runs |= {f"full-zero-{stage}": config(folder, "full", WHOLE, *two, f"train.zero_stage={stage}") for stage in (2, 3)}
    runs |= {
        name: config(folder, "methods", *two, "train.micro_batch=2", f"method={name}", *OF_OTHERS) for name in OTHERS
    }
    runs |= {
        f"grpo-zero-{stage}": config(folder, "grpo", *two, *GRPO, *OF_OTHERS, f"train.zero_stage={stage}")
        for stage in stages
    }
    begun = [all_weights(folder, "train.steps=2"), elastic(folder, "train.workers=2", "train.steps=3")]
    return on_workers(folder, 2, runs, begun)


def all_weights(folder: Path, *overrides: str) -> RunConfig:
    """A run of all weights, which two workers share."""
    return config(folder, "halves", WHOLE, "train.workers=2", "train.zero_stage=3", *overrides)


def elastic(folder: Path, *overrides: str) -> RunConfig:
    """A run on clips that are the base model's own samples, by a method with a state of its own (a value network)."""
    prompts = folder / "prompts.txt"
    prompts.write_text("a dog\na cat\n")
    data = ("data.source=samples", f"data.prompts={prompts}", "data.count=5", "output.checkpoint_every=3")
    method = ("method=dpok", "optimizer.clip_norm=0", "train.zero_stage=0")
    return config(folder, "elastic", *method, *data, *overrides)


def test_workers_and_zero_stages_compute_what_plain_torch_computes(
    folder: Path, together: dict[str, Trajectory]
) -> None:
    found = {name: together[name] for name in (f"zero-{stage}" for stage in (0, 1, 2, 3))}
    plain = config(folder, "plain", "train.workers=1", "train.micro_batch=4")
    reference, norms = plain_torch(plain, training_set(plain, QUIET))
    moved = difference(reference, tiny_state(folder))
    assert moved > 2e-5, "nothing was learned, so equality would prove nothing"
    for name, (state, its_norms) in found.items():
        log.info("%s: largest difference %.2e of %.2e moved", name, difference(state, reference), moved)
        assert its_norms == pytest.approx(norms, rel=1e-4), name
        assert difference(state, reference) <= 1e-6, name


def test_full_fine_tuning_under_zero_computes_what_plain_torch_computes(
    folder: Path, together: dict[str, Trajectory]
) -> None:
    plain = config(folder, "plain", WHOLE, "train.workers=1", "train.micro_batch=4")
    reference, norms = plain_torch(plain, training_set(plain, QUIET))
    start = tiny_state(folder, WHOLE)
    assert all((reference[name] - start[name]).abs().max() > 0 for name in start), "a tensor did not move"
    moved = difference(reference, start)
    assert moved > 2e-5
    for name in ("full-zero-2", "full-zero-3"):
        state, its_norms = together[name]
        log.info("%s: largest difference %.2e of %.2e moved", name, difference(state, reference), moved)
        assert its_norms == pytest.approx(norms, rel=1e-4), name
        assert difference(state, reference) <= 1e-6, name


@pytest.mark.slow
def test_a_run_of_all_weights_resumes_to_the_same_weights_and_is_evaluated_and_exported(
    folder: Path, together: dict[str, Trajectory]
) -> None:
    """The run ends after step 2, is continued to 3, and ends where one of 3 steps does."""
    halves = train(all_weights(folder), QUIET)
    assert halves.first_step == 2
    file = "unet/diffusion_pytorch_model.safetensors"
    found, (expected, _) = load_file(halves.checkpoint / file), together["full-zero-3"]
    assert difference(found, expected) == 0
    assert difference(found, tiny_state(folder, WHOLE)) > 2e-5
    prompts = {"own": ["a red circle", "a dog"]}
    assert len(run_evaluation(Evaluation.of(find_models([str(halves.folder)]), prompts, steps_list=[2]))) == 4
    out = export_run(halves.folder, folder / "exported")
    assert difference(load_file(out / file), expected) == 0
    assert "all weights of its denoiser; 3 steps" in (out / "README.md").read_text(encoding="utf-8")


def test_a_run_of_zero_0_goes_on_with_any_number_of_workers(folder: Path, together: dict[str, Trajectory]) -> None:
    """Two workers, then one."""
    run = elastic(folder, "train.workers=1", "train.steps=4")
    done = train(run, QUIET)
    assert (done.first_step, done.last_step) == (3, 4)
    plain = elastic(folder, "train.workers=1", "train.micro_batch=4", "train.steps=4")
    reference, _ = plain_torch(plain, training_set(plain, QUIET))
    assert difference(reference, tiny_state(folder)) > 2e-5
    assert difference(adapter(done.folder, 4), reference) <= 1e-6
    assert faults(done.folder, run, 4) == []


def test_the_base_models_samples_are_made_once_for_all_methods(folder: Path, ray_cluster: Any) -> None:
    found = training_set(elastic(folder), QUIET)
    made = Path(found.places)
    assert list((folder / "runs" / "clips").glob("samples-5-*")) == [made]
    clips = EncodedClips.open(made)
    assert list(clips.captions()) == ["a dog", "a cat", "a dog", "a cat", "a dog"]
    posterior = tensors(clips.rows([0, 2]))[2]
    assert not posterior.std.any()
    assert (posterior.mean[0] - posterior.mean[1]).abs().max() > 0.1
    times = {path: path.stat().st_mtime_ns for path in made.iterdir()}
    assert training_set(elastic(folder, "method={name: raft, share: 0.5}"), QUIET) == found
    assert {path: path.stat().st_mtime_ns for path in made.iterdir()} == times
    assert torch.equal(tensors(EncodedClips.open(made).rows([0]))[2].mean, posterior.mean[:1])


def test_grpo_under_zero_computes_what_plain_torch_computes(folder: Path, together: dict[str, Trajectory]) -> None:
    plain = config(folder, "plain", "train.workers=1", "train.micro_batch=4", *GRPO, "optimizer.clip_norm=0")
    reference, its_norms = plain_torch(plain, training_set(plain, QUIET))
    moved = difference(reference, tiny_state(folder))
    assert moved > 1e-5
    for stage in (0, 1, 2, 3):
        state, norms = together[f"grpo-zero-{stage}"]
        log.info("ZeRO %d: largest difference %.2e of %.2e moved", stage, difference(state, reference), moved)
        assert norms == pytest.approx(its_norms, rel=1e-3), stage
        assert difference(state, reference) <= 1e-6, stage


def test_two_workers_compute_what_plain_torch_computes_with_other_methods(
    folder: Path, together: dict[str, Trajectory]
) -> None:
    for name in OTHERS:
        state, norms = together[name]
        plain = config(
            folder, "plain", "train.workers=1", "train.micro_batch=4", f"method={name}", "optimizer.clip_norm=0"
        )
        reference, its_norms = plain_torch(plain, training_set(plain, QUIET))
        moved = difference(reference, tiny_state(folder))
        log.info("%s: largest difference %.2e of %.2e moved", name, difference(state, reference), moved)
        assert moved > 1e-5, name
        assert norms == pytest.approx(its_norms, rel=1e-3), name
        assert difference(state, reference) <= 1e-6, name


def test_run_that_another_process_trains_is_refused(folder: Path) -> None:
    run = folder / "runs" / "busy"
    run.mkdir(parents=True)
    hold = "import fcntl, sys, time; f = open(sys.argv[1], 'w'); fcntl.flock(f, fcntl.LOCK_EX); print(1, flush=True); "
    command = [sys.executable, "-c", hold + "time.sleep(60)", str(run / ".lock")]
    (run / "config.yaml").write_text(yaml.safe_dump(config(folder, "busy").model_dump(mode="json")), encoding="utf-8")
    with subprocess.Popen(command, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        other.stdout.readline()
        with pytest.raises(ValueError, match=r"'busy' in .* is being trained by another process"):
            train(config(folder, "busy"), QUIET)
        other.kill()


def test_targets_that_are_no_layer_are_refused_before_a_folder_is_made(folder: Path) -> None:
    with pytest.raises(ValueError, match="no linear layer of the denoiser is called 'to_x'"):
        train(config(folder, "astray", "model.lora.targets=[to_q,to_x]"), QUIET)
    assert not (folder / "runs" / "astray").exists()


@pytest.mark.usefixtures("ray_cluster")
def test_more_workers_than_cores_are_refused_before_anything_starts(folder: Path) -> None:
    with pytest.raises(ValueError, match="needs 64 CPU cores; the cluster has 8"):
        train(config(folder, "wide", "train.workers=64", "train.batch_size=64"), QUIET)


@pytest.mark.usefixtures("ray_cluster")
def test_non_finite_steps_stop_the_run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the driver does; that workers skip such steps and return the problem is in the unit tests."""
    problem = "5 steps in a row had a non-finite loss or gradient"
    monkeypatch.setattr(launch, "run_fit", lambda *_: {"problem": problem})
    with pytest.raises(RuntimeError, match=f"^training stopped: {problem}$"):
        train(config(folder, "broken"), QUIET)


@pytest.mark.usefixtures("ray_cluster")
def test_the_doctor_finds_the_cluster_in_order(folder: Path) -> None:
    found = list(check_cluster(None, str(folder / "runs")))
    assert {each.status for each in found} == {"ok"}, found
    names = ["ray", "resources", "nodes", "shared storage", "gradient of workers", "samples of workers"]
    assert [each.name for each in found] == names
    assert not list((folder / "runs").glob(".doctor-*"))

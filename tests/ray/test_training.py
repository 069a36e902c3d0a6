"""The trust in training: workers and ZeRO stages change nothing; a continued run ends as one that is not."""

import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from runs import QUIET, Trajectory, adapter, config, difference, plain_torch, tiny_state
from safetensors.torch import load_file
from worker_runs import on_workers

from rlvid.config import RunConfig
from rlvid.data.clips import EncodedClips
from rlvid.data.shares import tensors
from rlvid.data.sources import training_set
from rlvid.doctor.cluster import check_cluster
from rlvid.evaluate.models import find_models
from rlvid.evaluate.work import Evaluation
from rlvid.evaluate.workers import run_evaluation
from rlvid.export.export import export_run
from rlvid.train import launch
from rlvid.train.audit import faults
from rlvid.train.launch import train

log = logging.getLogger(__name__)


WHOLE = "model.finetune=full"


@pytest.fixture(scope="module")
def together(request: pytest.FixtureRequest, folder: Path, ray_cluster: Any) -> dict[str, Trajectory]:
    """Three steps by two workers, without an interruption: each selected ZeRO stage with an adapter, and those that
    share gradients with all weights; and one run that is begun. One start serves them all."""
    tests = [item for item in request.session.items if item.path == request.path and "together" in item.fixturenames]
    stages = [item.callspec.params["stage"] for item in tests if "stage" in item.fixturenames]
    two = ("train.workers=2", "output.archive_every=0")
    runs = {f"zero-{stage}": config(folder, "equal", *two, f"train.zero_stage={stage}") for stage in stages}
    if len(tests) == len(stages):
        return on_workers(folder, 2, runs, [])
    runs |= {f"full-zero-{stage}": config(folder, "full", WHOLE, *two, f"train.zero_stage={stage}") for stage in (2, 3)}
    return on_workers(folder, 2, runs, [all_weights(folder, "train.steps=2")])


@pytest.fixture(scope="module")
def plainly(folder: Path) -> Trajectory:
    """What one step after the other in plain torch makes of the runs with an adapter."""
    plain = config(folder, "plain", "train.workers=1", "train.micro_batch=4")
    return plain_torch(plain, training_set(plain, QUIET))


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


@pytest.mark.slow  # test_equivalence.py has a quick run under stage 2
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_workers_and_zero_stages_compute_what_plain_torch_computes(
    folder: Path, together: dict[str, Trajectory], plainly: Trajectory, stage: int
) -> None:
    (reference, norms), (state, its_norms) = plainly, together[f"zero-{stage}"]
    moved = difference(reference, tiny_state(folder))
    assert moved > 2e-5, "nothing was learned, so equality would prove nothing"
    log.info("%d: largest difference %.2e of %.2e moved", stage, difference(state, reference), moved)
    assert its_norms == pytest.approx(norms, rel=1e-4)
    assert difference(state, reference) <= 1e-6


@pytest.mark.slow
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


@pytest.mark.slow
def test_a_run_of_zero_0_goes_on_with_any_number_of_workers(folder: Path, ray_cluster: Any) -> None:
    """Two workers, then one."""
    train(elastic(folder, "train.workers=2", "train.steps=3"), QUIET)
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


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_the_doctor_finds_the_cluster_in_order(folder: Path) -> None:
    found = list(check_cluster(None, str(folder / "runs")))
    assert {each.status for each in found} == {"ok"}, found
    names = ["ray", "resources", "nodes", "shared storage", "gradient of workers", "samples of workers"]
    assert [each.name for each in found] == names
    assert not list((folder / "runs").glob(".doctor-*"))

"""What fills up or changes between two starts of a run, and what becomes of the run; test_chaos.py has what dies."""

import io
import re
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import HANG
from rich.console import Console
from runs import QUIET, adapter, config, difference, plain_torch

from rlvid.data.sources import encoded_clips
from rlvid.train.audit import faults
from rlvid.train.launch import train
from rlvid.train.record import RECORD

LONG = ("train.steps=8", "output.checkpoint_every=3", "train.zero_stage=2", "train.workers=1")


@pytest.fixture(scope="module")
def uninterrupted(folder: Path, ray_cluster: Any) -> dict[str, torch.Tensor]:
    """The adapter of a run that nothing befell."""
    done = train(config(folder, "whole", *LONG), QUIET)
    assert faults(done.folder, config(folder, "whole", *LONG), 8) == []
    return adapter(done.folder, 8)


def _wait_for_part(run: Path, step: int, seconds: float = HANG) -> None:
    deadline = time.monotonic() + seconds
    while not list((run / "archive").glob(f"step-{step:06d}-*.parquet")):
        assert time.monotonic() < deadline, f"{run} did not reach step {step}"
        time.sleep(0.05)


def test_name_of_another_run_is_refused(folder: Path, uninterrupted: dict[str, torch.Tensor]) -> None:
    with pytest.raises(ValueError, match=r"run 'whole' exists .* another config \(optimizer.lr: 1e-05 -> 0.1\)"):
        train(config(folder, "whole", *LONG, "optimizer.lr=0.1"), QUIET)


def test_another_number_of_workers_under_zero_2_takes_an_explicit_choice_and_a_cut_off_record_is_mended(
    folder: Path, uninterrupted: dict[str, torch.Tensor]
) -> None:
    run = folder / "runs" / "restarted"
    shutil.copytree(folder / "runs" / "whole", run)
    (run / RECORD).write_text((run / RECORD).read_text()[:100])
    two = (*LONG, "train.workers=2", "train.steps=9")
    with pytest.raises(ValueError, match=r"state does not fit 2 under stage 2; set train.workers=1 .*resume=weights"):
        train(config(folder, "restarted", *two), QUIET)
    said = Console(file=io.StringIO(), width=500)
    done = train(config(folder, "restarted", *two, "train.resume=weights"), said)
    assert "WARNING: goes on after step 8 from the weights alone" in said.file.getvalue()
    assert (done.first_step, done.last_step) == (8, 9)
    plain = config(folder, "plain", *LONG, "train.steps=9", "train.micro_batch=4")
    reference, _ = plain_torch(plain, encoded_clips(plain, QUIET), run / "step-000008", first_step=8)
    assert difference(reference, uninterrupted) > 2e-6
    assert difference(adapter(run, 9), reference) <= 1e-6
    assert faults(run, plain, 9) == []


def test_wrong_bytes_in_the_newest_checkpoint_cost_the_steps_since_the_one_before(
    folder: Path, uninterrupted: dict[str, torch.Tensor]
) -> None:
    """Workers find them; what the driver finds by itself is in the unit tests."""
    run = Path(shutil.copytree(folder / "runs" / "whole", folder / "runs" / "mended"))
    (file,) = (run / "step-000008" / "engine").rglob("*optim_states.pt")
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    said = Console(file=io.StringIO(), width=500)
    done = train(config(folder, "mended", *LONG), said)
    assert re.search(
        r"step-000008 is damaged \(engine/.* other bytes.*the run goes on after step 6", said.file.getvalue()
    )
    assert (done.first_step, done.last_step) == (6, 8)
    assert (run / "step-000008.damaged").is_dir()
    assert difference(adapter(run, 8), uninterrupted) == 0
    assert faults(run, config(folder, "mended", *LONG), 8) == []
    assert [path.name for path in (run / ".tmp").iterdir()] == [".lock"]


@pytest.mark.slow
def test_storage_that_fails_ends_in_one_line_and_the_run_goes_on_when_it_is_mended(
    folder: Path, uninterrupted: dict[str, torch.Tensor]
) -> None:
    """The archive's folder turns into a file: a write fails as it does on a full disk."""
    run = folder / "runs" / "unwritable"

    def spoil() -> None:
        _wait_for_part(run, 4)
        (run / "archive").rename(run / "aside")
        (run / "archive").touch()

    vandal = threading.Thread(target=spoil)
    vandal.start()
    with pytest.raises(RuntimeError, match=r"training stopped: .*archive part .* could not be written .*earlier parts"):
        train(config(folder, "unwritable", *LONG, "train.max_failures=0"), QUIET)
    vandal.join()
    (run / "archive").unlink()
    (run / "aside").rename(run / "archive")
    done = train(config(folder, "unwritable", *LONG), QUIET)
    assert done.first_step in (3, 6)
    assert all(torch.equal(adapter(run, 8)[name], tensor) for name, tensor in uninterrupted.items())
    assert faults(run, config(folder, "unwritable", *LONG), 8) == []

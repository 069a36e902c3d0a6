"""How a run ends whose workers, nodes or controller were lost: it goes on, or one line says why not; no Ray."""

import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
from ray.exceptions import ActorUnavailableError
from ray.train import ControllerError

from rlvid.train.fit import fit_again, reason


def test_a_node_lost_while_workers_start_is_outlived_as_often_as_lost_workers_are() -> None:
    lost = ControllerError(ActorUnavailableError("Socket closed", b"0" * 16))
    lost = pickle.loads(pickle.dumps(lost))  # as it comes from Ray Train's controller
    done, broken = {"problem": None}, {"damaged": {"step-000004": "wrong bytes"}}
    ends: list[Any] = [lost, lost, done]
    repaired: list[dict[str, str]] = []

    def fit() -> Any:
        end = ends.pop(0)
        if isinstance(end, Exception):
            raise end
        return SimpleNamespace(return_value=end)

    assert fit_again(fit, 2, repaired.append) == done
    ends = [ActorUnavailableError("the controller is gone", b"0" * 16), done]
    assert fit_again(fit, 1, repaired.append) == done
    ends = [lost, lost, done]
    with pytest.raises(ControllerError, match="Socket closed"):
        fit_again(fit, 1, repaired.append)
    ends = [ControllerError(ValueError("a fault of the program")), done]
    with pytest.raises(ControllerError, match="a fault of the program"):
        fit_again(fit, 2, repaired.append)
    assert (ends, repaired) == ([done], [])
    ends = [broken, lost, done]
    assert fit_again(fit, 1, repaired.append) == done
    assert repaired == [broken["damaged"]]


@pytest.mark.parametrize(
    ("written", "said"), [("Timeout (0:00:02)!\n", "gave no answer for 2 s"), ("step 3\n", "worker 0, after step 3")]
)
def test_a_worker_killed_inside_a_rewards_call_is_told_from_one_whose_reward_hung(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, written: str, said: str
) -> None:
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "worker-00.log").write_text(written)
    monkeypatch.setattr(ray, "get", lambda given, timeout: given)
    progress = SimpleNamespace(
        get=SimpleNamespace(remote=lambda: ({"step": 3},)),
        overdue=SimpleNamespace(remote=lambda: {0: "the reward mine gave no answer for 2 s"}),
    )
    error = RuntimeError("workers failed")
    error.worker_failures = {0: RuntimeError("actor died")}  # type: ignore[attr-defined]
    here, stored = (reason(error, tmp_path, progress, logs_here) for logs_here in (True, False))
    assert said in here
    assert f"(full log: {tmp_path}/logs/worker-00.log; " in here
    assert "gave no answer" in stored
    assert "(full log: logs/worker-00.log* of the run in the store; " in stored

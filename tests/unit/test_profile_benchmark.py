"""The profile of a step: stages and operators, and that nothing is lost or counted twice."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from jobs.benchmark import profile
from rlvid.config import load_config


def event(name: str, start: float, end: float, own: float, *shapes: list[int]) -> Any:
    times = SimpleNamespace(start=start, end=end)
    return SimpleNamespace(name=name, time_range=times, self_cpu_time_total=own * 1e6, input_shapes=list(shapes))


def test_costs_are_those_of_an_operator_in_a_stage_with_the_shapes_that_cost_most() -> None:
    found = profile.costs(
        [
            event("stage: chain", 0, 10, 0.5), event("stage: backward", 20, 30, 0.5),
            event("mm", 1, 2, 1.0, [2, 3]), event("mm", 3, 4, 3.0, [4, 5], [5, 6]), event("mm", 25, 26, 2.0),
            event("add", 15, 16, 0.25),
        ]
    )  # fmt: skip
    assert found == {
        ("chain", "mm"): (4.0, 2, "[4, 5], [5, 6]"), ("backward", "mm"): (2.0, 1, ""), ("between", "add"): (0.25, 1, "")
    }  # fmt: skip
    assert next(iter(found)) == ("chain", "mm")
    rows = profile.table(found, 1).rows
    assert rows[0][:4] == ["chain", "mm", "2", "4.000"]
    assert rows[1][1:4] == ["the rest", "2", "2.250"]


def test_the_profiled_step_is_a_common_one() -> None:
    small = ["model.decode_window=1", "train.workers=1", "train.batch_size=1", "sampling.steps=4"]
    algorithm, _, batch = profile.prepare(load_config("toy-wan", small))
    (update,) = algorithm.updates(batch)
    assert "reward/trained" in update.metrics
    assert "decode/gradient_share" not in update.metrics, "only every 25th step measures it"


def test_a_step_has_one_thread_unless_more_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(config: Any) -> Any:
        raise InterruptedError

    monkeypatch.setattr(profile, "prepare", stop)
    for given, threads in (([], 1), (["--threads", "2"], 2)):
        torch.set_num_threads(3 - threads)
        with pytest.raises(InterruptedError):
            profile.main(given)
        assert torch.get_num_threads() == threads


@pytest.mark.parametrize(
    ("given", "videos"),
    [(["toy"], 8), (["toy-grpo"], 16), (["toy-grpo", "train.group_size=3", "--batch", "9"], 9),
     (["toy-grpo", "train.group_size=4"], 8), (["toy-raft"], 8)],
)  # fmt: skip
def test_the_batch_is_of_whole_groups(given: list[str], videos: int) -> None:
    assert profile.settings(profile.parse(given)).train.batch_size == videos


def test_a_batch_that_does_not_fit_the_groups_is_named_by_its_option() -> None:
    with pytest.raises(ValueError, match=r"train\.group_size = 16 does not divide .*= 8; .*--batch sets"):
        profile.main(["toy-grpo", "--batch", "8"])


@pytest.mark.slow
def test_a_step_of_the_built_in_model_is_profiled(capsys: pytest.CaptureFixture[str]) -> None:
    profile.main(["toy", "--batch", "1", "--most", "3", "sampling.steps=2"])
    printed = capsys.readouterr().out
    assert "a step of 1 videos, 1 thread," in printed
    assert "| backward | aten::" in printed
    assert "the rest" in printed


@pytest.mark.parametrize(
    "arguments",
    [
        ["--batch", "0"],
        ["--most", "0"],
        ["--threads", "0"],
        ["toy", "seed=1", "train.micro_batch=1"],
        ["modelscope-hpsv2"],
    ],
)
def test_what_cannot_be_profiled_is_refused(arguments: list[str]) -> None:
    with pytest.raises(
        ValueError, match=r"at least 1|--threads 0: must be 1 or more|set by this benchmark|this part profiles"
    ):
        profile.main(arguments)

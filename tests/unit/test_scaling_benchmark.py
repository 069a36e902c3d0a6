"""Weak scaling: options, the machine's limit, and runs that begin together."""

import asyncio
from typing import Any

import pytest

from jobs.benchmark import scaling
from rlvid.config import RunConfig


@pytest.mark.parametrize("arguments", [["--workers", "two"], ["--workers", "0,1"], ["--steps", "0"]])
def test_numbers_of_workers_that_cannot_be_are_refused(arguments: list[str]) -> None:
    with pytest.raises(ValueError, match="--workers takes whole numbers such as 1,2"):
        scaling.main(arguments)


def test_stages_that_cannot_be_are_refused() -> None:
    with pytest.raises(ValueError, match="--stages '4': allowed: 0, 1, 2, 3"):
        scaling.main(["--stages", "0,4"])
    with pytest.raises(ValueError, match=r"train\.zero_stage is set by this benchmark"):
        scaling.main(["--stages", "0", "train.zero_stage=2"])


def test_efficiency_is_held_to_the_machines_limit_in_each_stage(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    apart: list[tuple[int, int, int, str]] = []

    def grouped(measure: Any, config: RunConfig, steps: int, address: str | None) -> dict[str, Any]:
        assert config.train.batch_size == 3 * config.train.workers
        seconds = {1: 1.0, 2: 2.0}[config.train.workers] + config.train.zero_stage
        return {
            "step": seconds, "mean step": 4 * seconds, "threads": 1, "start": {"Ray": 1.0},
            "stages": {"archive": 0.1, "tensorboard": 0.1},
        }  # fmt: skip

    def independent(configs: list[RunConfig], steps: int, address: str | None) -> float:
        runs = [(run.train.workers, run.train.batch_size, run.train.zero_stage, run.name) for run in configs]
        assert len({name for *_, name in runs}) == len(runs) == 2
        apart.extend(runs)
        return 1.25 + configs[0].train.zero_stage

    monkeypatch.setattr(scaling, "measure_in_workers", grouped)
    monkeypatch.setattr(scaling, "measure_apart", independent)
    scaling.main(["--stages", "0,2", "train.batch_size=3", "model.finetune=full"])
    assert [run[:3] for run in apart] == [(1, 3, 0)] * 2 + [(1, 3, 2)] * 2
    plain, sharded = capsys.readouterr().out.split("ZeRO 2, full: 3 videos a worker")
    assert "ZeRO 0, full: 3 videos a worker" in plain

    def row(table: str, name: str) -> list[str]:
        line = next(line for line in table.splitlines() if line.strip().startswith(f"{name}  "))
        return line.replace(name, "").replace(" %", "").split()

    names = ("efficiency", "machine's limit", "efficiency / limit")
    assert [row(plain, name) for name in names] == [["100", "50"], ["100", "80"], ["100", "62"]]
    assert row(plain, "share of the archive") == ["2.50", "1.25"], "of the mean step"
    assert [row(sharded, name) for name in names] == [["100", "75"], ["100", "92"], ["100", "81"]]


def test_runs_pass_a_gate_together() -> None:
    async def enter() -> list[str]:
        gate, seen = scaling.Gate(2), list[str]()

        async def run(name: str) -> None:
            seen.append(f"{name} comes")
            await gate.enter()
            seen.append(f"{name} passes")

        await asyncio.gather(run("one"), run("two"))
        return seen

    assert asyncio.run(enter())[:2] == ["one comes", "two comes"]

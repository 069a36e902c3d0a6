"""The benchmarks: both ways of a step come to one gradient; what is measured on a GPU, in time, and kept."""

import json
import signal
import time
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import save_file

from jobs.benchmark import gpu, gpu_ray, gpu_wan, overhead, peers, step
from jobs.benchmark.options import make_folder
from jobs.benchmark.parts import Adapter, prepare
from jobs.benchmark.variants import two_calls
from rlvid.config import load_config
from rlvid.diffusion.schedule import check_chain
from rlvid.models.video_shape import resolved_shape
from rlvid.toy.tiny_wan import save_tiny_wan


@pytest.mark.slow
def test_the_tiny_preset_finds_one_gradient_and_what_is_done_in_vain(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    step.main(
        ["--preset", "tiny", "--device", "cpu", "--batch", "2", "--steps", "1", "--out", str(tmp_path / "b.json"),
         "--compare", "sdpa,guidance,channels-last,precision"]
    )  # fmt: skip
    found = json.loads((tmp_path / "b.json").read_text())
    ours, theirs = found["sides"]["rlvid"], found["sides"]["released"]
    assert found["gradient difference"] < 1e-4
    for side, frames in ((ours, 1), (theirs, 4)):  # three steps of two branches; the reward looks at one frame of four
        assert side["calls"]["denoiser evaluations"] == 6
        assert side["calls"]["frames decoded"] == frames
    assert theirs["calls"]["denoiser evaluations again"] == 2  # ours come back layer by layer
    assert {"chain", "decode", "reward", "backward", "optimiser"} < ours["seconds"].keys()
    assert theirs["seconds"].keys() - ours["seconds"].keys() == {"encode"}
    assert theirs["flops"]["chain"] == pytest.approx(ours["flops"]["chain"], rel=0.05)
    assert theirs["flops"]["decode"] == 4 * ours["flops"]["decode"] > 0
    assert theirs["flops"]["backward"] > ours["flops"]["backward"] > 0
    assert theirs["flops"]["encode"] > 0
    assert min(ours["peaks"].values()) > 0
    assert found["variants"].keys() == {"sdpa", "guidance", "channels-last", "precision"}
    printed = capsys.readouterr().out
    assert "released / rlvid" in printed
    assert "channels-last convolutions" in printed


@pytest.mark.slow
def test_guidance_in_two_calls_changes_nothing_else() -> None:
    bench = prepare(step.parse(["--preset", "tiny", "--device", "cpu", "--steps", "1"]))
    adapter, rows, found = Adapter(bench.engine), list[int](), {}
    with bench.model.denoiser.register_forward_pre_hook(lambda module, inputs: rows.append(len(inputs[0]))):
        for name, variant in (("own", nullcontext), ("two calls", two_calls)):
            adapter.restore()
            with variant(bench) as changed:
                found[name] = step.measure(changed, ["rlvid"], 1)["rlvid"]
            found[name]["rows"] = rows.copy()
            rows.clear()
    own, two = found.values()
    assert (set(own["rows"]), set(two["rows"])) == ({2}, {1})
    assert sum(own["rows"]) == sum(two["rows"])
    assert own["calls"] == two["calls"]
    assert "denoiser evaluations again" not in two["calls"], "layer by layer, as rlvid recomputes"
    assert sum(two["flops"].values()) == pytest.approx(sum(own["flops"].values()), rel=0.01)
    assert step.distance(two["gradient"], own["gradient"]) < 1e-4


@pytest.mark.parametrize("arguments", [["--compare", "speed"], ["--steps", "0"], ["--batch", "0"]])
def test_options_that_cannot_be_are_refused(arguments: list[str]) -> None:
    with pytest.raises(ValueError, match="compare takes sdpa, guidance, channels-last, compile, precision"):
        step.main(["--preset", "tiny", *arguments])


@pytest.mark.parametrize("name", ["taken", "taken/below"])
def test_a_file_in_the_place_of_a_folder_is_named(tmp_path: Path, name: str) -> None:
    (tmp_path / "taken").touch()
    with pytest.raises(ValueError, match=rf"^--out .*{name}: a file is in the way; name a folder$"):
        make_folder(tmp_path / name)


@pytest.mark.parametrize("part", [step, peers])
def test_a_file_that_cannot_be_is_refused_before_anything_is_built(part: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(part, "matchups" if part is peers else "prepare", None)
    with pytest.raises(ValueError, match=r"--out no/such/x\.json: expected a file in a folder that exists"):
        part.main([*TINY, "--out", "no/such/x.json"])


@pytest.mark.parametrize("part", [step, peers])
def test_a_result_that_cannot_be_written_is_shown(part: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, shown = tmp_path / "gone", list[bool]()
    folder.mkdir()

    def measure(*given: Any) -> dict[str, Any]:
        folder.rmdir()
        return {}

    bench = SimpleNamespace(meter=SimpleNamespace(device=torch.device("cpu")))
    if part is peers:
        monkeypatch.setattr(part, "matchups", measure)
    else:
        monkeypatch.setattr(part, "prepare", lambda options: bench)
        monkeypatch.setattr(part, "matrix_rate", lambda *given: 1.0)
        monkeypatch.setattr(part, "measure_both", measure)
    monkeypatch.setattr(part, "show", lambda *given: shown.append(True))
    with pytest.raises(OSError, match="No such file"):
        part.main([*TINY, "--out", str(folder / "x.json")])
    assert shown


def test_planned_seconds_stand_beside_the_whole_step(capsys: pytest.CaptureFixture[str]) -> None:
    found = {
        "seconds": {"torch": 2.0, "Ray + DeepSpeed": 2.1}, "stages": {"chain": 1.5}, "threads": 1, "planned": 1.89,
        "calls": {"frames decoded": 4, "denoiser evaluations": 24},
    }  # fmt: skip
    overhead.show(found, load_config("toy-draft"), Console(width=100))
    words = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "overhead 5.0 % the step as planned 1.890 planned beside measured -10.0 %" in words


def test_no_steps_are_refused_before_ray_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(overhead, "measure_in_workers", None)
    with pytest.raises(ValueError, match="--steps 0: must be at least 1"):
        overhead.main(["--steps", "0"])


TINY = ["--preset", "tiny", "--device", "cpu", "--steps", "1"]


@pytest.mark.slow
def test_every_part_is_measured_printed_and_kept_and_the_next_call_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "gpu.json"
    few = [name for name in gpu.PARTS if name not in ("compile", "videos-4", "kept-4", "channels-last")]
    assert gpu.main([*TINY, "--out", str(out), "--parts", ",".join(few)]) == 0
    found = json.loads(out.read_text())
    assert list(found["parts"]) == few
    assert found["setup"]["card"]
    assert found["parts"]["rate"]["rate"] > 0
    step = found["parts"]["step"]
    assert step["gradient difference"] < 1e-4
    assert step["sides"]["rlvid"]["first"] > 0
    for part in ("videos-2", "kept-2"):
        measured, planned = (found["parts"][part][key] for key in ("peaks", "planned"))
        assert planned.keys() == {"chain", "decode", "reward", "backward"} <= measured.keys()
    assert found["parts"]["kept-2"]["planned"]["backward"] > found["parts"]["videos-2"]["planned"]["backward"]
    printed = capsys.readouterr().out
    for line in ("rate: ", "step: ", "videos-2: ", "| backward |", "| 2 | kept |", "| 2 | recomputed |", "two calls"):
        assert line in printed, line

    monkeypatch.setattr(gpu, "Session", None)  # nothing is built where nothing is missing
    assert gpu.main([*TINY, "--out", str(out), "--parts", ",".join(few)]) == 0
    assert f"step: is in {out} already" in capsys.readouterr().out
    assert gpu.main(["--out", str(out), "--show"]) == 0
    assert "| 2 | kept |" in capsys.readouterr().out


@pytest.mark.slow
def test_sizes_of_a_wan_model_are_measured_beside_the_plan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "wan.json"
    few = ["rate", "21x16x32/all", "21x16x32/1", "17x16x16/offload"]
    assert gpu_wan.main([*TINY, "--out", str(out), "--parts", ",".join(few)]) == 0
    parts = json.loads(out.read_text())["parts"]
    assert list(parts) == few
    for name in few[1:]:
        measured, planned = (parts[name][key] for key in ("peaks", "planned"))
        assert planned.keys() == {"chain", "decode", "reward", "backward"} <= measured.keys()
        assert parts[name]["step"] == pytest.approx(sum(parts[name]["seconds"].values()))
    # A window of one chunk measures what it leaves out, for which the decoder goes through all chunks.
    assert parts["21x16x32/1"]["planned flops"] != parts["21x16x32/all"]["planned flops"]
    printed = capsys.readouterr().out
    for line in ("rate: ", "21x16x32/1: ", "| 21x16x32 | 1 |", "| 17x16x16/offload | decode |"):
        assert line in printed, line


@pytest.mark.slow
def test_seconds_with_a_window_are_of_common_steps_and_the_peak_is_of_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    indices, taken = [], gpu_wan.WanStep.step

    def watch(steps: gpu_wan.WanStep, side: str, index: int, update: bool = True) -> None:
        taken(steps, side, index, update)
        steps.meter.peaks["decode"] = max(steps.meter.peaks["decode"], 2**50 * (update and index == 0))
        indices.append((index, update))

    monkeypatch.setattr(gpu_wan.WanStep, "step", watch)
    out = tmp_path / "wan.json"
    assert gpu_wan.main([*TINY, "--out", str(out), "--parts", "17x16x16/1,17x16x16/all"]) == 0
    window, whole = json.loads(out.read_text())["parts"].values()
    assert indices == [(0, False), (1, True), (0, True), (0, False), (1, True)]
    assert window["peaks"]["decode"] == 2**50 > whole["peaks"]["decode"]


def test_every_size_of_a_wan_model_is_a_run_that_can_be_trained() -> None:
    found = {name: gpu_wan.config_of(name, "bfloat16", None) for name in gpu_wan.part_names("full")[1:]}
    assert len(found) == 12
    last = found["81x480x832/4"]
    assert (last.model.frames, last.model.height, last.model.width, last.model.decode_window) == (81, 480, 832, 4)
    assert found["81x480x832/offload"].model.decode_offload
    for config in found.values():
        check_chain(config)
        assert resolved_shape(config.model).frames == config.model.frames
        assert config.reward.parts == [("hpsv2", "random")]


def test_every_part_of_the_miniature_is_a_run_too(tmp_path: Path) -> None:
    save_tiny_wan(tmp_path)
    for name in gpu_wan.part_names("tiny")[1:]:
        check_chain(gpu_wan.config_of(name, "float32", tmp_path))


class NoNetworks:
    """What parts are given where they do not look at it."""

    def __init__(self, options: Any) -> None:
        self.options = options

    def restore(self) -> None:
        pass

    def part(self, name: str) -> dict[str, Any]:
        return gpu.PARTS[name](self)  # type: ignore[arg-type]


@pytest.fixture
def parts(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Parts of the test's own, in place of the real ones."""
    found: dict[str, Any] = {}
    monkeypatch.setattr(gpu, "Session", NoNetworks)
    monkeypatch.setattr(gpu, "PARTS", found)
    monkeypatch.setattr(gpu, "brief", lambda name, found: "measured")
    return found


def run(out: Path, *options: str) -> tuple[int, dict[str, Any]]:
    code = gpu.main([*TINY, "--out", str(out), *options])
    return code, json.loads(out.read_text())


def test_lack_of_memory_is_a_result_and_another_failure_is_tried_again(
    parts: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def too_large(session: Any) -> dict[str, Any]:
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2 GiB")

    def broken(session: Any) -> dict[str, Any]:
        raise RuntimeError("no kernel image")

    parts |= {"kept-4": too_large, "sdpa": broken, "precision": lambda session: {"step": 1.0, "peaks": {"chain": 1}}}
    code, found = run(tmp_path / "gpu.json")
    assert code == 1
    assert found["parts"].keys() == {"kept-4", "precision"}
    assert found["parts"]["kept-4"]["out of memory"] == "CUDA out of memory."
    assert found["left out"] == {"sdpa": "failed: no kernel image"}
    assert "| 4 | kept | out of memory |" in capsys.readouterr().out
    parts |= {"kept-4": broken, "sdpa": parts["precision"]}
    code, found = run(tmp_path / "gpu.json")
    assert (code, found["left out"], len(found["parts"])) == (0, {}, 3)


def test_a_part_that_takes_too_long_is_stopped_and_what_does_not_fit_is_left_out(
    parts: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "tables", lambda record: "")
    before, timer = signal.getsignal(signal.SIGALRM), signal.getitimer(signal.ITIMER_REAL)
    step = {"sides": {"rlvid": {"step": 1000.0}}}  # seconds, so that nothing else fits

    def endless(session: Any) -> dict[str, Any]:
        try:
            time.sleep(60)
        except Exception as error:  # as compilers do
            raise RuntimeError("the backend failed") from error
        return {}

    parts |= {"step": lambda session: step, "compile": lambda session: {}, "sdpa": lambda session: {}}
    code, found = run(tmp_path / "gpu.json", "--minutes", "1")
    assert code == 0
    assert found["parts"].keys() == {"step"}
    assert all("or more, and" in why for why in found["left out"].values())
    assert found["left out"].keys() == {"compile", "sdpa"}
    parts |= {"step": endless}
    code, found = run(tmp_path / "other.json", "--minutes", "0.01", "--parts", "step")
    assert code == 0
    assert found["left out"]["step"].startswith("stopped after")
    assert signal.getsignal(signal.SIGALRM) == before
    assert (signal.getitimer(signal.ITIMER_REAL)[0] > 0) == (timer[0] > 0)


def test_a_file_of_another_setup_is_refused_and_one_that_is_cut_off_put_aside(
    parts: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "gpu.json"
    parts["rate"] = lambda session: {"rate": 1e12}
    run(out)
    whole = out.read_text()
    with pytest.raises(ValueError, match=r"measured with steps = 1, and now it is 2"):
        run(out, "--steps", "2")
    assert out.read_text() == whole
    for damaged in (whole[:-20], "[]", ""):
        out.write_text(damaged)
        code, found = run(out)
        assert (code, found["parts"]["rate"]["rate"]) == (0, 1e12)
        assert (tmp_path / "gpu.json.damaged").read_text() == damaged
        assert "is cut off or no file of this benchmark" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--parts", "rate,speed"], "--parts 'speed'"),
        (["--steps", "0"], "--steps 0"),
        (["--minutes", "0"], "--minutes 0"),
        (["--minutes", "nan"], "--minutes nan"),
        (["--device", "tpu"], "--device 'tpu'"),
        (["--out", "."], "--out ."),
        (["--out", "no/such/folder.json"], "--out no/such/folder.json"),
        (["--show", "--out", "none.json"], "No such file"),
    ],
)
def test_options_of_a_gpus_benchmark_that_cannot_be_are_refused(arguments: list[str], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        gpu.main([*TINY, *arguments])


@pytest.mark.gpu
def test_a_gpu_measures_miniatures(tmp_path: Path) -> None:
    out = tmp_path / "gpu.json"
    options = ["--preset", "tiny", "--steps", "1", "--parts", "rate,step,videos-2,kept-2", "--out", str(out)]
    assert gpu.main(options) == 0
    found = json.loads(out.read_text())
    assert found["setup"]["driver"] != "unknown"
    assert found["parts"]["step"]["gradient difference"] < 0.05
    peaks, planned = (found["parts"]["videos-2"][key]["backward"] for key in ("peaks", "planned"))
    assert 0 < peaks < 20 * planned


def train_by_hand(spoilt: str) -> Any:
    """In place of ``rlvid train``: what it would leave, with one thing spoilt in the run that is looked at."""
    from rlvid.config import load_config
    from rlvid.runs.checkpoints import checkpoint_name
    from rlvid.train.metrics import TensorBoard

    def run(settings: list[str], name: str, *overrides: str, hidden: bool = False) -> float:
        config = load_config("toy", [*settings, f"name={name}", *overrides])
        assert (config.train.zero_stage, hidden) == ((0, True) if name == "cpu" else (2, False))
        folder, state = Path(config.output.storage) / name, gpu_ray.untrained(config)
        moved = {} if spoilt == "nothing learned" else {key: 1e-3 for key in state}
        wrong = name != "cpu"
        if wrong and spoilt == "weights":
            moved[next(iter(state))] = -1e-3
        saved = folder / checkpoint_name(config.train.steps) / "adapter" / "adapter_model.safetensors"
        saved.parent.mkdir(parents=True)
        save_file({f"base_model.model.{key}": state[key] + moved.get(key, 0) for key in state}, saved)
        writer = TensorBoard(folder / "tensorboard", 0)
        for at in range(config.train.steps):
            loss = 1.1 if wrong and at and spoilt == "loss" else 1.0
            writer.scalars(at, {"optimiser/loss": loss, "optimiser/gradient_norm": 2.0, "cost/peak_memory_gib": 0.5})
        writer.close()
        return 1.0

    return run


@pytest.mark.parametrize(
    ("spoilt", "verdict"),
    [("", "EQUAL: "), ("weights", "DIFFERENT: weights by"), ("loss", "DIFFERENT: optimiser/loss by 1.0e-01"),
     ("nothing learned", "nothing was learned")],
)  # fmt: skip
def test_a_run_on_a_gpu_is_held_to_the_same_run_on_a_cpu(
    spoilt: str, verdict: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr(gpu_ray, "run", train_by_hand(spoilt))
    out = tmp_path / "ray.json"
    assert gpu_ray.main(["--preset", "tiny", "--out", str(out)]) == int(bool(spoilt))
    assert verdict in capsys.readouterr().out
    assert bool(json.loads(out.read_text())["faults"]) == bool(spoilt)


def test_a_training_that_fails_is_told_and_bad_options_are_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    done = SimpleNamespace(returncode=1, stdout="much\nError: out of disk\n")
    monkeypatch.setattr(gpu_ray.subprocess, "run", lambda *command, **options: done)
    assert gpu_ray.main(["--preset", "tiny"]) == 1
    assert "FAILED: rlvid train (cpu) ended with 1: Error: out of disk" in capsys.readouterr().out
    for arguments, told in (
        (["--steps", "0"], "--steps 0"), (["train.steeps=1"], "steeps"), (["model.finetune=full"], "model.finetune"),
        (["--out", "no/such/f.json"], "--out"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=told):
            gpu_ray.main(arguments)

"""Commands as a user meets them: what they make, what they leave out, and what they say of it."""

import math
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import pytest
import torch
import yaml
from helpers import PROMPTS, save_run
from PIL import Image
from torch import Tensor

from rlvid import actions, interrupt
from rlvid.config import RunConfig
from rlvid.diffusion.chain import denoise
from rlvid.diffusion.generate import generate
from rlvid.evaluate.load import load_run
from rlvid.plots import video
from rlvid.plots.frames import save
from rlvid.runs.checkpoints import checkpoint_name
from rlvid.train.launch import TrainResult
from rlvid.train.metrics import TensorBoard

PICTURE = "before-after.png"


@pytest.fixture
def trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, RunConfig]:
    """A run of which training says that it is at its end; this machine has no GPU."""
    run, config = save_run(tmp_path)
    board = TensorBoard(run / "tensorboard", 0)
    board.scalars(0, {"reward/trained": 0.5})
    board.close()
    config = config.model_copy(update={"output": config.output.model_copy(update={"storage": str(tmp_path)})})
    done = TrainResult(run, run / checkpoint_name(3), 0, 3, 0, 1.0, tuple(PROMPTS[:2]))
    monkeypatch.setattr("rlvid.train.launch.train", lambda *_: done)
    monkeypatch.setattr("rlvid.evaluate.load.device", lambda: torch.device("cpu"))
    return run, config


@pytest.mark.slow
def test_the_picture_of_a_checkpoint_is_drawn_once(
    trained: tuple[Path, RunConfig], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run, config = trained
    picture = run / PICTURE
    monkeypatch.setattr(
        "rlvid.diffusion.generate.generate", lambda _, prompts, **__: torch.rand(len(prompts), 4, 3, 16, 16)
    )
    monkeypatch.setattr(actions, "_draw_reward_curve", lambda _: None)

    def shown() -> float:
        actions.train_and_show(config, None)
        assert f"/{PICTURE}, " in capsys.readouterr().out
        return picture.stat().st_mtime_ns

    first = shown()
    assert shown() == first, "drawn again"
    picture.write_bytes(picture.read_bytes()[:-40])
    assert (whole := shown()) > first, "a damaged picture was kept"
    (run / checkpoint_name(3)).rename(run / checkpoint_name(5))
    later = TrainResult(run, run / checkpoint_name(5), 3, 5, 0, 1.0, tuple(PROMPTS[:2]))
    monkeypatch.setattr("rlvid.train.launch.train", lambda *_: later)
    monkeypatch.setattr("rlvid.reward.load.trained_reward", _gone)
    assert (without := shown()) > whole, "the picture of an earlier checkpoint was kept"
    assert shown() > without, "a picture without rewards was kept"


def _gone(*_: object) -> None:
    raise RuntimeError("the server is gone")


def test_a_large_model_makes_no_videos_on_a_machine_without_a_gpu(
    trained: tuple[Path, RunConfig], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run, config = trained
    monkeypatch.setattr(actions, "_SMALL", 1000)
    actions.train_and_show(config, None)
    assert not (run / PICTURE).exists()
    said = capsys.readouterr().out
    (line,) = (line for line in said.splitlines() if PICTURE in line)
    assert line.startswith(f"not drawn    {PICTURE}, as this machine has no GPU")
    assert f"rlvid generate {run} PROMPT" in line
    assert f"pictures     {run}/reward.png" in said
    save(Image.new("RGB", (8, 8)), run / PICTURE, "step-000002")
    actions.train_and_show(config, None)
    assert f"older        {run}/{PICTURE} is of step-000002" in capsys.readouterr().out
    monkeypatch.setattr("rlvid.evaluate.load.device", lambda: torch.device("meta"))
    assert actions._is_quick(config.model.path), "a GPU makes them"


@pytest.mark.parametrize(
    ("path", "quick"), [("builtin", True), ("builtin-wan", True), ("random", False), ("random-wan-1.3b", False)]
)
def test_a_cpu_makes_videos_of_the_built_in_models_alone(
    path: str, quick: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rlvid.evaluate.load.device", lambda: torch.device("cpu"))
    assert actions._is_quick(path) is quick


def test_generated_videos_are_written_as_they_are_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, _ = save_run(tmp_path)
    prompts, how = [*PROMPTS[:4], "!"], {"steps": 2, "guidance": 2.0, "lora_scale": 1.0, "seed": 1}
    model = load_run(run).model
    monkeypatch.setattr("rlvid.diffusion.generate._NUMBERS", 2 * math.prod(model.latent_shape))
    whole = generate(model, prompts, seed=1, steps=2, guidance=2.0)
    written, write = list[Tensor](), video.write_mp4
    monkeypatch.setattr(
        video, "write_mp4", lambda path, frames, fps: (written.append(frames), write(path, frames, fps))
    )
    actions.generate_and_show(str(run), prompts, out=tmp_path / "all", **how)
    assert torch.equal(torch.stack(written), whole)
    assert len(list((tmp_path / "all").iterdir())) == 10

    chains, chain = list[int](), denoise

    def interrupted(*given: Any, **more: Any) -> Any:
        chains.append(len(given[1]))
        if len(chains) == 3:
            raise KeyboardInterrupt
        return chain(*given, **more)

    monkeypatch.setattr("rlvid.diffusion.generate.denoise", interrupted)
    monkeypatch.setattr(interrupt, "_received", signal.SIGINT)
    monkeypatch.setattr(interrupt, "_kept", None)
    with pytest.raises(KeyboardInterrupt):
        actions.generate_and_show(str(run), prompts, out=tmp_path / "some", **how)
    assert chains == [2, 2, 1]
    names = {path.name for path in (tmp_path / "all").iterdir() if not path.name.startswith("004")}
    assert {path.name for path in (tmp_path / "some").iterdir()} == names
    assert f"{tmp_path / 'some'} holds 4 of 5 videos" in interrupt.line()


def test_a_negative_prompt_that_is_cut_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run, _ = save_run(tmp_path)
    settings = yaml.safe_load((run / "config.yaml").read_text())
    sampling = settings["sampling"] | {"negative_prompt": "wall " * 30}
    (run / "config.yaml").write_text(yaml.safe_dump(settings | {"sampling": sampling}))

    def made(command: Callable[[], None]) -> bool:
        with pytest.raises(KeyboardInterrupt):
            command()
        return "1 of 1 different negative prompts are longer than 24 tokens" in capsys.readouterr().out

    def generated(guidance: float) -> None:
        out = tmp_path / "out"
        actions.generate_and_show(str(run), ["a dog"], out=out, steps=1, guidance=guidance, lora_scale=1.0, seed=0)

    for place in ("rlvid.diffusion.generate.generate", "rlvid.evaluate.workers.run_evaluation"):
        monkeypatch.setattr(place, _interrupted)
    assert made(lambda: generated(3.0))
    assert not made(lambda: generated(1.0)), "without guidance no branch reads it"
    assert made(lambda: actions.evaluate_and_show([str(run)], steps=[1], videos=2, sets=["in_domain"]))


def _interrupted(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


def test_the_gif_of_a_large_video_is_shrunk_and_the_mp4_is_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, _ = save_run(tmp_path)
    how = {"steps": 1, "guidance": 2.0, "lora_scale": 1.0, "seed": 1}
    for size, expected in {(32, 520): (256, 16), (16, 64): (256, 64)}.items():
        out, frames = tmp_path / f"{size}", torch.rand(1, 2, 3, *size)
        monkeypatch.setattr("rlvid.diffusion.generate.generate", lambda *_, frames=frames, **__: frames)
        actions.generate_and_show(str(run), PROMPTS[:1], out=out, **how)
        (gif,), (mp4,) = out.glob("*.gif"), out.glob("*.mp4")
        with Image.open(gif) as image:
            assert (image.size, image.n_frames) == (expected, 2)
        with av.open(mp4) as container:
            assert next(container.decode(video=0)).to_ndarray(format="rgb24").shape == (*size, 3)

"""The `rlvid` command: one short function a verb; everything heavy is imported inside it."""

import logging
import os
import re
import sys
import time
import warnings
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from rlvid import __version__

app = typer.Typer(
    name="rlvid",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    help="""Fine-tunes text-to-video diffusion models on rewards, on Ray.

Start with [bold]rlvid demo[/bold]: in minutes, and without a GPU, it fine-tunes the built-in model and shows what \
changed.
Then [bold]rlvid train toy method.tau=0.8[/bold] to try settings, and a YAML file of your own instead of \
[bold]toy[/bold].""",
)
console = Console(width=None if sys.stdout.isatty() else 120)
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Settings to change, such as train.steps=50 seed=1."),
]
Address = Annotated[
    str | None, typer.Option(help="Ray cluster to use; default: RAY_ADDRESS, else Ray on this machine.")
]


def _version(asked: bool) -> None:
    if asked:
        _say(f"rlvid {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Options before the verb."""


@app.command()
def train(
    config: Annotated[str, typer.Argument(help="A shipped description (toy) or a YAML file.")],
    overrides: Overrides = None,
    address: Address = None,
) -> None:
    """Fine-tunes a model, or resumes a run of the same name.

    [bold]rlvid train toy[/bold] fine-tunes the built-in model with InstructVideo.
    [bold]rlvid train toy name=short train.steps=20 reward.attenuation=0[/bold] is another run with other settings.
    Start the same command again after an interruption: it goes on from the last checkpoint to the same result.
    """
    from rlvid.config import load_config

    _train(load_config(config, overrides), address)


@app.command()
def evaluate(
    run: Annotated[str, typer.Argument(help="A run's folder, or its name under runs/.")],
    videos: Annotated[int, typer.Option(min=2, max=240, help="Prompts of each set; one video a prompt.")] = 48,
    steps: Annotated[str, typer.Option(help="Numbers of DDIM steps D, separated by commas.")] = "20,50",
    sets: Annotated[
        str, typer.Option(help="Built-in prompt sets, or files (.txt, .jsonl, .csv, .parquet), separated by commas.")
    ] = "in_domain,new_shapes,scenes",
    checkpoint: Annotated[int | None, typer.Option(help="Step of the checkpoint; default: the latest.")] = None,
    clip: Annotated[
        str | None,
        typer.Option(
            help="What measures CLIPSIM and consistency: a folder or hub id of a Hugging Face CLIP, or "
            "ARCHITECTURE:FILE of open_clip; default: builtin-heldout."
        ),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the noise, the same for base and tuned model.")] = 0,
) -> None:
    """Compares a run's model with its base: rewards, CLIPSIM, temporal consistency, motion, the oracle.

    Writes evaluation.md, .csv, .json and .parquet into the run's folder.
    """
    _evaluate(run, _numbers(steps, "--steps"), sets.split(","), videos, checkpoint, seed, clip)


@app.command()
def export(
    run: Annotated[str, typer.Argument(help="A run's folder, or its name under runs/.")],
    out: Annotated[Path, typer.Option(help="Folder for the model; must not exist yet.")],
    checkpoint: Annotated[int | None, typer.Option(help="Step of the checkpoint; default: the latest.")] = None,
    lora_scale: Annotated[
        float, typer.Option(help="How much of what was learned: 0 is the base model, 1 the tuned one.")
    ] = 1.0,
) -> None:
    """Writes a run's model for others: merged in diffusers' layout, the adapter in PEFT's, and a model card.

    [bold]rlvid export toy --out my-model[/bold]; evaluate first, and the card holds the table.
    """
    from rlvid.export import export_run

    folder = export_run(run, out, checkpoint, lora_scale)
    _say(f"model        {folder} (diffusers: TextToVideoSDPipeline.from_pretrained; rlvid: model.path={folder})")
    if (folder / "adapter").is_dir():
        _say(f"adapter      {folder / 'adapter'} (PEFT)")
    _say(f"model card   {folder / 'README.md'}; its licence is yours to fill in")


@app.command()
def generate(
    run: Annotated[str, typer.Argument(help="A run's folder or name; 'builtin' is the base model.")],
    prompt: Annotated[list[str], typer.Argument(help="Prompts, one video each; or one file of prompts.")],
    out: Annotated[Path, typer.Option(help="Folder for the videos.")] = Path("videos"),
    steps: Annotated[int | None, typer.Option(min=1, max=500, help="DDIM steps D; default: the run's.")] = None,
    guidance: Annotated[
        float | None, typer.Option(min=0, help="Classifier-free guidance g; default: the run's.")
    ] = None,
    lora_scale: Annotated[
        float, typer.Option(help="How much of what was learned: 0 is the base model, 1 the tuned one.")
    ] = 1.0,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the noise.")] = 0,
) -> None:
    """Makes videos: an mp4 and a GIF for each prompt.

    [bold]rlvid generate toy "a red star moving left on a navy background"[/bold]
    """
    from rlvid.config import SamplingConfig
    from rlvid.data.prompts import check_prompt, read_prompts
    from rlvid.data.videos import gif_bytes, write_mp4
    from rlvid.evaluate import generate as make
    from rlvid.evaluate import write_whole
    from rlvid.evaluate.run import device, load_run
    from rlvid.models.unet3d import load_model

    is_file = len(prompt) == 1 and Path(prompt[0]).suffix in {".txt", ".jsonl", ".csv", ".parquet"}
    prompts = read_prompts(prompt[0]) if is_file else [check_prompt(p, f"prompt {i + 1}") for i, p in enumerate(prompt)]
    if run == "builtin":
        model, sampling = load_model("builtin", device=device()), SamplingConfig()
    else:
        tuned = load_run(run)
        model, sampling = tuned.use(lora_scale), tuned.config.sampling
    out.mkdir(parents=True, exist_ok=True)
    videos = make.generate(
        model,
        prompts,
        seed=seed,
        steps=sampling.steps if steps is None else steps,
        guidance=sampling.guidance if guidance is None else guidance,
        final=sampling.final,
        progress=_counter("videos"),
    )
    for index, (text, frames) in enumerate(zip(prompts, videos, strict=True)):
        words = re.sub(r"[^a-z0-9]+", "-", text.lower())[:60].strip("-")
        stem = out / (f"{index:03d}-{words}" if words else f"{index:03d}")
        write_mp4(stem.with_suffix(".mp4"), frames, model.fps)
        write_whole(stem.with_suffix(".gif"), gif_bytes(frames, model.fps, max(1, 256 // model.size)))
    _say(f"{len(prompts)} videos (mp4 and gif) in {out}")


@app.command()
def encode(
    source: Annotated[Path, typer.Argument(help="Folder of videos with .txt captions beside them, or a manifest.")],
    out: Annotated[Path, typer.Argument(help="Folder for the encoded clips; give it to training as data.source.")],
    config: Annotated[str, typer.Option(help="Description whose model encodes the clips.")] = "toy",
    workers: Annotated[int, typer.Option(min=1, help="Ray actors, each with a model of its own.")] = 1,
    address: Address = None,
) -> None:
    """Encodes video clips once, for training: frames to latents, captions to embeddings.

    Reads mp4, webm, avi, mov, mkv and gif. A manifest (.csv, .jsonl, .parquet) has the columns video and caption.
    What cannot be read is skipped and named. Start the same command again after an interruption: it goes on from there.
    Then: [bold]rlvid train toy data.source=OUT[/bold]
    """
    from rlvid.config import load_config
    from rlvid.data.encode import encode_folder
    from rlvid.data.videos import find_clips
    from rlvid.models.folders import model_folder
    from rlvid.train.launch import start_ray

    description = load_config(config)
    find_clips(source)  # says at once what is wrong with the source
    model_folder(description.model.path)
    if address is not None:  # else Ray starts when there is something to encode
        start_ray(address)
    report = encode_folder(source, description.model, out, workers=workers, on_progress=_counter("clips"))
    for skipped in report.skipped:
        _say(f"skipped {skipped.path}: {skipped.reason}")
    before = f" ({report.clips - report.encoded} of them before)" if report.encoded < report.clips else ""
    skips = f"{len(report.skipped)} skipped (named in {out / 'report.txt'})"
    _say(f"{report.clips} clips encoded{before} in {out}, {skips}")
    _say(f"next: rlvid train {config} name=mine data.source={out}")


@app.command()
def plan(
    config: Annotated[str, typer.Argument(help="A shipped description (modelscope-hpsv2) or a YAML file.")],
    overrides: Overrides = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Says what a run will cost before anything starts: parameters, work, memory, disk. Needs no weights.

    [bold]rlvid plan modelscope-hpsv2 train.micro_batch=1[/bold]
    """
    import json

    from rlvid.config import load_config
    from rlvid.plan.plan import make_plan
    from rlvid.plan.show import render

    made = make_plan(load_config(config, overrides))
    for each in [json.dumps(made.as_dict(), indent=2)] if as_json else render(made):
        console.print(each, soft_wrap=isinstance(each, str), markup=False, highlight=False)


@app.command()
def demo(overrides: Overrides = None) -> None:
    """Fine-tunes the built-in model with InstructVideo, evaluates it and says where to look; no GPU needed."""
    from rlvid.config import load_config

    config = load_config("toy", ["name=demo", *(overrides or [])])
    began = time.perf_counter()
    folder = _train(config, None)
    trained = time.perf_counter()
    _evaluate(str(folder), [config.sampling.steps], ["in_domain", "new_shapes", "scenes"], 32, None, 0, None)
    ended = time.perf_counter()
    _say(f"training took {trained - began:.0f} s, evaluation {ended - trained:.0f} s")


def _train(config, address):  # type: ignore[no-untyped-def]  # RunConfig is imported late
    from rlvid.data.clips import EncodedClips
    from rlvid.data.sources import encoded_clips
    from rlvid.evaluate.run import load_run, picture_before_after, picture_reward_curve
    from rlvid.train.launch import run_folder, train

    _say(
        f"run {config.name}: {config.method.name} on the reward {config.reward.name!r}, {config.train.steps} steps of "
        f"{config.train.batch_size} videos, {config.train.workers} workers, ZeRO stage {config.train.zero_stage}"
    )
    done = train(config, console, address)
    if done.first_step == done.last_step:
        _say(f"run {config.name} was finished already; set train.steps (or train.max_seconds) higher to go on")
    clips = EncodedClips.open(encoded_clips(config, console))
    tuned, folder = load_run(done.folder), run_folder(config)
    picture_before_after(tuned, list(dict.fromkeys(clips.captions))[:6], folder / "before-after.png", config.seed)
    picture_reward_curve(folder, folder / "reward.png")
    shown = os.path.relpath(folder)
    if done.skipped:
        _say(f"{done.skipped} steps were skipped because their loss or gradient was not finite")
    kind = "adapter" if config.model.train == "lora" else "unet"
    _say(f"{kind:<13}{os.path.relpath(done.checkpoint)}/{kind}")
    _say(f"pictures     {shown}/before-after.png, {shown}/reward.png")
    _say(f"samples      {shown}/archive (Parquet: select * from '{shown}/archive/*.parquet')")
    _say(f"TensorBoard  tensorboard --logdir {os.path.relpath(folder.parent)}")
    _say(f"next         rlvid evaluate {shown}; rlvid export {shown} --out FOLDER")
    return folder


def _evaluate(
    run: str, steps: list[int], sets: list[str], videos: int, checkpoint: int | None, seed: int, clip: str | None
) -> None:
    from rlvid.data.prompts import resolve_prompts
    from rlvid.evaluate.clip import load_clip
    from rlvid.evaluate.evaluate import summarise
    from rlvid.evaluate.run import device, evaluate_run, load_run
    from rlvid.evaluate.tables import compare_all, render_table, write_results
    from rlvid.toy.captions import PROMPT_SETS

    prompts = {
        Path(name).stem: resolve_prompts(name, videos if name in PROMPT_SETS else None)[:videos] for name in sets
    }
    if len(prompts) < len(sets):
        raise ValueError(f"--sets {','.join(sets)}: two sets have one name; rename a file, results are kept by it")
    tuned = load_run(run, checkpoint)
    measure = load_clip(clip or "builtin-heldout", device())
    rows = evaluate_run(tuned, prompts, steps_list=steps, seed=seed, clip=measure, progress=_counter("videos"))
    folder = tuned.checkpoint.folder.parent
    facts = {
        "run": tuned.config.name,
        "step": tuned.checkpoint.step,
        "seed": seed,
        "guidance": tuned.config.sampling.guidance,
        "reward": tuned.config.reward.name,
        "held-out reward": tuned.config.reward.held_out or "builtin-heldout",
        "CLIPSIM and consistency by": clip or "builtin-heldout",
    }
    write_results(folder, rows, base="base", facts=facts)
    for each in steps:
        console.print(render_table(summarise(rows), compare_all(rows, "base"), steps=each))
    _say(f"tables       {os.path.relpath(folder)}/evaluation.md (.csv, .json, .parquet)")


def _say(text: str) -> None:
    """One line, as it is: neither wrapped nor coloured."""
    console.print(text, soft_wrap=True, markup=False, highlight=False)


def _numbers(text: str, option: str) -> list[int]:
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if not numbers or not all(1 <= n <= 500 for n in numbers):
        raise ValueError(f"{option} {text!r}: expected whole numbers from 1 to 500, separated by commas, such as 20,50")
    return list(dict.fromkeys(numbers))


def _counter(unit: str):  # type: ignore[no-untyped-def]
    """A callback that shows how far something is and when it will be done, at most every ten seconds."""
    start = time.perf_counter()
    began, shown, last = [start], [start], [0]

    def show(*news: str | int) -> None:
        *what, done, total = news
        now = time.perf_counter()
        if int(done) < last[0]:  # another count begins
            began[0] = shown[0]
        last[0] = int(done)
        if now - shown[0] > 10:
            shown[0] = now
            left = (now - began[0]) / max(1, int(done)) * (int(total) - int(done))
            _say(f"{' '.join(map(str, what))} {done}/{total} {unit}, {left:.0f} s to go".strip())

    return show


def main() -> None:
    """Runs the command; a user's mistake is one line and exit code 2, never a traceback."""
    warnings.filterwarnings("ignore")
    os.environ.setdefault("TQDM_DISABLE", "1")  # bars of libraries while they load weights
    logging.basicConfig(level=logging.ERROR)
    try:
        app()
    except (ValueError, OSError) as error:
        sys.exit(_complain(error, 2))
    except RuntimeError as error:
        sys.exit(_complain(error, 1))
    except Exception as error:
        if not type(error).__module__.startswith("ray."):  # Ray's own errors; importing it here would slow --help down
            raise
        sys.exit(_complain(error, 1))


def _complain(error: Exception, code: int) -> int:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    text = lines[-1] if "Traceback" in str(error) else " ".join(lines)  # an error from a Ray task ends with its cause
    Console(stderr=True, soft_wrap=True).print(f"error: {text}", markup=False, highlight=False)
    return code


if __name__ == "__main__":
    main()

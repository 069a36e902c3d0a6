"""The `rlvid` command: one short function per verb. Heavy modules are imported inside the functions."""

import logging
import os
import sys
import time
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import typer

from rlvid import __version__
from rlvid.actions import encode_and_show, evaluate_and_show, generate_and_show, report_and_show, train_and_show
from rlvid.credentials import refuse_credentials_in_arguments
from rlvid.fitting.command import reward
from rlvid.study.command import study
from rlvid.terminal import console, fractions, numbers, run_command, say, shell
from rlvid.text import is_utf8

app = typer.Typer(
    name="rlvid",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    help="""Fine-tunes text-to-video diffusion models on rewards, on Ray.

Start with [bold]rlvid demo[/bold]: it fine-tunes the built-in model in minutes, without a GPU, and shows the change.
Then try settings: [bold]rlvid train toy method.tau=0.8[/bold]. Use your own YAML file instead of [bold]toy[/bold].""",
)
app.add_typer(study, name="study")
app.add_typer(reward, name="reward")
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[KEY=VALUE]...", help="Settings to change, such as train.steps=50 seed=1; rlvid keys lists all."
    ),
]
Address = Annotated[
    str | None, typer.Option(help="Address of the Ray cluster; default: RAY_ADDRESS, else Ray on this machine.")
]


def _version(asked: bool) -> None:
    if asked:
        say(f"rlvid {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Reads the options before the command's name."""


@app.command()
def train(
    config: Annotated[str, typer.Argument(help="A shipped config (toy) or a YAML file.")],
    overrides: Overrides = None,
    address: Address = None,
) -> None:
    """Fine-tunes a model, or resumes the run of the same name.

    [bold]rlvid train toy[/bold] fine-tunes the built-in model with InstructVideo.
    [bold]rlvid train toy name=short train.steps=20 reward.attenuation=0[/bold] starts another run with other settings.
    After an interruption, start the same command again: it resumes from the last checkpoint, with the same result.
    """
    from rlvid.config import load_config

    train_and_show(load_config(config, overrides), address)


@app.command()
def evaluate(
    models: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="MODEL...",
            help="Each is LABEL=RUN@STEP*SCALE; only RUN is required: a folder, a name under runs/, or a URI. "
            "With --base: settings to change, KEY=VALUE each.",
        ),
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(help="Measure the base model of this config alone, before any run: a shipped config or a file."),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder for videos and tables; default: the run's own, runs/evaluation for several "
            "runs, or runs/NAME-base with --base."
        ),
    ] = None,
    videos: Annotated[
        int | None,
        typer.Option(
            min=2,
            help="Use at most this many prompts of each set, one video each (see --copies); default: all prompts of "
            "files and of the animal sets, 48 of in_domain, new_shapes and scenes.",
        ),
    ] = None,
    copies: Annotated[int, typer.Option(min=1, max=16, help="Videos of each prompt, each from its own noise.")] = 1,
    steps: Annotated[str, typer.Option(help="Numbers of sampling steps D, separated by commas.")] = "20,50",
    sets: Annotated[
        str | None,
        typer.Option(
            help="Prompt sets, separated by commas: in_domain, new_shapes, scenes (default for the built-in models "
            "and clips); animals, new_animals, non_animals (for any other); files (.txt, .csv, .tsv, .jsonl, "
            ".parquet)."
        ),
    ] = None,
    checkpoint: Annotated[
        int | None, typer.Option(help="Step of the checkpoint for each MODEL without @STEP; default: the latest.")
    ] = None,
    clip: Annotated[
        str | None,
        typer.Option(
            help="CLIP model for CLIPSIM and consistency: a folder or hub id of a Hugging Face CLIP, or "
            "ARCHITECTURE:FILE of open_clip; default: builtin-heldout, which was trained on the built-in world alone."
        ),
    ] = None,
    rewards: Annotated[
        str,
        typer.Option(
            help="Further rewards, NAME=PATH or LABEL:NAME=PATH, separated by commas: "
            "hpsv2=HPS_v2_compressed.pt,imagereward=FOLDER,mine=FILE.py:F."
        ),
    ] = "",
    seed: Annotated[int, typer.Option(min=0, help="Seed of the noise, the same for all models.")] = 0,
    lora_scale: Annotated[
        str,
        typer.Option(help="Scales of the learned change, separated by commas; each gives one model: 0.25,0.5,0.75,1."),
    ] = "1",
    group_seeds: Annotated[
        bool, typer.Option("--group-seeds", help="Also write tables over runs that differ only in their seed.")
    ] = False,
    workers: Annotated[
        int | None,
        typer.Option(min=1, help="Ray actors, each with its own model; default: this process, without Ray."),
    ] = None,
    address: Address = None,
    trust: Annotated[
        bool,
        typer.Option("--trust", help="Run the Python file that the run's settings name as its reward (FILE.py:F)."),
    ] = False,
) -> None:
    """Compares models with their base: rewards, CLIPSIM, temporal consistency, motion, the oracle.

    [bold]rlvid evaluate toy[/bold] compares the run with its base and writes into the run's folder.
    [bold]rlvid evaluate 'toy@all' --steps 20[/bold] takes all checkpoints; [bold]'toy@best*0.5'[/bold] takes the \
guard's best at half scale.
    [bold]rlvid evaluate toy toy-draft 'long=toy-ddpo@300' --out runs/methods[/bold] takes several runs.
    [bold]rlvid evaluate --base toy model.frames=16[/bold] measures the base model of a config.
    Quote a MODEL that contains *, because the shell reads * as a pattern.

    All models start from the same noise. Each video is generated once and kept; another --clip or --rewards scores it
    again. After an interruption, start the same command again: it keeps finished videos and scores.
    """
    from rlvid.config import load_config

    evaluate_and_show(
        [] if base else models or [], base=load_config(base, models) if base else None,
        steps=numbers(steps, "--steps"), sets=None if sets is None else sets.split(","), videos=videos,
        copies=copies, checkpoint=checkpoint, seed=seed, clip=clip, rewards=rewards, out=out, address=address,
        scales=fractions(lora_scale, "--lora-scale"), group_seeds=group_seeds, workers=workers,
        trust=trust,
    )  # fmt: skip


@app.command()
def export(
    run: Annotated[str, typer.Argument(help="A run's folder, or its name under runs/.")],
    out: Annotated[Path, typer.Option(help="Folder for the model; must not exist yet.")],
    checkpoint: Annotated[int | None, typer.Option(help="Step of the checkpoint; default: the latest.")] = None,
    lora_scale: Annotated[
        float, typer.Option(help="Scale of the learned change: 0 is the base model, 1 the tuned one.")
    ] = 1.0,
    evaluation: Annotated[
        Path | None,
        typer.Option(help="Evaluation whose numbers the model card shows; default: the one in the run's folder."),
    ] = None,
) -> None:
    """Exports a run's model: merged weights in diffusers' layout, the adapter in PEFT's layout, and a model card.

    [bold]rlvid export toy --out my-model[/bold]. Run rlvid evaluate first: the card then shows its table.
    """
    from rlvid.export.export import export_run

    folder = export_run(run, out, checkpoint, lora_scale, evaluation)
    setting = shell(f"model.path={folder}")
    pipeline = "WanPipeline" if (folder / "transformer").is_dir() else "TextToVideoSDPipeline"
    say(f"model        {folder} (diffusers: {pipeline}.from_pretrained; rlvid: {setting})")
    if (folder / "adapter").is_dir():
        say(f"adapter      {folder / 'adapter'} (PEFT)")
    say(f"model card   {folder / 'README.md'}; add the licence yourself")


@app.command()
def report(
    targets: Annotated[
        list[str],
        typer.Argument(metavar="RUN_OR_EVALUATION...", help="Folders of evaluations, folders or names of runs."),
    ],
    out: Annotated[
        Path | None, typer.Option(help="Folder for the report; default: report in the evaluation's folder.")
    ] = None,
    moving: Annotated[
        int,
        typer.Option(
            min=0,
            help="Number of prompts whose videos are also written as mp4, WebP and GIF: half have the largest gains, "
            "half the largest losses. The first prompt of each set is written too. 0 writes none.",
        ),
    ] = 6,
) -> None:
    """Writes a report page that opens from disk: tables, curves, film strips, and all videos side by side.

    Run [bold]rlvid evaluate toy[/bold] first. Runs of one method with several seeds share one curve with a band.
    """
    report_and_show(targets, out, moving)


@app.command()
def generate(
    run: Annotated[str, typer.Argument(help="A run's folder or name; 'builtin' and 'builtin-wan' are base models.")],
    prompt: Annotated[list[str], typer.Argument(help="Prompts, one video each; or one file of prompts.")],
    out: Annotated[Path, typer.Option(help="Folder for the videos.")] = Path("videos"),
    steps: Annotated[int | None, typer.Option(min=1, max=500, help="Sampling steps D; default: the run's.")] = None,
    guidance: Annotated[
        float | None, typer.Option(min=0, help="Classifier-free guidance g; default: the run's.")
    ] = None,
    lora_scale: Annotated[
        float, typer.Option(help="Scale of the learned change: 0 is the base model, 1 the tuned one.")
    ] = 1.0,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the noise.")] = 0,
) -> None:
    """Generates videos: an mp4 and a GIF for each prompt.

    [bold]rlvid generate toy "a red star moving left on a navy background"[/bold]
    """
    generate_and_show(run, prompt, out=out, steps=steps, guidance=guidance, lora_scale=lora_scale, seed=seed)


@app.command()
def encode(
    source: Annotated[Path, typer.Argument(help="Folder of videos with .txt captions beside them, or a manifest.")],
    out: Annotated[Path, typer.Argument(help="Folder for the encoded clips; training reads it with data.source=OUT.")],
    config: Annotated[str, typer.Option(help="Config whose model encodes the clips.")] = "toy",
    workers: Annotated[int, typer.Option(min=1, help="Ray actors at most, each with its own model.")] = 1,
    outside: Annotated[
        bool,
        typer.Option("--outside", help="Also read files outside SOURCE that a link, .. or an absolute path points to."),
    ] = False,
    address: Address = None,
) -> None:
    """Encodes video clips once for training: frames to latents, captions to embeddings.

    Reads mp4, webm, avi, mov, mkv and gif. A manifest (.csv, .tsv, .jsonl, .parquet) has the columns video and caption.
    Files that cannot be read are skipped and listed. After an interruption, start the same command again: it resumes.
    Then: [bold]rlvid train toy data.source=OUT[/bold]
    """
    encode_and_show(source, out, config, workers=workers, outside=outside, address=address)


@app.command()
def plan(
    config: Annotated[str, typer.Argument(help="A shipped config (modelscope-hpsv2) or a YAML file.")],
    overrides: Overrides = None,
    measure: Annotated[bool, typer.Option("--measure", help="Run a step here, and measure its seconds.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Counts the cost of a run before it starts: parameters, operations, memory, disk. Needs no weights.

    [bold]rlvid plan modelscope-hpsv2 train.micro_batch=1[/bold]; [bold]rlvid plan toy --measure[/bold] says how long
    the run takes on this machine.
    """
    from rlvid.config import load_config
    from rlvid.plan.plan import make_plan
    from rlvid.plan.show import as_json as shown_as_json
    from rlvid.plan.show import render, render_trial
    from rlvid.plan.trial import run_trial

    def show(parts: Iterable[Any]) -> None:
        for each in parts:
            console.print(each, soft_wrap=isinstance(each, str), markup=False, highlight=False)

    made, trial = make_plan(load_config(config, overrides)), None
    if not as_json:
        show(render(made))
    if measure:
        if not as_json:
            show(["measures a step on this machine ..."])
        trial = run_trial(made.config, made.parts)
    if as_json:
        show([shown_as_json(made, trial)])
    elif trial is not None:
        show(render_trial(made, trial))


@app.command()
def keys(
    words: Annotated[list[str] | None, typer.Argument(help="Words of a key, its meaning, values or method.")] = None,
) -> None:
    """Lists the keys of a run's description: meaning, allowed values, default.

    Where a key has the words in its name, keys that mention them elsewhere are only named.

    [bold]rlvid keys lambda[/bold] finds reward.attenuation; [bold]rlvid keys train.[/bold] lists a section.
    """
    from rich.text import Text

    from rlvid.config.methods import METHODS
    from rlvid.config.reference import find_keys

    wanted = " ".join(words or [])
    found = find_keys(wanted)
    if not found:
        raise ValueError(f"no key mentions {wanted!r}; rlvid keys lists all")
    so_called = [key for key in found if all(word in key.path for word in wanted.lower().split())] or [*found]
    for key in so_called:
        methods = found[key]
        default = "must be given" if key.default is None else f"default {key.default}"
        of = f" (method: {', '.join(methods)})" if 0 < len(methods) < len(METHODS) else ""
        head = Text.assemble((key.path, "bold"), f"{of}: {key.allowed.replace('`', '')}; {default}")
        console.print(head, Text(f"    {key.what}"), sep="\n", soft_wrap=True)
    others = dict.fromkeys(key.path for key in found if key not in so_called)
    if others and "." not in wanted:
        console.print(Text(f"also mentioned by {', '.join(others)}"), soft_wrap=True)


@app.command()
def doctor(
    run: Annotated[str | None, typer.Option(help="Check this run instead: a folder, or a name under runs/.")] = None,
    model: Annotated[str | None, typer.Option(help="Check this model instead: a value of model.path.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Skip the checks that need Ray.")] = False,
    storage: Annotated[str, typer.Option(help="Folder or URI that runs will be written to (output.storage).")] = "runs",
    address: Address = None,
) -> None:
    """Checks the machine, the cluster or a run. Each line is ok, a warning or an error, with the way to correct it.

    Machine: versions, devices, memory, disk, a numerical self-test of the training step on tiny models, and whether the
    attention kernel keeps a matrix of scores.
    Cluster: resources, versions and storage of every node, and whether two workers compute the same as one.
    [bold]rlvid doctor --run toy[/bold] checks a run's checkpoints, archive and TensorBoard.
    [bold]rlvid doctor --model FOLDER[/bold] checks the weights and settings of a model. Exit code 1 after an error.
    """
    from rlvid.doctor.examination import examination, show

    if show(examination(storage, address, run, quick, model)):
        raise typer.Exit(1)


@app.command()
def demo(overrides: Overrides = None) -> None:
    """Fine-tunes the built-in model with InstructVideo, evaluates it, and prints where the results are. No GPU."""
    from rlvid.config import load_config

    config = load_config("toy", ["name=demo", *(overrides or [])])
    began = time.perf_counter()
    folder = train_and_show(config, None)
    trained = time.perf_counter()
    evaluate_and_show([str(folder)], steps=[config.sampling.steps], videos=24, scales=(0.5, 1.0))
    ended = time.perf_counter()
    say(f"training took {trained - began:.0f} s, evaluation {ended - trained:.0f} s")


def main() -> None:
    """Runs the command. A user's error is one line and exit code 2; a signal is one line and exit code 128 + n."""
    warnings.filterwarnings("ignore")
    os.environ.setdefault("TQDM_DISABLE", "1")  # progress bars of libraries that load weights
    logging.basicConfig(level=logging.ERROR, format="%(levelname)s: %(message)s")
    sys.exit(run_command(_run))


def _run() -> None:
    refuse_credentials_in_arguments(sys.argv[1:])
    if wrong := [text for text in sys.argv[1:] if not is_utf8(text)]:
        if sys.getfilesystemencoding() != "utf-8":
            raise ValueError(
                f"argument {wrong[0]}: the locale and PYTHONUTF8=0 make Python read text as "
                f"{sys.getfilesystemencoding()}; set PYTHONUTF8=1"
            )
        raise ValueError(f"argument {wrong[0]}: is not UTF-8; rename the file, or write the text in UTF-8")
    app()


if __name__ == "__main__":
    main()

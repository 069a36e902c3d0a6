"""The bodies of the longer commands, each under its verb. Heavy modules are imported inside the functions."""

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rlvid.interrupt import kept
from rlvid.terminal import console, counter, say, shell, short, sql

if TYPE_CHECKING:
    from rlvid.config import RunConfig
    from rlvid.evaluate.results.rows import Row

_SMALL = 32 * 2**20
"""Bytes of a denoiser whose videos a CPU makes in seconds; those of the built-in models have 8 MB at most."""


def train_and_show(config: "RunConfig", address: str | None) -> Path:
    """Trains or resumes a run, draws its pictures, prints where the results are; returns the run's folder."""
    from rlvid.models.folders import family
    from rlvid.plots.frames import source_of
    from rlvid.runs.find import run_folder
    from rlvid.storage import Mirror, is_uri, run_uri
    from rlvid.train.launch import train

    say(
        f"run {config.name}: {config.method.name} on the reward {config.reward.name!r}, {config.train.steps} steps of "
        f"{config.train.batch_size} videos, {config.train.workers} worker(s), ZeRO stage {config.train.zero_stage}"
    )
    done = train(config, console, address)
    if done.first_step == done.last_step:
        say(f"run {config.name} is already finished; to train longer, increase train.steps (or train.max_seconds)")
    folder = run_folder(config)
    drawn = _draw_before_after(folder, done.checkpoint.name, list(done.prompts), config)
    _draw_reward_curve(folder)
    Mirror(config.output.storage, config.name).push([path.name for path in folder.glob("*.png")])
    storage = config.output.storage
    shown = run_uri(storage, config.name) if is_uri(storage) else short(folder)
    if done.skipped:
        say(f"{done.skipped} steps were skipped because their loss or gradient was not finite")
    kind = "adapter" if config.model.finetune == "lora" else family(config.model.path).denoiser
    say(f"{kind:<13}{shown}/{done.checkpoint.name}/{kind}")
    say(f"pictures     {f'{shown}/before-after.png, ' if drawn else ''}{shown}/reward.png")
    if not drawn:
        say(
            "not drawn    before-after.png, as this machine has no GPU; where there is one: rlvid generate "
            f"{shell(shown)} PROMPT (with --lora-scale 0: the base model)"
        )
        if older := source_of(folder / "before-after.png"):
            say(f"older        {shown}/before-after.png is of {older}")
    say(f"samples      {shown}/archive (Parquet: select * from {sql(f'{shown}/archive/*.parquet')})")
    say(f"TensorBoard  tensorboard --logdir {shell(folder.parent)}")
    trust = " --trust" if config.reward.foreign else ""
    say(f"next         rlvid evaluate {shell(shown)}{trust}; rlvid export {shell(shown)} --out FOLDER")
    return folder


def _draw_before_after(run: Path, checkpoint: str, prompts: list[str], config: "RunConfig") -> bool:
    """Writes ``before-after.png``: the prompts' videos of the base and the tuned model, their trained reward below.

    Between them are those of half of the change: they show what the second half brought, and what it cost.

    Returns:
        Whether the picture of the checkpoint is there: from an earlier call, or drawn now. A large model's is not drawn
        without a GPU, as that would take hours.
    """
    from rlvid.plots.frames import source_of

    if source_of(run / "before-after.png") == checkpoint:
        return True
    if not _is_quick(config.model.path):
        return False
    from rlvid.cluster.reward_actor import ActorCaller
    from rlvid.diffusion.generate import generate
    from rlvid.evaluate.load import device, load_run
    from rlvid.faults import one_line
    from rlvid.plots.frames import draw_models
    from rlvid.reward.load import trained_reward
    from rlvid.reward.video import mean_of_frames

    tuned = load_run(run, prompts=prompts)
    sampling = tuned.config.sampling
    scales = {"Base model": 0.0, "Half of the change": 0.5, "Fine-tuned": 1.0}
    made = {
        name: generate(
            tuned.use(scale),
            prompts,
            seed=config.seed,
            steps=sampling.steps,
            guidance=sampling.guidance,
            final=sampling.final_level,
        )
        for name, scale in scales.items()
    }
    shown, rewards = {name: list(each) for name, each in made.items()}, None
    try:
        reward = trained_reward(tuned.config.reward, device(), ActorCaller)
        rewards = {name: mean_of_frames(reward(each, prompts)).tolist() for name, each in made.items()}
    except (ValueError, RuntimeError) as error:  # a server that is gone costs the numbers, not the pictures
        say(f"the pictures have no rewards: {one_line(error)}")
    source = tuned.checkpoint.folder.name if rewards else ""  # without them, the next start draws it again
    draw_models(run / "before-after.png", prompts, shown, rewards, shown=4, gains=True, source=source)
    return True


def _is_quick(path: str) -> bool:
    """Returns whether this machine makes a few videos of ``model.path`` in minutes at most."""
    from rlvid.evaluate.load import device
    from rlvid.models.folders import STRUCTURES, family, model_folder

    if device().type != "cpu":
        return True
    if path in STRUCTURES:
        return False
    denoiser = model_folder(path) / family(path).denoiser
    return sum(file.stat().st_size for file in denoiser.iterdir()) <= _SMALL


def _draw_reward_curve(run: Path) -> None:
    """Writes ``reward.png``: the trained and the held-out reward of each step."""
    from rlvid.metric_names import REWARD_TAGS
    from rlvid.plots.curves import draw_rewards
    from rlvid.runs.scalars import read_scalars

    scalars = read_scalars(run / "tensorboard", REWARD_TAGS.__contains__)
    steps = sorted({step for values in scalars.values() for step in values})
    series = {
        name: [scalars[tag].get(s, math.nan) for s in steps] for tag, name in REWARD_TAGS.items() if tag in scalars
    }
    draw_rewards(run / "reward.png", steps, series)


def evaluate_and_show(
    models: Sequence[str],
    *,
    base: "RunConfig | None" = None,
    steps: Sequence[int],
    sets: Sequence[str] | None = None,
    videos: int | None = None,
    copies: int = 1,
    checkpoint: int | None = None,
    seed: int = 0,
    clip: str | None = None,
    rewards: str = "",
    scales: Sequence[float] = (1.0,),
    out: Path | None = None,
    group_seeds: bool = False,
    workers: int | None = None,
    address: str | None = None,
    trust: bool = False,
) -> None:
    """Compares models, or measures the ``base`` model of a description alone; prints and writes tables, writes videos.

    ``rlvid evaluate --help`` describes the arguments. ``workers`` Ray actors share the work. Videos and scores that an
    interrupted call finished are reused. Without ``trust``, a Python file that a run's own settings name does not run;
    one that ``base`` names does.
    """
    from rlvid.evaluate.clip import load_clip
    from rlvid.evaluate.command import Store, default_sets, evaluation_folder, prompts_of, write_all
    from rlvid.evaluate.models import base_alone, check_weights, find_models, parse_spec
    from rlvid.evaluate.results.seeds import group_seeds as groups_of
    from rlvid.evaluate.scorers import DEFAULT_CLIP, Scorers, differences, parse_rewards
    from rlvid.evaluate.work import Evaluation
    from rlvid.evaluate.workers import exclusive, run_evaluation
    from rlvid.models.text_limit import model_text_limit, notices
    from rlvid.reward.load import check_reward, check_trust
    from rlvid.storage import is_uri

    notes = list[str]()
    if base and base.reward.floor_is_open:
        base = base.model_copy(update={"reward": base.reward.without_open_floor()})
        notes.append("the reward is scored without its part motion, whose floor (base) a run measures when it starts")
    prompts = prompts_of(sets, videos, notes.append) if sets else {}
    workers = workers or (1 if address else None)
    runs = list(dict.fromkeys(parse_spec(text).run for text in models))
    stored = next((run for run in runs if is_uri(run)), None)
    if workers and stored:
        raise ValueError(
            f"--workers: actors share a folder, and {stored} is in an object store; omit --workers and --address, "
            "or keep runs in a folder that all nodes mount"
        )
    further = parse_rewards(rewards)
    if base and (checkpoint is not None or list(scales) != [1.0]):
        raise ValueError("--base measures a base model alone; omit --checkpoint and --lora-scale")
    compared = base_alone(base) if base else find_models(models, scales=scales, step=checkpoint)
    if base and out is None and (compared[0].run / "config.yaml").is_file():
        raise ValueError(f"{short(compared[0].run)} is a run; give --out FOLDER, or another name with name=NAME")
    config = compared[0].config
    check_trust(config.reward, compared[0].run, trust or base is not None)
    prompts = prompts or prompts_of(default_sets(config), videos, notes.append)
    groups = groups_of(compared) if group_seeds else {}
    check_weights(compared)
    check_reward(config.reward, needs_gradient=False)
    measured = load_clip(clip or DEFAULT_CLIP)  # an error in it comes before any video
    scorers = Scorers.of(config, clip or DEFAULT_CLIP, further)
    limits = [model_text_limit(config.model.path), *scorers.text_limits(measured)]
    notes += notices(limits, [prompt for each in prompts.values() for prompt in each])
    negative = [text for each in compared for text in each.config.sampling.negative_texts(config.sampling.guidance)]
    notes += notices(limits[:1], negative, "negative prompts")  # which no scorer reads
    notes += scorers.cautions(clip is not None)
    evaluation = Evaluation.of(
        compared, prompts, steps_list=steps, folder=evaluation_folder(compared, out), seed=seed, copies=copies,
        scorers=scorers,
    )  # fmt: skip
    names = ", ".join(model.name for model in compared)
    say(f"{len(compared)} model{'s' * (len(compared) > 1)} ({names}), {evaluation.count} videos")
    for line in [*differences(compared), *notes]:
        say(line)
    with exclusive(evaluation), kept(f"the finished videos and scores are in {short(evaluation.folder)}"):
        store = Store(stored if out is None and len(runs) == 1 else None, evaluation)
        rows = run_evaluation(evaluation, workers=workers, address=address, progress=counter("videos"), tell=say)
        written = write_all(evaluation, rows, groups)
        store.send(written)
    _print_tables(rows, compared[0].name, steps)
    _say_where(store.uri or short(evaluation.folder), short(evaluation.folder), written, alone=len(compared) == 1)


def _print_tables(rows: "Sequence[Row]", base: str, steps: Sequence[int]) -> None:
    """Prints the scores and the gains over the base, a table for each number of sampling steps."""
    from rlvid.evaluate.results.summary import compare_all, summarise
    from rlvid.evaluate.tables.pages import render_table

    comparisons, summaries = compare_all(rows, base), summarise(rows)
    for each in steps:
        console.print(render_table(summaries, comparisons, steps=each, width=console.width))


def _say_where(shown: str, here: str, written: Sequence[Path], *, alone: bool) -> None:
    """Prints where an evaluation's files are, in a store or ``here``, and the next commands."""
    names = {path.name for path in written}
    if "tradeoff.png" in names:
        say(f"trade-off    {shown}/tradeoff.png (rewards and motion for each --lora-scale)")
    if "seeds.md" in names:
        say(f"over seeds   {shown}/seeds.md (.csv, .tex)")
    if "versus.md" in names:
        say(f"pairwise     {shown}/versus.md (.csv, .tex): every pair of models, over all prompts")
    say(f"tables       {shown}/evaluation.md (.csv, .json, .tex, .parquet), comparison.csv (.parquet)")
    say(f"paper tables {shown}/table-a1.md and table-a2.md (.csv, .tex)")
    say(f"videos       {shown}/videos (Parquet: select * from {sql(f'{shown}/videos/*.parquet')})")
    study = "" if alone else f"; rlvid study serve {shell(here)}"  # which compares models
    say(f"next         rlvid report {shell(here)}{study}")  # neither takes a URI


def report_and_show(targets: list[str], out: Path | None, moving: int) -> Path:
    """Writes the report page of evaluations and runs, and prints where it is; returns its folder."""
    from rlvid.report.write import write_report

    made = write_report(targets, out, moving=moving, progress=counter("videos"))
    for note in made.notes:
        say(f"note         {note}")
    say(f"report       {short(made.folder / 'index.html')} ({made.videos} videos, {made.size / 2**20:.1f} MiB)")
    return made.folder


def generate_and_show(
    run: str,
    prompts: list[str],
    *,
    out: Path,
    steps: int | None,
    guidance: float | None,
    lora_scale: float,
    seed: int,
) -> None:
    """Generates a video for each prompt, or each of a file of them, writes it as mp4 and GIF, and prints where.

    The videos that are made at once are written before the next ones are made, so they alone are in memory.
    ``rlvid generate --help`` describes the arguments.
    """
    from rlvid.config.model import BUILT_IN, ModelConfig, SamplingConfig
    from rlvid.data.prompts import check_prompt, is_prompt_file, read_prompts
    from rlvid.diffusion.generate import AT_ONCE, generate, videos_at_once
    from rlvid.evaluate.load import device, load_run
    from rlvid.files import write_atomic
    from rlvid.models.load import load_video_model
    from rlvid.models.text_limit import model_text_limit, notices
    from rlvid.plots.video import GIF_SIDE, gif_bytes, shrunk, write_mp4

    if len(prompts) == 1 and is_prompt_file(prompts[0]):
        prompts = read_prompts(prompts[0])
    else:
        prompts = [check_prompt(text, f"prompt {i + 1}") for i, text in enumerate(prompts)]
    if run in BUILT_IN:
        path, model, sampling = run, load_video_model(ModelConfig(path=run), device=device()), SamplingConfig()
    else:
        tuned = load_run(run, prompts=prompts)
        path, model, sampling = tuned.config.model.path, tuned.use(lora_scale), tuned.config.sampling
    guidance = sampling.guidance if guidance is None else guidance
    limits, negative = [model_text_limit(path)], sampling.negative_texts(guidance)
    for line in [*notices(limits, prompts), *notices(limits, negative, "negative prompts")]:
        say(line)
    out.mkdir(parents=True, exist_ok=True)
    size, progress = videos_at_once(model.latent_shape, AT_ONCE), counter("videos")
    written = 0
    with kept(lambda: f"{out} holds {written} of {len(prompts)} videos"):
        for start in range(0, len(prompts), size):
            part = prompts[start : start + size]
            videos = generate(
                model,
                part,
                seed=seed,
                steps=sampling.steps if steps is None else steps,
                guidance=guidance,
                final=sampling.final_level,
                first_index=start,
            )
            progress(start + len(part), len(prompts))
            for index, (text, frames) in enumerate(zip(part, videos, strict=True), start):
                words = re.sub(r"[^a-z0-9]+", "-", text.lower())[:60].strip("-")
                stem = out / (f"{index:03d}-{words}" if words else f"{index:03d}")
                write_mp4(stem.with_suffix(".mp4"), frames, model.fps)
                small = shrunk(frames[None], GIF_SIDE)[0]
                scale = GIF_SIDE // max(small.shape[-2:])
                write_atomic(stem.with_suffix(".gif"), gif_bytes(small, model.fps, scale))
                written += 1
            del videos, frames  # else they would stand beside the next ones
    say(f"{len(prompts)} videos (mp4 and gif) in {out}")


def encode_and_show(source: Path, out: Path, config: str, *, workers: int, outside: bool, address: str | None) -> None:
    """Encodes video clips for training, and prints what was skipped, where they are, and the next command.

    ``rlvid encode --help`` describes the arguments.
    """
    from rlvid.cluster.connect import start_ray
    from rlvid.config import load_config
    from rlvid.data.encode import encode_folder
    from rlvid.data.find import find_clips
    from rlvid.models.load import check_model
    from rlvid.models.video_shape import resolved_shape

    if stored := [str(place) for place in (source, out) if re.match(r"\w+:/", str(place))]:  # a Path has one slash
        raise ValueError(
            f"{stored[0]} is in a store, and rlvid encode reads and writes folders; encode into a folder, copy that "
            "into the store, and train with data.source=s3://BUCKET/FOLDER"
        )
    model = load_config(config).model
    find_clips(source.resolve(), outside=outside)  # an error in the source comes before the rest
    check_model(model.path)
    resolved_shape(model)
    if address is not None:  # else Ray starts when there is something to encode
        start_ray(address)
    report = encode_folder(source, model, out, workers=workers, on_progress=counter("clips"), outside=outside)
    for line in [*(f"skipped {skipped}" for skipped in report.skipped), *report.notes]:
        say(line)
    before = f" ({report.clips - report.encoded} of them by an earlier call)" if report.encoded < report.clips else ""
    skips = f"{len(report.skipped)} skipped" + (f" (named in {out / 'report.txt'})" if report.skipped else "")
    say(f"{report.clips} clips encoded{before} in {out}, {skips}")
    say(f"next: rlvid train {shell(config)} name=mine {shell(f'data.source={out}')}")

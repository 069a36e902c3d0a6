"""What `rlvid train` and `rlvid evaluate` do and say; everything heavy is imported inside the functions."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rlvid.terminal import console, counter, say, short

if TYPE_CHECKING:
    from rlvid.config import RunConfig


def train_and_show(config: "RunConfig", address: str | None) -> Path:
    """Trains or resumes a run, draws its pictures, says where everything is; returns the run's folder."""
    from rlvid.data.clips import EncodedClips
    from rlvid.data.sources import encoded_clips
    from rlvid.data.storage import Mirror, is_uri, run_uri
    from rlvid.evaluate.run import load_run, picture_before_after, picture_reward_curve
    from rlvid.train.launch import run_folder, train

    say(
        f"run {config.name}: {config.method.name} on the reward {config.reward.name!r}, {config.train.steps} steps of "
        f"{config.train.batch_size} videos, {config.train.workers} workers, ZeRO stage {config.train.zero_stage}"
    )
    done = train(config, console, address)
    if done.first_step == done.last_step:
        say(f"run {config.name} was finished already; set train.steps (or train.max_seconds) higher to go on")
    clips = EncodedClips.open(encoded_clips(config, console))
    tuned, folder = load_run(done.folder), run_folder(config)
    picture_before_after(tuned, list(dict.fromkeys(clips.captions))[:6], folder / "before-after.png", config.seed)
    picture_reward_curve(folder, folder / "reward.png")
    Mirror(config.output.storage, config.name).send("*.png")
    storage = config.output.storage
    shown = run_uri(storage, config.name) if is_uri(storage) else short(folder)
    if done.skipped:
        say(f"{done.skipped} steps were skipped because their loss or gradient was not finite")
    kind = "adapter" if config.model.train == "lora" else "unet"
    say(f"{kind:<13}{shown}/{done.checkpoint.name}/{kind}")
    say(f"pictures     {shown}/before-after.png, {shown}/reward.png")
    say(f"samples      {shown}/archive (Parquet: select * from '{shown}/archive/*.parquet')")
    say(f"TensorBoard  tensorboard --logdir {short(folder.parent)}")
    say(f"next         rlvid evaluate {shown}; rlvid export {shown} --out FOLDER")
    return folder


def evaluate_and_show(
    run: str,
    steps: list[int],
    sets: list[str],
    videos: int,
    checkpoint: int | None,
    seed: int,
    clip: str | None,
    scales: Sequence[float] = (1.0,),
    workers: int | None = None,
    address: str | None = None,
) -> None:
    """Compares a run's model with its base, writes the tables into the run's folder and prints them.

    ``scales`` says how much of what was learned each tuned model has. With ``workers``, so many Ray actors share the
    work. What was finished before an interruption is not made again.
    """
    from rlvid.data.prompts import resolve_prompts
    from rlvid.data.storage import Mirror, is_uri, split_uri
    from rlvid.evaluate.clip import load_clip
    from rlvid.evaluate.evaluate import summarise
    from rlvid.evaluate.portions import Evaluation, run_evaluation
    from rlvid.evaluate.run import find_run, scale_name
    from rlvid.evaluate.tables import compare_all, render_table, write_results
    from rlvid.evaluate.tradeoff import draw_tradeoff
    from rlvid.toy.captions import PROMPT_SETS

    prompts = {
        Path(name).stem: resolve_prompts(name, videos if name in PROMPT_SETS else None)[:videos] for name in sets
    }
    workers = workers or (1 if address else None)
    if workers and is_uri(run):
        raise ValueError(
            f"--workers: actors share a folder, and {run} is in a store of objects; leave --workers and --address out, "
            "or keep runs in a folder that all nodes mount"
        )
    if len(prompts) < len(sets):
        raise ValueError(f"--sets {','.join(sets)}: two sets have one name; rename a file, results are kept by it")
    config, found = find_run(run, checkpoint)
    measure, method = clip or "builtin-heldout", config.method.name
    named = {scale_name(method, scale): scale for scale in scales}
    everything = {"base": 0.0} | named
    evaluation = Evaluation.of(config, found, prompts, steps_list=steps, scales=everything, seed=seed, clip=measure)
    if workers:
        load_clip(measure)  # says what is wrong with it before Ray starts
    rows = run_evaluation(evaluation, workers=workers, address=address, progress=counter("videos"))
    folder = evaluation.run
    facts = {
        "run": config.name,
        "step": found.step,
        "seed": seed,
        "guidance": config.sampling.guidance,
        "reward": config.reward.name,
        "held-out reward": config.reward.held_out or "builtin-heldout",
        "CLIPSIM and consistency by": clip or "builtin-heldout",
    }
    write_results(folder, rows, base="base", facts=facts)
    if len(scales) > 1:
        draw_tradeoff(folder / "tradeoff.png", summarise(rows), named)
    if is_uri(run):
        for files in ("evaluation.*", "tradeoff.png"):
            Mirror(*split_uri(run)).send(files)
    evaluation.forget()  # not before all of it is where it belongs
    for each in steps:
        console.print(render_table(summarise(rows), compare_all(rows, "base"), steps=each))
    shown = run if is_uri(run) else short(folder)
    if len(scales) > 1:
        say(f"trade-off    {shown}/tradeoff.png (rewards and motion for each --lora-scale)")
    say(f"tables       {shown}/evaluation.md (.csv, .json, .parquet)")


def report_and_show(targets: list[str], out: Path | None, moving: int) -> Path:
    """Writes the report page of evaluations and runs, and says where it is; returns its folder."""
    from rlvid.report.report import write_report

    made = write_report(targets, out, moving=moving, progress=counter("videos"))
    for note in made.notes:
        say(f"note         {note}")
    say(f"report       {short(made.folder / 'index.html')} ({made.videos} videos, {made.size / 2**20:.1f} MiB)")
    return made.folder

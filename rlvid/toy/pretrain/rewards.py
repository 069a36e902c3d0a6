"""Stage 3: CLIPs of the built-in world, and rewards that are fitted to votes, in rounds.

All but the CLIPs is made by the commands that users have, each as a process of its own: the maker of votes,
``rlvid reward fit`` and ``rlvid train``. In the first round the oracle votes on rendered pairs and on samples of the
base model. Before each further round, models are fine-tuned on the rewards of the round before, some of them at four
times the learning rate, so that they over-optimise. The oracle votes on their videos too, and on further rendered
pairs. The rewards are fitted again, to all votes so far. After the last round models are fine-tuned once more, and the
rewards that judge are fitted to votes on their videos, and on rendered pairs of their own.

The intermediate files are in a folder of their own. What is there already is not made again.
"""

import hashlib
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from rlvid.files import atomic_folder, write_atomic
from rlvid.reward.fit.folder import save_clip
from rlvid.reward.fit.seal import CONFIG, HEAD, SPEC, seal
from rlvid.toy.pretrain.common import log, scaled
from rlvid.toy.pretrain.contrastive import fit_clip, structure
from rlvid.toy.pretrain.plan import (
    CLIP_STEPS,
    CLIPS,
    DEVIATION,
    HELD_OUT,
    JUDGES,
    MEAN,
    PER_PROMPT,
    PLAN_DIGEST,
    PROMPTS,
    REWARDS,
    ROUNDS,
    RUN,
    TUNINGS,
    VOTES,
    RewardPlan,
    TuningPlan,
    VotesPlan,
)
from rlvid.toy.pretrain.text import build_tokenizer

_KEPT = (SPEC, CONFIG, "model.safetensors", HEAD)
"""Files of a reward that scoring reads, beside the tokenizer's."""
_FEW_VOTES = 20
_TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt")

REPORT = "report.json"

Run = Callable[[Sequence[str]], None]
"""Runs a module, with its arguments, and raises an error where it fails."""


@dataclass(frozen=True)
class Step:
    """A module with its arguments, and the file or folder that is there once it is done.

    Attributes:
        command: module and arguments.
        makes: file or folder that the command makes at its very end.
        mark: whether it makes no such file, and an empty one is written for it.
    """

    command: tuple[str, ...]
    makes: Path
    mark: bool = False


def run_module(command: Sequence[str]) -> None:
    """Runs a module, with its arguments, in a process of its own.

    Raises:
        subprocess.CalledProcessError: it failed; its own messages are on the terminal.
    """
    subprocess.run([sys.executable, "-m", *command], check=True)


@dataclass(frozen=True)
class Round:
    """Tunings on the rewards of the round before, votes, and fits.

    Attributes:
        number: from 1 on, for its seeds.
        folder: of all that it makes.
        trained: folder of the rewards that models are fine-tuned on; None in the first round, which has base samples.
        plans: rewards that it fits.
        share: of the rendered pairs that it draws; the others are of other rounds.
        before: folder of the round before, whose votes come first and whose rewards are gone on with, or None.
        last: whether it fits for as many steps as planned, or for the early ones.
    """

    number: int
    folder: Path
    trained: Path | None
    plans: tuple[RewardPlan, ...]
    share: float = 1.0
    before: Path | None = None
    last: bool = True


@dataclass(frozen=True)
class Maker:
    """Makes the rewards of the built-in world.

    Attributes:
        out: folder of the weights; its model is there already.
        work: folder of CLIPs, votes, runs and rewards of all rounds.
        seed: of everything.
        scale: share of all steps and counts.
        device: where the CLIPs are trained.
        run: runs a command.
    """

    out: Path
    work: Path
    seed: int
    scale: float
    device: torch.device
    run: Run = run_module

    def make_rewards(self, rounds: int) -> None:
        """Makes the rewards to train on, in rounds of votes and fits, unless they are there; they replace older ones.

        Raises:
            ValueError: ``work`` is of another seed, scale, model, plan or number of rounds.
        """
        self._make(REWARDS, self.rounds(rounds), {"rounds": rounds})

    def make_judges(self) -> None:
        """Makes the rewards to judge with, unless they are there; needs the ones to train on."""
        self._make(JUDGES, [self.judging()], {})

    def rounds(self, count: int) -> list[Round]:
        """Returns the rounds of the rewards that are trained on."""
        folders = [self.work / f"round-{number}" for number in range(1, count + 1)]
        earlier = [None, *folders]
        return [
            Round(place + 1, folder, earlier[place], REWARDS, 1 / count, earlier[place], place + 1 == count)
            for place, folder in enumerate(folders)
        ]

    def judging(self) -> Round:
        """Returns the round of the rewards that judge: its models are fine-tuned on the finished ones."""
        return Round(ROUNDS + 1, self.work / "judges", self.out, JUDGES)

    def steps(self, each: Round) -> Iterator[Step]:
        """Yields the commands of a round, in order."""
        runs: list[str] = []
        for tuning in TUNINGS if each.trained else ():
            yield self._tuning(tuning, each)
            run = str(each.folder / tuning.name)
            runs += [run if size == 1 else f"{run}*{size:g}" for size in tuning.scales]
        asked = [plan for plan in VOTES if plan.name in {reward.votes for reward in each.plans}]
        for seed, tuned in dict.fromkeys((plan.seed, plan.tuned) for plan in asked):
            yield self._samples(each, seed, runs if tuned else [])
        for votes in asked:
            yield self._votes(votes, each)
        for reward in each.plans:
            yield self._fit(reward, each)

    def _make(self, plans: Sequence[RewardPlan], rounds: Sequence[Round], made_with: dict[str, Any]) -> None:
        if all((self.out / plan.name / REPORT).is_file() for plan in plans):
            return
        model = digest(self.out / "model")
        made_with = {"seed": self.seed, "scale": self.scale, "model": model, "plan": PLAN_DIGEST, **made_with}
        check_work(self.work, made_with)
        self._make_clips({plan.begins_with for plan in plans})
        for step in (step for each in rounds for step in self.steps(each)):
            if not step.makes.exists():
                log.info("python -m %s", " ".join(step.command))
                step.makes.parent.mkdir(parents=True, exist_ok=True)
                self.run(step.command)
                if step.mark:
                    step.makes.touch()
        for plan in plans:
            copy_reward(rounds[-1].folder / plan.name, self.out / plan.name)

    def _make_clips(self, names: Container[str]) -> None:
        tokenizer = build_tokenizer()
        for plan in CLIPS:
            if plan.name in names and not (folder := self.work / plan.name).is_dir():
                steps = scaled(CLIP_STEPS, self.scale)
                clip = fit_clip(plan.vision, plan.degraded, self.seed + plan.seed, steps, tokenizer, self.device)
                with atomic_folder(folder) as part:
                    save_clip(part, clip, structure(plan.vision, len(tokenizer)), tokenizer)

    def _tuning(self, plan: TuningPlan, each: Round) -> Step:
        assert each.trained is not None
        command = (
            "rlvid", "train", plan.description, f"name={plan.name}", f"output.storage={each.folder}",
            f"seed={self.seed + each.number}", f"model.path={self.out / 'model'}", "model.frames=8",
            "reward.name=fitted", f"reward.path={each.trained / plan.reward}", "reward.held_out=null",
            f"train.steps={scaled(plan.steps, self.scale)}", *RUN, *plan.settings,
        )  # fmt: skip
        return Step(command, each.folder / f"{plan.name}.trained", mark=True)

    def _samples(self, each: Round, votes_seed: int, runs: Sequence[str]) -> Step:
        """Returns the command of the votes on videos of models."""
        made, scale = each.folder / f"samples-{votes_seed}.parquet", self.scale
        command = (
            "rlvid.fitting.votes", str(made), "--rendered", "0", "--model", str(self.out / "model"),
            "--prompts", str(scaled(PROMPTS, scale, 8)), "--per-prompt", str(scaled(PER_PROMPT, scale, 3)),
            "--steps", str(scaled(10, min(1.0, 10 * scale))), "--seed", str(self.seed + 10 * votes_seed + each.number),
            *(("--runs", *runs) if runs else ()),
        )  # fmt: skip
        return Step(command, made)

    def _votes(self, plan: VotesPlan, each: Round) -> Step:
        """Returns the command of all votes: those of the round before, on videos of models, on new rendered pairs."""
        name, share = f"{plan.name}.parquet", self.scale * each.share
        rendered = [f"{kind}={scaled(count, share, 8)}" for kind, count in plan.rendered.items() if count]
        earlier = [str(each.before / name)] if each.before else []
        command = (
            "rlvid.fitting.votes", str(each.folder / name), "--add", *earlier,
            str(each.folder / f"samples-{plan.seed}.parquet"), "--rendered", *rendered,
            "--footage", f"{plan.footage:g}", "--seed", str(self.seed + 10 * plan.seed + each.number),
        )  # fmt: skip
        return Step(command, each.folder / name)

    def _fit(self, plan: RewardPlan, each: Round) -> Step:
        made, begins_with = each.folder / plan.name, each.folder / plan.begins_with
        if plan.begins_with in {clip.name for clip in CLIPS}:
            begins_with = each.before / plan.name if each.before else self.work / plan.begins_with
        steps, held_out = plan.steps if each.last else plan.early, min(0.4, HELD_OUT / self.scale)
        command = (
            "rlvid", "reward", "fit", str(each.folder / f"{plan.votes}.parquet"), "--out", str(made),
            "backbone.name=clip", f"backbone.path={begins_with}", f"seed={self.seed + plan.seed}", f"mean={MEAN}",
            f"deviation={DEVIATION}", f"steps={scaled(steps, self.scale)}", f"held_out={held_out:g}", *plan.settings,
        )  # fmt: skip
        return Step(command, made)


def digest(model: Path) -> str:
    """Returns sixteen hex digits over a model's weights; those of a model that is not there yet are all alike."""
    found = hashlib.sha256()
    for path in sorted(model.rglob("*.safetensors")):
        found.update(path.read_bytes())
    return found.hexdigest()[:16]


def check_work(work: Path, made_with: dict[str, Any]) -> None:
    """Keeps what a folder is made with; refuses one that was made otherwise."""
    plan = work / "plan.json"
    before = json.loads(plan.read_text(encoding="utf-8")) if plan.is_file() else {}
    if changed := [key for key in made_with if before.get(key, made_with[key]) != made_with[key]]:
        raise ValueError(f"{work}: was made with another {changed[0]}; delete it, or name another --work")
    work.mkdir(parents=True, exist_ok=True)
    write_atomic(plan, json.dumps(before | made_with).encode())


def copy_reward(fitted: Path, folder: Path) -> None:
    """Copies the files of a fitted reward that scoring reads, and the numbers of its report, without local paths.

    Weights become float16, half the size; scoring computes in float32.
    """
    report = json.loads((fitted / REPORT).read_text(encoding="utf-8"))
    with atomic_folder(folder) as part:
        for path in (fitted / name for name in (*_KEPT, *_TOKENIZER)):
            if path.suffix == ".safetensors" and path.is_file():
                weights = load_file(path).items()  # single numbers, such as the scale of cosines, cost nothing
                save_file({name: each.half() if each.dim() else each for name, each in weights}, part / path.name)
            elif path.is_file():
                shutil.copyfile(path, part / path.name)
        seal(part, json.loads((part / SPEC).read_text(encoding="utf-8")))
        numbers = {key: report[key] for key in ("pairs", "axes", "base")}
        (part / REPORT).write_text(json.dumps(numbers, indent=2) + "\n", encoding="utf-8")


def accuracy_of_reward(folder: Path) -> dict[str, float]:
    """Returns how often a reward agrees with votes on prompts that it was not fitted on: in all, and by kind.

    A share of few votes is left out, as a reward without votes has it.
    """
    axes = json.loads((folder / REPORT).read_text(encoding="utf-8"))["axes"]
    found = dict[str, float]()
    for axis, numbers in axes.items():
        shares = {axis: numbers["held_out"]["accuracy"], **numbers["held_out"]["kinds"]}
        known = {name: share["share"] for name, share in shares.items() if share["pairs"] >= _FEW_VOTES}
        found |= {f"agrees with votes, {name}": share for name, share in known.items()}
    return found

"""A worker of a fit: its shares of the batches, the steps, the state to resume from, and the scores at the end."""

import logging
import math
import shutil
import time
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, distributed

from rlvid.config.fit import FitConfig
from rlvid.data.order import clip_indices
from rlvid.data.training_set import Source
from rlvid.files import atomic_file, write_error
from rlvid.fitting.backbone import begin, scorer_of, spec_of
from rlvid.fitting.looks import LOOKS, Looks
from rlvid.reward.builtin import BUILTIN
from rlvid.reward.fit.folder import save_fitted
from rlvid.reward.fit.optimise import Fitter, Objective, Pairs, Schedule, as_input, scores
from rlvid.train.checkpoint import checkpoint_write_errors
from rlvid.train.engine import load_plain
from rlvid.train.metrics import TensorBoard

log = logging.getLogger("rlvid.fitting")
STATE, RESULT = "state.pt", "fitted"
"""In the folder of a fit: the state after its last checkpoint, and the fitted reward."""
FITTED = 1000
"""Fitted pairs, evenly chosen, that are scored at the end beside the held-out ones."""
_SIDES = ("caption", "a", "b", "shape")


@dataclass(frozen=True)
class FitJob:
    """What the driver sends to each worker; paths are absolute.

    Attributes:
        config: of the fit.
        axes: of votes that are fitted.
        pairs: the folder of rows that ``rlvid.fitting.prepare.write_pairs`` made.
        work: folder of the fit, which all workers see.
        use_gpu: whether each worker has a GPU.
    """

    config: FitConfig
    axes: tuple[str, ...]
    pairs: Source
    work: Path
    use_gpu: bool


@dataclass(frozen=True)
class Scores:
    """What worker 0 gives the driver at the end of a fit.

    Attributes:
        rows_N: the rows of the folder that were scored: all held-out pairs, and up to ``FITTED`` others.
        differences_NA: of the raw scores of ``a`` and ``b`` of each.
        mean_A: of the raw scores of base samples.
        deviation_A: of the same.
        samples: how many these are; a sample counts for each pair that it is in.
        seconds: of this start's steps.
    """

    rows_N: list[int]
    differences_NA: list[list[float]]
    mean_A: list[float]
    deviation_A: list[float]
    samples: int
    seconds: float


class FitWorker:
    """One of W processes that fit together, and take the same steps.

    Args:
        job: of the fit.
        rank: of this worker.
        world: W.
        tell: is called with the numbers of each step.
        note: is called with lines for the console.
        ended: asks, after each step of worker 0, whether to save and end.
    """

    def __init__(
        self,
        job: FitJob,
        rank: int = 0,
        world: int = 1,
        tell: Callable[[dict[str, float]], Any] = lambda latest: None,
        note: Callable[[str], Any] = lambda line: None,
        ended: Callable[[], bool] = lambda: False,
    ) -> None:
        config = job.config
        self.job, self.config, self.rank, self.world = job, config, rank, world
        self.tell, self.note, self.ended = tell, note, ended
        self.device = torch.device("cuda", torch.cuda.current_device()) if job.use_gpu else torch.device("cpu")
        self.rows = job.pairs.open()
        sides = zip(self.rows.column("held_out"), self.rows.column("a_base"), self.rows.column("b_base"), strict=True)
        self.held_out_N, *self.base_2N = (torch.tensor(each) for each in zip(*sides, strict=True))
        self.fitted = (~self.held_out_N).nonzero().flatten().tolist()
        self.beginning = begin(config)
        published = config.backbone.name not in BUILTIN
        self.scorer = scorer_of(config, self.beginning, len(job.axes), recompute=published).to(self.device)
        self.fitter = Fitter(
            self.scorer,
            Objective(config.preferences, config.contrastive, seed=config.seed),
            Schedule(config.lr, config.warmup, config.steps),
            batch_size=config.batch_size,
            group=config.group,
            decay=config.average,
            clip_norm=config.clip_norm,
        )
        seen = any(each.requires_grad for each in self.scorer.backbone.clip.visual.parameters())
        self.looks = None if seen else Looks(job.work / LOOKS, len(self.fitted))
        self.first_step = self._restore()
        self._began = time.perf_counter()

    def run(self) -> bool:
        """Takes the steps that are left, and saves the state at times; returns whether the last one was taken."""
        steps, every, done = self.config.steps, self.config.checkpoint_every, self.first_step
        if done < steps:
            self._look()
        self._began = time.perf_counter()
        board = TensorBoard(self.job.work / "tensorboard", self.first_step) if self.rank == 0 else None
        for step in range(self.first_step, steps):
            started = time.perf_counter()
            share = self.share(step)
            total = self.fitter.gradient(share)
            asked = total.new_tensor(float(self.rank == 0 and self.ended()))  # so that all end at the same step
            self._add_up(total)
            self._add_up(asked)
            loss, norm = self.fitter.apply(step, total)
            if not math.isfinite(norm):
                self._explain(step)
            seconds = time.perf_counter() - started
            if board is not None:
                numbers = {"loss": loss, "gradient_norm": norm, "lr": self.fitter.schedule.rate(step)}
                board.scalars(step, {f"fit/{name}": value for name, value in numbers.items()})
            self._tell(step, loss, seconds)
            done = step + 1
            if (stop := bool(asked > 0)) or done % every == 0 or done == steps:
                self._save(done)
                if board is not None:
                    board.flush()
            if stop:
                break
        if board is not None:
            board.close()
        return done == steps

    def share(self, step: int) -> Pairs:
        """Returns this worker's pairs of a batch: every W-th of them."""
        size = self.config.batch_size
        serials = [step * size + place for place in range(self.rank, size, self.world)]
        draws = clip_indices(serials, len(self.fitted), self.config.seed).tolist()
        places = [self.fitted[draw] for draw in draws]
        rows = self.rows.rows(places, ("caption", "preference") if self.looks else (*_SIDES, "preference"))
        preference_PA = torch.tensor(rows["preference"].to_pylist(), dtype=torch.float32).to(self.device)
        if self.looks:
            a, b = self.looks.read(draws).to(self.device).unbind(1)
            return Pairs(serials, self._tokens(rows), a, b, preference_PA)
        return Pairs(serials, *self._media(rows), preference_PA)

    def _look(self) -> None:
        """Lets a fixed image tower look at all pairs, divided among the workers; every worker must call it."""
        if self.looks is None:
            return
        began, wrong, missing = time.perf_counter(), "", self.looks.missing()
        self._gather(0)  # nobody makes a file before all have seen which are missing
        own = missing[self.rank :: self.world]
        for done, number in enumerate(own):
            try:
                self.looks.make(number, self._looks_of)
            except ValueError as error:
                wrong = str(error)
                break
            except OSError as error:
                wrong = str(write_error("a file of features", error, f"make room in {self.job.work}"))
                break
            if done == 1:  # the first one was slow
                minutes = max(1, round((time.perf_counter() - began) / 2 * (len(own) - 2) / 60))
                self.note(f"features of {self.looks.count} pairs are computed once: some {minutes} min")
        if wrong := next(filter(None, self._gather(wrong)), ""):
            raise ValueError(wrong)

    def _gather(self, own: Any) -> list[Any]:
        """Returns what every worker gives."""
        everyone = [own]
        if distributed.is_initialized():
            everyone = [None] * self.world
            distributed.all_gather_object(everyone, own)
        return everyone

    def _looks_of(self, fitted: Sequence[int]) -> Tensor:
        places = [self.fitted[each] for each in fitted]
        _, a_PFCHW, b_PFCHW = self._media(rows := self.rows.rows(places, (*_SIDES, "source")))
        with torch.no_grad():
            looks = [self.scorer.backbone.look(as_input(self.scorer, each)).half() for each in (a_PFCHW, b_PFCHW)]
        found = torch.stack(looks, 1)
        if not bool((fine_P := found.isfinite().flatten(1).all(1)).all()):
            named = rows.to_pylist()[int((~fine_P).nonzero()[0])]
            raise ValueError(
                f"{named['source']} ({named['caption']}): the features of its frames are no numbers below 65504; take "
                "another backbone"
            )
        return found

    def finish(self) -> Scores | None:
        """Scores pairs with the averaged weights, and writes the fitted reward; worker 0 returns the scores."""
        self.fitter.use_average()
        rows_N = self._judged()
        a_NA, b_NA = self._scores(rows_N)
        if self.rank:
            return None
        raw_NA = torch.cat([a_NA, b_NA])[torch.cat([each_N[rows_N] for each_N in self.base_2N])]
        mean_A, deviation_A = raw_NA.mean(0), raw_NA.std(0)
        if not bool((deviation_A > 1e-6 * raw_NA.abs().amax(0).clamp(min=1)).all()):  # what is below is rounding
            raise ValueError("all base samples have one score, so it has no unit: fit longer, or with more pairs")
        combined = 1.0
        if len(self.job.axes) > 1:
            combined = float(((raw_NA - mean_A) / deviation_A).mean(1).std())
            if combined < 1e-6:  # rounding, and no more
                raise ValueError(
                    f"axes = {[*self.job.axes]}: over base samples their scores cancel out, so their mean has no unit; "
                    "fit one axis, or others"
                )
        place = self.job.work / RESULT
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        spec = spec_of(self.config, self.beginning, [*self.job.axes], mean_A.tolist(), deviation_A.tolist(), combined)
        save_fitted(place, spec, self.scorer, self.beginning.structure, self.beginning.tokenizer)
        seconds = time.perf_counter() - self._began
        return Scores(rows_N, (a_NA - b_NA).tolist(), mean_A.tolist(), deviation_A.tolist(), len(raw_NA), seconds)

    def _judged(self) -> list[int]:
        """Returns the rows that are scored at the end; among the fitted ones those with base samples come first."""
        has_base_N = self.base_2N[0] | self.base_2N[1]
        found, room = self.held_out_N.nonzero().flatten().tolist(), FITTED
        for part_N in (~self.held_out_N & has_base_N, ~self.held_out_N & ~has_base_N):
            rows = part_N.nonzero().flatten().tolist()
            count = min(room, len(rows))
            found += [rows[place * len(rows) // count] for place in range(count)]
            room -= count
        return sorted(found)

    def _scores(self, rows_N: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Returns the raw scores (N, A) of both sides of pairs on every worker; a batch is the same for any W."""
        size, count = self.config.group, len(rows_N)
        own = dict[int, tuple[Tensor, Tensor]]()
        for start in range(self.rank * size, count, self.world * size):
            places = rows_N[start : start + size]
            rows = self.rows.rows(places, _SIDES)
            tokens_PL, a_PFCHW, b_PFCHW = self._media(rows)
            both_QA = scores(self.scorer, [(torch.cat([a_PFCHW, b_PFCHW]), tokens_PL.repeat(2, 1))])
            if not bool(both_QA.isfinite().all()):
                raise ValueError(self._not_finite(places, both_QA))
            own[start] = (both_QA[: len(tokens_PL)], both_QA[len(tokens_PL) :])
        found = {start: pair for each in self._gather(own) for start, pair in each.items()}
        a_NA, b_NA = (torch.cat([found[start][side] for start in sorted(found)]) for side in (0, 1))
        return a_NA, b_NA

    def _media(self, rows: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Returns tokens_PL and the frames (P, F, C, H, W), uint8, of both sides of rows."""
        shapes = rows["shape"].to_pylist()
        a_PFCHW, b_PFCHW = (_frames(rows[side], shapes).to(self.device) for side in ("a", "b"))
        return self._tokens(rows), a_PFCHW, b_PFCHW

    def _tokens(self, rows: Any) -> Tensor:
        return self.beginning.tokenise(rows["caption"].to_pylist()).to(self.device)

    def _add_up(self, total: Tensor) -> None:
        if distributed.is_initialized():
            distributed.all_reduce(total)

    def _explain(self, step: int) -> None:
        """Raises ValueError for a gradient that is not finite; every worker must call it."""
        self._scores(self._judged())  # names the pairs whose scores are not finite, if there are any
        raise ValueError(f"the gradient of step {step} is not finite; lower lr (now {self.config.lr:g})")

    def _not_finite(self, places: Sequence[int], both_QA: Tensor) -> str:
        wrong = (~both_QA.isfinite()).any(1).view(2, -1).any(0).nonzero().flatten().tolist()
        named = self.rows.rows([places[wrong[0]]], ["source", "caption"]).to_pylist()[0]
        return (
            f"{named['source']} ({named['caption']}): its score is not a number; lower lr (now {self.config.lr:g}), or "
            "take another backbone"
        )

    def _tell(self, step: int, loss: float, seconds: float) -> None:
        elapsed = time.perf_counter() - self._began
        left = elapsed / (step + 1 - self.first_step) * (self.config.steps - step - 1)
        self.tell({"step": step + 1, "loss": loss, "seconds": seconds, "elapsed": elapsed, "eta": left})
        log.info("step %d loss=%.6g seconds=%.3g", step, loss, seconds)

    def _save(self, step: int) -> None:
        """Writes the state, which is the same on all workers, in place of the last one."""
        if self.rank == 0:
            state = {"step": step, **self.fitter.state_dict()}
            with checkpoint_write_errors(step, self.job.work), atomic_file(self.job.work / STATE) as part:
                torch.save(state, part)

    def _restore(self) -> int:
        """Continues from the state that worker 0 finds; returns its step."""
        file, there = self.job.work / STATE, [False]
        if self.rank == 0:
            there = [file.is_file()]
        if distributed.is_initialized():
            distributed.broadcast_object_list(there, 0)
        if not there[0]:
            return 0
        try:
            with zipfile.ZipFile(file) as parts:  # torch does not look at the checksums that it writes
                whole = parts.testzip() is None
            state = load_plain(file, map_location="cpu") if whole else {}
            step = int(state.pop("step"))
            self.fitter.load_state_dict(state)
        except (ValueError, KeyError, TypeError, RuntimeError, zipfile.BadZipFile) as error:
            raise ValueError(f"{file} is damaged; delete it, and the fit starts anew") from error
        if distributed.is_initialized():
            distributed.barrier()  # nobody writes another state while one still reads
        log.info("continues after step %d", step)
        return step


def _frames(column: Any, shapes: Sequence[Sequence[int]]) -> Tensor:
    return torch.stack(
        [
            torch.from_numpy(np.frombuffer(each.as_buffer(), np.uint8).reshape(shape).copy())
            for each, shape in zip(column, shapes, strict=True)
        ]
    )

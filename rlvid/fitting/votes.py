"""``python -m rlvid.fitting.votes OUT.parquet``: pairs of the built-in world and the oracle's votes on them.

Two sources: pairs of rendered clips, one of which has a fault (``rlvid.world.pairs``), and videos that models made for
the same prompt and noise. Of rendered pairs the better one is known, and neither of two that are alike; of the others
the oracle prefers the one with the higher score (``rlvid.world.grade``), and calls scores that are near each other a
tie. A share of the votes is turned around, as people err. The file is what ``rlvid study export`` writes, with a column
``kind``. It may begin with the votes of earlier files.
"""

import argparse
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from PIL import Image
from pyarrow import parquet
from torch import Tensor

from rlvid import randomness
from rlvid.config.model import ModelConfig
from rlvid.data.pairs import PAIRS
from rlvid.data.parquet import open_parquet
from rlvid.diffusion.generate import generate
from rlvid.evaluate.load import device, load_run
from rlvid.evaluate.models import Spec, parse_spec
from rlvid.files import atomic_file
from rlvid.models.base import VideoModel
from rlvid.models.load import check_model
from rlvid.models.trained import check_trained, load_trainable
from rlvid.models.video_shape import resolved_shape
from rlvid.runs.find import find_run
from rlvid.terminal import counter, run_command, say
from rlvid.world.captions import prompt_set
from rlvid.world.faults import FAULTS
from rlvid.world.grade import grade
from rlvid.world.pairs import ALIKE, KINDS, NEW, draw_pairs
from rlvid.world.render import DEGRADATIONS

MODEL_MADE = "model-made"
"""Kind of pairs that models made; the others are those of ``rlvid.world.pairs``."""
_ALL = (*KINDS, NEW, ALIKE)
_SCHEMA = PAIRS.append(pa.field("kind", pa.string()))
_TIE, _GUIDANCE, _AT_ONCE, _ROWS_IN_GROUP = 0.03, (3.0, 1.0, 6.0), 64, 16


@dataclass(frozen=True)
class _Pair:
    """A pair with its true preference, before anybody errs."""

    prompt: str
    a_FCHW: Tensor
    b_FCHW: Tensor
    preference: float
    models: tuple[str, str]
    kind: str


def counts_of(words: Sequence[str]) -> dict[str, int]:
    """Returns the number of rendered pairs of each kind.

    Args:
        words: ``N`` for all kinds of ``KINDS``, ``KIND=N`` for one; without ``N``, the kinds that are not named
            have none.

    Raises:
        ValueError: a word is neither.
    """
    counts = dict.fromkeys(_ALL, 0)
    for word in sorted(words, key=lambda each: "=" in each):
        kind, equals, number = word.rpartition("=")
        if not number.isdecimal() or (equals and kind not in _ALL):
            raise ValueError(f"--rendered {word}: expected N or KIND=N; the kinds are {', '.join(_ALL)}")
        counts |= dict.fromkeys([kind] if equals else KINDS, int(number))
    return counts


def rendered(counts: Mapping[str, int], seed: int, footage: float, without: Sequence[str]) -> Iterator[_Pair]:
    """Yields pairs of rendered clips, so many of each kind; every other one has the better clip second."""
    for number, kind in enumerate(_ALL):
        draws, count = torch.Generator().manual_seed(1_000 * seed + number), counts.get(kind, 0)
        for start in range(0, count, _AT_ONCE):
            size = min(_AT_ONCE, count - start)
            drawn = draw_pairs(kind, size, draws, footage=footage, without=tuple(without))
            for place, prompt in enumerate(drawn.captions):
                sides = drawn.better_BFCHW[place], drawn.worse_BFCHW[place]
                names = "rendered", drawn.faults[place] or kind
                turned = place % 2 == 1
                first, second = (1, 0) if turned else (0, 1)
                models = names[first], names[second]
                preference = 0.5 if kind == ALIKE else float(not turned)
                yield _Pair(prompt, sides[first], sides[second], preference, models, kind)


def model_made(
    runs: Sequence[str], prompts: int, per_prompt: int, seed: int, steps: int, base: str = ModelConfig().path
) -> Iterator[_Pair]:
    """Yields pairs of videos of the same prompt and noise by different models, with the oracle's preference.

    Args:
        runs: ``RUN@STEP*SCALE``; the base model is always there, at several guidances.
        prompts: that are sampled.
        per_prompt: pairs of each, at most.
        seed: of prompts, noise and choice.
        steps: of a video's chain.
        base: path of the base model.
    """
    words = [each for name in ("in_domain", "new_shapes") for each in prompt_set(name, prompts, 100 + seed)][:prompts]
    made, scores = dict[str, Tensor](), dict[str, Tensor]()
    show = counter("models")
    total = len(_GUIDANCE) + len(runs)
    for done, (name, model, guidance) in enumerate(_models(runs, base)):
        made[name] = generate(model, words, seed=seed, steps=steps, guidance=guidance).nan_to_num(0.0)
        scores[name] = grade(made[name], words)["score"]
        show(done + 1, total)
    for place, prompt in enumerate(words):
        both = list(combinations(made, 2))
        order = randomness.permutation(len(both), seed, "pairs of models", place).tolist()
        for a, b in (both[number] for number in order[:per_prompt]):
            gap = float(scores[a][place] - scores[b][place])
            preference = 0.5 if abs(gap) < _TIE else float(gap > 0)
            yield _Pair(prompt, made[a][place], made[b][place], preference, (a, b), MODEL_MADE)


def _models(runs: Sequence[str], path: str) -> Iterator[tuple[str, VideoModel, float]]:
    base = load_trainable(ModelConfig(path=path), 0, path, device())
    for guidance in _GUIDANCE:
        yield ("base" if guidance == _GUIDANCE[0] else f"base, guidance {guidance:g}"), base, guidance
    for run in runs:
        spec = parse_spec(run)
        tuned = load_run(spec.run, _step(spec))
        yield run, tuned.use(1.0 if spec.scale is None else spec.scale), tuned.config.sampling.guidance


def _step(spec: Spec) -> int | None:
    return None if spec.which is None else int(spec.which)


def write_votes(
    out: Path, pairs: Iterator[_Pair], noise: float, seed: int, earlier: Sequence[Path] = ()
) -> tuple[int, int]:
    """Writes the votes, a share of them turned around; returns the numbers of rows and of ties.

    Args:
        out: Parquet file.
        pairs: to vote on.
        noise: share of the votes that are turned around.
        seed: of these.
        earlier: files whose votes come first, as they are.
    """
    count, ties, rows = 0, 0, list[dict[str, Any]]()
    with atomic_file(out) as part, parquet.ParquetWriter(part, _SCHEMA, compression="zstd") as file:

        def write() -> None:
            file.write_table(pa.Table.from_pylist(rows, _SCHEMA))
            rows.clear()

        for each in map(parquet.ParquetFile, earlier):
            for group in range(each.num_row_groups):
                table = each.read_row_group(group)
                numbers = pa.array(range(count, count + len(table)), pa.int64())  # else two files had the same pairs
                place = table.schema.get_field_index("index")
                table = table.set_column(place, "index", numbers)
                file.write_table(table.cast(_SCHEMA))
                count, ties = count + len(table), ties + table.column("preference").to_pylist().count(0.5)
        for number, pair in enumerate(pairs, count):
            errs = float(randomness.uniform((), seed, "votes", [(number,)])) < noise
            preference = 1 - pair.preference if errs else pair.preference
            count, ties = count + 1, ties + (preference == 0.5)
            rows.append(_row(number, pair, preference))
            if len(rows) == _ROWS_IN_GROUP:
                write()
        if rows:
            write()
    return count, ties


def _row(number: int, pair: _Pair, preference: float) -> dict[str, Any]:
    a, b = _pngs(pair.a_FCHW), _pngs(pair.b_FCHW)
    return {
        "prompt": pair.prompt, "a": a, "b": b, "preference": preference, "axis": "quality", "annotator": "oracle",
        "a_model": pair.models[0], "b_model": pair.models[1], "set": "votes", "steps": 0, "index": number, "copy": 0,
        "fps": 8.0, "kind": pair.kind,
    }  # fmt: skip


def _pngs(frames_FCHW: Tensor) -> list[bytes]:
    found = []
    for pixels in (frames_FCHW.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).numpy():
        Image.fromarray(np.ascontiguousarray(pixels)).save(data := io.BytesIO(), "PNG", compress_level=1)
        found.append(data.getvalue())
    return found


def _check(given: argparse.Namespace) -> None:
    """Raises ValueError for numbers that mean nothing, and for models that are not there."""
    for key in ("noise", "footage"):
        if not 0 <= (share := getattr(given, key)) <= 1:
            raise ValueError(f"--{key} {share:g}: is a share; allowed: 0 to 1, such as 0.1")
    for key, least in (("prompts", 0), ("per_prompt", 1), ("steps", 1)):
        if (count := getattr(given, key)) < least:
            raise ValueError(f"--{key.replace('_', '-')} {count}: allowed: {least} or more")
    shape = resolved_shape(ModelConfig(path=given.model)) if given.prompts else None
    for run in given.runs:
        spec = parse_spec(run)
        if spec.which in ("best", "all"):
            raise ValueError(f"--runs {run}: name one checkpoint by its step, or none for the latest")
        config, found = find_run(spec.run, _step(spec))
        check_trained(config.model, found.folder)
        other = resolved_shape(config.model)
        if shape is not None and (other.frames, other.pixels) != (shape.frames, shape.pixels):
            raise ValueError(
                f"--runs {run}: makes {other.frames} frames of {other.pixels} pixels, and --model {given.model} makes "
                f"{shape.frames} of {shape.pixels}; pairs need two of one shape: leave the run out, or name its base "
                "with --model"
            )
    if given.prompts:
        check_model(given.model)


def main() -> None:
    """Reads the options and writes the file."""
    parser = argparse.ArgumentParser(prog="python -m rlvid.fitting.votes", description=__doc__)
    parser.add_argument("out", type=Path, help="Parquet file to be written")
    kinds = f"rendered pairs of each of {', '.join(KINDS)}; or KIND=N for one kind, also {NEW} or {ALIKE}"
    parser.add_argument("--rendered", nargs="+", default=["1000"], metavar="N", help=kinds)
    parser.add_argument("--footage", type=float, default=0.4, help="share of them with both sides of low quality")
    faults = sorted({*DEGRADATIONS[1:], *FAULTS})
    parser.add_argument("--without", nargs="*", default=[], choices=faults, help="faults that are left out")
    parser.add_argument(
        "--add", nargs="*", default=[], type=Path, metavar="FILE", help="earlier votes, which come first"
    )
    parser.add_argument("--model", default=ModelConfig().path, help="the base model: builtin, builtin-wan, or a folder")
    parser.add_argument("--runs", nargs="*", default=[], help="fine-tuned models: RUN@STEP*SCALE")
    parser.add_argument("--prompts", type=int, default=0, help="prompts that models sample; 0 for none")
    parser.add_argument("--per-prompt", type=int, default=24, help="pairs of models for each prompt")
    parser.add_argument("--steps", type=int, default=20, help="of a video's chain")
    parser.add_argument("--noise", type=float, default=0.08, help="share of votes that are turned around")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    _check(given)
    counts = counts_of(given.rendered)
    for each in given.add:
        if not each.is_file():
            raise ValueError(f"--add {each}: no such file; name one that this command wrote")
        with open_parquet(each) as file:
            missing = [name for name in _SCHEMA.names if name not in file.schema_arrow.names]
        if missing:
            raise ValueError(f"--add {each}: lacks {' and '.join(missing)}; name a file that this command wrote")

    def pairs() -> Iterator[_Pair]:
        yield from rendered(counts, given.seed, given.footage, given.without)
        if given.prompts:
            yield from model_made(given.runs, given.prompts, given.per_prompt, given.seed, given.steps, given.model)

    count, ties = write_votes(given.out, pairs(), given.noise, given.seed, given.add)
    say(f"{count} votes, of them {ties} ties, in {given.out}")


if __name__ == "__main__":
    raise SystemExit(run_command(main))

"""Evaluation folders for tests: squares that move, scores that tell models apart, as `rlvid evaluate` lays them out."""

import io
import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import yaml
from PIL import Image
from pyarrow import parquet

SETS = {
    "in_domain": ["a red square moving left", "a green square moving up", "a blue square growing"],
    "scenes": ["stripes <b>drifting</b> & turning", "a calm sea"],
}
METRICS = ["reward", "held_out", "clipsim", "consistency", "motion", "diversity"]
KEY = ("model", "set", "steps", "index", "copy")


def frames(seed: int, count: int = 8, size: int = 32) -> np.ndarray:
    """(F, H, W, 3), uint8: a coloured square on a ground, somewhere else in each frame."""
    drawn = np.random.default_rng(seed)
    film = np.zeros((count, size, size, 3), np.uint8) + drawn.integers(120, 256, 3).astype(np.uint8)
    colour, side = drawn.integers(0, 200, 3), size // 3
    for place, frame in enumerate(film):
        left, top = (place * 3) % (size - side), int(drawn.integers(0, 3)) + size // 3
        frame[top : top + side, left : left + side] = colour
    return film


def pngs(film: np.ndarray) -> list[bytes]:
    found = []
    for frame in film:
        out = io.BytesIO()
        Image.fromarray(frame).save(out, "PNG")
        found.append(out.getvalue())
    return found


def score(model: int, index: int, place: int, case: int) -> float:
    """Known to the tests: later models gain in reward; cases with an odd number lose in the held-out one."""
    if METRICS[place] == "diversity":
        return math.nan
    if METRICS[place] == "held_out":
        return 0.4 + 0.01 * case + model * (-0.05 if case % 2 else 0.1) + 0.001 * index
    return 0.3 + 0.1 * place + 0.05 * model + 0.01 * index


def write_evaluation(
    folder: Path,
    models: list[dict[str, Any]] | None = None,
    *,
    sets: dict[str, list[str]] = SETS,
    steps: tuple[int, ...] = (20, 50),
    copies: int = 1,
    sizes: dict[str, int] | None = None,
    leave_out: int | None = None,
) -> Path:
    """A whole evaluation; ``sizes`` gives a model other frames, ``leave_out`` drops a row of the archive."""
    models = models or [
        {"name": "base", "label": "base", "kind": "base", "path": None, "step": None, "scale": 0.0},
        {"name": "toy", "label": "InstructVideo", "kind": "run", "path": "runs/toy", "step": 60, "scale": 1.0},
    ]
    about = {
        "created": "2026-11-20T10:00:00+00:00", "seed": 0, "copies": copies, "steps": list(steps),
        "clip": "builtin-heldout", "models": models, "sets": sets, "fps": 8.0, "frames": 8, "size": 32,
        "metrics": METRICS,
    }  # fmt: skip
    (folder / "videos").mkdir(parents=True)
    (folder / "evaluation.yaml").write_text(yaml.safe_dump(about, sort_keys=False), encoding="utf-8")
    rows, scored = [], []
    for place, model in enumerate(models):
        case = 0
        for name, prompts in sets.items():
            for many in steps:
                for index, prompt in enumerate(prompts):
                    for copy in range(copies):
                        key = dict(zip(KEY, (model["name"], name, many, index, copy), strict=True))
                        film = frames(1000 * place + case, size=(sizes or {}).get(model["name"], 32))
                        rows.append(key | {"prompt": prompt, "fps": 8.0, "frames": pngs(film)})
                        values = {m: score(place, index, at, case) for at, m in enumerate(METRICS)}
                        scored.append(key | {"prompt": prompt} | values)
                        case += 1
    if leave_out is not None:
        del rows[leave_out]
    middle = len(rows) // 2
    for number, part in enumerate((rows[:middle], rows[middle:])):
        parquet.write_table(pa.Table.from_pylist(part, _schema()), folder / "videos" / f"part-{number:05d}.parquet")
    parquet.write_table(pa.Table.from_pylist(scored), folder / "evaluation.parquet")
    parquet.write_table(pa.Table.from_pylist(_compare(scored)), folder / "comparison.parquet")
    return folder


def _schema() -> pa.Schema:
    kinds = {"steps": pa.int32(), "index": pa.int32(), "copy": pa.int32(), "fps": pa.float32()}
    names = (*KEY, "prompt", "fps")
    return pa.schema([(n, kinds.get(n, pa.string())) for n in names] + [("frames", pa.list_(pa.binary()))])


def _compare(scored: list[dict[str, Any]]) -> list[dict[str, Any]]:
    base, found = scored[0]["model"], []
    for model in dict.fromkeys(row["model"] for row in scored if row["model"] != base):
        for group in dict.fromkeys((row["set"], row["steps"]) for row in scored):
            sides = [[r for r in scored if (r["set"], r["steps"]) == group and r["model"] == m] for m in (base, model)]
            for metric in METRICS:
                gains = [b[metric] - a[metric] for a, b in zip(*sides, strict=True)]
                mean = sum(gains) / len(gains)
                spread = max(gains) - min(gains) if mean == mean else math.nan
                found.append(
                    {"model": model, "base": base, "set": group[0], "steps": group[1], "metric": metric,
                     "pairs": len(gains), "difference": mean, "low": mean - spread, "high": mean + spread}
                )  # fmt: skip
    return found

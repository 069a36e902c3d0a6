"""An evaluation's folder for tests: squares that move, one colour a model, in the layout of `rlvid evaluate`."""

import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import yaml
from PIL import Image
from pyarrow import parquet

PROMPTS = {"in_domain": ["a square moving right", "a <b>bold</b> square & a ball", "a square on a navy ground"]}


def frames(model: int, prompt: int, steps: int, count: int = 8, size: int = 32) -> list[bytes]:
    """A square that moves right, PNG each: its colour says the model, its height the prompt, its ground the steps."""
    made = []
    for time in range(count):
        pixels = np.full((size, size, 3), (steps, 40, 60), np.uint8)
        pixels[4 + 5 * prompt : 12 + 5 * prompt, 2 + 2 * time : 10 + 2 * time] = [
            (230, 120, 40), (90, 190, 240), (120, 210, 90),
        ][model]  # fmt: skip
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "PNG")
        made.append(buffer.getvalue())
    return made


def make_evaluation(
    folder: Path,
    models: tuple[str, ...] = ("base", "tuned"),
    sets: dict[str, list[str]] | None = None,
    steps: tuple[int, ...] = (20,),
    copies: int = 1,
) -> Path:
    """Writes the folder; the metric `reward` prefers later models, and `motion` earlier ones."""
    sets = PROMPTS if sets is None else sets
    (folder / "videos").mkdir(parents=True, exist_ok=True)
    description = {
        "name": "test", "created": "2026-01-01T00:00:00+00:00", "seed": 0, "copies": copies, "steps": list(steps),
        "models": [{"name": name, "label": name.title(), "kind": "base"} for name in models], "sets": sets,
        "metrics": ["reward", "motion"], "fps": 8, "frames": 8, "size": 32,
    }  # fmt: skip
    (folder / "evaluation.yaml").write_text(yaml.safe_dump(description), encoding="utf-8")
    scores = []
    for part, model in enumerate(models):
        rows = [
            {"model": model, "set": name, "steps": each, "index": index, "copy": copy, "prompt": prompt, "fps": 8.0,
             "frames": frames(part, index, each + copy)}
            for name, prompts in sets.items()
            for each in steps
            for index, prompt in enumerate(prompts)
            for copy in range(copies)
        ]  # fmt: skip
        write_videos(folder / "videos" / f"part-{part:05d}.parquet", rows)
        keys = ("model", "set", "steps", "index", "copy", "prompt")
        scores += [{key: row[key] for key in keys} | {"reward": float(part), "motion": -float(part)} for row in rows]
    parquet.write_table(pa.Table.from_pylist(scores), folder / "evaluation.parquet")
    return folder


def write_videos(path: Path, rows: list[dict[str, object]]) -> None:
    """A part of the videos, with several row groups."""
    integers = [(name, pa.int32()) for name in ("steps", "index", "copy")]
    texts = [(name, pa.string()) for name in ("model", "set", "prompt")]
    schema = pa.schema([*texts, *integers, ("fps", pa.float32()), ("frames", pa.list_(pa.binary()))])
    parquet.write_table(pa.Table.from_pylist(rows, schema), path, row_group_size=2)

"""Two steps of `rlvid train` under Ray Train and DeepSpeed ZeRO 2 on a GPU, held to the same steps on a CPU.

    python -m jobs.benchmark gpu-ray                        # the built-in model; a CPU beside a CPU without a GPU
    python -m jobs.benchmark gpu-ray --preset tiny          # miniatures, to try every line
    python -m jobs.benchmark gpu-ray --preset tiny-wan      # likewise, of a Wan model
    python -m jobs.benchmark gpu-ray --steps 4 train.batch_size=4 method=ddpo

Both runs are the command itself, in float32 with TF32 switched off, on the same clips and the same random numbers. The
reference runs on the CPU with ZeRO 0, so that without a GPU the two still differ in what DeepSpeed does. AdamW moves a
weight whose gradient is next to nothing as far as any other, in a direction that rounding may choose: the verdict
is by the length of the difference beside the length of what was learned, and the largest difference is shown. Exit code
0 if both are the same run, 1 if not.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from jobs.benchmark.options import check_out, make_parser
from rlvid.config import RunConfig, load_config
from rlvid.terminal import say

ROOT = Path(__file__).resolve().parents[2]
SCALARS = ("optimiser/loss", "optimiser/gradient_norm")
TOLERANCE = {"weights": 2e-2, "optimiser/loss": 1e-3, "optimiser/gradient_norm": 1e-2}
"""Largest differences as a part of the reference; a step with a wrong mean, scale or noise is far beyond them."""
SMALL = (
    "train.workers=1", "train.batch_size=2", "train.micro_batch=1", "data.count=4", "optimizer.warmup=0",
    "output.videos_every=0",
)  # fmt: skip
TINY = {
    "tiny": ("model.frames=4", "model.size=16", "sampling.steps=5", "reward.segments=2"),
    "tiny-wan": ("model.frames=9", "model.size=16", "sampling.steps=5", "reward.segments=2"),
}
"""Settings of the miniatures."""
_HOUR = 3600.0


@dataclass(frozen=True)
class Comparison:
    """A run beside the reference: ``largest`` and ``moved`` in weights, ``relative`` in lengths; scalars by step."""

    device: str
    largest: float
    moved: float
    relative: float
    scalars: dict[str, list[tuple[float, float]]]

    @property
    def faults(self) -> list[str]:
        """What is further apart than rounding explains."""
        found = [] if self.relative <= TOLERANCE["weights"] else [f"weights by {self.relative:.1e}"]
        if not self.moved > 0:
            found.append("nothing was learned, so that equality would prove nothing")
        for name, pairs in self.scalars.items():
            if not pairs or not all(math.isclose(a, b, rel_tol=TOLERANCE[name]) for a, b in pairs):
                found.append(f"{name} by {apart(pairs):.1e}")
        return found


def apart(pairs: list[tuple[float, float]]) -> float:
    """Returns the largest difference of pairs, as a part of the second."""
    return max((abs(a - b) / max(abs(b), 1e-12) for a, b in pairs), default=math.inf)


def run(config: list[str], name: str, *overrides: str, hidden: bool = False) -> float:
    """Trains in a process of its own, with the GPUs ``hidden`` or not; returns its seconds.

    Raises:
        RuntimeError: it failed, with the last line that it printed.
    """
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        "NVIDIA_TF32_OVERRIDE": "0",
    }
    environment.pop("RAY_ADDRESS", None)  # the two differ in their device alone, so both run here
    environment |= {"CUDA_VISIBLE_DEVICES": ""} if hidden else {}
    command = [sys.executable, "-m", "rlvid.cli", "train", "toy", *config, f"name={name}", *overrides]
    began = time.monotonic()
    done = subprocess.run(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=_HOUR
    )
    if done.returncode:
        lines = done.stdout.strip().splitlines()
        raise RuntimeError(f"rlvid train ({name}) ended with {done.returncode}: {lines[-1] if lines else 'no word'}")
    return time.monotonic() - began


def scalars(folder: Path) -> dict[str, list[float]]:
    """Reads the scalars of each step from TensorBoard."""
    from rlvid.runs.scalars import read_events

    names = (*SCALARS, "cost/peak_memory_gib")
    found = read_events(folder / "tensorboard", names.__contains__)
    return {name: [value for _, value in found[name]] for name in names}


def adapter(folder: Path, config: RunConfig) -> dict[str, Tensor]:
    """Returns the adapter after the last step, under the names that it has in the network."""
    from safetensors.torch import load_file

    from rlvid.models.trained_files import trained_file
    from rlvid.runs.checkpoints import checkpoint_name

    found = load_file(trained_file(folder / checkpoint_name(config.train.steps)))
    return {name.removeprefix("base_model.model."): tensor for name, tensor in found.items()}


def untrained(config: RunConfig) -> dict[str, Tensor]:
    """Returns the adapter before the first step."""
    from rlvid.models.trained import load_trainable, trained_state

    return trained_state(load_trainable(config.model, config.seed, config.model.path).denoiser, config.model)


def compare(found: Path, reference: Path, config: RunConfig, device: str) -> Comparison:
    """Compares two runs of the same settings."""
    ours, theirs, start = adapter(found, config), adapter(reference, config), untrained(config)
    a, b, zero = (
        torch.cat([each[name].flatten().double() for name in sorted(start)]) for each in (ours, theirs, start)
    )
    values, expected = scalars(found), scalars(reference)
    return Comparison(
        device=device,
        largest=(a - b).abs().max().item(),
        moved=(b - zero).abs().max().item(),
        relative=((a - b).norm() / (b - zero).norm()).item(),
        scalars={name: list(zip(values[name], expected[name], strict=True)) for name in SCALARS},
    )


def main(arguments: list[str]) -> int:
    """Trains twice, compares, says so; returns 1 if the runs are not the same."""
    options = parse(arguments)
    gpu = torch.cuda.is_available()
    device = torch.cuda.get_device_name() if gpu else "a CPU (torch sees no GPU here)"
    with tempfile.TemporaryDirectory(prefix="rlvid-gpu-ray-") as folder:
        settings = [*SMALL, *tiny(options.preset, Path(folder)), *options.overrides]
        settings += [f"train.steps={options.steps}", f"output.checkpoint_every={options.steps}"]
        settings.append(f"output.storage={folder}/runs")
        config = load_config("toy", [*settings, "name=check"])  # a bad override is known before anything starts
        if config.model.finetune != "lora":
            raise ValueError(f"model.finetune = {config.model.finetune!r}: the adapters are compared; allowed: 'lora'")
        say(f"torch {torch.__version__}; ZeRO 2 on {device}, beside ZeRO 0 on a CPU; {options.steps} steps")
        try:
            seconds = {"cpu": run(settings, "cpu", "train.zero_stage=0", "train.use_gpu=false", hidden=True)}
            say(f"reference: {seconds['cpu']:.0f} s")
            seconds["zero2"] = run(settings, "zero2", "train.zero_stage=2", f"train.use_gpu={str(gpu).lower()}")
            say(f"ZeRO 2 under Ray Train: {seconds['zero2']:.0f} s")
        except RuntimeError as error:
            say(f"FAILED: {error}")
            return 1
        runs = Path(folder) / "runs"
        found = compare(runs / "zero2", runs / "cpu", config, device)
        peak = max(scalars(runs / "zero2")["cost/peak_memory_gib"])
    show(found, peak)
    if options.out:
        written = asdict(found) | {"faults": found.faults, "seconds": seconds, "peak GiB": peak}
        written |= {"torch": torch.__version__, "steps": options.steps}
        options.out.write_text(json.dumps(written, indent=1), encoding="utf-8")
    return int(bool(found.faults))


def tiny(preset: str, folder: Path) -> list[str]:
    """Returns the settings of a preset; a miniature model is written into ``folder``."""
    if preset not in TINY:
        return []
    from rlvid.toy.tiny import save_tiny_model
    from rlvid.toy.tiny_wan import save_tiny_wan

    (save_tiny_wan if preset == "tiny-wan" else save_tiny_model)(folder / preset)
    return [f"model.path={folder / preset}", *TINY[preset]]


def show(found: Comparison, peak: float) -> None:
    """Prints the differences and the verdict."""
    say(
        f"adapter: largest difference {found.largest:.2e}, where weights moved by up to {found.moved:.2e}; in length "
        f"{found.relative:.1e} of what was learned (allowed: {TOLERANCE['weights']:g})"
    )
    for name, pairs in found.scalars.items():
        values = "; ".join(f"{a:.6g} beside {b:.6g}" for a, b in pairs)
        say(f"{name}: {values}: apart by {apart(pairs):.1e} (allowed: {TOLERANCE[name]:g})")
    say(f"peak memory of the worker: {peak:.2f} GiB")
    if found.faults:
        say(f"DIFFERENT: {'; '.join(found.faults)}")
    else:
        say(f"EQUAL: ZeRO 2 under Ray Train on {found.device} computes what a CPU computes")


def parse(arguments: list[str]) -> argparse.Namespace:
    """Returns the options; raises ValueError for those that cannot be."""
    parser = make_parser(__doc__, "gpu-ray", overrides=True)
    parser.add_argument("--preset", choices=("builtin", *TINY), default="builtin", help="default: builtin")
    parser.add_argument("--steps", type=int, default=2, help="default: 2")
    parser.add_argument("--out", type=Path, help="JSON file for the result")
    options = parser.parse_intermixed_args(arguments)
    if not 1 <= options.steps <= 100:
        raise ValueError(f"--steps {options.steps}: allowed: 1 to 100")
    if options.out:
        check_out(options.out)
    return options

"""Measures what training costs, in parts that have a help text each.

    python -m jobs.benchmark overhead --steps 2
    python -m jobs.benchmark gpu --help

Run it in the repository's root; the package needs no installation there. A measurement wants a machine with nothing
else to do.
"""

import importlib
import sys

from jobs.benchmark.options import make_parser
from rlvid.terminal import run_command

PARTS = {
    "overhead": "a step of the built-in model, stage by stage, and what Ray and DeepSpeed add to bare torch",
    "profile": "the ten largest costs of a step on a built-in model, by stage and operator",
    "step": "a step of the full-size model in bare torch, beside the same step as released code does it",
    "peers": "a training step of each method, beside the same step as published code of other projects does it",
    "feed": "starts and steps as the training set grows, and with a slow source",
    "growth": "exponents of time and memory as videos, clips, rows and trials grow",
    "scaling": "more workers on more videos, and what starting up takes",
    "policy-signal": "how much of a policy gradient is signal, by step, group and advantages",
    "prefix": "what cheaper steps without gradient save, and what they change in the videos",
    "rollout": "a batch of GRPO, by how many steps of its chains are trained",
    "reward-accuracy": "how often rewards prefer the better video of a pair, by what is wrong with the other one",
    "guard": "regret of the guard's checkpoint and scale, against four rules and by the oracle",
    "pixel-ascent": "how far gradient ascent on pixels raises a reward, and whether the oracle follows",
    "gpu": "full-size steps on this GPU in at most 8 minutes; torch alone, no Ray",
    "gpu-wan": "the same of Wan2.1's 1.3B, by size of the videos, beside rlvid plan",
    "gpu-ray": "two steps of rlvid train on a GPU, held to the same steps on a CPU",
}
"""Names of the parts, and what they measure; each is a module beside this file."""


def main() -> int:
    """Runs the part that the first argument names; returns its exit code."""
    if sys.argv[1:2] and sys.argv[1] in PARTS:
        part = importlib.import_module(f"jobs.benchmark.{sys.argv[1].replace('-', '_')}")
        code = part.main(sys.argv[2:])
        return code if isinstance(code, int) else 0
    parser = make_parser(__doc__)
    parts = parser.add_subparsers(metavar="PART", required=True)
    for name, text in PARTS.items():
        parts.add_parser(name, help=text)
    parser.parse_args(sys.argv[1:2])
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))

"""Command lines of the parts: their parsers, and the presets of the full-size steps."""

import argparse
from collections.abc import Sequence
from pathlib import Path

PRESETS: dict[str, dict[str, int]] = {
    "full": {"frames": 16, "size": 256, "segments": 4, "sampling_steps": 20},
    # The full-size networks on a small video.
    "reduced": {"frames": 8, "size": 64, "segments": 2, "sampling_steps": 20},
    "tiny": {"frames": 4, "size": 16, "segments": 1, "sampling_steps": 5},  # miniatures of the networks
}


def make_parser(about: str | None, part: str = "", overrides: bool = False) -> argparse.ArgumentParser:
    """Makes the parser of a part from its module's docstring; with ``overrides`` it takes settings of a run."""
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        f"python -m jobs.benchmark {part}".strip(), description=about, formatter_class=form
    )
    if overrides:
        parser.add_argument("overrides", nargs="*", help="settings to change, as for rlvid train")
    return parser


def add_step_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options of a part that takes full-size steps in turns: networks, sizes, and number of steps."""
    import torch

    from rlvid.models.unet3d import DTYPES

    parser.add_argument("--preset", choices=PRESETS, help="default: full on a GPU, else reduced")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--precision", choices=DTYPES, help="default: bfloat16 on a GPU, else float32")
    for name in ("frames", "size", "segments", "sampling-steps"):
        parser.add_argument(f"--{name}", type=int, help="default: the preset's")
    parser.add_argument("--batch", type=int, default=1, help="videos in a step")
    parser.add_argument("--steps", type=int, default=2, help="measured steps of each side")


def add_threads(parser: argparse.ArgumentParser) -> None:
    """Adds ``--threads``, for ``limit_threads``."""
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of torch (default: 1)")


def limit_threads(options: argparse.Namespace) -> None:
    """Gives torch ``options.threads`` CPU threads in this process; raises ValueError for fewer than one."""
    import torch

    if options.threads < 1:
        raise ValueError(f"--threads {options.threads}: must be 1 or more")
    torch.set_num_threads(options.threads)


def fill_in(options: argparse.Namespace) -> None:
    """Sets what was not given: the device's preset and precision, and the preset's numbers.

    Raises:
        ValueError: a number that was given is below 1.
    """
    options.preset = options.preset or ("full" if options.device.startswith("cuda") else "reduced")
    options.precision = options.precision or ("bfloat16" if options.device.startswith("cuda") else "float32")
    for name, value in PRESETS[options.preset].items():
        if (given := getattr(options, name, None)) is None:
            setattr(options, name, value)
        elif given < 1:
            raise ValueError(f"--{name.replace('_', '-')} {given}: must be at least 1")


def check_out(out: Path, *, picture: bool = False) -> None:
    """Raises ValueError unless ``--out`` can be the path of a file of numbers; a ``picture`` stands beside some."""
    if out.is_dir() or not out.absolute().parent.is_dir():
        raise ValueError(f"--out {out}: expected a file in a folder that exists")
    if picture and out.suffix == ".png":
        raise ValueError(f"--out {out}: the picture gets this name; name the numbers' file: {out.with_suffix('.json')}")


def make_folder(out: Path) -> None:
    """Makes the folder ``--out``, unless it is there.

    Raises:
        ValueError: a file is in its place.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise ValueError(f"--out {out}: a file is in the way; name a folder") from None


def refuse(overrides: Sequence[str], fixed: Sequence[str]) -> None:
    """Raises ValueError for an override of a setting that the part fixes itself, as ``key=value``."""
    keys = {each.partition("=")[0] for each in fixed}
    if own := sorted(keys & {each.partition("=")[0] for each in overrides}):
        raise ValueError(f"{own[0]} is set by this benchmark; leave it out (see --help for its options)")

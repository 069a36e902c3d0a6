"""The rewards of the built-in world, inside the package: folders as ``rlvid reward fit`` writes them."""

import json
from importlib import resources
from pathlib import Path

BUILTIN = {
    "builtin": "reward",
    "builtin-frames": "frames",
    "builtin-video": "video",
    "builtin-heldout": "heldout",
    "builtin-unvoted": "unvoted",
    "builtin-heldout-frames": "heldout-frames",
    "builtin-heldout-video": "heldout-video",
}
"""Name of a reward -> its folder; the names are those of ``BuiltinReward`` and ``HeldOutReward`` (rlvid.config)."""


def builtin_folder(name: str) -> Path:
    """Returns the folder of a built-in reward inside the package."""
    return Path(str(resources.files("rlvid"))) / "toy" / "weights" / BUILTIN[name]


def scores_videos(name: str) -> bool:
    """Returns whether a built-in reward scores whole videos; reads no weights."""
    # As plain JSON: to import the class of these settings, rlvid.reward.fit.folder.Spec, takes seconds.
    spec = json.loads((builtin_folder(name) / "reward.json").read_text(encoding="utf-8"))
    return spec["head"] is not None

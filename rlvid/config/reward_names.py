"""Names of rewards, and paths: of weights, of a function of the user's, of a server."""

import re
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

BuiltinReward = Literal["builtin", "builtin-frames", "builtin-video"]
"""Rewards inside the package; their folders are in ``rlvid.reward.builtin``."""
HeldOutReward = Literal["builtin-heldout", "builtin-unvoted", "builtin-heldout-frames", "builtin-heldout-video"]
"""The same, to judge with: nothing trains on them."""
SingleReward = Literal[
    BuiltinReward, "oracle", "hpsv2", "hpsv2.1", "pickscore", "clip", "aesthetic", "imagereward", "fitted",
    "brightness", "compression", "custom",
]  # fmt: skip
PartReward = Literal["motion"]
"""Rewards that are a part of a mixture and nothing alone."""
Preset = Literal["hpsv2", "instructvideo", "videox_fun", "imagereward", "clip", "pickscore"]
Precision = Literal["float32", "bfloat16", "float16"]

PUBLISHED = ("hpsv2", "hpsv2.1", "pickscore", "clip", "aesthetic", "imagereward")
"""Published rewards, whose weights are a file or folder of the user's."""
FROM_A_FILE = (*PUBLISHED, "fitted")
"""The same, and what ``rlvid reward fit`` wrote."""
NOT_DIFFERENTIABLE = {"oracle"}
"""Rewards without a gradient."""

_FUNCTION = re.compile(r".+\.py:[A-Za-z_]\w*")
_URL = re.compile(r"https?://\S*")
PATH_HELP = (
    "a checkpoint file or folder for the rewards that need one, the word 'random' for random weights of the full "
    "structure (dry runs), FILE.py:FUNCTION for a reward of your own, or http://... for one that a server computes"
)
"""The help of settings that take such a path."""


def is_function(path: str | None) -> bool:
    """Returns whether a path has the form FILE.py:FUNCTION."""
    return path is not None and _FUNCTION.fullmatch(path) is not None


def is_url(path: str | None) -> bool:
    """Returns whether a path is the address of a reward server."""
    return path is not None and _URL.fullmatch(path) is not None


def is_own(path: Any) -> bool:
    """Returns whether a path is a user's own reward: a function in a file, or a server."""
    return isinstance(path, str) and (is_function(path) or is_url(path))


def absolute(path: str | None) -> str | None:
    """Returns the path from the root, with its function if it has one; 'random' and addresses stay."""
    if path is None or path == "random" or is_url(path):
        return path
    file, colon, function = path.rpartition(":") if is_function(path) else (path, "", "")
    return str(Path(file).expanduser().resolve()) + colon + function


def check_path(name: str, path: str | None, key: str) -> None:
    """Raises ValueError where a path is given to a reward that takes none, or one of the wrong form."""
    if path is None:
        return
    if is_url(path):
        _check_url(path, key)
    if name == "custom" and not is_own(path):
        raise ValueError(f"{key} = {path!r}: a reward of your own is given as FILE.py:FUNCTION, or http://HOST:PORT")
    if name not in FROM_A_FILE and name != "custom":
        raise ValueError(
            f"{key} = {path!r}: the reward {name!r} takes no path; for one of your own, set its name=custom"
        )
    if name == "fitted" and path == "random":
        raise ValueError(f"{key} = {path!r}: a fitted reward has no random weights; name a folder of rlvid reward fit")
    if name in FROM_A_FILE and is_own(path):
        raise ValueError(
            f"{key} = {path!r}: {name!r} takes a checkpoint; for a function of your own, set its name=custom"
        )


def _check_url(url: str, key: str) -> None:
    """Raises ValueError unless an address has a host, and a port that is a number if it has one."""
    try:
        parts = urlsplit(url)
        fine = bool(parts.hostname) and (parts.port is None or parts.port > 0)
    except ValueError:
        fine = False
    if not fine:
        raise ValueError(f"{key} = {url!r} is no address of a server; expected http://HOST:PORT")

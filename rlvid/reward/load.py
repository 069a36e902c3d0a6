"""Loads rewards by name and path; finds errors before weights are read."""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import torch
from torch import nn

from rlvid.config.methods import VALUE_METHODS
from rlvid.config.reward import RemoteConfig, RewardConfig
from rlvid.config.reward_names import FROM_A_FILE, PartReward, check_path, is_url
from rlvid.reward.builtin import BUILTIN, builtin_folder, scores_videos
from rlvid.reward.custom import CustomReward, find_function, load_function
from rlvid.reward.remote import Caller, HttpCaller, ProcessCaller, RemoteReward

if TYPE_CHECKING:
    from rlvid.reward.clip import ClipReward
    from rlvid.reward.fit.folder import FittedVideoReward

Actor = Callable[[str, RemoteConfig], Caller]
"""Starts FILE.py:FUNCTION in a Ray actor, and returns what calls it."""

NAMES = (*BUILTIN, "oracle", *FROM_A_FILE, "brightness", "compression", "custom")


def load_reward(
    name: str,
    device: str | torch.device = "cpu",
    *,
    path: str | None = None,
    key: str = "reward.path",
    precision: str = "float32",
    preprocess: str | None = None,
    chunk: int | None = None,
    checkpoint_activations: bool | None = None,
    remote: RemoteConfig | None = None,
    actor: Actor | None = None,
) -> nn.Module:
    """Returns a reward ``(frames_BSCHW in [0, 1], prompts) -> scores_BS`` (or ``scores_B``), float32, frozen.

    ``builtin`` is the one of the built-in world to train on, ``builtin-heldout`` the one to be judged by, ``oracle``
    reads whole videos of that world. The others are in docs/rewards.md.

    Args:
        name: one of ``NAMES``.
        device: where it computes.
        path: of its weights (``random`` for initial ones), FILE.py:FUNCTION, or a server's address.
        key: the setting that the path is from, for errors.
        precision: of the weights.
        preprocess: name of a preset; default: the reward's own.
        chunk: most frames at once; default: 64 for the built-in ones, else 8.
        checkpoint_activations: recompute a chunk in the backward pass; default: all but the built-in ones.
        remote: how a reward of the user's own is computed elsewhere.
        actor: starts a Ray actor for it, where Ray runs.

    Raises:
        ValueError: no such reward, or its weights or function cannot be loaded.
    """
    where = _given(name, path, key)
    if name == "oracle":
        from rlvid.world.grade import OracleReward

        return OracleReward()
    if name in BUILTIN:
        return load_builtin(name, device, precision, chunk=chunk or 64, recompute=bool(checkpoint_activations))
    if name in ("brightness", "compression"):
        from rlvid.reward.simple import BrightnessReward, CompressionReward

        return BrightnessReward() if name == "brightness" else CompressionReward()
    assert path is not None
    if name == "custom":
        elsewhere = remote is not None or is_url(path)
        return _remote(path, where, remote, actor) if elsewhere else CustomReward(load_function(path, where))
    settings: dict[str, Any] = {"precision": precision, "preprocess": preprocess, "chunk": chunk or 8}
    settings["recompute"] = checkpoint_activations is not False
    if name == "fitted":
        from rlvid.reward.fit.folder import load_fitted

        del settings["preprocess"]
        return load_fitted(path, device, where=where, **settings)
    if name == "imagereward":
        from rlvid.reward.imagereward import load_imagereward

        return load_imagereward(path, device, where=where, **settings)
    from rlvid.reward.published import load_clip_reward

    return load_clip_reward(name, path, device, where=where, **settings)


def _remote(path: str, where: str, settings: RemoteConfig | None, actor: Actor | None) -> nn.Module:
    settings = settings or RemoteConfig()
    whole_video = settings.whole_video
    if is_url(path):
        call: Caller = HttpCaller(path, settings.timeout)
        whole_video = bool(_about(path, where, settings).get("whole_video", whole_video))
    elif settings.where == "process":
        call = ProcessCaller(path, settings.python or sys.executable, settings.timeout)
    elif actor is not None:
        call = actor(path, settings)
    else:
        raise ValueError(f"{where}: reward.remote.where = 'actor' needs Ray, which this command does not start")
    label = path if is_url(path) else f"{Path(path.rpartition(':')[0]).name}:{path.rpartition(':')[2]}"
    return RemoteReward(call, settings, label, whole_video)


def _about(url: str, where: str, settings: RemoteConfig) -> dict[str, Any]:
    try:
        return HttpCaller(url, settings.timeout).about()
    except OSError as error:
        raise ValueError(
            f"{where}: no reward server answers there ({error}); start it, or correct the address"
        ) from None


def load_builtin(
    name: str,
    device: str | torch.device = "cpu",
    precision: str = "float32",
    *,
    chunk: int = 64,
    recompute: bool = False,
) -> "ClipReward | FittedVideoReward":
    """Loads a reward of the built-in world; see ``load_reward``."""
    from rlvid.reward.fit.folder import load_fitted

    where, folder = f"the reward {name!r}", str(builtin_folder(name))
    return load_fitted(folder, device, where=where, precision=precision, chunk=chunk, recompute=recompute)


def _given(name: str, path: str | None, key: str) -> str:
    """Returns the setting, as errors begin; raises ValueError for an unknown reward, or a path that is not for it."""
    if name not in NAMES:
        raise ValueError(f"reward {name!r} does not exist; allowed: {', '.join(NAMES)}")
    if path is None and (name == "custom" or name in FROM_A_FILE):
        form = {"custom": "FILE.py:FUNCTION or http://...", "fitted": "a folder that rlvid reward fit wrote"}.get(
            name, "a local file or folder, or the word random for a dry run"
        )
        raise ValueError(f"{key} is not set, and the reward {name!r} needs it: {form} (docs/rewards.md)")
    check_path(name, path, key)
    return f"{key} = {path!r}"


def check_one(name: str, path: str | None, key: str = "reward.path", remote: RemoteConfig | None = None) -> None:
    """Checks that a reward's path is given and holds the right files; reads no weights, but imports a function.

    A function that runs elsewhere is not imported, since its packages may not be here; a server must answer.

    Raises:
        ValueError: it does not, in one line.
    """
    where = _given(name, path, key)
    if path is None:
        return
    if name == "custom" and is_url(path):
        _about(path, where, remote or RemoteConfig())
    elif name == "custom" and remote is not None:
        find_function(path, where)
        if remote.python is not None and not os.access(python := Path(remote.python).expanduser(), os.X_OK):
            found = "is no program" if python.exists() else "is not there"
            raise ValueError(f"reward.remote.python = {remote.python!r} {found}; name an interpreter of Python")
    elif name == "custom":
        load_function(path, where)
    elif name == "imagereward":
        from rlvid.reward.imagereward import check_files

        check_files(path, where)
    elif name == "fitted":
        from rlvid.reward.fit.folder import check_fitted

        check_fitted(path, where)
    else:
        from rlvid.reward.published import check_files as check_clip_files

        check_clip_files(name, path, where)


def trained_reward(config: RewardConfig, device: str | torch.device = "cpu", actor: Actor | None = None) -> nn.Module:
    """Returns the reward that a run trains on; ``actor`` starts a Ray actor for it, where the settings want one.

    Raises:
        ValueError: as ``load_reward``.
    """
    settings = _settings(config)
    if config.name != "mixture":
        settings |= {"remote": config.remote, "actor": actor}
        made = load_reward(config.name, device, path=config.path, preprocess=config.preprocess, **settings)
        return _labelled(made, config.name)
    from rlvid.reward.mixture import MixtureReward
    from rlvid.reward.motion import MotionReward

    if config.floor_is_open:
        raise ValueError(
            "reward.mixture: the floor of 'motion' is base, which a run measures when it starts, and this is no run; "
            "give a number such as floor=0.03"
        )
    parts = [
        MotionReward(part.floor)
        if isinstance(part.floor, float)
        else load_reward(
            part.name, device, path=part.path, key=f"reward.mixture.{place}.path", preprocess=part.preprocess,
            **settings,
        )
        for place, part in enumerate(config.mixture)
    ]  # fmt: skip
    labels, weights, centres = zip(*((part.label, part.weight, part.centre) for part in config.mixture), strict=True)
    made = MixtureReward(labels, parts, weights, centres, config.pessimism)
    return _labelled(made, "mixture")


def held_out_reward(config: RewardConfig, device: str | torch.device = "cpu") -> nn.Module | None:
    """Returns the reward that a run logs and never trains on, if it has one.

    Raises:
        ValueError: as ``load_reward``.
    """
    if config.held_out is None:
        return None
    settings = _settings(config)
    made = load_reward(config.held_out, device, path=config.held_out_path, key="reward.held_out_path", **settings)
    return _labelled(made, config.held_out)


def _labelled(reward: nn.Module, name: str) -> nn.Module:
    """Returns a reward that messages can name; a function of the user's has its own name already."""
    if not isinstance(reward, CustomReward | RemoteReward):
        reward.label = name  # type: ignore[assignment]
    return reward


def _settings(config: RewardConfig) -> dict[str, Any]:
    return {
        "precision": config.precision,
        "chunk": config.chunk,
        "checkpoint_activations": config.checkpoint_activations,
    }


def check_trust(config: RewardConfig, run: Path, trusted: bool) -> None:
    """Checks that what a run's own settings name is trusted, because the run may be somebody else's.

    Raises:
        ValueError: the rewards of ``run`` are in a Python file or on a server, and the user did not say ``trusted``.
    """
    if not config.foreign or trusted:
        return
    what = [f"run the reward in {path.rpartition(':')[0]}" for path in config.functions]
    what += [f"send videos to {path}" for path in config.foreign if is_url(path)]
    remote = config.remote
    if remote is not None and remote.python is not None:
        what.append(f"run {remote.python}")
    if remote is not None and remote.packages:
        what.append(f"install {', '.join(remote.packages)}")
    raise ValueError(
        f"run {run}: with its own settings an evaluation would {', '.join(what)}; read them, and add --trust if you "
        "trust them"
    )


def check_reward(config: RewardConfig, needs_gradient: bool) -> None:
    """Checks a run's rewards before anything heavy starts; imports a user's functions.

    Raises:
        ValueError: a path is missing or wrong, or a function gives no gradient and the method needs one.
    """
    trained: list[tuple[str, str, str | None]] = []
    if config.name != "mixture":
        trained.append(("reward.path", config.name, config.path))
    trained += [(f"reward.mixture.{place}.path", part.name, part.path) for place, part in enumerate(config.mixture)]
    for key, name, path in trained:
        if name in get_args(PartReward):
            continue
        if name != "custom" or config.remote is not None or is_url(path):
            check_one(name, path, key, config.remote)
            continue
        function = load_function(str(path), where := _given(name, path, key))
        if needs_gradient and not CustomReward(function).differentiable:
            raise ValueError(
                f"{where}: the function says that it is not differentiable, and the method needs its gradient; choose "
                f"one of {VALUE_METHODS}"
            )
    if config.held_out is not None:
        check_one(config.held_out, config.held_out_path, "reward.held_out_path")


def scores_whole_videos(config: RewardConfig) -> bool:
    """Returns whether the trained reward looks at all frames of a video; functions of the user's are imported to see.

    Raises:
        ValueError: there is no such function or folder.
    """
    return any(_scores_whole_videos(name, path, "reward.path", config.remote) for name, path in config.parts)


def held_out_scores_whole_videos(config: RewardConfig) -> bool:
    """Returns the same of the held-out reward."""
    name, path = config.held_out, config.held_out_path
    return name is not None and _scores_whole_videos(name, path, "reward.held_out_path", None)


def _scores_whole_videos(name: str, path: str | None, key: str, remote: RemoteConfig | None) -> bool:
    if name in BUILTIN:
        return scores_videos(name)
    if name == "fitted":
        from rlvid.reward.fit.folder import check_fitted

        return check_fitted(str(path), _given(name, path, key)).head is not None
    return name in ("oracle", "motion") or (name == "custom" and _own_whole_video(str(path), remote))


def _own_whole_video(path: str, remote: RemoteConfig | None) -> bool:
    where = _given("custom", path, "reward.path")
    if is_url(path):
        settings = remote or RemoteConfig()
        return bool(_about(path, where, settings).get("whole_video", settings.whole_video))
    return remote.whole_video if remote else CustomReward(load_function(path, where)).whole_video

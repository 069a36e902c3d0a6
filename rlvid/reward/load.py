"""Loads rewards by name and path; finds errors before weights are read."""

from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from rlvid.config.reward import FROM_A_FILE, RewardConfig, check_path
from rlvid.reward.custom import CustomReward, load_function

if TYPE_CHECKING:
    from rlvid.reward.clip import ClipReward

BUILTIN = {"builtin": "reward", "builtin-heldout": "heldout"}
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
) -> nn.Module:
    """Returns a reward ``(frames_BSCHW in [0, 1], prompts) -> scores_BS`` (or ``scores_B``), float32, frozen.

    ``builtin`` is the one of the built-in world to train on, ``builtin-heldout`` the one to be judged by, ``oracle``
    reads whole videos of that world. The others are in docs/rewards.md.

    Args:
        name: one of ``NAMES``.
        device: where it computes.
        path: of its weights (``random`` for initial ones), or FILE.py:FUNCTION.
        key: the setting that the path is from, for errors.
        precision: of the weights.
        preprocess: name of a preset; default: the reward's own.
        chunk: most frames at once; default: 64 for the built-in ones, else 8.
        checkpoint_activations: recompute a chunk in the backward pass; default: all but the built-in ones.

    Raises:
        ValueError: no such reward, or its weights or function cannot be loaded.
    """
    where = _given(name, path, key)
    if name == "oracle":
        from rlvid.world.grade import OracleReward

        return OracleReward()
    if name in BUILTIN:
        made = load_builtin(name, device, chunk=chunk or 64, recompute=bool(checkpoint_activations))
        return made.to(getattr(torch, precision))
    if name in ("brightness", "compression"):
        from rlvid.reward.simple import BrightnessReward, CompressionReward

        return BrightnessReward() if name == "brightness" else CompressionReward()
    assert path is not None
    if name == "custom":
        return CustomReward(load_function(path, where))
    settings: dict[str, Any] = {"precision": precision, "preprocess": preprocess, "chunk": chunk or 8}
    settings["recompute"] = checkpoint_activations is not False
    if name == "imagereward":
        from rlvid.reward.imagereward import load_imagereward

        return load_imagereward(path, device, where=where, **settings)
    from rlvid.reward.published import load_clip_reward

    return load_clip_reward(name, path, device, where=where, **settings)


def load_builtin(
    name: str, device: str | torch.device = "cpu", *, chunk: int = 64, recompute: bool = False
) -> "ClipReward":
    """A CLIP reward of the built-in world; see ``load_reward``."""
    from rlvid.reward.clip import load_clip_folder

    weights = Path(str(resources.files("rlvid"))) / "toy" / "weights"
    tokenizer = weights / "model" / "tokenizer"
    return load_clip_folder(weights / BUILTIN[name], tokenizer, device, chunk=chunk, recompute=recompute)


def _given(name: str, path: str | None, key: str) -> str:
    """Returns the setting, as errors begin; raises ValueError for an unknown reward, or a path that is not for it."""
    if name not in NAMES:
        raise ValueError(f"reward {name!r} does not exist; allowed: {', '.join(NAMES)}")
    if path is None and (name == "custom" or name in FROM_A_FILE):
        form = "FILE.py:FUNCTION" if name == "custom" else "a local file or folder, or the word random for a dry run"
        raise ValueError(f"{key} is not set, and the reward {name!r} needs it: {form} (docs/rewards.md)")
    check_path(name, path, key)
    return f"{key} = {path!r}"


def check_one(name: str, path: str | None, key: str = "reward.path") -> None:
    """Checks that a reward's path is given and holds the right files; reads no weights, but imports a function.

    Raises:
        ValueError: it does not, in one line.
    """
    where = _given(name, path, key)
    if path is None:
        return
    if name == "custom":
        load_function(path, where)
    elif name == "imagereward":
        from rlvid.reward.imagereward import check_files

        check_files(path, where)
    else:
        from rlvid.reward.published import check_files as check_clip_files

        check_clip_files(name, path, where)


def trained_reward(config: RewardConfig, device: str | torch.device = "cpu") -> nn.Module:
    """Returns the reward that a run trains on.

    Raises:
        ValueError: as ``load_reward``.
    """
    settings = _settings(config)
    if config.name != "mixture":
        made = load_reward(config.name, device, path=config.path, preprocess=config.preprocess, **settings)
        return _labelled(made, config.name)
    from rlvid.reward.mixture import MixtureReward

    parts = [
        load_reward(
            part.name, device, path=part.path, key=f"reward.mixture.{place}.path", preprocess=part.preprocess,
            **settings,
        )
        for place, part in enumerate(config.mixture)
    ]  # fmt: skip
    made = MixtureReward([part.label for part in config.mixture], parts, [part.weight for part in config.mixture])
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
    if not isinstance(reward, CustomReward):
        reward.label = name  # type: ignore[assignment]
    return reward


def _settings(config: RewardConfig) -> dict[str, Any]:
    return {
        "precision": config.precision,
        "chunk": config.chunk,
        "checkpoint_activations": config.checkpoint_activations,
    }


def check_trust(config: RewardConfig, run: Path, trusted: bool) -> None:
    """Checks that a Python file which a run's own settings name is trusted, because the run may be somebody else's.

    Raises:
        ValueError: the rewards of ``run`` are in such a file, and the user did not say that it is ``trusted``.
    """
    if config.functions and not trusted:
        file = config.functions[0].rpartition(":")[0]
        raise ValueError(
            f"run {run}: its settings name a reward in {file}, and an evaluation would run that file; read it, and add "
            "--trust if you trust it"
        )


def check_reward(config: RewardConfig, needs_gradient: bool) -> None:
    """Checks a run's rewards before anything heavy starts; imports a user's functions.

    Raises:
        ValueError: a path is missing or wrong, or a function gives no gradient and the method needs one.
    """
    trained = [("reward.path", config.name, config.path)] if config.name != "mixture" else []
    trained += [(f"reward.mixture.{place}.path", part.name, part.path) for place, part in enumerate(config.mixture)]
    for key, name, path in trained:
        if name != "custom":
            check_one(name, path, key)
            continue
        function = load_function(str(path), where := _given(name, path, key))
        if needs_gradient and not CustomReward(function).differentiable:
            raise ValueError(
                f"{where}: the function says that it is not differentiable, and the method needs its gradient; choose "
                "one of ddpo, dpok, rwr, raft"
            )
    if config.held_out is not None:
        check_one(config.held_out, config.held_out_path, "reward.held_out_path")


def scores_whole_videos(config: RewardConfig) -> bool:
    """Returns whether the trained reward looks at all frames of a video; functions of the user's are imported to see.

    Raises:
        ValueError: there is no such function.
    """
    return any(
        name == "oracle"
        or (name == "custom" and CustomReward(load_function(str(path), _given(name, path, "reward.path"))).whole_video)
        for name, path in config.parts
    )

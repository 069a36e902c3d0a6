"""The shape of a model's videos: frames, height, width and rate, from its configurations; reads no weights."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlvid.config.model import ModelConfig
from rlvid.models.folders import WAN, builtin_folder, family, read_config, structure_folder
from rlvid.models.part_settings import is_count


@dataclass(frozen=True)
class VideoShape:
    """A video's ``frames`` F, ``height`` and ``width`` in pixels, and ``fps``, frames a second."""

    frames: int
    height: int
    width: int
    fps: int

    @property
    def sides(self) -> dict[str, int]:
        """The sides by name, for digests and files: ``size`` of a square."""
        return {"size": self.width} if self.height == self.width else {"height": self.height, "width": self.width}

    @property
    def pixels(self) -> str:
        """The sides for people, as height x width."""
        return f"{self.height} x {self.width}"


BUILTIN_WAN = VideoShape(9, 32, 32, 8)
"""The usual video of the built-in world's model of Wan's classes."""
WAN_2_1 = VideoShape(81, 480, 832, 16)
"""The usual video of Wan2.1."""
WAN_2_2 = VideoShape(121, 704, 1280, 24)
"""The usual video of Wan2.2 TI2V-5B."""


def resolved_shape(spec: ModelConfig) -> VideoShape:
    """Returns the shape of the videos of ``rlvid.models.load.load_video_model``'s model.

    A copy or an export of a built-in model has the built-in model's usual shape.

    Raises:
        ValueError: as ``structure_folder``; or a shape or ``model.shift`` that the model does not have; or the settings
            leave out what the folder does not say.
    """
    folder, of = structure_folder(spec.path), family(spec.path)
    vae = read_config(folder, "vae")
    if of is WAN:
        return _wan_shape(spec, folder, vae)
    if spec.shift is not None:
        raise ValueError(
            f"model.shift = {spec.shift:g}: it moves the noise levels of a flow model, and model.path = {spec.path!r} "
            "is a 3D U-Net; leave it out"
        )
    factor = 2 ** (len(vae.get("block_out_channels", [64])) - 1)
    stored = read_config(folder, "unet").get("sample_size")
    known = is_count(stored)
    if not known and spec.size is None and not (spec.height and spec.width):
        raise ValueError(
            f"model.path = {spec.path!r}: sample_size in unet/config.json is no whole number above 0; set model.size, "
            "or model.height and model.width"
        )
    own = spec.size or (stored * factor if known else 0)
    frames = spec.frames or (8 if _is_built_in("builtin", folder, of.denoiser) else 16)
    shape = VideoShape(frames, spec.height or own, spec.width or own, 8)
    for name, side in shape.sides.items():
        if side % factor:
            raise ValueError(f"model.{name} = {side} is not a multiple of {factor}, which the autoencoder needs")
    return shape


def decoder_chunks(spec: ModelConfig) -> int:
    """Returns the chunks of a Wan model's video, which its causal autoencoder decodes one by one.

    Raises:
        ValueError: as ``resolved_shape``.
    """
    stride: int = read_config(structure_folder(spec.path), "vae").get("scale_factor_temporal", 4)
    return 1 + (resolved_shape(spec).frames - 1) // stride


def _wan_shape(spec: ModelConfig, folder: Path, vae: Mapping[str, Any]) -> VideoShape:
    transformer = read_config(folder, "transformer")
    usual = WAN_2_2 if vae.get("is_residual") else WAN_2_1
    if _is_built_in("builtin-wan", folder, "transformer"):
        usual = BUILTIN_WAN
    frames, height, width = spec.frames or usual.frames, spec.height or usual.height, spec.width or usual.width
    if spec.size is not None:
        height = width = spec.size
    most_frames, most_side = _most(transformer, vae)
    sides = (0 if spec.height else usual.height, 0 if spec.width else usual.width)
    missing = ["model.frames"] if spec.frames is None and usual.frames > most_frames else []
    if spec.size is None and max(sides) > most_side:
        one = "model.height" if spec.width else "model.width" if spec.height else "model.size"
        missing.append(one)
    if missing:
        raise ValueError(
            f"model.path = {spec.path!r}: Wan's usual {usual.frames} frames of {usual.pixels} pixels are more than the "
            f"model has positions for (transformer: rope_max_seq_len); set {' and '.join(missing)}; allowed: up "
            f"to {most_frames} frames and {most_side} pixels a side"
        )
    check_wan_shape(transformer, vae, frames, height, width, square=spec.size is not None)
    return VideoShape(frames, height, width, usual.fps)


def _is_built_in(name: str, folder: Path, part: str) -> bool:
    """Returns whether a network has the structure of a built-in model's, whatever the path of its folder."""
    own, found = read_config(builtin_folder(name), part), read_config(folder, part)
    return all(found.get(key) == value for key, value in own.items() if not key.startswith("_"))


def _token_side(transformer: Mapping[str, Any], vae: Mapping[str, Any]) -> int:
    """Returns the pixels of a token's side."""
    return int(vae.get("scale_factor_spatial", 8) * transformer.get("patch_size", (1, 2, 2))[1])


def _most(transformer: Mapping[str, Any], vae: Mapping[str, Any]) -> tuple[int, int]:
    """Returns the most frames, and the longest side in pixels, that the transformer's rotary positions reach."""
    positions = transformer.get("rope_max_seq_len", 1024)
    latent_frames = positions * transformer.get("patch_size", (1, 2, 2))[0]
    return (latent_frames - 1) * vae.get("scale_factor_temporal", 4) + 1, positions * _token_side(transformer, vae)


def check_wan_shape(
    transformer: Mapping[str, Any],
    vae: Mapping[str, Any],
    frames: int,
    height: int,
    width: int,
    *,
    square: bool = False,
) -> None:
    """Checks the shape of a Wan model's video against its networks' settings; diffusers would cut it without an error.

    Args:
        transformer: settings.
        vae: settings.
        frames: F.
        height: in pixels.
        width: in pixels.
        square: the sides were set as ``model.size``.

    Raises:
        ValueError: the frames are not one more than a multiple of the autoencoder's stride in time, a side in pixels is
            not a multiple of a token's, or the transformer has too few positions (``rope_max_seq_len``).
    """
    most_frames, most_side = _most(transformer, vae)
    multiple = _token_side(transformer, vae)
    sides = {"size": height} if square else {"height": height, "width": width}
    limits = {"frames": (frames, most_frames)} | {name: (side, most_side) for name, side in sides.items()}
    for name, (value, most) in limits.items():
        if value > most:
            raise ValueError(
                f"model.{name} = {value}; allowed for this model: up to {most}, as far as its transformer has "
                "positions (rope_max_seq_len)"
            )
    check_wan_frames(frames, vae.get("scale_factor_temporal", 4))
    for name, side in sides.items():
        if side < multiple or side % multiple:
            near = max(side // multiple, 1) * multiple
            raise ValueError(
                f"model.{name} = {side}; allowed for this model: multiples of {multiple}, such as {near} or "
                f"{near + multiple}"
            )


def check_wan_frames(frames: int, stride: int) -> None:
    """Raises ValueError when frames are not one more than a multiple of the autoencoder's stride in time."""
    if frames < 1 or (frames - 1) % stride:
        near = max((frames - 1) // stride, 1) * stride + 1
        raise ValueError(
            f"model.frames = {frames}; allowed for this model: {stride} n + 1, such as {near} or {near + stride}"
        )

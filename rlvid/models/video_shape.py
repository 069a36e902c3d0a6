"""The shape of a model's videos: frames, height, width and rate, from its configurations; reads no weights."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rlvid.config.model import ModelConfig
from rlvid.models.folders import WAN, family, read_config, structure_folder


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

    Raises:
        ValueError: as ``structure_folder``; or a shape or ``model.shift`` that the model does not have.
    """
    folder, of = structure_folder(spec.path), family(spec.path)
    vae = read_config(folder, "vae")
    if of is WAN:
        usual = WAN_2_2 if vae.get("is_residual") else WAN_2_1
        if spec.path == "builtin-wan":
            usual = BUILTIN_WAN
        frames, height, width = spec.frames or usual.frames, spec.height or usual.height, spec.width or usual.width
        if spec.size is not None:
            height = width = spec.size
        check_wan_shape(read_config(folder, "transformer"), vae, frames, height, width, square=spec.size is not None)
        return VideoShape(frames, height, width, usual.fps)
    if spec.shift is not None:
        raise ValueError(
            f"model.shift = {spec.shift:g}: it moves the noise levels of a flow model, and model.path = {spec.path!r} "
            "is a 3D U-Net; leave it out"
        )
    factor = 2 ** (len(vae["block_out_channels"]) - 1)
    own = spec.size or read_config(folder, "unet")["sample_size"] * factor
    shape = VideoShape(spec.frames or (8 if spec.path == "builtin" else 16), spec.height or own, spec.width or own, 8)
    for name, side in shape.sides.items():
        if side % factor:
            raise ValueError(f"model.{name} = {side} is not a multiple of {factor}, which the autoencoder needs")
    return shape


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
        ValueError: the frames are not one more than a multiple of the autoencoder's stride in time, or a side in pixels
            is not a multiple of a token's.
    """
    check_wan_frames(frames, vae.get("scale_factor_temporal", 4))
    multiple = vae.get("scale_factor_spatial", 8) * transformer.get("patch_size", (1, 2, 2))[1]
    for name, side in {"size": height}.items() if square else {"height": height, "width": width}.items():
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

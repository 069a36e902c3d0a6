"""Reads image files as a viewer shows them: turned by their EXIF data, transparent pixels on black. No torch."""

import io
import struct
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from rlvid.files import stand_in

IMAGES = (".png", ".jpg", ".jpeg", ".webp")
"""Endings of files that are images."""
MAX_PIXELS, MAX_RATIO = 2**24, 32
"""Largest number of pixels of an image (4096 x 4096), and of its longer side over its shorter one; more would be an
attack on memory."""
_FORMATS = ("PNG", "JPEG", "WEBP")
_EIGHT_BITS = ("1", "L", "P", "RGB", "CMYK", "YCbCr")
_WITH_ALPHA = ("LA", "PA", "RGBA", "La", "RGBa")
_UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, IndexError, KeyError, TypeError, struct.error)


class ImageError(ValueError):
    """A file that cannot be read as an image; the message names the file and the reason."""


def read_image(path: str | Path) -> np.ndarray:
    """Reads a PNG, JPEG or WebP file; of an animation the first frame.

    Args:
        path: of the file.

    Returns:
        pixels_HWC, uint8, RGB.

    Raises:
        ImageError: missing, empty, damaged, cut off, not an image, too large, or of more than 8 bits.
    """
    path = Path(path)
    try:
        if not path.is_file() or not path.stat().st_size:
            raise ImageError(f"{path}: {'is empty' if path.is_file() else 'no such file'}")
        if found := stand_in(path):
            raise ImageError(f"{path}: {found}")
        return decode_image(path.read_bytes(), str(path))
    except OSError as error:
        raise ImageError(f"{path}: cannot be read: {error.strerror}") from error


def decode_image(data: bytes, where: str) -> np.ndarray:
    """Decodes the content of an image file; see ``read_image``. Errors begin with ``where``."""
    try:
        with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
            sides = (image.width, image.height)
            if image.width * image.height > MAX_PIXELS or max(sides) > MAX_RATIO * min(sides):
                raise ImageError(
                    f"{where}: has {image.width} x {image.height} pixels; allowed are {MAX_PIXELS} pixels, and a side "
                    f"at most {MAX_RATIO} times the other"
                )
            turned = ImageOps.exif_transpose(image)
            if turned.mode in _WITH_ALPHA or "transparency" in turned.info:
                seen = turned.convert("RGBA")
                turned = Image.alpha_composite(Image.new("RGBA", seen.size, (0, 0, 0, 255)), seen)
            elif turned.mode not in _EIGHT_BITS:
                raise ImageError(f"{where}: has pixels of the type {turned.mode}; save it with 8 bits a colour")
            return np.asarray(turned.convert("RGB"))
    except ImageError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise ImageError(f"{where}: has too many pixels; allowed are {MAX_PIXELS}") from None
    except _UNREADABLE as error:
        # Pillow's own words for a file of another kind are the address of a buffer.
        reason = "" if isinstance(error, UnidentifiedImageError) else f" ({' '.join(str(error).split())[:120]})"
        raise ImageError(f"{where}: is no whole PNG, JPEG or WebP image{reason}") from None

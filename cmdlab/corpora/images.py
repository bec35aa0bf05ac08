"""Reads one image file that nobody vouches for."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, UnidentifiedImageError
from PIL.Image import Transpose

from cmdlab.corpora.untrusted import is_regular
from cmdlab.errors import InputError

MAX_PIXELS = 50_000_000  # 150 MB once decoded; COCO's and Flickr8k's largest have under 1 million


def read_image(path: Path | str) -> NDArray[np.uint8]:
    """Decode one JPEG or PNG file as RGB, upright as its EXIF orientation says.

    Returns uint8 [height, width, 3]. The size is checked before anything is decoded.
    Raises InputError for a file that is missing, corrupt, truncated, huge or of another format.
    """
    path = Path(path)
    if not is_regular(path):
        raise InputError(f"{path}: is no file; add it or remove its entry")
    try:
        with Image.open(path, formats=("JPEG", "PNG")) as image:
            if image.width * image.height > MAX_PIXELS:
                raise InputError(
                    f"{path}: image of {image.width} × {image.height} pixels is over the limit "
                    f"of {MAX_PIXELS}; shrink it"
                )
            if image.mode.startswith(("I", "F")):
                raise InputError(f"{path}: image has more than 8 bits a colour; save it with 8")
            image.load()
            return np.asarray(upright(image).convert("RGB"))
    except InputError:
        raise
    except UnidentifiedImageError as error:
        raise InputError(f"{path}: {_what_it_is(path)}") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        message = f"{path}: image is over the limit of {MAX_PIXELS} pixels; shrink it"
        raise InputError(message) from error
    except Exception as error:  # corrupt files make Pillow's decoders raise nearly anything
        said = getattr(error, "strerror", None) or str(error)  # an OSError names the path again
        reason = " ".join(said.split()) or type(error).__name__
        raise InputError(
            f"{path}: is no readable JPEG or PNG image ({reason}); replace it"
        ) from error


def _what_it_is(path: Path) -> str:
    try:
        with Image.open(path) as image:  # reads the header alone
            return f"is a {image.format} image; save it as JPEG or PNG"
    except Exception:  # any decoder may raise anything: then it is no image of any format
        return "is no readable JPEG or PNG image, nor any other; replace it"


def upright(image: Image.Image) -> Image.Image:
    """The picture turned as its EXIF orientation says.

    Pillow's own `exif_transpose` rewrites the EXIF data, and so fails where they are damaged, as
    some cameras' are: that is no reason to lose a picture. Without a readable orientation it stays
    as it is.
    """
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # damaged EXIF data make Pillow raise nearly anything
        return image
    turn = _TURNS.get(orientation)
    return image if turn is None else image.transpose(turn)


_TURNS = {
    2: Transpose.FLIP_LEFT_RIGHT,
    3: Transpose.ROTATE_180,
    4: Transpose.FLIP_TOP_BOTTOM,
    5: Transpose.TRANSPOSE,
    6: Transpose.ROTATE_270,
    7: Transpose.TRANSVERSE,
    8: Transpose.ROTATE_90,
}

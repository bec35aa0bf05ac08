"""Reads one image file that nobody vouches for."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from cmdlab.corpora.untrusted import is_regular
from cmdlab.errors import InputError

MAX_PIXELS = 50_000_000  # 150 MB once decoded; COCO's and Flickr8k's largest have under 1 million


def read_image(path: Path | str) -> NDArray[np.uint8]:
    """Decode one JPEG or PNG file as RGB. Returns uint8 [height, width, 3].

    The size is checked before anything is decoded.
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
            return np.asarray(image.convert("RGB"))
    except InputError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        message = f"{path}: image is over the limit of {MAX_PIXELS} pixels; shrink it"
        raise InputError(message) from error
    except Exception as error:  # corrupt files make Pillow's decoders raise nearly anything
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(
            f"{path}: is no readable JPEG or PNG image ({reason}); replace it"
        ) from error

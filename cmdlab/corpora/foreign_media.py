"""Makes of any sound and any picture what a corpus holds: 16 kHz mono speech, upright RGB."""

from __future__ import annotations

import io
from functools import cache
from math import gcd

import numpy as np
import soundfile
from numpy.typing import ArrayLike, NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from cmdlab.corpora.audio import MAX_SECONDS, OVERSHOOT, SAMPLE_RATE, reason_of, with_its_length
from cmdlab.corpora.images import MAX_PIXELS, upright
from cmdlab.corpora.near_duplicates import perceptual_hash
from cmdlab.corpora.untrusted import BadEntry

LONG_SIDE = 1024  # pixels; COCO's and Flickr8k's have up to 640, and no encoder takes more than 336
RATES = (1_000, 384_000)  # Hz, of what a recorder can have meant
QUIET = 10 ** (-30 / 20)  # of the loudest 10 ms: 30 dB below
LONGEST_SILENCE = 0.15  # seconds; captions in corpora begin and end with some
MARGIN = 0.02  # seconds that are left of a longer one
BLOCK = 16_384  # frames decoded at a time: a few bytes can promise 1,024 channels and days


def convert_sound(content: bytes, *, trimmed: bool = False) -> tuple[bytes, str]:
    """A sound file of any kind that libsndfile reads, as 16 kHz mono. Returns content and suffix.

    Channels are averaged; `trimmed`, long silence at the ends is cut, as a search cuts it. What is
    16-bit WAV or FLAC at 16 kHz with one channel and nothing to cut stays as it is, byte for byte;
    all else becomes 16-bit FLAC.
    Raises BadEntry for what is corrupt, truncated, empty, over MAX_SECONDS long, not finite or out
    of scale.
    """
    waveform, ready, form = _decoded(content)
    said = without_silence(waveform, SAMPLE_RATE) if trimmed else waveform
    if ready and len(said) == len(waveform):
        return content, f".{form.lower()}"
    converted = io.BytesIO()
    soundfile.write(converted, said, SAMPLE_RATE, format="FLAC", subtype="PCM_16")
    return converted.getvalue(), ".flac"


def decode_sound(content: bytes, *, longest: int = MAX_SECONDS) -> NDArray[np.float32]:
    """A sound file of any kind that libsndfile reads: float32 [samples] at 16 kHz in [-1, 1].

    Channels are averaged. longest: in seconds; no more is decoded. Raises BadEntry as
    `convert_sound` does.
    """
    return _decoded(content, longest)[0]


def to_speech(samples: ArrayLike, rate: int) -> NDArray[np.float32]:
    """Recorded samples, [samples] or [samples, channels], at `rate` Hz: float32 [samples] at 16 kHz
    in [-1, 1]. Whole numbers are scaled by their type's range. Raises BadEntry as `convert_sound`
    does."""
    waveform = np.asarray(samples)
    if waveform.ndim not in (1, 2) or waveform.dtype.kind not in "fiu" or not waveform.size:
        raise BadEntry(
            f"is {waveform.dtype} {list(waveform.shape)}, no sound; give [samples] or "
            "[samples, channels]"
        )
    if waveform.dtype.kind in "iu":
        limits = np.iinfo(waveform.dtype)
        middle = 0.0 if waveform.dtype.kind == "i" else (int(limits.max) + 1) / 2
        waveform = (waveform - middle) / (int(limits.max) + 1 - middle)
    _check_rate(rate)
    if len(waveform) > MAX_SECONDS * rate:
        raise BadEntry(f"lasts over {MAX_SECONDS} s; cut it")
    mono = waveform.reshape(len(waveform), -1).mean(axis=1, dtype=np.float32)
    return _resampled(_finite(mono), rate)


def without_silence(samples: NDArray[np.float32], rate: int) -> NDArray[np.float32]:
    """What is said in a recording: of silence at its ends, where it is over 0.15 s, 20 ms are left.

    samples: [samples] at `rate` Hz. People wait before they speak and before they press the button,
    and encoders that take a caption as a whole take that for a part of it.
    """
    step = max(1, rate // 100)
    blocks = samples[: len(samples) // step * step].reshape(-1, step)
    level = np.sqrt(np.square(blocks, dtype=np.float64).mean(1))
    loud = np.flatnonzero(level > QUIET * level.max(initial=0.0))
    if not len(loud):
        return samples
    first, last = int(loud[0]) * step, int(loud[-1] + 1) * step
    margin, longest = round(MARGIN * rate), round(LONGEST_SILENCE * rate)
    if first <= longest:
        first = margin
    if len(samples) - last <= longest:
        last = len(samples) - margin
    return samples[first - margin : last + margin]


def _decoded(content: bytes, longest: int = MAX_SECONDS) -> tuple[NDArray[np.float32], bool, str]:
    """float32 [samples] at 16 kHz, whether a corpus takes the file as it is, and its format."""
    try:
        whole = with_its_length(io.BytesIO(content), len(content))
        with soundfile.SoundFile(whole or io.BytesIO(content)) as file:
            form, rate = file.format, file.samplerate
            ready = (file.subtype, rate, file.channels) == ("PCM_16", SAMPLE_RATE, 1)
            waveform = _mono(file, longest)
    except (soundfile.SoundFileError, OSError) as error:
        reason = reason_of(error) if content else "empty file"
        raise BadEntry(
            f"is no sound that libsndfile reads, or is corrupt ({reason}); save it as WAV or FLAC"
        ) from error
    return _resampled(waveform, rate), ready and not whole and form in ("WAV", "FLAC"), form


def _resampled(waveform: NDArray[np.float32], rate: int) -> NDArray[np.float32]:
    if rate != SAMPLE_RATE:
        from scipy.signal import resample_poly  # takes a while to import

        divisor = gcd(rate, SAMPLE_RATE)
        waveform = resample_poly(waveform, SAMPLE_RATE // divisor, rate // divisor)
    return np.clip(waveform, -1, 1)


def _mono(file: soundfile.SoundFile, longest: int) -> NDArray[np.float32]:
    """The mean of a file's channels, at its own rate: float32 [samples]. Raises BadEntry."""
    rate, stated = file.samplerate, file.frames
    _check_rate(rate)
    blocks: list[NDArray[np.float32]] = []
    samples = 0
    while len(block := file.read(BLOCK, dtype="float32", always_2d=True)):
        blocks.append(block.mean(axis=1))
        samples += len(block)
        if samples > longest * rate:
            raise BadEntry(f"lasts over {longest} s; cut it")
    if not samples:
        raise BadEntry("holds no sound; replace it or remove its entry")
    if samples < stated and file.format != "MPEG":  # an MP3 file states no more than an estimate
        raise BadEntry(f"is truncated ({samples} of {stated} samples); replace it")
    return _finite(np.concatenate(blocks))


def _check_rate(rate: int) -> None:
    if not RATES[0] <= rate <= RATES[1]:
        raise BadEntry(f"has a sampling rate of {rate} Hz; resample it to {SAMPLE_RATE} Hz")


def _finite(waveform: NDArray[np.float32]) -> NDArray[np.float32]:
    peak = np.abs(waveform).max()
    if not np.isfinite(peak):
        raise BadEntry("holds samples that are no finite number; replace it")
    if peak > OVERSHOOT:
        raise BadEntry(f"holds samples up to {peak:g}; scale them to [-1, 1]")
    return waveform


def convert_picture(content: bytes, *, side: int | None = None) -> tuple[bytes, str, bytes]:
    """A picture of any kind that Pillow reads, as upright RGB. Returns content, suffix and hash.

    Of an animation the first frame; transparent parts are laid on white. With `side` the square in
    its middle, as a PNG file of `side` × `side` pixels. Without it, opaque 8-bit JPEG and PNG files
    up to LONG_SIDE stay as they are, byte for byte (readers follow their EXIF orientation); all
    else becomes JPEG, shrunk to LONG_SIDE. The hash is `perceptual_hash`'s.
    Raises BadEntry for what is corrupt, truncated, over MAX_PIXELS or of no such kind.
    """
    picture, form, ready = _opened(content, side or LONG_SIDE)
    if ready and side is None:
        return content, ".png" if form == "PNG" else ".jpg", perceptual_hash(picture)
    if side is not None:
        picture = middle_square(picture, side)
    else:
        picture.thumbnail((LONG_SIDE, LONG_SIDE), Image.Resampling.LANCZOS)
    converted = io.BytesIO()
    if side is not None:
        picture.save(converted, "PNG")
    else:
        picture.save(converted, "JPEG", quality=95, subsampling=0)  # drawings keep their edges
    return converted.getvalue(), ".jpg" if side is None else ".png", perceptual_hash(picture)


def decode_picture(content: bytes, *, side: int | None = None) -> Image.Image:
    """A picture of any kind that Pillow reads, upright and RGB, as `convert_picture` keeps it but
    for its size: with `side` the square in its middle, else what there is. Raises BadEntry."""
    picture = _opened(content, side or MAX_PIXELS)[0]
    return middle_square(picture, side) if side else picture


def to_picture(image: Image.Image, *, side: int | None = None) -> Image.Image:
    """The same of a picture that is open already. Raises BadEntry for more than MAX_PIXELS."""
    _check_size(image)
    picture = _opaque(upright(image))
    return middle_square(picture, side) if side else picture


def middle_square(picture: Image.Image, side: int) -> Image.Image:
    """The square in the middle of a picture, `side` × `side` pixels."""
    return ImageOps.fit(picture, (side, side), Image.Resampling.LANCZOS)


def _opened(content: bytes, long_side: int) -> tuple[Image.Image, str, bool]:
    """Upright RGB; the file's format; whether the file may stay as it is."""
    try:
        with Image.open(io.BytesIO(content), formats=_formats()) as image:
            _check_size(image)
            form = image.format or ""
            ready = (
                form in ("JPEG", "PNG")
                and image.mode in ("RGB", "L")
                and not image.has_transparency_data
                and max(image.size) <= LONG_SIDE
            )
            # A JPEG decoder can leave out what shrinking would drop.
            image.draft(None, (2 * long_side,) * 2)
            image.load()
            return _opaque(upright(image)), form, ready
    except BadEntry:
        raise
    except UnidentifiedImageError as error:
        raise BadEntry("is no picture that Pillow reads; save it as JPEG or PNG") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise BadEntry(f"is over the limit of {MAX_PIXELS} pixels; shrink it") from error
    except Exception as error:  # corrupt files make Pillow's decoders raise nearly anything
        reason = " ".join(str(error).split()) or type(error).__name__
        raise BadEntry(f"is no readable picture ({reason}); save it as JPEG or PNG") from error


def _check_size(image: Image.Image) -> None:
    if image.width * image.height > MAX_PIXELS:
        size = f"{image.width} × {image.height}"
        raise BadEntry(f"has {size} pixels, over the limit of {MAX_PIXELS}; shrink it")


@cache
def _formats() -> list[str]:
    """All that Pillow reads but PostScript, which is a program that Ghostscript would run."""
    Image.init()
    return [name for name in Image.ID if name != "EPS"]


def _opaque(image: Image.Image) -> Image.Image:
    """Any mode as RGB, transparent parts on white."""
    if image.mode.startswith(("I", "F")):
        image = Image.fromarray(_eight_bits(image))
    if not image.has_transparency_data:
        return image.convert("RGB")
    above = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", above.size, "white"), above).convert("RGB")


def _eight_bits(image: Image.Image) -> NDArray[np.uint8]:
    """Grey of 16 or 32 bits: integers have 16 that count, floats are stretched to their range."""
    values = np.asarray(image).astype(np.float64)
    if image.mode.startswith("I"):
        return (np.clip(values, 0, 65_535) / 257).round().astype(np.uint8)
    low, high = values.min(), values.max()
    if not np.isfinite(high - low):
        raise BadEntry("holds values that are no finite number; save it as JPEG or PNG")
    return ((values - low) / max(high - low, 1e-30) * 255).round().astype(np.uint8)

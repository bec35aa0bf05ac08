"""Reads speech, and degrades it on request: additive noise and reverberation."""

from __future__ import annotations

import hashlib
import io
import os
import struct
from functools import cache
from pathlib import Path
from typing import BinaryIO

import numpy as np
import soundfile
from numpy.typing import NDArray

from cmdlab.corpora.corpus import Caption
from cmdlab.corpora.untrusted import BadEntry, is_regular
from cmdlab.errors import InputError

SAMPLE_RATE = 16_000  # Hz
BLOCK = 16_384  # samples that a room's response is convolved with at a time
MAX_SECONDS = 300  # spoken captions last seconds; a header can promise days
MAX_BYTES = MAX_SECONDS * SAMPLE_RATE * 8 + (1 << 20)  # 64 bits a sample, and what precedes them
OVERSHOOT = 2.0  # lossy decoders and resamplers go a little over full scale, which is 1


def read_speech(
    caption: Caption,
    *,
    snr_db: float | tuple[float, float] | None = None,
    reverberation: bool = False,
    seed: int = 0,
) -> NDArray[np.float32]:
    """A caption's sound, degraded as asked. Returns float32 [samples] at 16 kHz.

    What is drawn depends on `seed` and the caption's id only, so a caption sounds the same in
    every epoch, order and process. `snr_db` may be a range, from which each caption's is drawn.
    Raises InputError as `read_audio` does.
    """
    waveform = read_audio(caption.audio)
    drawn = caption_seed(caption.id, seed)
    if isinstance(snr_db, tuple):
        snr_db = float(np.random.default_rng([drawn, 1]).uniform(*snr_db))
    return degrade(waveform, snr_db=snr_db, reverberation=reverberation, seed=drawn)


def caption_seed(caption_id: str, seed: int = 0) -> int:
    """A 64-bit seed of its own for each caption."""
    return int.from_bytes(hashlib.sha256(f"{seed} {caption_id}".encode()).digest()[:8], "big")


def read_audio(path: Path | str) -> NDArray[np.float32]:
    """Read one 16 kHz mono WAV or FLAC file. Returns float32 [samples] within [-1, 1].

    A WAV file that was written to a pipe, and so does not state its length, is read to its end.
    Floats up to 2, the overshoot of decoders and resamplers, are clipped to 1, as saving them with
    16 bits would do.
    Raises InputError for a file that is missing, empty, truncated, too long, of another format,
    sampling rate or number of channels, or that holds values that are larger or not finite.
    """
    path = Path(path)
    if not is_regular(path):
        raise InputError(f"{path}: is no file; add it or remove its entry")
    try:
        with path.open("rb") as raw:
            whole = with_its_length(raw, os.path.getsize(path))
        with soundfile.SoundFile(whole or os.fsencode(path)) as file:
            _check_header(path, file)
            frames = file.frames
            waveform = file.read(dtype="float32")
    except BadEntry as error:
        raise InputError(f"{path}: {error}") from error
    except (soundfile.SoundFileError, OSError) as error:
        reason = "empty file" if path.stat().st_size == 0 else reason_of(error)
        message = f"{path}: is no sound file, or is corrupt or truncated ({reason}); replace it"
        raise InputError(message) from error
    if len(waveform) < frames:
        raise InputError(f"{path}: is truncated ({len(waveform)} of {frames} samples); replace it")
    peak = np.abs(waveform).max()
    if not np.isfinite(peak):
        raise InputError(f"{path}: holds samples that are no finite number; replace it")
    if peak > OVERSHOOT:
        raise InputError(f"{path}: holds samples up to {peak:g}; scale them to [-1, 1]")
    return waveform if peak <= 1 else np.clip(waveform, -1, 1)


def degrade(
    waveform: NDArray[np.float32], *, snr_db: float | None, reverberation: bool, seed: int
) -> NDArray[np.float32]:
    """Speech as heard in a room and through noise. float32 [samples] at 16 kHz, the same length.

    The room comes first, then noise of a kind drawn from white, pink and babble-like. `snr_db` is
    exact: the power of the (reverberant) speech over that of the noise, both over the whole
    waveform; None adds no noise. The sum is not clipped to [-1, 1]. Silence stays silence.
    Raises ValueError for a waveform that is not one-dimensional or an SNR that is not finite.
    """
    if waveform.ndim != 1:
        raise ValueError(f"a waveform has one dimension, not {waveform.ndim}")
    if snr_db is not None and not np.isfinite(snr_db):
        raise ValueError(
            f"a signal-to-noise ratio must be finite, not {snr_db}; None adds no noise"
        )
    random = np.random.default_rng(seed)
    speech = waveform.astype(np.float32)
    power = _power(speech)
    if power == 0.0:
        return speech
    if reverberation:
        speech = _convolve(speech, _room_response(random))
        speech *= np.float32(np.sqrt(power / _power(speech)))
    if snr_db is not None:
        noise = _noise(random, len(speech))
        speech = speech + noise * np.float32(np.sqrt(power / _power(noise) / 10 ** (snr_db / 10)))
    return speech


def _power(waveform: NDArray[np.float32]) -> float:
    """Mean square, summed in double precision."""
    return float(np.mean(np.square(waveform, dtype=np.float64))) if len(waveform) else 0.0


def _convolve(waveform: NDArray[np.float32], response: NDArray[np.float32]) -> NDArray[np.float32]:
    """Their convolution, as long as the waveform, by overlap-save in blocks.

    By torch's Fourier transforms: scipy.signal.oaconvolve gives the same in twice the time, which
    was a fifth of a caption's.
    """
    import torch  # not for those who only read

    past = len(response) - 1
    step = BLOCK - past  # new samples of a block
    blocks = -(-len(waveform) // step)
    padded = torch.zeros(past + blocks * step)
    padded[past : past + len(waveform)] = torch.from_numpy(waveform)
    spectra = torch.fft.rfft(padded.unfold(0, BLOCK, step))
    spectra *= torch.fft.rfft(torch.from_numpy(response), BLOCK)
    return torch.fft.irfft(spectra, BLOCK)[:, past:].flatten()[: len(waveform)].numpy()


def _room_response(random: np.random.Generator) -> NDArray[np.float32]:
    """The direct sound at sample 0, so that words keep their times, then a decaying noise tail.

    Polack's statistical model: Gaussian noise whose level falls by 60 dB in the reverberation
    time, here 0.2–0.6 s; the tail has 0–10 dB less energy than the direct sound.
    """
    reverberation_time = random.uniform(0.2, 0.6)
    samples = np.arange(int(reverberation_time * SAMPLE_RATE), dtype=np.float32)
    tail = random.standard_normal(len(samples), dtype=np.float32)
    tail *= np.exp(samples * np.float32(-3 * np.log(10) / (reverberation_time * SAMPLE_RATE)))
    tail[: SAMPLE_RATE * 2 // 1000] = 0.0  # the first reflection comes 2 ms late
    tail *= np.sqrt(10 ** (-random.uniform(0.0, 10.0) / 10) / np.sum(tail**2), dtype=np.float32)
    tail[0] = 1.0
    return tail


def _noise(random: np.random.Generator, length: int) -> NDArray[np.float32]:
    """A piece of one of three long noises, from a random place on, of any level: [length]."""
    noise = _long_noise(("white", "pink", "babble")[int(random.integers(3))])
    start = int(random.integers(len(noise)))
    if start + length <= len(noise):
        return noise[start : start + length]
    return np.take(noise, np.arange(start, start + length), mode="wrap")


@cache
def _long_noise(kind: str) -> NDArray[np.float32]:
    """A minute of noise, always the same, that closes on itself: float32 [samples].

    White; pink (power falls as 1/f); or babble-like: the long-term spectrum of speech (flat to
    500 Hz, then 9 dB less an octave), its level swaying at the rate of syllables.
    """
    random = np.random.default_rng(60)
    size = 60 * SAMPLE_RATE
    noise = random.standard_normal(size)
    frequency = np.fft.rfftfreq(size, 1 / SAMPLE_RATE)
    if kind == "pink":
        noise = np.fft.irfft(np.fft.rfft(noise) / np.sqrt(np.maximum(frequency, 20.0)), size)
    elif kind == "babble":
        spectrum = np.maximum(frequency / 500.0, 1.0) ** -1.5
        noise = np.fft.irfft(np.fft.rfft(noise) * spectrum, size)
        sway = np.fft.rfft(random.standard_normal(size)) * (frequency < 8.0)
        level = np.fft.irfft(sway, size)
        noise *= 1.0 + 0.4 * level / level.std()
    return noise.astype(np.float32)


def _check_header(path: Path, file: soundfile.SoundFile) -> None:
    if file.format not in ("WAV", "WAVEX", "RF64", "FLAC"):
        raise InputError(f"{path}: is {file.format} sound; convert it to WAV or FLAC")
    if file.samplerate != SAMPLE_RATE:
        raise InputError(
            f"{path}: has a sampling rate of {file.samplerate} Hz; resample it to {SAMPLE_RATE} Hz"
        )
    if file.channels != 1:
        raise InputError(f"{path}: has {file.channels} channels; mix it down to one")
    if file.frames <= 0:
        raise InputError(f"{path}: holds no sound; replace it or remove its caption")
    if file.format == "FLAC" and file.frames == _UNSTATED:
        raise InputError(f"{path}: does not state its length; write it to a file, not to a pipe")
    if file.frames > MAX_SECONDS * SAMPLE_RATE:
        seconds = file.frames / SAMPLE_RATE
        raise InputError(f"{path}: lasts {seconds:.0f} s, over {MAX_SECONDS} s; cut it")


_UNSTATED = 2**63 - 1  # what libsndfile gives as the length of such a FLAC file, and cannot read


def with_its_length(file: BinaryIO, size: int) -> io.BytesIO | None:
    """A WAV file with the length that its writer, who wrote to a pipe, could not go back to state.

    `size` is the file's, in bytes. None for every other file. Raises BadEntry for a WAV file that
    lacks a part of its end: libsndfile quietly reads what there is.
    """
    kind = file.read(4)
    if kind not in (b"RIFF", b"RIFX", b"RF64"):
        return None
    order = ">" if kind == b"RIFX" else "<"  # of the bytes in a number
    (riff_size,) = struct.unpack(f"{order}I", file.read(4).ljust(4))
    start, length = _sound_of_wav(file, order)
    if length < _PLACEHOLDER and (length or riff_size + 8 == size):
        if start + length > size:
            missing = start + length - size
            raise BadEntry(f"is truncated ({missing} bytes are missing); replace it")
        return None
    if size > MAX_BYTES:
        raise BadEntry(f"has over {MAX_BYTES >> 20} MiB, for {MAX_SECONDS} s; cut it")
    file.seek(0)
    content = bytearray(file.read())
    content[:4] = kind.replace(b"RF64", b"RIFF")
    struct.pack_into(f"{order}I", content, 4, size - 8)
    struct.pack_into(f"{order}I", content, start - 4, size - start)
    return io.BytesIO(content)


_PLACEHOLDER = 0x7FFF_0000  # bytes, 18 hours; ffmpeg, sox and arecord write such and larger ones


def _sound_of_wav(file: BinaryIO, order: str) -> tuple[int, int]:
    """Where the samples of a WAV file begin, and how many bytes they are said to take.

    From byte 12 on the file is a row of chunks, each an id, a size (32 bits) and that many bytes,
    padded to an even number. RF64 states the size of its samples in a chunk "ds64" before them.
    """
    file.seek(12)
    length = None
    while len(header := file.read(8)) == 8:
        name, size = struct.unpack(f"{order}4sI", header)
        if name == b"data":
            return file.tell(), size if length is None else length
        following = file.tell() + size + size % 2
        if name == b"ds64":
            _, length = struct.unpack("<QQ", file.read(16).ljust(16))
        file.seek(following)
    raise soundfile.SoundFileRuntimeError("it has no samples")


def reason_of(error: Exception) -> str:
    """What went wrong, without the path that the message names already."""
    if isinstance(error, soundfile.LibsndfileError):
        return error.error_string
    return getattr(error, "strerror", None) or str(error)

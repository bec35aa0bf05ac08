"""What is searched for: a text that is spoken, the microphone's sound, what a recording says."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cmdlab.corpora import (
    SAMPLE_RATE,
    BadEntry,
    Utterance,
    bytes_of,
    decode_sound,
    speak,
    without_silence,
)
from cmdlab.errors import InputError

VOICE = "en-us+m3"  # of SpokenScenes' training split


def spoken(text: str, voice: str = VOICE) -> tuple[NDArray[np.int16], int]:
    """A text as espeak-ng says it: samples int16 [samples], and their rate in Hz.

    Raises InputError for a text without words, an unknown voice, and without espeak-ng.
    """
    try:
        return speak([Utterance(text, voice)])[0].samples, SAMPLE_RATE
    except ImportError as error:
        raise InputError("espeak-ng is not installed; pip install cmdlab[study]") from error
    except ValueError as error:
        raise InputError(f"{text!r} cannot be spoken: {error}; write English words") from error


def heard(path: Path) -> tuple[NDArray[np.float32], int]:
    """What is said in a sound file of any kind: samples float32 [samples], and their rate in Hz.

    Raises InputError, which names the file, for what is no sound, too long or empty.
    """
    try:
        waveform = decode_sound(bytes_of(path))
    except BadEntry as error:
        raise InputError(f"{path}: {error}") from error
    return without_silence(waveform, SAMPLE_RATE), SAMPLE_RATE


def recorded(
    seconds: float, ready: Callable[[], object] = lambda: None
) -> tuple[NDArray[np.float32], int]:
    """What is said to the microphone from now on: samples float32 [samples], and their rate in Hz.

    ready: called once it listens. Raises InputError where there is no microphone, or nothing to
    record with.
    """
    try:
        import sounddevice
    except ImportError as error:
        raise InputError(
            "sounddevice is not installed; pip install cmdlab[microphone], or give a sound file"
        ) from error
    except OSError as error:
        raise InputError(
            f"sounddevice finds no PortAudio ({error}); install it, Debian has it as libportaudio2,"
            " or give a sound file"
        ) from error
    try:
        # Not every microphone gives 16 kHz; the retriever takes any rate.
        rate = round(sounddevice.query_devices(kind="input")["default_samplerate"])
        samples = sounddevice.rec(round(seconds * rate), rate, channels=1, dtype="float32")
        ready()
        sounddevice.wait()
    except (sounddevice.PortAudioError, ValueError) as error:
        raise InputError(
            f"there is no microphone to record from ({error}); connect one, or give a sound file"
        ) from error
    return without_silence(samples[:, 0], rate), rate

"""What is searched for, where it is no file: a text that is spoken, or the microphone's sound."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from cmdlab.corpora import SAMPLE_RATE, Utterance, speak
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


def recorded(
    seconds: float, ready: Callable[[], object] = lambda: None
) -> tuple[NDArray[np.float32], int]:
    """What the microphone hears from now on: samples float32 [samples], and their rate in Hz.

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
    return samples[:, 0], rate

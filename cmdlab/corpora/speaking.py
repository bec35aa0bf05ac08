"""Speaks text with espeak-ng, in a choice of voices, and says when each word was spoken.

What espeak-ng says depends on all that the same process has said before, and its breath noise on
the clock. So the library is loaded afresh for every utterance (0.3 ms) and its noise is seeded:
the samples depend on the utterance alone, in whatever process, order or thread it is spoken.
Resampling is exact in double precision, so it is the same everywhere. espeak-ng itself uses the C
library's `cos` and `exp`; nothing promises that another processor or libm rounds them alike.
"""

import _ctypes
import ctypes
import os
import re
import tempfile
import threading
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from itertools import accumulate
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import as_strided

from cmdlab.corpora.audio import SAMPLE_RATE

# A voice is espeak-ng's accent + variant. No variant is in two tables, and TEST_ONLY_VOICES alone
# has the accents of Scotland and the Caribbean (en-029). Whispers, robots and near-twins were left
# out by measuring: a caption's word, spoken alone in one of these voices, is nearest (in MFCC of a
# fixed length) to the same word in another one, for 97 words in a hundred (en+f5: 70).
STUDY_VOICES = (
    "en-us+m3",
    "en-us+f1",
    "en+m1",
    "en+f5",
    "en-gb-x-rp+Diogo",
    "en-gb-x-rp+belinda",
    "en-gb-x-gbclan+m7",
    "en-gb-x-gbcwmd+Gene",
    "en-us-nyc+Alex",
    "en-us-nyc+steph",
)
TEST_ONLY_VOICES = ("en-gb-scotland+Michael", "en-029+f2", "en-us+m8")
PRETRAINING_VOICES = (
    "en-us+m4",
    "en-us+Annie",
    "en+victor",
    "en+linda",
    "en-gb-x-rp+Denis",
    "en-gb-x-rp+aunty",
    "en-gb-x-gbclan+robert",
    "en-gb-x-gbclan+Nguyen",
    "en-gb-x-gbcwmd+quincy",
    "en-gb-x-gbcwmd+Mario",
    "en-us-nyc+sandro",
    "en-us-nyc+Andrea",
)


@dataclass(frozen=True)
class Utterance:
    """A text to speak; `voice` is accent+variant, `rate` in words a minute, `pitch` 0 to 99."""

    text: str
    voice: str
    rate: int = 175
    pitch: int = 50


@dataclass(frozen=True)
class Word:
    """One word of `text.split()` and when it is spoken, in seconds."""

    word: str
    start: float
    end: float


@dataclass(frozen=True)
class Speech:
    """`samples` int16 [samples], mono at 16 kHz, and the words of the text in their order."""

    samples: np.ndarray
    words: tuple[Word, ...]


def speak(utterances: Sequence[Utterance]) -> list[Speech]:
    """Speaks each utterance, independently of the others.

    A word ends where the next one or a pause begins. Words that espeak-ng runs together are one to
    it and share its span of time by their letters: a preposition with its article ("of the"), and
    in New York "huge" with the word before it.

    Raises ValueError for a voice that espeak-ng does not have, a rate outside 80 to 450, a pitch
    outside 0 to 99 or a text without words; RuntimeError where espeak-ng fails.
    """
    # Ctrl-C raises in the main thread, wherever that is, and ctypes drops what a callback raises:
    # a piece of sound would be missing in silence. So espeak-ng calls back into a thread apart.
    with ThreadPoolExecutor(1) as apart:
        return list(apart.map(_speak, utterances))


def espeak_version() -> str:
    """The version of the espeak-ng library, such as "1.52.0"."""
    with _espeak() as (espeak, _):
        espeak.espeak_Info.restype = ctypes.c_char_p
        return str(espeak.espeak_Info(None).decode())


# What is used of espeak-ng's speak_lib.h.
_SYNCHRONOUS, _DO_NOT_EXIT, _PHONEME_EVENTS = 2, 0x8000, 0x0001
_BUFFER = 200  # ms; part of the bytes: another length gives slightly other samples
_RATE, _PITCH = 1, 3
_UTF8 = 1  # and no SSML
_LIST_TERMINATED, _WORD, _PHONEME = 0, 1, 7


class _Name(ctypes.Union):
    _fields_ = (("number", ctypes.c_int), ("name", ctypes.c_char_p), ("string", ctypes.c_char * 8))


class _Event(ctypes.Structure):
    _fields_ = (
        ("type", ctypes.c_int),
        ("unique_identifier", ctypes.c_uint),
        ("text_position", ctypes.c_int),  # characters, from 1
        ("length", ctypes.c_int),
        ("audio_position", ctypes.c_int),  # milliseconds
        ("sample", ctypes.c_int),
        ("user_data", ctypes.c_void_p),
        ("id", _Name),
    )


_Callback = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_int, ctypes.POINTER(_Event))
_LOCK = threading.Lock()  # one fresh library at a time


@contextmanager
def _espeak() -> Iterator[tuple[Any, int]]:
    """The library in the state of a new process, and its sampling rate; unloaded on leaving."""
    with _LOCK:
        path = _library_path()
        if _is_loaded(path):
            raise RuntimeError(f"{path} is in use in this process by something else than cmdlab")
        library = ctypes.CDLL(path)
        try:
            options = _DO_NOT_EXIT | _PHONEME_EVENTS
            data = os.fsencode(_data_path())
            rate = library.espeak_Initialize(_SYNCHRONOUS, _BUFFER, data, options)
            if rate <= 0:
                raise RuntimeError(f"espeak-ng cannot start from {path}")
            yield library, rate
        finally:
            library.espeak_Terminate()
            _ctypes.dlclose(library._handle)


def _is_loaded(path: str) -> bool:
    try:
        handle = _ctypes.dlopen(path, os.RTLD_NOW | os.RTLD_NOLOAD)
    except OSError:
        return False
    _ctypes.dlclose(handle)
    return True


@cache
def _library_path() -> str:
    import espeakng_loader

    return str(espeakng_loader.get_library_path())


def _data_path() -> str:
    return _voice_data().name


@cache
def _voice_data() -> tempfile.TemporaryDirectory[str]:
    """A folder of links to espeak-ng's data, the English accents by their names in lower case.

    espeak-ng finds a voice at once only by such a name; otherwise it reads every voice that it
    has, which takes half as long as the speaking. The folder goes when the process ends.
    """
    import espeakng_loader

    data = espeakng_loader.get_data_path()
    links = tempfile.TemporaryDirectory(prefix="cmdlab-espeak-")
    os.mkdir(f"{links.name}/lang")
    for accent in os.listdir(f"{data}/lang/gmw"):
        os.symlink(f"{data}/lang/gmw/{accent}", f"{links.name}/lang/{accent.lower()}")
    for name in ("en_dict", "intonations", "phondata", "phonindex", "phontab", "voices"):
        os.symlink(f"{data}/{name}", f"{links.name}/{name}")
    return links


@cache
def _has_voice(voice: str) -> bool:
    """Whether there are files for the accent and the variant; espeak-ng itself ignores the last."""
    accent, _, variant = voice.partition("+")
    files = (f"lang/{accent}", f"voices/!v/{variant}")
    return all(os.path.isfile(f"{_data_path()}/{file}") for file in files)


def _speak(utterance: Utterance) -> Speech:
    text, voice = utterance.text, utterance.voice
    if not (80 <= utterance.rate <= 450 and 0 <= utterance.pitch <= 99):
        raise ValueError(f"the rate must be 80 to 450 and the pitch 0 to 99 in {utterance}")
    if not _has_voice(voice):
        raise ValueError(f"espeak-ng has no voice {voice!r}")
    if not text.strip() or "\0" in text:
        raise ValueError(f"there is nothing to speak in {utterance}")
    chunks: list[bytes] = []
    events: list[tuple[int, int, int, bytes]] = []  # type, character, sample, phoneme
    raised: list[BaseException] = []

    def listen(samples: int | None, count: int, event: Any) -> int:
        try:
            if samples:
                chunks.append(ctypes.string_at(samples, 2 * count))
            i = 0
            while event[i].type != _LIST_TERMINATED:
                one = event[i]
                if one.type in (_WORD, _PHONEME):
                    phoneme = one.id.string if one.type == _PHONEME else b""
                    events.append((one.type, one.text_position - 1, one.sample, phoneme))
                i += 1
        except BaseException as error:  # ctypes would drop it
            raised.append(error)
        return len(raised)  # 1 stops espeak-ng

    callback = _Callback(listen)
    coded = text.encode() + b"\0"
    with _espeak() as (espeak, rate):
        espeak.espeak_SetSynthCallback(callback)
        espeak.espeak_ng_SetRandSeed(ctypes.c_long(1))
        failed = (
            espeak.espeak_SetVoiceByName(voice.encode())
            or espeak.espeak_SetParameter(_RATE, utterance.rate, 0)
            or espeak.espeak_SetParameter(_PITCH, utterance.pitch, 0)
            or espeak.espeak_Synth(coded, len(coded), 0, 1, 0, _UTF8, None, None)
        )
    if raised:
        raise raised[0]
    if failed:
        raise RuntimeError(f"espeak-ng failed with status {failed} on {utterance}")
    if not any(kind == _PHONEME and not phoneme.startswith(b"_") for kind, *_, phoneme in events):
        raise ValueError(f"espeak-ng finds no word in {text!r}")
    samples = np.frombuffer(b"".join(chunks), np.int16)
    return Speech(_resample(samples, rate), _time_words(text, events, len(samples), rate))


def _time_words(
    text: str, events: list[tuple[int, int, int, bytes]], samples: int, rate: int
) -> tuple[Word, ...]:
    tokens = list(re.finditer(r"\S+", text))
    firsts = [token.start() for token in tokens]
    spans = [[0, 0, samples]]  # first token of a run of tokens, its first sample, its end
    pause = None
    for kind, character, sample, phoneme in events:
        if kind == _PHONEME:  # the phonemes "_", "_:" and so on are pauses
            pause = None if not phoneme.startswith(b"_") else sample if pause is None else pause
            continue
        token = bisect_right(firsts, character) - 1
        if token == spans[-1][0]:
            continue  # the first one, or a part of one, such as "hand" of "left-hand"
        spans[-1][2] = sample if pause is None else pause
        spans.append([token, sample, samples])
        pause = None
    if pause is not None:
        spans[-1][2] = pause
    words = []
    ends = [*(span[0] for span in spans[1:]), len(tokens)]
    for (first, start, end), last in zip(spans, ends, strict=True):
        run = [token.group() for token in tokens[first:last]]
        letters = [0, *accumulate(map(len, run))]
        times = [(start + (end - start) * count / letters[-1]) / rate for count in letters]
        words += [Word(*timed) for timed in zip(run, times[:-1], times[1:], strict=True)]
    return tuple(words)


def _resample(samples: np.ndarray, rate: int) -> np.ndarray:
    """int16 [samples] at `rate` to int16 at 16 kHz, by a polyphase filter.

    The filter's taps are whole multiples of 2^-16, so every sum is exact and no order of summing
    changes it. scipy.signal.upfirdn gives the same, and takes twice as long as small matrices.
    """
    divisor = int(np.gcd(SAMPLE_RATE, rate))
    up, down = SAMPLE_RATE // divisor, rate // divisor
    length = -(-len(samples) * up // down)
    blocks = -(-length // up)  # of `up` samples, each made from `down` and their neighbours
    groups = _groups(up, down)
    before = -min(start for start, _ in groups)
    padded = np.zeros(before + (blocks - 1) * down + max(s + len(taps) for s, taps in groups))
    padded[before : before + len(samples)] = samples
    parts = []
    for start, taps in groups:
        heard = as_strided(padded[before + start :], (blocks, len(taps)), (8 * down, 8))
        parts.append(heard @ taps)
    resampled = np.rint(np.concatenate(parts, 1).ravel()[:length])
    return resampled.clip(-32768, 32767, out=resampled).astype(np.int16)


@cache
def _groups(up: int, down: int) -> list[tuple[int, np.ndarray]]:
    """For 16 and 16 samples of a block of `up` new ones: where those begin that they are made of,
    and the taps, float64 [made of, 16]."""
    taps = _taps(up, down)
    groups = []
    for first in range(0, up, 16):
        made = np.arange(first, min(first + 16, up))
        at = (made + _CROSSINGS) * down  # the filter's delay is whole samples
        start, end = -((len(taps) - 1 - at[0]) // up), at[-1] // up + 1
        tap = at - np.arange(start, end)[:, None] * up
        within = (tap >= 0) & (tap < len(taps))
        groups.append((int(start), np.where(within, taps[tap.clip(0, len(taps) - 1)], 0.0)))
    return groups


_CROSSINGS = 8  # zero crossings of the sinc on either side
_TAP_UNIT = 2**16


@cache
def _taps(up: int, down: int) -> np.ndarray:
    from scipy.signal import firwin

    taps = firwin(2 * _CROSSINGS * down + 1, 0.94 / down, window=("kaiser", 5.0))
    return np.rint(taps * up * _TAP_UNIT) / _TAP_UNIT

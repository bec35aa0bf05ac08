"""espeak-ng's speech: the same whenever it is spoken, and words timed where they sound."""

import hashlib
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from cmdlab.corpora.scenes import sample_captions, sample_scene
from cmdlab.corpora.speaking import (
    PRETRAINING_VOICES,
    STUDY_VOICES,
    TEST_ONLY_VOICES,
    Speech,
    Utterance,
    speak,
)

VOICES = STUDY_VOICES + TEST_ONLY_VOICES + PRETRAINING_VOICES


def digest(speech: Speech) -> str:
    return hashlib.sha256(speech.samples.tobytes() + repr(speech.words).encode()).hexdigest()


def level(speech: Speech, start: float, end: float, above: float = 0.0) -> float:
    """Mean power of a stretch of time, of the frequencies above a limit in Hz."""
    samples = speech.samples[round(start * 16_000) : round(end * 16_000)].astype(float)
    power = np.abs(np.fft.rfft(samples)) ** 2
    return float(
        power[np.fft.rfftfreq(len(samples), 1 / 16_000) >= above].sum() / len(samples) ** 2
    )


def fundamental(speech: Speech) -> float:
    """The median fundamental frequency in Hz, by the autocorrelation of 40 ms windows."""
    found = []
    for window in speech.samples[: len(speech.samples) // 640 * 640].reshape(-1, 640).astype(float):
        window = window - window.mean()
        correlation = np.correlate(window, window, "full")[639:]
        lag = 40 + int(np.argmax(correlation[40:270]))
        if correlation[lag] > 0.5 * correlation[0] > 640 * 500**2:
            found.append(16_000 / lag)
    return float(np.median(found))


def caption(seed: int) -> str:
    rng = np.random.default_rng(seed)
    return sample_captions(sample_scene(rng), rng)[0].text


@pytest.mark.parametrize("voice", VOICES)
def test_every_voice_says_every_word_in_its_order(voice):
    texts = [caption(seed) for seed in range(6)]
    utterances = [Utterance(text, voice, 160 + 10 * i) for i, text in enumerate(texts)]
    for text, speech in zip(texts, speak(utterances), strict=True):
        assert speech.samples.dtype == np.int16
        assert [word.word for word in speech.words] == text.split()
        times = [time for word in speech.words for time in (word.start, word.end)]
        assert times == sorted(times)
        assert all(word.end - word.start > 0.015 for word in speech.words)
        assert times[0] == 0
        assert times[-1] == pytest.approx(len(speech.samples) / 16_000, abs=0.2)
        assert np.abs(speech.samples.astype(int)).max() > 500
        assert np.mean(np.abs(speech.samples.astype(int)) > 32_700) < 0.001  # it does not clip


def test_voices_are_told_apart():
    text = "a small red circle is over there"
    speeches = dict(zip(VOICES, speak([Utterance(text, voice) for voice in VOICES]), strict=True))
    assert len({digest(speech) for speech in speeches.values()}) == len(VOICES)
    for table in (STUDY_VOICES, TEST_ONLY_VOICES, PRETRAINING_VOICES):
        heights = [fundamental(speeches[voice]) for voice in table]
        assert min(heights) < 115  # a man's voice and a woman's in each table
        assert max(heights) > 170


def test_voices_of_the_test_split_are_heard_nowhere_else():
    variants = [voice.partition("+")[2] for voice in VOICES]
    assert len(set(variants)) == len(variants)
    accents = [{v.partition("+")[0] for v in t} for t in (STUDY_VOICES, PRETRAINING_VOICES)]
    unheard = {voice.partition("+")[0] for voice in TEST_ONLY_VOICES}.difference(*accents)
    assert unheard == {"en-gb-scotland", "en-029"}
    assert len(STUDY_VOICES) >= 8
    assert len(PRETRAINING_VOICES) >= 10


def test_what_was_spoken_before_changes_nothing():
    utterances = [Utterance(caption(i), VOICES[i], 160 + i, 40 + i) for i in range(len(VOICES))]
    first = [digest(speech) for speech in speak(utterances)]
    assert [digest(speech) for speech in speak(utterances[::-1])] == first[::-1]
    with ThreadPoolExecutor(3) as pool:
        assert [digest(speak([u])[0]) for u in utterances] == first
        assert [digest(*speech) for speech in pool.map(lambda u: speak([u]), utterances)] == first


def test_a_fresh_process_says_the_same_and_leaves_nothing_behind(tmp_path):
    breathy = Utterance("a huge red star is in the top left corner", "en+f5")
    program = (
        "import hashlib\n"
        "from cmdlab.corpora.speaking import Utterance, speak\n"
        f"speech = speak([{breathy!r}])[0]\n"
        "said = speech.samples.tobytes() + repr(speech.words).encode()\n"
        "print(hashlib.sha256(said).hexdigest())\n"
    )
    said = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "TMPDIR": str(tmp_path), "MALLOC_PERTURB_": "85"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert said.stdout.strip() == digest(speak([breathy])[0])
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_speech_is_whole_or_none(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))  # clearing it up is interrupted as well
    said = Utterance(" and ".join(caption(seed) for seed in range(4)), "en+f5")
    whole = digest(*speak([said]))

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGVTALRM, interrupt)
    stopped = 0
    try:
        for i in range(200):
            try:
                signal.setitimer(signal.ITIMER_VIRTUAL, 0.0005 * (i % 50 + 1))
                spoken = speak([said])
                signal.setitimer(signal.ITIMER_VIRTUAL, 0)
            except (KeyboardInterrupt, OSError):  # the last from rmtree, where it is interrupted
                stopped += 1
            else:
                assert digest(*spoken) == whole
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)
    assert stopped > 5


def test_words_are_timed_where_they_sound():
    speech = speak([Utterance("moon square moon", "en-us+m3", 160)])[0]
    beginnings = [(word.start, word.start + 0.06) for word in speech.words]
    hiss = [level(speech, *time, above=3_500) / level(speech, *time) for time in beginnings]
    assert hiss[1] > 0.5  # "s"
    assert max(hiss[0], hiss[2]) < 0.1  # "m"


def test_a_word_ends_where_a_pause_begins():
    speech = speak([Utterance("there is a star, and a moon", "en-us+m3")])[0]
    star, and_ = speech.words[3], speech.words[4]
    assert (star.word, and_.word) == ("star,", "and")
    assert 0.1 < and_.start - star.end < 0.4
    pause = level(speech, star.end + 0.02, and_.start - 0.02)
    assert pause < 1e-4 * level(speech, star.start, star.end)


def test_words_that_run_together_share_their_time_by_their_letters():
    speech = speak([Utterance("in the middle of the left-hand side", "en+m1")])[0]
    words = {word.word: word for word in speech.words}
    assert [word.word for word in speech.words].count("left-hand") == 1
    in_, the = speech.words[0], speech.words[1]
    assert in_.end == the.start
    assert (the.end - the.start) / (in_.end - in_.start) == pytest.approx(3 / 2)
    assert words["left-hand"].end == words["side"].start


def test_rate_and_pitch_do_what_they_say():
    text = "a small red circle is over there"
    slow, fast, low, high = speak(
        [
            Utterance(text, "en+m1", rate=160),
            Utterance(text, "en+m1", rate=220),
            Utterance(text, "en+m1", pitch=30),
            Utterance(text, "en+m1", pitch=70),
        ]
    )
    assert len(slow.samples) > 1.2 * len(fast.samples)
    assert fundamental(high) > 1.2 * fundamental(low)


@pytest.mark.parametrize(
    ("utterance", "message"),
    [
        (Utterance("a star", "en-us+nobody"), "has no voice 'en-us\\+nobody'"),
        (Utterance("a star", "klingon+m1"), "has no voice"),
        (Utterance("a star", "../en-us+m3"), "has no voice"),
        (Utterance("a star", "en-us"), "has no voice"),
        (Utterance("", "en-us+m3"), "nothing to speak"),
        (Utterance("a\0star", "en-us+m3"), "nothing to speak"),
        (Utterance("...", "en-us+m3"), "no word"),
        (Utterance("a star", "en-us+m3", rate=20), "rate"),
        (Utterance("a star", "en-us+m3", pitch=100), "pitch"),
    ],
)
def test_what_cannot_be_spoken_is_refused(utterance, message):
    with pytest.raises(ValueError, match=message):
        speak([utterance])
    assert speak([Utterance("a star", "en-us+m3")])[0].words  # and does no harm to what follows


def test_another_user_of_the_library_is_noticed():
    program = (
        "import ctypes, espeakng_loader\n"
        "library = ctypes.CDLL(espeakng_loader.get_library_path())\n"
        "from cmdlab.corpora.speaking import Utterance, speak\n"
        "speak([Utterance('a star', 'en-us+m3')])\n"
    )
    said = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert "in use in this process by something else" in said.stderr

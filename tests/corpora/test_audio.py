"""Reading sound files that nobody vouches for, and degrading speech."""

import os
import struct
from pathlib import Path

import numpy as np
import pytest
import soundfile
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cmdlab.corpora import SAMPLE_RATE, Caption, degrade, read_audio, read_speech
from cmdlab.corpora.audio import caption_seed
from cmdlab.errors import InputError


@pytest.fixture
def speech() -> np.ndarray:
    """One second of a voiced sound with pauses: float32 [16000]."""
    time = np.arange(SAMPLE_RATE) / SAMPLE_RATE
    voice = sum(np.sin(2 * np.pi * 120 * n * time) / n for n in range(1, 20))
    return (0.1 * voice * (np.sin(2 * np.pi * 4 * time) > 0)).astype(np.float32)


@pytest.mark.parametrize("suffix", ["wav", "flac"])
def test_sixteen_bit_sound_is_read_exactly(tmp_path, suffix):
    samples = np.array([0, 1, -1, 32767, -32768, 1234], dtype=np.int16)
    soundfile.write(tmp_path / f"x.{suffix}", samples, SAMPLE_RATE, subtype="PCM_16")
    waveform = read_audio(tmp_path / f"x.{suffix}")
    assert waveform.dtype == np.float32
    np.testing.assert_array_equal(waveform * 32768, samples)


def test_a_wav_file_with_further_chunks_is_read(tmp_path, speech):
    path = tmp_path / "x.wav"
    soundfile.write(path, speech, SAMPLE_RATE, subtype="PCM_16")
    plain = path.read_bytes()
    note = b"LIST" + struct.pack("<I", 5) + b"INFO!\0"  # of an odd size, so padded
    for content in (plain[:36] + note + plain[36:], plain + note):
        path.write_bytes(content[:4] + struct.pack("<I", len(content) - 8) + content[8:])
        assert len(read_audio(path)) == len(speech)


def state_lengths(path, riff, data):
    """Write other sizes over those of a WAV file that soundfile wrote."""
    content = bytearray(path.read_bytes())
    struct.pack_into("<I", content, 4, riff)
    struct.pack_into("<I", content, content.index(b"data") + 4, data)
    path.write_bytes(content)


@pytest.mark.parametrize("container", ["WAV", "WAVEX"])
@pytest.mark.parametrize(
    ("riff", "data"),
    [
        (0xFFFFFFFF, 0xFFFFFFFF),  # ffmpeg
        (0x7FFFF024, 0x7FFFF000),  # sox
        (0x80000023, 0x7FFFFFFF),
        (0, 0),
        (36, 0),  # written first, by a writer that means to come back
        (0xFFFFFFFF, 0),
    ],
)
def test_a_wav_file_written_to_a_pipe_is_read_to_its_end(tmp_path, container, riff, data):
    samples = np.arange(-800, 800, dtype=np.int16) * 20
    path = tmp_path / "x.wav"
    soundfile.write(path, samples, SAMPLE_RATE, format=container, subtype="PCM_16")
    state_lengths(path, riff, data)
    np.testing.assert_array_equal(read_audio(path) * 32768, samples)
    path.write_bytes(path.read_bytes()[:-1])  # a pipe may break off within a sample
    np.testing.assert_array_equal(read_audio(path) * 32768, samples[:-1])


@pytest.mark.parametrize("stated", [1 << 63, 0])
def test_a_large_wav_file_written_to_a_pipe_is_read_to_its_end(tmp_path, speech, stated):
    path = tmp_path / "x.wav"
    soundfile.write(path, speech, SAMPLE_RATE, format="RF64", subtype="FLOAT")
    content = bytearray(path.read_bytes())
    struct.pack_into("<QQQ", content, content.index(b"ds64") + 8, stated, stated, stated)
    path.write_bytes(content)
    np.testing.assert_array_equal(read_audio(path), speech)


@pytest.mark.parametrize(("riff", "data"), [(0, 0), (0xFFFFFFFF, 0xFFFFFFFF)])
def test_a_pipe_that_brought_nothing_or_too_much_is_refused(tmp_path, riff, data):
    soundfile.write(tmp_path / "none.wav", np.zeros(0), SAMPLE_RATE)
    soundfile.write(tmp_path / "long.wav", np.zeros(301 * SAMPLE_RATE), SAMPLE_RATE)
    soundfile.write(tmp_path / "huge.wav", np.zeros(1300 * SAMPLE_RATE), SAMPLE_RATE)
    for name, message in {
        "none": "holds no sound",
        "long": "lasts 301 s",
        "huge": "has over 37 MiB, for 300 s; cut it",
    }.items():
        state_lengths(tmp_path / f"{name}.wav", riff, data)
        with pytest.raises(InputError, match=f"{name}.wav: {message}"):
            read_audio(tmp_path / f"{name}.wav")


def test_a_flac_file_written_to_a_pipe_is_refused_for_what_it_is(tmp_path, speech):
    path = tmp_path / "x.flac"
    soundfile.write(path, speech, SAMPLE_RATE)
    content = bytearray(path.read_bytes())
    content[21] &= 0xF0  # the number of samples: 36 bits
    content[22:26] = bytes(4)
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"x\.flac: does not state its length; write it to a file"):
        read_audio(path)


@pytest.mark.parametrize(
    "options", [{}, {"endian": "BIG"}, {"format": "WAVEX"}, {"format": "RF64"}]
)
def test_a_plausible_length_that_is_not_reached_is_a_truncation(tmp_path, speech, options):
    path = tmp_path / "x.wav"
    soundfile.write(path, speech, SAMPLE_RATE, subtype="PCM_16", **options)
    np.testing.assert_allclose(read_audio(path), speech, atol=1 / 32768)
    path.write_bytes(path.read_bytes()[:-101])
    with pytest.raises(InputError, match=r"is truncated \(101 bytes are missing\); replace it"):
        read_audio(path)


@pytest.mark.parametrize("subtype", ["FLOAT", "DOUBLE"])
def test_floats_are_clipped_where_they_overshoot_and_refused_where_they_are_no_sound(
    tmp_path, speech, subtype
):
    path = tmp_path / "x.wav"
    loud = speech / np.abs(speech).max() * 1.3
    soundfile.write(path, loud, SAMPLE_RATE, subtype=subtype)
    np.testing.assert_array_equal(read_audio(path), np.clip(loud, -1, 1))
    for factor, said in ((2.01, "2.01"), (-32767, "32767"), (1e30, r"1e\+30")):
        soundfile.write(path, speech / np.abs(speech).max() * factor, SAMPLE_RATE, subtype=subtype)
        with pytest.raises(InputError, match=rf"x\.wav: holds samples up to {said}; scale them"):
            read_audio(path)


def test_any_folder_name_will_do_and_a_refusal_names_the_path_once(tmp_path, speech):
    folder = tmp_path / os.fsdecode("a: b, 音, ".encode() + b"\xe9")
    folder.mkdir()
    soundfile.write((folder / "x.wav").open("wb"), speech, SAMPLE_RATE, format="WAV")
    assert len(read_audio(folder / "x.wav")) == len(speech)
    (folder / "x.wav").write_text("RIFF, but not really a sound file")
    with pytest.raises(InputError) as refusal:
        read_audio(folder / "x.wav")
    assert str(refusal.value).count(str(folder)) == 1
    assert str(refusal.value).count("a: b") == 1


@pytest.mark.parametrize("suffix", ["wav", "flac"])
@pytest.mark.parametrize("kept", [0.02, 0.5, 0.9, 0.999])
def test_a_truncated_file_is_refused(tmp_path, speech, suffix, kept):
    path = tmp_path / f"x.{suffix}"
    soundfile.write(path, speech, SAMPLE_RATE, subtype="PCM_16")
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * kept)])
    with pytest.raises(InputError, match=rf"x\.{suffix}: is .*; replace it"):
        read_audio(path)


def test_what_is_no_sound_of_ours_is_refused(tmp_path, speech):
    def write(name, samples, rate=SAMPLE_RATE, **options):
        soundfile.write(tmp_path / name, samples, rate, **options)

    write("telephone.wav", speech, 8000)
    write("music.flac", speech, 44100)
    write("stereo.wav", np.stack([speech, speech], axis=1))
    write("silent.wav", speech[:0])
    write("vorbis.wav", speech, format="OGG")
    write("long.wav", np.zeros(301 * SAMPLE_RATE, dtype=np.int16))
    write("nan.wav", np.array([0.0, np.nan, np.inf]), subtype="FLOAT")
    (tmp_path / "empty.wav").touch()
    (tmp_path / "text.wav").write_text("RIFF, but not really a sound file")
    (tmp_path / "folder.wav").mkdir()
    for name, message in {
        "telephone.wav": "has a sampling rate of 8000 Hz; resample it to 16000 Hz",
        "music.flac": "has a sampling rate of 44100 Hz; resample it to 16000 Hz",
        "stereo.wav": "has 2 channels; mix it down",
        "silent.wav": "holds no sound; replace it",
        "vorbis.wav": "is OGG sound; convert it",
        "long.wav": "lasts 301 s, over 300 s; cut it",
        "nan.wav": "holds samples that are no finite number; replace it",
        "empty.wav": r"is no sound file, or is corrupt or truncated \(empty file\); replace it",
        "text.wav": "is no sound file",
        "folder.wav": "is no file; add it",
        "none.wav": "is no file; add it",
    }.items():
        with pytest.raises(InputError, match=f"{name}: {message}"):
            read_audio(tmp_path / name)


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.sampled_from(["wav", "flac"]), st.data())
def test_any_damage_gives_sound_or_a_clear_refusal(tmp_path, speech, suffix, data):
    path: Path = tmp_path / f"x.{suffix}"
    soundfile.write(path, speech[:400], SAMPLE_RATE, subtype="PCM_16")
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, 60) | st.integers(0, len(content) - 1))
        content[place] = data.draw(st.integers(0, 255))
    path.write_bytes(content)
    refusal = f"{path}: "
    try:
        assert np.abs(read_audio(path)).max() <= 1
    except InputError as error:
        refusal = str(error)
    assert refusal.startswith(f"{path}: ")
    assert "\n" not in refusal


@pytest.mark.parametrize("snr_db", [-10.0, 0.0, 7.5, 30.0])
@pytest.mark.parametrize("seed", range(6))  # each kind of noise is among them
def test_the_signal_to_noise_ratio_is_exact(speech, snr_db, seed):
    noise = degrade(speech, snr_db=snr_db, reverberation=False, seed=seed) - speech
    measured = 10 * np.log10(np.mean(speech**2) / np.mean(noise.astype(np.float64) ** 2))
    assert measured == pytest.approx(snr_db, abs=0.01)


def test_the_ratio_holds_over_the_reverberant_speech_too(speech):
    room = degrade(speech, snr_db=None, reverberation=True, seed=3)
    noise = degrade(speech, snr_db=5.0, reverberation=True, seed=3) - room
    measured = 10 * np.log10(np.mean(room**2) / np.mean(noise**2))
    assert measured == pytest.approx(5.0, abs=0.01)


def test_the_kinds_of_noise_differ_in_their_spectrum(speech):
    """The share of power below 500 Hz: 1/16 in white noise, more in the other two."""
    shares = []
    for seed in range(20):
        noise = degrade(speech, snr_db=0.0, reverberation=False, seed=seed) - speech
        power = np.abs(np.fft.rfft(noise)) ** 2
        shares.append(power[:500].sum() / power.sum())
    assert min(shares) == pytest.approx(1 / 16, abs=0.02)
    assert max(shares) > 0.5


def test_a_room_keeps_length_level_and_the_time_of_the_first_sound(speech):
    late = np.concatenate([np.zeros(4000, np.float32), speech[:8000], np.zeros(8000, np.float32)])
    room = degrade(late, snr_db=None, reverberation=True, seed=1)
    assert room.dtype == np.float32
    assert room.shape == late.shape
    assert np.mean(room**2) == pytest.approx(np.mean(late**2), rel=1e-3)
    assert np.abs(room[:4000]).max() < 1e-6  # nothing before the speech
    tail = [np.mean(room[start : start + 1600] ** 2) for start in (12_000, 14_000, 16_000)]
    assert tail[0] > tail[1] > tail[2] > 0  # and a decay after it


def test_degrading_depends_on_the_seed_alone(speech):
    once = degrade(speech, snr_db=3.0, reverberation=True, seed=5)
    np.testing.assert_array_equal(once, degrade(speech, snr_db=3.0, reverberation=True, seed=5))
    assert not np.array_equal(once, degrade(speech, snr_db=3.0, reverberation=True, seed=6))
    untouched = degrade(speech, snr_db=None, reverberation=False, seed=5)
    np.testing.assert_array_equal(untouched, speech)


@given(st.integers(0, 40), st.booleans(), st.sampled_from([None, 0.0, 20.0]), st.integers(0, 2**64))
@settings(deadline=None)
def test_any_length_is_kept_and_silence_stays_silence(length, reverberation, snr_db, seed):
    options = {"snr_db": snr_db, "reverberation": reverberation, "seed": seed}
    loud = degrade(np.full(length, 0.1, np.float32), **options)
    assert loud.shape == (length,)
    assert np.isfinite(loud).all()
    assert not degrade(np.zeros(length, np.float32), **options).any()


def test_a_wrong_request_is_refused(speech):
    with pytest.raises(ValueError, match="one dimension"):
        degrade(speech[None], snr_db=0.0, reverberation=False, seed=0)
    with pytest.raises(ValueError, match="must be finite"):
        degrade(speech, snr_db=float("nan"), reverberation=False, seed=0)


def test_each_caption_is_degraded_in_its_own_way_and_always_the_same(tmp_path, speech):
    soundfile.write(tmp_path / "x.wav", speech, SAMPLE_RATE)
    first, second = (Caption(id, "image", tmp_path / "x.wav", "", "") for id in ("a", "b"))
    clean = read_speech(first)
    noisy = read_speech(first, snr_db=(0.0, 15.0), reverberation=True)
    again = read_speech(first, snr_db=(0.0, 15.0), reverberation=True)
    np.testing.assert_array_equal(noisy, again)
    assert not np.array_equal(noisy, clean)
    assert not np.array_equal(noisy, read_speech(second, snr_db=(0.0, 15.0), reverberation=True))
    assert not np.array_equal(
        noisy, read_speech(first, snr_db=(0.0, 15.0), reverberation=True, seed=1)
    )


def test_a_range_of_ratios_is_used_as_a_range(tmp_path, speech):
    soundfile.write(tmp_path / "x.wav", speech, SAMPLE_RATE, subtype="FLOAT")
    measured = []
    for number in range(30):
        caption = Caption(f"caption {number}", "image", tmp_path / "x.wav", "", "")
        noise = read_speech(caption, snr_db=(0.0, 10.0)) - speech
        measured.append(10 * np.log10(np.mean(speech**2) / np.mean(noise**2)))
    assert -0.01 < min(measured) < 3.0
    assert 7.0 < max(measured) < 10.01


def test_the_seed_of_a_caption_never_changes():
    # the first 16 digits of: printf "0 speaker-1" | sha256sum
    assert caption_seed("speaker-1") == 0xA67EA79FF6628FF7
    assert caption_seed("speaker-1", 1) != caption_seed("speaker-1", 2)

"""Any sound and any picture becomes what the corpus' own readers take."""

import io

import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from cmdlab.corpora import Utterance, read_audio, read_image, speak, without_silence
from cmdlab.corpora.foreign_media import LONG_SIDE, convert_picture, convert_sound, decode_sound
from cmdlab.corpora.untrusted import BadEntry


@pytest.fixture(scope="module")
def speech() -> np.ndarray:
    """A spoken sentence at 16 kHz, float32 [samples]."""
    spoken = speak([Utterance("two dogs run over the wet grass", "en-us+m3")])[0]
    return spoken.samples.astype(np.float32) / 32768


@pytest.fixture(scope="module")
def photograph() -> Image.Image:
    """206 × 219 pixels, smooth in both directions and without symmetry."""
    y, x = np.mgrid[:219, :206]
    pixels = np.stack([x, y, (x + 2 * y) / 3], axis=-1).clip(0, 255).astype(np.uint8)
    return Image.fromarray(pixels)


def sound_file(samples, rate, **form) -> bytes:
    content = io.BytesIO()
    soundfile.write(content, samples, rate, **form)
    return content.getvalue()


def picture_file(picture, form, **options) -> bytes:
    content = io.BytesIO()
    picture.save(content, form, **options)
    return content.getvalue()


def heard(content, tmp_path) -> np.ndarray:
    """What the corpus' reader hears of a converted sound."""
    converted, suffix = convert_sound(content)
    path = tmp_path / f"heard{suffix}"
    path.write_bytes(converted)
    return read_audio(path)


def shown(content, tmp_path, **options) -> np.ndarray:
    """What the corpus' reader sees of a converted picture."""
    converted, suffix, _ = convert_picture(content, **options)
    path = tmp_path / f"shown{suffix}"
    path.write_bytes(converted)
    return read_image(path)


SOUNDS = {
    "8 kHz OGG": (8_000, 1, {"format": "OGG", "subtype": "VORBIS"}, 0.9),
    "44.1 kHz stereo WAV": (44_100, 2, {"format": "WAV", "subtype": "PCM_16"}, 0.999),
    "48 kHz MP3": (48_000, 2, {"format": "MP3"}, 0.98),
    "24 bit FLAC": (22_050, 1, {"format": "FLAC", "subtype": "PCM_24"}, 0.999),
    "float WAV of six channels": (16_000, 6, {"format": "WAV", "subtype": "FLOAT"}, 0.999),
    "8 bit mu-law AU": (16_000, 1, {"format": "AU", "subtype": "ULAW"}, 0.99),
    "AIFF": (32_000, 1, {"format": "AIFF", "subtype": "PCM_16"}, 0.999),
    "RF64": (11_025, 1, {"format": "RF64", "subtype": "PCM_16"}, 0.99),
}


@pytest.mark.parametrize("case", SOUNDS)
def test_every_kind_of_sound_is_heard_as_it_was_spoken(speech, tmp_path, case):
    from scipy.signal import resample

    rate, channels, form, likeness = SOUNDS[case]
    # The source's rate by a Fourier transform: another method than the one under test.
    samples = resample(speech, round(len(speech) * rate / 16_000))
    found = heard(sound_file(np.stack([samples] * channels, axis=1), rate, **form), tmp_path)
    size = min(len(found), len(speech))
    assert abs(len(found) - len(speech)) < 3_000  # codecs pad
    low = np.fft.rfft(speech[:size])[: int(3_500 / 16_000 * size)]  # what all of them keep
    same = np.fft.rfft(found[:size])[: len(low)]
    assert np.corrcoef(np.abs(low), np.abs(same))[0, 1] > likeness - 0.02


def test_a_tone_keeps_its_frequency_and_its_level(tmp_path):
    tone = 0.5 * np.sin(2 * np.pi * 440 * np.arange(44_100) / 44_100)
    found = heard(sound_file(tone, 44_100, format="WAV"), tmp_path)
    assert len(found) == 16_000
    expected = 0.5 * np.sin(2 * np.pi * 440 * np.arange(16_000) / 16_000)
    np.testing.assert_allclose(found[500:-500], expected[500:-500], atol=2e-3)


@pytest.mark.parametrize("form", ["WAV", "FLAC"])
def test_what_is_right_already_stays_byte_for_byte(speech, form):
    content = sound_file(speech, 16_000, format=form, subtype="PCM_16")
    assert convert_sound(content) == (content, f".{form.lower()}")


@pytest.mark.parametrize("rate", [16_000, 44_100])
def test_silence_is_cut_at_the_ends_alone_and_where_it_is_long(rate):
    def seconds(length: float, level: float = 0.0) -> np.ndarray:
        return np.full(round(length * rate), level, np.float32)

    speech = np.concatenate((seconds(0.3, 0.5), seconds(0.8), seconds(0.3, -0.2)))
    short = np.concatenate((seconds(0.08), speech, seconds(0.05, 0.01)))
    assert np.array_equal(without_silence(short, rate), short)
    long = np.concatenate((seconds(1.5, 0.01), speech, seconds(0.05)))
    kept = without_silence(long, rate)
    assert len(kept) / rate == pytest.approx(0.02 + 1.4 + 0.05, abs=0.011)
    assert np.array_equal(kept, long[-len(kept) :])
    assert len(without_silence(np.concatenate((speech, seconds(0.5))), rate)) / rate < 1.44
    for nothing in (seconds(0.5), seconds(0.001)):
        assert np.array_equal(without_silence(nothing, rate), nothing)


def test_a_recording_that_begins_with_silence_is_kept_as_a_search_hears_it(speech):
    second = np.zeros(16_000, np.float32)
    waited = sound_file(np.concatenate((second, speech, second)), 16_000, format="WAV")
    trimmed, suffix = convert_sound(waited, trimmed=True)
    searched = without_silence(decode_sound(waited), 16_000)
    assert suffix == ".flac"
    assert np.array_equal(decode_sound(trimmed), searched)
    assert len(searched) <= len(speech) + 2 * 320
    assert convert_sound(waited) == (waited, ".wav")


def test_sound_that_cannot_be_used_says_why(speech):
    wav = sound_file(speech, 16_000, format="WAV")
    flac = sound_file(speech, 44_100, format="FLAC")
    for content, message in (
        (b"", "empty file"),
        (b"no sound at all", "is no sound that libsndfile reads"),
        (wav[:-1_000], "truncated"),
        (flac[: len(flac) // 2], "truncated|corrupt"),
        (sound_file(np.zeros(0), 44_100, format="WAV"), "holds no sound"),
        (sound_file(np.full(90, np.nan), 44_100, format="WAV", subtype="FLOAT"), "no finite"),
        (sound_file(np.full(90, 3e4), 44_100, format="WAV", subtype="FLOAT"), "up to 30000; scale"),
        (sound_file(np.zeros(300 * 8_000 + 1), 8_000, format="FLAC"), "over 300 s; cut it"),
        (sound_file(np.zeros(9), 100, format="WAV"), "sampling rate of 100 Hz"),
    ):
        with pytest.raises(BadEntry, match=message):
            convert_sound(content)


def deep(picture: Image.Image) -> Image.Image:
    """16 bits of grey."""
    return Image.fromarray(np.asarray(picture.convert("L")).astype(np.uint16) * 257)


PICTURES = {
    "PNG": lambda p: picture_file(p, "PNG"),
    "JPEG": lambda p: picture_file(p, "JPEG", quality=95),
    "CMYK JPEG": lambda p: picture_file(p.convert("CMYK"), "JPEG", quality=95),
    "CMYK TIFF": lambda p: picture_file(p.convert("CMYK"), "TIFF"),
    "WEBP": lambda p: picture_file(p, "WEBP", lossless=True),
    "palette GIF": lambda p: picture_file(p.quantize(255), "GIF"),
    "palette PNG": lambda p: picture_file(p.quantize(255), "PNG"),
    "BMP": lambda p: picture_file(p, "BMP"),
    "opaque RGBA": lambda p: picture_file(p.convert("RGBA"), "PNG"),
    "JPEG 2000": lambda p: picture_file(p, "JPEG2000"),
    "first frame": lambda p: picture_file(
        p, "WEBP", save_all=True, append_images=[Image.new("RGB", p.size)], lossless=True
    ),
    "EXIF": lambda p: turned(p),
}


def turned(picture: Image.Image) -> bytes:
    """As a camera held on its side writes it."""
    exif = Image.Exif()
    exif[0x0112] = 6
    stored = picture.transpose(Image.Transpose.ROTATE_90)
    return picture_file(stored, "JPEG", quality=95, exif=exif)


@pytest.mark.parametrize("case", PICTURES)
def test_every_kind_of_picture_is_shown_as_it_was(photograph, tmp_path, case):
    found = shown(PICTURES[case](photograph), tmp_path)
    assert found.shape == (219, 206, 3)
    assert np.abs(found.astype(int) - np.asarray(photograph)).mean() < 4


def test_deep_grey_keeps_its_levels(photograph, tmp_path):
    grey = np.asarray(photograph.convert("L")).astype(int)
    for content in (
        picture_file(deep(photograph), "PNG"),
        picture_file(deep(photograph), "TIFF"),
        picture_file(Image.fromarray((grey - grey.min()).astype(np.float32)), "TIFF"),
    ):
        found = shown(content, tmp_path).astype(float)
        assert np.corrcoef(found[..., 0].ravel(), grey.ravel())[0, 1] > 0.999
    assert np.abs(shown(picture_file(deep(photograph), "PNG"), tmp_path)[..., 1] - grey).mean() < 2


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_what_is_transparent_is_laid_on_white(tmp_path, mode):
    drawing = Image.new("RGBA", (40, 20), (0, 0, 0, 0))
    drawing.paste((0, 0, 0, 255), (0, 0, 20, 20))
    found = shown(picture_file(drawing.convert(mode), "PNG"), tmp_path)
    assert found[10, 5].max() < 10
    assert found[10, 35].min() > 245


def test_photographs_that_fit_stay_byte_for_byte_and_larger_ones_shrink(photograph, tmp_path):
    content = turned(photograph)
    assert convert_picture(content)[0] == content
    large = photograph.resize((3_000, 1_500))
    for form in ("JPEG", "PNG"):
        found = shown(picture_file(large, form), tmp_path)
        assert found.shape == (LONG_SIDE // 2, LONG_SIDE, 3)
        expected = np.asarray(large.resize((LONG_SIDE, LONG_SIDE // 2))).astype(int)
        assert np.abs(found - expected).mean() < 2


@pytest.mark.parametrize("size", [(206, 219), (30, 500), (64, 64), (1, 1), (5_000, 40)])
def test_squares_are_cut_from_the_middle(photograph, tmp_path, size):
    picture = photograph.resize(size)
    found = shown(picture_file(picture, "JPEG", quality=95), tmp_path, side=64)
    assert found.shape == (64, 64, 3)
    left, top = ((length - min(size)) / 2 for length in size)
    box = (left, top, left + min(size), top + min(size))
    expected = picture.resize((64, 64), Image.Resampling.LANCZOS, box=box)
    assert np.abs(found.astype(int) - np.asarray(expected)).mean() < 4


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_pictures_that_cannot_be_used_say_why(photograph):
    png, jpeg = picture_file(photograph, "PNG"), picture_file(photograph, "JPEG")
    postscript = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n"
    for content, message in (
        (b"", "is no picture that Pillow reads"),
        (b"text", "is no picture that Pillow reads"),
        (postscript, "is no picture that Pillow reads"),  # a program is not run
        (png[: len(png) // 2], "no readable picture"),
        (jpeg[: len(jpeg) // 2], "no readable picture"),
        (picture_file(Image.new("1", (8_000, 8_000)), "PNG"), "8000 × 8000 pixels.*shrink it"),
        (picture_file(Image.new("1", (20_000, 20_000)), "PNG"), "over the limit of .*shrink it"),
    ):
        with pytest.raises(BadEntry, match=message):
            convert_picture(content)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(["WAV", "FLAC", "OGG", "PNG", "JPEG", "GIF", "TIFF"]), st.data())
@pytest.mark.filterwarnings("ignore")
def test_any_damage_gives_a_usable_file_or_a_clear_refusal(tmp_path_factory, form, data):
    samples = np.random.default_rng(0).uniform(-0.5, 0.5, 900)
    picture = Image.fromarray(np.arange(600, dtype=np.uint8).reshape(20, 30))
    is_sound = form in ("WAV", "FLAC", "OGG")
    good = sound_file(samples, 22_050, format=form) if is_sound else picture_file(picture, form)
    content = bytearray(good)
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    folder = tmp_path_factory.mktemp("damaged")
    refusal = ""
    try:
        found = heard(bytes(content), folder) if is_sound else shown(bytes(content), folder)
    except BadEntry as error:
        refusal = str(error)
    else:
        assert found.size
    assert "\n" not in refusal

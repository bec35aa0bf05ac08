"""Loading Flickr8k Audio's layout, sound and broken."""

import shutil
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cmdlab.corpora import load_corpus
from cmdlab.errors import InputError


def test_flickr8k_audio_splits_and_orders(flickr8k_audio):
    train = load_corpus(flickr8k_audio, "train")
    assert train.name == "Flickr8k Audio"
    assert [image.id for image in train.images] == ["20_b.jpg", "30_c.jpg"]
    assert [c.id for c in train.captions] == ["30_c_1", "30_c_0", "20_b_1", "20_b_0"]
    first = train.captions[0]
    assert (first.image_id, first.speaker) == ("30_c.jpg", "1")
    assert first.text == "A dog runs in 30_c , 1 ."
    assert first.audio == flickr8k_audio / "flickr_audio/wavs/30_c_1.wav"
    assert [image.id for image in load_corpus(flickr8k_audio, "val").images] == ["10_a.jpg"]
    assert [image.id for image in load_corpus(flickr8k_audio, "test").images] == ["40_d.jpg"]


def test_flickr8k_audio_may_use_the_other_folder_names(flickr8k_audio):
    before = load_corpus(flickr8k_audio, "test")
    (flickr8k_audio / "Images").rename(flickr8k_audio / "Flicker8k_Dataset")
    (flickr8k_audio / "Flickr8k_text").mkdir()
    for path in flickr8k_audio.glob("Flickr*.txt"):
        path.rename(flickr8k_audio / "Flickr8k_text" / path.name)
    after = load_corpus(flickr8k_audio, "test")
    assert after.captions == before.captions
    assert after.images[0].path == flickr8k_audio / "Flicker8k_Dataset/40_d.jpg"
    (flickr8k_audio / "Images").mkdir()
    with pytest.raises(InputError, match="Images or Flicker8k_Dataset: are all there; remove"):
        load_corpus(flickr8k_audio, "test")


CAPT, SPK = "flickr_audio/wav2capt.txt", "flickr_audio/wav2spk.txt"
TOKEN, TEST_LIST = "Flickr8k.token.txt", "Flickr_8k.testImages.txt"
BAD_LINES = {
    "broken line": (CAPT, "40_d_1.wav 40_d.jpg #1", "40_d_1.wav", r"line 7: '40_d_1\.wav' is not"),
    "path in a recording": (CAPT, "40_d_1.wav", "../../40_d_1.wav", r"line 7 '\.\./\.\./40_d_1'"),
    "recording twice": (CAPT, "40_d_0.wav", "40_d_1.wav", "line 8 '40_d_1': the recording has an"),
    "recording twice in two spellings": (
        CAPT,
        "40_d_0.wav",
        "./40_d_1.wav",
        "line 8 '40_d_1': the",
    ),
    "text spoken twice": (CAPT, "40_d.jpg #0", "40_d.jpg #1", "line 8 .*is spoken before"),
    "recording of no listed image": (CAPT, "40_d.jpg #1", "50_unlisted.jpg #1", "no split list"),
    "image name with a number behind": (CAPT, "40_d.jpg #1", "40_d.jpg.1 #1", r"40_d\.jpg\.1"),
    "recording without speaker": (SPK, "40_d_1.wav 1\n", "", "'40_d_1' has no line in wav2spk"),
    "speaker twice": (SPK, "40_d_1.wav 1", "40_d_0.wav 1", "'40_d_0': has an earlier line"),
    "speaker line broken": (SPK, "40_d_1.wav 1", "40_d_1.wav", "is not '<wav> <speaker>'"),
    "no text": (TOKEN, "40_d.jpg#1\t", "50_unlisted.jpg#9\t", "'40_d.jpg#1' has no text in Flick"),
    "no tab": (TOKEN, "40_d.jpg#1\t", "40_d.jpg#1 ", "line 7 .*<tab>"),
    "text twice": (TOKEN, "40_d.jpg#1", "40_d.jpg#0", "line 8 '40_d.jpg#0': has an earlier line"),
    "text of an image called otherwise": (
        TOKEN,
        "40_d.jpg#1",
        "40_d.jpg.1#1",
        r"line 7 '40_d\.jpg\.1#1': no image is called so; a split list has '40_d\.jpg'",
    ),
    "text without recording": (CAPT, "40_d_1.wav 40_d.jpg #1\n", "", "line 7 .*is without audio"),
    "image in two lists": (
        TEST_LIST,
        "40_d",
        "10_a.jpg\n40_d",
        "line 1 '10_a.jpg': the image is in",
    ),
    "image twice in a list": (TEST_LIST, "40_d", "40_d.jpg\n40_d", "line 2 '40_d.jpg': the image"),
    "path in a list": (TEST_LIST, "40_d", "../x.jpg\n40_d", "is not the name of a .jpg"),
    "listed image not there": (TEST_LIST, "40_d", "99.jpg\n40_d", "line 1 '99.jpg': image: there"),
}


@pytest.mark.parametrize("case", BAD_LINES)
def test_a_bad_line_is_named_and_can_be_left_out(flickr8k_audio, loads_or_refuses, edit_text, case):
    file, old, new, message = BAD_LINES[case]
    edit_text(flickr8k_audio / file, old, new)
    with pytest.raises(InputError, match=message) as refusal:
        load_corpus(flickr8k_audio, "test")
    assert str(refusal.value).startswith(str(flickr8k_audio))
    rest = loads_or_refuses(flickr8k_audio, "test", skip_bad=True)
    assert rest.left_out
    assert rest.captions[-1].id in ("40_d_0", "40_d_1")


def test_a_listed_image_that_nobody_speaks_of_is_named(flickr8k_audio, edit_text):
    edit_text(flickr8k_audio / TEST_LIST, "40_d.jpg", "40_d.jpg\n60_e.jpg")
    shutil.copy(flickr8k_audio / "Images/40_d.jpg", flickr8k_audio / "Images/60_e.jpg")
    with pytest.raises(InputError, match=r"line 2 '60_e\.jpg': the image has no line in wav2capt"):
        load_corpus(flickr8k_audio, "test")


def test_a_missing_recording_is_named_and_left_out(flickr8k_audio):
    (flickr8k_audio / "flickr_audio/wavs/40_d_1.wav").unlink()
    with pytest.raises(InputError, match=r"line 7 '40_d_1': audio: there is no file"):
        load_corpus(flickr8k_audio, "test")
    rest = load_corpus(flickr8k_audio, "test", skip_bad=True)
    assert [caption.id for caption in rest.captions] == ["40_d_0"]


@pytest.mark.parametrize(
    "file", [CAPT, SPK, TOKEN, TEST_LIST, "Flickr_8k.trainImages.txt", "Flickr_8k.devImages.txt"]
)
def test_a_missing_flickr8k_file_is_named(flickr8k_audio, file):
    (flickr8k_audio / file).unlink()
    with pytest.raises(InputError, match=Path(file).name):
        load_corpus(flickr8k_audio, "test", skip_bad=True)


@settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.sampled_from([CAPT, SPK, TOKEN, TEST_LIST]), st.data())
def test_any_change_of_the_text_files_gives_a_clear_refusal_or_a_sound_corpus(
    flickr8k_audio, loads_or_refuses, file, data
):
    original = (flickr8k_audio / file).read_bytes()
    start = data.draw(st.integers(0, len(original)))
    end = data.draw(st.integers(start, min(start + 30, len(original))))
    changed = original[:start] + data.draw(st.binary(max_size=9)) + original[end:]
    (flickr8k_audio / file).write_bytes(changed)
    try:
        for skip_bad in (True, False):
            loads_or_refuses(flickr8k_audio, "test", skip_bad=skip_bad)
    finally:
        (flickr8k_audio / file).write_bytes(original)

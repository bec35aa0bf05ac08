"""Checking a whole corpus: every file is read, everything wrong is listed."""

import json
import shutil

import numpy as np
import pytest
import soundfile

from cmdlab.corpora import content_hash, load_corpus
from cmdlab.corpora.check import check_corpus, leave_out_unreadable
from cmdlab.errors import InputError


def seal(root) -> None:
    """Make the corpus a generated one, with its content hash."""
    identity = {"name": "SpokenScenes", "content_hash": content_hash(root)}
    (root / "corpus.json").write_text(json.dumps(identity))


def test_a_sound_corpus_passes_with_its_counts_and_a_bar_on_standard_error(
    spoken_coco, flickr8k_audio, capsys
):
    seal(spoken_coco)
    result = check_corpus(spoken_coco)
    assert result.ok
    assert result.name == "SpokenScenes"
    assert result.counts == {"train": (3, 6), "val": (1, 2), "test": (2, 3)}
    assert "test: 2 images, 3 captions usable" in str(result)
    assert result.warnings == ()
    assert str(result).endswith("\nusable, 0 entries left out")
    assert result.picture_sizes == {(6, 4): 6}
    assert result.words["AGAIN"] == 11
    flickr = check_corpus(flickr8k_audio)
    assert flickr.ok
    assert flickr.counts == {"train": (2, 4), "val": (1, 2), "test": (1, 2)}
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "checking test: 100%" in captured.err


def test_every_bad_file_is_listed_once_and_can_be_left_out(spoken_coco):
    sound = spoken_coco / "wavs/val/0/speaker0-4-0.wav"
    sound.write_bytes(sound.read_bytes()[:-100])
    other = spoken_coco / "wavs/train/0/speaker1-0-1.flac"
    soundfile.write(other, np.zeros(100), 8000)
    (spoken_coco / "val2014/COCO_val2014_000000000005.jpg").write_bytes(b"broken")
    (spoken_coco / "wavs/val/0/speaker0-2-0.wav").unlink()

    result = check_corpus(spoken_coco, progress=False)
    assert not result.ok
    assert len(result.bad_entries) == 4
    lines = str(result).splitlines()
    for expected in (
        f"bad: {sound}: caption 'speaker0-4-0': is truncated (100 bytes are missing); replace it",
        f"bad: {other}: caption 'speaker1-0-1': has a sampling rate of 8000 Hz; resample it to "
        "16000 Hz",
    ):
        assert expected in lines
    assert any("COCO_val2014_000000000005.jpg': is no readable" in line for line in lines)
    assert any("there is no file 'wavs/val/0/speaker0-2-0.wav'" in line for line in lines)
    assert lines[-1] == "not usable: 4 to mend, or pass --skip-bad"

    skipping = check_corpus(spoken_coco, skip_bad=True, progress=False)
    assert skipping.ok
    assert skipping.bad_entries == result.bad_entries
    assert skipping.counts == {"train": (3, 5), "val": (1, 1), "test": (1, 1)}
    assert str(skipping).splitlines()[-1] == "usable, 4 entries left out"


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        (np.zeros(800), "is silent, every sample is 0; replace it"),
        (np.full(800, 0.25), "is silent, every sample is 0.25; replace it"),
        (0.25 + 0.0009 * np.sin(np.arange(800)), "is silent, no sample is above 0.001 of full"),
    ],
)
def test_a_recording_without_sound_is_told_and_stays_usable(spoken_coco, samples, message):
    path = spoken_coco / "wavs/val/0/speaker0-4-0.wav"
    soundfile.write(path, samples, 16_000)
    result = check_corpus(spoken_coco, progress=False)
    assert result.ok
    assert result.counts["test"] == (2, 3)
    [line] = [line for line in str(result).splitlines() if line.startswith("warning: ")]
    assert line.startswith(f"warning: {path}: caption 'speaker0-4-0': {message}")
    assert str(result).endswith("\nusable, 0 entries left out, 1 to look at")


def test_a_soft_recording_is_no_silent_one(spoken_coco):
    soft = 0.0011 * np.sin(np.arange(800))
    soundfile.write(spoken_coco / "wavs/val/0/speaker0-4-0.wav", soft, 16_000)
    assert check_corpus(spoken_coco, progress=False).warnings == ()


def test_files_that_two_splits_hold_are_told_with_both_entries(spoken_coco):
    sound, picture = "wavs/val/0/speaker0-{}-0.wav", "val2014/COCO_val2014_{:012d}.jpg"
    shutil.copy(spoken_coco / sound.format(2), spoken_coco / sound.format(4))
    shutil.copy(spoken_coco / picture.format(3), spoken_coco / picture.format(5))
    shutil.copy(spoken_coco / picture.format(3), spoken_coco / "train2014/spare.jpg")  # unlisted
    result = check_corpus(spoken_coco, progress=False)
    assert result.ok
    assert [str(warning) for warning in result.warnings] == [
        f"{picture.format(5)}: image '{picture.format(5)}': holds the bytes of "
        f"{picture.format(3)}: image '{picture.format(3)}', a leak from train to test; remove one "
        "of the two",
        f"{sound.format(4)}: caption 'speaker0-4-0': holds the bytes of {sound.format(2)}: "
        "caption 'speaker0-2-0', a leak from val to test; remove one of the two",
    ]


def test_copies_within_a_split_are_no_leak(spoken_coco):
    sound = "wavs/val/0/speaker0-{}-0.wav"
    shutil.copy(spoken_coco / sound.format(5), spoken_coco / sound.format(4))
    assert check_corpus(spoken_coco, progress=False).warnings == ()


def test_a_recording_that_two_splits_list_is_refused(spoken_coco, edit_text):
    edit_text(spoken_coco / "SpokenCOCO_val.json", "speaker0-4-0.wav", "speaker0-2-0.wav")
    result = check_corpus(spoken_coco, progress=False)
    assert not result.ok
    (problem,) = result.bad_entries
    assert "a leak from val to test" in problem.message
    skipping = check_corpus(spoken_coco, skip_bad=True, progress=False)
    assert skipping.ok
    assert skipping.counts == {"train": (3, 6), "val": (1, 2), "test": (2, 2)}


def test_metadata_problems_are_listed_once_though_every_split_sees_them(spoken_coco):
    release = spoken_coco / "SpokenCOCO_val.json"
    value = json.loads(release.read_text())
    del value["data"][0]["captions"][0]["wav"]
    release.write_text(json.dumps(value))
    (problem,) = check_corpus(spoken_coco, progress=False).bad_entries
    assert problem.message == "'wav' is missing; add it or remove the entry"


@pytest.mark.parametrize("change", ["alter", "add", "remove"])
def test_a_generated_corpus_that_was_changed_is_found_out(spoken_coco, change):
    (spoken_coco / "ground_truth").mkdir()
    truth = spoken_coco / "ground_truth/test.jsonl"
    truth.write_text("{}\n")
    seal(spoken_coco)
    if change == "alter":
        truth.write_text("[]\n")
    elif change == "add":
        (spoken_coco / "more.txt").touch()
    else:
        truth.unlink()
    for skip_bad in (False, True):
        result = check_corpus(spoken_coco, skip_bad=skip_bad, progress=False)
        assert not result.ok
        assert "corpus.json: content_hash: files were changed, added or removed" in str(result)


def test_a_damaged_file_of_a_generated_corpus_can_be_left_out_for_all_its_hash(spoken_coco):
    seal(spoken_coco)
    (spoken_coco / "wavs/val/0/speaker0-4-0.wav").write_bytes(b"")
    assert len(check_corpus(spoken_coco, progress=False).faults) == 1
    assert check_corpus(spoken_coco, skip_bad=True, progress=False).ok


def test_a_split_without_anything_is_a_fault_that_skipping_does_not_mend(spoken_coco):
    (spoken_coco / "val2014/COCO_val2014_000000000002.jpg").write_bytes(b"broken")
    result = check_corpus(spoken_coco, skip_bad=True, progress=False)
    assert not result.ok
    assert "split 'val' has no usable caption" in str(result)


def test_no_corpus_at_all_is_refused(tmp_path):
    with pytest.raises(InputError, match="holds no corpus"):
        check_corpus(tmp_path)


def test_unreadable_entries_are_left_out_the_same_with_any_number_of_workers(spoken_coco):
    (spoken_coco / "val2014/COCO_val2014_000000000005.jpg").write_bytes(b"broken")
    whole = load_corpus(spoken_coco, "test")
    one = leave_out_unreadable(whole, workers=1)
    assert one == leave_out_unreadable(whole, workers=4)
    assert [caption.id for caption in one.captions] == ["speaker1-4-1", "speaker0-4-0"]
    assert one.content_hash != whole.content_hash
    assert leave_out_unreadable(load_corpus(spoken_coco, "val")).left_out == ()

"""Loading Places Audio's layout, sound and broken."""

import json
from pathlib import Path

import pytest

from cmdlab.corpora import check_corpus, load_corpus
from cmdlab.errors import InputError


def edit(file: Path, **changes: object) -> None:
    """Change the last entry of a list."""
    value = json.loads(file.read_text())
    value["data"][-1].update(changes)
    file.write_text(json.dumps(value))


def test_places_audio_is_read_with_its_own_folders_only(places_audio):
    train = load_corpus(places_audio, "train")
    assert train.name == "Places Audio"
    assert [image.id for image in train.images] == [
        "images/a/abbey/gsun_a.jpg",
        "images/b/abbey/gsun_b.jpg",
    ]
    assert [caption.id for caption in train.captions] == ["U-train-0", "U-train-1", "U-train-2"]
    first = train.captions[0]
    assert (first.text, first.speaker) == ("a room 0", "S0")
    assert first.audio == places_audio / "wavs/train/utterance_0.wav"
    assert train.captions[1].image_id == train.images[0].id
    assert check_corpus(places_audio, progress=False).counts == {
        "train": (2, 3),
        "val": (1, 1),
        "test": (1, 1),
    }


def test_the_lists_of_2020_are_read_from_the_metadata_folder(places_audio):
    before = load_corpus(places_audio, "test")
    (places_audio / "metadata").mkdir()
    for old, new in {"train": "train", "val": "dev_seen", "test": "test_seen"}.items():
        (places_audio / f"{old}.json").rename(places_audio / f"metadata/{new}_2020.json")
    after = load_corpus(places_audio, "test")
    assert (after.images, after.captions) == (before.images, before.captions)
    (places_audio / "test.json").write_text("{}")
    with pytest.raises(InputError, match=r"test\.json and metadata/test_seen_2020\.json: are"):
        load_corpus(places_audio, "test")


def test_a_release_without_a_test_list_says_what_to_do(places_audio):
    (places_audio / "test.json").unlink()
    assert len(load_corpus(places_audio, "val").captions) == 1
    with pytest.raises(InputError, match=r"test\.json: is missing.*papers report on its val"):
        load_corpus(places_audio, "test")


BAD_ENTRIES = {
    "no recording": ("train", {"wav": "wavs/none.wav"}, r"data\[2\] 'U-train-2': there is no file"),
    "path out": ("train", {"image": "../../../x.jpg"}, "leaves the corpus folder"),
    "no speaker": ("train", {"speaker": None}, "'speaker' is None, which is no text"),
    "uttid twice": ("train", {"uttid": "U-train-0"}, r"'uttid' is that of train\.json: data\[0\]"),
    "image of another split": (
        "val",
        {"image": "a/abbey/gsun_a.jpg"},
        r"val\.json: data\[0\] 'U-val-0': its 'image' is that of train\.json: data\[0\] "
        "'U-train-0' too, a leak from train to val; remove one of the two",
    ),
}


@pytest.mark.parametrize("case", BAD_ENTRIES)
def test_a_bad_entry_is_named_and_can_be_left_out(places_audio, loads_or_refuses, case):
    split, changes, message = BAD_ENTRIES[case]
    edit(places_audio / f"{split}.json", **changes)
    with pytest.raises(InputError, match=message) as refusal:
        load_corpus(places_audio, "train")
    assert str(refusal.value).startswith(str(places_audio))
    assert len(loads_or_refuses(places_audio, "train", skip_bad=True).left_out) == 1


@pytest.mark.parametrize("base", [7, "/", "..", "a/..", "images\0", None])
def test_a_strange_base_path_stands_for_the_corpus_folder(places_audio, loads_or_refuses, base):
    value = json.loads((places_audio / "test.json").read_text())
    value["audio_base_path"] = base
    (places_audio / "test.json").write_text(json.dumps(value))
    assert len(loads_or_refuses(places_audio, "test", skip_bad=False).captions) == 1

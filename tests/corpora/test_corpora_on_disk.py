"""Loading SpokenCOCO's layout, sound and broken; what holds for every layout; content hashes."""

import copy
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cmdlab.corpora import content_hash, load_corpus
from cmdlab.corpora.corpus import SPLITS
from cmdlab.corpora.untrusted import BadEntry, UntrustedFolder
from cmdlab.errors import InputError

TRAIN, VAL, KARPATHY = "SpokenCOCO_train.json", "SpokenCOCO_val.json", "dataset_coco.json"
few_examples = settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def edit_json(path: Path, change: Callable[[Any], Any]) -> None:
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def test_spoken_coco_splits_follow_karpathy_and_the_order_follows_the_release(spoken_coco):
    train = load_corpus(spoken_coco, "train")
    assert train.name == "SpokenCOCO"
    assert [image.id for image in train.images] == [
        "train2014/COCO_train2014_000000000000.jpg",
        "train2014/COCO_train2014_000000000001.jpg",
        "val2014/COCO_val2014_000000000003.jpg",  # restval
    ]
    test = load_corpus(spoken_coco, "test")
    assert [caption.id for caption in test.captions] == [
        "speaker1-4-1",
        "speaker0-4-0",
        "speaker0-5-0",
    ]
    first = test.captions[0]
    assert (first.text, first.speaker) == ("IMAGE 4 AGAIN 1", "speaker1")
    assert first.image_id == test.images[0].id
    assert first.audio == spoken_coco / "wavs/val/0/speaker1-4-1.flac"
    assert test.images[0].path.is_file()
    assert len(load_corpus(spoken_coco, "val").images) == 1
    assert not test.left_out


def test_an_image_may_have_six_captions_as_some_of_the_release_have(spoken_coco):
    spoken = spoken_coco / "wavs/val/0/speaker0-5-0.wav"
    more = [f"more-5-{n}" for n in range(5)]
    for uttid in more:
        shutil.copy(spoken, spoken.with_name(f"{uttid}.wav"))

    def add(value):
        for uttid in more:
            wav = f"wavs/val/0/{uttid}.wav"
            new = {"text": "MORE", "speaker": "s", "uttid": uttid, "wav": wav}
            value["data"][3]["captions"].append(new)

    edit_json(spoken_coco / VAL, add)
    test = load_corpus(spoken_coco, "test")
    six, two = test.images[1].id, test.images[0].id
    assert [caption.image_id for caption in test.captions] == [two] * 2 + [six] * 6


def test_the_content_hash_is_one_for_all_splits_and_changes_with_the_metadata(
    spoken_coco, edit_text
):
    before = {load_corpus(spoken_coco, split).content_hash for split in SPLITS}
    assert len(before) == 1
    edit_text(spoken_coco / VAL, "IMAGE 4", "IMAGE 9")
    assert load_corpus(spoken_coco, "test").content_hash not in before


def test_a_generated_corpus_brings_its_own_name_and_hash(spoken_coco):
    identity = {"name": "SpokenScenes", "content_hash": "0" * 64}
    (spoken_coco / "corpus.json").write_text(json.dumps(identity))
    corpus = load_corpus(spoken_coco, "val")
    assert (corpus.name, corpus.content_hash) == ("SpokenScenes", "0" * 64)


@pytest.mark.parametrize("identity", [[], {}, {"name": "x"}, {"name": "x", "content_hash": "12"}])
def test_a_broken_identity_is_refused(spoken_coco, identity):
    (spoken_coco / "corpus.json").write_text(json.dumps(identity))
    with pytest.raises(InputError, match=r"corpus\.json: .*make the corpus again"):
        load_corpus(spoken_coco, "val")


def caption(data: Any) -> dict:
    """The first caption of the first test image, in SpokenCOCO_val.json."""
    return data["data"][2]["captions"][0]


BAD_ENTRIES: dict[str, tuple[str, Callable[[Any], Any], str]] = {
    "path out of the corpus": (
        VAL,
        lambda v: caption(v).update(wav="../secret.wav"),
        r"captions\[0\] 'speaker1-4-1': path '\.\./secret\.wav' leaves the corpus folder",
    ),
    "dots inside a path": (VAL, lambda v: caption(v).update(wav="wavs/../../x.wav"), "leaves the"),
    "absolute path": (VAL, lambda v: caption(v).update(wav="/etc/passwd"), "leaves the"),
    "absolute path by two slashes": (VAL, lambda v: caption(v).update(wav="//x.wav"), "leaves the"),
    "image out of the corpus": (
        VAL,
        lambda v: v["data"][2].update(image="val2014/../../x.jpg"),
        r"data\[2\]: path 'val2014/\.\./\.\./x\.jpg' leaves the corpus folder",
    ),
    "backslashes": (VAL, lambda v: caption(v).update(wav="wavs\\x.wav"), "with '/'"),
    "NUL in a path": (VAL, lambda v: caption(v).update(wav="x\0.wav"), "printable"),
    "half a character in a path": (VAL, lambda v: caption(v).update(wav="\ud800"), "half a char"),
    "endless path": (VAL, lambda v: caption(v).update(wav="x" * 9999), "no file 'xxx"),
    "endless folder": (VAL, lambda v: caption(v).update(wav="x" * 9999 + "/y"), "cannot be read"),
    "path that is a folder": (VAL, lambda v: caption(v).update(wav="wavs/val"), "not a regular"),
    "audio that is not there": (
        VAL,
        lambda v: caption(v).update(wav="wavs/val/0/none.wav"),
        r"SpokenCOCO_val\.json: data\[2\] .*there is no file 'wavs/val/0/none\.wav'; add it",
    ),
    "caption without audio": (
        VAL,
        lambda v: caption(v).pop("wav"),
        r"captions\[0\] 'speaker1-4-1': 'wav' is missing; add it",
    ),
    "empty audio": (VAL, lambda v: caption(v).update(wav=""), "'wav' is empty; fill it"),
    "caption without id": (
        VAL,
        lambda v: caption(v).pop("uttid"),
        r"captions\[0\]: 'uttid' is missing; add it",
    ),
    "id that is a number": (
        VAL,
        lambda v: caption(v).update(uttid=5),
        r"captions\[0\]: 'uttid' is 5, which is no text; write it in quotes",
    ),
    "empty id": (VAL, lambda v: caption(v).update(uttid=""), "'uttid' is empty; fill it"),
    "id with a line break": (VAL, lambda v: caption(v).update(uttid="a\nb"), "is not printable"),
    "caption without text": (VAL, lambda v: caption(v).pop("text"), "'text' is missing; add it"),
    "speaker that is null": (
        VAL,
        lambda v: caption(v).update(speaker=None),
        "'speaker' is None, which is no text",
    ),
    "caption that is no object": (
        VAL,
        lambda v: v["data"][2]["captions"].append(3),
        r"captions\[2\]: 3 is no object with 'uttid'",
    ),
    "text that is a number": (VAL, lambda v: caption(v).update(text=3), "'text' is 3, which is no"),
    "half a character in a text": (VAL, lambda v: caption(v).update(text="\ud800"), "half a char"),
    "repeated caption id across files": (
        VAL,
        lambda v: caption(v).update(uttid="speaker1-0-1"),
        r"'speaker1-0-1': its 'uttid' is that of SpokenCOCO_train\.json: data\[0\] '.*0\.jpg' "
        r"captions\[0\] 'speaker1-0-1' too",
    ),
    "one recording in two splits": (
        VAL,
        lambda v: caption(v).update(wav="./wavs//val/../val/0/speaker0-2-0.wav"),
        r"data\[2\] '.*4\.jpg' captions\[0\] 'speaker1-4-1': its 'wav' is that of "
        r"SpokenCOCO_val\.json: data\[0\] '.*2\.jpg' captions\[1\] 'speaker0-2-0' too, "
        "a leak from val to test; give each caption its own",
    ),
    "one recording for two images of a split": (
        VAL,
        lambda v: caption(v).update(wav="wavs/val/0/speaker0-5-0.wav"),
        r"data\[3\] '.*5\.jpg' captions\[0\] 'speaker0-5-0': its 'wav' is that of "
        r"SpokenCOCO_val\.json: data\[2\] .* 'speaker1-4-1' too; give each caption its own",
    ),
    "one recording for two captions of an image": (
        VAL,
        lambda v: caption(v).update(wav="wavs/val/0/speaker0-4-0.wav"),
        "'speaker0-4-0': its 'wav' is that of .* 'speaker1-4-1' too; give each caption its own",
    ),
    "repeated image": (
        VAL,
        lambda v: v["data"].append(copy.deepcopy(v["data"][2])),
        r"data\[4\] .*earlier entry",
    ),
    "repeated image in another spelling": (
        VAL,
        lambda v: v["data"].append({**v["data"][2], "image": "./" + v["data"][2]["image"]}),
        r"data\[4\] 'val2014/.*earlier entry",
    ),
    "image without captions": (VAL, lambda v: v["data"][2].update(captions=[]), "'captions' is em"),
    "captions left out": (VAL, lambda v: v["data"][2].pop("captions"), "'captions' is missing"),
    "captions that are text": (
        VAL,
        lambda v: v["data"][2].update(captions="x"),
        "'captions' is 'x', which is no list",
    ),
    "entry that is no object": (
        VAL,
        lambda v: v["data"].insert(0, None),
        r"data\[0\]: None is no object with 'image'",
    ),
    "image id that is a number": (
        VAL,
        lambda v: v["data"][2].update(image=7),
        r"data\[2\]: 'image' is 7, which is no text",
    ),
    "image that the list lacks": (
        KARPATHY,
        lambda v: v["images"].pop(1),
        r"SpokenCOCO_val\.json: data\[2\] .* is not in dataset_coco\.json",
    ),
    "image that the release lacks": (
        VAL,
        lambda v: v["data"].pop(2),
        r"dataset_coco\.json: 'val2014/COCO_val2014_000000000004\.jpg': the image is in no",
    ),
    "image listed twice": (
        KARPATHY,
        lambda v: v["images"].append(v["images"][0]),
        r"images\[6\] .*earlier entry, in test; remove one",
    ),
    "unknown split": (
        KARPATHY,
        lambda v: v["images"][0].update(split="dev"),
        r"images\[0\] .*split 'dev' is none of",
    ),
    "list entry without a name": (
        KARPATHY,
        lambda v: v["images"][0].pop("filename"),
        r"images\[0\]: 'filename' is missing; add it",
    ),
}


@pytest.mark.parametrize("case", BAD_ENTRIES)
def test_a_bad_entry_is_named_and_can_be_left_out(spoken_coco, loads_or_refuses, case):
    whole = load_corpus(spoken_coco, "test")
    file, change, message = BAD_ENTRIES[case]
    edit_json(spoken_coco / file, change)
    with pytest.raises(InputError, match=message) as refusal:
        load_corpus(spoken_coco, "test")
    assert str(refusal.value).startswith(str(spoken_coco))
    assert "\n" not in str(refusal.value)

    rest = loads_or_refuses(spoken_coco, "test", skip_bad=True)
    assert rest.left_out
    assert {c.id for c in rest.captions} <= {c.id for c in whole.captions}
    assert any(problem.message in str(refusal.value) for problem in rest.left_out)


def test_leaving_out_an_image_leaves_out_its_captions_only(spoken_coco):
    (spoken_coco / "val2014/COCO_val2014_000000000005.jpg").unlink()
    rest = load_corpus(spoken_coco, "test", skip_bad=True)
    assert [c.id for c in rest.captions] == ["speaker1-4-1", "speaker0-4-0"]
    (problem,) = rest.left_out
    assert problem.file == VAL
    assert "COCO_val2014_000000000005.jpg" in problem.entry
    # Another selection must not pass for the whole corpus.
    assert rest.content_hash != load_corpus(spoken_coco, "train").content_hash


def test_media_of_other_splits_need_not_be_there(spoken_coco):
    shutil.rmtree(spoken_coco / "train2014")
    assert len(load_corpus(spoken_coco, "test").images) == 2


def test_a_split_with_nothing_left_is_refused_even_when_skipping(spoken_coco):
    shutil.rmtree(spoken_coco / "wavs")
    with pytest.raises(InputError, match=r"'test' has no usable caption.*the first of 3 problems"):
        load_corpus(spoken_coco, "test", skip_bad=True)


BROKEN_FILES: dict[str, tuple[bytes, str]] = {
    "cut off": (b'{"data": [', "not valid JSON"),
    "empty": (b"", "not valid JSON"),
    "not UTF-8": (b'{"data":\n["\xff"]}', "line 2: is not UTF-8"),
    "repeated key": (b'{"data": [], "data": []}', "key 'data' is repeated"),
    "NaN": (b'{"data": [NaN]}', "NaN is not a JSON number"),
    "too deep": (b"[" * 200_000, "nested too deeply"),
    "endless number": (b"[" + b"9" * 5000 + b"]", "not valid JSON"),
    "list at the top": (b"[]", r"\[\] is no object with"),
    "no list inside": (b'{"data": {}, "images": 3}', "which is no list"),
}


@pytest.mark.parametrize("file", [TRAIN, VAL, KARPATHY])
@pytest.mark.parametrize("case", BROKEN_FILES)
@pytest.mark.parametrize("skip_bad", [False, True])
def test_a_broken_file_is_refused_even_when_skipping(spoken_coco, file, case, skip_bad):
    content, message = BROKEN_FILES[case]
    (spoken_coco / file).write_bytes(content)
    with pytest.raises(InputError, match=message) as refusal:
        load_corpus(spoken_coco, "test", skip_bad=skip_bad)
    assert str(spoken_coco / file) in str(refusal.value)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("file", [TRAIN, VAL, KARPATHY])
def test_a_missing_file_is_named(spoken_coco, file):
    (spoken_coco / file).unlink()
    with pytest.raises(InputError, match=file):
        load_corpus(spoken_coco, "test")


def test_the_missing_split_list_says_what_to_fetch(spoken_coco):
    (spoken_coco / KARPATHY).unlink()
    with pytest.raises(InputError, match="put Karpathy's list of COCO there"):
        load_corpus(spoken_coco, "test")


def test_a_byte_order_mark_and_windows_line_ends_change_nothing(spoken_coco, flickr8k_audio):
    for root in (spoken_coco, flickr8k_audio):
        before = load_corpus(root, "test")
        for path in [*root.glob("*.json"), *root.rglob("*.txt")]:
            windows = path.read_text().replace("\n", "\r\n")
            path.write_bytes(b"\xef\xbb\xbf" + windows.encode())
        after = load_corpus(root, "test")
        assert (after.images, after.captions) == (before.images, before.captions)


@pytest.mark.parametrize("spelling", ["./{}", "wavs/..//{}", ".///{}", "none/../{}"])
def test_a_path_that_stays_in_the_corpus_may_be_spelt_in_any_way(spoken_coco, spelling):
    before = load_corpus(spoken_coco, "test")

    def respell(value):
        for entry in value["data"]:
            entry["image"] = spelling.format(entry["image"])
            for spoken in entry["captions"]:
                spoken["wav"] = spelling.format(spoken["wav"])

    edit_json(spoken_coco / VAL, respell)
    edit_json(
        spoken_coco / KARPATHY,
        lambda v: [one.update(filepath=f"./{one['filepath']}/") for one in v["images"]],
    )
    after = load_corpus(spoken_coco, "test")
    assert (after.images, after.captions) == (before.images, before.captions)


def test_links_may_not_leave_the_corpus(spoken_coco, tmp_path):
    outside = tmp_path / "outside"
    (spoken_coco / "val2014").rename(outside)
    (spoken_coco / "val2014").symlink_to(outside)
    with pytest.raises(InputError, match="'val2014' is a link that leaves the corpus folder"):
        load_corpus(spoken_coco, "test")
    (spoken_coco / "val2014").unlink()
    (spoken_coco / "val2014").mkdir()
    for path in outside.iterdir():
        (spoken_coco / "val2014" / path.name).symlink_to(path)
    with pytest.raises(InputError, match=r"0004\.jpg' is a link that leaves the corpus folder"):
        load_corpus(spoken_coco, "test")


def test_links_within_the_corpus_and_to_the_corpus_are_followed(spoken_coco, tmp_path):
    (spoken_coco / "val2014").rename(spoken_coco / "elsewhere")
    (spoken_coco / "val2014").symlink_to("elsewhere")
    (tmp_path / "link").symlink_to(spoken_coco)
    assert len(load_corpus(tmp_path / "link", "test").images) == 2


def test_a_metadata_file_may_not_be_a_link_out_or_a_pipe(spoken_coco, tmp_path):
    (spoken_coco / VAL).rename(tmp_path / VAL)
    (spoken_coco / VAL).symlink_to(tmp_path / VAL)
    with pytest.raises(InputError, match="leaves the corpus folder"):
        load_corpus(spoken_coco, "test")
    (spoken_coco / VAL).unlink()
    os.mkfifo(spoken_coco / VAL)
    with pytest.raises(InputError, match="not a regular file"):  # and does not wait for ever
        load_corpus(spoken_coco, "test")


@few_examples
@given(st.text() | st.text(alphabet="./ab\\\0~ \n", max_size=12))
def test_no_path_whatever_leaves_the_corpus(spoken_coco, path):
    folder = UntrustedFolder(spoken_coco, skip_bad=False)
    try:
        found = folder.locate(path)
    except BadEntry as error:
        refusal = str(error)
    else:
        refusal = ""
        assert found.resolve().is_relative_to(spoken_coco.resolve())
    assert "\n" not in refusal


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=5,
)


def places_in(value: Any, place: tuple = ()) -> list[tuple]:
    """Every place in a JSON value, as a path of keys and indices."""
    items = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if isinstance(value, list)
        else ()
    )
    return [place, *(found for key, inner in items for found in places_in(inner, (*place, key)))]


@few_examples
@given(st.sampled_from([TRAIN, VAL, KARPATHY]), st.data())
def test_any_change_of_the_json_gives_a_clear_refusal_or_a_sound_corpus(
    spoken_coco, loads_or_refuses, file, data
):
    original = (spoken_coco / file).read_text()
    value = json.loads(original)
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.sampled_from(places_in(value)))
        if not place:
            value = data.draw(json_values)
            continue
        parent = value
        for key in place[:-1]:
            parent = parent[key]
        if data.draw(st.booleans()):
            parent[place[-1]] = data.draw(json_values | st.just(copy.deepcopy(value)))
        else:
            del parent[place[-1]]
    (spoken_coco / file).write_text(json.dumps(value))
    try:
        for skip_bad in (True, False):
            loads_or_refuses(spoken_coco, "test", skip_bad=skip_bad)
    finally:
        (spoken_coco / file).write_text(original)


def test_an_unknown_layout_or_split_is_refused(tmp_path, spoken_coco):
    with pytest.raises(InputError, match="is not a folder"):
        load_corpus(tmp_path / "none", "test")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="holds no corpus; give a folder with"):
        load_corpus(tmp_path / "empty", "test")
    with pytest.raises(InputError, match="split 'dev' is unknown; use one of train, val, test"):
        load_corpus(spoken_coco, "dev")
    (spoken_coco / "flickr_audio").mkdir()
    with pytest.raises(InputError, match="holds two corpora"):
        load_corpus(spoken_coco, "test")


def test_the_content_hash_covers_every_name_and_byte_but_corpus_json(spoken_coco):
    before = content_hash(spoken_coco, workers=1)
    assert content_hash(spoken_coco, workers=3) == before
    (spoken_coco / "corpus.json").write_text("{}")
    assert content_hash(spoken_coco) == before
    sound = spoken_coco / "wavs/val/0/speaker1-4-1.flac"
    content = sound.read_bytes()
    sound.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert content_hash(spoken_coco) != before
    sound.write_bytes(content)
    assert content_hash(spoken_coco) == before
    sound.rename(sound.with_name("other.flac"))
    assert content_hash(spoken_coco) != before


def test_the_content_hash_is_the_documented_one(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "x").write_bytes(b"abc")
    (tmp_path / "a").write_bytes(b"")
    # sha256sum a b/x | LC_ALL=C sort | sha256sum
    assert content_hash(tmp_path) == (
        "9304ce53b286b732fd21a4c762193db2bcf60600be9343ff52ffdc8e819adf36"
    )


def test_the_content_hash_refuses_links(spoken_coco):
    (spoken_coco / "more.wav").symlink_to("/etc/passwd")
    with pytest.raises(InputError, match=r"'more\.wav' is a link"):
        content_hash(spoken_coco)

"""The hub's parquet parts become a corpus, in both forms that are known."""

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile
from PIL import Image

from cmdlab.corpora import Utterance, check_corpus, load_corpus, read_audio, read_image, speak
from cmdlab.corpora.flickr8k_audio import SPLIT_LISTS
from cmdlab.corpora.importing import import_corpus
from cmdlab.errors import InputError

pyarrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")
IMAGES = ["1000_a", "1001_b", "1002_c", "1003_d", "1004_unlisted"]


def photograph(number: int) -> bytes:
    blocks = np.random.default_rng(number).integers(0, 256, (9, 11, 3), dtype=np.uint8)
    content = io.BytesIO()
    Image.fromarray(blocks).resize((206 + number, 219), Image.Resampling.BICUBIC).save(
        content, "JPEG"
    )
    return content.getvalue()


@pytest.fixture(scope="module")
def recording() -> Callable[[int], bytes]:
    """A spoken sentence as a 16 kHz WAV file, a different one for each number."""
    spoken = speak([Utterance("a dog runs over the grass", "en-us+m3")])[0].samples

    def sound(number: int) -> bytes:
        content = io.BytesIO()
        soundfile.write(content, spoken[: 8_000 + 100 * number], 16_000, format="WAV")
        return content.getvalue()

    return sound


def write_part(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=3)


@pytest.fixture
def hub_flickr8k(tmp_path: Path, recording: Callable[[int], bytes]) -> Path:
    """As the hub has Flickr8k Audio: one split "train"; the images in two files. With the lists."""
    root = tmp_path / "flickr-audio-image"
    images = [
        {"id": name, "image": {"bytes": photograph(n), "path": f"{name}.jpg"}, "text": "One text."}
        for n, name in enumerate(IMAGES)
    ]
    audio, qrels = [], []
    for n, name in enumerate(IMAGES):
        for k in range(2):
            medium = {"bytes": recording(2 * n + k), "path": f"../../{name}_{k}.wav"}
            audio.append({"id": f"{name}_{k}", "audio": medium})
            qrels.append({"audio_id": f"{name}_{k}", "image_id": name})
    write_part(root / "images/train-00000-of-00002.parquet", images[:3])
    write_part(root / "images/train-00001-of-00002.parquet", images[3:])
    write_part(root / "audio/train-00000-of-00001.parquet", audio)
    write_part(root / "qrels/train-00000-of-00001.parquet", qrels[::-1])
    for split, names in {"train": IMAGES[:2], "val": IMAGES[2:3], "test": IMAGES[3:4]}.items():
        (root / SPLIT_LISTS[split]).write_text("".join(f"{name}.jpg\n" for name in names))
    return root


@pytest.fixture
def mteb_test_set(tmp_path: Path, recording: Callable[[int], bytes]) -> Path:
    """As mteb has SpokenCOCO's test split, image to audio: the queries are the images."""
    root = tmp_path / "SpokenCOCOI2ARetrieval"
    queries = [
        {"id": f"q{n}", "image": {"bytes": photograph(n), "path": None}, "modality": "image"}
        for n in range(4)
    ]
    corpus = [
        {"id": f"d{n}", "audio": {"bytes": recording(n), "path": None}, "text": f"TEXT {n}"}
        for n in range(9)
    ]
    qrels = [
        {"query-id": f"q{n % 4}", "corpus-id": f"d{n}", "score": 1} for n in range(9)
    ]  # three captions of the first
    qrels.append({"query-id": "q3", "corpus-id": "d0", "score": 0})
    for part, rows in {"queries": queries, "corpus": corpus, "qrels": qrels}.items():
        write_part(root / part / "test-00000-of-00001.parquet", rows)
    return root


def test_the_hubs_flickr8k_audio_has_the_splits_of_the_papers(hub_flickr8k, tmp_path):
    result = import_corpus(hub_flickr8k, tmp_path / "f8k", progress=False)
    assert result.counts == {"train": (2, 4), "val": (1, 2), "test": (1, 2)}
    assert "1 images are in no split and are left" in str(result)
    assert check_corpus(tmp_path / "f8k", progress=False).ok
    test = load_corpus(tmp_path / "f8k", "test")
    (image,) = test.images
    assert image.path.read_bytes() == photograph(3)  # not compressed a second time
    assert read_image(image.path).shape == (219, 209, 3)
    # Its text is that of one caption among five, and nothing says which.
    assert {caption.text for caption in test.captions} == {""}


def test_the_hubs_flickr8k_audio_without_its_lists_says_which(hub_flickr8k, tmp_path):
    (hub_flickr8k / SPLIT_LISTS["val"]).unlink()
    with pytest.raises(InputError, match=r"Flickr_8k\.devImages\.txt: is missing, and the other"):
        import_corpus(hub_flickr8k, tmp_path / "f8k", progress=False)
    for name in ("train", "test"):
        (hub_flickr8k / SPLIT_LISTS[name]).unlink()
    with pytest.raises(InputError, match=r"all 5 images are in one split; put .*devImages\.txt"):
        import_corpus(hub_flickr8k, tmp_path / "f8k", progress=False)


def test_mtebs_form_is_read_with_its_own_split_and_either_side_as_queries(
    mteb_test_set, tmp_path, recording
):
    result = import_corpus(mteb_test_set, tmp_path / "coco", progress=False)
    assert result.counts == {"train": (0, 0), "val": (0, 0), "test": (4, 9)}
    test = load_corpus(tmp_path / "coco", "test")
    captions = sorted(test.captions, key=lambda caption: caption.id)
    assert [caption.text for caption in captions] == [f"TEXT {n}" for n in range(9)]
    expected, _ = soundfile.read(io.BytesIO(recording(8)), dtype="float32")
    np.testing.assert_array_equal(read_audio(captions[8].audio), expected)
    owner = {caption.text: caption.image_id for caption in captions}
    assert owner["TEXT 0"] == owner["TEXT 4"] == owner["TEXT 8"] != owner["TEXT 3"]


def test_the_benchmark_itself_reads_the_same_pairs(mteb_test_set, tmp_path):
    loaders = pytest.importorskip("mteb.abstasks.retrieval_dataset_loaders")
    configs = "".join(
        f"  - config_name: {part}\n    data_files: [{{split: test, path: {part}/*.parquet}}]\n"
        for part in ("queries", "corpus", "qrels")
    )
    (mteb_test_set / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")
    theirs = loaders.RetrievalDatasetLoader(str(mteb_test_set), revision=None).load()
    import_corpus(mteb_test_set, tmp_path / "coco", progress=False)
    ours = load_corpus(tmp_path / "coco", "test")
    relevant = [
        sum(score > 0 for score in one.values()) for one in theirs["relevant_docs"].values()
    ]
    per_image = [sum(c.image_id == image.id for c in ours.captions) for image in ours.images]
    assert sorted(relevant) == sorted(per_image) == [2, 2, 2, 3]


def test_a_folder_of_parts_is_told_how_to_become_a_corpus(hub_flickr8k):
    with pytest.raises(InputError, match=r"parquet parts.*`cmdlab corpus import .* DIR`"):
        load_corpus(hub_flickr8k, "test")


def test_bad_rows_are_named_and_can_be_left_out(mteb_test_set, tmp_path, recording):
    corpus = [
        {"id": "d0", "audio": {"bytes": recording(0), "path": None}},
        {"id": "d1", "audio": {"bytes": recording(1)[:-99], "path": None}},
        {"id": "d2", "audio": {"bytes": None, "path": "/etc/passwd"}},
        {"id": "d0", "audio": {"bytes": recording(3), "path": None}},
    ]
    write_part(mteb_test_set / "corpus/test-00000-of-00001.parquet", corpus)
    result = import_corpus(mteb_test_set, tmp_path / "coco", progress=False)
    assert not result.ok
    text = str(result)
    for message in (
        "row 3 'd0': the audio is in corpus/test-00000-of-00001.parquet too; remove one",
        "qrels/test-00000-of-00001.parquet row 1: audio 'd1': is truncated",
        "audio 'd2': its row holds no bytes; fetch the data set with its media embedded",
        "qrels/test-00000-of-00001.parquet: row 3: audio 'd3' is in no part; add it or remove",
        "queries/test-00000-of-00001.parquet: 'q3': the image has no recording in qrels; add one",
    ):
        assert message in text
    rest = import_corpus(mteb_test_set, tmp_path / "coco", skip_bad=True, progress=False)
    assert rest.counts["test"] == (1, 1)


@pytest.mark.parametrize("damage", ["cut", "text", "columns"])
def test_a_part_that_is_no_parquet_is_named(mteb_test_set, tmp_path, damage):
    file = mteb_test_set / "queries/test-00000-of-00001.parquet"
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:-100])
    elif damage == "text":
        file.write_text("version https://git-lfs.github.com/spec/v1\n")
    else:
        write_part(file, [{"name": "q0"}])
    with pytest.raises(InputError, match=r"queries/test-.*parquet: (is no readable|has no column)"):
        import_corpus(mteb_test_set, tmp_path / "coco", progress=False)


def test_a_folder_without_parts_is_refused(tmp_path):
    with pytest.raises(InputError, match="holds no parquet parts; give a folder with audio"):
        import_corpus(tmp_path, tmp_path / "coco", progress=False)

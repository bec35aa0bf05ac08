"""Own recordings and pictures become a corpus: every kind of file, split by image, resumably."""

import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile
from PIL import Image

from cmdlab.cli import main
from cmdlab.corpora import Utterance, check_corpus, content_hash, load_corpus, speak
from cmdlab.corpora.corpus import SPLITS
from cmdlab.corpora.importing import import_corpus
from cmdlab.errors import InputError

SENTENCES = ("a dog runs over the grass", "two boys play with a ball", "the boat is on the lake")
SOUNDS = (  # suffix, rate, channels
    ("wav", 44_100, 2),
    ("ogg", 8_000, 1),
    ("flac", 16_000, 1),
    ("mp3", 48_000, 2),
)
PICTURES = (  # suffix, mode, size
    ("jpg", "RGB", (206, 219)),
    ("png", "RGBA", (640, 480)),
    ("tif", "CMYK", (90, 500)),
    ("gif", "P", (33, 47)),
    ("jpg", "L", (1, 300)),
    ("webp", "RGB", (1_300, 700)),
)


@pytest.fixture(scope="module")
def sentences() -> list[np.ndarray]:
    voices = ("en-us+m3", "en+f5", "en-gb-scotland+Michael")
    spoken = speak([Utterance(*one) for one in zip(SENTENCES, voices, strict=True)])
    return [speech.samples.astype(np.float32) / 32768 for speech in spoken]


def write_pairs(path: Path, rows: list[dict], columns: str = "audio,image,text,speaker") -> Path:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns.split(","), extrasaction="ignore", restval="")
        writer.writeheader()
        writer.writerows(rows)
    return path


def picture(number: int) -> Image.Image:
    _, mode, size = PICTURES[number % len(PICTURES)]
    blocks = np.random.default_rng(number).integers(0, 256, (9, 11, 3), dtype=np.uint8)
    image = Image.fromarray(blocks).resize(size, Image.Resampling.BICUBIC)
    return image.quantize(200) if mode == "P" else image.convert(mode)


def write_source(root: Path, sentences: list[np.ndarray], images: int = 24) -> list[dict]:
    """Pictures of every kind with one or two recordings each, of every kind, in two folders."""
    rows = []
    for number in range(images):
        image = root / f"pictures/p {number}.{PICTURES[number % len(PICTURES)][0]}"
        image.parent.mkdir(parents=True, exist_ok=True)
        picture(number).save(image)
        for _ in range(1 + number % 2):
            speech = sentences[len(rows) % 3]
            suffix, rate, channels = SOUNDS[len(rows) % 4]
            audio = root / f"recordings/é{len(rows)}.{suffix}"
            audio.parent.mkdir(exist_ok=True)
            softer = speech * 0.99 ** len(rows)  # no two recordings are equal
            soundfile.write(audio, np.stack([softer] * channels, axis=1), rate)
            rows.append(
                {
                    "audio": audio.relative_to(root).as_posix(),
                    "image": image.relative_to(root).as_posix(),
                    "text": SENTENCES[len(rows) % 3],
                    "speaker": f"voice {len(rows) % 3}",
                }
            )
    return rows


@pytest.fixture
def source(tmp_path: Path, sentences: list[np.ndarray]) -> tuple[Path, list[dict]]:
    rows = write_source(tmp_path / "own", sentences)
    return write_pairs(tmp_path / "own/pairs.csv", rows), rows


def files_below(root: Path) -> dict[str, tuple[bytes, int]]:
    return {
        path.relative_to(root).as_posix(): (path.read_bytes(), path.stat().st_mtime_ns)
        for path in root.rglob("*")
        if path.is_file()
    }


def test_every_kind_of_file_becomes_a_corpus_that_passes_the_check(source, tmp_path, capsys):
    pairs, rows = source
    before = files_below(pairs.parent)
    assert main(["corpus", "import", str(pairs), str(tmp_path / "mine")]) == 0
    printed = capsys.readouterr()
    assert "importing: 100%" in printed.err
    assert printed.out.endswith(f"{tmp_path / 'mine'}: made, 0 entries left out\n")
    assert files_below(pairs.parent) == before
    assert not (tmp_path / "mine.making").exists()

    check = check_corpus(tmp_path / "mine", progress=False)
    assert check.ok
    assert check.warnings == ()
    assert {split: images for split, (images, _) in check.counts.items()} == {
        "train": 20,
        "val": 2,
        "test": 2,
    }
    assert sum(captions for _, captions in check.counts.values()) == len(rows)
    assert max(max(size) for size in check.picture_sizes) == 1024
    sources = json.loads((tmp_path / "mine/sources.json").read_text())
    found = {}
    for split in SPLITS:
        corpus = load_corpus(tmp_path / "mine", split)
        assert corpus.name == "mine"
        for caption in corpus.captions:
            wav = caption.audio.relative_to(corpus.root).as_posix()
            found[sources[wav][0]] = [
                sources[caption.image_id][0],
                caption.text,
                caption.speaker,
            ]
    assert found == {row["audio"]: [row["image"], row["text"], row["speaker"]] for row in rows}


def test_the_same_seed_gives_the_same_bytes_and_another_one_other_splits(source, tmp_path):
    pairs, _ = source
    for name, workers, seed in (("a/x", 1, 1), ("b/x", 5, 1), ("c/x", 2, 2)):
        (tmp_path / name).parent.mkdir()
        import_corpus(pairs, tmp_path / name, side=64, seed=seed, workers=workers, progress=False)
    a, b, c = ({k: v[0] for k, v in files_below(tmp_path / n).items()} for n in "abc")
    assert a == b
    lists = [json.loads(files["x/dataset_coco.json"])["images"] for files in (a, c)]
    assert {entry["filename"] for entry in lists[0]} == {entry["filename"] for entry in lists[1]}
    assert sorted(map(str, lists[0])) != sorted(map(str, lists[1]))
    assert check_corpus(tmp_path / "a/x", progress=False).picture_sizes == {(64, 64): 24}


def test_near_duplicates_stay_together_and_are_told(source, tmp_path):
    pairs, rows = source
    for n in range(6):  # each of six pictures a second time, smaller and as a JPEG file
        audio = f"recordings/again{n}.wav"
        soundfile.write(pairs.parent / audio, np.random.default_rng(n).uniform(-1, 1, 900), 8_000)
        small = picture(6 * (n % 4)).convert("RGB").resize((150 - n, 160))
        small.save(pairs.parent / f"pictures/again{n}.jpg", quality=70)
        rows.append({"audio": audio, "image": f"pictures/again{n}.jpg"})
    write_pairs(pairs, rows)
    for seed in range(5):
        result = import_corpus(pairs, tmp_path / f"{seed}", seed=seed, progress=False)
        assert len(result.near_duplicates) == 4
        assert all("near-duplicates, all in " in line for line in result.near_duplicates)
        image_of = json.loads((tmp_path / f"{seed}/sources.json").read_text())
        split_of = {
            image_of[image.id][0]: split
            for split in SPLITS
            for image in load_corpus(tmp_path / f"{seed}", split).images
        }
        for n in range(6):
            assert split_of[f"pictures/again{n}.jpg"] == split_of[f"pictures/p {6 * (n % 4)}.jpg"]
        assert set(split_of.values()) == set(SPLITS)


def test_one_picture_under_two_names_is_one_image(source, tmp_path):
    pairs, rows = source
    copy = pairs.parent / "pictures/copy.jpg"
    copy.write_bytes((pairs.parent / rows[0]["image"]).read_bytes())
    rows[-1]["image"] = "pictures/copy.jpg"
    write_pairs(pairs, rows)
    import_corpus(pairs, tmp_path / "mine", progress=False)
    sources = json.loads((tmp_path / "mine/sources.json").read_text())
    assert [rows[0]["image"], "pictures/copy.jpg"] in sources.values()


def test_stated_splits_are_kept_and_a_leak_between_them_is_told(source, tmp_path):
    pairs, rows = source
    names = {image: i for i, image in enumerate(dict.fromkeys(row["image"] for row in rows))}
    for row in rows:
        row["split"] = ("train", "dev", "TEST", "")[names[row["image"]] % 4]
    twin = Image.open(pairs.parent / rows[0]["image"]).resize((100, 110))  # of the first, in train
    twin.save(pairs.parent / "pictures/twin.png")
    soundfile.write(pairs.parent / "twin.wav", np.random.default_rng(7).uniform(-1, 1, 999), 16_000)
    rows.append({"audio": "twin.wav", "image": "pictures/twin.png", "split": "test"})
    write_pairs(pairs, rows, "audio,image,text,speaker,split")
    result = import_corpus(pairs, tmp_path / "mine", progress=False)
    assert (
        f"warning: near-duplicates in train and test, as stated: '{rows[0]['image']}', "
        "'pictures/twin.png'; remove those that show the same" in str(result)
    )
    sources = json.loads((tmp_path / "mine/sources.json").read_text())
    for split in SPLITS:
        for image in load_corpus(tmp_path / "mine", split).images:
            stated = names.get(sources[image.id][0], 2) % 4
            assert stated == 3 or SPLITS[stated] == split


BAD_LINES = {
    "no such recording": ({"audio": "recordings/none.wav"}, "audio: there is no file 'recordings"),
    "path out": ({"audio": "../own/recordings/é0.wav"}, "audio: path .* leaves the"),
    "absolute path": ({"image": "/etc/hostname"}, "image: path '/etc/hostname' leaves the"),
    "empty": ({"image": ""}, "'image' is empty; fill it or remove the line"),
    "no picture": ({"image": "pairs.csv"}, "image 'pairs.csv': is no picture that Pillow reads"),
    "no sound": ({"audio": "pictures/p 0.jpg"}, "audio 'pictures/p 0.jpg': is no sound"),
    "unknown split": ({"split": "exam"}, "split 'exam' is none of train, val, test; mend it"),
    "two splits": ({"image": "pictures/p 0.jpg", "split": "val"}, "is in train by line 2; one"),
    "pair twice": (
        {"audio": "recordings/é0.wav", "image": "pictures/p 0.jpg"},
        "audio 'recordings/é0.wav' is paired with this picture by line 2 too; remove one",
    ),
    "copy of a pair": (
        {"audio": "recordings/copy.wav", "image": "pictures/p 0.jpg"},
        "'recordings/copy.wav', as 'recordings/é0.wav' there, is paired with this picture by line",
    ),
}


@pytest.mark.parametrize("case", BAD_LINES)
def test_a_bad_line_is_named_and_can_be_left_out(source, tmp_path, capsys, case):
    pairs, rows = source
    changes, message = BAD_LINES[case]
    shutil.copy(pairs.parent / "recordings/é0.wav", pairs.parent / "recordings/copy.wav")
    rows[0]["split"] = "train"
    rows[7] |= changes
    write_pairs(pairs, rows[:12], "audio,image,text,speaker,split")
    arguments = ["corpus", "import", str(pairs), str(tmp_path / "mine")]
    assert main(arguments) == 2
    printed = capsys.readouterr()
    [line] = [line for line in printed.out.splitlines() if line.startswith("bad: ")]
    assert line.startswith("bad: pairs.csv: line 9: ")
    assert re.search(message, line)
    assert "1 to mend, or pass --skip-bad" in printed.out
    assert printed.err.splitlines()[-1].startswith(f"cmdlab: {pairs}: not imported")
    assert not (tmp_path / "mine").exists()

    assert main([*arguments, "--skip-bad"]) == 0
    assert line.replace("bad: ", "left out: ", 1) in capsys.readouterr().out.splitlines()
    check = check_corpus(tmp_path / "mine", progress=False)
    assert check.ok
    assert sum(captions for _, captions in check.counts.values()) == 11


def test_pictures_of_one_recording_are_kept_together(source, tmp_path):
    pairs, rows = source
    shutil.copy(pairs.parent / rows[0]["audio"], pairs.parent / "recordings/copy.wav")
    for row, audio in ((rows[9], rows[0]["audio"]), (rows[20], "recordings/copy.wav")):
        row["audio"] = audio
    together = {rows[i]["image"] for i in (0, 9, 20)}
    for seed in (1, 2, 3):  # by chance alone all three would not be together every time
        mine = tmp_path / f"mine {seed}"
        result = import_corpus(write_pairs(pairs, rows), mine, seed=seed, progress=False)
        sources = json.loads((mine / "sources.json").read_text())
        listed = json.loads((mine / "dataset_coco.json").read_text())["images"]
        split_of = {
            name: one["split"]
            for one in listed
            for name in sources[f"{one['filepath']}/{one['filename']}"]
        }
        [split] = {split_of[name] for name in together}
        assert f"one recording of 3 pictures, all in {split}: " in str(result)
        assert sum(captions for _, captions in result.counts.values()) == len(rows)
        copies = [wav for wav, [name] in sources.items() if name == rows[0]["audio"]]
        first, second = ((mine / wav).read_bytes() for wav in copies)
        assert first == second
        assert check_corpus(mine, progress=False).ok
    rows[0]["split"], rows[9]["split"] = "train", "test"
    write_pairs(pairs, rows, "audio,image,text,speaker,split")
    with pytest.raises(InputError, match="speaks of pictures in train and test, as stated: "):
        import_corpus(pairs, tmp_path / "stated", progress=False)
    assert not (tmp_path / "stated").exists()


BAD_TABLES = {
    "no column": ("audio,picture\na,b\n", "line 1: column 'image' is missing"),
    "column twice": ("audio,image,audio\na,b,c\n", "line 1: column 'audio' is there twice"),
    "empty": ("", "line 1: column 'audio' is missing"),
    "no lines": ("audio,image\n", "no pair can be used"),
    "open quote": ('audio,image\n"a,b\n', r"line \d: is no CSV .*; save the table again"),
    "too few pictures": ("audio,image\nrecordings/é0.wav,pictures/p 0.jpg\n", "has 1 pictures"),
    "Latin-1": ("audio,image\n\udce9.wav,x\n", "line 2: is not UTF-8"),
}


@pytest.mark.parametrize("case", BAD_TABLES)
def test_a_table_that_is_none_is_refused(source, tmp_path, case):
    content, message = BAD_TABLES[case]
    source[0].write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(InputError, match=message) as refusal:
        import_corpus(source[0], tmp_path / "mine", skip_bad=True, progress=False)
    assert str(refusal.value).startswith(str(source[0]))
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("separator", [";", "\t"])
def test_other_separators_spreadsheets_and_more_columns_are_read(source, tmp_path, separator):
    pairs, rows = source
    lines = [separator.join((" Image ", "AUDIO", "date"))]
    lines += [separator.join((row["image"], row["audio"], "1, 2")) for row in rows]
    pairs.write_bytes(b"\xef\xbb\xbf" + "\r\n".join([*lines, "", ""]).encode())
    result = import_corpus(pairs, tmp_path / "mine", progress=False)
    assert "pairs.csv: not used: column 'date'" in str(result)
    assert sum(captions for _, captions in result.counts.values()) == len(rows)


def test_a_second_import_keeps_the_corpus_and_another_one_is_refused(source, tmp_path):
    pairs, _ = source
    first = import_corpus(pairs, tmp_path / "mine", progress=False)
    before = files_below(tmp_path / "mine")
    second = import_corpus(pairs, tmp_path / "mine", progress=False)
    assert second.counts == first.counts
    assert "kept; remove it to import these pairs again" in str(second)
    assert files_below(tmp_path / "mine") == before
    for options in ({"seed": 2}, {"side": 64}):
        with pytest.raises(InputError, match="is there already and is not the corpus of these"):
            import_corpus(pairs, tmp_path / "mine", progress=False, **options)
    with pytest.raises(InputError, match="is there already"):
        import_corpus(pairs, pairs.parent, progress=False)


def test_an_import_that_was_killed_goes_on_and_ends_the_same(tmp_path, sentences):
    write_pairs(tmp_path / "own/pairs.csv", write_source(tmp_path / "own", sentences, images=80))
    command = [sys.executable, "-m", "cmdlab", "corpus", "import", "own/pairs.csv", "mine"]
    process = subprocess.Popen([*command, "--workers", "1"], cwd=tmp_path, stderr=subprocess.PIPE)
    journal = tmp_path / "mine.making/journal.jsonl"
    while not (journal.exists() and journal.stat().st_size > 1_000):
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    with journal.open("a") as file:
        file.write('["image", "cut by the ki')  # as a kill in the middle of a line leaves it
    done = [json.loads(line)[3] for line in journal.read_text().splitlines()[:-1]]
    kept = {file: (tmp_path / "mine.making/corpus" / file).stat().st_mtime_ns for file in done}
    assert 0 < len(done) < 200
    assert subprocess.run(command, cwd=tmp_path, capture_output=True).returncode == 0
    for file, time_of_change in kept.items():  # not made again
        assert (tmp_path / "mine" / file).stat().st_mtime_ns == time_of_change
    whole = import_corpus(tmp_path / "own/pairs.csv", tmp_path / "other/mine", progress=False)
    assert whole.ok
    assert content_hash(tmp_path / "mine") == content_hash(tmp_path / "other/mine")


def test_a_mended_file_is_converted_again_and_what_is_not_used_is_removed(source, tmp_path):
    pairs, rows = source
    broken = pairs.parent / rows[3]["image"]
    good = broken.read_bytes()
    broken.write_bytes(good[:40])
    assert not import_corpus(pairs, tmp_path / "mine", progress=False).ok
    broken.write_bytes(good)
    write_pairs(pairs, rows[:-3])
    result = import_corpus(pairs, tmp_path / "mine", progress=False)
    assert result.ok
    listed = set(json.loads((tmp_path / "mine/sources.json").read_text()))
    media = {p.relative_to(tmp_path / "mine").as_posix() for p in tmp_path.glob("mine/*/*/*")}
    assert media == listed


def test_somebody_elses_folder_is_not_cleared_away(source, tmp_path):
    (tmp_path / "mine.making").mkdir()
    (tmp_path / "mine.making/thesis.txt").write_text("mine")
    with pytest.raises(InputError, match=r"mine\.making: is in the way; move it or remove it"):
        import_corpus(source[0], tmp_path / "mine", progress=False)
    assert os.listdir(tmp_path / "mine.making") == ["thesis.txt"]

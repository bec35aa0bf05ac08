"""Makes SpokenScenes: generated images with spoken captions, on disk in SpokenCOCO's layout.

Beside SpokenCOCO's files lie `ground_truth/<split>.jsonl`, one line an image: its objects with
their boxes, and each caption's facts and word timings; `ground_truth/test_foils.jsonl`, captions
with two colours exchanged, so that they are false, in the same voice; and `corpus.json`, which says
how the corpus was made and holds the hash of all other files.
"""

import hashlib
import heapq
import io
import json
import os
import shutil
import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import as_completed
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
from PIL import Image
from tqdm import tqdm

from cmdlab.corpora import rendering, scenes, speaking
from cmdlab.corpora.audio import SAMPLE_RATE
from cmdlab.corpora.presets import PRESETS, Preset
from cmdlab.corpora.speaking import STUDY_VOICES, TEST_ONLY_VOICES, Utterance
from cmdlab.corpora.workers import worker_pool
from cmdlab.errors import InputError, check_seed

CAPTIONS_PER_IMAGE = 5
RATES = (160, 220)  # words a minute
PITCHES = (35, 65)  # of espeak-ng's 0 to 99


# "pretraining" is no part of any corpus: it is for the encoders' own scenes.
_SPLIT_KEYS = {"train": 0, "val": 1, "test": 2, "pretraining": 3}


def make_corpus(
    folder: Path | str, *, preset: str = "default", seed: int = 1, workers: int | None = None
) -> None:
    """Makes the corpus of this preset and seed in `folder`; the bytes depend on those two alone.

    `workers` processes (default: one a core; 1 is this one) make it shard by shard in the folder
    beside it named `<folder>.making`, so memory does not grow with the corpus, and work that was
    stopped goes on from the last whole shard. A folder that holds this very corpus already is kept.

    Test captions are spoken by a voice of the study or, half of them, by one of TEST_ONLY_VOICES,
    which neither the other splits nor the encoders' training have.

    Raises InputError for an unknown preset or where the folder holds anything else.
    """
    folder = Path(folder).resolve()
    if preset not in PRESETS:
        raise InputError(f"no preset {preset!r}; use one of {', '.join(PRESETS)}")
    check_seed(seed)
    making = folder.with_name(folder.name + ".making")
    recipe = _recipe(preset, seed)
    if _is_made(folder, recipe):
        print(f"{folder}: kept, it holds this corpus already", file=sys.stderr)
        return
    _start_or_go_on(making, recipe)
    _make_shards(making, PRESETS[preset], seed, workers or os.cpu_count() or 1)
    _merge_shards(making, PRESETS[preset], recipe)
    os.replace(making / "corpus", folder)
    shutil.rmtree(making)


def scene_rng(seed: int, split: str, index: int, *, twins: bool = False) -> np.random.Generator:
    """The random numbers of one image: independent for each seed, split and index.

    `split` is "train", "val", "test", or "pretraining" for scenes outside every corpus. twins: the
    numbers of a pair of scenes, by the pair's index.
    """
    key = (_SPLIT_KEYS[split], index, 1) if twins else (_SPLIT_KEYS[split], index)
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=key))


def _recipe(preset: str, seed: int) -> dict[str, Any]:
    """What decides the corpus' bytes, as corpus.json states it.

    PRESETS stand in a file of their own, which is not hashed: a corpus stays good when presets of
    other names are added.
    """
    sources = (scenes.__file__, rendering.__file__, speaking.__file__, __file__)
    source = b"".join(Path(str(file)).read_bytes() for file in sources)
    return {
        "name": "SpokenScenes",
        "preset": preset,
        "seed": seed,
        **asdict(PRESETS[preset]),
        "captions_per_image": CAPTIONS_PER_IMAGE,
        "voices": {"study": list(STUDY_VOICES), "test_only": list(TEST_ONLY_VOICES)},
        "espeak_version": speaking.espeak_version(),
        "generator_sha256": hashlib.sha256(source).hexdigest(),
    }


def _is_made(folder: Path, recipe: dict[str, Any]) -> bool:
    """Whether this corpus is there. Raises InputError where something else is."""
    if not folder.exists():
        return False
    if not folder.is_dir():
        raise InputError(f"{folder}: is a file; name a folder to make the corpus in")
    try:
        made = json.loads((folder / "corpus.json").read_bytes())
    except FileNotFoundError:
        if any(folder.iterdir()):
            raise InputError(
                f"{folder}: holds files that are no SpokenScenes corpus; name another folder"
            ) from None
        return False
    except ValueError as error:
        raise InputError(f"{folder / 'corpus.json'}: is not JSON; remove {folder}") from error
    other = [key for key in recipe if not isinstance(made, dict) or made.get(key) != recipe[key]]
    if other:
        raise InputError(
            f"{folder}: holds a corpus of another {', '.join(other)}; remove it or name another "
            "folder"
        )
    return True


def _start_or_go_on(making: Path, recipe: dict[str, Any]) -> None:
    """Keeps the shards that were made by the same recipe, and clears away those of another."""
    marker = making / "recipe.json"
    text = json.dumps(recipe)
    if making.exists():
        ours = marker.is_file()
        if not ours and any(not path.is_dir() for path in making.rglob("*")):
            raise InputError(f"{making}: is in the way; move it or remove it")
        if ours and marker.read_text() == text and (making / "corpus").is_dir():
            return
        shutil.rmtree(making)
    (making / "corpus").mkdir(parents=True)
    marker.write_text(text)


@dataclass(frozen=True)
class _Shard:
    split: str
    number: int
    images: range
    twins: bool

    @property
    def name(self) -> str:
        return f"{self.split}-{self.number:04d}"


def _shards(preset: Preset) -> Iterator[_Shard]:
    for split, size in preset.sizes.items():
        for number, first in enumerate(range(0, size, preset.shard)):
            images = range(first, min(first + preset.shard, size))
            yield _Shard(split, number, images, preset.twins)


def _make_shards(making: Path, preset: Preset, seed: int, workers: int) -> None:
    missing = [shard for shard in _shards(preset) if not (making / "shards" / shard.name).is_dir()]
    total = sum(preset.sizes.values())
    bar = tqdm(
        total=total,
        initial=total - sum(len(shard.images) for shard in missing),
        desc="SpokenScenes",
        unit=" images",
    )
    with bar:
        if min(workers, len(missing)) <= 1:  # quicker done here than a process is started
            for shard in missing:
                _make_shard(making, shard, seed)
                bar.update(len(shard.images))
            return
        pool = worker_pool(min(workers, len(missing)))
        try:
            made = {pool.submit(_make_shard, making, shard, seed): shard for shard in missing}
            for future in as_completed(made):
                future.result()
                bar.update(len(made[future].images))
        finally:
            pool.shutdown(cancel_futures=True)


# The files of a made shard: a line of JSON an image in the first three, a line a file in the
# fourth; in the last a line for the first caption of each test image that has a foil.
_RELEASE, _SPLIT_LIST, _TRUTH, _HASHES = "release", "split_list", "ground_truth", "sha256"
_FOILS = "foils"
_FILES = (_RELEASE, _SPLIT_LIST, _TRUTH, _HASHES, _FOILS)


def _make_shard(making: Path, shard: _Shard, seed: int) -> None:
    """Writes a shard's images and sound into the corpus, and their metadata into `shards`."""
    root = making / "corpus"
    pictures = f"images/{shard.split}/{shard.number:04d}"
    sounds = f"wavs/{shard.split}/{shard.number:04d}"
    for name in (pictures, sounds):
        (root / name).mkdir(parents=True, exist_ok=True)
    lines: dict[str, list[str]] = {name: [] for name in _FILES}

    def write(name: str, content: bytes) -> None:
        (root / name).write_bytes(content)
        lines[_HASHES].append(_hash_line(hashlib.sha256(content).hexdigest(), name))

    for index in shard.images:
        rng = scene_rng(seed, shard.split, index)
        if shard.twins:
            both = scenes.sample_twins(scene_rng(seed, shard.split, index // 2, twins=True))
            scene = both[index % 2]
        else:
            scene = scenes.sample_scene(rng)
        texts = scenes.sample_captions(scene, rng, CAPTIONS_PER_IMAGE)
        picture, boxes = rendering.render(scene, rng)
        utterances = [_sample_utterance(text.text, shard.split, rng) for text in texts]
        file = f"{shard.split}-{index:06d}.png"
        write(f"{pictures}/{file}", png(picture))
        captions, truths = [], []
        for i, (text, utterance, speech) in enumerate(
            zip(texts, utterances, speaking.speak(utterances), strict=True)
        ):
            uttid = f"{shard.split}-{index:06d}-{i}"
            wav = f"{sounds}/{uttid}.flac"
            write(wav, flac(speech.samples))
            caption = {"text": text.text, "speaker": utterance.voice, "uttid": uttid, "wav": wav}
            captions.append(caption)
            words = [
                {"word": w.word, "start": round(w.start, 3), "end": round(w.end, 3), "object": of}
                for w, of in zip(speech.words, text.word_objects, strict=True)
            ]
            truths.append({"uttid": uttid, "facts": text.facts, "words": words})
        foils = (
            (i, foil)
            for i, text in enumerate(texts)
            if (foil := scenes.swap_colours(text, scene)) is not None
        )
        if shard.split == "test" and (first := next(foils, None)) is not None:
            i, foil = first
            # The presets without twins keep the foils, and so the bytes, that their records have.
            false = scenes.mend_articles(foil.text) if shard.twins else foil.text
            swapped = replace(utterances[i], text=false)
            uttid = captions[i]["uttid"]
            wav = f"{sounds}/{uttid}-foil.flac"
            write(wav, flac(speaking.speak([swapped])[0].samples))
            entry = {"uttid": f"{uttid}-foil", "foil_of": uttid, "text": swapped.text}
            entry |= {"speaker": swapped.voice, "wav": wav}
            lines[_FOILS].append(json.dumps(entry) + "\n")
        objects = [
            {**asdict(item), "box": [round(float(edge), 2) for edge in box]}
            for item, box in zip(scene.objects, boxes, strict=True)
        ]
        image = f"{pictures}/{file}"
        listed = {"filepath": pictures, "filename": file, "split": shard.split}
        truth = {"image": image, "objects": objects, "captions": truths}
        lines[_RELEASE].append(json.dumps({"image": image, "captions": captions}) + "\n")
        lines[_SPLIT_LIST].append(json.dumps(listed) + "\n")
        lines[_TRUTH].append(json.dumps(truth) + "\n")
    unfinished = making / "shards" / f"{shard.name}.part"
    unfinished.mkdir(parents=True, exist_ok=True)
    lines[_HASHES].sort()
    for name, content in lines.items():
        (unfinished / name).write_text("".join(content))
    os.replace(unfinished, unfinished.with_suffix(""))


def _sample_utterance(text: str, split: str, rng: np.random.Generator) -> Utterance:
    unheard = split == "test" and rng.random() < 0.5
    voices = TEST_ONLY_VOICES if unheard else STUDY_VOICES
    voice = voices[int(rng.integers(len(voices)))]
    rate, pitch = (int(rng.integers(low, high + 1)) for low, high in (RATES, PITCHES))
    return Utterance(text, voice, rate, pitch)


def png(picture: np.ndarray) -> bytes:
    """The file of a picture, uint8 [height, width, 3]."""
    content = io.BytesIO()
    Image.fromarray(picture).save(content, "PNG", compress_level=1)  # noise: more gains nothing
    return content.getvalue()


def flac(samples: np.ndarray) -> bytes:
    """The file of mono sound at 16 kHz: float [samples] within [-1, 1], or int16."""
    content = io.BytesIO()
    soundfile.write(
        content,
        samples,
        SAMPLE_RATE,
        format="FLAC",
        subtype="PCM_16",
        compression_level=0.0,  # the quickest, and the files are no larger
    )
    return content.getvalue()


def _merge_shards(making: Path, preset: Preset, recipe: dict[str, Any]) -> None:
    """Joins the shards' lines to SpokenCOCO's files, a line at a time; corpus.json comes last."""
    root = making / "corpus"

    def lines(name: str, *splits: str) -> Iterator[str]:
        for shard in _shards(preset):
            if shard.split in splits:
                with (making / "shards" / shard.name / name).open() as file:
                    yield from file

    (root / "ground_truth").mkdir(exist_ok=True)
    for split in preset.sizes:
        with (root / "ground_truth" / f"{split}.jsonl").open("w") as file:
            file.writelines(lines(_TRUTH, split))
    with (root / "ground_truth" / "test_foils.jsonl").open("w") as file:
        file.writelines(lines(_FOILS, "test"))
    _write_list(root / "SpokenCOCO_train.json", "data", lines(_RELEASE, "train"))
    _write_list(root / "SpokenCOCO_val.json", "data", lines(_RELEASE, "val", "test"))
    _write_list(root / "dataset_coco.json", "images", lines(_SPLIT_LIST, *preset.sizes))

    metadata = [*root.glob("*.json"), *root.glob("ground_truth/*")]
    hashes = []
    for path in metadata:
        with path.open("rb") as content:
            of_file = hashlib.file_digest(content, "sha256").hexdigest()
        hashes.append(_hash_line(of_file, path.relative_to(root).as_posix()))
    digest, files = hashlib.sha256(), 0
    with ExitStack() as stack:
        of_shards = [
            stack.enter_context((making / "shards" / shard.name / _HASHES).open())
            for shard in _shards(preset)
        ]
        for line in heapq.merge(sorted(hashes), *of_shards):
            digest.update(line.encode())
            files += 1
    identity = {**recipe, "files": files, "content_hash": digest.hexdigest()}
    (root / "corpus.json").write_text(json.dumps(identity, indent=1) + "\n")


def _write_list(path: Path, key: str, lines: Iterable[str]) -> None:
    with path.open("w") as file:
        file.write(f'{{"{key}": [\n')
        separator = ""
        for line in lines:
            file.write(separator + line.rstrip("\n"))
            separator = ",\n"
        file.write("\n]}\n")


def _hash_line(digest: str, name: str) -> str:
    return f"{digest}  {name}\n"  # as `content_hash` has it

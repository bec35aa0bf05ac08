"""One Corpus type for every spoken-image corpus, and its loader."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, TypeVar, get_args

from tqdm import tqdm

from cmdlab.corpora.untrusted import Problem, UntrustedFolder, is_name, shown
from cmdlab.errors import InputError

Split = Literal["train", "val", "test"]
SPLITS: tuple[Split, ...] = get_args(Split)

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class Caption:
    """One spoken caption of one image."""

    id: str
    image_id: str
    audio: Path
    text: str
    speaker: str


@dataclass(frozen=True, slots=True)
class Image:
    """One image; its captions name it by `id`."""

    id: str
    path: Path


@dataclass(frozen=True, slots=True)
class Corpus:
    """One split of a corpus, in the order of its files.

    Every caption's image is in `images`, and every image has at least one caption. `content_hash`
    changes with the entries left out, so nothing computed from another selection passes for this.
    """

    name: str
    root: Path
    split: Split
    images: tuple[Image, ...]
    captions: tuple[Caption, ...]
    content_hash: str
    left_out: tuple[Problem, ...] = ()


def load_corpus(root: Path | str, split: Split, *, skip_bad: bool = False) -> Corpus:
    """Load one split of a corpus in SpokenCOCO's or Flickr8k Audio's layout.

    The metadata of all splits is validated and the media files of this split must exist; none is
    decoded (see `cmdlab.corpora.check`). `skip_bad` leaves bad entries out and lists them in
    `left_out`. `content_hash` is that of a generated corpus' corpus.json, otherwise the SHA-256
    over the metadata files.
    Raises InputError, which names file and entry, for anything in the folder that is wrong.
    """
    # Imported here, since the layouts need the types above.
    from cmdlab.corpora.flickr8k_audio import read_flickr8k_audio
    from cmdlab.corpora.spoken_coco import read_spoken_coco

    if split not in SPLITS:
        raise InputError(f"split {shown(split)} is unknown; use one of {', '.join(SPLITS)}")
    folder = UntrustedFolder(Path(root), skip_bad=skip_bad)
    is_spoken_coco = any(map(folder.has, ("SpokenCOCO_train.json", "SpokenCOCO_val.json")))
    is_flickr8k_audio = any(map(folder.has, ("flickr_audio", "wav2capt.txt")))
    if is_spoken_coco == is_flickr8k_audio:
        raise InputError(
            f"{folder.root}: holds {'two corpora' if is_spoken_coco else 'no corpus'}; give a "
            "folder with either SpokenCOCO_train.json or flickr_audio/wav2capt.txt in it"
        )
    read = read_spoken_coco if is_spoken_coco else read_flickr8k_audio
    images, captions = read(folder, split)
    name = "SpokenCOCO" if is_spoken_coco else "Flickr8k Audio"
    content_hash = _hash_of_lines(f"{digest}  {file}\n" for file, digest in folder.digests.items())
    if folder.has("corpus.json"):
        name, content_hash = read_identity(folder)
    corpus = Corpus(name, folder.root, split, tuple(images), tuple(captions), content_hash)
    return leave_out(corpus, folder.problems)


def leave_out(
    corpus: Corpus,
    problems: Iterable[Problem],
    *,
    image_ids: Collection[str] = (),
    caption_ids: Collection[str] = (),
) -> Corpus:
    """The corpus without these images and captions, with `problems` added to `left_out`.

    Captions go with their image, images with their last caption.
    Raises InputError when nothing is left.
    """
    problems = tuple(problems)
    known = {image.id for image in corpus.images}.difference(image_ids)
    captions = tuple(c for c in corpus.captions if c.image_id in known and c.id not in caption_ids)
    spoken = {caption.image_id for caption in captions}
    images = tuple(image for image in corpus.images if image.id in spoken)
    left_out = (*corpus.left_out, *problems)
    if not images:
        reason = f"; the first of {len(left_out)} problems: {left_out[0]}" if left_out else ""
        raise InputError(
            f"{corpus.root}: split '{corpus.split}' has no usable caption; mend the corpus{reason}"
        )
    content_hash = corpus.content_hash
    if problems:
        entries = sorted(f"{problem.file}  {problem.entry}\n" for problem in problems)
        content_hash = _hash_of_lines([f"{content_hash}\n", *entries])
    return replace(
        corpus, images=images, captions=captions, content_hash=content_hash, left_out=left_out
    )


def read_identity(folder: UntrustedFolder) -> tuple[str, str]:
    """A generated corpus' name and content hash, as its corpus.json states them."""
    identity = folder.read_json("corpus.json")
    if not isinstance(identity, dict) or not is_name(identity.get("name")):
        folder.fail("corpus.json", "name: is missing or no text; make the corpus again")
    stated = identity.get("content_hash")
    if not isinstance(stated, str) or not re.fullmatch("[0-9a-f]{64}", stated):
        folder.fail("corpus.json", "content_hash: is no SHA-256 digest; make the corpus again")
    return identity["name"], stated


def content_hash(root: Path | str, *, workers: int | None = None, progress: bool = False) -> str:
    """The SHA-256 of every file of a generated corpus but corpus.json, which holds it.

    It is taken over the sorted lines "<sha256 of the file>  <relative posix path>\\n".
    `workers` threads read the files (default: one a core); their number does not change it.
    Raises InputError for a link or a file that cannot be read.
    """
    root = Path(root)
    files = [name for name in _files_below(root) if name != "corpus.json"]

    def line(name: str) -> str:
        try:
            with (root / name).open("rb") as file:
                return f"{hashlib.file_digest(file, 'sha256').hexdigest()}  {name}\n"
        except OSError as error:
            raise InputError(f"{root / name}: cannot be read ({error.strerror})") from error

    with ThreadPoolExecutor(workers or os.cpu_count()) as pool:
        hashed = tqdm(
            in_slices(pool, line, files),
            total=len(files),
            desc="content hash",
            unit=" files",
            disable=not progress,
        )
        return _hash_of_lines(sorted(hashed))


def in_slices(
    pool: ThreadPoolExecutor,
    function: Callable[[Item], Result],
    items: Sequence[Item],
    size: int = 4096,
) -> Iterator[Result]:
    """`pool.map` that holds only one slice's futures at a time: corpora have a million files."""
    for start in range(0, len(items), size):
        yield from pool.map(function, items[start : start + size])


def _files_below(root: Path) -> Iterator[str]:
    for folder, folders, files in os.walk(root, onerror=_cannot_list):
        for name in (*folders, *files):
            path = Path(folder, name)
            if path.is_symlink() or (name in files and not path.is_file()) or not is_name(name):
                raise InputError(
                    f"{folder}: {shown(name)} is a link, no regular file, or has no printable "
                    "name; a generated corpus has none such: remove it"
                )
        for name in files:
            yield Path(folder, name).relative_to(root).as_posix()


def _cannot_list(error: OSError) -> None:
    raise InputError(f"{error.filename}: cannot be listed ({error.strerror}); mend its rights")


def _hash_of_lines(lines: Iterable[str]) -> str:
    digest = hashlib.sha256()
    for line in lines:
        digest.update(line.encode())
    return digest.hexdigest()

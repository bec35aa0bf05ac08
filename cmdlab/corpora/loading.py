"""Loads a corpus of any layout: picks the reader that its folder asks for."""

from __future__ import annotations

import re
from pathlib import Path

from cmdlab.corpora.corpus import SPLITS, Corpus, Split, hash_of_lines, leave_out
from cmdlab.corpora.flickr8k_audio import read_flickr8k_audio
from cmdlab.corpora.parquet_parts import find_parts
from cmdlab.corpora.places_audio import CANDIDATES, read_places_audio
from cmdlab.corpora.spoken_coco import read_spoken_coco
from cmdlab.corpora.untrusted import BadEntry, UntrustedFolder, name_of, shown
from cmdlab.errors import InputError

# Each layout's name, the files by which it is known, and its reader.
LAYOUTS = (
    ("SpokenCOCO", ("SpokenCOCO_train.json", "SpokenCOCO_val.json"), read_spoken_coco),
    ("Flickr8k Audio", ("flickr_audio", "wav2capt.txt"), read_flickr8k_audio),
    ("Places Audio", (*CANDIDATES["train"], *CANDIDATES["val"]), read_places_audio),
)


def load_corpus(root: Path | str, split: Split, *, skip_bad: bool = False) -> Corpus:
    """Load one split of a corpus in SpokenCOCO's, Flickr8k Audio's or Places Audio's layout.

    The metadata of all splits is validated and the media files of this split must exist; none is
    decoded (see `cmdlab.corpora.check`). `skip_bad` leaves bad entries out and lists them in
    `left_out`. `content_hash` is that of a generated corpus' corpus.json, otherwise the SHA-256
    over the metadata files.
    Raises InputError, which names file and entry, for anything in the folder that is wrong.
    """
    if split not in SPLITS:
        raise InputError(f"split {shown(split)} is unknown; use one of {', '.join(SPLITS)}")
    folder = UntrustedFolder(Path(root), skip_bad=skip_bad)
    layouts = [layout for layout in LAYOUTS if any(map(folder.has, layout[1]))]
    if not layouts and find_parts(folder.root):
        raise InputError(
            f"{folder.root}: holds parquet parts, as hubs give data sets out; make a corpus of "
            f"them with `cmdlab corpus import {folder.root} DIR` and give DIR"
        )
    if len(layouts) != 1:
        raise InputError(
            f"{folder.root}: holds {'two corpora' if layouts else 'no corpus'}; give a folder with "
            "one of SpokenCOCO_train.json, flickr_audio/wav2capt.txt or Places Audio's train.json "
            "in it"
        )
    ((name, _, read),) = layouts
    images, captions = read(folder, split)
    content_hash = hash_of_lines(f"{digest}  {file}\n" for file, digest in folder.digests.items())
    if folder.has("corpus.json"):
        name, content_hash = read_identity(folder)
    corpus = Corpus(name, folder.root, split, tuple(images), tuple(captions), content_hash)
    return leave_out(corpus, folder.problems)


def read_identity(folder: UntrustedFolder) -> tuple[str, str]:
    """A generated corpus' name and content hash, as its corpus.json states them."""
    identity = folder.read_json("corpus.json")
    try:
        name, stated = name_of(identity, "name"), name_of(identity, "content_hash")
    except BadEntry as error:
        folder.fail("corpus.json", f"{error}; or make the corpus again")
    if not re.fullmatch("[0-9a-f]{64}", stated):
        folder.fail("corpus.json", "content_hash: is no SHA-256 digest; make the corpus again")
    return name, stated

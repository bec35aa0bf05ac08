"""Places Audio's layout: a list for each split, whose base paths are those of another machine."""

from __future__ import annotations

import posixpath
from typing import Any

from cmdlab.corpora.corpus import Caption, Image, Split
from cmdlab.corpora.untrusted import (
    BadEntry,
    UntrustedFolder,
    list_of,
    name_of,
    plain_path,
    shown,
    text_of,
)

# As first released, and as split again in 2020; either at the top or in `metadata/`. Of 2020's
# "seen" and "unseen" lists the seen ones are read: the unseen ones hold other kinds of places.
SPLIT_LISTS: dict[Split, tuple[str, str]] = {
    "train": ("train.json", "train_2020.json"),
    "val": ("val.json", "dev_seen_2020.json"),
    "test": ("test.json", "test_seen_2020.json"),
}
CANDIDATES = {
    split: tuple(f"{folder}{name}" for folder in ("", "metadata/") for name in names)
    for split, names in SPLIT_LISTS.items()
}


def read_places_audio(folder: UntrustedFolder, split: Split) -> tuple[list[Image], list[Caption]]:
    """One split: captions in the order of its list, images in that of their first caption.

    An image's id is its path in the corpus folder; a caption's is its uttid, its text what a
    recogniser heard. Media lie at their listed paths below the corpus folder, or below a folder in
    it that is named as the last part of the list's base path.
    """
    images: dict[str, Image] = {}
    captions: list[Caption] = []
    seen: dict[tuple[str, str], tuple[str, Split]] = {}  # uttid, wav or image: its entry and split
    for list_split, candidates in CANDIDATES.items():
        file = _list_of_split(folder, candidates, needed=list_split == split)
        if file is None:
            continue
        value = folder.read_json(file)
        audio_folder = _own_folder(folder, value, "audio_base_path")
        image_folder = _own_folder(folder, value, "image_base_path")
        try:
            entries = list_of(value, "data")
        except BadEntry as error:
            folder.fail(file, f"{error}; restore the released file")
        for index, entry in enumerate(entries):
            place = f"data[{index}]"
            try:
                uttid = name_of(entry, "uttid")
                place += f" {shown(uttid)}"
                wav = plain_path(audio_folder + name_of(entry, "wav"))
                image = plain_path(image_folder + name_of(entry, "image"))
                text, speaker = text_of(entry, "asr_text"), text_of(entry, "speaker")
                _refuse_repetition(seen, f"{file}: {place}", list_split, uttid, wav, image)
                if list_split == split:
                    audio, path = folder.locate(wav), folder.locate(image)
                    images.setdefault(image, Image(image, path))
                    captions.append(Caption(uttid, image, audio, text, speaker))
            except BadEntry as error:
                folder.reject(file, place, str(error))
    return list(images.values()), captions


def _list_of_split(
    folder: UntrustedFolder, candidates: tuple[str, ...], *, needed: bool
) -> str | None:
    found = [candidate for candidate in candidates if folder.has(candidate)]
    if len(found) > 1:
        folder.fail(" and ".join(found), "are lists of one split; remove all but one")
    if needed and not found:
        folder.fail(
            candidates[0],
            f"is missing, as are {', '.join(candidates[1:])}; restore one, or name your own list "
            f"{candidates[0]} (the first release has no test list, and papers report on its val)",
        )
    return found[0] if found else None


def _own_folder(folder: UntrustedFolder, value: Any, key: str) -> str:
    """The folder in the corpus that stands for the list's base path: "" or a name with a slash."""
    base = value.get(key) if isinstance(value, dict) else None
    name = posixpath.basename(base.rstrip("/")) if isinstance(base, str) else ""
    return f"{name}/" if name.strip(".") and folder.has_folder(name) else ""


def _refuse_repetition(
    seen: dict[tuple[str, str], tuple[str, Split]],
    place: str,
    split: Split,
    uttid: str,
    wav: str,
    image: str,
) -> None:
    """Raises BadEntry for an uttid or a wav that is not new, and for an image of another split."""
    for key, value in (("uttid", uttid), ("wav", wav), ("image", image)):
        first, first_split = seen.setdefault((key, value), (place, split))
        if first != place and (key != "image" or first_split != split):
            leak = f", a leak from {first_split} to {split}" if first_split != split else ""
            raise BadEntry(f"its '{key}' is that of {first} too{leak}; remove one of the two")

"""SpokenCOCO's layout: two release files, and Karpathy's list, which says what each split holds."""

from __future__ import annotations

from typing import Any

from cmdlab.corpora.corpus import SPLITS, Caption, Image, Split
from cmdlab.corpora.untrusted import (
    BadEntry,
    UntrustedFolder,
    list_of,
    name_of,
    plain_path,
    shown,
    text_of,
)

RELEASE_FILES = ("SpokenCOCO_train.json", "SpokenCOCO_val.json")
SPLIT_LIST = "dataset_coco.json"


def read_spoken_coco(folder: UntrustedFolder, split: Split) -> tuple[list[Image], list[Caption]]:
    """The images and captions of one split, in the order of the release files.

    An image's id is its path in the corpus folder; a caption's is its uttid.
    """
    split_of = _read_split_list(folder)
    unspoken = dict.fromkeys(split_of)  # in the list's order
    images: list[Image] = []
    captions: list[Caption] = []
    seen_images: set[str] = set()
    seen: _Seen = {}
    for file in RELEASE_FILES:
        for index, entry in enumerate(_list_of(folder, file, "data")):
            place = f"data[{index}]"
            try:
                image_id = plain_path(name_of(entry, "image"))
            except BadEntry as error:
                folder.reject(file, place, str(error))
                continue
            place = f"{place} {shown(image_id)}"
            if image_id in seen_images:
                folder.reject(file, place, "the image has an earlier entry; merge the two")
                continue
            seen_images.add(image_id)
            unspoken.pop(image_id, None)
            image_split = split_of.get(image_id)
            spoken = _check_captions(folder, file, place, entry, image_split, seen)
            if image_split is None:
                message = f"the image is not in {SPLIT_LIST}; add it there or remove the entry"
                folder.reject(file, place, message)
            elif image_split == split:
                _keep(folder, file, place, image_id, spoken, images, captions)
    for image_id in unspoken:
        message = f"the image is in no {' or '.join(RELEASE_FILES)}; restore those or this list"
        folder.reject(SPLIT_LIST, shown(image_id), message)
    return images, captions


def _read_split_list(folder: UntrustedFolder) -> dict[str, str]:
    """Each image's split. Karpathy's "restval" is what later work adds to train."""
    if not folder.has(SPLIT_LIST):
        folder.fail(
            SPLIT_LIST,
            "is missing; the release has no test split, so put Karpathy's list of COCO there",
        )
    split_of: dict[str, str] = {}
    for index, entry in enumerate(_list_of(folder, SPLIT_LIST, "images")):
        place = f"images[{index}]"
        try:
            image_id = name_of(entry, "filename")
            if text_of(entry, "filepath"):
                image_id = f"{entry['filepath']}/{image_id}"
            image_id = plain_path(image_id)
            place = f"{place} {shown(image_id)}"
            image_split = text_of(entry, "split")
        except BadEntry as error:
            folder.reject(SPLIT_LIST, place, str(error))
            continue
        image_split = "train" if image_split == "restval" else image_split
        if image_split not in SPLITS:
            message = f"split {shown(image_split)} is none of {', '.join(SPLITS)}, restval"
            folder.reject(SPLIT_LIST, place, f"{message}; mend it")
        elif image_id in split_of:
            message = f"the image has an earlier entry, in {split_of[image_id]}; remove one"
            folder.reject(SPLIT_LIST, place, message)
        else:
            split_of[image_id] = image_split
    return split_of


_Seen = dict[tuple[str, str], tuple[str, str | None]]
"""Each uttid and wav, by ("uttid", uttid) and ("wav", wav): the entry it is of, and its split."""


def _check_captions(
    folder: UntrustedFolder,
    file: str,
    place: str,
    image: dict[str, Any],
    split: str | None,
    seen: _Seen,
) -> list[tuple[str, dict[str, str]]]:
    """The captions of one image that are well formed and new, each with its place."""
    try:
        captions = list_of(image, "captions")
        if not captions:
            raise BadEntry("'captions' is empty; add them or remove the entry")
    except BadEntry as error:
        folder.reject(file, place, str(error))
        return []
    kept = []
    for index, caption in enumerate(captions):
        caption_place = f"{place} captions[{index}]"
        try:
            uttid = name_of(caption, "uttid")
            caption_place += f" {shown(uttid)}"
            wav = plain_path(name_of(caption, "wav"))
            fields = {"uttid": uttid, "wav": wav}
            fields |= {key: text_of(caption, key) for key in ("text", "speaker")}
            own = f"{file}: {caption_place}", split
            for key in ("uttid", "wav"):
                first, first_split = seen.setdefault((key, fields[key]), own)
                if first != own[0]:
                    leaks = key == "wav" and split and first_split and first_split != split
                    leak = f", a leak from {first_split} to {split}" if leaks else ""
                    raise BadEntry(
                        f"its '{key}' is that of {first} too{leak}; give each caption its own"
                    )
        except BadEntry as error:
            folder.reject(file, caption_place, str(error))
        else:
            kept.append((caption_place, fields))
    return kept


def _keep(
    folder: UntrustedFolder,
    file: str,
    place: str,
    image_id: str,
    spoken: list[tuple[str, dict[str, str]]],
    images: list[Image],
    captions: list[Caption],
) -> None:
    """Add one image and its captions, as far as their files exist."""
    try:
        images.append(Image(image_id, folder.locate(image_id)))
    except BadEntry as error:
        folder.reject(file, place, f"image: {error}")
        return
    for caption_place, fields in spoken:
        try:
            audio = folder.locate(fields["wav"])
        except BadEntry as error:
            folder.reject(file, caption_place, f"audio: {error}")
            continue
        captions.append(
            Caption(fields["uttid"], image_id, audio, fields["text"], fields["speaker"])
        )


def _list_of(folder: UntrustedFolder, file: str, key: str) -> list[Any]:
    try:
        return list_of(folder.read_json(file), key)
    except BadEntry as error:
        folder.fail(file, f"{error}; restore the released file")

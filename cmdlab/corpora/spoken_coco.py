"""SpokenCOCO's layout: two release files, and Karpathy's list, which says what each split holds."""

from __future__ import annotations

from typing import Any

from cmdlab.corpora.corpus import SPLITS, Caption, Image, Split
from cmdlab.corpora.untrusted import BadPath, UntrustedFolder, is_name, is_text, shown

RELEASE_FILES = ("SpokenCOCO_train.json", "SpokenCOCO_val.json")
SPLIT_LIST = "dataset_coco.json"


def read_spoken_coco(folder: UntrustedFolder, split: Split) -> tuple[list[Image], list[Caption]]:
    """The images and captions of one split, in the order of the release files.

    An image's id is its path as the release file has it; a caption's is its uttid.
    """
    split_of = _read_split_list(folder)
    unspoken = dict.fromkeys(split_of)  # in the list's order
    images: list[Image] = []
    captions: list[Caption] = []
    seen_images: set[str] = set()
    seen_captions: set[str] = set()
    for file in RELEASE_FILES:
        for index, entry in enumerate(_list_of(folder, file, "data")):
            place = f"data[{index}]"
            if not isinstance(entry, dict) or not is_name(entry.get("image")):
                folder.reject(file, place, "has no 'image' path; add it or remove the entry")
                continue
            image_id = entry["image"]
            place = f"{place} {shown(image_id)}"
            if image_id in seen_images:
                folder.reject(file, place, "the image has an earlier entry; merge the two")
                continue
            seen_images.add(image_id)
            unspoken.pop(image_id, None)
            spoken = _check_captions(folder, file, place, entry.get("captions"), seen_captions)
            if image_id not in split_of:
                message = f"the image is not in {SPLIT_LIST}; add it there or remove the entry"
                folder.reject(file, place, message)
            elif split_of[image_id] == split:
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
        fields: dict[str, Any] = entry if isinstance(entry, dict) else {}
        filepath, filename = fields.get("filepath"), fields.get("filename")
        if not (is_name(filename) and (filepath == "" or is_name(filepath))):
            folder.reject(SPLIT_LIST, place, "has no 'filepath' and 'filename'; add them")
            continue
        image_id = f"{filepath}/{filename}" if filepath else str(filename)
        image_split = "train" if fields.get("split") == "restval" else fields.get("split")
        place = f"{place} {shown(image_id)}"
        if image_split not in SPLITS:
            message = f"split {shown(image_split)} is none of {', '.join(SPLITS)}, restval"
            folder.reject(SPLIT_LIST, place, f"{message}; mend it")
        elif image_id in split_of:
            folder.reject(SPLIT_LIST, place, "the image has an earlier entry; remove one")
        else:
            split_of[image_id] = image_split
    return split_of


def _check_captions(
    folder: UntrustedFolder, file: str, place: str, captions: Any, seen: set[str]
) -> list[tuple[str, dict[str, str]]]:
    """The captions of one image that are well formed and new, each with its place."""
    if not isinstance(captions, list) or not captions:
        folder.reject(file, place, "the image has no 'captions'; add them or remove the entry")
        return []
    kept = []
    for index, caption in enumerate(captions):
        fields = caption if isinstance(caption, dict) else {}
        caption_place = f"{place} captions[{index}]"
        if not is_name(fields.get("uttid")):
            folder.reject(file, caption_place, "has no 'uttid'; add it or remove the caption")
            continue
        caption_place += f" {shown(fields['uttid'])}"
        if fields["uttid"] in seen:
            folder.reject(file, caption_place, "the uttid is used before; give each its own")
        elif not isinstance(fields.get("wav"), str) or not fields["wav"]:
            folder.reject(file, caption_place, "is without audio: add its 'wav' path or remove it")
        elif not (is_text(fields.get("text")) and is_text(fields.get("speaker"))):
            folder.reject(file, caption_place, "'text' and 'speaker' must be text; mend them")
        else:
            kept.append((caption_place, fields))
        seen.add(fields["uttid"])
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
    except BadPath as error:
        folder.reject(file, place, f"image: {error}")
        return
    for caption_place, fields in spoken:
        try:
            audio = folder.locate(fields["wav"])
        except BadPath as error:
            folder.reject(file, caption_place, f"audio: {error}")
            continue
        captions.append(
            Caption(fields["uttid"], image_id, audio, fields["text"], fields["speaker"])
        )


def _list_of(folder: UntrustedFolder, file: str, key: str) -> list[Any]:
    value = folder.read_json(file)
    entries = value.get(key) if isinstance(value, dict) else None
    if not isinstance(entries, list):
        folder.fail(file, f"has no list '{key}'; restore the released file")
    return entries

"""Flickr8k Audio's layout: recordings, images, text and split lists, which are released apart."""

from __future__ import annotations

import re
from collections.abc import Iterator
from posixpath import normpath  # "./a" and "a" are one recording

from cmdlab.corpora.corpus import Caption, Image, Split
from cmdlab.corpora.untrusted import BadEntry, UntrustedFolder, is_name, shown

RECORDINGS, SPEAKERS, TOKENS = "wav2capt.txt", "wav2spk.txt", "Flickr8k.token.txt"
SPLIT_LISTS: dict[Split, str] = {
    "train": "Flickr_8k.trainImages.txt",
    "val": "Flickr_8k.devImages.txt",
    "test": "Flickr_8k.testImages.txt",
}
IMAGE_FOLDERS = ("Images", "Flicker8k_Dataset")  # the release does spell it so


def read_flickr8k_audio(folder: UntrustedFolder, split: Split) -> tuple[list[Image], list[Caption]]:
    """One split: its images in the order of the split list, captions in that of wav2capt.txt.

    An image's id is its file name; a caption's is its recording's name without the suffix.
    Text of an image that is in no split list is not used: the release has 91 such images.
    """
    recordings = _only(folder, f"flickr_audio/{RECORDINGS}", RECORDINGS)
    audio_folder = recordings.removesuffix(RECORDINGS)
    image_folder = _only(folder, *IMAGE_FOLDERS)
    split_of = _read_split_lists(folder)
    token_file = _only(folder, TOKENS, f"Flickr8k_text/{TOKENS}")
    text_of = _read_text(folder, token_file, split_of)
    speaker_of = _read_speakers(folder, f"{audio_folder}{SPEAKERS}")

    path_of = {}
    for image_id, (image_split, file, place) in split_of.items():
        if image_split == split:
            try:
                path_of[image_id] = folder.locate(f"{image_folder}/{image_id}")
            except BadEntry as error:
                folder.reject(file, place, f"image: {error}")
    captions = []
    spoken, spoken_images = set(), set()
    for place, caption_id, image_id, number in _read_recordings(folder, recordings):
        key = f"{image_id}#{number}"
        spoken.add(key)
        spoken_images.add(image_id)
        message = None
        if image_id not in split_of:
            message = f"image {shown(image_id)} is in no split list; add it or remove the line"
        elif key not in text_of:
            message = f"{shown(key)} has no text in {token_file}; add it or remove the line"
        elif caption_id not in speaker_of:
            message = f"{shown(caption_id)} has no line in {SPEAKERS}; add its speaker there"
        elif image_id in path_of:
            try:
                audio = folder.locate(f"{audio_folder}wavs/{caption_id}.wav")
            except BadEntry as error:
                message = f"audio: {error}"
            else:
                text, speaker = text_of[key][0], speaker_of[caption_id]
                captions.append(Caption(caption_id, image_id, audio, text, speaker))
        if message:
            folder.reject(recordings, place, message)
    for key, (_, place) in text_of.items():
        if key not in spoken:
            message = f"is without audio: add its recording to {RECORDINGS} or remove the line"
            folder.reject(token_file, place, message)
    for image_id, (_, file, place) in split_of.items():
        if image_id not in spoken_images:
            message = f"the image has no line in {RECORDINGS}; add it or remove it from this list"
            folder.reject(file, place, message)
    return [Image(image_id, path) for image_id, path in path_of.items()], captions


def _read_split_lists(folder: UntrustedFolder) -> dict[str, tuple[Split, str, str]]:
    """Each image's split, with the file and place that say so."""
    split_of: dict[str, tuple[Split, str, str]] = {}
    for split, name in SPLIT_LISTS.items():
        file = _only(folder, name, f"Flickr8k_text/{name}")
        for place, image_id in folder.read_lines(file):
            place = f"{place} {shown(image_id)}"
            if not is_name(image_id) or "/" in image_id or not image_id.endswith(".jpg"):
                folder.reject(file, place, "is not the name of a .jpg file; mend the line")
            elif image_id in split_of:
                message = f"the image is in {split_of[image_id][1]} already; remove one"
                folder.reject(file, place, message)
            else:
                split_of[image_id] = (split, file, place)
    return split_of


def _read_text(
    folder: UntrustedFolder, file: str, split_of: dict[str, tuple[Split, str, str]]
) -> dict[str, tuple[str, str]]:
    """The text of each caption of the listed images by "<jpg>#<n>", with its place."""
    text_of: dict[str, tuple[str, str]] = {}
    for place, line in folder.read_lines(file):
        key, tab, text = line.partition("\t")
        image_id, _, number = key.rpartition("#")
        place = f"{place} {shown(key)}"
        unnumbered = re.sub(r"\.jpg\.\d+$", ".jpg", image_id)
        if not tab or not image_id or not number.isdecimal():
            folder.reject(file, place, "is not '<jpg>#<n><tab><text>'; mend or remove the line")
        elif image_id not in split_of:
            if unnumbered in split_of:
                message = f"no image is called so; a split list has {shown(unnumbered)}: use that"
                folder.reject(file, place, message)
        elif key in text_of:
            folder.reject(file, place, "has an earlier line; remove one")
        else:
            text_of[key] = (text.strip(), place)
    return text_of


def _read_speakers(folder: UntrustedFolder, file: str) -> dict[str, str]:
    """The speaker of each recording, by its name without the suffix."""
    speaker_of: dict[str, str] = {}
    for place, line in folder.read_lines(file):
        match = re.fullmatch(r"(\S+)\.wav\s+(\S+)", line)
        if match is None or not is_name(match[1]):
            folder.reject(file, place, f"{shown(line)} is not '<wav> <speaker>'; mend the line")
            continue
        caption_id = normpath(match[1])
        if caption_id in speaker_of:
            folder.reject(file, f"{place} {shown(caption_id)}", "has an earlier line; remove one")
        else:
            speaker_of[caption_id] = match[2]
    return speaker_of


def _read_recordings(folder: UntrustedFolder, file: str) -> Iterator[tuple[str, str, str, str]]:
    """Place, caption id, image id and caption number of each well-formed new line."""
    seen_captions: set[str] = set()
    seen_texts: set[tuple[str, str]] = set()
    for place, line in folder.read_lines(file):
        match = re.fullmatch(r"(\S+)\.wav\s+(\S+)\s+#(\d+)", line, re.ASCII)
        if match is None or not is_name(match[1]):
            folder.reject(file, place, f"{shown(line)} is not '<wav> <jpg> #<n>'; mend the line")
            continue
        caption_id, image_id, number = normpath(match[1]), match[2], match[3]
        place = f"{place} {shown(caption_id)}"
        if caption_id in seen_captions:
            folder.reject(file, place, "the recording has an earlier line; remove one")
        elif (image_id, number) in seen_texts:
            folder.reject(
                file, place, f"{shown(f'{image_id} #{number}')} is spoken before; remove one"
            )
        else:
            yield place, caption_id, image_id, number
        seen_captions.add(caption_id)
        seen_texts.add((image_id, number))


def _only(folder: UntrustedFolder, *candidates: str) -> str:
    """The one of these paths that is there."""
    found = [candidate for candidate in candidates if folder.has(candidate)]
    if len(found) != 1:
        state = "are all there; remove all but one" if found else "is missing; add it"
        folder.fail(" or ".join(found or candidates), state)
    return found[0]

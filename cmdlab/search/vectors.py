"""Many recordings and pictures to one npz file of vectors."""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from cmdlab.corpora import read_pairs_csv
from cmdlab.errors import InputError
from cmdlab.evaluation import write_npz
from cmdlab.search.retriever import Retriever


def encode_pairs(retriever: Retriever, pairs: Path, output: Path) -> None:
    """Embed all that a CSV file of pairs names, in the form that `cmdlab evaluate` takes.

    pairs: as for `cmdlab corpus import`, with the columns audio and image. Writes `speech` [N, D]
    with `speech_image_id` [N], an entry a line, and `image` [M, D] with `image_id` [M], an entry a
    picture; an id is a picture's path in the CSV file. Media are as `Retriever` takes them.
    Raises InputError, which names file and line, for the first pair that cannot be used.
    """
    table = read_pairs_csv(pairs)
    if table.problems:
        raise InputError(f"{pairs.parent}/{table.problems[0]}")
    if not table.pairs:
        raise InputError(f"{pairs}: holds no pairs; add a line for each recording")
    of = [os.path.normpath(pair.image) for pair in table.pairs]
    images = list(dict.fromkeys(of))
    sounds = [pairs.parent / pair.audio for pair in table.pairs]
    write_npz(
        output,
        {
            "speech": retriever.embed_recordings(sounds, progress=True),
            "image": retriever.embed_images([pairs.parent / one for one in images], progress=True),
            "speech_image_id": np.array(of),
            "image_id": np.array(images),
        },
    )


def encode_files(retriever: Retriever, files: Sequence[Path], output: Path) -> None:
    """Embed recordings and pictures of which nothing tells what belongs together.

    A file whose ending is one of Pillow's is a picture, any other a recording. Writes `speech`
    [N, D] with `speech_id` [N], and `image` [M, D] with `image_id` [M]; an id is a path as given.
    `cmdlab evaluate` does not take the file: without pairs there is nothing to measure.
    """
    endings = Image.registered_extensions()
    pictures = [file for file in files if file.suffix.lower() in endings]
    sounds = [file for file in files if file.suffix.lower() not in endings]
    write_npz(
        output,
        {
            "speech": retriever.embed_recordings(sounds, progress=bool(sounds)),
            "image": retriever.embed_images(pictures, progress=bool(pictures)),
            "speech_id": np.array([str(file) for file in sounds], np.str_),
            "image_id": np.array([str(file) for file in pictures], np.str_),
        },
    )

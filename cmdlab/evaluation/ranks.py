"""From embeddings to ranks, and from ranks to R@K, median rank and MRR, in both directions.

Speech→image: every caption is a query, and its one image is the answer. Image→speech: every image
is a query, and any of its captions is an answer; the rank is that of the best one, the others left
out by id. A rank is kept as two counts, `greater` and `equal`, so that ties are seen: the headline
counts every tie against the system (rank 1 + greater + equal), the optimistic figure counts every
tie for it (rank 1 + greater).
"""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cmdlab_kernels.retrieval_ranks import retrieval_ranks
from numpy.typing import ArrayLike
from torch import Tensor

from cmdlab.errors import InputError
from cmdlab.evaluation.npz import read_npz, write_npz

CUTOFFS = (1, 5, 10)


@dataclass(frozen=True, eq=False)
class RankTable:
    """Ranks of all queries of one gallery, as counts; N captions, M images, numpy int64.

    speech_greater [N]: images that score higher than the query's own image.
    speech_equal [N]: images other than its own that score the same.
    speech_image [N]: the place of the query's own image in the gallery, 0 to M - 1.
    image_greater [M]: captions of other images that score higher than the image's best caption.
    image_equal [M]: captions of other images that score the same as the image's best caption.

    Raises InputError for arrays that no gallery can have given.
    """

    speech_greater: np.ndarray
    speech_equal: np.ndarray
    speech_image: np.ndarray
    image_greater: np.ndarray
    image_equal: np.ndarray

    def __post_init__(self) -> None:
        captions, images = self.speech_image.size, self.image_greater.size
        for field in fields(self):
            array = getattr(self, field.name)
            length = captions if field.name.startswith("speech") else images
            if array.dtype != np.int64 or array.shape != (length,) or not length:
                raise InputError(
                    f"{field.name} is {array.dtype} {list(array.shape)}, not int64 [{length}], "
                    "at least one entry long; make the ranks again"
                )
            if array.min() < 0:
                raise InputError(f"{field.name} holds {array.min()}; make the ranks again")
        places = self.speech_image.clip(max=images)  # a place far outside would take much memory
        captions_of = np.bincount(places, minlength=images)  # [M], longer if any is outside
        if len(captions_of) != images or not captions_of.all():
            raise InputError(
                f"speech_image does not cover the {images} images; make the ranks again"
            )
        # Subtracted, since a sum of two could overflow.
        if (self.speech_greater >= images - self.speech_equal).any() or (
            self.image_greater > captions - captions_of - self.image_equal
        ).any():
            raise InputError("a count exceeds the size of its gallery; make the ranks again")

    def ranks(self, direction: str, *, optimistic: bool = False) -> np.ndarray:
        """1-based ranks, int64, [N] for "speech_to_image" and [M] for "image_to_speech"."""
        greater, equal = {
            "speech_to_image": (self.speech_greater, self.speech_equal),
            "image_to_speech": (self.image_greater, self.image_equal),
        }[direction]
        return 1 + greater + (0 if optimistic else equal)

    def save(self, path: Path) -> None:
        """Write an npz file, whole or not at all."""
        write_npz(path, {field.name: getattr(self, field.name) for field in fields(self)})

    @classmethod
    def load(cls, path: Path) -> "RankTable":
        """Read what `save` wrote, checked. Raises InputError that names the file."""
        arrays = read_npz(path, [field.name for field in fields(cls)])
        try:
            return cls(**arrays)
        except InputError as error:
            raise InputError(f"{path}: {error}") from error


def rank_table(
    speech: Tensor | np.ndarray,
    image: Tensor | np.ndarray,
    speech_image_id: ArrayLike | Tensor,
    image_id: ArrayLike | Tensor,
    *,
    impl: str = "auto",
) -> RankTable:
    """Rank every caption among the images and every image among the captions, by dot product.

    speech [N, D], image [M, D]: floating point, or integers, which become float64. Scale them to
    unit norm beforehand if cosines are wanted.
    speech_image_id [N], image_id [M]: integers or strings; each image once, with one
    caption or more.
    impl: as in `cmdlab_kernels.retrieval_ranks`.

    Raises InputError for empty or mis-shaped input, NaN, infinity, repeated or unmatched ids, and
    for what `retrieval_ranks` does not support.
    """
    speech, image = _embeddings("speech", speech), _embeddings("image", image)
    if speech.shape[1] != image.shape[1]:
        raise InputError(
            f"speech has {speech.shape[1]} dimensions and image {image.shape[1]}; "
            "both must lie in one space"
        )
    speech_image_id = _ids("speech_image_id", speech_image_id, len(speech), "speech")
    image_id = _ids("image_id", image_id, len(image), "image")
    speech_image = _gallery_places(speech_image_id, image_id)
    dtype = torch.promote_types(speech.dtype, image.dtype)
    try:
        counts = retrieval_ranks(
            speech.to(dtype),
            image.to(dtype),
            torch.from_numpy(speech_image).to(speech.device),
            torch.arange(len(image), device=image.device),
            impl=impl,
        )
    except ValueError as error:
        raise InputError(str(error)) from error
    return RankTable(
        speech_greater=counts.speech_greater.cpu().numpy(),
        speech_equal=counts.speech_equal.cpu().numpy(),
        speech_image=speech_image,
        image_greater=counts.image_greater.cpu().numpy(),
        image_equal=counts.image_equal.cpu().numpy(),
    )


def retrieval_metrics(table: RankTable) -> dict[str, Any]:
    """The object that `cmdlab evaluate` prints: plain JSON numbers.

    `speech_to_image` and `image_to_speech`, each with `R@1`, `R@5`, `R@10` (percent, pessimistic),
    `optimistic_R@1` (percent), `median_rank` and `MRR` (mean of 1 / rank, 0 to 1), pessimistic too,
    `queries`, `gallery`; and `mean_R@1`, the mean of the two R@1.
    """
    captions, images = len(table.speech_image), len(table.image_greater)
    metrics: dict[str, Any] = {
        "speech_to_image": _direction_metrics(table, "speech_to_image", gallery=images),
        "image_to_speech": _direction_metrics(table, "image_to_speech", gallery=captions),
    }
    both = (metrics["speech_to_image"]["R@1"], metrics["image_to_speech"]["R@1"])
    return metrics | {"mean_R@1": sum(both) / 2}


def evaluate_file(path: Path, *, impl: str = "auto") -> dict[str, Any]:
    """`retrieval_metrics` of the embeddings in an npz file, of any system.

    Keys: speech [N, D], image [M, D], speech_image_id [N], image_id [M], as in `rank_table`.
    Nothing is unpickled. Raises InputError that names the file and the entry.
    """
    arrays = read_npz(path, ["speech", "image", "speech_image_id", "image_id"])
    try:
        return retrieval_metrics(rank_table(**arrays, impl=impl))
    except InputError as error:
        raise InputError(f"{path}: {error}") from error


def _direction_metrics(table: RankTable, direction: str, *, gallery: int) -> dict[str, Any]:
    ranks = table.ranks(direction)
    best_ranks = table.ranks(direction, optimistic=True)
    return {
        **{f"R@{k}": 100 * float(np.mean(ranks <= k)) for k in CUTOFFS},
        "optimistic_R@1": 100 * float(np.mean(best_ranks <= 1)),
        "median_rank": float(np.median(ranks)),
        "MRR": float(np.mean(1 / ranks)),
        "queries": len(ranks),
        "gallery": gallery,
    }


def _embeddings(name: str, array: Tensor | np.ndarray) -> Tensor:
    """A finite floating-point tensor [rows, D], at least one by one."""
    if isinstance(array, np.ndarray):
        if array.dtype.kind not in "fiu" or array.dtype.itemsize > 8:
            raise InputError(f"{name} holds {array.dtype}; save it as float32")
        kept = array.dtype if array.dtype.kind == "f" else np.dtype(np.float64)
        array = torch.from_numpy(np.ascontiguousarray(array, kept.newbyteorder("=")))
    elif not array.is_floating_point():
        array = array.double()
    if array.ndim != 2 or 0 in array.shape:
        raise InputError(
            f"{name} has shape {list(array.shape)}; give one row an item, [items, dimensions], "
            "and at least one"
        )
    bad_rows = torch.nonzero(~torch.isfinite(array).all(1))
    if len(bad_rows):
        raise InputError(
            f"{name}: {len(bad_rows)} of {len(array)} rows hold NaN or infinity, "
            f"the first is row {int(bad_rows[0])}; repair the system that made them"
        )
    return array


def _ids(name: str, ids: ArrayLike | Tensor, length: int, partner: str) -> np.ndarray:
    """Ids as int64 or text, [length]."""
    array = ids.cpu().numpy() if isinstance(ids, Tensor) else np.asarray(ids)
    if array.dtype.kind not in "iuUS":
        raise InputError(f"{name} holds {array.dtype}; ids must be integers or strings")
    if array.shape != (length,):
        raise InputError(
            f"{name} has shape {list(array.shape)}, but {partner} has {length} rows; "
            f"give one id for each row of {partner}"
        )
    if array.dtype.kind != "u":
        return array.astype(np.int64) if array.dtype.kind == "i" else array
    if array.max() > np.iinfo(np.int64).max:
        raise InputError(f"{name} holds {array.max()}, which is too large for int64")
    return array.astype(np.int64)


def _gallery_places(speech_image_id: np.ndarray, image_id: np.ndarray) -> np.ndarray:
    """For each caption the place of its image in image_id, int64 [N]."""
    if speech_image_id.dtype.kind != image_id.dtype.kind:
        raise InputError(
            f"speech_image_id holds {speech_image_id.dtype} and image_id {image_id.dtype}; "
            "both must be integers, or both strings of one kind"
        )
    order = np.argsort(image_id, kind="stable")
    ordered = image_id[order]
    repeated = ordered[1:][ordered[1:] == ordered[:-1]]
    if len(repeated):
        raise InputError(f"image_id: {repeated[0]!s} occurs more than once; give each image once")
    places = np.minimum(np.searchsorted(ordered, speech_image_id), len(ordered) - 1)
    unmatched = speech_image_id[ordered[places] != speech_image_id]
    if len(unmatched):
        raise InputError(
            f"speech_image_id: {len(unmatched)} captions have no image, the first is of "
            f"{unmatched[0]!s}; add the image or leave the captions out"
        )
    speech_image = order[places].astype(np.int64)
    silent = image_id[np.bincount(speech_image, minlength=len(image_id)) == 0]
    if len(silent):
        raise InputError(
            f"image_id: {len(silent)} images have no caption, the first is {silent[0]!s}; "
            "leave them out or add their captions"
        )
    return speech_image

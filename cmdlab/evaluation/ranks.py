"""From embeddings to ranks, and from ranks to R@K, median rank and MRR, in both directions.

Speech→image: every caption is a query, and its image is the answer. Image→speech: every image is a
query, and any of its captions is an answer; the rank is that of the best one, the others left out
by id. An image may have several views, different embeddings under one id: each is a place of the
gallery and a query of its own, and a caption's rank is that of its image's best view, the other own
ones left out, while each view of another image counts.

A rank is kept as two counts, `greater` and `equal`, so that ties are seen: the headline counts
every tie against the system (rank 1 + greater + equal), the optimistic figure counts every tie for
it (rank 1 + greater).
"""

from __future__ import annotations

import hashlib
import sys
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike

from cmdlab.errors import InputError
from cmdlab.evaluation.npz import read_npz, write_npz

if TYPE_CHECKING:  # a report, which reads ranks and makes none, spares torch's two seconds
    from torch import Tensor

CUTOFFS = (1, 5, 10)


@dataclass(frozen=True, eq=False)
class RankTable:
    """Ranks of all queries of one gallery, as counts; N captions, V views of M images, numpy int64.

    speech_greater [N]: views of other images that score higher than the own image's best view.
    speech_equal [N]: views of other images that score the same.
    speech_image [N]: the query's own image, 0 to M - 1.
    image_greater [V]: captions of other images that score higher than the view's best caption.
    image_equal [V]: captions of other images that score the same as the view's best caption.
    image_of_view [V]: the image that each view shows, 0 to M - 1. With one view an image, as every
        run of this house has, it is 0 to M - 1 in order, and M is V.

    Raises InputError for arrays that no gallery can have given.
    """

    speech_greater: np.ndarray
    speech_equal: np.ndarray
    speech_image: np.ndarray
    image_greater: np.ndarray
    image_equal: np.ndarray
    image_of_view: np.ndarray

    def __post_init__(self) -> None:
        captions, views = self.speech_image.size, self.image_of_view.size
        for field in fields(self):
            array = getattr(self, field.name)
            length = captions if field.name.startswith("speech") else views
            if array.dtype != np.int64 or array.shape != (length,) or not length:
                raise InputError(
                    f"{field.name} is {array.dtype} {list(array.shape)}, not int64 [{length}], "
                    "at least one entry long; make the ranks again"
                )
            if array.min() < 0:
                raise InputError(f"{field.name} holds {array.min()}; make the ranks again")
        counted = []  # how many captions and views each image has
        for name in ("speech_image", "image_of_view"):
            places = getattr(self, name).clip(max=views)  # one far outside would take much memory
            counted.append(np.bincount(places, minlength=self.images))
            if len(counted[-1]) != self.images or not counted[-1].all():
                raise InputError(
                    f"{name} does not cover the {self.images} images; make the ranks again"
                )
        captions_of, views_of = counted
        # Subtracted, since a sum of two could overflow.
        other_views = views - views_of[self.speech_image]
        other_captions = captions - captions_of[self.image_of_view]
        if (self.speech_greater > other_views - self.speech_equal).any() or (
            self.image_greater > other_captions - self.image_equal
        ).any():
            raise InputError("a count exceeds the size of its gallery; make the ranks again")

    @property
    def images(self) -> int:
        return int(self.image_of_view.clip(max=len(self.image_of_view)).max()) + 1

    def ranks(self, direction: str, *, optimistic: bool = False) -> np.ndarray:
        """1-based ranks, int64, [N] for "speech_to_image" and [V] for "image_to_speech"."""
        greater, equal = {
            "speech_to_image": (self.speech_greater, self.speech_equal),
            "image_to_speech": (self.image_greater, self.image_equal),
        }[direction]
        return 1 + greater + (0 if optimistic else equal)

    def save(self, path: Path) -> None:
        """Write an npz file, whole or not at all."""
        write_npz(path, {field.name: getattr(self, field.name) for field in fields(self)})

    @classmethod
    def load(cls, path: Path) -> RankTable:
        """Read what `save` wrote, checked. Raises InputError that names the file.

        Files written before images could have views have no `image_of_view`.
        """
        names = [field.name for field in fields(cls) if field.name != "image_of_view"]
        arrays = read_npz(path, names, optional=["image_of_view"])
        arrays.setdefault("image_of_view", np.arange(arrays["image_greater"].size))
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

    speech [N, D], image [rows, D]: floating point, or integers, which become float64. Scale them to
    unit norm beforehand if cosines are wanted.
    speech_image_id [N], image_id [rows]: integers or strings; each image with one caption or more.
    Rows of one image that are equal are counted once; those that differ are views of it, see the
    docstring of this module.
    impl: as in `cmdlab_kernels.retrieval_ranks`.

    Raises InputError for empty or mis-shaped input, NaN, infinity, unmatched ids, and
    for what `retrieval_ranks` does not support.
    """
    import torch
    from cmdlab_kernels.retrieval_ranks import retrieval_ranks

    speech, image = _embeddings("speech", speech), _embeddings("image", image)
    if speech.shape[1] != image.shape[1]:
        raise InputError(
            f"speech has {speech.shape[1]} dimensions and image {image.shape[1]}; "
            "both must lie in one space"
        )
    speech_image_id = _ids("speech_image_id", speech_image_id, len(speech), "speech")
    image_id = _ids("image_id", image_id, len(image), "image")
    speech_image, image_of_row = _gallery_places(speech_image_id, image_id)
    rows = _different_rows(image, image_of_row)
    image, image_of_view = image[rows], image_of_row[rows]
    dtype = torch.promote_types(speech.dtype, image.dtype)
    try:
        counts = retrieval_ranks(
            speech.to(dtype),
            image.to(dtype),
            torch.from_numpy(speech_image).to(speech.device),
            torch.from_numpy(image_of_view).to(image.device),
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
        image_of_view=image_of_view,
    )


def ranks_of_scores(
    speech_to_image: Tensor, image_to_speech: Tensor, speech_image: Tensor
) -> RankTable:
    """Rank by scores of any kind, for a system whose order is not that of dot products.

    speech_to_image, image_to_speech: [N, M] floating point on the CPU, each pair's score where the
    caption and where the image is the query; one tensor twice where it is the same.
    speech_image: int64 [N], the column of each caption's image; each image with one or more.
    Raises InputError for NaN or infinity, and for an image without a caption.
    """
    import torch

    for name, scores in (("speech", speech_to_image), ("image", image_to_speech)):
        if not torch.isfinite(scores).all():
            raise InputError(f"scores of {name} queries hold NaN or infinity; repair the system")
    own = speech_image[:, None] == torch.arange(speech_to_image.shape[1])
    best = speech_to_image.gather(1, speech_image[:, None])  # [N, 1]
    others = speech_to_image.masked_fill(own, -torch.inf)
    best_caption = image_to_speech.masked_fill(~own, -torch.inf).amax(0)  # [M]
    other_captions = image_to_speech.masked_fill(own, -torch.inf)
    return RankTable(
        speech_greater=(others > best).sum(1).numpy(),
        speech_equal=(others == best).sum(1).numpy(),
        speech_image=speech_image.numpy(),
        image_greater=(other_captions > best_caption).sum(0).numpy(),
        image_equal=(other_captions == best_caption).sum(0).numpy(),
        image_of_view=np.arange(own.shape[1]),
    )


def retrieval_metrics(table: RankTable) -> dict[str, Any]:
    """The object that `cmdlab evaluate` prints: plain JSON numbers.

    `speech_to_image` and `image_to_speech`, each with `R@1`, `R@5`, `R@10` (percent, pessimistic),
    `optimistic_R@1` (percent), `median_rank` and `MRR` (mean of 1 / rank, 0 to 1), pessimistic too,
    `queries`, `gallery`; and `mean_R@1`, the mean of the two R@1. Captions and views are counted:
    speech_to_image has N queries in a gallery of V, image_to_speech V queries in a gallery of N.
    """
    captions, views = len(table.speech_image), len(table.image_of_view)
    metrics: dict[str, Any] = {
        "speech_to_image": _direction_metrics(table, "speech_to_image", gallery=views),
        "image_to_speech": _direction_metrics(table, "image_to_speech", gallery=captions),
    }
    both = (metrics["speech_to_image"]["R@1"], metrics["image_to_speech"]["R@1"])
    return metrics | {"mean_R@1": sum(both) / 2}


def evaluate_file(path: Path, *, impl: str = "auto") -> dict[str, Any]:
    """`retrieval_metrics` of the embeddings in an npz file, of any system.

    Keys: speech [N, D], image [rows, D], speech_image_id [N], image_id [rows], as in `rank_table`.
    Nothing is unpickled. What is made of rows of one image is told on standard error.
    Raises InputError that names the file and the entry.
    """
    arrays = read_npz(path, ["speech", "image", "speech_image_id", "image_id"])
    try:
        table = rank_table(**arrays, impl=impl)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    rows, views, images = len(arrays["image"]), len(table.image_of_view), table.images
    if views < rows:
        print(
            f"{path}: image: {rows - views} of {rows} rows repeat a row of the same image; "
            "each different row is counted once",
            file=sys.stderr,
        )
    if images < views:
        print(
            f"{path}: image: {views} different rows show {images} images; each is a view, with a "
            "place in the gallery and a query of its own; give one row an image if none is meant",
            file=sys.stderr,
        )
    return retrieval_metrics(table)


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
    import torch

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
    array = ids.cpu().numpy() if hasattr(ids, "cpu") else np.asarray(ids)
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


def _gallery_places(
    speech_image_id: np.ndarray, image_id: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The image of each caption and of each row, int64 [N] and [rows]; images are numbered from 0
    in the order of their first rows."""
    if speech_image_id.dtype.kind != image_id.dtype.kind:
        raise InputError(
            f"speech_image_id holds {speech_image_id.dtype} and image_id {image_id.dtype}; "
            "both must be integers, or both strings of one kind"
        )
    ordered, first_row, image_of_row = np.unique(image_id, return_index=True, return_inverse=True)
    number = np.argsort(np.argsort(first_row))  # of each id in `ordered`
    places = np.minimum(np.searchsorted(ordered, speech_image_id), len(ordered) - 1)
    unmatched = speech_image_id[ordered[places] != speech_image_id]
    if len(unmatched):
        raise InputError(
            f"speech_image_id: {len(unmatched)} captions have no image, the first is of "
            f"{unmatched[0]!s}; add the image or leave the captions out"
        )
    silent = ordered[np.bincount(places, minlength=len(ordered)) == 0]
    if len(silent):
        raise InputError(
            f"image_id: {len(silent)} images have no caption, the first is {silent[0]!s}; "
            "leave them out or add their captions"
        )
    return number[places], number[image_of_row]


def _different_rows(image: Tensor, image_of_row: np.ndarray) -> np.ndarray:
    """The first of those rows of an image that are equal, int64 [V]."""
    if image_of_row.max() + 1 == len(image_of_row):
        return np.arange(len(image_of_row))
    first: dict[tuple[int, bytes], int] = {}
    exact = image.double().cpu().numpy() + 0.0  # -0.0 becomes 0.0, which scores the same
    for row, place in enumerate(image_of_row.tolist()):
        first.setdefault((place, hashlib.sha256(exact[row]).digest()), row)
    return np.fromiter(first.values(), np.int64)

"""Exact retrieval ranks in both directions, without the matrix of all scores.

The public function, its plain torch reference and the registration of both with torch.library. The
score that defines a rank is in `retrieval_scores.py`, the fast paths are in
`retrieval_ranks_cpu.py` and `retrieval_ranks_triton.py`.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from cmdlab_kernels import retrieval_float32_cpu, retrieval_ranks_cpu
from cmdlab_kernels.retrieval_scores import (
    PATHS,
    Counts,
    largest_entry,
    pair_scores,
    positive_pairs,
    tile_scores,
    tiles,
)

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

IMPLEMENTATIONS = ("auto", "reference", "cpu", "triton")
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
CAPTIONS_AT_ONCE = 2**14  # each may have many positives


@dataclass(frozen=True)
class RetrievalRanks:
    """How many wrong answers score above, or the same as, the best right one.

    A query's pessimistic rank is ``1 + greater + equal``, its optimistic rank ``1 + greater``.

    Attributes:
        speech_greater: int64 [N], images of other ids that score above caption i's best image.
        speech_equal: int64 [N], images of other ids with exactly its score.
        image_greater: int64 [M], captions of other ids that score above image j's best caption.
        image_equal: int64 [M], captions of other ids with exactly its score.
        arithmetic: int64 [N], index in `PATHS` of the arithmetic that caption i took.
    """

    speech_greater: Tensor
    speech_equal: Tensor
    image_greater: Tensor
    image_equal: Tensor
    arithmetic: Tensor

    @property
    def path(self) -> str:
        """The most exact arithmetic that any caption took: "cpu-bf16", "exact" or the like."""
        return PATHS[int(self.arithmetic.max())]

    @property
    def shares(self) -> dict[str, float]:
        """The share of the captions that took each arithmetic, fastest first."""
        counts = torch.bincount(self.arithmetic.cpu(), minlength=len(PATHS)).tolist()
        return {path: c / sum(counts) for path, c in zip(PATHS, counts, strict=True) if c}


def retrieval_ranks(
    speech: Tensor,
    image: Tensor,
    speech_image_id: Tensor,
    image_id: Tensor,
    *,
    impl: str = "auto",
    group: ProcessGroup | None = None,
) -> RetrievalRanks:
    """Rank every image for every caption, and every caption for every image.

    The score of a pair is the float64 dot product of the two rows, its products added in the order
    of the dimensions. It depends on the two rows alone, so every `impl` gives the same counts, for
    any tile size and any order of the gallery. Positives (pairs of equal id, any number a row) are
    left out by id, and a row's threshold is the score of its best one; every positive is scored
    by itself, so where ids are few and positives many they take most of the time. Counting has no
    derivative: the result does not require grad.

    Args:
        speech: [N, D] float16, bfloat16, float32 or float64, one row a caption.
        image: [M, D], same dtype and device, one row an image.
        speech_image_id: [N] int64, the id of each caption's image.
        image_id: [M] int64, equal for several views of one image.
        impl: "reference" (plain torch, any device), "cpu" (certified low-precision products),
            "triton" (the same on CUDA), or "auto": "triton" on CUDA, "cpu" on a CPU, and
            "reference" elsewhere and for float64 on CUDA.
        group: a torch.distributed group over whose ranks the gallery is split. Each rank passes
            all captions and its own images, perhaps none; it gets the speech counts over the whole
            gallery and the image counts of its own images. An error on one rank raises on all.

    Raises:
        ValueError: for a shape, dtype, device or `impl` that is not supported, scores that are not
            finite in float64, an image without a caption, or a caption without an image.
    """
    kind = speech.device.type
    if torch.is_autocast_enabled(kind):
        with torch.autocast(kind, enabled=False):
            return retrieval_ranks(speech, image, speech_image_id, image_id, impl=impl, group=group)
    speech, image = speech.detach(), image.detach()
    if group is not None:
        return _sharded_ranks(speech, image, speech_image_id, image_id, impl, group)
    _check(speech, image, speech_image_id, image_id, impl, empty_shard=False)
    # The operator costs as much as the ranks of a small gallery.
    ranks = ranks_operator if torch.compiler.is_compiling() else ranks_of_all
    return RetrievalRanks(*ranks(speech, image, speech_image_id, image_id, _chosen(impl, speech)))


def _sharded_ranks(
    speech: Tensor,
    image: Tensor,
    speech_image_id: Tensor,
    image_id: Tensor,
    impl: str,
    group: ProcessGroup,
) -> RetrievalRanks:
    ids = speech_image_id, image_id

    def thresholds() -> tuple[Tensor, Tensor]:
        _check(speech, image, *ids, impl, empty_shard=True)
        return best_scores(speech, image, *ids, _chosen(impl, speech), whole_gallery=False)

    speech_threshold, image_threshold = _on_all_ranks(group, speech, speech_image_id, thresholds)
    torch.distributed.all_reduce(speech_threshold, torch.distributed.ReduceOp.MAX, group)
    if bool(speech_threshold.isneginf().any()):
        raise ValueError("speech_image_id holds an id that is on no rank of the group")

    def count() -> tuple[Tensor, ...]:
        thresholds = speech_threshold, image_threshold
        return count_at(speech, image, *ids, *thresholds, _chosen(impl, speech))

    *counts, arithmetic = _on_all_ranks(group, speech, speech_image_id, count)
    summed = torch.stack(counts[:2])
    torch.distributed.all_reduce(summed, torch.distributed.ReduceOp.SUM, group)
    return RetrievalRanks(summed[0], summed[1], counts[2], counts[3], arithmetic)


def _chosen(impl: str, speech: Tensor) -> str:
    if impl != "auto":
        return impl
    if speech.is_cuda and speech.dtype != torch.float64:
        return "triton"
    return "cpu" if speech.device.type == "cpu" else "reference"


def _on_all_ranks(
    group: ProcessGroup, speech: Tensor, speech_image_id: Tensor, function: Callable[[], Any]
) -> Any:
    """What `function` returns; where it raises on one rank of the group, all ranks raise.

    Otherwise the others would wait for that rank for ever.
    """
    result, error = None, None
    try:
        result = function()
    except Exception as raised:
        error = raised
    same = torch.zeros(4, dtype=torch.int64, device=speech.device)  # what all ranks must agree on
    if error is None:
        same[:3] = same.new_tensor([*speech.shape, DTYPES.index(speech.dtype)])
        place = torch.arange(1, len(speech) + 1, device=speech.device)
        same[3] = (
            speech_image_id * place
        ).sum() >> 1  # a checksum, and its negative is no overflow
    flags = torch.cat([same.new_tensor([error is not None]), same, -same])
    torch.distributed.all_reduce(flags, torch.distributed.ReduceOp.MAX, group)
    if error is not None:
        raise error
    if bool(flags[0]):
        raise ValueError("another rank of the group failed, its own error says why")
    if bool((flags[1:5] != -flags[5:]).any()):
        raise ValueError("the ranks of the group must all pass the same captions")
    return result


def _check(
    speech: Tensor,
    image: Tensor,
    speech_image_id: Tensor,
    image_id: Tensor,
    impl: str,
    *,
    empty_shard: bool,
) -> None:
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"impl is {impl!r}, supported are {', '.join(IMPLEMENTATIONS)}")
    if speech.ndim != 2 or image.ndim != 2 or speech.shape[1] != image.shape[1]:
        raise ValueError(
            f"speech [N, D] and image [M, D] expected, got {list(speech.shape)} and "
            f"{list(image.shape)}"
        )
    if 0 in speech.shape or (len(image) == 0 and not empty_shard):
        raise ValueError("speech and image must not be empty")
    if speech_image_id.shape != speech.shape[:1] or image_id.shape != image.shape[:1]:
        raise ValueError("speech_image_id [N] and image_id [M] must match speech and image")
    if speech_image_id.dtype != torch.int64 or image_id.dtype != torch.int64:
        raise ValueError("speech_image_id and image_id must be int64")
    if speech.dtype not in DTYPES or image.dtype != speech.dtype:
        raise ValueError(
            "speech and image must have one dtype of float16, bfloat16, float32, float64, got "
            f"{speech.dtype} and {image.dtype}"
        )
    devices = {speech.device, image.device, speech_image_id.device, image_id.device}
    if len(devices) > 1:
        raise ValueError(f"all tensors must be on one device, got {sorted(map(str, devices))}")
    if impl == "cpu" and speech.device.type != "cpu":
        raise ValueError(f'impl="cpu" supports CPU tensors, got {speech.device}')
    if impl == "triton":
        if not (speech.is_cuda or os.environ.get("TRITON_INTERPRET") == "1"):
            raise ValueError(f'impl="triton" supports CUDA tensors, got {speech.device}')
        if speech.dtype == torch.float64:
            raise ValueError('impl="triton" supports float16, bfloat16 and float32, got float64')


def ranks_of_all(
    speech: Tensor, image: Tensor, speech_image_id: Tensor, image_id: Tensor, impl: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The tensors of RetrievalRanks, for a gallery that is not split."""
    ids = speech_image_id, image_id
    if impl == "cpu":
        counts = retrieval_float32_cpu.count_small(speech, image, *ids)
        if counts is not None:
            return counts.tensors()
    thresholds = best_scores(speech, image, *ids, impl, whole_gallery=True)
    return count_at(speech, image, *ids, *thresholds, impl)


@torch.library.custom_op("cmdlab_kernels::retrieval_ranks", mutates_args=())
def ranks_operator(
    speech: Tensor, image: Tensor, speech_image_id: Tensor, image_id: Tensor, impl: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`ranks_of_all`, of whose outputs no two may share memory."""
    found = ranks_of_all(speech, image, speech_image_id, image_id, impl)
    speech_greater, speech_equal, image_greater, image_equal, arithmetic = map(torch.clone, found)
    return speech_greater, speech_equal, image_greater, image_equal, arithmetic


@ranks_operator.register_fake
def _(speech, image, speech_image_id, image_id, impl):
    empty = torch.empty_like
    return (
        *(empty(speech_image_id), empty(speech_image_id)),
        *(empty(image_id), empty(image_id), empty(speech_image_id)),
    )


def best_scores(
    speech: Tensor,
    image: Tensor,
    speech_image_id: Tensor,
    image_id: Tensor,
    impl: str,
    *,
    whole_gallery: bool,
) -> tuple[Tensor, Tensor]:
    """The best positive's score float64 of each caption [N] and of each image [M].

    It is -inf for a caption whose image this shard of the gallery lacks.
    """
    largest = largest_entry(speech) * largest_entry(image) * speech.shape[1]
    if not bool(largest.isfinite()):  # NaN and infinite entries also end here
        raise ValueError("speech and image must be finite, and so must their dot products")
    scores_of = pair_scores
    if impl == "triton":
        from cmdlab_kernels import retrieval_ranks_triton  # Triton is installed on Linux only

        scores_of = retrieval_ranks_triton.pair_scores
    best = torch.full_like(speech_image_id, -torch.inf, dtype=torch.float64)
    best_of_image = torch.full_like(image_id, -torch.inf, dtype=torch.float64)
    sorted_image_id = image_id.sort()
    for first in range(0, len(speech), CAPTIONS_AT_ONCE):
        rows = slice(first, first + CAPTIONS_AT_ONCE)
        row, column = positive_pairs(speech_image_id[rows], sorted_image_id)
        scores = scores_of(speech[rows], image, row, column)
        best[rows].scatter_reduce_(0, row, scores, "amax")
        best_of_image.scatter_reduce_(0, column, scores, "amax")
    alone = torch.cat([best.isneginf() & whole_gallery, best_of_image.isneginf()]).nonzero()
    if len(alone) > 0:
        index, n = int(alone[0]), len(speech)
        if index < n:
            raise ValueError(f"speech_image_id {int(speech_image_id[index])} is not in image_id")
        raise ValueError(f"image_id {int(image_id[index - n])} has no caption")
    return best, best_of_image


def count_at(
    speech: Tensor,
    image: Tensor,
    speech_image_id: Tensor,
    image_id: Tensor,
    speech_threshold: Tensor,
    image_threshold: Tensor,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Count the pairs above and at the thresholds: the tensors of RetrievalRanks."""
    if impl == "reference" or len(image) == 0:
        count = count_reference
    elif impl == "triton":
        from cmdlab_kernels import retrieval_ranks_triton  # Triton is installed on Linux only

        count = retrieval_ranks_triton.count_certified
    else:
        count = retrieval_ranks_cpu.count_certified
    ids, thresholds = (speech_image_id, image_id), (speech_threshold, image_threshold)
    return count(speech, image, *ids, *thresholds).tensors()


def count_reference(
    speech: Tensor,
    image: Tensor,
    speech_image_id: Tensor,
    image_id: Tensor,
    speech_threshold: Tensor,
    image_threshold: Tensor,
) -> Counts:
    """Every pair's defined score, one tile after the other."""
    counts = Counts.zeros(speech, image, "reference")
    for tile in tiles(len(speech), len(image)):
        scores = tile_scores(speech[tile.rows], image[tile.columns])
        counts.add_tile(tile, scores, speech_image_id, image_id, speech_threshold, image_threshold)
    return counts

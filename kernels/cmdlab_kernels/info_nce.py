"""Symmetric InfoNCE between paired speech and image embeddings, aware of repeated images."""

import os
from typing import Literal

import torch
from torch import Tensor

from cmdlab_kernels.info_nce_cpu import InfoNCE, info_nce_cpu_fwd

Implementation = Literal["auto", "reference", "cpu", "triton"]
TRITON_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def info_nce(
    speech: Tensor,
    image: Tensor,
    image_id: Tensor,
    scale: Tensor | float,
    *,
    impl: Implementation = "auto",
) -> Tensor:
    """Return the symmetric InfoNCE loss of N pairs, a 0-d tensor.

    Row i of `speech` and row i of `image` are a pair. An image that occurs in several rows
    repeats its id, and those rows are left out of each other's denominators, so two captions
    of one image are never each other's negatives. With S = scale · speech imageᵀ and
    A_i = {j : j = i or image_id_j ≠ image_id_i},

        loss = ½ mean_i [ln Σ_{j∈A_i} exp S_ij − S_ii] + ½ mean_i [ln Σ_{j∈A_i} exp S_ji − S_ii],

    the loss of CLIP (Radford et al. 2021, figure 3) with masked denominators.

    Args:
        speech: [N, D] float, unit-norm rows.
        image: [N, D], same dtype and device, unit-norm rows.
        image_id: [N] int64, the image of each pair.
        scale: 1 / temperature, positive; a number, or a 0-d float tensor.
        impl: "reference" runs anywhere and holds the N × N scores. "cpu" (CPU only) holds them
            too and takes one exponential of them. "triton" needs CUDA, float32, float16 or
            bfloat16, and holds no N × N matrix. "auto" takes "triton" on CUDA where the dtype
            allows it, "cpu" on a CPU, else "reference".

    Gradients flow to `speech`, `image` and `scale`; those of "cpu" and "triton" have no further
    derivative. The loss is float64 for float64 embeddings, else float32, and so is what "cpu" and
    "triton" compute with; neither autocast nor torch's default dtype changes that.

    Raises:
        ValueError: a shape, dtype or device that does not fit, or an `impl` that cannot run.
    """
    if impl not in ("auto", "reference", "cpu", "triton"):
        raise ValueError(f"impl must be 'auto', 'reference', 'cpu' or 'triton', not {impl!r}")
    if speech.ndim != 2 or speech.shape != image.shape or speech.shape[0] == 0:
        raise ValueError(
            "speech and image must both be [N, D] with N >= 1, "
            f"not {list(speech.shape)} and {list(image.shape)}"
        )
    if not speech.is_floating_point() or speech.dtype != image.dtype:
        raise ValueError(
            f"speech and image must share a float dtype, not {speech.dtype} and {image.dtype}"
        )
    if image_id.shape != speech.shape[:1] or image_id.dtype != torch.int64:
        raise ValueError(
            f"image_id must be int64 [{speech.shape[0]}], "
            f"not {image_id.dtype} {list(image_id.shape)}"
        )
    if not isinstance(scale, Tensor):
        wide = torch.promote_types(speech.dtype, torch.float32)
        scale = torch.tensor(scale, dtype=wide, device=speech.device)
    if scale.ndim != 0 or not scale.is_floating_point():
        raise ValueError(f"scale must be a 0-d float tensor, not {scale.dtype} {scale.ndim}-d")
    if not speech.device == image.device == image_id.device == scale.device:
        raise ValueError("speech, image, image_id and scale must be on one device")
    runs = speech.dtype in TRITON_DTYPES and (speech.is_cuda or interpreted())
    if impl == "triton" and not runs:
        raise ValueError(
            'impl="triton" supports float32, float16 and bfloat16 on CUDA, '
            f"not {speech.dtype} on {speech.device.type}"
        )
    if impl == "cpu" and speech.device.type != "cpu":
        raise ValueError(f'impl="cpu" supports CPU tensors, not {speech.device.type}')
    with torch.autocast(speech.device.type, enabled=False):
        if impl == "triton" or (impl == "auto" and speech.is_cuda and runs):
            from cmdlab_kernels.info_nce_triton import info_nce_fwd

            return info_nce_fwd(speech, image, image_id, scale)[0]
        if impl == "reference" or speech.device.type != "cpu":
            return info_nce_reference(speech, image, image_id, scale)
        if torch.compiler.is_compiling():
            return info_nce_cpu_fwd(speech, image, image_id, scale)[0]
        return InfoNCE.apply(speech, image, image_id, scale)


def interpreted() -> bool:
    """Whether Triton kernels run in Triton's interpreter, which takes CPU tensors."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def info_nce_reference(speech: Tensor, image: Tensor, image_id: Tensor, scale: Tensor) -> Tensor:
    """Compute `info_nce` in plain torch, with the N × N scores in memory."""
    scores = speech @ image.T  # [N, N]
    scores = scale * scores.to(torch.promote_types(scores.dtype, torch.float32))
    masked = image_id[:, None] == image_id[None, :]
    masked.fill_diagonal_(False)
    negatives = scores.masked_fill(masked, -torch.inf)
    normaliser = (negatives.logsumexp(1) + negatives.logsumexp(0)) / 2
    return (normaliser - scores.diagonal()).mean()

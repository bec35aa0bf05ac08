"""InfoNCE on a CPU: one exponential serves rows, columns and, kept, the gradients of both.

The reference takes an exponential of all N × N scores for the rows and another for the columns, and
autograd takes both again. Here the terms exp(score − shift) are summed along rows and along
columns; divided by these sums they are the softmaxes of which the gradients are made.
"""

import torch
from torch import Tensor

LARGEST = 60.0  # of a shifted score: e^60 summed over 2^40 terms is finite in float32
TRUSTED = 2.0**-80  # of a pair's own term: beside a smaller one, terms may be lost to underflow


class InfoNCE(torch.autograd.Function):
    """The loss (0-d) and its first derivatives, of `info_nce`'s arguments.

    `info_nce_cpu_fwd` is the same for torch.compile. Called by itself, an operator of torch.library
    costs as much as the products of 128 pairs.
    """

    @staticmethod
    def forward(ctx, speech, image, image_id, scale):
        loss, *kept = loss_and_terms(speech, image, image_id, scale)
        ctx.save_for_backward(speech, image, scale, *kept)
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        d_speech, d_image, d_scale = gradients(grad, *ctx.saved_tensors)
        return d_speech, d_image, None, d_scale


def loss_and_terms(
    speech: Tensor, image: Tensor, image_id: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the loss (0-d), the terms [N, N], and their sums by row and by column, [N].

    float64 for float64 embeddings, else float32.
    """
    speech, image = scaled(speech, scale), wide(image)
    with torch.autocast(speech.device.type, enabled=False):
        scores = speech @ image.T
        masked = repeats(image_id)
        if masked is not None:
            scores.masked_fill_(masked, -torch.inf)
        # No score is larger than the product of the longest rows' norms.
        shift = float(longest(speech) * longest(image)) - LARGEST
        terms = (scores - shift).exp_() if shift > 0 else scores.exp()
        row_sum, column_sum, own = terms.sum(1), terms.sum(0), terms.diagonal()
        if float(own.min()) >= TRUSTED:  # and so are the sums, of which it is a part; not for NaN
            # Less the logarithm of the own term as it was added: without negatives exactly 0.
            losses = (row_sum.log() + column_sum.log()) / 2 - own.log()
        else:
            by_row, by_column = scores.logsumexp(1), scores.logsumexp(0)
            losses = (by_row + by_column) / 2 - scores.diagonal()
            terms = (scores - by_row[:, None]).exp_() + (scores - by_column).exp_()
            row_sum, column_sum = torch.full_like(by_row, 2.0), torch.full_like(by_row, 2.0)
        return losses.mean(), terms, row_sum, column_sum


def gradients(
    grad: Tensor,
    speech: Tensor,
    image: Tensor,
    scale: Tensor,
    terms: Tensor,
    row_sum: Tensor,
    column_sum: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of speech, image [N, D] and scale (0-d), for the loss's gradient."""
    factor = grad / (2 * len(speech))
    with torch.autocast(speech.device.type, enabled=False):
        # The gradient of the scores: the softmax by row, plus that by column, less 2 I.
        weights = (factor / row_sum)[:, None] + factor / column_sum
        weights *= terms
        weights.diagonal().sub_(2 * factor)
        by_speech = weights @ wide(image)
        d_image = weights.T @ scaled(speech, scale)
        d_scale = (by_speech * speech).sum()
        d_speech = by_speech * scale
    return d_speech.to(speech.dtype), d_image.to(image.dtype), d_scale.to(scale.dtype)


def wide(embedding: Tensor) -> Tensor:
    return embedding.to(torch.promote_types(embedding.dtype, torch.float32))


def scaled(speech: Tensor, scale: Tensor) -> Tensor:
    return wide(speech) * scale  # a 0-d scale of another float dtype leaves the rows' dtype


def longest(rows: Tensor) -> Tensor:
    return torch.linalg.vector_norm(rows, dim=1).max()


def repeats(image_id: Tensor) -> Tensor | None:
    """Return the pairs of rows of one image, bool [N, N], or None where each has its own."""
    ordered = image_id.sort().values
    if not bool((ordered[1:] == ordered[:-1]).any()):
        return None
    return (image_id[:, None] == image_id).fill_diagonal_(False)


info_nce_cpu_fwd = torch.library.custom_op(
    "cmdlab_kernels::info_nce_cpu_fwd", loss_and_terms, mutates_args=()
)
info_nce_cpu_bwd = torch.library.custom_op(
    "cmdlab_kernels::info_nce_cpu_bwd", gradients, mutates_args=()
)


@info_nce_cpu_fwd.register_fake
def _(speech, image, image_id, scale):
    n, wide_row = len(image_id), wide(speech)[:, :1]
    return (
        wide_row.new_empty(()),
        wide_row.new_empty(n, n),
        wide_row.new_empty(n),
        wide_row.new_empty(n),
    )


@info_nce_cpu_bwd.register_fake
def _(grad, speech, image, scale, terms, row_sum, column_sum):
    contiguous = torch.contiguous_format
    return (
        torch.empty_like(speech, memory_format=contiguous),
        torch.empty_like(image, memory_format=contiguous),
        torch.empty_like(scale),
    )


def save_for_backward(ctx, inputs, output):
    speech, image, _, scale = inputs
    ctx.save_for_backward(speech, image, scale, *output[1:])


def backward(ctx, grad, *_):
    d_speech, d_image, d_scale = info_nce_cpu_bwd(grad, *ctx.saved_tensors)
    return d_speech, d_image, None, d_scale


info_nce_cpu_fwd.register_autograd(backward, setup_context=save_for_backward)

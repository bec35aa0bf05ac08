"""DenseAV's similarity (Hamilton et al. 2024), as an arm: every frame looks for its best patch.

The similarity of a caption and an image is the mean, over the caption's frames, of the highest dot
product with any of the image's patches. Nothing is pooled before, so at retrieval every frame of
the query meets every patch of the gallery. Ours are the sizes, that there is one head of
similarity, and that the vectors are normalised, as FILIP's are (Yao et al. 2022): without it, as
DenseAV has it, much less was learnt in as many steps.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from cmdlab.encoders import Features
from cmdlab.evaluation import RankTable, ranks_of_scores
from cmdlab.retrieval.losses import Batch, Losses
from cmdlab.retrieval.model import RetrievalModel, Shape
from cmdlab.retrieval.tokens import caption_tokens, image_tokens

PRODUCTS = 2**22  # dot products that are held at a time


class Dense(nn.Module):
    """Projects frames and patches into one space and compares them there.

    The space has a quarter of the dimensions of the shared one, since it is met frames × patches
    times as often. The model's own pooling and projection have no part in this arm.
    """

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        width = max(1, shape.embedding // 4)
        self.frame = nn.Linear(shape.speech_width, width)
        self.patch = nn.Linear(shape.image_width, width)

    def losses(self, model: RetrievalModel, batch: Batch, generator: torch.Generator) -> Losses:
        """Symmetric InfoNCE of the dense similarities; captions of one image are no negatives."""
        tokens, _ = model.speech_head(batch.states, batch.lengths)
        patches, _ = model.image_head(batch.patches, batch.embedding)
        frames = self._hear(_valid(tokens, batch.lengths))
        scores = dense_similarity(frames, batch.lengths, self._see(patches))
        loss = info_nce_of_scores(model.scale * scores, batch.image_id)
        return Losses(loss, loss, None)

    @torch.inference_mode()
    def rank(self, model: RetrievalModel, features: Features, device: str) -> RankTable:
        """The ranks of a whole split by dense similarity."""
        patches = self._gallery(model, features, device)
        captions = range(len(features.speech))
        scores = [
            dense_similarity(self._hear(_valid(tokens, lengths)), lengths, patches).cpu()
            for tokens, lengths, _ in caption_tokens(model, features, captions, device)
        ]
        whole = torch.cat(scores)
        return ranks_of_scores(whole, whole, features.image_index)

    @torch.no_grad()
    def searcher(
        self, model: RetrievalModel, features: Features, captions: Sequence[int]
    ) -> Callable[[int], Tensor]:
        """A function that scores all images [M] for the i-th of the captions, on the CPU."""
        patches = self._gallery(model, features, "cpu")
        spoken = [
            self._hear(tokens[i, :length])
            for tokens, lengths, _ in caption_tokens(model, features, captions, "cpu")
            for i, length in enumerate(lengths.tolist())
        ]
        lengths = [torch.tensor([len(frames)]) for frames in spoken]

        @torch.no_grad()
        def search(i: int) -> Tensor:
            return dense_similarity(spoken[i], lengths[i], patches)[0]

        return search

    def _hear(self, frames: Tensor) -> Tensor:
        return nn.functional.normalize(self.frame(frames), dim=-1)

    def _see(self, patches: Tensor) -> Tensor:
        return nn.functional.normalize(self.patch(patches), dim=-1)

    def _gallery(self, model: RetrievalModel, features: Features, device: str) -> Tensor:
        return torch.cat([self._see(tokens) for tokens, _ in image_tokens(model, features, device)])


def dense_similarity(frames: Tensor, lengths: Tensor, patches: Tensor) -> Tensor:
    """The mean over a caption's frames of the highest dot product with a patch, [N, M].

    frames: [all frames, D], caption after caption; lengths: int64 [N], at least 1, the frames of
    each; patches: [M, P, D], same dtype and device. Of patches that are equally high the gradient
    goes to one.
    """
    best = _BestPatch.apply(frames, patches)  # [all frames, M]
    caption = torch.arange(len(lengths), device=lengths.device).repeat_interleave(lengths)
    total = best.new_zeros(len(lengths), len(patches)).index_add(0, caption, best)
    return total / lengths[:, None]


def info_nce_of_scores(scores: Tensor, image_id: Tensor) -> Tensor:
    """The loss of `cmdlab_kernels.info_nce`, of scores [N, N] that are no dot products."""
    masked = (image_id[:, None] == image_id).fill_diagonal_(False)
    negatives = scores.masked_fill(masked, -torch.inf)
    normaliser = (negatives.logsumexp(1) + negatives.logsumexp(0)) / 2
    return (normaliser - scores.diagonal()).mean()


class _BestPatch(torch.autograd.Function):
    """frames [F, D], patches [M, P, D] → each frame's highest dot product in each image [F, M].

    All F · M · P products are computed, PRODUCTS at a time, and only which was the highest is kept.
    So the gradient is a sum over F · M pairs, P times fewer: those of an embedding bag.
    """

    @staticmethod
    def forward(ctx, frames: Tensor, patches: Tensor) -> Tensor:
        images, count, _ = patches.shape
        values, places = [], []
        for chunk in patches.split(max(1, PRODUCTS // (len(frames) * count))):
            products = frames @ chunk.flatten(0, 1).T  # [F, images of the chunk × P]
            value, place = products.unflatten(1, (-1, count)).max(-1)
            values.append(value)
            places.append(place)
        first = count * torch.arange(images, device=patches.device)
        ctx.save_for_backward(frames, patches, torch.cat(places, 1) + first)
        return torch.cat(values, 1)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, Tensor]:
        frames, patches, chosen = ctx.saved_tensors
        with torch.enable_grad():
            table = patches.detach().flatten(0, 1).requires_grad_()
            # [F, D]: of each frame the gradient × the patch that it chose, over the images
            to_frames = nn.functional.embedding_bag(
                chosen, table, per_sample_weights=gradient.contiguous(), mode="sum"
            )
        # The derivative of that sum by the table, at the frames, is each patch's gradient.
        (to_table,) = torch.autograd.grad(to_frames, table, frames.detach())
        return to_frames.detach(), to_table.view_as(patches)


def _valid(tokens: Tensor, lengths: Tensor) -> Tensor:
    """Tokens [all frames, width], caption after caption, of [N, T, width]."""
    return tokens[torch.arange(tokens.shape[1], device=tokens.device) < lengths[:, None]]

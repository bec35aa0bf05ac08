"""A speech–image matching head with hard negatives, as an arm: what is found is ranked again.

As in ALBEF (Li et al. 2021), and as Zhou & Li (2024) and FaST-VGS (Peng & Harwath 2022) do for
speech: beside the contrastive loss a cross-attention head learns to tell pairs from the hardest
non-pairs of the batch. At retrieval the embeddings find each query's candidates, and the head
orders those, at the cost of a cross-attention each. Ours are the sizes: one cross-attention, whose
queries are the spoken tokens, so that all but the attention itself is computed once an item.

Negatives are drawn by their similarity, so the head learns what similarity does not tell: the best
order is by similarity and logit together, exp(scale · similarity) being the odds that the draw
took out. ALBEF orders by the logit alone, BLIP-2 by a sum too; with a head as small as this one the
logit alone makes the order far worse than it was.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from cmdlab_kernels.info_nce import info_nce
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, gelu

from cmdlab.encoders import Features
from cmdlab.evaluation import RankTable, ranks_of_scores
from cmdlab.retrieval.losses import Batch, Losses
from cmdlab.retrieval.model import RetrievalModel, Shape
from cmdlab.retrieval.tokens import caption_tokens, image_tokens

GROUP = 64  # pairs that are computed together on a CPU


class Spoken(NamedTuple):
    """What a pair needs of its caption, for N captions."""

    query: Tensor  # [N, heads, T, head width]
    token: Tensor  # [N, T, width]
    lengths: Tensor  # int64 [N]


class Seen(NamedTuple):
    """What a pair needs of its image, for M images."""

    key: Tensor  # [M, heads, P, head width]
    value: Tensor  # [M, heads, P, head width]


class Matching(nn.Module):
    """Gives a caption and an image the logit of their being a pair.

    candidates: how many answers of a query are ordered by it; ALBEF has 128 of 1,000.
    """

    def __init__(self, shape: Shape, candidates: int) -> None:
        super().__init__()
        width = shape.speech_width
        self.heads, self.candidates = shape.heads, candidates
        self.norm = nn.LayerNorm(shape.image_width)
        self.query = nn.Linear(width, width, bias=False)
        self.key = nn.Linear(shape.image_width, width, bias=False)
        self.value = nn.Linear(shape.image_width, width, bias=False)
        self.token = nn.Linear(width, width)
        self.attended = nn.Linear(width, width, bias=False)
        self.logit = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, width), nn.GELU(), nn.Linear(width, 1)
        )

    def losses(self, model: RetrievalModel, batch: Batch, generator: torch.Generator) -> Losses:
        """InfoNCE + the cross-entropy of N pairs and their hard negatives, two a pair."""
        tokens, speech = model.speech_head(batch.states, batch.lengths)
        patches, image = model.image_head(batch.patches, batch.embedding)
        contrastive = info_nce(speech, image, batch.image_id, model.scale)
        similarity = (model.scale * speech @ image.T).detach().cpu()
        captions, images = hard_negatives(similarity, batch.image_id.cpu(), generator)
        own = torch.arange(len(batch.lengths))
        logits = self.logits(
            self.hear(tokens, batch.lengths),
            self.see(patches),
            torch.cat([own, captions]).to(tokens.device),
            torch.cat([own, images]).to(tokens.device),
        )
        is_pair = (torch.arange(len(logits), device=logits.device) < len(own)).to(logits.dtype)
        matching = binary_cross_entropy_with_logits(logits, is_pair)
        return Losses(contrastive + matching, contrastive, None)

    def hear(self, tokens: Tensor, lengths: Tensor) -> Spoken:
        """tokens: contextual, [N, T, width]; lengths: int64 [N]."""
        return Spoken(self._split(self.query(tokens)), self.token(tokens), lengths)

    def see(self, patches: Tensor) -> Seen:
        """patches: [M, P, width of an image's]."""
        patches = self.norm(patches)
        return Seen(self._split(self.key(patches)), self._split(self.value(patches)))

    def _split(self, tokens: Tensor) -> Tensor:
        return tokens.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def logits(self, spoken: Spoken, seen: Seen, captions: Tensor, images: Tensor) -> Tensor:
        """Logits [pairs]; captions, images: int64 [pairs], rows of `spoken` and of `seen`.

        Captions of like length are computed together, no longer than they are.
        """
        lengths = spoken.lengths[captions]
        order = lengths.argsort(stable=True)
        on_cpu = lengths.device.type == "cpu"
        parts = []
        for pairs in order.split(GROUP if on_cpu else max(1, len(order))):
            longest = int(lengths[pairs[-1]])
            mean = self._mean(spoken, seen, captions[pairs], images[pairs], longest)
            parts.append(self.logit(mean)[:, 0])
        return torch.cat(parts)[order.argsort()]

    def _mean(
        self, spoken: Spoken, seen: Seen, captions: Tensor, images: Tensor, longest: int
    ) -> Tensor:
        """The mean over a caption's tokens of what each makes of the image, [pairs, width]."""
        query = spoken.query[captions, :, :longest]
        scores = (query * query.shape[-1] ** -0.5) @ seen.key[images].mT
        found = (scores.softmax(-1) @ seen.value[images]).transpose(1, 2).flatten(2)
        hidden = gelu(spoken.token[captions, :longest] + self.attended(found))
        lengths = spoken.lengths[captions, None]
        weight = (torch.arange(longest, device=lengths.device) < lengths) / lengths
        return (weight[:, None].to(hidden.dtype) @ hidden)[:, 0]

    @torch.inference_mode()
    def rank(self, model: RetrievalModel, features: Features, device: str) -> RankTable:
        """The ranks of a whole split: each query's candidates ordered again, the others after them.

        Holds a few matrices [captions, images] of scores.
        """
        captions = range(len(features.speech))
        parts = caption_tokens(model, features, captions, device)
        speech = torch.cat([embeddings for _, _, embeddings in parts])
        seen, image = self._gallery(model, features, device)
        scores = (speech @ image.T).cpu()
        by_caption = best_of(scores, self.candidates)
        by_image = best_of(scores.T, self.candidates).T
        matched = torch.zeros_like(scores, dtype=torch.float64)
        first = 0
        for tokens, lengths, _ in caption_tokens(model, features, captions, device):
            rows = slice(first, first + len(tokens))
            pairs = (by_caption[rows] | by_image[rows]).nonzero().to(device)
            if len(pairs):
                logits = self.logits(self.hear(tokens, lengths), seen, *pairs.T)
                matched[rows][tuple(pairs.T.cpu())] = logits.double().cpu()
            first += len(tokens)
        matched += model.scale.item() * scores
        return ranks_of_scores(
            reordered(scores, by_caption, matched),
            reordered(scores.T, by_image.T, matched.T).T,
            features.image_index,
        )

    @torch.no_grad()
    def searcher(
        self, model: RetrievalModel, features: Features, captions: Sequence[int]
    ) -> Callable[[int], Tensor]:
        """A function that scores all images [M] for the i-th of the captions, on the CPU."""
        seen, image = self._gallery(model, features, "cpu")
        spoken, speech = [], []
        for tokens, lengths, embeddings in caption_tokens(model, features, captions, "cpu"):
            for i in range(len(tokens)):
                spoken.append(self.hear(tokens[i : i + 1], lengths[i : i + 1]))
                speech.append(embeddings[i : i + 1])
        scale = model.scale.item()

        @torch.no_grad()
        def search(i: int) -> Tensor:
            scores = speech[i] @ image.T  # [1, M]
            best = best_of(scores, self.candidates)
            images = best[0].nonzero()[:, 0]
            matched = scale * scores.double()
            if len(images):
                logits = self.logits(spoken[i], seen, torch.zeros_like(images), images)
                matched[0, images] += logits.double()
            return reordered(scores, best, matched)[0]

        return search

    def _gallery(
        self, model: RetrievalModel, features: Features, device: str
    ) -> tuple[Seen, Tensor]:
        """What pairs need of every image, and the embeddings [M, D]."""
        keys, values, embeddings = zip(
            *(
                (*self.see(tokens), image)
                for tokens, image in image_tokens(model, features, device)
            ),
            strict=True,
        )
        return Seen(torch.cat(keys), torch.cat(values)), torch.cat(embeddings)


def hard_negatives(
    similarity: Tensor, image_id: Tensor, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Draw a wrong image for each caption and a wrong caption for each image of a batch.

    similarity: [N, N] on the CPU, over the temperature; image_id: int64 [N]. An answer is drawn
    by the softmax of the similarities, those of the same image left out; a row without others
    draws none. Returns the captions and the images of the pairs, int64, all captions' first.
    """
    wrong = image_id[:, None] != image_id
    row = wrong.any(1).nonzero()[:, 0]
    drawn = [
        torch.multinomial(
            scores[row].masked_fill(~wrong[row], -torch.inf).softmax(1), 1, generator=generator
        )[:, 0]
        if len(row)
        else row
        for scores in (similarity, similarity.T)
    ]
    return torch.cat([row, drawn[1]]), torch.cat([drawn[0], row])


def best_of(scores: Tensor, count: int) -> Tensor:
    """bool [N, M]: the `count` highest scores of each row; fewer where a tie would be split.

    So no answer is among them by its place in the gallery.
    """
    if count >= scores.shape[1]:
        return torch.ones_like(scores, dtype=torch.bool)
    return scores > scores.topk(count + 1).values[:, -1:]


def reordered(scores: Tensor, best: Tensor, matched: Tensor) -> Tensor:
    """float64 [N, M]: those of `best` in the order of `matched`, above the others in their own.

    Equal ones stay equal.
    """
    lowest = matched.masked_fill(~best, torch.inf).amin(1, keepdim=True)
    above = scores.amax(1, keepdim=True) + 1 - lowest  # −∞ in a row without any, and not used
    return torch.where(best, matched + above, scores.double())

"""A queue of earlier pairs, kept by slowly following heads, as an arm (MoCo, He et al. 2020).

As in ALBEF (Li et al. 2021), a momentum copy of the trained heads gives the embeddings that a batch
is compared with: its own, and those of the batches before it. All pairs of equal id are positives,
and part of the target is what the copy itself finds similar (momentum distillation). Nothing of
it is there at retrieval.

ALBEF's 65,536 pairs and momentum 0.995 are of a long training. Ours keep the proportion, whatever
the length: the queue holds SHARE of all pairs that a run sees, and the copy is a mean over SHARE of
its steps.
"""

import copy

import torch
from torch import Tensor, nn

from cmdlab.retrieval.losses import Batch, Losses
from cmdlab.retrieval.model import RetrievalModel

SHARE = 0.04
LONGEST, SLOWEST = 65_536, 0.995  # ALBEF's
SOFT = 0.4  # ALBEF's weight of the copy's own similarities in the target


class MomentumQueue(nn.Module):
    """The following heads and the queue; its state continues a run that was stopped.

    steps, batch_size: of the run, which decide `length` and `momentum`. soft: the weight of the
    copy's similarities in the target, once the queue is full.
    """

    speech: Tensor  # [length, D]
    image: Tensor  # [length, D]
    image_id: Tensor  # int64 [length]
    pairs: Tensor  # int64, 0-d: that were ever put in

    def __init__(
        self, model: RetrievalModel, steps: int, batch_size: int, soft: float = SOFT
    ) -> None:
        super().__init__()
        self.soft = soft
        self.length = min(LONGEST, max(batch_size, round(SHARE * steps * batch_size)))
        self.momentum = min(SLOWEST, max(0.0, 1 - 1 / (SHARE * steps)))
        self.speech_head = copy.deepcopy(model.speech_head).requires_grad_(False)
        self.image_head = copy.deepcopy(model.image_head).requires_grad_(False)
        width = model.shape.embedding
        self.register_buffer("speech", torch.zeros(self.length, width))
        self.register_buffer("image", torch.zeros(self.length, width))
        self.register_buffer("image_id", torch.zeros(self.length, dtype=torch.int64))
        self.register_buffer("pairs", torch.tensor(0))

    def losses(self, model: RetrievalModel, batch: Batch, generator: torch.Generator) -> Losses:
        """Cross-entropy of each caption among the copy's images, and of each image among its
        captions; then the copy's pairs enter the queue, in place of the oldest."""
        speech = model.speech_head(batch.states, batch.lengths)[1]
        image = model.image_head(batch.patches, batch.embedding)[1]
        with torch.no_grad():
            self._follow(model)
            slow_speech = self.speech_head(batch.states, batch.lengths)[1]
            slow_image = self.image_head(batch.patches, batch.embedding)[1]
            filled = min(int(self.pairs), self.length)
            speeches = torch.cat([slow_speech, self.speech[:filled]])
            images = torch.cat([slow_image, self.image[:filled]])
            ids = torch.cat([batch.image_id, self.image_id[:filled]])
            positive = (batch.image_id[:, None] == ids).to(speech.dtype)
            positive /= positive.sum(1, keepdim=True)
            soft = self.soft * filled / self.length
        loss = torch.zeros((), device=speech.device)
        for query, slow, keys in ((speech, slow_speech, images), (image, slow_image, speeches)):
            similar = (model.scale.detach() * slow @ keys.T).softmax(1)
            target = soft * similar + (1 - soft) * positive
            loss = loss + nn.functional.cross_entropy(model.scale * query @ keys.T, target) / 2
        self._enqueue(slow_speech, slow_image, batch.image_id)
        return Losses(loss, loss, None)

    def _follow(self, model: RetrievalModel) -> None:
        """Move the copy towards the heads, by 1 − momentum of the way."""
        pairs = ((self.speech_head, model.speech_head), (self.image_head, model.image_head))
        for slow, head in pairs:
            for own, other in zip(slow.parameters(), head.parameters(), strict=True):
                own.lerp_(other, 1 - self.momentum)

    def _enqueue(self, speech: Tensor, image: Tensor, image_id: Tensor) -> None:
        new = len(image_id)
        place = (self.pairs + torch.arange(new, device=image_id.device)) % self.length
        self.speech[place], self.image[place], self.image_id[place] = speech, image, image_id
        self.pairs += new

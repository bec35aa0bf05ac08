"""Speech encoded whenever it is asked for: what a store would hold, without the disk.

A large encoder gives 5 MB for each second of speech, so a corpus of 700 hours has no room on most
disks. Here a batch is read ahead by threads and encoded on the spot, in bfloat16 on a GPU.
"""

import hashlib
import json
import os
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property

import numpy as np
import soundfile
import torch
from torch import Tensor, nn

from cmdlab.corpora import Corpus, caption_seed
from cmdlab.encoders.encoder import Description, Hearing
from cmdlab.encoders.encoding import Encoder, fingerprint, read_inputs, refuse_short

SAMPLES = 64 * 102_400  # encoded at once, padding counted: 64 clips of SpeechCLIP's 6.4 s


class OnlineSpeech:
    """The tokens of a corpus' captions, as `FeatureStore` has them, computed at each request.

    crop: samples that are heard of a longer caption, from a random place on, as SpeechCLIP does in
    training; None hears all. The place depends on the caption's id and on the `seed` it is asked
    for with, so it is the same for any number of processes and in a run that is continued.
    """

    def __init__(
        self,
        corpus: Corpus,
        encoder: Encoder,
        hearing: Hearing,
        device: str,
        *,
        crop: int | None = None,
    ) -> None:
        self.encoder = encoder
        identity = {
            **fingerprint(encoder, hearing),
            "corpus": corpus.content_hash,
            "split": corpus.split,
            "crop": crop,
        }
        digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
        self.name = f"{encoder}-{corpus.split}-{digest}-online"
        self.layers, self.width = self.description.layers, self.description.width
        self.samples = self.padded_samples = 0  # encoded so far: what was heard, and with padding
        self._captions, self._hearing = corpus.captions, hearing
        self._device, self._crop = device, crop
        dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
        self._network = encoder.open(device, dtype)
        self._dtype = dtype
        self._pool = ThreadPoolExecutor(os.cpu_count())
        self._ahead: dict[tuple[int, ...], list[Future[Tensor]]] = {}  # by seed and items

    def __len__(self) -> int:
        return len(self._captions)

    @property
    def description(self) -> Description:
        return self.encoder.description

    @cached_property
    def lengths(self) -> Tensor:
        """About how many tokens each caption has, int64, by what its file says of its length."""
        seconds = np.array([soundfile.info(one.audio).duration for one in self._captions])
        return torch.from_numpy(seconds * (self.description.tokens_per_second or 0)).long()

    def read_ahead(self, items: Sequence[int], seed: int = 0) -> None:
        """Begin to read what the next `tokens` will ask for."""
        self._ahead[(seed, *items)] = [self._pool.submit(self._read, i, seed) for i in items]

    def tokens(self, items: Sequence[int], seed: int = 0) -> tuple[Tensor, Tensor]:
        """float32 [layers, all tokens, width] on the device, item after item; int64 [items]."""
        key = (seed, *items)
        if key not in self._ahead:
            self.read_ahead(items, seed)
        sounds = [future.result() for future in self._ahead.pop(key)]
        states: dict[int, Tensor] = {}
        for chosen in _batches([len(sound) for sound in sounds]):
            lengths = torch.tensor([len(sounds[i]) for i in chosen], device=self._device)
            padded = nn.utils.rnn.pad_sequence([sounds[i] for i in chosen], batch_first=True)
            self.samples += int(lengths.sum())
            self.padded_samples += padded.numel()
            with torch.inference_mode():
                given, counts = self._network(padded.to(self._device, self._dtype), lengths)
            if self.encoder.layers:
                given = given[:, list(self.encoder.layers)]
            for i, state, count in zip(chosen, given, counts.tolist(), strict=True):
                states[i] = state[:, :count]
        ragged = [states[i] for i in range(len(sounds))]
        counts = torch.tensor([state.shape[1] for state in ragged])
        return torch.cat(ragged, 1).float(), counts

    def _read(self, item: int, seed: int) -> Tensor:
        caption = self._captions[item]
        (sound,) = inputs = read_inputs(self.encoder, [caption], self._hearing)
        refuse_short(self.encoder, [caption], inputs)
        if self._crop is None or len(sound) <= self._crop:
            return sound
        random = np.random.default_rng(caption_seed(caption.id, seed))
        first = int(random.integers(len(sound) - self._crop + 1))
        return sound[first : first + self._crop]


def _batches(lengths: list[int]) -> list[list[int]]:
    """Items of like length together, each batch of at most SAMPLES with its padding."""
    batches: list[list[int]] = [[]]
    for item in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        if batches[-1] and (len(batches[-1]) + 1) * lengths[item] > SAMPLES:
            batches.append([])
        batches[-1].append(item)
    return batches

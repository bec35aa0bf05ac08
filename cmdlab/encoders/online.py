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

from cmdlab.corpora import Corpus
from cmdlab.encoders.encoder import Description, Hearing
from cmdlab.encoders.encoding import Encoder, fingerprint, read_inputs

SAMPLES = 64 * 102_400  # encoded at once, padding counted: 64 clips of SpeechCLIP's 6.4 s


class OnlineSpeech:
    """The tokens of a corpus' captions, as `FeatureStore` has them, computed at each request.

    crop: samples that are heard of a longer caption, from a random place on, as SpeechCLIP does in
    training; the place depends on the captions that are asked for together, so a run that is
    continued hears the same. None hears all.
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
        self._ahead: dict[tuple[int, ...], list[Future[Tensor]]] = {}

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

    def read_ahead(self, items: Sequence[int]) -> None:
        """Begin to read what the next `tokens` will ask for."""
        key = tuple(items)
        self._ahead[key] = [self._pool.submit(self._read, i) for i in key]

    def tokens(self, items: Sequence[int]) -> tuple[Tensor, Tensor]:
        """float32 [layers, all tokens, width] on the device, item after item; int64 [items]."""
        key = tuple(items)
        if key not in self._ahead:
            self.read_ahead(key)
        sounds = [future.result() for future in self._ahead.pop(key)]
        if self._crop is not None:
            rng = np.random.default_rng(key)
            sounds = [_crop(sound, self._crop, rng) for sound in sounds]
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

    def _read(self, item: int) -> Tensor:
        return read_inputs(self.encoder, [self._captions[item]], self._hearing)[0]


def _crop(sound: Tensor, samples: int, rng: np.random.Generator) -> Tensor:
    first = int(rng.integers(0, max(0, len(sound) - samples) + 1))
    return sound[first : first + samples]


def _batches(lengths: list[int]) -> list[list[int]]:
    """Items of like length together, each batch of at most SAMPLES with its padding."""
    batches: list[list[int]] = [[]]
    for item in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        if batches[-1] and (len(batches[-1]) + 1) * lengths[item] > SAMPLES:
            batches.append([])
        batches[-1].append(item)
    return batches

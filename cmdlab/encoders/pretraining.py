"""Trains the tiny encoders: images against text, and speech against its spelling.

Nothing of the study is seen here: the scenes come from a random stream of their own, the voices
are none of the study's, and speech and images never meet.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn.functional import (
    binary_cross_entropy_with_logits,
    cross_entropy,
    ctc_loss,
    normalize,
)
from tqdm import tqdm

from cmdlab.corpora import (
    PRETRAINING_VOICES,
    Utterance,
    degrade,
    render,
    sample_captions,
    sample_scene,
    speak,
    vocabulary,
    worker_pool,
)
from cmdlab.encoders.tiny import (
    IMAGE_GRID,
    LETTERS,
    WIDTH,
    TinyImageEncoder,
    TinySpeechEncoder,
    TinyTextEncoder,
)
from cmdlab.outputs import write_file

STREAM = 0x70726574  # the random stream of pre-training; the study's splits use others
SHARD = 500  # scenes
LONGEST_TEXT = 48  # words


@dataclass
class Pictures:
    """Pre-training scenes: pixels uint8 [n, 64, 64, 3], words uint8 [n, 5, 48] (0: padding)."""

    pixels: Tensor
    words: Tensor

    def says(self, size: int) -> Tensor:
        """bool [n, size]: which words any of a scene's captions holds."""
        said = torch.zeros(len(self.words), size, dtype=torch.bool)
        for j in range(self.words.shape[1]):
            said.scatter_(1, self.words[:, j].long(), True)
        said[:, 0] = False
        return said


def make_pictures(shards: range, *, objects: int | None = None, workers: int) -> Pictures:
    """Scenes of `objects` objects (as the study's where None), 500 a shard."""
    with worker_pool(workers) as pool:
        parts = list(pool.map(_picture_shard, shards, [objects] * len(shards)))
    return Pictures(
        torch.from_numpy(np.concatenate([pixels for pixels, _ in parts])),
        torch.from_numpy(np.concatenate([words for _, words in parts])),
    )


def _picture_shard(shard: int, objects: int | None) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng((STREAM, objects or 0, shard))
    index = {word: i + 1 for i, word in enumerate(vocabulary())}
    pixels = np.zeros((SHARD, 64, 64, 3), np.uint8)
    words = np.zeros((SHARD, 5, LONGEST_TEXT), np.uint8)
    for i in range(SHARD):
        scene = sample_scene(rng, objects)
        for j, caption in enumerate(sample_captions(scene, rng)):
            spoken = [index[word] for word in caption.text.split()]
            words[i, j, : len(spoken)] = spoken
        pixels[i], _ = render(scene, rng)
    return pixels, words


def train_image_encoder(
    single: Pictures,
    scenes: Pictures,
    held_out: Pictures,
    *,
    steps: int,
    start: tuple[TinyImageEncoder, TinyTextEncoder] | None = None,
    single_part: float = 0.04,
    batch_size: int = 64,
    learning_rate: float = 1.5e-3,
    seed: int = 0,
) -> tuple[TinyImageEncoder, TinyTextEncoder, list[dict[str, float]]]:
    """Image–text contrast; the first part of the steps on scenes of a single object.

    start: encoders to go on from, in another round; they are changed.

    Three losses are added: CLIP's, over two captions an image (Radford et al. 2021); FILIP's, each
    word with its best patch (Yao et al. 2022); and which words the captions hold, read off the
    patches' maximum (as in Joulin et al. 2016). The first alone learns colours and places and then
    stands still for minutes; the others teach it shapes.
    Returns both encoders and R@1 and R@10, text→image, on `held_out` as training went on.
    """
    torch.manual_seed(seed)
    image, text = start or (TinyImageEncoder(), TinyTextEncoder(vocabulary()))
    image.train().requires_grad_()
    text.train().requires_grad_()
    size = len(text.words) + 1
    words_head = nn.Linear(WIDTH, size)
    nn.init.zeros_(words_head.weight)
    scales = nn.Parameter(torch.tensor([1 / 0.07, 20.0]).log())  # of CLIP's loss and of FILIP's
    parameters = [*image.parameters(), *text.parameters(), *words_head.parameters(), scales]
    optimiser = torch.optim.AdamW(parameters, learning_rate, weight_decay=0.05, betas=(0.9, 0.98))
    generator = torch.Generator().manual_seed(seed + 1)
    labels = {id(pictures): pictures.says(size) for pictures in (single, scenes)}
    history: list[dict[str, float]] = []
    for step in tqdm(range(steps), desc="image encoder", unit=" steps"):
        _set_rate(optimiser, learning_rate, step, steps)
        source = single if step < single_part * steps else scenes
        rows = torch.randint(len(source.pixels), (batch_size,), generator=generator)
        first = torch.randint(5, (batch_size,), generator=generator)
        other = (first + torch.randint(1, 5, (batch_size,), generator=generator)) % 5
        with torch.autocast("cpu", torch.bfloat16):
            patches, embedding = image(source.pixels[rows])
            words, second = _words(source, rows, first), _words(source, rows, other)
            tokens = text.tokens(words)
            texts = (text.pool(tokens, words), text(second))
            fine = _best_patches(image.project(patches), tokens, words != 0)
            said = words_head(patches.amax(1)).float()
        clip, filip = scales.exp().clamp(max=100.0)
        loss = sum(_symmetric(clip * embedding @ one.T) / 2 for one in texts)
        loss = loss + _symmetric(filip * fine)
        told = labels[id(source)][rows].float()
        loss = loss + binary_cross_entropy_with_logits(said, told) * size / 10
        _update(optimiser, loss, parameters)
        if (step + 1) % 500 == 0 or step + 1 == steps:
            history.append({"step": step + 1, **text_to_image(image, text, held_out)})
    return image.eval(), text.eval(), history


@torch.inference_mode()
def text_to_image(
    image: TinyImageEncoder, text: TinyTextEncoder, pictures: Pictures
) -> dict[str, float]:
    """R@1 and R@10 in percent, every caption a query, the given scenes as the gallery."""
    was_training = image.training
    image.eval()
    text.eval()
    gallery = torch.cat([image(part)[1] for part in pictures.pixels.split(250)])
    own = torch.arange(len(gallery)).repeat_interleave(5)
    queries = torch.cat([text(part.long()) for part in pictures.words.flatten(0, 1).split(500)])
    scores = queries @ gallery.T
    rank = (scores >= scores.gather(1, own[:, None])).sum(1)
    image.train(was_training)
    text.train(was_training)
    return {f"R@{k}": 100 * (rank <= k).float().mean().item() for k in (1, 10)}


def _words(pictures: Pictures, rows: Tensor, columns: Tensor) -> Tensor:
    """One caption of each row, int64 [batch, longest]."""
    words = pictures.words[rows, columns].long()
    return words[:, : int((words > 0).sum(1).max())]


def _best_patches(patches: Tensor, tokens: Tensor, kept: Tensor) -> Tensor:
    """FILIP's late interaction, text side: the mean over words of the best patch's cosine.

    patches: [images, 64, D]; tokens: [texts, words, D]; kept: bool [texts, words], False where
    padded. Returns float32 [images, texts].
    """
    said = normalize(tokens, dim=-1)[kept]  # [all words, D]
    cosine = normalize(patches, dim=-1).flatten(0, 1) @ said.T
    best = cosine.view(len(patches), IMAGE_GRID**2, -1).amax(1).float()  # [images, all words]
    owner = torch.arange(len(kept))[:, None].expand_as(kept)[kept]
    total = torch.zeros(len(patches), len(kept)).index_add(1, owner, best)
    return total / kept.sum(1)


def _symmetric(scores: Tensor) -> Tensor:
    target = torch.arange(len(scores))
    return (cross_entropy(scores, target) + cross_entropy(scores.T, target)) / 2


@dataclass
class Utterances:
    """Spoken captions: int16 samples at 16 kHz, and what is said."""

    sounds: list[np.ndarray]
    texts: list[str]


def make_utterances(shards: range, *, workers: int) -> Utterances:
    """Captions of pre-training scenes in the pre-training voices, 500 a shard."""
    with worker_pool(workers) as pool:
        parts = list(pool.map(_utterance_shard, shards))
    return Utterances(
        [sound for part in parts for sound in part.sounds],
        [text for part in parts for text in part.texts],
    )


def _utterance_shard(shard: int) -> Utterances:
    rng = np.random.default_rng((STREAM, 1 << 32, shard))
    utterances = []
    for _ in range(SHARD):
        caption = sample_captions(sample_scene(rng), rng, 1)[0]
        voice = PRETRAINING_VOICES[int(rng.integers(len(PRETRAINING_VOICES)))]
        rate, pitch = int(rng.integers(150, 231)), int(rng.integers(15, 86))
        utterances.append(Utterance(caption.text, voice, rate, pitch))
    spoken = speak(utterances)
    return Utterances([one.samples for one in spoken], [one.text for one in utterances])


def train_speech_encoder(
    utterances: Utterances,
    held_out: Utterances,
    *,
    steps: int,
    batch_size: int = 32,
    learning_rate: float = 1.5e-3,
    seed: int = 0,
) -> tuple[TinySpeechEncoder, list[dict[str, float]]]:
    """CTC on letters, on speech in rooms and noise of 0 to 20 dB.

    Returns the encoder and the share of words that it spells right on `held_out`, in percent.
    """
    torch.manual_seed(seed)
    encoder = TinySpeechEncoder()
    code = {letter: i + 1 for i, letter in enumerate(LETTERS)}
    optimiser = torch.optim.AdamW(
        encoder.parameters(), learning_rate, weight_decay=0.01, betas=(0.9, 0.98)
    )
    batches = _batches_of_like_length(utterances, batch_size, np.random.default_rng(seed))
    history: list[dict[str, float]] = []
    for step in tqdm(range(steps), desc="speech encoder", unit=" steps"):
        _set_rate(optimiser, learning_rate, step, steps)
        rows = next(batches)
        sounds, lengths = _noisy(utterances, rows, step)
        with torch.autocast("cpu", torch.bfloat16):
            letters, tokens = encoder.spell(sounds, lengths)
        spelt = [torch.tensor([code[letter] for letter in utterances.texts[i]]) for i in rows]
        loss = ctc_loss(
            letters.transpose(0, 1),
            torch.cat(spelt),
            tokens,
            torch.tensor([len(one) for one in spelt]),
            zero_infinity=True,
        )
        _update(optimiser, loss, list(encoder.parameters()))
        if (step + 1) % 500 == 0 or step + 1 == steps:
            history.append({"step": step + 1, "words": words_spelt(encoder, held_out)})
    return encoder.eval(), history


def _batches_of_like_length(
    utterances: Utterances, batch_size: int, rng: np.random.Generator
) -> Iterator[list[int]]:
    """Batches without end; what is padded is not computed for nothing."""
    lengths = np.array([len(sound) for sound in utterances.sounds])
    while True:
        rows = rng.permutation(len(lengths))
        for first in range(0, len(rows), 16 * batch_size):
            pool = rows[first : first + 16 * batch_size]
            pool = pool[np.argsort(lengths[pool], kind="stable")]
            starts = range(0, max(1, len(pool) - batch_size + 1), batch_size)
            for start in rng.permutation(starts):
                yield pool[start : start + batch_size].tolist()


@torch.inference_mode()
def words_spelt(encoder: TinySpeechEncoder, utterances: Utterances) -> float:
    """The share of words spelt right in their order (longest match), in percent; greedy CTC."""
    from difflib import SequenceMatcher

    was_training = encoder.training
    encoder.eval()
    right = said = 0
    for first in range(0, len(utterances.sounds), 50):
        rows = list(range(first, min(first + 50, len(utterances.sounds))))
        letters, lengths = encoder.spell(*_noisy(utterances, rows, -1))
        for i, best, length in zip(rows, letters.argmax(-1), lengths.tolist(), strict=True):
            spelt = torch.unique_consecutive(best[:length]).tolist()
            heard = "".join(LETTERS[letter - 1] for letter in spelt if letter).split()
            words = utterances.texts[i].split()
            matches = SequenceMatcher(None, words, heard, autojunk=False).get_matching_blocks()
            right += sum(match.size for match in matches)
            said += len(words)
    encoder.train(was_training)
    return 100 * right / said


def _noisy(utterances: Utterances, rows: list[int], step: int) -> tuple[Tensor, Tensor]:
    """Waveforms [batch, samples] and their lengths, in rooms and noise, other ones at every step.

    Each is played up to a fifth slower or faster, so that a voice is higher or lower than the few
    that were recorded.
    """
    sounds = []
    for i in rows:
        rng = np.random.default_rng((step + 1, i))
        sound = utterances.sounds[i] / 32768
        at = np.arange(0, len(sound) - 1, rng.uniform(0.82, 1.2))
        waveform = np.interp(at, np.arange(len(sound)), sound).astype(np.float32)
        snr, seed = float(rng.uniform(0, 20)), int(rng.integers(2**62))
        degraded = degrade(waveform, snr_db=snr, reverberation=True, seed=seed)
        sounds.append(torch.from_numpy(degraded))
    lengths = torch.tensor([len(sound) for sound in sounds])
    return nn.utils.rnn.pad_sequence(sounds, batch_first=True), lengths


def save_encoder(encoder: nn.Module, path: Path) -> None:
    """Write the weights in half precision; a text encoder's words go with them."""
    tensors = {
        name: value.half() if value.is_floating_point() else value
        for name, value in encoder.state_dict().items()
    }
    if isinstance(encoder, TinyTextEncoder):
        words = " ".join(encoder.words).encode()
        tensors["words"] = torch.frombuffer(bytearray(words), dtype=torch.uint8)
    write_file(path, save({name: value.contiguous() for name, value in tensors.items()}))


def _set_rate(optimiser: torch.optim.Optimizer, rate: float, step: int, steps: int) -> None:
    """Warm-up over 100 steps, then half a cosine, down to 2 %."""
    cosine = 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / steps))
    for group in optimiser.param_groups:
        group["lr"] = rate * min(1.0, (step + 1) / 100) * cosine


def _update(optimiser: torch.optim.Optimizer, loss: Any, parameters: list[nn.Parameter]) -> None:
    optimiser.zero_grad(set_to_none=True)
    loss.backward()
    nn.utils.clip_grad_norm_(parameters, 1.0)
    optimiser.step()

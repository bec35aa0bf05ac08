"""The tiny encoders of the embedded study: an image encoder, its text tower, a speech encoder.

They stand where CLIP and HuBERT stand in the paper: trained beforehand, then frozen. How they are
trained is in `pretraining.py`; their weights and model card lie in `weights/`.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torchaudio.functional import melscale_fbanks

from cmdlab.corpora import vocabulary
from cmdlab.encoders.encoder import Description
from cmdlab.encoders.weight_files import read_weights
from cmdlab.errors import InputError

WEIGHTS = Path(__file__).parent / "weights"
LICENCE = "Apache-2.0"
PIXELS = 64  # on a side of a picture

WIDTH = 128
EMBEDDING = 256  # dimension of the space that image and text embeddings share
HEADS = 4
IMAGE_GRID = 8  # patches on a side
MEL_BANDS = 64
WINDOW = 400  # samples of a frame of the spectrogram: 25 ms
HOP = 160  # samples between two frames of the spectrogram: 10 ms
TOKENS_PER_SECOND = 12.5  # of the speech encoder's output
NEIGHBOUR = 0.7  # of the words beside a word, in a token of perfect hearing
KNOWN_WORDS = "the words of SpokenScenes"  # what the encoders of words take
LETTERS = " abcdefghijklmnopqrstuvwxyz"  # what the speech encoder learnt to spell; 0 is CTC's blank


def padding_mask(lengths: Tensor, tokens: int) -> Tensor:
    """bool [batch, tokens], True where there is padding; lengths: int [batch]."""
    return torch.arange(tokens, device=lengths.device) >= lengths[:, None]


class Layer(nn.Module):
    """A pre-norm transformer layer. With plain products of matrices for attention: at these sizes
    that is twice as fast on a CPU, forward and backward, as torch's fused one."""

    def __init__(self) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(WIDTH)
        self.query_key_value = nn.Linear(WIDTH, 3 * WIDTH)
        self.output = nn.Linear(WIDTH, WIDTH)
        self.feed_forward = nn.Sequential(
            nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH)
        )

    def forward(self, x: Tensor, padding: Tensor | None = None) -> Tensor:
        """x: [batch, tokens, 128]; padding: bool [batch, tokens], True where padded."""
        batch, tokens, _ = x.shape
        projected = self.query_key_value(self.attention_norm(x))
        projected = projected.view(batch, tokens, 3, HEADS, WIDTH // HEADS).permute(2, 0, 3, 1, 4)
        query, key, value = projected.unbind(0)  # [batch, heads, tokens, 32]
        scores = (query * (WIDTH // HEADS) ** -0.5) @ key.transpose(2, 3)
        if padding is not None:
            scores = scores.masked_fill(padding[:, None, None], float("-inf"))
        mixed = scores.softmax(-1).to(value.dtype) @ value
        x = x + self.output(mixed.transpose(1, 2).reshape(batch, tokens, WIDTH))
        return x + self.feed_forward(x)


class TinyImageEncoder(nn.Module):
    """64 × 64 pixels to 8 × 8 patch tokens and one embedding.

    The embedding is a weighted mean of the projected patch tokens, so a patch can be seen in the
    shared space by itself (`project`), and the embedding says what the patches say together.
    """

    description = Description(
        *("tiny-image", "images", 1, WIDTH, EMBEDDING, "64 × 64 pixels", LICENCE),
        grid=(IMAGE_GRID, IMAGE_GRID),
        side=64,
    )

    def __init__(self, layers: int = 1) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            *_convolution(3, 32, kernel=4, stride=2),  # 32 × 32
            *_convolution(32, 64, pool=True),  # 16 × 16
            *_convolution(64, 64),
            *_convolution(64, WIDTH, pool=True),  # 8 × 8
            *_convolution(WIDTH, WIDTH),
        )
        self.position = nn.Parameter(0.02 * torch.randn(IMAGE_GRID**2, WIDTH))
        self.layers = nn.ModuleList(Layer() for _ in range(layers))
        self.norm = nn.LayerNorm(WIDTH)
        self.importance = nn.Linear(WIDTH, 1)
        self.projection = nn.Linear(WIDTH, EMBEDDING)

    def pixels(self, picture: np.ndarray) -> Tensor:
        """What a picture, uint8 [64, 64, 3], is in a batch: itself."""
        return torch.tensor(picture)

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """pixels: uint8 [batch, 64, 64, 3] → tokens [batch, 64, 128], embedding [batch, 256].

        Tokens run over the rows of the picture, from the top left. The embedding has unit norm.
        """
        x = pixels.permute(0, 3, 1, 2).float() / 127.5 - 1
        x = self.stem(x.contiguous(memory_format=torch.channels_last))
        x = x.flatten(2).transpose(1, 2) + self.position
        for layer in self.layers:
            x = layer(x)
        tokens = self.norm(x)
        pooled = (self.importance(tokens).softmax(1) * self.project(tokens)).sum(1)
        return tokens, nn.functional.normalize(pooled.float(), dim=-1)

    def project(self, tokens: Tensor) -> Tensor:
        """Patch tokens [..., 128] into the shared space, not normalised."""
        return self.projection(tokens)


def _convolution(
    inputs: int, outputs: int, *, kernel: int = 3, stride: int = 1, pool: bool = False
) -> list[nn.Module]:
    """Convolution, batch norm, ReLU. With batch norm shapes are learnt in seconds; with group norm
    and a transformer on raw patches they were not learnt in minutes."""
    convolution = nn.Conv2d(inputs, outputs, kernel, stride, 1, bias=False)
    pooling = [nn.MaxPool2d(2)] if pool else []
    return [convolution, *pooling, nn.BatchNorm2d(outputs), nn.ReLU()]


class TinyTextEncoder(nn.Module):
    """Words to an embedding in the image encoder's space: the other half of its training."""

    description = Description("tiny-text", "text", 1, 1, EMBEDDING, KNOWN_WORDS, LICENCE)

    def __init__(self, words: tuple[str, ...], layers: int = 2, longest: int = 48) -> None:
        super().__init__()
        self.words = words
        self.index = {word: i + 1 for i, word in enumerate(words)}  # 0 is padding
        self.embedding = nn.Embedding(len(words) + 1, WIDTH)
        self.position = nn.Parameter(0.02 * torch.randn(longest, WIDTH))
        self.layers = nn.ModuleList(Layer() for _ in range(layers))
        self.norm = nn.LayerNorm(WIDTH)
        self.projection = nn.Linear(WIDTH, EMBEDDING)

    def forward(self, words: Tensor) -> Tensor:
        """words: int64 [batch, length], 0 for padding → embedding [batch, 256] of unit norm."""
        return self.pool(self.tokens(words), words)

    def tokens(self, words: Tensor) -> Tensor:
        """words: as in `forward` → contextual words in the shared space [batch, length, 256]."""
        x = self.embedding(words) + self.position[: words.shape[1]]
        for layer in self.layers:
            x = layer(x, words == 0)
        return self.projection(self.norm(x))

    def pool(self, tokens: Tensor, words: Tensor) -> Tensor:
        """The mean of a text's tokens, of unit norm: [batch, 256]."""
        return nn.functional.normalize((tokens * (words != 0)[..., None]).sum(1).float(), dim=-1)

    def tokenise(self, texts: list[str]) -> Tensor:
        """Texts to int64 [batch, longest of them]. Raises KeyError for an unknown word."""
        return _numbers(texts, self.index)


class TinySpeechEncoder(nn.Module):
    """16 kHz speech to frame tokens, from every layer, as HuBERT gives them.

    Log-mel frames, each band normalised over the utterance; two strided convolutions to 25 tokens
    a second; a convolution for relative position and transformer layers. It was trained to spell
    (`spell`). Its output joins two neighbours, 12.5 tokens a second.
    """

    description = Description(
        *("tiny-speech", "speech", 4, WIDTH, 0, "speech at 16 kHz", LICENCE),
        tokens_per_second=TOKENS_PER_SECOND,
    )
    window: Tensor
    filters: Tensor

    def __init__(self, layers: int = 3) -> None:
        super().__init__()
        self.register_buffer("window", torch.hann_window(WINDOW), persistent=False)
        filters = melscale_fbanks(WINDOW // 2 + 1, 0.0, 8_000.0, MEL_BANDS, 16_000)
        self.register_buffer("filters", filters, persistent=False)
        self.convolutions = nn.ModuleList(
            (nn.Conv1d(MEL_BANDS, WIDTH, 5, 2, 2), nn.Conv1d(WIDTH, WIDTH, 5, 2, 2))
        )
        self.position = nn.Conv1d(WIDTH, WIDTH, 25, 1, 12, groups=16)
        self.layers = nn.ModuleList(Layer() for _ in range(layers))
        self.norm = nn.LayerNorm(WIDTH)
        self.letters = nn.Linear(WIDTH, len(LETTERS) + 1)

    def forward(self, waveform: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """waveform: float32 [batch, samples], zero where padded; lengths: int64 [batch] samples.

        Returns states [batch, layers + 1, tokens, 128], each normalised to unit variance, and the
        number of tokens, int64 [batch]. Padding has no part in the tokens before it; those after
        a length are zero.
        """
        states, lengths = self._states(waveform, lengths)
        stacked = nn.functional.layer_norm(torch.stack(states, 1), (WIDTH,))
        stacked = stacked * ~padding_mask(lengths, stacked.shape[2])[:, None, :, None]
        if stacked.shape[2] % 2:
            stacked = nn.functional.pad(stacked, (0, 0, 0, 1))
        return stacked.unflatten(2, (-1, 2)).mean(3), (lengths + 1) // 2

    def spell(self, waveform: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probabilities of CTC's blank and LETTERS, [batch, tokens at 25/s, 28]; lengths."""
        states, lengths = self._states(waveform, lengths)
        return self.letters(self.norm(states[-1])).float().log_softmax(-1), lengths

    def _states(self, waveform: Tensor, lengths: Tensor) -> tuple[list[Tensor], Tensor]:
        x = torch.stft(
            waveform, WINDOW, HOP, window=self.window, pad_mode="constant", return_complex=True
        )
        x = (x.real.square() + x.imag.square()).transpose(1, 2) @ self.filters
        x = (x + 1e-6).log().transpose(1, 2)  # [batch, bands, frames]
        lengths = lengths // HOP + 1
        kept = ~padding_mask(lengths, x.shape[2])[:, None]
        count = lengths[:, None, None]
        x = (x - (x * kept).sum(2, keepdim=True) / count) * kept
        x = x / ((x * x).sum(2, keepdim=True) / count + 1e-3).sqrt()
        for convolution in self.convolutions:
            lengths = (lengths + 1) // 2
            x = nn.functional.gelu(convolution(x))
            x = x * ~padding_mask(lengths, x.shape[2])[:, None]
        x = (x + nn.functional.gelu(self.position(x))).transpose(1, 2)
        padding = padding_mask(lengths, x.shape[1])
        states = [x]
        for layer in self.layers:
            x = layer(x, padding)
            states.append(x)
        return states, lengths


class TinyWordEncoder(nn.Module):
    """A caption's words as tokens, in the place of its speech: perfect hearing.

    A token is a random vector of its word, with 0.7 of those of the words beside it, as a speech
    encoder's tokens hold their neighbours, and the sinusoids of its place (Vaswani et al. 2017). It
    tells which words stand where and nothing else; nothing of it was trained.
    """

    description = Description("tiny-words", "speech", 1, WIDTH, 0, KNOWN_WORDS, LICENCE)
    table: Tensor
    places: Tensor

    def __init__(self, words: tuple[str, ...], longest: int = 64) -> None:
        super().__init__()
        self.index = {word: i for i, word in enumerate(words)}
        generator = torch.Generator().manual_seed(0)
        table = torch.randn(len(words), WIDTH, generator=generator)
        self.register_buffer("table", table)
        angle = torch.arange(longest)[:, None] / 10_000 ** torch.linspace(0, 1, WIDTH // 2)
        places = torch.cat((angle.sin(), angle.cos()), 1)
        self.register_buffer("places", places, persistent=False)

    def forward(self, words: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """words: int64 [batch, longest of them], whatever where padded; lengths: int64 [batch].

        Returns states [batch, 1, words, 128], zero beyond the lengths, and the lengths.
        """
        kept = ~padding_mask(lengths, words.shape[1])[..., None]
        said = self.table[words] * kept
        states = with_neighbours(said, NEIGHBOUR) + self.places[: words.shape[1]]
        return (states * kept)[:, None], lengths

    def tokenise(self, texts: list[str]) -> Tensor:
        """Texts to int64 [batch, longest of them]. Raises KeyError for an unknown word."""
        return _numbers(texts, self.index)


def with_neighbours(tokens: Tensor, part: float) -> Tensor:
    """tokens: [batch, length, D] → each with that part of the token before and the one after."""
    total = tokens.clone()
    total[:, 1:] += part * tokens[:, :-1]
    total[:, :-1] += part * tokens[:, 1:]
    return total


def _numbers(texts: list[str], index: dict[str, int]) -> Tensor:
    rows = [torch.tensor([index[word] for word in text.split()]) for text in texts]
    return nn.utils.rnn.pad_sequence(rows, batch_first=True)


def untrained(name: str) -> nn.Module:
    """The same architecture at random weights, to measure what it takes.

    Raises InputError for the words, which take nothing.
    """
    if name == "tiny-words":
        raise InputError(f"{name}: looks words up in a table, so there is nothing to measure")
    return TinyImageEncoder() if name == "tiny-image" else TinySpeechEncoder()


def open_tiny(name: str, weights: str) -> nn.Module:
    """A tiny encoder by its name; `weights`: a file of others than those shipped here.

    Raises InputError for a file that does not hold them.
    """
    if name == "tiny-words":
        if weights:
            raise InputError(f"{weights}: {name} has no weights; leave speech_weights empty")
        return TinyWordEncoder(vocabulary())
    if name == "tiny-text":
        return load_tiny(name, weights, TinyTextEncoder)
    return load_tiny(name, weights, lambda _: untrained(name))


def load_tiny(name: str, weights: str, make: Callable[[tuple[str, ...]], nn.Module]) -> nn.Module:
    """What `make` makes of the words that a text encoder's file holds, with the file's weights.

    Raises InputError for a file that does not hold them.
    """
    file = Path(weights) if weights else WEIGHTS / f"{name}.safetensors"
    tensors = read_weights(file).tensors
    try:
        words = bytes(tensors.pop("words", torch.zeros(0, dtype=torch.uint8)).tolist()).decode()
        module = make(tuple(words.split()))
        module.load_state_dict({key: value.float() for key, value in tensors.items()})
    except (ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(
            f"{file}: holds no weights of {name} ({reason}); train them by pretrain_encoders.ipynb"
        ) from error
    return module

"""Frozen encoders by name. Each turns captions or images into features, once; see `store.py`."""

import hashlib
import importlib.metadata
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from cmdlab.corpora import Caption, Image, read_image, read_speech
from cmdlab.encoders.tiny import TinyImageEncoder, TinySpeechEncoder, TinyTextEncoder
from cmdlab.errors import InputError

WEIGHTS = Path(__file__).parent / "weights"
IMAGE, SPEECH, TEXT = "tiny-image", "tiny-speech", "tiny-text"
LIBRARIES = ("torch", "torchaudio", "numpy", "scipy", "pillow", "soundfile")  # decode and compute
BATCH = 16  # what stays in a core's cache


@dataclass(frozen=True)
class Hearing:
    """How speech is degraded before it is encoded: an SNR drawn from a range (dB), and a room."""

    snr_db: tuple[float, float] | None = (10.0, 30.0)
    reverberation: bool = True
    seed: int = 0


@dataclass(frozen=True)
class Encoded:
    """One item: tokens float16 [tokens, layers, width] and a unit-norm embedding float32 [D].

    An encoder without tokens or without an embedding gives an array with no elements.
    """

    tokens: np.ndarray
    embedding: np.ndarray


@dataclass(frozen=True)
class Intake:
    """What an encoder takes: items of one kind, in words, and whether it can take a piece of one.

    The piece is a picture's (width, height) or a text's word; `read_audio` gives one kind of sound.
    """

    kind: Literal["images", "speech", "text"]
    words: str
    takes: Callable[[Any], bool]

    def is_for(self, item: object) -> bool:
        return isinstance(item, Image if self.kind == "images" else Caption)


def _is_known(word: str) -> bool:
    return word in tiny_encoder(TEXT).index


INTAKES = {
    IMAGE: Intake("images", "64 × 64 pixels", lambda size: size == (64, 64)),
    SPEECH: Intake("speech", "speech at 16 kHz", lambda _: True),
    TEXT: Intake("text", "the words of SpokenScenes", _is_known),
}


def encoders_for(kind: str, pieces: Counter[Any]) -> str:
    """A line on who takes all these pieces of a corpus, and what hinders the other encoders."""
    takers, others = [], []
    for name, intake in INTAKES.items():
        if intake.kind != kind:
            continue
        refused = Counter({piece: n for piece, n in pieces.items() if not intake.takes(piece)})
        if refused:
            others.append(
                f"{name} takes {intake.words}, and {refused.total():,} of {pieces.total():,} are "
                f"others, mostly {_shown(refused.most_common(1)[0][0])}"
            )
        else:
            takers.append(name)
    return "; ".join([f"encoders for its {kind}: {', '.join(takers) or 'none'}", *others])


def _refusal(name: str, given: str, able: list[str], remedy: str) -> str:
    """Why an encoder cannot take something, and which can or, where none can, what to do."""
    others = f"{' or '.join(able)} takes it" if able else f"no encoder here takes it: {remedy}"
    return f"{name} takes {INTAKES[name].words}, not {given}; {others}"


def _takers(kind: str, piece: Any) -> list[str]:
    return [name for name, one in INTAKES.items() if one.kind == kind and one.takes(piece)]


def _shown(piece: Any) -> str:
    return f"{piece[0]} × {piece[1]}" if isinstance(piece, tuple) else repr(piece)


def encode(
    name: str, items: Sequence[Caption] | Sequence[Image], hearing: Hearing
) -> list[Encoded]:
    """Features of captions (tiny-speech: their sound, tiny-text: their text) or of images.

    Raises InputError for an unknown name, for media that cannot be read, and for what the encoder
    does not take (`INTAKES`), saying which encoders do.
    """
    encoders = {IMAGE: _encode_images, SPEECH: _encode_speech, TEXT: _encode_texts}
    if name not in encoders:
        raise InputError(f"no encoder {name!r}; there are {', '.join(encoders)}")
    for item in items:
        if not INTAKES[name].is_for(item):
            able = [other for other, intake in INTAKES.items() if intake.is_for(item)]
            given = f"an item of type {type(item).__name__}"
            raise InputError(_refusal(name, given, able, "give captions or images"))
    with torch.inference_mode():
        return encoders[name](items, hearing)  # type: ignore[operator]


def fingerprint(name: str, hearing: Hearing) -> dict[str, Any]:
    """All that an encoder's output depends on besides the corpus and the processor."""
    weights = (WEIGHTS / f"{name}.safetensors").read_bytes()
    here, corpora = Path(__file__), Path(__file__).parents[1] / "corpora"
    modules = [here, here.with_name("tiny.py"), corpora / "audio.py", corpora / "images.py"]
    source = b"".join(module.read_bytes() for module in modules)
    return {
        "encoder": name,
        "weights": hashlib.sha256(weights).hexdigest(),
        "source": hashlib.sha256(source).hexdigest(),
        "versions": {library: importlib.metadata.version(library) for library in LIBRARIES},
        "hearing": asdict(hearing) if name == SPEECH else None,
    }


@cache
def tiny_encoder(name: str) -> Any:
    """The trained encoder, in evaluation mode."""
    from safetensors.torch import load_file

    weights = load_file(WEIGHTS / f"{name}.safetensors")
    module: nn.Module
    if name == TEXT:
        words = bytes(weights.pop("words").tolist()).decode().split()
        module = TinyTextEncoder(tuple(words))
    else:
        module = TinyImageEncoder() if name == IMAGE else TinySpeechEncoder()
    module.load_state_dict({key: value.float() for key, value in weights.items()})
    return module.eval().requires_grad_(False)


def _encode_images(images: Sequence[Image], _: Hearing) -> list[Encoded]:
    encoded = []
    for first in range(0, len(images), BATCH):
        batch = images[first : first + BATCH]
        pixels = [read_image(image.path) for image in batch]
        for image, picture in zip(batch, pixels, strict=True):
            size = picture.shape[1::-1]
            if not INTAKES[IMAGE].takes(size):
                able = _takers("images", size)
                raise InputError(
                    f"{image.path}: {_refusal(IMAGE, _shown(size), able, 'resize it')}"
                )
        tokens, embeddings = tiny_encoder(IMAGE)(torch.from_numpy(np.stack(pixels)))
        encoded += [
            Encoded(t.half().numpy()[:, None], e.numpy())
            for t, e in zip(tokens, embeddings, strict=True)
        ]
    return encoded


def _encode_speech(captions: Sequence[Caption], hearing: Hearing) -> list[Encoded]:
    sounds = [
        torch.from_numpy(
            read_speech(
                caption,
                snr_db=hearing.snr_db,
                reverberation=hearing.reverberation,
                seed=hearing.seed,
            )
        )
        for caption in captions
    ]
    encoded: dict[int, Encoded] = {}
    order = sorted(range(len(sounds)), key=lambda i: len(sounds[i]))  # little padding
    for first in range(0, len(order), BATCH):
        chosen = order[first : first + BATCH]
        lengths = torch.tensor([len(sounds[i]) for i in chosen])
        padded = nn.utils.rnn.pad_sequence([sounds[i] for i in chosen], batch_first=True)
        states, tokens = tiny_encoder(SPEECH)(padded, lengths)
        for i, state, count in zip(chosen, states.transpose(1, 2), tokens.tolist(), strict=True):
            encoded[i] = Encoded(state[:count].half().numpy(), np.zeros(0, np.float32))
    return [encoded[i] for i in range(len(captions))]


def _encode_texts(captions: Sequence[Caption], _: Hearing) -> list[Encoded]:
    encoder: TinyTextEncoder = tiny_encoder(TEXT)
    for caption in captions:
        unknown = [word for word in caption.text.split() if word not in encoder.index]
        if unknown:
            able = _takers("text", unknown[0])
            reason = _refusal(TEXT, repr(unknown[0]), able, "use other words")
            raise InputError(f"{caption.id}: {reason}")
    embeddings: Tensor = encoder(encoder.tokenise([caption.text for caption in captions]))
    return [Encoded(np.zeros((0, 1, 1), np.float16), e.numpy()) for e in embeddings]

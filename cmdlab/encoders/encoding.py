"""Frozen encoders by name. Each turns captions or images into features, once; see `store.py`."""

import hashlib
import importlib
import importlib.metadata
import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from cmdlab.corpora import (
    RAY,
    RAYS,
    SAMPLE_RATE,
    Caption,
    Image,
    read_audio,
    read_image,
    read_speech,
)
from cmdlab.encoders.encoder import Description, Encoded, Hearing, Kind
from cmdlab.encoders.scans import RANGE_SCANS
from cmdlab.encoders.tiny import KNOWN_WORDS, WEIGHTS, TinyTextEncoder, TinyWordEncoder
from cmdlab.encoders.weight_files import weights_sha256
from cmdlab.errors import InputError, nearest

Items = Sequence[Caption] | Sequence[Image] | Sequence[Caption | Image]
LIBRARIES = ("torch", "torchaudio", "numpy", "scipy", "pillow", "soundfile")  # decode and compute
BATCH = 16  # what stays in a core's cache
GPU_BATCH = 64


@dataclass(frozen=True)
class Encoder:
    """A frozen encoder, by its name and the file or folder of its weights.

    Without `weights` they are those shipped here, or what the encoder's library downloads. `layers`
    chooses some of the states of a speech encoder's tokens, by their numbers from 0; none chooses
    all.
    Raises InputError for a name that there is not.
    """

    name: str
    weights: str = ""
    layers: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.name not in FAMILIES:
            names = list(FAMILIES)
            raise InputError(
                f"no encoder {self.name!r}{nearest(self.name, names)}; there are {', '.join(names)}"
            )

    def __str__(self) -> str:
        return self.name

    @property
    def kind(self) -> Kind:
        return FAMILIES[self.name].kind

    @property
    def description(self) -> Description:
        """What the encoder says of itself. Raises InputError for layers that it does not have."""
        described: Description = self.open().description
        if not self.layers:
            return described
        beyond = [i for i in self.layers if not 0 <= i < described.layers]
        if beyond or self.kind != "speech":
            raise InputError(
                f"layers: {self.name} has no {beyond or self.layers}; speech encoders have some, "
                f"this one 0 to {described.layers - 1}"
            )
        return replace(described, layers=len(self.layers))

    def open(self, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Any:
        """The network with its weights, in evaluation mode and without gradients; kept once open.

        Raises InputError for weights that are not there or do not fit.
        """
        return _open(self, device, dtype)

    @property
    def text(self) -> "Encoder | None":
        """The text encoder of an image encoder's own space, where there is one here."""
        return None if self.weights else TEXT_OF.get(self.name)


@dataclass(frozen=True)
class Family:
    """What can be said of an encoder without its weights, and where it is written.

    `kind` is the side of a pair on which it stands, `reads` what it reads there; echoes are sound
    that is never degraded. `takes` tells whether it can take a piece of an item: a picture's
    (width, height), a text's word, or the number of samples of echoes; `read_audio` gives one kind
    of sound. `opener` is a function of that module, called with the
    encoder's name and weights. `library` is one that its output depends on beside `LIBRARIES`.
    """

    kind: Kind
    reads: Literal["pixels", "sound", "words", "echoes"]
    takes_in_words: str
    takes: Callable[[Any], bool]
    module: str
    opener: str
    library: str | None = None

    def is_for(self, item: object) -> bool:
        return isinstance(item, Image if self.kind == "images" else Caption)


def _is_known(word: str) -> bool:
    return word in TEXT.open().index


def _anything(_: Any) -> bool:
    return True


_HUBERT = Family("speech", "sound", "speech at 16 kHz", _anything, "hubert", "open_hubert")
_CLIP = Family(
    *("images", "pixels", "photographs of any size", _anything),
    *("clip", "open_clip_encoder", "open_clip_torch"),
)
FAMILIES = {
    "tiny-image": Family(
        *("images", "pixels", "64 × 64 pixels", lambda size: size == (64, 64)),
        *("tiny", "open_tiny"),
    ),
    "tiny-bindings": Family(
        *("images", "pixels", "64 × 64 pixels", lambda size: size == (64, 64)),
        *("bindings", "open_bindings"),
    ),
    "tiny-speech": Family("speech", "sound", "speech at 16 kHz", _anything, "tiny", "open_tiny"),
    "tiny-words": Family("speech", "words", KNOWN_WORDS, _is_known, "tiny", "open_tiny"),
    "tiny-text": Family("text", "words", KNOWN_WORDS, _is_known, "tiny", "open_tiny"),
    "tiny-bindings-text": Family(
        *("text", "words", KNOWN_WORDS, _is_known, "bindings", "open_bindings")
    ),
    "tiny-scan": Family(
        *("speech", "echoes", RANGE_SCANS, lambda samples: samples == RAY * RAYS),
        *("scans", "open_scans"),
    ),
    **dict.fromkeys(("hubert-base", "hubert-large", "wavlm-base-plus", "wavlm-large"), _HUBERT),
    **dict.fromkeys(("clip-vit-b-32", "clip-vit-b-16", "clip-vit-l-14"), _CLIP),
    **dict.fromkeys((f"clip-vit-{size}-laion2b" for size in ("b-32", "b-16", "l-14")), _CLIP),
}
IMAGE, SPEECH, TEXT = Encoder("tiny-image"), Encoder("tiny-speech"), Encoder("tiny-text")
TEXT_OF = {"tiny-image": TEXT, "tiny-bindings": Encoder("tiny-bindings-text")}


@cache
def _open(encoder: Encoder, device: str, dtype: torch.dtype) -> nn.Module:
    family = FAMILIES[encoder.name]
    opener = getattr(importlib.import_module(f"cmdlab.encoders.{family.module}"), family.opener)
    network: nn.Module = opener(encoder.name, encoder.weights)
    return network.to(device, dtype).eval().requires_grad_(False)


def untrained(name: str) -> Any:
    """An encoder's architecture at random weights, to measure what it takes."""
    module = importlib.import_module(f"cmdlab.encoders.{FAMILIES[name].module}")
    return module.untrained(name).eval().requires_grad_(False)


def encoders_for(part: str, pieces: Counter[Any]) -> str:
    """A line on who takes all these pieces of a corpus' part ("images", "speech" or "text"), and
    what hinders the other encoders."""
    reads = {"images": "pixels", "speech": "sound", "text": "words"}[part]
    takers: list[str] = []
    others: dict[str, list[str]] = {}  # what hinders, and whom
    for name, family in FAMILIES.items():
        if family.reads != reads:
            continue
        refused = Counter({piece: n for piece, n in pieces.items() if not family.takes(piece)})
        if refused:
            hinders = (
                f"{family.takes_in_words}, and {refused.total():,} of {pieces.total():,} are "
                f"others, mostly {_shown(refused.most_common(1)[0][0])}"
            )
            others.setdefault(hinders, []).append(name)
        else:
            takers.append(name)
    told = [
        f"{', '.join(names)} {'takes' if len(names) == 1 else 'take'} {hinders}"
        for hinders, names in others.items()
    ]
    return "; ".join([f"encoders for its {part}: {', '.join(takers) or 'none'}", *told])


def _refusal(name: str, given: str, able: list[str], remedy: str) -> str:
    """Why an encoder cannot take something, and which can or, where none can, what to do."""
    others = f"no encoder here takes it: {remedy}"
    if able:
        others = f"{', '.join(able)} {'takes' if len(able) == 1 else 'take'} it"
    return f"{name} takes {FAMILIES[name].takes_in_words}, not {given}; {others}"


def _takers(kind: Kind, piece: Any) -> list[str]:
    return [name for name, one in FAMILIES.items() if one.kind == kind and one.takes(piece)]


def _shown(piece: Any) -> str:
    return f"{piece[0]} × {piece[1]}" if isinstance(piece, tuple) else repr(piece)


def encode(
    encoder: Encoder,
    items: Items,
    hearing: Hearing,
    device: str = "cpu",
) -> list[Encoded]:
    """Features of captions (their sound, or for a text encoder their text) or of images.

    Raises InputError for media that cannot be read, and for what the encoder does not take, saying
    which encoders do.
    """
    inputs = read_inputs(encoder, items, hearing)
    refuse_short(encoder, items, inputs)
    return compute(encoder, inputs, device)


def read_inputs(encoder: Encoder, items: Items, hearing: Hearing) -> list[Tensor]:
    """What the network reads of each item: a waveform, a picture's pixels, or the words' numbers.

    Raises InputError as `encode` does.
    """
    for item in items:
        if not FAMILIES[encoder.name].is_for(item):
            able = [other for other, family in FAMILIES.items() if family.is_for(item)]
            given = f"an item of type {type(item).__name__}"
            raise InputError(_refusal(encoder.name, given, able, "give captions or images"))
    if encoder.kind == "images":
        return [_pixels(encoder, image) for image in items]  # type: ignore[arg-type]
    if FAMILIES[encoder.name].reads == "words":
        return [_words(encoder, caption) for caption in items]  # type: ignore[arg-type]
    if FAMILIES[encoder.name].reads == "echoes":
        return [_echoes(encoder, caption) for caption in items]  # type: ignore[arg-type]
    return [torch.from_numpy(_sound(caption, hearing)) for caption in items]  # type: ignore[arg-type]


def refuse_short(encoder: Encoder, items: Items, inputs: Sequence[Tensor]) -> None:
    """Raises InputError for the first of what `read_inputs` gave that the encoder cannot take: a
    clip that is too short for one token. It names the file, which the network does not know."""
    shortest = encoder.description.shortest
    for item, sound in zip(items, inputs, strict=True):
        if isinstance(item, Caption) and len(sound) < shortest:
            raise InputError(
                f"{item.audio}: lasts {1e3 * len(sound) / SAMPLE_RATE:.3g} ms, and {encoder} takes "
                f"{1e3 * shortest / SAMPLE_RATE:.3g} ms or more; replace it or remove its entry"
            )


def compute(encoder: Encoder, inputs: list[Tensor], device: str = "cpu") -> list[Encoded]:
    """What the network makes of what `read_inputs` gave, in the same order.

    Items of like length are computed together, so that there is little padding.
    """
    network = encoder.open(device)
    encoded: list[Encoded | None] = [None] * len(inputs)
    order = sorted(range(len(inputs)), key=lambda i: len(inputs[i]))
    size = BATCH if device == "cpu" else GPU_BATCH
    for first in range(0, len(order), size):
        chosen = order[first : first + size]
        batch = [inputs[i] for i in chosen]
        with torch.inference_mode():
            for i, one in zip(chosen, _compute_batch(encoder, network, batch, device), strict=True):
                encoded[i] = one
    return encoded  # type: ignore[return-value]


def _compute_batch(
    encoder: Encoder, network: Any, batch: list[Tensor], device: str
) -> list[Encoded]:
    if encoder.kind == "images":
        tokens, embeddings = network(torch.stack(batch).to(device))
        half, embeddings = tokens.half().cpu().numpy()[:, :, None], embeddings.cpu().numpy()
        return [Encoded(t, e) for t, e in zip(half, embeddings, strict=True)]
    padded = nn.utils.rnn.pad_sequence(batch, batch_first=True).to(device)
    if encoder.kind == "text":
        no_tokens = np.zeros((0, 1, 1), np.float16)
        return [Encoded(no_tokens, e) for e in network(padded).cpu().numpy()]
    lengths = torch.tensor([len(one) for one in batch], device=device)
    states, tokens = network(padded, lengths)
    if encoder.layers:
        states = states[:, list(encoder.layers)]
    half, none = states.transpose(1, 2).half().cpu().numpy(), np.zeros(0, np.float32)
    return [Encoded(one[:count], none) for one, count in zip(half, tokens.tolist(), strict=True)]


def _pixels(encoder: Encoder, image: Image) -> Tensor:
    picture = read_image(image.path)
    size = picture.shape[1::-1]
    if not FAMILIES[encoder.name].takes(size):
        refusal = _refusal(encoder.name, _shown(size), _takers("images", size), "resize it")
        raise InputError(f"{image.path}: {refusal}")
    try:
        return encoder.open().pixels(picture)
    except InputError as error:  # it does not know the file
        raise InputError(f"{image.path}: {error}") from error


def _sound(caption: Caption, hearing: Hearing) -> np.ndarray:
    return read_speech(
        caption, snr_db=hearing.snr_db, reverberation=hearing.reverberation, seed=hearing.seed
    )


def _echoes(encoder: Encoder, caption: Caption) -> Tensor:
    samples = read_audio(caption.audio)
    if not FAMILIES[encoder.name].takes(len(samples)):
        given, able = f"{len(samples):,} samples", _takers(encoder.kind, len(samples))
        raise InputError(f"{caption.audio}: {_refusal(encoder.name, given, able, '')}")
    return torch.from_numpy(samples)


def _words(encoder: Encoder, caption: Caption) -> Tensor:
    network: TinyTextEncoder | TinyWordEncoder = encoder.open()
    unknown = [word for word in caption.text.split() if word not in network.index]
    if unknown:
        able = _takers(encoder.kind, unknown[0])
        reason = _refusal(encoder.name, repr(unknown[0]), able, "use other words")
        raise InputError(f"{caption.id}: {reason}")
    return network.tokenise([caption.text])[0]


def fingerprint(encoder: Encoder, hearing: Hearing) -> dict[str, Any]:
    """All that an encoder's output depends on besides the corpus and the processor."""
    family = FAMILIES[encoder.name]
    here, corpora = Path(__file__), Path(__file__).parents[1] / "corpora"
    own = {"tiny", family.module, "weight_files"}  # the others pad as tiny.py does
    modules = [here, *(here.with_name(f"{name}.py") for name in sorted(own))]
    modules += [corpora / "audio.py", corpora / "images.py"]
    source = b"".join(module.read_bytes() for module in modules)
    libraries = [*LIBRARIES, *([family.library] if family.library else [])]
    return {
        "encoder": encoder.name,
        "layers": encoder.layers,
        "weights": weights_of(encoder),
        "source": hashlib.sha256(source).hexdigest(),
        "versions": {library: importlib.metadata.version(library) for library in libraries},
        "hearing": asdict(hearing) if family.reads == "sound" else None,
    }


def weights_of(encoder: Encoder) -> str:
    """The SHA-256 of an encoder's weights: of their file, or of what its library has downloaded."""
    if encoder.weights:
        return weights_sha256(Path(encoder.weights))
    shipped = WEIGHTS / f"{encoder.name}.safetensors"
    if shipped.is_file():
        return hashlib.sha256(shipped.read_bytes()).hexdigest()
    return _hash_of_tensors(encoder)


@cache
def _hash_of_tensors(encoder: Encoder) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(encoder.open().state_dict().items()):
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()

"""One call from a sound or a picture to its vector: a trained model with its frozen encoders."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from cmdlab.corpora import (
    BadEntry,
    bytes_of,
    decode_picture,
    decode_sound,
    to_picture,
    to_speech,
)
from cmdlab.encoders import Encoded, Encoder, compute, weights_of
from cmdlab.errors import InputError
from cmdlab.retrieval import RetrievalModel

BATCH = 64  # media that are held at a time

Sound = Path | str | tuple[ArrayLike, int]
"""A sound file; or samples, [samples] or [samples, channels], with their rate in Hz."""
Picture = Path | str | Image.Image
"""A picture file, or one that Pillow holds open."""
Medium = TypeVar("Medium")


class Retriever:
    """A trained model and the frozen encoders that it belongs to.

    Vectors are float32 [D] of unit norm in one space: how well a sound and a picture fit is their
    dot product. A medium's vector does not depend on what else is embedded with it, but for the
    order in which sums are rounded.

    Sound may be of any kind that libsndfile reads, at any rate, of any number of channels: it is
    mixed down and resampled to 16 kHz. Pictures may be of any kind and size that Pillow reads. For
    an encoder that takes squares of one size alone, as the tiny one does, the square in the middle
    is resized to it (`description.side`): what stands beside it is not seen.
    """

    def __init__(
        self,
        model: Path | str,
        *,
        device: str = "cpu",
        speech_weights: str = "",
        image_weights: str = "",
    ) -> None:
        """model: a module that ships, by its name, or the folder of a trained model. device: "cpu"
        or a GPU as torch names it. speech_weights, image_weights: files or folders of the
        encoders' weights, where they are neither shipped nor to be downloaded.

        Raises InputError for a model that does not say which encoders it belongs to, and for
        encoders whose weights are others.
        """
        self.device = device
        self.model = RetrievalModel.from_pretrained(model).to(device).eval()
        self.speech_encoder = self._encoder("speech", str(model), speech_weights)
        self.image_encoder = self._encoder("image", str(model), image_weights)

    def _encoder(self, kind: str, model: str, weights: str) -> Encoder:
        if kind not in self.model.encoders:
            raise InputError(
                f"{model}: does not say which frozen encoders it belongs to; train it again"
            )
        frozen = self.model.encoders[kind]
        encoder = Encoder(frozen.name, weights, frozen.layers)
        if kind == "speech" and encoder.description.tokens_per_second is None:
            raise InputError(
                f"{model}: was trained on {encoder}, which reads words and hears no sound; take a "
                "model of a speech encoder"
            )
        found = weights_of(encoder)
        if found != frozen.sha256:
            raise InputError(
                f"{model}: was trained on {frozen.name} with weights {frozen.sha256[:12]}…, and "
                f"{weights or 'those at hand'} are {found[:12]}…; give the same file or folder as "
                f"in training, by {kind}_weights"
            )
        return encoder

    @property
    def dimension(self) -> int:
        """D, of the vectors."""
        return self.model.shape.embedding

    def embed_speech(
        self, sound: Path | str | ArrayLike, rate: int | None = None
    ) -> NDArray[np.float32]:
        """The vector [D] of a sound file, or of samples at `rate` Hz, [samples] or
        [samples, channels], floats within [-1, 1] or whole numbers of their type's range.

        Raises InputError for what is no sound, too long, empty or not finite.
        """
        if isinstance(sound, Path | str):
            return self.embed_recordings([sound])[0]
        if rate is None:
            raise InputError("samples are given without their rate; give it in Hz")
        return self.embed_recordings([(sound, rate)])[0]

    def embed_image(self, picture: Picture) -> NDArray[np.float32]:
        """The vector [D] of a picture. Raises InputError for what is none, or too large."""
        return self.embed_images([picture])[0]

    def embed_recordings(
        self, sounds: Sequence[Sound], *, progress: bool = False
    ) -> NDArray[np.float32]:
        """The vectors [N, D] of sounds, in their order; progress: a bar on standard error.

        Raises InputError, which names the file or the place, for the first that is no sound.
        """
        return self._embed(sounds, self._hear, self._embed_waveforms, progress, "recordings")

    def embed_images(
        self, pictures: Sequence[Picture], *, progress: bool = False
    ) -> NDArray[np.float32]:
        """The vectors [M, D] of pictures, likewise."""
        return self._embed(pictures, self._see, self._embed_pixels, progress, "pictures")

    def _embed(
        self,
        media: Sequence[Medium],
        read: Callable[[Medium], Tensor],
        embed: Callable[[list[Tensor]], Tensor],
        progress: bool,
        unit: str,
    ) -> NDArray[np.float32]:
        vectors = np.zeros((len(media), self.dimension), np.float32)
        with tqdm(total=len(media), desc="embedding", unit=f" {unit}", disable=not progress) as bar:
            for first in range(0, len(media), BATCH):
                inputs = []
                for place, medium in enumerate(media[first : first + BATCH], first + 1):
                    try:
                        inputs.append(read(medium))
                    except BadEntry as error:
                        name = medium if isinstance(medium, Path | str) else f"{unit}: no. {place}"
                        raise InputError(f"{name}: {error}") from error
                with torch.inference_mode():
                    vectors[first : first + len(inputs)] = embed(inputs).cpu().numpy()
                bar.update(len(inputs))
        return vectors

    def _hear(self, sound: Sound) -> Tensor:
        """float32 [samples] at 16 kHz."""
        if isinstance(sound, Path | str):
            return torch.from_numpy(decode_sound(bytes_of(Path(sound))))
        return torch.from_numpy(to_speech(*sound))

    def _see(self, picture: Picture) -> Tensor:
        """What the image encoder reads of a picture."""
        network = self.image_encoder.open(self.device)
        side = network.description.side
        if isinstance(picture, Image.Image):
            seen = to_picture(picture, side=side)
        else:
            seen = decode_picture(bytes_of(Path(picture)), side=side)
        pixels: Tensor = network.pixels(np.asarray(seen))
        return pixels

    def _embed_waveforms(self, waveforms: list[Tensor]) -> Tensor:
        encoded = compute(self.speech_encoder, waveforms, self.device)
        states, lengths = self._tokens(encoded)
        vectors: Tensor = self.model.speech_head(states, lengths)[1]
        return vectors

    def _embed_pixels(self, pixels: list[Tensor]) -> Tensor:
        encoded = compute(self.image_encoder, pixels, self.device)
        states, _ = self._tokens(encoded)
        patches = states[0].unflatten(0, (len(pixels), -1))
        frozen = torch.from_numpy(np.stack([one.embedding for one in encoded])).to(self.device)
        vectors: Tensor = self.model.image_head(patches, frozen)[1]
        return vectors

    def _tokens(self, encoded: list[Encoded]) -> tuple[Tensor, Tensor]:
        """As a feature store gives them: float32 [layers, all tokens, width]; int64 lengths."""
        tokens = torch.from_numpy(np.concatenate([one.tokens for one in encoded]))
        lengths = torch.tensor([len(one.tokens) for one in encoded], device=self.device)
        return tokens.to(self.device).float().transpose(0, 1).contiguous(), lengths

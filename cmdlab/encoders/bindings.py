"""The tiny image and text encoders with embeddings that tell what belongs to what.

A mean over patches says that red and circles are there, not that a circle is red: of "a red circle
and a blue star" and "a blue circle and a red star" it is the same. A mean of random rectified
features of the patches (Rahimi & Recht 2007; Cho & Saul 2009) keeps what is there together, since
a product of two things that a patch shows is no sum of what each would give. Whitened principal
components (Jégou & Chum 2012) bring it back to the width of the shared space.

Nothing here is trained by gradients: `fit_bindings` takes means and components of pre-training
scenes, for weights of the tiny encoders that stay as they are.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize, relu

from cmdlab.encoders.encoder import Description
from cmdlab.encoders.tiny import (
    EMBEDDING,
    IMAGE_GRID,
    KNOWN_WORDS,
    LICENCE,
    WIDTH,
    TinyImageEncoder,
    TinyTextEncoder,
    load_tiny,
    with_neighbours,
)

FEATURES = 2_048  # random ones of a token
THRESHOLD = 1.0  # of a feature, in standard deviations: about one in six is above zero


class Bindings(nn.Module):
    """Tokens of the tiny encoders' shared space into one in which their mean keeps conjunctions."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(EMBEDDING))
        self.register_buffer("directions", torch.zeros(EMBEDDING, FEATURES, dtype=torch.int8))
        self.register_buffer("centre", torch.zeros(FEATURES))
        self.register_buffer("components", torch.zeros(FEATURES, EMBEDDING))

    mean: Tensor
    directions: Tensor  # signs
    centre: Tensor
    components: Tensor

    def features(self, tokens: Tensor) -> Tensor:
        """tokens: [..., 256] → random features [..., 2,048], none below zero."""
        angles = normalize(tokens - self.mean, dim=-1) @ self.directions.to(tokens.dtype)
        return relu(angles - THRESHOLD)

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens: [..., 256] → [..., 256]; what they say together is the mean of these."""
        return (self.features(tokens) - self.centre) @ self.components


class BindingImageEncoder(TinyImageEncoder):
    """`TinyImageEncoder`, with its very tokens and another embedding."""

    description = Description(
        *("tiny-bindings", "images", 1, WIDTH, EMBEDDING, "64 × 64 pixels", LICENCE),
        grid=(IMAGE_GRID, IMAGE_GRID),
        side=64,
    )

    def __init__(self) -> None:
        super().__init__()
        self.bindings = Bindings()

    def project(self, tokens: Tensor) -> Tensor:
        """Patch tokens [..., 128] into the shared space, not normalised."""
        return self.bindings(super().project(tokens))


class BindingTextEncoder(TinyTextEncoder):
    """`TinyTextEncoder` in the space of `BindingImageEncoder`. A word is taken with its neighbours,
    since what belongs together in a scene stands together in its caption."""

    description = Description(
        *("tiny-bindings-text", "text", 1, 1, EMBEDDING, KNOWN_WORDS, LICENCE)
    )

    def __init__(self, words: tuple[str, ...]) -> None:
        super().__init__(words)
        self.bindings = Bindings()

    def tokens(self, words: Tensor) -> Tensor:
        """words: int64 [batch, length], 0 for padding → [batch, length, 256] in the shared space;
        whatever where padded."""
        return self.bindings(self.phrases(words))

    def phrases(self, words: Tensor) -> Tensor:
        """Each contextual word's mean with the word before and the word after: [batch, length,
        256], in the tiny encoders' shared space."""
        kept = (words != 0)[..., None].float()
        tokens = normalize(super().tokens(words), dim=-1) * kept
        return with_neighbours(tokens, 1.0) / with_neighbours(kept, 1.0).clamp(min=1)


def untrained(name: str) -> nn.Module:
    """The image encoder's architecture at random weights, to measure what it takes."""
    return BindingImageEncoder()


def open_bindings(name: str, weights: str) -> nn.Module:
    """Either encoder by its name; `weights`: a file of others than those shipped here.

    Raises InputError for a file that does not hold them.
    """
    is_text = name == "tiny-bindings-text"
    return load_tiny(name, weights, BindingTextEncoder if is_text else lambda _: untrained(name))


@torch.inference_mode()
def fit_bindings(
    image: TinyImageEncoder, text: TinyTextEncoder, pixels: Tensor, words: Tensor, *, seed: int = 0
) -> tuple[BindingImageEncoder, BindingTextEncoder]:
    """The two encoders for these weights, in evaluation mode.

    pixels: uint8 [n, 64, 64, 3] of n > 256 scenes, and words: int64 [n, length], a caption of each.
    The random directions are of the seed, the components of the scenes alone; each side has means
    of its own.
    """
    seeing, reading = BindingImageEncoder().eval(), BindingTextEncoder(text.words).eval()
    seeing.load_state_dict(image.state_dict(), strict=False)
    reading.load_state_dict(text.state_dict(), strict=False)
    signs = torch.randint(2, (EMBEDDING, FEATURES), generator=torch.Generator().manual_seed(seed))
    for encoder in (seeing, reading):
        encoder.bindings.directions.copy_(2 * signs - 1)

    patches = [image(part)[0] for part in pixels.split(250)]
    seeing.bindings.mean.copy_(image.project(torch.cat(patches)).mean((0, 1)))
    seen = torch.cat([_pooled_features(seeing, image.project(part), part) for part in patches])
    seeing.bindings.centre.copy_(seen.mean(0))
    variance, directions = torch.linalg.eigh(seen.double().T.cov())
    components = directions[:, -EMBEDDING:] / variance[-EMBEDDING:].sqrt()

    parts = words.split(250)
    kept = torch.cat([part.flatten() for part in parts]) != 0
    phrases = torch.cat([reading.phrases(part).flatten(0, 1) for part in parts])[kept]
    reading.bindings.mean.copy_(phrases.mean(0))
    said = [reading.bindings.features(part).sum(0) for part in phrases.split(10_000)]
    reading.bindings.centre.copy_(torch.stack(said).sum(0) / len(phrases))
    for encoder in (seeing, reading):
        encoder.bindings.components.copy_(components)
    return seeing, reading


def _pooled_features(seeing: BindingImageEncoder, projected: Tensor, patches: Tensor) -> Tensor:
    """What `TinyImageEncoder.forward` pools, one step before its last: [batch, 2,048]."""
    return (seeing.importance(patches).softmax(1) * seeing.bindings.features(projected)).sum(1)

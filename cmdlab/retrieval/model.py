"""The retrieval model: what is trained, and used at retrieval time, on top of the frozen encoders.

Nothing here knows of denoising: a model trained with it and one trained without are the same.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cmdlab.errors import InputError
from cmdlab.outputs import write_file
from cmdlab.shipped import model_folder

GROUP = 32  # captions that the speech head computes together on a CPU


@dataclass(frozen=True)
class Shape:
    """The sizes of a `RetrievalModel`, and which of two image heads it has."""

    speech_layers: int  # states of the frozen speech encoder
    speech_width: int
    image_width: int  # of a patch token
    embedding: int  # of the shared space
    heads: int = 4
    image_head: str = "global"  # or "patches"
    normalise_layers: bool = False  # each speech state has unit variance before they are mixed


@dataclass(frozen=True)
class Frozen:
    """Which frozen encoder a model was trained on: the SHA-256 of its weights, and which states of
    a speech encoder's tokens were kept, by their numbers; none means all."""

    name: str
    sha256: str
    layers: tuple[int, ...] = ()


class SpeechHead(nn.Module):
    """Frame tokens of every encoder layer → contextual tokens → one embedding.

    As in SpeechCLIP's parallel head (Shih et al. 2022), a softmax-weighted sum of the layers goes
    through one transformer layer. Its [CLS] token is left out: after a single layer it has read
    the frozen tokens alone. The embedding is a weighted mean of the contextual tokens instead, as
    an image's is of its patches.
    """

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        width = shape.speech_width
        self.layer_weights = nn.Parameter(torch.zeros(shape.speech_layers))
        self.normalise_layers = shape.normalise_layers
        self.transformer = nn.TransformerEncoderLayer(
            width,
            shape.heads,
            4 * width,
            dropout=0.0,
            activation="gelu",
            batch_first=True,
            norm_first=True,
        )
        self.norm = nn.LayerNorm(width)
        self.importance = nn.Linear(width, 1, bias=False)
        self.projection = nn.Linear(width, shape.embedding)

    def forward(self, states: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """states: [layers, all tokens, width], one caption's tokens after another's; lengths: int64
        [batch], the number of tokens of each caption, at least 1.

        Returns tokens [batch, longest, width], zero beyond the lengths, and embeddings
        [batch, embedding] of unit norm.
        """
        tokens = self.contextualise(self.mix(states, lengths), lengths)
        return tokens, self.pool(tokens, lengths)

    def mix(self, states: Tensor, lengths: Tensor) -> Tensor:
        """The softmax-weighted sum of layers [batch, longest, width], zero beyond the lengths."""
        if self.normalise_layers:
            states = nn.functional.layer_norm(states, states.shape[-1:])
        mixed = (self.layer_weights.softmax(0) @ states.flatten(1)).unflatten(0, states.shape[1:])
        return _pad(mixed, _valid(lengths, int(lengths.max())))

    def contextualise(self, mixed: Tensor, lengths: Tensor) -> Tensor:
        """Contextual tokens [batch, tokens, width] of what `mix` gave, zero beyond the lengths.

        What stands beyond a length has no part in them. This is the transformer layer's own
        forward, but for the padding, which is half of a batch: all but the attention is done to the
        valid tokens, side by side.
        """
        valid = _valid(lengths, mixed.shape[1])
        layer = self.transformer
        tokens = _Take.apply(mixed.flatten(0, 1), _places(valid))  # [all tokens, width]
        tokens = tokens + self._attend(layer.norm1(tokens), lengths)
        hidden = nn.functional.gelu(layer.linear1(layer.norm2(tokens)))
        return _pad(self.norm(tokens + layer.linear2(hidden)), valid)

    def _attend(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        """Each caption's self-attention, on [all tokens, width]; captions of like length together.

        On a CPU by plain products of matrices: there torch's fused attention takes twice as long at
        these sizes, forward and backward.
        """
        attention = self.transformer.self_attn
        projected = nn.functional.linear(
            tokens, attention.in_proj_weight, attention.in_proj_bias
        )  # [all tokens, 3 width]: query, key, value
        on_cpu = tokens.device.type == "cpu"
        groups = lengths.argsort(stable=True).split(GROUP if on_cpu else len(lengths))
        longest = [int(lengths[group[-1]]) for group in groups]
        rows = [len(group) * most for group, most in zip(groups, longest, strict=True)]
        # One group after another, each padded to its longest: where each token then stands.
        start, end = torch.empty_like(lengths), 0
        for group, most in zip(groups, longest, strict=True):
            start[group] = end + most * torch.arange(len(group), device=lengths.device)
            end += most * len(group)
        start -= lengths.cumsum(0) - lengths
        place = start.repeat_interleave(lengths, output_size=len(tokens))
        place += torch.arange(len(tokens), device=lengths.device)
        padded = projected.new_zeros(end, projected.shape[1]).index_copy_(0, place, projected)
        parts: list[Tensor] = []
        for group, most, part in zip(groups, longest, padded.split(rows), strict=True):
            part = part.view(len(group), most, 3, attention.num_heads, -1)
            query, key, value = part.permute(2, 0, 3, 1, 4)  # [group, heads, longest, head width]
            kept = _valid(lengths[group], most)[:, None, None]
            if on_cpu:
                scores = (query * query.shape[-1] ** -0.5) @ key.mT
                mixed = scores.masked_fill_(~kept, -torch.inf).softmax(-1) @ value
            else:
                mixed = nn.functional.scaled_dot_product_attention(query, key, value, kept)
            parts.append(mixed.transpose(1, 2).flatten(2).flatten(0, 1))
        return attention.out_proj(_Take.apply(torch.cat(parts), place))

    def pool(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        """Embeddings [batch, embedding] of unit norm of what `contextualise` gave."""
        beyond = ~_valid(lengths, tokens.shape[1])[..., None]
        importance = self.importance(tokens).masked_fill(beyond, -torch.inf)
        pooled = self.projection((importance.softmax(1) * tokens).sum(1))
        return nn.functional.normalize(pooled, dim=-1)


def _valid(lengths: Tensor, tokens: int) -> Tensor:
    """bool [batch, tokens]: which of them are no padding."""
    return torch.arange(tokens, device=lengths.device) < lengths[:, None]


def _places(valid: Tensor) -> Tensor:
    """Where the valid tokens stand when captions follow each other, int64 [all tokens]."""
    return valid.flatten().nonzero()[:, 0]


def _pad(tokens: Tensor, valid: Tensor) -> Tensor:
    """Tokens [all tokens, width] at the valid places of [batch, tokens, width], zeros elsewhere."""
    padded = tokens.new_zeros(valid.numel(), tokens.shape[1])
    return padded.index_copy_(0, _places(valid), tokens).unflatten(0, valid.shape)


class _Take(torch.autograd.Function):
    """Rows of a table, none of them twice: the gradient is put in its place and not added up."""

    @staticmethod
    def forward(ctx: Any, table: Tensor, place: Tensor) -> Tensor:
        ctx.save_for_backward(place)
        ctx.rows = len(table)
        return table.index_select(0, place)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (place,) = ctx.saved_tensors
        table = gradient.new_zeros(ctx.rows, gradient.shape[1])
        return table.index_copy_(0, place, gradient), None


class ImageHead(nn.Module):
    """The frozen encoder's global embedding as it is, or a light head that pools its patches."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        if shape.image_head not in ("global", "patches"):
            raise InputError(f"image_head: {shape.image_head!r} is neither 'global' nor 'patches'")
        self.pools_patches = shape.image_head == "patches"
        if self.pools_patches:
            width = shape.image_width
            self.mix = nn.Sequential(
                nn.LayerNorm(width), nn.Linear(width, width), nn.GELU(), nn.Linear(width, width)
            )
            self.importance = nn.Linear(width, 1)
            self.projection = nn.Linear(width, shape.embedding)

    def forward(self, patches: Tensor, embedding: Tensor) -> tuple[Tensor, Tensor]:
        """patches: [batch, patches, width]; embedding: [batch, embedding], the frozen one.

        Returns tokens [batch, patches, width] and embeddings [batch, embedding] of unit norm.
        """
        if not self.pools_patches:
            return patches, embedding
        tokens = self.contextualise(patches)
        pooled = (self.importance(tokens).softmax(1) * self.projection(tokens)).sum(1)
        return tokens, nn.functional.normalize(embedding + pooled, dim=-1)

    def contextualise(self, patches: Tensor) -> Tensor:
        """Tokens [batch, patches, width] of a head that pools patches."""
        return patches + self.mix(patches)


class RetrievalModel(nn.Module):
    """Both heads and the temperature of their contrastive training.

    `encoders` says which frozen encoders the heads belong to, under "speech" and "image". It is
    empty where that is not known, as in models saved before it was kept.
    """

    MAX_SCALE = 100.0  # the bound of 1 / temperature, as CLIP has it

    def __init__(self, shape: Shape, encoders: Mapping[str, Frozen] | None = None) -> None:
        super().__init__()
        self.shape = shape
        self.encoders = dict(encoders or {})
        self.speech_head = SpeechHead(shape)
        self.image_head = ImageHead(shape)
        self.log_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    @property
    def scale(self) -> Tensor:
        """1 / temperature, 0-d."""
        return self.log_scale.exp()

    @torch.no_grad()
    def bound_scale(self) -> None:
        """Bring the scale back to at most MAX_SCALE; called after each step of the optimiser.

        Were it bounded where it is used, it would have no gradient beyond and stay there.
        """
        self.log_scale.clamp_(max=math.log(self.MAX_SCALE))

    def save_pretrained(self, folder: Path) -> None:
        """Write `model.safetensors` and `model.json`."""
        from safetensors.torch import save

        weights = {name: value.contiguous() for name, value in self.state_dict().items()}
        write_file(folder / "model.safetensors", save(weights))
        description = asdict(self.shape)
        if self.encoders:
            description["encoders"] = {kind: asdict(one) for kind, one in self.encoders.items()}
        write_file(folder / "model.json", json.dumps(description, indent=1) + "\n")

    @classmethod
    def from_pretrained(cls, source: Path | str) -> "RetrievalModel":
        """Read what `save_pretrained` wrote: a module that ships, by its name, or a folder.

        `model_folder` says which is which. Raises InputError where there is neither, and where the
        files do not fit.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        folder = model_folder(source)
        try:
            shape, encoders = _described((folder / "model.json").read_text())
            with torch.device("meta"):  # sizes that the weights do not have cost no memory
                model = cls(shape, encoders)
            model.load_state_dict(load_file(folder / "model.safetensors"), assign=True)
        except (
            OSError,
            ValueError,
            TypeError,
            RuntimeError,
            AssertionError,
            ArithmeticError,
            SafetensorError,
        ) as error:
            reason = str(error).split("\n")[0]
            raise InputError(
                f"{folder}: holds no retrieval model ({reason}); train it again"
            ) from error
        return model.float()


def _described(text: str) -> tuple[Shape, dict[str, Frozen]]:
    """What model.json says. Raises ValueError or TypeError where it is no such description."""
    sizes = json.loads(text)
    if not isinstance(sizes, dict):
        raise ValueError("model.json holds no object")
    kinds = sizes.pop("encoders", {})
    if kinds and set(kinds) != {"speech", "image"}:
        raise ValueError("'encoders' holds no 'speech' and 'image'")
    return Shape(**sizes), {kind: _frozen(**kinds[kind]) for kind in kinds}


def _frozen(name: object, sha256: object, layers: object) -> Frozen:
    named = isinstance(name, str) and isinstance(sha256, str)
    if not named or not isinstance(layers, list) or not all(type(one) is int for one in layers):
        raise ValueError("'encoders' does not say which they are")
    return Frozen(str(name), str(sha256), tuple(layers))

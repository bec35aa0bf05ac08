"""HuBERT and WavLM, frozen: the states of every layer, and no clip that feels its batch.

torchaudio has the architectures; the weights are torchaudio's or those of a Hugging Face folder.
"""

import http.client
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, layer_norm

from cmdlab.encoders.encoder import Description
from cmdlab.encoders.tiny import padding_mask
from cmdlab.encoders.weight_files import PREPROCESSING, Weights, read_weights
from cmdlab.errors import InputError

SAMPLING_RATE = 16_000
DOWNLOADS = "https://download.pytorch.org/torchaudio/models"


@dataclass(frozen=True)
class Checkpoint:
    """What torchaudio publishes under a name. `large` is what the large models have in common:
    layer norm first, in the convolutions too, and waveforms of zero mean and unit variance."""

    architecture: str  # a function of torchaudio.models
    family: str  # Hugging Face's `model_type`
    large: bool
    file: str
    licence: str = "MIT"


CHECKPOINTS = {
    "hubert-base": Checkpoint("hubert_base", "hubert", False, "hubert_fairseq_base_ls960.pth"),
    "hubert-large": Checkpoint("hubert_large", "hubert", True, "hubert_fairseq_large_ll60k.pth"),
    "wavlm-base-plus": Checkpoint("wavlm_base", "wavlm", False, "wavlm_base_plus.pth"),
    "wavlm-large": Checkpoint("wavlm_large", "wavlm", True, "wavlm_large.pth"),
}


def open_hubert(name: str, weights: str) -> "SpeechEncoder":
    """The encoder of one of CHECKPOINTS, on the CPU, in float32.

    `weights` is a file of torchaudio's state dict, or a Hugging Face folder of a `HubertModel` or
    `WavLMModel` (or of its CTC wrapper), whose `config.json` gives the sizes. Empty, it is
    torchaudio's own file, fetched once into torch.hub's folder. A folder's waveforms are normalised
    where its `preprocessor_config.json` says so; a folder without one, and a file, as the name was
    trained. Raises InputError where there is no network, and for weights of another model.
    """
    checkpoint = CHECKPOINTS[name]
    path = Path(weights) if weights else _downloaded(name)
    given = read_weights(path)
    if given.config is None:
        model = _published(checkpoint)
        tensors = given.tensors
        epsilon = 1e-5 if checkpoint.large else None  # as torchaudio's pipelines have it
    else:
        model = _configured(checkpoint, given.config, path, name)
        tensors = _renamed(given.tensors, checkpoint.family)
        epsilon = _epsilon(checkpoint, given, path)
    _fill(model, tensors, path, name)
    return SpeechEncoder(model, name, epsilon)


def untrained(name: str) -> "SpeechEncoder":
    """The same architecture at random weights, to measure what it takes. It hears nothing."""
    import torchaudio

    checkpoint = CHECKPOINTS[name]
    model = getattr(torchaudio.models, checkpoint.architecture)()
    _join_kernel(model)
    return SpeechEncoder(model, name, 1e-5 if checkpoint.large else None)


class SpeechEncoder(nn.Module):
    """A frozen HuBERT or WavLM. Every clip's states are those that it has alone.

    Where a checkpoint normalises over time (the waveform of large models, the first convolution of
    base models), each clip is normalised by itself; attention and the convolution for position do
    not see padding.
    """

    def __init__(self, model: Any, name: str, epsilon: float | None) -> None:
        """model: torchaudio's. epsilon: beside the waveform's variance; None leaves it as it is."""
        super().__init__()
        self.convolutions = model.feature_extractor.conv_layers
        self.projection = model.encoder.feature_projection
        self.transformer = model.encoder.transformer
        self.epsilon = epsilon
        self.eval().requires_grad_(False)
        shortest = 1  # samples that one token is made of
        for block in reversed(self.convolutions):
            shortest = (shortest - 1) * block.stride + block.kernel_size
        self.description = Description(
            name=name,
            kind="speech",
            layers=len(self.transformer.layers) + 1,
            width=self.projection.projection.out_features,
            embedding=0,
            takes="speech at 16 kHz",
            licence=CHECKPOINTS[name].licence,
            tokens_per_second=SAMPLING_RATE / math.prod(b.stride for b in self.convolutions),
            shortest=shortest,
        )

    def forward(self, waveforms: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """waveforms: float32 [batch, samples], padded; lengths: int64 [batch] in samples.

        Returns states [batch, layers + 1, tokens, width], in the weights' dtype, and the number of
        tokens, int64 [batch]. The first state is what the first layer takes, as in SpeechCLIP; the
        last has the final layer norm where the model has one. Tokens after a length are zero.
        Raises InputError for a clip that is too short for one token.
        """
        if int(lengths.min()) < self.description.shortest:
            raise InputError(
                f"a clip has {int(lengths.min())} samples, and {self.description.name} takes "
                f"{self.description.shortest} or more; leave it out"
            )
        x, tokens = self._convolve(self._normalised(waveforms, lengths), lengths)
        x = self.projection(x.transpose(1, 2))  # [batch, tokens, width]
        padding = padding_mask(tokens, x.shape[1])
        x = x.masked_fill(padding[..., None], 0)
        x = x + self.transformer.pos_conv_embed(x)
        large = CHECKPOINTS[self.description.name].large
        if not large:
            x = self.transformer.layer_norm(x)
        layers = self.transformer.layers
        states = x.new_empty(len(x), len(layers) + 1, *x.shape[1:])
        states[:, 0] = x
        mask = self._attention_mask(padding, x.dtype)
        bias = None  # of WavLM's positions, which its first layer makes for all
        for i, layer in enumerate(layers, 1):
            x, bias = layer(x, position_bias=bias, **mask)
            states[:, i] = x
        if large:
            states[:, -1] = self.transformer.layer_norm(x)
        return states.masked_fill_(padding[:, None, :, None], 0), tokens

    def _normalised(self, waveforms: Tensor, lengths: Tensor) -> Tensor:
        if self.epsilon is None:
            return waveforms
        normalised = torch.zeros_like(waveforms)
        for row, clip, samples in zip(normalised, waveforms, lengths.tolist(), strict=True):
            row[:samples] = layer_norm(clip[:samples], (samples,), eps=self.epsilon)
        return normalised

    def _convolve(self, waveforms: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Waveforms to [batch, channels, tokens] and the number of tokens. None of these
        convolutions pads, so a clip's own tokens are made of its own samples alone."""
        x = waveforms[:, None].to(self.convolutions[0].conv.weight.dtype)
        for block in self.convolutions:
            x = block.conv(x)
            lengths = (lengths - block.kernel_size) // block.stride + 1
            if isinstance(block.layer_norm, nn.GroupNorm):  # over time: a clip at a time
                for i, frames in enumerate(lengths.tolist()):
                    x[i, :, :frames] = block.layer_norm(x[i : i + 1, :, :frames])[0]
            elif block.layer_norm is not None:
                x = block.layer_norm(x)
            x = gelu(x)
        return x, lengths

    def _attention_mask(self, padding: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
        """padding: bool [batch, tokens]; the argument by which torchaudio's layers leave it out."""
        if not padding.any():
            return {}
        if CHECKPOINTS[self.description.name].family == "wavlm":  # added to the positions' bias
            zeros = torch.zeros_like(padding, dtype=dtype)
            return {"key_padding_mask": zeros.masked_fill(padding, -math.inf)}
        batch, tokens = padding.shape
        return {"attention_mask": ~padding[:, None, None].expand(batch, 1, tokens, tokens)}


POSITIONS = "encoder.transformer.pos_conv_embed.conv"
FIXED = {  # what torchaudio's models are built with, and what a config.json may say otherwise
    "hidden_act": "gelu",
    "feat_extract_activation": "gelu",
    "layer_norm_eps": 1e-5,
    "feat_proj_layer_norm": True,
    "conv_pos_batch_norm": False,
    "adapter_attn_dim": None,
    "add_adapter": False,
}
WITHOUT_DROPOUT = {
    "encoder_projection_dropout": 0.0,
    "encoder_attention_dropout": 0.0,
    "encoder_ff_interm_dropout": 0.0,
    "encoder_dropout": 0.0,
    "encoder_layer_drop": 0.0,
}


def _downloaded(name: str) -> Path:
    """torchaudio's own file, where torchaudio itself keeps it."""
    file = CHECKPOINTS[name].file
    path = Path(torch.hub.get_dir()) / "checkpoints" / file
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(f"{DOWNLOADS}/{file}", str(path))
        except (OSError, http.client.HTTPException) as error:
            raise InputError(
                f"{name}: {DOWNLOADS}/{file} cannot be fetched ({error}); fetch it elsewhere, or "
                "a Hugging Face folder of the model, and name that as its weights"
            ) from error
    return path


def _published(checkpoint: Checkpoint) -> nn.Module:
    import torchaudio

    with torch.device("meta"):
        return getattr(torchaudio.models, checkpoint.architecture)()


def _configured(checkpoint: Checkpoint, config: dict[str, Any], path: Path, name: str) -> nn.Module:
    """torchaudio's model, without values, in the sizes of a Hugging Face configuration."""
    import torchaudio

    family = config.get("model_type")
    if family != checkpoint.family:
        raise InputError(
            f"{path}: config.json says model_type {family!r}, and {name} is of "
            f"{checkpoint.family!r}; give the weights of {name}"
        )
    if config.get("do_stable_layer_norm", False) != checkpoint.large:
        other = "base" if checkpoint.large else "large"
        raise InputError(
            f"{path}: config.json's do_stable_layer_norm is that of a {other} model; give the "
            f"weights of {name}, or name the encoder that these are of"
        )
    for key, fixed in FIXED.items():
        if config.get(key, fixed) != fixed:
            raise InputError(
                f"{path}: config.json says {key} {config[key]!r}, and only {fixed!r} is known "
                "here; give another checkpoint"
            )
    try:
        sizes = WITHOUT_DROPOUT | {
            "extractor_mode": f"{config['feat_extract_norm']}_norm",
            "extractor_conv_layer_config": list(
                zip(config["conv_dim"], config["conv_kernel"], config["conv_stride"], strict=True)
            ),
            "extractor_conv_bias": config["conv_bias"],
            "encoder_embed_dim": config["hidden_size"],
            "encoder_pos_conv_kernel": config["num_conv_pos_embeddings"],
            "encoder_pos_conv_groups": config["num_conv_pos_embedding_groups"],
            "encoder_num_layers": config["num_hidden_layers"],
            "encoder_num_heads": config["num_attention_heads"],
            "encoder_ff_interm_features": config["intermediate_size"],
            "encoder_layer_norm_first": checkpoint.large,
            "aux_num_out": None,
        }
        if checkpoint.family == "wavlm":
            sizes["encoder_num_buckets"] = config["num_buckets"]
            sizes["encoder_max_distance"] = config["max_bucket_distance"]
            build = torchaudio.models.wavlm_model
        else:
            build = torchaudio.models.wav2vec2_model
        with torch.device("meta"):
            return build(**sizes)
    except KeyError as error:
        raise InputError(f"{path}: config.json has no {error}; fetch it again") from error
    except (TypeError, ValueError, RuntimeError, AssertionError, ArithmeticError) as error:
        reason = str(error).split("\n")[0]
        raise InputError(
            f"{path}: config.json's sizes make no model ({reason}); fetch it again"
        ) from error


def _epsilon(checkpoint: Checkpoint, given: Weights, path: Path) -> float | None:
    """What a folder adds to the variance of a waveform; None where it does not normalise."""
    preprocessing = given.preprocessing or {}
    rate = preprocessing.get("sampling_rate", SAMPLING_RATE)
    if rate != SAMPLING_RATE:
        raise InputError(
            f"{path / PREPROCESSING}: says sampling_rate {rate!r}; only {SAMPLING_RATE} is known "
            "here, give another checkpoint"
        )
    wanted = preprocessing.get("do_normalize", checkpoint.large)
    return 1e-7 if wanted else None  # as Wav2Vec2FeatureExtractor has it


def _renamed(tensors: dict[str, Tensor], family: str) -> dict[str, Tensor]:
    """Hugging Face's names to torchaudio's; what is trained beside the encoder is left out."""
    renamed: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        name = name.removeprefix(f"{family}.")
        if name.startswith("lm_head.") or name == "masked_spec_embed":
            continue
        if name.startswith("feature_projection."):
            name = f"encoder.{name}"
        elif name.startswith("encoder."):
            name = f"encoder.transformer.{name.removeprefix('encoder.')}"
        renamed[name] = tensor
    if family == "wavlm":
        _join_projections(renamed)
    return renamed


def _join_projections(tensors: dict[str, Tensor]) -> None:
    """Query, key and value in one matrix, in place: torchaudio's WavLM has torch's attention."""
    for name in [name for name in tensors if ".attention.q_proj." in name]:
        before, kind = name.split("q_proj.")
        names = [f"{before}{part}_proj.{kind}" for part in "qkv"]
        parts = [tensors[name] for name in names if name in tensors]
        if len(parts) == 3 and len({part.shape for part in parts}) == 1:
            joined = torch.stack(parts).reshape(-1, *parts[0].shape[1:])
            tensors[f"{before}attention.in_proj_{kind}"] = joined
            for name in names:
                del tensors[name]
    for name in [name for name in tensors if ".attention.out_proj." in name]:
        tensors[name.replace(".out_proj.", ".attention.out_proj.")] = tensors.pop(name)


def _fill(model: nn.Module, tensors: dict[str, Tensor], path: Path, name: str) -> None:
    """Give a model without values the tensors of its names, in float32. Raises InputError where
    one is missing, one is over, or one has another shape."""
    tensors = dict(tensors)
    for old, new in (("g", "original0"), ("v", "original1")):  # before and since torch 2.1
        if (tensor := tensors.pop(f"{POSITIONS}.weight_{old}", None)) is not None:
            tensors[f"{POSITIONS}.parametrizations.weight.{new}"] = tensor
    wanted = model.state_dict()
    for key in sorted(wanted.keys() | tensors.keys()):
        if key not in tensors:
            reason = f"have no {key}"
        elif key not in wanted:
            reason = f"have {key[:120]!r}, which it has not"
        elif tensors[key].shape != wanted[key].shape:
            shapes = [list(given[key].shape) for given in (tensors, wanted)]
            reason = f"have {key} in shape {shapes[0]}, not {shapes[1]}"
        elif not tensors[key].is_floating_point():
            reason = f"have {key} in {tensors[key].dtype}, which is no floating point"
        else:
            continue
        raise InputError(
            f"{path}: are no weights of {name}: they {reason}; give those of {name}, or name the "
            "encoder that these are of (Hugging Face's names need its folder, with config.json)"
        )
    model.load_state_dict({key: tensor.float() for key, tensor in tensors.items()}, assign=True)
    _join_kernel(model)


def _join_kernel(model: nn.Module) -> None:
    """The direction and the length of the kernel for position are for training: one weight is left,
    in full precision, before anybody asks for less."""
    positions: Any = model.get_submodule(POSITIONS)
    nn.utils.parametrize.remove_parametrizations(positions, "weight")

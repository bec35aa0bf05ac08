"""CLIP's image towers: photographs to patch tokens and an embedding, by published weights."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms.v2.functional import (
    InterpolationMode,
    center_crop,
    normalize,
    pil_to_tensor,
    resize,
    to_dtype,
)

from cmdlab.encoders.encoder import Description
from cmdlab.encoders.weight_files import Weights, read_weights
from cmdlab.errors import InputError


@dataclass(frozen=True)
class Tower:
    """A published tower: the names of its architecture and of its weights in open_clip."""

    architecture: str
    tag: str
    licence: str = "MIT"  # OpenAI's and LAION's alike


TOWERS = {
    "clip-vit-b-32": Tower("ViT-B-32-quickgelu", "openai"),
    "clip-vit-b-16": Tower("ViT-B-16-quickgelu", "openai"),
    "clip-vit-l-14": Tower("ViT-L-14-quickgelu", "openai"),
    "clip-vit-b-32-laion2b": Tower("ViT-B-32", "laion2b_s34b_b79k"),
    "clip-vit-b-16-laion2b": Tower("ViT-B-16", "laion2b_s34b_b88k"),
    "clip-vit-l-14-laion2b": Tower("ViT-L-14", "laion2b_s32b_b82k"),
}
LONGEST = 100  # times a picture's short side: resized, it is 15 MB at most


def open_clip_encoder(name: str, weights: str) -> "ClipImageEncoder":
    """One of TOWERS by its name, frozen.

    `weights` is the path of
    - a folder as the hub has them, of open_clip (open_clip_config.json and its weights) or of
      transformers' CLIPModel (config.json and its weights): it says its own sizes, activation,
      mean and standard deviation of colours; or of
    - a file, safetensors or torch, with the state dict of open_clip's model or of OpenAI's. That
      tells neither activation nor colours: those of the name are taken, so the name must be right.
    Empty, the weights come by open_clip's own download, into the hub's cache.

    Raises InputError for a file that is missing, broken, of another model than the name's, or
    trained with another activation, and where open_clip is not installed.
    """
    published = _published(name)
    path = Path(weights or _download(name))
    read = read_weights(path)
    if read.config is None:
        checkpoint = Checkpoint(published.shape, _tower_of(read.tensors), {})
    else:
        is_open_clip = "model_cfg" in read.config
        checkpoint = (_from_open_clip if is_open_clip else _from_transformers)(read, path)
        _check_is(name, checkpoint.shape, path)
    encoder = ClipImageEncoder(name, checkpoint.shape, {**published.colours, **checkpoint.colours})
    _load(encoder.visual, checkpoint.tensors, path, name)
    return encoder.eval().requires_grad_(False)


def untrained(name: str) -> "ClipImageEncoder":
    """The same architecture at random weights, to measure what it takes. It sees nothing."""
    published = _published(name)
    encoder = ClipImageEncoder(name, published.shape, published.colours).to_empty(device="cpu")
    for parameter in encoder.parameters():
        nn.init.normal_(parameter, std=0.02)
    return encoder


@dataclass(frozen=True)
class Shape:
    """What sets one vision transformer of CLIP apart from another."""

    side: int  # pixels of a picture
    patch: int  # pixels of a patch's side
    width: int
    layers: int
    heads: int
    hidden: int  # width within the feed-forward part
    embedding: int
    quick_gelu: bool


class ClipImageEncoder(nn.Module):
    """Photographs to patch tokens and one embedding. Its weights are yet to be loaded."""

    def __init__(self, name: str, shape: Shape, colours: Mapping[str, tuple[float, ...]]) -> None:
        """colours: "mean" and "std" of red, green and blue, from 0 to 1."""
        from open_clip.transformer import QuickGELU, VisionTransformer

        super().__init__()
        grid = shape.side // shape.patch
        self.description = Description(
            *(name, "images", 1, shape.width, shape.embedding, "photographs of any size"),
            TOWERS[name].licence,
            grid=(grid, grid),
        )
        self.side = shape.side
        self.colours = colours
        with torch.device("meta"):  # without memory, and without drawing random numbers
            self.visual = VisionTransformer(
                image_size=shape.side,
                patch_size=shape.patch,
                width=shape.width,
                layers=shape.layers,
                heads=shape.heads,
                mlp_ratio=(shape.hidden + 0.5) / shape.width,  # which it rounds down
                output_dim=shape.embedding,
                act_layer=QuickGELU if shape.quick_gelu else nn.GELU,
                output_tokens=True,
            )

    def pixels(self, picture: np.ndarray) -> Tensor:
        """A picture, uint8 [height, width, 3], as CLIP crops it: uint8 [3, side, side].

        The short side is resized, bicubic by Pillow as in CLIP's own transform, and the middle cut
        out. Raises InputError for a picture over 100 times as long as it is wide.
        """
        height, width, _ = picture.shape
        if max(height, width) > LONGEST * min(height, width):
            raise InputError(
                f"a picture of {width} × {height} pixels has sides of over 1 : {LONGEST}; crop it"
            )
        resized = resize(Image.fromarray(picture), [self.side], InterpolationMode.BICUBIC)
        return pil_to_tensor(center_crop(resized, [self.side, self.side]))

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """pixels: uint8 [batch, 3, side, side] → tokens [batch, patches, width], embedding
        float32 [batch, embedding] of unit norm.

        Tokens run over the rows of the picture, from the top left. They have the tower's last
        layer norm, and the weights' dtype.
        """
        x = normalize(to_dtype(pixels, torch.float32, scale=True), **self.colours)
        pooled, tokens = self.visual(x.to(self.visual.proj.dtype))
        return tokens, nn.functional.normalize(pooled.float(), dim=-1)

    def project(self, tokens: Tensor) -> Tensor:
        """Patch tokens [..., width] into the space shared with texts [..., embedding], not
        normalised."""
        return tokens @ self.visual.proj


@dataclass(frozen=True)
class Checkpoint:
    """What was read: the image tower's tensors by open_clip's names, and what is known of it."""

    shape: Shape
    tensors: dict[str, Tensor]
    colours: dict[str, tuple[float, ...]]  # "mean" and "std"; empty where it does not say


def _published(name: str) -> Checkpoint:
    """What open_clip's registry says of a tower, without its tensors."""
    try:
        import open_clip
    except ImportError as error:
        raise InputError(f"{name}: needs open_clip; pip install cmdlab[encoders]") from error
    tower = TOWERS[name]
    registered = open_clip.get_pretrained_cfg(tower.architecture, tower.tag)
    return Checkpoint(
        _open_clip_shape(open_clip.get_model_config(tower.architecture), Path(tower.architecture)),
        {},
        {key: tuple(registered[key]) for key in ("mean", "std")},
    )


def _download(name: str) -> str:
    """The path of a tower's weights in the hub's cache, fetched when they are not there."""
    import open_clip

    tower = TOWERS[name]
    registered = open_clip.get_pretrained_cfg(tower.architecture, tower.tag)
    try:
        return open_clip.download_pretrained(registered)
    except (OSError, RuntimeError) as error:
        raise InputError(
            f"{name}: {registered['hf_hub']} cannot be downloaded ({type(error).__name__}); give "
            "the path of its weights, a file or a folder"
        ) from error


def _from_open_clip(read: Weights, folder: Path) -> Checkpoint:
    file = folder / "open_clip_config.json"
    config = _mapping(read.config, file)
    preprocessing = _mapping(config.get("preprocess_cfg", {}), file)
    for key, usual in (("interpolation", "bicubic"), ("resize_mode", "shortest")):
        if preprocessing.get(key, usual) != usual:
            raise InputError(f"{file}: {key} is not {usual!r}; choose another checkpoint")
    return Checkpoint(
        _open_clip_shape(_mapping(config["model_cfg"], file), file),
        _tower_of(read.tensors),
        _colours(preprocessing, "", file),
    )


def _open_clip_shape(config: Mapping[str, Any], file: Path) -> Shape:
    """The shape that open_clip's configuration of a model describes."""
    vision = _mapping(config.get("vision_cfg"), file)
    sizes = {"image_size": 224, "patch_size": 16, "width": 768, "layers": 12, "head_width": 64}
    if unknown := sorted(set(vision) - {*sizes, "mlp_ratio"}):
        raise InputError(f"{file}: vision_cfg: {unknown[0]} is of no CLIP tower; choose another")
    side, patch, width, layers, head = (_whole(vision, key, sizes[key], file) for key in sizes)
    ratio = vision.get("mlp_ratio", 4)
    if not isinstance(ratio, int | float) or not 0 < ratio < 1000:
        raise InputError(f"{file}: mlp_ratio: {ratio!r} is no ratio; fetch it again")
    return _possible(
        Shape(
            *(side, patch, width, layers, width // head, int(ratio * width)),
            _whole(config, "embed_dim", None, file),
            bool(config.get("quick_gelu", False)),
        ),
        file,
    )


def _from_transformers(read: Weights, folder: Path) -> Checkpoint:
    """A CLIPModel as transformers saves it. What its configuration leaves out has its default."""
    file = folder / "config.json"
    config = _mapping(read.config, file)
    if config.get("model_type") != "clip":
        raise InputError(
            f"{file}: is of a {config.get('model_type')!r}, not of a CLIPModel ('clip'); "
            "choose another folder"
        )
    vision = _mapping(config.get("vision_config", {}), file)
    whole = partial(_whole, vision, file=file)
    activation = vision.get("hidden_act", "quick_gelu")
    if activation not in ("quick_gelu", "gelu") or vision.get("layer_norm_eps", 1e-5) != 1e-5:
        raise InputError(
            f"{file}: hidden_act {activation!r}, layer_norm_eps {vision.get('layer_norm_eps')!r} "
            "are not of CLIP; choose another checkpoint"
        )
    shape = Shape(
        side=whole("image_size", 224),
        patch=whole("patch_size", 32),
        width=whole("hidden_size", 768),
        layers=whole("num_hidden_layers", 12),
        heads=whole("num_attention_heads", 12),
        hidden=whole("intermediate_size", 3072),
        embedding=_whole(config, "projection_dim", 512, file),
        quick_gelu=activation == "quick_gelu",
    )
    preprocessing = read.preprocessing or {}
    file = folder / "preprocessor_config.json"
    size = preprocessing.get("size", shape.side)
    if size not in (shape.side, {"shortest_edge": shape.side}):
        raise InputError(f"{file}: size: {size!r} is not the {shape.side} pixels of the model")
    if preprocessing.get("resample", Image.Resampling.BICUBIC) != Image.Resampling.BICUBIC:
        raise InputError(f"{file}: resample is not 3, bicubic; choose another checkpoint")
    return Checkpoint(
        _possible(shape, folder / "config.json"),
        _renamed(read.tensors),
        _colours(preprocessing, "image_", file),
    )


RENAMED = (  # parts of the names of transformers, of open_clip
    ("embeddings.class_embedding", "class_embedding"),
    ("embeddings.patch_embedding.", "conv1."),
    ("embeddings.position_embedding.weight", "positional_embedding"),
    ("pre_layrnorm.", "ln_pre."),
    ("post_layernorm.", "ln_post."),
    ("encoder.layers.", "transformer.resblocks."),
    (".layer_norm1.", ".ln_1."),
    (".layer_norm2.", ".ln_2."),
    (".self_attn.", ".attn."),
    (".mlp.fc1.", ".mlp.c_fc."),
    (".mlp.fc2.", ".mlp.c_proj."),
)


def _renamed(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The image tower of transformers' CLIPModel by open_clip's names.

    Query, key and value are one matrix there, and the projection is transposed.
    """
    renamed = {}
    for name, tensor in tensors.items():
        if name == "visual_projection.weight" and tensor.ndim == 2:
            renamed["proj"] = tensor.T.contiguous()
        elif name.startswith("vision_model.") and not name.endswith(".position_ids"):
            name = name.removeprefix("vision_model.")
            for theirs, ours in RENAMED:
                name = name.replace(theirs, ours)
            renamed[name] = tensor
    for query in [name for name in renamed if ".q_proj." in name]:
        parts = [query.replace(".q_proj.", f".{part}_proj.") for part in "qkv"]
        if len({renamed[part].shape if part in renamed else None for part in parts}) == 1:
            joined = query.replace(".q_proj.", ".in_proj_")
            renamed[joined] = torch.cat([renamed.pop(part) for part in parts])
    return renamed


def _tower_of(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The image tower alone of open_clip's or OpenAI's model."""
    prefix = "visual."
    return {k.removeprefix(prefix): tensor for k, tensor in tensors.items() if k.startswith(prefix)}


def _check_is(name: str, shape: Shape, path: Path) -> None:
    """Raise InputError where a folder's own shape is that of another name, or its activation."""
    if shape.quick_gelu != _published(name).shape.quick_gelu:
        has, wants = ("QuickGELU", "GELU") if shape.quick_gelu else ("GELU", "QuickGELU")
        short = name.removesuffix("-laion2b")
        other = short if shape.quick_gelu else f"{short}-laion2b"
        raise InputError(
            f"{path}: was trained with {has}, and {name} is of {wants}; choose the encoder {other}"
        )
    for other in TOWERS:
        if other != name and shape == _published(other).shape:
            raise InputError(f"{path}: is not {name}; choose the encoder {other}")


def _load(visual: nn.Module, tensors: dict[str, Tensor], path: Path, name: str) -> None:
    """Put the tensors in their places, as float32. Raises InputError where one does not fit."""
    wanted = {key: tuple(value.shape) for key, value in visual.state_dict().items()}
    found = {key: tuple(value.shape) for key, value in tensors.items()}
    for key in sorted(wanted.keys() | found.keys()):
        if wanted.get(key) != found.get(key):
            raise InputError(
                f"{path}: is no image tower as {name}: {key} is {found.get(key, 'missing')}, not "
                f"{wanted.get(key, 'there')}; choose another encoder, or fetch the file again"
            )
    visual.load_state_dict({key: value.float() for key, value in tensors.items()}, assign=True)


def _possible(shape: Shape, file: Path) -> Shape:
    if shape.side % shape.patch or not shape.heads or shape.width % shape.heads:
        raise InputError(f"{file}: {shape} cannot be; fetch it again")
    return shape


def _mapping(value: object, file: Path) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise InputError(f"{file}: {value!r:.40} is no JSON object; fetch it again")
    return value


def _whole(config: Mapping[str, Any], key: str, default: int | None, file: Path) -> int:
    """A size; no published one is near the limit, and a thousand layers would take minutes."""
    value = config.get(key, default)
    limit = 1000 if "layers" in key else 100_000
    if type(value) is not int or not 1 <= value <= limit:
        raise InputError(f"{file}: {key}: {value!r} is no number from 1 to {limit}; fetch it again")
    return value


def _colours(
    preprocessing: Mapping[str, Any], prefix: str, file: Path
) -> dict[str, tuple[float, ...]]:
    """Mean and standard deviation, where a file says them."""
    colours = {}
    for key in ("mean", "std"):
        value = preprocessing.get(prefix + key)
        if value is None:
            continue
        three = isinstance(value, list) and len(value) == 3
        if not three or not all(isinstance(one, int | float) and 0 <= one <= 1 for one in value):
            raise InputError(f"{file}: {prefix + key} is not three numbers from 0 to 1")
        if key == "std" and not all(value):
            raise InputError(f"{file}: {prefix + key}: no standard deviation may be 0")
        colours[key] = tuple(float(one) for one in value)
    return colours

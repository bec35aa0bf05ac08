"""CLIP's towers against transformers and open_clip themselves, by files which they write."""

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from open_clip.transform import image_transform
from PIL import Image
from safetensors.torch import save_file
from torch import nn
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

from cmdlab.corpora import read_image
from cmdlab.encoders import clip
from cmdlab.encoders.clip import TOWERS, ClipImageEncoder, Tower, open_clip_encoder
from cmdlab.errors import InputError

SIDE, PATCH, WIDTH, LAYERS, HEADS, EMBEDDING = 32, 8, 32, 2, 2, 24
MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
TINY = {  # as open_clip describes a model
    "embed_dim": EMBEDDING,
    "vision_cfg": {
        "image_size": SIDE,
        "patch_size": PATCH,
        "width": WIDTH,
        "layers": LAYERS,
        "head_width": WIDTH // HEADS,
    },
    "text_cfg": {"context_length": 8, "vocab_size": 64, "width": 16, "heads": 2, "layers": 1},
}
ACTIVATIONS = pytest.mark.parametrize(
    ("name", "activation"), [("clip-vit-b-32", "quick_gelu"), ("clip-vit-b-32-laion2b", "gelu")]
)


@pytest.fixture(scope="module")
def pixels() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(256, (5, 3, SIDE, SIDE), generator=generator, dtype=torch.uint8)


def normalised(pixels: torch.Tensor, mean=MEAN, std=STD) -> torch.Tensor:
    """By hand: float32 [batch, 3, side, side]."""
    return (pixels / 255 - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]


def hugging_face_folder(folder: Path, **vision: Any) -> CLIPModel:
    """A random CLIPModel, saved with its image processor."""
    torch.manual_seed(1)
    text = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "vocab_size": 64}
    sizes = {
        "hidden_size": WIDTH,
        "intermediate_size": 100,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "image_size": SIDE,
        "patch_size": PATCH,
        **vision,
    }
    config = CLIPConfig(
        text_config={"num_hidden_layers": 1, **text},
        vision_config=sizes,
        projection_dim=EMBEDDING,
    )
    model = CLIPModel(config).eval()
    lively(model)
    model.save_pretrained(folder)
    CLIPImageProcessor(
        size={"shortest_edge": SIDE}, crop_size=SIDE, image_mean=list(MEAN), image_std=list(STD)
    ).save_pretrained(folder)
    return model


def open_clip_model(*, quick_gelu: bool) -> nn.Module:
    torch.manual_seed(2)
    model = open_clip.CLIP(**TINY, quick_gelu=quick_gelu).eval()
    lively(model)
    return model


@torch.no_grad()
def lively(model: nn.Module) -> None:
    """Large weights: at their usual scale the two activations would agree, and norms do nothing."""
    for parameter in model.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))


def open_clip_folder(folder: Path, model: nn.Module, config: dict[str, Any], **tensors) -> None:
    folder.mkdir()
    preprocessing = {"mean": MEAN, "std": STD, "interpolation": "bicubic"}
    whole = {"model_cfg": config, "preprocess_cfg": preprocessing}
    (folder / "open_clip_config.json").write_text(json.dumps(whole))
    save_file({**model.state_dict(), **tensors}, folder / "open_clip_model.safetensors")


@pytest.fixture
def tiny_tower(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a tower of TINY's sizes, with QuickGELU, in open_clip's own registry."""
    file = tmp_path / "cmdlab-tiny.json"
    file.write_text(json.dumps({**TINY, "quick_gelu": True}))
    open_clip.add_model_config(file)
    registered = {"tag": {"mean": MEAN, "std": STD, "hf_hub": "cmdlab/tiny/"}}
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, "cmdlab-tiny", registered)
    monkeypatch.setitem(TOWERS, "clip-tiny", Tower("cmdlab-tiny", "tag"))
    return "clip-tiny"


@torch.no_grad()
def assert_same_as_open_clip(encoder: ClipImageEncoder, model: nn.Module, pixels) -> None:
    model.visual.output_tokens = True
    pooled, patches = model.visual(normalised(pixels))
    tokens, embedding = encoder(pixels)
    assert torch.allclose(tokens, patches, atol=1e-4)
    assert torch.allclose(embedding, nn.functional.normalize(pooled, dim=-1), atol=1e-5)
    assert torch.allclose(encoder.project(tokens), patches @ model.visual.proj, atol=1e-4)


@ACTIVATIONS
@torch.no_grad()
def test_as_transformers_has_it(tmp_path, pixels, name, activation):
    model = hugging_face_folder(tmp_path, hidden_act=activation)
    encoder = open_clip_encoder(name, str(tmp_path))
    tokens, embedding = encoder(pixels)
    theirs = model.vision_model(normalised(pixels))
    patches = model.vision_model.post_layernorm(theirs.last_hidden_state[:, 1:])
    assert torch.allclose(tokens, patches, atol=1e-4)
    pooled = model.visual_projection(theirs.pooler_output)
    assert torch.allclose(embedding, nn.functional.normalize(pooled, dim=-1), atol=1e-5)
    assert torch.allclose(encoder.project(tokens), model.visual_projection(patches), atol=1e-4)


@ACTIVATIONS
def test_a_folder_of_open_clip(tmp_path, pixels, name, activation):
    quick_gelu = activation == "quick_gelu"
    model = open_clip_model(quick_gelu=quick_gelu)
    folder = tmp_path / "weights"
    open_clip_folder(folder, model, {**TINY, "quick_gelu": quick_gelu})
    assert_same_as_open_clip(open_clip_encoder(name, str(folder)), model, pixels)


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_a_state_dict_has_the_activation_of_the_name(tmp_path, pixels, tiny_tower, suffix):
    model = open_clip_model(quick_gelu=True)
    path = tmp_path / f"weights{suffix}"
    save = save_file if suffix == ".safetensors" else torch.save
    save(model.state_dict(), path)
    assert_same_as_open_clip(open_clip_encoder(tiny_tower, str(path)), model, pixels)


def test_openais_half_precision_and_settings_among_the_tensors(tmp_path, pixels, tiny_tower):
    model = open_clip_model(quick_gelu=True).half()
    settings = {"input_resolution": torch.tensor(SIDE), "context_length": torch.tensor(8)}
    torch.save({**model.state_dict(), **settings}, tmp_path / "weights.pt")
    encoder = open_clip_encoder(tiny_tower, str(tmp_path / "weights.pt"))
    assert_same_as_open_clip(encoder, model.float(), pixels)


def test_the_hubs_cache_serves_without_a_network(tmp_path, pixels, tiny_tower, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(InputError, match=r"cmdlab/tiny/ cannot be downloaded.* give the path"):
        open_clip_encoder(tiny_tower, "")
    cache = tmp_path / "models--cmdlab--tiny"
    (cache / "refs").mkdir(parents=True)
    (cache / "refs" / "main").write_text("f" * 40)
    snapshot = cache / "snapshots" / ("f" * 40)
    snapshot.mkdir(parents=True)
    model = open_clip_model(quick_gelu=True)
    save_file(model.state_dict(), snapshot / "open_clip_model.safetensors")
    assert_same_as_open_clip(open_clip_encoder(tiny_tower, ""), model, pixels)


def test_colours_of_the_name_where_the_folder_has_none(tmp_path, pixels):
    model = hugging_face_folder(tmp_path, hidden_act="gelu")
    (tmp_path / "preprocessor_config.json").unlink()
    encoder = open_clip_encoder("clip-vit-l-14-laion2b", str(tmp_path))
    x = normalised(pixels, (0.5,) * 3, (0.5,) * 3)  # the one tower that has not OpenAI's
    pooled = model.visual_projection(model.vision_model(x).pooler_output)
    assert torch.allclose(encoder(pixels)[1], nn.functional.normalize(pooled, dim=-1), atol=1e-5)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> ClipImageEncoder:
    folder = tmp_path_factory.mktemp("clip")
    hugging_face_folder(folder)
    return open_clip_encoder("clip-vit-b-16", str(folder))


def test_it_describes_itself_and_is_frozen(encoder, pixels):
    said = encoder.description
    assert (said.name, said.kind, said.licence) == ("clip-vit-b-16", "images", "MIT")
    assert (said.layers, said.width, said.embedding, said.grid) == (1, WIDTH, EMBEDDING, (4, 4))
    assert not any(module.training for module in encoder.modules())
    tokens, embedding = encoder(pixels)
    assert not tokens.requires_grad
    assert tokens.shape == (5, 16, WIDTH)
    assert embedding.shape == (5, EMBEDDING)
    assert embedding.norm(dim=1) == pytest.approx(1, abs=1e-5)


def test_a_batch_is_as_one_by_one(encoder, pixels):
    tokens, embedding = encoder(pixels)
    for i in range(len(pixels)):
        alone = encoder(pixels[i : i + 1])
        assert torch.allclose(alone[0], tokens[i : i + 1], atol=1e-4)
        assert torch.allclose(alone[1], embedding[i : i + 1], atol=1e-5)


def test_tokens_run_over_the_rows_of_the_picture(tmp_path, pixels):
    """Without layers that mix them, a change at the top right stays with its patch."""
    hugging_face_folder(tmp_path, num_hidden_layers=1)
    encoder = open_clip_encoder("clip-vit-b-32", str(tmp_path))
    for weight in encoder.visual.transformer.parameters():
        weight.zero_()
    changed = pixels.clone()
    changed[:, :, :4, -4:] = 255 - changed[:, :, :4, -4:]
    difference = (encoder(pixels)[0] - encoder(changed)[0]).abs().amax((0, 2)) > 0
    assert difference.nonzero().flatten().tolist() == [3]


def test_bfloat16_comes_near(tmp_path, pixels):
    hugging_face_folder(tmp_path)
    encoder = open_clip_encoder("clip-vit-b-32", str(tmp_path))
    exact = encoder(pixels)[1]
    tokens, embedding = encoder.to(torch.bfloat16)(pixels)
    assert tokens.dtype == encoder.project(tokens).dtype == torch.bfloat16
    assert embedding.dtype == torch.float32
    assert (embedding * exact).sum(1).min() > 0.99


def test_opening_draws_no_random_numbers(tmp_path):
    hugging_face_folder(tmp_path)
    before = torch.random.get_rng_state()
    open_clip_encoder("clip-vit-b-32", str(tmp_path))
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize(
    "size", [(32, 32), (206, 219), (640, 427), (33, 101), (7, 5), (1, 1), (500, 17)]
)
def test_a_photograph_is_cropped_as_open_clip_does(tmp_path, encoder, mode, size):
    """Not one grey level apart. Other modes are made RGB before they are resized, theirs after."""
    noise = np.random.default_rng(0).integers(256, size=(9, 9, 3), dtype=np.uint8)
    picture = Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC).convert(mode)
    picture.save(tmp_path / "photograph.jpg", quality=90)
    transform = image_transform(SIDE, is_train=False, mean=MEAN, std=STD)
    theirs = transform(Image.open(tmp_path / "photograph.jpg"))
    pixels = encoder.pixels(read_image(tmp_path / "photograph.jpg"))
    assert pixels.dtype == torch.uint8
    assert torch.allclose(normalised(pixels), theirs, atol=1e-5)


def test_a_ribbon_is_refused(encoder):
    with pytest.raises(InputError, match=r"20001 × 2 pixels"):
        encoder.pixels(np.zeros((2, 20_001, 3), np.uint8))


@pytest.mark.parametrize("name", TOWERS)
def test_the_names_are_in_open_clips_registry(name):
    """Activation and every size, without weights."""
    tower = TOWERS[name]
    config = open_clip.get_model_config(tower.architecture)
    registered = open_clip.get_pretrained_cfg(tower.architecture, tower.tag)
    assert bool(config.get("quick_gelu")) == registered.get("quick_gelu", False)
    encoder = ClipImageEncoder(name, clip._published(name).shape, {})
    with torch.device("meta"):
        theirs = open_clip.CLIP(**config).visual
    assert {key: value.shape for key, value in encoder.visual.state_dict().items()} == {
        key: value.shape for key, value in theirs.state_dict().items()
    }
    activation = type(theirs.transformer.resblocks[0].mlp.gelu)
    assert type(encoder.visual.transformer.resblocks[0].mlp.gelu) is activation
    patch = int(name.split("-")[3])
    assert encoder.description.grid == (224 // patch, 224 // patch)


@pytest.mark.parametrize(
    ("name", "activation", "remedy"),
    [
        ("clip-vit-l-14", "gelu", r"trained with GELU.* encoder clip-vit-l-14-laion2b"),
        ("clip-vit-l-14-laion2b", "quick_gelu", r"trained with QuickGELU.* encoder clip-vit-l-14$"),
        ("clip-vit-l-14", "relu", "hidden_act 'relu'"),
    ],
)
def test_another_activation_is_refused(tmp_path, name, activation, remedy):
    hugging_face_folder(tmp_path / "theirs", hidden_act=activation)
    with pytest.raises(InputError, match=remedy):
        open_clip_encoder(name, str(tmp_path / "theirs"))
    if activation != "relu":
        quick_gelu = activation == "quick_gelu"
        model = open_clip_model(quick_gelu=quick_gelu)
        open_clip_folder(tmp_path / "ours", model, {**TINY, "quick_gelu": quick_gelu})
        with pytest.raises(InputError, match=remedy):
            open_clip_encoder(name, str(tmp_path / "ours"))


def change_json(file: str, change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        content = json.loads((folder / file).read_text())
        change(content)
        (folder / file).write_text(json.dumps(content))

    return damage


def truncate(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


VISION, COLOURS = "config.json", "preprocessor_config.json"


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (truncate, "model.safetensors"),
        (lambda folder: (folder / "model.safetensors").unlink(), "model.safetensors"),
        (lambda folder: (folder / VISION).write_text("{"), "config.json"),
        (change_json(VISION, lambda c: c.update(model_type="siglip")), "'siglip', not of a CLIP"),
        (change_json(VISION, lambda c: c.update(vision_config=3)), "is no JSON object"),
        (change_json(VISION, lambda c: c["vision_config"].update(hidden_size="8")), "hidden_size"),
        (
            change_json(VISION, lambda c: c["vision_config"].update(num_hidden_layers=10**9)),
            "num_hidden_layers: 1000000000",
        ),
        (
            change_json(VISION, lambda c: c["vision_config"].update(num_hidden_layers=3)),
            r"resblocks\.2\..* is missing",
        ),
        (
            change_json(VISION, lambda c: c["vision_config"].update(num_hidden_layers=1)),
            r"resblocks\.1\..* not there",
        ),
        (
            change_json(VISION, lambda c: c["vision_config"].update(patch_size=4)),
            r"conv1\.weight is \(32, 3, 8, 8\), not \(32, 3, 4, 4\)",
        ),
        (change_json(VISION, lambda c: c["vision_config"].update(patch_size=7)), "cannot be"),
        (
            change_json(VISION, lambda c: c["vision_config"].update(num_attention_heads=3)),
            "cannot be",
        ),
        (change_json(COLOURS, lambda c: c.update(image_mean=[1, 2])), "image_mean is not three"),
        (change_json(COLOURS, lambda c: c.update(image_std=[0, 0.5, 0.5])), "image_std"),
        (change_json(COLOURS, lambda c: c.update(resample=2)), "resample is not 3"),
        (change_json(COLOURS, lambda c: c.update(size={"shortest_edge": 9})), "is not the 32"),
    ],
)
def test_a_damaged_or_foreign_folder_is_refused(tmp_path, damage, said):
    hugging_face_folder(tmp_path)
    damage(tmp_path)
    with pytest.raises(InputError, match=said):
        open_clip_encoder("clip-vit-b-32", str(tmp_path))


def test_a_tower_of_another_name_is_refused(tmp_path):
    """ViT-B/16 asked for by the name of B/32: the configuration alone tells."""
    config = {**open_clip.get_model_config("ViT-B-16-quickgelu"), "quick_gelu": True}
    open_clip_folder(tmp_path / "weights", nn.Linear(1, 1), config)
    with pytest.raises(InputError, match=r"is not clip-vit-b-32; choose the encoder clip-vit-b-16"):
        open_clip_encoder("clip-vit-b-32", str(tmp_path / "weights"))


@pytest.mark.parametrize(
    ("vision", "said"),
    [
        ({"timm_model_name": "resnet50"}, "vision_cfg: timm_model_name"),
        ({"layers": [3, 4, 6, 3]}, r"layers: \[3, 4, 6, 3\]"),
        ({"mlp_ratio": "4"}, "mlp_ratio"),
    ],
)
def test_another_architecture_of_open_clip_is_refused(tmp_path, vision, said):
    config = {**TINY, "vision_cfg": {**TINY["vision_cfg"], **vision}}
    open_clip_folder(tmp_path / "weights", nn.Linear(1, 1), config)
    with pytest.raises(InputError, match=said):
        open_clip_encoder("clip-vit-b-32-laion2b", str(tmp_path / "weights"))


def test_a_state_dict_of_another_size_is_refused(tmp_path):
    path = tmp_path / "weights.safetensors"
    save_file(open_clip_model(quick_gelu=True).state_dict(), path)
    with pytest.raises(InputError, match=r"class_embedding is \(32,\), not \(768,\)"):
        open_clip_encoder("clip-vit-b-32", str(path))


@pytest.mark.parametrize("content", [b"", b"no weights", None])
def test_what_is_no_file_of_weights_is_refused(tmp_path, content):
    path = tmp_path / "weights.pt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=r"weights\.pt"):
        open_clip_encoder("clip-vit-b-32", str(path))


class Trap:
    """An object that writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable, tuple]:
        return Path.touch, (self.path,)


def test_a_trap_does_not_spring(tmp_path):
    sprung = tmp_path / "sprung"
    pickle.loads(pickle.dumps(Trap(sprung)))
    sprung.unlink()  # so it would
    folder = tmp_path / "weights"
    open_clip_folder(folder, nn.Linear(1, 1), {**TINY, "quick_gelu": True})
    (folder / "open_clip_model.safetensors").unlink()
    torch.save({"visual.proj": Trap(sprung)}, folder / "open_clip_pytorch_model.bin")
    for path in (folder, folder / "open_clip_pytorch_model.bin"):
        with pytest.raises(InputError, match=r"open_clip_pytorch_model\.bin"):
            open_clip_encoder("clip-vit-b-32", str(path))
    assert not sprung.exists()


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_a_torchscript_program_is_refused_and_its_remedy_works(tmp_path, pixels, tiny_tower):
    """OpenAI's own files are such programs."""
    model = open_clip_model(quick_gelu=True)
    example = {"forward": (torch.zeros(1, 3, SIDE, SIDE), torch.zeros(1, 8, dtype=torch.long))}
    old, new = tmp_path / "ViT.pt", tmp_path / "weights.pt"
    torch.jit.trace_module(model, example, check_trace=False).save(old)
    with pytest.raises(InputError, match="TorchScript archive") as refusal:
        open_clip_encoder(tiny_tower, str(old))
    (remedy,) = str(refusal.value).split("weights by ")[1:]
    eval(remedy, {"torch": torch, "FILE": old, "NEW": new})
    assert_same_as_open_clip(open_clip_encoder(tiny_tower, str(new)), model, pixels)

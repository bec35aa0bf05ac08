"""The retrieval model: what padding cannot change, what is saved, and what is not loaded."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from cmdlab.errors import InputError
from cmdlab.retrieval.model import GROUP, RetrievalModel, Shape

SHAPE = Shape(speech_layers=3, speech_width=16, image_width=12, embedding=8)
PATCHES = replace(SHAPE, image_head="patches")
LENGTHS = torch.tensor([7, 3, 1, 5])


@pytest.fixture
def model() -> RetrievalModel:
    torch.manual_seed(0)
    return RetrievalModel(PATCHES)


@pytest.fixture
def states() -> torch.Tensor:
    return torch.randn(3, int(LENGTHS.sum()), 16, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("poison", [torch.nan, torch.inf, 1e9])
def test_what_stands_beyond_a_length_has_no_part(model, states, training, poison):
    model.train(training)
    clean, embeddings = model.speech_head(states, LENGTHS)
    mixed = model.speech_head.mix(states, LENGTHS).detach()
    for row, length in enumerate(LENGTHS.tolist()):
        assert not mixed[row, length:].any()
        mixed[row, length:] = poison
    mixed.requires_grad_()
    tokens = model.speech_head.contextualise(mixed, LENGTHS)
    assert torch.equal(tokens, clean)
    for row, alone in enumerate(states.split(LENGTHS.tolist(), 1)):
        alone = model.speech_head(alone, LENGTHS[row : row + 1])
        assert torch.allclose(alone[0][0], tokens[row, : int(LENGTHS[row])], atol=1e-5)
        assert torch.allclose(alone[1][0], embeddings[row], atol=1e-6)
    model.speech_head.pool(tokens, LENGTHS).square().sum().backward()
    assert torch.isfinite(mixed.grad).all()
    assert all(
        torch.isfinite(p.grad).all() for p in model.speech_head.parameters() if p.grad is not None
    )


def test_without_gradients_the_same_comes_out(model, states):
    """A trained model is used in evaluation and inference mode."""
    model.eval()
    expected = model.speech_head(states, LENGTHS)[1]
    with torch.inference_mode():
        found = model.speech_head(states, LENGTHS)[1]
    assert torch.allclose(found, expected, atol=1e-6)


def test_captions_computed_in_groups_come_back_in_their_order(model):
    generator = torch.Generator().manual_seed(2)
    lengths = torch.randint(1, 10, (2 * GROUP + 3,), generator=generator)
    states = torch.randn(3, int(lengths.sum()), 16, generator=generator)
    tokens, embeddings = model.speech_head(states, lengths)
    parts = states.split(lengths.tolist(), 1)
    for row, length in enumerate(lengths.tolist()):
        alone = model.speech_head(parts[row], lengths[row : row + 1])
        assert torch.allclose(alone[0][0], tokens[row, :length], atol=1e-5)
        assert not tokens[row, length:].any()
        assert torch.allclose(alone[1][0], embeddings[row], atol=1e-5)


def test_captions_computed_in_groups_have_the_gradients_of_each_alone(model):
    generator = torch.Generator().manual_seed(3)
    head = model.speech_head.double()
    lengths = torch.randint(1, 10, (GROUP + 3,), generator=generator)
    states = torch.randn(3, int(lengths.sum()), 16, generator=generator, dtype=torch.double)
    wanted = torch.randn(len(lengths), 8, generator=generator, dtype=torch.double)
    (head(states, lengths)[1] * wanted).sum().backward()
    together = [parameter.grad for parameter in head.parameters()]
    head.zero_grad()
    for row, own in enumerate(states.split(lengths.tolist(), 1)):
        (head(own, lengths[row : row + 1])[1] * wanted[row]).sum().backward()
    for found, parameter in zip(together, head.parameters(), strict=True):
        assert torch.allclose(found, parameter.grad, atol=1e-12)


def test_an_embedding_is_a_weighted_mean_of_the_tokens_own(model, states):
    """So that a word can be looked for in an image by itself."""
    head = model.speech_head
    tokens, embeddings = head(states, LENGTHS)
    for row, length in enumerate(LENGTHS.tolist()):
        words = head.projection(tokens[row, :length])
        mean = head.importance(tokens[row, :length]).softmax(0).T @ words
        assert torch.allclose(nn.functional.normalize(mean[0], dim=0), embeddings[row], atol=1e-6)


def test_embeddings_have_unit_norm(model, states):
    frozen = torch.nn.functional.normalize(torch.randn(4, 8), dim=-1)
    tokens, image = model.image_head(torch.randn(4, 6, 12), frozen)
    assert tokens.shape == (4, 6, 12)
    assert image.detach().norm(dim=1) == pytest.approx(1, abs=1e-5)
    assert model.speech_head(states, LENGTHS)[1].detach().norm(dim=1) == pytest.approx(1, abs=1e-5)


def test_the_global_image_head_gives_the_frozen_features_as_they_are():
    head = RetrievalModel(SHAPE).image_head
    patches, embedding = torch.randn(2, 6, 12), torch.randn(2, 8)
    assert head(patches, embedding) == (patches, embedding)
    assert list(head.parameters()) == []


def test_layers_are_mixed_by_the_softmax_of_their_weights(model, states):
    with torch.no_grad():
        model.speech_head.layer_weights.copy_(torch.tensor([1.0, 2.0, 0.5]).log())
    expected = (states * torch.tensor([1.0, 2.0, 0.5])[:, None, None] / 3.5).sum(0)
    mixed = model.speech_head.mix(states, LENGTHS)
    for row, own in enumerate(expected.split(LENGTHS.tolist())):
        assert torch.allclose(mixed[row, : len(own)], own, atol=1e-6)


def test_the_temperature_is_bounded_and_can_leave_its_bound(model):
    assert model.scale.item() == pytest.approx(1 / 0.07)
    with torch.no_grad():
        model.log_scale.fill_(50.0)
    model.bound_scale()
    assert model.scale.item() == pytest.approx(100.0)
    model.scale.backward()
    assert model.log_scale.grad.item() == pytest.approx(100.0)


def test_another_image_head_is_refused():
    with pytest.raises(InputError, match="image_head: 'attention' is neither"):
        RetrievalModel(replace(SHAPE, image_head="attention"))


@pytest.mark.parametrize("shape", [SHAPE, PATCHES])
def test_saved_and_loaded_it_is_the_same(shape, states, tmp_path):
    model = RetrievalModel(shape)
    model.save_pretrained(tmp_path / "model")
    assert {p.name for p in (tmp_path / "model").iterdir()} == {"model.json", "model.safetensors"}
    loaded = RetrievalModel.from_pretrained(tmp_path / "model")
    assert loaded.shape == shape
    assert loaded.state_dict().keys() == model.state_dict().keys()
    for name, value in model.state_dict().items():
        assert torch.equal(value, loaded.state_dict()[name])
    assert all(parameter.requires_grad for parameter in loaded.parameters())
    found = loaded.speech_head(states, LENGTHS)[1]
    assert torch.equal(found, model.speech_head(states, LENGTHS)[1])


@pytest.fixture
def saved(model: RetrievalModel, tmp_path: Path) -> Path:
    model.save_pretrained(tmp_path)
    return tmp_path


def edit_sizes(**sizes: object) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        path = folder / "model.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **sizes}))

    return edit


def edit_weights(change: Callable[[dict], object]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        weights = load_file(folder / "model.safetensors")
        change(weights)
        save_file(weights, folder / "model.safetensors")

    return edit


@pytest.mark.parametrize(
    "damage",
    [
        shutil.rmtree,
        lambda folder: (folder / "model.json").unlink(),
        lambda folder: (folder / "model.json").write_text("[1]"),
        lambda folder: (folder / "model.json").write_text('{"speech_layers": 3'),
        lambda folder: (folder / "model.json").write_bytes(b"\xff\xfe"),
        lambda folder: (folder / "model.safetensors").write_bytes(b""),
        lambda folder: (folder / "model.safetensors").write_bytes(b"\xff" * 64),
        lambda folder: (folder / "model.safetensors").write_bytes(
            (folder / "model.safetensors").read_bytes()[:-9]
        ),
        lambda folder: torch.save({"a": torch.zeros(1)}, folder / "model.safetensors"),
        edit_sizes(speech_width=32),
        edit_sizes(speech_width=10**7),  # a hundred terabytes, were they made
        edit_sizes(speech_layers=-1),
        edit_sizes(heads=3),
        edit_sizes(heads=0),
        edit_sizes(heads="4"),
        edit_sizes(embedding=8.5),
        edit_sizes(image_head="attention"),
        edit_sizes(denoiser=1),
        edit_sizes(encoders=[1]),
        edit_sizes(encoders={"speech": {"name": "tiny-speech", "sha256": "0", "layers": []}}),
        edit_sizes(encoders={"speech": {"name": 1}, "image": {"name": 1}}),
        edit_sizes(
            encoders={
                kind: {"name": kind, "sha256": "0", "layers": [0, True]}
                for kind in ("speech", "image")
            }
        ),
        edit_weights(lambda weights: weights.pop("log_scale")),
        edit_weights(lambda weights: weights.update(extra=torch.zeros(2))),
        edit_weights(lambda weights: weights.update({"speech_head.cls": torch.zeros(15)})),
    ],
)
def test_what_is_no_model_is_refused(saved, damage):
    damage(saved)
    with pytest.raises(InputError, match=r"holds no retrieval model .*; train it again") as refusal:
        RetrievalModel.from_pretrained(saved)
    assert str(refusal.value).startswith(str(saved))
    assert "\n" not in str(refusal.value)


def test_weights_in_half_precision_are_read_as_single(saved):
    path = saved / "model.safetensors"
    save_file({name: value.half() for name, value in load_file(path).items()}, path)
    dtypes = {p.dtype for p in RetrievalModel.from_pretrained(saved).parameters()}
    assert dtypes == {torch.float32}


@pytest.mark.parametrize(
    ("states", "width", "patch_width", "embedding", "count"),
    [(13, 768, 768, 512, 7_483_918), (25, 1024, 1024, 768, 13_386_522)],
)
def test_it_is_as_large_as_the_readme_says(states, width, patch_width, embedding, count):
    """As SpeechCLIP's parallel head, on HuBERT and CLIP of either size, counted by hand."""
    model = RetrievalModel(Shape(states, width, patch_width, embedding, heads=8))
    inner = 4 * width
    attention = 4 * (width * width + width)
    feed_forward = 2 * width * inner + inner + width
    projection = width * embedding + embedding
    expected = states + width + attention + feed_forward + 3 * 2 * width + projection + 1
    assert sum(p.numel() for p in model.parameters()) == expected == count
    more = expected + embedding * embedding + embedding  # a linear map for images
    readme = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    assert f"| {count:,} | {more:,} |" in readme

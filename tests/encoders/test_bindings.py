"""The tiny encoders whose embeddings tell what belongs to what; how they are made of the others."""

import numpy as np
import pytest
import torch

from cmdlab.corpora import render, sample_captions
from cmdlab.corpora.scenes import mend_articles, sample_twins, swap_colours
from cmdlab.encoders import IMAGE, TEXT, Encoder
from cmdlab.encoders.bindings import (
    BindingImageEncoder,
    BindingTextEncoder,
    fit_bindings,
    open_bindings,
)
from cmdlab.encoders.pretraining import make_pictures, save_encoder
from cmdlab.errors import InputError

SEEING = Encoder("tiny-bindings")


@pytest.fixture(scope="module")
def twins() -> tuple[torch.Tensor, list[tuple[int, str, str]]]:
    """Pictures [200, 64, 64, 3] of 100 pairs; and of each caption that has a foil the picture's
    number, the caption and the foil."""
    pixels, told = [], []
    for pair in range(100):
        rng = np.random.default_rng((7, pair))
        for scene in sample_twins(rng):
            told += [
                (len(pixels), caption.text, mend_articles(foil.text))
                for caption in sample_captions(scene, rng)
                if (foil := swap_colours(caption, scene)) is not None
            ]
            pixels.append(render(scene, rng)[0])
    return torch.from_numpy(np.stack(pixels)), told


@torch.inference_mode()
def foil_test(image, text, twins) -> float:
    """How often a caption is nearer to its picture than its foil is, in percent."""
    pixels, told = twins
    seen = image(pixels)[1][[picture for picture, _, _ in told]]
    true, false = (
        (text(text.tokenise([one[column] for one in told])) * seen).sum(1) for column in (1, 2)
    )
    return 100 * (true > false).float().mean().item()


def test_the_embeddings_tell_a_caption_from_its_foil_and_those_of_the_bag_do_not(twins):
    assert SEEING.text is not None
    assert foil_test(SEEING.open(), SEEING.text.open(), twins) > 75
    assert 40 < foil_test(IMAGE.open(), TEXT.open(), twins) < 60


def test_patches_are_those_of_the_tiny_image_encoder_and_say_together_what_the_picture_says(twins):
    pixels = twins[0][:3]
    with torch.inference_mode():
        (tokens, embedding), (plain, bag) = SEEING.open()(pixels), IMAGE.open()(pixels)
        importance = SEEING.open().importance(tokens).softmax(1)
        together = (importance * SEEING.open().project(tokens)).sum(1)
    assert torch.equal(tokens, plain)
    assert not torch.allclose(embedding, bag)
    assert torch.allclose(torch.nn.functional.normalize(together, dim=1), embedding, atol=1e-5)


def test_a_text_is_read_alike_alone_and_padded():
    reader = Encoder("tiny-bindings-text").open()
    texts = ["a red star", "there is a small blue circle to the left of an orange ring"]
    with torch.inference_mode():
        together = reader(reader.tokenise(texts))
        for text, embedding in zip(texts, together, strict=True):
            assert torch.allclose(reader(reader.tokenise([text]))[0], embedding, atol=1e-5)


def test_the_fit_whitens_what_it_saw_and_comes_out_again(tmp_path):
    scenes = make_pictures(range(1), workers=1)
    pixels, words = scenes.pixels[:300], scenes.words[:300, 0].long()
    image, text = fit_bindings(IMAGE.open(), TEXT.open(), pixels, words)
    with torch.inference_mode():
        tokens = image(pixels)[0]
        pooled = (image.importance(tokens).softmax(1) * image.project(tokens)).sum(1)
    assert pooled.mean(0).abs().max() < 1e-3
    assert torch.allclose(pooled.T.cov(), torch.eye(256), atol=1e-2)
    again = fit_bindings(IMAGE.open(), TEXT.open(), pixels, words)
    for encoder, other in zip((image, text), again, strict=True):
        for one, same in zip(encoder.parameters(), other.parameters(), strict=True):
            assert torch.equal(one, same)
    for name, encoder in (("tiny-bindings", image), ("tiny-bindings-text", text)):
        file = tmp_path / f"{name}.safetensors"
        save_encoder(encoder, file)
        read = open_bindings(name, str(file))
        assert type(read) is type(encoder) in (BindingImageEncoder, BindingTextEncoder)
        assert torch.equal(read.bindings.directions, encoder.bindings.directions)
        assert torch.equal(read.bindings.components, encoder.bindings.components.half().float())
    with pytest.raises(InputError, match=r"holds no weights of tiny-bindings-text \("):
        open_bindings("tiny-bindings-text", str(tmp_path / "tiny-bindings.safetensors"))

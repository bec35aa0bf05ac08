"""The tiny encoders' architecture: shapes, norms, and padding that never matters."""

import pytest
import torch
from torch import nn

from cmdlab.encoders.tiny import (
    LETTERS,
    TOKENS_PER_SECOND,
    TinyImageEncoder,
    TinySpeechEncoder,
    TinyTextEncoder,
    TinyWordEncoder,
    padding_mask,
)


@pytest.fixture(scope="module")
def speech() -> TinySpeechEncoder:
    torch.manual_seed(0)
    return TinySpeechEncoder(layers=2).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def text() -> TinyTextEncoder:
    torch.manual_seed(0)
    return TinyTextEncoder(("a", "red", "star", "ring"), layers=1).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def image() -> TinyImageEncoder:
    torch.manual_seed(0)
    return TinyImageEncoder().eval().requires_grad_(False)


@pytest.fixture(scope="module")
def pixels() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(256, (5, 64, 64, 3), generator=generator, dtype=torch.uint8)


def test_the_padding_mask_by_hand():
    assert padding_mask(torch.tensor([0, 2, 3]), 3).tolist() == [
        [True, True, True],
        [False, False, True],
        [False, False, False],
    ]


def test_an_image_becomes_patches_and_a_unit_vector(image, pixels):
    tokens, embedding = image(pixels)
    assert tokens.shape == (5, 64, 128)
    assert embedding.shape == (5, 256)
    assert embedding.norm(dim=1) == pytest.approx(1, abs=1e-5)
    assert image.project(tokens).shape == (5, 64, 256)


def test_an_image_does_not_see_the_others_of_its_batch(image, pixels):
    tokens, embedding = image(pixels)
    alone = image(pixels[2:3])
    assert torch.allclose(alone[0], tokens[2:3], atol=1e-4)
    assert torch.allclose(alone[1], embedding[2:3], atol=1e-5)
    assert not torch.allclose(embedding[1], embedding[2], atol=1e-4)


def test_tokens_run_over_the_rows_of_the_picture(image, pixels):
    """With position and attention out of the way, a change in a corner stays with its patch."""
    stem = nn.Sequential(*image.stem)
    changed = pixels.clone()
    changed[:, :4, -4:] = 255 - changed[:, :4, -4:]  # top right
    bare = TinyImageEncoder(layers=0).eval()
    bare.stem = stem
    difference = (bare(pixels)[0] - bare(changed)[0]).abs().amax((0, 2)).view(8, 8)
    assert difference[0, 7] > 0
    assert (difference[3:, :] == 0).all()
    assert (difference[:, :5] == 0).all()


def test_a_text_is_embedded_alike_alone_and_padded(text):
    texts = ["a red star", "ring", "a star a ring red a a"]
    words = text.tokenise(texts)
    assert words.tolist()[1] == [4, 0, 0, 0, 0, 0, 0]
    together = text(words)
    assert together.shape == (3, 256)
    assert together.norm(dim=1) == pytest.approx(1, abs=1e-5)
    for i, one in enumerate(texts):
        assert torch.allclose(text(text.tokenise([one])), together[i : i + 1], atol=1e-5)


def test_the_order_of_words_matters(text):
    first, second = text(text.tokenise(["a red star", "a star red"]))
    assert (first - second).abs().max() > 1e-5


def test_a_word_that_is_not_known_raises(text):
    with pytest.raises(KeyError, match="octopus"):
        text.tokenise(["a red octopus"])


def test_perfect_hearing_tells_which_word_stands_where_and_nothing_else():
    words = TinyWordEncoder(("a", "red", "star"))
    ids = words.tokenise(["a red star", "red a"])
    states, lengths = words(ids, torch.tensor([3, 2]))
    assert (states.shape, lengths.tolist()) == ((2, 1, 3, 128), [3, 2])
    assert (states[1, 0, 2] == 0).all()  # padding
    a, red, star = words.table
    said = states[0, 0] - words.places[:3]
    expected = torch.stack((a + 0.7 * red, red + 0.7 * (a + star), star + 0.7 * red))
    assert torch.allclose(said, expected, atol=1e-5)
    assert torch.allclose(states[1, 0, 1] - words.places[1], a + 0.7 * red, atol=1e-5)
    assert torch.pdist(words.places[:3]).min() > 1


def test_speech_is_encoded_alike_alone_and_padded(speech):
    generator = torch.Generator().manual_seed(1)
    lengths = torch.tensor([16_000, 7_001, 12_345])
    waveform = 0.1 * torch.randn(3, 16_000, generator=generator)
    waveform = waveform * ~padding_mask(lengths, 16_000)
    states, counts = speech(waveform, lengths)
    assert states.shape[:2] == (3, 3)
    assert states.shape[3] == 128
    for i, length in enumerate(lengths.tolist()):
        alone, count = speech(waveform[i : i + 1, :length], lengths[i : i + 1])
        assert count == counts[i]
        assert torch.allclose(alone[0], states[i, :, : int(count)], atol=1e-4)
        assert (states[i, :, int(count) :] == 0).all()
        letters, frames = speech.spell(waveform[i : i + 1, :length], lengths[i : i + 1])
        padded, padded_frames = speech.spell(waveform, lengths)
        assert frames == padded_frames[i]
        assert torch.allclose(letters[0], padded[i, : int(frames)], atol=1e-4)


@pytest.mark.parametrize("seconds", [1, 2.5, 6])
def test_tokens_a_second(speech, seconds):
    samples = int(16_000 * seconds)
    _, count = speech(torch.zeros(1, samples), torch.tensor([samples]))
    assert int(count) == pytest.approx(seconds * TOKENS_PER_SECOND, abs=1)


def test_a_sound_is_heard_at_its_time(speech):
    """A click at 1.2 s changes the first state's tokens around 1.2 s, and none a second away."""
    speech_like = 0.1 * torch.randn(1, 32_000, generator=torch.Generator().manual_seed(2))
    click = speech_like.clone()
    click[:, 19_200:19_600] *= 3
    lengths = torch.tensor([32_000])
    # The bands are normalised over the utterance, so all tokens change a little.
    difference = (speech(speech_like, lengths)[0] - speech(click, lengths)[0])[0, 0].abs().mean(-1)
    assert abs(int(difference.argmax()) - 1.2 * TOKENS_PER_SECOND) <= 1.5
    assert difference[:3].max() < 0.2 * difference.max()


def test_spelling_gives_probabilities(speech):
    letters, _ = speech.spell(torch.randn(1, 8_000), torch.tensor([8_000]))
    assert letters.shape[2] == len(LETTERS) + 1
    assert letters.exp().sum(-1) == pytest.approx(1, abs=1e-5)

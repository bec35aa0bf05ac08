"""Which captions a step takes: epochs, fewer pictures, and pictures that look alike."""

from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from cmdlab.errors import InputError
from cmdlab.retrieval.batches import Batches


@dataclass
class Pictures:
    embeddings: torch.Tensor

    def __len__(self) -> int:
        return len(self.embeddings)


@pytest.fixture
def features() -> SimpleNamespace:
    """Ten pictures, of which 2 i and 2 i + 1 look alike, with four captions each, in any order."""
    generator = torch.Generator().manual_seed(0)
    seen = torch.randn(5, 16, generator=generator).repeat_interleave(2, 0)
    seen += 0.1 * torch.randn(10, 16, generator=generator)
    of = torch.arange(10).repeat(4)[torch.randperm(40, generator=generator)]
    said = ["a red star", "a ring", "a starry ring", "red and blue"]
    captions = [SimpleNamespace(text=said[i % 4]) for i in range(40)]
    return SimpleNamespace(
        image=Pictures(normalize(seen, dim=-1)),
        image_index=of,
        corpus=SimpleNamespace(captions=captions),
    )


def test_an_epoch_takes_no_caption_twice(features):
    batches = Batches(features, seed=1, batch_size=8)
    steps = [batches.captions(step) for step in range(10)]
    assert sorted(torch.cat(steps[:5]).tolist()) == list(range(40))
    assert sorted(torch.cat(steps[5:]).tolist()) == list(range(40))
    assert not torch.equal(steps[0], steps[5])
    whole = Batches(features, seed=1, batch_size=999).captions(1)
    assert sorted(whole.tolist()) == list(range(40))


def test_fewer_pictures_bring_all_of_their_captions_and_are_part_of_more(features):
    of = {}
    for images in (2, 5):
        batches = Batches(features, seed=1, batch_size=999, images=images)
        captions = batches.captions(3)
        of[images] = set(features.image_index[captions].tolist())
        assert len(of[images]) == images
        assert len(captions) == len(set(captions.tolist())) == 4 * images
    assert of[2] < of[5]
    with pytest.raises(InputError, match="images: 99 are more than the 10 of the training split"):
        Batches(features, seed=1, batch_size=8, images=99)


@pytest.mark.parametrize("hard_negatives", [0.0, 0.5])
def test_captions_that_hold_a_word_kept_out_are_in_no_batch(features, hard_negatives):
    """A word is a whole one: "star" is not in "starry"."""
    batches = Batches(
        features,
        seed=1,
        batch_size=10,
        hard_negatives=hard_negatives,
        without_words="star blue",
    )
    taken = torch.cat([batches.captions(step) for step in range(30)])
    assert set((taken % 4).tolist()) == {1, 2}
    assert set(taken.tolist()) == {i for i in range(40) if i % 4 in (1, 2)}
    with pytest.raises(InputError, match="'a red' leaves no caption"):
        Batches(features, seed=1, batch_size=10, without_words="a red")


@pytest.mark.parametrize("images", [0, 7])
def test_hard_negatives_are_captions_of_the_picture_that_looks_most_alike(features, images):
    seen, of = features.image.embeddings, features.image_index
    plain = Batches(features, seed=3, batch_size=8, images=images)
    hard = Batches(features, seed=3, batch_size=8, images=images, hard_negatives=0.25)
    used = sorted(set(of[Batches(features, seed=3, batch_size=99, images=images).used].tolist()))
    drawn = set()
    for step in range(20):
        captions = hard.captions(step)
        assert torch.equal(captions[:6], plain.captions(step)[:6])
        assert torch.equal(captions, hard.captions(step))
        for own, negative in zip(
            of[captions[:2]].tolist(), of[captions[-2:]].tolist(), strict=True
        ):
            others = [image for image in used if image != own]
            assert negative == others[int(np.argmax([seen[own] @ seen[image] for image in others]))]
        drawn |= set(captions[-2:].tolist())
    assert len(drawn) > 2 * len(used)  # not one caption of a picture alone

"""Pre-training: apart from the study, runnable in a second, and saved as it is loaded."""

import math
from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest
import torch

from cmdlab.corpora import SPLITS, load_corpus
from cmdlab.corpora.images import read_image
from cmdlab.corpora.scenes import vocabulary
from cmdlab.corpora.speaking import PRETRAINING_VOICES, STUDY_VOICES, TEST_ONLY_VOICES
from cmdlab.encoders import IMAGE, SPEECH, TEXT
from cmdlab.encoders import pretraining as module
from cmdlab.encoders.pretraining import (
    Pictures,
    Utterances,
    make_pictures,
    make_utterances,
    save_encoder,
    text_to_image,
    train_image_encoder,
    train_speech_encoder,
    words_spelt,
)
from cmdlab.encoders.tiny import WEIGHTS, TinyImageEncoder, TinyTextEncoder
from cmdlab.evaluation.ranks import rank_table, retrieval_metrics

MOMENT = 3  # steps


@pytest.fixture(scope="module")
def pictures() -> Pictures:
    """The first 120 scenes of pre-training."""
    made = make_pictures(range(1), workers=1)
    return Pictures(made.pixels[:120], made.words[:120])


@pytest.fixture(scope="module")
def utterances() -> Utterances:
    """The first 24 utterances of pre-training."""
    made = make_utterances(range(1), workers=1)
    return Utterances(made.sounds[:24], made.texts[:24])


def test_no_voice_of_pretraining_is_heard_in_the_study():
    assert not set(PRETRAINING_VOICES) & {*STUDY_VOICES, *TEST_ONLY_VOICES}


def test_no_picture_of_pretraining_is_in_the_study(pictures, smoke_corpus):
    seen = {picture.tobytes() for picture in pictures.pixels.numpy()}
    assert len(seen) == 120
    for split in SPLITS:
        images = load_corpus(smoke_corpus, split).images
        assert not seen & {read_image(image.path).tobytes() for image in images}


def test_a_shard_is_the_same_in_every_process(pictures):
    pixels, words = module._picture_shard(0, None)
    assert (pixels[:120] == pictures.pixels.numpy()).all()
    assert (words[:120] == pictures.words.numpy()).all()


def test_which_words_a_scene_is_told_with():
    words = torch.zeros(2, 5, 48, dtype=torch.uint8)
    words[0, 0, :3] = torch.tensor([1, 3, 3])
    words[0, 4, 0] = 2
    words[1, 1, 0] = 3
    said = Pictures(torch.zeros(2, 64, 64, 3, dtype=torch.uint8), words).says(5)
    assert said.tolist() == [
        [False, True, True, True, False],
        [False, False, False, True, False],
    ]


def test_the_history_has_the_metrics_of_the_evaluation(pictures):
    torch.manual_seed(0)
    image, text = TinyImageEncoder().eval(), TinyTextEncoder(vocabulary()).eval()
    found = text_to_image(image, text, pictures)
    assert not image.training
    with torch.inference_mode():
        gallery = image(pictures.pixels)[1]
        queries = text(pictures.words.flatten(0, 1).long())
    rows = torch.arange(120)
    table = rank_table(queries, gallery, rows.repeat_interleave(5), rows)
    expected = retrieval_metrics(table)["speech_to_image"]
    assert found == {k: pytest.approx(expected[k], abs=0.4) for k in ("R@1", "R@10")}


def test_a_moment_of_image_training(pictures, tmp_path):
    few = Pictures(pictures.pixels[:40], pictures.words[:40])
    image, text, history = train_image_encoder(
        few, few, few, steps=MOMENT, batch_size=8, single_part=0.5
    )
    assert not image.training
    assert not text.training
    assert [entry["step"] for entry in history] == [MOMENT]
    assert all(math.isfinite(value) for entry in history for value in entry.values())
    reload_and_compare(image, tmp_path / "image.safetensors")
    names = reload_and_compare(text, tmp_path / "text.safetensors")
    assert bytes(names["words"].tolist()).decode().split() == list(vocabulary())


def test_another_round_goes_on_from_the_first(pictures):
    few = Pictures(pictures.pixels[:40], pictures.words[:40])
    options = {"steps": 1, "batch_size": 8, "learning_rate": 1e-12}
    first = train_image_encoder(few, few, few, **options, single_part=1.0)[:2]
    weights = [deepcopy(encoder.state_dict()) for encoder in first]
    second = train_image_encoder(few, few, few, **options, start=first, seed=1)[:2]
    for encoder, before in zip(second, weights, strict=True):
        for name, value in dict(encoder.named_parameters()).items():
            assert torch.allclose(value, before[name], atol=1e-6)
        assert not encoder.training


def test_a_moment_of_speech_training(utterances, tmp_path):
    encoder, history = train_speech_encoder(utterances, utterances, steps=MOMENT, batch_size=4)
    assert not encoder.training
    assert all(0 <= entry["words"] <= 100 for entry in history)
    reload_and_compare(encoder, tmp_path / "speech.safetensors")


def reload_and_compare(encoder: torch.nn.Module, path: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    save_encoder(encoder, path)
    assert [file.name for file in path.parent.iterdir() if file.suffix == ".part"] == []
    saved = load_file(path)
    for name, value in encoder.state_dict().items():
        assert torch.equal(saved[name], value.half())
    return saved


def test_the_shipped_towers_match_texts_with_pictures(pictures):
    found = text_to_image(IMAGE.open(), TEXT.open(), pictures)
    assert found["R@1"] > 20  # by chance 0.8
    assert not IMAGE.open().training


def test_the_shipped_speech_encoder_spells(utterances):
    encoder = deepcopy(SPEECH.open())
    assert words_spelt(encoder, utterances) > 20
    silence = Utterances([np.zeros(16_000, np.int16)] * 2, utterances.texts[:2])
    assert words_spelt(encoder, silence) < 20


def test_the_weights_are_small():
    assert sum(file.stat().st_size for file in WEIGHTS.glob("*.safetensors")) <= 10e6

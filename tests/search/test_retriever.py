"""Own recordings and pictures become the very vectors that the run was measured on."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image
from scipy.signal import resample_poly

from cmdlab.corpora import SAMPLE_RATE, load_corpus, read_audio, read_image
from cmdlab.encoders import IMAGE, SPEECH, Features, Hearing, encode, weights_of
from cmdlab.errors import InputError
from cmdlab.retrieval import Frozen, RetrievalModel, embed_images
from cmdlab.search import Retriever


@pytest.fixture(scope="module")
def captions(smoke_corpus):
    return load_corpus(smoke_corpus, "test").captions[:6]


@pytest.fixture(scope="module")
def vectors(retriever, captions) -> np.ndarray:
    return retriever.embed_recordings([caption.audio for caption in captions])


def test_pictures_get_the_vectors_that_the_run_was_measured_on(retriever, smoke_data):
    features: Features = smoke_data.test
    expected = embed_images(retriever.model, features.image, range(len(features.image)), "cpu")
    paths = [image.path for image in features.corpus.images]
    assert np.allclose(retriever.embed_images(paths), expected.numpy(), atol=1e-5)
    one = retriever.embed_image(str(paths[3]))
    assert one.dtype == np.float32
    assert one.shape == (retriever.dimension,)
    assert np.allclose(one, expected[3], atol=1e-5)


def test_recordings_get_the_vectors_of_the_encoder_and_the_head(retriever, captions, vectors):
    """Undisturbed: a user's recording is heard as it is, where the study adds noise."""
    clear = encode(SPEECH, captions, Hearing(snr_db=None, reverberation=False))
    for one, vector in zip(clear, vectors, strict=True):
        states = torch.from_numpy(one.tokens).float().transpose(0, 1).contiguous()
        expected = retriever.model.speech_head(states, torch.tensor([len(one.tokens)]))[1]
        assert np.allclose(vector, expected.detach().numpy()[0], atol=1e-4)
    assert np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)


def test_samples_are_heard_as_their_file_is(retriever, captions, vectors):
    samples = read_audio(captions[0].audio)
    for given in (
        samples,
        np.stack([samples, samples], axis=1),
        np.round(samples * 32_768).astype(np.int16),
        samples.astype(np.float64),
        np.round(samples.astype(np.float64) * 2**31).clip(-(2**31), 2**31 - 1).astype(np.int32),
    ):
        found = retriever.embed_speech(given, SAMPLE_RATE)
        assert np.allclose(found, vectors[0], atol=1e-3), given.dtype


@pytest.mark.parametrize(("rate", "channels", "suffix"), [(44_100, 2, "ogg"), (48_000, 1, "mp3")])
def test_other_rates_channels_and_formats_say_the_same(
    retriever, captions, vectors, tmp_path, rate, channels, suffix
):
    samples = resample_poly(read_audio(captions[1].audio), rate // 100, SAMPLE_RATE // 100)
    path = tmp_path / f"own.{suffix}"
    soundfile.write(path, np.stack([samples] * channels, axis=1), rate)
    from_file = retriever.embed_speech(path)
    assert from_file @ vectors[1] > 0.95
    assert from_file @ vectors[1] > (from_file @ np.delete(vectors, 1, axis=0).T).max()
    assert retriever.embed_speech(samples, rate) @ vectors[1] > 0.98


def test_pictures_of_any_size_and_mode_are_seen(retriever, smoke_data, tmp_path):
    """Enlarged, on a wider sheet, as a palette, turned by EXIF: the square in the middle counts."""
    paths = [image.path for image in smoke_data.test.corpus.images]
    picture = Image.fromarray(read_image(paths[0])).resize((320, 320), Image.Resampling.LANCZOS)
    wide = Image.new("RGB", (500, 320), "white")
    wide.paste(picture, (90, 0))
    wide.save(tmp_path / "wide.png")
    turned = Image.Exif()
    turned[0x0112] = 6  # to be turned by a quarter, clockwise
    wide.transpose(Image.Transpose.ROTATE_90).save(
        tmp_path / "turned.webp", exif=turned, quality=95
    )
    wide.quantize(256).save(tmp_path / "palette.gif")
    gallery = retriever.embed_images(paths)
    names = ("wide.png", "turned.webp", "palette.gif")
    for vector in [*retriever.embed_images([tmp_path / name for name in names])]:
        assert (gallery @ vector).argmax() == 0
        assert vector @ gallery[0] > 0.9
    opened = retriever.embed_image(Image.open(tmp_path / "wide.png"))
    assert np.allclose(opened, retriever.embed_image(tmp_path / "wide.png"), atol=1e-5)


def test_nothing_gives_no_vectors(retriever):
    assert retriever.embed_images([]).shape == (0, retriever.dimension)


@pytest.mark.parametrize(
    ("embed", "reason"),
    [
        (lambda r, p: r.embed_speech(p / "none.wav"), "none.wav: is no file"),
        (lambda r, p: r.embed_image(p / "none.png"), "none.png: is no file"),
        (lambda r, p: r.embed_speech(p / "text.txt"), "text.txt: is no sound"),
        (lambda r, p: r.embed_image(p / "text.txt"), "text.txt: is no picture"),
        (lambda r, p: r.embed_speech(np.zeros(9)), "without their rate"),
        (lambda r, p: r.embed_speech(np.zeros(9), 7), "a sampling rate of 7 Hz"),
        (lambda r, p: r.embed_speech(np.zeros(0), 16_000), "no sound"),
        (lambda r, p: r.embed_speech(np.zeros(5_000_000), 16_000), "lasts over 300 s"),
        (lambda r, p: r.embed_speech(np.full(99, np.nan), 16_000), "no finite number"),
        (lambda r, p: r.embed_speech(np.full(99, 3.0), 16_000), "scale them"),
        (lambda r, p: r.embed_images([Image.new("L", (10_000, 6_000))]), "no. 1: has 10000 × 6000"),
    ],
)
def test_what_is_no_sound_or_picture_is_refused(retriever, tmp_path, embed, reason):
    (tmp_path / "text.txt").write_text("no medium at all")
    with pytest.raises(InputError, match=reason):
        embed(retriever, tmp_path)


def test_a_run_says_which_encoders_its_model_belongs_to(run):
    encoders = RetrievalModel.from_pretrained(run / "model").encoders
    assert {kind: (one.name, one.sha256, one.layers) for kind, one in encoders.items()} == {
        "speech": ("tiny-speech", weights_of(SPEECH), ()),
        "image": ("tiny-image", weights_of(IMAGE), ()),
    }


def test_encoders_with_other_weights_are_refused(run, tmp_path):
    shutil.copytree(run / "model", tmp_path / "model")
    path = tmp_path / "model" / "model.json"
    described = json.loads(path.read_text())
    described["encoders"]["image"]["sha256"] = "0" * 64
    path.write_text(json.dumps(described))
    with pytest.raises(InputError, match=r"trained on tiny-image with weights 0{12}….*image_weigh"):
        Retriever(tmp_path / "model")
    del described["encoders"]
    path.write_text(json.dumps(described))
    with pytest.raises(InputError, match="does not say which frozen encoders"):
        Retriever(tmp_path / "model")


def test_chosen_layers_are_kept(smoke_corpus, captions, retriever, tmp_path):
    """A model of some of the states is saved with their numbers, and hears those alone."""
    shape = replace(retriever.model.shape, speech_layers=2)
    encoders = retriever.model.encoders
    speech = replace(encoders["speech"], layers=(1, 3))
    model = RetrievalModel(shape, {**encoders, "speech": speech})
    model.save_pretrained(tmp_path)
    assert RetrievalModel.from_pretrained(tmp_path).encoders["speech"] == Frozen(
        "tiny-speech", weights_of(SPEECH), (1, 3)
    )
    assert Retriever(tmp_path).embed_speech(captions[0].audio).shape == (256,)

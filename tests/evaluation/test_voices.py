"""Voices: who is heard and who is not, and files that nobody vouches for."""

import numpy as np
import pytest

from cmdlab.errors import InputError
from cmdlab.evaluation import Voices

SPEAKERS = ["en-us", "zoë", "", "en-us", "zoë", "new"]


def test_a_voice_is_heard_if_training_has_it():
    voices = Voices.of(SPEAKERS, {"zoë", "en-us", "elsewhere"})
    assert voices.names.tolist() == ["", "en-us", "new", "zoë"]
    assert voices.heard.tolist() == [False, True, False, True]
    assert voices.names[voices.of_caption].tolist() == SPEAKERS
    assert voices.captions_of(heard=True).tolist() == [True, True, False, True, True, False]
    assert voices.captions_of(heard=False).tolist() == [False, False, True, False, False, True]
    assert not Voices.of(SPEAKERS, []).heard.any()


def test_voices_are_read_as_they_were_saved(tmp_path):
    voices = Voices.of(SPEAKERS, ["new"])
    voices.save(tmp_path / "voices.npz")
    assert Voices.load(tmp_path / "voices.npz").same_as(voices)
    assert not Voices.load(tmp_path / "voices.npz").same_as(Voices.of(SPEAKERS, []))


@pytest.mark.parametrize(
    "change",
    [
        {"names": np.array(["a", "b", "b", "c"])},
        {"names": np.arange(4)},
        {"names": np.array(["a", "b", "c", "d"], object)},
        {"names": np.frombuffer(np.array([97, 98, 99, 2**31 - 1], "<u4").tobytes(), "<U1")},
        {"heard": np.array([True])},
        {"heard": np.zeros(4)},
        {"of_caption": np.array([0, 1, 4])},
        {"of_caption": np.array([0, -1])},
        {"of_caption": np.array([[0, 1]])},
        {"of_caption": np.array([], np.int64)},
    ],
)
def test_voices_that_no_gallery_can_have_are_refused(tmp_path, change):
    voices = Voices.of(SPEAKERS, [])
    arrays = {name: getattr(voices, name) for name in ("names", "heard", "of_caption")}
    np.savez(tmp_path / "voices.npz", **(arrays | change))
    with pytest.raises(InputError, match=r"voices\.npz: "):
        Voices.load(tmp_path / "voices.npz")

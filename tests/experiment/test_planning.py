"""What a recipe will take: computed by hand, and measured on encoders at random weights."""

import pytest

from cmdlab.encoders import Description
from cmdlab.experiment import AMOUNTS, measure_throughput, plan
from cmdlab.experiment.planning import Amount, Throughput

SPEECH = Description("s", "speech", 25, 1024, 0, "", "", tokens_per_second=50.0)
IMAGE = Description("i", "images", 1, 1024, 768, "", "", grid=(16, 16))
RECIPE = {"steps": 3600, "batch_size": 100}


def test_a_plan_is_what_is_computed_by_hand():
    throughput = Throughput("cuda", SPEECH, IMAGE, 400.0, 50.0, 200.0, 1_000)
    amount = Amount(images=18_000, captions=36_000, seconds=8.0)
    stored = plan(RECIPE, amount, throughput)
    assert stored.image_features == 18_000 * 256 * 1024 * 2
    assert stored.speech_features == 36_000 * 8 * 50 * 25 * 1024 * 2
    assert stored.encoding_hours == pytest.approx((18_000 / 50 + 36_000 * 8 / 400) / 3600)
    assert stored.run_hours == pytest.approx(100 / 200)  # 3,600 steps of half a second
    assert stored.step_memory == 3 * 100 * 8 * 50 * 25 * 1024 * 4
    online = plan(RECIPE | {"online": True}, amount, throughput)
    assert online.speech_features == 0
    assert online.run_hours == pytest.approx(0.5 + 100 * 6.4 / 400)
    assert online.step_memory == pytest.approx(3 * 100 * 6.4 * 50 * 25 * 1024 * 4 + 2 * 1_000)


def test_a_step_of_the_large_recipe_fits_in_80_gigabytes():
    """Computed: batch 256, HuBERT large online in bfloat16, captions of the longest 6.4 s."""
    large = Throughput("cuda", SPEECH, IMAGE, 1.0, 1.0, 1.0, 315_438_720)
    recipe = {"steps": 1, "batch_size": 256, "online": True}
    memory = plan(recipe, Amount(1, 1, 6.4), large).step_memory
    assert 25e9 < memory < 60e9  # what is left is the encoder's own, for one group of clips


def test_throughput_is_measured_with_what_the_recipe_names():
    recipe = {
        **{"speech_encoder": "tiny-speech", "image_encoder": "tiny-image", "corpus": "none"},
        **{"weight": 1.0, "corruption": "swap", "target": "tokens", "batch_size": 4, "steps": 1},
    }
    throughput = measure_throughput(recipe, "cpu", captions=2)
    assert throughput.speech.name == "tiny-speech"
    assert min(throughput.heard, throughput.seen, throughput.trained) > 0
    assert plan(recipe, AMOUNTS["flickr8k"], throughput).run_hours > 0

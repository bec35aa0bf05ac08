"""What a recipe will take, before any of it runs: disk, memory and hours on the machine at hand.

Hours come from throughput measured here, with the real architectures at random weights: a product
takes as long whatever the numbers are. Disk and memory are computed.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from cmdlab.corpora import SAMPLE_RATE
from cmdlab.encoders import Description, untrained
from cmdlab.experiment.run import LONGEST_HEARD
from cmdlab.retrieval import Denoising, Training, parameters_of, time_step


@dataclass(frozen=True)
class Amount:
    """How large a corpus is."""

    images: int
    captions: int
    seconds: float  # of a caption, on average


AMOUNTS = {  # images and captions as released; captions of SpokenCOCO are "some 600,000"
    "flickr8k": Amount(8_000, 40_000, 4.4),
    "spokencoco": Amount(123_287, 600_000, 4.4),
}


@dataclass(frozen=True)
class Throughput:
    """What one process does in a second here, and the two encoders that it was measured with."""

    device: str
    speech: Description
    image: Description
    heard: float  # seconds of sound encoded
    seen: float  # pictures encoded
    trained: float  # captions trained on, encoders left out
    parameters: int  # of the speech encoder, which is held while it is online


@dataclass(frozen=True)
class Plan:
    """What one recipe takes. Bytes, and hours of one process."""

    image_features: float  # on disk
    speech_features: float  # on disk, all layers, where speech is stored
    step_memory: float  # of a step: encoder, states of the batch, and what the heads keep of them
    encoding_hours: float  # all pictures and all speech, once
    run_hours: float  # one run: its steps, and the encoding within them where speech is online


def measure_throughput(recipe: Mapping[str, Any], device: str, *, captions: int = 4) -> Throughput:
    """Encode and train for a moment with a recipe's encoders and heads, at random weights.

    captions: of a batch that is measured; time is about linear in it. On a CPU the heads are
    measured in float32, whatever the recipe says: most have no products in bfloat16.
    """
    speech = untrained(recipe["speech_encoder"]).to(device)
    image = untrained(recipe["image_encoder"]).to(device)
    if device.startswith("cuda"):
        speech = speech.to(torch.bfloat16)  # as `OnlineSpeech` has it
    dtype = next(speech.parameters()).dtype
    clips = torch.randn(captions, LONGEST_HEARD, device=device, dtype=dtype)
    lengths = torch.full((captions,), LONGEST_HEARD, device=device)
    pixels = image.pixels(np.zeros((64, 64, 3), np.uint8))
    pictures = pixels.expand(captions, *pixels.shape).to(device)
    with torch.inference_mode():
        hearing = _seconds(lambda: speech(clips, lengths), device)
        seeing = _seconds(lambda: image(pictures), device)
    training = training_of(recipe)
    step = time_step(
        replace(training, precision="float32") if device == "cpu" else training,
        speech.description,
        image.description,
        captions=captions,
        tokens=round(LONGEST_HEARD / SAMPLE_RATE * speech.description.tokens_per_second),
        device=device,
    )
    return Throughput(
        device,
        speech.description,
        image.description,
        heard=captions * LONGEST_HEARD / SAMPLE_RATE / hearing,
        seen=captions / seeing,
        trained=captions / step,
        parameters=sum(parameter.numel() for parameter in speech.parameters()),
    )


def training_of(recipe: Mapping[str, Any]) -> Training:
    """A recipe of a sweep file as `train` takes it; its other parameters are left out."""
    own, denoising = ({one.name for one in parameters_of([of])} for of in (Training, Denoising))
    return Training(
        **{name: value for name, value in recipe.items() if name in own},
        denoising=Denoising(**{k: value for k, value in recipe.items() if k in denoising}),
    )


def plan(recipe: Mapping[str, Any], amount: Amount, throughput: Throughput) -> Plan:
    """What a recipe takes for a corpus of that size at that throughput."""
    speech, image = throughput.speech, throughput.image
    assert speech.tokens_per_second is not None
    assert image.grid is not None
    batch, online = recipe["batch_size"], recipe.get("online", False)
    heard = min(amount.seconds, LONGEST_HEARD / SAMPLE_RATE) if online else amount.seconds
    of_a_second = speech.tokens_per_second * speech.layers * speech.width  # numbers
    sound = amount.captions * amount.seconds
    seconds = batch / throughput.trained + (batch * heard / throughput.heard if online else 0)
    states = batch * heard * of_a_second * 4  # float32
    encoder = throughput.parameters * (2 if throughput.device.startswith("cuda") else 4)
    return Plan(
        image_features=2 * amount.images * image.grid[0] * image.grid[1] * image.width,
        speech_features=0 if online else 2 * sound * of_a_second,
        # The states, the same joined or normalised, and the gradient's own copy.
        step_memory=3 * states + (encoder if online else 0),
        encoding_hours=(amount.images / throughput.seen + sound / throughput.heard) / 3600,
        run_hours=recipe["steps"] * seconds / 3600,
    )


def _seconds(work: Callable[[], object], device: str) -> float:
    """The shorter of two, after one to warm up."""
    took = []
    for _ in range(3):
        started = time.perf_counter()
        work()
        if device.startswith("cuda"):
            torch.cuda.synchronize()
        took.append(time.perf_counter() - started)
    return min(took[1:])

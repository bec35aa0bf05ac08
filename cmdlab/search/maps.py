"""Which part of a picture a moment of speech fits: one value for each frame and patch."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from cmdlab.corpora import bytes_of, decode_picture
from cmdlab.encoders import compute
from cmdlab.search.retriever import Retriever


@dataclass(frozen=True, eq=False)
class FrameMap:
    """`values` float32 [frames, rows, columns], higher is better; the patches lie over the square
    in the picture's middle. `rate`: frames a second."""

    values: NDArray[np.float32]
    rate: float

    def between(self, start: float, end: float) -> NDArray[np.float32]:
        """The mean map [rows, columns] of the frames from start to end, in seconds; of the nearest
        frame where there is none between."""
        first = min(int(start * self.rate), len(self.values) - 1)
        last = max(first + 1, min(round(end * self.rate), len(self.values)))
        mean: NDArray[np.float32] = self.values[first:last].mean(0)
        return mean


@torch.inference_mode()
def frame_map(retriever: Retriever, waveform: NDArray[np.float32], picture: Path) -> FrameMap:
    """Each frame's and each patch's product, both projected into the shared space, without what all
    patches share. The same that reports show of words: see `cmdlab.experiment`.

    waveform: float32 [samples] at 16 kHz. Raises BadEntry for a picture that cannot be read.
    """
    model, device = retriever.model, retriever.device
    eye, ear = retriever.image_encoder, retriever.speech_encoder
    network = eye.open(device)
    square = decode_picture(bytes_of(picture), side=network.description.side)
    [seen] = compute(eye, [network.pixels(np.asarray(square))], device)
    [heard] = compute(ear, [torch.from_numpy(waveform)], device)
    head = model.image_head
    project = head.projection if head.pools_patches else network.project
    tokens = torch.from_numpy(seen.tokens[:, 0]).to(device).float()[None]  # [1, patches, width]
    patches = project(head(tokens, torch.from_numpy(seen.embedding).to(device)[None])[0])[0]
    patches = patches - patches.mean(0)
    states = torch.from_numpy(heard.tokens).to(device).float().transpose(0, 1)
    lengths = torch.tensor([states.shape[1]], device=device)
    frames = model.speech_head.projection(model.speech_head(states.contiguous(), lengths)[0])[0]
    rate, grid = ear.description.tokens_per_second, eye.description.grid
    assert rate is not None, f"{ear} has no frames"
    assert grid is not None, f"{eye} has no patches"
    values = (frames @ patches.T).cpu().numpy().reshape(len(frames), *grid)
    return FrameMap(values, rate)

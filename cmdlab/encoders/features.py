"""One split of a corpus as the frozen encoders see it."""

from dataclasses import dataclass

from torch import Tensor

from cmdlab.corpora import Corpus
from cmdlab.encoders.online import OnlineSpeech
from cmdlab.encoders.store import FeatureStore


@dataclass(frozen=True)
class Features:
    """One split, encoded. `image_index[i]` is the row in `image` of caption i's image."""

    corpus: Corpus
    speech: FeatureStore | OnlineSpeech
    image: FeatureStore
    image_index: Tensor  # int64 [captions]

"""A trained model in mteb, the public embedding benchmark: its audio–image retrieval tasks.

import mteb
from cmdlab.search import BenchmarkEncoder, Retriever

encoder = BenchmarkEncoder(Retriever("runs/mine/model"), "someone/mine")
mteb.evaluate(encoder, mteb.get_tasks(tasks=["SpokenCOCOA2IRetrieval"]))
"""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from cmdlab.errors import InputError
from cmdlab.search.retriever import Retriever


class BenchmarkEncoder:
    """What mteb calls an encoder (`EncoderProtocol` of mteb 2), for tasks of audio and images.

    name: OWNER/NAME, under which results are kept. training_datasets: names of mteb's tasks whose
    data the model was trained on, so that a result is not taken for zero-shot.
    Raises InputError where mteb is not installed.
    """

    def __init__(
        self,
        retriever: Retriever,
        name: str,
        *,
        revision: str | None = None,
        training_datasets: Iterable[str] = (),
    ) -> None:
        try:
            from mteb.models.model_meta import ModelMeta, ScoringFunction
        except ImportError as error:
            raise InputError("mteb is not installed; pip install cmdlab[mteb]") from error
        networks = [
            retriever.model,
            retriever.speech_encoder.open(retriever.device),
            retriever.image_encoder.open(retriever.device),
        ]
        self.retriever = retriever
        self.mteb_model_meta = ModelMeta.create_empty(
            {
                "name": name,
                "revision": revision or "unstated",
                "modalities": ["audio", "image"],
                "n_parameters": sum(p.numel() for one in networks for p in one.parameters()),
                "embed_dim": retriever.dimension,
                "framework": ["PyTorch"],
                "similarity_fn_name": ScoringFunction.DOT_PRODUCT,
                "use_instructions": False,
                "training_datasets": set(training_datasets),
            }
        )

    def encode(
        self, inputs: Iterable[Mapping[str, Any]], *, task_metadata: Any, **_: Any
    ) -> NDArray[np.float32]:
        """Vectors [N, D] of batches that hold either `audio` or `image`, each a list: dicts of
        `array` ([samples] or [channels, samples]) and `sampling_rate`, or Pillow's images.

        Raises InputError for a batch of anything else, both included: the two are never mixed.
        """
        vectors = []
        for batch in inputs:
            given = [kind for kind in ("audio", "image", "text", "video") if kind in batch]
            if given == ["audio"]:
                sounds = [_samples(item) for item in batch["audio"]]
                vectors.append(self.retriever.embed_recordings(sounds))
            elif given == ["image"]:
                vectors.append(self.retriever.embed_images(batch["image"]))
            else:
                raise InputError(
                    f"{task_metadata.name}: gives {' and '.join(given) or 'neither'}; choose a "
                    "task from audio to images (a2i) or back (i2a)"
                )
        return np.concatenate(vectors)

    def similarity(self, embeddings1: ArrayLike, embeddings2: ArrayLike) -> Any:
        """Dot products [N, M], as a tensor, which mteb wants."""
        from mteb.similarity_functions import dot_score

        return dot_score(np.asarray(embeddings1), np.asarray(embeddings2))

    def similarity_pairwise(self, embeddings1: ArrayLike, embeddings2: ArrayLike) -> Any:
        """The dot product of each pair [N]."""
        from mteb.similarity_functions import pairwise_dot_score

        return pairwise_dot_score(np.asarray(embeddings1), np.asarray(embeddings2))


def _samples(item: Mapping[str, Any]) -> tuple[NDArray[Any], int]:
    """[samples] or [samples, channels], and their rate in Hz."""
    array = np.asarray(item["array"])
    return array.T, int(item["sampling_rate"])

"""mteb's own evaluation of a trained model gives the figures that ours gives."""

import logging

import numpy as np
import pytest
import soundfile
from scipy.signal import resample_poly

from cmdlab.corpora import load_corpus
from cmdlab.errors import InputError
from cmdlab.evaluation import rank_table, retrieval_metrics
from cmdlab.search import BenchmarkEncoder

mteb = pytest.importorskip("mteb", reason="mteb is an extra")
datasets = pytest.importorskip("datasets")
retrieval = pytest.importorskip("mteb.abstasks.retrieval")


@pytest.fixture(scope="module")
def corpus(smoke_corpus):
    return load_corpus(smoke_corpus, "test")


def recording(caption) -> tuple[np.ndarray, int]:
    """At 44.1 kHz, as mteb's decoder hands on a file of that rate."""
    samples, rate = soundfile.read(caption.audio)
    return resample_poly(samples, 44_100 // 100, rate // 100).clip(-1, 1), 44_100


def task_of(corpus, category: str):
    """A task of mteb's own class, with the test split in memory."""
    heard = [recording(caption) for caption in corpus.captions]
    sounds = datasets.Dataset.from_dict(
        {
            "id": [caption.id for caption in corpus.captions],
            "audio": [{"array": array, "sampling_rate": rate} for array, rate in heard],
        }
    )
    pictures = datasets.Dataset.from_dict(
        {
            "id": [image.id for image in corpus.images],
            "image": [str(image.path) for image in corpus.images],
        },
        features=datasets.Features({"id": datasets.Value("string"), "image": datasets.Image()}),
    )
    relevant: dict[str, dict[str, int]] = {}
    for caption in corpus.captions:
        query, document = caption.id, caption.image_id
        if category == "i2a":
            query, document = document, query
        relevant.setdefault(query, {})[document] = 1
    queries, gallery = (sounds, pictures) if category == "a2i" else (pictures, sounds)

    class Task(retrieval.AbsTaskRetrieval):
        metadata = mteb.TaskMetadata(
            name=f"SpokenScenes{category.upper()}Retrieval",
            description="spoken captions and pictures",
            reference=None,
            dataset={"path": "in/memory", "revision": "1"},
            type="Any2AnyRetrieval",
            category=category,
            modalities=["audio", "image"],
            eval_splits=["test"],
            eval_langs=["eng-Latn"],
            main_score="ndcg_at_10",
        )

        def load_data(self, *_, **__):
            self.dataset = {
                "default": {
                    "test": {
                        "queries": queries,
                        "corpus": gallery,
                        "relevant_docs": relevant,
                        "top_ranked": None,
                    }
                }
            }
            self.data_loaded = True

    return Task()


@pytest.fixture(scope="module")
def ours(retriever, corpus) -> dict:
    sounds = [recording(caption) for caption in corpus.captions]
    speech = retriever.embed_recordings(sounds)
    image = retriever.embed_images([one.path for one in corpus.images])
    of = [caption.image_id for caption in corpus.captions]
    return retrieval_metrics(rank_table(speech, image, of, [one.id for one in corpus.images]))


@pytest.mark.parametrize(
    ("category", "direction"), [("a2i", "speech_to_image"), ("i2a", "image_to_speech")]
)
def test_hit_rates_are_our_recalls(retriever, corpus, ours, category, direction):
    logging.getLogger("mteb").setLevel(logging.ERROR)
    encoder = BenchmarkEncoder(retriever, "someone/small")
    found = mteb.evaluate(
        encoder, task_of(corpus, category), cache=None, co2_tracker=False, show_progress_bar=False
    )
    scores = found.task_results[0].scores["test"][0]
    for k in (1, 5, 10):
        assert 100 * scores[f"hit_rate_at_{k}"] == pytest.approx(
            ours[direction][f"R@{k}"], abs=1e-3
        )
    five_captions = 5 if category == "i2a" else 1
    assert scores["recall_at_1"] <= 1 / five_captions  # what the papers do not mean by recall
    assert scores["recall_at_1"] == pytest.approx(scores["hit_rate_at_1"] / five_captions, abs=1e-4)
    assert 100 / len(corpus.images) < ours[direction]["R@1"] < 100


def test_it_is_an_encoder_to_the_benchmark(retriever):
    from mteb.models.models_protocols import EncoderProtocol

    encoder = BenchmarkEncoder(
        retriever, "someone/small", training_datasets=["SpokenCOCOA2IRetrieval"]
    )
    assert isinstance(encoder, EncoderProtocol)
    meta = encoder.mteb_model_meta
    assert meta.modalities == ["audio", "image"]
    assert meta.n_parameters > 1_000_000
    assert meta.training_datasets == {"SpokenCOCOA2IRetrieval"}


def test_other_tasks_are_refused(retriever, corpus):
    metadata = task_of(corpus, "a2i").metadata
    encoder = BenchmarkEncoder(retriever, "someone/small")
    with pytest.raises(InputError, match="gives text; choose a task"):
        encoder.encode([{"text": ["a red circle"]}], task_metadata=metadata)

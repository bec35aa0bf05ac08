"""One experiment: from a corpus and a recipe to a run folder with model, ranks, result, examples.

The notebook `train.ipynb` and `cmdlab train` both walk through these steps.
"""

import math
import os
import re
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from cmdlab.corpora import (
    SPLITS,
    Corpus,
    GroundTruth,
    corpus_ceiling,
    leave_out_unreadable,
    load_corpus,
    load_usable,
    read_foils,
    read_ground_truth,
)
from cmdlab.encoders import (
    IMAGE,
    SPEECH,
    Encoder,
    Features,
    FeatureStore,
    Hearing,
    OnlineSpeech,
    open_stores,
    weights_of,
)
from cmdlab.errors import InputError, nearest
from cmdlab.evaluation import RankTable, Voices, rank_table, retrieval_metrics
from cmdlab.experiment.alignment import foil_test, pointing_game
from cmdlab.records import read_result, write_json
from cmdlab.retrieval import (
    Denoising,
    Frozen,
    Ranker,
    RetrievalModel,
    Trained,
    Training,
    embed,
    embed_images,
    embed_speech,
    first_process_first,
    holding,
    is_first_process,
    make_batch,
    parameters_of,
    restoration_by_context,
    step_flops,
    train,
)

RESTORED = (8, 128)  # batches and their captions, for what restoring draws from the other side
POINTED_CAPTIONS = 500  # of the test split, for the pointing game
LONGEST_HEARD = 102_400  # samples of a caption in training, where speech is encoded online


@dataclass(frozen=True)
class Data:
    """All that a run reads: three encoded splits, and what is known of the test split."""

    train: Features
    validation: Features
    test: Features
    test_text: FeatureStore | None  # embeddings of the captions' text; generated corpora only
    truth: GroundTruth | None
    foils: FeatureStore | OnlineSpeech | None
    foil_text: FeatureStore | None
    caption_of_foil: list[int]


def open_data(
    corpus: Path,
    *,
    speech_encoder: Encoder = SPEECH,
    image_encoder: Encoder = IMAGE,
    online: bool = False,
    features: Path | None = None,
    snr_db: float | None = None,
    test_corpus: Path | None = None,
    workers: int | None = None,
    device: str = "cpu",
    skip_bad: bool = False,
) -> Data:
    """Load the three splits and encode what is not encoded yet, on the device.

    online: speech is not stored, but encoded whenever it is asked for; in training at most 6.4 s of
    a caption are heard. features: the folder of the feature stores, by default `<corpus>.features`
    beside the corpus. snr_db: of the noise that speech is heard in; by default 10 to 30 dB where
    the corpus was generated, and none for people's speech. test_corpus: whose test split is read in
    place of the corpus' own.
    `skip_bad` leaves out entries that cannot be used, and tells which on standard error; it decodes
    every file to find them.
    Raises InputError for a corpus that cannot be read, and for an snr_db that is not finite.
    """
    folder = features or Path(f"{os.path.abspath(corpus)}.features")
    load = load_usable if skip_bad else load_corpus
    if snr_db is not None and not math.isfinite(snr_db):
        raise InputError(f"snr_db: {snr_db} is not finite; leave it out for speech as it is")
    roots = dict.fromkeys(SPLITS, corpus) | ({"test": test_corpus} if test_corpus else {})
    corpora = [load(root, split) for split, root in roots.items()]
    if is_first_process():
        told = [(roots[of.split], problem) for of in corpora for problem in of.left_out]
        for root, problem in dict.fromkeys(told):
            print(f"left out: {root}: {problem}", file=sys.stderr)
    test = corpora[-1]
    truth, foils = read_ground_truth(test), read_foils(test)
    if foils and skip_bad:
        foils = foils.keep(leave_out_unreadable(foils.corpus))
    generated = bool(read_ground_truth(corpora[1]) if test_corpus else truth)
    hearing = Hearing() if generated else Hearing(snr_db=None, reverberation=False)
    if snr_db is not None:
        hearing = replace(hearing, snr_db=(snr_db, snr_db))
    text_encoder = image_encoder.text if truth else None
    spoken = [*corpora, *([foils.corpus] if foils else [])]
    wanted = [(split, image_encoder) for split in corpora]
    written = [test, *([foils.corpus] if foils else [])]
    wanted += [(split, text_encoder) for split in written] if text_encoder else []
    wanted += [] if online else [(split, speech_encoder) for split in spoken]
    stores = open_stores(wanted, folder, hearing=hearing, workers=workers, device=device)
    images, speech = stores[: len(corpora)], stores[len(wanted) - len(spoken) :]
    heard: Sequence[FeatureStore | OnlineSpeech] = speech
    if online:
        crops = (LONGEST_HEARD, *[None] * (len(spoken) - 1))  # training alone
        heard = [
            OnlineSpeech(split, speech_encoder, hearing, device, crop=crop)
            for split, crop in zip(spoken, crops, strict=True)
        ]
    row = {caption.id: i for i, caption in enumerate(test.captions)}
    training, validation, held_out = (
        Features(split, speech_of, images_of, _image_index(split))
        for split, speech_of, images_of in zip(corpora, heard[: len(corpora)], images, strict=True)
    )
    return Data(
        training,
        validation,
        held_out,
        stores[len(corpora)] if text_encoder else None,
        truth,
        heard[-1] if foils else None,
        stores[len(corpora) + 1] if text_encoder and foils else None,
        [row[caption] for caption in foils.of] if foils else [],
    )


def _image_index(corpus: Corpus) -> torch.Tensor:
    """For each caption the place of its image, int64 [captions]."""
    row = {image.id: i for i, image in enumerate(corpus.images)}
    return torch.tensor([row[caption.image_id] for caption in corpus.captions])


def run_experiment(
    corpus: Path,
    run_folder: Path,
    *,
    speech_encoder: Encoder = SPEECH,
    image_encoder: Encoder = IMAGE,
    online: bool = False,
    features: Path | None = None,
    snr_db: float | None = None,
    test_corpus: Path | None = None,
    device: str = "auto",
    skip_bad: bool = False,
    **recipe: Any,
) -> dict[str, Any]:
    """Train one model and measure it; `recipe` changes fields of `Training` or `Denoising`.

    A run that was stopped goes on from its checkpoint. Under `joined` the processes train it
    together, in folders that all share. Returns what result.json holds.
    Raises InputError for a name that is no field of either, and for a folder that holds a finished
    run.
    """
    make_deterministic()
    known = sorted(parameter.name for parameter in parameters_of([Training, Denoising]))
    for name in recipe:
        if name not in known:
            raise InputError(
                f"no parameter {name!r}{nearest(name, known)}; there are {', '.join(known)}"
            )
    names = {parameter.name for parameter in parameters_of([Denoising])}
    denoising = Denoising(**{name: recipe.pop(name) for name in names & set(recipe)})
    training = Training(denoising=denoising, **recipe)
    device = pick_device(device)
    if (run_folder / "result.json").exists():
        raise InputError(f"{run_folder}: holds a finished run; choose another folder or remove it")
    run_folder.mkdir(parents=True, exist_ok=True)
    checkpoint = run_folder / "checkpoint.pt"
    with first_process_first():
        data = open_data(
            corpus,
            speech_encoder=speech_encoder,
            image_encoder=image_encoder,
            online=online,
            features=features,
            snr_db=snr_db,
            test_corpus=test_corpus,
            device=device,
            skip_bad=skip_bad,
        )
    trained = train(training, data.train, data.validation, device=device, checkpoint=checkpoint)
    with first_process_first():
        if is_first_process():
            result = measure(data, trained, training, run_folder, device=device)
            checkpoint.unlink()
        else:
            result = read_result(run_folder / "result.json")
    return result


def pick_device(device: str) -> str:
    """ "auto" is a GPU where there is one. Raises InputError for a device that is not there."""
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if not re.fullmatch(r"cpu|cuda(:\d+)?", device):
        raise InputError(f"device: {device!r} is none of auto, cpu, cuda, cuda:1")
    there = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device.startswith("cuda") and int(device[5:] or 0) >= there:
        raise InputError(f"device: {device} is not there (GPUs: {there}); use cpu")
    return device


def measure(
    data: Data,
    trained: Trained,
    training: Training,
    run_folder: Path,
    *,
    device: str = "cpu",
) -> dict[str, Any]:
    """Evaluate on both held-out splits; write ranks.npz, voices.npz, model/, last result.json.

    Returns what result.json holds; `records.py` says what that is. Leaves the model on the CPU.
    """
    model, ranker = trained.model, trained.ranker
    speech, image = embed(model, data.test, device)
    if ranker is None:
        table = rank_table(speech, image, data.test.image_index, torch.arange(len(image)))
    else:
        table = ranker.rank(model, data.test, device)
        ranker.cpu()
    table.save(run_folder / "ranks.npz")
    heard = {caption.speaker for caption in data.train.corpus.captions}
    spoken = [caption.speaker for caption in data.test.corpus.captions]
    Voices.of(spoken, heard).save(run_folder / "voices.npz")
    model.cpu().eval()
    model.encoders = {
        "speech": _frozen(data.test.speech.encoder),
        "image": _frozen(data.test.image.encoder),
    }
    if ranker is None:  # what is exported retrieves by dot products alone
        model.save_pretrained(run_folder / "model")
    corpus, steps = data.test.corpus, trained.curve[-1]["step"]
    result = {
        "metrics": {
            "validation": trained.validation,
            "test": retrieval_metrics(table),
        },
        "ceiling": (
            corpus_ceiling(data.truth, data.test.image_index.tolist()) if data.truth else None
        ),
        "text_ceiling": text_ceiling(data),
        "learning_curve": trained.curve,
        "new_words": new_words(table, corpus, training.without_words),
        "restoration": restoration(data.validation, trained) if training.weight else None,
        "cost": {
            "trainable_parameters": _count(model, trained.denoisers, trained.competitor),
            "denoiser_parameters": _count(trained.denoisers),
            "inference_parameters": _count(model, ranker),
            **inference_cost(model, data.test),
            **retrieval_cost(model, data.test, ranker),
            "training_seconds": trained.seconds,
            "training_seconds_at": trained.seconds_at,
            "training_flops": step_flops(trained, training, data.train) * steps,
            "steps": steps,
            "peak_memory_bytes": trained.peak_memory_bytes,
        },
        "alignment": (
            {
                "pointing": pointing_game(model, data.test, data.truth, _pointed(data)),
                "foil": foil_result(data, model, speech, image) if data.foils else None,
            }
            if data.truth and ranker is None  # it is of the embeddings' space
            else None
        ),
        "corpus": {
            "name": corpus.name,
            "content_hash": corpus.content_hash,
            "gallery": len(corpus.images),
            "captions": len(corpus.captions),
        },
        "encoders": {
            "image": _identity(data.test.image.encoder),
            "speech": _identity(data.test.speech.encoder),
        },
        "determinism": {
            "seed": training.seed,
            "threads": torch.get_num_threads(),
            "deterministic_algorithms": torch.are_deterministic_algorithms_enabled(),
        },
    }
    write_json(run_folder / "settings.json", asdict(training))
    write_json(run_folder / "result.json", result)
    return result


def new_words(table: RankTable, corpus: Corpus, words: str) -> dict[str, Any] | None:
    """R@1 of speech → image in percent, apart for captions that hold one of the words which were
    kept out of training and for the others; None where no word was, or where either is none."""
    held = holding(corpus.captions, words)
    if not 0 < held.sum() < len(held):
        return None
    found = table.ranks("speech_to_image") == 1
    return {
        name: {"R@1": 100 * float(found[rows].mean()), "captions": int(rows.sum())}
        for name, rows in (("new", held), ("known", ~held))
    }


def restoration(features: Features, trained: Trained) -> dict[str, float]:
    """The mean of `restoration_by_context` over some batches of a split, the same in every run."""
    generator = torch.Generator().manual_seed(0)
    count, size = RESTORED
    order = torch.randperm(len(features.speech), generator=generator)
    batches = order[: count * size].split(size)
    batches = batches[: max(1, len(order) // size)]  # a short one weighs more than it should
    trained.denoisers.cpu()
    found = [
        restoration_by_context(
            trained.model, trained.denoisers, make_batch(features, rows, "cpu"), generator
        )
        for rows in batches
    ]
    return {name: statistics.fmean(one[name] for one in found) for name in found[0]}


def foil_result(
    data: Data, model: RetrievalModel, speech: torch.Tensor, image: torch.Tensor
) -> dict[str, int]:
    """The foil test on all foils of the test split, whose embeddings are at hand."""
    assert data.foils is not None
    swapped = embed_speech(model, data.foils, range(len(data.foils)), "cpu")
    return _foil_test(data, speech, swapped, image)


def _foil_test(
    data: Data, said: torch.Tensor, foils: torch.Tensor, image: torch.Tensor
) -> dict[str, int]:
    """said, foils, image: embeddings of all captions, foils and images of the test split."""
    captions = data.caption_of_foil
    return foil_test(said[captions], foils, image[data.test.image_index[captions]])


def text_ceiling(data: Data) -> dict[str, Any] | None:
    """Retrieval by the captions' text, with the frozen image encoder's own text encoder, and that
    encoder's foil test: whether the two towers tell apart what belongs to what."""
    if data.test_text is None:
        return None
    text, image = data.test_text.embeddings, data.test.image.embeddings
    metrics = retrieval_metrics(
        rank_table(text, image, data.test.image_index, torch.arange(len(image)))
    )
    kept = ("R@1", "R@5", "R@10")
    foils = data.foil_text
    return {
        "speech_to_image": {name: metrics["speech_to_image"][name] for name in kept},
        "image_to_speech": {name: metrics["image_to_speech"][name] for name in kept},
        "mean_R@1": metrics["mean_R@1"],
        "foil": _foil_test(data, text, foils.embeddings, image) if foils else None,
    }


def inference_cost(model: RetrievalModel, features: Features) -> dict[str, float]:
    """What the retrieval head costs for one caption of median length: FLOPs, and ms on this CPU.

    The frozen encoders come on top; they are the same for every arm.
    """
    from torch.utils.flop_counter import FlopCounterMode

    median = int(features.speech.lengths.median())
    shape = (features.speech.layers, median, features.speech.width)
    states = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    lengths = torch.tensor([median])
    products = torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)
    with products, FlopCounterMode(display=False) as counter:  # without gradients torch takes a
        model.speech_head(states, lengths)  # fused layer, whose products the counter cannot see
    seconds = []
    with torch.inference_mode():
        for _ in range(30):
            started = time.perf_counter()
            model.speech_head(states, lengths)
            seconds.append(time.perf_counter() - started)
    return {
        "inference_flops": counter.get_total_flops(),
        "inference_ms": 1e3 * statistics.median(seconds),
    }


def retrieval_cost(
    model: RetrievalModel, features: Features, ranker: Ranker | None = None
) -> dict[str, float]:
    """What ranking the gallery costs a caption of median length: FLOPs, and ms on this CPU.

    The caption's head comes before, see `inference_cost`, and the gallery is at hand as the head
    and the ranker read it.
    """
    from torch.utils.flop_counter import FlopCounterMode

    middle = len(features.speech) // 2
    around = slice(max(0, middle - 15), middle + 15)
    captions = features.speech.lengths.argsort(stable=True)[around].tolist()
    search = searcher(model, features, captions, ranker)
    with FlopCounterMode(display=False) as counter:
        search(len(captions) // 2)
    seconds = []
    for i in range(len(captions)):
        started = time.perf_counter()
        search(i)
        seconds.append(time.perf_counter() - started)
    return {
        "retrieval_flops_per_query": counter.get_total_flops(),
        "retrieval_ms_per_query": 1e3 * statistics.median(seconds),
    }


def searcher(
    model: RetrievalModel, features: Features, captions: Sequence[int], ranker: Ranker | None = None
) -> Callable[[int], torch.Tensor]:
    """A function that scores all images [M] for the i-th of the captions, on the CPU."""
    if ranker is not None:
        return ranker.searcher(model, features, captions)
    speech = embed_speech(model, features.speech, captions, "cpu")
    image = embed_images(model, features.image, range(len(features.image)), "cpu")
    return lambda i: (speech[i : i + 1] @ image.T)[0]


def _identity(encoder: Encoder) -> dict[str, str]:
    return {"name": encoder.name, "sha256": weights_of(encoder)}


def _frozen(encoder: Encoder) -> Frozen:
    return Frozen(encoder.name, weights_of(encoder), encoder.layers)


def _pointed(data: Data) -> range:
    return range(min(POINTED_CAPTIONS, len(data.test.speech)))


def _count(*modules: torch.nn.Module | None) -> int:
    """Trainable parameters."""
    parameters = [one for module in modules if module is not None for one in module.parameters()]
    return sum(one.numel() for one in parameters if one.requires_grad)


def make_deterministic() -> None:
    """One thread, since the number of threads decides the order of sums; no nondeterministic
    algorithm."""
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    # Filling every fresh tensor, lest one be read before it is written, takes a seventh of a step.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]

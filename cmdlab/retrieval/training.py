"""Trains a retrieval model on frozen features: contrastive, with or without denoising beside it.

Everything random in a step is drawn from the seed and the step's number, so a run that was stopped
continues to the very same weights (on a CPU, bit for bit), and two arms of one seed see the same
batches from the same initial heads. `parallel.py` computes a step by several processes.
"""

import io
import math
import resource
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from cmdlab.encoders import Description, Features, FeatureStore, OnlineSpeech
from cmdlab.errors import InputError, check_seed, check_types
from cmdlab.evaluation import RankTable, rank_table, retrieval_metrics
from cmdlab.outputs import write_file
from cmdlab.retrieval.batches import Batches
from cmdlab.retrieval.denoising import Denoising
from cmdlab.retrieval.dense import Dense
from cmdlab.retrieval.diagnosis import gradient_cosine
from cmdlab.retrieval.losses import Batch, Losses, make_denoisers, training_losses
from cmdlab.retrieval.matching import Matching
from cmdlab.retrieval.model import RetrievalModel, Shape
from cmdlab.retrieval.momentum import MomentumQueue
from cmdlab.retrieval.parallel import (
    backward_in_shares,
    check_alike,
    is_first_process,
    process_count,
    rows_of_process,
)
from cmdlab.retrieval.recipe import check_choices, parameter


@dataclass(frozen=True)
class Training:
    """The recipe of a run. `weight` 0 is contrastive training alone: no denoiser is made."""

    seed: int = parameter(1, "decides first weights, batches and corruption")
    steps: int = parameter(300, "steps of training")
    epochs: int = parameter(0, "times that training goes through the captions; 0: `steps` counts")
    batch_size: int = parameter(128, "captions of a step, over all processes")
    images: int = parameter(0, "of the training split, drawn by the seed; 0: all")
    hard_negatives: float = parameter(
        0.0, "part of a batch, up to 0.5, that looks most like the rest"
    )
    without_words: str = parameter(
        "", "captions that hold one of these words are left out of training"
    )
    chunk: int = parameter(
        0, "captions that a process computes at a time, to save memory; 0: all of its own"
    )
    precision: str = parameter(
        "float32", "of the heads' products in training", choices=("float32", "bfloat16")
    )
    learning_rate: float = parameter(1e-2, "its highest, at the end of the warm-up")
    warm_up: int = parameter(50, "steps of rising learning rate")
    schedule: str = parameter(
        "linear", "how it falls after that", choices=("linear", "cosine", "constant")
    )
    end_learning_rate: float = parameter(0.0, "what it falls to")
    weight_decay: float = parameter(0.01, "weight decay of AdamW")
    gradient_clip: float = parameter(1.0, "largest norm of the gradient")
    heads: int = parameter(4, "of the attention in the speech head")
    normalise_layers: bool = parameter(False, "each of the encoder's states before they are mixed")
    image_head: str = parameter(
        "global",
        "the frozen embedding alone, or with pooled patches",
        choices=("global", "patches"),
    )
    validate_every: int = parameter(100, "steps from one validation to the next")
    select: str = parameter(
        "last", "the model that is kept, best by validation's mean R@10", choices=("last", "best")
    )
    method: str = parameter(
        "contrastive",
        "contrastive or a competitor",
        choices=("contrastive", "matching", "queue", "dense"),
    )
    rerank: int = parameter(32, "candidates of a query that method=matching orders again")
    weight: float = parameter(0.0, "weight of the denoising loss; 0 is contrastive training alone")
    denoising: Denoising = field(default_factory=Denoising)

    def __post_init__(self) -> None:
        check_types(self)
        check_choices(self)
        for name in ("steps", "batch_size", "heads", "validate_every", "rerank"):
            if getattr(self, name) < 1:
                raise InputError(f"{name}: {getattr(self, name)} is not at least 1")
        for name in ("learning_rate", "gradient_clip"):
            if not 0 < getattr(self, name) < math.inf:
                raise InputError(f"{name}: {getattr(self, name)} is not above 0 and finite")
        check_seed(self.seed)
        for name in (
            *("epochs", "images", "chunk", "warm_up", "weight_decay", "weight"),
            "end_learning_rate",
        ):
            if not 0 <= getattr(self, name) < math.inf:
                raise InputError(f"{name}: {getattr(self, name)} is not at least 0 and finite")
        if not 0 <= self.hard_negatives <= 0.5:
            raise InputError(f"hard_negatives: {self.hard_negatives} is not within 0 to 0.5")
        if self.end_learning_rate > self.learning_rate:
            raise InputError(
                f"end_learning_rate: {self.end_learning_rate} is above learning_rate, "
                f"{self.learning_rate}"
            )
        if self.weight and self.method != "contrastive":
            raise InputError(
                f"weight: {self.weight} is of denoising beside the contrastive loss, and method is "
                f"{self.method}; give weight 0, or method contrastive"
            )
        usual = (self.chunk, self.precision, self.select) == (0, "float32", "last")
        if self.method != "contrastive" and not usual:
            raise InputError(
                f"method: {self.method} knows neither chunks, bfloat16, nor the best model; "
                "give chunk 0, precision float32 and select last"
            )


Ranker = Matching | Dense  # rank at retrieval, in place of dot products of embeddings


@dataclass
class Trained:
    """A trained model, its learning curve and what the training cost."""

    model: RetrievalModel
    denoisers: nn.ModuleDict
    curve: list[dict[str, Any]]
    validation: dict[str, Any]  # metrics of the last validation, as `retrieval_metrics` gives them
    seconds: float  # of training steps, validation left out
    peak_memory_bytes: int  # of the process on a CPU, of what torch held on a GPU
    seconds_at: list[dict[str, float]] = field(default_factory=list)  # step, seconds; validations
    best: dict[str, Any] = field(default_factory=dict)  # step, score, validation, model; `select`
    competitor: Ranker | MomentumQueue | None = None  # of a method other than contrastive

    @property
    def ranker(self) -> Ranker | None:
        return self.competitor if isinstance(self.competitor, Matching | Dense) else None


def train(
    training: Training,
    train_features: Features,
    validation: Features,
    *,
    device: str = "cpu",
    checkpoint: Path | None = None,
    stop_after: int | None = None,
) -> Trained:
    """Train for `training.steps` steps or `training.epochs`, with a progress bar on standard error.

    With `checkpoint` the state is kept in that file at every validation, and a file that is there
    is continued from, by any number of processes. `stop_after` ends the run early, for tests of
    that.
    Under `joined` each process computes its share of every batch. All are left with the same
    weights; the first one alone validates, writes and shows progress, so that it alone has
    `validation` and, under `select="best"`, the model to be kept.
    Raises InputError for a checkpoint of another run, when the loss is not finite, and for a batch
    of fewer captions than there are processes.
    """
    batches = Batches(
        train_features,
        seed=training.seed,
        batch_size=training.batch_size,
        images=training.images,
        hard_negatives=training.hard_negatives,
        without_words=training.without_words,
    )
    if training.epochs:
        training = replace(training, steps=training.epochs * batches.count)
    if batches.size < process_count():
        raise InputError(
            f"batch_size: {batches.size} captions are too few for {process_count()} processes"
        )
    speech, image = train_features.speech, train_features.image
    shape = Shape(
        speech.layers,
        speech.width,
        image.width,
        image.embeddings.shape[1],
        heads=training.heads,
        image_head=training.image_head,
        normalise_layers=training.normalise_layers,
    )
    if shape.speech_width % shape.heads:
        raise InputError(
            f"heads: {shape.heads} do not divide the speech tokens' width, {shape.speech_width}"
        )
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats(device)
    seed = _folded(training.seed)
    torch.manual_seed(seed)
    model = RetrievalModel(shape).to(device)
    patches = int(train_features.image.lengths.max())
    torch.manual_seed(seed)  # the heads are the same whether there is a denoiser or not
    denoisers = make_denoisers(training.denoising, shape, patches) if training.weight else None
    trained = Trained(model, (denoisers or nn.ModuleDict()).to(device), [], {}, 0.0, 0)
    competitor = _make_competitor(training, model)
    if competitor is not None and process_count() > 1:
        raise InputError(f"method: {training.method} trains in one process; leave torchrun out")
    parameters = [*model.parameters(), *trained.denoisers.parameters()]
    if competitor is not None:
        trained.competitor = competitor.to(device)
        parameters += [one for one in competitor.parameters() if one.requires_grad]
    optimiser = torch.optim.AdamW(
        parameters, training.learning_rate, weight_decay=training.weight_decay
    )
    stores = [train_features.speech.name, train_features.image.name]
    recipe = asdict(training) | {"corpus": train_features.corpus.content_hash, "features": stores}
    first = 0
    if checkpoint is not None and checkpoint.exists():
        first = _load_checkpoint(checkpoint, recipe, trained, optimiser)
    check_alike(
        first,
        device,
        f"{checkpoint}: is not the same for every process; put it in a folder that all share",
    )
    last = min(training.steps, stop_after or training.steps)
    leads = is_first_process()
    for step in tqdm(
        range(first, last),
        initial=first,
        total=last,
        desc="training",
        leave=False,
        disable=not leads,
    ):
        started = time.perf_counter()
        for group in optimiser.param_groups:
            group["lr"] = _learning_rate(step, training)
        if isinstance(train_features.speech, OnlineSpeech) and step + 1 < last:
            following = batches.captions(step + 1)
            train_features.speech.read_ahead(
                _share(following, training, trained).tolist(), _seed_of_step(step + 1, training)
            )
        optimiser.zero_grad(set_to_none=True)
        captions = batches.captions(step)
        losses = _backward(
            trained, training, train_features, captions, _seed_of_step(step, training), device
        )
        if not math.isfinite(losses.total.item()):
            raise InputError(
                f"the loss became {losses.total.item()} at step {step}: "
                "lower learning_rate or weight, or look for features that are not finite"
            )
        nn.utils.clip_grad_norm_(parameters, training.gradient_clip)
        optimiser.step()
        model.bound_scale()
        trained.seconds += time.perf_counter() - started
        ends = step + 1 == training.steps
        validates = ((step + 1) % training.validate_every == 0 or ends) and leads
        if validates:
            trained.seconds_at.append({"step": step + 1, "seconds": trained.seconds})
            trained.validation = retrieval_metrics(rank(model, validation, device, trained.ranker))
            if training.select == "best":
                _keep_best(trained, step + 1)
        if validates or step % 10 == 0:
            trained.curve.append(
                {
                    "step": step + 1,
                    "loss": losses.total.item(),
                    "contrastive": losses.contrastive.item(),
                    "denoising": losses.denoising.item() if losses.denoising is not None else None,
                    "temperature": 1 / model.scale.item(),
                    "validation_mean_R@1": trained.validation["mean_R@1"] if validates else None,
                    "gradient_cosine": (
                        _cosine(trained, training, train_features, captions, device, step)
                        if validates and training.weight and not _is_shared(training)
                        else None
                    ),
                }
            )
        if checkpoint is not None and validates:
            _save_checkpoint(checkpoint, recipe, trained, optimiser, step + 1)
    if trained.best:
        model.load_state_dict(trained.best["model"])
        trained.validation = trained.best["validation"]
    trained.peak_memory_bytes = (
        torch.cuda.max_memory_allocated(device)
        if device.startswith("cuda")
        else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    )
    return trained


def _backward(
    trained: Trained,
    training: Training,
    features: Features,
    captions: Tensor,
    seed: int,
    device: str,
) -> Losses:
    """The losses of the captions of a step, whose gradients are left in the parameters."""
    generator = torch.Generator().manual_seed(seed)
    own = _share(captions, training, trained)
    if _is_shared(training):
        loaded = make_batch(features, own, "cpu" if training.chunk else device, seed)
        return backward_in_shares(
            *(trained.model, trained.denoisers, loaded, len(captions), training.weight, generator),
            chunk=training.chunk,
            precision=_autocast_dtype(training),
        )
    batch = make_batch(features, own, device, seed)
    losses = _losses(trained, training, batch, generator)
    losses.total.backward()
    return losses


def _losses(
    trained: Trained, training: Training, batch: Batch, generator: torch.Generator
) -> Losses:
    """Of a batch that this process computes at once."""
    precision = _autocast_dtype(training)
    with torch.autocast(batch.states.device.type, precision, enabled=precision is not None):
        if trained.competitor is not None:
            return trained.competitor.losses(trained.model, batch, generator)
        return training_losses(trained.model, trained.denoisers, batch, training.weight, generator)


def _autocast_dtype(training: Training) -> torch.dtype | None:
    """None without autocast."""
    return torch.bfloat16 if training.precision == "bfloat16" else None


def _cosine(
    trained: Trained,
    training: Training,
    features: Features,
    captions: Tensor,
    device: str,
    step: int,
) -> float | None:
    """`gradient_cosine` on the captions of a step, after it."""
    seed = _seed_of_step(step, training)
    batch = make_batch(features, captions, device, seed)
    generator = torch.Generator().manual_seed(seed)
    return gradient_cosine(trained.model, trained.denoisers, batch, generator)


def step_flops(trained: Trained, training: Training, features: Features) -> int:
    """Floating-point operations of the products of matrices in a step of the run, forward and
    backward, on the CPU: those of its first captions, by one process at once. The frozen encoders
    come on top.

    The model's gradients are left empty.
    """
    from torch.utils.flop_counter import FlopCounterMode

    batches = Batches(features, seed=training.seed, batch_size=training.batch_size)
    batch = make_batch(features, batches.captions(0), "cpu")
    with FlopCounterMode(display=False) as counter:
        _losses(trained, training, batch, torch.Generator().manual_seed(0)).total.backward()
    trained.model.zero_grad(set_to_none=True)
    trained.denoisers.zero_grad(set_to_none=True)
    return counter.get_total_flops()


def _is_shared(training: Training) -> bool:
    return training.chunk > 0 or process_count() > 1


def _share(captions: Tensor, training: Training, trained: Trained) -> Tensor:
    """Those of a step's captions that this process loads."""
    if not _is_shared(training):
        return captions
    return captions[rows_of_process(len(captions), trained.denoisers)]


def _make_competitor(training: Training, model: RetrievalModel) -> Ranker | MomentumQueue | None:
    match training.method:
        case "matching":
            return Matching(model.shape, training.rerank)
        case "queue":
            return MomentumQueue(model, training.steps, training.batch_size)
        case "dense":
            return Dense(model.shape)
    return None


def make_batch(features: Features, captions: Tensor, device: str, seed: int = 0) -> Batch:
    """The captions (int64 [N], rows of `features.speech`) and their images, on the device.

    `seed` decides what is heard of long captions where speech is encoded online.
    """
    states, lengths = features.speech.tokens(captions.tolist(), seed)
    images = features.image_index[captions]
    patches = features.image.patches(images.tolist())
    batch = Batch(states, lengths, patches, features.image.embeddings[images], images)
    return Batch(*(tensor.to(device) for tensor in batch))


def embed(model: RetrievalModel, features: Features, device: str) -> tuple[Tensor, Tensor]:
    """Embeddings of every caption [N, D] and every image [M, D], float32 on the CPU."""
    return (
        embed_speech(model, features.speech, range(len(features.speech)), device),
        embed_images(model, features.image, range(len(features.image)), device),
    )


@torch.inference_mode()
def embed_speech(
    model: RetrievalModel,
    speech: FeatureStore | OnlineSpeech,
    captions: Sequence[int],
    device: str,
    batch_size: int = 64,
) -> Tensor:
    """Embeddings of some captions [n, D], float32 on the CPU; those of like length together."""
    was_training = model.training
    model.eval()
    order = speech.lengths[torch.as_tensor(captions)].argsort(stable=True)
    embeddings = torch.empty(len(captions), model.shape.embedding)
    for rows in order.split(batch_size):
        states, lengths = speech.tokens([captions[i] for i in rows.tolist()])
        embeddings[rows] = model.speech_head(states.to(device), lengths.to(device))[1].cpu()
    model.train(was_training)
    return embeddings


@torch.inference_mode()
def embed_images(
    model: RetrievalModel,
    image: FeatureStore,
    images: Sequence[int],
    device: str,
    batch_size: int = 250,
) -> Tensor:
    """Embeddings of some images [m, D], float32 on the CPU."""
    was_training = model.training
    model.eval()
    parts = []
    for first in range(0, len(images), batch_size):
        rows = images[first : first + batch_size]
        patches = image.patches(rows).to(device)
        frozen = image.embeddings[torch.as_tensor(rows)].to(device)
        parts.append(model.image_head(patches, frozen)[1].cpu())
    model.train(was_training)
    return torch.cat(parts)


def time_step(
    training: Training,
    speech: Description,
    image: Description,
    *,
    captions: int,
    tokens: int,
    device: str = "cpu",
) -> float:
    """Seconds that a step takes on so many captions of so many tokens, made up at random.

    With encoders so described; what they take themselves is not in it.
    """
    assert image.grid is not None
    model = RetrievalModel(
        Shape(
            *(speech.layers, speech.width, image.width, image.embedding),
            heads=training.heads,
            image_head=training.image_head,
            normalise_layers=training.normalise_layers,
        )
    ).to(device)
    patches = image.grid[0] * image.grid[1]
    denoisers = nn.ModuleDict()
    if training.weight:
        denoisers = make_denoisers(training.denoising, model.shape, patches).to(device)
    optimiser = torch.optim.AdamW([*model.parameters(), *denoisers.parameters()])
    batch = Batch(
        torch.randn(speech.layers, captions * tokens, speech.width, device=device),
        torch.full((captions,), tokens, device=device),
        torch.randn(captions, patches, image.width, device=device),
        nn.functional.normalize(torch.randn(captions, image.embedding, device=device), dim=-1),
        torch.arange(captions, device=device),
    )
    precision = _autocast_dtype(training)
    seconds = []
    for step in range(3):  # the first one warms up
        started = time.perf_counter()
        optimiser.zero_grad(set_to_none=True)
        with torch.autocast(batch.states.device.type, precision, enabled=precision is not None):
            losses = training_losses(
                model, denoisers, batch, training.weight, torch.Generator().manual_seed(step)
            )
        losses.total.backward()
        optimiser.step()
        losses.total.item()  # waits for the device
        seconds.append(time.perf_counter() - started)
    return min(seconds[1:])


def rank(
    model: RetrievalModel, features: Features, device: str = "cpu", ranker: Ranker | None = None
) -> RankTable:
    """The ranks of a whole split, by dot products unless a `ranker` has its own way."""
    if ranker is not None:
        return ranker.rank(model, features, device)
    speech, image = embed(model, features, device)
    return rank_table(speech, image, features.image_index, torch.arange(len(image)))


def _learning_rate(step: int, training: Training) -> float:
    """Linear warm-up from zero, then as the schedule has it."""
    if step < training.warm_up:
        return training.learning_rate * ((step + 1) / training.warm_up)
    left = (training.steps - step) / max(1, training.steps - training.warm_up)  # from 1 to 0
    height = {
        "linear": left,
        "cosine": (1 - math.cos(math.pi * left)) / 2,
        "constant": 1.0,
    }[training.schedule]
    end = training.end_learning_rate
    return end + (training.learning_rate - end) * height


def _seed_of_step(step: int, training: Training) -> int:
    return (_folded(training.seed) * 1_000_003 + step) % 2**64


def _folded(seed: int) -> int:
    """torch's generators read the low 32 bits of a seed alone: the high ones are folded in."""
    return seed ^ (seed >> 32)


def _keep_best(trained: Trained, step: int) -> None:
    """Keep the model where its mean R@10 on validation is the highest yet."""
    directions = ("speech_to_image", "image_to_speech")
    score = sum(trained.validation[direction]["R@10"] for direction in directions) / 2
    if score > trained.best.get("score", -1.0):
        weights = {name: value.clone() for name, value in trained.model.state_dict().items()}
        trained.best = {
            "step": step,
            "score": score,
            "validation": trained.validation,
            "model": weights,
        }


def _save_checkpoint(
    path: Path,
    recipe: dict[str, Any],
    trained: Trained,
    optimiser: torch.optim.Optimizer,
    step: int,
) -> None:
    state = {
        "recipe": recipe,
        "step": step,
        "model": trained.model.state_dict(),
        "denoisers": trained.denoisers.state_dict(),
        "competitor": trained.competitor.state_dict() if trained.competitor is not None else {},
        "optimiser": optimiser.state_dict(),
        "curve": trained.curve,
        "validation": trained.validation,
        "seconds": trained.seconds,
        "seconds_at": trained.seconds_at,
        "best": trained.best,
    }
    content = io.BytesIO()
    torch.save(state, content)
    write_file(path, content.getvalue())


def _load_checkpoint(
    path: Path, recipe: dict[str, Any], trained: Trained, optimiser: torch.optim.Optimizer
) -> int:
    """Restore the state and return the step to go on with. Reads tensors and plain values only."""
    try:
        state = torch.load(path, weights_only=True, map_location="cpu")
        if state["recipe"] != recipe:
            raise InputError(
                f"{path}: is of a run with other settings or on other features; remove it to "
                "start anew"
            )
        trained.model.load_state_dict(state["model"])
        trained.denoisers.load_state_dict(state["denoisers"])
        if trained.competitor is not None:
            trained.competitor.load_state_dict(state["competitor"])
        optimiser.load_state_dict(state["optimiser"])
        trained.curve, trained.validation = state["curve"], state["validation"]
        trained.seconds, trained.seconds_at = state["seconds"], state["seconds_at"]
        trained.best = state["best"]
        return int(state["step"])
    except InputError:
        raise
    except Exception as error:  # whatever a damaged file makes torch raise
        reason = str(error).split("\n")[0]
        raise InputError(f"{path}: is no checkpoint ({reason}); remove it to start anew") from error

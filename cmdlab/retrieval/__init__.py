"""What is trained: the retrieval model; in training a denoiser beside it; losses and the loop."""

from cmdlab.retrieval.batches import holding
from cmdlab.retrieval.denoising import Denoising
from cmdlab.retrieval.diagnosis import restoration_by_context
from cmdlab.retrieval.model import Frozen, RetrievalModel
from cmdlab.retrieval.parallel import first_process_first, is_first_process, joined
from cmdlab.retrieval.recipe import parameters_of
from cmdlab.retrieval.training import (
    Ranker,
    Trained,
    Training,
    embed,
    embed_images,
    embed_speech,
    make_batch,
    rank,
    step_flops,
    time_step,
    train,
)

__all__ = [
    "Denoising",
    "Frozen",
    "Ranker",
    "RetrievalModel",
    "Trained",
    "Training",
    "embed",
    "embed_images",
    "embed_speech",
    "first_process_first",
    "holding",
    "is_first_process",
    "joined",
    "make_batch",
    "parameters_of",
    "rank",
    "restoration_by_context",
    "step_flops",
    "time_step",
    "train",
]

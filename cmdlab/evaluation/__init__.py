"""How good is it, and how sure: embeddings to ranks to Recall@K, intervals; knows no model."""

from cmdlab.evaluation.npz import write_npz
from cmdlab.evaluation.ranks import (
    RankTable,
    evaluate_file,
    rank_table,
    ranks_of_scores,
    retrieval_metrics,
)
from cmdlab.evaluation.statistics import (
    SCREEN,
    Comparison,
    Interval,
    compare,
    compare_by_seed,
    holm,
    interval,
)
from cmdlab.evaluation.voices import Voices

__all__ = [
    "SCREEN",
    "Comparison",
    "Interval",
    "RankTable",
    "Voices",
    "compare",
    "compare_by_seed",
    "evaluate_file",
    "holm",
    "interval",
    "rank_table",
    "ranks_of_scores",
    "retrieval_metrics",
    "write_npz",
]

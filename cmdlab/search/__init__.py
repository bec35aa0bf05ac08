"""What a user does with a trained model: own recordings and pictures to vectors, to compare."""

from typing import TYPE_CHECKING, Any

from cmdlab.search.index import Index, Match, Unreadable
from cmdlab.search.indexing import Indexed, index_pictures, model_identity
from cmdlab.search.query import recorded, spoken

if TYPE_CHECKING:
    from cmdlab.search.retriever import Retriever

__all__ = [
    "Index",
    "Indexed",
    "Match",
    "Retriever",
    "Unreadable",
    "index_pictures",
    "model_identity",
    "recorded",
    "spoken",
]


def __getattr__(name: str) -> Any:
    """Retriever loads torch, which takes longer than bringing an index up to date."""
    if name != "Retriever":
        raise AttributeError(f"{__name__} has no {name}")
    from cmdlab.search.retriever import Retriever

    return Retriever

"""What a user does with a trained model: own recordings and pictures to vectors, to compare."""

import importlib
from typing import TYPE_CHECKING, Any

from cmdlab.search.index import Index, Match, Unreadable
from cmdlab.search.indexing import Indexed, index_pictures, model_identity
from cmdlab.search.query import recorded, spoken

if TYPE_CHECKING:
    from cmdlab.search.retriever import Retriever
    from cmdlab.search.serve import serve_page
    from cmdlab.search.worth import write_worth

__all__ = [
    "Index",
    "Indexed",
    "Match",
    "Retriever",
    "Unreadable",
    "index_pictures",
    "model_identity",
    "recorded",
    "serve_page",
    "spoken",
    "write_worth",
]


def __getattr__(name: str) -> Any:
    """What loads torch, which takes longer than bringing an index up to date."""
    files = {"Retriever": "retriever", "serve_page": "serve", "write_worth": "worth"}
    if name not in files:
        raise AttributeError(f"{__name__} has no {name}")
    return getattr(importlib.import_module(f"{__name__}.{files[name]}"), name)

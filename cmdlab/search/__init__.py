"""What a user does with a trained model: own recordings and pictures to vectors, to compare."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from cmdlab.search.index import Index, Match, Unreadable
from cmdlab.search.indexing import Indexed, index_pictures, model_identity
from cmdlab.search.query import heard, recorded, spoken

if TYPE_CHECKING:
    from cmdlab.search.benchmark import BenchmarkEncoder
    from cmdlab.search.modules import make_module, pull_module, push_module
    from cmdlab.search.retriever import Retriever
    from cmdlab.search.serve import serve_page
    from cmdlab.search.vectors import encode_files, encode_pairs
    from cmdlab.search.worth import write_worth

_WITH_TORCH = {  # which takes longer to load than an unchanged folder to look through
    "BenchmarkEncoder": "benchmark",
    "Retriever": "retriever",
    "encode_files": "vectors",
    "encode_pairs": "vectors",
    "make_module": "modules",
    "pull_module": "modules",
    "push_module": "modules",
    "serve_page": "serve",
    "write_worth": "worth",
}

__all__ = [
    "BenchmarkEncoder",
    "Index",
    "Indexed",
    "Match",
    "Retriever",
    "Unreadable",
    "encode_files",
    "encode_pairs",
    "heard",
    "index_pictures",
    "make_module",
    "model_identity",
    "pull_module",
    "push_module",
    "recorded",
    "serve_page",
    "spoken",
    "write_worth",
]


def __getattr__(name: str) -> Any:
    if name not in _WITH_TORCH:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_WITH_TORCH[name]}"), name)

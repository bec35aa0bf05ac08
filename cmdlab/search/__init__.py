"""What a user does with a trained model: own recordings and pictures to vectors, to compare."""

from cmdlab.search.benchmark import BenchmarkEncoder
from cmdlab.search.modules import make_module, pull_module, push_module
from cmdlab.search.retriever import Retriever
from cmdlab.search.vectors import encode_files, encode_pairs

__all__ = [
    "BenchmarkEncoder",
    "Retriever",
    "encode_files",
    "encode_pairs",
    "make_module",
    "pull_module",
    "push_module",
]

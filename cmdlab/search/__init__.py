"""What a user does with a trained model: own recordings and pictures to vectors, to compare."""

from cmdlab.search.retriever import Retriever

__all__ = ["Retriever"]

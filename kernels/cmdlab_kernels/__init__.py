"""Kernels for speech-image retrieval: a plain torch reference and fast paths of each operation."""

from cmdlab_kernels.denoising_attention import denoising_attention
from cmdlab_kernels.info_nce import info_nce
from cmdlab_kernels.retrieval_ranks import RetrievalRanks, retrieval_ranks

__all__ = ["RetrievalRanks", "denoising_attention", "info_nce", "retrieval_ranks"]

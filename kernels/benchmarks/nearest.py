"""Time the twelve nearest of a million vectors to one query, exactly, by each way that there is."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import cycle

import numpy as np
import torch
from bench import gate, peak_memory, row, timings
from numpy.typing import NDArray
from retrieval_ranks import embeddings

from cmdlab.search.nearest import Gallery

K = 12
DIMENSIONS = 256
QUERIES = 7  # which take turns
TRAINED, SPREAD = "as trained", "random directions"
Answer = tuple[NDArray[np.float64], NDArray[np.int64]]  # scores and rows [K]
Search = Callable[[NDArray[np.float32]], Answer]


def benchmark(device: str, quick: bool, ceilings: dict[str, float]) -> list[dict]:
    """On a processor alone: an index is searched where its disk is.

    Vectors are as a trained model gives them, in a quarter of the directions and in clusters, or
    spread over all directions, which leaves a bound less to tell apart.
    """
    if device != "cpu":
        return []
    for mode in (TRAINED, SPREAD):
        _check(*_inputs(mode, 20_000))
    rows = []
    for size in [20_000] if quick else [100_000, 1_000_000]:
        for mode in (TRAINED, SPREAD):
            rows += _size(mode, size, quick, ceilings)
    return rows


def _inputs(mode: str, size: int) -> tuple[Gallery, NDArray[np.float32]]:
    """The gallery of vectors [size, D], and queries [QUERIES, D] that some of them answer."""
    speech, image, *_ = embeddings(QUERIES, size, DIMENSIONS, narrow=mode == SPREAD)
    return Gallery.of(image.numpy()), speech.numpy()


def _check(gallery: Gallery, queries: NDArray[np.float32]) -> None:
    """Ours to the last bit; the peers' scores are float32 sums."""
    for query in queries:
        scores, rows = gallery.nearest(query, K, impl="reference")
        for name, search in _ways(gallery).items():
            found_scores, found_rows = search(query)
            if name.startswith("cmdlab"):
                gate(name, bool((found_rows == rows).all() and (found_scores == scores).all()))
            else:
                gate(name, bool(np.allclose(found_scores, scores, rtol=0, atol=1e-5)))


def _size(mode: str, size: int, quick: bool, ceilings: dict[str, float]) -> list[dict]:
    gallery, queries = _inputs(mode, size)
    turns = {name: _in_turn(search, cycle(queries)) for name, search in _ways(gallery).items()}
    seconds = timings(turns, "cpu", repeats=3 if quick else 3 * QUERIES)
    flops, least_bytes = 2.0 * size * DIMENSIONS, gallery.codes.nbytes
    product = max(value for name, value in ceilings.items() if name != "copy")
    doubted = np.mean([len(gallery.candidates(query, K)) for query in queries])
    return [
        row(
            *("nearest", name, mode, "int8" if name.endswith("scan") else "float32"),
            *(f"{size}x{DIMENSIONS}", "seconds", quantiles),
            flops=flops,
            least_bytes=least_bytes,  # a row's int8 entries are the least that is known to do
            floor=max(flops / product, least_bytes / ceilings["copy"]),
            peak_memory_bytes=peak_memory(turns[name], "cpu"),
            precisions=f"int8, {doubted:.0f} rows in float64" if name.endswith("scan") else None,
        )
        for name, quantiles in seconds.items()
    ]


def _in_turn(search: Search, queries: Iterator[NDArray[np.float32]]) -> Callable[[], Answer]:
    return lambda: search(next(queries))


def _ways(gallery: Gallery) -> dict[str, Search]:
    vectors = torch.from_numpy(gallery.vectors)

    def product(query: NDArray[np.float32]) -> Answer:
        found = (vectors @ torch.from_numpy(query)).topk(K)
        return found.values.double().numpy(), found.indices.numpy()

    ways: dict[str, Search] = {
        "cmdlab.search scan": lambda query: gallery.nearest(query, K, impl="scan"),
        "torch matmul + top-k": product,
    }
    try:
        import faiss
    except ImportError:
        return ways
    faiss.omp_set_num_threads(torch.get_num_threads())
    flat = faiss.IndexFlatIP(DIMENSIONS)
    flat.add(gallery.vectors)

    def faiss_flat(query: NDArray[np.float32]) -> Answer:
        scores, rows = flat.search(query[None], K)
        return scores[0].astype(np.float64), rows[0]

    return ways | {
        "cmdlab.search by faiss": lambda query: gallery.nearest(query, K, impl="faiss"),
        "faiss IndexFlatIP": faiss_flat,
    }

"""Exact retrieval ranks against what is used in their place, correct answers first."""

from __future__ import annotations

import sys
from collections.abc import Callable
from unittest.mock import patch

import torch
from bench import gate, peak_memory, row, timings
from cmdlab_kernels import retrieval_ranks, retrieval_ranks_cpu
from torch import Tensor

BOTH = "both directions"
FIELDS = ("speech_greater", "speech_equal", "image_greater", "image_equal")


def benchmark(device: str, quick: bool, ceilings: dict[str, float]) -> list[dict]:
    """SpokenCOCO's test, 25,000 captions × 5,000 images × 768, and smaller galleries."""
    _check(device)
    sizes = [(2000, 400)] if quick else [(1000, 200), (5000, 1000), (25000, 5000)]
    rows = []
    for captions, images in sizes:
        rows += _size(device, captions, images, 3 if quick else 7, ceilings)
    return rows


def embeddings(captions: int, images: int, dimensions: int = 768) -> tuple[Tensor, ...]:
    """Unit-norm embeddings that retrieve as a trained model does: R@1 about 50, R@10 about 80 %.

    An image is a cluster's centre plus its own part, both Gaussian in a quarter of the directions
    of the space; a caption is its image plus noise in the same directions.
    """
    generator = torch.Generator().manual_seed(0)

    def gaussian(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    used = dimensions // 4
    directions = torch.linalg.qr(gaussian(dimensions, used))[0].T.contiguous()
    cluster = torch.randint(images // 10, (images,), generator=generator)
    latent = gaussian(images, used) + gaussian(images // 10, used)[cluster]
    owner = torch.randperm(captions, generator=generator) % images
    speech = (latent[owner] + 5 * gaussian(captions, used)) @ directions
    speech, image = (torch.nn.functional.normalize(x, dim=1) for x in (speech, latent @ directions))
    return speech, image, owner, torch.arange(images)


def _check(device: str) -> None:
    """Every path that is timed, against the reference, ties and near ties included."""
    inputs = embeddings(600, 120, 96)
    image = inputs[1]
    image[7] = image[8]
    image[9] = torch.nextafter(image[10], image[11])
    expected = retrieval_ranks(*inputs, impl="reference")
    for name, rank in _ours(device, tuple(x.to(device) for x in inputs)).items():
        result = rank()
        same = all(torch.equal(getattr(result, f).cpu(), getattr(expected, f)) for f in FIELDS)
        gate(name, same)


def _ours(device: str, inputs: tuple[Tensor, ...]) -> dict[str, Callable]:
    functions: dict[str, Callable] = {"cmdlab_kernels": lambda: retrieval_ranks(*inputs)}
    if device == "cpu":
        only_float32 = [retrieval_ranks_cpu.FP32]

        def without_low_precision() -> object:
            with patch.object(retrieval_ranks_cpu, "precisions", lambda: only_float32):
                return retrieval_ranks(*inputs)

        functions["cmdlab_kernels, fp32 only"] = without_low_precision
    return functions


def _size(
    device: str, captions: int, images: int, repeats: int, ceilings: dict[str, float]
) -> list[dict]:
    inputs = tuple(x.to(device) for x in embeddings(captions, images))
    speech, image, *_ = inputs
    low_speech, low_image = speech.bfloat16(), image.bfloat16()
    ours = _ours(device, inputs)
    products: dict[str, Callable] = {
        "bare fp32 product": lambda: speech @ image.T,
        "bare bf16 product": lambda: low_speech @ low_image.T,
    }
    peers = _peers(device, speech, image)
    result = retrieval_ranks(*inputs)
    print(f"  {captions} × {images}: path {result.path}", file=sys.stderr)
    seconds = timings(ours | products | peers, device, repeats=repeats)
    flops = 2.0 * captions * images * speech.shape[1]
    least_bytes = speech.nbytes + image.nbytes
    product = max(value for name, value in ceilings.items() if name != "copy")
    floor = max(flops / product, least_bytes / ceilings["copy"])
    memory = {name: peak_memory(f, device) for name, f in (ours | peers).items()}
    shape = f"{captions}x{images}x{speech.shape[1]}"
    return [
        row(
            "retrieval_ranks",
            name,
            "one direction" if name in products or "100 captions" in name else BOTH,
            "bfloat16" if "bf16" in name else "float32",
            shape,
            "seconds",
            quantiles,
            flops=flops,
            least_bytes=least_bytes,
            floor=floor,
            peak_memory_bytes=memory.get(name),
        )
        for name, quantiles in seconds.items()
    ]


def _peers(device: str, speech: Tensor, image: Tensor) -> dict[str, Callable]:
    def top_k() -> None:
        scores = speech @ image.T
        scores.topk(10, 1)
        scores.topk(10, 0)

    def sort() -> None:
        scores = speech @ image.T
        scores.argsort(1, descending=True)
        scores.argsort(0, descending=True)

    peers: dict[str, Callable] = {"torch matmul + top-k": top_k, "torch matmul + argsort": sort}
    if device == "cpu":
        try:
            import faiss
        except ImportError:
            return peers
        faiss.omp_set_num_threads(torch.get_num_threads())

        def search() -> None:
            for gallery, queries in ((image, speech), (speech, image)):
                index = faiss.IndexFlatIP(gallery.shape[1])
                index.add(gallery.numpy())
                index.search(queries.numpy(), 10)

        peers["faiss IndexFlatIP top-10"] = search
    if len(image) <= 1000:
        peers |= _torchmetrics(speech, image)
    return peers


def _torchmetrics(speech: Tensor, image: Tensor) -> dict[str, Callable]:
    """Recall@10 of the first 100 captions: torchmetrics takes the scores as one flat list."""
    try:
        from torchmetrics.functional.retrieval import retrieval_recall
    except ImportError:
        return {}

    def recall() -> None:
        for scores in speech[:100] @ image.T:
            target = torch.zeros_like(scores, dtype=torch.bool)
            target[0] = True
            retrieval_recall(scores, target, top_k=10)

    return {"torchmetrics recall, 100 captions": recall}

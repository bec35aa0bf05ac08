"""Exact retrieval ranks against what is used in their place, correct answers first."""

from __future__ import annotations

import sys
from collections.abc import Callable
from unittest.mock import patch

import torch
from bench import GRAPH, WrongResult, gate, peak_memory, row, timings
from cmdlab_kernels import retrieval_float32_cpu, retrieval_ranks, retrieval_ranks_cpu
from cmdlab_kernels.retrieval_ranks import RetrievalRanks
from torch import Tensor

BOTH = "both directions"
NARROW = "both directions, narrow scores"
FIELDS = ("speech_greater", "speech_equal", "image_greater", "image_equal")


def benchmark(device: str, quick: bool, ceilings: dict[str, float]) -> list[dict]:
    """SpokenCOCO's test, 25,000 captions × 5,000 images × 768, and smaller galleries.

    On a GPU also a million of each, whose matrix of scores would take 4 TB.
    """
    _check(device)
    sizes = [(2000, 400)] if quick else [(1000, 200), (5000, 1000), (25000, 5000)]
    if device == "cuda" and not quick:
        sizes.append((10**6, 10**6))
    rows = []
    for mode in (BOTH, NARROW):
        for captions, images in sizes:
            rows += _size(device, mode, captions, images, 3 if quick else 31, ceilings)
    return rows


def embeddings(
    captions: int,
    images: int,
    dimensions: int = 768,
    *,
    noise: float = 5,
    narrow: bool = False,
    device: str = "cpu",
) -> tuple[Tensor, ...]:
    """Unit-norm embeddings that retrieve as a trained model does: R@1 about 50, R@10 about 80 %.

    An image is a cluster's centre plus its own part, both Gaussian in a quarter of the directions
    of the space; a caption is its image plus noise in the same directions. `narrow` ones are hard
    for a low precision: Gaussian in all directions, so that scores lie close together, no clusters,
    and right images only a little above the rest (noise doubled).
    """
    generator = torch.Generator(device).manual_seed(0)

    def gaussian(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    used = dimensions if narrow else dimensions // 4
    noise = 2 * noise if narrow else noise
    directions = torch.linalg.qr(gaussian(dimensions, used))[0].T.contiguous()
    cluster = torch.randint(images // 10, (images,), generator=generator, device=device)
    latent = gaussian(images, used)
    if not narrow:
        latent += gaussian(images // 10, used)[cluster]
    owner = torch.randperm(captions, generator=generator, device=device) % images
    speech = torch.empty(captions, dimensions, device=device)
    for rows, images_of in zip(speech.split(2**16), owner.split(2**16), strict=True):
        noisy = latent[images_of] + noise * gaussian(len(rows), used)
        rows.copy_(torch.nn.functional.normalize(noisy @ directions, dim=1))
    image = torch.nn.functional.normalize(latent @ directions, dim=1)
    return speech, image, owner, torch.arange(images, device=device)


def _check(device: str) -> None:
    """Every provider that is timed, against the reference; ours on ties and near ties too."""
    timed_kind, narrow = embeddings(1200, 240), embeddings(1200, 240, narrow=True)
    sharp = embeddings(1200, 240, noise=1)  # so that the fastest product is worth it for all rows
    speech, image, owner, _ = sharp
    speech[owner == 7], speech[owner == 9] = speech[owner == 8], speech[owner == 10]
    image[7] = image[8]
    image[9] = torch.nextafter(image[10], image[11])
    for inputs in (timed_kind, narrow, sharp):
        expected = retrieval_ranks(*inputs, impl="reference")
        for name, rank in _ours(device, tuple(x.to(device) for x in inputs)).items():
            result = rank()
            gate(name, _same(result, expected))
            if device == "cpu":  # as a larger size has it
                with patch.object(retrieval_float32_cpu, "PAIRS", 0):
                    result = rank()
                gate(f"{name}, in tiles", _same(result, expected))
            if inputs is sharp and result.shares.get(_path(device, name), 0) < 0.9:
                took = _written(result.shares)
                raise WrongResult(f"{name} took {took}, so {_path(device, name)} is unproven")

    if device == "cuda":  # as the largest size has it: many launches, and a sample first
        from cmdlab_kernels import retrieval_ranks_triton

        with (
            patch.object(retrieval_ranks_triton, "PAIRS_AT_ONCE", 1200 * 32),
            patch.object(retrieval_ranks_triton, "PILOT_ROWS", 128),
        ):
            result = retrieval_ranks(*(x.to(device) for x in sharp))
        gate("cmdlab_kernels, in parts", _same(result, retrieval_ranks(*sharp, impl="reference")))

    # The peers' scores are rounded, which may move a caption across the tenth place.
    expected = retrieval_ranks(*timed_kind, impl="reference")
    right = torch.cat([expected.speech_greater < 10, expected.image_greater < 10])
    for name, peer in _peers(device, *(x.to(device) for x in timed_kind)).items():
        hits = torch.cat([x.cpu() for x in peer()])
        gate(name, bool((hits == right).float().mean() > 0.995))


def _same(result: RetrievalRanks, expected: RetrievalRanks) -> bool:
    return all(torch.equal(getattr(result, f).cpu(), getattr(expected, f)) for f in FIELDS)


def _path(device: str, name: str) -> str:
    """The arithmetic of which the provider `name` is to show the speed."""
    if device == "cuda":
        return "triton-int8"
    low = [] if "fp32" in name else retrieval_ranks_cpu.precisions(768)
    return low[0].name if low else retrieval_float32_cpu.PATH


def _ours(device: str, inputs: tuple[Tensor, ...]) -> dict[str, Callable]:
    functions: dict[str, Callable] = {"cmdlab_kernels": lambda: retrieval_ranks(*inputs)}
    if device == "cpu" and retrieval_ranks_cpu.precisions(768):

        def without_low_precision() -> object:
            with patch.object(retrieval_ranks_cpu, "precisions", lambda _: []):
                return retrieval_ranks(*inputs)

        functions["cmdlab_kernels, fp32 only"] = without_low_precision
    return functions


def _size(
    device: str, mode: str, captions: int, images: int, repeats: int, ceilings: dict[str, float]
) -> list[dict]:
    inputs = embeddings(captions, images, narrow=mode == NARROW, device=device)
    speech, image, *_ = inputs
    ours = _ours(device, inputs)
    products: dict[str, Callable] = {}
    peers: dict[str, Callable] = {}
    if captions * images < 2**32:  # all of these make the matrix of scores
        low_speech, low_image = speech.bfloat16(), image.bfloat16()
        products["bare fp32 product"] = lambda: speech @ image.T
        products["bare bf16 product"] = lambda: low_speech @ low_image.T
        peers = _peers(device, *inputs)
    if mode == NARROW:  # the others' time does not depend on the scores
        products, peers = {}, {name: peer for name, peer in peers.items() if "top-k" in name}
    shares = {name: _written(rank().shares) for name, rank in ours.items()}
    print(f"  {captions} × {images}, {mode}: {shares}", file=sys.stderr)
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
            "one direction" if name.removesuffix(GRAPH) in products else mode,
            "bfloat16" if "bf16" in name else "float32",
            shape,
            "seconds",
            quantiles,
            flops=flops,
            least_bytes=least_bytes,
            floor=floor,
            peak_memory_bytes=memory.get(name.removesuffix(GRAPH)),
            precisions=shares.get(name.removesuffix(GRAPH)),
        )
        for name, quantiles in seconds.items()
    ]


def _written(shares: dict[str, float]) -> str:
    """Such as "cpu-int8 84.1 %, cpu-bf16 15.9 %"."""
    return ", ".join(f"{path} {100 * share:.3g} %" for path, share in shares.items())


def _peers(
    device: str, speech: Tensor, image: Tensor, owner: Tensor, image_id: Tensor
) -> dict[str, Callable[[], tuple[Tensor, Tensor]]]:
    """Functions that tell whether a right answer is among the first 10, bool [N] and [M]."""

    def hits(by_caption: Tensor, by_image: Tensor) -> tuple[Tensor, Tensor]:
        """From the first 10 images of each caption [N, 10] and captions of each image [M, 10]."""
        return (
            (image_id[by_caption] == owner[:, None]).any(1),
            (owner[by_image] == image_id[:, None]).any(1),
        )

    def top_k() -> tuple[Tensor, Tensor]:
        scores = speech @ image.T
        return hits(scores.topk(10, 1).indices, scores.topk(10, 0).indices.T)

    def sort() -> tuple[Tensor, Tensor]:
        scores = speech @ image.T
        by_caption = scores.argsort(1, descending=True)[:, :10].clone()  # the rest can be freed
        return hits(by_caption, scores.argsort(0, descending=True)[:10].T)

    peers = {"torch matmul + top-k": top_k, "torch matmul + argsort": sort}
    if device == "cpu":
        try:
            import faiss
        except ImportError:
            return peers
        faiss.omp_set_num_threads(torch.get_num_threads())

        def first(gallery: Tensor, queries: Tensor) -> Tensor:
            index = faiss.IndexFlatIP(gallery.shape[1])
            index.add(gallery.numpy())
            return torch.from_numpy(index.search(queries.numpy(), 10)[1])

        peers["faiss IndexFlatIP top-10"] = lambda: hits(first(image, speech), first(speech, image))
    if len(image) <= 1000:
        peers |= _torchmetrics(speech, image, owner, image_id)
    return peers


def _torchmetrics(
    speech: Tensor, image: Tensor, owner: Tensor, image_id: Tensor
) -> dict[str, Callable[[], tuple[Tensor, Tensor]]]:
    """Query by query: its classes sort the queries out of one flat list, which takes longer."""
    try:
        from torchmetrics.functional.retrieval import retrieval_hit_rate
    except ImportError:
        return {}

    def hit_rate() -> tuple[Tensor, Tensor]:
        scores, right = speech @ image.T, owner[:, None] == image_id

        def hits(scores: Tensor, right: Tensor) -> Tensor:
            pairs = zip(scores, right, strict=True)
            return torch.stack([retrieval_hit_rate(*pair, top_k=10) for pair in pairs]).bool()

        return hits(scores, right), hits(scores.T.contiguous(), right.T.contiguous())

    return {"torchmetrics hit rate@10": hit_rate}

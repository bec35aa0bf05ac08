"""The nearest vectors are the plain product's, whatever finds them."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cmdlab.search.nearest import Gallery

WAYS = ["scan", pytest.param("faiss", marks=pytest.mark.filterwarnings("ignore"))]


def unit(rows: np.ndarray) -> np.ndarray:
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    return (rows / np.maximum(norms, 1e-12)).astype(np.float32)


def plain(vectors: np.ndarray, query: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The oracle: every product in float64, a stable sort."""
    scores = (vectors.astype(np.float64) * query.astype(np.float64)).sum(1)
    order = np.argsort(-scores, kind="stable")[:k]
    return scores[order], order


@st.composite
def galleries(draw):
    """Vectors spread, alike, repeated, sparse or with one entry that outweighs the rest."""
    generator = np.random.default_rng(draw(st.integers(0, 2**32)))
    n, d = draw(st.integers(1, 3000)), draw(st.sampled_from([1, 3, 8, 64, 250]))
    rows = generator.standard_normal((n, d))
    kind = draw(st.sampled_from(["spread", "alike", "repeated", "sparse", "uneven"]))
    if kind == "alike":
        rows = generator.standard_normal(d) + 1e-3 * rows
    elif kind == "repeated":
        rows = rows[generator.integers(0, 1 + n // 20, n)]
    elif kind == "sparse":
        rows *= generator.random((n, d)) < 0.1
    elif kind == "uneven":
        rows *= 10.0 ** generator.uniform(-6, 3, (n, d))
    vectors = unit(rows)
    query = vectors[generator.integers(n)] + generator.choice([0, 0.1, 3]) * unit(
        generator.standard_normal((1, d))
    )
    return vectors, query[0].astype(np.float32), draw(st.integers(1, 40))


@pytest.mark.parametrize("impl", WAYS)
@settings(max_examples=60, deadline=None)
@given(case=galleries())
def test_the_answer_is_the_plain_products(impl, case):
    if impl == "faiss":
        pytest.importorskip("faiss")
    vectors, query, k = case
    scores, rows = Gallery.of(vectors).nearest(query, k, impl=impl)
    expected_scores, expected_rows = plain(vectors, query, k)
    np.testing.assert_array_equal(rows, expected_rows)
    np.testing.assert_array_equal(scores, expected_scores)


def test_few_rows_of_many_are_scored_again():
    """Otherwise it would be no scan: the bound must tell rows apart."""
    generator = np.random.default_rng(0)
    vectors = unit(generator.standard_normal((50_000, 256)))
    gallery = Gallery.of(vectors)
    query = unit(generator.standard_normal((1, 256)))[0]
    assert 12 <= len(gallery.candidates(query, 12)) < 500


def test_vectors_may_stay_on_disk(tmp_path):
    vectors = unit(np.random.default_rng(1).standard_normal((300, 32)))
    for name, array in vars(Gallery.of(vectors)).items():
        np.save(tmp_path / f"{name}.npy", array)
    mapped = {path.stem: np.load(path, mmap_mode="c") for path in tmp_path.glob("*.npy")}
    for found, expected in zip(
        Gallery(**mapped).nearest(vectors[7], 5), plain(vectors, vectors[7], 5), strict=True
    ):
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(
    ("query", "k", "impl"),
    [
        (np.zeros(3, np.float32), 1, "auto"),
        (np.full(4, np.nan, np.float32), 1, "auto"),
        (np.zeros(4, np.float32), 0, "auto"),
        (np.zeros(4, np.float32), 1, "hnsw"),
    ],
)
def test_a_wrong_query_is_refused(query, k, impl):
    with pytest.raises(ValueError, match="must be"):
        Gallery.of(np.eye(4, dtype=np.float32)).nearest(query, k, impl=impl)


@pytest.mark.parametrize("bad", [np.inf, np.nan, 3.0])
def test_a_vector_that_the_bound_does_not_hold_for_is_refused(bad):
    with pytest.raises(ValueError, match="longer than 1"):
        Gallery.of(np.array([[1, 0], [bad, 0]], np.float32))


def test_nothing_is_near_in_an_empty_gallery():
    scores, rows = Gallery.of(np.zeros((0, 4), np.float32)).nearest(np.ones(4, np.float32), 3)
    assert len(scores) == len(rows) == 0

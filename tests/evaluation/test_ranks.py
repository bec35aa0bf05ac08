"""Ranks and metrics: known by hand, counted by brute force, and as other libraries have them."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import rankdata

from cmdlab.errors import InputError
from cmdlab.evaluation.ranks import (
    RankTable,
    evaluate_file,
    rank_table,
    ranks_of_scores,
    retrieval_metrics,
)

DIRECTIONS = ("speech_to_image", "image_to_speech")

# Scores of 8 captions (rows; two of each image in turn) against 4 images (columns).
SCORES = np.array(
    [
        [9, 1, 2, 4],  # rank 1
        [4, 8, 2, 1],  # image 1 is above: 2
        [1, 7, 2, 3],  # 1
        [6, 5, 5, 1],  # image 0 is above, image 2 ties: 3, or 2 when ties are forgiven
        [3, 3, 3, 3],  # three ties: 4, or 1
        [0, 1, 6, 2],  # 1
        [5, 6, 7, 4],  # 4
        [2, 0, 1, 3],  # 1
    ]
)
OWNER = np.repeat(np.arange(4), 2)
# Best own caption against the others, by column: 9 (rank 1); 7, with an 8 above (2);
# 6, with a 7 above (2); 4, with another 4 (2, or 1).


@given(
    st.lists(st.lists(st.integers(0, 3), min_size=3, max_size=3), min_size=4, max_size=8),
    st.data(),
)
@settings(deadline=None)
def test_ranks_of_scores_are_those_of_the_same_dot_products(scores, data):
    others = st.lists(st.integers(0, 2), min_size=len(scores) - 3, max_size=len(scores) - 3)
    owner = torch.tensor([2, 0, 1, *data.draw(others)])
    matrix = torch.tensor(scores).double()
    expected = rank_table(matrix, torch.eye(3).double(), owner, torch.arange(3))
    found = ranks_of_scores(matrix, matrix, owner)
    names = ("speech_greater", "speech_equal", "image_greater", "image_equal")
    # `rank_table` numbers images by their first row, which here is 0 to 2 in order.
    for name in (*names, "speech_image", "image_of_view"):
        assert getattr(found, name).tolist() == getattr(expected, name).tolist()


def test_each_direction_has_its_own_scores():
    forward, backward = torch.eye(2), 1 - torch.eye(2)
    found = ranks_of_scores(forward, backward, torch.arange(2))
    assert found.ranks("speech_to_image").tolist() == [1, 1]
    assert found.ranks("image_to_speech").tolist() == [2, 2]
    with pytest.raises(InputError, match="scores of image queries hold NaN"):
        ranks_of_scores(forward, backward * torch.nan, torch.arange(2))
    with pytest.raises(InputError, match="speech_image does not cover the 2 images"):
        ranks_of_scores(forward, backward, torch.tensor([0, 0]))


def test_known_recalls_in_both_directions():
    table = rank_table(SCORES, np.eye(4), OWNER, np.arange(4))
    assert table.ranks("speech_to_image").tolist() == [1, 2, 1, 3, 4, 1, 4, 1]
    assert table.ranks("image_to_speech").tolist() == [1, 2, 2, 2]
    assert retrieval_metrics(table) == {
        "speech_to_image": {
            "R@1": 50.0,
            "R@5": 100.0,
            "R@10": 100.0,
            "optimistic_R@1": 62.5,
            "median_rank": 1.5,
            "MRR": pytest.approx((4 + 1 / 2 + 1 / 3 + 1 / 4 + 1 / 4) / 8),
            "queries": 8,
            "gallery": 4,
        },
        "image_to_speech": {
            "R@1": 25.0,
            "R@5": 100.0,
            "R@10": 100.0,
            "optimistic_R@1": 50.0,
            "median_rank": 2.0,
            "MRR": 0.625,
            "queries": 4,
            "gallery": 8,
        },
        "mean_R@1": 37.5,
    }


def test_recall_at_5_and_10_are_cut_off_where_they_say():
    # Caption i scores images 0 to 11 by their number: its own image i has rank 12 - i.
    table = rank_table(np.ones((12, 1)), np.arange(12.0)[:, None], np.arange(12), np.arange(12))
    metrics = retrieval_metrics(table)["speech_to_image"]
    assert metrics["R@1"] == pytest.approx(100 / 12)
    assert metrics["R@5"] == pytest.approx(500 / 12)
    assert metrics["R@10"] == pytest.approx(1000 / 12)


def test_constant_embeddings_find_nothing():
    table = rank_table(np.ones((15, 4)), np.ones((3, 4)), np.arange(15) % 3, np.arange(3))
    metrics = retrieval_metrics(table)
    for direction in DIRECTIONS:
        assert metrics[direction]["R@1"] == 0
        assert metrics[direction]["optimistic_R@1"] == 100
    assert metrics["mean_R@1"] == 0
    assert table.ranks("speech_to_image").tolist() == [3] * 15
    assert table.ranks("image_to_speech").tolist() == [11] * 3  # its other captions are left out


def test_separable_embeddings_find_everything():
    metrics = retrieval_metrics(
        rank_table(np.eye(6)[np.arange(18) % 6], np.eye(6), np.arange(18) % 6, np.arange(6))
    )
    assert metrics["mean_R@1"] == 100
    assert metrics["image_to_speech"]["MRR"] == 1


# Scores of 4 captions against 4 views: two of image 0, one of image 1, one of image 2.
VIEW_SCORES = np.array(
    [
        [5, 1, 3, 2],  # of image 0: its best view has 5, nothing is above: rank 1
        [1, 2, 3, 3],  # of image 0: 2, and both others are above: 3
        [4, 3, 4, 1],  # of image 1: 4, and a view of image 0 ties: 2, or 1
        [2, 2, 6, 1],  # of image 2: 1, and both views of image 0 and image 1 are above: 4
    ]
)
# View 0: its best caption 5 (rank 1); view 1: 2, with a 3 above and another 2 (3, or 2);
# image 1: 4, with a 6 above (2); image 2: 1, with 2 and 3 above and another 1 (4, or 3).
VIEWS = {
    "speech_to_image": {
        "R@1": 25.0,
        "R@5": 100.0,
        "R@10": 100.0,
        "optimistic_R@1": 50.0,
        "median_rank": 2.5,
        "MRR": pytest.approx((1 + 1 / 3 + 1 / 2 + 1 / 4) / 4),
        "queries": 4,
        "gallery": 4,
    },
    "image_to_speech": {
        "R@1": 25.0,
        "R@5": 100.0,
        "R@10": 100.0,
        "optimistic_R@1": 25.0,
        "median_rank": 2.5,
        "MRR": pytest.approx((1 + 1 / 3 + 1 / 2 + 1 / 4) / 4),
        "queries": 4,
        "gallery": 4,
    },
    "mean_R@1": 25.0,
}
VIEW_OWNER = np.array([0, 0, 1, 2])


@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_different_rows_of_an_image_are_views(impl):
    table = rank_table(VIEW_SCORES, np.eye(4), VIEW_OWNER, VIEW_OWNER, impl=impl)
    assert table.ranks("speech_to_image").tolist() == [1, 3, 2, 4]
    assert table.ranks("image_to_speech").tolist() == [1, 3, 2, 4]
    assert (table.images, table.image_of_view.tolist()) == (3, [0, 0, 1, 2])
    assert retrieval_metrics(table) == VIEWS


def saved(path, **arrays):
    np.savez(path, **arrays)
    return path


def test_equal_rows_of_an_image_are_counted_once(tmp_path, capsys):
    once = saved(
        tmp_path / "once.npz",
        **{"speech": SCORES, "image": np.eye(4), "speech_image_id": OWNER, "image_id": range(4)},
    )
    rows = np.eye(4)[OWNER]
    rows[1] *= -1
    rows[1] *= -1  # -0.0 is equal to 0.0
    dumped = saved(
        tmp_path / "dumped.npz",
        **{"speech": SCORES, "image": rows, "speech_image_id": OWNER, "image_id": OWNER},
    )
    expected = evaluate_file(once)
    assert capsys.readouterr().err == ""
    assert evaluate_file(dumped) == expected
    assert capsys.readouterr().err == (
        f"{dumped}: image: 4 of 8 rows repeat a row of the same image; each different row is "
        "counted once\n"
    )


def test_equal_and_different_rows_may_stand_together(tmp_path, capsys):
    rows, owner = np.eye(4)[[3, 0, 1, 1, 2, 3]], np.array(["c", "a", "a", "a", "b", "c"])
    path = saved(
        tmp_path / "mixed.npz",
        speech=VIEW_SCORES,
        image=rows,
        speech_image_id=np.array(["a", "a", "b", "c"]),
        image_id=owner,
    )
    assert evaluate_file(path) == VIEWS
    repeats, views = capsys.readouterr().err.splitlines()
    assert "2 of 6 rows repeat" in repeats
    assert "4 different rows show 3 images; each is a view" in views


def test_equal_rows_of_two_images_are_two_images():
    table = rank_table(np.ones((2, 1)), np.ones((2, 1)), np.arange(2), np.arange(2))
    assert table.ranks("speech_to_image").tolist() == [2, 2]


@st.composite
def galleries(draw):
    """Small-integer embeddings, full of ties; images of 1 to 7 captions, captions in any order."""
    captions_of = draw(st.lists(st.integers(1, 7), min_size=1, max_size=6))
    dimensions = draw(st.integers(1, 4))
    owner = draw(st.permutations(np.repeat(np.arange(len(captions_of)), captions_of).tolist()))
    rows = st.lists(st.integers(-2, 2), min_size=dimensions, max_size=dimensions)
    speech = draw(st.lists(rows, min_size=len(owner), max_size=len(owner)))
    image = draw(st.lists(rows, min_size=len(captions_of), max_size=len(captions_of)))
    return np.array(speech, np.float32), np.array(image, np.float32), np.array(owner)


def brute_force_ranks(speech, image, owner):
    scores = speech.astype(np.float64) @ image.astype(np.float64).T
    speech_ranks = [
        1 + sum(scores[i, j] >= scores[i, own] for j in range(len(image)) if j != own)
        for i, own in enumerate(owner)
    ]
    image_ranks = []
    for j in range(len(image)):
        best = max(scores[i, j] for i in range(len(speech)) if owner[i] == j)
        others = [scores[i, j] for i in range(len(speech)) if owner[i] != j]
        image_ranks.append(1 + sum(score >= best for score in others))
    return speech_ranks, image_ranks


@settings(max_examples=60, deadline=None)
@given(galleries())
def test_ranks_are_those_of_brute_force(gallery):
    speech, image, owner = gallery
    table = rank_table(speech, image, owner, np.arange(len(image)))
    speech_ranks, image_ranks = brute_force_ranks(speech, image, owner)
    assert table.ranks("speech_to_image").tolist() == speech_ranks
    assert table.ranks("image_to_speech").tolist() == image_ranks
    metrics = retrieval_metrics(table)
    for direction in DIRECTIONS:
        part = metrics[direction]
        assert part["R@1"] <= part["optimistic_R@1"]
        assert part["R@1"] <= part["R@5"] <= part["R@10"]
        assert part["R@1"] / 100 <= part["MRR"] <= 1


@settings(max_examples=60, deadline=None)
@given(galleries(), st.data())
def test_ranks_with_views_are_those_of_brute_force(gallery, data):
    speech, image, owner = gallery
    more = data.draw(st.lists(st.sampled_from(owner.tolist()), max_size=5))
    shown = np.array([*range(len(image)), *more])
    shifted = [image[i] + data.draw(st.integers(0, 1)) for i in more]  # equal, or another view
    rows = np.array([*image, *shifted], np.float32)
    views = sorted({(int(i), tuple(row)) for i, row in zip(shown, rows.tolist(), strict=True)})
    scores = speech @ np.array([row for _, row in views], np.float32).T
    own = owner[:, None] == np.array([i for i, _ in views])
    table = rank_table(speech, rows, owner, shown)
    for direction, scored, right in (
        ("speech_to_image", scores, own),
        ("image_to_speech", scores.T, own.T),
    ):
        best = np.where(right, scored, -np.inf).max(1, keepdims=True)
        ranks = 1 + (~right & (scored >= best)).sum(1)
        assert sorted(table.ranks(direction)) == sorted(ranks)


@settings(max_examples=30, deadline=None)
@given(galleries(), st.randoms(use_true_random=False))
def test_neither_order_nor_names_change_the_metrics(gallery, random):
    speech, image, owner = gallery
    captions, images = list(range(len(speech))), list(range(len(image)))
    random.shuffle(captions)
    random.shuffle(images)
    names = np.array([f"photo {17 * j}.jpg" for j in range(len(image))])
    expected = retrieval_metrics(rank_table(speech, image, owner, np.arange(len(image))))
    shuffled = rank_table(speech[captions], image[images], names[owner][captions], names[images])
    found = retrieval_metrics(shuffled)
    for direction in DIRECTIONS:  # a mean in another order may differ in its last bit
        assert found[direction] == pytest.approx(expected[direction], rel=1e-12)
    np.testing.assert_array_equal(np.array(images)[shuffled.speech_image], owner[captions])


def test_agrees_with_torchmetrics_and_scipy():
    from torchmetrics.retrieval import RetrievalHitRate, RetrievalMRR

    generator = np.random.default_rng(0)
    owner = np.repeat(np.arange(12), generator.integers(1, 8, size=12))
    image = generator.normal(size=(12, 6))
    speech = image[owner] + generator.normal(size=(len(owner), 6))
    table = rank_table(speech, image, owner, np.arange(12))
    metrics = retrieval_metrics(table)
    scores = torch.from_numpy(speech @ image.T)
    relevant = torch.from_numpy(owner)[:, None] == torch.arange(12)

    queries = torch.arange(len(owner))[:, None].expand_as(scores)
    for cutoff in (1, 5, 10):
        rate = RetrievalHitRate(top_k=cutoff)(scores, relevant, indexes=queries)
        assert metrics["speech_to_image"][f"R@{cutoff}"] == pytest.approx(100 * float(rate))
        rate = RetrievalHitRate(top_k=cutoff)(scores.T, relevant.T, indexes=queries_of(scores.T))
        assert metrics["image_to_speech"][f"R@{cutoff}"] == pytest.approx(100 * float(rate))
    reciprocal = RetrievalMRR()(scores.T, relevant.T, indexes=queries_of(scores.T))
    assert metrics["image_to_speech"]["MRR"] == pytest.approx(float(reciprocal))

    of_all_images = rankdata(-scores.numpy(), axis=1, method="max")
    np.testing.assert_array_equal(
        table.ranks("speech_to_image"), of_all_images[np.arange(len(owner)), owner]
    )


def queries_of(scores):
    return torch.arange(len(scores))[:, None].expand_as(scores)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.int8])
def test_takes_tensors_of_any_real_type(dtype):
    table = rank_table(
        torch.from_numpy(SCORES).to(dtype), torch.eye(4), torch.from_numpy(OWNER), torch.arange(4)
    )
    assert table.ranks("speech_to_image").tolist() == [1, 2, 1, 3, 4, 1, 4, 1]


def test_large_unsigned_ids_stay_apart():
    # As float64, to which numpy promotes int64 with uint64, the two ids are one.
    ids = np.array([2**62, 2**62 + 1], np.uint64)
    table = rank_table(np.eye(2), np.eye(2), ids.astype(np.int64), ids)
    assert retrieval_metrics(table)["mean_R@1"] == 100


def test_a_table_is_read_as_it_was_saved(tmp_path):
    table = rank_table(SCORES, np.eye(4), OWNER, np.arange(4))
    table.save(tmp_path / "ranks.npz")
    assert [path.name for path in tmp_path.iterdir()] == ["ranks.npz"]
    assert retrieval_metrics(RankTable.load(tmp_path / "ranks.npz")) == retrieval_metrics(table)


def test_a_table_saved_before_there_were_views_is_read(tmp_path):
    rank_table(SCORES, np.eye(4), OWNER, np.arange(4)).save(tmp_path / "ranks.npz")
    arrays = dict(np.load(tmp_path / "ranks.npz"))
    del arrays["image_of_view"]
    np.savez(tmp_path / "old.npz", **arrays)
    read = RankTable.load(tmp_path / "old.npz")
    assert retrieval_metrics(read) == retrieval_metrics(RankTable.load(tmp_path / "ranks.npz"))


@pytest.mark.parametrize(
    "change",
    [
        {"speech_greater": np.full(8, 4)},  # as many better images as there are images
        {"image_equal": np.full(4, 7)},  # more tied captions than other images have
        {"speech_equal": np.full(8, -1)},
        {"speech_image": np.zeros(8, np.int64)},  # images without captions
        {"speech_image": OWNER + 1},
        {"speech_image": np.where(OWNER == 0, 2**45, OWNER)},  # counted, it would fill the memory
        {"speech_greater": np.full(8, 2**62), "speech_equal": np.full(8, 2**62)},  # overflows
        {"image_greater": np.zeros(3, np.int64)},
        {"speech_greater": np.zeros(8)},
        {"image_of_view": np.array([0, 0, 1, 3])},  # an image without a view
        {"image_of_view": np.array([0, 1, 2, 2**45])},
        {"image_of_view": np.zeros(4, np.int64)},  # captions of images that are not there
    ],
)
def test_a_table_that_no_gallery_can_give_is_refused(tmp_path, change):
    path = tmp_path / "ranks.npz"
    rank_table(SCORES, np.eye(4), OWNER, np.arange(4)).save(path)
    np.savez(path, **(dict(np.load(path)) | change))
    with pytest.raises(InputError, match=r"ranks\.npz: .*make the ranks again"):
        RankTable.load(path)


def test_evaluates_ids_that_are_file_names(tmp_path):
    names = np.array(["d.jpg", "a.jpg", "c.jpg", "b.jpg"])
    path = tmp_path / "mine.npz"
    np.savez(path, speech=SCORES, image=np.eye(4), speech_image_id=names[OWNER], image_id=names)
    for impl in ("auto", "reference"):
        assert evaluate_file(path, impl=impl)["mean_R@1"] == 37.5

"""The sheet: figures worked out by hand, intervals that hold, own pairs, and a page that opens."""

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from bs4 import BeautifulSoup
from hypothesis import given
from hypothesis import strategies as st

from cmdlab.corpora import import_corpus, load_corpus
from cmdlab.errors import InputError
from cmdlab.search import Index
from cmdlab.search.verdicts import LOG, Verdict, log_verdict, read_verdicts
from cmdlab.search.worth import (
    Trials,
    mean,
    measure,
    share,
    trials_of_log,
    trials_of_pairs,
    write_worth,
)

HOSTILE = "<script>alert(1)</script>.png"


def trials(ranks, *, gallery=100, seconds=2.0, picture=None):
    count = len(ranks)
    return Trials(
        "test",
        np.array(ranks, np.float64),
        np.full(count, gallery),
        np.full(count, seconds),
        np.arange(count) if picture is None else np.array(picture),
    )


def test_figures_worked_out_by_hand():
    """Ranks 1, 3, 12, none of 100 pictures, two seconds of speech, half a second a picture."""
    worth = measure(trials([1, 3, 12, np.inf]), 0.5)
    assert {k: one.mean for k, one in worth.found.items()} == {1: 0.25, 5: 0.5, 10: 0.5, 12: 0.75}
    assert worth.looked_at.mean == (1 + 3 + 12 + 100) / 4
    assert worth.median_rank == 7.5
    assert worth.leafed_through == 50.5
    assert worth.seconds_searching.mean == 2 + 0.5 * 116 / 4
    assert worth.seconds_saved.mean == 0.5 * 50.5 - (2 + 0.5 * 116 / 4)
    assert worth.not_found == 1


def test_a_search_that_costs_more_than_it_saves_is_called_so(tmp_path):
    worth = measure(trials([1] * 8, gallery=3, seconds=30.0), 1.0)
    assert worth.seconds_saved.high < 0


def test_an_interval_holds_as_often_as_it_says():
    """Pictures of three queries each that agree: 200 draws of 40 pictures; far too narrow would be
    an interval that took the queries for independent, which holds some 75 times in a hundred."""
    random = np.random.default_rng(5)
    held, naive = 0, 0
    for _ in range(200):
        values = np.repeat(random.normal(3.0, 1.0, 40), 3)
        found, alone = mean(values, np.repeat(np.arange(40), 3)), mean(values, np.arange(120))
        held += found.low <= 3.0 <= found.high
        naive += alone.low <= 3.0 <= alone.high
    assert 180 <= held <= 198
    assert naive < 165


@given(st.lists(st.booleans(), min_size=2, max_size=30))
def test_a_share_lies_in_its_interval_and_is_never_called_certain(hits):
    found = share(np.array(hits), np.arange(len(hits)))
    assert 0 <= found.low <= found.mean <= found.high <= 1
    if all(hits) or not any(hits):
        assert found.high > found.low


def test_queries_of_one_picture_alone_say_nothing():
    with pytest.raises(InputError, match="fewer than two pictures"):
        measure(trials([1, 2, 3], picture=[4, 4, 4]), 1.0)


@pytest.fixture(scope="module")
def own(smoke_corpus, make_index, tmp_path_factory):
    """A folder of pictures with its index, recordings beside it, and a table of pairs."""
    corpus = load_corpus(smoke_corpus, "test")
    folder = tmp_path_factory.mktemp("own")
    (folder / "pictures").mkdir()
    (folder / "recordings").mkdir()
    images = {image.id: image.path for image in corpus.images}
    for image in images.values():
        shutil.copy(image, folder / "pictures")
    rows = []
    for caption in corpus.captions[:8]:
        shutil.copy(caption.audio, folder / "recordings")
        rows.append(
            (f"recordings/{caption.audio.name}", f"pictures/{images[caption.image_id].name}")
        )
    write_pairs(folder / "pairs.csv", rows)
    return make_index(folder / "pictures"), folder, rows


def write_pairs(file: Path, rows) -> None:
    with file.open("w", newline="", encoding="utf-8") as out:
        csv.writer(out).writerows([("audio", "image"), *rows])


def test_own_pairs_are_ranked_among_all_pictures_of_the_index(own, retriever):
    index, folder, rows = own
    names = [index.path(row) for row in range(len(index))]
    found = trials_of_pairs(index, retriever, folder / "pairs.csv")
    for rank, (audio, image) in zip(found.rank, rows, strict=True):
        scores = dict(
            zip(names, index.vectors @ retriever.embed_speech(folder / audio), strict=True)
        )
        assert rank == 1 + sum(score > scores[Path(image).name] for score in scores.values())
    assert set(found.gallery) == {len(index)}
    assert found.seconds.min() > 0.5


def test_the_same_picture_twice_counts_as_shown_before(own, make_index, retriever, tmp_path):
    """Ties count against the search."""
    index, folder, rows = own
    for place in ("pictures", "recordings"):
        shutil.copytree(folder / place, tmp_path / place)
    for picture in list((tmp_path / "pictures").iterdir()):
        shutil.copy(picture, picture.with_name(f"copy-{picture.name}"))
    write_pairs(tmp_path / "pairs.csv", rows)
    twice = trials_of_pairs(make_index(tmp_path / "pictures"), retriever, tmp_path / "pairs.csv")
    once = trials_of_pairs(index, retriever, folder / "pairs.csv")
    np.testing.assert_array_equal(twice.rank, 2 * once.rank)


def test_of_pairs_that_were_trained_with_the_test_split_alone_is_asked(
    own, smoke_corpus, make_index, retriever, tmp_path
):
    _, folder, _ = own
    test = load_corpus(smoke_corpus, "test")
    images = {image.id: f"pictures/{image.path.name}" for image in test.images}
    shutil.copytree(folder / "pictures", tmp_path / "pictures")
    (tmp_path / "recordings").mkdir()
    rows = []
    for number, caption in enumerate(test.captions[::5]):  # the first of each picture
        shutil.copy(caption.audio, tmp_path / "recordings")
        split = ("train", "val", "test", "train")[number % 4]
        rows.append((f"recordings/{caption.audio.name}", images[caption.image_id], split))
    pairs = tmp_path / "pairs.csv"
    with pairs.open("w", newline="", encoding="utf-8") as out:
        csv.writer(out).writerows([("audio", "image", "split"), *rows])
    assert import_corpus(pairs, tmp_path / "mine", progress=False).ok
    index = make_index(tmp_path / "pictures")
    every = trials_of_pairs(index, retriever, pairs)
    held_out = trials_of_pairs(index, retriever, pairs, tmp_path / "mine")
    assert held_out.rank.tolist() == every.rank[2::4].tolist()
    assert held_out.source == "5 pairs of pairs.csv in the test split of mine"
    with pytest.raises(InputError, match=r"sources\.json: does not say where"):
        trials_of_pairs(index, retriever, pairs, smoke_corpus)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (("recordings/none.wav", None), "none.wav"),
        ((None, "pairs.csv"), "line 10: pairs.csv is not in the index"),
        (("pairs.csv", None), "line 10: pairs.csv: is no sound"),
    ],
)
def test_a_pair_that_cannot_be_used_is_named(own, retriever, row, message):
    index, folder, rows = own
    bad = tuple(new or old for new, old in zip(row, rows[0], strict=True))
    write_pairs(folder / "bad.csv", [*rows, bad])
    with pytest.raises(InputError, match=message) as refused:
        trials_of_pairs(index, retriever, folder / "bad.csv")
    assert str(refused.value).startswith(f"{folder / 'bad.csv'}: line 10: ")


def test_the_log_is_read_as_it_was_written(tmp_path):
    said = [
        Verdict("typed", 2.5, 40, 3, "a.png"),
        Verdict("recorded", 1.0, 40, None),
        Verdict("file", 4.0, 50, 50, "a.png"),
        Verdict("file", 4.0, 50, 2),
    ]
    for one in said:
        log_verdict(tmp_path, one)
    assert read_verdicts(tmp_path) == said
    found = trials_of_log(tmp_path)
    assert found.rank.tolist() == [3, np.inf, 50, 2]
    assert found.picture[0] == found.picture[2]
    assert len(set(found.picture)) == 3


GOOD = {
    "at": "2026-01-01",
    "how": "typed",
    "seconds": 1.0,
    "gallery": 5,
    "rank": 5,
    "picture": None,
}


@pytest.mark.parametrize(
    "line",
    [
        "",
        "[]",
        "[" * 100_000,
        "{}",
        *(
            json.dumps(GOOD | change)
            for change in (
                {"rank": 6},
                {"rank": 0},
                {"rank": True},
                {"rank": "1"},
                {"how": "guessed"},
                {"seconds": -1},
                {"seconds": float("nan")},
                {"seconds": "1"},
                {"gallery": 0},
                {"gallery": 1e9},
                {"picture": 3},
                {"more": 1},
            )
        ),
    ],
)
def test_a_line_that_the_page_does_not_write_is_refused_by_its_number(tmp_path, line):
    (tmp_path / LOG).write_text(f"{json.dumps(GOOD)}\n{line}\n")
    with pytest.raises(InputError, match=f"{LOG}: line 2: "):
        read_verdicts(tmp_path)


def test_without_a_log_the_remedy_is_told(tmp_path):
    with pytest.raises(InputError, match="run `cmdlab serve`, or give --queries"):
        read_verdicts(tmp_path)


@pytest.fixture
def said(own) -> Index:
    """The index, with nothing said of it yet."""
    index, _, _ = own
    (index.folder / LOG).unlink(missing_ok=True)
    return index


def test_the_sheet_opens_offline_with_its_text_escaped(said, tmp_path):
    for rank in (1, 2, 30, None):
        log_verdict(said.folder, Verdict("typed", 2.0, 400, rank, f"{rank}{HOSTILE}"))
    sheet = tmp_path / "worth.html"
    write_worth(said, None, sheet, price=2.5, currency="<b>EUR</b>", seconds_per_picture=1.5)
    first = sheet.read_bytes()
    page = BeautifulSoup(first, "html.parser")
    assert page.find("script") is None
    assert b"<b>EUR" not in first
    assert not [
        a["href"] for a in page.find_all(href=True) if not a["href"].startswith(("#", "data:"))
    ]
    assert "50.0 %" in page.find(class_="claim").text
    headings = [heading.text for heading in page.find_all("h2")]
    assert any("Cost" in heading for heading in headings)
    cells = [cell.text for cell in page.select("#cost-table td")]
    assert "0.0250" in cells  # 2.5 over a hundred searches
    assert "in <b>EUR</b>" in page.select_one("#cost-table").text
    write_worth(said, None, sheet, price=2.5, currency="<b>EUR</b>", seconds_per_picture=1.5)
    assert sheet.read_bytes() == first


@pytest.mark.parametrize(("ranks", "saved"), [([1, 2, 3], "5.5 h"), ([1, 380, None], "not shown")])
def test_time_that_is_not_shown_to_be_saved_has_no_price(said, tmp_path, ranks, saved):
    for number, rank in enumerate(ranks):
        log_verdict(said.folder, Verdict("typed", 1.5, 400, rank, f"{number}.png"))
    write_worth(said, None, tmp_path / "worth.html", price=2.5)
    page = BeautifulSoup((tmp_path / "worth.html").read_bytes(), "html.parser")
    first = page.select_one("#cost-table tbody tr")
    assert first.find("td").text == saved


def test_without_a_price_nothing_is_said_of_cost(said, tmp_path):
    for rank in (1, 2):
        log_verdict(said.folder, Verdict("typed", 2.0, 400, rank))
    write_worth(said, None, tmp_path / "worth.html")
    page = BeautifulSoup((tmp_path / "worth.html").read_bytes(), "html.parser")
    assert page.find(id="cost") is None

"""The ablation report: what it holds, that it can be traced, and that it trusts nobody's text."""

import base64
import hashlib
import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bs4 import BeautifulSoup
from hypothesis import given
from hypothesis import strategies as st

from cmdlab.errors import InputError
from cmdlab.evaluation import compare, compare_by_seed, holm
from cmdlab.evaluation.ranks import RankTable
from cmdlab.reporting import write_report
from cmdlab.reporting.numbers import p_value
from cmdlab.reporting.study import read_study, wilson
from cmdlab.reporting.users import SCRIPT

HOSTILE = "<script>alert(1)</script> & \"quoted\" 'text' $x^{2}$ {{ 7 * 7 }}"
ELEMENTS = [
    "The claim",
    "Retrieval results",
    "Paired differences",
    "Dose–response of each axis",
    "Learning curves",
    "Cost",
    "Fine alignment",
    "What it means for a user",
    "Examples and worst failures",
    "Word × patch maps",
    "Limits and intended use",
    "Provenance and records",
]


def read(path: Path) -> BeautifulSoup:
    return BeautifulSoup(path.read_text(encoding="utf-8"), "html.parser")


def text_of(page: BeautifulSoup, identifier: str) -> str:
    found = page.find(id=identifier)
    assert found is not None
    return " ".join(found.get_text(" ").split())


def row(page: BeautifulSoup, table: str, name: str) -> list[Any]:
    block = page.find(id=table)
    assert block is not None
    for line in block.find("tbody").find_all("tr"):
        if line.find("th").get_text().startswith(name):
            return line.find_all("td")
    raise AssertionError(f"no row {name} in {table}")


@pytest.fixture(scope="module")
def runs(make_study, tmp_path_factory) -> Path:
    return make_study(
        tmp_path_factory.mktemp("runs"),
        axes={"rate": [0.1, 0.3, 0.5], "corruption": ["swap", "mask"]},
        effects={"cmd-image": 0.5, "cmd-image, rate=0.5": -0.7},
        failed=(("cmd-image, rate=0.1", 2),),
        missing=(("cmd-image, rate=0.1", 3), ("cmd-image, corruption=mask", 3)),
    )


@pytest.fixture(scope="module")
def report(runs, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("report") / "report.html"
    write_report([runs], output)
    return output


@pytest.fixture(scope="module")
def page(report) -> BeautifulSoup:
    return read(report)


ARMS = {"contrastive": {"weight": 0.0}, "cmd-image": {}, "matching": {}, "dense": {}}
FLOPS = {"contrastive": 5e5, "cmd-image": 5e5, "matching": 1e8, "dense": 2e8}


def test_accuracy_is_weighed_against_what_a_query_costs(make_study, tmp_path):
    runs = make_study(
        tmp_path / "runs", arms=ARMS, query_flops=FLOPS, effects={"dense": 0.6}, examples=False
    )
    write_report([runs], tmp_path / "report.html")
    page = read(tmp_path / "report.html")
    table = page.find(id="retrieval-cost-table")
    named = [line.find("th").get_text() for line in table.find("tbody").find_all("tr")]
    assert [name.removesuffix(" †") for name in named] == list(ARMS)  # cheapest first
    for arm, times in (("contrastive", "1"), ("cmd-image", "1"), ("matching", "200")):
        assert row(page, "retrieval-cost-table", arm)[2].get_text() == times
    assert row(page, "retrieval-cost-table", "dense")[1].get_text() == "200 M"
    panels = page.find(id="retrieval-cost-figure").find_all("svg")
    assert [panel.title.get_text() for panel in panels] == [
        "Mean R@1 against FLOPs a query",
        "Mean R@1 against milliseconds a query",
    ]
    for arm in ARMS:
        mean = row(page, "retrieval-cost-table", arm)[0].find(string=True)
        assert f"{arm}: {mean} at " in panels[0].desc.get_text()
        assert any(text.get_text() == arm for text in panels[0].find_all("text"))


@pytest.mark.parametrize(
    "flops",
    [None, dict.fromkeys(ARMS, 5e5), {"contrastive": 5e5}],
    ids=["older records", "all alike", "one arm that tells"],
)
def test_where_there_is_nothing_to_weigh_no_such_figure_is_drawn(make_study, tmp_path, flops):
    runs = make_study(tmp_path / "runs", arms=ARMS, query_flops=flops, examples=False)
    write_report([runs], tmp_path / "report.html")
    page = read(tmp_path / "report.html")
    assert page.find(id="retrieval-cost-figure") is None
    assert page.find(id="cost-table") is not None


def test_arms_of_older_records_are_left_out_of_the_costs(make_study, tmp_path):
    flops = {"cmd-image": 5e5, "dense": 2e8}
    runs = make_study(tmp_path / "runs", arms=ARMS, query_flops=flops, examples=False)
    write_report([runs], tmp_path / "report.html")
    table = read(tmp_path / "report.html").find(id="retrieval-cost-table")
    named = [line.find("th").get_text() for line in table.find("tbody").find_all("tr")]
    assert [name.removesuffix(" †") for name in named] == ["cmd-image", "dense"]


def test_the_eleven_elements_stand_in_order_and_in_the_contents(page):
    headings = [section.h2.get_text() for section in page.main.find_all("section")]
    assert [re.sub(r"^\d+ ", "", heading) for heading in headings] == ELEMENTS
    assert [link.get_text() for link in page.nav.find_all("a")] == ELEMENTS


def test_every_link_leads_somewhere_and_every_id_is_unique(page):
    ids = [element["id"] for element in page.find_all(id=True)]
    assert len(ids) == len(set(ids))
    targets = {link["href"] for link in page.find_all("a")}
    targets |= {use["href"] for use in page.find_all("use")}
    assert targets <= {f"#{one}" for one in ids}
    named = " ".join(one["aria-labelledby"] for one in page.find_all(attrs={"aria-labelledby": 1}))
    assert set(named.split()) <= set(ids)


def test_tables_and_figures_are_named_for_every_reader(page):
    tables, figures = page.find_all("table"), page.find_all("figure")
    assert len(tables) >= 7
    assert len(figures) >= 5
    for table in tables:
        assert table.caption.get_text().strip()
        assert all(head.has_attr("scope") for head in table.find_all("th"))
        widths = {
            sum(int(cell.get("colspan", 1)) for cell in line.find_all(["td", "th"]))
            for line in table.tbody.find_all("tr")
        }
        assert len(widths) == 1
    for figure in figures:
        assert figure.figcaption.get_text().strip()
        for svg in figure.find_all("svg"):
            assert svg["role"] == "img"
            assert svg.title.get_text().strip()
            assert svg.desc.get_text().strip()


def test_a_row_gives_the_mean_of_the_records_that_it_names(page, runs):
    records = {
        path.parent.name: json.loads(path.read_text()) for path in runs.glob("*/record.json")
    }
    for arm in ("contrastive", "cmd-image †", "cmd-image, rate=0.5"):
        cells = row(page, "results-table", arm)
        named = [link["href"].removeprefix("#record-") for link in cells[-1].find_all("a")]
        found = [records[one]["metrics"]["test"] for one in named]
        assert {records[one]["arm"] for one in named} == {arm.removesuffix(" †")}
        assert [records[one]["seed"] for one in named] == [1, 2, 3]
        expected = [
            np.mean([one["mean_R@1"] for one in found]),
            *(np.mean([one["speech_to_image"][f"R@{k}"] for one in found]) for k in (1, 5, 10)),
            np.mean([one["speech_to_image"]["median_rank"] for one in found]),
        ]
        shown = [float(next(cell.stripped_strings)) for cell in cells[:5]]
        assert shown == pytest.approx(expected, abs=0.0501)


def test_the_appendix_lists_every_record(page, runs):
    finished = [
        path.parent.name
        for path in runs.glob("*/record.json")
        if json.loads(path.read_text())["status"] == "ok"
    ]
    listed = [line["id"] for line in page.find(id="records").tbody.find_all("tr")]
    assert sorted(listed) == sorted(f"record-{one}" for one in finished)


def test_both_ceilings_and_the_gallery_are_shown(page):
    ceiling = row(page, "results-table", "All-knowing")
    assert [cell.get_text() for cell in ceiling[:4]] == ["93.6", "91.2", "99.8", "100.0"]
    assert row(page, "results-table", "Text ceiling")[0].get_text() == "56.3"
    assert "gallery of 60" in text_of(page, "results-table")
    assert "52.5 %" in text_of(page, "results")


def test_the_claim_names_what_got_worse_and_what_was_lost(page):
    claim = text_of(page, "claim")
    assert "Asked: Does Cross-Modal Denoising" in claim
    assert "became worse with cmd-image, rate=0.5" in claim
    assert "1 cell failed and 2 cells never ran" in claim
    assert "Not every arm has 5 seeds" in claim
    limits = text_of(page, "limits")
    assert "Of 15 cells 12 finished, 1 failed and 2 are missing." in limits
    assert "FloatingPointError: the loss is NaN" in limits


@pytest.mark.parametrize(
    ("effect", "words", "verdict"),
    [
        (0.6, "It is separated from zero.", "above"),
        (-0.6, "became worse with cmd-image", "below"),
        (0.0, "points would be found in about 80 % of the cases", "not separated"),
    ],
)
def test_the_claim_follows_the_sign_of_what_was_found(make_study, tmp_path, effect, words, verdict):
    make_study(tmp_path / "runs", effects={"cmd-image": effect}, examples=False)
    write_report([tmp_path / "runs"], tmp_path / "report.html")
    page = read(tmp_path / "report.html")
    cells = row(page, "differences-table", "cmd-image")
    assert words in text_of(page, "claim")
    assert cells[4].get_text() == verdict
    difference = cells[0].get_text()
    assert f"the difference is {difference} points" in text_of(page, "claim")
    assert not (effect < 0) or difference.startswith("−")


def test_arms_whose_names_hold_commas_are_listed_apart(make_study, tmp_path):
    arms = {"contrastive": {"weight": 0.0}}
    arms |= {f"cmd-image, rate={rate}": {"rate": rate} for rate in (0.3, 0.5, 0.7)}
    runs = make_study(tmp_path / "runs", arms=arms, effects=dict.fromkeys(arms, 0), examples=False)
    write_report([runs], tmp_path / "report.html")
    claim = read(tmp_path / "report.html").find(id="claim").get_text()
    listed = "cmd-image, rate=0.3; cmd-image, rate=0.5; and cmd-image, rate=0.7;"
    assert f"not separated from zero for {listed}" in claim


def test_only_planned_comparisons_share_the_planned_family(make_study, tmp_path):
    arms = {"contrastive": {"weight": 0.0}, "cmd-image": {}, "cmd-both": {"direction": "both"}}
    runs = make_study(
        tmp_path / "runs", arms=arms, listing={"planned": ["cmd-image"]}, examples=False
    )
    write_report([runs], tmp_path / "report.html")
    page = read(tmp_path / "report.html")
    for arm, kind in (("cmd-image", "planned"), ("cmd-both", "exploratory")):
        cells = row(page, "differences-table", arm)
        assert kind in cells[0].parent.th.get_text()
        assert cells[2].get_text() == cells[3].get_text()  # a family of one needs no correction


def test_arms_are_compared_in_the_pairs_that_the_sweep_asks_for(make_study, tmp_path):
    """By mean R@1 and the foil test, corrected together within a family."""
    arms = {"contrastive": {"weight": 0.0}, "cmd-image": {}, "cmd-both": {"direction": "both"}}
    asked = [["cmd-image", "contrastive"], ["cmd-both", "cmd-image"]]
    runs = make_study(
        *(tmp_path / "runs",),
        **{"arms": arms, "effects": {"cmd-image": 0.4, "cmd-both": 0.5}, "examples": False},
        listing={"pairs": {"As planned": asked, "Controls": asked[1:]}},
    )
    write_report([runs], tmp_path / "report.html")
    page, study = read(tmp_path / "report.html"), read_study([runs])
    rows = {
        line.th.get_text(): [cell.get_text(" ") for cell in line.find_all("td")]
        for line in page.find(id="pairs-as-planned-table").tbody.find_all("tr")
    }
    assert list(rows) == ["cmd-image minus contrastive", "cmd-both minus cmd-image"]
    listed = row(page, "differences-table", "cmd-image")
    assert rows["cmd-image minus contrastive"][0].split()[0] == listed[0].get_text()
    expected = []
    for arm, other in asked:
        pairs = study.paired(arm, other)
        by_recall = compare([a.ranks for a, _ in pairs], [b.ranks for _, b in pairs], "mean_R@1")
        foils = [[run.record["alignment"]["foil"]["wins"] for run in p] for p in pairs]
        expected += [by_recall.p_value, compare_by_seed(*zip(*foils, strict=True)).p_value]
    shown = [cell for cells in rows.values() for cell in (cells[2], cells[6])]
    assert shown == [p_value(one) for one in holm(expected)]
    alone = page.find(id="pairs-controls-table").tbody.find_all("tr")
    assert [line.th.get_text() for line in alone] == ["cmd-both minus cmd-image"]


@pytest.mark.parametrize(("effect", "is_denoising"), [(0.4, False), (2.0, True)])
def test_a_gain_that_needs_no_corruption_is_not_called_denoising(
    make_study, tmp_path, effect, is_denoising
):
    arms = {"contrastive": {"weight": 0.0}, "cmd": {}, "no-corruption": {"corruption": "none"}}
    runs = make_study(
        *(tmp_path / "runs",),
        **{"arms": arms, "effects": {"cmd": effect, "no-corruption": 0.4}, "examples": False},
        listing={"pairs": {"As planned": [["cmd", "contrastive"], ["cmd", "no-corruption"]]}},
    )
    write_report([runs], tmp_path / "report.html")
    page = read(tmp_path / "report.html")
    told = text_of(page, "claim")
    assert ("no gain of cmd is shown to be denoising's" in told) != is_denoising
    cells = row(page, "pairs-as-planned-table", "cmd minus contrastive")
    stated = cells[2].get_text() if cells[2].get_text()[0] == "<" else f"= {cells[2].get_text()}"
    for part in told.split("As planned:"):  # one p for one comparison, wherever it is told
        assert f"Holm-adjusted p {stated}" in part
    control = row(page, "pairs-as-planned-table", "cmd minus no-corruption")
    assert f"cmd minus no-corruption : {control[0].contents[0]} points of mean R@1" in told


def test_arms_of_other_data_are_compared_in_their_pairs_alone(make_study, tmp_path):
    """And many pairs are counted in the claim, with a sentence for those that are separated."""
    data = {"": {}} | {f", {n} pictures": {"images": n} for n in (10, 20, 30, 40)}
    arms = {f"cmd{name}": own for name, own in data.items()}
    arms |= {f"contrastive{name}": own | {"weight": 0.0} for name, own in data.items()}
    pairs = [[f"cmd{name}", f"contrastive{name}"] for name in data]
    runs = make_study(
        *(tmp_path / "runs",),
        **{"arms": arms, "effects": {"cmd, 20 pictures": 1.5}, "examples": False},
        listing={"pairs": {"Regimes": pairs}},
    )
    write_report([runs], tmp_path / "report.html")
    page = read(tmp_path / "report.html")
    rows = page.find(id="differences-table").tbody.find_all("tr")
    assert [line.th.contents[0] for line in rows] == ["cmd †"]
    told = text_of(page, "claim")
    assert "Of 5 pairs 1 came out above zero, none below, and 4 not separated from it." in told
    assert "cmd, 20 pictures minus contrastive, 20 pictures :" in told
    assert "cmd, 10 pictures minus" not in told
    drawn = str(page.find(id="pairs-regimes-figure"))
    in_table = page.find(id="pairs-regimes-table").tbody.find_all("tr")
    for line, (arm, other) in zip(in_table, pairs, strict=True):
        assert line.th.get_text() == f"{arm} minus {other}"
        assert f"{arm} minus {other}: " in drawn
        assert " s" in row(page, "users-table", arm)[3].get_text()
        assert row(page, "users-table", other)[3].get_text() == ""
    study = read_study([runs])
    assert study.rival("cmd, 20 pictures") == "contrastive, 20 pictures"
    assert "against contrastive, or the second arm of its own pair" in text_of(page, "users")


def test_a_pair_that_cannot_be_compared_says_why(make_study, tmp_path):
    """One seed alone gives no foil test; two arms that share no seed give nothing."""
    arms = {"contrastive": {"weight": 0.0}, "cmd-image": {}, "cmd-both": {"direction": "both"}}
    runs = make_study(
        *(tmp_path / "runs",),
        **{"arms": arms, "seeds": (1, 2), "examples": False},
        missing=(("cmd-image", 2), ("cmd-both", 1)),
        listing={"pairs": {"Asked": [["cmd-image", "contrastive"], ["cmd-image", "cmd-both"]]}},
    )
    write_report([runs], tmp_path / "report.html")
    page = read(tmp_path / "report.html")
    first = [c.get_text() for c in row(page, "pairs-asked-table", "cmd-image minus contrastive")]
    assert first[0] != "–"
    assert first[4:8] == ["–"] * 4
    second = [c.get_text() for c in row(page, "pairs-asked-table", "cmd-image minus cmd-both")]
    assert second == [*["–"] * 8, "not compared: no seed in common with the other arm"]


def test_a_ceiling_is_shown_last_and_compared_with_none(make_study, tmp_path):
    arms = {"contrastive": {"weight": 0.0}, "perfect-hearing": {"rate": 0.5}, "cmd-image": {}}
    runs = make_study(
        *(tmp_path / "runs",),
        **{"arms": arms, "listing": {"ceilings": ["perfect-hearing"]}, "examples": False},
    )
    write_report([runs], tmp_path / "report.html")
    page = read(tmp_path / "report.html")
    names = [line.th.get_text() for line in page.find(id="results-table").tbody.find_all("tr")]
    assert names[:3] == ["contrastive", "cmd-image †", "perfect-hearing (ceiling)"]
    assert "perfect-hearing" not in page.find(id="differences").get_text()
    assert "perfect-hearing" not in text_of(page, "claim")
    assert "1 arm is compared" in text_of(page, "claim")


def test_what_restoring_draws_from_the_other_side_is_told_where_a_record_holds_it(
    make_study, tmp_path, page
):
    assert page.find(id="restoring") is None  # records of before it was measured
    curve = [
        {"step": step, "loss": 2.0, "contrastive": 1.0, "denoising": 1.0, "temperature": 0.1}
        | {"validation_mean_R@1": 10.0 * step, "gradient_cosine": cosine}
        for step, cosine in ((1, 0.25), (2, None), (3, -0.125))
    ]
    runs = make_study(
        tmp_path / "runs",
        record={"restoration": {"own": 0.5, "other": 0.625}, "learning_curve": curve},
        examples=False,
    )
    write_report([runs], tmp_path / "report.html")
    cells = row(read(tmp_path / "report.html"), "restoring-table", "cmd-image")
    assert [cell.find(string=True) for cell in cells[:5]] == [
        *("0.500", "0.625", "0.125"),
        *("0.25", "−0.12"),
    ]


@pytest.mark.parametrize(
    ("last", "told"),
    [
        (40.4, "changed by +0.4 points: it had converged."),
        (40.6, "changed by +0.6 points: it still climbs, so this tells who learns sooner"),
        (39.0, "changed by −1.0 points: it had converged."),
    ],
)
def test_whether_the_baseline_had_converged_is_said(make_study, tmp_path, last, told):
    curve = [
        {"step": step, "loss": 2.0, "contrastive": 1.0, "denoising": None, "temperature": 0.1}
        | {"validation_mean_R@1": value}
        for step, value in ((50, 30.0), (100, 40.0), (120, 50.0), (125, None), (150, last))
    ]
    runs = make_study(tmp_path / "runs", record={"learning_curve": curve}, examples=False)
    write_report([runs], tmp_path / "report.html")
    assert told in text_of(read(tmp_path / "report.html"), "results")


def test_arms_are_compared_at_equal_cost_where_the_records_tell_the_seconds(
    make_study, tmp_path, page
):
    assert page.find(id="time-figure") is None  # records of before they were kept
    assert "FLOPs" not in [head.get_text() for head in page.select("#cost-table th")][2:4]
    curve = [
        {"step": step, "loss": 2.0, "contrastive": 1.0, "denoising": None, "temperature": 0.1}
        | {"validation_mean_R@1": 10.0 * step}
        for step in (1, 2, 3)
    ]
    runs = make_study(tmp_path / "runs", record={"learning_curve": curve}, examples=False)
    for path in runs.glob("*/record.json"):
        record = json.loads(path.read_text())
        seconds = [{"step": step, "seconds": 70.0 * step} for step in (1, 2, 3)]
        record["cost"]["training_seconds_at"] = seconds
        path.write_text(json.dumps(record))
    write_report([runs], tmp_path / "report.html")
    figure = read(tmp_path / "report.html").find(id="time-figure")
    assert "cmd-image ends at 30.0 % after 210 s" in figure.svg.desc.get_text()


def test_the_axes_are_the_sweeps_own(page):
    lines = page.find(id="axes-table").tbody.find_all("tr")
    shown = [(line.th.get_text(), line.td.get_text()) for line in lines]
    assert shown == [
        ("rate", "0.1"),
        ("rate", "0.3"),
        ("rate", "0.5"),
        ("corruption", "swap"),
        ("corruption", "mask"),
        ("weight", "0.0"),
        ("weight", "1.0"),
    ]


def test_what_the_frozen_text_encoder_tells_apart_stands_below_the_arms(page):
    cells = row(page, "alignment-table", "Text ceiling")
    assert [cell.find(string=True) for cell in cells[3:7]] == ["53.0", "50.0", "0.2", "400"]
    assert page.find(id="alignment-table").find_all("tbody")[-1].find_all("tr")[-1]["class"]


def test_the_core_hours_are_each_run_times_its_threads(make_study, tmp_path):
    arms = {"contrastive": {"weight": 0.0}, "cmd-image": {}}
    runs = make_study(tmp_path / "runs", arms=arms, examples=False)
    for path in runs.glob("*/record.json"):
        record = json.loads(path.read_text())
        record["determinism"]["threads"] = 4
        record["wall_seconds"] = 900.0
        path.write_text(json.dumps(record))
    write_report([runs], tmp_path / "report.html")
    assert "took at most 6 core-hours together" in text_of(
        read(tmp_path / "report.html"), "provenance"
    )


def test_the_same_records_give_the_same_bytes(runs, report, tmp_path):
    write_report([runs], tmp_path / "again.html")
    assert (tmp_path / "again.html").read_bytes() == report.read_bytes()


def test_what_is_not_measured_is_said_to_be_so(make_study, tmp_path):
    curve = [
        {
            "step": 0,
            "loss": 1.0,
            "contrastive": 1.0,
            "denoising": None,
            "temperature": None,
            "validation_mean_R@1": None,
        }
    ]
    nothing = {"alignment": None, "ceiling": None, "text_ceiling": None, "learning_curve": curve}
    make_study(tmp_path / "runs", record=nothing, examples=False, seeds=(1,))
    write_report([tmp_path / "runs"], tmp_path / "report.html")
    page = read(tmp_path / "report.html")
    assert "Not measured" in text_of(page, "alignment")
    assert "ceiling was not measured" in text_of(page, "results")
    assert row(page, "results-table", "All-knowing")[0].get_text() == "not measured"
    assert "No validation result was recorded" in text_of(page, "curves")
    assert "No examples were recorded" in text_of(page, "examples")
    assert "No maps" in text_of(page, "maps")
    assert "varies no axis" in text_of(page, "axes")


def test_a_sweep_without_denoising_asks_what_its_title_asks(make_study, tmp_path):
    arms = {"contrastive": {"weight": 0.0}, "fewer": {"weight": 0.0, "images": 9}}
    make_study(tmp_path / "runs", arms=arms, examples=False)
    write_report([tmp_path / "runs"], tmp_path / "report.html", title="How many <b> pictures?")
    claim = read(tmp_path / "report.html").find(class_="claim").get_text()
    assert "Asked: How many <b> pictures? 1 arm is compared" in " ".join(claim.split())


def test_a_user_is_told_of_pictures_looked_at_a_screen_and_time(make_study, tmp_path):
    """Of 60 images the arm brings the right one nearer to the top, the same for every seed."""
    runs = make_study(tmp_path / "runs", effects={"cmd-image": 0.5})
    write_report([runs], tmp_path / "report.html")
    page = read(tmp_path / "report.html")
    rows = {row.th.get_text(): row.find_all("td") for row in page.select("#users-table tbody tr")}
    baseline, arm = rows["contrastive"], rows["cmd-image †"]
    study = read_study([runs])
    for cells, name in ((baseline, "contrastive"), (arm, "cmd-image")):
        ranks = np.concatenate([r.ranks.ranks("speech_to_image") for r in study.of(name)])
        assert cells[0].get_text().startswith(f"{100 * np.mean(ranks <= 12):.1f} %")
        assert cells[1].get_text().startswith(f"{ranks.mean():.1f}")
        assert cells[2].get_text() == f"{ranks.mean():.1f} s"
        [given] = [one for one in _given(page) if one["mean"] == pytest.approx(ranks.mean())]
        assert given["queries"] == len(ranks)
    assert baseline[3].get_text() == ""
    saved = float(arm[3].get_text().split(" s")[0].removeprefix("+"))
    shown = float(baseline[1].contents[0]) - float(arm[1].contents[0])
    assert saved == pytest.approx(shown, abs=0.11)
    assert "no order takes 30.5 pictures" in page.select_one("#users").get_text()


def _given(page) -> list[dict[str, float]]:
    """What the form computes from, of each arm: queries, and their mean rank."""
    arms = json.loads(page.select_one("#users-form")["data-arms"])
    pairs = [np.array(arm["ahead"]) for arm in arms]
    return [
        {"queries": of[:, 1].sum(), "mean": 1 + np.average(of[:, 0], weights=of[:, 1])}
        for of in pairs
    ]


def test_words_kept_out_of_training_are_told_of_apart(make_study, tmp_path):
    new_words = {"new": {"R@1": 12.5, "captions": 16}, "known": {"R@1": 40.0, "captions": 84}}
    arms = {"contrastive": {"weight": 0.0, "without_words": "red <b>"}, "cmd-image": {}}
    runs = make_study(tmp_path / "runs", arms=arms, record={"new_words": new_words}, examples=False)
    write_report([runs], tmp_path / "report.html")
    page = read(tmp_path / "report.html")
    assert "were left out: red <b>." in text_of(page, "words")
    assert [cell.get_text() for cell in row(page, "words-table", "contrastive")][:6] == [
        *("12.5", "–", "16"),
        *("40.0", "–", "84"),
    ]
    assert row(page, "words-table", "cmd-image")[1].get_text() == "0.00.0 to 0.0"
    runs = make_study(tmp_path / "none", examples=False)
    write_report([runs], tmp_path / "report.html")
    assert read(tmp_path / "report.html").find(id="words") is None


def test_text_of_a_data_set_is_never_markup(make_study, tmp_path):
    arms = {"contrastive": {"weight": 0.0}, HOSTILE: {"direction": HOSTILE}}
    make_study(tmp_path / "runs", arms=arms, text=HOSTILE, title=HOSTILE, seeds=(1,))
    write_report([tmp_path / "runs"], tmp_path / "report.html")
    source = (tmp_path / "report.html").read_text(encoding="utf-8")
    page = read(tmp_path / "report.html")
    assert [script.get_text() for script in page.find_all("script")] == [SCRIPT]
    assert source.count("<script") == 1
    assert page.h1.get_text() == HOSTILE
    assert HOSTILE in text_of(page, "examples")
    assert HOSTILE in page.find("audio")["aria-label"]
    assert HOSTILE in text_of(page, "records")
    assert not [name for tag in page.find_all(True) for name in tag.attrs if name.startswith("on")]


def test_nothing_on_the_page_can_leave_it(page, report):
    for tag in page.find_all(True):
        for name in ("src", "href", "xlink:href", "srcset", "action", "poster"):
            assert str(tag.get(name, "#")).startswith(("#", "data:"))
    policy = page.find("meta", attrs={"http-equiv": "Content-Security-Policy"})["content"]
    hashed = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    allowed = f"default-src 'none'; script-src 'sha256-{hashed}'; style-src 'unsafe-inline'"
    assert policy.startswith(allowed)
    assert "@import" not in page.style.get_text()
    assert "url(" not in page.style.get_text()
    assert report.stat().st_size < 5_000_000


def test_the_right_image_is_marked_in_words(page):
    marked = page.select("#examples .query li.right")
    assert marked
    assert all("the right one" in one.get_text() for one in marked)
    assert all(one.img["alt"].startswith("The right image") for one in marked)
    lost = [one for one in page.select("#examples .query") if not one.select("li.right")]
    assert lost
    assert all("not among these five" in one.get_text() for one in lost)


def test_at_most_sixteen_clips(make_study, tmp_path):
    runs = make_study(tmp_path / "runs", seeds=(1,))
    for path in runs.glob("*/examples.json"):
        recorded = json.loads(path.read_text())
        recorded["queries"] *= 4
        path.write_text(json.dumps(recorded))
    write_report([runs], tmp_path / "report.html")
    page = read(tmp_path / "report.html")
    assert len(page.find_all("audio")) == 16
    assert "8 recorded queries do not fit here" in text_of(page, "examples")


def outside(folder: Path) -> str:
    (folder.parent / "secret.png").write_bytes((folder / "examples" / "scene-0.png").read_bytes())
    return "../secret.png"


def a_link(folder: Path) -> str:
    (folder / "examples" / "link.png").symlink_to("/etc/hostname")
    return "examples/link.png"


def svg(folder: Path) -> str:
    (folder / "examples" / "image.png").write_text("<svg onload='alert(1)'/>")
    return "examples/image.png"


def nothing_there(folder: Path) -> str:
    return "examples/absent.png"


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (outside, "outside the run's folder"),
        (a_link, "outside the run's folder"),
        (svg, "is no PNG"),
        (nothing_there, "cannot be read"),
    ],
)
def test_a_media_file_that_is_not_its_own_is_refused(make_study, tmp_path, make, words):
    runs = make_study(tmp_path / "runs", seeds=(1,))
    for path in runs.glob("*/examples.json"):
        recorded = json.loads(path.read_text())
        recorded["queries"][0]["top"][0]["file"] = make(path.parent)
        path.write_text(json.dumps(recorded))
    former = tmp_path / "report.html"
    former.write_text("the former report")
    with pytest.raises(InputError, match=words):
        write_report([runs], former)
    assert former.read_text() == "the former report"
    assert [path.name for path in tmp_path.iterdir() if path.suffix == ".part"] == []


@pytest.mark.parametrize(
    ("content", "words"),
    [(b"RIFF0000WAVEfmt ", "is no mp3"), (b"ID3" + bytes(100), "cannot be decoded")],
)
def test_a_clip_that_is_no_mp3_is_refused(make_study, tmp_path, content, words):
    runs = make_study(tmp_path / "runs", seeds=(1,))
    for path in runs.glob("*/examples/clip.mp3"):
        path.write_bytes(content)
    with pytest.raises(InputError, match=words):
        write_report([runs], tmp_path / "report.html")


def test_ranks_that_contradict_their_record_are_refused(make_study, tmp_path):
    runs = make_study(tmp_path / "runs", seeds=(1,), examples=False)
    path = sorted(runs.glob("*/ranks.npz"))[0]
    ranks = RankTable.load(path)
    ranks.speech_greater[:] = 0
    ranks.save(path)
    with pytest.raises(InputError, match=r"record\.json: metrics/test/mean_R@1"):
        write_report([runs], tmp_path / "report.html")


def test_a_study_without_its_baseline_is_refused(make_study, tmp_path):
    runs = make_study(tmp_path / "runs", seeds=(1,), missing=(("contrastive", 1),), examples=False)
    with pytest.raises(InputError, match="no finished run of the baseline, contrastive"):
        write_report([runs], tmp_path / "report.html")


def test_a_page_too_large_is_refused(runs, tmp_path):
    with pytest.raises(InputError, match="too many"):
        write_report([runs], tmp_path / "report.html", title="x" * 5_000_000)
    assert not (tmp_path / "report.html").exists()


def test_wilson_interval_known_by_hand():
    low, high = wilson(10, 20)
    assert (low, high) == (pytest.approx(0.2993, abs=1e-4), pytest.approx(0.7007, abs=1e-4))


@given(st.integers(1, 10_000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_interval_holds_the_proportion_and_stays_within_bounds(counts):
    hits, trials = counts
    low, high = wilson(hits, trials)
    assert 0 <= low <= high <= 1
    assert low <= hits / trials + 1e-12
    assert high >= hits / trials - 1e-12
    assert math.isclose(low, 1 - wilson(trials - hits, trials)[1], abs_tol=1e-9)

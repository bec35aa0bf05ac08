"""The section on voices: the right rates, the right worst one, and nothing where none were kept."""

import json
from pathlib import Path

import numpy as np
import pytest
from bs4 import BeautifulSoup

from cmdlab.errors import InputError
from cmdlab.evaluation import RankTable, Voices, interval
from cmdlab.reporting import publish, write_report
from cmdlab.reporting.numbers import number

HOSTILE = "<b>Zoë</b> & {{ 7 * 7 }}"
# 120 captions of 60 images: a voice of 50, two of 30, and one of 10, too few to be told of.
SPEAKERS = ["al"] * 50 + [HOSTILE] * 30 + ["cy"] * 30 + ["di"] * 10
VOICES = Voices.of(SPEAKERS, ["al", "cy"])


def read(path: Path) -> BeautifulSoup:
    return BeautifulSoup(path.read_text(encoding="utf-8"), "html.parser")


def rows(page: BeautifulSoup, table: str) -> list[list[str]]:
    lines = page.find(id=table).find("tbody").find_all("tr")
    return [[cell.get_text(" ") for cell in line.find_all(["th", "td"])] for line in lines]


def ranks_of(runs: Path, arm: str) -> list[RankTable]:
    records = [json.loads(path.read_text()) for path in runs.glob("*/record.json")]
    found = sorted((one["seed"], one["id"]) for one in records if one["arm"] == arm)
    return [RankTable.load(runs / name / "ranks.npz") for _, name in found]


@pytest.fixture(scope="module")
def runs(make_study, tmp_path_factory) -> Path:
    return make_study(tmp_path_factory.mktemp("runs"), examples=False, voices=VOICES)


@pytest.fixture(scope="module")
def page(runs, tmp_path_factory) -> BeautifulSoup:
    output = tmp_path_factory.mktemp("page") / "report.html"
    write_report([runs], output)
    return read(output)


@pytest.mark.parametrize("arm", ["contrastive", "cmd-image"])
def test_heard_and_unheard_voices_are_told_apart(runs, page, arm):
    tables = ranks_of(runs, arm)
    [line] = [line for line in rows(page, "voices-table") if line[0].startswith(arm)]
    for place, names in ((1, {"al", "cy"}), (4, {HOSTILE, "di"})):
        captions = np.array([name in names for name in SPEAKERS])
        rate = np.mean([table.ranks("speech_to_image")[captions] == 1 for table in tables])
        found = interval(tables, "speech_to_image/R@1", captions=captions)
        assert line[place].split()[0] == number(100 * rate)
        assert line[place].split()[1] == f"{number(found.low)}–{number(found.high)}"
        assert line[place + 1 : place + 3] == ["2", str(captions.sum())]


def test_the_worst_voice_is_named_and_its_name_is_text(runs, page):
    tables = ranks_of(runs, "cmd-image")
    rates = {
        name: 100
        * np.mean(
            [table.ranks("speech_to_image")[np.array(SPEAKERS) == name] == 1 for table in tables]
        )
        for name in ("al", HOSTILE, "cy")
    }
    worst = min(rates, key=rates.get)
    told = " ".join(page.find(id="voices").find("p").get_text().split())
    kind = "heard" if worst in ("al", "cy") else "not heard"
    assert f"The worst voice with cmd-image is {worst} ({kind}): {number(rates[worst])} %" in told
    listed = rows(page, "voice-table")
    assert [line[1] for line in listed] == ["heard", "heard", "not heard"]
    assert {line[0]: line[3].split()[0] for line in listed} == {
        name: number(rate) for name, rate in rates.items()
    }
    assert rates[listed[0][0]] <= rates[listed[1][0]]
    assert "1 voices are not listed" in page.find(id="voice-table").get_text()
    assert page.find(id="voices").find("td").find("b") is None


def test_of_many_voices_the_worst_and_the_best_are_listed(make_study, tmp_path):
    speakers = [f"s{i % 25:02d}" for i in range(600)]
    runs = make_study(
        tmp_path / "runs",
        images=300,
        seeds=(1,),
        examples=False,
        voices=Voices.of(speakers, speakers),
    )
    write_report([runs], tmp_path / "report.html")
    [table] = ranks_of(runs, "cmd-image")
    hits = (table.ranks("speech_to_image") == 1).reshape(-1, 25).mean(0)
    listed = rows(read(tmp_path / "report.html"), "voice-table")
    expected = np.sort(100 * hits)[[0, 1, 2, 3, 4, -5, -4, -3, -2, -1]]
    assert [line[3].split()[0] for line in listed] == [number(rate) for rate in expected]


def test_voices_of_few_captions_are_counted_and_not_named(make_study, tmp_path):
    voices = Voices.of([f"s{i}" for i in range(120)], ["s0"])
    runs = make_study(tmp_path / "runs", seeds=(1,), examples=False, voices=voices)
    write_report([runs], tmp_path / "report.html")
    page = read(tmp_path / "report.html")
    assert "No voice has as many as 20 captions" in page.find(id="voices").get_text()
    assert page.find(id="voice-table") is None
    [line] = [line for line in rows(page, "voices-table") if line[0] == "contrastive"]
    assert line[1:4] == ["–", "1", "1"]  # one caption has no interval
    assert line[5:9] == ["119", "119", "–", "–"]


def test_without_voices_the_report_is_as_it_was(make_study, runs, page, tmp_path):
    old = make_study(tmp_path / "runs", examples=False)
    write_report([old], tmp_path / "report.html")
    before = read(tmp_path / "report.html")
    assert before.find(id="voices") is None
    page = BeautifulSoup(str(page), "html.parser")
    page.find(id="voices").decompose()
    tables = [
        [rows(one, t["id"]) for t in one.find_all(class_="table-block")] for one in (before, page)
    ]
    assert tables[0] == tables[1]


def test_voices_are_published(runs, tmp_path):
    write_report([runs], tmp_path / "before.html")
    publish([runs], tmp_path / "kept", tmp_path / "after.html")
    assert (tmp_path / "after.html").read_bytes() == (tmp_path / "before.html").read_bytes()
    assert len(list((tmp_path / "kept").glob("*/voices.npz"))) == 6


@pytest.mark.parametrize(
    ("other", "reason"),
    [
        (Voices.of(SPEAKERS[1:], []), "of_caption has 119 captions, but ranks.npz 120"),
        (Voices.of(SPEAKERS, ["al"]), "has other voices than"),
    ],
)
def test_voices_that_contradict_are_refused(make_study, tmp_path, other, reason):
    runs = make_study(tmp_path / "runs", examples=False, voices=VOICES)
    other.save(next(runs.glob("*/voices.npz")))
    with pytest.raises(InputError, match=rf"voices\.npz: {reason}"):
        write_report([runs], tmp_path / "report.html")

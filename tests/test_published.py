"""What is published: every number of README and reports/ comes from a record in the repository."""

import hashlib
import json
import re
from pathlib import Path

import pytest
from bs4 import BeautifulSoup

from cmdlab.encoders import Encoder, weights_of
from cmdlab.encoders.tiny import WEIGHTS
from cmdlab.evaluation import compare
from cmdlab.records import load_records
from cmdlab.reporting import write_kernel_report, write_report
from cmdlab.reporting.numbers import number, signed
from cmdlab.reporting.pairs import compare_pairs
from cmdlab.reporting.study import read_study
from cmdlab.sweeps.files import read_sweep
from cmdlab.sweeps.notebooks import read_notebook

ROOT = Path(__file__).parents[1]
REPORTS = ROOT / "reports"
PUBLISHED = [
    *("study", "ablation", "competitors", "little-data", "binding"),
    *("fair", "fair-search", "fair-search-little", "study-search", "regimes", "text", "range-scan"),
]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def text(page: Path) -> list[str]:
    soup = BeautifulSoup(page.read_text(encoding="utf-8"), "html.parser")
    return soup.get_text(" ").split()


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_report_is_the_one_its_records_give(name, tmp_path):
    write_report([REPORTS / name], tmp_path / "again.html")
    assert text(tmp_path / "again.html") == text(REPORTS / f"{name}.html")
    assert (REPORTS / f"{name}.html").stat().st_size < 5e6


def test_the_published_kernel_report_is_the_one_its_files_give(tmp_path):
    write_kernel_report(sorted((REPORTS / "kernels").glob("*.csv")), tmp_path / "again.html")
    assert text(tmp_path / "again.html") == text(REPORTS / "kernels.html")


def test_the_readme_tells_what_the_study_found():
    assert (REPORTS / "study" / "summary.md").read_text(encoding="utf-8") in README
    assert "(reports/study/summary.svg)" in README


def test_the_readme_tells_how_many_pictures_are_worth_collecting():
    reached: dict[int, list[dict[str, float]]] = {}
    for path in (REPORTS / "little-data").glob("*/record.json"):
        record = json.loads(path.read_text())
        test = record["metrics"]["test"]["speech_to_image"]
        reached.setdefault(record["parameters"]["images"], []).append(test)
    assert sorted(reached) == [50, 150, 500, 1500, 3000]
    for images, results in reached.items():
        first, tenth = (sum(one[at] for one in results) / len(results) for at in ("R@1", "R@10"))
        assert f"| {images:,} | {first:.1f} | {tenth:.1f} |" in README


def test_the_readme_tells_what_can_be_learnt_of_what_belongs_to_what():
    found: dict[str, list[tuple[float, float]]] = {}
    for path in (REPORTS / "binding").glob("*/record.json"):
        record = json.loads(path.read_text())
        foil = record["alignment"]["foil"]
        first = record["metrics"]["test"]["speech_to_image"]["R@1"]
        found.setdefault(record["arm"], []).append((100 * foil["wins"] / foil["pairs"], first))
    told = {
        arm: [f"{sum(one) / len(ones):.1f} %" for one in zip(*ones, strict=True)]
        for arm, ones in found.items()
    }
    assert f"in {told['bindings'][0]} of 990 pairs" in README
    assert f"first in {told['bindings'][1]} of 5,000 captions" in README
    assert f"it is {' and '.join(told['bag'])}" in README
    assert f"at random {' and '.join(told['random-batches'])}" in README


def test_the_readme_tells_what_the_fair_test_found():
    study = read_study([REPORTS / "fair"])
    means = {arm: study.interval(arm).mean for arm in study.finished_arms}
    assert f"{means['cmd']:.1f} % against {means['contrastive-longer']:.1f} %" in README

    def told(arm: str, other: str) -> str:
        pairs = study.paired(arm, other)
        found = compare([a.ranks for a, _ in pairs], [b.ranks for _, b in pairs], "mean_R@1")
        return f"{found.difference:.1f} points (95 % interval {found.low:.1f} to {found.high:.1f}"

    assert f"+{told('cmd', 'contrastive-longer')}" in README
    assert told("no-corruption", "contrastive-longer") in README
    assert told("cmd", "no-corruption").replace("-", "−") in README
    for control in ("other-context", "other-target", "no-context"):
        assert told(control, "contrastive-longer") in README
    assert f"a mean R@1 of {means['perfect-hearing']:.1f} %, so it is the hearing" in README
    foils = [
        r.record["alignment"]["foil"] for r in study.runs if r.record["arm"] == "perfect-hearing"
    ]
    told_apart = sum(100 * one["wins"] / one["pairs"] for one in foils) / len(foils)
    assert f"the same heads do in {told_apart:.1f} % of the pairs" in README
    [equal_cost, *_] = compare_pairs(study, "As planned")
    assert f"Holm-adjusted p = {equal_cost.adjusted_p:.3f} over the four planned tests" in README
    validation = {
        name: {
            run.record["arm"]: run.record["metrics"]["validation"]["mean_R@1"]
            for run in load_records([REPORTS / name]).done
        }
        for name in ("fair-search", "fair-search-little")
    }
    found = validation["fair-search"]
    at_high = found["swap-patches-128-1e-2"] - found["contrastive-128-1e-2-longer"]
    at_low = found["swap-patches"] - found["contrastive"]
    assert f"{at_high:.1f} points at a learning rate of 0.01" in README
    assert f"{at_low:.1f} at 0.003" in README
    rates = [found[arm] for arm in ("contrastive-128-1e-2", "contrastive-128")]
    assert f"from {rates[0]:.1f} to {rates[1]:.1f}" in README


def test_the_readme_tells_where_it_pays():
    study = read_study([REPORTS / "regimes"])
    by_recall = [one for one in compare_pairs(study, "Regimes") if one.measure == "mean_R@1"]
    assert len(by_recall) == len(study.pairs["Regimes"])
    for one in by_recall:
        changed = one.arm.partition(", ")[2] or "nothing"
        means = [number(study.interval(arm).mean) for arm in (one.other, one.arm)]
        found = one.result
        difference = f"{signed(found.difference)} [{signed(found.low)}, {signed(found.high)}]"
        assert f"| {changed} | {' | '.join(means)} | {difference} |" in README


@pytest.mark.parametrize("name", ["text", "range-scan"])
def test_the_readme_tells_what_is_gained_beyond_speech(name):
    study = read_study([REPORTS / name])
    [pair] = [
        one
        for one in compare_pairs(study, "Methods")
        if (one.arm, one.other, one.measure) == ("cmd", "contrastive", "mean_R@1")
    ]
    means = [f"{number(study.interval(arm).mean)} %" for arm in ("cmd", "contrastive")]
    assert f"{' against '.join(means)} in [reports/{name}.html]" in README
    low, high = signed(pair.result.low), signed(pair.result.high)
    assert f"{signed(pair.result.difference)} points ({low} to {high}" in README


def test_the_readme_gives_the_times_of_its_records():
    records = [json.loads(path.read_text()) for path in (REPORTS / "times").glob("*.json")]
    assert records
    for record in records:
        machine = f"{record['provenance']['cores']} cores, {record['provenance']['cpu']}"
        seconds = record["seconds"]
        assert list(seconds) == ["corpus", "features", "training", "report"]
        cells = " | ".join(f"{one:.0f} s" for one in [*seconds.values(), sum(seconds.values())])
        assert f"| {machine} | {cells} |" in README


def test_the_readme_leads_nowhere_that_is_not_there():
    targets = re.findall(r"\]\(([^)#]+)\)", README) + re.findall(r'src="([^"]+)"', README)
    local = [target for target in targets if "://" not in target]
    assert local
    assert [target for target in local if not (ROOT / target).exists()] == []


@pytest.mark.parametrize("name", ["ablation", "competitors", "fair"])
def test_what_is_concluded_has_enough_seeds(name):
    listing = json.loads((REPORTS / name / "sweeps" / f"{name}.json").read_text())
    seeds: dict[str, set[int]] = {}
    for cell in listing["cells"]:
        seeds.setdefault(cell["arm"], set()).add(cell["seed"])
    assert min(map(len, seeds.values())) >= 5
    assert not listing["smoke"]


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_published_runs_are_of_the_recipe_in_the_sweep_file(name, monkeypatch):
    """The sweep file as it stands, with the notebook's defaults, names the arms as published."""
    monkeypatch.setattr("cmdlab.sweeps.files._corpus_hash", lambda *_: None)  # it lies nowhere yet
    _, cells = read_sweep(ROOT / "notebooks" / "sweeps" / f"{name}.yaml")
    expected = {(cell.arm, cell.seed): cell.parameters for cell in cells}
    defaults = read_notebook(ROOT / "notebooks" / "train.ipynb").fill({}, where=name)
    del defaults["run_folder"]
    records = [run.record for run in load_records([REPORTS / name]).done]  # arms as listed
    assert expected == {  # a parameter that came later had what is its default now
        (one["arm"], one["seed"]): defaults | one["parameters"] for one in records
    }


def test_the_published_runs_used_the_shipped_encoders():
    shipped = {
        path.stem: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in WEIGHTS.glob("*.safetensors")
    } | {name: weights_of(Encoder(name)) for name in ("tiny-words", "tiny-scan")}  # in no file
    records = [*REPORTS.glob("*/*/record.json")]
    assert records
    for record in records:
        for encoder in json.loads(record.read_text())["encoders"].values():
            assert shipped[encoder["name"]] == encoder["sha256"], record


def test_the_model_card_gives_the_numbers_of_its_record():
    card = (WEIGHTS / "MODEL_CARD.md").read_text(encoding="utf-8")
    record = json.loads((WEIGHTS / "training.json").read_text())
    last = record["image"]["held_out"][-1]
    told = [last, record["bindings"]["held_out"]]
    numbers = [one[name] for one in told for name in ("R@1", "R@10")]
    for value in (*numbers, record["speech"]["held_out"][-1]["words"]):
        assert f"{value:.1f} %" in card
    for part in ("image", "speech"):
        assert f"{record[part]['steps']:,} steps" in card
        assert f"{record[part]['seconds'] / 60:.0f} minutes" in card

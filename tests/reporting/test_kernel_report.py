"""The report on the kernels: what it says of a CSV, and what it refuses."""

import csv
import re

import pytest
from bs4 import BeautifulSoup

from cmdlab.cli import main
from cmdlab.errors import InputError
from cmdlab.reporting import write_kernel_report
from cmdlab.reporting.kernels import read_timings

MACHINE = {"threads": 2, "driver": "", "torch": "2.11.0", "triton": "3.6.0", "git_sha": "abc"}
HOSTILE = "<script>alert(1)</script>"


def line(operation, provider, p50, *, mode="both directions", shape="25x5x8", device="a CPU"):
    numbers = {"p20": 0.9 * p50, "p50": p50, "p80": 1.2 * p50, "flops": 2000, "bytes": 100}
    texts = {"dtype": "float32", "metric": "seconds", "device": device}
    floor = {"fraction_of_floor": 0.25, "peak_memory_bytes": 3 * 2**20}
    named = {"operation": operation, "provider": provider, "mode": mode, "shape": shape}
    return named | texts | numbers | floor | MACHINE


def ceilings(device="a CPU"):
    rates = {"float32": 1e9, "bfloat16": 2e9, "int8": 4e9, "copy": 1e8}
    return [
        line("ceiling", name, rate, mode="", shape="", device=device) | {"metric": "flop/s"}
        for name, rate in rates.items()
    ]


def ranks(ours=0.5, peer=1.25, device="a CPU", name="faiss"):
    return [
        line("retrieval_ranks", "cmdlab_kernels", ours, device=device),
        line("retrieval_ranks", name, peer, device=device),
        line("retrieval_ranks", "bare fp32 product", 0.1, mode="one direction", device=device),
    ]


def nearest(device="a CPU"):
    named = {"mode": "as trained", "shape": "1000000x256", "device": device}
    return [
        line("nearest", "cmdlab.search scan", 0.03, **named),
        line("nearest", "faiss IndexFlatIP", 0.12, **named),
        line("nearest", "cmdlab.search by faiss", 0.02, **named),
    ]


def write(path, lines):
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(lines[0]))
        writer.writeheader()
        writer.writerows(lines)
    return path


def draw(tmp_path, lines):
    write_kernel_report([write(tmp_path / "cpu.csv", lines)], tmp_path / "kernels.html")
    return BeautifulSoup((tmp_path / "kernels.html").read_text(encoding="utf-8"), "html.parser")


def text(element):
    return " ".join(element.get_text(" ").split())


def test_it_says_how_the_kernel_compares_with_the_fastest_peer(tmp_path):
    found = text(draw(tmp_path, ceilings() + ranks()).find(id="found"))
    assert "25 × 5 × 8, both directions, on a CPU: 500 ms with cmdlab_kernels" in found
    assert "the fastest peer, faiss, takes 1.25 s, 2.50 times as long" in found


def test_a_slower_kernel_is_reported_as_such(tmp_path):
    found = text(draw(tmp_path, ceilings() + ranks(ours=2.0, peer=0.5)).find(id="found"))
    assert "takes 500 ms, only 0.25 of that" in found


def test_a_bare_product_is_shown_but_is_no_peer(tmp_path):
    page = draw(tmp_path, ceilings() + ranks())
    assert "bare" not in text(page.find(id="found"))
    table = page.find(id="d0-retrieval_ranks-table")
    heads = [text(head) for head in table.select("tbody th")]
    assert heads == ["bare fp32 product", "cmdlab_kernels", "faiss"]
    ratios = [row.select("td")[5].text for row in table.select("tbody tr")]
    assert ratios == ["0.20", "1.00", "2.50"]


def test_the_precisions_that_captions_took_stand_where_the_file_has_them(tmp_path):
    lines = [one | {"precisions": ""} for one in ceilings() + ranks()]
    lines[4]["precisions"] = "cpu-int8 80 %, cpu-fp32 20 %"
    page = draw(tmp_path, lines)
    kinds = [row.select("td")[2].text for row in page.select("#d0-retrieval_ranks-table tbody tr")]
    assert kinds == ["float32", "cpu-int8 80 %, cpu-fp32 20 %", "float32"]


def test_each_machine_has_its_own_section(tmp_path):
    files = [
        write(tmp_path / "cpu.csv", ceilings() + ranks()),
        write(tmp_path / "gpu.csv", ceilings("a GPU") + ranks(device="a GPU")),
    ]
    write_kernel_report(files, tmp_path / "kernels.html")
    page = BeautifulSoup((tmp_path / "kernels.html").read_text(encoding="utf-8"), "html.parser")
    headings = [re.sub(r"^\d+ ", "", text(one)) for one in page.select("main h2")]
    assert headings[1:3] == ["a CPU", "a GPU"]
    assert len(page.select("#found li")) == 2
    ids = [one["id"] for one in page.find_all(id=True)]
    assert len(ids) == len(set(ids))


def test_the_search_of_an_index_is_compared_with_faiss_itself(tmp_path):
    """Our search by faiss is ours, not a peer, however fast."""
    page = draw(tmp_path, ceilings() + nearest())
    found = text(page.find(id="found"))
    assert "1,000,000 × 256, as trained, on a CPU: 30 ms with cmdlab.search scan" in found
    assert "the fastest peer, faiss IndexFlatIP, takes 120 ms, 4.00 times as long" in found
    ratios = [row.select("td")[5].text for row in page.select("#d0-nearest-table tbody tr")]
    assert ratios == ["0.67", "1.00", "4.00"]
    assert text(page.find(class_="lead")) == "Nearest vectors on a CPU"


def test_runs_on_one_device_stand_apart_under_what_they_timed(tmp_path):
    """Each has its own ceilings."""
    slower = [one | {"p20": 1e7, "p50": 1e7, "p80": 1e7} for one in ceilings()]
    runs = [ceilings() + ranks(), slower + nearest(), ceilings() + nearest()]
    files = [write(tmp_path / f"{i}.csv", lines) for i, lines in enumerate(runs)]
    write_kernel_report(files, tmp_path / "kernels.html")
    page = BeautifulSoup((tmp_path / "kernels.html").read_text(encoding="utf-8"), "html.parser")
    headings = [re.sub(r"^\d+ ", "", text(one)) for one in page.select("main h2")]
    assert headings[1:4] == [
        "a CPU: Retrieval ranks",
        "a CPU: Nearest vectors",
        "a CPU: Nearest vectors (3)",
    ]
    assert len(page.select("#found li")) == 3
    assert "float32 10 MFLOP/s" in text(page.find(id="device-1"))


def test_names_from_the_file_are_escaped(tmp_path):
    page = draw(tmp_path, ceilings(HOSTILE) + ranks(device=HOSTILE, name=HOSTILE))
    assert page.find_all("script") == []
    assert HOSTILE in text(page.find("main"))


def test_the_same_file_gives_the_same_bytes(tmp_path):
    pages = []
    for _ in range(2):
        draw(tmp_path, ceilings() + ranks())
        pages.append((tmp_path / "kernels.html").read_bytes())
    assert pages[0] == pages[1]


def test_the_command_draws_it(tmp_path, capsys):
    source = write(tmp_path / "cpu.csv", ceilings() + ranks())
    assert main(["report", str(source), "-o", str(tmp_path / "made" / "kernels.html")]) == 0
    assert (tmp_path / "made" / "kernels.html").stat().st_size > 10_000
    assert capsys.readouterr().out.endswith("kernels.html\n")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"p50": "fast"}, r"cpu\.csv: line \d: p50 is 'fast', which is no number"),
        ({"p50": "nan"}, r"cpu\.csv: line \d: p20, p50, p80 are no positive, ordered numbers"),
        ({"p20": "9"}, r"line \d: p20, p50, p80 are no positive"),
        ({"provider": "other"}, r"holds no timing of cmdlab;"),
    ],
)
def test_a_damaged_file_is_refused(tmp_path, change, message):
    path = write(tmp_path / "cpu.csv", [*ceilings(), ranks()[0] | change])
    with pytest.raises(InputError, match=message):
        read_timings(path)


def test_a_missing_column_or_file_is_refused(tmp_path):
    path = write(tmp_path / "cpu.csv", [{"operation": "x"}])
    with pytest.raises(InputError, match=r"cpu\.csv: lacks the column provider; run"):
        read_timings(path)
    with pytest.raises(InputError, match=r"none\.csv: is no readable CSV"):
        read_timings(tmp_path / "none.csv")

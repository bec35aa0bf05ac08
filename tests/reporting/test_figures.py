"""Figures: one arm that is far away leaves the others readable, and is not lost itself."""

from bs4 import BeautifulSoup

from cmdlab.reporting import write_report


def draw(make_study, tmp_path, effects):
    arms = {"contrastive": {"weight": 0.0}, "cmd-image": {}, "cmd-far": {"direction": "speech"}}
    arms |= {"cmd-mask": {"corruption": "mask"}, "cmd-rate": {"rate": 0.6}}
    runs = make_study(tmp_path / "runs", arms=arms, effects=effects, images=200)
    write_report([runs], tmp_path / "report.html")
    page = BeautifulSoup((tmp_path / "report.html").read_text(encoding="utf-8"), "html.parser")
    return page.select_one("#differences-figure svg")


def scale(panel) -> float:
    """The largest number on the panel's axis."""
    texts = [text.get_text().replace("−", "-") for text in panel.find_all("text")]
    return max(float(text) for text in texts if text.lstrip("-").replace(".", "").isdigit())


def test_a_far_arm_does_not_set_the_scale(make_study, tmp_path):
    near = scale(draw(make_study, tmp_path / "near", {}))
    panel = draw(make_study, tmp_path / "far", {"cmd-far": -3.0})
    difference = panel.desc.get_text().split("cmd-far: ")[1].split(" ")[0]
    assert float(difference.replace("−", "-")) < -1.2 * scale(panel)
    assert scale(panel) <= 2 * near
    assert any(difference in text.get_text() for text in panel.find_all("text"))


def test_the_scale_holds_every_usual_arm(make_study, tmp_path):
    panel = draw(make_study, tmp_path, {"cmd-image": 0.2, "cmd-far": 0.3})
    assert "Triangles" in panel.find_parent("figure").figcaption.get_text()
    ends = [
        abs(float(end.strip("[];,. ").replace("−", "-")))
        for part in panel.desc.get_text().split(": ")[1:]
        for end in part.split("[")[1].split("]")[0].split(",")
    ]
    assert max(ends) <= 1.6 * scale(panel)

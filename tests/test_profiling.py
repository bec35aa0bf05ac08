"""The profile of the study's stages, on steps so few that it takes seconds."""

import re

from cmdlab import profiling


def test_every_stage_is_timed_and_told_what_its_time_went_into(capsys, monkeypatch):
    monkeypatch.setattr(profiling, "STEPS", 2)
    profiling.profile_study()
    printed = capsys.readouterr().out
    stages = re.findall(r"^([a-z][^:\n]*): ([\d.]+) (s|ms a step)\b", printed, re.MULTILINE)
    assert [name for name, _, _ in stages] == [
        "corpus",
        "speech alone, part of it",
        "features",
        "training, contrastive",
        "training, cmd-image",
        "evaluation",
        "examples",
    ]
    assert all(float(seconds) > 0 for _, seconds, _ in stages)
    for part in re.split(r"\n\n", printed)[1:]:
        assert 3 <= len(re.findall(r"^ +[\d.]+ ms a \w+ +[\d.]+ × ", part, re.MULTILINE)) <= 8

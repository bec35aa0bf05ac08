"""The report's section on voices: who is found by speech, those heard in training and others."""

from collections.abc import Sequence

import numpy as np
from markupsafe import Markup

from cmdlab.errors import InputError
from cmdlab.evaluation import Interval, Voices, interval
from cmdlab.reporting.numbers import ABSENT, number
from cmdlab.reporting.page import Column, Row, Section, Table, paragraph
from cmdlab.reporting.study import Run, Study
from cmdlab.reporting.tables import arm_label, record_links

FEWEST = 20  # captions of a voice that is told of by itself; fewer say too little
MANY = 20  # voices of a kind; of more the worst and the best ENDS are listed
ENDS = 5
KINDS = {True: "heard", False: "not heard"}


def voices_section(study: Study) -> Section | None:
    """R@1 by voice, for the runs that hold voices; None where no run does.

    Raises InputError where two runs of an arm have other voices.
    """
    recorded = {arm: _with_voices(study, arm) for arm in study.finished_arms}
    arms = {arm: runs for arm, runs in recorded.items() if runs}
    if not arms:
        return None
    shown = study.best_on_validation if study.best_on_validation in arms else next(iter(arms))
    voices, runs = _voices(arms[shown]), arms[shown]
    worst = _worst(runs)
    told = Markup("No voice has as many as {} captions, so none is told of by itself.").format(
        FEWEST
    )
    if worst is not None:
        told = Markup("The worst voice with {} is {} ({}): {}.").format(
            shown,
            _name(voices, worst),
            KINDS[bool(voices.heard[worst])],
            _in_words(_result(runs, voices.of_caption == worst)),
        )
    text = paragraph(
        "R@1 of speech → image by the voice that speaks. Heard: some caption of the training split "
        "has this voice. {} The worst of many voices is partly so by chance, which its interval "
        "does not know of.",
        told,
    )
    tables = [_arms_table(study, arms)]
    if worst is not None:
        tables.append(_by_voice_table(study, shown, runs))
    return Section("voices", "Voices", [text, *tables])


def _arms_table(study: Study, arms: dict[str, list[Run]]) -> Table:
    rows = []
    for arm, runs in arms.items():
        voices, worst = _voices(runs), _worst(runs)
        cells: list[str] = [arm_label(study, arm)]
        for heard in KINDS:
            captions = voices.captions_of(heard=heard)
            cells += [
                _cell(_result(runs, captions)),
                f"{np.sum(voices.heard == heard):,}",
                f"{captions.sum():,}",
            ]
        cells += [ABSENT, ABSENT]
        if worst is not None:
            cells[-2:] = [
                f"{_name(voices, worst)} ({KINDS[bool(voices.heard[worst])]})",
                _cell(_result(runs, voices.of_caption == worst)),
            ]
        rows.append(Row([*cells, record_links(runs)], "baseline" if arm == study.baseline else ""))
    groups = ("Heard in training", "Not heard in training")
    return Table(
        "voices-table",
        "Speech → image R@1 on the test set by voice, in percent: mean over the seeds with the "
        "95 % interval below it.",
        [
            Column("Arm", numeric=False),
            *(Column(name, group) for group in groups for name in ("R@1", "voices", "captions")),
            Column("voice", "Worst", numeric=False),
            Column("R@1", "Worst"),
            Column("Records", numeric=False),
        ],
        rows,
        "Every caption is ranked among all images. Intervals take the variance of seeds and of "
        f"images together. Worst: of the voices with at least {FEWEST} captions.",
    )


def _by_voice_table(study: Study, arm: str, runs: list[Run]) -> Table:
    voices, rates, captions = _voices(runs), _rates(runs), _captions(runs)
    rows: list[Row] = []
    left_out = 0
    for heard in KINDS:
        kind = np.flatnonzero((voices.heard == heard) & (captions >= FEWEST))
        kind = kind[np.argsort(rates.mean(0)[kind], kind="stable")]
        listed = kind if len(kind) <= MANY else np.concatenate([kind[:ENDS], kind[-ENDS:]])
        left_out += int(np.sum(voices.heard == heard)) - len(listed)
        for place, voice in enumerate(listed):
            cells = [
                _name(voices, voice),
                KINDS[heard],
                f"{captions[voice]:,}",
                _cell(_result(runs, voices.of_caption == voice)),
                record_links(runs, map(number, rates[:, voice])),
            ]
            rows.append(Row(cells, "break" if rows and place == 0 else ""))
    note = f"{left_out:,} voices are not listed: those with fewer than {FEWEST} captions"
    note += f", and of more than {MANY} heard or not heard all but the {ENDS} at either end."
    return Table(
        "voice-table",
        f"Speech → image R@1 of {arm} on the test set for each voice, in percent, worst first.",
        [
            Column("Voice", numeric=False),
            Column("In training", numeric=False),
            Column("Captions"),
            Column("R@1"),
            Column("Each seed", numeric=False),
        ],
        rows,
        note if left_out else "",
    )


def _with_voices(study: Study, arm: str) -> list[Run]:
    runs = [run for run in study.of(arm) if run.voices is not None]
    for run in runs[1:]:
        if not _voices([run]).same_as(_voices(runs)):
            raise InputError(
                f"{run.folder / 'voices.npz'}: has other voices than {runs[0].folder}, a run of "
                f"the same arm, {arm}; report runs of one corpus"
            )
    return runs


def _voices(runs: Sequence[Run]) -> Voices:
    """The voices of runs that hold them, all the same."""
    assert runs[0].voices is not None
    return runs[0].voices


def _captions(runs: Sequence[Run]) -> np.ndarray:
    """How many captions each voice has, [S]."""
    voices = _voices(runs)
    return np.bincount(voices.of_caption, minlength=len(voices.names))


def _rates(runs: Sequence[Run]) -> np.ndarray:
    """R@1 of each voice in each run, in percent, [runs, S]; 0 for a voice without captions."""
    of_caption, captions = _voices(runs).of_caption, _captions(runs)
    hits = [run.ranks.ranks("speech_to_image") <= 1 for run in runs]
    found = [np.bincount(of_caption, one, len(captions)) for one in hits]
    return 100 * np.stack(found) / np.maximum(captions, 1)


def _worst(runs: Sequence[Run]) -> int | None:
    """The voice with the lowest R@1, of those with enough captions."""
    enough = np.flatnonzero(_captions(runs) >= FEWEST)
    rates = _rates(runs).mean(0)
    return int(enough[rates[enough].argmin()]) if len(enough) else None


def _result(runs: Sequence[Run], captions: np.ndarray) -> Interval | None:
    """R@1 of some captions; None where they are of fewer than two images, too few to tell."""
    tables = [run.ranks for run in runs]
    if np.unique(tables[0].speech_image[captions]).size < 2:
        return None
    return interval(tables, "speech_to_image/R@1", captions=captions)


def _cell(found: Interval | None) -> Markup | str:
    if found is None:
        return ABSENT
    return Markup('{}<span class="interval">{}–{}</span>').format(
        number(found.mean), number(found.low), number(found.high)
    )


def _in_words(found: Interval | None) -> str:
    if found is None:
        return "its captions are of one image"
    return f"{number(found.mean)} % ({number(found.low)} to {number(found.high)})"


def _name(voices: Voices, voice: int) -> str:
    return str(voices.names[voice])[:80] or "without a name"

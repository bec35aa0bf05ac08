"""The sentences that a report's figures bear out: generated from the data, whatever its sign."""

from collections.abc import Sequence

import numpy as np
from markupsafe import Markup, escape

from cmdlab.reporting.numbers import number, p_value, signed
from cmdlab.reporting.page import paragraph
from cmdlab.reporting.pairs import PairComparison, compare_pairs
from cmdlab.reporting.study import HEADLINE, ArmComparison, Run, Study

SEEDS_TO_PUBLISH = 5
FEW_PAIRS = 4  # each has its sentence; of more those alone that are separated from zero
CONVERGED = 0.5  # points of validation over the last third of the steps, at most
DENOISING_ASKED = (
    "Does Cross-Modal Denoising, trained beside the contrastive loss, retrieve better than the "
    "contrastive loss alone?"
)


def claim(study: Study, comparisons: Sequence[ArmComparison]) -> Markup:
    """One paragraph: what was asked, what was found, what did not work."""
    parts = {
        "Asked:": _asked(study),
        "Found:": _found(study, comparisons),
        **{f"{family}:": _asked_for(study, family) for family in study.pairs},
        "Did not work:": _failed(study, comparisons),
    }
    spans = Markup(" ").join(
        Markup("<span><b>{}</b> {}</span>").format(name, Markup(" ").join(sentences))
        for name, sentences in parts.items()
        if sentences
    )
    return Markup('<p class="claim">{}</p>').format(spans)


def meaning(study: Study) -> Markup:
    """What a comparison depends on: where the baseline lies between chance and the ceilings, and
    whether it had converged when it was read."""
    key = "speech_to_image"
    runs = study.of(study.baseline)
    reached = study.interval(study.baseline, f"{key}/R@1").mean
    ceilings = [run.record["ceiling"][key]["R@1"] for run in runs if run.record["ceiling"]]
    texts = [run.record["text_ceiling"][key]["R@1"] for run in runs if run.record["text_ceiling"]]
    sentences = []
    if ceilings:
        ceiling = float(np.mean(ceilings))
        share = reached / ceiling if ceiling else 0.0
        judged = "so the comparison has room to both sides"
        if share < 1 / 3:
            judged = "less than a third, so the comparison means little"
        elif share > 0.9:
            judged = "more than nine tenths, so there is hardly anything left to win"
        sentences.append(
            "A caption can be true of several images, so even an all-knowing system would stop at "
            f"a speech → image R@1 of {number(ceiling)} %; {study.baseline} reaches "
            f"{number(reached)} %, {100 * share:.0f} % of that, {judged}."
        )
    else:
        sentences.append("The corpus' ceiling was not measured.")
    if texts:
        text = float(np.mean(texts))
        side = "below" if text >= reached else "above"
        sentences.append(
            "Text → image retrieval with the same frozen image encoder reaches "
            f"{number(text)} %: {study.baseline} lies {number(abs(text - reached))} points "
            f"{side} it."
        )
    else:
        sentences.append("Text → image retrieval with the same image encoder was not measured.")
    gains = [gain for run in runs if (gain := _late_gain(run)) is not None]
    if gains:
        gain = float(np.mean(gains))
        judged = "it had converged"
        if gain >= CONVERGED:
            judged = "it still climbs, so this tells who learns sooner, not who learns more"
        sentences.append(
            f"Over the last third of its steps {study.baseline}'s mean R@1 on the validation set "
            f"changed by {signed(gain)} points: {judged}."
        )
    return paragraph("{}", " ".join(sentences))


def _late_gain(run: Run) -> float | None:
    """Validation's mean R@1 at the end minus that at two thirds of the steps, or the last one
    before; None where there is none."""
    points = [
        (point["step"], point["validation_mean_R@1"])
        for point in run.record["learning_curve"]
        if point["validation_mean_R@1"] is not None
    ]
    earlier = [value for step, value in points if 3 * step <= 2 * points[-1][0]]
    return points[-1][1] - earlier[-1] if earlier else None


def _asked(study: Study) -> list[Markup]:
    corpus = study.of(study.baseline)[0].record["corpus"]
    counts = {len(study.of(arm)) for arm in (study.baseline, *study.compared_arms)}
    seeds = " to ".join(str(end) for end in sorted({min(counts), max(counts)}))
    return [
        Markup(DENOISING_ASKED) if any(map(_denoises, study.runs)) else escape(study.title),
        Markup(
            "{} compared with {} on {}, with {} an arm and {} test images, by mean R@1, the mean "
            "of both directions."
        ).format(
            _plural(len(study.compared_arms), "arm is", "arms are"),
            _arm(study.baseline),
            corpus["name"],
            f"{seeds} {'seed' if seeds == '1' else 'seeds'}",
            f"{corpus['gallery']:,}",
        ),
    ]


def _denoises(run: Run) -> bool:
    return run.record["parameters"].get("weight", 0) != 0


def _found(study: Study, comparisons: Sequence[ArmComparison]) -> list[Markup]:
    compared = [one for one in comparisons if one.result is not None]
    if not compared:
        return [Markup("Nothing, since no arm could be compared with {}.").format(study.baseline)]
    sentences = []
    best = next((one for one in compared if one.arm == study.best_on_validation), None)
    if best is not None and best.result is not None:
        result = best.result
        families = [one for family in study.pairs for one in compare_pairs(study, family)]
        adjusted = next(
            (
                one.adjusted_p
                for one in families
                if (one.arm, one.other, one.measure) == (best.arm, study.baseline, HEADLINE)
            ),
            best.adjusted_p,  # where the sweep asks for no pair of the two
        )
        judged = "It is separated from zero."
        if adjusted >= 0.05:
            judged = (
                "It is not separated from zero; tested alone, a true difference of "
                f"{number(result.detectable)} points would be found in about 80 % of the cases."
            )
        sentences.append(
            Markup(
                "{}{} has a mean R@1 of {} % on the test set against {} %. In pairs the difference "
                "is {} points (95 % interval {} to {}; Holm-adjusted p {}{}). {}"
            ).format(
                _arm(best.arm),
                ", the best arm on the validation set," if len(compared) > 1 else "",
                number(study.interval(best.arm).mean),
                number(study.interval(study.baseline).mean),
                signed(result.difference),
                signed(result.low),
                signed(result.high),
                _p(adjusted),
                "" if best.planned else ", exploratory",
                judged,
            )
        )
    for planned, name in ((True, "planned"), (False, "exploratory")):
        family = [
            (one.result.difference, one.separated)
            for one in compared
            if one.planned == planned and one.result is not None
        ]
        if len(family) > 1:
            sentences.append(_tally(f"{name} comparisons", family))
    return sentences


def _asked_for(study: Study, family: str) -> list[Markup]:
    """What the tests of a family of pairs show, and whether a gain is denoising's."""
    found = compare_pairs(study, family)
    by_recall = [one for one in found if one.measure == HEADLINE]
    told = by_recall
    sentences = []
    if len(by_recall) > FEW_PAIRS:
        told = [one for one in by_recall if one.separated]
        counted = [(one.result.difference, one.separated) for one in by_recall]
        sentences.append(_tally("pairs", counted))
    sentences += [
        Markup("{} minus {}: {} points of mean R@1 ({} to {}; Holm-adjusted p {}), {}.").format(
            _arm(one.arm),
            _arm(one.other),
            signed(one.result.difference),
            signed(one.result.low),
            signed(one.result.high),
            _p(one.adjusted_p),
            "separated from zero" if one.separated else "not separated from zero",
        )
        for one in told
    ]
    foils = [one.separated for one in found if one.measure != HEADLINE]
    if len(foils) == 1:
        judged = "is" if foils[0] else "is not"
        sentences.append(Markup("By the foil test it {} separated.").format(judged))
    elif foils:
        apart = sum(foils)
        sentences.append(
            Markup("By the foil test {} of {} pairs {} separated.").format(
                apart or "none", len(foils), "is" if apart < 2 else "are"
            )
        )
    return sentences + [
        Markup(
            "So no gain of {} is shown to be denoising's: {} trains the same loss without "
            "corruption."
        ).format(_arm(one.arm), _arm(one.other))
        for one in found
        if _is_uncorrupted(study, one) and not (one.separated and one.result.difference > 0)
    ]


def _tally(what: str, differences: Sequence[tuple[float, bool]]) -> Markup:
    """How many came out above zero, below, and neither: (difference, whether it is separated)."""
    above = sum(separated and difference > 0 for difference, separated in differences)
    below = sum(separated and difference < 0 for difference, separated in differences)
    total = len(differences)
    return Markup(
        "Of {} {} {} came out above zero, {} below, and {} not separated from it."
    ).format(total, what, above or "none", below or "none", total - above - below or "none")


def _is_uncorrupted(study: Study, one: PairComparison) -> bool:
    """Whether the second arm is the first one but for the corruption, by mean R@1."""
    own, other = study.parameters[one.arm], study.parameters[one.other]
    changed = {name for name in own.keys() | other.keys() if own.get(name) != other.get(name)}
    return one.measure == HEADLINE and changed == {"corruption"} and other["corruption"] == "none"


def _failed(study: Study, comparisons: Sequence[ArmComparison]) -> list[Markup]:
    sentences = []
    below = [one.arm for one in comparisons if one.separated and _difference(one) < 0]
    undecided = [one for one in comparisons if one.result is not None and not one.separated]
    untold = [one.arm for one in comparisons if one.result is None]
    if below:
        sentences.append(Markup("Retrieval became worse with {}.").format(_arms(below)))
    if undecided:
        sizes = [one.result.detectable for one in undecided if one.result is not None]
        ends = dict.fromkeys([number(min(sizes)), number(max(sizes))])
        sentences.append(
            Markup(
                "The difference is not separated from zero for {}; tested alone, {} points would "
                "be found in about 80 % of the cases."
            ).format(_arms([one.arm for one in undecided]), " to ".join(ends))
        )
    if untold:
        sentences.append(Markup("{} could not be compared.").format(_arms(untold)))
    lost = {
        "failed": sum(cell.status == "failed" for cell in study.lost),
        "never ran": sum(cell.status == "missing" for cell in study.lost),
    }
    if study.lost:
        counted = [f"{_plural(n, 'cell', 'cells')} {how}" for how, n in lost.items() if n]
        sentences.append(Markup("{}.").format(" and ".join(counted)))
    if not comparisons:
        sentences.append(Markup("No other arm has a finished run."))
    if not sentences:
        sentences.append(
            Markup("Nothing: every arm is separated above zero, and every cell finished.")
        )
    if min(len(study.of(arm)) for arm in (study.baseline, *study.compared_arms)) < SEEDS_TO_PUBLISH:
        sentences.append(
            Markup(
                "Not every arm has {} seeds, so this is an indication, not a result to publish."
            ).format(SEEDS_TO_PUBLISH)
        )
    return sentences


def _difference(one: ArmComparison) -> float:
    return one.result.difference if one.result is not None else 0.0


def _p(value: float) -> str:
    shown = p_value(value)
    return shown if shown.startswith("<") else f"= {shown}"


def _arm(name: str) -> Markup:
    return Markup('<span class="arm">{}</span>').format(name)


def _arms(names: Sequence[str]) -> Markup:
    """At most four names in a sentence, apart by semicolons where a name has a comma."""
    if len(names) == 1:
        return _arm(names[0])
    comma, last = ",", " and "
    if len(names) > 2 and any("," in name for name in names):
        comma, last = ";", "; and "
    many = len(names) > 4
    *listed, end = map(_arm, names[:3] if many else names)
    if many:
        listed, end = [*listed, end], Markup("{} more").format(len(names) - 3)
    sentence = Markup("{}{}{}").format(Markup(f"{comma} ").join(listed), last, end)
    return Markup("{} arms ({})").format(len(names), sentence) if many else sentence


def _plural(number_of: int, one: str, many: str) -> str:
    return f"{number_of} {one if number_of == 1 else many}"

"""The ablation report: the sections of a study, drawn from its records."""

from collections.abc import Sequence
from pathlib import Path

from markupsafe import Markup

from cmdlab.reporting import figures, origins, tables
from cmdlab.reporting.claim import claim, meaning
from cmdlab.reporting.examples import Examples, map_blocks, queries_html, read_examples
from cmdlab.reporting.page import Figure, Section, Table, bullets, paragraph, write_page
from cmdlab.reporting.pairs import pairs_section
from cmdlab.reporting.restoring import restoring_section
from cmdlab.reporting.study import HEADLINE, ArmComparison, Study, read_study
from cmdlab.reporting.users import SCRIPT, users_section
from cmdlab.reporting.voices import voices_section
from cmdlab.reporting.words import words_section


def write_report(runs: Sequence[Path], output: Path, *, title: str | None = None) -> None:
    """Draw the report of the study in `runs`, and put it in place of `output` in one step.

    runs: sweep listings (runs/sweeps/NAME.json), folders of runs, or run folders.
    title: in place of the sweep's own.
    Only records are read: record.json, ranks.npz, voices.npz, examples.json and its media. The same
    records give the same bytes. Raises InputError for records that cannot be reported.
    """
    study = read_study(runs, title=title)
    comparisons = study.comparisons()
    examples = read_examples(study)
    voices, restoring = voices_section(study), restoring_section(study)
    pairs, words = pairs_section(study), words_section(study)
    cells = len(study.runs) + len(study.lost)
    corpora = sorted({run.record["corpus"]["name"] for run in study.runs})
    write_page(
        Path(output),
        title=study.title,
        kicker="Cross-Modal Denoising · ablation report",
        lead=f"{', '.join(corpora)} · {len(study.finished_arms)} arms · "
        f"{len(study.runs)} of {cells} runs finished · drawn from their records alone",
        sections=[
            _claim(study, comparisons),
            _results(study),
            _differences(study, comparisons),
            *([pairs] if pairs else []),
            _axes(study),
            _curves(study),
            _cost(study),
            _alignment(study),
            *([restoring] if restoring else []),
            *([voices] if voices else []),
            *([words] if words else []),
            users_section(study),
            _examples(study, examples),
            _maps(examples),
            _limits(study),
            _provenance(study),
        ],
        footer="Drawn by cmdlab report from run records. The page's one script computes the form "
        "for the reader's own numbers; it makes no request.",
        script=SCRIPT,
    )


def _claim(study: Study, comparisons: list[ArmComparison]) -> Section:
    return Section("claim", "The claim", [claim(study, comparisons)])


def _results(study: Study) -> Section:
    return Section("results", "Retrieval results", [meaning(study), tables.main_table(study)])


def _differences(study: Study, comparisons: list[ArmComparison]) -> Section:
    heading = "Paired differences"
    if not comparisons:
        return Section("differences", heading, [_absent("No other arm has a finished run.")])
    exploratory = [one.arm for one in comparisons if not one.planned]
    families = (
        "The sweep names the comparisons that were planned; the others are exploratory, and "
        "corrected as a family of their own."
        if exploratory
        else "The sweep sets no comparison apart, so all are corrected as one family."
    )
    text = paragraph(
        "Each arm is compared with {} on the same seeds and the same queries. The captions of an "
        "image stay together, and the interval takes seeds and images into account. {} The arm "
        "with a dagger was chosen on the validation set; the test set had no part in the choice.",
        study.baseline,
        families,
    )
    if not any(one.result for one in comparisons):
        return Section("differences", heading, [text, tables.comparison_table(study, comparisons)])
    by_metric = {HEADLINE: comparisons}
    for metric in ("speech_to_image/R@1", "image_to_speech/R@1"):
        by_metric[metric] = study.comparisons(metric)
    figure = figures.forest_figure(study, by_metric)
    table = tables.comparison_table(study, comparisons)
    return Section("differences", heading, [text, figure, table])


def _axes(study: Study) -> Section:
    heading = "Dose–response of each axis"
    if not study.axes:
        return Section(
            "axes", heading, [_absent("The sweep varies no axis one at a time from a base arm.")]
        )
    text = paragraph(
        "Arms that differ from {} in one parameter alone, along that parameter.", study.axis_base
    )
    return Section("axes", heading, [text, figures.axes_figure(study), tables.axes_table(study)])


def _curves(study: Study) -> Section:
    points = [point for run in study.runs for point in run.record["learning_curve"]]
    blocks: list[Markup | Figure] = []
    if any(point["validation_mean_R@1"] is not None for point in points):
        blocks.append(figures.curves_figure(study))
    else:
        blocks.append(_absent("No validation result was recorded during training."))
    if (time := figures.time_figure(study)) is not None:
        blocks.append(time)
    if points:
        blocks.append(figures.loss_figure(study))
    return Section("curves", "Learning curves", blocks)


def _cost(study: Study) -> Section:
    keys = {"inference_parameters": "parameters", "inference_flops": "FLOPs a caption"}
    sentences = []
    for key, name in keys.items():
        values = {run.record["cost"][key] for run in study.runs}
        if values == {None}:
            sentences.append(f"The {name} at retrieval were not measured.")
        elif len(values) == 1:
            (value,) = values
            sentences.append(f"All arms have the same {name} at retrieval: {value:,.0f}.")
        else:
            sentences.append(f"The arms differ in {name} at retrieval, see the table.")
    sentences.append("The denoiser is used in training alone, and no exported model holds it.")
    blocks: list[Markup | Table | Figure] = [
        paragraph("{}", " ".join(sentences)),
        tables.cost_table(study),
    ]
    queries = {
        run.record["cost"]["retrieval_flops_per_query"]
        for arm in tables.arms_with_retrieval_cost(study)
        for run in study.of(arm)
    }
    if len(queries) > 1:  # where all cost the same there is nothing to weigh
        blocks += [figures.retrieval_cost_figure(study), tables.retrieval_cost_table(study)]
    return Section("cost", "Cost", blocks)


def _alignment(study: Study) -> Section:
    heading = "Fine alignment"
    if not any(run.record["alignment"] for run in study.runs):
        text = (
            "Not measured: the corpus has no ground truth of words and objects, or no run used it."
        )
        return Section("alignment", heading, [_absent(text)])
    text = paragraph(
        "Pointing game: does the patch that a spoken word fits best, in the shared space, lie on "
        "the object that it names? Chance is the part of the patches that the object covers. Foil: "
        "does a caption score higher with its image than the same caption with the colours of two "
        "objects swapped?"
    )
    return Section("alignment", heading, [text, tables.alignment_table(study)])


def _examples(study: Study, examples: Examples | None) -> Section:
    heading = "Examples and worst failures"
    if examples is None:
        return Section("examples", heading, [_absent("No examples were recorded.")])
    run = examples.run
    blocks: list[Markup] = [
        paragraph(
            "Queries of {}, seed {}, record {}. They were drawn by a fixed seed, not by hand; the "
            "failures are the queries with the worst ranks. The right image has a frame and a "
            "tick. A clip is cut after four seconds; the model heard the whole caption.{}",
            run.arm,
            run.seed,
            tables.record_links([run], [run.id]),
            f" {examples.left_out} recorded queries do not fit here." if examples.left_out else "",
        )
    ]
    for name, queries in (
        ("Drawn at random", examples.random),
        ("Worst failures", examples.failures),
    ):
        blocks.append(Markup("<h3>{}</h3>").format(name))
        blocks.append(
            queries_html(study, examples, queries) if queries else _absent("None recorded.")
        )
    return Section("examples", heading, blocks)


def _maps(examples: Examples | None) -> Section:
    heading = "Word × patch maps"
    if examples is None:
        return Section("maps", heading, [_absent("No maps were recorded.")])
    return Section("maps", heading, map_blocks(examples))


def _limits(study: Study) -> Section:
    corpora = sorted({run.record["corpus"]["name"] for run in study.runs})
    lost = {
        status: sum(cell.status == status for cell in study.lost)
        for status in ("failed", "missing")
    }
    limits = [
        f"The results hold for {', '.join(corpora)}, the frozen encoders named under Provenance "
        "and heads of this size; they do not carry over by themselves to others.",
        "Intervals cover other seeds and other images of the same kind, but for those of fine "
        "alignment. They do not cover other hyperparameters than those listed.",
        "Figures of the paper are not compared with these, since its sizes, schedule and code are "
        "not public.",
        "A word's map shows which patches it fits in the shared space, not why an image ranks as "
        "it does.",
    ]
    if "SpokenScenes" in corpora:
        limits.insert(
            1,
            "SpokenScenes is generated: drawn shapes, synthetic voices, a small vocabulary. It "
            "tells training methods apart under known truth; it says little of natural speech "
            "and photos.",
        )
    intended = paragraph(
        "Intended use: to decide whether, and with which settings, denoising is worth training. "
        "Not intended: a ranking of published systems, or a promise about speech or images of "
        "people."
    )
    total = len(study.runs) + len(study.lost)
    counted = paragraph(
        "Of {} cells {} finished, {} failed and {} are missing.",
        total,
        len(study.runs),
        lost["failed"],
        lost["missing"],
    )
    table = [origins.lost_table(study)] if study.lost else []
    return Section(
        "limits", "Limits and intended use", [bullets(limits), intended, counted, *table]
    )


def _provenance(study: Study) -> Section:
    core_seconds = sum(
        run.record["wall_seconds"] * run.record["determinism"]["threads"] for run in study.runs
    )
    started = sorted(run.record["provenance"]["started"] for run in study.runs)
    text = paragraph(
        "The finished runs took at most {} core-hours together, the duration of each times its "
        "threads; the first started at {}, the last at {}. Every number of this page comes from "
        "the records listed below, and the rows of results name theirs.",
        f"{core_seconds / 3600:.2g}",
        started[0],
        started[-1],
    )
    return Section(
        "provenance",
        "Provenance and records",
        [
            text,
            origins.provenance_table(study),
            origins.parameters_table(study),
            origins.records_table(study),
        ],
    )


def _absent(text: str) -> Markup:
    return paragraph('<span class="absent">{}</span>', text)

"""Intervals hold as often as they say, on data drawn with seed and image effects."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from cmdlab.errors import InputError
from cmdlab.evaluation.ranks import RankTable, rank_table
from cmdlab.evaluation.statistics import METRICS, compare, compare_by_seed, holm, interval


def table_of_hits(speech_hits, image_hits, owner):
    """Ranks 1 for hits and 2 for misses; owner [N] is each caption's image."""
    speech_hits, image_hits = np.asarray(speech_hits, bool), np.asarray(image_hits, bool)
    return RankTable(
        speech_greater=(~speech_hits).astype(np.int64),
        speech_equal=np.zeros(len(speech_hits), np.int64),
        speech_image=np.asarray(owner, np.int64),
        image_greater=(~image_hits).astype(np.int64),
        image_equal=np.zeros(len(image_hits), np.int64),
        image_of_view=np.arange(len(image_hits)),
    )


def one_caption_each(hits):
    """The same hits in both directions."""
    return table_of_hits(hits, hits, np.arange(len(hits)))


def test_the_views_of_an_image_are_drawn_together():
    """Image 0 has one view that is found and two that are not, image 1 one that is found."""
    plain = table_of_hits([1, 1], [1, 0], [0, 1])
    views = replace(
        plain,
        image_greater=np.array([0, 1, 1, 0]),
        image_equal=np.zeros(4, np.int64),
        image_of_view=np.array([0, 0, 0, 1]),
    )
    none = replace(views, image_greater=np.ones(4, np.int64))
    metric = "image_to_speech/R@1"
    found = compare([views], [none], metric)
    assert found.difference == interval([views], metric).mean == 50
    # Drawn as images, a resample has 3 + 3, 3 + 1 or 1 + 1 views: 1/3, 2/4 or all are found.
    spread = np.array([100 / 3, 50, 50, 100]).std() * 2**0.5  # M / (M - 1) is 2
    assert found.high - 50 == pytest.approx(stats.t.ppf(0.975, 1) * spread, rel=0.05)
    with pytest.raises(InputError, match="different test queries"):
        interval([views, plain], metric)


@pytest.mark.parametrize("metric", ["speech_to_image/R@1", "speech_to_image/MRR"])
def test_some_captions_are_judged_as_if_there_were_no_others(metric):
    generator = np.random.default_rng(3)
    owner = np.repeat(np.arange(40), 3)
    chosen = (generator.random(120) < 0.4) & (owner % 4 != 1)  # no caption of some images
    hits = generator.random((3, 120)) < 0.5
    tables = [table_of_hits(one, np.ones(40), owner) for one in hits]
    left, renumbered = np.unique(owner[chosen], return_inverse=True)
    alone = [table_of_hits(one[chosen], np.ones(len(left)), renumbered) for one in hits]
    found = interval(tables, metric, captions=chosen)
    assert found == interval(alone, metric)
    if metric.endswith("R@1"):
        assert found.per_seed == pytest.approx(100 * hits[:, chosen].mean(1))
    assert interval(tables, metric, captions=np.ones(120, bool)) == interval(tables, metric)


@given(
    st.integers(2, 12).flatmap(
        lambda n: st.tuples(*[st.lists(st.integers(0, 990), min_size=n, max_size=n)] * 2)
    )
)
def test_one_number_a_seed_is_compared_as_scipy_does(arms):
    found = compare_by_seed(*arms)
    expected = stats.ttest_rel(*arms)
    assert found.difference == pytest.approx(np.mean(np.subtract(*arms)))
    if np.ptp(np.subtract(*arms)):
        assert found.p_value == pytest.approx(expected.pvalue, rel=1e-6)
        assert (found.low, found.high) == pytest.approx(expected.confidence_interval(0.95))


def test_one_number_a_seed_needs_two_seeds():
    with pytest.raises(InputError, match="the same two seeds or more"):
        compare_by_seed([1.0], [2.0])
    assert compare_by_seed([3.0, 3.0], [2.0, 2.0]).p_value == 0


def test_what_a_user_meets_is_the_mean_rank_and_one_screen():
    """Fifty queries, all first but three: at places 12, 13 and 40."""
    greater = np.zeros(50, np.int64)
    greater[:3] = 11, 12, 39
    none, rows = np.zeros(50, np.int64), np.arange(50)
    table = RankTable(greater, none, rows, none, none, rows)
    looked_at = interval([table], "speech_to_image/mean_rank")
    assert looked_at.mean == (47 + 12 + 13 + 40) / 50
    assert 1 <= looked_at.low < looked_at.mean < looked_at.high
    assert interval([table], "speech_to_image/R@12").mean == 96


OWNER = np.repeat(np.arange(60), np.arange(60) % 3 + 1)  # 1 to 3 captions an image


def trained_models(generator, seeds, image_effect, *, seed_spread, rest=0.7, level=-0.3):
    """A query is a hit if level + seed + image + (seed, image) + noise > 0, all normal.

    So the true R@1 of one image and one seed, averaged over all there could be, is a probit.
    """
    tables = []
    for seed_effect in generator.normal(0, seed_spread, seeds):
        logit = level + seed_effect + image_effect + generator.normal(0, rest, len(image_effect))
        tables.append(
            table_of_hits(
                logit[OWNER] + generator.normal(size=len(OWNER)) > 0,
                logit + generator.normal(size=len(image_effect)) > 0,
                OWNER,
            )
        )
    return tables


# Of the variance seeds have the larger part, and images have.
SPREADS = pytest.mark.parametrize(("seed_spread", "image_spread"), [(0.2, 0.7), (0.1, 2.0)])


@SPREADS
@pytest.mark.parametrize("seeds", [3, 5])
def test_95_percent_of_the_intervals_hold_the_truth(seeds, seed_spread, image_spread):
    generator = np.random.default_rng(seeds)
    truth = 100 * stats.norm.cdf(-0.3 / np.sqrt(seed_spread**2 + image_spread**2 + 0.7**2 + 1))
    held = []
    for draw in range(600):
        image_effect = generator.normal(0, image_spread, 60)
        tables = trained_models(generator, seeds, image_effect, seed_spread=seed_spread)
        found = interval(tables, "mean_R@1", resamples=200, seed=draw)
        held.append(found.low <= truth <= found.high)
    assert 0.92 <= np.mean(held) <= 0.98


@SPREADS
@pytest.mark.parametrize("seeds", [3, 5])
def test_5_percent_of_the_comparisons_of_equals_are_false_alarms(seeds, seed_spread, image_spread):
    generator = np.random.default_rng(10 + seeds)
    alarms = []
    for draw in range(600):
        shared = generator.normal(size=60)  # what an image does to both arms
        treatment, control = (
            trained_models(
                generator,
                seeds,
                shared + generator.normal(0, image_spread, 60),
                seed_spread=seed_spread,
            )
            for _ in range(2)
        )
        found = compare(treatment, control, "mean_R@1", resamples=200, seed=draw)
        alarms.append(found.p_value < 0.05)
        assert (found.p_value < 0.05) == (not found.low <= 0 <= found.high)
    assert 0.02 <= np.mean(alarms) <= 0.08


def test_a_detectable_difference_is_found_in_80_percent_of_the_cases():
    generator = np.random.default_rng(20)

    def arms(rate):
        return (
            [one_caption_each(generator.random(200) < chance) for _ in range(5)]
            for chance in (rate, 0.4)
        )

    metric = "image_to_speech/R@1"
    detectable = np.mean(
        [compare(*arms(0.4), metric, resamples=200).detectable for _ in range(200)]
    )
    found = [
        compare(*arms(0.4 + detectable / 100), metric, resamples=200).p_value < 0.05
        for _ in range(400)
    ]
    assert 0.73 <= np.mean(found) <= 0.87


def test_with_no_spread_over_images_it_is_the_paired_t_test():
    treatment = [one_caption_each([hit] * 9) for hit in (1, 1, 1, 0, 1)]
    control = [one_caption_each([hit] * 9) for hit in (0, 0, 1, 1, 0)]
    expected = stats.ttest_rel([100, 100, 100, 0, 100], [0, 0, 100, 100, 0])
    found = compare(treatment, control, "mean_R@1")
    assert found.difference == 40
    assert found.per_seed == [100, 100, 0, -100, 100]
    assert found.p_value == pytest.approx(expected.pvalue)
    assert (found.low, found.high) == pytest.approx(tuple(expected.confidence_interval()))


def test_one_seed_has_the_spread_of_its_images():
    hits = np.arange(1000) % 10 < 3
    found = interval([one_caption_each(hits)], "image_to_speech/R@1")
    half_width = 100 * stats.t.ppf(0.975, 999) * np.sqrt(0.3 * 0.7 / 999)
    assert found.mean == 30
    assert found.high - found.mean == pytest.approx(half_width, rel=0.05)
    assert found.mean - found.low == pytest.approx(half_width, rel=0.05)


def test_more_captions_of_the_same_images_are_no_more_evidence():
    hits = np.arange(50) % 10 < 3
    once = interval([one_caption_each(hits)], "speech_to_image/R@1")
    five_times = table_of_hits(np.repeat(hits, 5), hits, np.repeat(np.arange(50), 5))
    assert interval([five_times], "speech_to_image/R@1") == once


def test_what_both_arms_share_cancels():
    generator = np.random.default_rng(0)
    tables = trained_models(generator, 4, generator.normal(0, 1, 60), seed_spread=0.5)
    found = compare(tables, tables, "mean_R@1")
    assert (found.difference, found.low, found.high, found.p_value) == (0, 0, 0, 1)
    alone = interval(tables, "mean_R@1")
    assert alone.high - alone.low > 5


def test_seeds_that_agree_by_luck_keep_the_spread_of_single_queries():
    # Three models of 50 % each, with independent hits: their equal results are a coincidence.
    generator = np.random.default_rng(1)
    tables = [one_caption_each(generator.permutation(200) < 100) for _ in range(3)]
    found = interval(tables, "image_to_speech/R@1")
    assert found.per_seed == [50, 50, 50]
    assert found.high - found.low > 2 * 1.96 * 100 * np.sqrt(0.25 / 600) * 0.9


def test_means_are_those_of_all_queries_in_every_metric():
    generator = np.random.default_rng(2)
    tables = [
        rank_table(
            generator.normal(size=(len(OWNER), 4)), generator.normal(size=(60, 4)), OWNER, range(60)
        )
        for _ in range(2)
    ]
    for metric in METRICS:
        found = interval(tables, metric, resamples=100)
        assert found.low <= found.mean <= found.high
        assert found.mean == pytest.approx(np.mean(found.per_seed))
    found = interval(tables, "speech_to_image/R@5", resamples=100)
    assert found.per_seed == pytest.approx(
        [100 * np.mean(table.ranks("speech_to_image") <= 5) for table in tables]
    )


def test_an_interval_stays_within_the_metric_and_repeats():
    hits = np.arange(30) > 0
    tables = [one_caption_each(np.roll(hits, shift)) for shift in range(3)]
    found = interval(tables, "mean_R@1")
    assert found.high == 100
    assert interval(tables, "mean_R@1") == found
    assert interval(tables, "mean_R@1", seed=1) != found


def test_what_cannot_be_compared_is_refused():
    ten, other = one_caption_each([1, 0] * 5), one_caption_each([1, 0] * 6)
    with pytest.raises(InputError, match="different test queries"):
        compare([ten], [other], "mean_R@1")
    with pytest.raises(InputError, match="2 runs cannot be paired with 1"):
        compare([ten, ten], [ten], "mean_R@1")
    with pytest.raises(InputError, match="R@7: no such metric"):
        interval([ten], "speech_to_image/R@7")
    with pytest.raises(InputError, match="at least one"):
        interval([], "mean_R@1")
    with pytest.raises(InputError, match="two or more"):
        interval([one_caption_each([1])], "mean_R@1")


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.6]) == [1, 1]
    assert holm([]) == []
    with pytest.raises(ValueError, match="between 0 and 1"):
        holm([0.1, float("nan")])


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_holm_lies_between_no_correction_and_bonferroni(p_values):
    adjusted = holm(p_values)
    for raw, value in zip(p_values, adjusted, strict=True):
        assert raw <= value <= min(1, raw * len(p_values))
    order = np.argsort(p_values, kind="stable")
    assert (np.diff(np.array(adjusted)[order]) >= 0).all()

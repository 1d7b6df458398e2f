"""Intervals keep what they promise, and agree with other libraries where these have the same formula."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import bootstrap, ttest_1samp, ttest_ind, ttest_rel

from stars.habits.behaviors import wilson
from stars.measure.intervals import (
    BOTH,
    NEW_PROBLEMS,
    NEW_SEEDS,
    NOTHING,
    Estimate,
    Term,
    binomial_noise,
    contrast,
    difference,
    half_width,
    margin,
    mean_interval,
    of_means,
    problem_variances,
    problem_weights,
    ratio_difference,
    ratio_interval,
    relation,
    residual,
)


def holding(e, truth):
    return e.lo <= truth <= e.hi


def coverage(rng, seeds, spread, paired=False, problems=400, tries=400):
    "Share of intervals that hold the truth where seeds differ by `spread` and problems by much"
    held = 0
    for _ in range(tries):
        chances = rng.choice([0.1, 0.35, 0.6], problems)

        def outcomes(lift, chances=chances):
            training = rng.normal(lift, spread, (seeds, 1))
            return rng.random((seeds, problems)) < np.clip(chances + training, 0, 1)

        if paired:
            held += holding(difference(outcomes(0.1), outcomes(0.0)), 0.1)
        else:
            held += holding(mean_interval(outcomes(0.0)), 0.35)
    return held / tries


@pytest.mark.parametrize("paired", [False, True])
@pytest.mark.parametrize("seeds, spread", [(1, 0.0), (2, 0.02), (3, 0.0), (3, 0.03), (5, 0.02)])
def test_intervals_hold_the_truth_where_problems_and_seeds_are_new(seeds, spread, paired):
    assert coverage(np.random.default_rng(seeds), seeds, spread, paired) >= 0.93


def test_seeds_share_their_problems():
    "Ten seeds on the same problems are no ten samples: the interval of today divided by their number"
    rng, held, too_narrow = np.random.default_rng(0), 0, 0
    for _ in range(300):
        values = rng.random((10, 400)) < rng.choice([0.05, 0.65], 400)
        held += holding(mean_interval(values), 0.35)
        means = values.mean(1)
        too_narrow += holding(of_means([Term(means, binomial_noise(means.mean(), 400))]), 0.35)
    assert held / 300 >= 0.93 > 0.7 > too_narrow / 300


def test_one_seed_is_the_t_test_of_one_sample_and_of_pairs():
    a, b = np.random.default_rng(1).gamma(3, 40, (2, 50))
    want = ttest_1samp(a, 0).confidence_interval()
    assert mean_interval(a)[1:3] == pytest.approx((want.low, want.high))
    want = ttest_rel(a, b).confidence_interval()
    assert difference(a, b)[1:3] == pytest.approx((want.low, want.high))
    assert difference(a, b).population == NEW_PROBLEMS


def test_problems_alike_leave_welchs_t_test_of_seeds():
    rng = np.random.default_rng(2)
    a, b = (np.repeat(rng.normal(5, 1, (n, 1)), 30, axis=1) for n in (5, 3))
    want = ttest_ind(a[:, 0], b[:, 0], equal_var=False).confidence_interval()
    assert difference(a, b)[1:3] == pytest.approx((want.low, want.high))
    assert difference(a, b).population == BOTH


def test_variances_are_those_of_a_two_way_table():
    "The squares that a least-squares fit leaves when seeds, or problems, are taken out of it"
    values = np.random.default_rng(3).normal(size=(4, 15)) + np.arange(4)[:, None]
    seed, problem = (np.eye(n)[index.ravel()] for n, index in zip(values.shape, np.indices(values.shape)))

    def left(*columns):
        design = np.column_stack(columns)
        return ((values.ravel() - design @ np.linalg.lstsq(design, values.ravel())[0]) ** 2).sum()

    both = left(seed, problem)
    assert residual(values) == pytest.approx(both / (3 * 14) / 60)
    by_problems = problem_variances([values], [1.0]).problems
    assert by_problems == pytest.approx((left(seed) - both) / 14 / 60)
    assert Term(values.mean(1)).variance == pytest.approx((left(problem) - both) / 3 / 60)


def pigeonhole(values, rng, draws=2000):
    "Variance of the mean by Owen's bootstrap: rows and columns drawn independently"
    seeds, problems = values.shape
    rows = rng.multinomial(seeds, np.full(seeds, 1 / seeds), draws) / seeds
    columns = rng.multinomial(problems, np.full(problems, 1 / problems), draws) / problems
    return np.einsum("ds,sp,dp->d", rows, values, columns).var()


def test_two_way_variance_is_that_of_the_pigeonhole_bootstrap():
    "Many seeds, so that resampling them says something; it counts the residual more often (Owen 2007)"
    rng = np.random.default_rng(4)
    values = rng.normal(0, 1, (40, 1)) + rng.normal(0, 3, 400) + rng.normal(0, 1, (40, 400))
    v = problem_variances([values], [1.0])
    ours = Term(values.mean(1)).variance + v.problems - v.residual
    assert pigeonhole(values, rng) == pytest.approx(ours, rel=0.12)
    half, population = margin([values], [1.0])
    assert (half / 1.96) ** 2 == pytest.approx(ours, rel=0.1) and population == BOTH


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 4), st.integers(2, 30), st.integers(0, 10**6), st.floats(0, 1))
def test_shares_stay_between_zero_and_one_and_hold_their_value(seeds, problems, seed, p):
    values = np.random.default_rng(seed).random((seeds, problems)) < p
    e = mean_interval(values)
    assert 0 <= e.lo <= e.value <= e.hi <= 1 and e.lo < e.hi
    assert e.population == (BOTH if seeds > 1 else NEW_PROBLEMS)
    both = difference(values, values)
    assert both.value == 0 and both.lo < 0 < both.hi and relation(both) == "undecided"


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 4), st.integers(1, 4), st.integers(2, 20), st.integers(0, 10**6))
def test_a_difference_does_not_depend_on_the_order_of_problems_and_turns_with_its_sides(s, t, problems, seed):
    rng = np.random.default_rng(seed)
    a, b, places = rng.random((s, problems)), rng.random((t, problems)), rng.permutation(problems)
    e = difference(a, b)
    assert difference(a[:, places], b[:, places])[:3] == pytest.approx(e[:3])
    assert difference(b, a)[:3] == pytest.approx((-e.value, -e.hi, -e.lo))
    assert contrast([a, a, b], [0.5, 0.5, -1])[0] == pytest.approx(e.value)


def test_pairing_takes_out_what_is_hard_for_both():
    rng = np.random.default_rng(5)
    chances = rng.choice([0.02, 0.9], 400)
    a, b = (rng.random((3, 400)) < chances for _ in range(2))
    apart = difference(a, b[:, rng.permutation(400)])
    assert np.ptp(difference(a, b)[1:3]) < 0.7 * np.ptp(apart[1:3])


def test_what_seeds_and_problems_share_is_counted_once():
    "Pure noise, [40, 100]: its variance is 1 / 4,000, and not twice that"
    values = np.random.default_rng(10).normal(size=(40, 100))
    assert margin([values], [1.0])[0] == pytest.approx(2.02 * (1 / 4000) ** 0.5, rel=0.15)


def test_all_right_and_all_wrong_have_wilsons_interval_over_problems_however_many_seeds():
    for seeds in (1, 3):
        assert mean_interval(np.ones((seeds, 400)))[1:3] == wilson(400, 400)
        assert mean_interval(np.zeros((seeds, 400)))[1:3] == wilson(0, 400)
    e = difference(np.ones((3, 400)), np.zeros((3, 400)))
    assert e.value == 1 and 0.99 < e.lo < 1


def test_seeds_that_agree_by_luck_are_not_narrower_than_new_problems():
    rng = np.random.default_rng(6)
    row = rng.random(400) < 0.4
    alike = np.stack([row, rng.permutation(row)])  # the same accuracy, other problems
    least = 1.96 * np.sqrt(problem_variances([alike.astype(float)], [1.0]).problems)
    assert margin([alike.astype(float)], [1.0])[0] >= least


def test_one_problem_says_nothing_of_others():
    e = mean_interval([[1.0], [0.0], [1.0]])
    assert e.value == pytest.approx(2 / 3) and np.isnan(e.lo) and e.population == NOTHING
    assert relation(e) == "undecided"


def test_bad_outcomes_are_refused():
    for values, said in (([[1, np.nan]], "1 of 2 outcomes are missing"), ([], "give an array")):
        with pytest.raises(ValueError, match=said):
            mean_interval(values)
    with pytest.raises(ValueError, match="have 2 and 3 problems"):
        difference([1, 0], [1, 0, 1])
    with pytest.raises(ValueError, match="2 cells and 1 weights"):
        contrast([[1, 0], [1, 1]], [1.0])


def test_means_per_seed_alone_say_which_population_they_speak_of():
    noise = binomial_noise(0.4, 330)
    alike = Term(np.array([0.4] * 3), noise)
    assert of_means([alike]).population == NEW_SEEDS and half_width([alike]) > 0.03
    assert of_means([Term(np.array([0.4]), noise)]).population == NEW_PROBLEMS
    assert of_means([Term(np.array([0.4]))]).population == NOTHING


def test_ratio_bootstrap_is_scipys():
    rng = np.random.default_rng(7)
    den = rng.integers(1, 17, 200)
    num = rng.binomial(den, rng.beta(1, 1, 200))

    def ratio(n, d, axis=-1):
        return n.sum(axis) / d.sum(axis)

    theirs = bootstrap((num, den), ratio, paired=True, method="percentile", n_resamples=4000, rng=8)
    want = theirs.confidence_interval
    assert ratio_interval(num, den, 4000)[1:3] == pytest.approx((want.low, want.high), abs=0.006)


def test_ratios_above_one_and_below_zero_are_the_bootstraps_own():
    "Attempts per text are no share, so nothing is added for shares that are sure"
    texts = np.full(50, 4.0)
    attempts = np.random.default_rng(0).poisson(10, 50).astype(float)
    e = ratio_interval(attempts, texts)
    ratios = problem_weights(50) @ attempts / (problem_weights(50) @ texts)
    assert (e.lo, e.hi) == pytest.approx(tuple(np.quantile(ratios, (0.025, 0.975))))
    losses = ratio_interval(-attempts, texts)
    assert (losses.lo, losses.hi) == pytest.approx((-e.hi, -e.lo))


def test_ratio_intervals_hold_the_truth_and_pair_problems():
    "Half the problems are hard; one kind of response is frequent there, the other elsewhere"
    hard, easy, rng, held = 0.1, 0.8, np.random.default_rng(9), np.zeros(2)
    truth_a = (0.82 * hard + 0.26 * easy) / (0.82 + 0.26)
    truth_b = (0.26 * hard + 0.68 * easy) / (0.26 + 0.68)
    for i in range(200):
        chances = rng.choice([hard, easy], 300)
        den_a, den_b = rng.binomial(8, 0.9 - 0.8 * chances), rng.binomial(8, 0.2 + 0.6 * chances)
        a, b = (rng.binomial(den_a, chances), den_a), (rng.binomial(den_b, chances), den_b)
        e = ratio_difference(*a, *b, 400, i)
        held += holding(ratio_interval(*a, 400, i), truth_a), holding(e, truth_a - truth_b)
    assert held.min() / 200 >= 0.91


def test_ratio_of_all_or_nothing_keeps_an_interval():
    den = np.array([0, 3, 5, 1])
    assert ratio_interval(den, den)[:3] == pytest.approx((1.0, wilson(3, 3)[0], 1.0))
    assert ratio_interval(0 * den, den)[:3] == pytest.approx((0.0, 0.0, wilson(0, 3)[1]))
    same = ratio_difference(den, den, den, den)
    assert same.value == 0 and same.lo < 0 < same.hi
    with pytest.raises(ValueError, match="sum to 0"):
        ratio_interval(den, 0 * den)
    with pytest.raises(ValueError, match="the same problems on both sides"):
        ratio_difference(den, den, den[:2], den[:2])


def test_both_sides_of_a_ratio_difference_see_the_same_problems():
    rng = np.random.default_rng(11)
    den = rng.integers(1, 9, 100)
    num = rng.binomial(den, rng.beta(1, 1, 100))
    assert ratio_difference(num, den, num, den)[:3] == (0, 0, 0)
    assert np.ptp(ratio_difference(num + 1, den + 1, num, den)[1:3]) < np.ptp(ratio_interval(num, den)[1:3])


@given(st.integers(1, 50), st.integers(1, 20), st.integers(0, 99))
def test_resamples_are_counts_that_depend_on_the_seed_alone(problems, draws, seed):
    weights = problem_weights(problems, draws, seed)
    assert weights.shape == (draws, problems) and (weights.sum(1) == problems).all() and weights.min() >= 0
    assert (weights == problem_weights(problems, draws, seed)).all()


@given(st.floats(-1, 1), st.floats(0, 0.5), st.sampled_from([0.0, 0.05]))
def test_one_rule_for_verdicts(value, half, margin):
    e = Estimate(value, value - half, value + half, BOTH)
    said, turned = relation(e, margin), relation(Estimate(-value, -e.hi, -e.lo, BOTH), margin)
    assert (said == "above") == (e.lo > margin) and (said == "below") == (e.hi < -margin)
    assert (said == "level") == (margin > 0 and abs(e.lo) < margin and abs(e.hi) < margin)
    assert turned == dict(above="below", below="above").get(said, said)

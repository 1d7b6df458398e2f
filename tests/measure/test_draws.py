"""What many draws say: against all subsets, exact fractions and published counts; paired by problem"""

from fractions import Fraction
from itertools import combinations, product
from math import comb, factorial, prod

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import hypergeom

from stars.measure.draws import (
    Measure,
    covers,
    crossing,
    entropy,
    formula_of,
    gains,
    measured,
    measures,
    pass_at,
    per_problem,
    said_in,
    seeds_by_problems,
)
from stars.task.countdown import score


@st.composite
def outcomes(draw):
    "Draws per problem, and how many were right for a few problems"
    n = draw(st.integers(1, 40))
    return n, np.array(draw(st.lists(st.integers(0, n), min_size=1, max_size=8)))


@pytest.mark.parametrize("n", [1, 2, 5, 7])
def test_pass_at_k_is_the_mean_over_all_subsets(n):
    for c, k in product(range(n + 1), range(1, n + 1)):
        draws = [1] * c + [0] * (n - c)
        subsets = [max(s) for s in combinations(draws, k)]
        assert pass_at(c, n, k) == pytest.approx(sum(subsets) / len(subsets), abs=1e-14)


@given(outcomes())
def test_pass_at_k_begins_at_accuracy_rises_and_ends_at_solved_at_all(drawn):
    n, right = drawn
    curve = np.array([pass_at(right, n, k) for k in range(1, n + 1)])
    np.testing.assert_allclose(curve[0], right / n, atol=1e-14)
    np.testing.assert_array_equal(curve[-1], right > 0)
    assert (np.diff(curve, axis=0) >= -1e-14).all()
    np.testing.assert_allclose(curve, [hypergeom.sf(0, n, right, k) for k in range(1, n + 1)], atol=1e-9)


def test_pass_at_k_where_binomials_no_longer_fit_a_float():
    for c, k in ((1, 1500), (3, 700), (700, 9), (1999, 2), (0, 2000)):
        exact = 1 - Fraction(comb(2000 - c, k), comb(2000, k))
        assert pass_at(c, 2000, k) == pytest.approx(float(exact), rel=1e-9)


def test_problems_may_have_different_numbers_of_draws():
    right, drawn = np.array([[1, 2], [0, 4]]), np.array([[4, 8], [4, 4]])
    want = [[pass_at(c, n, 3) for c, n in zip(*rows)] for rows in zip(right, drawn)]
    np.testing.assert_allclose(pass_at(right, drawn, 3), want)
    for k in (0, 5):
        with pytest.raises(ValueError, match=f"k={k} must lie between 1 and the 4 responses"):
            pass_at(right, drawn, k)


@given(outcomes())
def test_cover_falls_and_begins_at_solved_at_all(drawn):
    n, right = drawn
    thresholds = [1e-6, *(j / n for j in range(1, n + 1))]
    curve = np.array([covers(right, n, tau) for tau in thresholds])
    assert (np.diff(curve, axis=0) <= 0).all()
    np.testing.assert_array_equal(curve[0], pass_at(right, n, n))
    np.testing.assert_array_equal(curve[-1], right == n)


def test_cover_at_shares_that_a_float_cannot_hold():
    "Reached exactly is reached, whichever way the share was computed; one response less is not"
    for n in range(1, 60):
        for j in range(1, n + 1):
            for tau in (j / n, min(1, j * (1 / n)), float(Fraction(j, n))):
                assert covers(j, n, tau) == 1 and covers(j - 1, n, tau) == 0, (j, n, tau)
    for tau in (0, -0.5, 1.01, np.nan):
        with pytest.raises(ValueError, match="tau="):
            covers(1, 2, tau)


@given(outcomes(), st.data())
def test_pass_at_k_is_a_weighted_mean_of_cover(drawn, data):
    "Summation by parts of the estimator: weight C(n-j, k-1)/C(n, k) at τ = j/n"
    n, right = drawn
    k = data.draw(st.integers(1, n))
    weighted = sum(comb(n - j, k - 1) / comb(n, k) * covers(right, n, j / n) for j in range(1, n + 1))
    np.testing.assert_allclose(pass_at(right, n, k), weighted, atol=1e-12)


def expressions(numbers):
    "Every expression over all of these numbers, fully bracketed"
    if len(numbers) == 1:
        yield str(numbers[0])
    for size in range(1, len(numbers)):
        for left in combinations(range(len(numbers)), size):
            rest = [n for i, n in enumerate(numbers) if i not in left]
            for a, b in product(expressions([numbers[i] for i in left]), expressions(rest)):
                yield from (f"({a} {sign} {b})" for sign in "+-*/")


@pytest.mark.parametrize("numbers,formulas", [((3, 5), 6), ((1, 2, 3), 68), ((3, 5, 7, 8), 1170)])
def test_formulas_are_as_many_as_there_are_inequivalent_expressions(numbers, formulas):
    "OEIS A140606: expressions over n operands that differ by more than commutativity, associativity, signs"
    assert len({formula_of(e) for e in expressions(numbers)}) == formulas


@pytest.mark.parametrize(
    "one,other,same",
    [
        ("(3 + 5) * 2", "2*( (5+3) )", True),
        ("9 - (4 - 3)", "9-4+3", True),
        ("8 / (4 / 2)", "8 * 2 / 4", True),
        ("3 + 5 = 8", "5 + 3", True),
        ("8 = 3 + 5", "5 + 3", True),
        ("`6 × 2`", r"\boxed{2 \cdot 6}", True),
        ("4 + 7 - 4", "7 + 4 - 4", True),  # a number that occurs twice is one number
        ("6 * 2 + 4", "6 + 2 * 5", False),  # equal by value only
        ("7 * 1", "7 / 1", False),
        ("2 + 2", "2 * 2", False),
        ("1 + 2", "3 + 0", False),  # the stand-in of a sum is not the sum of the stand-ins
    ],
)
def test_what_is_one_solution(one, other, same):
    assert formula_of(one) is not None and (formula_of(one) == formula_of(other)) is same


def test_what_cannot_be_read_stands_for_itself():
    say = "… <answer>{}</answer>".format
    assert said_in("3 + 5") == "" and said_in(say("3 plus 5")) == said_in(say(" 3  plus 5 "))
    assert len({said_in(say(a)) for a in ("3 plus 5", "3 plus 6", "", "8", "3 + 5")}) == 5
    assert said_in(say("5 / (3 - 3)")).startswith("?")


def zhang(counts):
    "Entropy as Zhang (2012) writes it, as a sum over v"
    n, shares = sum(counts), [Fraction(c, sum(counts)) for c in counts]

    def z(v):
        terms = sum(q * prod(1 - q - Fraction(j, n) for j in range(v)) for q in shares)
        return Fraction(n ** (v + 1) * factorial(n - v - 1), factorial(n)) * terms

    return float(sum(z(v) / v for v in range(1, n)))


@given(st.lists(st.integers(1, 6), min_size=1, max_size=6))
def test_entropy_is_zhangs(counts):
    shares = np.array(counts) / sum(counts)
    assert entropy([0, *counts]) == pytest.approx(zhang(counts), abs=1e-9)
    assert entropy(counts) >= -(shares @ np.log(shares)) - 1e-12 and entropy([sum(counts)]) == 0


def draws(rng, chances, step, seed, n=6):
    "Responses to problems that are answered rightly with these chances, in one of two ways"
    texts = ("2 * ( 3 + 5 )", "( 5 + 3 ) * 2", "3 + 5 + 2")
    rows = []
    for i, p in enumerate(chances):
        for right in rng.random(n) < p:
            text = f"so <answer>{texts[rng.integers(2) if right else 2]}</answer>"
            rows.append(dict(index=i, generated=text, score=score(text, (2, 3, 5), 16)))
    return pd.DataFrame(rows).assign(model="plain", condition="base", seed=seed, step=step)


@pytest.fixture
def study():
    rng = np.random.default_rng(0)
    chances = rng.beta(0.5, 1, 60)
    table = [draws(rng, p, t, s) for t, p in ((0, chances), (9, chances**0.5)) for s in (0, 1)]
    return pd.concat(table).sample(frac=1, random_state=0)


def test_a_row_per_problem(study):
    problems = per_problem(study)
    assert len(problems) == 2 * 2 * 60 and (problems.drawn == 6).all()
    assert ((problems.found == 1) == (problems.right > 0)).all()  # both texts are one solution
    assert (problems.tried == problems.found + (problems.right < 6)).all()
    assert ((problems.entropy == 0) == (problems.tried == 1)).all()
    mine = study[(study.seed == 1) & (study.step == 9)]
    row = problems[(problems.seed == 1) & (problems.step == 9)]
    assert row.right.mean() / 6 == pytest.approx((mine.score == 1).mean())


def test_the_table_has_every_measure_of_every_checkpoint(study):
    problems = per_problem(study)
    table = measured(problems)
    assert len(table) == 4 * len(measures(problems)) and (table.n == 60).all()
    assert set(table.population) == {"new problems"}
    assert ((table.lo <= table.value) & (table.value <= table.hi)).all()
    first = table[(table.measure == "pass@k") & (table["at"] == 1)].set_index(["seed", "step"]).value
    accuracy = study.groupby(["seed", "step"]).score.apply(lambda s: (s == 1).mean())
    pd.testing.assert_series_equal(first.sort_index(), accuracy, check_names=False)
    ks = table[table.measure == "pass@k"]["at"].unique()
    assert ks.tolist() == [1, 2, 4, 6]  # powers of two, and all that were drawn
    pooled = measured(problems, ["model", "condition", "step"], [Measure("entropy")])
    assert set(pooled.population) == {"new problems and new seeds"} and (pooled.n == 120).all()


def test_gains_are_paired_by_problem(study):
    problems, k = per_problem(study), [Measure("pass@k", 1)]
    gain = gains(problems, which=k).iloc[0]
    start, trained = (problems[problems.step == t] for t in (0, 9))
    values = [seeds_by_problems(side, k[0]) for side in (trained, start)]
    assert gain.value == pytest.approx(values[0].mean() - values[1].mean())
    one_seed = problems[problems.seed == 0]
    paired = gains(one_seed, which=k).iloc[0]
    alone = measured(one_seed, which=k)
    apart = np.hypot(*(alone.hi - alone.lo))
    assert paired.hi - paired.lo < 0.8 * apart


def test_what_cannot_be_compared_is_refused(study):
    with pytest.raises(ValueError, match="draws lack the columns score"):
        per_problem(study.drop(columns="score"))
    with pytest.raises(ValueError, match="draws are empty"):
        per_problem(study[:0])
    lacking = study[(study.seed == 0) | (study["index"] != 7)]
    with pytest.raises(ValueError, match=r"seeds \[1\] lack problem 7"):
        gains(per_problem(lacking))
    with pytest.raises(ValueError, match="draws are of step 0 only"):
        gains(per_problem(study[study.step == 0]))


def test_where_curves_cross():
    assert crossing([1, 2, 4], [0.1, 0.05, 0.01]) is None
    assert crossing(pd.Series([1, 4], [7, 9]), pd.Series([-0.1, 0.1], [7, 9])) == pytest.approx(2)
    assert crossing([1, 2, 4, 8], [0.3, 0.1, -0.1, 0.2]) == pytest.approx(2 * 2**0.5)
    assert crossing([1, 2, 4], [0.1, 0.0, -0.1]) == pytest.approx(2)
    assert crossing([1, 2, 4], [0.1, 0.0, 0.1]) is None  # touching is no crossing

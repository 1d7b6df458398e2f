"What a habit goes with, on problems and texts of equal difficulty"

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stars.measure.payoff import (
    by_count,
    compare,
    divided_at,
    first_try,
    fresh_or_further,
    further_tries,
    matched,
    payoff,
    prepared,
    thirds,
    unmatched,
    weighed,
)
from stars.measure.trees import problem_table


@pytest.mark.parametrize(
    "text, wanted",
    [
        ("10 * 3 = 30, 30 + 4 = 34. That works.", "hit"),
        ("10 * 3 + 4 = 34", "hit"),
        ("10 * 4 = 40, 40 - 3 = 37. Too high. Back: 10 * 3 = 30, 30 + 4 = 34.", "missed"),
        ("10 * 4 = 40, which leads nowhere. Instead 10 * 3 = 30, 30 + 4 = 34.", "missed"),  # given up
        ("3 + 4 = 7, 7 + 10 = 34.", "hit"),  # for its writer
        ("34 - 4 = 30, so I need 30. 10 * 3 = 30, 30 + 4 = 34.", "hit"),  # from the target first
        ("Hm. </think> <answer> 10 * 3 </answer>", "none"),
        ("", "none"),
    ],
)
def test_the_first_try_is_the_first_line_that_uses_all_numbers(text, wanted):
    assert first_try(text, np.array([3, 4, 10]), np.int64(34)) == wanted


@settings(deadline=None)
@given(st.lists(st.integers(1, 8), min_size=1, max_size=60))
def test_equal_chances_fall_into_the_same_third(chances):
    chance = pd.Series(chances) / 100
    third = thirds(chance)
    assert (third.groupby(chance).nunique() == 1).all()
    rank = third.map(dict(hard=0, middle=1, easy=2))
    assert (rank.iloc[np.argsort(chances, kind="stable")].diff().dropna() >= 0).all()


def test_different_chances_make_three_equal_groups():
    assert thirds(pd.Series(range(30))).value_counts().to_dict() == dict(hard=10, middle=10, easy=10)


responses = st.lists(
    st.tuples(st.integers(0, 5), st.integers(0, 1), st.booleans(), st.booleans()), min_size=2, max_size=80
)


def table(rows):
    return pd.DataFrame(rows, columns=["index", "seed", "right", "shows"])


@settings(deadline=None)
@given(responses)
def test_a_matched_difference_is_that_of_a_regression_with_a_constant_per_problem(rows):
    rows = table(rows)
    strata = rows.groupby(["index", "seed"]).ngroup().to_numpy()
    design = np.column_stack([rows.shows, np.eye(strata.max() + 1)[strata]]).astype(float)
    match = matched(rows, rows.shows)
    if match.problems:
        slope = np.linalg.lstsq(design, rows.right.astype(float), rcond=None)[0][0]
        assert match.difference.value == pytest.approx(slope, abs=1e-9)
        assert match.with_ - match.without == pytest.approx(slope, abs=1e-9)
    else:
        assert np.isnan(match.difference.value)


@settings(deadline=None)
@given(responses)
def test_problems_with_one_kind_of_response_do_not_matter(rows):
    rows = table(rows)
    more = pd.concat([rows, table([(9, 0, True, True)] * 5 + [(8, 0, False, False)] * 5)], ignore_index=True)
    assert matched(rows, rows.shows).problems == matched(more, more.shows).problems
    pd.testing.assert_frame_equal(weighed(rows, rows.shows), weighed(more, more.shows))


def made_up(rng, goes_back=0.8, better=1.0, problems=250, draws=16, most=4):
    "Responses that go back after a miss; further tries hit `better` times as often as first ones"
    rows = []
    for index, p in enumerate(rng.beta(1, 5, problems)):
        for _ in range(draws):
            count, hit = 0, rng.random() < p
            first = "hit" if hit else "missed"
            while not hit and count < most and rng.random() < goes_back:
                count, hit = count + 1, rng.random() < min(1, p * better)
            third = "hard" if p < 0.07 else "middle" if p < 0.2 else "easy"
            rows.append((index, 0, bool(hit), count, first, third, 10 + 5 * count))
    names = ["index", "seed", "right", "backtracking", "first_try", "difficulty", "response_tokens"]
    run = dict(model="m", condition="made_up", step=0, verification=0, subgoal=0, backward=0, length=1)
    return pd.DataFrame(rows, columns=names).assign(**run, score=lambda r: r.right.astype(float))


def test_a_habit_without_effect_looks_costly_raw_and_level_on_the_same_problem():
    rng, rows = np.random.default_rng(0), []
    for index, p in enumerate(rng.uniform(0.05, 0.95, 300)):
        shows = rng.random(16) < 1 - p  # on hard problems
        rows += [(index, 0, bool(rng.random() < p), bool(s)) for s in shows]
    rows = table(rows)
    raw, same = unmatched(rows, rows.shows).difference, matched(rows, rows.shows).difference
    assert raw.hi < -0.2
    assert same.lo < 0 < same.hi and abs(same.value) < 0.05


def test_a_habit_that_helps_looks_costly_until_first_hits_are_left_out():
    rows = made_up(np.random.default_rng(0))
    assert compare(rows, "backtracking", "raw").difference.hi < 0
    assert compare(rows, "backtracking", "problem").difference.hi < 0
    assert compare(rows, "backtracking", "missed").difference.lo > 0.1


def test_a_further_try_is_worth_what_it_is_worth():
    for better, relation in ((1.0, "level"), (1.8, "above")):
        rows = made_up(np.random.default_rng(1), better=better)
        each = fresh_or_further(rows, per="try").difference
        assert fresh_or_further(rows, per="response").difference.lo > 0.05
        assert each.lo < 0 < each.hi if relation == "level" else each.lo > 0.02


def test_similar_lengths_are_compared_within_a_problem():
    rows = table([(i, 0, s, s) for i in range(12) for s in (True, False)]).assign(
        backtracking=lambda r: r.shows
    )
    rows = rows.assign(length=np.where(rows.shows, 5, 1))
    assert compare(rows, "backtracking", "problem").difference.value == 1
    assert compare(rows, "backtracking", "length").problems == 0  # no two of similar length


def test_unknown_comparisons_are_named():
    rows = made_up(np.random.default_rng(0), problems=3)
    with pytest.raises(ValueError, match="comparison='fair': choose one of raw"):
        compare(rows, "backtracking", "fair")
    with pytest.raises(ValueError, match="per='token': choose response or try"):
        fresh_or_further(rows, per="token")


def test_habits_divide_responses_where_both_sides_have_some():
    shown = dict(
        verification=[1] * 50 + [2] * 50,  # all show it: more or less
        backtracking=[1] * 50 + [0] * 50,
        subgoal=[1] + [0] * 99,  # too rare
        backward=[1] * 100,  # always the same
    )
    before = pd.DataFrame(shown).assign(step=0)
    assert divided_at(before) == dict(verification=2, backtracking=1)
    after = before.assign(step=60, backtracking=1)  # nobody is left without
    assert divided_at(pd.concat([before, after])) == dict(verification=2)


def test_more_or_less_of_a_habit_is_compared_from_a_count_on():
    rows = table([(i, 0, n == 2, True) for i in range(12) for n in (1, 2)])
    rows = rows.assign(subgoal=[1, 2] * 12, first_try="missed", length=1)
    assert compare(rows, "subgoal", "problem", least=2).difference.value == 1
    assert compare(rows, "subgoal", "problem").problems == 0


def test_the_table_has_every_comparison_in_every_group():
    rows = made_up(np.random.default_rng(0))
    found = payoff(rows)
    assert set(found.habit) == {"backtracking"} and len(found) == 4 * 4
    assert set(found.difficulty) == {"all", "hard", "middle", "easy"}
    tries = further_tries(rows).set_index(["difficulty", "per"])["without"]
    assert tries["hard", "try"] < tries["middle", "try"] < tries["easy", "try"]


def test_accuracy_by_count_by_hand():
    rows = table([(i, 0, i % 2 == 0, True) for i in range(12)] * 3)
    rows = rows.assign(backtracking=[0] * 12 + [1] * 12 + [5] * 12, difficulty="easy", score=1.0)
    rows.loc[rows.backtracking == 5, "right"] = False
    counted = by_count(rows, "backtracking").set_index("count")
    assert counted["value"].to_dict() == {"0": 0.5, "1": 0.5, "2+": 0.0}
    assert counted.hi["2+"] > 0  # none of twelve is not never


def test_lengths_are_ranked_within_a_model_and_checkpoint():
    texts = "10 * 3 = 30, 30 + 4 = 34."
    base = dict(model="m", condition="base", seed=0, index=0, generated=texts, target=34, score=1.0)
    draws = pd.DataFrame(
        [base | dict(step=s, response_tokens=n * (1 + s)) for s in (0, 60) for n in range(1, 11)]
    )
    draws = draws.assign(numbers=[(3, 4, 10)] * 20)
    rows = prepared(draws, problem_table(draws))
    for _, run in rows.groupby("step"):
        assert run.length.tolist() == [1, 1, 2, 2, 3, 3, 4, 4, 5, 5]
    assert rows.right.all() and set(rows.first_try) == {"hit"}

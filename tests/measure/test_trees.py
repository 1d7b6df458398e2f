"Shapes of expressions, and success by shape"

from fractions import Fraction
from itertools import permutations, product

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stars.measure.trees import (
    _written,
    leaves,
    multiplies,
    operations,
    pattern,
    problem_table,
    shape,
    shares_tried,
    solutions,
    success,
    tree_of,
    tried,
    weight,
)
from stars.task.countdown import Problem, parse_expression
from stars.task.problems import difficulty

numbers = st.integers(1, 20)
expressions = st.recursive(
    numbers.map(str),
    lambda part: st.builds("({} {} {})".format, part, st.sampled_from("+-*/"), part),
    max_leaves=6,
)


def value(text):
    "Exact value, None where something is divided by zero"
    try:
        return parse_expression(text)[0]
    except ValueError:
        return None


@settings(deadline=None)
@given(expressions)
def test_the_normal_form_keeps_value_and_numbers(text):
    if value(text) is None:
        return
    tree = tree_of(text)
    assert value(_written(tree, str)) == value(text)
    assert sorted(leaves(tree)) == sorted(parse_expression(text)[1])
    assert tree_of(_written(tree, str)) == tree
    assert len(operations(tree)) == weight(tree) - 1


@settings(deadline=None)
@given(expressions, expressions, expressions)
def test_writing_the_same_calculation_otherwise_makes_no_other_tree(a, b, c):
    for one, other in (
        (f"{a} + {b}", f"{b} + {a}"),
        (f"({a} + {b}) + {c}", f"{a} + ({c} + {b})"),
        (f"{a} - ({b} - {c})", f"({c} - {b}) + {a}"),
        (f"{a} * {b} / {c}", f"{b} / {c} * {a}"),
        (f"{a} / ({b} / {c})", f"{c} * {a} / {b}"),
    ):
        if value(one) is not None and value(other) is not None:
            assert tree_of(one) == tree_of(other)


def kept(operator, a, b):
    "One operation under the rules of the generator: whole, not negative; None otherwise"
    if a is None or b is None or operator == "-" and a < b or operator == "/" and (b == 0 or a % b):
        return None
    return {"+": a + b, "-": a - b, "*": a * b, "/": a // b if b else None}[operator]


def by_hand(problem):
    "Trees of every written expression over three numbers that makes the target"
    found = set()
    for (a, b, c), p, q in product(permutations(problem.numbers), "+-*/", "+-*/"):
        if kept(q, kept(p, a, b), c) == problem.target:
            found.add(tree_of(f"({a} {p} {b}) {q} {c}"))
        if kept(p, a, kept(q, b, c)) == problem.target:
            found.add(tree_of(f"{a} {p} ({b} {q} {c})"))
    return found


@settings(max_examples=60, deadline=None)
@given(st.tuples(numbers, numbers, numbers), st.integers(0, 60))
def test_solutions_are_those_of_every_expression_one_can_write(given_numbers, target):
    problem = Problem(given_numbers, target)
    assert solutions(problem) == by_hand(problem)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 15), min_size=2, max_size=4), st.integers(0, 60))
def test_there_are_as_many_solutions_as_difficulty_counts(given_numbers, target):
    problem = Problem(tuple(given_numbers), target)
    assert len(solutions(problem)) == difficulty(problem)[0]
    assert all(sorted(leaves(t)) == sorted(given_numbers) for t in solutions(problem))


def test_solutions_name_what_they_cannot_list():
    for given_numbers in ((5,), (1, 2, 3, 4, 5, 6), (0, 2, 3)):
        with pytest.raises(ValueError, match="two to five numbers"):
            solutions(Problem(given_numbers, 5))


@pytest.mark.parametrize(
    "text, wanted",
    [
        ("9 - (2 - 4)", "chain A+B-C"),
        ("3 / (4 / 8)", "chain A*B/C"),
        ("20 + 3 * 4", "left A*B+C"),
        ("20 - 3 * 4", "right A-B*C"),
        ("20 * (4 - 3)", "left (A-B)*C"),
        ("12 / (7 - 4)", "right A/(B-C)"),
        ("12 - 6 / 3", "right A-B/C"),
        ("3 * 4 - 2 * 5", "balanced A*B-C*D"),
        ("30 - 2 * (3 + 4)", "right A-(B+C)*D"),
        ("30 - 2 * 3 - 4", "left A-B*C-D"),
    ],
)
def test_shape_and_pattern(text, wanted):
    assert f"{shape(tree_of(text))} {pattern(tree_of(text))}" == wanted


@settings(deadline=None)
@given(st.tuples(numbers, numbers, numbers), *[st.sampled_from("+-*/")] * 2, st.booleans())
def test_three_numbers_lean_right_where_a_compound_is_taken_away_or_divided_by(n, p, q, left):
    a, b, c = n
    text = f"({a} {p} {b}) {q} {c}" if left else f"{a} {p} ({b} {q} {c})"
    if value(text) is None:
        return
    mixed = (p in "+-") != (q in "+-")
    wanted = "chain" if not mixed else "right" if not left and p in "-/" else "left"
    assert shape(tree_of(text)) == wanted


def test_an_answer_is_read_and_never_run():
    texts = ["__import__('os').getcwd()", "2**3", "3 + 4", "34", "", "3 + 4 + 10 = 18"]
    draws = pd.DataFrame(
        dict(generated=[f"<answer>{t}</answer>" for t in texts] + ["no tag"], numbers=[(3, 4, 10)] * 7)
    )
    assert tried(draws).isna().all(axis=None)
    draws = pd.DataFrame(dict(generated=["<answer>10 × 3 + 4 = 34</answer>"], numbers=[np.array([3, 4, 10])]))
    assert tried(draws).to_numpy().tolist() == [["left", "yes"]]


def responses(scores, index, step=0, **columns):
    n = len(scores)
    each = dict(model="m", condition="base", seed=0, step=step, index=index, score=scores) | columns
    return pd.DataFrame({k: v if isinstance(v, list) else [v] * n for k, v in each.items()})


@pytest.fixture
def problems():
    "Twelve problems of each of two kinds"
    found = [Problem((a, b, c), a + b + c) for a, b, c in ((1, 2, n) for n in range(4, 16))]
    found += [Problem((7, 11, n), 77 + n) for n in range(2, 14)]
    return found


def test_success_counts_right_responses_by_kind_and_their_gain(problems):
    index = [i for i in range(24) for _ in range(2)]
    given_ = dict(numbers=[problems[i].numbers for i in index], target=[problems[i].target for i in index])
    before = responses([1.0, 0.1] * 12 + [0.1, 0.1] * 12, index, **given_)
    after = responses([1.0, 1.0] * 12 + [1.0, 0.0] * 6 + [0.0, 0.0] * 6, index, step=60, **given_)
    draws = pd.concat([before, after], ignore_index=True)
    table = problem_table(draws)
    assert table.multiplies.tolist() == ["not needed"] * 12 + ["needed"] * 12
    solved = success(draws, table, "multiplies").set_index(["group", "what", "step"])
    assert solved.loc[("not needed", "accuracy", 0), "value"] == 0.5
    assert solved.loc[("not needed", "gain", 60), "value"] == 0.5
    assert solved.loc[("needed", "accuracy", 60), "value"] == 0.25
    gain = solved.loc[("needed", "gain", 60)]
    assert gain.lo < 0.25 < gain.hi and gain.problems == 12 and gain.responses == 24


def test_a_handful_of_problems_has_no_interval(problems):
    index = list(range(9))
    draws = responses(
        [1.0] * 9,
        index,
        numbers=[problems[i].numbers for i in index],
        target=[problems[i].target for i in index],
    )
    row = success(draws, problem_table(draws), "multiplies").iloc[0]
    assert row.value == 1 and np.isnan(row.lo) and np.isnan(row.hi)


def test_an_index_that_stands_for_two_problems_is_an_error():
    draws = pd.DataFrame(dict(index=[0, 0], numbers=[(1, 2, 3), (1, 2, 4)], target=[6, 7]))
    with pytest.raises(ValueError, match="index 0 stands for several problems"):
        problem_table(draws)


def test_problems_of_different_counts_of_numbers_share_a_table():
    found = [Problem((3, 4, 10), 34), Problem((2, 3, 5, 6), 20), Problem((2, 3), 50)]
    draws = pd.DataFrame(
        dict(index=[2, 0, 1], numbers=[p.numbers for p in found], target=[p.target for p in found])
    )
    table = problem_table(draws)
    for i, p in zip((2, 0, 1), found):
        assert (table.solutions[i], table.chance[i]) == difficulty(p)
    assert table["only"][1] == "none" and table.solutions[1] == 0


def test_shares_of_shapes_sum_to_one_over_the_answers_that_count(problems):
    answers = ["1 + 2 + 4", "1 * 2 + 4", "1 - 2 * 4", "nonsense"]
    draws = responses(
        [1.0, 0.1, 0.1, 0.1] * 12,
        [i for i in range(12) for _ in range(4)],
        numbers=[(1, 2, 4)] * 48,
        generated=[f"<answer>{a}</answer>" for a in answers] * 12,
    )
    shares = shares_tried(draws)
    assert shares.set_index("group")["value"].round(6).to_dict() == dict(
        chain=0.333333, left=0.333333, right=0.333333
    )
    assert (shares.responses == 36).all()
    uses = shares_tried(draws, "multiplies").set_index("group")["value"]
    assert uses.round(6).to_dict() == dict(no=0.333333, yes=0.666667)


@settings(deadline=None)
@given(expressions)
def test_a_tree_multiplies_where_a_sign_says_so(text):
    if value(text) is not None:
        assert multiplies(tree_of(text)) == any(sign in text for sign in "*/")
        assert isinstance(value(text), Fraction)

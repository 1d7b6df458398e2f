"What follows what in a text, against texts whose order is known and against brute force"

import ast
import random
from itertools import permutations, product

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import mannwhitneyu

from stars.habits.behaviors import HABIT_NAMES
from stars.measure.order import (
    ANSWER,
    ATTEMPTS,
    EVENTS,
    FAILED,
    NO_ANSWER,
    REACHED,
    START,
    attempt_changes,
    attempt_shares,
    find_attempts,
    made_from,
    matrix,
    memory,
    pairs_won,
    predictors,
    read_order,
    read_orders,
    repeated,
    repeats_by_chance,
    state_places,
    states,
    transition_changes,
    transitions,
    tries,
)
from stars.task.countdown import parse_expression

TURNS = ("let me try something else :", "so try another way :", "start over :", "go back and try again :")
NUMBERS, TARGET = (3, 5, 14), 22  # 3 + 5 + 14


def verdict(value):
    return f"{value} is {TARGET}, goal reached." if value == TARGET else f"{value} is not {TARGET}."


def line(expression, rng=random):
    "A line of arithmetic for `(a op b) op c`, its sides in any order where that changes nothing"
    (a, first, b), second, c = expression
    x, y = (a, b) if first in "-/" or rng.random() < 0.5 else (b, a)
    between = eval(f"{a} {first} {b}")
    p, q = (between, c) if second in "-/" or rng.random() < 0.5 else (c, between)
    value = eval(f"{between} {second} {c}")
    return f"{x} {first} {y} = {between}, {p} {second} {q} = {value}.", value


def search(expressions, rng=random, checks=True):
    "A text that makes these attempts, checks each and turns back after each"
    said = []
    for i, expression in enumerate(expressions):
        told, value = line(expression, rng)
        said.append(f"{rng.choice(TURNS)} " * (i > 0) + told + f" {verdict(value)}" * checks)
    return " ".join(said) + " </think> <answer> 3 + 5 + 14 </answer>"


EXPRESSIONS = [((a, f, b), s, c) for a, b, c in ((14, 5, 3), (14, 3, 5)) for f, s in product("+-*", repeat=2)]


def orders_of(texts, **columns):
    "`read_orders` of texts on one problem, five texts to an index"
    rows = pd.DataFrame(dict(generated=texts)).assign(numbers=[NUMBERS] * len(texts), target=TARGET)
    rows = rows.assign(
        index=np.arange(len(texts)) // 5, score=1.0, model="m", condition="base", seed=0, step=0
    )
    return read_orders(rows.assign(**columns))


# ---- attempts


@given(st.lists(st.sampled_from(EXPRESSIONS), min_size=1, max_size=8), st.randoms(use_true_random=False))
@settings(deadline=None)
def test_attempts_and_repeats_are_those_that_were_written(expressions, rng):
    found = find_attempts(search(expressions, rng), NUMBERS, TARGET)
    assert len(found) == len(expressions)
    values = [eval(f"({a}{f}{b}){s}{c}") for (a, f, b), s, c in expressions]
    assert [a.value for a in found] == values and [a.reached for a in found] == [v == TARGET for v in values]
    assert repeated(found) == [e in expressions[:i] for i, e in enumerate(expressions)]  # brute force


@given(st.lists(st.sampled_from(EXPRESSIONS), min_size=1, max_size=8), st.randoms(use_true_random=False))
@settings(deadline=None)
def test_a_turn_in_words_is_enough_to_begin_anew(expressions, rng):
    found = find_attempts(search(expressions, rng, checks=False), NUMBERS, TARGET)
    assert len(found) == len(expressions)


leaf = st.integers(1, 30).map(str)
expression = st.recursive(
    leaf,
    lambda e: st.tuples(e, st.sampled_from("+-*/"), e).map(lambda t: f"({t[0]} {t[1]} {t[2]})"),
    max_leaves=6,
)


def swapped(node, rng):
    "The same expression with the sides of some sums and products exchanged"
    if isinstance(node, ast.BinOp):
        node.left, node.right = swapped(node.left, rng), swapped(node.right, rng)
        if isinstance(node.op, ast.Add | ast.Mult) and rng.random() < 0.5:
            node.left, node.right = node.right, node.left
    return node


def made(text):
    return made_from(ast.parse(text, mode="eval").body, {})


@given(expression, st.randoms(use_true_random=False))
def test_what_an_expression_makes(text, rng):
    m = made(text)
    assert made_from(swapped(ast.parse(text, mode="eval").body, rng), {}) == m
    assert made(m.expression) == m  # its form is a fixed point
    try:
        value, used = parse_expression(text)
    except ValueError:  # a division by zero
        assert m.value is None
    else:
        assert m.value == value and list(m.numbers) == sorted(used)


@pytest.mark.parametrize("a, b", [("3 - 4", "4 - 3"), ("6 / 3", "3 / 6"), ("(1 + 2) + 3", "1 + (2 + 3)")])
def test_other_paths_are_other_attempts(a, b):
    assert made(a).expression != made(b).expression


@pytest.mark.parametrize(
    "text, numbers, target, reached",
    [
        ("6 / 3 = 2, 2 + 7 = 14.", (7, 3, 6), 14, [False]),  # claims what does not hold
        ("6 / 3 = 2, 2 * 7 = 14.", (7, 3, 6), 14, [True]),
        ("7 * 2 = 14.", (7, 2, 6), 14, [False]),  # leaves a number out
        (
            "working backwards from 14 : 14 - 6 = 8, so i need 8. 4 * 2 = 8, 8 + 6 = 14.",
            (4, 2, 6),
            14,
            [True],
        ),
        ("4 * 2 = 8, 8 + 6 = 14. check : 8 + 6 = 14, so it works.", (4, 2, 6), 14, [True]),  # a check is none
        (
            "6 / 3 = 2, 2 + 7 = 14. 14 is not 14. start over : 6 - 3 = 3, 3 + 7 = 10.",
            (7, 3, 6),
            14,
            [False, False],
        ),
        ("(10 / 4) * 6 = 15.", (10, 4, 6), 15, [True]),
        ("no arithmetic", (1, 2), 3, []),
        ("", (1, 2), 3, []),
    ],
)
def test_what_counts_as_reached(text, numbers, target, reached):
    assert [a.reached for a in find_attempts(text, numbers, target)] == reached


@given(st.text("0123456789+-*/x()=., →isnot", max_size=60))
@settings(deadline=None)
def test_any_text_can_be_read(text):
    for a in find_attempts(text, (3, 4, 5), 12):
        assert 0 <= a.start < a.end <= len(text)
    order = read_order(text, (3, 4, 5), 12)
    assert all(0 <= p < 1 for p in order.places + order.attempt_places)


# ---- sequences


def test_order_of_a_known_text():
    text = search([((14, "-", 5), "*", 3), ((14, "+", 5), "+", 3)])
    order = read_order(text, NUMBERS, TARGET)
    assert states(order) == [START, "verification", "backtracking", "verification", ANSWER]
    assert states(order, ATTEMPTS) == [START, FAILED, REACHED, ANSWER]
    whole = [START, FAILED, "verification", "backtracking", REACHED, "verification", ANSWER]
    assert states(order, EVENTS) == whole
    assert list(order.places) == sorted(order.places)
    assert order.places[1] == pytest.approx(
        min(text.find(t) for t in TURNS if t in text) / len(text), abs=0.05
    )


def test_a_text_without_habits_goes_from_start_to_answer():
    t = transitions(orders_of(["3 + 5 = 8, 8 + 14 = 22. <answer> 3 + 5 + 14 </answer>"]))
    assert matrix(t).loc[START, ANSWER] == 1 and list(matrix(t).index) == [START]
    assert states(read_order("3 + 5 =", NUMBERS, TARGET)) == [START, NO_ANSWER]
    assert len(state_places(orders_of(["", "22."]))) == 0


@st.composite
def tables(draw):
    rng = draw(st.randoms(use_true_random=False))
    lists = draw(st.lists(st.lists(st.sampled_from(EXPRESSIONS), max_size=4), min_size=2, max_size=12))
    return orders_of(
        [search(e, rng) if e else rng.choice(("", "22.", "<answer> 3 </answer>")) for e in lists]
    )


@given(tables(), st.randoms(use_true_random=False))
@settings(deadline=None, max_examples=25)
def test_transitions_are_probabilities_and_heed_no_order_of_rows(orders, rng):
    for kept in (HABIT_NAMES, ATTEMPTS, EVENTS, ()):
        t = transitions(orders, kept)
        assert matrix(t).sum(axis=1).to_numpy() == pytest.approx(1)
        assert ((t.lo <= t.value + 1e-9) & (t.value <= t.hi + 1e-9)).all()
        pairs = [p for o in orders.order for p in zip(states(o, kept), states(o, kept)[1:])]
        for row in t.itertuples():  # brute force
            came = [p for p in pairs if p[0] == row[1]]
            assert row.n == len(came) and row.value == pytest.approx(came.count((row[1], row.to)) / len(came))
        mixed = orders.sample(frac=1, random_state=rng.randrange(2**32))
        assert transitions(mixed, kept).value.tolist() == pytest.approx(t.value.tolist())
    shuffled = orders.sample(frac=1, random_state=rng.randrange(2**32))
    assert matrix(transitions(shuffled)).equals(matrix(transitions(orders)))


def test_a_change_has_the_difference_and_its_own_interval():
    rng = random.Random(0)
    worse = orders_of([search([EXPRESSIONS[i % 9], EXPRESSIONS[3]], rng) for i in range(60)])
    better = orders_of([search([EXPRESSIONS[0]], rng) for _ in range(60)])
    a, b = (matrix(transitions(o, ATTEMPTS)) for o in (better, worse))
    changes = transition_changes(worse, better, ATTEMPTS).set_index(["from", "to"])
    assert changes.value[START, REACHED] == pytest.approx(a.loc[START, REACHED] - b.loc[START, REACHED])
    assert changes.lo[START, REACHED] > 0 > changes.hi[START, FAILED]
    same = transition_changes(worse, worse, EVENTS)
    assert (same.value == 0).all() and ((same.lo <= 0) & (same.hi >= 0)).all()
    with pytest.raises(ValueError, match="problem 10 and 1 more are on one side only"):
        transition_changes(worse, better[better["index"] < 10])


def test_places():
    text = "x" * 90 + ". let me try something else"
    p = state_places(orders_of([text] * 3), bins=4).set_index(["state", "place"]).value
    assert p["backtracking"].tolist() == [0, 0, 0, 1] and list(p["backtracking"].index) == [
        0.125,
        0.375,
        0.625,
        0.875,
    ]
    with pytest.raises(ValueError, match="bins=0"):
        state_places(orders_of([text]), bins=0)


# ---- many texts


def test_every_text_is_read_once(monkeypatch):
    import stars.measure.order as module

    read, texts = [], ["22.", "3 + 5 = 8.", "22.", "22."]
    monkeypatch.setattr(module, "read_order", lambda *a: read.append(a[0]) or read_order(*a))
    assert orders_of(texts).order.map(lambda o: len(o.attempts)).tolist() == [0, 1, 0, 0]
    assert read == ["22.", "3 + 5 = 8."]
    assert (
        len(orders_of(["3 + 5 = 8."] * 2, target=[22, 8])) == 2 and read[2:] == ["3 + 5 = 8."] * 2
    )  # other problems


# ---- attempts in numbers


def test_shares():
    three = [
        EXPRESSIONS[1],
        EXPRESSIONS[1],
        EXPRESSIONS[0],
        EXPRESSIONS[1],
    ]  # fails, again, reaches, fails again
    table = tries(orders_of([search(three, random.Random(0)), search(three[:1]), ""]))
    assert table.failed.tolist() == [2, 1, 0] and table.tried.tolist() == [3, 1, 0]
    assert table.attempts.tolist() == [4, 1, 0] and table.repeats.tolist() == [2, 0, 0]
    assert table.failures.tolist() == [2, 0, 0]
    assert table.failed_share.tolist()[:2] == [2 / 3, 1] and np.isnan(table.failed_share[2])
    s = attempt_shares(table)
    assert (s["failed"].value, s["repeated"].value) == (3 / 4, 2 / 5) and s[
        "attempts"
    ].value == pytest.approx(5 / 3)
    assert set(attempt_shares(table[2:])) == {"attempts"} == set(attempt_changes(table[2:], table[2:]))
    assert attempt_changes(table, table)["failed"].value == 0


def test_repeats_by_chance_are_those_of_all_ways_to_deal():
    a, b, c = EXPRESSIONS[1], EXPRESSIONS[4], EXPRESSIONS[2]
    lists = [[a, a], [b, a, c], []]
    orders = orders_of([search(e) if e else "" for e in lists])
    found = repeats_by_chance(orders, shuffles=3000)
    dealt = [(p[:2], p[2:]) for p in permutations([a, a, b, a, c])]  # brute force
    means = [np.mean([len(d[i]) - len(set(d[i])) for d in dealt]) for i in (0, 1)]
    assert found == pytest.approx([*means, 0], abs=0.03)
    assert repeats_by_chance(orders, seed=1).tolist() == repeats_by_chance(orders, seed=1).tolist()
    alone = orders.assign(index=range(3))  # nothing to mix with
    assert repeats_by_chance(alone).tolist() == tries(alone).repeats.tolist() == [1, 0, 0]
    assert repeats_by_chance(orders[2:]).tolist() == [0]


def test_memory():
    stuck = [search([e] * 3) for e in EXPRESSIONS[:5]]  # each text says the same three times
    other = [
        search(EXPRESSIONS[i : i + 3]) for i in (0, 1, 2, 1, 0)
    ]  # none does, but the texts resemble each other
    assert memory(tries(orders_of(stuck * 60))).lo > 0
    assert memory(tries(orders_of(other * 60))).hi < 0


@given(st.lists(st.tuples(st.integers(0, 4), st.booleans()), max_size=20))
def test_pairs_are_those_of_mann_and_whitney(texts):
    values, right = np.array([t[0] for t in texts], float), np.array([t[1] for t in texts], bool)
    won, pairs = pairs_won(values, right)
    brute = [(a < b) + (a == b) / 2 for a in values[right] for b in values[~right]]
    assert (won, pairs) == (pytest.approx(sum(brute)), len(brute))
    if pairs:
        assert won == pytest.approx(mannwhitneyu(values[~right], values[right]).statistic)


def test_pairs_are_of_one_problem_only():
    "Problem 0 is easy with short texts, problem 1 hard with long ones; within each, length says nothing"
    table = pd.DataFrame(dict(index=[0] * 8 + [1] * 8, right=[1, 1, 1, 0] * 2 + [0, 0, 0, 1] * 2))
    table = table.assign(
        length=table["index"] * 100, right=table.right == 1, attempts=1, model="m", condition="base"
    )
    table = table.assign(seed=0, step=0, failures=0, repeated_share=0.0, failed_share=1.0 - table.right)
    p = predictors(table)
    assert p.value["length"] == 0.5 and p.value["failed_share"] == 1 and p.pairs.eq(24).all()
    with pytest.raises(ValueError, match="several responses per problem"):
        predictors(table.drop_duplicates("index"))

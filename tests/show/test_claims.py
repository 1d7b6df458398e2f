"Claims are held by the interval that titles go by, whatever the results know about outcomes"

from itertools import product

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from scipy.stats import ttest_1samp

from stars.habits.behaviors import HABIT_NAMES
from stars.habits.summaries import solved_text
from stars.lab.configs import preset
from stars.measure import order
from stars.measure.intervals import BOTH, NEW_PROBLEMS, NEW_SEEDS, NOTHING, contrast, difference
from stars.show import claims
from stars.show.claims import (
    CLAIMS,
    OUR_CLAIMS,
    claimed_cells,
    effect,
    found_in,
    populations_told,
    replication,
    replication_figure,
    replication_table,
    replication_title,
    verdict,
)
from stars.show.sources import ALGORITHMS

CLAIM, OURS = {c.name: c for c in CLAIMS}, {c.name: c for c in OUR_CLAIMS}
HARD = np.repeat([0.02, 0.3, 0.95], [150, 100, 150])  # problems that are hard or easy for every model


def cell(family, condition, chances, seeds=3, rng=None):
    "Results at two steps; the counts of habits depend on the seed alone"
    rng, rows = rng or np.random.default_rng(len(condition)), []
    for seed in range(seeds):
        for step in (0, 10):
            right = rng.random(400) < chances
            row = dict(family=family, condition=condition, seed=seed, step=step, n=400)
            row |= dict(accuracy=right.mean(), solved=solved_text(right), avg_verifications=seed + step)
            rows.append(row | dict(avg_backtracking=1.0, avg_subgoals=0.0, avg_backwards=0.0))
    return pd.DataFrame(rows)


def world(seeds=3):
    "A rich base that is .05 better than the plain one on every problem, and primed ones that are .1 better"
    lift = {("rich", "base"): 0.05, ("plain", "base"): 0.0}
    rng = np.random.default_rng(0)
    return pd.concat(
        [cell(f, c, np.clip(HARD + lift.get((f, c), 0.1), 0, 1), seeds, rng) for f, c in claimed_cells()]
    )


def outcomes(results, family, condition):
    rows = results[(results.family == family) & (results.condition == condition) & (results.step == 10)]
    return np.array([[int(x) for x in text] for text in rows.solved])


def test_accuracies_are_compared_problem_by_problem():
    r = world()
    e = effect(r, CLAIM["gap"])
    want = difference(outcomes(r, "rich", "base"), outcomes(r, "plain", "base"))
    assert (e["value"], e["lo"], e["hi"], e["population"]) == pytest.approx(want) and e["population"] == BOTH
    assert verdict(CLAIM["gap"], e) == "shown"


def test_a_mean_of_several_cells_is_one_contrast():
    r, claim = world(), CLAIM["mixes"]
    want = contrast(
        [outcomes(r, *cell) for cell in claim.cells], [1 / len(claim.plus)] * len(claim.plus) + [-1]
    )
    assert [effect(r, claim)[k] for k in ("value", "lo", "hi")] == pytest.approx(want[:3])


def test_what_is_not_known_is_said():
    r = world()
    assert effect(r.drop(columns="solved"), CLAIM["gap"])["population"] == NEW_SEEDS
    assert effect(r[r.seed == 0], CLAIM["gap"])["population"] == NEW_PROBLEMS
    assert effect(r[r.seed == 0].drop(columns="solved"), CLAIM["gap"])["population"] == NEW_PROBLEMS
    assert effect(r[r.seed == 0], CLAIM["kept"])["population"] == NOTHING
    assert effect(r, CLAIM["base_habits"])["population"] == NEW_SEEDS
    told = populations_told(replication({"cpu": r, "one": r[r.seed == 0]}))
    assert told == (
        "Intervals of cpu: accuracies for new problems and new seeds; "
        "habits for new seeds, not for new problems. "
        "Intervals of one: accuracies for new problems, not for another training."
    )


def test_a_gain_is_that_of_each_run():
    r = world()
    r["avg_verifications"] += 0.1 * r.seed * (r.step == 10)
    e = effect(r, CLAIM["kept"])
    assert e["value"] == pytest.approx(10.1) and e["hi"] - e["value"] == pytest.approx(
        4.303 * 0.1 / 3**0.5, rel=1e-3
    )


def test_verdicts_are_the_relation_seen_from_the_claim():
    def between(lo, hi):
        return dict(value=(lo + hi) / 2, lo=lo, hi=hi, population=BOTH, seeds=3)

    for claim, said in (
        ("gap", ["shown", "reversed", "not shown", "not shown", "shown"]),
        ("as_good", ["not shown", "not shown", "shown", "not shown", "reversed"]),
    ):
        effects = [(0.01, 0.08), (-0.08, -0.01), (-0.01, 0.02), (-0.09, 0.09), (0.06, 0.08)]
        assert [verdict(CLAIM[claim], between(*e)) for e in effects] == said
    assert verdict(CLAIM["gap"], between(np.nan, np.nan)) == "no interval"
    assert verdict(CLAIM["gap"], None) == "not run"


# Claims of ours


def responses(step, chances, condition="backtracking_verification", seeds=3, attempts=4, **more):
    "Responses that are right with a chance per problem"
    rng, problems = np.random.default_rng(step), np.repeat(np.arange(len(chances)), attempts)
    right = [rng.random(len(problems)) < np.asarray(chances)[problems] for _ in range(seeds)]
    rows = [pd.DataFrame(dict(seed=s, index=problems, score=1.0 * r)) for s, r in enumerate(right)]
    labels = dict(model="plain", condition=condition, step=step)
    return pd.concat(rows, ignore_index=True).assign(**labels | more)


def verdict_on(name, **answers):
    return verdict(OURS[name], found_in(OURS[name], pd.DataFrame(), answers))


HALF = np.arange(200) % 2  # of the problems


@pytest.mark.parametrize(
    "before, after, adds, sharpens",
    [
        (0.05 + 0 * HALF, 0.6 + 0 * HALF, "shown", "reversed"),  # new problems are solved
        (0.5 + 0 * HALF, 1.0 * HALF, "reversed", "shown"),  # the same accuracy, on fewer problems
        (0.3 + 0 * HALF, 0.9 * HALF, "reversed", "shown"),  # what was found at times is found at once
        (0.3 + 0 * HALF, 0.3 + 0 * HALF, "not shown", "not shown"),
    ],
)
def test_adding_and_sharpening_are_told_apart(before, after, adds, sharpens):
    draws = pd.concat([responses(0, before), responses(60, after)])
    e = OURS["adds"].of(draws)
    solved = draws.groupby(["step", "seed", "index"]).score.max().groupby(["step", "seed"]).mean()
    assert e.value == pytest.approx(solved[60].mean() - solved[0].mean()) and e.population == BOTH
    accuracy = draws.groupby("step").score.mean()
    assert OURS["sharpens"].of(draws).value == pytest.approx(accuracy[60] - accuracy[0] - e.value)
    assert verdict_on("adds", draws=draws) == adds
    assert verdict_on("sharpens", draws=draws) == sharpens


def test_a_claim_reads_its_own_rows():
    "Another condition, another space, another trainer changes nothing"
    up, down = (
        pd.concat([responses(0, 0.3 + 0 * HALF), responses(60, chance + 0 * HALF)]) for chance in (0.6, 0.1)
    )
    draws = pd.concat([up, down.assign(condition="base")])
    assert (verdict_on("adds", draws=draws), verdict_on("adds_base", draws=draws)) == ("shown", "reversed")
    transfer = pd.concat([up.assign(space="products"), down.assign(space="larger_numbers")])
    said = [
        verdict_on(f"carries_{s}", transfer=transfer) for s in ("products", "larger_numbers", "more_numbers")
    ]
    assert said == ["shown", "reversed", "not run"]
    lifted = pd.concat(
        [cell("plain", "base", HARD), cell("plain", "backtracking_verification", np.clip(HARD + 0.2, 0, 1))]
    )
    alike = pd.concat([cell("plain", "base", HARD, 1), cell("plain", "backtracking_verification", HARD, 1)])
    trainers = pd.concat([lifted.assign(algorithm="grpo"), alike.assign(algorithm="star")])
    found = {
        name: found_in(OURS[f"habits_{name}"], pd.DataFrame(), dict(trainers=trainers)) for name in ALGORITHMS
    }
    assert verdict(OURS["habits_grpo"], found["grpo"]) == "shown" and found["ppo"] is None
    assert (found["grpo"]["seeds"], found["star"]["seeds"]) == (3, 1)
    want = difference(*(outcomes(lifted, "plain", c) for c in ("backtracking_verification", "base")))
    assert found["grpo"]["value"] == pytest.approx(want.value) and found["grpo"]["lo"] == pytest.approx(
        want.lo
    )


def test_attempts_that_repeat():
    "Before RL each text comes back to its first attempt, after RL it tries a third"
    texts = {0: "3 + 4 = 7. 3 * 4 = 12. 3 + 4 = 7.", 60: "3 + 4 = 7. 3 * 4 = 12. 4 - 3 = 1."}
    draws = pd.concat([responses(step, 0.5 + 0 * HALF, generated=text) for step, text in texts.items()])
    draws = draws.assign(model="plain", numbers=[(3, 4)] * len(draws), target=11)
    tries = order.tries(order.read_orders(draws))
    e = found_in(OURS["repeats"], pd.DataFrame(), dict(tries=tries))
    assert e["value"] == pytest.approx(1 / 3) and verdict(OURS["repeats"], e) == "shown"
    assert verdict_on("memory", tries=tries) == "shown"
    assert verdict_on("repeats", tries=tries.assign(step=60 - tries.step)) == "reversed"


@pytest.mark.parametrize("first, later, said", [(0.2, 0.6, "shown"), (0.6, 0.2, "reversed")])
def test_tries_after_a_miss(first, later, said):
    "A first try hits with one chance, a second one with another; who hits at once has no second try"
    rng, rows = np.random.default_rng(0), []
    hit, miss = "3 * 4 = 12, 12 - 1 = 11.", "3 + 4 = 7, 7 + 1 = 8."
    for step, seed, i, _ in product((0, 60), (0, 1), range(40), range(8)):
        right, text = rng.random() < first, hit
        back = not right
        if back:
            right = rng.random() < later
            text = f"{miss} that is not 11. try again: {hit if right else miss}"
        row = dict(model="plain", condition="backtracking_verification", step=step, seed=seed, index=i)
        row |= dict(numbers=(1, 3, 4), target=11, generated=text, response_tokens=9, score=float(right))
        rows.append(row | dict.fromkeys(HABIT_NAMES, 0) | dict(backtracking=int(back)))
    assert verdict_on("pays", draws=pd.DataFrame(rows)) == said


def test_growth_is_that_of_each_run():
    growth = [0.4, 0.5, 0.75]
    rows = [
        dict(seed=s, step=step, n=400, accuracy=0.5, response_length=100 * (s + 1) * (1 + g * (step > 0)))
        for s, g in enumerate(growth)
        for step in (0, 10)
    ]
    e = effect(
        pd.DataFrame(rows).assign(family="plain", condition="backtracking_verification"), OURS["longer"]
    )
    want = ttest_1samp(growth, 0).confidence_interval()
    assert (e["value"], e["lo"], e["hi"]) == pytest.approx((0.55, want.low, want.high))
    assert e["population"] == NEW_SEEDS


def test_whose_claims_they_are():
    r, transfer = world(), pd.concat([responses(0, 0.1 + 0 * HALF), responses(60, 0.6 + 0 * HALF)])
    transfer = transfer.assign(space="products")
    table = replication({"published": r, "cpu": r, "gpu": r}, {"cpu": dict(transfer=transfer), "gpu": {}})
    assert set(table.claim[table.whose == "the paper's"]) == {c.name for c in CLAIMS}
    assert list(table.whose.drop_duplicates()) == ["the paper's", "ours"]
    ours = table[table.whose == "ours"].set_index(["source", "claim"]).verdict
    assert list(ours["published"].index) == ["longer"]  # the others need more than results
    assert ours["cpu", "carries_products"] == "shown" and ours["cpu", "adds"] == "not run"
    assert set(ours["gpu"].drop("longer")) == {"not run"}
    said = replication_title(table)
    assert said.index("Claims of the paper: the published runs show") < said.index("Claims of ours: ")
    assert "our cpu runs show 1 of 1" in said
    assert "gpu" not in said.split("Claims of ours")[1]  # where nothing of ours was run, nothing is counted
    texts = replication_table(table)
    assert (
        texts.loc[OURS["carries_products"].says, "cpu"].endswith("shown")
        and texts.loc[OURS["adds"].says, "published"] == ""
    )


def test_headings_only_where_there_are_both():
    r, transfer = world(), pd.concat([responses(0, 0.1 + 0 * HALF), responses(60, 0.6 + 0 * HALF)])
    transfer = transfer.assign(space="products")
    for answers, headings in (
        ({}, []),
        ({"cpu": dict(transfer=transfer)}, ["Claims of the paper", "Claims of ours"]),
    ):
        fig = replication_figure(replication({"cpu": r}, answers))
        found = [t.get_text() for ax in fig.axes for t in ax.texts if t.get_text().startswith("Claims")]
        assert found == headings
        plt.close(fig)


def test_what_was_not_built_is_left_out(tmp_path, monkeypatch):
    "Draws of one condition, no transfer, STaR but no other trainer; and nothing is built for the table"
    built = []

    def is_built(job):
        return (job.last, job.condition) == ("draws", "base") or (job.cfg.trainer, job.last) == (
            "star",
            "eval",
        )

    def run_jobs(jobs):
        built.extend(jobs)
        return {job: tmp_path / f"{job.last}-{job.condition}-{job.seed}" for job in jobs}

    def read(folder):
        return pd.DataFrame(dict(condition=[folder.name.split("-")[1]], seed=0, step=0))

    for name, stub in dict(is_built=is_built, run_jobs=run_jobs, read_answers=read).items():
        monkeypatch.setattr(claims, name, stub)
    monkeypatch.setattr(claims, "read_results", lambda path: read(path.parent))
    monkeypatch.setattr(claims.order, "read_orders", lambda rows: rows)
    monkeypatch.setattr(claims.order, "tries", lambda rows: rows)
    found = claims.own_answers(preset("cpu"), [0, 1], str(tmp_path))
    assert all(map(is_built, built)) and set(found) == {"draws", "tries", "trainers"}
    assert set(found["draws"].condition) == {"base"} and not len(found["tries"])
    assert set(found["trainers"].algorithm) == {"star"} and set(found["trainers"].family) == {"plain"}
    tight = preset("cpu", **{"ppo.prompts": 2, "ppo.minibatch": 2, "ppo.steps": 1})
    assert "ppo" in claims.trainer_configs(tight) and "grpo" not in claims.trainer_configs(tight)

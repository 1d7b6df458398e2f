"Claims are held by the interval that titles go by, whatever the results know about outcomes"

import numpy as np
import pandas as pd
import pytest

from stars.habits.summaries import solved_text
from stars.measure.intervals import BOTH, NEW_PROBLEMS, NEW_SEEDS, NOTHING, contrast, difference
from stars.show.claims import CLAIMS, claimed_cells, effect, populations_told, replication, verdict

CLAIM = {c.name: c for c in CLAIMS}
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

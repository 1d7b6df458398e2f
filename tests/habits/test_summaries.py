"""The results table: outcomes per problem survive a CSV file, whatever their digits"""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stars.habits.behaviors import HABIT_NAMES
from stars.habits.summaries import MAX_SAMPLES, read_results, solved_counts, solved_text, summarize
from stars.lab.configs import changed, preset


def completions(scores: np.ndarray, **labels) -> pd.DataFrame:  # [problems, draws]
    "Completions of one checkpoint with these scores"
    rows = [
        dict(index=i, generated="…", response_tokens=1, truncated=False, score=s)
        | dict.fromkeys(HABIT_NAMES, 0)
        for i, draws in enumerate(scores)
        for s in draws
    ]
    return pd.DataFrame(rows).assign(**dict(model="plain", condition="base", seed=0, step=0) | labels)


@given(st.lists(st.integers(0, MAX_SAMPLES)))
def test_outcomes_come_back(counts):
    assert solved_counts(solved_text(counts)).tolist() == counts and len(solved_text(counts)) == len(counts)


@pytest.mark.parametrize("width", [4, 400])
def test_outcomes_survive_the_file(tmp_path, width):
    "Leading zeros, texts that look like numbers, and four hundred digits"
    rng = np.random.default_rng(0)
    scores = rng.choice([0, 0.1, 1], (width, 2))
    scores[0] = 0
    df = pd.concat([completions(scores), completions(scores[::-1], step=5)])
    table = summarize(df.sample(frac=1, random_state=1))
    table.to_csv(tmp_path / "results.csv", index=False)
    again = read_results(tmp_path / "results.csv")
    pd.testing.assert_frame_equal(again, table)
    right = (scores == 1).sum(1)
    assert (solved_counts(again.solved[0]) == right).all()
    assert (solved_counts(again.solved[1]) == right[::-1]).all()
    assert again.pass_k.tolist() == [(right > 0).mean()] * 2 and again.n.tolist() == [2 * width] * 2


def test_tables_without_outcomes(tmp_path):
    "Published results have none, and completions that name no problem have none to give"
    table = summarize(completions(np.ones((3, 1))).drop(columns="index"))
    assert "solved" not in table and table.accuracy[0] == 1
    table.to_csv(tmp_path / "results.csv", index=False)
    pd.testing.assert_frame_equal(read_results(tmp_path / "results.csv"), table)
    with pytest.raises(ValueError, match="solved=nan must be a text"):
        solved_counts(np.nan)


def test_more_draws_than_can_be_counted():
    assert summarize(completions(np.ones((2, 35)))).solved.tolist() == ["zz"]
    with pytest.raises(ValueError, match="36 right responses, at most 35"):
        summarize(completions(np.ones((2, 36))))
    with pytest.raises(ValueError, match="eval.samples=36 must lie between 1 and 35"):
        changed(preset("smoke"), eval=dict(samples=36)).validate()

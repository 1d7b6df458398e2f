"The figures about when a habit pays, and about trees"

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from stars.measure.intervals import read_estimate, relation
from stars.show import plots
from stars.show.reasons import (
    TRIES,
    differences_said,
    trees,
    trees_table,
    trees_title,
    when,
    when_table,
    when_title,
)

plots.plt.switch_backend("Agg")


@pytest.fixture(scope="module")
def draws():
    return pd.read_parquet(Path(__file__).parents[2] / "nbs/data/payoff.parquet").assign(source="cpu")


@pytest.fixture(scope="module")
def when_rows(draws):
    return when_table(draws)


@pytest.fixture(scope="module")
def trees_rows(draws):
    return trees_table(draws)


def dots(ax):
    "x of all dots, hollow (before) and full (after)"
    marks = [line for line in ax.lines if line.get_marker() == "o"]
    hollow = [x for m in marks if m.get_markerfacecolor() == "white" for x in m.get_xdata()]
    full = [x for m in marks if m.get_markerfacecolor() != "white" for x in m.get_xdata()]
    return np.sort(np.round(hollow, 6)), np.sort(np.round(full, 6))


def test_when_says_what_was_measured_and_for_whom(when_rows):
    fig = when(when_rows, "Note.")
    last = when_rows[
        (when_rows.step == 60) & (when_rows.difficulty == "all") & (when_rows.habit == "backtracking")
    ]
    ways = {row.comparison: relation(read_estimate(row)) for _, row in last.iterrows()}
    assert (ways["problem"], ways["missed"]) == ("below", "above")
    title = plots.figure_text(fig, "title")
    assert "less often right on the same problem, and more often right if the first try missed" in title
    assert f"a further try is {TRIES[ways['fresh']]}" in title
    caption = plots.figure_text(fig, "caption")
    for said in ("reset cpu", "seed 0", "60 problems, 16 responses to each", "new problems", "Note."):
        assert said in caption
    assert "no habit divides their responses: base" in caption


def test_when_draws_the_differences_of_the_table_and_none_without_interval(when_rows):
    fig = when(when_rows)
    drawn = when_rows[when_rows.difficulty != "all"]
    for ax, comparison in zip(fig.axes, ("problem", "length", "missed", "fresh")):
        rows = drawn[(drawn.comparison == comparison) & drawn.lo.notna()]
        for found, (_, part) in zip(dots(ax), rows.groupby("step")):
            assert list(found) == sorted(part["value"].round(6))
    assert drawn.lo.isna().any()  # so that the test above means something


def test_verdicts_come_from_the_interval_and_name_conditions_only_where_they_differ():
    words = dict(above="more", below="less", undecided="the same")
    rows = pd.DataFrame(
        dict(condition=["base", "dots"], value=[-0.2, -0.3], lo=[-0.3, -0.4], hi=[-0.1, -0.2], population="")
    )
    assert differences_said(rows, words) == "less"
    rows.loc[0, "hi"] = 0.1
    assert differences_said(rows, words) == "the same (base) or less (dots)"


def test_when_needs_a_habit_and_one_model(draws, when_rows):
    with pytest.raises(ValueError, match="no habit divides these responses"):
        when_table(draws[draws.condition == "base"])
    with pytest.raises(ValueError, match="models plain, rich: the figure shows one"):
        when(pd.concat([when_rows, when_rows.assign(model="rich")]))
    with pytest.raises(ValueError, match="no condition goes back"):
        when_title(when_rows[when_rows.habit != "backtracking"])


def test_the_table_of_trees_counts_right_responses(draws, trees_rows):
    solved = trees_rows[(trees_rows.by == "only") & (trees_rows.what == "accuracy")]
    for (condition, step), rows in solved.groupby(["condition", "step"]):
        run = draws[(draws.condition == condition) & (draws.step == step)]
        assert np.average(rows["value"], weights=rows.responses) == pytest.approx((run.score == 1).mean())
    tried = trees_rows[trees_rows.what == "tried"]
    assert np.allclose(tried.groupby(["condition", "step", "by"])["value"].sum(), 1)


def test_trees_say_gain_or_loss_by_the_interval_of_the_gain(trees_rows):
    assert "where × or ÷ is needed" in trees_title(trees_rows) and "base loses" in trees_title(trees_rows)
    table = trees_rows.copy()
    table.loc[(table.what == "gain") & (table.condition == "base"), ["lo", "hi"]] = [-1.0, 1.0]
    said = trees_title(table)
    assert "base loses" not in said and said.count("base is not told apart") == 2


def test_trees_draw_small_kinds_without_bars(trees_rows):
    fig = trees(trees_rows)
    solved = trees_rows[trees_rows.what == "accuracy"]
    few = solved[solved.lo.isna()]
    assert len(few)
    for ax, (_, rows) in zip(fig.axes[::2], solved.groupby("condition", sort=False)):
        for found, (_, part) in zip(dots(ax), rows.groupby("step")):
            assert list(found) == sorted(part["value"].round(6))
        bars = sum(len(lines.get_segments()) for lines in ax.collections)
        assert bars == rows.lo.notna().sum()
    names = [t.get_text() for t in fig.axes[0].get_yticklabels()]
    counts = solved.groupby(["by", "group"]).of_kind.first()
    assert f"chain ({counts['only', 'chain']:.0f})" in names

"The figures about when a habit pays, and about trees"

import numpy as np
import pandas as pd
import pytest

from stars.show import plots
from stars.show.reasons import (
    differences_said,
    trees,
    trees_table,
    trees_title,
    when,
    when_table,
    when_title,
    with_sign,
)

plots.plt.switch_backend("Agg")


@pytest.fixture(scope="module")
def draws():
    return pd.read_parquet("nbs/data/payoff.parquet").assign(source="cpu")


@pytest.fixture(scope="module")
def when_rows(draws):
    return when_table(draws)


@pytest.fixture(scope="module")
def trees_rows(draws):
    return trees_table(draws)


def dots(ax):
    "Filled dots of some axes: (x, y)"
    filled = [line for line in ax.lines if line.get_marker() == "o" and line.get_markerfacecolor() != "white"]
    return sorted((round(x, 6), round(y, 2)) for line in filled for x, y in zip(*line.get_data()))


def test_when_says_what_was_measured_and_for_whom(when_rows):
    fig = when(when_rows, "Note.")
    last = when_rows[
        (when_rows.step == 60) & (when_rows.difficulty == "all") & (when_rows.habit == "backtracking")
    ]
    value = last.set_index("comparison")["value"]
    title = plots.figure_text(fig, "title")
    for comparison in ("problem", "missed", "fresh"):
        assert with_sign(value[comparison]) in title
    assert "right less often (−" in title and "if the first try missed, right more often (+" in title
    caption = plots.figure_text(fig, "caption")
    for said in ("reset cpu", "seed 0", "60 problems, 16 responses to each", "new problems", "Note."):
        assert said in caption
    assert "no habit divides their responses: base" in caption


def test_when_draws_the_differences_of_the_table_and_none_without_interval(when_rows):
    fig = when(when_rows)
    drawn = when_rows[when_rows.difficulty != "all"]
    for ax, comparison in zip(fig.axes, ("problem", "length", "missed", "fresh")):
        rows = drawn[(drawn.comparison == comparison) & drawn.lo.notna()]
        assert [x for x, _ in dots(ax)] == sorted(rows["value"].round(6))
    assert drawn.lo.isna().any()  # so that the test above means something


def test_verdicts_come_from_the_interval_and_name_conditions_only_where_they_differ():
    words = dict(above="more", below="less", undecided="the same")
    rows = pd.DataFrame(
        dict(condition=["base", "dots"], value=[-0.2, -0.3], lo=[-0.3, -0.4], hi=[-0.1, -0.2], population="")
    )
    assert differences_said(rows, words) == "less (−.20, −.30)"
    rows.loc[0, "hi"] = 0.1
    assert differences_said(rows, words) == "the same (base −.20) or less (dots −.30)"


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
    assert "where × or ÷ is needed, base is right less often (" in trees_title(trees_rows)
    table = trees_rows.copy()
    table.loc[(table.what == "gain") & (table.condition == "base"), ["lo", "hi"]] = [-1.0, 1.0]
    assert "where × or ÷ is needed, base is as often right, as far as can be told, (" in trees_title(table)


def test_trees_draw_small_kinds_as_open_circles(trees_rows):
    fig = trees(trees_rows)
    few = trees_rows[(trees_rows.what == "accuracy") & trees_rows.lo.isna()]
    circles = [
        x
        for ax in fig.axes
        for line in ax.lines
        if line.get_markerfacecolor() == "white"
        for x in line.get_xdata()
    ]
    assert sorted(np.round(circles, 6)) == sorted(few["value"].round(6)) and len(few)
    names = [t.get_text() for t in fig.axes[0].get_yticklabels()]
    counts = trees_rows[trees_rows.what == "accuracy"].groupby(["by", "group"]).of_kind.first()
    assert f"chain ({counts['only', 'chain']:.0f})" in names

"""Figures on draws and on transfer: titles follow the intervals, whichever way they point"""

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from stars.measure.draws import Measure
from stars.show.plots import color, figure_text, picture
from stars.show.reasons import (
    crossings,
    passk,
    passk_findings,
    passk_table,
    passk_title,
    transfer,
    transfer_table,
    transfer_title,
)

CONDITIONS = ("base", "empty_cot", "backtracking_verification")


@pytest.fixture(autouse=True)
def close():
    yield
    plt.close("all")


def draws(changes, seeds=(0, 1, 2), problems=120, n=8, model="plain", **more):
    "Responses to problems that are solved with a chance each; condition → what RL makes of the chances"
    rng = np.random.default_rng(0)
    chance, tables = rng.beta(1, 3, problems), []
    for condition, change in changes.items():
        for step, p in ((0, chance), (50, change(chance))):
            for seed in seeds:
                right = rng.random((problems, n)) < p[:, None]
                text = np.where(right, "<answer>1 + 2</answer>", "<answer>1 - 2</answer>")
                rows = dict(index=np.repeat(np.arange(problems), n), generated=text.ravel())
                labels = dict(model=model, condition=condition, seed=seed, step=step, source="cpu")
                tables.append(pd.DataFrame(labels | more | rows | dict(score=right.ravel() * 1.0)))
    return pd.concat(tables, ignore_index=True)


def adds(p):
    return 1 - (1 - p) ** 3


def sharpens(p):
    return np.where(p > 0.2, 0.95, 0.0)


def nothing(p):
    return p


def harms(p):
    return p / 3


def table_of(**changes):
    return passk_table(draws(changes), [Measure("pass@k", k) for k in (1, 2, 4, 8)])


@pytest.mark.parametrize(
    "changes,title",
    [
        (dict(base=adds), "base solves more problems at one attempt and at 8"),
        (dict(base=harms), "base solves fewer problems at one attempt and at 8"),
        (
            dict(base=sharpens, backtracking_verification=adds),
            "base solves more problems at one attempt and fewer at 8; "
            "backtracking + verification solves more problems at one attempt and at 8",
        ),
        (
            dict(base=nothing, empty_cot=nothing),
            "base and empty CoT are not told apart from before, neither at one attempt nor at 8",
        ),
    ],
)
def test_the_title_says_what_the_intervals_say(changes, title):
    assert passk_title(table_of(**changes)) == f"After RL, {title}"


def test_a_crossing_within_the_interval_is_not_claimed():
    "The lines cross, but at 8 attempts the interval holds 0"
    table = table_of(base=sharpens)
    assert crossings(table) == "Curves cross: base near k = 4."
    assert crossings(table) in figure_text(passk(passk_table(draws(dict(base=sharpens)))), "caption")
    last = (table.what == "difference") & (table["at"] == 8)
    table.loc[last, "hi"] = 0.01
    assert passk_title(table).endswith("solves more at one attempt and is not told apart at 8")
    assert crossings(table) == ""


def test_one_draw_has_one_end():
    said = passk_title(passk_table(draws(dict(base=adds), n=1)))
    assert said == "After RL, base solves more problems at one attempt"


def test_the_table_holds_what_the_figure_shows():
    table = passk_table(draws(dict(base=nothing, backtracking_verification=adds)))
    wide = table.pivot(index=["condition", "measure", "at"], columns="what", values="value")
    np.testing.assert_allclose(wide.difference, wide.trained - wide.start, atol=1e-12)
    assert set(table.measure) == {"pass@k", "cover@tau", "found", "tried", "entropy"}
    assert set(table.population) == {"new problems and new seeds"} and set(table.draws) == {8}
    assert not {"generated", "score"} & set(table)  # texts stay where they are


def lines_of(ax):
    "Colour and dashes of each curve"
    return [(line.get_color(), line.get_linestyle()) for line in ax.lines if len(line.get_xdata()) > 2]


def test_words_name_conditions_in_the_order_of_the_figure():
    "Whatever the order of the rows"
    rows = draws(dict.fromkeys(CONDITIONS, adds)).iloc[::-1]
    said = passk_findings(passk_table(rows)).split("\n")
    assert [line.split(" at ")[0] for line in said[:3]] == [
        "Base",
        "Backtracking + verification",
        "Empty CoT",
    ]


def test_each_condition_has_a_row_with_base_start_and_trained():
    fig = passk(passk_table(draws(dict.fromkeys(CONDITIONS, adds))))
    primed = color("backtracking_verification")
    left = {ax.get_title(loc="left"): ax for ax in fig.axes if ax.get_ylabel() == "pass@k"}
    right = [ax.get_title(loc="right") for ax in fig.axes if ax.get_ylabel() != "pass@k"]
    assert right == list(left)  # both columns say whose they are
    assert list(left) == ["base", "backtracking + verification", "empty CoT"]
    want = [(color("base"), ":"), (primed, "--"), (primed, "-")]
    assert lines_of(left["backtracking + verification"]) == want
    assert lines_of(left["base"]) == [(color("base"), "--"), (color("base"), "-")]
    labels = [t.get_text() for t in left["empty CoT"].texts]
    assert [t.split()[0] for t in labels] == ["base", "primed", "trained"]
    assert {(ax.get_xlabel() != "", ax.get_ylabel()) for ax in fig.axes} == {
        (True, "pass@k"),
        (True, "Cover@τ"),
    }
    caption = figure_text(fig, "caption")
    for words in ("Preset cpu", "seeds 0, 1, 2", "120 problems, 8 responses", "new problems and new seeds"):
        assert words in caption


def test_a_study_without_base_has_no_dotted_line():
    fig = passk(passk_table(draws(dict(dots=adds))))
    assert [style for _, style in lines_of(fig.axes[0])] == ["--", "-"]


def test_models_stand_one_below_the_other():
    both = [draws(dict(base=adds)), draws(dict(base=harms, dots=adds), model="rich")]
    fig = passk(passk_table(pd.concat(both)))
    assert figure_text(fig, "panel") == "plain\nrich" and len(fig.axes) == 2 + 4
    assert picture(fig, "png") == picture(fig, "png")


def spaces(**changes):
    "Answers in spaces: space → condition → what RL makes of the chances"
    return pd.concat([draws(c, n=4, space=space) for space, c in changes.items()], ignore_index=True)


def test_the_title_says_how_far_gains_carry():
    answers = spaces(
        products=dict(base=harms, dots=adds),
        world=dict(base=nothing, dots=adds),
        more_numbers=dict(base=nothing, dots=adds),
    )
    table = transfer_table(answers)
    assert list(dict.fromkeys(table.space)) == ["world", "more_numbers", "products"]  # home first
    assert transfer_title(table) == (
        "After RL, in the training world and more numbers dots gains; in products dots gains and base loses"
    )
    same = transfer_table(spaces(world=dict(base=adds, dots=adds), products=dict(base=nothing, dots=nothing)))
    assert transfer_title(same) == "After RL, in the training world all gain"
    none = transfer_title(same[same.space == "products"])
    assert none == "After RL, no condition gains or loses in any space"


def test_the_picture_has_a_row_per_space():
    changes = dict.fromkeys(CONDITIONS, adds)
    table = transfer_table(spaces(world=changes, larger_numbers=changes, strange_space=changes))
    fig = transfer(table)
    levels, change = fig.axes
    names = [t.get_text() for t in levels.get_yticklabels()]
    assert names[::-1] == ["training world", "larger numbers", "strange space"]
    values = table[table.what == "difference"].value
    said = [t.get_text() for t in change.texts]
    assert sorted(said) == sorted(f"+{v:.2f}".replace("0.", ".") for v in values)
    assert {"base", "empty CoT"} <= {t.get_text() for t in levels.findobj(matplotlib.text.Text)}
    width = fig.bbox.width
    ends = [t.get_window_extent(fig.canvas.get_renderer()).x1 for t in change.texts]
    begins = [t.get_window_extent().x0 for t in levels.get_yticklabels()]
    assert min(begins) > 0 and max(ends) < width  # nothing is cut off


def test_answers_need_a_space():
    with pytest.raises(ValueError, match="answers lack the column space"):
        transfer_table(draws(dict(base=adds)))

"What the figure of order says, from texts whose order is known"

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
import pandas as pd
import pytest

from stars.measure.intervals import relation
from stars.measure.order import ANSWER, FAILED, REACHED, START
from stars.show.plots import figure_text
from stars.show.reasons import Followed, order_figure, order_findings, order_table

MISS = "3 + 5 = 8, 14 - 8 = 6. 6 is not 22."
OTHER = "14 * 3 = 42, 42 + 5 = 47. 47 is too high."
HIT = "3 + 5 = 8, 8 + 14 = 22. 22 is 22, goal reached."
TURN = " let me try something else : "
END = " </think> <answer> 3 + 5 + 14 </answer>"
GIVES_UP, GOES_ON, AGAIN = MISS + END, MISS + TURN + HIT + END, MISS + TURN + MISS + TURN + OTHER + END


@pytest.fixture(autouse=True)
def close():
    yield
    plt.close("all")


def draws(before, after, problems=30, **columns):
    "Each text once per problem, at step 0 and at step 60"
    rows = [
        dict(step=step, index=problem, generated=text, score=1.0 if HIT in text else 0.1)
        for step, texts in ((0, before), (60, after))
        for problem in range(problems)
        for text in texts
    ]
    same = dict(model="plain", condition="backtracking_verification", seed=0, target=22, source="cpu")
    return pd.DataFrame(rows).assign(numbers=[(3, 5, 14)] * len(rows), **same | columns)


def test_the_title_follows_the_texts():
    table = order_table(draws([GIVES_UP, GIVES_UP], [GIVES_UP, GOES_ON]))
    title = figure_text(order_figure(table), "title")
    assert title.startswith(
        "After PPO, backtracking + verification gives up less often after a failed attempt"
    )
    assert "fails less often per attempt" in title and "right one" not in title  # there was none before
    back = order_table(draws([GIVES_UP, GOES_ON], [GIVES_UP, GIVES_UP]))
    assert "gives up more often" in figure_text(order_figure(back), "title")
    same = figure_text(order_figure(order_table(draws([GOES_ON, AGAIN], [GOES_ON, AGAIN]))), "title")
    assert "are not told apart from before" in same and "more often" not in same and "less often" not in same
    more = order_figure(order_table(draws([GOES_ON], [GOES_ON, AGAIN])))
    assert "repeats itself more often" in figure_text(more, "title")
    assert "repeats itself less than a search without memory" in figure_text(more, "caption")


def test_the_table_is_what_the_measurements_say():
    table = order_table(draws([GIVES_UP, GIVES_UP], [GIVES_UP, GOES_ON]))
    found = Followed(table)
    assert found.find("attempt", FAILED, ANSWER, "before").value == 1
    assert found.find("attempt", FAILED, REACHED, "after").value == 0.5
    assert relation(found.find("attempt", FAILED, ANSWER, "change")) == "below"
    assert found.find("attempt", REACHED, ANSWER, "before") is None
    assert found.find("share", "attempts", None, "after").value == 1.5
    assert found.find("habit", "verification", "backtracking", "after").value == pytest.approx(1 / 3)
    assert set(table.when) == {"before", "after", "change"} and table.texts.eq(60).all()


def test_the_graph_has_an_arrow_for_each_transition():
    fig = order_figure(order_table(draws([GIVES_UP, GIVES_UP], [GIVES_UP, GOES_ON])))
    before, after = fig.axes[:2]
    assert [len([p for p in ax.patches if hasattr(p, "get_mutation_scale")]) for ax in (before, after)] == [
        2,
        4,
    ]
    texts = {t.get_text().replace("\u00a0", " ") for t in after.texts}
    assert {"100 %", "50 %", START, ANSWER} <= texts
    caption = figure_text(fig, "caption")
    for said in ("Preset cpu", "seeds 0", "steps 0 and 60", "60 responses to 30 problems", "new problems"):
        assert said in caption


def test_the_verdict_is_that_of_the_steps_after_an_attempt():
    def verdict(before, after):
        return order_findings(order_table(draws(before, after))).split("\n")[-1]

    shown = order_findings(order_table(draws([GIVES_UP, GIVES_UP], [GIVES_UP, GOES_ON])))
    assert shown.split("\n")[-1].startswith("The claim is shown: ")
    assert " points; new problems)" in shown and "−." not in shown
    assert verdict([GIVES_UP], [GIVES_UP]).startswith(("The claim is refuted: no step", "The claim is open"))


def test_conditions_have_panels_of_their_own():
    two = pd.concat([draws([GIVES_UP], [GOES_ON]), draws([GOES_ON], [GIVES_UP], condition="all_strategies")])
    fig = order_figure(order_table(two), note="A note.")
    first, second = figure_text(fig, "title").split("\n")
    assert "gives up less often" in first and "all strategies" in second and "more often" in second
    assert len(fig.axes) == 8 and figure_text(fig, "caption").endswith("A note.")


def test_texts_without_habits_can_be_drawn():
    fig = order_figure(order_table(draws([HIT + END], [MISS + END], condition="base")))
    assert "base" in figure_text(fig, "title")
    assert "makes no attempts" in figure_text(order_figure(order_table(draws(["?"], ["!"]))), "title")


def test_what_cannot_be_compared_is_refused():
    with pytest.raises(ValueError, match="backtracking_verification has draws at step 0 only"):
        order_table(draws([HIT], []))
    d = draws([HIT], [HIT])
    with pytest.raises(ValueError, match="one side only"):
        order_table(d[(d.step == 0) | (d["index"] > 3)])

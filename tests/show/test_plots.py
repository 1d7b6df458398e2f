"Plots: intervals against independent formulas, titles that follow the data, labels apart, files that repeat"

import hashlib
import json
import math
from itertools import combinations

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.colors import to_rgb
from scipy import stats

from stars.habits.behaviors import HABITS, wilson
from stars.habits.summaries import solved_text
from stars.measure.intervals import BOTH, NEW_PROBLEMS, NEW_SEEDS, Estimate, difference
from stars.show import plots
from stars.show.figures import (
    base_behaviors,
    base_findings,
    base_table,
    changes,
    controls,
    curated,
    dose,
    dynamics,
    findings,
    gap,
    incorrect,
    pretraining,
    priming,
)
from stars.show.plots import (
    CONDITIONS,
    TITLE,
    Layout,
    balanced,
    color,
    count,
    figure_text,
    finding,
    gap_between,
    ink,
    interval,
    interval_note,
    num,
    percent,
    save_figure,
    short_table,
    signed,
    spread_labels,
    summary_table,
    wrap,
)

FIGURES = (controls, priming, dynamics, incorrect)
CONTROLS = ("base", "empty_cot", "dots", "incorrect_only", "backtracking_verification")
MIXES = (
    "all_strategies",
    "only_backtracking",
    "backtracking_verification",
    "backtracking_subgoal",
    "backtracking_backward",
)


@pytest.fixture(autouse=True)
def close():
    yield
    plt.close("all")


def table(
    last,
    first=0.1,
    seeds=(0,),
    models=("plain",),
    n=300,
    steps=(0, 10, 20),
    jitter=0.0,
    rater="rules",
    **more,
):
    "Results that go from `first` to the given value per condition, counts following accuracy"
    rows = []
    for m in models:
        for c, b in last.items():
            for s in seeds:
                for t in steps:
                    acc = (
                        first
                        + (b - first) * (t / steps[-1] if steps[-1] else 1)
                        + jitter * (s - np.mean(seeds))
                    )
                    rows.append(
                        {
                            "model": m,
                            "condition": c,
                            "seed": s,
                            "step": t,
                            "rater": rater,
                            "accuracy": acc,
                            "n": n,
                            "response_length": 100 * acc,
                        }
                        | {f"avg_{h.column}": (i + 1) * acc for i, h in enumerate(HABITS)}
                        | {f"total_{h.column}": n * (i + 1) * acc for i, h in enumerate(HABITS)}
                        | more
                    )
    return pd.DataFrame(rows)


# ---- intervals


@given(n=st.integers(1, 5000), share=st.floats(0, 1))
@settings(max_examples=200, deadline=None)
def test_wilson_ends_solve_the_score_equation(n, share):
    "The ends are the proportions p whose distance to k/n is 1.96 of *their own* standard errors"
    k = round(share * n)
    lo, hi = wilson(k, n)
    assert 0 <= lo <= k / n <= hi <= 1
    for p in (lo, hi):
        assert abs(k / n - p) == pytest.approx(1.96 * math.sqrt(max(p * (1 - p), 0) / n), abs=1e-6)


def test_wilson_known_values():
    "statsmodels' proportion_confint(k, n, method='wilson') to four digits"
    assert wilson(15, 50) == pytest.approx((0.1910, 0.4375), abs=1e-4)
    assert wilson(0, 10) == pytest.approx((0, 0.2775), abs=1e-4)
    for k, n in ((-1, 10), (11, 10), (0, 0)):
        with pytest.raises(ValueError):
            wilson(k, n)


def test_one_seed_is_wilson():
    a = interval(table(dict(base=0.4), n=50)).iloc[-1]
    assert (a.lo, a.hi) == pytest.approx(wilson(20, 50)) and a.population == NEW_PROBLEMS
    assert (
        interval_note(interval(table(dict(base=0.4), n=50)))
        == "95 % intervals for new problems, not for another training (1 seed of 50 completions)"
    )


def test_several_seeds_give_students_interval():
    "scipy's interval for a mean where seeds spread; where they hardly do, the draw of completions remains"
    r = table(dict(base=0.4, dots=0.5), seeds=(0, 1, 2, 3, 4), jitter=0.04)
    a, b = interval(r), interval(r.sample(frac=1, random_state=3))
    pd.testing.assert_frame_equal(a, b)
    assert (
        set(a.population) == {NEW_SEEDS}
        and set(a.seeds) == {5}
        and ((a.lo < a.value) & (a.value < a.hi)).all()
    )
    v = r[(r.condition == "dots") & (r.step == 20)].accuracy
    lo, hi = stats.t.interval(0.95, 4, v.mean(), stats.sem(v))
    last = a[(a.condition == "dots") & (a.step == 20)].iloc[0]
    assert (last.lo, last.hi) == pytest.approx(
        (lo, hi)
    ) and "for new seeds, not for new problems (5 seeds of 300 completions)" in interval_note(a)
    alike = interval(table(dict(base=0.4), seeds=(0, 1, 2))).iloc[-1]
    assert (alike.hi - alike.lo) / 2 == pytest.approx(
        1.96 * math.sqrt(0.4 * 0.6 / 900), rel=0.02
    )  # three equal seeds are no certainty
    assert (
        interval(table(dict(base=0.4), seeds=(0, 1, 2)), "response_length").lo.isna().all()
    )  # nor is there one without any spread


def test_a_mean_over_whichever_seeds_are_there_is_refused():
    r = table(dict(base=0.4), seeds=(0, 1, 2), jitter=0.02)
    with pytest.raises(
        ValueError,
        match="the seeds of base on plain have different steps .seed 0: 3 checkpoints to step 20, "
        "seed 1: 3 checkpoints to step 20, seed 2: 2 checkpoints to step 10",
    ):
        controls(r[(r.seed < 2) | (r.step < 20)])
    with pytest.raises(
        ValueError, match="avg_backtracking is missing for base on plain, seed 0, step 0 and 8 more rows"
    ):
        dynamics(r.assign(avg_backtracking=np.nan))
    with pytest.raises(ValueError, match="lack the columns avg_backtracking"):
        dynamics(r.drop(columns="avg_backtracking"))


def test_no_interval_is_invented():
    a = interval(table(dict(base=0.4)), "response_length")
    assert a.lo.isna().all() and interval_note(a).startswith("no interval")


def test_raters_are_not_mixed():
    r = table(dict(base=0.4))
    both = pd.concat([r, r.assign(rater="judge", avg_backtracking=9.0)])
    pd.testing.assert_frame_equal(interval(both), interval(r))
    with pytest.raises(ValueError, match="name one rater"):
        dynamics(both)
    assert interval(both, "avg_backtracking", rater="judge").value.eq(9).all()
    assert "Counted by: judge" in figure_text(dynamics(both, rater="judge"), "caption")
    with pytest.raises(ValueError, match="empty"):
        interval(both, rater="nobody")


def test_a_judge_vouches_for_what_it_read():
    r = table(dict(base=0.4, dots=0.5), n=1000).assign(judged=1000)
    both = pd.concat([r, r.assign(rater="judge", judged=200, avg_backtracking=9.0)])
    assert set(interval(both).n) == {1000} == set(interval(both, "response_length").n)
    habit = interval(both, "avg_backtracking", "judge")
    assert (
        set(habit.n) == {200}
        and interval_note(habit) == "no interval: 1 seed, 200 completions"
        and set(interval(both, "avg_backtracking", "rules").n) == {1000}
    )
    assert set(
        interval(pd.concat([table(dict(base=0.4), n=1000), both.iloc[-3:]]), "avg_backtracking", "rules").n
    ) == {1000}  # rows of before `judged` was written
    said = figure_text(dynamics(both, rater="judge"), "caption")
    assert (
        "no interval: 1 seed, 200 completions" in said
        and "Counted by: judge in 200 of 1,000 completions per checkpoint." in said
    )
    assert "Counted by: rules." in figure_text(
        dynamics(both, rater="rules"), "caption"
    ) and "1,000 completions" in figure_text(controls(both), "caption")
    many = pd.concat([both.assign(seed=s) for s in range(3)])
    assert "3 seeds of 200 completions" in figure_text(dynamics(many, rater="judge"), "caption")


# ---- titles


def title(fig):
    return figure_text(fig, "title")


def test_controls_title_follows_the_data():
    there = dict(base=0.3, empty_cot=0.32, incorrect_only=0.58, backtracking_verification=0.61)
    assert title(controls(table(there))) == (
        "Primed with backtracking + verification, the model ends above base and empty CoT, "
        "and is not told apart from incorrect only"
    )
    alike, below = (
        dict(base=0.3, backtracking_verification=0.31),
        dict(base=0.6, backtracking_verification=0.3),
    )
    who = "Primed with backtracking + verification, the model"
    assert title(controls(table(alike))) == f"{who} is not told apart from base"
    assert title(controls(table(below))) == f"{who} ends below base"


def test_numbers_stand_at_the_lines_in_one_format():
    "Values at the ends, none in the title; no leading zero and no hyphen anywhere"
    assert [num(x) for x in (0.614, -0.05, -0.001, 1.0, 12.345)] == [".61", "−.05", "0", "1.00", "12.35"]
    assert (num(0.1 + 0.1425 + 0.1025 - 0.23), num(0.205), num(float("nan"))) == (".12", ".21", "–")
    assert (signed(0.05), signed(-0.05), percent(0.0972), percent(0.1)) == (
        "+.05",
        "−.05",
        "9.7\u00a0%",
        "10\u00a0%",
    )
    fig = controls(table(dict(base=0.3, backtracking_verification=0.61), seeds=(0, 1), jitter=0.02))
    fig.canvas.draw()
    assert not any(letter.isdigit() for letter in title(fig))
    assert [t.get_text().split()[-1] for t in fig.axes[0].texts] == [".30", ".61"]
    numbers = [t.get_text() for ax in fig.axes for t in ax.get_yticklabels()]
    assert {"0", ".2"} <= set(numbers) and not any(text.startswith("0.") for text in numbers)


def test_seeds_are_thin_lines_and_the_last_interval_a_bar():
    rows = table(dict(base=0.3, dots=0.5), seeds=(0, 1, 2), jitter=0.02)
    ax, last = controls(rows).axes[0], interval(rows).query("step == 20").set_index("condition")
    widths = [line.get_linewidth() for line in ax.lines if len(line.get_xdata()) == 3]
    assert sorted(widths) == [0.6] * 6 + [1.7] * 2  # three seeds and a mean of each condition
    bars = [line.get_ydata() for line in ax.lines if len(line.get_xdata()) == 2]
    assert sorted(map(tuple, bars)) == sorted(zip(last.lo, last.hi))
    shifts = {line.get_transform().transform((1, 0))[0] for line in ax.lines if len(line.get_xdata()) == 2}
    assert len(shifts) == 2 and not ax.collections  # side by side, and no band


def test_fewer_completions_take_the_claim_back():
    last = dict(base=0.3, backtracking_verification=0.45)
    assert "above base" in title(controls(table(last, n=1000))) and "not told apart from base" in title(
        controls(table(last, n=50))
    )


def test_priming_title_follows_the_data():
    base = dict(base=0.3)
    for last, said in (
        (0.5, "All 5 mixes of habits end above base"),
        (0.3, "None of 5 mixes of habits ends above base; 5 are not told apart"),
    ):
        assert title(priming(table(base | dict.fromkeys(MIXES, last)))) == said
    low = title(priming(table(base | dict.fromkeys(MIXES, 0.1))))
    assert low == "None of 5 mixes of habits ends above base; 5 end below"
    last = base | dict(zip(MIXES, (0.5, 0.3, 0.3, 0.1, 0.1)), negative_control=0.3)
    assert title(priming(table(last))) == (
        "1 of 5 mixes of habits ends above base and negative control; 2 end below; 2 are not told apart"
    )
    both = " of 5 mixes of habits ends above base and negative control; "
    last["negative_control"] = 0.5  # a mix has to end above both
    assert (
        title(priming(table(last)))
        == f"None{both}1 ends above one of them only; 2 end below; 2 end below one of them only"
    )
    last = base | dict(zip(MIXES, (0.7, 0.5, 0.5, 0.4, 0.4)), negative_control=0.5)  # above base only
    assert title(priming(table(last))) == f"1{both}4 end above one of them only"


def test_dynamics_title_says_what_grows_by_the_interval_of_the_change():
    def said(last, **more):
        return title(dynamics(table(dict(base=0.1, backtracking_verification=last), first=0.4, **more)))

    both = "Primed with backtracking + verification: under PPO, verification and backtracking"
    who = both.split(":")[0]  # of a single run the title says the numbers, and no direction
    assert said(0.9) == (
        f"{who}: under PPO, verification from .40 to .90 and backtracking from .80 to 1.8 per response "
        "(no interval)"
    )
    rows = table(dict(base=0.1, backtracking_verification=0.9), seeds=(0, 1, 2), first=0.4)
    for column in ("avg_verifications", "avg_backtracking"):
        rows[column] += 0.01 * rows.seed * (rows.step == 20)
    assert title(dynamics(rows)) == f"{both} grow"
    rows = table(dict(base=0.1, backtracking_verification=0.45), seeds=(0, 1, 2), first=0.4)
    rows["avg_verifications"] += (rows.seed - 1) * (rows.step == 20)
    rows["avg_backtracking"] += 0.01 * rows.seed * (rows.step == 20)
    assert title(dynamics(rows)).endswith("; verification is not told apart from its start")


def test_habits_that_hardly_occur_are_one_grey_sentence():
    rows = table(dict(base=0.2, backtracking_verification=0.9), seeds=(0, 1, 2), jitter=0.01)
    rows[["avg_subgoals", "avg_backwards"]] *= 0.01
    fig = dynamics(rows)
    assert [ax.get_title(loc="left") for ax in fig.axes] == ["verification", "backtracking"]
    (grey,) = [t.get_text() for t in fig.axes[-1].texts if "not drawn" in t.get_text()]
    assert grey == "Subgoal and backward: below .1 per response in every condition, not drawn."
    rows.loc[rows.condition == "base", [f"avg_{h.column}" for h in HABITS]] = 0.0
    also = pd.concat([rows, rows[rows.condition == "base"].assign(condition="dots")])
    texts = [t.get_text() for t in dynamics(also).axes[0].texts]
    assert "all others 0" in texts and len(texts) == 2  # lines that end at zero share a label


def test_one_title_per_model():
    r = pd.concat(
        [
            table(dict(base=0.3, backtracking_verification=0.6), models=("plain",)),
            table(dict(base=0.6, backtracking_verification=0.6), models=("rich",)),
        ]
    )
    one, two = title(controls(r)).split("\n")
    assert "above base" in one and "not told apart from base" in two
    assert figure_text(controls(r), "panel") == "plain\nrich"


def test_a_title_that_holds_for_both_panels_is_written_once():
    r = table(dict(base=0.3, backtracking_verification=0.6), models=("plain", "rich"))
    assert title(controls(r)).count("above base") == 1 and figure_text(controls(r), "panel") == "plain\nrich"


def test_caption_says_what_it_is():
    r = table(dict(base=0.3, backtracking_verification=0.6), n=336)
    c = figure_text(controls(r.assign(source="cpu"), note="Mind this."), "caption")
    for part in (
        "Preset cpu",
        "model plain",
        "seed 0",
        "95 % intervals for new problems, not for another training (1 seed of 336 completions)",
        "Mind this.",
    ):
        assert part in c
    see, about = c.split("\n")
    assert see == "A line is one run. At the right: last value and its 95 % interval."
    assert about.startswith("Preset cpu")
    assert "base on plain to step 10" in figure_text(
        controls(r[(r.condition != "base") | (r.step < 20)]), "caption"
    )


# ---- input


def test_unknown_condition_and_missing_columns():
    r = table(dict(base=0.3))
    for plot in FIGURES:
        with pytest.raises(ValueError, match="condition 'bases' is unknown; choose from base, "):
            plot(r.assign(condition="bases"))
        with pytest.raises(ValueError, match="lack the columns rater"):
            plot(r.drop(columns="rater"))
        with pytest.raises(ValueError, match="empty"):
            plot(r[:0])


@pytest.mark.parametrize("plot", FIGURES)
def test_degenerate_tables_draw(plot):
    for r in (
        table(dict(base=0.3), steps=(0,)),
        table(dict(base=0.0, dots=0.0), first=0.0),
        table(dict(base=1.0), first=1.0),
        table(dict(human_cot=0.5)),
    ):
        plot(r).canvas.draw()


# ---- looks


@given(st.lists(st.tuples(st.floats(-100, 100), st.floats(0.1, 20)), min_size=1, max_size=12))
@settings(max_examples=300, deadline=None)
def test_spread_leaves_no_overlap(labels):
    y, size = map(np.array, zip(*labels))
    for lo, hi in ((-np.inf, np.inf), (-50, 300)):
        p = spread_labels(y, size, lo, hi)
        for i, j in combinations(range(len(y)), 2):
            assert abs(p[i] - p[j]) >= (size[i] + size[j]) / 2 - 1e-9
        assert (p - size / 2 >= lo - 1e-9).all() and (p + size / 2 <= hi + 1e-9).all()
        assert all(p[i] < p[j] for i, j in combinations(np.argsort(y, kind="stable"), 2))


def test_spread_moves_only_what_it_must():
    assert np.allclose(spread_labels([1, 5, 9], [2, 2, 2]), [1, 5, 9])
    assert np.allclose(spread_labels([5, 5], [2, 2]), [4, 6])


@pytest.mark.parametrize(
    "plot,last",
    [
        (controls, dict.fromkeys(CONTROLS, 0.5)),
        (controls, dict.fromkeys(CONTROLS, 0.0)),
        (priming, dict.fromkeys(("base", "negative_control", *MIXES), 0.5)),
        (priming, dict.fromkeys(("base", "negative_control", *MIXES), 0.02)),
        (dynamics, dict.fromkeys(CONTROLS, 0.5)),
        (dynamics, dict.fromkeys(("base", "negative_control", *MIXES), 0.0)),
    ],
)
@pytest.mark.parametrize("models", [("plain",), ("plain", "rich")])
def test_text_neither_overlaps_nor_leaves_the_figure(plot, last, models):
    fig = plot(table(last, models=models, source="cpu"))
    fig.canvas.draw()
    draw = fig.canvas.get_renderer()
    named = [
        t for ax in fig.axes for t in (*ax.texts, ax.title, ax._left_title, ax.xaxis.label, ax.yaxis.label)
    ] + fig.texts
    boxes = {t: matplotlib.text.Text.get_window_extent(t, draw) for t in named if t.get_text()}
    for t, b in boxes.items():
        assert b.x0 >= 0 and b.y0 >= 0 and b.x1 <= fig.bbox.x1 and b.y1 <= fig.bbox.y1, (t.get_text(), b)
    for (s, a), (t, b) in combinations(boxes.items(), 2):
        inside = min(a.x1, b.x1) - max(a.x0, b.x0), min(a.y1, b.y1) - max(a.y0, b.y0)
        assert min(inside) < 1, (s.get_text(), t.get_text(), inside)


def _lab(rgb):
    xyz = (
        np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
        @ np.clip(rgb, 0, 1)
        / (0.9505, 1, 1.089)
    )
    f = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


@pytest.mark.parametrize(
    "kind,matrix",
    dict(  # Machado et al. 2009, full severity, linear RGB
        none=np.eye(3),
        protan=[
            [0.152286, 1.052583, -0.204868],
            [0.114503, 0.786281, 0.099216],
            [-0.003882, -0.048116, 1.051998],
        ],
        deutan=[
            [0.367322, 0.860646, -0.227968],
            [0.280085, 0.672501, 0.047413],
            [-0.011820, 0.042940, 0.968881],
        ],
        tritan=[
            [1.255528, -0.076749, -0.178779],
            [-0.078411, 0.930809, 0.147602],
            [0.004733, 0.691367, 0.303900],
        ],
    ).items(),
)
def test_colours_stay_apart_for_every_eye(kind, matrix):
    def linear(colour):
        v = np.array(to_rgb(colour))
        return np.where(v <= 0.04045, v / 12.92, ((v + 0.055) / 1.055) ** 2.4)

    seen = {c: _lab(np.array(matrix) @ linear(colour)) for c, (_, colour) in CONDITIONS.items()}
    for together in (CONTROLS, ("base", "negative_control", *MIXES), ("base", "curated", "negated")):
        for a, b in combinations(together, 2):
            assert np.linalg.norm(seen[a] - seen[b]) > 18, (kind, a, b)


def test_a_condition_keeps_its_colour():
    r = table(dict.fromkeys(("base", "backtracking_verification"), 0.5))
    for plot in FIGURES:
        for ax in plot(r).axes:
            assert {CONDITIONS[c][1] for c in ("base", "backtracking_verification")} <= {
                line.get_color() for line in ax.lines
            }


def test_type_is_as_many_pixels_on_a_phone_as_it_has_points():
    "390 pixels across, and nothing smaller than seven; every axis has four numbers"
    for plot in FIGURES:
        fig = plot(
            table(dict(base=0.3, backtracking_verification=0.6), models=("plain", "rich"), source="cpu")
        )
        fig.canvas.draw()
        assert fig.get_figwidth() == Layout.width and abs(Layout.width * 72 - 390) < 2
        assert min(t.get_size() for t in fig.findobj(matplotlib.text.Text) if t.get_text()) >= 7
        for ax in fig.axes:
            for axis, (lo, hi) in ((ax.xaxis, ax.get_xlim()), (ax.yaxis, ax.get_ylim())):
                assert sum(lo <= x <= hi for x in axis.get_majorticklocs()) >= 3 + (axis is ax.yaxis)


@given(
    st.lists(st.text("abc +", min_size=1, max_size=14).map(str.strip).filter(bool), min_size=1, max_size=30)
)
@settings(max_examples=100, deadline=None)
def test_lines_of_a_title_are_as_few_as_before_and_about_equally_long(words):
    text = " ".join(" ".join(words).split())
    lines = balanced(text, 4.0).split("\n")
    plain = wrap(text, 4.0, TITLE, bold=True).split("\n")
    assert " ".join(lines) == text and len(lines) == len(plain)
    assert max(map(len, lines)) <= max(map(len, plain))


# ---- files and tables


@pytest.mark.parametrize("plot", FIGURES)
def test_files_are_complete_and_reproducible(plot, tmp_path):
    r = table(dict(base=0.3, backtracking_verification=0.6))

    def files(sub):
        paths = save_figure(plot(r.assign(source="cpu")), "fig", r, tmp_path / sub / "deep", dict(seeds=[0]))
        assert sorted(p.name for p in (tmp_path / sub / "deep").iterdir()) == [
            "fig.csv",
            "fig.json",
            "fig.png",
            "fig.svg",
        ]
        return {k: p.read_bytes() for k, p in paths.items()}

    a, b = files("a"), files("b")
    assert a == b == files("a")
    about = json.loads(a["json"])
    assert about["csv_sha256"] == hashlib.sha256(a["csv"]).hexdigest() and about["columns"] == list(r.columns)
    assert (
        about["figure"] == "fig"
        and about["seeds"] == [0]
        and about["title"] == figure_text(plot(r.assign(source="cpu")), "title")
        and "Preset cpu" in about["caption"]
    )
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "a" / "deep" / "fig.csv"), r)
    assert a["png"].startswith(b"\x89PNG") and b"<dc:date>" not in a["svg"]


def test_a_table_that_is_drawn_again_in_its_place_keeps_its_manifest(tmp_path, monkeypatch):
    "Where the picture fails half way, what made the numbers is still known; of other numbers it is not"
    r = table(dict(base=0.3))
    figure = plt.figure(figsize=(1, 1))
    old = save_figure(figure, "fig", r, tmp_path, dict(commit="abc"), dpi=20)["json"]

    def broken(*args):
        raise OSError("disk full")

    monkeypatch.setattr(plots, "write_bytes", broken)
    for rows, kept in ((r, True), (r.head(1), False)):
        with pytest.raises(OSError):
            save_figure(figure, "fig", rows, tmp_path, dpi=20)
        assert old.exists() == kept


def test_a_difference_below_turns_its_interval():
    said = finding(("a", "b"), Estimate(-0.4, -0.41, -0.38, "new seeds"), "is")
    assert said == "A is .40 below b (95 % interval .38 to .41; new seeds)."


def test_zero_is_written_in_one_way():
    assert (num(0), num(-0.001), num(0, 1), signed(0), count(0), percent(0)) == ("0",) * 5 + ("0\u00a0%",)


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    r = table(dict(base=0.3, backtracking_verification=0.6))
    old = save_figure(controls(r), "fig", r, tmp_path)["png"].read_bytes()

    def broken(*a):
        raise OSError("disk full")

    monkeypatch.setattr("stars.util.files.os.replace", broken)
    with pytest.raises(OSError):
        save_figure(controls(r.assign(source="other")), "fig", r, tmp_path)
    assert (tmp_path / "fig.png").read_bytes() == old and not list(tmp_path.glob(".*"))


def test_summary_table():
    r = table(
        dict(base=0.3, backtracking_verification=0.6), seeds=(0, 1, 2), jitter=0.01, models=("plain", "rich")
    )
    t = summary_table(r)
    assert list(t.index) == [(m, c) for m in ("plain", "rich") for c in ("base", "backtracking_verification")]
    short = short_table(t)
    assert len(short) == 4 and short.loc[("rich", "backtracking + verification"), "accuracy"] == ".10 → .60"
    row = t.loc[("rich", "backtracking_verification")]
    assert (row.step_first, row.step_last, row.seeds, row.interval) == (0, 20, 3, NEW_SEEDS)
    assert (
        row.accuracy_first == pytest.approx(0.1)
        and row.accuracy_last_lo < row.accuracy_last < row.accuracy_last_hi
    )
    assert row.response_length_last == pytest.approx(60) and row.avg_backtracking_last == pytest.approx(1.2)


# ---- one question each


def test_pretraining_shows_every_corpus_and_habit(tmp_path):
    stats = pd.DataFrame(
        [
            dict(
                by=by,
                group="all",
                label=h.name,
                n=500,
                missing=0.02,
                share=0.01 * i,
                share_lo=0.01 * i - 0.005,
                share_hi=0.01 * i + 0.005,
                mean=0.1,
                mean_lo=0.05,
                mean_hi=0.15,
            )
            for by in ("all", "domain")
            for i, h in enumerate(HABITS, 1)
        ]
    )
    fig = pretraining({"web": stats}, rates={h.name: 0.02 for h in HABITS}, preset="cpu")
    assert title(fig) == "Each habit shows in fewer than one text in 22 (web)"  # at most .045
    assert "500 texts, 2 % without labels" in figure_text(fig, "caption")
    assert [t.get_text() for t in fig.axes[0].texts] == [f"{i}\u00a0%" for i in (1, 2, 3, 4)]
    assert fig.axes[0].get_xlim()[1] < 5  # no further than the data
    two = pretraining({"web": stats, "books": stats.assign(share=2 * stats.share, share_hi=0.6)})
    assert title(two) == "Some habit may show in half of the texts, or more (2 corpora)"
    said = [t.get_text() for t in two.axes[0].texts]
    assert any(text.startswith("web ") for text in said) and any(text.startswith("books ") for text in said)
    with pytest.raises(ValueError, match="6 corpora; give between 1 and 5"):
        pretraining({str(i): stats for i in range(6)})


def test_curated_figure_compares_with_negated_and_sums_the_habits():
    rows = [
        dict(
            model="plain",
            condition=c,
            seed=s,
            step=t,
            rater="rules",
            n=400,
            accuracy=a + 0.2 * t / 10 * (c == "curated") + 0.01 * s,
            response_length=50.0,
            avg_verifications=v,
            avg_backtracking=v,
            avg_subgoals=0.0,
            avg_backwards=0.0,
        )
        for c, a, v in (
            ("base", 0.1, 0.0),
            ("negated", 0.2, 0.1),
            ("curated", 0.2, 2.0),
            ("rich_base", 0.2, 0.5),
        )
        for s in (0, 1)
        for t in (0, 10)
    ]
    fig = curated(pd.DataFrame(rows).assign(source="cpu"))
    said = figure_text(fig, "title")
    assert (
        said.startswith("Pretrained on curated text, the model ends above base")
        and "negated pretraining" in said
        and max(line.get_ydata().max() for line in fig.axes[1].lines) == 4.0
    )


def test_two_sources_share_their_axes_and_say_whose_they_are():
    last = dict(base=0.3, backtracking_verification=0.6)
    both = pd.concat(
        [
            table(last, models=("plain",), seeds=(0, 1, 2), source="cpu"),
            table(last, models=("Llama-3.2-3B",), n=1024, source="published").assign(
                response_length=lambda r: 3 * r.response_length, seed=0
            ),
        ]
    )
    fig = controls(both)
    assert figure_text(fig, "panel") == "ours, .5 M weights\npublished, 3 B"
    for pair in (fig.axes[::2], fig.axes[1::2]):
        assert pair[0].get_ylim() == pair[1].get_ylim()
        assert {line.get_color() for line in pair[0].lines} == {line.get_color() for line in pair[1].lines}
    assert [ax.get_xlabel() for ax in fig.axes[1::2]] == ["PPO steps"] * 2
    assert [ax.get_ylabel() for ax in fig.axes] == ["accuracy", "characters"] * 2
    said = figure_text(fig, "caption")
    assert (
        "Preset cpu · model plain · seeds 0, 1, 2 · 95 % intervals for new seeds, not for new problems"
        in said
    )
    assert "Published results · model Llama-3.2-3B · 95 % intervals for new problems, not" in said


def test_gap_compares_families_within_a_source():
    def one(model, last, **more):
        return table(dict(base=last), models=(model,), **more)

    fig = gap(
        pd.concat(
            [
                one("plain", 0.2, source="cpu"),
                one("rich", 0.5, source="cpu"),
                one("Llama", 0.5, source="published"),
                one("Qwen", 0.2, source="published"),
            ]
        ),
        ["plain", "Llama"],
    )
    ours, theirs = title(fig).split("\n")
    assert ours == "Under the same PPO, the base with habits ends above the one without"
    assert theirs == "Under the same PPO, the base with habits ends below the one without"
    assert "models plain, rich" in figure_text(fig, "caption")
    assert {t.get_text() for t in fig.axes[0].texts} == {"plain .20", "rich .50"}


def test_incorrect_title_follows_the_data():
    rest = dict(base=0.3, backtracking_verification=0.6)
    who = "Primed with wrong answers only, the model"
    assert title(incorrect(table(rest | dict(incorrect_only=0.59)))) == (
        f"{who} ends above base, and is not told apart from backtracking + verification"
    )
    lower = title(incorrect(table(rest | dict(incorrect_only=0.4))))
    assert lower == f"{who} ends above base and below backtracking + verification"


def test_base_behaviours_are_those_of_the_first_step():
    rows = pd.concat(
        [
            table(dict(base=0.9), models=("plain",), source="cpu"),
            table(dict(base=0.9), first=0.4, models=("rich",), source="cpu"),
        ]
    )
    fig = base_behaviors(rows)
    assert (
        title(fig) == "Before any training, habits per response: 1.0 in plain and 4.0 in rich (no interval)"
    )
    assert list(base_table(rows).index) == ["plain", "rich"] and base_table(rows).loc["rich"].iloc[0] == ".40"
    silent = rows.assign(**{f"avg_{h.column}": 0.0 for h in HABITS})
    assert base_findings(silent).startswith("The verification count of rich and plain: both 0.")
    texts = {t.get_text(): to_rgb(t.get_color()) for t in fig.axes[0].texts}
    assert {"plain .10", "rich .40", "1.6"} <= set(texts)  # the fourth habit counts 4 × accuracy in `table`
    assert texts["plain .10"] == to_rgb(color("base")) and texts["rich .40"] == ink(color("rich_base"))
    more = pd.concat(
        [rows, table(dict(base=0.2, base_70b=0.2), models=("Llama-3.2-3B",), steps=(0,), source="published")]
    )
    fig = base_behaviors(more)
    assert "Llama-3.1-70B" in title(fig) and len(fig.axes) == 2
    assert fig.axes[0].get_xlim() == fig.axes[1].get_xlim()  # one scale for both panels
    assert figure_text(fig, "panel") == "ours, .5 M weights\npublished, 3 B and 70 B"


def test_base_behaviours_are_told_apart_by_the_interval():
    rows = table(dict(base=0.3), seeds=(0, 1, 2), first=0.3, models=("plain", "rich"), source="cpu")
    for h in HABITS:
        rows[f"avg_{h.column}"] = 0.3 + 0.01 * rows.seed
    assert title(base_behaviors(rows)) == "Before any training, rich shows no habit more often than plain"
    rows.loc[rows.model == "rich", "avg_backtracking"] += 0.1
    assert title(base_behaviors(rows)) == "Before any training, rich shows backtracking more often than plain"


def dosed(**last):
    return pd.concat(
        [
            table(dict(base=b), seeds=(0, 1, 2), jitter=0.004, models=("rich",), source="cpu").assign(
                share=float(s)
            )
            for s, b in last.items()
        ]
    )


def test_dose_names_the_share_from_which_bases_end_higher():
    assert (
        title(dose(dosed(**{"0": 0.2, ".02": 0.2, ".1": 0.4, ".3": 0.5})))
        == "From 10 % of documents with habits on, a base ends above one without"
    )
    assert title(dose(dosed(**{"0": 0.2, ".02": 0.4, ".1": 0.2, ".3": 0.5}))).startswith(
        "From 30 %"
    )  # one that falls back is no threshold
    assert title(dose(dosed(**{"0": 0.2, ".02": 0.2, ".1": 0.2}))).startswith(
        "No share of habits in pretraining lifts a base"
    )
    with pytest.raises(ValueError, match="give 0 and between 1 and 7 others"):
        dose(dosed(**{"0": 0.2}))
    assert [
        t.get_text() for t in dose(dosed(**{"0": 0.2, ".005": 0.2, ".3": 0.4})).axes[1].get_xticklabels()
    ] == ["0", "0.5", "30"]
    with pytest.raises(ValueError, match="give 0 and"):
        dose(dosed(**{".1": 0.2, ".3": 0.4}))
    with pytest.raises(ValueError, match="shares end at different steps"):
        dose(dosed(**{"0": 0.2, ".3": 0.4}).query("share == 0 or step < 20"))


def test_what_a_figure_is_not_about_is_refused():
    rows = table(dict(base=0.3, dots=0.4), models=("plain", "rich"), source="cpu")
    with pytest.raises(ValueError, match="base models are shown before any training; dots is none"):
        base_behaviors(rows)
    with pytest.raises(ValueError, match="a gap is between two models in one condition"):
        gap(rows, ["plain"])
    with pytest.raises(ValueError, match="a gap is between two models"):
        gap(table(dict(base=0.3), models=("plain", "rich", "third"), source="cpu"), ["plain"])


# ---- outcomes


def answered(chances, seeds=(0, 1, 2), problems=400, model="plain", spread=0.0):
    "Results of two steps in which each problem of a condition is solved with its chance, outcomes included"
    rng, rows = np.random.default_rng(0), []
    for c, chance in chances.items():
        for s in seeds:
            for t in (0, 10):
                lift = rng.normal(0, spread)
                right = rng.random(problems) < (np.asarray(chance) + lift if t else np.full(problems, 0.1))
                row = dict(model=model, condition=c, seed=s, step=t, rater="rules", n=problems)
                row |= dict(accuracy=right.mean(), solved=solved_text(right), response_length=50.0)
                rows.append(row | {f"avg_{h.column}": float(s) for h in HABITS})
    return pd.DataFrame(rows)


HARD = np.repeat([0.02, 0.3, 0.95], [150, 100, 150])  # problems that are hard or easy for every model


def counts_of(results, condition):
    last = results[(results.condition == condition) & (results.step == 10)]
    return np.array([[int(x) for x in text] for text in last.solved])


def test_titles_and_sentences_go_by_the_difference_problem_by_problem():
    "Both accuracies are uncertain by their problems, so their intervals overlap; the difference is sure"
    r = answered(dict(base=HARD, backtracking_verification=HARD + 0.05))
    f = interval(r).query("step == 10").set_index("condition")
    base, primed = f.loc["base"], f.loc["backtracking_verification"]
    assert base.population == primed.population == BOTH and primed.lo < base.hi
    want = difference(counts_of(r, "backtracking_verification"), counts_of(r, "base"))
    assert gap_between(primed, base) == want and want.lo > 0
    assert "above base" in title(controls(r))
    said = findings(r, [("backtracking_verification", "base"), ("base", "base"), ("base", "dots")])
    assert said == (
        f"Backtracking + verification ends {num(want.value)} above base (95 % interval "
        f"{num(want.lo)} to {num(want.hi)}; new problems and new seeds)."
    )
    without = r.drop(columns="solved")
    assert "new seeds, these problems" in findings(without, [("backtracking_verification", "base")])


def test_outcomes_are_used_only_where_every_seed_has_the_same_problems():
    r = answered(dict(base=HARD))
    assert set(interval(r).population) == {BOTH}
    assert set(interval(r[r.seed == 0]).population) == {NEW_PROBLEMS}
    missing = r.assign(solved=r.solved.where(r.seed < 2))
    shorter = r.assign(solved=r.solved.where(r.seed < 2, r.solved.str[:300]))
    for rows in (missing, shorter):
        assert set(interval(rows).population) == {NEW_SEEDS}
    assert set(interval(r, "avg_backtracking").population) == {NEW_SEEDS}


def test_several_draws_per_problem_count_as_shares():
    r = answered(dict(base=HARD), seeds=(0,))
    many = r.assign(n=1600, solved=[solved_text(4 * np.array(list(map(int, s)))) for s in r.solved])
    pd.testing.assert_frame_equal(
        interval(r).drop(columns=["n", "runs"]), interval(many).drop(columns=["n", "runs"])
    )


def test_level_is_said_only_where_equality_is_claimed():
    r = answered(dict(base=HARD / 2, incorrect_only=HARD, backtracking_verification=HARD), seeds=range(5))
    assert "level (within ±.05) with backtracking + verification" in title(incorrect(r))
    assert "above base" in title(incorrect(r)) and "Level: the interval lies within ±.05" in figure_text(
        incorrect(r), "caption"
    )
    assert "not told apart from incorrect only" in title(controls(r))
    pair = [("incorrect_only", "backtracking_verification")]
    assert "level within ±.05" in findings(r, pair, equals=pair)
    assert "not told apart from it" in findings(r, pair)


def test_changes_are_read_seed_by_seed():
    r = answered(dict(base=HARD))
    r.loc[r.step == 10, "avg_backtracking"] += 1.0 + 0.1 * r.seed
    said = changes(r, ["avg_backtracking", "accuracy"], ["base"]).split("\n")
    lo, hi = stats.t.interval(0.95, 2, 1.1, 0.1 / math.sqrt(3))
    assert said[0] == (
        f"Base: the backtracking count ends 1.10 above its start (95 % interval {num(lo)} to "
        f"{num(hi)}; new seeds, these problems)."
    )
    assert said[1].startswith("Base: the accuracy ends") and said[1].endswith("new problems and new seeds).")


def test_sentences_name_the_model_where_there_are_several():
    r = pd.concat([answered(dict(base=HARD, dots=HARD), model=m) for m in ("plain", "rich")])
    first, second = findings(r, [("dots", "base")]).split("\n")
    assert first.startswith("plain – Dots ends") and second.startswith("rich – Dots ends")
    assert findings(r, [("dots", "base")], before=True).startswith("plain – Dots begins")

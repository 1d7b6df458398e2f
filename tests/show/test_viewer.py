"Viewer: hostile texts stay texts, numbers agree with pandas, filters and widgets work, wrong input is named"

import os
import re
import subprocess
import sys
from collections import Counter
from html.parser import HTMLParser
from io import StringIO

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from limits import ends
from rich.console import Console

from stars.habits.behaviors import COLORS, HABIT_NAMES, Span, find_behaviors, wilson
from stars.habits.phrases import RULES, Rule
from stars.show import viewer as vw
from stars.show.viewer import (
    SHOWN,
    card,
    checkpoint_table,
    highlight,
    inspect,
    legend,
    read_completions,
    score_text,
    segments,
    select,
    summary,
    trace,
    viewer,
)

CHECK, AGAIN = "Let me check: 5 + 12 = 17, not 27.", "Let me try something else."


class Page(HTMLParser):
    "The text of an HTML page, its tags, and the attributes of its marks"

    def __init__(self, html):
        super().__init__()
        self.text, self.tags, self.marks, self.open = "", [], [], 0
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        if tag == "br":
            self.text += "\n"
        else:
            self.open += 1
        if tag == "mark":
            self.marks.append(dict(attrs) | {"at": len(self.text)})

    def handle_endtag(self, tag):
        self.open -= 1

    def handle_data(self, data):
        self.text += data


def frame(n=40, seed=0):
    "Completions of three checkpoints with known problems, every verdict among them"
    rng, rows = np.random.default_rng(seed), []
    for c, s in (("base", 0), ("dots", 0), ("dots", 50)):
        for i in range(n):
            end = ("<answer>3 * 4 + 5</answer>", "<answer>3 * (4 + 5)</answer>", "")[rng.integers(3)]
            said = " ".join([CHECK] * rng.integers(3) + [AGAIN] * rng.integers(2) + [end])
            rows.append(
                dict(
                    model="plain",
                    condition=c,
                    seed=0,
                    step=s,
                    index=i,
                    prompt="using 3 , 4 , 5 make 27 : <think>",
                    generated=said,
                    numbers=[3, 4, 5],
                    target=27,
                    response_tokens=int(rng.integers(5, 90)),
                    truncated=not end,
                )
            )
    return read_completions(pd.DataFrame(rows))


@pytest.fixture(scope="module")
def df():
    return frame()


def terminal(what, width=80, **kw):
    out = StringIO()
    Console(file=out, width=width, **kw).print(what)
    return out.getvalue()


# ---- highlighting

spans = st.lists(
    st.builds(
        lambda a, n, h: Span(a, a + n, h, "rule"),
        st.integers(0, 40),
        st.integers(1, 20),
        st.sampled_from((*HABIT_NAMES, "mine")),
    ),
    max_size=8,
)


@given(st.text(max_size=45), spans)
@settings(max_examples=150, deadline=None)
def test_segments_are_the_text_with_the_habits_of_every_character(text, marks):
    parts = list(segments(text, marks))
    assert "".join(t for t, _ in parts) == text and all(t for t, _ in parts)
    habits = [{s.habit for s in ss} for t, ss in parts for _ in t]
    assert habits == [{s.habit for s in marks if s.start <= i < s.end} for i in range(len(text))]


@given(st.text(max_size=45), spans)
@settings(max_examples=150, deadline=None)
def test_html_shows_the_text_and_nothing_else(text, marks):
    page = Page(highlight(text, marks))
    assert page.text == (vw.visible(text) or "(empty)")
    assert (
        set(page.tags) <= {"div", "mark", "br", "em"}
        and page.open == 0
        and page.tags.count("br") == vw.visible(text).count("\n")
    )


def test_lines_are_kept_without_styles_too():
    assert Page(highlight("a\n\n b", [Span(0, 3, "subgoal", "s")])).tags.count("br") == 2


def test_markup_is_escaped_everywhere():
    evil = '<script>alert("&amp;")</script><u>unclosed <answer>1'
    spans = [Span(0, 8, '"><script>', "'\"><img src=x>")]
    row = pd.Series(
        dict(
            generated=evil,
            prompt=evil,
            model=evil,
            condition=evil,
            numbers=[1],
            target=2,
            **dict.fromkeys(HABIT_NAMES, 0),
        )
    )
    for html in (highlight(evil, spans), card(row)):
        page = Page(html)
        assert page.open == 0 and not {"script", "img", "u", "answer"} & set(page.tags)
        assert evil in page.text
    assert Page(highlight(evil, spans)).marks[0]["title"] == '"><script>: \'"><img src=x>'


def test_overlapping_habits_are_both_visible():
    page = Page(highlight("abcdef", [Span(0, 4, "verification", "v"), Span(2, 6, "backtracking", "b")]))
    assert [m["title"] for m in page.marks] == [
        "verification: v",
        "verification: v; backtracking: b",
        "backtracking: b",
    ]
    first, both, last = (m["style"] for m in page.marks)
    assert COLORS["verification"] in first and COLORS["backtracking"] not in first
    assert COLORS["verification"] in both and COLORS["backtracking"] in both
    assert COLORS["backtracking"] in last and COLORS["verification"] not in last
    assert all("color:inherit" in s for s in (first, both, last))  # readable on dark pages too


def test_habits_without_a_colour_are_grey():
    assert "#999999" in highlight("abc", [Span(0, 2, "my own", "rule")])
    mine = (Rule("estimating", "roughly", (r"\broughly\b",)),)
    df = read_completions(pd.DataFrame(dict(generated=["That is roughly 24.", CHECK])), RULES + mine)
    assert df.estimating.tolist() == [1, 0] and df.verification.tolist() == [0, 1]
    assert "estimating 1" in card(df.iloc[0], RULES + mine) and "estimating 1" in terminal(
        trace(df.iloc[0], rules=RULES + mine)
    )
    assert len(select(df, habit="estimating")) == 1 and viewer(
        df, RULES + mine, habit="estimating"
    ).rows.index.tolist() == [0]
    alone = read_completions(pd.DataFrame(dict(generated=[CHECK])), mine)
    assert "verification" not in alone and "verification" not in summary(alone, mine)  # nobody counted it


def test_spans_are_found_where_none_are_given():
    marks = Page(highlight(CHECK)).marks
    assert marks and all(m["title"].startswith("verification: ") for m in marks)
    assert not Page(highlight(CHECK, [])).marks


def test_empty_and_unclosed_texts():
    assert "(empty)" in highlight("") and "(empty)" in terminal(trace(pd.Series(dict(generated="")), 60))
    row = pd.Series(dict(generated="3 * 4 <answer> 3 * 4", numbers=[3, 4], target=12))
    assert score_text(row) == "0: the answer tag is not closed" and "<answer> 3 * 4" in Page(card(row)).text


def test_terminal_commands_and_broken_unicode_are_shown_not_obeyed():
    nasty = "a\x1b[2Jb\x9b31mc\rd\x00e\u202ef\ud800g\r\n[red]h[/red]\t."
    row = pd.Series(dict(generated=nasty, prompt=nasty, condition="[bold]x\x1b[0m"), dtype=object)
    for out in (terminal(trace(row, 70), 70), Page(card(row)).text):
        assert (
            not set(out) & set("\x1b\x9b\r\x00\u202e\ud800")
            and "␛[2J" in out
            and "[red]h[/red]" in out
            and "[bold]x" in out
        )
        out.encode()


def test_legend_names_every_habit():
    page = Page(legend())
    for h in HABIT_NAMES:
        assert h in page.text and COLORS[h] in legend()


# ---- ten megabytes


def test_a_huge_completion_neither_crashes_nor_hangs(monkeypatch):
    huge, read, find = f"{CHECK} " + "3 * 4 = 12, 12 + 5 = 17. " * 400_000, [], vw.find_behaviors
    monkeypatch.setattr(vw, "find_behaviors", lambda text, *args: read.append(len(text)) or find(text, *args))
    df = read_completions(
        pd.DataFrame(
            dict(generated=[huge], numbers=[[3, 4, 5]], target=[24], **dict.fromkeys(HABIT_NAMES, 0))
        )
    )
    rest = f"{len(huge) - SHOWN:,} more characters"
    with ends():
        shown = terminal(trace(df.iloc[0], 80))
        for out in (highlight(huge), card(df.iloc[0]), viewer(df).children[-1].value, shown):
            assert rest in " ".join(out.replace("│", " ").split()) and len(out) < 20 * SHOWN
    assert len(read) == 4 and max(read) <= SHOWN  # what is not shown is not searched either


def test_a_huge_word_is_counted_in_time():
    with ends():
        df = read_completions(pd.DataFrame(dict(generated=["x" * 10**7])))
    assert "9,980,000 more characters" in card(df.iloc[0]) and df[list(HABIT_NAMES)].eq(0).all(axis=None)


# ---- reading


def test_missing_counts_and_scores_are_added(df):
    for t, n, want, *counts in df[["generated", "numbers", "target", *HABIT_NAMES]].itertuples(index=False):
        found = [s.habit for s in find_behaviors(t, tuple(n), want)]
        assert counts == [found.count(h) for h in HABIT_NAMES]
    assert df.score.tolist() == [
        1.0 if "3 * (4 + 5)<" in t else 0.1 if "<answer>" in t else 0.0 for t in df.generated
    ]
    kept = read_completions(df.assign(verification=7, score=0.5))
    assert kept.verification.eq(7).all() and kept.score.eq(0.5).all()  # what is there stays
    assert "score" not in read_completions(pd.DataFrame(dict(generated=["a"])))
    some = read_completions(
        pd.DataFrame(
            dict(generated=["<answer>3+4</answer>"] * 3, numbers=[[3, 4], None, [3, 4]], target=[7, 7, None])
        )
    )  # not every problem is known
    assert "score" not in some and [score_text(r) for _, r in some.iterrows()] == [
        "1: correct",
        "not scored",
        "not scored",
    ]


def test_files_folders_and_stores(df, tmp_path):
    a, b = tmp_path / "cpu" / "eval-1", tmp_path / "cpu" / "eval-2"
    for f in (a, b):
        f.mkdir(parents=True)
    df[df.step == 50].to_parquet(a / "completions-step-0050.parquet")
    df[df.step == 0].to_parquet(a / "completions-step-0000.parquet")
    assert read_completions(a).step.tolist() == [0] * 80 + [50] * 40 and "folder" not in read_completions(
        tmp_path
    )
    assert len(read_completions(str(a / "completions-step-0050.parquet"))) == 40
    df[df.condition == "base"].to_parquet(
        b / "completions-step-0000.parquet"
    )  # the same checkpoint, evaluated again
    both = read_completions(tmp_path)
    assert len(both) == 160 and set(both.folder) == {"cpu/eval-1", "cpu/eval-2"}
    s = summary(both)
    assert s[s.condition == "base"].n.tolist() == [40, 40] and len(select(both, folder="cpu/eval-2")) == 40


def test_unfinished_stages_are_passed_over(df, tmp_path):
    done, half = tmp_path / "cpu" / "eval-1", tmp_path / "cpu" / "eval-2.partial"
    for f in (done, half, tmp_path / "ppo-3.partial" / "eval"):
        f.mkdir(parents=True)
    df[df.condition == "base"].to_parquet(half / "completions-step-0000.parquet")
    df[df.condition == "base"].to_parquet(
        tmp_path / "ppo-3.partial" / "eval" / "completions-step-0000.parquet"
    )
    with pytest.raises(ValueError, match=re.escape("no finished completions-*.parquet below")):
        read_completions(tmp_path)
    df.to_parquet(done / "completions-step-0000.parquet")
    assert len(read_completions(tmp_path)) == len(read_completions(tmp_path / "cpu")) == len(
        df
    ) and "folder" not in read_completions(tmp_path)
    for there in (half, half / "completions-step-0000.parquet", tmp_path / "ppo-3.partial"):
        assert len(read_completions(there)) == 40  # asked for by name


def test_what_is_not_utf8_is_still_shown(tmp_path):
    def texts(*values):
        ends = np.cumsum([0, *map(len, values)]).astype(np.int32)
        return pa.Array.from_buffers(
            pa.string(), len(values), [None, pa.py_buffer(ends.tobytes()), pa.py_buffer(b"".join(values))]
        )

    pq.write_table(
        pa.table(dict(generated=texts(b"ab\xff\xfecd", b"fine"), prompt=texts(b"\xc3", b"fine"))),
        tmp_path / "c.parquet",
    )
    df = read_completions(tmp_path / "c.parquet")
    assert df.generated.tolist() == ["ab\ufffd\ufffdcd", "fine"] and "ab\ufffd" in Page(card(df.iloc[0])).text
    assert read_completions(pd.DataFrame(dict(generated=[b"\xffa"]))).generated[0] == "\ufffda"


def wrong(tmp_path):
    "Sources that cannot be read, and what is said about each"
    good = pd.DataFrame(dict(generated=["a", "b"]))
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.parquet").write_text("no parquet")
    (tmp_path / "nothing.parquet").write_bytes(b"")
    good.rename(columns=dict(generated="text")).assign(n=1).to_parquet(tmp_path / "column.parquet")
    good[:0].to_parquet(tmp_path / "rows.parquet")
    good.to_parquet(tmp_path / "cut.parquet")
    (tmp_path / "cut.parquet").write_bytes((tmp_path / "cut.parquet").read_bytes()[:-9])
    good.assign(generated=["a", None]).to_parquet(tmp_path / "null.parquet")
    good.assign(generated=[1, 2]).to_parquet(tmp_path / "number.parquet")
    good.assign(numbers=["3,4", "5"], target=24).to_parquet(tmp_path / "numbers.parquet")
    good.assign(numbers=[[3, 4], None], target=[7.5, 8]).to_parquet(tmp_path / "target.parquet")
    good.assign(score=["high", "low"]).to_parquet(tmp_path / "score.parquet")
    return {
        "nowhere": "does not exist",
        "empty": "`stars eval` makes them",
        "notes.parquet": "is not a parquet file",
        "nothing.parquet": "is not a parquet file",
        "cut.parquet": "is not a parquet file",
        "column.parquet": "no column 'generated', only text, n",
        "rows.parquet": "holds no completions",
        "null.parquet": "row 1: 'generated' must be text",
        "number.parquet": "row 0: 'generated' must be text, but is 1",
        "score.parquet": "column 'score' must hold numbers",
        "numbers.parquet": "'target' must hold whole numbers",
        "target.parquet": "'target' must hold whole numbers",
    }


def test_unreadable_sources_are_named(tmp_path):
    for name, said in wrong(tmp_path).items():
        with pytest.raises(ValueError, match=re.escape(said)) as e:
            read_completions(tmp_path / name)
        assert name in str(e.value) and "\n" not in str(e.value)
    with pytest.raises(ValueError, match="row 1"):
        read_completions(pd.DataFrame(dict(generated=["a", np.nan]), index=[5, 5]))


# ---- selecting


@pytest.mark.parametrize(
    "where, keep",
    [
        (dict(condition="dots"), lambda d: d.condition == "dots"),
        (
            dict(condition="dots", step=50, seed=0, model="plain"),
            lambda d: (d.condition == "dots") & (d.step == 50),
        ),
        (dict(score="correct"), lambda d: d.score == 1),
        (dict(score="wrong"), lambda d: d.score == 0.1),
        (dict(score="no-answer"), lambda d: d.score == 0),
        (dict(score="no answer"), lambda d: d.score == 0),
        (dict(score=0.1), lambda d: d.score == 0.1),
        (dict(habit="verification"), lambda d: d.verification > 0),
        (dict(habit="verification", min_count=2), lambda d: d.verification >= 2),
        (dict(text="SOMETHING else."), lambda d: d.backtracking > 0),
        (dict(text="3 * (4"), lambda d: d.generated.str.contains("(4", regex=False)),  # no pattern
    ],
)
def test_filters(df, where, keep):
    assert 0 < keep(df).sum() < len(df)
    pd.testing.assert_frame_equal(select(df, **where), df[keep(df)])


@pytest.mark.parametrize(
    "where, said",
    [
        (dict(condition="magic"), "condition='magic' is unknown; there is base, dots"),
        (dict(step=51), "step=51 is unknown; there is 0, 50"),
        (dict(model="rich"), "there is plain"),
        (dict(seed=1), "there is 0"),
        (dict(score="good"), "there is correct, wrong, no answer"),
        (dict(score=0.3), "there is 0.0, 0.1, 1.0"),
        (dict(habit="magic"), "there is verification, backtracking"),
        (dict(folder="x"), "no column 'folder'"),
    ],
)
def test_unknown_values_list_what_there_is(df, where, said):
    for f in (select, viewer, inspect):
        with pytest.raises(ValueError, match=re.escape(said)):
            f(df, **where)


def test_filters_by_columns_that_are_not_there():
    with pytest.raises(ValueError, match="no column 'score'"):
        select(read_completions(pd.DataFrame(dict(generated=["a"]))), score="correct")


# ---- one completion


def test_verdict(df):
    assert (
        score_text(df[df.score == 1].iloc[0]) == "1: correct"
        and score_text(df[df.score == 0].iloc[0]) == "0: no answer tag"
    )
    row = df[df.score == 0.1].iloc[0]
    assert score_text(row) == "0.1: wrong value: 17 instead of 27"
    row["score"] = 1.0
    assert score_text(row).endswith("instead of 27 (stored score: 1)")
    assert score_text(row.drop("target")) == "score 1"
    assert score_text(row.drop(["target", "score"])) == "not scored"


def test_counts_that_differ_from_the_marks_say_so(df):
    row = df[df.verification == 2].iloc[0]
    assert "verification 2 " in terminal(trace(row)) and "marked)" not in terminal(trace(row))
    row["verification"] = 9
    for out in (card(row), terminal(trace(row))):
        assert "verification 9 (2 marked)" in out


# ---- the widget


def test_widget(df):
    v = viewer(df)
    c, page = v.controls, lambda: Page(v.children[-1].value).text
    assert {k for k in c} == {
        "condition",
        "step",
        "score",
        "habit",
        "min_count",
        "text",
        "at",
        "previous",
        "next",
    }  # model and seed have one value
    assert len(v.rows) == 120 and df.generated[0].split("<")[0] in page() and c["previous"].disabled
    c["next"].click()
    assert c["at"].value == 2 and "problem 1" in page() and not c["previous"].disabled
    c["at"].value = 110
    assert "dots · seed 0 · step 50 · problem 29" in page()
    c["condition"].value = "base"  # fewer rows than the place we are at
    assert (
        c["at"].value == c["at"].max == 40 == len(v.rows)
        and c["next"].disabled
        and "base · seed 0 · step 0 · problem 39" in page()
    )
    c["score"].value = "wrong"
    pd.testing.assert_frame_equal(v.rows, select(df, condition="base", score="wrong"))
    assert "0.1: wrong value: 17" in page()
    c["habit"].value = "verification"
    c["min_count"].value = 2
    pd.testing.assert_frame_equal(
        v.rows, select(df, condition="base", score="wrong", habit="verification", min_count=2)
    )
    c["step"].value = 0
    assert len(v.rows) == len(
        select(df, condition="base", step=0, score="wrong", habit="verification", min_count=2)
    )
    c["condition"].value = "dots"
    assert (
        0
        < len(v.rows)
        == len(select(df, condition="dots", step=0, score="wrong", habit="verification", min_count=2))
    )
    c["condition"].value, c["step"].value = "base", 50
    assert (
        "No completion fits" in page() and c["at"].disabled and c["next"].disabled and c["previous"].disabled
    )
    for k in ("condition", "score", "habit"):
        c[k].value = ""  # all
    c["text"].value = "TRY something"
    assert len(v.rows) == (df[df.step == 50].backtracking > 0).sum() and not c["at"].disabled


def test_two_widgets_do_not_meet(df):
    a, b = viewer(df), viewer(df)
    a.controls["next"].click()
    a.controls["condition"].value = "dots"
    assert (b.controls["at"].value, b.controls["condition"].value, len(b.rows)) == (1, "", 120)


def test_first_choice(df):
    v = viewer(df, condition="dots", step=50, score="wrong", habit="verification", min_count=2, text="check")
    pd.testing.assert_frame_equal(
        v.rows,
        select(df, condition="dots", step=50, score="wrong", habit="verification", min_count=2, text="check"),
    )
    assert viewer(df, score=0.1, model="plain").rows.score.eq(0.1).all()
    with pytest.raises(TypeError):
        viewer(df, colour="red")


def test_only_texts():
    v = viewer(pd.DataFrame(dict(generated=["only", "texts"])))
    assert set(v.controls) == {"text", "at", "previous", "next"} and "only" in v.children[-1].value


def test_fifty_thousand_rows_do_not_lag(df, monkeypatch):
    "A choice searches the rows once and shows one; a click shows one; nothing is counted again"
    v = viewer(pd.concat([df] * 417, ignore_index=True))
    assert len(v.rows) > 50_000
    did = Counter()

    def counted(name, fn):
        return lambda *args, **how: did.update([name]) or fn(*args, **how)

    for name in ("select", "card", "find_behaviors", "count_behaviors", "read_completions"):
        monkeypatch.setattr(vw, name, counted(name, getattr(vw, name)))
    v.controls["text"].value = "something"
    v.controls["condition"].value = "dots"
    v.controls["habit"].value = "verification"
    for _ in range(20):
        v.controls["next"].click()
    assert did == dict(select=3, card=23, find_behaviors=23)


def test_where_no_widget_runs_the_trace_that_was_open_is_shown(df):
    v = viewer(df)
    v.controls["next"].click()
    saved = v._repr_mimebundle_()
    assert v.children[-1].value in saved["text/html"] and "verification" in Page(saved["text/html"]).text
    assert "application/vnd.jupyter.widget-view+json" in saved  # and the live one where it does


def test_without_ipywidgets_the_extra_is_named(df, monkeypatch):
    monkeypatch.setitem(sys.modules, "ipywidgets", None)
    with pytest.raises(ImportError, match=re.escape("pip install 'stars-habits[lab]'")):
        viewer(df)


# ---- the terminal


def test_summary_agrees_with_pandas(df):
    s = summary(df).set_index(["condition", "step"])
    for key, g in df.groupby(["condition", "step"]):
        row = s.loc[key]
        assert (
            row.n == 40
            and row.accuracy == pytest.approx((g.score == 1).mean())
            and row.no_answer == pytest.approx((g.score == 0).mean())
        )
        assert (row.lo, row.hi) == pytest.approx(
            wilson((g.score == 1).sum(), 40)
        ) and row.truncated == pytest.approx(g.truncated.mean())
        assert row.tokens == pytest.approx(g.response_tokens.mean()) and row.characters == pytest.approx(
            np.mean([*map(len, g.generated)])
        )
        for h in HABIT_NAMES:
            assert row[h] == pytest.approx(g[h].mean())


def test_small_and_large_shares_are_not_rounded_away():
    df = pd.DataFrame(dict(generated=["a"] * 1000, score=[1.0] * 997 + [0.0] * 3))
    out = terminal(checkpoint_table(df), 120)
    assert ">99 (" in out and "<1 " in out
    assert "100 (" in terminal(checkpoint_table(df[:997]), 120) and "<1" not in terminal(
        checkpoint_table(df[:997]), 120
    )


def test_terminal_width_and_colour(df):
    for width in (40, 80, 133):
        out = StringIO()
        inspect(df, n=3, condition="dots", console=Console(file=out, width=width))
        assert max(map(len, out.getvalue().splitlines())) <= width and "\x1b" not in out.getvalue()
        assert (
            "[verification: Let me check: 5 + 12 = 17" in " ".join(out.getvalue().replace("│", " ").split())
            or width == 40
        )
    assert re.search(
        r"\nbase +0 ", terminal(checkpoint_table(df), 60)
    )  # a table that is too wide still says what its rows are
    row = df[(df.verification > 0)].iloc[0]
    colour = terminal(trace(row), force_terminal=True, color_system="truecolor")
    r, g, b = bytes.fromhex(COLORS["verification"][1:])
    assert f"48;2;{r};{g};{b}m" in colour and "[verification" not in colour


def test_overlaps_in_the_terminal(monkeypatch):
    monkeypatch.setattr(
        vw, "find_behaviors", lambda *_: [Span(0, 6, "verification", "v"), Span(2, 6, "backtracking", "b")]
    )
    row = pd.Series(dict(generated="abcdef"))
    assert "[verification: ab][verification+backtracking: cdef]" in terminal(trace(row, names=True))
    colour = terminal(trace(row), force_terminal=True, color_system="truecolor")

    def code(habit):
        return "48;2;{};{};{}m".format(*bytes.fromhex(COLORS[habit][1:]))

    assert re.search(rf"\x1b\[4;[^m]*{re.escape(code('verification'))}cd", colour) and re.search(
        rf"\x1b\[4;[^m]*{re.escape(code('backtracking'))}ef", colour
    )


def test_the_draw_is_seeded(df):
    def shown(**kw):
        inspect(df, console=Console(file=(out := StringIO()), width=100), **kw)
        return out.getvalue()

    assert shown() == shown() != shown(sample_seed=1)
    assert shown(n=0).count("problem") == 0 and shown(n=10**6, step=50).count("problem") == 40
    with pytest.raises(ValueError, match="n=-1"):
        inspect(df, n=-1)
    with pytest.raises(ValueError, match="none of 120 completions fits step=50, text='nothing'"):
        inspect(df, step=50, text="nothing")


# ---- the command, as a user runs it

# One process for all commands: importing torch takes longer than all the rest.
MAIN = "import sys; from stars.cli.main import main\nfor line in sys.stdin: main(['inspect', *line.split()])"


@pytest.fixture(scope="module")
def ran(df, tmp_path_factory):
    "Two good commands and a bad one"
    path = tmp_path_factory.mktemp("c") / "c.parquet"
    df.to_parquet(path)
    options = (
        "--condition dots --score no-answer --habit verification --n 3",
        "--n 0",
        "--condition magic",
        "--n 0",
    )
    commands = "".join(f"{path} {o}\n" for o in options)
    return subprocess.run(
        [sys.executable, "-c", MAIN],
        input=commands,
        capture_output=True,
        text=True,
        env=os.environ | {"COLUMNS": "150", "OMP_NUM_THREADS": "1"},
    )


def test_command(df, ran):
    lines = [x.split() for x in ran.stdout.splitlines() if re.match(r"\s*(0|50) +40 ", x)]
    assert (
        [x[0] for x in lines] == ["0", "50"] and "condition dots" in ran.stdout and "\x1b" not in ran.stdout
    )
    for x in lines:
        g = df[(df.condition == "dots") & (df.step == int(x[0]))]
        lo, hi = wilson((g.score == 1).sum(), 40)
        want = [
            f"{100 * (g.score == 1).mean():.0f}",
            f"({100 * lo:.0f}–{100 * hi:.0f})",
            f"{100 * (g.score == 0).mean():.0f}",
            f"{100 * g.truncated.mean():.0f}",
            f"{g.response_tokens.mean():.1f}",
        ]
        assert x[2:] == want + [f"{g[h].mean():.1f}" for h in HABIT_NAMES]
    fit = ((df.condition == "dots") & (df.score == 0) & (df.verification > 0)).sum()
    assert f"3 of {fit} completions" in ran.stdout and ran.stdout.count(
        "0: no answer tag"
    ) == 3 == ran.stdout.count("· dots ·")
    assert ran.stdout.count("0 of 120 completions") == 1  # the error ended the process


def test_command_in_error(ran):
    assert ran.returncode == 2 and ran.stderr == "stars: condition='magic' is unknown; there is base, dots\n"


def test_every_wrong_source_ends_the_command_with_one_line(tmp_path, capsys):
    from stars.cli import main as cli

    for name, said in wrong(tmp_path).items():
        with pytest.raises(SystemExit) as e:
            cli.main(["inspect", str(tmp_path / name)])
        out, err = capsys.readouterr()
        assert (
            e.value.code == 2
            and not out
            and said in err
            and err.startswith("stars: ")
            and err.count("\n") == 1
        ), (name, err)

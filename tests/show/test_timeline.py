"The bar above a trace: in HTML, for who cannot see it, and in the terminal"

import re
from html.parser import HTMLParser
from io import StringIO

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from stars.habits.behaviors import COLORS, HABIT_NAMES, Span, find_behaviors
from stars.measure.order import find_attempts
from stars.show.viewer import TimelineText, card, stretches, timeline, timeline_words, trace

PROBLEM = (2, 6, 8), 20
MISS = "2 * 6 = 12, 12 - 8 = 4. 4 is too low. let me try something else : "
HIT = "2 * 6 = 12, 12 + 8 = 20. 20 is 20, goal reached. </think> <answer> 2 * 6 + 8 </answer>"
ROW = pd.Series(
    dict(generated=MISS + MISS + HIT, numbers=PROBLEM[0], target=PROBLEM[1], condition="base", score=1.0)
)


class Tags(HTMLParser):
    "The attributes of every element"

    def __init__(self, html):
        super().__init__()
        self.found = []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))

    def titles(self):
        return [a["title"] for _, a in self.found if "title" in a]

    def label(self):
        return next(a["aria-label"] for _, a in self.found if a.get("role") == "img")


def read(text):
    spans = find_behaviors(text, *PROBLEM)
    return spans, find_attempts(text, *PROBLEM, spans)


def test_every_habit_and_attempt_has_a_mark():
    text = ROW["generated"]
    spans, attempts = read(text)
    page = Tags(timeline(text, spans, attempts))
    tried = [t for t in page.titles() if t.startswith("attempt")]
    assert [re.match(r"attempt \d, [a-z, ]+", t)[0] for t in tried] == [
        "attempt 1, failed",
        "attempt 2, failed, made before",
        "attempt 3, right",
    ]
    for habit in ("verification", "backtracking"):
        said = [t for t in page.titles() if t.startswith(habit)]
        assert said == [f"{habit}: {text[s.start : s.end]}" for s in spans if s.habit == habit]
    assert page.label() == "3 attempts: failed, failed, right; verification 3, backtracking 2"
    assert timeline(text, spans, attempts).count("×") == 2 and timeline(text, spans, attempts).count("✓") == 1
    colours = [a["style"] for _, a in page.found if a.get("title", "").startswith("backtracking")]
    assert all(COLORS["backtracking"] in c for c in colours)


def test_without_a_problem_there_are_habits_only():
    html = card(ROW.drop(["numbers", "target"]))
    assert Tags(html).label() == "verification 2, backtracking 2" and "×" not in html
    assert Tags(timeline("", [], [])).label() == timeline_words([], []) == "no habits"


def test_the_card_has_the_bar_before_the_trace():
    html = card(ROW)
    assert html.index("3 attempts: failed, failed, right") < html.index("<mark")


spans = st.lists(
    st.builds(
        lambda a, n, habit: Span(a, a + n, habit, "r"),
        st.integers(0, 40),
        st.integers(1, 20),
        st.sampled_from(HABIT_NAMES),
    ),
    max_size=8,
)


@given(st.text(min_size=1, max_size=60), spans)
def test_the_bar_covers_what_the_spans_cover(text, spans):
    length = len(text)
    covered = {(s.habit, i) for s in spans for i in range(s.start, min(s.end, length))}
    drawn, filled = set(), [0.0] * length
    for s in stretches(text, spans):
        assert s.left >= 0 and s.left + s.width <= 100 + 1e-9 and s.top + s.height <= 100 + 1e-9
        begin = round(s.left * length / 100)
        for i in range(begin, begin + round(s.width * length / 100)):
            drawn.add((s.habit, i))
            filled[i] += s.height
    assert drawn == covered
    assert all(f == pytest.approx(100) for i, f in enumerate(filled) if any(at == i for _, at in covered))


@given(st.text(max_size=80))
def test_no_text_becomes_markup(text):
    hostile = '"><script>alert(1)</script>' + text
    html = timeline(hostile, [Span(0, len(hostile), '"onclick=', "r")])
    assert "<script" not in html and {t for t, _ in Tags(html).found} == {"div", "span"}
    assert all(set(a) <= {"style", "title", "role", "aria-label"} for _, a in Tags(html).found)


# ---- the terminal


def terminal(thing, width, **how):
    Console(file=(out := StringIO()), width=width, **how).print(thing)
    return out.getvalue()


@pytest.mark.parametrize("width", [1, 7, 40, 133, 400])
def test_one_line_as_wide_as_there_is_room(width):
    text = ROW["generated"]
    out = terminal(TimelineText(len(text), *read(text)), width)
    assert len(out.rstrip("\n")) == width and out.count("\n") == 1
    if width >= 40:
        assert (out.count("×"), out.count("✓")) == (2, 1)
    assert terminal(TimelineText(0, [], []), width) == "·" * width + "\n"


def test_the_terminal_shows_it_in_colour_only():
    colour = terminal(trace(ROW), 90, force_terminal=True, color_system="truecolor")
    r, g, b = bytes.fromhex(COLORS["backtracking"][1:])
    bar = next(line for line in colour.splitlines() if "×" in line)
    assert f"48;2;{r};{g};{b}m" in bar and "✓" in bar
    assert "×" not in terminal(trace(ROW, names=True), 90)

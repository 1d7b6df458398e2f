"The detectors on text that the teacher did not write, and the teacher against the detectors"

import hashlib
import json
import random
import re
import time
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from limits import ends

from stars.habits.behaviors import (
    HABIT_NAMES,
    RULES_VERSION,
    count_behaviors,
    false_positives,
    find_behaviors,
    precision_recall,
)
from stars.habits.equations import equations, restarts
from stars.habits.phrases import RULES, Rule, expand_macros, find_phrases, plain
from stars.habits.priming import MIXES, priming_rows, shown_habits
from stars.task.problems import sample_problems

# prose in the voice of large models: text, numbers, target, habits that must be found, habits that must not
PROSE = [
    (
        "Hmm, that's 14, too high. Let me try 5 * 3 = 15 instead.",
        (3, 5, 9),
        24,
        {"verification", "backtracking"},
        {"backward"},
    ),
    ("Working backwards from 24, I could use 24 / 3 = 8.", (3, 5, 9), 24, {"backward"}, {"backtracking"}),
    (
        "Okay, so 25 - 6 = 19. That doesn't equal 24. Another approach: 25 + 6 = 31.",
        (25, 6, 7),
        24,
        {"verification", "backtracking"},
        set(),
    ),
    (
        "First, I'll get 20 by multiplying 4 and 5. Then I can add 3.",
        (3, 4, 5),
        23,
        {"subgoal"},
        {"backtracking", "verification"},
    ),
    (
        "Let me verify: (4 * 5) + 3 = 23. Yes, this equals 23!",
        (3, 4, 5),
        23,
        {"verification"},
        {"backtracking"},
    ),
    ("Wait, I already used the 5. Let's start over.", (3, 4, 5), 23, {"backtracking"}, {"verification"}),
    (
        "To reach 23, I need 20 and 3. If I can make 20 from 4 and 5, I'm done.",
        (3, 4, 5),
        23,
        {"backward", "subgoal"},
        {"backtracking"},
    ),
    (
        "4 + 5 = 9, 9 * 3 = 27. That is 4 more than the target... 27 is too big.",
        (3, 4, 5),
        23,
        {"verification"},
        {"subgoal"},
    ),
    (
        "5 * 4 = 20\n20 - 3 = 17 (not 23)\n5 * 4 = 20\n20 + 3 = 23 ✓",
        (3, 4, 5),
        23,
        {"verification", "backtracking"},
        {"backward"},
    ),
    ("What about 12 * 2? Starting from the target, 24 = 12 * 2.", (12, 2, 1), 24, {"backward"}, set()),
    (
        "We can break this down into smaller steps. Step 1: make 6.",
        (1, 2, 3),
        6,
        {"subgoal"},
        {"backtracking", "verification"},
    ),
    (
        "This approach doesn't work, so let me try a different combination.",
        (1, 2, 3),
        6,
        {"backtracking"},
        {"subgoal", "backward"},
    ),
    ("Alternatively, 8 - 2 = 6.", (8, 2, 4), 24, {"backtracking"}, {"verification"}),
    (
        "8 * 3 = 24, which matches the target.",
        (8, 3),
        24,
        {"verification"},
        {"backtracking", "subgoal", "backward"},
    ),
]
PLAIN = [  # nothing to find
    (
        "Using the numbers 19, 36, 55, 7, create an equation that equals 65. You can use basic operations.",
        (19, 36, 55, 7),
        65,
    ),
    ("The answer is (3 + 4) * 5.", (3, 4, 5), 35),
    ("3 + 4 = 7, 7 * 5 = 35.", (3, 4, 5), 35),
    ("3 * 4 = 12, 5 - 2 = 3, 12 + 3 = 15. (3 * 4) + (5 - 2) = 15", (2, 3, 4, 5), 15),
    ("", (1, 2), 3),
    ("<answer>(3 + 4) * 5, too high, try again</answer>", (3, 4, 5), 35),
]


@pytest.mark.parametrize("text,numbers,target,present,absent", PROSE)
def test_prose_of_large_models(text, numbers, target, present, absent):
    counts = count_behaviors(text, numbers, target)
    assert {h for h in present if counts[h] == 0} == set(), counts
    assert {h for h in absent if counts[h] > 0} == set(), counts


@pytest.mark.parametrize("text,numbers,target", PLAIN)
def test_plain_text_shows_nothing(text, numbers, target):
    assert not any(count_behaviors(text, numbers, target).values())


def test_each_wordless_restart_counts_once():
    text = "3 * 4 = 12, 12 + 5 = 17, 3 + 4 = 7, 7 * 5 = 35, 5 - 4 = 1, 1 * 3 = 3"
    assert count_behaviors(text, (3, 4, 5), 24)["backtracking"] == 2
    announced = text.replace(", 3 + 4", ". Let me try something else: 3 + 4")
    assert count_behaviors(announced, (3, 4, 5), 24)["backtracking"] == 2


def test_repeated_numbers_are_a_multiset():
    assert restarts(equations("3 + 3 = 6, 6 * 4 = 24"), (3, 3, 4), 24) == []
    assert restarts(equations("3 + 4 = 7, 3 * 7 = 21"), (3, 3, 4), 24) == []
    assert restarts(equations("3 + 4 = 7, 3 * 7 = 21, 3 + 3 = 6"), (3, 3, 4), 24) == [(1, 2, 3)]


@settings(max_examples=300, deadline=None)
@given(
    st.lists(
        st.sampled_from(
            [
                *"0123456789+-*/=(). \n,;!?<>é−",
                "too high ",
                "try again ",
                "check: ",
                "<answer>",
                "</answer>",
                "first get ",
            ]
        )
        | st.text(max_size=5),
        max_size=200,
    )
)
def test_any_text_counts_without_error(parts):
    text = "".join(parts)
    counts = count_behaviors(text, (3, 4, 5), 24)
    assert set(counts) == set(HABIT_NAMES) and all(isinstance(v, int) and v >= 0 for v in counts.values())
    spans = find_behaviors(text, (3, 4, 5), 24)
    assert spans == sorted(spans) and all(0 <= s.start <= s.end <= len(text) for s in spans)
    for h in HABIT_NAMES:
        mine = [s for s in spans if s.habit == h]
        assert len(mine) == counts[h] and {s.habit for s in spans} <= set(HABIT_NAMES)
    assert len(plain(text, 24)) == len(text)
    assert all(v >= 0 for v in count_behaviors(text).values())


@pytest.mark.parametrize(
    "text",
    [
        "1 + " * 100_000,
        "((((" * 50_000,
        "3 4 5 6 " * 50_000,
        "9" * 200_000,
        "too " * 100_000,
        "3 + 4 = " * 50_000,
        "is not " * 100_000,
        "24 is 24 - " * 50_000,
        "(" * 300_000 + "1" + ")" * 300_000,
        "\n" * 500_000,
        "let me " * 100_000,
        "3 + 4 = 7 = " * 50_000,
        "try 3 other " * 50_000,
        "need a number near " * 40_000,
        "<answer>" * 50_000,
        "\\(" * 200_000,
        "24" * 300_000,
        ") ," * 100_000,
        "each number one of them is was " * 20_000,
        "i need a an another only just the " * 20_000,
        " plus 3" * 100_000,
        "- 3 " * 200_000,
    ],
)
def test_long_text_is_read_in_linear_time(text):
    with ends():
        count_behaviors(text, (3, 4, 5), 24)  # linear: a second at most; quadratic: many minutes


@pytest.mark.parametrize(
    "world",
    [
        dict(n_numbers=(3,), min_number=1, max_number=12, min_target=10, max_target=30),
        dict(n_numbers=(3, 4), min_number=1, max_number=24, min_target=10, max_target=25),
    ],
)
@pytest.mark.parametrize("mix", MIXES)
def test_teacher_shows_what_its_mix_says(mix, world):
    problems = sample_problems(150, seed=3, split="prime", **world)
    shown = shown_habits(list(priming_rows(mix, problems, 800, seed=5)))
    for habit in HABIT_NAMES:
        assert shown[habit] >= 0.95 if habit in MIXES[mix] else shown[habit] <= 0.01, (mix, shown)


def test_teacher_can_be_as_fallible_as_claude():
    problems = sample_problems(
        150, seed=3, split="prime", n_numbers=(3,), min_number=1, max_number=12, min_target=10, max_target=30
    )

    def share(**teacher):
        rows = priming_rows("backtracking_verification", problems, 600, seed=1, **teacher)
        return sum(r["score"] == 1 for r in rows) / 600

    assert share(slip=0.3) < share(slip=0.0) < share(slip=0.0, insight=0.2)
    assert 0.28 <= share(insight=0.01) <= 0.44


DATA = Path(__file__).parents[1] / "data" / "habits"


def labelled(name):
    return [json.loads(line) for line in (DATA / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("name,least", [("varied", 0.9), ("natural", 0.9), ("heldout", 0.8)])
def test_agreement_with_labels(name, least):
    "Countdown text that the teacher did not write; nothing was ever adjusted to the held-out set"
    table = precision_recall(labelled(name))
    assert {r["habit"] for r in table} == set(HABIT_NAMES)
    for r in table:
        assert (
            min(r["text_precision"], r["text_recall"]) >= least
            and min(r["precision"], r["recall"]) >= least - 0.05
        ), r


# on texts that nobody who changed the rules has read: what was reached, less a margin;
# (precision, recall) over texts
UNSEEN = dict(
    listing=dict(verification=(0.95, 0.95), backtracking=(0.95, 0.9)),
    prose=dict(verification=(0.9, 0.9), backtracking=(0.9, 0.9), subgoal=(0.9, 0.7), backward=(0.9, 0.9)),
    mathematics=dict(
        verification=(0.9, 0.65), backtracking=(0.7, 0.5), subgoal=(0.8, 0.25), backward=(0.9, 0.45)
    ),
)


@pytest.mark.parametrize("kind", UNSEEN)
def test_agreement_with_unseen_text(kind):
    table = {r["habit"]: r for r in precision_recall(labelled(f"{kind}_unseen"))}
    for habit, (precision, recall) in UNSEEN[kind].items():
        r = table[habit]
        assert r["text_precision"] >= precision and r["text_recall"] >= recall, r


def test_agreement_on_general_prose():
    for r in precision_recall(labelled("maths")):
        assert r["text_precision"] >= 0.85 and r["text_recall"] >= 0.85, r


def test_text_without_mathematics_shows_next_to_nothing():
    floor = false_positives()
    assert set(floor) == set(HABIT_NAMES)
    for k, n in floor.values():
        assert n >= 80 and k / n <= 0.05


def test_counts_change_only_with_the_version():
    "Results that hold counts carry `RULES_VERSION`: raise it when this fails, and write the new digest down"
    rows = [r for f in sorted(DATA.glob("*.jsonl")) for r in labelled(f.stem)]
    counts = [list(count_behaviors(r["text"], r.get("numbers"), r.get("target")).values()) for r in rows]
    recorded = json.loads((DATA / "counts.json").read_text())
    assert recorded[str(RULES_VERSION)] == hashlib.sha256(repr(counts).encode()).hexdigest()[:16]


def test_the_labels_are_sound():
    rows = [r for f in sorted(DATA.glob("*.jsonl")) for r in labelled(f.stem)]
    assert (
        len(rows) >= 900
        and len({r["id"] for r in rows}) == len(rows)
        and len({r["text"] for r in rows}) == len(rows)
    )
    assert sum(not any(r["spans"].values()) for r in rows) >= 60  # a fair share shows nothing
    with pytest.raises(ValueError, match="does not stand in the text"):
        precision_recall([dict(text="a", spans=dict(backward=["b"]))])


def usual_time(text):
    "CPU time in which this machine reads a text twice, once its caches are warm"

    def once():
        start = time.process_time()
        count_behaviors(text, (3, 4, 5), 24)
        count_behaviors(text)
        return time.process_time() - start

    return min(once() for _ in range(5))


def test_no_phrase_is_slow():
    """every word of every pattern, repeated, and mixtures of a rule's words: 10 KB take milliseconds,
    and hundreds of times as long where a pattern is not linear"""
    rng, usual = random.Random(0), usual_time("nothing at all " * 650)
    for r in RULES:
        words = sorted(
            {
                w
                for p in r.patterns
                for w in re.findall(r"[a-z']+|[✓=?]", expand_macros(p))
                if w not in ("d", "b", "w", "s", "a-z")
            }
        )
        texts = [f"{w} " * (10_000 // (len(w) + 1)) for w in words] + [
            " ".join(rng.choices(words + ["7", "24", ","], k=1_500)) for _ in range(4)
        ]
        texts += [f"{w} " + "9" * 10_000 for w in words[:5]] + [" ".join(words) + "9.9" * 3_000]
        for text in texts:
            with ends(100 * usual, f"{r.name}: {text[:40]}"):
                count_behaviors(text, (3, 4, 5), 24)
                count_behaviors(text)


def test_many_restarts_are_read_in_linear_time():
    text = "3 * 4 = 12, 12 + 5 = 17, 35 is not 24. 3 + 4 = 7, 7 * 5 = 35, 17 is not 24. "
    with ends():
        counts = count_behaviors(text * 8_000, (3, 4, 5), 24)
    assert counts["backtracking"] >= 15_000
    sums = "11 + 12 = 23, 11 + 12 + 13 + 14 + 15 + 16 + 17 + 18 + 19 = 999999937"
    with ends():
        count_behaviors(sums, tuple(range(11, 20)), 24)


@pytest.mark.parametrize(
    "text",
    ["5\ue000 + 3 = 7", "3 + 4 = 7, 3 + 4 + 5 = \ue000", "\ue000 + 3 = 7", "İİ ß \ud800 \x00 17 is not 24"],
)
@pytest.mark.parametrize("target", [24, None, 0, -3, 10**5_000], ids=["24", "none", "0", "-3", "huge"])
def test_odd_characters_and_targets(text, target):
    for numbers in ((3, 4, 5), None, (), (5,)):
        find_behaviors(text, numbers, target)
    equations(text, target)


def test_a_decimal_over_a_number_is_read():
    assert equations("3 * 4 = 12, 0.5/3 * 9 = 1.5", 24, (3, 4, 9))[1].operands == (Fraction(1, 2), 3, 9)
    assert restarts(equations("3 * 4 = 12, 0.5/3 * 9 = 1.5"), (3, 4, 9), 24) == []


def test_one_act_is_one_span():
    for text in (
        "3 * 4 = 12, 12 + 5 = 17. 5 - 4 = 1 instead.",
        "3 * 4 = 12, 12 + 5 = 17. 5 - 4 = 1, let me try another way.",
    ):
        assert count_behaviors(text, (3, 4, 5), 24)["backtracking"] == 1
    assert count_behaviors("‘wait, what if’ and ‘let me check it’", (3, 4, 5), 24)["verification"] == 1
    for bad in (dict(mode="coutdown"), dict(after="x"), dict(patterns="too high"), dict(patterns=("{X}",))):
        with pytest.raises(ValueError, match="rule 'mine'"):
            Rule(**dict(habit="a", name="mine", patterns=("x",)) | bad)


def test_first_words_lose_nothing():
    "the index by first words finds at least what a search at every letter finds"
    texts = [
        plain(r["text"], r.get("target"))
        for n in ("varied", "natural", "heldout", "maths")
        for r in labelled(n)
    ][::3]
    for mode in ("countdown", "general"):
        rules = [r for r in RULES if r.mode in ("both", mode)]
        each = [(r, re.compile(expand_macros(p), re.M)) for r in rules for p in r.patterns]
        for text in texts:
            slow = {(m.start(), r.name, r.habit) for r, p in each for m in p.finditer(text)}
            fast = {(a, r.name, r.habit) for a, b, r in find_phrases(text, RULES, mode)}
            assert slow <= fast, slow - fast


def test_a_habit_of_ones_own():
    own = (Rule("estimation", "roughly", (r"\broughly {N}", r"\bfor sure\b")),)
    text = "It is roughly 60, and 17 is not 24."
    assert count_behaviors(text, (3, 4), 24, rules=own) == dict(estimation=1)
    assert count_behaviors(text, (3, 4), 24, rules=RULES + own)["verification"] == 1
    assert [
        text[s.start : s.end] for s in find_behaviors(text, (3, 4), 60, rules=own)
    ] == []  # {N} is never the target
    with pytest.raises(re.error):
        find_behaviors("x", rules=(Rule("a", "b", ("(",)),))


def test_spans_say_where_and_why():
    text = (
        "First get 9: 4 + 5 = 9. That's too low. Let me try something else. "
        "Working backwards from 24: 24 / 3 = 8."
    )
    found = {s.habit: (text[s.start : s.end], s.rule) for s in find_behaviors(text, (3, 4, 5), 24)}
    assert (
        found["verification"][0] == "That's too low."
        and found["backtracking"][1] in ("try another", "next try")
        and found["backward"][1] == "backwards"
    )
    assert found["subgoal"][0].startswith("First get 9")


def test_latex_unicode_and_words_are_arithmetic():
    for text in (
        "\\( 3 \\times 4 = 12 \\), \\( 12 + 5 = 17 \\). \\( 3 + 4 = 7 \\), \\( 7 \\times 5 = 35 \\)",
        "3 × 4 = 12, 12 + 5 = 17. 3 + 4 = 7, 7 × 5 = 35",
        "3 times 4 is 12, 12 plus 5 is 17. 3 plus 4 is 7, 7 times 5 is 35",
        "Multiplying 3 by 4 gives 12, 12 + 5 = 17. Adding 3 and 4 gives 7, 7 * 5 = 35",
    ):
        assert count_behaviors(text, (3, 4, 5), 24)["backtracking"] == 1, text


# lists of attempts: numbers, target, text, acts of backtracking
LISTS = [
    (
        (3, 10, 5),
        24,
        "(3 - 10) + 5 = -7 + 5 = -2, which is not 24. (5 - 10) + 3 = -5 + 3 = -2, which is not 24. "
        "(10 * 5) - 3 = 50 - 3 = 47, which is not 24.",
        2,
    ),
    (
        (3, 10, 5),
        24,
        "(10 / 3) + 5 = 3.33 + 5 = 8.33 (not 24). (5 / 3) + 10 = 1.67 + 10 = 11.67 (not 24).",
        1,
    ),
    ((3, 10, 5), 24, "(10 + 5) + 3 = 15 + 3 = 18 (not 24). (5 + 3) + 10 = 8 + 10 = 18 (not 24).", 1),
    ((3, 10, 5), 24, "(10 + 5) + 3 = 18, (5 + 3) + 10 = 18, 10 * 5 - 3 = 47", 2),  # without a word
    (
        (3, 10, 5),
        24,
        "3 - 10 = -7, -7 + 5 = -2. 10 / 3 = 3.33, 3.33 + 5 = 8.33. 10 / 5 = 2, 2 * 3 = 6.",
        2,
    ),  # step by step
    ((3, 10, 5), 24, "10 / 3 + 5 = 25/3. 5 / 3 + 10 = 35/3. 10/5 - 3 = -1.", 2),  # fractions
    ((3, 10, 5), 24, "\\frac{10}{5} + 3 = 5. \\frac{5}{10} + 3 = 3.5.", 1),  # LaTeX
    ((3, 10, 5), 24, "3+10+5=18 3*10-5=25 3*5+10=25", 2),  # nothing between them
    (
        (3, 10, 5),
        24,
        "Try 3 * 10 - 5. No. Try 3 * 5 + 10. No. Try (10 - 5) * 3. No.",
        2,
    ),  # values left to the reader
    ((3, 10, 5), 24, "3 * 10 → 30, 30 - 5 → 25 ✗\n3 * 5 → 15, 15 + 10 → 25 ✗", 1),
    ((3, 10, 5), 24, "| 3 + 10 + 5 | 18 | no |\n| 3 * 10 + 5 | 35 | no |\n| 3 * 5 + 10 | 25 | no |", 2),
    ((3, 10, 5), 24, "10 - 5 = 5 + 3 = 8. 3 * 5 = 15 + 10 = 25.", 1),  # run-on sums
    (
        (12, 10, 2),
        24,
        "12 + 10 + 2 = 24 is right. 12 * 10 / 2 = 60 would be wrong.",
        1,
    ),  # after a success, too
    # and what is none
    ((3, 10, 5), 25, "3 * 10 = 30, 30 - 5 = 25. So 3 * 10 - 5 = 25.", 0),  # a recap
    ((3, 10, 5), 25, "3 * 10 - 5 = 25. Check: 3 * 10 = 30, 30 - 5 = 25.", 0),  # a check
    ((3, 10, 5), 25, "3 * 10 = 30, 30 - 5 = 25. The answer is 3 * 10 - 5.", 0),  # the answer
    ((3, 10, 5), 25, "3 * 10 = 30. that is 30: 3 * 10 = 30. 30 - 5 = 25.", 0),  # said twice
    ((3, 10, 5, 7), 24, "3 + 10 = 13, 5 + 7 = 12, 13 + 12 = 25.", 0),  # two halves of one plan
    ((3, 10, 5), 24, "10 + 5 = 15, 10 - 5 = 5, 10 * 5 = 50", 0),  # what pairs can give
    (
        (3, 10, 5),
        24,
        "3 * 10 = 30, 30 + 5 = 35, not 24. I cannot do it, so my answer is 3 * 10 - 5.",
        0,
    ),  # an answer that was not tried
    ((3, 10, 5, 7), 24, "3 * 10 = 30, 30 + 7 = 37, 3 * 10 + 7 - 5 = 32.", 0),  # the same plan in one line
    ((3, 10, 5, 7), 24, "3 * 10 = 30, 30 + 7 = 37, and 3 * 10 = 30, 37 - 5 = 32.", 0),  # said again
    (
        (3, 10, 5, 7),
        24,
        "3 * 10 = 30, 30 + 7 = 37. An hour has 59 + 1 = 60 minutes. 37 - 5 = 32.",
        0,
    ),  # about something else
]


@pytest.mark.parametrize("numbers,target,text,acts", LISTS)
def test_lists_of_attempts(numbers, target, text, acts):
    assert count_behaviors(text, numbers, target)["backtracking"] == acts


VERDICTS = [
    ". Correct.",
    ". Incorrect.",
    ". Wrong.",
    ". No.",
    ". Yes!",
    ". Not it.",
    ". That's {target}!",
    ", exceeding {target}.",
    ", that's larger than the target.",
    ". We have reached {target}.",
    ". This gives us {value}, but our target is {target}.",
    " > {target}",
    " ≠ {target}",
    ", which is not {target}.",
    " (no)",
    " ❌",
    ". Too low.",
    ", too high.",
    ". Nope.",
    " → wrong",
    ". Right.",
    ", not {target}",
    ". This doesn't match {target}.",
    "? Yes.",
    " | no |",
    ". Close, but no.",
    ", which is the target.",
    ". Bingo!",
    ". That works.",
    ", 3 short of {target}.",
    ". Off by 2.",
    ". {value} is not {target}.",
]


@pytest.mark.parametrize("verdict", VERDICTS)
def test_a_verdict_counts_whether_right_or_wrong(verdict):
    "so that counts do not follow accuracy"
    for a, b, op, value in ((4, 8, "*", 32), (12, 8, "+", 20)):
        text = f"{a} {op} {b} = {value}" + verdict.format(value=value, target=20)
        assert count_behaviors(text, (a, b, 3), 20)["verification"] == 1, text


@pytest.mark.parametrize(
    "rest",
    [
        ". Then 8 + 3 = 11.",
        ", so I need 12.",
        ", so I look for 20 - 12.",
        ". To get 20 we need 12.",
        ", and then add 3.",
        "",
        ". Next, 3 + 8 = 11.",
        ", leaving 3.",
    ],
)
def test_what_follows_a_value_is_not_always_a_verdict(rest):
    assert count_behaviors("4 * 8 = 32" + rest, (4, 8, 3), 20)["verification"] == 0


def test_a_retry_in_two_sentences_is_one():
    again = "I need to find a different combination. Let's try: "
    text = f"(10 + 5) * 3 = 45, not 24. {again}(10 - 5) * 3 = 15, not 24. {again}10 * 5 - 3 = 47, not 24."
    assert count_behaviors(text, (3, 10, 5), 24) == dict(
        verification=3, backtracking=2, subgoal=0, backward=0
    )
    assert (
        count_behaviors("That is a dead end. Scrap that. Let me start over.", (3, 10, 5), 24)["backtracking"]
        == 1
    )
    assert (
        count_behaviors("Induction on x = 3 leads nowhere. Let me try another way. So x = 4.")["backtracking"]
        == 1
    )


FILTERS = [  # text, numbers, target, habit: each is kept out by one filter
    (
        "Each number must be used once, so let me check the rules of this puzzle.",
        (3, 4, 5),
        24,
        "verification",
    ),  # the task's own words
    ("In this puzzle there is another way to say it, all must be used.", (3, 4, 5), 24, "backtracking"),
    ("There's no need to try another combination.", (3, 4, 5), 24, "backtracking"),  # said to be needless
    ("Let's try 3 * 4 first.", (3, 4, 5), 24, "backtracking"),  # nothing was judged before
    ("What about 3 * 4?", (3, 4, 5), 24, "backtracking"),  # nothing was tried before
    ("3 * 4 = 12, 12 + 5 = 17. So the answer is 3 * 4 + 5.", (3, 4, 5), 17, "backtracking"),  # the answer
    ("3 * 4 = 12, 12 + 12 = 24. 24 - 5 = 19.", (3, 4, 5), 24, "backward"),  # the target was reached before
    ("24 = 3 * 4 + 12", (3, 4, 12), 24, "backward"),  # the answer turned round
    ("<answer>no luck, try another way</answer>", (3, 4, 5), 24, "backtracking"),  # no reasoning
    ("This does not help. Undo the last commit and go back.", None, None, "backtracking"),  # no mathematics
    ("In accord with Subsection b, the notice is retained.", None, None, "verification"),
    (
        "y = 3\nreturn verify(y)\n# let me check this: load_file(y)\nimport os",
        None,
        None,
        "verification",
    ),  # code
    (
        "if x == 20: print('no luck')\nreturn verify(x)  # let me check this again",
        None,
        None,
        "verification",
    ),  # code
]


@pytest.mark.parametrize("text,numbers,target,habit", FILTERS)
def test_what_the_filters_keep_out(text, numbers, target, habit):
    assert count_behaviors(text, numbers, target)[habit] == 0


def test_habits_in_prose_need_mathematics_nearby():
    said = "It suffices to look at one half. Let me try another way. "
    assert not any(count_behaviors(said).values())
    assert count_behaviors(said + "Then x = 3.")["backward"] == 1
    assert count_behaviors(said + "Then the sum of the two integers is odd.")["backtracking"] == 1
    assert count_behaviors(said + "Nothing. " * 60 + "Then x = 3.")["backward"] == 0  # too far away


def test_missed_before():
    for text, habit in (
        ("We need both a 4 and a 6.", "subgoal"),
        ("Factor pairs of 24: 3 and 8, 4 and 6.", "backward"),
        ("This gives us 26, but our target is 24.", "verification"),
        ("27 > 24", "verification"),
        ("24 = 8 * 3, and 8 = 2 * 4.", "backward"),
    ):
        assert count_behaviors(text, (2, 3, 4), 24)[habit] >= 1, text


def test_no_repeat_that_some_pythons_get_wrong():
    """Before 3.11.5, as in Debian 12, `(…)*+` forgets what its group took back (gh-106052); `(?>(…)*)` means
    the same and does not. Single characters, as in `\\d++`, are right everywhere"""
    for path in (Path(__file__).parents[2] / "stars").rglob("*.py"):
        found = re.findall(r"\)(?:[*+?]|\{[^}]*\}+)\+", path.read_text(encoding="utf-8"))
        assert not found, f"{path.name}: {found}"

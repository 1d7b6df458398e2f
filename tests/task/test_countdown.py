"Countdown: problems, solver, splits, prompts, verifier and parquet, against oracles that share no code"

import ast
import json
import os
import random
import re
import subprocess
import sys
from fractions import Fraction
from itertools import combinations_with_replacement
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from limits import ends, tuples_at_most

from stars.task.countdown import (
    MAX_CHARS,
    MAX_DEPTH,
    SPLITS,
    TEMPLATES,
    Problem,
    answer_of,
    chat_prompt,
    explain,
    make_prompt,
    messages,
    parse_answer,
    parse_expression,
    score,
    solvable,
    solve,
    split_of,
)
from stars.task.datasets import from_parquet, problems_from_rows, read_problems, to_parquet
from stars.task.problems import Space, all_problems, sample_problems
from stars.text.curation import frame

MICRO = dict(n_numbers=3, max_number=12, min_target=10, max_target=30)
SMALL = dict(max_number=20, max_target=50)

# ---- oracles


def all_values(nums, fractions=False):
    "Every value of every expression over `nums`: take any two, put any result back, go on"
    if len(nums) == 1:
        return {nums[0]}
    out = set()
    for i, a in enumerate(nums):
        for j, b in enumerate(nums):
            if i == j:
                continue
            rest = [x for k, x in enumerate(nums) if k not in (i, j)]
            made = [a + b, a * b]
            if fractions or a >= b:
                made.append(a - b)
            if b and (fractions or a % b == 0):
                made.append(Fraction(a) / b)
            for v in made:
                out |= all_values(rest + [v], fractions)
    return out


def ast_value(text):
    "Value and numbers of `text` read by Python's own grammar, over fractions"
    ops, used = (
        {
            ast.Add: Fraction.__add__,
            ast.Sub: Fraction.__sub__,
            ast.Mult: Fraction.__mul__,
            ast.Div: Fraction.__truediv__,
        },
        [],
    )

    def go(n):
        if isinstance(n, ast.BinOp):
            return ops[type(n.op)](go(n.left), go(n.right))
        assert isinstance(n, ast.Constant) and type(n.value) is int
        used.append(n.value)
        return Fraction(n.value)

    return go(ast.parse(text.strip(), mode="eval").body), used


def tagged(text):
    return f"<answer>{text}</answer>"


# ---- problems


def test_key_ignores_order_and_types_are_exact():
    np = pytest.importorskip("numpy")
    p = Problem(np.array([5, 3, 4]), np.int64(17))
    assert p == Problem((5, 3, 4), 17) and p.key == Problem((3, 4, 5), 17).key == ((3, 4, 5), 17)
    assert split_of(p) == split_of(Problem((3, 4, 5), 17)) and type(p.numbers[0]) is int
    for bad in ((3, 4.0), (3, "4"), (3, None)):
        with pytest.raises(TypeError):
            Problem(bad, 7)


@pytest.mark.parametrize(
    "space",
    [{}, SMALL, MICRO, dict(split="eval", **SMALL), dict(n_numbers=(2, 5), weights=(0.9, 0.1), **SMALL)],
)
def test_prefix_repeats_and_solvability(space):
    long = sample_problems(300, 7, **space)
    assert sample_problems(300, 7, **space) == long
    for n in (0, 1, 17, 299):
        assert sample_problems(n, 7, **space) == long[:n]
    assert len({p.key for p in long}) == 300
    s = Space(**space)
    for p in long:
        assert len(p.numbers) in s.n_numbers and s.min_target <= p.target <= s.max_target
        assert all(s.min_number <= x <= s.top for x in p.numbers)
    for p in long[:60]:
        if len(p.numbers) < 5:
            assert p.target in all_values(list(p.numbers))


def test_prefix_holds_to_the_last_problem():
    "the list of leftovers at the end of a small space may not change what came before"
    full = sample_problems(1682, 0, **MICRO)
    for n in (1500, 1650, 1675, 1681):
        assert sample_problems(n, 0, **MICRO) == full[:n]
    assert {p.key for p in full} == {p.key for p in all_problems(Space(**MICRO))}


def test_the_whole_micro_space_matches_brute_force():
    want = {
        (c, int(v))
        for c in combinations_with_replacement(range(1, 13), 3)
        for v in all_values(list(c))
        if 10 <= v <= 30
    }
    assert {p.key for p in all_problems(Space(**MICRO))} == want and len(want) == 1682


def test_golden():
    "these may never change: published data sets and splits depend on them"
    assert [(p.numbers, p.target) for p in sample_problems(6, 0)] == [
        ((64, 18, 23), 69),
        ((23, 50, 25), 25),
        ((4, 28, 13), 37),
        ((5, 10, 66), 61),
        ((62, 86, 47, 68), 33),
        ((45, 3, 14, 55), 38),
    ]
    assert [split_of(Problem((3, 4, 5), t)) for t in range(10, 18)] == [
        "prime",
        "prime",
        "train",
        "train",
        "train",
        "prime",
        "eval",
        "train",
    ]


def test_same_in_every_process():
    code = (
        "from stars.task.countdown import *; from stars.task.problems import *; "
        "problems = sample_problems(40, 11, split='train'); "
        "print([(p.numbers, p.target, split_of(p), solve(p.numbers, p.target)) for p in problems])"
    )

    def run(hash_seed):
        return subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": hash_seed},
            capture_output=True,
            text=True,
            check=True,
            cwd=Path(__file__).parents[2],
        ).stdout

    assert run("1") == run("2") != ""


def test_global_random_is_neither_used_nor_touched():
    random.seed(1)
    a = random.getstate()
    sample_problems(20, 3)
    score(tagged("1+2"), (1, 2), 3)
    assert random.getstate() == a


def test_weights_and_targets_are_what_was_asked_for():
    ps = sample_problems(
        2000, 5, n_numbers=(3, 4), weights=(0.8, 0.2), max_number=30, min_target=10, max_target=29
    )
    assert abs(sum(len(p.numbers) == 3 for p in ps) / 2000 - 0.8) < 0.04
    assert all(abs(sum(p.target == t for p in ps) / 2000 - 0.05) < 0.02 for t in range(10, 30))
    assert all(len(p.numbers) == 4 for p in sample_problems(30, 1, weights=(0, 1)))


def test_exclude():
    first = sample_problems(40, 2, **SMALL)
    out = [first[0], first[1].key, first[2].numbers[::-1]]
    keys = {p.key for p in sample_problems(400, 2, exclude=out, **SMALL)}
    assert not keys & {first[0].key, first[1].key} and first[2].key[0] not in {k[0] for k in keys}


@pytest.mark.parametrize(
    "bad,word",
    [
        (dict(min_target=9, max_target=5), "min_target=9"),
        (dict(min_number=9, max_number=5), "min_number=9"),
        (dict(min_number=0), "min_number=0"),
        (dict(n_numbers=()), r"n_numbers=\(\)"),
        (dict(n_numbers=(3, 40)), "40"),
        (dict(n_numbers=None), "None"),
        (dict(n_numbers="34"), "n_numbers"),
        (dict(weights=(1,)), "weights"),
        (dict(weights=(0, 0)), "weights"),
        (dict(weights=(1, -1)), "weights"),
        (dict(weights=(1, float("nan"))), "nan"),
        (dict(weights=("a", "b")), "weights"),
        (dict(split="test"), "prime, train, eval"),
        (dict(max_target=None), "max_target=None"),
        (dict(max_number=2.5), "2.5"),
        (dict(exclude=[7]), "exclude: 7"),
        (dict(exclude=["abc"]), "exclude"),
    ],
)
def test_bad_parameters(bad, word):
    with pytest.raises(ValueError, match=word):
        sample_problems(3, 0, **bad)


def test_bad_n_and_seed_and_unknown_names():
    for n in (-1, 2.5, "3"):
        with pytest.raises(ValueError, match="n="):
            sample_problems(n, 0)
    with pytest.raises(ValueError, match="seed"):
        sample_problems(3, "x")
    with pytest.raises(TypeError, match="max_targets"):
        sample_problems(3, 0, max_targets=9)


@pytest.mark.parametrize(
    "space,word",
    [
        (MICRO, "only 1682"),
        (dict(n_numbers=2, max_number=2, min_target=90), "only 0"),
        (dict(n_numbers=3, max_number=99, min_target=970300, max_target=990000), "only 0"),
    ],
)
def test_an_exhausted_space_says_so_soon(space, word):
    with tuples_at_most(2 * 21 * 12**3), pytest.raises(ValueError, match=word):  # twice targets times tuples
        sample_problems(5000, 0, **space)


# ---- solver


def test_solver_matches_brute_force():
    rng = random.Random(0)
    for _ in range(150):
        k, t = rng.choice((2, 3, 3, 4)), rng.randint(0, 60)
        nums = [rng.randint(1, 14) for _ in range(k)]
        s = solve(nums, t)
        assert (s is not None) == solvable(nums, t) == (t in all_values(nums)), (nums, t, s)
        if s:
            assert score(tagged(s), nums, t) == 1
    assert (
        solve((1, 2, 3), -4) is None
        and solve((1, 2), -1) is None
        and not solvable((), 3)
        and solve((), 3) is None
    )
    assert solve((7,), 7) == "7" and solve((7,), 8) is None


def test_solver_over_fractions():
    rng = random.Random(1)
    for _ in range(25):
        nums = [rng.randint(1, 9) for _ in range(rng.choice((3, 3, 4)))]
        reach = all_values([Fraction(x) for x in nums], fractions=True)
        for t in rng.sample(range(-5, 40), 4):
            s = solve(nums, t, fractions=True)
            assert (s is not None) == (t in reach) == solvable(nums, t, fractions=True), (nums, t, s)
            if s:
                assert score(tagged(s), nums, t) == 1
    assert (
        solve((8, 8, 3, 3), 24) is None and parse_expression(solve((8, 8, 3, 3), 24, fractions=True))[0] == 24
    )


def test_zeros_on_the_way():
    for nums in ((5, 5, 7), (5, 5, 7, 9), (2, 2, 3, 3)):
        s = solve(nums, 0)
        assert score(tagged(s), nums, 0) == 1, s


# ---- splits


def test_splits_never_meet():
    "1e5 problems from many seeds and generators: one split each, in the promised shares"
    home, n = {}, 0

    def add(p, split):
        nonlocal n
        n += 1
        assert home.setdefault(p.key, split) == split

    for seed in range(3):
        for split in SPLITS:
            for space in (dict(n_numbers=3, max_number=40, max_target=30), SMALL):
                for p in sample_problems(1500, seed, split=split, **space):
                    add(p, split)
    for p in all_problems(Space(n_numbers=(3, 4), max_number=14, min_target=1, max_target=60)):
        add(p, split_of(p))
    for p in sample_problems(4000, 9, **SMALL):
        add(p, split_of(p))
    assert n >= 100_000
    free = [
        split_of(Problem((a, b, c), 24)) for a in range(1, 31) for b in range(1, 31) for c in range(b, 31)
    ]
    for s, share in SPLITS.items():
        assert abs(free.count(s) / len(free) - share) < 0.02


# ---- prompts


class Chat:
    "Stands for a Hugging Face tokenizer"

    def apply_chat_template(self, msgs, tokenize, add_generation_prompt):
        assert tokenize is False and add_generation_prompt is True
        return "".join(f"<|{m['role']}|>{m['content']}" for m in msgs) + "<|assistant|>"


def test_prompts(tmp_path):
    p = Problem((5, 3, 4), 17)
    assert make_prompt(p) == make_prompt(p, "micro") == "using 5 , 3 , 4 make 17 : <think>"
    assert (
        make_prompt(p, "base").endswith("<think>")
        and "5, 3, 4" in make_prompt(p, "base")
        and "{" not in make_prompt(p, "base")
    )
    chat = make_prompt(p, "chat", Chat())
    assert chat.startswith("<|user|>") and chat.endswith("<|assistant|><think>") and "exactly 17" in chat
    for t in TEMPLATES:
        assert [m["role"] for m in messages(p, t)] == ["user"]
    f = tmp_path / "own.txt"
    f.write_text('{"q": "{numbers} -> {target}"} <think>')
    assert make_prompt(p, f) == make_prompt(p, str(f)) == '{"q": "5, 3, 4 -> 17"} <think>'


@pytest.mark.parametrize(
    "opens,want",
    [
        ("", "<think>"),
        ("<think>", "<think>"),
        ("<think>\n", "<think>\n"),
        ("\n<think>\n\n", "\n<think>\n\n"),
        ("<think>\nOkay, ", "<think>\nOkay, "),
        ("<think>\n\n</think>\n\n", "<think>\n\n</think>\n\n<think>"),
        ("think: ", "think: <think>"),
    ],
)
def test_thinking_is_opened_once(opens, want):
    "By the chat template of a reasoning model, or here; what the question says of the tags does not count"

    class Opens(Chat):
        def apply_chat_template(self, *args, **how):
            return super().apply_chat_template(*args, **how) + opens

    for prompt in (
        make_prompt(Problem((5, 3, 4), 17), "chat", Opens()),
        frame("What is <think> for?", "chat", Opens()),
        chat_prompt("Begin with <think>.", Opens()),
    ):
        assert prompt.endswith("<|assistant|>" + want) and prompt.startswith("<|user|>")


def test_bad_prompts(tmp_path):
    p = Problem((5, 3, 4), 17)
    with pytest.raises(ValueError, match="tokenizer"):
        make_prompt(p, "chat")
    with pytest.raises(ValueError, match="micro, base, chat"):
        make_prompt(p, "nope")
    f = tmp_path / "own.txt"
    f.write_text("make {target}")
    with pytest.raises(ValueError, match=r"own.txt: \{numbers\} is missing"):
        make_prompt(p, f)


# ---- verifier

TRICKS = [
    "2**3",
    "7//2*3",
    "3.4*10",
    "5--2",
    "5+-2",
    "-3*2",
    "+5",
    "5-(-2)",
    "9**9**9",
    "1_0",
    "1e3",
    "0x1F",
    "007",
    "1 2",
    "2(3)",
    "(2)(3)",
    "()",
    "(",
    ")",
    ")(",
    "3)",
    "(3",
    "3+",
    "*3",
    "3 4 +",
    "5/0",
    "1/(2-2)",
    "٣+٤",
    "3+४",
    "²",
    '__import__("os")',
    "True",
    "a",
    "None",
    "3,4",
    "3;4",
    "3<4",
    "=3",
    "3=",
    "3 = three",
    "3 % 2",
    "3 & 1",
    "~3",
    "3\x00",
    "\ud800",
    "#",
    "3#",
    "1j",
    "∞",
    "",
]


@pytest.mark.parametrize("trick", TRICKS)
def test_tricks_are_not_expressions(trick):
    with pytest.raises(ValueError):
        parse_answer(trick)


@pytest.mark.parametrize(
    "text,numbers,target",
    [
        ("2**3", (2, 3), 8),
        ("7//2*3", (7, 2, 3), 9),
        ("3.4*10", (3, 4, 10), 34),
        ("5--2", (5, 2), 7),
        ("34", (3, 4), 34),
        ("-2+5", (2, 5), 3),
        ("3+4", (3, 4, 5), 7),
        ("3+4+4", (3, 4), 11),
        ("3+4+0", (3, 4), 7),
        ("3+4*1", (3, 4), 7),
        ("10/3*3", (10, 3), 10),
        ("(3+4) = 8", (3, 4), 8),
        ("(3+4) = 8", (3, 4), 7),
        ("7", (3, 4), 7),
        ("3+4; 7", (3, 4), 7),
        ("1/3", (1, 3), 0),
    ],
)
def test_wrong_answers_get_the_format_score(text, numbers, target):
    assert score(tagged(text), numbers, target) == 0.1
    assert (
        score(tagged(text), numbers, target, format_score=0) == 0
        and score(tagged(text), numbers, target, layout="paper") == 0.1
    )
    assert score(text, numbers, target) == 0


@pytest.mark.parametrize(
    "text",
    [
        "(3+4)*2",
        " ( 3 + 4 ) * 2 ",
        "(3+4)*2 = 14",
        "(3 + 4) × 2",
        "\n(3+4)*2\n",
        "((3+4))*(2)",
        "2*(4+3)=14",
        "(3 \uff0b 4) · 2",
        "(4+3)*2",
    ],
)
def test_right_answers(text):
    for response in (
        tagged(text),
        f"I add… </think>\n{tagged(text)}",
        tagged("1+1") + " no " + tagged(text) + " <answer>",
        f"<answer>{tagged(text)}</answer>",
    ):
        assert score(response, (2, 3, 4), 14) == score(response, [4, 3, 2], 14) == 1


READABLE = [  # 10*3+4 as people and models write it
    "10*3+4 = 34.",
    "10*3+4 = 34.0",
    "10*3+4 = 34.000",
    "10*3+4 == 34",
    "10*3+4 === 34",
    "34 = 10*3+4",
    "34 == 10*3+4.",
    "34.0 = 10*3+4",
    "10*3+4 = +34",
    "10*3+4 = 34 = 34",
    "10*3+4 = 30+4 = 34",
    "34 = 10*3+4 = 30 + 4",
    "10*3+4 = (34)",
    "(10*3+4 = 34)",
    "((10*3)+4 = 34)",
    "(10*3)+4 = (34)",
    "10*3+4 (= 34)",
    "(10*3)+4 (=34).",
    r"10*3+4 \left(= 34\right)",
    "10*3\n+4\n= 34",
    "10*3+4.",
    "10*3+4,",
    "10*3+4;",
    "10*3+4 = 34!",
    "10*3+4=34 ✓",
    "10*3+4 = 34 ✅",
    "10*3+4。",
    "**10*3+4**",
    "*10*3+4*",
    "***10*3+4***",
    "_10*3+4_",
    "__10*3+4__",
    "**10*3+4 = 34**",
    "**10*3+4** = 34",
    "**10*3+4** = **34**.",
    "**10*3+4.**",
    "10\\*3+4",
    "`10*3+4`",
    "``10*3+4``",
    "`10*3+4` = 34",
    "```\n10*3+4\n```",
    "```python\n10*3+4\n```",
    "```10*3+4```",
    "<b>10*3+4</b>",
    "<code>10*3+4</code><br/>",
    '"10*3+4"',
    "'10*3+4'",
    "“10*3+4”",
    "$10*3+4$",
    "$$10*3+4$$",
    "$10*3+4$ = $34$",
    r"\(10*3+4\)",
    r"\[10*3+4\]",
    r"$10 \cdot 3 + 4$",
    r"10 \times 3 + 4",
    r"10\,\times\,3 + 4",
    r"\boxed{10*3+4}",
    r"\boxed{10 \times 3 + 4 = 34}",
    r"\boxed{10*3+4 = 34.}",
    r"$\boxed{10*3+4.}$",
    r"$\boxed{10*3+4}$.",
    r"$$\boxed{\boxed{10*3+4}}$$",
    r"10*3+4 = \boxed{34}",
    r"\boxed{34} = 10*3+4",
    r"**\boxed{\text{10*3+4}}**",
    r"\left(10 \times 3\right) + 4",
    r"\left[10*3\right]+4",
    r"\bigl\{10*3\bigr\}+4",
    "{10}*{3}+4",
    "[10*3]+4",
    "{10*3}+4",
    "[(10*3)+4]",
    "10 x 3 + 4",
    "10x3+4",
    "10 X 3 + 4",
    "(10)x(3)+4",
    "[10] x [3] + 4",
    "10 х 3 + 4",
    "10 × 3 + 4",
    "10·3+4",
    "10⋅3+4",
    "10∗3+4",
    "10•3+4",
    "10✖️3➕4",
    "10&times;3+4",
    "10 &#215; 3 &plus; 4 &equals; 34",
    "（１０＊３）＋４",
    "１０×３＋４＝３４",
    "10\u200b*\u200b3\u200b+4",
    "\ufeff10*3+4",
    "10&nbsp;*&nbsp;3+4",
    "𝟏𝟎*𝟑+𝟒",
    "1\u200b0*3+4",
    "The answer is 10*3+4",
    "the final answer is: 10*3+4.",
    "Answer: 10*3+4",
    "**Answer:** 10*3+4",
    "**Answer**: 10*3+4 = 34",
    "Answer: **10*3+4**",
    r"So the answer is $\boxed{10*3+4}$.",
    "Expression:\n10*3+4",
]


@pytest.mark.parametrize("text", READABLE)
def test_what_a_reader_would_accept_is_accepted(text):
    v = explain(tagged(text), (3, 4, 10), 34)
    assert (v.score, v.reasons, v.value) == (1, (), 34) and score(tagged(text), (10, 3, 4), 34) == 1
    for problem in (((3, 4, 10), 35), ((3, 4, 4, 10), 34), ((10, 34), 34)):
        assert score(tagged(text), *problem) == 0.1
    plain = score(tagged(text), (3, 4, 10), 34, layout="paper")
    assert plain == (0 if "\n" in text else 0.1)  # it knows one line, and no typography


@pytest.mark.parametrize(
    "text,numbers,target",
    [
        (r"\frac{10}{2}", (2, 10), 5),
        (r"8 / \frac{4}{2}", (2, 4, 8), 4),
        ("10 ÷ 2", (2, 10), 5),
        (r"\dfrac{\frac{12}{2}}{3} \div 1", (1, 2, 3, 12), 2),
        (r"\frac{{10}+2}{\left(3\right)}", (2, 3, 10), 4),
        (r"\boxed{\tfrac {10} {2}} = 5", (2, 10), 5),
        ("10 − 2", (2, 10), 8),
        ("10 – 2", (2, 10), 8),
        ("10 &divide; 2 &minus; 3", (2, 3, 10), 2),
        ("1,000 + 5", (5, 1000), 1005),
        ("1,000+5 = 1,005", (5, 1000), 1005),
        (r"1{,}000 + 5", (5, 1000), 1005),
        ("10\xa0*\xa03\u2009+\u20034", (3, 4, 10), 34),
        ("7", (7,), 7),
        ("7 = 7", (7,), 7),
        (r"\boxed{7}", (7,), 7),
        ("3 - 5 = −2", (3, 5), -2),
        ("3 - 5 = (-2)", (3, 5), -2),
        (r"3-5 = \boxed{-2.0}", (3, 5), -2),
        ("[2*(3+{4})]", (2, 3, 4), 14),
    ],
)
def test_other_readable_answers(text, numbers, target):
    assert str(explain(tagged(text), numbers, target)) == "1: correct"


MISREAD = {  # an answer to 3, 4, 10 → 34 that looks nearly right: what is said of it
    "10*3+4 = 35": "the stated result is wrong: the expression is 34, not 35",
    "35 = 10*3+4": "the stated result is wrong: the expression is 34, not 35",
    "10*3+4 = 34 = 35": "the stated result is wrong: the expression is 34, not 35",
    "10*3 = 30+4 = 34": "the stated result is wrong: the expression is 30, not 30+4",
    "10*3+4 = 34.5": "the stated result is wrong: the expression is 34, not 34.5",
    "10/3 = 3.33": "the stated result is wrong: the expression is 10/3, not 3.33",
    "1/2*3 = 1.5": "unused number 4; unused number 10; 1 is not one of the numbers; "
    "2 is not one of the numbers; wrong value: 3/2 instead of 34",
    "34.0 = 34.0": "results are stated, but no expression",
    "10*3+4 =": "the end comes where a number should be",
    "= 34": "the end comes where a number should be",
    "10*3+4 = ?": "unknown character '?'",
    "10*3+4 ≈ 34": "unknown character '≈'",
    "10*3+4 = thirty-four": "unknown character 't'",
    "10*3+4!": "unknown character '!'",
    "3!+4": "unknown character '!'",
    "10**3": "'*' comes where a number should be",
    "10 * * 3": "'*' comes where a number should be",
    "**10**3**": "'*' comes where a number should be",
    "10×\u200b×3": "'*' comes where a number should be",
    "10//3": "'/' comes where a number should be",
    "10÷÷3": "'/' comes where a number should be",
    "10^3": "unknown character '^'",
    "3²": "unknown character '²'",
    "½*10": "unknown character '½'",
    "3<sup>2</sup>": "unknown character '<'",
    "10%3": "unknown character '%'",
    "1e1*3": "unknown character 'e'",
    "3.4*10": "unknown character '.'",
    ".5*10": "unknown character '.'",
    "3,4*10": "unknown character ','",
    "10, 3, 4": "unknown character ','",
    "-4+38": "'-' comes where a number should be",
    "+10*3+4": "'+' comes where a number should be",
    "10*3--4": "'-' comes where a number should be",
    "010*3+4": "'010' begins with a 0",
    "0x1F": "unknown character 'F'",
    "3$4": "'4' comes where an operation or the end should be",
    "3`4": "'4' comes where an operation or the end should be",
    "3\n4": "'4' comes where an operation or the end should be",
    "３ ４": "'4' comes where an operation or the end should be",
    r"3\,4": "'4' comes where an operation or the end should be",
    "3\u20624": "unknown character '\\u2062'",
    "3\u202e4": "unknown character '\\u202e'",
    "٣+٤": "unknown character '٣'",
    r"\boxed{3}\boxed{4}": "an opening bracket comes where an operation or the end should be",
    "10{3}": "an opening bracket comes where an operation or the end should be",
    r"10\frac{3}{4}": "an opening bracket comes where an operation or the end should be",
    r"\frac12": "unknown character '\\\\'",
    r"\sqrt{4}": "unknown character '\\\\'",
    "(10*3]+4": "']' closes no bracket of its kind",
    "[10*3+4": "'[' is never closed",
    r"\boxed{10*3+4": "'{' is never closed",
    "(10*3+4": "the end comes where an operation or a closing bracket should be",
    "(10*3 4)": "'4' comes where an operation or a closing bracket should be",
    "10*3+4)": "a closing bracket comes where an operation or the end should be",
    "()": "a closing bracket comes where a number should be",
    r"\boxed{}": "the end comes where a number should be",
    "{}": "the end comes where a number should be",
    "**": "'*' comes where a number should be",
    "$$": "the end comes where a number should be",
    "": "the answer tag is empty",
    "The answer is not 10*3+4": "unknown character 'n'",
    "10*3+4\n10*4-6": "'10' comes where an operation or the end should be",
    "10*3 = 30\n30+4 = 34": "'30' comes where an operation or the end should be",
    "10/(4-4)": "division by zero",
    "1234567890123": "a number of 13 digits, at most 12",
    "1+" * 70 + "1": "too long: 141 tokens, at most 64",
    "1 " * 101: "too long: 201 characters, at most 200",
    "(" * 17 + "1" + ")" * 17: "brackets are nested more than 16 deep",
}


@pytest.mark.parametrize("text,why", MISREAD.items())
def test_what_is_refused_and_why(text, why):
    v = explain(tagged(text), (3, 4, 10), 34)
    assert (v.score, "; ".join(v.reasons)) == (0.1, why) and score(tagged(text), (3, 4, 10), 34) == 0.1


def test_what_is_asked_must_be_whole_numbers():
    np = pytest.importorskip("numpy")
    ok = tagged("10*3+4")
    for numbers in ([3, 4, 10], np.array([3, 4, 10]), (np.int8(3), 4, np.uint64(10)), {3, 4, 10}):
        assert score(ok, numbers, np.int32(34)) == explain(ok, numbers, np.int64(34)).score == 1
    for odd in ("34", 34.0, np.float64(34), True, np.True_, None, Fraction(34), [34]):
        for ask in (Problem, lambda *p: score(ok, *p), lambda *p: explain(ok, *p), lambda *p: score("", *p)):
            for problem in (((3, 4, 10), odd), ((3, 4, odd), 34), ([odd], 34)):
                with pytest.raises(TypeError, match="a whole number is wanted"):
                    ask(*problem)
    with pytest.raises(TypeError, match="'1' is a str"):
        score(ok, "10", 34)


def test_nothing_hides_behind_spaces():
    for n in (1, 50, 190, 300, 500, MB):
        assert score(tagged("3+4" + " " * n + "x"), (3, 4), 7) == 0.1


def test_values_are_exact():
    assert score(tagged("8 / (3 − 8÷3)"), (3, 3, 8, 8), 24) == 1
    assert (
        score(tagged("1/3*3*1000000000000"), (1, 3, 3, 10**12), 10**12) == 0.1
    )  # 13 digits is beyond the bound
    assert score(tagged("100000000000/3*3"), (10**11, 3, 3), 10**11) == 1
    assert parse_answer("3 - 5 = -2") == (-2, [3, 5])


def test_paper_mode_only_differs_in_layout():
    ok = tagged("(3+4)*2")
    assert [
        score(r, (2, 3, 4), 14, layout="paper")
        for r in (
            ok,
            "so\n" + ok,
            ok + "\n",
            ok + "\nbye",
            tagged("(3+4)*2 = 14"),
            tagged("(3+4)×2"),
            "<answer>(3+4)\n*2</answer>",
        )
    ] == [1, 1, 0, 0, 0.1, 0.1, 0]


def test_answer_of():
    for text, want in (
        ("", None),
        ("<answer>", None),
        ("</answer>", None),
        ("</answer><answer>", None),
        ("<answer></answer>", ""),
        ("<answer>1", None),
        ("<answer>1</answer><answer>2", "1"),
        ("<answer>1</answer> 2</answer>", "1"),
        ("<answer>1<answer>2</answer>", "2"),
        ("<ANSWER>1</ANSWER>", None),
        ("a<answer> 1\n</answer>b", "1"),
    ):
        assert answer_of(text) == want, text


PLAIN = str.maketrans("×÷−–·（）＋＊＝１３４０[]{}", "*/--*()+*=1340()()", "\u200b\ufeff$`")
SAID = (
    (r"\times", "*"),
    (r"\div", "/"),
    (r"\boxed", ""),
    ("&times;", "*"),
    ("x", "*"),
    ("Answer:", ""),
    ("<b>", ""),
)


def is_solution(text, numbers, target):
    "A second opinion on what a reader sees: does Python find all `numbers` and the `target` on one side?"
    if re.search(r"\d[\s$`]+\d", text):
        return False  # digits that stand apart are no number
    for said, plain in SAID:
        text = text.replace(said, plain)
    for side in text.translate(PLAIN).split("="):
        ends = " \n\t_*.,;!✓" + "()" * (side.count("(") != side.count(")"))  # a bracket around all sides
        try:
            value, used = ast_value(" ".join(side.strip(ends).split()))
        except (SyntaxError, AssertionError, KeyError, ZeroDivisionError, ValueError):
            continue
        if value == target and sorted(used) == sorted(numbers):
            return True
    return False


WIDE = {48 + i: 0xFF10 + i for i in range(10)}
STYLES = {
    "+": ("+", " + ", "＋", "➕", "&plus;"),
    "-": ("-", " - ", "−", " – ", "&minus;"),
    "*": ("*", " × ", "·", " x ", r" \times ", "\u200b*\u200b", "&times;"),
    "/": ("/", " ÷ ", r"\div ", "／", " / "),
}
BRACKETS = (("(", ")"), ("[", "]"), ("{", "}"), ("（", "）"), (r"\left( ", r"\right)"), (r"\boxed{", "}"))
AROUND = (
    ("", ""),
    ("**", "**"),
    ("`", "`"),
    ("$", "$"),
    (r"\boxed{", "}"),
    ("```\n", "\n```"),
    ("Answer: ", "."),
    ("“", "”"),
    ("", "\n"),
    ("The answer is **", "**,"),
    ("(", ")"),
    ("<b>", "</b>"),
)
RESULTS = (
    "{}",
    "{} = {v}",
    "{} = {v}.",
    "{} == {v}",
    "{v} = {}",
    "{} = {v}.0",
    "{} = {v} ✓",
    "{} = {v} = {v}",
)


@st.composite
def written(draw, depth=2):
    "An expression as somebody writes it, its value and numbers as it is built, and if it may stand bare"
    if depth == 0 or draw(st.integers(0, 4)) == 0:
        n = draw(st.integers(1, 1200))
        return draw(st.sampled_from((str(n), f"{n:,}", str(n).translate(WIDE)))), Fraction(n), [n], True
    (a, x, m, alone), (b, y, n, whole) = draw(written(depth - 1)), draw(written(depth - 1))
    op = draw(st.sampled_from("+-*/" if y else "+-*"))
    value = x + y if op == "+" else x - y if op == "-" else x * y if op == "*" else x / y
    if op == "/" and draw(st.booleans()):
        return rf"\frac{{{a}}}{{{b}}}", value, m + n, True
    (lo, lc), (ro, rc) = draw(st.sampled_from(BRACKETS)), draw(st.sampled_from(BRACKETS))
    left, right = a if alone else lo + a + lc, b if whole else ro + b + rc
    return left + draw(st.sampled_from(STYLES[op])) + right, value, m + n, False


FUZZ = dict(deadline=None, suppress_health_check=list(HealthCheck), derandomize=True, database=None)


@settings(max_examples=600, **FUZZ)
@given(written(), st.sampled_from(AROUND), st.sampled_from(RESULTS), st.integers(1, 9))
def test_typography_changes_no_value(expression, around, result, off):
    text, value, used, _ = expression
    if len(used) == 1 or value.denominator != 1 or value < 0 and ".0" not in result:
        result = RESULTS[0]

    def say(v):
        return tagged(around[0] + result.replace("{}", text).replace("{v}", str(v)) + around[1])

    answer = say(value)
    if len(answer) > 200:
        return
    v = explain(answer, used, 0)
    assert (v.value, v.reasons) == (value, (f"wrong value: {value} instead of 0",) if value else ()), answer
    if value.denominator == 1:
        assert [score(answer, used, int(value) + d) for d in (0, off)] == [1, 0.1]
    assert score(answer, used + [off], int(value)) == score(answer, used[1:], int(value)) == 0.1
    if "{v}" in result:
        why = explain(say(value + off), used, int(value)).reasons[0]
        assert why.startswith(f"the stated result is wrong: the expression is {value}, not ")


BITS = [
    "**",
    "*",
    "`",
    "$",
    "x",
    " x ",
    "×",
    "÷",
    "−",
    "²",
    "½",
    ".",
    ",",
    ";",
    "!",
    "=",
    "==",
    "= 34",
    "=34.0",
    "34 =",
    "\u200b",
    "\u2062",
    "\n",
    " ",
    "(",
    ")",
    "[",
    "]",
    "{",
    "}",
    r"\boxed{",
    r"\times",
    r"\div",
    "&times;",
    "//",
    "%",
    "^",
    "0",
    "1",
    "3",
    "4",
    "10",
    "e",
    "_",
    "✓",
    "Answer:",
    "-",
    "+",
    "/",
    "<b>",
    "（",
    "）",
    "１",
    "٣",
]
RIGHT = (
    ["10", "*", "3", "+", "4"],
    ["(", "3", "*", "10", ")", "+", "4"],
    ["4", "+", "10", "*", "3"],
    ["10", "*", "4", "-", "6"],
)


@settings(max_examples=2000, **FUZZ)
@given(
    st.sampled_from(RIGHT),
    st.lists(st.tuples(st.integers(0, 8), st.sampled_from(BITS)), max_size=4),
    st.lists(st.integers(0, 8), max_size=1),
)
def test_what_is_accepted_is_a_solution(tokens, more, gone):
    "Answers with bits put in and taken out: whatever gets 1 solves the problem for Python's grammar, too"
    tokens = [t for i, t in enumerate(tokens) if i not in gone]
    for at, bit in more:
        tokens.insert(at, bit)
    text = "".join(tokens)
    if score(tagged(text), (3, 4, 10), 34) == 1:
        assert is_solution(text, (3, 4, 10), 34), text


@settings(max_examples=300, **FUZZ)
@given(st.text("0123456789+-*/() \n", max_size=30))
def test_plain_answers_mean_the_same_in_both_layouts(text):
    try:
        strict = parse_expression(text)
    except ValueError:
        return
    assert parse_answer(text) == strict


NUM = st.integers(0, 120)


@st.composite
def expressions(draw, depth=4):
    if depth == 0 or draw(st.integers(0, 3)) == 0:
        return str(draw(NUM))
    left, operator = draw(expressions(depth - 1)), draw(st.sampled_from([" + ", "-", "*", " / "]))
    s = f"{left}{operator}{draw(expressions(depth - 1))}"
    return f"({s})" if draw(st.booleans()) else s


@settings(max_examples=600, **FUZZ)
@given(expressions(), st.integers(-3, 200))
def test_agrees_with_pythons_grammar(text, target):
    if len(text) > MAX_CHARS:
        return
    try:
        value, used = ast_value(text)
    except ZeroDivisionError:
        value, used = None, [1]
    try:
        assert parse_expression(text) == (value, used)
    except ValueError:
        assert (
            value is None
            or text.count("(") > MAX_DEPTH
            or len(text) > MAX_CHARS
            or sum(c in "+-*/()" for c in text) + len(used) > 64
        )
    if value is not None and value.denominator == 1 and len(used) < 12 and text.count("(") < 10:
        assert score(tagged(text), used, int(value)) == 1 and score(tagged(text), used, int(value) + 1) == 0.1
        assert score(tagged(text), used + [1], int(value)) == 0.1
        assert score(tagged(text), used, target) == (1 if value == target else 0.1)


PIECES = [
    "<answer>",
    "</answer>",
    "<think>",
    "</think>",
    "<",
    ">",
    "/",
    "answer",
    "+",
    "-",
    "*",
    "/",
    "//",
    "**",
    "(",
    ")",
    "=",
    "×",
    "÷",
    "−",
    ".",
    " ",
    "\n",
    "\t",
    "\x00",
    "0",
    "1",
    "3",
    "4",
    "12",
    "99999999999999",
    "٣",
    "²",
    "½",
    "\ud800",
    "e",
    "_",
    "3+4",
    "(3+4)",
    "<answer>3+4</answer>",
    "=7",
    "",
]
NEAR = st.lists(st.sampled_from(PIECES), max_size=25).map("".join)
VERDICTS = []


def grade_both_ways(text):
    for layout in ("tolerant", "paper"):
        s = score(text, (3, 4), 7, layout=layout)
        v = explain(text, (3, 4), 7, layout=layout)
        assert v.score == s and bool(v.reasons) == (s < 1)
        assert s in (0, 0.1, 1)
        if s == 1:
            assert is_solution(answer_of(text), (3, 4), 7)
    return s


@settings(max_examples=250, **FUZZ)
@given(
    st.lists(
        st.one_of(NEAR, NEAR.map(tagged), st.text(max_size=40), st.text(max_size=20).map(tagged)),
        min_size=44,
        max_size=50,
    )
)
def test_never_raises_never_slow(texts):
    "each example is a batch of texts, so that all of them together are more than 10,000"
    for text in texts:
        with ends(10):
            VERDICTS.append(grade_both_ways(text))  # needs less than a millisecond


def test_the_fuzz_saw_enough():
    if VERDICTS:
        assert len(VERDICTS) >= 10_000 and {0, 0.1, 1} <= set(VERDICTS)


MB = 1_000_000


@pytest.mark.parametrize(
    "name,text",
    [
        ("parens", "(" * MB),
        ("parens in a tag", tagged("(" * MB)),
        ("closed", tagged("(" * MB + "1" + ")" * MB)),
        ("nested 150", tagged("(" * 90 + "1" + ")" * 90)),
        ("power", tagged("9**9**9")),
        ("digits", tagged("9" * MB)),
        ("sum", tagged("1+" * MB + "1")),
        ("opens", "<answer>" * MB),
        ("closes", "</answer>" * MB),
        ("pairs", tagged("") * MB),
        ("opens, one close", "<answer>" * MB + "</answer>"),
        ("nested tags", "<answer>" * MB + "1" + "</answer>" * MB),
        ("almost", "<answe" * MB),
        ("spaces", tagged(" " * MB)),
        ("result", tagged("1=" + "9" * MB)),
        ("result spaces", tagged("1=" + " " * MB + "x")),
        ("equals", tagged("=" * MB)),
        ("unicode digits", tagged("٣" * MB)),
        ("minus", tagged("−" * MB)),
        ("sides", tagged("1=" * 100)),
        ("many sides", tagged("1=" * MB)),
        ("emphasis", tagged("_" * 200)),
        ("boxes", tagged("\\boxed{" * 28)),
        ("entities", tagged("&" * 200)),
        ("zero width", tagged("\u200b" * MB)),
        ("words", tagged("the " * 49)),
        ("words after spaces", tagged("3+4" + " " * MB + "x")),
        ("lines", "\n" * MB),
        ("nulls", "\0" * MB),
    ],
)
def test_pathological(name, text):
    with ends(10):  # needs milliseconds; what grows with the square of a million letters takes an hour
        assert score(text, (3, 4), 7) in (0, 0.1) and score(text, (3, 4), 7, layout="paper") in (0, 0.1)


def test_deep_inside_a_deep_stack():
    "a recursion limit that is nearly used up must not turn an answer into an exception"

    def down(n):
        return (
            score(tagged("(" * MAX_DEPTH + "3" + ")" * MAX_DEPTH + "+4"), (3, 4), 7)
            if n == 0
            else down(n - 1)
        )

    assert down(500) == 1


# ---- parquet


def test_round_trip(tmp_path):
    for split in (*SPLITS, None):
        ps = sample_problems(30, 1, split=split)
        assert from_parquet(to_parquet(ps, tmp_path / "deep" / f"{split}.parquet", split)) == ps
    assert from_parquet(to_parquet([], tmp_path / "none.parquet")) == []
    assert not [f for f in tmp_path.rglob("*") if "tmp" in f.name]


def test_schema_is_verls(tmp_path):
    p = sample_problems(1, 1, split="train")[0]
    (row,) = pq.read_table(to_parquet([p], tmp_path / "a.parquet", "train", template="chat")).to_pylist()
    assert row == dict(
        data_source="countdown",
        prompt=messages(p, "chat"),
        ability="math",
        extra_info=dict(split="train", index=0),
        reward_model=dict(style="rule", ground_truth=dict(target=p.target, numbers=list(p.numbers))),
    )


def test_a_leaking_split_is_refused_and_nothing_is_written(tmp_path):
    ps = sample_problems(5, 1, split="eval")
    with pytest.raises(ValueError, match="problem 0.*'eval', not 'train'"):
        to_parquet(ps, tmp_path / "a.parquet", "train")
    to_parquet(ps, tmp_path / "test.parquet", "test")
    assert os.listdir(tmp_path) == ["test.parquet"]


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    f, ps = tmp_path / "a.parquet", sample_problems(5, 1)
    to_parquet(ps, f)

    def broken(table, path):
        Path(path).write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(pq, "write_table", broken)
    with pytest.raises(OSError):
        to_parquet(sample_problems(5, 2), f)
    monkeypatch.undo()
    assert from_parquet(f) == ps and os.listdir(tmp_path) == ["a.parquet"]


def rows(n=3):
    return [
        dict(
            prompt=[dict(role="user", content="q")],
            reward_model=dict(style="rule", ground_truth=dict(target=7, numbers=[3, 4])),
        )
        for _ in range(n)
    ]


def truth(r, **kw):
    r["reward_model"]["ground_truth"].update(kw)


def nulled(r, k):
    r[k] = None


@pytest.mark.parametrize(
    "spoil,word",
    [
        (
            lambda r: truth(r, numbers=None),
            "row 1, column reward_model.ground_truth.numbers: missing or null",
        ),
        (
            lambda r: truth(r, numbers=[3, None]),
            "row 1, column reward_model.ground_truth.numbers: None is not a whole",
        ),
        (
            lambda r: truth(r, numbers=[]),
            r"row 1, column reward_model.ground_truth.numbers: \[\] is not a list",
        ),
        (
            lambda r: truth(r, numbers=[3, -4]),
            "row 1, column reward_model.ground_truth.numbers: -4 is below 1",
        ),
        (lambda r: truth(r, target=None), "row 1, column reward_model.ground_truth.target: missing or null"),
        (
            lambda r: nulled(r["reward_model"], "ground_truth"),
            "row 1, column reward_model.ground_truth: missing",
        ),
        (lambda r: nulled(r, "reward_model"), "row 1, column reward_model: missing"),
        (lambda r: nulled(r, "prompt"), "row 1, column prompt: missing"),
        (lambda r: nulled(r["prompt"][0], "role"), "row 1, column prompt"),
    ],
)
def test_malformed_row(tmp_path, spoil, word):
    rs = rows()
    spoil(rs[1])
    pq.write_table(pa.Table.from_pylist(rs), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=word):
        from_parquet(tmp_path / "a.parquet")


ASKED = dict(prompt=[dict(role="user", content="q")])


@pytest.mark.parametrize(
    "rs,word",
    [
        ([dict(target=7, numbers=["3", "4"])], "row 0, column numbers: '3' is not a whole"),
        ([dict(target="7", numbers=[3, 4])], "row 0, column target: '7'"),
        ([dict(target=7.0, numbers=[3, 4])], "row 0, column target: 7.0"),
        ([dict(target=7, numbers="3 4")], "column numbers: '3 4' is not a list"),
        ([dict(target=7)], "column prompt, reward_model is missing"),
        ([dict(numbers=[3, 4])], "column target is missing"),
        ([dict(prompt="q", reward_model="r")], "row 0, column prompt"),
        ([dict(reward_model=dict(ground_truth="x"))], "column prompt is missing"),
        (
            [ASKED | dict(reward_model="r")],
            "row 0, column reward_model: 'r' is not a record; store an object",
        ),
        *(
            (
                [ASKED | dict(reward_model=dict(ground_truth=t))],
                f"row 0, column reward_model.ground_truth{word}",
            )
            for t, word in (
                ("34", ": '34' is not a record"),
                ('{"target": 7, "nu', ": .* is not a record; store an object with numbers, or the JSON"),
                ("[" * 100_000, ": .{82} is not a record"),
                ("[3, 4]", r": .\[3, 4\]. is not a record"),
                ('{"target": 7}', ".numbers: missing"),
                ('{"target": "7", "numbers": [3, 4]}', ".target: '7' is not a whole"),
                ('{"target": 7, "numbers": [3, "4"]}', ".numbers: '4' is not a whole"),
                ('{"target": 7.0, "numbers": [3, 4]}', ".target: 7.0 is not a whole"),
                ('{"target": true, "numbers": [3, 4]}', ".target: True is not a whole"),
                ('{"target": 7, "numbers": "3 4"}', ".numbers: '3 4' is not a list"),
                ('{"target": 7, "numbers": [3, -4]}', ".numbers: -4 is below 1"),
            )
        ),
    ],
)
def test_malformed_columns(tmp_path, rs, word):
    pq.write_table(pa.Table.from_pylist(rs), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=word):
        from_parquet(tmp_path / "a.parquet")


TRUTH = '{"target": 7, "numbers": [3, 4]}'


@pytest.mark.parametrize(
    "reward",
    [
        dict(style="rule", ground_truth=TRUTH),
        dict(ground_truth=TRUTH.encode()),
        dict(ground_truth=f" {TRUTH}\n"),
        dict(ground_truth='{"nums":[3,4],"target":7,"more":null}'),
        dict(ground_truth=dict(target=7, numbers="[3, 4]")),
        dict(ground_truth=dict(target=7, nums=[3, 4])),
        f'{{"ground_truth": {TRUTH}}}',
        json.dumps(dict(ground_truth=TRUTH)),
    ],
)
def test_records_stored_as_json(tmp_path, reward):
    for name, prompt in (("a", ASKED["prompt"]), ("b", json.dumps(ASKED["prompt"]))):
        f = tmp_path / f"{name}.parquet"
        pq.write_table(pa.Table.from_pylist([dict(prompt=prompt, reward_model=reward)] * 2), f)
        assert from_parquet(f) == [Problem((3, 4), 7)] * 2
        assert read_problems(f)[0] == [Problem((3, 4), 7)]


def test_other_files(tmp_path):
    pq.write_table(pa.Table.from_pylist([dict(target=7, nums=[3, 4])]), tmp_path / "hub.parquet")
    assert (
        from_parquet(tmp_path / "hub.parquet")
        == problems_from_rows([dict(target=7, numbers=[3, 4])])
        == [Problem((3, 4), 7)]
    )
    for content in (b"", b"not parquet", b"PAR1 truncated PAR1"):
        (tmp_path / "x.parquet").write_bytes(content)
        with pytest.raises(ValueError, match="x.parquet is not a complete parquet file"):
            from_parquet(tmp_path / "x.parquet")
    with pytest.raises(FileNotFoundError):
        from_parquet(tmp_path / "absent.parquet")

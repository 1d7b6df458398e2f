"A hosted teacher: what is asked, how replies are read, and how many are asked until enough of them will do"

import json
import random
import re
from dataclasses import asdict, fields
from itertools import permutations
from math import ceil

import pandas as pd
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from stars.habits import teacher as T
from stars.habits.behaviors import HABIT_NAMES, count_behaviors
from stars.habits.priming import MIXES, PRIMING_SCHEMA, dots, empty_cot, read_rows, write_rows
from stars.llm.ask import OverBudget
from stars.llm.ledger import Ledger
from stars.llm.requests import Model, Reply
from stars.llm.services import Lost, Refused
from stars.models.checkpoints import load_model, load_tokenizer
from stars.rl.evals import failures
from stars.rl.rollouts import LlamaEngine, seeds_of
from stars.rl.sft import encode
from stars.task.countdown import Problem, answer_of, make_prompt, score, split_of
from stars.task.problems import sample_problems

WORLD = dict(n_numbers=(3, 4), min_number=1, max_number=24, min_target=10, max_target=25)
PROBLEMS = sample_problems(8, seed=1, split="prime", **WORLD)
MODEL = Model.parse("anthropic:claude-haiku-4-5")
P = Problem((3, 4, 5), 17)
THOUGHTS = "3 + 4 = 7, 7 + 5 = 12. Let me try something else. 3 * 4 = 12, 12 + 5 = 17."
GOOD = f"<think>\n{THOUGHTS}\n</think>\n<answer>3 * 4 + 5</answer>"


def problem_in(request):
    numbers, target = re.fullmatch(r"Numbers: ([\d, ]+)\nTarget: (\d+)", request.prompt).groups()
    return Problem(tuple(map(int, numbers.split(","))), int(target))


class Scripted:
    "A service that answers by a rule, and counts"

    def __init__(self, rule):
        self.rule, self.sent = rule, []

    def answer(self, request, key):
        self.sent.append(request)
        reply = self.rule(request)
        if reply is None:
            raise Refused("no")
        return reply if isinstance(reply, Reply) else Reply(reply, input_tokens=1000, output_tokens=200)


def backtracks(request, last=""):
    "A reply that shows backtracking and nothing else"
    a, b, *rest = problem_in(request).numbers
    c = rest[0]
    first = f"{a} + {b} = {a + b}, {a + b} + {c} = {a + b + c}."
    second = f"{a} * {b} = {a * b}, {a * b} + {c} = {a * b + c}."
    answer = " + ".join(map(str, (a, b, *rest)))
    return f"<think>{first} Let me try something else. {second}{last}</think><answer>{answer}</answer>"


def fails_for(share, otherwise=backtracks, bad="no idea"):
    "Replies of which a share, drawn by the request, are bad"
    return lambda r: bad if random.Random(f"{r.prompt}/{r.sample}").random() < share else otherwise(r)


SETTINGS = {f.name for f in fields(T.Teaching)}


def teach(tmp_path, rule, n=10, mix="only_backtracking", name="a.db", seed=0, **more):
    "Rows, report and service of a scripted teacher; `more` are fields of `Teaching` and arguments of `ask`"
    service = Scripted(rule)
    teaching = T.Teaching(**{k: v for k, v in more.items() if k in SETTINGS})
    options = dict(service=service, progress=False) | {k: v for k, v in more.items() if k not in SETTINGS}
    with Ledger(tmp_path / name) as ledger:
        out = T.ask_teacher(mix, PROBLEMS, n, seed, MODEL, ledger, teaching, **options)
    return *out, service


# --- prompts


@pytest.mark.parametrize("mix", MIXES)
def test_a_prompt_asks_for_each_habit_or_forbids_it(mix):
    prompt = T.teacher_prompt(mix)
    for h in HABIT_NAMES:
        assert (T.SHOW_HABIT[h] in prompt, T.AVOID_HABIT[h] in prompt) == (
            h in MIXES[mix],
            h not in MIXES[mix],
        )
    assert ("Make one attempt" in prompt) == (not MIXES[mix]) and ("make six at most" in prompt) == bool(
        MIXES[mix]
    )
    assert (
        T.EXAMPLES[mix].think in prompt
        and "\n\n\n" not in prompt
        and len({T.teacher_prompt(m) for m in MIXES}) == len(MIXES)
    )


@pytest.mark.parametrize(
    "answer",
    [
        "3 x 4 + 5",
        "\\(3 \\times 4 + 5\\)",
        "**3 * 4 + 5**",
        "3 * 4 + 5 = 17",
        "3 * 4 + 5 = 18",
        "[3 * 4] + 5",
    ],
)
def test_answers_are_read_as_the_verifier_reads_them(answer):
    row, reason = T.read_trace(
        Reply(f"<think>3 * 4 = 12.</think><answer>{answer}</answer>"),
        Problem((3, 4, 5), 17),
        "backtracking_verification",
    )
    assert reason == "" and row["score"] == (0.1 if "18" in answer else 1)


@pytest.mark.parametrize("mix", MIXES)
def test_the_example_shows_its_mix_and_passes_its_own_reading(mix):
    "as a teacher who copied the example word for word would be read"
    shown = T.teacher_prompt(mix).split("the reply could be\n\n")[1]
    row, reason = T.read_trace(Reply(shown), T.EXAMPLE, mix)
    assert reason == "" and row["score"] == 1 and T.off_mix(row) == "" and split_of(T.EXAMPLE) == "prime"
    counts = count_behaviors(T.EXAMPLES[mix].think, T.EXAMPLE.numbers, T.EXAMPLE.target)
    assert {h for h, c in counts.items() if c} == MIXES[mix] and all(c > 1 for c in counts.values() if c)
    assert {
        h for h, c in count_behaviors(row["completion"], T.EXAMPLE.numbers, T.EXAMPLE.target).items() if c
    } == MIXES[mix]  # with tags and answer, too
    words = len(T.EXAMPLES[mix].think.split())
    assert 100 <= words <= 400 if MIXES[mix] else 20 <= words <= 80


def test_an_examples_arithmetic_is_right():
    for mix, trace in T.EXAMPLES.items():
        for a, op, b, v in re.findall(r"(\d+) ([-+*/]) (\d+) = (\d+)", trace.think):
            assert eval(f"{a} {op} {b}") == int(v), (mix, a, op, b, v)


def test_requests(monkeypatch):
    a, b = (
        T.teacher_requests("all_strategies", PROBLEMS, 10, 0),
        T.teacher_requests("all_strategies", PROBLEMS, 100, 0, T.Teaching(max_tokens=2048, temperature=0.5)),
    )
    assert len(a) == 12 and len(b) == 120 and len({r.system for r in a + b}) == 1
    assert (
        [(r.prompt, r.sample) for r in a] == [(r.prompt, r.sample) for r in b[:12]]
        and b[0].max_tokens == 2048
        and b[0].temperature == 0.5
    )
    assert [problem_in(r) for r in a[:8]] == PROBLEMS and [problem_in(r).key for r in a[8:]] == [
        p.key for p in PROBLEMS[:4]
    ]
    other = T.teacher_requests("all_strategies", PROBLEMS, 100, 1)
    assert (
        len({(r.prompt, r.sample) for r in b + other}) == 240
    )  # repetitions and seeds are questions of their own
    monkeypatch.setattr(T, "_SAMPLES", 3)
    with pytest.raises(ValueError, match="more than 3 times; give more than 8 problems"):
        T.teacher_requests("all_strategies", PROBLEMS, 200, 0)


@pytest.mark.parametrize(
    "change,message",
    [
        (dict(mix="hope"), "mix='hope'"),
        (dict(problems=[]), "problems is empty"),
        (dict(n=0), "n=0"),
        (dict(over=0.5), "over=0.5"),
        (dict(rounds=0), "rounds=0"),
    ],
)
def test_nothing_is_sent_that_cannot_work(change, message, tmp_path):
    service, args = Scripted(backtracks), dict(mix="only_backtracking", problems=PROBLEMS, n=3, seed=0)
    with pytest.raises(ValueError, match=message), Ledger(tmp_path / "a.db") as ledger:
        if change.keys() & SETTINGS:
            args |= dict(teaching=T.Teaching(**change))
        else:
            args |= change
        T.ask_teacher(model=MODEL, ledger=ledger, service=service, **args)
    assert not service.sent


# --- reading


def read(text, finish="stop", mix="only_backtracking", **kw):
    return T.read_trace(Reply(text, finish), P, mix, **kw)


@pytest.mark.parametrize(
    "text",
    [
        GOOD,
        GOOD.removeprefix("<think>"),
        f"\n\n  {GOOD} \n",
        f"```\n{GOOD}\n```",
        f"```text\n{GOOD}```",
        GOOD.replace("think>", "Think>").replace("answer>", "ANSWER>"),
        f"Here is the text:\n{GOOD}",
        f"{GOOD}\nThat was it.",
        GOOD.replace("<answer>", "The expression is <answer>  "),
        GOOD + "\n<answer>3 * 4  + 5</answer>",
    ],
)
def test_harmless_variation_makes_the_same_row(text):
    row, reason = read(text, teacher="t")
    assert reason == "" and row == dict(
        query=make_prompt(P),
        completion=f" {THOUGHTS} </think> <answer> 3 * 4 + 5 </answer>",
        numbers=[3, 4, 5],
        target=17,
        mix="only_backtracking",
        teacher="t",
        score=1.0,
    )


@pytest.mark.parametrize(
    "text,finish,reason",
    [
        (GOOD, "length", "truncated"),
        ("", "refusal", "refusal"),
        (GOOD, "refusal", "refusal"),
        ("I can't help with that.", "stop", "refusal"),
        ("I’m unable to do this.", "stop", "refusal"),
        ("", "stop", "no tags"),
        ("3 * 4 + 5", "stop", "no tags"),
        ("3 * 4 = 12. <answer>3 * 4 + 5</answer>", "stop", "tags out of place"),
        (GOOD.removesuffix("</answer>"), "stop", "tags out of place"),
        (GOOD.split("<answer>")[0], "stop", "tags out of place"),
        (GOOD + GOOD, "stop", "tags out of place"),
        ("a <answer>3</answer> b </think><answer>3 * 4 + 5</answer>", "stop", "tags out of place"),
        ("<think> a <think> b </think><answer>3 * 4 + 5</answer>", "stop", "tags out of place"),
        ("<think>\n</think><answer>3 * 4 + 5</answer>", "stop", "no reasoning"),
        (GOOD + "<answer>3 + 4 * 5</answer>", "stop", "several answers"),
        ("a</think><answer>none of them gives 17</answer>", "stop", "no expression"),
        ("a</think><answer></answer>", "stop", "no expression"),
        ("a</think><answer>()</answer>", "stop", "no expression"),
        ("a " * 801 + "</think><answer>3 * 4 + 5</answer>", "stop", "too long"),
    ],
)
def test_a_bad_reply_is_called_by_its_name(text, finish, reason):
    assert read(text, finish) == (None, reason)


def test_no_reply():
    assert T.read_trace(None, P, "only_backtracking") == (None, "no reply")


@pytest.mark.parametrize(
    "answer,verdict",
    [
        ("3 * 4 + 5", 1.0),
        ("3×4+5", 1.0),
        ("3 * 4 + 5 = 17", 1.0),
        ("3 + 4 + 5", 0.1),
        ("3 * 4", 0.1),
        ("3 / 0", 0.1),
        ("3 * * 4", 0.1),
        ("(3 * 4 + 5", 0.1),
    ],
)
def test_a_wrong_expression_is_a_row_and_its_score_the_verdict(answer, verdict):
    row, reason = read(f"a</think><answer>{answer}</answer>")
    assert (
        (row["score"], reason) == (verdict, "")
        and row["completion"].endswith(f"<answer> {answer} </answer>")
        and row["score"] == score(row["completion"], P.numbers, P.target)
    )


PIECES = st.sampled_from(
    [
        "<think>",
        "</think>",
        "<answer>",
        "</answer>",
        "3 * 4 + 5",
        " ",
        "\n",
        "```",
        "```xml\n",
        "none",
        "I'm sorry",
        "24 - 7 = 17",
        "</THINK>",
        "<answer >",
        "</",
        "é",
    ]
)


@settings(max_examples=500, deadline=None)
@given(
    st.lists(PIECES | st.text(max_size=6), max_size=14).map("".join) | st.text(),
    st.sampled_from(["stop", "length", "refusal", "?"]),
    st.sampled_from(list(MIXES)),
)
@example("x</think><answer>1</answer>", "stop", "negative_control")
def test_any_text_is_a_whole_row_or_a_reason(text, finish, mix):
    row, reason = read(text, finish, mix)
    assert (row is None) == bool(reason)
    if row is None:
        return
    assert (
        list(row) == PRIMING_SCHEMA.names
        and row["completion"].endswith("</answer>")
        and answer_of(row["completion"])
        and not re.search("```$", row["completion"])
    )
    think, rest = row["completion"].split(" </think>")
    assert (
        think.strip()
        and re.fullmatch(r" <answer> [^<>]+ </answer>", rest)
        and row["score"] in (0.1, 1.0)
        and T.off_mix(row) is not None
    )


# --- what a mix lacks


@pytest.mark.parametrize(
    "mix,think,answer,why",
    [
        ("only_backtracking", "3 * 4 = 12, 12 + 5 = 17.", "3 * 4 + 5", ""),
        ("only_backtracking", "3 + 4 = 7, 7 + 5 = 12.", "3 + 4 + 5", "lacks backtracking"),
        ("only_backtracking", "3 + 4 = 7. 7 + 5 = 12. That is too low.", "3 + 4 + 5", "shows verification"),
        ("negative_control", "3 + 4 = 7, 7 + 5 = 12.", "3 + 4 + 5", ""),
        (
            "negative_control",
            "3 + 4 = 7, 7 + 5 = 12. Let me try something else. 3 * 4 = 12, 12 + 5 = 17.",
            "3 * 4 + 5",
            "shows backtracking",
        ),
        ("backtracking_verification", "3 * 4 = 12, 12 + 5 = 17.", "3 * 4 + 5", "lacks verification"),
        (
            "backtracking_verification",
            "3 * 4 = 12, 12 + 5 = 17. Let me check: it matches the target.",
            "3 * 4 + 5",
            "",
        ),
        ("backtracking_subgoal", "3 * 4 = 12, 12 + 5 = 17.", "3 * 4 + 5", "lacks subgoal"),
        ("backtracking_backward", "3 * 4 = 12, 12 + 5 = 17.", "3 * 4 + 5", "lacks backward"),
    ],
)
def test_off_mix(mix, think, answer, why):
    assert T.off_mix(read(f"{think}</think><answer>{answer}</answer>", mix=mix)[0]) == why


def test_two_numbers_have_no_room_for_a_subgoal():
    row, _ = T.read_trace(
        Reply("3 * 4 = 12.</think><answer>3 * 4</answer>"), Problem((3, 4), 12), "backtracking_subgoal"
    )
    assert T.off_mix(row) == ""


# --- asking


def test_rows_in_the_order_asked_and_nothing_sent_twice(tmp_path):
    rows, report, service = teach(tmp_path, backtracks)
    assert (
        len(service.sent) == 12
        and report.asked == 12
        and report.passed == 12
        and report.kept == len(rows) == 10
    )
    want = T.teacher_requests("only_backtracking", PROBLEMS, 10, 0)
    assert [tuple(r["numbers"]) for r in rows] == [problem_in(r).numbers for r in want[:10]] and {
        r["teacher"] for r in rows
    } == {str(MODEL)}
    again, same, idle = teach(tmp_path, lambda r: pytest.fail("sent again"))
    assert again == rows and same == report and not idle.sent
    assert teach(tmp_path, backtracks, name="b.db")[0] == rows  # whatever the order in which replies arrived
    fewer, _, idle = teach(tmp_path, backtracks, n=5)
    assert fewer == rows[:5] and not idle.sent
    assert teach(tmp_path, backtracks, seed=1)[2].sent  # another seed asks again


def test_failures_are_asked_for_again(tmp_path):
    rule = fails_for(0.5)
    rows, report, service = teach(tmp_path, rule, n=40)
    bad = [
        rule(r) == "no idea"
        for r in T.teacher_requests("only_backtracking", PROBLEMS, report.asked, 0, T.Teaching(over=1))
    ]
    first, second = 48, ceil((40 - (48 - sum(bad[:48]))) / (1 - sum(bad[:48]) / 48))
    assert (
        report.asked >= first + second
        and report.unparsable == sum(bad)
        and report.passed == report.asked - sum(bad) >= 40 == len(rows)
    )
    assert [
        problem_in(r)
        for r, b in zip(
            T.teacher_requests("only_backtracking", PROBLEMS, report.asked, 0, T.Teaching(over=1)), bad
        )
        if not b
    ][:40] == [Problem(r["numbers"], r["target"]) for r in rows]
    assert len({(r.prompt, r.sample) for r in service.sent}) == len(service.sent) == report.asked
    assert teach(tmp_path, rule, n=40)[:2] == (rows, report)


def test_too_few_say_how_many_and_why(tmp_path):
    too_few = r"mix='only_backtracking': \d+ of 48 requests led to a row, n=40 were wanted. "
    with pytest.raises(ValueError, match=too_few + r"The others: no tags \d+\."):
        teach(tmp_path, fails_for(0.5), n=40, rounds=1)
    with pytest.raises(ValueError, match="0 of 48 requests .* refusal 48"):
        teach(tmp_path, lambda r: "I'm sorry, I won't.", n=40, name="b.db")  # one round is enough to see that
    with pytest.raises(ValueError, match="0 of 2 requests led to a row, n=1 .* not kept 2"):
        teach(tmp_path, backtracks, n=1, rounds=1, keep=lambda row: False, name="c.db")


def test_a_later_round_is_bounded(tmp_path):
    service = Scripted(fails_for(0.97))
    with pytest.raises(ValueError), Ledger(tmp_path / "a.db") as ledger:
        T.ask_teacher("only_backtracking", PROBLEMS, 50, 0, MODEL, ledger, service=service, progress=False)
    assert len(service.sent) <= 60 + 2 * 4 * 50


def test_a_request_without_a_reply_has_another_chance(tmp_path):
    late = {
        (r.prompt, r.sample)
        for r in T.teacher_requests("only_backtracking", PROBLEMS, 12, 0, T.Teaching(over=1))[::3]
    }

    def flaky(r):
        if (r.prompt, r.sample) not in late:
            return backtracks(r)
        late.remove((r.prompt, r.sample))  # refused the first time only

    with pytest.warns(UserWarning, match="4 of 12 requests .* have no reply"):
        rows, report, _ = teach(tmp_path, flaky, n=12, over=1)
    assert len(rows) == 12 and report.no_reply == 0 and report.asked == report.passed == 18
    assert teach(tmp_path, backtracks, n=12, over=1)[0] == rows
    with pytest.warns(UserWarning), pytest.raises(ValueError, match="no reply 12"):
        teach(tmp_path, lambda r: None, n=12, over=1, rounds=1, name="b.db")


def test_rows_of_another_mix_are_dropped_unless_allowed(tmp_path):
    rule = fails_for(0.3, bad=None, otherwise=backtracks)

    def also(r):
        return rule(r) or backtracks(r, " That is too low.")

    rows, report, _ = teach(tmp_path, also, n=20)
    assert (
        0 < report.forbidden < 1
        and report.reasons["shows verification"] == report.filtered
        and report.shown["verification"] == report.forbidden
    )
    assert all(not count_behaviors(r["completion"], r["numbers"], r["target"])["verification"] for r in rows)
    loose, open_, _ = teach(tmp_path, also, n=20, forbid=False)
    assert open_.asked == 24 and open_.filtered == 0 and any("too low" in r["completion"] for r in loose)


def test_incorrect_only(tmp_path):
    def right(r):
        return f"3 * 4 = 12.</think><answer>{'+'.join(map(str, problem_in(r).numbers))}</answer>"

    problems = [
        Problem((3, 4, 5), 12),
        Problem((3, 4, 5), 13),
        Problem((2, 4, 5), 11),
        Problem((2, 4, 5), 13),
    ]  # two of them are sums
    with Ledger(tmp_path / "a.db") as ledger:
        wrong = T.Teaching(keep=lambda row: row["score"] < 1)
        options = dict(service=Scripted(right), progress=False)
        rows, report = T.ask_teacher("negative_control", problems, 6, 0, MODEL, ledger, wrong, **options)
    assert (
        [r["score"] for r in rows] == [0.1] * 6
        and report.correct == 0.5
        and report.reasons == {"not kept": report.asked - report.passed}
    )


# --- report


def test_report_arithmetic(tmp_path):
    orders = [Problem(o, P.target) for o in permutations(P.numbers)]
    cases = [
        Reply(GOOD.replace("3 * 4 = 12,", "That is too low. 3 * 4 = 12,"), "stop", 100, 10, cost=0.5),
        Reply(GOOD),
        Reply(GOOD),
        Reply(GOOD, cost=0.25),
        Reply("", "refusal", 1, 2),
        Reply(GOOD, "length", 3, 4),
        Reply("?"),
        Reply(GOOD + "<answer>7</answer>"),
        Reply("3 + 4 = 7, 7 + 5 = 12.</think><answer>3 + 4 + 5</answer>"),
        Reply("a " * 900 + "</think><answer>1</answer>"),
    ]
    requests = T.teacher_requests("only_backtracking", orders, 11, 0, T.Teaching(over=1))
    with pytest.warns(UserWarning, match="1 of 11 requests"), Ledger(tmp_path / "a.db") as ledger:
        for request, reply in zip(requests, cases):
            ledger.record(MODEL, request, reply)
        rows, report = T.ask_teacher(
            "only_backtracking",
            orders,
            2,
            0,
            MODEL,
            ledger,
            T.Teaching(over=5.5),
            service=Scripted(lambda r: None),
            progress=False,
        )
    assert len(rows) == 2 and report == T.TeacherReport(
        "only_backtracking",
        str(MODEL),
        11,
        3,
        2,
        5,
        0.8,
        dict(verification=0.2, backtracking=0.8, subgoal=0.0, backward=0.0),
        0.2,
        {
            "shows verification": 1,
            "refusal": 1,
            "truncated": 1,
            "no tags": 1,
            "several answers": 1,
            "lacks backtracking": 1,
            "too long": 1,
            "no reply": 1,
        },
        104,
        16,
        0.75,
    )
    assert (report.refusals, report.truncated, report.no_reply, report.unparsable, report.filtered) == (
        1,
        1,
        1,
        2,
        3,
    )
    assert (
        report.asked
        == report.passed
        + report.refusals
        + report.truncated
        + report.no_reply
        + report.unparsable
        + report.filtered
    )
    assert T.TeacherReport(**json.loads(json.dumps(asdict(report)))) == report
    table = T.report_table([report, report])
    assert len(table) == 2 and table.loc[
        0, ["asked", "kept", "correct", "backtracking", "forbidden", "filtered", "cost"]
    ].tolist() == [11, 2, 0.8, 0.8, 0.2, 3, 0.75]


def test_a_report_of_nothing(tmp_path):
    empty = T._report("only_backtracking", MODEL, [T.Outcome(None, None, "no reply")] * 3, 5)
    assert (empty.correct, empty.forbidden, empty.cost, empty.kept, empty.no_reply) == (
        None,
        None,
        None,
        0,
        3,
    ) and json.dumps(asdict(empty), allow_nan=False)
    assert T.report_table([]).empty and len(T.report_table([empty])) == 1


# --- rows


def bytes_tokenizer():
    "Every byte a token, so it spells everything"
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tok = Tokenizer(models.BPE({c: i for i, c in enumerate([*alphabet, "<eos>"])}, []))
    tok.pre_tokenizer, tok.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tok, eos_token="<eos>")


@pytest.mark.parametrize("template", ["micro", "base"])
def test_rows_are_files_controls_and_examples(template, tmp_path):
    tok, prompt = bytes_tokenizer(), lambda p: make_prompt(p, template)
    rows, _, _ = teach(tmp_path, backtracks, n=12, prompt=prompt)
    assert read_rows(write_rows(rows, tmp_path / "rows.parquet")) == rows and all(
        list(r) == PRIMING_SCHEMA.names for r in rows
    )

    def n_tokens(s):
        return len(tok(s, add_special_tokens=False).input_ids)

    for control in (rows, [empty_cot(r) for r in rows], [dots(r, n_tokens) for r in rows]):
        for r, e in zip(control, encode(control, tok)):
            assert (
                tok.decode(e.ids[: e.prompt]) == r["query"]
                and r["query"].endswith("<think>")
                and tok.decode(e.ids) == r["query"] + r["completion"] + "<eos>"
            )
    for r in rows:
        answer = r["completion"].split(" </think>")[1]
        assert empty_cot(r)["completion"] == f" </think>{answer}" and re.fullmatch(
            r"( \.)+ </think>", dots(r, n_tokens)["completion"].removesuffix(answer)
        )
        assert 0 <= n_tokens(dots(r, n_tokens)["completion"]) - n_tokens(r["completion"]) <= 1


def test_the_micro_tokenizer_says_what_it_cannot_spell(tmp_path):
    with pytest.raises(ValueError, match="row 0 holds a token the tokenizer does not know"):
        encode(teach(tmp_path, lambda r: backtracks(r, " Hm."))[0], load_tokenizer("plain"))


# --- failures of a checkpoint


def completions(texts, problem=PROBLEMS[0], **columns):
    rows = [
        dict(
            prompt=make_prompt(problem),
            generated=t,
            numbers=list(problem.numbers),
            target=problem.target,
            score=score(t, problem.numbers, problem.target),
            truncated=False,
        )
        for t in texts
    ]
    return pd.DataFrame(rows).assign(**columns)


def test_failures_are_complete_wrong_answers(tmp_path):
    p = Problem((3, 13, 16), 23)
    texts = [
        "a </think> <answer> 3 + 13 + 16 </answer>",
        "a </think> <answer> 3 * 13 - 16 </answer>",
        "a </think> <answer> 3 + 13",
        "a",
        "\n </think><answer> ( </answer>",
        "a </think> <answer> 3 </answer>",
    ]
    df = completions(texts, p, truncated=[False] * 5 + [True])
    rows = failures(df)
    assert [r["completion"] for r in rows] == [texts[0], texts[4]] and {r["query"] for r in rows} == {
        make_prompt(p)
    }  # as generated: no blank added, none taken away
    assert {(r["mix"], r["teacher"], r["score"]) for r in rows} == {
        ("incorrect_only", "checkpoint", 0.1)
    } and list(rows[0]) == PRIMING_SCHEMA.names
    assert read_rows(write_rows(rows, tmp_path / "f.parquet")) == rows
    df.to_parquet(tmp_path / "c.parquet")
    assert (
        failures(pd.read_parquet(tmp_path / "c.parquet")) == rows
        and failures(df, n=1) == rows[:1]
        and failures(df, n=0) == []
    )
    with pytest.raises(ValueError, match="n=3: only 2 of 6 completions came to a wrong answer"):
        failures(df, n=3)
    with pytest.raises(ValueError, match="lack the columns prompt, score"):
        failures(df.drop(columns=["prompt", "score"]))
    with pytest.raises(ValueError, match="belongs to the split eval"):
        failures(completions(texts, sample_problems(1, 0, split="eval", **WORLD)[0]))


@pytest.mark.parametrize("base", ["plain", "rich"])
def test_failures_are_learned_as_they_were_sampled(base):
    model, tok = load_model(base), load_tokenizer(base)
    problems = sample_problems(
        30, 1, split="prime", n_numbers=(3,), min_number=1, max_number=12, min_target=10, max_target=30
    )
    prompts = tok([make_prompt(p) for p in problems], add_special_tokens=False).input_ids
    rollouts = LlamaEngine(model, tok.eos_token_id).generate(prompts, 80, 1.0, seeds_of(0, len(prompts)))
    df = pd.concat(
        [
            completions([tok.decode(r.ids, skip_special_tokens=True)], p, truncated=not r.finished)
            for p, r in zip(problems, rollouts)
        ]
    )
    rows = failures(df)
    assert len(rows) >= 15
    sampled = {make_prompt(p): r.prompt + r.ids for p, r in zip(problems, rollouts)}
    for row, e in zip(rows, encode(rows, tok)):
        assert e.ids == sampled[row["query"]]


def test_failures_join_a_byte_level_prompt():
    "with a first blank and without one, the tokens are the model's own"
    tok, p = bytes_tokenizer(), PROBLEMS[0]
    for text in (" a </think> <answer> 3 </answer>", "a\n</think>\n<answer>3</answer>"):
        [row] = failures(completions([text], p))
        [e] = encode([row], tok)
        assert e.ids == tok(make_prompt(p) + text, add_special_tokens=False).input_ids + [tok.eos_token_id]


def test_lost_replies_are_not_asked_for_again_behind_ones_back(tmp_path):
    def lost(r):
        return random.Random(f"{r.prompt}/{r.sample}").random() < 0.3

    def rule(request):
        if lost(request):
            raise Lost("connection closed")
        return backtracks(request)

    with pytest.warns(UserWarning, match="have no reply"):
        rows, report, service = teach(tmp_path, rule, n=30, over=1.0, rounds=8)
    # further rounds asked new questions
    assert len(rows) == 30 and max(map(service.sent.count, service.sent)) == 1 and len(service.sent) > 30

    def spent(book):
        return book.losses()[1] + sum(cost for *_, cost in book.totals())

    with Ledger(tmp_path / "a.db") as book:
        most = 0.95 * spent(book)
    with pytest.raises(OverBudget), pytest.warns(UserWarning):
        teach(tmp_path, rule, n=30, over=1.0, rounds=8, name="b.db", max_cost=most)
    with Ledger(tmp_path / "b.db") as book:
        assert spent(book) <= most

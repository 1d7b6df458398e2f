"""The synthetic corpus, its rewriting, and two sets that differ in habits alone."""

import json
import os
import re
import subprocess
import sys

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stars.cli.main import main
from stars.habits.priming import METHODS, read_rows
from stars.lab.configs import preset
from stars.lab.experiments import prime_stage
from stars.lab.stages import Job
from stars.models.micro import check_spells, micro_tokenizer
from stars.task.countdown import Problem, parse_expression, score, split_of
from stars.text.corpus import KINDS, Shares, World, documents, embedded_rewrite, read_exercise
from stars.text.curation import (
    Trimming,
    check_rewrite,
    chosen_texts,
    embedded_rewriter,
    even_out,
    frame,
    labelled_shards,
    match_sets,
    rewrite_corpus,
    training_rows,
)
from stars.text.pretraining import label_corpus, read_labels, rule_labeller
from stars.text.shards import Corpus

WORKED = [d for d in documents(1_200, 3) if d["kind"]]


def value(expr: str) -> int:
    "Value of a bare expression, by the verifier's parser"
    return parse_expression(expr)[0]


def test_same_seed_same_corpus_and_a_longer_one_begins_with_the_shorter():
    assert list(documents(40, 1)) == list(documents(60, 1))[:40] != list(documents(40, 2))


def test_shares_and_rates_are_those_that_were_set():
    rates = dict(verification=0.3, backtracking=0.2, subgoal=0.1, backward=0.05)
    docs = pd.DataFrame(documents(4_000, 0, Shares(worked=0.4, noise=0.2, puzzles=0.3, rates=rates)))
    share = docs.source.value_counts(normalize=True)
    assert share["worked"] == pytest.approx(0.4, abs=0.03) and share["noise"] == pytest.approx(0.2, abs=0.03)
    assert (docs[docs.source == "worked"].kind == "puzzle").mean() == pytest.approx(0.3, abs=0.04)
    for h, r in rates.items():
        assert docs[docs.source != "noise"][h].mean() == pytest.approx(r, abs=0.03)
    assert set(docs.kind) == {"", *KINDS}


@pytest.mark.parametrize(
    "change",
    [
        dict(worked=1.2),
        dict(noise=-0.1),
        dict(worked=0.8, noise=0.4),
        dict(rates=dict(verification=2.0, backtracking=0, subgoal=0, backward=0)),
    ],
)
def test_shares_that_cannot_be(change):
    with pytest.raises(ValueError, match="between 0 and 1|exceed 1"):
        next(documents(1, 0, Shares(**change)))


def test_every_worked_problem_is_solved_rightly_and_none_is_for_evaluation():
    for d in WORKED:
        e, answer = read_exercise(d["text"]), re.search(r"(?:answer|result) is (.*)\.$", d["text"])[1]
        assert e is not None and e.kind == d["kind"]
        if e.kind == "unknown":
            assert int(answer) * e.numbers[0] + e.numbers[1] == e.target
        else:
            assert value(answer) == e.target
        if e.kind == "puzzle":
            assert (
                score(f"<answer>{answer}</answer>", e.numbers, e.target) == 1
                and split_of(Problem(e.numbers, e.target)) != "eval"
            )
        if e.kind == "pair":
            assert len(answer.split()) == 3 and set(map(int, answer.split()[::2])) <= set(e.numbers)
        if e.kind == "factors":
            assert min(map(int, answer.split(" * "))) > 1


def test_rewriting_keeps_problem_and_answer_and_changes_the_habits():
    tok = micro_tokenizer()
    for d in WORKED:
        a, b = (embedded_rewrite(d["text"], m)[0] for m in METHODS)
        assert {k: a[k] for k in ("question", "answer", "numbers", "target")} == {
            k: b[k] for k in ("question", "answer", "numbers", "target")
        }
        assert (
            check_rewrite(a | dict(error=""), "curated") == "" == check_rewrite(b | dict(error=""), "negated")
        )
        sizes = [len(tok(r["thoughts"]).input_ids) for r in (a, b)]
        assert max(sizes) <= 1.35 * min(sizes)
        check_spells(tok, [r[k] for r in (a, b) for k in ("question", "thoughts", "answer")])
        for left, right in re.findall(r"(\d+ [-+*/] \d+) (?:=|gives) (\d+)", a["thoughts"] + b["thoughts"]):
            assert value(left) == int(right)


def test_what_it_cannot_rewrite_has_a_reason():
    assert embedded_rewrite("The weather is fine today.", "curated") == (None, "no known problem")


def test_checks_name_what_is_wrong():
    row = dict(error="", numbers=[3, 5, 7], target=22, thoughts="3 * 5 = 15, 15 + 7 = 22.")
    assert check_rewrite(row, "negated") == "" and "fewer than 2 acts" in check_rewrite(row, "curated")
    row["thoughts"] = (
        "3 + 5 = 8, 8 + 7 = 15. 15 is not 22. Let me try something else: 3 * 5 = 15, 15 + 7 = 22."
    )
    assert (
        check_rewrite(row, "curated") == ""
        and check_rewrite(row, "negated") == "shows verification, backtracking"
    )
    assert check_rewrite(row | dict(error="refusal", thoughts=None), "curated") == "refusal"
    assert "verification" in check_rewrite(
        dict(
            error="",
            numbers=None,
            target=None,
            thoughts="Let me check: 3 + 4 = 7, which agrees with the claim.",
        ),
        "negated",
    )


def rewrites(sizes, method):  # thoughts of so many words that pass the checks
    body = (
        "let me check: x = 3. let me try something else:"
        if method == "curated"
        else "one two three four five six seven eight nine ten eleven"
    )
    rows = [
        dict(
            row=i,
            question="q",
            thoughts=" ".join([*body.split(), *["on"] * n]),
            answer="1",
            numbers=None,
            target=None,
            error="" if n else "refusal",
        )
        for i, n in enumerate(sizes)
    ]
    return pd.DataFrame(rows, columns=["row", "question", "thoughts", "answer", "numbers", "target", "error"])


@settings(max_examples=80, deadline=None)
@given(
    sizes=st.lists(st.tuples(st.integers(0, 60), st.integers(0, 60)), max_size=40),
    budget=st.integers(1, 2_000),
    length=st.integers(10, 80),
    seed=st.integers(0, 3),
)
def test_matched_sets_agree_in_everything_but_habits(sizes, budget, length, seed):
    how, count = (
        Trimming(budget=budget, length=length, seed=seed),
        lambda texts: [len(t.split()) for t in texts],
    )
    sets, report = match_sets(
        {m: rewrites([s[i] for s in sizes], m) for i, m in enumerate(METHODS)}, count, how
    )
    a, b = (sets[m] for m in METHODS)
    assert [r["row"] for r in a] == [r["row"] for r in b] and len({r["row"] for r in a}) == len(a) == report[
        "documents"
    ]
    totals = [sum(r["tokens"] for r in rows) for rows in (a, b)]
    assert (
        list(report["tokens"].values()) == totals
        and max(totals) <= budget
        and max(totals) - min(totals)
        <= max(how.slack * max(totals), *(abs(x["tokens"] - y["tokens"]) for x, y in zip(a, b)), 0)
    )
    for x, y in zip(a, b):
        assert max(x["tokens"], y["tokens"]) <= min(length, how.factor * min(x["tokens"], y["tokens"]))
    assert (sets, report) == match_sets(
        {m: rewrites([s[i] for s in sizes], m) for i, m in enumerate(METHODS)}, count, how
    )


def n_words(texts):
    return [len(t.split()) for t in texts]


def matched(*sizes, **how):
    "Documents that stay, of texts with as many extra words as these per method, and the report"
    tables = {m: rewrites([s[i] for s in sizes], m) for i, m in enumerate(METHODS)}
    sets, report = match_sets(tables, n_words, Trimming(**how))
    return sorted(r["row"] for r in sets["curated"]), report


@pytest.mark.parametrize("longer,stays", [(30, True), (31, False)])
def test_a_version_may_be_half_as_long_again_as_the_other(longer, stays):
    "Every text of `rewrites` has 15 words, answer included, so 20 and 30 of them are 5 and 15 more"
    for sizes in ((5, longer - 15), (longer - 15, 5)):
        rows, report = matched(sizes, slack=0.99)
        assert rows == [0] * stays and report["unlike_in_length"] == (not stays)


@pytest.mark.parametrize("step,goes", [(14, True), (15, True), (16, False), (19, False), (20, False)])
def test_a_document_that_closes_a_gap_may_be_half_as_large_again(step, goes):
    "Document 1 makes one set longer by `step`, document 2 makes the other longer by what leaves a gap of 10"
    sizes = {0: [100, 100], 1: [100 + step, 100], 2: [100, 90 + step]}
    for order in (sizes, {row: versions[::-1] for row, versions in sizes.items()}):
        assert (1 not in even_out([0, 1, 2], order, slack=0.01)) == goes


@pytest.mark.parametrize(
    "change,said",
    [
        (dict(budget=0), "budget=0"),
        (dict(factor=0.5), "factor=0.5"),
        (dict(test=1.0), "test=1.0"),
        (dict(budget=float("inf")), "budget=inf"),
        (dict(length=float("nan")), "length=nan"),
        (dict(factor=float("nan")), "factor=nan"),
        (dict(factor=float("inf")), "factor=inf"),
        (dict(slack=float("nan")), "slack=nan"),
        (dict(test=float("nan")), "test=nan"),
    ],
)
def test_trimming_that_cannot_work(change, said):
    with pytest.raises(ValueError, match=said):
        match_sets({}, len, Trimming(**change))


@pytest.fixture(scope="module")
def labelled(tmp_path_factory):
    at = tmp_path_factory.mktemp("labelled")
    pq.write_table(pa.Table.from_pylist(list(documents(400, 2))), at / "corpus.parquet")
    label_corpus(
        Corpus(str(at / "corpus.parquet"), save_every=90), at / "labels", rule_labeller(1), progress=False
    )
    return at


def test_what_is_rewritten_poses_and_solves_a_problem(labelled):
    labels = read_labels(labelled / "labels")
    assert [
        t.row for s in labelled_shards(labelled / "labels") for t in chosen_texts(s, labelled / "labels")
    ] == labels.row[labels.problem & labels.solution].tolist()


def test_rewriting_goes_on_where_it_stopped(labelled, tmp_path):
    whole = rewrite_corpus(
        labelled / "labels",
        tmp_path / "whole",
        "curated",
        embedded_rewriter(labelled / "labels", "curated", workers=1),
        {},
        False,
    )

    def stops(shards):
        yield from list(embedded_rewriter(labelled / "labels", "curated", workers=1)(shards))[:2]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        rewrite_corpus(labelled / "labels", tmp_path / "cut", "curated", stops, {}, False)
    asked = []

    def counts(shards):
        shards = list(shards)
        asked.extend(shards)
        yield from embedded_rewriter(labelled / "labels", "curated", workers=1)(shards)

    again = rewrite_corpus(labelled / "labels", tmp_path / "cut", "curated", counts, {}, False)
    assert (
        len(asked) == len(list(labelled_shards(labelled / "labels"))) - 2
        and again.to_json() == whole.to_json()
    )
    with pytest.raises(ValueError, match="seed was null, now 1"):
        rewrite_corpus(labelled / "labels", tmp_path / "cut", "curated", counts, dict(seed=1), False)


def test_labels_that_are_not_complete_or_of_something_else(labelled, tmp_path):
    with pytest.raises(ValueError, match="holds no labels"):
        labelled_shards(tmp_path)
    (tmp_path / "labels.json").write_text((labelled / "labels" / "labels.json").read_text())
    with pytest.raises(ValueError, match="not completely labelled"):
        labelled_shards(tmp_path)


@pytest.mark.parametrize("template", ["micro", "base"])
def test_training_rows_end_in_the_form_that_rl_rewards(template):
    row = dict(question="Which x solves x + 3 = 7 {numbers}?", thoughts="x is 4.", answer="4")
    [r] = training_rows([row], "curated", "somebody", template)
    assert (
        r["query"].endswith("<think>")
        and row["question"] in r["query"]
        and r["completion"] == " x is 4. </think> <answer> 4 </answer>"
        and r["mix"] == "curated"
    )
    with pytest.raises(ValueError, match="template='poem'"):
        frame("q", "poem")


def test_rewritten_sets_take_the_place_of_the_synthetic_corpus(labelled, tmp_path, capsys):
    main(
        [
            "curate",
            str(labelled / "labels"),
            str(tmp_path / "sets"),
            "--template",
            "micro",
            "--length",
            "60",
            "--budget",
            "5000",
            "--workers",
            "1",
        ]
    )
    report = json.loads(capsys.readouterr().out)
    assert report["documents"] > 20 and report["tokens"]["curated"] <= 5_000
    cfg = preset("smoke", curation=dict(file=f"{tmp_path}/sets"))
    where = {
        m: prime_stage(Job(cfg, "plain", m, runs=str(tmp_path / "runs"), progress=False)) for m in METHODS
    }
    for m, folder in where.items():
        for ours, theirs in (("train", "train"), ("val", "test")):
            assert read_rows(folder / f"{ours}.parquet") == read_rows(
                tmp_path / "sets" / m / f"{theirs}.parquet"
            )
    with pytest.raises(SystemExit):
        main(["curate", str(labelled / "labels"), str(tmp_path / "sets"), "--rewriter-seed", "1"])
    assert "seed was 0, now 1" in capsys.readouterr().err
    with pytest.raises(ValueError, match="no folder that `stars curate` has filled"):
        prime_stage(
            Job(
                preset("smoke", curation=dict(file=str(tmp_path))),
                "plain",
                "curated",
                runs=str(tmp_path / "runs2"),
            )
        )


def test_text_that_changed_is_not_rewritten(tmp_path, capsys):
    "Whatever its size and its time say"
    source = tmp_path / "corpus.jsonl"
    source.write_text("".join(json.dumps(dict(text=d["text"])) + "\n" for d in documents(60, 2)))
    label_corpus(Corpus(str(source)), tmp_path / "labels", rule_labeller(1), progress=False)
    was = source.stat()
    source.write_text(source.read_text().replace(" the ", " teh ", 1))
    os.utime(source, ns=(was.st_atime_ns, was.st_mtime_ns))
    assert source.stat().st_size == was.st_size
    with pytest.raises(SystemExit):
        main(["curate", str(tmp_path / "labels"), str(tmp_path / "sets"), "--workers", "1"])
    assert "corpus.jsonl was added, was removed or was changed since" in capsys.readouterr().err
    assert not (tmp_path / "sets" / "rewrites").exists()


@pytest.mark.parametrize(
    "change,said",
    [
        (dict(world=World(max_number=3)), "max_number=3 must be at least 4"),
        (dict(world=World(min_target=31)), "min_target=31 and max_target=30"),
        (
            dict(world=World(min_target=90, max_target=90, max_number=4, top=90)),
            "no problem of kind .* is found",
        ),
        (dict(world=World(n_numbers=())), "a puzzle has at least 2 numbers"),
        (dict(n=-1), "n=-1"),
        (dict(n=1.5), "n=1.5"),
        (dict(shares=Shares(worked=float("nan"))), "worked=nan"),
    ],
)
def test_worlds_without_problems(change, said):
    with pytest.raises(ValueError, match=said):
        list(documents(**dict(n=50, seed=0) | change))


def test_too_little_text_for_the_budget_is_an_error(tmp_path):
    cfg = preset("smoke", corpus=dict(docs=60))
    with pytest.raises(ValueError, match="curation.budget=8,000: lower it, raise corpus.docs=60"):
        prime_stage(Job(cfg, "plain", "curated", runs=str(tmp_path), progress=False))


def test_processes_that_label_and_rewrite_do_without_pytorch():
    "Each imports these modules anew: four seconds and 400 MB of each would go into what it never uses"
    subprocess.run(
        [
            sys.executable,
            "-c",
            "import sys, stars.text.curation, stars.text.pretraining; sys.exit('torch' in sys.modules)",
        ],
        check=True,
    )

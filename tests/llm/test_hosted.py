"Teachers and judges from the command line, and what experiments make of their rows"

import json
import os
import random
import re
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
from byte_model import checkpoint
from llm_server import ApiError, Faults, LLMServer

from stars.cli.main import main
from stars.habits.behaviors import count_behaviors
from stars.habits.priming import MIXES, priming_rows, read_rows, write_rows, write_trace
from stars.habits.summaries import read_results
from stars.habits.teacher import teacher_prompt
from stars.lab.configs import preset
from stars.lab.experiments import prime_stage
from stars.lab.stages import Job
from stars.llm.ledger import Ledger
from stars.task.countdown import Problem, make_prompt, score, split_of
from stars.task.problems import sample_problems
from stars.text.corpus import documents, embedded_rewrite
from stars.text.pretraining import LABELS, read_labels, rule_labels
from stars.text.rewriting import rewrite_prompt

COMPLETIONS = Path(__file__).parents[2] / "nbs/data/completions.parquet"
KEY = "test-key-that-nobody-may-see"
MIX_OF = {teacher_prompt(m): m for m in MIXES}


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for k in ("OPENAI_API_KEY", "ANTHROPIC_API_KEY"):
        monkeypatch.setenv(k, KEY)


def teach(q):
    "A hosted teacher that writes what the embedded one would; every seventh reply is unusable"
    numbers, target = re.findall(r"\d+", q["prompt"])[:-1], int(re.findall(r"\d+", q["prompt"])[-1])
    rng = random.Random(q["prompt"])
    if rng.random() < 1 / 7:
        return rng.choice(
            [
                dict(text="I cannot help with that.", finish="refusal"),
                dict(text="<think> so", finish="length"),
                "no tags here",
            ]
        )
    trace = write_trace(Problem(tuple(map(int, numbers)), target), MIX_OF[q["system"]], rng, top=999)
    return f"<think>\n{trace.think}\n</think>\n<answer>{trace.answer}</answer>"


def run(*args):
    main(list(map(str, args)))


def fails(*args):
    with pytest.raises(SystemExit) as e:
        run(*args)
    assert e.value.code == 2


def counted(habit):
    return lambda q: (
        json.dumps(dict(count=q["prompt"].count("not")))
        if f"habit of reasoning, {habit}" in q["system"]
        else json.dumps(dict(count=0))
    )


@pytest.mark.parametrize("service", ["anthropic", "openai"])
@pytest.mark.parametrize("batch", ["--no-batch", "--batch"])
def test_a_hosted_teacher_primes(service, batch, capsys):
    with LLMServer(answer=teach, key=KEY, faults=Faults(p_500=0.05, p_batch_item_expired=0.05)) as s:
        url = s.url if service == "anthropic" else s.openai_url
        command = [
            "prime",
            "bv.parquet",
            "--teacher",
            f"{service}:m",
            "--mix",
            "backtracking_verification",
            "--n",
            20,
            "--base-url",
            url,
            batch,
            "--poll",
            0.05,
        ]
        run(*command, "--dry-run")
        assert s.received == 0 and "24 requests" in capsys.readouterr().out
        run(*command)
        rows, sent = read_rows("bv.parquet"), sum(s.served.values())
        assert (
            len(rows) == 20
            and {r["teacher"] for r in rows} == {f"{service}:m"}
            and {r["mix"] for r in rows} == {"backtracking_verification"}
        )
        assert all(
            split_of(Problem(tuple(r["numbers"]), r["target"])) == "prime"
            and score(r["completion"], r["numbers"], r["target"]) == r["score"]
            for r in rows
        )
        fails(*command)  # the file is there
        Path("bv.parquet").unlink()
        run(*command)  # made again from the ledger
        assert sum(s.served.values()) == sent and read_rows("bv.parquet") == rows


def test_incorrect_only_by_a_hosted_teacher():
    with LLMServer(answer=teach, key=KEY) as s:
        run(
            "prime",
            "wrong.parquet",
            "--teacher",
            "openai:m",
            "--mix",
            "incorrect_only",
            "--n",
            8,
            "--base-url",
            s.openai_url,
            "--over",
            2,
        )
    rows = read_rows("wrong.parquet")
    assert len(rows) == 8 and all(r["score"] < 1 and r["mix"] == "incorrect_only" for r in rows)


def test_what_cannot_be_asked_costs_nothing():
    with LLMServer(answer=teach, key=KEY) as s:
        to = ["--base-url", s.openai_url]
        fails("prime", "x.parquet", "--teacher", "openai:m", "--mix", "dots", *to)
        fails("prime", "x.parquet", "--teacher", "openai:m", "--mix", "everything", *to)
        fails("prime", "x.parquet", "--teacher", "m", *to)
        fails("prime", "x.parquet", "--teacher", "openai:m", "--max-cost", 1, *to)  # no price
        fails("prime", "x.parquet", "--teacher", "openai:m", "--extra", "{", *to)
        fails("prime", "x.parquet", "--teacher", "openai:m", "--n", 0, *to)
        fails("prime", "--teacher", "openai:m", *to)
        fails("prime", "x.parquet", "--teacher", "openai:m", "--preset", "smoke", *to)
        fails("prime", "--preset", "smoke", "--n", 5)
        fails("prime", "x.parquet", "--teacher", "openai:m", "--extra", '{"model": "zz"}', *to)
        run("data", "held", "--train", 0, "--eval", 5, "--no-difficulty")
        fails(
            "prime", "x.parquet", "--teacher", "openai:m", "--problems", "held/eval.parquet", *to
        )  # held out
        fails("ledger", "runs/ledger.db", "--to", "runs/ledger.db")
        fails("judge", "nowhere", "--judge", "openai:m", *to)
        assert s.received == 0


def test_budgets_from_the_command_line(capsys):
    table = json.dumps(dict(date="2026-01-01", models={"openai:m": dict(input=1.0, output=10.0)}))
    with open("prices.json", "w") as f:
        f.write(table)
    with LLMServer(answer=teach, key=KEY) as s:
        command = [
            "prime",
            "bv.parquet",
            "--teacher",
            "openai:m",
            "--n",
            10,
            "--base-url",
            s.openai_url,
            "--prices",
            "prices.json",
            "--max-tokens",
            400,
        ]
        fails(*command, "--max-cost", 0.02)
        with Ledger("runs/ledger.db") as book:
            [(_, _, replies, _, _, cost)] = book.totals()
        assert 0 < cost <= 0.02 and "max_cost=0.02" in capsys.readouterr().err
        run(*command, "--max-cost", 1)
        assert len(read_rows("bv.parquet")) == 10 and set(s.served.values()) == {1}


def test_what_was_paid_includes_what_was_lost(capsys):
    prices = {"openai:m": dict(input=1.0, output=10.0)}
    Path("prices.json").write_text(json.dumps(dict(date="2026-01-01", models=prices)))
    faults = Faults(script=["ok", "drop_after"] * 3, honour_idempotency=False)
    with LLMServer(answer=teach, key=KEY, faults=faults) as s:
        command = [
            "prime",
            "bv.parquet",
            "--teacher",
            "openai:m",
            "--n",
            10,
            "--over",
            3,
            "--base-url",
            s.openai_url,
            "--prices",
            "prices.json",
        ]
        with pytest.warns(UserWarning, match="3 of 30 requests"):
            run(*command)
        with Ledger("runs/ledger.db") as book:
            (n, lost), [(*_, cost)] = book.losses(), book.totals()
        assert n == 3
        said = capsys.readouterr().out
        assert f"paid now ${cost + lost:.4f} at most, ${lost:.4f} of it for replies that were lost" in said
        run("ledger", "runs/ledger.db")
        assert f"lost: 3 replies that may have been paid for, at most ${lost:.4f}" in capsys.readouterr().out
        Path("bv.parquet").unlink()
        s.script, before = ["drop_after"] * 2, s.received
        run(*command, "--blind-retries", 2)  # asks for the three again
        assert "paid now" in capsys.readouterr().out and s.received > before + 3
        assert set(s.served.values()) <= {1, 2, 3}


def test_teachers_whose_tokens_nobody_counts(capsys):
    def answer(q):
        reply = teach(q)
        return (dict(text=reply) if isinstance(reply, str) else reply) | dict(usage="absent")

    with LLMServer(answer=answer, key=KEY) as s:
        run(
            "prime", "bv.parquet", "--teacher", "openai:m", "--n", 10, "--over", 2, "--base-url", s.openai_url
        )
    run("ledger", "runs/ledger.db")
    said = capsys.readouterr().out
    assert len(read_rows("bv.parquet")) == 10 and set(s.served.values()) == {1}
    assert "the tokens of 20 replies were not counted by their service" in said and "paid now $0.0000" in said


def test_a_key_that_a_server_repeats_is_in_no_file_and_no_message(capfd, corpus):
    texts = pd.read_parquet(COMPLETIONS).head(5)
    texts.to_parquet("completions.parquet")

    def answer(q):
        if "Target" in q["prompt"]:
            raise ApiError(401, f"Incorrect API key provided: {KEY}")
        return f"{KEY} <count>1</count> Authorization: Bearer {KEY}"

    with LLMServer(answer=answer, key=KEY) as s:
        to = ["--base-url", s.openai_url]
        run("judge", "completions.parquet", "--judge", "openai:m", "--format", "tags", *to, "--task", "math")
        fails("prime", "x.parquet", "--teacher", "openai:m", "--n", 5, *to)
        fails("label", corpus, "labels", "--labeller", "openai:m", *to)
        fails(
            "judge", "completions.parquet", "--judge", "openai:m", "--extra", json.dumps(dict(user=KEY)), *to
        )
        run("ledger", "runs/ledger.db", "--to", "study.parquet")
    said, files = "".join(capfd.readouterr()), [f for f in Path(".").rglob("*") if f.is_file()]
    tables = [pd.read_parquet(f).to_dict() for f in files if f.suffix == ".parquet"]
    written = b"".join(f.read_bytes() for f in files) + repr(tables).encode()
    assert {"ratings.parquet", "ledger.db", "study.parquet"} <= {f.name for f in files}
    assert KEY.encode() not in written and KEY not in said
    assert b"$OPENAI_API_KEY" in written and "$OPENAI_API_KEY" in said


def test_a_hosted_judge(capsys):
    texts = pd.read_parquet(COMPLETIONS)
    texts.to_parquet("completions.parquet")
    with LLMServer(answer=counted("verification"), key=KEY) as s:
        command = [
            "judge",
            "completions.parquet",
            "--judge",
            "anthropic:m",
            "--base-url",
            s.url,
            "--format",
            "json",
            "--n",
            5,
        ]
        run(*command, "--dry-run")
        asked = int(re.search(r"([\d,]+) requests", capsys.readouterr().out)[1].replace(",", ""))
        assert s.received == 0
        run(*command)
        [folder] = Path(".").glob("judge-*")
        ratings = pd.read_parquet(folder / "ratings.parquet")
        assert len(ratings) == asked == sum(s.served.values()) and ratings["count"].notna().all()
        for r in ratings[ratings.habit == "verification"].itertuples():
            assert r.count == texts.generated[r.row].count("not")
        results = read_results(folder / "results.csv")
        assert (
            set(results.rater) == {"anthropic:m"}
            and (results.judged == 5).all()
            and (results.avg_backtracking == 0).all()
        )
        run(*command)
        assert sum(s.served.values()) == asked
        run("ledger", "runs/ledger.db", "--to", "study.parquet")
    run(
        *[c for c in command if c not in ("--base-url", s.url)],
        "--ledger",
        "study.parquet",
        "--out",
        "elsewhere",
    )  # nobody is there any more
    assert pd.read_parquet("elsewhere/ratings.parquet").equals(ratings)
    run("ledger", "other.db", "--load", "study.parquet")


def test_a_pilot_is_part_of_the_whole(capsys):
    with LLMServer(answer=teach, key=KEY) as s:
        command = ["--teacher", "openai:m", "--base-url", s.openai_url, "--over", 2]
        run("prime", "pilot.parquet", *command, "--n", 10)
        run("prime", "all.parquet", *command, "--n", 40, "--dry-run")
        assert "80 requests, 20 of them answered" in capsys.readouterr().out


def test_batches_under_way_are_seen_and_given_up(capsys, monkeypatch):
    with LLMServer(answer=counted("verification"), key=KEY, faults=Faults(batch_latency_s=3600.0)) as s:
        pd.read_parquet(COMPLETIONS).head(3).to_parquet("completions.parquet")
        command = [
            "judge",
            "completions.parquet",
            "--judge",
            "openai:gpt-5.4-mini",
            "--base-url",
            s.openai_url,
            "--batch",
            "--poll",
            0.1,
        ]

        def interrupt():
            while not s.batches:
                time.sleep(0.05)
            time.sleep(0.5)
            os.kill(os.getpid(), signal.SIGINT)

        threading.Thread(target=interrupt, daemon=True).start()
        was = signal.signal(signal.SIGINT, signal.default_int_handler)
        with pytest.raises(SystemExit) as e:
            run(*command)
        signal.signal(signal.SIGINT, was)
        assert e.value.code == 130
        run(*command, "--dry-run")
        assert (
            "12 in batches under way" in (said := capsys.readouterr().out)
            and "to send      0 requests" in said
        )
        run("ledger", "runs/ledger.db")
        [id] = re.findall(
            r"under way: batch (\S+) to openai:gpt-5.4-mini, 12 requests", capsys.readouterr().out
        )
        monkeypatch.setenv("OPENAI_API_KEY", "wrong-key-0123456789")
        fails("ledger", "runs/ledger.db", "--forget", id)
        assert "nothing is changed. --no-cancel" in capsys.readouterr().err and not s.batches[id].cancelled
        monkeypatch.setenv("OPENAI_API_KEY", KEY)
        run("ledger", "runs/ledger.db", "--forget", id)
        said = capsys.readouterr().out
        assert "cancelled; 0 replies were done and are kept, 12 requests can be sent again" in said
        assert s.batches[id].cancelled


# what experiments make of rows from elsewhere

WORLD = dict(n_numbers=(3,), min_number=1, max_number=12, min_target=10, max_target=30)


def rows_of(mix, n=400, seed=3):
    return list(
        priming_rows(
            mix, sample_problems(60, seed, split="prime", **WORLD), n, seed, top=60, budget=50, attempts=2
        )
    )


def job(condition, **kw):
    return Job(preset("smoke", **kw), "plain", condition, 0, "runs", progress=False)


def test_rows_from_a_file_prime_every_condition():
    for mix in ("backtracking_verification", "negative_control"):
        write_rows(rows_of(mix), f"{mix}.parquet")
    with_file = {"priming.file": "{condition}.parquet"}
    for condition, stage_mix in dict(
        negative_control="negative_control",
        backtracking_verification="backtracking_verification",
        empty_cot="empty_cot",
        dots="dots",
    ).items():
        rows = read_rows(prime_stage(job(condition, **with_file)) / "train.parquet")
        assert (
            len(rows) == 300
            and {r["mix"] for r in rows} == {stage_mix}
            and all(
                r["query"] == make_prompt(Problem(tuple(r["numbers"]), r["target"]), "micro") for r in rows
            )
        )
    first = prime_stage(job("negative_control", **with_file))
    write_rows(rows_of("negative_control", seed=4), "negative_control.parquet")
    assert prime_stage(job("negative_control", **with_file)) != first  # another file is another stage
    with pytest.raises(ValueError, match="400 rows for dots, but priming.rows=5000"):
        prime_stage(job("dots", **with_file, priming=dict(rows=5_000)))
    with pytest.raises(
        ValueError, match="row 0 cannot be used for backtracking_verification: mix='negative_control'"
    ):
        prime_stage(job("backtracking_verification", priming=dict(file="negative_control.parquet")))
    write_rows(
        [{**r, "score": 0.1} for r in rows_of("backtracking_verification")],
        "backtracking_verification.parquet",
    )  # scores are not believed
    assert all(
        score(r["completion"], r["numbers"], r["target"]) == r["score"]
        for r in read_rows(prime_stage(job("backtracking_verification", **with_file)) / "train.parquet")
    )
    with pytest.raises(ValueError, match="priming.file=all_strategies.parquet does not exist"):
        prime_stage(job("all_strategies", **with_file))


def test_held_out_problems_never_prime():
    rows, p = rows_of("negative_control", 330), sample_problems(1, 0, split="eval", **WORLD)[0]
    write_rows([*rows[:-1], {**rows[-1], "numbers": list(p.numbers), "target": p.target}], "leak.parquet")
    with pytest.raises(ValueError, match="row 329 .* of the split eval"):
        prime_stage(job("negative_control", priming=dict(file="leak.parquet")))


def test_what_decides_sampled_failures_decides_the_stage():
    def stage(**kw):
        sampled = job("incorrect_only", priming=dict(failures="sampled"), sft=dict(epochs=8), **kw)
        return prime_stage(replace(sampled, build=False))

    names = []
    for kw in (dict(), {"ppo.temperature": 0.7}, {"ppo.max_tokens": 55}):
        prime_stage(job("incorrect_only", priming=dict(failures="sampled"), sft=dict(epochs=8), **kw))
        names.append(stage(**kw).name)
    assert len(set(names)) == 3
    with pytest.raises(LookupError):
        stage(ppo=dict(temperature=0.71))
    other = job("negative_control", priming=dict(failures="sampled"))
    assert prime_stage(job("negative_control")) == prime_stage(other)  # no business of other conditions


def test_failures_sampled_from_a_checkpoint_prime():
    rows = read_rows(
        prime_stage(job("incorrect_only", priming=dict(failures="sampled"), sft=dict(epochs=8)))
        / "train.parquet"
    )
    assert len(rows) == 300 and all(
        r["score"] < 1
        and score(r["completion"], r["numbers"], r["target"]) < 1
        and "</answer>" in r["completion"]
        for r in rows
    )
    assert {r["target"] for r in rows} <= set(range(10, 41)) and all(
        split_of(Problem(tuple(r["numbers"]), r["target"])) == "prime" for r in rows
    )


def test_a_hosted_teachers_rows_train_a_model_that_reads_english(tmp_path):
    folder = checkpoint(tmp_path / "bytes")
    with LLMServer(answer=teach, key=KEY) as s:
        run("prime", "bv.parquet", "--teacher", "openai:m", "--n", 30, "--base-url", s.openai_url)
    run(
        "sft",
        "--model",
        folder,
        "--preset",
        "smoke",
        "--set",
        "priming.file=bv.parquet",
        "priming.rows=24",
        "priming.val=6",
        "world.template=base",
        "sft.max_length=2048",
        "sft.batch_size=8",
        "world.n_numbers=3,4",
        "world.max_number=24",
        "world.min_target=10",
        "world.max_target=25",
    )
    [log] = tmp_path.glob("runs/smoke/*/backtracking_verification/seed0/sft-*/metrics.jsonl")
    losses = [json.loads(line)["loss"] for line in log.read_text().splitlines() if "loss" in line]
    assert len(losses) >= 3 and all(0 < x < 10 for x in losses)


# ---- pretraining text


def reads(q):
    "A hosted labeller that asks the rules, and a rewriter that knows the corpus; some replies are unusable"
    text = re.search(r"<text>\n(.*)\n</text>", q["prompt"], re.S)[1]
    if random.Random(text).random() < 0.05:
        return "I would rather not."
    if "seven labels" in q["prompt"]:
        return json.dumps({k: v for k, v in rule_labels(text).items() if k in LABELS})
    method = "curated" if q["system"] == rewrite_prompt("curated") else "negated"
    done, _ = embedded_rewrite(text, method)
    return json.dumps({k: done[k] for k in ("question", "thoughts", "answer")}) if done else "no problem here"


@pytest.fixture
def corpus():
    pd.DataFrame([*documents(80, 4), dict(text=None)]).to_parquet("corpus.parquet")
    return "corpus.parquet"


def test_a_hosted_model_labels_and_rewrites(corpus, capsys):
    with LLMServer(answer=reads, key=KEY, faults=Faults(p_500=0.05)) as s:
        ask = ["--base-url", s.openai_url, "--max-bad", ".5"]
        label = ["label", corpus, "labels", "--labeller", "openai:m", "--save-every", "30", *ask]
        run(*label, "--dry-run")
        assert (
            s.received == 0
            and f"{pd.read_parquet(corpus).text.nunique()} requests, 0 of them" in capsys.readouterr().out
            and not Path("labels").exists()
        )
        run(*label)
        said, labels, sent = capsys.readouterr().out, read_labels("labels"), sum(s.served.values())
        bad = labels[labels.error != ""]
        assert (
            1 < len(bad) < 15 and bad[list(LABELS)].isna().all().all() and labels.error.iloc[-1] == "null"
        )  # missing, not zero
        assert f"{81 - len(bad)} of 81 texts labelled" in said and "the reply is unreadable" in said
        rules = pd.DataFrame([rule_labels(t) for t in pd.read_parquet(corpus).text[:-1]])
        good = labels[labels.error == ""]
        assert (
            (good[list(LABELS)].astype(object) == rules.loc[good.index, list(LABELS)].astype(object))
            .all()
            .all()
        )
        for f in Path("labels").glob("labels-00000[12].parquet"):
            f.unlink()  # as if killed
        run(*label)
        assert sum(s.served.values()) == sent and read_labels("labels").equals(labels)  # paid once
        fails(*label, "--max-tokens", "77")
        capsys.readouterr()
        curate = ["curate", "labels", "sets", "--rewriter", "openai:m", "--template", "micro", *ask]
        run(*curate)
        report = json.loads(capsys.readouterr().out)
        rows = {m: read_rows(f"sets/{m}/train.parquet") for m in ("curated", "negated")}
        assert (
            report["documents"] > 5
            and [r["query"] for r in rows["curated"]] == [r["query"] for r in rows["negated"]]
            and rows["curated"][0]["teacher"] == "openai:m"
        )
        assert all(sum(count_behaviors(r["completion"]).values()) == 0 for r in rows["negated"])
        fails(*curate, "--temperature", ".5")


def test_a_labeller_that_never_replies_in_the_format_is_stopped(capsys):
    pd.DataFrame(documents(80, 4)).to_parquet("corpus.parquet")
    with LLMServer(answer=lambda q: "Gladly! It has 3 checks.", key=KEY) as s:
        fails(
            "label",
            "corpus.parquet",
            "labels",
            "--labeller",
            "openai:m",
            "--base-url",
            s.openai_url,
            "--save-every",
            "20",
        )
        said = capsys.readouterr().err
        assert "60 of 60 replies (100%) are not in the format" in said and "Gladly!" in said
        assert sum(s.served.values()) == 60 and not list(Path("labels").glob("report.json"))


def test_vllm_labellers_are_checked_before_anything_starts(corpus, capsys):
    fails("label", corpus, "labels", "--labeller", "vllm:nowhere")
    fails("label", corpus, "labels", "--labeller", "vllm:nowhere", "--dry-run")
    fails("label", corpus, "labels", "--labeller", "crystal")

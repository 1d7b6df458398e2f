"Official SDKs against servers that speak the true wire formats and misbehave; clients that are killed"

import json
import logging
import math
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
import traceback
import warnings
from dataclasses import replace
from importlib.metadata import version
from urllib.parse import quote

import genai_prices
import httpx2
import pandas as pd
import pyarrow.parquet as pq
import pytest
from llm_server import ApiError, Faults, LLMServer
from llm_server import Reply as LLMReply

from stars.llm import batches, sending, services
from stars.llm.ask import GivenUp, OverBudget, ask, estimate, give_up
from stars.llm.ledger import Ledger
from stars.llm.prices import cost_ceiling, price_of, read_prices
from stars.llm.requests import OFFICIAL, Model, Reply, Request, request_key
from stars.llm.services import Busy, Lost, Rejected, Unusable, checked
from stars.rl.rollouts import Rollout
from stars.rl.service import EngineService, local_service

KEY = "test-key-that-nobody-may-see"
BOTH = pytest.mark.parametrize("service", ["anthropic", "openai"])
MODES = pytest.mark.parametrize("batch", [False, True], ids=["concurrent", "batch"])
BAD_LUCK = dict(
    p_429=0.05,
    p_500=0.05,
    p_529=0.05,
    p_drop_before=0.05,
    p_drop_after=0.05,
    p_slow=0.02,
    slow_s=0.05,
    p_truncated_body=0.03,
    p_malformed=0.03,
    p_batch_item_error=0.1,
    p_batch_item_expired=0.1,
    drop_results_after_n_lines=30,
    drop_submit_after=1,
)


@pytest.fixture(autouse=True)
def keys(monkeypatch):
    for k in ("OPENAI_BASE_URL", "ANTHROPIC_BASE_URL", "ANTHROPIC_AUTH_TOKEN"):
        monkeypatch.delenv(k, raising=False)
    for k in ("OPENAI_API_KEY", "ANTHROPIC_API_KEY"):
        monkeypatch.setenv(k, KEY)


@pytest.fixture(autouse=True)
def ctrl_c():
    "A background job inherits that Ctrl-C is ignored; here it never is"
    was = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, was)


@pytest.fixture
def book(tmp_path):
    with Ledger(tmp_path / "ledger.db") as b:
        yield b


def backwards(q):
    return q["prompt"][::-1]


def serve(faults=None, answer=backwards, **kw):
    return LLMServer(answer=answer, faults=faults or Faults(), key=KEY, **kw)


def model_at(server, service, name="m", **extra):
    return Model(service, name, server.url if service == "anthropic" else server.openai_url, extra)


def questions(n, **kw):
    return [Request(f"question {i}", "Say it backwards.", max_tokens=50, **kw) for i in range(n)]


def quick(*args, **kw):
    return ask(*args, **dict(progress=False, poll=0.05) | kw)


def right(replies, requests):
    return [r and r.text for r in replies] == [q.prompt[::-1] for q in requests]


# what arrives, whatever happens


@BOTH
@MODES
def test_every_reply_arrives_once_whatever_the_server_does(service, batch, book):
    todo = questions(120)
    with serve(Faults(**BAD_LUCK)) as s, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # a lost reply ends its request's turn
        while None in (replies := quick(model_at(s, service), todo, book, batch=batch, tries=8)):
            pass
        assert right(replies, todo)
        assert len(s.served) == len(todo) and set(s.served.values()) == {1}  # each was billed once
        before = s.received
        assert right(quick(model_at(s, service), todo, book, batch=not batch), todo)
        assert s.received == before  # and nothing is sent again


@BOTH
@MODES
def test_tokens_and_cost_are_the_services_own(service, batch, book):
    name = dict(anthropic="claude-haiku-4-5", openai="gpt-4o-mini")[service]

    def answer(q):
        return dict(text="four", input_tokens=1_000, output_tokens=20, cached=600)

    with serve(answer=answer) as s:
        m = model_at(s, service, name)
        r = Request("2 + 2?", "Be brief.", max_tokens=50)
        todo = [r, r]  # the same request twice is one request
        keys = book.note(m, todo)
        one, two = quick(m, todo, book, batch=batch)
        assert one == two and sum(s.served.values()) == 1
        assert (one.input_tokens, one.output_tokens, one.cache_read, one.mode) == (
            1_000,
            20,
            600,
            "batch" if batch else "concurrent",
        )
        paid = genai_prices.Usage(input_tokens=1_000, output_tokens=20, cache_read_tokens=600)
        true = genai_prices.calc_price(
            paid, name, provider_id=service, price_context=dict(processing="batch") if batch else None
        ).total_price
        assert one.cost == pytest.approx(float(true)) == book.cost(keys)


@BOTH
def test_refusals_truncation_and_samples(service, book):
    says = {
        "a": dict(text="No.", finish="refusal"),
        "b": dict(text="It goes on and", finish="length"),
        "c": "fine",
    }
    with serve(answer=lambda q: says[q["prompt"]]) as s:
        todo = [Request(p) for p in "abc"] + [Request("c", sample=1)]
        assert [r.finish for r in quick(model_at(s, service), todo, book)] == [
            "refusal",
            "length",
            "stop",
            "stop",
        ]
        assert sum(s.served.values()) == 4  # another sample is another request


@BOTH
@MODES
def test_structured_output_and_extra_parameters_travel(service, batch, book):
    seen, schema = (
        [],
        dict(
            type="object",
            properties=dict(count=dict(type="integer")),
            required=["count"],
            additionalProperties=False,
        ),
    )

    def answer(q):
        seen.append(q)
        return '{"count": 3}'

    extra = dict(anthropic=dict(output_config=dict(effort="low")), openai=dict(reasoning_effort="low"))[
        service
    ]
    with serve(answer=answer) as s:
        [r] = quick(
            model_at(s, service, **extra),
            [Request("How many?", "Count.", schema=schema, temperature=0.5)],
            book,
            batch=batch,
        )
    assert json.loads(r.text) == dict(count=3)
    assert (seen[0]["schema"], seen[0]["system"], seen[0]["temperature"]) == (schema, "Count.", 0.5)


# what fails for good


@BOTH
@MODES
def test_a_bad_request_fails_alone(service, batch, book):
    todo = [*questions(5), Request("<<invalid>> this one")]
    with serve() as s:
        m = model_at(s, service)
        with pytest.warns(UserWarning, match="1 of 6 requests .* have no reply"):
            replies = quick(m, todo, book, batch=batch)
        assert replies[-1] is None and right(replies[:-1], todo[:-1])
        assert "refused" in book.errors(book.note(m, todo[-1:])).popitem()[1]
        with pytest.warns(UserWarning):
            quick(m, todo, book, batch=batch)
        assert sum(s.served.values()) == 5


@BOTH
@MODES
def test_wrong_key_or_model_stops_at_once(service, batch, book, monkeypatch):
    with serve(models=["m"]) as s:
        with pytest.raises(Unusable, match="nonesuch"):
            quick(model_at(s, service, "nonesuch"), questions(500), book, batch=batch)
        monkeypatch.setenv(f"{service.upper()}_API_KEY", "wrong-key-0123456789")
        with pytest.raises(Unusable) as e:
            quick(model_at(s, service), questions(500), book, batch=batch)
        assert "wrong-key" not in str(e.value) and s.received < 100 and not s.served
        monkeypatch.setenv(f"{service.upper()}_API_KEY", KEY)
        assert right(
            quick(model_at(s, service), questions(20), book, batch=batch), questions(20)
        )  # nothing stayed claimed


def test_without_a_key_nothing_begins(book, monkeypatch):
    for k in ("OPENAI_API_KEY", "ANTHROPIC_API_KEY"):
        monkeypatch.delenv(k)
    for m in ("openai:gpt-4o-mini", "anthropic:claude-haiku-4-5"):
        with pytest.raises(ValueError, match="set .*_API_KEY in the environment"):
            quick(m, questions(2), book)


@BOTH
def test_a_dead_service_is_given_up(service, book):
    with serve() as s:
        m = model_at(s, service)
    with pytest.raises(ConnectionError, match="in a row failed"):
        quick(m, questions(300), book, retries=0)
    assert len(book.errors(book.note(m, questions(300)))) <= sending.GIVE_UP + 16  # those that are in the air


# budgets, limits


@BOTH
@MODES
def test_the_budget_is_never_exceeded_and_goes_on_later(service, batch, tmp_path, book):
    table = tmp_path / "prices.json"
    table.write_text(
        json.dumps(
            dict(date="2026-01-01", models={f"{service}:own": dict(input=10.0, output=100.0, batch=0.5)})
        )
    )
    todo = questions(60)
    with serve(
        Faults(latency_s=0.005), answer=lambda q: dict(text="x", input_tokens=20, output_tokens=25)
    ) as s:
        m = model_at(s, service, "own")
        true = (20 * 10 + 25 * 100) / 1e6 * (0.5 if batch else 1)
        for limit in (true * 20, true * 40):  # the second call goes on within a larger budget
            with pytest.raises(OverBudget, match="what has arrived is kept"):
                quick(m, todo, book, batch=batch, max_cost=limit, prices=table)
            spent = book.cost(book.note(m, todo))
            assert (
                sum(s.served.values()) * true == pytest.approx(spent)
                and limit - 2 * cost_ceiling(read_prices(table)[0][str(m)], todo[0], "concurrent")
                < spent
                <= limit
            )
        quick(m, todo, book, batch=batch, max_cost=true * 100, prices=table)
        assert set(s.served.values()) == {1} and len(s.served) == 60
    with pytest.raises(ValueError, match="no price of openai:unheard-of is known"):
        quick("openai:unheard-of", todo, book, max_cost=1.0)


@BOTH
def test_limits_are_kept(service, book):
    few = dict(concurrency=4)  # what is on its way may arrive together
    with serve(Faults(rpm=2400, window_s=2.0)) as s:  # forty a second, and what two seconds allow at once
        assert right(quick(model_at(s, service), questions(120), book, rpm=2400, **few), questions(120))
        assert s.status_counts[429] == 0
    with serve(Faults(tpm=60_000, window_s=1.5)) as s:
        todo = [Request(f"{i} " + "word " * 20, max_tokens=50) for i in range(30)]
        quick(model_at(s, service), todo, book, tpm=60_000, **few)
        assert s.status_counts[429] == 0


def test_retry_after_is_honoured(book, monkeypatch):
    slept = []
    monkeypatch.setattr(sending, "sleep_using_event", lambda stop: slept.append)
    with serve(Faults(script=["429"], retry_after=1234.5)) as s:
        assert right(quick(model_at(s, "openai"), questions(1), book), questions(1))
    assert slept == [1234.5]


# killed clients, several clients

CLIENT = """
import signal, sys, warnings
from stars.llm.ask import *
signal.signal(signal.SIGINT, signal.default_int_handler)
service, url, path, n, batch = sys.argv[1:]
todo = [Request(f"question {i}", "Say it backwards.", max_tokens=50) for i in range(int(n))]
warnings.simplefilter("ignore")
print("ready", flush=True)
options = dict(batch=batch == "True", poll=.05, progress=False, concurrency=8)
with Ledger(path) as book: ask(Model(service, "m", url), todo, book, **options)
"""


def client(s, service, path, n, batch=False):
    m = model_at(s, service)
    p = subprocess.Popen(
        [sys.executable, "-c", CLIENT, service, m.base_url, path, str(n), str(batch)],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | dict(OMP_NUM_THREADS="1"),
    )
    assert p.stdout.readline() == "ready\n"
    return p


@BOTH
@MODES
def test_killed_again_and_again(service, batch, tmp_path):
    n, kills, rng = 300, 5, random.Random(0)
    with serve(
        Faults(
            latency_s=0.02,
            p_429=0.02,
            p_500=0.02,
            p_batch_item_expired=0.05,
            batch_latency_s=0.4,
            drop_submit_after=1,
        )
    ) as s:
        for _ in range(kills):
            p = client(s, service, tmp_path / "ledger.db", n, batch)
            goal = s.received + (rng.randint(1, 6) if batch else rng.randint(20, 60))
            while s.received < goal and p.poll() is None:
                time.sleep(0.001)
            p.kill()
            p.wait()
        p = client(s, service, tmp_path / "ledger.db", n, batch)
        assert p.wait(600) == 0
        with Ledger(tmp_path / "ledger.db") as book:
            assert right([book.get(model_at(s, service), q) for q in questions(n)], questions(n))
        assert len(s.served) == n and set(s.served.values()) == {1}
    assert [f.name for f in tmp_path.iterdir() if f.suffix == ".lock"] == []


@MODES
def test_two_processes_share_the_work(batch, tmp_path):
    with serve(Faults(latency_s=0.01)) as s:
        both = [client(s, "openai", tmp_path / "ledger.db", 200, batch) for _ in range(2)]
        assert [p.wait(600) for p in both] == [0, 0]
        assert len(s.served) == 200 and set(s.served.values()) == {1}


def test_interrupted_clients_keep_what_is_in_the_air(tmp_path):
    with serve(Faults(latency_s=0.2, honour_idempotency=False)) as s:
        p = client(s, "openai", tmp_path / "ledger.db", 200)
        while s.received < 20 and p.poll() is None:
            time.sleep(0.005)
        p.send_signal(signal.SIGINT)
        assert p.wait(600) != 0
        with Ledger(tmp_path / "ledger.db") as book:
            answered = book.answered(book.note(model_at(s, "openai"), questions(200)))
            assert len(answered) == sum(s.served.values()) < 200


# secrets, replay


@BOTH
@MODES
def test_keys_reach_no_file(service, batch, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    with serve(Faults(p_500=0.3, p_batch_item_error=0.5)) as s, Ledger("ledger.db") as book:
        m = model_at(s, service)
        with warnings.catch_warnings(record=True):
            quick(m, [*questions(20), Request("<<invalid>>")], book, batch=batch)
        monkeypatch.setenv(f"{service.upper()}_API_KEY", KEY + "-wrong")
        with pytest.raises(Unusable):
            quick(m, questions(30), book, batch=batch)
        book.export("study.parquet")
        files = [f for f in tmp_path.rglob("*") if f.is_file()]
        assert len(files) >= 2 and not [f for f in files if KEY.encode() in f.read_bytes()]
    assert KEY not in "".join(capfd.readouterr())


def everything_said(e):
    "What a traceback, or a tool that looks behind it, shows of an exception"
    seen = []
    while e and e not in seen:
        seen.append(e)
        e = e.__cause__ or e.__context__
    return "".join(traceback.format_exception(seen[0])) + "".join(f"{x!r} {x} {x.args}" for x in seen)


ECHOES = {
    "plain": str,
    "as a header": "Authorization: Bearer {}".format,
    "in an address": lambda k: f"https://x/?key={quote(k, safe='')}",
    "in JSON in JSON": lambda k: json.dumps(json.dumps(k)),
}


@BOTH
@MODES
@pytest.mark.parametrize("status", [400, 401, 422, 429, 500, 504, 200])
def test_a_key_that_a_server_repeats_is_kept_nowhere(
    service, status, batch, tmp_path, monkeypatch, capfd, caplog
):
    monkeypatch.chdir(tmp_path)
    key, respond = 'sk-"tricky"/key+0123456789', LLMServer.respond
    monkeypatch.setenv(f"{service.upper()}_API_KEY", key)
    caplog.set_level(logging.DEBUG)
    forms = list(ECHOES.values())

    def answer(q):  # an answer, or the error of a batch's item
        form = forms[int(re.search(r"\d+", q["prompt"])[0]) % len(forms)]
        if status != 200:
            raise ApiError(status, f"what is this: {form(key)}", code=key)
        return f"you said {form(key)}"

    def echo(self, c):
        reply = respond(self, c)
        return replace(reply, headers=reply.headers | {"x-echo": key, "x-request-id": key, "request-id": key})

    monkeypatch.setattr(LLMServer, "respond", echo)
    said = ""
    with (
        LLMServer(answer=answer, key=key) as s,
        Ledger("ledger.db") as book,
        warnings.catch_warnings(record=True) as warned,
    ):
        warnings.simplefilter("always")
        for todo in (questions(8), questions(30)):
            try:
                replies = quick(model_at(s, service), todo, book, batch=batch, retries=0, tries=1)
            except Exception as e:
                said += everything_said(e)
            else:
                said += repr(replies)
        book.export("study.parquet")
        assert s.received > 0 and said
        said += repr(book.errors(book.note(model_at(s, service), questions(30))))
        said += repr(pq.read_table("study.parquet").to_pylist())
    said += "".join(str(w.message) for w in warned) + caplog.text + "".join(capfd.readouterr())
    said += "".join(f.read_bytes().decode(errors="replace") for f in tmp_path.rglob("*") if f.is_file())
    for form in {
        key,
        quote(key, safe=""),
        json.dumps(key)[1:-1],
        json.dumps(json.dumps(key)[1:-1])[1:-1],
        repr(key)[1:-1],
        key.split("/")[1],
    }:
        assert form not in said
    # it was there, and has become its name
    assert f"${service.upper()}_API_KEY" in said


@BOTH
def test_no_part_of_a_key_is_left_where_a_message_is_cut(service, book):
    for before in (*range(0, 120, 8), *range(880, 1_000, 12)):
        with LLMServer(answer=lambda q: q["prompt"], key=KEY) as s, pytest.MonkeyPatch.context() as mp:
            body = dict(error=dict(message="x" * before + KEY), note="x" * before + KEY)
            bad = LLMReply(json.dumps(body).encode(), status=400 if before > 300 else 200)  # or no completion
            mp.setattr(LLMServer, "completion", lambda self, q: bad)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                quick(model_at(s, service), [Request(f"{before}")], book)
        [error] = book.errors(book.note(model_at(s, service), [Request(f"{before}")])).values()
        assert not any(KEY[:n] in error for n in range(5, len(KEY) + 1)) and error


def test_words_that_stand_for_a_key_are_left_alone(book, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "ollama")
    with LLMServer(answer=lambda q: "ollama is fun", key="ollama") as s:
        assert quick(model_at(s, "openai"), questions(1), book)[0].text == "ollama is fun"


@pytest.mark.parametrize(
    "kw",
    [
        dict(extra=dict(user=KEY)),
        dict(extra=dict(metadata=dict(a=[f"Bearer {KEY}"]))),
        dict(base_url=f"http://localhost/{KEY}/v1"),
        dict(name=KEY),
    ],
    ids=lambda kw: next(iter(kw)),
)
def test_models_hold_no_keys(kw):
    with pytest.raises(ValueError, match="holds an API key") as e:
        Model(**dict(service="openai", name="m") | kw)
    assert KEY not in everything_said(e.value)


@pytest.mark.parametrize("key", ["sk-0123456789…", "sk-01234\u200b56789", "sk-0123456789\x07"])
def test_keys_that_were_copied_badly_are_refused_unseen(key, book, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", key)
    with pytest.raises(ValueError, match="copy it again") as e:
        quick("openai:gpt-4o-mini", questions(1), book)
    assert key not in everything_said(e.value)


def test_a_recording_answers_without_keys_or_network(tmp_path, book, monkeypatch):
    with serve() as s:
        first = quick(m := model_at(s, "openai"), questions(30), book)
        with pytest.warns(UserWarning):
            quick(m, [Request("<<invalid>>")], book)
    recorded = book.export(tmp_path / "study.parquet")
    monkeypatch.delenv("OPENAI_API_KEY")
    with Ledger(recorded) as replay:
        assert quick("openai:m", questions(30), replay) == first
        with pytest.warns(UserWarning, match="refused"):
            assert quick("openai:m", [Request("<<invalid>>")], replay) == [None]  # failed then, fails now
        with pytest.raises(LookupError, match="no reply to 1 of 31 requests"):
            quick("openai:m", questions(31), replay)
    with Ledger(tmp_path / "other.db") as other:
        assert other.load(recorded) == 31 and quick(m, questions(30), other) == first


@pytest.mark.parametrize("content", [b"not a database at all, just text", b""], ids=["text", "empty"])
def test_what_is_no_ledger_is_refused(tmp_path, content):
    (tmp_path / "x.parquet").write_bytes(content)
    with pytest.raises(ValueError, match="^[^\n]*x.parquet: [^\n]* or is no exported ledger[^\n]*$"):
        Ledger(tmp_path / "x.parquet")
    if content:
        (tmp_path / "x.db").write_bytes(content * 100)
        with pytest.raises(ValueError, match="cannot be used: file is not a database"):
            Ledger(tmp_path / "x.db")
    with pytest.raises(ValueError, match="does not exist"):
        Ledger(tmp_path / "none.parquet")


def edited(**changed):
    return lambda df: df.assign(**{k: [v, *df[k][1:]] for k, v in changed.items()})


def everywhere(**changed):
    return lambda df: df.assign(**{k: [v] * len(df) for k, v in changed.items()})


def retyped(**types):
    return lambda df: df.astype(types)


PARAMS = dict(extra={}, max_tokens=50, temperature=None, schema=None, sample=0)


@pytest.mark.parametrize(
    "change,says",
    [
        (edited(prompt="another question"), "row 0: it has the key .*, but its request makes"),
        (edited(system=""), "row 0: it has the key"),
        (edited(key="abc"), "row 0: it has the key abc"),
        (edited(params="{"), r"row 0: its request cannot be read \(JSONDecodeError"),
        (edited(params="[]"), "its request cannot be read"),
        (edited(params="null"), "its request cannot be read"),
        (edited(params=json.dumps(PARAMS | dict(max_tokens="x"))), "its request cannot be read"),
        (edited(params=json.dumps(PARAMS | dict(extra=[1]))), "its request cannot be read"),
        (edited(params=json.dumps(PARAMS | dict(more=1))), "its request cannot be read .*more"),
        (
            edited(params=json.dumps({k: v for k, v in PARAMS.items() if k != "extra"})),
            "its request cannot be read",
        ),
        (edited(params="[" * 100_000), "its request cannot be read"),
        (edited(model="m"), "its request cannot be read .*service:name"),
        (edited(prompt=" "), "its request cannot be read .*empty"),
        (edited(text=None), "row 0: text is empty"),
        (edited(prompt=None), "row 0: prompt is empty"),
        (edited(finish=None), "finish is empty"),
        (edited(cache_read=None), "cache_read is empty"),
        (edited(finish="done"), "finish='done' is none of stop, length, refusal and error"),
        (edited(input_tokens=-3), "input_tokens=-3 must be at least 0"),
        (edited(cost=-1.0), "cost=-1.0 must be at least 0"),
        (edited(cost=math.inf), "cost=inf"),
        (edited(output_tokens=2.5), "column output_tokens is not all int64"),
        (everywhere(output_tokens="many"), "column output_tokens"),
        (everywhere(cost="free"), "column cost"),
        (everywhere(text={"a": 1}), "column text is not all string"),
        (lambda df: pd.concat([df, df[:1]]), "row 3: the key .* stands in an earlier row"),
        (lambda df: df.drop(columns="params"), "it lacks params"),
        (lambda df: df.rename(columns=dict(text="reply")), "it lacks text"),
    ],
)
def test_a_recording_edited_by_hand_is_refused_in_one_line(tmp_path, book, change, says):
    "Wherever it is read, and nothing of the row is taken"
    for q in questions(3):
        book.record(Model.parse("openai:m"), q, Reply(q.prompt[::-1], cost=0.1))
    df = pd.read_parquet(book.export(tmp_path / "study.parquet"))
    change(df).to_parquet(tmp_path / "study.parquet", index=False)
    line = (
        rf"^[^\n]*study.parquet: [^\n]*{says}[^\n]*; it was changed by hand, [^\n]* "
        r"or export it again \(stars ledger LEDGER --to FILE\)$"
    )
    with pytest.raises(ValueError, match=line):
        Ledger(tmp_path / "study.parquet")
    with Ledger(tmp_path / "other.db") as other:
        with pytest.raises(ValueError, match=line):
            other.load(tmp_path / "study.parquet")
        assert set(other.replies(df.key)) <= set(df.key[1:])


@pytest.mark.parametrize(
    "change",
    [
        retyped(output_tokens="int32"),
        retyped(cost="float32"),
        lambda df: df.sort_values("key"),
        lambda df: df.assign(note="mine"),
        lambda df: df[::-1],
        lambda df: df[["text", *df.columns.drop("text")]],
    ],
    ids=["int32", "float32", "sorted", "another column", "backwards", "columns moved"],
)
def test_a_recording_that_says_the_same_is_read(tmp_path, book, change):
    for q in questions(3):
        book.record(Model.parse("openai:m"), q, Reply(q.prompt[::-1], cost=0.5))
    change(pd.read_parquet(book.export(tmp_path / "study.parquet"))).to_parquet(
        tmp_path / "study.parquet", index=False
    )
    with Ledger(tmp_path / "study.parquet") as replay:
        assert right(quick("openai:m", questions(3), replay), questions(3))


def test_a_recording_cut_short_is_refused(tmp_path, book):
    for q in questions(200):
        book.record(Model.parse("openai:m"), q, Reply(q.prompt[::-1]))
    raw = book.export(tmp_path / "study.parquet").read_bytes()
    for damaged in (raw[:-100], raw[100:], raw[:50] + b"damage" * 20 + raw[170:]):
        (tmp_path / "study.parquet").write_bytes(damaged)
        with pytest.raises(ValueError, match="^[^\n]*study.parquet: [^\n]*export it again[^\n]*$"):
            Ledger(tmp_path / "study.parquet")


def test_what_failed_is_taken_over_once(tmp_path, book):
    book.fail(book.note(Model.parse("openai:m"), questions(1))[0], "refused")
    recorded = book.export(tmp_path / "study.parquet")
    with Ledger(tmp_path / "other.db") as other:
        for _ in range(2):
            other.load(recorded)
        assert other.noted() == (1, 1)
        book.fail(
            request_key(Model.parse("openai:m"), questions(1)[0]), "no reply", 0.5
        )  # lost, and perhaps paid for
        for _ in range(2):
            other.load(book.export(tmp_path / "study.parquet"))
        assert other.noted() == (1, 2) and other.losses() == (1, 0.5)


def test_a_reply_lands_in_one_moment(book, monkeypatch):
    "Killed right after it was written down, nothing stays booked for its flight"

    def killed(*args):
        raise KeyboardInterrupt

    write = Ledger._save_once

    def written(self, *args):
        write(self, *args)
        raise KeyboardInterrupt

    monkeypatch.setattr(Ledger, "_save_once", written)
    monkeypatch.setattr(Ledger, "drop_charge", killed)
    monkeypatch.setattr(Ledger, "confirm_loss", killed)
    with pytest.raises(KeyboardInterrupt):
        quick("openai:gpt-4o-mini", questions(1), book, service=Scripted(), concurrency=1)
    assert len(
        book.replies(book.note(Model.parse("openai:gpt-4o-mini"), questions(1)))
    ) == 1 and book.losses() == (0, 0)


# a disk that fails


def test_a_full_disk_is_said_in_one_line(tmp_path):
    "What has arrived is kept, and with room the same call goes on"
    with Ledger(tmp_path / "ledger.db") as book:
        quick("openai:m", questions(3), book, service=Scripted())
        book._db.execute(f"PRAGMA max_page_count={book._db.execute('PRAGMA page_count').fetchone()[0]}")
        with pytest.raises(
            OSError,
            match=r"^[^\n]*ledger.db could not be written \(database or disk is full\). Make room[^\n]*$",
        ):
            quick("openai:m", questions(500), book, service=Scripted())
        book._db.execute("PRAGMA max_page_count=1000000")
        assert right(quick("openai:m", questions(500), book, service=Scripted()), questions(500))


def test_a_reply_outlasts_a_moments_failure_of_the_disk(book, monkeypatch):
    "It is paid for: writing it is tried again before it is given up"
    write, fails, asked = Ledger._save_once, iter([True, False, True, True, False]), []

    def failing(self, *args):
        if next(fails, False):
            raise OSError("disk I/O error")
        write(self, *args)

    class Counted(Scripted):
        def answer(self, request, key):
            asked.append(key)
            return super().answer(request, key)

    monkeypatch.setattr(Ledger, "_save_once", failing)
    assert (
        right(quick("openai:m", questions(4), book, service=Counted(), concurrency=1), questions(4))
        and len(asked) == 4
    )


@BOTH
def test_replies_that_are_none(service, book):
    with serve(Faults(script=["hollow", "html"])) as s:  # each looks like success to an SDK
        assert right(quick(model_at(s, service), questions(1), book, blind_retries=2), questions(1))


def test_an_endless_wait_can_be_interrupted(book):
    with serve(Faults(script=["429"] * 8, retry_after=10**6)) as s:

        def interrupt():
            while s.status_counts[429] < 8:
                time.sleep(0.01)  # all that are asked at once
            os.kill(os.getpid(), signal.SIGINT)

        threading.Thread(target=interrupt, daemon=True).start()
        m = model_at(s, "openai")
        with pytest.raises(KeyboardInterrupt):
            quick(m, questions(16), book, concurrency=8)
        assert right(
            quick(model_at(s, "openai"), questions(16), book), questions(16)
        )  # no claim was left behind


# what an adversary tried


@BOTH
def test_results_that_cannot_be_fetched_are_not_bought_again(service, book):
    with serve() as s:
        m = model_at(s, service)
        down, fetch = [True], s.__class__.download

        def flaky(self, *args):
            if down:
                raise ConnectionResetError
            return fetch(self, *args)

        with pytest.MonkeyPatch.context() as mp, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            mp.setattr(LLMServer, "download", flaky)
            threading.Timer(2.0, down.clear).start()
            assert right(quick(m, questions(20), book, batch=True), questions(20))
        assert set(s.served.values()) == {1}


class Scripted:
    "A service in this process: batches whose every move is scripted"

    def __init__(self, results=None, ended=None, find=None, submit=None):
        self.f, self.submitted = dict(results=results, ended=ended, find=find, submit=submit), []

    def answer(self, request, key):
        return Reply(request.prompt[::-1])

    def submit(self, requests, name):
        self.submitted.append(dict(requests))
        if self.f["submit"]:
            self.f["submit"](len(self.submitted))
        return f"b{len(self.submitted)}"

    def find(self, batch, keys, known):
        return self.f["find"](batch) if self.f["find"] else False

    def ended(self, id):
        return self.f["ended"](id) if self.f["ended"] else True

    def results(self, id):
        if self.f["results"]:
            yield from self.f["results"](id)
        else:
            yield from ((k, Reply(r.prompt[::-1])) for k, r in self.submitted[int(id[1:]) - 1].items())


def test_a_short_silence_ends_no_run(book):
    looks = iter([ConnectionError("away"), ConnectionError("still away"), False, True])

    def ended(id):
        if isinstance(x := next(looks), Exception):
            raise x
        return x

    s = Scripted(ended=ended)
    with pytest.warns(UserWarning, match="away"):
        assert right(quick("openai:m", questions(5), book, batch=True, service=s), questions(5))
    assert len(s.submitted) == 1


def test_a_submission_that_shows_late_is_adopted(book):
    shown = iter([False, True, True, "b1"])

    def lost(n):
        raise Lost("no reply")

    s = Scripted(find=lambda batch: next(shown), submit=lost)
    with pytest.warns(UserWarning, match="not known whether"):
        assert right(quick("openai:m", questions(5), book, batch=True, service=s, poll=0.2), questions(5))
    assert len(s.submitted) == 1


def test_a_batch_moves_once(book, tmp_path):
    m = Model.parse("openai:m")
    [batch] = [book.open_batch(m, book.claim(book.note(m, questions(3))))]
    with Ledger(tmp_path / "ledger.db") as other:
        assert not other.abandoned(batch)  # its owner lives, and is handing it in
        assert book.mark(batch, "running", "b1") and not other.mark(
            batch, "lost"
        )  # who saw it before may not call it lost


def test_too_much_at_once_goes_in_piece_by_piece(book):
    def crowded(id):
        batch = s.submitted[int(id[1:]) - 1]
        if len(batch) > 7:
            raise Rejected("token_limit_exceeded", False)
        return ((k, Reply(r.prompt[::-1])) for k, r in batch.items())

    s = Scripted(results=crowded)
    assert right(quick("openai:m", questions(50), book, batch=True, service=s, poll=0), questions(50))
    assert max(map(len, s.submitted[3:])) <= 7 and sum(map(len, s.submitted)) < 200


def test_what_never_arrived_goes_in_again_as_it_was(book):
    def lost_twice(n):
        if n <= 2:
            raise Lost("no reply")

    s = Scripted(submit=lost_twice)
    with pytest.warns(UserWarning, match="not known whether"):
        assert right(quick("openai:m", questions(50), book, batch=True, service=s), questions(50))
    assert list(map(len, s.submitted)) == [50] * 3


@BOTH
@pytest.mark.parametrize("status", [429, 500, 503, 529, "refused"])
def test_a_busy_service_is_handed_the_same_batch_again(service, status, book, monkeypatch, table):
    left, submission = [3], LLMServer.submission

    def busy(self, api, body):
        if left[0]:
            left[0] -= 1
            raise ApiError(
                529 if status == 503 and api == "anthropic" else status,
                "not now",
                **({"retry-after": "0.2"} if status == 429 else {}),
            )
        return submission(self, api, body)

    with serve() as s:
        m = model_at(s, service, "own")
        # nobody listens for a moment
        if status == "refused":
            never, paid = httpx2.ConnectError("refused"), services.Client.paid

            def away(self, call):
                if not left[0]:
                    return paid(self, call)
                left[0] -= 1

                def fails():
                    raise self.sdk.APIConnectionError(request=httpx2.Request("POST", "http://x")) from never

                return paid(self, fails)

            monkeypatch.setattr(services.Client, "paid", away)
        else:
            monkeypatch.setattr(LLMServer, "submission", busy)
        with pytest.warns(UserWarning, match="handing in 300 requests again"):
            assert right(quick(m, questions(300), book, batch=True, prices=table), questions(300))
        assert (
            [len(b.items) for b in s.batches.values()] == [300] and left == [0] and book.losses() == (0, 0.0)
        )


def test_a_service_that_stays_busy_is_given_up_and_gone_on_with_later(book):
    def busy(n):
        raise Busy("not now")

    s = Scripted(submit=busy)
    with pytest.raises(ConnectionError, match="20 calls in a row failed"), pytest.warns(UserWarning):
        quick("openai:m", questions(50), book, batch=True, service=s, poll=0)
    assert set(map(len, s.submitted)) == {50}
    assert right(
        quick("openai:m", questions(50), book, batch=True, service=Scripted(), poll=0), questions(50)
    )


def test_looks_that_fail_now_and_then_end_no_run(book):
    looks = iter([x for _ in range(30) for x in (ConnectionError("away"), False)] + [True])

    def ended(id):
        if isinstance(x := next(looks), Exception):
            raise x
        return x

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert right(
            quick("openai:m", questions(5), book, batch=True, service=Scripted(ended=ended), poll=0),
            questions(5),
        )


def test_busy_while_batches_are_under_way_is_waited_out(book, monkeypatch):
    monkeypatch.setattr(batches, "BATCH_REQUESTS", 30)
    state = dict(tries=0)

    def full(n):
        # twice what a run would bear
        if n > 1 and state["tries"] < 40:
            state["tries"] += 1
            raise Busy("too many batches")

    s = Scripted(submit=full, ended=lambda id: id != "b1" or state["tries"] == 40)
    s.results = lambda id: ((k, Reply(r.prompt[::-1])) for b in s.submitted for k, r in b.items())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert right(quick("openai:m", questions(60), book, batch=True, service=s, poll=0), questions(60))
    assert set(map(len, s.submitted)) == {30}


def test_servers_without_batches_say_so(book):
    with serve() as s:
        m = Model("openai", "m", s.url + "/nowhere")
        with pytest.raises(Unusable, match="takes no batches; ask without"):
            quick(m, questions(5), book, batch=True)


def test_batches_are_not_asked_again_one_by_one(book):
    s = Scripted(ended=lambda id: False)
    with pytest.raises(KeyboardInterrupt):
        threading.Timer(0.5, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
        quick("openai:m", questions(5), book, batch=True, service=s)
    with pytest.raises(ValueError, match="in batches under way; batch=True"):
        quick("openai:m", questions(5), book, service=s)
    with pytest.raises(ValueError, match="is not under way"):
        book.forget("b7")
    assert book.forget("b1") == 5 and right(quick("openai:m", questions(5), book, service=s), questions(5))


def test_many_refusals_hide_nothing(book):
    with serve() as s:
        todo = [*(Request(f"<<invalid>> {i}") for i in range(40)), *questions(20)]
        with pytest.warns(UserWarning, match="40 of 60"):
            replies = quick(model_at(s, "openai"), todo, book)
        assert replies[:40] == [None] * 40 and right(replies[40:], todo[40:])


@pytest.mark.parametrize("bad_first", [True, False])
def test_many_refusals_do_not_end_later_calls(bad_first, book):
    bad, good = [Request(f"<<invalid>> {i}") for i in range(120)], questions(40)
    todo = [*bad, *good] if bad_first else [*good, *bad]
    with serve() as s:
        for _ in range(3):
            with pytest.warns(UserWarning, match="120 of 160"):
                replies = quick(model_at(s, "openai"), todo, book)
            assert sorted(r.text for r in replies if r) == sorted(q.prompt[::-1] for q in good)


class Words(ApiError):
    "A refusal in a server's own words"

    def __init__(self, status, body):
        super().__init__(status, "")
        self.words = body

    def body(self, api, request_id):
        return self.words


OWN_WORDS = [
    (400, dict(error=dict(message="no such thing as own_field"))),
    (422, dict(detail=[dict(loc=["body", "own_field"], msg="Extra inputs are not permitted")])),
    (405, "own_field: method not allowed"),
    (413, dict(error="own_field is too large")),
    (451, dict(message="own_field is not for you", object="error")),
    (400, dict(error=dict(message="Provider returned error", metadata=dict(raw="own_field is wrong")))),
]


@BOTH
@pytest.mark.parametrize("status, body", OWN_WORDS, ids=str)
def test_what_every_request_is_refused_with_ends_the_run(service, status, body, book):
    def answer(q):
        raise Words(status, body)

    with serve(answer=answer) as s:
        with pytest.raises(Unusable, match="first 8 requests were refused.*own_field"):
            quick(model_at(s, service), questions(300), book, concurrency=4)
        assert 20 <= s.received < 60
        said = book.errors(book.note(model_at(s, service), questions(300)))
        assert said and all("own_field" in e for e in said.values())
        # too few to say
        with pytest.warns(UserWarning, match="own_field"):
            assert quick(model_at(s, service), questions(3), book) == [None] * 3


ONLY = [
    (404, "This model is only supported in v1/responses and not in v1/chat/completions."),
    (400, "m is not available here. Please use the Responses API instead."),
    (404, "The model is only supported by /v1/responses."),
]


@MODES
@pytest.mark.parametrize("status, words", ONLY, ids=str)
def test_models_that_only_the_responses_api_answers_are_refused_with_that_reason(status, words, batch, book):
    def answer(q):
        raise ApiError(status, words)

    with serve(answer=answer) as s:
        reason = "openai:m: it is only to be had through the Responses API.*take another model.*"
        with pytest.raises(Unusable, match=reason + re.escape(words)):
            quick(model_at(s, "openai"), questions(5), book, batch=batch)

    def other(q):
        raise ApiError(status, "no such thing as own_field")

    with serve(answer=other) as s, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            quick(model_at(s, "openai"), questions(5), book, batch=batch)
        except Unusable as e:
            assert "Responses API" not in str(e)  # a 404


LIMITS = [
    (400, "You have reached your usage limits."),
    (400, "You have reached your specified API usage limits. You will regain access on 2027-01-01."),
    (400, "Your credit balance is too low to access the API."),
    (429, "Billing hard limit has been reached"),
    (403, "This workspace has hit its spend limit."),
]


@BOTH
@pytest.mark.parametrize("status, words", LIMITS, ids=str)
def test_a_limit_that_is_reached_on_the_way_ends_the_run(service, status, words, book):
    answered = []

    def answer(q):
        answered.append(q)
        if len(answered) > 60:
            raise ApiError(status, words)
        return q["prompt"][::-1]

    with serve(answer=answer) as s:
        with pytest.raises(Unusable, match=re.escape(words)):
            quick(model_at(s, service), questions(300), book, concurrency=4)
        assert s.received < 80 and len(book.answered(book.note(model_at(s, service), questions(300)))) == 60


@BOTH
def test_a_limit_that_a_batch_meets_ends_the_run(service, book):
    answered = []

    def answer(q):
        answered.append(q)
        if len(answered) > 3:
            raise ApiError(400, LIMITS[0][1])
        return q["prompt"][::-1]

    with serve(answer=answer) as s:
        with pytest.raises(Unusable, match="reached your usage limits"):
            quick(model_at(s, service), questions(10), book, batch=True)
        assert len(s.batches) == 1 and len(book.answered(book.note(model_at(s, service), questions(10)))) == 3


def test_rate_limits_are_no_such_limits(book):
    words = (
        "Rate limit reached for m. You can increase your usage limits at https://example.com/account/billing."
    )
    left = [5]

    def answer(q):
        if left[0]:
            left[0] -= 1
            raise ApiError(429, words, "rate_limit_exceeded", **{"retry-after": "0.1"})
        return q["prompt"][::-1]

    with serve(answer=answer) as s:
        assert right(quick(model_at(s, "openai"), questions(5), book), questions(5))


@pytest.mark.parametrize(
    "bad",
    [dict(output_tokens=-(10**9)), dict(input_tokens=2**70), dict(text=None), dict(text=["a"])],
    ids=str,
)
def test_impossible_replies_are_not_booked(bad):
    with pytest.raises(ValueError):
        checked(Reply(**dict(text="x") | bad))
    assert checked(Reply("half a \ud83d pair")).text.isascii()


def test_lost_replies_count_against_the_budget(book, tmp_path):
    table = tmp_path / "prices.json"
    table.write_text(
        json.dumps(dict(date="2026-01-01", models={"openai:own": dict(input=10.0, output=100.0)}))
    )
    with serve(
        Faults(script=["drop_after"] * 50, honour_idempotency=False),
        answer=lambda q: dict(text="x", input_tokens=20, output_tokens=50),
    ) as s:
        with pytest.raises((OverBudget, ConnectionError)), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for _ in range(5):
                quick(model_at(s, "openai", "own"), questions(30), book, max_cost=0.1, prices=table)
        assert sum(s.served.values()) * (20 * 10 + 50 * 100) / 1e6 <= 0.1 < 30 * (20 * 10 + 50 * 100) / 1e6


# what was lost, and perhaps paid for


@pytest.fixture
def table(tmp_path):
    "A price table for the model `own` of both services"
    path = tmp_path / "prices.json"
    price = dict(input=10.0, output=100.0, batch=0.5)
    models = {f"{s}:own": price for s in ("anthropic", "openai")}
    path.write_text(json.dumps(dict(date="2026-01-01", models=models)))
    return path


def truth(s):
    return sum(s.served.values()) * (20 * 10 + 25 * 100) / 1e6


def twenty_five(q):
    return dict(text=q["prompt"][::-1], input_tokens=20, output_tokens=25)


@BOTH
@pytest.mark.parametrize("fault", ["drop_after", "truncated_body", "malformed", "504", "html"])
@pytest.mark.parametrize("max_cost", [None, 1.0])
def test_a_lost_reply_is_asked_for_once_and_booked_at_its_ceiling(service, fault, max_cost, book, table):
    todo, script = questions(40), [fault if i % 4 == 0 else "ok" for i in range(40)]
    with serve(Faults(script=script, honour_idempotency=False), answer=twenty_five) as s:
        m = model_at(s, service, "own")
        with pytest.warns(UserWarning, match="10 of 40 requests .* have no reply"):
            replies = quick(m, todo, book, prices=table, max_cost=max_cost)
        keys = book.note(m, todo)
        # nothing was asked twice
        assert sum(s.served.values()) == len(s.served) == 40 and replies.count(None) == 10
        count, most = book.losses()
        assert count == 10
        ceiling = cost_ceiling(read_prices(table)[0][str(m)], todo[0], "concurrent")
        assert most == pytest.approx(book.lost_cost(keys)) == pytest.approx(10 * ceiling, rel=0.01)
        # the ledger knows of every dollar
        assert truth(s) <= book.cost(keys) + most
        assert right(quick(m, todo, book, prices=table, max_cost=max_cost), todo)
        assert sum(s.served.values()) == 50
        # and so does a recording
        with Ledger(book.export(table.with_name("study.parquet"))) as replay:
            assert replay.losses()[1] == pytest.approx(most)


@BOTH
def test_blind_retries_are_a_setting(service, book):
    for honour, billed in ((True, 1), (False, 3)):
        with serve(Faults(script=["drop_after", "drop_after"], honour_idempotency=honour)) as s:
            todo = [Request(f"honoured: {honour}")]
            assert right(quick(model_at(s, service), todo, book, blind_retries=2), todo)
            assert list(s.served.values()) == [billed]
    with serve(Faults(script=["drop_after"] * 2)) as s, pytest.warns(UserWarning, match="1 of 1"):
        assert quick(model_at(s, service), questions(1), book, blind_retries=1) == [None] and s.received == 2


@BOTH
def test_what_never_left_is_not_lost(service, book, table, monkeypatch):
    with serve() as s:
        m, back, lock = model_at(s, service, "own"), [], threading.Lock()

    def comes_back(seconds):
        with lock:
            if not back:
                back.append(serve(port=s.port))

    monkeypatch.setattr(sending, "sleep_using_event", lambda stop: comes_back)  # it was away for a moment
    assert right(quick(m, questions(8), book, prices=table), questions(8)) and book.losses() == (0, 0.0)
    back[0].close()


@BOTH
@pytest.mark.parametrize("blind", [0, 3])
def test_lines_of_a_batch_that_are_lost_are_booked(service, blind, book, table):
    with serve(Faults(p_batch_malformed_line=0.3), answer=twenty_five) as s, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        m = model_at(s, service, "own")
        replies = quick(m, questions(40), book, batch=True, prices=table, blind_retries=blind)
        lost = sum(s.spoiled.values())
        assert sum(s.served.values()) == (40 + lost if blind else 40)
        assert replies.count(None) == (0 if blind else lost) and book.losses()[0] == lost > 0
        assert truth(s) / 2 <= book.cost(book.note(m, questions(40))) + book.losses()[1]


KILLED = CLIENT.replace('"m", url', '"own", url').replace("batch=batch ==", "prices=batch, batch=False and")


@BOTH
def test_what_a_killed_process_had_in_the_air_is_booked(service, tmp_path, table):
    with serve(Faults(latency_s=0.3, honour_idempotency=False), answer=twenty_five) as s:
        m = model_at(s, service, "own")
        p = subprocess.Popen(
            [sys.executable, "-c", KILLED, service, m.base_url, tmp_path / "ledger.db", "60", table],
            env=os.environ | dict(OMP_NUM_THREADS="1"),
        )
        while s.received < 30 and p.poll() is None:
            time.sleep(0.001)
        p.kill()
        p.wait()
        # what it had asked is still answered, and billed
        time.sleep(0.5)
        with Ledger(tmp_path / "ledger.db") as book:
            keys = book.note(m, questions(60))
            answered, (lost, most) = len(book.answered(keys)), book.losses()
            assert 0 < lost <= 8 and answered + lost >= sum(s.served.values())
            assert truth(s) <= book.cost(keys) + most
            # a kill makes no budget larger
            with pytest.raises(OverBudget):
                quick(m, questions(60), book, prices=table, max_cost=book.cost(keys) + most)
            assert book.losses() == (lost, most)


# the limit


@pytest.fixture
def bodies(monkeypatch):
    "What servers were sent, one by one and in batches"
    seen, question = [], LLMServer.question

    def watched(self, api, body):
        seen.append(body)
        return question(self, api, body)

    monkeypatch.setattr(LLMServer, "question", watched)
    return seen


@MODES
@pytest.mark.parametrize(
    "service, elsewhere, name",
    [
        ("anthropic", False, "max_tokens"),
        ("anthropic", True, "max_tokens"),
        ("openai", False, "max_completion_tokens"),
        ("openai", True, "max_tokens"),
    ],
)
def test_every_service_is_sent_the_limit(service, elsewhere, name, batch, book, bodies, monkeypatch):
    with serve(answer=lambda q: "word " * 5_000) as s:
        m = model_at(s, service)
        if not elsewhere:  # the official address leads here
            monkeypatch.setitem(OFFICIAL, service, m.base_url)
            m = Model(service, "m")
        [r] = quick(m, questions(1), book, batch=batch)
        assert [{k: v for k, v in b.items() if k.startswith("max_")} for b in bodies] == [{name: 50}]
        assert len(r.text) == 50 * 4 and r.output_tokens == 50 and r.finish == "length"


@MODES
def test_servers_that_know_only_max_tokens_keep_the_limit(batch, book):
    with serve(answer=lambda q: "word " * 5_000, only_max_tokens=True) as s:
        [r] = quick(model_at(s, "openai"), questions(1), book, batch=batch)
    assert r.output_tokens == 50


@MODES
def test_servers_that_refuse_max_tokens_are_asked_with_the_newer_name(batch, book, bodies):
    # as a gateway to OpenAI's newer models
    with serve(no_temperature=("m",)) as s:
        assert right(quick(model_at(s, "openai"), questions(30), book, batch=batch), questions(30))
        assert set(s.served.values()) == {1}
        assert bodies[-1]["max_completion_tokens"] == 50 and "max_tokens" not in bodies[-1]
        # other refusals stay refusals
        with pytest.warns(UserWarning, match="no_such_field|1 of 1"):
            quick(model_at(s, "openai", no_such_field=1), questions(1), book, batch=batch)


def test_models_in_this_process_keep_the_limit(book):
    m, service = local_service("plain")
    [one, seven] = quick(
        m,
        [Request("3 4 5", max_tokens=1, temperature=1.0), Request("3 4 5", max_tokens=7, temperature=1.0)],
        book,
        service=service,
    )
    assert one.output_tokens == 1 and 1 < seven.output_tokens <= 7
    asked = []

    class Engine:
        def generate(self, prompts, max_tokens, temperature, seeds):
            asked.append(max_tokens)
            return [Rollout(p, [service.tokenizer.eos_token_id], [0.0], True) for p in prompts]

    other = EngineService(Engine(), service.tokenizer, service.rows, service.context)
    quick(replace(m, name="other"), [Request("3 4 5", max_tokens=n) for n in (3, 50)], book, service=other)
    assert sorted(asked) == [3, 50]


# what nobody counted

ODD = dict(
    anthropic=[
        "absent",
        None,
        {},
        "none",
        *(
            dict(zip(("input_tokens", "output_tokens"), counts))
            for counts in [(0, 0), (9,), ("many", "few"), (9, -5), (9, 5.5), (9, 2**60)]
        ),
    ],
    openai=[
        "absent",
        None,
        {},
        [],
        *(
            dict(zip(("prompt_tokens", "completion_tokens"), counts))
            for counts in [(0, 0), (9,), ("many", "few"), (9, -5)]
        ),
        dict(completion_tokens=5),
        dict(prompt_tokens=9, completion_tokens=5, prompt_tokens_details=dict(cached_tokens=90)),
    ],
)


@BOTH
@MODES
def test_good_replies_without_counts_are_kept(service, batch, book, table):
    odd = {q.prompt: u for q, u in zip(questions(10), ODD[service])}
    with serve(answer=lambda q: dict(text=q["prompt"][::-1], usage=odd[q["prompt"]])) as s:
        free = quick(model_at(s, service), questions(10), book, batch=batch)  # no price is known
        assert right(free, questions(10)) and set(s.served.values()) == {1}
        assert all(r.cost is None and None in (r.input_tokens, r.output_tokens) for r in free)
        assert book.uncounted() == 10
    for cost in (None, 1.0):
        with serve(answer=lambda q: dict(text=q["prompt"][::-1], usage=odd[q["prompt"]])) as s:
            m = model_at(s, service, "own")
            kept = quick(m, questions(10), book, batch=batch, prices=table, max_cost=cost)
            price, mode = read_prices(table)[0][str(m)], "batch" if batch else "concurrent"
            ceilings = [cost_ceiling(price, q, mode) for q in questions(10)]
            assert right(kept, questions(10)) and [r.cost for r in kept] == pytest.approx(ceilings)
            assert set(s.served.values()) == {1}
    assert book.losses() == (0, 0.0) and [t[3] >= 0 for t in book.totals()]
    recorded = book.export(table.with_name("study.parquet"))
    with Ledger(recorded) as replay:
        assert quick(m, questions(10), replay) == kept


# whose reply it is


@BOTH
@MODES
def test_two_servers_with_one_model_name_have_a_reply_each(service, batch, book, tmp_path, monkeypatch):
    todo = questions(5)
    with serve() as s, serve(answer=lambda q: "another model") as other:
        one, two = model_at(s, service), model_at(other, service)
        assert right(quick(one, todo, book, batch=batch), todo)
        assert (estimate(one, todo, book).recorded, estimate(two, todo, book).recorded) == (5, 0)
        assert {r.text for r in quick(two, todo, book, batch=batch)} == {"another model"}
        assert right(quick(one, todo, book, batch=batch), todo)
        assert (len(s.served), len(other.served)) == (5, 5)
        spelled = replace(one, base_url=one.base_url.replace("http", "HTTP") + "/")  # the same server
        monkeypatch.setenv(f"{service.upper()}_BASE_URL", one.base_url)  # and once more
        for same in (spelled, Model(service, "m"), f"{service}:m"):
            assert right(quick(same, todo, book), todo)
        assert sum(s.served.values()) == sum(other.served.values()) == 5
        monkeypatch.delenv(f"{service.upper()}_BASE_URL")
        both = book.export(tmp_path / "both.parquet")
    which = f"{one.base_url} and at {two.base_url}|{two.base_url} and at {one.base_url}"
    with Ledger(both) as replay, pytest.raises(LookupError, match=which):
        quick(f"{service}:m", todo, replay)
    with Ledger(both) as replay:
        assert right(quick(one, todo, replay), todo) and quick(two, todo, replay)[0].text == "another model"
    with Ledger(tmp_path / "other.db") as loaded:
        loaded.load(both)
        assert loaded.get(two, todo[0]).text == "another model"
        assert loaded.get(Model(service, "m"), todo[0]) is None


def without_addresses(book):
    "As ledgers were: the parameters of a request said nothing about where it was sent"
    book._db.execute("UPDATE requests SET params = json_remove(params, '$.base_url')")


@BOTH
def test_ledgers_from_before_addresses_were_noted_are_read(service, book, tmp_path):
    with serve() as s:
        official, m = Model(service, "m"), model_at(s, service)
        for q in questions(5):
            book.record(official, q, Reply(q.prompt[::-1]))
        without_addresses(book)
        old = book.export(tmp_path / "old.parquet")
        with pytest.warns(UserWarning, match="5 of 8 replies .* before ledgers noted addresses"):
            assert right(quick(m, questions(8), book), questions(8))
        assert sum(s.served.values()) == 3 and estimate(m, questions(8), book).recorded == 8
        for model in (m, official):
            with Ledger(old) as replay, warnings.catch_warnings():
                warnings.simplefilter("ignore")
                assert right(quick(model, questions(5), replay), questions(5))
        with Ledger(tmp_path / "other.db") as loaded, pytest.warns(UserWarning, match="before ledgers"):
            assert loaded.load(old) == 5 and right(quick(m, questions(5), loaded), questions(5))
            assert sum(s.served.values()) == 3


def test_batches_from_before_addresses_were_noted_are_collected(book):
    official, todo = Model("openai", "m"), questions(5)
    batch = book.open_batch(official, book.claim(book.note(official, todo)))
    book.mark(batch, "running", "b1")
    without_addresses(book)
    s = Scripted()
    s.submitted.append(dict(zip(book.note(official, todo), todo)))
    with pytest.warns(UserWarning, match="before ledgers"):
        assert right(
            quick(Model("openai", "m", "http://localhost:8000/v1"), todo, book, batch=True, service=s), todo
        )
    assert len(s.submitted) == 1


@pytest.mark.parametrize(
    "url",
    [
        "localhost:8000/v1",
        "ftp://localhost",
        "http://",
        "http://me:hunter2@localhost/v1",
        "http://localhost/v1?key=hunter2",
        "http://localhost/v1#hunter2",
    ],
)
def test_what_is_no_address(url):
    with pytest.raises(ValueError, match="base_url") as e:
        Model("openai", "m", url)
    assert "hunter2" not in str(e.value)


# prices


def test_prices_are_those_of_the_library(monkeypatch):
    def no_network(*args, **kw):
        raise AssertionError("prices are not fetched")

    monkeypatch.setattr("socket.socket.connect", no_network)
    prices, source = read_prices()
    rng, checked = random.Random(0), 0
    for name, price in prices.items():
        # not there, or there by its beginning
        if name == "openai:gpt-6.2-sol" or name.startswith("openai:ft:"):
            continue
        provider, model = name.split(":", 1)
        for tokens in (1_000, 90_000, 150_000, 250_000, 900_000):
            read, write, out = rng.randrange(tokens // 2), rng.randrange(tokens // 2), rng.randrange(5_000)
            if price.cache_read is None:
                read = 0
            if price.cache_write is None:
                write = 0
            for mode, context in (("concurrent", None), ("batch", dict(processing="batch"))):
                used = genai_prices.Usage(
                    input_tokens=tokens, output_tokens=out, cache_read_tokens=read, cache_write_tokens=write
                )
                true = float(
                    genai_prices.calc_price(
                        used, model, provider_id=provider, price_context=context
                    ).total_price
                )
                ours = price.cost(
                    Reply(
                        "",
                        input_tokens=tokens,
                        output_tokens=out,
                        cache_read=read,
                        cache_write=write,
                        mode=mode,
                    )
                )
                assert ours == pytest.approx(true, rel=1e-9), (name, tokens, mode)
                checked += 1
    assert checked > 500 and source == f"genai-prices {version('genai-prices')}"


NAMES = [
    ("openai:gpt-4o-2024-08-06", "openai:gpt-4o"),
    ("anthropic:claude-haiku-4-5-20251001", "anthropic:claude-haiku-4-5"),
    ("openai:gpt-6.2-sol-2026-11-18", "openai:gpt-6.2-sol"),
    *(
        (name, None)
        for name in (
            "openai:nonesuch",
            "openai:gpt-5-search-api",
            "anthropic:nonesuch",
            "openai:text-embedding-3-small",
        )
    ),
]


@pytest.mark.parametrize("name, same", NAMES)
def test_models_are_priced_by_their_name(name, same, book):
    assert price_of(Model.parse(name)) == (same and read_prices()[0][same])
    if not same:
        with pytest.raises(ValueError, match=f"no price of {name} is known"):
            quick(name, questions(1), book, max_cost=1.0, service=Scripted())


def test_what_the_library_lacks_is_added():
    prices, _ = read_prices()
    known = [
        prices[m]
        for m in (
            "openai:gpt-5.4-mini",
            "anthropic:claude-haiku-4-5",
            "openai:gpt-6.2-sol",
            "anthropic:claude-sonnet-5-5",
        )
    ]
    assert all(p.structured for p in known) and [p.temperature for p in known] == [True, True, False, False]
    assert price_of(Model.parse("anthropic:claude-haiku-4-5-20251001")).structured
    assert not price_of(Model.parse("anthropic:claude-3-haiku")).structured


def test_long_prompts_are_within_their_ceiling():
    price = price_of(Model.parse("openai:gpt-5.4"))
    for n in (270_000, 272_100, 400_000):
        r = Request("x" * n, max_tokens=10)
        for tokens in (1, n // 4, n, n + 30):
            reply = Reply("", input_tokens=tokens, output_tokens=10)
            assert price.cost(reply) <= cost_ceiling(price, r, "concurrent")
    with pytest.raises(ValueError, match="knows the model's prices up to 100"):
        cost_ceiling(replace(price, up_to=100, beyond=None), Request("x" * 200), "batch")


# what changes the price

DEAR = [
    *(
        ("openai", extra)
        for extra in (
            dict(service_tier="priority"),
            dict(service_tier="flex"),
            dict(tools=[]),
            dict(web_search_options={}),
            dict(modalities=["text", "audio"]),
            dict(something_new=1),
        )
    ),
    *(
        ("anthropic", extra)
        for extra in (
            dict(speed="fast"),
            dict(service_tier="auto"),
            dict(inference_geo="us"),
            dict(cache_control=dict(type="ephemeral", ttl="1h")),
            dict(output_config=dict(effort="low", format={})),
        )
    ),
]


@pytest.mark.parametrize("service, extra", DEAR, ids=str)
def test_fields_that_change_the_price_and_budgets_exclude_each_other(service, extra, book, table):
    m = Model(service, "own", extra=extra)
    with pytest.raises(ValueError, match=f"{next(iter(extra))} in extra .* may change what a request costs"):
        quick(m, questions(3), book, max_cost=1.0, prices=table, service=Scripted())
    # nobody knows
    assert right(free := quick(m, questions(3), book, prices=table, service=Scripted()), questions(3))
    assert {r.cost for r in free} == {None}
    assert estimate(m, questions(4), book, table).most == dict(concurrent=None, batch=None)


PLAIN = [
    ("openai", dict(service_tier="default", seed=3, reasoning_effort="low", top_p=0.9)),
    ("openai", dict(chat_template_kwargs=dict(enable_thinking=False), top_k=3)),
    ("anthropic", dict(speed="standard", service_tier="standard_only", thinking=dict(type="adaptive"))),
    ("anthropic", dict(output_config=dict(effort="low"))),
]


@pytest.mark.parametrize("service, extra", PLAIN, ids=str)
def test_fields_that_do_not_change_the_price_are_priced(service, extra, book, table):
    m = Model(service, "own", extra=extra)
    assert all(
        r.cost == 0.0 for r in quick(m, questions(3), book, max_cost=1.0, prices=table, service=Scripted())
    )
    assert estimate(m, questions(4), book, table).most["batch"] > 0


# batches that nobody wants any more


def interrupt_when_handed_in(s):
    def interrupt():
        while not s.batches:
            time.sleep(0.02)
        time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt, daemon=True).start()


@BOTH
def test_what_is_given_up_is_cancelled_and_what_was_done_is_kept(service, book, table):
    with serve(Faults(batch_latency_s=20.0), answer=twenty_five) as s:
        m = model_at(s, service, "own")
        interrupt_when_handed_in(s)
        with pytest.raises(KeyboardInterrupt):
            quick(m, questions(200), book, batch=True, prices=table)
        [id] = s.batches
        time.sleep(1.0)
        done = give_up(book, id, prices=table)
        assert s.batches[id].cancelled and 0 < done.kept == sum(s.served.values()) < 200
        assert done == GivenUp(done.kept, 200 - done.kept, True)
        keys = book.note(m, questions(200))
        assert len(book.answered(keys)) == done.kept and 0 < truth(s) / 2 == pytest.approx(book.cost(keys))
        assert book.losses() == (0, 0.0) and not book.under_way()
        assert right(quick(m, questions(200), book, prices=table), questions(200))
        assert set(s.served.values()) == {1}
        with pytest.raises(ValueError, match="is not under way"):
            give_up(book, id)


@BOTH
@pytest.mark.parametrize("how", ["unknown there", "here only"])
def test_what_cannot_be_cancelled_is_booked(service, how, book, table):
    with serve(Faults(batch_latency_s=600.0)) as s:
        m, todo = model_at(s, service, "own"), questions(20)
        interrupt_when_handed_in(s)
        with pytest.raises(KeyboardInterrupt):
            quick(m, todo, book, batch=True, prices=table)
        [id] = s.batches
        kept = s.batches.pop(id) if how == "unknown there" else None
        done = give_up(book, id, cancel=how == "unknown there", prices=table)
        ceiling = sum(cost_ceiling(read_prices(table)[0][str(m)], q, "batch") for q in todo)
        assert (done.kept, done.free, done.cancelled) == (0, 20, False)
        assert done.lost == pytest.approx(ceiling) == pytest.approx(book.losses()[1])
        assert kept or not s.batches[id].cancelled
        assert right(quick(m, todo, book, prices=table), todo)


def test_without_a_key_a_batch_can_only_be_forgotten_here(book, table, monkeypatch):
    m = Model("openai", "own")
    book.mark(book.open_batch(m, book.claim(book.note(m, questions(3)))), "running", "b1")
    monkeypatch.delenv("OPENAI_API_KEY")
    with pytest.raises(ValueError, match="set OPENAI_API_KEY in the environment; without that.*--no-cancel"):
        give_up(book, "b1")
    assert (
        len(book.under_way()) == 1
        and give_up(book, "b1", cancel=False, prices=table).free == 3
        and not book.under_way()
    )


@BOTH
def test_a_slow_cancellation_is_taken_up_later(service, book):
    with serve(Faults(batch_latency_s=600.0, cancel_s=2.0)) as s:
        m, todo = model_at(s, service), questions(20)
        interrupt_when_handed_in(s)
        with pytest.raises(KeyboardInterrupt):
            quick(m, todo, book, batch=True)
        [id] = s.batches
        assert give_up(book, id, patience=0.2) == GivenUp(0, 0, True) and len(book.under_way()) == 1
        s.faults.batch_latency_s = 0.1
        assert right(quick(m, todo, book, batch=True), todo) and len(s.batches) == 2
        assert set(s.served.values()) == {1}


@pytest.mark.parametrize(
    "extra", [dict(model="x"), dict(stream=True), dict(api_key="k"), dict(max_tokens=3), dict(n=2)], ids=str
)
def test_what_extra_may_not_say(extra):
    with pytest.raises(ValueError, match="cannot be set there"):
        Model.parse("openai:m", extra=extra)


@pytest.mark.parametrize(
    "kw",
    [
        dict(max_cost=float("nan")),
        dict(max_cost=-1),
        dict(blind_retries=-1),
        dict(poll=-1),
        dict(concurrency=0),
        dict(rpm=0),
    ],
    ids=str,
)
def test_impossible_settings(kw, book):
    with pytest.raises(ValueError, match="must be at least"):
        quick("openai:gpt-4o-mini", questions(1), book, **kw)


def test_a_key_with_a_line_break_is_refused_before_it_can_leak(book, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY + "\n")
    with pytest.raises(ValueError, match="line break") as e:
        quick("openai:gpt-4o-mini", questions(1), book)
    assert KEY not in str(e.value)


def test_a_generator_is_as_good_as_a_list(book):
    assert right(quick("openai:m", (q for q in questions(3)), book, service=Scripted()), questions(3))


def test_many_open_a_new_ledger_at_once(tmp_path):
    code = "import sys; from stars.llm.ledger import *; Ledger(sys.argv[1]).close()"
    ps = [
        subprocess.Popen([sys.executable, "-c", code, tmp_path / "new.db"], stderr=subprocess.PIPE)
        for _ in range(6)
    ]
    assert [p.wait() for p in ps] == [0] * 6


def test_estimates_bound_the_cost(book):
    with serve() as s:
        todo, m = questions(50), model_at(s, "openai", "gpt-4o-mini")
        before = estimate(m, todo, book)
        quick(m, todo, book)
        assert 0 < book.cost(book.note(m, todo)) <= before.most["concurrent"] == 2 * before.most["batch"]
        assert estimate(m, todo, book).most["concurrent"] == 0


def test_a_batch_whose_replies_are_all_here_is_not_under_way(tmp_path):
    "The process may die between the last reply and the note that the batch is done"
    model, requests = Model.parse("openai:m"), [Request(f"question {i}") for i in range(2)]
    with Ledger(tmp_path / "ledger.db") as book:
        keys = book.note(model, requests)
        batch = book.open_batch(model, keys)
        book.mark(batch, "running", "b1")
        book.record(model, requests[0], Reply("an answer", cost=0.1))
        assert [(b.id, n) for b, n in book.under_way()] == [("b1", 2)]
        book.record(model, requests[1], Reply("an answer", cost=0.1))
        assert book.under_way() == [] and book.open_batches(model, keys) == {}

"The official SDKs read everything that the imitated services say, faults included"

import json
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections import Counter

import pytest

anthropic, openai = pytest.importorskip("anthropic"), pytest.importorskip("openai")
import llm_server  # noqa: E402
from llm_server import Faults, LLMServer, fingerprint  # noqa: E402

SCHEMA = dict(
    type="object",
    properties=dict(n=dict(type="integer"), w=dict(type="array", items=dict(type="string"))),
    required=["n", "w"],
    additionalProperties=False,
)


def user(text):
    return [dict(role="user", content=text)]


def options(retries, kw):
    return dict(api_key="test-key", max_retries=retries, timeout=60) | kw


def claude(s, retries=0, **kw):
    return anthropic.Anthropic(base_url=s.url, **options(retries, kw))


def gpt(s, retries=0, **kw):
    return openai.OpenAI(base_url=s.openai_url, **options(retries, kw))


def tell(c, text="hi", **kw):
    if isinstance(c, anthropic.Anthropic):
        return c.messages.create(**dict(dict(model="m", max_tokens=50, messages=user(text)), **kw))
    return c.chat.completions.create(**dict(dict(model="m", messages=user(text)), **kw))


def text(r):
    return r.content[0].text if hasattr(r, "content") else r.choices[0].message.content


def both(s, **kw):
    return claude(s, **kw), gpt(s, **kw)


SDK = {claude: anthropic, gpt: openai}
each = pytest.mark.parametrize("client", [claude, gpt], ids=["anthropic", "openai"])


def items(n, **kw):
    return [
        dict(custom_id=f"i{i}", params=dict(dict(model="m", max_tokens=50, messages=user(f"q{i}")), **kw))
        for i in range(n)
    ]


def lines(n, **kw):
    return [
        dict(
            custom_id=f"i{i}",
            method="POST",
            url="/v1/chat/completions",
            body=dict(dict(model="m", messages=user(f"q{i}")), **kw),
        )
        for i in range(n)
    ]


def openai_submit(c, rows):
    f = c.files.create(file=("in.jsonl", "\n".join(map(json.dumps, rows)).encode()), purpose="batch")
    return c.batches.create(
        input_file_id=f.id, endpoint="/v1/chat/completions", completion_window="24h", metadata=dict(run="1")
    )


def ended(get, id, done):
    for _ in range(400):
        if done(b := get(id)):
            return b
        time.sleep(0.01)
    raise AssertionError(b)


def anthropic_batch(s, c, rows):
    b = ended(
        c.messages.batches.retrieve,
        c.messages.batches.create(requests=rows).id,
        lambda b: b.processing_status == "ended",
    )
    return b, {r.custom_id: r.result for r in c.messages.batches.results(b.id)}


def openai_batch(s, c, rows):
    b = ended(
        c.batches.retrieve,
        openai_submit(c, rows).id,
        lambda b: b.status in ("completed", "failed", "expired", "cancelled"),
    )

    def read(id):
        return [json.loads(line) for line in c.files.content(id).content.splitlines()] if id else []

    return b, {r["custom_id"]: r for r in read(b.output_file_id) + read(b.error_file_id)}


def test_messages():
    def answer(q):
        return (
            dict(refuse=dict(text="", finish="refusal"), long="x" * 1000).get(q["prompt"])
            or f"{q['system']}|{q['prompt']}|{q['temperature']}"
        )

    with LLMServer(answer, cache_min_tokens=10) as s:
        c = claude(s)
        r = tell(c, system="be brief", extra_body=dict(temperature=0.5))
        assert (text(r), r.stop_reason, r.usage.input_tokens, r.usage.output_tokens, r.type) == (
            "be brief|hi|0.5",
            "end_turn",
            3,
            4,
            "message",
        )
        assert s.served == {fingerprint("m", "be brief", "hi", temperature=0.5, max_tokens=50): 1}
        cached = [dict(type="text", text="y" * 80, cache_control=dict(type="ephemeral"))]
        first, second = tell(c, "aaaa", system=cached).usage, tell(c, "bbbb", system=cached).usage
        assert (first.input_tokens, first.cache_creation_input_tokens, first.cache_read_input_tokens) == (
            1,
            20,
            0,
        )
        assert (second.input_tokens, second.cache_creation_input_tokens, second.cache_read_input_tokens) == (
            1,
            0,
            20,
        )
        assert (
            tell(c, "long", max_tokens=5).stop_reason == "max_tokens"
            and len(text(tell(c, "long", max_tokens=5))) == 20
        )
        r = tell(c, "refuse")
        assert r.stop_reason == "refusal" and r.content == [] and r.stop_details.type == "refusal"
        assert c.models.list().data == []


def test_chat():
    def answer(q):
        return (
            dict(refuse=dict(text="no", finish="refusal"), long="x" * 1000).get(q["prompt"])
            or f"{q['system']}|{q['prompt']}"
        )

    with LLMServer(answer, models=("m",), cache_min_tokens=10) as s:
        c = gpt(s)
        for cached in (0, 20):
            r = tell(c, messages=[dict(role="system", content="y" * 80), *user("hi")], temperature=0.5)
            assert text(r).endswith("|hi") and r.choices[0].finish_reason == "stop"
            assert (r.usage.prompt_tokens, r.usage.prompt_tokens_details.cached_tokens) == (21, cached)
        assert s.served == {fingerprint("m", "y" * 80, "hi", temperature=0.5): 2}
        assert tell(c, "long", max_completion_tokens=5).choices[0].finish_reason == "length"
        m = tell(c, "refuse").choices[0].message
        assert m.refusal == "no" and m.content is None
        assert [m.id for m in c.models.list()] == ["m"]


def test_structured():
    def ask_claude(c, schema):
        return tell(c, output_config=dict(format=dict(type="json_schema", schema=schema)))

    def ask_gpt(c, schema):
        return tell(
            c,
            response_format=dict(type="json_schema", json_schema=dict(name="x", strict=True, schema=schema)),
        )

    with LLMServer() as s:
        claude, gpt = both(s)
        assert (
            json.loads(text(ask_claude(claude, SCHEMA)))
            == json.loads(text(ask_gpt(gpt, SCHEMA)))
            == dict(n=1, w=["text"])
        )
        with pytest.raises(anthropic.BadRequestError, match="additionalProperties"):
            ask_claude(claude, dict(SCHEMA, additionalProperties=True))
        with pytest.raises(openai.BadRequestError, match="required"):
            ask_gpt(gpt, dict(SCHEMA, required=["n"]))


@each
def test_refusals(client):
    sdk = SDK[client]
    with LLMServer(models=("m", "new"), no_temperature=("new",)) as s:
        c = client(s)
        with pytest.raises(sdk.AuthenticationError) as e:
            tell(client(s, api_key="wrong"))
        assert e.value.status_code == 401 and e.value.request_id.startswith("req_")
        with pytest.raises(sdk.NotFoundError):
            tell(c, model="other")
        with pytest.raises(sdk.BadRequestError):
            tell(c, extra_body=dict(foo=1))
        with pytest.raises(sdk.BadRequestError, match="temperature"):
            tell(c, model="new", extra_body=dict(temperature=0))
        with pytest.raises(sdk.BadRequestError):
            tell(c, "<<invalid>>")
        with pytest.raises(sdk.BadRequestError):
            tell(c, messages=[])
        assert tell(c, model="new")
        if sdk is anthropic:
            with pytest.raises(sdk.BadRequestError, match="max_tokens: Field required"):
                c.post("/v1/messages", body=dict(model="m", messages=user("hi")), cast_to=object)
        else:
            with pytest.raises(sdk.BadRequestError, match="max_completion_tokens"):
                tell(c, model="new", max_tokens=5)
            with pytest.raises(sdk.NotFoundError) as e:
                tell(c, model="other")
            assert (e.value.code, e.value.type) == ("model_not_found", "invalid_request_error")
        assert sum(s.served.values()) == 1 and not s.errors


@each
def test_statuses(client):
    sdk = SDK[client]
    with LLMServer(faults=Faults(script=["429", "500", "529", "502", "quota", "ok"], retry_after=0.25)) as s:
        c = client(s)
        with pytest.raises(sdk.RateLimitError) as e:
            tell(c)
        assert e.value.response.headers["retry-after"] == "0.25" and e.value.response.headers.get(
            "retry-after-ms"
        ) in (None, "250")
        for status in (500, 529 if sdk is anthropic else 503, 502):
            with pytest.raises(sdk.InternalServerError) as e:
                tell(c)
            assert e.value.status_code == status
        with pytest.raises(sdk.RateLimitError, match="quota"):
            tell(client(s, retries=2))
        assert not s.served and text(tell(c)) == "echo: hi" and sum(s.served.values()) == 1
        assert [x[3] for x in s.log] == [429, 500, 529 if sdk is anthropic else 503, 502, 429, 200]


@each
def test_lost_replies(client):
    sdk = SDK[client]
    script = ["drop_before", "drop_after", "truncated_body", "slow", "malformed", "html", "hollow"]
    with LLMServer(faults=Faults(script=script, slow_s=15)) as s:
        c, billed = client(s), []
        for error in (*[sdk.APIConnectionError] * 3, sdk.APITimeoutError, json.JSONDecodeError):
            with pytest.raises(error):
                tell(c.with_options(timeout=3) if error is sdk.APITimeoutError else c)
            billed.append(sum(s.served.values()))
        assert billed == [0, 1, 2, 3, 4]
        assert isinstance(tell(c), str) and tell(c).id is None  # 200 and nonsense: the SDKs believe it
        assert set(s.served.values()) == {6} and set(s.spoiled.values()) == {5}  # slow is not spoiled


@each
def test_random_faults(client):
    f = Faults(
        p_429=0.1,
        p_500=0.1,
        p_529=0.1,
        p_drop_before=0.1,
        p_drop_after=0.1,
        p_truncated_body=0.1,
        retry_after=0.01,
    )
    with LLMServer(faults=f) as s:
        c = client(s, retries=0)

        def patient(i):
            for _ in range(4):  # at most three faults strike one request
                try:
                    return text(tell(c, f"q{i}"))
                except (SDK[client].APIStatusError, SDK[client].APIConnectionError):
                    pass

        assert [patient(i) for i in range(60)] == [f"echo: q{i}" for i in range(60)]
        assert (
            len(s.served) == 60
            and all(n == 1 + s.spoiled[fp] for fp, n in s.served.items())
            and sum(s.spoiled.values()) > 3
        )
        assert s.received == sum(s.status_counts.values()) == len(s.log)


@each
def test_idempotency(client):
    key = {"Idempotency-Key": "k"}
    for honour, billed in ((True, 1), (False, 2)):
        with LLMServer(faults=Faults(script=["drop_after"], honour_idempotency=honour)) as s:
            with pytest.raises(SDK[client].APIConnectionError):
                tell(client(s), extra_headers=key)
            assert text(tell(client(s), extra_headers=key)) == "echo: hi" and list(s.served.values()) == [
                billed
            ]
            if honour:
                with pytest.raises(SDK[client].BadRequestError):
                    tell(client(s), "another", extra_headers=key)
    with LLMServer(faults=Faults(latency_s=0.1)) as s:  # at the same time: the second waits for the first
        got = []
        ts = [
            threading.Thread(target=lambda: got.append(tell(client(s), extra_headers=key).id))
            for _ in range(4)
        ]
        for t in ts:
            t.start()
        for t in ts:
            t.join()
        assert len(got) == 4 and len(set(got)) == 1 and list(s.served.values()) == [1]


@each
def test_rate_limit(client):
    with LLMServer(faults=Faults(rpm=200, window_s=0.9)) as s:  # three at once, then one per 0.3 s
        c, refused = client(s), []
        for i in range(6):
            try:
                tell(c, f"q{i}")
            except SDK[client].RateLimitError as e:
                refused.append(float(e.response.headers["retry-after"]))
        assert len(refused) == s.violations >= 2 and all(0 < w <= 0.3 for w in refused)
        assert text(tell(client(s, retries=1))) == "echo: hi"  # the SDK waits as told
    with LLMServer(faults=Faults(tpm=6000, window_s=1)) as s:
        kw = dict(max_tokens=90)
        tell(client(s), **kw)
        with pytest.raises(SDK[client].RateLimitError):
            tell(client(s), **kw)


def test_anthropic_batches():
    with LLMServer(models=("m",)) as s:
        c = claude(s)
        rows = [
            *items(5),
            dict(custom_id="bad", params=dict(model="other", max_tokens=5, messages=user("hi"))),
        ]
        b = c.messages.batches.create(requests=rows)
        assert (
            b.processing_status == "in_progress"
            and b.request_counts.processing == 6
            and b.results_url is None
        )
        with pytest.raises(anthropic.AnthropicError, match="results_url"):
            c.messages.batches.results(b.id)
        b, got = anthropic_batch(s, c, rows)
        assert (
            b.request_counts.succeeded == 5
            and b.request_counts.errored == 1
            and b.ended_at >= b.created_at
            and list(got) != [r["custom_id"] for r in rows]
        )
        assert [got[f"i{i}"].message.content[0].text for i in range(5)] == [
            f"echo: q{i}" for i in range(5)
        ] and got["i0"].message.usage.service_tier == "batch"
        assert got["bad"].type == "errored" and got["bad"].error.error.type == "not_found_error"
        for wrong in (
            [],
            [*items(1), *items(1)],
            [dict(items(1)[0], custom_id="a b")],
            [dict(items(1)[0], custom_id="a" * 65)],
        ):
            with pytest.raises(anthropic.BadRequestError):
                c.messages.batches.create(requests=wrong)
        s.faults.batch_latency_s = 9.0
        b = c.messages.batches.create(requests=items(3))
        assert c.messages.batches.cancel(b.id).processing_status == "canceling"
        b = ended(c.messages.batches.retrieve, b.id, lambda b: b.processing_status == "ended")
        assert (
            b.request_counts.canceled == 3
            and b.cancel_initiated_at
            and {r.result.type for r in c.messages.batches.results(b.id)} == {"canceled"}
        )
        with pytest.raises(anthropic.NotFoundError):
            c.messages.batches.retrieve("msgbatch_none")


def test_openai_batches():
    with LLMServer(models=("m", "n"), faults=Faults(batch_latency_s=0.3)) as s:
        c = gpt(s)
        f = c.files.create(file=("in.jsonl", b"{}"), purpose="batch")
        assert (
            (f.bytes, f.purpose) == (2, "batch")
            and c.files.retrieve(f.id).id == f.id
            and c.files.content(f.id).content == b"{}"
        )
        with pytest.raises(openai.BadRequestError):
            c.files.create(file=("in.txt", b"{}"), purpose="batch")
        rows, seen = [*lines(5), dict(lines(1, foo=1)[0], custom_id="bad")], []
        b = ended(
            c.batches.retrieve,
            openai_submit(c, rows).id,
            lambda b: seen.append(b.status) or b.status == "completed",
        )
        states = ["validating", "in_progress", "finalizing", "completed"]
        assert seen == sorted(seen, key=states.index) and "in_progress" in seen
        assert (
            (b.request_counts.completed, b.request_counts.failed, b.request_counts.total) == (5, 1, 6)
            and b.metadata == dict(run="1")
            and b.usage.output_tokens == 10
        )
        s.faults.batch_latency_s = 0.05
        b, got = openai_batch(s, c, rows)
        assert [got[f"i{i}"]["response"]["body"]["choices"][0]["message"]["content"] for i in range(5)] == [
            f"echo: q{i}" for i in range(5)
        ]
        assert (
            got["bad"]["response"]["status_code"] == 400
            and got["bad"]["response"]["body"]["error"]["code"] == "unknown_parameter"
            and got["bad"]["error"] is None
        )
        for wrong, code in (
            (lines(1) + lines(1), "duplicate_custom_id"),
            (lines(1) + [dict(lines(1, model="n")[0], custom_id="x")], "mismatched_model"),
            ([], "empty_file"),
            (["x"], "missing_required_parameter"),
            (lines(1, model="o"), "model_not_found"),
        ):
            b, _ = openai_batch(s, c, wrong)
            assert b.status == "failed" and b.errors.data[0].code == code and b.output_file_id is None
        s.faults.batch_latency_s = 9.0
        b = openai_submit(c, lines(3))
        assert c.batches.cancel(b.id).status == "cancelling"
        b = ended(c.batches.retrieve, b.id, lambda b: b.status == "cancelled")
        assert {
            json.loads(line)["error"]["code"]
            for line in c.files.content(b.error_file_id).content.splitlines()
        } == {"batch_cancelled"}


def test_lists():
    with LLMServer() as s:
        claude, gpt = both(s)
        a, o = (
            [claude.messages.batches.create(requests=items(1)).id for _ in range(5)][::-1],
            [openai_submit(gpt, lines(1)).id for _ in range(5)][::-1],
        )
        assert [b.id for b in claude.messages.batches.list(limit=2)] == a and [
            b.id for b in gpt.batches.list(limit=2)
        ] == o  # the SDKs turn the pages
        page = claude.messages.batches.list(limit=2, after_id=a[0])
        assert ([b.id for b in page.data], page.has_more, page.first_id, page.last_id) == (
            a[1:3],
            True,
            a[1],
            a[2],
        )
        page = claude.messages.batches.list(limit=2, before_id=a[2])
        assert [b.id for b in page.data] == a[:2] and not page.has_more
        page = gpt.batches.list(limit=2, after=o[2])
        assert [b.id for b in page.data] == o[3:] and not page.has_more


@pytest.mark.parametrize(
    "client,batch,rows",
    [(claude, anthropic_batch, items), (gpt, openai_batch, lines)],
    ids=["anthropic", "openai"],
)
def test_batch_faults(client, batch, rows):
    def kinds(got):
        return Counter(
            (r.error.error.type if r.type == "errored" else r.type)
            if client is claude
            else (r["error"] or {}).get("code") or r["response"]["status_code"]
            for r in got.values()
        )

    ok, error, expired, invalid = (
        ("succeeded", "api_error", "expired", "invalid_request_error")
        if client is claude
        else (200, 500, "batch_expired", 400)
    )
    f = dict(batch_latency_s=0.02)
    with LLMServer(
        faults=Faults(p_batch_item_error=0.3, p_batch_item_expired=0.3, **f)
    ) as s:  # the first try only
        b, got = batch(s, client(s), rows(50))
        assert (
            set(kinds(got)) == {ok, error, expired}
            and sum(s.served.values()) == kinds(got)[ok]
            and (client is claude or b.status == "expired")
        )
        assert kinds(batch(s, client(s), rows(50))[1]) == {ok: 50}
    with LLMServer(faults=Faults(p_batch_item_invalid=0.3, **f)) as s:
        first, second = [batch(s, client(s), rows(50))[1] for _ in range(2)]
        assert kinds(first) == kinds(second) and kinds(first)[invalid] > 3
        assert kinds(batch(s, client(s), rows(1, messages=user("<<invalid>>")))[1]) == {invalid: 1}
    with LLMServer(faults=Faults(expire_batches=1, expired_share=0.8, **f)) as s:
        assert [kinds(batch(s, client(s), rows(10))[1]) for _ in range(2)] == [
            {ok: 2, expired: 8},
            {ok: 10},
        ] and sum(s.served.values()) == 12
    with LLMServer(faults=Faults(drop_submit_after=1, **f)) as s:
        with pytest.raises(SDK[client].APIConnectionError):
            batch(s, client(s), rows(2))
        time.sleep(0.03)
        assert (
            len(s.batches) == 1 and sum(s.served.values()) == 2
        )  # made, worked on and billed, though nobody was told
        assert kinds(batch(s, client(s), rows(2))[1]) == {ok: 2} and set(s.served.values()) == {2}
    with LLMServer(faults=Faults(drop_results_after_n_lines=3, **f)) as s:
        with pytest.raises(Exception, match="peer closed|Connection error"):
            batch(s, client(s), rows(9))
        b = next(iter(s.batches.values()))
        n = (
            len(list(client(s).messages.batches.results(b.id)))
            if client is claude
            else len(client(s).files.content(b.output_file).content.splitlines())
        )
        assert n == 9 and s.status_counts["drop_results"] == 1
    with LLMServer(faults=Faults(p_batch_malformed_line=0.3, **f)) as s:
        with pytest.raises(json.JSONDecodeError):
            batch(s, client(s), rows(20))
        assert sum(s.served.values()) == 20 and 0 < sum(s.spoiled.values()) < 20
        assert kinds(batch(s, client(s), rows(20))[1]) == {ok: 20}
    if client is gpt:
        with LLMServer(faults=Faults(fail_batches=1, **f)) as s:
            b, _ = batch(s, client(s), rows(2))
            assert b.status == "failed" and b.errors.data[0].code == "token_limit_exceeded" and not s.served
            assert kinds(batch(s, client(s), rows(2))[1]) == {ok: 2}


def test_own_mistakes():
    "An answer that raises is a 500 for the client and a note in `errors`; odd bodies do not stop the server"

    def answer(q):
        raise KeyError(q["prompt"])

    with LLMServer(answer) as s:
        claude, gpt = both(s)
        with pytest.raises(anthropic.InternalServerError):
            tell(claude)
        with pytest.raises(openai.InternalServerError):
            tell(gpt, response_format=[1])
        _, got = anthropic_batch(
            s,
            claude,
            items(1)
            + [dict(custom_id="odd", params=dict(model=[], max_tokens=1, messages=[1], output_config=3))],
        )
        assert (
            got["i0"].error.error.type == "api_error"
            and got["odd"].type == "errored"
            and not s.served
            and len(s.errors) >= 3
        )


def test_line_separators():
    "Replies may hold U+2028 and the like, which str.splitlines() takes for the end of a line"
    with LLMServer(lambda q: "a\u2028b\x85c") as s:
        assert anthropic_batch(s, claude(s), items(1))[1]["i0"].message.content[0].text == "a\u2028b\x85c"
        assert (
            openai_batch(s, gpt(s), lines(1))[1]["i0"]["response"]["body"]["choices"][0]["message"]["content"]
            == "a\u2028b\x85c"
        )


def test_process(tmp_path):
    "As a child: faults from a file, a log, silent when its clients are killed, and gone with its parent"
    (tmp_path / "f.json").write_text(json.dumps(dict(script=["429"], latency_s=0.3)))
    p = subprocess.Popen(
        [
            sys.executable,
            llm_server.__file__,
            "--faults",
            tmp_path / "f.json",
            "--log",
            tmp_path / "log.jsonl",
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        url = f"http://127.0.0.1:{int(p.stdout.readline())}"
        body = json.dumps(dict(model="m", max_tokens=5, messages=user("hi")))
        headers = {"x-api-key": "test-key", "anthropic-version": "x"}
        request = f"{url + '/v1/messages'!r}, {body.encode()!r}, {headers!r}"
        script = f"import urllib.request as u; u.urlopen(u.Request({request}))"
        killed = [
            subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.DEVNULL) for _ in range(2)
        ]  # the first meets the 429

        def stats():
            return json.load(urllib.request.urlopen(url + "/_stats"))

        while not stats()["served"] and any(k.poll() is None for k in killed):
            time.sleep(0.01)
        for k in killed:
            k.send_signal(signal.SIGKILL)
            k.wait()
        c = anthropic.Anthropic(base_url=url, api_key="test-key")
        assert text(tell(c, max_tokens=5)) == "echo: hi" and list(stats()["served"].values()) == [2]
    finally:
        p.kill()
    log = (tmp_path / "log.jsonl").read_text().splitlines()
    statuses = [json.loads(line)["status"] for line in log if "messages" in line]
    assert p.communicate()[1] == "" and statuses.count(429) == 1

"""A loopback server for Anthropic Messages and OpenAI chat completions, with faults on demand.

`with LLMServer() as s:` gives `s.url` (for `anthropic.Anthropic(base_url=…)`) and `s.openai_url`
(for `openai.OpenAI(base_url=…)`).
As a process of its own, `python tests/llm_server.py --faults faults.json --log log.jsonl` prints its port,
and tells its books at `GET /_stats`.
A reply is billed, that is counted in `served`, once it has been worked out, whether or not the client ever
reads it.
Simplified: text only, one choice, no streaming, four characters a token, one account, nothing kept across
restarts."""

import argparse
import hashlib
import json
import os
import random
import re
import socket
import threading
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import parse_qsl, unquote, urlsplit


@dataclass
class Faults:
    "What goes wrong, and how often. Probabilities are per request or, where named so, per item of a batch"

    p_429: float = 0.0  # rate limit, with a `retry-after` header (half of them with `retry-after-ms` too)
    p_500: float = 0.0  # internal error
    p_529: float = 0.0  # overloaded: 529 from Anthropic, 503 from OpenAI
    p_drop_before: float = 0.0  # connection closed, nothing was done
    p_drop_after: float = 0.0  # connection closed, the work was done and billed
    p_slow: float = 0.0  # the (billed) reply comes `slow_s` late
    p_truncated_body: float = 0.0  # the connection closes before Content-Length bytes are sent; billed
    p_malformed: float = 0.0  # status 200 and broken JSON; billed
    retry_after: float = 0.05  # seconds in the header of a 429
    slow_s: float = 1.0  # seconds
    latency_s: float = 0.0  # seconds that every completion takes
    max_faults_per_request: int = 3  # of the probabilities above, per fingerprint (or method, path and body)
    # names without "p_" for the first authorised requests; also "ok", "quota" (429 for good), "502",
    # "504" (billed), "html", "hollow"
    script: list = field(default_factory=list)
    rpm: float = 0.0  # requests a minute, a token bucket; 0: no limit
    tpm: float = 0.0  # tokens a minute (estimated input + max_tokens); 0: no limit
    window_s: float = 60.0  # seconds of allowance that the buckets hold
    honour_idempotency: bool = True  # a repeated `Idempotency-Key` gets the first reply again, free of charge
    invalid_marker: str = "<<invalid>>"  # prompts with it are refused with 400, in batches too
    batch_latency_s: float = 0.1  # seconds until a batch ends
    cancel_s: float = 0.05  # seconds from "cancelling" to cancelled
    p_batch_item_error: float = 0.0  # retriable api_error, only on an item's first try
    p_batch_item_expired: float = 0.0  # only on an item's first try
    p_batch_item_invalid: float = 0.0  # share of fingerprints that batches always refuse
    p_batch_malformed_line: float = (
        0.0  # billed, its line in the results is broken JSON; only on an item's first try
    )
    expire_batches: int = 0  # the first batches whose unfinished items all expire
    expired_share: float = 0.5  # share of items (the last ones) that such a batch leaves unfinished
    fail_batches: int = 0  # the first OpenAI batches that end "failed": too many tokens enqueued
    results_shuffled: bool = True
    drop_results_after_n_lines: int | None = (
        None  # the first download of each batch's results breaks off in the middle of a line
    )
    drop_submit_after: int = 0  # the first submissions of batches whose reply is lost


PROBABLE = ("429", "500", "529", "drop_before", "drop_after", "slow", "truncated_body", "malformed")
NONSENSE = dict(
    html=(b"<html>Please log in</html>", "text/html"), hollow=(b"{}", "application/json")
)  # status 200; billed
ANTHROPIC_FIELDS = set(
    [
        "model",
        "messages",
        "max_tokens",
        "system",
        "temperature",
        "top_p",
        "top_k",
        "stop_sequences",
        "stream",
        "metadata",
        "output_config",
        "service_tier",
        "thinking",
        "tools",
        "tool_choice",
        "cache_control",
        "container",
        "diagnostics",
        "inference_geo",
        "speed",
    ]
)
OPENAI_FIELDS = set(
    [
        "model",
        "messages",
        "max_tokens",
        "max_completion_tokens",
        "temperature",
        "top_p",
        "n",
        "seed",
        "stop",
        "stream",
        "stream_options",
        "response_format",
        "metadata",
        "store",
        "user",
        "service_tier",
        "reasoning_effort",
        "verbosity",
        "frequency_penalty",
        "presence_penalty",
        "logit_bias",
        "logprobs",
        "top_logprobs",
        "modalities",
        "tools",
        "tool_choice",
        "parallel_tool_calls",
        "prediction",
        "audio",
        "prompt_cache_key",
        "prompt_cache_options",
        "prompt_cache_retention",
        "safety_identifier",
        "web_search_options",
        "functions",
        "function_call",
        "moderation",
    ]
)
SAMPLING = (
    "temperature",
    "top_p",
    "top_k",
    "seed",
    "stop",
    "stop_sequences",
    "frequency_penalty",
    "presence_penalty",
    "reasoning_effort",
    "thinking",
)
ERRORS = {  # status → Anthropic's type, OpenAI's type
    400: ("invalid_request_error", "invalid_request_error"),
    401: ("authentication_error", "invalid_request_error"),
    404: ("not_found_error", "invalid_request_error"),
    413: ("request_too_large", "invalid_request_error"),
    429: ("rate_limit_error", "requests"),
    500: ("api_error", "server_error"),
    502: ("api_error", "server_error"),
    504: ("api_error", "server_error"),
    503: ("overloaded_error", "service_unavailable_error"),
    529: ("overloaded_error", "service_unavailable_error"),
}
ID = r"[a-zA-Z0-9_-]{1,64}"
EXPIRED = dict(
    code="batch_expired", message="This request could not be executed before the completion window expired."
)
CANCELLED = dict(
    code="batch_cancelled", message="This request was not executed because the batch was cancelled."
)


class ApiError(Exception):
    "A refusal, in either service's words"

    def __init__(self, status, message, code=None, param=None, kind=None, **headers):
        super().__init__(message)
        self.status, self.message, self.code, self.param, self.kind, self.headers = (
            status,
            message,
            code,
            param,
            kind,
            headers,
        )

    def body(self, api, request_id):
        kinds = ERRORS.get(self.status, ERRORS[400])
        if api == "anthropic":
            return dict(type="error", error=dict(type=kinds[0], message=self.message), request_id=request_id)
        return dict(
            error=dict(message=self.message, type=self.kind or kinds[1], param=self.param, code=self.code)
        )


def need(ok, message, code=None, param=None, status=400):
    "Refuses unless ok"
    if not ok:
        raise ApiError(status, message, code, param)


def n_tokens(text):
    return max(1, -(-len(text) // 4))


def new_id(prefix):
    return prefix + os.urandom(12).hex()


def digest(*parts):
    return hashlib.sha256(b"\0".join(p if isinstance(p, bytes) else p.encode() for p in parts)).hexdigest()


def rfc3339(t):
    return t and datetime.fromtimestamp(t, UTC).isoformat().replace("+00:00", "Z")


def dumps(x):
    return json.dumps(x, ensure_ascii=False).encode(errors="replace")


def fingerprint(model, system, prompt, **sampling):
    """Names a question: the same one has the same name, sent alone or in a batch.

    Sampling: temperature, max_tokens, schema, …; None counts as absent."""
    given = {k: v for k, v in sampling.items() if v is not None}
    return digest(json.dumps([model, system, prompt, given], sort_keys=True))


def example(schema):
    "A small instance of a JSON schema"
    for k in ("const", "default"):
        if k in schema:
            return schema[k]
    if "enum" in schema:
        return schema["enum"][0]
    for k in ("anyOf", "oneOf"):
        if k in schema:
            return example(schema[k][0])
    kind = schema.get("type", "object")
    kind = kind[0] if isinstance(kind, list) else kind
    if kind == "object":
        return {k: example(v) for k, v in schema.get("properties", {}).items()}
    if kind == "array":
        return [example(schema.get("items", {}))] * schema.get("minItems", 1)
    return dict(string="text", integer=1, number=0.5, boolean=True).get(kind)


def echo(q):
    "The answer of a model without opinions: the prompt, or an example of the schema"
    return json.dumps(example(q["schema"])) if q["schema"] else f"echo: {q['prompt']}"


def text_of(content):
    "The text of a string or of a list of text blocks"
    if isinstance(content, str):
        need(
            content.encode(errors="ignore").decode() == content,
            "The request body is not valid JSON: no low surrogate in string",
        )
        return content
    need(
        isinstance(content, list) and all(isinstance(b, dict) and b.get("type") == "text" for b in content),
        "messages: content must be a string or text blocks",
    )
    return text_of("".join(b.get("text", "") for b in content))


def check_schema(schema, strict):
    "What both services ask of every object in a schema: closed; OpenAI's strict mode also: nothing optional"
    for s in [schema, *schema.get("$defs", {}).values()] if isinstance(schema, dict) else []:
        if s.get("type") == "object" or "properties" in s:
            wrong = "invalid_json_schema", "response_format"
            need(
                s.get("additionalProperties") is False,
                "Invalid schema: for 'object' type, 'additionalProperties' must be supplied and be false",
                *wrong,
            )
            need(
                not strict or set(s.get("required", [])) == set(s.get("properties", {})),
                "Invalid schema: 'required' must list every key in properties",
                *wrong,
            )
        for sub in [
            *s.get("properties", {}).values(),
            *s.get("anyOf", []),
            *([s["items"]] if "items" in s else []),
        ]:
            check_schema(sub, strict)


class Bucket:
    "A token bucket: `per_minute` flows in, up to `window_s` worth of it; what does not fit has to wait"

    def __init__(self, per_minute, window_s):
        self.rate, self.at = per_minute / 60, time.monotonic()
        self.level = self.size = max(1, self.rate * window_s)

    def wait(self, n):
        "Seconds until `n` (or a full bucket) are there; 0: now"
        now = time.monotonic()
        self.level, self.at = min(self.size, self.level + (now - self.at) * self.rate), now
        return max(0, min(n, self.size) - self.level) / self.rate


@dataclass
class Reply:
    "What goes onto the wire; `fault` names why the client will not get it, `cut` says after how many bytes"

    body: bytes
    type: str = "application/json"
    status: int = 200
    headers: dict = field(default_factory=dict)
    fp: str | None = None
    fault: str | None = None
    cut: int | None = None


@dataclass
class Batch:
    """A batch of either service.

    Items are (custom_id, body), outcomes (custom_id, fingerprint, kind, what), results the lines of
    Anthropic's results."""

    id: str
    api: str
    items: list
    created: float
    span: float
    ends: float
    worked: float = 1.0  # worked: share of the items that it gets to
    input_file: str = ""
    endpoint: str = ""
    metadata: dict | None = None
    errors: list = field(default_factory=list)
    cancelled: float | None = None
    outcomes: list | None = None
    results: bytes = b""
    output_file: str | None = None
    error_file: str | None = None

    def counts(self):
        return Counter(kind for _, _, kind, _ in self.outcomes or [])

    def finished(self, now):
        "How many items have been worked on by then: they take equal times"
        return int(len(self.items) * min(self.worked, (now - self.created) / max(1e-9, self.span)) + 1e-6)


class LLMServer:
    "Serves both services at one port, in threads of this process; a context manager"

    def __init__(
        self,
        answer=echo,
        faults=None,
        key="test-key",
        models=None,
        seed=0,
        port=0,
        no_temperature=(),
        cache_min_tokens=1024,
        log=None,
        only_max_tokens=False,
    ):
        self.answer, self.faults, self.key, self.models, self.no_temperature = (
            answer,
            faults or Faults(),
            key,
            models,
            set(no_temperature),
        )
        # as servers that have not heard of max_completion_tokens, and ignore it
        self.only_max_tokens = only_max_tokens
        self.rng, self.lock, self.cache_min_tokens = random.Random(seed), threading.RLock(), cache_min_tokens
        self.limits = dict(
            anthropic=(100_000, 256_000_000), openai=(50_000, 200_000_000)
        )  # items and bytes of a batch
        self.script, self.log, self.log_file = (
            list(self.faults.script),
            [],
            log and open(log, "a", buffering=1),  # noqa: SIM115 (closed with the server)
        )
        self.received, self.violations, self.uncounted = 0, 0, False  # violations: refused for rpm or tpm
        self.status_counts = Counter()  # numbers, or the fault's name where no good reply got through
        self._served, self.spoiled = (
            Counter(),
            Counter(),
        )  # per fingerprint: billed; billed and then lost or garbled by a fault
        self.batches, self.files, self.errors = {}, {}, []  # errors: what `answer` (or this server) raised
        self.faulted, self.tries, self.cached, self.idempotent, self.broken = (
            Counter(),
            Counter(),
            set(),
            {},
            set(),
        )
        self.submits = self.failures = self.expired = 0
        self.buckets = [
            Bucket(self.faults.rpm or 1e12, self.faults.window_s),
            Bucket(self.faults.tpm or 1e12, self.faults.window_s),
        ]
        self.http = Server(("127.0.0.1", port), Handler)
        self.http.app = self
        self.port = self.http.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.openai_url = self.url + "/v1"
        threading.Thread(target=self.http.serve_forever, kwargs=dict(poll_interval=0.02), daemon=True).start()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def close(self):
        "Stops listening and cuts the connections"
        self.http.shutdown()
        self.http.server_close()
        for c in list(self.http.open):
            with suppress(OSError):
                c.shutdown(socket.SHUT_RDWR)
        if self.log_file:
            self.log_file.close()

    @property
    def served(self):
        "Fingerprint → how often a reply was worked out and billed"
        self.advance()
        with self.lock:
            return Counter(self._served)

    def stats(self):
        served = self.served
        with self.lock:
            return dict(
                served=served,
                spoiled=self.spoiled,
                received=self.received,
                violations=self.violations,
                errors=self.errors,
                status_counts=self.status_counts,
                batches={
                    b.id: dict(api=b.api, items=len(b.items), counts=b.counts())
                    for b in self.batches.values()
                },
            )

    def refusal(self, e):
        "What the client hears of an exception; the ones that are nobody's refusal are kept in `errors`"
        if isinstance(e, ApiError):
            return e
        self.errors.append(repr(e))
        return ApiError(500, "Internal server error")

    def note(self, **kw):
        if self.log_file:
            self.log_file.write(json.dumps(kw) + "\n")

    # One completion, the same alone and in a batch
    def check(self, api, body, model):
        "Refuses the parameters that the service refuses; gives max_tokens, temperature and schema"
        anthropic, old, top = (
            api == "anthropic",
            model not in self.no_temperature,
            1 if api == "anthropic" else 2,
        )
        t, n, schema = body.get("temperature"), body.get("max_tokens"), None
        if not self.only_max_tokens:
            n = body.get("max_completion_tokens", n)
        need(not body.get("stream") and body.get("n") in (None, 1), "stream, n: not imitated here")
        need(
            n is None or type(n) is int and n > 0,
            "max_tokens: must be a whole number of at least 1",
            param="max_tokens",
        )
        need(
            t is None or isinstance(t, (int, float)) and 0 <= t <= top,
            f"temperature: must be in 0..{top}",
            param="temperature",
        )
        need(
            old or t is None or (t == 1 and not anthropic),
            f"`temperature` is not supported by {model}"
            if anthropic
            else f"Unsupported value: 'temperature' does not support {t} with this model. "
            "Only the default (1) value is supported.",
            "unsupported_value",
            "temperature",
        )
        need(
            anthropic or old or "max_tokens" not in body,
            "Unsupported parameter: 'max_tokens' is not supported with this model. "
            "Use 'max_completion_tokens' instead.",
            "unsupported_parameter",
            "max_tokens",
        )
        f = (body.get("output_config") or {}).get("format") if anthropic else body.get("response_format")
        if f and anthropic:
            need(
                f.get("type") == "json_schema" and isinstance(f.get("schema"), dict),
                "output_config.format: type json_schema and a schema are required",
            )
            check_schema(schema := f["schema"], False)
        elif f and f.get("type") == "json_schema":
            j = f.get("json_schema") or {}
            need(
                re.fullmatch(ID, str(j.get("name", ""))),
                "Missing or invalid 'response_format.json_schema.name'.",
                param="response_format",
            )
            check_schema(schema := j.get("schema") or {}, j.get("strict"))
        return n, t, schema

    def question(self, api, body):
        "What is asked, after the checks that the service makes"
        need(isinstance(body, dict), "The body must be a JSON object")
        anthropic = api == "anthropic"
        for k in body.keys() - (ANTHROPIC_FIELDS if anthropic else OPENAI_FIELDS):
            need(
                False,
                f"{k}: Extra inputs are not permitted" if anthropic else f"Unknown parameter: '{k}'.",
                "unknown_parameter",
                k,
            )
        for k in ("model", "messages", "max_tokens") if anthropic else ("model", "messages"):
            need(
                k in body,
                f"{k}: Field required" if anthropic else f"Missing required parameter: '{k}'.",
                "missing_required_parameter",
                k,
            )
        model, messages = body["model"], body["messages"]
        need(
            self.models is None or model in self.models,
            f"model: {model}"
            if anthropic
            else f"The model `{model}` does not exist or you do not have access to it.",
            "model_not_found",
            status=404,
        )
        roles = ("user", "assistant") if anthropic else ("system", "developer", "user", "assistant")
        need(
            isinstance(messages, list)
            and messages
            and all(isinstance(m, dict) and m.get("role") in roles for m in messages),
            f"messages: a list of messages with roles {', '.join(roles)} is required",
            param="messages",
        )
        max_tokens, temperature, schema = self.check(api, body, model)
        told = [(m["role"], text_of(m.get("content"))) for m in messages]
        system = (
            text_of(body.get("system") or "")
            if anthropic
            else "\n".join(t for r, t in told if r in ("system", "developer"))
        )
        turns = [(r, t) for r, t in told if r in ("user", "assistant")]
        prompt = turns[0][1] if len(turns) == 1 else "\n\n".join(f"{r}: {t}" for r, t in turns)
        need(
            self.faults.invalid_marker not in prompt,
            "messages: this prompt is refused",
            "invalid_prompt",
            "messages",
        )
        sampling = {k: body.get(k) for k in SAMPLING} | dict(max_tokens=max_tokens, schema=schema)
        marked = (
            not anthropic
            or "cache_control" in body
            or any("cache_control" in b for b in body.get("system") or [] if isinstance(b, dict))
        )
        return dict(
            model=model,
            system=system,
            prompt=prompt,
            temperature=temperature,
            max_tokens=max_tokens,
            schema=schema,
            api=api,
            fingerprint=fingerprint(model, system, prompt, **sampling),
            marked=marked,
        )

    def complete(self, q, batch=False):
        "Works out one reply, bills it, and gives it in the service's format; an answer may bring its `usage`"
        a = self.answer(q)
        a = dict(text=a) if isinstance(a, str) else dict(a)
        reply = self.formatted(q, a, batch)
        if "usage" in a:
            self.uncounted = True
        if a.get("usage") == "absent":
            del reply["usage"]
        elif "usage" in a:
            reply["usage"] = a["usage"]
        return reply

    def formatted(self, q, a, batch):
        text, limit = a.get("text", ""), q["max_tokens"]
        finish = a.get("finish") or ("length" if limit and n_tokens(text) > limit else "stop")
        if finish == "length" and limit:
            text = text[: 4 * limit]
        n_in, n_out = (
            a.get("input_tokens", n_tokens(q["system"] + q["prompt"])),
            a.get("output_tokens", n_tokens(text)),
        )
        with self.lock:
            self._served[q["fingerprint"]] += 1
            prefix, n_prefix = (q["model"], q["system"]), min(n_in, n_tokens(q["system"]))
            eligible = q["marked"] and n_prefix >= self.cache_min_tokens
            read = a.get("cached", n_prefix if eligible and prefix in self.cached else 0)
            write = n_prefix if eligible and prefix not in self.cached and "cached" not in a else 0
            if eligible:
                self.cached.add(prefix)
        if q["api"] == "anthropic":
            stop = dict(stop="end_turn", length="max_tokens").get(finish, finish)
            return dict(
                id=new_id("msg_"),
                type="message",
                role="assistant",
                model=q["model"],
                content=[dict(type="text", text=text)] if text else [],
                stop_reason=stop,
                stop_sequence=None,
                stop_details=dict(type="refusal", category=None, explanation=None)
                if stop == "refusal"
                else None,
                usage=dict(
                    input_tokens=n_in - read - write,
                    cache_creation_input_tokens=write,
                    cache_read_input_tokens=read,
                    output_tokens=n_out,
                    cache_creation=dict(ephemeral_5m_input_tokens=write, ephemeral_1h_input_tokens=0),
                    service_tier="batch" if batch else "standard",
                ),
            )
        refused = finish == "refusal"
        return dict(
            id=new_id("chatcmpl-"),
            object="chat.completion",
            created=int(time.time()),
            model=q["model"],
            service_tier="default",
            system_fingerprint=None,
            choices=[
                dict(
                    index=0,
                    message=dict(
                        role="assistant",
                        content=None if refused else text,
                        refusal=text if refused else None,
                        annotations=[],
                    ),
                    logprobs=None,
                    finish_reason="stop" if refused else finish,
                )
            ],
            usage=dict(
                prompt_tokens=n_in,
                completion_tokens=n_out,
                total_tokens=n_in + n_out,
                prompt_tokens_details=dict(cached_tokens=read, cache_write_tokens=write, audio_tokens=0),
                completion_tokens_details=dict(
                    reasoning_tokens=0,
                    audio_tokens=0,
                    accepted_prediction_tokens=0,
                    rejected_prediction_tokens=0,
                ),
            ),
        )

    def limit(self, q):
        "Refuses what exceeds the requests or tokens a minute"
        with self.lock:
            needs = 1, n_tokens(q["system"] + q["prompt"]) + (q["max_tokens"] or 0)
            waits = [b.wait(n) for b, n in zip(self.buckets, needs)]
            if not any(waits):
                for b, n in zip(self.buckets, needs):
                    b.level -= n
                return
            self.violations += 1
        raise ApiError(
            429,
            "This request would exceed the rate limit of your organization.",
            "rate_limit_exceeded",
            kind="tokens" if waits[1] else "requests",
            **{"retry-after": f"{max(waits):.3f}"},
        )

    # Batches: nothing runs in the background, their state follows from the clock whenever someone looks
    def submit(self, api, items, **kw):
        now, f = time.time(), self.faults
        b = Batch(
            new_id("msgbatch_" if api == "anthropic" else "batch_"),
            api,
            items,
            now,
            f.batch_latency_s,
            now + f.batch_latency_s,
            **kw,
        )
        if b.errors:
            b.ends = now + 0.1 * b.span
        elif self.expired < f.expire_batches:
            self.expired, b.worked = self.expired + 1, 1 - f.expired_share
        self.batches[b.id] = b
        return b

    def advance(self):
        "Ends the batches that are due"
        with self.lock:
            now = time.time()
            for b in self.batches.values():
                if b.outcomes is None and now >= b.ends:
                    self.end(b)

    def end(self, b):
        "Works on the items that a batch got to; the others were cancelled, or expired"
        done = 0 if b.errors else b.finished(b.cancelled) if b.cancelled else round(len(b.items) * b.worked)
        b.outcomes = [
            self.outcome(b.api, *item)
            if i < done
            else (item[0], None, "canceled" if b.cancelled else "expired", None)
            for i, item in enumerate([] if b.errors else b.items)
        ]
        if self.faults.results_shuffled:
            self.rng.shuffle(b.outcomes)
        self.note(
            time=time.time(), batch=b.id, billed=[fp for _, fp, kind, _ in b.outcomes if kind == "succeeded"]
        )
        if b.api == "anthropic":
            b.results = b"".join(self.anthropic_line(o) for o in b.outcomes)
        else:
            out = [self.openai_line(o) for o in b.outcomes if o[2] == "succeeded"]
            bad = [self.openai_line(o) for o in b.outcomes if o[2] != "succeeded"]
            if out:
                b.output_file = self.store(b"".join(out), b.id + "_output.jsonl", "batch_output")["id"]
            if bad:
                b.error_file = self.store(b"".join(bad), b.id + "_error.jsonl", "batch_output")["id"]

    def outcome(self, api, custom_id, body):
        "What became of an item: (custom_id, fingerprint, kind, what); faults strike its first try only"
        f, fp = self.faults, None
        try:
            q = self.question(api, body)
            fp, u = q["fingerprint"], self.rng.random()
            self.tries[fp] += 1
            first = self.tries[fp] == 1
            need(
                int(fp[:8], 16) / 2**32 >= f.p_batch_item_invalid,
                "messages: this prompt is refused",
                "invalid_prompt",
                "messages",
            )
            if first and u < f.p_batch_item_error:
                raise ApiError(500, "Internal server error")
            if first and u < f.p_batch_item_error + f.p_batch_item_expired:
                return custom_id, fp, "expired", None
            reply = self.complete(q, batch=True)
            if not (first and self.rng.random() < f.p_batch_malformed_line):
                return custom_id, fp, "succeeded", reply
            self.spoiled[fp] += 1
            return custom_id, fp, "succeeded", None
        except Exception as e:
            return custom_id, fp, "errored", self.refusal(e)

    def anthropic_line(self, o):
        "A line of Anthropic's results; a success without a reply is one that got garbled"
        cid, _, kind, what = o
        if kind == "succeeded" and what is None:
            return dumps(dict(custom_id=cid, result=dict(type="succeeded")))[:-9] + b"\n"
        result = dict(type=kind) | (
            dict(message=what)
            if kind == "succeeded"
            else dict(error=what.body("anthropic", new_id("req_")))
            if kind == "errored"
            else {}
        )
        return dumps(dict(custom_id=cid, result=result)) + b"\n"

    def openai_line(self, o):
        "A line of OpenAI's output file or, if not succeeded, of its error file"
        cid, _, kind, what = o
        line = dict(id=new_id("batch_req_"), custom_id=cid, response=None, error=None)
        if kind in ("expired", "canceled"):
            line["error"] = EXPIRED if kind == "expired" else CANCELLED
        elif kind == "errored":
            line["response"] = dict(
                status_code=what.status, request_id=new_id("req_"), body=what.body("openai", "")
            )
        else:
            line["response"] = dict(status_code=200, request_id=new_id("req_"), body=what)
        return dumps(line)[: -9 if kind == "succeeded" and what is None else None] + b"\n"

    def show(self, b):
        "The batch object, as its service shows it"
        now, n, c, ended = time.time(), len(b.items), b.counts(), b.outcomes is not None
        if b.api == "anthropic":
            counts = {k: c[k] for k in ("succeeded", "errored", "canceled", "expired")} | dict(
                processing=0 if ended else n
            )
            return dict(
                id=b.id,
                type="message_batch",
                processing_status="ended" if ended else "canceling" if b.cancelled else "in_progress",
                request_counts=counts,
                created_at=rfc3339(b.created),
                expires_at=rfc3339(b.created + 86400),
                ended_at=rfc3339(b.ends) if ended else None,
                archived_at=None,
                cancel_initiated_at=rfc3339(b.cancelled),
                results_url=f"{self.url}/v1/messages/batches/{b.id}/results" if ended else None,
            )
        starts, finalizes, at = (
            b.created + 0.1 * b.span,
            b.created + 0.9 * b.span,
            lambda t, on=True: int(t) if on else None,
        )
        status = (
            (
                "failed"
                if b.errors
                else "cancelled"
                if b.cancelled
                else "expired"
                if c["expired"]
                else "completed"
            )
            if ended
            else "cancelling"
            if b.cancelled
            else "validating"
            if now < starts or b.errors
            else "in_progress"
            if now < finalizes
            else "finalizing"
        )
        done = c["succeeded"] if ended else b.finished(now)
        usage = [
            o[3]["usage"] for o in b.outcomes or [] if o[2] == "succeeded" and o[3] and not self.uncounted
        ]
        i, o = (sum(u[k] for u in usage) for k in ("prompt_tokens", "completion_tokens"))
        cached = sum(u["prompt_tokens_details"]["cached_tokens"] for u in usage)
        begun = status not in ("validating", "failed")
        return dict(
            id=b.id,
            object="batch",
            endpoint=b.endpoint,
            input_file_id=b.input_file,
            completion_window="24h",
            status=status,
            metadata=b.metadata,
            model=b.items[0][1].get("model") if b.items else None,
            errors=dict(object="list", data=b.errors) if status == "failed" else None,
            output_file_id=b.output_file,
            error_file_id=b.error_file,
            created_at=at(b.created),
            expires_at=at(b.created + 86400),
            in_progress_at=at(starts, begun),
            finalizing_at=at(finalizes, status in ("finalizing", "completed")),
            completed_at=at(b.ends, status == "completed"),
            failed_at=at(b.ends, status == "failed"),
            expired_at=at(b.ends, status == "expired"),
            cancelling_at=at(b.cancelled or 0, b.cancelled),
            cancelled_at=at(b.ends, status == "cancelled"),
            request_counts=dict(
                total=n if begun else 0,
                completed=done if begun else 0,
                failed=n - done if begun and ended else 0,
            ),
            usage=dict(
                input_tokens=i,
                input_tokens_details=dict(cached_tokens=cached),
                output_tokens=o,
                total_tokens=i + o,
                output_tokens_details=dict(reasoning_tokens=0),
            ),
        )

    def cancel(self, b):
        need(b.outcomes is None, f"Batch {b.id} has ended and cannot be cancelled.")
        if not b.cancelled:
            b.cancelled = time.time()
            b.ends = min(b.ends, b.cancelled + self.faults.cancel_s)
        return self.show(b)

    def page(self, c):
        "Batches, newest first, between cursors"
        with self.lock:
            ids = [b.id for b in reversed(self.batches.values()) if b.api == c.api]
        after, before, limit = (
            c.query.get("after_id" if c.api == "anthropic" else "after"),
            c.query.get("before_id"),
            c.query.get("limit", "20"),
        )
        need(
            limit.isdigit() and 1 <= int(limit) <= (1000 if c.api == "anthropic" else 100),
            "limit: out of range",
            param="limit",
        )
        need(
            all(x is None or x in ids for x in (after, before)), "No such batch to start from", param="after"
        )
        lo, hi = ids.index(after) + 1 if after else 0, ids.index(before) if before else len(ids)
        page = ids[max(lo, hi - int(limit)) : hi] if before else ids[lo:hi][: int(limit)]
        return dict(
            data=[self.show(self.batches[i]) for i in page],
            has_more=len(page) < hi - lo,
            first_id=page[0] if page else None,
            last_id=page[-1] if page else None,
        ) | ({} if c.api == "anthropic" else dict(object="list"))

    def anthropic_batch(self, body):
        "POST /v1/messages/batches: checks the envelope only; what is wrong with an item shows in its result"
        requests, most, seen = (
            body.get("requests") if isinstance(body, dict) else None,
            self.limits["anthropic"][0],
            set(),
        )
        need(
            isinstance(requests, list) and 1 <= len(requests) <= most,
            f"requests: a list of 1 to {most} requests is required",
        )
        for i, r in enumerate(requests):
            need(
                isinstance(r, dict) and set(r) == {"custom_id", "params"},
                f"requests.{i}: custom_id and params are required, and nothing else",
            )
            need(
                re.fullmatch(ID, str(r["custom_id"])),
                f"requests.{i}.custom_id: String should match pattern '^{ID}$'",
            )
            need(
                r["custom_id"] not in seen,
                f"requests.{i}.custom_id: must be unique in a batch: {r['custom_id']}",
            )
            seen.add(r["custom_id"])
        return self.submit("anthropic", [(r["custom_id"], r["params"]) for r in requests])

    def openai_items(self, content, endpoint):
        "The items of a batch's input file, and what is wrong with its lines"
        items, errors, seen = [], [], set()
        for n, text in enumerate(content.splitlines(), 1):

            def wrong(code, message):
                errors.append(dict(code=code, message=message, line=n, param=None))

            try:
                r = json.loads(text)
            except ValueError:
                wrong("invalid_json_line", "This line is not parseable as valid JSON.")
                continue
            if (
                not isinstance(r, dict)
                or not {"custom_id", "method", "url", "body"} <= set(r)
                or not isinstance(r["body"], dict)
            ):
                wrong("missing_required_parameter", "custom_id, method, url and body are required.")
                continue
            model = r["body"].get("model")
            if r["custom_id"] in seen:
                wrong(
                    "duplicate_custom_id",
                    f"The custom_id '{r['custom_id']}' is a duplicate of another request's.",
                )
            if (r["method"], r["url"]) != ("POST", endpoint):
                wrong("invalid_url", "The method or URL of this line does not match the batch's endpoint.")
            if items and model != items[0][1].get("model"):
                wrong("mismatched_model", "All requests of a batch must ask the same model.")
            if self.models is not None and model not in self.models:
                wrong("model_not_found", f"The provided model '{model}' is not supported by the Batch API.")
            seen.add(r["custom_id"])
            items.append((r["custom_id"], r["body"]))
        return items, errors

    def openai_batch(self, body):
        "POST /v1/batches: what is wrong with the file's lines makes the batch end `failed`"
        need(isinstance(body, dict), "The body must be a JSON object")
        required = "input_file_id", "endpoint", "completion_window"
        for k in required:
            need(k in body, f"Missing required parameter: '{k}'.", "missing_required_parameter", k)
        for k in body.keys() - {*required, "metadata", "output_expires_after"}:
            need(False, f"Unknown parameter: '{k}'.", "unknown_parameter", k)
        id, endpoint, window = (body[k] for k in required)
        need(
            (endpoint, window) == ("/v1/chat/completions", "24h"),
            "Only '/v1/chat/completions' in '24h' is imitated here",
        )
        meta, content = self.files.get(id, ({}, b""))
        need(meta.get("purpose") == "batch", f"Invalid input_file_id: {id}", param="input_file_id")
        items, errors = self.openai_items(content, endpoint)

        def wrong(code, message):
            errors.append(dict(code=code, message=message, line=None, param=None))

        if not content.strip():
            wrong("empty_file", "The input file is empty.")
        if len(items) > self.limits["openai"][0]:
            wrong("too_many_tasks", f"Too many requests. The maximum is {self.limits['openai'][0]}.")
        if not errors and self.failures < self.faults.fail_batches:
            self.failures += 1
            wrong(
                "token_limit_exceeded",
                "Enqueued token limit reached. "
                "Please try again once some in_progress batches have been completed.",
            )
        return self.submit(
            "openai", items, input_file=id, endpoint=endpoint, metadata=body.get("metadata"), errors=errors
        )

    def store(self, content, filename, purpose):
        "Keeps a file, gives its file object"
        meta = dict(
            id=new_id("file-"),
            object="file",
            bytes=len(content),
            created_at=int(time.time()),
            filename=filename,
            purpose=purpose,
            status="processed",
            expires_at=None,
            status_details=None,
        )
        self.files[meta["id"]] = meta, content
        return meta

    def upload(self, c):
        "POST /v1/files: the parts of the form"
        boundary = re.search(r'boundary="?([^";]+)', c.headers.get("content-type", ""))
        need(boundary, "Expected multipart/form-data with a boundary")
        parts = {}
        for part in c.body.split(b"--" + boundary[1].encode())[1:-1]:
            head, _, content = part.partition(b"\r\n\r\n")
            fields = dict(re.findall(r'(name|filename)="([^"]*)"', head.decode()))
            parts[fields.get("name")] = content.removesuffix(b"\r\n"), fields.get("filename")
        need({"file", "purpose"} <= set(parts), "'file' and 'purpose' are required", param="file")
        (content, name), purpose = parts["file"], parts["purpose"][0].decode()
        need(
            purpose == "batch" and (name or "").endswith(".jsonl"),
            "Invalid file format for Batch API. Must be .jsonl",
            param="file",
        )
        need(len(content) <= self.limits["openai"][1], "The file is too large.", status=413)
        return content, name, purpose

    def download(self, id, content, type):
        "The lines of a batch's results; the connection may break off in the middle of one, the first time"
        n, lines = self.faults.drop_results_after_n_lines, content.splitlines(keepends=True)
        if n is None or id in self.broken or n >= len(lines):
            return Reply(content, type)
        self.broken.add(id)
        return Reply(content, type, fault="drop_results", cut=sum(map(len, lines[:n])) + len(lines[n]) // 2)

    # One request
    def route(self, c):
        "What names this request to the faults, and what it asks for, after the checks that cost nothing"

        def load():
            try:
                return json.loads(c.body)
            except ValueError:
                raise ApiError(400, "The request body is not valid JSON") from None

        need(len(c.body) <= self.limits["anthropic"][1], "Request exceeds the maximum size", status=413)
        call, name = f"{c.method} {c.path}", digest(c.method, c.target, c.body)
        if call in ("POST /v1/messages", "POST /v1/chat/completions"):
            q = self.question(c.api, load())
            return q["fingerprint"], lambda: self.completion(q)
        if call == "POST /v1/files":
            content, filename, purpose = self.upload(c)
            return digest(content), lambda: Reply(dumps(self.store(content, filename, purpose)))
        base = "/v1/messages/batches" if c.api == "anthropic" else "/v1/batches"
        if call == "POST " + base:
            return name, lambda: self.submission(c.api, load())
        if call == "GET " + base:
            return name, lambda: Reply(dumps(self.page(c)))
        if call == "GET /v1/models":
            return name, lambda: Reply(dumps(self.list_models(c.api)))
        if (m := re.fullmatch(r"GET /v1/files/([^/]+)(/content)?", call)) and m[1] in self.files:
            meta, content = self.files[m[1]]
            return (
                name,
                lambda: (
                    self.download(m[1], content, "application/octet-stream") if m[2] else Reply(dumps(meta))
                ),
            )
        if (
            (m := re.fullmatch(rf"(GET|POST) {base}/([^/]+)(/cancel|/results)?", call))
            and (b := self.batches.get(m[2]))
            and b.api == c.api
        ):
            if (m[1], m[3]) == ("GET", None):
                return name, lambda: Reply(dumps(self.show(b)))
            if (m[1], m[3]) == ("POST", "/cancel"):
                return name, lambda: Reply(dumps(self.cancel(b)))
            if (m[1], m[3]) == ("GET", "/results") and b.api == "anthropic" and b.outcomes is not None:
                return name, lambda: self.download(b.id, b.results, "application/x-jsonl")
        raise ApiError(404, f"Not found: {call}", "not_found")

    def completion(self, q):
        self.limit(q)
        reply = Reply(dumps(self.complete(q)), fp=q["fingerprint"])
        time.sleep(self.faults.latency_s)
        return reply

    def submission(self, api, body):
        with self.lock:
            reply = Reply(
                dumps(
                    self.show(self.anthropic_batch(body) if api == "anthropic" else self.openai_batch(body))
                )
            )
            self.submits += 1
        if self.submits <= self.faults.drop_submit_after:
            reply.fault, reply.cut = "drop_submit", 0
        return reply

    def list_models(self, api):
        data = [
            dict(id=m, type="model", display_name=m, created_at="2025-01-01T00:00:00Z")
            if api == "anthropic"
            else dict(id=m, object="model", created=1735689600, owned_by="stars")
            for m in self.models or ()
        ]
        return dict(data=data, has_more=False, first_id=None, last_id=None) | (
            {} if api == "anthropic" else dict(object="list")
        )

    def draw(self, name):
        "The fault that strikes this request, if any: from the script, then by chance"
        f = self.faults
        with self.lock:
            if self.script:
                fault = self.script.pop(0)
            elif self.faulted[name] >= f.max_faults_per_request:
                fault = None
            else:
                fault = self.rng.choices(
                    (*PROBABLE, None), (*(p := [getattr(f, "p_" + k) for k in PROBABLE]), max(0, 1 - sum(p)))
                )[0]
            if fault in (None, "ok"):
                return None
            self.faulted[name] += 1
            ms = {"retry-after-ms": f"{1000 * f.retry_after:.0f}"} if self.rng.random() < 0.5 else {}
        if fault == "429":
            raise ApiError(
                429,
                "This request would exceed your organization's rate limit.",
                "rate_limit_exceeded",
                **{"retry-after": f"{f.retry_after:g}"},
                **ms,
            )
        if fault == "quota":
            raise ApiError(
                429,
                "You exceeded your current quota, please check your plan and billing details.",
                "insufficient_quota",
                kind="insufficient_quota",
                **{"x-should-retry": "false"},
            )
        for status, message in ((500, "Internal server error"), (502, "Bad gateway"), (529, "Overloaded")):
            need(fault != str(status), message, status=status)
        return fault

    def authorise(self, c):
        bearer = c.headers.get("authorization", "").removeprefix("Bearer ")
        given = c.headers.get("x-api-key", bearer) if c.api == "anthropic" else bearer
        need(
            given == self.key,
            "invalid x-api-key" if c.api == "anthropic" else "Incorrect API key provided.",
            "invalid_api_key",
            status=401,
        )
        need(
            c.api != "anthropic" or "anthropic-version" in c.headers, "anthropic-version: header is required"
        )

    def once(self, c, name, work):
        "Does the work, unless a request with the same Idempotency-Key has done it or is at it"
        key = c.headers.get("idempotency-key")
        if c.method != "POST" or not key or not self.faults.honour_idempotency:
            return work()
        while True:
            with self.lock:
                mine = key not in self.idempotent
                slot = self.idempotent.setdefault(
                    key, SimpleNamespace(name=name, reply=None, done=threading.Event())
                )
            need(
                slot.name == name, "This Idempotency-Key was used with another request.", "idempotency_error"
            )
            if not mine:
                slot.done.wait()
                if slot.reply:
                    return slot.reply
                continue
            try:
                reply = work()
                slot.reply = replace(reply, fault=None, cut=None, fp=None)
                return reply
            finally:
                if not slot.reply:
                    self.idempotent.pop(key)
                slot.done.set()

    def respond(self, c):
        "The reply to a request, fault included"
        with self.lock:
            self.received += 1
        self.advance()
        rid, at, fault = new_id("req_"), time.time(), None
        try:
            if c.path == "/_stats":
                return Reply(dumps(self.stats()))
            self.authorise(c)
            name, work = self.route(c)
            fault = self.draw(name)
            if fault == "drop_before":
                reply = Reply(b"", fault=fault, cut=0)
            else:
                reply = replace(self.once(c, name, work))
                if fault == "slow":
                    time.sleep(self.faults.slow_s)
                if fault == "drop_after":
                    reply.fault, reply.cut = fault, 0
                if fault == "truncated_body":
                    reply.fault, reply.cut = fault, 2 * len(reply.body) // 3
                if fault == "504":
                    late = ApiError(504, "Gateway timeout").body(c.api, rid)
                    reply.fault, reply.status, reply.body = fault, 504, dumps(late)
                if fault in NONSENSE:
                    reply.fault, (reply.body, reply.type) = fault, NONSENSE[fault]
                if fault == "malformed":
                    reply.fault, reply.body, reply.cut = (
                        fault,
                        reply.body[: 2 * len(reply.body) // 3] + b'{"',
                        None,
                    )
        except Exception as e:
            e = self.refusal(e)
            if e.status == 529 and c.api == "openai":
                e.status = 503
            reply = Reply(dumps(e.body(c.api, rid)), status=e.status, headers=e.headers)
        reply.headers = {**reply.headers, "request-id" if c.api == "anthropic" else "x-request-id": rid}
        with self.lock:
            status = reply.fault or reply.status
            if reply.fault and reply.fp:
                self.spoiled[reply.fp] += 1
            self.status_counts[status] += 1
            self.log.append((at, c.method, c.path, status))
            self.note(time=at, method=c.method, path=c.path, status=status, billed=reply.fp)
        return reply


class Server(ThreadingHTTPServer):
    "Threads that outlive no one, and no word about clients that vanish"

    daemon_threads, block_on_close, request_queue_size = True, False, 512

    def __init__(self, *a):
        self.open = set()
        super().__init__(*a)

    def get_request(self):
        request = super().get_request()
        self.open.add(request[0])
        return request

    def shutdown_request(self, request):
        self.open.discard(request)
        super().shutdown_request(request)

    def handle_error(self, *_):
        pass


class Handler(BaseHTTPRequestHandler):
    "HTTP/1.1 with kept connections: reads a request, writes (or cuts) the reply"

    protocol_version, disable_nagle_algorithm = "HTTP/1.1", True

    def log_message(self, *_):
        pass

    def do_GET(self):
        if "transfer-encoding" in self.headers:
            self.close_connection = True
            return self.send_error(411)
        n, url = int(self.headers.get("content-length") or 0), urlsplit(self.path)
        body = self.rfile.read(n)
        if len(body) < n:
            self.close_connection = True
            return
        api = (
            "anthropic"
            if url.path.startswith("/v1/messages") or "anthropic-version" in self.headers
            else "openai"
        )
        reply = self.server.app.respond(
            SimpleNamespace(
                method=self.command,
                target=self.path,
                path=unquote(url.path),
                query=dict(parse_qsl(url.query)),
                headers=self.headers,
                body=body,
                api=api,
            )
        )
        head = {
            "content-type": reply.type,
            "content-length": len(reply.body),
            "date": self.date_time_string(),
            **reply.headers,
        }
        reason = self.responses.get(reply.status, ("Overloaded",))[0]
        data = (
            f"HTTP/1.1 {reply.status} {reason}\r\n".encode()
            + "".join(f"{k}: {v}\r\n" for k, v in head.items()).encode()
            + b"\r\n"
        )
        if reply.cut is not None:
            self.close_connection = True
        if reply.cut != 0:
            self.connection.sendall(data + reply.body[: reply.cut])

    do_POST = do_DELETE = do_GET


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--port", type=int, default=0)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--key", default="test-key")
    p.add_argument("--faults", help="JSON file with the fields of Faults")
    p.add_argument("--log", help="gets a JSON line per request and per batch that ended")
    p.add_argument("--models", help="comma-separated; without: any")
    p.add_argument("--no_temperature", default="", help="comma-separated")
    a = p.parse_args()
    faults = Faults(**json.loads(Path(a.faults).read_text())) if a.faults else Faults()
    parent = os.getppid()
    with LLMServer(
        faults=faults,
        key=a.key,
        models=a.models and a.models.split(","),
        seed=a.seed,
        port=a.port,
        no_temperature=a.no_temperature.split(","),
        log=a.log,
    ) as s:
        print(s.port, flush=True)
        while os.getppid() == parent:
            time.sleep(0.2)  # ends with whoever started it


if __name__ == "__main__":
    main()

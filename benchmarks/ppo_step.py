"""Seconds per PPO step: the settings of the `cpu` preset against PyTorch's and transformers' defaults.

Each variant changes one thing about the same step (same model, same prompts, same seed): the BLAS that
multiplies, the attention kernel, and how micro-batches are filled. Variants alternate in one process;
medians over the repeats, and their ratio to the shipped settings, are printed.

    python benchmarks/ppo_step.py [--steps 3] [--threads 1]
"""
import argparse
import statistics
import tempfile

import torch
from transformers.utils import logging

from stars import experiments
from stars.problems import sample_problems
from stars.models import fast_cpu_math, load_model, load_tokenizer
from stars.ppo import PPOConfig, ppo
from stars.sft import read_log

VARIANTS = {
    "shipped settings": {},
    "default BLAS": dict(blas="ieee"),
    "fused attention": dict(attention="sdpa"),
    "one micro-batch of everything": dict(micro_tokens=10**6),
    "no reference (kl_coef=0)": dict(kl_coef=0.),
}


def run(cfg, tok, problems, blas="bf16", attention="eager", **change):
    torch.backends.mkldnn.matmul.fp32_precision = blas

    def load():
        model = load_model("rich")
        model.set_attn_implementation(attention)
        return model

    cfg = PPOConfig(**{f: getattr(cfg, f) for f in cfg.__dataclass_fields__} | change)
    with tempfile.TemporaryDirectory() as d:
        ppo(load(), tok, problems, d, cfg, reference=load, progress=False)
        return read_log(f"{d}/metrics.jsonl")[1:] # the first step warms up


def main():
    ap = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ap.add_argument("--steps", type=int, default=3)
    ap.add_argument("--threads", type=int, default=1)
    args = ap.parse_args()
    logging.disable_progress_bar()
    fast_cpu_math(args.threads)
    preset = experiments.preset("cpu", ppo_steps=args.steps + 1, ppo_save_every=100)
    tok, problems = load_tokenizer("rich"), sample_problems(500, 0, split="train", **preset.world)
    print(f"rich base, {preset.ppo_prompts} rollouts per step, {args.threads} threads; median seconds over {args.steps} steps")
    base = None
    for name, change in VARIANTS.items():
        rows = run(preset.ppo(0), tok, problems, **change)
        phases = {k: statistics.median(r[f"s_{k}"] for r in rows) for k in ("sample", "score", "value", "update")}
        tokens = statistics.median(r["tokens_per_s_update"] for r in rows)
        total = sum(phases.values())
        base = base or total
        print(f"{name:>30}: {total:5.2f} s ({'  '.join(f'{k} {v:.2f}' for k, v in phases.items())})  update {tokens:7,.0f} tokens/s  ×{total / base:.2f}")


if __name__ == "__main__":
    main()

"""Sampling speed: the default engine against `model.generate`, same model, prompts and length.

Responses are forced to full length (no end of sequence), so both sides do the same work; a second
comparison lets responses end where a primed model ends them, which is where dropping rows pays.
The two sides alternate in one process; medians and their ratio are printed.

    python benchmarks/rollouts.py [--rows 128] [--tokens 128] [--repeats 3] [--model plain]
"""
import argparse
import statistics
import time

import torch
from transformers import GenerationConfig
from transformers.utils import logging

from stars.countdown import make_prompt
from stars.problems import sample_problems
from stars.models import fast_cpu_math, load_model, load_tokenizer, n_params
from stars.rollouts import TransformersEngine


def main():
    ap = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in dict(rows=128, tokens=128, repeats=3, threads=torch.get_num_threads()).items():
        ap.add_argument(f"--{name}", type=int, default=default)
    ap.add_argument("--model", default="plain", help="a base, a folder or a hub id")
    args = ap.parse_args()
    logging.disable_progress_bar()
    fast_cpu_math(args.threads)
    model, tok = load_model(args.model), load_tokenizer(args.model)
    problems = sample_problems(200, 0, n_numbers=(3,), min_number=1, max_number=12, min_target=10, max_target=30)
    prompts = tok([make_prompt(problems[i % 200]) for i in range(args.rows)], add_special_tokens=False).input_ids
    x = torch.tensor(prompts) if len({len(p) for p in prompts}) == 1 else None
    assert x is not None, "this benchmark wants prompts of one length"

    def ours(eos):
        return sum(len(r.ids) for r in TransformersEngine(model, eos).generate(prompts, args.tokens, seed=0))

    def theirs(eos):
        config = GenerationConfig(max_new_tokens=args.tokens, do_sample=True, top_k=0, eos_token_id=eos, pad_token_id=tok.pad_token_id)
        out = model.generate(x, attention_mask=torch.ones_like(x), generation_config=config)[:, x.shape[1]:]
        return int((out != tok.pad_token_id).sum()) if eos is not None and eos >= 0 else out.numel()

    print(f"{args.model}: {n_params(model):,} weights, {args.rows} prompts, {args.threads} threads, fp32")
    for label, eos_ours, eos_theirs in (("forced to full length", -1, None), ("ending by themselves", tok.eos_token_id, tok.eos_token_id)):
        speed = dict(ours=[], generate=[])
        for i in range(args.repeats + 1): # the first round warms up
            for name, fn, eos in (("ours", ours, eos_ours), ("generate", theirs, eos_theirs)):
                start = time.perf_counter()
                n = fn(eos)
                if i: speed[name].append(n / (time.perf_counter() - start))
        a, b = (statistics.median(speed[k]) for k in ("ours", "generate"))
        print(f"{label:>22}: engine {a:8,.0f} tokens/s   generate {b:8,.0f} tokens/s   ratio {a / b:.2f}")


if __name__ == "__main__":
    main()

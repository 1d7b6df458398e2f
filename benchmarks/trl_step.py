"""Seconds per RL step: `stars.rl.ppo` against TRL's GRPOTrainer, and PPO with a critic beside both.

Same model (the shipped base `plain`, 0.5M weights, fp32), same prompts, 16 prompts × 8 responses × 128
tokens that cannot end, the same reward function, temperature 1 without top-k and top-p, no KL, no gradient
checkpointing, micro-batches of the same number of rows, one optimiser step (AdamW) per RL step. Each side
runs in blocks of one unmeasured and some measured steps; blocks alternate in one process. A step is timed
from its start to the start of the next, so it holds everything that a side does between two updates. What
was sampled, what went through a forward pass with gradients, and how often an optimiser stepped is counted,
and compared.

What differs. TRL samples through `model.generate` and takes the logprobs of the update's own forward pass
as the old ones; ours come from the sampler, and are checked against the trainer in every step (four
responses through the model once more). Ours writes a line of metrics per step and counts habits; TRL's
logging, saving, evaluation and bf16 are off. To keep responses from ending, TRL is given an end of sequence
that the model has no row for, so its checks for it cost what they always cost.

    python benchmarks/trl_step.py [--rounds 3] [--steps 3] [--threads 2] [--device cpu] [--out FILE]
"""

import argparse
import copy
import os
import statistics
import tempfile
import time
import warnings

os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
import torch
from common.report import report
from rollouts import unending
from torch.optim.optimizer import register_optimizer_step_post_hook
from transformers import PrinterCallback, TrainerCallback
from transformers.utils import logging

from stars.models.checkpoints import known_ids, load_model, load_tokenizer
from stars.models.micro import n_params
from stars.rl.loops import read_log
from stars.rl.ppo import PPOConfig, Runtime, ppo
from stars.rl.rollouts import LlamaEngine, Task
from stars.task.countdown import make_prompt, score
from stars.task.problems import sample_problems

LR, WORLD = 1e-5, dict(n_numbers=(3,), min_number=1, max_number=12, min_target=10, max_target=30)


class Count:
    "What a side did since it was last asked"

    def __init__(self):
        self.sampled = self.trained = self.updates = 0

    def watch(self, model):
        "Count the tokens that go through a model with gradients; a copy of the model counts here, too"

        def seen(module, given):
            if torch.is_grad_enabled():
                COUNT.trained += given[0].numel()

        model.get_input_embeddings().register_forward_pre_hook(seen)
        return model


COUNT = Count()


class Clock(TrainerCallback):
    "Times between the steps of TRL's trainer"

    def __init__(self):
        self.at = []

    def on_step_end(self, args, state, control, **kw):
        self.at.append((time.perf_counter(), time.process_time()))


class Timed(LlamaEngine):
    "The default engine, which notes when a step begins"

    def generate(self, *args, **kw):
        self.at.append((time.perf_counter(), time.process_time()))
        out = super().generate(*args, **kw)
        COUNT.sampled += sum(len(r.ids) for r in out)
        return out


def reward_of(text: str, numbers, target: int) -> float:
    """The verifier's score, and a hundredth per distinct word: responses that cannot end all score the
    same, and nothing would be learned"""
    return score(text, numbers, target) + 0.01 * len(set(text.split()))


def differences(at: list) -> list[tuple]:
    return [(b[0] - a[0], b[1] - a[1]) for a, b in zip(at, at[1:])]


def ours(
    args, tok, problems, estimator: str
) -> tuple[list, list]:  # (wall, CPU) seconds of each step, rows of metrics
    torch.set_num_threads(args.threads)
    model, n = COUNT.watch(load_model("plain", args.device)), args.prompts * args.samples
    engine = unending(Timed(model, tok.eos_token_id, vocab=known_ids(tok)))
    engine.at = []
    width = len(tok(make_prompt(problems[0]), add_special_tokens=False).input_ids) + args.tokens
    cfg = PPOConfig(
        steps=args.steps + 2,
        prompts=args.prompts,
        samples=args.samples,
        minibatch=n,
        micro_tokens=args.micro_rows * width,
        max_tokens=args.tokens,
        lr=LR,
        critic_lr=LR,
        estimator=estimator,
        kl_coef=0.0,
        entropy_coef=0.0,
        save_every=10**6,
    )
    with tempfile.TemporaryDirectory() as d:
        ppo(
            model,
            tok,
            problems,
            d,
            cfg,
            Task(reward=lambda text, p: reward_of(text, p.numbers, p.target)),
            runtime=Runtime(engine, progress=False),
        )
        rows = read_log(f"{d}/metrics.jsonl")
    return differences(engine.at)[1:], rows[1:-1]  # the first warms up, the last ends with saving


def theirs(args, tok, problems) -> list:  # (wall, CPU) seconds of each step
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from datasets import Dataset
        from trl import GRPOConfig, GRPOTrainer
    torch.set_num_threads(args.threads)
    model, tok, clock, n = (
        COUNT.watch(load_model("plain", args.device)),
        copy.deepcopy(tok),
        Clock(),
        args.prompts * args.samples,
    )
    model.set_attn_implementation(args.trl_attention)
    tok.add_special_tokens(dict(eos_token="<never>"))
    if tok.eos_token_id < model.config.vocab_size:
        raise AssertionError("the model could draw this end of sequence")
    model.generation_config.eos_token_id = model.config.eos_token_id = tok.eos_token_id

    def reward(prompts, completions, completion_ids, numbers, target, **kw):
        COUNT.sampled += sum(map(len, completion_ids))
        return [reward_of(c, tuple(ns), t) for c, ns, t in zip(completions, numbers, target)]

    data = Dataset.from_list(
        [dict(prompt=make_prompt(p), numbers=list(p.numbers), target=p.target) for p in problems]
    )
    with tempfile.TemporaryDirectory() as d, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cfg = GRPOConfig(
            d,
            per_device_train_batch_size=args.micro_rows,
            gradient_accumulation_steps=n // args.micro_rows,
            num_generations=args.samples,
            max_completion_length=args.tokens,
            max_steps=args.steps + 1,
            learning_rate=LR,
            lr_scheduler_type="constant",
            beta=0.0,
            num_iterations=1,
            gradient_checkpointing=False,
            bf16=False,
            use_cpu=args.device == "cpu",
            logging_strategy="no",
            save_strategy="no",
            eval_strategy="no",
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=False,
            seed=0,
        )
        trainer = GRPOTrainer(model, reward, cfg, data, processing_class=tok, callbacks=[clock])
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return differences(clock.at)  # from the end of the first, which warms up


def main():
    ap = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in dict(
        rounds=3, steps=3, prompts=16, samples=8, tokens=128, micro_rows=16, threads=torch.get_num_threads()
    ).items():
        ap.add_argument(f"--{name.replace('_', '-')}", type=int, default=default)
    ap.add_argument("--device", default="cpu")
    ap.add_argument(
        "--trl-attention",
        default="eager",
        help="attention kernel of TRL's model (eager: the one that ours uses on a CPU)",
    )
    ap.add_argument("--out", help="markdown file to append the table to")
    args = ap.parse_args()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    register_optimizer_step_post_hook(lambda opt, *_: setattr(COUNT, "updates", COUNT.updates + 1))
    tok = load_tokenizer("plain")
    problems = sample_problems(500, 0, split="train", **WORLD)
    lengths = {len(x) for x in tok([make_prompt(p) for p in problems], add_special_tokens=False).input_ids}
    if len(lengths) > 1:
        raise AssertionError(f"prompts of {lengths} tokens: this comparison wants one length")
    sides = {
        "stars, group baseline": lambda: ours(args, tok, problems, "group"),
        "stars, PPO with critic": lambda: ours(args, tok, problems, "gae"),
        "TRL GRPO": lambda: (theirs(args, tok, problems), None),
    }
    times, phases, did = {k: [] for k in sides}, {k: [] for k in sides}, {}
    for _ in range(args.rounds):
        for name, run in sides.items():
            COUNT.__init__()
            t, rows = run()
            done = args.steps + (1 if rows is None else 2)
            times[name] += t
            phases[name] += rows or []
            did[name] = [
                x // done if x % done == 0 else x / done
                for x in (COUNT.sampled, COUNT.trained, COUNT.updates)
            ]
            print(
                f"{name}: {' '.join(f'{w:.2f}' for w, _ in t)} s; per step {did[name][0]:,} tokens "
                f"sampled, {did[name][1]:,} trained on, {did[name][2]} optimiser steps",
                flush=True,
            )
    want = [
        args.prompts * args.samples * args.tokens,
        args.prompts * args.samples * (args.tokens + lengths.pop()),
    ]
    for name, (sampled, trained, updates) in did.items():
        nets = 2 if "critic" in name else 1
        if (sampled, trained, updates) != (want[0], nets * want[1], nets):
            raise AssertionError(
                f"{name} did {sampled}, {trained}, {updates} per step, not {want[0]}, {nets * want[1]}, "
                f"{nets}"
            )
    median = {k: statistics.median(w for w, _ in v) for k, v in times.items()}
    best = min(v for k, v in median.items() if k.startswith("TRL"))

    def part(name, p):
        return f"{statistics.median(r['s_' + p] for r in phases[name]):.2f}" if phases[name] else "–"

    rows = [
        [
            k,
            f"{v:.2f}",
            f"{statistics.median(c for _, c in times[k]):.2f}",
            *(part(k, p) for p in ("sample", "score", "value", "update")),
            *(f"{x:,}" for x in did[k]),
            f"{best / v:.2f}",
        ]
        for k, v in median.items()
    ]
    report(
        f"One RL step, {args.prompts} × {args.samples} × {args.tokens} tokens, "
        f"{n_params(load_model('plain')):,} weights, {args.device}, median of {args.rounds * args.steps}",
        [
            "side",
            "s per step",
            "CPU s",
            "sample",
            "score",
            "value",
            "update",
            "tokens sampled",
            "tokens trained",
            "optimiser steps",
            "× TRL",
        ],
        rows,
        args.out,
        notes=(
            f"Micro-batches of {args.micro_rows} rows on both sides; with a critic, two models are "
            f"trained. TRL's attention: {args.trl_attention}.",
        ),
        packages=("torch", "transformers", "trl", "accelerate"),
    )


if __name__ == "__main__":
    main()

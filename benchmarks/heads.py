"""What logits in pieces save in memory and cost in time, and how much of a batch is padding.

Three ways to the log-probabilities and entropies of a batch, forward and backward: whole logits; the softmax
in pieces over whole logits (as it was); logits in pieces of which nothing is kept (as it is). A process each,
for its peak of memory; they take turns, the best of some runs. The padding is that of responses of the two
shipped bases in micro-batches of similar length, as PPO makes them: what flash-attn does not compute.
"""

import argparse
import multiprocessing
import resource
import time

import torch
from common.report import report
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.utils import logging

from stars.models.checkpoints import load_model, load_tokenizer
from stars.models.heads import LOGITS, chosen_in_pieces, chosen_logprobs
from stars.models.parallel import micro_batches
from stars.rl.rollouts import LlamaEngine, seeds_of
from stars.task.countdown import make_prompt
from stars.task.problems import sample_problems


def softmax_in_pieces(head, states, ids, positions, *how):
    "As it was: the logits stay, and only what is made of them comes in pieces"
    logits = head(states)
    parts = [
        checkpoint(chosen_logprobs, nn.Identity(), some, taken, *how, use_reentrant=False)
        for some, taken in zip(logits.split(positions, 1), ids.split(positions, 1))
    ]
    return tuple(torch.cat(p, 1) for p in zip(*parts))


def whole(head, states, ids, positions, *how):
    return chosen_logprobs(head, states, ids, *how)


WAYS = {
    "whole": whole,
    "softmax in pieces (as it was)": softmax_in_pieces,
    "logits in pieces": chosen_in_pieces,
}


def once(way: str, rows: int, time_: int, width: int, vocab: int) -> tuple[float, float]:  # seconds, GB
    "A forward and backward pass of a head in this process, and how much its memory grew"
    torch.set_num_threads(1)
    head, ids = nn.Linear(width, vocab, bias=False), torch.randint(vocab, (rows, time_))
    states = torch.randn(rows, time_, width, requires_grad=True)
    head.weight.grad = torch.zeros_like(head.weight)
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    positions = max(1, LOGITS // (rows * vocab))
    logp, entropy = WAYS[way](head, states, ids, positions, 1.0, True, None)
    (logp.sum() + entropy.sum()).backward()
    return time.perf_counter() - start, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**20


def padding_of(base: str, micro_tokens: int = 8_192) -> list:
    "How many tokens a batch of PPO has, and how many positions its micro-batches"
    tok, problems = load_tokenizer(base), sample_problems(512, seed=0)
    prompts = tok([make_prompt(p) for p in problems], add_special_tokens=False).input_ids
    rollouts = LlamaEngine(load_model(base), tok.eos_token_id).generate(prompts, 256, 1.0, seeds_of(0, 512))
    lengths = [len(r.prompt) + len(r.ids) for r in rollouts]
    minibatch = list(range(128))  # PPO cuts a minibatch, not the whole batch, into pieces of similar length
    parts = list(micro_batches(minibatch, lengths, micro_tokens))
    padded = sum(len(p) * max(lengths[i] for i in p) for p in parts)
    tokens = sum(lengths[i] for i in minibatch)
    return [base, len(parts), f"{tokens:,}", f"{padded:,}", f"{1 - tokens / padded:.0%}"]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tokens", type=int, default=4_096)
    parser.add_argument("--width", type=int, default=576)
    parser.add_argument("--vocab", type=int, default=49_152)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--out", help="file to append the tables to")
    args = parser.parse_args()
    logging.disable_progress_bar()
    size, got = (8, args.tokens // 8, args.width, args.vocab), {way: [] for way in WAYS}
    spawn = multiprocessing.get_context("spawn")
    for _ in range(args.runs):
        for way in WAYS:
            with spawn.Pool(1) as pool:
                got[way].append(pool.apply(once, (way, *size)))
    rows = [[way, f"{min(t for t, _ in r):.2f}", f"{min(g for _, g in r):.2f}"] for way, r in got.items()]
    title = f"Log-probabilities of {args.tokens:,} tokens, {args.width} × {args.vocab:,}, fp32"
    report(title, ["logits", "seconds", "memory at the peak, GB"], rows, args.out)
    head = ["base", "micro-batches", "tokens", "with padding", "is padding"]
    report(
        "Padding in a minibatch of 128 responses", head, list(map(padding_of, ("plain", "rich"))), args.out
    )


if __name__ == "__main__":
    main()

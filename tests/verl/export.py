"""Exports for `check_export.py`, and beside each what our own trainer makes of the same data: python
tests/verl/export.py FOLDER"""

import json
import random
import sys
from dataclasses import replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from byte_model import checkpoint

from stars.habits.priming import read_rows
from stars.lab.configs import preset
from stars.lab.verl import sft_steps, to_verl
from stars.models.checkpoints import load_tokenizer
from stars.rl import ppo
from stars.rl.sft import encode, lr_at
from stars.task.countdown import make_prompt, score
from stars.task.datasets import from_parquet

SMALL = dict(data_train=64, data_rows=256, data_eval=16, prime_rows=96, prime_val=32)


def responses(problems):
    "Right, wrong, broken and missing answers"
    rng = random.Random(0)
    for p in problems:
        a, b, c = rng.sample(p.numbers, 3)
        for text in (
            f"{a} {rng.choice('+-*/')} {b} {rng.choice('+-*/')} {c}",
            f"({a}+{b})*{c}={(a + b) * c}",
            "2**3",
            "",
            f"{p.target}",
        ):
            yield p, f"so . </think> <answer>{text}</answer>"
        yield p, f"{a} + {b}"


def parity(cfg, seed=0):
    "A minibatch of random numbers, and our losses and advantages on it"
    g = torch.Generator().manual_seed(seed)

    def rand(*shape):
        return torch.randn(*shape, generator=g)

    n, t = 12, cfg.ppo_max_tokens
    mask = (torch.arange(t)[None] < torch.randint(1, t + 1, (n, 1), generator=g)).float()
    x = dict(mask=mask, old=-rand(n, t).abs(), values=rand(n, t), scores=rand(n))
    x |= dict(
        logp=x["old"] + rand(n, t), vpreds=x["values"] + rand(n, t)
    )  # ratios beyond 3, where verl's second clip would begin
    x["ref"] = x["logp"] + 0.5 * rand(n, t)
    rewards = ppo.token_rewards(x["scores"], mask)
    advantages, returns = ppo.gae(rewards, x["values"], mask, cfg.ppo_gamma, cfg.ppo_lam)
    advantages = ppo.whiten(advantages, mask)
    total = ppo.aggregate_total(mask, cfg.ppo_aggregate, cfg.ppo_max_tokens)
    return x | dict(
        rewards=rewards,
        advantages=advantages,
        returns=returns,
        policy_loss=ppo.policy_loss(
            x["logp"], x["old"], advantages, mask, cfg.ppo_clip, cfg.ppo_aggregate, total
        )[0],
        value_loss=ppo.value_loss(x["vpreds"], x["values"], returns, mask, cfg.ppo_value_clip)[0],
        kl_loss=ppo.aggregate(ppo.kl_estimate(x["logp"], x["ref"], "k3"), mask, cfg.ppo_aggregate, total),
        group=ppo.group_advantages(x["scores"], 4),
    )


def export(root, name, cfg, model="plain", condition="backtracking_verification", **kw):
    out = to_verl(cfg, root / name, model, condition, runs=root / "runs", progress=False, **kw)
    tok = load_tokenizer(model if model != "plain" else out / "model")
    problems, rows = (
        from_parquet(out / "train.parquet"),
        read_rows(out / "sft-train.parquet") if condition != "base" else [],
    )
    examples = encode(rows, tok, cfg.sft_max_length)
    expected = dict(
        prompts=tok(
            [make_prompt(p, cfg.template, tok) for p in problems], add_special_tokens=False
        ).input_ids,
        sft=[dict(ids=e.ids, prompt=e.prompt) for e in examples],
        lr=[lr_at(i, sft_steps(cfg), cfg.sft(0)) for i in range(sft_steps(cfg))],
        verdicts=[
            dict(
                data_source="countdown",
                solution_str=text,
                ground_truth=dict(numbers=p.numbers, target=p.target),
                score=score(text, p.numbers, p.target, cfg.ppo_format_score),
            )
            for p, text in responses(problems[:64])
        ],
    )
    (out / "expected.json").write_text(json.dumps(expected))
    torch.save(parity(cfg), out / "parity.pt")


def main(root):
    root.mkdir(parents=True, exist_ok=True)
    cpu = preset("cpu", **SMALL)
    export(root, "gae", cpu, gpus=2)
    export(
        root,
        "group",
        replace(
            cpu,
            ppo_estimator="group",
            ppo_kl_in="loss",
            ppo_samples=4,
            ppo_prompts=32,
            ppo_minibatch=64,
            ppo_aggregate="constant-length",
            ppo_is_cap=2.0,
            ppo_format_score=0.2,
        ),
        gpus=4,
        nodes=2,
        tensor_parallel=2,
    )
    export(
        root,
        "sequence",
        replace(
            cpu,
            ppo_aggregate="sequence-mean",
            ppo_warmup=5,
            ppo_kl_coef=0.0,
            prime_val=0,
            eval_temperature=0.0,
        ),
        condition="base",
    )
    bytes_model = checkpoint(root / "a model's folder")
    export(
        root, "chat", replace(cpu, template="chat", sft_max_length=2048, ppo_max_tokens=512), str(bytes_model)
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))

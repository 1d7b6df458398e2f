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
from stars.lab.configs import changed, preset
from stars.lab.stages import Job
from stars.lab.verl import Cluster, sft_steps, to_verl
from stars.models.checkpoints import load_tokenizer
from stars.rl import ppo
from stars.rl.sft import encode, lr_at
from stars.task.countdown import make_prompt, score
from stars.task.datasets import from_parquet

SMALL = {"data.train": 64, "data.rows": 256, "data.eval": 16, "priming.rows": 96, "priming.val": 32}


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

    n, t = 12, cfg.ppo.max_tokens
    mask = (torch.arange(t)[None] < torch.randint(1, t + 1, (n, 1), generator=g)).float()
    x = dict(mask=mask, old=-rand(n, t).abs(), values=rand(n, t), scores=rand(n))
    x |= dict(
        logp=x["old"] + rand(n, t), vpreds=x["values"] + rand(n, t)
    )  # ratios beyond 3, where verl's second clip would begin
    x["ref"] = x["logp"] + 0.5 * rand(n, t)
    rewards = ppo.token_rewards(x["scores"], mask)
    advantages, returns = ppo.gae(rewards, x["values"], mask, cfg.ppo.gamma, cfg.ppo.lam)
    advantages = ppo.whiten(advantages, mask)
    total = ppo.aggregate_total(mask, cfg.ppo.aggregate, cfg.ppo.max_tokens)
    return x | dict(
        rewards=rewards,
        advantages=advantages,
        returns=returns,
        policy_loss=ppo.policy_loss(
            x["logp"], x["old"], advantages, mask, cfg.ppo.clip, cfg.ppo.aggregate, total
        )[0],
        value_loss=ppo.value_loss(x["vpreds"], x["values"], returns, mask, cfg.ppo.value_clip)[0],
        kl_loss=ppo.aggregate(ppo.kl_estimate(x["logp"], x["ref"], "k3"), mask, cfg.ppo.aggregate, total),
        group=ppo.group_advantages(x["scores"], 4),
    )


def export(root, name, cfg, model="plain", condition="backtracking_verification", **cluster):
    job = Job(cfg, model, condition, 0, str(root / "runs"), progress=False)
    out = to_verl(job, root / name, Cluster(**cluster))
    tok = load_tokenizer(model if model != "plain" else out / "model")
    problems, rows = (
        from_parquet(out / "train.parquet"),
        read_rows(out / "sft-train.parquet") if condition != "base" else [],
    )
    examples = encode(rows, tok, cfg.sft.max_length)
    expected = dict(
        prompts=tok(
            [make_prompt(p, cfg.world.template, tok) for p in problems], add_special_tokens=False
        ).input_ids,
        sft=[dict(ids=e.ids, prompt=e.prompt) for e in examples],
        lr=[lr_at(i, sft_steps(cfg), replace(cfg.sft, seed=0)) for i in range(sft_steps(cfg))],
        verdicts=[
            dict(
                data_source="countdown",
                solution_str=text,
                ground_truth=dict(numbers=p.numbers, target=p.target),
                score=score(text, p.numbers, p.target, cfg.ppo.format_score),
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
        changed(
            cpu,
            ppo=dict(
                estimator="group",
                kl_in="loss",
                samples=4,
                prompts=32,
                minibatch=64,
                aggregate="constant-length",
                is_cap=2.0,
                format_score=0.2,
            ),
        ),
        gpus=4,
        nodes=2,
        tensor_parallel=2,
    )
    export(
        root,
        "sequence",
        changed(
            cpu,
            ppo=dict(aggregate="sequence-mean", warmup=5, kl_coef=0.0),
            priming=dict(val=0),
            eval=dict(temperature=0.0),
        ),
        condition="base",
    )
    bytes_model = checkpoint(root / "a model's folder")
    export(
        root,
        "chat",
        changed(cpu, world=dict(template="chat"), sft=dict(max_length=2048), ppo=dict(max_tokens=512)),
        str(bytes_model),
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))

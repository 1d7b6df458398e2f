"""What several workers give, and what the machinery around a training loop costs.

1. The same SFT and PPO job on one and on two workers (Ray Train, gloo, DDP), which share all cores:
   seconds per update, and how far the losses are apart. The first updates of PPO see the same rollouts;
   later ones may not, since a difference in the last digit can turn a draw.
2. One job of the `cpu` preset, made smaller, three times: as a bare loop (data, rows, SFT, PPO, evaluation,
   nothing kept), as stages of the run store behind a papermill notebook that also draws its figure, and the
   same with two Ray workers. What the second and third take longer is the overhead. Most of it is paid once
   per run (imports, kernel, Ray), so give --ppo-steps 100 for its share of the preset itself.

    python benchmarks/workers.py [--sft-rows 640] [--ppo-steps 10] [--out FILE]
"""

import argparse
import statistics
import tempfile
import time
import warnings
from dataclasses import replace
from pathlib import Path

import pandas as pd
from common.report import report
from transformers.utils import logging

from stars.habits.priming import priming_rows, reorder
from stars.habits.summaries import read_results, summarize
from stars.lab import experiments as ex
from stars.lab.notebooks import figure_notebook, run_notebook
from stars.models.checkpoints import known_ids, load_model, load_tokenizer
from stars.models.parallel import Team, on_workers
from stars.rl.evals import Sampling, complete
from stars.rl.loops import read_log
from stars.rl.ppo import Runtime, ppo
from stars.rl.rollouts import LlamaEngine
from stars.rl.sft import sft
from stars.task.countdown import make_prompt
from stars.task.problems import sample_problems
from stars.util.workers import cores

MIX = "backtracking_verification"


def teacher(cfg, n: int) -> list[dict]:
    how = dict(
        attempts=cfg.priming.attempts,
        patience=cfg.priming.patience,
        slip=cfg.priming.slip,
        insight=cfg.priming.insight,
        top=cfg.priming.top,
        budget=cfg.priming.budget,
        prompt=make_prompt,
    )
    return list(
        priming_rows(
            MIX,
            sample_problems(cfg.data.prime, cfg.data.seed, split="prime", **cfg.world.ranges),
            n,
            0,
            **how,
        )
    )


def train(
    cfg, rows: list[dict], problems: list, out: Path
):  # SFT, and PPO, both from the shipped base, as each worker of a team runs them
    team, tok = Team.join(), load_tokenizer("plain")
    runtime = Runtime(team=team, progress=False)
    sft(load_model("plain"), tok, rows, out / "sft", replace(cfg.sft, seed=0), runtime=runtime)
    ppo(
        load_model("plain"),
        tok,
        problems,
        out / "ppo",
        replace(cfg.ppo, seed=0),
        reference=lambda: load_model("plain"),
        runtime=runtime,
    )


def compare(cfg, rows: list[dict], problems: list) -> list[list]:  # table rows
    logs, wall = {}, {}
    with tempfile.TemporaryDirectory() as d:
        for n in (1, 2):
            out = Path(d) / f"{n}"
            out.mkdir()
            start = time.perf_counter()
            on_workers(train, (cfg, rows, problems, out), n, out)
            wall[n], logs[n] = (
                time.perf_counter() - start,
                {k: read_log(out / k / "metrics.jsonl") for k in ("sft", "ppo")},
            )
    seconds = dict(
        sft=lambda r: 1 / r["tokens_per_s"],
        ppo=lambda r: sum(r[f"s_{k}"] for k in ("sample", "score", "value", "update")),
    )
    table = []
    for kind, keys in dict(sft=("loss",), ppo=("policy_loss", "value_loss")).items():
        one, two = logs[1][kind], logs[2][kind]
        if len(one) != len(two):
            raise AssertionError(f"{kind}: {len(one)} updates on one worker, {len(two)} on two")
        t = {n: statistics.median(map(seconds[kind], logs[n][kind][1:])) for n in (1, 2)}

        def gap(rs):
            return max(abs(a[k] - b[k]) for k in keys for a, b in rs)

        same = [
            (a, b)
            for a, b in zip(one, two)
            if kind == "sft" or a["response_tokens"] == b["response_tokens"] and a["reward"] == b["reward"]
        ]
        unit = "µs per token" if kind == "sft" else "s per step"

        def show(x):
            return f"{x * 1e6:.1f}" if kind == "sft" else f"{x:.2f}"

        table.append(
            [
                kind.upper(),
                unit,
                show(t[1]),
                show(t[2]),
                f"{t[1] / t[2]:.2f}",
                len(one),
                len(same),
                f"{gap(list(zip(one, two))[:1]):.1e}",
                f"{gap(same):.1e}" if same else "–",
            ]
        )
    print(
        f"wall time, with the start of the group: {wall[1]:.1f} s on one worker, {wall[2]:.1f} s on two",
        flush=True,
    )
    return table


def bare(cfg, out: Path) -> pd.DataFrame:  # the results that the stages give, without them
    tok, eval_ = load_tokenizer("plain"), []
    train_problems = reorder(
        sample_problems(cfg.data.train, cfg.data.seed, split="train", **cfg.world.ranges),
        cfg.data.rows,
        cfg.data.seed,
    )
    held_out = sample_problems(cfg.data.eval, cfg.data.seed, split="eval", **cfg.world.ranges)
    rows = teacher(cfg, cfg.priming.rows + cfg.priming.val)
    path = sft(
        load_model("plain"),
        tok,
        rows[: cfg.priming.rows],
        out / "sft",
        replace(cfg.sft, seed=0),
        rows[cfg.priming.rows :],
        Runtime(progress=False),
    )
    ppo(
        load_model(path),
        tok,
        train_problems,
        out / "ppo",
        replace(cfg.ppo, seed=0),
        reference=lambda: load_model(path),
        runtime=Runtime(progress=False),
    )
    for ckpt in sorted((out / "ppo").glob("step-*")):
        engine, step = (
            LlamaEngine(load_model(ckpt), tok.eos_token_id, cfg.run.engine_rows, known_ids(tok)),
            int(ckpt.name[5:]),
        )
        eval_.append(
            complete(
                engine,
                tok,
                held_out,
                Sampling(
                    cfg.ppo.max_tokens,
                    cfg.eval.samples,
                    cfg.eval.temperature,
                    f"{cfg.eval.seed}/0/{step}",
                ),
                labels=dict(model="plain", condition=MIX, seed=0, step=step),
            )
        )
    return summarize(pd.concat(eval_))


def overhead(cfg, change: dict) -> list[list]:  # table rows
    took, results = {}, {}
    with tempfile.TemporaryDirectory() as d:
        d = Path(d)
        start = time.perf_counter()
        results["bare"] = bare(cfg, d / "bare")
        took["bare loop"] = time.perf_counter() - start
        for name, more in {
            "stages, notebook": {},
            "stages, notebook, 2 Ray workers": {"run.workers": 2},
        }.items():
            where, start = d / f"{len(took)}", time.perf_counter()
            run_notebook(
                figure_notebook("fig_dynamics"),
                where / "fig.ipynb",
                preset="cpu",
                models=["plain"],
                conditions=[MIX],
                seeds=[0],
                overrides=change | more,
                runs=str(where / "runs"),
                figures=str(where / "figures"),
            )
            took[name] = time.perf_counter() - start
            results[name] = read_results(next((where / "runs").rglob("results.csv")))
    first = took["bare loop"]

    def last(r):
        return r.sort_values("step").iloc[-1]

    return [
        [
            k,
            f"{v:.1f}",
            f"{v - first:.1f}",
            f"{100 * (v / first - 1):.1f} %",
            f"{last(r).accuracy:.3f}",
            f"{last(r).response_length:.2f}",
        ]
        for (k, v), r in zip(took.items(), results.values())
    ]


def main():
    ap = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ap.add_argument("--sft-rows", type=int, default=640, help="examples, 32 per update")
    ap.add_argument("--ppo-steps", type=int, default=10)
    ap.add_argument("--only", choices=("workers", "overhead"), help="one of the two parts")
    ap.add_argument("--out", help="markdown file to append the tables to")
    args = ap.parse_args()
    if cores() < 2:
        raise SystemExit("this comparison needs two cores")
    logging.disable_progress_bar()
    warnings.simplefilter("ignore")
    change = {
        "priming.rows": args.sft_rows,
        "priming.val": 32,
        "sft.epochs": 1,
        "ppo.steps": args.ppo_steps,
        "ppo.save_every": max(1, args.ppo_steps // 2),
    }
    cfg, packages = ex.preset("cpu", **change), ("torch", "transformers", "ray", "papermill")
    if args.only != "overhead":
        problems = sample_problems(cfg.data.train, 0, split="train", **cfg.world.ranges)
        report(
            "One and two workers (Ray Train, gloo, DDP), 0.5M weights, the cores shared out",
            [
                "job",
                "unit",
                "1 worker",
                "2 workers",
                "×",
                "updates",
                "with the same rollouts",
                "difference of the losses, first",
                "largest",
            ],
            compare(cfg, teacher(cfg, args.sft_rows), problems),
            args.out,
            packages=packages,
        )
    if args.only != "workers":
        report(
            f"Stage machinery, papermill and Ray: {args.sft_rows} rows of SFT, {args.ppo_steps} steps of "
            f"PPO, 3 evaluations",
            ["how", "s", "more than bare", "share", "last accuracy", "tokens per response"],
            overhead(cfg, change),
            args.out,
            packages=packages,
        )


if __name__ == "__main__":
    main()

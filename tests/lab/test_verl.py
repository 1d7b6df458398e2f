"Exports for verl, as far as they can be checked without it (tests/verl/ runs verl's own code on them)"

import json
import random
import subprocess
from dataclasses import asdict

import pyarrow.parquet as pq
import pytest

from stars.lab.configs import PRESETS, Config, changed, preset, with_settings
from stars.lab.stages import Job
from stars.lab.verl import (
    Cluster,
    differences,
    override,
    ppo_counterparts,
    reward_source,
    rl_overrides,
    script,
    sft_overrides,
    to_verl,
)
from stars.models.checkpoints import load_tokenizer
from stars.rl.sft import encode
from stars.task.countdown import make_prompt, score
from stars.task.datasets import from_parquet
from stars.task.problems import sample_problems
from stars.util.files import dotted

A, C, R = "actor_rollout_ref.actor.", "critic.", "actor_rollout_ref.rollout."
SMALL = {"data.train": 32, "data.rows": 128, "data.eval": 8, "priming.rows": 64, "priming.val": 32}


def rl(cfg, seed=0, **cluster):
    return rl_overrides(cfg, "$here/model", 20, "run", seed, Cluster(**cluster))


def written(cfg, out, runs, condition="backtracking_verification", **cluster):
    "An export of a job of the plain base"
    job = Job(cfg, "plain", condition, 0, str(runs), progress=False)
    return to_verl(job, out, Cluster(**cluster))


@pytest.mark.parametrize(
    "name, want",
    [
        (
            "cpu",
            {
                "data.train_batch_size": 128,
                A + "ppo_mini_batch_size": 64,
                R + "n": 1,
                "trainer.total_training_steps": 60,
                "trainer.total_epochs": 1,
                "data.max_response_length": 200,
                A + "optim.lr": 1e-4,
                "trainer.save_freq": 10,
                A + "ppo_max_token_len_per_gpu": 2048,
                "algorithm.adv_estimator": "reinforce_plus_plus",
                "algorithm.use_kl_in_reward": False,
                "algorithm.kl_ctrl.kl_coef": 0.0,
            },
        ),
        (
            "smoke",
            {
                "data.train_batch_size": 16,
                A + "ppo_mini_batch_size": 8,
                "trainer.total_training_steps": 4,
                "trainer.total_epochs": 1,
                "data.max_response_length": 60,
                "trainer.save_freq": 2,
                "algorithm.adv_estimator": "gae",
                "algorithm.use_kl_in_reward": True,
                "algorithm.kl_ctrl.kl_coef": 0.001,
                C + "optim.lr": 3e-4,
                C + "cliprange_value": 0.5,
                C + "loss_agg_mode": "token-mean",
            },
        ),
    ],
)
def test_presets(name, want):
    cfg = preset(name)
    got = rl(cfg, gpus=2, nodes=3, tensor_parallel=2, seed=7)
    common = {
        A + "use_kl_loss": False,
        A + "clip_ratio": 0.2,
        A + "clip_ratio_low": 0.2,
        A + "clip_ratio_high": 0.2,
        A + "entropy_coeff": 0.001,
        A + "loss_agg_mode": "token-mean",
        R + "temperature": 1.0,
        "trainer.n_gpus_per_node": 2,
        "trainer.nnodes": 3,
        R + "tensor_model_parallel_size": 2,
        "data.seed": 7,
        R + "seed": 7,
        A + "data_loader_seed": 7,
        R + "gpu_memory_utilization": cfg.run.engine_memory,
        "algorithm.rollout_correction.rollout_is": None,
        R + "val_kwargs.do_sample": True,
        "data.max_prompt_length": 20,
    }
    assert {k: got[k] for k in common | want} == common | want
    assert any(k.startswith(C) for k in got) == (cfg.ppo.estimator == "gae")


WITH_CRITIC = {"ppo.estimator": "gae", "ppo.kl_coef": 0.001}  # as in the paper


def test_variants():
    cfg = preset("cpu", **WITH_CRITIC)
    group = rl(changed(cfg, ppo=dict(estimator="group", samples=8, prompts=16, minibatch=32, kl_in="loss")))
    assert (
        group["algorithm.adv_estimator"],
        group["data.train_batch_size"],
        group[A + "ppo_mini_batch_size"],
        group[R + "n"],
    ) == ("grpo", 16, 4, 8)
    assert (
        group["algorithm.use_kl_in_reward"],
        group[A + "use_kl_loss"],
        group[A + "kl_loss_coef"],
        group[A + "kl_loss_type"],
    ) == (False, True, 0.001, "low_var_kl")
    assert not any(k.startswith(C) for k in group)
    free = rl(changed(cfg, ppo=dict(kl_coef=0.0)))
    assert not free["algorithm.use_kl_in_reward"] and not free[A + "use_kl_loss"]
    constant = rl(changed(cfg, ppo=dict(aggregate="constant-length")))
    assert (
        constant[A + "loss_agg_mode"],
        constant[A + "loss_scale_factor"],
        constant[C + "loss_agg_mode"],
    ) == ("seq-mean-token-sum-norm", 200, "token-mean")
    assert rl(changed(cfg, ppo=dict(is_cap=2.0)))["algorithm.rollout_correction.rollout_is_threshold"] == 2.0
    assert (
        rl(changed(cfg, ppo=dict(max_tokens=4_000)))[A + "ppo_max_token_len_per_gpu"] == 4_020
    )  # one sequence has to fit
    greedy = rl(changed(cfg, eval=dict(temperature=0.0)))
    assert (greedy[R + "val_kwargs.temperature"], greedy[R + "val_kwargs.do_sample"]) == (0.0, False)


def test_sft_settings():
    got = sft_overrides(preset("cpu"), "m", "run")
    assert {
        k: got[k]
        for k in (
            "data.train_batch_size",
            "trainer.total_epochs",
            "optim.lr",
            "optim.lr_warmup_steps",
            "data.max_token_len_per_gpu",
            "data.max_length",
        )
    } == {
        "data.train_batch_size": 16,
        "trainer.total_epochs": 3,
        "optim.lr": 2e-3,
        "optim.lr_warmup_steps": 38,
        "data.max_token_len_per_gpu": 2048,
        "data.max_length": 512,
    }
    without = sft_overrides(
        preset("cpu", priming=dict(val=15)), "m", "run"
    )  # verl would validate on no batch at all
    assert (without["data.val_files"], without["trainer.test_freq"]) == (None, -1)


OTHER = {
    "ppo.estimator": "group",
    "ppo.kl_in": "loss",
    "ppo.aggregate": "sequence-mean",
    "run.engine": "vllm",
    "eval.drawn": "all",
    "run.track": "wandb",
    "eval.spaces": ("world",),
    "ppo.samples": 2,
}


def shown(c):
    "All that an export says of a configuration"
    return rl(c), sft_overrides(c, "m", "run"), reward_source(c.ppo.format_score), differences(c, True)


def test_no_field_is_passed_over():
    "A changed field of training changes an override, or is named among the differences"
    cfg = preset("cpu", **WITH_CRITIC)
    for name, v in dotted(asdict(cfg)).items():
        group, _, field = name.partition(".")
        if group not in ("ppo", "sft", "eval", "run", "lora") or name in (
            "ppo.seed",
            "sft.seed",
            "run.restarts",
        ):
            continue
        if name in ("ppo.mask_truncated", "ppo.filter_groups", "ppo.overlong_buffer"):
            continue  # refused, see below
        new = (
            not v
            if isinstance(v, bool)
            else 2 * v + 2
            if isinstance(v, int)
            else OTHER.get(name) or v / 2 + 0.07
        )
        other = changed(cfg, **{group: {field: OTHER.get(name, new)}})
        assert shown(cfg) != shown(other), name


def test_differences_are_true():
    "What decides data alone is not listed; with a cap the trainer computes old log-probabilities here, too"
    plain, capped = differences(preset("cpu"), True), differences(preset("cpu", ppo=dict(is_cap=2.0)), True)
    in_data = ("corpus.", "curation.", "cpt.", "seeds", "run.restarts")
    assert not [line for line in plain if line.startswith(in_data)]
    assert any("here they are the sampler's" in line for line in plain) and not any(
        "the sampler's" in line for line in capped
    )


def test_a_new_field_is_reported():
    from dataclasses import make_dataclass

    Later = make_dataclass("Later", [("magic", float, 0.5)], bases=(Config,), frozen=True)
    assert "magic=0.5: has no counterpart in verl" in differences(Later("cpu"), True)


@pytest.mark.parametrize(
    "change, how, names",
    [
        ({"ppo.mask_truncated": True}, {}, "ppo.mask_truncated"),
        ({"ppo.samples": 2, "ppo.filter_groups": True}, {}, "ppo.filter_groups"),
        ({"ppo.overlong_buffer": 20}, {}, "ppo.overlong_buffer"),
        ({"ppo.samples": 3, "ppo.prompts": 64}, {}, "ppo.minibatch=64"),
        ({}, dict(gpus=3), "ppo.minibatch=64"),
        ({"data.rows": 100}, {}, "data.rows=100"),
        ({"lora.rank": 8}, {}, "lora.rank=8"),
        ({"lora.alpha": 0.5}, {}, "lora.alpha"),
        ({"priming.rows": 8}, {}, "priming.rows=8"),
        ({}, dict(gpus=4, tensor_parallel=3), "tensor_parallel=3"),
        ({}, dict(gpus=0), "gpus=0"),
        ({"sft.batch_size": 9}, dict(gpus=2), "sft.batch_size=9"),
    ],
)
def test_refusals(tmp_path, change, how, names):
    with pytest.raises(ValueError, match=names):
        written(with_settings(preset("cpu"), change), tmp_path / "out", tmp_path / "runs", **how)
    assert not any(tmp_path.iterdir())  # before anything is built


def test_verdicts(tmp_path):
    "The file stands alone: another interpreter, without the package, gives the verdicts of the verifier"
    (tmp_path / "reward.py").write_text(reward_source(0.2))
    rng, asked = random.Random(1), []
    for p in sample_problems(100, 3, n_numbers=(3,), max_number=12, min_target=10, max_target=30):
        a, b, c = rng.sample(p.numbers, 3)
        for answer in (
            f"{a} {rng.choice('+-*/')} {b} {rng.choice('+-*/')} {c}",
            f"({a} − {b}) × {c} = {(a - b) * c}",
            rng.choice(["2**3", "", "1/0", f"{p.target}", "(" * 40]),
        ):
            asked.append((f"x <answer>{answer}</answer>", list(p.numbers), p.target))
        asked.append((f"{a} + {b}", list(p.numbers), p.target))
    asked_of = (
        "import json, sys; from reward import compute_score\n"
        "asked = json.load(sys.stdin)\n"
        "print(json.dumps([compute_score('countdown', t, TRUTH, {}, more=1) for t, n, g in asked]))"
    )

    def answers(truth):
        code = asked_of.replace("TRUTH", truth)
        return subprocess.run(
            ["python3", "-c", code],
            input=json.dumps(asked),
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=True,
        )

    run = answers("dict(numbers=n, target=g)")
    assert answers("json.dumps(dict(numbers=n, target=g))").stdout == run.stdout  # stored as text
    want = [score(t, n, g, 0.2) for t, n, g in asked]
    assert [r["score"] for r in json.loads(run.stdout)] == want and {0.0, 0.2, 1.0} == set(want)
    assert [r["acc"] for r in json.loads(run.stdout)] == [float(w == 1) for w in want]


@pytest.fixture(scope="module")
def export(tmp_path_factory):
    d = tmp_path_factory.mktemp("verl")
    return written(preset("cpu", **SMALL), d / "out", d / "runs", gpus=2)


def test_files(export):
    assert {f.name for f in export.iterdir()} == {
        "train.parquet",
        "eval.parquet",
        "sft-train.parquet",
        "sft-val.parquet",
        "reward.py",
        "differences.txt",
        "export.json",
        "model",
        "run.sh",
        "rl.sh",
        "sft.sh",
    }
    rows, problems = (
        pq.read_table(export / "train.parquet").to_pylist(),
        from_parquet(export / "train.parquet"),
    )
    assert [r["prompt"] for r in rows] == [
        [dict(role="user", content=make_prompt(p))] for p in problems
    ]  # the trainer's text, not that of the template in the run store
    assert (
        rows[0]["reward_model"]["ground_truth"]
        == dict(target=problems[0].target, numbers=list(problems[0].numbers))
        and len(rows) == 128
    )
    sft = pq.read_table(export / "sft-train.parquet").to_pylist()
    assert (
        all(
            r["messages"]
            == [dict(role="user", content=r["query"]), dict(role="assistant", content=r["completion"])]
            for r in sft
        )
        and len(sft) == 64
    )
    assert len(encode(sft, load_tokenizer(export / "model"), 512)) == 64
    assert {p.key for p in problems}.isdisjoint(p.key for p in from_parquet(export / "eval.parquet"))
    for name in ("run.sh", "rl.sh", "sft.sh"):
        subprocess.run(["bash", "-n", export / name], check=True)


def test_sft_ends_where_rl_starts(export):
    name = json.loads((export / "export.json").read_text())["prime"]
    steps = SMALL["priming.rows"] // 16 * 3

    def quoted_value(file, key):
        [line] = [line for line in (export / file).read_text().split("\n") if key in line]
        return line.split("'")[1]

    start = quoted_value("rl.sh", "actor_rollout_ref.model.path")
    where = quoted_value("sft.sh", "default_local_dir")
    assert name and start == f"{where}/global_step_{steps}/huggingface"


def test_export_again(export):
    runs, before = export.parent / "runs", (export / "rl.sh").read_text()
    base = written(preset("cpu", **SMALL), export.parent / "again", runs, "base")
    assert (
        not (base / "sft.sh").exists()
        and "checkpoints" not in (base / "rl.sh").read_text().split("model.path")[1].split("\n")[0]
    )
    # another experiment takes its place …
    written(preset("cpu", **SMALL, ppo=dict(lr=5e-5)), base, runs, gpus=2)
    assert (base / "sft.sh").exists() and "optim.lr=5e-05" in (base / "rl.sh").read_text()

    def folder(text):
        return [line for line in text.split("\n") if "default_local_dir" in line]

    assert folder((base / "rl.sh").read_text()) != folder(before)  # … and does not go on from its checkpoints
    written(preset("cpu", **SMALL), base, runs, "base")
    assert not (base / "sft.sh").exists() and not (base / "sft-train.parquet").exists()


def test_nothing_foreign_is_overwritten(tmp_path, export):
    (tmp_path / "train.parquet").write_text("mine")
    with pytest.raises(ValueError, match="is no export"):
        written(preset("cpu", **SMALL), tmp_path, export.parent / "runs")
    assert (tmp_path / "train.parquet").read_text() == "mine"


def test_interrupted_export_cannot_be_started(tmp_path, export, monkeypatch):
    import stars.lab.verl as module

    out = written(preset("cpu", **SMALL), tmp_path / "out", export.parent / "runs")

    def stop(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "write_sft", stop)
    with pytest.raises(KeyboardInterrupt):
        written(preset("cpu", **SMALL), out, export.parent / "runs")
    assert not any((out / n).exists() for n in ("run.sh", "rl.sh", "sft.sh")) and not [
        f for f in out.iterdir() if f.name.endswith(".tmp")
    ]


def test_quoting_survives_the_shell(tmp_path):
    nasty = {"a": 'it\'s {{ "x" }} $HOME `date` \\n', "b": "$here/dir", "c": [1, 2]}
    (tmp_path / "s.sh").write_text(script("printf '%s\\0'", nasty, "A test"))
    out = subprocess.run(
        ["bash", tmp_path / "s.sh", "d=more"], capture_output=True, text=True, check=True
    ).stdout.split("\0")[:-1]
    assert out == [override("a", nasty["a"]), f"b='{tmp_path}/dir'", "c=[1,2]", "d=more"]


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_has_values_for_every_name(name):
    cfg = preset(name)
    assert all(
        v is None or isinstance(v, (bool, int, float, str, list))
        for of in ppo_counterparts(cfg).values()
        for v in of.values()
    )

"""verl's own code on what `stars.lab.verl` writes, in verl's environment: `make test-verl`

Not collected by the ordinary run: the exports come from `export.py`, which runs in the other environment,
and their folder from STARS_VERL.
"""

import asyncio
import json
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_module
from tensordict import TensorDict
from verl import DataProto
from verl.trainer.ppo import core_algos
from verl.trainer.ppo.reward import load_reward_manager
from verl.trainer.ppo.rollout_corr_helper import compute_rollout_correction_and_add_to_batch
from verl.trainer.ppo.utils import create_rl_dataset, need_critic, need_reference_policy
from verl.trainer.sft_trainer import create_sft_dataset
from verl.utils.config import omega_conf_to_dataclass, validate_config
from verl.utils.dataset.dataset_utils import SFTTensorCollator
from verl.utils.tokenizer import normalize_token_ids
from verl.utils.torch_functional import get_cosine_schedule_with_warmup

ROOT = Path(os.environ["STARS_VERL"]).resolve()
NAMES = ("gae", "group", "sequence", "chat")
PRIMED = ("gae", "group", "chat")
START = dict(chat=ROOT / "a model's folder")  # elsewhere the copy in the export


def arguments(name, script, tmp):
    "What a script of an export hands to verl, as the shell sees it"
    tmp.mkdir(exist_ok=True)
    for command in ("python3", "torchrun"):
        (tmp / command).write_text("#!/bin/sh\nprintf '%s\\0' \"$@\"\n")
        (tmp / command).chmod(0o755)
    run = subprocess.run(
        ["bash", ROOT / name / script, "trainer.project_name=mine"],
        env=os.environ | dict(PATH=f"{tmp}:{os.environ['PATH']}"),
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    args = run.stdout.split("\0")[:-1]
    at = args.index("-m")
    return args[at + 1], args[at + 2 :]


def composed(name, script, tmp):
    module, overrides = arguments(name, script, tmp)
    job = {"verl.trainer.main_ppo": "ppo_trainer", "verl.trainer.sft_trainer": "sft_trainer_engine"}[module]
    with initialize_config_module("verl.trainer.config", version_base=None):
        return compose(job, overrides)


@pytest.fixture(params=NAMES)
def rl(request, tmp_path):
    """Name and verl's configuration of an export; where SFT would have left its checkpoint lies the model
    it started from"""
    name = request.param
    path = next(
        line
        for line in (ROOT / name / "rl.sh").read_text().split("\n")
        if "actor_rollout_ref.model.path" in line
    ).split("'")[1]
    if "checkpoints" in path:
        shutil.copytree(
            START.get(name, ROOT / name / "model"),
            path.replace("$here", str(ROOT / name)),
            dirs_exist_ok=True,
        )
    return name, composed(name, "rl.sh", tmp_path / "bin")


def expected(name):
    return json.loads((ROOT / name / "expected.json").read_text())


def test_configuration(rl, capsys):
    name, c = rl
    assert c.trainer.project_name == "mine"  # what follows the script's name wins
    assert need_critic(c) == (name != "group") and need_reference_policy(c) == (name != "sequence")
    validate_config(c, need_reference_policy(c), need_critic(c))
    assert "passed successfully" in capsys.readouterr().out
    actor, rollout, _ = (
        omega_conf_to_dataclass(x)
        for x in (c.actor_rollout_ref.actor, c.actor_rollout_ref.rollout, c.algorithm)
    )
    assert (
        rollout.n == actor.rollout_n
        and rollout.response_length == c.data.max_response_length
        and rollout.prompt_length == c.data.max_prompt_length
    )
    assert actor.ppo_mini_batch_size * rollout.n == dict(gae=64, group=64, sequence=64, chat=64)[name]


def test_problems(rl):
    name, c = rl
    model, want = omega_conf_to_dataclass(c.actor_rollout_ref.model), expected(name)["prompts"]
    ds = create_rl_dataset(c.data.train_files, c.data, model.tokenizer, model.processor)
    assert (
        len(ds) == len(want) == 256
        and len(create_rl_dataset(c.data.val_files, c.data, model.tokenizer, model.processor, is_train=False))
        == 16
    )
    ids = [
        normalize_token_ids(
            model.tokenizer.apply_chat_template(row["raw_prompt"], add_generation_prompt=True, tokenize=True)
        )
        for row in ds
    ]
    assert ids == want and max(map(len, ids)) <= c.data.max_prompt_length
    assert {ds[0]["data_source"], ds[0]["reward_model"]["style"]} == {"countdown", "rule"}


def test_verdicts(rl):
    name, c = rl
    model = omega_conf_to_dataclass(c.actor_rollout_ref.model)
    manager = load_reward_manager(c, model.tokenizer)
    verdicts = expected(name)["verdicts"]
    for v in verdicts:
        assert (
            manager.compute_score(**{k: v[k] for k in ("data_source", "solution_str", "ground_truth")})[
                "score"
            ]
            == v["score"]
        )
    assert {v["score"] for v in verdicts} == {0.0, 0.2 if name == "group" else 0.1, 1.0}

    async def through_the_manager():
        manager.loop = asyncio.get_running_loop()
        for v in verdicts[:12]:
            ids = torch.tensor([model.tokenizer(v["solution_str"], add_special_tokens=False).input_ids])
            data = DataProto(
                TensorDict(dict(responses=ids, attention_mask=torch.ones_like(ids)), [1]),
                dict(
                    data_source=np.array(["countdown"], object),
                    reward_model=np.array([dict(ground_truth=v["ground_truth"])], object),
                    extra_info=np.array([{}], object),
                ),
            )
            out = await manager.run_single(data)
            assert out["reward_score"] == v["score"] and out["reward_extra_info"]["acc"] == (v["score"] == 1)

    asyncio.run(through_the_manager())


@pytest.mark.parametrize("name", PRIMED)
def test_sft(name, tmp_path):
    c, want = composed(name, "sft.sh", tmp_path / "bin"), expected(name)
    model, engine, optim, _ = (omega_conf_to_dataclass(x) for x in (c.model, c.engine, c.optim, c.checkpoint))
    ds = create_sft_dataset(c.data.train_files, c.data, model.tokenizer, model.processor)
    assert (
        len(ds) == len(want["sft"]) == 96
        and len(create_sft_dataset(c.data.val_files, c.data, model.tokenizer, model.processor)) == 32
    )
    for row, w in zip(ds, want["sft"]):
        assert row["input_ids"].tolist() == w["ids"]
        assert row["loss_mask"].tolist() == [0] * w["prompt"] + [1] * (len(w["ids"]) - w["prompt"])
    assert SFTTensorCollator(c.data.pad_mode)([ds[i] for i in range(4)])["input_ids"].is_nested
    steps = len(ds) // c.data.train_batch_size * c.trainer.total_epochs
    opt = torch.optim.AdamW(
        [torch.zeros(1, requires_grad=True)], lr=optim.lr, betas=optim.betas, weight_decay=optim.weight_decay
    )
    at = get_cosine_schedule_with_warmup(
        opt,
        optim.lr_warmup_steps,
        steps,
        optim.min_lr_ratio,
        optim.num_cycles,
        zero_indexed_step=optim.zero_indexed_step,
    ).lr_lambdas[0]
    lrs = [optim.lr * at(i) for i in range(steps)]
    assert engine.strategy == "fsdp" and len(lrs) == len(want["lr"])
    # the cosine of verl is one update ahead: it ends at the floor, ours one step before it
    assert np.allclose(lrs[: optim.lr_warmup_steps], want["lr"][: optim.lr_warmup_steps]) and np.allclose(
        lrs[optim.lr_warmup_steps : -1], want["lr"][optim.lr_warmup_steps + 1 :]
    )


def test_losses(rl):
    "verl's losses under the exported settings are ours"
    name, c = rl
    x, actor = torch.load(ROOT / name / "parity.pt"), omega_conf_to_dataclass(c.actor_rollout_ref.actor)
    mask = x["mask"]
    actor.global_batch_info.update(
        dp_size=1,
        batch_num_tokens=mask.sum(),
        global_batch_size=len(mask),
        loss_scale_factor=actor.loss_scale_factor,
    )
    loss, _ = core_algos.compute_policy_loss_vanilla(
        x["old"], x["logp"], x["advantages"], mask, actor.loss_agg_mode, actor
    )
    torch.testing.assert_close(loss, x["policy_loss"])
    kl = core_algos.agg_loss(
        core_algos.kl_penalty(x["logp"], x["ref"], actor.kl_loss_type),
        mask,
        actor.loss_agg_mode,
        **actor.global_batch_info,
    )
    torch.testing.assert_close(kl, x["kl_loss"])
    if name == "group":
        index = np.repeat(np.arange(3), 4)
        adv, _ = core_algos.compute_grpo_outcome_advantage(
            x["rewards"], mask, index, norm_adv_by_std_in_grpo=c.algorithm.norm_adv_by_std_in_grpo
        )
        torch.testing.assert_close(
            adv, (x["group"] * (3 / 4) ** 0.5)[:, None] * mask, rtol=1e-4, atol=1e-5
        )  # as differences.txt says
    else:
        critic = omega_conf_to_dataclass(c.critic)
        adv, returns = core_algos.compute_gae_advantage_return(
            x["rewards"], x["values"], mask, c.algorithm.gamma, c.algorithm.lam
        )
        torch.testing.assert_close(
            adv * mask, x["advantages"], rtol=1e-2, atol=1e-3
        )  # verl whitens by the unbiased variance
        torch.testing.assert_close(returns * mask, x["returns"])
        loss, _ = core_algos.compute_value_loss(
            x["vpreds"], x["returns"], x["values"], mask, critic.cliprange_value, critic.loss_agg_mode
        )
        torch.testing.assert_close(loss, x["value_loss"])


def test_importance_weights(rl):
    "Off, or the ratio of trainer to sampler, cut at the cap"
    name, c = rl
    old, sampled = torch.randn(2, 3, 5).log_softmax(-1)
    data = DataProto.from_dict(
        dict(old_log_probs=old, rollout_log_probs=sampled, response_mask=torch.ones(3, 5))
    )
    data, _ = compute_rollout_correction_and_add_to_batch(data, c.algorithm.rollout_correction)
    if name == "group":
        torch.testing.assert_close(data.batch["rollout_is_weights"], (old - sampled).exp().clamp(max=2.0))
    else:
        assert "rollout_is_weights" not in data.batch


def test_rl_waits_for_sft(tmp_path):
    shutil.copytree(ROOT / "gae", tmp_path / "gae", ignore=shutil.ignore_patterns("checkpoints"))
    run = subprocess.run(["bash", tmp_path / "gae" / "rl.sh"], capture_output=True, text=True)
    assert run.returncode == 2 and "run sft.sh first" in run.stderr

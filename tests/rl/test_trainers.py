"Estimators, clips and penalties that other papers add to PPO, against their equations and TRL's functions"

import math

import numpy as np
import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from trl.rewards import get_soft_overlong_punishment

from stars.models.heads import Actor
from stars.models.micro import micro_model, micro_tokenizer
from stars.rl import ppo as P
from stars.rl.loops import read_log
from stars.rl.rollouts import Task
from stars.task.countdown import Problem

QUIET = P.Runtime(progress=False)
SCORES = st.sampled_from([0.0, 0.1, 1.0])
LOGPS = st.floats(-3, 0)


def groups(least=2, most=5):
    "Prompts, responses per prompt, and for each response a score and whether it counts"
    response = st.tuples(SCORES, st.booleans())
    return st.integers(least, most).flatmap(
        lambda n: st.lists(st.lists(response, min_size=n, max_size=n), min_size=1, max_size=4)
    )


def unzipped(drawn):
    scores = torch.tensor([[s for s, _ in group] for group in drawn])
    kept = torch.tensor([[float(k) for _, k in group] for group in drawn])
    return scores, kept, scores.shape[1]


# Estimators


@given(groups())
def test_rloo_compares_with_the_others(drawn):
    "The baseline of Ahmadian et al. 2024, written as the sum it is; cut responses are no others"
    scores, kept, n = unzipped(drawn)
    got = P.rloo_advantages(scores.flatten(), n, kept.flatten()).view(-1, n)
    for row, group in enumerate(drawn):
        for i, (score, counts) in enumerate(group):
            others = [s for j, (s, k) in enumerate(group) if k and j != i]
            wanted = score - np.mean(others) if counts and others else 0.0
            assert got[row, i].item() == pytest.approx(wanted, abs=1e-6)


@given(groups())
def test_rloo_is_the_group_baseline_but_for_a_factor(drawn):
    "TRL: rewards - (sum - rewards) / (n - 1); the same as n / (n - 1) times reward less mean"
    scores, _, n = unzipped(drawn)
    plain = P.group_advantages(scores.flatten(), n, scale=False)
    torch.testing.assert_close(P.rloo_advantages(scores.flatten(), n), plain * n / (n - 1))


@given(groups())
def test_grpo_and_dr_grpo_by_their_equations(drawn):
    "GRPO: (r - mean) / std; Dr. GRPO: r - mean"
    scores, _, n = unzipped(drawn)
    centred = (scores - scores.mean(-1, keepdim=True)).numpy()
    torch.testing.assert_close(
        P.group_advantages(scores.flatten(), n, scale=False).view(-1, n).numpy(), centred, check_dtype=False
    )
    spread = np.std(scores.double().numpy(), axis=1, keepdims=True)
    wanted = np.where(spread > 1e-6, centred / (spread + 1e-6), 0)
    np.testing.assert_allclose(P.group_advantages(scores.flatten(), n).view(-1, n), wanted, atol=1e-4)


def learner(**how):
    cfg = P.PPOConfig(**dict(prompts=2, samples=4, minibatch=8, kl_coef=0.0, estimator="group") | how)
    cfg.validate()
    return P.Learner(tiny.model(), None, None, cfg)


def rollouts(lengths, finished=None):
    finished = finished or [True] * len(lengths)
    return [P.Rollout([5], [7] * k, [-1.0] * k, f) for k, f in zip(lengths, finished)]


MIXED = [1.0, 0, 0, 0, 0.1, 0.1, 0.1, 0.1]  # the second prompt's responses agree


def test_the_settings_reach_the_estimators():
    scale, free = (
        P.appraise(learner(scale_by_std=on), rollouts([1] * 8), MIXED)[0].advantages[:, 0]
        for on in (True, False)
    )
    torch.testing.assert_close(free[:4], torch.tensor([0.75, -0.25, -0.25, -0.25]))
    torch.testing.assert_close(scale[:4], free[:4] / (0.75 * 0.25) ** 0.5, atol=1e-4, rtol=1e-4)
    loo = P.appraise(learner(estimator="rloo"), rollouts([1] * 8), MIXED)[0].advantages[:, 0]
    torch.testing.assert_close(loo, torch.tensor([1, -1 / 3, -1 / 3, -1 / 3, 0, 0, 0, 0]))


def test_dr_grpo_is_two_settings():
    "Dr. GRPO: the sum over tokens of (r - mean), divided by responses and the longest length"
    lengths = [1, 2, 3, 4, 5, 1, 1, 1]
    trainee = learner(scale_by_std=False, aggregate="constant-length", max_tokens=10)
    batch, _ = P.appraise(trainee, rollouts(lengths), MIXED)
    total = P.aggregate_total(batch.mask, "constant-length", 10)
    logp = batch.old_logp.clone().requires_grad_()
    loss, _ = P.policy_loss(
        logp, batch.old_logp, batch.advantages, batch.mask, mode="constant-length", total=total
    )
    loss.backward()
    means = np.repeat([0.25, 0.1], 4)
    for i, k in enumerate(lengths):
        wanted = -(MIXED[i] - means[i]) / (8 * 10)
        np.testing.assert_allclose(logp.grad[i, :k], wanted, atol=1e-6)


def test_rloo_may_have_the_kl_in_its_reward():
    "As in its paper; the penalty of a response is the sum over its tokens"
    cfg = learner(estimator="rloo", kl_coef=0.5, prompts=1, minibatch=4).cfg
    trainee = P.Learner(tiny.model(), None, Actor(tiny.model()), cfg)
    batch, logged = P.appraise(trainee, rollouts([1, 2, 1, 1]), [1.0, 0, 0, 0])
    ref = P.batch_logprobs(trainee, trainee.reference, batch)
    totals = torch.tensor([1.0, 0, 0, 0]) - 0.5 * ((batch.old_logp - ref) * batch.mask).sum(-1)
    torch.testing.assert_close(batch.advantages[:, 0], P.rloo_advantages(totals, 4))
    assert logged["kl"] != 0


# Groups that agree


@given(groups())
def test_groups_agree_where_nothing_can_be_compared(drawn):
    scores, kept, n = unzipped(drawn)
    got = P.groups_agree(scores.flatten(), n, kept.flatten()).tolist()
    assert got == [len({s for s, k in group if k}) <= 1 for group in drawn]


@pytest.mark.parametrize("on", [False, True])
def test_groups_that_agree_leave_the_loss_and_its_denominator(on):
    batch, logged = P.appraise(learner(filter_groups=on), rollouts([1, 2, 3, 4] * 2), MIXED)
    assert logged["groups_agree"] == 0.5  # whatever the setting
    assert P.aggregate_total(batch.mask) == (10 if on else 20)
    assert P.aggregate_total(batch.mask, "sequence-mean") == (4 if on else 8)


def test_one_response_per_prompt_has_no_groups():
    _, logged = P.appraise(learner(estimator="reinforce", samples=1, prompts=8), rollouts([1] * 8), MIXED)
    assert "groups_agree" not in logged


def test_a_group_left_with_one_response_agrees():
    trainee = learner(mask_truncated=True, filter_groups=True)
    cut = [True, False, False, False, True, True, True, True]
    batch, logged = P.appraise(trainee, rollouts([2] * 8, cut), [1.0, 0, 0, 0, 1, 0, 0, 0])
    assert logged["groups_agree"] == 0.5 and batch.mask[:4].sum() == 0 and batch.mask[4:].sum() == 8


# Clip-higher


@given(st.lists(st.tuples(LOGPS, LOGPS, st.floats(-2, 2)), min_size=1, max_size=6), st.floats(0.05, 0.9))
def test_clip_higher_by_its_equation(tokens, high):
    "DAPO, eq. 8: min(ratio · A, clip(ratio, 1 - ε_low, 1 + ε_high) · A)"
    now, old, adv = (np.array(x) for x in zip(*tokens))
    ratio = np.exp(now - old)
    wanted = -np.minimum(ratio * adv, np.clip(ratio, 0.8, 1 + high) * adv).mean()
    now, old, adv = (torch.tensor(x)[None] for x in (now, old, adv))
    loss, _ = P.policy_loss(now, old, adv, torch.ones_like(now), clip=(0.2, high))
    assert loss.item() == pytest.approx(wanted, abs=1e-9)


def test_the_upper_clip_is_the_lower_one_unless_it_is_set():
    assert P.PPOConfig(clip=0.3).clips == (0.3, 0.3)
    assert P.PPOConfig(clip_high=0.28).clips == (0.2, 0.28)


# Overlong responses


@settings(max_examples=300)
@given(st.integers(1, 60), st.data())
def test_the_penalty_is_that_of_trl(most, data):
    buffer = data.draw(st.integers(1, most))
    lengths = data.draw(st.lists(st.integers(1, most), min_size=1, max_size=8))
    wanted = get_soft_overlong_punishment(most, buffer)([[1] * k for k in lengths])
    assert P.overlong_penalty(torch.tensor(lengths), most, buffer).tolist() == pytest.approx(wanted)


def test_the_penalty_is_in_the_advantages_and_nowhere_else():
    "Two right answers of four and ten tokens, a buffer of four: one of them is worth 0 now"
    trainee = learner(estimator="rloo", samples=2, prompts=1, minibatch=2, max_tokens=10, overlong_buffer=4)
    batch, logged = P.appraise(trainee, rollouts([4, 10], [True, False]), [1.0, 1.0])
    assert logged["groups_agree"] == 1.0
    assert batch.advantages[:, 0].tolist() == [1, -1]


# Settings


@pytest.mark.parametrize(
    "bad, names",
    [
        (
            dict(estimator="rloo", samples=1, minibatch=256),
            "samples=1 must be at least 2 for estimator='rloo'",
        ),
        (
            dict(filter_groups=True, samples=1, minibatch=256),
            "samples=1 must be at least 2 for filter_groups=True",
        ),
        (dict(scale_by_std=False), "scale_by_std=False changes estimator='group' only, not 'gae'"),
        (dict(clip_high=-0.1), "clip_high=-0.1 must be at least 0"),
        (dict(overlong_buffer=-1), "overlong_buffer=-1 must be at least 0"),
        (dict(overlong_buffer=1025), "overlong_buffer=1025 must not exceed max_tokens=1024"),
        (dict(estimator="group"), "kl_in='loss'"),
    ],
)
def test_settings_that_cannot_work_are_named(bad, names):
    with pytest.raises(ValueError) as e:
        P.PPOConfig(**bad).validate()
    assert names in str(e.value)


@pytest.mark.parametrize(
    "good",
    [
        dict(estimator="rloo"),
        dict(estimator="group", scale_by_std=False, kl_in="loss", aggregate="constant-length"),
        dict(estimator="group", scale_by_std=False),
        dict(clip_high=0.28, filter_groups=True, overlong_buffer=1024),
    ],
)
def test_settings_of_the_papers_are_accepted(good):
    P.PPOConfig(**good).validate()


@pytest.mark.parametrize(
    "how", [dict(estimator="rloo"), dict(estimator="group", scale_by_std=False), dict(estimator="group")]
)
def test_a_run_with_everything_of_dapo_learns(how, tmp_path):
    "Rewarding one token makes it likelier"
    tok = micro_tokenizer()
    cfg = P.PPOConfig(
        **dict(steps=25, prompts=8, samples=8, minibatch=32, max_tokens=4, lr=3e-3, kl_coef=0.0),
        **dict(micro_tokens=4096, filter_groups=True, clip_high=0.28, overlong_buffer=1),
        **how,
    )
    task = Task(reward=lambda text, p: text.count("7") / 4)
    model = micro_model(tok, hidden=32, layers=1, heads=2, ffn=64)
    P.ppo(model, tok, [Problem((3, 4), 12)] * 8, tmp_path, cfg, task, runtime=QUIET)
    log = read_log(tmp_path / "metrics.jsonl")
    assert log[-1]["reward"] > 2 * log[0]["reward"]


def test_a_step_in_which_every_group_agrees_moves_nothing(tmp_path):
    tok = micro_tokenizer(20)
    cfg = P.PPOConfig(
        **dict(steps=2, prompts=2, samples=2, minibatch=2, max_tokens=3, lr=1e-3, kl_coef=0.0),
        **dict(micro_tokens=4096, entropy_coef=0.1, estimator="rloo", filter_groups=True),
    )
    model = micro_model(tok, 32, 1, 2, 64)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    P.ppo(model, tok, [Problem((3, 4), 12)] * 2, tmp_path, cfg, Task(reward=lambda *_: 1.0), runtime=QUIET)
    log = read_log(tmp_path / "metrics.jsonl")
    assert [r["groups_agree"] for r in log] == [1.0, 1.0]
    assert all(math.isfinite(v) for r in log for v in r.values())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_the_upper_clip_reaches_the_loss(monkeypatch):
    seen, plain = [], P.policy_loss

    def spy(*args, **kwargs):
        seen.append(kwargs["clip"])
        return plain(*args, **kwargs)

    monkeypatch.setattr(P, "policy_loss", spy)
    trainee = learner(clip=0.1, clip_high=0.3)
    batch, _ = P.appraise(trainee, rollouts([2] * 8), MIXED)
    P.update(trainee, batch, "0/0")
    assert set(seen) == {(0.1, 0.3)}

"Losses against independent implementations, trainers against plain ones"
import math
import re
import random

import pytest
import torch
from hypothesis import given, settings, strategies as st

from stars import ppo as P
from stars.evals import complete, summarize
from stars.models import load_model, load_tokenizer, micro_model, micro_tokenizer, token_logprobs, weights_of
from stars.parallel import micro_batches
from stars.rollouts import LlamaEngine, probe, seeds_of
from stars.sft import Example, SFTConfig, batches, encode, read_log, sft_loss


def ragged_mask(rows, time, gen):
    "Prompt, response and padding of random lengths"
    mask = torch.zeros(rows, time)
    for i in range(rows):
        a = int(torch.randint(0, time - 1, (1,), generator=gen))
        mask[i, a:int(torch.randint(a + 1, time + 1, (1,), generator=gen))] = 1
    return mask


def gae_by_definition(rewards, values, gamma, lam):
    "Σ (γλ)^l δ_{t+l}, written as the sum it is (Schulman et al. 2016, eq. 16)"
    n = len(rewards)
    delta = [rewards[t] + gamma * (values[t + 1] if t + 1 < n else 0.) - values[t] for t in range(n)]
    return [sum((gamma * lam)**k * delta[t + k] for k in range(n - t)) for t in range(n)]


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10**6), st.floats(.5, 1), st.floats(0, 1))
def test_gae_is_its_definition_on_each_response(seed, gamma, lam):
    gen = torch.Generator().manual_seed(seed)
    mask = ragged_mask(4, 9, gen)
    rewards, values = torch.randn(4, 9, generator=gen, dtype=torch.float64) * mask, torch.randn(4, 9, generator=gen, dtype=torch.float64)
    adv, ret = P.gae(rewards, values, mask.double(), gamma, lam)
    for i in range(4):
        on = mask[i].bool()
        want = torch.tensor(gae_by_definition(rewards[i, on].tolist(), values[i, on].tolist(), gamma, lam), dtype=torch.float64)
        torch.testing.assert_close(adv[i, on], want)
        torch.testing.assert_close(ret[i, on], want + values[i, on])
        assert (adv[i, ~on] == 0).all() and (ret[i, ~on] == 0).all()


def test_undiscounted_return_is_the_score():
    mask = torch.tensor([[0., 1, 1, 1, 0]])
    _, ret = P.gae(P.token_rewards(torch.tensor([.7]), mask), torch.randn(1, 5), mask)
    torch.testing.assert_close(ret, .7 * mask)


def test_losses_token_by_token():
    "The formulas of the PPO paper, one scalar at a time"
    gen = torch.Generator().manual_seed(0)
    mask = ragged_mask(6, 11, gen)
    logp, old, adv, v, ov, ret = (torch.randn(6, 11, generator=gen) for _ in range(6))
    pol = val = clipped = 0.
    for i, t in mask.nonzero().tolist():
        r = math.exp(logp[i, t] - old[i, t])
        a = adv[i, t].item()
        pol -= min(r * a, max(.8, min(1.2, r)) * a)
        clipped += max(.8, min(1.2, r)) * a < r * a
        vc = ov[i, t] + max(-.5, min(.5, (v[i, t] - ov[i, t]).item()))
        val += .5 * max((v[i, t] - ret[i, t])**2, (vc - ret[i, t])**2).item()
    loss, stats = P.policy_loss(logp, old, adv, mask, .2)
    torch.testing.assert_close(loss.item(), pol / mask.sum().item(), rtol=1e-5, atol=1e-6)
    assert stats["clip_frac"] == clipped
    torch.testing.assert_close(P.value_loss(v, ov, ret, mask, .5)[0].item(), val / mask.sum().item(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("mode,want", [("token-mean", (1 + 2 + 3 + 10) / 4), ("sequence-mean", (2 + 10) / 2), ("constant-length", 16 / 10)])
def test_aggregation_modes(mode, want):
    x, mask = torch.tensor([[1., 2, 3], [10, 77, 77]]), torch.tensor([[1., 1, 1], [1, 0, 0]])
    assert P.aggregate(x, mask, mode, P.aggregate_total(mask, mode, length=5)) == pytest.approx(want)
    halves = sum(P.aggregate(x[i:i+1], mask[i:i+1], mode, P.aggregate_total(mask, mode, length=5)) for i in (0, 1))
    assert halves == pytest.approx(want) # micro-batches add up


def test_without_a_critic_the_advantage_is_the_whitened_return():
    "Scores 1, 0, 0 on responses of 1, 2 and 1 tokens: over the four tokens their mean is 1/4, their variance 3/16"
    rollouts = [P.Rollout([5], [7], [-1.], True), P.Rollout([5], [7, 8], [-1., -1.], True), P.Rollout([5], [9], [-1.], True)]
    cfg = P.PPOConfig(prompts=3, samples=1, minibatch=3, estimator="reinforce", kl_coef=0., lam=.5)
    batch, ref_logp, logged = P._valued(rollouts, [1., 0., 0.], cfg, None, None, None, 10, P.Team(), torch.device("cpu"))
    a, b = .75 / (3/16)**.5, -.25 / (3/16)**.5
    torch.testing.assert_close(batch.advantages, torch.tensor([[a, 0.], [b, b], [b, 0.]]), atol=1e-5, rtol=1e-5)
    assert ref_logp is None and "explained_variance" not in logged and "kl" not in logged

def test_kl_estimators_estimate_the_kl():
    p, q = torch.distributions.Categorical(logits=torch.tensor([0., 1, 2])), torch.distributions.Categorical(logits=torch.tensor([.5, 1, 1]))
    x = torch.multinomial(p.probs, 200_000, True, generator=torch.Generator().manual_seed(0))
    true = torch.distributions.kl_divergence(p, q).item()
    for kind, tol in (("k1", .01), ("k3", .01), ("k2", .05)):
        est = P.kl_estimate(p.log_prob(x), q.log_prob(x), kind)
        assert est.mean().item() == pytest.approx(true, abs=tol), kind
    assert (P.kl_estimate(p.log_prob(x), q.log_prob(x), "k3") >= 0).all()


def test_trl_agrees_on_logprobs_and_entropy():
    utils = pytest.importorskip("trl.trainer.utils")
    tok = micro_tokenizer()
    model = micro_model(tok, hidden=32, layers=2, heads=2, ffn=64)
    ids = torch.randint(3, len(tok), (3, 12), generator=torch.Generator().manual_seed(0))
    logp, entropy = token_logprobs(model, ids, skip=0, temperature=.7, entropy=True)
    logits = model(ids).logits[:, :-1] / .7
    torch.testing.assert_close(logp, utils.selective_log_softmax(logits, ids[:, 1:]))
    torch.testing.assert_close(entropy, utils.entropy_from_logits(logits))


def test_group_advantages_by_hand():
    s = torch.tensor([1., 0., 0., 0., 1., 1., 1., 1.])
    adv = P.group_advantages(s, 4)
    assert adv[4:].abs().max() < 1e-6 # a group that agrees teaches nothing
    torch.testing.assert_close(adv[:4], (s[:4] - .25) / (s[:4].std(unbiased=False) + 1e-6))


def test_whitening():
    gen = torch.Generator().manual_seed(0)
    mask = ragged_mask(5, 20, gen)
    w = P.whiten(torch.randn(5, 20, generator=gen) * 3 + 7, mask)
    on = w[mask.bool()]
    assert abs(on.mean()) < 1e-5 and abs(on.var(unbiased=False) - 1) < 1e-3 and (w[~mask.bool()] == 0).all()


def test_sft_ignores_the_query_and_the_padding():
    tok = micro_tokenizer()
    model = micro_model(tok, hidden=32, layers=2, heads=2, ffn=64)
    a, b = Example([10, 11, 12, 13, 2], 2), Example([10, 11, 12, 2], 3)
    alone = [sft_loss(model, [e]) for e in (a, b)]
    torch.testing.assert_close(sft_loss(model, [a, b]), sum(alone))
    assert [e.counted for e in (a, b)] == [3, 1]
    ids = torch.tensor([a.ids])
    want = torch.nn.functional.cross_entropy(model(ids).logits[0, 1:-1], ids[0, 2:], reduction="sum") # transformers' own shift
    torch.testing.assert_close(alone[0], want)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 50), min_size=1, max_size=200), st.integers(1, 16), st.integers(50, 400))
def test_batches_cover_everything_once(lengths, size, room):
    index = batches(len(lengths), size, random.Random(0))
    assert sorted(i for b in index for i in b) == list(range(len(lengths)))
    for b in index:
        parts = list(micro_batches(b, lengths, room))
        assert sorted(i for p in parts for i in p) == sorted(b)
        assert all(len(p) * max(lengths[i] for i in p) <= room for p in parts)


def test_shipped_bases_sample_what_they_score():
    for name in ("plain", "rich"):
        model, tok = load_model(name), load_tokenizer(name)
        engine = LlamaEngine(model, tok.eos_token_id, rows=7)
        prompts = tok(["using 3 , 4 , 5 make 17 : <think>", "using 3 , 4 make 12 : <think>"] * 10, add_special_tokens=False).input_ids
        rollouts = engine.generate(prompts, 180, 1., seeds_of(0, len(prompts)))
        assert probe(model, rollouts, 1.)[0] < 1e-3
        assert sum(r.finished and r.ids[-1] == tok.eos_token_id for r in rollouts) >= 18 # the base has learned to stop
        assert "<answer>" in tok.decode(rollouts[0].ids)


def test_stale_weights_are_seen_by_the_probe():
    tok = micro_tokenizer()
    a, b = (micro_model(tok, hidden=32, layers=2, heads=2, ffn=64, seed=s) for s in (0, 1))
    for m in (a, b):
        for p in m.parameters(): p.data *= 4
    engine = LlamaEngine(a, tok.eos_token_id)
    prompt = [tok("using 3 , 4 make 12 : <think>").input_ids]
    assert probe(b, engine.generate(prompt, 20, 1., [0]), 1.)[0] > .01
    engine.sync(weights_of(b))
    assert probe(b, engine.generate(prompt, 20, 1., [0]), 1.)[0] < 1e-4


def test_reward_reaches_the_policy():
    "Rewarding one token must make it likelier: the sign of everything at once"
    tok = micro_tokenizer()
    from stars.countdown import Problem
    import tempfile
    for estimator in P.ESTIMATORS:
        model = micro_model(tok, hidden=32, layers=1, heads=2, ffn=64)
        cfg = P.PPOConfig(steps=25, prompts=8, samples=8, minibatch=32, max_tokens=4, lr=3e-3, critic_lr=3e-3, kl_coef=0., micro_tokens=4096, estimator=estimator)
        with tempfile.TemporaryDirectory() as d:
            P.ppo(model, tok, [Problem((3, 4), 12)] * 8, d, cfg, reward=lambda text, p: text.count("7") / 4, progress=False)
            log = read_log(f"{d}/metrics.jsonl")
        assert log[-1]["reward"] > 2 * log[0]["reward"], (estimator, log[0]["reward"], log[-1]["reward"])


def test_bad_configurations_are_named():
    for cls, bad, field in ((P.PPOConfig, dict(minibatch=500), "minibatch=500"), (P.PPOConfig, dict(aggregate="mean"), "aggregate='mean'"),
                            (P.PPOConfig, dict(estimator="group", samples=1, minibatch=256, kl_coef=0.), "samples"), (P.PPOConfig, dict(estimator="group"), "kl_in"), (SFTConfig, dict(epochs=0), "epochs=0"), (SFTConfig, dict(lr=0.), "lr=0.0")):
        with pytest.raises(ValueError, match=field): cls(**bad).validate()
    for cls, bad in ((P.PPOConfig, dict(format_score=1.)), (P.PPOConfig, dict(format_score=-.1)), (P.PPOConfig, dict(kl_coef=-1e-3)), (P.PPOConfig, dict(warmup=-1)), (P.PPOConfig, dict(gamma=1.01)),
                     (P.PPOConfig, dict(lam=-.1)), (P.PPOConfig, dict(clip=0.)), (P.PPOConfig, dict(value_clip=-.5)), (P.PPOConfig, dict(max_grad_norm=0.)), (P.PPOConfig, dict(gamma=math.nan)),
                     (SFTConfig, dict(warmup=-.1)), (SFTConfig, dict(warmup=20)), (SFTConfig, dict(clip=0.))):
        with pytest.raises(ValueError, match="{}={}".format(*next(iter(bad.items())))): cls(**bad).validate()
    P.PPOConfig(format_score=0., kl_coef=0., gamma=0., lam=0., value_clip=math.inf).validate()
    SFTConfig(warmup=0., clip=math.inf).validate()
    with pytest.raises(ValueError, match="row 0 takes 14 tokens"):
        encode([dict(query="using 3 , 4 make 12 : <think>", completion=" 3 * 4 = 12")], micro_tokenizer(), max_length=8)


def test_a_task_of_ones_own_needs_nothing_of_countdown(tmp_path):
    "Problems without numbers, a reward and habits of their own, counts that leave out zeros: training, log and table"
    from collections import Counter
    from dataclasses import dataclass
    @dataclass(frozen=True)
    class Echo: word:str
    problems = [Echo(w) for w in ("using", "make", "try", "again")]
    how = dict(prompt=lambda p: f"{p.word} :", reward=lambda text, p: float(p.word in text), count=lambda text, p: Counter(re.findall("try|again", text)))
    tok = micro_tokenizer(20)
    model = micro_model(tok, hidden=32, layers=2, heads=2, ffn=64, context=64)
    log = read_log(P.ppo(model, tok, problems, tmp_path, P.PPOConfig(steps=2, prompts=4, samples=2, minibatch=8, max_tokens=8, lr=1e-3, critic_lr=1e-3, kl_coef=0., save_every=2), progress=False, **how)/"metrics.jsonl")
    assert len(log) == 2 and not any("verifications" in k for r in log for k in r)
    ask = lambda **kw: complete(LlamaEngine(model, tok.eos_token_id), tok, problems, 8, samples=8, labels=dict(model="m", condition="c", seed=0, step=0), **(how | kw))
    df = ask(count=lambda text, p: {"again": 1} if len(text) % 2 else {})
    assert set(df.word) == {p.word for p in problems} and df.again.sum() == (df.generated.str.len() % 2).sum()
    table = summarize(df, habits=["again"])
    assert table.avg_again[0] == (df.generated.str.len() % 2).mean() and table.total_again[0] == df.again.sum() and table.n[0] == 32
    with pytest.raises(ValueError, match="score"): ask(count=lambda text, p: {"score": 1})

"Losses against independent implementations, trainers against plain ones"

import json
import math
import random
import re
import warnings

import numpy as np
import pytest
import tiny
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from stars.habits.summaries import summarize
from stars.llm.requests import Request
from stars.models.checkpoints import (
    BOS,
    begin_token,
    check_steady,
    load_model,
    load_tokenizer,
    save_checkpoint,
    weights_of,
    with_begin,
)
from stars.models.heads import Actor, Critic, token_logprobs
from stars.models.micro import micro_model, micro_tokenizer
from stars.models.parallel import micro_batches, prepare
from stars.rl import ppo as P
from stars.rl.evals import Sampling, complete
from stars.rl.loops import read_log
from stars.rl.rollouts import LlamaEngine, Rollout, Task, probe, seeds_of, texts_of
from stars.rl.service import EngineService, local_service, request_text
from stars.rl.sft import Example, SFTConfig, batches, encode, sft, sft_loss
from stars.task.countdown import Problem

QUIET = P.Runtime(progress=False)


def ragged_mask(rows, time, gen):
    "Prompt, response and padding of random lengths"
    mask = torch.zeros(rows, time)
    for i in range(rows):
        a = int(torch.randint(0, time - 1, (1,), generator=gen))
        mask[i, a : int(torch.randint(a + 1, time + 1, (1,), generator=gen))] = 1
    return mask


def gae_by_definition(rewards, values, gamma, lam):
    "Σ (γλ)^l δ_{t+l}, written as the sum it is (Schulman et al. 2016, eq. 16)"
    n = len(rewards)
    delta = [rewards[t] + gamma * (values[t + 1] if t + 1 < n else 0.0) - values[t] for t in range(n)]
    return [sum((gamma * lam) ** k * delta[t + k] for k in range(n - t)) for t in range(n)]


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10**6), st.floats(0.5, 1), st.floats(0, 1))
def test_gae_is_its_definition_on_each_response(seed, gamma, lam):
    gen = torch.Generator().manual_seed(seed)
    mask = ragged_mask(4, 9, gen)
    rewards, values = (
        torch.randn(4, 9, generator=gen, dtype=torch.float64) * mask,
        torch.randn(4, 9, generator=gen, dtype=torch.float64),
    )
    adv, ret = P.gae(rewards, values, mask.double(), gamma, lam)
    for i in range(4):
        on = mask[i].bool()
        want = torch.tensor(
            gae_by_definition(rewards[i, on].tolist(), values[i, on].tolist(), gamma, lam),
            dtype=torch.float64,
        )
        torch.testing.assert_close(adv[i, on], want)
        torch.testing.assert_close(ret[i, on], want + values[i, on])
        assert (adv[i, ~on] == 0).all() and (ret[i, ~on] == 0).all()


def test_undiscounted_return_is_the_score():
    mask = torch.tensor([[0.0, 1, 1, 1, 0]])
    _, ret = P.gae(P.token_rewards(torch.tensor([0.7]), mask), torch.randn(1, 5), mask)
    torch.testing.assert_close(ret, 0.7 * mask)


def test_losses_token_by_token():
    "The formulas of the PPO paper, one scalar at a time"
    gen = torch.Generator().manual_seed(0)
    mask = ragged_mask(6, 11, gen)
    logp, old, adv, v, ov, ret = (torch.randn(6, 11, generator=gen) for _ in range(6))
    pol = val = clipped = 0.0
    for i, t in mask.nonzero().tolist():
        r = math.exp(logp[i, t] - old[i, t])
        a = adv[i, t].item()
        pol -= min(r * a, max(0.8, min(1.2, r)) * a)
        clipped += max(0.8, min(1.2, r)) * a < r * a
        vc = ov[i, t] + max(-0.5, min(0.5, (v[i, t] - ov[i, t]).item()))
        val += 0.5 * max((v[i, t] - ret[i, t]) ** 2, (vc - ret[i, t]) ** 2).item()
    loss, stats = P.policy_loss(logp, old, adv, mask, 0.2)
    torch.testing.assert_close(loss.item(), pol / mask.sum().item(), rtol=1e-5, atol=1e-6)
    assert stats["clip_frac"] == clipped
    torch.testing.assert_close(
        P.value_loss(v, ov, ret, mask, 0.5)[0].item(), val / mask.sum().item(), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize(
    "mode,want",
    [("token-mean", (1 + 2 + 3 + 10) / 4), ("sequence-mean", (2 + 10) / 2), ("constant-length", 16 / 10)],
)
def test_aggregation_modes(mode, want):
    x, mask = torch.tensor([[1.0, 2, 3], [10, 77, 77]]), torch.tensor([[1.0, 1, 1], [1, 0, 0]])
    assert P.aggregate(x, mask, mode, P.aggregate_total(mask, mode, length=5)) == pytest.approx(want)
    halves = sum(
        P.aggregate(x[i : i + 1], mask[i : i + 1], mode, P.aggregate_total(mask, mode, length=5))
        for i in (0, 1)
    )
    assert halves == pytest.approx(want)  # micro-batches add up


def tiny_learner(cfg, critic=None):
    "What `appraise` needs; the policy is not asked"
    return P.Learner(tiny.model(), critic, None, cfg)


def test_without_a_critic_the_advantage_is_the_whitened_return():
    "Scores 1, 0, 0 on responses of 1, 2 and 1 tokens: over the tokens their mean is 1/4, their variance 3/16"
    rollouts = [
        P.Rollout([5], [7], [-1.0], True),
        P.Rollout([5], [7, 8], [-1.0, -1.0], True),
        P.Rollout([5], [9], [-1.0], True),
    ]
    cfg = P.PPOConfig(prompts=3, samples=1, minibatch=3, estimator="reinforce", kl_coef=0.0, lam=0.5)
    batch, logged = P.appraise(tiny_learner(cfg), rollouts, [1.0, 0.0, 0.0])
    a, b = 0.75 / (3 / 16) ** 0.5, -0.25 / (3 / 16) ** 0.5
    torch.testing.assert_close(
        batch.advantages, torch.tensor([[a, 0.0], [b, b], [b, 0.0]]), atol=1e-5, rtol=1e-5
    )
    assert batch.ref_logp is None and "explained_variance" not in logged and "kl" not in logged


def test_kl_estimators_estimate_the_kl():
    p, q = (
        torch.distributions.Categorical(logits=torch.tensor([0.0, 1, 2])),
        torch.distributions.Categorical(logits=torch.tensor([0.5, 1, 1])),
    )
    x = torch.multinomial(p.probs, 200_000, True, generator=torch.Generator().manual_seed(0))
    true = torch.distributions.kl_divergence(p, q).item()
    for kind, tol in (("k1", 0.01), ("k3", 0.01), ("k2", 0.05)):
        est = P.kl_estimate(p.log_prob(x), q.log_prob(x), kind)
        assert est.mean().item() == pytest.approx(true, abs=tol), kind
    assert (P.kl_estimate(p.log_prob(x), q.log_prob(x), "k3") >= 0).all()


def test_trl_agrees_on_logprobs_and_entropy():
    utils = pytest.importorskip("trl.trainer.utils")
    tok = micro_tokenizer()
    model = micro_model(tok, hidden=32, layers=2, heads=2, ffn=64)
    ids = torch.randint(3, len(tok), (3, 12), generator=torch.Generator().manual_seed(0))
    logp, entropy = token_logprobs(model, ids, skip=0, temperature=0.7, entropy=True)
    logits = model(ids).logits[:, :-1] / 0.7
    torch.testing.assert_close(logp, utils.selective_log_softmax(logits, ids[:, 1:]))
    torch.testing.assert_close(entropy, utils.entropy_from_logits(logits))


def test_group_advantages_by_hand():
    s = torch.tensor([1.0, 0.0, 0.0, 0.0, 1.0, 1.0, 1.0, 1.0])
    adv = P.group_advantages(s, 4)
    assert adv[4:].abs().max() < 1e-6  # a group that agrees teaches nothing
    torch.testing.assert_close(adv[:4], (s[:4] - 0.25) / (s[:4].std(unbiased=False) + 1e-6))


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
    alone = [sft_loss(Actor(model), [e]) for e in (a, b)]
    torch.testing.assert_close(sft_loss(Actor(model), [a, b]), sum(alone))
    assert [e.counted for e in (a, b)] == [3, 1]
    ids = torch.tensor([a.ids])
    want = torch.nn.functional.cross_entropy(
        model(ids).logits[0, 1:-1], ids[0, 2:], reduction="sum"
    )  # transformers' own shift
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
        prompts = tok(
            ["using 3 , 4 , 5 make 17 : <think>", "using 3 , 4 make 12 : <think>"] * 10,
            add_special_tokens=False,
        ).input_ids
        rollouts = engine.generate(prompts, 180, 1.0, seeds_of(0, len(prompts)))
        assert probe(Actor(model), rollouts, 1.0)[0] < 1e-3
        assert (
            sum(r.finished and r.ids[-1] == tok.eos_token_id for r in rollouts) >= 18
        )  # the base has learned to stop
        assert "<answer>" in tok.decode(rollouts[0].ids)


def test_stale_weights_are_seen_by_the_probe():
    tok = micro_tokenizer()
    a, b = (micro_model(tok, hidden=32, layers=2, heads=2, ffn=64, seed=s) for s in (0, 1))
    for m in (a, b):
        for p in m.parameters():
            p.data *= 4
    engine = LlamaEngine(a, tok.eos_token_id)
    prompt = [tok("using 3 , 4 make 12 : <think>").input_ids]
    assert probe(Actor(b), engine.generate(prompt, 20, 1.0, [0]), 1.0)[0] > 0.01
    engine.sync(weights_of(b))
    assert probe(Actor(b), engine.generate(prompt, 20, 1.0, [0]), 1.0)[0] < 1e-4


def test_reward_reaches_the_policy():
    "Rewarding one token must make it likelier: the sign of everything at once"
    tok = micro_tokenizer()
    import tempfile

    from stars.task.countdown import Problem

    for estimator in P.ESTIMATORS:
        model = micro_model(tok, hidden=32, layers=1, heads=2, ffn=64)
        cfg = P.PPOConfig(
            steps=25,
            prompts=8,
            samples=8,
            minibatch=32,
            max_tokens=4,
            lr=3e-3,
            critic_lr=3e-3,
            kl_coef=0.0,
            micro_tokens=4096,
            estimator=estimator,
        )
        with tempfile.TemporaryDirectory() as d:
            P.ppo(
                model,
                tok,
                [Problem((3, 4), 12)] * 8,
                d,
                cfg,
                Task(reward=lambda text, p: text.count("7") / 4),
                runtime=QUIET,
            )
            log = read_log(f"{d}/metrics.jsonl")
        assert log[-1]["reward"] > 2 * log[0]["reward"], (estimator, log[0]["reward"], log[-1]["reward"])


def test_bad_configurations_are_named():
    for cls, bad, field in (
        (P.PPOConfig, dict(minibatch=500), "minibatch=500"),
        (P.PPOConfig, dict(aggregate="mean"), "aggregate='mean'"),
        (P.PPOConfig, dict(estimator="group", samples=1, minibatch=256, kl_coef=0.0), "samples"),
        (P.PPOConfig, dict(estimator="group"), "kl_in"),
        (SFTConfig, dict(epochs=0), "epochs=0"),
        (SFTConfig, dict(lr=0.0), "lr=0.0"),
    ):
        with pytest.raises(ValueError, match=field):
            cls(**bad).validate()
    for cls, bad in (
        (P.PPOConfig, dict(format_score=1.0)),
        (P.PPOConfig, dict(format_score=-0.1)),
        (P.PPOConfig, dict(kl_coef=-1e-3)),
        (P.PPOConfig, dict(warmup=-1)),
        (P.PPOConfig, dict(gamma=1.01)),
        (P.PPOConfig, dict(lam=-0.1)),
        (P.PPOConfig, dict(clip=0.0)),
        (P.PPOConfig, dict(value_clip=-0.5)),
        (P.PPOConfig, dict(max_grad_norm=0.0)),
        (P.PPOConfig, dict(gamma=math.nan)),
        (SFTConfig, dict(warmup=-0.1)),
        (SFTConfig, dict(warmup=20)),
        (SFTConfig, dict(clip=0.0)),
    ):
        with pytest.raises(ValueError, match="{}={}".format(*next(iter(bad.items())))):
            cls(**bad).validate()
    P.PPOConfig(format_score=0.0, kl_coef=0.0, gamma=0.0, lam=0.0, value_clip=math.inf).validate()
    SFTConfig(warmup=0.0, clip=math.inf).validate()
    with pytest.raises(ValueError, match="row 0 takes 14 tokens"):
        encode(
            [dict(query="using 3 , 4 make 12 : <think>", completion=" 3 * 4 = 12")],
            micro_tokenizer(),
            max_length=8,
        )


def test_a_task_of_ones_own_needs_nothing_of_countdown(tmp_path):
    "Problems without numbers, rewards and habits of their own, counts without zeros: training, log and table"
    from collections import Counter
    from dataclasses import dataclass, replace

    @dataclass(frozen=True)
    class Echo:
        word: str

    problems = [Echo(w) for w in ("using", "make", "try", "again")]
    task = Task(
        prompt=lambda p: f"{p.word} :",
        reward=lambda text, p: float(p.word in text),
        count=lambda text, p: Counter(re.findall("try|again", text)),
    )
    tok = micro_tokenizer(20)
    model = micro_model(tok, hidden=32, layers=2, heads=2, ffn=64, context=64)
    log = read_log(
        P.ppo(
            model,
            tok,
            problems,
            tmp_path,
            P.PPOConfig(
                steps=2,
                prompts=4,
                samples=2,
                minibatch=8,
                max_tokens=8,
                lr=1e-3,
                critic_lr=1e-3,
                kl_coef=0.0,
                save_every=2,
            ),
            task,
            runtime=QUIET,
        )
        / "metrics.jsonl"
    )
    assert len(log) == 2 and not any("verifications" in k for r in log for k in r)

    def ask(count):
        engine, labels = LlamaEngine(model, tok.eos_token_id), dict(model="m", condition="c", seed=0, step=0)
        return complete(engine, tok, problems, Sampling(8, samples=8), replace(task, count=count), labels)

    df = ask(lambda text, p: {"again": 1} if len(text) % 2 else {})
    assert set(df.word) == {p.word for p in problems} and df.again.sum() == (df.generated.str.len() % 2).sum()
    table = summarize(df, habits=["again"])
    assert (
        table.avg_again[0] == (df.generated.str.len() % 2).mean()
        and table.total_again[0] == df.again.sum()
        and table.n[0] == 32
    )
    with pytest.raises(ValueError, match="score"):
        ask(lambda text, p: {"score": 1})


# What a response says

ANSWER = "3 * 4 = 12. </think> <answer> 3 * 4 </answer>"
TAGS = ["<think>", "</think>", "<answer>", "</answer>"]
TWELVE = Problem((3, 4), 12)


def special(how):
    "A tokenizer to which tags are special tokens"
    tok = micro_tokenizer(20)
    if how == "added":
        tok.add_tokens([AddedToken(t, special=True) for t in TAGS])
    if how == "named":
        tok.add_special_tokens(dict(additional_special_tokens=TAGS))
    if how == "one":
        tok.add_special_tokens(dict(additional_special_tokens=["</answer>"]))
    if how == "end":
        tok.add_special_tokens(dict(eos_token="</answer>"))
    if how == "roles":
        tok.add_special_tokens(dict(cls_token="<answer>", sep_token="</answer>"))
    return tok


class Says:
    "An engine that has one thing to say"

    shared, dtype = True, None

    def __init__(self, tok, text, finished=True):
        self.ids, self.finished = tok(text, add_special_tokens=False).input_ids, finished

    def generate(self, prompts, max_tokens, temperature, seeds):
        return [Rollout(list(p), self.ids, [-1.0] * len(self.ids), self.finished) for p in prompts]

    def sync(self, weights):
        list(weights)

    def sleep(self, keep=True):
        pass


@pytest.mark.parametrize("how", ["plain", "added", "named", "one", "end", "roles"])
def test_tags_that_are_special_tokens_are_read(how, tmp_path):
    "In the evaluation, in RL, and by whoever asks a checkpoint; what means nothing is left out as ever"
    tok, plain = special(how), micro_tokenizer(20)
    said = f"{ANSWER}" if how == "end" else f"{ANSWER} <pad> <unk> <eos>"
    assert tok.decode(tok(said).input_ids, skip_special_tokens=True).count("<") == {
        "plain": 3,
        "one": 2,
        "end": 2,
        "roles": 1,
    }.get(how, 0)
    df = complete(Says(tok, said), tok, [TWELVE], Sampling(30))
    assert df.score.tolist() == [1.0] and df.generated[0] == plain.decode(plain(ANSWER).input_ids)
    cfg = P.PPOConfig(steps=1, prompts=1, samples=2, minibatch=2, kl_coef=0.0, micro_tokens=4096)
    runtime = P.Runtime(Says(tok, said), progress=False)
    P.ppo(micro_model(tok, 32, 1, 2, 64), tok, [TWELVE], tmp_path, cfg, runtime=runtime)
    assert read_log(tmp_path / "metrics.jsonl")[0]["accuracy"] == 1.0
    (reply,) = EngineService(Says(tok, said), tok).answer_all([Request("3 * 4", max_tokens=9)], ["0" * 16])
    assert reply.text == df.generated[0] and reply.finish == "stop"


def test_other_special_tokens_are_words_like_others():
    "A reward of one's own may read them; what ended the response is no part of it, unless it is a word"
    tok = micro_tokenizer(20)
    tok.add_special_tokens(dict(additional_special_tokens=["<|solution|>", "<|end|>"]))
    words = "<|solution|> 3 * 4 <|end|>"
    for finished, want in ((True, "<|solution|> 3 * 4"), (False, words)):
        assert texts_of(tok, Says(tok, words, finished).generate([[5]], 9, 1.0, [0])) == [want]
    assert texts_of(tok, Says(tok, "3 * 4").generate([[5]], 9, 1.0, [0])) == [
        "3 * 4"
    ]  # ended by a plain word, or by an engine of one's own


def test_a_tokenizer_that_spoils_the_tags_is_refused(tmp_path):
    "Before anything is sampled; a reward of one's own may do with what there is"
    words = [
        "<pad>",
        "<unk>",
        "<eos>",
        *"<>/",
        "think",
        "answer",
        *map(str, range(20)),
        *"*=.,:",
        "using",
        "make",
    ]
    tok = Tokenizer(WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    tok.pre_tokenizer, tok.decoder = (
        pre_tokenizers.Sequence([pre_tokenizers.Whitespace(), pre_tokenizers.Punctuation()]),
        decoders.WordPiece(cleanup=False),
    )
    tok = PreTrainedTokenizerFast(
        tokenizer_object=tok, pad_token="<pad>", unk_token="<unk>", eos_token="<eos>"
    )
    model, cfg = (
        micro_model(tok, 32, 1, 2, 64),
        P.PPOConfig(steps=1, prompts=1, samples=2, minibatch=2, max_tokens=4, kl_coef=0.0, micro_tokens=4096),
    )
    for train in (
        lambda **how: complete(LlamaEngine(model, tok.eos_token_id), tok, [TWELVE], Sampling(4), **how),
        lambda **how: P.ppo(model, tok, [TWELVE], tmp_path, cfg, runtime=QUIET, **how),
    ):
        with pytest.raises(ValueError, match="every reward would be 0"):
            train()
        train(task=Task(reward=lambda text, problem: float("12" in text)))


# Where a response ends


def sharp(tok, seed=3, **how):
    "A random model whose greedy responses differ"
    model = micro_model(tok, 64, 2, 2, 128, seed=seed)
    for p in model.parameters():
        p.data *= 3
    return model


def by_generate(model, prompt, n):
    "A greedy response by transformers"
    out = model.generate(
        torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)), max_new_tokens=n, do_sample=False
    )
    return out[0, len(prompt) :].tolist()


@pytest.fixture(scope="module")
def talk():
    "A model, prompts, and two words that it often says"
    tok = micro_tokenizer(30)
    prompts = tok(
        [f"using {a} , {b} make {a + b} : <think>" for a in range(1, 7) for b in range(7, 10)]
    ).input_ids
    said = [i for p in prompts for i in by_generate(sharp(tok), p, 30)[3:]]
    return tok, prompts, sorted(set(said), key=said.count)[-2:]


@pytest.mark.parametrize("where", ["generation", "generation-list", "config", "both", "both-apart", "given"])
def test_every_end_of_a_checkpoint_ends_a_response(talk, where, tmp_path):
    "Those of generation_config.json, config.json and the tokenizer: the ids of transformers, and what is cut"
    tok, prompts, (a, b) = talk
    model, given = sharp(tok), tok.eos_token_id
    if where == "generation":
        model.generation_config.eos_token_id = a  # the tokenizer's own goes on to end a response
    if where == "generation-list":
        model.generation_config.eos_token_id = [2, a, b]
    if where == "config":
        model.config.eos_token_id = [2, a]
    if where == "both":
        model.config.eos_token_id, model.generation_config.eos_token_id = 2, [a, 2]
    if where == "both-apart":
        model.config.eos_token_id, model.generation_config.eos_token_id = a, [b]
    if where == "given":
        given = [2, a, b]
    ends = {"generation-list": [2, a, b], "both-apart": [2, a, b], "given": [2, a, b]}.get(where, [2, a])
    loaded = load_model(save_checkpoint(model, tok, tmp_path / "model"))
    whole = sharp(tok)
    whole.generation_config.eos_token_id = ends
    want = [by_generate(whole, p, 30) for p in prompts]
    for m in (model, loaded):
        got = LlamaEngine(m, given, rows=5).generate(prompts, 30, 0.0)
        assert [r.ids for r in got] == want and [r.finished for r in got] == [w[-1] in ends for w in want]
    assert sum(r.finished for r in got) > 0
    if where != "given" and "both" not in where:
        assert [
            by_generate(loaded, p, 30) for p in prompts
        ] == want  # whoever else samples from what was saved


def test_sampled_responses_end_there_too_and_are_not_called_cut(talk, tmp_path):
    tok, prompts, (a, _) = talk
    model = sharp(tok)
    model.generation_config.eos_token_id = [2, a]
    drawn = LlamaEngine(model, tok.eos_token_id, rows=4).generate(prompts, 30, 1.0, seeds_of(0, len(prompts)))
    for r in drawn:
        assert not {2, a} & set(r.ids[:-1]) and r.finished == (r.ids[-1] in (2, a))
    problems = [Problem((3, n), 12) for n in range(4, 9)]
    df = complete(LlamaEngine(model, tok.eos_token_id), tok, problems, Sampling(30, samples=4))
    cfg = P.PPOConfig(
        steps=1, prompts=5, samples=4, minibatch=20, max_tokens=30, kl_coef=0.0, micro_tokens=4096
    )
    log = read_log(P.ppo(model, tok, problems, tmp_path / "run", cfg, runtime=QUIET) / "metrics.jsonl")
    assert df.truncated.mean() < 0.8 and log[0]["truncated"] < 0.8  # with the tokenizer's alone, nearly all
    _, service = local_service(save_checkpoint(model, tok, tmp_path / "model"))
    replies = service.answer_all(
        [Request(tok.decode(p), max_tokens=30) for p in prompts], [f"{i:016x}" for i in range(len(prompts))]
    )
    assert sum(r.finish == "stop" for r in replies) > len(prompts) / 2


def test_a_completion_that_says_how_it_ends_gets_no_second_end(tmp_path):
    "Neither the tokenizer's nor another of the model's; any other completion ends with the tokenizer's"
    tok = micro_tokenizer(20)
    tok.add_special_tokens(dict(additional_special_tokens=["<|turn|>"]))
    turn, rows = (
        tok.convert_tokens_to_ids("<|turn|>"),
        [dict(query="3 + 4 =", completion=c) for c in ("7", "7 <eos>", "7 <|turn|>", "7 <|turn|> 8", "")],
    )
    assert [e.ids[3:] for e in encode(rows, tok, ends=[turn])] == [
        tok(f"= {t}").input_ids for t in ("7 <eos>", "7 <eos>", "7 <|turn|>", "7 <|turn|> 8 <eos>", "<eos>")
    ]
    assert encode(rows, tok)[2].ids[-2:] == [
        turn,
        tok.eos_token_id,
    ]  # nobody has said that it ends a response
    model = micro_model(tok, 16, 1, 2, 32)
    model.generation_config.eos_token_id = [2, turn]
    sft(
        model,
        tok,
        rows[2:3],
        tmp_path,
        SFTConfig(epochs=1, batch_size=1, max_length=8, micro_tokens=8),
        runtime=QUIET,
    )
    state = json.loads(next(tmp_path.glob("state-*/state.json")).read_text())
    assert state["made_by"]["tokens"] == 6  # four of the query, 7, and its end


# Weights


def edited(folder, change=lambda w: None, model=None, **config):
    "A checkpoint with other weights in its file, and another config"
    tok = micro_tokenizer(20)
    file = save_checkpoint(model or micro_model(tok, 32, 2, 2, 64), tok, folder) / "model.safetensors"
    weights = load_file(file)
    change(weights)
    save_file(weights, file, dict(format="pt"))
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | config))
    return folder


def untied():
    "A Llama with a head of its own"
    config = micro_model(micro_tokenizer(20), 32, 2, 2, 64).config
    config.tie_word_embeddings = False
    return AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize(
    "change,config,said",
    [
        (
            None,
            dict(tie_word_embeddings=False),
            "no lm_head.weight.*random numbers.*or set tie_word_embeddings=true",
        ),
        (lambda w: w.pop("model.layers.1.mlp.up_proj.weight"), {}, "no model.layers.1.mlp.up_proj.weight"),
        (lambda w: w.pop("model.embed_tokens.weight"), {}, "no .*model.embed_tokens.weight"),
        (lambda w: w.pop("model.norm.weight"), {}, "no model.norm.weight"),
        (None, dict(num_hidden_layers=3), "no model.layers.2.* and 6 more"),
        (None, dict(attention_bias=True), "no model.layers.0.self_attn.k_proj.bias"),
        (None, dict(num_hidden_layers=1), "holds model.layers.1.*has no place"),
        (
            lambda w: w.update({"model.layers.0.self_attn.q_proj.bias": torch.ones(32)}),
            {},
            "holds model.layers.0.self_attn.q_proj.bias",
        ),
        (lambda w: w.update({"score.weight": torch.ones(2, 32)}), {}, "holds score.weight"),
        (
            lambda w: [w.update({n.replace("model.", "body."): w.pop(n)}) for n in list(w)],
            {},
            "holds no lm_head.*It holds instead body.embed_tokens.weight",
        ),
        (
            lambda w: w.update({"lm_head.weight": torch.ones(len(micro_tokenizer(20)), 32)}),
            {},
            "tie_word_embeddings=true.*differs from the embedding",
        ),
        (None, dict(intermediate_size=65), r"\(32, 64\), config.json asks for \(32, 65\)"),
        (None, dict(vocab_size=99), r"embed_tokens.weight is \(\d+, 32\), config.json asks for \(99, 32\)"),
    ],
    ids=str,
)
def test_a_checkpoint_holds_its_weights_and_no_others(tmp_path, change, config, said):
    with pytest.raises(ValueError, match=said):
        load_model(edited(tmp_path / "model", change or (lambda w: None), **config))


def test_whole_checkpoints_are_as_welcome_as_ever(tmp_path):
    "Tied, untied, tied and written out under both names, with what old checkpoints hold and nobody needs"

    def both(weights):
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()

    def old(weights):
        weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)

    for i, how in enumerate((dict(), dict(model=untied()), dict(change=both), dict(change=old))):
        model = load_model(edited(tmp_path / f"{i}", **how))
        assert (model.lm_head.weight is model.model.embed_tokens.weight) == (i != 1)
        LlamaEngine(model, 2).generate([[5, 6]], 3, 0.0)


def test_a_head_that_is_not_tied_after_all_is_no_surprise_for_the_sampler():
    model = untied()
    model.config.tie_word_embeddings = True
    with pytest.raises(ValueError, match="tie_word_embeddings=true, but lm_head.weight is not the embedding"):
        LlamaEngine(model, 2)
    with torch.no_grad():
        model.lm_head.weight.copy_(model.model.embed_tokens.weight)  # the same numbers, twice in memory
    LlamaEngine(model, 2)


# Cut responses


def batch_of(scores, finished, estimator="group", lengths=None, values=None, **how):
    "Advantages of one prompt's responses, one number each, and what is logged"
    n, lengths = len(scores), lengths or [2] * len(scores)
    rollouts = [P.Rollout([5], list(range(7, 7 + k)), [-1.0] * k, f) for k, f in zip(lengths, finished)]
    cfg = P.PPOConfig(
        prompts=1, samples=n, minibatch=n, estimator=estimator, kl_coef=0.0, mask_truncated=True, **how
    )
    batch, logged = P.appraise(tiny_learner(cfg, critic=values), rollouts, scores)
    assert (batch.advantages * (1 - batch.mask) == 0).all() and batch.advantages.isfinite().all()
    return batch, logged


@pytest.mark.parametrize(
    "scores,finished",
    [
        ([1.0, 0.1, 0.1, 1.0], [False, True, True, True]),
        ([1.0, 0.1, 0.1, 1.0], [True, True, True, False]),
        ([0.0, 0.0, 1.0, 1.0], [False, True, True, False]),
        ([0.1, 1.0, 0.1, 0.1], [True, False, True, True]),
        ([1.0, 0.0, 0.1, 1.0], [True] * 4),
    ],
)
def test_cut_responses_leave_the_group(scores, finished):
    "Mean and deviation are those of the others"
    batch, _ = batch_of(scores, finished)
    kept = np.array([s for s, f in zip(scores, finished) if f])
    want = iter((kept - kept.mean()) / (kept.std() + 1e-6))
    expected = [next(want) if f else 0.0 for f in finished]
    np.testing.assert_allclose(batch.advantages[:, 0], expected, atol=1e-5)
    assert batch.mask.sum(-1).tolist() == [2.0 * f for f in finished]


@pytest.mark.parametrize("left", [0, 1])
def test_a_group_with_nobody_to_compare_with_teaches_nothing(left):
    batch, _ = batch_of([1.0, 0.1, 0.1, 1.0], [True] * left + [False] * (4 - left))
    assert (batch.advantages == 0).all()
    assert P.group_advantages(torch.tensor([1.0, 0.1, 0.5, 0.0]), 2, kept=torch.tensor([0, 1, 1, 1]))[
        :2
    ].tolist() == [0, 0]  # the group beside it does


def test_without_groups_cut_responses_are_no_part_of_the_whitening_either():
    scores, finished = [1.0, 0.1, 0.1, 1.0], [False, True, True, True]
    batch, _ = batch_of(scores, finished, "reinforce", lengths=[5, 1, 2, 3])
    tokens = np.repeat(scores[1:], [1, 2, 3])
    np.testing.assert_allclose(
        batch.advantages[batch.mask.bool()], (tokens - tokens.mean()) / tokens.std(), atol=1e-5
    )
    batch, _ = batch_of(scores, [False] * 4, "reinforce")
    assert (batch.advantages == 0).all()


def test_a_critic_is_judged_by_responses_that_count():
    tok = micro_tokenizer(20)
    critic = Critic.from_policy(micro_model(tok, 16, 1, 2, 32))
    torch.nn.init.normal_(critic.head.weight, generator=torch.Generator().manual_seed(0))
    some = [
        batch_of([1.0, 0.1, 0.1, 1.0], f, "gae", values=critic)
        for f in ([False, True, True, True], [False] * 4)
    ]
    alone = batch_of([0.1, 0.1, 1.0], [True] * 3, "gae", values=critic)
    assert (
        some[0][1]["explained_variance"] == pytest.approx(alone[1]["explained_variance"], abs=1e-4)
        and some[1][1]["explained_variance"] == 0
    )
    torch.testing.assert_close(some[0][0].advantages[1:], alone[0].advantages)


@pytest.mark.parametrize("mode", P.AGGREGATES)
def test_a_loss_over_responses_does_not_count_cut_ones(mode):
    "The loss of a minibatch is that of the same minibatch without them"
    gen = torch.Generator().manual_seed(0)
    x, mask = (
        torch.randn(4, 6, generator=gen),
        torch.tensor([[1.0, 1, 1, 0, 0, 0], [0] * 6, [0, 1, 1, 1, 1, 0], [0] * 6]),
    )

    def total(mask):
        return P.aggregate_total(mask, mode, length=6)

    torch.testing.assert_close(
        P.aggregate(x, mask, mode, total(mask)),
        P.aggregate(x[[0, 2]], mask[[0, 2]], mode, total(mask[[0, 2]])),
    )
    assert P.aggregate(x, 0 * mask, mode, total(0 * mask)) == 0


@pytest.mark.parametrize("estimator", P.ESTIMATORS)
def test_a_run_in_which_every_response_is_cut_stays_finite(estimator, tmp_path):
    tok = micro_tokenizer(20)
    cfg = P.PPOConfig(
        steps=2,
        prompts=2,
        samples=2,
        minibatch=4,
        max_tokens=1,
        lr=1e-3,
        kl_coef=0.0,
        micro_tokens=4096,
        estimator=estimator,
        mask_truncated=True,
    )
    model = micro_model(tok, 32, 1, 2, 64)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    log = read_log(
        P.ppo(model, tok, [TWELVE] * 2, tmp_path, cfg, Task(reward=lambda *_: 1.0), runtime=QUIET)
        / "metrics.jsonl"
    )
    assert all(math.isfinite(v) for r in log for v in r.values()) and [r["truncated"] for r in log] == [
        1.0,
        1.0,
    ]
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


# The same numbers twice

NOISY = dict(
    llama=dict(attention_dropout=0.5),
    qwen2=dict(attention_dropout=0.5),
    gpt2=dict(),
    gpt_neox=dict(attention_dropout=0.3, hidden_dropout=0.3),
    opt=dict(dropout=0.3, layerdrop=0.5),
    falcon=dict(hidden_dropout=0.4, attention_dropout=0.3),
    phi=dict(resid_pdrop=0.3, embd_pdrop=0.3),
    mixtral=dict(router_jitter_noise=0.5, num_local_experts=4),
    bart=dict(dropout=0.3, activation_dropout=0.3, decoder_layerdrop=0.4, is_decoder=True),
)
SHAPE = dict(
    gpt2=dict(n_embd=32, n_layer=2, n_head=2),
    opt=dict(hidden_size=32, ffn_dim=64, word_embed_proj_dim=32, num_attention_heads=2, num_hidden_layers=2),
    bart=dict(d_model=32, decoder_layers=2, decoder_attention_heads=2, decoder_ffn_dim=64),
    falcon=dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2),
)
LIKE_LLAMA = dict(
    hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2
)


@pytest.mark.parametrize("kind", NOISY)
def test_nothing_random_is_left_in_a_model_that_is_trained(kind):
    "Dropout of every name, as modules, functions and settings, skipped blocks, noise before a router"
    config = transformers.AutoConfig.for_model(
        kind, vocab_size=60, **SHAPE.get(kind, LIKE_LLAMA), **NOISY[kind]
    )
    torch.manual_seed(0)
    model, ids = (
        AutoModelForCausalLM.from_config(config, attn_implementation="eager"),
        torch.arange(2, 30)[None],
    )
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(3)
    want = model.eval()(ids, use_cache=False).logits
    with pytest.raises(ValueError, match="draws random numbers"):
        check_steady(model.train())
    with pytest.warns(UserWarning, match="set to 0"):
        prepare(model)
    assert model.training
    for _ in range(4):
        torch.testing.assert_close(model(ids, use_cache=False).logits, want)
    with warnings.catch_warnings(action="error"):
        prepare(model)  # nothing more to say


def dropping(rate=0.3):
    "A micro model with dropout, in training mode"
    model = tiny.model()
    model.config.attention_dropout = rate
    for block in model.model.layers:
        block.self_attn.attention_dropout = rate
    return model.train()


def test_trainers_turn_dropout_off_by_themselves(tmp_path):
    "SFT and PPO of a model that has it are those of one that has not, log by log"
    runs = {}
    for name, make in dict(without=lambda: tiny.model().train(), having=dropping).items():
        with warnings.catch_warnings(action="ignore"):
            sft(
                make(),
                tiny.TOK,
                tiny.ROWS,
                tmp_path / f"{name}-sft",
                SFTConfig(**tiny.SFT),
                tiny.ROWS[:5],
                QUIET,
            )
            P.ppo(
                make(),
                tiny.TOK,
                tiny.PROBLEMS,
                tmp_path / f"{name}-ppo",
                P.PPOConfig(**tiny.PPO),
                Task(reward=tiny.fingerprint),
                reference=tiny.model,
                runtime=QUIET,
            )
        runs[name] = [tiny.untimed(tmp_path / f"{name}-{kind}") for kind in ("sft", "ppo")]
    assert runs["without"] == runs["having"] and runs["having"][1][0]["rollout_gap"] < 1e-4
    assert json.loads((tmp_path / "having-sft/model/config.json").read_text())["attention_dropout"] == 0


def test_randomness_of_another_kind_is_refused(tmp_path):
    class Noise(torch.nn.Module):
        def forward(self, x):
            return x + torch.rand_like(x) if self.training else x

    model = tiny.model().train()
    model.model.norm = torch.nn.Sequential(model.model.norm, Noise())
    with pytest.raises(ValueError, match="draws random numbers in training"):
        sft(model, tiny.TOK, tiny.ROWS, tmp_path / "sft", SFTConfig(**tiny.SFT), runtime=QUIET)
    with pytest.raises(ValueError, match="draws random numbers in training"):
        P.ppo(
            model.train(),
            tiny.TOK,
            tiny.PROBLEMS,
            tmp_path / "ppo",
            P.PPOConfig(**tiny.PPO),
            reference=tiny.model,
            runtime=P.Runtime(Says(tiny.TOK, "3"), progress=False),
        )


# What is the caller's


@pytest.mark.parametrize("fails", [False, True], ids=["ends", "fails"])
def test_training_and_sampling_leave_the_process_as_it_was(tmp_path, fails):
    torch.set_num_threads(2)
    before, calls = tiny.state_of_process(), iter(range(4 if fails else 10**6))

    def reward(text, problem):
        if next(calls, None) is None:
            raise KeyError("enough")
        return tiny.fingerprint(text, problem)

    def do(what):
        try:
            what()
        except KeyError:
            assert fails
        after = tiny.state_of_process()
        assert not (changed := [k for k in before if before[k] != after[k]]), changed

    try:
        for remat in (False, True):
            do(
                lambda: sft(
                    prepare(tiny.model(), remat, 2),
                    tiny.TOK,
                    tiny.ROWS,
                    tmp_path / f"sft{remat}",
                    SFTConfig(**tiny.SFT),
                    tiny.ROWS[:5],
                    QUIET,
                )
            )
            do(
                lambda: P.ppo(
                    prepare(tiny.model(), remat),
                    tiny.TOK,
                    tiny.PROBLEMS,
                    tmp_path / f"ppo{remat}",
                    P.PPOConfig(**tiny.PPO | dict(bf16=remat)),
                    Task(reward=reward),
                    reference=tiny.model,
                    runtime=QUIET,
                )
            )
        do(
            lambda: complete(
                LlamaEngine(tiny.model(), 2), tiny.TOK, tiny.PROBLEMS, Sampling(8), Task(reward=reward)
            )
        )
        do(lambda: local_service("plain")[1].answer_all([Request("3 + 4 =", max_tokens=4)], ["0" * 16]))
    finally:
        torch.set_num_threads(1)


# How a prompt begins


def beginning(by_itself, token="<s>"):
    "A tokenizer with a token for the beginning of a text, which it gives by itself or not"
    tok = micro_tokenizer(20)
    tok.add_special_tokens(dict(bos_token=token))
    if by_itself:
        from tokenizers.processors import TemplateProcessing

        tok._tokenizer.post_processor = TemplateProcessing(
            single=f"{token} $A", special_tokens=[(token, tok.bos_token_id)]
        )
    return tok


def test_a_prompt_begins_with_the_tokenizers_token_where_it_is_asked_for():
    by_itself, could, has_none = beginning(True), beginning(False), micro_tokenizer(20)
    assert [[begin_token(t, bos) for bos in BOS] for t in (by_itself, could)] == [
        ["", "<s>", "<s>"],
        ["", "", "<s>"],
    ]
    assert [begin_token(has_none, bos) for bos in ("none", "auto")] == ["", ""]
    with pytest.raises(ValueError, match="bos='always': the tokenizer has no bos_token"):
        begin_token(has_none, "always")
    with pytest.raises(ValueError, match="bos='yes' is unknown; choose one of none, auto, always"):
        begin_token(could, "yes")
    text = "using 3 , 4 make 12 : <think>"
    for t in (by_itself, could):
        prompt = with_begin(text, "<s>")
        assert (
            t(prompt, add_special_tokens=False).input_ids
            == [t.bos_token_id, *t(text, add_special_tokens=False).input_ids]
            and with_begin(prompt, "<s>") == prompt
        )
    assert with_begin(text, "") == text


def test_a_checkpoint_that_is_asked_begins_as_its_tokenizer_does(tmp_path):
    "A text, a chat whose template writes the token, and one whose template does not"
    tok = beginning(True)

    def begins(bos="auto"):
        service = EngineService(Says(tok, "3"), tok, bos=bos)
        return request_text(Request("3 + 4"), tok, service.begin)

    assert begins() == "<s>3 + 4\n" and begins("none") == "3 + 4\n"
    tok.chat_template = "{{ bos_token }}{{ messages[0].content }} :"
    assert begins() == begins("none") == "<s>3 + 4 :"
    tok.chat_template = "{{ messages[0].content }} :"
    assert begins() == "<s>3 + 4 :" and begins("none") == "3 + 4 :"

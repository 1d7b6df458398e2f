"Log-probabilities and values: without padding, without keeping logits, the same numbers"

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import scaled_dot_product_attention
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from stars.models.checkpoints import load_model, load_tokenizer
from stars.models.heads import Actor, Critic, chosen_in_pieces, flat_states, has_plain_head
from stars.rl.loops import read_log
from stars.rl.sft import SFTConfig, sft

SIZES = dict(vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
SIZES |= dict(num_key_value_heads=2, head_dim=8, pad_token_id=0, bos_token_id=1, eos_token_id=2)
FAMILIES = dict(
    llama=(LlamaForCausalLM, LlamaConfig(**SIZES)),
    tied=(LlamaForCausalLM, LlamaConfig(**SIZES, tie_word_embeddings=True)),
    qwen3=(Qwen3ForCausalLM, Qwen3Config(**SIZES)),
    gemma2=(Gemma2ForCausalLM, Gemma2Config(**SIZES, final_logit_softcapping=0.05)),
    granite=(GraniteForCausalLM, GraniteConfig(**SIZES, logits_scaling=8.0)),
)


def made(name, attention="sdpa"):
    torch.manual_seed(0)
    family, config = FAMILIES[name]
    return family._from_config(config, attn_implementation=attention)


def varlen(module, query, key, value, mask, cu_seq_lens_q=None, max_length_q=None, scaling=None, **how):
    "What flash-attn computes, sequence by sequence: [1, heads, tokens, size] → [1, tokens, heads, size]"
    assert mask is None
    bounds = [0, query.shape[2]] if cu_seq_lens_q is None else cu_seq_lens_q.tolist()
    if cu_seq_lens_q is not None:
        assert len(query) == 1 and max_length_q == max(b - a for a, b in zip(bounds, bounds[1:]))
        assert (how["cu_seq_lens_k"] == cu_seq_lens_q).all() and how["max_length_k"] == max_length_q
    parts = [
        scaled_dot_product_attention(
            query[:, :, a:b], key[:, :, a:b], value[:, :, a:b], is_causal=True, scale=scaling, enable_gqa=True
        )
        for a, b in zip(bounds, bounds[1:])
    ]
    return torch.cat(parts, 2).transpose(1, 2), None


@pytest.fixture
def flash(monkeypatch):
    "flash-attn as transformers calls it, with PyTorch's arithmetic"
    seen = []

    def watched(module, query, *args, **how):
        seen.append(tuple(query.shape[i] for i in (0, 2)))
        return varlen(module, query, *args, **how)

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "flash_attention_2", watched)

    def switch(model):
        model.config._attn_implementation = "flash_attention_2"
        return model

    switch.seen = seen  # rows and tokens of each call
    return switch


rows = st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=3), min_size=1, max_size=4)


@settings(max_examples=30, deadline=None)
@given(rows)
def test_a_batch_in_one_row_has_the_states_of_the_padded_batch(parts):
    "Each row is several sequences that are packed"
    body, lengths = made("llama").model, [sum(row) for row in parts]
    time = max(lengths)
    ids = torch.randint(3, 61, (len(parts), time))
    own = torch.tensor([[t for n in row for t in range(n)] + [0] * (time - sum(row)) for row in parts])
    real = (torch.arange(time) < torch.tensor(lengths)[:, None])[..., None]
    with torch.no_grad():
        flat = flat_states(body, ids, lengths, own)
        cut = [(ids[i : i + 1, :n], own[i : i + 1, :n]) for i, n in enumerate(lengths)]
        alone = [body(row, position_ids=at, use_cache=False) for row, at in cut]
    assert (flat * ~real == 0).all()
    for row, want, n in zip(flat, alone, lengths):
        torch.testing.assert_close(row[:n], want.last_hidden_state[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_flash_attention_gets_no_padding_and_gives_the_same_numbers(flash, name):
    ids, lengths = torch.randint(3, 61, (3, 12)), [5, 12, 7]
    counted = torch.arange(11) < torch.tensor(lengths)[:, None] - 1
    model = made(name)
    out = []
    for attention in ("sdpa", "flash"):
        net = Actor(model if attention == "sdpa" else flash(made(name)))
        logp, entropy = net(ids, 2, 0.7, entropy=True, lengths=lengths)
        ((logp - entropy) * counted[:, 2:]).sum().backward()
        assert attention == "sdpa" or (1, sum(lengths)) in flash.seen and (3, 12) not in flash.seen
        out.append([logp * counted[:, 2:], entropy * counted[:, 2:], *(p.grad for p in net.parameters())])
    for a, b in zip(*out):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    critics = [Critic.from_policy(m) for m in (model, flash(made(name)))]
    for critic in critics:
        torch.nn.init.ones_(critic.head.weight)
    values = [critic(ids, lengths)[:, :-1] * counted for critic in critics]
    torch.testing.assert_close(*values, rtol=1e-4, atol=1e-5)


def test_packed_fine_tuning_with_flash_attention_learns_the_same(flash, tmp_path):
    rows_ = [
        dict(query=f"using {i % 9} , 4 make 12 : <think>", completion=f" {i % 9} + 4 </think>")
        for i in range(24)
    ]
    cfg = SFTConfig(epochs=2, batch_size=4, micro_tokens=256, max_length=64, packing=True, lr=1e-3)
    losses = []
    for name in ("sdpa", "flash"):
        model = load_model("plain")
        model.set_attn_implementation("sdpa")
        model = flash(model) if name == "flash" else model
        sft(model, load_tokenizer("plain"), rows_, tmp_path / name, cfg, rows_[:4])
        losses.append(
            [(r["loss"], r.get("val_loss", 0.0)) for r in read_log(tmp_path / name / "metrics.jsonl")]
        )
    assert losses[0] == [pytest.approx(pair, rel=1e-3) for pair in losses[1]]


def test_a_model_that_mixes_rows_gets_no_flash_attention(monkeypatch):
    "Layers that know nothing of bounds, here attention that overlooks them"

    def across(*args, cu_seq_lens_q=None, cu_seq_lens_k=None, **how):
        return varlen(*args, **how)

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "flash_attention_2", across)
    model = made("llama")
    model.config._attn_implementation = "flash_attention_2"
    with pytest.warns(UserWarning, match="LlamaModel mixes rows that lie in one row"):
        Actor(model)
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("pieces", [False, True])
def test_logprobs_and_entropies_of_every_family_are_those_of_its_own_logits(name, pieces, monkeypatch):
    "Also where logits are capped or scaled behind the head"
    model = made(name)
    assert has_plain_head(model) == (name not in ("gemma2", "granite"))
    if pieces:
        monkeypatch.setattr("stars.models.heads.LOGITS", 2 * 61 * 3)
    ids = torch.randint(3, 61, (2, 11))
    ids[:, 5:] = taken = ids[:, 5:] % 50
    logits = model(ids).logits[:, 4:-1, :50] / 0.7
    want = torch.distributions.Categorical(logits=logits)
    (want.log_prob(taken).sum() + want.entropy().sum()).backward()
    grads = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    logp, entropy = Actor(model)(ids, 4, 0.7, entropy=True, vocab=50)
    torch.testing.assert_close(logp, want.log_prob(taken), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(entropy, want.entropy(), rtol=1e-4, atol=1e-5)
    (logp.sum() + entropy.sum()).backward()
    for a, b in zip((p.grad for p in model.parameters()), grads):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


def test_the_gradient_of_many_pieces_is_not_summed_in_16_bits(monkeypatch):
    "512 pieces with a gradient of 1 each: bfloat16 cannot count beyond 256"
    head, states = torch.nn.Linear(4, 6, bias=False), torch.randn(1, 512, 4)
    ids = torch.randint(6, (1, 512))
    grads = []
    for bf16 in (False, True):
        head.weight.grad = None
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            (logp,) = chosen_in_pieces(head, states, ids, 1, 1.0, False, None)
        logp.sum().backward()
        grads.append(head.weight.grad)
    assert (grads[0] - grads[1]).norm() < 4e-3 * grads[0].norm()


def test_logits_in_pieces_are_not_kept(monkeypatch):
    model, kept = made("llama"), []
    monkeypatch.setattr("stars.models.heads.LOGITS", 61 * 4)

    def keep(t):
        kept.append(t.shape)
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        Actor(model)(torch.randint(3, 61, (1, 33)), entropy=True)
    assert kept and not any(shape[-1:] == (61,) and len(shape) == 3 for shape in kept)

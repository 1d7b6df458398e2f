"What a plan counts, against models, autograd and optimisers; what a refusal proposes, against the count (20 s)"
import re
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, Qwen2Config

from stars.experiments import PRESETS, preset
from stars.models import Critic, base_path, micro_model, micro_tokenizer, n_params, token_logprobs
from stars.plan import GIB, Shape, batch_arithmetic, block_bytes, cast_bytes, check, engine_responses, plan, plan_table, problems, remedy, shape_of, show_plan

QWEN, LLAMA = "Qwen/Qwen2.5-3B", "meta-llama/Llama-3.2-3B"
CPU, PAPER = PRESETS["cpu"], preset("paper", ppo_micro_tokens=16_384)

def phases(p): return {x.name: x for x in p.phases}

def small(hidden=128, layers=3, heads=4, kv_heads=2, ffn=320, vocab=500, kind="sdpa", tied=True):
    c = LlamaConfig(vocab_size=vocab, hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=kv_heads, intermediate_size=ffn,
                    max_position_embeddings=512, tie_word_embeddings=tied)
    return Shape.of(c), LlamaForCausalLM._from_config(c, attn_implementation=kind).train()

def saved(model, ids, bf16, entropy):
    "Bytes autograd saves, each storage once, parameters excluded"
    params, seen = {p.untyped_storage().data_ptr() for p in model.parameters()}, {}
    def pack(x):
        s = x.untyped_storage()
        if s.data_ptr() not in params: seen[s.data_ptr()] = s.nbytes()
        return x
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        out = token_logprobs(model, ids, entropy=entropy) # kept until all is counted, or storages would be reused
        return sum(seen.values())

def counted(shape, n, length, bf16, kind, entropy, remat=False, rank=0):
    held = 4*shape.hidden if remat else block_bytes(shape, bf16, kind, length, rank)
    top = (10 if bf16 else 12)*shape.hidden + (8 if entropy else 4)*shape.vocab
    return n*(shape.layers*held + top) + cast_bytes(shape, bf16, 0 if remat else shape.layers)

# parameters

@pytest.mark.parametrize("model,n", [(QWEN, 3_085_938_688), (LLAMA, 3_212_749_824), ("smollm2", 134_515_008)])
def test_known_models_have_their_published_size(model, n): assert shape_of(model, CPU).parameters == n

@pytest.mark.parametrize("changes", [{}, dict(base_hidden=64, base_heads=2, base_layers=3, base_ffn=96, top=99, prime_top=60)])
def test_micro_base_is_the_one_this_configuration_builds(changes):
    c = preset("cpu", **changes)
    m = micro_model(micro_tokenizer(c.top), c.base_hidden, c.base_layers, c.base_heads, c.base_ffn, c.base_context)
    assert shape_of("plain", c) == Shape.of(m.config) and shape_of("plain", c).parameters == n_params(m)

def test_a_folder_is_read_without_its_weights(tmp_path):
    (tmp_path/"config.json").write_text((base_path("rich")/"config.json").read_text())
    assert shape_of(str(tmp_path), CPU) == shape_of("rich", CPU)

@pytest.mark.parametrize("tied", (True, False))
def test_parts_of_a_model(tied):
    shape, m = small(tied=tied)
    linears = [x.weight for x in m.model.layers[0].modules() if isinstance(x, torch.nn.Linear)]
    assert shape.block == sum(w.numel() for w in linears) and shape.parameters == n_params(m)
    assert shape.body + shape.hidden == n_params(Critic.from_policy(m))

def test_adapters_are_those_of_peft():
    peft = pytest.importorskip("peft")
    shape, m = small()
    m = peft.get_peft_model(m, peft.LoraConfig(r=8, target_modules="all-linear"))
    assert shape.adapters(8) == sum(p.numel() for p in m.parameters() if p.requires_grad)

def test_other_architectures_and_names_are_refused():
    from transformers import T5Config
    with pytest.raises(ValueError, match="dense decoders"): Shape.of(T5Config())
    with pytest.raises(ValueError, match="hub id"): shape_of("qwen", CPU)

# activations

@pytest.mark.parametrize("kind", ("sdpa", "eager"))
@pytest.mark.parametrize("bf16", (False, True))
@pytest.mark.parametrize("dims", (dict(), dict(hidden=64, layers=5, heads=8, kv_heads=8, ffn=512, vocab=3000), dict(hidden=192, layers=2, heads=6, kv_heads=1, ffn=200, vocab=50)))
def test_saved_activations(dims, kind, bf16):
    shape, m = small(**dims, kind=kind)
    ids = torch.randint(dims.get("vocab", 500), (2, 160))
    for entropy in (False, True): assert counted(shape, 320, 160, bf16, kind, entropy) == pytest.approx(saved(m, ids, bf16, entropy), rel=.03)
    m.gradient_checkpointing_enable()
    assert counted(shape, 320, 160, bf16, kind, True, remat=True) == pytest.approx(saved(m, ids, bf16, True), rel=.03)

@pytest.mark.parametrize("bf16", (False, True))
def test_saved_activations_with_adapters(bf16):
    peft = pytest.importorskip("peft")
    shape, m = small()
    m = peft.get_peft_model(m, peft.LoraConfig(r=8, lora_dropout=0., target_modules="all-linear")).train()
    assert counted(shape, 320, 160, bf16, "sdpa", True, rank=8) == pytest.approx(saved(m, torch.randint(500, (2, 160)), bf16, True), rel=.15)

# weights, moments, sharding

def test_weights_gradients_and_moments_of_a_real_step():
    shape, m = small()
    opt = torch.optim.AdamW(m.parameters())
    token_logprobs(m, torch.randint(500, (2, 9))).sum().backward()
    opt.step()
    size = lambda ts: sum(t.numel() * t.element_size() for t in ts)
    moments = size(st[k] for st in opt.state.values() for k in ("exp_avg", "exp_avg_sq"))
    p = phases(plan(replace(CPU, base_hidden=128, base_layers=4), "plain"))["sft"].parts
    n = shape_of("plain", CPU).parameters / shape.parameters
    assert [p[k] for k in ("weights", "gradients", "moments")] == [pytest.approx(n * x) for x in (size(m.parameters()), size(q.grad for q in m.parameters()), moments)]

def test_sharding_divides_what_it_divides():
    whole, split = (phases(plan(replace(PAPER, workers=w, shard=w > 1), QWEN, w))["ppo update"].parts for w in (1, 4))
    for k in ("weights", "gradients", "moments", "critic"): assert whole[k] == pytest.approx(4*split[k])
    for k in ("reference", "sampler", "logits", "activations", "casts"): assert whole[k] == split[k]
    assert whole["exchange"] == 0 < split["exchange"]

def test_copies_are_not_divided():
    copied, alone = (phases(plan(replace(PAPER, workers=w, shard=False), QWEN, w))["ppo update"].parts for w in (4, 1))
    assert {k: v for k, v in copied.items() if k != "exchange"} == {k: v for k, v in alone.items() if k != "exchange"}
    assert copied["exchange"] == copied["gradients"]

def test_adapters_have_the_only_gradients_and_moments():
    p, shape = phases(plan(replace(PAPER, workers=1, shard=False, lora_rank=16), QWEN, 1))["sft"].parts, shape_of(QWEN, PAPER)
    assert (p["gradients"], p["moments"], p["weights"]) == tuple(4*x for x in (shape.adapters(16), 2*shape.adapters(16), shape.parameters + shape.adapters(16)))

def test_what_is_not_used_takes_nothing():
    p = phases(plan(replace(CPU, ppo_estimator="group", ppo_samples=2, ppo_kl_coef=0.), "plain"))["ppo update"].parts
    assert p["critic"] == p["reference"] == 0

def test_an_engine_on_its_own_device_frees_the_workers():
    c = replace(PAPER, engine="vllm", engine_memory=.4)
    shared, apart = (phases(plan(c, QWEN, g)) for g in (4, 5))
    assert (shared["ppo update"].parts["sampler"], apart["ppo update"].parts["sampler"]) == (int(.4 * 80*GIB), 0)
    room = .4*80*GIB - 2*3_085_938_688
    assert engine_responses(plan(c, QWEN, 4)) == int(room // (2*36*2*128*2 * (256 + 1024)))
    assert any("vllm engine" in w for w in problems(plan(replace(c, engine_memory=.05), QWEN, 8)))

# batches

def test_batches():
    b = batch_arithmetic(plan(PAPER, QWEN, 4))
    assert (b["rollouts"], b["minibatches"], b["minibatch_per_worker"], b["micro_batches"], b["ppo_updates"], b["checkpoints"]) == (1024, 2, 128, 11, 500, 26)
    assert b["checkpoint_bytes"] == 4*3_085_938_688 and b["sft_updates"] == 5*16 and b["sampled"] == 250*1024*1024

# refusal

def proposal(text): # the settings and GPUs a message proposes
    gpus = re.search(r"--gpus (\d+)", text)
    return int(gpus[1]) if gpus else None, dict(x.split("=") for x in text.split("--set ")[1].split())

@pytest.mark.parametrize("model,gpus,memory", [(QWEN, 1, 80), (QWEN, 4, 80), (QWEN, 2, 80), (LLAMA, 4, 80), (LLAMA, 1, 80), (QWEN, 8, 40)])
def test_what_is_proposed_fits(model, gpus, memory):
    with pytest.raises(ValueError, match="This fits") as e: check(plan(PAPER, model, gpus, memory))
    text = str(e.value)
    assert "\n" not in text and "need" in text
    more, changes = proposal(text)
    fields = {k: type(getattr(PAPER, k))(v) if not isinstance(getattr(PAPER, k), bool) else v == "true" for k, v in changes.items()}
    check(plan(replace(PAPER, **fields), model, more or gpus, memory))
    for k in fields: # and no change is there for nothing
        if k not in ("workers", "shard"): assert problems(plan(replace(PAPER, **{f: v for f, v in fields.items() if f != k}), model, more or gpus, memory))

def test_the_paper_fits_on_four_and_not_on_one():
    check(plan(preset("paper"), QWEN, 4, 80))
    for c in (PAPER, replace(PAPER, workers=1, shard=False)): assert problems(plan(c, QWEN, 1, 80))
    assert problems(plan(preset("paper", shard=False), QWEN, 4, 80))

def test_the_cheapest_change_is_proposed():
    assert remedy(plan(PAPER, QWEN, 4, 80)) == dict(ppo_micro_tokens=8192)

def test_a_hopeless_plan_says_so():
    with pytest.raises(ValueError, match="No setting tried"): check(plan(CPU, "plain", memory=.5))

def test_a_context_that_is_too_short_is_named():
    assert "exceed the context of 512" in problems(plan(replace(CPU, ppo_max_tokens=600), "plain"))[0]

def test_bad_devices_are_refused():
    for kw in (dict(gpus=0), dict(memory=0)):
        with pytest.raises(ValueError, match=next(iter(kw))): plan(CPU, "plain", **kw)

# text

def test_the_table_adds_up():
    p = plan(preset("paper"), QWEN, 4)
    t = plan_table(p)
    assert (t.drop(columns=["total", "headroom"]).sum(axis=1) - t.total).abs().max() < 1e-6
    assert t.total.tolist() == [x.total / GIB for x in p.phases]
    assert (t.total + t.headroom).tolist() == pytest.approx([80*.94 - 1.5]*5)
    text = show_plan(p)
    for piece in ("256 prompts × 4 = 1,024 rollouts", "reserve", "ppo update", "GiB"): assert piece in text

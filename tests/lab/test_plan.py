"What a plan counts, against models, autograd, optimisers and the sampler; what a refusal names (20 s)"

import gc
import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LlamaConfig, LlamaForCausalLM

from stars.cli.main import main
from stars.lab.configs import PRESETS, changed, preset, with_settings
from stars.lab.memory import (
    Training,
    block_bytes,
    cache_bytes,
    cast_bytes,
    pass_bytes,
    sampling_bytes,
    shape_from_config,
    shape_of,
)
from stars.lab.plan import (
    GIB,
    RESERVE_FIXED,
    batch_arithmetic,
    check,
    engine_responses,
    micro_shape,
    plan,
    plan_table,
    problems,
    show_plan,
    smaller,
)
from stars.models.checkpoints import base_path
from stars.models.heads import Critic, token_logprobs
from stars.models.micro import micro_model, micro_tokenizer, n_params
from stars.models.parallel import prepare
from stars.rl.rollouts import LlamaEngine

QWEN, LLAMA = "Qwen/Qwen2.5-3B", "meta-llama/Llama-3.2-3B"
CPU, PAPER = PRESETS["cpu"], preset("paper", ppo=dict(micro_tokens=262_144))


def phases(p):
    return {x.name: x for x in p.phases}


def small(hidden=128, layers=3, heads=4, kv_heads=2, ffn=320, vocab=500, kind="sdpa", tied=True):
    c = LlamaConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        intermediate_size=ffn,
        max_position_embeddings=512,
        tie_word_embeddings=tied,
    )
    return shape_from_config(c), LlamaForCausalLM._from_config(c, attn_implementation=kind).train()


def saved(model, ids, bf16, entropy):
    "Bytes autograd saves, each storage once, parameters excluded"
    params, seen = {p.untyped_storage().data_ptr() for p in model.parameters()}, {}

    def pack(x):
        s = x.untyped_storage()
        if s.data_ptr() not in params:
            seen[s.data_ptr()] = s.nbytes()
        return x

    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x),
        torch.autocast("cpu", torch.bfloat16, enabled=bf16),
    ):
        kept = token_logprobs(
            model, ids, entropy=entropy
        )  # until all is counted, or storages would be reused
        return kept is not None and sum(seen.values())


def counted(shape, n, length, bf16, kind, entropy, remat=False, rank=0, half=False):
    how = Training(bf16, half, remat, rank, kind, length)
    held = (2 if half else 4) * shape.hidden if remat else block_bytes(shape, how)
    top = (8 if half else 10 if bf16 else 12) * shape.hidden + (8 if entropy else 4) * shape.vocab
    return n * (shape.layers * held + top) + cast_bytes(shape, how.casts, 0 if remat else shape.layers)


# parameters


@pytest.mark.parametrize("model,n", [(QWEN, 3_085_938_688), (LLAMA, 3_212_749_824), ("smollm2", 134_515_008)])
def test_known_models_have_their_published_size(model, n):
    assert shape_of(model).parameters == n


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {
            "base.hidden": 64,
            "base.heads": 2,
            "base.layers": 3,
            "base.ffn": 96,
            "world.top": 99,
            "priming.top": 60,
        },
    ],
)
def test_micro_base_is_the_one_this_configuration_builds(changes):
    c = preset("cpu", **changes)
    m = micro_model(
        micro_tokenizer(c.world.top),
        c.base.hidden,
        c.base.layers,
        c.base.heads,
        c.base.ffn,
        c.base.max_length,
    )
    assert micro_shape(c) == shape_from_config(m.config) and plan(c, "plain").shape.parameters == n_params(m)


def test_a_folder_is_read_without_its_weights(tmp_path):
    (tmp_path / "config.json").write_text((base_path("rich") / "config.json").read_text())
    assert shape_of(str(tmp_path)) == micro_shape(CPU)


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

    with pytest.raises(ValueError, match="dense decoders"):
        shape_from_config(T5Config())
    with pytest.raises(ValueError, match="hub id"):
        shape_of("qwen")


# activations


@pytest.mark.parametrize("kind", ("sdpa", "eager"))
@pytest.mark.parametrize("bf16", (False, True))
@pytest.mark.parametrize(
    "dims",
    (
        dict(),
        dict(hidden=64, layers=5, heads=8, kv_heads=8, ffn=512, vocab=3000),
        dict(hidden=192, layers=2, heads=6, kv_heads=1, ffn=200, vocab=50),
    ),
)
def test_saved_activations(dims, kind, bf16):
    shape, m = small(**dims, kind=kind)
    ids = torch.randint(dims.get("vocab", 500), (2, 160))
    for entropy in (False, True):
        assert counted(shape, 320, 160, bf16, kind, entropy) == pytest.approx(
            saved(m, ids, bf16, entropy), rel=0.03
        )
    m.gradient_checkpointing_enable()
    assert counted(shape, 320, 160, bf16, kind, True, remat=True) == pytest.approx(
        saved(m, ids, bf16, True), rel=0.03
    )


def test_saved_activations_where_weights_are_bf16_too():
    shape, m = small(kind="sdpa")
    m, ids = m.bfloat16(), torch.randint(500, (2, 160))
    assert counted(shape, 320, 160, True, "sdpa", True, half=True) == pytest.approx(
        saved(m, ids, True, True), rel=0.03
    )
    m.gradient_checkpointing_enable()
    assert counted(shape, 320, 160, True, "sdpa", True, remat=True, half=True) == pytest.approx(
        saved(m, ids, True, True), rel=0.03
    )


@pytest.mark.parametrize("bf16", (False, True))
def test_saved_activations_with_adapters(bf16):
    pytest.importorskip("peft")
    shape, m = small()
    prepare(m, lora_rank=8)
    assert counted(shape, 320, 160, bf16, "sdpa", True, rank=8) == pytest.approx(
        saved(m, torch.randint(500, (2, 160)), bf16, True), rel=0.15
    )


# sampling


class Alive(TorchDispatchMode):
    "Peak of the bytes of tensors made inside"

    def __init__(self, before):
        super().__init__()
        self.before = [t.untyped_storage() for t in before]
        self.seen, self.now, self.peak = {x._cdata: 0 for x in self.before}, 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in [t.untyped_storage() for t in tree_leaves(out) if isinstance(t, torch.Tensor)]:
            if x._cdata in self.seen:
                continue
            self.seen[x._cdata] = x.nbytes()
            self.now += x.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(x, self.gone, x._cdata)
        return out

    def gone(self, key):
        self.now -= self.seen.pop(key, 0)


@pytest.mark.parametrize("bf16", (False, True))
@pytest.mark.parametrize(
    "dims,rows,prompt,new",
    [
        (dict(), 24, 40, 60),
        (dict(vocab=20_000), 24, 40, 60),
        (dict(heads=8, kv_heads=1, ffn=96), 50, 10, 120),
    ],
)
def test_the_sampler_at_work(dims, rows, prompt, new, bf16):
    shape, m = small(**dims)
    engine = LlamaEngine(m.eval(), eos=-1, rows=512, dtype=torch.bfloat16 if bf16 else None)
    gc.collect()
    with Alive(engine.decoder.names.values()) as alive:
        engine.generate(torch.randint(500, (rows, prompt)).tolist(), new, seeds=range(rows))
    assert sum(
        sampling_bytes(shape, rows, prompt, new, 2 if bf16 else 4, cuda=False).values()
    ) == pytest.approx(alive.peak, rel=0.12)


def test_a_gpu_has_a_power_of_two_of_rows_up_to_engine_rows_and_columns_of_whole_steps():
    shape = small()[0]

    def cache(rows):
        return cache_bytes(shape, rows, 128, 2) + 16 * rows * 60

    assert [sampling_bytes(shape, n, 40, 60, 2, most=96)["cache"] for n in (30, 70, 1000)] == [
        cache(32),
        cache(96),
        cache(96),
    ]


@pytest.mark.parametrize("bf16", (False, True))
def test_a_softmax_taken_in_pieces_is_the_same_and_smaller(bf16, monkeypatch):
    shape, m = small(layers=1, vocab=8000)
    ids, out = torch.randint(7000, (3, 101)), []
    for most in (2**26, 3 * 8000 * 7):  # all at once; 7 positions at a time, which do not divide 96
        monkeypatch.setattr("stars.models.heads.LOGITS", most)
        m.zero_grad(set_to_none=False)
        gc.collect()
        with Alive([t for p in m.parameters() for t in (p, p.grad) if t is not None]) as alive:
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                logp, entropy = token_logprobs(m, ids, 4, 0.7, entropy=True, vocab=7900)
            (logp.sum() - entropy.square().sum()).backward()
        with torch.no_grad():
            alone = token_logprobs(m, ids, 4, 0.7, vocab=7900)
        out.append(
            ([logp.detach(), entropy.detach(), alone, *(p.grad.clone() for p in m.parameters())], alive.peak)
        )
    for a, b in zip(out[0][0], out[1][0]):  # gradients are rounded piece by piece, then added
        assert (a - b).abs().max() <= (1e-2 if bf16 else 1e-5) * a.abs().max()
    assert out[1][1] < (0.4 if bf16 else 0.6) * out[0][1]


@pytest.mark.parametrize("bf16,half", [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize("most", (200_000, 800_000))
def test_the_peak_with_logits_in_pieces(most, bf16, half, monkeypatch):
    "The head's gradient is there three times, which for a large vocabulary is more than a piece of logits"
    for module in ("stars.models.heads", "stars.lab.memory"):
        monkeypatch.setattr(f"{module}.LOGITS", most)
    shape, m = small(layers=1, vocab=8000)
    m = m.bfloat16() if half else m
    for p in m.parameters():
        p.grad = torch.zeros_like(p)
    gc.collect()
    with Alive([t for p in m.parameters() for t in (p, p.grad)]) as alive:
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            logp, entropy = token_logprobs(m, torch.randint(8000, (3, 160)), entropy=True)
        (logp.sum() + entropy.sum()).backward()
    counted = pass_bytes(shape, 480, Training(bf16, half), entropy=True)
    assert sum(counted.values()) == pytest.approx(alive.peak, rel=0.06)


# weights, moments, sharding


def test_weights_gradients_and_moments_of_a_real_step():
    shape, m = small()
    opt = torch.optim.AdamW(m.parameters())
    token_logprobs(m, torch.randint(500, (2, 9))).sum().backward()
    opt.step()

    def size(tensors):
        return sum(t.numel() * t.element_size() for t in tensors)

    moments = size(st[k] for st in opt.state.values() for k in ("exp_avg", "exp_avg_sq"))
    p = phases(plan(CPU, "plain"))["sft"].parts
    n = micro_shape(CPU).parameters / shape.parameters
    assert [p[k] for k in ("weights", "gradients", "moments")] == [
        pytest.approx(n * x) for x in (size(m.parameters()), size(q.grad for q in m.parameters()), moments)
    ]


def test_sharding_divides_what_it_divides():
    whole, split = (
        phases(plan(changed(PAPER, run=dict(workers=w, shard=w > 1)), QWEN, w))["ppo update"].parts
        for w in (1, 4)
    )
    for k in ("weights", "gradients", "moments", "critic", "reference"):
        assert whole[k] == pytest.approx(4 * split[k])
    for k in ("sampler", "logits"):
        assert whole[k] == split[k]
    assert whole["exchange"] == 0 < split["exchange"] and split["casts"] == 0  # FSDP2 gathers bf16


def test_what_is_loaded_is_whole_until_it_is_sharded():
    start, n = phases(plan(PAPER, QWEN, 4))["ppo start"].parts, shape_of(QWEN).parameters
    assert (start["weights"], start["reference"], start["sampler"]) == (4 * n, 2 * n, 2 * n) and start[
        "critic"
    ] == pytest.approx(4 * n, rel=0.01)


def test_the_cache_stays_beside_the_update_unless_the_engine_sleeps():
    stays, sleeps = (
        phases(plan(changed(PRESETS["smollm2"], run=dict(shard=s)), "smollm2"))["ppo update"].parts
        for s in (False, True)
    )
    assert (
        stays["cache"]
        == phases(plan(PRESETS["smollm2"], "smollm2"))["ppo sampling"].parts["cache"]
        > 0
        == sleeps["cache"]
    )


def test_copies_are_not_divided():
    copied, alone = (
        phases(plan(changed(PAPER, run=dict(workers=w, shard=False)), QWEN, w))["ppo update"].parts
        for w in (4, 1)
    )
    assert {k: v for k, v in copied.items() if k != "exchange"} == {
        k: v for k, v in alone.items() if k != "exchange"
    }
    assert copied["exchange"] == pytest.approx(
        2 * copied["gradients"], rel=0.01
    )  # the policy's and the critic's


def test_adapters_have_the_only_gradients_and_moments():
    p, shape = (
        phases(plan(changed(PAPER, run=dict(workers=1, shard=False), lora=dict(rank=16)), QWEN, 1))[
            "sft"
        ].parts,
        shape_of(QWEN),
    )
    assert (p["gradients"], p["moments"], p["weights"]) == tuple(
        4 * x for x in (shape.adapters(16), 2 * shape.adapters(16), shape.parameters + shape.adapters(16))
    )


def test_what_is_not_used_takes_nothing():
    p = phases(plan(changed(CPU, ppo=dict(estimator="group", samples=2, kl_coef=0.0)), "plain"))[
        "ppo update"
    ].parts
    assert p["critic"] == p["reference"] == 0


def test_an_engine_on_its_own_device_frees_the_workers():
    c = changed(PAPER, run=dict(engine="vllm", engines=1, engine_memory=0.4))
    shared, apart = (phases(plan(c, QWEN, g)) for g in (4, 5))
    assert [shared[f"ppo {x}"].parts["sampler"] for x in ("sampling", "update")] == [
        int(0.4 * 80 * GIB),
        RESERVE_FIXED,
    ]  # asleep, it is a process
    assert [apart[f"ppo {x}"].parts["sampler"] for x in ("sampling", "update")] == [0, 0]
    room = 0.4 * 80 * GIB - 2 * 3_085_938_688
    assert engine_responses(plan(c, QWEN, 4)) == int(room // (2 * 36 * 2 * 128 * 2 * (256 + 1024)))
    assert any("vllm engine" in w for w in problems(plan(changed(c, run=dict(engine_memory=0.05)), QWEN, 8)))


def test_an_engine_in_the_training_process_shares_its_device():
    c = changed(PRESETS["smollm2"], run=dict(engine="vllm", engines=0))
    for gpus in (1, 2):
        assert phases(plan(c, "smollm2", gpus))["ppo sampling"].parts["sampler"] == int(0.4 * 80 * GIB)


def test_an_evaluation_holds_a_checkpoint_and_the_samplers_copy():
    p = phases(plan(PAPER, QWEN, 4))["eval"].parts
    assert p["weights"] == p["sampler"] == 2 * 3_085_938_688 and p["cache"] >= cache_bytes(
        shape_of(QWEN), 128, 1280, 2
    )


# batches


def test_batches():
    b = batch_arithmetic(plan(changed(PAPER, ppo=dict(micro_tokens=65_536)), QWEN, 4))
    assert (
        b["rollouts"],
        b["minibatches"],
        b["minibatch_per_worker"],
        b["micro_batches"],
        b["ppo_updates"],
        b["checkpoints"],
    ) == (1024, 2, 128, 3, 500, 26)
    assert (
        b["checkpoint_bytes"] == 2 * 3_085_938_688
        and b["checkpoints_bytes"] == (26 * 2 + 4) * 3_085_938_688
        and b["sft_state_bytes"] == 12 * 3_085_938_688
        and b["sft_updates"] == 5 * 16
        and b["sampled"] == 250 * 1024 * 1024
    )


def test_a_state_holds_what_is_trained(tmp_path):
    from safetensors import safe_open

    from stars.models.parallel import States, saved_states

    shape, m = small(layers=1, vocab=64)
    opt = torch.optim.AdamW(m.parameters())
    token_logprobs(m, torch.randint(64, (2, 9))).sum().backward()
    opt.step()
    with States(tmp_path, dict(model=m), dict(model=opt)) as states:
        states.save(1, {})
    held = 0
    for f in saved_states(tmp_path)[0].glob("*.safetensors"):
        with safe_open(f, "pt") as x:
            held += sum(t.numel() * t.element_size() for t in map(x.get_tensor, x.keys()) if t.numel() > 1)
    assert held == 12 * shape.parameters  # what `batch_arithmetic` counts


# refusal


@pytest.mark.parametrize(
    "model,gpus,memory",
    [(QWEN, 1, 80), (QWEN, 4, 80), (QWEN, 2, 80), (LLAMA, 4, 80), (LLAMA, 1, 80), (QWEN, 8, 40)],
)
def test_a_refusal_names_phases_and_settings(model, gpus, memory):
    p = plan(PAPER, model, gpus, memory)
    with pytest.raises(ValueError, match="These settings make it smaller: ppo.micro_tokens") as e:
        check(p)
    text = str(e.value)
    assert "\n" not in text and "ppo update needs" in text and ("GPUs and there" in text) == (gpus < 4)


SMALLER = {  # the beginning of what is named → the same as settings
    "ppo.micro_tokens": {"ppo.micro_tokens": 4_096},
    "sft.micro_tokens": {"sft.micro_tokens": 4_096},
    "run.remat=true": {"run.remat": True},
    "run.engine_rows": {"run.engine_rows": 16},
    "run.shard=true": {"run.shard": True},
    "more run.workers": {"run.workers": 8, "run.shard": True},
    "ppo.bf16=true": {"ppo.bf16": True},
    "run.engine_memory": {"run.engine_memory": 0.1},
    "lora.rank=16": {"lora.rank": 16},
}


def excess(p):
    "Bytes that phases lack"
    return sum(max(0, x.total - x.room) for x in p.phases)


@pytest.mark.parametrize(
    "changes",
    [
        dict(run=dict(workers=1, shard=False)),
        dict(run=dict(workers=2, shard=False, remat=False)),
        dict(run=dict(workers=1, shard=False, remat=False), ppo=dict(bf16=False)),
        dict(run=dict(workers=1, shard=False, engine="vllm", engines=1)),
    ],
)
def test_each_setting_that_is_named_helps(changes):
    c = changed(PAPER, **changes)
    before = plan(c, QWEN, 8, 40)
    named = smaller(before)
    assert named
    for setting in named:
        [values] = [v for name, v in SMALLER.items() if setting.startswith(name)]
        assert excess(plan(with_settings(c, values), QWEN, 8, 40)) < excess(before), setting


def test_the_paper_fits_on_four_and_not_on_one():
    for model in (QWEN, LLAMA):
        check(plan(preset("paper"), model, 4, 80))
        for c in (PAPER, changed(PAPER, run=dict(workers=1, shard=False))):
            assert problems(plan(c, model, 1, 80))
        assert problems(plan(preset("paper", run=dict(shard=False)), model, 4, 80))


def test_the_small_presets_fit_on_small_gpus_or_say_how():
    check(plan(PRESETS["gpu"], "plain", 1, 16))
    c = PRESETS["smollm2"]
    check(plan(c, "smollm2", 1, 80))
    assert "run.remat=true" in smaller(plan(c, "smollm2", 1, 24))
    check(plan(changed(c, run=dict(remat=True)), "smollm2", 1, 24))


def test_the_cheapest_setting_is_named_first():
    assert smaller(plan(PAPER, QWEN, 4, 80))[0] == "ppo.micro_tokens (now 262144)"
    check(plan(changed(PAPER, ppo=dict(micro_tokens=32_768)), QWEN, 4, 80))


def test_a_plan_of_another_trainer_is_refused():
    with pytest.raises(ValueError, match="trainer='star': a plan counts PPO"):
        plan(preset("cpu", trainer="star"), "plain")


def test_a_hopeless_plan_says_so():
    with pytest.raises(ValueError, match="A smaller model or GPUs with more memory"):
        check(plan(CPU, "plain", memory=0.5))


def test_a_context_that_is_too_short_is_named():
    assert "exceed the context of 512" in problems(plan(changed(CPU, ppo=dict(max_tokens=600)), "plain"))[0]


def test_bad_devices_are_refused():
    for kw in (dict(gpus=0), dict(memory=0)):
        with pytest.raises(ValueError, match=next(iter(kw))):
            plan(CPU, "plain", **kw)


# text


def test_the_table_adds_up():
    p = plan(preset("paper"), QWEN, 4)
    t = plan_table(p)
    assert (t.drop(columns=["total", "headroom"]).sum(axis=1) - t.total).abs().max() < 1e-6
    assert t.total.tolist() == [x.total / GIB for x in p.phases]
    assert (t.total + t.headroom).tolist() == pytest.approx([80 * 0.94 - 1.5] * len(p.phases))
    text = show_plan(p)
    for piece in ("256 prompts × 4 = 1,024 rollouts", "reserve", "ppo update", "GiB"):
        assert piece in text


def test_a_run_that_cannot_fit_is_refused_before_it_starts(tmp_path, monkeypatch, capsys):
    class Card:
        total_memory = 8 * 2**30

    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    for name, value in dict(is_available=True, device_count=1, get_device_properties=Card()).items():
        monkeypatch.setattr(f"torch.cuda.{name}", lambda *a, value=value: value)
    with pytest.raises(SystemExit) as e:
        main(["ppo", "--preset", "smollm2"])
    assert e.value.code == 2 and not list(tmp_path.iterdir())
    assert "These settings make it smaller: " in capsys.readouterr().err


def table_of(text: str) -> list[list[str]]:  # rows, without their names
    "The numbers of the table in a plan's text"
    lines = text.split("\n\n")[1].splitlines()[2:]
    return [line.replace("ppo ", "ppo-").replace("vllm engine", "vllm-engine").split()[1:] for line in lines]


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_what_no_gpu_has_confirmed_says_so(name):
    cfg = PRESETS[name]
    p = plan(cfg, cfg.models[0], cfg.run.devices)
    text, rows = show_plan(p), table_of(show_plan(p))
    assert len(rows) == len(p.phases) and all(len(r) == len(rows[0]) for r in rows)
    if name in ("cpu", "smoke"):  # no device is meant, so nothing that only CUDA has
        assert not [w for w in ("CUDA", "NCCL", "GPU", "graphs", "headroom", "reserve", "~") if w in text]
        for row, phase in zip(rows, p.phases):
            assert float(row[-1]) == pytest.approx((phase.total - phase.parts["graphs"]) / GIB, abs=0.006)
            assert sum(map(float, row[:-1])) == pytest.approx(float(row[-1]), abs=0.006 * len(row))
        return
    assert all(cell == "0" or cell[0] == "~" for row in rows for cell in row)
    shown = [[float(cell.removeprefix("~")) for cell in row] for row in rows]
    assert shown == [pytest.approx(list(r), abs=0.06) for r in plan_table(p).to_numpy()]
    reserve = text.split("reserve, ")[1].split("\n")[0]
    assert "~6%" in reserve and "~1.5 GiB" in reserve
    assert text.splitlines()[-1].startswith("~ counted, not measured on a GPU")


def test_a_refusal_marks_its_numbers_too():
    with pytest.raises(ValueError, match="not measured on a GPU") as e:
        check(plan(PAPER, QWEN, 4))
    sizes = str(e.value).split("per device")
    assert sizes[0].split()[-2].startswith("~") and "are ~" in sizes[1]

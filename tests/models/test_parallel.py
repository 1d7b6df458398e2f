"Two workers compute what one computes: losses, gradients, rollouts, checkpoints, states; and what Ray does"

import json
import os
import queue
import random
import shutil
import signal
import time
import traceback
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from tiny import PPO, PROBLEMS, TOK, cut_short, fingerprint, forked, model, run, untimed

from stars.lab import experiments as ex
from stars.lab.configs import changed
from stars.models.checkpoints import Weights, load_model, save_checkpoint, weights_of
from stars.models.parallel import States, Team, on_workers, prepare, saved_states, start_ray, state_digest
from stars.rl import ppo as P
from stars.rl.loops import Runtime
from stars.rl.ppo import PPOConfig
from stars.rl.rollouts import LlamaEngine, Task


def whole(path, shard):
    "Save a model that a team shares"
    team, m = Team.join(shard), model()
    team.wrap(m)
    save_checkpoint(m, TOK, path, write=team.first)
    team.wait()


def fail(out):
    "One worker's disk is full; the other one's is not"
    team = Team.join()
    with team.as_one():
        if team.first:
            raise OSError(28, "No space left on device")


def dice(out, file, stop=None):
    "PPO with a reward that differs by call and by process, and says of each call that it was made"

    def reward(text, problem):
        with file.open("a") as f:
            f.write(f"{os.getpid()}\n")
        if len(file.read_text().split()) == stop:
            raise KeyError("the judge is out")
        return random.SystemRandom().random()

    batches, appraise = [], P.appraise

    def kept(learner, rollouts, scores):
        batch, logged = appraise(learner, rollouts, scores)
        batches.append((scores, batch.advantages.tolist()))
        return batch, logged

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(P, "appraise", kept)
        run("ppo", out, reward=reward, estimator="group", kl_in="loss")
    return batches


def adapted(lora):
    "A model, with adapters that say something where there are any"
    m, gen = prepare(model(), lora_rank=lora), torch.Generator().manual_seed(1)
    for name, p in m.named_parameters():
        if "lora_B" in name:
            p.data.copy_(0.1 * torch.randn(p.shape, generator=gen))
    return m


def sent(path, shard, lora):
    "What a team sends to an engine that computes in bfloat16"
    team, m = Team.join(shard), adapted(lora)
    team.wrap(m)
    weights = Weights(m, torch.bfloat16)
    got = dict(weights)
    if team.first:
        torch.save((got, weights.shapes, weights.nbytes), path)
    team.wait()


def told(path, shard, lora):
    "What a team tells vLLM's transfer: a worker's list of what will come, and what comes"
    from stars.rl.engines import source_of

    team, m = Team.join(shard), adapted(lora)
    team.wrap(m)
    source = source_of(Weights(m, torch.bfloat16))
    said = [(x.name, x.dtype, x.shape) for x in source.metadata()]
    torch.save((said, list(source)), f"{path}-{team.rank}")


def in_turn(out, shard):
    "PPO on a team whose second worker takes its time to load; who did what when"
    team = Team.join(shard)

    def note(what):
        with (out / "order").open("a") as f:
            f.write(f"{what}\n")

    def reference():
        time.sleep(team.rank)
        note(f"worker {team.rank} has loaded")
        return model()

    class Noted(LlamaEngine):
        def sync(self, weights):
            super().sync(weights)
            note("an engine has weights")

    def engine():
        note("an engine is made" if team.first else "another waits for it")
        return Noted(policy, TOK.eos_token_id, vocab=len(TOK))

    policy, task = model(), Task(reward=fingerprint)
    cfg, runtime = PPOConfig(**PPO | dict(steps=1)), Runtime(engine, team, progress=False)
    P.ppo(policy, TOK, PROBLEMS, out / "run", cfg, task, reference, runtime)


def hash_late(out, trouble):
    "Saves two states; of the second, the second worker's hashes take their time, or cannot be made"
    from stars.models import parallel

    team, sealed, seen = Team.join(True), parallel.sealed, []
    m = model()
    team.wrap(m)
    ready = out / "ready"

    def late(folder, names):
        seen.append(sorted(names))
        if team.rank == 1 and len(seen) == 2:
            if trouble:
                raise OSError(28, "No space left on device")
            while not ready.exists():
                time.sleep(0.01)
        return sealed(folder, names)

    optimizer = torch.optim.AdamW(m.parameters(), lr=1e-3)
    with pytest.MonkeyPatch.context() as patch, States(out, dict(m=m), dict(m=optimizer), team) as states:
        patch.setattr(parallel, "sealed", late)
        states.save(1, {})
        states.settle()
        states.save(2, {})
        for _ in range(3):  # steps of training
            states.settle(wait=trouble)
            time.sleep(0.05)
            team.wait()
        before = [s.name for s in saved_states(out)]
        if team.first:
            ready.touch()
        states.settle()
    return seen[-1], before, [s.name for s in saved_states(out)]


WORK = dict(run=run, cut_short=cut_short, whole=whole, fail=fail, dice=dice, sent=sent, in_turn=in_turn)
WORK |= dict(hash_late=hash_late, told=told)


def serve(rank, folder, tasks, answers):
    "A worker that does what it is told until it is told to stop"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    for name, args, kwargs in iter(tasks.get, None):
        try:
            answers.put((rank, WORK[name](*args, **kwargs), None))
        except Exception as e:
            answers.put((rank, None, f"{type(e).__name__}: {e}\n{traceback.format_exc()}"))


class Pair:
    "Two processes in one group"

    def __init__(self, folder):
        ctx = forked()
        self.tasks, self.answers = [ctx.Queue() for _ in range(2)], ctx.Queue()
        self.processes = [
            ctx.Process(target=serve, args=(r, folder, self.tasks[r], self.answers), daemon=True)
            for r in range(2)
        ]
        for p in self.processes:
            p.start()

    def both(self, name, *args, **kwargs):
        "What each of the two returns or raises"
        for t in self.tasks:
            t.put((name, args, kwargs))
        try:
            said = sorted([self.answers.get(timeout=600) for _ in range(2)], key=lambda a: a[0])
        except queue.Empty:
            self.close()
            raise AssertionError(f"{name}{args}: one worker waits for the other") from None
        return [(result, error) for _, result, error in said]

    def __call__(self, name, *args, **kwargs):
        said = self.both(name, *args, **kwargs)
        assert not any(error for _, error in said), "\n".join(filter(None, (e for _, e in said)))

    def close(self):
        for p in self.processes:
            p.kill()


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    with closing(Pair(tmp_path_factory.mktemp("group"))) as pair:
        yield pair


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    "What one process computes, once per setting"
    made = {}

    def of(kind, **how):
        key = json.dumps([kind, how], sort_keys=True)
        if key not in made:
            run(kind, made.setdefault(key, tmp_path_factory.mktemp("alone")), **how)
        return made[key]

    torch.set_num_threads(1)
    return of


def close_logs(a, b, tol=1e-5):
    a, b = untimed(a), untimed(b)
    assert len(a) == len(b) and a
    for x, y in zip(a, b):
        near = {
            k: pytest.approx(v, rel=1e-3 if k == "explained_variance" else tol, abs=tol) for k, v in x.items()
        }  # a ratio whose denominator is nearly nothing where all returns are alike
        assert y.keys() == x.keys() and not (far := [(k, y[k], x[k]) for k in x if y[k] != near[k]]), (
            x["step"],
            far,
        )


def close_weights(a, b, tol=1e-4):
    a, b = load_model(a).state_dict(), load_model(b).state_dict()
    assert a.keys() == b.keys()
    for k in a:
        torch.testing.assert_close(a[k], b[k], rtol=tol, atol=tol, msg=lambda m: f"{k}: {m}")


# one short batch per epoch; more pieces here than there; packed rows; recomputed activations; adapters
@pytest.mark.parametrize(
    "how", [dict(), dict(packing=True), dict(remat=True), dict(lora=2), dict(micro_tokens=4096)], ids=str
)
@pytest.mark.parametrize("shard", [False, True], ids=["ddp", "fsdp2"])
def test_sft(pair, alone, tmp_path, shard, how):
    pair("run", "sft", tmp_path, shard=shard, **how)
    one = alone("sft", **how)
    close_logs(one, tmp_path)
    close_weights(one / "model", tmp_path / "model")


@pytest.mark.parametrize(
    "how",
    [
        dict(),
        dict(estimator="group", kl_in="loss", is_cap=2.0),
        dict(is_cap=1.5, remat=True, mask_truncated=True, epochs=2),
        dict(lora=2, aggregate="sequence-mean"),
    ],
    ids=str,
)
@pytest.mark.parametrize("shard", [False, True], ids=["ddp", "fsdp2"])
def test_ppo(pair, alone, tmp_path, shard, how):
    pair("run", "ppo", tmp_path, shard=shard, **how)
    one = alone("ppo", **how)
    close_logs(one, tmp_path)
    for step in range(PPO["steps"] + 1):
        close_weights(
            one / f"step-{step:04d}", tmp_path / f"step-{step:04d}", 3e-4
        )  # a tenth of a step of Adam
    assert len(list(tmp_path.glob("step-*"))) == PPO["steps"] + 1


def test_a_response_is_scored_once_for_all(pair, tmp_path):
    "Whatever a reward rolls or remembers: all workers train on the same scores; if it fails, nobody waits"
    file, (first, second) = (
        tmp_path / "calls",
        (said for said, _ in pair.both("dice", tmp_path / "run", tmp_path / "calls")),
    )
    calls = file.read_text().split()
    assert len(calls) == PPO["steps"] * PPO["prompts"] * PPO["samples"] and len(set(calls)) == 1
    assert first == second and len(first) == PPO["steps"] and first[0] != first[1]
    logged = [r["reward"] for r in untimed(tmp_path / "run")]
    assert logged == pytest.approx([sum(scores) / len(scores) for scores, _ in first])
    errors = [error for _, error in pair.both("dice", tmp_path / "failed", tmp_path / "more", 5)]
    assert [e.split("\n")[0] for e in errors] == ["KeyError: 'the judge is out'"] * 2


@pytest.mark.parametrize("shard", [False, True], ids=["ddp", "fsdp2"])
def test_a_shared_model_is_saved_whole(pair, tmp_path, shard):
    pair("whole", str(tmp_path / "model"), shard)
    m = model()
    save_checkpoint(m, TOK, tmp_path / "alone")
    a, b = load_model(tmp_path / "alone").state_dict(), load_model(tmp_path / "model").state_dict()
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    assert (tmp_path / "alone/model.safetensors").read_bytes() == (
        tmp_path / "model/model.safetensors"
    ).read_bytes()
    assert dict(weights_of(m)).keys() == dict(load_model(tmp_path / "model").named_parameters()).keys()


@pytest.mark.parametrize("lora", [0, 2])
@pytest.mark.parametrize("shard", [False, True], ids=["ddp", "fsdp2"])
def test_sixteen_bits_are_cast_before_they_are_gathered(pair, tmp_path, shard, lora):
    "A team sends what one process would send, to the bit, and knows beforehand how much that is"
    pair("sent", tmp_path / "sent", shard, lora)
    got, shapes, nbytes = torch.load(tmp_path / "sent")
    want = {n: w.to(torch.bfloat16) for n, w in weights_of(adapted(lora))}
    assert got.keys() == want.keys() and all(torch.equal(w, want[n]) for n, w in got.items())
    assert shapes == {n: w.shape for n, w in want.items()}
    assert nbytes == sum(w.nbytes for w in want.values()) and {w.dtype for w in got.values()} == {
        torch.bfloat16
    }


@pytest.mark.parametrize("lora", [0, 2])
def test_every_worker_tells_a_transfer_the_same(pair, tmp_path, lora):
    "In the same order, since each weight is a meeting; the head, which is the embedding, under both names"
    pytest.importorskip("vllm", reason="needs vLLM (make dev)")
    pair("told", tmp_path / "told", True, lora)
    (said, came), (others_said, others) = (torch.load(tmp_path / f"told-{r}") for r in range(2))
    assert said == others_said == [(n, w.dtype, tuple(w.shape)) for n, w in came]
    assert [n for n, _ in came] == [n for n, _ in others]
    want = {n: w.to(torch.bfloat16) for n, w in weights_of(adapted(lora))}
    want["lm_head.weight"] = want["model.embed_tokens.weight"]
    for got in map(dict, (came, others)):
        assert got.keys() == want.keys() and all(torch.equal(w, want[n]) for n, w in got.items())


@pytest.mark.parametrize("shard", [False, True], ids=["ddp", "fsdp2"])
def test_no_engine_before_every_worker_has_its_memory(pair, tmp_path, shard):
    pair("in_turn", tmp_path, shard)
    order = (tmp_path / "order").read_text().splitlines()
    assert order[:2] == ["worker 0 has loaded", "worker 1 has loaded"]
    assert set(order[2:]) == {"an engine is made", "another waits for it", "an engine has weights"}


@pytest.mark.parametrize("kind,how", [("sft", dict()), ("sft", dict(lora=2)), ("ppo", dict())], ids=str)
def test_a_state_fits_any_number_of_workers(pair, alone, tmp_path, kind, how):
    "Written by two (split), taken up by one; written by one, taken up by two; copied, taken up split"
    stop = 2 if kind == "ppo" else 3
    one = alone(kind, **how)
    for name, write, read in (
        (
            "two to one",
            lambda d: pair("cut_short", kind, d, stop, shard=True, **how),
            lambda d: run(kind, d, **how),
        ),
        (
            "one to two",
            lambda d: cut_short(kind, d, stop, **how),
            lambda d: pair("run", kind, d, shard=True, **how),
        ),
        (
            "copied to split",
            lambda d: pair("cut_short", kind, d, stop, **how),
            lambda d: pair("run", kind, d, shard=True, **how),
        ),
    ):
        out = tmp_path / name
        write(out)
        assert len(untimed(out)) == stop and saved_states(out)[0].name.startswith(f"state-{stop:06d}"), name
        read(out)
        close_logs(one, out)
        close_weights(
            *((d / "model" if kind == "sft" else d / f"step-{PPO['steps']:04d}") for d in (one, out))
        )


def test_a_state_has_its_name_when_all_workers_have_their_hashes(pair, tmp_path):
    "Each hashes what it has written itself; nobody waits, and no state is there before it is whole"
    (mine, before, after), (others, *same) = (said for said, _ in pair.both("hash_late", tmp_path, False))
    assert [before, after] == same and not set(mine) & set(others) and "state.json" in mine
    assert [n[:12] for n in before] == ["state-000001"]
    assert [n[:12] for n in after] == ["state-000002", "state-000001"]
    new = tmp_path / after[0]
    assert {f.name for f in new.iterdir()} == {*mine, *others} and new.name.endswith(state_digest(new))


def test_hashes_that_cannot_be_made_leave_the_state_before(pair, tmp_path):
    errors = [error.split("\n")[0] for _, error in pair.both("hash_late", tmp_path, True)]
    assert all("the state of step 2 could not be written" in e and "No space left" in e for e in errors)
    (left,) = saved_states(tmp_path)
    assert (
        left.name == f"state-000001-{state_digest(left)}" and f"the last good one is {left.name}" in errors[0]
    )
    assert not list(tmp_path.glob(".state*"))


def test_an_error_of_one_worker_is_everybodys(pair, tmp_path):
    assert [error.split("\n")[0] for _, error in pair.both("fail", tmp_path)] == [
        "OSError: [Errno 28] No space left on device"
    ] * 2


# Ray


def diverge(out):
    "What a training function may raise"
    with (Path(out) / "tried").open("a") as f:
        f.write(f"{os.getpid()}\n")
    raise FloatingPointError("step 3: loss is nan")


@pytest.fixture(scope="module")
def cluster():
    "Two CPUs, as a laptop has them"
    import ray

    forked()  # a worker imports this file
    start_ray(quiet=True, num_cpus=2)
    yield
    ray.shutdown()


def test_the_functions_own_error_is_raised_once(cluster, tmp_path):
    with pytest.raises(FloatingPointError, match="^step 3: loss is nan$"):
        on_workers(diverge, (tmp_path,), 2, tmp_path)
    assert len(set((tmp_path / "tried").read_text().split())) <= 2 and [
        p.name for p in tmp_path.iterdir()
    ] == ["tried"]


def test_ray_that_was_not_up_in_time_is_started_again(monkeypatch):
    "What the failed start left behind is ended first; other failures are raised at once"
    import ray

    class Node:
        def __init__(self, says):
            raise Exception(says)

        def kill_all_processes(self, check_alive):
            ended.append(self)

    late = "The current node timed out during startup.", "Timed out waiting for file gcs_server_port"
    ended, starts = [], [*(partial(Node, says) for says in late), dict]
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "cluster_resources", dict)
    monkeypatch.setattr(ray, "init", lambda *args, **how: starts.pop(0)())
    assert start_ray(quiet=True) and not starts and len(ended) == 2
    starts += [partial(Node, "no such option"), dict]
    with pytest.raises(RuntimeError, match="Ray did not start: no such option"):
        start_ray(quiet=True)
    assert len(starts) == 1 and len(ended) == 3


@pytest.mark.parametrize("own", [None, "pdb.set_trace"])
def test_ray_takes_nothing_over(monkeypatch, own):
    "Neither SIGTERM nor breakpoint() nor the patience it was started with"
    import ray

    patience = "RAY_gcs_server_port_wait_time_s"

    def init(*args, **how):  # what Ray does
        assert os.environ[patience] == "120"
        os.environ["PYTHONBREAKPOINT"] = "ray.util.rpdb._driver_set_trace"
        signal.signal(signal.SIGTERM, signal.SIG_IGN)

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.delenv(patience, raising=False)
    if own:
        monkeypatch.setenv("PYTHONBREAKPOINT", own)
    else:
        monkeypatch.delenv("PYTHONBREAKPOINT", raising=False)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "cluster_resources", dict)
    monkeypatch.setattr(ray, "init", init)
    before = signal.getsignal(signal.SIGTERM), dict(os.environ)
    start_ray(quiet=True)
    assert (signal.getsignal(signal.SIGTERM), dict(os.environ)) == before


def test_more_workers_than_there_are(cluster, tmp_path):
    with pytest.raises(ValueError, match="workers=64, but Ray has 2 CPUs; lower it"):
        on_workers(diverge, (tmp_path,), 64, tmp_path)


STEPS, SAVED, LOST = 6, 2, 4  # steps of the run, steps between two states, the step in which a worker dies
PPO_OF_A_JOB = ex.ppo_worker


def mortal(job, start, data, out):
    """PPO of a job with a reward that tells any two responses apart.
    The second of two workers dies of kill -9 in the middle of a step, once"""
    rank, scored, looked, dead, probe = Team.join().rank, [], [], Path(job.runs) / "dead", P.probe

    def reward(text, problem, format_score):
        scored.append(text)
        return fingerprint(text, problem)

    def looks(*args):  # once a step, between scoring and improving
        looked.append(args)
        if rank == 1 and len(looked) == LOST and not dead.exists():
            dead.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return probe(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(P, "reward_of", reward)
        patch.setattr(P, "probe", looks)
        PPO_OF_A_JOB(job, start, data, out)
    (Path(job.runs) / f"scored-{rank}").write_text(str(len(scored)))


def test_a_lost_worker_is_replaced(cluster, tmp_path, monkeypatch):
    """The run ends as one worker alone, undisturbed, would have ended it.

    The verifier's rewards are all 0 at first: the critic's first gradient would be rounding, which Adam
    makes as large as any, and no two CPUs would agree.
    """
    cfg = ex.preset("smoke", base=dict(docs=300), ppo=dict(steps=STEPS, save_every=SAVED))
    job = ex.Job(cfg, "plain", "base", 0, str(tmp_path / "alone"), progress=False)
    monkeypatch.setattr(ex, "ppo_worker", mortal)
    want = ex.ppo_stage(job)
    shutil.copytree(tmp_path / "alone", tmp_path / "team")
    shutil.rmtree(next((tmp_path / "team").rglob(want.name)))
    team = replace(job, runs=str(tmp_path / "team"), cfg=changed(cfg, run=dict(workers=2)))
    with pytest.warns(UserWarning, match="a worker was lost .*the team starts again"):
        got = ex.ppo_stage(team)
    assert (
        got.name == want.name and (tmp_path / "team/dead").exists() and not (tmp_path / "alone/dead").exists()
    )
    again = cfg.ppo.prompts * (STEPS - (LOST - 1) // SAVED * SAVED)  # responses since the last state
    assert [int((tmp_path / f"team/scored-{r}").read_text()) for r in range(2)] == [
        again,
        0,
    ]  # the first scores for all
    close_logs(want, got)
    for step in range(0, STEPS + 1, SAVED):
        close_weights(*(d / f"step-{step:04d}" for d in (want, got)), 3e-4)
    assert all(r["grad_norm_policy"] > 0.1 and r["grad_norm_critic"] > 0.1 for r in untimed(want))
    assert sorted(p.name for p in got.iterdir()) == sorted(p.name for p in want.iterdir())

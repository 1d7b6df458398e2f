"What a long run meets: no memory, numbers that are none, a full disk, another process, damaged files, kill -9. What the user reads, and how it goes on"
import math
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import threading
import warnings
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from tiny import TOK, cut_short, fingerprint, forked, model, run, untimed

from stars import cli, experiments as ex, parallel, ppo as P, rollouts as R, sft as S
from stars.models import load_model
from stars.rollouts import LlamaEngine
from stars.sft import read_log

SETTINGS = ["base_docs=300", "prime_rows=120", "data_eval=10", "ppo_minibatch=16", "sft_bf16=false"] # one update a step: what is cut into other pieces stays comparable


def stars(*args, set_=()):
    cli.main([*args, "--preset", "smoke", "--condition", "empty_cot", "--set", *SETTINGS, *set_])


def refused(capsys, *args, set_=(), code=2):
    "What a command that cannot go on says, in its one line"
    capsys.readouterr()
    with pytest.raises(SystemExit) as e: stars(*args, set_=set_)
    said = [l for l in capsys.readouterr().err.splitlines() if l.startswith("stars: ")]
    assert e.value.code == code and len(said) == 1, said
    return said[0]


@pytest.fixture(scope="module", autouse=True)
def rewards():
    """Rewards that tell any two responses apart. Those of the verifier are all 0 here: the critic's gradient would
    begin as rounding, and runs that cut their batches differently could not be compared"""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(P, "reward_of", lambda text, problem, format_score: fingerprint(text, problem))
        yield


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    "A run that nothing happens to"
    with pytest.MonkeyPatch.context() as patch:
        torch.set_num_threads(1)
        patch.chdir(tmp_path_factory.mktemp("whole"))
        stars("eval")
        return Path.cwd()


@pytest.fixture
def begun(whole, tmp_path, monkeypatch):
    "The same up to the stage in question, in the current folder"
    def up_to(stage):
        shutil.copytree(whole/"runs", "runs")
        for name in ("eval", "ppo", "sft")[:dict(eval=1, ppo=2, sft=3)[stage]]:
            for p in Path("runs").glob(f"smoke/plain/empty_cot/seed0/{name}-*"): shutil.rmtree(p)
    monkeypatch.chdir(tmp_path)
    return up_to


def folder(stage, root="."): return next(Path(root).glob(f"runs/smoke/plain/empty_cot/seed0/{stage}-*"))


def as_undisturbed(whole, *stages, tol=1e-4):
    "The logs and results are what they are in the other run"
    for stage in stages:
        a, b = untimed(folder(stage, whole)), untimed(folder(stage))
        assert folder(stage).name == folder(stage, whole).name and len(a) == len(b) and a
        for x, y in zip(a, b): assert y == pytest.approx(x, rel=tol, abs=tol), (stage, x["step"])


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    "A still smaller run that nothing happens to"
    out = tmp_path_factory.mktemp("tiny")
    run("ppo", out)
    return out


def fails(at, fn, how):
    "A function that does something else, once, at its call number `at` (from 1)"
    calls = []
    def failing(*args, **kwargs):
        calls.append(0)
        return how(*args, **kwargs) if len(calls) == at else fn(*args, **kwargs)
    return failing


def too_much(*args, **kwargs): return torch.empty(2**60) # what the allocator says is the real thing


# memory

@pytest.mark.parametrize("where,at,stage,says,change", [
    ((R.Slots, "empty"), 3, "ppo", "out of memory while sampling 16 responses of up to", "engine_rows=5"),
    ((P, "policy_loss"), 3, "ppo", "out of memory while training on micro-batches of 2048 tokens: lower ppo_micro_tokens", "ppo_micro_tokens=512"),
    ((P.Critic, "forward"), 5, "ppo", "lower ppo_micro_tokens", "ppo_micro_tokens=512"),
    ((S, "sft_loss"), 3, "sft", "out of memory while training on micro-batches of 2048 tokens: lower micro_tokens (of a preset: sft_micro_tokens", "sft_micro_tokens=512")], ids=["sampling", "update", "critic", "sft"])
def test_out_of_memory(whole, begun, monkeypatch, capsys, where, at, stage, says, change):
    "The message names the setting; with the setting lowered, the same stage goes on"
    begun(stage)
    with monkeypatch.context() as patch:
        patch.setattr(*where, fails(at, getattr(*where), too_much))
        said = refused(capsys, stage)
    assert says in said and change.split("=")[0] in said and "goes on from there" in said
    stars(stage, set_=[change])
    as_undisturbed(whole, stage)


def test_every_kind_of_no_memory():
    for error in (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), MemoryError("std::bad_alloc")):
        with pytest.raises(MemoryError, match="out of memory while trying: lower it"), parallel.memory_for("trying", "it"): raise error
    with pytest.raises(RuntimeError, match="^shapes$"), parallel.memory_for("trying", "it"): raise RuntimeError("shapes") # and nothing else


# numbers

def test_a_loss_that_is_no_number(whole, begun, monkeypatch, capsys):
    "Nothing of the step is kept: weights, state and log are those of the step before"
    begun("ppo")
    with monkeypatch.context() as patch:
        patch.setattr(P, "reward_of", fails(16*2 + 5, P.reward_of, lambda *args, **how: math.nan)) # in the third step
        said = refused(capsys, "ppo")
    out = folder("ppo")
    assert "step 3: grad_norm_policy is nan and grad_norm_critic is nan" in said and f"the last good state is {parallel.saved_states(out)[0].name}" in said and "learning rate" in said
    assert parallel.saved_states(out)[0].name.startswith("state-000002") and [r["step"] for r in read_log(out/"metrics.jsonl")] == [1, 2]
    assert all(p.isfinite().all() for p in load_model(out/"step-0002").parameters()) and "NaN" not in (out/"metrics.jsonl").read_text()
    stars("ppo")
    as_undisturbed(whole, "ppo")


def test_a_weight_that_is_no_number(begun, capsys):
    "The base was spoilt: the first step of SFT says so, and sampling from it, too"
    m = model()
    m.model.norm.weight.data[3] = math.nan
    with pytest.raises(FloatingPointError, match="its weights hold NaN"): LlamaEngine(m, TOK.eos_token_id).generate([[3, 4, 5]], 5, 1., [1])
    begun("sft")
    base = next(Path("runs").glob("smoke/plain/base-*/model"))
    m = load_model(base)
    m.model.norm.weight.data[3] = math.nan
    m.save_pretrained(base)
    said = refused(capsys, "sft")
    assert "step 1: loss is nan and grad_norm is nan" in said and "no state was saved yet" in said
    assert not folder("sft").joinpath("model").exists() and not read_log(folder("sft")/"metrics.jsonl")


# disk

@contextmanager
def room(size):
    "No file may be longer: writing on fails as on a full disk (Python ignores the signal)"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try: yield
    finally: resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("size,says", [(8_000, "the checkpoint {out}/step-0002 could not be written"), (40_000, "the state of step 2 could not be written to {out}")], ids=["checkpoint", "state"])
def test_a_full_disk(tiny, tmp_path, size, says):
    "What was there before stays; nothing half-written has a name that counts; with room, the run goes on"
    out = tmp_path/"full"
    cut_short("ppo", out, 1)
    kept = {p.relative_to(out): p.read_bytes() for p in out.rglob("*") if p.is_file()}
    assert max(map(len, kept.values())) > 40_000 and 8_000 < (out/"step-0001/model.safetensors").stat().st_size < 40_000
    with room(size), pytest.raises(OSError) as e: run("ppo", out)
    assert str(e.value).startswith(says.format(out=out)) and "File too large" in str(e.value) and "Make room: the same command goes on" in str(e.value) and "\n" not in str(e.value)
    there = {p.relative_to(out): p.read_bytes() for p in out.rglob("*") if p.is_file() and p.name != "metrics.jsonl"}
    assert {k: v for k, v in there.items() if k.parts[0] != "step-0002"} == {k: v for k, v in kept.items() if k.name != "metrics.jsonl"}
    assert ("step-0002" in {k.parts[0] for k in there}) == (size == 40_000) and not list(out.glob("*tmp*"))
    run("ppo", out)
    assert untimed(out) == untimed(tiny)


def test_no_room_for_the_log(tmp_path):
    log = S.Log(tmp_path/"metrics.jsonl")
    log(step=1)
    with room(20), pytest.raises(OSError, match="metrics.jsonl could not be written .*Make room"): log(step=2, loss=1.)
    assert read_log(tmp_path/"metrics.jsonl") == [dict(step=1)] # the half row does not count
    S.Log(tmp_path/"metrics.jsonl", 1)(step=2)
    assert read_log(tmp_path/"metrics.jsonl") == [dict(step=1), dict(step=2)]


# other processes

def test_two_processes_on_one_run(whole, begun, capsys):
    "The second is refused at once; a sweep's waits"
    begun("ppo")
    name = folder("ppo", whole).name
    lock = Path("runs/smoke/plain/empty_cot/seed0").resolve()/f".{name}.lock"
    code = "import sys, filelock\nwith filelock.FileLock(sys.argv[1]):\n print('held', flush=True); sys.stdin.read()"
    other = subprocess.Popen([sys.executable, "-c", code, str(lock)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout.readline() == "held\n"
        said = refused(capsys, "ppo")
        assert name in said and "is being written by another process: wait until it is done, or stop it" in said and not lock.parent.joinpath(f"{name}.partial").exists()
        job = ex.Job(ex.preset("smoke", **dict(s.split("=") for s in SETTINGS)), "plain", "empty_cot", progress=False, wait=True)
        waiting = threading.Thread(target=ex.ppo_stage, args=[job], daemon=True)
        waiting.start()
        waiting.join(1)
        assert waiting.is_alive() and not lock.parent.joinpath(f"{name}.partial").exists()
    finally: other.communicate("")
    waiting.join(600)
    assert not waiting.is_alive()
    as_undisturbed(whole, "ppo")


# damaged files

def cut(path): path.write_bytes(path.read_bytes()[:-100])


def flip(path):
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 4
    path.write_bytes(raw)


@pytest.mark.parametrize("damage", [cut, flip, lambda p: p.unlink()], ids=["cut", "flipped", "missing"])
@pytest.mark.parametrize("n", [1, 2], ids=["the newest", "both"])
def test_damaged_states(tiny, tmp_path, damage, n):
    "A warning names each; the run goes on from the one before, or from the beginning, and ends as it would have"
    out = tmp_path/"damaged"
    cut_short("ppo", out, 2)
    bad = parallel.saved_states(out)[:n]
    assert len(parallel.saved_states(out)) == 2
    for state in bad: damage(max(state.iterdir(), key=lambda p: p.stat().st_size))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        run("ppo", out)
    said = [str(w.message) for w in said if "damaged" in str(w.message)]
    assert len(said) == n and all(s.name in w and "does not match the hash in its name" in w for s, w in zip(bad, said))
    assert untimed(out) == untimed(tiny)
    left = parallel.saved_states(out)
    assert [s.name[:12] for s in left] == ["state-000003", "state-000002"] and all(parallel._content(s) == s.name.rsplit("-", 1)[1] for s in left)
    assert (out/"step-0003/model.safetensors").read_bytes() == (tiny/"step-0003/model.safetensors").read_bytes()


def test_a_damaged_checkpoint(whole, begun, capsys):
    "Met at the evaluation: the file's folder is named, and what to do; doing it helps"
    begun("eval")
    cut(folder("ppo")/"step-0002/model.safetensors")
    said = refused(capsys, "eval")
    assert f"{folder('ppo')}/step-0002" in said and "damaged" in said and "remove the stage it belongs to" in said
    shutil.rmtree(folder("ppo"))
    stars("eval")
    as_undisturbed(whole, "ppo")
    assert (folder("eval")/"results.csv").read_text() == (folder("eval", whole)/"results.csv").read_text()


# kill -9

TOUCHES = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.listdir", "os.scandir"} # audit events


def train(out, last=math.inf, more=0):
    """Kill -9, `more` calls after touch number `last` of something in the folder.
    Without a number: to the end, and write down how many touches a step takes"""
    torch.set_num_threads(1)
    touches = 0
    def touched(event, args):
        nonlocal touches
        if event not in TOUCHES or not str(args[0]).startswith(str(out)): return
        touches += 1
        if touches == last: sys.setprofile(die)
    def die(frame, event, arg):
        nonlocal more
        more -= 1
        if more < 0: os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(touched)
    run("ppo", out, steps=12)
    (out.parent/"touches").write_text(str(touches // 12))


def test_killed_while_saving(tmp_path):
    "Again and again, wherever it happens to be: what counts is whole, and the end is the same"
    draw, ctx, out, tmp = random.Random(0), forked(), tmp_path/"killed", tmp_path/"killed"/".state.tmp"
    def go(where, *last):
        p = ctx.Process(target=train, args=[where, *last])
        p.start()
        p.join()
        return p.exitcode
    assert go(tmp_path/"whole") == 0
    kills, caught, touches = 0, 0, int((tmp_path/"touches").read_text())
    while kills < 8 and go(out, draw.randrange(1, 3 * touches), draw.randrange(40)) != 0: # within three steps
        kills, caught = kills + 1, caught + tmp.exists()
        assert all(parallel._content(s) == s.name.rsplit("-", 1)[1] for s in parallel.saved_states(out))
        for c in out.glob("step-????"): load_model(c)
    assert kills >= 3 and caught # some of them while a state was half written
    assert go(out) == 0
    assert untimed(out) == untimed(tmp_path/"whole") and not list(out.glob("*tmp*"))
    assert (out/"step-0012/model.safetensors").read_bytes() == (tmp_path/"whole/step-0012/model.safetensors").read_bytes()

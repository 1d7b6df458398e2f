"""What a long run meets: no memory, numbers that are none, a full disk, another process, damaged files,
kill -9, any fault of a disk. What the user reads, and how it goes on"""

import errno
import json
import math
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
import warnings
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from tiny import TOK, cut_short, fingerprint, forked, model, run, untimed

from stars.cli import main as cli
from stars.lab import experiments as ex
from stars.lab import stages
from stars.models import parallel
from stars.models.checkpoints import load_model
from stars.rl import ppo as P
from stars.rl import rollouts as R
from stars.rl import sft as S
from stars.rl.loops import read_log
from stars.rl.rollouts import LlamaEngine
from stars.show import plots
from stars.util import files

SETTINGS = [
    "base.docs=300",
    "priming.rows=120",
    "data.eval=10",
    "ppo.minibatch=16",
    "sft.bf16=false",
]  # one update a step: what is cut into other pieces stays comparable


def stars(*args, set_=()):
    cli.main([*args, "--preset", "smoke", "--condition", "empty_cot", "--set", *SETTINGS, *set_])


def refused(capsys, *args, set_=(), code=2):
    "What a command that cannot go on says, in its one line"
    capsys.readouterr()
    with pytest.raises(SystemExit) as e:
        stars(*args, set_=set_)
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("stars: ")]
    assert e.value.code == code and len(said) == 1, said
    return said[0]


@pytest.fixture(scope="module", autouse=True)
def rewards():
    """Rewards that tell any two responses apart. Those of the verifier are all 0 here: the critic's
    gradient would begin as rounding, and runs that cut their batches differently could not be compared"""
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
        shutil.copytree(whole / "runs", "runs")
        for name in ("eval", "ppo", "sft")[: dict(eval=1, ppo=2, sft=3)[stage]]:
            for p in Path("runs").glob(f"smoke/plain/empty_cot/seed0/{name}-*"):
                shutil.rmtree(p)

    monkeypatch.chdir(tmp_path)
    return up_to


def folder(stage, root="."):
    return next(Path(root).glob(f"runs/smoke/plain/empty_cot/seed0/{stage}-*"))


def as_undisturbed(whole, *stages, tol=1e-4):
    "The logs and results are what they are in the other run"
    for stage in stages:
        a, b = untimed(folder(stage, whole)), untimed(folder(stage))
        assert folder(stage).name == folder(stage, whole).name and len(a) == len(b) and a
        for x, y in zip(a, b):
            assert y == pytest.approx(x, rel=tol, abs=tol), (stage, x["step"])


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


def slowly(fn):
    def slow(*args):
        time.sleep(2)
        return fn(*args)

    return slow


def too_much(*args, **kwargs):
    return torch.empty(2**60)  # what the allocator says is the real thing


# memory


@pytest.mark.parametrize(
    "where,at,stage,says,change",
    [
        (
            (R.Slots, "empty"),
            3,
            "ppo",
            "out of memory while sampling 16 responses of up to",
            "run.engine_rows=5",
        ),
        (
            (P, "policy_loss"),
            3,
            "ppo",
            "out of memory while training on micro-batches of 2048 tokens: lower ppo.micro_tokens",
            "ppo.micro_tokens=512",
        ),
        ((P.Critic, "forward"), 5, "ppo", "lower ppo.micro_tokens", "ppo.micro_tokens=512"),
        (
            (S, "sft_loss"),
            3,
            "sft",
            "out of memory while training on micro-batches of 2048 tokens: lower micro_tokens (of a "
            "preset: sft.micro_tokens",
            "sft.micro_tokens=512",
        ),
    ],
    ids=["sampling", "update", "critic", "sft"],
)
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
    for error in (
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        MemoryError("std::bad_alloc"),
    ):
        with (
            pytest.raises(MemoryError, match="out of memory while trying: lower it"),
            parallel.memory_for("trying", "it"),
        ):
            raise error
    with pytest.raises(RuntimeError, match="^shapes$"), parallel.memory_for("trying", "it"):
        raise RuntimeError("shapes")  # and nothing else


# numbers


def test_a_loss_that_is_no_number(whole, begun, monkeypatch, capsys):
    "Nothing of the step is kept: weights, state and log are those of the step before"
    begun("ppo")
    with monkeypatch.context() as patch:
        patch.setattr(
            P, "reward_of", fails(16 * 2 + 5, P.reward_of, lambda *args, **how: math.nan)
        )  # in the third step
        patch.setattr(parallel, "sealed", slowly(parallel.sealed))  # the state has no name yet
        said = refused(capsys, "ppo")
    out = folder("ppo")
    assert (
        "step 3: grad_norm_policy is nan and grad_norm_critic is nan" in said
        and f"the last good state is {parallel.saved_states(out)[0].name}" in said
        and "learning rate" in said
    )
    assert parallel.saved_states(out)[0].name.startswith("state-000002") and [
        r["step"] for r in read_log(out / "metrics.jsonl")
    ] == [1, 2]
    assert (
        all(p.isfinite().all() for p in load_model(out / "step-0002").parameters())
        and "NaN" not in (out / "metrics.jsonl").read_text()
    )
    stars("ppo")
    as_undisturbed(whole, "ppo")


def test_a_weight_that_is_no_number(begun, capsys):
    "The base was spoilt: the first step of SFT says so, and sampling from it, too"
    m = model()
    m.model.norm.weight.data[3] = math.nan
    with pytest.raises(FloatingPointError, match="its weights hold NaN"):
        LlamaEngine(m, TOK.eos_token_id).generate([[3, 4, 5]], 5, 1.0, [1])
    begun("sft")
    base = next(Path("runs").glob("smoke/plain/base-*/model"))
    m = load_model(base)
    m.model.norm.weight.data[3] = math.nan
    m.save_pretrained(base)
    said = refused(capsys, "sft")
    assert "step 1: loss is nan and grad_norm is nan" in said and "no state was saved yet" in said
    assert not folder("sft").joinpath("model").exists() and not read_log(folder("sft") / "metrics.jsonl")


# disk


@contextmanager
def room(size):
    "No file may be longer: writing on fails as on a full disk (Python ignores the signal)"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize(
    "size,says",
    [
        (8_000, "the checkpoint {out}/step-0002 could not be written"),
        (40_000, "the state of step 2 could not be written to {out}"),
    ],
    ids=["checkpoint", "state"],
)
def test_a_full_disk(tiny, tmp_path, size, says):
    "What was there before stays; nothing half-written has a name that counts; with room, the run goes on"
    out = tmp_path / "full"
    cut_short("ppo", out, 1)
    kept = {p.relative_to(out): p.read_bytes() for p in out.rglob("*") if p.is_file()}
    assert (
        max(map(len, kept.values())) > 40_000
        and 8_000 < (out / "step-0001/model.safetensors").stat().st_size < 40_000
    )
    with room(size), pytest.raises(OSError) as e:
        run("ppo", out)
    assert (
        str(e.value).startswith(says.format(out=out))
        and "File too large" in str(e.value)
        and "Make room: the same command goes on" in str(e.value)
        and "\n" not in str(e.value)
    )
    there = {
        p.relative_to(out): p.read_bytes()
        for p in out.rglob("*")
        if p.is_file() and p.name != "metrics.jsonl"
    }
    assert {k: v for k, v in there.items() if k.parts[0] != "step-0002"} == {
        k: v for k, v in kept.items() if k.name != "metrics.jsonl"
    }
    assert ("step-0002" in {k.parts[0] for k in there}) == (size == 40_000) and not list(out.glob("*tmp*"))
    run("ppo", out)
    assert untimed(out) == untimed(tiny)


def test_no_room_for_the_log(tmp_path):
    log = S.Log(tmp_path / "metrics.jsonl")
    log(step=1)
    with room(20), pytest.raises(OSError, match="metrics.jsonl could not be written .*Make room"):
        log(step=2, loss=1.0)
    assert read_log(tmp_path / "metrics.jsonl") == [dict(step=1)]  # the half row does not count
    S.Log(tmp_path / "metrics.jsonl", 1)(step=2)
    assert read_log(tmp_path / "metrics.jsonl") == [dict(step=1), dict(step=2)]


# other processes


def test_two_processes_on_one_run(whole, begun, capsys):
    "The second is refused at once; a sweep's waits"
    begun("ppo")
    name = folder("ppo", whole).name
    lock = Path("runs/smoke/plain/empty_cot/seed0").resolve() / f".{name}.lock"
    code = (
        "import sys, filelock\nwith filelock.FileLock(sys.argv[1]):\n print('held', flush=True); "
        "sys.stdin.read()"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", code, str(lock)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert other.stdout.readline() == "held\n"
        said = refused(capsys, "ppo")
        assert (
            name in said
            and "is being written by another process: wait until it is done, or stop it" in said
            and not lock.parent.joinpath(f"{name}.partial").exists()
        )
        job = ex.Job(
            ex.preset("smoke", **dict(s.split("=") for s in SETTINGS)),
            "plain",
            "empty_cot",
            progress=False,
            wait=True,
        )
        waiting = threading.Thread(target=ex.ppo_stage, args=[job], daemon=True)
        waiting.start()
        waiting.join(1)
        assert waiting.is_alive() and not lock.parent.joinpath(f"{name}.partial").exists()
    finally:
        other.communicate("")
    waiting.join(600)
    assert not waiting.is_alive()
    as_undisturbed(whole, "ppo")


# damaged files


def cut(path):
    path.write_bytes(path.read_bytes()[:-100])


def flip(path):
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 4
    path.write_bytes(raw)


@pytest.mark.parametrize("damage", [cut, flip, lambda p: p.unlink()], ids=["cut", "flipped", "missing"])
@pytest.mark.parametrize("n", [1, 2], ids=["the newest", "both"])
def test_damaged_states(tiny, tmp_path, damage, n):
    """A warning names each; the run goes on from the one before, or from the beginning, and ends as it
    would have"""
    out = tmp_path / "damaged"
    cut_short("ppo", out, 2)
    bad = parallel.saved_states(out)[:n]
    assert len(parallel.saved_states(out)) == 2
    for state in bad:
        damage(max(state.iterdir(), key=lambda p: p.stat().st_size))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        run("ppo", out)
    said = [str(w.message) for w in said if "damaged" in str(w.message)]
    assert len(said) == n and all(
        s.name in w and "does not match the hash in its name" in w for s, w in zip(bad, said)
    )
    assert untimed(out) == untimed(tiny)
    left = parallel.saved_states(out)
    assert [s.name[:12] for s in left] == ["state-000003", "state-000002"] and all(
        parallel.state_digest(s) == s.name.rsplit("-", 1)[1] for s in left
    )
    assert (out / "step-0003/model.safetensors").read_bytes() == (
        tiny / "step-0003/model.safetensors"
    ).read_bytes()


def test_a_damaged_checkpoint(whole, begun, capsys):
    "Met at the evaluation: the file's folder is named, and what to do; doing it helps"
    begun("eval")
    cut(folder("ppo") / "step-0002/model.safetensors")
    said = refused(capsys, "eval")
    assert (
        f"{folder('ppo')}/step-0002" in said
        and "damaged" in said
        and "remove the stage it belongs to" in said
    )
    shutil.rmtree(folder("ppo"))
    stars("eval")
    as_undisturbed(whole, "ppo")
    assert (folder("eval") / "results.csv").read_text() == (folder("eval", whole) / "results.csv").read_text()


# kill -9

TOUCHES = {
    "open",
    "os.mkdir",
    "os.rename",
    "os.remove",
    "os.rmdir",
    "os.listdir",
    "os.scandir",
}  # audit events


def train(out, last=math.inf, more=0):
    """Kill -9, `more` calls after touch number `last` of something in the folder.
    Without a number: to the end, and write down how many touches a step takes"""
    torch.set_num_threads(1)
    touches = 0

    def touched(event, args):
        nonlocal touches
        if event not in TOUCHES or not str(args[0]).startswith(str(out)):
            return
        touches += 1
        if touches == last:
            sys.setprofile(die)

    def die(frame, event, arg):
        nonlocal more
        more -= 1
        if more < 0:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(touched)
    run("ppo", out, steps=12)
    (out.parent / "touches").write_text(str(touches // 12))


def test_killed_while_saving(tmp_path):
    "Again and again, wherever it happens to be: what counts is whole, and the end is the same"
    draw, ctx, out, tmp = random.Random(0), forked(), tmp_path / "killed", tmp_path / "killed" / ".state.tmp"

    def go(where, *last):
        p = ctx.Process(target=train, args=[where, *last])
        p.start()
        p.join()
        return p.exitcode

    assert go(tmp_path / "whole") == 0
    kills, caught, touches = 0, 0, int((tmp_path / "touches").read_text())
    while (
        kills < 8 and go(out, draw.randrange(1, 3 * touches), draw.randrange(40)) != 0
    ):  # within three steps
        kills, caught = kills + 1, caught + tmp.exists()
        assert all(parallel.state_digest(s) == s.name.rsplit("-", 1)[1] for s in parallel.saved_states(out))
        for c in out.glob("step-????"):
            load_model(c)
    assert kills >= 3 and caught  # some of them while a state was half written
    assert go(out) == 0
    assert untimed(out) == untimed(tmp_path / "whole") and not list(out.glob("*tmp*"))
    assert (out / "step-0012/model.safetensors").read_bytes() == (
        tmp_path / "whole/step-0012/model.safetensors"
    ).read_bytes()


def hash_slowly(out, steps=0):
    "Kill -9 in the thread that hashes the second state, when the run is `steps` steps further; 0: never"
    torch.set_num_threads(1)
    sealed, called = parallel.sealed, []

    def slow(folder, names):
        called.append(names)
        done = sealed(folder, names)
        while steps and len(called) == 2:
            if len((out / "metrics.jsonl").read_text().splitlines()) >= 8 + steps:
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(0.01)
        return done

    parallel.sealed = slow
    run("ppo", out, steps=12, save_every=4)


def test_killed_while_hashing(tmp_path):
    "The run goes on meanwhile; what has no name yet is not taken for a state, and the one before it is whole"
    ctx = forked()
    for name, steps in (("whole", 0), ("killed", 2)):
        p = ctx.Process(target=hash_slowly, args=[tmp_path / name, steps])
        p.start()
        p.join(600)
        assert p.exitcode == -9 * (steps > 0)
    out = tmp_path / "killed"
    assert len(untimed(out)) >= 10 and (out / parallel.UNNAMED).exists()
    (left,) = parallel.saved_states(out)
    assert left.name == f"state-000004-{parallel.state_digest(left)}"
    run("ppo", out, steps=12, save_every=4)
    assert untimed(out) == untimed(tmp_path / "whole") and not list(out.glob("*tmp*"))
    for step in (4, 8, 12):
        a, b = (d / f"step-{step:04d}/model.safetensors" for d in (out, tmp_path / "whole"))
        assert a.read_bytes() == b.read_bytes()
    assert [s.name[:12] for s in parallel.saved_states(out)] == ["state-000012", "state-000008"]


# resumed at the joints


@pytest.mark.parametrize(
    "kind,how,stop",
    [
        ("sft", dict(save_every=2), 4),  # of 8 steps, 4 an epoch
        ("sft", dict(save_every=4), 8),  # the state of the last step is there, the model is not
        ("sft", dict(save_every=3), 6),  # in the middle of an epoch
        ("ppo", dict(steps=5, prompts=5, minibatch=5), 4),  # 20 problems: all of them were used once
        ("ppo", {}, 3),
    ],
    ids=["end of an epoch", "last step", "middle", "end of a pass over the problems", "last step of PPO"],
)
def test_resumed_where_something_ends(tmp_path, kind, how, stop):
    "The same weights and the same log, bit by bit; given once more, nothing is done again"
    a, b = tmp_path / "whole", tmp_path / "cut"
    run(kind, a, **how)
    cut_short(kind, b, stop, **how)
    assert parallel.saved_states(b)[0].name.startswith(f"state-{stop:06d}")
    for _ in range(2):
        run(kind, b, **how)
        models = [p.relative_to(a) for p in a.rglob("model.safetensors")]
        assert (
            models
            and all((a / p).read_bytes() == (b / p).read_bytes() for p in models)
            and untimed(a) == untimed(b)
        )
        assert {p.name[:12] for p in a.iterdir()} == {
            p.name[:12] for p in b.iterdir()
        }  # a state's name goes on with its hash


# what lies on the disk


def interrupted(*args, **kwargs):
    raise KeyboardInterrupt


def test_a_file_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    "Its content first, then the name in its folder"
    done, fsync, rename = [], os.fsync, os.replace

    def flushed(fd):
        done.append(os.readlink(f"/proc/self/fd/{fd}"))
        fsync(fd)

    def renamed(a, b):
        done.append((str(a), str(b)))
        rename(a, b)

    monkeypatch.setattr(os, "fsync", flushed)
    monkeypatch.setattr(os, "replace", renamed)
    path = files.write_json(tmp_path / "x.json", [1])
    [content, (tmp, to), folder] = done
    assert content == tmp != to == str(path) and folder == str(tmp_path)
    done.clear()
    with files.replacing_folder(tmp_path / "model") as tmp:
        (tmp / "deep").mkdir(parents=True)
        (tmp / "deep/a").write_text("a")
    assert {str(tmp), f"{tmp}/deep", f"{tmp}/deep/a"} == set(done[:3]) and done[3:] == [str(tmp_path)]


def test_where_folders_cannot_be_flushed(tmp_path, monkeypatch):
    "As on some network drives: a file's content must be flushed, its folder if the drive knows how"
    fsync = os.fsync

    def only_files(fd):
        if Path(f"/proc/self/fd/{fd}").is_dir():
            raise OSError(errno.EINVAL, "Invalid argument")
        fsync(fd)

    monkeypatch.setattr(os, "fsync", only_files)
    assert files.write_json(tmp_path / "x.json", [1]).read_text() == "[\n 1\n]\n"

    def none(fd):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", none)
    with pytest.raises(OSError, match=r"^[^\n]*x.json could not be written \(.*\). Make room"):
        files.write_json(tmp_path / "x.json", [2])
    assert (tmp_path / "x.json").read_text() == "[\n 1\n]\n" and [p.name for p in tmp_path.iterdir()] == [
        "x.json"
    ]


def test_no_room_for_a_file(tmp_path):
    "Whoever writes, the line names the file"
    table = files.pa.table(dict(x=range(10_000)))
    files.write_json(tmp_path / "x", "old")
    for write in (
        lambda p: files.write_bytes(p, bytes(10_000)),
        lambda p: files.write_json(p, [1] * 10_000),
        lambda p: files.write_table(table, p),
    ):
        with (
            room(2_000),
            pytest.raises(
                OSError,
                match=r"^[^\n]*/x could not be written \([^\n]*File too large[^\n]*\). "
                r"Make room: the same command goes on$",
            ),
        ):
            write(tmp_path / "x")
        assert [p.name for p in tmp_path.iterdir()] == ["x"] and (tmp_path / "x").read_text() == '"old"\n'
    with pytest.raises(FileNotFoundError), files.replacing(tmp_path / "x"):
        (tmp_path / "other").read_text()  # another file's error stays what it is


def test_an_older_folder_steps_aside(tmp_path, monkeypatch):
    "Killed at any moment, there is the old one, the new one, or none: never half of one"

    def write(text):
        with files.replacing_folder(tmp_path / "model") as tmp:
            tmp.mkdir()
            for name in "ab":
                (tmp / name).write_text(text)

    def there():
        return {p.name: p.read_text() for p in (tmp_path / "model").iterdir()}

    write("old")
    with monkeypatch.context() as patch:
        patch.setattr(
            files.shutil, "rmtree", fails(3, shutil.rmtree, interrupted)
        )  # after two that clear the way
        with pytest.raises(KeyboardInterrupt):
            write("new")
    assert there() == dict(a="new", b="new")
    write("newer")
    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", fails(2, Path.rename, interrupted))  # the old one is aside
        with pytest.raises(KeyboardInterrupt):
            write("newest")
    assert there() == dict(a="newer", b="newer") and [p.name for p in tmp_path.iterdir()] == ["model"]
    (tmp_path / "model").rename(tmp_path / "model.old.tmp")  # killed there
    with pytest.raises(RuntimeError), files.replacing_folder(tmp_path / "model"):
        raise RuntimeError("no room")
    assert there() == dict(a="newer", b="newer")


def test_a_state_loses_its_name_first(tmp_path, monkeypatch):
    "Half removed, it is none; the next run removes the rest"
    cut_short("sft", tmp_path, 4, save_every=2)
    with monkeypatch.context() as patch:
        patch.setattr(parallel.shutil, "rmtree", interrupted)
        with pytest.raises(KeyboardInterrupt):
            parallel.drop_states(tmp_path)
    assert [s.name[:12] for s in parallel.saved_states(tmp_path)] == ["state-000002"] and list(
        tmp_path.glob(".state-000004*.tmp")
    )
    run("sft", tmp_path, save_every=2)
    assert not list(tmp_path.glob(".state*")) and len(parallel.saved_states(tmp_path)) == 2


def test_a_stage_killed_just_after_it_was_done(tmp_path, monkeypatch):
    "The states that it needs no more go when it is asked for again; looking it up changes nothing"

    def go(build=True):
        return stages.stage(tmp_path, "sft", {}, {}, lambda out: run("sft", out, epochs=1), build)

    with monkeypatch.context() as patch:
        patch.setattr(stages, "drop_states", interrupted)
        with pytest.raises(KeyboardInterrupt):
            go()
    assert parallel.saved_states(done := go(build=False))
    assert (
        go() == done
        and not parallel.saved_states(done)
        and {p.name for p in done.iterdir()} == {"config.json", "manifest.json", "metrics.jsonl", "model"}
    )


def test_a_figures_manifest_comes_last(tmp_path, monkeypatch):
    "Where there is one, the files beside it are those that it describes"

    def draw(height):
        fig = plots.plt.figure(figsize=(1, 1))
        fig.add_subplot().bar(["a"], [height])
        plots.save_figure(fig, "fig", plots.pd.DataFrame(dict(x=[height])), tmp_path, dpi=20)
        plots.plt.close(fig)

    draw(1)
    for at in range(1, 5):
        with monkeypatch.context() as patch:
            patch.setattr(plots, "write_bytes", fails(at, plots.write_bytes, interrupted))
            with pytest.raises(KeyboardInterrupt):
                draw(2)
        assert not (tmp_path / "fig.json").exists()
    draw(2)
    assert {p.name for p in tmp_path.iterdir()} == {f"fig.{kind}" for kind in ("png", "svg", "csv", "json")}


# every fault of a disk


def harness(tmp_path, *args, code=""):
    "What `faults.py` finds, in a process of its own: it changes how that one writes"
    here = Path(__file__).parent
    env = os.environ | dict(
        PYTHONPATH=os.pathsep.join([str(here), *filter(None, sys.path)]), OMP_NUM_THREADS="1"
    )
    code = f"import faults\nfrom pathlib import Path\n{code}\nfaults.main()"
    done = subprocess.run(
        [sys.executable, "-c", code, *args, "--json", tmp_path / "found.json"],
        env=env,
        capture_output=True,
        text=True,
    )
    assert (tmp_path / "found.json").exists(), done.stdout + done.stderr
    return json.loads((tmp_path / "found.json").read_text())


LINUX = pytest.mark.skipif(sys.platform != "linux", reason="the harness knows Linux's tables of functions")


@LINUX
@pytest.mark.slow
def test_some_faults_of_every_command(tmp_path):
    "`make test-faults` tries all of them"
    found = harness(tmp_path, "--sample", "4")
    assert len(found) > 10 and all(
        sum(r["met"].values()) == 5 for r in found.values()
    )  # four, and a power failure when all is done
    assert not [line for r in found.values() for line in r["wrong"]]


CARELESS = """
write = faults.stages.write_json
def in_place(root): (root/"x.json").write_text("[1, 2, 3]")
def unflushed(root):
    (root/".x.tmp").write_text("[1, 2, 3]")
    (root/".x.tmp").rename(root/"x.json")
def leaves(root):
    (root/f".{faults.os.getpid()}").touch()
    write(root/"x.json", 1)
    (root/f".{faults.os.getpid()}").unlink()
def stuck(root):
    if (root/"y.json").exists(): return
    if (root/"x.json").exists(): raise ValueError(f"{root}/x.json exists")
    write(root/"x.json", 1)
    write(root/"y.json", 2)
def apart(root):
    write(root/"about.json", "what y.json holds")
    write(root/"y.json", 2)
def silent(root):
    with faults.suppress(OSError): write(root/"x.json", 1)
def forgetful(root):
    if (root/"x.json").exists(): return
    write(root/"x.json", faults.Shop(root.parent, str).reply("key", "prompt", "batch").text)
FAULTY = (in_place, unflushed, leaves, stuck, apart, silent, forgetful)
faults.COMMANDS = {f.__name__: faults.Command(f, whole={"": "about.json"}) for f in FAULTY}
"""


@LINUX
def test_the_harness_finds_what_is_careless(tmp_path):
    found = {name: r["wrong"] for name, r in harness(tmp_path, code=CARELESS).items()}
    for name, kind, said in [
        ("in_place", "full", "x.json is half-written"),
        ("in_place", "ends", "x.json is half-written"),
        ("in_place", "error", "it says: OSError: [Errno 5]"),
        ("unflushed", "power", "x.json is half-written"),
        ("leaves", "ends", "also has ."),
        ("stuck", "ends", "given again: ValueError"),
        ("apart", "ends", "not whole"),
        ("silent", "error", "but it lacks x.json"),
        ("forgetful", "ends", "1 replies were bought twice"),
    ]:
        assert [line for line in found[name] if line.startswith(f"{name}, {kind} at") and said in line], (
            name,
            kind,
            found[name],
        )
    assert not [
        line for line in found["unflushed"] if "half-written" in line and ", power at" not in line
    ]  # a rename is one step

"Sweeps on a real local Ray of two CPUs: same results, failures, killed workers, Ctrl-C, wrong input"

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import pandas as pd
import psutil
import pytest
import ray
import tiny

from stars.cli import main as cli
from stars.habits.summaries import read_results
from stars.lab import experiments as ex
from stars.lab import sweeps

TINY = {"base.docs": 300, "priming.rows": 60, "data.eval": 10}
SETS = [f"{k}={v}" for k, v in TINY.items()]
CONDITIONS = ["backtracking_verification", "incorrect_only"]


def wait_for(condition, seconds=900):
    end = time.time() + seconds
    while not (found := condition()):
        assert time.time() < end, "waited too long"
        time.sleep(0.05)
    return found


def untimed(path):
    return [
        {k: v for k, v in json.loads(line).items() if not k.startswith(("s_", "tokens_per_s"))}
        for line in Path(path).read_text().splitlines()
    ]


def workers(task):
    "Worker processes that carry out a task at this moment (or, by another name, wait for one)"
    found = []
    for p in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            found += [p] if p.cmdline()[:1] and p.cmdline()[0].startswith(f"ray::{task}") else []
    return found


@pytest.fixture(scope="module")
def cluster():
    with tiny.ray_with(gpus=1):
        yield ray.get_runtime_context().gcs_address


@pytest.fixture(scope="module")
def shared(cluster, tmp_path_factory):
    "A run store with problems and a base"
    runs = tmp_path_factory.mktemp("shared")
    job = ex.Job(ex.preset("smoke", **TINY), "plain", "base", 0, str(runs), progress=False)
    ex.data_stage(job), ex.base_stage(job)
    return runs


@pytest.fixture
def started(monkeypatch):
    "The options of the tasks that a test hands to Ray, by their names"
    tasks, remote = {}, ray.remote

    class Spy:
        def __init__(self, f):
            self.f = f

        def options(self, **how):
            assert how["name"] not in tasks
            tasks[how["name"]] = how
            return self.f.options(**how)

    def watched(**how):
        assert how == dict(max_calls=1)  # a process that is used again has CUDA on its first card

        def of(f):
            return Spy(remote(**how)(f))

        return of

    monkeypatch.setattr(sweeps.ray, "remote", watched)
    return tasks


def test_results_are_those_of_an_ordinary_run(cluster, started, tmp_path):
    "Shared stages run once, also the SFT that incorrect_only samples from; a second sweep finds all of it"
    cfg = ex.preset(
        "smoke", **TINY | {"priming.val": 0, "sft.epochs": 20}, priming=dict(failures="sampled")
    )  # long enough to end its answers
    jobs = ex.grid(cfg, ["plain"], CONDITIONS, [0], tmp_path / "swept")
    swept = sweeps.sweep(jobs, gpus=0)
    assert sorted(started) == sorted(
        [
            f"data plain/{CONDITIONS[0]}/0",
            f"base plain/{CONDITIONS[0]}/0",
            f"sft plain/{CONDITIONS[0]}/0",
            *(f"eval plain/{c}/0" for c in CONDITIONS),
        ]
    )
    want = ex.results(cfg, ["plain"], CONDITIONS, [0], tmp_path / "plainly", workers=1)
    pd.testing.assert_frame_equal(
        pd.concat([read_results(Path(f) / "results.csv") for f in swept.folder], ignore_index=True), want
    )

    def files(d):
        return sorted(p.relative_to(d) for p in d.rglob("metrics.jsonl"))

    assert len(files(tmp_path / "swept")) == 5 and files(tmp_path / "swept") == files(tmp_path / "plainly")
    for p in files(tmp_path / "swept"):
        assert untimed(tmp_path / "swept" / p) == untimed(tmp_path / "plainly" / p), p
    last = want[want.step == cfg.ppo.steps].set_index("condition").accuracy
    assert (
        list(swept.state) == ["done"] * 2
        and list(swept.step) == ["4/4"] * 2
        and list(swept.accuracy) == [last[c] for c in CONDITIONS]
    )

    started.clear()
    before = {
        p: p.stat().st_mtime_ns
        for p in (tmp_path / "swept").rglob("*")
        if p.is_file() and p.suffix != ".lock"
    }
    again = sweeps.sweep(jobs, gpus=0)
    assert (
        not started
        and list(again.folder) == list(swept.folder)
        and list(again.accuracy) == list(swept.accuracy)
    )
    assert before == {p: p.stat().st_mtime_ns for p in before}

    shutil.rmtree(swept.folder[1])
    sweeps.sweep(jobs, gpus=0)
    assert list(started) == ["eval plain/incorrect_only/0"] and Path(swept.folder[1]).is_dir()


def test_rewritten_text_is_made_once(tmp_path, monkeypatch):
    "Eight runs wait for one curation; with a folder of `stars curate` there is nothing to wait for"
    begun = []
    monkeypatch.setattr(
        sweeps.Tasks, "_start", lambda self, stage, job: begun.append((stage, job.model)) or len(begun)
    )

    def tasks(**how):
        cfg = ex.preset("smoke", **how)
        jobs = ex.grid(cfg, ["plain", "rich"], ["curated", "negated"], [0, 1], tmp_path)
        return sweeps.Tasks([sweeps.Run(j) for j in jobs], gpus=0, cpus=1, retries=0, at_once=9)

    made = tasks()
    assert sorted(begun) == [("base", "plain"), ("base", "rich"), ("curate", "plain"), ("data", "plain")]
    assert all(
        len(made._needs(r.job)) == 3 and begun.index(("curate", "plain")) + 1 in made._needs(r.job)
        for r in made.queue
    )
    begun.clear()
    tasks(curation=dict(file="mine"))
    assert [stage for stage, _ in begun] == ["data", "base", "base"]


def test_failures_stay_with_their_runs(shared, tmp_path, monkeypatch, capsys):
    "A model that cannot be loaded, and a shared stage that cannot be built, beside a run that works"
    monkeypatch.chdir(tmp_path)
    Path("hollow").mkdir()
    shutil.copytree(shared, "runs")
    Path("runs/smoke/rich").write_text("where the folder of the base should go")
    with pytest.raises(SystemExit) as e:
        cli.main(
            [
                "sweep",
                "--preset",
                "smoke",
                "--conditions",
                "base",
                "--models",
                "hollow,rich,plain",
                "--gpus-per-run",
                "0",
                "--set",
                *SETS,
            ]
        )
    out = capsys.readouterr().out
    assert e.value.code == 1 and "1 of 3 runs are done" in out and "plain/base/0 done" in out
    hollow, rich, plain = json.loads(Path("runs/smoke/sweep.json").read_text())["runs"]
    assert [hollow["state"], rich["state"], plain["state"]] == ["failed", "failed", "done"]
    assert (
        rich["reason"].startswith("base stage: ")
        and "runs/smoke/rich" in rich["reason"]
        and f"rich/base/0 failed: {rich['reason']}" in out
    )
    for run in (hollow, rich):
        assert (
            "in _build" in run["traceback"]
            and run["reason"].split(": ")[-1] in run["traceback"]
            and "\n" not in run["reason"]
        )
    assert (
        plain["traceback"] == plain["reason"] == ""
        and (tmp_path / "runs/smoke/plain/base/seed0" / plain["results"] / "results.csv").is_file()
    )


def test_a_killed_worker_is_retried_where_it_was(shared, started, tmp_path):
    "kill -9 in the middle of PPO"
    shutil.copytree(shared, tmp_path / "killed")
    cfg, killed = ex.preset("smoke", **TINY, ppo=dict(steps=12)), []
    jobs = ex.grid(cfg, ["plain"], ["base"], [0, 1], tmp_path / "killed")

    def kill():
        wait_for(
            lambda: any(p.read_bytes().count(b"\n") >= 3 for p in jobs[0].dir.glob("ppo-*/metrics.jsonl"))
        )
        killed.append(workers("eval plain/base/0")[0])
        killed[0].kill()
        killed.append(wait_for(lambda: [p for p in workers("eval plain/base/0") if p != killed[0]])[0])

    thread = threading.Thread(target=kill)
    thread.start()
    swept = sweeps.sweep(jobs, gpus=0, retries=1, show=False)
    thread.join()
    assert (
        len(killed) == 2
        and list(swept.state) == ["done", "done"]
        and sorted(started) == ["eval plain/base/0", "eval plain/base/1"]
    )
    shutil.copytree(shared, tmp_path / "quiet")
    quiet = ex.eval_stage(ex.Job(cfg, "plain", "base", 0, str(tmp_path / "quiet"), progress=False))
    assert (Path(swept.folder[0]) / "results.csv").read_text() == (quiet / "results.csv").read_text()
    ppo = [next(Path(d).parent.glob("ppo-*/metrics.jsonl")) for d in (swept.folder[0], quiet)]
    assert untimed(ppo[0]) == untimed(ppo[1]) and [r["step"] for r in untimed(ppo[0])] == list(range(1, 13))


def test_a_run_that_dies_too_often_has_failed(shared, started, monkeypatch):
    jobs = ex.grid(ex.preset("smoke", **TINY), ["plain"], ["base"], [7], shared)
    monkeypatch.setattr(sweeps, "_build", lambda stage, *rest: os.kill(os.getpid(), signal.SIGKILL))
    swept = sweeps.sweep(jobs, gpus=0.5, retries=0, show=False)
    assert (
        list(swept.state) == ["failed"]
        and "WorkerCrashedError: the process died, 0 restarts included" in swept.reason[0]
    )
    assert [(t["num_gpus"], t["num_cpus"], t["max_retries"]) for t in started.values()] == [(0.5, 1, 0)]


def test_ctrl_c_stops_the_tasks_and_keeps_what_is_saved(cluster, shared, tmp_path):
    "Another process joins the cluster by RAY_ADDRESS"
    shutil.copytree(shared, tmp_path / "runs")
    p = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "from stars.cli.main import main; main()",
            "sweep",
            "--preset",
            "smoke",
            "--conditions",
            "base",
            "--gpus-per-run",
            "0",
            "--set",
            *SETS,
            "ppo.steps=5000",
        ],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"RAY_ADDRESS": cluster},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    wait_for(
        lambda: p.poll() is not None or len(list(tmp_path.glob("runs/smoke/plain/base/*/ppo-*/state-*-*")))
    )
    assert p.poll() is None and len(workers("eval")) == 1
    p.send_signal(signal.SIGINT)
    out, err = p.communicate(timeout=600)
    assert p.returncode == 130 and "interrupted" in err, err
    wait_for(lambda: not workers("eval"))
    assert [r["state"] for r in json.loads((tmp_path / "runs/smoke/sweep.json").read_text())["runs"]] == [
        "ppo"
    ]
    assert len(list(tmp_path.glob("runs/smoke/plain/base/*/ppo-*.partial/state-*-*"))) >= 1


@pytest.mark.parametrize(
    "args,said",
    [
        (["--conditions", "magic"], "condition='magic' is unknown"),
        (["--conditions", "base", "--models", "qwen"], "model='qwen' is neither"),
        (["--conditions", "base", "--preset", "huge"], "preset='huge' is unknown"),
        (["--conditions", ""], "conditions is empty"),
        (["--conditions", "base", "--seeds", ","], "seeds is empty"),
        (["--conditions", "base", "--seeds", "one"], "--seeds 'one' is not a list of whole numbers"),
        (["--conditions", "base,dots,base"], "plain/base/0 is there twice"),
        (["--conditions", "base", "--gpus-per-run", "9"], "gpus=9 per run, but the largest machine has"),
        (["--conditions", "base", "--gpus-per-run", "-1"], "gpus=-1.0 must be"),
        (["--conditions", "base", "--cpus-per-run", "1e6"], "cpus=1e+06 per run"),
        (["--conditions", "base", "--cpus-per-run", "0"], "cpus=0.0 must be above 0"),
        (["--conditions", "base", "--retries", "-1"], "retries=-1 must be at least 0"),
        (["--conditions", "base", "--set", "ppo_step=5"], "did you mean ppo.steps"),
    ],
)
def test_wrong_input_is_one_line_before_ray_starts(args, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(sweeps.ray, "is_initialized", lambda: False)
    monkeypatch.setattr(sweeps.ray, "init", lambda *a, **k: pytest.fail("Ray was started"))
    with pytest.raises(SystemExit) as e:
        cli.main(["sweep", *args])
    err = capsys.readouterr().err
    assert e.value.code == 2 and said in err and err.count("\n") == 1, err
    assert not list(tmp_path.iterdir())


def test_surroundings_in_which_results_would_be_lost(tmp_path, monkeypatch):
    jobs = ex.grid(ex.preset("smoke"), ["plain"], ["base"], [0])
    monkeypatch.setattr(sweeps.ray, "init", lambda *a, **k: pytest.fail("Ray was started"))
    with monkeypatch.context() as m:
        m.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
        with pytest.raises(ValueError, match="give an absolute path"):
            sweeps.sweep(jobs)
    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:8265")
    with pytest.raises(ValueError, match="ray job submit"):
        sweeps.sweep(jobs)

"The whole system as a user meets it: the command line, killed and resumed runs, figures, and wrong input"
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from stars import cli, experiments as ex
from stars.countdown import Problem, split_of
from stars.datasets import from_parquet
from stars.priming import METHODS, read_rows

TINY = ["--preset", "smoke", "--set", "base_docs=300", "prime_rows=120", "data_eval=10"]
TINY_SET = dict(base_docs=300, prime_rows=120, data_eval=10)


def stars(*args, cwd, out=subprocess.DEVNULL):
    "Start the command in another process (a pipe that nobody reads would fill with progress bars and stop it)"
    return subprocess.Popen([sys.executable, "-c", "from stars.cli import main; main()", *args], cwd=cwd, stdout=out, stderr=out, text=True,
                            env=os.environ | {"OMP_NUM_THREADS": "1"}) # tiny models: a second thread only waits


def wait_for(condition, seconds=120):
    end = time.time() + seconds
    while not condition():
        assert time.time() < end, "waited too long"
        time.sleep(.02)


def lines(folder, pattern):
    while True:
        try: return sum(p.read_bytes().count(b"\n") for p in Path(folder).glob(pattern))
        except FileNotFoundError: pass # a folder was renamed or removed while we looked into it


def untimed(path):
    return [{k: v for k, v in json.loads(l).items() if not k.startswith(("s_", "tokens_per_s"))} for l in Path(path).read_text().splitlines()]


@pytest.fixture(scope="module")
def reproduced(tmp_path_factory):
    "`stars reproduce --preset smoke` in an empty folder"
    cwd = tmp_path_factory.mktemp("anywhere")
    p = stars("reproduce", "--preset", "smoke", cwd=cwd, out=subprocess.PIPE)
    out, err = p.communicate(timeout=900)
    assert p.returncode == 0, err[-3000:]
    return cwd, out


def test_reproduce_works_in_any_folder(reproduced):
    cwd, out = reproduced
    for name in ex.PRESETS["smoke"].figures:
        for kind in ("png", "svg", "csv", "json"): assert (cwd/"figures"/f"{name}.{kind}").stat().st_size > 200
        manifest = json.loads((cwd/"figures"/f"{name}.json").read_text())
        assert manifest["config"]["preset"] == "smoke" and (name == "fig_pretraining" or manifest["seeds"] == [0] and manifest["models"] == ["plain"])
        assert (cwd/"runs"/"smoke"/"notebooks"/f"{name}.ipynb").exists()
    assert set(os.listdir(cwd)) == {"runs", "figures"}
    df = pd.read_csv(cwd/"figures"/"fig_controls.csv")
    assert set(df.condition) == {"base", "empty_cot", "incorrect_only", "backtracking_verification"}
    assert set(pd.read_csv(cwd/"figures"/"fig_curated.csv").condition) == {"base", "negated", "curated", "rich_base"}
    assert set(df.step) == {0, 2, 4} and df.accuracy.between(0, 1).all() and (df.n == 20).all() # data_eval of the smoke preset


def test_nothing_is_built_twice(reproduced):
    cwd, _ = reproduced
    before = {p: p.stat().st_mtime_ns for p in (cwd/"runs").rglob("manifest.json")}
    p = stars("figure", "fig_controls", "--preset", "smoke", cwd=cwd, out=subprocess.PIPE)
    _, err = p.communicate(timeout=300)
    assert p.returncode == 0, err[-3000:]
    assert before == {p: p.stat().st_mtime_ns for p in (cwd/"runs").rglob("manifest.json")}


def test_run_store_explains_itself(reproduced):
    cwd, _ = reproduced
    assert not list((cwd/"runs").rglob("*.partial")) and not list((cwd/"runs").rglob("state-*-*"))
    for m in (cwd/"runs").rglob("manifest.json"):
        manifest = json.loads(m.read_text())
        assert m.parent.name == f"{manifest['stage']}-{manifest['hash']}" and manifest["packages"]["torch"]
        assert manifest["hash"] == ex.digest(dict(stage=manifest["stage"], config=manifest["config"], inputs=manifest["inputs"]))
    log = untimed(next((cwd/"runs").glob("smoke/plain/base/seed0/ppo-*/metrics.jsonl")))
    assert [r["step"] for r in log] == [1, 2, 3, 4]
    assert {"reward", "accuracy", "format", "response_tokens", "truncated", "avg_verifications", "avg_backtracking", "avg_subgoals", "avg_backwards", "kl", "entropy",
            "clip_frac", "value_clip_frac", "explained_variance", "grad_norm_policy", "grad_norm_critic", "rollout_gap"} <= set(log[0])


def test_no_eval_problem_is_trained_on(reproduced):
    cwd, _ = reproduced
    data = next((cwd/"runs"/"smoke"/"shared").glob("data-*"))
    keys = {s: {p.key for p in from_parquet(data/f"{s}.parquet")} for s in ("prime", "train", "eval")}
    assert not keys["prime"] & keys["train"] and not keys["prime"] & keys["eval"] and not keys["train"] & keys["eval"]
    for f in (cwd/"runs").rglob("prime-*/train.parquet"):
        rows = read_rows(f)
        assert {(tuple(sorted(r["numbers"])), r["target"]) for r in rows if r["numbers"] is not None} <= keys["prime"]
        if f.parents[2].name not in METHODS: continue
        puzzles = [Problem(tuple(map(int, m[1].split(" , "))), int(m[2])) for r in rows if (m := re.match(r"using ([\d ,]+) make (\d+) :", r["query"]))] # of rewritten pretraining text
        assert len(puzzles) > 5 and all(split_of(p) != "eval" for p in puzzles)
    assert all(split_of(p) == "eval" for p in from_parquet(data/"eval.parquet"))
    done = pd.concat(map(pd.read_parquet, (cwd/"runs").rglob("completions-*.parquet")))
    assert {(tuple(sorted(n)), t) for n, t in zip(done.numbers, done.target)} <= keys["eval"]


def test_killed_at_any_stage_and_resumed(tmp_path):
    "kill -9 while the base, the priming, PPO and the evaluation run: the end is as if nothing had happened"
    args = ["eval", *TINY, "base_epochs=4", "prime_slip=.1", "--condition", "empty_cot"]
    whole, killed = tmp_path/"whole", tmp_path/"killed"
    for d in (whole, killed): d.mkdir()
    assert stars(*args, cwd=whole).wait(timeout=300) == 0
    for pattern, n in (("runs/smoke/plain/base-*/metrics.jsonl", 2), ("runs/**/sft-*/metrics.jsonl", 2), ("runs/**/ppo-*/metrics.jsonl", 3)):
        p = stars(*args, cwd=killed)
        wait_for(lambda: lines(killed, pattern) >= n or p.poll() is not None)
        p.send_signal(signal.SIGKILL)
        p.wait()
    assert stars(*args, cwd=killed).wait(timeout=300) == 0
    paths = sorted(p.relative_to(whole) for p in whole.rglob("*") if p.name in ("metrics.jsonl", "results.csv"))
    assert len(paths) == 4 and paths == sorted(p.relative_to(killed) for p in killed.rglob("*") if p.name in ("metrics.jsonl", "results.csv"))
    for p in paths:
        if p.suffix == ".csv": assert (whole/p).read_text() == (killed/p).read_text()
        else: assert untimed(whole/p) == untimed(killed/p), p


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_workers_end_with_their_parent(tmp_path, how):
    code = f"""
import signal
signal.signal(signal.SIGINT, signal.default_int_handler) # a shell's background jobs start with SIGINT ignored
from stars import experiments as ex
if __name__ == "__main__": ex.results(ex.preset("smoke", ppo_steps=500, **{TINY_SET}), ["plain"], ["base", "negative_control"], [0], "runs", workers=2)
"""
    (tmp_path/"go.py").write_text(code)
    p = subprocess.Popen([sys.executable, "go.py"], cwd=tmp_path, stderr=subprocess.DEVNULL)
    try:
        wait_for(lambda: lines(tmp_path, "runs/**/ppo-*/metrics.jsonl") > 0)
        children = psutil.Process(p.pid).children(recursive=True)
        assert len(children) >= 2
    finally: p.send_signal(how)
    p.wait(timeout=20)
    _, alive = psutil.wait_procs(children, timeout=15)
    assert not alive


@pytest.mark.parametrize("args,said", [
    (["data", "--preset", "tiny"], "preset='tiny' is unknown; choose one of cpu, smoke"),
    (["ppo", "--condition", "magic"], "condition='magic' is unknown"),
    (["ppo", "--model", "qwen"], "model='qwen' is neither"),
    (["ppo", "--set", "ppo_step=5"], "did you mean ppo_steps"),
    (["ppo", "--set", "ppo_steps"], "not of the form field=value"),
    (["ppo", "--set", "ppo_lr=fast"], "ppo_lr='fast' is not a float"),
    (["ppo", "--set", "ppo_minibatch=48"], "minibatch=48 does not divide the 128 rollouts"),
    (["ppo", "--set", "ppo_estimator=group", "ppo_kl_coef=0"], "needs samples of at least 2"),
    (["ppo", "--set", "ppo_estimator=group"], "set kl_in='loss'"),
    (["ppo", "--set", "min_target=40"], "min_target=40 is above max_target=30"),
    (["ppo", "--set", "template=nope"], "template='nope'"),
    (["ppo", "--set", "ppo_max_tokens=600"], "do not fit into base_context=512"),
    (["ppo", "--set", "ppo_steps=inf"], "ppo_steps='inf' is not a int"),
    (["figure", "fig_controls", "-p", "models=rich"], "models='rich' must be a list"),
    (["ppo", "--set", "max_number=500"], "must not exceed top=199"),
    (["data", "--preset", "cpu", "--set", "data_eval=100000"], "there are only"),
    (["data"], "give a folder"),
    (["data", "x", "--set", "max_numbers=9"], "no field 'max_numbers'"),
    (["data", "x", "--set", "n_numbers=a"], "'a' is not a number"),
    (["data", "x", "--source", "nowhere.parquet"], "nowhere.parquet does not exist"),
    (["figure", "fig_none"], "figure='fig_none' is unknown; choose one of fig_controls"),
    (["figure", "fig_controls", "-p", "condition=[]"], "has no parameter 'condition'"),
    (["figure", "fig_controls", "-p", "seeds=[]"], "seeds is empty"),
])
def test_wrong_input_is_one_line(args, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as e: cli.main(args)
    err = capsys.readouterr().err
    assert e.value.code == 2 and said in err and err.count("\n") == 1, err
    assert not list(tmp_path.rglob("*.parquet"))


def test_malformed_priming_files(tmp_path):
    pq.write_table(pa.table(dict(query=["a", "b"], completion=["x", None])), tmp_path/"null.parquet")
    with pytest.raises(ValueError, match="row 1, column 'completion'"): read_rows(tmp_path/"null.parquet")
    pq.write_table(pa.table(dict(query=["a"])), tmp_path/"short.parquet")
    with pytest.raises(ValueError, match="column 'completion' is missing"): read_rows(tmp_path/"short.parquet")


def test_a_changed_setting_never_meets_old_results(tmp_path):
    job = lambda **kw: ex.Job(ex.preset("smoke", **TINY_SET | kw), "plain", "dots", 0, str(tmp_path), progress=False)
    a, b = ex.prime_stage(job()), ex.prime_stage(job(prime_slip=.5))
    assert a != b and a.parent == b.parent and ex.prime_stage(job(ppo_lr=.5)) == a


def test_shipped_bases_are_what_the_base_stage_makes():
    for name in ("plain", "rich"):
        recipe = json.loads((ex.base_path(name)/"recipe.json").read_text())
        assert recipe["hash"] == ex.digest(dict(stage="base", config=recipe["config"], inputs={}))
        assert recipe["weights_sha256"] == ex.file_digest(ex.base_path(name)/"model.safetensors")
        assert ex.base_stage(ex.Job(ex.preset("cpu"), name, "base")) == ex.base_path(name) # no training


def test_manifests_hold_no_secrets(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    text = json.dumps(ex.manifest(ex.preset("cpu"), models=["plain"]))
    assert "sk-secret" not in text and str(Path.home()) not in text

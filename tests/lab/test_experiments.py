"The whole system as a user meets it: the command line, killed and resumed runs, figures, and wrong input"

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pandas as pd
import papermill
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import state_of_process
from tokenizers.processors import TemplateProcessing
from transformers.utils import logging as transformers_logging

from stars.cli import drawing
from stars.cli import main as cli
from stars.habits.priming import METHODS, read_rows
from stars.lab import experiments as ex
from stars.lab import notebooks, stages
from stars.lab.configs import FIGURES, PRESETS
from stars.lab.stages import stage_key
from stars.lab.sweeps import begun
from stars.lab.verl import to_verl
from stars.models.checkpoints import save_checkpoint, weights_digest
from stars.models.micro import micro_model, micro_tokenizer
from stars.show.figures import controls
from stars.show.plots import save_figure
from stars.show.sources import COUNTED, FILES
from stars.task.countdown import Problem, split_of
from stars.task.datasets import from_parquet

TINY = ["--preset", "smoke", "--set", "base.docs=300", "priming.rows=120", "data.eval=10"]
TINY_SET = {"base.docs": 300, "priming.rows": 120, "data.eval": 10}


def stars(*args, cwd, out=subprocess.DEVNULL):
    "Start the command in another process; a pipe that nobody reads would fill with bars and stop it"
    return subprocess.Popen(
        [sys.executable, "-c", "from stars.cli.main import main; main()", *args],
        cwd=cwd,
        stdout=out,
        stderr=out,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # tiny models: a second thread only waits


def wait_for(condition, seconds=900):
    end = time.time() + seconds
    while not condition():
        assert time.time() < end, "waited too long"
        time.sleep(0.02)


def lines(folder, pattern):
    while True:
        try:
            return sum(p.read_bytes().count(b"\n") for p in Path(folder).glob(pattern))
        except FileNotFoundError:
            pass  # a folder was renamed or removed while we looked into it


def untimed(path):
    return [
        {k: v for k, v in json.loads(line).items() if not k.startswith(("s_", "tokens_per_s"))}
        for line in Path(path).read_text().splitlines()
    ]


@pytest.fixture(scope="module")
def reproduced(tmp_path_factory):
    "`stars reproduce --preset smoke` in an empty folder"
    cwd = tmp_path_factory.mktemp("anywhere")
    p = stars("reproduce", "--preset", "smoke", cwd=cwd, out=subprocess.PIPE)
    out, err = p.communicate(timeout=3_600)
    assert p.returncode == 0, err[-3000:]
    return cwd, out


def test_reproduce_works_in_any_folder(reproduced):
    cwd, out = reproduced
    at = cwd / "figures" / "smoke"
    for name in PRESETS["smoke"].figures:
        for kind in ("png", "svg", "csv", "json"):
            assert (at / f"{name}.{kind}").stat().st_size > 200
        manifest = json.loads((at / f"{name}.json").read_text())
        assert manifest["config"]["preset"] == "smoke" == manifest["place"] and (
            name == "fig_pretraining" or manifest["seeds"] == [0]
        )
        assert (cwd / "runs" / "smoke" / "notebooks" / f"{name}.ipynb").exists()
        assert f'src="smoke/{name}.png"' in (cwd / "figures" / "index.html").read_text() and re.search(
            rf"{name} +[\d.]+  figures/smoke/{name}.png", out
        )
    assert set(os.listdir(cwd)) == {"runs", "figures"}
    df = pd.read_csv(at / "fig_controls.csv")
    assert set(df.condition) == {"base", "empty_cot", "dots", "backtracking_verification"}
    assert set(pd.read_csv(at / "fig_curated.csv").condition) == {"base", "negated", "curated", "rich_base"}
    assert set(pd.read_csv(at / "fig_dose.csv").share) == {0, 0.02, 0.1, 0.3} and set(
        pd.read_csv(at / "fig_gap.csv").model
    ) == {"plain", "rich"}
    assert (
        set(df.step) == {0, 2, 4} and df.accuracy.between(0, 1).all() and (df.n == 20).all()
    )  # data.eval of the smoke preset


def test_published_results_beside_own_ones(reproduced, tmp_path):
    "The same notebooks, source=both; and the claims, held against both"
    cwd, _ = reproduced
    columns = [
        "condition",
        "step",
        *(f"{k}_{c}" for k in ("avg", "total") for c in COUNTED),
        "accuracy",
        "response_length",
    ]
    for name in FILES:
        pd.DataFrame(
            [
                [c, s, *[0.5] * 4, *[100] * 4, a * s / 250, 300.0]
                for c, a in dict(
                    base_ppo=0.3, all_strategies=0.7, empty_cot=0.4, dots=0.4, backtracking_verification=0.7
                ).items()
                for s in (0, 250)
            ],
            columns=columns,
        ).to_csv(tmp_path / name, index=False)
    for name in ("fig_controls", "fig_replication"):
        p = stars(
            "figure",
            name,
            "--preset",
            "smoke",
            "-p",
            f"published={tmp_path}",
            "source=both",
            cwd=cwd,
            out=subprocess.PIPE,
        )
        _, err = p.communicate(timeout=1_800)
        assert p.returncode == 0, err[-3000:]
    about = json.loads((cwd / "figures" / "smoke+published" / "fig_controls.json").read_text())
    assert (
        set(about["published"]["files"]) == {"llama_results.csv"}
        and "Preset smoke · model plain" in about["caption"]
        and "Published results · model Llama-3.2-3B" in about["caption"]
    )
    claims = pd.read_csv(cwd / "figures" / "smoke+published" / "fig_replication.csv").set_index(
        ["source", "claim"]
    )
    assert (
        claims.verdict["published", "mixes"] == "not run"
        and claims.value["published", "empty_cot"] == pytest.approx(0.3)
        and claims.verdict["smoke", "mixes"] in ("shown", "not shown", "reversed")
    )


def test_a_figure_opened_by_hand_works_where_the_command_line_does(monkeypatch, tmp_path):
    "JupyterLab starts a kernel in the notebook's folder; runs and figures lie at the top"
    top = Path(drawing.__file__).parents[2]
    monkeypatch.delenv("STARS_CALLED", raising=False)
    for cwd, home in ((top / "nbs" / "figures", top), (top / "nbs", top / "nbs"), (tmp_path, tmp_path)):
        monkeypatch.chdir(cwd)
        assert notebooks.go_home() == home == Path.cwd()
    monkeypatch.setenv("STARS_CALLED", "1")  # by `stars figure`, from wherever that was called
    monkeypatch.chdir(top / "nbs" / "figures")
    assert notebooks.go_home() == top / "nbs" / "figures"
    for name in (*FIGURES, "fig_replication"):
        code = "\n".join(
            c["source"]
            for c in nbformat.read(notebooks.figure_notebook(name), 4).cells
            if c["cell_type"] == "code"
        )
        assert -1 < code.find("\ngo_home()\n") < code.find("runs=runs"), name


def test_a_manifest_says_whether_the_code_was_committed(monkeypatch, tmp_path):
    def git(*args):
        who = ["-c", "user.name=a", "-c", "user.email=a@b"]
        subprocess.run(["git", "-C", str(tmp_path), *who, *args], check=True, capture_output=True)

    def dirty():
        return stages.environment()["uncommitted_changes"]

    for path in ("stars/x.py", "README.md"):
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_text("1")
    git("init"), git("add", "-A"), git("commit", "-m", "first")
    monkeypatch.setattr(stages, "files", lambda _: tmp_path / "stars")
    assert dirty() is False
    (tmp_path / "README.md").write_text("2")
    assert dirty() is False  # it draws no figure
    (tmp_path / "stars" / "x.py").write_text("2")
    assert dirty() is True


def test_one_failing_figure_does_not_stop_the_others(tmp_path, monkeypatch, capsys):
    def run(name, p, progress):
        if name == "fig_gap":
            raise KeyError("no such condition")
        fig = controls(
            pd.DataFrame(
                [
                    dict(
                        model="plain",
                        condition="base",
                        seed=0,
                        step=s,
                        rater="rules",
                        accuracy=0.1,
                        n=20,
                        response_length=9.0,
                    )
                    for s in (0, 2)
                ]
            )
        )
        save_figure(fig, name, pd.DataFrame(dict(x=[1])), Path(p["figures"]) / p["preset"])

    monkeypatch.setattr(drawing, "run_figure", run)
    failed = drawing.draw_all(
        ("fig_controls", "fig_gap", "fig_dynamics"), "smoke", tmp_path / "runs", tmp_path / "figures", {}
    )
    assert list(failed) == ["smoke/fig_gap"] and "no such condition" in failed["smoke/fig_gap"]
    said = capsys.readouterr()
    assert (
        "fig_gap failed: KeyError: 'no such condition'" in said.err
        and "2 of 3 figures after" in said.out
        and "3 of 3: fig_dynamics" in said.out
    )
    assert (
        "no such condition" in (tmp_path / "figures" / "index.html").read_text()
        and "KeyError" in (tmp_path / "runs" / "smoke" / "notebooks" / "fig_gap.error.txt").read_text()
    )
    failed = drawing.draw_all(
        ("fig_gap",), "smoke", tmp_path / "runs", tmp_path / "figures", {}, source="both"
    )
    assert (
        list(failed) == ["smoke+published/fig_gap"]
        and "fig_gap-smoke+published" in failed["smoke+published/fig_gap"]
    )
    with pytest.raises(ValueError, match="none of these figures has a parameter 'sorce'"):
        drawing.draw_all(("fig_gap",), "smoke", tmp_path / "runs", tmp_path / "figures", {}, sorce="both")
    with pytest.raises(ValueError, match="fig_gab"):
        drawing.draw_all(("fig_gab",), "smoke", tmp_path / "runs", tmp_path / "figures", {})
    monkeypatch.setattr(drawing, "run_figure", lambda *a, **k: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        drawing.draw_all(("fig_controls",), "smoke", tmp_path / "runs", tmp_path / "figures", {})


def test_nothing_is_built_twice(reproduced):
    cwd, _ = reproduced
    before = {p: p.stat().st_mtime_ns for p in (cwd / "runs").rglob("manifest.json")}
    p = stars("figure", "fig_controls", "--preset", "smoke", cwd=cwd, out=subprocess.PIPE)
    _, err = p.communicate(timeout=1_800)
    assert p.returncode == 0, err[-3000:]
    assert before == {p: p.stat().st_mtime_ns for p in (cwd / "runs").rglob("manifest.json")}


def test_run_store_explains_itself(reproduced):
    cwd, _ = reproduced
    assert not list((cwd / "runs").rglob("*.partial")) and not list((cwd / "runs").rglob("state-*-*"))
    for m in (cwd / "runs").rglob("manifest.json"):
        manifest = json.loads(m.read_text())
        assert m.parent.name == f"{manifest['stage']}-{manifest['hash']}" and manifest["packages"]["torch"]
        assert manifest["hash"] == stage_key(manifest["stage"], manifest["config"], manifest["inputs"])
    logs = map(untimed, (cwd / "runs").glob("smoke/plain/base/seed0/ppo-*/metrics.jsonl"))
    log = next(rows for rows in logs if "explained_variance" in rows[0])  # others compare trainers
    assert [r["step"] for r in log] == [1, 2, 3, 4]
    assert {
        "reward",
        "accuracy",
        "format",
        "response_tokens",
        "truncated",
        "avg_verifications",
        "avg_backtracking",
        "avg_subgoals",
        "avg_backwards",
        "kl",
        "entropy",
        "clip_frac",
        "value_clip_frac",
        "explained_variance",
        "grad_norm_policy",
        "grad_norm_critic",
        "rollout_gap",
    } <= set(log[0])


def test_no_eval_problem_is_trained_on(reproduced):
    cwd, _ = reproduced
    data = next((cwd / "runs" / "smoke" / "shared").glob("data-*"))
    keys = {s: {p.key for p in from_parquet(data / f"{s}.parquet")} for s in ("prime", "train", "eval")}
    assert (
        not keys["prime"] & keys["train"]
        and not keys["prime"] & keys["eval"]
        and not keys["train"] & keys["eval"]
    )
    for f in (cwd / "runs").rglob("prime-*/train.parquet"):
        rows = read_rows(f)
        assert {(tuple(sorted(r["numbers"])), r["target"]) for r in rows if r["numbers"] is not None} <= keys[
            "prime"
        ]
        if f.parents[2].name not in METHODS:
            continue
        puzzles = [
            Problem(tuple(map(int, m[1].split(" , "))), int(m[2]))
            for r in rows
            if (m := re.match(r"using ([\d ,]+) make (\d+) :", r["query"]))
        ]  # of rewritten pretraining text
        assert len(puzzles) > 5 and all(split_of(p) != "eval" for p in puzzles)
    assert all(split_of(p) == "eval" for p in from_parquet(data / "eval.parquet"))
    for stage, own in dict(eval=True, draws=True, transfer=False).items():  # transfer asks other spaces, too
        files = (cwd / "runs").rglob(f"{stage}-*/completions-*.parquet")
        done = pd.concat(map(pd.read_parquet, files))
        asked = {Problem(tuple(map(int, sorted(n))), int(t)) for n, t in zip(done.numbers, done.target)}
        assert all(split_of(p) == "eval" for p in asked)
        assert not own or {p.key for p in asked} <= keys["eval"]


def test_killed_at_any_stage_and_resumed(tmp_path):
    "kill -9 while the base, the priming, PPO and the evaluation run: the end is as if nothing had happened"
    args = ["eval", *TINY, "base.epochs=4", "priming.slip=.1", "--condition", "empty_cot"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for d in (whole, killed):
        d.mkdir()
    assert stars(*args, cwd=whole).wait(timeout=1_800) == 0
    for pattern, n in (
        ("runs/smoke/plain/base-*/metrics.jsonl", 2),
        ("runs/**/sft-*/metrics.jsonl", 2),
        ("runs/**/ppo-*/metrics.jsonl", 3),
    ):
        p = stars(*args, cwd=killed)
        wait_for(lambda: lines(killed, pattern) >= n or p.poll() is not None)
        p.send_signal(signal.SIGKILL)
        p.wait()
    assert stars(*args, cwd=killed).wait(timeout=1_800) == 0
    paths = sorted(
        p.relative_to(whole) for p in whole.rglob("*") if p.name in ("metrics.jsonl", "results.csv")
    )
    assert len(paths) == 4 and paths == sorted(
        p.relative_to(killed) for p in killed.rglob("*") if p.name in ("metrics.jsonl", "results.csv")
    )
    for p in paths:
        if p.suffix == ".csv":
            assert (whole / p).read_text() == (killed / p).read_text()
        else:
            assert untimed(whole / p) == untimed(killed / p), p


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_workers_end_with_their_parent(tmp_path, how):
    code = f"""
import signal
signal.signal(signal.SIGINT, signal.default_int_handler) # a shell's background jobs start with SIGINT ignored
from stars.lab import experiments as ex
if __name__ == "__main__":
    cfg = ex.preset("smoke", ppo=dict(steps=500), **{TINY_SET})
    ex.results(cfg, ["plain"], ["base", "negative_control"], [0], "runs", workers=2)
"""
    (tmp_path / "go.py").write_text(code)
    p = subprocess.Popen([sys.executable, "go.py"], cwd=tmp_path, stderr=subprocess.DEVNULL)
    try:
        wait_for(lambda: lines(tmp_path, "runs/**/ppo-*/metrics.jsonl") > 0)
        children = psutil.Process(p.pid).children(recursive=True)
        assert len(children) >= 2
    finally:
        p.send_signal(how)
    p.wait(timeout=600)
    _, alive = psutil.wait_procs(children, timeout=600)
    assert not alive


@pytest.mark.parametrize(
    "args,said",
    [
        (["data", "--preset", "tiny"], "preset='tiny' is unknown; choose one of cpu, smoke"),
        (["ppo", "--condition", "magic"], "condition='magic' is unknown"),
        (["ppo", "--model", "qwen"], "model='qwen' is neither"),
        (["ppo", "--set", "ppo_step=5"], "did you mean ppo.steps"),
        (["ppo", "--set", "ppo.steps"], "not of the form field=value"),
        (["ppo", "--set", "ppo.lr=fast"], "ppo.lr='fast' is no number"),
        (
            ["ppo", "--set", "ppo.minibatch=48"],
            "ppo.minibatch=48 does not divide the 128 rollouts of a step (ppo.prompts=128 × ppo.samples=1)",
        ),
        (["ppo", "--set", "ppo.estimator=group", "ppo.kl_coef=0"], "ppo.samples=1 must be at least 2"),
        (
            ["ppo", "--set", "ppo.estimator=group", "ppo.kl_coef=.001"],
            "set ppo.kl_in='loss' or ppo.kl_coef=0",
        ),
        (["ppo", "--set", "world.min_target=41"], "world.min_target=41 is above world.max_target=40"),
        (["ppo", "--set", "world.template=nope"], "world.template='nope'"),
        (["ppo", "--set", "ppo.max_tokens=600"], "do not fit into base.max_length=512"),
        (["ppo", "--set", "base.batch_size=0"], "base.batch_size=0 must"),
        (["ppo", "--set", "base.micro_tokens=200"], "base.micro_tokens=200 is below base.max_length=512"),
        (
            ["ppo", "--set", "cpt.micro_tokens=600", "cpt.max_length=700"],
            "cpt.micro_tokens=600 is below cpt.max_length=700",
        ),
        (
            ["ppo", "--set", "run.engine=vllm", "eval.temperature=.001"],
            "eval.temperature=0.001: vLLM takes 0.01 to 100, or 0",
        ),
        (["ppo", "--set", "ppo.format_score=1"], "ppo.format_score=1.0 must be"),
        (["ppo", "--set", "ppo.steps=inf"], "ppo.steps='inf' is no whole number"),
        (["figure", "fig_controls", "-p", "models=rich"], "models='rich' must be a list"),
        (["ppo", "--set", "world.max_number=500"], "must not exceed world.top=99"),
        (["ppo", "--set", "max_number=50"], "it is called world.max_number now"),
        (["ppo", "--set", "ppo.seed=1"], "ppo.seed is the seed of a run: give --seed"),
        (["ppo", "--set", "cpt.bf16=maybe"], "cpt.bf16='maybe' is no truth value"),
        (["data", "--preset", "cpu", "--set", "data.eval=100000"], "there are only"),
        (["data"], "give a folder"),
        (["data", "x", "--set", "max_numbers=9"], "no field 'max_numbers'"),
        (["data", "x", "--set", "n_numbers=a"], "'a' is not a number"),
        (["data", "x", "--source", "nowhere.parquet"], "nowhere.parquet does not exist"),
        (["figure", "fig_none"], "figure='fig_none' is unknown; choose one of fig_algorithms"),
        (["figure", "fig_controls", "-p", "condition=[]"], "has no parameter 'condition'"),
        (["figure", "fig_controls", "-p", "seeds=[]"], "seeds is empty"),
    ],
)
def test_wrong_input_is_one_line(args, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as e:
        cli.main(args)
    err = capsys.readouterr().err
    assert e.value.code == 2 and said in err and err.count("\n") == 1, err
    assert not list(tmp_path.rglob("*.parquet"))


def own_notebook(path, source, kernel=None, tags=("parameters",), kind="code", then="x", **metadata):
    "A notebook with a tagged cell, and one that shows what became of it"
    v4 = nbformat.v4
    new = v4.new_code_cell if kind == "code" else v4.new_markdown_cell
    first = new(source, metadata=dict(tags=list(tags)))
    if kernel:
        metadata |= dict(kernelspec=dict(name="python3", language=kernel, display_name=kernel))
    nbformat.write(v4.new_notebook(cells=[first, v4.new_code_cell(then)], metadata=metadata), path)
    return path


@pytest.mark.parametrize(
    "source,defaults",
    [
        ('x = "a=b"', dict(x="a=b")),
        ('x: str = "a=b" # c=d', dict(x="a=b")),
        ("x = [1,\n     2, # two\n\n     3]", dict(x=[1, 2, 3])),
        ('x = {"a": 1, # =\n  "b": (None, True)}', dict(x={"a": 1, "b": (None, True)})),
        ('x = """a\nb = c\n"""', dict(x="a\nb = c\n")),
        ("x = y = -1.5", dict(x=-1.5, y=-1.5)),
        ("x, y = 1, 'two'", dict(x=1, y="two")),
        ("x = 1; y = 2", dict(x=1, y=2)),
        ("x = 1\nx = 2", dict(x=2)),
        ('x = ("a"\n     "b")', dict(x="ab")),
        ("%matplotlib inline\n!true\nx = 1", dict(x=1)),
        ("%%time\nx = 1", dict(x=1)),
        ("import os\nx = 1\ndef f(y=2):\n    z = 3", dict(x=1)),
        ("x: int\ny: int = 3", dict(y=3)),
        ("x = 'é = ü'", dict(x="é = ü")),
        ("", {}),
        ("# x = 1", {}),
    ],
)
def test_defaults_of_own_notebooks(tmp_path, source, defaults):
    for kernel in (None, "python"):  # with and without a kernel's name
        assert notebooks.notebook_defaults(own_notebook(tmp_path / "n.ipynb", source, kernel)) == defaults


@pytest.mark.parametrize(
    "source,shown",
    [
        ("x = 1+1", "`1 + 1`"),
        ("x = Path('a')", "`Path('a')`"),
        ("x = f'{y}'", "`f'{y}'`"),
        ("x = [y, 2]", "`[y, 2]`"),
        ("x = {[]: 1}", "`{[]: 1}`"),
        ("x = __import__('os').system('touch ran')", "`__import__("),
        ("if y: x = 1\nelse: x = 2", "only sometimes"),
        ("x = 1\nx += 1", "several lines"),
        ("x, *y = 1, 2, 3", "several lines"),
        ("for i in y:\n    x = 1", "only sometimes"),
    ],
)
def test_computed_defaults_are_called_so_and_never_computed(tmp_path, monkeypatch, source, shown):
    monkeypatch.chdir(tmp_path)
    path = own_notebook(tmp_path / "n.ipynb", source + "\nz = 3")
    known = r"n.ipynb: the default of 'x' is .*known only when the notebook runs"
    with pytest.raises(ValueError, match=known) as e:
        notebooks.notebook_defaults(path)
    assert shown in str(e.value) and notebooks.notebook_defaults(path, "z") == dict(z=3)
    notebooks.check_parameters(path, dict(x=5, z=4))  # it has the parameter, whatever its default
    assert not Path("ran").exists()


@pytest.mark.parametrize(
    "make,said",
    [
        (dict(source="x = (1"), "cannot be read as Python (line 1"),
        (dict(source="x ="), "cannot be read as Python"),
        (dict(source="x = 1", tags=["parameter"]), "no cell tagged `parameters`"),
        (dict(source="x = 1", kind="markdown"), "is a markdown cell"),
        (dict(source="x <- 1", kernel="R"), "written in R"),
        (dict(source="x = 1", language_info=dict(name="julia")), "written in julia"),
        (dict(source="y = 1"), "has no parameter 'x'; it knows y"),
        (dict(source=""), "has no parameter 'x'; it knows none"),
        (dict(source="xx = 1"), "did you mean xx?"),
        ("{}", "is no notebook"),
        ("[]", "is no notebook"),
        ("x = 1", "is no notebook"),
        ("", "is no notebook"),
        ('{"nbformat": 4, "nbformat_minor": 5, "cells": 3, "metadata": {}}', "is no notebook"),
        (b"\xff\xfe", "is no notebook"),
    ],
)
def test_what_is_wrong_with_a_notebook_is_said(tmp_path, make, said):
    path = tmp_path / "n.ipynb"
    if isinstance(make, dict):
        own_notebook(path, **make)
    else:
        path.write_bytes(make if isinstance(make, bytes) else make.encode())
    with pytest.raises(ValueError) as e:
        notebooks.run_notebook(path, tmp_path / "out" / "n.ipynb", x=2)
    assert said in str(e.value) and "n.ipynb" in str(e.value) and not (tmp_path / "out").exists()


VALUES = st.one_of(
    st.integers(),
    st.booleans(),
    st.none(),
    st.text(st.sampled_from("ab c.,()[]{}'é"), max_size=8),
    st.lists(st.integers(0, 9), max_size=3),
)


@settings(max_examples=60, deadline=None)
@given(st.dictionaries(st.sampled_from(["a", "b_1", "seeds", "X"]), VALUES, max_size=4), st.data())
def test_papermill_finds_the_same_parameters_where_it_can(tmp_path_factory, values, data):
    "Its inspection is the oracle, on cells that it can read: one assignment a line, one equals sign"

    def line(k, v):
        return data.draw(st.sampled_from([f"{k} = {v!r}", f"{k}={v!r}", f"{k}: object = {v!r}"]))

    path = own_notebook(
        tmp_path_factory.mktemp("n") / "n.ipynb", "\n".join(line(k, v) for k, v in values.items()), "python"
    )
    found = papermill.inspect_notebook(str(path))
    ours = notebooks.notebook_defaults(path)
    assert list(found) == list(ours) == list(values) and ours == values


def test_own_notebooks_run(tmp_path, monkeypatch, capsys):
    "Without the name of a kernel, with a computed default, with braces and blanks in the names of files"
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("STARS_CALLED", raising=False)
    path = own_notebook(tmp_path / "my {x} notebook.ipynb", 'x = "a=" + "b"\nout = 1')
    done = notebooks.run_notebook(path, tmp_path / "done {x}.ipynb", x="c=d", out=2)
    [cell] = [c for c in nbformat.read(done, 4).cells if c.source == "x"]
    assert cell.outputs[0]["data"]["text/plain"] == "'c=d'" and done == tmp_path / "done {x}.ipynb"
    assert "nknown parameter" not in capsys.readouterr().err
    with pytest.raises(ValueError, match="is the notebook itself"):
        notebooks.run_notebook(path, path, x="c")


def test_a_bug_in_a_run_is_told_by_its_kind(tmp_path, monkeypatch, capsys):
    def lost(job):
        raise KeyError("rows")

    monkeypatch.setattr(ex, "last_stage", lost)
    with pytest.raises(KeyError):
        ex.run_jobs(ex.grid(ex.preset("smoke"), ["plain"], ["base"], [0], tmp_path), workers=1)
    assert "plain/base/0 failed: KeyError: 'rows'" in capsys.readouterr().err


def test_malformed_priming_files(tmp_path):
    pq.write_table(pa.table(dict(query=["a", "b"], completion=["x", None])), tmp_path / "null.parquet")
    with pytest.raises(ValueError, match="row 1, column 'completion'"):
        read_rows(tmp_path / "null.parquet")
    pq.write_table(pa.table(dict(query=["a"])), tmp_path / "short.parquet")
    with pytest.raises(ValueError, match="column 'completion' is missing"):
        read_rows(tmp_path / "short.parquet")


def test_a_changed_setting_never_meets_old_results(tmp_path):
    def job(**kw):
        return ex.Job(ex.preset("smoke", **TINY_SET | kw), "plain", "dots", 0, str(tmp_path), progress=False)

    a, b = ex.prime_stage(job()), ex.prime_stage(job(**{"priming.slip": 0.5}))
    assert a != b and a.parent == b.parent and ex.prime_stage(job(**{"ppo.lr": 0.5})) == a


def test_a_template_is_its_text_and_not_its_file(tmp_path):
    "Edited, it never meets what it made before; moved, it does"
    file, other = tmp_path / "mine.txt", tmp_path / "moved.txt"

    def data(at):
        cfg = ex.preset("smoke", **TINY_SET, world=dict(template=str(at)))
        return ex.data_stage(ex.Job(cfg, "plain", "base", 0, str(tmp_path), progress=False))

    file.write_text("using {numbers} make {target} : <think>")
    first = data(file)
    file.rename(other)
    file.write_text("make {target} from {numbers} : <think>")
    assert data(other) == first != data(file) and first.parent == data(file).parent
    keys = [
        {json.dumps(c.settings("world.template"))} | {c.world.template_key}
        for c in (ex.preset("smoke", world=dict(template=str(p))) for p in (file, other))
    ]
    assert (
        not keys[0] & keys[1]
        and ex.preset("smoke").world.template_key == "micro"
        and list(begun(first.parent, ex.preset("smoke", **TINY_SET, world=dict(template=str(other)))))
        == [first.name]
    )


def test_serial_jobs_fail_alone(tmp_path, monkeypatch, capsys):
    "The others are built, the first failure is raised at the end; Ctrl-C stops at once"
    jobs, built = ex.grid(ex.preset("smoke"), ["plain"], ["base"], range(4), tmp_path), []

    def evaluated(job):
        if job.seed % 2:
            raise ValueError(f"seed {job.seed} is odd")
        built.append(job.seed)

    monkeypatch.setattr(ex, "last_stage", evaluated)
    with pytest.raises(ValueError, match="seed 1 is odd"):
        ex.run_jobs(jobs, workers=1)
    failures = [line for line in capsys.readouterr().err.splitlines() if "failed" in line]
    assert built == [0, 2] and failures == [f"plain/base/{s} failed: seed {s} is odd" for s in (1, 3)]
    monkeypatch.setattr(ex, "last_stage", lambda job: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        ex.run_jobs(jobs, workers=1)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_missing_priming_file_is_named_before_anything_is_built(tmp_path, workers):
    jobs = ex.grid(
        ex.preset("smoke", priming=dict(file=f"{tmp_path}/{{condition}}.parquet")),
        ["plain"],
        ["base", "dots"],
        [0],
        tmp_path / "runs",
    )
    with pytest.raises(
        ValueError,
        match="priming.file=.*/backtracking_verification.parquet does not exist, and the rows of dots",
    ):
        ex.run_jobs(jobs, workers)
    for made_by in (ex.prime_stage, ex.sft_stage, ex.ppo_stage, ex.eval_stage):
        with pytest.raises(ValueError, match="does not exist"):
            made_by(jobs[1])
    assert not (tmp_path / "runs").exists()


def test_weights_are_read_again_when_they_change(tmp_path):
    "Their digest is remembered by what the file system says of the file"
    w = tmp_path / "model.safetensors"
    w.write_bytes(b"old!")
    os.utime(w, ns=(0, 0))
    a = weights_digest(tmp_path)
    w.write_bytes(b"new!")
    assert a != weights_digest(tmp_path) == ex.weights_digest(str(tmp_path)) and weights_digest(
        tmp_path
    ) == ex.weights_digest(tmp_path / ".")


def test_shipped_bases_are_what_the_base_stage_makes():
    for name in ("plain", "rich"):
        recipe = json.loads((ex.base_path(name) / "recipe.json").read_text())
        assert recipe["hash"] == stage_key("base", recipe["config"], {})
        assert recipe["weights_sha256"] == ex.file_digest(ex.base_path(name) / "model.safetensors")
        assert ex.base_stage(ex.Job(ex.preset("cpu"), name, "base")) == ex.base_path(name)  # no training


def test_manifests_hold_no_secrets(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    text = json.dumps(ex.manifest(ex.preset("cpu"), models=["plain"]))
    assert "sk-secret" not in text and str(Path.home()) not in text


@pytest.mark.parametrize("workers,bars", [(1, True), (1, False), (2, True)])
def test_many_jobs_leave_the_process_as_it_was(tmp_path, monkeypatch, workers, bars):
    "Built here or side by side, found complete, or failed"
    (transformers_logging.enable_progress_bar if bars else transformers_logging.disable_progress_bar)()
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        before = state_of_process()

        def same():
            after = state_of_process()
            assert not (changed := [k for k in before if before[k] != after[k]]), changed

        small = TINY_SET | {"priming.rows": 40, "ppo.steps": 1, "ppo.save_every": 1}
        jobs = ex.grid(ex.preset("smoke", **small), ["plain"], ["base", "empty_cot"][:workers], [0], tmp_path)
        for _ in range(2):
            ex.run_jobs(jobs, workers)
            same()
        monkeypatch.setattr(ex, "last_stage", lambda job: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            ex.run_jobs(jobs, 1)
        same()
    finally:
        torch.set_num_threads(threads)
        transformers_logging.enable_progress_bar()


@pytest.fixture
def llama(tmp_path):
    "A checkpoint whose tokenizer begins every text with a token of its own, as Llama's does"
    tok = micro_tokenizer()
    tok.add_special_tokens(dict(bos_token="<s>"))
    tok._tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tok.bos_token_id)]
    )
    return save_checkpoint(micro_model(tok, 32, 2, 2, 64), tok, tmp_path / "llama")


def test_prompts_begin_as_a_setting_says(tmp_path, monkeypatch, llama):
    "In priming, RL and evaluation, of this setting's own results; in rewritten text and for verl, too"
    small = {
        "priming.rows": 40,
        "priming.val": 4,
        "data.eval": 3,
        "ppo.steps": 1,
        "ppo.save_every": 1,
        "ppo.prompts": 8,
    }

    def job(bos, condition="empty_cot", model=llama):
        cfg, runs = ex.preset("smoke", **small, world=dict(bos=bos)), str(tmp_path / "runs")
        return ex.Job(cfg, str(model), condition, 0, runs, progress=False)

    asked, made = {}, {}
    generate = ex.LlamaEngine.generate

    def kept(self, prompts, *args, **how):
        ids.update(p[0] for p in prompts)
        return generate(self, prompts, *args, **how)

    monkeypatch.setattr(ex.LlamaEngine, "generate", kept)
    for bos in ("none", "auto", "always"):
        ids = set()
        out, j = ex.eval_stage(job(bos)), job(bos)
        made[bos] = [ex.data_stage(j), ex.prime_stage(j), ex.ppo_stage(j), out]
        texts = {r["query"] for r in read_rows(made[bos][1] / "train.parquet")} | set(
            pd.read_parquet(next(out.glob("completions-*"))).prompt
        )
        asked[bos] = {t.startswith("<s>using") for t in texts}, {t.count("<s>") for t in texts}, len(ids)
        assert (len(micro_tokenizer()) in ids) == (bos != "none")  # the new token's id is the next one
    assert asked == dict(none=({False}, {0}, 1), auto=({True}, {1}, 1), always=({True}, {1}, 1))
    data, *others = zip(*made.values())
    assert len(set(data)) == 1 and all(len(set(o)) == 3 for o in others)
    monkeypatch.setattr(ex, "curate_stage", lambda job: tmp_path / "rewrites")
    row = dict(
        query="make 3 + 4 : <think>",
        completion="7",
        numbers=None,
        target=None,
        mix="curated",
        teacher="t",
        score=None,
    )
    monkeypatch.setattr(
        ex,
        "matched_rows",
        lambda job, rewrites, tokenizer, out: ([dict(row)] * 2, [dict(row, query="<s>" + row["query"])]),
    )
    for bos, n in (("none", 0), ("auto", 1)):
        assert [
            r["query"].count("<s>") for r in read_rows(ex.prime_stage(job(bos, "curated")) / "train.parquet")
        ] == [n] * 2
    changes = small | {"world.bos": "auto", "ppo.minibatch": 8, "data.rows": 8, "data.train": 8}
    asks = ex.Job(
        ex.preset("smoke", **changes), str(llama), "base", 0, str(tmp_path / "runs"), progress=False
    )
    exported = to_verl(asks, tmp_path / "verl")
    assert all(
        p[0]["content"].startswith("<s>using")
        for p in pq.read_table(exported / "train.parquet")["prompt"].to_pylist()
    )
    assert "bos" not in (exported / "differences.txt").read_text()


def test_a_token_that_is_not_there_is_asked_for_in_vain(tmp_path):
    "`always` is refused where a tokenizer has none; `auto` gives the micro models none"

    def job(bos):
        cfg = ex.preset("smoke", **TINY_SET, world=dict(bos=bos))
        return ex.Job(cfg, "plain", "dots", 0, str(tmp_path), progress=False)

    with pytest.raises(ValueError, match="world.bos='always': the tokenizer has no bos_token"):
        ex.prime_stage(job("always"))
    rows = [
        [r["query"] for r in read_rows(ex.prime_stage(job(bos)) / "train.parquet")]
        for bos in ("none", "auto")
    ]
    assert (
        rows[0] == rows[1] and len(list((tmp_path / "smoke/plain").glob("base-*"))) == 1
    )  # and the base is the same
    with pytest.raises(ValueError, match="bos='begin' is unknown; choose one of none, auto, always"):
        job("begin")

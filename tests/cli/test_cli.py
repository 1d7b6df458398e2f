"The command line: help that a newcomer reads, examples that parse, JSON that parses, and what is refused"

import functools
import json
import os
import re
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pandas as pd
import pytest
import tyro
from hypothesis import given, settings
from hypothesis import strategies as st

from stars.cli import drawing, options
from stars.cli import main as cli
from stars.lab import experiments as ex
from stars.lab.configs import preset
from stars.lab.stages import Job
from stars.show import viewer
from stars.text import pretraining

DATA = Path(__file__).parents[2] / "nbs" / "data"


def run(capsys, *args):
    capsys.readouterr()
    try:
        cli.main(list(args))
    except SystemExit as e:
        return e.code, *capsys.readouterr()
    return 0, *capsys.readouterr()


@pytest.mark.parametrize("args", [[], ["-h"], ["--help"]])
def test_overview_names_every_command_on_one_screen(capsys, args):
    code, out, _ = run(capsys, *args)
    assert code == 0 and max(map(len, out.splitlines())) <= 120 and len(out.splitlines()) < 50
    for name in cli.COMMANDS:
        assert re.search(rf"^  {name} +\S", out, re.M), name


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_examples_parse(name):
    "Every example of a help text is accepted by the parser of its command, and by no other way than its own"
    import shlex

    seen = []

    def stub(n, f):
        @functools.wraps(f)
        def called(*args, **kwargs):
            seen.append(n)

        return called

    stubs = {n: stub(n, f) for n, f in cli.COMMANDS.items()}
    tyro.extras.subcommand_cli_from_dict(
        stubs, prog="stars", args=shlex.split(cli.example(cli.COMMANDS[name]))[1:]
    )
    assert seen == [name]


def test_a_wrong_option_is_refused(capsys):
    code, _, err = run(capsys, "figure", "fig_gap", "--colour", "red")
    assert code == 2 and "--colour" in err


def test_parameters_are_told_by_their_own_name(capsys):
    code, _, err = run(capsys, "figure", "fig_gap", "-p", "seeds")
    assert code == 2 and "-p 'seeds' is not of the form field=value" in err


def test_plan_as_json(capsys):
    code, out, _ = run(capsys, "plan", "--preset", "cpu", "--gpus", "1", "--json")
    plan = json.loads(out)
    assert code == 0 and plan["problems"] == [] and plan["parameters"] > 4e5
    assert {p["name"] for p in plan["phases"]} >= {"sft", "eval"} and all(
        p["total"] <= p["room"] for p in plan["phases"]
    )
    code, out, err = run(capsys, "plan", "--preset", "paper", "--gpus", "1", "--model", "plain", "--json")
    assert (
        code == 2 and json.loads(out)["problems"] and "need" in err
    )  # what is wrong is there for both readers


def test_inspect_as_json(capsys):
    one = pd.read_parquet(DATA / "completions.parquet").condition.iloc[0]
    code, out, _ = run(capsys, "inspect", str(DATA / "completions.parquet"), "--condition", one, "--json")
    rows = json.loads(out)
    assert (
        code == 0
        and rows
        and {r["condition"] for r in rows} == {one}
        and all(0 <= r["lo"] <= r["accuracy"] <= r["hi"] <= 1 for r in rows)
    )
    code, _, err = run(capsys, "inspect", str(DATA / "completions.parquet"), "--json", "--score", "wrong")
    assert code == 2 and "--score" in err


def test_watch_as_json(capsys, tmp_path):
    run_ = tmp_path / "rich" / "base" / "seed0" / "ppo-0123456789.partial"
    run_.mkdir(parents=True)
    rows = [
        dict(step=s, accuracy=s / 10, response_tokens=20.0, avg_backtracking=0.5, kl=float("nan"))
        for s in (1, 2)
    ]  # habits of one's own: not all four
    (run_ / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (run_ / "config.json").write_text(json.dumps(dict(ppo=dict(steps=5, save_every=5))))
    code, out, _ = run(capsys, "watch", str(tmp_path), "--json")
    [r] = json.loads(out, parse_constant=lambda c: pytest.fail(f"{c} is not JSON"))
    assert (code, r["condition"], r["done"], r["complete"]) == (0, "base", 2, False)
    assert r["metrics"]["accuracy"] == 0.2 and r["metrics"]["kl"] is None
    code, out, err = run(capsys, "watch", str(tmp_path / "typo"), "--json")
    assert code == 2 and "typo" in err and not out


QUICK = {  # commands that only say something: they work without torch
    "stars --help": ["--help"],
    **{f"stars {name} --help": [name, "--help"] for name in ("ppo", "judge", "label", "data", "plan")},
    "stars judge --dry-run": [
        *["judge", str(DATA / "completions.parquet"), "--judge", "openai:gpt-5.4-mini", "--n", "20"],
        "--dry-run",
    ],
    "stars label --dry-run": [
        *["label", str(DATA / "completions.parquet"), "labels", "--column", "generated"],
        *["--labeller", "openai:gpt-5.4-mini", "--dry-run"],
    ],
    "stars prime --dry-run": ["prime", "x.parquet", "--teacher", "openai:gpt-5.4-mini", "--dry-run"],
    "stars data": ["data", "countdown", "--train", "20", "--eval", "0"],
}


@pytest.mark.parametrize("args", QUICK.values(), ids=QUICK)
def test_nobody_waits_for_torch(tmp_path, args):
    code = (
        "import sys; from stars.cli.main import main\n"
        "try: main()\n"
        "except SystemExit as e: assert not e.code\n"
        "heavy = {'torch', 'transformers', 'vllm', 'ray', 'matplotlib', 'scipy'} & set(sys.modules)\n"
        "sys.exit(f'imported: {heavy}' if heavy else 0)"
    )
    env = {k: v for k, v in os.environ.items() if not k.endswith("_API_KEY")}
    done = subprocess.run([sys.executable, "-c", code, *args], cwd=tmp_path, env=env, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()[-2000:]


def test_every_option_has_a_help_text(capsys):
    "tyro takes the comment of a field for its help; a formatter may move that out of its reach"
    for name in cli.COMMANDS:
        _, text, _ = run(capsys, name, "--help")
        options = re.findall(r"│ (--[\w-]+[^│]*)│\n│ {3,}([^│]*)│", text)
        bare = [option.strip() for option, words in options if words.strip().startswith("(default")]
        assert not [o for o in bare if "  " not in o], (name, bare)


# ---- what an error says


def raising(monkeypatch, f):
    "`stars watch` does something else"

    def watch():
        "Watch."
        f()

    monkeypatch.setitem(cli.COMMANDS, "watch", watch)


def no_key(*_):
    return {}["rows"]


def not_asserted(*_):
    assert not "anything"


class Unheard(Exception):
    "A kind that nobody expected"


def unheard(*_):
    raise Unheard("of")


def no_numbers(*_):
    return int("ten")  # Python's words, not ours


def shapes(*_):
    import numpy as np

    return np.ones(2) + np.ones(3)


@pytest.mark.parametrize(
    "slip,said",
    [
        (no_key, "KeyError: 'rows'"),
        (lambda *_: [][3], "IndexError: list index out of range"),
        (lambda *_: None.rows, "AttributeError: 'NoneType' object has no attribute 'rows'"),
        (lambda *_: len(3), "TypeError: object of type 'int' has no len()"),
        (not_asserted, "AssertionError"),
        (lambda *_: 1 / 0, "ZeroDivisionError: division by zero"),
        (unheard, "Unheard: of"),
        (no_numbers, "ValueError: invalid literal for int()"),
        (shapes, "ValueError: operands could not be broadcast"),
    ],
)
def test_a_bug_says_that_it_is_one(monkeypatch, capsys, tmp_path, slip, said):
    (tmp_path / "x.parquet").write_bytes((DATA / "completions.parquet").read_bytes())
    monkeypatch.setattr(viewer, "read_parquet", slip)  # deep in a real command
    code, out, err = run(capsys, "inspect", str(tmp_path / "x.parquet"))
    assert code == 70 and not out and err.startswith(f"stars: {said}") and "Traceback" not in err
    where, bug = (
        r"\(stars/show/viewer.py, line \d+, in \w+\)",
        "this is a bug in stars; run again with --debug",
    )
    assert re.search(f"{where}\n{bug}", err)


def ours():
    raise ValueError("steps=0 must be at least 1")


def nan():
    raise FloatingPointError("step 3: loss is nan")


def offline():
    import httpx

    httpx.get("http://127.0.0.1:9")


def in_another_process(f):
    with ProcessPoolExecutor(1) as pool:
        pool.submit(f).result()


@pytest.mark.parametrize(
    "fails,said",
    [
        (ours, "stars: steps=0 must be at least 1\n"),
        (lambda: options.overrides(("x",)), "stars: --set 'x' is not of the form"),
        (lambda: Path("nowhere").read_text(), "No such file or directory: 'nowhere'"),
        (lambda: os.mkdir("/proc/x"), "/proc/x"),
        (nan, "stars: step 3: loss is nan\n"),
        (offline, "ConnectError"),
        (lambda: __import__("nobody_has_this"), "No module named 'nobody_has_this'"),
        (lambda: in_another_process(ours), "stars: steps=0 must be at least 1\n"),
    ],
)
def test_what_is_no_bug_is_one_line(monkeypatch, capsys, fails, said):
    raising(monkeypatch, fails)
    code, _, err = run(capsys, "watch")
    assert code == 2 and said in err and "bug" not in err and err.count("\n") == 1


def test_a_bug_in_another_process_is_one(monkeypatch, capsys):
    raising(monkeypatch, lambda: in_another_process(no_key))
    code, _, err = run(capsys, "watch")
    assert code == 70 and "KeyError: 'rows'" in err and "this is a bug in stars" in err


def hidden():
    try:
        no_key()
    except KeyError:
        raise ValueError("our words") from None


@pytest.mark.parametrize("fails,code", [(ours, 2), (no_key, 70), (hidden, 2)])
def test_debug_shows_tracebacks(monkeypatch, capsys, fails, code):
    raising(monkeypatch, fails)
    for args in (["--debug", "watch"], ["watch", "--debug"]):
        got, _, err = run(capsys, *args)
        assert got == code and "Traceback" in err and f"in {fails.__name__}\n" in err
        assert err.splitlines()[-1].startswith(("stars: ", "this is a bug in stars; please report"))
        if fails is hidden:
            assert "KeyError: 'rows'" in err  # `from None` hides it from one line only
    for value, shown in (("1", True), ("yes", True), ("0", False), ("", False), ("false", False)):
        monkeypatch.setenv("STARS_DEBUG", value)
        got, _, err = run(capsys, "watch")
        assert got == code and ("Traceback" in err) == shown, value


def test_an_interrupt_is_no_error(monkeypatch, capsys):
    def interrupted():
        raise KeyboardInterrupt

    raising(monkeypatch, interrupted)
    code, _, err = run(capsys, "watch")
    assert code == 130 and "goes on from here" in err and "Traceback" not in err
    assert "Traceback" in run(capsys, "watch", "--debug")[2]


def test_a_reader_that_leaves_is_no_error():
    "As in `stars plan | head -1`"
    p = subprocess.Popen(
        [sys.executable, "-c", "from stars.cli.main import main; main()", "--help"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    p.stdout.close()
    assert p.stderr.read() == b"" and p.wait() == 141


@pytest.mark.parametrize("kind,code", [("KeyError", 70), ("ValueError", 2)])
def test_a_bug_in_a_figure_is_one(monkeypatch, capsys, tmp_path, kind, code):
    class Papermill(Exception):
        ename, evalue = kind, "'rows'"  # as it tells of what a kernel raised

    def run_figure(*_):
        raise Papermill("a whole traceback")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(drawing, "run_figure", run_figure)
    got, _, err = run(capsys, "figure", "fig_gap", "--preset", "smoke")
    assert got == code and f"fig_gap failed: {kind}: 'rows'" in err and "a whole traceback" not in err
    assert ("this is a bug in stars" in err) == (code == 70)
    assert "a whole traceback" in run(capsys, "figure", "fig_gap", "--preset", "smoke", "--debug")[2]
    got, _, err = run(capsys, "reproduce", "--only", "fig_gap", "--preset", "smoke")
    assert got == 1 and ("this is a bug in stars" in err) == (code == 70)


# ---- names


@pytest.mark.parametrize(
    "args,meant",
    [
        (["repoduce"], "reproduce"),
        (["Reproduce"], "reproduce"),
        (["inspct", "x"], "inspect"),
        (["lable"], "label"),
        (["figure", "fig_gab"], "fig_gap"),
        (["reproduce", "--only", "fig_gap,fig_dos"], "fig_dose"),
        (["ppo", "--condition", "dotz"], "dots"),
        (["ppo", "--preset", "smok"], "smoke"),
        (["ppo", "--model", "plian"], "plain"),
        (["ppo", "--set", "ppo_step=5"], "ppo.steps"),
        (["data", "x", "--set", "max_numbers=9"], "max_number"),
        (["figure", "fig_gap", "-p", "sedes=[0]"], "seeds"),
        (["reproduce", "-p", "sorce=both"], "source"),
        (["figure", "fig_gap", "-p", "source=pulished"], "published"),
        (["label", "x", "y", "--labeller", "rule"], "rules"),
        (["curate", "x", "y", "--rewriter", "embeded"], "embedded"),
        (["judge", "x", "--judge", "opnai:gpt"], "openai"),
        (["prime", "x.parquet", "--teacher", "openai:x", "--mix", "all_strategy"], "all_strategies"),
        (
            ["inspect", str(DATA / "completions.parquet"), "--condition", "backtracking_verificaton"],
            "backtracking_verification",
        ),
    ],
)
def test_near_names_are_suggested(monkeypatch, capsys, tmp_path, args, meant):
    monkeypatch.chdir(tmp_path)
    code, _, err = run(capsys, *args)
    assert code == 2 and re.search(rf"did you mean {meant}\b", err) and not os.listdir(tmp_path), err


def test_misspelt_options_are_suggested(capsys):
    code, _, err = run(capsys, "label", "x", "y", "--labeler", "rules")
    assert code == 2 and "--labeller" in err
    assert "did you mean" not in run(capsys, "qqq")[2]


def test_lists_may_have_blanks_and_a_last_comma(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    drawn, planned = [], []
    monkeypatch.setattr(drawing, "draw_all", lambda names, *_, **__: drawn.append(names))
    for only in ("fig_gap, fig_dose", " fig_gap,fig_dose,", "fig_gap,,fig_dose", "fig_gap,fig_dose,fig_gap"):
        assert run(capsys, "reproduce", "--only", only)[0] == 0
    assert drawn == [("fig_gap", "fig_dose")] * 4
    for nothing in (",", " , ", ""):
        assert run(capsys, "reproduce", "--only", nothing)[0] == 2

    class Ends(ValueError):
        pass

    def grid(cfg, models, conditions, seeds, runs):
        planned.append((list(models), list(conditions), list(seeds)))
        raise Ends("here")

    monkeypatch.setattr(ex, "grid", grid)
    run(capsys, "sweep", "--conditions", "base, dots,", "--models", "plain ,rich", "--seeds", "0, 1,")
    assert planned == [(["plain", "rich"], ["base", "dots"], [0, 1])]
    cfg = preset(
        "cpu", seeds="0, 1,", models=" plain,rich", figures="fig_gap, fig_dose", world=dict(n_numbers="3, 4")
    )
    assert (cfg.seeds, cfg.models, cfg.world.n_numbers) == ((0, 1), ("plain", "rich"), (3, 4))
    assert cfg.figures == ("fig_gap", "fig_dose")
    assert options.space_of("rl", dict(n_numbers="3, 4,"), None).n_numbers == (3, 4)
    for bad in (
        dict(seeds=""),
        dict(models=","),
        dict(seeds="0,0"),
        dict(models="rich,rich"),
        {"world.n_numbers": [3.7]},
        dict(seeds=[True]),
    ):
        with pytest.raises(ValueError, match=next(iter(bad))):
            preset("cpu", **bad)


def test_settings_add_up(capsys):
    for typed, meant in (
        ("ppo --set a=1 --seed 1 --set b=2 c=3 --set=d=4", "ppo --set a=1 b=2 c=3 d=4 --seed 1"),
        ("figure x -p a=1 --param b=2 --runs r", "figure x -p a=1 b=2 --runs r"),
    ):
        assert cli.checked(typed.split()) == meant.split()
    code, _, err = run(capsys, "ppo", "--set", "ppo_step=5", "--set", "ppo.lr=1e-4")  # the first is not lost
    assert code == 2 and "'ppo_step' is not a field" in err
    code, _, err = run(capsys, "ppo", "--set", "ppo.steps=5", "ppo.steps=6")
    assert code == 2 and "gives ppo.steps twice, as 5 and as 6" in err
    for args in (
        ["figure", "fig_gap", "-p", "preset=smoke"],
        ["figure", "fig_gap", "-p", "runs=x"],
        ["reproduce", "-p", "overrides={}"],
    ):
        assert "option of the command" in run(capsys, *args)[2]


# ---- numbers and places that cannot be

HOSTED = ["prime", "x.parquet", "--teacher", "anthropic:claude-haiku-4-5", "--dry-run"]
JUDGE = ["judge", str(DATA / "completions.parquet"), "--judge", "openai:gpt-5.4-mini", "--dry-run"]
LABEL, CURATE, SWEEP = (
    ["label", str(DATA), "labels"],
    ["curate", "labels", "sets"],
    ["sweep", "--conditions", "base"],
)


def each(command, options):  # "--a 1, --b 2"
    return [[*command, *option.split()] for option in options.split(", ")]


@pytest.mark.parametrize(
    "args",
    [
        *each(
            HOSTED,
            "--max-cost -1, --max-cost -.01, --max-cost nan, --max-cost inf, --max-cost -inf, --seed -1",
        ),
        *each(
            HOSTED,
            "--concurrency 0, --rpm 0, --tpm 0, --max-tokens 0, --n 0, --over 0, --over nan, --over inf",
        ),
        *each(
            HOSTED,
            "--over -1, --poll nan, --poll inf, --poll -1, --temperature nan, --temperature inf, "
            "--temperature -1",
        ),
        *each(JUDGE, "--n -1, --repeat -1, --seed -1, --max-cost -1"),
        *each(
            [*LABEL, "--labeller", "openai:x", "--dry-run"],
            "--max-cost -1, --max-examples 0, --save-every 0, --end 0",
        ),
        *each([*LABEL, "--labeller", "openai:x", "--dry-run"], "--start -1, --max-bad nan, --max-bad 1.5"),
        *each(
            LABEL,
            "--workers 0, --max-cost nan, --gpu-memory 0, --gpu-memory nan, --cpu-cache inf, --engines "
            "0, --context 0",
        ),
        *each(
            CURATE,
            "--budget 0, --length -1, --test nan, --acts 0, --seed -1, --rewriter-seed -1, --workers "
            "-2, --max-cost -1",
        ),
        *each(["data", "problems"], "--train -1, --eval -1, --seed -1, --workers 0"),
        *each(["plan"], "--gpus 0, --gpus -1, --memory nan, --memory 0, --prompt 0"),
        *each(["verl", "out"], "--gpus 0, --nodes 0, --tensor-parallel 0"),
        *each(
            SWEEP, "--gpus-per-run nan, --cpus-per-run nan, --cpus-per-run inf, --retries -1, --seeds 0,-1"
        ),
        *each(["inspect", JUDGE[1]], "--n -1, --sample-seed -1"),
        *each(["watch", "."], "--every 0, --every -1, --every nan, --every inf"),
        *(
            case
            for c in ("base", "prime", "sft", "ppo", "eval")
            for case in each([c], f"--seed -1, --seed {2**63}")
        ),
        *each(
            ["ppo", "--set"],
            "ppo.steps=0, ppo.steps=-1, eval.samples=0, seeds=-1, ppo.entropy_coef=nan, data.seed=-1",
        ),
        *each(
            ["ppo", "--set"],
            "eval.temperature=inf, base.heads=0, base.layers=-1, lora.alpha=nan, priming.budget=0",
        ),
        *each(["ppo", "--set"], "ppo.max_grad_norm=inf, ppo.kl_coef=inf"),
    ],
    ids=" ".join,
)
def test_numbers_that_cannot_be_are_refused_before_anything(monkeypatch, capsys, tmp_path, args):
    monkeypatch.chdir(tmp_path)
    code, out, err = run(capsys, *args)
    assert code == 2 and not out and err.count("\n") == 1 and not os.listdir(tmp_path), err


@pytest.mark.parametrize(
    "model",
    [
        "..",
        ".",
        "../x",
        "../..",
        "/",
        "",
        " ",
        "a/../..",
        "../a/b",
        "./",
        "~",
        "a\\b",
        "org/..",
        "../org",
        "org/.x",
        "nul\0",
        "x" * 5_000,
        "org/" + "x" * 300,
        "org/na:me",
        "shared/",
        "plain/",
        "CON",
        "con.txt",
        "a b/c",
        "\n",
        "org/x\n",
    ],
)
def test_models_that_would_lead_out_of_the_store(monkeypatch, tmp_path, model):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(ValueError, match="model="):
        Job(preset("smoke"), model, "base")


@pytest.mark.parametrize(
    "name",
    [
        "..",
        ".",
        "../own",
        "./own",
        "own/",
        "deep/er",
        "shared",
        "notebooks",
        "aux",
        "Nul.v1",
        "a:b",
        "with blank",
        " x",
        "x.",
        "q?",
        "a\\b",
        "new\nline",
        "é",
        "x" * 201,
        ".hidden",
    ],
)
def test_folders_of_checkpoints_lie_in_the_store_or_are_refused(monkeypatch, tmp_path, name):
    (cwd := tmp_path / "a" / "b").mkdir(parents=True)
    monkeypatch.chdir(cwd)
    Path(name).mkdir(parents=True, exist_ok=True)
    (Path(name) / "config.json").write_text("{}")
    fit = name in ("..", ".", "../own", "./own", "own/", "deep/er", "with blank", "é", ".hidden")
    if not fit:
        with pytest.raises(ValueError, match="model="):
            Job(preset("smoke"), name, "base")
        return
    where = Job(preset("smoke"), name, "base", runs="runs").model_dir
    assert where.parent == Path("runs/smoke") and not where.name.startswith(".")
    assert os.path.realpath(where).startswith(os.path.realpath(cwd / "runs" / "smoke") + os.sep)
    if name == "own/":
        assert where.name == "own"


@pytest.mark.parametrize("command", ["base", "prime", "sft", "ppo", "eval"])
def test_a_folder_without_a_checkpoint_is_refused_at_once(monkeypatch, capsys, tmp_path, command):
    monkeypatch.chdir(tmp_path)
    Path("hollow").mkdir()
    for model in ("hollow", str(tmp_path / "hollow"), ".", ".."):
        code, _, err = run(capsys, command, "--model", model, "--preset", "smoke")
        assert code == 2 and "is a folder without a checkpoint: it holds no config.json" in err
        assert os.listdir() == ["hollow"] and not os.listdir("hollow")


@settings(max_examples=200, deadline=None)
@given(st.text(st.sampled_from("./\\a-_ :*\0~\né"), max_size=12))
def test_no_name_leads_out_of_the_store(model):
    try:
        where = Job(preset("smoke"), model, "base").model_dir
    except ValueError:
        return
    assert where.parent == Path("runs/smoke") and where.name not in ("", ".", "..") and "/" not in where.name


def test_places_that_cannot_be_are_refused_before_anything(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("x")
    Path("folder").mkdir()
    long = "x" * 300

    def never(*_, **__):
        pytest.fail("it began")

    for module, name in (
        (drawing, "run_figure"),
        (drawing, "draw_all"),
        (ex, "data_stage"),
        (ex, "prime_stage"),
        (pretraining, "label_corpus"),
        (ex, "grid"),
    ):
        monkeypatch.setattr(module, name, never)
    for args in (
        ["figure", "fig_gap", "--figures", "file"],
        ["figure", "fig_gap", "--figures", "file/x"],
        ["figure", "fig_gap", "--runs", "file"],
        ["reproduce", "--runs", "file/x"],
        ["reproduce", "--figures", long],
        ["ppo", "--runs", "file"],
        ["data", "--preset", "smoke", "--runs", long],
        ["sweep", "--conditions", "base", "--runs", "file/y"],
        ["label", str(DATA), "file"],
        ["label", str(DATA), "file/out"],
        ["label", str(DATA), long],
        ["curate", "folder", "file"],
        ["prime", "folder/../file/x.parquet", "--teacher", "openai:x", "--dry-run"],
        ["prime", long + ".parquet", "--teacher", "openai:x"],
        ["judge", "x", "--judge", "openai:x", "--out", "file"],
        ["judge", "x", "--judge", "openai:x", "--ledger", "folder"],
        ["data", "file"],
        ["verl", "file/x"],
        ["data", "a\0b"],
        ["ppo", "--runs", ""],
        ["ppo", "--runs="],
        ["label", str(DATA), ""],
        ["label", "", "out"],
        ["figure", "fig_gap", "--figures", " "],
        ["ppo", "--model", ""],
        ["data", "--preset", ""],
        [""],
    ):
        code, out, err = run(capsys, *args)
        assert code == 2 and not out and err.count("\n") == 1, (args, err)
        assert sorted(os.listdir()) == ["file", "folder"] and not os.listdir("folder"), args

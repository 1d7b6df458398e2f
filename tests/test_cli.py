"The command line: help that a newcomer reads, examples that parse, JSON that parses, and what is refused"
import functools,json,re
from pathlib import Path

import pandas as pd,pytest
import tyro

from stars import cli

DATA = Path(__file__).parent.parent/"nbs"

def run(capsys, *args):
    capsys.readouterr()
    try: cli.main(list(args))
    except SystemExit as e: return e.code, *capsys.readouterr()
    return 0, *capsys.readouterr()

@pytest.mark.parametrize("args", [[], ["-h"], ["--help"]])
def test_overview_names_every_command_on_one_screen(capsys, args):
    code, out, _ = run(capsys, *args)
    assert code == 0 and max(map(len, out.splitlines())) <= 120 and len(out.splitlines()) < 50
    for name, f in cli.COMMANDS.items(): assert re.search(rf"^  {name} +\S", out, re.M), name

@pytest.mark.parametrize("name", cli.COMMANDS)
def test_examples_parse(name):
    "Every example of a help text is accepted by the parser of its command, and by no other way than its own"
    import shlex
    seen = []
    def stub(n, f):
        @functools.wraps(f)
        def called(*args, **kwargs): seen.append(n)
        return called
    stubs = {n: stub(n, f) for n, f in cli.COMMANDS.items()}
    tyro.extras.subcommand_cli_from_dict(stubs, prog="stars", args=shlex.split(cli.example(cli.COMMANDS[name]))[1:])
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
    assert {p["name"] for p in plan["phases"]} >= {"sft", "eval"} and all(p["total"] <= p["room"] for p in plan["phases"])
    code, out, err = run(capsys, "plan", "--preset", "paper", "--gpus", "1", "--model", "plain", "--json")
    assert code == 2 and json.loads(out)["problems"] and "need" in err # what is wrong is there for both readers

def test_inspect_as_json(capsys):
    one = pd.read_parquet(DATA/"completions.parquet").condition.iloc[0]
    code, out, _ = run(capsys, "inspect", str(DATA/"completions.parquet"), "--condition", one, "--json")
    rows = json.loads(out)
    assert code == 0 and rows and {r["condition"] for r in rows} == {one} and all(0 <= r["lo"] <= r["accuracy"] <= r["hi"] <= 1 for r in rows)
    code, _, err = run(capsys, "inspect", str(DATA/"completions.parquet"), "--json", "--score", "wrong")
    assert code == 2 and "--score" in err

def test_watch_as_json(capsys, tmp_path):
    run_ = tmp_path/"rich"/"base"/"seed0"/"ppo-0123456789.partial"
    run_.mkdir(parents=True)
    rows = [dict(step=s, accuracy=s / 10, response_tokens=20., avg_backtracking=.5, kl=float("nan")) for s in (1, 2)] # habits of one's own: not all four
    (run_/"metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (run_/"config.json").write_text(json.dumps(dict(ppo_steps=5, ppo_save_every=5)))
    code, out, _ = run(capsys, "watch", str(tmp_path), "--json")
    [r] = json.loads(out, parse_constant=lambda c: pytest.fail(f"{c} is not JSON"))
    assert (code, r["condition"], r["done"], r["complete"]) == (0, "base", 2, False)
    assert r["metrics"]["accuracy"] == .2 and r["metrics"]["kl"] is None
    code, out, err = run(capsys, "watch", str(tmp_path/"typo"), "--json")
    assert code == 2 and "typo" in err and not out

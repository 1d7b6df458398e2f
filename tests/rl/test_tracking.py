"Curves in TensorBoard and on wandb: the numbers of the log, each step once, whatever happened to the run"

import json
import os
import signal
import struct
import subprocess
import sys
import time

import pytest
import tiny
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from stars.cli.main import main
from stars.lab.configs import preset
from stars.lab.experiments import is_built, sft_stage
from stars.lab.stages import Job
from stars.rl.loops import Log, Tracking, check_tracker, read_log
from stars.show.watching import Watch

NAME = "plain/dots/seed1/ppo-3351f141c9"


@pytest.fixture(autouse=True)
def without_network(monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")


def tracking(library, folder):
    return Tracking(library, folder, NAME, {"ppo.lr": 1e-4, "seed": 1})


def told_tensorboard(folder):
    "What TensorBoard's own reader finds: name → [(step, value), …]"
    events = EventAccumulator(str(folder / "tensorboard" / NAME), size_guidance=dict(scalars=0)).Reload()
    return {name: [(p.step, p.value) for p in events.Scalars(name)] for name in events.Tags()["scalars"]}


def whole(path):
    "A file of wandb's, when its process, for which nobody waits, has written the end of the run"
    while not any(r.HasField("exit") for r in records(path)):
        time.sleep(0.1)
    return path


def records(path):
    "The records of a file of wandb's: LevelDB's log format, with protocol buffers in it"
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, part = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        left = 32_768 - at % 32_768
        if left < 7:
            at += left
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])
        part += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            record, part = Record(), b""
            record.ParseFromString(data[at - length : at] if kind == 1 else part)
            yield record


def wandb_sessions(folder):
    "What each session has told wandb: [[{name: value, …}, …], …]"
    out = []
    for path in sorted((folder / "wandb").glob("offline-run-*/*.wandb")):
        rows = [r.history.item for r in records(whole(path)) if r.HasField("history")]
        out.append([{i.key or i.nested_key[0]: json.loads(i.value_json) for i in row} for row in rows])
    return out


def told_wandb(folder):
    curves = {}
    for row in (row for rows in wandb_sessions(folder) for row in rows):
        for name, value in row.items():
            if not name.startswith("_"):
                curves.setdefault(name, []).append((row["_step"], value))
    return curves


TOLD = dict(tensorboard=told_tensorboard, wandb=told_wandb)


def logged(out):
    "The same of a log"
    curves = {}
    for row in read_log(out / "metrics.jsonl"):
        for name, value in row.items():
            if name != "step":
                curves.setdefault(name, []).append((row["step"], value))
    return curves


def assert_same(told, log):
    assert told.keys() == log.keys()
    for name, points in log.items():
        assert [step for step, _ in told[name]] == [step for step, _ in points], name
        assert [value for _, value in told[name]] == pytest.approx([v for _, v in points], rel=1e-6), name


def train(library, folder, dies_after):
    os.environ.pop("WANDB_SERVICE", None)  # another process's, which would think that the run goes on
    os.environ |= dict(WANDB_MODE="offline", WANDB_SILENT="true")  # the fork server may know another world
    calls = iter(range(dies_after))

    def reward(text, problem):
        if next(calls, None) is None:
            os.kill(os.getpid(), signal.SIGKILL)
        return tiny.fingerprint(text, problem)

    tiny.run("ppo", folder / "run", reward=reward, tracking=tracking(library, folder), steps=6, save_every=2)


def run_in_child(library, folder, dies_after=10**9):
    "PPO in a process of its own, which is killed when the reward is asked too often"
    child = tiny.forked().Process(target=train, args=(library, folder, dies_after))
    child.start()
    child.join()
    return child.exitcode


@pytest.mark.parametrize("library", TOLD)
@pytest.mark.parametrize("kind", ["sft", "ppo"])
def test_curves_are_the_log(tmp_path, library, kind):
    tiny.run(kind, tmp_path / "run", tracking=tracking(library, tmp_path))
    tiny.run(kind, tmp_path / "without")
    assert_same(TOLD[library](tmp_path), logged(tmp_path / "run"))
    assert tiny.untimed(tmp_path / "run") == tiny.untimed(tmp_path / "without")  # it changes nothing


@pytest.mark.parametrize("library", TOLD)
def test_killed_and_resumed(tmp_path, library):
    "kill -9 in step 4; the last state is that of step 2"
    assert run_in_child(library, tmp_path, dies_after=12 * 3 + 5) == -signal.SIGKILL
    assert [row["step"] for row in read_log(tmp_path / "run/metrics.jsonl")] == [1, 2, 3]
    assert run_in_child(library, tmp_path) == 0
    log, told = logged(tmp_path / "run"), TOLD[library](tmp_path)
    assert [step for step, _ in log["reward"]] == [1, 2, 3, 4, 5, 6]
    for curves in (log, told):  # a repeated step takes another time
        for name in [n for n in curves if n.startswith(("s_", "tokens_per_s"))]:
            curves[name] = [(step, 0.0) for step, _ in curves[name]]
    assert_same(told, log)


@pytest.mark.parametrize("library", TOLD)
def test_killed_before_the_first_state(tmp_path, library):
    assert run_in_child(library, tmp_path, dies_after=12 + 5) == -signal.SIGKILL
    assert run_in_child(library, tmp_path) == 0
    assert [step for step, _ in TOLD[library](tmp_path)["reward"]] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("library", TOLD)
def test_a_run_that_began_without_it(tmp_path, library):
    "What was logged so far is told first"
    tiny.cut_short("ppo", tmp_path / "run", 2)
    tiny.run("ppo", tmp_path / "run", tracking=tracking(library, tmp_path))
    assert_same(TOLD[library](tmp_path), logged(tmp_path / "run"))


def test_what_a_state_goes_on_from_is_in_the_file(tmp_path, monkeypatch):
    "A log is flushed before a state is saved: what was under way to the file would be lost with the process"
    log, flushed = Log(tmp_path / "metrics.jsonl", tracking=tracking("tensorboard", tmp_path)), []
    monkeypatch.setattr(log.tracker.writer, "flush", lambda: flushed.append(True))
    log(step=1, loss=0.5)
    log.flush()
    assert flushed


def test_offline_sessions_are_one_run(tmp_path):
    "One id; the newest session holds the whole curve, the others are put aside"
    tiny.cut_short("ppo", tmp_path / "run", 2, tracking=tracking("wandb", tmp_path))
    tiny.run("ppo", tmp_path / "run", tracking=tracking("wandb", tmp_path))
    run_id = (tmp_path / "run/wandb-id").read_text()
    (session,) = (tmp_path / "wandb").glob("offline-run-*")
    (older,) = (tmp_path / "wandb/superseded").glob("offline-run-*")
    assert session.name.endswith(run_id) and older.name.endswith(run_id)
    assert_same(told_wandb(tmp_path), logged(tmp_path / "run"))


@pytest.mark.parametrize("server_has", [1, 3, 5])
def test_online_what_the_server_has_is_not_told_again(tmp_path, monkeypatch, server_has):
    "The session died in step 5; the last state is that of step 3, and wandb had not sent everything, or had"
    import wandb

    told, asked = [], {}

    class Run:
        id, starting_step = "abc", 0

        def log(self, values, step, commit):
            told.append((step, values))

        def finish(self, exit_code):
            told.append(exit_code)

    monkeypatch.setattr(wandb, "init", lambda **how: asked.update(how) or Run())
    where = tracking("wandb", tmp_path)
    first = Log(tmp_path / "metrics.jsonl", tracking=where)
    for step in range(1, 6):
        first(step=step, loss=1 / step)
    assert asked["id"] is None and asked["resume"] == "allow"
    del told[server_has:]
    Run.starting_step = server_has + 1
    with Log(tmp_path / "metrics.jsonl", 3, tracking=where) as log:
        for step in range(4, 8):
            log(step=step, loss=1 / step)
    assert asked["id"] == "abc"
    assert told == [(step, dict(loss=1 / step)) for step in range(1, 8)] + [0]


def test_names_settings_and_no_key(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    tiny.run("ppo", tmp_path / "run", tracking=tracking("wandb", tmp_path))
    tiny.run("ppo", tmp_path / "run2", tracking=tracking("tensorboard", tmp_path))
    (path,) = (tmp_path / "wandb").glob("offline-run-*/*.wandb")
    run = next(r.run for r in records(whole(path)) if r.HasField("run"))
    assert (run.display_name, run.run_group, run.job_type) == (NAME, "plain/dots", "ppo")
    assert run.project == "stars" and {c.key for c in run.config.update} >= {"ppo.lr", "seed"}
    events = EventAccumulator(str(tmp_path / "tensorboard" / NAME)).Reload()
    assert b'"ppo.lr": 0.0001' in events.Tensors("config/text_summary")[0].tensor_proto.string_val[0]
    for path in tmp_path.rglob("*"):
        assert not path.is_file() or b"k" * 40 not in path.read_bytes(), path


def test_a_failed_run_says_so(tmp_path):
    def fails(text, problem):
        raise RuntimeError("the judge is out")

    with pytest.raises(RuntimeError, match="judge"):
        tiny.run("ppo", tmp_path / "run", reward=fails, tracking=tracking("wandb", tmp_path))
    (path,) = (tmp_path / "wandb").glob("offline-run-*/*.wandb")
    assert next(r.exit for r in records(whole(path)) if r.HasField("exit")).exit_code == 1


def test_the_callers_own_run_stays_active(tmp_path):
    import wandb

    with wandb.init(dir=tmp_path / "mine") as mine:
        tiny.run("ppo", tmp_path / "run", tracking=tracking("wandb", tmp_path))
        mine.log(dict(still=1))
        assert wandb.run is mine
    assert [step for step, _ in told_wandb(tmp_path)["reward"]] == [1, 2, 3]


@pytest.mark.parametrize("library", TOLD)
def test_one_of_a_team_writes(tmp_path, library):
    with Log(tmp_path / "metrics.jsonl", write=False, tracking=tracking(library, tmp_path)) as log:
        log(step=1, loss=1.0)
        log.flush()
    assert list(tmp_path.iterdir()) == []


def test_stages_are_found_with_and_without(tmp_path):
    "A tracker is no part of an outcome; its files are no runs, and no models"
    with_it = preset("smoke", **{"run.track": "tensorboard", "ppo.steps": 2})
    job = Job(with_it, "plain", "empty_cot", runs=str(tmp_path), progress=False)
    folder = sft_stage(job).parent
    other = Job(preset("smoke", **{"ppo.steps": 2}), "plain", "empty_cot", runs=str(tmp_path), progress=False)
    assert is_built(other, sft_stage) and sft_stage(other).parent == folder
    curves = tmp_path / "smoke/tensorboard"
    names = {str(path.parent.relative_to(curves)) for path in curves.rglob("events.*")}
    base = next((tmp_path / "smoke/plain").glob("base-*")).name
    assert names == {f"plain/{base}", f"plain/empty_cot/seed0/{folder.name}"}
    assert [run.name for run in Watch(tmp_path / "smoke").look()] == ["plain/empty_cot/0"]
    with pytest.raises(ValueError, match="which is taken"):
        Job(with_it, str(_model_named(tmp_path / "tensorboard")), "base")


def _model_named(folder):
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    os.chdir(folder.parent)
    return folder.name


def test_a_missing_library_is_refused_first(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("stars.rl.loops.find_spec", lambda name: None)
    for command in ("sft", "ppo", "eval"):
        with pytest.raises(SystemExit) as e:
            main([command, "--preset", "smoke", "--runs", str(tmp_path / "runs"), "--track", "wandb"])
        assert e.value.code == 2 and not (tmp_path / "runs").exists()
        said = capsys.readouterr().err
        assert "run.track='wandb'" in said and "pip install 'stars-habits[track]'" in said


def test_a_folder_of_that_name_is_no_library(tmp_path):
    "wandb leaves one behind in the present folder"
    (tmp_path / "wandb").mkdir()
    code = "import sys; sys.path = ['', *(p for p in sys.path if 'site-packages' not in p)]; "
    code += "from importlib.util import find_spec; assert find_spec('wandb').origin is None"
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)


def test_an_unknown_tracker():
    with pytest.raises(ValueError, match="run.track='mlflow' is unknown; choose one of tensorboard, wandb"):
        preset("smoke", **{"run.track": "mlflow"})
    check_tracker("")


def test_nobody_pays_for_what_he_did_not_ask_for(tmp_path):
    code = "import sys, stars.cli.main, stars.lab.experiments, stars.rl.ppo; "
    code += "assert not {'wandb', 'tensorboard', 'torch.utils.tensorboard'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_full_disk_is_told_in_words(tmp_path, monkeypatch):
    log = Log(tmp_path / "metrics.jsonl", tracking=tracking("tensorboard", tmp_path))

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(log.tracker.writer, "add_scalar", full)
    with pytest.raises(OSError, match="Make room: the same command goes on"):
        log(step=1, loss=1.0)

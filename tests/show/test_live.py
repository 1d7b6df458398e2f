"Watching runs: growing files, renamed folders, resumed logs, the terminal, pictures in notebooks"

import io
import json
import os
import pty
import re
import select
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import nbformat
import numpy as np
import pytest
from nbclient import NotebookClient
from rich.console import Console

from stars.habits.behaviors import COLORS, HABITS
from stars.lab import progress
from stars.rl.loops import Log
from stars.show import live, watching
from stars.show.plots import CONDITIONS

PPO = {"ppo.steps": 40, "ppo.save_every": 10, "ppo.prompts": 16, "ppo.samples": 2}


def ppo_row(step, **more):
    return (
        dict(
            step=step,
            accuracy=step / 100,
            response_tokens=20.0 + step,
            kl=0.001 * step,
            entropy=0.5,
            s_sample=1.0,
            s_update=2.0,
            **{f"avg_{h.column}": float(j) for j, h in enumerate(HABITS)},
        )
        | more
    )


def sft_row(step, per_epoch=10):
    return dict(step=step, epoch=(step - 1) // per_epoch, loss=5 / step, lr=1e-3)


def stage(folder, name, rows, config, complete=False):
    path = Path(folder) / (name + ("" if complete else ".partial"))
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps(config))
    if rows:
        (path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    if complete:
        (path / "manifest.json").write_text(json.dumps(dict(finished="2026-01-01T10:00:00+00:00")))
    return path


def finish(path):
    final = path.with_suffix("")
    (path / "manifest.json").write_text(json.dumps(dict(finished="2026-01-01T10:00:00+00:00")))
    path.rename(final)
    return final


@pytest.fixture
def store(tmp_path):
    "base at step 30, a primed run in SFT, and one that is complete; none of this has just been written"
    for c, seed in (("base", 0), ("only_backtracking", 0), ("base", 1)):
        folder = tmp_path / f"cpu/plain/{c}/seed{seed}"
        if c != "base":
            stage(
                folder, "sft-00000000aa", [sft_row(i) for i in range(1, 16)], {"sft.epochs": 3, "seed": seed}
            )
        else:
            stage(folder, "ppo-00000000bb", [ppo_row(i) for i in range(1, 31 + 10 * seed)], PPO, seed == 1)
    done = stage(tmp_path / "cpu/plain/base/seed1", "eval-00000000cc", [], {}, True)
    for i in range(5):
        (done / f"completions-step-{i}.parquet").touch()
    stage(tmp_path / "cpu/shared", "data-00000000dd", [], {}, True)
    return tmp_path / "cpu"


def shown(path, width=200):
    it = watching.Watch(path)
    it.look()
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(watching.run_table(it, width))
    return console.export_text()


def test_neither_torch_nor_ray_is_loaded():
    heavy = "{'torch', 'ray', 'transformers', 'vllm'}"
    code = f"import sys, stars.show.live; print(sorted({heavy} & set(sys.modules)))"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
        == "[]\n"
    )


def test_a_log_is_read_as_the_trainer_writes_it(tmp_path):
    "Appended to, cut in the middle of a line, and begun again from a saved state by the trainer's own `Log`"
    path, tail, log = tmp_path / "metrics.jsonl", progress.Tail(), Log(tmp_path / "metrics.jsonl")
    for i in range(1, 9):
        log(**sft_row(i))
    tail.read(path)
    with path.open("a") as f:
        f.write('{"step": 9, "lo')
    tail.read(path)
    assert [r["step"] for r in tail.rows] == [*range(1, 9)]
    log = Log(path, done=5)
    for i in range(6, 12):
        log(**sft_row(i) | dict(loss=9.0))  # longer than it was: only the file's identity gives it away
    tail.read(path)
    assert [r["step"] for r in tail.rows] == [*range(1, 12)] and [r["loss"] for r in tail.rows[4:6]] == [
        1.0,
        9.0,
    ]
    with path.open("a") as f:
        f.write(json.dumps(sft_row(7) | dict(loss=3.0)) + "\n")
    tail.read(path)
    assert [r["step"] for r in tail.rows] == [*range(1, 8)] and tail.rows[-1]["loss"] == 3.0


def test_a_look_reads_only_what_is_new(tmp_path):
    path, tail = tmp_path / "metrics.jsonl", progress.Tail()
    path.write_text(json.dumps(sft_row(1)) + "\n")
    tail.read(path)
    size = path.stat().st_size
    with path.open("r+") as f:
        f.write("x" * (size - 1))  # in place: what was read before is not looked at again
    with path.open("a") as f:
        f.write(json.dumps(sft_row(2)) + "\n")
    tail.read(path)
    assert [r["step"] for r in tail.rows] == [1, 2]


@pytest.mark.parametrize(
    "line,said",
    [
        ("{'step': 3}", "not JSON"),
        ("[3]", "no step"),
        ('{"step": 3, "reward/mean": 0.5}', "no loss"),
        ('{"step": 3, "accuracy": 0.5}', "no response_tokens"),
        ('{"step": "3", "loss": 1.0}', "step='3' is not a number"),
        ('{"step": 3, "loss": "low"}', "loss='low' is not a number"),
        ("", "not JSON"),
    ],
)
def test_another_schema_is_told_with_file_and_line(tmp_path, line, said):
    (tmp_path / "metrics.jsonl").write_text(json.dumps(sft_row(1)) + "\n" + line + "\n")
    for _ in range(2):  # and again at the next look
        with pytest.raises(ValueError, match=f"metrics.jsonl:2.*{re.escape(said)}"):
            watching.watch(tmp_path, once=True)


def test_what_a_store_holds(store):
    it = watching.Watch(store)
    runs = {r.name: r for r in it.look()}
    assert [(n, r.now.kind, r.step, r.now.complete) for n, r in runs.items()] == [
        ("plain/base/0", "ppo", "30/40", False),
        ("plain/base/1", "eval", "5/5", True),
        ("plain/only_backtracking/0", "sft", "15/30", False),
    ]  # 10 updates an epoch, 3 epochs
    assert watching.state(runs["plain/base/0"]) == "30 s left" and not it.over()  # 10 steps of 3 s
    for where, names in {
        "plain": 3,
        "plain/base": 2,
        "plain/base/seed0": 1,
        "plain/base/seed0/ppo-00000000bb": 1,
        "plain/base/seed0/ppo-00000000bb.partial": 1,
        "plain/base/seed0/ppo-00000000bb.partial/metrics.jsonl": 1,
    }.items():
        assert len(watching.Watch(store / where).look()) == names, where
    assert len(watching.Watch(store.parent).look()) == 3
    text = shown(store)
    assert "2 under way, 1 complete" in text and re.search(r"plain +only_backtracking +0 +sft +15/30", text)
    assert watching.spark(range(8)) == "▁▂▃▄▅▆▇█" and "▁▂" in text
    assert (
        "▁" not in shown(store, 100)
        and all(len(line) <= 100 for line in shown(store, 100).splitlines())
        and "…" not in shown(store, 100)
    )


def test_several_settings_under_way_in_one_folder_have_a_line_each(store):
    "As the shares of a dose: nothing hides behind what was written last, and the watch does not end early"
    here = store / "plain/base/seed0"
    shutil.copytree(here / "ppo-00000000bb.partial", here / "ppo-00000000ee.partial")
    it = watching.Watch(here)
    assert [r.step for r in it.look()] == ["30/40", "30/40"] and not it.over()
    finish(here / "ppo-00000000ee.partial")
    it.look()
    assert not it.over() and [r.now.complete for r in it.runs] == [False]


def test_quiet_is_not_dead(store):
    path = store / "plain/base/seed0/ppo-00000000bb.partial"
    for p in (path, *path.iterdir()):
        os.utime(p, (time.time() - 4000,) * 2)
    assert "quiet since" in shown(store) and "1 under way, 1 quiet, 1 complete" in shown(store)
    it = watching.Watch(path)
    it.look()
    assert not it.over()


def test_a_folder_is_renamed_while_it_is_read(store, monkeypatch):
    "Between listing the folders and reading them: nothing is lost, and the next look sees it complete"
    it, path = watching.Watch(store), store / "plain/base/seed0/ppo-00000000bb.partial"
    before = len(it.look()[0].column("kl")[0])
    found = list(watching.folders(store))
    final = finish(path)
    monkeypatch.setattr(watching, "folders", lambda *a: found)
    run = it.look()[0]
    assert len(run.column("kl")[0]) == before and not run.now.complete
    monkeypatch.undo()
    assert it.look()[0].now.complete and it.look()[0].now.path == final


def test_it_is_over_when_nothing_is_about_to_begin(tmp_path, monkeypatch):
    folder = tmp_path / "cpu/plain/only_dots/seed0"
    sft = stage(folder, "sft-00000000aa", [sft_row(1)], {"sft.epochs": 1})
    it, alone = watching.Watch(tmp_path), watching.Watch(sft)
    finish(sft)
    (folder / "sft-00000000aa/manifest.json").write_text(
        json.dumps(dict(finished=time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime())))
    )
    it.look(), alone.look()
    assert alone.over() and not it.over()  # PPO may follow at once
    monkeypatch.setattr(watching, "LASTS", 0.0)
    time.sleep(0.01)
    assert it.over()


def test_an_old_experiment_in_the_same_folder_is_not_mixed_in(store):
    folder = store / "plain/base/seed1"  # complete, by its manifests long ago
    stage(folder, "sft-00000000ee", [sft_row(1)], {"sft.epochs": 3})
    run = next(r for r in watching.Watch(store).look() if r.name == "plain/base/1")
    assert run.now.kind == "sft" and not len(run.column("accuracy")[0]) and len(run.column("loss")[0]) == 1


def test_smoothing_against_a_plain_loop():
    y = np.random.default_rng(0).normal(size=107)
    y[[3, 50, 106]] = np.nan, np.inf, np.nan
    half, expected = len(y) // 25, []
    for i in range(len(y)):
        window = y[max(0, i - half) : i + half + 1]
        expected.append(window[np.isfinite(window)].mean())
    np.testing.assert_allclose(watching.smooth(y), expected)
    assert np.isnan(watching.smooth([np.nan] * 3)).all() and watching.smooth([]).shape == (0,)


def panels(fig):
    return {ax.get_title(loc="left"): ax for ax in fig.axes}


def test_one_run_shows_its_four_habits(store):
    fig = live.curves(watching.Watch(store / "plain/base/seed0").look())
    ax = panels(fig)["habits per completion"]
    assert {line.get_color() for line in ax.lines} == set(COLORS.values())
    assert {t.get_text() for t in ax.texts} == {f"{h.name} {j}" for j, h in enumerate(HABITS)}
    assert (
        fig.texts[0].get_text() == "plain/base/0: ppo 30/40; accuracy 0.29"
    )  # mean of the last two: the window is three wide
    assert "32 rollouts" in fig.texts[1].get_text()


def test_several_runs_have_the_colours_of_their_conditions(store):
    fig = live.curves(watching.Watch(store).look())
    ax = panels(fig)["training accuracy"]
    assert {line.get_color() for line in ax.lines} == {CONDITIONS["base"][1]}
    assert {line.get_color() for line in panels(fig)["loss (nats per token)"].lines} == {
        CONDITIONS["only_backtracking"][1]
    }
    assert live.png(fig)[:4] == b"\x89PNG"
    mean = max(ax.lines, key=lambda line: line.get_linewidth() if len(line.get_xdata()) > 1 else 0)
    assert list(mean.get_xdata()) == list(range(1, 31))  # as far as both seeds have come


def test_numbers_that_are_none(tmp_path):
    rows = [
        ppo_row(i, kl=float("nan"), entropy=None if i == 2 else 0.5, accuracy=float("inf") if i == 3 else 0.0)
        for i in range(1, 6)
    ]
    stage(tmp_path / "plain/base/seed0", "ppo-00000000aa", rows, PPO)
    fig = live.curves(watching.Watch(tmp_path).look())
    assert set(panels(fig)) == {
        "training accuracy",
        "response tokens",
        "habits per completion",
        "entropy (nats per token)",
    }
    assert live.png(fig) and "0.000" in shown(tmp_path)


def test_a_call_of_the_trainer_outside_a_store(tmp_path):
    log = Log(tmp_path / "mine/metrics.jsonl")
    log(**ppo_row(1))
    assert [(r.name, r.step) for r in watching.Watch(tmp_path).look()] == [("mine", "1")]


def test_nothing_to_watch(tmp_path, store):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="holds no run; start one, e.g. stars eval"):
        watching.watch(tmp_path / "empty", once=True)
    with pytest.raises(ValueError, match="nowhere is not there yet"):
        watching.watch(tmp_path / "nowhere", once=True)
    with pytest.raises(ValueError, match="file is neither a folder"):
        watching.watch(tmp_path / "file", once=True)
    with pytest.raises(ValueError, match="no run has begun"):
        watching.watch(store / "shared", once=True)
    with pytest.raises(ValueError, match="every=0"):
        watching.watch(store, every=0)
    with pytest.raises(RuntimeError, match="stars watch"):
        live.follow(store)


def in_terminal(path, during, *more):
    """Run `watch` on a pseudo-terminal, do something once it has begun to show; (exit status, all shown)

    Where the tests run in the background, SIGINT is ignored, and would be in the child.
    """
    code = "; ".join(
        (
            "import signal",
            "signal.signal(signal.SIGINT, signal.default_int_handler)",
            "from stars.show import watching",
            "watching.LASTS = .2",
            f"watching.watch({str(path)!r}, every=.1)",
            "print('the end')",
        )
    )
    main, other = pty.openpty()
    p = subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=other,
        stdout=other,
        stderr=other,
        env=os.environ | dict(COLUMNS="200", TERM="xterm"),
    )
    os.close(other)
    text, end, begun = bytearray(), time.time() + 600, False
    while time.time() < end:
        if select.select([main], [], [], 0.1)[0]:
            try:
                new = os.read(main, 65536)
            except OSError:
                break
            if not new:
                break
            text += new
        if text and not begun:
            begun = True
            threading.Thread(target=during, args=(p, text), daemon=True).start()
    if time.time() > end:
        p.kill()
    return p.wait(), text.decode()


def test_a_terminal_follows_a_run_to_its_end(tmp_path):
    path = stage(tmp_path / "cpu/plain/base/seed0", "ppo-00000000aa", [ppo_row(1)], PPO)

    def train(p, text):
        for i in range(2, 41):
            with (path / "metrics.jsonl").open("a") as f:
                f.write(json.dumps(ppo_row(i)) + "\n")
            while i % 10 == 0 and f"{i}/40".encode() not in text and p.poll() is None:
                time.sleep(0.01)
        finish(path)

    status, text = in_terminal(tmp_path / "cpu", train)
    assert status == 0 and "the end" in text and "40/40" in text and "1 complete" in text
    assert {"10", "20", "30"} <= set(re.findall(r"(\d+)/40", text))  # it was updated in between


def test_ctrl_c_in_a_terminal(store):
    def interrupt(p, text):
        time.sleep(0.3)
        p.send_signal(signal.SIGINT)

    status, text = in_terminal(store / "nowhere", interrupt)
    assert (
        status == 0 and "is not there yet; waiting" in text and "the end" in text and "Traceback" not in text
    )


def executed(path, *sources, during=None):
    """Execute cells in a kernel, with something going on beside some of them

    Returns the notebook, and what was sent to replace an output.
    """
    during = during or {}
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(s) for s in sources])
    replaced = []

    class Client(NotebookClient):
        def process_message(self, msg, cell, cell_index):
            if msg["msg_type"] == "update_display_data":
                alt = msg["content"]["metadata"].get("image/png", {}).get("alt", "")  # of a picture
                replaced.append(msg["content"]["data"] | dict(alt=alt))
            return super().process_message(msg, cell, cell_index)

    client = Client(nb, timeout=600, resources=dict(metadata=dict(path=str(path))))
    with client.setup_kernel(
        env=os.environ | dict(PYTHONPATH=str(Path(live.__file__).parents[2]))
    ):  # as the tests see it
        for i, cell in enumerate(nb.cells):
            if i in during:
                threading.Thread(target=during[i], args=(client, replaced), daemon=True).start()
            client.execute_cell(cell, i)
    return nb, replaced


def test_live_leaves_one_picture_and_no_thread(tmp_path):
    (tmp_path / "rows").write_text("".join(json.dumps(ppo_row(i)) + "\n" for i in range(1, 9)))
    train = """import threading, time
from pathlib import Path
from stars.show import live
shown, show = [], live.Picture.show
live.Picture.show = lambda self, what: (show(self, what), shown.append(what))
live.Picture.pause = lambda self, every: every # however slow this machine is
def until(fits): # training waits, so that what is drawn in between does not depend on the machine
    end = time.time() + 300
    while not any(map(fits, shown)) and time.time() < end: time.sleep(.02)
Path("mine").mkdir()
log, rows = Path("mine/metrics.jsonl"), open("rows").readlines()
try:
    with live.live("mine", every=.05):
        for i in (2, 4, 6):
            log.write_text("".join(rows[:i]))
            until(lambda x: getattr(x, "alt", "").startswith(f"mine: step {i};"))
        with log.open("a") as f: f.write("spoilt\\n")
        until(lambda x: isinstance(x, live.Pretty) and "spoilt" in x.data)
        log.write_text("".join(rows))
        raise KeyError("the training's own error")
except KeyError as e: print(e)"""
    nb, replaced = executed(
        tmp_path, train, "print([t.name for t in threading.enumerate() if '_redraw' in t.name])"
    )
    first, second = (c.outputs for c in nb.cells)
    (picture,) = [o for o in first if o.output_type == "display_data"]
    assert picture.metadata["image/png"]["alt"] == "mine: step 8; accuracy 0.08"
    assert sum("image/png" in r for r in replaced) >= 3
    assert any(
        "not drawn at" in r.get("text/plain", "") and "metrics.jsonl:7 is not JSON" in r["text/plain"]
        for r in replaced
    )  # told, and training went on
    assert "the training's own error" in "".join(o.get("text", "") for o in first)
    assert second[0].text == "[]\n"


def test_follow_ends_with_the_run_or_an_interrupt(store):
    path = store / "rich/base/seed0/ppo-00000000aa.partial"

    def until(seen):
        end = time.time() + 300
        while not seen() and time.time() < end:
            time.sleep(0.02)

    def train(client, replaced):
        until(lambda: client.nb.cells[1].outputs)
        stage(path.parent, "ppo-00000000aa", [ppo_row(1)], PPO)
        for i in range(2, 41):
            with (path / "metrics.jsonl").open("a") as f:
                f.write(json.dumps(ppo_row(i)) + "\n")
            if i in (10, 20):
                until(lambda step=f"ppo {i}/40": any(step in r["alt"] for r in replaced))
        finish(path)

    def interrupt(client, replaced):
        until(lambda: client.nb.cells[2].outputs)
        os.kill(client.km.provisioner.pid, signal.SIGINT)

    nb, replaced = executed(
        store,
        "from stars.show import live, watching; watching.LASTS = .1",
        "live.follow('rich', every=.05)",
        "live.follow('plain', every=.1)",
        during={1: train, 2: interrupt},
    )
    (whole,), (cut,) = (c.outputs for c in nb.cells[1:])
    assert whole.metadata["image/png"]["alt"] == "rich/base/0: ppo 40/40; accuracy 0.40"
    assert sum("image/png" in r for r in replaced) >= 2
    assert "2 under way, 1 complete" in cut.metadata["image/png"]["alt"]

"Progress of a command: which stage, how far, how long still; made-up logs, a clock that is turned by hand"

import io
import json
import os
import threading

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from stars.lab import progress as pr
from stars.lab.configs import preset
from stars.lab.stages import Job

CFG = preset(
    "cpu", ppo=dict(steps=20, save_every=10), priming=dict(rows=320), sft=dict(batch_size=32, epochs=2)
)  # 20 updates, 3 checkpoints
START = 1.5e9  # when a stage is begun


@pytest.fixture
def job(tmp_path):
    return lambda condition="base", seed=0: Job(CFG, "plain", condition, seed, str(tmp_path))


def sft_rows(n):
    return [dict(step=i, epoch=(i - 1) // 10, loss=1.0) for i in range(1, n + 1)]


def ppo_rows(n, seconds=3.0):
    return [
        dict(step=i, accuracy=0.1, response_tokens=9, s_sample=seconds - 1, s_update=1.0)
        for i in range(1, n + 1)
    ]


def settings(job, kind):
    of = dict(sft=("sft", "lora"), ppo=("ppo", "lora"), eval=("eval",), prime=("priming", "world.template"))[
        kind
    ]
    return (
        dict(seed=job.seed)
        | (dict(condition=job.condition) if kind == "prime" else {})
        | job.cfg.settings(*of)
    )


def write(job, kind, rows=(), begun=START, at=None, files=0, key="0123456789", **changed):
    "Leave what a stage that is under way would, with times of one's own"
    folder = job.dir / f"{kind}-{key}.partial"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(settings(job, kind) | changed))
    if rows:
        (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    for i in range(files):
        (folder / f"completions-step-{i:04d}.parquet").touch()
    for p in (folder / "config.json", *folder.glob("completions*")):
        os.utime(p, (begun,) * 2)
    if rows:
        os.utime(folder / "metrics.jsonl", (at or begun,) * 2)
    os.utime(folder, (at or begun,) * 2)
    return folder


def end(folder, seconds, finished="2000-01-01T00:00:00+00:00"):
    "Complete it; it says itself how long it took"
    (folder / "manifest.json").write_text(json.dumps(dict(finished=finished, seconds_last_session=seconds)))
    folder.rename(folder.with_suffix(""))


def test_nothing_is_said_before_something_is_measured(job):
    it = pr.Progress([job(), job("empty_cot")])
    assert it.left() == (None, True) and it.text() == "jobs 0/2 · time left: measuring"
    write(job(), "ppo")
    it.busy = [job()]
    it.look()
    assert it.text() == "jobs 0/2 · plain/base/0 ppo 0/20 · time left: measuring"


def test_steps_of_ppo_are_measured_by_their_phases(job):
    it = pr.Progress([job()])
    it.busy = [job()]
    end(
        write(job(), "ppo", ppo_rows(20)), 60.0
    )  # three seconds a step: checkpoints are guessed by their ratio
    it.look()
    seconds, rough = it.left()
    assert rough and seconds == pytest.approx(3 * 3.0 * pr.RATIO["eval"] / pr.RATIO["ppo"])
    write(job(), "eval", begun=START, at=START + 8, files=2)
    it.look()
    assert it.left() == (4.0, False) and it.text() == "jobs 0/1 · plain/base/0 eval 2/3 · 4 s left"


def test_updates_of_sft_are_measured_by_the_time_between_looks(job):
    one, it = job("dots"), pr.Progress([job("dots")])
    write(one, "prime")
    end(one.dir / "prime-0123456789.partial", 1.0)
    write(one, "sft", sft_rows(4), at=START + 100)  # loading took long, and is no pace
    it.look()
    assert it.left() == (None, True)
    write(one, "sft", sft_rows(8), at=START + 102)
    it.look()
    chain = it.chains[one]
    assert pr.pace(chain, "sft", pr.paces([chain])) == (0.5, False) and str(chain) == "plain/dots/0 sft 8/20"
    assert pr.chain_left(chain, ["sft"], pr.paces([chain])) == (6.0, False)


def test_what_an_earlier_session_did_is_not_speed(job):
    "Nor are its phases, nor the pause since then"
    write(job(), "ppo", ppo_rows(12, seconds=90.0))
    one = job("dots")
    write(one, "prime")
    end(one.dir / "prime-0123456789.partial", 1.0)
    write(one, "sft", sft_rows(10), at=START + 5)
    it = pr.Progress([job(), one])
    assert it.left() == (None, True)
    write(job(), "ppo", ppo_rows(12, seconds=90.0) + ppo_rows(13, seconds=2.0)[12:])
    write(one, "sft", sft_rows(8), begun=START + 9_000, at=START + 9_001)  # from the last saved state
    it.look()
    write(one, "sft", sft_rows(10), begun=START + 9_000, at=START + 9_005)
    it.look()
    assert [(p.kind, p.seconds) for p in pr.paces(list(it.chains.values()))] == [("ppo", 2.0), ("sft", 2.0)]
    end(one.dir / "sft-0123456789.partial", 24.0)  # of 12 updates: the other 8 are of the session before
    it.look()
    assert pr.measured(it.chains[one].stages["sft"]) == 24 / 2


def test_the_pause_before_a_run_goes_on_is_not_slowness(job):
    one = job("dots")
    write(one, "prime")
    end(one.dir / "prime-0123456789.partial", 1.0)
    write(one, "sft", sft_rows(10), at=START + 5)
    it = pr.Progress([one])
    for n, at in (10, 9_001), (12, 9_005):
        write(one, "sft", sft_rows(n), begun=START + 9_000, at=START + at)
        it.look()
    assert pr.measured(it.chains[one].stages["sft"]) == 2.0


def test_another_condition_lends_its_pace(job):
    "In the ratio of the conditions, and the own pace counts as soon as there is one"
    base, cot = job(), job("empty_cot")
    write(base, "ppo", ppo_rows(2, 4.0))
    it = pr.Progress([base, cot])
    write(base, "ppo", ppo_rows(4, 4.0))
    it.look()
    known = pr.paces(list(it.chains.values()))
    assert (
        pr.pace(it.chains[cot], "ppo", known)
        == (4.0 * pr.weight(cot) / pr.weight(base), False)
        == (2.0, False)
    )
    assert (
        pr.pace(pr.Chain(job("dots")), "ppo", known)
        == (4.0 * pr.weight(job("dots")) / pr.weight(base), False)
        == (6.0, False)
    )
    write(cot, "prime")
    end(cot.dir / "prime-0123456789.partial", 1.0)
    write(cot, "sft", sft_rows(20))
    end(cot.dir / "sft-0123456789.partial", 1.0)
    write(cot, "ppo", ppo_rows(1, 7.0))
    it.look()
    assert pr.pace(it.chains[cot], "ppo", pr.paces(list(it.chains.values()))) == (7.0, False)


def test_jobs_that_have_ended_have_nothing_left(job):
    jobs = [job(seed=s) for s in range(3)]
    it = pr.Progress(jobs)
    it.busy = jobs[:2]
    for j in jobs[:2]:
        write(j, "ppo", ppo_rows(10))
    it.look()
    before, _ = it.left()
    it.end(jobs[0])
    assert it.text().startswith("jobs 1/3 · plain/base/1 ppo 10/20 · ")
    assert it.left()[0] < before and it.busy == [jobs[1]]
    for j in jobs[1:]:
        it.end(j)
    assert it.left() == (0.0, False) and it.text().startswith("jobs 3/3 · took ")


def test_workers_share_what_is_left(job):
    jobs = [job(seed=s) for s in range(3)]
    it = pr.Progress(jobs)
    for j in jobs:
        end(write(j, "ppo", ppo_rows(20)), 60.0)
        write(j, "eval", at=START + 10, files=1)  # ten seconds a checkpoint, two left
    it.look()
    assert it.left() == (60.0, False)
    it.workers = 2
    assert it.left() == (40.0, False)
    it.workers = 3
    assert it.left() == (20.0, False)


def test_what_is_complete_at_the_beginning_counts_as_done(job):
    end(write(job(), "ppo", ppo_rows(20)), 60.0)
    end(write(job(), "eval", files=3), 9.0)
    it = pr.Progress([job(), job(seed=1)])
    assert it.text() == "jobs 1/2 · time left: measuring"  # an earlier session's pace is none of this one


def test_a_log_is_cut_short(job):
    it = pr.Progress([job()])
    folder = write(job(), "ppo", ppo_rows(3))
    with (folder / "metrics.jsonl").open("a") as f:
        f.write('{"step": 4, "accu')
    it.look()
    assert str(it.chains[job()]) == "plain/base/0 ppo 3/20" and it.left()[0] > 0
    (folder / "metrics.jsonl").write_text("not JSON\n")
    it.look()  # an error in it stops nothing
    assert str(it.chains[job()]) == "plain/base/0 ppo 3/20"


def test_other_settings_and_older_stages_are_not_the_jobs(job):
    one = job("dots")
    end(write(one, "ppo", ppo_rows(20)), 60.0)  # after other priming, long ago
    write(one, "prime")
    end(one.dir / "prime-0123456789.partial", 1.0, "2020-01-01T00:00:00+00:00")
    write(one, "sft", sft_rows(20))
    end(one.dir / "sft-0123456789.partial", 1.0, "2020-01-02T00:00:00+00:00")
    write(one, "ppo", ppo_rows(5), begun=2e9, key="aaaaaaaaaa", ppo=dict(lr=0.5))
    it = pr.Progress([one])
    assert str(it.chains[one]) == "plain/dots/0 ppo 0/20"
    write(one, "ppo", ppo_rows(5), begun=2e9, key="bbbbbbbbbb")
    it.look()
    assert str(it.chains[one]) == "plain/dots/0 ppo 5/20"


def test_rows_of_continued_pretraining_are_known_once_they_lie_there(job):
    one = job("curated")
    guess = pr.units(one, "sft")
    folder = write(one, "prime")
    (folder / "config.json").write_text(json.dumps(dict(seed=0, condition="curated")))
    pq.write_table(pa.table(dict(query=["a"] * 70)), folder / "train.parquet")
    end(folder, 1.0)
    it = pr.Progress([one])
    batch, epochs = CFG.cpt.batch_size, CFG.cpt.epochs
    assert it.chains[one].steps("sft") == -(-70 // batch) * epochs != guess > 0


def test_bases_are_trained_once_and_first(job):
    jobs = [job(), job(seed=1)]
    it, n = pr.Progress(jobs, jobs), pr.units(jobs[0], "base")
    folder = jobs[0].model_dir / "base-0123456789.partial"
    folder.mkdir(parents=True)
    cfg = CFG.settings("base", "world.top", "world.template")
    cfg["base"] |= dict(share=0.0, mix="")
    (folder / "config.json").write_text(json.dumps(cfg))
    os.utime(folder / "config.json", (START,) * 2)
    for steps in (1, 3):
        (folder / "metrics.jsonl").write_text(
            "".join(json.dumps(r | dict(epoch=0)) + "\n" for r in sft_rows(steps))
        )
        os.utime(folder / "metrics.jsonl", (START + 10 * steps,) * 2)
        it.busy = [jobs[0]]
        it.look()
    assert str(it.chains[jobs[0]]) == f"plain base 3/{n}"
    known = pr.paces(list(it.chains.values()))
    each = [pr.chain_left(c, ["ppo", "eval"], known)[0] for c in it.chains.values()]
    assert it.left() == (pytest.approx(10.0 * (n - 3) + sum(each)), True)


def test_a_narrow_terminal_keeps_the_time():
    running = ["plain/base/0 ppo 1/20", "plain/dots/0 sft 2/20"]
    assert (
        pr.line("jobs 0/4", running, "3 min left", 200)
        == "jobs 0/4 · plain/base/0 ppo 1/20 · plain/dots/0 sft 2/20 · 3 min left"
    )
    assert (
        pr.line("jobs 0/4", running, "3 min left", 50) == "jobs 0/4 · plain/base/0 ppo 1/20 · … · 3 min left"
    )
    assert pr.line("jobs 0/4", running, "3 min left", 30) == "jobs 0/4 · … · 3 min left"


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_log_gets_a_line_now_and_then_and_a_terminal_one_that_is_replaced():
    now, file = [0.0], io.StringIO()
    out = pr.Line(file, every=30.0, clock=lambda: now[0])
    for second, text, state in [
        (0, "a 1", 0),
        (1, "a 2", 0),
        (2, "b 1", 1),
        (3, "b 2", 1),
        (31, "b 3", 1),
        (32, "b 4", 1),
        (90, "b 4", 1),
        (91, "c 1", 2),
    ]:
        now[0] = float(second)
        out(text, state)
    out.close()
    assert file.getvalue() == "a 1\nb 1\nb 4\nc 1\n" and out.width is None
    screen = Terminal()
    out = pr.Line(screen)
    for text in ("one", "two"):
        out(text, 0)
    out.close()
    assert (
        "\rone" in screen.getvalue()
        and "\rtwo" in screen.getvalue()
        and screen.getvalue().count("\n") <= 1
        and out.width > 0
    )


def test_the_line_is_said_while_the_block_runs_and_errors_pass(job, monkeypatch):
    it, file, said = pr.Progress([job()]), io.StringIO(), threading.Event()

    class Noted(pr.Line):
        def __call__(self, text, state):
            super().__call__(text, state)
            said.set()

    with pytest.raises(KeyError, match="mine"), pr.shown(it, Noted(file), every=0.01):
        it.busy = [job()]
        assert said.wait(20)
        raise KeyError("mine")
    assert file.getvalue().endswith("jobs 0/1 · plain/base/0 ppo 0/20 · time left: measuring\n")
    assert not [t for t in threading.enumerate() if t.name == "progress"]
    monkeypatch.setattr(it, "look", lambda: 1 / 0)
    with pr.shown(it, pr.Line(file), every=0.01):
        pass  # what goes wrong in looking stops nothing


def test_where_nothing_is_to_be_built_nothing_is_said(job):
    it, file = pr.Progress([]), io.StringIO()
    with pr.shown(it, pr.Line(file)):
        pass
    assert file.getvalue() == ""

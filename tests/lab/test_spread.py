"A job that spreads evaluates on its devices: booked, side by side, the same answers (Ray's pretended GPUs)"

import os
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import ray
import tiny

from stars.lab import experiments as ex
from stars.lab.configs import changed
from stars.models.parallel import on_devices

TINY = {"base.docs": 300, "priming.rows": 60, "data.eval": 10, "ppo.steps": 3, "ppo.save_every": 1}


@pytest.fixture(scope="module")
def cards():
    with tiny.ray_with(gpus=2):
        ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
        yield


def meet(folder, name, others):
    "Say which card is mine, and wait until the others are there, too"
    (Path(folder) / name).touch()
    end = time.time() + 60
    while not all((Path(folder) / other).exists() for other in others):
        assert time.time() < end, "the pieces do not run side by side"
        time.sleep(0.05)
    return ray.get_gpu_ids()


def die_once(folder):
    if not (mark := Path(folder) / "died").exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return "alive"


def refuse(what):
    raise ValueError(f"{what}=3 must be at least 4")


def die(folder):
    os.kill(os.getpid(), signal.SIGKILL)


def test_pieces_run_side_by_side_each_on_a_card_of_its_own(cards, tmp_path):
    cards_of = list(on_devices(meet, [(str(tmp_path), name, "ab") for name in "ab"]))
    assert sorted(map(tuple, cards_of)) in ([(0,), (1,)], [("0",), ("1",)])


def test_every_piece_has_a_process_of_its_own(cards):
    "One that is used again has CUDA on its first card, whatever it books"
    assert len(set(on_devices(os.getpid, [()] * 4))) == 4


def test_micro_models_share_a_card_that_is_large_enough(monkeypatch):
    def share(gib, model="plain", **run):
        jobs = ex.grid(changed(ex.preset("gpu"), run=run), [model], ["base"], [0, 1])
        return ex.gpu_share(jobs, gib * 2**30)

    assert [share(gib) for gib in (140, 80, 36, 16)] == [0.25, 0.25, 0.5, 1.0]
    assert share(80, "smollm2") == share(80, engine="vllm") == share(80, workers=2) == 1.0


def test_a_piece_whose_process_dies_is_repeated_and_one_that_raises_is_not(cards, tmp_path):
    assert list(on_devices(die_once, [(str(tmp_path),)], restarts=1)) == ["alive"]
    with pytest.raises(ValueError, match="^steps=3 must be at least 4$"):
        list(on_devices(refuse, [("steps",)]))
    with pytest.raises(RuntimeError, match="a process died 1 times"):
        list(on_devices(die, [(str(tmp_path),)], restarts=0))


def test_checkpoints_are_asked_on_all_cards_and_answer_as_they_do_alone(cards, tmp_path, monkeypatch):
    cfg = ex.preset("smoke", **TINY)
    alone = ex.Job(cfg, "plain", "base", 0, str(tmp_path / "runs"), progress=False)
    run = ex.ppo_stage(alone)
    checkpoints = sorted(run.glob("step-*"))
    assert len(checkpoints) == 4
    spread = replace(alone, cfg=changed(cfg, run=dict(workers=2)))
    assert spread.cfg.run.spreads
    handed = []

    def watched(fn, pieces, restarts):
        handed.extend(pieces)
        return on_devices(fn, pieces, restarts)

    monkeypatch.setattr(ex, "on_devices", watched)
    there = ex.eval_stage(spread)
    assert [[c.name for c in left] for _, left, _ in handed] == [
        ["step-0000", "step-0002"],
        ["step-0001", "step-0003"],
    ]
    assert not any(job.cfg.run.spreads for job, _, _ in handed)
    questions = ex.Questions(ex.from_parquet(ex.data_stage(alone) / "eval.parquet"), cfg.eval.samples)
    ex.ask(alone, checkpoints, [questions], tmp_path)
    for checkpoint in checkpoints:
        file = questions.file(checkpoint)
        pd.testing.assert_frame_equal(pd.read_parquet(there / file), pd.read_parquet(tmp_path / file))


def test_only_what_is_missing_is_asked_again(cards, tmp_path, monkeypatch):
    cfg = changed(ex.preset("smoke", **TINY), run=dict(workers=2))
    job = ex.Job(cfg, "plain", "base", 0, str(tmp_path), progress=False)
    asked = []

    def remember(fn, pieces, restarts):
        asked.extend(path.name for _, left, _ in pieces for path in left)
        return iter(())

    monkeypatch.setattr(ex, "on_devices", remember)
    monkeypatch.setattr(ex, "load_tokenizer", lambda path: ex.micro_tokenizer())
    questions = ex.Questions([], 1)
    for done in ("completions-step-0000.parquet", "completions-step-0002.parquet"):
        (tmp_path / done).touch()
    ex.ask(job, [Path(f"step-000{k}") for k in range(4)], [questions], tmp_path)
    assert sorted(asked) == ["step-0001", "step-0003"]

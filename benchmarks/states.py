"""How long training stands still while a state is saved, of one process and of a team of two (FSDP2).

As it was: all write, then the first worker hashes all files, flushes and names them. As it is: all write, and
each hashes and flushes its own files in a thread. The two take turns; the best of five, for a disk that
others use as well has moods.
"""

import argparse
import multiprocessing
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist
from common.report import report
from torch import nn

from stars.models.parallel import UNNAMED, States, Team, name_state, sealed, state_tensors, write_state


def wait_for_all(states: States, step: int):
    "A state as it was saved once: named before training goes on"
    out, team = states.out, states.team
    tensors = state_tensors(states.modules, states.optimizers)
    write_state(out, tensors, dict(step=step), team)
    with team.as_one():
        if team.first:
            names = sorted(f.name for f in (out / UNNAMED).iterdir())
            name_state(out, step, sealed(out / UNNAMED, names))


def model(mb: int) -> nn.Module:
    "A model of eight layers whose weights and moments take some MB in all"
    width = round((mb * 1e6 / (3 * 4 * 8)) ** 0.5)
    return nn.Sequential(nn.ModuleList(nn.Linear(width, width) for _ in range(8)))


def measure(rank: int, workers: int, folder: Path, mb: int, runs: int) -> list[list[float]]:  # seconds
    "Of each run: as it was; until training goes on; until the state has its name"
    torch.set_num_threads(1)
    if workers > 1:
        dist.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=workers)
    team, net = Team.join(shard=True), model(mb)
    team.wrap(net)
    optimizer = torch.optim.AdamW(net.parameters())
    for p in net.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    rows = []
    with States(folder, dict(net=net), dict(net=optimizer), team) as states:
        for i in range(runs):
            team.wait()
            times = [time.perf_counter()]
            wait_for_all(states, 2 * i)
            times.append(time.perf_counter())
            states.save(2 * i + 1, {})
            times.append(time.perf_counter())
            states.settle()
            times.append(time.perf_counter())
            rows.append([times[1] - times[0], times[2] - times[1], times[3] - times[1]])
    return rows


def team_of(workers: int, mb: int, runs: int, disk: str | None) -> list[list[float]]:
    with tempfile.TemporaryDirectory(dir=disk) as d:
        how = [(r, workers, Path(d), mb, runs) for r in range(workers)]
        with multiprocessing.get_context("spawn").Pool(workers) as pool:
            return pool.starmap(measure, how, chunksize=1)[0]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--mb", type=int, default=500, help="size of a state")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--disk", help="folder on the disk to measure (default: the temporary one)")
    parser.add_argument("--out", help="file to append the table to")
    args = parser.parse_args()
    rows = []
    for workers in (1, 2):
        best = map(min, zip(*team_of(workers, args.mb, args.runs, args.disk)))
        rows.append([workers, *(f"{s:.2f}" for s in best)])
    head = ["workers", "training waits, as it was, s", "training waits, s", "until it has its name, s"]
    report(f"Saving a state of {args.mb} MB", head, rows, args.out)


if __name__ == "__main__":
    main()

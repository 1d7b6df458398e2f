"""What every speed comparison says about itself: the machine, the versions, the command, and a table."""

import contextlib
import os
import platform
import shlex
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from stars.util.workers import cores


def machine() -> str:
    "CPU, cores this process may use, load, GPU"
    info = Path("/proc/cpuinfo")
    names = (
        [
            line.split(":", 1)[1].strip()
            for line in info.read_text().splitlines()
            if line.startswith("model name")
        ]
        if info.exists()
        else []
    )
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return (
        f"{names[0] if names else platform.processor() or platform.machine()}, {cores():g} cores (load "
        f"{os.getloadavg()[0]:.1f}), {torch.get_num_threads()} threads, GPU: {', '.join(gpus) or 'none'}"
    )


def versions(*packages: str) -> str:
    "Installed versions, those that are there"
    found = [f"python {platform.python_version()}"]
    for p in packages:
        with contextlib.suppress(PackageNotFoundError):
            found.append(f"{p} {version(p)}")
    return " · ".join(found)


def number(cell: str) -> bool:
    return cell == "–" or cell.replace(",", "").replace(".", "").removeprefix("-").isdigit()


def table(
    head: Sequence[str],  # column titles
    rows: Sequence[Sequence],  # cells; text goes left, numbers (as text, too) right
) -> str:  # markdown
    "A markdown table that also reads well on a terminal"
    cells = [list(map(str, r)) for r in (head, *rows)]
    width = [max(len(r[i]) for r in cells) for i in range(len(head))]
    right = [all(number(r[i]) for r in cells[1:]) for i in range(len(head))]

    def line(r):
        return "| " + " | ".join(c.rjust(w) if x else c.ljust(w) for c, w, x in zip(r, width, right)) + " |"

    return "\n".join(
        [
            line(cells[0]),
            "|" + "|".join("-" * (w + 1) + (":" if x else "-") for w, x in zip(width, right)) + "|",
            *map(line, cells[1:]),
        ]
    )


def report(
    title: str,  # one message
    head: Sequence[str],
    rows: Sequence[Sequence],
    out: str | None = None,  # file to append to
    notes: Sequence[str] = (),  # lines below the table
    packages: Sequence[str] = ("torch", "transformers"),  # whose versions matter
):
    "Print a table, and append it to a file with all that is needed to judge it"
    text = table(head, rows) + "".join(f"\n\n{n}" for n in notes)
    print(f"\n{title}\n\n{text}\n", flush=True)
    if not out:
        return
    path = Path(out)
    path.parent.mkdir(parents=True, exist_ok=True)
    words = [Path(sys.argv[0]).name, *sys.argv[1:]]
    if "--out" in words:
        del words[(i := words.index("--out")) : i + 2]
    with path.open("a") as f:
        f.write(
            f"## {title}\n\n{datetime.now(UTC):%Y-%m-%d} · `python "
            f"benchmarks/{shlex.join(words)}`\n\n{machine()} · {versions(*packages)}\n\n{text}\n\n"
        )

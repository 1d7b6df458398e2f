"""How long a reader waits before anything happens: import of each part, `--help` and `--dry-run` of each
command.

Seconds and peak memory of a fresh process, best of three. `--write` puts the table into
benchmarks/results/startup.md.
"""

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

from common.report import machine

ROOT = Path(__file__).resolve().parent.parent
PARTS = ("util", "task", "llm", "habits", "models", "rl", "text", "lab", "show", "cli")
COMMANDS = tuple(
    [
        "data",
        "prime",
        "sft",
        "ppo",
        "eval",
        "judge",
        "label",
        "curate",
        "ledger",
        "figure",
        "reproduce",
        "sweep",
        "plan",
        "verl",
        "inspect",
        "watch",
    ]
)
JUDGE = "judge nbs/data/judged.parquet --judge openai:gpt-5.4-mini --dry-run"
PRIME = (
    "prime out.parquet --teacher anthropic:claude-haiku-4-5 --mix backtracking_verification --n 20 --dry-run"
)


def measured(code: str, runs: int = 3) -> tuple[float, float]:
    "Seconds and MB of a fresh Python that runs this"
    best = []
    for _ in range(runs):
        start = time.perf_counter()
        child = subprocess.Popen(
            [sys.executable, "-c", code], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, cwd=ROOT
        )
        said = child.stderr.read()
        _, status, usage = os.wait4(child.pid, 0)
        if status:
            raise RuntimeError(f"{code!r} failed: {said.decode()[-500:]}")
        best.append((time.perf_counter() - start, usage.ru_maxrss / 1024))
    return min(best)


def of_part(part: str) -> str:
    "Code that imports every chapter of a part"
    names = sorted(p.stem for p in (ROOT / "stars" / part).glob("[a-z]*.py"))
    return "; ".join(f"import stars.{part}.{name}" for name in names)


def of_command(line: str) -> str:
    "Code that runs the command line"
    return f"import sys; sys.argv = {['stars', *line.split()]!r}; from stars.cli.main import main; main()"


def rows():
    yield "python alone", measured("pass")
    for part in PARTS:
        yield f"import stars.{part}.*", measured(of_part(part))
    yield "stars --help", measured(of_command("--help"))
    for command in COMMANDS:
        yield f"stars {command} --help", measured(of_command(f"{command} --help"))
    for line in (JUDGE, PRIME):
        yield f"stars {line.split()[0]} … --dry-run", measured(of_command(line))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--write", action="store_true", help="into benchmarks/results/startup.md")
    args = parser.parse_args()
    lines = ["# Starting", "", machine(), "", "| what | seconds | MB |", "|---|---|---|"]
    for what, (seconds, mb) in rows():
        lines.append(f"| `{what}` | {seconds:.2f} | {mb:.0f} |")
        print(lines[-1], flush=True)
    if args.write:
        (ROOT / "benchmarks" / "results" / "startup.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()

"""How long a reader waits before anything happens: import of each part, `--help` and `--dry-run` of each
command.

Seconds by the clock, seconds of CPU (which a busy machine does not lengthen) and peak memory of a fresh
process, the best of three. `--write` puts the table into
benchmarks/results/startup.md.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

from common.report import machine

ROOT = Path(__file__).resolve().parent.parent
PARTS = ("util", "task", "llm", "habits", "models", "rl", "text", "measure", "lab", "show", "cli")
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


# A process of its own starts and measures the command: this one is large, and what it forks counts as large.
LAUNCHER = """
import json, resource, subprocess, sys, time
start = time.perf_counter()
done = subprocess.run([sys.executable, "-c", sys.argv[1]], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
seconds, usage = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
if done.returncode:
    sys.exit(done.stderr.decode()[-500:])
print(json.dumps([seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024]))
"""


def measured(code: str, runs: int = 3) -> list[float]:
    "Seconds, CPU seconds and MB of a fresh Python that runs this"
    command = [sys.executable, "-c", LAUNCHER, code]
    done = [subprocess.run(command, cwd=ROOT, check=True, capture_output=True) for _ in range(runs)]
    return min(json.loads(d.stdout) for d in done)


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
    lines = ["# Starting", "", machine(), "", "| what | seconds | of CPU | MB |", "|---|---|---|---|"]
    for what, (seconds, cpu, mb) in rows():
        lines.append(f"| `{what}` | {seconds:.2f} | {cpu:.2f} | {mb:.0f} |")
        print(lines[-1], flush=True)
    if args.write:
        (ROOT / "benchmarks" / "results" / "startup.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()

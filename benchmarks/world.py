"""Problems, verifier and detectors against what else there is, side by side on one core.

Generation is measured in the published RL distribution (3-4 numbers 1-99, targets 10-99), exactly solvable
and de-duplicated. reasoning-gym is installed into an environment of its own (.bench/) on the first run.
Give --quick for a tenth of the work.
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
import venv
from pathlib import Path

import numpy as np

from stars.habits.behaviors import find_behaviors
from stars.habits.priming import priming_rows
from stars.task.countdown import explain, score, solve
from stars.task.datasets import write_problems
from stars.task.problems import SPACES, Space, Stream, difficulty_many, sample_problems, solvable_many

ROOT = Path(__file__).parent.parent
GYM = """
import json, sys, time
import reasoning_gym
n = int(sys.argv[1])
data = reasoning_gym.create_dataset('countdown', seed=0, size=10**6, min_numbers=3, max_numbers=4,
    min_value=1, max_value=99, min_target=10, max_target=99)
start = time.perf_counter(); rows = [data[i] for i in range(n)]; made = n/(time.perf_counter()-start)
start = time.perf_counter()
for r in rows: assert data.score_answer(r['answer'], r)==1
print(json.dumps(dict(made=made, scored=n/(time.perf_counter()-start))))
"""


def rate(f, n):  # f does n things
    f()
    start = time.perf_counter()
    f()
    return n / (time.perf_counter() - start)


def row(what, per_second, base=None, unit="/s"):
    print(f"  {what:58} {per_second:12,.0f} {unit}" + (f"   x{per_second / base:.2f}" if base else ""))


def gym(n):
    python = ROOT / ".bench" / "reasoning-gym" / "bin" / "python"
    if not python.exists():
        venv.create(python.parent.parent, with_pip=True)
        subprocess.run([python, "-m", "pip", "install", "-q", "reasoning-gym"], check=True)
    return json.loads(
        subprocess.run(
            [python, "-c", GYM, str(n)], capture_output=True, text=True, check=True
        ).stdout.splitlines()[-1]
    )


def compiled():
    "Depth-first search in numba, the other way to be fast: draws one core's worth of problems of one count"
    import numba

    @numba.njit
    def makes(x, n, t):
        if n == 2:
            a, b = x[0], x[1]
            return (
                a + b == t
                or a * b == t
                or a - b == t
                or b - a == t
                or (b != 0 and b * t == a)
                or (a != 0 and a * t == b)
            )
        y = np.empty(n - 1, np.int64)
        for i in range(n):
            for j in range(i + 1, n):
                m = 0
                for k in range(n):
                    if k != i and k != j:
                        y[m] = x[k]
                        m += 1
                a, b = x[i], x[j]
                y[m] = a + b
                if makes(y, n - 1, t):
                    return True
                y[m] = a * b
                if makes(y, n - 1, t):
                    return True
                y[m] = abs(a - b)
                if makes(y, n - 1, t):
                    return True
                if b != 0 and a % b == 0:
                    y[m] = a // b
                    if makes(y, n - 1, t):
                        return True
                if a != 0 and b % a == 0:
                    y[m] = b // a
                    if makes(y, n - 1, t):
                        return True
        return False

    @numba.njit
    def many(X, T):
        out = np.empty(len(T), np.bool_)
        for i in range(len(T)):
            out[i] = makes(X[i], X.shape[1], T[i])
        return out

    return many


def bare_eval(response, numbers, target):
    "The kind of scorer this one replaces: a regular expression, then Python's own eval; for timing only"
    import re

    found = list(re.finditer(r"<answer>(.*?)</answer>", response))
    if not found:
        return 0
    text = found[-1].group(1).strip()
    if sorted(int(n) for n in re.findall(r"\d+", text)) != sorted(numbers) or not re.match(
        r"^[\d+\-*/().\s]+$", text
    ):
        return 0.1
    try:
        return 1.0 if abs(eval(text, {"__builtins__": None}, {}) - target) < 1e-5 else 0.1
    except Exception:
        return 0.1


def peak(path, n):
    "MB that one process needs at most to draw, measure and write `n` problems"
    code = (
        "import sys; from stars.task.datasets import *; from stars.task.problems import SPACES; "
        "write_problems(sys.argv[1], int(sys.argv[2]), 0, SPACES['rl'], workers=1, progress=False); "
        "print([int(l.split()[1])/1024 for l in open('/proc/self/status') if l.startswith('VmHWM')][0])"
    )  # ru_maxrss would include the parent's
    return float(
        subprocess.run(
            [sys.executable, "-c", code, path, str(n)], capture_output=True, text=True, check=True, cwd=ROOT
        ).stdout
    )


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--quick", action="store_true")
    ap.add_argument("--no-gym", action="store_true")
    a = ap.parse_args()
    n = 8_000 if a.quick else 80_000
    other = None if a.no_gym else gym(100 if a.quick else 600)

    print("checking solvability, random draws, one core")
    many, rng = compiled(), np.random.default_rng(0)
    for k in (3, 4, 5):
        m = n // (1 if k < 5 else 40)
        X, T = rng.integers(1, 100, (k, m)), rng.integers(10, 100, m)
        assert (many(np.ascontiguousarray(X.T), T) == solvable_many(X, T)).all()
        base = rate(lambda: many(np.ascontiguousarray(X.T), T), m)
        row(f"{k} numbers, numba, depth-first", base, base)
        row(f"{k} numbers, NumPy, columns from both ends", rate(lambda: solvable_many(X, T), m), base)
    print("generation, one core")
    base = other and other["made"]
    if other:
        row("reasoning-gym (own environment)", base, base)
    space = SPACES["rl"]

    def drawn(k):  # blocks until k problems are there
        stream, got = Stream(space, 0), 0
        while got < k:
            got += sum(len(t) for _, _, t in stream.draw())
        return got

    got = drawn(n)
    row("stars, drawn", rate(lambda: drawn(n), got), base)
    ps = sample_problems(n // 4, 0, **{f: getattr(space, f) for f in ("max_number", "max_target")})
    by_k = {
        k: (
            np.array([p.numbers for p in ps if len(p.numbers) == k]).T,
            np.array([p.target for p in ps if len(p.numbers) == k]),
        )
        for k in (3, 4)
    }
    row(
        "their difficulty measured", rate(lambda: [difficulty_many(*v) for v in by_k.values()], len(ps)), None
    )
    with tempfile.TemporaryDirectory() as d:
        start = time.perf_counter()
        write_problems(f"{d}/one.parquet", n, 0, space, workers=1, progress=False)
        row("stars, drawn, measured and written", n / (time.perf_counter() - start), base)
        print("the published size, all cores")
        sizes = (("train", 32_768 if a.quick else 327_680), ("eval", 1_024))
        start = time.perf_counter()
        for split, m in sizes:
            write_problems(
                f"{d}/{split}.parquet", m, 0, Space(max_number=99, max_target=99, split=split), progress=False
            )
        print(f"  {sizes[0][1]:,} + 1,024 problems in {time.perf_counter() - start:.1f} s")
        for m in (n // 4, n, 4 * n) if Path("/proc/self/status").exists() else ():
            print(f"  peak memory of a process that writes {m:,}: {peak(f'{d}/{m}.parquet', m):.0f} MB")

    print("scoring short answers, one core")
    qs = [
        (f"I add and multiply. </think> <answer>{solve(p.numbers, p.target)}</answer>", p.numbers, p.target)
        for p in ps[:4000]
    ]
    assert all(bare_eval(*q) == score(*q) == 1 for q in qs)
    base = rate(lambda: [bare_eval(*q) for q in qs], len(qs))
    row("regular expression and eval (unsafe)", base, base)
    row("stars score", rate(lambda: [score(*q) for q in qs], len(qs)), base)
    row("stars explain", rate(lambda: [explain(*q) for q in qs], len(qs)), base)
    if other:
        row("reasoning-gym (own environment)", other["scored"], base)
    for size in (10_000, 100_000, 1_000_000):
        text = ("<answer>1+2 </think> " * (size // 20))[:size] + "<answer>3 * 4</answer>"
        print(
            f"  a response of {size / 1000:,.0f} KB takes "
            f"{1e6 / rate(lambda: score(text, (3, 4), 12), 1):,.0f} µs"
        )

    print("detectors, one core, completions of 1 KB")
    prose = [
        json.loads(line)
        for f in ("varied", "natural", "heldout")
        for line in (ROOT / "tests/data/habits" / f"{f}.jsonl").read_text().splitlines()
    ]
    r = random.Random(0)

    def kilobyte(pool):
        text = ""
        while len(text) < 1000:
            text += r.choice(pool) + "\n"
        return text[:1000]

    m = 200 if a.quick else 2_000
    traces = [
        x["completion"]
        for x in priming_rows(
            "backtracking_verification",
            sample_problems(200, 0, split="prime", n_numbers=3, max_number=12, min_target=10, max_target=30),
            500,
            0,
        )
    ]
    maths = [
        json.loads(line)["text"] for line in (ROOT / "tests/data/habits/maths.jsonl").read_text().splitlines()
    ]
    for what, pool, args in (
        ("Countdown prose", [x["text"] for x in prose], ((3, 8, 25, 4), 24)),
        ("traces of the embedded teacher", traces, ((3, 4, 5), 24)),
        ("general mathematical prose", maths, ()),
    ):
        docs = [kilobyte(pool) for _ in range(m)]
        row(what, rate(lambda: [find_behaviors(x, *args) for x in docs], m))


if __name__ == "__main__":
    main()

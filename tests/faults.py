"""Every fault of a disk: the n-th write, flush, rename or unlink of a command fails, for n = 1, 2, …

    python tests/faults.py                      all points of all commands (`make test-faults`)
    python tests/faults.py sft --kinds power    some
    python tests/faults.py --sample 20          some of each, always the same (`make test`)

After each fault the same command is given again. Then everything must be as if nothing had happened, byte for
byte; nothing may be paid twice; and in between, nothing half-written may bear a name under which it would be
taken for whole. Each run is a copy of this process, which has imported everything (Linux only)."""

import argparse
import gc
import hashlib
import importlib
import json
import os
import random
import re
import shutil
import signal
import sqlite3
import sys
import tempfile
import threading
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from contextlib import closing, suppress
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import cycle
from pathlib import Path

import matplotlib
import pandas as pd
import pyarrow.parquet as pq
import torch
from disk import BROKEN, KILLED, KINDS, Disk, key, watch
from tiny import STAR, TOK, model, teach, untimed
from tiny import run as train

from stars.cli import exporting
from stars.habits import judges, summaries
from stars.habits.behaviors import HABIT_NAMES, count_in
from stars.lab import experiments as ex
from stars.lab import stages
from stars.llm import ask as llm
from stars.llm.ledger import IN_THE_AIR
from stars.models import parallel
from stars.models.checkpoints import save_checkpoint
from stars.models.micro import micro_model, micro_tokenizer
from stars.show import plots
from stars.task import datasets
from stars.task.countdown import Problem
from stars.text import curation, labellers, pretraining, shards
from stars.text.corpus import Shares, World

# names that nobody takes for a result; a state carries its hash
HIDDEN = re.compile(r"(^|/)\.|\.(tmp|partial|lock)(/|$)|(^|/)state-")
LEFT = re.compile(r"(^|/)\.|\.tmp(/|$)")  # of them, those that are removed sooner or later
GROWING = (".jsonl", ".db", ".db-journal")  # what can be read of them is left to those who read them
HELPERS = (".lock", ".db-wal", ".db-shm")  # empty ones that stay, and what SQLite takes in sooner or later


# What is on the disk


def rows_of(path: Path) -> list[dict]:  # what depends on the clock left out
    return [{k: v for k, v in r.items() if k != "at"} for r in pq.read_table(path).to_pylist()]


def book_of(path: Path) -> dict:
    "What a ledger knows, without times and names that are drawn"
    with closing(sqlite3.connect(path)) as db:
        return {
            what: sorted(map(list, db.execute(f"SELECT {what}")))
            for what in (
                "key, text, finish, output_tokens, cost FROM replies",
                "key, prompt FROM requests",
                f"key, error, cost FROM errors WHERE error != '{IN_THE_AIR}'",
                "* FROM claims",
                "id FROM under_way",
            )
        }


READ = {".jsonl": lambda p: untimed(p.parent), ".db": book_of}


def content(path: Path) -> str:
    "What a file says; two that say the same are the same"
    try:
        return _content(path)
    except Exception as e:
        return f"unreadable: {type(e).__name__}"


def _content(path: Path) -> str:
    if path.name == "manifest.json":
        said = json.loads(path.read_text())
        return json.dumps({k: v for k, v in said.items() if k not in ("seconds_last_session", "finished")})
    if path.name == "study.parquet":
        return json.dumps(rows_of(path))
    if path.suffix == ".safetensors":  # the names in its header come in any order
        raw = path.read_bytes()
        n = 8 + int.from_bytes(raw[:8], "little")
        return json.dumps(json.loads(raw[8:n]), sort_keys=True) + hashlib.sha256(raw[n:]).hexdigest()
    if path.suffix in READ:
        return json.dumps(READ[path.suffix](path))
    return hashlib.sha256(path.read_bytes()).hexdigest()


def name_of(path: Path) -> str:
    "A state is called by a hash of its bytes, which do not come in the same order every time"
    state = next((p for p in path.parents if p.name.startswith("state-")), None)
    if not state:
        return str(path)
    _, step, said = state.name.split("-")
    return str(
        state.with_name(f"state-{step}" + " (damaged)" * (parallel.state_digest(state) != said)) / path.name
    )


def contents(root: Path) -> dict[str, str]:  # path in the folder → what the file says
    "All that a command has left"
    files = [p for p in sorted(root.rglob("*")) if p.is_file() and p.suffix not in HELPERS]
    return {os.path.relpath(name_of(p), root): content(p) for p in files}


def seen(root: Path) -> dict[str, str]:  # path in the folder → what the file says
    "What has a name that counts; of states, those that are not what their names say"
    out = {}
    for p in (p for p in sorted(root.rglob("*")) if p.is_file()):
        name = os.path.relpath(p if ".tmp" in str(p) else name_of(p), root)
        counts = not HIDDEN.search(name) and not name.endswith((*GROWING, *HELPERS))
        if counts or "(damaged)" in name:
            out[name] = content(p)
    return out


def sizes(root: Path) -> dict[tuple[int, int], tuple[str, int]]:
    "Which file, by what tells it from all others → its name and size"
    return {key(p.stat()): (str(p), p.stat().st_size) for p in root.rglob("*") if p.is_file()}


# Commands


def nothing(root: Path):
    pass


@dataclass(frozen=True)
class Command:
    "Something that is done on a disk; the present folder is the one around it, which nothing happens to"

    run: Callable[[Path], object]  # what it does there; given again, it goes on
    before: Callable[[Path], object] = nothing  # makes what it needs, or what is there already
    # files that belong together, by how their paths begin → the one that vouches for all ("": each does)
    whole: dict[str, str] = field(default_factory=dict)
    air: int = 0  # replies on their way: a killed process or a full disk loses them


class Shop:
    "A service that sells every reply anew, and whose books are not on the disk that fails"

    def __init__(self, books: Path, says: Callable[[str], str]):
        self.books, self.says = books, says

    def reply(self, key: str, prompt: str, mode: str) -> llm.Reply:
        with open(self.books / "sold", "a") as f:
            f.write(f"{key}\n")
        return llm.Reply(self.says(prompt), output_tokens=3, cost=0.1, mode=mode)

    def answer(self, request, key):
        return self.reply(key, request.prompt, "concurrent")

    def submit(self, requests, name):
        replies = {k: asdict(self.reply(k, r.prompt, "batch")) for k, r in requests.items()}
        (self.books / f"{name}.batch").write_text(json.dumps(replies))
        return name

    def find(self, batch, keys, known):
        return (self.books / f"{batch.name}.batch").exists() and batch.name

    def ended(self, id):
        return True

    def results(self, id):
        replies = json.loads((self.books / f"{id}.batch").read_text())
        return ((k, llm.Reply(**r)) for k, r in replies.items())


def backwards(prompt: str) -> str:
    return prompt[::-1]


def ask(root: Path, batch: bool):
    "Buy four replies, and export them"
    requests = [llm.Request(f"question {i}", "Say it backwards.") for i in range(4)]
    how = dict(concurrency=1, poll=0.01, progress=False, service=Shop(root.parent, backwards))
    with llm.Ledger(root / "ledger.db") as book:
        llm.ask("openai:m", requests, book, batch=batch, **how)
        book.export(root / "study.parquet")


def no_habit(prompt: str) -> str:
    said = {k: 0 if k in HABIT_NAMES else False for k in labellers.LABELS}
    return json.dumps(said | dict(domain=labellers.DOMAINS[0]))


def buy_labels(root: Path):
    "Have a service label a corpus"
    with llm.Ledger(root / "ledger.db") as book:
        how = dict(concurrency=1, progress=False, service=Shop(root.parent, no_habit))
        replies = partial(labellers.hosted_replies, model="openai:m", ledger=book, **how)
        labeller = labellers.LLMRows(replies, labellers.Labelling())
        pretraining.label_corpus(
            shards.Corpus("corpus.parquet", save_every=4),
            root / "labels",
            labeller,
            dict(labeller="m"),
            progress=False,
        )


def recording(root: Path):
    "A ledger that somebody else has exported: three replies, one of which was lost before, and what failed"
    m, requests = llm.Model.parse("openai:m"), [llm.Request(f"question {i}") for i in range(4)]
    with llm.Ledger(root.parent / "other.db") as book:
        keys = book.note(m, requests)
        for r in requests[:3]:
            book.record(m, r, llm.Reply(r.prompt[::-1], cost=0.1))
        book.fail(keys[0], "no reply came", 0.1)
        book.fail(keys[3], "refused")
        book.export("study.parquet")


def take_over(root: Path):
    with llm.Ledger(root / "ledger.db") as book:
        book.load("study.parquet")


def completions(step: int) -> pd.DataFrame:
    "As `complete` makes them"

    def row(i):
        return dict(
            model="plain",
            condition="base",
            seed=0,
            step=step,
            index=i,
            prompt="p",
            generated=f"{i} + 3 = {i + 3}. wait, no.",
            response_tokens=9,
            truncated=False,
            score=float(i % 2),
            numbers=[i, 3],
            target=i + 3,
            verification=i % 2,
            backtracking=1,
            subgoal=0,
            backward=i,
        )

    return pd.DataFrame(map(row, range(6)))


def job(root: Path) -> ex.Job:
    "A line of a figure, as small as they come"
    data = {"data.prime": 5, "data.train": 12, "data.eval": 3, "data.rows": 12}
    cfg = ex.preset("smoke", **data, ppo=dict(steps=2, save_every=1, prompts=4, minibatch=4))
    return ex.Job(cfg, "base", "base", runs=str(root), progress=False)


def save_start(root: Path):
    save_checkpoint(model(), TOK, root.parent / "start")


def begin(root: Path):
    "All stages before the evaluation, of a base without training"
    tok = micro_tokenizer(99)
    save_checkpoint(micro_model(tok, 16, 2, 2, 32, 128, 0), tok, root.parent / "base")
    ex.ppo_stage(job(root))


def rate(root: Path, n: int = 2):
    "Ratings, results, and both in upstream's shape"
    df = pd.concat([completions(step) for step in (0, 2)[:n]], ignore_index=True)
    judges.write_ratings(judges.rule_ratings(df), df, root / "judged")


def corpus(root: Path):
    "Seven texts, three of them problems"
    world = dict(max_number=9, min_target=10, max_target=20, top=99, n_numbers=(3,))
    shares = Shares(0.5, 0.0, 0.3, dict.fromkeys(HABIT_NAMES, 0.3))
    texts = list(ex.documents(7, 0, shares, World(**world)))
    pd.DataFrame(texts).to_parquet("corpus.parquet", index=False)


def label(root: Path):
    rules = pretraining.rule_labeller(1)
    pretraining.label_corpus(
        shards.Corpus("corpus.parquet", save_every=3), root / "labels", rules, progress=False
    )


def curate(root: Path):
    "Have its problems rewritten by both methods"
    for m in ex.METHODS:
        rewriter = curation.embedded_rewriter(root / "labels", m, 0, 99, 1)
        curation.rewrite_corpus(
            root / "labels", root / "rewrites", m, rewriter, dict(rewriter="embedded"), False
        )


def pose(root: Path):
    space = datasets.Space(n_numbers=(3,))
    datasets.write_problems(root / "problems.parquet", 12, space=space, workers=1, progress=False)


def draw(root: Path, height: int = 2):
    "A picture, its rows and its manifest, where older ones lie"
    fig = plots.plt.figure(figsize=(1, 1))
    fig.add_subplot().bar(["a"], [height])
    plots.save_figure(fig, "fig", pd.DataFrame(dict(x=["a"], y=[height])), root / "figures", dpi=20)
    plots.plt.close(fig)


def staged(root: Path):
    "A training that is a stage, and leaves a note"

    def work(out):
        train("sft", out, epochs=1, save_every=2)
        (out / "note.txt").write_text("done")

    stages.stage(root, "sft", dict(seed=0), {}, work)


def evaluated(root: Path, n: int = 3):
    "A job that was asked `n` problems, as a run store holds it"
    about = dict(
        inputs=dict(ppo="ppo-0123456789"), config=dict(eval=dict(samples=1)), commit="c", finished="today"
    )
    about |= dict(packages=dict(stars="0.1.0"), python="3.11", hardware=dict(cpus=2, gpus=[]))
    rows = [
        dict(
            model="plain",
            condition="dots",
            seed=0,
            step=0,
            index=i,
            generated="a",
            response_tokens=1,
            score=1.0,
        )
        | dict.fromkeys(HABIT_NAMES, 1)
        | dict(truncated=False)
        for i in range(n)
    ]
    folder = root / "runs" / "cpu" / "plain" / "dots" / "seed0" / "eval-0123456789"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "manifest.json").write_text(json.dumps(about))
    pd.DataFrame(rows).to_parquet(folder / "completions-step-0000.parquet")
    summaries.summarize(pd.DataFrame(rows)).to_csv(folder / "results.csv", index=False)


def export(root: Path):
    exporting.export_runs(root / "runs", root / "out", completions=True)


def export_older(root: Path):
    "A run store whose older state has been exported"
    evaluated(root, 2)
    export(root)
    evaluated(root)


COMMANDS = dict(
    sft=Command(
        lambda root: train("sft", root / "out", save_every=2), whole={"out/model/": ""}
    ),  # 4 steps an epoch
    ppo=Command(lambda root: train("ppo", root / "out"), whole={f"out/step-{i:04d}/": "" for i in range(4)}),
    star=Command(
        lambda root: teach("start", root / "out", replace(STAR, rounds=2)),
        save_start,
        {f"out/step-{i:04d}/": "" for i in range(3)},
    ),
    stage=Command(staged, whole={"sft-": ""}),
    evaluation=Command(lambda root: ex.eval_stage(job(root)), begin, {"smoke/base/base/seed0/eval-": ""}),
    ratings=Command(rate, lambda root: rate(root, 1)),
    asking=Command(lambda root: ask(root, False), air=1),
    batches=Command(lambda root: ask(root, True)),
    labelling=Command(buy_labels, corpus, air=1),
    loading=Command(take_over, recording),
    labels=Command(label, corpus),
    rewriting=Command(curate, lambda root: (corpus(root), label(root))),
    figure=Command(draw, lambda root: draw(root, 1), {"figures/": "figures/fig.json"}),
    problems=Command(pose),
    export=Command(export, export_older, {"out/": "out/README.md"}),
)


# One fault


@dataclass
class Outcome:
    "What became of a command"

    seen: dict = field(default_factory=dict)  # what had a name that counts before it ran
    error: str = ""  # its own words; "": it came to its end
    clear: bool = True  # are they a line that names a file?
    trace: str = ""  # where it was
    calls: list = field(default_factory=list)  # that changed something
    met: bool = False  # did it come as far as the fault?
    killed: bool = False  # by it
    unseen: list = field(default_factory=list)  # files with bytes that no call has written
    files: dict = field(default_factory=dict)  # what there is at its end
    modules: list = field(default_factory=list)  # it has imported


# by the command line, which says them in one line
CAUGHT = (ValueError, OSError, LookupError, RuntimeError, ImportError, ArithmeticError, MemoryError)


def attempt(disk: Disk, run: Callable, root: Path, kind: str = "", at: int = 0) -> Outcome:
    "Run something in a copy of this process, whose disk fails at a call (0: with the power, after the end)"
    read, write = os.pipe()
    if pid := os.fork():
        os.close(write)
        with open(read) as f:
            said = f.read()
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        if status == KILLED:
            return Outcome(met=True, killed=True)
        if status:
            raise RuntimeError(f"the harness broke, or waited for ever: exit status {status}\n{said}")
        return Outcome(**json.loads(said))
    os.close(read)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    warnings.simplefilter("ignore")
    signal.alarm(3600)  # what waits for ever ends
    os.chdir(root.parent)
    try:
        out, there = Outcome(seen(root)), set(sizes(root))
        vars(disk).update(root=os.path.realpath(root), kind=kind, at=at)
        try:
            run(root)
        except Exception as e:
            out.error, out.trace = f"{type(e).__name__}: {e}", traceback.format_exc()
            out.clear = isinstance(e, CAUGHT) and "\n" not in str(e) and str(root) in str(e)
        disk.busy = threading.get_ident()  # nothing is watched any more
        if kind == "power" and not at:
            disk.lose()
            os._exit(KILLED)
        out.met = 0 < at <= len(disk.calls)
        if not kind:
            out.calls, out.modules = disk.calls, sorted(sys.modules)
        new = {k: x for k, x in sizes(root).items() if k not in there}
        out.unseen = [path for k, (path, size) in new.items() if disk.written[k] < size]
        if not out.error:
            out.files = contents(root)
        said, status = json.dumps(vars(out)), 0
    except BaseException:
        said, status = traceback.format_exc(), BROKEN
    with open(write, "w") as f:
        f.write(said)
    os._exit(status)


class Trial:
    "A command, what it leaves, and what it leaves after each fault"

    def __init__(self, disk: Disk, again: Callable, name: str, work: Path):
        self.disk, self.name, self.command = disk, name, COMMANDS[name]
        self.work, self.start, self.root = work / name, work / f"{name}-before", work / name / "disk"
        (self.start / "disk").mkdir(parents=True)
        self.calmly(self.command.before, self.start / "disk")
        self.anew()
        first = self.calmly(self.command.run)
        if first.unseen:
            raise RuntimeError(f"{name}: nobody saw who wrote {', '.join(first.unseen)}")
        second = self.calmly(self.command.run)  # it finds everything done
        self.before, self.after, self.calls, self.wanted = first.seen, second.seen, first.calls, first.files
        if wrong := self.compare(second.files, "given twice"):
            raise RuntimeError(f"{name}: {wrong}")
        for m in first.modules:  # so that each copy has them from the start
            with suppress(ImportError):
                importlib.import_module(m)
        again()

    def calmly(self, run: Callable, root: Path | None = None) -> Outcome:
        "Without a fault"
        out = attempt(self.disk, run, root or self.root)
        if out.error:
            raise RuntimeError(f"{self.name}, without a fault: {out.trace}")
        return out

    def anew(self):
        shutil.rmtree(self.work, ignore_errors=True)
        shutil.copytree(self.start, self.work)

    def meet(self, kind: str, at: int) -> list[str] | None:  # what is wrong; None: the command ended before
        "One fault, and the same command afterwards"
        self.anew()
        first = attempt(self.disk, self.command.run, self.root, kind, at)
        if not first.met:
            return None
        second = attempt(self.disk, self.command.run, self.root)
        wrong = [f"it says: {first.error}"] * (not first.clear) + self.half_written(second.seen)
        if not first.killed and not first.error:  # what could not be removed may wait for the next time
            now = {n: x for n, x in first.files.items() if not LEFT.search(n)}
            wrong += self.compare(now, "as if nothing had happened, but it")
        if second.error:
            wrong.append(f"given again: {second.error}")
        else:
            wrong += self.compare(second.files, "given again, it")
        return wrong + self.bought_twice(self.command.air * (kind != "error"))

    def half_written(self, now: dict) -> list[str]:
        "What is neither as before nor as it should be"
        makes = (self.before, self.after)
        wrong = [f"{n} is half-written" for n, x in now.items() if x not in [make.get(n) for make in makes]]
        for group, voucher in self.command.whole.items():
            part, *whole = (
                {n: x for n, x in files.items() if n.startswith(group)} for files in (now, *makes)
            )
            if part and voucher in ("", *part) and part not in whole:
                wrong.append(f"{group} is there, but not whole, or not of one make")
        return wrong

    def compare(self, files: dict, when: str) -> list[str]:
        "With what an undisturbed run leaves"
        lost, more = sorted(self.wanted.keys() - files), sorted(files.keys() - self.wanted)
        other = sorted(n for n in files.keys() & self.wanted if files[n] != self.wanted[n])
        said = {"lacks": lost, "also has": more, "differs in": other}
        return [f"{when} {what} {', '.join(names)}" for what, names in said.items() if names]

    def bought_twice(self, allowed: int) -> list[str]:
        "Replies that were bought again, and what is booked for those that were lost"
        sold, book = self.work / "sold", self.root / "ledger.db"
        if not sold.exists():
            return []
        twice = sum(n > 1 for n in Counter(sold.read_text().split()).values())
        booked = 0
        if book.exists():
            with closing(sqlite3.connect(book)) as db:
                [(booked,)] = db.execute("SELECT count(*) FROM errors WHERE error = ?", (IN_THE_AIR,))
        wrong = [f"{twice} replies were bought twice"] * (twice > allowed)
        return wrong + [f"{booked} losses are booked, {twice} replies were bought twice"] * (
            book.exists() and not twice <= booked <= allowed
        )


# All of them


def points(n: int, kinds: list[str], sample: int | None, name: str) -> list[tuple[str, int]]:
    "Kinds of fault and numbers of calls; a sample has the kinds in turn"
    if sample is None:
        return [(kind, at) for at in range(1, n + 1) for kind in kinds]
    return list(zip(cycle(kinds), sorted(random.Random(name).sample(range(1, n + 1), min(sample, n)))))


def try_all(name: str, kinds: list[str], sample: int | None, disk: Disk, again: Callable, work: Path) -> dict:
    "Every fault of a command; what was found"
    trial, met, wrong = Trial(disk, again, name, work), Counter(), []

    def one(kind, at):
        if (said := trial.meet(kind, at)) is None:
            return False
        met[kind] += 1
        what, path, _ = trial.calls[at - 1] if 0 < at <= len(trial.calls) else ("after", "the end", 0)
        for s in said:
            wrong.append(f"{name}, {kind} at {at} ({what} {path}): {s}")
            print(f"  {wrong[-1]}", flush=True)
        return True

    for kind, at in points(len(trial.calls), kinds, sample, name):
        one(kind, at)
    if "power" in kinds:
        one("power", 0)
    for kind in kinds if sample is None else ():  # there may be more calls than without a fault
        at = len(trial.calls) + 1
        while one(kind, at):
            at += 1
    shutil.rmtree(work / name)
    what = ", ".join(f"{n} {what}" for what, n in Counter(c[0] for c in trial.calls).most_common())
    return dict(calls=len(trial.calls), what=what, met=dict(met), wrong=wrong)


def warm_up(folder: Path):
    "Work out, before any copy is made, what each of them would work out anew: mostly regular expressions"
    save_checkpoint(model(), TOK, folder / "warm")
    count_in("3 + 4 = 7. wait, no.", Problem((3, 4), 7))
    pretraining.rule_labels("Let me check: 3 + 4 = 7.")


def main():
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("names", nargs="*", default=list(COMMANDS), help=f"of {', '.join(COMMANDS)}")
    kinds = "; ".join(f"{k}: {v}" for k, v in KINDS.items())
    parser.add_argument("--kinds", default=",".join(KINDS), help=kinds)
    parser.add_argument("--sample", type=int, help="faults of each command (default: all)")
    parser.add_argument("--json", type=Path, help="file for what was found")
    args = parser.parse_args()
    torch.set_num_threads(1)
    matplotlib.use("agg")
    ex.quiet()
    again, found = watch(disk := Disk()), {}
    with tempfile.TemporaryDirectory(prefix="faults-") as work:
        warm_up(Path(work))
        gc.freeze()  # no copy of this process walks through it
        for name in args.names:
            found[name] = r = try_all(name, args.kinds.split(","), args.sample, disk, again, Path(work))
            kinds = ", ".join(f"{n} {kind}" for kind, n in r["met"].items())
            print(
                f"{name}: {r['calls']} calls ({r['what']}); {sum(r['met'].values()):,} faults ({kinds}); "
                f"{len(r['wrong'])} wrong",
                flush=True,
            )
    if args.json:
        args.json.write_text(json.dumps(found))
    print(f"{sum(sum(r['met'].values()) for r in found.values()):,} faults")
    sys.exit(any(r["wrong"] for r in found.values()))


if __name__ == "__main__":
    main()

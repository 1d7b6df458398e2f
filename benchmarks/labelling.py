"""Labelling a corpus by rules, end to end (read, label, write): MB/s with one worker and with two, and the
memory it takes.

    python benchmarks/labelling.py [--gb 1] [--kind jsonl parquet] [--out FILE]

The corpus is generated: documents of `stars.text.corpus` in groups of four, a quarter of them worked
problems and a quarter noise, about 1 KB a text. Both numbers of workers do the same work in one run,
alternating.
"""

import argparse
import contextlib
import json
import random
import shutil
import tempfile
import threading
import time
from pathlib import Path

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
from common.report import report

from stars.text.corpus import Shares, documents
from stars.text.pretraining import label_corpus, read_labels, rule_labeller
from stars.text.shards import Corpus


def generate(where: Path, kind: str, size: float) -> Path:
    "A corpus of `size` bytes"
    docs, rng, path, written = (
        [d["text"] for d in documents(20_000, 0, Shares(worked=0.25, noise=0.25))],
        random.Random(0),
        where / f"corpus.{kind}",
        0,
    )

    def texts(n):
        return ["\n\n".join(rng.choices(docs, k=4)) for _ in range(n)]

    with (
        open(path, "wb")
        if kind == "jsonl"
        else pq.ParquetWriter(path, pa.schema([("text", pa.string())])) as out
    ):
        while written < size:
            piece = texts(10_000)
            written += sum(map(len, piece))
            if kind == "jsonl":
                out.writelines(json.dumps(dict(text=t)).encode() + b"\n" for t in piece)
            else:
                out.write_table(pa.table(dict(text=piece)))
    return path


class Memory:
    "The most memory that this process and its children take"

    def __enter__(self):
        self.most, self._stop, self._thread = (
            0,
            threading.Event(),
            threading.Thread(target=self._watch, daemon=True),
        )
        self._thread.start()
        return self

    def _watch(self):
        me = psutil.Process()
        while not self._stop.wait(0.5):
            held = 0
            for p in [me, *me.children(recursive=True)]:
                with contextlib.suppress(psutil.NoSuchProcess):
                    held += p.memory_info().rss
            self.most = max(self.most, held)

    def __exit__(self, *_):
        self._stop.set()
        self._thread.join()


def main():
    args = argparse.ArgumentParser(description=__doc__)
    args.add_argument("--gb", type=float, default=1.0)
    args.add_argument("--kind", nargs="+", default=["jsonl", "parquet"], choices=["jsonl", "parquet"])
    args.add_argument("--out", type=Path)
    a = args.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as d:
        for kind in a.kind:
            path = generate(Path(d), kind, a.gb * 1e9)
            for workers in (1, 2):
                with Memory() as memory:
                    start = time.time()
                    done = label_corpus(
                        Corpus(str(path)), Path(d) / "labels", rule_labeller(workers), progress=False
                    )
                    took = time.time() - start
                characters = read_labels(Path(d) / "labels").characters.sum()
                rows.append(
                    [
                        kind,
                        workers,
                        f"{done['rows']:,}",
                        f"{characters / 1e6:,.0f}",
                        f"{took:.1f}",
                        f"{characters / 1e6 / took:.1f}",
                        f"{memory.most / 1e6:,.0f}",
                    ]
                )
                shutil.rmtree(Path(d) / "labels")
            path.unlink()
    speed = {(r[0], r[1]): float(r[5]) for r in rows}
    notes = [f"{kind}: two workers {speed[kind, 2] / speed[kind, 1]:.2f} times one" for kind in a.kind]
    report(
        "Rule labelling, end to end",
        ["corpus", "workers", "texts", "MB", "s", "MB/s", "memory MB"],
        rows,
        a.out,
        notes,
        ("pyarrow",),
    )


if __name__ == "__main__":
    main()

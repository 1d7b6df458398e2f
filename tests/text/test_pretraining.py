"""Labelling a corpus: nothing is lost, nothing is counted twice, and what cannot be read is named."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stars.cli.main import main
from stars.habits.behaviors import HABIT_NAMES, wilson
from stars.text.corpus import documents
from stars.text.curation import labelled_shards
from stars.text.pretraining import (
    LABELS,
    label_corpus,
    read_labels,
    read_statistics,
    rule_labeller,
    rule_labels,
    show_statistics,
    statistics,
)
from stars.text.shards import Corpus, passed_over, plan_shards, read_shard

ONE = rule_labeller(1)


def jsonl(path: Path, texts) -> Path:
    path.write_text("".join(json.dumps(dict(text=t)) + "\n" for t in texts))
    return path


def parquet(path: Path, texts, group: int = 7) -> Path:
    pq.write_table(pa.table(dict(text=pa.array(texts, pa.string()))), path, row_group_size=group)
    return path


@pytest.fixture(scope="module")
def texts():
    return [d["text"] for d in documents(120, 5)]


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 23), min_size=1, max_size=4),
    every=st.integers(1, 30),
    start=st.integers(0, 40),
    length=st.integers(1, 60),
    kind=st.sampled_from([jsonl, parquet]),
)
def test_any_window_cut_in_any_way_gives_its_rows(tmp_path_factory, sizes, every, start, length, kind):
    where = tmp_path_factory.mktemp("corpus")
    rows = [f"text {i}" for i in range(sum(sizes))]
    for i in range(len(sizes)):
        kind(
            where / f"{i}.{'jsonl' if kind is jsonl else 'parquet'}",
            rows[sum(sizes[:i]) : sum(sizes[: i + 1])],
        )
    shards = list(
        plan_shards(Corpus(str(where), column="text", save_every=every, start=start, end=start + length))
    )
    read = [t for s in shards for t in read_shard(s)]
    assert [(t.row, t.text) for t in read] == [
        (i, rows[i]) for i in range(start, min(start + length, len(rows)))
    ]
    assert [s.index for s in shards] == list(range(len(shards))) and all(s.count <= every for s in shards)


def test_two_processes_write_what_one_writes(tmp_path, texts):
    source = str(parquet(tmp_path / "c.parquet", texts))
    for n in (1, 2):
        label_corpus(Corpus(source, save_every=17), tmp_path / f"out{n}", rule_labeller(n), progress=False)
    assert read_labels(tmp_path / "out1").equals(read_labels(tmp_path / "out2"))


def test_unusable_texts_keep_their_rows(tmp_path):
    big = "Let me check: 3 + 4 = 7, as expected. " * 30_000  # 1.1 MB
    lines = [
        json.dumps(dict(text="plain")).encode(),
        b'{"text": null}',
        b'{"text": "caf\xe9"}',
        b'{"text": ',
        b"",
        b'{"text": "  "}',
        b'{"text": 3}',
        b"[1]",
        json.dumps(dict(text=big)).encode(),
        b'{"other": "x"}',
        json.dumps(dict(text="half a \ud800 pair")).encode(),
    ]
    (tmp_path / "c.jsonl").write_bytes(b"\n".join(lines))  # the last line has no line end
    report = label_corpus(
        Corpus(str(tmp_path / "c.jsonl"), save_every=4), tmp_path / "out", ONE, progress=False
    )
    labels = read_labels(tmp_path / "out")
    assert labels.error.tolist() == [
        "",
        "null",
        "not UTF-8",
        "not JSON",
        "empty",
        "empty",
        "not a text",
        "not a record",
        "",
        "null",
        "",
    ]
    assert (
        labels[labels.error != ""][list(LABELS)].isna().all().all()
        and labels[labels.error == ""][list(LABELS)].notna().all().all()
    )
    assert labels.verification[8] == 30_000 and labels.characters[8] == len(big)
    assert (
        report["rows"] == 11
        and report["labelled"] == 3
        and report["missing"]
        == {"null": 2, "empty": 2, "not UTF-8": 1, "not JSON": 1, "not a text": 1, "not a record": 1}
    )


def test_parquet_with_broken_utf8_loses_only_that_text(tmp_path):
    column = pa.array([b"good", b"caf\xe9", None]).view(pa.binary())
    bad = pa.Array.from_buffers(
        pa.string(), 3, column.buffers()
    )  # strings that are no UTF-8, as careless writers make them
    pq.write_table(pa.table(dict(text=bad)), tmp_path / "c.parquet")
    label_corpus(Corpus(str(tmp_path / "c.parquet")), tmp_path / "out", ONE, progress=False)
    assert read_labels(tmp_path / "out").error.tolist() == ["", "not UTF-8", "null"]


def damaged(path: Path, texts) -> Path:
    "A file whose footer is whole and whose second row group is not"
    parquet(path, texts, 40)
    column = pq.ParquetFile(path).metadata.row_group(1).column(0)
    data = bytearray(path.read_bytes())
    at = column.dictionary_page_offset or column.data_page_offset
    data[at : at + column.total_compressed_size] = os.urandom(column.total_compressed_size)
    path.write_bytes(data)
    return path


def test_a_damaged_shard_is_named_and_skipped_only_on_request(tmp_path, texts):
    source = str(damaged(tmp_path / "c.parquet", texts))
    with pytest.raises(ValueError, match=r"c\.parquet, rows 40 to 79: damaged .*--skip-corrupt"):
        label_corpus(Corpus(source, save_every=40), tmp_path / "strict", ONE, progress=False)
    assert len(list((tmp_path / "strict").glob("labels-*"))) == 1  # what came before is kept
    report = label_corpus(
        Corpus(source, save_every=40, skip_corrupt=True), tmp_path / "lenient", ONE, progress=False
    )
    assert report["missing"] == {"damaged file": 40} and report["labelled"] == 80


def test_a_file_without_a_footer(tmp_path, texts):
    parquet(tmp_path / "a.parquet", texts)
    (tmp_path / "b.parquet").write_bytes((tmp_path / "a.parquet").read_bytes()[:200])
    with pytest.raises(ValueError, match=r"b\.parquet is not a complete parquet file"):
        label_corpus(Corpus(str(tmp_path)), tmp_path / "out", ONE, progress=False)
    report = label_corpus(Corpus(str(tmp_path), skip_corrupt=True), tmp_path / "out2", ONE, progress=False)
    assert report["rows"] == len(texts) and "b.parquet" in report["skipped_files"][0]


@pytest.mark.parametrize(
    "change,said",
    [
        (dict(column="body"), "has no column 'body'; choose one of text"),
        (dict(save_every=0), "save_every=0 must be at least 1"),
        (dict(start=5, end=5), "start=5, end=5"),
        (dict(start=500), "has no rows between start=500"),
        (dict(source="nowhere"), "nowhere does not exist"),
    ],
)
def test_bad_requests_are_refused_before_anything_is_written(tmp_path, texts, change, said):
    source = parquet(tmp_path / "c.parquet", texts)
    with pytest.raises((ValueError, LookupError), match=said):
        label_corpus(Corpus(**dict(source=str(source)) | change), tmp_path / "out", ONE, progress=False)
    assert not list(tmp_path.glob("out/labels-*"))


def test_a_folder_of_other_labels_is_refused(tmp_path, texts):
    source = parquet(tmp_path / "c.parquet", texts)
    label_corpus(Corpus(str(source)), tmp_path / "out", ONE, progress=False)
    with pytest.raises(ValueError, match="save_every was 20000, now 10"):
        label_corpus(Corpus(str(source), save_every=10), tmp_path / "out", ONE, progress=False)
    parquet(source, texts[:-1])
    with pytest.raises(ValueError, match="files was .*, now"):
        label_corpus(Corpus(str(source)), tmp_path / "out", ONE, progress=False)


def test_what_is_passed_over_is_said(tmp_path, texts, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c" / "deep").mkdir(parents=True)
    jsonl(tmp_path / "c" / "a.jsonl", texts)
    for name in (
        "b.jsonl.gz",
        "deep/c.jsonl.gz",
        "d.json",
        "E.JSONL",
        "f.parquet.zst",
        "README",
        ".g.jsonl",
        "h.csv",
    ):
        (tmp_path / "c" / name).write_text('{"text": "x"}')
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "c" / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "c" / "gone.jsonl").symlink_to(tmp_path / "nowhere.jsonl")
    (tmp_path / "c" / ".DS_Store").write_text("")
    there = {
        ".jsonl.gz": ["b.jsonl.gz", "deep/c.jsonl.gz"],
        ".json": ["d.json"],
        ".JSONL": ["E.JSONL"],
        ".parquet.zst": ["f.parquet.zst"],
        "file without a suffix": ["README"],
        "hidden .jsonl": [".g.jsonl"],
        ".csv": ["h.csv"],
        "linked folder": ["link"],
        "broken link": ["gone.jsonl"],
    }
    assert passed_over(tmp_path / "c") == there
    main(["label", str(tmp_path / "c"), str(tmp_path / "out"), "--workers", "1"])
    out, err = capsys.readouterr()
    for said in (out, err):
        assert "2 .jsonl.gz (b.jsonl.gz, deep/c.jsonl.gz), 1 .json (d.json), 1 .parquet.zst" in said
        assert "Read are .parquet, .jsonl, .ndjson: unpack or convert" in said
    assert json.loads((tmp_path / "out" / "report.json").read_text())["passed_over"] == there
    assert len(read_labels(tmp_path / "out")) == len(texts)
    # before money is spent
    main(
        [
            "label",
            str(tmp_path / "c"),
            str(tmp_path / "out"),
            "--labeller",
            "openai:gpt-5.4-mini",
            "--dry-run",
        ]
    )
    assert "2 .jsonl.gz" in capsys.readouterr().err
    (tmp_path / "c" / "a.jsonl").unlink()
    with pytest.raises(
        ValueError, match="holds no .parquet, .jsonl or .ndjson file; passed over in .*1 .JSONL"
    ):
        label_corpus(Corpus(str(tmp_path / "c")), tmp_path / "none", ONE, progress=False)
    assert not (tmp_path / "none").exists()
    assert passed_over(parquet(tmp_path / "one.parquet", texts)) == {} == passed_over("hub:a/b")


def test_problems_that_are_passed_over_are_said(tmp_path, capsys):
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "a.jsonl").write_text('{"numbers": [3, 4, 5], "target": 12}')
    (tmp_path / "c" / "b.jsonl.gz").write_text("x")
    main(["data", str(tmp_path / "out"), "--source", str(tmp_path / "c"), "--no-difficulty"])
    assert "1 .jsonl.gz (b.jsonl.gz)" in capsys.readouterr().out


def same_size(path: Path, old: bytes, new: bytes):
    "Change a file so that neither its size nor its time tells"
    was = path.stat()
    path.write_bytes(path.read_bytes().replace(old, new, 1))
    os.utime(path, ns=(was.st_atime_ns, was.st_mtime_ns))
    assert path.stat().st_size == was.st_size


def test_a_corpus_is_known_by_its_content(tmp_path, texts):
    (tmp_path / "c").mkdir()
    for name in ("a", "b", "c"):
        jsonl(tmp_path / "c" / f"{name}.jsonl", [name, *texts[:9]])
    label_corpus(Corpus(str(tmp_path / "c")), tmp_path / "out", ONE, progress=False)
    label_corpus(Corpus(str(tmp_path / "c")), tmp_path / "out", ONE, progress=False)  # as it was
    same_size(tmp_path / "c" / "b.jsonl", b'"b"', b'"x"')
    with pytest.raises(ValueError, match=r"files was \[.*b.jsonl.*\], now \[.*b.jsonl.*\]"):
        label_corpus(Corpus(str(tmp_path / "c")), tmp_path / "out", ONE, progress=False)
    with pytest.raises(ValueError, match=r"b.jsonl was added, was removed or was changed"):
        labelled_shards(tmp_path / "out")
    same_size(tmp_path / "c" / "b.jsonl", b'"x"', b'"b"')
    assert sum(s.count for s in labelled_shards(tmp_path / "out")) == 30
    (tmp_path / "c" / "d.jsonl").write_text('{"text": "more"}')
    with pytest.raises(ValueError, match=r"d.jsonl was added"):
        labelled_shards(tmp_path / "out")


def test_labels_of_before_are_known_by_name_and_size(tmp_path, texts):
    "They noted no content; a run store that has some goes on"
    source = jsonl(tmp_path / "c.jsonl", texts)
    label_corpus(Corpus(str(source)), tmp_path / "out", ONE, progress=False)
    old = json.loads((tmp_path / "out" / "labels.json").read_text())
    (tmp_path / "out" / "labels.json").write_text(json.dumps(old | dict(files=[f[:2] for f in old["files"]])))
    label_corpus(Corpus(str(source)), tmp_path / "out", ONE, progress=False)
    assert len(list(labelled_shards(tmp_path / "out"))) == 1
    jsonl(source, texts[:-1])
    with pytest.raises(ValueError, match="c.jsonl was added, was removed or was changed"):
        labelled_shards(tmp_path / "out")


class Hub:
    "A data set that changes"

    def __init__(self, monkeypatch):
        self.rows, self.sha, self.asked = {"one": ["a", "b", "c"]}, "one", []
        datasets = pytest.importorskip("datasets")

        def load_dataset(name, split, streaming, revision=None):
            self.asked.append(revision)
            return [dict(text=t) for t in self.rows[revision or self.sha]]

        monkeypatch.setattr(datasets, "load_dataset", load_dataset)

        def dataset_info(_, name, revision=None):
            return SimpleNamespace(sha=revision or self.sha)

        monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", dataset_info)

    def change(self):
        self.sha, self.rows["two"] = "two", ["x", "y", "z"]


def test_a_data_set_on_the_hub_stays_the_one_that_was_labelled(tmp_path, monkeypatch):
    hub = Hub(monkeypatch)

    def stops(shards):
        yield from list(ONE(shards))[:1]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        label_corpus(Corpus("hub:some/set", save_every=2), tmp_path / "out", stops, progress=False)
    hub.change()
    # goes on with what it began
    label_corpus(Corpus("hub:some/set", save_every=2), tmp_path / "out", ONE, progress=False)

    def noted():
        return json.loads((tmp_path / "out" / "labels.json").read_text())

    assert noted()["revision"] == "hub:some/set@one" and set(hub.asked) == {"one"}

    # for `curate`
    def texts(folder):
        return [t.text for s in labelled_shards(tmp_path / folder) for t in read_shard(s)]

    assert texts("out") == ["a", "b", "c"] and hub.asked[-1] == "one"
    label_corpus(Corpus("hub:some/set", save_every=2), tmp_path / "new", ONE, progress=False)
    assert texts("new") == ["x", "y", "z"] and hub.asked[-1] == "two"
    label_corpus(Corpus("hub:some/set@one", save_every=2), tmp_path / "older", ONE, progress=False)  # by name
    assert texts("older") == ["a", "b", "c"] and hub.asked[-1] == "one"
    without = {k: v for k, v in noted().items() if k != "revision"}
    (tmp_path / "out" / "labels.json").write_text(json.dumps(without))
    with pytest.raises(ValueError, match="does not say which revision of hub:some/set"):
        labelled_shards(tmp_path / "out")


def test_a_hub_that_does_not_answer_is_named(tmp_path, monkeypatch):
    Hub(monkeypatch)

    def down(*_, **__):
        raise ConnectionError("no route to host")

    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", down)
    with pytest.raises(
        ValueError,
        match="hub:some/set: the Hub does not say which revision it has .ConnectionError: no route",
    ):
        label_corpus(Corpus("hub:some/set"), tmp_path / "out", ONE, progress=False)
    assert not (tmp_path / "out").exists()


def test_a_folder_with_the_name_of_a_data_set(tmp_path, monkeypatch):
    "The package datasets reads it instead; then its content is the revision"
    pytest.importorskip("datasets")
    import huggingface_hub.constants

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    (tmp_path / "some" / "set").mkdir(parents=True)
    jsonl(tmp_path / "some" / "set" / "train.jsonl", ["abc", "def"])
    label_corpus(Corpus("hub:some/set"), tmp_path / "out", ONE, progress=False)
    assert [t.text for s in labelled_shards(tmp_path / "out") for t in read_shard(s)] == ["abc", "def"]
    same_size(tmp_path / "some" / "set" / "train.jsonl", b"abc", b"xyz")
    with pytest.raises(ValueError, match="the folder some/set has changed since it was labelled"):
        list(labelled_shards(tmp_path / "out"))


def test_killed_and_started_again_it_ends_with_the_same_labels(tmp_path):
    texts = [d["text"] for d in documents(300, 1)] * 40
    source = jsonl(tmp_path / "c.jsonl", texts)
    command = [
        sys.executable,
        "-m",
        "stars.cli.main",
        "label",
        str(source),
        str(tmp_path / "out"),
        "--save-every",
        "500",
        "--workers",
        "2",
    ]
    run = subprocess.Popen(
        [sys.executable, "-c", "from stars.cli.main import main; main()", *command[3:]],
        start_new_session=True,
        stderr=subprocess.DEVNULL,
    )
    while len(list((tmp_path / "out").glob("labels-*.parquet"))) < 3 and run.poll() is None:
        time.sleep(0.02)
    os.killpg(run.pid, signal.SIGKILL)
    run.wait()
    done = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").glob("labels-*.parquet")}
    assert 3 <= len(done) < 24 and not (tmp_path / "out" / "report.json").exists()
    subprocess.run(
        [sys.executable, "-c", "from stars.cli.main import main; main()", *command[3:]],
        check=True,
        capture_output=True,
    )
    assert all(p.stat().st_mtime_ns == t for p, t in done.items())  # not made again
    label_corpus(Corpus(str(source), save_every=500), tmp_path / "whole", ONE, progress=False)
    assert read_labels(tmp_path / "out").equals(read_labels(tmp_path / "whole")) and len(
        read_labels(tmp_path / "out")
    ) == len(texts)


def test_statistics_are_those_of_the_table(tmp_path, texts):
    label_corpus(
        Corpus(str(parquet(tmp_path / "c.parquet", [*texts, None, "x" * 9000])), save_every=50),
        tmp_path / "out",
        ONE,
        progress=False,
    )
    labels, stats = read_labels(tmp_path / "out"), read_statistics(tmp_path / "out")
    pd.testing.assert_frame_equal(stats, statistics(tmp_path / "out"))
    usable = labels[labels.characters > 0]
    for h in HABIT_NAMES:
        row = stats[(stats.by == "all") & (stats.label == h)].iloc[0]
        v = usable[h].astype(float)
        assert (
            row.n == len(usable)
            and row.share == pytest.approx((v > 0).mean())
            and (row.share_lo, row.share_hi) == pytest.approx(wilson((v > 0).sum(), len(v)))
        )
        assert row["mean"] == pytest.approx(v.mean()) and (row.mean_hi - row.mean_lo) / 2 == pytest.approx(
            1.96 * v.std(ddof=0) / len(v) ** 0.5
        )
    by_domain = stats[(stats.by == "domain") & (stats.label == "verification")].set_index("group")
    assert by_domain.n.to_dict() == usable.domain.value_counts().to_dict()
    assert stats[(stats.by == "length") & (stats.label == "problem")].n.sum() == len(usable)
    assert "%" in show_statistics(stats).to_string()


def test_rules_find_what_was_put_into_the_synthetic_corpus():
    docs = pd.DataFrame(documents(1_500, 7))
    found = pd.DataFrame([rule_labels(t) for t in docs.text])
    worked = docs.source == "worked"
    for h in HABIT_NAMES:
        assert ((found[h] > 0) == docs[h])[worked].mean() > 0.99, h
        assert (found[h] > 0)[~worked & ~docs[h]].mean() < 0.02, (
            h
        )  # what stands between cities and markets is no reasoning
    for what in ("problem", "solution"):
        assert (found[what] == (docs.source == "worked")).mean() > 0.95, what
    assert set(found.domain[docs.source == "worked"]) <= {"mathematics", "other"}


@pytest.mark.parametrize(
    "text,problem,solution",
    [
        ("Prove that the sum of two odd numbers is even.\n\nProof. Write 2a + 1 and 2b + 1.", True, True),
        ("How many apples are left?", True, False),
        ("The train left the station at noon.", False, False),
        ("Returns the sum of the two arguments.", False, False),
        ("Solve the equation x + 3 = 7. We get x = 4, so the answer is 4.", True, True),
        ("Therefore he went home.", False, False),
    ],
)
def test_problem_and_solution(text, problem, solution):
    labels = rule_labels(text)
    assert (labels["problem"], labels["solution"]) == (problem, solution)


def test_the_command(tmp_path, texts, capsys):
    source = parquet(tmp_path / "c.parquet", texts)
    main(
        [
            "label",
            str(source),
            str(tmp_path / "out"),
            "--max-examples",
            "50",
            "--start",
            "10",
            "--workers",
            "1",
        ]
    )
    said = capsys.readouterr().out
    assert "50 of 50 texts labelled" in said and "verification" in said
    assert read_labels(tmp_path / "out").row.tolist() == list(range(10, 60))

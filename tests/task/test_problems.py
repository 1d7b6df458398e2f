"Drawing problems, how hard they are, and files of them: against oracles, and against interruption"

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from fractions import Fraction
from itertools import islice, product

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from limits import tuples_at_most

from stars.task.countdown import Problem, solvable, split_of
from stars.task.datasets import Layout, from_parquet, read_problems, to_parquet, write_problems
from stars.task.problems import (
    SPACES,
    Space,
    Stream,
    _permute,
    all_problems,
    allows,
    difficulty,
    read_exclusions,
    sample_problems,
    solvable_many,
)

MICRO = dict(n_numbers=3, max_number=12, min_target=10, max_target=30)
WIDE = dict(max_number=99, max_target=99)

# ---- oracles: expressions as trees, written out and compared as text


def blind(pool, target):
    "Chance of a random full combination, and the expressions (as trees) that hit"
    if len(pool) == 1:
        return (Fraction(1), {pool[0][1]}) if pool[0][0] == target else (Fraction(0), set())
    chance, hits = Fraction(0), set()
    for i in range(len(pool)):
        for j in range(len(pool)):
            if i == j:
                continue
            (a, x), (b, y) = pool[i], pool[j]
            rest = [p for k, p in enumerate(pool) if k not in (i, j)]
            for op in "+-*/":
                if op == "-" and a < b or op == "/" and (b == 0 or a % b):
                    continue
                v = a + b if op == "+" else a - b if op == "-" else a * b if op == "*" else a // b
                c, h = blind([*rest, (v, (op, x, y))], target)
                chance += c / (len(pool) * (len(pool) - 1) * 4)
                hits |= h
    return chance, hits


def normal(tree):
    "Text of a tree that order and brackets do not change"
    if isinstance(tree, int):
        return str(tree)
    kind = "+-" if tree[0] in "+-" else "*/"

    def parts(t, sign):
        if isinstance(t, int) or t[0] not in kind:
            return [(sign, normal(t))]
        flip = {kind[0]: kind[1], kind[1]: kind[0]}
        return parts(t[1], sign) + parts(t[2], sign if t[0] == kind[0] else flip[sign])

    return "(" + " ".join(f"{s}{x}" for s, x in sorted(parts(tree, kind[0]))) + ")"


def oracle(p):
    chance, hits = blind([(n, n) for n in p.numbers], p.target)
    return len({normal(t) for t in hits}), float(chance)


# ---- solving in columns, difficulty


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.integers(2, 4), st.integers(1, 30), st.integers(0, 2**32))
def test_columns_agree_with_the_solver(k, top, seed):
    rng = np.random.default_rng(seed)
    X, T = rng.integers(1, top + 1, (k, 12)), rng.integers(0, 70, 12)
    assert solvable_many(X, T).tolist() == [solvable(x, t) for x, t in zip(X.T.tolist(), T.tolist())]


def test_columns_of_five_and_six_numbers():
    rng = np.random.default_rng(1)
    for k, n, top in ((5, 60, 99), (5, 30, 6), (6, 6, 99), (6, 6, 3)):
        X, T = rng.integers(1, top + 1, (k, n)), rng.integers(1, 99, n)
        assert solvable_many(X, T).tolist() == [solvable(x, t) for x, t in zip(X.T.tolist(), T.tolist())]
    assert solvable_many(np.array([[5, 5, 7, 2, 2]]).T, np.array([0])).all()  # zero times anything


@pytest.mark.parametrize(
    "numbers,target",
    [
        ((2, 3), 5),
        ((4, 2), 2),
        ((1, 2, 3), 6),
        ((5, 5, 5), 5),
        ((1, 1, 1), 9),
        ((3, 4, 5), 17),
        ((8, 8, 3, 3), 24),
        ((6, 6, 6, 6), 24),
        ((2, 3, 5, 7), 24),
        ((1, 2, 3, 4), 10),
        ((4, 4, 2, 2), 4),
        ((12, 7, 7, 3), 9),
        ((1, 1, 2, 2), 3),
        ((25, 50, 10, 3), 65),
    ],
)
def test_difficulty_is_what_brute_force_counts(numbers, target):
    p = Problem(numbers, target)
    solutions, chance = difficulty(p)
    want = oracle(p)
    assert solutions == want[0] and chance == pytest.approx(want[1], rel=1e-12)


def test_difficulty_of_drawn_problems():
    for p in sample_problems(25, 3, max_number=12, max_target=40) + sample_problems(30, 4, **MICRO):
        assert difficulty(p) == pytest.approx(oracle(p)), p
    five = Problem((2, 3, 3, 7, 11), 29)
    s, c = difficulty(five)
    assert s > 1 and 0 < c < 0.01 and difficulty(Problem(five.numbers[::-1], 29)) == (s, c)


def test_difficulty_filters():
    for p in sample_problems(60, 1, max_solutions=1, min_chance=0.001, **WIDE):
        s, c = difficulty(p)
        assert s == 1 and c >= 0.001
    assert all(difficulty(p)[0] >= 3 for p in sample_problems(20, 1, min_solutions=3, **WIDE))
    with pytest.raises(ValueError, match="min_solutions=900"):
        sample_problems(3, 0, min_solutions=900, **MICRO)


# ---- the stream


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(1, 5000), st.integers(0, 2**64 - 1))
def test_the_shuffle_is_one(n, key):
    i = np.arange(n, dtype=np.uint64)
    there = _permute(i, n, np.full(n, key, np.uint64))
    assert (
        sorted(there.tolist()) == list(range(n))
        and (_permute(there, n, np.full(n, key, np.uint64), back=True) == i).all()
    )


@pytest.mark.parametrize(
    "space",
    [
        dict(n_numbers=(2,), max_number=4, min_target=2, max_target=5),
        dict(n_numbers=(2, 3), weights=(1, 3), max_number=3, min_target=3, max_target=6),
    ],
)
def test_the_law_of_the_draw(space):
    """Count by weight, uniform target, then uniform numbers among those that make it.

    Chi-squared over the first problem of many seeds."""
    s, law, n = Space(**space), Counter(), 2500
    for k, share in s.shares.items():
        for t in range(s.min_target, s.max_target + 1):
            ok = [x for x in product(range(1, s.max_number + 1), repeat=k) if solvable(x, t)]
            for x in ok:
                law[Problem(x, t)] += share / (s.max_target - s.min_target + 1) / len(ok)
    seen = Counter(sample_problems(1, seed, **space)[0] for seed in range(n))
    chi = sum((seen[p] - n * w) ** 2 / (n * w) for p, w in law.items())
    assert set(seen) <= set(law) and chi < len(law) - 1 + 4 * (2 * len(law)) ** 0.5, chi


@pytest.mark.parametrize(
    "space", [WIDE, dict(split="eval", **WIDE), MICRO, dict(n_numbers=(2, 5), max_number=20, max_target=30)]
)
def test_a_stream_goes_on_from_its_state(space):
    whole = list(islice(Stream(Space(**space), 5), 700))
    stream = Stream(Space(**space), 5)
    got = []
    for _ in range(3):
        block = stream.draw()
        got += sorted(
            (s, Problem(x, t))
            for slots, X, T in block
            for s, x, t in zip(slots.tolist(), X.T.tolist(), T.tolist())
        )
    again = Stream(Space(**space), 5, json.loads(json.dumps(stream.state)))
    assert len(json.dumps(stream.state)) < 20_000
    assert [p for _, p in got] + list(islice(again, 700 - len(got))) == whole and len(
        {p.key for p in whole}
    ) == 700


def test_no_repeats_in_a_long_stream():
    ps = sample_problems(40_000, 2, **WIDE)
    assert len({p.key for p in ps}) == 40_000
    rng = np.random.default_rng(0)
    assert all(solvable(ps[i].numbers, ps[i].target) for i in rng.integers(0, 40_000, 200))
    share = Counter(len(p.numbers) for p in ps)[3] / 40_000
    targets = Counter(p.target for p in ps)
    assert abs(share - 0.5) < 0.01 and len(targets) == 90 and max(targets.values()) < 1.25 * 40_000 / 90


def test_exclusion_file(tmp_path):
    f = tmp_path / "known.txt"
    first = sample_problems(3, 0, **MICRO)
    f.write_text(
        "# seen elsewhere\n1 1 4 6\n[2, 3, 5]\n"
        + "\n".join(",".join(map(str, p.numbers[::-1])) for p in first)
        + "\n\n"
    )
    out = read_exclusions(f)
    assert out[:2] == [(1, 1, 4, 6), (2, 3, 5)]
    left = sample_problems(1500, 0, exclude=out, **MICRO)
    assert not {p.key[0] for p in left} & {p.key[0] for p in first}
    for text in ("1 2 x", "1", "1 -2 3", "²"):
        f.write_text(f"1 2 3\n{text}\n")
        with pytest.raises(ValueError, match="line 2"):
            read_exclusions(f)
    f.write_bytes(b"\xff\xfe1")
    with pytest.raises(ValueError, match="cannot be read"):
        read_exclusions(f)
    with pytest.raises(ValueError, match="cannot be read"):
        read_exclusions(tmp_path / "none.txt")


@pytest.mark.parametrize(
    "space,word",
    [
        (dict(n_numbers=6, max_number=10_000), "give at most"),
        (dict(n_numbers=3, max_number=10**18), "give at most"),
        (dict(n_numbers=(3, 3)), "once"),
        (dict(max_solutions=0), "max_solutions=0"),
        (dict(min_chance=0.5, max_chance=0.1), "min_chance=0.5"),
        (dict(min_solutions=0), "min_solutions=0"),
    ],
)
def test_spaces_that_cannot_be(space, word):
    with pytest.raises(ValueError, match=word):
        sample_problems(2, 0, **space)


# ---- writing


def rows(path):
    return pq.read_table(path).to_pylist()


def test_workers_change_nothing(tmp_path):
    a = write_problems(
        tmp_path / "a.parquet", 3_000, 7, Space(split="train", **WIDE), workers=1, progress=False
    )
    b = write_problems(
        tmp_path / "b.parquet", 3_000, 7, Space(split="train", **WIDE), workers=2, progress=False
    )
    assert rows(a) == rows(b) and sorted(os.listdir(tmp_path)) == ["a.parquet", "b.parquet"]
    ps = from_parquet(a)
    assert ps == sample_problems(3_000, 7, split="train", **WIDE) and {split_of(p) for p in ps} == {"train"}
    extra = [r["extra_info"] for r in rows(a)]
    assert [e["index"] for e in extra] == list(range(3_000)) and all(
        (e["solutions"], e["chance"]) == pytest.approx(difficulty(p)) for e, p in list(zip(extra, ps))[:100]
    )


def writes(path, n, seed):
    "A program that writes problems"
    return (
        "from stars.task.datasets import *; from stars.task.problems import SPACES; "
        f"write_problems({str(path)!r}, {n}, {seed}, SPACES['rl'], workers=1, progress=False)"
    )


def test_killed_and_started_again(tmp_path):
    "kill -9 while parts are written: the same file in the end, and what was drawn is not drawn again"
    want = write_problems(tmp_path / "want.parquet", 30_000, 1, SPACES["rl"], workers=1, progress=False)
    child = subprocess.Popen(
        [sys.executable, "-c", writes(tmp_path / "got.parquet", 30_000, 1)], stderr=subprocess.DEVNULL
    )

    def written():
        return sorted(tmp_path.glob(".got.parquet.*.parts/part-*.parquet"))

    while len(parts := written()) < 3 and child.poll() is None:
        time.sleep(0.005)
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert not (tmp_path / "got.parquet").exists() and len(parts) >= 3
    kept = {p: p.stat().st_mtime_ns for p in sorted(parts[0].parent.glob("part-*.parquet"))}
    with pytest.MonkeyPatch.context() as m:  # join nothing yet: look at the parts first
        m.setattr("stars.task.datasets._join", lambda parts, *_: list(parts))
        parts = write_problems(tmp_path / "got.parquet", 30_000, 1, SPACES["rl"], workers=1, progress=False)
    assert all(p.stat().st_mtime_ns == t for p, t in kept.items()) and len(parts) > len(kept)
    got = write_problems(tmp_path / "got.parquet", 30_000, 1, SPACES["rl"], workers=1, progress=False)
    assert rows(got) == rows(want) and sorted(os.listdir(tmp_path)) == ["got.parquet", "want.parquet"]


def test_writing_more_than_there_is(tmp_path):
    with pytest.raises(ValueError, match="there are only 1682"):
        write_problems(tmp_path / "a.parquet", 5_000, 0, Space(**MICRO), progress=False)
    assert os.listdir(tmp_path) == []
    with pytest.raises(ValueError, match="n=-1"):
        write_problems(tmp_path / "a.parquet", -1, 0)
    assert (
        write_problems(tmp_path / "none.parquet", 0, 0, progress=False)
        and from_parquet(tmp_path / "none.parquet") == []
    )


def test_what_another_call_wrote_is_not_overwritten(tmp_path):
    f = write_problems(tmp_path / "a.parquet", 50, 0, Space(**MICRO), progress=False)
    before = f.read_bytes()
    for kw in (dict(seed=1), dict(layout=Layout("chat")), dict(layout=Layout(difficulty=False))):
        with pytest.raises(ValueError, match="made with other settings"):
            write_problems(f, 50, **{"seed": 0, "space": Space(**MICRO), "progress": False, **kw})
    assert f.read_bytes() == before


# ---- reading

VERL = dict(
    data_source="countdown",
    prompt=[dict(role="user", content="…")],
    ability="math",
    extra_info=dict(split="train", index=0),
    reward_model=dict(style="rule", ground_truth=dict(target=12, numbers=[3, 4, 5])),
)


def test_reading_what_others_wrote(tmp_path):
    lines = [
        dict(nums=[3, 4, 5], target=17),
        VERL,
        dict(numbers=[5, 4, 3], target=17),
        dict(nums=[1, 1, 1], target=9),
        dict(nums=[0, 4], target=4),
        dict(nums=[-3, 4], target=1),
        dict(nums=[3.5, 4], target=1),
        dict(nums="34", target=7),
        dict(target=7),
        dict(nums=[3, 4]),
        [1, 2],
        "text",
        None,
        dict(nums=[7], target=7),
        dict(nums=[1] * 7, target=7),
        dict(nums=[10**18, 2], target=3),
        dict(nums=[2, 3], target=True),
        dict(nums=[6, 7], target=42),
    ]
    f = tmp_path / "a.jsonl"
    f.write_bytes(
        "\n".join(map(json.dumps, lines)).encode() + b'\n{"nums": [1,\n\xff\xfe\n' + b"[" * 100_000 + b"\n\n"
    )
    ps, report = read_problems(f)
    assert ps == [Problem((3, 4, 5), 17), Problem((3, 4, 5), 12), Problem((6, 7), 42)]
    assert (
        report.read == 21 and report.kept == 3 and report.kept + sum(report.dropped.values()) == report.read
    )
    for reason in (
        "seen before",
        "no solution in whole numbers",
        "not JSON in UTF-8",
        "numbers too large for exact arithmetic",
        "fewer than 2 or more than 6 numbers",
    ):
        assert report.dropped[reason], reason
    assert report.dropped["not JSON in UTF-8"] == 3 and report.dropped["column nums is below 1"] == 2
    assert "line 5" in str(report) and "3 of 21" in str(report)


def test_reading_records_stored_as_json(tmp_path):
    truth = dict(target=12, numbers=[3, 4, 5])

    def row(truth):
        return VERL | dict(reward_model=dict(style="rule", ground_truth=truth))

    lines = [
        row(json.dumps(truth)),
        json.dumps(row(truth | dict(target=17))),
        row("12"),
        row('{"target"'),
        row(json.dumps([3, 4])),
    ]
    lines += [VERL | dict(reward_model=json.dumps(dict(ground_truth=truth | dict(target=23))))]
    f = tmp_path / "a.jsonl"
    f.write_text("\n".join(map(json.dumps, lines)))
    ps, report = read_problems(f)
    assert ps == [Problem((3, 4, 5), 12), Problem((3, 4, 5), 23)]
    assert report.dropped == {"not a record": 1, "column reward_model.ground_truth is not a record": 3}


def test_reading_folders_spaces_and_the_hub(tmp_path, monkeypatch):
    ps = sample_problems(200, 0, **WIDE)
    to_parquet(ps[:150], tmp_path / "d/a.parquet")
    (tmp_path / "d/b.jsonl").write_text(
        "\n".join(json.dumps(dict(nums=p.numbers, target=p.target)) for p in ps[100:])
    )
    got, report = read_problems(tmp_path / "d")
    assert got == ps and report.dropped == {"seen before": 50}
    got, report = read_problems(tmp_path / "d", space=Space(split="eval", n_numbers=3, **WIDE))
    assert got == [p for p in ps if len(p.numbers) == 3 and split_of(p) == "eval"] and set(
        report.dropped
    ) == {"seen before", "outside the space", "in another split, or excluded"}
    import huggingface_hub.constants

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    (tmp_path / "org/set").mkdir(parents=True)
    (tmp_path / "org/set/train.jsonl").write_text(
        "\n".join(json.dumps(dict(nums=p.numbers, target=p.target)) for p in ps)
    )
    got, report = read_problems("hub:org/set")
    assert got == ps and report.source == "hub:org/set"
    with pytest.raises(ValueError, match="hub:org/set, split .nope."):
        read_problems("hub:org/set", "nope")
    with pytest.raises(ValueError, match="hub:org/absent"):
        read_problems("hub:org/absent")


def test_sources_that_are_none(tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        read_problems(tmp_path / "none")
    with pytest.raises(ValueError, match="holds no"):
        read_problems(tmp_path)
    (tmp_path / "a.csv").write_text("1")
    with pytest.raises(ValueError, match="unknown kind of file '.csv'"):
        read_problems(tmp_path / "a.csv")
    (tmp_path / "b.parquet").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match="b.parquet is not a complete parquet file"):
        read_problems(tmp_path / "b.parquet")
    pq.write_table(pa.table(dict(x=[1])), tmp_path / "c.parquet")
    with pytest.raises(ValueError, match="is missing"):
        read_problems(tmp_path / "c.parquet")


def test_two_processes_one_file(tmp_path):
    program = [sys.executable, "-c", writes(tmp_path / "a.parquet", 12_000, 3)]
    both = [subprocess.Popen(program, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    said = [p.communicate(timeout=600)[1] for p in both]
    assert [p.returncode for p in both] == [0, 0], said
    assert os.listdir(tmp_path) == ["a.parquet"] and len(from_parquet(tmp_path / "a.parquet")) == 12_000


# ---- what a reviewer broke


def test_exclusions_in_any_form():
    ps = sample_problems(100, 0)
    for out in (
        ps,
        frozenset(ps),
        {p.key for p in ps},
        frozenset(p.numbers for p in ps),
        tuple(p.numbers[::-1] for p in ps),
    ):
        assert not set(p.key for p in sample_problems(100, 0, exclude=out)) & {p.key for p in ps}
    assert not allows(Space(exclude=frozenset({(5, 4, 3)})), Problem((3, 4, 5), 17))
    for bad in (7, None, "x", [(3, 4.5)]):
        with pytest.raises(ValueError, match="exclude"):
            Space(exclude=bad)


def test_limits_hold_wherever_problems_come_from(tmp_path):
    space = Space(max_solutions=1, **MICRO)
    drawn = {p.key for p in Stream(space, 0)}
    assert drawn == {p.key for p in all_problems(space)} and len(drawn) < 1682
    (tmp_path / "a.jsonl").write_text(
        "\n".join(json.dumps(dict(nums=p.numbers, target=p.target)) for p in all_problems(Space(**MICRO)))
    )
    got, report = read_problems(tmp_path / "a.jsonl", space=space)
    assert {p.key for p in got} == drawn and report.dropped == {
        "easier or harder than wanted": 1682 - len(drawn)
    }
    assert read_problems(
        tmp_path / "a.jsonl", space=Space(n_numbers=(3, 4), weights=(0, 1), max_number=12, max_target=30)
    )[1].dropped == {"outside the space": 1682}


def test_negative_targets_and_refusals(tmp_path):
    assert not solvable_many(np.array([[1], [4]]), np.array([-3])).any() and difficulty(
        Problem((1, 4), -3)
    ) == (0, 0.0)
    rows = (
        '{"nums": [1,4], "target": -3}',
        '{"reward_model": {"ground_truth": {"numbers": [1,2], "target": 3}}, "prompt": 5}',
        f'{{"nums": [1,2], "target": -1{"0" * 400}}}',
    )
    (tmp_path / "a.jsonl").write_text("\n".join(rows))
    got, report = read_problems(tmp_path / "a.jsonl")
    assert not got and report.dropped["targets below 1"] == 2 and sum(report.dropped.values()) == 3
    for p in (Problem((5,), 5), Problem((1,) * 7, 7), Problem((0, 5), 5), Problem((10**9, 10**9), 5)):
        with pytest.raises(ValueError):
            difficulty(p)


@pytest.mark.parametrize(
    "space",
    [
        dict(n_numbers=(2, 3, 4, 5), max_number=1, min_target=1, max_target=20),
        dict(n_numbers=(3, 4), max_number=3, min_target=1, max_target=40),
        dict(n_numbers=(2, 6), weights=(1, 0), max_number=9, min_target=1, max_target=90),
    ],
)
def test_a_small_space_is_searched_to_its_end(space):
    assert {p.key for p in Stream(Space(**space), 3)} == {p.key for p in all_problems(Space(**space))}


def test_short_lists_are_shuffled_fairly():
    "every order of five things is as likely as any other"
    keys = np.random.default_rng(0).integers(0, 2**63, 24_000).astype(np.uint64)
    orders = Counter(
        tuple(_permute(np.arange(5, dtype=np.uint64), 5, np.full(5, k, np.uint64)).tolist()) for k in keys
    )
    chi = sum((orders[o] - 200) ** 2 / 200 for o in orders)
    assert len(orders) == 120 and chi < 119 + 4 * (2 * 119) ** 0.5


def test_a_barren_space_is_given_up_soon():
    small = dict(n_numbers=4, min_number=95, max_number=99, min_target=5, max_target=6)
    large = dict(n_numbers=3, min_number=2_000, max_number=3_000, min_target=11, max_target=400)
    with tuples_at_most(2 * 5**4), pytest.raises(ValueError, match="only 0"):  # each tuple for both targets
        sample_problems(1, 0, min_solutions=50, **small)
    with tuples_at_most(4_000_000), pytest.raises(ValueError, match="found only"):  # of 390 thousand million
        sample_problems(3, 0, min_solutions=50, **large)


def test_whole_numbers_of_any_type():
    assert sample_problems(np.int64(3), np.int64(1), max_number=np.int64(12), n_numbers=3) == sample_problems(
        3, 1, max_number=12, n_numbers=3
    )
    for kw in (dict(n=True), dict(seed=True), dict(n=1.5), dict(seed="x")):
        with pytest.raises(ValueError, match="give a whole number"):
            sample_problems(**{"n": 1, "seed": 0, **kw})


def test_settings_are_checked_before_anything_is_written(tmp_path):
    for kw in (dict(seed="x"), dict(workers=-1), dict(workers="2"), dict(n=-1), dict(layout=Layout("nope"))):
        with pytest.raises(ValueError):
            write_problems(tmp_path / "a.parquet", **{"n": 5, "seed": 0, **kw})
    assert os.listdir(tmp_path) == []
    empty = write_problems(tmp_path / "none.parquet", 0, 0, progress=False)
    assert pq.read_schema(empty).field("extra_info").type.get_field_index("solutions") >= 0 and os.listdir(
        tmp_path
    ) == ["none.parquet"]


def test_damage(tmp_path):
    whole = to_parquet(sample_problems(200, 0, **WIDE), tmp_path / "d/a.parquet")
    data = bytearray(whole.read_bytes())
    data[4:400] = b"x" * 396
    (tmp_path / "d/b.parquet").write_bytes(data)
    (tmp_path / "d/c.parquet").mkdir()
    (tmp_path / "d/.x.parts").mkdir()
    (tmp_path / "d/.x.parts/part-000000.parquet").write_bytes(b"")
    got, report = read_problems(tmp_path / "d")
    assert len(got) == 200 and report.dropped["a file that cannot be read"] == 1
    for read in (from_parquet, read_problems):
        with pytest.raises(ValueError, match="b.parquet is damaged"):
            read(tmp_path / "d/b.parquet")
    (tmp_path / "e.jsonl").write_bytes(
        b'\xef\xbb\xbf{"nums": [3,4], "target": 7}\n{"nums": "' + b"x" * 10**6 + b'"}'
    )
    got, report = read_problems(tmp_path / "e.jsonl")
    assert got == [Problem((3, 4), 7)] and len(str(report)) < 1000


def test_parts_that_cannot_be_removed_are_no_failure(tmp_path, monkeypatch):
    "The file is whole; what stays beside it goes when the same file is asked for again"

    def write():
        return write_problems(
            tmp_path / "x.parquet", 5, space=Space(n_numbers=(3,)), workers=1, progress=False
        )

    def fails(*args, **how):
        raise OSError("a disk that fails for a moment")

    with monkeypatch.context() as patch:
        patch.setattr(os, "rmdir", fails)
        before = write().read_bytes()
    assert len(from_parquet(tmp_path / "x.parquet")) == 5 and list(tmp_path.glob(".*.parts"))
    assert write().read_bytes() == before and not list(tmp_path.glob(".*.parts"))

"Where figures take their numbers from: published files, their defects, studies, claims and verdicts"

import hashlib
import io
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from stars.habits.behaviors import HABITS
from stars.show import claims, sources
from stars.show.claims import CLAIMS, effect, replication, replication_table, verdict
from stars.show.figures import controls, dynamics
from stars.show.plots import figure_text, invented, save_figure, summary_table
from stars.show.sources import FILES, Study, footnotes, published_file, published_results, read_published

COLUMNS = [
    "condition",
    "step",
    *(f"{k}_{h.column}" for k in ("avg", "total") for h in HABITS),
    "accuracy",
    "response_length",
]


def line(condition, step=0, accuracy=0.5, habits=1.0, judged=200, length=100.0):
    return [condition, step, *[habits] * 4, *[habits * judged] * 4, accuracy, length]


def csv(path, *lines):
    pd.DataFrame(lines, columns=COLUMNS).to_csv(path, index=False)
    return path


@pytest.fixture
def folder(tmp_path):
    "Files of the published shape, with made-up numbers"
    csv(
        tmp_path / "llama_results.csv",
        *(
            line(c, s, round((a * s / 250 + 0.01) * 1024) / 1024)
            for c, a in dict(
                base_ppo=0.3,
                dots=0.3,
                empty_cot=0.4,
                backtracking_verification=0.7,
                all_strategies=0.7,
                no_positive_all_strategies=0.7,
                owmathqa2_ppo=0.5,
                owmathqa_none_ppo1=0.3,
            ).items()
            for s in (0, 100, 250)
        ),
        line("base_70b", 0, 0.2),
    )
    csv(
        tmp_path / "qwen_results.csv",
        *(
            line(c, s, round((a * s / 250 + 0.01) * 1024) / 1024)
            for c, a in dict(base_ppo=0.5, dots=0.3).items()
            for s in (0, 100, 250)
        ),
    )
    return tmp_path


# ---- the published files


def test_repeated_rows_count_once_and_contradicting_ones_not_at_all(tmp_path):
    path = csv(tmp_path / "x.csv", line("human_cot"), line("human_cot"), line("base_ppo"))
    assert list(read_published(path, "m").condition) == ["base", "human_cot"]
    csv(path, line("human_cot", 10, 0.5), line("human_cot", 10, 0.6))
    with pytest.raises(ValueError, match="human_cot, step 10 is there twice, with different numbers"):
        read_published(path, "m")


def test_judged_completions_come_from_totals(tmp_path):
    r = read_published(
        csv(
            tmp_path / "x.csv",
            line("base_ppo", 0, judged=200, habits=0.335),
            line("base_ppo", 10, judged=1024, habits=0.1),
            line("base_ppo", 20, habits=0.0),
        ),
        "m",
    )
    assert list(r.judged.fillna(-1)) == [200, 1024, -1] and set(r.n) == {1024}
    assert "gpt-4o-mini in 200 of 1,024 completions" in figure_text(dynamics(r), "caption")


def test_accuracy_is_a_share_of_what_was_drawn(tmp_path):
    r = read_published(
        csv(
            tmp_path / "x.csv",
            line("base_ppo", 0, 123 / 1024),
            line("base_ppo", 10, 107 / 200),
            line("base_ppo", 20, 0.5),
        ),
        "m",
    )
    assert list(r.n) == [1024, 200, 1024]
    with pytest.raises(ValueError, match="accuracy 0.1234567 of base, step 0 is a share of neither"):
        read_published(csv(tmp_path / "x.csv", line("base_ppo", 0, 0.1234567)), "m")


@pytest.mark.parametrize(
    "text,said",
    [
        ("a,b\n1,2\n", "lacks the columns condition, step"),
        ("", "is no CSV"),
        (
            ",".join(COLUMNS) + "\n" + ",".join(map(str, line("base", "ten"))) + "\n",
            "column step holds something that is no number",
        ),
    ],
)
def test_another_schema_is_told(tmp_path, text, said):
    (path := tmp_path / "x.csv").write_text(text)
    with pytest.raises(ValueError, match=said):
        read_published(path, "m")


def test_files_are_fetched_once_and_checked(tmp_path, monkeypatch):
    asked, data = [], b"condition,step\n"

    def urlopen(url, timeout):
        return asked.append(url) or io.BytesIO(data)

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(sources.urllib.request, "urlopen", urlopen)
    with pytest.raises(OSError, match="arrived with SHA-256"):
        published_file("qwen_results.csv")
    assert not list(tmp_path.rglob("*.csv"))
    monkeypatch.setitem(FILES, "qwen_results.csv", (hashlib.sha256(data).hexdigest(), "Q"))
    assert (
        published_file("qwen_results.csv").read_bytes() == data
        and published_file("qwen_results.csv").exists()
    )
    assert len(asked) == 2 and asked[0].endswith(
        "/results/qwen_results.csv"
    )  # the second call found the file

    def offline(url, timeout):
        raise OSError("no route to host")

    monkeypatch.setattr(sources.urllib.request, "urlopen", offline)
    with pytest.raises(
        OSError, match="llama_results.csv cannot be fetched .no route to host.; .*published=FOLDER"
    ):
        published_file("llama_results.csv")
    with pytest.raises(FileNotFoundError, match="has no llama_results.csv"):
        published_file("llama_results.csv", tmp_path)


def test_a_cached_file_is_checked_whenever_it_is_read(tmp_path, monkeypatch):
    "What was damaged, cut or edited in the cache is fetched again, and never drawn"
    good, asked = b"condition,step\n", []
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setitem(FILES, "qwen_results.csv", (hashlib.sha256(good).hexdigest(), "Q"))

    def urlopen(url, timeout):
        return asked.append(url) or io.BytesIO(good)

    monkeypatch.setattr(sources.urllib.request, "urlopen", urlopen)
    path = published_file("qwen_results.csv")
    for bad in (good[:-1], b"Condition,step\n", b"", good + b"1,2\n"):
        path.write_bytes(bad)
        assert published_file("qwen_results.csv") == path and path.read_bytes() == good
    # a good one is not
    assert len(asked) == 5 and published_file("qwen_results.csv").read_bytes() == good and len(asked) == 5

    def offline(url, timeout):
        raise OSError("no route to host")

    monkeypatch.setattr(sources.urllib.request, "urlopen", offline)
    assert published_file("qwen_results.csv") == path
    path.write_bytes(b"changed")
    for read in (
        lambda: published_file("qwen_results.csv"),
        lambda: published_results(["Q"]),
        lambda: sources.published_manifest(["Q"]),
    ):
        with pytest.raises(
            OSError,
            match=r"qwen_results.csv is damaged .SHA-256 .*expected .*, and .* "
            r"cannot be fetched .no route to host.; .*published=FOLDER",
        ):
            read()

    def cut(url, timeout):
        raise sources.HTTPException("connection broken")

    monkeypatch.setattr(sources.urllib.request, "urlopen", cut)
    with pytest.raises(OSError, match="connection broken"):
        published_file("qwen_results.csv")
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "qwen_results.csv").write_text("mine")
    # a folder of one's own is one's own affair
    assert published_file("qwen_results.csv", tmp_path / "own").read_text() == "mine"


PUBLISHED = Path(__file__).resolve().parents[3] / "shared" / "upstream_results"
LAST = {  # as printed in the paper's table
    "Llama-3.2-3B": dict(
        base=0.338,
        all_strategies=0.736,
        backtracking_backward=0.773,
        only_backtracking=0.769,
        backtracking_verification=0.774,
        backtracking_subgoal=0.706,
        incorrect_only=0.735,
        empty_cot=0.410,
        dots=0.381,
        human_cot=0.563,
        curated=0.489,
        negated=0.368,
        base_70b=0.220,
    ),
    "Qwen-2.5-3B": dict(
        base=0.535,
        all_strategies=0.773,
        backtracking_backward=0.757,
        only_backtracking=0.728,
        backtracking_verification=0.723,
        backtracking_subgoal=0.716,
        incorrect_only=0.746,
        empty_cot=0.405,
        dots=0.327,
        human_cot=0.556,
    ),
}


@pytest.mark.skipif(not PUBLISHED.is_dir(), reason="the published CSVs are not part of this repository")
def test_published_results_read_as_printed():
    every = published_results(folder=PUBLISHED)
    for model, want in LAST.items():
        r = every[every.model == model]
        assert not r.duplicated(["condition", "step"]).any()
        last = summary_table(r).accuracy_last.droplevel("model")
        assert set(last.index) == set(want)
        for c, v in want.items():
            assert last[c] == pytest.approx(v, abs=6e-4), c
    note = footnotes(every)
    assert (
        "Qwen-2.5-3B" in note
        and "all strategies and backtracking + backward" in note
        and "backtracking + verification and only backtracking" in note
        and "Llama" not in note
    )
    for name, (sha, _) in FILES.items():
        assert hashlib.sha256((PUBLISHED / name).read_bytes()).hexdigest() == sha


# ---- studies


def test_a_study_of_published_results_is_drawn_like_any_other(folder):
    s = Study(
        models=["plain", "rich"], conditions=["base", "dots"], source="published", published=str(folder)
    )
    r = s.results()
    assert (
        s.place == "published"
        and set(r.model) == {"Llama-3.2-3B", "Qwen-2.5-3B"}
        and set(r.condition) == {"base", "dots"}
    )
    assert set(s.manifest()["published"]["files"]) == set(FILES)
    controls(r)
    assert set(
        Study(models=["rich"], conditions=["base"], source="published", published=str(folder)).results().model
    ) == {"Qwen-2.5-3B"}
    assert set(
        Study(models=["someone/else"], conditions=["base"], source="published", published=str(folder))
        .results()
        .model
    ) == {"Llama-3.2-3B", "Qwen-2.5-3B"}
    assert (
        Study(conditions=["base"], source="published", published=str(folder), steps=100).results().step.max()
        == 100
    )
    with_70b = Study(
        conditions=["base"], source="published", published=str(folder), only_published=["base_70b"]
    ).results()
    assert set(with_70b.condition) == {"base", "base_70b"}
    rich = Study(
        conditions=["curated"], references=["rich"], source="published", published=str(folder)
    ).results()
    assert set(rich.model) == {"Llama-3.2-3B"} and rich[
        rich.condition == "rich_base"
    ].accuracy.max() == pytest.approx(0.51, abs=1e-3)
    with pytest.raises(ValueError, match="the published results of Llama-3.2-3B have none of them"):
        Study(
            models=["x/y"], conditions=["negative_control"], source="published", published=str(folder)
        ).results()
    assert "rich_base" not in set(
        Study(conditions=["base"], references=["smollm2"], source="published", published=str(folder))
        .results()
        .condition
    )
    about = Study(
        conditions=["curated"], references=["rich"], source="published", published=str(folder)
    ).manifest()
    assert set(about["published"]["files"]) == set(FILES) and "config" not in about and "seeds" not in about
    with pytest.raises(ValueError, match="the published results of Qwen-2.5-3B have none of them"):
        Study(models=["rich"], conditions=["curated"], source="published", published=str(folder)).results()


def test_wrong_studies_are_refused_before_anything_runs():
    for bad, said in (
        (dict(source="paper"), "source='paper' must be own, published or both"),
        (dict(steps=-1), "steps=-1"),
        (dict(shares=[2]), "shares: 2"),
        (dict(preset="cpus"), "preset='cpus' is unknown"),
        (dict(overrides={"ppo.stepz": 1}), "'ppo.stepz' is not a field"),
        (dict(source="pulished"), "did you mean published"),
        (dict(steps=True), "steps=True"),
        (dict(steps="3"), "steps='3'"),
        (dict(overrides=3), "overrides=3 must name"),
        (dict(models="rich"), "models='rich' must be a list"),
        (dict(models=[3]), "models: 3 must be a text"),
        (dict(models=[]), "models is empty"),
        (dict(seeds=3), "seeds=3 must be a list"),
        (dict(seeds=[0, 0]), "seeds: 0 is there twice"),
        (dict(seeds=[-1]), "seed=-1"),
        (dict(seeds=[0.5]), "seed=0.5"),
        (dict(seeds=["0"]), "seed='0'"),
        (dict(seeds=[True]), "seed=True"),
        (dict(conditions=["dotz"]), "did you mean dots"),
        (dict(conditions={}), "conditions={} must be a list"),
        (dict(references=["rich", "rich"]), "'rich' is there twice"),
        (dict(shares=["a"]), "shares: 'a' must be a number"),
        (dict(shares=[float("nan")]), "shares: nan"),
        (dict(runs=3), "runs=3 must be a text"),
        (dict(models=[".."]), "model='..'"),
    ):
        with pytest.raises(ValueError, match=said):
            Study(**bad)


# ---- claims


def cell(values, condition="base", family="plain", n=400):
    return pd.DataFrame(
        [
            dict(
                family=family,
                condition=condition,
                seed=s,
                step=t,
                n=n,
                accuracy=v * t / 10,
                avg_verifications=1.0 + t / 10 * (v > 0.3),
                avg_backtracking=0.0,
                avg_subgoals=1.0 - t / 10,
                avg_backwards=1.0,
            )
            for s, v in enumerate(values)
            for t in (0, 10)
        ]
    )


def test_claims_cover_the_arguments_of_the_paper_once():
    assert len({c.name for c in CLAIMS}) == len(CLAIMS) == len({c.says for c in CLAIMS})
    assert {c for claim in CLAIMS for _, c in (*claim.plus, *claim.minus)} >= {
        "base",
        "dots",
        "empty_cot",
        "incorrect_only",
        "curated",
        "negated",
        *claims.MIXED,
    }


def test_more_seeds_or_problems_narrow_the_interval_and_luck_does_not():
    def wide(e):
        return e["hi"] - e["lo"]

    def pair_of(a, b, n=400):
        return effect(pd.concat([cell(a, family="rich", n=n), cell(b, n=n)]), CLAIMS[0])

    few, many = (
        pair_of([0.5, 0.6, 0.55], [0.3, 0.35, 0.2]),
        pair_of([0.5, 0.6, 0.55] * 4, [0.3, 0.35, 0.2] * 4),
    )
    assert few["value"] == pytest.approx(many["value"]) == pytest.approx(0.55 - 0.85 / 3) and wide(
        many
    ) < wide(few)
    assert wide(pair_of([0.5], [0.3], 4000)) < wide(pair_of([0.5], [0.3], 400))
    alike = wide(pair_of([0.5] * 3, [0.3] * 3))
    assert alike == pytest.approx(
        2 * 1.96 * ((0.25 + 0.21) / 400 / 3) ** 0.5, rel=0.01
    )  # no spread at all: the binomial error remains


def test_a_claim_reads_gains_and_fades():
    by = {c.name: c for c in CLAIMS}
    r = pd.concat(
        [
            cell([0.5, 0.5], "backtracking_verification"),
            cell([0.5, 0.5], "all_strategies"),
            cell([0.2, 0.2], family="rich"),
        ]
    )
    assert (
        effect(r, by["kept"])["value"] == pytest.approx(1.0)
        and effect(r, by["fading"])["value"] == pytest.approx(1.0)
        and effect(r, by["amplified"])["value"] == pytest.approx(0.0)
    )
    assert (
        verdict(by["amplified"], effect(r, by["amplified"])) == "no interval"
        and verdict(by["gap"], effect(r, by["gap"])) == "not run"
    )


@pytest.mark.skipif(not PUBLISHED.is_dir(), reason="the published CSVs are not part of this repository")
def test_the_published_results_show_what_the_paper_says():
    r = replication(dict(published=claims.published_rows(PUBLISHED))).set_index("claim")
    assert r.value["gap"] == pytest.approx(0.197, abs=2e-3) and r.value["curated"] == pytest.approx(
        0.121, abs=2e-3
    )
    assert set(r.verdict[["gap", "primed_rich", "mixes", "empty_cot", "dots", "incorrect", "curated"]]) == {
        "shown"
    } and set(r.verdict[["amplified", "kept", "fading"]]) == {"no interval"}
    assert (
        "+.41"
        in replication_table(r.reset_index()).loc["priming with habits lifts where PPO ends", "published"]
    )


def test_missing_habits_are_not_zero():
    by = {c.name: c for c in CLAIMS}
    r = pd.concat([cell([0.5], family="rich"), cell([0.3])]).assign(avg_verifications=np.nan)
    assert verdict(by["base_habits"], effect(r, by["base_habits"])) == "no interval" and np.isnan(
        effect(r, by["base_habits"])["value"]
    )


def test_single_runs_are_called_so():
    table = replication_table(
        replication(
            dict(
                one=pd.concat([cell([0.6], family="rich", n=1000), cell([0.3], n=1000)]),
                three=pd.concat([cell([0.6, 0.59, 0.61], family="rich"), cell([0.3, 0.31, 0.29])]),
            )
        )
    )
    row = table.loc["under the same PPO, the base with habits ends higher"]
    assert row.one.endswith("shown (one run)") and row.three.endswith("shown")


# ---- a table that was saved with a figure


@pytest.fixture
def saved(tmp_path):
    "A figure of two conditions and two seeds, as `save_figure` leaves it"
    rows = invented(np.random.default_rng(0), dict(base=(0.1, 0.3), dots=(0.1, 0.35)), (0, 1), "plain")
    rows = rows.assign(source="cpu")
    runs = dict(commit="abc", hardware=dict(cpus=64), config=dict(steps=7), seeds=[0, 1])
    return save_figure(plt.figure(figsize=(1, 1)), "fig", rows, tmp_path, runs, dpi=20)


def from_table(saved, **more):
    return Study(conditions=["base", "dots"], table=str(saved["csv"]), **more)


def test_a_figure_is_drawn_again_from_its_table(saved, tmp_path):
    "Nothing is run, every number is the same, and the manifest tells runs from drawing"
    study = from_table(saved, seeds=[0, 1])
    assert study.jobs() == []
    rows = study.results()
    assert set(rows.seed) == {0, 1}
    one = from_table(saved, seeds=[1])
    assert set(one.results().seed) == {1} and one.manifest()["seeds"] == [1]
    about = study.manifest()
    assert (about["commit"], about["hardware"], about["config"]) == ("abc", dict(cpus=64), dict(steps=7))
    assert about["seeds"] == [0, 1] and about["drawn"]["commit"] != "abc"
    again = save_figure(plt.figure(figsize=(1, 1)), "fig", rows, tmp_path / "again", about, dpi=20)
    assert again["csv"].read_bytes() == saved["csv"].read_bytes()
    twice = from_table(again).manifest()
    assert twice["commit"] == "abc" and twice["drawn"] == about["drawn"]


def test_rows_that_are_measured_beside_a_table_have_a_commit_of_their_own(saved, tmp_path):
    about = from_table(saved).manifest(added=["gap"])
    [later] = about["added"]
    assert about["commit"] == "abc" and later["what"] == "gap" and later["commit"] == about["drawn"]["commit"]
    rows = pd.read_csv(saved["csv"])
    again = save_figure(plt.figure(figsize=(1, 1)), "fig", rows, tmp_path / "again", about, dpi=20)
    assert from_table(again).manifest()["added"] == [later]


def test_a_saved_table_stands_beside_published_results(saved, folder):
    rows = from_table(saved, source="both", published=str(folder)).results()
    assert set(rows.source) == {"cpu", "published"}
    assert (
        len(Study(conditions=["base"], table=str(saved["csv"])).results())
        == len(rows[rows.source == "cpu"]) / 2
    )


@pytest.mark.parametrize(
    "how, said",
    [
        (dict(preset="smoke"), "has rows of cpu; give preset=cpu"),
        (dict(conditions=["base", "curated"]), "has no rows of condition curated"),
        (dict(models=["rich"]), "has no rows of model rich"),
        (dict(shares=[0, 0.1]), "lacks the columns share"),
        (dict(seeds=[0, 7]), "has no rows of seed 7"),
        (dict(steps=5), "was measured before: leave out steps=5, or the table"),
        (dict(overrides={"ppo.lr": 1e-3}), "leave out overrides="),
    ],
)
def test_a_table_of_something_else_is_refused(saved, how, said):
    with pytest.raises(ValueError, match=said):
        Study(**dict(conditions=["base"], table=str(saved["csv"])) | how).results()


def test_a_table_without_its_manifest_or_with_another_is_refused(saved):
    study = from_table(saved)
    with pytest.raises(ValueError, match="use source=own or both"):
        from_table(saved, source="published")
    with open(saved["csv"], "a") as f:
        f.write("\n")
    with pytest.raises(ValueError, match="is not what fig.json describes"):
        study.manifest()
    saved["json"].unlink()
    with pytest.raises(FileNotFoundError, match="fig.json is missing"):
        study.manifest()
    saved["csv"].unlink()
    with pytest.raises(FileNotFoundError, match="is no file; give a CSV"):
        study.results()

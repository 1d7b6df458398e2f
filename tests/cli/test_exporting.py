"The data set of finished runs: nothing changes on the way, everything is explained, others can load it"

import json
import re
import shutil
import time

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stars.cli import exporting
from stars.cli import main as cli
from stars.habits.behaviors import HABIT_NAMES
from stars.habits.summaries import read_results, summarize
from stars.lab.stages import write_manifest
from stars.models.checkpoints import BASES, base_path, weights_digest


def responses(condition, seed, step, n=6, **more):
    rows = [
        dict(
            model="plain",
            condition=condition,
            seed=seed,
            step=step,
            index=i,
            prompt="using",
            generated="é " * i,
        )
        | dict(response_tokens=i, truncated=False, score=float(i < step), numbers=[1, 2, 3], target=6)
        | dict.fromkeys(HABIT_NAMES, i)
        | more
        for i in range(n)
    ]
    return pd.DataFrame(rows)


def fill(folder, name, config, inputs):
    folder.mkdir(parents=True)
    write_manifest(folder, name, config, inputs, time.time())


def add_job(store, condition="dots", seed=0, lr=0.1, kind="eval", key="0123456789", **more):
    "A job that has been trained and asked, with weights of four bytes"
    job = store / "plain" / condition / f"seed{seed}"
    sft, rl = job / "sft-aaaaaaaaaa", job / f"ppo-{key}"
    if not sft.exists():
        fill(sft, "sft", dict(sft=dict(lr=0.5), seed=seed), dict(base=weights_digest(base_path("plain"))))
        (sft / "model").mkdir()
        (sft / "model" / "model.safetensors").write_bytes(f"{condition}{seed}".encode())
    if not rl.exists():
        fill(rl, "ppo", dict(ppo=dict(lr=lr), seed=seed), dict(start=weights_digest(sft / "model")))
    out = job / f"{kind}-{key}"
    fill(out, kind, dict(eval=dict(samples=1), seed=seed), dict(ppo=rl.name))
    parts = [responses(condition, seed, step, **more) for step in (0, 3)]
    for step, part in zip((0, 3), parts):
        part.to_parquet(out / f"completions-step-{step:04d}.parquet")
    if kind == "eval":
        summarize(pd.concat(parts)).to_csv(out / "results.csv", index=False)
    return out


@pytest.fixture
def store(tmp_path):
    store = tmp_path / "runs" / "cpu"
    add_job(store)
    add_job(store, seed=1)
    add_job(store, "base")
    add_job(store, kind="draws", key="9999999999")
    return store


def everything(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_others_load_what_the_run_store_holds(store, tmp_path, monkeypatch):
    "`datasets` and pandas are the oracles: each table of the card loads, with the numbers of the store"
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    rows = exporting.export_runs(store, tmp_path / "out", completions=True)
    out = str(tmp_path / "out")
    assert datasets.get_dataset_config_names(out) == [*rows] == ["results", "runs", "completions", "draws"]
    loaded = {n: datasets.load_dataset(out, n, split="train").to_pandas() for n in rows}
    assert {n: len(t) for n, t in loaded.items()} == rows
    assert datasets.load_dataset(out)["train"].num_rows == rows["results"]  # what the Hub shows first
    kept = pd.concat([read_results(p) for p in sorted(store.rglob("results.csv"))], ignore_index=True)
    pd.testing.assert_frame_equal(loaded["results"][[*kept]], kept, check_dtype=False)
    pd.testing.assert_frame_equal(
        loaded["results"], pd.read_parquet(f"{out}/results.parquet"), check_dtype=False
    )
    texts = pd.concat(
        [pd.read_parquet(p) for p in sorted(store.rglob("eval-*/*.parquet"))], ignore_index=True
    )
    assert loaded["completions"].generated.tolist() == texts.generated.tolist()
    assert loaded["completions"].numbers.map(list).tolist() == [[1, 2, 3]] * len(texts)


def test_rows_and_runs_belong_together(store, tmp_path):
    exporting.export_runs(store, tmp_path / "out", completions=True)
    results, runs = (pd.read_parquet(tmp_path / "out" / f"{t}.parquet") for t in ("results", "runs"))
    one = ["preset", "run", "training", "trainer", "model", "condition", "seed"]
    joined = results.merge(runs, on=one)
    assert len(joined) == len(results) and set(joined.preset) == {"cpu"} and not runs.duplicated(one).any()
    draws = pd.read_parquet(next((tmp_path / "out").rglob("draws-*.parquet")))
    assert set(draws.training) == {"ppo-9999999999"} and set(draws.run) == {"draws-9999999999"}


def test_settings_come_from_all_stages(store, tmp_path):
    "From the evaluation, its training, the model before that, known by its weights, and the shipped base"
    exporting.export_runs(store, tmp_path / "out")
    runs = pd.read_parquet(tmp_path / "out" / "runs.parquet")
    for settings in map(json.loads, runs.settings):
        assert settings["ppo.lr"] == 0.1 and settings["sft.lr"] == 0.5 and settings["eval.samples"] == 1
        assert settings["base.share"] == 0.0 and settings["world.max_number"] == 20
    assert {json.loads(s)["seed"] for s in runs.settings} == {0, 1}


def test_a_model_from_elsewhere_is_no_error(store, tmp_path):
    "Somebody's own checkpoint, or one that was removed: its settings are unknown, the rest is there"
    shutil.rmtree(store / "plain" / "dots" / "seed0" / "sft-aaaaaaaaaa")
    exporting.export_runs(store, tmp_path / "out")
    runs = pd.read_parquet(tmp_path / "out" / "runs.parquet")
    settings = json.loads(runs[(runs.condition == "dots") & (runs.seed == 0)].settings.item())
    assert "sft.lr" not in settings and settings["ppo.lr"] == 0.1


def test_every_column_is_explained(store, tmp_path):
    "A new column of the results needs a line in the card; one of a user's own habit gets a general one"
    exporting.export_runs(store, tmp_path / "out", completions=True)
    card = (tmp_path / "out" / "README.md").read_text("utf-8")
    for file in (tmp_path / "out").rglob("*.parquet"):
        for column in pd.read_parquet(file):
            assert re.search(rf"^\| `{column}` \| .{{5,}} \|$", card, re.M), column
    assert "added to the rules" not in card
    assert exporting.explained(["doubt"], {}) == [("doubt", "a habit that was added to the rules")]


def test_a_habit_that_only_one_run_counted_is_empty_in_the_others(store, tmp_path):
    datasets = pytest.importorskip("datasets")
    add_job(store, "empty_cot", doubt=2)
    exporting.export_runs(store, tmp_path / "out", completions=True)
    cache = str(tmp_path / "cache")
    rows = datasets.load_dataset(
        str(tmp_path / "out"), "completions", split="train", cache_dir=cache
    ).to_pandas()
    assert rows.groupby("condition").doubt.sum().to_dict() == dict(base=0, dots=0, empty_cot=24)
    assert rows[rows.condition == "base"].doubt.isna().all()


def test_the_card_tells_runs_apart_that_differ_in_a_setting(store, tmp_path):
    add_job(store, key="5555555555", lr=0.2)
    exporting.export_runs(store, tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text("utf-8")
    assert "| cpu | plain | dots | ppo | ppo.lr=0.1 | 2 | 0.0 | 0.5 |" in card
    assert "| cpu | plain | dots | ppo | ppo.lr=0.2 | 1 | 0.0 | 0.5 |" in card
    assert "| cpu | plain | base | ppo |  | 1 | 0.0 | 0.5 |" in card


def change_manifests(store, **packages):
    for path in store.rglob("eval-*/manifest.json"):
        about = json.loads(path.read_text())
        path.write_text(json.dumps(about | dict(packages=about["packages"] | packages)))


def test_the_card_names_the_version_that_made_the_runs(store, tmp_path):
    "Not the one that exports them"
    change_manifests(store, stars="0.0.7")
    exporting.export_runs(store, tmp_path / "out")
    assert (
        "(https://github.com/stars-contributors/stars) 0.0.7, a re"
        in (tmp_path / "out/README.md").read_text()
    )


def test_draws_join_the_runs_as_the_card_says(store, tmp_path):
    exporting.export_runs(store, tmp_path / "out", completions=True)
    card = (tmp_path / "out" / "README.md").read_text("utf-8")
    assert (
        "so it joins draws and transfer to `runs`" in card and "`results`, `runs` and `completions`" in card
    )
    add_job(store, kind="draws", condition="base")  # of the same training as its evaluation
    exporting.export_runs(store, tmp_path / "out", completions=True)
    runs, draws = (
        pd.concat(map(pd.read_parquet, sorted((tmp_path / "out").rglob(f))))
        for f in ("runs.parquet", "draws-0*")
    )
    one = ["preset", "training", "model", "condition", "seed"]
    assert len(draws) and len(draws.merge(runs[one], on=one)) == len(draws)


def test_the_card_says_whose_texts_they_are(store, tmp_path):
    def licence(completions):
        exporting.export_runs(store, tmp_path / "out", completions=completions)
        return (tmp_path / "out" / "README.md").read_text("utf-8").split("## Licence")[1].split("## Cite")[0]

    assert "that this package trained" in licence(True) and "hold no texts" in licence(False)
    shutil.copytree(store / "plain", store / "SmolLM2-135M")
    for path in (store / "SmolLM2-135M").rglob("results.csv"):
        pd.read_csv(path).assign(model="HuggingFaceTB/SmolLM2-135M").to_csv(path, index=False)
    assert "`HuggingFaceTB/SmolLM2-135M` were written by models of another origin" in licence(True)


def test_what_is_still_being_built_is_left_out(store, tmp_path):
    folder = add_job(store, seed=2)
    folder.rename(folder.with_name(folder.name + ".partial"))
    draws = next(store.rglob("draws-*"))
    draws.rename(draws.with_name(draws.name + ".partial"))
    rows = exporting.export_runs(store, tmp_path / "out", completions=True)
    assert rows == dict(results=6, runs=3, completions=36)


def test_several_stores_are_one_data_set(store, tmp_path):
    add_job(store.parent / "smoke")
    rows = exporting.export_runs(store.parent, tmp_path / "out", completions=True)
    assert rows["runs"] == 4 and len(list((tmp_path / "out" / "completions").iterdir())) == 2
    assert "smoke are far too small" in (tmp_path / "out" / "README.md").read_text("utf-8")


def test_an_export_is_replaced_and_nothing_else(store, tmp_path):
    "The folder may be a clone of a repository on the Hub"
    out = tmp_path / "out"
    (out / ".git").mkdir(parents=True)
    (out / ".git" / "HEAD").write_text("ref")
    exporting.export_runs(store, out, completions=True)
    (out / "notes.txt").write_text("mine")
    (out / "completions" / "mine.parquet").write_text("mine")
    shutil.rmtree(store / "plain" / "base")
    again = exporting.export_runs(store, out, completions=True)
    fresh = exporting.export_runs(store, tmp_path / "fresh", completions=True)
    assert again == fresh
    theirs = {(out / p).relative_to(out) for p in (".git/HEAD", "notes.txt", "completions/mine.parquet")}
    assert {k: v for k, v in everything(out).items() if k not in theirs} == everything(tmp_path / "fresh")
    assert (out / "notes.txt").read_text() == "mine" and (out / ".git" / "HEAD").exists()
    exporting.export_runs(store, out)
    assert not list(out.rglob("draws-*")) and (out / "completions" / "mine.parquet").read_text() == "mine"


@pytest.mark.parametrize("at", ["write_table", "write_bytes"])
def test_an_interrupted_export_has_no_card_and_is_mended_by_the_same_command(
    store, tmp_path, monkeypatch, at
):
    out = tmp_path / "out"
    exporting.export_runs(store, out, completions=True)
    before = everything(out)

    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as m:
        m.setattr(exporting, at, stop)
        with pytest.raises(KeyboardInterrupt):
            exporting.export_runs(store, out, completions=True)
    assert not (out / "README.md").exists()
    exporting.export_runs(store, out, completions=True)
    assert everything(out) == before


def test_a_folder_of_other_things_is_refused_and_stays(store, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "README.md").write_text("mine")
    with pytest.raises(ValueError, match="no earlier export; choose another folder"):
        exporting.export_runs(store, tmp_path / "mine")
    with pytest.raises(ValueError, match="no earlier export"):
        exporting.export_runs(store, store)
    (tmp_path / "mine" / "tables.json").write_text('{"tables": 3}')  # of another program
    with pytest.raises(ValueError, match="no earlier export"):
        exporting.export_runs(store, tmp_path / "mine")
    assert (tmp_path / "mine" / "README.md").read_text() == "mine"


def test_a_list_from_elsewhere_reaches_no_other_folder(store, tmp_path):
    "A clone may hold anybody's tables.json"
    (tmp_path / "mine.txt").write_text("mine")
    exporting.export_runs(store, tmp_path / "out")
    about = json.loads((tmp_path / "out" / "tables.json").read_text())
    about["files"] += ["../mine.txt", str(tmp_path / "mine.txt")]
    (tmp_path / "out" / "tables.json").write_text(json.dumps(about))
    exporting.export_runs(store, tmp_path / "out")
    assert (tmp_path / "mine.txt").read_text() == "mine"


def damage_manifest(store):
    next(store.rglob("eval-*/manifest.json")).unlink()


def damage_results(store):
    next(store.rglob("results.csv")).write_text("")


def empty_results(store):
    path = next(store.rglob("results.csv"))
    path.write_text(path.read_text().split("\n")[0] + "\n")


def damage_completions(store):
    next(store.rglob("eval-*/*.parquet")).write_bytes(b"no parquet")


def damage_draws(store):
    next(store.rglob("draws-*/manifest.json")).unlink()


@pytest.mark.parametrize(
    "damage,said",
    [
        (damage_draws, "manifest.json cannot be read, so nobody knows what made draws-"),
        (damage_manifest, "manifest.json cannot be read, so nobody knows what made eval-"),
        (damage_results, "results.csv cannot be read"),
        (empty_results, "results.csv has no rows"),
        (damage_completions, "is not a parquet file"),
        (lambda store: shutil.rmtree(store / "plain"), "no finished evaluation below"),
    ],
)
def test_what_cannot_be_exported_is_named_in_one_line(store, tmp_path, monkeypatch, capsys, damage, said):
    exporting.export_runs(store, tmp_path / "old", completions=True)
    before = everything(tmp_path / "old")
    damage(store)
    monkeypatch.chdir(tmp_path)
    for out in ("out", "old"):
        with pytest.raises(SystemExit) as e:
            cli.main(["export", str(store), out, "--completions"])
        err = capsys.readouterr().err
        assert e.value.code == 2 and said in err and len(err.splitlines()) == 1
    assert not (tmp_path / "out").exists() and everything(tmp_path / "old") == before


@pytest.mark.parametrize(
    "args,said",
    [
        (["nowhere", "out"], "nowhere is no folder"),
        (["runs", "taken"], "'taken' is a file; name a folder"),
        (["runs", "out", "--licence", "Apache 2.0"], "apache-2.0"),
    ],
)
def test_wrong_words_are_refused(store, tmp_path, monkeypatch, capsys, args, said):
    (tmp_path / "taken").write_text("")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as e:
        cli.main(["export", *args])
    assert e.value.code == 2 and said in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_the_command_says_what_it_wrote(store, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    cli.main(["export", "runs", "habits", "--licence", "cc-by-4.0"])
    assert capsys.readouterr().out.splitlines() == [
        "habits: 6 rows of results",
        "habits: 3 rows of runs",
        "what they mean: habits/README.md",
    ]
    assert "license: cc-by-4.0\n" in (tmp_path / "habits" / "README.md").read_text("utf-8")


@given(st.lists(st.integers(0, 10**9), min_size=1, max_size=4))
def test_sizes_are_named_as_the_hub_names_them(rows):
    bounds = dict(K=10**3, M=10**6)

    def number(text):
        return int(text[:-1]) * bounds[text[-1]]

    for n in rows:
        low, _, high = exporting.size_category(n).partition("<n<")
        if high:
            assert number(low) <= n and (n < number(high) or high == "10M")
        else:
            assert n < 1000


def test_shipped_bases_are_known_by_their_weights():
    assert len(exporting.shipped_models()) == len(BASES)

"STaR: what it learns from, where each round begins, and that a killed run ends where it would have ended"

import shutil
from dataclasses import asdict, replace

import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import PROBLEMS, STAR, TOK, Ending, model, teach, untimed
from tiny import right_or_wrong as reward

from stars.lab.configs import Config, changed, preset
from stars.lab.experiments import eval_stage, ppo_stage, star_stage, tokens_sampled, trained_by, trained_stage
from stars.lab.stages import Job
from stars.models.checkpoints import load_model, save_checkpoint
from stars.rl import star as S
from stars.rl.loops import Runtime, read_log
from stars.rl.rollouts import Rollout, seeds_of
from stars.rl.sft import sft
from stars.task.countdown import make_prompt


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    return save_checkpoint(model(), TOK, tmp_path_factory.mktemp("start") / "model")


@pytest.fixture(scope="module", params=[True, False], ids=["restart", "go on"])
def whole(start, request, tmp_path_factory):
    "A run that nothing happens to, and its settings"
    cfg = replace(STAR, restart=request.param)
    return teach(start, tmp_path_factory.mktemp("whole"), cfg), cfg


def weights(folder):
    return load_model(folder).state_dict()


def same(a, b):
    x, y = weights(a), weights(b)
    return x.keys() == y.keys() and all(torch.equal(x[k], y[k]) for k in x)


def files(folder):
    names = (p.relative_to(folder) for p in folder.rglob("*"))
    return sorted(str(n) for n in names if not n.name.endswith(".lock"))


@given(
    st.lists(
        st.tuples(
            st.sampled_from("ab"), st.sampled_from("xyz"), st.booleans(), st.sampled_from([0, 0.1, 1.0])
        )
    ),
    st.sampled_from([0.1, 1.0]),
)
def test_it_learns_from_each_right_response_once(drawn, threshold):
    columns = list(zip(*drawn)) or [()] * 4
    rollouts = [Rollout([5], [7], [-1.0], ended) for ended in columns[2]]
    rows = S.right_examples(columns[0], columns[1], rollouts, columns[3], threshold)
    got = [(row["query"], row["completion"]) for row in rows]
    assert len(got) == len(set(got))
    assert set(got) == {(q, c) for q, c, ended, score in drawn if ended and score >= threshold}


def test_rounds_log_what_ppo_logs_and_leave_checkpoints(whole):
    out, _ = whole
    rows = read_log(out / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3]
    wanted = {"reward", "accuracy", "format", "response_tokens", "truncated", "examples", "sft_loss"}
    assert wanted | {"avg_backtracking", "s_sample", "s_update"} <= rows[0].keys()
    assert all(0 < row["examples"] <= 12 and row["accuracy"] * 12 >= row["examples"] for row in rows)
    assert sorted(p.name for p in out.iterdir() if p.name[0] != ".") == [
        "metrics.jsonl",
        *(f"step-000{i}" for i in range(4)),
    ]
    assert not (out / ".round").exists()


def test_a_round_is_plain_fine_tuning_of_the_right_model(whole, start, tmp_path):
    "The last round once more, by hand: sample from the model before it, train the start model or that one"
    out, cfg = whole
    engine = Ending(load_model(out / "step-0002"), TOK.eos_token_id)
    chosen = [i for i in S.prompt_order(len(PROBLEMS), 2, cfg.prompts, cfg.seed) for _ in range(cfg.samples)]
    queries = [make_prompt(PROBLEMS[i]) for i in chosen]
    ids = TOK(queries, add_special_tokens=False).input_ids
    rollouts = engine.generate(ids, 12, 1.0, seeds_of("0/2", len(ids)))
    texts = S.texts_of(TOK, rollouts)
    scores = [reward(text, PROBLEMS[i]) for text, i in zip(texts, chosen)]
    rows = S.right_examples(queries, texts, rollouts, scores)
    by_hand = load_model(start if cfg.restart else out / "step-0002")
    sft(by_hand, TOK, rows, tmp_path, cfg.sft, runtime=Runtime(progress=False))
    assert same(out / "step-0003", tmp_path / "model")
    assert read_log(out / "metrics.jsonl")[2]["examples"] == len(rows)


class Killed(BaseException):
    "What ends a run, as if by kill -9"


FUNCTIONS = ("sampled_round", "sft", "save_checkpoint", "sync", "write_json", "write_bytes")


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_killed_run_ends_where_it_would_have_ended(whole, start, tmp_path, monkeypatch, name, after):
    "Killed before or after each thing that the second round does"
    out, cfg = whole
    plain, calls = getattr(S, name), []

    def deadly(*args, **kwargs):
        calls.append(0)
        last = len(calls) == (3 if name in ("save_checkpoint", "sync") else 2)  # both are called at the start
        if last and not after:
            raise Killed
        result = plain(*args, **kwargs)
        if last:
            raise Killed
        return result

    with monkeypatch.context() as patch:
        patch.setattr(S, name, deadly)
        with pytest.raises(Killed):
            teach(start, tmp_path, cfg)
    teach(start, tmp_path, cfg)
    assert untimed(tmp_path) == untimed(out) and files(tmp_path) == files(out)
    assert all(same(out / f"step-000{i}", tmp_path / f"step-000{i}") for i in range(4))


def test_what_was_sampled_is_kept_through_a_kill(start, tmp_path, monkeypatch):
    "A reward may cost money: it is not asked again"
    asked = []

    def counted(text, problem):
        asked.append(text)
        return reward(text, problem)

    with monkeypatch.context() as patch:
        patch.setattr(S, "tuned", lambda *_: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            teach(start, tmp_path, reward=counted)
    teach(start, tmp_path, reward=counted)
    assert len(asked) == 3 * 12


def test_a_finished_run_is_not_run_again(whole, start, monkeypatch):
    out, cfg = whole
    monkeypatch.setattr(S, "star_round", None)
    assert teach(start, out, cfg) == out


def test_other_settings_do_not_go_on(whole, start, tmp_path):
    out, cfg = whole
    shutil.copytree(out, tmp_path / "copy")
    with pytest.raises(ValueError, match="begun with temperature=1.0, now 0.5"):
        teach(start, tmp_path / "copy", replace(cfg, temperature=0.5))


def test_nothing_right_is_an_error_with_advice(start, tmp_path):
    with pytest.raises(ValueError, match="round 1: none of 12 responses can be learned from; all are wrong"):
        teach(start, tmp_path, reward=lambda *_: 0.1)
    assert read_log(tmp_path / "metrics.jsonl") == []
    assert teach(start, tmp_path).exists()  # and a run that finds something goes on


@pytest.mark.parametrize(
    "bad, names",
    [
        (dict(rounds=0), "rounds=0 must be at least 1"),
        (dict(prompts=0), "prompts=0"),
        (dict(samples=-1), "samples=-1"),
        (dict(temperature=0.0), "temperature=0.0 must be above 0 to explore"),
        (dict(threshold=0.0), "threshold=0.0 must be above 0"),
        (dict(threshold=1.5), "threshold=1.5"),
        (dict(max_tokens=2048), "max_tokens=2048 must be below max_length=2048"),
        (dict(lr=2.0), "lr=2.0"),
    ],
)
def test_settings_that_cannot_work_are_named(bad, names):
    with pytest.raises(ValueError) as e:
        S.STaRConfig(**bad).validate()
    assert names in str(e.value)


# In an experiment


def jobs(runs, **settings):
    return Job(preset("smoke", **settings), "plain", "base", runs=str(runs), progress=False)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


def test_only_the_settings_of_the_trainer_count(store):
    names = {}
    for trainer in ("ppo", "star"):
        job = jobs(store, trainer=trainer)
        built = trained_stage(job)
        assert built.name.startswith(f"{trainer}-")
        for group, change in dict(ppo=dict(lr=2e-4), star=dict(lr=1e-3)).items():
            other = replace(job, cfg=changed(job.cfg, **{group: change}), build=False)
            if group == trainer:
                with pytest.raises(LookupError):
                    trained_stage(other)
            else:
                assert trained_stage(other) == built
        names[trainer] = eval_stage(job).name
    assert names["ppo"] != names["star"]


def test_the_commands_build_a_trainers_stage_whatever_the_settings_say(store):
    ppo, star = jobs(store, trainer="ppo"), jobs(store, trainer="star")
    assert star_stage(ppo) == trained_stage(star) and ppo_stage(star) == trained_stage(ppo)
    assert trained_by(ppo, "star") == star


@pytest.mark.parametrize("trainer", ["ppo", "star"])
def test_results_say_how_many_tokens_were_sampled(store, trainer):
    job = jobs(store, trainer=trainer)
    run, table = trained_stage(job), pd.read_csv(eval_stage(job) / "results.csv")
    rows, size = read_log(run / "metrics.jsonl"), job.cfg.rl.prompts * job.cfg.rl.samples
    for step, tokens in zip(table.step, table.tokens_sampled):
        assert tokens == sum(round(r["response_tokens"] * size) for r in rows if r["step"] <= step)
    assert table.tokens_sampled[0] == 0 and tokens_sampled(job.cfg, run)[0] == 0


def test_a_trainer_that_is_none_is_refused():
    with pytest.raises(ValueError, match="trainer='grpo' is unknown; choose one of ppo, star"):
        preset("cpu", trainer="grpo")


def test_the_preset_cpu_samples_as_much_with_either():
    cfg = Config("cpu")
    assert cfg.star.rounds * cfg.star.prompts * cfg.star.samples == cfg.ppo.steps * cfg.ppo.prompts
    assert asdict(cfg.star)["max_tokens"] == cfg.ppo.max_tokens

"Further measurements of checkpoints: many draws per problem, problems of other spaces"

from dataclasses import replace
from itertools import combinations

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stars.lab import experiments as ex
from stars.lab.configs import EVALUATION_SPACES, World, preset, space_ranges
from stars.lab.progress import Progress
from stars.lab.stages import Job
from stars.models.checkpoints import save_checkpoint
from stars.models.micro import micro_model, micro_tokenizer
from stars.show.sources import Study
from stars.task.countdown import Problem, split_of
from stars.task.problems import needs_product

SMALL = {"data.eval": 6, "eval.draws": 3, "eval.space_problems": 5, "eval.space_draws": 2}


@pytest.fixture
def job(tmp_path, monkeypatch):
    "A job whose PPO is there: three checkpoints of random weights"
    cfg = preset("smoke", **SMALL)
    tokenizer, run = micro_tokenizer(cfg.world.top), tmp_path / "ppo-0123456789"
    for step in (0, 2, 4):
        model = micro_model(tokenizer, hidden=16, layers=1, heads=2, ffn=32, context=512, seed=step)
        save_checkpoint(model, tokenizer, run / f"step-{step:04d}")
    monkeypatch.setattr(ex, "trained_stage" if hasattr(ex, "trained_stage") else "ppo_stage", lambda job: run)
    return Job(cfg, "plain", "base", 0, str(tmp_path / "runs"), progress=False, last="draws")


def test_draws_ask_the_first_and_the_last_checkpoint_several_times(job):
    draws = ex.read_answers(ex.draws_stage(job))
    assert set(draws.step) == {0, 4}
    assert (draws.groupby(["step", "index"]).size() == 3).all() and draws["index"].nunique() == 6
    every = replace(job, cfg=preset("smoke", **SMALL, **{"eval.drawn": "all"}))
    assert set(ex.read_answers(ex.draws_stage(every)).step) == {0, 2, 4}


def test_draws_of_a_problem_differ_and_come_again(job, tmp_path):
    draws = ex.read_answers(ex.draws_stage(job))
    assert (draws.groupby(["step", "index"]).generated.nunique() > 1).all()
    again = ex.read_answers(ex.draws_stage(replace(job, runs=str(tmp_path / "other"))))
    pd.testing.assert_frame_equal(draws, again)
    other = ex.read_answers(ex.draws_stage(replace(job, seed=1)))
    assert (draws.generated != other.generated).any()


def test_asking_goes_on_where_it_was_killed(job, tmp_path, monkeypatch):
    "A file that is there is not written again, and the one that is missing comes out the same"
    whole = ex.draws_stage(job)
    first, last = sorted(whole.glob("completions-*.parquet"))
    begun = tmp_path / "begun"
    begun.mkdir()
    (begun / first.name).write_bytes(first.read_bytes())
    asked, answers = [], ex.answers

    def noting(job, engine, tokenizer, questions, step):
        asked.append(step)
        return answers(job, engine, tokenizer, questions, step)

    monkeypatch.setattr(ex, "answers", noting)
    run = ex.trained_stage(job) if hasattr(ex, "trained_stage") else ex.ppo_stage(job)
    problems = ex.from_parquet(ex.data_stage(job) / "eval.parquet")
    ex.ask(job, ex.asked_checkpoints(job, run), [ex.Questions(problems, 3, "draws")], begun)
    assert asked == [4]
    pd.testing.assert_frame_equal(pd.read_parquet(begun / last.name), pd.read_parquet(last))


def test_transfer_asks_about_each_space(job):
    answers = ex.read_answers(ex.transfer_stage(replace(job, last="transfer")))
    sizes = answers.groupby(["space", "step"]).size()
    assert set(answers.space) == set(EVALUATION_SPACES) and (sizes == 5 * 2).all()
    for r in answers.itertuples():
        problem = Problem(tuple(r.numbers), r.target)
        assert split_of(problem) == "eval"  # held out in every space
        world = len(r.numbers) == 3 and max(r.numbers) <= 20 and 10 <= r.target <= 40
        fits = dict(
            world=world,
            more_numbers=len(r.numbers) == 4 and max(r.numbers) <= 20,
            larger_numbers=min(r.numbers) > 20 and max(r.numbers) <= 40,
            larger_targets=40 < r.target <= 80,
            products=world and needs_product(problem),
        )
        assert fits[r.space], (r.space, problem)


def test_a_space_without_room_is_refused_before_anything_is_sampled(job):
    with pytest.raises(ValueError, match=r"world.top=40.*leave the space out"):
        space_ranges(World(top=40), "larger_targets")
    with pytest.raises(ValueError, match="eval.space_problems=100000.*only"):
        cfg = preset("smoke", **SMALL | {"eval.space_problems": 100_000})
        ex.transfer_stage(replace(job, cfg=cfg, last="transfer"))
    with pytest.raises(ValueError, match="eval.spaces='moon'"):
        preset("smoke", **{"eval.spaces": "moon"})


def test_draws_do_not_change_the_key_of_results(job):
    "Results that are there stay valid when somebody asks for more draws"
    names = [
        ex.asking_settings(replace(job, cfg=preset("smoke", **SMALL | {"eval.draws": n})), "samples")
        for n in (3, 4)
    ]
    assert names[0] == names[1]


def test_progress_counts_the_last_stage(job):
    ex.draws_stage(job)
    assert Progress([job]).chains[job].kinds[-1] == "draws"
    assert Progress([job]).chains[job].steps("draws") == 2


def test_nobody_has_published_draws():
    with pytest.raises(ValueError, match="nobody has published what draws measures"):
        Study("smoke", source="published", reads="draws")
    with pytest.raises(ValueError, match="reads='all'"):
        Study("smoke", reads="all")
    assert {job.last for job in Study("smoke", reads="transfer").jobs()} == {"transfer"}


def sums(numbers):
    "All that adding and subtracting can make, pair by pair"
    if len(numbers) == 1:
        return set(numbers)
    made = set()
    for i, j in combinations(range(len(numbers)), 2):
        rest = [n for k, n in enumerate(numbers) if k not in (i, j)]
        for value in (numbers[i] + numbers[j], numbers[i] - numbers[j], numbers[j] - numbers[i]):
            made |= sums([*rest, value])
    return made


@given(st.lists(st.integers(1, 30), min_size=2, max_size=4), st.integers(1, 60))
def test_needs_product_against_all_sums(numbers, target):
    assert needs_product(Problem(tuple(numbers), target)) == (target not in sums(numbers))

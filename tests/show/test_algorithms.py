"Which trainer? What is compared, and what the figure says of it"

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from stars.lab.configs import PRESETS
from stars.show.plots import invented
from stars.show.reasons import algorithms, algorithms_table, algorithms_title, over_tokens, priming_gains
from stars.show.sources import ALGORITHMS, Study, with_algorithm


def results(**last):
    "Made-up results, from how far base and primed get under each algorithm"
    rng = np.random.default_rng(0)
    tables = [
        invented(rng, dict(base=(0.1, b), backtracking_verification=(0.1, p)), (0, 1, 2)).assign(
            algorithm=name, source="made up"
        )
        for name, (b, p) in last.items()
    ]
    rows = pd.concat(tables, ignore_index=True)
    return rows.assign(tokens_sampled=rows.step * 3_000 + 100 * rows.seed * (rows.step > 0))


@pytest.mark.parametrize("cfg", PRESETS.values(), ids=list(PRESETS))
@pytest.mark.parametrize("name", ALGORITHMS)
def test_every_algorithm_samples_as_much_as_the_preset(name, cfg):
    ours = with_algorithm(cfg, name)  # valid, or it raises
    assert ours.ppo.prompts * ours.ppo.samples == cfg.ppo.prompts * cfg.ppo.samples
    assert ours.ppo.samples >= ALGORITHMS[name].samples
    assert (ours.trainer == "star") == (name == "star")


def test_a_study_trains_the_same_starts_by_each():
    study = Study("smoke", ["plain"], ["base", "dots"], [0, 1], algorithms=["ppo", "star"])
    jobs = study.jobs()
    assert [(j.cfg.trainer, j.condition, j.seed) for j in jobs] == [
        (t, c, s) for t in ("ppo", "star") for c in ("base", "dots") for s in (0, 1)
    ]
    assert study.manifest()["algorithms"] == ["ppo", "star"]


@pytest.mark.parametrize(
    "how, names",
    [
        (dict(algorithms=["grppo"]), "did you mean grpo"),
        (dict(algorithms="ppo"), "must be a list"),
        (dict(algorithms=["ppo", "ppo"]), "twice"),
        (dict(algorithms=["ppo"], source="both"), "nobody has published"),
        (dict(algorithms=["ppo"], references=["rich"]), "neither shares nor references"),
    ],
)
def test_what_cannot_be_compared_is_refused(how, names):
    with pytest.raises(ValueError, match=names):
        Study("smoke", ["plain"], ["base"], [0], **how)


def test_the_title_follows_the_intervals():
    frame = over_tokens(results(star=(0.2, 0.2), ppo=(0.15, 0.5), rloo=(0.5, 0.15)))
    found = priming_gains(frame)
    assert list(found) == ["ppo", "rloo", "star"]  # in the order of the table of algorithms
    title = algorithms_title(frame)
    assert title.index("above base under PPO") < title.index("below it under RLOO")
    assert "not told apart from base under STaR" in title


def test_the_table_holds_the_lines_and_the_differences():
    rows = results(ppo=(0.15, 0.5), grpo=(0.2, 0.4))
    table = algorithms_table(rows)
    apart = table[table.what == "difference"].set_index("algorithm")
    for name, mine in rows[rows.step == rows.step.max()].groupby("algorithm"):
        means = mine.groupby("condition").accuracy.mean()
        assert apart.value[name] == pytest.approx(means["backtracking_verification"] - means["base"])
        assert apart.lo[name] < apart.value[name] < apart.hi[name]
    ends = table[(table.what == "accuracy") & (table.step == 100)]
    assert set(ends.tokens) == {300_100.0}  # the mean over seeds


def test_it_draws_a_line_per_seed_and_condition():
    fig = algorithms(results(ppo=(0.15, 0.5), star=(0.2, 0.4)))
    for ax in fig.axes:
        assert sum(len(line.get_xdata()) == 11 for line in ax.lines) == 2 * (3 + 1)
        assert any(t.get_text().startswith("primed − base +") for t in ax.texts)
    plt.close(fig)


def test_results_without_tokens_are_refused():
    with pytest.raises(ValueError, match="lack the column tokens_sampled"):
        over_tokens(results(ppo=(0.1, 0.2)).drop(columns="tokens_sampled"))
    with pytest.raises(ValueError, match="give base and one other"):
        rows = results(ppo=(0.1, 0.2))
        priming_gains(over_tokens(rows[rows.condition == "base"]))

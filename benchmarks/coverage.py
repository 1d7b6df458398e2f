"""Do 95 % intervals hold the truth in 95 of 100 cases?

Imaginary experiments with a known truth: problems are drawn, seeds are trained, each seed answers every
problem once. Then everything is drawn anew. An interval "for new problems and new seeds" should hold the
truth in 95 % of them. Three rules are compared: the one of `stars.measure.intervals`; one number of degrees
of freedom for the whole variance (Satterthwaite), which is narrower; and the spread between seeds alone,
which is what a table without outcomes allows, and which speaks of new seeds on the same problems only.

A chance to solve a problem is expit(mean + problem + seed + both), each a normal draw. The second condition
of a difference lies higher, and suits some problems better than others. `--write` puts the table into
benchmarks/results/coverage.md.
"""

import argparse
from itertools import product
from pathlib import Path

import numpy as np
from scipy.special import expit
from scipy.stats import t as student

from stars.measure.intervals import (
    Term,
    binomial_noise,
    difference,
    mean_interval,
    of_means,
    problem_variances,
    ratio_difference,
    ratio_interval,
)

ROOT = Path(__file__).resolve().parent.parent
OWN = 0.7  # logits by which a seed is better or worse at single problems
MEAN, LIFT = -0.8, 0.5  # logits of the first condition, and how far the second lies above
SUITS = 1.0  # logits by which that differs from problem to problem
NODES, WEIGHTS = np.polynomial.hermite_e.hermegauss(60)  # for means over normal draws
WEIGHTS = WEIGHTS / WEIGHTS.sum()


def mean_chance(mean: float, spread: float) -> float:
    "Mean of expit(mean + spread × a standard normal draw)"
    return float(WEIGHTS @ expit(mean + spread * NODES))


def accuracy_spread(problems: float, seeds: float) -> float:
    "Standard deviation of a seed's true accuracy, from logits"
    means = np.array([mean_chance(MEAN + seeds * z, np.hypot(problems, OWN)) for z in NODES])
    return float(np.sqrt(WEIGHTS @ (means - WEIGHTS @ means) ** 2))


def answers(rng, mean, problems, seeds, spread) -> np.ndarray:  # [seeds, problems], right or wrong
    "One condition on given problems, trained with several seeds"
    logits = mean + problems + rng.normal(0, spread, (seeds, 1)) + rng.normal(0, OWN, (seeds, len(problems)))
    return (rng.random(logits.shape) < expit(logits)).astype(float)


def common_freedom(cells, weights) -> tuple[float, float]:
    "The ends with Satterthwaite's degrees of freedom for the whole variance"
    terms = [Term(c.mean(1), weight=w) for c, w in zip(cells, weights)]
    v, count = problem_variances(cells, weights), cells[0].shape[1]
    by_seeds = sum(t.variance for t in terms)
    whole = max(by_seeds + v.problems - v.residual, by_seeds, v.problems)
    shares = sum(t.variance**2 / t.freedom for t in terms) + v.problems**2 / (count - 1)
    half = student.ppf(0.975, whole**2 / shares) * np.sqrt(whole)
    value = sum(w * c.mean() for w, c in zip(weights, cells))
    return value - half, value + half


def seeds_alone(cells, weights) -> tuple[float, float]:
    "The ends by the spread between seeds, never less than the draw of completions leaves"
    terms = [Term(c.mean(1), binomial_noise(c.mean(), c.shape[1]), w) for c, w in zip(cells, weights)]
    return of_means(terms)[1:3]


def one_case(rng, seeds, spread, hardness, paired, count=400) -> np.ndarray:  # [rules, 2]
    "The ends by each rule in one imaginary experiment"
    problems = rng.normal(0, hardness, count)
    cells, weights = [answers(rng, MEAN, problems, seeds, spread)], [1.0]
    if paired:
        lifted = problems + rng.normal(LIFT, SUITS, count)
        cells, weights = [answers(rng, MEAN, lifted, seeds, spread), *cells], [1.0, -1.0]
    ours = (difference(*cells) if paired else mean_interval(cells[0]))[1:3]
    if seeds == 1:
        return np.array([ours, (np.nan, np.nan), seeds_alone(cells, weights)])
    return np.array([ours, common_freedom(cells, weights), seeds_alone(cells, weights)])


def truth(spread, hardness, paired) -> float:
    "The accuracy, or the difference, over all problems and all seeds"
    whole = np.sqrt(spread**2 + hardness**2 + OWN**2)
    low = mean_chance(MEAN, whole)
    return mean_chance(MEAN + LIFT, np.hypot(whole, SUITS)) - low if paired else low


def covered(seeds, spread, hardness, paired, tries) -> tuple[np.ndarray, np.ndarray]:
    "Share of intervals that hold the truth, and their mean width, by rule"
    rng = np.random.default_rng([seeds, int(100 * spread), int(100 * hardness), paired])
    ends = np.array([one_case(rng, seeds, spread, hardness, paired) for _ in range(tries)])
    want = truth(spread, hardness, paired)
    held = (ends[..., 0] <= want) & (want <= ends[..., 1])
    return held.mean(0), (ends[..., 1] - ends[..., 0]).mean(0)


def ratios(tries, count=400, draws=4) -> tuple[float, float]:
    "The same for the bootstrap: a share of responses with a habit of hard problems, and a difference"
    rng, chances = np.random.default_rng(1), np.array([0.1, 0.8])
    with_habit, held = np.array([0.6, 0.2]), np.zeros(2)
    share = (with_habit * chances).sum() / with_habit.sum()
    other = ((1 - with_habit) * chances).sum() / (1 - with_habit).sum()
    for i in range(tries):
        kind = rng.integers(0, 2, count)
        den = rng.binomial(draws, with_habit[kind])
        a, b = (
            (rng.binomial(den, chances[kind]), den),
            (rng.binomial(draws - den, chances[kind]), draws - den),
        )
        one, both = ratio_interval(*a, 500, i), ratio_difference(*a, *b, 500, i)
        held += one.lo <= share <= one.hi, both.lo <= share - other <= both.hi
    return tuple(held / tries)


def rows(tries):
    for paired, seeds, hardness in product((False, True), (1, 2, 3, 5, 10), (0.0, 2.0)):
        for spread in (0.0, 0.15, 0.5) if seeds > 1 else (0.0,):
            held, width = covered(seeds, spread, hardness, paired, tries)
            what = "difference" if paired else "accuracy"
            cells = " | ".join(
                "–" if np.isnan(w) else f"{100 * h:.1f} ({w:.3f})" for h, w in zip(held, width)
            )
            hard = "hard and easy" if hardness else "alike"
            spread = f"{100 * accuracy_spread(hardness, spread):.1f}" if seeds > 1 else "–"
            yield f"| {what} | {seeds} | {spread} | {hard} | {cells} |"


ABOUT = """# Do the intervals hold the truth?

`python benchmarks/coverage.py --write`: {tries:,} imaginary experiments per row, 400 problems, one answer per
problem and seed. In each experiment problems *and* seeds are drawn anew (with one seed: problems). Per cent
of 95 % intervals that hold the truth, mean width in brackets. By chance alone, a rule that holds in 95 %
shows {low:.1f} to {high:.1f}. *Seeds differ by*: the standard deviation of their true accuracies, in points.

| of | seeds | seeds differ by | problems | ours | one number of degrees of freedom | seeds alone |
|---|---|---|---|---|---|---|"""


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tries", type=int, default=4000, help="experiments per row")
    parser.add_argument("--write", action="store_true", help="into benchmarks/results/coverage.md")
    args = parser.parse_args()
    by_chance = 196 * np.sqrt(0.95 * 0.05 / args.tries)
    lines = [ABOUT.format(tries=args.tries, low=95 - by_chance, high=95 + by_chance)]
    print(lines[0], flush=True)
    for line in rows(args.tries):
        lines.append(line)
        print(line, flush=True)
    share, both = ratios(args.tries // 4)
    lines += [
        "",
        "The bootstrap over problems, for a share of responses with a habit that is frequent on hard "
        f"problems: {100 * share:.1f} % hold the truth; for its difference from the other responses "
        f"{100 * both:.1f} % ({args.tries // 4:,} experiments, 400 problems, 4 responses each).",
    ]
    print(lines[-1])
    if args.write:
        (ROOT / "benchmarks" / "results" / "coverage.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()

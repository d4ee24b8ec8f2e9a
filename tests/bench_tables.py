"""
Stored runs -> the tables of README and RESULTS in Markdown. Trains nothing.

    python tests/bench_tables.py
    python tests/bench_tables.py --results out-bench/more.jsonl

Results are {(task, what, seed): Run}. A mixture is judged by its regret, which is how much higher
a model's test loss is, in %, than at the best fixed mixture known. One run's loss has a noise of
half a percent, so tables show two figures: what was measured, and what a response surface says
that was fitted to all runs of the task at fixed mixtures. Where few mixtures were trained at on all
seeds, the surface also says which one is the best known.
"""
import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]
from bench_methods import REGMIX, TASKS, cost_of, sources_of  # noqa: E402
from prepare_data import fail  # noqa: E402

STORED = HERE / "bench_mixtures.jsonl"
ROWS = {  # of the tables: {what: title}
    "uniform": "uniform",
    "proportional": "proportional to tokens",
    "sqrt": "proportional to the root of the tokens",
    "ngram": "n-gram EM, order 3",
    "FastMix": "**FastMix**",
    "none": "P = 1",
    "seldom": "P = 1, ε = 1, every 20",
    "DoGE": "DoGE's rule",
    **{f"RegMix {n}": f"RegMix-style, {n} runs" for n in REGMIX},
}
README_COLUMNS = {  # of README's table, whose rows are tasks
    "uniform": "uniform",
    "proportional": "proportional",
    "ngram": "n-gram EM",
    "none": "P = 1",
    "FastMix": "FastMix",
    "RegMix 64": "RegMix-style, 64 runs",
}


# ---- stored runs ---------------------------------------------------------------------------------

class Run(NamedTuple):
    mixture: list  # the K shares it was trained at; of a search ("search NAME"), what it found
    loss: float  # the mean over the targets of the test losses, in nats per token


def line_of(task, what, mixture, losses):
    """One line of a file of results: a mixture of a task with its losses {seed: loss}."""
    line = {"task": task, "what": what, "mixture": mixture, "losses": losses}
    return json.dumps(line, separators=(",", ":")) + "\n"


def load(path):
    """{(task, what, seed): Run} of a file of results; {} where there is none."""
    results = {}
    if not Path(path).exists():
        return results
    for text in Path(path).read_text().splitlines(keepends=True):
        if not text.endswith("\n"):
            continue  # cut short when a bench was killed
        line = json.loads(text)
        for seed, loss in line["losses"].items():
            results[line["task"], line["what"], int(seed)] = Run(line["mixture"], loss)
    return results


def fixed_runs(results, task):
    """{mixture: {seed: loss}} of a task's runs at fixed mixtures, on the seeds of its uniform."""
    seeds = [seed for where, what, seed in results if (where, what) == (task, "uniform")]
    by_mixture = {}
    for (where, what, seed), run in results.items():
        if where == task and seed in seeds and not what.startswith("search "):
            by_mixture.setdefault(tuple(run.mixture), {})[seed] = run.loss
    return by_mixture


# ---- the response surface ------------------------------------------------------------------------

def kernel(a, b, length, height):
    """Squared exponential, (R, D), (S, D) -> (R, S); 100 stands for a mean that is not known."""
    distances = ((a[:, None] - b[None]) ** 2).sum(-1)
    return height * np.exp(-distances / (2 * length**2)) + 100


def gaussian_process(x, y, noise):
    """
    Regression of y (R,) on x (R, D); noise (R,) are the standard deviations of y. The kernel's
    length and height are those of the largest marginal likelihood on a grid. Returns three things:
    predict, which maps (S, D) to (S,); the leave-one-out error, the rms of how far each y is from
    its prediction by the others, noise included; and doubt(a, b), for two (D,), the standard
    deviation of predict(a) - predict(b).
    """
    mean = y.mean()
    scale = y.std()
    most_likely = -np.inf
    for length in (0.3, 0.5, 0.7, 1.0, 1.5, 2.0, 3.0):
        for height in (0.3, 1.0, 3.0, 10.0, 30.0):
            covariance = kernel(x, x, length, height) + np.diag((noise / scale) ** 2)
            inverse = np.linalg.inv(covariance)
            weights = inverse @ ((y - mean) / scale)
            likelihood = -weights @ (y - mean) / scale - np.linalg.slogdet(covariance)[1]
            if likelihood > most_likely:
                most_likely = likelihood
                best = length, height, weights, inverse
                error = np.sqrt(((weights / np.diag(inverse)) ** 2).mean()) * scale
    length, height, weights, inverse = best

    def predict(a):
        return mean + scale * kernel(np.atleast_2d(a), x, length, height) @ weights

    def doubt(a, b):
        both = np.array([a, b])
        known = kernel(both, x, length, height)  # (2, R)
        covariance = kernel(both, both, length, height) - known @ inverse @ known.T
        variance = covariance[0, 0] + covariance[1, 1] - 2 * covariance[0, 1]
        return scale * np.sqrt(max(0.0, variance))

    return predict, error, doubt


def log_shares(mixtures):
    return np.log(np.asarray(mixtures) + 0.05) / 3


def seed_effects(by_mixture, seeds):
    """
    A seed raises or lowers the loss at all mixtures alike. {seed: by how much} by least squares,
    loss = mixture's + seed's, which sum to 0, and the noise of one run: what is left.
    """
    shared = [runs for runs in by_mixture.values() if len(runs) > 1]
    rows = []
    losses = []
    for i, runs in enumerate(shared):
        for seed, loss in runs.items():
            row = np.zeros(len(shared) + len(seeds))
            row[[i, len(shared) + seeds.index(seed)]] = 1
            rows.append(row)
            losses.append(loss)
    found = np.linalg.lstsq(np.array(rows), np.array(losses), rcond=None)[0]
    rest = np.array(losses) - np.array(rows) @ found
    freedom = len(losses) - len(shared) - len(seeds) + 1
    effects = found[len(shared):]
    return dict(zip(seeds, effects - effects.mean())), np.sqrt((rest**2).sum() / freedom)


@dataclass
class Surface:
    """The test loss as a function of the mixture, of the runs of a task at fixed mixtures."""
    predict: Callable  # mixtures (S, K) -> losses (S,), means over the seeds
    doubt: Callable  # two mixtures (K,) -> standard deviation of the difference of their losses
    error: float  # leave-one-out, in % of the least loss, the noise of the runs included
    own_error: float  # and without that noise
    noise: float  # standard deviation of one run, in % of the least loss
    seed_effect: dict  # {seed: how much higher losses are on it}
    fitted: np.ndarray  # (R, K) the mixtures that it is fitted to

    def best(self):
        """The mixture tried whose loss by the surface is lowest, (K,)."""
        return self.fitted[self.predict(self.fitted).argmin()]


def response_surface(by_mixture):
    """
    {mixture: {seed: loss}} -> Surface, fitted to those within a tenth of the best. Ends the program
    where too few mixtures ran on several seeds.
    """
    if sum(len(runs) > 1 for runs in by_mixture.values()) < 3:
        fail("a response surface needs three mixtures that ran on two seeds or more")
    seeds = sorted(set().union(*by_mixture.values()))
    effect, noise = seed_effects(by_mixture, seeds)
    y = []  # the mean loss at each mixture, without the effects of the seeds that it ran on
    counts = []
    for runs in by_mixture.values():
        y.append(np.mean([loss - effect[seed] for seed, loss in runs.items()]))
        counts.append(len(runs))
    y = np.array(y)
    near = y < 1.1 * y.min()
    fitted = np.array(list(by_mixture))[near]
    noises = noise / np.sqrt(np.array(counts)[near])
    predict, error, doubt = gaussian_process(log_shares(fitted), y[near], noises)
    own_error = np.sqrt(max(0, error**2 - (noises**2).mean()))
    return Surface(lambda mixtures: predict(log_shares(mixtures)),
                   lambda a, b: doubt(log_shares(a), log_shares(b)),
                   100 * error / y.min(), 100 * own_error / y.min(), 100 * noise / y.min(), effect,
                   fitted)


# ---- the best fixed mixture known, and regret ----------------------------------------------------

class Judge:
    """Judges the mixtures of a task by its stored runs."""

    def __init__(self, results, task):
        self.results = results
        self.task = task
        self.seeds = TASKS[task].seeds
        self.tried = fixed_runs(results, task)
        self.surface = response_surface(self.tried)
        self.whole = {}  # those that ran on all seeds
        for mixture, runs in self.tried.items():
            if set(self.seeds) <= runs.keys():
                self.whole[mixture] = runs

    def best(self, measured_on=None):
        """
        The best fixed mixture known and its loss, to compare a run on the seed measured_on with, or
        by the means over all seeds.

        Where many mixtures ran on all seeds it is the one with the lowest mean loss over all seeds
        but measured_on. There the best of many would owe a part of its lead to chance. In other
        tasks it is the mixture tried whose loss by the surface is lowest; and its loss on a seed is
        that, plus the effect of the seed.
        """
        if TASKS[self.task].by_surface:
            best = self.surface.best()
            loss = self.surface.predict(best)[0]
            return best, loss + self.surface.seed_effect.get(measured_on, 0)

        others = [seed for seed in self.seeds if seed != measured_on]

        def mean_loss(mixture):
            return sum(self.whole[mixture][seed] for seed in others) / len(others)

        best = min(self.whole, key=mean_loss)
        if measured_on is None:
            return best, mean_loss(best)
        return best, self.whole[best][measured_on]

    def found(self, what, seed):
        """The Run of a row on a seed; of a search, where none was trained at what it found."""
        trained = self.results.get((self.task, what, seed))
        return trained or self.results.get((self.task, f"search {what}", seed))

    def regret(self, what):
        """% above the best on each measured seed on which `what` was trained, (S,); S may be 0."""
        values = []
        for seed in TASKS[self.task].measured_seeds:
            run = self.results.get((self.task, what, seed))
            if run is not None:
                values.append(100 * (run.loss / self.best(seed)[1] - 1))
        return np.array(values)

    def predicted_regret(self, what):
        """The mean of regret() by the surface, of what was trained at or only found; or NaN."""
        values = []
        for seed in TASKS[self.task].measured_seeds:
            run = self.found(what, seed)
            if run is not None:
                least = self.surface.predict(self.best(seed)[0])[0]
                values.append(100 * (self.surface.predict(run.mixture)[0] / least - 1))
        if not values:
            return np.nan
        return np.mean(values)

    def describe(self):
        """The best fixed mixture, the surface, and what was found, as text."""
        mixture, loss = self.best()
        uniform = []
        for (task, what, _), run in self.results.items():
            if (task, what) == (self.task, "uniform"):
                uniform.append(run.loss)
        text = (f"{self.task}: best fixed mixture known {loss:.4f} nats per token "
                f"({listed(self.task, mixture)}); uniform {np.mean(uniform):.4f}, its seeds "
                f"differ by {100 * np.ptp(uniform) / np.mean(uniform):.2f}%; {len(self.tried)} "
                f"mixtures, {len(self.whole)} of them on all seeds; leave-one-out error of the "
                f"surface {self.surface.error:.2f}%, without the runs' noise "
                f"{self.surface.own_error:.2f}%; noise of a run {self.surface.noise:.2f}%")
        least = self.surface.predict(mixture)[0]
        lines = [text]
        for what in ("ngram", "FastMix"):
            for seed in self.seeds:
                run = self.found(what, seed)
                if run is not None:
                    above = 100 * (self.surface.predict(run.mixture)[0] / least - 1)
                    doubt = 100 * self.surface.doubt(run.mixture, mixture) / least
                    lines.append(f"    {what} found {listed(self.task, run.mixture)}: "
                                 f"{above:+.2f} +- {doubt:.2f}% by the surface")
        return "\n".join(dict.fromkeys(lines))  # the n-grams find the same on each seed


def listed(task, mixture):
    return ", ".join(f"{name} {share:.2f}" for name, share in zip(sources_of(task), mixture))


# ---- tables --------------------------------------------------------------------------------------

def row_of(title, cells):
    return f"| {title} | " + " | ".join(cells) + " |"


def header_of(titles):
    """The first two lines of a table."""
    return "| | " + " | ".join(titles) + " |\n| --- |" + " --- |" * len(titles)


def signed(value):
    """A cell of one figure; NaN is an empty one."""
    if np.isnan(value):
        return ""
    return f"{value:+.2f}"


def cell(values, n_seeds, predicted):
    """Mean (lowest to highest; how many seeds, where not all ran), predicted. Either may miss."""
    if len(values) == 0 and np.isnan(predicted):
        return ""
    if len(values) == 0:
        return f"–, {signed(predicted)}"
    notes = []
    if len(values) > 1:
        notes.append(f"{signed(values.min())} to {signed(values.max())}")
    if len(values) == 1 < n_seeds:
        notes.append("1 seed")
    elif len(values) < n_seeds:
        notes.append(f"{len(values)} seeds")
    text = signed(values.mean())
    if notes:
        text += f" ({'; '.join(notes)})"
    return f"{text}, {signed(predicted)}"


def comparison(judges):
    """The table of some tasks, {task: Judge}, as text."""
    first = next(iter(judges))
    lines = [header_of(["cost", *(TASKS[task].title for task in judges)])]
    for what, title in ROWS.items():
        cells = []
        for task, judge in judges.items():
            n_seeds = len(TASKS[task].measured_seeds)
            cells.append(cell(judge.regret(what), n_seeds, judge.predicted_regret(what)))
        if any(cells):
            lines.append(row_of(title, [f"{cost_of(what, first):.2f}", *cells]))
    return "\n".join(lines)


def readme_table(judges):
    """
    README's table, of some rows for the tasks on bytes, as text: the means of what was measured or,
    where nothing was, what the response surface predicts.
    """
    lines = [header_of(list(README_COLUMNS.values()))]
    all_means = []
    for task, judge in judges.items():
        if TASKS[task].size != "bpe":
            means = []
            for what in README_COLUMNS:
                values = judge.regret(what)
                if len(values) == 0:
                    values = judge.predicted_regret(what)
                means.append(np.mean(values))
            all_means.append(means)
            lines.append(row_of(TASKS[task].title, map(signed, means)))
    means = np.mean(all_means, axis=0)  # NaN where a task has no RegMix
    lines.append(row_of(f"mean of {len(all_means)}", map(signed, means)))
    return "\n".join(lines)


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--results", type=Path, default=STORED, help="lines of runs")
    args = p.parse_args(argv)
    results = load(args.results)
    judges = {}
    for task in TASKS:
        if (task, "uniform", TASKS[task].seeds[0]) in results:
            judges[task] = Judge(results, task)
    if not judges:
        fail(f"{args.results} has no runs at uniform shares on the first seed of any task")
    print("% of the loss above the best fixed mixture known: mean over the seeds (lowest to "
          "highest), by the response surface")
    groups = {}
    for task, judge in judges.items():
        group = (TASKS[task].size == "bpe", TASKS[task].by_surface)
        groups.setdefault(group, {})[task] = judge
    for group in groups.values():
        print(f"\n{comparison(group)}\n")
        for judge in group.values():
            print(judge.describe())
    print("\nREADME's table: means of what was measured or, if nothing was, predicted\n\n"
          f"{readme_table(judges)}")


if __name__ == "__main__":
    main()

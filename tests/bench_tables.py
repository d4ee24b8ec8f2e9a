"""
Stored runs -> tables in Markdown and a figure: the second half of tests/bench_mixtures.py.

Results are {Key: Run}. A mixture is judged by its regret, which is how much higher a model's test
loss is, in %, than at the best fixed mixture known. One run's loss has a noise of half a percent,
so tables show two figures: what was measured, and what a response surface says that was fitted to
all runs of the task at fixed mixtures. Where few mixtures were trained at on all seeds, the surface
also says which one is the best known.
"""
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from bench_flops import outer_step_flops, training_flops
from bench_methods import (DEFAULTS, LARGER, SEARCHES, TASKS, config_of, few_runs, has_bpe,
                           size_of, sources_of)
from prepare_data import save_atomically

REGMIX = (8, 16, 32, 64)  # runs of the RegMix-style search
ROWS = {  # of the table: {"search: mixture taken from it": title}
    "uniform": "uniform",
    "proportional": "proportional to tokens",
    "sqrt": "proportional to the root of the tokens",
    "ngram": "n-gram EM, order 3",
    "best single source": "best single source",
    "FastMix: last": "**FastMix**",
    "FastMix: last_half_average": "FastMix, average of the last half",
    "none: last": "P = 1 (`--curvature none`)",
    "adamw: last": "AdamW's units (`--curvature adamw`)",
    "paper: last": "the paper's setting (P = 1, ε = 1, every 20 steps)",
    "authors: last": "the authors' setting (head, every 20 steps, Adam on z), last",
    "DoGE: run_average": "DoGE's rule",  # summed up as both papers do
    "DoReMi: run_average": "DoReMi's rule",
    "RegMix 8": "RegMix-style, 8 runs",
    "RegMix 16": "RegMix-style, 16 runs",
    "RegMix 32": "RegMix-style, 32 runs",
    "RegMix 64": "RegMix-style, 64 runs",
}
README_COLUMNS = {  # of the table for the README, whose rows are tasks
    "uniform": "uniform",
    "proportional": "proportional",
    "ngram": "n-gram EM",
    "paper: last": "the paper's setting",
    "FastMix: last": "FastMix",
    "RegMix 64": "RegMix-style, 64 runs",
}
SAMPLE_ROWS = {  # of the README's table of the sample
    "FastMix: last": "FastMix, found mixture (`mixture.json`)",
    "ngram": "n-gram EM (`tests/ngram.py`)",
    "proportional": "proportional to tokens",
    "uniform": "uniform",
}
TRANSFER = {  # rows of the table of a larger model
    "proportional": "proportional to tokens",
    "best fixed": "best fixed mixture of the small runs",
    "FastMix: last": "FastMix, found by the small search",
    "found on bytes": "FastMix, found by the small search on bytes",
    "searched there": "FastMix, searched there",
}
REPETITION = {  # row: flags of the search, beside --train_tokens
    "neither": {},
    "repetition": {},
    "cap of 4 epochs": {},  # --bounds, see bench_mixtures.repetition()
    "both": {"max_epochs": 4},
    "both, 8 epochs": {"max_epochs": 8},
    "both, 16 epochs": {"max_epochs": 16},
}
REPETITION_SEEDS = (12, 13, 14)
SETTINGS = [  # of the sensitivity stage: flags of a search. Stored lines may hold more, "search
    # tried NAME": what was tried and is no flag.
    {},
    {"learning_rate_mixture": 0.04},
    {"learning_rate_mixture": 0.16},
    {"outer_every": 2},
    {"outer_every": 4},
    {"outer_every": 20},
    {"target_batch_size": 1},
    {"target_batch_size": 8},
    {"uniform_share": 0},
    {"uniform_share": 1},
]
TUNING_SEEDS = (1, 2)  # they choose settings, and measure nothing else
MANY = 20  # mixtures on all seeds: enough to find the best one among them


# ---- stored runs ---------------------------------------------------------------------------------

class Key(NamedTuple):
    """What a run is known by."""
    task: str
    what: str  # a mixture, "uniform", "random 3", "FastMix: last"; or a search, "search FastMix"
    seed: int
    steps: int
    size: str


@dataclass
class Run:
    test_loss: float  # None for the n-grams' search, which trains nothing
    seconds: float
    mixture: list = None  # the K shares it was trained at, None for a search
    found: dict = None  # of a search: {"last": K shares, "last_half_average": .., ..}


def line_of(key, runs):
    """One line of a file of results: the runs {seed: Run} of one mixture."""
    first = next(iter(runs.values()))
    line = {"task": key.task, "what": key.what, "size": key.size, "steps": key.steps}
    if first.mixture is not None:
        line["mixture"] = first.mixture
    if first.found is not None:
        line["found"] = first.found
    line["losses"] = {seed: run.test_loss for seed, run in runs.items()}
    line["seconds"] = round(sum(run.seconds for run in runs.values()), 3)
    return json.dumps(line, separators=(",", ":")) + "\n"


def load(path):
    """{Key: Run} of a file of results; {} where there is none."""
    path = Path(path)
    results = {}
    if not path.exists():
        return results
    for text in path.read_text().splitlines(keepends=True):
        if not text.endswith("\n"):  # cut short when the bench was killed
            continue
        line = json.loads(text)
        seconds = line["seconds"] / len(line["losses"])
        for seed, loss in line["losses"].items():
            key = Key(line["task"], line["what"], int(seed), line["steps"], line["size"])
            results[key] = Run(loss, seconds, line.get("mixture"), line.get("found"))
    return results


def save(path, results):
    """Writes a file of results with one line per mixture, however many seeds it has."""
    groups = {}  # {what is equal in the runs of a line: (Key, {seed: Run})}
    for key, run in results.items():
        same = json.dumps([key._replace(seed=0), run.mixture, run.found])
        _, runs = groups.setdefault(same, (key, {}))
        runs[key.seed] = run
    text = "".join(line_of(key, runs) for key, runs in groups.values())
    save_atomically(path, lambda f: f.write(text.encode()))


def append(path, key, run):
    """Adds a run to a file of results, as a line of its own."""
    with open(path, "a") as f:
        f.write(line_of(key, {key.seed: run}))


# ---- seeds and losses ----------------------------------------------------------------------------

def steps_of(args, task):
    """Of a run."""
    return args.steps or TASKS[task].steps


def seeds_of(args, task):
    """The tasks with a BPE vocabulary or with few runs have three seeds."""
    return args.seeds[:3] if has_bpe(task) or few_runs(task) else args.seeds


def measured_seeds(args, task):
    """
    The first seed chose which mixtures run on all seeds, so only the others measure. With one seed
    it does both. In a task with few runs nothing is chosen by a seed, and all measure.
    """
    if few_runs(task):
        return seeds_of(args, task)
    return seeds_of(args, task)[1:] or args.seeds


def losses(results, task, what, seeds, steps, size=None):
    """(S,) test losses, or None where one is missing."""
    found = []
    for seed in seeds:
        run = results.get(Key(task, what, seed, steps, size or size_of(task)))
        if run is None:
            return None
        found.append(run.test_loss)
    return np.array(found)


def fixed_runs(results, task, args):
    """[(Key, Run)] of the task's runs at fixed mixtures, with its proxy, on its seeds."""
    seeds = seeds_of(args, task)
    chosen = []
    for key, run in results.items():
        of_task = (key.task, key.steps, key.size) == (task, steps_of(args, task), size_of(task))
        if of_task and run.mixture is not None and key.seed in seeds:
            chosen.append((key, run))
    return chosen


def on_all_seeds(results, task, args):
    """{what: {seed: Run}} of the mixtures that were trained at on all of the task's seeds."""
    by_what = {}
    for key, run in fixed_runs(results, task, args):
        by_what.setdefault(key.what, {})[key.seed] = run
    whole = {}
    for what, runs in by_what.items():
        mixtures = {tuple(run.mixture) for run in runs.values()}
        # what a search found differs from seed to seed, and is not one mixture
        if len(mixtures) == 1 and len(runs) == len(seeds_of(args, task)):
            whole[what] = runs
    return whole


# ---- the response surface ------------------------------------------------------------------------

def squared_distances(a, b):
    """(R, D), (S, D) -> (R, S)."""
    return ((a[:, None] - b[None]) ** 2).sum(-1)


def squared_exponential(distances, length, height):
    """The kernel; the 100 stands for a mean that is not known."""
    return height * np.exp(-distances / (2 * length**2)) + 100


def gaussian_process(x, y, noise):
    """
    Regression of y (R,) on x (R, D); noise (R,) are the standard deviations of y. Returns predict,
    which maps (S, D) to (S,), and the leave-one-out error: the rms of how far each y is from its
    prediction by the others. The kernel's length and height are those of the largest marginal
    likelihood on a grid.
    """
    mean = y.mean()
    scale = y.std()
    distances = squared_distances(x, x)
    most_likely = -np.inf
    for length in (0.3, 0.5, 0.7, 1.0, 1.5, 2.0, 3.0):
        for height in (0.3, 1.0, 3.0, 10.0, 30.0):
            covariance = squared_exponential(distances, length, height)
            covariance += np.diag((noise / scale) ** 2)
            inverse = np.linalg.inv(covariance)
            weights = inverse @ ((y - mean) / scale)
            likelihood = -weights @ (y - mean) / scale - np.linalg.slogdet(covariance)[1]
            if likelihood > most_likely:
                most_likely = likelihood
                best = length, height, weights
                error = np.sqrt(((weights / np.diag(inverse)) ** 2).mean()) * scale
    length, height, weights = best

    def predict(a):
        kernel = squared_exponential(squared_distances(np.atleast_2d(a), x), length, height)
        return mean + scale * kernel @ weights

    return predict, error


def log_shares(mixtures):
    return np.log(np.asarray(mixtures) + 0.05) / 3


@dataclass
class Surface:
    """The test loss as a function of the mixture, of the runs of a task at fixed mixtures."""
    predict: Callable  # mixtures (S, K) -> losses (S,), means over the seeds
    error: float  # leave-one-out, in % of the least loss
    noise: float  # standard deviation of one run, in % of the least loss
    seed_effect: dict  # {seed: how much higher losses are on it}
    n_whole: int  # mixtures that ran on all seeds
    fitted: list  # the mixtures that it is fitted to


def response_surface(results, task, args):
    """
    -> Surface, fitted to all runs of the task at fixed mixtures that are within a tenth of the
    best. None where there are few runs.
    """
    seeds = seeds_of(args, task)
    by_mixture = {}  # {mixture: {seed: loss}}
    for key, run in fixed_runs(results, task, args):
        by_mixture.setdefault(tuple(run.mixture), {})[key.seed] = run.test_loss
    whole = []  # losses of the mixtures that ran on all seeds
    for runs in by_mixture.values():
        if len(runs) == len(seeds):
            whole.append([runs[seed] for seed in seeds])
    if len(by_mixture) < 15 or len(seeds) < 2 or len(whole) < 3:
        return None
    whole = np.array(whole)

    # a seed's effect is the same on all mixtures; what is left is the noise of one run
    seed_effect = whole.mean(0) - whole.mean()  # (S,)
    rest = whole - whole.mean(1, keepdims=True) - seed_effect
    freedom = (len(whole) - 1) * (len(seeds) - 1)
    noise = np.sqrt((rest**2).sum() / freedom)

    y = []  # the mean loss at each mixture, without the effects of the seeds that it ran on
    counts = []
    for runs in by_mixture.values():
        y.append(np.mean([loss - seed_effect[seeds.index(s)] for s, loss in runs.items()]))
        counts.append(len(runs))
    y = np.array(y)
    near = y < 1.1 * whole.mean(1).min()
    fitted = np.array(list(by_mixture))[near]
    noises = noise / np.sqrt(np.array(counts)[near])
    predict, error = gaussian_process(log_shares(fitted), y[near], noises)

    def predict_mixtures(mixtures):
        return predict(log_shares(mixtures))

    return Surface(predict_mixtures, 100 * error / y.min(), 100 * noise / y.min(),
                   dict(zip(seeds, seed_effect)), len(whole), fitted.tolist())


# ---- the best fixed mixture known, and regret ----------------------------------------------------

@dataclass
class Best:
    what: str
    mixture: list
    loss: float  # to compare with: on one seed, or the mean over all


def best_fixed(results, task, args, surface=None, measured_on=None):
    """
    The best fixed mixture known, to compare a run on the seed measured_on with, or by the means
    over all seeds.

    Where many mixtures ran on all seeds it is the one with the lowest mean loss over all seeds but
    measured_on. There the best of many would owe a part of its lead to chance. Where few did, it is
    the mixture tried whose loss by the surface is lowest; and its loss on a seed is that, plus the
    effect of the seed.
    """
    if by_surface(surface):
        return best_by_surface(results, task, args, surface, measured_on)
    whole = on_all_seeds(results, task, args)
    others = [seed for seed in seeds_of(args, task) if seed != measured_on]
    if not others:
        others = [measured_on]

    def mean_loss(what):
        return np.mean([whole[what][seed].test_loss for seed in others])

    best = min(whole, key=mean_loss)
    loss = mean_loss(best)
    if measured_on is not None:
        loss = whole[best][measured_on].test_loss
    return Best(best, next(iter(whole[best].values())).mixture, loss)


def by_surface(surface):
    """Does the surface say which mixture is the best?"""
    return surface is not None and surface.n_whole < MANY


def best_by_surface(results, task, args, surface, measured_on=None):
    """best_fixed() where few mixtures ran on all seeds."""
    predicted = surface.predict(surface.fitted)
    i = predicted.argmin()
    best = surface.fitted[i]
    names = [key.what for key, run in fixed_runs(results, task, args) if run.mixture == best]
    loss = predicted[i]
    if measured_on is not None:
        loss += surface.seed_effect[measured_on]
    return Best(names[0], best, loss)


def best_single_source(results, task, args):
    """The name of the best run at one source alone, by the first seed, which has all of them."""
    best = None
    least = np.inf
    for source in sources_of(task):
        what = f"only {source}"
        loss = losses(results, task, what, args.seeds[:1], steps_of(args, task))
        if loss is not None and loss[0] < least:
            least = loss[0]
            best = what
    return best


def regret(results, task, what, args, best):
    """
    (S,) loss above the best fixed mixture known, in % of it, on each measured seed that ran; None
    if none did. best {seed: Best}.
    """
    seeds = measured_seeds(args, task)
    if what == "best single source":
        seeds = args.seeds[:1]
        what = best_single_source(results, task, args)
    values = []
    for seed in seeds:
        loss = losses(results, task, what, [seed], steps_of(args, task))
        if loss is not None:
            values.append(100 * (loss[0] / best[seed].loss - 1))
    return np.array(values) if values else None


def mixture_of(results, task, what, seed, args):
    """The mixture of a row on a seed: trained at, or only found by a search; None if neither."""
    key = Key(task, what, seed, steps_of(args, task), size_of(task))
    if key in results:
        return results[key].mixture
    search, _, taken = what.partition(": ")
    searched = results.get(key._replace(what=f"search {search}"))
    if searched is None or not taken:
        return None
    return searched.found[taken]


def predicted_regret(results, task, what, args, best, surface):
    """The mean of regret() by the response surface; None for a row that is no mixture."""
    if surface is None:
        return None
    values = []
    for seed in measured_seeds(args, task):
        mixture = mixture_of(results, task, what, seed, args)
        if mixture is not None:
            least = surface.predict(best[seed].mixture)[0]
            values.append(100 * (surface.predict(mixture)[0] / least - 1))
    return np.mean(values) if values else None


# ---- costs ---------------------------------------------------------------------------------------

def run_flops(task, steps):
    """Of a run of the task's proxy at a fixed mixture."""
    settings = DEFAULTS | TASKS[task].flags
    tokens = settings["batch_size"] * settings["block_size"]
    return steps * training_flops(config_of(task), tokens)


def search_flops(task, steps, search):
    """Of a search, a key of SEARCHES, over the task's sources, for runs of so many steps."""
    config = config_of(task)
    settings = DEFAULTS | {"max_steps": TASKS[task].steps} | TASKS[task].search_flags
    settings |= SEARCHES[search]
    steps *= settings["max_steps"] / TASKS[task].steps  # some searches are shorter
    target_tokens = settings["target_batch_size"] * config.block_size
    K = len(sources_of(task))
    if search == "DoReMi":
        reference = run_flops(task, steps)
        reads_along = reference / 3  # the reference model's forward pass on each batch
        return run_flops(task, steps) + reference + reads_along
    if search == "authors":
        # Their code takes one forward and backward pass per source and one for the target. It
        # runs here on alignments that cost less, but is charged for its own.
        outer = (K + 1) * training_flops(config, target_tokens)
    else:
        outer = outer_step_flops(config, target_tokens, K, settings["curvature"] == "kfac")
    return run_flops(task, steps) + steps / settings["outer_every"] * outer


def cost_of(what, task):
    """
    Of what led to a mixture, in training runs of the proxy. The training run at the mixture itself
    is not counted, because every row needs it.
    """
    search, _, taken = what.partition(": ")
    if what.startswith("RegMix"):
        return int(what.split()[1])
    if not taken:
        return 0.0
    return search_flops(task, 1, search) / run_flops(task, 1)


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


def cell(values, n_seeds, predicted=None):
    """Mean (lowest to highest; how many seeds, where not all ran), predicted. Either may miss."""
    if values is None:
        return "" if predicted is None else f"–, {signed(predicted)}"
    text = signed(values.mean())
    notes = []
    if len(values) > 1:
        notes.append(f"{signed(values.min())} to {signed(values.max())}")
    if len(values) < n_seeds:
        notes.append("1 seed" if len(values) == 1 else f"{len(values)} seeds")
    if notes:
        text += f" ({'; '.join(notes)})"
    if predicted is not None:
        text += f", {signed(predicted)}"
    return text


def listed(task, mixture):
    return ", ".join(f"{name} {share:.2f}" for name, share in zip(sources_of(task), mixture))


def group_of(task):
    """Tasks of a group share a table."""
    if few_runs(task):
        return "few runs"
    if has_bpe(task):
        return "BPE"
    return "bytes"


def show(results, args):
    """Prints all tables that the results have runs for, and draws the figure."""
    tasks = []
    for task in args.tasks:
        steps = steps_of(args, task)
        if losses(results, task, "uniform", seeds_of(args, task), steps) is not None:
            tasks.append(task)
    if not tasks:
        print(f"{args.results} has no runs on all of these seeds and one of these tasks")
        return
    surfaces = {}  # {task: Surface}
    bests = {}  # {task: {seed: Best}}
    for task in tasks:
        surface = response_surface(results, task, args)
        surfaces[task] = surface
        bests[task] = {seed: best_fixed(results, task, args, surface, seed)
                       for seed in seeds_of(args, task)}
    for group in ("bytes", "BPE", "few runs"):
        of_group = [task for task in tasks if group_of(task) == group]
        if of_group:
            show_tasks(results, of_group, args, bests, surfaces)
    show_transfer(results, tasks, args)
    show_repetition(results, args)
    show_tuning(results, tasks, args, surfaces)
    show_for_readme(results, tasks, args, bests)
    show_sample(results, args)
    with_regmix = [task for task in tasks if not few_runs(task)]
    if with_regmix:
        figure(results, with_regmix, args, bests, Path(args.results).parent / "mixtures.png")


def show_tasks(results, tasks, args, bests, surfaces):
    """The comparison, for the tasks of a group, and what was found for each task."""
    measured = measured_seeds(args, tasks[0])
    steps = sorted({steps_of(args, task) for task in tasks})
    chosen = ""
    if by_surface(surfaces[tasks[0]]):
        chosen = " (the mixture tried whose loss by the response surface is lowest)"
    elif len(seeds_of(args, tasks[0])) > 1:
        chosen = " (chosen on the other seeds)"
    print(f"\n{' or '.join(map(str, steps))} steps, seeds {', '.join(map(str, measured))}; regret: "
          f"% of the loss above the best fixed mixture known{chosen}, mean over the seeds (lowest "
          "to highest), by the response surface\n")
    print(header_of(["cost", *(TASKS[task].title for task in tasks)]))
    for what, title in ROWS.items():
        cells = []
        for task in tasks:
            values = regret(results, task, what, args, bests[task])
            predicted = predicted_regret(results, task, what, args, bests[task], surfaces[task])
            cells.append(cell(values, len(measured), predicted))
        if any(cells):
            print(row_of(title, [f"{cost_of(what, tasks[0]):.2f}", *cells]))
    for task in tasks:
        show_found(results, task, args, surfaces[task])
    print()
    for task in tasks:
        run = run_flops(task, steps_of(args, task))
        search = search_flops(task, steps_of(args, task), "FastMix")
        print(f"{task}: {run:.3g} FLOPs at a fixed mixture, {search:.3g} (cost "
              f"{search / run:.2f}) by a search with FastMix")


def show_found(results, task, args, surface):
    """The best fixed mixture of a task, its noise, and what the searches found."""
    seeds = seeds_of(args, task)
    steps = steps_of(args, task)
    best = best_fixed(results, task, args, surface)
    uniform = losses(results, task, "uniform", seeds, steps)
    tried = {tuple(run.mixture) for _, run in fixed_runs(results, task, args)}
    whole = set()
    for runs in on_all_seeds(results, task, args).values():
        whole.add(tuple(next(iter(runs.values())).mixture))
    text = (f"\n{task}: best fixed mixture known {best.loss:.4f} nats per token "
            f"({best.what}: {listed(task, best.mixture)}); uniform {uniform.mean():.4f}, its seeds "
            f"differ by {100 * np.ptp(uniform) / uniform.mean():.2f}%; {len(tried)} mixtures, "
            f"{len(whole)} of them on all seeds")
    if surface is not None:
        text += (f"; leave-one-out error of the surface {surface.error:.2f}%; noise of a run "
                 f"{surface.noise:.2f}%")
        if surface.noise > 1:
            text += ", more than 1%"
    print(text)
    by_ngrams = results.get(Key(task, "search ngram", args.seeds[0], steps, size_of(task)))
    if by_ngrams is not None:
        print(f"    n-gram EM found {listed(task, by_ngrams.found['mixture'])} in "
              f"{by_ngrams.seconds:.1f} s")
    for seed in seeds:
        run = results.get(Key(task, "search FastMix", seed, steps, size_of(task)))
        if run is not None:
            print(f"    seed {seed} found {listed(task, run.found['last'])}")


def show_sample(results, args):
    """Test losses on the sample, by seed: the README's first table."""
    seeds = args.seeds[:3]
    print("\nthe sample: test loss per token, in nats\n")
    print(header_of([*(f"seed {seed}" for seed in seeds), "mean"]))
    for what, title in SAMPLE_ROWS.items():
        found = losses(results, "sample", what, seeds, TASKS["sample"].steps)
        if found is not None:
            print(row_of(title, [f"{loss:.3f}" for loss in (*found, found.mean())]))


def show_for_readme(results, tasks, args, bests):
    """The measured means of some rows, for the tasks on bytes."""
    print("\nthe README's table: means of what was measured\n")
    print(header_of(list(README_COLUMNS.values())))
    whole = []  # rows without a gap but for RegMix, (., columns)
    for task in tasks:
        if has_bpe(task):
            continue
        means = []
        for what in README_COLUMNS:
            values = regret(results, task, what, args, bests[task])
            if values is None:
                values = np.nan
            means.append(np.mean(values))
        if np.isfinite(means[:-1]).all():
            whole.append(means)
        print(row_of(TASKS[task].title, map(signed, means)))
    if whole:
        means = np.mean(whole, axis=0)  # NaN where a task has no RegMix
        print(row_of(f"mean of {len(whole)}", map(signed, means)))


def show_transfer(results, tasks, args):
    there = []  # tasks with such runs
    for task in tasks:
        where = (2 * steps_of(args, task), LARGER.get(size_of(task)))
        if Key(task, "searched there", args.seeds[0], *where) in results:
            there.append(task)
    if not there:
        return
    steps = 2 * steps_of(args, there[0])
    print(f"\na larger model, {steps} steps: % of uniform's loss on the same seed\n")
    print(header_of([TASKS[task].title for task in there]))
    for what, title in TRANSFER.items():
        cells = []
        for task in there:
            gains = []
            for seed in args.seeds:
                large = LARGER[size_of(task)]
                found = losses(results, task, what, [seed], steps, large)
                uniform = losses(results, task, "uniform", [seed], steps, large)
                if found is not None and uniform is not None:
                    gains.append(100 * (found[0] / uniform[0] - 1))
            cells.append(cell(np.array(gains) if gains else None, 0))
        if any(cells):
            print(row_of(title, cells))


def show_repetition(results, args):
    steps = 4 * steps_of(args, "scarce")
    uniform = losses(results, "scarce", "uniform", REPETITION_SEEDS, steps)
    if uniform is None:
        return
    print(f"\nscarce target, {steps} steps: % of uniform's loss\n")
    seeds = [f"seed {seed}" for seed in REPETITION_SEEDS]
    print(header_of([*seeds, "mean", "share of the scarce source"]))
    for name in REPETITION:
        gains = 100 * (losses(results, "scarce", name, REPETITION_SEEDS, steps) / uniform - 1)
        shares = []
        for seed in REPETITION_SEEDS:
            shares.append(results[Key("scarce", name, seed, steps, "base")].mixture[-1])
        cells = [f"{gain:+.2f}" for gain in (*gains, gains.mean())]
        print(row_of(name, [*cells, f"{np.mean(shares):.3f}"]))


def named(setting):
    """The name of a search with some flags changed."""
    flags = ", ".join(f"--{flag} {value:g}" for flag, value in setting.items())
    return "search " + (flags or "at the defaults")


def tuning_regret(results, task, what, args, surface, least):
    """
    Of what a search recommends on the tuning seeds; NaN where none ran. That is the last mixture,
    but the average of the last half for what was tried at a constant rate.
    """
    values = []
    for seed in TUNING_SEEDS:
        run = results.get(Key(task, what, seed, steps_of(args, task), size_of(task)))
        if run is not None:
            taken = "last" if "last" in run.found else "last_half_average"
            loss = surface.predict(run.found[taken])[0]
            values.append(100 * (loss / least - 1))
    if not values:
        return np.nan
    return np.mean(values)


def show_tuning(results, tasks, args, surfaces):
    """By the response surface, so that a setting costs a search and no training afterwards."""
    searches = [named(setting) for setting in SETTINGS]
    for key in results:
        if key.what.startswith("search tried ") and key.what not in searches:
            searches.append(key.what)

    columns = {}  # {task: [regret of each search]}
    for task in tasks:
        surface = surfaces[task]
        if surface is not None:
            least = surface.predict(best_fixed(results, task, args, surface).mixture)[0]
            column = [tuning_regret(results, task, what, args, surface, least)
                      for what in searches]
            if not np.isnan(column).all():
                columns[task] = column
    if not columns:
        return
    print(f"\nsearches of seeds {TUNING_SEEDS[0]} and {TUNING_SEEDS[1]}: "
          "% of the loss above the best fixed mixture known, by the response surface\n")
    print(header_of([TASKS[task].title for task in columns]))
    for what, *row in zip(searches, *columns.values()):
        title = what.removeprefix("search ")
        if title.startswith("--"):
            title = f"`{title}`"
        if not np.isnan(row).all():
            print(row_of(title, map(signed, row)))


# ---- the figure ----------------------------------------------------------------------------------

POINTS = [  # label, colour, marker, rank among those of about one cost, rows
    ("RegMix-style", "#009E73", "s", 0, [f"RegMix {n}" for n in REGMIX]),
    ("FastMix", "#0072B2", "o", 0, ["FastMix: last"]),
    ("the paper's setting", "#44AA99", "<", 2, ["paper: last"]),
    ("the authors' setting", "#999933", "v", 0, ["authors: last"]),
    ("DoGE's rule", "#E69F00", "^", 5, ["DoGE: run_average"]),
    ("DoReMi's rule", "#CC79A7", "v", 0, ["DoReMi: run_average"]),
]


def draw_task(ax, results, task, args, best):
    """One panel: regret against the cost of the search."""
    for what, style in (("uniform", "--"), ("proportional", ":"), ("ngram", "-.")):
        values = regret(results, task, what, args, best)
        if values is not None:
            ax.axhline(values.mean(), color="#666666", linestyle=style, linewidth=1, label=what)
    ax.axhline(0, color="#222222", linewidth=1, label="best fixed mixture known")
    for label, colour, marker, rank, rows in POINTS:
        points = []
        for what in rows:
            values = regret(results, task, what, args, best)
            if values is not None:
                x = cost_of(what, task) * (1 + 0.08 * rank)  # side by side
                mean = values.mean()
                points.append((x, mean, mean - values.min(), values.max() - mean))
        if points:
            x, y, below, above = np.array(points).T
            ax.errorbar(x, y, yerr=(below, above), color=colour, marker=marker, markersize=6,
                        linewidth=1, capsize=2, label=label)
    ticks = [1, 2, 4, 8, 16, 32, 64]
    ax.set(title=TASKS[task].title, xlabel="cost of the search (proxy runs)", xscale="log",
           xlim=(0.8, 90))
    ax.set_xticks(ticks, [str(tick) for tick in ticks], minor=False)
    ax.minorticks_off()
    ax.spines[["top", "right"]].set_visible(False)


def figure(results, tasks, args, bests, path):
    """Writes a picture with one panel per task."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    columns = min(3, len(tasks))
    rows = -(-len(tasks) // columns)
    fig, axes = plt.subplots(rows, columns, dpi=110, squeeze=False, layout="constrained",
                             figsize=(3.6 * columns, 3.0 * rows + 0.8))
    for ax in axes.flat[len(tasks):]:
        ax.remove()
    for ax, task in zip(axes.flat, tasks):
        draw_task(ax, results, task, args, bests[task])
    for ax in axes[:, 0]:
        ax.set_ylabel("loss above the best, %")
    entries = {}  # {label: handle}; a panel need not have all
    for ax in axes.flat[:len(tasks)]:
        handles, labels = ax.get_legend_handles_labels()
        entries |= dict(zip(labels, handles))
    fig.legend(entries.values(), entries.keys(), loc="outside lower center", ncols=4, fontsize=8,
               frameon=False)
    fig.savefig(path)
    print(f"\nwrote {path}")

"""
Does the search find the best mixture, and at what price? FastMix against fixed mixtures, n-gram
models, a RegMix-style search and DoGE's rule, by the target's test loss of models trained for the
same number of steps at the mixture that each recommends.

    python tests/bench_mixtures.py --tasks order             the methods' rows of a task, an hour
    python tests/bench_mixtures.py --tasks sample --plan 8   mixtures near the best one known
    python tests/bench_mixtures.py --tasks sample --try 0.42,0.01,0.02,0.5,0.03,0.02 --seeds 11,12
    python tests/bench_tables.py --results out-bench/results.jsonl          the tables of all that

Every run is fastmix.py itself, in one thread, --jobs at a time. Its result is appended to --results
at once, and a run whose result is there is not made again: a bench that was stopped goes on when it
is started again. To make a run anew, delete its line. Seeds are paired: a seed fixes initialisation
and random numbers of every method's run.

The runs of RESULTS.md are in tests/bench_mixtures.jsonl. Losses of another machine's text, or by a
version that draws other batches, are not comparable with them. To add such runs to that file, give
seeds of their own: at a new seed some known mixtures are run first, which tell how much higher
losses are there.

The tasks with a BPE vocabulary are left out unless WORK/data-bpe holds the sample with one:

    head -4096 gpt2.tiktoken > out-bench/gpt2-4096.tiktoken
    python prepare_data.py --data_dir out-bench/data-bpe --tokenizer out-bench/gpt2-4096.tiktoken
"""
import argparse
import contextlib
import io
import json
import multiprocessing
import os
import sys
import tempfile
import zlib
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from unittest import mock

# runs are side by side, and figures must not depend on the number of cores
os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np  # noqa: E402
import torch  # noqa: E402

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]
import fastmix  # noqa: E402
from bench_methods import (REGMIX, SEARCHES, TASKS, data_of, doge, ngram_mixture,  # noqa: E402
                           prepare, random_mixtures, regmix, settings_of, sources_of,
                           sqrt_mixture)
from bench_tables import Judge, Run, fixed_runs, line_of, listed, load  # noqa: E402

# A planned mixture is drawn from the Dirichlet distribution around the best one known: the larger
# this, the nearer. A share of 0.5 then has a standard deviation of 0.12.
NEARNESS = 16


# ---- one run -------------------------------------------------------------------------------------

def train(work, task, seed, out, flags, rules):
    """
    One run of fastmix.py in this process, with some of its names replaced -> the mean over the
    targets of the test losses, in nats per token.
    """
    settings = settings_of(work, task) | {"seed": seed} | flags
    settings["log_every"] = max(1, settings["max_steps"] // 40)
    argv = ["--out_dir", str(out)]
    for flag, value in settings.items():
        argv += [f"--{flag}", str(value)]
    n_targets = len(TASKS[task].target.split(","))
    with (mock.patch.multiple(fastmix, TEST_TOKENS=2**17 // n_targets, **rules),
          contextlib.redirect_stdout(io.StringIO())):
        fastmix.main(argv)
    result = json.loads((out / "mixture.json").read_text())
    return round(float(np.mean(list(result["test_loss"].values()))), 5)


def shares_of(out, averaged):
    """The mixture (K,) at the end of a run, or averaged over it, of the folder that it wrote."""
    rows = []
    for line in (out / "log.jsonl").read_text().splitlines():
        rows.append(list(json.loads(line)["alpha"].values()))
    if averaged:
        return np.mean(rows, axis=0)
    return np.array(rows[-1])


def one_run(work, task, what, seed, mixture):
    """
    In a process of the pool: a run at a mixture, K shares or a name, or a search -> Run. `what` is
    "search NAME" for a search, which has no mixture.
    """
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir=work) as folder:
        out = Path(folder, "out")
        flags = {"mixture": mixture}
        rules = {}
        if mixture is None:
            search = what.removeprefix("search ")
            flags = TASKS[task].search_flags
            if search == "DoGE":
                rules = doge()
            flags = flags | SEARCHES[search]
        elif not isinstance(mixture, str):
            pairs = zip(sources_of(task), mixture)
            flags["mixture"] = ",".join(f"{name}={share:.6f}" for name, share in pairs)
        loss = train(work, task, seed, out, flags, rules)
        if mixture is None or isinstance(mixture, str):
            mixture = shares_of(out, averaged=what == "search DoGE")  # as its paper does
    # as it was given, if it was: one mixture must be the same on all seeds
    return Run(np.round(mixture, 5).tolist(), loss)


# ---- many runs -----------------------------------------------------------------------------------

class Runner:
    """Collects jobs, makes those whose result is not stored yet, and stores what comes out."""

    def __init__(self, args):
        self.args = args
        self.results = load(args.results)
        self.jobs = {}  # {(task, what, seed): mixture}

    def add(self, task, what, seed, mixture=None):
        """Asks for a run at a mixture, K shares or a name; with none it is a search."""
        if (task, what, seed) not in self.results:
            self.jobs[task, what, seed] = mixture

    def add_try(self, task, mixture, seed):
        """Asks for a run at K shares that have no name, unless there is one on this seed."""
        mixture = np.round(mixture, 5).tolist()
        if seed not in fixed_runs(self.results, task).get(tuple(mixture), {}):
            name = zlib.crc32(str(mixture).encode())
            self.add(task, f"try {name:08x}", seed, mixture)

    def run(self):
        """Makes the runs that were asked for. Each result is stored as soon as it is there."""
        context = multiprocessing.get_context("fork")  # so that torch is imported once
        with ProcessPoolExecutor(self.args.jobs, mp_context=context) as pool:
            pending = {}  # {future: (task, what, seed)}
            for key, mixture in self.jobs.items():
                pending[pool.submit(one_run, self.args.work, *key, mixture)] = key
            self.jobs = {}
            for n, future in enumerate(as_completed(pending), 1):
                task, what, seed = pending[future]
                try:
                    run = future.result()
                except BaseException:
                    pool.shutdown(cancel_futures=True)
                    print(f"failed: {task}, {what}, seed {seed}", file=sys.stderr)
                    raise
                self.results[task, what, seed] = run
                with open(self.args.results, "a") as file:
                    file.write(line_of(task, what, run.mixture, {seed: run.loss}))
                print(f"{n}/{len(pending)} {task} {what}, seed {seed}: {run.loss:.4f} "
                      f"({listed(task, run.mixture)})", flush=True)


# ---- what to run ---------------------------------------------------------------------------------

def add_named(runner, task, seeds):
    """The mixtures that have a row of their own and need no search."""
    by_ngrams = None
    for (where, what, _), run in runner.results.items():
        if (where, what) == (task, "ngram"):
            by_ngrams = run.mixture
    if by_ngrams is None:
        with contextlib.redirect_stdout(io.StringIO()):
            by_ngrams = ngram_mixture(runner.args.work, task)
    for seed in seeds:
        runner.add(task, "uniform", seed, "uniform")
        runner.add(task, "proportional", seed, "proportional")
        runner.add(task, "ngram", seed, by_ngrams)


def compare(runner, tasks, searches):
    """The rows of the tables, step by step over all tasks, so that the pool is always full."""
    for task in tasks:
        add_named(runner, task, TASKS[task].seeds)
        roots = sqrt_mixture(data_of(runner.args.work, task), sources_of(task))
        for seed in TASKS[task].seeds:
            runner.add(task, "sqrt", seed, roots)
            for search in searches:
                if (task, search, seed) not in runner.results:
                    runner.add(task, f"search {search}", seed)
            if not TASKS[task].by_surface:
                for i, mixture in enumerate(random_mixtures(task)):
                    runner.add(task, f"random {i}", seed, mixture)
    runner.run()
    for task in tasks:
        for seed in TASKS[task].seeds:
            for search in searches:
                if (task, search, seed) not in runner.results:
                    found = runner.results[task, f"search {search}", seed].mixture
                    runner.add(task, search, seed, found)
        if not TASKS[task].by_surface:
            add_regmix(runner, task)
    runner.run()


def add_regmix(runner, task):
    """By the random mixtures on the first seed, trained at on all."""
    seeds = TASKS[task].seeds
    runs = []
    for i in range(len(random_mixtures(task))):
        runs.append(runner.results[task, f"random {i}", seeds[0]])
    for n in REGMIX:
        if n <= len(runs):
            best = regmix(np.array([run.mixture for run in runs[:n]]),
                          np.array([run.loss for run in runs[:n]]))
            for seed in seeds:
                runner.add(task, f"RegMix {n}", seed, best)


def plan(runner, task, n, seeds):
    """The best mixture known on all seeds, and n near the best one, each on a seed in turn."""
    for seed in seeds:
        runner.add_try(task, Judge(runner.results, task).best()[0], seed)
    runner.run()
    for i in range(n):
        best = Judge(runner.results, task).best()[0]
        K = len(best)
        rng = np.random.default_rng(len(runner.results) + len(runner.jobs))
        # a tenth of uniform: a source that the best one lacks is tried as well
        near = rng.dirichlet(NEARNESS * (0.9 * np.array(best) + 0.1 / K))
        runner.add_try(task, near, seeds[i % len(seeds)])
        if len(runner.jobs) == runner.args.jobs:  # what they show is used for the next ones
            runner.run()
    runner.run()


# ---- the command line ----------------------------------------------------------------------------

def prepare_all(work, tasks):
    """The data of the tasks -> those that can be run."""
    prepare(work / "data")
    there = []
    for task in tasks:
        if TASKS[task].size != "bpe":
            there.append(task)
        elif data_of(work, task).exists():
            prepare(data_of(work, task))
            there.append(task)
    start = Path(work, TASKS["masked"].flags["init_from"])
    if "masked" in there and not start.exists():
        print("training the checkpoint that the masked task starts from")
        with tempfile.TemporaryDirectory(dir=work) as folder:
            out = Path(folder, "out")
            train(work, "sample", 0, out, {"mixture": "proportional"}, {})
            out.rename(start.parent)
    return there


def numbers(kind):
    """a,b,c -> [kind(a), kind(b), kind(c)], for argparse."""
    return lambda text: [kind(item) for item in text.split(",")]


def main():
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    add = p.add_argument
    add("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    add("--searches", nargs="+", choices=SEARCHES, default=list(SEARCHES))
    add("--try", dest="tried", nargs="+", metavar="SHARES", type=numbers(float), default=[],
        help="mixtures to run instead, K numbers with commas each, on all --seeds")
    add("--plan", type=int, default=0, metavar="N",
        help="run N new mixtures instead, near the best one known, on --seeds in turn")
    add("--seeds", type=numbers(int), help="of --try and --plan (the task's)")
    add("--work", default="out-bench", type=Path, help="data, and what runs need")
    add("--results", type=Path, help="lines of runs, to add to (WORK/results.jsonl)")
    add("--jobs", type=int, default=os.cpu_count(), help="runs side by side")
    args = p.parse_args()
    args.results = args.results or args.work / "results.jsonl"
    args.work.mkdir(parents=True, exist_ok=True)
    tasks = prepare_all(args.work, args.tasks)
    runner = Runner(args)
    if not args.tried and not args.plan:
        compare(runner, tasks, args.searches)
    for task in tasks:
        if args.tried or args.plan:
            seeds = args.seeds or TASKS[task].seeds
            add_named(runner, task, seeds)
            runner.run()
            for mixture in args.tried:
                for seed in seeds:
                    runner.add_try(task, np.array(mixture) / sum(mixture), seed)
            runner.run()
            if args.plan:
                plan(runner, task, args.plan, seeds)
        print(Judge(runner.results, task).describe())


if __name__ == "__main__":
    main()

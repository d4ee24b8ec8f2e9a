"""
Does the search find the best mixture, and at what price? FastMix against fixed mixtures, n-gram
models, a RegMix-style search and the rules of DoGE and DoReMi, by the target's test loss of models
trained for the same number of steps at the mixture that each recommends.

    python tests/bench_mixtures.py --quick         one task, short runs: 3 minutes on 2 cores
    python tests/bench_mixtures.py                 eight tasks: many hours on 2 cores
    python tests/bench_mixtures.py --gpt2_ranks FILE.tiktoken        two more, with a BPE vocabulary
    python tests/bench_mixtures.py --stages transfer repetition sensitivity     the other questions
    python tests/bench_mixtures.py --table --results tests/bench_mixtures.jsonl         runs nothing

Every run is fastmix.py itself, in one thread, --jobs at a time. Its result is appended to
WORK/results.jsonl at once, and a run whose result is there is never run again: a bench that was
stopped or killed resumes when it is started again. At its start and end a bench rewrites the file
with one line per mixture, as in tests/bench_mixtures.jsonl. Seeds are paired: a seed fixes
initialisation and batches of every method's run. With a GPU, runs at fixed mixtures are trained
there, hundreds at once (tests/ensemble.py).

tests/bench_methods.py has the tasks and the methods, tests/bench_tables.py makes the tables.
"""
import argparse
import contextlib
import io
import json
import multiprocessing
import os
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

# runs are side by side, and figures must not depend on the number of cores
os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np  # noqa: E402
import torch  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
import fastmix  # noqa: E402
from bench_methods import (BYTES, DEFAULTS, LARGER, SEARCHES, SIZES, TASKS, data_of,  # noqa: E402
                           few_runs, has_bpe, ngram_mixture_of, prepare, read, regmix, rules_of,
                           size_of, sources_of, sqrt_mixture, tried_mixtures)
from bench_tables import (REGMIX, REPETITION, REPETITION_SEEDS, ROWS, SETTINGS,  # noqa: E402
                          TUNING_SEEDS, Key, Run, append, best_fixed, load, named, save, seeds_of,
                          show, steps_of)
from ensemble import train_many  # noqa: E402

# runs on a GPU, by its memory
AT_ONCE = {"base": 320, "sample": 128, "large": 64, "bpe": 48, "bpe_large": 12}


# ---- one run -------------------------------------------------------------------------------------

@dataclass
class Job:
    """A run to be made."""
    key: Key
    mixture: object = None  # K shares, "uniform" or "proportional"; None for a search
    flags: dict = field(default_factory=dict)  # of a search


def settings_of(work, key):
    """fastmix.py's flags of every run, {flag: value}."""
    task = TASKS[key.task]
    n_layer, n_head, n_embd = SIZES[key.size]
    on_gpu = key.size != "base" and torch.cuda.is_available()
    settings = {"sources": task.sources, "target": task.target,
                "data_dir": data_of(work, key.task), "seed": key.seed, "max_steps": key.steps,
                "log_every": max(1, key.steps // 40), "n_layer": n_layer, "n_head": n_head,
                "n_embd": n_embd, "eval_tokens": 1024,
                "learning_rate": 2e-3,  # half the default: seeds differ by less
                "device": "cuda" if on_gpu else "cpu", "dtype": "float32"}
    settings |= task.flags
    if "init_from" in settings:
        settings["init_from"] = Path(work, settings["init_from"])
    return settings


def test_tokens_of(task):
    """How many tokens of each target's test split are evaluated."""
    n_targets = len(TASKS[task].target.split(","))
    return 2**17 // n_targets


def train(work, key, out, flags, rules):
    """One run of fastmix.py in this process, with some of its names replaced -> mixture.json."""
    argv = []
    for flag, value in (settings_of(work, key) | flags).items():
        argv += [f"--{flag}", str(value)]
    argv += ["--out_dir", str(out)]
    # nobody looks at the pictures of these runs
    rules = {"TEST_TOKENS": test_tokens_of(key.task), "draw_run": lambda folder: folder, **rules}
    with mock.patch.multiple(fastmix, **rules), contextlib.redirect_stdout(io.StringIO()):
        fastmix.main(argv)
    return json.loads((out / "mixture.json").read_text())


def rounded(mixture):
    """{source: share} -> K shares."""
    return [round(share, 5) for share in mixture.values()]


def ngram_search(work, task):
    """-> Run, which trains nothing: its result is the mixture, and how many seconds it took."""
    start = time.time()
    with contextlib.redirect_stdout(io.StringIO()):
        shares = ngram_mixture_of(data_of(work, task), task)
    found = {"mixture": [round(share, 5) for share in shares.tolist()]}
    return Run(None, round(time.time() - start, 1), found=found)


def one_run(work, job):
    """Job -> Run, in a process of the pool."""
    torch.set_num_threads(1)
    key = job.key
    if key.what == "search ngram":
        return ngram_search(work, key.task)
    flags = dict(job.flags)
    rules = {}
    if job.mixture is None:
        flags = TASKS[key.task].search_flags | flags
    elif isinstance(job.mixture, str):
        flags["mixture"] = job.mixture
    else:
        pairs = zip(sources_of(key.task), job.mixture)
        flags["mixture"] = ",".join(f"{name}={share:.6f}" for name, share in pairs)
    with tempfile.TemporaryDirectory(dir=work) as folder:
        if job.mixture is None:
            search = key.what.removeprefix("search ")
            reference = Path(folder, "reference")
            if search == "DoReMi":
                train(work, key, reference, {**TASKS[key.task].search_flags, "mixture": "uniform"},
                      {})
            rules = rules_of(search, reference / "ckpt.pt")
        result = train(work, key, Path(folder, "out"), flags, rules)
    run = Run(round(result["test_loss"], 5), result["seconds"])
    if job.mixture is None:
        run.found = {name: rounded(mixture) for name, mixture in result["mixtures"].items()}
    else:
        run.mixture = rounded(result["mixture"])
    return run


def runs_at_once(work, jobs):
    """[Job] at fixed mixtures, of one task, size and number of steps -> [Run], on the GPU."""
    start = time.time()
    key = jobs[0].key
    args = argparse.Namespace(**DEFAULTS | settings_of(work, key))
    names = sources_of(key.task)
    sizes = torch.tensor([len(read(args.data_dir, name, "train")) for name in names])
    mixtures = []
    for job in jobs:
        mixture = job.mixture
        if isinstance(mixture, str):
            mixture = fastmix.read_mixture(mixture, names, sizes)
        mixture = np.asarray(mixture, dtype=np.float64)
        mixtures.append(mixture / mixture.sum())
    seeds = [job.key.seed for job in jobs]
    losses = train_many(args, seeds, np.stack(mixtures), "cuda", test_tokens_of(key.task))
    seconds = round((time.time() - start) / len(jobs), 3)
    runs = []
    for loss, mixture in zip(losses, mixtures):
        runs.append(Run(round(float(loss), 5), seconds, [round(m, 5) for m in mixture.tolist()]))
    return runs


# ---- many runs -----------------------------------------------------------------------------------

class Runner:
    """Collects jobs, runs those whose result is not in the file yet, and stores what comes out."""

    def __init__(self, args):
        self.args = args
        self.path = args.work / "results.jsonl"
        self.results = load(self.path)
        self.jobs = {}  # {Key: Job}
        self.save()  # a line that a kill cut short must not stay in the middle

    def save(self):
        save(self.path, self.results)

    def key(self, task, what, seed, steps=None, size=None):
        return Key(task, what, seed, steps or steps_of(self.args, task), size or size_of(task))

    def get(self, task, what, seed, **where):
        return self.results.get(self.key(task, what, seed, **where))

    def add(self, task, what, seed, mixture=None, flags={}, **where):
        """Asks for a run at a mixture, K shares or a name; with none it is a search."""
        key = self.key(task, what, seed, **where)
        if key not in self.results:
            self.jobs[key] = Job(key, mixture, flags)

    def store(self, key, run):
        append(self.path, key, run)
        self.results[key] = run

    def run(self):
        """Runs what was asked for. Each result is stored as soon as it is there."""
        for_pool = []
        for_gpu = {}  # {(task, size, steps): [Job]}
        for key, job in self.jobs.items():
            # tests/ensemble.py knows no checkpoints and no masks
            alone = "init_from" in TASKS[key.task].flags
            if job.mixture is not None and torch.cuda.is_available() and not alone:
                for_gpu.setdefault((key.task, key.size, key.steps), []).append(job)
            else:
                for_pool.append(job)
        self.jobs = {}
        context = multiprocessing.get_context("fork")  # so that torch is imported once
        with ProcessPoolExecutor(self.args.jobs, mp_context=context) as pool:
            pending = {pool.submit(one_run, str(self.args.work), job): job for job in for_pool}
            for name, jobs in for_gpu.items():
                self.run_on_gpu(name, jobs)
            for n, future in enumerate(as_completed(pending), 1):
                job = pending[future]
                try:
                    run = future.result()
                except BaseException:
                    pool.shutdown(cancel_futures=True)
                    print("failed:", job, file=sys.stderr)
                    raise
                self.store(job.key, run)
                task, what, seed, steps, size = job.key
                loss = "no loss"
                if run.test_loss is not None:
                    loss = f"{run.test_loss:.4f}"
                print(f"{n}/{len(pending)} {task:11s} {what:32s} seed {seed} {size} {steps}: "
                      f"{loss}  ({run.seconds:.0f} s)", flush=True)

    def run_on_gpu(self, name, jobs):
        task, size, steps = name
        for i in range(0, len(jobs), AT_ONCE[size]):
            batch = jobs[i: i + AT_ONCE[size]]
            for job, run in zip(batch, runs_at_once(self.args.work, batch)):
                self.store(job.key, run)
            print(f"{task} {size} {steps}: {i + len(batch)}/{len(jobs)} on the GPU", flush=True)


# ---- the comparison ------------------------------------------------------------------------------

def random_mixtures(task, args):
    """(R, K), all mixtures as likely."""
    n = args.random // 2 if has_bpe(task) else args.random
    return np.random.default_rng(0).dirichlet(np.ones(len(sources_of(task))), n)


def sparse_mixtures(task, args):
    """(R, K) near the edges of the simplex, where good ones often are."""
    n = args.random // 2 if has_bpe(task) else args.random
    return np.random.default_rng(2).dirichlet(np.full(len(sources_of(task)), 0.4), n)


def named_mixtures(task, args):
    """{name: mixture} of those that have a row of their own and need no search."""
    sqrt = sqrt_mixture(data_of(args.work, task), sources_of(task))
    return {"uniform": "uniform", "proportional": "proportional", "sqrt": sqrt}


def fixed_mixtures(task, args):
    """{name: mixture} of those that no search is needed for."""
    fixed = named_mixtures(task, args)
    if few_runs(task):
        return fixed
    names = sources_of(task)
    for name, mixture in zip(names, np.eye(len(names))):
        fixed[f"only {name}"] = mixture
    for i, mixture in enumerate(random_mixtures(task, args)):
        fixed[f"random {i}"] = mixture
    return fixed


def compare(runner, args):
    """Step by step over all tasks, so that the pool is never short of jobs."""
    for task in args.tasks:
        add_searches(runner, args, task)
    runner.run()
    for task in args.tasks:
        add_found(runner, args, task)
        if not few_runs(task):
            add_regmix(runner, args, task)
    runner.run()
    for task in args.tasks:
        if not few_runs(task):
            add_best(runner, args, task)
    runner.run()


def add_searches(runner, args, task):
    """The searches, and fixed mixtures: most of these on the first seed only."""
    everywhere = named_mixtures(task, args)
    runner.add(task, "search ngram", args.seeds[0])
    for seed in seeds_of(args, task):
        for search in args.searches:
            runner.add(task, f"search {search}", seed, flags=SEARCHES[search])
        for what, mixture in fixed_mixtures(task, args).items():
            if seed == args.seeds[0] or what in everywhere:
                runner.add(task, what, seed, mixture)


def add_found(runner, args, task):
    """The mixtures that the searches found, on the seed of each search; the n-grams' on all."""
    by_ngrams = runner.get(task, "search ngram", args.seeds[0]).found["mixture"]
    for seed in seeds_of(args, task):
        runner.add(task, "ngram", seed, by_ngrams)
    for what in ROWS:
        search, _, taken = what.partition(": ")
        if search not in args.searches:
            continue
        for seed in seeds_of(args, task):
            found = runner.get(task, f"search {search}", seed).found
            runner.add(task, what, seed, found[taken])


def add_regmix(runner, args, task):
    mixtures = []
    losses = []
    for i in range(len(random_mixtures(task, args))):
        run = runner.get(task, f"random {i}", args.seeds[0])
        mixtures.append(run.mixture)
        losses.append(run.test_loss)
    for n in REGMIX:
        if n <= len(losses):
            best = regmix(np.array(mixtures[:n]), np.array(losses[:n]))
            for seed in seeds_of(args, task):
                runner.add(task, f"RegMix {n}", seed, best)


def add_best(runner, args, task):
    """The best mixtures of the first seed, on all seeds: best_fixed() chooses among them."""
    first = args.seeds[0]
    fixed = []
    for key, run in runner.results.items():
        here = key == runner.key(task, key.what, first)
        if here and run.mixture is not None and not key.what.startswith("best, from"):
            fixed.append((run.test_loss, key.what, run))
    fixed.sort(key=lambda entry: entry[0])
    for _, what, run in fixed[: args.best]:
        if ":" in what:  # "search: mixture taken" is another mixture on each seed
            what = f"best, from {what}"
            if runner.get(task, what, first) is None:
                runner.store(runner.key(task, what, first), run)
        for seed in seeds_of(args, task):
            runner.add(task, what, seed, run.mixture)


def surface(runner, args):
    """
    Fixed mixtures for the response surface and for the best one known: on all seeds, or in tasks
    with few runs each on one, in turn.
    """
    for task in args.tasks:
        seeds = seeds_of(args, task)
        if few_runs(task):
            for i, mixture in enumerate(tried_mixtures(task)):
                runner.add(task, f"design {i}", seeds[i % len(seeds)], mixture)
            continue
        mixtures = fixed_mixtures(task, args)
        for i, mixture in enumerate(sparse_mixtures(task, args)):
            mixtures[f"sparse {i}"] = mixture
        for seed in seeds:
            for what, mixture in mixtures.items():
                runner.add(task, what, seed, mixture)
    runner.run()


# ---- the other questions -------------------------------------------------------------------------

def transfer(runner, args):
    """
    What was found by the small and short search, and by one there, with a larger model trained
    twice as long.
    """
    runs = []  # (task, seed, where)
    for task in args.tasks:
        if few_runs(task):
            continue
        where = {"steps": 2 * steps_of(args, task), "size": LARGER[size_of(task)]}
        for seed in args.seeds[:2]:
            runs.append((task, seed, where))
    for task, seed, where in runs:
        found = runner.get(task, "search FastMix", seed).found["last"]
        runner.add(task, "search FastMix", seed, **where)
        runner.add(task, "uniform", seed, "uniform", **where)
        runner.add(task, "proportional", seed, "proportional", **where)
        runner.add(task, "FastMix: last", seed, found, **where)
        best = best_fixed(runner.results, task, args)
        runner.add(task, "best fixed", seed, best.mixture, **where)
        on_bytes = runner.get(BYTES.get(task), "search FastMix", seed, size="base")
        if on_bytes is not None:
            found = on_bytes.found["last"]
            runner.add(task, "found on bytes", seed, found, **where)
    runner.run()
    for task, seed, where in runs:
        found = runner.get(task, "search FastMix", seed, **where).found["last"]
        runner.add(task, "searched there", seed, found, **where)
    runner.run()


def sensitivity(runner, args):
    """Searches with one setting changed."""
    for task in args.tasks:
        for setting in SETTINGS:
            for seed in TUNING_SEEDS:
                runner.add(task, named(setting), seed, flags=setting)
    runner.run()


def repetition(runner, args):
    """
    The scarce task, trained four times as long as it is searched: what a search finds without and
    with that run's repetition (--train_tokens) and caps (--max_epochs, which has no default).
    """
    steps = 4 * steps_of(args, "scarce")
    tokens = steps * DEFAULTS["batch_size"] * DEFAULTS["block_size"]
    scarce = len(read(data_of(args.work, "scarce"), "prose_2", "train"))
    searches = {name: f"search for {steps} steps, {name}" for name in REPETITION}
    for seed in REPETITION_SEEDS:
        for name, flags in REPETITION.items():
            if name == "cap of 4 epochs":
                # --max_epochs 4 needs --train_tokens, which would repeat the text as well
                flags = {"bounds": f"prose_2=:{min(1.0, 4 * scarce / tokens):g}"}
            elif name != "neither":
                flags = {"train_tokens": tokens, **flags}
            runner.add("scarce", searches[name], seed, flags=flags)
    runner.run()
    for seed in REPETITION_SEEDS:
        runner.add("scarce", "uniform", seed, "uniform", steps=steps)
        for name in REPETITION:
            found = runner.get("scarce", searches[name], seed).found["last"]
            runner.add("scarce", name, seed, found, steps=steps)
    runner.run()


# ---- the command line ----------------------------------------------------------------------------

STAGES = {"compare": compare, "surface": surface, "transfer": transfer, "sensitivity": sensitivity,
          "repetition": repetition}


def parse_args():
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    add = p.add_argument
    add("--work", default="out-bench", type=Path, help="data, results and figures")
    add("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    add("--gpt2_ranks", type=Path, help="gpt2's vocabulary, a .tiktoken file: bpe and bpe_half "
        "take its first 4,096 ranks, and are left out without it")
    add("--stages", nargs="+", choices=STAGES, default=["compare", "surface"])
    add("--searches", nargs="+", choices=SEARCHES, default=list(SEARCHES))
    add("--seeds", nargs="+", type=int, default=[11, 12, 13, 14, 15],
        help="the first is for random mixtures and the choice of those that run on all; the "
        "others measure")
    add("--steps", type=int, help="of a run, in place of the task's own")
    add("--random", type=int, default=64, help="runs at random mixtures, for RegMix")
    add("--best", type=int, default=5, help="best mixtures of the first seed to run on all seeds")
    add("--jobs", type=int, default=os.cpu_count())
    add("--quick", action="store_true")
    add("--table", action="store_true", help="run nothing")
    add("--results", type=Path, help="lines to make the table and the figure from (default: "
        "those of --work)")
    args = p.parse_args()
    if args.quick:
        args.tasks = ["numpy"]
        args.seeds = [11]
        args.steps = 250
        args.random = 16
        args.best = 2
        args.searches = ["FastMix", "DoGE"]
        args.stages = ["compare"]
    if args.results is None:
        args.results = args.work / "results.jsonl"
    return args


def prepare_all(args):
    """The data of the tasks. Those with a BPE vocabulary go from args.tasks where there is none."""
    prepare(args.work / "data", "bytes")
    folder = args.work / "data-bpe"
    if args.gpt2_ranks:
        vocabulary = args.work / "gpt2-4096.tiktoken"
        ranks = args.gpt2_ranks.read_bytes().splitlines(keepends=True)
        vocabulary.write_bytes(b"".join(ranks[:4096]))
        prepare(folder, vocabulary)
    elif not folder.exists():
        print("tasks with a BPE vocabulary are left out: they need gpt2's, --gpt2_ranks FILE")
        args.tasks = [task for task in args.tasks if not has_bpe(task)]
    if "masked" in args.tasks:
        pretrain(args.work)


def pretrain(work):
    """The checkpoint that the masked task's runs start from, if it is not there: of the sample."""
    final = Path(work, TASKS["masked"].flags["init_from"]).parent
    if final.exists():
        return
    print("training the checkpoint that the masked task starts from")
    key = Key("sample", "proportional", 0, TASKS["sample"].steps, size_of("sample"))
    with tempfile.TemporaryDirectory(dir=work) as folder:
        out = Path(folder, "out")
        train(work, key, out, {"mixture": "proportional"}, {})
        out.rename(final)


def main():
    args = parse_args()
    if not args.table:
        args.work.mkdir(parents=True, exist_ok=True)
        prepare_all(args)
        runner = Runner(args)
        for stage in args.stages:
            STAGES[stage](runner, args)
        runner.save()
    show(load(args.results), args)


if __name__ == "__main__":
    main()

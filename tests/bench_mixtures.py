"""
Does the search find the best mixture, and at what price? FastMix against fixed mixtures, a RegMix-style search and the
update rules of DoGE and DoReMi, by the target's test loss of models trained from scratch for the same number of steps.

    python tests/bench_mixtures.py --quick                     one task, short runs: 5 minutes on 2 cores
    python tests/bench_mixtures.py                             four tasks, hours on 2 cores; stop and go on as you like
    python tests/bench_mixtures.py --gpt2_ranks FILE.tiktoken  a fifth task, with a BPE vocabulary
    python tests/bench_mixtures.py --stages transfer stretch sensitivity               the other questions
    python tests/bench_mixtures.py --stages repetition --seeds 12 13 14 --far 3        caps and repetition, an hour
    python tests/bench_mixtures.py --table --results tests/bench_mixtures.jsonl        from stored results, no run

Every run is fastmix.py itself, in one thread, --jobs at a time, and one line in WORK/results.jsonl; a line that is
there is never run again. Seeds are paired: a seed fixes initialisation and batches of every method's run.
"""
import argparse
import contextlib
import io
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from unittest import mock

os.environ["OMP_NUM_THREADS"] = "1"  # runs side by side, and figures that do not depend on the number of cores

import numpy as np  # noqa: E402
import torch  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import fastmix  # noqa: E402
from prepare_data import save_atomically  # noqa: E402

TASKS = {  # name: (title, sources, target)
    "numpy": ("toward numpy", "python,cpp,prose,math,legal,noise", "numpy"),
    "own": ("own val splits", "python,cpp,prose,math,legal", "python,cpp,prose,math,legal"),
    "scarce": ("scarce target", "python,cpp,math,legal,prose_2", "prose_2"),  # prose with 2% of its train split
    # three of seven are near-duplicates, or words of the first four without their order, or no text at all
    "honest": ("half of no use", "python,cpp,prose,legal,python_b,noise_4,bytes", "math"),
    "bpe": ("BPE vocabulary", "python,cpp,prose,math,legal,noise", "numpy"),
    # of the earlier stored results: the words of `noise` are the target's too
    "noisy": ("half of no use", "python,cpp,prose,python_b,noise,bytes", "math"),
}
SEARCHES = {"FastMix": {}, "no sqrt v": {}, "no running mean": {}, "eps 0": {"uniform_share": 0},
            "eps 1": {"uniform_share": 1}, "every 20": {"outer_every": 20}, "DoGE": {},
            "DoReMi": {"learning_rate_mixture": 0.1}}  # {name: flags}
ROWS = {  # of the table, and so what is run: {"search: mixture taken from it": title}
    "uniform": "uniform", "proportional": "proportional to tokens", "best single source": "best single source",
    "FastMix: last_half_average": "**FastMix, average of the last half**", "FastMix: last": "FastMix, last mixture",
    "FastMix: run_average": "FastMix, average of the run", "FastMix: trajectory": "**FastMix, replayed trajectory**",
    "no sqrt v: last_half_average": "without √v", "no running mean: last_half_average": "without the running mean",
    # of the earlier stored results
    "all: last_half_average": "`--alignment all`, average of the last half",
    "all: trajectory": "`--alignment all`, replayed trajectory",
    "all every 4: last_half_average": "`--alignment all`, every 4, average of the last half",
    "all every 4: trajectory": "`--alignment all`, every 4, replayed trajectory",
    "eps 0: last_half_average": "`--uniform_share 0`", "eps 1: last_half_average": "`--uniform_share 1`",
    "every 20: last_half_average": "`--outer_every 20`",
    "Adam: last_half_average": "Adam on z, average of the last half",  # earlier
    "Adam: trajectory": "Adam on z, replayed trajectory",  # earlier
    "DoGE: run_average": "DoGE's rule", "DoReMi: run_average": "DoReMi's rule",  # summed up as both papers do
}
REGMIX = (8, 16, 32, 64)  # runs of the RegMix-style search
ROWS |= {f"RegMix {n}": f"RegMix-style, {n} runs" for n in REGMIX}
# a search of the earlier stored results, in runs of the proxy; 1.234 where it is not named
EARLIER_COSTS = {"all": 1.833, "all every 4": 1.208, "every 20": 1.012, "DoReMi": 2.333}
SIZES = {"base": (2, 2, 64), "large": (4, 4, 128), "bpe": (2, 4, 128)}  # layers, heads, channels
STRETCH = 4
SENSITIVITY = {"learning_rate_mixture": (0.005, 0.01, 0.02, 0.05, 0.2, 1.0), "outer_every": (1, 4, 20, 100),
               "target_batch_size": (1, 2, 8, 32), "seed": ()}  # of the seeds, the runs that are there anyway
KEY = ("task", "what", "seed", "steps", "size")  # what a result is known by
with mock.patch.object(sys, "argv", ["fastmix.py"]):
    DEFAULTS = vars(fastmix.parse_args({}))


def sources_of(task):
    return TASKS[task][1].split(",")


def size_of(task):
    return "bpe" if task == "bpe" else "base"


# ---------------------------------------------------------------------------------------------------------------------
# data

def derive(data, name, source, splits):
    """A set like another one but for some splits' tokens, {split: ids}."""
    shutil.rmtree(data / name, ignore_errors=True)
    shutil.copytree(data / source, data / name)
    meta = json.loads((data / name / "meta.json").read_text())
    for split, ids in splits.items():
        ids.astype(meta["dtype"]).tofile(data / name / f"{split}.bin")
        meta["splits"][split] |= {"tokens": len(ids), "sha256": f"{name} of {meta['splits'][split]['sha256']}"}
    (data / name / "meta.json").write_text(json.dumps(meta | {"name": name}))


def read(data, name, split):
    return np.fromfile(data / name / f"{split}.bin", dtype=np.uint16)


def shuffled_words(texts, rng):
    """The words of several sets' byte tokens, at most 500,000 bytes of each, in random order: letters, no text."""
    texts = [np.where(ids < 256, ids, ord(" ")).astype(np.uint8)[:500_000].tobytes() for ids in texts]
    words = [word for text in texts for word in text.split()]
    rng.shuffle(words)
    return np.frombuffer(b" ".join(words), dtype=np.uint8)


def prepare(work, gpt2_ranks):
    """The sample, the sets made from it and, given gpt2's vocabulary, the sample in its first 4,096 tokens."""
    data, splits, rng = work / "data", ("train", "val", "test"), np.random.default_rng(0)
    command = [sys.executable, ROOT / "prepare_data.py", "--data_dir"]
    if not (data / "noise_4" / "meta.json").exists():
        subprocess.run([*command, data], check=True)
        prose, python = read(data, "prose", "train"), read(data, "python", "train")
        derive(data, "prose_2", "prose", {"train": prose[: len(prose) // 50]})
        derive(data, "python_b", "python", {"train": python[len(python) // 4:]})  # three quarters of python again
        derive(data, "bytes", "noise", {s: rng.integers(0, 256, len(read(data, "noise", s))) for s in splits})
        texts = {s: [read(data, name, s) for name in ("python", "cpp", "prose", "legal")] for s in splits}
        derive(data, "noise_4", "noise", {s: shuffled_words(texts[s], rng) for s in splits})
    if gpt2_ranks and not (work / "data-bpe" / "numpy" / "meta.json").exists():
        vocabulary = work / "gpt2-4096.tiktoken"
        vocabulary.write_bytes(b"".join(gpt2_ranks.read_bytes().splitlines(keepends=True)[:4096]))
        subprocess.run([*command, work / "data-bpe", "--tokenizer", vocabulary], check=True)


# ---------------------------------------------------------------------------------------------------------------------
# other methods' update rules, and this one's without a part, in fastmix.py's own loop: {name there: what replaces it}

NO_SQRT_V = {"in_adamw_units": lambda G, head, optimizer: G}
NO_RUNNING_MEAN = {"DECAY": 0.0}


def doge():
    """
    DoGE (Fan et al., arXiv 2310.15393): alpha_k in proportion to alpha_k exp(step A_k), A_k the alignment of the
    source's gradient with the target's. Its step is in units of 1 / (running mean of max |A|): it has no natural one.
    """
    largest = []

    def mixture_step(z, A, present, rate):
        A = torch.where(present, A, 0.0)
        largest.append(A.abs().max().item())
        z += rate * A / np.mean(largest[-100:])

    return {"mixture_step": mixture_step, **NO_SQRT_V, **NO_RUNNING_MEAN}


def doremi(reference):
    """
    DoReMi (Xie et al., arXiv 2305.10429): exponentiated gradient on each source's excess loss over a reference model's,
    clipped at 0 a token. It knows no target. The excess travels where the loop carries the parts of the alignment.
    """
    ckpt = torch.load(reference, weights_only=True)
    net = fastmix.GPT(fastmix.GPTConfig(**ckpt["config"]))
    net.load_state_dict(ckpt["model"])
    original = fastmix.batch_loss

    def batch_loss(model, head, x, y, r, n_tokens, G, ends):
        loss, token_loss, _ = original(model, head, x, y, r, n_tokens)
        with torch.no_grad():
            known = fastmix.fused_cross_entropy(net(x).flatten(0, 1), net.lm_head.weight, y.flatten())[1].view_as(y)
            excess = r[:, None] * (token_loss - known).clamp(min=0) / n_tokens  # (B, T), weighted as gradients are
        return loss, token_loss, torch.stack([part.sum() for part in excess.flatten().tensor_split(ends[:-1])])

    def mixture_step(z, A, present, rate):
        z += rate * torch.where(present, A, 0.0)

    return {"batch_loss": batch_loss, "mixture_step": mixture_step}


# ---------------------------------------------------------------------------------------------------------------------
# runs

def train(work, job, out, flags, patches={}):
    """One run of fastmix.py in this process. Returns its mixture.json and the rows of its log."""
    _, sources, target = TASKS[job["task"]]
    n_layer, n_head, n_embd = SIZES[job["size"]]
    flags = {"sources": sources, "target": target, "out_dir": out, "seed": job["seed"], "max_steps": job["steps"],
             "data_dir": Path(work, "data-bpe" if job["task"] == "bpe" else "data"), "device": "cpu",
             "n_layer": n_layer, "n_head": n_head, "n_embd": n_embd, "eval_tokens": 1024,
             "log_every": max(1, job["steps"] // 40), "learning_rate": 2e-3,  # half the default: seeds differ by less
             **flags}
    argv = ["fastmix.py", *(str(x) for flag, value in flags.items() for x in (f"--{flag}", value))]
    with (mock.patch.multiple(fastmix, TEST_TOKENS=2**17 // len(target.split(",")), **patches),
          mock.patch.object(sys, "argv", argv), contextlib.redirect_stdout(io.StringIO())):
        fastmix.main()
    return json.loads((out / "mixture.json").read_text()), [json.loads(row) for row in open(out / "log.jsonl")]


def one_run(work, job):
    """A job, as Bench.add() makes it -> its line of the results. Runs in a process of the pool."""
    torch.set_num_threads(1)
    names, mixture, flags = sources_of(job["task"]), job["mixture"], job["flags"]
    with tempfile.TemporaryDirectory(dir=work) as folder:
        log, reference = Path(folder, "log.jsonl"), Path(folder, "reference")
        replayed = mixture is not None and isinstance(mixture[0], list)  # rows of a step and its weights
        if replayed:
            log.write_text("".join(json.dumps({"step": s, "alpha": dict(zip(names, a))}) + "\n" for s, a in mixture))
            mixture = log
        elif mixture is not None and not isinstance(mixture, str):
            mixture = ",".join(f"{n}={w:.6f}" for n, w in zip(names, mixture))
        if job["what"] == "search DoReMi":
            train(work, job, reference, {"mixture": "uniform"})
            patches = doremi(reference / "ckpt.pt")
        else:
            patches = {"search DoGE": doge(), "search no sqrt v": NO_SQRT_V,
                       "search no running mean": NO_RUNNING_MEAN}.get(job["what"], {})
        found, rows = train(work, job, Path(folder, "out"), flags if mixture is None else {"mixture": mixture}, patches)
    result = {k: job[k] for k in KEY}
    result |= {"test_loss": round(found["test_loss"], 5), "seconds": found["seconds"]}
    if found["searched"]:
        result["mixtures"] = {n: [round(w, 5) for w in m.values()] for n, m in found["mixtures"].items()}
        result["trajectory"] = [[r["step"], [round(w, 4) for w in r["alpha"].values()]] for r in rows]
    elif not replayed:
        result["mixture"] = [round(w, 5) for w in found["mixture"].values()]
    return result


class Bench:
    """Jobs and results; both are known by (task, what, seed, steps, size)."""

    def __init__(self, args):
        self.args, self.work = args, Path(args.work)
        self.path = self.work / "results.jsonl"
        self.results = load(self.path)
        if self.results:  # without the line that a kill cut short
            lines = "".join(json.dumps(r) + "\n" for r in self.results.values())
            save_atomically(self.path, lambda f: f.write(lines.encode()))
        self.jobs = {}

    def key(self, task, what, seed, steps=None, size=None):
        return task, what, seed, steps or self.args.steps, size or size_of(task)

    def get(self, *key, **where):
        return self.results.get(self.key(*key, **where))

    def add(self, task, what, seed, mixture=None, flags={}, **where):
        """Asks for a run at a mixture: K weights, a trajectory or a name; with none it is a search."""
        key = self.key(task, what, seed, **where)
        if key not in self.results:
            self.jobs[key] = dict(zip(KEY, key), mixture=mixture, flags=flags)

    def store(self, result):
        with open(self.path, "a") as f:
            f.write(json.dumps(result) + "\n")
        self.results[key_of(result)] = result

    def run(self):
        """Runs what was asked for, each result written as it comes."""
        if self.jobs:
            context = multiprocessing.get_context("fork")  # torch is imported once
            with ProcessPoolExecutor(self.args.jobs, mp_context=context) as pool:
                pending = {pool.submit(one_run, str(self.work), job): job for job in self.jobs.values()}
                for n, future in enumerate(as_completed(pending), 1):
                    try:
                        result = future.result()
                    except BaseException:
                        pool.shutdown(cancel_futures=True)
                        print("failed:", pending[future], file=sys.stderr)
                        raise
                    self.store(result)
                    print(f"{n}/{len(pending)} {result['task']:7s} {result['what']:32s} seed {result['seed']} "
                          f"{result['size']} {result['steps']}: {result['test_loss']:.4f}  ({result['seconds']:.0f} s)",
                          flush=True)
        self.jobs = {}


def key_of(result):
    return tuple(result[k] for k in KEY)


def load(path):
    lines = Path(path).read_text().splitlines(keepends=True) if Path(path).exists() else []
    results = [json.loads(line) for line in lines if line.endswith("\n")]  # the last may be cut short
    return {key_of(r): r for r in results}


# ---------------------------------------------------------------------------------------------------------------------
# the comparison

def random_mixtures(K, n):
    return np.random.default_rng(0).dirichlet(np.ones(K), n)


def features(m):
    """(R, K) -> (R, 1 + K (K + 3) / 2): 1, m_i and m_i m_j."""
    pairs = [m[:, i] * m[:, j] for i in range(m.shape[1]) for j in range(i, m.shape[1])]
    return np.column_stack([np.ones(len(m)), m, *pairs])


def regmix(mixtures, losses):
    """
    RegMix (Liu et al., arXiv 2407.01492) with ridge regression on quadratic features in place of trees, the penalty
    chosen by leave-one-out error: the average of the 100 best predicted among 100,000 random mixtures. mixtures (R, K),
    losses (R,) -> (K,).
    """
    X, y = features(mixtures)[:, 1:], losses - losses.mean()
    mean = X.mean(0)
    X = X - mean
    best = None
    for penalty in 10.0 ** np.arange(-6, 2):
        solve = np.linalg.solve(X.T @ X + penalty * np.eye(X.shape[1]), X.T)  # y -> coefficients
        hat = X @ solve
        error = (((y - hat @ y) / (1 - np.diag(hat) - 1 / len(y))) ** 2).mean()
        if best is None or error < best[0]:
            best = error, solve @ y
    candidates = np.random.default_rng(1).dirichlet(np.ones(mixtures.shape[1]), 100_000)
    predicted = (features(candidates)[:, 1:] - mean) @ best[1]
    return candidates[np.argsort(predicted)[:100]].mean(0)


def compare(bench, args):
    """Stage by stage over all tasks, so that the pool is never short of jobs."""
    first = args.seeds[0]
    for task in args.tasks:
        names = sources_of(task)
        for seed in args.seeds:
            for what in args.searches:
                bench.add(task, f"search {what}", seed, flags=SEARCHES[what])
            for m in ("uniform", "proportional"):
                bench.add(task, m, seed, m)
        for name, m in zip(names, np.eye(len(names))):
            bench.add(task, f"only {name}", first, m)
        for i, m in enumerate(random_mixtures(len(names), args.random)):
            bench.add(task, f"random {i}", first, m)
    bench.run()
    for task in args.tasks:
        for what in ROWS:
            method, _, taken = what.partition(": ")
            for seed in args.seeds if method in args.searches else ():
                found = bench.get(task, f"search {method}", seed)
                bench.add(task, what, seed, found["trajectory"] if taken == "trajectory" else found["mixtures"][taken])
        done = [bench.get(task, f"random {i}", first) for i in range(args.random)]
        for n in REGMIX:
            if n <= args.random:
                best = regmix(np.array([r["mixture"] for r in done[:n]]), np.array([r["test_loss"] for r in done[:n]]))
                for seed in args.seeds:
                    bench.add(task, f"RegMix {n}", seed, best)
    bench.run()
    # the best fixed mixtures ever run, on all seeds: best_fixed() chooses among them
    for task in args.tasks:
        fixed = [r for key, r in bench.results.items() if key == bench.key(task, r["what"], first) and "mixture" in r
                 and not r["what"].startswith("best, from")]  # copies, made below when this ran before
        for r in sorted(fixed, key=lambda r: r["test_loss"])[: args.best]:
            what = f"best, from {r['what']}" if ":" in r["what"] else r["what"]  # "method: summary" differs by seed
            if not bench.get(task, what, first):
                bench.store({**r, "what": what})
            for seed in args.seeds:
                bench.add(task, what, seed, r["mixture"])
    bench.run()


def best_fixed(results, task, args, measured_on=None):
    """
    The best fixed mixture known, as (what, mixture), by its mean over all seeds but the one that it is to be measured
    on: there the best of many would owe a part of its lead to chance.
    """
    by_what = {}
    for r in results.values():
        if (r["task"], r["steps"], r["size"]) == (task, args.steps, size_of(task)) and "mixture" in r:
            by_what.setdefault(r["what"], {})[r["seed"]] = r
    whole = {what: runs for what, runs in by_what.items() if set(args.seeds) <= runs.keys()
             and len({tuple(r["mixture"]) for r in runs.values()}) == 1}  # one mixture on all seeds
    seeds = [s for s in args.seeds if s != measured_on] or args.seeds
    best = min(whole, key=lambda what: np.mean([whole[what][s]["test_loss"] for s in seeds]))
    return best, whole[best][args.seeds[0]]["mixture"]


# ---------------------------------------------------------------------------------------------------------------------
# the other questions

def use_elsewhere(bench, args, **where):
    """What was found by the small and short search, and by a search there, at another size or length of training."""
    runs = [(task, seed) for task in args.tasks for seed in args.seeds[: args.far]]
    for task, seed in runs:
        found = bench.get(task, "search FastMix", seed)
        for what, mixture in (("uniform", "uniform"), ("proportional", "proportional"),
                              ("FastMix: last_half_average", found["mixtures"]["last_half_average"]),
                              ("FastMix: trajectory", found["trajectory"]),
                              ("best fixed", best_fixed(bench.results, task, args)[1]), ("search FastMix", None)):
            bench.add(task, what, seed, mixture, **where)
    bench.run()
    for task, seed in runs:
        found = bench.get(task, "search FastMix", seed, **where)
        bench.add(task, "searched there", seed, found["mixtures"]["last_half_average"], **where)
    bench.run()


def search_with(flag, value):
    """The name of a search with one setting changed; at the default it is the search that is there anyway."""
    return "FastMix" if value == DEFAULTS[flag] else f"{flag} {value}"


def sensitivity(bench, args):
    settings = [(search_with(flag, value), {flag: value}, seed) for flag, values in SENSITIVITY.items()
                for value in values for seed in args.seeds[: args.far]]
    for what, flags, seed in settings:
        bench.add("numpy", f"search {what}", seed, flags=flags)
    bench.run()
    for what, _, seed in settings:
        found = bench.get("numpy", f"search {what}", seed)["mixtures"]["last_half_average"]
        bench.add("numpy", f"{what}: last_half_average", seed, found)
    bench.run()


def repetition(bench, args):
    """
    The scarce task, trained STRETCH times as long as it is searched: what a search finds without and with the caps of
    that run (--max_epochs) and its repetition, in % of uniform's loss there.
    """
    steps, seeds = STRETCH * args.steps, args.seeds[: args.far]
    tokens = steps * DEFAULTS["batch_size"] * DEFAULTS["block_size"]
    scarce = len(read(args.work / "data", "prose_2", "train"))
    kinds = {"neither": {}, "repetition": {"train_tokens": tokens, "max_epochs": 1e9},
             "cap of 4 epochs": {"bounds": f"prose_2=:{min(1.0, 4 * scarce / tokens):g}"}, "both": {"train_tokens": tokens},
             **{f"both, {n} epochs": {"train_tokens": tokens, "max_epochs": n} for n in (8, 16)}}
    for seed in seeds:
        for name, flags in kinds.items():
            bench.add("scarce", f"search for {steps} steps, {name}", seed, flags=flags)
    bench.run()
    for seed in seeds:
        bench.add("scarce", "uniform", seed, "uniform", steps=steps)
        for name in kinds:
            found = bench.get("scarce", f"search for {steps} steps, {name}", seed)["mixtures"]["last_half_average"]
            bench.add("scarce", name, seed, found, steps=steps)
    bench.run()
    uniform = losses(bench.results, "scarce", "uniform", seeds, steps)
    for name in kinds:
        gain = 100 * (losses(bench.results, "scarce", name, seeds, steps) / uniform - 1)
        share = [bench.get("scarce", name, s, steps=steps)["mixture"][-1] for s in seeds]
        print(f"| {name} | " + " | ".join(f"{g:+.2f}" for g in gain) + f" | {gain.mean():+.2f} | {np.mean(share):.3f} |")


# ---------------------------------------------------------------------------------------------------------------------
# tables and figures

def flops(size, steps, search=None):
    """
    Of one run: 2 a weight and token forward and 4 backward (Kaplan et al., arXiv 2001.08361), attention 2 T C a token,
    layer and pass. A search (a key of SEARCHES) adds the target's forward pass and its head gradient an outer step.
    """
    (L, _, C), V, T = SIZES[size], 4097 if size == "bpe" else 257, DEFAULTS["block_size"]
    forward = 2 * (12 * L * C**2 + V * C) + 2 * L * T * C  # of a token
    tokens, extra = DEFAULTS["batch_size"] * T, 0.0
    if search == "DoReMi":
        extra = tokens * forward  # the reference model reads along
    elif search:
        every = SEARCHES[search].get("outer_every", DEFAULTS["outer_every"])
        extra = DEFAULTS["target_batch_size"] * T * (forward + 2 * V * C) / every
    return steps * (3 * tokens * forward + extra)


def cost_of(what, task, args):
    """In runs of the proxy at a fixed mixture; the run at the mixture that comes out is everybody's and not counted."""
    method, _, taken = what.partition(": ")
    if what.startswith("RegMix"):
        return int(what.split()[1])
    if not taken:
        return 0.0
    if args.earlier:
        return EARLIER_COSTS.get(method, 1.234)
    return flops(size_of(task), 1, method) / flops(size_of(task), 1) + (method == "DoReMi")


def losses(results, task, what, seeds, steps, size=None):
    """(S,) test losses, or None where one is missing."""
    rows = [results.get((task, what, seed, steps, size or size_of(task))) for seed in seeds]
    return np.array([r["test_loss"] for r in rows]) if all(rows) else None


def measured_seeds(args):
    """The first seed chose which mixtures run on all seeds, so the others measure; with one seed, it does both."""
    return args.seeds[1:] or args.seeds


def regret(results, task, what, args):
    """
    (S,) loss above the best fixed mixture known, in % of it, on each seed that ran; None if none did. On each seed it
    is the mixture that is best on the other seeds.
    """
    seeds = measured_seeds(args)
    if what == "best single source":  # on the first seed only
        seeds, rest = args.seeds[:1], (args.seeds[0], args.steps, size_of(task))
        single = {f"only {n}": results.get((task, f"only {n}", *rest)) for n in sources_of(task)}
        what = min((w for w, r in single.items() if r), key=lambda w: single[w]["test_loss"], default=what)
    seeds = [s for s in seeds if losses(results, task, what, [s], args.steps) is not None]
    best = [losses(results, task, best_fixed(results, task, args, s)[0], [s], args.steps)[0] for s in seeds]
    return 100 * (losses(results, task, what, seeds, args.steps) / best - 1) if seeds else None


def cell(values, n_seeds):
    """Mean (lowest to highest), and how many seeds where not all ran."""
    if values is None:
        return ""
    spread = [f"{values.min():+.2f} to {values.max():+.2f}"] if len(values) > 1 else []
    seeds = [f"{len(values)} seed{'s' * (len(values) > 1)}"] if len(values) < n_seeds else []
    return f"{values.mean():+.2f}" + (f" ({'; '.join(spread + seeds)})" if spread + seeds else "")


def show(args):
    results = load(args.results)
    args.earlier = any(r["what"].startswith("all: ") for r in results.values())  # of the earlier alignment
    tasks = [t for t in args.tasks if losses(results, t, "uniform", args.seeds, args.steps) is not None]
    if not tasks:
        return print(f"{args.results} has no runs of {args.steps} steps on all of these seeds and one of these tasks")
    titles = [TASKS[t][0] for t in tasks]
    chosen = " (chosen on the other seeds)" if len(args.seeds) > 1 else ""
    print(f"{args.steps} steps, seeds {', '.join(map(str, measured_seeds(args)))}; regret: % of the loss above the "
          f"best fixed mixture known{chosen}, mean over the seeds (lowest to highest)\n")
    print("| | cost | " + " | ".join(titles) + " |\n| --- | --- |" + " --- |" * len(tasks))
    for what, title in ROWS.items():
        cells = [cell(regret(results, t, what, args), len(measured_seeds(args))) for t in tasks]
        if any(cells):
            print(f"| {title} | {cost_of(what, tasks[0], args):.2f} | " + " | ".join(cells) + " |")
    for task in tasks:
        best, mixture = best_fixed(results, task, args)
        loss = losses(results, task, best, args.seeds, args.steps)
        uniform = losses(results, task, "uniform", args.seeds, args.steps)

        def listed(weights):
            return ", ".join(f"{n} {w:.2f}" for n, w in zip(sources_of(task), weights))
        print(f"\n{task}: best fixed mixture known {loss.mean():.4f} nats a token ({best}: {listed(mixture)}); "
              f"uniform {uniform.mean():.4f}, its seeds differ by {100 * np.ptp(uniform) / uniform.mean():.2f}%")
        for seed in args.seeds:
            found = results.get((task, "search FastMix", seed, args.steps, size_of(task)))
            if found:
                print(f"    seed {seed} found " + listed(found["mixtures"]["last_half_average"]))
    print()
    for what, cost in (("uniform", 1.0), ("search FastMix", cost_of("FastMix: last", tasks[0], args))):
        seconds = [r["seconds"] for r in results.values()
                   if r["what"] == what and r["steps"] == args.steps and r["size"] == size_of(tasks[0])]
        if seconds:
            print(f"{what}: {cost * flops(size_of(tasks[0]), args.steps):.3g} FLOPs, {np.median(seconds):.0f} s")
    show_elsewhere(results, tasks, args, f"{STRETCH} times as many steps", STRETCH * args.steps)
    show_elsewhere(results, tasks, args, "a larger model, 4 layers of 128 channels", args.steps, "large")
    folder = Path(args.results).parent
    figure(results, tasks, args, folder / "mixtures.png")
    if not args.earlier:  # its defaults were others
        figure_sensitivity(results, args, folder / "sensitivity.png")


def show_elsewhere(results, tasks, args, title, steps, size=None):
    seeds = [s for s in args.seeds
             if any((t, "FastMix: trajectory", s, steps, size or size_of(t)) in results for t in tasks)]
    if not seeds:
        return
    print(f"\n{title}: % of uniform's loss, seeds {', '.join(map(str, seeds))}\n")
    print("| | " + " | ".join(TASKS[t][0] for t in tasks) + " |\n| --- |" + " --- |" * len(tasks))
    titles = {"proportional": "proportional to tokens", "best fixed": "best fixed mixture of the small runs",
              "FastMix: last_half_average": "FastMix, found by the small search",
              "FastMix: trajectory": "FastMix, its trajectory replayed", "searched there": "FastMix, searched there"}
    for what, title in titles.items():
        cells = []
        for task in tasks:
            pairs = [[losses(results, task, w, [s], steps, size) for w in (what, "uniform")] for s in seeds]
            gains = [100 * (found / uniform - 1) for found, uniform in pairs
                     if found is not None and uniform is not None]
            cells.append(cell(np.array(gains) if gains else None, len(seeds)))
        if any(cells):
            print(f"| {title} | " + " | ".join(cells) + " |")


def draw(axes, path, ylabel):
    """Finishes a row of panels: one legend below all, and the file."""
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel(ylabel)
    fig = axes[0].figure
    fig.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    fig.savefig(path)
    print(f"\nwrote {path}")


def panels(n, **size):
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    return plt.subplots(1, n, dpi=110, squeeze=False, layout="constrained", **size)[1][0]


def figure(results, tasks, args, path):
    """Regret against the cost of the search, one panel a task."""
    lines = (([f"RegMix {n}" for n in REGMIX], "#009E73", "s", 0, "RegMix-style"),
             (["FastMix: last_half_average"], "#0072B2", "o", 0, "FastMix, last half"),
             (["FastMix: trajectory"], "#56B4E9", "D", 3, "FastMix, replayed"),
             (["all: last_half_average"], "#D55E00", "P", 0, "--alignment all, last half"),
             (["all every 4: last_half_average"], "#332288", "X", 1, "--alignment all, every 4, last half"),
             (["DoGE: run_average"], "#E69F00", "^", 2, "DoGE's rule"),
             (["DoReMi: run_average"], "#CC79A7", "v", 4, "DoReMi's rule"))
    axes = panels(len(tasks), figsize=(3.4 * len(tasks), 3.8))
    for ax, task in zip(axes, tasks):
        for what, style in (("uniform", "--"), ("proportional", ":")):
            r = regret(results, task, what, args)
            if r is not None:
                ax.axhline(r.mean(), color="#666666", linestyle=style, linewidth=1, label=what)
        ax.axhline(0, color="#222222", linewidth=1, label="best fixed mixture known")
        for whats, colour, marker, aside, label in lines:
            found = [(w, regret(results, task, w, args)) for w in whats]
            found = np.array([(cost_of(w, task, args), r.mean(), r.mean() - r.min(), r.max() - r.mean())
                              for w, r in found if r is not None])
            if len(found):
                found[:, 0] *= 1 + 0.08 * aside  # side by side where they cost the same
                ax.errorbar(found[:, 0], found[:, 1], yerr=found[:, 2:].T, color=colour, marker=marker, markersize=6,
                            linewidth=1, capsize=2, label=label)
        ax.set(title=TASKS[task][0], xlabel="cost of the search (proxy runs)", xscale="log", xlim=(0.8, 90))
        ax.set_xticks([1, 2, 4, 8, 16, 32, 64], ["1", "2", "4", "8", "16", "32", "64"], minor=False)
        ax.minorticks_off()
    draw(axes, path, "loss above the best fixed mixture, %")


def figure_sensitivity(results, args, path):
    """Toward numpy, in % of uniform's loss on the same seed: what is found with one setting changed, and the search."""
    seeds = [s for s in args.seeds if ("numpy", "outer_every 4: last_half_average", s, args.steps, "base") in results]
    if not seeds:
        return

    def gain(what, seeds):
        uniform, found = (losses(results, "numpy", w, seeds, args.steps) for w in ("uniform", what))
        return [] if found is None else 100 * (found / uniform - 1)

    axes = panels(len(SENSITIVITY), figsize=(14, 3.4), sharey=True)
    best = np.mean([gain(best_fixed(results, "numpy", args, s)[0], [s]) for s in args.seeds])
    for ax, (flag, values) in zip(axes, SENSITIVITY.items()):
        points = ([("FastMix", [s]) for s in args.seeds] if flag == "seed" else
                  [(search_with(flag, v), seeds) for v in values])
        for what, marker, colour, label in (("search {}", "x", "#D55E00", "the searching proxy itself"),
                                            ("{}: last_half_average", "o", "#0072B2", "trained at the mixture found")):
            found = [(i, y) for i, (name, at) in enumerate(points) for y in gain(what.format(name), at)]
            ax.plot(*zip(*found), marker, color=colour, markersize=6, label=label, linestyle="none")
        ax.axhline(0, color="#666666", linestyle="--", linewidth=1, label="uniform")
        ax.axhline(best, color="#222222", linewidth=1, label="best fixed mixture known")
        ax.set_xticks(range(len(points)), values or args.seeds, fontsize=8)
        ax.set_title(f"--{flag}", fontsize=9)
        ax.set_xlim(-0.6, len(points) - 0.4)
    draw(axes, path, "test loss, % of uniform's")


# ---------------------------------------------------------------------------------------------------------------------

STAGES = {"compare": compare,
          "stretch": lambda bench, args: use_elsewhere(bench, args, steps=STRETCH * args.steps),
          "transfer": lambda bench, args: use_elsewhere(bench, args, size="large"),
          "sensitivity": sensitivity, "repetition": repetition}


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--work", default="out-bench", type=Path, help="data, results and figures")
    p.add_argument("--tasks", nargs="+", choices=TASKS, default=[t for t in TASKS if t != "noisy"])
    p.add_argument("--gpt2_ranks", type=Path, help="gpt2's vocabulary, a .tiktoken file: task bpe takes its first "
                                                   "4,096 ranks, and is left out without it")
    p.add_argument("--stages", nargs="+", choices=STAGES, default=["compare"])
    p.add_argument("--searches", nargs="+", choices=SEARCHES, default=list(SEARCHES))
    p.add_argument("--seeds", nargs="+", type=int, default=[11, 12, 13, 14, 15],
                   help="the first is for random mixtures and the choice of those that run on all; the others measure")
    p.add_argument("--steps", type=int, default=600)
    p.add_argument("--random", type=int, default=32, help="runs at random mixtures, for the RegMix-style search")
    p.add_argument("--best", type=int, default=5, help="best mixtures of the first seed to be run on all seeds")
    p.add_argument("--far", type=int, default=1, help="seeds of the stages other than compare")
    p.add_argument("--jobs", type=int, default=os.cpu_count())
    p.add_argument("--quick", action="store_true")
    p.add_argument("--table", action="store_true", help="run nothing")
    p.add_argument("--results", help="lines to make the table and the figures from (default: those of --work)")
    args = p.parse_args()
    if args.quick:
        args.tasks, args.seeds, args.steps, args.random, args.best = ["numpy"], [11], 250, 16, 2
        args.searches = ["FastMix", "DoGE"]
    args.results = args.results or args.work / "results.jsonl"
    if not args.table:
        if "bpe" in args.tasks and not args.gpt2_ranks:
            print("task bpe is left out: it needs gpt2's vocabulary, --gpt2_ranks FILE")
            args.tasks.remove("bpe")
        args.work.mkdir(parents=True, exist_ok=True)
        prepare(args.work, args.gpt2_ranks if "bpe" in args.tasks else None)
        bench = Bench(args)
        for stage in args.stages:
            STAGES[stage](bench, args)
    show(args)


if __name__ == "__main__":
    main()

"""
Does the search find the best mixture, and at what price? FastMix against fixed mixtures, a RegMix-style search and the
update rules of DoGE and DoReMi, by the target's test loss of models trained from scratch for the same number of steps.

    python tests/bench_mixtures.py --quick                     one task, short runs: 3 minutes on 2 cores
    python tests/bench_mixtures.py                             four tasks, hours on 2 cores; stop and go on as you like
    python tests/bench_mixtures.py --gpt2_ranks FILE.tiktoken  two more tasks, with a BPE vocabulary
    python tests/bench_mixtures.py --stages transfer repetition sensitivity         the other questions
    python tests/bench_mixtures.py --table --results tests/bench_mixtures.jsonl     from stored results, no run

Every run is fastmix.py itself, in one thread, --jobs at a time, and one line in WORK/results.jsonl; a line that is
there is never run again. Seeds are paired: a seed fixes initialisation and batches of every method's run. With a GPU,
runs at fixed mixtures are trained there, hundreds at once (tests/ensemble.py), which takes minutes in place of hours.

A run's loss has a noise of half a percent. So the table has two figures for a mixture: how much it lost when it was
trained, and what a response surface, fitted to all fixed runs of the task, says that it loses.
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
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from unittest import mock

os.environ["OMP_NUM_THREADS"] = "1"  # runs side by side, and figures that do not depend on the number of cores

import numpy as np  # noqa: E402
import torch  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
import fastmix  # noqa: E402
from ensemble import train_many  # noqa: E402
from plot_mixture import read_mixture  # noqa: E402
from prepare_data import get_tokenizer, save_atomically  # noqa: E402

TASKS = {  # name: (title, sources, target)
    "numpy": ("toward numpy", "python,cpp,prose,math,legal,noise", "numpy"),
    "own": ("own val splits", "python,cpp,prose,math,legal", "python,cpp,prose,math,legal"),
    "scarce": ("scarce target", "python,cpp,math,legal,prose_2", "prose_2"),  # prose with 2% of its train split
    # three of seven are near-duplicates, or words of the first four without their order, or no text at all
    "half": ("half of no use", "python,cpp,prose,legal,python_b,noise_4,bytes", "math"),
    "bpe": ("toward numpy, BPE", "python,cpp,prose,math,legal,noise", "numpy"),
    "bpe_half": ("half of no use, BPE", "python,cpp,prose,legal,python_b,noise_4,bytes", "math"),
}
SEARCHES = {"FastMix": {}, "raw": {}, "adamw": {}, "no running mean": {},  # {name: flags}
            "authors": {"outer_every": 20, "uniform_share": 1, "target_batch_size": 8, "learning_rate_mixture": 0.01},
            "DoGE": {}, "DoReMi": {"learning_rate_mixture": 0.1}}
WITH_CURVATURE = ("FastMix", "no running mean")  # of them
ROWS = {  # of the table, and so what is run: {"search: mixture taken from it": title}
    "uniform": "uniform", "proportional": "proportional to tokens", "best single source": "best single source",
    "FastMix: last_half_average": "**FastMix, average of the last half**", "FastMix: last": "FastMix, last mixture",
    "FastMix: run_average": "FastMix, average of the run", "FastMix: trajectory": "**FastMix, replayed trajectory**",
    "raw: last_half_average": "raw gradients (P = 1)", "adamw: last_half_average": "AdamW's units (P = 1 / √v)",
    "no running mean: last_half_average": "without the running mean",
    "authors: last": "the authors' setting (head, every 20 steps, Adam on z), last",
    "DoGE: run_average": "DoGE's rule", "DoReMi: run_average": "DoReMi's rule",  # summed up as both papers do
}
REGMIX = (8, 16, 32, 64)  # runs of the RegMix-style search
ROWS |= {f"RegMix {n}": f"RegMix-style, {n} runs" for n in REGMIX}
SIZES = {"base": (2, 2, 64), "large": (4, 4, 128),  # layers, heads, channels: 0.13 and 0.9 million parameters
         "bpe": (2, 4, 128), "bpe_large": (6, 8, 256)}  # with 4,097 token ids 1.4 and 6.8 million
AT_ONCE = {"base": 320, "large": 64, "bpe": 48, "bpe_large": 12}  # runs on a GPU, by its memory
LARGER = {"base": "large", "bpe": "bpe_large"}
BYTES = {"bpe": "numpy", "bpe_half": "half"}  # the same task with a byte-level vocabulary
SETTINGS = [{}, *({"learning_rate_mixture": rate} for rate in (0.005, 0.01, 0.04, 0.1)),  # for the sensitivity stage
            {"outer_every": 2, "learning_rate_mixture": 0.035}, {"outer_every": 4, "learning_rate_mixture": 0.06},
            {"outer_every": 20, "learning_rate_mixture": 0.2}, {"target_batch_size": 1}, {"target_batch_size": 8},
            {"uniform_share": 0}, {"uniform_share": 1}]
TUNING_SEEDS = (1, 2)  # they choose settings, and measure nothing else
KEY = ("task", "what", "seed", "steps", "size")  # what a result is known by
with mock.patch.object(sys, "argv", ["fastmix.py"]):
    DEFAULTS = vars(fastmix.parse_args({}))


def sources_of(task):
    return TASKS[task][1].split(",")


def size_of(task):
    return "bpe" if task.startswith("bpe") else "base"


def seeds_of(args, task):
    """The tasks with a BPE vocabulary have three seeds."""
    return args.seeds[:3] if size_of(task) == "bpe" else args.seeds


def data_of(work, task):
    return Path(work, "data-bpe" if task.startswith("bpe") else "data")


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
    """The words of several texts, in bytes, at most 500,000 bytes of each, in random order: letters, no text."""
    words = [word for text in texts for word in text[:500_000].split()]
    rng.shuffle(words)
    return b" ".join(words)


def prepare(data, tokenizer):
    """The sample and the sets made from it."""
    if (data / "noise_4" / "meta.json").exists():  # the last to be made
        return
    subprocess.run([sys.executable, ROOT / "prepare_data.py", "--data_dir", data, "--tokenizer", tokenizer], check=True)
    splits, rng, encoding = ("train", "val", "test"), np.random.default_rng(0), get_tokenizer(str(tokenizer))
    prose, python = read(data, "prose", "train"), read(data, "python", "train")
    derive(data, "prose_2", "prose", {"train": prose[: len(prose) // 50]})
    derive(data, "python_b", "python", {"train": python[len(python) // 4:]})  # three quarters of python again
    derive(data, "bytes", "noise",
           {s: rng.integers(0, encoding.eot_token, len(read(data, "noise", s))) for s in splits})
    texts = {s: [encoding.decode_bytes(read(data, name, s)[:500_000].tolist()).replace(b"<|endoftext|>", b" ")
                 for name in ("python", "cpp", "prose", "legal")] for s in splits}
    derive(data, "noise_4", "noise", {s: np.array(encoding.encode_ordinary(shuffled_words(
        texts[s], rng).decode("utf-8", errors="ignore"))) for s in splits})


# ---------------------------------------------------------------------------------------------------------------------
# other methods' update rules, and this one's without a part, in fastmix.py's own loop: {name there: what replaces it}

RAW = {"inverse_curvature": lambda G, H, head, optimizer: G}
NO_RUNNING_MEAN = {"DECAY": 0.0}


def adamw_units(G, H, head, optimizer):
    """G in the units of AdamW's own step, which looks one step ahead and no further."""
    v = optimizer.state[head].get("exp_avg_sq")
    root = torch.ones_like(G) if v is None else v.sqrt()
    return G / (root + 0.1 * root.mean())


ADAMW = {"inverse_curvature": adamw_units}


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

    return {"mixture_step": mixture_step, **RAW, **NO_RUNNING_MEAN}


def authors():
    """
    As in hrtan/fastmix at b2a4051: uniform draws, loss weights, the raw gradient over z at the head, Adam. The target's
    sequences are drawn afresh here.
    """
    optimizers = []

    def mixture_step(z, A, present, rate):
        alpha, A = torch.softmax(z, 0), torch.where(present, A, 0.0)
        z.grad = -alpha * (A - (alpha * A).sum())
        if not optimizers:
            optimizers.append(torch.optim.Adam([z], lr=rate, betas=(0.9, 0.95), eps=1e-30))
        optimizers[0].step()

    return {"mixture_step": mixture_step, **RAW, **NO_RUNNING_MEAN}


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

def settings_of(work, job, **flags):
    """fastmix.py's flags for a job, {flag: value}, and how many tokens of each test split are read."""
    _, sources, target = TASKS[job["task"]]
    n_layer, n_head, n_embd = SIZES[job["size"]]
    return {"sources": sources, "target": target, "seed": job["seed"], "max_steps": job["steps"],
            "data_dir": data_of(work, job["task"]), "n_layer": n_layer, "n_head": n_head,
            "n_embd": n_embd, "eval_tokens": 1024, "log_every": max(1, job["steps"] // 40),
            "learning_rate": 2e-3,  # half the default: seeds differ by less
            "device": "cpu" if job["size"] == "base" or not torch.cuda.device_count() else "cuda", "dtype": "float32",
            **flags}, 2**17 // len(target.split(","))


def train(work, job, out, flags, patches={}):
    """One run of fastmix.py in this process. Returns its mixture.json and the rows of its log."""
    flags, test_tokens = settings_of(work, job, out_dir=out, **flags)
    argv = ["fastmix.py", *(str(x) for flag, value in flags.items() for x in (f"--{flag}", value))]
    with (mock.patch.multiple(fastmix, TEST_TOKENS=test_tokens, **patches),
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
            patches = {"search DoGE": doge(), "search authors": authors(), "search raw": RAW,
                       "search adamw": ADAMW, "search no running mean": NO_RUNNING_MEAN}.get(job["what"], {})
        found, rows = train(work, job, Path(folder, "out"), flags if mixture is None else {"mixture": mixture}, patches)
    result = {k: job[k] for k in KEY}
    result |= {"test_loss": round(found["test_loss"], 5), "seconds": found["seconds"]}
    if found["searched"]:
        result["mixtures"] = {n: [round(w, 5) for w in m.values()] for n, m in found["mixtures"].items()}
        result["trajectory"] = [[r["step"], [round(w, 4) for w in r["alpha"].values()]] for r in rows]
    elif not replayed:
        result["mixture"] = [round(w, 5) for w in found["mixture"].values()]
    return result


def runs_at_once(work, jobs):
    """The lines of many jobs at fixed mixtures, of one task, size and number of steps, trained on the GPU at once."""
    names = sources_of(jobs[0]["task"])
    flags, test_tokens = settings_of(work, jobs[0])
    args = argparse.Namespace(**DEFAULTS | flags)
    sizes = [len(read(args.data_dir, n, "train")) for n in names]
    runs = []
    for job in jobs:
        mixture = job["mixture"]
        if isinstance(mixture, str):
            rows = read_mixture(mixture, names, sizes)
        elif isinstance(mixture[0], list):  # a trajectory
            rows = np.array([[step / job["steps"], *weights] for step, weights in mixture])
        else:
            rows = np.array([[0.0, *mixture]])
        rows[:, 1:] /= rows[:, 1:].sum(1, keepdims=True)
        runs.append((job["seed"], rows))
    start = time.time()
    found = train_many(args, runs, "cuda", test_tokens)
    for job, (_, rows), loss in zip(jobs, runs, found):
        result = {k: job[k] for k in KEY} | {"test_loss": round(float(loss), 5),
                                             "seconds": round((time.time() - start) / len(jobs), 3)}
        yield result if len(rows) > 1 else result | {"mixture": [round(w, 5) for w in rows[0, 1:].tolist()]}


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
        many, context = {}, multiprocessing.get_context("fork")  # torch is imported once
        for key, job in list(self.jobs.items()) if torch.cuda.device_count() else ():
            if job["mixture"] is not None:
                many.setdefault((job["task"], job["size"], job["steps"]), []).append(self.jobs.pop(key))
        with ProcessPoolExecutor(self.args.jobs, mp_context=context) as pool:
            pending = {pool.submit(one_run, str(self.work), job): job for job in self.jobs.values()}
            for (task, size, steps), jobs in many.items():
                for i in range(0, len(jobs), AT_ONCE[size]):
                    for result in runs_at_once(self.work, jobs[i: i + AT_ONCE[size]]):
                        self.store(result)
                    print(f"{task} {size} {steps}: {i + AT_ONCE[size]}/{len(jobs)} on the GPU", flush=True)
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

def random_mixtures(task, args, sparse=False):
    """(R, K) of them; sparse ones lie near the edges of the simplex, where good ones often are."""
    K, n = len(sources_of(task)), args.random // (2 if size_of(task) == "bpe" else 1)
    return np.random.default_rng(2).dirichlet(np.full(K, 0.4), n) if sparse else (
        np.random.default_rng(0).dirichlet(np.ones(K), n))


def fixed_mixtures(task, args):
    """{name: mixture} of those that no search is needed for."""
    names = sources_of(task)
    return ({"uniform": "uniform", "proportional": "proportional"}
            | {f"only {name}": m for name, m in zip(names, np.eye(len(names)))}
            | {f"random {i}": m for i, m in enumerate(random_mixtures(task, args))})


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
        for seed in seeds_of(args, task):
            for what in args.searches:
                bench.add(task, f"search {what}", seed, flags=SEARCHES[what])
            for what, m in fixed_mixtures(task, args).items():
                if seed == first or what in ("uniform", "proportional"):
                    bench.add(task, what, seed, m)
    bench.run()
    for task in args.tasks:
        for what in ROWS:
            method, _, taken = what.partition(": ")
            for seed in seeds_of(args, task) if method in args.searches else ():
                found = bench.get(task, f"search {method}", seed)
                bench.add(task, what, seed, found["trajectory"] if taken == "trajectory" else found["mixtures"][taken])
        done = [bench.get(task, f"random {i}", first) for i in range(len(random_mixtures(task, args)))]
        for n in REGMIX:
            if n <= len(done):
                best = regmix(np.array([r["mixture"] for r in done[:n]]), np.array([r["test_loss"] for r in done[:n]]))
                for seed in seeds_of(args, task):
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
            for seed in seeds_of(args, task):
                bench.add(task, what, seed, r["mixture"])
    bench.run()


def best_fixed(results, task, args, measured_on=None):
    """
    The best fixed mixture known, as (what, mixture), by its mean over all seeds but the one that it is to be measured
    on: there the best of many would owe a part of its lead to chance.
    """
    by_what, seeds = {}, seeds_of(args, task)
    for r in results.values():
        if (r["task"], r["steps"], r["size"]) == (task, args.steps, size_of(task)) and "mixture" in r:
            by_what.setdefault(r["what"], {})[r["seed"]] = r
    whole = {what: runs for what, runs in by_what.items() if set(seeds) <= runs.keys()
             and len({tuple(r["mixture"]) for r in runs.values()}) == 1}  # one mixture on all seeds
    others = [s for s in seeds if s != measured_on] or seeds
    best = min(whole, key=lambda what: np.mean([whole[what][s]["test_loss"] for s in others]))
    return best, whole[best][seeds[0]]["mixture"]


def surface(bench, args):
    """Fixed mixtures on all seeds, for the response surface and for the best one known."""
    for task in args.tasks:
        sparse = {f"sparse {i}": m for i, m in enumerate(random_mixtures(task, args, sparse=True))}
        for seed in seeds_of(args, task):
            for what, m in (fixed_mixtures(task, args) | sparse).items():
                bench.add(task, what, seed, m)
    bench.run()


# ---------------------------------------------------------------------------------------------------------------------
# the other questions

def transfer(bench, args):
    """What was found by the small and short search, and by one there, with a larger model trained twice as long."""
    runs = [(task, seed, {"steps": 2 * args.steps, "size": LARGER[size_of(task)]})
            for task in args.tasks for seed in args.seeds[:2]]
    for task, seed, where in runs:
        found = bench.get(task, "search FastMix", seed)
        mixtures = {"uniform": "uniform", "proportional": "proportional", "search FastMix": None,
                    "FastMix: last_half_average": found["mixtures"]["last_half_average"],
                    "FastMix: trajectory": found["trajectory"],
                    "best fixed": best_fixed(bench.results, task, args)[1]}
        on_bytes = bench.get(BYTES.get(task), "search FastMix", seed, size="base")
        if on_bytes:
            mixtures["found on bytes"] = on_bytes["mixtures"]["last_half_average"]
        for what, mixture in mixtures.items():
            bench.add(task, what, seed, mixture, **where)
    bench.run()
    for task, seed, where in runs:
        found = bench.get(task, "search FastMix", seed, **where)
        bench.add(task, "searched there", seed, found["mixtures"]["last_half_average"], **where)
    bench.run()


def named(setting):
    """The name of a search with some flags changed."""
    return "search " + (", ".join(f"--{flag} {value:g}" for flag, value in setting.items()) or "at the defaults")


def sensitivity(bench, args):
    for task in args.tasks:
        for setting in SETTINGS:
            for seed in TUNING_SEEDS:
                bench.add(task, named(setting), seed, flags=setting)
    bench.run()


REPETITION = {"neither": {}, "repetition": {"max_epochs": 1e9}, "cap of 4 epochs": None, "both": {},
              "both, 8 epochs": {"max_epochs": 8}, "both, 16 epochs": {"max_epochs": 16}}
REPETITION_SEEDS = (12, 13, 14)


def repetition(bench, args):
    """
    The scarce task, trained four times as long as it is searched: what a search finds without and with the caps of that
    run (--max_epochs) and its repetition, in % of uniform's loss there.
    """
    steps = 4 * args.steps
    tokens = steps * DEFAULTS["batch_size"] * DEFAULTS["block_size"]
    scarce = len(read(data_of(args.work, "scarce"), "prose_2", "train"))
    for seed in REPETITION_SEEDS:
        for name, flags in REPETITION.items():
            if name == "cap of 4 epochs":
                flags = {"bounds": f"prose_2=:{min(1.0, 4 * scarce / tokens):g}"}
            elif name != "neither":
                flags = {"train_tokens": tokens, **flags}
            bench.add("scarce", f"search for {steps} steps, {name}", seed, flags=flags)
    bench.run()
    for seed in REPETITION_SEEDS:
        bench.add("scarce", "uniform", seed, "uniform", steps=steps)
        for name in REPETITION:
            found = bench.get("scarce", f"search for {steps} steps, {name}", seed)["mixtures"]["last_half_average"]
            bench.add("scarce", name, seed, found, steps=steps)
    bench.run()


# ---------------------------------------------------------------------------------------------------------------------
# the response surface

def gaussian_process(x, y, noise):
    """
    x (R, D), y (R,), noise (R,) standard deviations of y -> (predict, error): predict maps (S, D) to (S,), and error is
    the rms of what each y differs from its prediction by the others. A squared exponential kernel, whose length and
    height are those of the largest marginal likelihood on a grid, and an unknown mean.
    """
    mean, scale, best = y.mean(), y.std(), None

    def distances(a):
        return ((a[:, None] - x[None]) ** 2).sum(-1)
    for length in (0.3, 0.5, 0.7, 1.0, 1.5, 2.0, 3.0):
        for height in (0.3, 1.0, 3.0, 10.0, 30.0):
            def kernel(d, length=length, height=height):
                return height * np.exp(-d / (2 * length**2)) + 100  # + 100: the mean
            covariance = kernel(distances(x)) + np.diag((noise / scale) ** 2)
            inverse = np.linalg.inv(covariance)
            weights = inverse @ ((y - mean) / scale)
            likelihood = -weights @ (y - mean) / scale - np.linalg.slogdet(covariance)[1]
            if best is None or likelihood > best[0]:
                error = np.sqrt(((weights / np.diag(inverse)) ** 2).mean()) * scale
                best = likelihood, kernel, weights, error
    _, kernel, weights, error = best
    return lambda a: mean + scale * kernel(distances(np.atleast_2d(a))) @ weights, error


def log_shares(mixtures):
    return np.log(np.asarray(mixtures) + 0.05) / 3


def response_surface(results, task, args):
    """
    (predict, error): the loss of mixtures (S, K), as a mean over the seeds, from all fixed runs of the task that are
    within a tenth of the best; and its leave-one-out error, in % of the best. None where there are few runs.
    """
    by_mixture, seeds = {}, seeds_of(args, task)  # {mixture: {seed: loss}}
    for r in results.values():
        if ((r["task"], r["steps"], r["size"]) == (task, args.steps, size_of(task)) and "mixture" in r
                and r["seed"] in seeds):
            by_mixture.setdefault(tuple(r["mixture"]), {})[r["seed"]] = r["test_loss"]
    whole = np.array([[runs[s] for s in seeds] for runs in by_mixture.values() if len(runs) == len(seeds)])
    if len(by_mixture) < 20 or len(seeds) < 2 or len(whole) < 3:
        return None
    seed_effect = dict(zip(seeds, whole.mean(0) - whole.mean()))
    rest = whole - whole.mean(1, keepdims=True) - whole.mean(0) + whole.mean()
    noise = rest.std() * np.sqrt(len(seeds) / (len(seeds) - 1))  # of one run
    y = np.array([np.mean([loss - seed_effect[s] for s, loss in runs.items()]) for runs in by_mixture.values()])
    near = y < 1.1 * whole.mean(1).min()
    count = np.array([len(runs) for runs in by_mixture.values()])
    predict, error = gaussian_process(log_shares(list(by_mixture))[near], y[near], noise / np.sqrt(count[near]))
    return lambda mixtures: predict(log_shares(mixtures)), 100 * error / y.min()


# ---------------------------------------------------------------------------------------------------------------------
# tables and figures

def flops(size, steps, search=None):
    """
    Of one run: 2 a weight and token forward and 4 backward (Kaplan et al., arXiv 2001.08361), attention 2 T C a token,
    layer and pass. A search (a key of SEARCHES) adds an outer step's: the target's forward pass and its gradient at the
    head; and, for the curvature, the second moment of hidden states, its inverse and the product with that gradient.
    """
    (L, _, C), V, T = SIZES[size], 4097 if size.startswith("bpe") else 257, DEFAULTS["block_size"]
    forward = 2 * (12 * L * C**2 + V * C) + 2 * L * T * C  # of a token
    tokens, extra = DEFAULTS["batch_size"] * T, 0.0
    if search == "DoReMi":
        extra = tokens * forward  # the reference model reads along
    elif search:
        every = SEARCHES[search].get("outer_every", DEFAULTS["outer_every"])
        target_tokens = SEARCHES[search].get("target_batch_size", DEFAULTS["target_batch_size"]) * T
        curvature = 2 * target_tokens * C**2 + 2 * C**3 + 2 * V * C**2 if search in WITH_CURVATURE else 0
        extra = (target_tokens * (forward + 2 * V * C) + curvature) / every
    return steps * (3 * tokens * forward + extra)


def cost_of(what, task):
    """In runs of the proxy at a fixed mixture; the run at the mixture that comes out is everybody's and not counted."""
    method, _, taken = what.partition(": ")
    if what.startswith("RegMix"):
        return int(what.split()[1])
    if not taken:
        return 0.0
    return flops(size_of(task), 1, method) / flops(size_of(task), 1) + (method == "DoReMi")


def losses(results, task, what, seeds, steps, size=None):
    """(S,) test losses, or None where one is missing."""
    rows = [results.get((task, what, seed, steps, size or size_of(task))) for seed in seeds]
    return np.array([r["test_loss"] for r in rows]) if all(rows) else None


def measured_seeds(args, task):
    """The first seed chose which mixtures run on all seeds, so the others measure; with one seed, it does both."""
    return seeds_of(args, task)[1:] or args.seeds


def regret(results, task, what, args, best):
    """
    (S,) loss above the best fixed mixture known, in % of it, on each seed that ran; None if none did. best {seed:
    (what, mixture)}: on each seed the one that is best on the other seeds.
    """
    seeds = measured_seeds(args, task)
    if what == "best single source":  # on the first seed only
        seeds, rest = args.seeds[:1], (args.seeds[0], args.steps, size_of(task))
        single = {f"only {n}": results.get((task, f"only {n}", *rest)) for n in sources_of(task)}
        what = min((w for w, r in single.items() if r), key=lambda w: single[w]["test_loss"], default=what)
    seeds = [s for s in seeds if losses(results, task, what, [s], args.steps) is not None]
    least = [losses(results, task, best[s][0], [s], args.steps)[0] for s in seeds]
    return 100 * (losses(results, task, what, seeds, args.steps) / least - 1) if seeds else None


def cell(values, n_seeds, predicted=None):
    """Mean (lowest to highest), and how many seeds where not all ran; then what the response surface says."""
    if values is None:
        return ""
    spread = [f"{values.min():+.2f} to {values.max():+.2f}"] if len(values) > 1 else []
    seeds = [f"{len(values)} seed{'s' * (len(values) > 1)}"] if len(values) < n_seeds else []
    return (f"{values.mean():+.2f}" + (f" ({'; '.join(spread + seeds)})" if spread + seeds else "")
            + (f", {predicted:+.2f}" if predicted is not None else ""))


def predicted_regret(results, task, what, args, best, surface):
    """What regret() gives, by the response surface; None where a row is no mixture, but a trajectory."""
    if surface is None or what == "best single source" or "trajectory" in what:
        return None
    runs = [(s, results.get((task, what, s, args.steps, size_of(task)))) for s in measured_seeds(args, task)]
    values = [100 * (surface[0](r["mixture"]) / surface[0](best[s][1]) - 1)
              for s, r in runs if r]
    return np.mean(values) if values else None


def show(args):
    results = load(args.results)
    tasks = [t for t in args.tasks if losses(results, t, "uniform", seeds_of(args, t), args.steps) is not None]
    bests = {t: {s: best_fixed(results, t, args, s) for s in seeds_of(args, t)} for t in tasks}
    for size in ("base", "bpe"):
        if any(size_of(t) == size for t in tasks):
            show_tasks(results, [t for t in tasks if size_of(t) == size], args, bests)
    if not tasks:
        return print(f"{args.results} has no runs of {args.steps} steps on all of these seeds and one of these tasks")
    show_transfer(results, tasks, args)
    show_repetition(results, args)
    show_sensitivity(results, tasks, args)
    figure(results, tasks, args, bests, Path(args.results).parent / "mixtures.png")


def show_tasks(results, tasks, args, bests):
    seeds, measured = seeds_of(args, tasks[0]), measured_seeds(args, tasks[0])
    surfaces = {t: response_surface(results, t, args) for t in tasks}
    chosen = " (chosen on the other seeds)" if len(seeds) > 1 else ""
    print(f"\n{args.steps} steps, seeds {', '.join(map(str, measured))}; regret: % of the loss above the "
          f"best fixed mixture known{chosen}, mean over the seeds (lowest to highest), by the response surface\n")
    print("| | cost | " + " | ".join(TASKS[t][0] for t in tasks) + " |\n| --- | --- |" + " --- |" * len(tasks))
    for what, title in ROWS.items():
        cells = [cell(regret(results, t, what, args, bests[t]), len(measured),
                      predicted_regret(results, t, what, args, bests[t], surfaces[t])) for t in tasks]
        if any(cells):
            print(f"| {title} | {cost_of(what, tasks[0]):.2f} | " + " | ".join(cells) + " |")
    for task in tasks:
        best, mixture = best_fixed(results, task, args)
        loss = losses(results, task, best, seeds, args.steps)
        uniform = losses(results, task, "uniform", seeds, args.steps)

        def listed(weights):
            return ", ".join(f"{n} {w:.2f}" for n, w in zip(sources_of(task), weights))
        print(f"\n{task}: best fixed mixture known {loss.mean():.4f} nats a token ({best}: {listed(mixture)}); "
              f"uniform {uniform.mean():.4f}, its seeds differ by {100 * np.ptp(uniform) / uniform.mean():.2f}%"
              + (f"; leave-one-out error of the surface {surfaces[task][1]:.2f}%" if surfaces[task] else ""))
        for seed in seeds:
            found = results.get((task, "search FastMix", seed, args.steps, size_of(task)))
            if found:
                print(f"    seed {seed} found " + listed(found["mixtures"]["last_half_average"]))
    print()
    for what, cost in (("uniform", 1.0), ("search FastMix", cost_of("FastMix: last", tasks[0]))):
        print(f"{what}: {cost * flops(size_of(tasks[0]), args.steps):.3g} FLOPs")


def show_transfer(results, tasks, args):
    steps = 2 * args.steps
    tasks = [t for t in tasks if (t, "searched there", args.seeds[0], steps, LARGER[size_of(t)]) in results]
    if not tasks:
        return
    print(f"\na larger model, {steps} steps: % of uniform's loss on the same seed\n")
    print("| | " + " | ".join(TASKS[t][0] for t in tasks) + " |\n| --- |" + " --- |" * len(tasks))
    titles = {"proportional": "proportional to tokens", "best fixed": "best fixed mixture of the small runs",
              "FastMix: last_half_average": "FastMix, found by the small search",
              "FastMix: trajectory": "FastMix, its trajectory replayed",
              "found on bytes": "FastMix, found by the small search on bytes",
              "searched there": "FastMix, searched there"}
    for what, title in titles.items():
        cells = []
        for task in tasks:
            pairs = [[losses(results, task, w, [s], steps, LARGER[size_of(task)]) for w in (what, "uniform")]
                     for s in args.seeds]
            gains = [100 * (found / uniform - 1) for found, uniform in pairs
                     if found is not None and uniform is not None]
            cells.append(cell(np.array(gains) if gains else None, 0))
        if any(cells):
            print(f"| {title} | " + " | ".join(cells) + " |")


def show_repetition(results, args):
    steps = 4 * args.steps
    uniform = losses(results, "scarce", "uniform", REPETITION_SEEDS, steps)
    if uniform is None:
        return
    print(f"\nscarce target, {steps} steps: % of uniform's loss\n\n| | " +
          " | ".join(f"seed {s}" for s in REPETITION_SEEDS) + " | mean | share of the scarce source |")
    print("| --- |" + " --- |" * (len(REPETITION_SEEDS) + 2))
    for name in REPETITION:
        gain = 100 * (losses(results, "scarce", name, REPETITION_SEEDS, steps) / uniform - 1)
        share = [results["scarce", name, s, steps, "base"]["mixture"][-1] for s in REPETITION_SEEDS]
        print(f"| {name} | " + " | ".join(f"{g:+.2f}" for g in (*gain, gain.mean())) + f" | {np.mean(share):.3f} |")


def show_sensitivity(results, tasks, args):
    """By the response surface, so that a setting costs a search and no training afterwards."""
    tasks = [t for t in tasks if (t, named({}), TUNING_SEEDS[0], args.steps, size_of(t)) in results]
    if not tasks:
        return
    print(f"\nsearches of seeds {TUNING_SEEDS[0]} and {TUNING_SEEDS[1]}, average of the last half: % of the loss above "
          "the best fixed mixture known, by the response surface\n\n| | " + " | ".join(TASKS[t][0] for t in tasks) +
          " |\n| --- |" + " --- |" * len(tasks))
    references = {}
    for task in tasks:
        surface, _ = response_surface(results, task, args)
        references[task] = surface, surface(best_fixed(results, task, args)[1])[0]
    for setting in SETTINGS:
        cells = []
        for task, (surface, best) in references.items():
            found = [results.get((task, named(setting), s, args.steps, size_of(task))) for s in TUNING_SEEDS]
            cells.append(np.mean([surface(r["mixtures"]["last_half_average"])[0] / best - 1 for r in found if r]))
        title = named(setting).removeprefix("search ")
        print(f"| {title if not setting else f'`{title}`'} | " + " | ".join(f"{100 * c:+.2f}" for c in cells) + " |")


def figure(results, tasks, args, bests, path):
    """Regret against the cost of the search, one panel a task."""
    lines = (([f"RegMix {n}" for n in REGMIX], "#009E73", "s", 0, "RegMix-style"),
             (["FastMix: last_half_average"], "#0072B2", "o", 0, "FastMix, last half"),
             (["FastMix: trajectory"], "#56B4E9", "D", 3, "FastMix, replayed"),
             (["adamw: last_half_average"], "#332288", "X", 1, "in AdamW's units"),
             (["raw: last_half_average"], "#D55E00", "P", 2, "raw gradients"),
             (["authors: last"], "#999933", "v", 0, "the authors' setting"),
             (["DoGE: run_average"], "#E69F00", "^", 4, "DoGE's rule"),
             (["DoReMi: run_average"], "#CC79A7", "v", 0, "DoReMi's rule"))
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    columns = min(3, len(tasks))
    fig, axes = plt.subplots(-(-len(tasks) // columns), columns, dpi=110, squeeze=False, layout="constrained",
                             figsize=(3.6 * columns, 3.0 * -(-len(tasks) // columns) + 0.8))
    for ax in axes.flat[len(tasks):]:
        ax.remove()
    for ax, task in zip(axes.flat, tasks):
        for what, style in (("uniform", "--"), ("proportional", ":")):
            r = regret(results, task, what, args, bests[task])
            if r is not None:
                ax.axhline(r.mean(), color="#666666", linestyle=style, linewidth=1, label=what)
        ax.axhline(0, color="#222222", linewidth=1, label="best fixed mixture known")
        for whats, colour, marker, aside, label in lines:
            found = [(w, regret(results, task, w, args, bests[task])) for w in whats]
            found = np.array([(cost_of(w, task), r.mean(), r.mean() - r.min(), r.max() - r.mean())
                              for w, r in found if r is not None])
            if len(found):
                found[:, 0] *= 1 + 0.08 * aside  # side by side where they cost the same
                ax.errorbar(found[:, 0], found[:, 1], yerr=found[:, 2:].T, color=colour, marker=marker, markersize=6,
                            linewidth=1, capsize=2, label=label)
        ax.set(title=TASKS[task][0], xlabel="cost of the search (proxy runs)", xscale="log", xlim=(0.8, 90))
        ax.set_xticks([1, 2, 4, 8, 16, 32, 64], ["1", "2", "4", "8", "16", "32", "64"], minor=False)
        ax.minorticks_off()
        ax.spines[["top", "right"]].set_visible(False)
    for ax in axes[:, 0]:
        ax.set_ylabel("loss above the best, %")
    fig.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    fig.savefig(path)
    print(f"\nwrote {path}")


# ---------------------------------------------------------------------------------------------------------------------

STAGES = {"compare": compare, "surface": surface, "transfer": transfer, "sensitivity": sensitivity,
          "repetition": repetition}


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--work", default="out-bench", type=Path, help="data, results and figures")
    p.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    p.add_argument("--gpt2_ranks", type=Path, help="gpt2's vocabulary, a .tiktoken file: bpe and bpe_half take its "
                                                   "first 4,096 ranks, and are left out without it")
    p.add_argument("--stages", nargs="+", choices=STAGES, default=["compare", "surface"])
    p.add_argument("--searches", nargs="+", choices=SEARCHES, default=list(SEARCHES))
    p.add_argument("--seeds", nargs="+", type=int, default=[11, 12, 13, 14, 15],
                   help="the first is for random mixtures and the choice of those that run on all; the others measure")
    p.add_argument("--steps", type=int, default=600)
    p.add_argument("--random", type=int, default=64, help="runs at random mixtures, for the RegMix-style search")
    p.add_argument("--best", type=int, default=5, help="best mixtures of the first seed to be run on all seeds")
    p.add_argument("--jobs", type=int, default=os.cpu_count())
    p.add_argument("--quick", action="store_true")
    p.add_argument("--table", action="store_true", help="run nothing")
    p.add_argument("--results", help="lines to make the table and the figures from (default: those of --work)")
    args = p.parse_args()
    if args.quick:
        args.tasks, args.seeds, args.steps, args.random, args.best = ["numpy"], [11], 250, 16, 2
        args.searches, args.stages = ["FastMix", "DoGE"], ["compare"]
    args.results = args.results or args.work / "results.jsonl"
    if not args.table:
        args.work.mkdir(parents=True, exist_ok=True)
        if not args.gpt2_ranks and not (args.work / "data-bpe").exists():
            print("tasks with a BPE vocabulary are left out: they need gpt2's, --gpt2_ranks FILE")
            args.tasks = [t for t in args.tasks if not t.startswith("bpe")]
        if any(t.startswith("bpe") for t in args.tasks) and args.gpt2_ranks:
            vocabulary = args.work / "gpt2-4096.tiktoken"
            vocabulary.write_bytes(b"".join(args.gpt2_ranks.read_bytes().splitlines(keepends=True)[:4096]))
            prepare(args.work / "data-bpe", vocabulary)
        prepare(args.work / "data", "bytes")
        bench = Bench(args)
        for stage in args.stages:
            STAGES[stage](bench, args)
    show(args)


if __name__ == "__main__":
    main()

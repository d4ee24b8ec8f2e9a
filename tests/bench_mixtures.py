"""
Does the search find the best mixture, and at what price? FastMix against fixed mixtures, a RegMix-style search and the
update rules of DoGE and DoReMi, by the target's test loss of models trained from scratch for the same number of steps.

    python tests/bench_mixtures.py --quick           one task, short runs: 5 minutes on 2 cores
    python tests/bench_mixtures.py                   four tasks, some 5 hours on 2 cores; stop and go on as you like
    python tests/bench_mixtures.py --stages alignments transfer stretch sensitivity       the other questions
    python tests/bench_mixtures.py --table --results tests/bench_mixtures.jsonl           from stored results, no run

Every run is fastmix.py itself, in one thread, --jobs at a time, and one line in WORK/results.jsonl; a line that is
there is never run again. Seeds are paired: a seed fixes initialisation and batches of every method's run.
"""
import argparse
import contextlib
import copy
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

TASKS = {  # name: (sources, target)
    "numpy": ("python,cpp,prose,math,legal,noise", "numpy"),
    "own": ("python,cpp,prose,math,legal", "python,cpp,prose,math,legal"),
    "scarce": ("python,cpp,math,legal,prose_2", "prose_2"),  # prose with 2% of its train split
    "noisy": ("python,cpp,prose,python_b,noise,bytes", "math"),  # half of them of no use or near-duplicates
}
TITLES = {"numpy": "toward numpy", "own": "own val splits", "scarce": "scarce target", "noisy": "half of no use"}
SEARCHES = {"FastMix": [], "eps 0": ["--uniform_share", "0"], "eps 1": ["--uniform_share", "1"],
            "every 20": ["--outer_every", "20"], "all": ["--alignment", "all"],
            "all every 4": ["--alignment", "all", "--outer_every", "4", "--learning_rate_mixture", "0.06"],
            "Adam": [], "DoGE": [], "DoReMi": ["--learning_rate_mixture", "0.1"]}
SUMMARIES = {**dict.fromkeys(("FastMix", "Adam"), ("last", "last_half_average", "run_average", "trajectory")),
             **dict.fromkeys(("all", "all every 4"), ("last_half_average", "trajectory")),
             **dict.fromkeys(("eps 0", "eps 1", "every 20"), ("last_half_average",)),
             **dict.fromkeys(("DoGE", "DoReMi"), ("run_average",))}  # as both papers do
SIZES = {"base": {"n_layer": 2, "n_head": 2, "n_embd": 64}, "large": {"n_layer": 4, "n_head": 4, "n_embd": 128}}
STRETCH = 4
REGMIX = (8, 16, 32, 64)  # runs of the RegMix-style search
LEARNING_RATE = ("--learning_rate", 2e-3, "--min_lr", 2e-4)  # half the default: seeds differ by less
KEY = ("task", "what", "seed", "steps", "size")  # what a result is known by


# ---------------------------------------------------------------------------------------------------------------------
# data

def derive(data, name, source, splits):
    """A set from another one's tokens: {split: function of its ids}."""
    shutil.rmtree(data / name, ignore_errors=True)
    shutil.copytree(data / source, data / name)
    meta = json.loads((data / name / "meta.json").read_text())
    for split, change in splits.items():
        ids = change(np.fromfile(data / source / f"{split}.bin", dtype=meta["dtype"]))
        ids.tofile(data / name / f"{split}.bin")
        meta["splits"][split] |= {"tokens": len(ids), "sha256": f"{name} of {meta['splits'][split]['sha256']}"}
    (data / name / "meta.json").write_text(json.dumps(meta | {"name": name}))


def prepare(data):
    if not (data / "bytes" / "meta.json").exists():
        subprocess.run([sys.executable, ROOT / "prepare_data.py", "--data_dir", data], check=True)
        derive(data, "prose_2", "prose", {"train": lambda ids: ids[: len(ids) // 50]})
        derive(data, "python_b", "python", {"train": lambda ids: ids[len(ids) // 4:]})  # three quarters of python again
        rng = np.random.default_rng(0)
        derive(data, "bytes", "noise", {s: lambda ids: rng.integers(0, 256, len(ids)).astype(ids.dtype)
                                        for s in ("train", "val", "test")})


# ---------------------------------------------------------------------------------------------------------------------
# other methods' update rules, in fastmix.py's own loop

def gradient_step(z, gradient, alpha, present, learning_rate):
    """What DoGE and DoReMi do with their gradients: on the logits it is mirror descent on the simplex."""
    z -= learning_rate * gradient


def adam(betas=(0.9, 0.95)):
    """
    Adam on z with formula (3), present sources only. Tried and dropped: it moves as fast on a small difference as on a
    large one.
    """
    moments = []

    def step(z, gradient, alpha, present, learning_rate):
        if not moments:
            moments.append(torch.zeros(3, len(z)))
        m, v, n = moments[0]
        m.copy_(torch.where(present, betas[0] * m + (1 - betas[0]) * gradient, m))
        v.copy_(torch.where(present, betas[1] * v + (1 - betas[1]) * gradient**2, v))
        n += present
        move = (m / (1 - betas[0] ** n)) / ((v / (1 - betas[1] ** n)).sqrt() + 1e-12)
        z.sub_(torch.where(present, learning_rate * move, 0.0))

    return {"alignment_scale": lambda weight, alignment, present: 1.0, "mixture_step": step}


def doge():
    """
    DoGE (Fan et al., arXiv 2310.15393): alpha_k in proportion to alpha_k exp(step A_k), A_k the alignment of the
    source's gradient with the target's. Its step is in units of 1 / (running mean of max |A|): it has no natural one.
    """
    largest = []

    def gradient(alpha, alignment, present, eta=1.0, density=1.0):
        largest.append(alignment.abs().max().item())
        return -alignment * present / np.mean(largest[-100:])

    return {"mixture_gradient": gradient, "mixture_step": gradient_step}


def doremi(reference):
    """
    DoReMi (Xie et al., arXiv 2305.10429): exponentiated gradient on each source's excess loss over a reference model's,
    clipped at 0 a token. It knows no target. The excess travels where the loop carries alignments.
    """
    ckpt = torch.load(reference, weights_only=True)
    net = fastmix.GPT(fastmix.GPTConfig(**ckpt["config"]))
    net.load_state_dict(ckpt["model"])
    batch_loss = fastmix.batch_loss

    def with_excess(model, head, x, y, r, n_tokens, G_val=None):
        loss, token_loss, _ = batch_loss(model, head, x, y, r, n_tokens)
        with torch.no_grad():
            known = fastmix.fused_cross_entropy(net(x).flatten(0, 1), net.lm_head.weight, y.flatten())[1].view_as(y)
        return loss, token_loss, (token_loss - known).clamp(min=0)

    def gradient(alpha, excess, present, eta=1.0, density=1.0):
        return -excess * present

    return {"batch_loss": with_excess, "mixture_gradient": gradient, "mixture_step": gradient_step}


# ---------------------------------------------------------------------------------------------------------------------
# runs

def train(argv, patches=None):
    """One run of fastmix.py in this process. Returns its mixture.json and the rows of its log."""
    out = Path(argv[argv.index("--out_dir") + 1])
    with (mock.patch.multiple(fastmix, **patches) if patches else contextlib.nullcontext(),
          mock.patch.object(sys, "argv", ["fastmix.py", *argv]),
          open(f"{out}.txt", "w") as text, contextlib.redirect_stdout(text)):
        fastmix.main()
    Path(f"{out}.txt").unlink()
    return json.loads((out / "mixture.json").read_text()), [json.loads(r) for r in open(out / "log.jsonl")]


def common(work, job, out):
    """The flags that every run of a task has; later ones win."""
    sources, target = TASKS[job["task"]]
    return ["--sources", sources, "--target", target, "--seed", job["seed"], "--max_steps", job["steps"], *LEARNING_RATE,
            *(x for k, v in SIZES[job["size"]].items() for x in ("--" + k, v)), "--eval_every", job["steps"],
            "--log_every", max(1, job["steps"] // 40), "--test_tokens", 2**17 // len(target.split(",")), "--data_dir",
            Path(work, "data"), "--device", "cpu", "--out_dir", out]


def one_run(work, job):
    """A job, as Bench.add() makes it -> its line of the results. Runs in a process of the pool."""
    torch.set_num_threads(1)
    names = TASKS[job["task"]][0].split(",")
    with tempfile.TemporaryDirectory(dir=work) as folder:
        mixture = job["mixture"]
        if isinstance(mixture, list):  # a trajectory: rows of (step, weights)
            rows = [json.dumps({"step": s, "alpha": dict(zip(names, a))}) + "\n" for s, a in mixture]
            Path(folder, "log.jsonl").write_text("".join(rows))
            mixture = str(Path(folder, "log.jsonl"))
        elif isinstance(mixture, dict):
            mixture = ",".join(f"{n}={w:.6f}" for n, w in mixture.items())
        flags = [*common(work, job, Path(folder, "out")), *job["flags"], *(["--mixture", mixture] if mixture else [])]
        patches = {"search DoGE": doge, "search Adam": adam}.get(job["what"], dict)()
        if job["what"] == "search DoReMi":
            train(list(map(str, [*common(work, job, Path(folder, "reference")), "--mixture", "uniform"])))
            patches = doremi(Path(folder, "reference", "ckpt.pt"))
        found, log = train(list(map(str, flags)), patches)
    result = {k: job[k] for k in KEY}
    result |= {"test_loss": round(found["test_loss"], 5), "seconds": found["seconds"]}
    if found["searched"]:
        result["mixtures"] = {n: [round(w, 5) for w in m.values()] for n, m in found["mixtures"].items()}
        result["trajectory"] = [[r["step"], [round(w, 4) for w in r["alpha"].values()]] for r in log]
    elif not isinstance(job["mixture"], list):
        result["mixture"] = [round(w, 5) for w in found["mixture"].values()]
    return result


class Bench:
    """Jobs and results; both are known by (task, what, seed, steps, size)."""

    def __init__(self, args):
        self.args, self.work = args, Path(args.work)
        self.path = self.work / "results.jsonl"
        self.work.mkdir(parents=True, exist_ok=True)
        self.results = load(self.path)
        if self.results:  # without the line that a kill cut short
            lines = "".join(json.dumps(r) + "\n" for r in self.results.values())
            fastmix.save_atomically(self.path, lambda f: f.write(lines.encode()))
        self.jobs = {}

    def get(self, task, what, seed, steps=None, size="base"):
        return self.results.get((task, what, seed, steps or self.args.steps, size))

    def add(self, task, what, seed, mixture=None, flags=(), steps=None, size="base"):
        """Asks for a run; with no mixture it is a search."""
        key = (task, what, seed, steps or self.args.steps, size)
        if key not in self.results:
            self.jobs[key] = dict(zip(KEY, key), mixture=mixture, flags=list(flags))

    def store(self, result, f):
        f.write(json.dumps(result) + "\n")
        f.flush()
        self.results[key_of(result)] = result

    def run(self):
        """Runs what was asked for, each result written as it comes."""
        if self.jobs:
            context = multiprocessing.get_context("fork")  # torch is imported once
            with ProcessPoolExecutor(self.args.jobs, mp_context=context) as pool, open(self.path, "a") as f:
                pending = {pool.submit(one_run, str(self.work), job): job for job in self.jobs.values()}
                for n, future in enumerate(as_completed(pending), 1):
                    try:
                        result = future.result()
                    except BaseException:
                        pool.shutdown(cancel_futures=True)
                        print("failed:", pending[future], file=sys.stderr)
                        raise
                    self.store(result, f)
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
        names = TASKS[task][0].split(",")
        for what in args.searches:
            for seed in args.seeds:
                bench.add(task, f"search {what}", seed, flags=SEARCHES[what])
        for seed in args.seeds:
            for m in ("uniform", "proportional"):
                bench.add(task, m, seed, m)
        for n in names:
            bench.add(task, f"only {n}", first, {n: 1.0})
        for i, m in enumerate(random_mixtures(len(names), args.random)):
            bench.add(task, f"random {i}", first, dict(zip(names, m)))
    bench.run()
    for task in args.tasks:
        names = TASKS[task][0].split(",")
        for what in args.searches:
            for seed in args.seeds:
                found = bench.get(task, f"search {what}", seed)
                for m in SUMMARIES[what]:
                    mixture = found["trajectory"] if m == "trajectory" else dict(zip(names, found["mixtures"][m]))
                    bench.add(task, f"{what}: {m}", seed, mixture)
        done = [bench.get(task, f"random {i}", first) for i in range(args.random)]
        for n in REGMIX:
            if n <= args.random:
                best = regmix(np.array([r["mixture"] for r in done[:n]]), np.array([r["test_loss"] for r in done[:n]]))
                for seed in args.seeds:
                    bench.add(task, f"RegMix {n}", seed, dict(zip(names, best)))
    bench.run()
    # the best fixed mixtures ever run, on all seeds: best_fixed() chooses among them
    for task in args.tasks:
        names = TASKS[task][0].split(",")
        fixed = [r for r in bench.results.values() if r["task"] == task and r["steps"] == args.steps
                 and r["size"] == "base" and "mixture" in r and r["seed"] == first
                 and not r["what"].startswith("best, from")]  # copies, made below when this ran before
        for r in sorted(fixed, key=lambda r: r["test_loss"])[: args.best]:
            what = f"best, from {r['what']}" if ":" in r["what"] else r["what"]  # "method: summary" differs by seed
            if what != r["what"] and not bench.get(task, what, first):
                with open(bench.path, "a") as f:
                    bench.store({**r, "what": what}, f)
            for seed in args.seeds:
                bench.add(task, what, seed, dict(zip(names, r["mixture"])))
    bench.run()


# ---------------------------------------------------------------------------------------------------------------------
# the other questions

def study_alignments(work, job):
    """
    Does the shortcut hold? For checkpoints early, in the middle and at the end of a search: each source's alignment at
    the head (formula (2)), its alignment over all parameters, and the target's true change of loss after one AdamW step
    on the source alone, each from the same 256 sequences a source. Returns one line of the results a checkpoint.
    """
    torch.set_num_threads(1)
    names, target_names = (t.split(",") for t in TASKS[job["task"]])
    steps, save = job["steps"], fastmix.save_atomically
    with tempfile.TemporaryDirectory(dir=work) as folder:
        def keep(path, write):
            save(path, write)
            if path.name == "ckpt.pt":
                shutil.copy(path, Path(folder, f"{torch.load(path, weights_only=True)['step']}.pt"))
        train([*map(str, common(work, job, Path(folder, "out"))), "--eval_every", str(steps // 10), "--eval_tokens", "64",
               "--test_tokens", "64"],
              {"save_atomically": keep})
        lines = []
        for step in (steps // 10, steps // 2, steps):
            ckpt = torch.load(Path(folder, f"{step}.pt"), weights_only=True)
            lines.append({**job, "what": f"alignments at {step / steps:g}", **measure(work, names, target_names, ckpt)})
    return lines


def measure(work, names, target_names, ckpt):
    args = argparse.Namespace(**ckpt["args"])
    sets = {n: fastmix.TokenSet(Path(work, "data"), n, args.block_size) for n in {*names, *target_names}}
    rng = torch.Generator().manual_seed(0)

    def batch(chosen, split, n):
        u = torch.rand(n + 1, generator=rng, dtype=torch.float64).numpy()
        return fastmix.gather(chosen, split, fastmix.draw(np.ones(len(chosen)), u), u[1:])

    def model_and_optimizer():
        net = fastmix.GPT(fastmix.GPTConfig(**ckpt["config"]))
        net.load_state_dict(ckpt["model"])
        optimizer = net.configure_optimizer(args.learning_rate, args.weight_decay, (0.9, 0.95), fused=False)
        optimizer.load_state_dict(copy.deepcopy(ckpt["optimizer"]))  # a step moves its tensors, which it does not copy
        return net, optimizer

    def loss(net, x, y):
        return fastmix.fused_cross_entropy(net(x).flatten(0, 1), net.lm_head.weight, y.flatten())[0]

    def gradient(net, x, y):
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss(net, x, y), list(net.parameters()))])

    net, _ = model_and_optimizer()
    x_val, y_val = batch([sets[n] for n in target_names], "val", 256)
    G_val = fastmix.target_gradient(net, net.lm_head.weight, x_val, y_val, y_val.numel())
    g_val = gradient(net, x_val, y_val)
    with torch.no_grad():
        before = loss(net, x_val, y_val).item()
    found = {"head": [], "all": [], "change": []}
    for name in names:
        head, full, change = [], [], []
        for _ in range(4):
            x, y = batch([sets[name]], "train", 64)
            with torch.no_grad():
                _, _, alignment = fastmix.batch_loss(net, net.lm_head.weight, x, y, torch.ones(64), y.numel(), G_val)
                head.append(alignment.mean())
            full.append(gradient(net, x, y) @ g_val)
            moved, optimizer = model_and_optimizer()
            loss(moved, x, y).backward()
            torch.nn.utils.clip_grad_norm_(moved.parameters(), args.grad_clip)
            optimizer.step()
            with torch.no_grad():
                change.append(loss(moved, x_val, y_val).item() - before)
        for key, values in (("head", head), ("all", full), ("change", change)):
            found[key].append(float(f"{np.mean([float(v) for v in values]):.4g}"))
    return found


def alignments(bench, args):
    jobs = [{"task": task, "what": "alignments", "seed": seed, "steps": args.steps, "size": "base"}
            for task in args.tasks for seed in args.seeds[: args.far]
            if not bench.get(task, "alignments at 1", seed)]
    with ProcessPoolExecutor(args.jobs, mp_context=multiprocessing.get_context("fork")) as pool:
        for future in as_completed([pool.submit(study_alignments, str(bench.work), job) for job in jobs]):
            with open(bench.path, "a") as f:
                for line in future.result():
                    bench.store(line, f)
                    print(line["task"], line["what"], "seed", line["seed"], flush=True)


def best_fixed(results, task, args, measured_on=None):
    """
    The best fixed mixture known, as (what, mixture), by its mean over all seeds but the one that it is to be measured
    on: there the best of many would owe a part of its lead to chance.
    """
    by_what = {}
    for r in results.values():
        if r["task"] == task and r["steps"] == args.steps and r["size"] == "base" and "mixture" in r:
            by_what.setdefault(r["what"], {})[r["seed"]] = r
    whole = {what: runs for what, runs in by_what.items() if set(args.seeds) <= runs.keys()
             and len({tuple(r["mixture"]) for r in runs.values()}) == 1}  # one mixture on all seeds
    seeds = [s for s in args.seeds if s != measured_on] or args.seeds
    best = min(whole, key=lambda what: np.mean([whole[what][s]["test_loss"] for s in seeds]))
    return best, whole[best][args.seeds[0]]["mixture"]


def use_elsewhere(bench, args, **where):
    """What was found by the small and short search, and by a search there, at another size or length of training."""
    for task in args.tasks:
        names = TASKS[task][0].split(",")
        for seed in args.seeds[: args.far]:
            found = bench.get(task, "search FastMix", seed)
            average = dict(zip(names, found["mixtures"]["last_half_average"]))
            for what, mixture in (("uniform", "uniform"), ("proportional", "proportional"),
                                  ("FastMix: last_half_average", average),
                                  ("FastMix: trajectory", found["trajectory"]),
                                  ("best fixed", dict(zip(names, best_fixed(bench.results, task, args)[1])))):
                bench.add(task, what, seed, mixture, **where)
            bench.add(task, "search FastMix", seed, **where)
    bench.run()
    for task in args.tasks:
        for seed in args.seeds[: args.far]:
            found = bench.get(task, "search FastMix", seed, **where)["mixtures"]["last_half_average"]
            bench.add(task, "searched there", seed, dict(zip(TASKS[task][0].split(","), found)), **where)
    bench.run()


SENSITIVITY = {
    "learning_rate_mixture": (0.005, 0.01, 0.02, 0.05, 0.2, 1.0), "outer_every": (1, 4, 20, 100),
    "target_batch_size": (1, 2, 8, 32), "seed": (),  # of the runs that are there anyway
    "start_mixture": ("uniform", "proportional", "noise=0.9,python=0.02,cpp=0.02,prose=0.02,math=0.02,legal=0.02")}


DEFAULTS = {"learning_rate_mixture": 0.02, "outer_every": 1, "target_batch_size": 8, "start_mixture": "uniform"}


def search_with(flag, value):
    """The name of a search with one setting changed; at the default it is the search that is there anyway."""
    return "FastMix" if value == DEFAULTS[flag] else f"{flag} {value}"


def sensitivity(bench, args):
    names = TASKS["numpy"][0].split(",")
    settings = [(flag, value, seed) for flag, values in SENSITIVITY.items() for value in values
                for seed in args.seeds[: args.far]]
    for flag, value, seed in settings:
        bench.add("numpy", f"search {search_with(flag, value)}", seed,
                  flags=[] if value == DEFAULTS[flag] else ["--" + flag, value])
    bench.run()
    for flag, value, seed in settings:
        what = search_with(flag, value)
        found = bench.get("numpy", f"search {what}", seed)["mixtures"]["last_half_average"]
        bench.add("numpy", f"{what}: last_half_average", seed, dict(zip(names, found)))
    bench.run()


# ---------------------------------------------------------------------------------------------------------------------
# tables and figures

def flops(size, steps, search=None, block_size=64, batch_size=16, target_batch_size=8, V=257):
    """
    Of one run: 2 a weight and token forward and 4 backward (Kaplan et al., arXiv 2001.08361), attention 2 T C a token,
    layer and pass. A search (a key of SEARCHES) adds the target's forward pass, its head gradient and the alignments'
    matmul; over all parameters, the target's backward pass too and the batch's forward pass.
    """
    L, C = SIZES[size]["n_layer"], SIZES[size]["n_embd"]
    forward = 2 * (12 * L * C**2 + V * C) + 2 * L * block_size * C
    tokens, cost = batch_size * block_size, 3 * forward
    flags = SEARCHES.get(search, [])
    target_tokens = target_batch_size * block_size
    every = int(flags[flags.index("--outer_every") + 1]) if "--outer_every" in flags else 1
    if search is None:
        extra = 0.0
    elif search == "DoReMi":
        extra = tokens * forward  # the reference model reads along
    elif "--alignment" in flags:  # the target forward and backward, the batch forward
        extra = (3 * target_tokens + tokens) * forward / every
    else:
        extra = (target_tokens * (forward + 2 * V * C) + tokens * 2 * V * C) / every
    return steps * (tokens * cost + extra)


def cost_of(what, args):
    """In runs of the proxy at a fixed mixture; the run at the mixture that comes out is everybody's and not counted."""
    run, method = flops("base", args.steps), what.split(":")[0]
    if what.startswith("RegMix"):
        return int(what.split()[1])
    if method in SEARCHES:
        return flops("base", args.steps, method) / run + (method == "DoReMi")
    return 0.0


def losses(results, task, what, seeds, steps, size="base"):
    """(S,) test losses, or None where one is missing."""
    rows = [results.get((task, what, seed, steps, size)) for seed in seeds]
    return np.array([r["test_loss"] for r in rows]) if all(rows) else None


ROWS = {"uniform": "uniform", "proportional": "proportional to tokens", "best single source": "best single source",
        "FastMix: last_half_average": "**FastMix, average of the last half**", "FastMix: last": "FastMix, last mixture",
        "FastMix: run_average": "FastMix, average of the run",
        "FastMix: trajectory": "**FastMix, replayed trajectory**",
        "all: last_half_average": "`--alignment all`, average of the last half",
        "all: trajectory": "`--alignment all`, replayed trajectory",
        "all every 4: last_half_average": "`--alignment all`, every 4, average of the last half",
        "all every 4: trajectory": "`--alignment all`, every 4, replayed trajectory",
        "eps 0: last_half_average": "`--uniform_share 0`", "eps 0: trajectory": "`--uniform_share 0`, replayed",
        "eps 1: last_half_average": "`--uniform_share 1`", "eps 1: trajectory": "`--uniform_share 1`, replayed",
        "every 20: last_half_average": "`--outer_every 20`", "every 20: trajectory": "`--outer_every 20`, replayed",
        "Adam: last_half_average": "Adam on z, average of the last half",
        "Adam: trajectory": "Adam on z, replayed trajectory",
        "DoGE: run_average": "DoGE's rule", "DoReMi: run_average": "DoReMi's rule",
        **{f"RegMix {n}": f"RegMix-style, {n} runs" for n in REGMIX}}


def measured_seeds(args):
    """The first seed chose which mixtures run on all seeds, so the others measure; with one seed, it does both."""
    return args.seeds[1:] or args.seeds


def regret(results, task, what, args):
    """
    (S,) loss above the best fixed mixture known, in % of it, on each seed that ran; None if none did. On each seed it is
    the mixture that is best on the other seeds.
    """
    seeds = [s for s in measured_seeds(args) if (task, what, s, args.steps, "base") in results]
    if what == "best single source":  # on the first seed only
        single = [r for r in results.values() if r["task"] == task and r["what"].startswith("only ")
                  and r["steps"] == args.steps and r["size"] == "base" and r["seed"] == args.seeds[0]]
        if single:
            what, seeds = min(single, key=lambda r: r["test_loss"])["what"], args.seeds[:1]
    best = np.concatenate([losses(results, task, best_fixed(results, task, args, s)[0], [s], args.steps)
                           for s in seeds]) if seeds else None
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
    tasks = [t for t in args.tasks if losses(results, t, "uniform", args.seeds, args.steps) is not None]
    chosen = " (chosen on the other seeds)" if len(args.seeds) > 1 else ""
    print(f"{args.steps} steps, seeds {', '.join(map(str, measured_seeds(args)))}; regret: % of the loss above the best "
          f"fixed mixture known{chosen}, mean over the seeds (lowest to highest)\n")
    print("| | cost | " + " | ".join(TITLES[t] for t in tasks) + " |\n| --- | --- |" + " --- |" * len(tasks))
    for what, title in ROWS.items():
        cells = [cell(regret(results, t, what, args), len(measured_seeds(args))) for t in tasks]
        if any(cells):
            print(f"| {title} | {cost_of(what, args):.2f} | " + " | ".join(cells) + " |")
    for task in tasks:
        best, mixture = best_fixed(results, task, args)
        loss = losses(results, task, best, args.seeds, args.steps)
        uniform = losses(results, task, "uniform", args.seeds, args.steps)
        names = TASKS[task][0].split(",")
        print(f"\n{task}: best fixed mixture known {loss.mean():.4f} nats a token ({best}: "
              + ", ".join(f"{n} {w:.2f}" for n, w in zip(names, mixture))
              + f"); uniform {uniform.mean():.4f}, its seeds differ by {100 * np.ptp(uniform) / uniform.mean():.2f}%")
        for seed in args.seeds:
            found = results.get((task, "search FastMix", seed, args.steps, "base"))
            if found:
                print(f"    seed {seed} found " + ", ".join(
                    f"{n} {w:.2f}" for n, w in zip(names, found["mixtures"]["last_half_average"])))
    seconds = {kind: np.median([r["seconds"] for r in results.values() if r["size"] == "base"
                                and r["steps"] == args.steps and r["what"] == kind] or [np.nan])
               for kind in ("uniform", "search FastMix")}
    print(f"\na run {flops('base', args.steps):.3g} FLOPs, {seconds['uniform']:.0f} s; a search "
          f"{flops('base', args.steps, 'FastMix'):.3g} FLOPs, {seconds['search FastMix']:.0f} s")
    show_alignments(results, tasks, args)
    for title, steps, size in ((f"{STRETCH} times as many steps", STRETCH * args.steps, "base"),
                               ("a model 6.5 times as large", args.steps, "large")):
        show_elsewhere(results, tasks, title, steps, size)
    folder = Path(args.results).parent
    if tasks:
        figure(results, tasks, args, folder / "mixtures.png")
    figure_sensitivity(results, args, folder / "sensitivity.png")


def ranks(values):
    return np.argsort(np.argsort(values))


def show_alignments(results, tasks, args):
    """Spearman's rank correlations over a task's sources, averaged over the searches studied."""
    pairs = {"head with all parameters": lambda r: (r["head"], r["all"]),
             "head with true change": lambda r: (r["head"], [-c for c in r["change"]]),
             "all parameters with true change": lambda r: (r["all"], [-c for c in r["change"]])}
    found = {}
    for r in results.values():
        if r["what"].startswith("alignments at ") and r["steps"] == args.steps:
            for pair, values in pairs.items():
                of_pair = found.setdefault((pair, r["what"].split()[-1]), {}).setdefault(r["task"], [])
                of_pair.append(np.corrcoef(*map(ranks, values(r)))[0, 1])
    if found:
        searches = max(len(v) for of_pair in found.values() for v in of_pair.values())
        print(f"\nrank correlation of alignments with each other and with the target's true change of loss after one AdamW "
              f"step on each source alone, mean of {searches} search{'es' * (searches > 1)} a task\n")
        print("| | at | " + " | ".join(TITLES[t] for t in tasks) + " | mean |\n| --- | --- | --- |" + " --- |" * len(tasks))
        for (pair, at), of_pair in sorted(found.items()):
            means = [np.mean(of_pair[t]) if t in of_pair else np.nan for t in tasks]
            print(f"| {pair} | {float(at):.0%} of the run | "
                  + " | ".join("" if np.isnan(m) else f"{m:.2f}" for m in (*means, np.nanmean(means))) + " |")


def show_elsewhere(results, tasks, title, steps, size):
    seeds = sorted({r["seed"] for r in results.values() if r["steps"] == steps and r["size"] == size
                    and r["what"] == "FastMix: trajectory"})
    if not seeds:
        return
    print(f"\n{title}: % of uniform's loss, seeds {', '.join(map(str, seeds))}\n")
    print("| | " + " | ".join(TITLES[t] for t in tasks) + " |\n| --- |" + " --- |" * len(tasks))
    titles = {"proportional": "proportional to tokens", "best fixed": "best fixed mixture of the small runs",
              "FastMix: last_half_average": "FastMix, found by the small search",
              "FastMix: trajectory": "FastMix, its trajectory replayed", "searched there": "FastMix, searched there"}
    for what, title in titles.items():
        cells = []
        for task in tasks:
            ran = [s for s in seeds if losses(results, task, "uniform", [s], steps, size) is not None
                   and losses(results, task, what, [s], steps, size) is not None]
            gain = 100 * (losses(results, task, what, ran, steps, size)
                          / losses(results, task, "uniform", ran, steps, size) - 1) if ran else None
            cells.append(cell(gain, len(seeds)))
        if any(cells):
            print(f"| {title} | " + " | ".join(cells) + " |")


def figure(results, tasks, args, path):
    """Regret against the cost of the search, one panel a task."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    fig, axes = plt.subplots(1, len(tasks), figsize=(3.4 * len(tasks), 3.8), dpi=110, squeeze=False,
                             layout="constrained", sharey=False)
    points = (("FastMix: last_half_average", "#0072B2", "o", "FastMix, last half"),
              ("FastMix: trajectory", "#56B4E9", "D", "FastMix, replayed"),
              ("all: last_half_average", "#D55E00", "P", "--alignment all, last half"),
              ("all every 4: last_half_average", "#332288", "X", "--alignment all, every 4, last half"),
              ("DoGE: run_average", "#E69F00", "^", "DoGE's rule"),
              ("DoReMi: run_average", "#CC79A7", "v", "DoReMi's rule"))
    for ax, task in zip(axes[0], tasks):
        def points_of(whats):
            found = [(cost_of(w, args), regret(results, task, w, args)) for w in whats]
            return [(c, r.mean(), r.mean() - r.min(), r.max() - r.mean()) for c, r in found if r is not None]
        for what, style in (("uniform", "--"), ("proportional", ":")):
            r = regret(results, task, what, args)
            if r is not None:
                ax.axhline(r.mean(), color="#666666", linestyle=style, linewidth=1, label=what)
        ax.axhline(0, color="#222222", linewidth=1, label="best fixed mixture known")
        for whats, colour, marker, label in [([f"RegMix {n}" for n in REGMIX], "#009E73", "s", "RegMix-style"),
                                             *(([w], c, m, text) for w, c, m, text in points)]:
            found = np.array(points_of(whats))
            if len(found):
                found[:, 0] *= 1 + 0.08 * max(0, "oX^Dv".find(marker))  # side by side where they cost the same
                ax.errorbar(found[:, 0], found[:, 1], yerr=found[:, 2:].T, color=colour, marker=marker, markersize=6,
                            linewidth=1, capsize=2, label=label)
        ax.set(title=TITLES[task], xlabel="cost of the search (proxy runs)", xscale="log", xlim=(0.8, 90))
        ax.set_xticks([1, 2, 4, 8, 16, 32, 64], ["1", "2", "4", "8", "16", "32", "64"], minor=False)
        ax.minorticks_off()
        ax.spines[["top", "right"]].set_visible(False)
    axes[0][0].set_ylabel("loss above the best fixed mixture, %")
    fig.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    fig.savefig(path)
    print(f"\nwrote {path}")


def figure_sensitivity(results, args, path):
    """Toward numpy, in % of uniform's loss on the same seed: what is found with one setting changed, and the search."""
    seeds = [s for s in args.seeds if ("numpy", "outer_every 4: last_half_average", s, args.steps, "base") in results]
    if not seeds:
        return
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    def gain(what, seeds):
        uniform, found = (losses(results, "numpy", w, seeds, args.steps) for w in ("uniform", what))
        return [] if found is None else 100 * (found / uniform - 1)

    fig, axes = plt.subplots(1, len(SENSITIVITY), figsize=(14, 3.4), dpi=110, sharey=True, layout="constrained")
    best = np.mean([gain(best_fixed(results, "numpy", args, s)[0], [s]) for s in args.seeds])
    for ax, (flag, values) in zip(axes, SENSITIVITY.items()):
        points = ([("FastMix", [s]) for s in args.seeds] if flag == "seed" else
                  [(search_with(flag, v), seeds) for v in values])
        labels = args.seeds if flag == "seed" else ["mostly noise" if "=" in str(v) else v for v in values]
        for what, marker, colour, label in (("search {}", "x", "#D55E00", "the searching proxy itself"),
                                            ("{}: last_half_average", "o", "#0072B2", "trained at the mixture found")):
            found = [(i, y) for i, (name, at) in enumerate(points) for y in gain(what.format(name), at)]
            ax.plot(*zip(*found), marker, color=colour, markersize=6, label=label, linestyle="none")
        ax.axhline(0, color="#666666", linestyle="--", linewidth=1, label="uniform")
        ax.axhline(best, color="#222222", linewidth=1, label="best fixed mixture known")
        ax.set_xticks(range(len(points)), labels, fontsize=8, rotation=20 if flag == "start_mixture" else 0)
        ax.set(title=f"--{flag}", xlim=(-0.6, len(points) - 0.4))
        ax.title.set_fontsize(9)
        ax.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("test loss, % of uniform's")
    fig.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    fig.savefig(path)
    print(f"wrote {path}")


# ---------------------------------------------------------------------------------------------------------------------

STAGES = {"compare": compare, "alignments": alignments,
          "stretch": lambda bench, args: use_elsewhere(bench, args, steps=STRETCH * args.steps),
          "transfer": lambda bench, args: use_elsewhere(bench, args, size="large"),
          "sensitivity": sensitivity}


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--work", default="out-bench", help="data, results and figures")
    p.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
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
    args.results = args.results or Path(args.work, "results.jsonl")
    if not args.table:
        prepare(Path(args.work, "data"))
        bench = Bench(args)
        for stage in args.stages:
            STAGES[stage](bench, args)
    show(args)


if __name__ == "__main__":
    main()

"""
Does the search find the best mixture, and at what price? FastMix against fixed mixtures, a RegMix-style search, and the
update rules of DoGE and DoReMi, by the target's test loss after training from scratch for the same number of steps.

    python tests/bench_mixtures.py --quick           one task, few runs, short: 5 minutes on 2 cores
    python tests/bench_mixtures.py                   four tasks, hours on 2 cores; stop and go on as you like
    python tests/bench_mixtures.py --table           the table and the figure from what is stored, nothing is run

Each run is one line in WORK/results.jsonl (--work, default out-bench) and is never run twice. Every run is fastmix.py
itself, in one thread, --jobs at a time.
"""
import argparse
import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
TASKS = {  # name: (sources, target)
    "numpy": ("python,cpp,prose,math,legal,noise", "numpy"),
    "own": ("python,cpp,prose,math,legal", "python,cpp,prose,math,legal"),
    "scarce": ("python,cpp,math,legal,prose_2", "prose_2"),  # prose with 2% of its train split
    "noisy": ("python,cpp,prose,python_b,noise,bytes", "math"),  # half of them of no use
}
SEARCHES = {"eps 0.25": [], "eps 0": ["--uniform_share", "0"], "eps 1": ["--uniform_share", "1"],
            "every 20": ["--outer_every", "20"], "DoGE": ["--doge"], "DoReMi": ["--doremi"]}
MIXTURES = ("last", "last_half_average", "run_average")


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

def doge(fastmix):
    """
    DoGE (Fan et al., arXiv 2310.15393): mirror descent on the simplex, alpha_k in proportion to alpha_k exp(eta A_k),
    A_k the alignment of the source's gradient with the target's; here scaled by the running mean of max |A|.
    """
    scale = []

    def gradient(alpha, alignment, present, eta=1.0, density=1.0):
        scale.append(alignment.abs().max().item())
        return -alignment * present / np.mean(scale[-100:])

    fastmix.mixture_gradient = gradient
    fastmix.mixture_step = plain_step


def doremi(fastmix, reference):
    """
    DoReMi (Xie et al., arXiv 2305.10429): exponentiated gradient on the excess loss over a reference model's, clipped at
    0; it knows no target. Excess losses travel where the loop carries alignments.
    """
    import torch
    ckpt = torch.load(reference, weights_only=True)
    net = fastmix.GPT(fastmix.GPTConfig(**ckpt["config"]))
    net.load_state_dict(ckpt["model"])
    batch_loss = fastmix.batch_loss

    def with_excess(model, head, x, y, r, n_tokens, G_val=None):
        loss, token_loss, _ = batch_loss(model, head, x, y, r, n_tokens)
        with torch.no_grad():
            known = fastmix.fused_cross_entropy(net(x).flatten(0, 1), net.lm_head.weight, y.flatten())[1].view_as(y)
        return loss, token_loss, (token_loss - known).clamp(min=0)

    fastmix.batch_loss = with_excess
    fastmix.mixture_gradient = lambda alpha, excess, present, eta=1.0, density=1.0: -excess * present
    fastmix.mixture_step = plain_step


def plain_step(z, moments, gradient, present, learning_rate):
    z -= learning_rate * gradient


def one_run(argv):
    """fastmix.py, or with --doge or --doremi PATH first, fastmix.py with another rule."""
    sys.path.insert(0, str(ROOT))
    import fastmix
    if argv[0] == "--doge":
        argv = argv[1:]
        doge(fastmix)
    elif argv[0] == "--doremi":
        doremi(fastmix, argv[1])
        argv = argv[2:]
    sys.argv = ["fastmix.py", *argv]
    fastmix.main()


# ---------------------------------------------------------------------------------------------------------------------
# runs

class Bench:
    """Runs by key, each once: {"task", "what", "seed", ...} -> its line in results.jsonl."""

    def __init__(self, args):
        self.args, self.work = args, Path(args.work)
        self.path = self.work / "results.jsonl"
        self.work.mkdir(parents=True, exist_ok=True)
        lines = self.path.read_text().splitlines(keepends=True) if self.path.exists() else []
        lines = [line for line in lines if line.endswith("\n")]  # the last may be cut short
        self.results = {self.key(r): r for r in map(json.loads, lines)}
        self.pool = ThreadPoolExecutor(args.jobs)

    @staticmethod
    def key(r):
        return r["task"], r["what"], r["seed"], r["steps"]

    def submit(self, task, what, seed, *flags):
        """A future of the run's result."""
        return self.pool.submit(self.run, task, what, seed, flags)

    def run(self, task, what, seed, flags):
        key = (task, what, seed, self.args.steps)
        if key in self.results:
            return self.results[key]
        sources, target = TASKS[task]
        out = self.work / "-".join(map(str, key)).replace(" ", "_").replace("/", "_")
        steps = ["--max_steps", self.args.steps] if "--max_steps" not in flags else []
        argv = [*flags, "--sources", sources, "--target", target, "--seed", seed, *steps, "--data_dir",
                self.work / "data", "--out_dir", out, "--overwrite", "--log_every", max(1, self.args.steps // 50),
                "--eval_every", self.args.steps, "--test_tokens", 2**19, "--device", "cpu"]
        process = subprocess.run([sys.executable, __file__, "--one_run", *map(str, argv)], text=True,
                                 capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        if process.returncode:
            sys.exit(f"{task}, {what}, seed {seed}: {process.stderr}")
        found = json.loads((out / "mixture.json").read_text())
        result = {"task": task, "what": what, "seed": seed, "steps": self.args.steps, "test_loss": found["test_loss"],
                  "mixtures": found["mixtures"], "seconds": found["seconds"], "searched": found["searched"]}
        with open(self.path, "a") as f:
            f.write(json.dumps(result) + "\n")
        self.results[key] = result
        print(f"{task:7s} {what:44s} seed {seed}: {result['test_loss']:.4f}  ({result['seconds']:.0f} s)", flush=True)
        if not found["searched"] and "reference" not in what:
            shutil.rmtree(out)
        return result

    def fixed(self, task, what, seed, mixture):
        text = mixture if isinstance(mixture, str) else ",".join(f"{n}={w:.6f}" for n, w in mixture.items())
        return self.submit(task, what, seed, "--mixture", text)


def regmix(results, names, n, rng):
    """
    RegMix (Liu et al., arXiv 2407.01492) with a quadratic regression in place of trees: fits the test loss of n runs at
    random mixtures, and averages the 100 best predicted of 100,000 further random mixtures.
    """
    def features(m):  # (R, K) -> 1, m, m_i m_j
        pairs = [m[:, i] * m[:, j] for i in range(m.shape[1]) for j in range(i, m.shape[1])]
        return np.column_stack([np.ones(len(m)), m, *pairs])
    m = np.array([[r["mixtures"]["last"][k] for k in names] for r in results[:n]])
    y = np.array([r["test_loss"] for r in results[:n]])
    X = features(m)
    weights = np.linalg.solve(X.T @ X + 1e-3 * np.eye(X.shape[1]), X.T @ (y - y.mean()))
    candidates = rng.dirichlet(np.ones(len(names)), 100_000)
    best = candidates[np.argsort(features(candidates) @ weights)[:100]].mean(0)
    return dict(zip(names, best.tolist()))


def run_task(bench, task, args):
    names = TASKS[task][0].split(",")
    seeds, pending = range(1, args.seeds + 1), []
    for seed in seeds:
        pending += [bench.fixed(task, m, seed, m) for m in ("uniform", "proportional")]
    pending += [bench.fixed(task, f"only {n}", 1, {n: 1.0}) for n in names]
    searches = {}
    for what, flags in SEARCHES.items():
        if what in args.searches:
            for seed in seeds:
                if what == "DoReMi":
                    reference = bench.submit(task, "reference", seed, "--mixture", "uniform")
                    reference.result()
                    out = bench.work / f"{task}-reference-{seed}-{args.steps}" / "ckpt.pt"
                    flags = ["--doremi", out, "--learning_rate_mixture", 0.1]
                elif what == "DoGE":
                    flags = ["--doge", "--learning_rate_mixture", 0.02]
                searches[what, seed] = bench.submit(task, f"search {what}", seed, *flags)
    rng = np.random.default_rng(0)
    random = [bench.fixed(task, f"random {i}", 1, dict(zip(names, rng.dirichlet(np.ones(len(names))).tolist())))
              for i in range(args.random)]
    for (what, seed), search in searches.items():
        found = search.result()
        for m in MIXTURES if what.startswith(("eps", "every")) else ("run_average",):
            pending.append(bench.fixed(task, f"{what}: {m}", seed, found["mixtures"][m]))
        if what == "eps 0.25":
            out = bench.work / f"{task}-search_eps_0.25-{seed}-{args.steps}" / "log.jsonl"
            if out.exists() or (task, f"{what}: trajectory", seed, args.steps) in bench.results:
                pending.append(bench.fixed(task, f"{what}: trajectory", seed, str(out)))
    done = [r.result() for r in random]
    for n in (8, 16, 32, 64):
        if n <= args.random:
            best = regmix(done, names, n, np.random.default_rng(n))
            pending += [bench.fixed(task, f"RegMix {n}", seed, best) for seed in seeds]
    done += [r.result() for r in pending]
    # the best fixed mixtures seen so far, on all seeds: the ground truth that regret is measured against
    fixed = sorted((r for r in bench.results.values() if r["task"] == task and r["steps"] == args.steps
                    and not r["searched"] and "trajectory" not in r["what"] and r["seed"] == 1),
                   key=lambda r: r["test_loss"])
    for r in fixed[:3]:
        for future in [bench.fixed(task, r["what"], seed, r["mixtures"]["last"]) for seed in seeds]:
            future.result()


# ---------------------------------------------------------------------------------------------------------------------
# table and figure

def summary(results, steps):
    """{task: {method: (mean loss, spread over seeds, number of seeds, cost in proxy runs)}}."""
    found = {}
    for r in results:
        if r["steps"] == steps and r["what"] != "reference":
            found.setdefault(r["task"], {}).setdefault(r["what"], []).append(r)
    table = {}
    for task, runs in found.items():
        unit = np.median([r["seconds"] for r in runs.get("uniform", [])] or [np.nan])
        table[task] = {}
        for what, rows in runs.items():
            loss = [r["test_loss"] for r in rows]
            search = runs.get(f"search {what.split(':')[0]}")
            cost = (np.median([r["seconds"] for r in search]) / unit if search and ":" in what
                    else int(what.split()[1]) if what.startswith("RegMix") else 0)
            table[task][what] = (np.mean(loss), np.ptp(loss), len(loss), cost)
    return table


def show(args):
    results = [json.loads(line) for line in open(Path(args.work, "results.jsonl"))]
    table = summary(results, args.steps)
    for task, rows in table.items():
        seeds = max(n for _, _, n, _ in rows.values())
        best = min(loss for what, (loss, _, n, _) in rows.items()
                   if n == seeds and "trajectory" not in what and not what.startswith("search"))
        print(f"\n{task}: {args.steps} steps, best known fixed mixture {best:.4f} nats a token")
        print(f"{'':36s} {'loss':>8s} {'regret':>8s} {'spread':>8s} {'seeds':>6s} {'cost':>6s}")
        for what, (loss, spread, n, cost) in sorted(rows.items(), key=lambda i: i[1][0]):
            if n == seeds:
                print(f"{what:36s} {loss:8.4f} {100 * (loss / best - 1):7.2f}% {100 * spread / loss:7.2f}% {n:6d} {cost:6.2f}")
    figure(table, Path(args.work, "mixtures.png"))


def figure(table, path):
    """Regret against the cost of the search, one panel a task."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    fig, axes = plt.subplots(1, len(table), figsize=(4 * len(table), 4), dpi=110, squeeze=False, layout="constrained")
    for ax, (task, rows) in zip(axes[0], table.items()):
        seeds = max(n for _, _, n, _ in rows.values())
        rows = {w: r for w, r in rows.items() if r[2] == seeds and not w.startswith(("search", "random", "only"))}
        best = min(r[0] for w, r in rows.items() if "trajectory" not in w)
        regmix_points = sorted((r[3], 100 * (r[0] / best - 1)) for w, r in rows.items() if w.startswith("RegMix"))
        if regmix_points:
            ax.plot(*zip(*regmix_points), "o-", color="#999999", label="RegMix-style")
        for i, (what, colour) in enumerate((("eps 0.25: last_half_average", "#0072B2"), ("eps 0.25: trajectory", "#56B4E9"),
                                            ("DoGE: run_average", "#E69F00"), ("DoReMi: run_average", "#CC79A7"))):
            if what in rows:
                ax.plot(rows[what][3], 100 * (rows[what][0] / best - 1), "D", color=colour, label=what, markersize=8)
        for what, style in (("uniform", "--"), ("proportional", ":")):
            if what in rows:
                ax.axhline(100 * (rows[what][0] / best - 1), color="#222222", linestyle=style, linewidth=1, label=what)
        ax.set(title=task, xlabel="cost of the search, proxy runs", ylabel="regret, % of the loss", xscale="symlog")
    axes[0][0].legend(fontsize=8)
    fig.savefig(path)
    print(f"\nwrote {path}")


def main():
    if sys.argv[1:2] == ["--one_run"]:
        return one_run(sys.argv[2:])
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--work", default="out-bench")
    p.add_argument("--tasks", type=lambda t: t.split(","), default=list(TASKS))
    p.add_argument("--seeds", type=int, default=3)
    p.add_argument("--steps", type=int, default=1200)
    p.add_argument("--random", type=int, default=64, help="runs at random mixtures, for the RegMix-style search")
    p.add_argument("--searches", type=lambda t: t.split(","), default=list(SEARCHES))
    p.add_argument("--jobs", type=int, default=2)
    p.add_argument("--quick", action="store_true")
    p.add_argument("--table", action="store_true")
    args = p.parse_args()
    if args.quick:
        args.tasks, args.seeds, args.steps, args.random, args.searches = ["numpy"], 1, 200, 8, ["eps 0.25", "DoGE"]
    if not args.table:
        prepare(Path(args.work, "data"))
        bench = Bench(args)
        for task in args.tasks:
            run_task(bench, task, args)
    show(args)


if __name__ == "__main__":
    main()

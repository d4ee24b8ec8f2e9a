"""
Speed and memory of whole training runs: fastmix.py itself against a plain loop, and an outer step
against K + 1 passes. Prints the tables of RESULTS.md. Needs Linux, for the memory.

    python tests/bench_speed.py --vocab_sizes 257 --n_layer 2 --n_head 4 --n_embd 128 \\
        --block_size 64 --rounds 8 --steps 20                  the default model, on 2 CPU cores
    python tests/bench_speed.py --vocab_sizes 50304 --rounds 3 --steps 4           15 minutes
    python tests/bench_speed.py --device cuda --dtype bfloat16 --compile --n_layer 12 --n_head 12 \\
        --n_embd 768 --block_size 1024 --batch_size 32 --vocab_sizes 50304

Time: all variants take turns in one process, round after round. A variant's turn warms up and then
times its steps one by one (CUDA: together), or two by two where every second is an outer step.
Tokens/s is from the median over the rounds. A ratio compares two variants within each round, and
is the median of these pairs, not the ratio of two medians. fastmix.py runs as it is, through its
own main(), on synthetic token files, without checkpoints and with next to no evaluation. Memory:
each variant in a process of its own, its peak above what it held before the model was built (CUDA:
the allocator's peak).
"""
import argparse
import contextlib
import functools
import io
import json
import math
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import fastmix  # noqa: E402
from bench_loss import resident  # noqa: E402
from model import GPT, GPTConfig  # noqa: E402

KS = (4, 16, 64)
PLAIN = "plain loop"
MODEL_FLAGS = ("n_layer", "n_head", "n_embd", "block_size", "batch_size", "target_batch_size")


def write_sets(folder, K, vocab_size, n_tokens=200_000):
    """K sources of random tokens: what is in them does not matter to the clock."""
    for k in range(K):
        path = Path(folder, f"s{k}")
        path.mkdir(parents=True)
        ids = np.random.default_rng(k).integers(0, vocab_size, n_tokens).astype(np.uint16)
        counts = {}
        for split in ("train", "val", "test"):
            ids.tofile(path / f"{split}.bin")
            counts[split] = {"tokens": n_tokens, "bytes": n_tokens, "documents": 1, "sha256": ""}
        meta = {"name": f"s{k}", "schema": "text", "tokenizer": "random", "dtype": "uint16",
                "vocab_size": vocab_size, "eot_token": vocab_size - 1, "splits": counts}
        (path / "meta.json").write_text(json.dumps(meta))


# ---- the variants --------------------------------------------------------------------------------

def fixed_name(K):
    return f"fixed mixture, K = {K}"


def search_name(K):
    return f"search, K = {K}"


def sparse_name(K):
    """A search whose every second step is an outer step."""
    return f"search, K = {K}, `--outer_every 2`"


class Bench:
    """What is timed: each variant is a function of a number of steps -> seconds per step."""

    def __init__(self, args, folder, vocab_size):
        self.args = args
        self.folder = folder
        self.config = GPTConfig(vocab_size, args.block_size, args.n_layer, args.n_head, args.n_embd)
        self.train = np.memmap(Path(folder, "s0", "train.bin"), dtype=np.uint16, mode="r")

    def variants(self):
        """{row of the table: function}."""
        found = {PLAIN: self.plain}
        for K in KS:
            fixed = ("--mixture", "uniform")
            found[fixed_name(K)] = functools.partial(self.fastmix, K, flags=fixed)
            found[search_name(K)] = functools.partial(self.fastmix, K)
            found[sparse_name(K)] = functools.partial(self.fastmix, K, every=2)
        return found

    def batch(self, n):
        """n random windows, as nanoGPT draws them."""
        T = self.args.block_size
        starts = torch.randint(len(self.train) - T - 1, (n,))
        windows = [self.train[start: start + T + 1] for start in starts]
        ids = torch.from_numpy(np.stack(windows).astype(np.int64))
        if self.args.device == "cuda":
            ids = ids.pin_memory().to("cuda", non_blocking=True)
        return ids[:, :-1], ids[:, 1:]

    def model(self):
        """(the GPT, what is called to run it, its optimizer)."""
        torch.manual_seed(0)
        net = GPT(self.config).to(self.args.device)
        optimizer = net.configure_optimizer(1e-3, 0.1, fused=True)
        model = torch.compile(net) if self.args.compile else net
        return net, model, optimizer

    def loss(self, model, net, x, y):
        bfloat16 = self.args.dtype == "bfloat16"
        with torch.autocast(self.args.device, torch.bfloat16, enabled=bfloat16):
            logits = model(x) @ net.lm_head.weight.T  # (B, T, V), all held
            return F.cross_entropy(logits.flatten(0, 1), y.flatten())

    def now(self):
        if self.args.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def stamp(self, step, last):
        """When a step begins. A GPU is waited for only where timing begins and ends."""
        if step in (self.args.warmup, last):
            return self.now()
        return time.perf_counter()

    def seconds_per_step(self, stamps, every=1):
        """From the stamps after the warm-up, in groups that hold one outer step each."""
        taken = np.diff(stamps[self.args.warmup:]).reshape(-1, every).mean(1)
        if self.args.device == "cuda":  # only the sum is right, because the last step waits
            return float(np.mean(taken))
        return float(np.median(taken))

    def plain(self, steps):
        """A nanoGPT-style loop: one batch, F.cross_entropy on all logits."""
        net, model, optimizer = self.model()
        last = self.args.warmup + steps
        stamps = []
        for step in range(last):
            stamps.append(self.stamp(step, last))
            x, y = self.batch(self.args.batch_size)
            self.loss(model, net, x, y).backward()
            torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        stamps.append(self.stamp(last, last))
        return self.seconds_per_step(stamps)

    def fastmix(self, K, steps, flags=(), every=1):
        """fastmix.py; the clock is read when it asks for the learning rate of a step."""
        args = self.args
        last = args.warmup + steps
        stamps = []
        learning_rate_at = fastmix.learning_rate_at

        def timed_learning_rate_at(step, settings):
            if step == len(stamps):  # it may ask more than once per step
                stamps.append(self.stamp(step, last))
            return learning_rate_at(step, settings)

        def nothing(*_):
            pass

        def empty_checkpoint(path, *_):
            path.touch()  # without one the run's log would be taken for that of a failed run

        argv = ["--data_dir", str(self.folder), "--sources", ",".join(f"s{k}" for k in range(K)),
                "--target", "s0", "--max_steps", str(last + 1), "--log_every", str(10**9),
                "--eval_tokens", "1", "--outer_every", str(every), "--device", args.device,
                "--dtype", args.dtype, *flags]
        for flag in MODEL_FLAGS:
            argv += [f"--{flag}", str(getattr(args, flag))]
        if args.compile:
            argv.append("--compile")
        changes = {"learning_rate_at": timed_learning_rate_at, "TEST_TOKENS": 1,
                   "save_checkpoint": empty_checkpoint, "draw_run": nothing}
        with (tempfile.TemporaryDirectory() as out, mock.patch.multiple(fastmix, **changes),
              contextlib.redirect_stdout(io.StringIO())):
            fastmix.main([*argv, "--out_dir", out])
        return self.seconds_per_step(stamps, every)

    def passes(self, K, steps):
        """
        Seconds of an outer step made of K + 1 forward and backward passes through the whole model,
        as in the authors' code, with alignments at the head.
        """
        net, model, _ = self.model()
        head = net.lm_head.weight
        seconds = []
        for _ in range(1 + steps):
            start = self.now()
            gradients = []
            for _ in range(K + 1):
                x, y = self.batch(self.args.target_batch_size)
                self.loss(model, net, x, y).backward()
                gradients.append(head.grad)
                net.zero_grad(set_to_none=True)
            target = gradients.pop()
            torch.stack([(target * gradient).sum() for gradient in gradients]).tolist()
            seconds.append(self.now() - start)
        return float(np.median(seconds[1:]))  # the first warms up


def matmul_peak(device, dtype, n):
    """FLOP/s of an n x n matmul, the best of forty."""
    a = torch.randn(n, n, device=device, dtype=dtype)
    b = torch.randn(n, n, device=device, dtype=dtype)
    best = math.inf
    for _ in range(40):
        start = time.perf_counter()
        a @ b
        if device == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return 2 * n**3 / best


# ---- memory --------------------------------------------------------------------------------------

def peak_mb(argv, V, name):
    """Peak memory of one variant, in a process of its own that measure_memory() runs."""
    command = [sys.executable, __file__, *argv, "--vocab_sizes", str(V), "--memory_of", name]
    done = subprocess.run(command, check=True, text=True, capture_output=True)
    return float(done.stdout.splitlines()[-1])


def measure_memory(args):
    V = args.vocab_sizes[0]
    args.warmup = 1
    with tempfile.TemporaryDirectory() as folder:
        write_sets(folder, max(KS), V)
        bench = Bench(args, folder, V)
        before = resident("VmRSS")
        bench.variants()[args.memory_of](2)
        if args.device == "cuda":
            print(torch.cuda.max_memory_allocated() / 2**20)
        else:
            print(resident("VmHWM") - before)


# ---- tables --------------------------------------------------------------------------------------

def speed_tables(args, V, argv):
    """All variants with one vocabulary."""
    with tempfile.TemporaryDirectory() as folder:
        write_sets(folder, max(KS), V)
        bench = Bench(args, folder, V)
        variants = bench.variants()
        steps = args.steps or max(3, math.ceil(4 / bench.plain(2)))
        steps += steps % 2
        rounds = []  # of {name: seconds per step}
        for _ in range(args.rounds):
            rounds.append({name: run(steps) for name, run in variants.items()})
        passes = {K: bench.passes(K, 3 if K < 64 else 1) for K in KS}

    def seconds(name):
        return np.array([row[name] for row in rounds])

    tokens = args.batch_size * args.block_size
    n_params = sum(p.numel() for p in GPT(bench.config).parameters())
    print(f"\n{n_params:,} parameters, {steps} steps per turn\n")
    print(f"| V = {V} | tokens/s | × plain | × fixed | peak MB |")
    print("| --- | --- | --- | --- | --- |")
    for name in variants:
        to_plain = np.median(seconds(PLAIN) / seconds(name))
        to_fixed = ""
        for K in KS:
            if name in (fixed_name(K), search_name(K), sparse_name(K)):
                to_fixed = f"{np.median(seconds(fixed_name(K)) / seconds(name)):.2f}"
        print(f"| {name} | {tokens / np.median(seconds(name)):,.0f} | {to_plain:.2f} | {to_fixed} "
              f"| {peak_mb(argv, V, name):.0f} |", flush=True)
    print("\n| seconds of an outer step | here | K + 1 passes | ratio |")
    print("| --- | --- | --- | --- |")
    for K in KS:
        here = np.median(seconds(search_name(K)) - seconds(fixed_name(K)))
        print(f"| K = {K} | {here:.4f} | {passes[K]:.2f} | {here / passes[K]:.2f} |")


def default_model(args):
    """What an outer step costs with the default model, in pairs of longer turns."""
    sizes = {"n_layer": 2, "n_head": 4, "n_embd": 128, "block_size": 64, "batch_size": 16,
             "target_batch_size": 2, "warmup": 10}
    args = argparse.Namespace(**vars(args) | sizes)
    print("\nfastmix.py's default model, V = 257, in pairs of 60 steps")
    with tempfile.TemporaryDirectory() as folder:
        write_sets(folder, max(KS), 257)
        variants = Bench(args, folder, 257).variants()
        for K in (4, 64):
            searches = []
            fixed = []
            for _ in range(args.rounds):
                searches.append(1e3 * variants[search_name(K)](60))
                fixed.append(1e3 * variants[fixed_name(K)](60))
            cost = np.median(np.subtract(searches, fixed))
            ratio = np.median(np.divide(searches, fixed))
            print(f"K = {K}: an outer step takes {cost:.2f} ms, a search {ratio:.3f} times as long "
                  "as a fixed mixture", flush=True)


def vocab_sizes(text):
    return [int(V) for V in text.split(",")]


def main():
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--vocab_sizes", type=vocab_sizes, default=[257])
    p.add_argument("--rounds", type=int, default=7)
    p.add_argument("--steps", type=int, default=0, help="timed steps per turn, rounded up to an "
                   "even number; 0: as many as take about 4 seconds")
    p.add_argument("--warmup", type=int, default=2)
    p.add_argument("--device", default="cpu")
    p.add_argument("--dtype", default="float32")
    p.add_argument("--compile", action="store_true")
    for flag, default in zip(MODEL_FLAGS, (4, 4, 256, 128, 16, 2)):
        p.add_argument(f"--{flag}", type=int, default=default)
    p.add_argument("--memory_of", help=argparse.SUPPRESS)
    args = p.parse_args()
    if args.memory_of:
        measure_memory(args)
        return

    cuda = args.device == "cuda"
    machine = torch.cuda.get_device_name() if cuda else f"{platform.machine()} CPU"
    dtype = torch.bfloat16 if args.dtype == "bfloat16" else torch.float32
    peak = matmul_peak(args.device, dtype, 8192 if cuda else 2048)
    print(f"{machine}, {torch.get_num_threads()} threads, torch {torch.__version__}, {args.dtype}; "
          f"matmul peak {peak / 1e12:.3f} TFLOP/s")
    print(f"{args.n_layer} layers, {args.n_embd} channels, block {args.block_size}, batch "
          f"{args.batch_size}, target batch {args.target_batch_size}; {args.rounds} rounds")
    for V in args.vocab_sizes:
        speed_tables(args, V, sys.argv[1:])
    if 257 in args.vocab_sizes:
        default_model(args)


if __name__ == "__main__":
    main()

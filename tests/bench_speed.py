"""
Speed and memory of whole training runs: fastmix.py itself against a plain loop and against K + 1 passes an outer step.

    python tests/bench_speed.py --vocab_sizes 257 --rounds 12 --steps 4     K = 4, 16 and 64: 10 minutes on 2 CPU cores
    python tests/bench_speed.py --vocab_sizes 50304 --rounds 5 --steps 4    15 minutes
    python tests/bench_speed.py --device cuda --dtype bfloat16 --compile --n_layer 12 --n_head 12 --n_embd 768 \\
        --block_size 1024 --batch_size 32 --vocab_sizes 50304

Time: all variants take turns in one process, round after round. A variant's turn warms up and then times its steps one
by one (CUDA: together), or two by two where every second is an outer step; tokens/s is from the median of all rounds, a
ratio the median over the rounds of the ratio within a round. fastmix.py runs as it is, through its own main(), on
synthetic token files, without checkpoints and with next to no evaluation. Memory: each variant in a process of its own,
its peak above what it held before the model was built (CUDA: the allocator's peak).
"""
import argparse
import contextlib
import io
import json
import math
import os
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
        (path / "meta.json").write_text(json.dumps({"tokenizer": "random", "vocab_size": vocab_size, "dtype": "uint16",
                                                    "splits": counts}))


class Bench:

    def __init__(self, args, folder, vocab_size):
        self.args, self.folder, self.V = args, folder, vocab_size
        self.config = GPTConfig(vocab_size, args.block_size, args.n_layer, args.n_head, args.n_embd)
        self.train = np.memmap(Path(folder, "s0", "train.bin"), dtype=np.uint16, mode="r")
        self.autocast = (torch.autocast(args.device, torch.bfloat16) if args.dtype == "bfloat16"
                         else contextlib.nullcontext())

    def batch(self, n):
        """n random windows, as nanoGPT draws them."""
        T = self.args.block_size
        starts = torch.randint(len(self.train) - T - 1, (n,))
        ids = torch.from_numpy(np.stack([self.train[i: i + T + 1] for i in starts]).astype(np.int64))
        if self.args.device == "cuda":
            ids = ids.pin_memory().to("cuda", non_blocking=True)
        return ids[:, :-1], ids[:, 1:]

    def model(self):
        torch.manual_seed(0)
        net = GPT(self.config).to(self.args.device)
        optimizer = net.configure_optimizer(1e-3, 0.1, (0.9, 0.95), fused=True)
        return net, torch.compile(net) if self.args.compile else net, optimizer

    def loss(self, model, net, x, y):
        with self.autocast:
            logits = model(x) @ net.lm_head.weight.T  # (B, T, V), all held
            return F.cross_entropy(logits.flatten(0, 1), y.flatten())

    def now(self):
        if self.args.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def per_step(self, stamps, every=1):
        """Seconds a step from the times at which steps began, warm-up left out, in groups with one outer step each."""
        taken = np.diff(stamps[self.args.warmup:]).reshape(-1, every).mean(1)
        return float(np.mean(taken) if self.args.device == "cuda" else np.median(taken))  # CUDA: the last one waits

    def plain(self, steps):
        """(i) seconds a step of a nanoGPT-style loop: one batch, F.cross_entropy on all logits."""
        net, model, optimizer = self.model()
        stamps, total = [], self.args.warmup + steps
        for step in range(total + 1):
            stamps.append(self.now() if step in (self.args.warmup, total) else time.perf_counter())
            if step == total:
                break
            self.loss(model, net, *self.batch(self.args.batch_size)).backward()
            torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return self.per_step(stamps)

    def passes(self, K, steps):
        """(iv) seconds of one outer step of K + 1 forward and backward passes, alignments at the head."""
        net, model, _ = self.model()
        head = net.lm_head.weight
        n, seconds = self.args.target_batch_size, []
        for step in range(1 + steps):
            start = self.now()
            gradients = []
            for _ in range(K + 1):
                self.loss(model, net, *self.batch(n)).backward()  # through the whole model, as their code does
                gradients.append(head.grad)
                net.zero_grad(set_to_none=True)
            torch.stack([(gradients[-1] * g).sum() for g in gradients[:-1]]).tolist()
            seconds.append(self.now() - start)
        return float(np.median(seconds[1:]))

    def fastmix(self, K, steps, *flags, every=1):
        """(ii), (iii) seconds a step of fastmix.py; the clock is read when it asks for the learning rate of a step."""
        a, stamps, total = self.args, [], self.args.warmup + steps

        def learning_rate_at(step, args, ask=fastmix.learning_rate_at):
            if step == len(stamps):  # it asks once for each group of parameters
                stamps.append(self.now() if step in (a.warmup, total) else time.perf_counter())
            return ask(step, args)
        with tempfile.TemporaryDirectory() as out:
            argv = ["fastmix.py", "--data_dir", self.folder, "--sources", ",".join(f"s{k}" for k in range(K)),
                    "--target", "s0", "--out_dir", out, "--max_steps", total + 1, "--log_every", 10**9,
                    "--eval_tokens", 1, "--outer_every", every,
                    *(x for f in ("device", "dtype", "n_layer", "n_head", "n_embd", "block_size", "batch_size",
                                  "target_batch_size") for x in (f"--{f}", getattr(a, f))),
                    *(["--compile"] if a.compile else []), *flags]
            with (contextlib.redirect_stdout(io.StringIO()), mock.patch.object(sys, "argv", list(map(str, argv))),
                  mock.patch.multiple(fastmix, learning_rate_at=learning_rate_at, TEST_TOKENS=1,
                                      save_checkpoint=lambda *_: None)):
                fastmix.main()
        return self.per_step(stamps, every)

    def variants(self, K):
        """{name: seconds a step}; a name is what the table calls it."""
        return {f"fixed, K = {K}": lambda s: self.fastmix(K, s, "--mixture", "uniform"),
                f"search, K = {K}": lambda s: self.fastmix(K, s),
                f"search, every 2, K = {K}": lambda s: self.fastmix(K, s, every=2)}

    def all(self):
        return {"plain": self.plain} | {n: f for K in KS for n, f in self.variants(K).items()}


def matmul_peak(device, dtype, n):
    """FLOP/s of an n x n matmul, the best of forty."""
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    best = math.inf
    for _ in range(40):
        start = time.perf_counter()
        a @ b
        if device == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return 2 * n**3 / best


def peak_mb(args, argv, V, name):
    """Peak memory of one variant, in a process of its own."""
    command = [sys.executable, __file__, *argv, "--vocab_sizes", str(V), "--memory_of", name]
    return float(subprocess.run(command, check=True, text=True, capture_output=True).stdout.splitlines()[-1])


def measure_memory(args):
    V = args.vocab_sizes[0]
    with tempfile.TemporaryDirectory() as folder:
        write_sets(folder, 64, V)
        bench = Bench(args, folder, V)
        before = resident("VmRSS")
        args.warmup = 1
        bench.all()[args.memory_of](2)
        print(torch.cuda.max_memory_allocated() / 2**20 if args.device == "cuda" else resident("VmHWM") - before)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--vocab_sizes", type=lambda t: [int(v) for v in t.split(",")], default=[257])
    p.add_argument("--rounds", type=int, default=7)
    p.add_argument("--steps", type=int, default=0, help="timed steps a turn, rounded up to an even number; 0: as many "
                                                              "as take about 4 seconds")
    p.add_argument("--warmup", type=int, default=2)
    p.add_argument("--device", default="cpu")
    p.add_argument("--dtype", default="float32")
    p.add_argument("--compile", action="store_true")
    for flag, default in (("n_layer", 4), ("n_head", 4), ("n_embd", 256), ("block_size", 128), ("batch_size", 16),
                          ("target_batch_size", 2)):
        p.add_argument("--" + flag, type=int, default=default)
    p.add_argument("--memory_of", help=argparse.SUPPRESS)
    args = p.parse_args()
    if args.memory_of:
        return measure_memory(args)

    machine = torch.cuda.get_device_name() if args.device == "cuda" else f"{platform.machine()} CPU"
    dtype = torch.bfloat16 if args.dtype == "bfloat16" else torch.float32
    peak = matmul_peak(args.device, dtype, 8192 if args.device == "cuda" else 2048)
    print(f"{machine}, {torch.get_num_threads()} threads, torch {torch.__version__}, {args.dtype}; matmul peak "
          f"{peak / 1e12:.3f} TFLOP/s")
    print(f"{args.n_layer} layers, {args.n_embd} channels, block {args.block_size}, batch {args.batch_size}, target "
          f"batch {args.target_batch_size}; medians of {args.rounds} rounds")
    argv = [a for a in sys.argv[1:] if a != "--memory_of"]
    for V in args.vocab_sizes:
        with tempfile.TemporaryDirectory() as folder:
            write_sets(folder, 64, V)
            bench = Bench(args, folder, V)
            variants = bench.all()
            steps = args.steps or max(3, math.ceil(4 / bench.plain(2)))
            steps += steps % 2
            rows = [{name: run(steps) for name, run in variants.items()} for _ in range(args.rounds)]  # {name: seconds}
            outer = {K: bench.passes(K, 3 if K < 64 else 1) for K in KS}
        tokens = args.batch_size * args.block_size
        net = GPT(bench.config)
        matrices = net.num_params() - net.tok_emb.weight.numel()  # a lookup multiplies nothing
        # forward and backward: 6 a weight and token; attention 2 matmuls of T x C a token, halved where it is causal
        flops = tokens * (6 * matrices + 6 * args.n_layer * args.block_size * args.n_embd)
        print(f"\nV = {V}, {net.num_params():,} parameters, {steps} steps a turn")
        print(f"{'':26s} {'tokens/s':>9s} {'x plain':>8s} {'x fixed':>8s} {'of peak':>8s} {'peak MB':>8s}")
        for name in variants:
            t = np.array([r[name] for r in rows])
            fixed = f"fixed, {name.rpartition(', ')[2]}"  # with the same K
            to = {"plain": np.median([r["plain"] for r in rows] / t),
                  "fixed": np.median([r[fixed] for r in rows] / t) if fixed in variants else math.nan}
            memory = peak_mb(args, argv, V, name)
            print(f"{name:26s} {tokens / np.median(t):9,.0f} {to['plain']:8.3f} {to['fixed']:8.3f} "
                  f"{flops / np.median(t) / peak:8.2f} {memory:8,.0f}")
        print(f"\n{'an outer step, seconds':26s} {'here':>9s} {'K + 1 passes':>13s} {'ratio':>7s}")
        for K in KS:
            cost = np.median([r[f"search, K = {K}"] - r[f"fixed, K = {K}"] for r in rows])
            print(f"{f'K = {K}':26s} {cost:9.4f} {outer[K]:13.4f} {cost / outer[K]:7.3f}", flush=True)
    if 257 in args.vocab_sizes:
        default_model(args)


def default_model(args):
    """What a search costs on the default model, and whether the number of sources or the size of a file matters."""
    small = argparse.Namespace(**vars(args) | {"n_layer": 2, "n_head": 4, "n_embd": 128, "block_size": 64,
                                               "batch_size": 16, "target_batch_size": 2, "warmup": 10})
    with tempfile.TemporaryDirectory() as folder:
        write_sets(folder, 64, 257)
        write_sets(Path(folder, "large"), 1, 257)
        n = 10**10  # 20 GB of zeros, none of them on the disk
        os.truncate(Path(folder, "large", "s0", "train.bin"), 2 * n)
        meta = json.loads(Path(folder, "large", "s0", "meta.json").read_text())
        meta["splits"]["train"]["tokens"] = n
        Path(folder, "large", "s0", "meta.json").write_text(json.dumps(meta))
        bench, large = Bench(small, folder, 257), Bench(small, Path(folder, "large"), 257)
        rows = [[*(bench.fastmix(K, 60, *flags) for K in (4, 64) for flags in ((), ("--mixture", "uniform"))),
                 bench.fastmix(1, 60), large.fastmix(1, 60)] for _ in range(args.rounds)]
    search_4, fixed_4, search_64, fixed_64, ordinary, sparse = 1e3 * np.array(rows).T
    print("\nfastmix.py's default model, V = 257")
    for K, search, fixed in ((4, search_4, fixed_4), (64, search_64, fixed_64)):
        print(f"K = {K}: an outer step costs {np.median(search - fixed):.2f} ms, a search takes "
              f"{np.median(search / fixed):.3f} times as long as a fixed mixture")
    print(f"a step takes {np.median(ordinary):.2f} ms with a train.bin of 400 kB, {np.median(sparse):.2f} with 20 GB")


if __name__ == "__main__":
    main()

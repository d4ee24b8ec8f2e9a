"""
Time and peak memory of the fused loss against F.cross_entropy on logits held in memory, forward
and backward. Prints the table of RESULTS.md. Needs Linux, for the memory.

    python tests/bench_loss.py            N = 4096 tokens, V = 50304, C = 384, on this machine's CPU

Memory: each variant in a process of its own, the peak of its resident memory above what it held
before the first pass, with inputs and weights in place. Time: the variants take turns in one
process, after a round that warms up. Seconds are medians; a time ratio is the median of the ratios
within a round, and not the ratio of the medians. The last row has the three matrix products alone,
without the softmax: a loss in float32 can hardly be faster than these.
"""
import argparse
import platform
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from fastmix import fused_cross_entropy  # noqa: E402

PLAIN = "`F.cross_entropy` on all logits"
N_SOURCES = 6


def variants(N, V, C):
    """{name: a function that runs one forward and backward pass}."""
    torch.manual_seed(0)
    hidden = torch.randn(N, C, requires_grad=True)
    weight = (0.02 * torch.randn(V, C)).requires_grad_()
    targets = torch.randint(0, V, (N,))
    coef = torch.rand(N) + 0.5
    coef /= coef.sum()
    PG = torch.randn(V, C)
    ends = [N * (k + 1) // N_SOURCES for k in range(N_SOURCES)]

    def plain():
        token_loss = F.cross_entropy(hidden @ weight.T, targets, reduction="none")
        return (coef * token_loss).sum()

    def fused():
        return fused_cross_entropy(hidden, weight, targets, coef)[0]

    def aligned():
        return fused_cross_entropy(hidden, weight, targets, coef, PG, ends)[0]

    def products():
        """Logits, and the gradients of both of their factors, for 384 tokens at a time."""
        with torch.no_grad():
            total = torch.zeros_like(weight)
            for h in hidden.split(384):
                logits = h @ weight.T
                logits @ weight
                total.addmm_(logits.T, h)

    def pass_of(loss_of):
        def one_pass():
            hidden.grad = None
            weight.grad = None
            loss_of().backward()
        return one_pass

    return {PLAIN: pass_of(plain), "fused": pass_of(fused),
            "fused, with alignments": pass_of(aligned), "three matrix products": products}


def resident(name):
    """MB of resident memory: VmRSS is what is held now, VmHWM its peak (Linux)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1]) / 1024
    raise ValueError(f"/proc/self/status has no {name}")


def peak_of(one_pass):
    """MB that a pass holds at most, beyond what is held already."""
    Path("/proc/self/clear_refs").write_text("5")  # starts the peak afresh
    before = resident("VmRSS")
    one_pass()
    return resident("VmHWM") - before


def main():
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--N", type=int, default=4096)
    p.add_argument("--V", type=int, default=50304)
    p.add_argument("--C", type=int, default=384)
    p.add_argument("--repeats", type=int, default=7)
    p.add_argument("--memory_of", help=argparse.SUPPRESS)
    args = p.parse_args()
    passes = variants(args.N, args.V, args.C)
    if args.memory_of:
        print(peak_of(passes[args.memory_of]))
        return

    memory = {}
    for name in passes:
        command = [sys.executable, *sys.argv, "--memory_of", name]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        memory[name] = float(done.stdout)
    seconds = {name: [] for name in passes}
    for i in range(args.repeats + 1):
        for name, one_pass in passes.items():
            start = time.perf_counter()
            one_pass()
            if i > 0:  # the first round warms up
                seconds[name].append(time.perf_counter() - start)

    print(f"N = {args.N}, V = {args.V}, C = {args.C}, float32, {torch.get_num_threads()} threads, "
          f"{platform.machine()}, torch {torch.__version__}, median of {args.repeats}\n")
    print("| | seconds | time ratio | peak MB | memory ratio |")
    print("| --- | --- | --- | --- | --- |")
    for name in passes:
        ratio = np.median(np.array(seconds[name]) / np.array(seconds[PLAIN]))
        print(f"| {name} | {np.median(seconds[name]):.2f} | {ratio:.2f} | {memory[name]:.0f} | "
              f"{memory[name] / memory[PLAIN]:.2f} |")


if __name__ == "__main__":
    main()

"""
Time and peak memory of the fused loss against F.cross_entropy on materialised logits, forward and backward.

    python tests/bench_loss.py                      N = 4096 tokens, V = 50304, C = 384, on this machine's CPU

Memory: each variant in a process of its own, the peak of its resident memory above what it held before the first pass
(inputs and weights in place). Time: the variants in turn in one process, warm, medians and the ratio pair by pair.
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


def variants(N, V, C):
    """{name: one forward and backward pass}."""
    torch.manual_seed(0)
    hidden = torch.randn(N, C, requires_grad=True)
    weight = (0.02 * torch.randn(V, C)).requires_grad_()
    targets = torch.randint(0, V, (N,))
    r = torch.rand(N) + 0.5
    G, ends = torch.randn(V, C), [N * k // 6 for k in range(1, 7)]  # six sources of as many tokens

    def plain():
        token_loss = F.cross_entropy(hidden @ weight.T, targets, reduction="none")
        return (r * token_loss).sum() / r.sum()

    def timed(loss_of):
        def one_pass():
            hidden.grad = weight.grad = None
            loss_of().backward()
        return one_pass
    return {"plain": timed(plain),
            "fused": timed(lambda: fused_cross_entropy(hidden, weight, targets, r)[0]),
            "fused + alignment": timed(lambda: fused_cross_entropy(hidden, weight, targets, r, PG=G, ends=ends)[0])}


def resident(field):
    """A field of /proc/self/status in MB: VmRSS is the resident memory now, VmHWM its peak (Linux)."""
    line = next(line for line in open("/proc/self/status") if line.startswith(field))
    return int(line.split()[1]) / 1024


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("N", 4096), ("V", 50304), ("C", 384), ("repeats", 7)):
        p.add_argument(f"--{name}", type=int, default=default)
    p.add_argument("--memory_of", help=argparse.SUPPRESS)
    args = p.parse_args()
    passes = variants(args.N, args.V, args.C)
    if args.memory_of:
        open("/proc/self/clear_refs", "w").write("5")  # start the peak afresh
        before = resident("VmRSS")
        passes[args.memory_of]()
        print(resident("VmHWM") - before)
        return
    memory = {name: float(subprocess.run([sys.executable, *sys.argv, "--memory_of", name], check=True,
                                         capture_output=True, text=True).stdout) for name in passes}
    seconds = {name: [] for name in passes}
    for i in range(args.repeats + 1):  # the first round warms up
        for name, one_pass in passes.items():
            t = time.perf_counter()
            one_pass()
            if i:
                seconds[name].append(time.perf_counter() - t)
    print(f"N {args.N}, V {args.V}, C {args.C}, float32, forward + backward, {torch.get_num_threads()} threads, "
          f"{platform.machine()}, torch {torch.__version__}, median of {args.repeats}")
    print(f"{'':18s} {'seconds':>8s} {'time ratio':>11s} {'peak MB':>8s} {'memory ratio':>13s}")
    for name in passes:
        ratio = np.median(np.array(seconds[name]) / np.array(seconds["plain"]))
        print(f"{name:18s} {np.median(seconds[name]):8.2f} {ratio:11.2f} {memory[name]:8.0f} "
              f"{memory[name] / memory['plain']:13.2f}")


if __name__ == "__main__":
    main()

"""
What the test suite checks on the CPU, checked on a GPU; and tables of speed and memory there, in
Markdown, as in RESULTS.md.

    python tests/bench_gpu.py            one H100: 5 minutes; without a GPU a small form on the CPU
    python tests/bench_gpu.py --part checks
    python tests/bench_gpu.py --part speed --batch_size 16 --no-compile
    python tests/bench_gpu.py --part paper      what an outer step adds, by arithmetic: runs nothing

A check prints one line: ok or FAIL, its name, the errors it found and the largest that passes. The
exit status is 1 if one failed. Time and memory: the variants of bench_speed.py take turns in this
process, until --seconds have passed.
"""
import argparse
import contextlib
import copy
import gc
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F

import bench_speed  # puts the repository on the path
import fastmix
from bench_flops import outer_step_flops, training_flops
from bench_speed import (KS, PLAIN, Bench, fixed_name, matmul_peak, search_name, sparse_name,
                         write_sets)
from fastmix import IGNORE, batch_loss, fused_cross_entropy, inverse_curvature, target_gradient
from model import GPT, GPTConfig

ROOT = Path(__file__).resolve().parent.parent
STEPS = 200  # of the runs that are compared
LOG_EVERY = 5
TIMEOUT = 240  # seconds, of one such run
FLAGS = ["--sources", "s0,s1,s2", "--target", "s3", "--n_layer", 2, "--n_head", 2, "--n_embd", 64,
         "--block_size", 32, "--batch_size", 16, "--target_batch_size", 4, "--max_steps", STEPS,
         "--log_every", LOG_EVERY,
         "--learning_rate_mixture", 0.006]  # ends half-way, where a difference shows


# ---- helpers of the checks -----------------------------------------------------------------------

def chain(k, path, n):
    """n tokens of a walk round 64 of them, by four lengths of step of which each k has its own."""
    steps = np.random.default_rng(k).choice(np.arange(1, 64), 4, replace=False)
    return np.cumsum(np.random.default_rng((k, path)).choice(steps, n)) % 64


def relative(got, want):
    return ((got.detach().double().cpu() - want).norm() / want.norm()).item()


def precisions(device, exact, rounded):
    """(name, context, tolerance) of float32, without TF32, and of bfloat16 under autocast."""
    torch.set_float32_matmul_precision("highest")
    return (("float32", contextlib.nullcontext(), exact),
            ("bfloat16", torch.autocast(device, torch.bfloat16), rounded))


def report(check, *args):
    """Prints the lines of a check, which yields (name, {what: error}, tolerance); did all pass?"""
    passed = True
    try:
        for name, found, tolerance in check(*args):
            ok = all(error <= tolerance for error in found.values())  # NaN is not
            errors = ", ".join(f"{what} {error:.1e}" for what, error in found.items())
            print(f"{'ok' if ok else 'FAIL':4s} {name}: {errors}; tolerance {tolerance:g}",
                  flush=True)
            passed &= ok
    except (Exception, SystemExit) as error:
        passed = False
        words = [check.__name__, *(arg for arg in args if isinstance(arg, str))]
        reason = str(error).partition("\n")[0]
        print(f"FAIL {' '.join(words)}: {type(error).__name__}: {reason}", flush=True)
    return passed


# ---- checks of the formulas ----------------------------------------------------------------------

def exact_loss(hidden, weight, targets, coef, ends):
    """
    By autograd through all logits, in float64: {"loss", "token_loss", "hidden" and "head", the
    gradients}, and the head's gradient by source.
    """
    h = hidden.double().requires_grad_()
    W = weight.double().requires_grad_()
    token_loss = F.cross_entropy(h @ W.T, targets, ignore_index=IGNORE, reduction="none")
    want = {"loss": torch.zeros(()).double(), "token_loss": token_loss.detach(),
            "hidden": torch.zeros_like(h), "head": torch.zeros_like(W)}
    by_source = []
    for part in (coef * token_loss).tensor_split(ends[:-1]):
        grad_h, grad_W = torch.autograd.grad(part.sum(), (h, W), retain_graph=True)
        want["loss"] += part.sum().detach()
        want["hidden"] += grad_h
        want["head"] += grad_W
        by_source.append(grad_W)
    return want, by_source


def loss_and_gradients(device):
    """The fused loss and, source by source, its gradients."""
    large = (512, 50304, 768) if device == "cuda" else (512, 4096, 64)
    for N, V, C in ((512, 257, 64), large):
        torch.manual_seed(0)
        hidden = torch.randn(N, C)
        weight = 0.05 * torch.randn(V, C)
        coef = (torch.rand(N) + 0.5) / N
        targets = torch.randint(0, V, (N,))
        targets[::5] = IGNORE
        ends = [N // 8, N // 8, N // 2, N - 9, N]  # the second source is empty
        want, by_source = exact_loss(hidden, weight, targets, coef, ends)
        PG = (want["head"] + want["head"].std() * torch.randn(V, C)).float()
        want["parts"] = torch.stack([(PG * gradient).sum() for gradient in by_source])

        hidden = hidden.to(device).requires_grad_()
        weight = weight.to(device).requires_grad_()
        rest = [tensor.to(device) for tensor in (targets, coef, PG)]
        for name, autocast, tolerance in precisions(device, 1e-5, 0.02):
            worst = dict.fromkeys(want, 0.0)
            for chunk in (None, 64, 100, N):
                with autocast:
                    loss, token_loss, parts = fused_cross_entropy(hidden, weight, *rest, ends,
                                                                  chunk)
                grad_h, grad_W = torch.autograd.grad(loss, (hidden, weight))
                got = {"loss": loss, "token_loss": token_loss, "hidden": grad_h, "head": grad_W,
                       "parts": parts}
                for what in want:
                    error = relative(got[what], want[what])
                    worst[what] = np.maximum(worst[what], error)  # NaN stays
            yield f"fused loss, {name}, V = {V}", worst, tolerance


def aligned_parts(net, v, source_ids, target_ids):
    """
    From the tokens to `parts`, by the functions the loop calls. source_ids (K, B, T + 1),
    target_ids (B, T + 1) -> (K,) on the CPU.
    """
    head = net.lm_head.weight
    K, B, width = source_ids.shape
    T = width - 1
    ids = source_ids.flatten(0, 1).to(head.device)
    target_ids = target_ids.to(head.device)
    ones = torch.ones(K * B).to(head)
    G, S = target_gradient(net, head, target_ids[:, :-1], target_ids[:, 1:], ones[:B], B * T)
    with torch.autocast(head.device.type, enabled=False):  # as in main()
        PG = inverse_curvature(G, S, v.to(head))
    ends = [B * T * (k + 1) for k in range(K)]
    parts = batch_loss(net, head, ids[:, :-1], ids[:, 1:], ones, K * B * T, PG, ends)[2]
    return parts.detach().cpu().double()


def alignments(device):
    """How much each source is aligned, and in which order they are."""
    K, B, T, V, C = 4, 4, 64, 257, 64
    torch.manual_seed(0)
    net = GPT(GPTConfig(V, T, 2, 2, C)).double()
    with torch.no_grad():
        for p in net.parameters():  # away from the start, where all gradients are alike
            p += 0.1 * torch.randn_like(p)
    v = 1e-8 * torch.rand(V, C) ** 4
    v[250:] = 0  # tokens that AdamW has not met
    walks = []  # the last is the target's, which walks as the first source does
    for k in range(K + 1):
        walk = chain(k % K, k, B * (T + 1)).reshape(B, T + 1)
        walks.append(torch.from_numpy(walk))
    source_ids = torch.stack(walks[:-1])
    want = aligned_parts(net, v, source_ids, walks[-1])
    net = copy.deepcopy(net).float().to(device)
    for name, autocast, tolerance in precisions(device, 1e-4, 0.05):
        with autocast:
            A = aligned_parts(net, v, source_ids, walks[-1])
        swapped = (A.argsort() != want.argsort()).sum().item()
        errors = {"A": relative(A, want), "sources out of order": swapped}
        yield f"alignments, {name}", errors, tolerance


# ---- checks of whole runs ------------------------------------------------------------------------

def search(folder, out, *flags, launcher=(), status=0, stop_at=None):
    """
    One run of the command line -> mixture.json; or, with stop_at, one that is interrupted once it
    has logged that step. status is the exit status that is expected.
    """
    words = [sys.executable, *launcher, ROOT / "fastmix.py", *FLAGS, *flags, "--out_dir", out]
    process = subprocess.Popen([str(word) for word in words], cwd=folder, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                               env=os.environ | {"OMP_NUM_THREADS": "1"})  # several, and small
    log = folder / out / "log.jsonl"
    end = time.monotonic() + TIMEOUT
    try:
        while stop_at and process.poll() is None and time.monotonic() < end:
            if log.exists() and log.read_text().count("\n") > stop_at // LOG_EVERY:
                process.send_signal(signal.SIGINT)
                break
            time.sleep(0.01)
        lines = process.communicate(timeout=TIMEOUT)[0].strip().splitlines()
    finally:
        process.kill()
    if process.returncode != status:
        errors = [line for line in lines if "rror" in line]  # torchrun prints more than these
        reason = (errors or lines or [""])[-1]
        raise RuntimeError(f"status {process.returncode}: {reason}")
    if status != 0:
        return None
    return json.loads((folder / out / "mixture.json").read_text())


def stop_and_resume(*args):
    search(*args, status=130, stop_at=STEPS // 2)
    return search(*args, "--resume")


def start_runs(pool, folder, device):
    """The runs that are compared, some at a time: {name: future}."""
    write_sets(folder / "data", 4, 257, 20_000)
    for k in range(4):
        for split in ("train", "val", "test"):
            walk = chain(1 if k == 3 else k, k, 20_000)  # the target, s3, walks as s1 does
            walk.astype(np.uint16).tofile(folder / "data" / f"s{k}" / f"{split}.bin")
    here = ["--device", device, "--dtype", "float32"]
    bfloat16 = ["--device", device, "--dtype", "bfloat16"]
    runs = {"compiled": pool.submit(search, folder, "compiled", *here, "--compile"),
            "float32": pool.submit(search, folder, "float32", *here),
            "resumed": pool.submit(stop_and_resume, folder, "resumed", *here),
            "bfloat16": pool.submit(search, folder, "bfloat16", *bfloat16)}
    if device == "cuda":
        runs["cpu"] = pool.submit(search, folder, "cpu", "--device", "cpu")
    if device == "cpu" or torch.cuda.device_count() > 1:
        torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2)
        runs["two"] = pool.submit(search, folder, "two", *here, launcher=torchrun)
    return runs


def finds_the_source(runs):
    others = 1 - runs["float32"].result()["mixtures"]["last"]["s1"]
    yield "search finds the source that is like the target", {"share of others": others}, 0.5


def agree(name, run, runs, tolerance):
    """How far from the float32 run another one ended."""
    if run not in runs:
        print(f"--   {name}: skipped, {'no CUDA' if run == 'cpu' else 'one GPU'}")
        return
    other = runs[run].result()
    float32 = runs["float32"].result()
    mixture = other["mixtures"]["last"]
    moved = [abs(mixture[s] - share) for s, share in float32["mixtures"]["last"].items()]
    yield name, {"mixture": max(moved),
                 "test loss": abs(other["test_loss"] - float32["test_loss"])}, tolerance


def checks(device):
    passed = [report(loss_and_gradients, device), report(alignments, device)]
    # on the CPU to the last bit; a GPU adds up in another order each time
    exact = 0.0 if device == "cpu" else 0.005
    jobs = 4 if device == "cuda" else 2
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(jobs) as pool:
        runs = start_runs(pool, Path(folder), device)
        passed.append(report(finds_the_source, runs))
        passed.append(report(agree, "stopped half-way and resumed", "resumed", runs, exact))
        passed.append(report(agree, "--compile and without", "compiled", runs, 0.005))
        passed.append(report(agree, "bfloat16 and float32", "bfloat16", runs, 0.02))
        passed.append(report(agree, "CPU and CUDA", "cpu", runs, 0.02))
        passed.append(report(agree, "two processes and one", "two", runs, 0.005))
    return all(passed)


# ---- speed ---------------------------------------------------------------------------------------

def now(device):
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def measured(device, run, *args):
    """What run(*args) returns, and the MB it held at most beyond what was held before, as text."""
    gc.collect()
    if device != "cuda":
        return run(*args), ""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    found = run(*args)
    return found, f"{(torch.cuda.max_memory_allocated() - held) / 2**20:,.0f}"


def loss_alone(device, N, V, C):
    """Prints a table of the head and its loss, forward and backward, under bfloat16 autocast."""
    hidden = (0.1 * torch.randn(N, C, device=device)).requires_grad_()
    weight = (0.1 * torch.randn(V, C, device=device)).requires_grad_()
    PG = 0.1 * torch.randn(V, C, device=device)
    targets = torch.randint(0, V, (N,), device=device)
    coef = torch.full((N,), 1 / N, device=device)
    ends = [N * (k + 1) // 16 for k in range(16)]

    def plain():
        return F.cross_entropy(hidden @ weight.T, targets)

    def fused():
        return fused_cross_entropy(hidden, weight, targets, coef)[0]

    def aligned():
        return fused_cross_entropy(hidden, weight, targets, coef, PG, ends)[0]

    def milliseconds(loss_of):
        taken = []
        for _ in range(12):
            start = now(device)
            with torch.autocast(device, torch.bfloat16):
                loss = loss_of()
            torch.autograd.grad(loss, (hidden, weight))
            taken.append(1e3 * (now(device) - start))
        return np.median(taken[2:])

    print(f"\n| loss of {N} tokens, V = {V}, C = {C} | ms | peak MB |\n| --- | ---: | ---: |")
    names = {"F.cross_entropy, all logits": plain, "fused": fused,
             "fused, alignments of 16 sources": aligned}
    for name, loss_of in names.items():
        ms, mb = measured(device, milliseconds, loss_of)
        print(f"| {name} | {ms:.2f} | {mb} |", flush=True)
    return ()


def time_turn(row, name, run, args):
    """One turn of a variant: row[name] becomes (seconds per step, peak MB)."""
    start = time.monotonic()
    row[name] = measured(args.device, run, args.steps)
    print(f"{name}: {1e3 * row[name][0]:.1f} ms per step; with its start "
          f"{time.monotonic() - start:.1f} s", file=sys.stderr, flush=True)
    return ()


def time_turns(args, V, rounds, end):
    """rounds turns of every variant -> [{name: (seconds per step, peak MB)}], did all go well?"""
    def on_device(config):  # 160 million random numbers take seconds on a CPU, each turn
        with torch.device(args.device):
            return GPT(config)

    rows = []
    passed = True
    torch._dynamo.config.recompile_limit = 64  # beyond it a model runs uncompiled, with a warning
    with (tempfile.TemporaryDirectory() as folder, mock.patch.object(fastmix, "GPT", on_device),
          mock.patch.object(bench_speed, "GPT", on_device)):
        write_sets(folder, max(KS), V)
        variants = Bench(args, folder, V).variants()
        for _ in range(rounds):
            rows.append({})
            for name, run in variants.items():
                # The plain loop has one turn. All its batches have one size, unlike fastmix.py's,
                # and what was compiled for the one must not serve the other.
                if time.monotonic() > end or (name == PLAIN and len(rows) > 1):
                    continue
                done = report(time_turn, rows[-1], name, run, args)
                passed &= done
                if args.compile and not done:
                    print("so everything from here on is measured without --compile")
                    args.compile = False
                    rows = [{}]
                    report(time_turn, rows[-1], name, run, args)
                if name == PLAIN:
                    torch._dynamo.reset()
    return rows, passed


def pairs_of(rows, name, fixed):
    """(R, 2) seconds per step of a variant and of the fixed mixture, where a round has both."""
    pairs = []
    for row in rows:
        if name in row and fixed in row:
            pairs.append((row[name][0], row[fixed][0]))
    return np.array(pairs).reshape(-1, 2)


def print_turns(rows, step_flops, tokens, peak):
    print("| | tokens/s | of peak | search / fixed | peak MB |")
    print("| --- | ---: | ---: | ---: | ---: |")
    names = [PLAIN]
    fixed_of = {}  # {search: the fixed mixture with as many sources}
    for K in KS:
        names += [fixed_name(K), search_name(K), sparse_name(K)]
        fixed_of[search_name(K)] = fixed_name(K)
        fixed_of[sparse_name(K)] = fixed_name(K)
    for name in names:
        turns = [row[name] for row in rows if name in row]
        if not turns:
            continue
        seconds = np.median([taken for taken, _ in turns])
        memory = turns[-1][1]  # compiling, in the first turn, may take more
        ratio = ""
        pairs = pairs_of(rows, name, fixed_of.get(name))
        if len(pairs):
            ratio = f"{np.median(pairs[:, 0] / pairs[:, 1]):.3f}"
        print(f"| {name} | {tokens / seconds:,.0f} | {step_flops / seconds / peak:.2f} | {ratio} | "
              f"{memory} |")


def print_outer_steps(rows, step_flops, flops_of):
    """flops_of(K): of an outer step."""
    print("\n| an outer step | ms | of a training step's time | of its FLOPs |")
    print("| --- | ---: | ---: | ---: |")
    for K in KS:
        pairs = pairs_of(rows, search_name(K), fixed_name(K))
        if len(pairs):
            ms = 1e3 * np.median(pairs[:, 0] - pairs[:, 1])
            share = np.median(pairs[:, 0] / pairs[:, 1]) - 1
            print(f"| K = {K} | {ms:.1f} | {share:.3f} | {flops_of(K) / step_flops:.3f} |")


def speed(args):
    """Prints the tables; whether everything ran."""
    end = time.monotonic() + args.seconds
    cuda = args.device == "cuda"
    if cuda:
        config = GPTConfig(50304, 1024, 12, 12, 768)
        batch_size = args.batch_size or 32
        peak = matmul_peak("cuda", torch.bfloat16, 8192)
        passed = report(loss_alone, "cuda", 8192, 50304, 768)
    else:
        config = GPTConfig(512, 64, 2, 2, 64)
        batch_size = args.batch_size or 8
        peak = matmul_peak("cpu", torch.float32, 1024)
        passed = report(loss_alone, "cpu", 512, 2048, 64)
    run = SimpleNamespace(
        device=args.device, dtype="bfloat16" if cuda else "float32", compile=args.compile, warmup=4,
        steps=args.steps + args.steps % 2,  # a search every 2 steps is timed in pairs
        n_layer=config.n_layer, n_head=config.n_head, n_embd=config.n_embd,
        block_size=config.block_size, batch_size=batch_size, target_batch_size=2)
    rows, ran = time_turns(run, config.vocab_size, args.rounds, end)

    tokens = batch_size * config.block_size
    step_flops = training_flops(config, tokens)
    with torch.device("meta"):
        n_params = sum(p.numel() for p in GPT(config).parameters())
    print(f"\n{n_params:,} parameters: {config.n_layer} layers, {config.n_embd} channels, V = "
          f"{config.vocab_size}; {tokens:,} tokens per step, {run.dtype}"
          f"{', --compile' if run.compile else ''}; matmul peak {peak / 1e12:.3f} TFLOP/s; "
          f"{len(rows)} rounds\n")
    print_turns(rows, step_flops, tokens, peak)

    def flops_of(K):
        target_tokens = run.target_batch_size * config.block_size
        return outer_step_flops(config, target_tokens, min(K, batch_size))

    print_outer_steps(rows, step_flops, flops_of)
    return passed and ran


# ---- on paper ------------------------------------------------------------------------------------

def gigabytes_moved(config, K, chunks):
    """
    What the alignments read and write on a GPU, beyond a step without them. The loss walks over
    chunks of tokens, and each piece of a chunk that is of one source has its part of dW.
    """
    numbers = config.vocab_size * config.n_embd
    more = min(K, 32) - 1  # pieces that a fixed mixture does not have
    dot = (chunks + more) * (2 + 4 + 4 + 4)  # read in bfloat16, widened, multiplied with P G
    form = more * (2 + 2 + 8)  # formed, and added to dW in float32
    means = 6 * 8  # the target's gradient, its running mean, and P times it
    return numbers * (dot + form + means) / 1e9


def on_paper():
    """
    Prints what an outer step adds to a training step, by arithmetic alone: bfloat16 matmuls and
    float32 sums, 32 windows of 1,024 tokens per GPU and step, two target windows or one per GPU,
    chunks of 4,096 tokens, as the loss has on CUDA, and 16 sources for the FLOPs.
    """
    tokens = 32 * 1024
    chunks = tokens // 4096
    print("| parameters | V | GPUs | TFLOP per step | an outer step's, % | held per GPU, MB "
          "| moved per GPU, GB: K = 4 | K = 16 | K = 64 | all-reduced, MB | gradients', MB |")
    print("|" + " ---: |" * 11)
    for n_layer, C in ((12, 768), (16, 2048)):
        for V in (50304, 128256):
            config = GPTConfig(V, 1024, n_layer, n_layer, C)
            n_params = 12 * n_layer * C**2 + 2 * V * C
            moved = [f"{gigabytes_moved(config, K, chunks):.0f}" for K in (4, 16, 64)]
            held = V * C * (4 + 4 + 4) + 2 * C**2 * 4  # G, P G, a part of dW; E[h h^T] and its mean
            reduced = (V * C + C**2) * 4
            for gpus in (1, 8):
                target_tokens = max(2, gpus) * 1024
                step = training_flops(config, gpus * tokens)
                outer = outer_step_flops(config, target_tokens, gpus * (chunks + 15))
                cells = [f"{n_params / 1e6:,.0f}M", f"{V:,}", str(gpus), f"{step / 1e12:,.0f}",
                         f"{100 * outer / step:.1f}", f"{held / 1e6:,.0f}", *moved]
                if gpus > 1:
                    cells += [f"{reduced / 1e6:,.0f}", f"{n_params * 4 / 1e6:,.0f}"]
                else:
                    cells += ["", ""]
                print("| " + " | ".join(cells) + " |")


def main():
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    add = p.add_argument
    add("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    add("--part", choices=("checks", "speed", "paper"), help="one of them (checks and speed)")
    add("--seconds", type=float, default=240, help="no further turn starts then (%(default)s)")
    add("--batch_size", type=int, help="of the table (32; on a CPU 8)")
    add("--rounds", type=int, default=3, help="turns of each variant (%(default)s)")
    add("--steps", type=int, default=10, help="timed steps per turn (%(default)s)")
    add("--compile", action=argparse.BooleanOptionalAction, help="in the table (on a GPU, if it "
        "works)")
    args = p.parse_args()
    start = time.monotonic()
    if args.part == "paper":
        on_paper()
        return
    if args.compile is None:
        args.compile = args.device == "cuda"
    machine = torch.cuda.get_device_name() if args.device == "cuda" else "CPU, small form"
    print(f"{machine}, torch {torch.__version__}")
    passed = True
    if args.part != "speed":
        passed &= checks(args.device)
    if args.part != "checks":
        args.seconds -= time.monotonic() - start
        passed &= speed(args)
    print(f"\n{'all passed' if passed else 'FAILED'}, {time.monotonic() - start:.0f} seconds")
    sys.exit(not passed)


if __name__ == "__main__":
    main()

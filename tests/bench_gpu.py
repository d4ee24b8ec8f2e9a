"""
What the test suite checks on the CPU, checked on a GPU; and tables of speed and memory there, in Markdown.

    python tests/bench_gpu.py                   one H100: 5 minutes; without a GPU a small form of all of it on the CPU
    python tests/bench_gpu.py --part checks                            or --part speed
    python tests/bench_gpu.py --part speed --batch_size 16 --no-compile

A check prints one line: ok or FAIL, its name, the errors it found and the largest that passes. The status is 1 if one
failed. Time and memory: variants take turns in this process, by bench_speed.py, until --seconds have passed.
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

import bench_speed
from bench_speed import KS, Bench, fastmix, matmul_peak, write_sets  # puts the repository on the path
from fastmix import IGNORE, batch_loss, fused_cross_entropy, inverse_curvature, target_gradient
from model import GPT, GPTConfig

ROOT = Path(__file__).resolve().parent.parent
STEPS, LOG_EVERY = 200, 5  # of the runs that are compared
TIMEOUT = 240  # seconds, of one such run
FLAGS = ["--sources", "s0,s1,s2", "--target", "s3", "--n_layer", 2, "--n_head", 2, "--n_embd", 64, "--block_size", 32,
         "--batch_size", 16, "--target_batch_size", 4, "--max_steps", STEPS, "--log_every", LOG_EVERY,
         "--learning_rate_mixture", 0.006]  # ends half-way, where a difference shows


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


# ---- checks: each yields (name, {what: error}, the largest error that passes) ---------------------------------------

def loss_and_gradients(device):
    """Against autograd through all logits in float64, for the loss and, source by source, its gradients."""
    for N, V, C in ((512, 257, 64), (512, 50304, 768) if device == "cuda" else (512, 4096, 64)):
        torch.manual_seed(0)
        hidden, weight, r = torch.randn(N, C), 0.05 * torch.randn(V, C), torch.rand(N) + 0.5
        targets, ends = torch.randint(0, V, (N,)), [N // 8, N // 8, N // 2, N - 9, N]  # the second source is empty
        targets[::5] = IGNORE
        h, W = (t.double().requires_grad_() for t in (hidden, weight))
        token_loss = F.cross_entropy(h @ W.T, targets, ignore_index=IGNORE, reduction="none")
        of_source = [part.sum() for part in (r / N * token_loss).tensor_split(ends[:-1])]
        grads = [torch.autograd.grad(part, (h, W), retain_graph=True) for part in of_source]
        grad_h, grad_W = map(sum, zip(*grads))
        PG = (grad_W + grad_W.std() * torch.randn(V, C)).float()
        want = {"loss": sum(of_source).detach(), "token_loss": token_loss.detach(), "hidden": grad_h, "head": grad_W,
                "parts": torch.stack([(PG * g).sum() for _, g in grads])}
        hidden, weight, targets, r, PG = (t.to(device) for t in (hidden, weight, targets, r, PG))
        leaves = hidden.requires_grad_(), weight.requires_grad_()
        for name, autocast, tolerance in precisions(device, 1e-5, 0.02):
            worst = dict.fromkeys(want, 0.0)
            for chunk in (None, 64, 100, N):
                with autocast:
                    loss, token_loss, parts = fused_cross_entropy(*leaves, targets, r, N, PG, ends, chunk)
                got = dict(zip(want, (loss, token_loss, *torch.autograd.grad(loss, leaves), parts)))
                worst = {k: np.maximum(worst[k], relative(got[k], want[k])) for k in want}  # of NaN, too
            yield f"fused loss, {name}, V = {V}", worst, tolerance


def alignments(device):
    """From the tokens to `parts`, by the functions the loop calls: how much each source is aligned, in which order."""
    K, B, T, V, C = 4, 4, 64, 257, 64
    torch.manual_seed(0)
    net = GPT(GPTConfig(V, T, 2, 2, C)).double()
    with torch.no_grad():
        for p in net.parameters():  # away from the start, where all gradients are alike
            p += 0.1 * torch.randn_like(p)
    v = 1e-8 * torch.rand(V, C) ** 4
    v[250:] = 0  # tokens that AdamW has not met
    *walks, target = (torch.from_numpy(chain(k % K, k, B * (T + 1)).reshape(B, T + 1)) for k in range(K + 1))

    def path(net):
        head = net.lm_head.weight
        optimizer = SimpleNamespace(state={head: {"exp_avg_sq": v.to(head)}})
        (x, y), (x_val, y_val) = ((ids[:, :-1], ids[:, 1:]) for ids in (torch.cat(walks).to(head.device),
                                                                        target.to(head.device)))
        r = torch.ones(K * B).to(head)
        G, H = target_gradient(net, head, x_val, y_val, r[:B], B * T)
        ends = [B * T * (k + 1) for k in range(K)]
        with torch.autocast(head.device.type, enabled=False):  # as in main()
            PG = inverse_curvature(G, H, head, optimizer)
        return batch_loss(net, head, x, y, r, K * B * T, PG, ends)[2].cpu().double()
    want, net = path(net), copy.deepcopy(net).float().to(device)
    for name, autocast, tolerance in precisions(device, 1e-4, 0.05):
        with autocast:
            A = path(net)
        swapped = (A.argsort() != want.argsort()).sum().item()
        yield f"alignments, {name}", {"A": relative(A, want), "sources out of order": swapped}, tolerance


def search(folder, out, *flags, launcher=(), status=0, stop_at=None):
    """One run of the command line, interrupted once it has logged a step (stop_at) or to its end -> mixture.json."""
    command = map(str, (sys.executable, *launcher, ROOT / "fastmix.py", *FLAGS, *flags, "--out_dir", out))
    process = subprocess.Popen(list(command), cwd=folder, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                               env=os.environ | {"OMP_NUM_THREADS": "1"})  # several at a time, and small
    log, end = folder / out / "log.jsonl", time.monotonic() + TIMEOUT
    try:
        while stop_at and process.poll() is None and time.monotonic() < end:
            if log.exists() and log.read_text().count("\n") > stop_at // LOG_EVERY:
                process.send_signal(signal.SIGINT)
                break
            time.sleep(0.01)
        said = process.communicate(timeout=TIMEOUT)[0].strip().splitlines()
    finally:
        process.kill()
    if process.returncode != status:
        why = [line for line in said if "rror" in line] or said  # torchrun ends with a frame of its own
        raise RuntimeError(f"status {process.returncode}: {why[-1] if why else ''}")
    return json.loads((folder / out / "mixture.json").read_text()) if status == 0 else None


def stop_and_resume(*args):
    search(*args, status=130, stop_at=STEPS // 2)
    return search(*args, "--resume")


def start_runs(pool, folder, device):
    """The runs that are compared, some at a time: {name: future}."""
    write_sets(folder / "data", 4, 257, 20_000)
    for k in range(4):  # the target, s3, walks as s1 does
        for split in ("train", "val", "test"):
            chain(1 if k == 3 else k, k, 20_000).astype(np.uint16).tofile(folder / "data" / f"s{k}" / f"{split}.bin")
    here = ["--device", device, "--dtype", "float32"]
    runs = {"compiled": pool.submit(search, folder, "compiled", *here, "--compile"),
            "float32": pool.submit(search, folder, "float32", *here),
            "resumed": pool.submit(stop_and_resume, folder, "resumed", *here),
            "bfloat16": pool.submit(search, folder, "bfloat16", "--device", device, "--dtype", "bfloat16")}
    if device == "cuda":
        runs["cpu"] = pool.submit(search, folder, "cpu", "--device", "cpu")
    if device == "cpu" or torch.cuda.device_count() > 1:
        runs["two"] = pool.submit(search, folder, "two", *here, launcher=("-m", "torch.distributed.run", "--standalone",
                                                                          "--nproc_per_node", 2))
    return runs


def finds_the_source(runs):
    others = 1 - runs["float32"].result()["mixtures"]["last"]["s1"]
    yield "search finds the source that is like the target", {"share of others": others}, 0.5


def agree(name, run, runs, tolerance):
    """How far from the float32 run another one ended."""
    if run not in runs:
        print(f"--   {name}: skipped, {'no CUDA' if run == 'cpu' else 'one GPU'}")
        return
    a, b = (runs[k].result() for k in (run, "float32"))
    mixture, reference = a["mixtures"]["last"], b["mixtures"]["last"]
    yield name, {"mixture": max(abs(mixture[n] - reference[n]) for n in reference),
                 "test loss": abs(a["test_loss"] - b["test_loss"])}, tolerance


def report(check, *args):
    """Prints a check's lines; whether all passed."""
    passed, words = True, [check.__name__, *(a for a in args if isinstance(a, str))]
    try:
        for name, found, tolerance in check(*args):
            ok = all(error <= tolerance for error in found.values())  # NaN is not
            print(f"{'ok' if ok else 'FAIL':4s} {name}: {', '.join(f'{what} {e:.1e}' for what, e in found.items())}; "
                  f"tolerance {tolerance:g}", flush=True)
            passed &= ok
    except (Exception, SystemExit) as error:
        passed = False
        print(f"FAIL {' '.join(words)}: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}", flush=True)
    return passed


def checks(device):
    passed = [report(loss_and_gradients, device), report(alignments, device)]
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(4 if device == "cuda" else 2) as pool:
        runs = start_runs(pool, Path(folder), device)
        passed.append(report(finds_the_source, runs))
        for run, name, tolerance in (
                # on the CPU to the last bit; a GPU adds up in another order each time
                ("resumed", "stopped half-way and resumed", 0.0 if device == "cpu" else 0.005),
                ("compiled", "--compile and without", 0.005), ("bfloat16", "bfloat16 and float32", 0.02),
                ("cpu", "CPU and CUDA", 0.02), ("two", "two processes and one", 0.005)):
            passed.append(report(agree, name, run, runs, tolerance))
    return all(passed)


# ---- speed ----------------------------------------------------------------------------------------------------------

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
    return run(*args), f"{(torch.cuda.max_memory_allocated() - held) / 2**20:,.0f}"


def loss_alone(device, N, V, C):
    """Forward and backward of the head and its loss, under bfloat16 autocast."""
    hidden, weight, PG = (0.1 * torch.randn(n, C, device=device) for n in (N, V, V))
    targets, ends = torch.randint(0, V, (N,), device=device), [N * (k + 1) // 16 for k in range(16)]
    leaves = hidden.requires_grad_(), weight.requires_grad_()

    def milliseconds(loss_of):
        taken = []
        for _ in range(12):
            start = now(device)
            with torch.autocast(device, torch.bfloat16):
                loss = loss_of()
            torch.autograd.grad(loss, leaves)
            taken.append(1e3 * (now(device) - start))
        return np.median(taken[2:])
    print(f"\n| loss of {N} tokens, V = {V}, C = {C}, bfloat16 | ms | peak MB |\n| --- | ---: | ---: |")
    for name, loss_of in (
            ("F.cross_entropy, all logits", lambda: F.cross_entropy(hidden @ weight.T, targets)),
            ("fused", lambda: fused_cross_entropy(*leaves, targets)[0]),
            ("fused, alignments of 16 sources", lambda: fused_cross_entropy(*leaves, targets, PG=PG, ends=ends)[0])):
        ms, mb = measured(device, milliseconds, loss_of)
        print(f"| {name} | {ms:.2f} | {mb} |", flush=True)
    return ()


def time_turns(a, V, rounds, steps, end):
    """rounds turns of every variant -> [{name: (seconds a step, peak MB)}], and whether all went well."""
    rows, passed = [], True

    def turn(name, run):
        start = time.monotonic()
        rows[-1][name] = measured(a.device, run, steps)
        print(f"{name}: {1e3 * rows[-1][name][0]:.1f} ms a step; with its start {time.monotonic() - start:.1f} s",
              file=sys.stderr, flush=True)
        return ()

    def on_device(config):
        with torch.device(a.device):  # 160 million random numbers take seconds on a CPU, each turn
            return GPT(config)
    torch._dynamo.config.recompile_limit = 64  # beyond it a model goes on uncompiled, with no more than a warning
    with (tempfile.TemporaryDirectory() as folder, mock.patch.object(fastmix, "GPT", on_device),
          mock.patch.object(bench_speed, "GPT", on_device)):
        write_sets(folder, max(KS), V)
        for _ in range(rounds):
            rows.append({})
            for name, run in Bench(a, folder, V).all().items():
                if time.monotonic() > end or any(name == "plain" and name in row for row in rows):
                    continue
                done = report(turn, name, run)
                passed &= done
                if a.compile and not done:
                    print("so everything from here on is measured without --compile")
                    a.compile, rows[:] = False, [{}]
                    report(turn, name, run)
                if name == "plain":  # all its batches are of one size and fastmix.py's are not: what was compiled for
                    torch._dynamo.reset()  # the one must not serve the other, and so it has but one turn
    return rows, passed


def outer_flops(L, C, V, T, target_tokens, pieces):
    """
    Of an outer step: the target's forward pass, its logits and head gradient; the curvature's inverse, of C x C, and its
    product with that gradient; and a V x C dot for each source in each chunk. Multiply-adds count 2.
    """
    head = 2 * V * C
    return (target_tokens * (24 * L * C**2 + 2 * L * T * C + 2 * head + 2 * C**2) + 2 * C**3 + head * C + pieces * head)


def on_paper():
    """
    Prints what an outer step adds to a training step, bfloat16 matmuls and float32 sums, by arithmetic alone. 32 windows
    of 1,024 tokens a GPU and step, two target windows, or one a GPU; chunks of 4,096 tokens, as the loss has on CUDA.
    """
    T, tokens = 1024, 32 * 1024
    print("| parameters | V | GPUs | TFLOP a step | an outer step's, % | held a GPU, MB | moved a GPU, GB: K = 4 | K = 16 "
          "| K = 64 | all-reduced, MB | gradients', MB |\n|" + " ---: |" * 11)
    for L, C in ((12, 768), (16, 2048)):
        for V in (50304, 128256):
            for gpus in (1, 8):
                params, target = 12 * L * C**2 + 2 * V * C, max(2, gpus) * T
                step = 3 * gpus * tokens * (24 * L * C**2 + 2 * L * T * C + 2 * V * C)
                # in each piece, the tokens of one source in one chunk, dW (2 bytes) is read, widened to float32 and
                # multiplied with P G; each piece that a fixed mixture does not have forms and adds another dW as well
                chunks, moved = tokens // 4096, []
                for K in (4, 16, 64):
                    more = min(K, 32) - 1
                    moved.append(V * C * ((chunks + more) * (2 + 4 + 4 + 4) + more * (2 + 2 + 8) + 6 * 8) / 1e9)
                share = outer_flops(L, C, V, T, target, gpus * (chunks + 15)) / step
                print(f"| {params / 1e6:,.0f}M | {V:,} | {gpus} | {step / 1e12:,.0f} | {100 * share:.1f} | "
                      f"{(V * C * (4 + 4 + 4) + 8 * C**2) / 1e6:,.0f} | " + " | ".join(f"{m:.0f}" for m in moved) +
                      (f" | {(V * C + C**2) * 4 / 1e6:,.0f} | {params * 4 / 1e6:,.0f} |" if gpus > 1 else " | | |"))


def speed(args):
    """Prints the tables; whether everything ran."""
    end, cuda = time.monotonic() + args.seconds, args.device == "cuda"
    peak = matmul_peak(args.device, *((torch.bfloat16, 8192) if cuda else (torch.float32, 1024)))
    passed = report(loss_alone, args.device, *((8192, 50304, 768) if cuda else (512, 2048, 64)))
    V, L, heads, C, T, B = (50304, 12, 12, 768, 1024, args.batch_size or 32) if cuda else (
        512, 2, 2, 64, 64, args.batch_size or 8)
    a = SimpleNamespace(device=args.device, dtype="bfloat16" if cuda else "float32", compile=args.compile, warmup=4,
                        n_layer=L, n_head=heads, n_embd=C, block_size=T, batch_size=B, target_batch_size=2)
    rows, ran = time_turns(a, V, args.rounds, args.steps + args.steps % 2, end)  # a search every 2 is timed in pairs

    # multiply-adds count 2: a lookup multiplies nothing; attention has 2 matmuls of T x C a token, half of it causal
    with torch.device("meta"):
        blocks = GPT(GPTConfig(V, T, L, heads, C)).num_params() - 2 * V * C
    forward, head = 2 * blocks + 2 * L * T * C, 2 * V * C  # of one token
    step_flops = 3 * B * T * (forward + head)
    print(f"\n{blocks + 2 * V * C:,} parameters: {L} layers, {C} channels, V = {V}; {B * T:,} tokens a step, {a.dtype}"
          f"{', --compile' if a.compile else ''}; matmul peak {peak / 1e12:.3f} TFLOP/s\n\n"
          "| | turns | tokens/s | of peak | search / fixed | peak MB |\n| --- | ---: | ---: | ---: | ---: | ---: |")
    cost = {}  # of an outer step, against the fixed mixture of the same round: seconds, and as a share
    for name in dict.fromkeys(name for row in rows for name in row):
        turns, fixed = [row[name] for row in rows if name in row], f"fixed, {name.rpartition(', ')[2]}"
        pairs = np.array([(row[name][0], row[fixed][0]) for row in rows if name in row and fixed in row]).reshape(-1, 2)
        seconds, memory = np.median([s for s, _ in turns]), turns[-1][1]  # compiling, in the first, may take more
        ratio = ""
        if len(pairs) and name != fixed:
            cost[name] = np.median(pairs[:, 0] - pairs[:, 1]), np.median(pairs[:, 0] / pairs[:, 1]) - 1
            ratio = f"{cost[name][1] + 1:.3f}"
        print(f"| {name} | {len(turns)} | {B * T / seconds:,.0f} | {step_flops / seconds / peak:.2f} | {ratio} | "
              f"{memory} |")
    print("\n| an outer step | ms | of a training step's time | of its FLOPs |\n| --- | ---: | ---: | ---: |")
    for K in (K for K in KS if f"search, K = {K}" in cost):
        seconds, share = cost[f"search, K = {K}"]
        flops = outer_flops(L, C, V, T, a.target_batch_size * T, min(K, B))
        print(f"| K = {K} | {1e3 * seconds:.1f} | {share:.3f} | {flops / step_flops:.4f} |")
    return passed and ran


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--part", choices=("checks", "speed", "paper"), help="one of them (checks and speed)")
    p.add_argument("--seconds", type=float, default=240, help="no further turn is started after them (%(default)s)")
    p.add_argument("--batch_size", type=int, help="of the table (32; on a CPU 8)")
    p.add_argument("--rounds", type=int, default=3, help="turns of each variant (%(default)s)")
    p.add_argument("--steps", type=int, default=10, help="timed steps a turn (%(default)s)")
    p.add_argument("--compile", action=argparse.BooleanOptionalAction, help="in the table (on a GPU, if it works)")
    args, start = p.parse_args(), time.monotonic()
    if args.part == "paper":
        return on_paper()
    if args.compile is None:
        args.compile = args.device == "cuda"
    print(f"{torch.cuda.get_device_name() if args.device == 'cuda' else 'CPU, small form'}, torch {torch.__version__}")
    passed = args.part == "speed" or checks(args.device)
    args.seconds -= time.monotonic() - start
    if args.part != "checks":
        passed &= speed(args)
    print(f"\n{'all passed' if passed else 'FAILED'}, {time.monotonic() - start:.0f} seconds")
    sys.exit(not passed)


if __name__ == "__main__":
    main()

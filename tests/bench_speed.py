"""
Time and memory. Each part prints a table of RESULTS.md, in less than 3 minutes on 2 cores.

    python tests/bench_speed.py loss                     the default model's: N tokens, K sources
    python tests/bench_speed.py loss --V 50304 --C 384 --N 2048
    python tests/bench_speed.py runs                     the default model: plain, fixed, search
    python tests/bench_speed.py runs --V 50304 --n_layer 4 --n_embd 256 --block_size 128 \\
        --Ks 16 --rounds 3 --steps 4
    python tests/bench_speed.py start                    seconds from the command to the first step
    python tests/bench_speed.py prepare                  MB of text per second
    python tests/bench_speed.py prepare --tokenizer gpt2.tiktoken --mb 20

On a GPU, with the share of the matmul peak:

    python tests/bench_speed.py loss --device cuda --V 50304 --C 768 --N 8192 --K 16
    python tests/bench_speed.py runs --device cuda --compile --V 50304 --n_layer 12 --n_head 12 \\
        --n_embd 768 --block_size 1024 --batch_size 32 --Ks 4 16 64

Variants take turns in one process, so that what else the machine does meets all of them. A time is
the median over the rounds. A ratio compares two variants within each round, and is the median of
these, not the ratio of two medians. Memory on a CPU needs Linux: each variant in a process of its
own, its peak above what it held before.
"""
import argparse
import contextlib
import functools
import io
import json
import platform
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]
import fastmix  # noqa: E402
from bench_methods import forward_flops  # noqa: E402
from model import GPT, GPTConfig  # noqa: E402

WARM_UP = 3  # steps or passes that are not counted


def clock(device):
    """Seconds, when all that was asked of the device is done."""
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def in_turns(variants, rounds):
    """{name: function that returns seconds} -> {name: its seconds in each round (rounds,)}."""
    seconds = {name: [] for name in variants}
    for _ in range(rounds):
        for name, measure in variants.items():
            seconds[name].append(measure())
    return {name: np.array(times) for name, times in seconds.items()}


def precision(args):
    """The autocast of a run: bfloat16 on a GPU, float32 on a CPU."""
    return torch.autocast(args.device, torch.bfloat16, enabled=args.device == "cuda")


def describe(args):
    """Prints the machine, and returns the FLOP/s of its matrix product, the best of twenty."""
    machine = f"{platform.machine()} CPU"
    n = 2048
    if args.device == "cuda":
        machine = torch.cuda.get_device_name()
        n = 8192
    a = torch.randn(n, n, device=args.device)
    with precision(args):
        a = (a @ a).clone()  # in the dtype of a run's products
    seconds = []
    for _ in range(20):
        start = clock(args.device)
        a @ a.T
        seconds.append(clock(args.device) - start)
    peak = 2 * n**3 / min(seconds)
    print(f"{machine}, {torch.get_num_threads()} threads, torch {torch.__version__}, {a.dtype}; "
          f"matmul peak {peak / 1e12:.2f} TFLOP/s\n")
    return peak


# ---- the loss ------------------------------------------------------------------------------------

PLAIN = "`F.cross_entropy`, all logits"


def losses(args):
    """{name: a function that makes one forward and backward pass} of N tokens of K sources."""
    N = args.N
    K = args.K
    torch.manual_seed(0)
    hidden = torch.randn(K, N // K, args.C, device=args.device, requires_grad=True)
    head = (0.02 * torch.randn(args.V, args.C, device=args.device)).requires_grad_()
    labels = torch.randint(0, args.V, (K, N // K), device=args.device)
    weight = torch.full((K,), 1 / N, device=args.device)
    PG = torch.randn(args.V, args.C, device=args.device)

    def plain_loss(hidden, labels):
        logits = hidden @ head.T
        return F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), reduction="sum") / N

    def plain():
        plain_loss(hidden, labels).backward()

    def plain_by_source():
        """The gradient at the head of each source alone, and its product with PG."""
        before = torch.zeros_like(head)
        for k in range(K):
            plain_loss(hidden[k:k + 1], labels[k:k + 1]).backward()
            (PG * (head.grad - before)).sum()
            before.copy_(head.grad)

    def fused(PG):
        fastmix.fused_cross_entropy(hidden, head, labels, weight, PG)[0].backward()

    def one_pass(loss):
        hidden.grad = None
        head.grad = None
        with precision(args):
            loss()

    found = {PLAIN: plain,
             f"the same, alignments of {K} sources": plain_by_source,
             "fused": functools.partial(fused, None),
             "fused, alignments of all tokens": functools.partial(fused, PG)}
    return {name: functools.partial(one_pass, loss) for name, loss in found.items()}


def resident(name):
    """MB of resident memory: VmRSS is what is held now, VmHWM its peak (Linux)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1]) / 1024
    raise ValueError(f"/proc/self/status has no {name}")


def peak_memory(args, one_pass):
    """MB that a pass holds at most, beyond what is held already."""
    if args.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        one_pass()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    Path("/proc/self/clear_refs").write_text("5")  # starts the peak afresh
    before = resident("VmRSS")
    one_pass()
    return resident("VmHWM") - before


def bench_loss(args):
    passes = losses(args)
    if args.memory_of is not None:
        print(peak_memory(args, list(passes.values())[args.memory_of]))
        return
    describe(args)

    def timed(one_pass):
        start = clock(args.device)
        one_pass()
        return clock(args.device) - start

    seconds = in_turns({name: functools.partial(timed, p) for name, p in passes.items()},
                       args.rounds + 1)
    print(f"| V = {args.V}, C = {args.C}, N = {args.N} | ms | time ratio | peak MB | ratio |\n"
          "| --- | ---: | ---: | ---: | ---: |")
    for i, name in enumerate(passes):
        command = [sys.executable, *sys.argv, "--memory_of", str(i)]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        peak = float(done.stdout)
        if name == PLAIN:
            plain_peak = peak
        times = seconds[name][1:]  # the first round warms up
        print(f"| {name} | {1e3 * np.median(times):.2f} | "
              f"{np.median(times / seconds[PLAIN][1:]):.2f} | {peak:.0f} | "
              f"{peak / plain_peak:.2f} |", flush=True)


# ---- whole runs ----------------------------------------------------------------------------------

MODEL_FLAGS = {"n_layer": 2, "n_head": 4, "n_embd": 128, "block_size": 64, "batch_size": 16}


def write_sets(folder, K, vocab_size, n_tokens=200_000):
    """K sources of random tokens: what is in them does not matter to the clock."""
    for k in range(K):
        path = Path(folder, f"s{k}")
        path.mkdir(parents=True)
        rng = np.random.default_rng(k)
        splits = {}
        for split in ("train", "val", "test"):
            rng.integers(0, vocab_size - 1, n_tokens).astype(np.uint16).tofile(
                path / f"{split}.bin")
            splits[split] = {"tokens": n_tokens, "learned": n_tokens}
        meta = {"tokenizer": "random", "vocab_size": vocab_size, "eot_token": vocab_size - 1,
                "dtype": "uint16", "masked": False, "documents": 1, "sha256": path.name,
                "splits": splits}
        (path / "meta.json").write_text(json.dumps(meta))


def config_of(args):
    return GPTConfig(args.V, args.block_size, args.n_layer, args.n_head, args.n_embd)


class Enough(Exception):
    """Ends a run of fastmix.py that was timed."""


def fastmix_step(args, folder, K, *flags):
    """Seconds of a step of fastmix.py: the clock is read when it asks for a learning rate."""
    last = WARM_UP + args.steps
    stamps = {}
    learning_rate_at = fastmix.learning_rate_at

    def timed_learning_rate_at(step, settings):
        if step in (WARM_UP, last) and step not in stamps:  # a GPU waits only there
            stamps[step] = clock(args.device)
        if step == last:
            raise Enough
        return learning_rate_at(step, settings)

    argv = ["--data_dir", str(folder), "--sources", ",".join(f"s{k}" for k in range(K)),
            "--target", "s0", "--max_steps", str(last + 1), "--log_every", "1000000",
            "--eval_tokens", "1", "--device", args.device, *flags]
    for flag in MODEL_FLAGS:
        argv += [f"--{flag}", str(getattr(args, flag))]
    if args.compile:
        argv.append("--compile")
    changes = {"learning_rate_at": timed_learning_rate_at, "save_checkpoint": lambda *_: None}
    with (tempfile.TemporaryDirectory() as out, mock.patch.multiple(fastmix, **changes),
          contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(Enough)):
        fastmix.main([*argv, "--out_dir", out])
    return (stamps[last] - stamps[WARM_UP]) / args.steps


def plain_step(args, folder):
    """Seconds of a step of a loop like nanoGPT's: one batch, F.cross_entropy on all logits."""
    torch.manual_seed(0)
    net = GPT(config_of(args)).to(args.device)
    optimizer = net.configure_optimizer(1e-3, 0.1)
    model = torch.compile(net) if args.compile else net
    tokens = np.memmap(Path(folder, "s0", "train.bin"), dtype=np.uint16, mode="r")
    T = args.block_size
    for step in range(WARM_UP + args.steps):
        if step == WARM_UP:
            start = clock(args.device)
        places = torch.randint(len(tokens) - T - 1, (args.batch_size,))
        windows = np.stack([tokens[place: place + T + 1] for place in places])
        ids = torch.from_numpy(windows.astype(np.int64)).to(args.device)
        with precision(args):
            logits = model(ids[:, :-1]) @ net.lm_head.weight.T  # (B, T, V)
            loss = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return (clock(args.device) - start) / args.steps


def bench_runs(args):
    peak = describe(args)
    args.steps += args.steps % 2  # as many steps with an outer step as without
    with tempfile.TemporaryDirectory() as folder:
        write_sets(folder, max(args.Ks), args.V)
        variants = {"plain loop": functools.partial(plain_step, args, folder)}
        fixed_of = {}  # {variant: what it is compared with}
        for K in args.Ks:
            fixed = f"fixed mixture, K = {K}"
            rows = {fixed: ("--mixture", "uniform"), f"search, K = {K}": (),
                    f"search, K = {K}, `--outer_every 2`": ("--outer_every", "2")}
            for name, flags in rows.items():
                variants[name] = functools.partial(fastmix_step, args, folder, K, *flags)
                fixed_of[name] = fixed
        seconds = in_turns(variants, args.rounds)
    n_params = sum(p.numel() for p in GPT(config_of(args)).parameters())
    step_flops = 3 * args.batch_size * args.block_size * forward_flops(config_of(args))
    print(f"{n_params:,} parameters, {args.rounds} rounds of {args.steps} steps\n\n"
          f"| V = {args.V} | ms a step | / plain | / fixed | of the peak |\n"
          "| --- | ---: | ---: | ---: | ---: |")
    for name, times in seconds.items():
        to_fixed = ""
        if name in fixed_of:
            to_fixed = f"{np.median(times / seconds[fixed_of[name]]):.3f}"
        print(f"| {name} | {1e3 * np.median(times):.2f} | "
              f"{np.median(times / seconds['plain loop']):.3f} | {to_fixed} | "
              f"{step_flops / np.median(times) / peak:.2f} |")


# ---- the start -----------------------------------------------------------------------------------

def first_step(folder):
    """Seconds from the command to the line that reports the first step."""
    command = [sys.executable, HERE.parent / "fastmix.py", "--data_dir", folder, "--sources",
               "s0,s1,s2,s3,s4,s5", "--target", "s6", "--log_every", "1", "--device", "cpu",
               "--out_dir", Path(folder, f"out-{time.time()}")]
    start = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            if line.split()[:2] == ["step", "1"]:
                break
        seconds = time.perf_counter() - start
        process.kill()
    return seconds


def bench_start(args):
    with tempfile.TemporaryDirectory() as folder:
        write_sets(folder, 7, 257, 3_000_000)  # as large as the sample's
        seconds = [first_step(folder) for _ in range(args.rounds)]
    print(f"first step after {np.median(seconds):.2f} s, the median of {args.rounds}")


# ---- preparation ---------------------------------------------------------------------------------

def write_inputs(folder, n_chars):
    """Python code on this machine as one file, as records and as examples -> the files' names."""
    paths = sorted(Path(sysconfig.get_path("stdlib")).rglob("*.py"))
    text = "".join(path.read_text(encoding="utf-8", errors="ignore") for path in paths)
    text = (text * (n_chars // len(text) + 1))[:n_chars]
    (folder / "text.txt").write_text(text, encoding="utf-8")
    with open(folder / "records.jsonl", "w") as records:
        for i in range(0, n_chars, 2000):
            records.write(json.dumps({"text": text[i:i + 2000]}) + "\n")
    with open(folder / "examples.jsonl", "w") as examples:
        for i in range(0, n_chars, 300):
            pair = {"prompt": text[i:i + 100], "response": text[i + 100:i + 300]}
            examples.write(json.dumps(pair) + "\n")
    return ["text.txt", "records.jsonl", "examples.jsonl"]


def prepare(folder, file, tokenizer):
    """Seconds of the whole program."""
    command = [sys.executable, HERE.parent / "prepare_data.py", f"x={file}",
               "--tokenizer", tokenizer]
    start = time.perf_counter()
    subprocess.run(command, cwd=folder, stdout=subprocess.DEVNULL, check=True)
    seconds = time.perf_counter() - start
    shutil.rmtree(folder / "data")
    return seconds


def bench_prepare(args):
    tokenizer = args.tokenizer
    if tokenizer.endswith(".tiktoken"):
        tokenizer = str(Path(tokenizer).resolve())
    print(f"| {args.tokenizer}, {args.mb} MB | MB/s |\n| --- | ---: |")
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        for file in write_inputs(folder, args.mb * 1_000_000):
            seconds = [prepare(folder, file, tokenizer) for _ in range(args.rounds)]
            print(f"| {file} | {args.mb / np.median(seconds):.1f} |", flush=True)


# ---- the command line ----------------------------------------------------------------------------

def main():
    parts = {"loss": bench_loss, "runs": bench_runs, "start": bench_start,
             "prepare": bench_prepare}
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("part", choices=parts)
    p.add_argument("--rounds", type=int, default=5)
    p.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    p.add_argument("--V", type=int, default=257, help="token ids (257)")
    p.add_argument("--C", type=int, default=128, help="channels of the loss (128)")
    p.add_argument("--N", type=int, default=1024, help="tokens of the loss (1024)")
    p.add_argument("--K", type=int, default=6, help="sources of the loss (6)")
    p.add_argument("--memory_of", type=int, help=argparse.SUPPRESS)
    p.add_argument("--Ks", type=int, nargs="+", default=[4, 16, 64], help="sources of the runs")
    p.add_argument("--steps", type=int, default=20, help="timed steps per turn (20)")
    p.add_argument("--compile", action="store_true")
    for flag, default in MODEL_FLAGS.items():
        p.add_argument(f"--{flag}", type=int, default=default)
    p.add_argument("--tokenizer", default="bytes", help="of prepare: bytes or FILE.tiktoken")
    p.add_argument("--mb", type=int, default=50, help="million characters of text (50)")
    args = p.parse_args()
    parts[args.part](args)


if __name__ == "__main__":
    main()

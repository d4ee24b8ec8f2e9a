"""
How fast prepare_data.py is: MB of UTF-8 text per second, by the number of threads.

    python tests/bench_prepare.py
    python tests/bench_prepare.py --tokenizer gpt2.tiktoken --workers 1,2,4 --mb 50

The text is the Python code on this machine, as one file, as records of 2,000 characters, and as
examples with prompts of 100 and responses of 200 characters. Each row is the median of whole
programs, start included; CPU is their time on all cores together. The files must not depend on the
number of threads.
"""
import argparse
import hashlib
import json
import os
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def pieces(size, n_chars):
    """Python code on this machine in pieces of so many characters, n_chars in all."""
    while n_chars > 0:  # from the beginning again, if there is less of it
        for folder in ("stdlib", "purelib"):
            for path in sorted(Path(sysconfig.get_path(folder)).rglob("*.py")):
                text = path.read_text(encoding="utf-8", errors="ignore")
                for i in range(0, len(text), size):
                    if n_chars > 0:
                        yield text[i:i + size][:n_chars]
                    n_chars -= min(size, len(text) - i)


def write_inputs(folder, n_chars):
    """-> names of the files"""
    with open(folder / "text.txt", "w", encoding="utf-8") as f:
        f.writelines(pieces(2000, n_chars))
    with open(folder / "records.jsonl", "w") as f:
        for text in pieces(2000, n_chars):
            f.write(json.dumps({"text": text}) + "\n")
    with open(folder / "examples.jsonl", "w") as f:
        for text in pieces(300, n_chars):
            f.write(json.dumps({"prompt": text[:100], "response": text[100:]}) + "\n")
    return ["text.txt", "records.jsonl", "examples.jsonl"]


def prepare(folder, file, tokenizer, workers):
    """-> seconds, seconds of CPU, peak memory in MB, a hash of the files"""
    command = [sys.executable, ROOT / "prepare_data.py", f"x={file}", "--overwrite", "--tokenizer",
               tokenizer, "--workers", str(workers)]
    started = time.perf_counter()
    process = subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - started
    assert status == 0
    written = hashlib.sha256()
    for path in sorted((folder / "data" / "x").iterdir()):
        with open(path, "rb") as f:
            while chunk := f.read(1 << 20):
                written.update(chunk)
    cpu = usage.ru_utime + usage.ru_stime
    return seconds, cpu, usage.ru_maxrss / 1024, written.hexdigest()


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", default="bytes")
    parser.add_argument("--workers", default="1,2", help="numbers of threads")
    parser.add_argument("--mb", type=int, default=100, help="million characters of text")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    tokenizer = args.tokenizer
    if tokenizer.endswith(".tiktoken"):
        tokenizer = str(Path(tokenizer).resolve())

    print(f"tokenizer {args.tokenizer}, {args.mb} MB, {os.cpu_count()} cores")
    print(f"{'input':16}{'threads':>8}{'MB/s':>8}{'best':>8}{'CPU s':>8}{'peak MB':>9}")
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        for file in write_inputs(folder, args.mb * 1_000_000):
            runs = {int(workers): [] for workers in args.workers.split(",")}
            # by turns, so that what else the machine does meets all of them
            for _ in range(args.repeats):
                for workers, found in runs.items():
                    found.append(prepare(folder, file, tokenizer, workers))
            written = set()
            for workers, found in runs.items():
                seconds, cpu, peak, hashes = zip(*found)
                written |= set(hashes)
                print(f"{file:16}{workers:>8}{args.mb / statistics.median(seconds):>8.1f}"
                      f"{args.mb / min(seconds):>8.1f}{statistics.median(cpu):>8.2f}"
                      f"{max(peak):>9.0f}", flush=True)
            assert len(written) == 1, file


if __name__ == "__main__":
    main()

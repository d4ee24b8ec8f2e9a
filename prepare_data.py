"""
Text in, token files out: data/NAME/{train,val,test}.bin and meta.json for each data source.

    python prepare_data.py                                       the sample set, from text this machine already has
    python prepare_data.py code=src/ web='crawl/*.jsonl.gz'      your own: NAME=PATH, a file, a folder or a quoted glob
    python prepare_data.py books=books.txt --tokenizer gpt2

.jsonl and .jsonl.gz hold one document a line under --text_key; any other file is one UTF-8 document. Documents, not
tokens, are divided over train, val and test, by a hash of their content: the division does not depend on their order,
and a duplicated document never sits on both sides. The .bin files follow nanoGPT: flat uint16 (uint32 above 65,535
ids), documents ended by <|endoftext|>. Everything is streamed, so memory stays flat however large the input is.
"""
import argparse
import ast
import base64
import glob
import gzip
import hashlib
import importlib.util
import io
import json
import os
import platform
import re
import shutil
import sys
import sysconfig
import threading
import time
import warnings
from pathlib import Path

import numpy as np
import tiktoken

SPLITS = ("train", "val", "test")
PIECE = 1 << 20  # characters read and tokenized at a time
FEW_DOCUMENTS = 100  # below this a split by document would be lopsided, so documents are cut into pieces first
SAMPLE = ("python", "cpp", "prose", "math", "legal", "noise", "numpy")  # six sources and a target
SAMPLE_CHARS = 4_000_000  # at most this much of each sample source
NETWORK_TIMEOUT = 60  # seconds; tiktoken itself would wait for ever


def fail(message):
    """Ends the program with one line on stderr and exit status 2."""
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


# ---------------------------------------------------------------------------------------------------------------------
# tokenizers

def bytes_tokenizer():
    """256 single bytes and <|endoftext|>. The pattern only sets how much text is looked at at once: nothing merges."""
    ranks = {bytes([i]): i for i in range(256)}
    return tiktoken.Encoding("bytes", pat_str=r"(?s:.{1,32})", mergeable_ranks=ranks,
                             special_tokens={"<|endoftext|>": 256})


def file_tokenizer(path):
    """A .tiktoken file (base64 token, space, rank on each line), split into words as gpt2 does."""
    ranks = {}
    for number, line in enumerate(Path(path).read_bytes().splitlines(), 1):
        try:
            if line:
                token, rank = line.split()
                ranks[base64.b64decode(token, validate=True)] = int(rank)
        except ValueError:
            fail(f"{path}, line {number}: {line[:40]!r} is not 'base64-token rank'")
    if len(ranks) < 256 or sorted(ranks.values()) != list(range(len(ranks))):
        fail(f"{path}: ranks must run from 0 without a gap and cover the 256 bytes; found {len(ranks)} tokens")
    pattern = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
    digest = hashlib.sha256(Path(path).read_bytes()).hexdigest()[:12]  # two files of one name are two tokenizers
    return tiktoken.Encoding(f"{Path(path).name}:{digest}", pat_str=pattern, mergeable_ranks=ranks,
                             special_tokens={"<|endoftext|>": len(ranks)})


def get_tokenizer(name):
    """`bytes`, a .tiktoken file, or a tiktoken encoding, which comes from its cache or the network."""
    if name == "bytes":
        return bytes_tokenizer()
    if name.endswith(".tiktoken"):
        if not os.path.isfile(name):
            fail(f"--tokenizer {name}: no such file")
        return file_tokenizer(name)
    found = {}

    def load():
        try:
            found["tokenizer"] = tiktoken.get_encoding(name)
        except Exception as error:  # requests' many errors, and ValueError for an unknown name
            found["why"] = f"{type(error).__name__}: {str(error).splitlines()[0][:120]}"

    thread = threading.Thread(target=load, daemon=True)  # a daemon, so that a silent network cannot hold us up
    thread.start()
    thread.join(NETWORK_TIMEOUT)
    if "tokenizer" not in found:
        fail(f"--tokenizer {name} cannot be had ({found.get('why', f'no answer in {NETWORK_TIMEOUT} s')}); use "
             "--tokenizer bytes, which needs no network, or set TIKTOKEN_CACHE_DIR to a folder that holds its files")
    return found["tokenizer"]


# ---------------------------------------------------------------------------------------------------------------------
# the user's own text

def find_files(path):
    """A file, a folder (walked in sorted order, hidden names left out) or a glob -> list of files."""
    if os.path.isdir(path):
        files = []
        for folder, subfolders, names in os.walk(path):
            subfolders[:] = sorted(d for d in subfolders if not d.startswith("."))
            files += [os.path.join(folder, n) for n in sorted(names) if not n.startswith(".")]
    else:
        files = [path] if os.path.isfile(path) else sorted(filter(os.path.isfile, glob.glob(path, recursive=True)))
    if not files:
        fail(f"{path}: no file there (a file, a folder, or a glob in quotes)")
    return files


def is_jsonl(path):
    return str(path).endswith((".jsonl", ".jsonl.gz"))


def json_lines(path, text_key, position):
    """Yields the text of each line. position[0] follows the bytes read, compressed ones where the file is."""
    number = 0
    try:
        with open(path, "rb") as raw, (gzip.open(raw) if str(path).endswith(".gz") else raw) as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    record = json.loads(line)
                    if not isinstance(record, dict) or not isinstance(record.get(text_key), str):
                        keys = ", ".join(list(record)[:8]) if isinstance(record, dict) else type(record).__name__
                        fail(f"{path}, line {number}: no text under the key '{text_key}' (found: {keys}); "
                             "name the right one with --text_key")
                    position[0] = raw.tell()
                    yield record[text_key]
    except UnicodeDecodeError:
        fail(f"{path}, line {number}: not UTF-8; convert it first, for instance with iconv")
    except ValueError as error:
        fail(f"{path}, line {number}: not JSON ({error})")
    except (gzip.BadGzipFile, EOFError) as error:
        fail(f"{path}: broken gzip file after line {number} ({error})")


def text_pieces(stream, size):
    """Cuts an open text into pieces of about `size` characters, at a line's end where one is near."""
    while piece := stream.read(size):
        yield piece + stream.readline(size)


def file_pieces(path, size, position):
    with open(path, encoding="utf-8", newline="") as stream:  # newline="": keep line ends as they are
        try:
            for piece in text_pieces(stream, size):
                position[0] = stream.buffer.tell()
                yield piece
        except UnicodeDecodeError as error:
            offset = stream.buffer.tell() - len(error.object) + error.start
            fail(f"{path}: not UTF-8 at byte {offset} ({error.reason}); convert it first, for instance with iconv, or "
                 "leave it out with a glob")


def document_pieces(documents, size):
    """Yields (starts a document, piece) for documents that are whole in memory."""
    for document in documents:
        for i, piece in enumerate(text_pieces(io.StringIO(document, newline=""), size)):
            yield i == 0, piece


def own_pieces(files, text_key, size, quiet=True):
    """The same, streamed from files: a document of many GB passes through little memory."""
    sizes = [os.path.getsize(f) for f in files]
    started = shown = time.time()
    for k, path in enumerate(files):
        position = [0]
        if is_jsonl(path):
            pieces = document_pieces(json_lines(path, text_key, position), size)
        else:
            pieces = ((i == 0, piece) for i, piece in enumerate(file_pieces(path, size, position)))
        for starts, piece in pieces:
            yield starts, piece
            if not quiet and time.time() - shown > 2:
                shown, done = time.time(), sum(sizes[:k]) + position[0]
                rate = done / (shown - started)
                print(f"    {done / 1e6:,.0f} of {sum(sizes) / 1e6:,.0f} MB, {rate / 1e6:.1f} MB/s, "
                      f"{(sum(sizes) - done) / max(rate, 1):.0f} s left", flush=True)


# ---------------------------------------------------------------------------------------------------------------------
# the sample: text that every machine with Python and requirements.txt already has, read where it is installed

def package_dir(name):
    """Where a package is installed, without importing it."""
    spec = importlib.util.find_spec(name)
    return Path(spec.origin).parent if spec and spec.origin else Path("/nonexistent")


def listing(root, pattern, leave_out=()):
    """Files below root, sorted, then in an order by hash, so that a cap on the size takes a fair sample of them."""
    leave_out = {*leave_out, "test", "tests", "__pycache__", "site-packages", "dist-packages"}
    paths = sorted(p for p in root.rglob(pattern) if not leave_out & set(p.relative_to(root).parts) and p.is_file())
    return sorted(paths, key=lambda p: hashlib.sha256(p.relative_to(root).as_posix().encode()).digest())


def read_all(paths):
    for path in paths:
        text = path.read_bytes().decode("utf-8", "ignore")
        if text.strip():
            yield text


def docstrings(paths):
    """Docstrings longer than 80 characters, each once. Parsed, never imported."""
    seen = set()
    for text in read_all(paths):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # such as invalid escapes in other people's files
                tree = ast.parse(text)
        except (SyntaxError, ValueError):
            continue
        for node in ast.walk(tree):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                doc = ast.get_docstring(node)
                if doc and len(doc) > 80 and doc not in seen:
                    seen.add(doc)
                    yield doc


def pydoc_topics(stdlib):
    """The texts behind help('if'): string values of one dict literal."""
    for text in read_all(listing(stdlib / "pydoc_data", "topics.py")):
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Dict):
                yield from (v.value for v in node.values if isinstance(v, ast.Constant) and len(v.value) > 80)


def licences(site):
    """Paragraphs of licence texts, each once: what is left is small, so a model that likes it must repeat it."""
    seen = set()
    names = re.compile(r"(LICEN[CS]E|COPYING|NOTICE)[^/]*$", re.IGNORECASE)
    for text in read_all(p for p in listing(site, "*") if names.match(p.name) and p.suffix not in (".py", ".pyc")):
        for paragraph in re.split(r"\n\s*\n", text):
            words = " ".join(paragraph.split())
            if words and words not in seen:
                seen.add(words)
                yield paragraph.strip("\n")


def noise(samples, seed):
    """Shuffled words of the other sources: right letters, no order. A control: its weight should end near zero."""
    words = [w for documents in samples.values() for w in "".join(documents)[: SAMPLE_CHARS // len(samples)].split()]
    np.random.default_rng(seed).shuffle(words)
    return [" ".join(words[i: i + 300]) for i in range(0, len(words), 300)]


def sample_sets(seed):
    """{name: documents} of the six sample sources and the target `numpy`; says which ones this machine lacks."""
    stdlib, torch, site = Path(sysconfig.get_path("stdlib")), package_dir("torch"), Path(sysconfig.get_path("purelib"))
    not_stdlib = ("idlelib", "tkinter", "lib2to3", "ensurepip")
    code = [p for p in listing(stdlib, "*.py", not_stdlib) if not p.name.startswith("_sysconfigdata")]
    headers = listing(torch / "include" / "c10", "*.h") + listing(torch / "include" / "torch" / "csrc", "*.h")
    found = {
        "python": read_all(code),
        "cpp": read_all(headers),
        "prose": [*pydoc_topics(stdlib), *docstrings(code)],
        "math": docstrings(listing(package_dir("sympy"), "*.py")),
        "legal": licences(site),
        "numpy": read_all(listing(package_dir("numpy"), "*.py")),
    }
    sets = {}
    for name, documents in found.items():
        kept, chars = [], 0
        for document in documents:
            if chars + len(document) <= SAMPLE_CHARS:
                kept.append(document)
                chars += len(document)
            elif chars > 0.95 * SAMPLE_CHARS:
                break
        sets[name] = kept
        if not kept:
            print(f"  {name:8s} not found on this machine, left out")
    sets = {name: kept for name, kept in sets.items() if kept}
    sources = {name: kept for name, kept in sets.items() if name != "numpy"}
    if len(sources) < 2:
        fail(f"only {len(sources)} of the sample's sources found on this machine; prepare your own with NAME=PATH")
    return sources | {"noise": noise(sources, seed)} | {name: sets[name] for name in sets.keys() - sources.keys()}


# ---------------------------------------------------------------------------------------------------------------------
# writing

class TokenFile:
    """One split's .bin on its way to the disk, with its counts."""

    def __init__(self, path, dtype):
        self.file, self.dtype, self.digest = open(path, "wb"), dtype, hashlib.sha256()
        self.tokens = self.bytes = self.documents = 0

    def write(self, ids, n_bytes=0):
        data = np.asarray(ids, dtype=self.dtype).tobytes()
        self.file.write(data)
        self.digest.update(data)
        self.tokens += len(ids)
        self.bytes += n_bytes

    def close(self):
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()
        return {"tokens": self.tokens, "bytes": self.bytes, "documents": self.documents,
                "sha256": self.digest.hexdigest()}


def which_split(raw, seed, val_fraction, test_fraction):
    """The split of a text, from a hash of its content: uniform on [0, 1), the same wherever the text turns up."""
    digest = hashlib.blake2b(raw, digest_size=8, key=str(seed).encode()).digest()
    u = int.from_bytes(digest, "big") / 2**64
    return "val" if u < val_fraction else "test" if u < val_fraction + test_fraction else "train"


def write_set(name, pieces, within_documents, tokenizer, args, fractions):
    """
    Tokenizes pieces into data_dir/name, fractions (of val, of test) split off. The folder appears whole or not at all:
    it is renamed when complete.
    """
    dtype = "uint16" if tokenizer.n_vocab <= 65_536 else "uint32"
    final, partial = Path(args.data_dir, name), Path(args.data_dir, f".{name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # what a killed run left
    try:
        partial.mkdir(parents=True)
        files = {split: TokenFile(partial / f"{split}.bin", dtype) for split in SPLITS}
        split = None  # of the document being written
        for starts, piece in pieces:
            raw = piece.encode("utf-8", "replace")  # JSON can hold lone surrogates, which no tokenizer takes
            # a long document goes where its first piece (1 MiB) goes; without many documents, each piece by itself
            goes_to = which_split(raw, args.seed, *fractions) if starts or within_documents else split
            if split and (starts or goes_to != split):
                files[split].write([tokenizer.eot_token])
            if starts or goes_to != split:
                files[goes_to].documents += 1
            split = goes_to
            files[split].write(tokenizer.encode_to_numpy(raw.decode(), disallowed_special=()), len(raw))
        if split:
            files[split].write([tokenizer.eot_token])
        splits = {split: file.close() for split, file in files.items()}
        for split in SPLITS:
            if splits[split]["tokens"] == 0:
                fail(f"{name}: its {split} split is empty ({sum(s['bytes'] for s in splits.values())} bytes of text in "
                     "all); give it more text or larger --val_fraction and --test_fraction")
        meta = {"name": name, "tokenizer": tokenizer.name, "vocab_size": tokenizer.n_vocab,
                "eot_token": tokenizer.eot_token, "dtype": dtype, "split_within_documents": within_documents,
                "settings": settings(args), "splits": splits,
                "versions": {"python": platform.python_version(), "numpy": np.__version__,
                             "tiktoken": tiktoken.__version__}}
        with open(partial / "meta.json", "w") as f:
            json.dump(meta, f, indent=1)
            f.flush()
            os.fsync(f.fileno())
        shutil.rmtree(final, ignore_errors=True)  # only here with --overwrite
        os.replace(partial, final)
    except OSError as error:
        fail(f"cannot write {partial}: {error.strerror}; nothing of {name} was changed")
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    within = ", split within documents" if within_documents else ""
    print(f"  {name:8s}" + "".join(f" {splits[s]['tokens']:>12,} {s}" for s in SPLITS)
          + f"   ({sum(s['documents'] for s in splits.values()):,} documents{within})", flush=True)


def settings(args):
    """The flags that a prepared set depends on beside its text."""
    return {"tokenizer": args.tokenizer, "seed": args.seed, "val_fraction": args.val_fraction,
            "test_fraction": args.test_fraction}


def piece_size(n_documents, n_chars):
    """(within documents?, characters a piece). Few documents are cut fine enough for every split to get a share."""
    few = n_documents < FEW_DOCUMENTS
    return few, (min(max(n_chars // 1000, 256), 65_536) if few else PIECE)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     usage="python prepare_data.py [NAME=PATH ...] [options]   (--help for all)")
    parser.add_argument("sets", nargs="*", metavar="NAME=PATH", help="a set's name and its text; none: the sample")
    parser.add_argument("--tokenizer", default="bytes",
                        help="bytes, gpt2, cl100k_base, another tiktoken encoding, or FILE.tiktoken (default: bytes)")
    parser.add_argument("--text_key", default="text", help="key of the text in JSON lines (default: text)")
    parser.add_argument("--data_dir", default="data", help="folder of the prepared sets (default: data)")
    parser.add_argument("--val_fraction", type=float, default=0.05, help="share of documents in val (default: 0.05)")
    parser.add_argument("--test_fraction", type=float, default=0.05, help="share of documents in test (default: 0.05)")
    parser.add_argument("--seed", type=int, default=1337, help="of the split and of `noise` (default: 1337)")
    parser.add_argument("--overwrite", action="store_true", help="replace prepared sets of the same name")
    args = parser.parse_args()
    if not (args.val_fraction > 0 and args.test_fraction > 0 and args.val_fraction + args.test_fraction < 1):
        fail(f"--val_fraction {args.val_fraction} and --test_fraction {args.test_fraction} must be above 0 and leave "
             "something to train on")
    given = {}
    for pair in args.sets:
        name, _, path = pair.partition("=")
        if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", name) or not path:
            fail(f"{pair!r} is not NAME=PATH (a name of letters, digits, '_', '.', '-')")
        if name in given:
            fail(f"the name {name} is given twice")
        if Path(args.data_dir, name).exists() and not args.overwrite:
            fail(f"{Path(args.data_dir, name)} exists; choose another name or add --overwrite")
        given[name] = find_files(path)
    tokenizer = get_tokenizer(args.tokenizer)

    started = time.time()
    print(f"tokens written to {args.data_dir}/ with the {tokenizer.name} tokenizer ({tokenizer.n_vocab:,} ids)")
    for name, files in given.items():
        n_documents = 0
        for path in files:  # only as many as decide whether there are few
            lines = json_lines(path, args.text_key, [0]) if is_jsonl(path) else [path]
            n_documents += sum(1 for _, line in zip(range(FEW_DOCUMENTS), lines))
            if n_documents >= FEW_DOCUMENTS:
                break
        few, size = piece_size(n_documents, sum(os.path.getsize(f) for f in files))
        write_set(name, own_pieces(files, args.text_key, size, quiet=False), few, tokenizer, args,
                  (args.val_fraction, args.test_fraction))
    there = [name for name in SAMPLE if not given and Path(args.data_dir, name).exists() and not args.overwrite]
    for name in there:
        try:
            same = json.loads(Path(args.data_dir, name, "meta.json").read_text())["settings"] == settings(args)
        except (OSError, ValueError, KeyError):
            same = False
        if not same:
            fail(f"{Path(args.data_dir, name)} exists, prepared with other settings; add --overwrite to replace it")
        print(f"  {name:8s} is there already, kept")
    if not given and len(there) < len(SAMPLE):
        for name, documents in sample_sets(args.seed).items():
            if name in there:
                continue
            # nothing trains on the target: all but a tenth of its 200 files is there to measure with
            fractions = (0.45, 0.45) if name == "numpy" else (args.val_fraction, args.test_fraction)
            few, size = piece_size(len(documents), sum(map(len, documents)))
            write_set(name, document_pieces(documents, size), few, tokenizer, args, fractions)
    print(f"done in {time.time() - started:.0f} s")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        print("\nstopped; the set being written was left out", file=sys.stderr)
        sys.exit(130)

"""
Text in, token files out: data/NAME/{train,val,test}.bin and meta.json for each data source.

    python prepare_data.py                                       the sample set, from text this machine already has
    python prepare_data.py code=src/ web='crawl/*.jsonl.gz'      your own: NAME=PATH, a file, a folder or a quoted glob
    python prepare_data.py books=books.txt --tokenizer gpt2
    python prepare_data.py chat=chat.jsonl qa=qa.jsonl           instructions: prompts are read, responses are learned

.jsonl and .jsonl.gz hold one document a line under --text_key, or one example with a prompt and a response (see
read_record); any other file is one UTF-8 document. Documents, not tokens, are divided over train, val and test, by a
hash of their content: the division does not depend on their order, and a duplicated document never sits on both sides.
The .bin files follow nanoGPT: flat uint16 (uint32 above 65,535 ids), documents ended by <|endoftext|>. Beside those of
examples lies SPLIT.mask.bin, uint8: 1 where the token is learned, 0 where it is only read. Everything is streamed, so
memory stays flat however large the input is.
"""
import argparse
import ast
import base64
import doctest
import glob
import gzip
import hashlib
import importlib.util
import io
import itertools
import json
import os
import platform
import re
import shutil
import sys
import sysconfig
import textwrap
import threading
import time
import unicodedata
import warnings
from pathlib import Path

import numpy as np
import tiktoken

SPLITS = ("train", "val", "test")
PIECE = 1 << 20  # characters read and tokenized at a time
FEW_DOCUMENTS = 100  # below this a split by document would be lopsided, so documents are cut into pieces first
SAMPLE = ("python", "cpp", "prose", "math", "legal", "noise", "numpy",  # six sources and a target
          "describe", "implement", "evaluate", "declare", "unicode", "numpy_tasks")  # instructions and a target
SAMPLE_TARGETS = ("numpy", "numpy_tasks")
SAMPLE_CHARS = 4_000_000  # at most this much of each sample source
EXAMPLE_CHARS, DOCTEST_CHARS, ANSWER_CHARS = 250, 120, 30  # longest example of the sample, doctest, what it prints
PAIRS = (("prompt", "response"), ("question", "answer"), ("instruction", "output"))  # keys of a prompt and a response
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


def example(prompt, response):
    """A prompt and its response as parts (text, learned?); on two lines, unless the prompt ends in white space."""
    return [(prompt if not prompt or prompt[-1].isspace() else prompt + "\n", False), (response, True)]


def read_record(record, args):
    """
    A line's JSON object -> (its schema, its parts [(text, learned?), ...]). Without --text_key or --prompt_key the
    schema is the first of these whose keys it has: chat `messages` (a list of role and content; each turn becomes
    "role: content", the assistant's contents and line ends are learned), prompt/response, question/answer,
    instruction(+input)/output, text. Raises ValueError with a line for the user.
    """
    if not isinstance(record, dict):
        raise ValueError(f"a JSON object is needed, not a {type(record).__name__}")

    def text(key, mend):
        if not isinstance(record.get(key), str):
            raise ValueError(f"no text under the key '{key}' (found: {', '.join(list(record)[:8])}); {mend}")
        return record[key]

    pairs = [(args.prompt_key, args.response_key)] if args.prompt_key else [] if args.text_key else PAIRS
    if "messages" in record and not args.text_key and not args.prompt_key:
        parts, turns = [], record["messages"]
        if not (isinstance(turns, list) and all(isinstance(t, dict) and isinstance(t.get("role"), str)
                                                and isinstance(t.get("content"), str) for t in turns)):
            raise ValueError("'messages' must be a list of objects with a 'role' and a 'content', both text")
        if not any(t["role"] == "assistant" for t in turns):
            raise ValueError("'messages' has no assistant turn, so nothing in it is learned; leave it out")
        for i, turn in enumerate(turns):
            learned = turn["role"] == "assistant"
            if learned and not turn["content"].strip():
                raise ValueError(f"the assistant's turn {i + 1} in 'messages' is empty; leave the example out")
            end = "\n" if i < len(turns) - 1 else ""  # the last turn is ended by <|endoftext|>
            parts += [(f"{turn['role']}: ", False), (turn["content"] + end, learned)]
        return "messages", parts
    for prompt_key, response_key in pairs:
        if args.prompt_key or (prompt_key in record and response_key in record):
            mend = "name the right ones with --prompt_key and --response_key"
            prompt, response = text(prompt_key, mend), text(response_key, mend)
            if prompt_key == "instruction" and record.get("input"):
                prompt += "\n" + text("input", "it may be left out")
            if not response.strip():
                raise ValueError(f"the response under '{response_key}' is empty; leave the example out")
            return f"{prompt_key}/{response_key}", example(prompt, response)
    return "text", [(text(args.text_key or "text", "name the right one with --text_key"), True)]


def json_lines(path, args, position, schema=None):
    """Yields (schema, parts) of each line. position[0] follows the bytes read, compressed ones where the file is."""
    number = 0
    try:
        with open(path, "rb") as raw, (gzip.open(raw) if str(path).endswith(".gz") else raw) as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    try:
                        record = json.loads(line)
                    except UnicodeDecodeError:
                        fail(f"{path}, line {number}: not UTF-8; convert it first, for instance with iconv")
                    except ValueError as error:
                        fail(f"{path}, line {number}: not JSON ({error})")
                    found, parts = read_record(record, args)
                    schema = schema or found
                    if found != schema:
                        raise ValueError(f"it is of the schema {found}, but the lines before it are of {schema}; "
                                         "prepare them as two sets")
                    position[0] = raw.tell()
                    yield schema, parts
    except (gzip.BadGzipFile, EOFError) as error:
        fail(f"{path}: broken gzip file after line {number} ({error})")
    except ValueError as error:
        fail(f"{path}, line {number}: {error}")


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
    """Yields (starts a document, parts) for documents that are whole in memory: texts, or parts, which are not cut."""
    for document in documents:
        if isinstance(document, str):
            for i, piece in enumerate(text_pieces(io.StringIO(document, newline=""), size)):
                yield i == 0, [(piece, True)]
        else:
            yield True, document


def own_pieces(files, args, schema, size, quiet=True):
    """The same, streamed from files: a document of many GB passes through little memory."""
    sizes = [os.path.getsize(f) for f in files]
    started = shown = time.time()
    for k, path in enumerate(files):
        position = [0]
        if is_jsonl(path):
            lines = (parts for _, parts in json_lines(path, args, position, schema))
            pieces = document_pieces((p[0][0] if schema == "text" else p for p in lines), size)
        elif schema == "text":
            pieces = ((i == 0, [(piece, True)]) for i, piece in enumerate(file_pieces(path, size, position)))
        else:
            fail(f"{path} is plain text, but the set began with the schema {schema}; prepare them as two sets")
        for starts, parts in pieces:
            yield starts, parts
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


def read_python(paths):
    """
    Python files, parsed and never imported -> {"docstrings": those longer than 80 characters} and instructions (prompt,
    response) of three kinds: describe (a function's signature, and its docstring's first paragraph), implement (both of
    these, and the body) and evaluate (a doctest after as many of the lines before it as have room, and what it prints).
    The values are dicts, for each thing once and in order.
    """
    found = {"docstrings": {}, "describe": {}, "implement": {}, "evaluate": {}}
    for text in read_all(paths):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # such as invalid escapes in other people's files
                tree = ast.parse(text)
        except (SyntaxError, ValueError):
            continue
        lines = text.splitlines()
        for node in ast.walk(tree):
            documented = isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef))
            doc = ast.get_docstring(node) if documented else None
            if not doc:
                continue
            if len(doc) > 80:
                found["docstrings"][doc] = None
            if isinstance(node, ast.FunctionDef):
                signature = f"def {node.name}({ast.unparse(node.args)}):"
                about = " ".join(doc.split("\n\n")[0].split())
                found["describe"][signature, f'    """{about}"""'] = None
                if len(node.body) > 1:
                    body = textwrap.dedent("\n".join(lines[node.body[1].lineno - 1: node.end_lineno]))
                    found["implement"][f'{signature}\n    """{about}"""', textwrap.indent(body, "    ")] = None
            if ">>>" in doc:
                found["evaluate"] |= dict.fromkeys(doctests(doc))
    return found


def tasks(pairs):
    """Those that are short, as examples."""
    return [example(prompt, response) for prompt, response in pairs
            if response.strip() and len(prompt) + len(response) < EXAMPLE_CHARS]


def doctests(doc):
    """Yields (prompt, what is printed) of a docstring's doctests, those that print little."""
    try:
        examples = doctest.DocTestParser().get_examples(doc)
    except ValueError:  # it only looks like one
        return
    before = []
    for e in examples:
        prompt = "".join(f"{'...' if i else '>>>'} {line}\n" for i, line in enumerate(e.source.splitlines()))
        room = DOCTEST_CHARS - len(prompt + e.want)
        context = []
        for shown in reversed(before):
            room -= len(shown)
            if room < 0:
                break
            context.insert(0, shown)
        if len(prompt + e.want) < DOCTEST_CHARS and len(e.want) <= ANSWER_CHARS:
            yield "".join(context) + prompt, e.want.rstrip()
        before.append(prompt + e.want)


def declarations(headers):
    """A C++ comment -> the declaration that follows it, (prompt, response) each once."""
    pattern = re.compile(r"((?:^[ \t]*//[^\n]*\n)+)([^\n/][^;{]*[;{])", re.MULTILINE)
    return dict.fromkeys(pair for text in read_all(headers) for pair in pattern.findall(text))


def characters():
    """A character's name in Unicode -> its code and the character itself. For tasks without any of it, a control."""
    for code in range(0x20, 0x20000):
        name = unicodedata.name(chr(code), "")
        if name and not name.startswith(("CJK", "HANGUL SYLLABLE")):  # named by number and by rule
            yield name, f"U+{code:04X} {chr(code)}"


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
    """{name: documents} of the sample's sets, those in SAMPLE; says which ones this machine lacks."""
    stdlib, torch, site = Path(sysconfig.get_path("stdlib")), package_dir("torch"), Path(sysconfig.get_path("purelib"))
    not_stdlib = ("idlelib", "tkinter", "lib2to3", "ensurepip")
    code = [p for p in listing(stdlib, "*.py", not_stdlib) if not p.name.startswith("_sysconfigdata")]
    headers = listing(torch / "include" / "c10", "*.h") + listing(torch / "include" / "torch" / "csrc", "*.h")
    from_code, from_sympy = read_python(code), read_python(listing(package_dir("sympy"), "*.py"))
    numpy = listing(package_dir("numpy"), "*.py")
    from_numpy = read_python(numpy)
    found = {
        "python": read_all(code),
        "cpp": read_all(headers),
        "prose": [*pydoc_topics(stdlib), *from_code["docstrings"]],
        "math": from_sympy["docstrings"],
        "legal": licences(site),
        "numpy": read_all(numpy),
        **{kind: tasks(from_code[kind] | from_sympy[kind]) for kind in ("describe", "implement", "evaluate")},
        "declare": tasks(declarations(headers)),
        "unicode": tasks(characters()),
        "numpy_tasks": [e for kind in ("describe", "implement", "evaluate") for e in tasks(from_numpy[kind])],
    }
    sets = {}
    for name, documents in found.items():
        kept, chars = [], 0
        for document in documents:
            size = len(document) if isinstance(document, str) else sum(len(text) for text, _ in document)
            if chars + size <= SAMPLE_CHARS:
                kept.append(document)
                chars += size
            elif chars > 0.95 * SAMPLE_CHARS:
                break
        if kept:
            sets[name] = kept
        else:
            print(f"  {name:11s} not found on this machine, left out")
    texts = {name: kept for name, kept in sets.items() if isinstance(kept[0], str) and name not in SAMPLE_TARGETS}
    if len(texts) < 2:
        fail(f"only {len(texts)} of the sample's sources found on this machine; prepare your own with NAME=PATH")
    sets["noise"] = noise(texts, seed)
    for documents in sets.values():  # examples of one file are alike, and packing puts neighbours together
        if not isinstance(documents[0], str):
            documents.sort(key=lambda parts: hashlib.sha256(repr(parts).encode()).digest())
    return {name: sets[name] for name in SAMPLE if name in sets}


# ---------------------------------------------------------------------------------------------------------------------
# writing

class SyncedFile:
    """A file on its way to the disk, with the hash of its content."""

    def __init__(self, path):
        self.file, self.digest = open(path, "wb"), hashlib.sha256()

    def write(self, values, dtype):
        data = np.asarray(values, dtype=dtype).tobytes()
        self.file.write(data)
        self.digest.update(data)

    def close(self):
        """Returns the hash once everything is on the disk."""
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()
        return self.digest.hexdigest()


class SplitFiles:
    """One split's .bin, for examples its .mask.bin as well, and their counts."""

    def __init__(self, folder, split, tokenizer, dtype, masked):
        self.bin, self.dtype, self.tokenizer = SyncedFile(folder / f"{split}.bin"), dtype, tokenizer
        self.mask = SyncedFile(folder / f"{split}.mask.bin") if masked else None
        self.counts = {"tokens": 0, "bytes": 0, "documents": 0} | ({"learned": 0, "learned_bytes": 0} if masked else {})

    def write(self, parts):
        """
        Tokenizes the parts' text as one, as a model will see it. A token that straddles a boundary between a prompt
        and a response is learned: it holds a part of the response, and is what the model has to say after the prompt's
        whole tokens.
        """
        raw = [text.encode("utf-8", "replace") for text, _ in parts]  # JSON can hold lone surrogates, no tokenizer can
        ids = self.tokenizer.encode_to_numpy(b"".join(raw).decode(), disallowed_special=())
        self.bin.write(ids, self.dtype)
        self.counts["tokens"] += len(ids)
        self.counts["bytes"] += sum(map(len, raw))
        if self.mask:
            learned = np.repeat([flag for _, flag in parts], [len(r) for r in raw])  # of each byte
            lengths = [len(self.tokenizer.decode_single_token_bytes(i)) for i in ids.tolist()]
            mask = np.logical_or.reduceat(learned, np.cumsum([0, *lengths[:-1]]))  # of each token
            self.mask.write(mask, np.uint8)
            self.counts["learned"] += int(mask.sum())
            self.counts["learned_bytes"] += sum(len(r) for r, (_, flag) in zip(raw, parts) if flag)

    def end_document(self, learned):
        self.bin.write([self.tokenizer.eot_token], self.dtype)
        self.counts["tokens"] += 1
        self.counts["documents"] += 1
        if self.mask:
            self.mask.write([learned], np.uint8)
            self.counts["learned"] += learned

    def close(self):
        hashes = {"sha256": self.bin.close()} | ({"mask_sha256": self.mask.close()} if self.mask else {})
        return self.counts | hashes


def which_split(raw, seed, val_fraction, test_fraction):
    """The split of a text, from a hash of its content: uniform on [0, 1), the same wherever the text turns up."""
    digest = hashlib.blake2b(raw, digest_size=8, key=str(seed).encode()).digest()
    u = int.from_bytes(digest, "big") / 2**64
    return "val" if u < val_fraction else "test" if u < val_fraction + test_fraction else "train"


def write_set(name, schema, pieces, within_documents, tokenizer, args, fractions):
    """
    Tokenizes pieces into data_dir/name, fractions (of val, of test) split off. The folder appears whole or not at all:
    it is renamed when complete.
    """
    dtype = "uint16" if tokenizer.n_vocab <= 65_536 else "uint32"
    final, partial = Path(args.data_dir, name), Path(args.data_dir, f".{name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # what a killed run left
    try:
        partial.mkdir(parents=True)
        files = {split: SplitFiles(partial, split, tokenizer, dtype, schema != "text") for split in SPLITS}
        split = None  # of the document being written
        for starts, parts in pieces:
            # a long document goes where its first piece (1 MiB) goes; without many documents, each piece by itself
            if starts or within_documents:
                raw = "".join(text for text, _ in parts).encode("utf-8", "replace")
                goes_to = which_split(raw, args.seed, *fractions)
            if split and (starts or goes_to != split):
                files[split].end_document(learned)
            split, learned = goes_to, parts[-1][1]
            files[split].write(parts)
        if split:
            files[split].end_document(learned)
        splits = {split: file.close() for split, file in files.items()}
        for split in SPLITS:
            if splits[split]["tokens"] == 0:
                fail(f"{name}: its {split} split is empty ({sum(s['bytes'] for s in splits.values())} bytes of text in "
                     "all); give it more text or larger --val_fraction and --test_fraction")
        meta = {"name": name, "schema": schema, "tokenizer": tokenizer.name, "vocab_size": tokenizer.n_vocab,
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
    total = {key: sum(s[key] for s in splits.values()) for key in splits["train"] if "sha256" not in key}
    note = ", split within documents" if within_documents else ""
    if schema != "text":
        note = f", {schema}, {total['learned'] / total['tokens']:.0%} of tokens learned"
    print(f"  {name:11s}" + "".join(f" {splits[s]['tokens']:>12,} {s}" for s in SPLITS)
          + f"   ({total['documents']:,} documents{note})", flush=True)


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
    parser.add_argument("--text_key", help="key of a document's text in JSON lines (default: text)")
    parser.add_argument("--prompt_key", help="key of an example's prompt in JSON lines (default: prompt, question or "
                                             "instruction, whichever a line has)")
    parser.add_argument("--response_key", help="key of its response (default: response, answer or output)")
    parser.add_argument("--data_dir", default="data", help="folder of the prepared sets (default: data)")
    parser.add_argument("--val_fraction", type=float, default=0.05, help="share of documents in val (default: 0.05)")
    parser.add_argument("--test_fraction", type=float, default=0.05, help="share of documents in test (default: 0.05)")
    parser.add_argument("--seed", type=int, default=1337, help="of the split and of `noise` (default: 1337)")
    parser.add_argument("--overwrite", action="store_true", help="replace prepared sets of the same name")
    args = parser.parse_args()
    if not (args.val_fraction > 0 and args.test_fraction > 0 and args.val_fraction + args.test_fraction < 1):
        fail(f"--val_fraction {args.val_fraction} and --test_fraction {args.test_fraction} must be above 0 and leave "
             "something to train on")
    if bool(args.prompt_key) != bool(args.response_key) or (args.text_key and args.prompt_key):
        fail("--prompt_key and --response_key go together, and not with --text_key")
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
        n_documents, schema = 0, None
        for path in files:  # only as many as decide whether there are few
            lines = json_lines(path, args, [0]) if is_jsonl(path) else [("text", path)]
            for schema_here, _ in itertools.islice(lines, FEW_DOCUMENTS):
                schema = schema or schema_here
                n_documents += 1
            if n_documents >= FEW_DOCUMENTS:
                break
        few, size = piece_size(n_documents, sum(os.path.getsize(f) for f in files))
        few, schema = few and schema == "text", schema or "text"  # an example is never cut
        write_set(name, schema, own_pieces(files, args, schema, size, quiet=False), few, tokenizer, args,
                  (args.val_fraction, args.test_fraction))
    there = [name for name in SAMPLE if not given and Path(args.data_dir, name).exists() and not args.overwrite]
    for name in there:
        try:
            same = json.loads(Path(args.data_dir, name, "meta.json").read_text())["settings"] == settings(args)
        except (OSError, ValueError, KeyError):
            same = False
        if not same:
            fail(f"{Path(args.data_dir, name)} exists, prepared with other settings; add --overwrite to replace it")
        print(f"  {name:11s} is there already, kept")
    if not given and len(there) < len(SAMPLE):
        for name, documents in sample_sets(args.seed).items():
            if name in there:
                continue
            # nothing trains on a target: all but a tenth of it is there to measure with
            fractions = (0.45, 0.45) if name in SAMPLE_TARGETS else (args.val_fraction, args.test_fraction)
            schema = "text" if isinstance(documents[0], str) else "prompt/response"
            few, size = piece_size(len(documents), sum(map(len, documents)))
            write_set(name, schema, document_pieces(documents, size), few and schema == "text", tokenizer, args,
                      fractions)
    print(f"done in {time.time() - started:.0f} s")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        print("\nstopped; the set being written was left out", file=sys.stderr)
        sys.exit(130)

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
memory stays flat however large the input is. The reader of these files, TokenSet, stands at the end.
"""
import argparse
import ast
import base64
import doctest
import glob
import gzip
import hashlib
import importlib.metadata
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

SPLITS = ("train", "val", "test")
IGNORE = -1  # a target of this value is not learned, and counts in no loss
SHORT_ANSWER = 32  # tokens, <|endoftext|> included: longest answer that a test of accuracy asks for
PIECE = 1 << 20  # characters read and tokenized at a time
FEW_DOCUMENTS = 100  # below this a split by document would be lopsided, so documents are cut into pieces first
SAMPLE_SOURCES, SAMPLE_TARGETS = ("python", "cpp", "prose", "math", "legal", "noise"), ("numpy", "numpy_tasks")
SAMPLE = (*SAMPLE_SOURCES, "numpy", "describe", "implement", "evaluate", "declare", "unicode", "numpy_tasks")
SAMPLE_CHARS = 4_000_000  # at most this much of each sample source
EXAMPLE_CHARS, DOCTEST_CHARS, ANSWER_CHARS = 250, 120, 30  # longest example of the sample, doctest, what it prints
PAIRS = (("prompt", "response"), ("question", "answer"), ("instruction", "output"))  # keys of a prompt and a response
NETWORK_TIMEOUT = 60  # seconds; tiktoken itself would wait for ever


def fail(message):
    """Ends the program with one line on stderr and exit status 2."""
    rank = int(os.environ.get("RANK", 0))
    if rank > 0:
        time.sleep(5)  # where rank 0 fails too it says so, and torchrun ends this process meanwhile
    print(f"error: {f'rank {rank}: ' if rank > 0 else ''}{message}", file=sys.stderr)
    sys.exit(2)


def print_anything():
    """A terminal that lacks a glyph, of a bar or in a path, must not stop a program; a notebook has no terminal."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")


def save_atomically(path, write):
    """write(file) into a temporary name, then rename: path holds the old content or the new, never a part."""
    partial = Path(f"{path}.partial")
    try:
        with open(partial, "wb") as f:
            write(f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(partial, path)
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as a RuntimeError
        partial.unlink(missing_ok=True)
        fail(f"cannot write {path} ({str(error).splitlines()[0]}); what was there before is unharmed. Mend that, then "
             "start again (a run of fastmix.py goes on with --resume)")


# ---- tokenizers -----------------------------------------------------------------------------------------------------

def bytes_tokenizer():
    """256 single bytes and <|endoftext|>. The pattern only sets how much text is looked at at once: nothing merges."""
    import tiktoken  # here and below, not above: who only reads token files does without it
    ranks = {bytes([i]): i for i in range(256)}
    return tiktoken.Encoding("bytes", pat_str=r"(?s:.{1,32})", mergeable_ranks=ranks,
                             special_tokens={"<|endoftext|>": 256})


def file_tokenizer(path):
    """A .tiktoken file (base64 token, space, rank on each line), split into words as gpt2 does."""
    import tiktoken
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
        import tiktoken
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


# ---- the user's own text --------------------------------------------------------------------------------------------

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


# ---- the sample: text that every machine with Python and requirements.txt already has, read where it is installed ---

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


# ---- writing --------------------------------------------------------------------------------------------------------

class SplitFiles:
    """One split's .bin, for examples its .mask.bin as well, with their hashes and counts."""

    def __init__(self, folder, split, tokenizer, dtype, masked):
        self.tokenizer, self.dtypes = tokenizer, {".bin": dtype} | ({".mask.bin": np.uint8} if masked else {})
        self.files = {kind: open(folder / f"{split}{kind}", "wb") for kind in self.dtypes}
        self.hashes = {kind: hashlib.sha256() for kind in self.dtypes}
        self.counts = {"tokens": 0, "bytes": 0, "documents": 0} | ({"learned": 0, "learned_bytes": 0} if masked else {})

    def append(self, kind, values):
        data = np.asarray(values, dtype=self.dtypes[kind]).tobytes()
        self.files[kind].write(data)
        self.hashes[kind].update(data)

    def write(self, parts):
        """
        Tokenizes the parts' text as one, as a model will see it. A token that straddles a boundary between a prompt
        and a response is learned: it holds a part of the response, and is what the model has to say after the prompt's
        whole tokens.
        """
        raw = [text.encode("utf-8", "replace") for text, _ in parts]  # JSON can hold lone surrogates, no tokenizer can
        ids = self.tokenizer.encode_to_numpy(b"".join(raw).decode(), disallowed_special=())
        self.append(".bin", ids)
        self.counts["tokens"] += len(ids)
        self.counts["bytes"] += sum(map(len, raw))
        if ".mask.bin" in self.files:
            learned = np.repeat([flag for _, flag in parts], [len(r) for r in raw])  # of each byte
            lengths = [len(self.tokenizer.decode_single_token_bytes(i)) for i in ids.tolist()]
            mask = np.logical_or.reduceat(learned, np.cumsum([0, *lengths[:-1]]))  # of each token
            self.append(".mask.bin", mask)
            self.counts["learned"] += int(mask.sum())
            self.counts["learned_bytes"] += sum(len(r) for r, (_, flag) in zip(raw, parts) if flag)

    def end_document(self, learned):
        self.append(".bin", [self.tokenizer.eot_token])
        self.counts["tokens"] += 1
        self.counts["documents"] += 1
        if ".mask.bin" in self.files:
            self.append(".mask.bin", [learned])
            self.counts["learned"] += learned

    def close(self):
        """Returns counts and hashes once everything is on the disk."""
        for file in self.files.values():
            file.flush()
            os.fsync(file.fileno())
            file.close()
        return self.counts | {key: self.hashes[kind].hexdigest() for key, kind in
                              (("sha256", ".bin"), ("mask_sha256", ".mask.bin")) if kind in self.hashes}


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
                "versions": {"python": platform.python_version(),
                             **{name: importlib.metadata.version(name) for name in ("numpy", "tiktoken")}}}
        save_atomically(partial / "meta.json", lambda f: f.write(json.dumps(meta, indent=1).encode()))
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


# ---- reading what was written ---------------------------------------------------------------------------------------

class TokenSet:
    """
    A folder that write_set() filled: its meta.json and, for each split, a memory map of the tokens.

    Text is read in windows that start anywhere. Examples (a set with masks) are packed: a row holds as many whole ones
    as fit block_size + 1 tokens, and nothing behind its last one is learned. `rows[split]` is then (2, R), where rows
    start and end. An example longer than a row is cut at its end; one whose prompt alone fills the row is left out.
    """

    def __init__(self, data_dir, name, block_size):
        self.name, self.block_size, folder = name, block_size, Path(data_dir, name)
        if not (folder / "meta.json").is_file():
            there = sorted(m.parent.name for m in Path(data_dir).glob("[!.]*/meta.json"))
            mend = "python prepare_data.py" + ("" if name in SAMPLE else f" {name}=PATH")
            fail(f"no set '{name}' in {data_dir}/ (there: {', '.join(there) or 'none'}); prepare it with: {mend}")
        self.again = f"prepare '{name}' again with --overwrite"
        try:
            self.meta = json.loads((folder / "meta.json").read_text())
            self.tokenizer, self.vocab_size = self.meta["tokenizer"], self.meta["vocab_size"]
            self.tokens, self.masks, self.rows, self.learned = {}, {}, {}, {}
            self.cut = np.zeros(3, dtype=np.int64)  # examples; longer than a row; without a response in it
            for split in SPLITS:
                self.open_split(folder, split, self.meta["splits"][split])
            train = self.meta["splits"]["train"]
            self.digest = [train.get("sha256"), train.get("mask_sha256")]
        except (OSError, ValueError, KeyError, TypeError, AttributeError, ZeroDivisionError) as error:
            fail(f"{folder}/meta.json cannot be read ({error!r}); {self.again}")

    def open_split(self, folder, split, counts):
        n, learned = counts["tokens"], counts.get("learned")
        self.tokens[split] = self.map(folder / f"{split}.bin", np.dtype(self.meta["dtype"]), n)
        self.learned[split] = n if learned is None else learned
        if learned is not None:
            mask = self.masks[split] = self.map(folder / f"{split}.mask.bin", np.dtype(np.uint8), n)
            found = np.count_nonzero(mask), mask.max(initial=0)
            if found != (learned, 1):
                fail(f"{folder}/{split}.mask.bin: {found[0]} learned tokens, highest value {found[1]}, but meta.json "
                     f"says {learned} and 1; {self.again}")
        if self.meta.get("schema", "text") != "text":
            self.pack(split)
        elif n < self.block_size + 1:
            fail(f"{folder}/{split}.bin: {n} tokens, too short for --block_size {self.block_size} (needs "
                 f"{self.block_size + 1}); give '{self.name}' more text or lower --block_size")
        self.tokens_per_byte(split)  # raises now, and not after the run, where meta.json has no such counts

    def map(self, path, dtype, n):
        size = path.stat().st_size if path.is_file() else -1
        if size != n * dtype.itemsize:
            fail(f"{path}: {'missing' if size < 0 else f'{size} bytes'}, but meta.json says {n} tokens of "
                 f"{dtype.itemsize} bytes; {self.again}")
        return np.memmap(path, dtype=dtype, mode="r") if n else np.zeros(0, dtype)

    def examples(self, split):
        """Where examples start and end, (E,) and (E,): each has one <|endoftext|>, its last token."""
        ends = np.flatnonzero(self.tokens[split] == self.meta["eot_token"]) + 1
        if not len(ends) or ends[-1] != len(self.tokens[split]):
            fail(f"{self.name}/{split}.bin does not end in <|endoftext|> as examples do; {self.again}")
        return np.concatenate([[0], ends[:-1]]), ends

    def pack(self, split):
        """Fills rows[split], walking over the examples in order, and sets learned[split] to what the rows show."""
        mask, room = self.masks[split], self.block_size + 1
        starts, ends = self.examples(split)
        rises = np.append(np.flatnonzero(mask[1:] > mask[:-1]) + 1, len(mask))  # where learned tokens begin
        answer = np.where(mask[starts] > 0, starts, rises[np.searchsorted(rises, starts)])  # first learned token, (E,)
        usable = (answer < ends) & (answer - starts < room)
        fitting = np.searchsorted(ends, starts + room, side="right")  # the examples before this one fit whole
        after = np.maximum(fitting, np.arange(1, len(starts) + 1))  # the example that begins the next row
        following, chosen, i = np.where(usable, after, np.arange(1, len(starts) + 1)).tolist(), [], 0
        while i < len(starts):  # each row's start depends on the row before
            chosen.append(i)
            i = following[i]
        chosen = np.array(chosen, dtype=np.int64)
        chosen = chosen[usable[chosen]]
        if not len(chosen):
            fail(f"{self.name}/{split}: no example has a response within --block_size {self.block_size}; raise it")
        row_ends = np.where(fitting > np.arange(len(starts)), ends[after - 1], starts + room)[chosen]
        self.rows[split] = np.stack([starts[chosen], row_ends])
        # no row predicts its first token; reduceat sums from each bound to the next, every other one a row
        bounds = np.stack([starts[chosen] + 1, row_ends], axis=1).ravel()
        self.learned[split] = int(np.add.reduceat(np.append(mask, 0), bounds, dtype=np.int64)[::2].sum())
        self.cut += np.array([len(starts), (ends - starts > room).sum(), (~usable).sum()])

    def available(self, split):
        """Tokens that a split can show; packed examples count with what fills the rows."""
        return len(self.rows[split][0]) * self.block_size if split in self.rows else len(self.tokens[split])

    def density(self, split):
        """Learned tokens per token drawn from a split; 1 for text."""
        return self.learned[split] / self.available(split)

    def tokens_per_byte(self, split):
        """Learned tokens of a split per byte of learned text: turns a loss a token into one a byte."""
        counts = self.meta["splits"][split]
        return counts.get("learned", counts["tokens"]) / counts.get("learned_bytes", counts["bytes"])

    def at_fraction(self, split, u):
        """Where windows begin, for fractions u (B,) of a split in [0, 1)."""
        if split in self.rows:
            return self.rows[split][0][(u * len(self.rows[split][0])).astype(np.int64)]
        return (u * (len(self.tokens[split]) - self.block_size)).astype(np.int64)

    def spread(self, split, max_tokens):
        """Where disjoint windows begin, evenly spread over a split, of at most max_tokens in all: always the same."""
        n = len(self.rows[split][0]) if split in self.rows else (len(self.tokens[split]) - 1) // self.block_size
        pick = np.unique(np.linspace(0, n - 1, max(1, min(n, max_tokens // self.block_size))).round().astype(np.int64))
        return self.rows[split][0][pick] if split in self.rows else pick * self.block_size

    def windows(self, split, start):
        """Windows at start (B,) of a split -> inputs and next-token targets, (B, T) int64, IGNORE where not learned."""
        at, within = start[:, None] + np.arange(self.block_size + 1), True  # (B, T + 1)
        if split in self.rows:  # behind a row comes the next example, and at the end nothing: filled, never learned
            last = self.rows[split][1][np.searchsorted(self.rows[split][0], start)][:, None] - 1
            within, at = at <= last, np.minimum(at, last)
        ids = self.tokens[split][at].astype(np.int64)
        if ids.max() >= self.vocab_size:
            fail(f"{self.name}/{split}.bin holds token id {ids.max()}, outside the vocabulary of {self.vocab_size}; "
                 f"{self.again}")
        x, y = ids[:, :-1], ids[:, 1:]
        if split in self.masks:
            learned = (self.masks[split][at] > 0) & within
            y = np.where(learned[:, 1:], y, IGNORE)
        return x, y

    def answers(self, max_tokens):
        """
        Test examples with a short answer, each alone in a window, its prompt first: x, y (n, T) int64, IGNORE but at
        the answer, which of a conversation is the last; none for text. At most max_tokens, spread over the split.
        """
        pairs = []  # where an example starts, where its answer does, where both end
        for start, end in zip(*self.examples("test")) if "test" in self.rows else ():
            read = np.flatnonzero(self.masks["test"][start:end] == 0)
            answer = start + (read[-1] + 1 if len(read) else 1)
            if 0 < end - answer <= SHORT_ANSWER and end - start <= self.block_size + 1:
                pairs.append((start, answer, end))
        pairs = pairs[:: -(-len(pairs) * self.block_size // max_tokens) or 1]
        x = np.zeros((len(pairs), self.block_size), dtype=np.int64)
        y = np.full_like(x, IGNORE)
        for i, (start, answer, end) in enumerate(pairs):
            ids = self.tokens["test"][start:end]
            x[i, : len(ids) - 1] = ids[:-1]
            y[i, answer - start - 1: len(ids) - 1] = ids[answer - start:]
        return x, y


def gather(sets, split, source, u):
    """
    Sequence i starts at the fraction u[i] of a split of sets[source[i]]. Returns inputs and next-token targets, both
    (B, T) int64. Loops over sources, never over tokens.
    """
    x, y = np.empty((2, len(source), sets[0].block_size), dtype=np.int64)
    for k in np.unique(source):
        rows = np.flatnonzero(source == k)
        x[rows], y[rows] = sets[k].windows(split, sets[k].at_fraction(split, u[rows]))
    return x, y


def load_sets(args, ckpt=None):
    """
    The sets that --sources and --target name -> (sources, targets), two lists of TokenSet; args.sources and args.target
    then say what was used. ckpt is the checkpoint that training starts from. Whatever is wrong with the data ends here.
    """
    sources, target = args.sources, args.target
    if sources is None:  # the sample: go on with what this machine has
        there = [n for n in SAMPLE_SOURCES if Path(args.data_dir, n, "meta.json").is_file()]
        sources, target = ",".join(there or SAMPLE_SOURCES), target if target is not None else SAMPLE_TARGETS[0]
    args.sources, args.target = sources, target if target is not None else sources
    names = {flag: [n.strip() for n in text.split(",")]
             for flag, text in (("--sources", args.sources), ("--target", args.target))}
    for flag, given in names.items():
        if "" in given:
            fail(f"{flag} '{','.join(given)}' has an empty name; give names separated by commas")
        twice = [n for n in given if given.count(n) > 1]
        if twice:
            fail(f"{flag} names {twice[0]} twice")
    loaded = {n: TokenSet(args.data_dir, n, args.block_size) for n in dict.fromkeys(sum(names.values(), []))}
    first = next(iter(loaded.values()))
    for s in loaded.values():
        if (s.tokenizer, s.vocab_size) != (first.tokenizer, first.vocab_size):
            fail(f"'{s.name}' was prepared with the tokenizer {s.tokenizer} ({s.vocab_size} ids), '{first.name}' with "
                 f"{first.tokenizer} ({first.vocab_size}); prepare both with the same --tokenizer")
    if args.resume and ckpt["digests"] != {n: s.digest for n, s in loaded.items()}:
        fail(f"the data in {args.data_dir}/ is not what {args.out_dir}/ckpt.pt was trained on; prepare it as it was, "
             "or start a new run in another --out_dir")
    if ckpt and (ckpt["tokenizer"], ckpt["config"]["vocab_size"]) != (first.tokenizer, first.vocab_size):
        path = f"{args.out_dir}/ckpt.pt" if args.resume else args.init_from
        fail(f"{path} was trained with the tokenizer {ckpt['tokenizer']} ({ckpt['config']['vocab_size']} ids), "
             f"'{first.name}' was prepared with {first.tokenizer} ({first.vocab_size}); use the same --tokenizer")
    for s in loaded.values():
        examples, long, left_out = s.cut
        if long and int(os.environ.get("RANK", 0)) == 0:
            print(f"{s.name}: of {examples:,} examples {long:,} are longer than --block_size {args.block_size} and "
                  f"lose their end; {left_out:,} of these have a prompt as long and are left out")
    return tuple([loaded[n] for n in given] for given in names.values())


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
    print_anything()
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

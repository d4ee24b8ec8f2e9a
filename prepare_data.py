"""
Text in, token files out: data/NAME/{train,val,test}.bin and meta.json for each data source.

    python prepare_data.py                                       the sample set, from text this machine already has
    python prepare_data.py code=src/ web='crawl/*.jsonl.gz'      your own: NAME=PATH, a file, a folder or a quoted glob
    python prepare_data.py books=books.txt --tokenizer gpt2
    python prepare_data.py chat=chat.json qa=qa.jsonl            instructions: prompts are read, responses are learned

.jsonl, .ndjson and .json (an array, or lines), also .gz, hold records: one document each under --text_key, or one
example with a prompt and a response (see read_record). Any other file is one UTF-8 document. Documents, not tokens, are
divided over train, val and test, by a hash of their content: in whatever set one turns up, it goes to the same split.
One of over 32,768 characters is divided by the page. The .bin files follow nanoGPT: flat uint16 (uint32 above 65,535
ids), documents ended by <|endoftext|>; beside those of examples lies SPLIT.mask.bin, uint8: 1 where a token is
learned, 0 where it is only read. Text, but for a JSON array, is streamed: memory stays flat. The reader is TokenSet.
"""
import argparse
import base64
import contextlib
import fcntl
import functools
import glob
import gzip
import hashlib
import heapq
import importlib.util
import inspect
import io
import itertools
import json
import os
import re
import shutil
import signal
import sys
import sysconfig
import textwrap
import time
import zlib
from pathlib import Path

import numpy as np

SPLITS = ("train", "val", "test")
IGNORE = -1  # a target of this value is not learned, and counts in no loss
WHOLE, PAGE = 32_768, 4096  # characters: a longer document than this is divided by the page, of about this length
FEW = 200  # documents or pages: fewer may leave a split empty by chance, so that each then gets one
SKETCH = 1024  # hashes of documents kept in meta.json, of each split, to find out whether sets share text
SAMPLE_SOURCES, SAMPLE_TARGETS = ("python", "cpp", "prose", "math", "legal", "noise"), ("numpy", "numpy_tasks")
SAMPLE = (*SAMPLE_SOURCES, "numpy", "describe", "implement", "declare", "numpy_tasks")
SAMPLE_CHARS, EXAMPLE_CHARS = 4_000_000, 250  # most of a source of the sample, and of an example
PAIRS = (("prompt", "response"), ("prompt", "completion"), ("question", "answer"), ("instruction", "output"))
SCHEMAS = f"text, messages, conversations, {', '.join(map('/'.join, PAIRS))}"
CONVERT = {  # endings of files that are not read, and the command that makes of one what is
    ".parquet": "in Python: import pandas; pandas.read_parquet('{0}').to_json('{0}.jsonl', orient='records', lines=1)",
    ".arrow": "in Python: import datasets; datasets.Dataset.from_file('{0}').to_json('{0}.jsonl')",
    ".zst": "zstd -d {0}", ".gz": "gunzip {0}", ".xz": "unxz {0}", ".bz2": "bunzip2 {0}", ".zip": "unzip {0}",
    ".json": "for it holds neither an array of records nor JSON lines; to take it as text, rename it to .txt"}
NETWORK_TIMEOUT = 60  # seconds


def launched_rank():
    """This process's number among those that torchrun started; 0 where it started none."""
    launched = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys()
    return int(os.environ["RANK"]) if launched and os.environ["RANK"].isdigit() else 0


def fail(message):
    """Ends the program with one line on stderr and exit status 2."""
    rank = launched_rank()
    if rank > 0:
        time.sleep(5)  # where rank 0 fails too it says so, and torchrun ends this process meanwhile
    with contextlib.suppress(OSError):
        print(f"error: {f'rank {rank}: ' if rank > 0 else ''}{message}", file=sys.stderr, flush=True)
    sys.exit(2)


def say(*text):
    """print() of rank 0, that goes on where a terminal lacks a glyph, and when its reader leaves (| head)."""
    try:
        if launched_rank() == 0:
            print(*text, flush=True)
    except UnicodeEncodeError:
        print(*(str(t).encode("ascii", "replace").decode() for t in text), flush=True)
    except OSError:  # from here on nobody listens
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def lock(file, folder, mend):
    """Holds an open file against other programs until it is closed, which the system does for one that is killed."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        fail(f"another program is writing to {folder}/ now; {mend}")
    except OSError:
        pass  # a file system without locks


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
    ranks, content = {}, Path(path).read_bytes()
    for number, line in enumerate(content.splitlines(), 1):
        try:
            if line:
                token, rank = line.split()
                ranks[base64.b64decode(token, validate=True)] = int(rank)
        except ValueError:
            fail(f"{path}, line {number}: {line[:40]!r} is not 'base64-token rank'")
    missing = 256 - sum(bytes([i]) in ranks for i in range(256))
    if missing or sorted(ranks.values()) != list(range(len(ranks))):
        fail(f"{path}: ranks must run from 0 without a gap and cover the 256 bytes; found {len(ranks)} tokens, "
             f"{missing} of the bytes missing")
    pattern = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
    digest = hashlib.sha256(content).hexdigest()[:12]  # two files of one name are two tokenizers
    return tiktoken.Encoding(f"{Path(path).name}:{digest}", pat_str=pattern, mergeable_ranks=ranks,
                             special_tokens={"<|endoftext|>": len(ranks)})


def get_tokenizer(name):
    """`bytes`, a .tiktoken file, or a tiktoken encoding, which comes from its cache or the network."""
    if name == "bytes":
        return bytes_tokenizer()
    if name.endswith(".tiktoken"):
        try:
            return file_tokenizer(name)
        except OSError as error:
            fail(f"--tokenizer {name} cannot be read: {error.strerror}")
    import tiktoken

    def give_up(why):
        fail(f"--tokenizer {name} cannot be had ({why}); use --tokenizer bytes, which needs no network, or set "
             "TIKTOKEN_CACHE_DIR to a folder that holds its files")

    signal.signal(signal.SIGALRM, lambda *_: give_up(f"no answer in {NETWORK_TIMEOUT} s"))
    signal.alarm(NETWORK_TIMEOUT)  # tiktoken itself would wait for ever
    try:
        return tiktoken.get_encoding(name)
    except Exception as error:  # requests' many errors, and ValueError for an unknown name
        give_up(f"{type(error).__name__}: {str(error).splitlines()[0][:120]}")
    finally:
        signal.alarm(0)


# ---- the user's own text --------------------------------------------------------------------------------------------

def is_records(path):
    """Does a file hold JSON records? A .json of settings, as a source tree may have, does not."""
    if path.lower().endswith(".json"):
        with open(path, "rb") as f:
            return bool(re.match(rb"(\xef\xbb\xbf)?\s*(\[\s*\{|\{.*\}\s*\n\s*\{)", f.read(PAGE * 256)))
    return path.lower().removesuffix(".gz").endswith((".jsonl", ".ndjson", ".json"))


def is_text(path):
    """Is all of a file UTF-8, without a zero byte?"""
    try:
        with open(path, encoding="utf-8", newline="") as f:
            return not any("\0" in chunk for chunk in iter(lambda: f.read(WHOLE), ""))
    except UnicodeDecodeError:
        return False


def find_files(name, path):
    """A file, a glob or a folder, walked in order, links too but no hidden names -> list of files that hold text."""
    def stop(error):
        raise error

    if not os.path.isdir(path):
        files = [path] if os.path.isfile(path) else sorted(filter(os.path.isfile, glob.glob(path, recursive=True)))
        for file in files:
            how = CONVERT.get(Path(file).suffix.lower())
            if how and not is_records(file):
                fail(f"{file} is not read as it is; convert it, {how.format(file)}")
    else:
        found, seen = [], set()
        for folder, subfolders, names in os.walk(path, onerror=stop, followlinks=True):
            real = {d: os.path.realpath(os.path.join(folder, d)) for d in ("", *sorted(subfolders)) if d[:1] != "."}
            seen.add(real.pop(""))  # links may run in circles, or lead to where the walk has been
            subfolders[:] = [d for d, path_of_d in real.items() if path_of_d not in seen]
            seen |= {*real.values()}
            found += [os.path.join(folder, n) for n in sorted(names) if not n.startswith(".")]
        files = [f for f in found if os.path.isfile(f) and (is_records(f) or is_text(f))]
        others = sorted({*found} - {*files})
        if others:
            say(f"  {name}: {len(others)} files are no UTF-8 text and left out: {', '.join(others[:4])}"
                + ", ..." * (len(others) > 4))
    if not files:
        fail(f"{path}: no text there (a file, a folder, or a glob in quotes)")
    return files


# ---- records --------------------------------------------------------------------------------------------------------

def example(prompt, response):
    """A prompt and its response as parts (text, learned?); on two lines, unless the prompt ends in white space."""
    return [(prompt if not prompt or prompt[-1].isspace() else prompt + "\n", False), (response, True)]


def plain(content):
    """The text of a record's value: a string, null, or a list of parts that hold a text each."""
    if isinstance(content, list):
        return "".join(plain(part["text"] if isinstance(part, dict) and "text" in part else part) for part in content)
    if content is not None and not isinstance(content, str):
        raise ValueError(f"{str(content)[:60]} is not text; leave the record out")
    return content or ""


def chat(turns, learn=True):
    """Turns {role, content} or {from, value} -> parts "role: content" and line end, the assistant's (gpt's) learned."""
    parts = []
    for turn in turns if isinstance(turns, list) else [turns] if turns else []:
        if not isinstance(turn, dict) or not {"role", "from"} & turn.keys():
            raise ValueError("a chat must be a list of turns, each with role and content, or from and value")
        role = turn.get("role", turn.get("from"))
        role = {"human": "user", "gpt": "assistant"}.get(role, role)
        text = plain(turn.get("content", turn.get("value")))
        if text.strip():  # a call of a tool has none
            parts += [(f"{role}: ", False), (text + "\n", learn and role == "assistant")]
    return parts


def read_record(record, args):
    """
    A JSON object -> (its schema, its parts [(text, learned?), ...], None where nothing is there to learn). Without
    --text_key or --prompt_key the schema is the first of these whose keys it has: a chat under `messages` or
    `conversations`, the pairs in PAIRS (instruction with an optional input), `text`. Prompt and response are texts or
    lists of turns; a response stands on a new line, unless the prompt ends in white space. Raises ValueError with a
    line for the user.
    """
    if not isinstance(record, dict):
        raise ValueError(f"a JSON object is needed, not a {type(record).__name__}")
    own = args.text_key or args.prompt_key
    pairs = [(args.prompt_key, args.response_key)] if args.prompt_key else [] if own else PAIRS
    pair = next((p for p in pairs if record.keys() >= set(p)), None)
    talk = None if own else next((key for key in ("messages", "conversations") if key in record), None)
    if talk:
        schema, parts = talk, chat(record[talk])
    elif pair and isinstance(record[pair[1]], list):
        schema, parts, before = "/".join(pair), chat(record[pair[1]]), record[pair[0]]
        if isinstance(before, str):  # one turn of the user, unless the answer repeats it
            before = [{"role": "user", "content": before}] if parts[:1] == [("assistant: ", False)] else []
        parts = chat(before, learn=False) + parts
    elif pair:
        schema, prompt, response = "/".join(pair), *(plain(record[key]) for key in pair)
        if pair[0] == "instruction" and record.get("input"):
            prompt += "\n" + plain(record["input"])
        parts = example(prompt, response)
    elif not args.prompt_key and (args.text_key or "text") in record:
        schema, parts = "text", [(plain(record[args.text_key or "text"]), True)]
    elif "chosen" in record and not own:
        raise ValueError("chosen and rejected answers are preferences, which are not trained on; to learn the chosen "
                         "ones, add --prompt_key prompt --response_key chosen")
    else:
        raise ValueError(f"no {own or 'known key'} in it, but {', '.join(list(record)[:8])}; known are {SCHEMAS}; name "
                         "others with --text_key, or with --prompt_key and --response_key")
    if parts and schema != "text":
        parts[-1] = parts[-1][0].removesuffix("\n"), parts[-1][1]  # <|endoftext|> ends it
    return schema, parts if any(learned and text.strip() for text, learned in parts) else None


# ---- documents and pages --------------------------------------------------------------------------------------------

def pages(stream):
    """An open text, whole or, where it is long, in pages that end with a line where one is near."""
    text = stream.read(WHOLE + 1)
    if len(text) <= WHOLE:
        yield from [text] if text.strip() else []
        return
    while text:
        if len(text) < 2 * PAGE:
            text += stream.read(WHOLE)
        end = text.find("\n", PAGE, 2 * PAGE) + 1 or PAGE
        yield text[:end]
        text = text[end:]


def units_of(schema, parts):
    """A document -> units of the division, (schema, does a document begin?, parts). Only text is ever divided."""
    if schema == "text":
        for i, page in enumerate(pages(io.StringIO(parts[0][0], newline=""))):
            yield schema, i == 0, [(page, True)]
    else:
        yield schema, True, parts


def file_units(path, raw, args):
    """Yields (line, unit) of an open file, a document of many GB page by page; None for a record without text."""
    if not is_records(path):
        try:
            for i, page in enumerate(pages(io.TextIOWrapper(raw, encoding="utf-8", newline=""))):
                yield "", ("text", i == 0, [(page, True)])
        except UnicodeDecodeError as error:
            at = raw.tell() - len(error.object) + error.start
            fail(f"{path}: not UTF-8 at byte {at} ({error.reason}); convert it, for instance with iconv, or leave it "
                 "out with a glob")
        return
    file = gzip.open(raw) if path.lower().endswith(".gz") else raw
    array = file.peek(PAGE).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"[")
    where = ""
    try:
        for number, record in enumerate(json.load(file) if array else file, 1):
            where = f", {'record' if array else 'line'} {number}"
            if array or record.strip():
                schema, parts = read_record(record if array else json.loads(record), args)
                yield from ((where, unit) for unit in (units_of(schema, parts) if parts else [None]))
    except UnicodeDecodeError:
        fail(f"{path}{where}: not UTF-8; convert it first, for instance with iconv")
    except ValueError as error:
        fail(f"{path}{where}: {'not JSON: ' * isinstance(error, json.JSONDecodeError)}{error}")


def own_units(name, files, args):
    """The units of all files of a set, which must be of one schema; says how far it is every few seconds."""
    total, before, empty, schema = sum(map(os.path.getsize, files)), 0, 0, None
    started = shown = time.time()
    for path in files:
        try:
            with open(path, "rb") as raw:
                for where, unit in file_units(path, raw, args):
                    if unit is None:
                        empty += 1
                        continue
                    schema = schema or unit[0]
                    if unit[0] != schema:
                        fail(f"{path}{where}: it is of the schema {unit[0]}, but what comes before it is of {schema}; "
                             "prepare them as two sets")
                    yield unit
                    if time.time() - shown > 2:
                        shown, done = time.time(), before + raw.tell()
                        rate = max(1, done / (shown - started))
                        say(f"    {done / 1e6:,.0f} of {total / 1e6:,.0f} MB, {rate / 1e6:.1f} MB/s, "
                            f"{(total - done) / rate:.0f} s left")
        except (OSError, EOFError, zlib.error) as error:  # the last two, and an OSError too: a broken gzip file
            fail(f"cannot read {path} ({getattr(error, 'strerror', None) or error})")
        before += os.path.getsize(path)
    if empty:
        say(f"  {name}: {empty:,} records without a text to learn are left out")


# ---- the sample: text that every machine with Python and requirements.txt already has, read where it is installed ---

def listing(root, pattern, leave_out=()):
    """Files below root, in an order by hash, so that a cap on the size takes a fair sample of them."""
    leave_out = {*leave_out, "test", "tests", "__pycache__", "site-packages", "dist-packages"}
    paths = (p for p in root.rglob(pattern) if not leave_out & set(p.relative_to(root).parts) and p.is_file())
    return sorted(paths, key=lambda p: hashlib.sha256(p.relative_to(root).as_posix().encode()).digest())


def read_all(paths):
    texts = (path.read_bytes().decode("utf-8", "ignore") for path in paths)
    return [text for text in texts if text.strip()]


def read_python(paths):
    """
    Python files -> (docstrings of over 80 characters, and instructions (prompt, response) of two kinds: describe, a
    function's signature and its docstring's first paragraph; and implement, both of these and the body). Each once.
    """
    docstrings, describe, implement = {}, {}, {}
    function = r'^( *)(def \w+\([^()]*\)):\n *"""([^"]+)"""\n((?:\1 +[^\n]*\n|\n)+)'
    for text in read_all(paths):
        docstrings |= {inspect.cleandoc(d): None for d in re.findall(r'"""(.*?)"""', text, re.DOTALL) if len(d) > 80}
        for _, signature, doc, body in re.findall(function, text, re.MULTILINE):
            signature, about = " ".join(signature.split()), " ".join(doc.split("\n\n")[0].split())
            body = textwrap.indent(textwrap.dedent(body).rstrip(), "    ")
            describe[f"{signature}:", f'    """{about}"""'] = None
            implement[f'{signature}:\n    """{about}"""', body] = None
    return docstrings, describe, implement


def declarations(headers):
    """A C++ comment -> the declaration that follows it, (prompt, response) each once."""
    pattern = re.compile(r"((?:^[ \t]*//[^\n]*\n)+)([^\n/][^;{]*[;{])", re.MULTILINE)
    return dict.fromkeys(pair for text in read_all(headers) for pair in pattern.findall(text))


def sample_sets(seed):
    """{name: (schema, documents as parts)} of the sample's sets; says which ones this machine lacks."""
    stdlib, site = Path(sysconfig.get_path("stdlib")), Path(sysconfig.get_path("purelib"))
    package = {}  # where it is installed, without importing it
    for name in ("torch", "sympy", "numpy"):
        spec = importlib.util.find_spec(name)
        package[name] = Path(spec.origin).parent if spec and spec.origin else Path("/nonexistent")
    code = [p for p in listing(stdlib, "*.py", ("idlelib", "tkinter", "lib2to3", "ensurepip"))
            if not p.name.startswith("_sysconfigdata")]
    headers = [p for folder in ("c10", "torch/csrc") for p in listing(package["torch"] / "include" / folder, "*.h")]
    numpy = listing(package["numpy"], "*.py")
    licences = [p for p in listing(site, "*") if re.search(r"(LICEN[CS]E|COPYING|NOTICE)[^/]*$", p.name)]
    in_code, in_sympy, in_numpy = map(read_python, (code, listing(package["sympy"], "*.py"), numpy))
    texts = {"python": read_all(code), "cpp": read_all(headers), "prose": in_code[0], "math": in_sympy[0],
             "legal": dict.fromkeys(read_all(licences)), "numpy": read_all(numpy)}
    tasks = {"describe": in_code[1] | in_sympy[1], "implement": in_code[2] | in_sympy[2],
             "declare": declarations(headers)}
    known = tasks["describe"] | tasks["implement"]
    tasks["numpy_tasks"] = [pair for pair in in_numpy[1] | in_numpy[2] if pair not in known]
    for name, documents in texts.items():
        sizes = itertools.accumulate(map(len, documents))
        texts[name] = [document for document, size in zip(documents, sizes) if size <= SAMPLE_CHARS]
    # a control, whose weight should end near zero: the words of the sources, the right letters in no order
    words = [w for name in SAMPLE_SOURCES[:5] for w in "".join(texts[name])[: SAMPLE_CHARS // 5].split()]
    np.random.default_rng(seed).shuffle(words)
    texts["noise"] = [" ".join(words[i: i + 300]) for i in range(0, len(words), 300)]
    sets = {name: ("text", [[(document, True)] for document in documents]) for name, documents in texts.items()}
    for name, pairs in tasks.items():
        examples = [example(*pair) for pair in pairs if pair[1].strip() and sum(map(len, pair)) < EXAMPLE_CHARS]
        examples.sort(key=lambda parts: hashlib.sha256(repr(parts).encode()).digest())  # neighbours are of one file
        sets[name] = "prompt/response", examples
    for name in SAMPLE:
        if not sets[name][1]:
            say(f"  {name:11s} not found on this machine, left out")
    return {name: sets[name] for name in SAMPLE if sets[name][1]}


# ---- writing --------------------------------------------------------------------------------------------------------

class SplitFiles:
    """One split's .bin, for examples its .mask.bin as well, with counts and a sketch."""

    def __init__(self, folder, split, tokenizer, dtype, masked):
        self.tokenizer, self.dtypes = tokenizer, {".bin": dtype} | ({".mask.bin": np.uint8} if masked else {})
        self.files = {kind: open(folder / f"{split}{kind}", "w+b") for kind in self.dtypes}
        self.counts = {"tokens": 0, "bytes": 0, "documents": 0} | ({"learned": 0, "learned_bytes": 0} if masked else {})
        self.sketch = set()

    def append(self, kind, values):
        self.files[kind].write(np.asarray(values, dtype=self.dtypes[kind]).tobytes())

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
        """Returns counts, hashes and the sketch once everything is on the disk."""
        for kind, file in self.files.items():
            file.flush()
            os.fsync(file.fileno())
            file.seek(0)
            self.counts["mask_sha256" if "mask" in kind else "sha256"] = hashlib.file_digest(file, "sha256").hexdigest()
            file.close()
        return self.counts | {"sketch": " ".join(heapq.nsmallest(SKETCH, self.sketch))}


def place(parts, seed):
    """A unit's text -> (a hash of it, its place in [0, 1) under a seed): the same in whatever set it turns up."""
    digest = hashlib.blake2b("".join(text for text, _ in parts).encode("utf-8", "replace"), digest_size=12).hexdigest()
    return digest[:12], (int(digest[12:], 16) / 2**48 + 0.618034 * seed) % 1


def write_set(name, units, tokenizer, args, fractions, origin):
    """
    Tokenizes units (schema, does a document begin?, parts) into data_dir/name. val takes those whose place is below
    the first of `fractions`, test those from 1 minus the second: sets prepared with other fractions then overlap
    little. The folder appears whole or not at all: it is renamed when complete. origin says where the text came from.
    """
    dtype = "uint16" if tokenizer.n_vocab <= 65_536 else "uint32"
    final, partial = Path(args.data_dir, name), Path(args.data_dir, f".{name}.partial")
    first = list(itertools.islice(units, FEW))
    if not first:
        fail(f"{name}: {origin} holds no text")
    val_end, test_start = fractions[0], 1 - fractions[1]
    places = sorted({place(parts, args.seed)[1] for _, _, parts in first})
    if len(places) < FEW:  # all there are, or many are alike
        if len(places) < 3:
            fail(f"{name}: {len(places)} different documents (pages, where one has over {WHOLE:,} characters), too few "
                 "for train, val and test; give it more text")
        val_end, test_start = max(val_end, np.nextafter(places[0], 1)), min(test_start, places[-1])
    ours, schema = False, first[0][0]
    try:
        partial.mkdir(parents=True, exist_ok=True)
        handle = os.open(partial, os.O_RDONLY)
        lock(handle, partial, f"wait until it has prepared '{name}', or choose another name")
        ours = True
        if final.exists() and not args.overwrite:  # it was not when this program began
            fail(f"{final} exists; choose another name or add --overwrite")
        for left in partial.iterdir():  # by a killed run
            left.unlink()
        files = {split: SplitFiles(partial, split, tokenizer, dtype, schema != "text") for split in SPLITS}
        split, n_documents = None, 0  # split: of the document being written
        for _, starts, parts in itertools.chain(first, units):
            hashed, at = place(parts, args.seed)
            goes_to = "val" if at < val_end else "test" if at >= test_start else "train"
            if split and (starts or goes_to != split):
                files[split].end_document(learned)
            n_documents += starts
            split, learned = goes_to, parts[-1][1]
            files[split].write(parts)
            files[split].sketch.add(hashed)
            if len(files[split].sketch) > 4 * SKETCH:
                files[split].sketch = set(heapq.nsmallest(SKETCH, files[split].sketch))
        files[split].end_document(learned)
        splits = {split: file.close() for split, file in files.items()}
        for split in SPLITS:
            if splits[split]["tokens"] == 0:
                mend = "smaller fractions of val and test" if split == "train" else f"a larger --{split}_fraction"
                fail(f"{name}: its {split} split is empty ({n_documents:,} documents); give it more text or {mend}")
        meta = {"name": name, "origin": origin, "schema": schema, "tokenizer": tokenizer.name,
                "vocab_size": tokenizer.n_vocab, "eot_token": tokenizer.eot_token, "dtype": dtype,
                "documents": n_documents, "settings": settings(args), "splits": splits}
        save_atomically(partial / "meta.json", lambda f: f.write(json.dumps(meta, indent=1).encode()))
        shutil.rmtree(final, ignore_errors=True)  # only here with --overwrite
        os.replace(partial, final)
    except OSError as error:
        fail(f"cannot write {partial}: {error.strerror}; nothing of {name} was changed")
    finally:
        if ours:
            shutil.rmtree(partial, ignore_errors=True)
            os.close(handle)
    total = {key: sum(s[key] for s in splits.values()) for key, v in splits["train"].items() if isinstance(v, int)}
    note = f", {schema}, {total['learned'] / total['tokens']:.0%} of tokens learned" if schema != "text" else ""
    say(f"  {name:11s}" + "".join(f" {splits[s]['tokens']:>12,} {s}" for s in SPLITS)
        + f"   ({n_documents:,} documents{note})")


def settings(args):
    """The flags that a prepared set depends on beside its text."""
    return {flag: getattr(args, flag) for flag in ("tokenizer", "seed", "val_fraction", "test_fraction")}


# ---- reading what was written ---------------------------------------------------------------------------------------

@functools.lru_cache(maxsize=64)
def mapped(path, dtype):
    """The numbers in a file. Only the files used last stay open: a system may allow 256 of them."""
    return np.memmap(path, dtype=dtype, mode="r") if os.path.getsize(path) else np.zeros(0, dtype)


class TokenSet:
    """
    A folder that write_set() filled: its meta.json and, for each split, a memory map of the tokens.

    Text is read in windows that start anywhere. Examples (a set with masks) are packed: a row holds as many whole ones
    as fit block_size + 1 tokens, and nothing behind its last one is learned. `rows[split]` is then (2, R), where rows
    start and end. An example longer than a row is cut at its end; one whose prompt alone fills the row is left out.
    """

    def __init__(self, data_dir, name, block_size):
        self.name, self.block_size, self.folder = name, block_size, Path(data_dir, name)
        if not (self.folder / "meta.json").is_file():
            there = sorted(m.parent.name for m in Path(data_dir).glob("[!.]*/meta.json"))
            mend = "python prepare_data.py" + ("" if name in SAMPLE else f" {name}=PATH")
            fail(f"no set '{name}' in {data_dir}/ (there: {', '.join(there) or 'none'}); prepare it with: {mend}")
        self.again = f"prepare '{name}' again with --overwrite"
        try:
            self.meta = json.loads((self.folder / "meta.json").read_text())
            self.tokenizer, self.vocab_size = self.meta["tokenizer"], self.meta["vocab_size"]
            self.dtype, self.masked = np.dtype(self.meta["dtype"]), "learned" in self.meta["splits"]["train"]
            self.rows, self.learned = {}, {}
            self.visible = 1.0  # share of the train split that is shown
            self.cut = np.zeros(3, dtype=np.int64)  # examples; longer than a row; without a response in it
            for split in SPLITS:
                self.open_split(split, self.meta["splits"][split])
            self.digest = [self.meta["splits"][s].get(key) for s in SPLITS for key in ("sha256", "mask_sha256")]
        except OSError as error:
            fail(f"cannot read {error.filename}: {error.strerror}")
        except (ValueError, KeyError, TypeError, AttributeError, ZeroDivisionError) as error:
            fail(f"{self.folder}/meta.json is not what prepare_data.py writes ({error!r}); {self.again}")

    def open_split(self, split, counts):
        n, learned = counts["tokens"], counts.get("learned")
        for end, dtype in [(".bin", self.dtype)] + [(".mask.bin", np.dtype(np.uint8))] * self.masked:
            path = self.folder / f"{split}{end}"
            size = path.stat().st_size if path.exists() else -1
            if size != n * dtype.itemsize:
                fail(f"{path}: {'missing' if size < 0 else f'{size} bytes'}, but meta.json says {n} tokens of "
                     f"{dtype.itemsize} bytes; {self.again}")
        self.tokens(split)  # raises now where it may not be read
        self.learned[split] = n if learned is None else learned
        if self.masked:
            mask = self.mask(split)
            found = np.count_nonzero(mask), mask.max(initial=0)
            if found != (learned, 1):
                fail(f"{self.folder}/{split}.mask.bin: {found[0]} learned tokens, highest value {found[1]}, but "
                     f"meta.json says {learned} and 1; {self.again}")
        if self.meta.get("schema", "text") != "text":
            self.pack(split)
        elif n < self.block_size + 1:
            fail(f"{self.folder}/{split}.bin: {n} tokens, too short for --block_size {self.block_size} (needs "
                 f"{self.block_size + 1}); give '{self.name}' more text or lower --block_size")
        self.tokens_per_byte(split), self.averages()  # raise now, and not after the run, where such counts are missing

    def tokens(self, split):
        """Token ids of a split, (n,)."""
        return mapped(self.folder / f"{split}.bin", self.dtype)

    def mask(self, split):
        """1 where a token of a split is learned, 0 where it is only read, (n,); only where the set is `masked`."""
        return mapped(self.folder / f"{split}.mask.bin", np.dtype(np.uint8))

    def examples(self, split):
        """Where examples start and end, (E,) and (E,): each has one <|endoftext|>, its last token."""
        ends = np.flatnonzero(self.tokens(split) == self.meta["eot_token"]) + 1
        if not len(ends) or ends[-1] != len(self.tokens(split)):
            fail(f"{self.name}/{split}.bin does not end in <|endoftext|> as examples do; {self.again}")
        return np.concatenate([[0], ends[:-1]]), ends

    def pack(self, split):
        """Fills rows[split], walking over the examples in order, and sets learned[split] to what the rows show."""
        mask, room = self.mask(split), self.block_size + 1
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
        return len(self.rows[split][0]) * self.block_size if split in self.rows else len(self.tokens(split))

    def density(self, split):
        """Learned tokens per token drawn from a split; 1 for text."""
        return self.learned[split] / self.available(split)

    def tokens_per_byte(self, split):
        """Learned tokens of a split per byte of learned text: turns a loss a token into one a byte."""
        counts = self.meta["splits"][split]
        return counts.get("learned", counts["tokens"]) / counts.get("learned_bytes", counts["bytes"])

    def averages(self):
        """(bytes per token, tokens per document) of all splits; <|endoftext|> is a token."""
        tokens, size, documents = (sum(s[key] for s in self.meta["splits"].values())
                                   for key in ("tokens", "bytes", "documents"))
        return size / tokens, tokens / self.meta.get("documents", documents)

    def at_fraction(self, split, u):
        """Where windows begin, for fractions u (B,) in [0, 1) of the visible part, stretches spread over a split."""
        n, T = (len(self.rows[split][0]), 0) if split in self.rows else (len(self.tokens(split)), self.block_size)
        visible = max(n * self.visible, T + 1) if split == "train" else n  # never less than a window
        stretches = max(1, int(visible / (64 * T + 64))) if visible < n else 1  # of some 64 windows each
        stretch, within = np.divmod(u * stretches, 1)
        i = (stretch * n / stretches + within * (visible / stretches - T)).astype(np.int64)
        return self.rows[split][0][i] if split in self.rows else i

    def spread(self, split, max_tokens):
        """Where disjoint windows begin, evenly spread over a split, of at most max_tokens in all: always the same."""
        n = len(self.rows[split][0]) if split in self.rows else (len(self.tokens(split)) - 1) // self.block_size
        pick = np.unique(np.linspace(0, n - 1, max(1, min(n, max_tokens // self.block_size))).round().astype(np.int64))
        return self.rows[split][0][pick] if split in self.rows else pick * self.block_size

    def windows(self, split, start):
        """Windows at start (B,) of a split -> inputs and next-token targets, (B, T) int64, IGNORE where not learned."""
        at, within = start[:, None] + np.arange(self.block_size + 1), True  # (B, T + 1)
        if split in self.rows:  # behind a row comes the next example, and at the end nothing: filled, never learned
            last = self.rows[split][1][np.searchsorted(self.rows[split][0], start)][:, None] - 1
            within, at = at <= last, np.minimum(at, last)
        ids = self.tokens(split)[at].astype(np.int64)
        if ids.max() >= self.vocab_size:
            fail(f"{self.name}/{split}.bin holds token id {ids.max()}, outside the vocabulary of {self.vocab_size}; "
                 f"{self.again}")
        x, y = ids[:, :-1], ids[:, 1:]
        if self.masked:
            learned = (self.mask(split)[at] > 0) & within
            y = np.where(learned[:, 1:], y, IGNORE)
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


def sample_is_there(name, args):
    """True where the sample's set was prepared before. Anything else of that name ends the program."""
    folder, meta = Path(args.data_dir, name), {}
    with contextlib.suppress(OSError, ValueError):
        meta = json.loads((folder / "meta.json").read_text())
    if meta.get("origin", "the sample") != "the sample":
        fail(f"{folder} was made from {meta['origin']}, and the sample has a set '{name}' too; use another --data_dir")
    if args.overwrite or not folder.exists():
        return False
    if meta.get("settings") != settings(args):
        fail(f"{folder} exists, prepared with other settings; add --overwrite to replace it")
    say(f"  {name:11s} is there already, kept")
    return True


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     usage="python prepare_data.py [NAME=PATH ...] [options]   (--help for all)")
    parser.add_argument("sets", nargs="*", metavar="NAME=PATH", help="a set's name and its text; none: the sample")
    parser.add_argument("--tokenizer", default="bytes",
                        help="bytes, gpt2, cl100k_base, another tiktoken encoding, or FILE.tiktoken (default: bytes)")
    parser.add_argument("--text_key", help="key of a document's text in records (default: text)")
    parser.add_argument("--prompt_key", help="key of an example's prompt (default: a known one)")
    parser.add_argument("--response_key", help="key of its response")
    parser.add_argument("--data_dir", default="data", help="folder of the prepared sets (default: data)")
    parser.add_argument("--val_fraction", type=float, default=0.05, help="share of documents in val (default: 0.05)")
    parser.add_argument("--test_fraction", type=float, default=0.05, help="share of documents in test (default: 0.05)")
    parser.add_argument("--seed", type=int, default=1337, help="of the split and of `noise` (default: 1337)")
    parser.add_argument("--overwrite", action="store_true", help="replace prepared sets of the same name")
    args = parser.parse_args()
    fractions = args.val_fraction, args.test_fraction
    if not (min(fractions) > 0 and sum(fractions) < 1):
        fail(f"--val_fraction {args.val_fraction} and --test_fraction {args.test_fraction} must be above 0 and leave "
             "something to train on")
    if bool(args.prompt_key) != bool(args.response_key) or (args.text_key and args.prompt_key):
        fail("--prompt_key and --response_key go together, and not with --text_key")
    own = {}
    for pair in args.sets:
        name, _, path = pair.partition("=")
        if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", name) or not path:
            fail(f"{pair!r} is not NAME=PATH (a name of letters, digits, '_', '.', '-')")
        if name in own:
            fail(f"the name {name} is given twice")
        if os.path.lexists(Path(args.data_dir, name)) and not args.overwrite:
            fail(f"{Path(args.data_dir, name)} exists; choose another name or add --overwrite")
        own[name] = path
    try:
        files = {name: find_files(name, path) for name, path in own.items()}
    except OSError as error:
        fail(f"cannot read {error.filename}: {error.strerror}; mend that, or leave it out with a glob")
    missing = [] if own else [name for name in SAMPLE if not sample_is_there(name, args)]
    tokenizer = get_tokenizer(args.tokenizer)

    started = time.time()
    say(f"tokens written to {args.data_dir}/ with the {tokenizer.name} tokenizer ({tokenizer.n_vocab:,} ids)")
    for name, path in own.items():
        write_set(name, own_units(name, files[name], args), tokenizer, args, fractions, path)
    for name, (schema, documents) in sample_sets(args.seed).items() if missing else ():
        if name in missing:  # nothing trains on a target: all but a tenth of it is there to measure with
            write_set(name, (unit for parts in documents for unit in units_of(schema, parts)), tokenizer, args,
                      (0.45, 0.45) if name in SAMPLE_TARGETS else fractions, "the sample")
    say(f"done in {time.time() - started:.0f} s")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        print("\nstopped; the set being written was left out", file=sys.stderr)
        sys.exit(130)

"""
Turns text into token files: data/NAME/{train,val,test}.bin and meta.json for each data source.

    python prepare_data.py                                   the sample, from text on this machine
    python prepare_data.py code=src/ web='crawl/*.jsonl.gz'  your own: NAME=PATH, where PATH is a
                                                             file, a folder or a quoted glob
    python prepare_data.py books=books.txt --tokenizer gpt2
    python prepare_data.py chat=chat.json qa=qa.jsonl        instructions: the model reads the
                                                             prompts and learns the responses
    python prepare_data.py --split_by meta.source c='c/*.jsonl'
                                                             one set for each source that its
                                                             records name: c_web, c_books, ...

Files that end in .jsonl, .ndjson or .json hold records: each is one document, or one example with
a prompt and a response (read_record() lists the keys). So do .parquet files, where pyarrow is
installed. Any other file is one document of UTF-8 text. Records and .txt may be packed as .gz or,
where zstandard is installed (Python 3.14 needs nothing), as .zst. Of a folder, what cannot be read
is left out and named. Text is streamed, so that memory stays flat however long it is; only a JSON
array is read as a whole.

Documents, not tokens, are divided over train, val and test, by a hash of their text without white
space: a document goes to the same split in whatever set it is. One of over 32,768 characters is
divided by the page.

The .bin files are nanoGPT's: token ids in a row, uint16 (uint32 if there are more than 65,536),
with <|endoftext|> after each document. A set of examples also has SPLIT.mask.bin, one uint8 per
token: 1 if it is learned, 0 if it is only read. SPLIT.sketch.bin holds hashes of lines, by which a
run finds text that two sets share. TokenSet reads all of this back.
"""
import signal

if __name__ == "__main__":
    # until main() starts, Ctrl-C ends the program at once, without a traceback from an import
    on_ctrl_c = signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
import base64
import collections
import concurrent.futures
import contextlib
import functools
import glob
import gzip
import hashlib
import importlib.util
import inspect
import io
import itertools
import json
import os
import re
import shlex
import shutil
import sys
import sysconfig
import textwrap
import threading
import time
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np

SPLITS = ("train", "val", "test")
IGNORE = -1  # a target of this value is not learned, and counts in no loss

# A document of more than WHOLE characters is divided by the page, of PAGE characters or a bit more.
WHOLE = 32_768
PAGE = 4096
# With fewer documents or pages val and test may stay empty by chance, so each then gets one.
FEW = 200
# How many hashes of its lines a split keeps, at most, to find text that two sets share: 16 MB.
SKETCH = 2**21
LINE = 20  # characters that a line must have, without white space, to be one of them
BYTE_ORDER_MARK = "\ufeff"
BATCH = 2**19  # characters that a thread tokenizes at a time

SAMPLE_SOURCES = ("python", "cpp", "prose", "math", "legal", "noise")
SAMPLE_TARGETS = ("numpy", "numpy_tasks")
SAMPLE = (*SAMPLE_SOURCES, "numpy", "describe", "implement", "declare", "numpy_tasks")
SAMPLE_CHARS = 4_000_000  # of a set of the sample, at most
EXAMPLE_CHARS = 250  # of one of its examples, at most

# The keys of a record that holds an example, and those read before its prompt; see read_record().
CHATS = ("messages", "conversations")
PAIRS = (("prompt", "response"), ("prompt", "completion"), ("question", "answer"),
         ("question", "response"), ("instruction", "output"), ("instruction", "response"))
BEFORE = ("system", "system_prompt", "history", "context")

# Whose turn it is in a chat: {a name that data sets use: ours}. The assistant's turns are learned.
ROLES = {
    "system": "system", "developer": "developer", "user": "user", "human": "user",
    "assistant": "assistant", "gpt": "assistant", "chatgpt": "assistant", "bing": "assistant",
    "bard": "assistant", "bot": "assistant", "model": "assistant", "function_call": "assistant",
    "tool": "tool", "function": "tool", "function_response": "tool", "observation": "tool",
}

# One of these is in each turn, beside whose it is.
TURN_KEYS = frozenset(("content", "value", "tool_calls", "function_call"))

MOST_VALUES = 64  # of --split_by

# Endings of files that are not read, and what to do about it: {0} is the file as a shell's word,
# {1} as a string in Python, {2} the same with .jsonl.
NOT_READ = {
    ".parquet": "pip install pyarrow, or convert it in Python: import pandas; "
                "pandas.read_parquet({1}).to_json({2}, orient='records', lines=1)",
    ".arrow": "convert it in Python: import datasets; datasets.Dataset.from_file({1}).to_json({2})",
    ".zst": "convert it: zstd -d {0}, or pip install zstandard if it is a .jsonl.zst, .json.zst or "
            ".txt.zst",
    ".gz": "convert it: gunzip {0}",
    ".xz": "convert it: unxz {0}",
    ".bz2": "convert it: bunzip2 {0}",
    ".zip": "convert it: unzip {0}",
    ".json": "it holds neither an array of records nor JSON lines; to take it as text, rename it "
             "to .txt",
}
NETWORK_TIMEOUT = 60  # seconds


# ---- messages and files --------------------------------------------------------------------------
# The other programs use these three, too.

def fail(message):
    """Ends the program with one line on stderr and exit status 2."""
    with contextlib.suppress(OSError):  # of a closed stderr
        print(f"error: {message}", file=sys.stderr, flush=True)
    sys.exit(2)


def say(*text):
    """print() that survives a terminal without some character, and a reader that left (| head)."""
    try:
        print(*text, flush=True)
    except UnicodeEncodeError:
        plain = [str(part).encode("ascii", "replace").decode() for part in text]
        print(*plain, flush=True)
    except OSError:
        # Nobody reads our output any more. The rest of it goes nowhere, and the work continues.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def save_atomically(path, write):
    """write(file) into a temporary file, then rename it: path holds the old content or the new."""
    partial = Path(f"{path}.partial")
    try:
        with open(partial, "wb") as f:
            write(f)
            # on the disk before the rename is, or a power failure could leave an empty file
            f.flush()
            os.fsync(f.fileno())
        os.replace(partial, path)
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as a RuntimeError
        with contextlib.suppress(OSError):  # a disk that may only be read
            partial.unlink(missing_ok=True)
        if isinstance(error.__context__, KeyboardInterrupt):  # and a Ctrl-C, too
            raise KeyboardInterrupt from None
        reason = str(error).partition("\n")[0]
        fail(f"cannot write {path} ({reason}); what was there before is unharmed. Mend that, then "
             "start again (fastmix.py with --resume)")


# ---- tokenizers ----------------------------------------------------------------------------------
# Each is a tiktoken.Encoding. Its name is kept in meta.json, and a run refuses sets whose names
# differ. So a name must stand for one list of tokens.

def bytes_tokenizer():
    """256 single bytes and <|endoftext|>."""
    import tiktoken  # not at the top of the file: fastmix.py reads token files without it
    ranks = {bytes([i]): i for i in range(256)}
    # The pattern cuts text into pieces within which bytes may merge. Here none do, so its only
    # effect is on speed.
    return tiktoken.Encoding("bytes", pat_str=r"(?s:.{1,32})", mergeable_ranks=ranks,
                             special_tokens={"<|endoftext|>": 256})


def file_tokenizer(path):
    """A .tiktoken file (base64 token, space, rank on each line), split into words as gpt2 does."""
    import tiktoken
    content = Path(path).read_bytes()
    ranks = {}
    for number, line in enumerate(content.splitlines(), 1):
        if not line:
            continue
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except ValueError:
            fail(f"{path}, line {number}: {line[:40]!r} is not 'base64-token rank'")
    missing = 256 - sum(bytes([i]) in ranks for i in range(256))
    if missing or sorted(ranks.values()) != list(range(len(ranks))):
        fail(f"{path}: ranks must run from 0 without a gap and cover the 256 bytes; found "
             f"{len(ranks)} tokens, {missing} of the bytes missing")
    # words with the space before them, numbers, runs of other characters: as in GPT-2
    pattern = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
    # The digest is part of the name, since two files of one name are two tokenizers.
    digest = hashlib.sha256(content).hexdigest()[:12]
    return tiktoken.Encoding(f"{Path(path).name}:{digest}", pat_str=pattern, mergeable_ranks=ranks,
                             special_tokens={"<|endoftext|>": len(ranks)})


def tiktoken_encoding(name):
    """
    One of tiktoken's encodings, from its cache or from the network. tiktoken itself would wait for
    an answer for ever, so it works in a thread of its own and we wait for NETWORK_TIMEOUT seconds.
    Raises concurrent.futures.TimeoutError, or whatever tiktoken raises.
    """
    import tiktoken
    answer = concurrent.futures.Future()

    def fetch():
        try:
            answer.set_result(tiktoken.get_encoding(name))
        except Exception as error:
            answer.set_exception(error)

    # A daemon: Python ends without waiting for it.
    threading.Thread(target=fetch, daemon=True).start()
    return answer.result(timeout=NETWORK_TIMEOUT)


def get_tokenizer(name):
    """`bytes`, a .tiktoken file, or the name of a tiktoken encoding -> tiktoken.Encoding."""
    if name == "bytes":
        return bytes_tokenizer()
    if name.endswith(".tiktoken"):
        if os.path.exists(name) and not os.path.isfile(name):  # reading a pipe might never end
            fail(f"--tokenizer {name} is not a file")
        return file_tokenizer(name)
    try:
        return tiktoken_encoding(name)
    except concurrent.futures.TimeoutError:
        reason = f"no answer in {NETWORK_TIMEOUT} s"
    except Exception as error:  # any of requests' many errors; a ValueError for an unknown name
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:140]
    fail(f"--tokenizer {name} cannot be loaded ({reason}); use --tokenizer bytes, which needs no "
         "network, or set TIKTOKEN_CACHE_DIR to a folder that holds its files")


# ---- records -------------------------------------------------------------------------------------
# A record becomes parts, [(text, learned?), ...]: what a model reads, and which of it counts in the
# loss. For example
#
#     {"prompt": "2 + 2 =", "response": 4}       ->  [("2 + 2 =\n", False), ("4", True)]
#     {"text": "Once upon a time"}               ->  [("Once upon a time", True)]
#
# The schema, here prompt/response and text, says which keys it was read by. All records of a set
# must have the same one, so that a broken record is found and not trained on as something else.
#
# `notes` is a Counter of short descriptions: what is in a record but not in its parts, as an image.
# own_units() prints it when a set has been read.

def text_of(content, notes):
    """The text of a record's value: a text, a number, null, or a list of parts that hold a text
    each. Anything else is left out and noted."""
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if isinstance(content, (int, float)):  # true and false as well
        return json.dumps(content)
    if isinstance(content, list):
        return "".join(text_of(part, notes) for part in content)
    kind = type(content).__name__  # Parquet has dates and bytes
    if isinstance(content, dict):
        if content.get("text") is not None:
            return text_of(content["text"], notes)
        keys = ", ".join(list(content)[:4])
        kind = str(content.get("type", f"{{{keys}}}"))
    notes[f"{kind[:40]} left out"] += 1
    return ""


def in_lines(texts):
    """Texts in a row: each begins on a line of its own, unless the one before ends in space."""
    joined = ""
    for text in texts:
        if joined and text and not joined[-1].isspace():
            joined += "\n"
        joined += text
    return joined


def pair_parts(prompt, response):
    """A prompt and its response -> parts. The response is on a line of its own, unless the prompt
    ends in white space."""
    if prompt and not prompt[-1].isspace():
        prompt += "\n"
    return [(prompt, False), (response, True)]


def first_value(turn, *keys):
    """The value of the first of these keys that has one. (Parquet has null where a key is not.)"""
    for key in keys:
        if turn.get(key) is not None:
            return turn[key]
    return None


def calls_of(turn):
    """The calls of tools in a turn, as JSON: a list of texts."""
    calls = first_value(turn, "tool_calls", "function_call")
    if calls is None:
        return []
    if not isinstance(calls, list):  # a single one, in the older form
        calls = [calls]
    texts = []
    for call in calls:
        # the function's name and its arguments; around it are only a number and a type
        if isinstance(call, dict) and isinstance(call.get("function"), dict):
            call = call["function"]
        if not isinstance(call, str):
            call = json.dumps(call, ensure_ascii=False, default=str)
        texts.append(call)
    return texts


def chat_parts(turns, notes, learn=True):
    """
    A list of turns {role, content} or {from, value} -> parts: "role: ", then the text and a line
    end. The assistant's text is learned, unless learn is False or the turn says so.
    """
    if not turns:  # null
        turns = []
    if not isinstance(turns, list):  # a single one
        turns = [turns]
    parts = []
    for turn in turns:
        role = None
        if isinstance(turn, dict) and not TURN_KEYS.isdisjoint(turn):
            role = first_value(turn, "role", "from")
        if role is None:
            raise ValueError("a chat must be a list of turns, each with role and content, or from "
                             "and value")
        known_role = ROLES.get(str(role).lower())
        if known_role:
            role = known_role
        else:
            notes[f"turns of {str(role)[:40]!r} read, not learned"] += 1
        # a turn that calls a tool may have no text besides
        text = in_lines([text_of(first_value(turn, "content", "value"), notes), *calls_of(turn)])
        # "weight": 0 and "train": false mark a turn that is only read (and False == 0)
        only_read = 0 in (turn.get("weight"), turn.get("train"))
        if text.strip():
            parts.append((f"{role}: ", False))
            parts.append((text + "\n", learn and role == "assistant" and not only_read))
    return parts


def is_chat(value):
    """Is a record's value a list of turns?"""
    return isinstance(value, list) and any(
        isinstance(turn, dict) and ("role" in turn or "from" in turn) for turn in value)


def background(value, notes):
    """The text of `system`, `history` and the like: a text, turns, or lists of texts, as the pairs
    [question, answer] of a history are."""
    if is_chat(value):
        return "".join(text for text, _ in chat_parts(value, notes))
    if isinstance(value, list):
        return in_lines([background(item, notes) for item in value])
    return text_of(value, notes)


def text_before(record, notes, used=()):
    """The text of all BEFORE keys of a record, but for those used otherwise."""
    keys = [key for key in BEFORE if key in record and key not in used]
    return in_lines([background(record[key], notes) for key in keys])


def whole_chat(before, turns, notes, learn=True):
    """The parts of a chat, with the text before it as a turn of the system."""
    system = [{"role": "system", "content": before}]
    return chat_parts(system, notes) + chat_parts(turns, notes, learn)


def read_pair(record, prompt_key, response_key, notes):
    """A record with these two keys -> parts. Each is a text, or a list of turns."""
    before = text_before(record, notes, used=(prompt_key, response_key))
    prompt = record[prompt_key]
    response = record[response_key]
    if not isinstance(response, (list, dict)):
        # two texts, or turns and a text
        prompt = background(prompt, notes) if is_chat(prompt) else text_of(prompt, notes)
        texts = [before, prompt]
        if prompt_key == "instruction":
            texts.append(text_of(record.get("input"), notes))
        return pair_parts(in_lines(texts), text_of(response, notes))
    answer = chat_parts(response, notes)
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
        # Some data sets repeat the prompt as the first turn of the response. Then it is left out.
        if answer[:1] != [("assistant: ", False)]:
            prompt = []
    return whole_chat(before, prompt, notes, learn=False) + answer


def missing_key(record, wanted):
    """The error of a record that lacks a key."""
    known = ["text", *CHATS, *("/".join(pair) for pair in PAIRS)]
    return ValueError(f"no {wanted} in it, but {', '.join(list(record)[:8])}; known are "
                      f"{', '.join(known)}; name others with --text_key, or with --prompt_key and "
                      "--response_key")


def read_by_given_keys(record, args, notes):
    """read_record() with --text_key, or with --prompt_key and --response_key."""
    keys = [args.text_key] if args.text_key else [args.prompt_key, args.response_key]
    for key in keys:
        if key not in record:
            raise missing_key(record, key)
    if args.text_key:
        return "text", [(text_of(record[args.text_key], notes), True)]
    return "/".join(keys), read_pair(record, *keys, notes)


def read_by_known_keys(record, notes):
    """read_record() without such flags."""
    for key in CHATS:
        if key in record:
            return key, whole_chat(text_before(record, notes), record[key], notes)
    for prompt_key, response_key in PAIRS:
        if prompt_key in record and response_key in record:
            schema = f"{prompt_key}/{response_key}"
            return schema, read_pair(record, prompt_key, response_key, notes)
    if "text" in record:
        return "text", [(text_of(record["text"], notes), True)]
    if "chosen" in record:
        raise ValueError("chosen and rejected answers are preferences, which are not trained on; "
                         "to learn the chosen ones, add --prompt_key prompt --response_key chosen")
    raise missing_key(record, "known key")


def read_record(record, args, notes):
    """
    A JSON object -> (schema, parts). Parts are [(text, learned?), ...], in the order in which a
    model sees them. Without --text_key or --prompt_key the first row that fits is taken:

        keys                                schema              learned
        messages: a chat                    messages            the assistant's turns
        conversations: a chat               conversations       the same
        prompt and response or completion   prompt/response ... the response, the completion
        question and answer or response     question/answer ... the answer, the response
        instruction and output or response  instruction/output  the output, the response
        text                                text                all of it

    The two of a pair are texts, or lists of turns as a chat is. What else is read, in this order:

        system, system_prompt, history, context     before a prompt; in a chat, as a system turn
        input                                       after an instruction

    ROLES lists the other names that the assistant has. Of its turns, those with "weight": 0 or
    "train": false are only read. Its tool_calls are learned, as JSON after the turn's text; a
    tool's answer is read. Numbers are read as text. Other keys are not read.

    notes, a Counter, counts what is left out since it has no text, and the turns whose role is not
    in ROLES, which are read.

    Raises ValueError, with a message for the user.
    """
    if not isinstance(record, dict):
        raise ValueError(f"a JSON object is needed, not a {type(record).__name__}")
    if args.text_key or args.prompt_key:
        schema, parts = read_by_given_keys(record, args, notes)
    else:
        schema, parts = read_by_known_keys(record, notes)
    if parts and schema != "text":
        # <|endoftext|> will end the example; a line end before it is one token too many
        text, learned = parts[-1]
        parts[-1] = (text.removesuffix("\n"), learned)
    return schema, parts


def value_at(record, key):
    """The value of a key of a record as text, None if it has none. `a.b` is b within a."""
    value = record
    if key in record:  # as it stands, though it may have a dot
        value = record[key]
    else:
        for step in key.split("."):
            if not isinstance(value, dict):
                return None
            value = value.get(step)
    if isinstance(value, (dict, list)):
        raise ValueError(f"--split_by {key} needs a text or a number, not {str(value)[:60]}")
    if value is None or value == "":
        return None
    return str(value)


IN_THREAD = threading.local()


def in_this_thread(tokenizer):
    """
    A copy of a tiktoken.Encoding for the thread that calls. The first thread that uses one is
    served fastest, and where others use it as well all of them are several times slower.
    """
    import tiktoken
    if getattr(IN_THREAD, "name", None) != tokenizer.name:
        IN_THREAD.name = tokenizer.name
        # tiktoken's README copies encodings by these fields
        IN_THREAD.tokenizer = tiktoken.Encoding(
            tokenizer.name, pat_str=tokenizer._pat_str, mergeable_ranks=tokenizer._mergeable_ranks,
            special_tokens=tokenizer._special_tokens)
    return IN_THREAD.tokenizer


# ---- which files are read ------------------------------------------------------------------------
# A path on the command line is a file, a folder or a glob. Its files hold JSON records, or a text
# each. In a folder other files are left out and counted; a file that the user named is an error.

class BadFile(ValueError):
    """What is wrong with a file that should be read, in one line for the user."""


# what a damaged .gz or .zst raises
DAMAGED = (EOFError, zlib.error, gzip.BadGzipFile)


@functools.cache
def zstd_decompressors():
    """What makes a decompressor of one frame of a .zst file; None if nothing that can is there."""
    try:
        from compression import zstd  # comes with Python 3.14
    except ImportError:
        pass
    else:
        # some public archives need a window of 2 GB
        options = {zstd.DecompressionParameter.window_log_max: 31}
        return lambda: zstd.ZstdDecompressor(options=options)
    try:
        import zstandard
    except ImportError:
        return None
    return lambda: zstandard.ZstdDecompressor(max_window_size=2**31).decompressobj()


def packing(path):
    """.gz or .zst, for a packed file of records or text that can be read as it is; else nothing."""
    stem, suffix = os.path.splitext(path.lower())
    if not stem.endswith((".jsonl", ".ndjson", ".json", ".txt")):
        return ""
    if suffix == ".gz" or (suffix == ".zst" and zstd_decompressors()):
        return suffix
    return ""


def zstd_pieces(raw):
    """The content of an open .zst file, in pieces. Raises DAMAGED."""
    decompressor = None  # of the frame that is being read: a file may have several
    while packed := raw.read(PAGE):
        while packed:
            if decompressor is None:
                decompressor = zstd_decompressors()()
            try:
                piece = decompressor.decompress(packed)
            except Exception as error:  # each of the two packages has an error of its own
                raise zlib.error(f"not zstd: {error}") from None
            yield piece
            packed = b""
            if decompressor.eof:
                packed = decompressor.unused_data
                decompressor = None
    if decompressor:
        raise EOFError("it ends before its last frame does")


class ZstdReader(io.RawIOBase):
    """zstd_pieces() as an open file."""

    def __init__(self, raw):
        self.pieces = zstd_pieces(raw)
        self.piece = b""

    def readable(self):
        return True

    def readinto(self, buffer):
        while not self.piece:  # some packed bytes hold nothing yet
            self.piece = next(self.pieces, None)
            if self.piece is None:  # the end
                return 0
        n = min(len(buffer), len(self.piece))
        buffer[:n] = self.piece[:n]
        self.piece = self.piece[n:]
        return n


def unpack(path, raw):
    """What an open file holds, as another open file if it is packed."""
    if packing(path) == ".gz":
        return gzip.open(raw)
    if packing(path) == ".zst":
        return io.BufferedReader(ZstdReader(raw))
    return raw


def is_records(path):
    """Does a file hold JSON records? A .json of settings, as a source tree may have, does not."""
    lower = path.lower()
    if lower.endswith(".parquet"):
        return importlib.util.find_spec("pyarrow") is not None
    if lower.endswith(".json"):
        with open(path, "rb") as f:
            start = f.read(PAGE * 256)
        byte_order_mark = rb"(\xef\xbb\xbf)?"
        array_of_objects = rb"\[\s*\{"
        object_per_line = rb"\{.*\}\s*\n\s*\{"  # at least two of them
        pattern = rb"%b\s*(%b|%b)" % (byte_order_mark, array_of_objects, object_per_line)
        return re.match(pattern, start) is not None
    return lower.removesuffix(packing(path)).endswith((".jsonl", ".ndjson", ".json"))


def is_text(path):
    """Is all of a file UTF-8, without a zero byte?"""
    try:
        with open(path, "rb") as raw:
            text = io.TextIOWrapper(unpack(path, raw), encoding="utf-8", newline="")
            while chunk := text.read(WHOLE):
                if "\0" in chunk:
                    return False
    except (UnicodeDecodeError, *DAMAGED):
        return False
    return True


def parquet_records(raw):
    """The records of an open .parquet file, a few at a time."""
    import pyarrow.parquet
    # As it is set by itself, the whole file would be in memory.
    file = pyarrow.parquet.ParquetFile(raw, pre_buffer=False, buffer_size=2**20)
    for batch in file.iter_batches(256):
        yield from batch.to_pylist()


def read_records(path, raw, args, notes):
    """
    Yields (where, record, schema, parts) for each record of an open file: where is its line, for a
    message; the rest is what read_record() takes and returns. Raises BadFile.
    """
    kind = "record"
    where = ""
    # Errors are translated here, in one place: they come while any of these lines reads on.
    try:
        if path.lower().endswith(".parquet"):
            records = parquet_records(raw)
        else:
            records = unpack(path, raw)
            # peek() looks at what comes without reading it: space, perhaps a byte order mark, [
            if records.peek(PAGE).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"["):
                records = json.load(records)
            else:
                kind = "line"
        for number, record in enumerate(records, 1):
            where = f", {kind} {number}"
            if kind == "line":
                if not record.strip():  # an empty line
                    continue
                record = json.loads(record)
            yield where, record, *read_record(record, args, notes)
    except UnicodeDecodeError:
        raise BadFile(f"{path}{where}: not UTF-8; convert it first, for instance with iconv")
    except json.JSONDecodeError as error:
        raise BadFile(f"{path}{where}: not JSON: {error}")
    except RecursionError:  # [[[... without end
        raise BadFile(f"{path}{where}: lists within lists, too deep to be read")
    except ValueError as error:  # read_record()'s, and pyarrow's
        raise BadFile(f"{path}{where}: {str(error).partition(chr(10))[0]}")
    except (OSError, *DAMAGED) as error:
        reason = getattr(error, "strerror", None) or error
        raise BadFile(f"cannot read {path} ({reason})")


def schema_of(path, args):
    """The schema of a file of records: that of its first one. Raises BadFile."""
    with open(path, "rb") as raw:
        for _, _, schema, _ in read_records(path, raw, args, collections.Counter()):
            return schema
    return "text"  # it is empty


def files_below(folder):
    """All files below a folder, in order. Links are followed; hidden names are left out."""
    def stop(error):  # without it, os.walk() skips a folder that it cannot list
        raise error

    found = []
    # Links may run in circles, or lead to a folder that was read already.
    seen = {os.path.realpath(folder)}
    for parent, subfolders, names in os.walk(folder, onerror=stop, followlinks=True):
        if "meta.json" in names and "train.bin" in names:
            subfolders[:] = []
            continue  # a prepared set, as data/ may hold them below this folder
        enter = []
        for subfolder in sorted(subfolders):
            real = os.path.realpath(os.path.join(parent, subfolder))
            if not subfolder.startswith(".") and real not in seen:
                seen.add(real)
                enter.append(subfolder)
        subfolders[:] = enter  # os.walk() enters what this list holds
        found += [os.path.join(parent, n) for n in sorted(names) if not n.startswith(".")]
    return found


def say_left_out(name, files, why):
    """A line about files of a set that are not read, if there are any."""
    if files:
        first = ", ".join(sorted(files)[:4])
        more = f" and {len(files) - 4} more" if len(files) > 4 else ""
        say(f"  {name}: left out {len(files)} files {why}: {first}{more}")


def refuse_unread(file):
    """Fails if a file's ending is one that is not read as it is, and says what to do about it."""
    advice = NOT_READ.get(Path(file).suffix.lower())
    if advice and not is_records(file) and not packing(file):
        # quoted for a shell, and for Python
        advice = advice.format(shlex.quote(file), repr(file), repr(f"{file}.jsonl"))
        fail(f"{file} is not read as it is; {advice}")


def files_in_folder(name, folder, args):
    """
    The files below a folder that can be read. All are of one schema, the one that most of the bytes
    are of: beside chats a README.md is left out, and beside source code a chat. (Text files and
    records of a text are of one schema.) Prints what is left out.
    """
    by_schema = {}  # {schema: files}
    no_text = []
    no_records = {}  # {file: what is wrong}
    for file in files_below(folder):
        # isfile() is False for a link that leads nowhere, and for a pipe
        if not os.path.isfile(file):
            no_text.append(file)
        elif is_records(file):
            try:
                by_schema.setdefault(schema_of(file, args), []).append(file)
            except BadFile as error:
                no_records[file] = error
        elif not is_text(file):
            no_text.append(file)
        elif args.split_by:
            no_records[file] = f"{file}: --split_by needs records"
        else:
            by_schema.setdefault("text", []).append(file)

    say_left_out(name, no_text, "that are not UTF-8 text")
    say_left_out(name, no_records, "that hold no records by keys that are known or given")
    if not by_schema:
        # what is wrong with the first one tells what to do
        for error in no_records.values():
            fail(error)
        for file in no_text:
            refuse_unread(file)
        return []
    main = max(by_schema, key=lambda schema: sum(map(os.path.getsize, by_schema[schema])))
    for schema, files in by_schema.items():
        if schema != main:
            say_left_out(name, files, f"of {schema}, since most of {folder} is of {main}")
    return by_schema[main]


def find_files(name, path, args):
    """The files that a file, a folder or a glob stands for, as a list of paths."""
    if os.path.isdir(path):
        files = files_in_folder(name, path, args)
    else:
        files = [path]
        if not os.path.isfile(path):
            files = sorted(filter(os.path.isfile, glob.glob(path, recursive=True)))
        for file in files:
            refuse_unread(file)
    if not files:
        fail(f"{path}: no text there (a file, a folder, or a glob in quotes)")
    return files


# ---- documents and pages -------------------------------------------------------------------------
# Whole documents are divided over train, val and test: neighbouring sentences are alike, and a
# split of tokens would put some of them on either side. But a book would be one document, and all
# of it train or all of it test; so long ones are divided by the page.
#
# The functions here are generators: a unit passes through all of them, and is written, before the
# next one is read. own_units() goes through the files of a set, file_units() through a file, and
# record_units() through its records; text_units() cuts a document into pages.

class Unit(NamedTuple):
    """What goes to one split as a whole: an example, a document, or a page of a long document."""
    schema: str
    starts_document: bool
    parts: list  # [(text, learned?), ...]; text has one part
    value: str = None  # of --split_by


def pages(stream):
    """An open text, as a whole or, if it is long, in pages that end with a line if one is near."""
    text = stream.read(1).removeprefix(BYTE_ORDER_MARK)
    text += stream.read(WHOLE + 1 - len(text))
    if len(text) <= WHOLE:
        if text.strip():
            yield text
        return
    while text:
        if len(text) < 2 * PAGE:  # which is as far as a page's end is looked for
            text += stream.read(WHOLE)
        end = text.find("\n", PAGE, 2 * PAGE) + 1
        if end == 0:  # no line ends there
            end = PAGE
        yield text[:end]
        text = text[end:]


def text_units(stream):
    """The units of one document, from an open text."""
    for i, page in enumerate(pages(stream)):
        yield Unit("text", i == 0, [(page, True)])


def units_of(schema, parts):
    """The units of one record. Only text is ever divided."""
    if schema == "text":
        text = parts[0][0]
        yield from text_units(io.StringIO(text, newline=""))
    else:
        yield Unit(schema, True, parts)


def record_units(path, raw, args, notes):
    """Yields (where, unit) for an open file of records; see read_records(). unit is None for a
    record without anything to learn."""
    for where, record, schema, parts in read_records(path, raw, args, notes):
        value = None
        if args.split_by:
            try:
                value = value_at(record, args.split_by)
            except ValueError as error:
                raise BadFile(f"{path}{where}: {error}")
        if not any(learned and text.strip() for text, learned in parts):
            yield where, None
        elif args.split_by and value is None:
            notes[f"records without {args.split_by} left out"] += 1
        else:
            for unit in units_of(schema, parts):
                yield where, unit._replace(value=value)


def file_units(path, raw, args, notes):
    """Yields (where, unit) for an open file; see record_units()."""
    if is_records(path):
        yield from record_units(path, raw, args, notes)
        return
    if args.split_by:
        raise BadFile(f"{path}: --split_by needs records")
    try:
        for unit in text_units(io.TextIOWrapper(unpack(path, raw), encoding="utf-8", newline="")):
            yield "", unit
    except UnicodeDecodeError as error:
        at = ""
        if not packing(path):
            # error.object is the last piece that was read from raw
            at = f" at byte {raw.tell() - len(error.object) + error.start}"
        raise BadFile(f"{path}: not UTF-8{at} ({error.reason}); convert it, for instance with "
                      "iconv, or leave it out with a glob")


class Progress:
    """Prints every two seconds how many bytes of a total are read, and how long the rest takes."""

    def __init__(self, total):
        self.total = total
        self.started = time.time()
        self.printed = self.started

    def show(self, file, before=0):
        """file is read, after `before` bytes of other files. Asking where it is comes last: a call
        of the system for each unit would make the threads that tokenize wait for each other."""
        now = time.time()
        if now - self.printed < 2:
            return
        self.printed = now
        done = before + file.tell()
        rate = max(1, done / (now - self.started))
        say(f"    {done / 1e6:,.0f} of {self.total / 1e6:,.0f} MB, {rate / 1e6:.1f} MB/s, "
            f"{(self.total - done) / rate:.0f} s left")


def own_units(name, files, args):
    """The units of all files of a set, which must be of one schema. (With --split_by they are of
    several sets.)"""
    sizes = [os.path.getsize(path) for path in files]
    progress = Progress(sum(sizes))
    bytes_before = 0  # in the files before this one
    n_empty = 0
    notes = collections.Counter()
    schemas = {}  # {value of --split_by: schema}; without it there is one value, None
    for path, size in zip(files, sizes):
        try:
            with open(path, "rb") as raw:
                for where, unit in file_units(path, raw, args, notes):
                    if unit is None:
                        n_empty += 1
                        continue
                    # the first one decides
                    schema = schemas.setdefault(unit.value, unit.schema)
                    if unit.schema != schema:
                        fail(f"{path}{where}: it is of the schema {unit.schema}, but what comes "
                             f"before it is of {schema}; prepare them as two sets")
                    yield unit
                    progress.show(raw, bytes_before)
        except BadFile as error:
            fail(error)
        except (OSError, *DAMAGED) as error:
            reason = getattr(error, "strerror", None) or error
            fail(f"cannot read {path} ({reason})")
        bytes_before += size
    if n_empty:
        say(f"  {name}: left out {n_empty:,} records without a text to learn")
    if notes:
        some = [f"{n:,} {what}" for what, n in notes.most_common(6)]
        if len(notes) > 6:
            some.append("and more")
        say(f"  {name}: in records, {'; '.join(some)}")


# ---- the sample ----------------------------------------------------------------------------------
# Text that comes with Python and with the packages in requirements.txt, read where it is installed:
# six sources; numpy's code, which is in none of them, as a target; and four sets of instructions,
# made of functions and their docstrings, of which numpy_tasks is a target.

class PythonText(NamedTuple):
    """What read_python() finds. Dicts without values: each item once, in order."""
    docstrings: dict
    describe: dict  # (prompt, response): a function's signature; its docstring's first paragraph
    implement: dict  # (prompt, response): both of these; the function's body


def listing(root, pattern, leave_out=()):
    """Files below root, ordered by a hash: a cap on the size then takes a fair sample of them."""
    skipped = {*leave_out, "test", "tests", "__pycache__", "site-packages", "dist-packages"}
    paths = []
    for path in root.rglob(pattern):
        if not skipped & set(path.relative_to(root).parts) and path.is_file():
            paths.append(path)

    def by_hash(path):
        return hashlib.sha256(path.relative_to(root).as_posix().encode()).digest()
    return sorted(paths, key=by_hash)


def read_all(paths):
    """The texts of files, but for empty ones."""
    texts = (path.read_bytes().decode("utf-8", "ignore") for path in paths)
    return [text for text in texts if text.strip()]


def read_python(texts):
    """Docstrings of over 80 characters, and examples made of functions that have a docstring."""
    found = PythonText({}, {}, {})
    # indentation, signature, docstring, and a body: lines that are indented more, or empty
    function = r'^( *)(def \w+\([^()]*\)):\n *"""([^"]+)"""\n((?:\1 +[^\n]*\n|\n)+)'
    for text in texts:
        # a rough search: it also finds strings that are no docstrings, which are text as well
        for docstring in re.findall(r'"""(.*?)"""', text, re.DOTALL):
            if len(docstring) > 80:
                found.docstrings[inspect.cleandoc(docstring)] = None
        for _, signature, docstring, body in re.findall(function, text, re.MULTILINE):
            # on one line each, whatever they were
            signature = " ".join(signature.split())
            about = " ".join(docstring.split("\n\n")[0].split())
            body = textwrap.indent(textwrap.dedent(body).rstrip(), "    ")
            found.describe[f"{signature}:", f'    """{about}"""'] = None
            found.implement[f'{signature}:\n    """{about}"""', body] = None
    return found


def declarations(headers):
    """Examples from C++: (a comment, the declaration that follows it), each once."""
    # lines that begin with //, then anything up to the next ; or {
    pattern = re.compile(r"((?:^[ \t]*//[^\n]*\n)+)([^\n/][^;{]*[;{])", re.MULTILINE)
    pairs = {}
    for text in headers:
        pairs |= dict.fromkeys(pattern.findall(text))
    return pairs


def at_most(documents, n_chars):
    """The first documents, as many as have n_chars characters together."""
    chosen = []
    total = 0
    for document in documents:
        total += len(document)
        if total > n_chars:
            break
        chosen.append(document)
    return chosen


def shuffled_words(texts, seed):
    """A control, whose weight should end near zero: the sources' words, in no order."""
    words = []
    for documents in texts:
        words += "".join(documents)[:SAMPLE_CHARS // len(texts)].split()
    np.random.default_rng(seed).shuffle(words)
    return [" ".join(words[i:i + 300]) for i in range(0, len(words), 300)]


def package_folder(name):
    """Where a package is installed, without importing it."""
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        return Path("/nonexistent")
    return Path(spec.origin).parent


def sample_sets(seed):
    """{name: (schema, [parts of each document])} of the sample; prints which sets are missing."""
    stdlib = Path(sysconfig.get_path("stdlib"))
    site_packages = Path(sysconfig.get_path("purelib"))
    torch_headers = package_folder("torch") / "include"

    # _sysconfigdata is a list of build settings, and differs from machine to machine
    scripts = listing(stdlib, "*.py", ("idlelib", "tkinter", "lib2to3", "ensurepip"))
    scripts = [path for path in scripts if not path.name.startswith("_sysconfigdata")]
    licences = [path for path in listing(site_packages, "*")
                if re.search(r"(LICEN[CS]E|COPYING|NOTICE)[^/]*$", path.name)]
    python = read_all(scripts)
    headers = read_all(listing(torch_headers / "c10", "*.h")
                       + listing(torch_headers / "torch/csrc", "*.h"))
    numpy = read_all(listing(package_folder("numpy"), "*.py"))
    in_python = read_python(python)
    in_sympy = read_python(read_all(listing(package_folder("sympy"), "*.py")))
    in_numpy = read_python(numpy)

    # sets of text; a dict without values holds each text once
    texts = {
        "python": python,
        "cpp": headers,
        "prose": in_python.docstrings,
        "math": in_sympy.docstrings,
        "legal": dict.fromkeys(read_all(licences)),
        "numpy": numpy,
    }
    for name in texts:
        texts[name] = at_most(texts[name], SAMPLE_CHARS)
    texts["noise"] = shuffled_words([texts[name] for name in SAMPLE_SOURCES[:-1]], seed)

    # sets of examples; sympy's and Python's functions are of one kind here
    tasks = {
        "describe": in_python.describe | in_sympy.describe,
        "implement": in_python.implement | in_sympy.implement,
        "declare": declarations(headers),
    }
    # numpy and the others share some functions, which a target must not
    known = tasks["describe"] | tasks["implement"]
    in_numpy_only = in_numpy.describe | in_numpy.implement
    tasks["numpy_tasks"] = [pair for pair in in_numpy_only if pair not in known]

    sets = {}
    for name, documents in texts.items():
        sets[name] = "text", [[(document, True)] for document in documents]
    for name, pairs in tasks.items():
        examples = [pair_parts(prompt, response) for prompt, response in pairs
                    if response.strip() and len(prompt) + len(response) < EXAMPLE_CHARS]
        # Neighbours come from one file. Ordered by a hash, they do not share a window.
        examples.sort(key=lambda parts: hashlib.sha256(repr(parts).encode()).digest())
        sets[name] = "prompt/response", examples
    # a set is empty if its package is not installed
    found = {}
    for name in SAMPLE:
        if sets[name][1]:
            found[name] = sets[name]
        else:
            say(f"  {name:11s} not found on this machine, left out")
    return found


def sample_units(schema, documents):
    """The units of a set of the sample."""
    for parts in documents:
        yield from units_of(schema, parts)


# ---- writing -------------------------------------------------------------------------------------
# A set is written into data/.NAME.partial/, which is renamed to data/NAME/ when it is complete. So
# data/NAME/ is a whole set at any time, or is not there.

class TokenFile:
    """A file of numbers of one type, written in pieces, with the hash of what was written."""

    def __init__(self, path, dtype):
        self.file = open(path, "wb")
        self.dtype = dtype
        self.hash = hashlib.sha256()

    def append(self, values):
        data = np.ascontiguousarray(values, dtype=self.dtype)
        self.hash.update(data)
        self.file.write(data)

    def finish(self):
        """Returns the hash, once everything is on the disk."""
        self.file.flush()
        os.fsync(self.file.fileno())
        return self.hash.hexdigest()

    def close(self):
        # After an error, say a full disk, there may be a rest that cannot be written either.
        with contextlib.suppress(OSError):
            self.file.close()


class Encoded(NamedTuple):
    """What the units of a batch add to one split."""
    ids: np.ndarray  # (n,), with <|endoftext|>
    mask: np.ndarray  # (n,), or None for text
    n_documents: int
    n_bytes: int
    n_learned_bytes: int
    hashes: np.ndarray  # of lines; see line_hashes()


class SplitWriter:
    """One split's tokens and, for examples, its mask; with counts for meta.json and a sketch."""

    def __init__(self, folder, split, dtype, masked):
        self.tokens = TokenFile(folder / f"{split}.bin", dtype)
        self.mask = None
        self.sketch_file = TokenFile(folder / f"{split}.sketch.bin", np.uint64)
        self.counts = {"tokens": 0, "bytes": 0, "documents": 0}
        if masked:
            self.mask = TokenFile(folder / f"{split}.mask.bin", np.uint8)
            self.counts |= {"learned": 0, "learned_bytes": 0}
        self.sketch = np.zeros(0, np.uint64)  # the SKETCH smallest hashes, sorted
        self.new_hashes = []  # arrays that are to be merged into it

    def write(self, encoded):
        self.tokens.append(encoded.ids)
        self.counts["tokens"] += len(encoded.ids)
        self.counts["bytes"] += encoded.n_bytes
        self.counts["documents"] += encoded.n_documents
        if self.mask:
            self.mask.append(encoded.mask)
            self.counts["learned"] += int(encoded.mask.sum())
            self.counts["learned_bytes"] += encoded.n_learned_bytes
        self.add_to_sketch(encoded.hashes)

    def add_to_sketch(self, hashes):
        """Keeps the smallest hashes; sorting them only now and then is faster."""
        if len(self.sketch) == SKETCH:
            hashes = hashes[hashes < self.sketch[-1]]
        self.new_hashes.append(hashes)
        if sum(map(len, self.new_hashes)) > SKETCH // 4:
            self.merge_sketch()

    def merge_sketch(self):
        # np.unique() would do the same with a hash table, a hundred times slower
        hashes = np.sort(np.concatenate([self.sketch, *self.new_hashes]))
        is_new = np.diff(hashes, prepend=~hashes[:1]) != 0
        self.sketch = hashes[is_new][:SKETCH]
        self.new_hashes = []

    def finish(self):
        """Returns what meta.json says about the split, once everything is on the disk."""
        self.counts["sha256"] = self.tokens.finish()
        if self.mask:
            self.counts["mask_sha256"] = self.mask.finish()
        self.merge_sketch()
        self.sketch_file.append(self.sketch)
        self.sketch_file.finish()
        self.counts["sketch"] = len(self.sketch)
        return self.counts

    def close(self):
        """Closes the files; after finish(), or to give up."""
        self.tokens.close()
        self.sketch_file.close()
        if self.mask:
            self.mask.close()


class Encoder:
    """Tokenizes batches, in several threads at a time: it changes nothing of its own."""

    def __init__(self, tokenizer, dtype, masked):
        self.tokenizer = tokenizer
        self.dtype = dtype
        self.masked = masked
        self.token_lengths = None  # (vocab_size,) in bytes
        if masked:
            self.token_lengths = np.zeros(tokenizer.n_vocab, np.int64)
            for i in range(tokenizer.n_vocab):
                with contextlib.suppress(KeyError):  # some vocabularies have gaps
                    self.token_lengths[i] = len(tokenizer.decode_single_token_bytes(i))

    def encode(self, raw):
        """UTF-8 -> token ids"""
        if self.tokenizer.name == "bytes":  # its ids are the bytes
            return np.frombuffer(raw, np.uint8)
        # Text that spells <|endoftext|> is text like any other: nothing is special, nor an error.
        tokenizer = in_this_thread(self.tokenizer)
        return tokenizer.encode_to_numpy(raw.decode(), disallowed_special=())

    def encode_batch(self, batch):
        """[(unit, its split, whether <|endoftext|> follows)] -> {split: Encoded}"""
        by_split = {}
        for unit, split, ends_document in batch:
            by_split.setdefault(split, []).append((unit.parts, ends_document))
        return {split: self.encode_units(units, split) for split, units in by_split.items()}

    def encode_units(self, units, split):
        """
        [(parts, whether <|endoftext|> follows)] of a split -> Encoded. The parts of a unit are
        tokenized as one text, since that is what a model will see.
        """
        end = np.array([self.tokenizer.eot_token])
        ids = []  # an array for each unit, and for each <|endoftext|>
        texts = []  # the UTF-8 of each unit
        lengths = []  # in bytes, of each part
        learned = []  # whether each part is
        n_learned_bytes = 0
        for parts, ends_document in units:
            raw = utf8(parts)
            texts.append(b"".join(raw))
            ids.append(self.encode(texts[-1]))
            if self.masked:
                part_lengths = [len(part) for part in raw]
                lengths += part_lengths
                learned += [is_learned for _, is_learned in parts]
                n_learned_bytes += sum(n for n, (_, yes) in zip(part_lengths, parts) if yes)
            if ends_document:
                ids.append(end)
                # <|endoftext|> is learned if the text before it is
                if self.masked:
                    lengths.append(self.token_lengths[self.tokenizer.eot_token])
                    learned.append(learned[-1])
        ids = np.concatenate(ids, dtype=self.dtype, casting="unsafe")
        mask = None
        if self.masked:
            mask = token_mask(self.token_lengths[ids], lengths, learned)
        n_documents = sum(ends_document for _, ends_document in units)
        hashes = line_hashes(texts, with_single_lines=split == "train")
        return Encoded(ids, mask, n_documents, sum(map(len, texts)), n_learned_bytes, hashes)


def utf8(parts):
    """The texts of parts, as bytes. JSON can hold halves of characters (lone surrogates), which no
    tokenizer can encode: they become question marks."""
    return [text.encode("utf-8", "replace") for text, _ in parts]


def token_mask(token_lengths, part_lengths, learned):
    """
    Lengths in bytes of tokens (n,) and of the parts they spell, and whether each part is learned ->
    whether each token is, (n,) bool: it is if any of its bytes is. A token that straddles the
    boundary between a prompt and a response is what the model has to say after the prompt's whole
    tokens.

        text                r e a d  l e a r n e d
        byte_is_learned     0 0 0 0  1 1 1 1 1 1 1
        tokens              [re][ad  l][ear][ned]      begin at bytes 0, 2, 5, 8
        mask                 0    1     1    1
    """
    byte_is_learned = np.repeat(learned, part_lengths)
    token_starts = np.cumsum(token_lengths) - token_lengths
    # reduceat() combines the bytes from each start up to the next one
    return np.logical_or.reduceat(byte_is_learned, token_starts)


# ---- which text two sets share -------------------------------------------------------------------
# The same text may come in another dress: with other line ends, below a header, in the middle of a
# file of many documents. So its lines are compared, without white space: by two in a row, since
# unrelated texts do share single ones (imports, the words of a licence).
#
# Of a large split not all hashes are kept but the smallest ones. Which ones these are depends on
# the text only, so any two splits can be compared, on the hashes that both of them would keep.

HASH_BASE = 0x9E3779B97F4A7C15  # odd, so that it has an inverse modulo 2**64


def mixed(hashes):
    """uint64 (n,) -> the same many, of which each bit depends on all bits."""
    hashes = hashes ^ (hashes >> np.uint64(32))
    hashes = hashes * np.uint64(HASH_BASE)
    return hashes ^ (hashes >> np.uint64(29))


# A number for each byte. None for what ends a line or a unit, so that line ends do not count.
BYTE_CODES = mixed(np.arange(1, 257, dtype=np.uint64) * np.uint64(HASH_BASE))
BYTE_CODES[[0, ord("\n")]] = 0


@functools.lru_cache(maxsize=4)
def powers(base, n):
    """1, base, base**2, ... modulo 2**64, (n,) uint64"""
    factors = np.full(n, base, np.uint64)
    factors[0] = 1
    return np.cumprod(factors)


def line_hashes(units, with_single_lines):
    """
    Texts of units (in UTF-8) -> hashes of their neighbouring lines, two by two, (n,) uint64. Where
    a sentence ends a line does, too, and lines of fewer than LINE characters are passed over. A
    unit with one line gives the hash of this line, and one without any the hash of all its text.

    With single lines, the hash of each line is there, too: a short document may be a line of
    another text.

    All lines are hashed at once. A line's hash is a polynomial in HASH_BASE, modulo 2**64, with
    the codes of its bytes as coefficients: what the sum over all bytes gains from the line's start
    to its end, divided by the power at which the line starts.
    """
    codes = np.frombuffer(b"\0" + b"\0".join(units) + b"\0", np.uint8).copy()
    codes[1:][(codes[:-1] == ord(".")) & (codes[1:] == ord(" "))] = ord("\n")
    codes = codes[(codes > ord(" ")) | (codes == ord("\n")) | (codes == 0)]
    table_size = max(2 * BATCH, 1 << len(codes).bit_length())  # few sizes, so that tables are kept
    sums = BYTE_CODES[codes]
    sums *= powers(HASH_BASE, table_size)[:len(codes)]
    np.cumsum(sums, out=sums)
    shifts = powers(pow(HASH_BASE, -1, 2**64), table_size)

    # What is hashed lies between two bounds, at which the text has \0 or \n.
    def hashes_between(start, end):
        return mixed((sums[end] - sums[start]) * shifts[start])

    unit_bounds = np.flatnonzero(codes == 0)
    bounds = np.flatnonzero((codes == 0) | (codes == ord("\n")))
    is_long = np.diff(bounds) > LINE
    starts = bounds[:-1][is_long]
    lines = hashes_between(starts, bounds[1:][is_long])
    unit = np.searchsorted(unit_bounds, starts, side="right") - 1  # which one each line is in
    lines_of_unit = np.bincount(unit, minlength=len(unit_bounds) - 1)
    in_a_row = unit[1:] == unit[:-1]
    pairs = mixed(lines[:-1] * np.uint64(HASH_BASE) + lines[1:])[in_a_row]
    if not with_single_lines:
        lines = lines[lines_of_unit[unit] == 1]
    without = lines_of_unit == 0
    whole = hashes_between(unit_bounds[:-1][without], unit_bounds[1:][without])
    return np.concatenate([pairs, lines, whole])


# ---- a set's documents over its splits -----------------------------------------------------------

def place(parts, seed):
    """
    A unit's parts -> its place in [0, 1) under a seed: a hash of its text without white space. It
    does not depend on the set, so that sets with the same seed and fractions put a text into the
    same split. (Sets of few documents and the sample's targets have other bounds. So load_sets()
    compares lines, too.)
    """
    text = b"".join(utf8(parts)).replace(BYTE_ORDER_MARK.encode(), b"")
    text = text.translate(None, b" \t\n\r\v\f")
    digest = hashlib.blake2b(text, digest_size=6, key=seed.to_bytes(8, "little")).digest()
    return int.from_bytes(digest, "little") / 2**48


def split_bounds(name, first, seed, fractions):
    """
    Returns val_end and test_start: a unit whose place is below val_end goes to val, one from
    test_start on to test. If `first`, the first FEW units, are all there are, val and test get at
    least one each.

        0      val_end                                    test_start      1
        |--val--|-------------------train---------------------|---test----|
    """
    val_end = fractions[0]
    test_start = 1 - fractions[1]
    places = sorted({place(unit.parts, seed) for unit in first})
    if len(places) < FEW:  # all there are, or many are alike
        if len(places) < 3:
            fail(f"{name}: {len(places)} different documents (pages, where one has over {WHOLE:,} "
                 "characters), too few for train, val and test; give it more text")
        val_end = max(val_end, np.nextafter(places[0], 1))
        test_start = min(test_start, places[-1])
    return val_end, test_start


def placed_units(units, seed, val_end, test_start):
    """
    Yields (unit, its split, whether <|endoftext|> follows): it ends a document, and also a page
    whose next page goes to another split.
    """
    unit = None
    split = None
    for following in units:
        at = place(following.parts, seed)
        split_of_following = "train"
        if at < val_end:
            split_of_following = "val"
        elif at >= test_start:
            split_of_following = "test"
        if unit:
            yield unit, split, following.starts_document or split_of_following != split
        unit = following
        split = split_of_following
    yield unit, split, True


def batches_of(placed):
    """Lists of what placed_units() yields, of about BATCH characters each."""
    batch = []
    n_chars = 0
    for item in placed:
        batch.append(item)
        n_chars += sum(len(text) for text, _ in item[0].parts)
        if n_chars >= BATCH:
            yield batch
            batch = []
            n_chars = 0
    if batch:
        yield batch


@functools.lru_cache(maxsize=1)
def threads(workers):
    """The same threads for all sets, since each has a tokenizer of its own."""
    return concurrent.futures.ThreadPoolExecutor(workers)


def write_splits(writers, encoder, placed, workers):
    """
    Tokenizes units in threads and writes them in order, so that the files do not depend on the
    number of threads. (tiktoken and numpy let other threads of Python work.) Returns the number of
    documents.
    """
    n_documents = 0
    waiting = collections.deque()  # futures, the oldest first

    def write_oldest():
        for split, encoded in waiting.popleft().result().items():
            writers[split].write(encoded)

    try:
        for batch in batches_of(placed):
            n_documents += sum(unit.starts_document for unit, _, _ in batch)
            waiting.append(threads(workers).submit(encoder.encode_batch, batch))
            # a few more than are worked on, so that no thread waits for text
            if len(waiting) > 2 * workers:
                write_oldest()
        while waiting:
            write_oldest()
    except KeyboardInterrupt:
        # A thread that was just being started is not among those that Python ends at its exit, and
        # the program would wait for it for ever. shutdown() ends it, too.
        threads(workers).shutdown(wait=False, cancel_futures=True)
        threads.cache_clear()
        raise
    return n_documents


def make_partial_folder(final):
    """
    The folder in which a set is written, until it is complete. mkdir() makes it exclusively: a
    second program that prepares the same set ends here.
    """
    partial = final.with_name(f".{final.name}.partial")
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        fail(f"cannot write {partial}: {error.strerror}")
    try:
        partial.mkdir()
    except FileExistsError:
        # We cannot tell which: a killed program leaves its folder, and no lock works everywhere.
        fail(f"{partial} exists: another program may be writing it now, or one was killed while it "
             f"did; if none is running, delete it with: rm -r {shlex.quote(str(partial))}")
    except OSError as error:
        fail(f"cannot write {partial}: {error.strerror}")
    return partial


def move_into_place(partial, final):
    """
    Renames partial to final. A set that is there already is moved aside first and deleted last, so
    that it comes back if anything fails. (Windows renames no folder onto another one.)
    """
    aside = final.with_name(f".{final.name}.old")
    try:
        if final.is_dir() and not final.is_symlink():
            shutil.rmtree(aside, ignore_errors=True)  # left by a killed program
            os.rename(final, aside)
        os.rename(partial, final)
    finally:
        if aside.exists() and not final.exists():  # the rename failed, or Ctrl-C came
            os.rename(aside, final)
        shutil.rmtree(aside, ignore_errors=True)


def settings(args):
    """The flags that a prepared set depends on, beside its text."""
    return {flag: getattr(args, flag)
            for flag in ("tokenizer", "seed", "val_fraction", "test_fraction")}


def check_splits(name, splits, n_documents):
    """Each split must hold something."""
    for split in SPLITS:
        if splits[split]["tokens"] == 0:
            mend = f"a larger --{split}_fraction"
            if split == "train":
                mend = "smaller fractions of val and test"
            fail(f"{name}: its {split} split is empty ({n_documents:,} documents); give it more "
                 f"text or {mend}")


def refuse_existing(name, args):
    """Fails if there is a set of this name, or anything else, that we may not replace."""
    folder = Path(args.data_dir, name)
    if not os.path.lexists(folder):
        return
    if not (folder / "meta.json").is_file():  # somebody's folder, of the same name by chance
        fail(f"{folder} exists and is not a prepared set; choose another name, or another "
             "--data_dir")
    if not args.overwrite:
        fail(f"{folder} exists; choose another name or add --overwrite")


def print_set(name, schema, splits, n_documents):
    """A line that says what was written."""
    note = ""
    if schema != "text":
        learned = sum(counts["learned"] for counts in splits.values())
        tokens = sum(counts["tokens"] for counts in splits.values())
        note = f", {schema}, {learned / tokens:.0%} of tokens learned"
    sizes = "".join(f" {splits[split]['tokens']:>12,} {split}" for split in SPLITS)
    say(f"  {name:11s}{sizes}   ({n_documents:,} documents{note})")


def write_set(name, units, tokenizer, args, fractions, origin):
    """
    Tokenizes units into the folder data_dir/name, which appears as a whole or not at all. fractions
    are the shares of val and test; origin says where the text came from.
    """
    # units is a generator: what is taken from it here is put back below
    first = list(itertools.islice(units, FEW))
    if not first:
        fail(f"{name}: {origin} holds no text")
    schema = first[0].schema
    val_end, test_start = split_bounds(name, first, args.seed, fractions)
    dtype = "uint16" if tokenizer.n_vocab <= 65_536 else "uint32"
    final = Path(args.data_dir, name)
    partial = make_partial_folder(final)
    writers = {}
    try:
        refuse_existing(name, args)  # again: another program may have written it in the meantime
        for split in SPLITS:
            writers[split] = SplitWriter(partial, split, dtype, schema != "text")
        encoder = Encoder(tokenizer, dtype, schema != "text")
        units = itertools.chain(first, units)
        placed = placed_units(units, args.seed, val_end, test_start)
        n_documents = write_splits(writers, encoder, placed, args.workers)
        splits = {split: writer.finish() for split, writer in writers.items()}
        check_splits(name, splits, n_documents)
        meta = {
            "name": name,
            "origin": origin,
            "schema": schema,
            "tokenizer": tokenizer.name,
            "vocab_size": tokenizer.n_vocab,
            "eot_token": tokenizer.eot_token,
            "dtype": dtype,
            "documents": n_documents,
            "settings": settings(args),
            "splits": splits,
        }
        text = json.dumps(meta, indent=1)
        save_atomically(partial / "meta.json", lambda f: f.write(text.encode()))
        for writer in writers.values():
            writer.close()  # Windows renames no folder with open files
        move_into_place(partial, final)
    except OSError as error:
        fail(f"cannot write {partial}: {error.strerror}; nothing of {name} was changed")
    finally:
        # after an error and after Ctrl-C, too; if all went well, there is nothing left to delete
        for writer in writers.values():
            writer.close()
        shutil.rmtree(partial, ignore_errors=True)
    print_set(name, schema, splits, n_documents)


# ---- one set for each value ----------------------------------------------------------------------
# With --split_by the units of a corpus are sorted into files by their value, a JSON line each, and
# each of these files then becomes a set. So the corpus is read once, whatever the number of values,
# and memory stays flat. While this works, the text takes its own size once more on the disk.

def sort_by_value(name, units, folder, args):
    """
    Writes units into a file for each value of --split_by, in a folder -> {value: path}. Values of
    too few documents to be divided are left out; prints which ones.
    """
    paths = {}
    n_documents = collections.Counter()
    texts = collections.defaultdict(set)  # what place() says of different ones, up to three
    with contextlib.ExitStack() as stack:
        files = {}
        for unit in units:
            value = unit.value
            if value not in files:
                if len(files) == MOST_VALUES:
                    some = ", ".join(repr(seen[:40]) for seen in list(files)[:4])
                    fail(f"{name}: {args.split_by} has more than {MOST_VALUES} values, among them "
                         f"{some}; choose a key with fewer, or leave out --split_by")
                paths[value] = folder / f"{len(files)}.jsonl"
                files[value] = stack.enter_context(open(paths[value], "w", encoding="ascii"))
            # write_set() needs three different places
            if len(texts[value]) < 3:
                texts[value].add(place(unit.parts, args.seed))
            n_documents[value] += unit.starts_document
            line = json.dumps([unit.schema, unit.starts_document, unit.parts])
            files[value].write(line + "\n")

    # only now is it known which values are rare
    rare = [value for value in paths if len(texts[value]) < 3]
    for value in rare:
        del paths[value]
    if rare:
        some = ", ".join(f"{value[:40]} ({n_documents[value]})" for value in rare[:4])
        more = f" and {len(rare) - 4} more" if len(rare) > 4 else ""
        say(f"  {name}: left out {len(rare)} values of {args.split_by} with fewer than 3 different "
            f"documents, too few for train, val and test: {some}{more}")
    return paths


def names_of_values(name, values, taken, args):
    """{value: NAME_VALUE}, made of letters that a name may have. taken, {name: whose it is}, are
    those of this call; on some systems names that differ only in case are one."""
    names = {}
    for value in values:
        # a dot at the end is lost on Windows
        safe = re.sub(r"[^A-Za-z0-9_.-]+", "_", value[:80]).rstrip(".")
        names[value] = f"{name}_{safe}"
        whose = f"{value!r} of {name}"
        # the first one to ask for a name has it
        other = taken.setdefault(names[value].lower(), whose)
        if other != whose:
            fail(f"{other} and {whose} would both be the set {names[value]}; rename one of these "
                 f"values of {args.split_by}")
        refuse_existing(names[value], args)
    return names


def sorted_units(path):
    """The units that sort_by_value() wrote into a file."""
    progress = Progress(path.stat().st_size)
    with open(path, "rb") as lines:
        for line in lines:
            yield Unit(*json.loads(line))
            progress.show(lines)


def write_set_by_value(name, units, tokenizer, taken, args, fractions, origin):
    """write_set() for each value of --split_by. All names are checked before a set is written."""
    folder = make_partial_folder(Path(args.data_dir, name))
    try:
        try:
            paths = sort_by_value(name, units, folder, args)
        except OSError as error:  # own_units() reports those of reading
            fail(f"cannot write {folder}: {error.strerror}; no set was changed")
        if not paths:
            fail(f"{name}: {origin} has no value of {args.split_by} with enough documents")
        for value, set_name in names_of_values(name, paths, taken, args).items():
            origin_of_value = f"{origin} ({args.split_by} {value[:80]})"
            # closing: Windows deletes no open file
            with contextlib.closing(sorted_units(paths[value])) as units:
                write_set(set_name, units, tokenizer, args, fractions, origin_of_value)
            paths[value].unlink()  # to have its place on the disk for the next one
    finally:
        shutil.rmtree(folder, ignore_errors=True)


# ---- reading -------------------------------------------------------------------------------------
# A model sees windows of T + 1 tokens, where T is block_size: the first T are its input, the last T
# the targets. In text a window may start anywhere. Examples are packed into rows instead: a row
# holds as many whole ones as fit, and a window is one row. With T + 1 = 8, prompts in small and
# responses in capital letters, and | for <|endoftext|>:
#
#     tokens    a a A A | b B | c c c C C | d D D |
#     row 1     a a A A | b B |
#     row 2     c c c C C | . .                        d D D | would not fit;
#     row 3     d D D | . . . .                        what fills a row is never learned

def written_at(folder):
    """When a set was written, in nanoseconds: tells whether it is still the one that was opened."""
    return os.stat(folder / "meta.json").st_mtime_ns


@functools.lru_cache(maxsize=64)
def mapped(path, dtype, since):
    """
    The numbers in a file of a set as it is `since` a time. Only the files used last stay open:
    a system may allow 256 of them. An open one keeps its numbers if the set is overwritten, but one
    that is opened again would have the new set's: that ends the program.
    """
    numbers = np.zeros(0, dtype)
    if os.path.getsize(path) > 0:  # an empty file cannot be mapped
        # a plain array on the same memory: a np.memmap is slower to slice
        numbers = np.asarray(np.memmap(path, dtype=dtype, mode="r"))
    if written_at(path.parent) != since:  # asked last, so that nothing can change in between
        fail(f"{path.parent}/ was overwritten while it was read; prepare it as it was, or start "
             "again with what is there now")
    return numbers


def places_at(u, n, extra, visible):
    """
    Fractions u (B,) in [0, 1) -> where windows begin, (B,) int64, among the n places of a split. A
    window takes 1 + extra places.

    Only the share `visible` of the places is shown. This is not the beginning of the split, which
    may all be of one kind: it is cut into stretches, spread evenly, of some 64 windows each.

        n places, 3 stretches, visible = 0.3      |#####---------|#####---------|#####---------|
    """
    window = 1 + extra
    n_visible = max(n * visible, window)  # never less than one window
    stretches = 1
    if n_visible < n:
        stretches = max(1, int(n_visible / (64 * window)))
    # The whole part of u * stretches says which stretch, the rest how far into it.
    stretch, within = np.divmod(u * stretches, 1)
    stretch_start = stretch * n / stretches
    # A window must end within its stretch, so the last `extra` places are no starts.
    start = stretch_start + within * (n_visible / stretches - extra)
    return start.astype(np.int64)


def spread_evenly(n, wanted):
    """At most `wanted` of the numbers 0 ... n - 1, at least one, from the first to the last."""
    wanted = max(1, min(n, wanted))
    return np.unique(np.linspace(0, n - 1, wanted).round().astype(np.int64))


class TextSplit:
    """
    Text: a window may start at any token that has block_size more behind it. The methods are those
    of PackedSplit, and do what TokenSet's methods of the same names say; positions(start) is where
    the tokens of windows that begin at start (B,) are, (B, T + 1), and whether they may be learned.
    """

    def __init__(self, n_tokens, n_learned, learned_bytes, block_size):
        self.n_tokens = n_tokens
        self.n_learned = n_learned
        self.learned_bytes = learned_bytes
        self.block_size = block_size

    def available(self):
        return self.n_tokens

    def fill(self):
        return 1.0

    def at_fraction(self, u, visible):
        return places_at(u, self.n_tokens, self.block_size, visible)

    def spread(self, max_tokens):
        n_windows = (self.n_tokens - 1) // self.block_size
        return spread_evenly(n_windows, max_tokens // self.block_size) * self.block_size

    def positions(self, start):
        at = start[:, None] + np.arange(self.block_size + 1)
        return at, np.ones_like(at, dtype=bool)


class PackedSplit:
    """Examples: a window is one of the rows that pack() made of them, and starts where it does."""

    def __init__(self, row_starts, row_ends, n_learned, learned_bytes, block_size):
        self.row_starts = row_starts  # (R,)
        self.row_ends = row_ends  # (R,)
        self.n_learned = n_learned  # within the rows
        self.learned_bytes = learned_bytes
        self.block_size = block_size

    def available(self):
        return int((self.row_ends - self.row_starts).sum())

    def fill(self):
        return self.available() / (len(self.row_starts) * self.block_size)

    def at_fraction(self, u, visible):
        return self.row_starts[places_at(u, len(self.row_starts), 0, visible)]

    def spread(self, max_tokens):
        return self.row_starts[spread_evenly(len(self.row_starts), max_tokens // self.block_size)]

    def positions(self, start):
        at = start[:, None] + np.arange(self.block_size + 1)
        row = np.searchsorted(self.row_starts, start)
        last = self.row_ends[row][:, None] - 1
        # Behind a row's end comes the next row, or nothing: its last token is taken instead.
        return np.minimum(at, last), at <= last


def pack(starts, ends, mask, room):
    """
    Packs examples, which start and end at (E,) tokens, into rows of at most `room` tokens.

    Walks over them in order: a row begins with an example and holds as many whole ones as fit. An
    example that is longer than a row has one of its own, and loses its end. One that has nothing to
    learn within a row, since its prompt fills it, begins none.

    Returns where rows start (R,) and end (R,), and how many examples have nothing to learn.
    """
    has_response = np.maximum.reduceat(mask, starts) > 0  # (E,): any 1 up to the next start
    # of those that are cut only what is left counts
    for i in np.flatnonzero(ends - starts > room):
        has_response[i] = np.count_nonzero(mask[starts[i]:starts[i] + room]) > 0
    n_left_out = np.count_nonzero(~has_response)

    # Where a row starts depends on the row before, so this is a plain loop over examples. Reading
    # numbers from lists is several times faster than from arrays.
    starts = starts.tolist()
    ends = ends.tolist()
    has_response = has_response.tolist()
    row_starts = []
    row_ends = []
    i = 0
    while i < len(starts):
        if not has_response[i]:
            i += 1
            continue
        limit = starts[i] + room
        row_starts.append(starts[i])
        row_end = min(ends[i], limit)  # the limit if this example is cut
        i += 1
        while i < len(starts) and ends[i] <= limit:
            row_end = ends[i]
            i += 1
        row_ends.append(row_end)
    return np.array(row_starts, dtype=np.int64), np.array(row_ends, dtype=np.int64), n_left_out


class TokenSet:
    """
    A folder that write_set() filled: its meta.json and, for each split, a memory map of its tokens.

    visible is the share of the train split that is shown. For examples, n_examples counts them in
    all splits; n_cut are longer than a row and lose their end, n_left_out have no learned token in
    a row.
    """

    def __init__(self, data_dir, name, block_size, visible=1.0):
        self.name = name
        self.folder = Path(data_dir, name)
        self.block_size = block_size
        self.visible = visible
        self.n_examples = 0
        self.n_cut = 0
        self.n_left_out = 0
        if not (self.folder / "meta.json").is_file():
            there = sorted(meta.parent.name for meta in Path(data_dir).glob("[!.]*/meta.json"))
            command = "python prepare_data.py"
            if name not in SAMPLE:
                command += f" {shlex.quote(name)}=PATH"
            if str(data_dir) != "data":
                command += f" --data_dir {shlex.quote(str(data_dir))}"
            fail(f"no set '{name}' in {data_dir}/ (there: {', '.join(there) or 'none'}); name "
                 f"another folder with --data_dir, or prepare it with: {command}")
        try:
            self.open()
        except OSError as error:
            fail(f"cannot read {error.filename}: {error.strerror}")
        except (ValueError, KeyError, TypeError, AttributeError, ZeroDivisionError) as error:
            self.fail_damaged(f"{self.folder}/meta.json is not what prepare_data.py writes "
                              f"({error!r})")

    def open(self):
        """Reads meta.json and checks the files against it."""
        self.written_at = written_at(self.folder)
        self.meta = json.loads((self.folder / "meta.json").read_text())
        self.tokenizer = self.meta["tokenizer"]
        self.vocab_size = self.meta["vocab_size"]
        self.dtype = np.dtype(self.meta["dtype"])
        self.masked = "learned" in self.meta["splits"]["train"]
        self.splits = {split: self.open_split(split) for split in SPLITS}
        # Called here so that counts that are missing raise now, and not at the end of a run.
        for split in SPLITS:
            self.tokens_per_byte(split)
        self.averages()
        self.digest = []  # tells whether two folders hold the same tokens
        for split in SPLITS:
            self.digest.append(self.meta["splits"][split].get("sha256"))
            self.digest.append(self.meta["splits"][split].get("mask_sha256"))

    def open_split(self, split):
        """-> TextSplit or PackedSplit"""
        counts = self.meta["splits"][split]
        n_tokens = counts["tokens"]
        n_learned = counts.get("learned", n_tokens)
        self.check_size(f"{split}.bin", n_tokens, self.dtype)
        self.tokens(split)  # raises now if we may not read the file
        if self.masked:
            self.check_size(f"{split}.mask.bin", n_tokens, np.dtype(np.uint8))
            self.check_mask(split, n_learned)
        if self.meta.get("schema", "text") != "text":
            return self.open_examples(split)
        if n_tokens < self.block_size + 1:
            fail(f"{self.folder}/{split}.bin: {n_tokens} tokens, too short for --block_size "
                 f"{self.block_size} (needs {self.block_size + 1}); give '{self.name}' more text "
                 "or lower --block_size")
        learned_bytes = counts.get("learned_bytes", counts["bytes"])
        return TextSplit(n_tokens, n_learned, learned_bytes, self.block_size)

    def open_examples(self, split):
        """-> PackedSplit"""
        room = self.block_size + 1
        mask = self.mask(split)
        starts, ends = self.examples(split)
        row_starts, row_ends, n_left_out = pack(starts, ends, mask, room)
        if len(row_starts) == 0:
            fail(f"{self.name}/{split}: no example has a response within --block_size "
                 f"{self.block_size}; raise it")
        self.n_examples += len(starts)
        self.n_cut += np.count_nonzero(ends - starts > room)
        self.n_left_out += n_left_out
        # <|endoftext|> has no bytes; all other tokens are taken to have as many each
        has_bytes = mask.copy()
        has_bytes[ends - 1] = 0
        n_learned = 0
        n_with_bytes = 0
        for start, end in zip(row_starts.tolist(), row_ends.tolist()):
            # a row's first token is no target: nothing comes before it
            n_learned += np.count_nonzero(mask[start + 1:end])
            n_with_bytes += np.count_nonzero(has_bytes[start + 1:end])
        share = n_with_bytes / np.count_nonzero(has_bytes)  # the rest is cut, or left out
        learned_bytes = share * self.meta["splits"][split]["learned_bytes"]
        return PackedSplit(row_starts, row_ends, n_learned, learned_bytes, self.block_size)

    def fail_damaged(self, what):
        fail(f"{what}; prepare '{self.name}' again with --overwrite")

    def check_size(self, file, n_tokens, dtype):
        path = self.folder / file
        found = f"{path.stat().st_size} bytes" if path.exists() else "missing"
        if found != f"{n_tokens * dtype.itemsize} bytes":
            self.fail_damaged(f"{path}: {found}, but meta.json says {n_tokens} tokens of "
                              f"{dtype.itemsize} bytes")

    def check_mask(self, split, n_learned):
        mask = self.mask(split)
        found = np.count_nonzero(mask)
        highest = mask.max(initial=0)
        if found != n_learned or highest != 1:
            self.fail_damaged(f"{self.folder}/{split}.mask.bin: {found} learned tokens, highest "
                              f"value {highest}, but meta.json says {n_learned} and 1")

    def tokens(self, split):
        """Token ids of a split, (n,)."""
        return mapped(self.folder / f"{split}.bin", self.dtype, self.written_at)

    def mask(self, split):
        """1 for a token that is learned, 0 for one that is only read, (n,), of a masked set."""
        return mapped(self.folder / f"{split}.mask.bin", np.dtype(np.uint8), self.written_at)

    def sketch(self, split):
        """The sorted hashes that SplitWriter kept of a split, (n,); none of an earlier version."""
        n = self.meta["splits"][split].get("sketch", 0)
        if not isinstance(n, int) or n == 0:
            return np.zeros(0, np.uint64)
        self.check_size(f"{split}.sketch.bin", n, np.dtype(np.uint64))
        return mapped(self.folder / f"{split}.sketch.bin", np.dtype(np.uint64), self.written_at)

    def examples(self, split):
        """Where examples start and end, (E,) and (E,): the last token of each is <|endoftext|>."""
        ends = np.flatnonzero(self.tokens(split) == self.meta["eot_token"]) + 1
        if len(ends) == 0 or ends[-1] != len(self.tokens(split)):
            self.fail_damaged(f"{self.name}/{split}.bin does not end in <|endoftext|> as examples "
                              "do")
        return np.concatenate([[0], ends[:-1]]), ends

    def available(self, split):
        """Tokens that a split can show: not those of examples that are cut or left out."""
        return self.splits[split].available()

    def density(self, split):
        """Learned tokens per token of a split; 1 for text."""
        return self.splits[split].n_learned / self.splits[split].available()

    def fill(self, split):
        """Tokens per position of a window: 1 for text, less where examples do not fill it."""
        return self.splits[split].fill()

    def tokens_per_byte(self, split):
        """
        Learned tokens per byte of learned text, of what a split can show: turns a loss per token
        into one per byte.
        """
        return self.splits[split].n_learned / self.splits[split].learned_bytes

    def averages(self):
        """(bytes per token, tokens per document) of all splits; <|endoftext|> is a token."""
        splits = self.meta["splits"].values()
        tokens = sum(counts["tokens"] for counts in splits)
        n_bytes = sum(counts["bytes"] for counts in splits)
        pieces = sum(counts["documents"] for counts in splits)  # a divided document has several
        return n_bytes / tokens, tokens / self.meta.get("documents", pieces)

    def at_fraction(self, split, u):
        """Where windows begin, (B,), for fractions u (B,) in [0, 1) of what a split shows."""
        visible = self.visible if split == "train" else 1.0
        return self.splits[split].at_fraction(u, visible)

    def spread(self, split, max_tokens):
        """Where disjoint windows begin, spread evenly over a split, of at most max_tokens in all:
        always the same ones."""
        return self.splits[split].spread(max_tokens)

    def windows(self, split, start):
        """
        Windows that begin at start (B,) of a split -> inputs and next-token targets, both (B, T)
        int64. Targets that are not learned are IGNORE.
        """
        at, inside = self.splits[split].positions(start)  # (B, T + 1), the second bool
        ids = self.tokens(split)[at].astype(np.int64)
        if ids.max() >= self.vocab_size:
            self.fail_damaged(f"{self.name}/{split}.bin holds token id {ids.max()}, outside the "
                              f"vocabulary of {self.vocab_size}")
        x = ids[:, :-1]
        y = ids[:, 1:]
        if self.masked:
            learned = (self.mask(split)[at] > 0) & inside
            y = np.where(learned[:, 1:], y, IGNORE)
        return x, y


def gather(sets, split, source, u):
    """
    Sequence i is the window at the fraction u[i] of a split of sets[source[i]]. Returns inputs and
    next-token targets, both (B, T) int64. Loops over sources, never over tokens.
    """
    shape = (len(source), sets[0].block_size)
    x = np.empty(shape, dtype=np.int64)
    y = np.empty(shape, dtype=np.int64)
    for k in np.unique(source):
        rows = np.flatnonzero(source == k)
        x[rows], y[rows] = sets[k].windows(split, sets[k].at_fraction(split, u[rows]))
    return x, y


# ---- the sets of a run ---------------------------------------------------------------------------
# Sources and targets must have one tokenizer, and a source should not hold the text by which the
# mixture is judged.

def overlap(some, others):
    """
    About the share of the lines of one split that another one holds too, from the sketches of both:
    sorted hashes (n,) uint64, the SKETCH smallest ones of all lines (a bottom-k sketch).
    """
    for sketch in (some, others):
        # A full sketch knows the hashes up to its largest one, any other one knows all there are.
        if len(sketch) == SKETCH:
            some = some[some <= sketch[-1]]
    if len(some) == 0 or len(others) == 0:
        return 0.0
    at = np.searchsorted(others, some)
    at = np.minimum(at, len(others) - 1)  # behind the last one
    return np.mean(others[at] == some)


def load_sets(data_dir, names, targets, block_size):
    """
    Opens the sources (names) and the targets of a run -> {name: TokenSet}, each once. Fails unless
    all have one tokenizer. Prints how many examples are cut by block_size, and which sources hold
    text of a target's val or test.
    """
    sets = {}
    for name in [*names, *targets]:
        if name not in sets:
            sets[name] = TokenSet(data_dir, name, block_size)

    # one of them is as good as another to compare the rest with
    first = sets[names[0]]
    for other in sets.values():
        if (other.tokenizer, other.vocab_size) != (first.tokenizer, first.vocab_size):
            fail(f"'{other.name}' was made with the tokenizer {other.tokenizer} "
                 f"({other.vocab_size} ids), '{first.name}' with {first.tokenizer} "
                 f"({first.vocab_size}); prepare all with the same --tokenizer")

    for s in sets.values():
        if s.n_cut:
            say(f"{s.name}: of {s.n_examples:,} examples {s.n_cut:,} are longer than --block_size "
                f"{block_size} and lose their end; {s.n_left_out:,} have a prompt as long and are "
                "left out")

    for target, name, split in itertools.product(targets, names, ("val", "test")):
        share = overlap(sets[target].sketch(split), sets[name].sketch("train"))
        if share >= 0.005:  # less would print as 0%
            say(f"warning: about {share:.0%} of the {split} split of target {target} is in the "
                f"train split of source {name} (in pairs of neighbouring lines)")
    return sets


def sample_sources(data_dir):
    """The sources of the sample that are prepared in data_dir; a machine may lack some of them."""
    return [name for name in SAMPLE_SOURCES if Path(data_dir, name, "meta.json").is_file()]


# ---- the command line ----------------------------------------------------------------------------

def parse_args(argv):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="python prepare_data.py [NAME=PATH ...] [options]   (--help for all)")
    g = parser.add_argument
    g("sets", nargs="*", metavar="NAME=PATH", help="a set's name and its text; none: the sample")
    g("--tokenizer", default="bytes", help="bytes, gpt2, cl100k_base, another tiktoken encoding, or"
      " FILE.tiktoken (default: %(default)s)")
    g("--text_key", help="key of a document's text in records (default: text)")
    g("--prompt_key", help="key of an example's prompt (default: a known one)")
    g("--response_key", help="key of its response")
    g("--split_by", metavar="KEY", help="write one set for each value that this key has in records,"
      " named NAME_VALUE; a.b is b within a")
    g("--data_dir", default="data", help="folder of the prepared sets (default: %(default)s)")
    g("--val_fraction", type=float, default=0.05,
      help="share of documents in val (default: %(default)s)")
    g("--test_fraction", type=float, default=0.05,
      help="share of documents in test (default: %(default)s)")
    g("--seed", type=int, default=1337, help="of the split and of `noise` (default: %(default)s)")
    g("--workers", type=int, default=os.cpu_count() or 1,
      help="threads that tokenize; the files do not depend on it (default: all cores)")
    g("--overwrite", action="store_true", help="replace prepared sets of the same name")
    args = parser.parse_args(argv)
    # A shell leaves the ~ in --data_dir=~/x as it is.
    args.data_dir = os.path.expanduser(args.data_dir)
    args.tokenizer = os.path.expanduser(args.tokenizer)
    if args.split_by and not args.sets:
        fail("--split_by needs NAME=PATH, a corpus to split")

    smallest = min(args.val_fraction, args.test_fraction)
    if not (smallest > 0 and args.val_fraction + args.test_fraction < 1):
        fail(f"--val_fraction {args.val_fraction} and --test_fraction {args.test_fraction} must be "
             "above 0 and leave something to train on")
    if not 0 <= args.seed < 2**63:
        fail(f"--seed must be a number from 0 to {2**63 - 1}")
    if not 1 <= args.workers <= 1024:
        fail(f"--workers {args.workers} must be from 1 to 1024")
    if bool(args.prompt_key) != bool(args.response_key) or (args.text_key and args.prompt_key):
        fail("--prompt_key and --response_key go together, and not with --text_key")
    return args


def own_paths(args):
    """{name: path} from the command line's NAME=PATH."""
    paths = {}
    for pair in args.sets:
        name, _, path = pair.partition("=")
        if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", name) or not path:
            fail(f"{pair!r} is not NAME=PATH (a name of letters, digits, '_', '.', '-')")
        if name in paths:
            fail(f"the name {name} is given twice")
        if not args.split_by:
            refuse_existing(name, args)
        # A shell leaves a ~ behind an = as it is.
        paths[name] = os.path.expanduser(path)
    return paths


def announce(args, tokenizer):
    """The first line of output."""
    say(f"tokens written to {args.data_dir}/ with the {tokenizer.name} tokenizer "
        f"({tokenizer.n_vocab:,} ids)")


def write_own_sets(args):
    """Prepares the sets that the command line names. All paths are checked before any is read."""
    paths = own_paths(args)
    files = {name: find_files(name, path, args) for name, path in paths.items()}
    tokenizer = get_tokenizer(args.tokenizer)
    announce(args, tokenizer)
    fractions = (args.val_fraction, args.test_fraction)
    taken = {}  # names of sets that come of --split_by
    for name, path in paths.items():
        units = own_units(name, files[name], args)
        if args.split_by:
            write_set_by_value(name, units, tokenizer, taken, args, fractions, path)
        else:
            write_set(name, units, tokenizer, args, fractions, path)


def sample_is_there(name, args):
    """Was this set of the sample prepared before? Anything else of its name ends the program."""
    folder = Path(args.data_dir, name)
    meta = {}
    with contextlib.suppress(OSError, TypeError, ValueError):
        meta = dict(json.loads((folder / "meta.json").read_text()))
    if meta.get("origin", "the sample") != "the sample":
        fail(f"{folder} was made from {meta['origin']}, and the sample has a set '{name}' too; use "
             "another --data_dir")
    if os.path.lexists(folder) and not (folder / "meta.json").is_file():
        fail(f"{folder} exists and is not a prepared set; use another --data_dir")
    if args.overwrite or not folder.exists():
        return False
    if meta.get("settings") != settings(args):
        fail(f"{folder} exists, prepared with other settings; to replace it, run prepare_data.py "
             "with --overwrite")
    say(f"  {name:11s} is there already, kept")
    return True


def write_sample(args):
    """Prepares those sets of the sample that are not there yet."""
    missing = [name for name in SAMPLE if not sample_is_there(name, args)]
    tokenizer = get_tokenizer(args.tokenizer)
    announce(args, tokenizer)
    if not missing:
        return
    for name, (schema, documents) in sample_sets(args.seed).items():
        if name not in missing:
            continue
        fractions = (args.val_fraction, args.test_fraction)
        if name in SAMPLE_TARGETS:
            # Nothing trains on a target: all but a tenth of it is there to measure with.
            fractions = (0.45, 0.45)
        units = sample_units(schema, documents)
        write_set(name, units, tokenizer, args, fractions, "the sample")


def main(argv=None):
    args = parse_args(argv)
    started = time.time()
    try:
        if args.sets:
            write_own_sets(args)
        else:
            write_sample(args)
    except OSError as error:  # of a file that is read; write_set() reports its own
        fail(f"cannot read {error.filename or 'a file'}: {error.strerror}")
    except (ValueError, OverflowError) as error:  # input that no other place expects
        fail(error)
    say(f"done in {time.time() - started:.0f} s")


def prepare_sample(data_dir):
    """For fastmix.py: prepares the sample if the set that it searches toward is not there yet."""
    if not Path(data_dir, SAMPLE_TARGETS[0], "meta.json").is_file():
        say(f"no sample in {data_dir}/ yet; preparing it from text on this machine")
        main(["--data_dir", str(data_dir)])


if __name__ == "__main__":
    try:
        signal.signal(signal.SIGINT, on_ctrl_c)
        main()
    except KeyboardInterrupt:
        print("\nstopped; the set being written was left out", file=sys.stderr)
        sys.exit(130)

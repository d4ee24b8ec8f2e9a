"""Instruction data: which tokens are learned, how examples are packed, and that every mean is over
learned tokens."""
import base64
import json
import math
import re
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import fastmix
import prepare_data
from conftest import TINY, example_set, log_rows, markov, refused, results, run, write_set
from fastmix import batch_loss, evaluate, target_gradient
from model import GPT, GPTConfig
from prepare_data import IGNORE, SPLITS, TokenSet, gather, load_sets
from test_prepare import line_of

TALK = "user: hi {i}\nassistant: [ho\n]user: ☃\nassistant: [{i}]"


def talk(i, role="role", content="content", user="user", assistant="assistant"):
    return [{role: user, content: f"hi {i}"}, {role: assistant, content: "ho"},
            {role: user, content: "☃"}, {role: assistant, content: f"{i}"}]


def in_parts(turns):
    """The same turns with a list of parts as content."""
    return [{"role": turn["role"],
             "content": [{"type": "text", "text": turn["content"][:1]}, turn["content"][1:]]}
            for turn in turns]


def with_tools(i):
    """OpenAI's form of a call, and its older one, of which one has a text before it."""
    call = {"name": "add", "arguments": f'{{"a": {i}}}'}
    return [{"role": "developer", "content": "be brief"},
            {"role": "user", "content": f"?{i}"},
            {"role": "assistant", "content": None,
             "tool_calls": [{"id": "c1", "type": "function", "function": call}]},
            {"role": "tool", "content": "7", "tool_calls": None},
            {"role": "assistant", "content": "once more", "function_call": call},
            {"role": "function", "name": "add", "content": 8},
            {"role": "assistant", "content": f"!{i}"}]


def sharegpt_with_tools(i):
    return [{"from": "human", "value": f"?{i}"},
            {"from": "function_call", "value": f"add({i})"},
            {"from": "observation", "value": "7"},
            {"from": "gpt", "value": f"!{i}"}]


def by_many_names(i):
    turns = []
    for name in ("gpt", "chatgpt", "bing", "bard", "bot", "model", "assistant", "GPT"):
        turns += [{"from": "User", "value": f"{i}"}, {"from": name, "value": "ho"}]
    return turns


def partly_learned(i):
    """Marks that say which of the assistant's turns are learned; null says nothing."""
    marks = [{"weight": 0}, {"weight": 1}, {"train": False}, {"train": True}, {"weight": None},
             {"weight": 0.0, "train": True}, {}]
    turns = [{"role": "user", "content": f"?{i}"}]
    return turns + [{"role": "assistant", "content": f"!{i}", **mark} for mark in marks]


# case: (its schema, a line's record of example i, its text with the learned parts in brackets)
RECORDS = {
    "response": (
        "prompt/response",
        lambda i: {"prompt": f"say {i}", "response": f"well, {i}", "id": i},
        "say {i}\n[well, {i}]"),
    "completion": (
        "prompt/completion",
        lambda i: {"prompt": f"say {i}", "completion": f"{i}"},
        "say {i}\n[{i}]"),
    "answer": (
        "question/answer",
        lambda i: {"question": f"{i} + 1 = ", "answer": str(i + 1)},
        "{i} + 1 = [{i1}]"),
    "output": (
        "instruction/output",
        lambda i: {"instruction": f"add {i}", "input": "ü" * (i % 3), "output": f"ï{i}",
                   "text": "no"},
        "add {i}{input}\n[ï{i}]"),
    "messages": (
        "messages",
        lambda i: {"messages": talk(i)},
        TALK),
    "parts": (
        "messages",
        lambda i: {"messages": in_parts(talk(i))},
        TALK),
    "tools": (
        "messages",
        lambda i: {"messages": with_tools(i)},
        "developer: be brief\nuser: ?{i}\n"
        'assistant: [{{"name": "add", "arguments": "{{\\"a\\": {i}}}"}}\n]tool: 7\n'
        'assistant: [once more\n{{"name": "add", "arguments": "{{\\"a\\": {i}}}"}}\n]tool: 8\n'
        "assistant: [!{i}]"),
    "sharegpt's tools": (
        "conversations",
        lambda i: {"conversations": sharegpt_with_tools(i)},
        "user: ?{i}\nassistant: [add({i})\n]tool: 7\nassistant: [!{i}]"),
    "names": (
        "conversations",
        lambda i: {"conversations": by_many_names(i)},
        7 * "user: {i}\nassistant: [ho\n]" + "user: {i}\nassistant: [ho]"),
    "weights": (
        "messages",
        lambda i: {"messages": partly_learned(i)},
        "user: ?{i}\nassistant: !{i}\nassistant: [!{i}\n]assistant: !{i}\nassistant: [!{i}\n]"
        "assistant: [!{i}\n]assistant: !{i}\nassistant: [!{i}]"),
    "numbers": (
        "question/answer",
        lambda i: {"question": i, "answer": i + 1},
        "{i}\n[{i1}]"),
    "dolly": (
        "instruction/response",
        lambda i: {"instruction": f"add {i}", "context": f"to {i}", "response": f"{i}", "x": "no"},
        "to {i}\nadd {i}\n[{i}]"),
    "orca": (
        "question/response",
        lambda i: {"system_prompt": "be brief\n", "question": f"?{i}", "response": f"!{i}"},
        "be brief\n?{i}\n[!{i}]"),
    "squad": (
        "question/answer",
        lambda i: {"context": ["a", f"b{i}"], "question": f"?{i}", "answer": f"!{i}"},
        "a\nb{i}\n?{i}\n[!{i}]"),
    "history": (
        "instruction/output",
        lambda i: {"instruction": f"?{i}", "input": "", "output": f"!{i}", "system": "be brief",
                   "history": [["q1", "a1"], ["q2", "a2"]]},
        "be brief\nq1\na1\nq2\na2\n?{i}\n[!{i}]"),
    "history of turns": (
        "prompt/response",
        lambda i: {"prompt": f"?{i}", "response": f"!{i}", "system": None, "history": talk(i)},
        "user: hi {i}\nassistant: ho\nuser: ☃\nassistant: {i}\n?{i}\n[!{i}]"),
    "system beside a chat": (
        "conversations",
        lambda i: {"system": "be brief", "conversations": talk(i, "from", "value", "human", "gpt")},
        "system: be brief\n" + TALK),
    "system beside turns": (
        "prompt/completion",
        lambda i: {"system": "be brief", "prompt": talk(i)[:3], "completion": talk(i)[3:]},
        "system: be brief\nuser: hi {i}\nassistant: ho\nuser: ☃\nassistant: [{i}]"),
    "sharegpt": (
        "conversations",
        lambda i: {"conversations": talk(i, "from", "value", "human", "gpt")},
        TALK),
    "trl": (
        "prompt/completion",
        lambda i: {"prompt": talk(i)[:3], "completion": talk(i)[3:]},
        "user: hi {i}\nassistant: ho\nuser: ☃\nassistant: [{i}]"),
    "one turn": (
        "prompt/completion",
        lambda i: {"prompt": f"?{i}", "completion": [{"role": "assistant", "content": f"!{i}"}]},
        "user: ?{i}\nassistant: [!{i}]"),
    "repeated prompt": (
        "prompt/completion",
        lambda i: {"prompt": f"?{i}", "completion": talk(i)},
        TALK),
    "own": (
        "ask/reply",
        lambda i: {"ask": f"?{i}", "reply": f"!{i}", "prompt": "x", "response": "y"},
        "?{i}\n[!{i}]"),
}


def marked(ids, mask, tokenizer):
    """Tokens and their mask as text, learned parts in brackets, <|endoftext|> as |."""
    out = []
    on = 0
    for token, learned in [*zip(ids.tolist(), mask.tolist()), (None, 0)]:
        if learned != on:
            out.append(b"[" if learned else b"]")
            on = learned
        if token == tokenizer.eot_token:
            out.append(b"|")
        elif token is not None:
            out.append(tokenizer.decode_single_token_bytes(token))
    return b"".join(out).decode()


def examples_in(text):
    """A marked text, cut behind each example."""
    return text.replace("|]", "|]\0").split("\0")[:-1]


def shown_in(x, y, tokenizer):
    """The examples that windows show, as marked text; what is behind a row's end is not learned."""
    seen = []
    for row, target in zip(x, y):
        next_token = np.append(row[1:], target[-1])
        assert ((target == IGNORE) | (target == next_token)).all()
        end = np.flatnonzero(target != IGNORE)[-1]
        ids = np.append(row[: end + 1], target[end])
        mask = np.append(0, target[: end + 1] != IGNORE)
        seen += examples_in(marked(ids, mask, tokenizer))
    return seen


@pytest.mark.parametrize("case", RECORDS)
def test_mask_of_every_token_through_packing(tmp_path, case):
    """The prompt is read, the response and its <|endoftext|> are learned; packing loses and cuts
    none that fits."""
    schema, record, text = RECORDS[case]
    with open(tmp_path / "qa.jsonl", "w") as f:
        f.writelines(json.dumps(record(i)) + "\n" for i in range(300))
    keys = ["--prompt_key", "ask", "--response_key", "reply"] if schema == "ask/reply" else []
    stdout = run("prepare_data.py", "qa=qa.jsonl", *keys, cwd=tmp_path)
    assert f"300 documents, {schema}" in stdout
    expected = set()
    for i in range(300):
        more = ["", "\nü", "\nüü"][i % 3]
        expected.add(text.format(i=i, i1=i + 1, input=more).removesuffix("]") + "|]")

    tokenizer = prepare_data.bytes_tokenizer()
    block_size = 600
    data = TokenSet(tmp_path / "data", "qa", block_size)
    assert data.n_examples == 300 and data.n_cut == data.n_left_out == 0
    found = set()
    for split in SPLITS:
        counts = data.meta["splits"][split]
        ids = data.tokens(split)
        mask = data.mask(split)
        assert len(ids) == len(mask) == counts["tokens"] and mask.sum() == counts["learned"]
        examples = examples_in(marked(ids, mask, tokenizer))
        assert len(examples) == counts["documents"]
        # the windows a model sees show each example once and whole, and the same tokens are learned
        row_starts = data.splits[split].row_starts
        x, y = data.windows(split, row_starts)
        assert len(x) < len(examples) / 2 and data.available(split) == len(ids)
        assert data.fill(split) == len(ids) / x.size
        assert np.array_equal(data.spread(split, 10**9), row_starts)
        assert shown_in(x, y, tokenizer) == examples
        assert data.splits[split].n_learned == (y != IGNORE).sum() == counts["learned"]
        assert data.density(split) == (y != IGNORE).sum() / len(ids)
        assert data.tokens_per_byte(split) == counts["learned"] / counts["learned_bytes"]
        found |= set(examples)
    assert found == expected


def test_a_token_that_straddles_the_boundary_is_learned(tmp_path):
    """The token " x" holds the prompt's last space and the response's first letter."""
    tokens = [bytes([i]) for i in range(256)] + [b" x"]
    lines = [base64.b64encode(token) + b" %d\n" % i for i, token in enumerate(tokens)]
    (tmp_path / "t.tiktoken").write_bytes(b"".join(lines))
    records = [{"prompt": f"a{i} ", "response": "xy"} for i in range(200)]
    (tmp_path / "qa.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    run("prepare_data.py", "qa=qa.jsonl", "--tokenizer", "t.tiktoken", cwd=tmp_path)
    data = TokenSet(tmp_path / "data", "qa", 16)
    tokenizer = prepare_data.file_tokenizer(tmp_path / "t.tiktoken")
    text = marked(data.tokens("train"), data.mask("train"), tokenizer)
    assert text.startswith("a") and text.split("|]")[0].endswith("[ xy")
    assert not text.split("[")[0].endswith(" ")
    counts = data.meta["splits"]["train"]
    assert counts["learned_bytes"] == 2 * counts["documents"]


def test_long_examples_are_counted_not_hidden(tmp_path, capsys):
    """Of 5 examples one is longer than a row, and one has a prompt that fills it: cut, and left
    out."""
    ids = []
    mask = []
    for prompt, response in ((3, 4), (3, 40), (20, 3), (2, 2), (4, 4)):
        ids += [1] * prompt + [2] * response + [9]
        mask += [0] * prompt + [1] * (response + 1)
    write_set(tmp_path / "d", dict.fromkeys(SPLITS, np.uint8(ids)), 10, schema="prompt/response",
              masks=dict.fromkeys(SPLITS, np.uint8(mask)))
    data = TokenSet(tmp_path, "d", 16)
    assert (data.n_examples, data.n_cut, data.n_left_out) == (15, 6, 3)
    rows = data.splits["train"]
    assert rows.row_starts.tolist() == [0, 8, 76]
    assert rows.row_ends.tolist() == [8, 25, 90]
    x, y = data.windows("train", rows.row_starts)
    # 3 of the prompt, then as much of the response as the row holds
    assert y[1].tolist() == [IGNORE] * 2 + [2] * 14
    assert y[2].tolist() == [IGNORE, 2, 2, 9] + [IGNORE] * 4 + [2] * 4 + [9] + [IGNORE] * 3
    assert rows.n_learned == 5 + 14 + 3 + 5 == (y != IGNORE).sum()
    load_sets(tmp_path, ["d"], ["d"], 16)
    assert capsys.readouterr().out.startswith("d: of 15 examples 6 are longer than --block_size 16 "
                                              "and lose their end; 3 ")


def packed_in_a_loop(starts, ends, mask, room):
    """The reference of pack(), example by example -> rows [(start, end)], learned tokens, examples
    left out."""
    answer = [next((t for t in range(start, end) if mask[t]), end)
              for start, end in zip(starts, ends)]
    usable = [a < end and a - start < room for a, start, end in zip(answer, starts, ends)]
    rows = []
    i = 0
    while i < len(starts):
        # examples before this one fit whole
        fitting = int(np.searchsorted(ends, starts[i] + room, side="right"))
        if usable[i]:
            row_end = ends[fitting - 1] if fitting > i else starts[i] + room
            rows.append((starts[i], row_end))
            i = max(fitting, i + 1)
        else:
            i += 1
    learned = sum(sum(mask[start + 1:end].tolist()) for start, end in rows)
    return rows, learned, usable.count(False)


def random_examples(rng):
    """300 examples of any shape -> ids, mask: learned from the first token on, nowhere, in several
    turns, prompts and examples too long for a row."""
    ids = []
    mask = []
    for _ in range(300):
        longest = [2, 4, 12, 60][rng.integers(4)]
        turns = rng.integers(0, longest, 2 * rng.integers(1, 4))  # read, learned, read, ...
        turns[-1] += 1  # no example is empty
        learned = np.arange(len(turns)) % 2
        if rng.random() < 0.2:  # the prompt alone, or at most the last id
            learned = 1 - learned if rng.random() < 0.5 else 0 * learned
        mask += [*np.repeat(learned, turns), rng.integers(2)]
        ids += [*rng.integers(0, 9, turns.sum()), 9]
    return np.uint8(ids), np.uint8(mask)


@pytest.mark.parametrize("seed", range(12))
def test_packing_equals_a_loop_over_examples(tmp_path, seed):
    rng = np.random.default_rng(seed)
    block_size = int(rng.integers(3, 30))
    ids, mask = random_examples(rng)
    write_set(tmp_path / "d", dict.fromkeys(SPLITS, ids), 10, schema="prompt/response",
              masks=dict.fromkeys(SPLITS, mask))
    data = TokenSet(tmp_path, "d", block_size)
    starts, ends = data.examples("train")
    assert len(starts) == len(ends) == 300
    rows, learned, left_out = packed_in_a_loop(starts.tolist(), ends.tolist(), mask,
                                               block_size + 1)
    packed = data.splits["train"]
    assert list(zip(packed.row_starts.tolist(), packed.row_ends.tolist())) == rows
    _, y = data.windows("train", packed.row_starts)
    assert packed.n_learned == learned == (y != IGNORE).sum()
    too_long = (ends - starts > block_size + 1).sum()
    assert (data.n_examples, data.n_cut, data.n_left_out) == (900, 3 * too_long, 3 * left_out)
    assert 0 < left_out < 300 and len(rows) > 10


def test_a_million_examples_are_packed_in_seconds():
    """Most of them fit into rows, some do not, some are left out."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(5, 25, 10**6)
    prompts = rng.integers(1, 20, 10**6)
    ends = np.cumsum(lengths)
    starts = ends - lengths
    within = np.arange(ends[-1]) - np.repeat(starts, lengths)
    mask = (within >= np.repeat(prompts, lengths)).astype(np.uint8)
    started = time.process_time()
    row_starts, row_ends, n_left_out = prepare_data.pack(starts, ends, mask, 17)
    assert time.process_time() - started < 6  # about 1 on the machine this was written on
    assert n_left_out > 10**5 and 10**5 < len(row_starts) < 10**6
    assert (row_ends - row_starts).max() == 17


def test_bad_masks(tmp_path, capsys):
    for name in ("good", "short", "lost", "twos", "nothing"):
        example_set(tmp_path / name, 1, 2, n=60)
    (tmp_path / "lost" / "val.mask.bin").unlink()
    mask = np.fromfile(tmp_path / "short" / "train.mask.bin", np.uint8)
    n = len(mask)
    mask[:-3].tofile(tmp_path / "short" / "train.mask.bin")
    (mask * 2).tofile(tmp_path / "twos" / "train.mask.bin")
    (mask * 0).tofile(tmp_path / "nothing" / "train.mask.bin")
    cases = {
        "short": f"short/train.mask.bin: {n - 3} bytes, but meta.json says {n} tokens",
        "lost": "lost/val.mask.bin: missing",
        "twos": "highest value 2",
        "nothing": "0 learned tokens",
    }
    for name, part in cases.items():
        line = line_of(capsys, load_sets, tmp_path, ["good", name], ["good"], 16)
        assert part in line and "--overwrite" in line, line
    line = line_of(capsys, load_sets, tmp_path, ["good"], ["good"], 3)
    assert "good/train: no example has a response within --block_size 3" in line


BAD_RECORDS = {  # name: (a line, parts of the message)
    "type": ('{"prompt": "x", "response": {"y": 5}}', "type.jsonl, line 120: a chat must be"),
    "text": ('{"text": "plain"}', "text.jsonl, line 120: it is of the schema text",
             "prompt/response; prepare"),
    "chat": ('{"messages": [{"role": "assistant", "content": "x"}]}',
             "chat.jsonl, line 120: it is of the schema"),
    "seven": ('{"messages": 7}', "seven.jsonl, line 120: a chat must be a list of turns"),
    "turns": ('{"messages": "hello"}', "turns.jsonl, line 120: a chat must be a list of turns"),
    "no content": ('{"messages": [{"role": "user", "text": "x"}]}', "line 120: a chat must be"),
    "keys": ('{"Input": "x", "Output": "y"}',
             "line 120: no known key in it, but Input, Output; known are text, ",
             "--prompt_key and --response_key"),
    "preference": ('{"prompt": "x", "chosen": "y", "rejected": "z"}', "line 120", "preferences",
                   "--prompt_key prompt --response_key chosen"),
    "number": ("5", "line 120: a JSON object is needed, not a int"),
}


def test_bad_examples(tmp_path):
    good = [json.dumps({"prompt": f"p{i}", "response": f"r{i}"}) for i in range(150)]
    (tmp_path / "good.jsonl").write_text("\n".join(good))
    (tmp_path / "z.txt").write_text("plain text")
    for name, (line, *parts) in BAD_RECORDS.items():
        (tmp_path / f"{name}.jsonl").write_text("\n".join([*good[:119], line, *good[119:]]))
        message = refused("prepare_data.py", f"x={name}.jsonl", cwd=tmp_path)
        assert all(part in message for part in parts), message
    cases = [
        (["x=[gz]*"],
         "z.txt: it is of the schema text, but what comes before it is of prompt/response"),
        (["x=good.jsonl", "--prompt_key", "p"], "--prompt_key and --response_key go together"),
        (["x=good.jsonl", "--prompt_key", "p", "--response_key", "r"],
         "good.jsonl, line 1: no p in it, but prompt, response; known are"),
        (["x=good.jsonl", "--prompt_key", "prompt", "--response_key", "r"],
         "good.jsonl, line 1: no r in it, but prompt, response; known are"),
        (["x=good.jsonl", "--text_key", "body"], "good.jsonl, line 1: no body in it, but prompt"),
        # the advice for preferences; the others here have no `chosen`
        (["x=preference.jsonl", "--prompt_key", "prompt", "--response_key", "chosen"],
         "line 1: no chosen in it"),
    ]
    for args, part in cases:
        message = refused("prepare_data.py", *args, cwd=tmp_path)
        assert part in message, message


def without_some_texts(kind):
    """300 records, of which every third has a text to learn."""
    records = []
    for i in range(300):
        has_text = i % 3 == 2
        if kind == "text":
            text = [None, " ", f"document {i}"][i % 3]
            records.append({"text": text})
        if kind == "qa":
            answer = ["", None, f"a{i}"][i % 3]
            records.append({"question": f"q{i}", "answer": answer})
        if kind == "chat":
            turns = [{"role": "user", "content": f"u{i}"}]
            if has_text:
                turns.append({"role": "assistant", "content": f"a{i}"})
            elif i % 5 == 0:
                turns = None
            records.append({"messages": turns})
    return records


@pytest.mark.parametrize("kind", ["text", "qa", "chat"])
def test_records_without_a_text_are_left_out_and_counted(tmp_path, kind):
    """Nulls and empty texts, responses and chats; an error only where nothing is left."""
    records = without_some_texts(kind)
    lines = [json.dumps(record) + "\n" for record in records]
    (tmp_path / "some.jsonl").write_text("".join(lines))
    without = [line for i, line in enumerate(lines) if i % 3 != 2]
    (tmp_path / "none.jsonl").write_text("".join(without))
    stdout = run("prepare_data.py", "x=some.jsonl", cwd=tmp_path)
    assert "x: left out 200 records without a text to learn" in stdout
    assert "(100 documents" in stdout
    stderr = run("prepare_data.py", "y=none.jsonl", cwd=tmp_path, status=2)
    assert "error: y: none.jsonl holds no text" in stderr and "Traceback" not in stderr
    assert sorted(path.name for path in (tmp_path / "data").iterdir()) == ["x"]


def test_what_is_in_records_and_not_read_is_counted(tmp_path):
    """Images are left out of their turns; turns under an unknown role are read."""
    with open(tmp_path / "chat.jsonl", "w") as f:
        for i in range(60):
            parts = [{"type": "image_url", "image_url": {}}, {"type": "text", "text": "?"}]
            turns = [{"role": "user", "content": parts}, {"role": "Narrator", "content": "so"}]
            if i % 3 == 0:
                turns.append({"role": "user", "content": {"type": "audio"}})
            turns.append({"role": "assistant", "content": f"{i}"})
            f.write(json.dumps({"messages": turns, "context": {"a": "x", "b": 1}}) + "\n")
    stdout = run("prepare_data.py", "x=chat.jsonl", cwd=tmp_path)
    assert ("x: in records, 60 {a, b} left out; 60 image_url left out; "
            "60 turns of 'Narrator' read, not learned; 20 audio left out\n") in stdout
    data = TokenSet(tmp_path / "data", "x", 64)
    text = marked(data.tokens("train"), data.mask("train"), prepare_data.bytes_tokenizer())
    texts = {re.sub(r"\d+", "0", example) for example in examples_in(text)}
    assert texts == {"user: ?\nNarrator: so\nassistant: [0|]"}


# ---- losses, gradients and runs over learned tokens: these need fastmix.py -----------------------

def model_of(V, T, seed=0):
    torch.manual_seed(seed)
    return GPT(GPTConfig(V, T, 1, 2, 8)).double()


def test_losses_and_alignments_are_means_over_learned_tokens(tmp_path):
    """A tiny set of text and one of examples, by hand: each row's gradient by autograd."""
    T = 16
    V = 65
    example_set(tmp_path / "qa", 1, 2, n=24)
    ids = markov(3, 900)
    write_set(tmp_path / "text", {"train": ids[:300], "val": ids[300:600], "test": ids[600:]}, V)
    sets = [TokenSet(tmp_path, name, T) for name in ("qa", "text")]
    model = model_of(V, T)
    head = model.lm_head.weight

    def by_hand(x, y):
        """Sum of losses over learned tokens, its gradient at the head, and their number."""
        x = torch.as_tensor(x)
        y = torch.as_tensor(y)
        logits = (model(x) @ head.T).flatten(0, 1)
        token_loss = F.cross_entropy(logits, y.flatten().clamp(min=0), reduction="none")
        loss = (token_loss * (y.flatten() != IGNORE)).sum()
        return loss.detach(), torch.autograd.grad(loss, head)[0], (y != IGNORE).sum()

    qa = sets[0]
    total, _, n = by_hand(*qa.windows("val", qa.splits["val"].row_starts))
    found = evaluate(model, head, [qa], "val", 10**6, 3)["qa"]
    assert math.isclose(found, total / n, rel_tol=1e-6)  # added up in float32

    u = np.array([0.1, 0.6, 0.5])
    x, y = map(torch.from_numpy, gather(sets, "val", np.array([0, 0, 1]), u))
    _, grad, n = by_hand(x, y)
    G, S = target_gradient(model, head, x, y, torch.ones(3).double(), n)
    torch.testing.assert_close(G, grad / n)
    h = model(x).detach()[y != IGNORE]  # nothing of prompts, nor of what fills a row
    torch.testing.assert_close(S, h.T @ h / n)

    source = np.array([0, 0, 0, 1])
    u = np.array([0.0, 0.3, 0.9, 0.2])
    x, y = map(torch.from_numpy, gather(sets, "train", source, u))
    weight = torch.tensor([2.0, 2.0, 2.0, 0.5]).double()
    loss, token_loss, parts = batch_loss(model, head, x, y, weight, y.numel(), G, [3 * T, 4 * T])
    assert not token_loss[y == IGNORE].any()
    expected = 0
    for k in range(2):
        rows = torch.from_numpy(source == k)
        total, g, n = by_hand(x[rows], y[rows])
        alignment = parts[k] * y.numel() / (weight[rows][0] * n)
        torch.testing.assert_close(alignment, (G * g / n).sum())
        expected += weight[rows][0] * total / y.numel()
    torch.testing.assert_close(loss, expected)


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """
    The target's prompts follow chain 1, its responses chain 2. `answers` shares the responses
    alone, `asks` has the target's responses as its prompts, `same` has the target's prompts: only
    the first helps where prompts are masked.
    """
    folder = tmp_path_factory.mktemp("planted")
    for name, prompt, response in (("target", 1, 2), ("answers", 3, 2), ("asks", 2, 3),
                                   ("same", 1, 4)):
        example_set(folder / "data" / name, prompt, response)
    ids = markov(2, 4000)
    splits = {"train": ids[:2000], "val": ids[2000:3000], "test": ids[3000:]}
    reversed_splits = {split: part[::-1] for split, part in splits.items()}
    ones = {split: np.ones(len(part), np.uint8) for split, part in splits.items()}
    write_set(folder / "data" / "text", splits, 65)
    (folder / "ones" / "data").mkdir(parents=True)
    for where, masks in (("data", None), ("ones/data", ones)):
        write_set(folder / where / "a", splits, 65, masks=masks)
        write_set(folder / where / "b", reversed_splits, 65, masks=masks)
    sparse = {}
    for split, mask in ones.items():
        n_learned = 40 if split == "train" else 400
        sparse[split] = mask * (np.arange(len(mask)) < n_learned)
    write_set(folder / "data" / "sparse", splits, 65, masks=sparse)
    return folder


SEARCH = [*TINY, "--max_steps", 160, "--learning_rate", 1e-2]


def mixture_of(out):
    return json.loads((out / "mixture.json").read_text())


def test_finds_the_source_whose_responses_match(planted):
    def search(seed):
        run("fastmix.py", *SEARCH, "--sources", "answers,asks,same", "--target", "target",
            "--seed", seed, "--out_dir", f"found-{seed}", cwd=planted)
        return mixture_of(planted / f"found-{seed}")
    with ThreadPoolExecutor(2) as pool:
        for result in pool.map(search, (0, 1)):
            assert result["mixture"]["answers"] > 0.8, result["mixture"]


def test_text_and_examples_mix(planted):
    stdout = run("fastmix.py", *SEARCH, "--max_steps", 20, "--sources", "text,asks",
                 "--target", "target", "--out_dir", "mixed", cwd=planted)
    assert "learned token" in stdout
    assert mixture_of(planted / "mixed")["targets"]["target"]["learned_only"]


def test_masks_of_ones_change_no_bit(planted):
    flags = [*TINY, "--max_steps", 20, "--sources", "a,b", "--target", "a", "--out_dir", "bits"]
    run("fastmix.py", *flags, cwd=planted)
    run("fastmix.py", *flags, cwd=planted / "ones")
    rows, _, plain = results(planted / "bits")
    rows_ones, _, ones = results(planted / "ones" / "bits")
    assert plain.keys() == ones.keys() and rows == rows_ones
    for name, value in plain.items():
        if torch.is_tensor(value):
            assert torch.equal(value, ones[name]), name
        else:
            assert value == ones[name], name


def test_several_targets_with_and_without_masks(planted):
    """Each counts the same in the loss that is reported, too."""
    run("fastmix.py", *TINY, "--max_steps", 20, "--sources", "answers,text",
        "--target", "target,text", "--out_dir", "targets", cwd=planted)
    result = mixture_of(planted / "targets")
    for row in log_rows(planted / "targets"):
        assert list(row["target_losses"]) == ["target", "text"]
        assert math.isclose(row["target_val_loss"], sum(row["target_losses"].values()) / 2)
    targets = result["targets"].values()
    for key in ("test_loss", "test_bits_per_byte"):
        assert math.isclose(result[key], sum(target[key] for target in targets) / 2)
    assert [target["learned_only"] for target in targets] == [True, False]


def test_a_source_without_a_learned_token_in_the_batch_is_absent(planted):
    """`sparse` has learned tokens at one place of its train split, which most batches miss."""
    run("fastmix.py", *TINY, "--max_steps", 40, "--log_every", 1, "--sources", "text,sparse",
        "--target", "target", "--out_dir", "absent", cwd=planted)
    rows = log_rows(planted / "absent")
    unseen = [row["alignment"]["sparse"] is None for row in rows]
    assert 5 < sum(unseen[1:]) < 40
    for row in rows[1:]:
        assert row["alignment"]["text"] is not None and math.isfinite(row["train_loss"])
    first = unseen.index(False)  # until then the other source has nothing to be compared with
    assert first > 1
    for row in rows[:first]:
        assert row["alpha"] == {"text": 0.5, "sparse": 0.5}
    assert rows[first]["alpha"] != rows[0]["alpha"]


def checkpoint(path):
    return torch.load(path, weights_only=True)


def test_init_from(planted):
    """Weights only: the step counter, the optimizer and the mixture are new; the model's flags come
    from the file."""
    run("fastmix.py", *TINY, "--max_steps", 20, "--sources", "text", "--target", "text",
        "--out_dir", "base", cwd=planted)
    base = checkpoint(planted / "base" / "ckpt.pt")
    of_the_model = ("--n_layer", "--n_head", "--n_embd", "1", "2", "32")
    small = [flag for flag in TINY if flag not in of_the_model]
    flags = ["--init_from", "base/ckpt.pt", *small, "--sources", "answers,asks",
             "--target", "target", "--max_steps", 4]
    run("fastmix.py", *flags, "--learning_rate", 0, "--learning_rate_mixture", 0,
        "--out_dir", "still", cwd=planted)
    still = checkpoint(planted / "still" / "ckpt.pt")
    assert all(torch.equal(t, base["model"][name]) for name, t in still["model"].items())
    result = mixture_of(planted / "still")
    assert result["before"] == {"target": result["targets"]["target"]["val_loss"]}
    assert list(result["mixture"].values()) == [0.5, 0.5]

    run("fastmix.py", *flags, "--out_dir", "tuned", "--block_size", 32, cwd=planted)
    run("fastmix.py", "--resume", "--out_dir", "tuned", cwd=planted)
    result = mixture_of(planted / "tuned")
    assert result["before"]["target"] != result["targets"]["target"]["val_loss"]
    assert result["settings"]["n_layer"] == 1 and result["settings"]["block_size"] == 32

    other = {split: markov(1, 900) for split in SPLITS}
    write_set(planted / "data" / "other", other, 65, tokenizer="gpt2")
    (planted / "text.pt").write_text("no checkpoint")
    torch.save({"model": base["model"]}, planted / "weights.pt")
    torch.save({**base, "model": {"x": torch.ones(1)}}, planted / "strange.pt")
    cases = [
        (["--n_layer", 3], "base/ckpt.pt has --n_layer 1, not 3; leave the flag out"),
        (["--sources", "other", "--target", "other"],
         "ckpt.pt was made with the tokenizer synthetic", "'other' with gpt2"),
        (["--init_from", "gone.pt"], "gone.pt: no checkpoint there"),
        (["--init_from", "text.pt"], "text.pt cannot be read as a checkpoint"),
        (["--init_from", "weights.pt"], "weights.pt is not a checkpoint of this fastmix.py"),
        (["--init_from", "strange.pt"], "strange.pt", "fit"),
    ]

    def start_with(case):
        return refused("fastmix.py", *flags, "--out_dir", "new", *case[0], cwd=planted)
    with ThreadPoolExecutor(2) as pool:
        for (_, *parts), line in zip(cases, pool.map(start_with, cases)):
            assert all(part in line for part in parts), line
    assert not (planted / "new").exists()


# ---- one unit: tokens, without the padding of packed rows ----------------------------------------

UNITS = {"short": 0.4, "long": 0.4, "text": 0.2}


@pytest.fixture(scope="module")
def three_lengths(tmp_path_factory):
    """data/ with short examples, long ones and text, prepared from records."""
    folder = tmp_path_factory.mktemp("lengths")
    words = np.array("red blue green tall short quick slow bright dark calm loud soft".split())
    rng = np.random.default_rng(3)

    def text(n):
        return " ".join(rng.choice(words, n))[:n]
    records = {
        "short": [{"prompt": text(9), "response": text(10)} for _ in range(1500)],
        "long": [{"prompt": text(40), "response": text(99)} for _ in range(500)],
        "text": [{"text": text(300)} for _ in range(400)],
    }
    for name, rows in records.items():
        lines = [json.dumps(row) + "\n" for row in rows]
        (folder / f"{name}.jsonl").write_text("".join(lines))
    run("prepare_data.py", *(f"{name}={name}.jsonl" for name in records), cwd=folder)
    return folder


def tokens_drawn(folder, block_size, monkeypatch):
    """Shares of the tokens in the windows of a fixed run's batches, counted window by window."""
    monkeypatch.chdir(folder)
    counted = dict.fromkeys(UNITS, 0)
    gather = fastmix.gather

    def counting(sets, split, source, u):
        for k, s in enumerate(sets):
            start = s.at_fraction(split, u[source == k])
            if s.masked:
                ends = np.array(s.splits[split].row_ends)
                rows = np.searchsorted(s.splits[split].row_starts, start)
                counted[s.name] += int((ends[rows] - start).sum())
            else:
                counted[s.name] += len(start) * block_size
        return gather(sets, split, source, u)
    monkeypatch.setattr(fastmix, "gather", counting)
    mixture = ",".join(f"{name}={share}" for name, share in UNITS.items())
    fastmix.main([*TINY, "--sources", "short,long,text", "--mixture", mixture, "--out_dir",
                  f"out-{block_size}", "--block_size", str(block_size), "--max_steps", "60",
                  "--batch_size", "16"])
    total = sum(counted.values())
    return {name: n / total for name, n in counted.items()}, total


@pytest.mark.parametrize("block_size", [200, 512])
def test_a_run_and_its_exports_draw_the_shares(three_lengths, block_size, monkeypatch):
    """Of tokens, whatever the windows hold: as mixture.json says, and as a trainer that packs."""
    drawn, total = tokens_drawn(three_lengths, block_size, monkeypatch)
    assert drawn == pytest.approx(UNITS, abs=0.02)
    out = three_lengths / f"out-{block_size}"
    result = mixture_of(out)
    assert result["mixture"] == pytest.approx(UNITS)
    assert result["tokens"] == pytest.approx(total, rel=0.01)
    for name, source in result["sources"].items():
        assert source["tokens_seen"] == pytest.approx(drawn[name] * total, rel=0.03)
        meta = json.loads((three_lengths / "data" / name / "meta.json").read_text())
        assert source["tokens_available"] == meta["splits"]["train"]["tokens"]  # all are whole

    # a trainer that draws examples by the exported probabilities
    printed = run("plot_mixture.py", out, "--export", "llamafactory", cwd=three_lengths)
    names = re.search(r'dataset: "(.*)"', printed)[1].split(",")
    p = [float(x) for x in re.search(r'interleave_probs: "(.*)"', printed)[1].split(",")]
    rng = np.random.default_rng(0)
    tokens = {}
    for name, n in zip(names, rng.multinomial(100_000, p)):
        lines = (three_lengths / f"{name}.jsonl").read_text().splitlines()
        lengths = [sum(map(len, json.loads(line).values())) for line in lines]
        separators = {"short": 2, "long": 2, "text": 1}[name]  # a line end, and <|endoftext|>
        tokens[name] = (rng.choice(lengths, n) + separators).sum()
    shares = {name: n / sum(tokens.values()) for name, n in tokens.items()}
    assert shares == pytest.approx(UNITS, abs=0.01)


def test_proportional_does_not_depend_on_the_windows(three_lengths):
    found = []
    for block_size in (200, 512):
        out = f"proportional-{block_size}"
        run("fastmix.py", *TINY, "--sources", "short,long,text", "--mixture", "proportional",
            "--block_size", block_size, "--max_steps", 2, "--out_dir", out, cwd=three_lengths)
        found.append(mixture_of(three_lengths / out)["mixture"])
    tokens = {}
    for name in UNITS:
        meta = json.loads((three_lengths / "data" / name / "meta.json").read_text())
        tokens[name] = meta["splits"]["train"]["tokens"]
    expected = {name: n / sum(tokens.values()) for name, n in tokens.items()}
    assert found[0] == pytest.approx(expected)
    assert found[1] == pytest.approx(expected)

"""Instruction data: which tokens are learned, how examples are packed, and that every mean is over learned tokens."""
import base64
import json
import math
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import prepare_data
from conftest import TINY, example_set, log_rows, markov, refused, results, run, write_set
from fastmix import batch_loss, evaluate, target_gradient
from model import GPT, GPTConfig
from prepare_data import IGNORE, TokenSet, gather

EOT = 256
TALK = "user: hi {i}\nassistant: [ho\n]user: ☃\nassistant: [{i}]"


def talk(i, role="role", content="content", user="user", assistant="assistant"):
    return [{role: user, content: f"hi {i}"}, {role: assistant, content: "ho"}, {role: user, content: "☃"},
            {role: assistant, content: f"{i}"}]


RECORDS = {  # case: (its schema, a line's record of example i, its text with the learned parts in brackets)
    "response": ("prompt/response", lambda i: {"prompt": f"say {i}", "response": f"well, {i}", "id": i},
                 "say {i}\n[well, {i}]"),
    "completion": ("prompt/completion", lambda i: {"prompt": f"say {i}", "completion": f"{i}"}, "say {i}\n[{i}]"),
    "answer": ("question/answer", lambda i: {"question": f"{i} + 1 = ", "answer": str(i + 1)}, "{i} + 1 = [{i1}]"),
    "output": ("instruction/output", lambda i: {"instruction": f"add {i}", "input": "ü" * (i % 3), "output": f"ï{i}",
                                                "text": "no"}, "add {i}{input}\n[ï{i}]"),
    "messages": ("messages", lambda i: {"messages": talk(i)}, TALK),
    "parts": ("messages", lambda i: {"messages": [
        {"role": t["role"], "content": [{"type": "text", "text": t["content"][:1]}, t["content"][1:]]}
        for t in talk(i)]}, TALK),
    "null": ("messages", lambda i: {"messages": [
        {"role": "user", "content": f"?{i}"}, {"role": "assistant", "content": None, "tool_calls": [1]},
        {"role": "tool", "content": "7"}, {"role": "assistant", "content": f"!{i}"}]},
        "user: ?{i}\ntool: 7\nassistant: [!{i}]"),
    "sharegpt": ("conversations", lambda i: {"conversations": talk(i, "from", "value", "human", "gpt")}, TALK),
    "trl": ("prompt/completion", lambda i: {"prompt": talk(i)[:3], "completion": talk(i)[3:]},
            "user: hi {i}\nassistant: ho\nuser: ☃\nassistant: [{i}]"),
    "own": ("ask/reply", lambda i: {"ask": f"?{i}", "reply": f"!{i}", "prompt": "x", "response": "y"}, "?{i}\n[!{i}]"),
}


def marked(ids, mask, tokenizer):
    """Tokens and their mask as text, learned parts in brackets, <|endoftext|> as |."""
    out, on = [], 0
    for token, learned in [*zip(ids.tolist(), mask.tolist()), (None, 0)]:
        if learned != on:
            out.append(b"[" if learned else b"]")
            on = learned
        if token is not None:
            out.append(b"|" if token == tokenizer.eot_token else tokenizer.decode_single_token_bytes(token))
    return b"".join(out).decode()


@pytest.mark.parametrize("case", RECORDS)
def test_mask_of_every_token_through_packing(tmp_path, case):
    """The prompt is read, the response and its <|endoftext|> are learned; packing loses and cuts none that fits."""
    schema, record, text = RECORDS[case]
    with open(tmp_path / "qa.jsonl", "w") as f:
        f.writelines(json.dumps(record(i)) + "\n" for i in range(300))
    keys = ["--prompt_key", "ask", "--response_key", "reply"] if schema == "ask/reply" else []
    stdout = run("prepare_data.py", "qa=qa.jsonl", *keys, cwd=tmp_path)
    assert f"300 documents, {schema}" in stdout
    expected = {text.format(i=i, i1=i + 1, input="\nü" * (i % 3 > 0) + "ü" * (i % 3 - 1)).removesuffix("]") + "|]"
                for i in range(300)}
    tokenizer, block_size = prepare_data.bytes_tokenizer(), 180
    data = TokenSet(tmp_path / "data", "qa", block_size)
    assert not data.cut[1:].any()
    found = set()
    for split in ("train", "val", "test"):
        counts, ids, mask = data.meta["splits"][split], data.tokens(split), data.mask(split)
        assert len(ids) == len(mask) == counts["tokens"] and mask.sum() == counts["learned"]
        examples = marked(ids, mask, tokenizer).replace("|]", "|]\0").split("\0")[:-1]
        assert len(examples) == counts["documents"]
        # the windows a model sees show each example once and whole, and the same tokens are learned
        seen = []
        x, y = data.windows(split, data.rows[split][0])
        assert len(x) < len(examples) / 2 and data.available(split) == len(x) * block_size
        assert np.array_equal(data.spread(split, 10**9), data.rows[split][0])
        for row, target in zip(x, y):
            assert ((target == IGNORE) | (target == np.append(row[1:], target[-1]))).all()
            end = np.flatnonzero(target != IGNORE)[-1]
            ids = np.append(row[: end + 1], target[end])
            row_text = marked(ids, np.append(0, target[: end + 1] != IGNORE), tokenizer)
            seen += row_text.replace("|]", "|]\0").split("\0")[:-1]
        assert seen == examples
        assert data.learned[split] == (y != IGNORE).sum() == counts["learned"]
        assert data.density(split) == (y != IGNORE).mean()
        assert data.tokens_per_byte(split) == counts["learned"] / counts["learned_bytes"]
        found |= set(examples)
    assert found == expected


def test_a_token_that_straddles_the_boundary_is_learned(tmp_path):
    """The token " x" holds the prompt's last space and the response's first letter."""
    ranks = [bytes([i]) for i in range(256)] + [b" x"]
    (tmp_path / "t.tiktoken").write_bytes(b"".join(base64.b64encode(t) + b" %d\n" % i for i, t in enumerate(ranks)))
    (tmp_path / "qa.jsonl").write_text("".join(json.dumps({"prompt": f"a{i} ", "response": "xy"}) + "\n"
                                               for i in range(200)))
    run("prepare_data.py", "qa=qa.jsonl", "--tokenizer", "t.tiktoken", cwd=tmp_path)
    data = TokenSet(tmp_path / "data", "qa", 16)
    first = marked(data.tokens("train"), data.mask("train"), prepare_data.file_tokenizer(tmp_path / "t.tiktoken"))
    assert first.startswith("a") and first.split("|]")[0].endswith("[ xy") and not first.split("[")[0].endswith(" ")
    assert data.meta["splits"]["train"]["learned_bytes"] == 2 * data.meta["splits"]["train"]["documents"]


def test_long_examples_are_counted_not_hidden(tmp_path):
    """Of 5 examples one is longer than a row, and one has a prompt that fills it: cut, and left out."""
    ids, mask = [], []
    for prompt, response in ((3, 4), (3, 40), (20, 3), (2, 2), (4, 4)):
        ids += [1] * prompt + [2] * response + [9]
        mask += [0] * prompt + [1] * (response + 1)
    write_set(tmp_path / "d", dict.fromkeys(("train", "val", "test"), np.uint8(ids)), 10, schema="prompt/response",
              masks=dict.fromkeys(("train", "val", "test"), np.uint8(mask)))
    data = TokenSet(tmp_path, "d", 16)
    assert data.cut.tolist() == [15, 6, 3]
    assert data.rows["train"].tolist() == [[0, 8, 76], [8, 25, 90]]
    x, y = data.windows("train", data.rows["train"][0])
    assert y[1].tolist() == [IGNORE] * 2 + [2] * 14  # 3 of the prompt, then as much of the response as the row holds
    assert y[2].tolist() == [IGNORE, 2, 2, 9] + [IGNORE] * 4 + [2] * 4 + [9] + [IGNORE] * 3
    assert data.learned["train"] == 5 + 14 + 3 + 5 == (y != IGNORE).sum()


def packed_in_a_loop(starts, ends, mask, room):
    """The reference of TokenSet.pack(), example by example: rows [(start, end)], learned tokens, examples left out."""
    answer = [next((t for t in range(start, end) if mask[t]), end) for start, end in zip(starts, ends)]
    usable, rows, i = [a < end and a - start < room for a, start, end in zip(answer, starts, ends)], [], 0
    while i < len(starts):
        fitting = int(np.searchsorted(ends, starts[i] + room, side="right"))  # examples before this one fit whole
        if usable[i]:
            rows.append((starts[i], ends[fitting - 1] if fitting > i else starts[i] + room))
        i = max(fitting, i + 1) if usable[i] else i + 1
    return rows, sum(sum(mask[a + 1: b].tolist()) for a, b in rows), usable.count(False)


@pytest.mark.parametrize("seed", range(12))
def test_packing_equals_a_loop_over_examples(tmp_path, seed):
    """Of any shape: learned from the first token on, nowhere, in several turns, prompts and examples too long."""
    rng = np.random.default_rng(seed)
    ids, mask, block_size = [], [], int(rng.integers(3, 30))
    for _ in range(300):
        turns = rng.integers(0, [2, 4, 12, 60][rng.integers(4)], 2 * rng.integers(1, 4))  # read, learned, read, ...
        turns[-1] += 1  # no example is empty
        learned = np.arange(len(turns)) % 2
        if rng.random() < 0.2:
            learned = 1 - learned if rng.random() < 0.5 else 0 * learned  # the last id alone, or not even that
        mask += [*np.repeat(learned, turns), rng.integers(2)]
        ids += [*rng.integers(0, 9, turns.sum()), 9]
    splits = dict.fromkeys(("train", "val", "test"), np.uint8(ids))
    write_set(tmp_path / "d", splits, 10, schema="prompt/response", masks=dict.fromkeys(splits, np.uint8(mask)))
    data = TokenSet(tmp_path, "d", block_size)
    starts, ends = data.examples("train")
    assert len(starts) == len(ends) == 300
    rows, learned, left_out = packed_in_a_loop(starts.tolist(), ends.tolist(), np.uint8(mask), block_size + 1)
    assert data.rows["train"].T.tolist() == [list(row) for row in rows]
    assert data.learned["train"] == learned == (data.windows("train", data.rows["train"][0])[1] != IGNORE).sum()
    assert data.cut.tolist() == [900, 3 * (ends - starts > block_size + 1).sum(), 3 * left_out]
    assert 0 < left_out < 300 and len(rows) > 10


def model_of(V, T, seed=0):
    torch.manual_seed(seed)
    return GPT(GPTConfig(V, T, 1, 2, 8)).double()


def test_losses_and_alignments_are_means_over_learned_tokens(tmp_path):
    """A tiny set of text and one of examples, by hand: every row's gradient at the head from autograd."""
    T, V = 16, 65
    example_set(tmp_path / "qa", 1, 2, n=24)
    ids = markov(3, 900)
    write_set(tmp_path / "text", {"train": ids[:300], "val": ids[300:600], "test": ids[600:]}, V)
    sets = [TokenSet(tmp_path, n, T) for n in ("qa", "text")]
    model = model_of(V, T)
    head = model.lm_head.weight

    def by_hand(x, y):  # sum of losses over learned tokens, its gradient at the head, their number
        x, y = map(torch.as_tensor, (x, y))
        token_loss = F.cross_entropy((model(x) @ head.T).flatten(0, 1), y.flatten().clamp(min=0), reduction="none")
        loss = (token_loss * (y.flatten() != IGNORE)).sum()
        return loss.detach(), torch.autograd.grad(loss, head)[0], (y != IGNORE).sum()

    qa = sets[0]
    total, _, n = by_hand(*qa.windows("val", qa.rows["val"][0]))
    assert math.isclose(evaluate(model, head, qa, "val", 10**6, 3), total / n, rel_tol=1e-6)  # added up in float32
    x, y = map(torch.from_numpy, gather(sets, "val", np.array([0, 0, 1]), np.array([0.1, 0.6, 0.5])))
    _, G, n = by_hand(x, y)
    G_val, H = target_gradient(model, head, x, y, torch.ones(3).double(), n)
    torch.testing.assert_close(G_val, G / n)
    h = model(x).detach()[y != IGNORE]  # nothing of prompts, nor of what fills a row
    torch.testing.assert_close(H, h.T @ h / n)
    source = np.array([0, 0, 0, 1])
    x, y = map(torch.from_numpy, gather(sets, "train", source, np.array([0.0, 0.3, 0.9, 0.2])))
    r = torch.tensor([2.0, 2.0, 2.0, 0.5]).double()
    loss, token_loss, parts = batch_loss(model, head, x, y, r, y.numel(), G_val, [3 * T, 4 * T])
    assert not token_loss[y == IGNORE].any()
    expected = 0
    for k in range(2):
        rows = torch.from_numpy(source == k)
        total, g, n = by_hand(x[rows], y[rows])
        torch.testing.assert_close(parts[k] * y.numel() / (r[rows][0] * n), (G_val * g / n).sum())
        expected += r[rows][0] * total / y.numel()
    torch.testing.assert_close(loss, expected)


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """
    The target's prompts follow chain 1, its responses chain 2. `answers` shares the responses alone, `asks` has the
    target's responses as its prompts, `same` has the target's prompts: only the first helps where prompts are masked.
    """
    folder = tmp_path_factory.mktemp("planted")
    for name, prompt, response in (("target", 1, 2), ("answers", 3, 2), ("asks", 2, 3), ("same", 1, 4)):
        example_set(folder / "data" / name, prompt, response)
    ids = markov(2, 4000)
    splits = {"train": ids[:2000], "val": ids[2000:3000], "test": ids[3000:]}
    ones = {s: np.ones(len(v), np.uint8) for s, v in splits.items()}
    write_set(folder / "data" / "text", splits, 65)
    (folder / "ones" / "data").mkdir(parents=True)
    for where, masks in (("data", None), ("ones/data", ones)):
        write_set(folder / where / "a", splits, 65, masks=masks)
        write_set(folder / where / "b", {s: v[::-1] for s, v in splits.items()}, 65, masks=masks)
    sparse = {s: m * (np.arange(len(m)) < (40 if s == "train" else 400)) for s, m in ones.items()}
    write_set(folder / "data" / "sparse", splits, 65, masks=sparse)
    return folder


SEARCH = [*TINY, "--max_steps", 160, "--learning_rate", 1e-2, "--learning_rate_mixture", 0.05]


def test_finds_the_source_whose_responses_match(planted):
    def search(seed):
        run("fastmix.py", *SEARCH, "--sources", "answers,asks,same", "--target", "target", "--seed", seed, "--out_dir",
            f"found-{seed}", cwd=planted)
        return json.loads((planted / f"found-{seed}" / "mixture.json").read_text())
    with ThreadPoolExecutor(2) as pool:
        for result in pool.map(search, (0, 1)):
            assert result["mixture"]["answers"] > 0.8, result["mixture"]


def test_text_and_examples_mix(planted):
    stdout = run("fastmix.py", *SEARCH, "--max_steps", 20, "--sources", "text,asks", "--target", "target", "--out_dir",
                 "mixed", cwd=planted)
    assert "nats a learned token" in stdout
    result = json.loads((planted / "mixed" / "mixture.json").read_text())
    assert result["targets"]["target"]["learned_only"]


def test_masks_of_ones_change_no_bit(planted):
    flags = [*TINY, "--max_steps", 20, "--sources", "a,b", "--target", "a", "--out_dir", "bits"]
    for folder in (planted, planted / "ones"):
        run("fastmix.py", *flags, cwd=folder)
    (rows, _, plain), (rows_ones, _, ones) = (results(f / "bits") for f in (planted, planted / "ones"))
    assert plain.keys() == ones.keys() and rows == rows_ones
    for name, value in plain.items():
        assert torch.equal(value, ones[name]) if torch.is_tensor(value) else value == ones[name], name


def test_several_targets_with_and_without_masks(planted):
    """Each counts the same in the loss that is reported, too."""
    run("fastmix.py", *TINY, "--max_steps", 20, "--sources", "answers,text", "--target", "target,text", "--out_dir",
        "targets", cwd=planted)
    result = json.loads((planted / "targets" / "mixture.json").read_text())
    for row in log_rows(planted / "targets"):
        assert list(row["target_losses"]) == ["target", "text"]
        assert math.isclose(row["target_val_loss"], sum(row["target_losses"].values()) / 2)
    for key in ("test_loss", "test_bits_per_byte"):
        assert math.isclose(result[key], sum(t[key] for t in result["targets"].values()) / 2)
    assert [t["learned_only"] for t in result["targets"].values()] == [True, False]


def test_a_source_without_a_learned_token_in_the_batch_is_absent(planted):
    """`sparse` has learned tokens at one place of its train split, which most batches miss."""
    run("fastmix.py", *TINY, "--max_steps", 40, "--log_every", 1, "--sources", "text,sparse", "--target", "target",
        "--out_dir", "absent", cwd=planted)
    rows = log_rows(planted / "absent")
    unseen = [r["alignment"]["sparse"] is None for r in rows]
    assert 5 < sum(unseen[1:]) < 40
    assert all(r["alignment"]["text"] is not None and math.isfinite(r["train_loss"]) for r in rows[1:])
    first = unseen.index(False)  # until then the other source has nothing to be compared with
    assert first > 1 and all(r["alpha"] == {"text": 0.5, "sparse": 0.5} for r in rows[:first])
    assert rows[first]["alpha"] != rows[0]["alpha"]


def test_init_from(planted):
    """Weights only: the step counter, the optimizer and the mixture are new; the model's flags come from the file."""
    small = [flag for flag in TINY if flag not in ("--n_layer", "--n_head", "--n_embd", "1", "2", "32")]
    run("fastmix.py", *TINY, "--max_steps", 20, "--sources", "text", "--target", "text", "--out_dir", "base",
        cwd=planted)
    base = torch.load(planted / "base" / "ckpt.pt", weights_only=True)["model"]
    flags = ["--init_from", "base/ckpt.pt", *small, "--sources", "answers,asks", "--target", "target", "--max_steps", 4]
    run("fastmix.py", *flags, "--learning_rate", 0, "--learning_rate_mixture", 0, "--out_dir", "still", cwd=planted)
    still = torch.load(planted / "still" / "ckpt.pt", weights_only=True)
    assert all(torch.equal(t, base[n]) for n, t in still["model"].items())
    result = json.loads((planted / "still" / "mixture.json").read_text())
    assert result["before"] == {"target": result["targets"]["target"]["val_loss"]}
    assert list(result["mixture"].values()) == [0.5, 0.5]
    run("fastmix.py", *flags, "--out_dir", "tuned", "--block_size", 32, cwd=planted)
    run("fastmix.py", "--resume", "--out_dir", "tuned", cwd=planted)
    result = json.loads((planted / "tuned" / "mixture.json").read_text())
    assert result["before"]["target"] != result["targets"]["target"]["val_loss"]
    assert result["settings"]["n_layer"] == 1 and result["settings"]["block_size"] == 32

    write_set(planted / "data" / "other", {s: markov(1, 900) for s in ("train", "val", "test")}, 65, tokenizer="gpt2")
    (planted / "text.pt").write_text("no checkpoint")
    torch.save({"model": base}, planted / "weights.pt")
    torch.save({**torch.load(planted / "base" / "ckpt.pt", weights_only=True), "model": {"x": torch.ones(1)}},
               planted / "strange.pt")
    cases = [
        (["--n_layer", 3], "base/ckpt.pt has --n_layer 1, not 3; leave the flag out"),
        (["--sources", "other", "--target", "other"], "ckpt.pt was made with the tokenizer synthetic", "'other' with gpt2"),
        (["--init_from", "gone.pt"], "gone.pt: no checkpoint there"),
        (["--init_from", "text.pt"], "text.pt cannot be read as a checkpoint"),
        (["--init_from", "weights.pt"], "weights.pt is not a checkpoint of this fastmix.py (it lacks args, config"),
        (["--init_from", "strange.pt"], "strange.pt: its contents do not fit its settings"),
    ]
    with ThreadPoolExecutor(2) as pool:
        lines = pool.map(lambda case: refused("fastmix.py", *flags, "--out_dir", "new", *case[0], cwd=planted), cases)
        for (_, *parts), line in zip(cases, lines):
            assert all(part in line for part in parts), line
    assert not (planted / "new").exists()


def test_bad_masks(planted):
    for name in ("short", "lost", "twos", "nothing"):
        example_set(planted / "data" / name, 1, 2, n=60)
    data = planted / "data"
    (data / "lost" / "val.mask.bin").unlink()
    mask = np.fromfile(data / "short" / "train.mask.bin", np.uint8)
    mask[:-3].tofile(data / "short" / "train.mask.bin")
    (mask * 2).tofile(data / "twos" / "train.mask.bin")
    (mask * 0).tofile(data / "nothing" / "train.mask.bin")
    cases = {"short": f"short/train.mask.bin: {len(mask) - 3} bytes, but meta.json says {len(mask)} tokens",
             "lost": "lost/val.mask.bin: missing", "twos": "highest value 2", "nothing": "0 learned tokens"}
    for name, part in cases.items():
        line = refused("fastmix.py", *TINY, "--sources", f"text,{name}", "--out_dir", "new", cwd=planted)
        assert part in line and "--overwrite" in line, line
    line = refused("fastmix.py", *TINY, "--sources", "text,asks", "--block_size", 3, "--out_dir", "new", cwd=planted)
    assert "asks/train: no example has a response within --block_size 3" in line


def test_bad_examples(tmp_path):
    good = [json.dumps({"prompt": f"p{i}", "response": f"r{i}"}) for i in range(150)]
    cases = {
        "type": ('{"prompt": "x", "response": 5}', "type.jsonl, line 120: 5 is not text"),
        "text": ('{"text": "plain"}', "text.jsonl, line 120: it is of the schema text", "prompt/response; prepare"),
        "chat": ('{"messages": [{"role": "assistant", "content": "x"}]}', "chat.jsonl, line 120: it is of the schema"),
        "seven": ('{"messages": 7}', "seven.jsonl, line 120: a chat must be a list of turns"),
        "turns": ('{"messages": "hello"}', "turns.jsonl, line 120: a chat must be a list of turns"),
        "image": ('{"messages": [{"role": "user", "content": [{"type": "image"}]}]}', "line 120: {'type': 'image'} is not text"),
        "keys": ('{"Input": "x", "Output": "y"}', "line 120: no known key in it, but Input, Output; known are text, ",
                 "--prompt_key and --response_key"),
        "preference": ('{"prompt": "x", "chosen": "y", "rejected": "z"}', "line 120", "preferences",
                       "--prompt_key prompt --response_key chosen"),
        "number": ("5", "line 120: a JSON object is needed, not a int"),
    }
    for name, (line, *_) in cases.items():
        (tmp_path / f"{name}.jsonl").write_text("\n".join([*good[:119], line, *good[119:]]))
    (tmp_path / "good.jsonl").write_text("\n".join(good))
    (tmp_path / "z.txt").write_text("plain text")
    flags = {"files": (["x=[gz]*"], "z.txt: it is of the schema text, but what comes before it is of prompt/response"),
             "half": (["x=good.jsonl", "--prompt_key", "p"], "--prompt_key and --response_key go together"),
             "absent": (["x=good.jsonl", "--prompt_key", "p", "--response_key", "r"], "good.jsonl, line 1: no p in it, "
                        "but prompt, response; known are")}
    lines = {n: refused("prepare_data.py", f"x={n}.jsonl", cwd=tmp_path) for n in cases}
    lines |= {n: refused("prepare_data.py", *args, cwd=tmp_path) for n, (args, _) in flags.items()}
    for name, (_, *parts) in (cases | flags).items():
        assert all(part in lines[name] for part in parts), lines[name]
    stdout = run("prepare_data.py", "x=preference.jsonl", "--prompt_key", "prompt", "--response_key", "chosen",
                 cwd=tmp_path, status=2)  # the others have no `chosen`
    assert "line 1: no chosen in it" in stdout or "line 1: no prompt in it" in stdout


def test_records_without_a_text_are_left_out_and_counted(tmp_path):
    """Nulls and empty texts, responses and chats; an error only where nothing is left."""
    some = {
        "text": [{"text": None if i % 3 == 0 else " " if i % 3 == 1 else f"document {i}"} for i in range(300)],
        "qa": [{"question": f"q{i}", "answer": f"a{i}" if i % 3 == 2 else None if i % 3 else ""} for i in range(300)],
        "chat": [{"messages": [{"role": "user", "content": f"u{i}"}]
                  + [{"role": "assistant", "content": f"a{i}"}] * (i % 3 == 2)} if i % 5 or i % 3 == 2 else
                 {"messages": None} for i in range(300)],
    }
    for name, records in some.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
        (tmp_path / f"no_{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records if "2" not in str(
            records.index(r) % 3)))
        stdout = run("prepare_data.py", f"{name}={name}.jsonl", cwd=tmp_path)
        assert f"{name}: 200 records without a text to learn are left out" in stdout and "(100 documents" in stdout
        err = run("prepare_data.py", f"no_{name}=no_{name}.jsonl", cwd=tmp_path, status=2)
        assert f"error: no_{name}: no_{name}.jsonl holds no text" in err and "Traceback" not in err
    assert sorted(p.name for p in (tmp_path / "data").iterdir()) == sorted(some)

"""
What tests/bench_mixtures.py compares: the tasks and their data, and the methods.

A search is fastmix.py with some flags (SEARCHES), for other methods with some of its functions
replaced (rules_of), in its own loop. RegMix is no search of this kind: it fits a function to the
losses of runs at fixed mixtures.
"""
import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

import fastmix
import prepare_data
from model import GPT, GPTConfig
from ngram import ngram_mixture

# ---- tasks and models ----------------------------------------------------------------------------

ORDER_PERCENT = 10  # of prose's train split, which the task "order" has as whole text


@dataclass
class Task:
    """A proxy is to do well on the target, after training on a mixture of the sources."""
    title: str
    sources: str  # names, separated by commas
    target: str
    size: str = "base"  # of the proxy, a key of SIZES
    steps: int = 600  # of a run
    flags: dict = field(default_factory=dict)  # of all runs
    search_flags: dict = field(default_factory=dict)  # of searches, beside these
    # How many mixtures are tried, and the parameters of the Dirichlet distribution that they are
    # drawn from, which is around a good one. Each is trained at on one seed. Without this they are
    # drawn from the whole simplex, and most are trained at on all seeds.
    n_tried: int = 0
    dirichlet: tuple = ()


SAMPLE = "python,cpp,prose,math,legal,noise"
# three of seven sources are a near-duplicate, words without their order, and no text at all
HALF = "python,cpp,prose,legal,python_b,noise_4,bytes"
# prose_2 is prose with 2% of its train split
SCARCE = "python,cpp,math,legal,prose_2"

TASKS = {
    "numpy": Task("toward numpy", SAMPLE, "numpy"),
    "own": Task("own val splits", "python,cpp,prose,math,legal", "python,cpp,prose,math,legal"),
    "scarce": Task("scarce target", SCARCE, "prose_2"),
    "half": Task("half useless", HALF, "math"),
    "bpe": Task("toward numpy, BPE", SAMPLE, "numpy", "bpe"),
    "bpe_half": Task("half useless, BPE", HALF, "math", "bpe"),
    # fastmix.py's default run
    "sample": Task("the sample", SAMPLE, "numpy", "sample", 2400, {"learning_rate": 4e-3},
                   n_tried=13, dirichlet=(4.5, 0.81, 0.54, 2.25, 0.45, 0.45)),
    # searched in a quarter of the steps, with the text repeated as it will be
    "scarce_long": Task("scarce target, long", SCARCE, "prose_2", "base", 2400,
                        search_flags={"max_steps": 600, "train_tokens": 2_457_600},
                        n_tried=7, dirichlet=(2.1, 0.7, 1.05, 1.05, 2.1)),
    # Of the sources' tokens 100, 68, 40 and 11% are learned. The checkpoint is one of the sample.
    "masked": Task("masked responses", "python,describe,declare,implement_end", "numpy_tasks",
                   "sample", 400,
                   {"init_from": "pretrained/ckpt.pt", "block_size": 256, "batch_size": 8,
                    "learning_rate": 1e-3, "eval_tokens": 4096, "log_every": 100},
                   n_tried=7, dirichlet=(0.6, 1.8, 0.6, 3.0)),
    # Much text without an order beyond 8 bytes, beside little that is whole: n-grams of three bytes
    # can hardly tell them apart, and a model can.
    "order": Task("word order", f"prose_p8,prose_{ORDER_PERCENT},cpp,legal", "prose",
                  n_tried=20, dirichlet=(2.7, 2.1, 0.6, 0.6)),
}
BYTES = {"bpe": "numpy", "bpe_half": "half"}  # the same task with a byte-level vocabulary

SIZES = {  # name: (layers, heads, channels)
    "base": (2, 2, 64),  # 0.13 million parameters
    "sample": (2, 4, 128),  # 0.46 million, fastmix.py's default
    "large": (4, 4, 128),  # 0.9 million
    "bpe": (2, 4, 128),  # 1.4 million, with 4,097 token ids
    "bpe_large": (6, 8, 256),  # 6.8 million, with 4,097 token ids
}
LARGER = {"base": "large", "bpe": "bpe_large"}
VOCAB_SIZES = {"base": 257, "sample": 257, "large": 257, "bpe": 4097, "bpe_large": 4097}
DEFAULTS = vars(fastmix.parse_args([]))


def sources_of(task):
    return TASKS[task].sources.split(",")


def has_bpe(task):
    return size_of(task) == "bpe"


def few_runs(task):
    """Are the tried mixtures trained at on one seed each?"""
    return TASKS[task].n_tried > 0


def size_of(task):
    """The size of the task's proxy."""
    return TASKS[task].size


def config_of(task):
    """Of the task's proxy."""
    size = size_of(task)
    settings = DEFAULTS | TASKS[task].flags
    return GPTConfig(VOCAB_SIZES[size], settings["block_size"], *SIZES[size])


# ---- data: the sample, and sets made from it -----------------------------------------------------

def data_of(work, task):
    return Path(work, "data-bpe" if has_bpe(task) else "data")


def read(data, name, split):
    """Token ids of a split, (n,)."""
    return np.fromfile(data / name / f"{split}.bin", dtype=np.uint16)


def derive(data, name, source, splits, masks={}):
    """
    Writes a set that is like another one but for the token ids of some splits, {split: ids}, and
    the masks of some, {split: mask}. One token must be one byte where there is a mask.
    """
    partial = data / f".{name}"  # a killed bench must not leave a folder that looks whole
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(data / source, partial)
    meta = json.loads((partial / "meta.json").read_text())
    meta["name"] = name
    for split, ids in splits.items():
        ids.astype(meta["dtype"]).tofile(partial / f"{split}.bin")
        counts = meta["splits"][split]
        counts["tokens"] = len(ids)
        counts["sha256"] = f"{name} of {counts['sha256']}"
    for split, mask in masks.items():
        mask.astype(np.uint8).tofile(partial / f"{split}.mask.bin")
        learned = read(data, source, split)[mask > 0]
        counts = meta["splits"][split]
        counts["learned"] = len(learned)
        counts["learned_bytes"] = int((learned != meta["eot_token"]).sum())
        counts["mask_sha256"] = f"{name} of {counts['mask_sha256']}"
    (partial / "meta.json").write_text(json.dumps(meta))
    shutil.rmtree(data / name, ignore_errors=True)
    partial.rename(data / name)


def shuffled_words(texts, rng):
    """The words of several texts, at most 500,000 bytes of each, in random order."""
    words = []
    for text in texts:
        words += text[:500_000].split()
    rng.shuffle(words)
    return b" ".join(words)


def derive_useless(data, encoding):
    """Two sets without use: random token ids, and the words of four sources in random order."""
    rng = np.random.default_rng(0)
    random_ids = {}
    for split in prepare_data.SPLITS:
        n = len(read(data, "noise", split))
        random_ids[split] = rng.integers(0, encoding.eot_token, n)
    derive(data, "bytes", "noise", random_ids)

    shuffled = {}
    for split in prepare_data.SPLITS:
        texts = []
        for name in ("python", "cpp", "prose", "legal"):
            text = encoding.decode_bytes(read(data, name, split)[:500_000].tolist())
            texts.append(text.replace(b"<|endoftext|>", b" "))
        text = shuffled_words(texts, rng).decode("utf-8", errors="ignore")
        shuffled[split] = np.array(encoding.encode_ordinary(text))
    derive(data, "noise_4", "noise", shuffled)


def derive_pieces(data, name, source, size):
    """A set whose text is another one's, cut into pieces of so many tokens, in random order."""
    rng = np.random.default_rng(1)
    shuffled = {}
    for split in prepare_data.SPLITS:
        ids = read(data, source, split)
        pieces = ids[: len(ids) // size * size].reshape(-1, size)
        shuffled[split] = rng.permutation(pieces).flatten()
    derive(data, name, source, shuffled)


def last_part(mask, ends, share):
    """Of a mask (n,) of examples that end at `ends`, the last part of each one's learned tokens."""
    kept = np.zeros_like(mask)
    start = 0
    for end in ends.tolist():
        learned = start + np.flatnonzero(mask[start:end])
        n = max(1, round(share * len(learned)))
        kept[learned[-n:]] = 1
        start = end
    return kept


def derive_ends(data, name, source, share):
    """A set of examples of which only the last part of each response is learned."""
    eot = json.loads((data / source / "meta.json").read_text())["eot_token"]
    masks = {}
    for split in prepare_data.SPLITS:
        mask = np.fromfile(data / source / f"{split}.mask.bin", dtype=np.uint8)
        ends = np.flatnonzero(read(data, source, split) == eot) + 1
        masks[split] = last_part(mask, ends, share)
    derive(data, name, source, {}, masks)


def prepare(data, tokenizer):
    """The sample in the folder `data`, and the sets made from it; those that are there are kept."""
    def missing(name):
        return not (data / name / "meta.json").exists()

    if any(missing(name) for name in prepare_data.SAMPLE):
        prepare_data.main(["--data_dir", str(data), "--tokenizer", str(tokenizer)])
    prose = read(data, "prose", "train")
    for percent in (2, ORDER_PERCENT):
        name = f"prose_{percent}"
        if missing(name):
            derive(data, name, "prose", {"train": prose[: len(prose) * percent // 100]})
    if missing("python_b"):
        python = read(data, "python", "train")
        derive(data, "python_b", "python", {"train": python[len(python) // 4:]})
    if missing("bytes") or missing("noise_4"):
        derive_useless(data, prepare_data.get_tokenizer(str(tokenizer)))
    if tokenizer == "bytes":  # what the other vocabulary's tasks do not have
        if missing("prose_p8"):
            derive_pieces(data, "prose_p8", "prose", 8)
        if missing("implement_end"):
            derive_ends(data, "implement_end", "implement", 0.25)


# ---- searches: this one, this one with other flags, and other methods' rules ---------------------

SEARCHES = {  # name: flags
    "FastMix": {},
    "none": {"curvature": "none"},
    "adamw": {"curvature": "adamw"},
    # the command that comes nearest to the paper
    "paper": {"curvature": "none", "uniform_share": 1, "outer_every": 20},
    "authors": {"curvature": "none", "uniform_share": 1, "outer_every": 20, "target_batch_size": 8,
                "learning_rate_mixture": 0.01},
    "DoGE": {"curvature": "none", "learning_rate_mixture": 0.02},
    "DoReMi": {"learning_rate_mixture": 0.1},
}


def in_place_of_mixture_step(rule):
    """rule(z, A, present, rate) -> what replaces fastmix.mixture_step(). Its rate does not fall."""
    first_rate = None

    def mixture_step(z, scale, A, present, density, rate, n_before):
        nonlocal first_rate
        if n_before == 0:
            first_rate = rate
        rule(z, A, present, first_rate)

    return mixture_step


class DoGE:
    """
    A rule: alpha_k in proportion to alpha_k exp(step A_k), by DoGE (Fan et al., arXiv 2310.15393).
    The step is in units of 1 / (running mean of max |A|), because alignments have no natural unit.
    """

    def __init__(self):
        self.largest = []

    def __call__(self, z, A, present, rate):
        A = torch.where(present, A, 0.0)
        self.largest.append(A.abs().max().item())
        z += rate * A / np.mean(self.largest[-100:])


class Authors:
    """
    A rule: Adam on the gradient over z, as in hrtan/fastmix at b2a4051. The other parts of their
    setting are uniform draws with loss weights and the raw gradient at the head. Here the target's
    sequences are drawn afresh at each outer step.
    """

    def __init__(self):
        self.optimizer = None

    def __call__(self, z, A, present, rate):
        if self.optimizer is None:
            self.optimizer = torch.optim.Adam([z], lr=rate, betas=(0.9, 0.95), eps=1e-30)
        alpha = torch.softmax(z, 0)
        A = torch.where(present, A, 0.0)
        z.grad = -alpha * (A - (alpha * A).sum())
        self.optimizer.step()


def doremi(reference):
    """
    DoReMi (Xie et al., arXiv 2305.10429): exponentiated gradient on each source's excess loss over
    the loss of a reference model, clipped at 0 token by token. It knows no target. The excess
    takes the place of the alignments: batch_loss() returns its sums by source as `parts`.
    """
    ckpt = torch.load(reference, weights_only=True)
    net = GPT(GPTConfig(**ckpt["config"]))
    net.load_state_dict(ckpt["model"])
    original = fastmix.batch_loss

    def batch_loss(model, head, x, y, sequence_weight, n_tokens, PG=None, ends=None):
        loss, token_loss, parts = original(model, head, x, y, sequence_weight, n_tokens)
        if ends is None:  # no outer step follows
            return loss, token_loss, parts
        net.to(x.device)
        with torch.no_grad():
            hidden = net(x).flatten(0, 1)
            ones = torch.ones(y.numel(), device=y.device)
            known = fastmix.fused_cross_entropy(hidden, net.lm_head.weight, y.flatten(), ones)[1]
            excess = (token_loss - known.view_as(y)).clamp(min=0)  # (B, T)
            excess *= sequence_weight[:, None] / n_tokens  # as gradients are weighted
        by_source = excess.flatten().tensor_split(ends[:-1])
        return loss, token_loss, torch.stack([part.sum() for part in by_source])

    def rule(z, A, present, rate):
        z += rate * torch.where(present, A, 0.0)

    return {"batch_loss": batch_loss, "mixture_step": in_place_of_mixture_step(rule)}


def rules_of(search, reference=None):
    """
    {name in fastmix.py: what replaces it} of a search, a key of SEARCHES. reference: for DoReMi,
    the checkpoint of its reference model.
    """
    if search == "DoGE":
        return {"mixture_step": in_place_of_mixture_step(DoGE()), "DECAY": 0.0}
    if search == "authors":
        return {"mixture_step": in_place_of_mixture_step(Authors()), "DECAY": 0.0}
    if search == "DoReMi":
        return doremi(reference)
    return {}


# ---- mixtures without a search -------------------------------------------------------------------

def sqrt_mixture(data, names):
    """Shares in proportion to the square root of the tokens, (K,)."""
    roots = np.sqrt([len(read(data, name, "train")) for name in names])
    return roots / roots.sum()


def ngram_mixture_of(data, task):
    """The task's mixture by tests/ngram.py, shares of tokens (K,)."""
    names = sources_of(task)
    targets = TASKS[task].target.split(",")
    block_size = (DEFAULTS | TASKS[task].flags)["block_size"]
    sets = prepare_data.load_sets(data, names, targets, block_size)
    weights = np.full(len(targets), 1 / len(targets))
    shares, *_ = ngram_mixture([sets[name] for name in names], [sets[name] for name in targets],
                               weights, order=3)
    return shares


def tried_mixtures(task):
    """(R, K) to try in a task with few runs."""
    rng = np.random.default_rng(7)
    return rng.dirichlet(TASKS[task].dirichlet, TASKS[task].n_tried).round(4)


# ---- RegMix --------------------------------------------------------------------------------------

def features(mixtures):
    """(R, K) -> (R, K (K + 3) / 2): m_i and m_i m_j."""
    columns = list(mixtures.T)
    for i in range(mixtures.shape[1]):
        for j in range(i, mixtures.shape[1]):
            columns.append(mixtures[:, i] * mixtures[:, j])
    return np.column_stack(columns)


def regmix(mixtures, losses):
    """
    RegMix (Liu et al., arXiv 2407.01492) with ridge regression on quadratic features in place of
    trees, its penalty chosen by leave-one-out error. Returns the average of the 100 mixtures with
    the lowest predicted loss among 100,000 random ones. mixtures (R, K), losses (R,) -> (K,).
    """
    X = features(mixtures)
    mean = X.mean(0)
    X = X - mean
    y = losses - losses.mean()
    least_error = np.inf
    for penalty in 10.0 ** np.arange(-6, 2):
        solve = np.linalg.solve(X.T @ X + penalty * np.eye(X.shape[1]), X.T)  # y -> coefficients
        hat = X @ solve
        # what each run's prediction by the others would be off by; 1 / R is the mean's part
        left_out = (y - hat @ y) / (1 - np.diag(hat) - 1 / len(y))
        error = (left_out**2).mean()
        if error < least_error:
            least_error = error
            coefficients = solve @ y
    candidates = np.random.default_rng(1).dirichlet(np.ones(mixtures.shape[1]), 100_000)
    predicted = (features(candidates) - mean) @ coefficients
    return candidates[np.argsort(predicted)[:100]].mean(0)

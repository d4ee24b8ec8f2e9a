"""
What tests/bench_mixtures.py compares: the tasks and their data, the methods, and what they cost.

A search is fastmix.py with some flags (SEARCHES); for DoGE's rule, which shares its loop, the step
is replaced (doge). RegMix is no search of this kind: it fits a function to the losses of runs at
fixed mixtures.
"""
import json
import shutil
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

import fastmix
import ngram
import prepare_data
from model import GPTConfig

# ---- tasks ---------------------------------------------------------------------------------------

SIZES = {  # of a proxy: (token ids, layers, heads, channels)
    "base": (257, 2, 2, 64),  # 0.13 million parameters
    "sample": (257, 2, 4, 128),  # 0.46 million, fastmix.py's default
    "bpe": (4097, 2, 4, 128),  # 1.4 million
}


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
    seeds: tuple = (11, 12, 13, 14, 15)
    # How the best fixed mixture is known. True: by the response surface, from many mixtures on one
    # seed each. False: many mixtures ran on all seeds. Then the first seed chose which ones did,
    # and only the others measure.
    by_surface: bool = False

    @property
    def measured_seeds(self):
        if self.by_surface:
            return self.seeds
        return self.seeds[1:]


SAMPLE = "python,cpp,prose,math,legal,noise"
# three of seven sources are a near-duplicate, words without their order, and no text at all
HALF = "python,cpp,prose,legal,python_b,noise_4,bytes"
# prose_2 is prose with 2% of its train split
SCARCE = "python,cpp,math,legal,prose_2"
ORDER_PERCENT = 10  # of prose's train split, which the task "order" has as whole text
FEW = (11, 12, 13)
LATER = (21, 22, 23, 24)  # of runs by the program as it is; what was tried on FEW counts, too

TASKS = {
    "numpy": Task("toward numpy", SAMPLE, "numpy"),
    "own": Task("own val splits", "python,cpp,prose,math,legal", "python,cpp,prose,math,legal"),
    "scarce": Task("scarce target", SCARCE, "prose_2"),
    "half": Task("half useless", HALF, "math"),
    # fastmix.py's default run
    "sample": Task("the sample", SAMPLE, "numpy", "sample", 2400, {"learning_rate": 4e-3},
                   seeds=LATER, by_surface=True),
    # searched in a quarter of the steps, with the text repeated as it will be
    "scarce_long": Task("scarce target, long", SCARCE, "prose_2", "base", 2400,
                        search_flags={"max_steps": 600, "train_tokens": 2_457_600},
                        seeds=LATER, by_surface=True),
    # Of the sources' tokens 100, 68, 40 and 11% are learned. The checkpoint is one of the sample.
    "masked": Task("masked responses", "python,describe,declare,implement_end", "numpy_tasks",
                   "sample", 400,
                   {"init_from": "pretrained/ckpt.pt", "block_size": 256, "batch_size": 8,
                    "learning_rate": 1e-3, "eval_tokens": 4096}, seeds=LATER, by_surface=True),
    # Much text without an order beyond 8 bytes, beside little that is whole: n-grams of three bytes
    # can hardly tell them apart, and a model can.
    "order": Task("word order", f"prose_p8,prose_{ORDER_PERCENT},cpp,legal", "prose",
                  seeds=LATER, by_surface=True),
    "bpe": Task("toward numpy, BPE", SAMPLE, "numpy", "bpe", seeds=FEW),
}
DEFAULTS = vars(fastmix.parse_args([]))


def sources_of(task):
    return TASKS[task].sources.split(",")


def settings_of(work, task):
    """fastmix.py's flags of every run, {flag: value}."""
    it = TASKS[task]
    _, n_layer, n_head, n_embd = SIZES[it.size]
    settings = {"sources": it.sources, "target": it.target, "data_dir": data_of(work, task),
                "max_steps": it.steps, "n_layer": n_layer, "n_head": n_head, "n_embd": n_embd,
                "eval_tokens": 1024, "device": "cpu", "dtype": "float32",
                "learning_rate": 2e-3}  # half the default: seeds differ by less
    settings |= it.flags
    if "init_from" in settings:
        settings["init_from"] = Path(work, settings["init_from"])
    return settings


# ---- data: the sample, and sets made from it -----------------------------------------------------

def data_of(work, task):
    if TASKS[task].size == "bpe":
        return Path(work, "data-bpe")
    return Path(work, "data")


def read(data, name, split, part="bin", dtype=np.uint16):
    """Token ids of a split, (n,); with "mask.bin" and np.uint8 which are learned."""
    return np.fromfile(data / name / f"{split}.{part}", dtype)


def derive(data, name, source, splits, masks={}):
    """
    Writes a set that is like another one but for the token ids of some splits, {split: ids}, and
    the masks of some, {split: mask}.
    """
    partial = data / f".{name}"  # a killed bench must not leave a folder that looks whole
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(data / source, partial)
    meta = json.loads((partial / "meta.json").read_text())
    meta["sha256"] = f"{name} of {meta['sha256']}"
    for split, ids in splits.items():
        ids.astype(meta["dtype"]).tofile(partial / f"{split}.bin")
        meta["splits"][split] |= {"tokens": len(ids), "learned": len(ids)}
    for split, mask in masks.items():
        mask.tofile(partial / f"{split}.mask.bin")
        meta["splits"][split]["learned"] = int(np.count_nonzero(mask))
    (partial / "meta.json").write_text(json.dumps(meta))
    partial.rename(data / name)


def derive_useless(data):
    """Two sets without use: random token ids, and the words of four sources in random order."""
    meta = json.loads((data / "noise" / "meta.json").read_text())
    encoding = prepare_data.get_tokenizer(meta["tokenizer"].partition(":")[0])
    rng = np.random.default_rng(0)
    random_ids = {}
    shuffled = {}
    for split in prepare_data.SPLITS:
        n = len(read(data, "noise", split))
        random_ids[split] = rng.integers(0, encoding.eot_token, n)
    for split in prepare_data.SPLITS:
        words = []
        for name in ("python", "cpp", "prose", "legal"):
            text = encoding.decode_bytes(read(data, name, split)[:500_000].tolist())
            words += text.replace(b"<|endoftext|>", b" ")[:500_000].split()
        rng.shuffle(words)
        text = b" ".join(words).decode("utf-8", errors="ignore")
        shuffled[split] = np.array(encoding.encode_ordinary(text))
    derive(data, "bytes", "noise", random_ids)
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


def derive_ends(data, name, source, share):
    """A set of examples of which only the last part of each response is learned."""
    eot = json.loads((data / source / "meta.json").read_text())["eot_token"]
    masks = {}
    for split in prepare_data.SPLITS:
        mask = read(data, source, split, "mask.bin", np.uint8)
        masks[split] = np.zeros_like(mask)
        start = 0
        for end in np.flatnonzero(read(data, source, split) == eot) + 1:
            learned = start + np.flatnonzero(mask[start:end])
            n = max(1, round(share * len(learned)))
            masks[split][learned[-n:]] = 1
            start = end
    derive(data, name, source, {}, masks)


def prepare(data):
    """The sample in the folder `data`, and the sets made from it; those that are there are kept."""
    prepare_data.prepare_sample(data)
    prose = read(data, "prose", "train")
    python = read(data, "python", "train")
    makers = {
        "prose_2": lambda: derive(data, "prose_2", "prose", {"train": prose[: len(prose) // 50]}),
        f"prose_{ORDER_PERCENT}": lambda: derive(
            data, f"prose_{ORDER_PERCENT}", "prose",
            {"train": prose[: len(prose) * ORDER_PERCENT // 100]}),
        "python_b": lambda: derive(data, "python_b", "python",
                                   {"train": python[len(python) // 4:]}),
        "noise_4": lambda: derive_useless(data),
        "prose_p8": lambda: derive_pieces(data, "prose_p8", "prose", 8),
        "implement_end": lambda: derive_ends(data, "implement_end", "implement", 0.25),
    }
    for name, make in makers.items():
        if not (data / name).exists():
            make()


# ---- searches: this one, this one with other flags, and other methods' rules ---------------------

SEARCHES = {  # name: flags
    "FastMix": {},
    "none": {"curvature": "none"},
    "seldom": {"curvature": "none", "uniform_share": 1, "outer_every": 20},
    "DoGE": {"curvature": "none", "learning_rate_mixture": 0.02},
}


def doge():
    """
    alpha_k in proportion to alpha_k exp(step A_k), by DoGE (Fan et al., arXiv 2310.15393). The step
    is in units of 1 / (running mean of max |A|), because alignments have no natural unit, and its
    rate does not fall. Returns {name in fastmix.py: what replaces it}.
    """
    first_rate = SEARCHES["DoGE"]["learning_rate_mixture"]
    largest = []

    def mixture_step(z, scale, A, present, density, rate, n_before):
        A = torch.where(present, A, 0.0)
        largest.append(A.abs().max().item())
        z += first_rate * A / np.mean(largest[-100:])

    return {"mixture_step": mixture_step, "DECAY": 0.0}


# ---- mixtures without a search -------------------------------------------------------------------

def sqrt_mixture(data, names):
    """Shares in proportion to the square root of the tokens, (K,)."""
    roots = np.sqrt([len(read(data, name, "train")) for name in names])
    return roots / roots.sum()


def ngram_mixture(work, task):
    """The task's mixture by tests/ngram.py, (K,)."""
    it = TASKS[task]
    with tempfile.TemporaryDirectory(dir=work) as folder:
        out = Path(folder, "ngram.json")
        ngram.main(["--sources", it.sources, "--target", it.target, "--out", str(out),
                    "--data_dir", str(data_of(work, task))])
        return np.array(list(json.loads(out.read_text())["mixture"].values()))


# ---- RegMix --------------------------------------------------------------------------------------

REGMIX = (16, 64)  # runs of the RegMix-style search


def random_mixtures(task):
    """(64, K), all mixtures as likely; half as many with a BPE vocabulary."""
    n = 64
    if TASKS[task].size == "bpe":
        n = 32
    return np.random.default_rng(0).dirichlet(np.ones(len(sources_of(task))), n)


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


# ---- costs, in FLOPs -----------------------------------------------------------------------------
# A multiply-add counts 2, a backward pass as two forward passes (Kaplan et al., arXiv 2001.08361).

def forward_flops(config):
    """Of one token: 2 per weight of the blocks and of the head, and attention."""
    L = config.n_layer
    C = config.n_embd
    weights = 12 * L * C**2 + config.vocab_size * C
    # attention has two matmuls of T x C per token and layer, of which a causal mask needs half
    attention = 2 * L * config.block_size * C
    return 2 * weights + attention


def outer_step_flops(config, n_tokens, target_tokens, curvature):
    """
    Of one outer step: the target's forward pass and its gradient at the head, the inverse
    curvature, if there is one, and the product with P G for each token of the training batch.
    """
    C = config.n_embd
    head = 2 * config.vocab_size * C  # a product of the head with one vector
    flops = target_tokens * (forward_flops(config) + head) + n_tokens * head
    if curvature:
        # the hidden states' second moment, its inverse, and the product of that with G
        flops += 2 * target_tokens * C**2 + 2 * C**3 + head * C
    return flops


def cost_of(what, task):
    """
    What a method computes until it has its mixture, in training runs of the proxy. The run at the
    mixture itself is not counted, because every method needs it.
    """
    if what.startswith("RegMix"):
        return int(what.split()[1])
    if what not in SEARCHES:
        return 0
    it = TASKS[task]
    settings = DEFAULTS | {"max_steps": it.steps} | it.flags | it.search_flags | SEARCHES[what]
    V, *sizes = SIZES[it.size]
    config = GPTConfig(V, settings["block_size"], *sizes)
    n_tokens = settings["batch_size"] * config.block_size
    target_tokens = settings["target_batch_size"] * config.block_size
    step = 3 * n_tokens * forward_flops(config)
    outer = outer_step_flops(config, n_tokens, target_tokens, settings["curvature"] == "kfac")
    length = settings["max_steps"] / it.steps  # some searches are shorter
    return length * (1 + outer / settings["outer_every"] / step)

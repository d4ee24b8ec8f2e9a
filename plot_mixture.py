"""
Reads what fastmix.py wrote: prints its table, draws it, and exports the mixture to trainers.

    python plot_mixture.py out                 the table of a run, and out/mixture.png
    python plot_mixture.py out out-uniform     out/comparison.png: mixtures and target losses
    python plot_mixture.py out-1 out-2 out-3   if they differ only in --seed: mean and range
    python plot_mixture.py out --export hf     the mixture (of several runs: their mean)

A run writes two files. log.jsonl has a row per report, from the first step on, so that a run can
be drawn while it trains. mixture.json has the results, and is there once the run has ended.
"""
import signal

if __name__ == "__main__":
    # until main() starts, Ctrl-C ends the program at once, without a traceback from an import
    on_ctrl_c = signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
import contextlib
import json
import os
import shlex
import sys
import warnings
from pathlib import Path

import numpy as np

from prepare_data import fail, save_atomically, say

# Okabe and Ito's palette, which can be told apart with any kind of colour vision. It has seven
# colours; where there are more sources, the smaller ones share a grey "others".
COLOURS = ["#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#B8A600"]
GREY = "#999999"
BLACK = "#222222"

# Settings in which two runs may differ and still count as the same search with another seed.
DO_NOT_MATTER = ("seed", "out_dir", "data_dir", "resume", "device", "compile", "log_every")

# Shares below this are not exported: some trainers refuse 0, and a source that is drawn once in
# 10,000 samples is hardly read.
SMALLEST_SHARE = 1e-4


# ---- the files of a run ------------------------------------------------------------------------

def read_file(path, parse, mend):
    """
    parse(text of the file). Raises ValueError with a line that says what is wrong with the file,
    and `mend`, what the user can do about it.
    """
    try:
        return parse(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}; {mend}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        # no JSON, a key is missing, or something else stands where a number or a dict should
        raise ValueError(f"{path}: not what this fastmix.py writes "
                         f"({type(error).__name__}: {error}); {mend}") from error


def parse_log(text):
    """The columns of a log.jsonl, as read_log() returns them; {} if it has no row yet."""
    # a run that is being watched, or was stopped, may have written half of its last row
    rows = [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
    if not rows:
        return {}
    log = {}
    for key in ("step", "target_val_loss"):
        log[key] = np.array([row[key] for row in rows], dtype=float)  # None becomes NaN
    for key in ("alpha", "alignment", "source_loss", "target_losses"):
        log[key] = {}
        for name in rows[0][key]:
            log[key][name] = np.array([row[key][name] for row in rows], dtype=float)
    return log


def read_log(folder):
    """
    folder/log.jsonl by column: "step" and "target_val_loss" (n,) for n rows; "alpha",
    "alignment" and "source_loss" {source: (n,)}; "target_losses" {target: (n,)}. What was not
    measured is NaN. Raises ValueError.
    """
    path = Path(folder, "log.jsonl")
    writer = f"fastmix.py --out_dir {shlex.quote(str(folder))}"
    log = read_file(path, parse_log, f"a run of {writer} writes it")
    if not log:
        raise ValueError(f"{path} is still empty; try again when the run has logged a line")
    return log


def last_mixture(log):
    """{source: share} of the last report, which mixture.json has once a run has ended."""
    return {name: alpha[-1] for name, alpha in log["alpha"].items()}


def parse_result(text):
    """The dict of a mixture.json."""
    result = json.loads(text)
    # A dry run: a key that is missing is noticed here. (An export needs tokens_per_document, too.)
    result_table(result, warn=True)
    if "seed" not in result:
        raise KeyError("seed")
    return result


def read_result(folder):
    """The dict of folder/mixture.json; raises ValueError."""
    return read_file(Path(folder, "mixture.json"), parse_result,
                     "finish the run, or search again with this version")


# ---- tables ------------------------------------------------------------------------------------

def result_table(result, warn=False):
    """
    The lines that a run ends with, from the dict of mixture.json: sources, then targets.
    warn: also lines on a search that collapsed or was still moving when it ended.
    """
    mixture = result["mixture"]
    width = max(12, *map(len, mixture))
    lines = [f"{'source':{width}s} {'tokens':>14s} {'start':>7s} {'final':>7s} {'epochs':>7s} "
             f"{'val loss':>9s}"]
    for name, source in result["sources"].items():
        line = (f"{name:{width}s} {source['tokens_available']:14,d} {source['start']:7.3f} "
                f"{mixture[name]:7.3f} {source['epochs']:7.2f} {source['val_loss']:9.3f}")
        if source["bound"]:  # "cap" or "floor": what --bounds or --max_epochs allow
            line += f"  final at its {source['bound']}"
        lines.append(line)
    # a search may be shorter than the run that it is for, whose length then is --train_tokens
    tokens = result["settings"].get("train_tokens") or result["tokens"]
    lines.append("final: share of the tokens at the end of the run")
    lines.append(f"epochs: how often {tokens:,.0f} tokens, drawn at the final mixture, "
                 "read a source")
    lines.append("val loss: loss per token (nats) on the source's own val split")
    for name, target in result["targets"].items():
        line = (f"target {name}: {losses_in_words(target)}; "
                f"val loss {result['before'][name]:.4f} before, {target['val_loss']:.4f} after")
        if len(result["targets"]) > 1:
            line += f"; weight {target['weight']:.3f}"
        lines.append(line)
    if len(result["targets"]) > 1:
        masked = any(target["learned_only"] for target in result["targets"].values())
        lines.append(f"mean of the targets: {losses_in_words(result | {'learned_only': masked})}")
    lines += past_the_lowest(result)
    if warn:
        lines += search_warnings(result)
    return "\n".join(lines)


def losses_in_words(record):
    """The test loss of a target, or of their mean, in words."""
    # of prompts with responses only the responses are learned, and only their tokens count
    token = "learned token" if record.get("learned_only") else "token"
    return (f"test loss {record['test_loss']:.4f} per {token}, "
            f"{record['test_bits_per_byte']:.4f} bits per byte")


def past_the_lowest(result):
    """
    A line on a run that ended well above the lowest val loss it reported, as one that overfits
    does: by 3% and 0.01 nats, for reports differ by less without a cause.
    """
    lowest = result.get("lowest")  # earlier versions did not write it
    if not lowest:
        return []
    least = lowest["val_loss"]
    last = result["val_loss"]
    if last < 1.03 * least or last < least + 0.01:
        return []
    whose = "the target's"
    if len(result["targets"]) > 1:
        whose = "the targets' mean"
    return [f"warning: {whose} val loss was lowest, {least:.4f}, at step {lowest['step']}, and is "
            f"{last:.4f} at the end; lower --max_steps or, if a source repeats too often (epochs), "
            "give it more text"]


def search_warnings(result):
    """Lines on a search that put all on one source, or whose mixture had not settled."""
    mixture = result["mixture"]
    if not result["searched"] or len(mixture) == 1:
        return []
    lines = []
    mend = "raise --max_steps or, if it jumps about, lower --learning_rate_mixture"
    largest = max(mixture, key=mixture.get)
    if mixture[largest] > 0.9:
        lines.append(f"warning: nearly all of the mixture is {largest}; "
                     f"unless it is the same kind of text as the target, {mend}")
    # total variation: the share that would have to move to make one mixture of the other
    average = result["mixtures"]["last_half_average"]
    moved = sum(abs(average[name] - mixture[name]) for name in mixture) / 2
    if moved > 0.2:  # as in searches at 10 and 50 times the default rate
        lines.append(f"warning: the mixture did not settle: it differs from its average over the "
                     f"last half by {moved:.0%} of the tokens; {mend}")
    return lines


def kind_of(result):
    """The settings of a result of mixture.json that make it another search, whatever the seed."""
    kind = {key: value for key, value in result["settings"].items() if key not in DO_NOT_MATTER}
    # by default, sources and targets are what is prepared, which may have changed meanwhile
    kind["sources"] = list(result["mixture"])
    kind["target"] = {name: target["weight"] for name, target in result["targets"].items()}
    kind["tokens"] = {name: s["tokens_available"] for name, s in result["sources"].items()}
    return kind


def without_copies(results):
    """
    results {folder: dict of mixture.json} without the copies of a run, and the same run made again:
    they would count as more seeds than there are. Says on stderr which they are.
    """
    kept = {}
    first_of = {}  # {what a run was and found: its folder}
    for folder, result in results.items():
        run = [result["seed"], result["mixture"], result["targets"], kind_of(result)]
        first = first_of.setdefault(json.dumps(run, sort_keys=True), folder)
        if first == folder:
            kept[folder] = result
        else:
            print(f"{folder} is the same run as {first}, seed {result['seed']}; counted once",
                  file=sys.stderr)
    return kept


def differ_in_seed_alone(results):
    """Whether R results of mixture.json come from the same search, repeated with other seeds."""
    seeds = {result["seed"] for result in results}
    same = all(kind_of(result) == kind_of(results[0]) for result in results)
    return same and len(seeds) == len(results)


def seed_table(results):
    """How far R runs that differ in the seed alone agree, as lines."""
    shares = {}  # {source: (R,)}
    for name in results[0]["mixture"]:
        shares[name] = np.array([result["mixture"][name] for result in results])
    width = max(12, *map(len, shares))
    lines = [f"{'source':{width}s} {'mean share':>10s} {'lowest':>8s} {'highest':>8s}"]
    for name, share in shares.items():
        lines.append(f"{name:{width}s} {share.mean():10.3f} {share.min():8.3f} {share.max():8.3f}")

    # two sources cannot be told apart if the one with the smaller mean is larger for some seed
    order = sorted(shares, key=lambda name: shares[name].mean(), reverse=True)
    pairs = []
    for i, larger in enumerate(order):
        others = [name for name in order[i + 1:] if (shares[name] > shares[larger]).any()]
        if others:
            pairs.append(f"{larger} and {', '.join(others)}")
    pairs = "; ".join(pairs) if pairs else "none, all seeds give the same order"
    lines.append(f"cannot be told apart: {pairs}")

    test_loss = {}  # {target: R numbers}
    for target in results[0]["targets"]:
        test_loss[f"target {target}"] = [r["targets"][target]["test_loss"] for r in results]
    if len(test_loss) > 1:
        test_loss["mean of the targets"] = [r["test_loss"] for r in results]
    token = "token"
    if any(target["learned_only"] for target in results[0]["targets"].values()):
        token = "learned token"
    for name, values in test_loss.items():
        lines.append(f"{name}: test loss {np.mean(values):.4f} per {token}, {min(values):.4f} to "
                     f"{max(values):.4f} over {len(values)} seeds")
    return "\n".join(lines)


# ---- pictures ----------------------------------------------------------------------------------

def fonts_for(text):
    """
    Names of fonts that have all letters of a text between them, as far as any that is installed
    here does: matplotlib's own first, which knows no Chinese, for one.
    """
    from matplotlib.font_manager import findfont, fontManager
    from matplotlib.ft2font import FT2Font
    fonts = ["DejaVu Sans"]
    missing = set(map(ord, text)) - FT2Font(findfont(fonts[0])).get_charmap().keys()
    for font in fontManager.ttflist:
        if not missing:
            break
        if font.name.startswith("Last Resort"):  # it has a box for every letter
            continue
        with contextlib.suppress(OSError, RuntimeError):  # removed, or damaged
            found = missing & FT2Font(font.fname).get_charmap().keys()
            if found:
                fonts.append(font.name)
                missing -= found
    return fonts


@contextlib.contextmanager
def picture(path, height, text):
    """
    `with picture(path, height, text) as fig:` gives a figure to draw on, then saves it as a PNG;
    text: all the names in it.
    """
    # Imported here, not above: a table or an export does without it. A Figure that is saved as a
    # PNG is drawn into memory, whatever the backend.
    if "matplotlib" not in sys.modules:
        # MPLBACKEND may name a backend that is not here, and matplotlib would refuse to start
        backend = os.environ.pop("MPLBACKEND", None)
        import matplotlib
        if backend:
            os.environ["MPLBACKEND"] = backend
            with contextlib.suppress(ValueError):
                matplotlib.rcParams["backend"] = backend  # for a notebook that draws later
    import matplotlib.figure
    style = {"axes.spines.top": False, "axes.spines.right": False, "axes.titlelocation": "left",
             "axes.titlesize": 11, "legend.frameon": False, "font.family": fonts_for(text),
             "text.usetex": False, "text.parse_math": False}  # a $ in a name is no formula
    with matplotlib.rc_context(style), warnings.catch_warnings():
        # a letter that no font here has is drawn as a box, and needs no line for each
        warnings.filterwarnings("ignore", "Glyph .* missing from font")
        fig = matplotlib.figure.Figure((10, height), dpi=110, layout="constrained")
        yield fig
        save_atomically(path, lambda file: fig.savefig(file, format="png"))


def short(name):
    """A name as the picture shows it: a long one without its middle, of 30 characters."""
    # a path may have bytes that are no text; they are shown as ?
    name = str(name).encode(errors="replace").decode()
    if len(name) > 30:
        name = f"{name[:15]}…{name[-14:]}"
    return name


def moving_average(y, window):
    """Averages (n,) of y (n,) over `window` values round each, fewer at both ends."""
    ones = np.ones(window)
    count = np.convolve(np.ones(len(y)), ones, "same")
    return np.convolve(y, ones, "same") / count


def draw_curve(ax, x, y, window=1, **style):
    """Draws y (n,) over x (n,) where it is known (not NaN). Returns the line."""
    known = np.isfinite(y)
    x = x[known]
    y = y[known]
    if 1 < window <= len(y):
        # what is averaged stays visible, as a pale line
        ax.plot(x, y, color=style["color"], linewidth=0.8, alpha=0.3)
        y = moving_average(y, window)
    line, = ax.plot(x, y, **style)
    return line


def fit_height(ax, lines, skip):
    """Fits the y axis to lines but for their first part, the fraction `skip`, which is steep."""
    values = []
    for line in lines:
        y = line.get_ydata()
        values.extend(y[int(skip * len(y)):])
    if values:
        low, high = min(values), max(values)
        # the last two terms are for a flat line, whose axis would have no height
        margin = 0.08 * (high - low) + 0.001 * max(abs(low), abs(high)) + 1e-9
        ax.set_ylim(low - margin, high + margin)


def add_legend(ax, handles, labels, title=None):
    """A legend on the right of the axes; constrained layout makes room for it there."""
    # smaller where it would take too much of the height or of the width
    long = len(labels) > 10 or max(map(len, labels)) > 22
    size = 8 if long else 10
    ax.legend(handles, labels, title=title, loc="center left", bbox_to_anchor=(1.01, 0.5),
              borderaxespad=0, fontsize=size, title_fontsize=size, alignment="left",
              labelspacing=0.3)


def draw_mixture(ax, log, mixture, bounds, colour):
    """
    The shares over training, stacked, those in `colour` {source: colour} by themselves and the
    others as one. Legend: mixture {source: share}, and bounds {source: "cap", "floor" or ""}.
    """
    bands = {name: log["alpha"][name] for name in colour}
    labels = [f"{short(name)}  {mixture[name]:.2f} {bounds[name]}".rstrip() for name in colour]
    others = [name for name in mixture if name not in colour]
    if others:
        bands["others"] = sum(log["alpha"][name] for name in others)
        labels.append(f"{len(others)} others  {sum(mixture[name] for name in others):.2f}")
    areas = ax.stackplot(log["step"], *bands.values(), colors=[*colour.values(), GREY][:len(bands)],
                         alpha=0.85, edgecolor="white", linewidth=0.6)
    ax.set(ylabel="share of the tokens drawn", ylim=(0, 1))
    # stackplot draws upwards and a legend downwards; reversed, both have the same order
    add_legend(ax, areas[::-1], labels[::-1], "in the end")


def draw_losses(ax, log, colour):
    """Val loss of the targets, train loss of the sources. Returns the lines, each with a label."""
    step = log["step"]
    targets = log["target_losses"]
    lines = []
    for name in colour:
        lines.append(draw_curve(ax, step, log["source_loss"][name], label=short(name),
                                color=colour[name], linewidth=1.2))
    if 1 < len(targets) <= 6:  # more would hide each other
        for i, (name, loss) in enumerate(targets.items()):
            dash = ["--", ":", "-."][i % 3]
            lines.append(draw_curve(ax, step, loss, label=short(name), color=BLACK,
                                    linewidth=0.9, linestyle=dash))
    label = "mean of targets" if len(targets) > 1 else "target"
    lines.append(draw_curve(ax, step, log["target_val_loss"], label=label, color=BLACK,
                            linewidth=2.4))
    fit_height(ax, lines, skip=1 / 16)
    ax.set(title="Loss: target val (black), sources train", ylabel="loss per token (nats)")
    return lines


def draw_alignments(ax, log, colour):
    """A_k: how much lower the trained model's target loss would be with more of each source."""
    lines = [ax.axhline(0, color=GREY, linewidth=0.8)]
    window = len(log["step"]) // 12  # single alignments are noisy
    for name in colour:
        lines.append(draw_curve(ax, log["step"], log["alignment"][name], window,
                                color=colour[name], linewidth=1.8))
    fit_height(ax, lines, skip=1 / 8)
    # the mixture step divides alignments by their root mean square, so their unit does not matter
    ax.set(title="Alignment: high sources gain share",
           ylabel="A_k = ⟨P g_val, g_k⟩ (any unit)")


def draw_run(folder):
    """
    Draws folder/log.jsonl, and what mixture.json tells if it is there: mixture on top, losses and
    alignments below. Returns the path of the picture, folder/mixture.png. Raises ValueError.
    """
    log = read_log(folder)
    mixture = last_mixture(log)
    bounds = dict.fromkeys(mixture, "")
    if Path(folder, "mixture.json").exists():
        result = read_result(folder)
        if result["mixture"].keys() != mixture.keys():
            raise ValueError(f"{folder}: log.jsonl and mixture.json have different sources")
        mixture = result["mixture"]
        bounds = {name: source["bound"] for name, source in result["sources"].items()}

    # every source has a colour of its own; of too many, the six largest have
    shown = list(mixture)
    if len(shown) > len(COLOURS):
        shown = sorted(mixture, key=mixture.get, reverse=True)[:len(COLOURS) - 1]
    colour = dict(zip(shown, COLOURS))
    measured = any(np.isfinite(log["alignment"][name]).any() for name in mixture)

    path = Path(folder, "mixture.png")
    with picture(path, 7.2, "".join([short(folder), *mixture, *log["target_losses"]])) as fig:
        # a fixed mixture has no alignments: its losses get both places below
        below = ["loss", "alignment"] if measured else ["loss", "loss"]
        x_axis = {"xlabel": "training step", "xlim": (log["step"][0], max(log["step"][-1], 1))}
        axes = fig.subplot_mosaic([["mixture", "mixture"], below], subplot_kw=x_axis)
        axes["mixture"].set_title(f"{short(folder)}: each source's share of the mixture")
        draw_mixture(axes["mixture"], log, mixture, bounds, colour)
        lines = draw_losses(axes["loss"], log, colour)
        if measured:
            draw_alignments(axes["alignment"], log, colour)
        # one legend for both panels below: a source has the same colour everywhere
        add_legend(axes[below[1]], lines, [line.get_label() for line in lines])
    return path


def run_style(i):
    """(colour, dash of the line, hatch of the bars) of the i-th run, which differ for 21 runs."""
    colour = COLOURS[i % len(COLOURS)]
    again = i // len(COLOURS) % 3  # how often all colours have been used
    dash = ["-", "--", ":"][again]
    hatch = ["", "////", "xxxx"][again]
    return colour, dash, hatch


def draw_bars(ax, names, shares, same_search):
    """
    The shares (R, K) of K named sources in R runs: a bar for each run, or, if the runs are the
    same search with other seeds, a bar for the mean with the range.
    """
    place = np.arange(len(names))
    if same_search:
        mean = shares.mean(0)
        reach = [mean - shares.min(0), shares.max(0) - mean]  # of the whiskers, (2, K)
        ax.barh(place, mean, 0.7, xerr=reach, color=GREY, capsize=3)
        ax.set_title("Mixture: mean and range of the seeds")
    else:
        thickness = 0.8 / len(shares)  # the bars of a source side by side, and a gap to the next
        for i, share in enumerate(shares):
            colour, _, hatch = run_style(i)
            ax.barh(place - 0.4 + (i + 0.5) * thickness, share, thickness, color=colour,
                    hatch=hatch, edgecolor="white", linewidth=0)  # the edge colours the hatch
        ax.set_title("Mixture of each run")
    ax.set(xlabel="share of the tokens drawn", yticks=place,
           yticklabels=[short(name) for name in names],
           ylim=(len(names) - 0.5, -0.5))  # the first source on top


def draw_target_losses(ax, logs):
    """The target val loss of runs, logs {folder: log}, over training."""
    lines = []
    labels = []
    for i, (folder, log) in enumerate(logs.items()):
        colour, dash, _ = run_style(i)
        line = draw_curve(ax, log["step"], log["target_val_loss"], color=colour, linestyle=dash,
                          linewidth=1.8)
        lines.append(line)
        labels.append(f"{short(folder)}  {line.get_ydata()[-1]:.3f}")
    # runs differ little, and what they lost in the first third would hide it
    fit_height(ax, lines, skip=1 / 3)
    ax.set(title="Target val loss", xlabel="training step", ylabel="loss per token (nats)")
    add_legend(ax, lines, labels, "run, last value")


def draw_comparison(folders, results, same_search):
    """
    The mixtures of R runs as bars, and their target losses over training. results {folder: dict of
    mixture.json} of those that have ended; same_search: whether they differ in the seed alone.
    Returns the path of the picture, comparison.png in the first folder. Raises ValueError.
    """
    logs = {folder: read_log(folder) for folder in folders}
    mixtures = []
    for folder in folders:
        if folder in results:
            mixtures.append(results[folder]["mixture"])
        else:
            mixtures.append(last_mixture(logs[folder]))
    names = list(mixtures[0])  # and then those that only other runs have
    for mixture in mixtures[1:]:
        names += [name for name in mixture if name not in names]
    shares = np.zeros((len(folders), len(names)))  # (R, K)
    for i, mixture in enumerate(mixtures):
        shares[i] = [mixture.get(name, 0) for name in names]

    path = Path(folders[0], "comparison.png")
    # a line of text is 0.2 inches high, that of a source and that of a run
    height = max(4.6, 0.2 * len(names), 0.2 * len(folders))
    with picture(path, height, "".join([*map(short, folders), *names])) as fig:
        left, right = fig.subplots(1, 2)
        draw_bars(left, names, shares, same_search)
        draw_target_losses(right, logs)
    return path


# ---- export ------------------------------------------------------------------------------------
# Some trainers draw samples of a fixed length; their probabilities are the shares of tokens. Others
# draw whole examples. A source of long examples would then give more tokens than its share, so the
# probability of each source is proportional to its share divided by its tokens per document.
# In each function, p is {source: probability as a text}, and each returns one text.

def export_megatron(p, seed):
    """Megatron-LM: an argument of its command line. Takes fixed-length samples."""
    return "--data-path " + " ".join(f"{share} {name}_text_document" for name, share in p.items())


def export_mosaic(p, seed):
    """MosaicML's StreamingDataset: a part of its YAML file. Takes fixed-length samples."""
    lines = ["streams:"]
    for name, share in p.items():
        lines += [f'  "{name}":', f'    local: "{name}"', f"    proportion: {share}"]
    return "\n".join(lines)


def export_llamafactory(p, seed):
    """LLaMA-Factory: lines of its YAML file. Takes examples."""
    return (f'dataset: "{",".join(p)}"\n'
            "mix_strategy: interleave_over\n"
            f'interleave_probs: "{",".join(p.values())}"')


def export_hf(p, seed):
    """Hugging Face datasets: a piece of Python. Takes examples."""
    shares = ", ".join(f"{name!r}: {share}" for name, share in p.items())
    return ("from datasets import interleave_datasets  # yours: {name: its Dataset}\n"
            f"p = {{{shares}}}\n"
            "mixed = interleave_datasets([yours[n] for n in p], probabilities=list(p.values()), "
            f'seed={seed}, stopping_strategy="all_exhausted")')


TRAINERS = {"hf": export_hf, "megatron": export_megatron, "mosaic": export_mosaic,
            "llamafactory": export_llamafactory}
DRAW_EXAMPLES = ("hf", "llamafactory")  # the others draw fixed-length samples


def decimals(p):
    """{name: share} as decimal numbers, {name: text}, that sum to exactly 1 and are all above 0."""
    digits = 8
    # documents of millions of tokens may have a very small probability: at least three digits of it
    while min(p.values()) * 10 ** digits < 100:
        digits += 1
    # count in units of the last digit: integers, unlike floats, can be made to sum exactly
    whole = 10 ** digits
    count = {name: round(share * whole) for name, share in p.items()}
    largest = max(count, key=count.get)
    count[largest] += whole - sum(count.values())  # what rounding left over
    return {name: f"{n // whole}.{n % whole:0{digits}d}" for name, n in count.items()}


def export(trainer, results):
    """
    The lines that let a trainer draw by the mean mixture of results {folder: dict of mixture.json}.
    Raises ValueError unless all have the same sources, with the same text.
    """
    first = next(iter(results))
    sources = results[first]["sources"]
    for folder, result in results.items():
        if result["sources"].keys() != sources.keys():
            raise ValueError(f"--export takes runs of the same sources, not {', '.join(sources)} "
                             f"({first}) and {', '.join(result['sources'])} ({folder})")
        if kind_of(result)["tokens"] != kind_of(results[first])["tokens"]:
            raise ValueError(f"the sets were prepared anew between {first} and {folder}; export "
                             "each run by itself")

    p = {}
    left_out = []
    for name, source in sources.items():
        share = sum(result["mixture"][name] for result in results.values()) / len(results)
        if share < SMALLEST_SHARE:
            left_out.append(name)
            continue
        if trainer in DRAW_EXAMPLES:
            if not source.get("tokens_per_document"):
                raise ValueError(f"{first}/mixture.json: no tokens_per_document of {name}, which "
                                 f"{trainer} needs; search again with this version")
            share /= source["tokens_per_document"]
        p[name] = share
    total = sum(p.values())
    p = {name: share / total for name, share in p.items()}

    comment = "# shares of fixed-length samples = shares of tokens"
    if trainer in DRAW_EXAMPLES:
        comment = "# shares of examples = shares of tokens / tokens per document"
    if left_out:
        comment += f"; left out, under {SMALLEST_SHARE:.4f}: {', '.join(left_out)}"
    to_text = TRAINERS[trainer]
    return comment + "\n" + to_text(decimals(p), results[first]["seed"])


# ---- the program -------------------------------------------------------------------------------

def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path,
                        help="out_dir of a run; several give a comparison")
    parser.add_argument("--export", choices=TRAINERS,
                        help="print the mixture for this trainer, and draw nothing")
    args = parser.parse_args(argv)
    folders = list(dict.fromkeys(args.runs))  # a run that is named twice counts once
    results = {}  # {folder: dict of mixture.json} of the runs that have ended
    try:
        for folder in folders:
            if args.export or Path(folder, "mixture.json").exists():
                results[folder] = read_result(folder)
        kept = without_copies(results)
        folders = [folder for folder in folders if folder in kept or folder not in results]
        ended = list(kept.values())
        # the tables first: where no picture can be written, they are there
        if args.export:
            say(export(args.export, kept))
        elif len(folders) == 1:
            if ended:
                say(result_table(ended[0], warn=True))
            say(f"wrote {draw_run(folders[0])}")
        else:
            same_search = len(ended) == len(folders) and differ_in_seed_alone(ended)
            if same_search:
                say(seed_table(ended))
            say(f"wrote {draw_comparison(folders, kept, same_search)}")
    except (ImportError, ValueError) as error:  # without matplotlib there is no picture
        fail(error)


if __name__ == "__main__":
    try:
        signal.signal(signal.SIGINT, on_ctrl_c)
        main()
    except KeyboardInterrupt:
        sys.exit(130)

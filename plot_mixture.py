"""
Draw what fastmix.py logged, and read what it wrote.

    python plot_mixture.py out                 out/mixture.png: mixture, losses and alignments of one run, and its table
    python plot_mixture.py out out-uniform     out/comparison.png: mixtures and target loss of several runs

The pictures need only log.jsonl, so they work on a run in progress.
"""
import argparse
import json
import math
import os
from pathlib import Path

import numpy as np

from prepare_data import fail, launched_rank, lock, save_atomically, say

# Okabe and Ito's palette: told apart with any kind of colour vision. Beyond it, sources share a grey "others".
COLOURS = ["#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#B8A600"]
GREY, INK = "#999999", "#222222"


# ---- logs and mixtures, written and read ----------------------------------------------------------------------------

def open_log(out, step, names):
    """out/log.jsonl, opened to append rows and held, cut back to those up to the step of the checkpoint (-1: a new run)."""
    if launched_rank() > 0:
        return open(os.devnull, "a")
    path, kept = Path(out, "log.jsonl"), []
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        log = open(path, "a" if step < 0 else "r+")
        lock(log, out, "wait until it has ended, or choose another --out_dir")
        lines = path.read_text().splitlines(keepends=True)
        if step < 0 and lines:  # there were none when this program began
            fail(f"{path} is the log of another run; choose another --out_dir")
        if step >= 0:
            kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
            first, last = json.loads(kept[0]), json.loads(kept[-1])
            if (first["step"], last["step"], list(first["alpha"])) != (0, step, names):
                raise ValueError
            log.truncate(len("".join(kept).encode()))
            log.seek(0, os.SEEK_END)
        return log
    except OSError as error:
        fail(f"cannot open {path}: {error.strerror}; mend that, or start a new run in another --out_dir")
    except (ValueError, KeyError, TypeError, IndexError):
        fail(f"{path} is not the log of the run in ckpt.pt; put that back, or start a new run in another --out_dir")


def by_name(names, values):
    """(K,) -> {name: value}, None where there is none (NaN), for JSON knows no NaN."""
    return {n: None if math.isnan(v) else v for n, v in zip(names, values.tolist())}


def append_row(log, names, **row):
    """Writes a row of log.jsonl; tensors (K,) become {name: value}. Returns the row."""
    row = {key: by_name(names, v) if hasattr(v, "tolist") else v for key, v in row.items()}
    try:
        log.write(json.dumps(row) + "\n")
        log.flush()
    except OSError as error:
        fail(f"cannot write {log.name}: {error.strerror}; make room and go on with --resume")
    return row


def progress(row, steps_per_second):
    """A row of the log as the line on the screen."""
    done, left = row["step"] / row["max_steps"], row["max_steps"] - row["step"]
    line = f"step {row['step']:5d} {done:4.0%} | target {row['target_val_loss']:.3f} | "
    if row["train_loss"] is not None:
        tokens_per_second = row["tokens"] / row["step"] * steps_per_second
        line += (f"train {row['train_loss']:.3f} | {tokens_per_second:,.0f} tok/s | "
                 f"{left / steps_per_second:.0f} s left | ")
    return line + bars(list(row["alpha"]), list(row["alpha"].values()))


def save_result(out, names, mixtures, targets, sources, **more):
    """
    Writes out/mixture.json and returns its contents. mixtures {name: (K,)}, weights in any unit; targets {target:
    results}; sources {what: (K,)} for each source. What it began with is in the log's first row.
    """
    with open(Path(out, "log.jsonl")) as log:
        first = json.loads(log.readline())
    mixtures = {name: by_name(names, m / m.sum()) for name, m in mixtures.items()}
    mean = {key: sum(t[key] for t in targets.values()) / len(targets) for key in ("test_loss", "test_bits_per_byte")}
    result = {"mixture": mixtures["last_half_average"], "recommended": "last_half_average", "unit": "tokens",
              "mixtures": mixtures, "target": list(targets), **mean, "targets": targets,
              "before": first["target_losses"], **more,
              "sources": {n: {what: values[k].item() for what, values in sources.items()} for k, n in enumerate(names)}}
    for name, s in result["sources"].items():
        s |= {"epochs": s["tokens_seen"] / s["tokens_available"], "start": first["alpha"][name]}
    save_atomically(Path(out, "mixture.json"), lambda f: f.write((json.dumps(result, indent=1) + "\n").encode()))
    return result


def read_log(folder):
    """{column: (P,) array, or {name: (P,) array}} from folder/log.jsonl; missing values are NaN."""
    path = Path(folder, "log.jsonl")
    try:
        lines = path.read_text().splitlines(keepends=True)
        rows = [json.loads(line) for line in lines if line.endswith("\n")]  # the last may be half written
        nan = lambda v: np.nan if v is None else v
        log = {}
        for key in ("step", "target_val_loss"):
            log[key] = np.array([nan(r[key]) for r in rows], dtype=float)
        for key in ("alpha", "alignment", "source_loss"):
            log[key] = {n: np.array([nan(r[key][n]) for r in rows], dtype=float) for n in rows[0]["alpha"]}
        return log
    except OSError as error:
        fail(f"{path}: {error.strerror}; a run of fastmix.py --out_dir {folder} writes it")
    except (ValueError, KeyError, TypeError):
        fail(f"{path} is not a log that fastmix.py wrote")
    except IndexError:
        fail(f"{path} is still empty; try again when the run has logged a line")


def read_mixture(text, names, tokens):
    """
    What --mixture names -> a schedule (P, 1 + K): fractions of training and the mixture at each, P = 1 for a constant
    one. names and tokens (K,) are the sources' and their sizes. Weights need not sum to 1; who is not named gets 0.
    """
    fractions = [0.0]
    if text == "uniform":
        rows = [dict.fromkeys(names, 1.0)]
    elif text == "proportional":
        rows = [dict(zip(names, tokens))]
    elif text.endswith((".json", ".jsonl")):
        try:
            lines = Path(text).read_text().splitlines(keepends=True)
            if text.endswith(".json"):
                rows = [json.loads("".join(lines))["mixture"]]
            else:  # a run in progress may be in the middle of its last line
                log = [json.loads(line) for line in lines if line.endswith("\n")]
                rows, steps = [row["alpha"] for row in log], [float(row["step"]) for row in log]
                planned = log[-1].get("max_steps", steps[-1]) if log else 1
                fractions = [step / max(planned, 1) for step in steps]
        except OSError as error:
            fail(f"--mixture {text}: {error.strerror}; a search writes it to its out_dir")
        except (ValueError, KeyError, TypeError) as error:
            fail(f"--mixture {text}: not a mixture that fastmix wrote ({error!r})")
        if not rows:
            fail(f"--mixture {text}: empty")
        if text.endswith(".jsonl") and not all(a < b for a, b in zip(steps, [*steps[1:], math.inf])):
            fail(f"--mixture {text}: its steps do not rise, so it is not the log of one run")
        if text.endswith(".jsonl") and steps[-1] < planned:
            fail(f"--mixture {text}: its run is at step {steps[-1]:.0f} of {planned}; finish it first, with --resume")
    else:
        try:
            pairs = [(name.strip(), float(value)) for name, value in (pair.split("=") for pair in text.split(","))]
        except ValueError:
            fail(f"--mixture {text}: not a .json or .jsonl file, uniform, proportional, or a=0.8,b=0.2")
        if len(dict(pairs)) < len(pairs):
            fail(f"--mixture {text}: a name is given twice")
        rows = [dict(pairs)]
    for row in rows:
        if not isinstance(row, dict) or not row.keys() <= set(names):
            found = ", ".join(map(str, row)) if isinstance(row, dict) else repr(row)
            fail(f"--mixture {text} names {found}, but --sources are {', '.join(names)}")
        bad = [f"{k}={v}" for k, v in row.items() if not (isinstance(v, (int, float)) and 0 <= v < math.inf)]
        if bad or not 0 < sum(row.values()) < math.inf:
            fail(f"--mixture {text}: {bad[0] if bad else 'all weights are 0, or too large'}; weights must be numbers "
                 "from 0 up, one of them above 0")
    alphas = np.array([[row.get(name, 0.0) for name in names] for row in rows])
    return np.column_stack([fractions, alphas / alphas.sum(1, keepdims=True)])


def mixture_at(schedule, fraction):
    """The mixture (K,) at a fraction of training, between the rows of a schedule (P, 1 + K), all of them tensors."""
    at, *columns = schedule.numpy().T
    return schedule.new_tensor([np.interp(fraction, at, column) for column in columns])


def bars(names, alpha):
    """The largest weights as small bars: python ▆ 0.71  math ▂ 0.20"""
    largest = sorted(sorted(range(len(names)), key=lambda k: -alpha[k])[:8])
    return "  ".join(f"{names[k]} {'▁▂▃▄▅▆▇█'[min(7, int(alpha[k] * 8))]} {alpha[k]:.2f}" for k in largest)


def result_table(result):
    """The lines that a run ends with, from the dict in mixture.json."""
    width = max(12, *map(len, result["mixture"]))
    lines = [f"{'source':{width}s} {'tokens':>14s} {'start':>7s} {'final':>7s} {'epochs':>7s} {'val loss':>9s}"]
    for name, s in result["sources"].items():
        share = result["mixture"][name]
        lines.append(f"{name:{width}s} {s['tokens_available']:14,d} {s['start']:7.3f} {share:7.3f} "
                     f"{share * result['tokens'] / s['tokens_available']:7.2f} {s['val_loss']:9.3f}")
    lines.append(f"final: average of the last half; epochs: of {result['tokens']:,} tokens drawn by it; "
                 "loss: nats a token")
    for name, t in result["targets"].items():
        lines.append(f"target {name}: test loss {t['test_loss']:.4f} nats a {'learned ' * t['learned_only']}token, "
                     f"{t['test_bits_per_byte']:.4f} bits a byte"
                     + (f", {t['accuracy']:.1%} of {t['answers']:,} short answers right" if "accuracy" in t else ""))
    if len(result["targets"]) > 1:
        lines.append(f"mean of the targets: test loss {result['test_loss']:.4f} nats a token, "
                     f"{result['test_bits_per_byte']:.4f} bits a byte")
    return "\n".join(lines)


# ---- pictures -------------------------------------------------------------------------------------------------------

def smooth(y, window):
    """Centred moving average that skips missing values and keeps the length."""
    ones, known = np.ones(window), np.isfinite(y)
    count = np.convolve(known, ones, "same")
    return np.where(count > 0, np.convolve(np.where(known, y, 0), ones, "same") / np.maximum(count, 1), np.nan)


def label_ends(ax, labels):
    """Writes (y, text, colour) right of the axes at height y, moved apart where they would overlap."""
    low, high = ax.get_ylim()
    gap = (high - low) * 15 / (ax.get_window_extent().height / ax.figure.dpi * 72)  # 15 points
    labels = sorted(l for l in labels if np.isfinite(l[0]))
    heights = [min(max(y, low), high) for y, _, _ in labels]
    for _ in range(200):  # push neighbours apart, half each, until nothing overlaps
        for i in range(1, len(heights)):
            overlap = gap - (heights[i] - heights[i - 1])
            if overlap > 1e-9:
                heights[i - 1] -= overlap / 2
                heights[i] += overlap / 2
        heights[-1:] = [min(high, h) for h in heights[-1:]]  # stay within the axes, above all off the one below
        heights[:1] = [max(low, h) for h in heights[:1]]
    for height, (_, text, colour) in zip(heights, labels):
        ax.annotate(text, (1.01, height), xycoords=("axes fraction", "data"), color=colour, va="center",
                    fontsize=10, fontweight="bold", annotation_clip=False)


def fit(ax, curves):
    """Sets the limits of y to what the curves need; False where they hold no value at all."""
    values = np.concatenate(curves)
    values = values[np.isfinite(values)]
    if len(values):
        margin = 0.08 * np.ptp(values) + 1e-9
        ax.set_ylim(values.min() - margin, values.max() + margin)
    return len(values) > 0


def last(y):
    """Last value that is there."""
    known = y[np.isfinite(y)]
    return known[-1] if len(known) else np.nan


def plot_run(plt, log, title):
    """Mixture on top; losses and alignments below."""
    fig, axes = plt.subplot_mosaic([["mixture", "mixture"], ["loss", "alignment"]], figsize=(10, 7.2), dpi=110)
    fig.subplots_adjust(left=0.07, right=0.88, top=0.93, bottom=0.08, hspace=0.34, wspace=0.52)
    step, names = log["step"], list(log["alpha"])
    shown = names if len(names) <= len(COLOURS) else sorted(names, key=lambda n: -last(log["alpha"][n]))[:6]
    bands = {n: log["alpha"][n] for n in shown}
    if len(shown) < len(names):
        bands[f"{len(names) - len(shown)} others"] = sum(log["alpha"][n] for n in names if n not in shown)
    colour = dict(zip(shown, COLOURS))
    span, start = (step[0], max(step[-1], 1)), len(step) // 16  # the very first steps would dwarf all others

    ax = axes["mixture"]
    ax.stackplot(step, *bands.values(), colors=[colour.get(n, GREY) for n in bands], alpha=0.85, edgecolor="white",
                 linewidth=0.6)
    ax.set(title=title, ylabel="mixture weight", xlabel="step", ylim=(0, 1), xlim=span)
    tops = np.cumsum([b[-1] for b in bands.values()])
    label_ends(ax, [(top - b[-1] / 2, f"{n}  {b[-1]:.2f}", colour.get(n, GREY))
                    for top, (n, b) in zip(tops, bands.items())])

    ax = axes["loss"]
    for n in shown:
        ax.plot(step, log["source_loss"][n], color=colour[n], linewidth=1.2)
    known = np.isfinite(log["target_val_loss"])
    ax.plot(step[known], log["target_val_loss"][known], color=INK, linewidth=2.4)
    ax.set(title="target val loss (black) and train losses", xlabel="step", ylabel="nats a token", xlim=span)
    settled = [c[start:] for c in (*log["source_loss"].values(), log["target_val_loss"])]
    fit(ax, settled)
    label_ends(ax, [(last(log["source_loss"][n]), n, colour[n]) for n in shown]
               + [(last(log["target_val_loss"]), "target", INK)])

    ax = axes["alignment"]
    window = max(1, len(step) // 12)
    curves = {n: smooth(log["alignment"][n], window) for n in shown}
    for n in shown:
        ax.plot(step, log["alignment"][n], color=colour[n], linewidth=0.8, alpha=0.3)
        ax.plot(step, curves[n], color=colour[n], linewidth=1.8)
    ax.set(title="alignment with the target", xlabel="step", ylabel=r"$\langle P g_{val}, g_k\rangle$", xlim=span)
    if fit(ax, [c[2 * start:] for c in curves.values()]):
        ax.axhline(0, color=GREY, linewidth=0.8)
        label_ends(ax, [(last(curves[n]), n, colour[n]) for n in shown])
    else:
        ax.text(0.5, 0.5, "none measured", ha="center", color=GREY, transform=ax.transAxes)
    return fig


def plot_comparison(plt, logs):
    """Last-half average mixture of each run as grouped bars; target val loss over the steps."""
    fig, (left, right) = plt.subplots(1, 2, figsize=(10, 4.6), dpi=110)
    fig.subplots_adjust(left=0.07, right=0.85, top=0.91, bottom=0.2, wspace=0.22)
    names = list(dict.fromkeys(n for log in logs.values() for n in log["alpha"]))
    width = 0.8 / len(logs)
    for i, (run, log) in enumerate(logs.items()):
        half = log["step"] >= log["step"][-1] / 2
        heights = [log["alpha"][n][half].mean() if n in log["alpha"] else 0 for n in names]
        style = {"color": COLOURS[i % len(COLOURS)]}
        left.bar(np.arange(len(names)) + (i - (len(logs) - 1) / 2) * width, heights, width, **style)
        known = np.isfinite(log["target_val_loss"])
        right.plot(log["step"][known], log["target_val_loss"][known], linewidth=1.8,
                   linestyle=["-", "--", ":"][i // len(COLOURS) % 3], **style)
    left.set_xticks(np.arange(len(names)), names, rotation=30 if len(names) < 13 else 90, ha="right")
    left.set(title="mixture (average of the last half)", ylabel="weight")
    right.set(title="target val loss", xlabel="step", ylabel="nats a token")
    ends = [log["target_val_loss"][np.isfinite(log["target_val_loss"])] for log in logs.values()]
    tails = np.concatenate([e[-max(1, len(e) * 2 // 3):] for e in ends if len(e)] or [np.zeros(1)])
    fit(right, [tails])
    label_ends(right, [(last(log["target_val_loss"]), f"{run}  {last(log['target_val_loss']):.3f}",
                        COLOURS[i % len(COLOURS)]) for i, (run, log) in enumerate(logs.items())])
    return fig


def show_result(run):
    """Prints the table of a run that has finished."""
    path = Path(run, "mixture.json")
    try:
        if path.exists():
            say(result_table(json.loads(path.read_text())))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        fail(f"{path}: not what this fastmix.py writes ({error!r})")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", help="out_dir of a run; several give a comparison")
    parser.add_argument("--show", action="store_true", help="open a window as well")
    args = parser.parse_args()
    # a name that the terminal cannot encode is drawn with ? in its place
    logs = {run.rstrip("/").encode(errors="replace").decode(): read_log(run) for run in args.runs}
    import matplotlib  # here, not above: who only reads a mixture does without it
    if not args.show:
        matplotlib.use("Agg")  # draws without a display
    import matplotlib.pyplot as plt
    plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False, "font.size": 10})
    folder, first = args.runs[0], next(iter(logs))
    if len(logs) == 1:
        show_result(folder)
        fig, path = plot_run(plt, logs[first], f"{first}: mixture over training"), Path(folder, "mixture.png")
    else:
        fig, path = plot_comparison(plt, logs), Path(folder, "comparison.png")
    partial = path.with_suffix(".partial.png")
    try:
        fig.savefig(partial)
        os.replace(partial, path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        fail(f"cannot write {path}: {error.strerror}")
    say(f"wrote {path}")
    if args.show:
        plt.show()


if __name__ == "__main__":
    main()

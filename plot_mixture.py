"""
Log what fastmix.py finds, read it, draw it and hand it on.

    python plot_mixture.py out                 a run's table; out/mixture.png, also of one in progress
    python plot_mixture.py out out-uniform     out/comparison.png: mixtures and target loss of several runs
    python plot_mixture.py out-1 out-2 out-3   if they differ in the seed alone: mean and range, and what they agree on
    python plot_mixture.py out --export hf     the mixture, or the mean of several runs', as a trainer takes it
"""
import argparse
import contextlib
import json
import math
import os
from pathlib import Path

import numpy as np

from prepare_data import fail, launched_rank, lock, save_atomically, say

# Okabe and Ito's palette: told apart with any kind of colour vision. Beyond it, sources share a grey "others".
COLOURS = ["#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#B8A600"]
GREY, INK = "#999999", "#222222"


# ---- logs and results, written and read -----------------------------------------------------------------------------

@contextlib.contextmanager
def or_fail(what, wrong, mend):
    """Ends the program with one line where a file cannot be opened, or holds something else than it should."""
    try:
        yield
    except OSError as error:
        fail(f"{what}: {error.strerror}; {mend}")
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, ArithmeticError) as error:
        fail(f"{what}: {wrong} ({type(error).__name__}: {error}); {mend}")


def open_log(out, step, names):
    """out/log.jsonl, opened to append rows and held, cut back to those up to the checkpoint's step (-1: a new run)."""
    if launched_rank() > 0:
        return open(os.devnull, "a")
    path, mend = Path(out, "log.jsonl"), "put it right, or start a new run in another --out_dir"
    with or_fail(f"cannot open {path}", "it is not the log of the run in ckpt.pt", mend):
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
                raise ValueError("other steps or sources")
            log.truncate(len("".join(kept).encode()))
            log.seek(0, os.SEEK_END)
        return log


def by_name(names, values):
    """(K,) -> {name: value}, None where there is none (NaN), for JSON knows no NaN."""
    return {n: None if math.isnan(v) else v for n, v in zip(names, values.tolist())}


def append_row(log, names, **row):
    """Writes a row of log.jsonl; tensors (K,) become {name: value}. Returns the row."""
    row = {key: by_name(names, v) if hasattr(v, "tolist") else v for key, v in row.items()}
    with or_fail(f"cannot write {log.name}", "", "make room and go on with --resume"):
        log.write(json.dumps(row) + "\n")
        log.flush()
    return row


def progress(row, steps_per_second):
    """A row of the log as the line on the screen, with the largest weights as small bars: python ▆ 0.71  math ▂ 0.20"""
    line = f"step {row['step']:5d} {row['step'] / row['max_steps']:4.0%} | target {row['target_val_loss']:.3f} | "
    if row["train_loss"] is not None:
        line += (f"train {row['train_loss']:.3f} | {row['tokens'] / row['step'] * steps_per_second:,.0f} tok/s | "
                 f"{(row['max_steps'] - row['step']) / steps_per_second:.0f} s left | ")
    alpha = row["alpha"]
    largest = sorted(alpha, key=alpha.get, reverse=True)[:8]
    return line + "  ".join(f"{n} {'▁▂▃▄▅▆▇█'[min(7, int(a * 8))]} {a:.2f}" for n, a in alpha.items() if n in largest)


def save_result(out, names, mixtures, targets, sources, **more):
    """
    Writes out/mixture.json and returns its contents. mixtures {name: (K,)}, weights in any unit; targets {target:
    results}; sources {what: (K,)} for each source. What it began with is in the log's first row.
    """
    first = log_rows(Path(out, "log.jsonl"))[0]
    if "bytes_per_token" in sources:  # shares of bytes, unlike those of tokens, hold for any tokenizer
        size = mixtures["last_half_average"] * sources["bytes_per_token"]
        more["bytes"] = by_name(names, size / size.sum())
    mixtures = {name: by_name(names, m / m.sum()) for name, m in mixtures.items()}
    mean = {key: sum(t.get("weight", 1 / len(targets)) * t[key] for t in targets.values())
            for key in ("test_loss", "test_bits_per_byte")}
    result = {"mixture": mixtures["last_half_average"], "recommended": "last_half_average", "unit": "tokens",
              "mixtures": mixtures, "target": list(targets), **mean, "targets": targets,
              "before": first["target_losses"], **more,
              "sources": {n: {what: values[k].item() for what, values in sources.items()} for k, n in enumerate(names)}}
    for name, s in result["sources"].items():
        s |= {"epochs": s["tokens_seen"] / s["tokens_available"], "start": first["alpha"][name],
              "bound": at_bound(result["mixture"][name], s.get("lower", 0), s.get("upper", 1))}
    save_atomically(Path(out, "mixture.json"), lambda f: f.write((json.dumps(result, indent=1) + "\n").encode()))
    return result


def log_rows(path):
    """The rows of a log.jsonl, without a last one that is half written."""
    return [json.loads(line) for line in Path(path).read_text().splitlines(keepends=True) if line.endswith("\n")]


def read_log(folder):
    """{column: (P,) array, or {name: (P,) array}} from folder/log.jsonl; missing values are NaN."""
    path = Path(folder, "log.jsonl")
    with or_fail(path, "not a log that fastmix.py wrote", f"a run of fastmix.py --out_dir {folder} writes it"):
        rows = log_rows(path) or fail(f"{path} is still empty; try again when the run has logged a line")
        log = {"step": np.array([int(r["step"]) for r in rows]), "target_losses": {}, "lower": {}, "upper": {}}
        log["target_val_loss"] = np.array([r["target_val_loss"] for r in rows], dtype=float)
        for key in ("alpha", "alignment", "source_loss", *({"target_losses", "lower", "upper"} & rows[0].keys())):
            log[key] = {n: np.array([r[key][n] for r in rows], dtype=float) for n in rows[0][key]}
        return log | {"mixture": {n: a[log["step"] >= log["step"][-1] / 2].mean() for n, a in log["alpha"].items()}}


def read_mixture(text, names, tokens):
    """
    What --mixture names -> a schedule (P, 1 + K): fractions of training and the mixture at each, P = 1 for a constant
    one. names and tokens (K,) are the sources' and their sizes. Weights need not sum to 1; who is not named gets 0.
    """
    fractions, given = [0.0], f"--mixture {text}"
    with or_fail(given, "not a mixture that fastmix wrote" if text.endswith((".json", ".jsonl")) else
                 "not a .json or .jsonl file, uniform, proportional, or a=0.8,b=0.2", "a search writes mixture.json"):
        if text in ("uniform", "proportional"):
            rows = [dict(zip(names, tokens if text == "proportional" else [1.0] * len(names)))]
        elif text.endswith(".json"):
            rows = [json.loads(Path(text).read_text())["mixture"]]
        elif text.endswith(".jsonl"):
            log = log_rows(text) or fail(f"{given}: empty")
            rows, steps = [row["alpha"] for row in log], np.array([float(row["step"]) for row in log])
            planned = float(log[-1].get("max_steps", steps[-1]))
            if not (np.diff(steps, append=math.inf) > 0).all():
                fail(f"{given}: its steps do not rise, so it is not the log of one run")
            if steps[-1] < planned:
                fail(f"{given}: its run is at step {steps[-1]:.0f} of {planned:.0f}; finish it first, with --resume")
            fractions = steps / max(planned, 1)
        else:
            pairs = [(name.strip(), float(value)) for name, value in (pair.split("=") for pair in text.split(","))]
            rows = [dict(pairs)] if len(dict(pairs)) == len(pairs) else fail(f"{given}: a name is given twice")
        for row in rows:
            if not isinstance(row, dict) or not row.keys() <= set(names):
                found = ", ".join(row) if isinstance(row, dict) else repr(row)
                fail(f"{given} names {found}, but --sources are {', '.join(names)}")
            bad = [f"{k}={v}" for k, v in row.items() if not (isinstance(v, (int, float)) and 0 <= v < math.inf)]
            if bad or not 0 < sum(row.values()) < math.inf:
                fail(f"{given}: {(bad or ['all weights are 0, or too large'])[0]}; weights must be numbers from 0 up")
    alphas = np.array([[row.get(name, 0.0) for name in names] for row in rows])
    return np.column_stack([fractions, alphas / alphas.sum(1, keepdims=True)])


def mixture_at(schedule, fraction):
    """The mixture (K,) at a fraction of training, between the rows of a schedule (P, 1 + K), all of them tensors."""
    at, *columns = schedule.numpy().T
    return schedule.new_tensor([np.interp(fraction, at, column) for column in columns])


def at_bound(share, lower, upper):
    """Which bound of the search a share is at: "cap", "floor", or "" for none; 0 and 1 are no bounds."""
    near = [0 < bound < 1 and abs(share - bound) <= max(0.005 * bound, 1e-4) for bound in (upper, lower)]
    return "cap" if near[0] else "floor" if near[1] else ""


def result_table(result, warn=False):
    """The lines that a run ends with, from the dict in mixture.json; warn: also if its search collapsed or moved on."""
    mixture, count, width = result["mixture"], len(result["targets"]), max(12, *map(len, result["mixture"]))
    tokens = int(result["settings"].get("train_tokens") or result["tokens"])
    lines = [f"{'source':{width}s} {'tokens':>14s} {'start':>7s} {'final':>7s} {'epochs':>7s} {'val loss':>9s}"]
    for name, s in result["sources"].items():
        share, bound = mixture[name], at_bound(mixture[name], s.get("lower", 0), s.get("upper", 1))
        lines.append(f"{name:{width}s} {s['tokens_available']:14,d} {s['start']:7.3f} {share:7.3f} "
                     f"{share * tokens / s['tokens_available']:7.2f} {s['val_loss']:9.3f}"
                     + f"  final at its {bound}" * bool(bound))
    lines.append(f"final: average of the last half; epochs: of {tokens:,} tokens drawn by it; loss: nats a token")
    for name, t in result["targets"].items():
        lines.append(f"target {name}: test loss {t['test_loss']:.4f} nats a {'learned ' * t['learned_only']}token, "
                     f"{t['test_bits_per_byte']:.4f} bits a byte; val loss {result['before'][name]:.4f} before, "
                     f"{t['val_loss']:.4f} after" + f"; weight {t.get('weight', 1 / count):.3f}" * (count > 1))
    if count > 1:
        lines.append(f"mean of the targets: test loss {result['test_loss']:.4f} nats a token, "
                     f"{result['test_bits_per_byte']:.4f} bits a byte")
    if warn and result.get("searched") and len(mixture) > 1:
        name, mend = max(mixture, key=mixture.get), "raise --max_steps, or lower --learning_rate_mixture"
        moved = sum(abs(result["mixtures"]["last"][n] - mixture[n]) for n in mixture) / 2  # total variation
        if mixture[name] > 0.9:
            lines.append(f"warning: nearly all of the mixture is {name}; unless it is the target's kind, {mend}")
        if moved > 0.2:  # as searches at 10 and 50 times the default rate may
            lines.append(f"warning: {moved:.0%} of the last mixture is not in that average; {mend}")
    return "\n".join(lines)


def seed_table(results):
    """How far R runs that differ in the seed alone agree, as lines; "" if they differ in more, or are not finished."""
    no_matter = ("seed", "out_dir", "resume", "device", "compile", "log_every")
    kinds = [{k: v for k, v in r.get("settings", {}).items() if k not in no_matter} for r in results]
    if not kinds[0] or any(kind != kinds[0] for kind in kinds):
        return ""
    shares = {n: np.array([r["mixture"][n] for r in results]) for n in results[0]["mixture"]}  # {name: (R,)}
    width, order = max(12, *map(len, shares)), sorted(shares, key=lambda n: -shares[n].mean())
    lines = [f"{'source':{width}s} {'mean share':>10s} {'lowest':>8s} {'highest':>8s}"]
    lines += [f"{n:{width}s} {s.mean():10.3f} {s.min():8.3f} {s.max():8.3f}" for n, s in shares.items()]
    swaps = {a: [b for b in order[i + 1:] if (shares[a] < shares[b]).any()] for i, a in enumerate(order)}
    swaps = "; ".join(f"{a} and {', '.join(others)}" for a, others in swaps.items() if others)
    lines.append(f"cannot be told apart: {swaps or 'none, all seeds give the same order'}")
    losses = {f"target {t}": [r["targets"][t]["test_loss"] for r in results] for t in results[0]["targets"]}
    if len(losses) > 1:
        losses["mean of the targets"] = [r["test_loss"] for r in results]
    lines += [f"{t}: test loss {np.mean(x):.4f} nats a token, {min(x):.4f} to {max(x):.4f} over {len(x)} seeds"
              for t, x in losses.items()]
    return "\n".join(lines)


def export(trainer, results):
    """The lines that let a trainer draw by the mixture of a run, or the mean of several, in the trainer's own unit."""
    sources, others, examples = results[0]["sources"], results[-1]["sources"], trainer in ("hf", "llamafactory")
    if sources.keys() != others.keys():
        fail(f"--export takes runs of the same sources, not {', '.join(sources)} and {', '.join(others)}")
    mean = {n: sum(r["mixture"][n] for r in results) / len(results) for n in sources}
    p = {n: a / (sources[n]["tokens_per_document"] if examples else 1) for n, a in mean.items() if a >= 1e-4}
    p = {n: round(a / sum(p.values()), 8) for n, a in p.items()}
    p[max(p, key=p.get)] += 1 - sum(p.values())  # what rounding left over
    p, left = {n: f"{a:.8f}" for n, a in p.items()}, ", ".join(n for n in mean if n not in p)
    unit = "examples = shares of tokens / tokens a document" if examples else "fixed-length samples = shares of tokens"
    return f"# shares of {unit}" + f"; left out, under 0.0001: {left}" * bool(left) + "\n" + {  # trainers refuse 0
        "megatron": "--data-path " + " ".join(f"{a} {n}_text_document" for n, a in p.items()),
        "mosaic": "\n".join(["streams:", *(f'  "{n}":\n    local: "{n}"\n    proportion: {a}' for n, a in p.items())]),
        "llamafactory": f'dataset: "{",".join(p)}"\nmix_strategy: interleave_over\n'
                        f'interleave_probs: "{",".join(p.values())}"',
        "hf": f"from datasets import interleave_datasets  # yours: {{name: its Dataset}}\n"
              f"p = {{{', '.join(f'{n!r}: {a}' for n, a in p.items())}}}\n"
              "mixed = interleave_datasets([yours[n] for n in p], probabilities=list(p.values()), "
              f'seed={results[0]["seed"]}, stopping_strategy="all_exhausted")'}[trainer]


# ---- pictures -------------------------------------------------------------------------------------------------------

def short(name):
    """A name for the picture: 30 characters of a longer one."""
    return name if len(name) <= 30 else f"{name[:15]}…{name[-14:]}"


def draw_curves(ax, curves, skip, window=1):
    """Draws curves [(x (P,), y (P,), label, colour, width, dash)]. Returns what label_ends() takes."""
    ends, seen = [], []
    for x, y, label, colour, width, dash in curves:
        x, y, ones = x[np.isfinite(y)], y[np.isfinite(y)], np.ones(window)
        if len(y) >= window > 1:  # a moving average, and thin what it smooths
            ax.plot(x, y, color=colour, linewidth=0.8, alpha=0.3)
            y = np.convolve(y, ones, "same") / np.convolve(np.ones(len(y)), ones, "same")
        ax.plot(x, y, color=colour, linewidth=width, linestyle=dash)
        ends += [(y[-1], label, colour)] if len(y) else []
        seen.extend(y[int(skip * len(y)):])  # without the first rows, which would dwarf all others
    if seen:
        margin = 0.08 * np.ptp(seen) + 1e-9
        ax.set_ylim(min(seen) - margin, max(seen) + margin)
    return ends


def label_ends(ax, ends):
    """Writes ends [(y, text, colour)] right of the axes at height y, moved apart where they would overlap."""
    ax.figure.draw_without_rendering()  # settles the height; the width then is what the layout leaves beside all text
    y, texts, colours = zip(*sorted(ends)) if ends else ((), (), ())
    (low, high), k = ax.get_ylim(), np.arange(len(y))
    points = ax.get_window_extent().height / ax.figure.dpi * 72
    size = min(10 if max(map(len, texts), default=0) < 22 else 8, points / (1.5 * len(y) + 1))
    gap = (high - low) * 1.5 * size / points
    y = np.array(y) - gap * k  # less what the labels below take, heights only have to ascend
    y = (np.maximum.accumulate(y) + np.minimum.accumulate(y[::-1])[::-1]) / 2
    for height, text, colour in zip(np.clip(y, low, high - gap * (len(y) - 1)) + gap * k, texts, colours):
        ax.annotate(text, (1.01, height), xycoords=("axes fraction", "data"), color=colour, va="center", fontsize=size,
                    fontweight="bold", annotation_clip=False)


def plot_run(fig, log, title):
    """Mixture on top; losses and alignments below."""
    step, alpha, targets = log["step"], log["alpha"], log["target_losses"]
    x = {"xlabel": "step", "xlim": (step[0], max(step[-1], 1))}
    top, left, right = fig.subplot_mosaic([["mixture", "mixture"], ["loss", "alignment"]], subplot_kw=x).values()
    shown = list(alpha) if len(alpha) <= len(COLOURS) else sorted(alpha, key=lambda n: -alpha[n][-1])[:6]
    bands = {n: alpha[n] for n in shown}
    if len(shown) < len(alpha):
        bands[f"{len(alpha) - len(shown)} others"] = sum(alpha[n] for n in alpha if n not in shown)
    colour, ends = dict(zip(bands, [*COLOURS[:len(shown)], GREY])), []
    top.stackplot(step, *bands.values(), colors=colour.values(), alpha=0.85, edgecolor="white", linewidth=0.6)
    for (n, b), edge in zip(bands.items(), np.cumsum([b[-1] for b in bands.values()])):
        bound = at_bound(b[-1], log["lower"].get(n, [0])[-1], log["upper"].get(n, [1])[-1])
        ends.append((edge - b[-1] / 2, f"{short(n)}  {b[-1]:.2f} {bound}".rstrip(), colour[n]))
    lines = [(step, log["source_loss"][n], short(n), colour[n], 1.2, "-") for n in shown]
    if 1 < len(targets) <= 6:
        lines += [(step, y, short(n), INK, 0.9, ["--", ":", "-."][i % 3]) for i, (n, y) in enumerate(targets.items())]
    lines.append((step, log["target_val_loss"], "mean of targets" if len(targets) > 1 else "target", INK, 2.4, "-"))
    gains = [(step, log["alignment"][n], short(n), colour[n], 1.8, "-") for n in shown]
    right.axhline(0, color=GREY, linewidth=0.8)
    ends = {top: ends, left: draw_curves(left, lines, 1 / 16), right: draw_curves(right, gains, 1 / 8, len(step) // 12)}
    top.set(title=f"{short(title)}: mixture over training", ylabel="mixture weight", ylim=(0, 1))
    left.set(title="target val loss (black) and train losses", ylabel="nats a token")
    right.set(title="alignment with the target" if ends[right] else "no alignment measured", ylabel="⟨P g_val, g_k⟩")
    for ax in ends:
        label_ends(ax, ends[ax])


def plot_comparison(fig, logs, mixtures, seeds):
    """Mixtures [{source: share}] of runs as bars, or of seeds mean and range; target val losses of logs {run: log}."""
    names = list(dict.fromkeys(n for mixture in mixtures for n in mixture))
    shares = np.array([[mixture.get(n, 0) for n in names] for mixture in mixtures])  # (R, K)
    mean, place, width, curves = shares.mean(0), np.arange(len(names)), 0.8 / len(logs), []
    fig.set_figheight(max(4.6, 0.2 * len(names)))
    left, right = fig.subplots(1, 2)
    for i, (run, log) in enumerate(logs.items()):
        colour = COLOURS[i % len(COLOURS)]
        curves.append((log["step"], log["target_val_loss"], short(run), colour, 1.8, ["-", "--", ":"][i // 7 % 3]))
        if not seeds:
            left.barh(place + (i + 0.5) * width - 0.4, shares[i], width, color=colour)
    if seeds:
        left.barh(place, mean, 0.7, xerr=[mean - shares.min(0), shares.max(0) - mean], color=GREY, capsize=3)
    left.set(title="mixture, mean and range" if seeds else "mixture, last half",
             xlabel="weight", yticks=place, yticklabels=map(short, names), ylim=(len(names) - 0.5, -0.5))
    right.set(title="target val loss", xlabel="step", ylabel="nats a token")
    label_ends(right, [(y, f"{run}  {y:.3f}", colour) for y, run, colour in draw_curves(right, curves, 1 / 3)])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="out_dir of a run; several give a comparison")
    parser.add_argument("--export", choices=("hf", "megatron", "mosaic", "llamafactory"), help="print for this trainer")
    args = parser.parse_args()
    runs, results = list(dict.fromkeys(args.runs)), []
    for path in (run / "mixture.json" for run in runs):
        with or_fail(path, "not what this fastmix.py writes", "finish the run, or search again with this version"):
            results.append(json.loads(path.read_text()) if args.export or path.exists() else {})
            text = result_table(results[-1], warn=True) if path.exists() else ""  # fails where something is missing
            text = export(args.export, results) if args.export else text
    if args.export:
        return say(text)
    # a name that the terminal cannot encode is drawn with ? in its place
    logs = {str(run).encode(errors="replace").decode(): read_log(run) for run in runs}
    import matplotlib.figure  # here, not above: who only reads a mixture does without it
    matplotlib.rcParams.update({"axes.spines.top": False, "axes.spines.right": False, "axes.titlelocation": "left",
                                "text.parse_math": False})
    fig, path = matplotlib.figure.Figure((10, 7.2), 110, layout="constrained"), runs[0] / "mixture.png"
    if len(runs) == 1:
        plot_run(fig, *logs.values(), *logs)
    else:
        text, path = seed_table(results), runs[0] / "comparison.png"
        mixtures = [result.get("mixture", log["mixture"]) for result, log in zip(results, logs.values())]
        plot_comparison(fig, logs, mixtures, seeds=text != "")
    save_atomically(path, lambda f: fig.savefig(f, format="png"))
    say(f"{text}\nwrote {path}".lstrip())


if __name__ == "__main__":
    main()

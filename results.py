"""Tables and plots of a sweep from its run records, local or in Weights & Biases. Local records need no torch.

    python results.py [RUNS or SWEEP] [--wandb ENTITY/PROJECT]

RUNS is a folder of sweeps, whose newest sweep is used (default: runs). SWEEP is a sweep's folder or its name in runs/.
With --wandb the runs are read from that project, where a sweep is a group. The sweep's folder receives the figures as
PNG and PDF, and the numbers of finished runs:

    results               the paper's figure: NMSE and CE degradation against dictionary size and against L0
    results_pareto        the same metrics against L0, with the Pareto front of each SAE type and of all runs
    results_curves        loss and dead features during training; unfinished runs are thin lines with a hollow end
    results_histograms    L0 per token, and density of the features
    results.csv, .md      one row per run; one row per configuration, with mean ± standard error over seeds

Where a configuration has SAEs of several seeds in the folder, results.md also has `mmcs`, the agreement between seeds
(mmcs_over_seeds). Its values are kept in mmcs.json, because a pair of the paper's SAEs takes seconds.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # files only: no display needed
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.colors import to_hex, to_rgb
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from config import MIN_L0, SAE_TYPES, TOP_K_TYPES
from console import InputError, run_command
from records import (
    CURVES,
    RunRecord,
    died,
    local_runs,
    main_table,
    mmcs_over_seeds,
    over_seeds,
    point_keys,
    run_configs,
    run_table,
    values_in_legend,
    varied_keys,
    wandb_runs,
)

# Figures have the width of a page, 6.8 inches, so that font sizes are the same in print.
plt.rcParams.update({
    "font.size": 8, "legend.fontsize": 7, "xtick.labelsize": 7, "ytick.labelsize": 7, "lines.linewidth": 1.2,
    "lines.markersize": 4.5, "errorbar.capsize": 2, "axes.spines.top": False, "axes.spines.right": False,
    "axes.grid": True, "grid.alpha": 0.3, "legend.frameon": False, "legend.handlelength": 2.6,
    "savefig.dpi": 300, "pdf.fonttype": 42, "figure.autolayout": False, "figure.constrained_layout.use": False,
})  # fmt: skip

# The Okabe-Ito palette, which is safe for colour-blind readers; markers and line styles differ for greyscale prints.
STYLES = {
    "batchtopk": ("#0072B2", "o", "-"),
    "matryoshka": ("#E69F00", "v", (0, (8, 1.5, 1, 1.5, 1, 1.5))),
    "topk": ("#D55E00", "s", "--"),
    "jumprelu": ("#009E73", "^", "-."),
    "vanilla": ("#CC79A7", "D", ":"),
}
LINES = ["-", (0, (5, 1.5)), (0, (1, 1.2)), (0, (5, 1.5, 1, 1.5)), (0, (8, 2, 3, 2)), (0, (3, 1, 1, 1, 1, 1))]
PLAIN = FuncFormatter(lambda value, _: f"{value:g}")
METRIC_LABELS = {"nmse": "Normalized MSE", "ce_degradation": "CE degradation (nats)"}


# Figures


def by_type(points: pd.DataFrame) -> Iterator[tuple]:
    """The points of each SAE type present, its label and its style."""
    for sae_type, style in STYLES.items():
        if (points["sae_type"] == sae_type).any():
            yield points[points["sae_type"] == sae_type], SAE_TYPES[sae_type], *style


def by_line(points: pd.DataFrame) -> Iterator[tuple]:
    """The points of each SAE type and variant present, its label and its style."""
    for own, name, colour, marker, line in by_type(points):
        for (shade, variant), part in own.groupby(["shade", "variant"]):
            yield part, f"{name}, {variant}".removesuffix(", "), shaded(colour, shade), marker, line


def shaded(colour: str, shade: float) -> str:
    """The colour mixed with white: as it is for shade 1, light for 0."""
    return to_hex(1 - (0.25 + 0.75 * shade) * (1 - np.array(to_rgb(colour))))


def common_point(points: pd.DataFrame) -> tuple[int | None, int]:
    """The k with the most dictionary sizes, and the dictionary size with the most points."""
    by_k = points[points["sae_type"].isin(TOP_K_TYPES)]
    top_k = by_k.groupby("top_k")["dict_size"].nunique().idxmax() if len(by_k) else None
    return top_k, points.groupby("dict_size").size().idxmax()


def paper_figure(points: pd.DataFrame) -> plt.Figure:
    """NMSE and CE degradation against dictionary size at fixed k (top, if there are several), and against L0 at fixed
    dictionary size (bottom).
    """
    top_k, dict_size = common_point(points)
    by_k = points[points["sae_type"].isin(TOP_K_TYPES) & (points["top_k"] == top_k)]
    rows = 2 if by_k["dict_size"].nunique() > 1 else 1
    figure, axes = plt.subplots(rows, 2, figsize=(6.8, 2.5 * rows), layout="constrained", squeeze=False)
    for column, (metric, label) in zip(axes.T, METRIC_LABELS.items()):
        if rows > 1:
            draw_lines(column[0], by_k, "dict_size", metric)
            column[0].set(xlabel=f"Dictionary size (k = {top_k})", ylabel=label)
        draw_lines(column[-1], points[points["dict_size"] == dict_size], "l0", metric)
        column[-1].set(xlabel=f"L0 ({dict_size} features)", ylabel=label)
    legend_above(figure, axes[-1, 0])
    return figure


def draw_lines(axis: plt.Axes, points: pd.DataFrame, x: str, metric: str) -> None:
    """One line per SAE type and variant over a logarithmic x; bars are standard errors over seeds."""
    for own, label, colour, marker, line in by_line(points.sort_values(x)):
        error = own[f"{metric}_se"].fillna(0)
        axis.errorbar(alive(own[x]), own[metric], error, label=label, color=colour, marker=marker, linestyle=line)
    log2_axis(axis)
    log_axis_if_wide(axis, points[metric])
    mark_died(axis, points, x, metric)


def alive(values: pd.Series) -> pd.Series:
    """L0 values for a logarithmic axis: NaN if below MIN_L0, which mark_died draws."""
    return values.where(values >= MIN_L0)


def mark_died(axis: plt.Axes, points: pd.DataFrame, x: str, metric: str) -> None:
    """Draw dead runs with hollow markers; those with L0 below MIN_L0 are at the left edge of the logarithmic axis."""
    for own, _, colour, marker, _ in by_line(points[points["died"]]):
        style = dict(color=colour, marker=marker, mfc="white", linestyle="none", zorder=4)
        axis.plot(alive(own[x]), own[metric], **style)
        edge = own[alive(own[x]).isna()][metric]
        axis.plot(0 * edge, edge, transform=axis.get_yaxis_transform(), clip_on=False, in_layout=False, **style)
    if points["died"].any():
        axis.errorbar([], [], fmt="o", color="0.4", mfc="white", label="features of a run died")


def log2_axis(axis: plt.Axes) -> None:
    if not np.isfinite(axis.dataLim.minposx):  # without positive values, matplotlib finds no limits
        axis.set_xlim(1, 2)
    axis.set_xscale("log", base=2)
    low, high = np.log2(axis.get_xlim())
    if np.floor(high) - np.ceil(low) < 1:  # fewer than two powers of two are in view
        axis.xaxis.set_major_locator(MaxNLocator("auto", steps=[1, 2, 5, 10]))
    axis.xaxis.set_major_formatter(PLAIN)


def log_axis_if_wide(axis: plt.Axes, values: pd.Series) -> None:
    """Make y logarithmic if the values differ by a factor of 4 or more: otherwise the largest hide the rest."""
    if values.min() > 0 and values.max() >= 4 * values.min():
        log_axis(axis)


def log_axis(axis: plt.Axes) -> None:
    axis.set_yscale("log")
    low, high = axis.get_ylim()
    decades = np.log10(high / low)
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5) if decades < 2 else (1, 3) if decades < 4 else (1,)))
    axis.yaxis.set_major_formatter(PLAIN)
    axis.yaxis.set_minor_formatter(NullFormatter())


def legend_above(figure: plt.Figure, axis: plt.Axes) -> None:
    handles, labels = axis.get_legend_handles_labels()
    for ncols in range(len(labels), 0, -1):  # as many columns as the figure is wide
        legend = figure.legend(handles, labels, loc="outside upper center", ncols=ncols)
        if legend.get_window_extent().width <= figure.bbox.width or ncols == 1:
            height = legend.get_window_extent().height / figure.dpi
            figure.set_figheight(figure.get_figheight() + max(0, height - 0.4))
            return
        legend.remove()


def legend_height(axis: plt.Axes) -> float:
    """The approximate height of an axis's legend in inches."""
    return 0.14 * sum(text.get_text().count("\n") + 1 for text in axis.get_legend().texts)


def pareto_figure(points: pd.DataFrame) -> plt.Figure:
    """NMSE and CE degradation against L0, one point per configuration; lines are the Pareto front of each SAE type."""
    figure, axes = plt.subplots(1, 2, figsize=(6.8, 2.9), layout="constrained")
    for axis, (metric, ylabel) in zip(axes, METRIC_LABELS.items()):
        best = front(points, metric)
        fronts = "Pareto front (thin lines: per colour)"
        axis.step(best["l0"], best[metric], where="post", color="0.8", linewidth=4, label=fronts, zorder=1)
        for own, label, colour, marker, line in by_line(points):
            area = 12 * own["dict_size"] / points["dict_size"].min()
            errors = own[[f"{metric}_se", "l0_se"]].fillna(0).values.T
            axis.errorbar(alive(own["l0"]), own[metric], *errors, fmt="none", ecolor=colour, capsize=0, zorder=2)
            style = dict(color=colour, marker=marker, linewidth=0.4, edgecolor="white", zorder=3)
            axis.scatter(alive(own["l0"]), own[metric], area, label=label, **style)
            own = front(own, metric)
            axis.plot(own["l0"], own[metric], color=colour, linestyle=line, zorder=2)
        log2_axis(axis)
        log_axis_if_wide(axis, points[metric])
        mark_died(axis, points, "l0", metric)
        axis.set(xlabel="L0 (larger marker: larger dictionary)", ylabel=ylabel)
    legend_above(figure, axes[0])
    return figure


def front(points: pd.DataFrame, metric: str) -> pd.DataFrame:
    """The Pareto front in L0 and the metric, sorted by L0, without dead runs."""
    points = points[points["l0"] >= MIN_L0].sort_values(["l0", metric])
    return points[points[metric] < points[metric].cummin().shift(fill_value=np.inf)]


def curves_figure(table: pd.DataFrame) -> plt.Figure:
    """Loss and dead features over tokens, one column per SAE type; each unfinished run is a separate line."""
    types = list(by_type(table))
    figure = plt.figure(figsize=(max(3.3, 1.7 * len(types)), 4.4), layout="constrained")
    axes = figure.subplots(2, len(types), sharex=True, sharey="row", squeeze=False)
    for column, (own, name, colour, _, _) in zip(axes.T, types):
        points = over_seeds(own)
        varied = varied_keys(own)
        for i, (_, point) in enumerate(points.iterrows()):
            style = dict(color=shaded(colour, (i + 1) / len(points)), mfc="white", markevery=[-1])
            finished = [run for run in point["run"] if run.state == "finished"]
            unfinished = [[run] for run in point["run"] if run.state != "finished"]
            for axis, metric in zip(column, CURVES):
                if finished:
                    label = values_in_legend(point, varied) or ("no penalty" if varied else "all")
                    draw_mean(axis, curves(finished, metric), linestyle=LINES[i % len(LINES)], label=label, **style)
                for run in unfinished:
                    draw_mean(axis, curves(run, metric), linewidth=0.7, marker="o", **style)
        if (own["state"] != "finished").any():
            column[0].plot([], color=colour, linewidth=0.7, marker="o", mfc="white", label="not finished")
        column[0].legend(title=name, loc="lower center", bbox_to_anchor=(0.5, 1))
        column[1].set_xlabel("Tokens (millions)")
    figure.set_figheight(3.6 + max(map(legend_height, axes[0])))
    axes[0, 0].set_ylabel("Training loss")
    log_axis(axes[0, 0])
    axes[1, 0].set(ylabel="Dead features (%)")
    return figure


def curves(runs: list[RunRecord], metric: str) -> pd.DataFrame:
    """A training metric, one column per run, indexed by millions of tokens that all runs logged; dead features in %."""
    columns = []
    for run in runs:
        scale = 100 / run.config["dict_size"] if metric == "num_dead_features" else 1
        values = {row["tokens"] / 1e6: scale * row[metric] for row in run.history if metric in row}
        columns.append(pd.Series(values, dtype=float))
    return pd.concat(columns, axis=1, join="inner")


def draw_mean(axis: plt.Axes, values: pd.DataFrame, step: str | None = None, **style) -> None:
    """Draw the mean over columns as a line, and its standard error as a band."""
    mean, error = values.mean(axis=1), values.sem(axis=1).fillna(0)
    axis.plot(mean, drawstyle=f"steps-{step}" if step else "default", **style)
    axis.fill_between(mean.index, mean - error, mean + error, step=step, color=style["color"], alpha=0.25, linewidth=0)


def histograms_figure(points: pd.DataFrame) -> plt.Figure:
    """Density of the features, and L0 per token for BatchTopK (if there is any) and TopK, at one dictionary size."""
    top_k, dict_size = common_point(points)
    points = points[points["dict_size"] == dict_size]
    drawn = points[points["sae_type"].isin(["topk", "batchtopk"]) & (points["l0"] >= MIN_L0)]
    panels = 1 + (drawn["sae_type"] == "batchtopk").any()
    figure, axes = plt.subplots(1, panels, figsize=(3.4 * panels, 2.8), layout="constrained", squeeze=False)
    *left, right = axes[0]
    for axis in left:
        shares = []
        for own, label, colour, _, line in by_line(drawn):
            for i, (_, point) in enumerate(own.iterrows()):
                values = histograms(point["run"], "l0")
                if point["sae_type"] == "batchtopk":
                    style = dict(color=colour, linestyle=LINES[i % len(LINES)], label=f"{label}, k = {point['top_k']}")
                    draw_mean(axis, values, step="mid", **style)
                else:  # a line, as one bar of about 100 % would dwarf the rest
                    axis.axvline(values.mean(axis=1).idxmax(), color=colour, linestyle=line)
                    shares.append(values.mean(axis=1).get(point["top_k"], 0))
        if shares:
            share = "–".join(dict.fromkeys(f"{share:.3g}" for share in (min(shares), max(shares))))
            axis.plot([], color=colour, linestyle=line, label=f"TopK: L0 = k for {share} % of tokens")
        axis.set(xlabel=f"L0 per token ({dict_size} features)", ylabel="Tokens (%)", xlim=(0, None))

    for own, label, colour, _, line in by_line(points):
        point = own.loc[(own["l0"] - (top_k or own["l0"].median())).abs().idxmin()]  # with L0 nearest to top_k
        never = np.mean([run.summary["histograms"]["never_active"] / dict_size for run in point["run"]])
        label = f"{label}, L0 {point['l0']:.0f}{' †' if point['died'] else ''}: {never:.1%} never active"
        values = histograms(point["run"], "log10_density")
        draw_mean(right, values, step="mid", color=colour, linestyle=line, label=label)
    right.set(xlabel="Feature density (log10 of the fraction of tokens)", ylabel="Features (%)")
    for axis in axes[0]:
        axis.set_ylim(0)
        axis.legend(loc="lower center", bbox_to_anchor=(0.5, 1))
    figure.set_figheight(2.2 + max(map(legend_height, axes[0])))
    return figure


def histograms(runs: list[RunRecord], key: str) -> pd.DataFrame:
    """% of tokens indexed by L0, or % of features indexed by bin centre; one column per run, empty ends trimmed."""
    columns = []
    for run in runs:
        record = run.summary["histograms"]
        counts, total = pd.Series(record[key]), sum(record["l0"])
        if key == "log10_density":
            counts.index = np.convolve(record["log10_density_edges"], [0.5, 0.5], "valid")
            total = run.config["dict_size"]
        columns.append(100 * counts / total)
    values = pd.concat(columns, axis=1).fillna(0)  # maximum L0 differs between runs
    present = values.index[values.any(axis=1)]
    return values.loc[present[0] : present[-1]] if len(present) else values[:0]  # all features died


# All results


def draw_results(folder: Path, runs: list[RunRecord] | None = None) -> None:
    """Print the table of a sweep's runs (default: those in its folder); save figures and numbers in the folder."""
    runs = local_runs(folder) if runs is None else runs
    if not runs:
        raise InputError(f"{folder} has no run records")
    table, notes, figures = run_table(runs), [], {}
    for why, rest in table[table["state"] != "finished"].groupby("state"):
        where = "Not in the figures" if why.startswith("imported") else "Not finished, so only in the curves"
        names = list(rest["name"])
        if not why.startswith(("imported", "stopped")):
            names = [f"{run['name']} ({run['tokens']:,} of {run['num_tokens']:,} tokens)" for _, run in rest.iterrows()]
        notes.append(f"{where} ({why}): {', '.join(names)}")
    finished = table[table["state"] == "finished"]
    keys = point_keys(table)
    duplicates = finished.duplicated([*keys, "seed"])
    notes += [f"Skipped, because another run has the same config: {name}" for name in finished["name"][duplicates]]
    table, finished = table.drop(finished.index[duplicates]), finished[~duplicates]
    if names := [run.name for run in finished["run"] if died(run)]:
        notes.append(f"† The features died (L0 below {MIN_L0}): {', '.join(names)}")

    folder.mkdir(parents=True, exist_ok=True)
    if len(finished):
        points = over_seeds(finished)
        if (agreement := mmcs_over_seeds(folder, points)).notna().any():
            points["mmcs"] = agreement
        finished.drop(columns="run").to_csv(folder / "results.csv", index=False)
        figures |= {"results": paper_figure(points), "results_pareto": pareto_figure(points)}
        if all(run.summary.get("histograms") for run in finished["run"]):
            figures["results_histograms"] = histograms_figure(points)
        else:
            notes.append("Some records have no histograms: no histogram figure")
        shared = ("model_name", "hook_point", "dataset_path", "num_tokens")
        shared = [key for key in shared if key in finished and finished[key].nunique() == 1]
        about = [", ".join(f"{key}: {finished[key].iloc[0]}" for key in shared)] * bool(shared)
        if (points["seeds"] > 1).any():
            about.append("Mean ± standard error over seeds.")
        if "mmcs" in points:
            about.append("mmcs: mean maximal cosine similarity of the alive features of two seeds, over all pairs.")
        text = [f"# {folder.name}", main_table(points), *about, *notes]
        (folder / "results.md").write_text("\n\n".join(text) + "\n", encoding="utf-8")
        print(text[1])
    else:
        notes.append(f"{folder} has no finished run: no table")
    logged = table[[bool(run.history) for run in table["run"]]]
    if len(logged):
        figures["results_curves"] = curves_figure(logged)
    for note in notes:
        print(note)
    for name, figure in figures.items():
        figure.savefig(folder / f"{name}.png")
        figure.set_layout_engine(None)  # the PDF has the layout of the PNG, which takes a while to compute
        figure.savefig(folder / f"{name}.pdf")
        plt.close(figure)
        print(f"Figure: {folder / name}.png and .pdf")
    if len(finished):
        print(f"Numbers: {folder / 'results.csv'} and .md")


def sweep_folder(path: Path) -> Path:
    """The folder of a sweep, given its folder, its name in runs/, or a folder of sweeps, of which it is the newest."""
    for folder in (path, "runs" / path):
        if run_configs(folder):
            return folder
    sweeps = [folder for folder in path.glob("*") if run_configs(folder)]
    if not sweeps:
        found = ", ".join(sorted({config.parent.parent.name for config in Path("runs").glob("*/*/config.json")}))
        hint = f"the sweeps in runs/ are {found}" if found else "train a sweep first (python main.py demo)"
        raise InputError(f"{path} has no run records; {hint}")
    return max(sweeps, key=lambda folder: max(path.stat().st_mtime for path in folder.glob("*/*.json")))


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "folder", nargs="?", type=Path, metavar="RUNS or SWEEP",
        help="a sweep's folder or its name in runs/, or a folder of sweeps, whose newest is used (default: runs)",
    )  # fmt: skip
    parser.add_argument("--wandb", metavar="ENTITY/PROJECT", help="read the runs from this W&B project")
    args = parser.parse_args(argv)
    if args.wandb:
        runs = wandb_runs(args.wandb, args.folder and args.folder.name)
        folder = args.folder if args.folder and len(args.folder.parts) > 1 else Path("runs", runs[0].config["sweep"])
        draw_results(folder, runs)
    else:
        draw_results(sweep_folder(args.folder or Path("runs")))


if __name__ == "__main__":
    run_command(main)

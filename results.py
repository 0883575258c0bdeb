"""Tables and plots of a sweep from its local run records. Needs neither torch nor an account.

    python results.py [FOLDER]      a sweep's folder, e.g. runs/demo (default: the newest in runs/)

Writes results.png, results.pdf and results.csv into the folder and prints the table.
"""

import argparse
import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # files only: no display needed
import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.ticker import FuncFormatter

# Okabe and Ito's colours, told apart by colour-blind readers; the markers tell them apart in grey.
STYLES = {
    "batchtopk": ("BatchTopK", "#0072B2", "o"),
    "topk": ("TopK", "#D55E00", "s"),
    "jumprelu": ("JumpReLU", "#009E73", "^"),
    "vanilla": ("Vanilla (L1)", "#CC79A7", "D"),
}
# A point of a plot is the mean over runs that differ in these keys alone: the seed, and how a run is recorded.
NOT_IN_POINT = {
    "seed", "name", "device", "output_dir", "sweep", "wandb_project", "wandb_mode", "log_freq", "perf_log_freq",
    "checkpoint_freq",
}  # fmt: skip
SWEPT = ["sae_type", "dict_size", "top_k", "l1_coeff"]
COLUMNS = ["nmse", "fvu", "l0", "dead_fraction", "ce_degradation", "recovery_from_zero"]  # of the printed table


def read_runs(folder: Path) -> tuple[pd.DataFrame, pd.DataFrame, list[str]]:
    """The configs and the final metrics of a sweep's finished runs, a run a row; the names of the unfinished ones."""
    configs, results, unfinished = [], [], []
    for path in sorted(folder.glob("*/config.json")):
        if (path.parent / "result.json").is_file():
            configs.append(json.loads(path.read_text()))
            del configs[-1]["_provenance"]
            results.append(json.loads((path.parent / "result.json").read_text()))
        else:
            unfinished.append(path.parent.name)
    return pd.DataFrame(configs), pd.DataFrame(results), unfinished


def over_seeds(configs: pd.DataFrame, results: pd.DataFrame) -> pd.DataFrame:
    """Mean and standard error (nmse_se, ...) of each metric over the seeds of a configuration, one a row."""
    keys = [key for key in configs if key not in NOT_IN_POINT]
    groups = pd.concat([configs[keys], results], axis=1).groupby(keys, dropna=False)
    table = groups[list(results)].mean()
    errors = groups[list(results)].sem().add_suffix("_se")
    return table.join(errors).join(groups.size().rename("seeds")).reset_index()


def text_table(table: pd.DataFrame) -> str:
    """The main metrics, a configuration a row; with several seeds each as mean ± standard error."""
    rows = table.sort_values(SWEPT)[[*SWEPT, *COLUMNS]].copy()
    for metric in COLUMNS:
        form = "{:.1f}" if metric == "l0" else "{:.4f}"
        errors = table[f"{metric}_se"].map((" ± " + form).format).where(table["seeds"] > 1, "")
        rows[metric] = rows[metric].map(form.format) + errors
    sparse_by_k = rows["sae_type"].isin(["topk", "batchtopk"])
    rows["top_k"] = rows["top_k"].astype(str).where(sparse_by_k, "")
    rows["l1_coeff"] = rows["l1_coeff"].map("{:g}".format).where(~sparse_by_k | (rows["l1_coeff"] > 0), "")
    rows["sae_type"] = rows["sae_type"].map(lambda sae_type: STYLES[sae_type][0])
    return rows.to_string(index=False)


def paper_figure(table: pd.DataFrame) -> plt.Figure:
    """NMSE and CE degradation, against dictionary size at fixed k (top) and L0 at fixed dictionary size (bottom)."""
    by_k = table[table["sae_type"].isin(["topk", "batchtopk"])]
    figure, axes = plt.subplots(2, 2, figsize=(7, 5.6), layout="constrained")
    top_k = by_k.groupby("top_k")["dict_size"].nunique().idxmax() if len(by_k) else None
    dict_size = table.groupby("dict_size").size().idxmax()
    for column, (metric, label) in enumerate([("nmse", "Normalized MSE"), ("ce_degradation", "CE degradation (nats)")]):
        draw_lines(axes[0, column], by_k[by_k["top_k"] == top_k], "dict_size", metric)
        axes[0, column].set(xlabel=f"Dictionary size (k = {top_k})", ylabel=label)
        draw_lines(axes[1, column], table[table["dict_size"] == dict_size], "l0", metric)
        axes[1, column].set(xlabel=f"L0 ({dict_size} features)", ylabel=label)
    handles, labels = axes[1, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels), frameon=False)
    return figure


def draw_lines(axis: plt.Axes, table: pd.DataFrame, x: str, metric: str) -> None:
    """One line per SAE type over a logarithmic x; bars are standard errors over seeds."""
    for sae_type, (label, colour, marker) in STYLES.items():
        points = table[table["sae_type"] == sae_type].sort_values(x)
        if len(points):
            error = points[f"{metric}_se"].fillna(0)
            axis.errorbar(
                points[x], points[metric], yerr=error, label=label, color=colour, marker=marker, markersize=5, capsize=2
            )
    axis.set_xscale("log", base=2)
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.grid(alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)


def draw_results(folder: Path) -> None:
    """Print the table of a sweep and save its figure and its numbers beside its runs."""
    configs, results, unfinished = read_runs(folder)
    if unfinished:
        print(f"{len(unfinished)} unfinished runs are left out: {', '.join(unfinished)}")
    if configs.empty:
        print(f"{folder} holds no finished run: nothing to draw")
        return
    mixed = [key for key in configs if key not in {*NOT_IN_POINT, *SWEPT} and configs[key].nunique(dropna=False) > 1]
    if mixed:
        print(f"The runs in {folder} also differ in {', '.join(mixed)}: the lines of the figure join unlike runs")
    table = over_seeds(configs, results)
    print(text_table(table))
    pd.concat([configs, results], axis=1).to_csv(folder / "results.csv", index=False)
    figure = paper_figure(table)
    for ending in ("png", "pdf"):
        figure.savefig(folder / f"results.{ending}", dpi=200)
    plt.close(figure)
    print(f"Figure: {folder / 'results.png'} and .pdf; numbers: {folder / 'results.csv'}")


def newest_sweep(runs: Path) -> Path | None:
    """The sweep folder in which a run finished last."""
    finished = sorted(runs.glob("*/*/result.json"), key=lambda path: path.stat().st_mtime)
    return finished[-1].parent.parent if finished else None


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "folder", nargs="?", type=Path, help="a sweep's folder, e.g. runs/demo (default: the newest in runs/)"
    )
    asked = parser.parse_args().folder
    folder = asked or newest_sweep(Path("runs"))
    if folder is None or not folder.is_dir():
        sys.exit(f"error: {asked or 'runs'} holds no run records; train a sweep first (python main.py demo)")
    draw_results(folder)

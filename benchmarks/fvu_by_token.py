"""Which tokens the FVU of SAEs comes from, and how many features these tokens have.

    python benchmarks/fvu_by_token.py RUN [RUN ...] [--plot FILE.png]

FVU is Σ ‖x − r‖² / Σ ‖x − x_mean‖² over the held-out tokens of a run, so tokens far from the mean activation weigh
most. The tokens are grouped by quantiles of their deviation ‖x − x_mean‖², and by position in the context. Prints
Markdown tables with a column for each group: its share of the tokens and of Σ ‖x − x_mean‖²; and for each SAE, the
group's part of the FVU (the parts add up to it), its NMSE and its mean number of active features. Below the tables are
the tokens with the largest deviations. "batch" marks a BatchTopK or Matryoshka SAE with the top k of the batch. The
runs must share model, text and held-out tokens.
"""

import argparse
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from common import markdown_table

from console import InputError, run_command
from evaluation import eval_batches, open_run, position_mask, reconstruct, variants_of
from language_model import tokenizer_of
from results import LINES, STYLES, plt

QUANTILES = [0, 0.5, 0.9, 0.99, 0.999, 0.9999, 1]
POSITIONS = [-1, 0, *(2**i - 1 for i in range(1, 20))]  # 0, 1, 2-3, 4-7, ...
GROUPINGS = {"deviation": "quantiles of ‖x − mean‖²", "position": "position in the context"}


@torch.no_grad()
def measure(run: Path) -> tuple[pd.DataFrame, dict[str, pd.DataFrame], list[str]]:
    """The held-out tokens of a run, a row each: id, position, deviation, own_variance. And for each way in which its
    SAE is used, by name, the error ‖x − r‖² and the l0 of these tokens. And the model's tokens by id.
    """
    sae, model, store = open_run(run)
    rows, batches = {key: [] for key in ("id", "position")}, []
    for tokens in eval_batches(store):
        mask = position_mask(store, tokens)
        batches.append(store.get_activations(tokens)[mask])
        rows["id"].append(tokens[mask])
        rows["position"].append(mask.nonzero()[:, 1])
    rows = {key: torch.cat(parts).cpu().numpy() for key, parts in rows.items()}
    x = torch.cat(batches)
    rows["deviation"] = (x - x.double().mean(0).float()).double().pow(2).sum(-1).cpu().numpy()
    rows["own_variance"] = (x - x.mean(-1, keepdim=True)).double().pow(2).sum(-1).cpu().numpy()
    used = {}
    for suffix, training, size in variants_of(sae.cfg, whole=False):
        parts = []
        for x in batches:
            reconstruction, features = reconstruct(sae, x, training, size)
            parts.append(torch.stack([(x - reconstruction).double().pow(2).sum(-1), (features > 0).sum(-1)], 1))
        name = sae.cfg["name"] + suffix.replace("_", " ")
        used[name] = pd.DataFrame(torch.cat(parts).cpu().numpy(), columns=["error", "l0"])
    return pd.DataFrame(rows), used, tokenizer_of(model, sae.cfg).convert_ids_to_tokens(range(model.cfg.d_vocab))


def groups_of(tokens: pd.DataFrame, grouping: str) -> pd.Series:
    """The group of each token, as an ordered category."""
    if grouping == "position":
        last = tokens["position"].max()
        names = ["0", "1", *(f"{low + 1} to {min(high, last)}" for low, high in zip(POSITIONS[2:], POSITIONS[3:]))]
        return pd.cut(tokens["position"], POSITIONS, labels=names).cat.remove_unused_categories()
    names = [f"{100 * low:g} to {100 * high:g} %" for low, high in zip(QUANTILES, QUANTILES[1:])]
    return pd.cut(tokens["deviation"].rank(method="first", pct=True), QUANTILES, labels=names)


def shares(tokens: pd.DataFrame, used: dict[str, pd.DataFrame], grouping: str) -> pd.DataFrame:
    """One row per group, and the row "all". Columns: (of the tokens, what) and (name of the SAE, what)."""
    groups, total = groups_of(tokens, grouping), tokens["deviation"].sum()
    columns = {("", "tokens"): tokens["deviation"] * 0 + 1 / len(tokens), ("", "variance"): tokens["deviation"] / total}
    for name, values in used.items():
        columns[name, "fvu"] = values["error"] / total
        columns[name, "nmse"] = values["error"] / tokens["own_variance"]
        columns[name, "l0"] = values["l0"]
    columns = pd.DataFrame(columns)
    how = {column: "mean" if column[1] in ("nmse", "l0") else "sum" for column in columns}
    return pd.concat([columns.groupby(groups, observed=True).agg(how), columns.agg(how).to_frame("all").T])


def markdown(table: pd.DataFrame, grouping: str) -> str:
    forms = {"tokens": "{:.2%}", "variance": "{:.1%}", "fvu": "{:.4f}", "nmse": "{:.4f}", "l0": "{:.1f}"}
    rows = [[name, what, *table[name, what].map(forms[what].format)] for name, what in table]
    return markdown_table([[GROUPINGS[grouping], "", *table.index], *rows])


def draw(tables: dict[str, pd.DataFrame], path: Path) -> None:
    """Part of the FVU and mean L0 by group: a column for each grouping, a line for each SAE."""
    figure, axes = plt.subplots(2, 2, figsize=(6.8, 5), sharex="col", layout="constrained")
    for column, (grouping, table) in zip(axes.T, tables.items()):
        table = table.drop("all")
        for i, name in enumerate(dict.fromkeys(name for name, _ in table if name)):
            style = dict(zip(("color", "marker"), STYLES[name.split("_")[0]]), linestyle=LINES[i % len(LINES)])
            for axis, what in zip(column, ("fvu", "l0")):
                axis.plot(range(len(table)), table[name, what], label=name, **style)
        column[1].set_xticks(range(len(table)), table.index, rotation=45, ha="right")
        column[1].set_xlabel(GROUPINGS[grouping])
        column[0].set_yscale("log")
    for axis, label in zip(axes[:, 0], ("Part of the FVU", "L0")):
        axis.set_ylabel(label)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=2)
    figure.savefig(path)
    plt.close(figure)


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="a run's folder, runs/<sweep>/<name>")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw the tables")
    args = parser.parse_args(argv)
    tokens, used = None, {}
    for run in args.runs:
        own, of_run, vocabulary = measure(run)
        if tokens is not None and not np.array_equal(own["deviation"], tokens["deviation"]):
            raise InputError(f"{run} has other held-out activations than {args.runs[0]}")
        tokens, used = own, used | of_run
    tables = {grouping: shares(tokens, used, grouping) for grouping in GROUPINGS}
    for grouping, table in tables.items():
        print(markdown(table, grouping), end="\n\n")
    for _, token in tokens.nlargest(5, "deviation").iterrows():
        share = token["deviation"] / tokens["deviation"].sum()
        print(f"{vocabulary[int(token['id'])]!r} at position {token['position']:.0f}: {share:.1%} of the variance")
    if args.plot:
        draw(tables, args.plot)


if __name__ == "__main__":
    run_command(main)

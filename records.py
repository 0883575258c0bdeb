"""Run records, local or in Weights & Biases, as tables: one row per run, one row per configuration. Needs no torch."""

import json
import textwrap
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
from safetensors import SafetensorError
from safetensors.numpy import load_file
from tqdm import tqdm

from config import DERIVED, KEYS, MIN_L0, SAE_TYPES, TOP_K_TYPES
from console import InputError, markdown_table, one_line, tell
from files import read_json, write_json

SWEPT = {"sae_type": "", "dict_size": "F", "top_k": "k", "l1_coeff": "λ"}  # with their symbols in legends
COLUMNS = ["nmse", "fvu", "l0", "dead_fraction", "ce_degradation", "recovery_from_zero"]  # of the printed table
CURVES = ("loss", "num_dead_features")  # of the figure of training
# A point of a plot is the mean over runs that differ in these keys only: the seed, and how a run is recorded.
NOT_IN_POINT = {*DERIVED, *(key.name for key in KEYS.values() if not key.in_point)}


class RunRecord(NamedTuple):
    name: str
    config: dict
    history: list[dict]  # one dict per logged step
    summary: dict  # the last value of each logged metric, overridden by the final metrics and histograms
    state: str  # "finished", "unfinished", why it is neither, or another state of W&B


def run_configs(folder: Path) -> list[Path]:
    """The config.json of the runs in a sweep's folder. Others with that name, as of language models, are skipped.

    Raises InputError if that of a run is corrupt.
    """
    paths = sorted(folder.glob("*/config.json"))
    return [path for path in paths if may_be_run(path) and is_run(read_json(path))]


def may_be_run(config: Path) -> bool:
    return config.with_name("metrics.jsonl").exists() or '"sae_type":' in config.read_text("utf-8", "replace")


def is_run(config: dict) -> bool:
    """Whether this is the config of a run of this program: it has the keys that the table needs."""
    return config.keys() >= {*SWEPT, "seed", "sweep", "num_tokens"} and config["sae_type"] in tuple(SAE_TYPES)


def local_runs(folder: Path) -> list[RunRecord]:
    """The runs of a sweep's folder."""
    runs = []
    for path in run_configs(folder):
        files = [path.with_name(f"{name}.json") for name in ("config", "result", "histograms", "stopped")]
        config, result, histograms, stopped = map(read_json, files)
        missing = [key for key in COLUMNS if not isinstance(result.get(key), int | float)]
        if result and missing:
            raise InputError(f"{files[1]} is corrupt: no number for {', '.join(missing)}")
        history = read_history(path.with_name("metrics.jsonl"))
        summary = {key: value for line in [*history, result] for key, value in line.items()}
        imported = "imported_from" in config.pop("_provenance", {})
        state = "finished" if result else "imported, not trained here" if imported else "unfinished"
        if stopped and not result:
            state = f"stopped: step {stopped.get('step')}: {stopped.get('reason')}"
        runs.append(RunRecord(path.parent.name, config, history, summary | {"histograms": histograms}, state))
    return runs


def read_history(path: Path) -> list[dict]:
    """The complete lines of a metrics.jsonl (a killed run may leave half a line). Empty if there is no file."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else []
        lines = list(map(json.loads, lines))
    except ValueError as error:
        raise InputError(f"{path} is corrupt: {one_line(error)}") from error
    if not all(isinstance(line, dict) and "tokens" in line for line in lines):
        raise InputError(f"{path} is corrupt: a line is not that of a step")
    return lines


def wandb_runs(project: str, sweep: str | None) -> list[RunRecord]:
    """The runs of the group `sweep` in a W&B project (default: the newest sweep), newest first.

    Runs of other programs are skipped, and their number is printed.
    """
    import wandb

    if project.count("/") != 1:
        raise InputError(f"--wandb {project} is not of the form ENTITY/PROJECT")
    try:
        if not wandb.login(prompt=False):
            raise InputError("not logged in to Weights & Biases: run `wandb login`, or set WANDB_API_KEY")
        api, skipped = wandb.Api(), set()

        def runs_of(filters: dict) -> Iterator:
            for run in api.runs(project, filters, order="-created_at"):
                if is_run(run.config):
                    yield run
                else:
                    skipped.add(run.id)

        if sweep is None:
            sweep = next((run.config["sweep"] for run in runs_of({})), "")
        runs = list(map(from_wandb, runs_of({"group": sweep}))) if sweep else []
    except InputError:
        raise
    except (wandb.Error, ValueError) as error:  # no access, no such project or no network
        raise InputError(f"the W&B project {project} cannot be read: {one_line(error)}") from error
    if skipped:
        tell(f"Skipped runs of {project} that are not from a sweep of this program: {len(skipped)}")
    if not runs:
        raise InputError(f"the W&B project {project} has no runs of a sweep {sweep or ''}".rstrip())
    return runs


def from_wandb(run) -> RunRecord:
    """The record of a run of wandb.Api. Without "seconds" it is unfinished, even if W&B calls it finished."""
    summary, state = run.summary_metrics, run.state
    state = "finished" if "seconds" in summary else "unfinished" if state == "finished" else state
    history = run.scan_history(keys=["tokens", *CURVES], page_size=10_000)  # page_size counts all steps
    return RunRecord(run.name, run.config, list(history), summary, state)


def run_table(runs: list[RunRecord]) -> pd.DataFrame:
    """One row per run with state, config and metrics. The column `run` holds the RunRecord."""
    rows = []
    for run in runs:
        metrics = {k: v for k, v in run.summary.items() if isinstance(v, int | float) and not k.startswith("_")}
        config = {k: str(v) if isinstance(v, list) else v for k, v in run.config.items()}  # pandas cannot group lists
        rows.append({"tokens": 0} | metrics | config | {"name": run.name, "state": run.state, "run": run})
    table = pd.DataFrame(rows)
    first = ["name", "state", *SWEPT, "seed", *(key for key in COLUMNS if key in table)]
    return table[[*first, *sorted(set(table) - set(first))]].sort_values("name", ignore_index=True, kind="stable")


def point_keys(table: pd.DataFrame) -> list[str]:
    """The config keys on which the runs of a point agree."""
    return sorted({key for run in table["run"] for key in run.config} - NOT_IN_POINT)


def varied_keys(table: pd.DataFrame) -> list[str]:
    """The config keys in which points differ, without those that no type in the table uses."""
    unused = {key.name for key in KEYS.values() if not table["sae_type"].isin(key.types).any()}
    return [key for key in point_keys(table) if key not in unused and table[key].nunique(dropna=False) > 1]


def mixed_keys(table: pd.DataFrame) -> list[str]:
    """The varied_keys other than those that a sweep varies."""
    return [key for key in varied_keys(table) if key not in SWEPT]


def values_in_legend(point: pd.Series, keys: list[str]) -> str:
    """As in "k = 16, lr = 0.001", without a penalty of 0, in lines that fit a panel."""
    keys = [key for key in keys if key != "l1_coeff" or point[key] > 0]
    text = ", ".join(f"{SWEPT.get(key, key)} = {as_text(point[key])}".replace(" ", "\xa0") for key in keys)
    return textwrap.fill(text, 26, break_long_words=False, break_on_hyphens=False).replace("\xa0", " ")


def as_text(value) -> str:
    return "none" if pd.isna(value) else f"{value:g}" if isinstance(value, float) else str(value)


def over_seeds(table: pd.DataFrame) -> pd.DataFrame:
    """One row per point: mean and standard error (nmse_se, ...) of each metric over its runs (column `run`).

    `died` is True if the features of any of these runs died. A line joins points of one type and one `variant`, the
    values of mixed_keys and the penalty of a top-k type. `shade`, from 0 to 1, tells the variants of a type apart.
    """
    keys = point_keys(table)
    metrics = list(table.select_dtypes("number").columns.difference([*keys, *NOT_IN_POINT]))
    metrics = [key for key in metrics if not key.endswith("_se")]  # over documents, not seeds
    groups = table.groupby(keys, dropna=False)
    means = groups[metrics].mean().join(groups[metrics].sem().add_suffix("_se"))
    points = means.join(groups.agg(seeds=("run", "size"), run=("run", list))).reset_index().sort_values(list(SWEPT))
    mixed, by_k = mixed_keys(table), points["sae_type"].isin(TOP_K_TYPES)
    # The lines of the other types go along the penalty.
    of_top_k = mixed + ["l1_coeff"] * (points["l1_coeff"][by_k].nunique() > 1)
    points["variant"] = [values_in_legend(row, of_top_k if by_k[i] else mixed) for i, row in points.iterrows()]
    ranks = points.groupby("sae_type")["variant"].transform(lambda own: (pd.factorize(own)[0] + 1) / own.nunique())
    return points.assign(shade=ranks, died=points["run"].map(lambda runs: any(map(died, runs))).astype(bool))


def died(run: RunRecord) -> bool:
    """Whether almost no feature was active on the held-out tokens."""
    return run.summary.get("l0", MIN_L0) < MIN_L0


def mmcs_over_seeds(folder: Path, points: pd.DataFrame) -> pd.Series:
    """The mean of mmcs over all pairs of seeds of each point; NaN without two SAEs in the sweep's folder.

    The values of pairs are kept in mmcs.json, by the SHA-256 of the weights. Raises InputError for a corrupt SAE.
    """
    path = folder / "mmcs.json"
    try:
        known = read_json(path)
    except InputError:  # its values can be computed again
        known = {}
    found, means = {}, []
    for runs in tqdm(points["run"], desc="comparing seeds", leave=False, delay=2):
        saes = [folder / run.name / "sae" for run in runs]
        saes = [sae for sae in saes if "weights_sha256" in read_json(sae / "cfg.json")]  # older SAEs have no digest
        of_pairs = []
        for pair in combinations(saes, 2):
            key = " ".join(sorted(read_json(sae / "cfg.json")["weights_sha256"] for sae in pair))
            found[key] = known[key] if key in known else mmcs(*map(alive_decoder, pair))
            of_pairs.append(found[key])
        means.append(np.mean(of_pairs) if of_pairs else np.nan)
    if found != known:
        write_json(path, found)
    return pd.Series(means, points.index, dtype=float)


def alive_decoder(sae: Path) -> np.ndarray:
    """The decoder rows [n, d], of norm 1, of the features that were not dead when training ended."""
    try:
        tensors = load_file(sae / "sae_weights.safetensors")
        alive = tensors["num_batches_not_active"] < read_json(sae / "cfg.json")["n_batches_to_dead"]
        rows = tensors["W_dec"][alive].astype(np.float32)
    except (OSError, KeyError, SafetensorError) as error:
        raise InputError(f"{sae} is corrupt: {one_line(error)}") from error
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def mmcs(a: np.ndarray, b: np.ndarray) -> float:
    """Mean maximal cosine similarity of two dictionaries [m, d] and [n, d] with rows of norm 1: the mean over rows of
    the cosine with the most similar row of the other dictionary, averaged over both directions. NaN if one is empty.

    From Sharkey et al., Taking features out of superposition with sparse autoencoders (2022). Dead features are left
    out: their rows stay where they died, near a random direction.
    """
    if not (len(a) and len(b)):
        return np.nan
    best_of_b, best_of_a = np.full(len(b), -1, np.float32), []
    for rows in np.array_split(a, -(-len(a) // 1024)):  # limits the memory
        cosines = rows @ b.T
        best_of_a.append(cosines.max(1))
        best_of_b = np.maximum(best_of_b, cosines.max(0))
    return float(np.concatenate(best_of_a).mean() + best_of_b.mean()) / 2


def main_table(points: pd.DataFrame) -> str:
    """The main metrics, one row per configuration; mean ± standard error over several seeds. † marks dead runs."""
    mixed = mixed_keys(points.explode("run"))
    rows = points[[*SWEPT, *mixed, "seeds", *COLUMNS]].copy()
    rows[mixed] = rows[mixed].map(as_text)
    for metric in COLUMNS:
        form = "{:.1f}" if metric == "l0" else "{:.4f}"
        errors = points[f"{metric}_se"].map((" ± " + form).format).where(points["seeds"] > 1, "")
        rows[metric] = rows[metric].map(form.format) + errors
    rows["l0"] += points["died"].map({True: " †", False: ""})
    if "mmcs" in points:
        rows["mmcs"] = points["mmcs"].map("{:.3f}".format).where(points["mmcs"].notna(), "")
    by_k = rows["sae_type"].isin(TOP_K_TYPES)
    rows["top_k"] = rows["top_k"].astype(str).where(by_k, "")
    rows["l1_coeff"] = rows["l1_coeff"].map("{:g}".format).where(~by_k | (rows["l1_coeff"] > 0), "")
    rows["sae_type"] = rows["sae_type"].map(SAE_TYPES)
    return markdown_table([list(rows), *rows.values.tolist()], right=True)

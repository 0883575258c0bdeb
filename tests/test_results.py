"""results.py: tables and figures of records written by hand, and of the same runs in Weights & Biases."""

import csv
import hashlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import wandb
from helpers import REPO
from safetensors.numpy import save_file
from wandb_server import WandbServer, offline_run

import results
from config import SAE_TYPES, get_default_cfg, post_init_cfg
from console import InputError
from logs import RunLog
from records import mmcs

METRICS = ["nmse", "fvu", "l0", "dead_fraction", "ce_degradation", "recovery_from_zero"]
EDGES = [-4.0, -3.0, -2.0, -1.0, 0.0]
LRS = [1e-3, 2e-3, 1e-2]


@pytest.fixture
def run(program, tmp_path):
    """`python results.py ARGS` without an account, in the folder home."""
    (tmp_path / "home").mkdir()
    env = {key: value for key, value in program.env.items() if key != "WANDB_MODE"}
    return lambda *args, **changes: program.run(REPO / "results.py", *args, cwd=tmp_path / "home", env=env | changes)


# Records written by hand


def write_run(sweep: Path, result: dict | None, history: list[dict] = (), histograms: dict | None = None, **config):
    """Write a run's record; without a result it is unfinished."""
    config = {"sae_type": "batchtopk", "dict_size": 512, "top_k": 16, "l1_coeff": 0.0, "seed": 1, "lr": 1e-3} | config
    name = "_".join(f"{value}" for value in config.values())
    (sweep / name).mkdir(parents=True)
    config |= {"name": name, "sweep": sweep.name, "device": "cpu", "num_tokens": 4000, "_provenance": {"python": "3"}}
    (sweep / name / "config.json").write_text(json.dumps(config))
    (sweep / name / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in history))
    for file, content in (("histograms", histograms), ("result", result)):
        if content is not None:
            (sweep / name / f"{file}.json").write_text(json.dumps(content))
    return name


def losses(rng, num: int) -> list[dict]:
    """Lines of `num` steps, and one line with metrics of an evaluation and no loss."""
    lines = [
        {"step": 2 * i, "tokens": 1000 * i, "loss": rng.uniform(), "num_dead_features": int(rng.integers(99))}
        for i in range(1, num + 1)
    ]
    return [*lines[:1], {"step": 3, "tokens": 1500, "nmse": 0.5}, *lines[1:]]


@pytest.fixture
def by_hand(tmp_path):
    """Two SAE types with three k and three sizes, three seeds each; a JumpReLU with one seed; two unfinished runs."""
    rng, sweep, written = np.random.default_rng(0), tmp_path / "sweep", {}
    points = [(sae_type, 512, k) for sae_type in ("topk", "batchtopk") for k in (8, 16, 32)]
    points += [(sae_type, size, 16) for sae_type in ("topk", "batchtopk") for size in (256, 1024)]
    for point in [*points, ("jumprelu", 512, 0.01)]:
        by_k, written[point] = point[0] != "jumprelu", []
        sparsity = {"top_k": point[2]} if by_k else {"l1_coeff": point[2]}
        for seed in range(3 if by_k else 1):
            result = dict(zip(METRICS, rng.uniform(0.1, 0.9, len(METRICS))))
            result["l0"] = (point[2] if by_k else 20) + rng.uniform(-1, 1)
            result |= {f"{metric}_se": 9.0 for metric in METRICS}  # over documents, not over seeds
            l0 = [0] * point[2] + [40] if point[0] == "topk" else rng.integers(1, 9, size=20 + seed).tolist()
            density = rng.multinomial(point[1] - 7, [0.25] * 4).tolist()
            histograms = {"l0": l0, "log10_density": density, "log10_density_edges": EDGES, "never_active": 7}
            record = dict(result=result, history=losses(rng, 5 if seed == 2 else 4), histograms=histograms)
            written[point].append(record)
            write_run(sweep, sae_type=point[0], dict_size=point[1], seed=seed, **sparsity, **record)
    unfinished = [
        write_run(sweep, None, losses(rng, 2), sae_type="vanilla", l1_coeff=0.5),
        write_run(sweep, None, losses(rng, 3), seed=7),
    ]
    return sweep, written, unfinished


def finished_points(sweep: Path) -> pd.DataFrame:
    table = results.run_table(results.local_runs(sweep))
    return results.over_seeds(table[table["state"] == "finished"])


def mean_and_error(values: list) -> tuple:
    values = np.array(values, dtype=float)
    error = values.std(0, ddof=1) / np.sqrt(len(values)) if len(values) > 1 else np.full_like(values[0], np.nan)
    return values.mean(0), error


def of_metric(records: list[dict], metric: str) -> tuple:
    return mean_and_error([record["result"][metric] for record in records])


def point_of(row) -> tuple:
    return row["sae_type"], row["dict_size"], row["l1_coeff"] if row["sae_type"] == "jumprelu" else row["top_k"]


@pytest.mark.fast
def test_mean_and_standard_error_over_seeds(by_hand):
    """Mean and standard error of each metric over the seeds of a configuration equal those from numpy."""
    sweep, written, unfinished = by_hand
    table = results.run_table(results.local_runs(sweep))
    assert sorted(table["name"][table["state"] != "finished"]) == sorted(unfinished)
    points = finished_points(sweep)
    assert {point_of(row) for _, row in points.iterrows()} == written.keys() and len(points) == len(written)
    for _, row in points.iterrows():
        assert row["seeds"] == len(written[point_of(row)])
        for metric in METRICS:
            wanted = of_metric(written[point_of(row)], metric)
            np.testing.assert_allclose([row[metric], row[f"{metric}_se"]], wanted, rtol=1e-12)


def column(out: str, name: str) -> list[str]:
    """The cells of a column of the printed table."""
    head, _, *rows = [[cell.strip() for cell in line.split("|")] for line in out.splitlines() if line.startswith("|")]
    return [row[head.index(name)] for row in rows]


def labels(figure: plt.Figure) -> list[str]:
    return [text.get_text() for legend in figure.findobj(plt.matplotlib.legend.Legend) for text in legend.texts]


@pytest.mark.fast
def test_runs_that_differ_in_more_than_the_seed_are_told_apart(tmp_path, capsys, monkeypatch):
    """Each learning rate is a point, with its value in the table and the legends, and a line of its own colour."""
    monkeypatch.setattr(plt.Figure, "savefig", lambda *_: None)
    _, counts = all_died(512)
    for lr in LRS:
        for k in (8, 16):
            result, histograms = dict.fromkeys(METRICS, lr / k) | {"l0": k + 100 * lr}, counts | {"l0": [0] * k + [9]}
            for seed in (1, 2):
                write_run(tmp_path / "sweep", result, histograms=histograms, top_k=k, lr=lr, seed=seed)
    points = finished_points(tmp_path / "sweep")
    assert len(points) == 6
    wanted = [f"BatchTopK, lr = {lr}" for lr in ("0.001", "0.002", "0.01")]
    for figure in (results.paper_figure(points), results.pareto_figure(points)):
        assert [label for label in labels(figure) if "BatchTopK" in label] == wanted
        for axis in figure.axes[-2:]:
            lines = [line for line in axis.lines if line.get_linestyle() == "-" and line.get_linewidth() < 4]
            np.testing.assert_allclose(
                [line.get_ydata(orig=False) for line in lines], [[lr / 8, lr / 16] for lr in LRS]
            )
            assert len({line.get_color() for line in lines}) == 3
        assert figure.get_tightbbox().width <= figure.get_figwidth() + 0.02
    assert labels(results.histograms_figure(points))[:6] == [f"{label}, k = {k}" for label in wanted for k in (8, 16)]
    results.draw_results(tmp_path / "sweep")
    out = capsys.readouterr().out
    assert column(out, "lr") == ["0.001", "0.002", "0.01"] * 2 and "The runs also differ" not in out
    plt.close("all")


def test_legends_of_runs_that_differ_in_many_keys(tmp_path):
    """They are within the figure and leave room for the panels. hook_point, which follows from others, is not named."""
    for i, site in enumerate(("resid_pre", "attn_out", "mlp_out")):
        result, histograms = (
            dict.fromkeys(METRICS, 0.1 + i) | {"l0": 16.0 + i},
            all_died(512)[1] | {"l0": [0] * 16 + [9]},
        )
        changes = dict(
            layer=i, site=site, lr=0.001 * (i + 1), eval_tokens=1000 + i, model_batch_size=8 + i, bandwidth=1 + i
        )
        write_run(tmp_path / "sweep", result, losses(np.random.default_rng(i), 4), histograms, **changes)
    points, table = finished_points(tmp_path / "sweep"), results.run_table(results.local_runs(tmp_path / "sweep"))
    draw = [results.paper_figure, results.pareto_figure, results.histograms_figure]
    for figure in [*(function(points) for function in draw), results.curves_figure(table)]:
        figure.canvas.draw()
        for legend in figure.findobj(plt.matplotlib.legend.Legend):
            box = legend.get_window_extent()
            assert min(box.x0, box.y0) > -3 and box.x1 < figure.bbox.width + 3 and box.y1 < figure.bbox.height + 3
            assert not any("hook_point" in text.get_text() or "bandwidth" in text.get_text() for text in legend.texts)
        assert all(axis.get_window_extent().height > 0.9 * figure.dpi for axis in figure.axes)
        plt.close(figure)


def test_penalties_of_topk_runs_are_told_apart(tmp_path):
    """Lines join different l1_coeff for vanilla only; legends leave out a penalty of 0."""
    for sae_type in ("topk", "vanilla"):
        for l1_coeff in (0.0, 0.5):
            for k in (8, 16):
                result, history = dict.fromkeys(METRICS, 0.5), losses(np.random.default_rng(0), 4)
                changes = dict(sae_type=sae_type, top_k=k if sae_type == "topk" else 16, l1_coeff=l1_coeff, seed=k)
                write_run(tmp_path / "sweep", result | {"l0": k + l1_coeff}, history, **changes)
    figure = results.paper_figure(finished_points(tmp_path / "sweep"))
    assert labels(figure) == ["TopK", "TopK, λ = 0.5", "Vanilla (L1)"]
    figure = results.curves_figure(results.run_table(results.local_runs(tmp_path / "sweep")))
    assert set(labels(figure)) == {"k = 8", "k = 16", "λ = 0.5, k = 8", "λ = 0.5, k = 16", "no penalty", "λ = 0.5"}
    plt.close("all")


@pytest.mark.fast
def test_axes_of_a_narrow_range_have_numbers(tmp_path):
    """L0 from 11.9 to 14.1, and losses from 0.4 to 0.9: at least two ticks have a number, and minor ticks have none."""
    for l0, loss in ((11.9, 0.4), (14.1, 0.9)):
        history = [{"step": i, "tokens": i, "loss": loss, "num_dead_features": 0} for i in (1, 2)]
        write_run(tmp_path / "sweep", dict.fromkeys(METRICS, 0.5) | {"l0": l0}, history, lr=l0)
    table = results.run_table(results.local_runs(tmp_path / "sweep"))
    points = results.over_seeds(table)
    drawn = [*results.paper_figure(points).axes[2:], *results.pareto_figure(points).axes]
    drawn = [axis.xaxis for axis in drawn] + [results.curves_figure(table).axes[0].yaxis]
    for axis in drawn:
        axis.figure.canvas.draw()
        low, high = axis.get_view_interval()
        numbered = [tick for tick in axis.get_major_ticks() if low <= tick.get_loc() <= high and tick.label1.get_text()]
        assert len(numbered) >= 2 and not any(tick.label1.get_text() for tick in axis.get_minor_ticks())
    plt.close("all")


@pytest.mark.fast
def test_metrics_of_a_wide_range_are_on_a_logarithmic_axis(tmp_path):
    """From a factor of 4, unless one is negative: CE degradation can be."""
    ranges = {"wide": (0.05, 0.2), "very wide": (1e-5, 3), "narrow": (0.06, 0.2), "negative": (-0.1, 2)}
    for name, values in ranges.items():
        for l0, value in zip((32.0, 8.0), values):
            write_run(tmp_path / name, dict.fromkeys(METRICS, value) | {"l0": l0, "dead_fraction": 0.5}, [], lr=l0)
        points = finished_points(tmp_path / name)
        for axis in [*results.paper_figure(points).axes, *results.pareto_figure(points).axes]:
            assert axis.get_yscale() == ("log" if "wide" in name else "linear"), (name, axis.get_ylabel())
            axis.figure.canvas.draw()
            low, high = axis.get_ylim()
            ticks = [tick for tick in axis.yaxis.get_major_ticks() if low <= tick.get_loc() <= high]
            assert 2 <= sum(bool(tick.label1.get_text()) for tick in ticks) <= 12, name
    plt.close("all")


def test_list_values_and_recorded_keys(tmp_path, capsys):
    """Different lists of token ids make different points; different DERIVED keys do not."""
    for exclude_tokens in (None, [0], [0, 5]):
        for seed in (1, 2):
            more = {"asked": {"seq_len": 1000}, "has_bos": False} if seed == 1 else {}
            more |= {"history": losses(np.random.default_rng(0), 2), "exclude_tokens": exclude_tokens}
            write_run(tmp_path / "sweep", dict.fromkeys(METRICS, 0.5), seed=seed, **more)
    assert finished_points(tmp_path / "sweep")["seeds"].tolist() == [2, 2, 2]
    results.draw_results(tmp_path / "sweep")
    assert sorted(column(capsys.readouterr().out, "exclude_tokens")) == ["[0, 5]", "[0]", "none"]
    table = results.run_table(results.local_runs(tmp_path / "sweep"))
    curves = labels(results.curves_figure(table[table["exclude_tokens"] != "[0, 5]"]))
    assert sorted(curves) == ["exclude_tokens = [0]", "exclude_tokens = none"]
    plt.close("all")


def test_a_config_counts_once(tmp_path, capsys):
    """A copy of a run's record is not another seed: it is skipped, with its name."""
    for device in ("cpu", "cuda"):
        write_run(tmp_path / "sweep", dict.fromkeys(METRICS, 0.5), seed=1, device_name=device, lr=1e-3)
    for path in (tmp_path / "sweep").glob("*/config.json"):
        config = json.loads(path.read_text())
        del config["device_name"]
        path.write_text(json.dumps(config))
    results.draw_results(tmp_path / "sweep")
    out = capsys.readouterr().out
    assert re.search(r"Skipped, .* same config: \S+cuda$", out, re.MULTILINE) and "±" not in out


@pytest.mark.fast
def test_figure_shows_the_numbers(by_hand):
    """NMSE and CE degradation against dictionary size at fixed k (top), and L0 at fixed dictionary size (bottom)."""
    sweep, written, _ = by_hand
    figure = results.paper_figure(finished_points(sweep))
    labels = {label: sae_type for sae_type, label in SAE_TYPES.items()}
    axes = np.array(figure.axes).reshape(2, 2)
    for column, metric in enumerate(["nmse", "ce_degradation"]):
        for row, fixed in enumerate([lambda p: p[0] != "jumprelu" and p[2] == 16, lambda p: p[1] == 512]):
            drawn = {}
            for container in axes[row, column].containers:
                x, y = container.lines[0].get_data()
                drawn[labels[container.get_label()]] = sorted(zip(x, y))
            wanted = {}
            for point in filter(fixed, written):
                x = point[1] if row == 0 else of_metric(written[point], "l0")[0]
                wanted.setdefault(point[0], []).append((x, of_metric(written[point], metric)[0]))
            assert drawn.keys() == wanted.keys()
            for sae_type, points in wanted.items():
                np.testing.assert_allclose(drawn[sae_type], sorted(points), rtol=1e-12)
    plt.close(figure)


def test_pareto_front():
    """A point is on the front if no other point is at least as good in both, by comparing all pairs."""
    rng = np.random.default_rng(0)
    points = pd.DataFrame(rng.integers(0, 30, size=(40, 2)), columns=["l0", "nmse"]).drop_duplicates().astype(float)
    points = points[points.sum(axis=1) > 25]
    rows = [tuple(row) for row in points.values]
    wanted = [p for p in rows if not any(q != p and q[0] <= p[0] and q[1] <= p[1] for q in rows)]
    assert 3 < len(wanted) < len(rows)
    assert [tuple(row) for row in results.front(points, "nmse").values] == sorted(wanted)


def test_pareto_figure_has_every_configuration(by_hand):
    """Points of all dictionary sizes are drawn, and the line of a type is its front."""
    sweep, written, _ = by_hand
    points = finished_points(sweep)
    figure = results.pareto_figure(points)
    for axis, metric in zip(figure.axes, ("nmse", "ce_degradation")):
        drawn = np.concatenate([dots.get_offsets() for dots in axis.collections if dots.get_label()[0] != "_"])
        wanted = [(of_metric(runs, "l0")[0], of_metric(runs, metric)[0]) for runs in written.values()]
        np.testing.assert_allclose(sorted(map(tuple, drawn)), sorted(wanted))
        own = results.front(points[points["sae_type"] == "topk"], metric)
        drawn = [line.get_xydata() for line in axis.lines if line.get_color() == results.STYLES["topk"][0].lower()]
        assert any(np.array_equal(line, own[["l0", metric]]) for line in drawn)
    assert "Pareto front (thin lines: per colour)" in labels(figure)
    plt.close(figure)


def test_curves_of_finished_and_unfinished_runs(by_hand):
    """A line is the mean over the seeds of a configuration, with dead features in %; unfinished runs end hollow."""
    sweep, written, _ = by_hand
    table = results.run_table(results.local_runs(sweep))
    figure = results.curves_figure(table)
    axes = np.array(figure.axes).reshape(2, -1)
    batchtopk = axes[:, 0]
    (index,) = [i for i, text in enumerate(batchtopk[0].get_legend().texts) if text.get_text() == "F = 512, k = 16"]
    handle = batchtopk[0].get_legend().get_lines()[index]
    for axis, metric, scale in zip(batchtopk, ("loss", "num_dead_features"), (1, 100 / 512)):
        lines = [[line[metric] for line in r["history"] if "loss" in line][:4] for r in written["batchtopk", 512, 16]]
        mean, error = mean_and_error(lines)  # at steps of all three seeds, without the unfinished run
        same = [line for line in axis.lines if np.array_equal(line.get_color(), handle.get_color())]
        (drawn,) = [line for line in same if line.get_marker() != "o"]
        np.testing.assert_allclose(drawn.get_xdata(), [0.001, 0.002, 0.003, 0.004])
        np.testing.assert_allclose(drawn.get_ydata(), scale * mean)
        bands = [band.get_datalim(axis.transData).get_points()[:, 1] for band in axis.collections]
        ends = (scale * (mean - error)).min(), (scale * (mean + error)).max()
        assert any(np.allclose(band, ends) for band in bands)
        (hollow,) = [line for line in axis.lines if line.get_marker() == "o" and len(line.get_xdata())]
        np.testing.assert_allclose(hollow.get_xdata(), [0.001, 0.002, 0.003])
        assert hollow.get_markerfacecolor() == "white"
    assert batchtopk[0].get_legend().texts[-1].get_text() == "not finished"
    assert [axis.get_legend().get_title().get_text() for axis in axes[0]] == [
        "BatchTopK", "TopK", "JumpReLU", "Vanilla (L1)",
    ]  # fmt: skip
    plt.close(figure)


def test_histograms_are_of_all_tokens_and_features(by_hand):
    """% of tokens by L0 and % of features by density, as means over seeds of different lengths; TopK at k."""
    sweep, written, _ = by_hand
    figure = results.histograms_figure(finished_points(sweep))
    left, right = figure.axes
    records = [record["histograms"] for record in written["batchtopk", 512, 8]]
    wanted = np.zeros((3, 22))
    for row, record in zip(wanted, records):
        row[: len(record["l0"])] = 100 * np.array(record["l0"]) / sum(record["l0"])
    drawn = {line.get_label(): line for line in left.lines}
    np.testing.assert_allclose(drawn["BatchTopK, k = 8"].get_ydata(), wanted.mean(0))
    np.testing.assert_allclose(drawn["BatchTopK, k = 8"].get_xdata(), range(22))
    topk = [line.get_xdata()[0] for line in left.lines if len(line.get_xdata()) == 2]
    assert topk == [8, 16, 32] and "TopK: L0 = k for 100 % of tokens" in drawn
    (label,) = [line.get_label() for line in right.lines if line.get_label().startswith("BatchTopK")]
    assert label.endswith(f"{7 / 512:.1%} never active")
    density = [record["histograms"]["log10_density"] for record in written["batchtopk", 512, 16]]
    np.testing.assert_allclose(right.lines[0].get_ydata(), 100 * np.mean(density, 0) / 512)
    assert right.lines[0].get_xdata().tolist() == [-3.5, -2.5, -1.5, -0.5]
    plt.close(figure)


def test_histograms_without_batchtopk(tmp_path):
    """Without a BatchTopK run there is only the density. Of several TopK runs, the range of shares is given."""
    result, counts = dict.fromkeys(METRICS, 8.0), all_died(512)[1]
    for k, at_k in ((8, 6), (16, 9)):
        l0 = {"l0": [10 - at_k, *[0] * (k - 1), at_k]}
        write_run(tmp_path / "sweep", result, histograms=counts | l0, sae_type="topk", top_k=k)
    (density,) = results.histograms_figure(finished_points(tmp_path / "sweep")).axes
    assert "density" in density.get_xlabel()
    write_run(tmp_path / "sweep", result, histograms=counts | {"l0": [0, 3, 7]})
    figure = results.histograms_figure(finished_points(tmp_path / "sweep"))
    assert "TopK: L0 = k for 60–90 % of tokens" in labels(figure)
    plt.close("all")


def test_figures_are_readable_in_a_paper(by_hand):
    """At most 6.8 inches wide, fonts of at least 7 points, and types distinguishable without colour."""
    sweep, _, _ = by_hand
    points, table = finished_points(sweep), results.run_table(results.local_runs(sweep))
    draw = [results.paper_figure, results.pareto_figure, results.histograms_figure]
    for figure in [*(function(points) for function in draw), results.curves_figure(table)]:
        figure.canvas.draw()
        assert 3.3 <= figure.get_figwidth() <= 6.8
        texts = [text for text in figure.findobj(plt.Text) if text.get_text()]
        assert len(texts) > 10 and min(text.get_fontsize() for text in texts) >= 7
        inside = figure.get_tightbbox()
        assert inside.x0 >= -0.02 and inside.x1 <= figure.get_figwidth() + 0.02, "nothing is cut off"
        plt.close(figure)
    colours, markers, lines = zip(*results.STYLES.values())
    assert all(len(set(way)) == len(results.STYLES) for way in (colours, markers, lines))


def all_died(dict_size: int) -> tuple[dict, dict]:
    """Result and histograms of an SAE without active features, as evaluation.py writes them."""
    result = dict.fromkeys(METRICS, 0.9) | {"l0": 0.0, "dead_fraction": 1.0}
    return result, {"l0": [2048], "log10_density": [0] * 4, "log10_density_edges": EDGES, "never_active": dict_size}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("sae_type, l0", [("batchtopk", 0.0), ("topk", 0.0), ("jumprelu", 0.0), ("topk", 0.002)])
def test_a_run_whose_features_all_died(by_hand, sae_type, l0, monkeypatch, capsys):
    """It does not change how others are drawn; it is marked in the table, named, and hollow in the figures."""
    monkeypatch.setitem(plt.rcParams, "savefig.dpi", 30)
    if sae_type != "batchtopk":  # a PDF takes as long again and is drawn alike
        save = plt.Figure.savefig
        monkeypatch.setattr(plt.Figure, "savefig", lambda figure, path: path.suffix == ".pdf" or save(figure, path))
    sweep, written, _ = by_hand
    result, histograms = all_died(512)
    if l0:  # almost all died
        result |= {"l0": l0, "dead_fraction": 0.99}
        histograms |= {"l0": [2044, 4], "log10_density": [1, 0, 0, 0], "never_active": 511}
    changes = dict(sae_type=sae_type, top_k=64, l1_coeff=9.0)
    died = write_run(sweep, result, losses(np.random.default_rng(0), 4), histograms, **changes)
    results.draw_results(sweep)
    out, err = capsys.readouterr()
    assert not err and len(list(sweep.glob("*.png"))) == 4
    marked = [line for line in out.splitlines() if "†" in line]
    assert len(marked) == 2 and re.search(r"\| +0\.0 † \|", marked[0]) and marked[1].endswith(f": {died}")
    assert all(line in (sweep / "results.md").read_text(encoding="utf-8") for line in marked)

    points = finished_points(sweep)
    figures = [results.paper_figure(points), results.pareto_figure(points)]
    for figure in figures:
        inside = figure.get_tightbbox()
        assert inside.x0 >= -0.02 and inside.x1 <= figure.get_figwidth() + 0.02, "nothing is cut off"
        assert "features of a run died" in [text.get_text() for text in figure.legends[0].texts]
    for axis in [*figures[0].axes[2:], *figures[1].axes]:
        hollow = [line.get_xydata() for line in axis.lines if line.get_markerfacecolor() == "white"]
        hollow = [xy.tolist() for xy in hollow if np.isfinite(xy).all() and len(xy)]
        assert hollow == [[[0, 0.9]]] and axis.get_xlim()[0] > 0.5
    front = results.front(points[points["l0"] > 1], "nmse")
    assert any(np.array_equal(line.get_xydata(), front[["l0", "nmse"]]) for line in figures[1].axes[0].lines)
    histograms = results.histograms_figure(points)
    histograms.canvas.draw()
    assert "TopK: L0 = k for 100 % of tokens" in [line.get_label() for line in histograms.axes[0].lines]
    assert not any("k = 64" in line.get_label() for line in histograms.axes[0].lines)
    plt.close("all")


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("sae_type", ["batchtopk", "topk", "jumprelu", "vanilla"])
@pytest.mark.parametrize("alive", [0, 1])
def test_figures_of_one_type(tmp_path, sae_type, alive):
    """All features died in all runs, or in one of two seeds: matplotlib does not warn."""
    rng, counts = np.random.default_rng(0), [0] * 20 + [9]
    for seed in range(2):
        result, histograms = all_died(512)
        if seed < alive:
            result |= {"l0": 20.0, "dead_fraction": 0.5}
            histograms |= {"l0": counts, "log10_density": [1, 2, 3, 4], "never_active": 502}
        write_run(tmp_path / "sweep", result, losses(rng, 4), histograms, sae_type=sae_type, top_k=20, seed=seed)
    points, table = finished_points(tmp_path / "sweep"), results.run_table(results.local_runs(tmp_path / "sweep"))
    for draw in (results.paper_figure, results.pareto_figure, results.histograms_figure):
        draw(points).canvas.draw()
    labels = {axis.get_xlabel() for axis in results.paper_figure(points).axes}
    assert labels == {"L0 (512 features)"}, "of one dictionary size there is no panel over it"
    results.curves_figure(table).canvas.draw()
    plt.close("all")
    assert "†" in results.main_table(points)


# Agreement between seeds


def write_sae(run_folder: Path, rows: np.ndarray, not_active: list[int]) -> None:
    """What results.py reads of a saved SAE; a feature is dead after 5 batches."""
    tensors = {"W_dec": rows, "num_batches_not_active": np.array(not_active)}
    (run_folder / "sae").mkdir()
    save_file(tensors, run_folder / "sae" / "sae_weights.safetensors")
    digest = hashlib.sha256((run_folder / "sae" / "sae_weights.safetensors").read_bytes()).hexdigest()
    (run_folder / "sae" / "cfg.json").write_text(json.dumps({"weights_sha256": digest, "n_batches_to_dead": 5}))


@pytest.mark.fast
def test_agreement_between_seeds(tmp_path, capsys):
    """The mean over pairs of seeds of the mean maximal cosine of alive features, from loops; kept in mmcs.json."""
    rng, sweep, dictionaries = np.random.default_rng(0), tmp_path / "sweep", []
    for seed, not_active in enumerate([[0, 4, 9, 0, 5, 1], [0, 0, 0, 0, 0, 0], [7, 0, 0, 7, 2, 0]]):
        rows = rng.normal(size=(6, 4)).astype(np.float32)
        write_sae(sweep / write_run(sweep, dict.fromkeys(METRICS, 0.5), seed=seed), rows, not_active)
        dictionaries.append([row for row, batches in zip(rows, not_active) if batches < 5])
    write_run(sweep, dict.fromkeys(METRICS, 0.5), top_k=8)  # one seed, and no SAE

    def best(row, others) -> float:
        return max(row @ other / np.linalg.norm(row) / np.linalg.norm(other) for other in others)

    pairs = [(a, b) for i, a in enumerate(dictionaries) for b in dictionaries[:i]]
    both = [np.mean([best(row, b) for row in a]) + np.mean([best(row, a) for row in b]) for a, b in pairs]
    points = finished_points(sweep)
    found = results.mmcs_over_seeds(sweep, points)
    np.testing.assert_allclose(found, [np.nan, np.mean(both) / 2], rtol=1e-5)
    results.draw_results(sweep)
    lines = [line for line in capsys.readouterr().out.splitlines() if "|" in line]
    assert [line.split("|")[-2].strip() for line in lines] == ["mmcs", "----:", "", f"{np.mean(both) / 2:.3f}"]

    (weights, *_) = sweep.glob("*_512_16_*/sae/*.safetensors")
    weights.write_bytes(b"cut off")
    pd.testing.assert_series_equal(results.mmcs_over_seeds(sweep, points), found)
    (sweep / "mmcs.json").write_text("")  # its values are computed again
    with pytest.raises(InputError, match=f"^{re.escape(str(weights.parent))} is corrupt: .*$"):
        results.mmcs_over_seeds(sweep, points)


def test_agreement_of_many_features():
    """More than one block of rows, and a dictionary without features."""
    a, b = (rows / np.linalg.norm(rows, axis=1)[:, None] for rows in np.random.default_rng(0).normal(size=(2, 2500, 3)))
    wanted = ((a @ b.T).max(1).mean() + (a @ b.T).max(0).mean()) / 2
    assert mmcs(a, b) == pytest.approx(wanted, rel=1e-6) and np.isnan(mmcs(a, b[:0]))
    assert mmcs(a, a[::-1]) == pytest.approx(1)


def test_unfinished_runs_are_named_and_skipped(by_hand, run):
    """`python results.py FOLDER` names unfinished runs and their tokens; the CSV has finished runs only."""
    sweep, written, unfinished = by_hand
    with open(sweep / unfinished[0] / "metrics.jsonl", "a") as file:
        file.write('{"step": 3, "tok')  # killed while it wrote
    done = run(sweep)
    assert done.returncode == 0, done.stderr
    for name, tokens in zip(unfinished, ("2,000", "3,000")):
        (line,) = [line for line in done.stdout.splitlines() if name in line]
        assert line.startswith("Not finished") and f"{tokens} of 4,000 tokens" in line
        assert line in (sweep / "results.md").read_text(encoding="utf-8")
    assert "Vanilla" not in done.stdout
    mean, error = of_metric(written["topk", 512, 8], "nmse")
    assert f"{mean:.4f} ± {error:.4f}" in done.stdout
    (jumprelu,) = [line for line in done.stdout.splitlines() if "JumpReLU" in line]
    assert "±" not in jumprelu, "one seed has no standard error"
    with open(sweep / "results.csv", newline="") as file:
        assert len(list(csv.DictReader(file))) == sum(map(len, written.values()))
    names = ("results", "results_pareto", "results_curves", "results_histograms")
    wanted = {f"{name}.{ending}" for name in names for ending in ("png", "pdf")} | {"results.csv", "results.md"}
    assert {path.name for path in sweep.iterdir() if path.is_file()} == wanted


def test_stopped_and_imported_runs_are_named(tmp_path, capsys):
    """A run that NaN stopped is listed with the step and the reason, an import (export.py) as such."""
    stopped, imported = (write_run(tmp_path / "sweep", None, seed=seed) for seed in (1, 2))
    reason = {"step": 2, "reason": "NaN or infinity in the loss"}
    (tmp_path / "sweep" / stopped / "stopped.json").write_text(json.dumps(reason))
    path = tmp_path / "sweep" / imported / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"_provenance": {"imported_from": "elsewhere"}}))
    results.draw_results(tmp_path / "sweep")
    lines = capsys.readouterr().out.splitlines()
    assert f"Not finished, so only in the curves (stopped: step 2: NaN or infinity in the loss): {stopped}" in lines
    assert f"Not in the figures (imported, not trained here): {imported}" in lines


def test_folder_argument(tmp_path, monkeypatch):
    """A sweep is found by its folder, by its name in runs/, and as the newest in a folder of sweeps."""
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.chdir(home)
    for i, name in enumerate(("older", "newer")):
        write_run(home / "runs" / name, dict.fromkeys(METRICS, 0.5))
        for path in (home / "runs" / name).glob("*/*.json"):
            os.utime(path, (1000 + i, 1000 + i))
    (home / "older" / "lm").mkdir(parents=True)
    (home / "older" / "lm" / "config.json").write_text("{}")  # a folder of the same name with a language model
    for path, found in [("older", "older"), ("runs/older", "older"), ("runs", "newer")]:
        assert results.sweep_folder(Path(path)) == Path("runs", found)


@pytest.mark.parametrize(
    "config", ['{"trainer": {}, "batchtopk_config": {"sae_type": "topk"}}', '["sae_type"]', "// no JSON"]
)
def test_other_folders_beside_runs(tmp_path, config):
    """An export in a sweep's folder is not a run."""
    name = write_run(tmp_path / "sweep", None, losses(np.random.default_rng(0), 2))
    (tmp_path / "sweep" / "export").mkdir()
    (tmp_path / "sweep" / "export" / "config.json").write_text(config)
    assert [run.name for run in results.local_runs(tmp_path / "sweep")] == [name]


def test_bad_input_is_one_line(tmp_path, run, capsys, monkeypatch):
    """No records, no folder, a corrupt record, no login, a wrong project name: one line, exit code 2.

    Called as functions, they raise InputError and leave the process running.
    """
    (tmp_path / "empty").mkdir()
    cut = write_run(tmp_path / "cut", dict.fromkeys(METRICS, 0.5))
    (tmp_path / "cut" / cut / "config.json").write_text('{"a"')
    name = write_run(tmp_path / "broken", {})
    (tmp_path / "broken" / name / "metrics.jsonl").write_text('{"step": 1,\n')
    other = write_run(tmp_path / "other", {})
    (tmp_path / "other" / other / "metrics.jsonl").write_text("5\n")
    damaged = write_run(tmp_path / "damaged", dict.fromkeys(METRICS, 0.5) | {"l0": None, "fvu": "0.5"})
    for folder, said in [
        ("empty", f"{tmp_path / 'empty'} has no run records"),
        ("cut", f"{cut}/config.json is corrupt"),
        ("missing", f"{tmp_path / 'missing'} has no run records"),
        ("broken", f"{name}/metrics.jsonl is corrupt"),
        ("other", f"{other}/metrics.jsonl is corrupt"),
        ("damaged", f"{damaged}/result.json is corrupt: no number for fvu, l0"),
    ]:
        with pytest.raises(InputError, match=f"^.*{re.escape(said)}.*$"):
            results.draw_results(results.sweep_folder(tmp_path / folder))
        assert capsys.readouterr() == ("", "")
    with pytest.raises(InputError, match="has no run records"):
        results.draw_results(tmp_path / "empty")
    monkeypatch.chdir(tmp_path)
    for name in ("demo-26070e", "paper"):
        write_run(tmp_path / "runs" / name, None)
    with pytest.raises(InputError, match="^demo has no run records; the sweeps in runs/ are demo-26070e, paper$"):
        results.sweep_folder(Path("demo"))
    commands = [
        (["demo", "--wandb", "me/project"], "wandb login"),
        (["demo", "--wandb", "project"], "ENTITY/PROJECT"),
        ([tmp_path / "broken"], "is corrupt"),
    ]
    for command, said in commands:
        done = run(*command)
        assert done.returncode == 2 and not done.stdout
        assert re.fullmatch(r"error: .*\n", done.stderr) and said in done.stderr
    assert not (tmp_path / "missing").exists() and not list(tmp_path.glob("*/results*"))


def test_closed_pipe_ends_the_command_quietly(by_hand):
    """`python results.py SWEEP | head -1` prints no traceback and exits with 128 + SIGPIPE."""
    sweep, _, _ = by_hand
    command = f"'{sys.executable}' results.py '{sweep}' | true; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], cwd=REPO, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (141, "")


def test_nothing_finished_yet(tmp_path, run):
    """Without finished runs there are curves and a note, but no table."""
    name = write_run(tmp_path / "sweep", None, losses(np.random.default_rng(0), 3))
    done = run(tmp_path / "sweep")
    assert done.returncode == 0, done.stderr
    assert name in done.stdout and "no finished run" in done.stdout
    assert {path.name for path in tmp_path.glob("sweep/results*")} == {"results_curves.png", "results_curves.pdf"}


def test_needs_no_torch():
    """Local records are read without torch and without wandb."""
    code = "import sys, results; assert not {'torch', 'wandb'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], cwd=REPO, check=True)


# The same runs in Weights & Biases


@pytest.fixture(scope="module")
def mirrored(tmp_path_factory):
    """A sweep's local records as logs.py writes them, and a W&B server with the content of its offline runs."""
    folder, rng = tmp_path_factory.mktemp("mirrored"), np.random.default_rng(0)
    cfgs = [dict(sae_type="topk", seed=1), dict(sae_type="topk", seed=2), dict(sae_type="vanilla", l1_coeff=0.5)]
    for changes in [*cfgs, dict(sae_type="batchtopk")]:
        cfg = get_default_cfg() | {"output_dir": str(folder / "runs"), "sweep": "mine", "wandb_mode": "offline"}
        cfg = post_init_cfg(cfg | {"device": "cpu", "dict_size": 64, "top_k": 4, "num_tokens": 4000} | changes)
        log = RunLog(cfg, {"python": "3"})
        log.start(0, 0)
        for line in losses(rng, 4 if changes["sae_type"] != "batchtopk" else 3):
            log.log(line["step"], line["tokens"], {k: v for k, v in line.items() if k not in ("step", "tokens")})
        if changes["sae_type"] == "batchtopk":
            log.wandb_run.finish(exit_code=0)  # interrupted, but finished for W&B
            continue
        result = dict(zip(METRICS, rng.uniform(0.1, 0.9, len(METRICS)))) | {"tokens": 4000, "steps": 4, "seconds": 1.5}
        counts = {"l0": rng.integers(1, 9, size=20).tolist(), "log10_density": [1, 2, 3, 4], "never_active": 54}
        log.finish(result | {"l0": 4.0, "histograms": counts | {"log10_density_edges": EDGES}})
    wandb.teardown()  # only then the files are complete
    runs = [offline_run(path) for path in folder.glob("runs/*/*/wandb/offline-run-*/*.wandb")]
    assert len(runs) == 4, "one W&B run per SAE"
    other = runs[0] | {"id": "other", "group": "other", "created": "2020-01-01T00:00:00Z"}
    # Newer runs of other programs, some in the same group. The published scripts have no sweep.
    published = {key: value for key, value in runs[0]["config"].items() if key not in ("sweep", "num_epochs")}
    bare = {"created": "2100-01-01T00:00:00Z", "group": None, "state": "crashed", "summary": {}, "history": []}
    others = [bare | {"config": published, "summary": runs[0]["summary"], "history": runs[0]["history"]}]
    others += [bare | {"config": {}}, bare | {"config": {"sweep": "mine", "lr": 1}, "group": "mine"}]
    others += [bare | {"config": {"sweep": "mine", "sae_type": "gated"}, "group": "mine"}]
    others = [run | {"id": f"foreign{i}", "name": f"foreign{i}"} for i, run in enumerate(others)]
    server = WandbServer([*runs, other, *others], "me", "project")
    yield folder / "runs" / "mine", server
    server.close()


def logged_in(server) -> dict:
    return {"WANDB_BASE_URL": server.url, "WANDB_API_KEY": "0" * 40}


def test_wandb_and_local_records_are_the_same_table_and_plots(mirrored, run, tmp_path):
    """`results.py --wandb` writes the same table, numbers and pixels as local records."""
    local, server = mirrored
    assert run(local).returncode == 0
    done = run("mine", "--wandb", "me/project", **logged_in(server))
    assert done.returncode == 0, done.stderr
    assert "Skipped runs of me/project that are not from a sweep of this program: 2" in done.stderr.splitlines()
    folder = tmp_path / "home" / "runs" / "mine"
    tables = [pd.read_csv(path / "results.csv") for path in (local, folder)]
    pd.testing.assert_frame_equal(*tables, check_dtype=False)
    assert len(tables[0]) == 3 and (folder / "results.md").read_text(encoding="utf-8").count("Not finished") == 1
    assert (folder / "results.md").read_text(encoding="utf-8") == (local / "results.md").read_text(encoding="utf-8")
    names = sorted(path.name for path in local.glob("*.png"))
    assert names == sorted(path.name for path in folder.glob("*.png")) and len(names) == 4
    for name in names:
        assert np.array_equal(plt.imread(local / name), plt.imread(folder / name)), name


def test_wandb_newest_sweep_and_bad_input(mirrored, run):
    """Without a name the newest run's sweep is used; a missing project or sweep gives one line."""
    _, server = mirrored
    done = run("--wandb", "me/project", **logged_in(server))
    assert done.returncode == 0 and "runs/mine/results.csv" in done.stdout, done.stderr
    assert "Skipped runs of me/project that are not from a sweep of this program: 4" in done.stderr.splitlines()
    for args, said in [
        (("mine", "--wandb", "me/missing"), "me/missing"),
        (("missing", "--wandb", "me/project"), "no runs of a sweep missing"),
    ]:
        done = run(*args, **logged_in(server))
        assert done.returncode == 2 and done.stderr.splitlines()[-1].startswith("error: ") and said in done.stderr
        assert "Traceback" not in done.stderr


def test_wandb_with_crashed_or_only_foreign_runs(mirrored, run):
    """A run that crashed before logging is unfinished; a project without runs of a sweep gives one line."""
    _, server = mirrored
    mine = next(run for run in server.runs.values() if run["config"].get("sweep") == "mine")
    crashed = mine | {"id": "crashed", "name": "crashed", "summary": {}, "history": [], "state": "crashed"}
    foreign = [other for name, other in server.runs.items() if name.startswith("foreign")]
    for runs in ([crashed, *foreign], foreign):
        other_server = WandbServer(runs, "me", "project")
        done = run("--wandb", "me/project", **logged_in(other_server))
        other_server.close()
        assert "Traceback" not in done.stderr and done.returncode == (0 if crashed in runs else 2)
        if crashed in runs:
            assert "Not finished, so only in the curves (crashed): crashed (0 of" in done.stdout
        else:
            assert done.stderr.splitlines()[-1].endswith("has no runs of a sweep")

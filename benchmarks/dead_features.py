"""Dead features of TopK and BatchTopK SAEs on a language model, by the settings that may prevent them.

    python benchmarks/dead_features.py MODEL TEXT [KEY=VALUE ...] --layer N [--sets NAME ...] [--types TYPE ...]

MODEL is a model_name, TEXT a dataset_path. Each set of SETS is trained as a group, with the records of a sweep, in
DIR/<set>. Finished runs are not trained again, interrupted ones resume. Activations are harvested once, into DIR/cache.
Prints a Markdown table of all finished runs and draws DIR/dead_features.png.

A feature is dead if it was active on none of the last DEAD_TOKENS training tokens, whatever n_batches_to_dead is. The
time of a step is the lowest of STEPS training steps of the finished SAE, with its dead features. BatchTopK is measured
with the top k of the batch: in a short run its threshold, a running mean over training, lags behind.
"""

import argparse
from pathlib import Path

import pandas as pd
import torch
from common import markdown_table

from activation_store import ActivationsStore
from checkpoint import load_sae, run_folder
from config import SAE_TYPES, post_init_cfg
from console import run_command
from files import read_json, write_json
from language_model import check_hook_point, load_model
from logs import is_finished
from main import SWEEPS, parse_override
from plan import time_call
from results import STYLES, plt
from sae import SAE_CLASSES
from training import mean_and_std, train_sae_group
from training_step import make_optimizer, training_step

DEAD_TOKENS, STEPS = 102_400, 4
MEDIAN_TOKENS, MEDIAN_STEPS = 16_384, 20
HIGH, MEAN, PATIENT = dict(lr=1e-3), dict(b_dec_init="mean"), dict(n_batches_to_dead=50)
RECOMMENDED = HIGH | SWEEPS["recommended"][0]
# Not config keys, but set at the first step: the norm of the encoder's columns, b_dec as a share of the mean
# activation, and b_dec as the geometric median of activations.
OWN = ("encoder_norm", "share", "median")
SETS = {  # overrides of the published settings
    "published": {},
    "mean": MEAN,
    "50 batches": PATIENT,
    "schedule": dict(lr=2.67e-4, lr_warmup_steps=6, lr_decay_steps=13),  # 2e-4 / √(F / 2¹⁴), of 64 steps
    "recommended": SWEEPS["recommended"][0],
    "lr 1e-3": HIGH,
    "lr 1e-3, mean": HIGH | MEAN,
    "lr 1e-3, recommended": RECOMMENDED,
    "lr 1e-3, 50 batches, median": HIGH | PATIENT | dict(median=True),
    "lr 1e-3, recommended, aux 8 x": RECOMMENDED | dict(aux_penalty=1 / 4),
    "lr 1e-3, recommended, top_k_aux half d": RECOMMENDED | dict(top_k_aux=288),  # of d 576
    "lr 1e-3, recommended, warm-up": RECOMMENDED | dict(lr_warmup_steps=16),
    "lr 1e-3, recommended, decay": RECOMMENDED | dict(lr_decay_steps=13),
    "lr 1e-3, recommended, encoder norm 1": RECOMMENDED | dict(encoder_norm=1.0),
    "lr 1e-3, half the mean": HIGH | dict(share=0.5),
    "lr 1e-3, 3 quarters of the mean": HIGH | dict(share=0.75),
}
TYPES = ("topk", "batchtopk")
POINT = ["set", "dict_size", "top_k", "num_tokens", "sae_type"]
COLUMNS = {"dead": "{:.1%}", "nmse": "{:.4f}", "ce_degradation": "{:.4f}", "l0": "{:.1f}", "step_seconds": "{:.2f}"}


def configs(name: str, args, model) -> list[dict]:
    """The completed configs of a set: both types, each with every seed."""
    cfg = dict(
        model_name=args.model, dataset_path=args.text, layer=args.layer, model_dtype="bfloat16",
        activation_dtype="bfloat16", model_batch_size=64, num_batches_in_buffer=16, eval_tokens=8192,
        num_tokens=2**18, perf_log_freq=10**9, log_freq=8, activation_cache=str(args.runs / "cache"),
        output_dir=str(args.runs), sweep=name, wandb_mode="disabled",
    )  # fmt: skip
    cfg["act_size"] = check_hook_point(model, post_init_cfg(cfg | {"act_size": None}))
    cfg |= {"dict_size": 16 * cfg["act_size"]} | SETS[name] | dict(map(parse_override, args.overrides))
    cfg = {key: value for key, value in cfg.items() if key not in OWN}
    return [post_init_cfg(cfg | {"sae_type": kind, "seed": seed}) for seed in args.seeds for kind in args.types]


def new_sae(name: str, cfg: dict, store: ActivationsStore):
    sae = SAE_CLASSES[cfg["sae_type"]](cfg)
    if share := SETS[name].get("share"):
        sae.b_dec.data.copy_(share * mean_and_std(sae, store.peek())[0])
    if SETS[name].get("median"):
        sae.b_dec.data.copy_(geometric_median(sae.preprocess_input(store.peek()[:MEDIAN_TOKENS])[0]))
    if norm := SETS[name].get("encoder_norm"):
        sae.W_enc.data.copy_(norm * sae.W_dec.data.T)
    return sae


def geometric_median(x: torch.Tensor) -> torch.Tensor:
    """The point [d] with the lowest sum of distances to the rows of x [n, d], by Weiszfeld's iteration."""
    median = x.mean(0)
    for _ in range(MEDIAN_STEPS):
        weights = 1 / (x - median).norm(dim=1).clamp(min=1e-6)
        median = weights @ x / weights.sum()
    return median


def step_seconds(sae, x) -> float:
    """The lowest time of a training step, with the SAE's counters as they are: it changes the SAE."""
    sae.train()
    optimizer = make_optimizer(sae, sae.cfg)
    return min(time_call(lambda: training_step(sae, optimizer, x, sae.cfg), sae.cfg["device"]) for _ in range(STEPS))


def row(folder: Path) -> dict | None:
    """The numbers of a finished and timed run."""
    cfg, result, more = (read_json(folder / f"{name}.json") for name in ("config", "result", "dead_features"))
    if not (result and more):
        return None
    result |= {key.removesuffix("_batch"): result[key] for key in result if key.endswith("_batch")}
    values = cfg | {"set": cfg["sweep"]} | result | more
    return {key: values[key] for key in (*POINT, *COLUMNS)}


def table(points: pd.DataFrame) -> str:
    """Markdown, a line per point, with the means over seeds; the sets in the order of SETS."""
    rows = []
    for point, runs in points.groupby(POINT, sort=False):
        means = (form.format(runs[key].mean()) for key, form in COLUMNS.items())
        rows.append([*point, len(runs), *means])
    return markdown_table([[*POINT, "seeds", *COLUMNS], *rows])


def draw(points: pd.DataFrame, path: Path) -> None:
    """Dead features, NMSE and the time of a step of each set, at the dictionary size, k and length of most runs."""
    here = ["dict_size", "top_k", "num_tokens"]
    most = points[here].value_counts().index[0]
    points = points[(points[here] == list(most)).all(axis=1)]
    sets = [name for name in SETS if name in set(points["set"])][::-1]
    figure, axes = plt.subplots(1, 3, figsize=(6.8, 0.9 + 0.25 * len(sets)), sharey=True, layout="constrained")
    for axis, key, label in zip(axes, ("dead", "nmse", "step_seconds"), ("Dead features (%)", "NMSE", "Step (s)")):
        for kind, runs in points.groupby("sae_type"):
            colour, marker, _ = STYLES[kind]
            means = runs.groupby("set")[key].mean() * (100 if key == "dead" else 1)
            style = dict(color=colour, label=SAE_TYPES[kind], clip_on=False)
            axis.plot(means, [sets.index(of) for of in means.index], marker, **style)
        axis.set(xlabel=label, xlim=(0, None), yticks=range(len(sets)), yticklabels=sets)
    axes[0].legend()
    figure.suptitle("F = {}, k = {}, {:,} tokens".format(*most))
    figure.savefig(path)


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model"), parser.add_argument("text")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="for every run")
    parser.add_argument("--layer", type=int, required=True)
    parser.add_argument("--sets", nargs="*", default=list(SETS), choices=SETS)
    parser.add_argument("--types", nargs="*", default=TYPES, choices=TYPES)
    parser.add_argument("--seeds", nargs="*", type=int, default=[49])
    parser.add_argument("--runs", type=Path, default=Path("runs/dead_features"), help="folder of the records")
    args = parser.parse_intermixed_args(argv)
    model = load_model(post_init_cfg({"model_name": args.model, "model_dtype": "bfloat16"}))
    for name in args.sets:
        cfgs = configs(name, args, model)
        if not all(map(is_finished, cfgs)):
            todo = [cfg for cfg in cfgs if not is_finished(cfg)]
            store = ActivationsStore(model, todo[0])
            train_sae_group([new_sae(name, cfg, store) for cfg in todo], store, model, todo)
        for cfg in cfgs:
            path = run_folder(cfg) / "dead_features.json"
            if not path.exists():
                sae, store = load_sae(run_folder(cfg), cfg["device"]), ActivationsStore(model, cfg)
                dead = sae.num_batches_not_active >= DEAD_TOKENS // cfg["batch_size"]
                seconds = step_seconds(sae, store.next_batch())
                write_json(path, {"dead": dead.double().mean().item(), "step_seconds": seconds})
    rows = [row(path.parent) for path in args.runs.glob("*/*/config.json")]
    points = pd.DataFrame([values for values in rows if values])
    draw(points, args.runs / "dead_features.png")
    print(table(points.sort_values(POINT, key=lambda of: of.map(list(SETS).index) if of.name == "set" else of)))


if __name__ == "__main__":
    run_command(main)

"""Train the SAEs of a sweep and draw the comparison.

    python main.py [SWEEP] [KEY=VALUE ...] [--seeds N N N] [--list] [--force] [--resume-anyway]

A sweep is a base config and a list of overrides, one per run, applied to the defaults in config.py. Edit them here.
"""

import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # the imports take seconds; Ctrl-C ends them without a traceback

import argparse
import ast
import hashlib
import json
import os
import re
import time
from functools import partial
from pathlib import Path

import torch

import distributed
import features
from activation_store import ActivationsStore
from checkpoint import newest_checkpoint
from config import DERIVED, KEYS, post_init_cfg, values_of
from console import RANK, InputError, count_of, run_command, tell
from demo.text import write_demo_text
from files import read_json
from hub import stay_offline_without_network
from language_model import check_hook_point, complete_cfg, load_model
from logs import check_folders, has_ended, is_finished, remove_checkpoints, run_folder, why_stopped
from plan import duration, free_memory, plan_group, plan_time
from results import draw_results
from sae import SAE_CLASSES
from shards import team
from text_stream import files_fingerprint
from training import NotFinite, train_sae_group

# The 15 runs of arXiv 2412.06410: against L0 at 12288 features, and against dictionary size at k = 32.
PAPER = [dict(sae_type="jumprelu", l1_coeff=l1_coeff) for l1_coeff in (0.004, 0.0018, 0.0008)]
PAPER += [dict(sae_type=sae_type, top_k=k) for sae_type in ("topk", "batchtopk") for k in (16, 32, 64)]
PAPER += [dict(sae_type=sae_type, dict_size=768 * n) for sae_type in ("topk", "batchtopk") for n in (4, 8, 32)]

# The same comparison with vanilla and Matryoshka SAEs added, on the language model in demo/. It takes minutes on a
# laptop.
DEMO = [dict(sae_type="vanilla", l1_coeff=l1_coeff) for l1_coeff in (0.02, 0.01, 0.005)]
DEMO += [dict(sae_type="jumprelu", l1_coeff=l1_coeff) for l1_coeff in (0.01, 0.005, 0.0025)]
DEMO += [dict(sae_type=sae_type, top_k=k) for sae_type in ("topk", "batchtopk") for k in (8, 16, 32)]
DEMO += [dict(sae_type=sae_type, dict_size=size) for sae_type in ("topk", "batchtopk") for size in (256, 1024)]
DEMO += [dict(sae_type="matryoshka", top_k=k) for k in (16, 32)]
DEMO_FOLDER = Path(os.path.relpath(Path(__file__).parent / "demo"))
DEMO_BASE = dict(
    model_name=str(DEMO_FOLDER / "lm"), dataset_path=str(DEMO_FOLDER / "text.jsonl"), layer=2, act_size=128,
    dict_size=512, top_k=16, top_k_aux=64, bandwidth=0.03, lr=3e-3, batch_size=1024, num_tokens=700_000,
    model_batch_size=8, num_batches_in_buffer=256, n_batches_to_dead=20, eval_tokens=16_384, perf_log_freq=250,
)  # fmt: skip

# The paper's runs with fewer dead features (docs/dead_features.md).
RECOMMENDED = dict(b_dec_init="mean", n_batches_to_dead=50)

SWEEPS = {"paper": ({}, PAPER), "demo": (DEMO_BASE, DEMO), "recommended": (RECOMMENDED, PAPER)}


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "words", nargs="*", metavar="SWEEP or KEY=VALUE",
        help=f"one of {', '.join(SWEEPS)} (default: paper); config overrides for every run of the sweep",
    )  # fmt: skip
    parser.add_argument("--seeds", nargs="*", action="extend", metavar="N", help="train every run once per seed")
    parser.add_argument("--list", action="store_true", help="print the names of the sweep's runs and exit")
    parser.add_argument("--force", action="store_true", help="start even if this machine is estimated to be too small")
    parser.add_argument(
        "--resume-anyway", action="store_true", help="resume even if versions, data or threads have changed"
    )
    args = parser.parse_intermixed_args(argv)
    with distributed.process_group():
        sweep, overrides, seeds = parse_words(args.words, args.seeds)
        cfgs = sweep_configs(sweep, overrides, seeds)
        if args.list:
            if RANK == 0:
                print(*(cfg["name"] for cfg in cfgs), sep="\n")
            return
        distributed.check_device(cfgs[0]["device"])
        todo = distributed.from_rank_0(lambda: runs_to_train(cfgs))
        failed = train(todo, args.force, args.resume_anyway) if todo else []
    if RANK == 0:  # on one rank alone, since torchrun ends all ranks as soon as one exits with an error
        finish(sweep, cfgs, failed)


def runs_to_train(cfgs: list[dict]) -> list[dict]:
    """The runs that are left to train. Prints how many are finished and which were stopped. Raises InputError if their
    folders cannot be written or another process trains one of them.
    """
    if finished := sum(map(is_finished, cfgs)):
        tell(f"{finished} of {len(cfgs)} runs are finished already and are skipped")
        warn_of_changed_data(cfgs)
    for cfg in cfgs:
        if not is_finished(cfg) and (why := why_stopped(run_folder(cfg))):
            tell(f"{run_folder(cfg)} was stopped ({why}): to train it again, move the folder")
    todo = [cfg for cfg in cfgs if not has_ended(run_folder(cfg))]
    if todo:
        check_folders(todo)
    return todo


def finish(sweep: str, cfgs: list[dict], failed: list[str]) -> None:
    """Remove checkpoints that are no longer needed and draw the results. Raises InputError if NaN stopped an SAE."""
    folder = run_folder(cfgs[0]).parent
    remove_checkpoints(folder)
    draw_results(folder)
    stopped = sum(why_stopped(run_folder(cfg)) is not None for cfg in cfgs if not is_finished(cfg))
    if failed or stopped:
        raise InputError("; ".join(failed) or f"{stopped} of {len(cfgs)} runs were stopped (see above)")
    if sweep == "demo":
        write_demo_page(cfgs)


def warn_of_changed_data(cfgs: list[dict]) -> None:
    """Warn about each dataset_path whose local files differ from those recorded by finished runs."""
    trained_on = {}
    for cfg in filter(is_finished, cfgs):
        recorded = read_json(run_folder(cfg) / "config.json").get("_provenance", {}).get("data_files_sha256")
        trained_on.setdefault(cfg["dataset_path"], []).append(recorded)
    for path, digests in trained_on.items():
        now = files_fingerprint(path)
        if changed := sum(recorded is not None and now not in (None, recorded) for recorded in digests):
            tell(
                f"warning: dataset_path = {path!r} has changed since {changed} of these runs were trained on it. To "
                f"train them on the new data, move their folders or set another output_dir"
            )


def write_demo_page(cfgs: list[dict]) -> None:
    """Write features.html for one of the demo's SAEs, as an example of features.py, unless it exists."""
    shown = ("batchtopk", DEMO_BASE["top_k"])
    folder = next((run_folder(cfg) for cfg in cfgs if (cfg["sae_type"], cfg["top_k"]) == shown), None)
    if folder and not (folder / "features.html").exists():
        features.main([str(folder)])


def parse_words(words: list[str], after_seeds: list[str] | None) -> tuple[str, dict, list[int] | None]:
    """Sweep, overrides and seeds from the command line. Sweep and overrides may also follow --seeds.

    Raises InputError for words that are neither.
    """
    seeds = None
    if after_seeds is not None:  # in `--seeds=49 50`, argparse gives --seeds only the 49
        seeds = [word for word in after_seeds if "=" not in word and word not in SWEEPS]
        seeds += [word for word in words if word.isdecimal()]
        words = [word for word in (*words, *after_seeds) if word not in seeds]
        bad = next((seed for seed in seeds or [""] if not re.fullmatch(r"-?\d+", seed)), None)
        if bad is not None:
            raise InputError(f"--seeds {bad!r} is not allowed: it must be one or more integers, as in --seeds 49 50")
        seeds = list(map(int, seeds))
    # The sweep comes first, then any other words without "=", which are reported as bad overrides.
    words = sorted(words, key=lambda word: (word not in SWEEPS, "=" in word))
    sweep = words.pop(0) if words and "=" not in words[0] else "paper"
    return sweep, dict(map(parse_override, words)), seeds


def parse_override(text: str) -> tuple[str, object]:
    """KEY=VALUE from the command line. The value is a Python literal if possible, else a string."""
    key, equals, value = text.partition("=")
    if not equals:
        seeds = f" (for a seed, use --seeds {text})" if text.isdecimal() else ""
        raise InputError(f"{text!r} is not of the form KEY=VALUE{seeds}")
    if key in (*DERIVED, "sweep"):
        raise InputError(
            f"{key} cannot be set: it is derived from the sweep, other keys and the model (hook_point from site, layer)"
        )
    known = KEYS.get(key)
    if known and (isinstance(known.default, str) or (known.optional is str and value.lower() != "none")):
        return key, value
    try:
        return key, ast.literal_eval({"none": "None", "true": "True", "false": "False"}.get(value.lower(), value))
    except (ValueError, SyntaxError, TypeError):
        return key, value


def sweep_configs(sweep: str, overrides: dict, seeds: list[int] | None = None) -> list[dict]:
    """The completed configs of a sweep with overrides. Runs that become equal are merged, which is printed.

    A sweep has a separate folder for each set of overrides that affect results. Raises InputError for bad input.
    """
    if sweep not in SWEEPS:
        raise InputError(f"unknown sweep {sweep!r}: it must be one of {', '.join(SWEEPS)}")
    base, runs = SWEEPS[sweep]
    if not runs:
        raise InputError(f"sweep {sweep!r} has no runs")
    if seeds and "seed" in overrides:
        raise InputError(f"seed = {overrides['seed']} and --seeds are not allowed together")
    completed = post_init_cfg(base | runs[0] | overrides)  # 1e5 and 100000 are equal
    changes = {key: completed[key] for key in sorted(overrides) if KEYS[key].in_name}
    folder = f"{sweep}-{hashlib.sha256(json.dumps(changes).encode()).hexdigest()[:6]}" if changes else sweep
    if seeds:
        runs = [run | {"seed": seed} for run in runs for seed in seeds]
    cfgs = [post_init_cfg(base | run | overrides | {"sweep": folder}) for run in runs]
    merged = list({cfg["name"]: cfg for cfg in cfgs}.values())
    if len(merged) < len(cfgs):
        tell(f"Merged equal runs: with these overrides, {len(cfgs)} runs become {len(merged)}")
    return merged


def train(cfgs: list[dict], force: bool, resume_anyway: bool) -> list[str]:
    """Train runs that can share a stream as one group. Runs with a checkpoint are grouped by its step.

    Returns a line for each group in which NaN or infinity stopped an SAE.
    """
    distributed.from_rank_0(lambda: prepare_text(cfgs))
    groups = distributed.from_rank_0(lambda: group_runs(cfgs))
    models, planned, failed = {}, [], []
    for _, group in groups:  # load all models before measuring the free memory
        shards = team(group[0]["feature_shards"])
        shards.sum(torch.zeros(1, device=group[0]["device"]))  # NCCL allocates its memory now, before it is measured
        stay_offline_without_network(group[0]["model_name"], group[0]["dataset_path"])
        if model_key(group[0]) not in models:
            models[model_key(group[0])] = load_model(group[0])
    for steps_done, group in groups:  # plan all groups before training the first
        model = models[model_key(group[0])]
        width = check_hook_point(model, group[0])
        group = [complete_cfg(cfg | {"act_size": width}, model) for cfg in group]
        available = free_memory(group[0]["device"])
        parts = distributed.from_rank_0(partial(plan_group, group, model, steps_done, force, available))
        planned += [(part, model, steps_done, available) for part in parts]
    if len(planned) > 1:
        tell(f"{len(cfgs)} SAEs in {len(planned)} groups, each with a separate pass over the text")
    for plan in planned:
        try:
            train_planned(*plan, force, resume_anyway)
        except NotFinite as error:
            failed.append(str(error))
    return failed


def prepare_text(cfgs: list[dict]) -> None:
    """Write the demo's text if a run reads it."""
    if any(cfg["dataset_path"] == DEMO_BASE["dataset_path"] for cfg in cfgs):
        try:
            write_demo_text(Path(DEMO_BASE["dataset_path"]))
        except OSError as error:  # no source of the standard library, or a read-only folder
            raise InputError(f"the demo's text cannot be written: {error}") from error


def group_runs(cfgs: list[dict]) -> list[tuple[int, list[dict]]]:
    """Groups of runs that can share a stream, each with the number of steps that its checkpoint has done."""
    groups = {}
    for cfg in cfgs:
        key = newest_checkpoint(cfg), json.dumps(values_of(cfg, "in_group"))
        groups.setdefault(key, []).append(cfg)
    steps_done = [int(path.name.removeprefix("step_")) if path else 0 for path, _ in groups]
    return list(zip(steps_done, groups.values()))


def model_key(cfg: dict) -> tuple:
    return cfg["model_name"], cfg["model_dtype"], cfg["device"]


def train_planned(group: list[dict], model, steps_done: int, available: int, force: bool, resume_anyway: bool) -> None:
    """Train one group. A separate function, so that its SAEs and stream are freed before the next group."""
    store = ActivationsStore(model, group[0])
    shards = team(group[0]["feature_shards"])
    owners = plan_time(group, store, steps_done, force, available)  # the team of each SAE; this rank builds its own
    saes = [
        SAE_CLASSES[cfg["sae_type"]](cfg, shards) if owner == shards.team_index else None
        for cfg, owner in zip(group, owners)
    ]
    started = time.time()
    train_sae_group(saes, store, model, group, resume_anyway)
    tell(f"Trained and evaluated {count_of(len(group), 'SAE')} in {duration(time.time() - started)}")


if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM):  # treat SIGTERM as Ctrl-C, also before training
        signal.signal(number, signal.default_int_handler)
    run_command(main, "Run the same command again to resume")

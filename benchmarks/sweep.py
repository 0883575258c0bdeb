"""Time of the paper's sweep of 15 SAEs: as one group on a shared stream, as 15 single runs, and the published way.

    python benchmarks/sweep.py [--only demo|gpt2] [--dead-after N] [--warmup N] [--rounds N] [--json FILE]

Uses the demo's language model (d 128, dictionaries 512 to 4096, batches of 1024) and a random GPT-2 small (the paper's
sizes: d 768, dictionaries 3072 to 24576, batches of 4096), both on the demo's text. Warm-up steps come first, because
the number of active features changes at the beginning. Every round then times, per batch:

    harvest       a batch from the store, averaged over a buffer
    step          a training step of each SAE, averaged over a buffer
    bridge        as many tokens in the transformer_lens model up to the hook point, as in the published scripts
    dense step    the dense step of each SAE (dense_reference.py)

From these follow the seconds per batch of the whole sweep and its tokens/s, as medians over rounds:

    one group       harvest + Σ step           what `python main.py` does
    single runs     Σ (harvest + step)         the language model runs once per SAE
    published way   Σ (bridge + dense step)    the same, with the published model and step

No complete run is timed. Evaluation, logs and checkpoints are not included.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch
from common import ROOT, machine, markdown_table, median_and_range
from dense_reference import DenseReference
from harvest import gpt2_small_shaped
from tqdm import tqdm

from activation_store import ActivationsStore
from config import post_init_cfg
from demo.text import write_demo_text
from language_model import load_model, run_bridge_to_hook
from main import PAPER
from sae import SAE_CLASSES
from training_step import Run, group_step, make_optimizer


def sweep(base: dict) -> list[dict]:
    """The paper's runs, with the same ratios of dictionary size to activation width."""
    sizes = [run.get("dict_size", 12288) * base["act_size"] // 768 for run in PAPER]
    return [post_init_cfg(base | run | {"dict_size": size}) for run, size in zip(PAPER, sizes)]


def measure(cfgs: list[dict], warmup: int, rounds: int) -> dict:
    """Seconds of each part in each round, and the mean fraction of dead features."""
    cfg = cfgs[0]
    model = load_model(cfg)
    store = ActivationsStore(model, cfg)
    saes = [SAE_CLASSES[cfg["sae_type"]](cfg) for cfg in cfgs]
    runs = [Run(sae.cfg, sae, make_optimizer(sae, sae.cfg), log=None) for sae in saes]
    contexts = store.eval_contexts[: cfg["batch_size"] // store.seq_len].to(cfg["device"])
    num_batches = len(store.storage) // cfg["batch_size"]  # per buffer
    parts = {"harvest": [], "step": [], "bridge": [], "dense step": []}
    dead = []

    def steps(x) -> list[float]:
        """Train each SAE for a step. Returns the fraction of dead features of each."""
        outputs = []
        group_step(runs, x, outputs, {})
        return [output["num_dead_features"].item() / sae.cfg["dict_size"] for output, sae in zip(outputs, saes)]

    for _ in tqdm(range(-(-warmup // num_batches) * num_batches), desc=f"{cfg['model_name']}, warm-up", leave=False):
        steps(store.next_batch())
    dense = [DenseReference(sae) for sae in saes]
    for _ in tqdm(range(rounds), desc=cfg["model_name"], leave=False):
        harvest = step = 0.0
        for _ in range(num_batches):
            x, seconds = timed(store.next_batch)
            harvest += seconds / num_batches
            shares, seconds = timed(steps, x)
            step += seconds / num_batches
        _, bridge = timed(run_bridge_to_hook, model, contexts, cfg["hook_point"])
        _, dense_step = timed(lambda x: [reference.step(x) for reference in dense], x)
        dead.append(statistics.mean(shares))
        for name, value in zip(parts, (harvest, step, bridge, dense_step)):
            parts[name].append(value)
    return {"runs": len(cfgs), "batch_size": cfg["batch_size"], "parts": parts, "dead": statistics.mean(dead)}


def timed(function, *args) -> tuple:
    """The result of a function, and its seconds."""
    wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    wait()
    started = time.perf_counter()
    value = function(*args)
    wait()
    return value, time.perf_counter() - started


def seconds_per_batch(result: dict) -> dict:
    """For the whole sweep, a list over rounds for each way."""
    n, rounds = result["runs"], list(zip(*result["parts"].values()))
    return {
        "one group": [harvest + step for harvest, step, _, _ in rounds],
        "single runs": [n * harvest + step for harvest, step, _, _ in rounds],
        "published way": [n * bridge + dense_step for _, _, bridge, dense_step in rounds],
    }


def table(results: dict) -> str:
    ways = [["model", "way", "seconds per batch (min – max)", "tokens/s of the sweep", "published way ÷ this"]]
    parts = [["model", "batch", "harvest, s", "steps of all SAEs, s", "bridge, s", "dense steps, s", "dead features"]]
    for model, result in results.items():
        seconds = seconds_per_batch(result)
        for way, values in seconds.items():
            ratio = statistics.median(p / s for p, s in zip(seconds["published way"], values))
            rate = result["batch_size"] / statistics.median(values)
            ways.append([model, way, median_and_range(values, ".3g"), f"{rate:,.0f}", f"{ratio:.1f}"])
        medians = [f"{statistics.median(values):.3g}" for values in result["parts"].values()]
        parts.append([model, result["batch_size"], *medians, f"{result['dead']:.0%}"])
    return f"{markdown_table(ways)}\n\n{markdown_table(parts)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=("demo", "gpt2"), help="use only this model")
    parser.add_argument("--dead-after", type=int, default=5, metavar="N", help="n_batches_to_dead (default: 5)")
    parser.add_argument("--warmup", type=int, default=12, help="warm-up steps (default: 12)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=3, help="timed rounds (default: 3)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write all times to this file")
    args = parser.parse_args()
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        text = str(write_demo_text(Path(folder) / "text.jsonl"))
        shared = dict(dataset_path=text, device=args.device, eval_tokens=4096, num_tokens=700_000)
        shared |= dict(n_batches_to_dead=args.dead_after)
        if args.only != "gpt2":
            demo = dict(model_name=str(ROOT / "demo" / "lm"), layer=2, act_size=128, batch_size=1024, top_k_aux=64)
            demo |= dict(model_batch_size=8, num_batches_in_buffer=1)  # one batch per buffer
            results["demo"] = measure(sweep(shared | demo), args.warmup, args.rounds)
        if args.only != "demo":
            gpt2 = dict(model_name=str(gpt2_small_shaped(Path(folder) / "gpt2")), layer=8, act_size=768)
            gpt2 |= dict(batch_size=4096, num_batches_in_buffer=1)
            gpt2 |= dict(model_batch_size=32 if args.device == "cpu" else 512)
            results["GPT-2 small"] = measure(sweep(shared | gpt2), args.warmup, args.rounds)
    print(f"{machine(args.device)}, {args.rounds} rounds after {args.warmup} steps\n\n{table(results)}")
    if args.json:
        args.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()

"""The paper's sweep of 15 SAEs on one shared stream, against 15 single runs, and against the published way.

    python benchmarks/sweep.py [--only demo|gpt2] [--dead-after N] [--warmup N] [--rounds N] [--json FILE]

On the demo's language model (d 128, dictionaries 512 to 4096, batches of 1024) and on one of GPT-2 small's shape with
random weights (the paper's sizes: d 768, dictionaries 3072 to 24576, batches of 4096), on the demo's text. First some
steps of training alone: JumpReLU's first ten batches are dense in any case. Then in every round, one after the other: a
buffer of batches from the store, and a training step of each SAE on each of them (seconds a batch); contexts of as many
tokens as a batch has in transformer_lens' form of the
language model, up to the hook point, which is what the published scripts run; the dense step of each SAE
(dense_reference.py). Then

    one group       harvest + Σ step           what `python main.py` does
    single runs     Σ (harvest + step)         the language model runs once per SAE
    published way   Σ (bridge + dense step)    the same, with its form of the model and its step

are the seconds that a batch takes the whole sweep, and tokens/s that batch over them: medians over the rounds. No whole
run is timed; tokens/s are those of the steps after the warm-up. Evaluation, logs and checkpoints are in none of them.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from dense_reference import DenseReference  # noqa: E402
from harvest import gpt2_small_shaped  # noqa: E402
from machine import cpu_name  # noqa: E402
from tqdm import tqdm  # noqa: E402

from activation_store import ActivationsStore  # noqa: E402
from config import post_init_cfg  # noqa: E402
from demo.text import write_demo_text  # noqa: E402
from language_model import load_model, run_bridge_to_hook  # noqa: E402
from main import PAPER  # noqa: E402
from sae import SAE_CLASSES  # noqa: E402
from training import Run, group_step, make_optimizer  # noqa: E402

WAYS = ("one group", "single runs", "published way")


def sweep(base: dict) -> list[dict]:
    """The paper's runs, with dictionaries as many times as wide as the activations as there."""
    sizes = [run.get("dict_size", 12288) * base["act_size"] // 768 for run in PAPER]
    return [post_init_cfg(base | run | {"dict_size": size}) for run, size in zip(PAPER, sizes)]


def measure(cfgs: list[dict], warmup: int, rounds: int) -> dict:
    """Seconds of each part in each round."""
    cfg = cfgs[0]
    model = load_model(cfg)
    store = ActivationsStore(model, cfg)
    saes = [SAE_CLASSES[cfg["sae_type"]](cfg) for cfg in cfgs]
    runs = [Run(sae.cfg, sae, make_optimizer(sae, sae.cfg), log=None) for sae in saes]
    contexts = store.eval_contexts[: cfg["batch_size"] // store.seq_len].to(cfg["device"])
    num_batches = len(store.storage) // cfg["batch_size"]  # in a buffer
    parts = {"harvest": [], "step": [], "bridge": [], "dense step": []}
    dead = []

    def steps(x) -> list[float]:
        """A step of each SAE; the share of features that are dead in it."""
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
    """The function's value, and the seconds it took."""
    wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    wait()
    begun = time.perf_counter()
    value = function(*args)
    wait()
    return value, time.perf_counter() - begun


def seconds_of_a_batch(result: dict) -> dict:
    """For the whole sweep, in each way: a list over the rounds."""
    n, rounds = result["runs"], list(zip(*result["parts"].values()))
    return {
        "one group": [harvest + step for harvest, step, _, _ in rounds],
        "single runs": [n * harvest + step for harvest, step, _, _ in rounds],
        "published way": [n * bridge + dense_step for _, _, bridge, dense_step in rounds],
    }


def table(results: dict) -> str:
    lines = ["| model | way | seconds a batch (lowest – highest) | tokens/s of the sweep | published way ÷ this |"]
    lines += ["|---|---|---|---|---|"]
    for model, result in results.items():
        ways = seconds_of_a_batch(result)
        for way in WAYS:
            seconds = statistics.median(ways[way])
            ratio = statistics.median(p / s for p, s in zip(ways["published way"], ways[way]))
            spread = f"{seconds:.3g} ({min(ways[way]):.3g} – {max(ways[way]):.3g})"
            lines.append(f"| {model} | {way} | {spread} | {result['batch_size'] / seconds:,.0f} | {ratio:.1f} |")
    lines += ["", "| model | batch | harvest, s | steps of all SAEs, s | bridge, s | dense steps, s | dead features |"]
    lines += ["|---|---|---|---|---|---|---|"]
    for model, result in results.items():
        medians = " | ".join(f"{statistics.median(values):.3g}" for values in result["parts"].values())
        lines.append(f"| {model} | {result['batch_size']} | {medians} | {result['dead']:.0%} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=("demo", "gpt2"), help="one of the two models")
    parser.add_argument("--dead-after", type=int, default=5, metavar="N", help="n_batches_to_dead (default: 5)")
    parser.add_argument("--warmup", type=int, default=12, help="steps before them (default: 12)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=3, help="rounds that count (default: 3)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every time to this file too")
    args = parser.parse_args()
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        text = str(write_demo_text(Path(folder) / "text.jsonl"))
        shared = dict(dataset_path=text, device=args.device, eval_tokens=4096, num_tokens=700_000)
        shared |= dict(n_batches_to_dead=args.dead_after)
        if args.only != "gpt2":
            demo = dict(model_name=str(ROOT / "demo" / "lm"), layer=2, act_size=128, batch_size=1024, top_k_aux=64)
            demo |= dict(model_batch_size=8, num_batches_in_buffer=1)  # a buffer is a batch: each round harvests one
            results["demo"] = measure(sweep(shared | demo), args.warmup, args.rounds)
        if args.only != "demo":
            gpt2 = dict(model_name=str(gpt2_small_shaped(Path(folder) / "gpt2")), layer=8, act_size=768)
            gpt2 |= dict(batch_size=4096, num_batches_in_buffer=1)
            gpt2 |= dict(model_batch_size=32 if args.device == "cpu" else 512)
            results["GPT-2 small"] = measure(sweep(shared | gpt2), args.warmup, args.rounds)
    device = torch.cuda.get_device_name() if args.device.startswith("cuda") else cpu_name()
    print(f"{device}, {torch.get_num_threads()} threads, torch {torch.__version__}, ", end="")
    print(f"{args.rounds} rounds after {args.warmup} steps\n\n{table(results)}")
    if args.json:
        args.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()

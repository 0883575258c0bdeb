"""Tokens per second from text to batches of activations, compared with the language model alone.

    python benchmarks/harvest.py [--rounds N] [--model-dtype bfloat16] [--json FILE]

Uses the demo's language model at layer 2 and a random GPT-2 small at layer 8, on the demo's text, with contexts of 128
tokens. Every round times:

    tokenizing       text -> contexts
    bare forward     the upper limit: blocks of transformers below the hook point, fused attention, no hooks
    bridge           the transformer_lens model, stopped by a hook
    store            ActivationsStore.next_batch: text -> shuffled batches, for one buffer
    cache            the same from a filled activation_cache

Rates are medians over rounds (minimum to maximum); ratios are medians of the ratios of each round. Also reports the
fraction of row pairs in a batch that are from the same context, and the memory growth of the process over the rounds.
"""

import argparse
import json
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import psutil
import torch
import transformers
from common import ROOT, machine, markdown_table, median_and_range

from activation_store import ActivationsStore
from config import post_init_cfg
from demo.text import write_demo_text
from language_model import load_model, run_bridge_to_hook

RATES = ("tokenizing", "bare forward", "bridge", "store", "cache")


def gpt2_small_shaped(folder: Path) -> Path:
    """Write a GPT-2 small with random weights and the demo's tokenizer to `folder`."""
    shutil.copytree(ROOT / "demo" / "lm", folder, ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
    torch.manual_seed(0)
    transformers.GPT2LMHeadModel(transformers.GPT2Config()).save_pretrained(folder)
    return folder


def bare_blocks(cfg: dict, layer: int) -> torch.nn.Module:
    """The transformers model up to the hook point."""
    dtype = getattr(torch, cfg["model_dtype"])
    options = {"dtype": dtype, "attn_implementation": "sdpa", "trust_remote_code": False}
    model = transformers.AutoModel.from_pretrained(cfg["model_name"], **options).eval()
    model.h, model.ln_f = model.h[:layer], torch.nn.Identity()
    return model


@torch.no_grad()
def measure(cfg: dict, rounds: int) -> dict:
    model = load_model(cfg)
    live = ActivationsStore(model, cfg | {"activation_cache": None})
    cached = ActivationsStore(model, cfg)
    bare = bare_blocks(cfg, cfg["layer"])
    rows, per_buffer = len(live.storage), len(live.storage) // cfg["batch_size"]
    contexts = live.get_batch_tokens()
    expected = live.get_activations(contexts)
    tolerance = 1e-3 if cfg["model_dtype"] == "float32" else 0.1
    torch.testing.assert_close(bare(contexts).last_hidden_state.float(), expected, rtol=tolerance, atol=tolerance)

    def forward(function) -> int:
        for _ in range(cfg["num_batches_in_buffer"]):
            function(contexts)
        return cfg["num_batches_in_buffer"] * contexts.numel()

    def buffer_of(store) -> int:
        for _ in range(per_buffer):
            store.next_batch()
        return rows

    def from_cache() -> int:
        cached.load_state_dict(start)
        return buffer_of(cached)

    def tokenize() -> int:
        chunks = live.stream.reader.token_chunks(live.stream.reader.beginning, num_epochs=1)
        return sum(len(next(chunks)[1]) for _ in range(2))

    start = cached.state_dict()
    buffer_of(cached)  # fills the cache
    tasks = dict(zip(RATES, (
        tokenize, lambda: forward(bare), lambda: forward(lambda c: run_bridge_to_hook(model, c, cfg["hook_point"])),
        lambda: buffer_of(live), from_cache,
    )))  # fmt: skip
    rates, memory = {name: [] for name in RATES}, []
    for i in range(rounds + 1):  # the first is a warm-up
        for name, task in tasks.items():
            started = time.perf_counter()
            tokens = task()
            if i > 0:
                rates[name].append(tokens / (time.perf_counter() - started))
        memory.append(psutil.Process().memory_info().rss)

    context_of = live.order // live.seq_len  # of each row, in output order
    same = [same_context_fraction(batch) for batch in context_of.split(cfg["batch_size"])]
    return {
        "rates": rates,
        "same_context": statistics.mean(same),
        "same_context_unshuffled": (live.seq_len - 1) / (cfg["batch_size"] - 1),
        "buffer_bytes": live.storage.nbytes,
        "memory_growth_bytes": memory[-1] - memory[1],
    }


def same_context_fraction(contexts: torch.Tensor) -> float:
    """The fraction of pairs of different rows that have the same context."""
    counts = torch.bincount(contexts - contexts.min()).double()
    return ((counts * (counts - 1)).sum() / (len(contexts) * (len(contexts) - 1))).item()


def table(results: dict) -> str:
    rates_of = [["model", "stage", "tokens/s (min – max)", "ratio to bare forward"]]
    buffers = [["model", "pairs from one context in a batch", "unshuffled", "buffer", "memory growth"]]
    for model, result in results.items():
        for name, rates in result["rates"].items():
            ratios = [rate / bare for rate, bare in zip(rates, result["rates"]["bare forward"])]
            rates_of.append([model, name, median_and_range(rates, ",.0f"), median_and_range(ratios, ".2f")])
        buffers.append([model, f"{result['same_context']:.2%}", f"{result['same_context_unshuffled']:.2%}"])
        buffers[-1] += [f"{result[key] / 2**20:.0f} MiB" for key in ("buffer_bytes", "memory_growth_bytes")]
    return f"{markdown_table(rates_of)}\n\n{markdown_table(buffers)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds (default: 5)")
    parser.add_argument("--model-dtype", default="float32", help="of the language models (default: float32)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write all rates to this file")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        text = str(write_demo_text(Path(folder) / "text.jsonl"))
        shared = dict(
            dataset_path=text, device="cpu", act_size=None, eval_tokens=1024, num_tokens=700_000, num_epochs=9
        )
        shared |= {"activation_cache": str(Path(folder) / "cache"), "model_dtype": args.model_dtype}
        demo = dict(model_name=str(ROOT / "demo" / "lm"), layer=2, batch_size=1024, model_batch_size=64)
        gpt2 = dict(model_name=str(gpt2_small_shaped(Path(folder) / "gpt2")), layer=8, batch_size=512)
        cfgs = {
            "demo, layer 2": shared | demo | {"num_batches_in_buffer": 8},
            "GPT-2 small, layer 8": shared | gpt2 | {"model_batch_size": 16, "num_batches_in_buffer": 4},
        }
        results = {name: measure(post_init_cfg(cfg), args.rounds) for name, cfg in cfgs.items()}
    print(f"{machine()}, transformers {transformers.__version__}, {args.model_dtype}\n\n{table(results)}")
    if args.json:
        args.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()

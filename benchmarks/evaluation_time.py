"""Time to evaluate a group of SAEs, running only the layers after the hook point, or the whole language model.

    python benchmarks/evaluation_time.py [--gpt2] [--rounds N]

Uses the demo's model with 4 SAEs of 512 features on 16,384 held-out tokens, or a random GPT-2 small with 2 SAEs of
12288 features on 2,048 tokens. Every round runs heldout_baseline and evaluate, first unchanged, then with the whole
transformer_lens model for every SAE. The SAEs are untrained.
"""

import argparse
import time
from pathlib import Path
from tempfile import TemporaryDirectory

from common import ROOT, machine
from harvest import gpt2_small_shaped

from activation_store import ActivationsStore
from config import get_default_cfg, post_init_cfg
from demo.text import write_demo_text
from evaluation import evaluate, heldout_baseline
from language_model import load_model
from sae import SAE_CLASSES


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gpt2", action="store_true", help="a random GPT-2 small instead of the demo's model")
    parser.add_argument("--rounds", type=int, default=3, help="timed rounds (default: 3)")
    args = parser.parse_args()
    with TemporaryDirectory() as folder:
        measure(Path(folder), args)


def measure(folder: Path, args: argparse.Namespace) -> None:
    write_demo_text(folder / "text.jsonl")
    cfg = get_default_cfg() | dict(
        dataset_path=str(folder / "text.jsonl"), batch_size=1024, num_tokens=10_000, top_k=16, l1_coeff=0.01,
        model_batch_size=8, num_batches_in_buffer=1, device="cpu",
    )  # fmt: skip
    if args.gpt2:
        types = ("topk", "batchtopk")
        cfg |= dict(model_name=str(gpt2_small_shaped(folder / "lm")), eval_tokens=2048)
    else:
        types = ("topk", "batchtopk", "jumprelu", "vanilla")
        cfg |= dict(model_name=str(ROOT / "demo/lm"), layer=2, act_size=128, dict_size=512, eval_tokens=16_384)
    cfgs = [post_init_cfg(cfg | {"sae_type": sae_type}) for sae_type in types]
    store = ActivationsStore(load_model(cfgs[0]), cfgs[0])
    saes = [SAE_CLASSES[cfg["sae_type"]](cfg) for cfg in cfgs]
    for sae in saes:
        if sae.cfg["sae_type"] == "batchtopk":
            sae.threshold.fill_(1.0)
            sae.threshold_num_batches.fill_(1)

    below, seconds = store.predict.below, {}
    for i in range(args.rounds + 1):  # the first is a warm-up
        for name, skipped in (("after the hook point", below), ("the whole model", [])):
            store.predict.below = skipped
            started = time.perf_counter()
            baseline = heldout_baseline(store)
            between = time.perf_counter()
            evaluate(saes, store, baseline)
            if i > 0:
                seconds.setdefault(name, []).append((between - started, time.perf_counter() - between))
    print(machine())
    for name, times in seconds.items():
        parts = (" – ".join(f"{value:.2f}" for value in (min(part), max(part))) for part in zip(*times))
        print("{}: baseline {} s, evaluate {} s".format(name, *parts))


if __name__ == "__main__":
    main()

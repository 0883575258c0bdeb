"""Time of a training step of this project, SAELens, dictionary_learning and sparsify.

    python -m venv peers && peers/bin/pip install sae-lens dictionary-learning eai-sparsify
    peers/bin/python benchmarks/peers.py [--types batchtopk topk] [--device cuda] [--rounds N] [--json FILE]

They need a separate venv, because sae-lens requires an older transformer_lens. Libraries that are not installed are
skipped and listed. This project's step runs with the same Python and torch if sae-lens is installed; otherwise use
--python. (With a CPU-only torch, `pip uninstall torchvision`, unless its version matches.)

Every trainer is a separate process that waits for a request to do one step; a round is one step of each in turn. All
get the same batches (sums of 20 random directions of varying frequency, plus noise), drawn outside the timed part. A
step is everything that the library's trainer does with a batch: forward, loss, backward, gradient clipping, decoder
norms, Adam, counters of dead features. No feature becomes dead, so there is no auxiliary loss. Settings are the
defaults, except:

    SAELens              SAETrainer.step; "sparse" is TopK with use_sparse_activations=True, which on a CPU needs
                         rescale_acts_by_decoder_norm=False
    dictionary_learning  TopKTrainer.update, BatchTopKTrainer.update; the threshold is estimated from the first step
                         on, as in a long run, instead of from the 1000th
    sparsify             the body of Trainer.fit, which takes no activations, around SparseCoder; Adam, not signum

On CUDA all use their fast options: autocast in SAELens, bfloat16 autocast in dictionary_learning (as in its training
loop), Triton kernels and TF32 in sparsify.

Times are medians over rounds (lower – upper quartile); ratios are per round. Peak RSS is that of the whole process;
"imports" is the peak RSS after the imports.
"""

import argparse
import importlib
import importlib.metadata
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

from common import ROOT, cpu_name, markdown_table, quartiles

OURS = "this project"
B, D, F, K = 4096, 768, 12288, 32  # the paper's sizes


def our_step(sae_type: str, device: str):
    from config import post_init_cfg
    from sae import SAE_CLASSES
    from training_step import Run, group_step, make_optimizer

    cfg = {"sae_type": sae_type, "batch_size": B, "act_size": D, "dict_size": F}
    cfg = post_init_cfg(cfg | {"top_k": K, "n_batches_to_dead": 10**9, "device": device})
    sae = SAE_CLASSES[sae_type](cfg).train()
    run = Run(cfg, sae, make_optimizer(sae, cfg), log=None)
    return lambda x: group_step([run], x, [], {})


def sae_lens_step(sae_type: str, device: str, **options):
    import sae_lens
    from sae_lens.config import SAETrainerConfig
    from sae_lens.training.sae_trainer import SAETrainer

    prefix = {"topk": "TopK", "batchtopk": "BatchTopK"}[sae_type]
    shape = dict(d_in=D, d_sae=F, k=K, device=device)
    cfg = getattr(sae_lens, f"{prefix}TrainingSAEConfig")(**shape, **options)
    sae = getattr(sae_lens, f"{prefix}TrainingSAE")(cfg)
    samples = dict(total_training_samples=10**6 * B, train_batch_size_samples=B, lr_end=3e-4)
    samples |= dict(device=device, autocast=device == "cuda")
    trainer = SAETrainer(SAETrainerConfig(**samples), sae, data_provider=None)

    def step(x):
        trainer.step(x)
        trainer.n_training_steps += 1

    return step


def dictionary_learning_step(sae_type: str, device: str):
    import torch
    from dictionary_learning import trainers

    Trainer = {"topk": trainers.TopKTrainer, "batchtopk": trainers.BatchTopKTrainer}[sae_type]
    shape = dict(activation_dim=D, dict_size=F, k=K, layer=0, lm_name="none", device=device)
    trainer = Trainer(steps=10**6, threshold_start_step=0, **shape)
    steps = iter(range(10**6))

    def step(x):
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            trainer.update(next(steps), x)

    return step


def sparsify_step(sae_type: str, device: str):
    import torch
    from sparsify import SparseCoder, SparseCoderConfig

    torch.backends.cuda.matmul.allow_tf32 = True
    sae = SparseCoder(D, SparseCoderConfig(num_latents=F, k=K), device, torch.float32)
    optimizer = torch.optim.Adam(sae.parameters(), lr=2e-4 / (F / 2**14) ** 0.5)
    tokens_since_fired = torch.zeros(F, dtype=torch.long, device=device)

    def step(x):
        sae.set_decoder_norm_to_unit_norm()
        out = sae(x)
        out.fvu.backward()
        sae.remove_gradient_parallel_to_decoder_directions()
        optimizer.step()
        optimizer.zero_grad()
        tokens_since_fired.add_(len(x))
        tokens_since_fired[out.latent_indices.flatten()] = 0

    return step


BOTH = ("batchtopk", "topk")
SPARSE = dict(use_sparse_activations=True, rescale_acts_by_decoder_norm=False)
TRAINERS = {  # name: (package, module to import, function that builds the step, SAE types)
    OURS: (None, "training", our_step, BOTH),
    "SAELens": ("sae-lens", "sae_lens", sae_lens_step, BOTH),
    "SAELens, sparse": ("sae-lens", "sae_lens", partial(sae_lens_step, **SPARSE), ("topk",)),
    "dictionary_learning": ("dictionary-learning", "dictionary_learning.trainers", dictionary_learning_step, BOTH),
    "sparsify": ("eai-sparsify", "sparsify", sparsify_step, ("topk",)),
}


def peak_rss() -> int:
    """Peak RSS of this process in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def serve(name: str, sae_type: str, device: str) -> None:
    """Child process: first prints a JSON line about itself, then does one step per line read and prints its seconds."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # keep the output of libraries out of the answers
    try:
        import torch

        if name != OURS:
            sys.path.remove(str(ROOT))  # this project's modules must not shadow the library's
        _, module, build, _ = TRAINERS[name]
        importlib.import_module(module)
        imports = peak_rss()
        torch.manual_seed(0)
        step = build(sae_type, device)
        directions = torch.randn(F, D, generator=torch.Generator().manual_seed(0)) / 40**0.5
        about = {"torch": torch.__version__, "threads": torch.get_num_threads(), "imports": imports}
        print(json.dumps(about), file=answers)
        for i, _ in enumerate(sys.stdin, start=1):
            generator = torch.Generator().manual_seed(i)
            which = (torch.rand(B, 20, generator=generator) ** 2 * F).long()
            strength = torch.empty(B, 20).exponential_(generator=generator)
            x = torch.nn.functional.embedding_bag(which, directions, mode="sum", per_sample_weights=strength)
            x = (x + 0.1 * torch.randn(x.shape, generator=generator)).to(device)
            wait = torch.cuda.synchronize if x.is_cuda else lambda: None
            wait()
            started = time.perf_counter()
            step(x)
            wait()
            print(json.dumps({"seconds": time.perf_counter() - started, "peak_rss": peak_rss()}), file=answers)
    except Exception as error:
        line = (str(error).strip() or "no message").splitlines()[0]
        print(json.dumps({"error": f"{type(error).__name__}: {line[:150]}"}), file=answers)


class Child:
    def __init__(self, name: str, sae_type: str, args: argparse.Namespace):
        python = args.python if name == OURS else sys.executable
        command = [python, __file__, *sys.argv[1:], "--serve", name, sae_type]
        environment = os.environ | ({"SPARSIFY_DISABLE_TRITON": "1"} if args.device == "cpu" else {})
        pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        self.process = subprocess.Popen(command, env=environment, **pipes)
        self.seconds = []

    def answer(self) -> dict:
        """The next JSON line of the child. Raises RuntimeError if the child failed."""
        line = self.process.stdout.readline()
        answer = json.loads(line) if line else {"error": f"exited with status {self.process.wait()}"}
        if "error" in answer:
            raise RuntimeError(answer["error"])
        return answer

    def step(self) -> float:
        self.process.stdin.write("step\n")
        self.process.stdin.flush()
        answer = self.answer()
        self.about["peak_rss"] = answer["peak_rss"]
        return answer["seconds"]


def measure(sae_type: str, names: list[str], args: argparse.Namespace) -> dict:
    """{name: the child's first line and the seconds of its timed steps}. Failing trainers are reported and skipped."""
    children = {}
    try:
        children |= {name: Child(name, sae_type, args) for name in names}
        for name in names:
            try:
                children[name].about = children[name].answer()
                for _ in range(args.warmup):
                    children[name].step()
            except (RuntimeError, OSError) as error:
                if name == OURS:
                    sys.exit(f"this project's step failed with {args.python}: {error}; --python selects another")
                print(f"skipped {name} ({sae_type}): {error}", file=sys.stderr)
                children.pop(name).process.kill()
        for _ in range(args.rounds):
            for child in children.values():
                child.seconds.append(child.step())
    finally:
        for child in children.values():
            child.process.stdin.close()
            child.process.wait()
    return {name: child.about | {"seconds": child.seconds} for name, child in children.items()}


def table(results: dict) -> str:
    rows = [["SAE", "trainer", "ms per step", "tokens/s", "ratio to this project", "peak RSS", "imports"]]
    for sae_type, trainers in results.items():
        for name, result in trainers.items():
            ratios = [a / b for a, b in zip(result["seconds"], trainers[OURS]["seconds"])]
            rows.append([sae_type, name, quartiles([1000 * s for s in result["seconds"]], ",.1f")])
            rows[-1] += [f"{B / statistics.median(result['seconds']):,.0f}", quartiles(ratios, ".2f")]
            rows[-1] += [f"{result[key] / 2**20:,.0f} MiB" for key in ("peak_rss", "imports")]
    return markdown_table(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--types", nargs="+", choices=BOTH, default=BOTH, help="SAE types (default: both)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="of the trainers (default: cpu)")
    parser.add_argument("--warmup", type=int, default=3, help="warm-up steps (default: 3)")
    parser.add_argument("--rounds", type=int, default=10, help="timed steps (default: 10)")
    parser.add_argument("--python", default=sys.executable, help="Python for this project's step (default: this one)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write all times to this file")
    parser.add_argument("--serve", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        return serve(*args.serve, args.device)
    if args.rounds < 2:
        parser.error(f"--rounds {args.rounds}: quartiles need at least 2")

    versions = {}
    for package in dict.fromkeys(package for package, *_ in TRAINERS.values() if package):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    if not any(versions.values()):
        sys.exit(f"{sys.executable} has none of {', '.join(versions)}; the docstring of {__file__} has instructions")

    results = {}
    for sae_type in args.types:
        present = [name for name, (package, *_) in TRAINERS.items() if name == OURS or versions[package]]
        results[sae_type] = measure(sae_type, [name for name in present if sae_type in TRAINERS[name][3]], args)
    children = [result for trainers in results.values() for result in trainers.values()]
    torches = ", ".join(sorted({f"torch {child['torch']} with {child['threads']} threads" for child in children}))
    if args.device == "cuda":
        import torch

        print(torch.cuda.get_device_name(), end=", ")
    print(f"{cpu_name()}, Python {platform.python_version()}, {torches}")
    print(", ".join(f"{package} {version or 'absent'}" for package, version in versions.items()))
    print(f"B {B}, d {D}, F {F}, k {K}, {args.rounds} rounds\n\n{table(results)}")
    if args.json:
        machine = {"cpu": cpu_name(), "python": platform.python_version(), "versions": versions}
        args.json.write_text(json.dumps(machine | {"results": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()

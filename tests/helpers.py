"""What several test files use. Fixtures are in conftest.py."""

import contextlib
import io
import json
import multiprocessing
import os
import pickle
import random
import shutil
import socket
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch

import console
import distributed
from activation_store import ActivationsStore
from checkpoint import load_sae
from config import get_default_cfg, post_init_cfg
from console import InputError
from language_model import load_model, run_bridge_to_hook
from logs import has_ended, run_folder
from sae import SAE_CLASSES
from shards import team
from training import train_sae_group
from training_step import make_optimizer, training_step

REPO = Path(__file__).resolve().parent.parent
DEMO_LM = REPO / "demo" / "lm"

# Streams of text and activations

BOS = 0
SEQ_LEN = 16


def stream_cfg(**changes) -> dict:
    """A small completed config on the demo's language model."""
    cfg = get_default_cfg() | dict(
        model_name=str(DEMO_LM), layer=2, act_size=128, dict_size=64, top_k=4, device="cpu", seq_len=SEQ_LEN,
        batch_size=40, num_tokens=400, model_batch_size=3, num_batches_in_buffer=2, eval_tokens=3 * SEQ_LEN,
    )  # fmt: skip
    return post_init_cfg(cfg | changes)


def reference_contexts(tokens: list[list[int]], seq_len: int, num_eval: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Held-out contexts and training contexts, which begin with the token after the last held-out one."""
    stream = [token for document in tokens for token in document]
    contexts = torch.tensor(stream[: len(stream) // seq_len * seq_len]).view(-1, seq_len)
    return contexts[:num_eval], contexts[num_eval:]


def all_contexts(store) -> torch.Tensor:
    """All remaining contexts of the store."""
    contexts = []
    while True:
        try:
            contexts.append(store.get_batch_tokens())
        except InputError:
            return torch.cat(contexts)


def sorted_rows(rows: torch.Tensor) -> np.ndarray:
    """Rows in lexicographic order, to compare them as multisets."""
    rows = rows.numpy()
    return rows[np.lexsort(rows.T[::-1])]


def counted_documents(num_eval: int, num_train: int) -> list[list[int]]:
    """A held-out document and training documents of exactly these lengths, with BOS; no other token repeats."""
    lengths, ids = [num_eval], iter(range(1, 4096))
    while num_train > 0:
        lengths.append(min(num_train, 7 + 3 * len(lengths)))
        num_train -= lengths[-1]
    return [[BOS] + [next(ids) for _ in range(length - 1)] for length in lengths]


def counted_batches(model, path, **changes) -> tuple[torch.Tensor, torch.Tensor]:
    """All ten batches [10, 40, d] of the counted data, and its activations in text order [400, d]."""
    store = ActivationsStore(model, stream_cfg(dataset_path=path, **changes))
    batches = torch.stack([store.next_batch() for _ in range(10)])
    contexts = torch.tensor([t for document in counted_documents(48, 400)[1:] for t in document]).view(-1, SEQ_LEN)
    size = store.cfg["model_batch_size"]
    return batches, torch.cat([store.get_activations(part) for part in contexts.split(size)]).flatten(0, 1)


def one_line(caught) -> str:
    message = str(caught.value)
    assert message and "\n" not in message
    return message


def store_error(model, **changes) -> str:
    with pytest.raises(InputError) as caught:
        store = ActivationsStore(model, stream_cfg(**changes))
        store.next_batch()
    return one_line(caught)


# SAEs

KINDS = tuple(SAE_CLASSES)


def sae_cfg(kind, d=5, F=24, k=3, **changes):
    """A completed config of a small SAE on the CPU, in float64 by default."""
    cfg = get_default_cfg() | {
        "sae_type": kind,
        "act_size": d,
        "dict_size": F,
        "top_k": k,
        "top_k_aux": 3,
        "aux_penalty": 0.5,
        "l1_coeff": 0.07,
        "bandwidth": 0.8,
        "n_batches_to_dead": 4,
        "dtype": "float64",
        "device": "cpu",
    }
    return post_init_cfg(cfg | changes)


def make_sae(kind, seed=0, **changes):
    """An SAE with nothing left at its initial value: biases, thresholds, untied decoder, counters."""
    sae = SAE_CLASSES[kind](sae_cfg(kind, **changes))
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=g, dtype=torch.float64) * 0.5)
        sae.W_dec /= sae.W_dec.norm(dim=-1, keepdim=True)
        sae.num_batches_not_active.copy_(torch.randint(0, 8, sae.b_enc.shape, generator=g))
    return sae


def positive_encoder(kind, F=24, **changes):
    """Every pre-activation has the sign of the inputs: b_dec 0, W_enc positive, no normalisation."""
    sae = SAE_CLASSES[kind](sae_cfg(kind, F=F, input_unit_norm=False, **changes))
    with torch.no_grad():
        sae.W_enc.abs_().add_(0.01)
        sae.W_dec.copy_(sae.W_enc.T / sae.W_enc.T.norm(dim=-1, keepdim=True))
    return sae


def make_x(B, d, seed=0, dtype=torch.float64):
    """Activations with a mean and a scale of their own."""
    g = torch.Generator().manual_seed(1000 + seed)
    return (torch.randn(B, d, generator=g, dtype=torch.float64) * 2 + 0.7).to(dtype)


def params(sae, dtype=torch.float64):
    return {name: parameter.detach().clone().to(dtype) for name, parameter in sae.named_parameters()}


def set_threshold(sae, value):
    """As if training had estimated BatchTopK's inference threshold at `value`."""
    with torch.no_grad():
        sae.threshold.fill_(value)
        sae.threshold_num_batches.fill_(1)


def dense(tensor):
    return tensor.detach().to_dense()


def state(sae):
    return {name: tensor.clone() for name, tensor in sae.state_dict().items()}


def assert_same_state(one, other):
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name


def assert_outputs_match(output, expected, **tolerance):
    for key, value in expected.items():
        actual = dense(output[key])
        assert actual.shape == value.shape, key
        torch.testing.assert_close(actual.double(), value.double(), msg=lambda m, key=key: f"{key}: {m}", **tolerance)


# Input for the sparse form


def feature_major(W):
    return W.T.contiguous().T


def hard_input(kind, seed):
    """x [B, d] and W [d, F] in float32 of a random shape, with the difficulty `kind`."""
    g = torch.Generator().manual_seed(seed)
    B, d, F = (int(torch.randint(*span, (), generator=g)) for span in ((1, 40), (2, 90), (40, 400)))
    F = F // 64 * 64 + 64 if seed % 2 else F
    x, W = torch.randn(B, d, generator=g), torch.randn(d, F, generator=g) * 0.3
    if kind == "heavy tails":
        x = x / torch.rand(B, d, generator=g).clamp(min=1e-3)
    if kind == "scales":
        x = x * 10.0 ** torch.randint(-8, 8, (B, 1), generator=g)
    if kind == "zero rows":
        x[::2] = 0
    if kind == "negative rows":
        x, W = x.abs(), torch.where(torch.rand(F, generator=g) < 0.97, -W.abs(), W)
    if kind == "ties":
        x, W = x.sign(), W.sign()
    if kind == "packed":  # all values within the screen's error of one another
        W = W[:, :1] + 1e-4 * W
    return x, feature_major(W)


# Training and its records

BATCH, STEPS = 64, 12
SAES = [
    dict(sae_type="vanilla", l1_coeff=0.02),
    dict(sae_type="topk", top_k=4),
    dict(sae_type="batchtopk", top_k=4, n_batches_to_dead=2),
    dict(sae_type="batchtopk", top_k=6, dict_size=32, input_unit_norm=False, seed=3),
    dict(sae_type="jumprelu", l1_coeff=0.01, bandwidth=0.03, lr=1e-2),
    dict(sae_type="topk", top_k=2, dict_size=200, dtype="float64"),
]
OFTEN = dict(log_freq=2, perf_log_freq=4)


def completed_training_cfg(data: str, output_dir: Path, **changes) -> dict:
    """A small completed config of a few training steps; the fixture training_cfg calls it."""
    cfg = get_default_cfg() | dict(
        model_name=str(DEMO_LM), dataset_path=data, layer=1, act_size=128, dict_size=64, top_k_aux=8, lr=3e-3,
        device="cpu", seq_len=16, batch_size=BATCH, num_tokens=STEPS * BATCH, model_batch_size=4,
        num_batches_in_buffer=3, eval_tokens=96, n_batches_to_dead=4, output_dir=str(output_dir),
    )  # fmt: skip
    return post_init_cfg(cfg | changes)


def is_over(cfg: dict) -> bool:
    return has_ended(run_folder(cfg))


def train(model, cfgs: list[dict], store_class=ActivationsStore) -> tuple[list, list[dict]]:
    """Train a group from scratch; the SAEs and their final metrics."""
    saes = [SAE_CLASSES[cfg["sae_type"]](cfg) for cfg in cfgs]
    return saes, train_sae_group(saes, store_class(model, cfgs[0]), model, cfgs)


def stopping_store(stop_in: int, error):
    """A store whose batch number `stop_in` of this process is an error."""

    class Store(ActivationsStore):
        batches = 0

        def next_batch(self):
            self.batches += 1
            if self.batches == stop_in:
                raise error
            return super().next_batch()

    return Store


def same_bits(sae, other) -> bool:
    state, other = sae.state_dict(), other.state_dict()
    assert state.keys() == other.keys()
    return all(torch.equal(state[name], other[name]) for name in state)


def lines_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def figures(result: dict) -> dict:
    """A result without the time it took."""
    return {key: value for key, value in result.items() if key != "seconds"}


def assert_as_uninterrupted(uninterrupted, cfgs, saes, results):
    for sae, result, record, mine, my_result, cfg in zip(*uninterrupted, saes, results, cfgs):
        assert same_bits(sae, mine) and same_bits(sae, load_sae(run_folder(cfg)))
        assert figures(result) == figures(my_result)
        assert lines_of(run_folder(cfg)) == record


def corrupt(path: Path, how: str) -> None:
    file = path / {"manifest": "manifest.json", "state": "state.json"}.get(how, "00.safetensors")
    content = bytearray(file.read_bytes())
    if how == "missing":
        file.unlink()
        return
    if how == "cut":
        content = content[: len(content) // 2]
    else:
        content[len(content) // 2] ^= 4
    file.write_bytes(content)


# Ranks, each a fork of the test process, joined by gloo


def run_ranks(size: int, function, timeout: int = 120) -> list[tuple]:
    """function() on each of `size` ranks. For each: exit code of a command that calls it, its stderr, the result."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    env = dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=port, WORLD_SIZE=size, LOCAL_WORLD_SIZE=size)
    env |= dict(TORCHELASTIC_RUN_ID="test", GLOO_SOCKET_IFNAME="lo")
    fork = multiprocessing.get_context("fork")

    def rank_process(rank, pipe):
        os.environ.update({key: str(value) for key, value in (env | dict(RANK=rank, LOCAL_RANK=rank)).items()})
        console.RANK, console.another_rank_prints = rank, rank > 0
        result, code, stderr = None, 0, io.StringIO()

        def command(_):
            nonlocal result
            with distributed.process_group():
                # The store is in rank 0 here, not in torchrun: it must not end while another rank still connects.
                torch.distributed.all_reduce(torch.zeros(1))
                result = function()

        with contextlib.redirect_stderr(stderr):
            try:
                console.run_command(command)
            except SystemExit as ended:
                code = ended.code
            except BaseException as error:
                code = repr(error)
        pipe.send_bytes(pickle.dumps((code, stderr.getvalue(), result)))
        os._exit(0)

    ranks = []
    for rank in range(size):
        here, there = fork.Pipe(duplex=False)
        process = fork.Process(target=rank_process, args=(rank, there))
        process.start()
        there.close()
        ranks.append((process, here))
    ended = []
    for process, pipe in ranks:
        assert pipe.poll(timeout), "a rank hangs"
        try:
            ended.append(pickle.loads(pipe.recv_bytes()))
        except EOFError:
            process.join()
            ended.append((process.exitcode, "", None))
        process.kill()
        process.join()
    return ended


def results_of(ranks: list[tuple]) -> list:
    assert [code for code, *_ in ranks] == [0] * len(ranks), [(code, stderr) for code, stderr, _ in ranks]
    return [result for *_, result in ranks]


def only_line(ranks: list[tuple]) -> str:
    """The one line with "error:" that all ranks together printed."""
    (line,) = [line for _, stderr, _ in ranks for line in stderr.splitlines() if "error: " in line]
    return line


def train_shared(model, cfgs, owner=None, before=lambda: None, **options):
    """Train a group of which each team of ranks owns some SAEs (without feature_shards, a team is a rank)."""
    before()
    shards = team(cfgs[0]["feature_shards"])
    teams = distributed.size() // shards.count
    owners = [owner(i) if owner else i % teams for i in range(len(cfgs))]
    saes = [SAE_CLASSES[c["sae_type"]](c, shards) if o == shards.team_index else None for c, o in zip(cfgs, owners)]
    return train_sae_group(saes, ActivationsStore(model, cfgs[0]), model, cfgs, **options)


# Exports

FOREIGN = ("saelens", "dictionary_learning", "published")


def real_activations(texts: list[str]) -> torch.Tensor:
    """[tokens, 128] of the demo's language model, the attention sink at each text's first position left out."""
    model = load_model(get_default_cfg() | {"model_name": str(DEMO_LM), "device": "cpu"})
    ids = [torch.tensor(model.tokenizer(text)["input_ids"][:120]) for text in texts]
    acts = [run_bridge_to_hook(model, tokens[None], "blocks.2.hook_resid_pre")[0, 1:] for tokens in ids]
    return torch.cat(acts).detach()


def trained_sae(acts: torch.Tensor, **changes):
    """A small SAE after some training steps, so that no bias or threshold has its initial value."""
    cfg = get_default_cfg() | {"model_name": "demo/lm", "layer": 2, "act_size": 128, "dict_size": 256, "top_k": 8}
    cfg |= {"l1_coeff": 0.01, "lr": 3e-3, "device": "cpu", "seq_len": 64, "bandwidth": 0.1, "bos_per_context": True}
    cfg = post_init_cfg(cfg | changes)
    sae = SAE_CLASSES[cfg["sae_type"]](cfg)
    optimizer = make_optimizer(sae, cfg)
    for _ in range(40):
        training_step(sae, optimizer, acts, cfg)
    return sae.eval()


@torch.no_grad()
def ours(sae, x):
    reconstruction, features = sae.reconstruct(x)
    return features, reconstruction


def published_forward(folder, x):
    cfg, w = json.loads((folder / "config.json").read_text()), torch.load(folder / "sae.pt", weights_only=True)
    if cfg["input_unit_norm"]:
        mean = x.mean(-1, keepdim=True)
        std = (x - mean).std(-1, keepdim=True)
        x = (x - mean) / (std + 1e-5)
    if cfg["sae_type"] == "vanilla":
        features = ((x - w["b_dec"]) @ w["W_enc"] + w["b_enc"]).relu()
    elif cfg["sae_type"] == "jumprelu":
        z = (x @ w["W_enc"] + w["b_enc"]).relu()
        features = z * (z > w["jumprelu.log_threshold"].exp())
    else:
        z = ((x - w["b_dec"]) @ w["W_enc"]).relu()
        rows = z if cfg["sae_type"] == "topk" else z.flatten()
        top = rows.topk(cfg["top_k"] * (1 if cfg["sae_type"] == "topk" else len(x)), dim=-1)
        features = torch.zeros_like(rows).scatter(-1, top.indices, top.values).view_as(z)
    reconstruction = features @ w["W_dec"] + w["b_dec"]
    return features, reconstruction * std + mean if cfg["input_unit_norm"] else reconstruction


# The hub

ONE_SMALL_RUN = dict(  # these overrides reduce the demo sweep to one run
    sae_type="batchtopk", dict_size=256, top_k=8, l1_coeff=0, num_tokens=8192, eval_tokens=1024, device="cpu"
)  # fmt: skip


def unused_port() -> int:
    """A port below those that connections get by themselves, so that it stays unused."""
    while True:
        with suppress(OSError), socket.create_server(("127.0.0.1", port := random.randrange(10_000, 32_000))):
            return port


def empty_cache(program) -> None:
    """Remove what the hub's client of the program has loaded."""
    shutil.rmtree(program.env["HF_HOME"], ignore_errors=True)

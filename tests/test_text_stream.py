"""The stream of tokens and batches: each token once per epoch, and bit-identical after resuming at any point."""

import gc
import inspect
import json
import os
import random
import shutil
import textwrap
import threading
from bisect import bisect
from collections import Counter
from contextlib import suppress
from itertools import accumulate
from pathlib import Path

import datasets
import numpy as np
import psutil
import pytest
import torch
from helpers import BOS, DEMO_LM, SEQ_LEN, counted_documents, sorted_rows, stream_cfg
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

import text_stream
from activation_store import ActivationsStore
from console import InputError
from files import SaveError
from language_model import load_model
from text_stream import TextStream

EVAL_CONTEXTS = 3


def documents_of_random_length(seed: int, total: int) -> list[list[int]]:
    """Token documents of 1 to 60 tokens and a long one, `total` tokens in all. BOS is only at their beginning."""
    rng, documents = random.Random(seed), []
    while total > 0:
        length = min(total, 300 if len(documents) == 5 else rng.randint(1, 60))
        documents.append([BOS] + [rng.randint(1, 4095) for _ in range(length - 1)])
        total -= length
    return documents


def make_stream(path: str, **changes) -> TextStream:
    cfg = stream_cfg(dataset_path=path, **changes)
    return TextStream(cfg, AutoTokenizer.from_pretrained(DEMO_LM), 4096)


def reference_stream(documents: list[list[int]], num_epochs: int, bos_per_context: bool) -> tuple[list, list, int]:
    """Held-out contexts, training contexts and the number of dropped tokens, computed token by token."""
    text = [token for document in documents for token in document]

    def cut(tokens: list[int], count: int | None = None) -> tuple[list[list[int]], int]:
        contexts, at = [], 0
        while count is None or len(contexts) < count:
            context = [BOS] if bos_per_context and tokens[at : at + 1] != [BOS] else []
            taken = SEQ_LEN - len(context)
            if at + taken > len(tokens):
                break
            contexts.append(context + tokens[at : at + taken])
            at += taken
        return contexts, at

    held_out, at = cut(text, EVAL_CONTEXTS)
    rest = text[at:] * num_epochs
    contexts, end = cut(rest)
    return held_out, contexts, len(rest) - end


# Order and completeness


@pytest.mark.parametrize("bos_per_context", [False, True])
@pytest.mark.parametrize("num_epochs", [1, 3])
@pytest.mark.parametrize("seed, total", [(0, 1500), (1, 16 * 40), (2, 5000), (3, 602)])
def test_contexts_equal_a_plain_reference(jsonl, seed, total, num_epochs, bos_per_context, capsys):
    """Over several epochs the contexts equal the reference. Only a last partial context is dropped, and reported."""
    documents = documents_of_random_length(seed, total)
    stream = make_stream(jsonl(documents, "tokens"), num_epochs=num_epochs, bos_per_context=bos_per_context)
    held_out, contexts, dropped = reference_stream(documents, num_epochs, bos_per_context)
    assert stream.held_out.tolist() == held_out
    begins, at, of_contexts = list(accumulate(map(len, documents), initial=0)), 0, []
    for _ in held_out:
        of_contexts.append(bisect(begins, at))
        at += SEQ_LEN - (bos_per_context and at not in begins)
    numbers = [sorted(set(of_contexts)).index(document) for document in of_contexts]
    assert stream.held_out_documents.tolist() == numbers
    rng, found = random.Random(seed), []
    while len(part := stream.contexts(rng.randint(1, 9))):
        found += part.tolist()
    assert found == contexts
    assert dropped < SEQ_LEN
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(": ")[-1] for line in lines] == [f"dropping the last {dropped} tokens (partial context)"] * (
        dropped > 0
    )
    if bos_per_context:
        assert all(context[0] == BOS for context in found)


@pytest.mark.parametrize("total", [EVAL_CONTEXTS * SEQ_LEN + 25 * SEQ_LEN, EVAL_CONTEXTS * SEQ_LEN + 411])
@pytest.mark.fast
def test_every_token_exactly_once_per_epoch(jsonl, total):
    """With unique tokens: each is trained on once per epoch, the held-out ones never."""
    documents = counted_documents(50, total - 50)
    stream = make_stream(jsonl(documents, "tokens"), num_epochs=2)
    tokens = torch.cat(drain(stream)).flatten().tolist()
    text = [token for document in documents for token in document]
    per_epoch = text[EVAL_CONTEXTS * SEQ_LEN :]
    dropped = 2 * len(per_epoch) % SEQ_LEN  # at the end of the last epoch
    assert Counter(tokens) + Counter(per_epoch[len(per_epoch) - dropped :]) == Counter(2 * per_epoch)
    assert not set(tokens) & set(text[1 : EVAL_CONTEXTS * SEQ_LEN])


def drain(stream: TextStream) -> list[torch.Tensor]:
    parts = []
    while len(part := stream.contexts(5)):
        parts.append(part)
    return parts


@pytest.mark.parametrize("read", [10**6, 64])
def test_which_bytes_the_fingerprint_covers(tmp_path, monkeypatch, read):
    """Changes each byte in turn. The fingerprint of little data covers all bytes, that of more data evenly spaced
    blocks in each file, in proportion to its size. It covers names and sizes, but not times.
    """
    block = 8
    monkeypatch.setattr(text_stream, "FINGERPRINT_BLOCK", block)
    monkeypatch.setattr(text_stream, "FINGERPRINT_BYTES", read)
    sizes = {"a.txt": 400, "b.txt": 7, "c/d.txt": 100}
    (tmp_path / "c").mkdir()
    for name, size in sizes.items():
        (tmp_path / name).write_bytes(bytes(random.Random(size).choices(range(97, 123), k=size)))
    reader = make_stream(str(tmp_path), eval_tokens=SEQ_LEN).reader
    before = reader.fingerprint()
    assert before["dataset_commit"] is None
    total = 0
    for name, size in sizes.items():
        file, noticed = tmp_path / name, []
        content = file.read_bytes()
        for i in range(size):
            file.write_bytes(content[:i] + b"." + content[i + 1 :])
            noticed.append(reader.fingerprint() != before)
        file.write_bytes(content)
        total += sum(noticed)
        assert all(noticed[:block]) and all(noticed[-block:])
        gaps = [len(gap) for gap in "".join(" x"[not seen] for seen in noticed).split()]
        assert not gaps if read > sum(sizes.values()) else not gaps or max(gaps) - min(gaps) <= 1
    assert total == 507 if read > 507 else 64 <= total < 64 + 2 * block * len(sizes)
    os.utime(tmp_path / "a.txt", (1, 1))
    assert reader.fingerprint() == before
    (tmp_path / "b.txt").rename(tmp_path / "bb.txt")
    assert reader.fingerprint() != before
    (tmp_path / "bb.txt").rename(tmp_path / "b.txt")
    with open(tmp_path / "c/d.txt", "a") as file:
        file.write("e")
    assert reader.fingerprint() != before


def test_too_few_epochs(model, jsonl):
    """Too few tokens in num_epochs are an error before training, which names the tokens, the epochs and num_tokens."""
    path = jsonl(counted_documents(48, 400), "tokens")
    with pytest.raises(InputError, match="too short: 800 tokens to train on in num_epochs = 2, .* num_tokens = 820"):
        ActivationsStore(model, stream_cfg(dataset_path=path, num_tokens=820, num_epochs=2))
    store = ActivationsStore(model, stream_cfg(dataset_path=path, num_tokens=800, num_epochs=2))
    assert sum(len(store.next_batch()) for _ in range(20)) == 800
    with pytest.raises(InputError, match="has no text left after the 800 tokens of num_tokens"):
        store.next_batch()


def test_each_epoch_has_the_same_activations(model, jsonl):
    """Two epochs of whole contexts give each activation twice, those of held-out tokens never."""
    path = jsonl(counted_documents(48, 400), "tokens")
    cfg = stream_cfg(dataset_path=path, num_tokens=800, num_epochs=2, model_batch_size=5)
    store = ActivationsStore(model, cfg)
    rows = torch.cat([store.next_batch() for _ in range(20)])
    once = ActivationsStore(model, cfg | {"num_tokens": 400, "num_epochs": 1})
    rows_once = torch.cat([once.next_batch() for _ in range(10)])
    assert np.array_equal(sorted_rows(rows), sorted_rows(rows_once.repeat(2, 1)))


# Resuming


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> dict[str, tuple[str, dict]]:
    """Similar data in several formats: JSON lines, one text file per document, parquet of tokens, a saved dataset."""
    folder = tmp_path_factory.mktemp("sources")
    parts = [part for part in inspect.getsource(textwrap).split("\n\n") if part.strip()][:70]
    (folder / "text").mkdir()
    for i in range(0, len(parts), 9):
        lines = [json.dumps({"text": part}) for part in parts[i : i + 9]]
        (folder / "text" / f"{i:02}.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "small").mkdir()
    for i in range(0, len(parts), 2):
        (folder / "small" / f"{i:02}.txt").write_text("".join(parts[i : i + 2]))
    tokens = datasets.Dataset.from_dict({"input_ids": documents_of_random_length(3, 3000)})
    tokens.to_parquet(folder / "tokens.parquet", batch_size=20)
    datasets.Dataset.from_dict({"text": parts}).save_to_disk(folder / "saved")
    return {
        "files of text": (str(folder / "text"), {}),
        "a file per document": (str(folder / "small"), {"num_epochs": 2}),
        "parquet of tokens": (str(folder / "tokens.parquet"), {"num_epochs": 2}),
        "saved dataset": (str(folder / "saved"), {"bos_per_context": True, "num_epochs": 2}),
    }


@pytest.mark.parametrize("name", ["files of text", "a file per document", "parquet of tokens", "saved dataset"])
@pytest.mark.fast
def test_a_stream_resumes_from_its_state(sources, name):
    """After loading any state, also one at the boundary of an epoch, all later contexts are the same."""
    path, changes = sources[name]
    stream = make_stream(path, **changes)
    states, contexts = [], []
    while True:
        states.append(json.loads(json.dumps(stream.state_dict())))
        if not len(part := stream.contexts(1)):
            break
        contexts.append(part)
    assert len(contexts) > 100
    assert len({state["epoch"] for state in states[:-1]}) == changes.get("num_epochs", 1)
    edges = [i for i in range(1, len(contexts)) if states[i]["epoch"] > states[i - 1]["epoch"]]
    assert len(edges) == changes.get("num_epochs", 1) - 1
    for at in [*random.Random(0).sample(range(len(contexts)), 12), *(i + by for i in edges for by in (-1, 0, 1))]:
        stream.load_state_dict(states[at])
        assert stream.state_dict() == states[at]
        assert torch.equal(torch.cat(drain(stream)), torch.cat(contexts[at:])), at


@pytest.mark.parametrize("buffer", [(3, 2), (4, 5)])
@pytest.mark.parametrize("name", ["files of text", "a file per document", "parquet of tokens", "saved dataset"])
def test_resumed_batches_are_bit_identical(model, sources, name, buffer):
    """After load_state_dict, all later batches are bit-identical: at 12 points, including the beginning and the middle
    of a buffer, and after resuming twice. The state is small."""
    path, changes = sources[name]
    changes = changes | dict(model_batch_size=buffer[0], num_batches_in_buffer=buffer[1], num_tokens=1600)
    cfg = stream_cfg(dataset_path=path, **changes)
    store = ActivationsStore(model, cfg)
    states, batches = [], []
    for _ in range(40):
        states.append(json.dumps(store.state_dict()))
        batches.append(store.next_batch())
    assert max(map(len, states)) < 2000, "a position, no data"
    offsets = {json.loads(state)["offset"] for state in states}
    assert 0 in offsets and len(offsets) > 1

    points = random.Random(1).sample(range(38), 12)
    assert {json.loads(states[at])["offset"] == 0 for at in points} == {True, False}
    resumed = ActivationsStore(model, cfg)
    for at in points:
        resumed.load_state_dict(json.loads(states[at]))
        assert resumed.state_dict() == json.loads(states[at])
        assert torch.equal(resumed.next_batch(), batches[at])
        again = ActivationsStore(model, cfg) if at % 7 == 0 else resumed
        again.load_state_dict(json.loads(json.dumps(resumed.state_dict())))
        for batch in batches[at + 1 : at + 4]:
            assert torch.equal(again.next_batch(), batch)


def test_resuming_costs_one_buffer(model, sources):
    """Resuming at any point runs the forward passes of one buffer and the one that it begins in."""
    path, changes = sources["files of text"]
    cfg = stream_cfg(dataset_path=path, **changes, num_batches_in_buffer=4, num_tokens=1600)
    store = ActivationsStore(model, cfg)
    for _ in range(30):
        store.next_batch()
    state, forwards = store.state_dict(), []
    resumed = ActivationsStore(model, cfg)
    harvest = resumed.harvest
    resumed.harvest = lambda tokens: forwards.append(len(tokens)) or harvest(tokens)
    resumed.load_state_dict(state)
    resumed.next_batch()
    assert 1 <= len(forwards) <= 4 + 1


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_activation_dtype_is_the_dtype_of_the_buffer(model, sources, dtype):
    """Batches are float32 values rounded once to activation_dtype; the model runs in model_dtype."""
    path, changes = sources["files of text"]
    exact, rounded = (
        ActivationsStore(model, stream_cfg(dataset_path=path, **changes, activation_dtype=name))
        for name in ("float32", dtype)
    )
    for _ in range(5):
        batch, expected = rounded.next_batch(), exact.next_batch()
        assert batch.dtype == torch.float32
        assert torch.equal(batch, expected.to(getattr(torch, dtype)).float())
    assert rounded.storage.nbytes * 2 == exact.storage.nbytes


# Memory and threads


def test_memory_stays_flat_over_many_refills(model, tmp_path):
    """The activations are in memory once: after 60 refills, the process has grown by less than half a buffer."""
    data = datasets.Dataset.from_dict({"tokens": documents_of_random_length(4, 60_000)})
    data.to_parquet(tmp_path / "data.parquet", batch_size=100)
    cfg = stream_cfg(
        dataset_path=str(tmp_path / "data.parquet"), num_tokens=10**7, num_epochs=200, seq_len=128, batch_size=4096,
        model_batch_size=32, num_batches_in_buffer=8, layer=0,
    )  # fmt: skip
    store = ActivationsStore(model, cfg)
    process, sizes = psutil.Process(), []
    assert store.storage.nbytes == 8 * 32 * 128 * 128 * 4  # 16 MiB
    for _ in range(70):
        store.fill_buffer()
        sizes.append(process.memory_info().rss)
    assert max(sizes[-10:]) - max(sizes[:10]) < store.storage.nbytes / 2


@pytest.mark.parametrize("failing", [(33, 65, 97), (20, 25, 30)], ids=["between batches", "within a batch"])
def test_retries_are_counted_in_a_row(jsonl, monkeypatch, failing):
    """stream_retries failures without progress end the run, not as many in days."""
    documents = documents_of_random_length(0, 8000)
    path, left = jsonl(documents, "tokens"), set(failing)
    expected, stream = torch.cat(drain(make_stream(path))), make_stream(path, stream_retries=2)

    class Flaky:
        def __init__(self, data):
            self.data, self.load_state_dict, self.state_dict = data, data.load_state_dict, data.state_dict

        def shard(self, *which):
            return Flaky(self.data.shard(*which))

        def __iter__(self):
            for row in self.data:
                if (number := documents.index(row["tokens"]) + 1) in left:
                    left.remove(number)
                    raise ConnectionError("reset")
                yield row

    shards = text_stream.shards
    monkeypatch.setattr(text_stream, "shards", lambda *args: map(Flaky, shards(*args)))
    monkeypatch.setattr(text_stream, "MAX_BACKOFF", 0)
    stream.reader.local = False
    assert torch.equal(torch.cat(drain(stream)), expected) and not left


def test_the_prefetch_thread_ends_with_the_store(model, sources, monkeypatch):
    """No thread outlives its store, even if its queue is full."""
    monkeypatch.setattr(text_stream, "PREFETCH_CHUNKS", 1)  # of eight chunks, one per file

    def threads():
        return [thread for thread in threading.enumerate() if thread.name == "text stream"]

    gc.collect()
    before = len(threads())
    path, changes = sources["files of text"]
    stores = [ActivationsStore(model, stream_cfg(dataset_path=path, **changes)) for _ in range(4)]
    for store in stores:
        store.next_batch()
    stores[1].load_state_dict(stores[0].state_dict())
    assert len(threads()) == before + 4
    del stores, store
    gc.collect()
    assert len(threads()) == before


# The cache on disk


def batches_of(store: ActivationsStore, count: int) -> torch.Tensor:
    return torch.stack([store.next_batch() for _ in range(count)])


@pytest.fixture
def cached(model, sources, tmp_path):
    """A config with an activation_cache, the batches without it, and a function that makes a store with a list of its
    forward passes."""
    path, changes = sources["files of text"]
    cfg = stream_cfg(
        dataset_path=path, **changes, num_batches_in_buffer=4, num_tokens=1600, activation_cache=str(tmp_path / "cache")
    )
    live = batches_of(ActivationsStore(model, cfg | {"activation_cache": None}), 40)

    def make_store(**changes) -> tuple[ActivationsStore, list]:
        store, forwards = ActivationsStore(model, cfg | changes), []
        harvest = store.harvest
        store.harvest = lambda tokens: forwards.append(len(tokens)) or harvest(tokens)
        return store, forwards

    return cfg, live, make_store


@pytest.mark.fast
def test_cached_batches_equal_harvested_batches(cached):
    """The first run writes the cache, the second reads it without the language model; all batches are bit-identical."""
    _, live, make_store = cached
    first, forwards = make_store()
    assert torch.equal(batches_of(first, 40), live) and forwards
    second, forwards = make_store()
    assert torch.equal(batches_of(second, 40), live) and not forwards
    (folder,) = Path(second.cfg["activation_cache"]).iterdir()
    manifest = json.loads((folder / "manifest.json").read_text())
    assert sum(entry["rows"] for entry in manifest["buffers"]) == 1600
    assert sum(path.stat().st_size for path in folder.glob("*.bin")) == 1600 * 128 * 4


def test_a_partial_cache_is_completed(cached, capsys):
    """An interrupted run leaves complete buffers; the next run reads them, harvests the rest, and reports both."""
    _, live, make_store = cached
    partial, _ = make_store()
    batches_of(partial, 17)
    capsys.readouterr()
    rest, forwards = make_store()
    stderr = capsys.readouterr().err
    assert "will be written" in stderr and "are read from disk" in stderr
    assert torch.equal(batches_of(rest, 40), live)
    whole = len(live) * 40 / SEQ_LEN / 3
    assert 0 < len(forwards) < 0.7 * whole


def test_a_buffer_that_could_not_be_written_is_harvested_again(cached, monkeypatch):
    """Where the call is repeated, as once there is space again: the same batches and the same cache."""
    _, live, make_store = cached
    store, _ = make_store()

    def full(*_):
        raise SaveError("no space left")

    with monkeypatch.context() as patch, pytest.raises(SaveError):
        patch.setattr(store.cache, "write", full)
        store.next_batch()
    assert torch.equal(batches_of(store, 40), live)
    again, forwards = make_store()
    assert torch.equal(batches_of(again, 40), live) and not forwards


def test_a_cached_stream_resumes(cached):
    """Cached and live stores have the same states, and each resumes from the other's."""
    cfg, live, make_store = cached
    batches_of(make_store()[0], 40)
    store, _ = make_store()
    batches_of(store, 13)
    for changes in ({}, {"activation_cache": None}):
        other, _ = make_store(**changes)
        other.load_state_dict(json.loads(json.dumps(store.state_dict())))
        assert torch.equal(batches_of(other, 27), live[13:])


@pytest.mark.parametrize("longer", [1000, 1600])
@pytest.mark.parametrize("count", [21, 22])  # 21 batches are 840 tokens
def test_a_longer_run_after_a_shorter_one(cached, count, longer):
    """Whose last buffer is shorter than that of the longer run; the one after it begins elsewhere in the text."""
    _, _, make_store = cached
    live = batches_of(make_store(num_tokens=longer, activation_cache=None)[0], longer // 40)
    batches_of(make_store(num_tokens=840)[0], count)
    for _ in range(2):
        assert torch.equal(batches_of(make_store(num_tokens=longer)[0], longer // 40), live)


def test_a_longer_run_skips_the_held_out_tokens_of_a_second_epoch(model, jsonl, tmp_path):
    """Also if the run that wrote the cache ended with the epoch, and with a whole buffer."""
    path = jsonl(documents_of_random_length(3, 48 + 320), "tokens")
    cfg = stream_cfg(dataset_path=path, num_tokens=320, num_batches_in_buffer=4)
    cache = {"activation_cache": str(tmp_path / "cache")}
    batches_of(ActivationsStore(model, cfg | cache), 8)
    longer = cfg | {"num_tokens": 640, "num_epochs": 2}
    expected = batches_of(ActivationsStore(model, longer), 16)
    assert torch.equal(batches_of(ActivationsStore(model, longer | cache), 16), expected)


@pytest.mark.parametrize("buffers", [[{}], [5], 5, {"a": 1}])
def test_a_manifest_of_another_form_is_corrupt(cached, capsys, buffers):
    _, live, make_store = cached
    batches_of(make_store()[0], 3)
    (folder,) = Path(make_store()[0].cfg["activation_cache"]).iterdir()
    (folder / "manifest.json").write_text(json.dumps({"buffers": buffers}))
    assert torch.equal(batches_of(make_store()[0], 3), live[:3])
    assert "manifest.json is corrupt" in capsys.readouterr().err


def test_a_cache_that_may_only_be_read(cached):
    """As that of somebody else: reading it creates no file."""
    _, live, make_store = cached
    batches_of(make_store()[0], 40)
    (folder,) = Path(make_store()[0].cfg["activation_cache"]).iterdir()
    (folder / ".lock").unlink(missing_ok=True)
    before = sorted(folder.iterdir())
    store, forwards = make_store()
    assert torch.equal(batches_of(store, 40), live) and not forwards
    assert sorted(folder.iterdir()) == before


def test_a_run_that_began_before_the_cache_was_written(cached):
    """It keeps the buffers that another run has written since."""
    _, live, make_store = cached
    early, _ = make_store()
    batches_of(make_store()[0], 40)
    batches_of(early, 1)
    store, forwards = make_store()
    assert torch.equal(batches_of(store, 40), live) and not forwards


def test_two_runs_write_one_cache(cached):
    """At the same time, each from its own process."""
    _, live, make_store = cached
    children = []
    for _ in range(2):
        if not (pid := os.fork()):
            code = 1
            with suppress(Exception):
                code = int(not torch.equal(batches_of(make_store()[0], 40), live))
            os._exit(code)
        children.append(pid)
    assert [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children] == [0, 0]
    last, forwards = make_store()
    assert torch.equal(batches_of(last, 40), live) and not forwards


def test_a_shorter_run_reads_a_longer_ones_cache(cached):
    """A shorter run reads what it needs and leaves the cache unchanged."""
    _, live, make_store = cached
    batches_of(make_store()[0], 40)
    shorter, forwards = make_store(num_tokens=840)  # ends within a buffer
    assert torch.equal(batches_of(shorter, 16), live[:16]) and not forwards
    last_of_shorter = torch.cat([shorter.next_batch() for _ in range(5)])
    assert not forwards
    without, _ = make_store(num_tokens=840, activation_cache=None)
    batches_of(without, 16)
    assert torch.equal(last_of_shorter, torch.cat([without.next_batch() for _ in range(5)]))
    full, forwards = make_store()
    assert torch.equal(batches_of(full, 40), live) and not forwards


@pytest.mark.parametrize("fault", ["flip a byte", "truncate", "delete", "manifest"])
def test_a_corrupt_cache_is_reported_and_harvested_again(cached, capsys, fault):
    """A buffer file that does not match the manifest is named, harvested again and rewritten."""
    _, live, make_store = cached
    batches_of(make_store()[0], 40)
    (folder,) = Path(make_store()[0].cfg["activation_cache"]).iterdir()
    file = folder / ("manifest.json" if fault == "manifest" else "buffer_000002.bin")
    content = bytearray(file.read_bytes())
    content[100] ^= 1
    {
        "flip a byte": lambda: file.write_bytes(content),
        "truncate": lambda: file.write_bytes(content[:-5]),
        "delete": file.unlink,
        "manifest": lambda: file.write_text("{"),
    }[fault]()
    capsys.readouterr()
    store, forwards = make_store()
    assert torch.equal(batches_of(store, 40), live) and forwards
    assert file.name in capsys.readouterr().err
    store, forwards = make_store()
    assert torch.equal(batches_of(store, 40), live) and not forwards


def test_other_streams_have_separate_caches(cached):
    """Streams with another dtype, other forward passes or other contexts never share a cache."""
    cfg, _, make_store = cached
    for changes in ({}, {"activation_dtype": "bfloat16"}, {"model_batch_size": 2}, {"bos_per_context": True}):
        batches_of(make_store(**changes)[0], 3)
    assert len(list(Path(cfg["activation_cache"]).iterdir())) == 4
    other, forwards = make_store(shuffle_seed=1)  # the cache does not depend on the order of the batches
    batches_of(other, 3)
    assert not forwards


def test_other_activations_have_separate_caches(model, counted, tmp_path):
    """Those of other layers, sites and weights, and of buffers of another size, are never read from one cache."""
    shutil.copytree(DEMO_LM, tmp_path / "lm")
    weights = load_file(DEMO_LM / "model.safetensors")
    weights["transformer.h.0.mlp.c_fc.bias"][0] += 1
    save_file(weights, tmp_path / "lm" / "model.safetensors", metadata={"format": "pt"})
    changed = load_model(stream_cfg(model_name=str(tmp_path / "lm")))
    for lm, changes in (
        (model, {"num_batches_in_buffer": 4}), (model, {}), (model, {"layer": 3}), (model, {"site": "mlp_out"}),
        (changed, {}),
    ):  # fmt: skip
        cfg = stream_cfg(dataset_path=counted, **changes)
        store = ActivationsStore(lm, cfg | {"activation_cache": str(tmp_path / "cache")})
        assert torch.equal(batches_of(store, 10), batches_of(ActivationsStore(lm, cfg), 10)), changes


def test_edited_text_has_a_separate_cache(cached):
    """After an edit of one letter that is not held out, the activations are those of the new text."""
    cfg, _, make_store = cached
    batches_of(make_store()[0], 40)
    file = sorted(file for file in Path(cfg["dataset_path"]).iterdir())[-1]
    file.write_text(file.read_text()[::-1].replace("e", "a", 1)[::-1])
    store, forwards = make_store()
    edited = batches_of(store, 40)
    assert forwards and torch.equal(edited, batches_of(make_store(activation_cache=None)[0], 40))


def test_a_cache_larger_than_the_disk_is_refused(cached, monkeypatch):
    """Too little disk space is an InputError with both sizes, before anything is harvested."""
    _, _, make_store = cached
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(InputError, match="activation_cache = .* of disk space, and 0.00 GiB are free"):
        make_store()
    with pytest.raises(InputError, match="activation_cache = .*cannot be written"):
        make_store(activation_cache="/dev/null/cache")

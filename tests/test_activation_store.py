"""The stream of activations: each token once, held-out tokens apart, and bad data reported in one line."""

import itertools
import json
import random
import re
import shutil
from contextlib import suppress
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from helpers import (
    BOS,
    DEMO_LM,
    SEQ_LEN,
    all_contexts,
    counted_batches,
    counted_documents,
    reference_contexts,
    sorted_rows,
    store_error,
    stream_cfg,
)
from tokenizers import Tokenizer

from activation_store import ActivationsStore
from console import InputError
from hub import StreamError
from text_stream import TextStream

# Text -> tokens


@pytest.mark.fast
def test_contexts_equal_a_plain_reference(model, jsonl, texts, tokens):
    """Documents become BOS + tokens, concatenated and cut into contexts; no token is lost over many refills."""
    heldout, rest = reference_contexts(tokens, SEQ_LEN, 3)
    store = ActivationsStore(model, stream_cfg(dataset_path=jsonl(texts)))
    assert torch.equal(store.eval_contexts, heldout)
    contexts = all_contexts(store)
    assert len(contexts) > 10 * store.cfg["model_batch_size"]
    assert torch.equal(contexts, rest)


def test_training_goes_through_the_stream_in_order(model, jsonl, texts, tokens):
    """The batches are harvested from the reference's contexts in order, one buffer after another."""
    _, rest = reference_contexts(tokens, SEQ_LEN, 3)
    num_tokens = rest.numel() // 40 * 40
    store = ActivationsStore(model, stream_cfg(dataset_path=jsonl(texts), num_tokens=num_tokens))
    batches = [store.next_batch() for _ in range(num_tokens // 40)]
    reference = torch.cat([store.get_activations(part) for part in rest.split(3)]).flatten(0, 1)
    # A buffer holds the next rows of the reference: those of two forward passes, in whole batches.
    rows = 2 * 3 * SEQ_LEN // 40 * 40
    for i in range(0, num_tokens - rows, rows):
        buffer = torch.cat(batches[i // 40 : (i + rows) // 40])
        assert np.array_equal(sorted_rows(buffer), sorted_rows(reference[i : i + rows]))


@pytest.fixture(scope="module")
def formats(tmp_path_factory, texts) -> dict[str, str]:
    """The same documents in every format of local data."""
    folder, texts = tmp_path_factory.mktemp("formats"), [text for text in texts if text]
    data = datasets.Dataset.from_dict({"text": texts, "id": list(range(len(texts)))})
    halves = {"a": data.select(range(7)), "b": data.select(range(7, len(data)))}
    data.to_json(folder / "file.jsonl")
    data.to_parquet(folder / "file.parquet")
    data.save_to_disk(folder / "dataset")
    shutil.copy(next((folder / "dataset").glob("*.arrow")), folder / "file.arrow")
    datasets.DatasetDict({"test": data.select([0]), "train": data}).save_to_disk(folder / "dataset_dict")
    for kind in ("text", "jsonl", "parquet", "arrow"):
        (folder / f"folder_{kind}" / "deeper").mkdir(parents=True)
    for i, text in enumerate(texts):
        (folder / "folder_text" / f"{i:03}.txt").write_bytes(text.encode())
    for name, half in halves.items():
        half.to_json(folder / "folder_jsonl" / "deeper" / f"{name}.jsonl")
        half.to_parquet(folder / "folder_parquet" / "deeper" / f"{name}.parquet")
        half.save_to_disk(folder / f"half_{name}")
        shutil.copy(next((folder / f"half_{name}").glob("*.arrow")), folder / "folder_arrow" / f"{name}.arrow")
    return {path.name: str(path) for path in folder.iterdir() if not path.name.startswith("half_")}


@pytest.mark.parametrize(
    "name",
    [
        "file.jsonl", "file.parquet", "file.arrow", "dataset", "dataset_dict",
        "folder_text", "folder_jsonl", "folder_parquet", "folder_arrow",
    ],
)  # fmt: skip
def test_every_format_of_local_data_gives_the_same_tokens(model, formats, tokens, name):
    """Files, folders of files and saved datasets give the same contexts; no document is lost to the column check."""
    heldout, rest = reference_contexts(tokens, SEQ_LEN, 3)
    store = ActivationsStore(model, stream_cfg(dataset_path=formats[name]))
    assert torch.equal(store.eval_contexts, heldout)
    assert torch.equal(all_contexts(store), rest)


def test_a_text_file_is_one_document(model, tmp_path, texts):
    """A .txt file is one document: its beginning is held out, and the rest is trained on."""
    path = tmp_path / "book.txt"
    path.write_text("\n\n".join(texts), encoding="utf-8", newline="")
    ids = Tokenizer.from_file(str(DEMO_LM / "tokenizer.json")).encode("\n\n".join(texts), add_special_tokens=False).ids
    stream = torch.tensor([BOS] + ids)
    store = ActivationsStore(model, stream_cfg(dataset_path=str(path)))
    assert torch.equal(store.eval_contexts.flatten(), stream[: 3 * SEQ_LEN])
    trained_on = all_contexts(store).flatten()
    rest = stream[3 * SEQ_LEN :]
    assert torch.equal(trained_on, rest[: len(rest) // SEQ_LEN * SEQ_LEN])


@pytest.mark.parametrize("column", ["text", "tokens", "input_ids"])
def test_columns(model, jsonl, texts, tokens, column):
    """text, tokens and input_ids are recognized; token documents that begin with BOS get no second one."""
    documents = texts if column == "text" else tokens
    store = ActivationsStore(model, stream_cfg(dataset_path=jsonl(documents, column)))
    assert torch.equal(all_contexts(store), reference_contexts(tokens, SEQ_LEN, 3)[1])


def test_token_documents_without_bos_get_one(model, jsonl, tokens):
    """BOS is prepended to token documents that lack it; empty ones are skipped."""
    documents = [document[1:] for document in tokens]
    documents.insert(2, [])
    store = ActivationsStore(model, stream_cfg(dataset_path=jsonl(documents, "tokens")))
    assert torch.equal(all_contexts(store), reference_contexts(tokens, SEQ_LEN, 3)[1])


def test_split_of_a_saved_dataset_dict(model, formats):
    """dataset_split selects the split of a saved DatasetDict; the error about a missing split lists the others."""
    with pytest.raises(InputError, match="no split 'validation'.*test, train"):
        ActivationsStore(model, stream_cfg(dataset_path=formats["dataset_dict"], dataset_split="validation"))
    with pytest.raises(InputError, match="too short"):  # the split "test" has one document
        ActivationsStore(
            model, stream_cfg(dataset_path=formats["dataset_dict"], dataset_split="test", num_tokens=10_000)
        )


def test_seq_len_is_limited_by_the_model(model, jsonl, texts, tokens, capsys):
    """A seq_len beyond the model's context length is reduced to it, which is reported."""
    documents = texts * 8
    cfg = stream_cfg(dataset_path=jsonl(documents), seq_len=1000, eval_tokens=200)
    store = ActivationsStore(model, cfg)
    assert store.seq_len == 128 and store.eval_contexts.shape == (2, 128)
    assert torch.equal(all_contexts(store), reference_contexts(tokens * 8, 128, 2)[1])
    assert "seq_len is reduced to 128" in capsys.readouterr().err


# Held out


def test_held_out_and_training_tokens_are_disjoint(model, jsonl):
    """The stream's first eval_tokens are held out and never trained on."""
    documents = counted_documents(50, 10 * 40)  # the first document continues in the first training context
    store = ActivationsStore(model, stream_cfg(dataset_path=jsonl(documents, "tokens")))
    heldout = store.eval_contexts.flatten().tolist()
    assert heldout == documents[0][:48]
    trained_on = all_contexts(store).flatten().tolist()
    assert not set(heldout) - {BOS} & set(trained_on)
    assert trained_on == [token for document in documents for token in document][48 : 48 + len(trained_on)]
    assert len(trained_on) == 400


def test_eval_tokens_are_rounded_up_to_whole_contexts(model, jsonl, texts):
    """eval_tokens = 33 of 16-token contexts holds out three contexts."""
    assert ActivationsStore(model, stream_cfg(dataset_path=jsonl(texts), eval_tokens=33)).eval_contexts.shape == (3, 16)


def test_fingerprint_identifies_the_held_out_tokens(model, jsonl, texts):
    """The fingerprint is the same for the same held-out tokens, and differs for others."""
    path = jsonl(texts)
    prints = [ActivationsStore(model, stream_cfg(dataset_path=path, eval_tokens=n)).fingerprint() for n in (48, 48, 64)]
    assert prints[0] == prints[1] != prints[2]


# Batches


@pytest.mark.parametrize("model_batch_size, buffer", [(3, 2), (1, 3), (25, 1), (7, 100), (4, 4)])
@pytest.mark.fast
def test_every_training_token_is_handed_out_exactly_once(model, counted, model_batch_size, buffer):
    """Over all batches each activation comes once, whatever the buffer size; none is lost between buffers."""
    batches, in_order = counted_batches(model, counted, model_batch_size=model_batch_size, num_batches_in_buffer=buffer)
    assert batches.shape == (10, 40, 128)
    assert np.array_equal(sorted_rows(batches.flatten(0, 1)), sorted_rows(in_order))


def test_batches_are_whole_when_the_buffer_is_smaller_than_a_batch(model, counted):
    """next_batch returns batch_size activations even if num_batches_in_buffer forward passes give fewer."""
    store = ActivationsStore(
        model, stream_cfg(dataset_path=counted, batch_size=100, model_batch_size=1, num_batches_in_buffer=2)
    )
    rows = [store.next_batch() for _ in range(4)]
    assert [len(row) for row in rows] == [100] * 4
    assert len(np.unique(torch.cat(rows).numpy(), axis=0)) > 390


@pytest.mark.fast
def test_batches_are_shuffled_and_deterministic(model, counted):
    """The same shuffle_seed gives the same batches, another seed others; they are not in text order."""
    first, in_order = counted_batches(model, counted, model_batch_size=8)
    again, _ = counted_batches(model, counted, model_batch_size=8)
    other, _ = counted_batches(model, counted, model_batch_size=8, shuffle_seed=50)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert np.array_equal(sorted_rows(first.flatten(0, 1)), sorted_rows(other.flatten(0, 1)))
    place = {row.numpy().tobytes(): i for i, row in enumerate(in_order)}
    places = np.array([place[row.numpy().tobytes()] for row in first.flatten(0, 1)])
    assert (np.diff(places) == 1).mean() < 0.1, "neighbours in the text are not neighbours in a batch"


def test_each_buffer_has_its_own_order(model, counted):
    store = ActivationsStore(model, stream_cfg(dataset_path=counted))
    orders = {}
    for _ in range(10):
        store.next_batch()
        orders[store.buffer_start["buffer"]] = store.order.tolist()
    assert len(orders[0]) == len(orders[1]) and orders[0] != orders[1]


@pytest.mark.parametrize("call", [5, 6])
def test_a_call_that_failed_is_repeated(model, counted, monkeypatch, call):
    """In the middle of a buffer: the same batches as without the error."""
    expected, _ = counted_batches(model, counted, num_batches_in_buffer=4)
    get_batch_tokens, calls, found = ActivationsStore.get_batch_tokens, itertools.count(1), []

    def failing(self):
        if next(calls) == call:
            raise StreamError("the hub is down")
        return get_batch_tokens(self)

    monkeypatch.setattr(ActivationsStore, "get_batch_tokens", failing)
    store = ActivationsStore(model, stream_cfg(dataset_path=counted, num_batches_in_buffer=4))
    while len(found) < 10:
        with suppress(StreamError):
            found.append(store.next_batch())
    assert torch.equal(torch.stack(found), expected)


def test_a_call_that_failed_after_loading_is_repeated(model, counted, monkeypatch):
    """Where the position lies within a forward pass: the same batches as without the error."""
    expected, _ = counted_batches(model, counted)
    store = ActivationsStore(model, stream_cfg(dataset_path=counted))
    for _ in range(2):
        store.next_batch()
    state = store.state_dict()
    assert state["inside"] and not state["offset"]
    store.load_state_dict(state)

    def interrupted(tokens):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(store, "get_activations", interrupted)
        store.next_batch()
    assert torch.equal(torch.stack([store.next_batch() for _ in range(8)]), expected[2:])


# Excluded tokens


def kept_rows(store, excluded: list[int]) -> torch.Tensor:
    """The activations [n, d] to train on, in text order, without those of excluded tokens."""
    fresh = ActivationsStore(store.model, store.cfg | {"exclude_tokens": None, "activation_cache": None})
    contexts = all_contexts(fresh)
    rows = torch.cat([store.get_activations(part) for part in contexts.split(store.cfg["model_batch_size"])])
    return rows.flatten(0, 1)[[token not in excluded for token in contexts.flatten().tolist()]]


@pytest.mark.parametrize("changes", [{}, {"bos_per_context": True}, {"model_batch_size": 1, "num_epochs": 2}])
@pytest.mark.fast
def test_excluded_tokens_never_reach_a_batch(model, jsonl, texts, changes):
    """Batches are whole and contain every other token once, in the order of the buffers."""
    excluded = [BOS, 3, 200, 201]
    cfg = stream_cfg(dataset_path=jsonl(texts), exclude_tokens=excluded, **changes)
    rows = kept_rows(ActivationsStore(model, cfg), excluded)
    num_tokens = len(rows) // 40 * 40
    store = ActivationsStore(model, cfg | {"num_tokens": num_tokens})
    batches = torch.cat([store.next_batch() for _ in range(num_tokens // 40)])
    size = len(store.storage)
    assert size % 40 == 0 and len(batches) == num_tokens
    for i in range(0, num_tokens, size):
        assert np.array_equal(sorted_rows(batches[i : i + size]), sorted_rows(rows[i : min(i + size, num_tokens)]))
    ActivationsStore(model, cfg | {"num_tokens": len(rows), "batch_size": 1})  # exactly enough
    usable = f"{len(rows):,}" if "bos_per_context" not in changes else r"[\d,]+"  # an upper bound
    with pytest.raises(InputError, match=f"too short: {usable} tokens to train on.* without exclude_tokens"):
        store = ActivationsStore(model, cfg | {"num_tokens": len(rows) // 40 * 40 + 40})
        while True:
            store.next_batch()


def test_a_stream_with_excluded_tokens_resumes_bit_identically(model, jsonl, texts, tmp_path):
    """From any batch, live and from the cache, which is separate for each exclude_tokens."""
    cfg = stream_cfg(dataset_path=jsonl(texts), exclude_tokens=[BOS, 3], num_batches_in_buffer=3)
    store = ActivationsStore(model, cfg)
    batches, states = [], []
    for _ in range(10):
        states.append(json.loads(json.dumps(store.state_dict())))
        batches.append(store.next_batch())
    assert {state["inside"] for state in states} > {0}
    for changes in ({}, {"activation_cache": str(tmp_path / "cache")}, {"activation_cache": str(tmp_path / "cache")}):
        store = ActivationsStore(model, cfg | changes)
        for i in (0, 9, 4, 7, 1):
            store.load_state_dict(states[i])
            assert all(torch.equal(store.next_batch(), batch) for batch in batches[i:])
    for excluded in ([BOS], None):
        ActivationsStore(model, cfg | changes | {"exclude_tokens": excluded}).next_batch()
    identities = [json.loads(path.read_text())["identity"] for path in tmp_path.glob("cache/*/manifest.json")]
    assert len(identities) == 3 and sum("exclude_tokens" in identity for identity in identities) == 2


def test_values_of_exclude_tokens(model, counted):
    """Ids, "bos" or "special". The store's config has ids; the run's name is that of the original config."""
    for value, ids in (("bos", [BOS]), ("special", [BOS]), ([9, 5, 9], [5, 9]), (5, [5])):
        cfg = stream_cfg(dataset_path=counted, exclude_tokens=value, num_tokens=40)
        assert ActivationsStore(model, cfg).cfg["exclude_tokens"] == ids
        assert ActivationsStore(model, cfg).cfg["name"] == cfg["name"] != stream_cfg(dataset_path=counted)["name"]
    assert "4095" in store_error(model, dataset_path=counted, exclude_tokens=[5, 4096])
    message = store_error(model, dataset_path=counted, exclude_tokens=list(range(4096)))
    assert "leaves no held-out token" in message


def test_seed_of_the_weights_does_not_touch_the_stream(model, counted):
    """Runs of different seeds see the same batches."""
    assert torch.equal(counted_batches(model, counted, seed=1)[0], counted_batches(model, counted, seed=2)[0])


def test_global_rng_is_untouched(model, counted):
    """A store neither reads nor sets the global random states."""

    def states():
        return [random.getstate(), str(np.random.get_state()), torch.get_rng_state().tolist()]

    before = states()
    batches, _ = counted_batches(model, counted)
    assert states() == before
    torch.manual_seed(123)
    np.random.seed(123)
    assert torch.equal(counted_batches(model, counted)[0], batches)


# Bad input


def test_exactly_enough_data_is_enough(model, jsonl):
    """A dataset with exactly the needed tokens lasts to the last batch; with one context fewer it is an error."""
    path = jsonl(counted_documents(48, 400), "tokens", "enough.jsonl")
    store = ActivationsStore(model, stream_cfg(dataset_path=path, num_tokens=361))  # rounded up to ten batches
    assert [len(store.next_batch()) for _ in range(10)] == [40] * 10
    for num_train in (399, 400 - SEQ_LEN):
        path = jsonl(counted_documents(48, num_train), "tokens", f"short{num_train}.jsonl")
        message = store_error(model, dataset_path=path, num_tokens=361)
        assert path in message and "too short" in message and "361" in message and "384" in message


def test_too_short_for_the_held_out_tokens(model, jsonl):
    """A dataset with fewer than eval_tokens is too short, and the message names eval_tokens."""
    message = store_error(model, dataset_path=jsonl(counted_documents(47, 0), "tokens"))
    assert "too short" in message and "47" in message and "eval_tokens = 48" in message


def test_too_short_for_very_many_held_out_tokens(model, jsonl, monkeypatch):
    """Reading stops at the end of the data, however many eval_tokens are wanted."""
    real, calls = TextStream.contexts, []
    monkeypatch.setattr(TextStream, "contexts", lambda *args: calls.append(args) or real(*args))
    message = store_error(model, dataset_path=jsonl(counted_documents(64, 0), "tokens"), eval_tokens=16_000)
    assert "too short: it has 64 tokens" in message and len(calls) == 64 // SEQ_LEN + 1


def test_the_end_of_the_data_is_an_error(model, jsonl):
    """It is never a short batch."""
    path = jsonl(counted_documents(48, 400), "tokens")
    store = ActivationsStore(model, stream_cfg(dataset_path=path))
    for _ in range(10):
        store.next_batch()
    with pytest.raises(InputError, match="has no text left after the 400 tokens of num_tokens"):
        while True:
            assert len(store.next_batch()) == 40


BAD_FILES = {
    "missing.jsonl": (None, "no such file or folder"),
    "/nowhere/data": (None, "no such file or folder"),
    "empty.jsonl": (b"", "empty"),
    "empty.txt": (b"", "short|empty"),
    "no_column.jsonl": (b'{"body": "a", "title": "b"}\n', "none of the columns tokens, input_ids, text.*body, title"),
    "not_json.jsonl": (b'{"text": "a"}\nthis is not JSON\n', "cannot be"),
    "latin1.txt": ("é".encode("latin-1") * 1000, "utf-8"),
    "broken.parquet": (b"PAR1 no it is not", "cannot be"),
    "broken.arrow": (b"not an arrow file", "cannot be"),
    "data.pdf": (b"%PDF-1.7", "pdf"),
    "too_large.jsonl": (json.dumps({"tokens": [1, 4096]}).encode(), "4096 in column 'tokens'.*4095"),
    "negative.jsonl": (json.dumps({"tokens": [5, -1, 7]}).encode(), "has -1 in column 'tokens'"),
    "words.jsonl": (json.dumps({"tokens": ["hello", "world"]}).encode(), "'hello' in column 'tokens'"),
    "fractions.jsonl": (json.dumps({"input_ids": [1.5] * 100}).encode() + b"\n", "1.5 in column 'input_ids'"),
    "numbers.jsonl": (b'{"text": 5}\n' * 3, "5 of type int in column 'text'"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_data_is_one_clear_line(model, tmp_path, name):
    """Invalid data is an InputError of one line that names dataset_path and the problem."""
    content, pattern = BAD_FILES[name]
    path = tmp_path / name if "/" not in name else Path(name)
    if content is not None:
        path.write_bytes(content)
    message = store_error(model, dataset_path=str(path))
    assert message.startswith(f"dataset_path = {str(path)!r}")
    message = message.replace(str(path), "")
    assert re.search(pattern, message), message


def test_bad_folders_are_one_clear_line(model, tmp_path):
    """A folder without data, or with several types of file, is an InputError that says so."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "mixed").mkdir()
    (tmp_path / "mixed" / "a.txt").write_text("a")
    (tmp_path / "mixed" / "b.jsonl").write_text('{"text": "b"}\n')
    assert str(tmp_path / "empty") in store_error(model, dataset_path=str(tmp_path / "empty"))
    message = store_error(model, dataset_path=str(tmp_path / "mixed"))
    assert str(tmp_path / "mixed") in message and ".jsonl, .txt" in message


def test_eval_skip_positions_beyond_a_reduced_seq_len(model, jsonl, texts):
    """eval_skip_positions that leave no position of the reduced contexts are an InputError, not NaN."""
    message = store_error(model, dataset_path=jsonl(texts * 8), seq_len=256, eval_skip_positions=127, eval_tokens=200)
    assert "eval_skip_positions = 127" in message

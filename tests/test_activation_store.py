"""The stream of activations: every token once, held-out tokens apart, and bad data said in one line."""

import inspect
import json
import random
import re
import shutil
import textwrap
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
import transformers
from tokenizers import Tokenizer

from activation_store import ActivationsStore
from config import InputError, get_default_cfg, post_init_cfg
from language_model import check_hook_point, load_model

DEMO_LM = Path(__file__).resolve().parent.parent / "demo" / "lm"
BOS = 0
SEQ_LEN = 16


def make_cfg(**changes) -> dict:
    """A small completed config on the demo's language model."""
    cfg = get_default_cfg() | dict(
        model_name=str(DEMO_LM), layer=2, act_size=128, dict_size=64, top_k=4, device="cpu", seq_len=SEQ_LEN,
        batch_size=40, num_tokens=400, model_batch_size=3, num_batches_in_buffer=2, eval_tokens=3 * SEQ_LEN,
    )  # fmt: skip
    return post_init_cfg(cfg | changes)


@pytest.fixture(scope="module")
def model():
    return load_model(make_cfg())


@pytest.fixture(scope="module")
def texts() -> list[str]:
    """The functions of a module of the standard library, an empty document and one that is not ASCII."""
    functions = [inspect.getsource(value) for _, value in inspect.getmembers(textwrap, inspect.isroutine)]
    methods = [inspect.getsource(value) for _, value in inspect.getmembers(textwrap.TextWrapper, inspect.isfunction)]
    return [*functions[:2], "", "naïve café — 東京 🙂\n\n  indented", *functions[2:], "x", *methods]


@pytest.fixture(scope="module")
def tokens(texts) -> list[list[int]]:
    """Plain reference: the documents as BOS + their tokens, those without tokens left out."""
    tokenizer = Tokenizer.from_file(str(DEMO_LM / "tokenizer.json"))
    return [[BOS] + tokenizer.encode(text, add_special_tokens=False).ids for text in texts if text]


@pytest.fixture
def jsonl(tmp_path):
    """Write a column of documents as JSON lines; the path."""

    def write(documents: list, column: str = "text", name: str = "data.jsonl") -> str:
        path = tmp_path / name
        path.write_text("".join(json.dumps({"id": i, column: doc}) + "\n" for i, doc in enumerate(documents)))
        return str(path)

    return write


def reference_contexts(tokens: list[list[int]], seq_len: int, num_eval: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Held-out contexts, and those to train on: they begin with the token after the last held-out one."""
    stream = [token for document in tokens for token in document]
    contexts = torch.tensor(stream[: len(stream) // seq_len * seq_len]).view(-1, seq_len)
    return contexts[:num_eval], contexts[num_eval:]


def all_contexts(store) -> torch.Tensor:
    """Every context that the store has left."""
    contexts = []
    while True:
        try:
            contexts.append(store.get_batch_tokens())
        except InputError:
            return torch.cat(contexts)


def sorted_rows(rows: torch.Tensor) -> np.ndarray:
    """Rows in lexicographic order: the multiset of them."""
    rows = rows.numpy()
    return rows[np.lexsort(rows.T[::-1])]


def counted_documents(num_eval: int, num_train: int) -> list[list[int]]:
    """A held-out document and training documents of exactly so many tokens, BOS included; no other token repeats."""
    lengths, ids = [num_eval], iter(range(1, 4096))
    while num_train > 0:
        lengths.append(min(num_train, 7 + 3 * len(lengths)))
        num_train -= lengths[-1]
    return [[BOS] + [next(ids) for _ in range(length - 1)] for length in lengths]


# Text -> tokens


def test_contexts_equal_a_plain_reference(model, jsonl, texts, tokens):
    """Documents become BOS + tokens, joined and cut into contexts, and no token is lost over many refills."""
    heldout, rest = reference_contexts(tokens, SEQ_LEN, 3)
    store = ActivationsStore(model, make_cfg(dataset_path=jsonl(texts)))
    assert torch.equal(store.eval_contexts, heldout)
    contexts = all_contexts(store)
    assert len(contexts) > 10 * store.cfg["model_batch_size"]
    assert torch.equal(contexts, rest)


def test_training_goes_through_the_stream_in_order(model, jsonl, texts, tokens):
    """The batches are harvested from the contexts of the reference, in its order, one buffer after another."""
    _, rest = reference_contexts(tokens, SEQ_LEN, 3)
    num_tokens = rest.numel() // 40 * 40
    store = ActivationsStore(model, make_cfg(dataset_path=jsonl(texts), num_tokens=num_tokens))
    batches = [store.next_batch() for _ in range(num_tokens // 40)]
    reference = torch.cat([store.get_activations(part) for part in rest.split(3)]).flatten(0, 1)
    # A buffer is the next rows of the reference: as many as two forwards give, in whole batches.
    rows = 2 * 3 * SEQ_LEN // 40 * 40
    for i in range(0, num_tokens - rows, rows):
        buffer = torch.cat(batches[i // 40 : (i + rows) // 40])
        assert np.array_equal(sorted_rows(buffer), sorted_rows(reference[i : i + rows]))


@pytest.fixture(scope="module")
def formats(tmp_path_factory, texts) -> dict[str, str]:
    """The same documents in every form of local data."""
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
def test_every_form_of_local_data_gives_the_same_tokens(model, formats, tokens, name):
    """Files, folders of files and saved datasets: same documents, same contexts, none lost to a look at the columns."""
    heldout, rest = reference_contexts(tokens, SEQ_LEN, 3)
    store = ActivationsStore(model, make_cfg(dataset_path=formats[name]))
    assert torch.equal(store.eval_contexts, heldout)
    assert torch.equal(all_contexts(store), rest)


def test_a_text_file_is_one_document(model, tmp_path, texts):
    """A .txt file is one document: its start is held out, and what follows is trained on."""
    path = tmp_path / "book.txt"
    path.write_text("\n\n".join(texts), encoding="utf-8", newline="")
    ids = Tokenizer.from_file(str(DEMO_LM / "tokenizer.json")).encode("\n\n".join(texts), add_special_tokens=False).ids
    stream = torch.tensor([BOS] + ids)
    store = ActivationsStore(model, make_cfg(dataset_path=str(path)))
    assert torch.equal(store.eval_contexts.flatten(), stream[: 3 * SEQ_LEN])
    trained_on = all_contexts(store).flatten()
    rest = stream[3 * SEQ_LEN :]
    assert torch.equal(trained_on, rest[: len(rest) // SEQ_LEN * SEQ_LEN]), "the document goes on, nothing is lost"


@pytest.mark.parametrize("column", ["text", "tokens", "input_ids"])
def test_columns(model, jsonl, texts, tokens, column):
    """text, tokens and input_ids are recognised; token documents that begin with BOS get no second one."""
    documents = texts if column == "text" else tokens
    store = ActivationsStore(model, make_cfg(dataset_path=jsonl(documents, column)))
    assert torch.equal(all_contexts(store), reference_contexts(tokens, SEQ_LEN, 3)[1])


def test_token_documents_without_bos_get_one(model, jsonl, tokens):
    """BOS is put before token documents that lack it; empty ones are passed over."""
    documents = [document[1:] for document in tokens]
    documents.insert(2, [])
    store = ActivationsStore(model, make_cfg(dataset_path=jsonl(documents, "tokens")))
    assert torch.equal(all_contexts(store), reference_contexts(tokens, SEQ_LEN, 3)[1])


def test_split_of_a_saved_dataset_dict(model, formats):
    """dataset_split picks the split of a saved DatasetDict; one that is not there is an error that lists them."""
    with pytest.raises(InputError, match="no split 'validation'.*test, train"):
        ActivationsStore(model, make_cfg(dataset_path=formats["dataset_dict"], dataset_split="validation"))
    with pytest.raises(InputError, match="too short"):  # the split "test" has one document
        ActivationsStore(model, make_cfg(dataset_path=formats["dataset_dict"], dataset_split="test", num_tokens=10_000))


def test_contexts_are_cut_to_what_the_model_can_take(model, jsonl, texts, tokens, capsys):
    """A seq_len beyond the model's context is cut to it, and the log says so."""
    documents = texts * 8
    cfg = make_cfg(dataset_path=jsonl(documents), seq_len=1000, eval_tokens=200)
    store = ActivationsStore(model, cfg)
    assert store.seq_len == 128 and store.eval_contexts.shape == (2, 128)
    assert torch.equal(all_contexts(store), reference_contexts(tokens * 8, 128, 2)[1])
    assert "128" in capsys.readouterr().err


# Held out


def test_held_out_tokens_are_apart_from_the_training_tokens(model, jsonl):
    """The stream's first eval_tokens are held out, and no token of theirs is ever trained on."""
    documents = counted_documents(50, 10 * 40)  # the first document goes on in the first context trained on
    store = ActivationsStore(model, make_cfg(dataset_path=jsonl(documents, "tokens")))
    heldout = store.eval_contexts.flatten().tolist()
    assert heldout == documents[0][:48]
    trained_on = all_contexts(store).flatten().tolist()
    assert not set(heldout) - {BOS} & set(trained_on)
    assert trained_on == [token for document in documents for token in document][48 : 48 + len(trained_on)]
    assert len(trained_on) == 400


def test_eval_tokens_are_rounded_up_to_whole_contexts(model, jsonl, texts):
    """eval_tokens = 33 of 16-token contexts holds out three contexts."""
    assert ActivationsStore(model, make_cfg(dataset_path=jsonl(texts), eval_tokens=33)).eval_contexts.shape == (3, 16)


def test_fingerprint_tells_held_out_tokens_apart(model, jsonl, texts):
    """The fingerprint is that of the held-out tokens: the same for the same data, another for another cut."""
    path = jsonl(texts)
    prints = [ActivationsStore(model, make_cfg(dataset_path=path, eval_tokens=n)).fingerprint() for n in (48, 48, 64)]
    assert prints[0] == prints[1] != prints[2]


# Batches


@pytest.fixture(scope="module")
def counted(tmp_path_factory) -> str:
    """48 tokens to hold out, then 400 to train on: ten batches of 40, twenty-five contexts of 16."""
    path = tmp_path_factory.mktemp("counted") / "data.jsonl"
    path.write_text("".join(json.dumps({"tokens": document}) + "\n" for document in counted_documents(48, 400)))
    return str(path)


def stream_of(model, path, **changes) -> tuple[torch.Tensor, torch.Tensor]:
    """All ten batches [10, 40, d] of the counted data, and its activations in the order of the text [400, d]."""
    store = ActivationsStore(model, make_cfg(dataset_path=path, **changes))
    batches = torch.stack([store.next_batch() for _ in range(10)])
    contexts = torch.tensor([t for document in counted_documents(48, 400)[1:] for t in document]).view(-1, SEQ_LEN)
    size = store.cfg["model_batch_size"]
    return batches, torch.cat([store.get_activations(part) for part in contexts.split(size)]).flatten(0, 1)


@pytest.mark.parametrize("model_batch_size, buffer", [(3, 2), (1, 3), (25, 1), (7, 100), (4, 4)])
def test_every_training_token_is_handed_out_exactly_once(model, counted, model_batch_size, buffer):
    """Over all batches each activation comes once, whatever the buffer; none is lost where buffers join."""
    batches, in_order = stream_of(model, counted, model_batch_size=model_batch_size, num_batches_in_buffer=buffer)
    assert batches.shape == (10, 40, 128)
    assert np.array_equal(sorted_rows(batches.flatten(0, 1)), sorted_rows(in_order))


def test_batches_are_whole_when_the_buffer_is_smaller_than_a_batch(model, counted):
    """next_batch gives batch_size activations even where num_batches_in_buffer forwards hold fewer."""
    store = ActivationsStore(
        model, make_cfg(dataset_path=counted, batch_size=100, model_batch_size=1, num_batches_in_buffer=2)
    )
    rows = [store.next_batch() for _ in range(4)]
    assert [len(row) for row in rows] == [100] * 4
    assert len(np.unique(torch.cat(rows).numpy(), axis=0)) > 390


def test_batches_are_shuffled_and_deterministic(model, counted):
    """The same shuffle_seed gives the same batches, another one others; the order is not that of the text."""
    first, in_order = stream_of(model, counted, model_batch_size=8)
    again, _ = stream_of(model, counted, model_batch_size=8)
    other, _ = stream_of(model, counted, model_batch_size=8, shuffle_seed=50)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert np.array_equal(sorted_rows(first.flatten(0, 1)), sorted_rows(other.flatten(0, 1)))
    place = {row.numpy().tobytes(): i for i, row in enumerate(in_order)}
    places = np.array([place[row.numpy().tobytes()] for row in first.flatten(0, 1)])
    assert (np.diff(places) == 1).mean() < 0.1, "neighbours in the text are not neighbours in a batch"


def test_seed_of_the_weights_does_not_touch_the_stream(model, counted):
    """Runs of different seeds see the same batches."""
    assert torch.equal(stream_of(model, counted, seed=1)[0], stream_of(model, counted, seed=2)[0])


def test_global_rng_is_left_alone(model, counted):
    """Building a store and drawing from it neither reads nor sets the global random states."""

    def states():
        return [random.getstate(), str(np.random.get_state()), torch.get_rng_state().tolist()]

    before = states()
    batches, _ = stream_of(model, counted)
    assert states() == before
    torch.manual_seed(123)
    np.random.seed(123)
    assert torch.equal(stream_of(model, counted)[0], batches)


# Tokens -> activations


@pytest.fixture(scope="module")
def hf_model():
    return transformers.GPT2LMHeadModel.from_pretrained(DEMO_LM, attn_implementation="eager").eval()


@torch.no_grad()
def activations_by_hand(hf_model, contexts, site: str, layer: int) -> torch.Tensor:
    """What transformers' own model has at the site, without transformer_lens."""
    seen, block = {}, hf_model.transformer.h[layer]
    handles = [
        block.attn.register_forward_hook(lambda module, args, output: seen.update(attn_out=output[0])),
        block.mlp.register_forward_hook(lambda module, args, output: seen.update(mlp_out=output)),
        block.ln_2.register_forward_hook(lambda module, args, output: seen.update(resid_mid=args[0])),
    ]
    hidden = hf_model(contexts, output_hidden_states=True).hidden_states
    for handle in handles:
        handle.remove()
    return {"resid_pre": hidden[layer], "resid_post": hidden[layer + 1], **seen}[site]


@pytest.mark.parametrize("site", ["resid_pre", "resid_mid", "resid_post", "mlp_out", "attn_out"])
def test_sites_are_what_they_are_called(model, hf_model, jsonl, texts, site):
    """Each site gives the activations that transformers' own model has there, as does its full hook name."""
    path = jsonl(texts)
    store = ActivationsStore(model, make_cfg(dataset_path=path, site=site, layer=1))
    contexts = store.get_batch_tokens()
    acts = store.get_activations(contexts)
    assert acts.shape == (3, SEQ_LEN, 128)
    torch.testing.assert_close(acts, activations_by_hand(hf_model, contexts, site, 1), rtol=1e-4, atol=1e-5)
    by_name = ActivationsStore(model, make_cfg(dataset_path=path, site=f"blocks.1.hook_{site}", layer=3))
    assert torch.equal(by_name.get_activations(contexts), acts)


@pytest.mark.parametrize("site", ["resid_pre", "resid_post", "blocks.2.ln2.hook_normalized", "blocks.2.mlp.hook_post"])
def test_activations_equal_run_with_cache(model, counted, site):
    """get_activations gives what run_with_cache gives, any width, by full hook names too."""
    cfg = make_cfg(dataset_path=counted, site=site, act_size=None)
    store = ActivationsStore(model, cfg)
    contexts = store.eval_contexts
    _, cache = model.run_with_cache(contexts, names_filter=[cfg["hook_point"]], stop_at_layer=cfg["layer"] + 1)
    # Fused attention sums in another order than the bridge's.
    torch.testing.assert_close(store.get_activations(contexts), cache[cfg["hook_point"]], rtol=1e-4, atol=1e-5)
    assert store.act_size == cache[cfg["hook_point"]].shape[-1]


def test_layers_above_the_hook_point_are_not_run(model, counted):
    """The forward stops at the hook point: neither that block's own parts after it nor later blocks are called."""
    store = ActivationsStore(model, make_cfg(dataset_path=counted))  # resid_pre of block 2
    called, blocks = [], model.plain.transformer.h
    handles = [
        part.register_forward_hook(lambda *_, name=name: called.append(name))
        for name, part in {"1": blocks[1], "2.attn": blocks[2].attn, "3": blocks[3]}.items()
    ]
    store.get_activations(store.eval_contexts)
    harvesting = list(called)
    model.plain(store.eval_contexts)
    for handle in handles:
        handle.remove()
    assert harvesting == ["1"]
    assert called == ["1", "1", "2.attn", "3"], "a whole forward does call them"


def test_both_forms_of_the_model_have_the_same_weights_in_memory(model):
    """The plain form that is harvested has the bridge's own tensors: the weights are in memory once."""
    plain = {name: tensor.data_ptr() for name, tensor in model.plain.named_parameters()}
    bridge = {tensor.data_ptr() for tensor in model.original_model.parameters()}
    assert plain and set(plain.values()) <= bridge


@pytest.mark.parametrize("site", ["blocks.2.ln2.hook_normalized", "blocks.2.mlp.hook_post"])
def test_hook_points_that_only_the_bridge_has(model, counted, capsys, site):
    """Where transformers' own model has no such place the bridge is run, to the bit, and a line says so."""
    cfg = make_cfg(dataset_path=counted, site=site, act_size=None)
    store = ActivationsStore(model, cfg)
    assert "which is slower" in capsys.readouterr().err
    _, cache = model.run_with_cache(store.eval_contexts, names_filter=[site], stop_at_layer=cfg["layer"] + 1)
    assert torch.equal(store.get_activations(store.eval_contexts), cache[site])


def test_harvesting_leaves_no_trace_in_the_model(model, counted):
    """No hook stays behind, the model stays in eval mode without gradients, and a whole forward still works."""

    def hooks_of_plain():
        return [len(part._forward_hooks) + len(part._forward_pre_hooks) for part in model.plain.modules()]

    before, hooks = model(torch.arange(20)[None]), hooks_of_plain()
    stream_of(model, counted)
    assert not any(point.fwd_hooks or point.bwd_hooks for point in model.hook_dict.values())
    assert hooks_of_plain() == hooks
    assert not model.training and not any(parameter.requires_grad for parameter in model.parameters())
    assert torch.equal(model(torch.arange(20)[None]), before)


# Other language models


def copy_of_demo_lm(folder: Path, without: tuple = ()) -> Path:
    shutil.copytree(DEMO_LM, folder)
    for file in without:
        (folder / file).unlink()
    return folder


@pytest.mark.parametrize("family", ["Llama", "GPTNeoX"])
def test_other_architectures(tmp_path, jsonl, texts, tokens, family):
    """A model of another architecture loads from its directory and is harvested at the right place."""
    folder = copy_of_demo_lm(tmp_path / "lm", without=("model.safetensors",))
    config = getattr(transformers, f"{family}Config")(
        vocab_size=4096, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
        max_position_embeddings=64, bos_token_id=BOS, eos_token_id=BOS,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        hf_model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    hf_model.save_pretrained(folder)

    cfg = make_cfg(model_name=str(folder), dataset_path=jsonl(texts), layer=1, act_size=32)
    store = ActivationsStore(load_model(cfg), cfg)
    contexts = store.get_batch_tokens()
    assert torch.equal(contexts, reference_contexts(tokens, SEQ_LEN, 3)[1][:3])
    with torch.no_grad():
        hidden = hf_model(contexts, output_hidden_states=True).hidden_states[1]
    torch.testing.assert_close(store.get_activations(contexts), hidden, rtol=1e-4, atol=1e-5)
    assert store.next_batch().shape == (40, 32)


@pytest.mark.parametrize("other_name", [False, True])
def test_a_tokenizer_without_bos(tmp_path, jsonl, texts, tokens, capsys, other_name):
    """A model without BOS gets none: documents are joined as they are, and the log says so."""
    folder = copy_of_demo_lm(tmp_path / "lm")
    if other_name:  # nor has it the token that is often put in its place
        path = folder / "tokenizer.json"
        path.write_text(path.read_text(encoding="utf-8").replace("<|endoftext|>", "<|sep|>"), encoding="utf-8")
    for name in ("config.json", "tokenizer_config.json"):
        content = json.loads((folder / name).read_text())
        for key in ("bos_token", "eos_token", "unk_token", "bos_token_id", "eos_token_id"):
            content.pop(key, None)
        (folder / name).write_text(json.dumps(content))
    cfg = make_cfg(model_name=str(folder), dataset_path=jsonl(texts))
    store = ActivationsStore(load_model(cfg), cfg)
    assert "no BOS" in capsys.readouterr().err
    heldout, rest = reference_contexts([document[1:] for document in tokens], SEQ_LEN, 3)
    assert torch.equal(store.eval_contexts, heldout)
    assert torch.equal(all_contexts(store), rest)
    store = ActivationsStore(store.model, cfg)
    assert torch.isfinite(store.next_batch()).all()


# Bad input


def one_line(caught) -> str:
    message = str(caught.value)
    assert message and "\n" not in message
    return message


def store_error(model, **changes) -> str:
    with pytest.raises(InputError) as caught:
        store = ActivationsStore(model, make_cfg(**changes))
        store.next_batch()
    return one_line(caught)


def test_exactly_enough_data_is_enough(model, jsonl):
    """A dataset with just the tokens asked passes and lasts to the last batch; one context fewer is an error."""
    path = jsonl(counted_documents(48, 400), "tokens", "enough.jsonl")
    store = ActivationsStore(model, make_cfg(dataset_path=path, num_tokens=361))  # rounded up to ten batches
    assert [len(store.next_batch()) for _ in range(10)] == [40] * 10
    for num_train in (399, 400 - SEQ_LEN):
        path = jsonl(counted_documents(48, num_train), "tokens", f"short{num_train}.jsonl")
        message = store_error(model, dataset_path=path, num_tokens=361)
        assert path in message and "too short" in message and "361" in message and "384" in message


def test_too_short_for_the_held_out_tokens(model, jsonl):
    """A dataset that ends before eval_tokens is too short, and the message names eval_tokens."""
    message = store_error(model, dataset_path=jsonl(counted_documents(47, 0), "tokens"))
    assert "too short" in message and "47" in message and "eval_tokens = 48" in message


def test_data_that_shrinks_is_noticed(model, jsonl):
    """Where the length could not be known before, the end of the data is an error, not a short batch."""
    path = jsonl(counted_documents(48, 400), "tokens")
    store = ActivationsStore(model, make_cfg(dataset_path=path))
    for _ in range(10):
        store.next_batch()
    with pytest.raises(InputError, match="too short"):
        while True:
            assert len(store.next_batch()) == 40


BAD_FILES = {
    "missing.jsonl": (None, "no such file"),
    "/nowhere/data": (None, "no such file"),
    "empty.jsonl": (b"", "empty"),
    "empty.txt": (b"", "short|empty"),
    "no_column.jsonl": (b'{"body": "a", "title": "b"}\n', "none of the columns tokens, input_ids, text.*body, title"),
    "not_json.jsonl": (b'{"text": "a"}\nthis is not JSON\n', "cannot be"),
    "latin1.txt": ("é".encode("latin-1") * 1000, "utf-8"),
    "broken.parquet": (b"PAR1 no it is not", "cannot be"),
    "broken.arrow": (b"not an arrow file", "cannot be"),
    "data.csv": (b"text\nhello\n", "csv"),
    "too_large.jsonl": (json.dumps({"tokens": [1, 4096]}).encode(), "tokens 4096.*4095"),
    "negative.jsonl": (json.dumps({"tokens": [5, -1, 7]}).encode(), "has in its tokens -1"),
    "words.jsonl": (json.dumps({"tokens": ["hello", "world"]}).encode(), "tokens.*(hello|str)"),
    "fractions.jsonl": (json.dumps({"input_ids": [1.5] * 100}).encode() + b"\n", "input_ids.*(1.5|float)"),
    "numbers.jsonl": (b'{"text": 5}\n' * 3, "text.*(5|int)"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_data_is_one_clear_line(model, tmp_path, name):
    """Data that cannot be used is an InputError of one line that names dataset_path and what is wrong with it."""
    content, pattern = BAD_FILES[name]
    path = tmp_path / name if "/" not in name else Path(name)
    if content is not None:
        path.write_bytes(content)
    message = store_error(model, dataset_path=str(path))
    assert message.startswith(f"dataset_path = {str(path)!r}")
    message = message.replace(str(path), "")
    assert re.search(pattern, message), message


def test_bad_folders_are_one_clear_line(model, tmp_path, texts):
    """A folder without data, or with several kinds of it, is an InputError that says so."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "mixed").mkdir()
    (tmp_path / "mixed" / "a.txt").write_text("a")
    (tmp_path / "mixed" / "b.jsonl").write_text('{"text": "b"}\n')
    assert str(tmp_path / "empty") in store_error(model, dataset_path=str(tmp_path / "empty"))
    message = store_error(model, dataset_path=str(tmp_path / "mixed"))
    assert str(tmp_path / "mixed") in message and ".jsonl, .txt" in message


def test_act_size_and_layer_that_do_not_fit(model, counted):
    """A wrong act_size or layer is found out at once; the message names the value and the right ones."""
    message = store_error(model, dataset_path=counted, act_size=64)
    assert "act_size = 64" in message and "128" in message
    message = store_error(model, dataset_path=counted, layer=4)
    assert "blocks.4.hook_resid_pre" in message and "0 to 3" in message
    assert "blocks.1.hook_nothing" in store_error(model, dataset_path=counted, site="blocks.1.hook_nothing")
    assert check_hook_point(model, make_cfg(act_size=None)) == 128


@pytest.mark.parametrize("site", ["blocks.1.attn.hook_pattern", "blocks.1.hook_q_input", "blocks.1.attn.hook_result"])
def test_hook_points_that_give_no_residual_vectors(model, counted, site):
    """A hook point that exists but cannot be harvested is an InputError that names it."""
    assert site in store_error(model, dataset_path=counted, site=site)


def test_skipping_more_than_a_cut_context(model, jsonl, texts):
    """eval_skip_positions that leave nothing of the contexts the model can take is an InputError, not NaN."""
    message = store_error(model, dataset_path=jsonl(texts * 8), seq_len=256, eval_skip_positions=127, eval_tokens=200)
    assert "eval_skip_positions = 127" in message


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def drop_a_block(path: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = {name: tensor for name, tensor in load_file(path).items() if ".h.1." not in name}
    save_file(weights, path, metadata={"format": "pt"})


@pytest.mark.parametrize(
    "file, damage, pattern",
    [
        ("config.json", Path.unlink, r"no config\.json"),
        ("config.json", lambda path: path.write_text("{broken"), "cannot be loaded"),
        ("model.safetensors", Path.unlink, "no weights"),
        ("model.safetensors", lambda path: path.write_bytes(b"garbage" * 99), "cannot be loaded"),
        ("model.safetensors", truncate, "cannot be loaded"),
        ("model.safetensors", drop_a_block, "weights"),
        ("tokenizer.json", Path.unlink, "no tokenizer"),
        ("tokenizer.json", lambda path: path.write_text("{}"), "cannot be loaded"),
    ],
)
def test_bad_model_directory_is_one_clear_line(tmp_path, file, damage, pattern):
    """A model directory that lacks something or is damaged is an InputError that names it; nothing is made up."""
    folder = copy_of_demo_lm(tmp_path / "lm")
    damage(folder / file)
    with pytest.raises(InputError, match=pattern) as caught:
        load_model(make_cfg(model_name=str(folder)))
    assert f"model_name = {str(folder)!r}" in one_line(caught)


def test_missing_model_directory(tmp_path):
    """A path that is no folder is an InputError, not a search on the hub."""
    with pytest.raises(InputError, match="no such folder") as caught:
        load_model(make_cfg(model_name=str(tmp_path / "none")))
    assert str(tmp_path / "none") in one_line(caught)

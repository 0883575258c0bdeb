"""Config dicts: the paper's defaults, what is rejected and how, and names that tell runs apart."""

import copy
import re

import pytest
import torch

from config import KEYS, get_default_cfg, keys_table, post_init_cfg
from console import InputError
from sae import SAE_CLASSES

pytestmark = pytest.mark.fast

# For every key a value that is allowed and is not the default.
OTHER_VALUE = {
    "model_dtype": "bfloat16",
    "num_epochs": 2,
    "bad_documents": "skip",
    "stream_retries": 3,
    "bos_per_context": True,
    "activation_dtype": "float16",
    "activation_cache": "cache",
    "sae_type": "topk",
    "dict_size": 6144,
    "top_k": 33,
    "top_k_aux": 256,
    "aux_penalty": 0.03,
    "l1_coeff": 1e-9,
    "bandwidth": 0.002,
    "n_batches_to_dead": 6,
    "feature_shards": 2,
    "input_unit_norm": False,
    "dtype": "float64",
    "seed": 50,
    "batch_size": 2048,
    "num_tokens": 1_000_000_001,
    "lr": 3.0000001e-4,
    "lr_warmup_steps": 1,
    "lr_decay_steps": 1,
    "b_dec_init": "mean",
    "beta1": 0.91,
    "beta2": 0.999,
    "max_grad_norm": 1.0,
    "model_name": "gpt2-medium",
    "site": "resid_post",
    "layer": 7,
    "act_size": 1024,
    "device": "cpu:0",
    "dataset_path": "NeelNanda/openwebtext-tokenized-9b",
    "dataset_config": "en",
    "dataset_split": "validation",
    "dataset_revision": "main",
    "dataset_column": "content",
    "seq_len": 64,
    "model_batch_size": 256,
    "matryoshka_sizes": [64, 12288],
    "num_batches_in_buffer": 11,
    "shuffle_seed": 50,
    "exclude_tokens": [0, 3],
    "eval_tokens": 65_537,
    "eval_skip_positions": 2,
    "log_freq": 51,
    "perf_log_freq": 1001,
    "checkpoint_freq": 10_001,
    "keep_checkpoints": 3,
    "save_errors": "go_on",
    "output_dir": "elsewhere",
    "sweep": "another",
    "wandb_project": "another",
    "wandb_mode": "offline",
}

DEFAULTS = get_default_cfg() | {"device": "cpu"}


def completed(**changes) -> dict:
    return post_init_cfg(DEFAULTS | changes)


def rejection(**changes) -> str:
    """The message with which a config is rejected: a single line."""
    with pytest.raises(InputError) as caught:
        completed(**changes)
    message = str(caught.value)
    assert message and "\n" not in message
    return message


def test_defaults_are_the_papers():
    """The default config is the paper's BatchTopK run."""
    paper = dict(
        sae_type="batchtopk", seed=49, batch_size=4096, lr=3e-4, beta1=0.9, beta2=0.99, num_tokens=1_000_000_000,
        seq_len=128, model_name="gpt2-small", site="resid_pre", layer=8, act_size=768, dict_size=12288, top_k=32,
        top_k_aux=512, aux_penalty=1 / 32, bandwidth=0.001, n_batches_to_dead=5, model_batch_size=512,
        num_batches_in_buffer=10, input_unit_norm=True, max_grad_norm=100000, dataset_path="Skylion007/openwebtext",
        perf_log_freq=1000, checkpoint_freq=10000, eval_skip_positions=1, output_dir="runs",
    )  # fmt: skip
    defaults = get_default_cfg()
    assert {key: defaults[key] for key in paper} == paper
    assert post_init_cfg({})["hook_point"] == "blocks.8.hook_resid_pre"


def test_table_of_keys():
    """`python config.py` prints a row for every key, in the order of the dict; a default is what a user would write."""
    rows = re.findall(r"^\| `(\w+)` \| (.+?) \| (.+) \|$", keys_table(), re.MULTILINE)
    assert [key for key, _, _ in rows] == list(DEFAULTS)
    for key, default, doc in rows:
        assert doc == KEYS[key].doc
        if not isinstance(DEFAULTS[key], str):
            assert eval(default) == DEFAULTS[key]
    assert "| `device` | best present |" in keys_table() and "\n| **Records** | | |\n| `log_freq` |" in keys_table()


def test_sae_types_are_those_of_sae():
    """config.py names the SAE types, and sae.py has their classes."""
    assert tuple(SAE_CLASSES) == KEYS["sae_type"].choices


def test_defaults_are_a_fresh_dict():
    """Editing one config does not change the next one."""
    get_default_cfg()["lr"] = 1.0
    assert get_default_cfg()["lr"] == 3e-4


@pytest.mark.parametrize("key", list(DEFAULTS))
def test_a_key_changes_the_name_or_is_documented_as_not_changing_the_result(key):
    """Two configs that differ in a key that changes the result have different names; others do not."""
    before, after = completed(), completed(**{key: OTHER_VALUE[key]})
    assert after[key] == OTHER_VALUE[key] != before[key], "the value is taken over"
    assert (before["name"] == after["name"]) == (not KEYS[key].in_name)


def test_keys_left_out_of_the_name_do_not_change_the_result():
    """What is left out of the name is how a run is recorded, how its data come, and what follows from other keys."""
    records = {"log_freq", "perf_log_freq", "checkpoint_freq", "output_dir", "sweep", "wandb_project", "wandb_mode"}
    no_result = records | {
        "keep_checkpoints",
        "save_errors",
        "device",
        "stream_retries",
        "activation_cache",
        "feature_shards",
    }
    assert {key for key in KEYS if not KEYS[key].in_name} == no_result | {"act_size"}
    assert {key for key in KEYS if not KEYS[key].in_point} == no_result | {"seed"}


NAMES = {  # as they were in runs of earlier versions
    "batchtopk_12288_k32_seed49_fe20d5f7": {},
    "topk_12288_k64_seed49_8e8e8757": dict(sae_type="topk", top_k=64),
    "jumprelu_12288_l1_0.004_seed49_16481b3e": dict(sae_type="jumprelu", l1_coeff=0.004, bandwidth=0.002),
    "vanilla_12288_l1_0.001_seed50_5589614d": dict(
        sae_type="vanilla", l1_coeff=1e-3, seed=50, site="blocks.3.hook_mlp_out"
    ),
    "batchtopk_12288_k32_seed49_647f3837": dict(exclude_tokens=[3, 0], dataset_column="content"),
    "batchtopk_12288_k32_seed49_5b2671cd": dict(num_tokens=1e9, lr=1, sweep="x", act_size=None, log_freq=1),
    "batchtopk_12288_k32_seed49_b7f073e8": dict(
        dataset_config="en", dataset_revision="main", bos_per_context=True, seq_len=64, eval_tokens=1000
    ),
}


@pytest.mark.parametrize("name", NAMES)
def test_names_stay_as_they_were(name):
    """Runs keep the names that they had: also where a key came later and has its default."""
    assert completed(**NAMES[name])["name"] == name


def test_names_of_all_types_differ():
    """The same key and value in runs of different types never give the same name, and names are plain file names."""
    names = [
        completed(sae_type=sae_type, l1_coeff=l1_coeff, top_k=top_k)["name"]
        for sae_type in ("vanilla", "topk", "batchtopk", "jumprelu")
        for l1_coeff in (0.004, 0.0040000001)
        for top_k in (16, 32)
    ]
    assert len(set(names)) == len(names)
    assert all(re.fullmatch(r"[\w.+-]+", name) for name in names)


def test_name_and_hook_point_are_always_recomputed():
    """A name or hook point that is given is not believed."""
    cfg = completed()
    assert completed(name="mine", hook_point="blocks.0.hook_resid_pre") == cfg
    assert post_init_cfg(cfg | {"layer": 3})["hook_point"] == "blocks.3.hook_resid_pre"
    assert post_init_cfg(cfg | {"lr": 1.0})["name"] != cfg["name"]


def test_group_keys_are_config_keys_that_decide_the_stream():
    """Runs may share a stream only if they agree on all that the stream and the moments of reporting depend on."""
    per_sae = {
        "sae_type", "dict_size", "top_k", "top_k_aux", "aux_penalty", "l1_coeff", "bandwidth", "n_batches_to_dead",
        "input_unit_norm", "dtype", "seed", "lr", "beta1", "beta2", "max_grad_norm",
        "lr_warmup_steps", "lr_decay_steps", "matryoshka_sizes", "b_dec_init",
    }  # fmt: skip
    records = {"output_dir", "sweep", "wandb_project", "wandb_mode"}
    assert {key for key in KEYS if not KEYS[key].in_group} == per_sae | records


def test_a_cache_of_activations_is_identified_by_all_that_determines_them():
    """Model, text and how it is cut into forwards; not the shuffle, the SAE, or how much of it is read."""
    in_no_cache = {  # hook_point and the model's width, which are in it, follow from site, layer and act_size
        "site", "layer", "act_size", "num_epochs", "num_batches_in_buffer", "shuffle_seed", "eval_skip_positions",
        "batch_size", "num_tokens", "device", "stream_retries", "activation_cache", "save_errors", "log_freq",
        "perf_log_freq", "checkpoint_freq", "keep_checkpoints", "feature_shards",
    }  # fmt: skip
    assert {key for key in KEYS if KEYS[key].in_group and not KEYS[key].in_cache} == in_no_cache
    assert all(KEYS[key].in_group for key in KEYS if KEYS[key].in_cache)


@pytest.mark.parametrize("changes", [{}, OTHER_VALUE, {"num_tokens": 1e9, "lr": 1, "site": "blocks.3.hook_mlp_out"}])
def test_post_init_is_pure_and_idempotent(changes):
    """post_init_cfg leaves its input alone, and completing twice is completing once."""
    given = DEFAULTS | changes
    before = copy.deepcopy(given)
    cfg = post_init_cfg(given)
    assert given == before
    assert post_init_cfg(cfg) == cfg
    assert {key: type(value) for key, value in post_init_cfg(cfg).items()} == {
        key: type(value) for key, value in cfg.items()
    }


def test_a_partial_config_is_completed():
    """Missing keys get their defaults."""
    assert post_init_cfg({"top_k": 16, "device": "cpu"}) == completed(top_k=16)


@pytest.mark.parametrize(
    "wrong, meant", [("top_kk", "top_k"), ("learning_rate_", None), ("dictsize", "dict_size"), ("Seed", "seed")]
)
def test_unknown_key_suggests_the_nearest(wrong, meant):
    """An unknown key is rejected by name, with the nearest known key."""
    message = rejection(**{wrong: 1})
    assert repr(wrong) in message
    if meant:
        assert f"did you mean {meant!r}" in message


def wrong_types():
    for key, default in DEFAULTS.items():
        kind = KEYS[key].optional or type(default)
        wrong = {
            int: [True, "3", 1.5, [1]],
            float: [True, "0.1", [0.1]],
            bool: [1, 0, "True", 1.0],
            str: [3, True, 1.0, ["cpu"]],
            list: ["eos", True, 1.5, [], [1.5], [-1], [True], ["bos"], {"ids": [1]}],  # exclude_tokens
        }[kind]
        yield from ((key, value) for value in wrong)
        if not KEYS[key].optional:
            yield key, None


@pytest.mark.parametrize("key, value", list(wrong_types()))
def test_wrong_type_is_rejected(key, value):
    """A value of the wrong type is rejected with the key, the value and the type it must have."""
    message = rejection(**{key: value})
    kind = KEYS[key].optional or type(DEFAULTS[key])
    assert message.startswith(f"{key} = {value!r} ") and kind.__name__ in message


@pytest.mark.parametrize("key", [key for key in KEYS if KEYS[key].optional])
def test_none_where_it_means_something(key):
    """None is a value of the keys that document it."""
    assert completed(**{key: None})[key] is None


def test_whole_floats_for_integers_and_integers_for_floats():
    """num_tokens = 1e9 is an integer, lr = 1 a float; equal values give equal names."""
    cfg = completed(num_tokens=1e9, lr=1)
    assert type(cfg["num_tokens"]) is int and cfg["num_tokens"] == 10**9
    assert type(cfg["lr"]) is float and cfg["lr"] == 1.0
    assert cfg["name"] == completed(num_tokens=10**9, lr=1.0)["name"]


NAN, INF = float("nan"), float("inf")
IMPOSSIBLE = [
    ("sae_type", "gated"), ("dict_size", 0), ("dict_size", -5), ("top_k", 0), ("top_k", 12289), ("top_k_aux", 0),
    ("aux_penalty", -1.0), ("aux_penalty", NAN), ("l1_coeff", -0.1), ("l1_coeff", INF), ("bandwidth", 0.0),
    ("bandwidth", -1.0), ("n_batches_to_dead", 0), ("dtype", "float16"), ("dtype", "torch.float32"), ("seed", -1),
    ("batch_size", 0), ("num_tokens", 0), ("lr", 0.0), ("lr", -1e-3), ("lr", NAN), ("lr", INF),
    ("beta1", 1.0), ("beta1", -0.1), ("beta2", 1.0), ("beta2", -0.1), ("beta2", NAN), ("max_grad_norm", 0.0),
    ("max_grad_norm", INF), ("model_name", " "), ("site", "resid"), ("site", ""), ("layer", -1), ("act_size", 1),
    ("device", "gpu"), ("device", "cpu:x"), ("device", "meta"), ("dataset_path", ""), ("dataset_split", ""),
    ("seq_len", 1), ("model_batch_size", 0), ("num_batches_in_buffer", 0), ("shuffle_seed", -1),
    ("eval_tokens", 0), ("eval_skip_positions", -1), ("eval_skip_positions", 127),
    ("log_freq", 0), ("lr_warmup_steps", -1), ("lr_decay_steps", -1), ("perf_log_freq", 0), ("checkpoint_freq", 0),
    ("output_dir", ""), ("sweep", ""), ("sweep", ".."), ("sweep", "a/b"), ("sweep", "a\\b"), ("wandb_project", ""),
    ("wandb_mode", "on"),
]  # fmt: skip


@pytest.mark.parametrize("key, value", IMPOSSIBLE)
def test_impossible_value_is_rejected(key, value):
    """An impossible value is rejected with the key and the value."""
    assert rejection(**{key: value}).startswith(f"{key} = {value!r} ")


@pytest.mark.parametrize("key", ["seed", "num_tokens", "lr"])
@pytest.mark.parametrize("value", [2**63, -(2**63), 10**400, 1e300])
def test_a_huge_number_is_one_short_line(key, value):
    if (key, value) == ("lr", 1e300):
        value = 10**300
    assert rejection(**{key: value}) == f"{key} is too large: it must be below 2**63"


@pytest.mark.parametrize("key", ["l1_coeff", "aux_penalty", "beta1"])
def test_negative_zero_is_zero(key):
    """The run would otherwise have a second name."""
    assert completed(**{key: -0.0}) == completed(**{key: 0.0}) == completed(**{key: 0})
    assert completed(**{key: -0.0})["name"] == completed(**{key: 0.0})["name"]


def test_warmup_and_decay_have_room():
    """Together they may take all the steps (num_tokens in whole batches), and not one more."""
    steps = dict(num_tokens=901, batch_size=100)  # 10
    for warmup, decay in ((10, 0), (0, 10), (4, 6)):
        completed(**steps, lr_warmup_steps=warmup, lr_decay_steps=decay)
        message = rejection(**steps, lr_warmup_steps=warmup, lr_decay_steps=decay + 1)
        assert f"lr_decay_steps = {decay + 1} " in message and "10 steps" in message


EXTREME = [
    ("dict_size", 32), ("top_k", 12288), ("aux_penalty", 0.0), ("n_batches_to_dead", 1), ("seed", 0),
    ("seed", 2**63 - 1), ("batch_size", 1), ("num_tokens", 1), ("beta1", 0.0), ("layer", 0), ("seq_len", 3),
    ("model_batch_size", 1), ("num_batches_in_buffer", 1), ("eval_tokens", 1), ("eval_skip_positions", 126),
]  # fmt: skip


@pytest.mark.parametrize("key, value", EXTREME)
def test_extreme_but_possible_value_is_accepted(key, value):
    """The ends of what is allowed are allowed."""
    assert completed(**{key: value})[key] == value


def test_unknown_sae_type_lists_the_choices():
    """An unknown sae_type is answered with all that exist, and with the one that was probably meant."""
    message = rejection(sae_type="batchtopkk")
    for sae_type in ("vanilla", "topk", "batchtopk", "jumprelu"):
        assert sae_type in message
    assert "did you mean 'batchtopk'" in message


def test_top_k_is_bounded_by_the_dictionary_where_it_counts():
    """top_k > dict_size is impossible for the types that keep k features, and only for them."""
    for sae_type in ("topk", "batchtopk"):
        assert "dict_size = 16" in rejection(sae_type=sae_type, dict_size=16, top_k=17)
        completed(sae_type=sae_type, dict_size=16, top_k=16)
    for sae_type in ("vanilla", "jumprelu"):
        completed(sae_type=sae_type, dict_size=16, top_k=17, l1_coeff=0.1)


def test_site_may_be_a_full_hook_name():
    """A full hook name is the hook point, and the layer is its block's."""
    cfg = completed(site="blocks.3.attn.hook_z", layer=5)
    assert cfg["hook_point"] == "blocks.3.attn.hook_z" and cfg["layer"] == 3
    assert completed(site="ln_final.hook_normalized")["hook_point"] == "ln_final.hook_normalized"
    assert cfg["name"] != completed(site="blocks.4.attn.hook_z", layer=5)["name"]
    for site in ("resid_pre", "resid_mid", "resid_post", "mlp_out", "attn_out"):
        assert completed(site=site, layer=2)["hook_point"] == f"blocks.2.hook_{site}"


def test_default_device_is_the_best_one_present(monkeypatch):
    """The default device is CUDA where there is one, else the CPU: Apple's MPS has no float64."""
    for cuda, mps, best in [(True, True, "cuda"), (False, True, "cpu"), (False, False, "cpu")]:
        monkeypatch.setattr(torch.cuda, "is_available", lambda cuda=cuda: cuda)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda mps=mps: mps)
        assert get_default_cfg()["device"] == best

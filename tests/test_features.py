"""features.py: its statistics against a slow reference, hostile text, and the page in a real browser."""

import copy
import html
import json
import re
import shutil
import subprocess
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import torch
import transformers
from helpers import DEMO_LM
from tqdm import tqdm

import features
from activation_store import ActivationsStore
from checkpoint import save_sae
from config import get_default_cfg, post_init_cfg
from console import InputError
from files import write_json
from language_model import load_model
from sae import SAE_CLASSES
from training_step import make_optimizer, training_step

HOSTILE = ["</script><script>document.title='taken'</script>", "<img src=x onerror=document.title='taken'>", "a & b"]
HOSTILE += [
    '"quotes" \' `${1}`',
    "żółw 日本語 🐢 \u202eright to left",
    "\u2028 \x00 \x1b[31m",
    "{{DATA}} {{TITLE}} \\1",
    "<!--",
]
SAES = {
    "batchtopk": dict(sae_type="batchtopk", top_k=4),
    "topk, raw inputs": dict(sae_type="topk", top_k=4, input_unit_norm=False),
    "jumprelu": dict(sae_type="jumprelu", l1_coeff=0.01, bandwidth=0.03),
    "vanilla": dict(sae_type="vanilla", l1_coeff=0.02),
}


@pytest.fixture(scope="module")
def group(tmp_path_factory):
    """A model, a store of hostile documents and SAEs of all types after a few steps on it."""
    path = tmp_path_factory.mktemp("data") / "hostile.jsonl"
    random = np.random.default_rng(0)
    texts = [" ".join(random.choice([*HOSTILE, "return self.path", "the cat"], 6)) for _ in range(80)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    base = get_default_cfg() | dict(
        model_name=str(DEMO_LM), layer=2, act_size=128, dict_size=64, top_k_aux=8, lr=3e-3, device="cpu", seq_len=48,
        batch_size=192, num_tokens=2000, model_batch_size=8, num_batches_in_buffer=2, eval_tokens=30 * 48,
        dataset_path=str(path), output_dir=str(path.parent), sweep="pages",
    )  # fmt: skip
    cfgs = [post_init_cfg(base | changes) for changes in SAES.values()]
    model = load_model(cfgs[0])
    store = ActivationsStore(model, cfgs[0])
    saes = [SAE_CLASSES[cfg["sae_type"]](cfg) for cfg in cfgs]
    optimizers = [make_optimizer(sae, cfg) for sae, cfg in zip(saes, cfgs)]
    for _ in range(6):
        x = store.next_batch()
        for sae, optimizer, cfg in zip(saes, optimizers, cfgs):
            training_step(sae, optimizer, x, cfg)
    return model, store, {name: sae.eval() for name, sae in zip(SAES, saes)}


# Statistics


@pytest.mark.parametrize(
    "name, contexts_at_a_time, excluded", [(name, n, []) for name in SAES for n in (1, 7)] + [("batchtopk", 7, [0, 4])]
)
def test_statistics_equal_a_slow_reference(group, name, contexts_at_a_time, excluded, monkeypatch):
    """Counts, energy, histograms and top contexts with their activations, one context and feature at a time."""
    store, sae = copy.copy(group[1]), group[2][name]
    store.excluded = torch.tensor(excluded, dtype=torch.int64)
    seq_len, skip, dict_size = store.seq_len, store.cfg["eval_skip_positions"], sae.cfg["dict_size"]
    monkeypatch.setattr(features, "CHUNK", contexts_at_a_time * dict_size * seq_len)
    monkeypatch.setattr(features, "tqdm", partial(tqdm, disable=True))  # as TQDM_DISABLE=1 does
    got = features.feature_statistics(sae, store)
    with torch.no_grad():  # rounding depends on the shape: encode the same chunks
        parts = [store.get_activations(part)[:, skip:] for part in store.eval_contexts.split(contexts_at_a_time)]
        acts = torch.cat([sae.encode(x.flatten(0, 1)).view(*x.shape[:2], -1) for x in parts]).numpy()
    acts = np.pad(acts, ((0, 0), (skip, 0), (0, 0)))
    left_out = np.isin(store.eval_contexts.numpy(), excluded)
    assert left_out.any() == bool(excluded)
    acts[left_out] = 0
    data = features.page_data(sae, group[0], store, got, [0])
    assert data["num_tokens"] == (~left_out[:, skip:]).sum()
    for i in range(dict_size):
        positive = acts[:, :, i][acts[:, :, i] > 0]
        assert got["active"][i] == len(positive)
        assert got["energy"][i].item() == pytest.approx((positive.astype(float) ** 2).sum(), rel=1e-5)
        top = 2.0 ** int(got["exponent"][i])
        assert not len(positive) or top / 2 <= positive.max() < top
        expected = [
            int(((positive >= top * b / features.BINS) & (positive < top * (b + 1) / features.BINS)).sum())
            for b in range(features.BINS)
        ]
        assert got["histogram"][i].tolist() == expected

        peaks = sorted(range(len(acts)), key=lambda context: -acts[context, :, i].max())[: features.EXAMPLES]
        for n, context in enumerate(peaks):
            value = acts[context, :, i].max()
            assert got["value"][n, i] == value
            if value > 0:
                position = int(acts[context, :, i].argmax())
                start = min(max(position - features.BEFORE, 0), seq_len - features.WINDOW)
                assert [got[key][n, i] for key in ("context", "position", "start")] == [context, position, start]
                assert got["shown"][n, :, i].tolist() == acts[context, start : start + features.WINDOW, i].tolist()


def test_logit_effects_are_the_direct_path(group):
    """Norm and unembedding by hand in float64, with the weights of transformers and without biases."""
    model = group[0]
    hf_model = transformers.GPT2LMHeadModel.from_pretrained(DEMO_LM)
    gamma, W_U = hf_model.transformer.ln_f.weight.double(), hf_model.lm_head.weight.double()
    directions = torch.randn(5, 128, generator=torch.Generator().manual_seed(0))
    for v, got in zip(directions.double(), features.logit_effects(model, directions)):
        v = v / v.pow(2).mean().sqrt()
        logits = W_U @ ((v - v.mean()) / (v.var(unbiased=False) + 1e-5).sqrt() * gamma)
        torch.testing.assert_close(got.double(), logits - logits.mean(), rtol=1e-4, atol=1e-4)


@pytest.mark.fast
def test_page_data(group):
    """Tokens, nearest features and logit effects on a page follow from the SAE, the model and the text."""
    model, store, sae = group[0], group[1], group[2]["batchtopk"]
    statistics = features.feature_statistics(sae, store)
    data = features.page_data(sae, model, store, statistics, [5, 0, 63])
    texts = features.token_texts(model.tokenizer, list(range(4096)))
    rows = sae.W_dec.detach().double()
    cosines = rows @ rows.T / rows.norm(dim=-1) / rows.norm(dim=-1)[:, None]
    assert [page["i"] for page in data["features"]] == [5, 0, 63]
    for page in data["features"]:
        i = page["i"]
        effects = features.logit_effects(model, sae.W_dec[i : i + 1].detach())[0]
        order = effects.argsort(descending=True).tolist()
        assert [data["vocab"][token] for token, _ in page["up"]] == [texts[t] for t in order[: features.TOKENS]]
        assert [data["vocab"][token] for token, _ in page["down"]] == [
            texts[t] for t in order[: -features.TOKENS - 1 : -1]
        ]
        near = [j for j in cosines[i].argsort(descending=True).tolist() if j != i][: features.NEAREST]
        assert [j for j, _ in page["near"]] == near
        assert [c for _, c in page["near"]] == pytest.approx(cosines[i, near].tolist(), rel=6e-3, abs=1e-6)
        for n, (context, start, position, shown) in enumerate(page["examples"]):
            original = statistics["context"][n, i]
            assert context == original
            tokens = store.eval_contexts[original].tolist()
            assert [data["vocab"][token] for token in data["contexts"][context]] == [texts[t] for t in tokens]
            assert shown[position - start] == max(shown) == pytest.approx(statistics["value"][n, i].item(), rel=6e-3)


@pytest.mark.fast
def test_ranking_is_by_energy_with_rare_and_dense_features_last():
    statistics = {
        "active": torch.tensor([500, 50, 9, 50, 0, 60]),
        "energy": torch.tensor([9.0, 2, 8, 3, 0, 1]).double(),
        "num_tokens": 1000,
    }
    W_dec = torch.eye(6) * torch.tensor([1.0, 1, 1, 1, 1, 2])[:, None]
    assert features.rank_features(statistics, W_dec) == [5, 3, 1, 0, 2]


# Text


def test_token_texts_of_a_byte_level_tokenizer():
    """Joined, they are the text; incomplete UTF-8 and invisible characters are escaped."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(DEMO_LM)

    def seen(text: str) -> str:
        return "".join(features.token_texts(tokenizer, tokenizer.encode(text)))

    for text in ["def f(x):\n    return x", "</script>", "a & b"]:
        assert seen(text) == text.replace("\n", "↵")
    assert seen("🐢") == "\\xf0\\x9f\\x90\\xa2", "this tokenizer splits it into single bytes"
    assert seen("a\x00\tb") == "a\\x00\\tb"
    assert seen("\u202e").isprintable()
    assert features.token_texts(tokenizer, [0]) == ["<|endoftext|>"]


def test_token_texts_of_a_sentencepiece_tokenizer():
    """▁ is a space and <0xE2> a byte; Ġ is an ordinary letter."""
    model = tokenizers.Tokenizer.from_str(
        json.dumps(
            {
                "version": "1.0",
                "added_tokens": [],
                "model": {
                    "type": "BPE",
                    "vocab": {"▁the": 0, "<0xE2>": 1, "Ġ": 2, "▁": 3, "<0x41>": 4},
                    "merges": [],
                },
            }
        )
    )
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=model)
    assert features.token_texts(tokenizer, [0, 1, 2, 3, 4]) == [" the", "\\xe2", "Ġ", " ", "A"]


@pytest.mark.fast
def test_page_holds_hostile_text_as_data(tmp_path):
    """Hostile names and tokens add no elements to the template, and the data is read back unchanged."""
    data = {"vocab": HOSTILE}
    features.write_page(tmp_path / "page.html", HOSTILE[0], data)
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    template = features.TEMPLATE.read_text(encoding="utf-8")
    assert page.count("<script") == template.count("<script") and page.count("<img") == 0
    assert json.loads(re.search(r'id="data">(.*?)</script>', page, re.DOTALL)[1]) == data
    assert not re.search(r"(src|href)=|url\(|@import|https?:", template.replace("http://www.w3.org/2000/svg", ""))


# The command


@pytest.fixture(scope="module")
def run_folder(group, tmp_path_factory):
    """A run's folder as training leaves it."""
    sae = group[2]["batchtopk"]
    folder = tmp_path_factory.mktemp("runs") / "run"
    save_sae(sae, folder / "sae")
    write_json(folder / "config.json", sae.cfg | {"_provenance": {"heldout_tokens_sha256": group[1].fingerprint()}})
    write_json(folder / "result.json", {"nmse": 0.25, "l0": 4.0, "ce_degradation": float("nan")})
    return folder


def page_of(folder: Path, name: str = "features.html") -> dict:
    page = (folder / name).read_text(encoding="utf-8")
    return json.loads(re.search(r'id="data">(.*?)</script>', page, re.DOTALL)[1])


def test_command_writes_the_same_page_twice(run_folder, capsys):
    """Requested features come first, then the top-ranked ones; a second run writes the same bytes. Requested ones alone
    go to another page.
    """
    features.main([str(run_folder), "--features", "7", "3", "7", "--num", "5"])
    first = (run_folder / "features.html").read_bytes()
    numbers = [page["i"] for page in page_of(run_folder)["features"]]
    assert numbers[:2] == [7, 3] and len(numbers) == len(set(numbers)) == 7
    assert "changed" not in capsys.readouterr().err
    features.main([str(run_folder), "--features", "7", "3", "7", "--num", "5"])
    assert (run_folder / "features.html").read_bytes() == first
    features.main([str(run_folder), "--features", "9"])
    assert [page["i"] for page in page_of(run_folder, "requested_features.html")["features"]] == [9]
    assert (run_folder / "features.html").read_bytes() == first


def test_an_sae_whose_features_all_died(group, tmp_path, capsys):
    """Its page has metrics but no features, except requested ones."""
    sae = copy.deepcopy(group[2]["batchtopk"])
    sae.threshold.fill_(1e9)
    save_sae(sae, tmp_path / "sae")
    write_json(tmp_path / "evaluation.json", {"nmse": 0.5, "histograms": {"l0": [1]}})  # as of an imported SAE
    features.main([str(tmp_path)])
    page = page_of(tmp_path)
    assert page["result"] == {"nmse": 0.5}
    assert page["features"] == [] and page["never_active"] == sae.cfg["dict_size"]
    assert "0 of 64 features" in capsys.readouterr().out
    features.main([str(tmp_path), "--features", "3"])
    (page,) = page_of(tmp_path, "requested_features.html")["features"]
    assert (page["i"], page["active"], page["examples"]) == (3, 0, [])


def test_bad_input_is_one_line(run_folder, group, tmp_path, program):
    """A missing run, feature or model, an SAE without a threshold, a corrupt record."""

    def refused(*args) -> str:
        with pytest.raises(InputError) as error:
            features.main([str(arg) for arg in args])
        assert "\n" not in str(error.value)
        return str(error.value)

    assert "nosuch is not a folder" in refused(tmp_path / "nosuch")
    assert "holds no SAE" in refused(tmp_path)
    for feature in (64, -1):
        message = f"--features {feature} is not allowed: it must be 0 to 63"
        assert message in refused(run_folder, "--features", feature)
    assert "--num -1" in refused(run_folder, "--num", -1)
    assert "nothing to show" in refused(run_folder, "--num", 0)

    other = tmp_path / "other"
    shutil.copytree(run_folder, other)
    write_json(other / "sae" / "cfg.json", group[2]["batchtopk"].cfg | {"model_name": "./nosuch"})
    assert "./nosuch" in refused(other)
    (other / "result.json").write_text("{")
    assert "result.json is corrupt" in refused(other)
    (other / "result.json").unlink()
    sae = copy.deepcopy(group[2]["batchtopk"])
    sae.threshold_num_batches.zero_()
    save_sae(sae, other / "sae")
    assert "threshold" in refused(other)
    done = program.run("features.py", "nosuch")
    assert done.returncode == 2 and re.fullmatch("error: nosuch is not a folder; .*\n", done.stderr)


# The browser

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
# Simulates a reader and replaces the page by what they see. `ready` is the real time until the layout is done.
DRIVE = """<script>{
  const height = document.body.offsetHeight, seen = {ready: performance.now(), title: document.title}
  const list = document.getElementById("list")
  const numbers = () => [...list.querySelectorAll(".index")].map(node => Number(node.textContent))
  const set = (box, value, event) => { box.value = value; box.dispatchEvent(new Event(event)) }
  const type = text => set(document.getElementById("search"), text, "input")
  const sort = key => set(document.getElementById("sort"), key, "change")
  seen.at_first = numbers()
  for (const key of ["number", "dense", "rare", "max", "energy"]) { sort(key); seen[key] = numbers() }
  type("<\\/SCRIPT>"); seen.script = numbers()
  type("no such text"); seen.nothing = numbers()
  type("#" + seen.at_first[1]); seen.one = numbers()
  seen.contexts = [...list.querySelectorAll(".context > div")].map(node => node.textContent)
  seen.peaks = [...list.querySelectorAll(".context .peak")].map(node => [node.textContent, node.title])
  seen.shares = [...list.querySelectorAll(".context .peak")].map(node => node.style.getPropertyValue("--share"))
  seen.links = [...list.querySelectorAll(".near a")].map(node => node.getAttribute("href"))
  seen.hidden = document.getElementById("more").checkVisibility()
  seen.images = document.querySelectorAll("img").length
  seen.metrics = document.getElementById("metrics").textContent
  seen.loaded = performance.getEntriesByType("resource").map(entry => entry.name)
  document.body.replaceChildren(JSON.stringify(seen))
}</script>"""


def in_browser(page: Path, tmp_path: Path) -> dict:
    """The results of DRIVE on the page."""
    driven = tmp_path / "driven.html"
    driven.write_text(page.read_text(encoding="utf-8").replace("</html>", DRIVE + "</html>"), encoding="utf-8")
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    command += ["--dump-dom", driven.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, stdin=subprocess.DEVNULL)
    body = re.search(r"<body>(.*)</body>", done.stdout, re.DOTALL)
    assert body, done.stderr[-500:]

    return json.loads(html.unescape(body[1]))


@pytest.mark.skipif(BROWSER is None, reason="no Chromium here: the page was NOT opened in a browser")
def test_page_in_a_browser(run_folder, tmp_path):
    """It shows the data, sorts, searches by number and text, executes no code in the text and loads nothing."""
    features.main([str(run_folder), "--num", "64"])
    data = page_of(run_folder)
    seen = in_browser(run_folder / "features.html", tmp_path)
    pages = {page["i"]: page for page in data["features"]}
    assert seen["title"].startswith("Features of batchtopk_64") and seen["images"] == 0 and seen["loaded"] == []
    shown = len(seen["at_first"])
    assert seen["at_first"] == seen["energy"] == list(pages)[:shown] and shown >= min(60, len(pages))
    assert seen["number"] == sorted(pages)[:shown]
    for key, figure, sign in [("dense", "active", -1), ("rare", "active", 1), ("max", "max", -1)]:
        assert seen[key] == sorted(pages, key=lambda i: sign * pages[i][figure])[:shown]
    assert seen["script"] and seen["nothing"] == []

    (i,) = seen["one"]
    assert i == seen["at_first"][1]
    for example, context, peak, share in zip(pages[i]["examples"], seen["contexts"], seen["peaks"], seen["shares"]):
        texts = [data["vocab"][str(token)] for token in data["contexts"][str(example[0])]]
        shown = texts[example[1] : example[1] + features.WINDOW]
        assert context.removeprefix("…").removesuffix("…") == "".join(shown).removeprefix("…").removesuffix("…")
        value = example[3][example[2] - example[1]]
        assert [texts[example[2]], value] == [peak[0], float(peak[1])]
        assert float(share) == pytest.approx(0.12 + 0.78 * value / pages[i]["max"], abs=0.006)
    assert len(seen["contexts"]) == len(seen["peaks"]) == len(pages[i]["examples"]) > 0
    assert seen["links"] == [f"#{j}" for j, _ in pages[i]["near"] if j in pages]
    assert seen["hidden"] is False and "NMSE0.2500" in seen["metrics"]


@pytest.mark.skipif(BROWSER is None, reason="no Chromium here: the page was NOT opened in a browser")
def test_a_page_of_2048_features_opens_in_under_two_seconds(run_folder, tmp_path):
    """2048 copies of a run's features, measured with the browser's clock."""
    features.main([str(run_folder), "--num", "64"])
    data = page_of(run_folder)
    copies = [page | {"i": i} for i, page in enumerate((data["features"] * 2048)[:2048])]
    features.write_page(tmp_path / "large.html", "large", data | {"features": copies})
    assert in_browser(tmp_path / "large.html", tmp_path)["ready"] < 2000

"""Text -> tokens -> language model -> shuffled batches of activations at one hook point.

The documents of a dataset are joined into one stream of tokens, each beginning with BOS, and cut into contexts
of fixed length: a long document goes on in the next context, a short one shares its context with others. The
first eval_tokens of the stream are held out; training starts with the token after them.
"""

import hashlib
import os
import socket
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from urllib.parse import urlsplit

import datasets
import huggingface_hub
import torch
import transformers
from tqdm import tqdm
from transformer_lens.model_bridge import TransformerBridge

from config import InputError

COLUMNS = ("tokens", "input_ids", "text")  # what a dataset may hold, in order of preference
BUILDERS = {".txt": "text", ".jsonl": "json", ".parquet": "parquet", ".arrow": "arrow"}
DOCUMENTS_PER_CALL = 64  # documents that the tokenizer takes at once, in parallel threads of its own
MAX_COUNTED = 20_000_000  # tokens of a local dataset that are counted before training: about a second per million


class ActivationsStore:
    """The shared stream: `next_batch()` gives [batch_size, d] shuffled activations of tokens seen exactly once.

    `model` is a TransformerBridge (see load_model), `cfg` a completed config. Raises InputError for a dataset that
    cannot be read, has none of the columns, is empty, or is too short for num_tokens.
    """

    def __init__(self, model, cfg: dict):
        self.model, self.cfg = model, cfg
        self.act_size = check_hook_point(model, cfg)
        # As it is: the bridge's own has a BOS even where the model has none.
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(hub_name(cfg["model_name"]))
        self.bos = [] if self.tokenizer.bos_token_id is None else [self.tokenizer.bos_token_id]
        if not self.bos:
            tell(f"{cfg['model_name']} has no BOS token: documents are joined without one")
        self.seq_len = min(cfg["seq_len"], model.cfg.n_ctx)
        if self.seq_len < cfg["seq_len"]:
            tell(f"contexts are cut to {self.seq_len} tokens, what {cfg['model_name']} can take")
        if cfg["eval_skip_positions"] > self.seq_len - 2:
            raise InputError(
                f"eval_skip_positions = {cfg['eval_skip_positions']} leaves nothing to evaluate in contexts of "
                f"{self.seq_len} tokens: at most {self.seq_len - 2}"
            )

        self.dataset = load_text(cfg)
        self.column = find_column(self.dataset, cfg)
        self.documents = self.document_tokens()
        self.leftover: list[int] = []  # tokens read but not yet in a context
        self.tokens_read = 0  # training tokens handed to the language model
        self.eval_contexts = self.hold_out()
        # The stream is as long as the training needs, in whole batches.
        self.tokens_needed = -(-cfg["num_tokens"] // cfg["batch_size"]) * cfg["batch_size"]
        self.check_length()

        self.generator = torch.Generator().manual_seed(cfg["shuffle_seed"])
        self.buffer = torch.empty(0, self.act_size)
        self.order = torch.empty(0, dtype=torch.int64)  # the buffer's rows in the order they are handed out
        self.offset = 0

    # Text -> tokens

    def document_tokens(self) -> Iterator[list[int]]:
        """Token ids of each document of the dataset, BOS first. Documents without tokens are passed over."""
        rows = iter(self.dataset)
        while batch := read_rows(rows, self.column, self.cfg):
            self.check_documents(batch)
            if self.column == "text":
                batch = self.tokenizer(batch, add_special_tokens=False, verbose=False)["input_ids"]
            for ids in batch:
                if ids:
                    yield ids if ids[:1] == self.bos else self.bos + ids

    def check_documents(self, documents: list) -> None:
        """Raises InputError for a text that is no string, or for tokens that the language model does not know."""
        d_vocab = self.model.cfg.d_vocab
        where = f"dataset_path = {self.cfg['dataset_path']!r}: column {self.column!r} holds"
        for document in filter(None, documents):
            if not isinstance(document, str if self.column == "text" else list):
                kind = "text" if self.column == "text" else "a list of tokens"
                raise InputError(f"{where} {document!r} of type {type(document).__name__}; it must be {kind}")
            if self.column != "text":
                for token in document:
                    if type(token) is not int or not 0 <= token < d_vocab:
                        raise InputError(
                            f"{where} token {token!r}, but {self.cfg['model_name']} knows 0 to {d_vocab - 1}"
                        )

    def take_contexts(self, count: int) -> torch.Tensor:
        """The stream's next contexts [count, seq_len]; fewer at its end."""
        while len(self.leftover) < count * self.seq_len:
            document = next(self.documents, None)
            if document is None:
                break
            self.leftover += document
        take = min(count, len(self.leftover) // self.seq_len) * self.seq_len
        tokens, self.leftover = self.leftover[:take], self.leftover[take:]
        return torch.tensor(tokens, dtype=torch.int64).view(-1, self.seq_len)

    def hold_out(self) -> torch.Tensor:
        """The stream's first contexts [n, seq_len]; training goes on with the token after them."""
        num_contexts = -(-self.cfg["eval_tokens"] // self.seq_len)
        contexts = self.take_contexts(num_contexts)
        if len(contexts) < num_contexts:
            raise InputError(
                f"dataset_path = {self.cfg['dataset_path']!r} is too short: it has "
                f"{contexts.numel() + len(self.leftover):,} tokens, and eval_tokens = {self.cfg['eval_tokens']:,} are "
                f"held out before num_tokens = {self.cfg['num_tokens']:,} are trained on"
            )
        return contexts

    def check_length(self) -> None:
        """Local data too short for num_tokens is found out before anything is trained (hub data: when it ends)."""
        if not Path(self.cfg["dataset_path"]).exists():
            return
        enough = min(self.tokens_needed, MAX_COUNTED)
        total, held_out = 0, self.eval_contexts.numel()
        with tqdm(total=enough, unit="tok", unit_scale=True, desc="counting tokens", leave=False, delay=2) as bar:
            for document in self.document_tokens():
                total += len(document)
                bar.update(len(document))
                if total - held_out >= enough + self.seq_len:  # room for a last partial context
                    return
        usable = max(total - held_out, 0) // self.seq_len * self.seq_len
        if usable < self.tokens_needed:
            raise self.too_short(usable)

    def too_short(self, usable: int) -> InputError:
        return InputError(
            f"dataset_path = {self.cfg['dataset_path']!r} is too short: {usable:,} tokens to train on beside the "
            f"{self.eval_contexts.numel():,} held out, and num_tokens = {self.cfg['num_tokens']:,} were asked"
        )

    def get_batch_tokens(self) -> torch.Tensor:
        """The next contexts of the stream, [model_batch_size, seq_len]; fewer at its end.

        Raises InputError when nothing is left.
        """
        contexts = self.take_contexts(self.cfg["model_batch_size"])
        if len(contexts) == 0:
            raise self.too_short(self.tokens_read)
        self.tokens_read += contexts.numel()
        return contexts

    # Tokens -> activations

    def get_activations(self, tokens: torch.Tensor) -> torch.Tensor:
        """Activations [contexts, seq_len, d] at the hook point; the layers above it are not run."""
        return run_to_hook(self.model, tokens.to(self.cfg["device"]), self.cfg["hook_point"]).float()

    def next_batch(self) -> torch.Tensor:
        """[batch_size, d] activations of the next tokens in the shuffled order, in the residual stream's units.

        Raises InputError when the dataset ends before num_tokens.
        """
        batch_size = self.cfg["batch_size"]
        if len(self.order) - self.offset < batch_size:
            self.fill_buffer()
        rows = self.order[self.offset : self.offset + batch_size]
        self.offset += batch_size
        return self.buffer[rows.to(self.buffer.device)]

    def fill_buffer(self) -> None:
        """Harvest num_batches_in_buffer forwards, join what was left of the last buffer, and shuffle.

        Near the end of the training no more is harvested than is still needed.
        """
        left = self.buffer[self.order[self.offset :].to(self.buffer.device)]
        parts, harvested = [left], 0
        while sum(map(len, parts)) < self.cfg["batch_size"] or (
            harvested < self.cfg["num_batches_in_buffer"] and self.tokens_read < self.tokens_needed
        ):
            parts.append(self.get_activations(self.get_batch_tokens()).flatten(0, 1))
            harvested += 1
        del left
        parts[0] = parts[0].to(parts[-1].device)
        self.buffer = torch.cat(parts)
        self.order = torch.randperm(len(self.buffer), generator=self.generator)
        self.offset = 0

    def fingerprint(self) -> str:
        """SHA-256 of the held-out tokens: changes with the dataset, the tokenizer and how the text is cut."""
        return hashlib.sha256(self.eval_contexts.numpy().tobytes()).hexdigest()


# The language model


def load_model(cfg: dict):
    """The language model of a config as a TransformerBridge, in float32 and in eval mode.

    Raises InputError if there is no such model, it has no weights or no tokenizer, or the hub cannot be reached.
    """
    name = hub_name(cfg["model_name"])
    where = f"model_name = {cfg['model_name']!r}"
    if Path(name).is_dir():
        if not (Path(name) / "config.json").is_file():
            raise InputError(f"{where}: this folder has no config.json, so it is no Hugging Face model")
        if not any(Path(name).glob("*.safetensors")) and not any(Path(name).glob("pytorch_model*.bin")):
            raise InputError(f"{where}: this folder has no weights (model.safetensors)")
        if not any(
            (Path(name) / file).is_file()
            for file in ("tokenizer.json", "tokenizer.model", "vocab.json", "spiece.model")
        ):
            raise InputError(f"{where}: this folder has no tokenizer (tokenizer.json)")
    elif name.count("/") > 1 or name.startswith((".", "/", "~")):
        raise InputError(f"{where}: there is no such folder, and it is no hub name")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        model = TransformerBridge.boot_transformers(name, device=cfg["device"], model_class=CompleteModel)
    except Exception as error:  # the libraries below raise what they like; the user gets one line
        raise InputError(f"{where} cannot be loaded: {one_line(error)}{offline_hint(name)}") from error
    if model.tokenizer is None:
        raise InputError(f"{where} comes without a tokenizer")
    return model.requires_grad_(False).eval()


def hub_name(model_name: str) -> str:
    """What the hub calls a model."""
    return {"gpt2-small": "gpt2"}.get(model_name, model_name)


class CompleteModel:
    """A causal language model whose weights are all there: transformers itself makes up what is missing."""

    @staticmethod
    def from_pretrained(name: str, **options):
        model, loaded = transformers.AutoModelForCausalLM.from_pretrained(name, output_loading_info=True, **options)
        if missing := sorted(loaded["missing_keys"]):
            raise ValueError(f"its weights lack {missing[0]} and {len(missing) - 1} others")
        return model


def check_hook_point(model, cfg: dict) -> int:
    """The width of the activations at the hook point, by a look at one token's.

    Raises InputError if the model has no such hook point, or if the width is not act_size.
    """
    hook_point = cfg["hook_point"]
    if hook_point not in model.hook_dict:
        layers = f"its layers are 0 to {model.cfg.n_layers - 1}" if "." not in cfg["site"] else "see model.hook_dict"
        raise InputError(f"{cfg['model_name']} has no hook point {hook_point!r} (site, layer): {layers}")
    acts = run_to_hook(model, torch.zeros(1, 1, dtype=torch.int64, device=cfg["device"]), hook_point)
    if acts.ndim != 3:
        raise InputError(f"hook point {hook_point!r} gives {acts.ndim} dimensions; it must give [context, position, d]")
    if cfg["act_size"] not in (None, acts.shape[-1]):
        raise InputError(
            f"act_size = {cfg['act_size']} does not fit {cfg['model_name']}: {hook_point} is {acts.shape[-1]} wide "
            f"(act_size=None takes it from the model)"
        )
    return acts.shape[-1]


class HookReached(Exception):
    """Ends the forward at the hook point."""


@torch.no_grad()
def run_to_hook(model, tokens: torch.Tensor, hook_point: str) -> torch.Tensor:
    """Activations at the hook point of contexts [n, seq_len]; nothing after it is computed."""
    caught = []

    def stop(acts, hook):
        caught.append(acts)
        raise HookReached

    try:
        model.run_with_hooks(tokens, return_type=None, fwd_hooks=[(hook_point, stop)])
    except HookReached:
        return caught[0]
    except ValueError as error:  # the bridge refuses hook points that a mode of its own must be set for
        raise InputError(f"hook point {hook_point!r} cannot be read: {one_line(error)}") from error
    raise InputError(f"hook point {hook_point!r} is never reached in a forward of this model")


# The text


def load_text(cfg: dict) -> datasets.IterableDataset:
    """The dataset of a config as a stream of rows.

    dataset_path is a local .txt (one document), .jsonl, .parquet or .arrow file, a folder of one of those kinds, a
    saved dataset, or a hub name, which is streamed. Raises InputError if it cannot be opened.
    """
    path, split = Path(cfg["dataset_path"]), cfg["dataset_split"]
    where = f"dataset_path = {cfg['dataset_path']!r}"
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # its errors are raised too, and told in one line
    try:
        if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
            saved = datasets.load_from_disk(str(path))
            if isinstance(saved, dict):
                if split not in saved:
                    raise InputError(f"{where} has no split {split!r}: it has {', '.join(saved)}")
                saved = saved[split]
            return saved.to_iterable_dataset()
        if path.exists():
            builder, files = local_files(path, where)
            options = {"sample_by": "document"} if builder == "text" else {}
            return datasets.load_dataset(builder, data_files=files, split="train", streaming=True, **options)
        if (
            path.suffix in BUILDERS
            or cfg["dataset_path"].count("/") > 1
            or cfg["dataset_path"].startswith((".", "/", "~"))
        ):
            raise InputError(f"{where}: there is no such file or folder, and it is no hub name")
        return load_hub_dataset(cfg)
    except InputError:
        raise
    except StopIteration as error:  # what datasets raises for a file of no rows
        raise InputError(f"{where} is empty") from error
    except Exception as error:
        hint = "" if path.exists() else offline_hint(cfg["dataset_path"])
        raise InputError(f"{where} cannot be opened: {one_line(error)}{hint}") from error


def load_hub_dataset(cfg: dict) -> datasets.IterableDataset:
    name, revision = cfg["dataset_path"], cfg["dataset_revision"]
    options = dict(split=cfg["dataset_split"], streaming=True)
    try:
        return datasets.load_dataset(name, cfg["dataset_config"], revision=revision, **options)
    except RuntimeError as error:
        if "scripts are no longer supported" not in str(error) or revision is not None:
            raise
        tell(
            f"{name} is only a loading script, which datasets no longer runs: reading its revision refs/convert/parquet"
        )
        return datasets.load_dataset(name, cfg["dataset_config"], revision="refs/convert/parquet", **options)


def local_files(path: Path, where: str) -> tuple[str, list[str]]:
    """The `datasets` builder for a file or a folder, and its files in alphabetical order."""
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.suffix in BUILDERS)
    kinds = sorted({file.suffix for file in files})
    if len(kinds) != 1 or kinds[0] not in BUILDERS:
        found = (
            "several kinds of file: " + ", ".join(kinds)
            if len(kinds) > 1
            else "no such file"
            if not kinds
            else kinds[0]
        )
        raise InputError(
            f"{where}: it must be, or hold, files of one of the kinds {', '.join(BUILDERS)}, and it is or holds {found}"
        )
    return BUILDERS[kinds[0]], [str(file) for file in files]


def find_column(dataset: datasets.IterableDataset, cfg: dict) -> str:
    """Which of COLUMNS the dataset has. Looks at the first row by an iterator of its own, so no document is lost."""
    first = read_rows(iter(dataset), None, cfg, count=1)
    if not first:
        raise InputError(f"dataset_path = {cfg['dataset_path']!r} is empty")
    for column in COLUMNS:
        if column in first[0]:
            return column
    raise InputError(
        f"dataset_path = {cfg['dataset_path']!r} has none of the columns {', '.join(COLUMNS)}: "
        f"it has {', '.join(first[0])}"
    )


def read_rows(rows: Iterator[dict], column: str | None, cfg: dict, count: int = DOCUMENTS_PER_CALL) -> list:
    """The next rows, or the given column of them; [] at the end. Raises InputError for a row that cannot be read."""
    try:
        batch = list(islice(rows, count))
        return batch if column is None else [row[column] or "" for row in batch]
    except Exception as error:
        raise InputError(f"dataset_path = {cfg['dataset_path']!r} cannot be read: {one_line(error)}") from error


# Words


def tell(line: str) -> None:
    """A line for the user, above any progress bar."""
    tqdm.write(line, file=sys.stderr)


def one_line(error: Exception) -> str:
    """The first line of an error of another library, cut to a readable length."""
    line = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
    return line if len(line) <= 200 else line[:200] + " …"


def stay_offline_without_network(*names: str) -> None:
    """Where a hub name is asked for and the hub cannot be reached, look in the local cache alone, without retries."""
    if not all(Path(name).exists() for name in names) and not hub_reachable():
        huggingface_hub.constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True


def offline_hint(name: str) -> str:
    """What to do about a hub that cannot be reached; empty if it can, or if `name` is local."""
    if Path(name).exists() or hub_reachable():
        return ""
    return ". Without a network, try `python main.py demo`, or name a local model_name and dataset_path"


def hub_reachable() -> bool:
    """Whether something answers at the hub's address within a few seconds (a proxy is taken to work)."""
    if os.environ.get("HTTPS_PROXY") or os.environ.get("https_proxy"):
        return True
    url = urlsplit(os.environ.get("HF_ENDPOINT", "https://huggingface.co"))
    try:
        socket.create_connection((url.hostname, url.port or (443 if url.scheme == "https" else 80)), timeout=5).close()
    except OSError:
        return False
    return True

"""Text -> tokens: the documents of a dataset as one stream of contexts, every token once, resumable to the token.

    documents -> BOS + tokens each -> joined -> cut into contexts [seq_len]

A long document goes on in the next context, a short one shares its context with others, and what an epoch leaves over
is the beginning of the next epoch's first context. With bos_per_context every context begins with BOS: one is put
before seq_len - 1 tokens of the stream, unless these begin with one already.

Reading and tokenizing go on in a thread, ahead of the language model. A stream from the hub that breaks off is opened
again where it was, after growing pauses. Local data that cannot be read, and documents that are none, end the program
or are passed over (bad_documents); either way a line names the place.
"""

import copy
import functools
import hashlib
import inspect
import os
import queue
import re
import socket
import threading
import time
import weakref
from collections import deque
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from urllib.parse import urlsplit

import datasets
import huggingface_hub
import numpy as np
import torch
from huggingface_hub.utils import _http, httpx  # the httpx whose errors it raises

from config import InputError, one_line, tell

COLUMNS = ("tokens", "input_ids", "text")  # what a dataset may hold, in order of preference
BUILDERS = {".txt": "text", ".jsonl": "json", ".parquet": "parquet", ".arrow": "arrow"}
DOCUMENTS_PER_LOT = 32  # documents that the tokenizer takes at once, in parallel threads of its own
LOTS_AHEAD = 8  # lots of tokens that wait for the language model
LONGEST_PAUSE = 60  # seconds before a broken stream is opened again: 1, 2, 4, ... up to this


class StreamError(RuntimeError):
    """The data cannot be read on for a reason that may pass; the same command may work later. One line says it."""


class TextStream:
    """Contexts [n, seq_len] of a config's dataset, in order; the first `num_held_out` of them stay apart in `held_out`.

    Later epochs begin after the held-out tokens too. Raises InputError for a dataset that cannot be opened, is empty,
    has none of COLUMNS or has nothing after the held-out tokens; reading on raises InputError where the data cannot be
    used and StreamError where the hub stays down.
    """

    def __init__(self, cfg: dict, tokenizer, d_vocab: int, seq_len: int, num_held_out: int):
        self.reader = DocumentReader(cfg, tokenizer, d_vocab)
        self.seq_len, self.bos_per_context = seq_len, cfg["bos_per_context"] and bool(self.reader.bos)
        self.start(self.reader.lots(self.reader.beginning, num_epochs=1))  # no further than that, and not ahead
        self.held_out = self.contexts(num_held_out)
        if len(self.held_out) < num_held_out or not self.wait_for(1):
            raise InputError(
                f"{self.reader.where} is too short: it has {self.num_taken + self.num_waiting:,} tokens, and "
                f"eval_tokens = {cfg['eval_tokens']:,} are held out before num_tokens = {cfg['num_tokens']:,} are "
                f"trained on"
            )
        self.reader.held_out = self.num_taken
        self.load_state_dict(self.state_dict())

    def start(self, lots: Iterator[tuple[dict, np.ndarray]] | None) -> None:
        self.lots = lots
        self.waiting: deque[tuple[dict, np.ndarray]] = deque()  # lots of tokens, each with the position of its first
        self.num_waiting = self.num_taken = 0

    def contexts(self, count: int) -> torch.Tensor:
        """The next contexts [count, seq_len]; fewer where the data ends (tokens_left_over fill no context then)."""
        if not self.bos_per_context:
            count = min(count, self.wait_for(count * self.seq_len) // self.seq_len)
            return torch.from_numpy(self.take(count * self.seq_len)).view(-1, self.seq_len)
        contexts = []
        while len(contexts) < count and self.wait_for(self.seq_len) >= self.new_tokens():
            bos = self.reader.bos if self.new_tokens() < self.seq_len else []
            contexts.append(np.concatenate([np.array(bos, np.int64), self.take(self.new_tokens())]))
        return torch.from_numpy(np.array(contexts, np.int64).reshape(-1, self.seq_len))

    def new_tokens(self) -> int:
        """Tokens of the stream in the next context of a stream with bos_per_context."""
        begins_with_bos = bool(self.waiting) and self.waiting[0][1][0] == self.reader.bos[0]
        return self.seq_len if begins_with_bos else self.seq_len - 1

    def wait_for(self, count: int) -> int:
        """Have `count` tokens at hand; returns how many there are, fewer only at the end of the data."""
        if self.lots is None:
            self.lots = Ahead(self.reader.lots(self.resume_at))
        while self.num_waiting < count and (lot := next(self.lots, None)) is not None:
            position, tokens = lot
            if len(tokens):
                self.waiting.append(lot)
                self.num_waiting += len(tokens)
            else:
                self.end = position
        return self.num_waiting

    def take(self, count: int) -> np.ndarray:
        """The next `count` of the tokens at hand."""
        parts = [np.empty(0, np.int64)]
        self.num_waiting -= count
        self.num_taken += count
        while count > 0:
            position, tokens = self.waiting.popleft()
            parts.append(tokens[:count])
            if len(tokens) > count:
                self.waiting.appendleft((position | {"skip": position["skip"] + count}, tokens[count:]))
            count -= len(parts[-1])
        return np.concatenate(parts)

    def tokens_left_over(self) -> int:
        """At the end of the data: tokens that fill no context."""
        return self.num_waiting

    def state_dict(self) -> dict:
        """Where the next token is, in plain values: epoch, shard, row, `datasets`' own state, tokens to skip."""
        if self.lots is None:
            return copy.deepcopy(self.resume_at)
        self.wait_for(1)
        return copy.deepcopy(self.waiting[0][0] if self.waiting else self.end)

    def load_state_dict(self, state: dict) -> None:
        """Go to where a state_dict was taken; the next context is the one that came next there."""
        self.start(None)  # nothing is read before it is asked for
        self.resume_at = copy.deepcopy(state)


class Ahead:
    """Iterates in a thread, some items ahead: the same items in order, and the same exception where there is one.

    The thread ends with this object, and before the interpreter does.
    """

    def __init__(self, items: Iterator):
        self.queue: queue.Queue = queue.Queue(LOTS_AHEAD)
        stop = threading.Event()
        thread = threading.Thread(target=run_ahead, args=(items, self.queue, stop), name="text stream", daemon=True)
        self.finalizer = weakref.finalize(self, end_thread, stop, thread)
        self.ended = False
        thread.start()

    def __next__(self):
        if not self.ended:
            item, error = self.queue.get()
            self.ended = item is None
            if error is not None:
                raise error
        if self.ended:
            raise StopIteration
        return item


def run_ahead(items: Iterator, results: queue.Queue, stop: threading.Event) -> None:
    def put(result) -> None:
        while not stop.is_set():
            try:
                return results.put(result, timeout=0.2)
            except queue.Full:
                pass

    try:
        for item in items:
            put((item, None))
            if stop.is_set():
                return
        put((None, None))
    except Exception as error:
        put((None, error))


def end_thread(stop: threading.Event, thread: threading.Thread) -> None:
    stop.set()
    thread.join(timeout=2)


class DocumentReader:
    """Reads a dataset shard by shard (a file each, as a rule) and tokenizes its documents."""

    # A position in the stream: `skip` tokens after the first token of a shard's row `row`, before which `dataset` is
    # the shard's own state (None at its beginning).
    beginning = {"epoch": 0, "shard": 0, "row": 0, "dataset": None, "skip": 0}

    def __init__(self, cfg: dict, tokenizer, d_vocab: int):
        self.cfg, self.tokenizer, self.d_vocab = cfg, tokenizer, d_vocab
        self.bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
        self.where = f"dataset_path = {cfg['dataset_path']!r}"
        self.local = Path(cfg["dataset_path"]).exists()
        self.tell_once = functools.cache(tell)
        if not self.local:
            give_up_soon()
        self.dataset, self.column, self.shard_names = self.retried(self.open)
        self.held_out = 0  # tokens at the beginning of the stream that later epochs leave out

    def open(self) -> tuple[datasets.IterableDataset, str, list[str]]:
        """The dataset, which of COLUMNS it has, and its shards' names. Its first row is looked at by an iterator of its
        own, so that no document is lost."""
        dataset, files = load_text(self.cfg)
        try:
            first = next(iter(dataset), None)
        except Exception as error:
            raise InputError(f"{self.where} cannot be read: {one_line(error)}") from error
        if first is None:
            raise InputError(f"{self.where} is empty")
        names = files if len(files) == dataset.num_shards else range(1, dataset.num_shards + 1)
        names = [f"{name}" if names is files else f"shard {name} of {dataset.num_shards}" for name in names]
        for column in COLUMNS:
            if column in first:
                return dataset, column, names
        raise InputError(f"{self.where} has none of the columns {', '.join(COLUMNS)}: it has {', '.join(first)}")

    def files_fingerprint(self) -> str | None:
        """SHA-256 of the names and sizes of local files; None for a dataset of the hub."""
        path = Path(self.cfg["dataset_path"])
        if not self.local:
            return None
        files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
        sizes = [f"{file.relative_to(path)} {file.stat().st_size}" for file in files]
        return hashlib.sha256("\n".join(sizes).encode()).hexdigest()

    def retried(self, function):
        """The value of a function that goes to the hub, called again where the network fails."""
        failures = 0
        while True:
            try:
                return function()
            except InputError as error:
                failures += 1
                if self.local or not may_pass(error) or not hub_reachable():
                    raise
                if failures > self.cfg["stream_retries"]:
                    raise StreamError(str(error)) from error
                self.pause(error, failures)

    def pause(self, error: Exception, failures: int) -> None:
        seconds = min(2 ** (failures - 1), LONGEST_PAUSE)
        tell(
            f"{self.cfg['dataset_path']} broke off ({one_line(error)}): opening it again in {seconds} s, "
            f"try {failures} of {self.cfg['stream_retries']}"
        )
        time.sleep(seconds)

    def lots(self, position: dict, num_epochs: int | None = None) -> Iterator[tuple[dict, np.ndarray]]:
        """(position of the first token, tokens [n]) from a position on; the last lot is empty, its position the end.

        Raises InputError or StreamError where the data cannot be read on.
        """
        num_epochs = num_epochs or self.cfg["num_epochs"]
        epoch, skip = position["epoch"], position["skip"]
        while epoch < num_epochs:
            for shard in range(position["shard"], self.dataset.num_shards):
                here = position if shard == position["shard"] else self.beginning
                for row, state, documents in self.documents(shard, here["row"], here["dataset"]):
                    tokens = self.tokens(documents, shard, row)
                    if skip < len(tokens):
                        at = {"epoch": epoch, "shard": shard, "row": row, "dataset": state, "skip": skip}
                        yield at, tokens[skip:]
                    skip = max(0, skip - len(tokens))
            epoch, position, skip = epoch + 1, self.beginning, self.held_out
        yield self.beginning | {"epoch": num_epochs}, np.empty(0, np.int64)

    def documents(self, shard: int, row: int, state: dict | None) -> Iterator[tuple[int, dict | None, list]]:
        """(number of the first, `datasets`' state before it, documents) of a shard from a row on, in lots."""
        state_row, failures = row, 0
        while True:
            batch, error = [], None
            try:
                data = self.dataset.shard(self.dataset.num_shards, shard)
                if state is not None:
                    data.load_state_dict(state)
                rows = iter(data)
                for _ in range(row - state_row):  # read before the error that led back here
                    next(rows)
                while True:
                    if row > state_row:
                        state, state_row = copy.deepcopy(data.state_dict()), row
                    for document in islice(rows, DOCUMENTS_PER_LOT):
                        batch.append(document.get(self.column))
                    if not batch:
                        return
                    yield row, state, batch
                    row, batch, failures = row + len(batch), [], 0
            except Exception as caught:  # the libraries below raise what they like
                error = caught
            if batch:  # what came before the error is sound
                yield row, state, batch
                row, failures = row + len(batch), 0
            failures += 1
            if not self.local and failures <= self.cfg["stream_retries"]:
                self.pause(error, failures)
                continue
            place = f"document {row + 1} of {self.shard_names[shard]}"
            if not self.local and may_pass(error):
                raise StreamError(f"{self.where} cannot be read on at {place}: {one_line(error)}") from error
            self.bad(f"cannot be read from {place} on: {one_line(error)}", "the rest of it", error)
            return

    def bad(self, what: str, passed_over: str, error: Exception | None = None) -> None:
        """Bad data: the end, or a line about what is passed over, as bad_documents says."""
        if self.cfg["bad_documents"] == "stop":
            raise InputError(f"{self.where} {what} (bad_documents=skip passes over {passed_over})") from error
        self.tell_once(f"{self.where} {what}; {passed_over} is passed over")

    def tokens(self, documents: list, shard: int, row: int) -> np.ndarray:
        """The documents' tokens [n] in one, BOS first in each. Documents without tokens are passed over."""
        sound = []
        for i, document in enumerate(documents):
            if problem := self.problem(document) if document else None:
                self.bad(f"cannot be used: document {row + i + 1} of {self.shard_names[shard]} {problem}", "it")
            elif document:
                sound.append(document)
        if self.column == "text" and sound:
            sound = self.tokenizer(sound, add_special_tokens=False, verbose=False, return_attention_mask=False)
            sound = sound["input_ids"]
        sound = [ids if ids[:1] == self.bos else self.bos + ids for ids in sound if len(ids)]
        return np.concatenate([np.empty(0, np.int64), *(np.array(ids, np.int64) for ids in sound)])

    def problem(self, document) -> str | None:
        """What is wrong with a document: it is no string, or tokens that the language model does not know."""
        if self.column == "text":
            if not isinstance(document, str):
                return f"has for its text {document!r} of type {type(document).__name__}; it must be a string"
            try:
                document.encode()
            except UnicodeEncodeError as error:  # half of a surrogate pair
                return f"has a text that is no Unicode: {one_line(error)}"
            return None
        if not isinstance(document, list):
            return f"has for its {self.column} {document!r} of type {type(document).__name__}; it must be a list"
        for token in document:
            if type(token) is not int or not 0 <= token < self.d_vocab:
                return f"has in its {self.column} {token!r}; {self.cfg['model_name']} knows 0 to {self.d_vocab - 1}"
        return None


# The dataset


def load_text(cfg: dict) -> tuple[datasets.IterableDataset, list[str]]:
    """The dataset of a config as a stream of rows, and the local files it comes from, in order.

    dataset_path is a local .txt (one document), .jsonl, .parquet or .arrow file, a folder of one of those kinds, a
    saved dataset, or a hub name, which is streamed. Raises InputError if it cannot be opened.
    """
    path, split = Path(cfg["dataset_path"]), cfg["dataset_split"]
    where = f"dataset_path = {cfg['dataset_path']!r}"
    datasets.disable_progress_bars()
    # What these log is raised too, and told in one line.
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    huggingface_hub.logging.set_verbosity_error()
    try:
        if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
            saved = datasets.load_from_disk(str(path))
            if isinstance(saved, dict):
                if split not in saved:
                    raise InputError(f"{where} has no split {split!r}: it has {', '.join(saved)}")
                saved = saved[split]
            return saved.to_iterable_dataset(), [str(path)]
        if path.exists():
            builder, files = local_files(path, where)
            options = {"sample_by": "document"} if builder == "text" else {}
            return datasets.load_dataset(builder, data_files=files, split="train", streaming=True, **options), files
        if (
            path.suffix in BUILDERS
            or cfg["dataset_path"].count("/") > 1
            or cfg["dataset_path"].startswith((".", "/", "~"))
        ):
            raise InputError(f"{where}: there is no such file or folder, and it is no hub name")
        return load_hub_dataset(cfg), []
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


# The hub


def give_up_soon() -> None:
    """Bound what the hub's libraries do by themselves: their tries, 20 of 6 requests, would multiply with ours.

    A request that fails is made three times in 3 s, or when the hub says, so that not every fault makes us read a file
    anew; one that gets no answer in time is made once.
    """
    for layer in ("READ", "OPEN"):
        setattr(datasets.config, f"STREAMING_{layer}_MAX_RETRIES", 1)  # counts the first try; a pause follows each
    for pause in ("READ", "READ_SERVER_UNAVAILABLE", "READ_RATE_LIMIT", "OPEN"):
        setattr(datasets.config, f"STREAMING_{pause}_RETRY_INTERVAL", 0)
    for function in (_http.http_backoff, _http.http_stream_backoff):
        defaults = inspect.unwrap(function).__kwdefaults__  # there is no setting
        defaults.update(max_retries=2, retry_on_exceptions=(httpx.NetworkError, httpx.RemoteProtocolError))
    never_wait_for_ever()


@functools.cache  # it closes the connections that there are
def never_wait_for_ever() -> None:
    """No request to the hub waits longer than HF_HUB_DOWNLOAD_TIMEOUT (10 s); by themselves some do for ever."""
    huggingface_hub.set_client_factory(hub_client)


def hub_client() -> httpx.Client:
    client = _http.default_client_factory()
    client.event_hooks["request"].append(limit_wait)
    client.event_hooks["response"].append(check_length)
    return client


def limit_wait(request: httpx.Request) -> None:
    if request.method in ("GET", "HEAD"):  # an upload may take longer
        limit = huggingface_hub.constants.HF_HUB_DOWNLOAD_TIMEOUT
        asked = request.extensions["timeout"]
        request.extensions["timeout"] = {of: limit if wait is None else min(wait, limit) for of, wait in asked.items()}


def check_length(response: httpx.Response) -> None:
    """An answer that ends early without a word would be taken for the end of the file."""
    asked = re.fullmatch(r"bytes=(\d+)-(\d+)", response.request.headers.get("range", ""))
    if asked and response.status_code in (200, 206):
        length, found = int(asked[2]) - int(asked[1]) + 1, len(response.read())
        if found != length:
            raise httpx.RemoteProtocolError(f"the hub sent {found} bytes where {length} were asked for")


def may_pass(error: BaseException | None) -> bool:
    """Whether an error, or one that led to it, is of the network or the server, so that a later try may succeed."""
    while error is not None:
        if isinstance(error, huggingface_hub.errors.HfHubHTTPError):
            status = error.response.status_code if error.response is not None else 0
            return status == 429 or status >= 500
        if isinstance(error, (ConnectionError, TimeoutError, httpx.TransportError)):
            return True
        error = error.__cause__ or error.__context__
    return False


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

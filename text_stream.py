"""Text -> tokens: the documents of a dataset as one stream of contexts, each token once, resumable at any token.

    documents -> BOS + tokens each -> concatenated -> cut into contexts [seq_len]

A long document continues in the next context, short ones share a context, and the remainder of an epoch begins the
first context of the next epoch. With bos_per_context every context begins with BOS: it is prepended to seq_len - 1
tokens of the stream, unless these already begin with BOS.

Special tokens that are spelled out in a text (<|endoftext|>) become special tokens, as is the tokenizer's default: text
dumps separate documents with them, and chat templates use them. A document that begins with BOS in this way gets no
second one. Chats, lists of {"role", "content"}, are rendered with the tokenizer's chat template.

A thread reads and tokenizes ahead of the language model. If the connection to the hub is lost, the stream is reopened
at the same position, with exponential backoff. Local data that cannot be read and invalid documents stop the program or
are skipped (bad_documents); in both cases the message says where they are.
"""

import copy
import functools
import hashlib
import itertools
import math
import os
import queue
import threading
import time
import weakref
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import datasets
import numpy as np
import torch

from console import InputError, one_line, tell
from dataset import COLUMNS, TOKEN_COLUMNS, load_text, where
from hub import StreamError, hub_reachable, is_transient, limit_retries

BATCH_DOCUMENTS = 32  # documents per call of the tokenizer, which is parallel, and per token chunk
PREFETCH_CHUNKS = 8  # token chunks that the thread may read ahead
FINGERPRINT_BYTES, FINGERPRINT_BLOCK = 2**26, 2**16  # bytes of local data to hash (about), and per read
MAX_BACKOFF = 60  # seconds before a retry: 1, 2, 4, ... up to this


class TextStream:
    """The contexts [n, seq_len] of a completed config's dataset, in order. The first ones, of eval_tokens in all, are
    held out in `held_out`; `held_out_documents` [n] numbers the documents in which they begin: 0, 0, 1, ...

    Later epochs also begin after the held-out tokens. Raises InputError for a dataset that cannot be opened, is empty,
    has none of COLUMNS or has no tokens after the held-out ones. With `held_out_only` one context is enough, and
    `held_out` may have fewer than eval_tokens. Reading raises InputError for data that cannot be used, and StreamError
    if the hub stays down.
    """

    def __init__(self, cfg: dict, tokenizer, d_vocab: int, held_out_only: bool = False):
        self.reader = DocumentReader(cfg, tokenizer, d_vocab)
        self.seq_len, self.bos_per_context = cfg["seq_len"], cfg["bos_per_context"]
        num_held_out = -(-cfg["eval_tokens"] // self.seq_len)  # contexts
        self.load_state_dict(self.reader.beginning)
        self.chunks = self.reader.token_chunks(self.reader.beginning, num_epochs=1)  # without prefetching
        contexts, starts = [], []
        self.reader.batch_documents = 1  # so that a token chunk is a document
        for _ in range(num_held_out):
            position = self.state_dict()
            contexts.append(self.contexts(1))
            if len(contexts[-1]) == 0:
                break  # the end of the data
            starts.append((position["shard"], position["row"]))
        self.reader.batch_documents = BATCH_DOCUMENTS
        self.held_out, documents = torch.cat(contexts), {start: i for i, start in enumerate(dict.fromkeys(starts))}
        self.held_out_documents = torch.tensor([documents[start] for start in starts])
        needed = f"eval_tokens = {cfg['eval_tokens']:,} to hold out and num_tokens = {cfg['num_tokens']:,} to train on"
        enough = len(self.held_out) == num_held_out and self.buffer_tokens(1)
        if held_out_only:
            needed, enough = f"seq_len = {self.seq_len} to evaluate on", len(self.held_out)
        if not enough:
            raise InputError(
                f"{self.reader.where} is too short: it has {self.num_taken + self.num_buffered:,} tokens; it must have "
                f"{needed}"
            )
        self.reader.num_held_out = self.num_taken
        self.load_state_dict(self.state_dict())

    def contexts(self, count: int) -> torch.Tensor:
        """The next contexts [count, seq_len]; fewer at the end of the data, where a partial context is reported."""
        self.buffer_tokens(count * self.seq_len)
        parts, found = [np.empty(0, np.int64)], 0
        while found < count and self.num_buffered >= self.tokens_in_context():
            if self.tokens_in_context() < self.seq_len:
                parts.append(np.array(self.reader.bos))
            parts.append(self.take(self.tokens_in_context()))
            found += 1
        if found < count and self.num_buffered:
            self.reader.tell_once(
                f"{self.reader.where}: dropping the last {self.num_buffered} tokens (partial context)"
            )
        return torch.from_numpy(np.concatenate(parts)).view(-1, self.seq_len)

    def tokens_in_context(self) -> int:
        """Tokens of the stream that the next context takes: one fewer if BOS is prepended to it (bos_per_context)."""
        if not self.bos_per_context or (self.num_buffered and self.buffered[0][1][0] == self.reader.bos[0]):
            return self.seq_len
        return self.seq_len - 1

    def buffer_tokens(self, count: int) -> int:
        """Read until `count` tokens are buffered; returns their number, which is lower only at the end of the data."""
        if self.chunks is None:
            self.chunks = Prefetcher(self.reader.token_chunks(self.start_position))
        while self.num_buffered < count and (chunk := next(self.chunks, None)):
            self.buffered.append(chunk)
            self.num_buffered += len(chunk[1])
        return self.num_buffered

    def take(self, count: int) -> np.ndarray:
        """Remove and return the next `count` buffered tokens."""
        parts = []
        self.num_buffered -= count
        self.num_taken += count
        while count > 0:
            position, tokens = self.buffered.popleft()
            parts.append(tokens[:count])
            if len(tokens) > count:
                self.buffered.appendleft((position | {"skip": position["skip"] + count}, tokens[count:]))
            count -= len(parts[-1])
        return np.concatenate(parts)

    def state_dict(self) -> dict:
        """The next token's position, in plain values: epoch, shard, row, state of `datasets`, tokens to skip."""
        if self.chunks is None:
            return copy.deepcopy(self.start_position)
        self.buffer_tokens(1)
        return copy.deepcopy(self.buffered[0][0])

    def load_state_dict(self, state: dict) -> None:
        """Resume from a state_dict: the next context is the one that followed it. Reading begins with the next call."""
        self.start_position, self.chunks = copy.deepcopy(state), None
        # Token chunks, each with the position of its first token. At the end of the data, the last one is empty.
        self.buffered: deque[tuple[dict, np.ndarray]] = deque()
        self.num_buffered = self.num_taken = 0


class Prefetcher:
    """Reads `items` ahead in a thread. next() returns them in order, and raises the exception of `items`, if any.

    The thread ends when this object is deleted or the interpreter exits.
    """

    def __init__(self, items: Iterator):
        self.queue: queue.Queue = queue.Queue(PREFETCH_CHUNKS)
        stop = threading.Event()
        thread = threading.Thread(target=prefetch, args=(items, self.queue, stop), name="text stream", daemon=True)
        weakref.finalize(self, stop_thread, stop, thread)
        self.ended = False
        thread.start()

    def __next__(self):
        if self.ended:
            raise StopIteration
        item, error = self.queue.get()
        self.ended = item is None
        if self.ended:
            raise error or StopIteration
        return item


def prefetch(items: Iterator, results: queue.Queue, stop: threading.Event) -> None:
    """Put (item, None) in the queue for each item, and at last (None, the exception of `items` or None)."""

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
    except BaseException as error:  # also a panic in Rust, which is no Exception: otherwise __next__ waits for ever
        put((None, error))


def stop_thread(stop: threading.Event, thread: threading.Thread) -> None:
    stop.set()
    thread.join(timeout=2)


class DocumentReader:
    """Reads a dataset shard by shard (usually one file each) and tokenizes its documents."""

    # A position in the stream: `skip` tokens after the first token of row `row` of a shard. `dataset` is the shard's
    # state in `datasets` before this row (None at its beginning).
    beginning = {"epoch": 0, "shard": 0, "row": 0, "dataset": None, "skip": 0}

    def __init__(self, cfg: dict, tokenizer, d_vocab: int):
        self.cfg, self.tokenizer, self.d_vocab = cfg, tokenizer, d_vocab
        self.bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
        if self.bos and self.bos[0] >= d_vocab:
            raise InputError(
                f"model_name = {cfg['model_name']!r}: its tokenizer's BOS token {tokenizer.bos_token!r} has id "
                f"{self.bos[0]}, but the model's vocabulary is 0 to {d_vocab - 1}"
            )
        self.where = where(cfg)
        self.local = Path(cfg["dataset_path"]).exists()
        self.tell_once = functools.cache(tell)
        if not self.local:
            limit_retries()
        self.dataset, self.column, self.shard_names, self.commit = self.open()
        self.num_held_out = 0  # tokens at the beginning of the stream that later epochs skip
        self.batch_documents = BATCH_DOCUMENTS

    def fingerprint(self) -> dict:
        """Identifies the data: the SHA-256 of local files (files_fingerprint), and the commit of a hub dataset."""
        return {"data_files_sha256": files_fingerprint(self.cfg["dataset_path"]), "dataset_commit": self.commit}

    def open(self) -> tuple:
        """load_text, retried after transient errors of the hub."""
        for failures in itertools.count(1):
            try:
                return load_text(self.cfg)
            except InputError as error:
                if self.local or not is_transient(error) or not hub_reachable():
                    raise
                if failures > self.cfg["stream_retries"]:
                    raise StreamError(str(error)) from error
                self.back_off(error, failures)

    def back_off(self, error: Exception, failures: int) -> None:
        seconds = min(2 ** (failures - 1), MAX_BACKOFF)
        tell(
            f"reading {self.cfg['dataset_path']} failed ({one_line(error)}): retry {failures} of "
            f"{self.cfg['stream_retries']} in {seconds} s"
        )
        time.sleep(seconds)

    def token_chunks(self, position: dict, num_epochs: int | None = None) -> Iterator[tuple[dict, np.ndarray]]:
        """Yields (position of the first token, tokens [n]) from `position` on, and finally the position of the end with
        no tokens. `num_epochs` is the config's by default.

        Raises InputError or StreamError where the data cannot be read further.
        """
        num_epochs = num_epochs or self.cfg["num_epochs"]
        epoch, skip, batches = position["epoch"], position["skip"], self.document_batches(position, num_epochs)
        while True:
            group, error = [], None  # small batches of several shards are tokenized together
            try:
                while sum(len(batch) for _, batch in group) < self.batch_documents and (item := next(batches, None)):
                    group.append(item)
            except Exception as caught:  # raised below, after the tokens before it
                error = caught
            for (start, _), tokens in zip(group, self.tokenize(group)):
                if start["epoch"] > epoch:
                    epoch, skip = start["epoch"], self.num_held_out
                if skip < len(tokens):
                    yield start | {"skip": skip}, tokens[skip:]
                skip = max(0, skip - len(tokens))
            if error is not None:
                raise error
            if not group:
                break
        yield self.beginning | {"epoch": num_epochs, "skip": self.num_held_out}, np.empty(0, np.int64)

    def document_batches(self, position: dict, num_epochs: int) -> Iterator[tuple[dict, list]]:
        """Yields (position of the first, documents) from a position's row on: up to batch_documents of one shard."""
        for epoch in range(position["epoch"], num_epochs):
            for shard, data in enumerate(shards(self.dataset, position["shard"]), position["shard"]):
                yield from self.shard_batches(data, position | {"epoch": epoch, "shard": shard, "skip": 0})
                position = self.beginning

    def shard_batches(self, source: datasets.IterableDataset, position: dict) -> Iterator[tuple[dict, list]]:
        """Yields like document_batches, from a position to the end of its shard, which is `source`."""
        row, failures = position["row"], 0
        while True:
            batch = []
            try:
                data = source.shard(1, 0)  # a copy with its own state
                if position["dataset"] is not None:
                    data.load_state_dict(position["dataset"])
                rows = iter(data)
                for _ in range(row - position["row"]):  # already read before the error
                    next(rows)
                while True:
                    if row > position["row"]:
                        position = position | {"row": row, "dataset": copy.deepcopy(data.state_dict())}
                    for document in itertools.islice(rows, self.batch_documents):
                        batch.append(document.get(self.column))
                    if not batch:
                        return
                    yield position, batch
                    row, batch, failures = row + len(batch), [], 0
            except Exception as error:  # the libraries raise errors of any type
                if batch:  # the documents before the error are valid
                    yield position, batch
                    row, failures = row + len(batch), 0
                failures += 1
                if not self.local and failures <= self.cfg["stream_retries"]:
                    self.back_off(error, failures)
                    continue
                place = f"document {row + 1} of {self.shard_names[position['shard']]}"
                if not self.local and is_transient(error):
                    raise StreamError(f"{self.where} cannot be read at {place}: {one_line(error)}") from error
                self.handle_bad_data(f"{place} and later documents cannot be read: {one_line(error)}", error)
                return

    def handle_bad_data(self, problem: str, error: Exception | None = None) -> None:
        """Raise InputError or report that the data is skipped, as cfg["bad_documents"] says."""
        if self.cfg["bad_documents"] == "stop":
            raise InputError(f"{self.where}: {problem} (bad_documents=skip skips this)") from error
        self.tell_once(f"{self.where}: {problem} (skipped)")

    def tokenize(self, batches: list[tuple[dict, list]]) -> list[np.ndarray]:
        """The tokens [n] of each batch of documents, each document after BOS. Documents without tokens are skipped."""
        valid = []  # (index of the batch, place, text or tokens)
        for index, (start, documents) in enumerate(batches):
            for i, document in enumerate(documents):
                place = f"document {start['row'] + i + 1} of {self.shard_names[start['shard']]}"
                try:
                    if document not in (None, "", []):
                        valid.append((index, place, self.validated(document)))
                except BadDocument as error:
                    self.handle_bad_data(f"{place} {error}", error)
        texts = [document for _, _, document in valid if isinstance(document, str)]
        options = {"add_special_tokens": False, "verbose": False, "return_attention_mask": False}
        encoded = iter(self.tokenizer(texts, **options)["input_ids"] if texts else [])
        tokens = [[np.empty(0, np.int64)] for _ in batches]
        for index, place, document in valid:
            ids = next(encoded) if isinstance(document, str) else document
            if ids and max(ids) >= self.d_vocab:
                token = next(token for token in ids if token >= self.d_vocab)
                self.handle_bad_data(
                    f"{place} has the token {brief(self.tokenizer.convert_ids_to_tokens(token))} with id {token}; "
                    f"the vocabulary of {self.cfg['model_name']} is 0 to {self.d_vocab - 1}"
                )
            elif ids:
                tokens[index].append(np.array(ids if ids[:1] == self.bos else self.bos + ids, np.int64))
        return [np.concatenate(part) for part in tokens]

    def validated(self, document) -> str | list[int]:
        """The text or tokens of a document; a chat is rendered to text. Raises BadDocument."""
        if isinstance(document, list) and isinstance(document[0], dict) and self.column not in TOKEN_COLUMNS:
            return self.render_chat(document)
        if isinstance(document, list) and self.column != "text":
            for token in document:
                if type(token) is not int or not 0 <= token < self.d_vocab:
                    raise BadDocument(
                        f"has {brief(token)} in column {self.column!r}; token ids of {self.cfg['model_name']} are "
                        f"integers from 0 to {self.d_vocab - 1}"
                    )
            return document
        if not isinstance(document, str) or self.column in TOKEN_COLUMNS:
            expected = "a list" if self.column in TOKEN_COLUMNS else "a string or a list of messages"
            if self.column not in COLUMNS:
                expected = "a string, a list of tokens or a list of messages"
            kind = type(document).__name__
            raise BadDocument(f"has {brief(document)} of type {kind} in column {self.column!r}; it must be {expected}")
        try:
            document.encode()
        except UnicodeEncodeError as error:  # half of a surrogate pair
            raise BadDocument(f"has text that is not valid Unicode: {one_line(error)}") from error
        return document

    def render_chat(self, messages: list[dict]) -> str:
        """A list of {"role", "content"} in the tokenizer's chat template. Raises InputError if it has none."""
        if not self.tokenizer.chat_template:
            raise InputError(
                f"{self.where}: column {self.column!r} holds lists of messages, but the tokenizer of "
                f"{self.cfg['model_name']} has no chat template"
            )
        if not all(isinstance(message, dict) and "role" in message for message in messages):
            raise BadDocument(
                f"has a message without a role in column {self.column!r}; each message must have role and content"
            )
        # Some file formats give all messages the same keys, filled with None; templates test whether a key is present.
        messages = [
            {key: value for key, value in message.items() if value is not None or key == "content"}
            for message in messages
        ]
        try:
            return self.tokenizer.apply_chat_template(messages, tokenize=False)
        except Exception as error:  # templates raise errors of any type
            raise BadDocument(f"does not fit the tokenizer's chat template: {one_line(error)}") from error


def brief(value) -> str:
    """The beginning of the value's repr, for an error message."""
    shown = repr(value)
    return shown if len(shown) <= 100 else shown[:100] + " …"


class BadDocument(Exception):
    """An invalid document. The message completes a sentence: "document 5 of FILE ..."."""


def files_fingerprint(dataset_path: str) -> str | None:
    """The SHA-256 of a local file or of the files in a folder; None if there is no such path.

    Up to 64 MiB are hashed completely. Of more, the hash covers all names and sizes and about 64 MiB of content: the
    first and last 64 KiB of each file and evenly spaced 64 KiB blocks between them. An edit between these blocks that
    keeps the size is not noticed. Modification times do not count.
    """
    path = Path(dataset_path)
    if not path.exists():
        return None
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    total = sum(file.stat().st_size for file in files)
    digest = hashlib.sha256()
    for file in files:
        size = file.stat().st_size
        digest.update(os.fsencode(f"{file.relative_to(path)} {size}\n"))
        blocks = max(2, math.ceil(min(total, FINGERPRINT_BYTES) / FINGERPRINT_BLOCK * size / max(total, 1)))
        with suppress(OSError), open(file, "rb") as content:  # errors are reported when the data is read
            for i in range(blocks):
                content.seek(max(0, size - FINGERPRINT_BLOCK) * i // (blocks - 1))
                digest.update(content.read(FINGERPRINT_BLOCK))
    return digest.hexdigest()


def shards(dataset: datasets.IterableDataset, start: int) -> Iterator[datasets.IterableDataset]:
    """The shards from index `start` on. Dataset.shard takes time for each shard, so the dataset is halved first."""
    if dataset.num_shards == 1:
        yield dataset
        return
    half = dataset.shard(2, 0)
    if start < half.num_shards:
        yield from shards(half, start)
    yield from shards(dataset.shard(2, 1), max(0, start - half.num_shards))

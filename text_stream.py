"""Text -> tokens: the documents of a dataset as one stream of contexts, every token once, resumable to the token.

    documents -> BOS + tokens each -> joined -> cut into contexts [seq_len]

A long document goes on in the next context, a short one shares its context with others, and what an epoch leaves over
is the beginning of the next epoch's first context. With bos_per_context every context begins with BOS: one is put
before seq_len - 1 tokens of the stream, unless these begin with one already.

Special tokens that are written out in a text (<|endoftext|>) become these tokens, as the tokenizer does by default:
dumps of text join documents with them, and chat templates are made of them. A document that begins with BOS in this way
gets no second one. Chats, lists of {"role", "content"}, are documents in the form of the tokenizer's chat template.

Reading and tokenizing go on in a thread, ahead of the language model. A stream from the hub that breaks off is opened
again where it was, after growing pauses. Local data that cannot be read, and documents that are none, end the program
or are passed over (bad_documents); either way a line names the place.
"""

import copy
import functools
import hashlib
import math
import os
import queue
import threading
import time
import weakref
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from itertools import islice
from pathlib import Path

import datasets
import numpy as np
import torch

from console import InputError, one_line, tell
from dataset import COLUMNS, is_chat, load_text
from hub import StreamError, give_up_soon, hub_reachable, may_pass

DOCUMENTS_PER_LOT = 32  # documents that the tokenizer takes at once, in parallel threads of its own
LOTS_AHEAD = 8  # lots of tokens that wait for the language model
FINGERPRINTED, PIECE = 2**26, 2**16  # bytes of local data that its fingerprint reads (about), and reads at once
TOKENS = ("tokens", "input_ids")  # columns that hold nothing else
LONGEST_PAUSE = 60  # seconds before a broken stream is opened again: 1, 2, 4, ... up to this


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
        """The next contexts [count, seq_len]; fewer where the data ends, and a line for what fills none there."""
        if not self.bos_per_context:
            found = min(count, self.wait_for(count * self.seq_len) // self.seq_len)
            contexts = self.take(found * self.seq_len)
        else:
            contexts, found = [np.empty(0, np.int64)], 0
            while found < count and self.wait_for(self.seq_len) >= self.new_tokens():
                if self.new_tokens() < self.seq_len:
                    contexts.append(np.array(self.reader.bos))
                contexts.append(self.take(self.new_tokens()))
                found += 1
            contexts = np.concatenate(contexts)
        if found < count and self.num_waiting:
            self.reader.tell_once(f"{self.reader.where} ends with {self.num_waiting} tokens that fill no context")
        return torch.from_numpy(contexts).view(-1, self.seq_len)

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
        if self.bos and self.bos[0] >= d_vocab:
            raise InputError(
                f"model_name = {cfg['model_name']!r}: its tokenizer's BOS token {tokenizer.bos_token!r} has the id "
                f"{self.bos[0]}, and the model knows 0 to {d_vocab - 1}"
            )
        self.where = f"dataset_path = {cfg['dataset_path']!r}"
        self.local = Path(cfg["dataset_path"]).exists()
        self.tell_once = functools.cache(tell)
        if not self.local:
            give_up_soon()
        self.dataset, self.column, self.shard_names, self.commit = self.retried(lambda: load_text(cfg))
        self.held_out = 0  # tokens at the beginning of the stream that later epochs leave out

    def fingerprint(self) -> dict:
        """What tells this data from other data: the SHA-256 of local files, and the commit of a dataset of the hub.

        Of local data up to 64 MiB every byte counts. Of more, all names and sizes, and of each file the first and the
        last 64 KiB and further pieces of that size at even distances, 64 MiB over all the files: what is edited between
        them without a change of size is not noticed. When files were written does not count, as copies are as good.
        """
        return {"data_files_sha256": self.files_fingerprint(self.cfg["dataset_path"]), "dataset_commit": self.commit}

    @staticmethod
    def files_fingerprint(dataset_path: str) -> str | None:
        """None where no such file or folder is on this machine."""
        path = Path(dataset_path)
        if not path.exists():
            return None
        files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
        total = sum(file.stat().st_size for file in files)
        digest = hashlib.sha256()
        for file in files:
            size = file.stat().st_size
            digest.update(os.fsencode(f"{file.relative_to(path)} {size}\n"))
            pieces = max(2, math.ceil(min(total, FINGERPRINTED) / PIECE * size / max(total, 1)))
            with suppress(OSError), open(file, "rb") as content:  # reading on will tell what cannot be read
                for i in range(pieces):
                    content.seek(max(0, size - PIECE) * i // (pieces - 1))
                    digest.update(content.read(PIECE))
        return digest.hexdigest()

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
        epoch, skip = position["epoch"], position["skip"]
        parts = self.parts(position, num_epochs or self.cfg["num_epochs"])
        while True:
            group, error = [], None
            try:
                while sum(len(documents) for _, documents in group) < DOCUMENTS_PER_LOT and (part := next(parts, None)):
                    group.append(part)
            except Exception as caught:  # raised when what came before it is handed out
                error = caught
            for (at, _), tokens in zip(group, self.tokens(group)):
                if at["epoch"] > epoch:
                    epoch, skip = at["epoch"], self.held_out
                if skip < len(tokens):
                    yield at | {"skip": skip}, tokens[skip:]
                skip = max(0, skip - len(tokens))
            if error is not None:
                raise error
            if not group:
                break
        yield self.beginning | {"epoch": num_epochs or self.cfg["num_epochs"]}, np.empty(0, np.int64)

    def parts(self, position: dict, num_epochs: int) -> Iterator[tuple[dict, list]]:
        """(position of the first, documents) from the row of a position on, at most DOCUMENTS_PER_LOT of one shard."""
        for epoch in range(position["epoch"], num_epochs):
            for shard, data in enumerate(shards(self.dataset, position["shard"]), position["shard"]):
                here = position if shard == position["shard"] else self.beginning
                for row, state, documents in self.documents(data, shard, here["row"], here["dataset"]):
                    yield {"epoch": epoch, "shard": shard, "row": row, "dataset": state, "skip": 0}, documents
            position = self.beginning

    def documents(
        self, of_shard: datasets.IterableDataset, shard: int, row: int, state: dict | None
    ) -> Iterator[tuple[int, dict | None, list]]:
        """(number of the first, `datasets`' state before it, documents) of a shard from a row on, in lots."""
        state_row, failures = row, 0
        while True:
            batch, error = [], None
            try:
                data = of_shard.shard(1, 0)  # with a state of its own
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

    def tokens(self, parts: list[tuple[dict, list]]) -> list[np.ndarray]:
        """The tokens [n] of each part, BOS first in each document. Documents without tokens are skipped."""
        sound = []  # (number of the part, place, text or tokens)
        for number, (at, documents) in enumerate(parts):
            for i, document in enumerate(documents):
                place = f"document {at['row'] + i + 1} of {self.shard_names[at['shard']]}"
                try:
                    if document:
                        sound.append((number, place, self.checked(document)))
                except BadDocument as error:
                    self.bad(f"cannot be used: {place} {error}", "it", error)
        texts = [document for _, _, document in sound if isinstance(document, str)]
        options = {"add_special_tokens": False, "verbose": False, "return_attention_mask": False}
        encoded = iter(self.tokenizer(texts, **options)["input_ids"] if texts else [])
        tokens = [[np.empty(0, np.int64)] for _ in parts]
        for number, place, document in sound:
            ids = next(encoded) if isinstance(document, str) else document
            if ids and max(ids) >= self.d_vocab:
                token = next(token for token in ids if token >= self.d_vocab)
                self.bad(
                    f"cannot be used: {place} has the token {brief(self.tokenizer.convert_ids_to_tokens(token))}, to "
                    f"which the tokenizer gives the id {token}; {self.cfg['model_name']} knows 0 to {self.d_vocab - 1}",
                    "it",
                )
            elif ids:
                tokens[number].append(np.array(ids if ids[:1] == self.bos else self.bos + ids, np.int64))
        return [np.concatenate(part) for part in tokens]

    def checked(self, document) -> str | list[int]:
        """The text or the tokens of a document; a chat in the form of the tokenizer's template. Raises BadDocument."""
        if is_chat(document) and self.column not in TOKENS:
            return self.chat(document)
        if isinstance(document, list) and self.column != "text":
            for token in document:
                if type(token) is not int or not 0 <= token < self.d_vocab:
                    raise BadDocument(
                        f"has in its {self.column} {brief(token)}; {self.cfg['model_name']} knows 0 to "
                        f"{self.d_vocab - 1}"
                    )
            return document
        if not isinstance(document, str) or self.column in TOKENS:
            needed = "a list" if self.column in TOKENS else "a string"
            if self.column not in COLUMNS:
                needed = "a string, a list of tokens or a list of messages"
            kind = type(document).__name__
            raise BadDocument(f"has for its {self.column} {brief(document)} of type {kind}; it must be {needed}")
        try:
            document.encode()
        except UnicodeEncodeError as error:  # half of a surrogate pair
            raise BadDocument(f"has a text that is no Unicode: {one_line(error)}") from error
        return document

    def chat(self, messages: list[dict]) -> str:
        """A list of {"role", "content"} in the tokenizer's chat template. Raises InputError if it has none."""
        if not self.tokenizer.chat_template:
            raise InputError(
                f"{self.where} holds lists of messages in its {self.column}, and the tokenizer of "
                f"{self.cfg['model_name']} has no chat template"
            )
        if not all(isinstance(message, dict) and "role" in message for message in messages):
            raise BadDocument(
                f"has in its {self.column} a message without a role: it must be a list of role and content"
            )
        # A reader that gives all messages the same keys fills them with None, and templates ask whether a key is there.
        messages = [
            {key: value for key, value in message.items() if value is not None or key == "content"}
            for message in messages
        ]
        try:
            return self.tokenizer.apply_chat_template(messages, tokenize=False)
        except Exception as error:  # a template raises what it likes
            raise BadDocument(f"does not fit the tokenizer's chat template: {one_line(error)}") from error


def brief(value) -> str:
    """The beginning of the value's repr, for an error message."""
    shown = repr(value)
    return shown if len(shown) <= 100 else shown[:100] + " …"


class BadDocument(Exception):
    """What is wrong with a document, as the rest of a sentence about it."""


def shards(dataset: datasets.IterableDataset, start: int) -> Iterator[datasets.IterableDataset]:
    """The shards from number `start` on. Taking one costs time for each that there is; halving makes that a few."""
    if dataset.num_shards == 1:
        yield dataset
        return
    half = dataset.shard(2, 0)
    if start < half.num_shards:
        yield from shards(half, start)
    yield from shards(dataset.shard(2, 1), max(0, start - half.num_shards))

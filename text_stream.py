"""Text -> tokens: the documents of a dataset as one stream of contexts, every token once, resumable to the token.

    documents -> BOS + tokens each -> joined -> cut into contexts [seq_len]

A long document goes on in the next context, a short one shares its context with others, and what is left at the end of
an epoch goes on in the next one. With bos_per_context every context begins with BOS: one is put in front of seq_len - 1
tokens, unless the next token of the stream is a BOS already.

Reading and tokenizing run in a thread, ahead of the language model. A stream from the hub that breaks off is opened
again where it was, after growing pauses; local data that cannot be read, and documents that are none, end the program
or are passed over (bad_documents), in either case with a line that names the place.
"""

import copy
import os
import queue
import socket
import threading
import time
import weakref
from collections import deque
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from urllib.parse import urlsplit

import aiohttp
import datasets
import httpx
import huggingface_hub
import numpy as np
import torch

from config import InputError, one_line, tell

COLUMNS = ("tokens", "input_ids", "text")  # what a dataset may hold, in order of preference
BUILDERS = {".txt": "text", ".jsonl": "json", ".parquet": "parquet", ".arrow": "arrow"}
DOCUMENTS_PER_CALL = 64  # documents that the tokenizer takes at once, in parallel threads of its own
CHUNKS_AHEAD = 16  # such lots of tokens that wait for the language model
LONGEST_PAUSE = 60  # seconds before a broken stream is opened again: 1, 2, 4, ... up to this
NETWORK_ERRORS = (OSError, httpx.HTTPError, aiohttp.ClientError, huggingface_hub.errors.HfHubHTTPError)


class StreamError(RuntimeError):
    """The data cannot be read any further for a reason that may pass: the same command may work later."""


class TextStream:
    """Contexts of the dataset of a config, in order.

    Raises InputError for a dataset that cannot be opened, is empty or has none of COLUMNS; reading on raises
    InputError for data that cannot be used and StreamError for a hub that stays down.
    """

    def __init__(self, cfg: dict, tokenizer, d_vocab: int, seq_len: int):
        self.reader = DocumentReader(cfg, tokenizer, d_vocab)
        self.seq_len, self.bos_per_context = seq_len, cfg["bos_per_context"] and bool(self.reader.bos)
        self.start({"epoch": 0, "shard": 0, "row": 0, "dataset": None, "drop": 0})

    def start(self, position: dict) -> None:
        """Read from a position on, in a thread that ends with this object."""
        self.position = position  # of the first token of `waiting`, or where there is none, of the next one
        self.waiting: deque[tuple[dict, np.ndarray]] = deque()  # lots of tokens, each with the position it begins at
        self.lots = Ahead(self.reader.lots(position), CHUNKS_AHEAD)

    def contexts(self, count: int) -> torch.Tensor:
        """The next contexts [count, seq_len]; fewer where the data ends. What fills no context stays in `waiting`."""
        if not self.bos_per_context:
            tokens = self.take(count * self.seq_len, self.seq_len)
            return torch.from_numpy(tokens).view(-1, self.seq_len)
        contexts = []
        for _ in range(count):
            first = self.peek()
            begins = first is not None and first == self.reader.bos[0]
            tokens = self.take(self.seq_len - (not begins), self.seq_len - (not begins))
            if len(tokens) == 0:
                break
            contexts.append(tokens if begins else np.concatenate([self.reader.bos, tokens]))
        return torch.from_numpy(np.array(contexts, dtype=np.int64).reshape(-1, self.seq_len))

    def fill(self, count: int) -> int:
        """Wait for `count` tokens; how many there are (fewer only at the end of the data)."""
        present = sum(len(tokens) for _, tokens in self.waiting)
        while present < count and (lot := self.lots.next()) is not None:
            self.waiting.append(lot)
            present += len(lot[1])
        return present

    def peek(self) -> int | None:
        return self.waiting[0][1][0] if self.fill(1) else None

    def take(self, count: int, multiple: int) -> np.ndarray:
        """The next `count` tokens; at the end of the data the largest multiple of `multiple` that there is."""
        count = min(count, self.fill(count) // multiple * multiple)
        parts = []
        while count > 0:
            position, tokens = self.waiting.popleft()
            parts.append(tokens[:count])
            if len(tokens) > count:
                position = position | {"drop": position["drop"] + count}
                self.waiting.appendleft((position, tokens[count:]))
            count -= len(parts[-1])
        return np.concatenate(parts) if parts else np.empty(0, np.int64)

    def tokens_left_over(self) -> int:
        """Tokens at the end of the data that fill no context."""
        return self.fill(self.seq_len)

    def state_dict(self) -> dict:
        """Where the next context begins: a small dict of plain values (the position in the dataset is `datasets`' own)."""
        self.fill(1)
        position = self.waiting[0][0] if self.waiting else self.lots.last
        return copy.deepcopy(position)

    def load_state_dict(self, state: dict) -> None:
        self.lots.stop()
        self.start(copy.deepcopy(state))

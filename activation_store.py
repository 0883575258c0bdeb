"""The stream of activations: contexts of text -> language model up to the hook point -> shuffled batches.

The activations, in text order, are cut into buffers: whole batches from about num_batches_in_buffer forward passes. A
buffer is harvested, shuffled, and handed out batch by batch. Its content depends only on its position in the text, so
a resumed run harvests only the buffer that it stopped in.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Generator, Iterator
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch
from tqdm import tqdm

import distributed
from activation_cache import ActivationCache
from config import num_steps, values_of
from console import InputError, tell
from language_model import Harvester, Predictor, check_hook_point, complete_cfg, model_fingerprint, tokenizer_of
from text_stream import TextStream

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

MAX_COUNTED = 20_000_000  # tokens of a local dataset to count before training; a million takes about 1 s


class ActivationsStore:
    """The shared stream: `next_batch()` returns [batch_size, d] shuffled activations; each token comes once per epoch.

    `model` is a TransformerBridge (language_model.load_model), `cfg` a completed config. The store's own `cfg` also has
    the values set by the model (complete_cfg). `eval_contexts` [n, seq_len] are held out and never trained on; they
    begin in the documents `eval_documents` [n], numbered from 0. Tokens in exclude_tokens are part of the contexts, but
    of no batch. With `held_out_only` there are no batches and no buffer, and one context of text is enough.

    Memory: one buffer of activations (num_batches_in_buffer · model_batch_size · seq_len rows of d values in
    activation_dtype; two buffers under torchrun) and one forward pass. Raises InputError for a dataset that cannot be
    read, has none of the columns, is empty, or is too short for num_tokens.
    """

    def __init__(self, model: TransformerBridge, cfg: dict, held_out_only: bool = False):
        self.model = model
        self.cfg = cfg = complete_cfg(cfg, model)
        self.act_size = check_hook_point(model, cfg)
        if not cfg.get("has_bos", True):
            tell(f"{cfg['model_name']} has no BOS token: documents are joined without one")
        self.seq_len = cfg["seq_len"]
        if "seq_len" in cfg.get("asked", {}):
            tell(f"seq_len is reduced to {self.seq_len}, the context length of {cfg['model_name']}")
        self.stream = TextStream(cfg, tokenizer_of(model, cfg), model.cfg.d_vocab, held_out_only)
        self.eval_contexts, self.eval_documents = self.stream.held_out, self.stream.held_out_documents
        self.excluded = torch.tensor(cfg["exclude_tokens"] or [], dtype=torch.int64)
        if not self.kept(self.eval_contexts)[:, cfg["eval_skip_positions"] : -1].any():
            raise InputError(f"exclude_tokens = {cfg['exclude_tokens']} leaves no held-out token to evaluate on")
        self.harvest, self.predict = Harvester(model, cfg["hook_point"]), Predictor(model, cfg["hook_point"])
        if held_out_only:
            return

        batch_size = cfg["batch_size"]
        self.tokens_needed = num_steps(cfg) * batch_size
        distributed.from_rank_0(self.check_length)
        self.interruptible = lambda read: read()  # calls a function that reads text; a signal may interrupt it
        rows = cfg["num_batches_in_buffer"] * cfg["model_batch_size"] * self.seq_len
        rows = min(max(rows // batch_size, 1) * batch_size, self.tokens_needed)
        dtype = getattr(torch, cfg["activation_dtype"])
        self.storage = torch.empty(rows, self.act_size, dtype=dtype, device=cfg["device"])
        # Where the next buffer is harvested; with one rank, that is after this one is used up.
        self.spare_storage = torch.empty_like(self.storage) if distributed.size() > 1 else self.storage
        self.exchanges = []  # functions that wait for activations which ranks are exchanging
        self.num_harvested = 0  # rows of the text so far, for the error message at its end
        self.cache = None  # only rank 0 has one
        if cfg["activation_cache"]:
            distributed.from_rank_0(self.open_cache)
        self.beginning = {"buffer": 0, "rows": 0, "stream": self.stream.state_dict(), "inside": 0, "offset": 0}
        self.load_state_dict(self.beginning)
        self.carry = self.storage[:0]  # the stream is already at its beginning

    def next_batch(self) -> torch.Tensor:
        """The next [batch_size, d] shuffled activations, float32, unscaled.

        Raises InputError if the dataset ends before num_tokens, StreamError if the hub stays down.
        """
        buffer, end = self.peek(), self.offset + self.cfg["batch_size"]
        batch = buffer[self.order[self.offset : end]].float()
        if distributed.size() > 1:
            self.harvest_ahead(end)
        self.offset = end
        return batch

    def peek(self) -> torch.Tensor:
        """The buffer [rows, d] of the next batch, in text order and activation_dtype. Does not advance the stream."""
        if self.buffer is None or self.offset == len(self.buffer):
            self.fill_buffer()
        return self.buffer

    def get_batch_tokens(self) -> torch.Tensor:
        """The next contexts of the stream, [model_batch_size, seq_len]; fewer at its end.

        Raises InputError at the end of the data.
        """
        contexts = self.stream.contexts(self.cfg["model_batch_size"])
        if len(contexts) == 0:
            raise self.too_short(self.num_harvested)
        return contexts

    def get_activations(self, tokens: torch.Tensor) -> torch.Tensor:
        """Activations [contexts, seq_len, d] at the hook point, float32. The layers above it are not run."""
        return self.harvest(tokens.to(self.cfg["device"])).float()

    def kept(self, tokens: torch.Tensor) -> torch.Tensor:
        """Which of these tokens are not in exclude_tokens: a bool tensor of the same shape."""
        return ~torch.isin(tokens, self.excluded.to(tokens.device))

    def state_dict(self) -> dict:
        """The position in the stream of batches, as a small dict of plain values.

        buffer     index of the buffer
        rows       rows in all earlier buffers
        stream     text position of the forward pass that gives the buffer's first row
        inside     rows of that pass that the previous buffer already has
        offset     rows of this buffer that are already handed out
        """
        if self.buffer is None or self.offset == len(self.buffer):
            return self.next_start | {"offset": 0}
        return self.buffer_start | {"offset": self.offset}

    def load_state_dict(self, state: dict) -> None:
        """Resume from a state_dict: all later batches are bit-identical to those after it was taken.

        Harvests at most one buffer and the forward pass that it begins in.
        """
        self.next_start = {key: value for key, value in state.items() if key != "offset"}
        self.drop_next_buffer()
        self.buffer, self.offset = None, 0
        if state["offset"]:
            self.fill_buffer()
            self.offset = state["offset"]

    def fingerprint(self) -> str:
        """SHA-256 of the held-out tokens. It changes with the dataset, the tokenizer and the contexts."""
        return hashlib.sha256(self.eval_contexts.numpy().tobytes()).hexdigest()

    def fill_buffer(self) -> None:
        """Harvest the next buffer, or read it from the cache, and shuffle it."""
        filling, self.filling, self.rows_ahead = self.filling or self.fill_in_parts(), None, 0
        for _ in filling:
            pass

    def fill_in_parts(self) -> Iterator[float]:
        """Fill the next buffer step by step, so that under torchrun it is harvested while the ranks train.

        It yields before each wait for activations of other ranks: the number of rows that will be there after the wait,
        or inf if no more are needed. After load_state_dict, the forward pass in which the position lies is run without
        a yield before it.
        """
        start = self.next_start
        missing = max(self.tokens_needed - start["rows"], self.cfg["batch_size"])
        buffer = self.spare_storage[:missing]
        next_start = carry = None
        if self.cfg["activation_cache"]:
            next_start = distributed.from_rank_0(lambda: self.cache.read(start["buffer"], buffer))
        if next_start is not None:
            self.exchanges.append(distributed.start_broadcast(buffer, 0))
            yield math.inf
            self.wait_for_activations()
        else:
            next_start, carry = yield from self.harvest_rows(start, buffer)
            if self.cfg["activation_cache"]:
                distributed.from_rank_0(lambda: self.cache.write(start["buffer"], buffer, next_start))
        # One generator per buffer, so that its order does not depend on the buffers before it.
        order = np.random.default_rng([self.cfg["shuffle_seed"], start["buffer"]]).permutation(len(buffer))
        self.order = torch.from_numpy(order).to(buffer.device)
        self.storage, self.spare_storage = self.spare_storage, self.storage
        self.buffer_start, self.next_start, self.carry = start, next_start, carry
        self.buffer, self.offset = buffer, 0

    def harvest_rows(self, start: dict, buffer: torch.Tensor) -> Generator[float, None, tuple[dict, torch.Tensor]]:
        """Fill `buffer` with the rows from `start` on; yields like fill_in_parts. Returns the start of the next buffer
        and its first rows: those that the last forward pass has left over.
        """
        rest, self.carry = self.carry, None  # None also after an error: the text is then read from `start` again
        if rest is None:
            self.from_text(partial(self.stream.load_state_dict, start["stream"]))
            self.num_harvested, rest = start["rows"] - start["inside"], buffer[:0]
            if start["inside"]:
                ((_, rest),) = self.run_forwards(1, rest)
                self.wait_for_activations()
                rest = rest[start["inside"] :]
        filled = min(len(rest), len(buffer))
        buffer[:filled] = rest[:filled]
        position, inside, rest = start["stream"], start["inside"] + filled, rest[filled:].clone()
        if filled == len(buffer):
            yield math.inf
        while filled < len(buffer):
            passes = self.run_forwards(len(buffer) - filled, buffer[filled:])
            ahead = filled + sum(len(rows) for _, rows in passes)
            yield ahead if ahead < len(buffer) else math.inf
            self.wait_for_activations()
            for _, rows in passes:
                inside = min(len(rows), len(buffer) - filled)
                if inside < len(rows):  # all others were received in their place
                    buffer[filled:] = rows[:inside]
                filled += inside
            position, rest = passes[-1][0], rows[inside:].clone()
        # The next buffer begins inside the last forward pass, unless that is used up.
        if len(rest) == 0:
            position, inside = self.from_text(self.stream.state_dict), 0
        next_start = {"buffer": start["buffer"] + 1, "rows": start["rows"] + filled}
        return next_start | {"stream": position, "inside": inside}, rest

    def run_forwards(self, missing: int, room: torch.Tensor) -> list[tuple[dict, torch.Tensor]]:
        """The next forward passes in text order, one per rank, or fewer if they give `missing` rows: position in the
        text, and activations [n, d] without those of exclude_tokens, in activation_dtype. They are written to `room`
        one after the other; those that do not fit get memory of their own. Use them after wait_for_activations().
        """
        passes = []
        for source, (position, tokens) in enumerate(self.from_text(partial(self.read_batches, missing))):
            kept = self.kept(tokens)
            n = int(kept.sum())
            rows = room[:n] if n <= len(room) else room.new_empty(n, self.act_size)
            room = room[n:]
            if source == distributed.rank():
                acts = self.get_activations(tokens)
                rows.copy_(acts[kept.to(acts.device)] if len(self.excluded) else acts.flatten(0, 1))
            self.exchanges.append(distributed.start_broadcast(rows, source))
            passes.append((position, rows))
        return passes

    def read_batches(self, missing: int) -> list[tuple[dict, torch.Tensor]]:
        """Positions in the text and contexts of the next forward passes: one per rank, or fewer if those already hold
        `missing` rows.
        """
        batches = []
        while missing > 0 and len(batches) < distributed.size():
            position, tokens = self.stream.state_dict(), self.get_batch_tokens()
            batches.append((position, tokens))
            rows = int(self.kept(tokens).sum())
            missing -= rows
            self.num_harvested += rows
        return batches

    def from_text(self, function: Callable):
        """Call a function that reads the text, on rank 0 only, and return its result on every rank."""
        return distributed.from_rank_0(lambda: self.interruptible(function))

    def wait_for_activations(self) -> None:
        """Wait for the activations of other ranks."""
        while self.exchanges:
            self.exchanges.pop()()

    def harvest_ahead(self, num_rows: int) -> None:
        """Harvest at least num_rows of the next buffer, unless there is none. The ranks exchange them while they train.
        An error that all ranks raise, because reading the text failed, is raised where the next buffer is needed.
        """
        if self.next_start["rows"] >= self.tokens_needed:
            return
        filling, self.filling = self.filling or self.fill_in_parts(), None
        try:
            while self.rows_ahead < num_rows:
                self.rows_ahead = next(filling)
        except Exception as error:
            if not getattr(error, "is_from_rank_0", False):
                raise
            filling, self.rows_ahead = raising(error), math.inf
        self.filling = filling

    def drop_next_buffer(self) -> None:
        """Forget what was harvested of the next buffer."""
        self.wait_for_activations()
        self.filling = self.carry = None
        self.rows_ahead = 0  # rows of the next buffer that are harvested or being exchanged; inf if all are

    def check_length(self) -> None:
        """Raise InputError if local data is too short for num_tokens. (Hub data raises it where it ends.)"""
        if not self.stream.reader.local:
            return
        enough, epochs = min(self.tokens_needed, MAX_COUNTED), self.cfg["num_epochs"]
        num_tokens = num_kept = 0
        tail = np.empty(0, bool)  # which of the last seq_len tokens are kept
        with tqdm(total=enough, unit="tok", unit_scale=True, desc="counting tokens", leave=False, delay=2) as bar:
            for _, tokens in self.stream.reader.token_chunks(self.stream.state_dict(), num_epochs=1):
                kept = self.kept(torch.from_numpy(tokens)).numpy()
                num_tokens, num_kept = num_tokens + len(kept), num_kept + int(kept.sum())
                tail = np.concatenate([tail, kept])[-self.seq_len :]
                usable = self.usable_rows(num_tokens * epochs, num_kept * epochs, tail)
                bar.update(len(tokens))
                if usable >= enough:
                    return
        raise self.too_short(usable)

    def usable_rows(self, num_tokens: int, num_kept: int, tail: np.ndarray) -> int:
        """Activations to train on from a text of `num_tokens`, `num_kept` of them not excluded and `tail` its end.

        With bos_per_context this is an upper bound: how many BOS are added depends on where the documents begin.
        """
        if self.stream.bos_per_context:
            contexts = num_tokens // (self.seq_len - 1)
            num_kept += contexts * int(self.kept(torch.tensor(self.stream.reader.bos)))
        else:
            contexts, unused = divmod(num_tokens, self.seq_len)  # the last, partial context is dropped
            num_kept -= int(tail[max(0, len(tail) - unused) :].sum())
        return min(num_kept, contexts * self.seq_len)

    def too_short(self, usable: int) -> InputError:
        where = self.stream.reader.where
        if usable >= self.tokens_needed:  # a loop that asks for more than num_tokens
            return InputError(f"{where} has no text left after the {usable:,} tokens of num_tokens")
        epochs = f" in num_epochs = {self.cfg['num_epochs']}" if self.cfg["num_epochs"] > 1 else ""
        epochs += " without exclude_tokens" if len(self.excluded) else ""
        return InputError(
            f"{where} is too short: {usable:,} tokens to train on{epochs}, besides "
            f"{self.eval_contexts.numel():,} held-out tokens, but num_tokens = {self.cfg['num_tokens']:,}"
        )

    def open_cache(self) -> None:
        identity = values_of(self.cfg, "in_cache") | {
            "hook_point": self.cfg["hook_point"],
            "act_size": self.act_size,
            "buffer_rows": len(self.storage),
            "heldout_tokens_sha256": self.fingerprint(),
            "model_sha256": model_fingerprint(self.model),
            **self.stream.reader.fingerprint(),
        }
        self.cache = ActivationCache(self.cfg["activation_cache"], identity, self.tokens_needed)


def raising(error: Exception) -> Iterator:
    """An iterator that raises this error."""
    raise error
    yield

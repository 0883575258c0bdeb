"""The stream of activations: contexts of text -> language model, up to the hook point -> shuffled batches.

The rows of activations in the order of the text are cut into buffers of about num_batches_in_buffer forwards, whole
batches each; a buffer is harvested, shuffled, and handed out batch by batch. So a buffer depends on nothing but its
place in the text, and a resumed run harvests just the one that it was in.
"""

import hashlib

import numpy as np
import torch
from tqdm import tqdm
from transformer_lens.model_bridge import TransformerBridge

from activation_cache import ActivationCache
from config import num_steps, values_of
from console import InputError, tell
from language_model import Harvester, Predictor, check_hook_point, complete_cfg, model_fingerprint, tokenizer_of
from text_stream import TextStream

MAX_COUNTED = 20_000_000  # tokens of a local dataset that are counted before training: about a second per million


class ActivationsStore:
    """The shared stream: `next_batch()` gives [batch_size, d] shuffled activations of tokens seen once per epoch.

    `model` is a TransformerBridge (language_model.load_model), `cfg` a completed config; the store's own `cfg` has
    what the model says too (complete_cfg). `eval_contexts` [n, seq_len] are held out and never trained on. Tokens of
    exclude_tokens are in the contexts, but in no batch. Raises InputError for a dataset that cannot be read, has none
    of the columns, is empty, or is too short for num_tokens. In memory are one buffer of activations
    (num_batches_in_buffer · model_batch_size · seq_len rows of d numbers of activation_dtype) and what one forward
    takes.
    """

    def __init__(self, model: TransformerBridge, cfg: dict):
        self.model, self.cfg = model, (cfg := complete_cfg(cfg, model))
        self.act_size = check_hook_point(model, cfg)
        if not cfg.get("has_bos", True):
            tell(f"{cfg['model_name']} has no BOS token: documents are joined without one")
        self.seq_len = cfg["seq_len"]
        if "seq_len" in cfg.get("asked", {}):
            tell(f"contexts are cut to {self.seq_len} tokens, what {cfg['model_name']} can take")
        num_held_out = -(-cfg["eval_tokens"] // self.seq_len)
        self.stream = TextStream(cfg, tokenizer_of(model, cfg), model.cfg.d_vocab, self.seq_len, num_held_out)
        self.eval_contexts = self.stream.held_out
        self.excluded = torch.tensor(cfg["exclude_tokens"] or [], dtype=torch.int64)
        if not self.kept(self.eval_contexts)[:, cfg["eval_skip_positions"] : -1].any():
            raise InputError(f"exclude_tokens = {cfg['exclude_tokens']} leaves no held-out token to evaluate on")
        batch_size = cfg["batch_size"]
        self.tokens_needed = num_steps(cfg) * batch_size
        self.check_length()
        self.harvest, self.predict = Harvester(model, cfg["hook_point"]), Predictor(model, cfg["hook_point"])

        rows = cfg["num_batches_in_buffer"] * cfg["model_batch_size"] * self.seq_len
        rows = min(max(rows // batch_size, 1) * batch_size, self.tokens_needed)
        self.memory = torch.empty(rows, self.act_size, dtype=getattr(torch, cfg["activation_dtype"]))
        self.memory = self.memory.to(cfg["device"])
        self.harvested = 0  # rows, for the message where the data ends
        self.cache = self.open_cache() if cfg["activation_cache"] else None
        self.beginning = {"buffer": 0, "rows": 0, "stream": self.stream.state_dict(), "inside": 0, "offset": 0}
        self.load_state_dict(self.beginning)
        self.left_over = self.memory[:0]  # the stream is there already

    def check_length(self) -> None:
        """Local data too short for num_tokens is found out before anything is trained (hub data: when it ends)."""
        if not self.stream.reader.local:
            return
        enough = min(self.tokens_needed, MAX_COUNTED)
        held_out, epochs = self.stream.reader.held_out, self.cfg["num_epochs"]
        with_bos = self.stream.bos_per_context
        per_context = self.seq_len - with_bos  # tokens of the text in a context, at the least
        bos_rows = with_bos and int(self.kept(torch.tensor(self.stream.reader.bos)))  # of each context, at the most
        usable = total = num_kept = 0
        last = np.empty(0, bool)  # which of the last tokens, no more than a context has, are kept
        with tqdm(total=enough, unit="tok", unit_scale=True, desc="counting tokens", leave=False, delay=2) as bar:
            for _, tokens in self.stream.reader.lots(self.stream.reader.beginning, num_epochs=1):
                kept = self.kept(torch.from_numpy(tokens[max(0, held_out - total) :])).numpy()
                total, num_kept = total + len(tokens), num_kept + int(kept.sum())
                last = np.concatenate([last, kept])[-self.seq_len :]
                contexts, left_over = divmod(max(total - held_out, 0) * epochs, per_context)
                left_over = 0 if with_bos else int(last[len(last) - left_over :].sum())  # at the least
                usable = min(num_kept * epochs - left_over + contexts * bos_rows, contexts * self.seq_len)
                bar.update(len(tokens))
                if usable >= enough:
                    return
        raise self.too_short(usable)

    def too_short(self, usable: int) -> InputError:
        epochs = f" in num_epochs = {self.cfg['num_epochs']}" if self.cfg["num_epochs"] > 1 else ""
        epochs += " without exclude_tokens" if len(self.excluded) else ""
        return InputError(
            f"dataset_path = {self.cfg['dataset_path']!r} is too short: {usable:,} tokens to train on{epochs} beside "
            f"the {self.eval_contexts.numel():,} held out, and num_tokens = {self.cfg['num_tokens']:,} were asked"
        )

    def open_cache(self) -> ActivationCache:
        identity = values_of(self.cfg, "in_cache") | {"hook_point": self.cfg["hook_point"]}
        identity |= {"act_size": self.act_size, "buffer_rows": len(self.memory)}
        identity |= {"heldout_tokens_sha256": self.fingerprint(), "model_sha256": model_fingerprint(self.model)}
        identity |= self.stream.reader.fingerprint()
        return ActivationCache(self.cfg["activation_cache"], identity, len(self.memory), self.tokens_needed)

    def get_batch_tokens(self) -> torch.Tensor:
        """The next contexts of the stream, [model_batch_size, seq_len]; fewer at its end.

        Raises InputError when nothing is left.
        """
        contexts = self.stream.contexts(self.cfg["model_batch_size"])
        if len(contexts) == 0:
            raise self.too_short(self.harvested)
        return contexts

    def get_activations(self, tokens: torch.Tensor) -> torch.Tensor:
        """Activations [contexts, seq_len, d] at the hook point, float32; the layers above it are not run."""
        return self.harvest(tokens.to(self.cfg["device"])).float()

    def kept(self, tokens: torch.Tensor) -> torch.Tensor:
        """Which of these tokens are not of exclude_tokens: a bool tensor of the same shape."""
        return ~torch.isin(tokens, self.excluded.to(tokens.device))

    def next_rows(self) -> torch.Tensor:
        """The activations [n, d] of the next forward, in the order of the text, without those of exclude_tokens."""
        tokens = self.get_batch_tokens()
        rows = self.get_activations(tokens).flatten(0, 1)
        return rows[self.kept(tokens).flatten().to(rows.device)] if len(self.excluded) else rows

    def next_batch(self) -> torch.Tensor:
        """[batch_size, d] activations of the next tokens in the shuffled order, float32, in the stream's own units.

        Raises InputError when the dataset ends before num_tokens, StreamError when the hub stays down.
        """
        if self.buffer is None or self.offset == len(self.buffer):
            self.fill_buffer()
        rows = self.order[self.offset : self.offset + self.cfg["batch_size"]]
        self.offset += self.cfg["batch_size"]
        return self.buffer[rows].float()

    def fill_buffer(self) -> None:
        """Harvest the rows of the next buffer, or read them from the cache, and shuffle them."""
        here = self.following
        missing = max(self.tokens_needed - here["rows"], self.cfg["batch_size"])
        buffer = self.memory[:missing]
        following = self.cache.read(here["buffer"], buffer) if self.cache else None
        if following is not None:
            self.left_over = None
        else:
            following = self.harvest_rows(here, buffer)
            if self.cache:
                self.cache.write(here["buffer"], buffer, following)
        # A generator for each buffer: nothing that came before can change its order.
        order = np.random.default_rng([self.cfg["shuffle_seed"], here["buffer"]]).permutation(len(buffer))
        self.order = torch.from_numpy(order).to(buffer.device)
        self.here, self.following, self.buffer, self.offset = here, following, buffer, 0

    def harvest_rows(self, here: dict, buffer: torch.Tensor) -> dict:
        """Fill `buffer` with the rows that begin at `here`; where those after it begin."""
        if self.left_over is None:  # after load_state_dict, or a buffer from the cache
            self.stream.load_state_dict(here["stream"])
            self.left_over = self.memory[:0]
            if here["inside"]:
                self.harvested = here["rows"]
                self.left_over = self.next_rows()[here["inside"] :]
        forward_at, inside, rows, filled = here["stream"], here["inside"], self.left_over, 0
        while True:
            part = rows[: len(buffer) - filled]
            buffer[filled : filled + len(part)] = part
            filled, inside = filled + len(part), inside + len(part)
            if filled == len(buffer):
                break
            self.harvested = here["rows"] + filled
            forward_at, inside = self.stream.state_dict(), 0
            rows = self.next_rows()
        self.left_over = rows[len(part) :]
        if len(self.left_over) == 0:
            forward_at, inside = self.stream.state_dict(), 0
        return {"buffer": here["buffer"] + 1, "rows": here["rows"] + filled, "stream": forward_at, "inside": inside}

    def state_dict(self) -> dict:
        """Where the stream of batches is, in a small dict of plain values.

        buffer: its number; rows: those of all buffers before it; stream: position in the text of the forward that its
        first row is in; inside: rows of that forward that are of the buffer before; offset: rows handed out of it.
        """
        if self.buffer is None or self.offset == len(self.buffer):
            return self.following | {"offset": 0}
        return self.here | {"offset": self.offset}

    def load_state_dict(self, state: dict) -> None:
        """Go to where a state_dict was taken: the next batch is, to the bit, the one that came next there.

        Costs the harvest of at most one buffer (and of the forward that it begins in).
        """
        self.following = {key: value for key, value in state.items() if key != "offset"}
        self.buffer = self.left_over = None
        self.offset = 0
        if state["offset"]:
            self.fill_buffer()
            self.offset = state["offset"]

    def fingerprint(self) -> str:
        """SHA-256 of the held-out tokens: changes with the dataset, the tokenizer and how the text is cut."""
        return hashlib.sha256(self.eval_contexts.numpy().tobytes()).hexdigest()

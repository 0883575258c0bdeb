"""Train the small GPT-2 in demo/lm, and compare it with n-gram models.

    python demo/train_lm.py [--steps N] [--out FOLDER]

Trains a 4-layer GPT-2 (d_model 128, context 128, byte-level BPE with 4096 tokens) on the "lm" part of the standard
library's source code (demo/text.py). It is evaluated on the "heldout" part, as are n-gram models of the same tokens.
"""

import argparse
import json
import math
import time
from pathlib import Path

import numpy as np
import torch
from text import documents
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import trange
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

VOCAB, CONTEXT = 4096, 128
BATCH, LR, WARMUP, WEIGHT_DECAY = 64, 2e-3, 300, 0.1
BOS = "<|endoftext|>"


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=VOCAB, special_tokens=[BOS], initial_alphabet=alphabet)
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=BOS, eos_token=BOS, unk_token=BOS, model_max_length=CONTEXT
    )


def name_tokenizer_class(path: Path) -> None:
    """Set a class name that every version of transformers can read; transformers 5 writes a new one."""
    path.write_text(json.dumps(json.loads(path.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}, indent=2))


def token_stream(texts: list[str], tokenizer) -> np.ndarray:
    """All documents as one array of token ids; each document starts with BOS."""
    encoded = tokenizer.backend_tokenizer.encode_batch(texts)
    return np.concatenate([[tokenizer.bos_token_id, *document.ids] for document in encoded]).astype(np.int64)


def ngram_cross_entropy(train: np.ndarray, heldout: np.ndarray, order: int) -> float:
    """Nats per token of an n-gram model with Witten-Bell interpolation (order 1: unigrams and a uniform distribution).

    p(w | h) = (c(h, w) + T(h) p(w | h')) / (c(h) + T(h)), where T(h) is the number of distinct tokens seen after h.
    """
    assert VOCAB**order < 2**63, "an n-gram must fit into one integer"
    probability = np.full(len(heldout), 1 / VOCAB)
    for n in range(1, order + 1):
        grams, counts = np.unique(pack(train, n), return_counts=True)
        histories, start = np.unique(grams // VOCAB, return_index=True)
        history_count, history_types = np.add.reduceat(counts, start), np.diff(np.append(start, len(grams)))
        # The first n - 1 held-out tokens have no full history and keep their lower-order estimate.
        query = pack(heldout, n)
        c = lookup(grams, counts, query)
        c_h, t_h = lookup(histories, history_count, query // VOCAB), lookup(histories, history_types, query // VOCAB)
        tail = probability[n - 1 :]
        probability[n - 1 :] = np.where(c_h > 0, (c + t_h * tail) / np.maximum(c_h + t_h, 1), tail)
    return float(-np.log(probability).mean())


def pack(tokens: np.ndarray, n: int) -> np.ndarray:
    packed = np.zeros(len(tokens) - n + 1, dtype=np.int64)
    for i in range(n):
        packed = packed * VOCAB + tokens[i : len(tokens) - n + 1 + i]
    return packed


def lookup(keys: np.ndarray, values: np.ndarray, query: np.ndarray) -> np.ndarray:
    at = np.minimum(np.searchsorted(keys, query), len(keys) - 1)
    return np.where(keys[at] == query, values[at], 0)


@torch.no_grad()
def lm_cross_entropy(model: GPT2LMHeadModel, tokens: np.ndarray) -> float:
    """Nats per token over contiguous contexts, at positions 1..127."""
    model.eval()
    contexts = torch.from_numpy(tokens[: len(tokens) // CONTEXT * CONTEXT]).view(-1, CONTEXT)
    losses = [model(batch, labels=batch).loss.item() * len(batch) for batch in contexts.split(BATCH)]
    return sum(losses) / len(contexts)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "lm")
    args = parser.parse_args()

    texts = {part: [document["text"] for document in documents(part)] for part in ("lm", "heldout")}
    tokenizer = train_tokenizer(texts["lm"])
    train, heldout = (token_stream(texts[part], tokenizer) for part in ("lm", "heldout"))
    print(f"training tokens {len(train):,}, held-out tokens {len(heldout):,}")
    for order in (1, 2, 3, 4, 5):
        print(f"held-out cross-entropy of {order}-grams: {ngram_cross_entropy(train, heldout, order):.3f}")

    tokenizer.save_pretrained(args.out)
    name_tokenizer_class(args.out / "tokenizer_config.json")
    torch.manual_seed(49)
    # Dropout, because the text is small; not on attention weights, where it doubles the time of a step on a CPU.
    sizes = dict(vocab_size=VOCAB, n_positions=CONTEXT, n_embd=128, n_layer=4, n_head=4, attn_pdrop=0.0)
    model = GPT2LMHeadModel(
        GPT2Config(**sizes, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.bos_token_id)
    )
    print(f"parameters {model.num_parameters():,}")
    matrices = [p for p in model.parameters() if p.ndim == 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=LR, betas=(0.9, 0.95), fused=True)

    def lr_share(step):  # linear warm-up, then cosine decay to 1 %
        return min((step + 1) / WARMUP, 0.505 + 0.495 * math.cos(math.pi * step / args.steps))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lr_share)
    generator = torch.Generator().manual_seed(49)
    data, started = torch.from_numpy(train), time.time()
    for step in (bar := trange(args.steps, mininterval=10)):
        model.train()
        starts = torch.randint(len(data) - CONTEXT, (BATCH, 1), generator=generator)
        batch = data[starts + torch.arange(CONTEXT)]
        with torch.autocast("cpu", torch.bfloat16):  # twice as fast if the CPU has bf16 instructions
            logits = model(batch).logits
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), batch[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 100 == 0:
            bar.set_postfix(loss=f"{loss.item():.3f}")
        if (step + 1) % 1000 == 0 or step + 1 == args.steps:
            bar.write(f"step {step + 1}: held-out cross-entropy {lm_cross_entropy(model, heldout):.3f}")
            model.save_pretrained(args.out)

    train_loss = lm_cross_entropy(model, train[:2_000_000])
    print(f"{args.steps} steps in {(time.time() - started) / 60:.0f} minutes")
    print(f"cross-entropy: training part {train_loss:.3f}, held-out part {lm_cross_entropy(model, heldout):.3f}")


if __name__ == "__main__":
    main()

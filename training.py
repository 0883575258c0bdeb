"""The training loop: one shared stream of activations, any number of SAEs."""

import time

import torch
from tqdm import tqdm

from checkpoint import save_sae
from config import InputError, tell
from evaluation import evaluate, heldout_baseline
from logs import RunLog, provenance
from text_stream import StreamError


def train_sae(sae, activation_store, model, cfg: dict) -> dict:
    """Train one SAE: a group of one. Returns its final metrics on held-out tokens."""
    return train_sae_group([sae], activation_store, model, [cfg])[0]


def train_sae_group(saes: list, activation_store, model, cfgs: list[dict]) -> list[dict]:
    """Train SAEs side by side on one stream: the language model runs once, and each sees the same batches.

    `cfgs` are completed configs that agree on config.GROUP_KEYS; each run has its own record and its own sae/
    folder in output_dir/sweep/name. No SAE of a group changes another. Returns the final held-out metrics.
    Raises InputError if a run is already finished, if the dataset ends before num_tokens or if NaN or infinity turns
    up, and StreamError if the network stays down; in all but the first case the SAEs are saved as they are.
    """
    cfg = cfgs[0]
    made_with = provenance(model, activation_store)
    baseline = heldout_baseline(model, activation_store)
    logs = [RunLog(run_cfg, made_with) for run_cfg in cfgs]
    optimizers = [make_optimizer(sae, run_cfg) for sae, run_cfg in zip(saes, cfgs)]
    eval_contexts = max(1, cfg["batch_size"] // activation_store.seq_len)
    num_steps = activation_store.tokens_needed // cfg["batch_size"]
    for sae in saes:
        sae.train()

    started = time.time()
    bar = tqdm(
        total=num_steps * cfg["batch_size"],
        unit="tok",
        unit_scale=True,
        desc=f"training {len(saes)} SAEs",
        smoothing=0.05,
    )
    for step in range(1, num_steps + 1):
        try:
            x = activation_store.next_batch()
        except (InputError, StreamError):  # the data ended too early, or the network stays down
            bar.close()
            save(saes, logs)
            tell(f"The SAEs are saved as they are after {step - 1} of {num_steps} steps")
            raise
        outputs = []
        for sae, optimizer, run_cfg in zip(saes, optimizers, cfgs):
            try:
                outputs.append(training_step(sae, optimizer, x, run_cfg))
            except FloatingPointError as error:  # raised before the weights are touched
                bar.close()
                save(saes, logs)
                tell(f"The SAEs are saved as they were before step {step} of {num_steps}")
                raise InputError(f"step {step}, {run_cfg['name']}: {error}") from error
        bar.update(len(x))

        # Records. Only here does a number leave the device.
        metrics = [{} for _ in saes]
        if step == 1 or step % cfg["log_freq"] == 0 or step == num_steps:
            metrics = [scalars(output) for output in outputs]
            bar.set_postfix_str(summary(metrics))
        if step % cfg["perf_log_freq"] == 0 and step < num_steps:
            for values, evaluated in zip(metrics, evaluate(saes, model, activation_store, baseline, eval_contexts)):
                values |= evaluated
        for log, values in zip(logs, metrics):
            if values:
                log.log(step, step * cfg["batch_size"], values)
        if step % cfg["checkpoint_freq"] == 0 and step < num_steps:
            save(saes, logs)
    bar.close()

    # The end: save first, then measure.
    seconds = time.time() - started
    save(saes, logs)
    results = evaluate(saes, model, activation_store, baseline)
    for result, log in zip(results, logs):
        result |= {"tokens": num_steps * cfg["batch_size"], "steps": num_steps, "seconds": seconds}
        log.finish(result)
    return results


def save(saes: list, logs: list[RunLog]) -> None:
    for sae, log in zip(saes, logs):
        save_sae(sae, log.folder / "sae")


def make_optimizer(sae, cfg: dict) -> torch.optim.Optimizer:
    """Adam, for training_step. It holds W_enc by its transpose (same memory): fused Adam copies all else."""
    parameters = [p if p.is_contiguous() else torch.nn.Parameter(p.detach().T) for p in sae.parameters()]
    return torch.optim.Adam(parameters, lr=cfg["lr"], betas=(cfg["beta1"], cfg["beta2"]), fused=True)


def training_step(sae, optimizer, x: torch.Tensor, cfg: dict) -> dict:
    """One step on activations x [batch_size, d]; returns the forward's output. Decoder rows end as unit vectors."""
    output = sae(x)
    output["loss"].backward()
    torch.nn.utils.clip_grad_norm_(sae.parameters(), cfg["max_grad_norm"])
    sae.make_decoder_weights_and_grad_unit_norm()
    for held, parameter in zip(optimizer.param_groups[0]["params"], sae.parameters()):
        if held is not parameter:
            held.grad = parameter.grad.T
    optimizer.step()
    optimizer.zero_grad()
    sae.zero_grad()
    sae.normalize_decoder()
    sae.update_statistics(output)
    return output


def scalars(output: dict) -> dict:
    """The single numbers of a forward's output, fetched from the device."""
    return {key: value.item() for key, value in output.items() if value.ndim == 0}


def summary(metrics: list[dict]) -> str:
    """For the progress bar: loss, L0 and dead features, from the least to the greatest of the group."""

    def span(key, form):
        values = sorted(values[key] for values in metrics)
        ends = [format(values[0], form), format(values[-1], form)]
        return ends[0] if ends[0] == ends[1] else "–".join(ends)

    return f"loss {span('loss', '.3f')}, L0 {span('l0_norm', '.0f')}, dead {span('num_dead_features', 'd')}"

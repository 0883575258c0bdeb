"""One training step is what it says, and a saved SAE comes back as it was."""

import json
import os
import shutil
import struct
import sys

import pytest
import reference
import torch
from helpers import KINDS, assert_same_state, make_sae, make_x, params, sae_cfg, state
from safetensors.torch import load_file, save_file

import checkpoint
from checkpoint import load_sae, save_sae
from console import InputError
from sae import SAE_CLASSES
from training_step import Run, group_step, make_optimizer, training_step

# The step


@pytest.fixture
def threads():
    """Sets torch's number of threads for one test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def test_small_saes_side_by_side_have_the_bits_of_one_core(threads):
    """Of sparse and dense steps, on more threads than cores: each SAE as if alone on one core, in the group's order,
    and with its own input: normalised or not, in float32 or float64.
    """
    kinds = [*KINDS, "topk", "batchtopk", "topk", "batchtopk"]
    shape = dict(d=64, F=1024, batch_size=256)
    dtypes = ["float64" if i in (2, 5) else "float32" for i in range(len(kinds))]
    cfgs = [
        sae_cfg(kind, k=4 + i, seed=i, dtype=dtype, input_unit_norm=i % 4 > 0, **shape)
        for i, (kind, dtype) in enumerate(zip(kinds, dtypes))
    ]

    def runs():
        saes = [SAE_CLASSES[cfg["sae_type"]](cfg) for cfg in cfgs]
        return [Run(cfg, sae, make_optimizer(sae, cfg), None) for cfg, sae in zip(cfgs, saes)]

    together, alone = runs(), runs()
    for step in range(15):
        x, outputs = make_x(256, 64, step, torch.float32), []
        threads(4)
        group_step(together, x, outputs, {})
        assert torch.get_num_threads() == 4
        threads(1)
        for run, output in zip(alone, outputs):
            expected = training_step(run.sae, run.optimizer, x, run.cfg)
            assert output and all(torch.equal(value, expected[key]) for key, value in output.items())
    for one, other in zip(together, alone):
        assert_same_state(state(one.sae), state(other.sae))


def test_only_small_steps_take_one_core(threads, monkeypatch):
    """training_step too; the number of threads is restored, also after an error."""
    threads(3)
    used = []
    for size in (64, 2**14):
        sae = SAE_CLASSES["topk"](sae_cfg("topk", d=64, F=size, k=4, dtype="float32", batch_size=256))
        forward = sae.forward_normalised
        monkeypatch.setattr(
            sae,
            "forward_normalised",
            lambda x, wait=True, forward=forward: used.append(torch.get_num_threads()) or forward(x, wait),
        )
        training_step(sae, make_optimizer(sae, sae.cfg), make_x(256, 64, 0, torch.float32), sae.cfg)
        with pytest.raises(FloatingPointError):
            training_step(sae, make_optimizer(sae, sae.cfg), make_x(256, 64, 0, torch.float32) / 0, sae.cfg)
        assert torch.get_num_threads() == 3
    assert used == [1, 1, 3, 3]


@pytest.mark.fast
def test_the_optimizer_of_training_step_refuses_another_loop():
    """It would leave W_enc as it was, because it holds the transpose."""
    sae = make_sae("batchtopk")
    optimizer = make_optimizer(sae, sae.cfg)
    sae(make_x(7, 5, 0))["loss"].backward()
    with pytest.raises(RuntimeError, match=r"use torch.optim.Adam\(sae.parameters\(\)\)"):
        optimizer.step()
    training_step(sae, optimizer, make_x(7, 5, 0), sae.cfg)


@pytest.mark.parametrize("lr", [3e-4, 0.3])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.fast
def test_decoder_rows_have_unit_norm_after_every_step(kind, lr):
    """In float32, whenever anyone looks, decoder rows have norm 1 to 1e-6, however large the step."""
    sae = SAE_CLASSES[kind](sae_cfg(kind, d=16, F=48, k=4, lr=lr, dtype="float32"))
    optimizer = make_optimizer(sae, sae.cfg)
    start = sae.W_dec.detach().clone()
    for step in range(8):
        training_step(sae, optimizer, make_x(12, 16, step, torch.float32), sae.cfg)
        assert (sae.W_dec.detach().double().norm(dim=-1) - 1).abs().max() < 1e-6
    assert not torch.equal(sae.W_dec, start)


@pytest.mark.parametrize("max_grad_norm", [100_000.0, 0.05])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.fast
def test_training_steps_equal_the_reference(kind, max_grad_norm):
    """Forward, backward, clip, projection, Adam, renormalisation, counters: in float64, step after step."""
    sae = make_sae(kind, lr=0.02, beta1=0.8, beta2=0.95, max_grad_norm=max_grad_norm)
    cfg = sae.cfg
    optimizer = make_optimizer(sae, cfg)
    p = {name: value.requires_grad_() for name, value in params(sae).items()}
    plain = torch.optim.Adam(list(p.values()), lr=0.02, betas=(0.8, 0.95), foreach=False)
    counters = sae.num_batches_not_active.clone()
    start = params(sae)
    for step in range(6):
        x = make_x(7, 5, step)
        expected = reference.forward(params(sae), x, cfg, counters)
        output = training_step(sae, optimizer, x, cfg)
        torch.testing.assert_close(output["loss"].detach(), expected["loss"])
        counters = reference.training_step(p, plain, x, cfg, counters)
        for name, parameter in sae.named_parameters():
            torch.testing.assert_close(
                parameter.detach(), p[name].detach(), rtol=1e-8, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}"
            )
        assert torch.equal(sae.num_batches_not_active, counters)
    unused = {"topk": {"b_enc"}, "batchtopk": {"b_enc"}, "matryoshka": {"b_enc"}}.get(kind, set())
    for name, parameter in sae.named_parameters():
        assert torch.equal(parameter, start[name]) == (name in unused), name


def test_a_batch_of_contexts():
    """A step on x [contexts, positions, d] is one on their rows."""
    states = []
    for x in (make_x(6, 5), make_x(6, 5).view(2, 3, 5)):
        sae = make_sae("batchtopk")
        training_step(sae, make_optimizer(sae, sae.cfg), x, sae.cfg)
        states.append(state(sae))
    assert_same_state(*states)


def test_a_tiny_gradient_is_clipped_as_torch_does():
    """torch divides by norm + 1e-6, so a gradient slightly shorter than a tiny max_grad_norm is scaled down, too."""

    def tiny(**changes):
        sae = make_sae("batchtopk", input_unit_norm=False, n_batches_to_dead=100, l1_coeff=0.0, **changes)
        sae.b_dec.data.zero_()
        return sae  # of an input near 0, whose error is near 0

    sae, x = tiny(), make_x(7, 5) * 1e-5
    full = reference.gradients(params(sae), x, sae.cfg, sae.num_batches_not_active)
    norm = torch.cat([grad.flatten() for grad in full.values()]).norm().item()
    sae, seen = tiny(max_grad_norm=norm + 5e-7), []
    optimizer = make_optimizer(sae, sae.cfg)
    optimizer.register_step_pre_hook(lambda *_: seen.append(sae.b_dec.grad.clone()))
    training_step(sae, optimizer, x, sae.cfg)
    scale = (norm + 5e-7) / (norm + 1e-6)
    assert scale < 0.999
    torch.testing.assert_close(seen[0], full["b_dec"] * scale, rtol=1e-6, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_training_lowers_the_loss(kind):
    """Trained on the sparse combinations of a few directions, an SAE reconstructs them better than at its start."""
    g = torch.Generator().manual_seed(0)
    directions = torch.randn(12, 8, generator=g)
    sae = SAE_CLASSES[kind](sae_cfg(kind, d=8, F=32, k=3, lr=0.01, l1_coeff=0.001, dtype="float32"))
    optimizer = make_optimizer(sae, sae.cfg)
    losses = []
    for _ in range(150):
        codes = torch.rand(64, 12, generator=g) * (torch.rand(64, 12, generator=g) < 0.2)
        losses.append(training_step(sae, optimizer, codes @ directions, sae.cfg)["l2_loss"].item())
    assert sum(losses[-10:]) < 0.5 * sum(losses[:10])


# Saving and loading


def trained(kind, seed=0, steps=3, **changes):
    """An SAE a few steps into training, with a feature that is never active: no buffer is at its initial value."""
    sae = make_sae(kind, seed, **changes)
    with torch.no_grad():
        sae.W_enc[:, 0] = 0
        sae.b_enc[0] = -1
    optimizer = make_optimizer(sae, sae.cfg)
    for step in range(steps):
        training_step(sae, optimizer, make_x(7, 5, seed * 100 + step), sae.cfg)
    return sae


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.fast
def test_save_and_load_round_trip(kind, dtype, tmp_path):
    """A loaded SAE has the saved one's type, config, parameters and buffers bit for bit, in eval mode."""
    sae = trained(kind, dtype=dtype)
    assert sae.num_batches_not_active.any()
    before = state(sae)
    save_sae(sae, tmp_path / "run" / "sae")
    assert_same_state(state(sae), before)
    x = make_x(7, 5, 50)
    for folder in (tmp_path / "run" / "sae", tmp_path / "run", str(tmp_path / "run")):
        loaded = load_sae(folder)
        assert type(loaded) is type(sae)
        assert loaded.cfg == sae.cfg
        assert not loaded.training
        assert {name: t.dtype for name, t in loaded.state_dict().items()} == {n: t.dtype for n, t in before.items()}
        assert_same_state(state(loaded), before)
        sae.eval()
        assert torch.equal(loaded(x)["sae_out"], sae(x)["sae_out"])


def test_training_continues_after_loading(tmp_path):
    """Counters and threshold continue from the saved values, not from 0."""
    sae = trained("batchtopk")
    save_sae(sae, tmp_path / "sae")
    loaded = load_sae(tmp_path / "sae").train()
    for one in (sae, loaded):
        training_step(one, make_optimizer(one, one.cfg), make_x(7, 5, 60), one.cfg)
    assert_same_state(state(loaded), state(sae))


def test_saving_replaces_the_whole_folder(tmp_path):
    """A second save leaves the second SAE and nothing of the first, and no folder beside it."""
    folder = tmp_path / "sae"
    save_sae(trained("jumprelu", F=30), folder)
    (folder / "stray").write_text("left over")
    second = trained("batchtopk", seed=1)
    save_sae(second, folder)
    assert_same_state(state(load_sae(folder)), state(second))
    assert sorted(path.name for path in folder.iterdir()) == ["cfg.json", "sae_weights.safetensors"]
    assert [path.name for path in tmp_path.iterdir()] == ["sae"]


@pytest.mark.parametrize("breaks", ["write", "write_json"])
def test_a_failed_save_keeps_the_old_sae(breaks, tmp_path, monkeypatch):
    """If writing fails half way, the SAE saved before is still there; the next save works."""
    folder, first, second = tmp_path / "sae", trained("topk"), trained("topk", seed=1)
    save_sae(first, folder)

    def no_space(*_):
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, breaks, no_space)
        with pytest.raises(OSError, match="no space"):
            save_sae(second, folder)
    assert_same_state(state(load_sae(folder)), state(first))
    save_sae(second, folder)
    assert_same_state(state(load_sae(folder)), state(second))
    assert [path.name for path in tmp_path.iterdir()] == ["sae"]


def save_and_die(sae, folder, cut_at: int) -> bool:
    """save_sae in a process that dies at its `cut_at`-th step on files, before it is taken; False if it took all."""
    steps = []

    def audit(event, _):
        if event in ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree"):
            steps.append(event)
            if len(steps) == cut_at:
                os._exit(9)

    if (pid := os.fork()) == 0:
        try:
            sys.addaudithook(audit)
            save_sae(sae, folder)
        finally:
            os._exit(len(steps) < cut_at or 1)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 9


@pytest.mark.parametrize("cut_before", [False, True])
def test_a_killed_save_leaves_the_old_or_the_new_sae(tmp_path, cut_before):
    """At each step on files: what is loaded is one of the two, and the next save leaves that one alone."""
    first, second, third = (trained("topk", seed=seed) for seed in range(3))
    found = []
    while True:
        folder = tmp_path / f"run{len(found)}" / "sae"
        save_sae(first, folder)
        if cut_before:  # between the renames: another kill is not to take what only that place has
            folder.rename(folder.with_name("sae.old"))
        killed = save_and_die(second, folder, len(found) + 1)
        for place in (folder, folder.parent):
            loaded = state(load_sae(place))["b_dec"].tolist()
            assert loaded in (state(first)["b_dec"].tolist(), state(second)["b_dec"].tolist())
        found.append(loaded == state(second)["b_dec"].tolist())
        save_sae(third, folder)
        assert_same_state(state(load_sae(folder)), state(third))
        assert [path.name for path in folder.parent.iterdir()] == ["sae"]
        if not killed:
            break
    assert found == sorted(found) and len(found) > 10 and not found[0] and found[-1]


def truncate(path, keep):
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * keep)])


def change_cfg(folder, **changes):
    cfg = json.loads((folder / "cfg.json").read_text())
    (folder / "cfg.json").write_text(json.dumps(cfg | changes))


def change_weights(folder, change):
    """Other tensors in the file of the weights, without a checksum, as older folders are."""
    change_cfg(folder, weights_sha256=None)
    tensors = load_file(folder / "sae_weights.safetensors")
    save_file(change({name: tensor.clone() for name, tensor in tensors.items()}), folder / "sae_weights.safetensors")


def change_header(folder, change):
    """Another header before the same data, without a checksum."""
    change_cfg(folder, weights_sha256=None)
    path = folder / "sae_weights.safetensors"
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.dumps(change(json.loads(content[8 : 8 + length]))).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + content[8 + length :])


CORRUPTIONS = {
    "no folder": lambda folder: shutil.rmtree(folder),
    "no weights": lambda folder: (folder / "sae_weights.safetensors").unlink(),
    "no config": lambda folder: (folder / "cfg.json").unlink(),
    "empty weights": lambda folder: truncate(folder / "sae_weights.safetensors", 0),
    "half the weights": lambda folder: truncate(folder / "sae_weights.safetensors", 0.5),
    "nearly all the weights": lambda folder: truncate(folder / "sae_weights.safetensors", 0.999),
    "empty config": lambda folder: truncate(folder / "cfg.json", 0),
    "half the config": lambda folder: truncate(folder / "cfg.json", 0.5),
    "config is a list": lambda folder: (folder / "cfg.json").write_text("[]"),
    "config of another size": lambda folder: change_cfg(folder, dict_size=25),
    "config of another type": lambda folder: change_cfg(folder, sae_type="jumprelu"),
    "config of no type": lambda folder: change_cfg(folder, sae_type="batchtopkk"),
    "config of an absurd size": lambda folder: change_cfg(folder, dict_size=10**12),
    "config of an absurd width": lambda folder: change_cfg(folder, act_size=10**12),
    "config of no width": lambda folder: change_cfg(folder, act_size=None),
    "half the header": lambda folder: truncate(folder / "sae_weights.safetensors", 0.05),
    "a header that ends nowhere": lambda folder: (folder / "sae_weights.safetensors").write_bytes(b"\xff" * 64),
    "a header with absurd shapes": lambda folder: change_header(
        folder, lambda header: header | {"W_dec": header["W_dec"] | {"shape": [10**12, 5]}}
    ),
    "one tensor less": lambda folder: change_weights(
        folder, lambda t: {name: t[name] for name in t if name != "b_enc"}
    ),
    "no decoder": lambda folder: change_weights(folder, lambda t: {name: t[name] for name in t if name != "W_dec"}),
    "one tensor more": lambda folder: change_weights(folder, lambda t: t | {"W_more": torch.zeros(3)}),
    "another dtype": lambda folder: change_weights(folder, lambda t: t | {"b_dec": t["b_dec"].half()}),
    "decoder of another dtype": lambda folder: change_weights(folder, lambda t: t | {"W_dec": t["W_dec"].half()}),
    "another shape": lambda folder: change_weights(folder, lambda t: t | {"b_dec": t["b_dec"][:-1]}),
}
SAID = {
    "no folder": "sae", "no weights": "sae_weights.safetensors", "no config": "cfg.json",
    "config of no type": "sae_type", "one tensor less": "b_enc is absent", "no decoder": "W_dec is absent",
    "config of an absurd size": "float64 [1000000000000, 5]", "one tensor more": "W_more is float32 [3]",
    "another dtype": "b_dec is float16 [5]; its config requires float64 [5]",
    "decoder of another dtype": "W_dec is float16", "another shape": "b_dec is float64 [4]",
}  # fmt: skip


@pytest.mark.parametrize("corruption", CORRUPTIONS)
def test_loading_invalid_files_is_a_clear_error(corruption, tmp_path):
    """Missing, truncated or misfitting files raise InputError, in one line, never a half-loaded SAE."""
    folder = tmp_path / "sae"
    save_sae(trained("batchtopk"), folder)
    CORRUPTIONS[corruption](folder)
    with pytest.raises(InputError) as error:
        load_sae(folder)
    message = str(error.value)
    assert "\n" not in message
    assert SAID.get(corruption, str(folder)) in message


@pytest.mark.parametrize("kind", ["vanilla", "jumprelu"])
def test_an_sae_saved_before_a_buffer_was_added(kind, tmp_path):
    """batches_until_sparse is then as in an untrained SAE; all else is what was saved, and it trains on."""
    folder, sae = tmp_path / "sae", trained(kind)
    sae.batches_until_sparse.fill_(3)
    save_sae(sae, folder)
    change_weights(folder, lambda t: {name: t[name] for name in t if name != "batches_until_sparse"})
    loaded = load_sae(folder)
    untrained = make_sae(kind).batches_until_sparse
    assert_same_state(state(loaded), state(sae) | {"batches_until_sparse": untrained})
    training_step(loaded.train(), make_optimizer(loaded, loaded.cfg), make_x(7, 5, 60), loaded.cfg)


@pytest.mark.parametrize("error", [MemoryError("8 GiB"), torch.OutOfMemoryError("CUDA out of memory.")])
def test_loading_with_too_little_memory(error, tmp_path, monkeypatch):
    """The file is not to blame."""
    save_sae(trained("topk"), tmp_path / "sae")

    def load_file(path):
        raise error

    monkeypatch.setattr(checkpoint, "load_file", load_file)
    with pytest.raises(type(error)):
        load_sae(tmp_path / "sae")


def test_loading_needs_no_pickle(tmp_path):
    """Loading runs no code from the file: a pickled state dict in place of the weights is refused."""
    folder, sae = tmp_path / "sae", trained("topk")
    save_sae(sae, folder)
    torch.save(sae.state_dict(), folder / "sae_weights.safetensors")
    with pytest.raises(InputError):
        load_sae(folder)


@pytest.mark.fast
def test_a_step_after_one_in_which_memory_ran_out():
    """In its backward pass, when some gradients are there already: they are not added to those of the next step."""
    make = lambda: make_sae("batchtopk", d=12, F=24, k=3, lr=0.01)  # noqa: E731
    x = make_x(6, 12, 0, torch.float64)
    sae, expected = make(), make()
    training_step(expected, make_optimizer(expected, expected.cfg), x, expected.cfg)

    def no_memory(grad):
        raise torch.OutOfMemoryError("no memory")

    hook = sae.W_enc.register_hook(no_memory)
    with pytest.raises(torch.OutOfMemoryError):
        training_step(sae, make_optimizer(sae, sae.cfg), x, sae.cfg)
    assert sae.W_dec.grad is not None
    hook.remove()
    training_step(sae, make_optimizer(sae, sae.cfg), x, sae.cfg)
    for name, value in state(expected).items():
        assert torch.equal(state(sae)[name], value), name

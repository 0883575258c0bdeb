"""The four SAEs hold to their definitions: values, gradients, selection, no side effects, initialisation."""

import math

import pytest
import reference
import torch
from helpers import (
    KINDS,
    assert_outputs_match,
    assert_same_state,
    dense,
    make_sae,
    make_x,
    params,
    positive_encoder,
    sae_cfg,
    set_threshold,
    state,
)

from config import TOP_K_TYPES
from sae import SAE_CLASSES
from training_step import make_optimizer, training_step

pytestmark = pytest.mark.usefixtures("form")

# seed, B, d, F, k
SHAPES = [(0, 5, 4, 9, 2), (1, 1, 3, 7, 1), (2, 8, 6, 6, 6), (3, 7, 5, 24, 3), (4, 12, 2, 5, 4), (5, 6, 16, 40, 5)]


def assert_gradients_match(sae, expected):
    assert {name for name, _ in sae.named_parameters()} == set(expected)
    for name, parameter in sae.named_parameters():
        grad = torch.zeros_like(parameter) if parameter.grad is None else dense(parameter.grad)
        torch.testing.assert_close(grad, expected[name], rtol=1e-9, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")


# Values and gradients against the reference


@pytest.mark.parametrize("input_unit_norm", [True, False])
@pytest.mark.parametrize("seed, B, d, F, k", SHAPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.fast
def test_outputs_and_gradients_equal_the_reference(kind, seed, B, d, F, k, input_unit_norm):
    """In training, everything forward returns and every parameter's gradient are as defined, in float64."""
    sae = make_sae(kind, seed, d=d, F=F, k=k, input_unit_norm=input_unit_norm)
    x = make_x(B, d, seed)
    counters = sae.num_batches_not_active.clone()
    output = sae(x)
    output["loss"].backward()
    expected = reference.forward(params(sae), x, sae.cfg, counters)
    assert ("aux_loss" in output) == (kind in TOP_K_TYPES)
    assert_outputs_match(output, expected, rtol=1e-10, atol=1e-12)
    assert_gradients_match(sae, reference.gradients(params(sae), x, sae.cfg, counters))


@pytest.mark.parametrize("seed, B, d, F, k", SHAPES)
@pytest.mark.parametrize("kind", KINDS)
def test_float32_outputs_equal_the_reference(kind, seed, B, d, F, k):
    """A float32 SAE returns float32, within float32 rounding of the reference in float64."""
    sae = make_sae(kind, seed, d=d, F=F, k=k, dtype="float32")
    x = make_x(B, d, seed, torch.float32)
    output = sae(x)
    assert output["sae_out"].dtype == output["feature_acts"].dtype == output["loss"].dtype == torch.float32
    expected = reference.forward(params(sae), x.double(), sae.cfg, sae.num_batches_not_active)
    assert_outputs_match(output, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_encode_decode_and_reconstruct_equal_the_reference(kind):
    """encode is feature_acts, decode of it mapped back is sae_out, reconstruct is both."""
    sae, x = make_sae(kind), make_x(7, 5)
    expected = reference.forward(params(sae), x, sae.cfg, sae.num_batches_not_active)
    acts = sae.encode(x)
    torch.testing.assert_close(acts, expected["feature_acts"])
    _, mean, std = sae.preprocess_input(x)
    torch.testing.assert_close(sae.decode(acts) * std + mean, expected["sae_out"])
    sae_out, acts = sae.reconstruct(x)
    torch.testing.assert_close(dense(acts), expected["feature_acts"])
    torch.testing.assert_close(sae_out, expected["sae_out"])


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_no_tokens(kind, training):
    """As when a model is spliced and its prompt has no position but the first."""
    sae = make_sae(kind)
    sae.update_statistics(sae(make_x(7, 5)))
    sae.train(training)
    for shape in ((0,), (2, 0)):
        x = torch.zeros(*shape, 5)
        acts = sae.encode(x)
        assert acts.shape == (*shape, len(sae.W_dec))
        assert sae.decode(acts).shape == sae.decode(acts, like=x).shape == sae.reconstruct(x)[0].shape == x.shape


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_leading_dimensions_are_those_of_the_flattened_batch(kind, training):
    """encode, decode, reconstruct and forward of [2, 3, d] and of [d] are those of the tokens in a row."""
    sae = make_sae(kind)
    sae(make_x(7, 5))
    sae.update_statistics(sae(make_x(7, 5)))
    sae.train(training)
    for shape in ((2, 3), ()):
        flat = make_x(6 if shape else 1, 5, 3)
        x = flat.view(*shape, 5)
        acts, output, expected = sae.encode(x), sae(x), sae(flat)
        assert torch.equal(acts.view(len(flat), -1), sae.encode(flat)) and acts.shape[:-1] == shape
        assert torch.equal(sae.decode(acts, like=x).view(flat.shape), sae.decode(sae.encode(flat), like=flat))
        assert torch.equal(sae.reconstruct(x)[0].view(flat.shape), sae.reconstruct(flat)[0])
        assert sae.reconstruct(x)[0].shape == x.shape and torch.equal(sae.reconstruct(x)[1], acts)
        assert torch.equal(output.pop("sae_out").view(flat.shape), expected.pop("sae_out"))
        for key, value in output.items():
            assert torch.equal(dense(value), dense(expected[key])), key


@pytest.mark.parametrize("top_k_aux", [1, 4, 512])
@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("kind", TOP_K_TYPES)
@pytest.mark.fast
def test_aux_loss_equals_the_reference(kind, seed, top_k_aux):
    """With dead features, the aux loss and its gradients are as published: residual not detached, any top_k_aux."""
    sae = make_sae(kind, seed, d=6, F=40, k=2, top_k_aux=top_k_aux, aux_penalty=3.0)
    x = make_x(5, 6, seed)
    sae.num_batches_not_active[:30] = 3  # with this batch 4 = n_batches_to_dead, unless active in it
    counters = sae.num_batches_not_active.clone()
    output = sae(x)
    assert 4 < output["num_dead_features"] < 40
    assert output["aux_loss"] > 0
    output["loss"].backward()
    expected = reference.forward(params(sae), x, sae.cfg, counters)
    assert_outputs_match(output, expected, rtol=1e-10, atol=1e-12)
    assert_gradients_match(sae, reference.gradients(params(sae), x, sae.cfg, counters))


@pytest.mark.parametrize("kind", TOP_K_TYPES)
def test_aux_loss_is_zero_without_dead_features(kind):
    """Where no feature is dead there is no aux loss: it is 0, and the loss is L2 + L1."""
    sae, x = make_sae(kind, matryoshka_sizes=[24]), make_x(7, 5)
    sae.num_batches_not_active.fill_(2)
    output = sae(x)
    assert output["num_dead_features"] == 0
    assert output["aux_loss"] == 0
    torch.testing.assert_close(output["loss"], output["l2_loss"] + output["l1_loss"])
    sae.num_batches_not_active.fill_(3)
    assert sae(x)["aux_loss"] > 0


# Gradients against finite differences, where the loss is differentiable


@pytest.mark.parametrize("input_unit_norm", [True, False])
@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck(kind, seed, input_unit_norm):
    """loss and sae_out have the finite-difference gradients, in the input too, away from ties and thresholds."""
    sae = make_sae(kind, seed, d=4, F=10, k=2, top_k_aux=2, input_unit_norm=input_unit_norm)
    x = make_x(4, 4, seed)
    sae.num_batches_not_active.fill_(3)
    names = [name for name, _ in sae.named_parameters() if name != "jumprelu.log_threshold"]
    inputs = [parameter.detach().clone().requires_grad_() for _, parameter in sae.named_parameters()]
    inputs = [value for (name, _), value in zip(sae.named_parameters(), inputs) if name in names]

    # No selection changes within the steps of the finite differences.
    z = reference.pre_activation(params(sae), reference.normalise(x, sae.cfg)[0], sae.cfg)
    z = z - sae.jumprelu.log_threshold.exp() if kind == "jumprelu" else z
    distances = torch.cat([z.flatten().abs(), z.flatten().sort().values.diff()])
    assert distances.min() > 1e-4
    assert sae(x)["num_dead_features"] > 2 or kind not in TOP_K_TYPES

    def function(x, *values):
        output = torch.func.functional_call(sae, dict(zip(names, values)), (x,))
        return output["loss"], output["sae_out"]

    assert torch.autograd.gradcheck(function, (x.requires_grad_(), *inputs), check_undefined_grad=False)


# JumpReLU's pseudo-derivatives

BANDWIDTH = 0.1
OFFSETS = {"upper half": 0.04, "lower half": -0.04, "above": 0.06, "below": -0.06}  # z − θ; half the width is .05


def identity_jumprelu(thresholds, **changes):
    """z = x, so that every pre-activation can be set; the decoder is the identity too."""
    n = len(thresholds)
    sae = SAE_CLASSES["jumprelu"](sae_cfg("jumprelu", d=n, F=n, input_unit_norm=False, **changes))
    with torch.no_grad():
        sae.W_enc.copy_(torch.eye(n))
        sae.W_dec.copy_(torch.eye(n))
        sae.jumprelu.log_threshold.copy_(torch.tensor(thresholds, dtype=torch.float64).log())
    return sae


@pytest.mark.parametrize("theta", [1.0, 0.3, 2.5])
@pytest.mark.parametrize("place", OFFSETS)
def test_jumprelu_threshold_gradients_in_and_out_of_the_window(place, theta):
    """θ's gradient is −θ/ε for the activation and −1/ε for the L0, times θ for the logarithm, in both halves only."""
    sae = identity_jumprelu([theta] * 2, bandwidth=BANDWIDTH, l1_coeff=0.3)
    x = torch.tensor([[theta + OFFSETS[place], 100.0], [100.0, 100.0]], dtype=torch.float64)
    inside = 1.0 if place.endswith("half") else 0.0
    log_threshold = sae.jumprelu.log_threshold

    (grad,) = torch.autograd.grad((sae(x)["sae_out"] * 7).sum(), [log_threshold])
    torch.testing.assert_close(grad, torch.tensor([-inside * 7 * theta**2 / BANDWIDTH, 0.0], dtype=torch.float64))
    (grad,) = torch.autograd.grad(sae(x)["l1_loss"], [log_threshold])
    expected = -inside * 0.3 / 2 * theta / BANDWIDTH  # mean over 2 tokens
    torch.testing.assert_close(grad, torch.tensor([expected, 0.0], dtype=torch.float64))


def test_jumprelu_gradients_sum_over_the_tokens():
    """Each token in a feature's window adds its own pseudo-derivative, weighted by its own upstream gradient."""
    sae = identity_jumprelu([1.0, 2.0], bandwidth=BANDWIDTH)
    x = torch.tensor([[1.01, 1.98], [0.97, 5.0], [1.2, 2.02]], dtype=torch.float64)
    weight = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]], dtype=torch.float64)
    (sae(x)["sae_out"] * weight).sum().backward()
    expected = torch.tensor([-(1 + 3) * 1**2, -(2 + 6) * 2**2], dtype=torch.float64) / BANDWIDTH
    torch.testing.assert_close(sae.jumprelu.log_threshold.grad, expected)


def test_jumprelu_window_is_of_the_pre_activation_and_not_of_its_relu():
    """A window that reaches below 0 holds z = −.4 but not z = −.6, though relu makes both 0."""
    sae = identity_jumprelu([1.0] * 4, bandwidth=3.0, l1_coeff=1.0)  # the window is (−.5, 2.5)
    x = torch.tensor([[-0.4, -0.6, 2.4, 2.6]], dtype=torch.float64)
    inside = torch.tensor([1.0, 0.0, 1.0, 0.0], dtype=torch.float64)
    (grad,) = torch.autograd.grad(sae(x)["l1_loss"], [sae.jumprelu.log_threshold])
    torch.testing.assert_close(grad, -inside / 3)
    (grad,) = torch.autograd.grad(sae(x)["sae_out"].sum(), [sae.jumprelu.log_threshold])
    torch.testing.assert_close(grad, -inside / 3)


def test_jumprelu_l0_penalty_moves_thresholds_only():
    """The L0 penalty counts z > θ and has no gradient in anything but the thresholds."""
    sae, x = make_sae("jumprelu"), make_x(7, 5)
    output = sae(x)
    count = (dense(output["feature_acts"]) > 0).sum() / len(x)
    torch.testing.assert_close(output["l1_loss"], sae.cfg["l1_coeff"] * count.double())
    output["l1_loss"].backward()
    for name, parameter in sae.named_parameters():
        moved = parameter.grad is not None and bool((parameter.grad != 0).any())
        assert moved == (name == "jumprelu.log_threshold"), name


def test_jumprelu_keeps_the_value_above_the_threshold():
    """f is z itself above θ = exp(log_threshold), not z − θ, and 0 at θ or below; its slope in z is 1 or 0."""
    sae = identity_jumprelu([1.0, 1.0, 1.0, 1.0])
    x = torch.tensor([[1.5, 1.0, 0.5, -3.0]], dtype=torch.float64, requires_grad=True)
    acts = sae.encode(x)
    assert acts.tolist() == [[1.5, 0, 0, 0]]
    assert torch.autograd.grad(acts.sum(), x)[0].tolist() == [[1, 0, 0, 0]]


# Selection


@pytest.mark.parametrize("kind", TOP_K_TYPES)
def test_ties_keep_exactly_k(kind):
    """Where all pre-activations are equal, still exactly k per row (topk) or B·k per batch survive."""
    sae = positive_encoder(kind, k=3)
    with torch.no_grad():
        sae.W_enc.fill_(0.5)
    x = torch.ones(4, 5, dtype=torch.float64)
    output = sae(x)
    acts = dense(output["feature_acts"])
    assert (acts > 0).sum() == 12
    assert acts[acts > 0].tolist() == [2.5] * 12
    assert output["l0_norm"] == 3
    if kind == "topk":
        assert (acts > 0).sum(-1).tolist() == [3] * 4


@pytest.mark.parametrize("kind", KINDS)
def test_rows_with_nothing_positive(kind):
    """A row whose pre-activations are all negative has no active feature and is reconstructed as b_dec."""
    sae = positive_encoder(kind)
    x = torch.ones(4, 5, dtype=torch.float64)
    x[1:3] = -2
    with torch.no_grad():
        sae.b_dec.fill_(0.25)
    output = sae(x)
    acts = dense(output["feature_acts"])
    assert (acts[1:3] == 0).all()
    assert (acts[[0, 3]] > 0).any(-1).all()
    assert (output["sae_out"][1:3] == 0.25).all()
    output["loss"].backward()
    assert all(p.grad.isfinite().all() for p in sae.parameters() if p.grad is not None)


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_with_nothing_positive(kind):
    """With no active feature at all the figures are 0, every feature counts as inactive, gradients are finite."""
    sae = positive_encoder(kind, n_batches_to_dead=1)
    x = -torch.ones(4, 5, dtype=torch.float64)
    output = sae(x)
    output["loss"].backward()
    assert (dense(output["feature_acts"]) == 0).all()
    assert output["l0_norm"] == output["l1_norm"] == output["l1_loss"] == 0
    assert output["num_dead_features"] == 24
    torch.testing.assert_close(output["l2_loss"], torch.tensor(1.0, dtype=torch.float64))
    if kind in TOP_K_TYPES:  # nothing positive among the dead either: the whole residual remains
        torch.testing.assert_close(output["aux_loss"], torch.tensor(0.5, dtype=torch.float64))
    assert all(p.grad.isfinite().all() for p in sae.parameters() if p.grad is not None)


@pytest.mark.parametrize("value", [0.0, 5.0])
@pytest.mark.parametrize("kind", KINDS)
def test_rows_without_variance(kind, value):
    """A constant row normalises to 0 and comes back as its own mean; nothing is infinite or undefined."""
    sae, x = make_sae(kind), make_x(6, 5)
    x[2] = value
    counters = sae.num_batches_not_active
    output = sae(x)
    output["loss"].backward()
    assert (output["sae_out"][2] == value).all()
    assert_outputs_match(output, reference.forward(params(sae), x, sae.cfg, counters), rtol=1e-10, atol=1e-12)
    assert_gradients_match(sae, reference.gradients(params(sae), x, sae.cfg, counters))


@pytest.mark.parametrize("kind", KINDS)
def test_input_unit_norm_makes_features_blind_to_scale_and_offset(kind):
    """With input_unit_norm, a x + b has the features of x and its reconstruction is a·r + b."""
    sae, x = make_sae(kind), make_x(6, 5)
    one, other = sae(x), sae(1000 * x + 50)
    torch.testing.assert_close(dense(other["feature_acts"]), dense(one["feature_acts"]), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(other["sae_out"], 1000 * one["sae_out"] + 50, rtol=1e-3, atol=1e-1)


# No side effects


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_forward_has_no_side_effects(kind, train):
    """forward, encode, reconstruct and backward leave the state dict, the mode and the global RNG as they were."""
    sae, x = make_sae(kind).train(train), make_x(7, 5)
    if kind in ("batchtopk", "matryoshka"):
        set_threshold(sae, 0.4)
    before, rng, x_before = state(sae), torch.get_rng_state(), x.clone()
    first = sae(x)
    first["loss"].backward()
    sae.encode(x)
    sae.reconstruct(x)
    second = sae(x)
    assert_same_state(state(sae), before)
    assert torch.equal(torch.get_rng_state(), rng)
    assert torch.equal(x, x_before)
    assert sae.training == train
    for key in first:
        assert torch.equal(dense(first[key]), dense(second[key])), key


@pytest.mark.parametrize("kind", KINDS)
def test_evaluating_between_steps_does_not_change_training(kind):
    """A run with forwards in eval() between its steps ends with the same state as one without."""
    ends = []
    for evaluating in (False, True):
        sae = make_sae(kind)
        optimizer = make_optimizer(sae, sae.cfg)
        for step in range(4):
            training_step(sae, optimizer, make_x(7, 5, step), sae.cfg)
            if evaluating:
                with torch.no_grad():
                    sae.eval()(make_x(3, 5, 100 + step))
                    sae.train()(make_x(3, 5, 200 + step))
        ends.append(state(sae))
    assert_same_state(*ends)


@pytest.mark.parametrize("kind", KINDS)
def test_constructing_leaves_the_global_rng_alone(kind):
    """Building an SAE neither reads nor moves the global RNG."""
    weights = []
    for global_seed in (0, 1):
        torch.manual_seed(global_seed)
        before = torch.get_rng_state()
        weights.append(state(SAE_CLASSES[kind](sae_cfg(kind))))
        assert torch.equal(torch.get_rng_state(), before)
    assert_same_state(*weights)


@pytest.mark.parametrize("kind", KINDS)
def test_the_seed_decides_the_weights(kind):
    """Same seed, same weights; another seed, other weights. All four types draw the same W_enc from a seed."""
    one, same, other = (SAE_CLASSES[kind](sae_cfg(kind, seed=seed)) for seed in (7, 7, 8))
    assert_same_state(state(one), state(same))
    assert not torch.isclose(one.W_enc, other.W_enc).any()
    assert torch.equal(one.W_enc, SAE_CLASSES["vanilla"](sae_cfg("vanilla", seed=7)).W_enc)


# Initialisation


@pytest.mark.parametrize("kind", KINDS)
def test_parameter_names_and_shapes(kind):
    """Parameters have their published names and shapes; what a resume needs is in the state dict."""
    sae = SAE_CLASSES[kind](sae_cfg(kind, d=6, F=10))
    expected = {"W_enc": (6, 10), "W_dec": (10, 6), "b_enc": (10,), "b_dec": (6,)}
    if kind == "jumprelu":
        expected["jumprelu.log_threshold"] = (10,)
    assert {name: tuple(parameter.shape) for name, parameter in sae.named_parameters()} == expected
    assert sae.state_dict()["num_batches_not_active"].shape == (10,)
    if kind in ("batchtopk", "matryoshka"):
        assert sae.state_dict()["threshold"].shape == ()


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("kind", KINDS)
def test_initial_values(kind, dtype):
    """W_enc fills U(±√(6/F)), W_dec is its transpose with unit rows, biases, thresholds' logs and counters are 0."""
    d, F = 30, 200
    sae = SAE_CLASSES[kind](sae_cfg(kind, d=d, F=F, dtype=dtype))
    assert all(parameter.dtype == getattr(torch, dtype) for parameter in sae.parameters())
    W_enc, bound = sae.W_enc.detach().double(), math.sqrt(6 / F)
    assert W_enc.abs().max() <= bound
    assert W_enc.min() < -0.99 * bound
    assert W_enc.max() > 0.99 * bound
    assert W_enc.mean().abs() < 4 * bound / math.sqrt(3 * d * F)  # four standard errors of the mean
    assert W_enc.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.03)  # that of a uniform distribution
    rows = W_enc.T / W_enc.T.norm(dim=-1, keepdim=True)
    torch.testing.assert_close(sae.W_dec.detach().double(), rows, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(sae.W_dec.detach().double().norm(dim=-1), torch.ones(F).double(), rtol=0, atol=1e-6)
    zero = {"b_enc", "b_dec", "num_batches_not_active", "threshold", "jumprelu.log_threshold"} & set(sae.state_dict())
    assert len(zero) == (3 if kind in ("vanilla", "topk") else 4)
    for name in zero:
        assert (sae.state_dict()[name] == 0).all(), name


def test_encoder_and_decoder_share_no_memory():
    """W_dec starts as W_enc's transpose but is a parameter of its own."""
    sae = SAE_CLASSES["topk"](sae_cfg("topk"))
    before = sae.W_dec.detach().clone()
    with torch.no_grad():
        sae.W_enc.add_(1)
    assert torch.equal(sae.W_dec, before)

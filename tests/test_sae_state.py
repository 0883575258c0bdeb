"""What an SAE keeps from training, counters and thresholds, and what it does with them in train() and eval()."""

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

from sae import SAE_CLASSES
from training_step import make_optimizer, training_step

pytestmark = [pytest.mark.fast, pytest.mark.usefixtures("form")]

# train() and eval()


@pytest.mark.parametrize("kind", KINDS)
def test_only_batchtopk_differs_in_eval(kind):
    """train() and eval() give the same figures for every type but BatchTopK."""
    sae, x = make_sae(kind), make_x(7, 5)
    if kind in ("batchtopk", "matryoshka"):
        set_threshold(sae, 0.4)
    training, evaluating = sae.train()(x), sae.eval()(x)
    assert training.keys() == evaluating.keys()
    same = all(torch.equal(dense(training[key]), dense(evaluating[key])) for key in training)
    assert same == (kind not in ("batchtopk", "matryoshka"))


@pytest.mark.parametrize("threshold", [0.05, 0.4, 1.5])
def test_batchtopk_eval_equals_the_reference(threshold):
    """In eval() BatchTopK keeps z where z > threshold; the other figures follow from that."""
    sae, x = make_sae("batchtopk").eval(), make_x(7, 5)
    set_threshold(sae, threshold)
    expected = reference.forward(params(sae), x, sae.cfg, sae.num_batches_not_active, threshold)
    assert_outputs_match(sae(x), expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(sae.encode(x), expected["feature_acts"])


def test_batchtopk_eval_threshold_is_exclusive():
    """A pre-activation equal to the threshold is not active: f = z · 1[z > θ]."""
    sae = positive_encoder("batchtopk").eval()
    with torch.no_grad():
        sae.W_enc.fill_(0.5)
    set_threshold(sae, 2.5)
    ones = torch.ones(1, 5, dtype=torch.float64)
    assert (sae.encode(ones) == 0).all()
    assert (sae.encode(ones * 1.001) > 2.5).all()


@pytest.mark.parametrize("kind", KINDS)
def test_in_eval_a_token_does_not_see_the_others(kind):
    """In eval() a token's features are the same alone, among other tokens, and in another order."""
    sae, x = make_sae(kind).eval(), make_x(7, 5)
    if kind in ("batchtopk", "matryoshka"):
        set_threshold(sae, 0.4)
    together = sae.encode(x)
    assert (together > 0).any()
    torch.testing.assert_close(torch.cat([sae.encode(token[None]) for token in x]), together)
    torch.testing.assert_close(sae.encode(torch.cat([x[:1], 100 * make_x(6, 5, 9)]))[0], together[0])
    torch.testing.assert_close(sae.encode(x.flip(0)), together.flip(0))


def test_batchtopk_in_train_does_see_the_others():
    """In train() the batch decides: the same token keeps fewer features beside stronger ones."""
    sae, x = positive_encoder("batchtopk"), torch.ones(2, 5, dtype=torch.float64)
    alone = sae.encode(x[:1])
    x[1] = 10
    assert (sae.encode(x)[0] > 0).sum() < (alone > 0).sum()


def test_batchtopk_eval_without_a_threshold_raises():
    """Without an inference threshold, eval() encoding raises instead of answering; train() works."""
    sae, x = make_sae("batchtopk").eval(), make_x(7, 5)
    for encode in (sae, sae.encode, sae.reconstruct):
        with pytest.raises(RuntimeError, match="threshold"):
            encode(x)
    sae.train()(x)
    optimizer = make_optimizer(sae, sae.cfg)
    training_step(sae, optimizer, x, sae.cfg)
    sae.eval()(x)


# What training_step keeps: thresholds and counters


def test_batchtopk_threshold_is_a_running_mean_of_the_smallest_kept():
    """threshold += (v − threshold) · max(1/n, .01), n counting only the batches with something positive."""
    sae = make_sae("batchtopk", input_unit_norm=False)
    optimizer = make_optimizer(sae, sae.cfg)
    threshold, n, skipped = 0.0, 0, 0
    for step in range(130):
        x = make_x(4, 5, step)
        if step in (0, 5, 120):
            x = sae.b_dec.detach().expand(4, 5).clone()  # z is 0 everywhere
        acts = reference.forward(params(sae), x, sae.cfg, sae.num_batches_not_active)["feature_acts"]
        v = reference.smallest_positive(acts)
        if v is None:
            skipped += 1
        else:
            n += 1
            threshold += (v - threshold) * max(1 / n, 0.01)
        training_step(sae, optimizer, x, sae.cfg)
        assert sae.threshold.item() == pytest.approx(threshold, rel=1e-6), step
        if step == 0:  # nothing learnt yet
            with pytest.raises(RuntimeError):
                sae.eval().encode(x)
            sae.train()
    assert (n, skipped) == (127, 3)


def test_batchtopk_threshold_skips_a_batch_of_negatives():
    """A batch whose pre-activations are all negative leaves threshold and its count as they were."""
    sae = positive_encoder("batchtopk")
    optimizer = make_optimizer(sae, sae.cfg)
    training_step(sae, optimizer, torch.ones(4, 5, dtype=torch.float64), sae.cfg)
    before = {name: tensor for name, tensor in state(sae).items() if name.startswith("threshold")}
    assert before["threshold"] > 0
    training_step(sae, optimizer, -torch.ones(4, 5, dtype=torch.float64), sae.cfg)
    after = {name: tensor for name, tensor in state(sae).items() if name.startswith("threshold")}
    assert_same_state(before, after)


@pytest.mark.parametrize("kind", KINDS)
def test_counters_equal_a_plain_loop(kind):
    """num_batches_not_active counts training steps since a feature was active; only training_step moves it."""
    sae = SAE_CLASSES[kind](sae_cfg(kind, F=20, k=2, lr=0.02, n_batches_to_dead=3))
    optimizer = make_optimizer(sae, sae.cfg)
    counts = [0] * 20
    revived = died = 0
    for step in range(25):
        x = make_x(3, 5, step)
        acts = reference.forward(params(sae), x, sae.cfg, torch.tensor(counts))["feature_acts"]
        for j in range(20):
            active = bool((acts[:, j] > 0).any())
            revived += active and counts[j] >= 3
            counts[j] = 0 if active else counts[j] + 1
            died += counts[j] == 3
        output = training_step(sae, optimizer, x, sae.cfg)
        assert sae.num_batches_not_active.tolist() == counts
        assert output["num_dead_features"] == sum(count >= 3 for count in counts)
        sae(x)
        assert sae.num_batches_not_active.tolist() == counts
    assert revived and died  # the run has seen both


@pytest.mark.parametrize("kind", KINDS)
def test_a_custom_loop_needs_only_update_statistics(kind):
    """forward and update_statistics do for the counters and the threshold what training_step does."""
    by_step, by_hand = make_sae(kind), make_sae(kind)
    optimizer = torch.optim.SGD(by_step.parameters(), lr=0.0)
    for step in range(3):
        training_step(by_step, optimizer, make_x(3, 5, step), by_step.cfg)
        by_hand.update_statistics(by_hand(make_x(3, 5, step)))
    for name, buffer in by_step.named_buffers():
        torch.testing.assert_close(buffer, dict(by_hand.named_buffers())[name])
    assert not torch.equal(by_hand.num_batches_not_active, make_sae(kind).num_batches_not_active)

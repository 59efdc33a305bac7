"""Losses have the values of their formulas and of the original implementations, and finite gradients."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import scipy.stats
from sklearn.metrics import log_loss
from sklearn.utils.class_weight import compute_class_weight

from jft import losses
from jft.errors import UserError

GOLDENS = np.load(Path(__file__).parent / "goldens" / "augment.npz")
LOGITS, SEVERAL = jnp.asarray(GOLDENS["logits"]), jnp.asarray(GOLDENS["label"])  # [6, 5]
LABEL = jnp.array([0, 4, 2, 2, 1, 3])
P = scipy.special.softmax(np.asarray(LOGITS, np.float64), -1)
ONE_HOT = np.eye(5)[np.asarray(LABEL)]
WEIGHTS = np.array([0.5, 2.0, 1.0, 0.25, 1.25])


def close(found, expected):
    np.testing.assert_allclose(found, expected, rtol=2e-5, atol=1e-6)


def test_cross_entropy():
    found = losses.cross_entropy(LOGITS, {"label": LABEL})
    assert float(found.mean()) == pytest.approx(log_loss(LABEL, P, labels=range(5)), rel=1e-5)
    close(losses.cross_entropy(LOGITS, {"label": jnp.asarray(ONE_HOT, jnp.float32)}), found)
    smooth = 0.8 * ONE_HOT + 0.2 / 5
    close(losses.cross_entropy(LOGITS, {"label": LABEL}, label_smoothing=0.2), -(smooth * np.log(P)).sum(-1))
    weighted = losses.cross_entropy(LOGITS, {"label": LABEL}, label_smoothing=0.2, class_weights=WEIGHTS)
    close(weighted, -(WEIGHTS * smooth * np.log(P)).sum(-1))
    weighted = losses.cross_entropy(LOGITS, {"label": LABEL}, class_weights=tuple(WEIGHTS))
    close(weighted, WEIGHTS[np.asarray(LABEL)] * found)
    with pytest.raises(ValueError, match=r"class weights of shape \(3,\) for 5 classes"):
        losses.cross_entropy(LOGITS, {"label": LABEL}, class_weights=[1.0, 2.0, 3.0])


def test_focal():
    close(losses.focal(LOGITS, {"label": LABEL}, gamma=0.0), losses.cross_entropy(LOGITS, {"label": LABEL}))
    found = losses.focal(LOGITS, {"label": LABEL}, gamma=2.0, class_weights=WEIGHTS)
    close(found, -(WEIGHTS * ONE_HOT * (1 - P) ** 2 * np.log(P)).sum(-1))
    # Of two classes it is the binary one.
    both = jnp.stack([jnp.zeros(6), LOGITS[:, 0]], 1)
    binary = losses.binary_focal(LOGITS[:, :1], {"label": SEVERAL[:, :1]}, alpha=None)
    close(losses.focal(both, {"label": SEVERAL[:, 0].astype(jnp.int32)}), binary)


def test_losses_of_several_labels_are_the_originals():
    batch = {"label": SEVERAL}
    close(losses.binary_focal(LOGITS, batch), GOLDENS["focal 2.0 0.25"])
    close(losses.binary_focal(LOGITS, batch, gamma=0.5, alpha=None), GOLDENS["focal 0.5 -1.0"])
    close(losses.asymmetric(LOGITS, batch), GOLDENS["asymmetric 4.0 0.0 0.05"])
    close(losses.asymmetric(LOGITS, batch, gamma_neg=2, gamma_pos=1, clip=0), GOLDENS["asymmetric 2.0 1.0 0.0"])
    # Without their options they are the binary cross-entropy.
    p, y = scipy.special.expit(np.asarray(LOGITS, np.float64)), np.asarray(SEVERAL)
    plain = -(y * np.log(p) + (1 - y) * np.log1p(-p))
    close(losses.binary_cross_entropy(LOGITS, batch), plain.sum(-1))
    close(losses.asymmetric(LOGITS, batch, gamma_neg=0, gamma_pos=0, clip=0), plain.sum(-1))
    close(losses.binary_focal(LOGITS, batch, gamma=0, alpha=None), plain.sum(-1))
    weights = np.where(y == 1, WEIGHTS, 1)
    close(losses.binary_cross_entropy(LOGITS, batch, class_weights=WEIGHTS), (weights * plain).sum(-1))
    indices = losses.binary_cross_entropy(LOGITS, {"label": LABEL}, label_smoothing=0.1)
    close(indices, losses.binary_cross_entropy(LOGITS, {"label": jnp.asarray(ONE_HOT)}, label_smoothing=0.1))


@pytest.mark.parametrize("loss", [losses.focal, losses.binary_focal, losses.asymmetric, losses.binary_cross_entropy])
def test_certain_predictions_have_finite_gradients(loss):
    options = {losses.asymmetric: {"gamma_neg": 0.5, "gamma_pos": 0.5}}.get(loss, {"gamma": 0.5})
    options = {} if loss is losses.binary_cross_entropy else options
    certain = jnp.array([[-200.0, 200.0, 0.0], [200.0, -200.0, 30.0], [-3.0, -2.9444, 0.0]])
    value, gradient = jax.value_and_grad(lambda z: loss(z, {"label": jnp.array([1, 1, 2])}, **options).sum())(certain)
    assert jnp.isfinite(value) and jnp.isfinite(gradient).all() and value >= 0


def test_regression():
    target = jnp.arange(6.0)
    off = np.asarray(LOGITS[:, 0]) - np.arange(6)
    close(losses.squared_error(LOGITS[:, :1], {"label": target}), off**2)
    close(losses.huber(LOGITS[:, :1], {"label": target[:, None]}, delta=1.5), scipy.special.huber(1.5, off))
    close(losses.squared_error(LOGITS, {"label": SEVERAL}), np.square(LOGITS - SEVERAL).mean(-1))
    with pytest.raises(ValueError, match="5 outputs for labels"):
        losses.squared_error(LOGITS, {"label": target})


def test_average_of_probabilities():
    views = jnp.stack([LOGITS, 2 * LOGITS + 1, -LOGITS])
    close(jax.nn.softmax(losses.average(views)), jax.nn.softmax(views).mean(0))
    close(jax.nn.sigmoid(losses.average(views, several=True)), jax.nn.sigmoid(views).mean(0))
    close(jax.nn.softmax(losses.average(LOGITS[None])), jax.nn.softmax(LOGITS))
    assert jnp.isfinite(losses.average(jnp.array([[[200.0, -200.0]], [[-200.0, 200.0]]]), several=True)).all()


@pytest.mark.parametrize("loss", [losses.cross_entropy, losses.binary_cross_entropy])
def test_weights_by_number_make_a_rare_class_as_likely_as_any(loss):
    """Of a model that knows nothing of the images, at the minimum: the gradient there is 0."""
    label = np.array([0] * 18 + [1] * 2)
    weights = losses.class_weights(label, 2)

    def mean(logits, label, weights):
        return loss(
            jnp.broadcast_to(logits[None], (20, 2)), {"label": jnp.asarray(label)}, class_weights=weights
        ).mean()

    close(jax.grad(mean)(jnp.zeros(2), label, weights), np.zeros(2))
    if loss is losses.binary_cross_entropy:
        several = np.stack([label, np.arange(20) < 10], 1).astype(np.float32)
        close(jax.grad(mean)(jnp.zeros(2), several, losses.class_weights(several, 2)), np.zeros(2))
        assert abs(jax.grad(mean)(jnp.zeros(2), several, None)[0]) > 0.3


@pytest.mark.parametrize("loss", [losses.binary_cross_entropy, losses.binary_focal, losses.asymmetric])
def test_weights_of_one_label_an_image_stay_so_when_it_is_mixed(loss):
    weights, label = np.array([0.3, 0.7, 2.0], np.float32), jnp.array([0, 1, 2, 0, 1, 2])
    one_hot = jax.nn.one_hot(label, 3)

    def weighed(label, weights=weights, **more):
        return loss(LOGITS[:, :3], {"label": label, **more}, class_weights=weights)

    close(weighed(one_hot, hard_label=label), weighed(label))
    mixed = 0.75 * one_hot + 0.25 * jnp.roll(one_hot, 1, 0)
    share = (mixed * weights[None]).sum(-1)
    close(weighed(mixed, hard_label=label), share * weighed(mixed, None, hard_label=label))
    assert (weighed(mixed) != weighed(mixed, hard_label=label)).all()  # several labels an image


def test_class_weights_by_name():
    classes = ["an ant", "a=b", "bee"]
    given = {"bee": 2, "an ant": 0.5, "a=b": 1}
    for form in (given, "bee=2,an ant=0.5,a=b=1"):
        np.testing.assert_array_equal(losses.named_weights(form, classes), np.float32([0.5, 1, 2]))
    for wrong, said in (
        (given | {"bees": 1}, "'bees', which is no class. Did you mean bee"),
        ({"bee": 2, "an ant": 1}, "name every class; a=b is not"),
        (given | {"bee": -1}, "0 and more"),
        (given | {"bee": "two"}, "0 and more"),
        (dict.fromkeys(classes, 0), "above 0"),
        ("bee", "no class"),
    ):
        with pytest.raises(UserError, match=said):
            losses.named_weights(wrong, classes)


def test_class_weights():
    labels = np.array([0] * 8 + [1] * 4 + [2] * 2)
    inverse = losses.class_weights(labels, 3)
    expected = compute_class_weight("balanced", classes=np.arange(3), y=labels)
    close(inverse, expected / expected.mean())
    effective = losses.class_weights(labels, 3, "effective", beta=0.9)
    close(effective[0] / effective[2], (1 - 0.9**2) / (1 - 0.9**8))
    assert effective.mean() == pytest.approx(1) and effective.dtype == np.float32
    close(losses.class_weights(labels, 3, "effective", beta=0.0), 1.0)
    close(losses.class_weights(labels, 3, "effective", beta=1 - 1e-9), inverse)
    close(losses.class_weights(np.eye(3)[labels], 3), [6 / 8, 10 / 4, 12 / 2])
    several = losses.class_weights(np.eye(3)[labels], 3, "effective", beta=0.9)
    close(several, (1 - 0.9 ** np.array([6, 10, 12])) / (1 - 0.9 ** np.array([8, 4, 2])))
    close(losses.class_weights(np.ones((4, 1)), 1), 1 / 4)  # which nothing is without
    with pytest.raises(UserError, match=r"no class weights 'inverted'\. Did you mean inverse"):
        losses.class_weights(labels, 3, "inverted")
    with pytest.raises(UserError, match="classes 3 have no examples"):
        losses.class_weights(labels, 4)
    with pytest.raises(UserError, match="labels of 3 classes; class weights for 2"):
        losses.class_weights(labels, 2)
    with pytest.raises(UserError, match="beta"):
        losses.class_weights(labels, 3, "effective", beta=1.0)


def test_correct():
    assert losses.correct(LOGITS, LOGITS.argmax(-1)).tolist() == [1] * 6
    assert losses.correct(LOGITS, (LOGITS > 0).astype(jnp.float32)).tolist() == [1] * 6
    wrong = (LOGITS > 0).astype(jnp.float32).at[0, 0].set(jnp.where(LOGITS[0, 0] > 0, 0.0, 1.0))
    assert losses.correct(LOGITS, wrong).tolist() == [0] + [1] * 5

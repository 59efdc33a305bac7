"""Each figure equals scikit-learn's, ties and absent classes included."""

import warnings

import numpy as np
import pytest
import sklearn.metrics as sk
from hypothesis import given, settings
from hypothesis import strategies as st

from jft import metrics
from jft.errors import UserError


def predictions(n: int, k: int, seed: int = 0, absent: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, k - absent, n)
    logits = rng.normal(size=(n, k)) + 2 * np.eye(k)[labels] * (rng.random((n, 1)) < 0.7)
    p = np.exp(logits)
    return (p / p.sum(1, keepdims=True)).astype(np.float32), labels


def names(k: int) -> list[str]:
    return [f"c{i}" for i in range(k)]


@pytest.mark.parametrize("n, k, absent", [(50, 2, 0), (400, 10, 0), (400, 10, 3), (60, 40, 5)])
def test_summary_equals_scikit_learn(n, k, absent):
    p, y = predictions(n, k, absent=absent)
    said = p.argmax(1)
    found = metrics.summary(p, y, names(k))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scikit-learn speaks of absent classes and of float32 sums
        wanted = {
            "count": n,
            "accuracy": sk.accuracy_score(y, said),
            "balanced_accuracy": sk.balanced_accuracy_score(y, said),
            "f1_macro": sk.f1_score(y, said, average="macro", zero_division=0),
            "f1_micro": sk.f1_score(y, said, average="micro"),
            "log_loss": sk.log_loss(y, p, labels=range(k)),
            "auroc": np.mean([sk.roc_auc_score(y == c, p[:, c]) for c in np.unique(y)]),
            "average_precision": np.mean([sk.average_precision_score(y == c, p[:, c]) for c in np.unique(y)]),
        }
        if k > 5:
            wanted["top5_accuracy"] = sk.top_k_accuracy_score(y, p, k=5, labels=range(k))
    assert found.keys() == wanted.keys() | {"ece"}
    for name, value in wanted.items():
        assert found[name] == pytest.approx(value, abs=1e-6), name
        assert type(found[name]) in (int, float)
    assert (metrics.confusion(p, y) == sk.confusion_matrix(y, said, labels=range(k))).all()


def test_binary_auroc_is_the_usual_one():
    p, y = predictions(80, 2)
    assert metrics.summary(p, y, names(2))["auroc"] == pytest.approx(sk.roc_auc_score(y, p[:, 1]), abs=1e-6)


def test_per_class_equals_scikit_learn():
    p, y = predictions(200, 8, absent=2)
    counts = metrics.confusion(p, y)
    found = metrics.per_class(np.diag(counts), counts.sum(1), counts.sum(0))
    wanted = sk.precision_recall_fscore_support(y, p.argmax(1), labels=range(8), zero_division=0)
    assert (counts.sum(1) == wanted[3]).all()
    for name, values in zip(("precision", "recall", "f1"), wanted[:3], strict=True):
        np.testing.assert_allclose(found[name], values)


def test_several_labels_equal_scikit_learn():
    rng = np.random.default_rng(1)
    y = rng.random((120, 6)) < 0.3
    y[:, 5] = False  # a class without an example
    p = np.clip(0.5 * y + 0.7 * rng.random((120, 6)) - 0.1, 0, 1).astype(np.float32)
    found = metrics.summary(p, y, names(6))
    said = p >= 0.5
    wanted = {
        "count": 120,
        "accuracy": sk.accuracy_score(y, said),
        "f1_macro": sk.f1_score(y, said, average="macro", zero_division=0),
        "f1_micro": sk.f1_score(y, said, average="micro"),
        "average_precision": sk.average_precision_score(y[:, :5], p[:, :5], average="macro"),
        "auroc": sk.roc_auc_score(y[:, :5], p[:, :5], average="macro"),
        "log_loss": np.mean([sk.log_loss(y[:, c], p[:, c], labels=[False, True]) for c in range(6)]),
    }
    assert found.keys() == wanted.keys() | {"ece"}
    for name, value in wanted.items():
        assert found[name] == pytest.approx(value, abs=1e-6), name
    assert metrics.summary(p, y.astype(np.int32), names(6)) == found


def test_areas_of_equal_scores_equal_scikit_learn():
    rng = np.random.default_rng(3)
    y, p = rng.random((90, 2)) < 0.4, (rng.integers(0, 5, (90, 2)) / 4).astype(np.float32)
    assert metrics.average_precision(p, y) == pytest.approx(sk.average_precision_score(y, p), abs=1e-6)
    assert metrics.auroc(p, y) == pytest.approx(sk.roc_auc_score(y, p), abs=1e-6)
    assert metrics.average_precision(p, np.zeros((90, 2), bool)) is None


@pytest.mark.parametrize("several", [False, True])
def test_intervals_are_those_of_sets_drawn_anew(several):
    p, y = predictions(150, 4)
    labels = (
        y if not several else (np.random.default_rng(2).random((150, 4)) < 0.2) | (np.arange(4)[None] == y[:, None])
    )
    figures, found = metrics.summary(p, labels, names(4)), metrics.intervals(p, labels)
    assert found == metrics.intervals(p, labels)
    assert set(found) == {
        "accuracy",
        "f1_macro",
        *(["f1_micro", "average_precision"] if several else ["balanced_accuracy"]),
    }
    rng = np.random.default_rng(9)
    draws = [rng.integers(0, 150, 150) for _ in range(300)]
    again = [metrics.summary(p[i], labels[i], names(4)) for i in draws]
    for name, (low, high) in found.items():
        assert low < figures[name] < high
        wanted = np.quantile([a[name] for a in again], (0.025, 0.975))
        np.testing.assert_allclose((low, high), wanted, atol=0.25 * (wanted[1] - wanted[0]))


@pytest.mark.parametrize("several", [False, True])
def test_suspects_are_the_labels_that_were_changed(several):
    rng = np.random.default_rng(0)
    y = rng.integers(0, 3, 300)
    p = np.exp(rng.normal(size=(300, 3)) + 8 * np.eye(3)[y])
    p = (p / p.sum(1, keepdims=True)).astype(np.float32)
    changed = rng.choice(300, 12, replace=False)
    given = y.copy()
    given[changed] = (given[changed] + 1) % 3
    found = metrics.suspects(p, np.eye(3, dtype=bool)[given] if several else given)
    assert set(found[:10].tolist()) <= set(changed.tolist()) <= set(found.tolist()) and len(found) < 25


def test_suspects_by_hand():
    # The means of those labelled so are 0.7 and 0.6: 0.7 of class 1 and 0.75 of class 0 are enough, 0.65 is not.
    p = np.array([[0.9, 0.1], [0.9, 0.1], [0.3, 0.7], [0.1, 0.9], [0.35, 0.65], [0.75, 0.25]], np.float32)
    y = np.array([0, 0, 0, 1, 1, 1])
    assert metrics.suspects(p, y).tolist() == [5, 2]
    p[5] = 0.65, 0.35
    assert metrics.suspects(p, y).tolist() == [2]
    assert metrics.suspects(p, np.zeros(6, np.int64)).tolist() == []


def test_tempered_probabilities_are_those_of_divided_logits():
    x = np.random.default_rng(0).normal(size=(20, 5)) * 3
    soft = np.exp(x) / np.exp(x).sum(1, keepdims=True)
    colder = np.exp(x / 2.5) / np.exp(x / 2.5).sum(1, keepdims=True)
    np.testing.assert_allclose(metrics.tempered(soft.astype(np.float32), 2.5), colder, rtol=1e-4)
    one = 1 / (1 + np.exp(-x))
    found = metrics.tempered(one.astype(np.float32), 2.5, several=True)
    np.testing.assert_allclose(found, 1 / (1 + np.exp(-x / 2.5)), rtol=1e-4)


def test_ece_by_hand():
    p = np.array([[0.95, 0.05], [0.95, 0.05], [0.4, 0.6], [0.35, 0.65]], np.float32)
    y = np.array([0, 1, 1, 1])
    # ten bins: two examples at 0.95 with accuracy 1/2, one at 0.6 right, one at 0.65 right
    assert metrics.ece(p, y, bins=10) == pytest.approx((2 * 0.45 + 0.4 + 0.35) / 4, abs=1e-6)
    count, _, _ = metrics.calibration(p, y, bins=10)
    assert count.sum() == 4 and count[9] == 2


def test_ece_is_zero_for_certainty_that_is_right():
    p = np.eye(3, dtype=np.float32)
    assert metrics.ece(p, np.arange(3)) == 0


def test_top_k_agrees_with_accuracy_where_all_are_equal():
    p = np.full((4, 4), 0.25, np.float32)
    y = np.arange(4)
    assert metrics.top_k_accuracy(p, y, 1) == metrics.accuracy(p, y) == 0.25
    assert [metrics.top_k_accuracy(p, y, k) for k in (2, 3, 4)] == [0.5, 0.75, 1]


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 300), st.data())
def test_wilson_holds_the_share(n, data):
    right = data.draw(st.integers(0, n))
    low, high = metrics.wilson(right, n)
    assert 0 <= low <= right / n <= high <= 1 and low < high


def test_wilson_known_value():
    low, high = metrics.wilson(146, 153)
    assert (round(low, 3), round(high, 3)) == (0.909, 0.978)


def test_a_diverged_model_is_said_so():
    p, y = predictions(10, 3)
    p[3] = np.nan
    with pytest.raises(UserError, match=r"1 of 10 examples.*diverged"):
        metrics.summary(p, y, names(3))


def test_shapes_that_do_not_fit():
    p, y = predictions(10, 3)
    for bad in [(p, y[:9], names(3)), (p, y, names(4)), (p[:0], y[:0], names(3))]:
        with pytest.raises(ValueError, match="do not fit"):
            metrics.summary(*bad)


def test_equal_quantities_have_no_variance():
    """The mean of three 0.1 is an ulp off, so their squared deviations are above 0."""
    labels = np.array([[0.1, 1], [0.1, 2], [0.1, 4]])
    assert np.square(labels[:, 0] - labels[:, 0].mean()).sum() > 0
    told = metrics.quantities(labels + [[1, 0]], labels, ["a", "b"])
    assert (told["each"]["a"]["r2"], told["each"]["b"]["r2"], told["r2"]) == (0.0, 1.0, 0.5)
    assert metrics.quantities(labels, labels, ["a", "b"])["r2"] == 1.0
    assert metrics.furthest(labels + [[0.2, 0], [0, 3], [0, 0]], labels)[0] == 1
    assert metrics.worst_quantity(labels[0] + [0.2, 3], labels[0], labels) == 1

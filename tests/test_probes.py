"""Probes: closed forms are what brute force gives, descents end where scikit-learn's do, scores obey equations."""

import numpy as np
import pytest
from scipy.special import softmax

from jft import probes
from jft.errors import UserError

pytestmark = pytest.mark.usefixtures("optax_promotion")
SHAPES = [(60, 7), (30, 50)]  # more examples than features, and fewer


def blobs(n=60, d=7, classes=3, seed=0, spread=1.0):
    """Features about a centre for each class, on axes of very different scale, far from zero."""
    rng = np.random.default_rng(seed)
    labels = (np.arange(n) % classes).astype(np.int32)
    x = spread * rng.standard_normal((n, d)) + rng.standard_normal((classes, d))[labels]
    return (x * np.geomspace(0.1, 3, d) + 5).astype(np.float32), labels


def test_neighbours_are_those_of_brute_force():
    x, labels = blobs()
    test, _ = blobs(n=11, seed=1)
    a, b = (v / np.linalg.norm(v, axis=1, keepdims=True) for v in (x.astype(float), test.astype(float)))

    def brute(similar, k):
        expected = np.zeros((len(similar), 3))
        for i, row in enumerate(similar):
            for j in np.argsort(-row, kind="stable")[:k]:
                expected[i, labels[j]] += np.exp(row[j] / 0.07)
        return expected / expected.sum(1, keepdims=True)

    np.testing.assert_allclose(probes.knn(x, labels, test, 3, k=5), brute(b @ a.T, 5), atol=1e-4)
    others = a @ a.T
    np.fill_diagonal(others, -np.inf)
    np.testing.assert_allclose(probes.knn(x, labels, None, 3, k=5), brute(others, 5), atol=1e-4)


def test_neighbours_come_in_chunks_and_vote_for_several_labels(monkeypatch):
    x, labels = blobs()
    test, _ = blobs(n=11, seed=1)
    whole = probes.knn(x, labels, test, 3, k=200)  # more than there are
    monkeypatch.setattr(probes, "CHUNK", 4)
    targets = probes.one_hot(labels, 3).astype(np.float32)
    np.testing.assert_allclose(probes.knn(x, targets, test, 3, k=200), whole, atol=1e-5)


@pytest.mark.parametrize("n, d", SHAPES)
def test_ridge_solves_the_normal_equations(n, d):
    x, labels = blobs(n, d)
    y = probes.one_hot(labels, 3)
    found = probes.ridge(x, labels, 3, penalties=[0.7])
    centred = x - x.mean(0, dtype=float)
    expected = np.linalg.solve(centred.T @ centred + 0.7 * np.eye(d), centred.T @ y)
    np.testing.assert_allclose(found.kernel, expected, atol=1e-6)
    np.testing.assert_allclose(found.scores(x), y.mean(0) + centred @ expected, atol=1e-6)


@pytest.mark.parametrize("n, d", SHAPES)
def test_leaving_one_out_is_leaving_one_out(n, d):
    x, labels = blobs(n, d)
    found = probes.ridge(x, labels, 3, penalties=[0.7])
    for i in (0, 7, n - 1):
        rest = np.arange(n) != i
        without = probes.ridge(x[rest], labels[rest], 3, penalties=[0.7])
        np.testing.assert_allclose(found.held_out[i], without.scores(x[i : i + 1])[0], atol=1e-6)


def test_ridge_takes_the_penalty_of_least_error():
    x, labels = blobs(spread=3.0)
    y, grid = probes.one_hot(labels, 3), [0.1, 10.0, 1000.0, 1e5]
    errors = {p: np.mean((probes.ridge(x, labels, 3, penalties=[p]).held_out - y) ** 2) for p in grid}
    assert probes.ridge(x, labels, 3, penalties=grid).penalty == min(errors, key=errors.get)
    centred = x - x.mean(0, dtype=float)

    def gcv(p):  # by its definition
        hat = 1 / len(x) + centred @ np.linalg.solve(centred.T @ centred + p * np.eye(x.shape[1]), centred.T)
        return np.mean((y - hat @ y) ** 2) / (1 - np.trace(hat) / len(x)) ** 2

    assert probes.ridge(x, labels, 3, penalties=grid, choice="gcv").penalty == min(grid, key=gcv)
    with pytest.raises(UserError, match="not by 'val'"):
        probes.ridge(x, labels, 3, choice="val")


@pytest.mark.parametrize("n, d", SHAPES)
def test_logistic_regression_is_that_of_scikit_learn(n, d):
    from sklearn.linear_model import LogisticRegression

    x, labels = blobs(n, d, spread=2.0)
    test = blobs(n, d, seed=1)[0]
    for penalty, near in ((10.0, 1e-3), (0.1, 2e-3)):
        theirs = LogisticRegression(C=1 / penalty, tol=1e-8, max_iter=10000).fit(x.astype(float), labels)
        ours = probes.logistic(x, labels, 3, penalties=[penalty])
        np.testing.assert_allclose(ours.kernel.T, theirs.coef_, atol=near * abs(theirs.coef_).max())
        np.testing.assert_allclose(softmax(ours.scores(test), axis=1), theirs.predict_proba(test), atol=near)


def test_logistic_regression_of_two_classes_and_of_several_labels_is_that_of_scikit_learn():
    from sklearn.linear_model import LogisticRegression

    x, labels = blobs(classes=2, spread=2.0)
    theirs = LogisticRegression(C=2 / 0.5, tol=1e-8, max_iter=10000).fit(x.astype(float), labels)
    ours = probes.logistic(x, labels, 2, penalties=[0.5])
    np.testing.assert_allclose(softmax(ours.scores(x), axis=1), theirs.predict_proba(x), atol=2e-3)
    targets = np.stack([labels, x[:, 3] > np.median(x[:, 3])], 1).astype(np.float32)
    ours = probes.logistic(x, targets, 2, penalties=[0.5])
    for column in (0, 1):
        theirs = LogisticRegression(C=1 / 0.5, tol=1e-8, max_iter=10000).fit(x.astype(float), targets[:, column])
        np.testing.assert_allclose(ours.kernel[:, column], theirs.coef_[0], atol=2e-3 * abs(theirs.coef_).max())


def test_folds_leave_out_and_choose():
    x, labels = blobs(spread=4.0)
    folds = probes.make_folds(labels, 3)
    assert all(np.bincount(labels[folds == f], minlength=3).min() >= 6 for f in range(3))
    found = probes.logistic(x, labels, 3, penalties=[5.0], folds=folds)
    rest = folds != 1
    without = probes.logistic(x[rest], labels[rest], 3, penalties=[5.0])
    np.testing.assert_allclose(found.held_out[folds == 1], without.scores(x[folds == 1]), atol=5e-3)
    grid = [1e4, 100.0, 1e-3]
    y = probes.one_hot(labels, 3)
    loss = {
        p: probes._log_loss(probes.logistic(x, labels, 3, penalties=[p], folds=folds).held_out, y, False) for p in grid
    }
    assert probes.logistic(x, labels, 3, penalties=grid, folds=folds).penalty == min(loss, key=loss.get)
    one = np.where(folds == 0, 0, -1)
    assert (np.isnan(probes.logistic(x, labels, 3, penalties=[5.0], folds=one).held_out[:, 0]) == (one < 0)).all()
    for wrong in (dict(penalties=[1.0, 2.0]), dict(penalties=[0.0]), dict(penalties=[])):
        with pytest.raises(UserError):
            probes.logistic(x, labels, 3, **wrong)


def published_logme(f, y):
    """The equations of You et al. 2021, algorithm 2, one matrix at a time; α, β and the evidence of one column."""
    n, d = f.shape
    alpha = beta = 1.0
    for _ in range(2000):
        a = alpha * np.eye(d) + beta * f.T @ f
        m = beta * np.linalg.solve(a, f.T @ y)
        square = np.linalg.eigvalsh(f.T @ f)
        gamma = np.sum(beta * square / (alpha + beta * square))
        alpha, beta = gamma / (m @ m), (n - gamma) / np.sum((f @ m - y) ** 2)
    a = alpha * np.eye(d) + beta * f.T @ f
    m = beta * np.linalg.solve(a, f.T @ y)
    return alpha, beta, (
        n * np.log(beta) + d * np.log(alpha) - n * np.log(2 * np.pi)
        - beta * np.sum((f @ m - y) ** 2) - alpha * m @ m - np.linalg.slogdet(a)[1]
    ) / (2 * n)  # fmt: skip


@pytest.mark.parametrize("n, d", [(60, 7), (40, 50)])
def test_logme_is_the_greatest_evidence(n, d):
    from scipy.stats import multivariate_normal

    x, labels = blobs(n, d, spread=3.0)
    y, f = probes.one_hot(labels, 3), x.astype(float)
    values = []
    for column in y.T:
        alpha, beta, value = published_logme(f, column)
        values.append(value)

        def marginal(a, b, column=column):
            return multivariate_normal(np.zeros(n), np.eye(n) / b + f @ f.T / a).logpdf(column) / n

        assert value == pytest.approx(marginal(alpha, beta), abs=1e-6)
        assert all(marginal(alpha * a, beta * b) < value for a, b in ((1.1, 1), (0.9, 1), (1, 1.1), (1, 0.9)))
    assert probes.logme(x, labels, 3) == pytest.approx(np.mean(values), abs=1e-5)
    assert probes.logme(x, labels, 5) == pytest.approx(np.mean(values), abs=1e-5)  # two classes without an example


def test_scores_rise_with_what_the_features_tell():
    told, nothing = blobs(n=90, spread=0.3), blobs(n=90, spread=30.0)
    for score in (probes.logme, probes.nleep):
        assert score(*told, 3) > score(*nothing, 3) + 0.1


def test_nleep_has_three_examples_a_gaussian_or_is_none():
    """Where every example is a cluster of its own the score is 0, the best, of noise too."""
    x, labels = blobs(n=18, spread=30.0)
    assert [probes.gaussians(n, 3) for n in (8, 9, 18, 1000)] == [0, 3, 6, 15]
    assert probes.nleep(x, labels, 3) < -0.1
    assert probes.nleep(x, labels, 7) is None


def test_nleep_of_features_that_do_not_differ_is_none():
    assert probes.nleep(np.ones((20, 8), np.float32), np.repeat([0, 1], 10), 2) is None


def test_leep_is_that_of_its_equations():
    rng = np.random.default_rng(0)
    theta, labels = rng.dirichlet(np.ones(4), 20), (np.arange(20) % 3).astype(np.int32)
    joint = np.zeros((3, 4))
    for row, y in zip(theta, labels, strict=True):
        joint[y] += row / 20
    expected = np.mean([np.log(np.sum(joint[y] / joint.sum(0) * row)) for row, y in zip(theta, labels, strict=True)])
    assert probes.leep(theta, labels, 3) == pytest.approx(expected)
    # A source class for each of ours tells all; one class for everything tells the classes' shares alone.
    assert probes.leep(np.eye(3)[labels], labels, 3) == pytest.approx(0)
    shares = np.bincount(labels) / 20
    assert probes.leep(np.ones((20, 1)), labels, 3) == pytest.approx(np.sum(shares * np.log(shares)))

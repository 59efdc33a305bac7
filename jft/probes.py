"""What frozen features tell of labels: probes with a solution (kNN, ridge, logistic), and scores of transferability.

`labels` are class indices [n], or zeros and ones [n, c] where an example may have several. What is solved in closed
form is computed on the host in float64, the rest on the device.
"""

from collections.abc import Sequence
from functools import cached_property, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, Shaped

from jft.errors import UserError

Features = Float[np.ndarray, "n d"]
Labels = Shaped[np.ndarray, "n *c"]
Scores = Float[np.ndarray, "n c"]

RESOLUTION = 1e-7  # of float32: directions in which features vary less, beside the one of most variation, are noise
PENALTIES = tuple(10.0**e for e in range(1, -6, -1))  # times the mean square of the features along a principal axis
FOLDS = 5
ONE_FOLD_ABOVE = 5000  # examples; a fifth of more is enough to choose a penalty by, and to score
EXAMPLES = 3  # the fewest for each Gaussian of a mixture: with one alone it tells its label by heart
CHUNK = 1024  # rows whose similarities to all others are in memory at a time


def one_hot(labels: Labels, classes: int) -> Float[np.ndarray, "n c"]:
    """The labels as float64 zeros and ones, a column for each class."""
    if labels.ndim == 2:
        return labels.astype(np.float64)
    return (labels[:, None] == np.arange(classes)[None]).astype(np.float64)


class Axes:
    """Features in their principal axes, x − mean = u · diag(s) · vᵀ; without `centre` the mean is taken as zero.

    By the eigenvectors of the smaller of xᵀx and xxᵀ, so that neither many examples nor many features are dear.
    """

    def __init__(self, x: Features, centre: bool = True):
        x = x.astype(np.float64)
        self.mean = x.mean(axis=0) if centre else np.zeros(x.shape[1])
        x = x - self.mean[None]
        n, d = x.shape
        square, vectors = np.linalg.eigh(x.T @ x if n >= d else x @ x.T)
        keep = np.flatnonzero(square > square[-1] * RESOLUTION**2)[::-1]
        self.s: Float[np.ndarray, " r"] = np.sqrt(square[keep])
        one = vectors[:, keep]
        other = (x @ one if n >= d else x.T @ one) / self.s[None]
        self.u: Float[np.ndarray, "n r"] = other if n >= d else one
        self.v: Float[np.ndarray, "d r"] = one if n >= d else other

    @cached_property
    def scale(self) -> float:
        """The mean of s²."""
        return float(np.mean(self.s**2)) if len(self.s) else 1.0


class Linear(NamedTuple):
    """A linear probe, with the scores of each training example by a probe fitted without it (NaN: never left out)."""

    kernel: Float[np.ndarray, "d c"]
    bias: Float[np.ndarray, " c"]
    penalty: float
    held_out: Float[np.ndarray, "n c"] | None = None

    def scores(self, x: Float[np.ndarray, "m d"]) -> Float[np.ndarray, "m c"]:
        """Logits of a logistic probe, estimates of the zeros and ones of a ridge probe."""
        return x.astype(np.float64) @ self.kernel + self.bias[None]


# Nearest neighbours


@partial(jax.jit, static_argnames="k")
def _votes(test: Array, train: Array, targets: Array, own: Array, k: int, temperature: Any) -> Array:
    similar = jnp.matmul(test, train.T, precision="highest")
    similar = jnp.where(jnp.arange(train.shape[0])[None] == own[:, None], -jnp.inf, similar)
    nearest, index = jax.lax.top_k(similar, k)
    share = jax.nn.softmax(nearest / temperature, axis=1)
    return (share[:, :, None] * targets[index]).sum(axis=1)


def knn(
    train: Features,
    labels: Labels,
    test: Float[np.ndarray, "m d"] | None,
    classes: int,
    *,
    k: int = 20,
    temperature: float = 0.07,
) -> Float[np.ndarray, "m c"]:
    """Each class's share of the votes of the `k` training examples nearest by cosine, float32, rows of sum 1.

    A neighbour of similarity s votes with weight exp(s / temperature) (Wu et al. 2018, "Unsupervised feature learning
    via non-parametric instance discrimination", section 3.4; k and temperature as DINO's evaluation has them, Caron et
    al. 2021). With `test` None every training example is told by the others.
    """
    if k < 1 or temperature <= 0:
        raise UserError(f"k is {k} and the temperature {temperature}; at least 1 neighbour and above 0 are expected.")
    known, asked = _normalised(train), _normalised(train if test is None else test)
    k = min(k, len(known) - (test is None))
    if k < 1:
        raise UserError("There is one example alone: it has no neighbours to be told by.")
    places, targets = jax.device_put((known, one_hot(labels, classes).astype(np.float32)))
    found = []
    rows = min(CHUNK, len(asked))
    for start in range(0, len(asked), rows):
        chunk = np.zeros((rows, asked.shape[1]), np.float32)  # of one shape, so compiled once
        part = asked[start : start + rows]
        chunk[: len(part)] = part
        own = np.arange(start, start + rows, dtype=np.int32) if test is None else np.full(rows, -1, np.int32)
        found.append(np.asarray(_votes(chunk, places, targets, own, k, temperature))[: len(part)])
    return np.concatenate(found)


def _normalised(x: Features) -> Float[np.ndarray, "n d"]:
    return (x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)).astype(np.float32)


# Ridge regression


def ridge(
    x: Features,
    labels: Labels,
    classes: int,
    *,
    penalties: Sequence[float] | None = None,
    choice: str = "loo",
    axes: Axes | None = None,
) -> Linear:
    """The kernel of least ‖y − xw − b‖² + penalty ‖w‖² on one-hot labels, in closed form; the bias goes free.

    Of `penalties` (default: `PENALTIES` to scale) the one of least error is taken: leaving one out, e_i / (1 − h_ii),
    which is exact (Allen 1974, PRESS), or by generalised cross-validation, with the mean of h in its place (Golub,
    Heath and Wahba 1979). `axes` are those of x, where they are at hand. `held_out` are leave-one-out predictions.
    """
    if choice not in ("loo", "gcv"):
        raise UserError(f"The penalty is chosen by loo or gcv, not by {choice!r}.")
    axes = axes or Axes(x)
    y = one_hot(labels, classes)
    mean = y.mean(axis=0)
    projected = axes.u.T @ (y - mean[None])
    best: tuple[float, float, np.ndarray, np.ndarray] | None = None
    for penalty in _positive(penalties, axes):
        shrink = axes.s**2 / (axes.s**2 + penalty)
        error = y - mean[None] - axes.u @ (shrink[:, None] * projected)
        leverage = 1 / len(y) + axes.u**2 @ shrink
        leave = (1 - (leverage if choice == "loo" else np.full(len(y), leverage.mean())))[:, None]
        left_out = error / np.maximum(leave, 1e-12)
        score = float((left_out**2).mean())
        if best is None or score < best[0]:
            best = score, penalty, error, leverage
    assert best is not None
    _, penalty, error, leverage = best
    kernel = axes.v @ ((axes.s / (axes.s**2 + penalty))[:, None] * projected)
    held_out = y - error / np.maximum(1 - leverage, 1e-12)[:, None]
    return Linear(kernel, mean - axes.mean @ kernel, penalty, held_out)


def _positive(penalties: Sequence[float] | None, axes: Axes) -> list[float]:
    found = [p * axes.scale for p in PENALTIES] if penalties is None else sorted(map(float, penalties), reverse=True)
    if not found or not min(found) > 0:
        raise UserError(f"The penalties are {found}; one or more above 0 are expected.")
    return found


# Logistic regression


@partial(jax.jit, static_argnames=("several", "steps"))
def _descend(
    z: Array,
    y: Array,
    weight: Array,
    scale: Array,
    penalty: Any,
    start: Array,
    tolerance: Any,
    several: bool,
    steps: int,
) -> Array:
    """The least of the mean loss, in coordinates in which its curvature is about 1; the last row is the bias."""
    total = weight.sum()

    def objective(at: Array) -> Array:
        kernel = scale[:, None] * at
        logits = jnp.matmul(z, kernel, precision="highest")
        if several:
            fit = optax.sigmoid_binary_cross_entropy(logits, y).sum(axis=1)
        else:
            fit = optax.softmax_cross_entropy(logits, y)
        return (weight * fit).sum() / total + penalty / (2 * total) * (kernel[:-1] ** 2).sum()

    solver = optax.lbfgs()
    value_and_grad = optax.value_and_grad_from_state(objective)

    def going(carry: Any) -> Array:
        _, state, stale = carry
        count, value, grad = (optax.tree.get(state, name) for name in ("count", "value", "grad"))
        return (count == 0) | ((count < steps) & (jnp.abs(grad).max() > tolerance * value) & (stale < 3))

    def step(carry: Any) -> Any:
        at, state, stale = carry
        old = optax.tree.get(state, "value")
        value, grad = value_and_grad(at, state=state)
        updates, state = solver.update(grad, state, at, value=value, grad=grad, value_fn=objective)
        # Where float32 cannot tell a better value any more, nothing better will be found.
        better = optax.tree.get(state, "value") < old - 1e-7 * jnp.abs(old)
        return optax.apply_updates(at, updates), state, jnp.where(better, 0, stale + 1)

    return jax.lax.while_loop(going, step, (start, solver.init(start), jnp.asarray(0)))[0]


def logistic(
    x: Features,
    labels: Labels,
    classes: int,
    *,
    penalties: Sequence[float] | None = None,
    folds: Int[np.ndarray, " n"] | None = None,
    axes: Axes | None = None,
    steps: int = 200,
    tolerance: float = 1e-5,
) -> Linear:
    """The kernel of least Σ cross-entropy + penalty/2 ‖w‖², by L-BFGS; the bias goes free.

    The softmax's cross-entropy over the classes, so the solution of scikit-learn's LogisticRegression with C = 1 /
    penalty (of two classes it fits one sigmoid: C = 2 / penalty); where an example may have several labels, a sigmoid's
    for each. Of several `penalties` (default: `PENALTIES` to scale) the one of least log loss on examples left out is
    taken, from the strongest down until weaker ones do worse: `folds` [n] says with which fold each is left out (−1:
    never). `held_out` are logits of those, without them. `tolerance` is of the
    gradient, beside the loss and in units of the curvature.

    L-BFGS runs in the features' principal axes, each scaled by the curvature along it: an exact change of variables in
    which some tens of steps do, and which a single decomposition serves for all penalties and folds.
    """
    axes = axes or Axes(x)
    grid = _positive(penalties, axes)
    if len(grid) > 1 and folds is None:
        raise UserError("Choosing among penalties needs folds: the examples to leave out in turn.")
    several, targets = labels.ndim == 2, one_hot(labels, classes)
    z = np.concatenate([axes.u * axes.s[None], np.ones((len(x), 1))], axis=1)
    placed = jax.device_put((z.astype(np.float32), targets.astype(np.float32)))
    # Of a sigmoid, or of a softmax over equal logits; of a single class there is none.
    curvature = 1 / 4 if several or classes < 2 else (1 - 1 / classes) / classes

    def fit(penalty: float, weight: np.ndarray, start: np.ndarray) -> np.ndarray:
        total = weight.sum()
        scale = 1 / np.sqrt(np.append((curvature * axes.s**2 + penalty) / total, curvature))
        given = (np.asarray(v, np.float32) for v in (weight, scale, penalty, start / scale[:, None], tolerance))
        return scale[:, None] * np.asarray(_descend(*placed, *given, several, steps), np.float64)

    starts: dict[int, np.ndarray] = {}
    zero = np.zeros((z.shape[1], classes))
    least, chosen, told = np.inf, grid[0], None
    count = 0 if folds is None else int(folds.max()) + 1
    for penalty in grid if count else ():
        held_out = np.full((len(x), classes), np.nan)
        for fold in range(count):
            out = folds == fold
            starts[fold] = fit(penalty, np.where(out, 0.0, 1.0), starts.get(fold, zero))
            held_out[out] = z[out] @ starts[fold]
        seen = ~np.isnan(held_out[:, 0])
        loss = _log_loss(held_out[seen], targets[seen], several)
        if loss > least:
            break
        least, chosen, told = loss, penalty, held_out
    found = fit(chosen, np.ones(len(x)), starts.get(0, zero))
    kernel = axes.v @ found[:-1]
    return Linear(kernel, found[-1] - axes.mean @ kernel, chosen, told)


def _log_loss(logits: Scores, y: Scores, several: bool) -> float:
    if several:
        return float((np.logaddexp(0, logits) - y * logits).sum(axis=1).mean())
    top = logits.max(axis=1, keepdims=True)
    return float((np.log(np.exp(logits - top).sum(axis=1)) - (y * (logits - top)).sum(axis=1)).mean())


def make_folds(labels: Labels, folds: int, seed: int = 0) -> Int[np.ndarray, " n"]:
    """A fold for each example, 0 to folds − 1, dealt class by class so that each has its share of every class.

    Examples with several labels are dealt at random.
    """
    if folds < 2:
        raise UserError(f"{folds} folds; at least 2 are needed to leave one out and fit on the others.")
    rng = np.random.default_rng([seed, len(labels)])
    shuffled = rng.permutation(len(labels))
    if labels.ndim == 1:
        shuffled = shuffled[np.argsort(labels[shuffled], kind="stable")]
    found = np.empty(len(labels), np.int64)
    found[shuffled] = np.arange(len(labels)) % folds
    return found


def choosing_folds(labels: Labels, seed: int = 0) -> Int[np.ndarray, " n"]:
    """The folds by which a penalty is chosen: five, and of many examples the first of them alone (−1: the others)."""
    folds = make_folds(labels, min(FOLDS, len(labels)), seed)
    return np.where(folds == 0, 0, -1) if len(labels) > ONE_FOLD_ABOVE else folds


def answers(
    probe: str, x: Features, labels: Labels, test: Float[np.ndarray, "m d"], classes: int, seed: int = 0
) -> Float[np.ndarray, "m c"]:
    """What `knn`, `ridge` or `logistic`, fitted to x [n, d], says of `test`: shares of votes, estimates, or logits.

    kNN and ridge take quantities [n, c] in place of labels, and estimate them.
    """
    if probe == "knn":
        return knn(x, labels, test, classes)
    if probe == "ridge":
        return ridge(x, labels, classes).scores(test)
    return logistic(x, labels, classes, folds=choosing_folds(labels, seed)).scores(test)


# Scores of transferability


def logme(x: Features, labels: Labels, classes: int, *, axes: Axes | None = None) -> float:
    """LogME: the log evidence per example of a linear model of one-hot labels, its priors at their best; the mean.

    You et al. 2021, "LogME: practical assessment of pre-trained models for transfer learning", algorithm 2: with
    y ~ N(xw, 1/β) and w ~ N(0, 1/α), α and β go to the fixed point γ/‖m‖², (n − γ)/‖xm − y‖². Directions that x
    lacks cancel from the evidence, so d > n needs nothing of its own. Classes without an example are left out.
    `axes` are those of x, not centred.
    """
    axes = axes or Axes(x, centre=False)
    y = one_hot(labels, classes)
    y = y[:, y.any(axis=0)]
    n, s2 = len(y), (axes.s**2)[:, None]  # [r, 1], beside the classes
    seen2 = (axes.u.T @ y) ** 2
    beyond = np.maximum((y**2).sum(axis=0) - seen2.sum(axis=0), 0)  # of y, what no x tells
    alpha = beta = np.ones(y.shape[1])
    for _ in range(1000):
        ratio = alpha / beta
        gamma = (s2 / (s2 + ratio[None])).sum(axis=0)
        m2 = (s2 * seen2 / (s2 + ratio[None]) ** 2).sum(axis=0)
        error2 = ((ratio[None] / (s2 + ratio[None])) ** 2 * seen2).sum(axis=0) + beyond
        # The floor keeps labels that x tells exactly (n ≤ d) from an infinite precision.
        alpha, beta = gamma / np.maximum(m2, 1e-12), (n - gamma) / np.maximum(error2, 1e-12 * n)
        if (abs(alpha / beta - ratio) <= 1e-6 * ratio).all():
            break
    return float(np.mean(_evidence(s2, seen2, beyond, alpha, beta, n)))


def _evidence(s2: Any, seen2: Any, beyond: Any, alpha: Any, beta: Any, n: int) -> Float[np.ndarray, " c"]:
    """log N(y; 0, 1/β + xxᵀ/α) / n, for each column of y."""
    variance = 1 / beta[None] + s2 / alpha[None]
    logs = np.log(variance).sum(axis=0) - (n - len(s2)) * np.log(beta)
    return -(n * np.log(2 * np.pi) + logs + (seen2 / variance).sum(axis=0) + beta * beyond) / (2 * n)


def leep(source: Float[np.ndarray, "n z"], labels: Int[np.ndarray, " n"], classes: int) -> float:
    """LEEP: the mean log probability of the labels, told by the source model's own classes alone; 0 is the most.

    Nguyen et al. 2020, "LEEP: a new measure to evaluate transferability of learned representations", equations 1 and 2:
    Σ_z P(y | z) θ(x)_z, with P(y | z) counted from the probabilities θ(x) [n, z] of the source's classes.
    """
    theta = source.astype(np.float64)
    joint = one_hot(labels, classes).T @ theta / len(labels)
    given = joint / np.maximum(joint.sum(axis=0, keepdims=True), np.finfo(np.float64).tiny)
    told = (theta @ given.T)[np.arange(len(labels)), labels]
    return float(np.log(np.maximum(told, np.finfo(np.float64).tiny)).mean())


def gaussians(examples: int, classes: int, components: int = 5) -> int:
    """How many Gaussians N-LEEP's mixture has: `components` a class, as far as the examples reach; 0 for too few.

    Where each example is a cluster of its own N-LEEP is 0, the most, whatever the features.
    """
    count = min(components * classes, examples // EXAMPLES)
    return count if count >= classes else 0


def nleep(
    x: Features,
    labels: Int[np.ndarray, " n"],
    classes: int,
    *,
    components: int = 5,
    energy: float = 0.8,
    seed: int = 0,
    axes: Axes | None = None,
) -> float | None:
    """N-LEEP: LEEP with the clusters of a Gaussian mixture in place of the source's classes; needs no source head.

    Li et al. 2021, "Ranking neural checkpoints", section 3.2: principal axes that hold `energy` of the variance, and
    `components` Gaussians a class, of fewer examples fewer (`gaussians`). None where they are too few for one a class,
    or all have the same features.
    Their covariances are diagonal here: the axes are uncorrelated, and full ones would have more numbers than a small
    set has examples.
    """
    from sklearn.mixture import GaussianMixture  # slow to import

    if not (number := gaussians(len(x), classes, components)):
        return None
    axes = axes or Axes(x)
    if not len(axes.s):
        return None
    share = np.cumsum(axes.s**2) / np.sum(axes.s**2)
    count = int(np.searchsorted(share, energy)) + 1
    z = axes.u[:, :count] * axes.s[:count]
    z = z / np.sqrt(np.mean(z[:, 0] ** 2))  # the floor of variances is for features of order one
    mixture = GaussianMixture(number, covariance_type="diag", random_state=seed, max_iter=200)
    return leep(mixture.fit(z).predict_proba(z), labels, classes)

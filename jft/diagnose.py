"""Where a batch's numbers stop being finite: one more pass over it, part by part, that looks at all of them."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool

from jft import tree
from jft.models.base import Model
from jft.step import Batch, Objective, State


@dataclass(frozen=True)
class Suspect:
    """Where the first number is that is not finite: weights, input, forward, loss or gradient; of which examples."""

    where: str
    part: str = ""
    examples: tuple[int, ...] = ()

    def told(self, names: Sequence[str]) -> str:
        """A sentence about it, with the examples by name."""
        what = {
            "weights": f"in the weights of {self.part}",
            "input": "in its pixels, as they are shown to the model",
            "forward": f"in the output of {self.part}",
            "loss": "in the loss",
            "gradient": f"in the gradient of {self.part}, seen from the loss",
        }[self.where]
        few = ", ".join(names[i] for i in self.examples[:4]) + (", …" if len(self.examples) > 4 else "")
        of = f", of {len(self.examples)} of {len(names)} images ({few})" if self.examples else ""
        return f"The first number that is not finite is {what}{of}."


def make_diagnosis(
    model: Model,
    objective: Callable[[Mapping[str, Any]], Objective],
    loss: Callable[..., Array],
    *,
    trainable: Collection[str],
    train_parts: Collection[str],
    update_stats: Collection[str],
) -> Callable[[State, Batch, Array], Suspect | None]:
    """A function `(state, batch, key) -> Suspect`, or None where all of a batch's numbers are finite.

    `objective` makes one of the source's values; the batch is as it takes it. Weights come first, then what each part
    gives, in depth order, the loss of each example, and the gradient of what trains, from the top down: the order in
    which a bad number spreads.
    """
    parts = model.span()

    def finite(x: Array) -> Bool[Array, " b"]:
        return jnp.isfinite(x).reshape(len(x), -1).all(1)

    @jax.jit
    def look(params: Any, batch_stats: Any, source: Any, batch: Any, key: Array) -> dict[str, Any]:
        x = batch[model.input]
        weights = {
            part: jnp.stack([jnp.isfinite(v).all() for v in leaves.values()])
            for part in parts
            if (leaves := tree.under(params, part) | tree.under(batch_stats, part))
        }
        found: dict[str, Any] = {"weights": weights, "input": finite(x), "forward": {}}
        for part, after in zip(parts, [*parts[1:], None], strict=True):
            x, _ = model.apply(
                params, batch_stats, x, start=part, stop=after, train=train_parts, update_stats=update_stats, key=key
            )
            found["forward"][part] = finite(x)
        found["loss"] = finite(loss(x.astype(jnp.float32), batch))
        train, frozen = tree.split(params, trainable)
        grads = jax.grad(lambda t: objective(source)(tree.merge(t, frozen), batch_stats, batch, key)[0])(train)
        found["gradient"] = {
            part: jnp.stack([jnp.isfinite(g).all() for g in leaves.values()])
            for part in parts
            if (leaves := tree.under(grads, part))
        }
        return found

    def diagnose(state: State, batch: Batch, key: Array) -> Suspect | None:
        found = jax.tree.map(np.asarray, look(state.params, state.batch_stats, state.source, dict(batch), key))

        def bad(flags: np.ndarray) -> tuple[int, ...]:
            return tuple(np.flatnonzero(~flags).tolist())

        for part in parts:
            if part in found["weights"] and not found["weights"][part].all():
                return Suspect("weights", part)
        if not found["input"].all():
            return Suspect("input", examples=bad(found["input"]))
        for part in parts:
            if not found["forward"][part].all():
                return Suspect("forward", part, bad(found["forward"][part]))
        if not found["loss"].all():
            return Suspect("loss", examples=bad(found["loss"]))
        for part in reversed(parts):
            if part in found["gradient"] and not found["gradient"][part].all():
                return Suspect("gradient", part)
        return None

    return diagnose

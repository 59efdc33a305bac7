"""A model: an ordered list of named parts, any span of which can be run as a pure function."""

import math
import zlib
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from functools import cached_property, lru_cache, partial
from typing import Any

import flax.linen as nn
import jax
import jax.extend.core
import jax.numpy as jnp
from jaxtyping import Array, Float

from jft import tree
from jft.errors import UserError, near


@dataclass(frozen=True)
class Model:
    """Named Linen modules in depth order, run one after another.

    A part's module is called as `module(x, train=…, use_running_average=…)`. A parameter's name is its part's name, a
    slash, and its path in that module: `stage1/block0` + `conv1/kernel`.

    >>> y, stats = model.apply(params, stats, x)                       # the whole model, as in evaluation
    >>> h, stats = model.apply(params, stats, x, stop="head")          # features: everything before the head
    >>> y, stats = model.apply(params, stats, h, start="head")         # and on from there
    """

    name: str
    parts: Mapping[str, nn.Module] = field(hash=False)
    input_shape: tuple[int, ...]  # of one example, e.g. (224, 224, 3)
    num_classes: int
    input: str = "image"  # what the model takes from a batch
    remat: str = "none"  # what of a part's activations is recomputed in the backward pass: full, or all but dots

    def span(self, start: str | None = None, stop: str | None = None) -> list[str]:
        """The parts from `start` up to and without `stop`. Raises UserError for a name that is no part."""
        names = list(self.parts)
        for name in (start, stop):
            if name is not None and name not in self.parts:
                raise UserError(f"{self.name} has no part {name!r}.{near(name, names)} Its parts: {', '.join(names)}.")
        first = names.index(start) if start else 0
        last = names.index(stop) if stop else len(names)
        return names[first:last]

    def apply(
        self,
        params: Mapping[str, Any],
        batch_stats: Mapping[str, Any],
        x: Float[Array, "..."],
        *,
        start: str | None = None,
        stop: str | None = None,
        train: Collection[str] = (),
        update_stats: Collection[str] = (),
        key: Array | None = None,
    ) -> tuple[Float[Array, "..."], dict[str, Array]]:
        """Run the parts from `start` up to and without `stop`; returns the output and the batch statistics after it.

        Dropout and stochastic depth are active in the parts named in `train` (they need `key`); BatchNorms normalise
        by the batch, and move their running statistics, in the parts named in `update_stats`.
        """
        stats = dict(batch_stats)
        for name in self.span(start, stop):
            x, new = self._apply_part(name, params, stats, x, name in train, name in update_stats, key)
            stats |= new
        return x, stats

    def _apply_part(
        self,
        name: str,
        params: Mapping[str, Any],
        stats: Mapping[str, Any],
        x: Array,
        train: bool,
        update: bool,
        key: Array | None,
    ) -> tuple[Array, dict[str, Array]]:
        # Keys depend on the part's name, not its position, so a model run in spans draws what the whole would draw.
        rngs = {"dropout": jax.random.fold_in(key, zlib.crc32(name.encode()))} if train and key is not None else {}

        def run(params: Any, stats: Any, x: Array) -> tuple[Array, Any]:
            y, new = self.parts[name].apply(
                {"params": params, "batch_stats": stats},
                x,
                train=train,
                use_running_average=not update,
                rngs=rngs,
                mutable=["batch_stats"] if update else [],
            )
            return y, new

        call: Callable[..., Any] = run
        if self.remat != "none" and (train or update):
            kept = jax.checkpoint_policies.dots_with_no_batch_dims_saveable if self.remat == "dots" else None
            call = jax.checkpoint(run, policy=kept)
        y, new = call(tree.nest(tree.under(params, name)), tree.nest(tree.under(stats, name)), x)
        return y, tree.flatten(new.get("batch_stats", {}), f"{name}/")

    def init(
        self, key: Array, parts: Collection[str] | None = None
    ) -> tuple[dict[str, Float[Array, "..."]], dict[str, Float[Array, "..."]]]:
        """Fresh parameters and batch statistics of all parts, or of those in `parts`, from a key per part name."""

        params: dict[str, Array] = {}
        stats: dict[str, Array] = {}
        for name, (x, _) in self._trace.items():
            if parts is None or name in parts:
                # lazy_init runs the initialisers alone: the forward pass is neither compiled nor computed.
                part_key = jax.random.fold_in(key, zlib.crc32(name.encode()))
                variables = self.parts[name].lazy_init(part_key, x, train=False, use_running_average=True)
                params |= tree.flatten(variables.get("params", {}), f"{name}/")
                stats |= tree.flatten(variables.get("batch_stats", {}), f"{name}/")
        return params, stats

    def shapes(self) -> tuple[dict[str, jax.ShapeDtypeStruct], dict[str, jax.ShapeDtypeStruct]]:
        """Shape and dtype of every parameter and batch statistic, without computing any."""
        params: dict[str, jax.ShapeDtypeStruct] = {}
        stats: dict[str, jax.ShapeDtypeStruct] = {}
        for name, (_, variables) in self._trace.items():
            params |= tree.flatten(variables.get("params", {}), f"{name}/")
            stats |= tree.flatten(variables.get("batch_stats", {}), f"{name}/")
        return params, stats

    def shape_before(self, part: str) -> tuple[int, ...]:
        """The shape of what a part takes for one example."""
        return tuple(self._trace[part][0].shape[1:])

    def effective(self, params: Mapping[str, Any], trainable: Collection[str]) -> dict[str, Any]:
        """What of the parameters the model computes with changes where these train: they themselves."""
        return {n: v for n, v in params.items() if n in trainable}

    def flops(self) -> int:
        """Of the forward pass for one example: two for each multiply-add of its matrix products and convolutions.

        >>> make_model("resnet50").flops() / 2e9  # what papers call 4.1 GFLOPs
        4.089184256
        """
        return sum(
            _flops(module, x.shape) for module, (x, _) in zip(self.parts.values(), self._trace.values(), strict=True)
        )

    @cached_property
    def _trace(self) -> dict[str, tuple[jax.ShapeDtypeStruct, Mapping[str, Any]]]:
        """For each part the shape of its input for one example, and its variables' shapes."""
        traced = {}
        x = jax.ShapeDtypeStruct((1, *self.input_shape), jnp.float32)
        for name, module in self.parts.items():
            y, variables = _shapes(module, x.shape, x.dtype)
            traced[name] = (x, variables)
            x = y
        return traced


# A deep model repeats a few parts many times, so tracing each kind once is tracing little.
@lru_cache(maxsize=4096)
def _shapes(module: nn.Module, shape: tuple[int, ...], dtype: Any) -> tuple[jax.ShapeDtypeStruct, Mapping[str, Any]]:
    make = partial(module.init_with_output, train=False, use_running_average=True)
    return jax.eval_shape(make, jax.random.key(0), jax.ShapeDtypeStruct(shape, dtype))


@lru_cache(maxsize=4096)
def _flops(module: nn.Module, shape: tuple[int, ...]) -> int:
    _, variables = _shapes(module, shape, jnp.float32)
    run = partial(module.apply, train=False, use_running_average=True)
    return _count(jax.make_jaxpr(run)(variables, jax.ShapeDtypeStruct(shape, jnp.float32)).jaxpr)


def _count(jaxpr: Any) -> int:
    total = 0
    for equation in jaxpr.eqns:
        out = math.prod(equation.outvars[0].aval.shape)
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            total += 2 * out * math.prod(equation.invars[0].aval.shape[i] for i in contracted)
        elif equation.primitive.name == "conv_general_dilated":
            kernel, numbers = equation.invars[1].aval.shape, equation.params["dimension_numbers"]
            total += 2 * out * math.prod(kernel) // kernel[numbers.rhs_spec[0]]
        elif equation.primitive.name == "cond":  # one branch a platform: they compute the same
            total += _count(equation.params["branches"][0].jaxpr)
        else:
            total += sum(_count(inner) for inner in jax.extend.core.jaxprs_in_params(equation.params))
    return total

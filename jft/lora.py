"""LoRA and DoRA as a reparametrisation of the parameter tree: every model has them, and no model knows of them."""

import dataclasses
import json
import zlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jft import tree
from jft.errors import UserError, near
from jft.models.base import Model
from jft.plan import Lora
from jft.weights.readers import open_weights
from jft.weights.writers import write_safetensors


@dataclass(frozen=True)
class LoraModel(Model):
    """A model whose kernels are sums, put together before a part is run. `with_lora` makes it."""

    lora: Lora = field(default_factory=Lora)
    kernels: tuple[str, ...] = ()

    def shapes(self) -> tuple[dict[str, jax.ShapeDtypeStruct], dict[str, jax.ShapeDtypeStruct]]:
        """Those of the model, and of the updates."""
        params, stats = super().shapes()
        for name in self.kernels:
            *inner, out = params[name].shape
            params |= {n: jax.ShapeDtypeStruct(s, jnp.float32) for n, s in self._shapes(name, inner, out).items()}
        return params, stats

    def _shapes(self, kernel: str, inner: Collection[int], out: int) -> dict[str, tuple[int, ...]]:
        prefix = kernel.removesuffix("kernel")
        found: dict[str, tuple[int, ...]] = {
            f"{prefix}lora_a": (int(np.prod(tuple(inner))), self.lora.rank),
            f"{prefix}lora_b": (self.lora.rank, out),
        }
        return found | ({f"{prefix}lora_m": (out,)} if self.lora.dora else {})

    def init(
        self, key: Array, parts: Collection[str] | None = None
    ) -> tuple[dict[str, Float[Array, "..."]], dict[str, Float[Array, "..."]]]:
        """Those of the model, and of the updates."""
        params, stats = super().init(key, parts)
        for name, value in self.init_updates(key).items():
            if parts is None or any(name.startswith(part + "/") for part in parts):
                params[name] = value
        return params, stats

    def init_updates(self, key: Array) -> dict[str, Float[Array, "..."]]:
        """A is uniform within ±1/√(fan in), B zero, so that the model is at first what it was without."""
        found = {}
        shapes, _ = super().shapes()
        for name in self.kernels:
            *inner, out = shapes[name].shape
            for update, shape in self._shapes(name, inner, out).items():
                if update.endswith("lora_a"):
                    draw = jax.random.fold_in(key, zlib.crc32(update.encode()))
                    found[update] = jax.random.uniform(draw, shape, jnp.float32, -1, 1) / np.float32(shape[0] ** 0.5)
                else:
                    found[update] = jnp.full(shape, 1.0 if update.endswith("lora_m") else 0.0, jnp.float32)
        return found

    def merged(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """The parameters of the plain model that computes the same: kernels summed, updates gone."""
        scale = (self.lora.rank if self.lora.alpha is None else self.lora.alpha) / self.lora.rank
        whole = {n: v for n, v in params.items() if "/lora_" not in n}
        for name in self.kernels:
            prefix = name.removesuffix("kernel")
            if prefix + "lora_a" not in params:
                continue
            w = params[name]
            update = scale * (params[prefix + "lora_a"] @ params[prefix + "lora_b"])
            v = w + update.reshape(w.shape)
            if self.lora.dora:
                axes = tuple(range(w.ndim - 1))
                norms = [jnp.sqrt(jnp.sum(jnp.square(x), axis=axes)) for x in (w, jax.lax.stop_gradient(v))]
                ratio = params[prefix + "lora_m"] * norms[0] / jnp.maximum(norms[1], 1e-12)
                v = v * jnp.expand_dims(ratio, axes)
            whole[name] = v
        return whole

    def effective(self, params: Mapping[str, Any], trainable: Collection[str]) -> dict[str, Any]:
        """What of the plain model's parameters changes where these train: a kernel with its updates for these."""
        changed = {n[: n.rindex("lora_")] + "kernel" if "/lora_" in n else n for n in trainable}
        return {n: v for n, v in self.merged(params).items() if n in changed}

    def plain(self) -> Model:
        """The model without updates, for merged parameters."""
        return Model(**{f.name: getattr(self, f.name) for f in dataclasses.fields(Model)})

    def _apply_part(self, name: str, params: Mapping[str, Any], *rest: Any) -> tuple[Array, dict[str, Array]]:
        mine = {n: v for n, v in params.items() if n.startswith(name + "/")}
        return super()._apply_part(name, self.merged(mine), *rest)


def with_lora(model: Model, lora: Lora) -> LoraModel:
    """The model with low-rank updates on the kernels that `lora.targets` name.

    Raises UserError for a rank below 1, and for a pattern that names no kernel.

    >>> model = with_lora(make_model("vit_base_patch16_224"), Lora(rank=8, targets=("*/attn",)))
    """
    if lora.rank < 1:
        raise UserError(f"--lora.rank is {lora.rank}; at least 1 is needed.")
    if lora.alpha is not None and not lora.alpha > 0:
        raise UserError(f"--lora.alpha is {lora.alpha:g}; it is above 0, and by default the rank.")
    shapes, _ = model.shapes()
    first = next(iter(model.parts))
    known = [
        n
        for n, s in shapes.items()
        if n.endswith("/kernel") and len(s.shape) > 1 and not n.startswith((first + "/", "head/"))
    ]
    for pattern in lora.targets:
        if not any(tree.matches(pattern, n) for n in known):
            above = sorted({"/".join(n.split("/")[: i + 1]) for n in known for i in range(n.count("/"))})
            raise UserError(f"--lora.targets: {pattern!r} names no kernel of {model.name}.{near(pattern, above)}")
    chosen = tuple(n for n in known if any(tree.matches(p, n) for p in lora.targets))
    return LoraModel(**{f.name: getattr(model, f.name) for f in dataclasses.fields(Model)}, lora=lora, kernels=chosen)


def added(name: str) -> bool:
    """Whether a parameter is one that pretrained weights never have: of a low-rank update, or a prompt."""
    return "/lora_" in name or name.endswith("/prompts")


def write_adapter(path: str | Path, model: Model, params: Mapping[str, Any]) -> None:
    """Write what is added to the source, low-rank updates and prompts, and the head alone: a small file.

    How updates are scaled stands in its header.
    """
    small = {n: np.asarray(v) for n, v in params.items() if added(n) or n.startswith("head/")}
    lora = dataclasses.asdict(model.lora) if isinstance(model, LoraModel) else None
    write_safetensors(path, small, {"format": "jft-lora", "model": model.name, "lora": json.dumps(lora)})


def read_adapter(path: str | Path, model: Model, params: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters of the plain model with the updates, the prompts and the head of a file put in.

    A model for prompts has been made with as many. Raises UserError where the file holds nothing of the kind, or what
    is of another model.

    >>> params = read_adapter("runs/bees/adapter.safetensors", model, pretrained_params)
    """
    with open_weights(path) as file:
        about = dict(file.metadata or {})
        if about.get("format") != "jft-lora" or about.get("model") != model.name:
            raise UserError(
                f"{path} holds no low-rank updates of {model.name}; it says {about.get('model', 'nothing')}."
            )
        updates = {name: file.read(name) for name in file.names}
    how = json.loads(about["lora"])
    if how is None:
        return {**params, **updates}
    lora = Lora(how["rank"], how["alpha"], tuple(how["targets"]), how["dora"])
    return with_lora(model, lora).merged({**params, **updates})

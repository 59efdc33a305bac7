"""A model as StableHLO: one program with its weights inside, for any batch size, that needs nothing of jft to run."""

import hashlib
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import export as jax_export
from jaxtyping import Array

from jft.bundle import Bundle
from jft.data.prepare import make_prepare
from jft.errors import UserError
from jft.weights.export import about, check_range, dtype_of, new_folder
from jft.weights.formats import Receipt

PLATFORMS = ("cpu", "cuda", "rocm", "tpu")
LIMIT = 1_900_000_000  # bytes of weights: the container of jax.export ends at 2 GB


def make_call(bundle: Bundle, *, preprocess_inside: bool = False, dtype: str = "float32") -> Any:
    """The function that is exported: pictures [b, height, width, 3] to logits [b, classes], weights closed over.

    Pictures are float32 as the model takes them or, with `preprocess_inside`, uint8 that are resized and cropped.
    """
    kept = dtype_of(dtype)
    prepare = make_prepare(bundle.preprocess)

    def widened(arrays: Any) -> dict[str, Array]:
        return {name: jnp.asarray(array.astype(kept)).astype(jnp.float32) for name, array in arrays.items()}

    def call(images: Array) -> Array:
        if preprocess_inside:
            images = prepare({"image": images})["image"]
        logits, _ = bundle.model.apply(widened(bundle.params), widened(bundle.batch_stats), images)
        return logits

    return call


def export_stablehlo(
    folder: str | Path, bundle: Bundle, *, preprocess_inside: bool = False, dtype: str = "float32"
) -> Receipt:
    """Write `model.stablehlo`, as `jax.export` serialises it, and `model.json`, which says what it takes and gives.

    `dtype` is what the weights are kept in; they are widened to float32 when the program runs. Raises UserError where
    they are too large for the container, or their numbers for the type.
    """
    arrays = {name: np.asarray(array) for name, array in {**bundle.params, **bundle.batch_stats}.items()}
    size = sum(array.size for array in arrays.values()) * dtype_of(dtype).itemsize
    if size > LIMIT:
        raise UserError(
            f"{bundle.model.name} has {size / 1e9:.1f} GB of weights in {dtype}; a StableHLO file holds "
            f"{LIMIT / 1e9:.1f} GB. Keep them in another type (--dtype bfloat16), or export safetensors."
        )
    check_range(bundle.model, arrays, dtype)
    (b,) = jax_export.symbolic_shape("b")
    height, width = bundle.preprocess.size
    taken = jax.ShapeDtypeStruct((b, height, width, 3), jnp.uint8 if preprocess_inside else jnp.float32)
    call = make_call(bundle, preprocess_inside=preprocess_inside, dtype=dtype)
    exported = jax_export.export(jax.jit(call), platforms=PLATFORMS)(taken)
    data = bytes(exported.serialize())
    said = {
        **about(bundle.model, bundle.classes, bundle.preprocess),
        "input": {
            "shape": ["b", height, width, 3],
            "dtype": str(taken.dtype),
            "values": "RGB, 0 to 255, resized and cropped" if preprocess_inside else "RGB / 255, less mean, by std",
        },
        "output": {
            "shape": ["b", bundle.model.num_classes],
            "dtype": "float32",
            "values": "the quantities that `classes` names"
            if bundle.quantities
            else f"logits: their {'sigmoids' if bundle.multi_label else 'softmax'} are probabilities",
        },
        "weights": dtype,
        "platforms": list(PLATFORMS),
        "jax": jax.__version__,
        "calling_convention_version": exported.calling_convention_version,
        "sha256": hashlib.sha256(data).hexdigest(),
    }
    with new_folder(Path(folder)) as beside:
        (beside / "model.stablehlo").write_bytes(data)
        (beside / "model.json").write_text(json.dumps(said, indent=1) + "\n", encoding="ascii")
    return Receipt(
        model=bundle.model.name,
        source=str(folder),
        format="stablehlo",
        sha256=str(said["sha256"]),
        used={name: name for name in arrays},
        notes=(f"takes {taken.dtype} [b, {height}, {width}, 3]: {said['input']['values']}",),  # type: ignore[index]
        direction="to",
    )


def stablehlo_code(folder: str | Path, preprocess_inside: bool = False) -> list[str]:
    """Lines of Python that open the folder with JAX alone."""
    kind = "uint8" if preprocess_inside else "float32"
    return [
        "from pathlib import Path",
        "from jax import export",
        f"program = Path({str(Path(folder) / 'model.stablehlo')!r}).read_bytes()",
        "call = export.deserialize(bytearray(program)).call",
        f"logits = call(images)  # {kind}, see model.json",
    ]

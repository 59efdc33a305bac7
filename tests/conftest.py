"""Strictness for every test: eight CPU devices, no silent promotion, shapes and dtypes of signatures checked."""

import itertools
import os
from pathlib import Path

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
os.environ.setdefault("JAX_PLATFORMS", "cpu")

from jaxtyping import install_import_hook  # (the flags above must be set before jax starts)

install_import_hook("jft", "typecheck.check")

import hypothesis  # noqa: E402
import jax  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402
from PIL import Image  # noqa: E402

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_default_matmul_precision", "highest")

# The same examples every time, however slow the machine is; `pytest --hypothesis-profile=search` looks for new ones.
SLOW = [hypothesis.HealthCheck.too_slow]
hypothesis.settings.register_profile("search", deadline=None, suppress_health_check=SLOW)
hypothesis.settings.register_profile("same", deadline=None, suppress_health_check=SLOW, derandomize=True)
hypothesis.settings.load_profile("same")


@pytest.fixture(scope="session")
def assets() -> Path:
    """The folder of real weights and images; the test is skipped, with the reason, where there is none."""
    folder = os.environ.get("JFT_ASSETS")
    if not folder:
        pytest.skip("JFT_ASSETS is unset: it names the folder of real weights and images")
    if not Path(folder).is_dir():
        pytest.fail(f"JFT_ASSETS={folder} is no folder")
    return Path(folder).resolve()


@pytest.fixture(autouse=True, scope="session")
def shared_cache(tmp_path_factory):
    """What fixtures of a module share is not kept in the cache of whoever runs the tests, and not found there."""
    with pytest.MonkeyPatch.context() as patched:
        folder = tmp_path_factory.mktemp("cache")
        patched.setenv("JFT_CACHE", str(folder))
        yield folder


@pytest.fixture(autouse=True)
def cache(shared_cache, tmp_path_factory, monkeypatch):
    """Every test gets a cache of its own, so that none reads what another wrote, but for compiled programs.

    Compiling is most of the suite's time, and many tests run the same small models.
    """
    folder, compiled = tmp_path_factory.mktemp("cache"), shared_cache / "xla"
    compiled.mkdir(exist_ok=True)
    (folder / "xla").symlink_to(compiled)
    monkeypatch.setenv("JFT_CACHE", str(folder))


@pytest.fixture
def optax_promotion():
    """For tests that run optax's Adam, which multiplies floats by an integer count."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    """A folder of class folders: 12 noisy pictures, 40×36, of each of three colours; one class name is awkward."""
    root = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for i, name in enumerate(("blue", "grün & <b>", "red")):
        (root / name).mkdir()
        for j in range(12):
            pixels = rng.integers(0, 120, (36, 40, 3))
            pixels[..., 2 - i] += 100
            Image.fromarray(pixels.astype(np.uint8)).save(root / name / f"{j}.png")
    return root


@pytest.fixture
def crash(monkeypatch):
    """`crash(config, at)`: a run that ends in the middle, when the line of the step `at` is written.

    Or, with `line`, that of this number, from 0.
    """
    from jft.report.track import Mirror
    from jft.train import train

    class Crash(Exception):
        pass

    def crash(made, at=None, line=None):
        write, count = Mirror.write, itertools.count()

        def failing(self, row):
            if next(count) == line or (row["step"] == at and "val_loss" not in row):
                raise Crash
            write(self, row)

        with monkeypatch.context() as patched:
            patched.setattr(Mirror, "write", failing)
            with pytest.raises(Crash):
                train(made)

    return crash

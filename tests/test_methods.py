"""Methods through the loop: what is validated is what is kept, what is asked for is felt and told."""

import json

import numpy as np
import pytest

from jft import build
from jft.config import Config
from jft.errors import UserError
from jft.penalties import l2_sp
from jft.train import train
from jft.use import evaluate, open_model
from jft.weights import open_weights

pytestmark = pytest.mark.usefixtures("optax_promotion")


@pytest.fixture(scope="module")
def config(folder):
    return Config(
        data=str(folder), model="tiny_vit", weights="none", batch=8, epochs=2, lr=1e-2, augment=(), display="quiet"
    )


def test_schedule_free_keeps_what_it_validates(config, tmp_path):
    """Over two stages, the second of which begins where the averages of the first ended."""
    run = train(config.replace(plan="lp-ft", optimizer="schedule-free", snapshots=True, workdir=str(tmp_path / "a")))
    assert evaluate(run.workdir)["accuracy"] == run.result["val"]["accuracy"]
    files = sorted((run.workdir / "snapshots").iterdir())
    with open_weights(files[-1]) as file:
        last = {n: np.array(file.read(n)) for n in file.names}
    kept = open_model(run.workdir).params
    if run.result["val"]["best_step"] == run.result["last"]["step"]:
        for name, value in last.items():
            np.testing.assert_array_equal(kept[name], value)
    rates = [json.loads(line).get("lr") for line in (run.workdir / "metrics.jsonl").read_text().splitlines()]
    rates = [rate for rate in rates if rate]
    assert rates[-1] == pytest.approx(1e-3)  # constant: cosine would have ended near 0


def test_a_decoupled_penalty_is_told_and_pulls(config, tmp_path):
    """From weights far from their source the decoupled pull alone, at a gradient of nothing, brings them back."""
    source = train(config.replace(plan="full", workdir=str(tmp_path / "source")))
    file = str(source.workdir / "model/model.safetensors")
    options = dict(plan="full", weights=file, penalty=l2_sp, penalty_decoupled=True)
    ends = []
    for weight in (0.0, 50.0):
        run = train(config.replace(workdir=str(tmp_path / f"{weight}"), penalty_weight=weight, **options))
        lines = [json.loads(line) for line in (run.workdir / "metrics.jsonl").read_text().splitlines()]
        assert all(line["penalty"] >= 0 for line in lines if "penalty" in line)
        ends.append(sum(next(line["distance"] for line in lines[::-1] if "distance" in line).values()))
    assert ends[1] < 0.5 * ends[0]


def test_wrong_combinations_are_refused(config, tmp_path):
    for options, message in (
        (dict(optimizer="schedule-free", carry=True), "leave out --carry"),
        (dict(optimizer="schedule-free-sgd", ema=0.9), "leave out --ema"),
        (dict(penalty_decoupled=True), "there is none"),
        (dict(snapshots=True, plan="lora"), "not low-rank updates"),
    ):
        with pytest.raises(UserError, match=message):
            train(config.replace(workdir=str(tmp_path / "run"), **options))
        assert not (tmp_path / "run").exists()


def test_balance_draws_by_class(config, folder, tmp_path):
    """Of a set with one image of a class and ten of another, both come equally often."""
    splits = build.read_data(config)
    few = np.flatnonzero(splits.train.labels != 0)[:10].tolist() + np.flatnonzero(splits.train.labels == 0)[:1].tolist()
    chosen = splits.train.select(few)
    made = config.replace(
        data=lambda: {"train": chosen, "val": splits.val}, balance=True, plan="head", workdir=str(tmp_path / "run"),
        epochs=1,
    )  # fmt: skip
    assert train(made).result["train"]["count"] == 11

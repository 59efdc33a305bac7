"""A comparison: every config with each of its seeds, a row each, and a page at the end."""

import json

import pytest
from synthetic_run import make_run
from test_report import Page

from jft import cli, compare
from jft.config import Config
from jft.errors import UserError
from jft.report.several import mean_interval
from jft.run import Result


def test_a_comparison_ends_with_a_table_and_a_page(tmp_path, monkeypatch):
    right = {"from scratch": (0.5, 0.6), "staged": (0.8, 0.84)}

    def train(config, shared=None):
        folder = make_run(tmp_path / config.workdir, ["a", "b"], 40)
        result = json.loads((folder / "result.json").read_text())
        name = "staged" if "staged" in config.workdir else "from scratch"
        result["val"]["accuracy"], result["plan"] = right[name][config.seed], name
        (folder / "result.json").write_text(json.dumps(result))
        return Result(folder, result)

    monkeypatch.setattr(compare, "train", train)
    config = Config(data="x", seeds=2, workdir=str(tmp_path / "c"), display="quiet")
    done = compare.compare({"staged": config, "from scratch": config})
    assert [r["name"] for r in done.rows] == ["staged", "from scratch"]
    assert done.rows[0]["values"] == [0.8, 0.84]
    assert done.rows[0]["interval"] == list(mean_interval([0.8, 0.84]))
    page = Page(tmp_path / "c" / "report.html").text
    assert "staged (2 seeds) · from-scratch (2 seeds)" in page and "82.0 %" in page and "55.0 %" in page
    monkeypatch.setattr(compare, "make_comparison", lambda *_: 1 / 0)
    told = []
    monkeypatch.setattr(compare, "train", lambda config, shared=None: Result(tmp_path, {**done_result(tmp_path)}))
    display = compare.make_display("quiet")
    monkeypatch.setattr(display, "warn", told.append, raising=False)
    monkeypatch.setattr(compare, "make_display", lambda _: display)
    compare.compare({"staged": config})
    assert "ZeroDivisionError" in told[0]


@pytest.mark.parametrize(
    ("seeds", "columns"),
    [
        ((1, 1), ["val accuracy"]),
        ((2, 2), ["val accuracy, mean ± std of 2 seeds"]),
        ((1, 2), ["val accuracy, mean ± std", "seeds"]),
    ],
)
def test_the_table_of_a_comparison_says_of_how_many_seeds_it_is(seeds, columns, tmp_path, monkeypatch):
    def train(config, shared=None):
        stages = [{"trainable_params": 1}]
        return Result(tmp_path, {"val": {"accuracy": 0.5}, "stages": stages, "seconds": {"total": 1.0}})

    told = []
    display = compare.make_display("quiet")
    monkeypatch.setattr(display, "table", lambda rows, columns, title: told.append((rows, columns)))
    monkeypatch.setattr(compare, "make_display", lambda _: display)
    monkeypatch.setattr(compare, "train", train)
    (tmp_path / "c").mkdir()
    configs = {n: Config(data="x", seeds=s, workdir=str(tmp_path / "c")) for n, s in zip("ab", seeds, strict=True)}
    compare.compare(configs)
    ((rows, names),) = told
    assert names == ["", *columns, "trained at most", "s a run"] and len(rows[0]) == len(names)


def test_configs_that_name_several_folders_are_refused(tmp_path):
    def configs(*folders):
        return {str(i): Config(data="x", workdir=folder, display="quiet") for i, folder in enumerate(folders)}

    for folders in ((str(tmp_path / "a"), str(tmp_path / "b")), (None, str(tmp_path / "b"))):
        with pytest.raises(UserError, match=r"2 folders \(.*b.*--workdir"):
            compare.compare(configs(*folders))
    with pytest.raises(UserError, match="'a b' and 'a-b' would share the folder a-b"):
        compare.compare({"a b": Config(data="x"), "a-b": Config(data="x")})
    assert not list(tmp_path.iterdir())
    later = {"a": Config(data="x"), "b": Config(data="x", distributed=True)}
    with pytest.raises(UserError, match="--distributed is for one run"):
        compare.compare(later)


def test_seeds_do_not_lie_where_one_run_does(tmp_path, monkeypatch):
    def train(config, shared=None):
        raise UserError(config.workdir)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(compare, "train", train)
    with pytest.raises(UserError, match=r"^runs/x-resnet50-head-seeds/runs/seed0$"):
        compare.compare({"": Config(data="x", seeds=2, display="quiet")})
    (tmp_path / "c.py").write_text("from jft import Config\n\n\ndef config():\n    return Config(data='x')\n")
    for words, folder in (["--seeds", "3"], "runs/c-seeds"), ([], "runs/c"):
        (made,) = cli.configs_of(cli.make_parser().parse_args(["finetune", "c.py", *words])).values()
        assert made.workdir == folder


def done_result(folder):
    return json.loads((folder / "c" / "staged" / "seed0" / "result.json").read_text())

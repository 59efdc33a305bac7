"""The metrics log, and the report of a run: complete, whole HTML, safe with whatever a class is called."""

import csv
import itertools
import json
import math
import re
import shlex
import time
from dataclasses import replace
from functools import partial
from html.parser import HTMLParser
from importlib import resources
from pathlib import Path

import numpy as np
import pytest
import sklearn.metrics as sk
from PIL import Image
from synthetic_run import make_run

from jft import Stage, cli, metrics
from jft.code import load_object
from jft.config import Config, describe
from jft.data.sources import arrays
from jft.errors import UserError
from jft.report import log, plots, sweep
from jft.report.html import Markup, _command, make_report, tag
from jft.report.several import make_comparison, mean_interval

EVIL = [
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "a & b",
    "</style></section>",
    "$x^2",
    "蚂蚁",
]


def test_log_reads_what_was_written(tmp_path):
    with log.MetricsLog(path := tmp_path / "new" / "metrics.jsonl") as file:
        file.write({"step": 1, "stage": "头 \udcff", "loss": np.float32(0.5), "lr": {"head": 0.1}, "best": True})
        file.write({"step": np.int64(2), "loss": math.nan, "norm": -math.inf, "lr": {"head": np.float32("inf")}})
    rows = log.read(path)
    assert rows[0] == {"step": 1, "stage": "头 \udcff", "loss": 0.5, "lr": {"head": 0.1}, "best": True}
    assert math.isnan(rows[1]["loss"]) and rows[1]["norm"] == -math.inf and rows[1]["lr"]["head"] == math.inf
    for line in path.read_text().splitlines():
        json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


def test_log_is_flushed_and_appended_to(tmp_path):
    path = tmp_path / "m.jsonl"
    with log.MetricsLog(path) as first:
        first.write({"step": 1})
        assert log.read(path) == [{"step": 1}]  # seen while the writer is still open
    with log.MetricsLog(path) as second:
        second.write({"step": 2})
    assert log.read(path) == [{"step": 1}, {"step": 2}]


def test_log_truncates_and_goes_on(tmp_path):
    path = tmp_path / "m.jsonl"
    with log.MetricsLog(path) as file:
        file.truncate(0)  # nothing there yet
        for step in range(1, 6):
            file.write({"step": step, "loss": math.nan})
        file.write({"note": "no step"})
        before = path.read_bytes().splitlines()
        file.truncate(3)
        file.write({"step": 4})
    assert [row.get("step") for row in log.read(path)] == [1, 2, 3, None, 4]
    assert path.read_bytes().splitlines()[:3] == before[:3]
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("half", ['{"step": 2, "lo', '{"step": 2}'])
def test_half_a_last_line_is_removed(tmp_path, half):
    path = tmp_path / "m.jsonl"
    path.write_text('{"step": 1}\n' + half)
    assert log.read(path) == [{"step": 1}]
    with log.MetricsLog(path) as file:
        file.write({"step": 2})
    assert log.read(path) == [{"step": 1}, {"step": 2}]


def test_nothing_but_half_a_line(tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_text('{"st')
    assert log.read(path) == []
    log.MetricsLog(path).close()
    assert path.read_bytes() == b""


@pytest.mark.parametrize("bad", ["garbage", "[1]", ""])
def test_damage_inside_the_log_is_named(tmp_path, bad):
    path = tmp_path / "m.jsonl"
    path.write_text('{"step": 1}\n' + bad + '\n{"step": 3}\n')
    with pytest.raises(UserError, match="line 2"):
        log.read(path)


class Page(HTMLParser):
    """What a page consists of; its tags must close in the order in which they opened."""

    def __init__(self, path):
        super().__init__()
        self.open, self.tags, self.attributes, self.words = [], [], [], []
        self.feed(path.read_text("utf-8"))
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, key, value or "") for key, value in attrs]
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, key, value or "") for key, value in attrs]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.words).split())


@pytest.mark.parametrize(
    ("span", "whole", "wanted"),
    [
        ((0.13, 0.92), False, [0.2, 0.4, 0.6, 0.8]),
        ((0, 1), False, [0, 0.2, 0.4, 0.6, 0.8, 1]),
        ((1, 16), True, [5, 10, 15]),
        ((0, 2), True, [0, 1, 2]),
        ((0, 3e-5), False, [0, 5e-6, 1e-5, 1.5e-5, 2e-5, 2.5e-5, 3e-5]),
        ((-300, 1e4), False, [0, 2000, 4000, 6000, 8000, 10000]),
    ],
)
def test_ticks_are_round_and_within(span, whole, wanted):
    assert plots.ticks(span, whole=whole) == wanted


nothing, infinite = [(1, math.nan), (2, math.inf)], [(1, 1e38), (2, -1e38)]


@pytest.mark.parametrize("train", [[], [(5, 0.5)], [(i, 0.0) for i in range(2000)], nothing, infinite])
@pytest.mark.parametrize("val", [[], [(1, 1.0)], nothing])
@pytest.mark.parametrize("percent", [True, False])
def test_curves_of_anything(train, val, percent):
    if train or val:
        svg = plots.curve("<t>", train, val, [("a", 0), ("b<", 1)], percent=percent)
        assert "nan" not in svg and "inf" not in svg and "&lt;t&gt;" in svg and "<t>" not in svg


def test_curves_leave_a_gap_where_the_loss_was_no_number():
    svg = plots.curve("t", [(1, 1.0), (2, 0.5), (3, math.nan), (4, 0.25), (5, 0.2)], [], [])
    path = svg.split('class="line train" d="')[1].split('"')[0]
    assert path.count("M") == 2 and path.count("L") == 2


def test_stages_are_called_by_name_where_it_fits():
    assert plots.stage_labels([("head", 0), ("full", 50)], 100) == ["head", "full"]
    assert plots.stage_labels([("head", 0), ("full", 95)], 100) == ["1", "2"]
    assert plots.stage_labels([("head", 0)], 0) == ["1"] and plots.stage_labels([], 5) == []


def test_a_tag_escapes_all_but_markup():
    assert tag("p", "a < b", Markup("<b>c</b>"), [None, tag("i", "&")], title='"x"') == (
        '<p title="&quot;x&quot;">a &lt; b<b>c</b><i>&amp;</i></p>'
    )


def test_report_holds_what_it_must(tmp_path):
    folder = make_run(tmp_path / "run", ["ants", "bees", "wasps"], 90)
    page = Page(make_report(folder))
    titles = ["Result", "What was trained when", "Curves", "Classes", "Calibration", "Mistakes", "Data", "Time"]
    for words in [*titles, "How to repeat it", "Most uncertain", "95 % interval", "Majority baseline", "1. head",
                  "Images of each class",
                  "3. all", "train/x/broken.jpg", "frozen parts, once per image", "jft finetune",
                  "--preprocess.crop_pct 1", "0123456789abcdef" * 4]:  # fmt: skip
        assert words in page.text, words
    assert page.tags.count("svg") == 5 and page.tags.count("h1") == 1
    levels = [int(t[1]) for t in page.tags if t in ("h1", "h2", "h3", "h4")]
    assert levels[0] == 1 and all(b <= a + 1 for a, b in itertools.pairwise(levels))
    alts = [value for tag, key, value in page.attributes if (tag, key) == ("svg", "aria-label")]
    assert len(alts) == 5 and all(alts)
    ids = [value for _, key, value in page.attributes if key == "id"]
    assert len(ids) == len(set(ids))
    assert {value[1:] for _, key, value in page.attributes if key in ("href", "xlink:href")} <= set(ids)
    assert [p.name for p in folder.iterdir() if p.suffix == ".part"] == []


def test_parts_are_drawn_as_the_plan_trains_them(tmp_path):
    page = Page(make_report(make_run(tmp_path / "run", ["a", "b"], 20)))
    told = [value for tag, key, value in page.attributes if (tag, key) == ("span", "aria-label")]
    stages = {
        name: [t.removeprefix(f"{name}: ") for t in told if t.startswith(f"{name}: ")] for name in ("head", "top")
    }
    assert stages["head"] == ["frozen"] * 4 + ["head trained"]
    assert stages["top"] == ["frozen", "block2 trained", "norm trained", "frozen", "head trained"]


def read_csv(folder, classes):
    with open(folder / "predictions.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    return rows, np.array([[float(r[f"p:{c}"]) for c in classes] for r in rows])


def tiles(page):
    """What stands in the headline's tiles, as text: a tile's name and its value are neighbours."""
    return page.text.split("Intervals:")[0]


def test_figures_equal_scikit_learn_on_the_csv(tmp_path):
    classes = ["ants", "bees", "wasps", "flies", "moths", "mites"]
    folder = make_run(tmp_path / "run", classes, 240)
    page = Page(make_report(folder))
    rows, p = read_csv(folder, classes)
    true, said = [r["true_label"] for r in rows], [r["label"] for r in rows]
    y = np.array([classes.index(t) for t in true])
    q = p / p.sum(axis=1, keepdims=True)  # scikit-learn wants sums of 1 to more digits than float32 has
    one = np.eye(6, dtype=int)[y]
    for name, value in [
        ("Validation accuracy", f"{100 * sk.accuracy_score(true, said):.1f} %"),
        ("Top-5 accuracy", f"{100 * sk.top_k_accuracy_score(y, q, k=5):.1f} %"),
        ("Balanced accuracy", f"{100 * sk.balanced_accuracy_score(true, said):.1f} %"),
        ("F1, macro", f"{sk.f1_score(true, said, average='macro'):.3f}"),
        ("AUROC", f"{sk.roc_auc_score(one, q, average='macro'):.3f}"),
        ("Mean average precision", f"{100 * sk.average_precision_score(one, q, average='macro'):.1f} %"),
        ("Log loss", f"{sk.log_loss(y, q):.3f}"),
        ("Majority baseline", f"{100 * np.bincount(y).max() / 240:.1f} %"),
    ]:
        assert f"{name} {value}" in tiles(page), name
    counts = sk.confusion_matrix(true, said, labels=classes)
    for name, row in zip(classes, counts, strict=True):
        assert f"{name} {' '.join(map(str, row))}" in page.text
    found = sk.precision_recall_fscore_support(true, said, labels=classes)
    for name, precision, recall, f1, support in zip(classes, *found, strict=True):
        assert f"{name} {support} {100 * precision:.1f} % {100 * recall:.1f} % {f1:.3f}" in page.text


def test_figures_of_several_labels_equal_scikit_learn_on_the_csv(tmp_path):
    classes = ["red", "green", "blue", "none"]
    folder = make_run(tmp_path / "run", classes, 120, several=True)
    page = Page(make_report(folder))
    rows, p = read_csv(folder, classes)
    y = np.array([[c in r["true_label"].split("|") for c in classes] for r in rows]).astype(int)
    said = (p >= 0.5).astype(int)
    for name, value in [
        ("all labels right", f"{100 * sk.accuracy_score(y, said):.1f} %"),
        ("Validation mean average precision", f"{100 * sk.average_precision_score(y, p, average='macro'):.1f} %"),
        ("F1, macro", f"{sk.f1_score(y, said, average='macro'):.3f}"),
        ("F1, micro", f"{sk.f1_score(y, said, average='micro'):.3f}"),
        ("AUROC", f"{sk.roc_auc_score(y, p, average='macro'):.3f}"),
        ("Log loss", f"{np.mean([sk.log_loss(a, b, labels=[0, 1]) for a, b in zip(y.T, p.T, strict=True)]):.3f}"),
        ("Chance baseline", f"{100 * y.mean():.1f} %"),
    ]:
        assert f"{name} {value}" in tiles(page), name
    found = sk.precision_recall_fscore_support(y, said)
    for c, (name, ((_, wrongly), (missed, right))) in enumerate(
        zip(classes, sk.multilabel_confusion_matrix(y, said).tolist(), strict=True)
    ):
        area = sk.average_precision_score(y[:, c], p[:, c])
        told = [right, missed, wrongly, f"{100 * found[0][c]:.1f} % {100 * found[1][c]:.1f} % {found[2][c]:.3f}"]
        assert f"{name} {' '.join(map(str, told))} {100 * area:.1f} %" in page.text


def colours(css):
    """The custom properties of the light page and of the dark one, as red, green and blue."""
    light, dark = css.split("prefers-color-scheme: dark", 1)
    found = []
    for part in (light, dark.split("* {")[0]):
        words = dict(re.findall(r"--([\w-]+): (#\w{6}|\d+ \d+ \d+)", part))
        as_numbers = {
            n: [int(v[i : i + 2], 16) for i in (1, 3, 5)] if v[0] == "#" else [int(x) for x in v.split()]
            for n, v in words.items()
        }
        found.append((found[0] if found else {}) | as_numbers)
    return found


def contrast(one, other):
    """Of WCAG 2.2, from 1 to 21."""

    def luminance(colour):
        c = np.array(colour) / 255
        return float(np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4) @ [0.2126, 0.7152, 0.0722])

    low, high = sorted([luminance(one), luminance(other)])
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("dark", [False, True])
def test_colours_can_be_told_apart(dark):
    held = colours((resources.files("jft.report") / "style.css").read_text())[dark]
    for text in ("ink", "muted", "blue-rgb", "orange-rgb"):
        for below in ("page", "card"):
            assert contrast(held[text], held[below]) >= 4.5, (text, below)
    for tint in ("blue-rgb", "orange-rgb"):  # numbers of the confusion matrix, where it is strongest
        mixed = 0.51 * np.array(held[tint]) + 0.49 * np.array(held["card"])
        assert contrast(held["ink"], mixed) >= 4.5, tint


def test_hostile_names_are_only_text(tmp_path):
    folder = make_run(tmp_path / "run", EVIL, 60)
    result = json.loads((folder / "result.json").read_text())
    result["data"] = result["model"] = "<script>alert(2)</script>"
    result["excluded"] = [{"path": "<b onclick=x>\udc80.jpg", "reason": "</td><script>"}]
    result["stages"][0]["name"] = "<i>$\\alpha$</i>"
    (folder / "result.json").write_text(json.dumps(result))
    page = Page(make_report(folder))
    assert "script" not in page.tags and "i" in page.tags
    assert {tag for tag, key, value in page.attributes if key.startswith("on")} == set()
    assert {value[:5] for tag, key, value in page.attributes if key == "src"} <= {"data:"}
    for name in EVIL:
        assert " ".join(name.split()) in page.text
    policy = [value for tag, key, value in page.attributes if (tag, key) == ("meta", "content")]
    assert any("default-src 'none'" in value for value in policy)


def test_several_labels_an_image(tmp_path):
    page = Page(make_report(make_run(tmp_path / "run", ["red", "green", "blue", "none"], 80, several=True)))
    assert "all labels right" in page.text and "Class by class" in page.text
    assert "Validation mean average precision" in page.text and "counts as 0" not in page.text
    for words in ("every label of every image counted", "wrongly said", "average precision", "Most uncertain"):
        assert words in page.text, words
    assert "validation mAP after it" in page.text and "82.0 %" in page.text and "92.0 %" not in page.text


def test_the_test_split_of_several_labels_is_told_by_its_mean_average_precision(tmp_path):
    folder = make_run(tmp_path / "run", ["red", "green"], 40, several=True)
    test = {"accuracy": 0.55, "average_precision": 0.712, "count": 30}
    last = {"accuracy": 0.4, "average_precision": 0.654}
    changed(folder, "result.json", lambda r: r.update(test=test, last=last))
    with np.load(folder / "predictions.npz") as file:
        held = dict(file)
    held["labels"][:, 1], held["probabilities"][:, 1] = 0, 0.1  # neither labelled nor said
    np.savez(folder / "predictions.npz", **held)
    text = make_report(folder).read_text()
    page = Page(folder / "report.html")
    main = re.findall(r'<div class="main"><dt>([^<]*)</dt><dd>([^<]*)', text)
    assert [name for name, _ in main] == ["Validation mean average precision", "Test mean average precision"]
    assert main[1][1] == "71.2\N{NO-BREAK SPACE}%" and "Test accuracy, all labels right 55.0 %" in page.text
    assert "Last state, mean average precision 65.4 %" in page.text
    assert "mean over classes; one neither labelled nor said counts as 0" in page.text


def test_a_split_of_equal_classes_is_told_by_one_number(tmp_path):
    folder = make_run(tmp_path / "run", ["a", "b"], 20)
    with np.load(folder / "predictions.npz") as file:
        held = dict(file)
    for labels, told in ((np.arange(20) % 2, "has 10 images a"), (np.arange(20) > 18, "has 1 to 19 images a")):
        np.savez(folder / "predictions.npz", **{**held, "labels": labels.astype(np.int32)})
        assert told in Page(make_report(folder)).text


class Named:
    """An object that can be called: its class has a path, it has none."""

    def __call__(self, *_):
        return None


def of_a_function():
    """What a config may hold, and no command can name."""
    return lambda: None


def test_the_command_to_repeat_a_run_is_one_that_jft_takes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("own.py").write_text("def read():\n    pass\n\ndef loss(logits, batch):\n    return logits\n")
    own = load_object("own.py:loss")
    can = {
        "data": "tfds:mnist", "weights": "hf:timm/resnet50.a1_in1k", "weight_decay": 0.01, "keep_head": True,
        "image_size": (64, 32), "augment": (), "clip": None, "preprocess": {"crop_pct": 1.0, "mean": (0.5, 0.4, 0.3)},
        "model_options": {"pool": "avg"}, "loss": own, "track": ("mlflow", "own:tracker"), "label_smoothing": 0.1,
        "penalty": "l2-sp:new=0.01", "objective": "distil:pool", "optimizer": own, "schedule": own, "hyper": own,
        "plan": own,
    }  # fmt: skip
    command, left = _command(json.loads(json.dumps(describe(Config(**can)))))
    assert not left and "--weight-decay 0.01" in command and "--preprocess.crop_pct 1" in command
    words = shlex.split(command.replace("\\\n", " "))[1:]
    parser = cli.make_parser([w for w in words if w.startswith(cli.FREE)])
    (made,) = cli.configs_of(parser.parse_args(words)).values()
    assert describe(made) == describe(Config(**can))

    for fields in (
        {
            "data": lambda: None,
            "weights": of_a_function(),
            "loss": partial(own, 2),
            "plan": (Stage("a", ("head",)),),
        },
        {
            "data": {"train": (np.zeros(2), np.zeros(2))},
            "optimizer": partial(own, 2),
            "schedule": lambda peak, steps: 1,
        },
        {"data": Path("x").read_bytes, "optimizer": Named()},
        {"data": (np.zeros((2, 8, 8, 3)), np.zeros(2)), "loss": lambda logits, batch: logits},
    ):
        settings = json.loads(json.dumps(describe(Config(**fields, epochs=3.0))))
        command, left = _command(settings)
        assert set(left) == set(fields) and command.split() == ["jft", "finetune", "CONFIG.py", "\\", "--epochs", "3"]
    folder = make_run(tmp_path / "run", ["a", "b"], 20)
    changed(folder, "config.json", lambda c: c.update(config=settings, weights=None))
    text = Page(make_report(folder)).text
    assert "CONFIG.py is a Python file whose config() sets data, loss" in text and "weights None" not in text


def test_long_names_keep_what_tells_them_apart(tmp_path):
    names = [f"species of ant {i:02}" for i in range(14)]
    svg = plots.heatmap(np.eye(14, dtype=np.int64), names)
    told = re.findall(r'<text class="end"[^>]*><title>([^<]*)</title>([^<]*)</text>', svg)
    assert [t for t, _ in told[::2]] == names and len({short for _, short in told}) == 14
    wide = re.findall(r"translate\(([\d.]+) ([\d.]+)\)", plots.heatmap(np.eye(14, dtype=np.int64), ["W" * 16] * 14))
    assert 640 - float(wide[0][1]) > 16 * 11.9  # units of a W in most fonts
    page = Page(make_report(make_run(tmp_path / "run", ["ants", "rhododendron ferrugineum L."], 40)))
    heads = [value for tag, key, value in page.attributes if (tag, key) == ("th", "title")]
    assert heads == ["rhododendron ferrugineum L."] * 2 and "rhododendro…rrugineum L." in page.text
    css = (resources.files("jft.report") / "style.css").read_text()
    assert ".confusion thead th { text-align: center; white-space: normal; }" in css


def shown(page):
    return [value for tag, key, value in page.attributes if (tag, key) == ("img", "src")]


def test_mistakes_are_shown_as_pictures(tmp_path):
    data = tmp_path / "data"
    (data / "val").mkdir(parents=True)
    for i in range(45):
        Image.new("RGB", (1200, 900), (5 * i, 90, 120)).save(data / "val" / f"{i}.jpg")
    folder = make_run(tmp_path / "run", ["a", "b"], 45, data)
    page = Page(make_report(folder))
    count = len(shown(page))
    assert 8 < count <= 24
    assert all(source.startswith("data:image/jpeg;base64,") and len(source) < 20_000 for source in shown(page))
    alts = [value for tag, key, value in page.attributes if (tag, key) == ("img", "alt")]
    assert len(alts) == count and all(alts)
    (data / "val" / alts[0].rpartition("/")[2]).write_text("no picture")
    page = Page(make_report(folder))
    assert len(shown(page)) < count and "no picture" in page.text


def test_pictures_of_arrays(tmp_path):
    names = np.load(make_run(tmp_path / "run", ["a", "b"], 45) / "predictions.npz")["names"]
    pixels = np.random.default_rng(0).integers(0, 255, (45, 8, 8), np.uint8)
    images = replace(arrays(pixels, np.arange(45) % 2), names=tuple(names.tolist()))
    page = Page(make_report(tmp_path / "run", images))
    assert shown(page) and all(source.startswith("data:image/png;base64,") for source in shown(page))


@pytest.mark.parametrize("data", ["tfds:mnist", "uint8[9, 8, 8, 3] sha256:0123", "/no/such/folder", "{'train': 'x'}"])
def test_without_pictures_there_is_a_table(tmp_path, data):
    page = Page(make_report(make_run(tmp_path / "run", ["a", "b"], 45, data)))
    assert not shown(page) and "what the model said of it" in page.text and "val/a/0" in page.text


def test_no_file_outside_the_data_is_shown(tmp_path):
    (tmp_path / "data").mkdir()
    Image.new("RGB", (80, 80)).save(tmp_path / "secret.jpg")
    folder = make_run(tmp_path / "run", ["a", "b"], 45, tmp_path / "data")
    with np.load(folder / "predictions.npz") as file:
        held = dict(file)
    held["names"] = np.array(["../secret.jpg", str(tmp_path / "secret.jpg"), "/" * 40] * 15)
    np.savez(folder / "predictions.npz", **held)
    assert not shown(Page(make_report(folder)))


def test_an_interrupted_run_gets_a_report_too(tmp_path):
    folder = make_run(tmp_path / "run", ["a", "b"], 20)
    for name in ("result.json", "predictions.npz", "predictions.csv"):
        (folder / name).unlink()
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"step": 201, "loss": "NaN", "stage": "all"}\n{"step": 202, "lo')
    page = Page(make_report(folder))
    assert "has not finished" in page.text and page.tags.count("svg") == 3
    assert "not a finite number in 1 of 201 rows" in page.text


def test_a_report_is_the_same_again(tmp_path):
    folder = make_run(tmp_path / "run", ["a", "b"], 20)
    first = make_report(folder).read_bytes()
    assert make_report(folder).read_bytes() == first


@pytest.mark.parametrize("name", ["config.json", "result.json", "predictions.npz"])
def test_a_damaged_run_is_named(tmp_path, name):
    folder = make_run(tmp_path / "run", ["a", "b"], 20)
    (folder / name).write_bytes((folder / name).read_bytes()[:-20])
    with pytest.raises(UserError, match=name):
        make_report(folder)


def test_no_run_no_report(tmp_path):
    with pytest.raises(UserError, match="no run's folder"):
        make_report(tmp_path)


def changed(folder, name, change):
    """A file of a run's folder with something else in it."""
    held = json.loads((folder / name).read_text())
    change(held)
    (folder / name).write_text(json.dumps(held))


def test_runs_are_compared_on_one_page(tmp_path):
    for i, (name, seed) in enumerate([("head", 0), ("head", 1), ("all", 0), ("all", 1)]):
        folder = make_run(tmp_path / "c" / name / f"seed{seed}", ["<b>ants", "bees"], 90)
        changed(folder, "result.json", lambda r, i=i: r["val"].update(accuracy=(0.8, 0.84, 0.9, 0.92)[i], ece=0.1))
        changed(folder, "config.json", lambda c, name=name, seed=seed: c["config"].update(plan=name, seed=seed))
    rows = [{"name": "head"}, {"name": "all"}]
    (tmp_path / "c" / "result.json").write_text(json.dumps({"rows": rows}))
    with np.load(folder / "predictions.npz") as file:
        held = dict(file)
    held["probabilities"] = np.where(held["labels"][:, None] == np.arange(2)[None], 0.9, 0.1).astype(np.float32)
    np.savez(folder / "predictions.npz", **held)
    make_report(tmp_path / "c" / "all" / "seed1")
    page = Page(make_comparison([tmp_path / "c"], tmp_path / "c" / "report.html"))
    assert ("a", "href", "all/seed1/report.html") in page.attributes and "Of several seeds, the mean." in page.text
    low, high = mean_interval([0.8, 0.84])
    assert f"82.0 % {100 * low:.1f} to {100 * min(high, 1):.1f}" in page.text and "91.0 %" in page.text
    assert "plan head all" in page.text and "seed " not in page.text.split("Curves")[0].split("differently")[-1]
    assert "script" not in page.tags and "b" not in page.tags and page.tags.count("h1") == 1
    for words in ("4 runs on", "Where they differ", "Validation loss", "Time", "calibration error"):
        assert words in page.text, words
    # Two of the four quarters of the second's answers are all right: the rest is the first's mistakes halved.
    with np.load(tmp_path / "c" / "head" / "seed0" / "predictions.npz") as file:
        wrong = float(np.mean(file["probabilities"].argmax(1) != file["labels"]))
    assert f"{50 * wrong:+.1f} (" in page.text


def test_single_runs_are_compared_beside_the_first(tmp_path):
    folders = [make_run(tmp_path / name, ["a", "b"], 60, several=several) for name, several in (("x", 0), ("y", 1))]
    make_report(folders[0])
    path = make_comparison(folders)
    page = Page(path)
    assert path == tmp_path / "comparison.html" and "other images" in page.text
    assert ("a", "href", "x/report.html") in page.attributes
    assert "Nothing: the configurations are the same." in page.text and "Of several seeds" not in page.text
    (folders[1] / "result.json").unlink()
    with pytest.raises(UserError, match="y holds a run that is not finished"):
        make_comparison(folders)
    with pytest.raises(UserError, match="nor one of a comparison"):
        make_comparison([tmp_path / "nothing"])


def test_runs_of_several_labels_are_compared_by_their_map(tmp_path):
    folders = [make_run(tmp_path / name, ["a", "b"], 60, several=True) for name in "xy"]
    page = Page(make_comparison(folders))
    with np.load(folders[0] / "predictions.npz") as file:
        low, high = metrics.intervals(file["probabilities"], file["labels"])["average_precision"]
    assert f"75.0 % {100 * low:.1f} to {100 * high:.1f}" in page.text and "Validation mAP" in page.text
    assert "accuracy (all labels right), in points" in page.text


def run_of_quantities(folder):
    make_run(folder, ["length", "width"], 20)
    labels = np.random.default_rng(0).normal(size=(20, 2))
    names = [f"{i}.jpg" for i in range(20)]
    np.savez(folder / "predictions.npz", values=labels + 0.1, labels=labels, names=names)
    each = {name: {"r2": 0.9, "mae": 0.1, "rmse": 0.1} for name in ("length", "width")}
    train = {"count": 80} | {name: [0.0, 0.0] for name in ("mean", "std", "min", "max")}
    val = {"count": 20, "r2": 0.9, "each": each}
    changed(folder, "result.json", lambda r: r.update(quantities=True, val=val, train=train))
    return folder


def test_columns_that_no_run_has_are_left_out_of_a_comparison(tmp_path):
    folders = [run_of_quantities(tmp_path / "c" / "runs" / f"seed{seed}") for seed in (0, 1)]
    text = Page(make_comparison([tmp_path / "c"], tmp_path / "c.html")).text
    assert "R² 0.900" not in text and "0.900 0.900 to 0.900" in text
    assert "mean absolute error" not in text and "ifference to the first" not in text
    page = Page(make_report(folders[0]))
    assert "quantity split R²" in page.text and "length validation 0.900" in page.text
    other = run_of_quantities(tmp_path / "other")
    assert "Difference to the first: of the validation R² on" in Page(make_comparison([folders[0], other])).text


def test_the_page_of_a_sweep_names_its_data_and_leads_to_its_trials(tmp_path):
    (report := tmp_path / "trials" / "0" / "report.html").parent.mkdir(parents=True)
    report.write_text("")
    rows = [
        {"number": i, "values": {"lr": "0.1"}, "state": "complete", "accuracy": 0.9, "loss": 0.1,
         "folder": str(tmp_path / "trials" / str(i))}
        for i in range(2)
    ]  # fmt: skip
    (tmp_path / "sweep.html").write_text(sweep.page("/home/me/bees/", rows, rows[0], ["lr"], ["lr"], []))
    page = Page(tmp_path / "sweep.html")
    assert "2 trials on bees" in page.text and "/home" not in page.text and ("div", "tabindex", "0") in page.attributes
    links = [value for tag, key, value in page.attributes if (tag, key) == ("a", "href") and value[0] != "#"]
    assert links == ["trials/0/report.html"]


def test_the_command_draws_one_or_compares_several(tmp_path, capsys):
    from jft import cli

    for name, seed in (("x", 0), ("y", 0), ("y", 1)):
        make_run(tmp_path / "c" / name / f"seed{seed}", ["a", "b"], 20)
    one, other = (str(tmp_path / "c" / name / "seed0") for name in ("x", "y"))
    for words, written in [
        ([one], f"{one}/report.html"),
        ([one, other, "--out", str(tmp_path / "p.html")], tmp_path / "p.html"),
        ([str(tmp_path / "c")], tmp_path / "c" / "report.html"),
    ]:
        assert cli.main(["report", *words]) == 0
        assert capsys.readouterr().out.strip() == str(written) and "<h1>" in Path(written).read_text()
    for words, told in [
        ([one, other, "--explain"], "are of one run"),
        ([one, "--out", "x.html"], "of several runs"),
        ([one, "--explain", "--images", "0"], "at least 1"),
        ([one, other, "--out", str(tmp_path / "no" / "p.html")], "cannot be written"),
        ([str(tmp_path / "nothing")], "no run's folder"),
        ([one, "--explain"], "Pass --data"),
    ]:
        try:
            code = cli.main(["report", *words])
        except SystemExit as stop:  # the parser's own
            code = stop.code
        assert code == 2, words
        assert told in capsys.readouterr().err, words
    assert not list(tmp_path.rglob("*.part"))


def test_mean_interval_is_students():
    import scipy.stats

    values = [0.9, 0.92, 0.95, 0.91]
    wanted = scipy.stats.t.interval(0.95, 3, np.mean(values), scipy.stats.sem(values))
    assert mean_interval(values) == pytest.approx(wanted, abs=1e-4)


@pytest.mark.slow
def test_a_large_run_stays_small_and_quick(tmp_path):
    folder = make_run(tmp_path / "run", [f"species {i}" for i in range(200)], 10_000)
    begun = time.process_time()  # not by the clock, which tells of the machine's other work too
    path = make_report(folder)
    assert time.process_time() - begun < 60
    assert path.stat().st_size < 5e6
    assert "Most often confused" in Page(path).text

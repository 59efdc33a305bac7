"""What the pages of docs/ show works: every command parses, those that use a run are executed on one, Python runs."""

import io
import re
import shlex
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

import jft
from jft import cli, config

PAGES = sorted((Path(__file__).parent.parent / "docs").glob("*.md"))
READMES = [Path(__file__).parent.parent / name for name in ("README.md", "README.zh.md")]
RUN = "runs/bees-resnet18-head"
READS = ("evaluate", "predict", "export", "models", "report")  # what is executed as it stands


def blocks(languages, pages=PAGES):
    for page in pages:
        for language, block in re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text(encoding="utf-8"), re.S | re.M):
            if language in languages:
                yield page.stem, block


def commands(pages=PAGES):
    for page, block in blocks(("sh", ""), pages):
        for line in block.splitlines():
            words = re.split(r"\s{2,}#", line)[0]
            piped = words.startswith("find ")
            words = words.split(" | ")[-1]
            if words.startswith("jft "):
                yield page, piped, shlex.split(words)[1:]


@pytest.fixture(scope="module")
def place(folder, tmp_path_factory):
    """A folder as the pages speak of it: `bees/`, `photos/`, `list.csv`, a run, and a recipe."""
    root = tmp_path_factory.mktemp("docs")
    for name in ("bees", "more-bees"):
        (root / name).symlink_to(folder)
    (root / "configs").symlink_to(Path(__file__).parent.parent / "configs")
    (root / "photos").mkdir()
    picture = Image.fromarray(np.full((40, 40, 3), 90, np.uint8))
    picture.save(root / "photos" / "1.jpg")
    picture.save(root / "x.jpg")
    (root / "list.csv").write_text("path\nx.jpg\nphotos/1.jpg\n")
    rows = [f"bees/{file.parent.name}/{file.name},{file.parent.name}\n" for file in sorted(folder.glob("*/*.png"))]
    (root / "labels.csv").write_text("path,label\n" + "".join(rows), encoding="utf-8")
    with jax.numpy_dtype_promotion("standard"):
        jft.finetune(
            data=str(folder), model="tiny_resnet", weights="none", epochs=1, batch=8, display="quiet",
            preprocess={"crop_pct": 1.0}, workdir=str(root / RUN),
        )  # fmt: skip
    return root


def test_every_command_parses_and_its_options_are_of_the_right_kind():
    found = [*commands(), *commands(READMES)]
    assert len(found) > 25
    assert {page for page, *_ in found} >= {"start", "plans", "weights", "data", "use", "fork"}
    parser = cli.make_parser()
    for _, _, words in found:
        options = parser.parse_args(words)
        made = config.Config()
        for key, value in vars(options).items():
            if key.startswith("field:") and value is not None:
                made = config.override(made, key.removeprefix("field:"), [value] if isinstance(value, str) else value)
        config.check(made)


@pytest.mark.slow
@pytest.mark.usefixtures("optax_promotion")
def test_every_command_does_what_it_says(place, monkeypatch, capsys):
    """Those that use a run as they stand; of a run to be trained, its plan, on a tiny model."""
    monkeypatch.chdir(place)
    done = 0
    for page, piped, words in commands():
        remote = any(w.startswith("hf:") for w in words) or words[0] == "push"
        pretrained = any(w.endswith(".pth") for w in words)
        foreign = words[0] == "export" and "timm" in words  # of a tiny_resnet there is no timm model
        if remote or pretrained or foreign:
            continue
        if words[0] in READS:
            if piped:
                monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"photos/1.jpg\n")))
            code = cli.main(words)
        elif words[0] in ("finetune", "plan"):
            kept = [w for w in words[1:] if w not in ("--names", "--fast")]
            if "--weights" not in kept and not kept[0].endswith(".py"):
                kept = [*kept, "--model", "tiny_resnet", "--weights", "none", "--batch", "8"]
            code = cli.main(["plan", "--fast", *kept])
        else:
            continue
        assert code == 0, (page, words, capsys.readouterr().err)
        done += 1
    assert done >= 15
    assert (place / "preds.csv").exists() and (place / "preds.parquet").exists() and (place / "features.npz").exists()


def test_python_runs_or_compiles(place, monkeypatch):
    monkeypatch.chdir(place)
    monkeypatch.setattr(jft, "finetune", lambda **options: config.Config(**options) and Done(), raising=False)
    found = list(blocks(("python",)))
    assert len(found) >= 6
    for page, block in found:
        space: dict = {}
        exec(compile(block, f"docs/{page}.md", "exec"), space)
        if "config" in space:
            made = space["config"]()
            assert isinstance(made, jft.Config)
            config.check(made)


class Done:
    """A run that is there already."""

    def evaluate(self):
        return {}

    def predict(self, *images):
        return []

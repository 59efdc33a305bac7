"""What the pages of docs/ show works: every command parses, those that use a run are executed on one, Python runs.

And they hang together: links, the site's list of pages, the reference's names, recipes, tests that are named, and both
READMEs.
"""

import importlib
import io
import re
import shlex
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

import jft
from jft import cli, config, distil, hyper, losses, models, optim, penalties, weights
from jft.words import written

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
READMES = [ROOT / name for name in ("README.md", "README.zh.md")]
WRITTEN = [*PAGES, *READMES, ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md", ROOT / "benchmarks" / "README.md"]
RUN = "runs/bees-resnet18-head"
READS = ("evaluate", "predict", "export", "models", "report")  # what is executed as it stands
# Options of a run that its plan is made without.
NOT_PLANS = r"--(names|fast|overfit|dry-run|(predict|out) \S+)( |$)"


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
    (root / "configs").symlink_to(ROOT / "configs")
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
        pretrained = any(w.endswith((".pth", ".safetensors")) for w in words) and words[0] != "export"
        foreign = words[0] == "export" and "timm" in words  # of a tiny_resnet there is no timm model
        if remote or pretrained or foreign:
            continue
        if words[0] in READS:
            if piped:
                monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"photos/1.jpg\n")))
            code = cli.main(words)
        elif words[0] in ("finetune", "plan"):
            kept = re.sub(NOT_PLANS, "", " ".join(words[1:])).split()
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
    monkeypatch.setattr(models, "MODELS", dict(models.MODELS))
    monkeypatch.setattr(weights, "FORMATS", dict(weights.FORMATS))
    found = list(blocks(("python",)))
    assert len(found) >= 6
    for page, block in found:
        space: dict = {}
        exec(compile(block, f"docs/{page}.md", "exec"), space)
        if "config" in space:
            made = space["config"]()
            assert isinstance(made, jft.Config)
            config.check(made)


def test_a_backbone_and_its_format_are_entries_of_tables(place, tmp_path, monkeypatch):
    """The page's own: it trains, its names are written and read again, and a plan knows its parts."""
    monkeypatch.chdir(place)
    for table in (models.MODELS, weights.FORMATS):
        monkeypatch.setitem(table, "patches", None)  # taken out again afterwards
    (block,) = (block for page, block in blocks(("python",)) if page == "fork" and "make_patches" in block)
    (tmp_path / "own.py").write_text(block)
    with jax.numpy_dtype_promotion("standard"):
        assert (
            cli.main(["finetune", str(tmp_path / "own.py"), "--epochs", "1", "--workdir", str(tmp_path / "run")]) == 0
        )
    assert cli.main(["export", str(tmp_path / "run"), "--format", "patches"]) == 0
    made = jft.load(tmp_path / "run")
    file = tmp_path / "run" / "patches.safetensors"
    with weights.open_weights(file) as opened:
        assert "features.1.weight" in opened.names
    again = weights.load(made.model, file, format="patches")
    assert all(np.array_equal(again.params[name], made.params[name]) for name in made.params)


class Done:
    """A run that is there already."""

    def evaluate(self):
        return {}

    def predict(self, *images):
        return []


def text(page):
    return page.read_text(encoding="utf-8")


def anchors(page):
    """Of a page's headings, as GitHub and mkdocs make them."""
    plain = [re.sub(r"[`*]|\[\^\w+\]", "", h) for h in re.findall(r"^#+ (.+)$", text(page), re.M)]
    return {re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", h.lower()).strip()) for h in plain}


@pytest.mark.parametrize("page", WRITTEN, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_link_leads_somewhere(page):
    prose = re.sub(r"^```.*?^```$", "", text(page), flags=re.S | re.M)
    for link in re.findall(r"\]\(([^)\s]+)\)", prose):
        if re.match(r"https?:", link):
            continue
        where, _, anchor = link.partition("#")
        target = (page.parent / where).resolve() if where else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), f"{link}: {sorted(anchors(target))}"


def test_every_page_is_on_the_site():
    nav = text(ROOT / "mkdocs.yml").partition("\nnav:\n")[2]
    assert sorted(re.findall(r"- (?:\w+: )?(\S+\.md)$", nav, re.M)) == [str(p.relative_to(DOCS)) for p in PAGES]


def test_every_name_of_the_reference_is_there_and_told():
    named = re.findall(r"^::: (\S+)$", "\n".join(text(p) for p in PAGES), re.M)
    assert len(named) > 20
    for name in named:
        try:
            found = importlib.import_module(name)
        except ModuleNotFoundError:
            module, _, attribute = name.rpartition(".")
            found = getattr(importlib.import_module(module), attribute)
        assert found.__doc__, name


def test_the_reference_has_all_that_the_package_gives():
    """Under the name it is imported by: `jft.Config` is where the reader looks for it."""
    shown = re.findall(r"^      heading: (\S+)$", text(DOCS / "api" / "jft.md"), re.M)
    assert sorted(shown) == [f"jft.{name}" for name in jft.__all__]


def test_every_recipe_is_in_the_table_with_its_command_and_figures():
    rows = [row for row in text(DOCS / "recipes.md").splitlines() if row.startswith("| [")]
    for file in sorted((ROOT / "configs").glob("*.py")):
        header = text(file).split('"""')[1]
        command = re.search(r"^Command +(.+)$", header, re.M)[1]
        row = next(row for row in rows if f"(../configs/{file.name})" in row)
        assert f"| `{command}` |" in row, row
        assert set(re.findall(r"\d+\.\d+", row.replace(command, ""))) <= set(re.findall(r"\d+\.\d+", header)), row


def test_every_method_of_the_table_is_there():
    table = text(DOCS / "plans.md").partition("## Methods by name")[2].partition("\n## ")[0]
    asked = [shlex.split(words) for words in re.findall(r"`(--[^`]+)`", table)]
    parser = cli.make_parser([w for words in asked for w in words if w.startswith(cli.FREE)])
    for words in asked:
        made = config.Config()
        for key, value in vars(parser.parse_args(["finetune", *words])).items():
            if key.startswith("field:") and value is not None:
                made = config.override(made, key.removeprefix("field:"), [value] if isinstance(value, str) else value)
        config.check(made)
    kinds = (optim.OPTIMIZERS, optim.SCHEDULES, losses.LOSSES, penalties.PENALTIES, distil.OBJECTIVES, hyper.RULES)
    for name in (name for kind in kinds for name in kind if name not in ("cross-entropy", "l2")):
        assert f"{name}`" in table, name
    for module, name in re.findall(r"jft\.(\w+)[.:](\w+)", table):
        assert hasattr(importlib.import_module(f"jft.{module}"), name), name


def test_the_table_of_options_has_every_word_with_its_own():
    rows = re.findall(r"^\| `(\w+)` \| `([\w-]+)` \|(.*)\|$", text(DOCS / "plans.md"), re.M)
    told = {(field, word): re.findall(r"`([^`=]+=[^`]+)`", options) for field, word, options in rows}
    expected = {
        (field, word): [f"{o}={written(default)}" for o, (_, default) in known.options(word).items()]
        for field in ("loss", "penalty", "objective", "optimizer", "schedule")
        for known in [config.words_of(field)]
        for word in known
    }
    assert told == expected and list(told) == list(expected)


def test_every_test_and_script_that_a_page_names_exists():
    for page in [*PAGES, *READMES]:
        for file, name in re.findall(r"`tests/(\w+\.py)(?:::(\w+))?`", text(page)):
            assert (ROOT / "tests" / file).exists(), (page.name, file)
            assert not name or f"\ndef {name}(" in text(ROOT / "tests" / file), (page.name, file, name)
        for script in re.findall(r"python ((?:scripts|benchmarks)/\w+\.py)", text(page)):
            assert (ROOT / script).exists(), (page.name, script)


def test_the_readmes_are_the_same_in_both_languages():
    """Headings, tables, commands, code, links and names of options; the words between are for people to compare."""

    def outline(page):
        prose = re.sub(r"^```.*?^```$", "", text(page), flags=re.S | re.M)
        rows = re.findall(r"^\|.*\|$", prose, re.M)
        return {
            "headings": [len(h) for h in re.findall(r"^(#+) ", prose, re.M)],
            "rows": [row.count("|") for row in rows],
            "figures": [re.findall(r"\d[\d.]*", row) for row in rows],
            "commands": [" ".join(words) for _, _, words in commands([page])],
            "code": [block for _, block in blocks(("python",), [page])],
            "links": sorted(set(re.findall(r"\]\(([^)]+)\)", prose)) - {p.name for p in READMES}),
            "named": sorted({" ".join(code.split()) for code in re.findall(r"`([^`]+)`", prose)}),
        }

    english, chinese = (outline(page) for page in READMES)
    for what, found in english.items():
        assert chinese[what] == found, what

"""The notebooks of colab/ are what their sources say, and run from top to bottom, with no network or hidden state."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = sorted((ROOT / "colab").glob("*.py"))
convert = runpy.run_path(str(ROOT / "scripts" / "notebooks.py"))["notebook"]


def test_there_are_four():
    assert [source.stem[0] for source in SOURCES] == ["1", "2", "3", "4"]


@pytest.mark.parametrize("source", SOURCES, ids=lambda p: p.stem)
def test_a_notebook_is_what_its_source_says(source):
    """After a change: `python scripts/notebooks.py`."""
    committed = source.with_suffix(".ipynb").read_text(encoding="utf-8")
    assert committed == convert(source.read_text(encoding="utf-8"))
    cells = json.loads(committed)["cells"]
    text = "\n".join("".join(cell["source"]) for cell in cells)
    assert f"colab/{source.stem}.ipynb" in text and "\n!pip install" in text
    assert not any(cell.get("outputs") for cell in cells)
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    for cell in code:
        compile(cell.replace("!pip", "# !pip"), source.name, "exec")


@pytest.mark.slow
@pytest.mark.parametrize("source", SOURCES, ids=lambda p: p.stem)
def test_a_notebook_runs_from_top_to_bottom(source, tmp_path):
    env = os.environ | {
        "JFT_TINY": "1", "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", "MPLBACKEND": "agg",
        "HF_HUB_OFFLINE": "1", "JFT_CACHE": os.environ["JFT_CACHE"],
    }  # fmt: skip
    done = subprocess.run([sys.executable, str(source)], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]

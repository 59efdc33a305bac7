"""The notebooks of colab/ from their sources, the .py beside them: `python scripts/notebooks.py`.

A source is a Python file whose cells begin with `# %%`, text with `# %% [markdown]`; a line `# !…` is a shell command
in the notebook and a comment where the source is run as a script.
"""

import json
import re
from pathlib import Path

FOLDER = Path(__file__).parent.parent / "colab"
REPOSITORY = "ORG/jft"  # on GitHub; the badges and pip lines name it
KERNEL = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}


def notebook(source: str) -> str:
    """The .ipynb, JSON, of a source; it has no outputs."""
    cells = []
    for number, part in enumerate(re.split(r"^# %%", source.replace("ORG/jft", REPOSITORY), flags=re.M)[1:]):
        kind, _, body = part.partition("\n")
        markdown = "[markdown]" in kind
        marker = r"^# ?(?=!)" if not markdown else r"^# ?"
        text = re.sub(marker, "", body.strip("\n"), flags=re.M)
        more = {} if markdown else {"execution_count": None, "outputs": []}
        lines = text.splitlines(keepends=True)
        cell = {"cell_type": "markdown" if markdown else "code", "id": f"cell{number}", "metadata": {}, "source": lines}
        cells.append(cell | more)
    about = {"cells": cells, "metadata": KERNEL, "nbformat": 4, "nbformat_minor": 5}
    return json.dumps(about, indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    for file in sorted(FOLDER.glob("*.py")):
        file.with_suffix(".ipynb").write_text(notebook(file.read_text(encoding="utf-8")), encoding="utf-8")
        print(file.with_suffix(".ipynb"))

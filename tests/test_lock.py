"""The lock file holds every requirement of the project, at versions that the project accepts, each with its hashes."""

import re
import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
ENTRY = re.compile(r"^([A-Za-z0-9._-]+)==(\S+)(?: ; (.+?))? \\$", re.MULTILINE)


def locked() -> dict[str, list[str]]:
    """Versions by name; several where they differ by Python."""
    versions: dict[str, list[str]] = {}
    for name, version, _ in ENTRY.findall((ROOT / "requirements.lock").read_text()):
        versions.setdefault(canonicalize_name(name), []).append(version)
    return versions


def wanted() -> list[Requirement]:
    about = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = about["optional-dependencies"]
    listed, waiting = list(about["dependencies"]), list(extras["test"])
    while waiting:
        requirement = Requirement(waiting.pop())
        if requirement.name == "jft":
            waiting += [r for extra in requirement.extras for r in extras[extra]]
        else:
            listed.append(str(requirement))
    return [Requirement(r) for r in listed]


def test_the_lock_holds_what_the_project_requires():
    versions = locked()
    for requirement in wanted():
        found = versions.get(canonicalize_name(requirement.name), [])
        assert found, f"{requirement} is not in requirements.lock: make it anew, see CONTRIBUTING.md"
        assert all(requirement.specifier.contains(v, prereleases=True) for v in found), (str(requirement), found)


def test_every_entry_has_hashes_and_none_is_torch_or_tensorflow():
    text = (ROOT / "requirements.lock").read_text()
    entries = re.split(r"^(?=[a-z])", text, flags=re.MULTILINE)[1:]
    assert len(entries) > 50 and all("--hash=sha256:" in entry for entry in entries)
    assert not {"torch", "tensorflow", "torchvision", "timm"} & locked().keys()

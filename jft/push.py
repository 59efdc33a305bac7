"""Sharing a model: its bundle, and nothing but its bundle, to a repository of the Hugging Face hub."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jft import bundle
from jft.errors import UserError
from jft.report.live import size

FILES = ("README.md", "config.json", "model.safetensors")  # what `bundle.save` writes, in the order they are told


def push(
    where: str | Path,
    repo: str,
    *,
    private: bool = False,
    confirm: Callable[[str], bool] = lambda told: True,
) -> str:
    """Upload a run's model, in one commit, to ORG/REPO, which is made where it is not there; returns its address.

    `confirm` is asked with the list of what would be uploaded, before anything is sent. Raises UserError where there is
    no model or it is damaged, where there is no token or network, or where `private` is asked of a public repository.

    >>> push("runs/bees-resnet50-head", "me/bees", private=True)
    'https://huggingface.co/me/bees'
    """
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo):
        raise UserError(f"{repo!r} is no repository's name; ORG/REPO is expected, such as me/bees.")
    where = Path(where).expanduser()
    if not where.is_dir():
        raise UserError(f"{where} is no folder. What is pushed is the model in a run's folder, or in a bundle's.")
    folder = where / "model" if (where / "model").is_dir() else where
    bundle.load(folder)  # what is damaged is told here, not by those who download it
    files = [folder / name for name in FILES if (folder / name).is_file()]
    left = sorted(p.name for p in folder.iterdir() if p.name not in FILES)
    lines = [f"  {file.name:20} {size(file.stat().st_size)}" for file in files]
    lines += [f"  not uploaded: {', '.join(left)}"] if left else []
    kind = "a private" if private else "a public"
    if not confirm(f"To {kind} repository {repo} on Hugging Face, from {folder}:\n" + "\n".join(lines)):
        raise UserError("Nothing was uploaded.")

    # Imported here because it takes as long to import as a small model takes to load.
    import huggingface_hub as hub
    import huggingface_hub.errors

    api = hub.HfApi()
    try:
        api.whoami()
        address = api.create_repo(repo, private=private, repo_type="model", exist_ok=True)
        if private and not api.model_info(repo).private:
            raise UserError(
                f"{repo} is there already and public. Make it private on its settings page, or take another."
            )
        operations = [hub.CommitOperationAdd(file.name, str(file)) for file in files]
        api.create_commit(repo, operations, commit_message="Model fine-tuned with jft", repo_type="model")
    except UserError:
        raise
    except Exception as error:  # the client's own errors and those of two generations of its HTTP library
        raise UserError(_failure(hub, repo, error)) from error
    return str(address)


def _failure(hub: Any, repo: str, error: Exception) -> str:
    login = "`hf auth login`, or HF_TOKEN, with a token that may write (https://huggingface.co/settings/tokens)"
    status = getattr(getattr(error, "response", None), "status_code", None)
    reason = next(iter(str(error).strip().splitlines()), "")[:200] or type(error).__name__
    if isinstance(error, hub.errors.LocalTokenNotFoundError):
        return f"To upload, Hugging Face wants to know who you are: {login}."
    if status == 401:
        return f"Hugging Face does not know this token: {login}."
    if status in (403, 404):
        return f"This token may not write to {repo} ({reason}). Take a repository of your own, or {login}."
    return f"Nothing was uploaded to {repo}: Hugging Face cannot be reached, or refuses ({reason})."

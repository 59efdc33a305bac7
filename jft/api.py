"""The one call behind the command line, notebooks and scripts."""

from collections.abc import Mapping
from dataclasses import fields
from os import PathLike, fspath
from typing import Any

from jft.compare import Comparison, compare
from jft.config import Config, check, load_config
from jft.errors import UserError, near
from jft.run import Result
from jft.train import train


def finetune(
    config: Config | Mapping[str, Config] | str | PathLike[str] | None = None, **options: Any
) -> Result | Comparison:
    """Fine-tune a pretrained model on labelled images.

    Takes a Config, named Configs to compare, the path of a config file, or nothing, and any field of `Config` by name.
    Returns the finished run; a Comparison for several configs or `seeds` above 1. Raises UserError.

    >>> run = jft.finetune(data="bees/", model="resnet50", plan="gradual")
    >>> run.result["val"]["accuracy"]
    """
    known = [f.name for f in fields(Config)]
    for name in options:
        if name not in known:
            raise UserError(f"A config has no field {name!r}.{near(name, known)} Its fields: {', '.join(known)}.")
    made = load_config(fspath(config)) if isinstance(config, str | PathLike) else Config() if config is None else config
    configs = {"": made} if isinstance(made, Config) else dict(made)
    configs = {name: c.replace(**options) for name, c in configs.items()}
    for made in configs.values():
        check(made)
    if len(configs) == 1 and next(iter(configs.values())).seeds == 1:
        return train(next(iter(configs.values())))
    return compare(configs)

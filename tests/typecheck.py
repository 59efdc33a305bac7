"""The checker that the import hook puts on every function: beartype, with an int where a float is expected allowed."""

from beartype import BeartypeConf, beartype

check = beartype(conf=BeartypeConf(is_pep484_tower=True))

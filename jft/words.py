"""Methods as words of a config: the name of a function, or that with options, `focal:gamma=3`."""

import inspect
import typing
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

from jft.code import load_object, names_object
from jft.errors import UserError, near


@dataclass(frozen=True, eq=False)
class Words(Mapping[str, Callable[..., Any]]):
    """Functions of one kind by name, and which of their keywords a config may set in text.

    `bounds` holds, by an option's name, its least and greatest value, or `str` where it is a text; what has neither,
    and is no bool nor a choice, is no option. `elsewhere` holds names that other tools use.
    """

    kind: str
    functions: Mapping[str, Callable[..., Any]]
    bounds: Mapping[str, Any] = field(default_factory=dict)
    elsewhere: Mapping[str, str] = field(default_factory=dict)
    own: str = ""  # what a function of the user's takes and gives, where one may stand for a word

    def __getitem__(self, name: str) -> Callable[..., Any]:
        return self.functions[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.functions)

    def __len__(self) -> int:
        return len(self.functions)

    def find(self, given: str | Callable[..., Any]) -> Callable[..., Any]:
        """The function of a word, with its options, or at `module:name`; a function stays. UserError for all else."""
        if not isinstance(given, str):
            return given
        if name_of(given) not in self and names_object(given):
            try:
                return load_object(given)
            except UserError as error:
                hint = near(name_of(given), self)
                raise UserError(f"{str(error).rstrip('.')}.{hint}" if hint else str(error)) from None
        name, options = self.parse(given)
        return partial(self[name], **options) if options else self[name]

    def parse(self, text: str) -> tuple[str, dict[str, Any]]:
        """The name in a word, and the options given with it: `name`, or `name:value:option=value`.

        A value without its option's name is the next one's. A range is two numbers, `0.3..1`, or its lower end. Raises
        UserError for names and values that are none.
        """
        name, *words = text.split(":")
        if name not in self:
            meant = f" Did you mean {self.elsewhere[name]}?" if name in self.elsewhere else near(name, self)
            own = f"; or module:name, {self.own}" if self.own else ""
            raise UserError(f"There is no {self.kind} {name!r}.{meant} Known: {', '.join(self)}{own}.")
        known = self.options(name)
        given: dict[str, Any] = {}
        for place, word in enumerate(words):
            option, equals, value = word.partition("=")
            if not equals:
                option, value = (list(known)[place] if place < len(known) else ""), word
            if option not in known or option in given:
                wrong = f"was given {option} twice" if option in given else f"has no option for {word!r}"
                hint = "" if option in given else near(option, known)
                shown = ", ".join(f"{o}={written(default)}" for o, (_, default) in known.items()) or "none"
                raise UserError(f"The {self.kind} {text!r} {wrong}.{hint} Its options: {shown}.")
            given[option] = self._value(text, option, value, *known[option])
        return name, given

    def options(self, name: str) -> dict[str, tuple[Any, Any]]:
        """The options of a function, in the order in which values without a name are taken: type and default."""
        hints = typing.get_type_hints(self[name])
        return {
            o: (hints[o], p.default)
            for o, p in inspect.signature(self[name]).parameters.items()
            if p.default is not p.empty
            and (o in self.bounds or hints[o] is bool or typing.get_origin(hints[o]) is Literal)
        }

    def _value(self, text: str, option: str, word: str, kind: Any, default: Any) -> Any:
        truths = {"yes": True, "true": True, "1": True, "no": False, "false": False, "0": False}
        choices = typing.get_args(kind) if typing.get_origin(kind) is Literal else ("yes", "no") if kind is bool else ()
        if choices:
            if word not in (truths if kind is bool else choices):
                raise UserError(
                    f"The {self.kind} {text!r}: {option} is {word!r}; it is one of {', '.join(choices)}."
                    f"{near(word, choices)}"
                )
            return truths[word] if kind is bool else word
        if self.bounds[option] is str:
            return word
        if word == "none" and type(None) in typing.get_args(kind):
            return None
        least, greatest = self.bounds[option]
        ranged, whole = isinstance(default, tuple), kind is int
        try:
            numbers = [int(w) if whole else float(w) for w in (word.split("..") if ranged else [word])]
            good = len(numbers) <= 2 and all(least <= n <= greatest for n in numbers) and numbers == sorted(numbers)
            if good and ranged:
                low, high = numbers[0], numbers[1] if len(numbers) == 2 else default[1]
                if low <= high:
                    return (low, high)
            elif good:
                return numbers[0]
        except ValueError:
            pass
        expected = "a whole number" if whole else "a range LOW..HIGH, or LOW," if ranged else "a number"
        raise UserError(
            f"The {self.kind} {text!r}: {option} is {word!r}; it is {expected} from {least:g} to {greatest:g}."
        )


def name_of(given: Any) -> Any:
    """A word without its options; what is none stays as it is."""
    return given.split(":")[0] if isinstance(given, str) else given


def written(value: Any) -> str:
    if isinstance(value, tuple):
        return "..".join(f"{v:.4g}" for v in value)
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.4g}" if isinstance(value, float) else str(value).lower()

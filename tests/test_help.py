"""The help of every command is enough: each option has a sentence, its default and its unit, each command examples."""

import argparse
import dataclasses
import re

import pytest

from jft import cli
from jft.config import Config
from jft.plan import Lora

PARSER = cli.make_parser()
COMMANDS = next(a for a in PARSER._actions if isinstance(a, argparse._SubParsersAction)).choices
# What a number counts or measures.
UNITS = re.compile(
    r"images|passes|epochs|seconds|pixels|share|rate|norm|steps|threads|factor|decay|radius|number|devices|pieces|views|"
    r"validations|classes|trials|probability|seeds|λ|divide"
)
NUMBERS = {
    f.name
    for f in dataclasses.fields(Config)
    if re.search(r"\b(int|float)\b", str(f.type)) and "dict" not in str(f.type)
}


def options():
    for name, parser in COMMANDS.items():
        for action in parser._actions:
            if action.help != argparse.SUPPRESS and action.dest != "help":
                yield pytest.param(
                    action, id=f"{name} {action.option_strings[-1] if action.option_strings else action.dest}"
                )


@pytest.mark.parametrize("action", list(options()))
def test_an_option_has_a_sentence_a_default_and_a_unit(action):
    text = action.help or ""
    assert len(re.findall(r"\w+", text)) >= 3, text
    if action.option_strings and not action.required:
        assert "default" in text, text
    field = action.dest.removeprefix("field:")
    if action.type in (int, float) or (action.dest.startswith("field:") and field in NUMBERS):
        assert UNITS.search(text), f"what does it count? {text}"


@pytest.mark.parametrize("name", list(COMMANDS))
def test_examples_at_the_end_are_commands_that_parse(name):
    shown = COMMANDS[name].format_help()
    examples = shown.split("examples:")[1].strip().splitlines()
    assert examples
    for line in examples:
        words = re.split(r"\s{2,}", line.strip())[0]
        words = words.split("| ")[-1]
        assert words.startswith("jft "), line
        argv = cli_words(words)
        assert argv[0] in COMMANDS
        PARSER.parse_args(argv)


def test_fields_of_a_field_are_named():
    shown = {a.option_strings[0]: a.help for a in COMMANDS["finetune"]._actions if a.option_strings}
    for field in dataclasses.fields(Lora):
        assert field.name in shown["--lora.FIELD"]
    assert "deep_prompts" in shown["--model_options.FIELD"]


def cli_words(line):
    import shlex

    return shlex.split(line)[1:]


def test_the_examples_of_the_whole_parse_too():
    for line in PARSER.format_help().split("examples:")[1].strip().splitlines():
        PARSER.parse_args(cli_words(re.split(r"\s{2,}", line.strip())[0]))

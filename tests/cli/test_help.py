"""The help of every verb and of every action: a stray % in an option's text ends argparse with a traceback."""

from __future__ import annotations

import argparse
from collections.abc import Iterator

from shoal.commands.parser import build_parser


def below(parser: argparse.ArgumentParser) -> Iterator[tuple[str, argparse.ArgumentParser]]:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            yield from action.choices.items()


def test_every_verb_and_action_has_help() -> None:
    verbs = dict(below(build_parser(None)))
    assert len(verbs) > 25
    for verb in verbs:
        parser = dict(below(build_parser(verb)))[verb]
        assert f"shoal {verb}" in parser.format_help()
        for action in dict(below(parser)):
            inner = dict(below(dict(below(build_parser(verb, action)))[verb]))[action]
            assert f"shoal {verb} {action}" in inner.format_help()

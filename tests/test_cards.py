"""The command of every experiment card can be typed as it stands: its program exists and takes its arguments."""

from __future__ import annotations

import argparse
import importlib
import inspect
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from dist_rec import cli
from launch import components

ROOT = Path(__file__).parents[1]
CARDS = [p for p in sorted((ROOT / "configs").rglob("*.yaml")) if p.parent.name != "schemas"]


class _Parsed(Exception):
    """The way out of a program that has understood its arguments."""


def _parse(module: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets a program parse its arguments, and goes no further."""
    parse = argparse.ArgumentParser.parse_args

    def parse_args(self: argparse.ArgumentParser, *args: Any) -> None:
        parse(self, *args)
        raise _Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
    with pytest.raises(_Parsed):
        importlib.import_module(module).main(arguments)


@pytest.mark.parametrize("card", [p for p in CARDS if p.parent.name == "smoke"], ids=lambda p: p.stem)
def test_a_smoke_card_says_what_it_gives_and_when_that_was_seen(card: Path) -> None:
    text = card.read_text()
    assert re.search(r"^# Expected +\S", text, re.MULTILINE)
    assert re.search(r"^# Verified +\d{4}-\d\d-\d\d$", text, re.MULTILINE)


@pytest.mark.parametrize("card", CARDS, ids=lambda p: str(p.relative_to(ROOT / "configs")))
def test_its_command_exists_and_parses(card: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = re.search(r"^# Command +(.+)$", card.read_text(), re.MULTILINE)
    assert found, "a card says how it is run"
    program, *arguments = shlex.split(found[1])
    own = str(card.relative_to(ROOT))
    if program == ".venv/bin/python":
        module = arguments[1] if arguments[0] == "-m" else arguments[0].removesuffix(".py").replace("/", ".")
        _parse(module, arguments[1 + (arguments[0] == "-m") :], monkeypatch)
    elif program == "torchx":
        verb = arguments[1].removeprefix("launch/components.py:")
        options = dict(zip(arguments[2::2], arguments[3::2], strict=True))
        assert {name.removeprefix("--") for name in options} <= inspect.signature(
            vars(components)[verb]
        ).parameters.keys()
        assert (arguments[0], options["--config"]) == ("run", own)
    else:
        assert program == "dist-rec" and arguments[0] in cli.VERBS and arguments[1] == own

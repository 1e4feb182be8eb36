"""Arguments: words that were typed become values of settings, and settings become a help text."""

import argparse
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NoReturn, get_args, get_origin

from memlayers.checks import Setting, in_words, instead
from memlayers.cli.options_file import read_value


class Parser(argparse.ArgumentParser):
    """The arguments of one command: settings by ``--name VALUE``, flags without a value, one setting by its place.

    A setting whose type is a tuple takes several words, or one list in brackets, and is given once. Options are not
    abbreviated, and a hyphen may stand for an underscore. `sections` are the groups of ``section.name``, with a line
    about each.
    """

    def __init__(
        self,
        command: str,
        summary: str,
        settings: Mapping[str, Setting],
        *,
        flags: Mapping[str, str],
        placed: str | None = None,
        sections: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(
            prog=f"memlayers {command}",
            usage=" ".join([f"memlayers {command}", *([placed.upper()] if placed else []), "[--OPTION VALUE ...]"]),
            description=summary,
            add_help=False,
            allow_abbrev=False,
            argument_default=argparse.SUPPRESS,
        )
        self._settings = {name: found for name, found in settings.items() if name != placed}
        self._placed = {name: found for name, found in settings.items() if name == placed}
        self._known = {f"--{name}" for name in (*self._settings, *flags, "help")}
        for name, found in self._placed.items():
            self.add_argument(name, nargs="?", metavar=name.upper(), help=_help(found))
        self.add_argument("-h", "--help", action="store_true", help="print this and end")
        groups = {section: self.add_argument_group(section, text) for section, text in (sections or {}).items()}
        for name, found in self._settings.items():
            section, _, last = name.rpartition(".")
            many: dict[str, Any] = {"nargs": "+", "action": "extend" if name == "config" else "store"}
            groups.get(section, self).add_argument(
                f"--{name}", metavar=last.upper(), help=_help(found), **(many if _is_list(found.kind) else {})
            )
        for name, text in flags.items():
            self.add_argument(f"--{name}", action="store_true", help=text)

    def values(self, words: Sequence[str]) -> dict[str, Any]:
        """What was typed, by name. Raises `ValueError` for what the command does not take."""
        words = [self._with_underscores(word) for word in words]
        self._refuse_second_lists(words)
        typed, rest = self.parse_known_args(words)
        if option := next((word.partition("=")[0] for word in rest if word.startswith("--")), None):
            advice = instead(option[2:], [name[2:] for name in sorted(self._known)], spelled="--{}")
            advice = advice if advice.startswith("did you mean") else f"see {self.prog} --help"
            raise ValueError(f"unknown option {option}; {advice}")
        if rest:
            raise ValueError(f"unrecognized arguments: {' '.join(rest)}")
        kinds = {name: found.kind for name, found in {**self._settings, **self._placed}.items()}
        return {name: value_of(value, kinds[name]) if name in kinds else value for name, value in vars(typed).items()}

    def error(self, message: str) -> NoReturn:
        """What argparse refuses is an error like all others."""
        if found := re.match(r"argument (--\S+): expected ", message):
            message += f"; a value that begins with a hyphen is written {found[1]}=VALUE"
        raise ValueError(message)

    def _refuse_second_lists(self, words: Sequence[str]) -> None:
        """Of a list that is given twice the last would count, and what the first one names be left out unsaid."""
        options = [word.partition("=")[0] for word in words]
        for name, found in self._settings.items():
            if name != "config" and _is_list(found.kind) and options.count(f"--{name}") > 1:
                raise ValueError(f"--{name} must be given once, with all its values after it")

    def _with_underscores(self, word: str) -> str:
        name, equals, value = word.partition("=")
        name = name[:2] + name[2:].replace("-", "_")
        return name + equals + value if name in self._known else word


def value_of(typed: Any, kind: Any) -> Any:
    """A word, or words for a list, as a value; what is no value of that type stays as it is, for a check to refuse."""
    if isinstance(typed, list):
        if len(typed) == 1 and typed[0].startswith("["):
            return read_value(typed[0])
        return [value_of(word, get_args(kind)[0]) for word in typed]
    if typed in ("None", "null") and type(None) in get_args(kind):
        return None
    if str in (kind, *get_args(kind)) or get_origin(kind) is Literal:
        return typed
    return read_value(typed)


def _is_list(kind: Any) -> bool:
    return get_origin(kind) is tuple


def _help(found: Setting) -> str:
    text = found.help
    if found.has_default and (found.default is not None or type(None) in get_args(found.kind)):
        default = found.default if isinstance(found.default, str) else json.dumps(found.default)
        text += f" ({in_words(found.kind)}; default: {default})"
    return text.replace("%", "%%")

"""The command line on answers in which every string is hostile, as a program for a terminal.

A guest, or a row that somebody wrote into the catalog, can put text into names, causes and
details. Here every text of every answer and of every error is such a text; each run is followed
by a line of its own with what was run.
"""

from __future__ import annotations

import itertools
import string
import sys
import types
import typing
from collections.abc import Callable, Iterator
from typing import Any

import msgspec

from diapause import errors
from diapause.cli import main as program
from diapause.cli.context import Context
from diapause.daemon.client import Client
from diapause.errors import DiapauseError

HOSTILE = (
    "h\x1b]52;c;b3duZWQ=\x07"  # the clipboard
    "\x1b]0;owned\x07"  # the title
    "\x1b[2J\x1b[31m"  # the screen and colours
    "\x9b31m\x9d0;owned\x9c"  # the same in C1
    "\u202e\u2066\u200e"  # direction overrides
    "\x00\x08\x7f\r\n\t\u2028[bold]x[/bold]"
)
VERBS = [
    "ps", "ps -a", "ps -q", "inspect x", "snapshot ls", "snapshot tree", "snapshot inspect x",
    "snapshot diff x y", "snapshot verify x", "snapshot rm x", "snapshot save x", "events",
    "logs x", "image ls", "image inspect x", "image rm x", "image build tiny", "df", "gc", "check",
    "image import own --kernel k --rootfs r",
    "doctor", "bench", "run", "fork x", "pause x", "resume x", "freeze x", "thaw x", "restore x y",
    "rm x",
]  # fmt: skip


class Builder:
    """Values of any type of an answer; strings are hostile and each is another one."""

    def __init__(self, full: bool) -> None:
        self._full = full  # optional fields are given, flags are set
        self._numbers = itertools.count()

    def build(self, kind: Any) -> Any:
        origin, arguments = typing.get_origin(kind), typing.get_args(kind)
        if kind is str or kind is Any:
            return f"{HOSTILE}{next(self._numbers)}"
        if kind is bool:
            return self._full
        if kind in (int, float):
            return kind(1)
        if origin is typing.Literal:
            return arguments[0]
        if origin is typing.Annotated:
            return self.build(arguments[0])
        if origin in (typing.Union, types.UnionType):
            given = [one for one in arguments if one is not types.NoneType]
            return self.build(given[0]) if self._full or len(given) == len(arguments) else None
        if origin is list:
            return [self.build(arguments[0]) for _ in range(2)]
        if origin is tuple:
            return tuple(self.build(one) for one in arguments if one is not ...)
        if origin is dict:
            return {self.build(arguments[0]): self.build(arguments[1])}
        if isinstance(kind, type) and issubclass(kind, msgspec.Struct):
            return kind(**{n: self.build(t) for n, t in typing.get_type_hints(kind).items()})
        raise TypeError(f"no value of {kind}")


class HostileClient:
    """Answers every question with hostile text."""

    def __init__(self, builder: Builder) -> None:
        self._builder = builder

    def logs(self, *_: object, **__: object) -> Iterator[bytes]:
        return iter([HOSTILE.encode(), b"\xc2", b"\x9b31m\xff\n"])

    def __getattr__(self, name: str) -> Callable[..., Any]:
        kind = typing.get_type_hints(getattr(Client, name))["return"]
        several = getattr(typing.get_origin(kind), "__name__", "") == "Iterator"

        def answer(*_: object, **__: object) -> Any:
            if several:
                return iter([self._builder.build(typing.get_args(kind)[0])])
            return self._builder.build(kind)

        return answer


def every_error() -> list[DiapauseError]:
    """One of each class, with hostile text in each place of its message and of its advice."""
    classes = [
        one
        for one in vars(errors).values()
        if isinstance(one, type) and issubclass(one, DiapauseError) and one is not DiapauseError
    ]
    return [one(**_fields(one)) for one in classes]


def _fields(kind: type[DiapauseError]) -> dict[str, Any]:
    text = f"{(kind.__doc__ or '').partition(chr(10) * 2)[0]} {kind.hint}"
    places = string.Formatter().parse(text)
    return {name: 1.0 if form else HOSTILE for _, name, form, _ in places if name}


def main() -> None:
    """Run everything once."""
    for full in (True, False):
        builder = Builder(full)
        Context.client = _answering(builder)  # type: ignore
        for verb in VERBS:
            _run(verb, *verb.split())
    for words in (
        [HOSTILE],
        ["ps", HOSTILE],
        ["logs", "--tail", HOSTILE, "x"],
        ["run", "--" + HOSTILE],
        ["exec", "-e", HOSTILE.replace("=", ""), "x", "--", "y"],
    ):
        _run("usage", *words)
    for error in every_error():
        Context.client = _raiser(error)  # type: ignore
        _run(error.code, "ps")


def _answering(builder: Builder) -> Callable[[Context], HostileClient]:
    return lambda _context: HostileClient(builder)


def _raiser(error: DiapauseError) -> Callable[[Context], None]:
    def client(_context: Context) -> None:
        raise error

    return client


def _run(what: str, *words: str) -> None:
    code = program.main(list(words))
    sys.stdout.flush()
    sys.stderr.flush()
    print(f"== {what} {code}", flush=True)


if __name__ == "__main__":
    main()

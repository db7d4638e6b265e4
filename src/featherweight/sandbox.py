"""The process in which chat templates run: a program of its own, which imports nothing but Python and Jinja.

    python -P sandbox.py SECONDS CHARACTERS BYTES       started by `templates`

A chat template is a program that comes with a model. Jinja's sandbox keeps it from files and attributes, but not from looping for ever
or from one call that asks for gigabytes. So here time is limited by a thread that needs no interpreter lock (a single
call that never returns is ended too), memory by the operating system where it can, and the text while it is written. What breaks a
limit ends this process, or is answered as an error; either way the caller lives.

A line of JSON in — a template, its variables, messages, and which beginnings of them to write — is a line of JSON out. The end of the
input is the end of the process, so it never outlives its caller.
"""

from __future__ import annotations

import datetime
import faulthandler
import json
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox


class Generation(jinja2.ext.Extension):
    """`{% generation %}…{% endgeneration %}` marks what the assistant writes; it is written like everything else."""

    tags = {"generation"}  # noqa: RUF012 (as Jinja declares it)

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        """The block as a call that gives back what is in it, in a scope of its own, as transformers parses it."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_same"), [], [], body).set_lineno(line)

    def _same(self, caller: Callable[[], str]) -> str:
        return caller()


class Words:
    """`dict(…)` in a template, without the class behind it."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        """As `dict`."""
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        """As `dict.fromkeys`."""
        return dict.fromkeys(*args)


class Namespace(jinja2.utils.Namespace):
    """`namespace(…)` in a template, without attributes that begin with an underscore."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # no `self`, so that `namespace(self=…)` works
        self, given = args[0], dict(*args[1:], **kwargs)
        for name in given:
            Namespace._check(name)
        jinja2.utils.Namespace.__init__(self, given)

    def __setitem__(self, name: str, value: Any) -> None:
        Namespace._check(name)
        super().__setitem__(name, value)

    @staticmethod
    def _check(name: Any) -> None:
        if isinstance(name, str) and name.startswith("_"):
            raise jinja2.exceptions.SecurityError(f"a namespace cannot hold {name!r}: it begins with an underscore")


def environment() -> jinja2.Environment:
    """What templates are written for: transformers' environment, with all that it offers and nothing else."""

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def strftime_now(format: str) -> str:
        return datetime.datetime.now().strftime(format)

    def tojson(
        x: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
    ) -> str:
        return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    made = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    made.filters["tojson"] = tojson
    made.globals |= {
        "raise_exception": raise_exception, "strftime_now": strftime_now, "dict": Words(), "namespace": Namespace,
    }  # fmt: skip
    return made


@lru_cache(maxsize=4)
def _compiled(template: str) -> jinja2.Template:
    return environment().from_string(template)


def written(asked: dict[str, Any], begin: Callable[[], None], characters: int) -> list[str]:
    """The texts that were asked for: `(so many messages, whether the assistant's turn is opened)` each.

    `begin` is called before each. A text may be ten times as long as its messages, and so many characters longer.
    """
    begin()
    template, texts = _compiled(asked["template"]), []
    most = characters + 10 * sum(len(message["content"]) for message in asked["messages"])
    for count, opened in asked["wanted"]:
        begin()
        variables = {
            "tools": None, "documents": None, **asked["variables"],
            "messages": asked["messages"][:count], "add_generation_prompt": opened,
        }  # fmt: skip
        parts, room = [], most
        for part in template.generate(variables):
            room -= len(part)
            if room < 0:
                raise jinja2.TemplateError(f"it writes more than {most:,} characters")
            parts.append(part)
        texts.append("".join(parts))
    return texts


def _limit_resources(most_bytes: int) -> None:
    """So much address space, no file, no core dump; what this system cannot limit stays as it is."""
    try:
        import resource
    except ImportError:
        return
    with suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_AS, (most_bytes, most_bytes))
    for kind in (resource.RLIMIT_FSIZE, resource.RLIMIT_CORE):
        with suppress(OSError, ValueError):
            resource.setrlimit(kind, (0, 0))


def main(seconds: float, characters: int, most_bytes: int) -> None:
    """Answer line by line until the input ends."""
    with Path(os.devnull).open("w") as nowhere:

        def begin() -> None:
            faulthandler.dump_traceback_later(seconds, exit=True, file=nowhere)

        _limit_resources(most_bytes)
        for line in sys.stdin.buffer:
            answer: dict[str, Any]
            try:
                answer = {"texts": written(json.loads(line), begin, characters)}
            except MemoryError:
                answer = {"error": "it needs too much memory"}
            except RecursionError:
                answer = {"error": "it calls itself without end"}
            except Exception as e:  # whatever a template can raise is the template's fault
                answer = {"error": (str(e).strip() or type(e).__name__)[:500]}
            out = json.dumps(answer).encode() + b"\n"
            faulthandler.cancel_dump_traceback_later()
            sys.stdout.buffer.write(out)
            sys.stdout.buffer.flush()


if __name__ == "__main__":
    main(float(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))

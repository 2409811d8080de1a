"""Renders a chat template, in a process of its own: `python -c "from model.render import main; main()"`.

A template is a program that comes with a model, from a stranger. It runs in jinja's sandbox, where it reaches no files
and no attributes of Python, in a process whose time and memory are limited, because a sandbox limits neither. What
templates may call is what transformers' apply_chat_template gives them.

Lines of JSON: first {"source", "variables", "seconds"}; then {"messages", "tools", "views", "options", "date"}. Each is
answered by {"compiled"} with {"texts"}, one for each view [number of messages, add_generation_prompt], or {"error"}.
"""

import contextlib
import faulthandler
import json
import signal
import sys
from datetime import datetime

import jinja2
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

MAX_BYTES, MAX_CHARACTERS = 2**30, 2**24  # of the process, of a rendered chat


class Generation(Extension):
    """{% generation %} marks the answers for other programs' masks; here its body is rendered and nothing else."""

    tags = {"generation"}

    def parse(self, parser):
        next(parser.stream)
        return parser.parse_statements(["name:endgeneration"], drop_needle=True)


def to_json(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
    """jinja's own filter escapes HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def raise_exception(message):
    raise jinja2.TemplateError(message)


def compile_template(source: str) -> jinja2.Template:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = to_json
    environment.globals |= {"raise_exception": raise_exception}
    return environment.from_string(source)


def render(template: jinja2.Template, variables: dict, request: dict) -> list[str]:
    now = datetime.fromisoformat(request["date"]) if request["date"] else datetime.now()
    texts = []
    for count, add_generation_prompt in request["views"]:
        pieces, size = [], 0
        for piece in template.generate(
            messages=request["messages"][:count],
            tools=request["tools"],
            documents=None,
            add_generation_prompt=add_generation_prompt,
            strftime_now=now.strftime,
            **variables,
            **request["options"],
        ):
            pieces.append(piece)
            size += len(piece)
            if size > MAX_CHARACTERS:
                raise ValueError(f"it generates more than {MAX_CHARACTERS:,} characters")
        texts.append("".join(pieces))
    return texts


def main():
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent process
    with contextlib.suppress(ImportError, ValueError, OSError):  # Windows has no such limits, macOS may refuse them
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MAX_BYTES, MAX_BYTES))
    template, first = None, {}
    for line in sys.stdin:
        request = json.loads(line)
        first = first or request
        faulthandler.dump_traceback_later(first["seconds"], exit=True)  # also in the middle of a function in C
        try:
            if template is None:
                template = compile_template(request["source"])
                answer = {}
            else:
                answer = {"texts": render(template, first["variables"], request)}
        except Exception as error:  # a stranger's program can raise anything
            answer = {"error": str(error) or type(error).__name__}
        print(json.dumps(answer | {"compiled": template is not None}), flush=True)
        faulthandler.cancel_dump_traceback_later()

"""Tools that a model may call while it writes: a calculator, and functions from a Python file of the user's.

What a model writes is not trusted: the calculator has a parser of its own, and the user's functions run in a process
of their own, with limits on time, memory and output. A mistake comes back to the model as text.
"""

import contextlib
import inspect
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import BinaryIO

from base.cli import UserError
from base.files import load_module

MAX_CHARACTERS, MAX_DIGITS, MAX_DEPTH = 64, 12, 16  # of an expression: `9**9**9` and its like end here
MAX_CALLS = 4  # in one answer
MAX_SECONDS, MAX_BYTES, MAX_OUTPUT = 10, 2**30, 2000  # of a user's function; output in characters


class Tool:
    """A function that a model may call, and its JSON schema for the prompt."""

    def __init__(self, schema: dict, call: Callable[[dict], str]):
        self.schema, self.call = schema, call
        self.name = schema["function"]["name"]


def run_calls(tools: dict[str, Tool], calls: list[dict]) -> list[str]:
    """The answer to each call {"name", "arguments"}, as text; what goes wrong is said in it."""
    answers = []
    for call in calls[:MAX_CALLS]:
        name, arguments = call.get("name"), call.get("arguments")
        tool = tools.get(name) if isinstance(name, str) else None
        if tool is None:
            answers.append(f"error: there is no tool {name!r}; there are {', '.join(tools)}")
        elif not isinstance(arguments, dict):
            answers.append("error: the arguments are not a JSON object")
        else:
            answers.append(tool.call(arguments))
    return answers


# ---- The calculator -------------------------------------------------------------------------------------------------


def calculate(expression: str) -> str:
    """The value of an expression of numbers, + - * / and parentheses, exact: an integer, or a decimal of 6 places."""
    try:
        value = _Parser(expression).value()
    except (ValueError, ZeroDivisionError) as error:
        return f"error: {error}"
    if value.denominator == 1:
        return str(value.numerator)
    return f"{float(value):.6f}".rstrip("0").rstrip(".")


class _Parser:
    """sum = product (+- product)*, product = factor (*/ factor)*, factor = number | -factor | (sum)."""

    def __init__(self, expression: str):
        if len(expression) > MAX_CHARACTERS:
            raise ValueError(f"the expression is longer than {MAX_CHARACTERS} characters")
        expression = expression.translate(str.maketrans("×÷−（）", "*/-()"))
        self.tokens = re.findall(r"\d+(?:\.\d+)?|\S", expression)
        self.depth = 0

    def value(self) -> Fraction:
        value = self._sum()
        if self.tokens:
            raise ValueError(f"unexpected {self.tokens[0]!r}")
        return value

    def _next(self) -> str:
        if not self.tokens:
            raise ValueError("the expression ends too early")
        return self.tokens.pop(0)

    def _sum(self) -> Fraction:
        value = self._product()
        while self.tokens and self.tokens[0] in "+-":
            value += self._product() if self._next() == "+" else -self._product()
        return value

    def _product(self) -> Fraction:
        value = self._factor()
        while self.tokens and self.tokens[0] in "*/":
            if self._next() == "*":
                value *= self._factor()
                continue
            divisor = self._factor()
            if divisor == 0:
                raise ZeroDivisionError("division by zero")
            value /= divisor
        return value

    def _factor(self) -> Fraction:
        token = self._next()
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise ValueError(f"nested deeper than {MAX_DEPTH}")
        if token == "-":
            value = -self._factor()
        elif token == "(":
            value = self._sum()
            if self._next() != ")":
                raise ValueError("a parenthesis is not closed")
        elif token[0].isdecimal() and token.isascii():
            if len(token) > MAX_DIGITS:
                raise ValueError(f"a number has more than {MAX_DIGITS} digits")
            value = Fraction(token)
        else:
            raise ValueError(f"unexpected {token!r}")
        self.depth -= 1
        return value


def calculator() -> Tool:
    expression = {"type": "string", "description": "numbers, + - * / and parentheses, such as (12 + 3) * 4"}
    parameters = {"type": "object", "properties": {"expression": expression}, "required": ["expression"]}
    function = {"name": "calculator", "description": "Computes an expression exactly.", "parameters": parameters}
    return Tool({"type": "function", "function": function}, lambda given: calculate(str(given.get("expression", ""))))


# ---- Functions of the user's ----------------------------------------------------------------------------------------

# Runs in the process of its own; there is no module `resource` on Windows.
CHILD = f"""
import importlib.util, json, sys
try:
    import resource
    for limit, value in (("AS", {MAX_BYTES}), ("CPU", {MAX_SECONDS}), ("FSIZE", {2**20})):
        resource.setrlimit(getattr(resource, "RLIMIT_" + limit), (value, value))
except ImportError:
    pass
path, name, arguments = sys.argv[1:]
spec = importlib.util.spec_from_file_location("tools", path)
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
try:
    result = getattr(module, name)(**json.loads(arguments))
except Exception as error:
    result = f"error: {{type(error).__name__}}: {{error}}"
print(result if isinstance(result, str) else json.dumps(result, ensure_ascii=False, default=str))
"""


def load_tools(names: list[str]) -> dict[str, Tool]:
    """Tools by name: `calculator`, or the public functions of a Python file. UserError for anything else."""
    tools = {}
    for name in names:
        if name == "calculator":
            tools[name] = calculator()
        elif name.endswith(".py"):
            tools |= _functions_of(Path(name))
        else:
            raise UserError(f"no tool is called {name}: it is `calculator`, or a Python file")
    return tools


def _functions_of(path: Path) -> dict[str, Tool]:
    """A tool for each function that the file defines; its type hints and docstring (with `Args:`) become the schema."""
    from transformers.utils import get_json_schema  # takes long to import

    module = load_module(path, "tools")
    tools = {}
    for name, function in inspect.getmembers(module, inspect.isfunction):
        if name.startswith("_") or function.__module__ != "tools":
            continue
        try:
            schema = get_json_schema(function)
        except Exception as error:  # of the docstring's form
            raise UserError(f"{path}: {name}: {error}") from None
        tools[name] = Tool(schema, lambda arguments, name=name: _call_in_child(path, name, arguments))
    if not tools:
        raise UserError(f"{path} defines no function")
    return tools


def _call_in_child(path: Path, name: str, arguments: dict) -> str:
    command = [sys.executable, "-c", CHILD, str(path.resolve()), name, json.dumps(arguments)]
    with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as errors:  # files, whose size has a limit
        child = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=errors, start_new_session=True
        )
        try:
            status = child.wait(MAX_SECONDS)
        except subprocess.TimeoutExpired:
            status = None
        finally:
            with contextlib.suppress(ProcessLookupError):  # also what the function has started
                os.killpg(child.pid, signal.SIGKILL) if hasattr(os, "killpg") else child.kill()
            child.wait()
        text, lines = (_beginning(file) for file in (output, errors))
    if status is None:
        return f"error: {name} took longer than {MAX_SECONDS} seconds"
    if status:
        return f"error: {(lines.splitlines() or [f'status {status}'])[-1]}"
    return text if len(text) <= MAX_OUTPUT else text[:MAX_OUTPUT] + " …"


def _beginning(file: BinaryIO) -> str:
    file.seek(0)
    return file.read(4 * MAX_OUTPUT + 4).decode("utf-8", "replace").strip()

"""Tools that a model may call during generation: a calculator, and functions from a user's Python file.

The model's output is not trusted: the calculator evaluates a syntax tree of a few node types, and the user's functions
run in a separate process with limits on time, memory and output. Errors are returned to the model as text.
"""

import ast
import contextlib
import inspect
import json
import operator
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

MAX_CHARACTERS, MAX_DIGITS = 64, 12  # of an expression, and of a number in it
MAX_CALLS = 4  # in one turn
MAX_SECONDS, MAX_BYTES, MAX_OUTPUT = 10, 2**30, 2000  # limits of a user's function; output in characters


class Tool:
    """A function that a model may call, and its JSON schema for the prompt."""

    def __init__(self, schema: dict, call: Callable[[dict], str]):
        self.schema, self.call = schema, call
        self.name = schema["function"]["name"]


def run_calls(tools: dict[str, Tool], calls: list[dict]) -> list[str]:
    """The result of each call {"name", "arguments"} as text, which may be an error message."""
    answers = []
    for call in calls[:MAX_CALLS]:
        name, arguments = call.get("name"), call.get("arguments")
        tool = tools.get(name) if isinstance(name, str) else None  # the model may generate anything here
        if tool is None:
            answer = f"error: there is no tool {name!r}; there are {', '.join(tools)}"
        elif not isinstance(arguments, dict):
            answer = "error: the arguments are not a JSON object"
        else:
            try:
                answer = tool.call(arguments)
            except OSError as error:  # such as a process that cannot be started
                answer = f"error: {error}"
        answers.append(answer if len(answer) <= MAX_OUTPUT else answer[:MAX_OUTPUT] + " …")
    return answers


# ---------------------------------------------------------------------------------------------------------- calculator

OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}


def calculate(expression: str) -> str:
    """The value of an expression of numbers, + - * / and parentheses, exact: an integer, or a decimal of 6 places."""
    try:
        value = _value(expression)
    except ZeroDivisionError:
        return "error: division by zero"
    except SyntaxError as error:
        return f"error: {error.msg}"
    except ValueError as error:
        return f"error: {error}"
    return str(value) if value.denominator == 1 else f"{float(value):.6f}".rstrip("0").rstrip(".")


def _value(expression: str) -> Fraction:
    """Only Python's parser is used: nothing is executed. The number of characters also limits the depth of the tree."""
    if len(expression) > MAX_CHARACTERS:
        raise ValueError(f"the expression is longer than {MAX_CHARACTERS} characters")
    text = " ".join(expression.translate(str.maketrans("×÷−（）", "*/-()")).split())
    if unexpected := re.search(r"[^0-9.+*/() -]", text):
        raise ValueError(f"unexpected {unexpected[0]!r}")
    text = re.sub(r"(?<![\d.])0+(?=\d)", "", text)  # Python does not accept leading zeros

    def evaluate(node: ast.expr) -> Fraction:
        source = ast.get_source_segment(text, node)
        if isinstance(node, ast.Constant) and re.fullmatch(r"\d+(\.\d+)?", source):
            if len(source) > MAX_DIGITS:
                raise ValueError(f"a number has more than {MAX_DIGITS} digits")
            return Fraction(source)
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
            return -evaluate(node.operand)
        if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
            return OPERATORS[type(node.op)](evaluate(node.left), evaluate(node.right))
        raise ValueError(f"unexpected {source!r}")

    return evaluate(ast.parse(text, mode="eval").body)


def calculator() -> Tool:
    expression = {"type": "string", "description": "numbers, + - * / and parentheses, such as (12 + 3) * 4"}
    parameters = {"type": "object", "properties": {"expression": expression}, "required": ["expression"]}
    function = {"name": "calculator", "description": "Computes an expression exactly.", "parameters": parameters}
    return Tool({"type": "function", "function": function}, lambda given: calculate(str(given.get("expression", ""))))


# ------------------------------------------------------------------------------------------------------ user functions

# The program of the separate process. Windows has no module `resource`.
CHILD = f"""
import importlib.util, json, signal, sys
try:
    import resource
    signal.alarm({MAX_SECONDS} + 1)  # in case the caller is killed before it can end this process
    for limit, value in (("AS", {MAX_BYTES}), ("CPU", {MAX_SECONDS}), ("FSIZE", {2**20})):
        resource.setrlimit(getattr(resource, "RLIMIT_" + limit), (value, value))
except ImportError:
    pass
path, name = sys.argv[1:]
spec = importlib.util.spec_from_file_location("tools", path)
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
try:
    result = getattr(module, name)(**json.load(sys.stdin))
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
            raise UserError(f"no tool is called {name}: give `calculator` or a Python file")
    return tools


def _functions_of(path: Path) -> dict[str, Tool]:
    """A tool for each function that the file defines; type hints and docstring (with `Args:`) become its schema."""
    from transformers.utils import get_json_schema  # slow to import

    module = load_module(path, "tools")
    tools = {}
    for name, function in inspect.getmembers(module, inspect.isfunction):
        if name.startswith("_") or function.__module__ != "tools":
            continue
        try:
            schema = get_json_schema(function)
        except Exception as error:  # about the docstring's format
            raise UserError(f"{path}: {name}: {error}") from None
        tools[name] = Tool(schema, lambda arguments, name=name: _call_in_child(path, name, arguments))
    if not tools:
        raise UserError(f"{path} defines no function")
    return tools


def _call_in_child(path: Path, name: str, arguments: dict) -> str:
    command = [sys.executable, "-c", CHILD, str(path.resolve()), name]
    with contextlib.ExitStack() as stack:  # files, because RLIMIT_FSIZE limits them
        given, output, errors = (stack.enter_context(tempfile.TemporaryFile()) for _ in range(3))
        given.write(json.dumps(arguments).encode())  # a command line is limited to 128 kB
        given.seek(0)
        child = subprocess.Popen(command, stdin=given, stdout=output, stderr=errors, start_new_session=True)
        try:
            status = child.wait(MAX_SECONDS)
        except subprocess.TimeoutExpired:
            status = None
        finally:
            with contextlib.suppress(ProcessLookupError):  # and all processes that the function started
                os.killpg(child.pid, signal.SIGKILL) if hasattr(os, "killpg") else child.kill()
            child.wait()
        text, lines = (_beginning(file) for file in (output, errors))
    if status is None:
        return f"error: {name} took longer than {MAX_SECONDS} seconds"
    if status:
        return f"error: {(lines.splitlines() or [f'status {status}'])[-1]}"
    return text


def _beginning(file: BinaryIO) -> str:
    file.seek(0)
    return file.read(4 * MAX_OUTPUT + 4).decode("utf-8", "replace").strip()

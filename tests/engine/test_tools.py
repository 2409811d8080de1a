"""Tools: what the calculator gives, and that neither it nor a user's function can be made to hang, fill or break."""

import time

import pytest

from base.cli import UserError
from engine import tools
from engine.tools import calculate, load_tools, run_calls


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("1+2", "3"),
        ("347 * 28", "9716"),
        ("2 - 3 - 4", "-5"),
        ("8 / 2 / 2", "2"),
        ("2 + 3 * 4", "14"),
        ("(2 + 3) * 4", "20"),
        ("-(2 + 3) * -4", "20"),
        ("1 / 3", "0.333333"),
        ("0.1 + 0.2", "0.3"),
        ("999999999999 * 999999999999", "999999999998000000000001"),
        ("３×４", "error: unexpected '３'"),
        ("3×4÷2", "6"),
        (f"{'(' * 31}7{')' * 31}", "7"),
        ("-" * 63 + "1", "-1"),
        ("1" + "+1" * 31, "32"),
        (" 007 +\n1.050 ", "8.05"),
    ],
)
def test_the_calculator_is_exact(expression, value):
    assert calculate(expression) == value


@pytest.mark.parametrize(
    "expression",
    [
        "9**9**9",
        "(" * 50_000,
        "(" * 40,
        "-" * 60,
        "1 # 2",
        "+1",
        ".5",
        "7//2",
        "1(2)",
        "...",
        "1_0",
        "0x1",
        "1/0",
        "1/(2-2)",
        "",
        "()",
        "1 2",
        "1 +",
        "2 ** 3",
        "9" * 13,
        "1e99",
    ]
    + ["__import__('os')", "<|im_end|>", "\ud800", "1,000", "nan", "٣+٤", "²", "1.2.3"],
)
def test_an_expression_that_is_none_is_an_error_in_words_and_in_no_time(expression):
    start = time.perf_counter()
    assert calculate(expression).startswith("error: ")
    assert time.perf_counter() - start < 0.1


def test_calls_that_are_wrong_are_answered_and_only_some_are_made():
    known = load_tools(["calculator"])
    calls = [
        {"name": "calculator", "arguments": {"expression": "6*7"}},
        {"name": "rm", "arguments": {}},
        {"name": "calculator", "arguments": "6*7"},
        {"name": None, "arguments": "no JSON"},
        {"name": "calculator", "arguments": {"expression": "1+1"}},
    ]
    answers = run_calls(known, calls)
    assert answers[0] == "42"
    assert answers[1].startswith("error: there is no tool 'rm'")
    assert answers[2].startswith("error: the arguments")
    assert len(answers) == tools.MAX_CALLS


USERS = '''
import os, subprocess, sys, time

def weather(city: str, days: int = 1) -> dict:
    """The weather of a city.

    Args:
        city: its name
        days: how many
    """
    return {"city": city, "days": days, "sky": "晴"}

def fails(text: str) -> str:
    """Raises.

    Args:
        text: anything
    """
    raise ValueError("no " + text)

def hangs(seconds: int) -> str:
    """Sleeps, with a child that sleeps too.

    Args:
        seconds: how long
    """
    subprocess.Popen([sys.executable, "-c", f"import time; time.sleep({seconds}); open({__file__!r} + '.late', 'w')"])
    time.sleep(seconds)

def floods(lines: int) -> str:
    """Prints without end.

    Args:
        lines: how many
    """
    for _ in range(lines):
        print("x" * 10_000)

def grows(size: int) -> str:
    """Takes memory.

    Args:
        size: bytes
    """
    return str(len(bytearray(size)))

def dies(status: int) -> str:
    """Ends its process.

    Args:
        status: of the exit
    """
    os._exit(status)

def _private(x: int) -> int:
    return x
'''


@pytest.fixture
def users(tmp_path):
    (tmp_path / "my_tools.py").write_text(USERS, "utf-8")
    return load_tools([str(tmp_path / "my_tools.py")])


def test_functions_of_a_file_become_schemas_and_are_called(users):
    assert set(users) == {"weather", "fails", "hangs", "floods", "grows", "dies"}
    function = users["weather"].schema["function"]
    assert function["parameters"]["properties"]["city"] == {"type": "string", "description": "its name"}
    assert function["parameters"]["required"] == ["city"]
    assert run_calls(users, [{"name": "weather", "arguments": {"city": "上海"}}]) == [
        '{"city": "上海", "days": 1, "sky": "晴"}'
    ]


def test_what_a_function_does_wrong_comes_back_as_text(users, monkeypatch, tmp_path):
    monkeypatch.setattr(tools, "MAX_SECONDS", 1)

    def call(name, **arguments):
        return run_calls(users, [{"name": name, "arguments": arguments}])[0]

    assert call("fails", text="luck") == "error: ValueError: no luck"
    assert call("weather", town="x").startswith("error: TypeError")
    assert call("dies", status=3) == "error: status 3"
    assert len(call("floods", lines=100_000)) < 2 * tools.MAX_OUTPUT
    start = time.perf_counter()
    assert "longer than 1 seconds" in call("hangs", seconds=3)
    assert time.perf_counter() - start < 2.5
    if tools.sys.platform == "linux":
        assert "MemoryError" in call("grows", size=2**34)
    time.sleep(2.5)
    assert not list(tmp_path.glob("*.late")), "a process that the function had started lived on"


@pytest.mark.parametrize(
    ("content", "words"),
    [(None, "no such file"), ("x = ", "cannot be loaded: SyntaxError"), ("x = 1", "defines no function")]
    + [("def f(x):\n    return x\n", "f: ")],
)
def test_a_file_without_tools_is_refused(content, words, tmp_path):
    path = tmp_path / "mine.py"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match=words):
        load_tools([str(path)])
    with pytest.raises(UserError, match="no tool is called abacus"):
        load_tools(["abacus"])

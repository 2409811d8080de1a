"""The first command: the pins are complete, the environment is renewed when it must be, errors are one clear line."""

import ast
import re
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, packages_distributions, requires
from pathlib import Path

import pytest
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import quickstart

ROOT = Path(quickstart.__file__).parent
FILES = [quickstart.CORE, quickstart.TEST, quickstart.CONSTRAINTS]
PYTHONS = [f"3.{minor}" for minor in range(quickstart.OLDEST[1], quickstart.NEWEST[1] + 1)]


def read_requirements(name: str) -> list[Requirement]:
    lines = (re.sub(r"(^|\s)#.*", "", line).strip() for line in (ROOT / name).read_text("utf-8").splitlines())
    found = []
    for line in lines:
        if line.startswith("-r "):
            found += read_requirements(str(Path(name).parent / line.removeprefix("-r ")))
        elif line:
            found.append(Requirement(line))
    return found


def pins_for(python: str) -> dict[str, str]:
    """Package to version, as pip reads constraints.txt under one version of Python."""
    pins = {}
    for constraint in read_requirements("constraints.txt"):
        marker_environment = default_environment() | {"python_version": python, "python_full_version": f"{python}.0"}
        if constraint.marker is None or constraint.marker.evaluate(marker_environment):
            name = canonicalize_name(constraint.name)
            assert name not in pins, f"constraints.txt pins {name} twice for Python {python}"
            (specifier,) = constraint.specifier
            assert specifier.operator == "==", f"constraints.txt does not fix one version: {constraint}"
            pins[name] = specifier.version
    return pins


@pytest.mark.parametrize("python", PYTHONS)
def test_every_requirement_has_a_pin_within_its_range(python):
    pins = pins_for(python)
    for name in ("requirements.txt", "requirements/test.txt", *quickstart.EXTRA):
        for requirement in read_requirements(name):
            version = pins.get(canonicalize_name(requirement.name))
            assert version, f"{requirement.name} of {name} has no pin in constraints.txt for Python {python}"
            assert requirement.specifier.contains(version), f"{requirement} excludes its pin {version}"


@pytest.mark.parametrize("extra", [[], pytest.param(quickstart.EXTRA, marks=pytest.mark.extra)], ids=["", "extra"])
def test_everything_that_the_requirements_pull_in_has_a_pin(extra):
    pins = pins_for("{}.{}".format(*sys.version_info))
    todo = [r for name in ("requirements.txt", "requirements/test.txt", *extra) for r in read_requirements(name)]
    seen = set()
    while todo:
        requirement = todo.pop()
        name = canonicalize_name(requirement.name)
        # torch fixes the versions of the CUDA packages itself.
        if name in seen or (requirement.marker and not requirement.marker.evaluate({"extra": ""})):
            continue
        if name.startswith(("nvidia-", "triton", "cuda-toolkit")):
            continue
        seen.add(name)
        assert name in pins, f"{name} is installed for the requirements, and has no pin in constraints.txt"
        try:
            todo += [Requirement(line) for line in requires(name) or []]
        except PackageNotFoundError:
            pytest.fail(f"{name} is required, and not installed")
    assert len(seen) > 40


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A project folder with requirement files and an environment; `commands` records what would have been run."""
    (tmp_path / "requirements").mkdir()
    for name in FILES:
        (tmp_path / name).write_text("torch\n")
    (tmp_path / ".venv").mkdir()
    commands = []
    monkeypatch.setattr(quickstart, "ROOT", tmp_path)
    monkeypatch.setattr(quickstart, "answers", lambda python, *arguments: True)
    monkeypatch.setattr(quickstart, "run", lambda command, watch=None: commands.append(command) or (0, False))
    return tmp_path, commands


@pytest.mark.parametrize("requirements", [quickstart.CORE, quickstart.TEST])
def test_nothing_is_required_that_nothing_imports(requirements):
    sources = [path for path in ROOT.rglob("*.py") if ".venv" not in path.parts]
    if requirements == quickstart.CORE:  # is not there for the tests
        sources = [path for path in sources if path.relative_to(ROOT).parts[0] != "tests"]
    imported = set()
    for path in sources:
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Import):
                imported |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                imported.add(node.module.partition(".")[0])
    packages = packages_distributions()
    used = {canonicalize_name(name) for module in imported for name in packages.get(module, ())}
    programs = {"pytest", "ruff"}  # are started, by quickstart.py
    required = {canonicalize_name(requirement.name) for requirement in read_requirements(requirements)}
    assert required <= used | programs, required - used - programs


def test_packages_are_installed_once_until_a_requirement_file_changes(project):
    root, commands = project
    quickstart.install("python", root / ".venv", FILES[:2])
    assert len(commands) == 1
    assert commands[0][1:4] == ["-m", "pip", "install"]
    assert commands[0][-2:] == ["-c", "constraints.txt"]
    quickstart.install("python", root / ".venv", FILES[:2])
    assert len(commands) == 1
    for count, name in enumerate(FILES, start=2):
        (root / name).write_text("torch>=2\n")
        quickstart.install("python", root / ".venv", FILES[:2])
        assert len(commands) == count, f"a change of {name} went unnoticed"


@pytest.mark.parametrize(("disconnected", "words"), [(True, "network"), (False, "takes it up again")])
def test_an_installation_that_breaks_off_is_said_and_taken_up_again(project, monkeypatch, capsys, disconnected, words):
    root, commands = project
    quickstart.install("python", root / ".venv", FILES[:2])
    (root / "constraints.txt").write_text("torch==2\n")
    with monkeypatch.context() as patch:
        patch.setattr(quickstart, "run", lambda command, watch=None: (1, disconnected))
        with pytest.raises(SystemExit) as stop:
            quickstart.install("python", root / ".venv", FILES[:2])
    assert stop.value.code == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert words in line
    # Even back at the old constraints: the environment may hold half of the new ones.
    (root / "constraints.txt").write_text("torch\n")
    quickstart.install("python", root / ".venv", FILES[:2])
    assert len(commands) == 2


def test_a_package_that_was_cut_off_is_installed_again(project):
    root, _ = project
    packages = root / ".venv" / "lib" / "python3.11" / "site-packages"
    for name in ("whole-1.dist-info/RECORD", "cut-1.dist-info/METADATA"):
        (packages / name).parent.mkdir(parents=True)
        (packages / name).touch()
    quickstart.install("python", root / ".venv", FILES[:2])
    assert [folder.name for folder in packages.iterdir()] == ["whole-1.dist-info"]


def test_an_environment_of_the_users_own_is_left_alone_if_it_has_all_packages(project, monkeypatch):
    root, commands = project
    (root / "elsewhere").mkdir()
    quickstart.install("python", root / "elsewhere", FILES[:2])
    assert commands == []
    monkeypatch.setattr(quickstart, "answers", lambda python, *arguments: "install" not in arguments)
    quickstart.install("python", root / "elsewhere", FILES[:2])
    assert len(commands) == 1


@pytest.mark.parametrize(("arguments", "extra"), [(["-k", "lora"], []), (["-m", "extra"], quickstart.EXTRA)])
def test_extra_packages_are_installed_for_the_tests_that_need_them(project, monkeypatch, arguments, extra):
    root, _ = project
    installed = []
    monkeypatch.setattr(quickstart, "find_environment", lambda names: ("python", root / ".venv"))
    monkeypatch.setattr(quickstart, "install", lambda python, prefix, names: installed.extend(names))
    quickstart.test(arguments)
    assert installed == [quickstart.CORE, quickstart.TEST, *extra]


@pytest.mark.parametrize("failing", ["pip", "ruff", "pytest", None])
def test_the_first_check_that_fails_gives_the_exit_status(project, monkeypatch, failing):
    root, _ = project
    tools = []

    def run(command, watch=None):
        tools.append(command[2])
        return (3 if command[2] == failing else 0), False

    monkeypatch.setattr(quickstart, "find_environment", lambda names: ("python", root / ".venv"))
    monkeypatch.setattr(quickstart, "install", lambda python, prefix, names: None)
    monkeypatch.setattr(quickstart, "run", run)
    assert quickstart.test(["-x"]) == (3 if failing else 0)
    order = ["pip", "ruff", "ruff", "pytest"]
    assert tools == (order[: order.index(failing) + 1] if failing else order)


def test_a_connection_that_breaks_is_told_from_other_failures(capfd):
    refused = "import sys; sys.exit('WARNING: Retrying after connection broken by NewConnectionError(...)')"
    assert quickstart.run([sys.executable, "-c", refused], watch=quickstart.NO_CONNECTION) == (1, True)
    missing = "import sys; print('x'); sys.exit('ERROR: No matching distribution found for torch')"
    assert quickstart.run([sys.executable, "-c", missing], watch=quickstart.NO_CONNECTION) == (1, False)
    output, errors = capfd.readouterr()
    assert "\nx\n" in output
    assert "connection broken" in errors
    assert "No matching distribution" in errors


@pytest.mark.parametrize("version", [(2, 7, 18), (3, 9, 18), (3, 14, 0)])
def test_another_python_is_refused_in_one_line(version, monkeypatch, capsys):
    monkeypatch.setattr(sys, "version_info", version)
    # Else a failure would start this very test anew.
    monkeypatch.setattr(quickstart, "COMMANDS", {"test": lambda arguments: 0})
    with pytest.raises(SystemExit) as stop:
        quickstart.main(["test"])
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "3.10 to 3.13" in line
    assert "{}.{}".format(*version) in line


@pytest.mark.parametrize("version", PYTHONS)
def test_supported_pythons_are_accepted(version):
    quickstart.check_python((*map(int, version.split(".")), 0))


def test_an_old_python_can_read_the_file_far_enough_to_refuse():
    ast.parse((ROOT / "quickstart.py").read_text("utf-8"), feature_version=(3, 6))


def test_a_python_without_venv_is_told_which_package_brings_it(project, monkeypatch, capsys):
    root, commands = project
    (root / ".venv").rmdir()
    monkeypatch.setattr(sys, "prefix", sys.base_prefix)
    monkeypatch.delenv("CONDA_PREFIX", raising=False)
    monkeypatch.setattr(quickstart, "answers", lambda python, *arguments: False)
    monkeypatch.setattr(quickstart.importlib.util, "find_spec", lambda name: None if name == "ensurepip" else True)
    with pytest.raises(SystemExit):
        quickstart.find_environment([quickstart.CORE])
    (line,) = capsys.readouterr().err.splitlines()
    assert "apt install python{}.{}-venv".format(*sys.version_info) in line
    assert commands == []


@pytest.mark.parametrize("arguments", [["-h"], ["--help"], ["test", "--help"]])
def test_help_names_the_commands_and_starts_nothing(arguments, tmp_path):
    command = [sys.executable, str(ROOT / "quickstart.py"), *arguments]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0
    assert result.stderr == ""
    assert all(f"\n  {name} " in result.stdout for name in quickstart.COMMANDS)
    assert "\n$ " not in result.stdout


def test_an_unknown_command_is_refused_in_one_line():
    result = subprocess.run([sys.executable, str(ROOT / "quickstart.py"), "tset"], capture_output=True, text=True)
    assert result.returncode == 2
    (line,) = result.stderr.splitlines()
    assert "'tset'" in line

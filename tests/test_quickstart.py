"""The first command: the pins are complete, the environment is renewed when it must be, errors are one clear line."""

import ast
import http.server
import importlib.util
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import urllib.request
import zipfile
from importlib.metadata import PackageNotFoundError, distributions, requires
from pathlib import Path
from types import SimpleNamespace

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
    monkeypatch.setattr(quickstart, "run", lambda command, watch=(): commands.append(command) or (0, None))
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
            elif isinstance(node, ast.Call) and getattr(node.func, "id", "") == "import_extra":
                imported.add(getattr(node.args[0], "value", "").partition(".")[0])  # a variable has no value here
    used = {  # packages_distributions() of Python 3.10 does not know a wheel without a top_level.txt
        canonicalize_name(distribution.metadata["Name"])
        for distribution in distributions()
        if imported & {file.parts[0].removesuffix(".py") for file in distribution.files or ()}
    }
    programs = {"pytest", "pytest-xdist", "ruff"}  # are started, by quickstart.py
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


@pytest.mark.parametrize(
    ("status", "found", "words"),
    [
        (1, "SSLError", "check the network"),
        (1, "No space left on device", "the disk is full"),
        (1, "Operation cancelled by user", "interrupted"),
        (137, None, "memory ran out"),
        (1, None, "the same command continues"),
    ],
)
def test_an_installation_that_fails_is_one_line_and_is_continued(project, monkeypatch, capsys, status, found, words):
    root, commands = project
    quickstart.install("python", root / ".venv", FILES[:2])
    (root / "constraints.txt").write_text("torch==2\n")
    with monkeypatch.context() as patch:
        patch.setattr(quickstart, "run", lambda command, watch=(): (status, found))
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
    monkeypatch.setattr(quickstart, "choose_torch", lambda python: (None, "about 3 GB to download"))
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

    def run(command, watch=()):
        tools.append(command[2])
        return (3 if command[2] == failing else 0), None

    monkeypatch.setattr(quickstart, "find_environment", lambda names: ("python", root / ".venv"))
    monkeypatch.setattr(quickstart, "install", lambda python, prefix, names: None)
    monkeypatch.setattr(quickstart, "run", run)
    assert quickstart.test(["-x"]) == (3 if failing else 0)
    order = ["pip", "ruff", "ruff", "pytest"]
    assert tools == (order[: order.index(failing) + 1] if failing else order)


def test_the_last_reason_that_pip_writes_is_found(capfd):
    def reason(text):
        return quickstart.run([sys.executable, "-c", f"import sys; sys.exit({text!r})"], watch=quickstart.REASONS)

    refused = "WARNING: Retrying after connection broken by NewConnectionError(...)"
    assert reason(refused) == (1, "connection broken by")
    assert reason(refused + "\nOSError: [Errno 28] No space left on device") == (1, "No space left on device")
    assert reason("ERROR: No matching distribution found for torch") == (1, None)
    _, errors = capfd.readouterr()
    assert "connection broken" in errors
    assert "No matching distribution" in errors


def test_a_disk_that_is_full_is_named_without_a_word_from_the_command(project, monkeypatch, capsys):
    monkeypatch.setattr(quickstart.shutil, "disk_usage", lambda path: SimpleNamespace(free=0))
    with pytest.raises(SystemExit):
        quickstart.give_up("making the virtual environment", 1)
    assert "the disk is full" in capsys.readouterr().err


WHEEL = "torch-2.13.0+cpu-py3-none-any.whl"


@pytest.fixture
def torch_index(tmp_path, monkeypatch):
    """A package index over HTTP with a torch of its own; `pages` are those that were asked for."""
    folder, info = tmp_path / "index" / "cpu" / "torch", "torch-2.13.0+cpu.dist-info"
    folder.mkdir(parents=True)
    (folder / "index.html").write_text(f'<a href="{WHEEL}">{WHEEL}</a>')
    with zipfile.ZipFile(folder / WHEEL, "w") as wheel:
        wheel.writestr("torch.py", "")
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: torch\nVersion: 2.13.0+cpu\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")

    class Handler(http.server.SimpleHTTPRequestHandler):
        pages = []

        def __init__(self, *args):
            super().__init__(*args, directory=tmp_path / "index")

        def log_request(self, *args):
            self.pages.append(self.path)

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr(quickstart, "TORCH_INDEX", f"http://127.0.0.1:{server.server_port}/")
        monkeypatch.setattr(sys, "platform", "linux")
        monkeypatch.setattr(quickstart.shutil, "which", lambda name: None)
        monkeypatch.setattr(urllib.request, "_opener", None)  # which remembers the proxies of the first request
        monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
        for name in list(os.environ):
            if name.lower().endswith("_proxy") or name in ("PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL", "PIP_FIND_LINKS"):
                monkeypatch.delenv(name)
        yield Handler.pages
        server.shutdown()


def test_without_a_gpu_torchs_cpu_build_is_installed(torch_index, tmp_path, monkeypatch, capfd):
    """In a real environment, with the pip that it has; the other packages are found installed."""
    root, prefix = tmp_path / "project", tmp_path / "project" / ".venv"
    (root / "requirements").mkdir(parents=True)
    for name in FILES:
        (root / name).write_text("torch==2.13.0\n")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", prefix], check=True)
    packages = next(prefix.glob("**/site-packages"))
    shutil.copytree(Path(importlib.util.find_spec("pip").origin).parent, packages / "pip")  # quicker than ensurepip
    monkeypatch.setattr(quickstart, "ROOT", root)
    monkeypatch.chdir(root)
    python = str(prefix / ("Scripts/python.exe" if os.name == "nt" else "bin/python"))
    quickstart.install(python, prefix, FILES[:1])
    shown = subprocess.run([python, "-m", "pip", "list"], capture_output=True, text=True).stdout
    assert re.search(r"torch +2\.13\.0\+cpu", shown)
    output = capfd.readouterr().out
    assert output.index("about 0.4 GB") < output.index("-m pip install")
    # An update of another package leaves it alone, and says what that takes.
    asked = len(torch_index)
    (root / quickstart.CORE).write_text("torch>=2.13\n")
    quickstart.install(python, prefix, FILES[:1])
    assert len(torch_index) == asked
    assert "torch is installed already" in capfd.readouterr().out


def test_pip_chooses_torch_where_its_index_is_not_reached_in_time(torch_index, monkeypatch):
    assert quickstart.choose_torch(sys.executable) == (quickstart.TORCH_INDEX + "cpu", "about 0.4 GB to download")
    with socket.create_server(("127.0.0.1", 0)) as silent:  # accepts, and never answers
        monkeypatch.setattr(quickstart, "TORCH_INDEX", f"http://127.0.0.1:{silent.getsockname()[1]}/")
        monkeypatch.setattr(quickstart.reaches, "__defaults__", (0.2,))
        url, size = quickstart.choose_torch(sys.executable)
        assert url is None
        assert "about 3 GB" in size


@pytest.mark.parametrize("name", ["PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL", "PIP_FIND_LINKS"])
def test_an_index_that_the_user_chose_is_kept(torch_index, monkeypatch, name):
    monkeypatch.setenv(name, "http://mirror.invalid/simple")
    url, size = quickstart.choose_torch(sys.executable)
    assert url is None
    assert "pip's settings" in size
    assert torch_index == []


def test_an_index_is_asked_through_the_users_proxy(torch_index, monkeypatch):
    proxy, url = quickstart.TORCH_INDEX.rstrip("/"), "http://torch.invalid/cpu/torch/"
    monkeypatch.setenv("http_proxy", proxy)
    quickstart.reaches(url)
    assert torch_index == [url]


@pytest.mark.parametrize(
    ("platform", "driver", "build"),
    [
        ("linux", None, "cpu"),
        ("linux", "610.43, 8.9\n", None),
        ("linux", "535.1, 8.6\n", "cu126"),
        ("linux", "Failed to initialize NVML\n", None),
        ("darwin", None, None),
        ("win32", None, None),
        ("win32", "581.10, 8.9\n581.10, 8.9\n", "cu130"),
        ("win32", "566.36, 7.5\n", "cu126"),
        ("linux", "580.95, 6.1\n", "cu126"),  # CUDA 13 has no code for it
        ("linux", "570.86, 12.0\n", None),  # and CUDA 12.6 none for this one
    ],
)
def test_the_build_of_torch_suits_the_machine(monkeypatch, platform, driver, build):
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setattr(quickstart.os, "name", "nt" if platform == "win32" else "posix")
    monkeypatch.setattr(quickstart.shutil, "which", lambda name: driver and name)
    monkeypatch.setattr(quickstart.subprocess, "check_output", lambda *args, **options: driver.encode())
    assert quickstart.torch_build() == build


def test_an_environment_with_a_torch_of_the_users_own_keeps_it(project, monkeypatch, capsys):
    root, commands = project
    (root / "elsewhere").mkdir()
    monkeypatch.setattr(quickstart, "has_packages", lambda python, names: False)
    quickstart.install("python", root / "elsewhere", FILES[:1])
    (command,) = commands
    assert "-c" not in command
    assert "torch is installed already" in capsys.readouterr().out


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

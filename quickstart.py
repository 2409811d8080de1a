"""One command to start with: makes an environment, installs what is missing, trains a small model, and chats with it.

The demonstration itself is demo/tour.py, which this runs in the environment; `python quickstart.py test` lints and
tests instead. It needs only Python's standard library, on Linux, macOS or Windows. The environment is the virtual
environment that is active, else `.venv` in this folder, else this Python if it has all packages already, else a new
`.venv`.
"""

import argparse
import hashlib
import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
import threading
import urllib.request
from pathlib import Path

from base.packages import TORCH_INDEX, torch_build

ROOT = Path(__file__).resolve().parent
OLDEST, NEWEST = (3, 10), (3, 13)
CORE, TEST, CONSTRAINTS = "requirements.txt", "requirements/test.txt", "constraints.txt"
# For the tests that are marked extra.
EXTRA = [f"requirements/{name}.txt" for name in ("export", "track", "languages", "documents", "interop")]
NO_INDEX = "pip could not reach a package index: check the network, proxy or PIP_INDEX_URL, then run this again"
FULL = "the disk is full: free some space, then run this again"
REASONS = {  # what pip writes when it fails, and what to tell the user
    **dict.fromkeys(("connection broken by", "Could not fetch URL", "ConnectionError", "Timeout"), NO_INDEX),
    **dict.fromkeys(("ProxyError", "SSLError"), NO_INDEX),
    **dict.fromkeys(("No space left on device", "Disk quota exceeded"), FULL),
    "MemoryError": "memory ran out: close other programs, then run this again",
    "Operation cancelled by user": "interrupted; the same command continues the installation",
}

HELP = """usage: python quickstart.py [--minutes N] [--clean] [--no-chat]
       python quickstart.py COMMAND

Without a command: installs what is missing, trains a small model through all four stages, counts after each how many
questions it answers correctly, and chats with it. All files go to out/quickstart. Started again, it continues where it
stopped.

  --minutes N           limit for the training, which a fast machine does not need (default: 15)
  --clean               start over
  --no-chat             end after the table of results

commands:
  rewards [--minutes N] after the above: a model learns from rewards that thinking pays (default: 3 minutes, and 5 more)
  test [ARGUMENT ...]   install what is missing, check with ruff, run the tests; the arguments go to pytest:
                          python quickstart.py test -k lora
                          python quickstart.py test -m slow
                          python quickstart.py test -m extra     installs and tests other people's libraries too
                          python quickstart.py test tests/test_quickstart.py -x
"""


def fail(message, status=1):
    """End with one line on standard error and an exit status: 1 for a failure, 2 for a wrong call."""
    print("quickstart.py: " + message, file=sys.stderr)
    raise SystemExit(status)


def check_python(version):
    if not OLDEST <= tuple(version[:2]) <= NEWEST:
        fail(
            "needs Python {}.{} to {}.{}, and this is {}.{}; start it with one of those, for example: "
            "python3.11 quickstart.py".format(*OLDEST, *NEWEST, *version[:2]),
            status=2,
        )


def run(command, watch=()):
    """Print and run a command. Return its exit status and which string of `watch` its standard error had last."""
    line = subprocess.list2cmdline(command) if os.name == "nt" else " ".join(shlex.quote(word) for word in command)
    print("\n$ " + line, flush=True)
    environment = dict(os.environ)
    if environment.get("CI", "").lower() not in ("", "0", "false"):
        environment.update(NO_COLOR="1", PIP_NO_INPUT="1", PIP_PROGRESS_BAR="off")
        environment.pop("FORCE_COLOR", None)
    found = None
    # Standard output stays the terminal's own, so that progress bars work.
    with subprocess.Popen(
        command, env=environment, stderr=subprocess.PIPE if watch else None, universal_newlines=True, errors="replace"
    ) as process:
        while True:
            try:
                for text in process.stderr or ():
                    found = next((words for words in watch if words in text), found)
                    sys.stderr.write(text)
                    sys.stderr.flush()
                status = process.wait()
                break
            except KeyboardInterrupt:
                continue  # Ctrl-C reaches the command too: let it end in its own way
    return (128 - status if status < 0 else status), found


def give_up(what, status, found=None):
    """End after a command of an installation has failed, with the reason where it is known."""
    if found:
        fail(REASONS[found])
    if shutil.disk_usage(str(ROOT)).free < 5e7:
        fail(FULL)
    killed = " was killed, most likely because memory ran out;" if status == 137 else " failed (see above);"
    fail(what + killed + " the same command continues it")


def answers(python, *arguments):
    """Whether a Python exits with status 0. It gets no package index, and its output is dropped."""
    environment = {key: value for key, value in os.environ.items() if key != "PIP_FIND_LINKS"}
    environment["PIP_CONFIG_FILE"] = os.devnull
    try:
        return not subprocess.call(
            [str(python), *arguments], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
    except OSError:
        return False


def has_packages(python, names):
    """Whether everything in these requirement files is installed, in any version that they allow."""
    requirements = [word for name in names for word in ("-r", str(ROOT / name))]
    return answers(python, "-m", "pip", "install", "--dry-run", "--no-index", "--no-deps", *requirements)


def find_environment(names):
    """Return the Python to use and the folder of its environment, after making `.venv` if there is no other."""
    own = ROOT / ".venv"
    python = own / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    in_conda = os.environ.get("CONDA_PREFIX") == sys.prefix and os.environ.get("CONDA_DEFAULT_ENV") != "base"
    if sys.prefix != sys.base_prefix or in_conda:
        return sys.executable, Path(sys.prefix)

    if own.exists() and answers(python, "-c", "pass"):
        supported = "import sys; sys.exit(not {} <= sys.version_info[:2] <= {})".format(OLDEST, NEWEST)
        if not answers(python, "-c", supported):
            fail(".venv has a Python that is too old or too new; delete that folder and run this again")
        return str(python), own
    if not own.exists() and has_packages(sys.executable, names):
        return sys.executable, Path(sys.prefix)

    if not (importlib.util.find_spec("venv") and importlib.util.find_spec("ensurepip")):
        fail(
            "this Python cannot make virtual environments, since its venv or ensurepip module is missing; "
            "on Debian and Ubuntu install it with: apt install python{}.{}-venv".format(*sys.version_info[:2])
        )
    # An existing one has no Python that runs, for example because an upgrade has removed the Python it was made from.
    clear = ["--clear"] if own.exists() else []
    status, _ = run([sys.executable, "-m", "venv", *clear, str(own)])
    if status:
        give_up("making the virtual environment {}".format(own), status)
    return str(python), own


def stamp(prefix, name):
    """The file in an environment that records which state of a requirements file is installed, and its content then."""
    parts = [hashlib.sha256((ROOT / file).read_bytes()).hexdigest() for file in (name, CONSTRAINTS)]
    path = prefix / "jiezi-{}.sha256".format(Path(name).name)
    return path, hashlib.sha256("".join(parts).encode()).hexdigest() + "\n"


def reaches(url, seconds=3):
    """Whether a page can be read within so many seconds, the look-up of its name and a proxy included."""
    pages = []

    def fetch():
        try:
            with urllib.request.urlopen(url, timeout=seconds) as page:
                pages.append(page.read(1))
        except (OSError, ValueError):
            pass

    thread = threading.Thread(target=fetch, daemon=True)
    thread.start()
    thread.join(seconds)
    return bool(pages)


def choose_torch(python):
    """Where to install torch from before everything else (None: wherever pip finds it), and how much is downloaded.

    An index in pip's settings is the user's choice, and is not overridden.
    """
    build = torch_build()
    usual = "about {} GB to download".format(3 if sys.platform == "linux" else 0.3)
    if not build:
        return None, usual
    settings = subprocess.run([python, "-m", "pip", "config", "list"], stdout=subprocess.PIPE).stdout.decode()
    if any(word in settings for word in ("index-url", "find-links", "no-index")):
        return None, "{}, unless the index in pip's settings has another torch than PyPI".format(usual)
    url = TORCH_INDEX + build
    if not reaches(url + "/torch/"):
        return None, "{}, as {} cannot be reached for a torch that suits this machine better".format(usual, url)
    return url, "about {} GB to download".format({"cpu": 0.4, "cu126": 3, "cu130": 2}[build])


def install(python, prefix, names):
    """Bring an environment to the tested versions, unless its stamps say that it has them.

    An environment of the user's own is left as it is if its packages satisfy the requirements, and keeps its torch,
    which was chosen for a machine, if others are missing.
    """
    stamps = [stamp(prefix, name) for name in names]
    ours = prefix.resolve() == (ROOT / ".venv").resolve()
    if all(path.exists() and path.read_text() == content for path, content in stamps):
        return
    if not ours and has_packages(python, names):
        return
    # uv makes environments without pip, and so does venv if it is interrupted.
    if not answers(python, "-m", "pip", "--version"):
        status, _ = run([python, "-m", "ensurepip", "--default-pip"])
        if status:
            give_up("putting pip into the environment of {}".format(python), status)
    for path in prefix.glob("jiezi-*.sha256"):
        path.unlink()  # first, so that the next run continues an installation that is interrupted
    if ours:
        # pip writes RECORD last: without it a package was cut off, yet pip would take it for installed.
        for folder in prefix.glob("**/site-packages/*.dist-info"):
            if not (folder / "RECORD").exists():
                shutil.rmtree(str(folder))
    command = [python, "-m", "pip", "install", "--disable-pip-version-check"]
    pins = ["-c", CONSTRAINTS]
    has_torch = ["-m", "pip", "install", "--dry-run", "--no-index", "--no-deps", "torch"]
    if not ours and answers(python, *has_torch):
        pins = []
    url, size = None, "torch is installed already, about 0.2 GB to download"
    if pins and not answers(python, *has_torch, *pins):
        url, size = choose_torch(python)
    print("\nInstalling packages into {}: {}".format(prefix, size), flush=True)
    if url:
        status, found = run([*command, "--retries", "1", "--no-deps", "--index-url", url, "torch", *pins], REASONS)
        if status and REASONS.get(found, NO_INDEX) != NO_INDEX:
            give_up("the installation", status, found)
        if status:
            print("\nContinuing with the torch that pip finds elsewhere", flush=True)
    status, found = run([*command, *(word for name in names for word in ("-r", name)), *pins], watch=REASONS)
    if status:
        give_up("the installation", status, found)
    for path, content in stamps:
        path.write_text(content)


def minutes(text):
    if not 0 < float(text) < 1e6:
        raise argparse.ArgumentTypeError("must be above 0, not " + text)
    return float(text)


def parse_flags(arguments):
    """The flags of the demonstration; here, so that a wrong one is refused before anything is installed."""
    parser = argparse.ArgumentParser(
        prog="quickstart.py", usage=HELP.splitlines()[0][7:], add_help=False, allow_abbrev=False
    )
    parser.add_argument("--minutes", type=minutes, default=15)
    parser.add_argument("--clean", action="store_true")
    parser.add_argument("--no-chat", action="store_true")
    return parser.parse_args(arguments)


def tour(arguments):
    """Train and chat, in the environment; return the exit status."""
    flags = parse_flags(arguments)
    switches = (["--clean"] if flags.clean else []) + (["--no-chat"] if flags.no_chat else [])
    python, prefix = find_environment([CORE])
    install(python, prefix, [CORE])
    return run([python, "-m", "demo.tour", "--minutes", "{:g}".format(flags.minutes), *switches])[0]


def test(pytest_arguments):
    """Run every check in turn and return the exit status of the first that fails, else 0."""
    names = [CORE, TEST] + (EXTRA if "extra" in pytest_arguments else [])
    python, prefix = find_environment(names)
    install(python, prefix, names)
    for command in (
        ["pip", "--disable-pip-version-check", "check"],
        ["ruff", "check", "."],
        ["ruff", "format", "--check", "."],
        ["pytest", "-n", "auto", "--dist", "loadfile", *pytest_arguments],  # tests/conftest.py: "auto"
    ):
        status, _ = run([python, "-m", *command])
        if status:
            return status
    return 0


def rewards(arguments):
    """The demonstration of 5-grpo.py; return the exit status."""
    parser = argparse.ArgumentParser(prog="quickstart.py rewards", allow_abbrev=False)
    parser.add_argument("--minutes", type=minutes, default=3, help="of training with rewards (default: 3)")
    flags = parser.parse_args(arguments)
    python, prefix = find_environment([CORE])
    install(python, prefix, [CORE])
    return run([python, "-m", "demo.rewards", "--minutes", "{:g}".format(flags.minutes)])[0]


COMMANDS = {"test": test, "rewards": rewards}


def main(arguments):
    check_python(sys.version_info)
    if arguments[:1] in (["-h"], ["--help"]) or arguments[1:] in (["-h"], ["--help"]):
        print(HELP, end="")
        return 0
    os.chdir(str(ROOT))
    if not arguments or arguments[0].startswith("-"):
        return tour(arguments)
    name, *rest = arguments
    if name not in COMMANDS:
        fail("there is no command {!r}; python quickstart.py --help names them".format(name), status=2)
    return COMMANDS[name](rest)


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit(130)

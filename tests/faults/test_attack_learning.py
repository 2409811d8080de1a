"""An attack on learning from what is written: rewards, strangers' questions, functions, flags that do not go together.

Allowed is a reward from 0 to 1, or one line that says what is wrong; a run that is refused leaves nothing behind.
"""

import json

import numpy as np
import pytest
from helpers import TOKENIZER, make_documents, make_pairs, records, write_data

from corpus.prepared import writing_prepared
from engine.session import Reply, Session
from model.chat import IM_END, TOOL_CALL, encode, encode_chat, load_tokenizer
from training import rollouts
from training.rewards import REWARDS

SHORT = "--questions 2 --generations 2 --max_new_tokens 12 --max_seq_len 64 --log_interval 1 --eval_rows 2".split()
SHORT += ["--max_steps", "2", "--warmup_steps", "1"]
TASK = {"answer": "42", "numbers": [6, 7]}

# ------------------------------------------------------------------------------------------------- answers of a model

ANSWERS = [
    *(
        "",
        " ",
        "\n",
        "\0",
        "\ud800",
        "\ufeff42",
        "42\u200b",
        "４２",
        "٤٢",
        "42e0",
        "+42",
        "4 2",
        "42 42",
        "42;",
        "0x2a",
    ),
    *("43." + "0" * 5000, "9" * 5000, "-" * 5000, "1" * 400, "1e999", "inf", "nan", "-nan", "∞", "42/0", "None"),
    *("(" * 5000 + "42" + ")" * 5000, "6*7" + "+0" * 5000, "6*7" * 5000, "7*6*1", "6*7+0", "6*7-0*" + "9" * 5000),
    *("__import__('os').abort()", "{}", "[42]", '"42"', "<|im_end|>", "42</think>", "答案是42", "42\n42", "^42$", ".*"),
    *("6*7 = 42", "6×7", "6**7", "67", "6 7", "07*6", "7.0*6", "6*7#", "(6)(7)", "6\n*7"),
]
RIGHT = {"exact": set(), "number": {"+42"}, "pattern": set(), "countdown": {"6×7", "07*6", "6\n*7"}}


@pytest.mark.parametrize("reward", REWARDS)
def test_no_answer_but_the_right_one_is_rewarded_or_an_error(reward):
    assert REWARDS[reward](Reply("42" if reward != "countdown" else "6*7"), TASK) == 1
    for answer in ANSWERS:
        assert REWARDS[reward](Reply(answer), TASK) == (answer in RIGHT[reward]), ascii(answer[:50])


# ----------------------------------------------------------------------------------------- questions and their notes


def questions(folder, note) -> None:
    """Questions with these notes, whatever they are."""
    tokenizer = load_tokenizer(TOKENIZER)
    with writing_prepared(folder, "rl", TOKENIZER, noted=True) as writer:
        for i in range(8):
            ids, _ = encode_chat(tokenizer, [{"role": "user", "content": f"{i} 加 1？"}], add_generation_prompt=True)
            writer.add("val" if i < 2 else "train", [(np.array(ids, writer.dtype).tobytes(), b"")], note=note)


NOTES = {
    **{f"a line {line[:12]}": ("exact", line) for line in ("3", "[]", "null", '"x"', "{", "", "[" * 100_000, "NaN")},
    "no answer": ("exact", "{}"),
    **{
        f"the answer {value!r:.20}": ("exact", json.dumps({"answer": value})) for value in (3, None, [], {"a": 1}, True)
    },
    **{
        f"the number {value!r:.20}": ("number", json.dumps({"answer": value}))
        for value in ("", "x", None, [], "9" * 5000)
    },
    **{
        f"a tolerance of {value!r}": ("number", json.dumps({"answer": "1", "tolerance": value}))
        for value in ("x", [], None)
    },
    **{
        f"the pattern {value!r:.20}": ("pattern", json.dumps({"answer": value}))
        for value in ("(", "*", "[", 3, "(?P<x", "\\")
    },
    **{
        f"the numbers {value!r:.20}": ("countdown", json.dumps({"answer": "1", "numbers": value}))
        for value in (3, "x", None, [[]], [None], {})
    },
    "no numbers": ("countdown", '{"answer": "1"}'),
}


@pytest.fixture
def wordy(monkeypatch):
    """Whatever the model writes is taken for the answer 1."""
    monkeypatch.setattr(rollouts, "read_reply", lambda sequence, tokenizer: Reply("1"))


@pytest.mark.slow
@pytest.mark.parametrize("name", NOTES)
def test_a_note_that_cannot_be_judged_by_is_named(name, wordy, brief_dir, run_here, tmp_path):
    reward, note = NOTES[name]
    questions(tmp_path / "rl", note)
    flags = ["--data", tmp_path / "rl", "--init_from", brief_dir, "--out_dir", tmp_path / "out", *SHORT]
    result = run_here("5-grpo.py", *flags, "--reward", reward)
    if result.status:
        assert result.error_line(status=2)
        assert not (tmp_path / "out").exists()
    else:  # the answer is wrong whatever the note may mean
        assert reward in ("number", "countdown")


FUNCTIONS = {
    "raises": "def f(reply, task): raise KeyError('a\\nb')",
    "takes too little": "def f(reply): return 1",
    "takes nothing": "def f(): return 1",
    **{
        f"gives {value}"[:30]: f"def f(reply, task): return {value}"
        for value in (
            "None",
            "'x'",
            "[]",
            "float('nan')",
            "float('inf')",
            "-float('inf')",
            "10**400",
            "1j",
            "{}",
            "object()",
        )
    },
    "leaves": "import sys\ndef f(reply, task): sys.exit(3)",
    "recurses": "def f(reply, task): return f(reply, task)",
    "is a class": "class f:\n    def __init__(self, reply, task): pass",
    "is no function": "f = 3",
    "is not there": "g = 3",
    "cannot be read": "def f(:",
    "fails at once": "1 / 0",
}


@pytest.mark.slow
@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_reward_of_the_users_that_fails_is_one_line(name, wordy, tasks, brief_dir, run_here, tmp_path):
    (tmp_path / "mine.py").write_text(FUNCTIONS[name])
    flags = ["--data", tasks, "--init_from", brief_dir, "--out_dir", tmp_path / "out", *SHORT]
    result = run_here("5-grpo.py", *flags, "--reward", f"{tmp_path / 'mine.py'}:f")
    if name == "leaves":  # as it was told to
        assert result.status == 3
    else:
        assert result.error_line(status=2)
    assert not (tmp_path / "out").exists()


REWARD_NAMES = [
    "",
    ":",
    ":f",
    "exact:f",
    "json:loads",
    "x.py",
    "x.py:",
    ".py:f",
    "/dev/null:f",
    "os.py:abort",
    "EXACT",
    "exact ",
    "../x.py:f",
]


@pytest.mark.slow
@pytest.mark.parametrize("name", REWARD_NAMES)
def test_a_name_of_no_reward(name, tasks, brief_dir, run_here, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.py").write_text("x = 1")
    flags = ["--data", tasks, "--init_from", brief_dir, "--out_dir", tmp_path / "out", *SHORT]
    assert run_here("5-grpo.py", *flags, "--reward", name).error_line(status=2)


CALLS = [
    '{"name": [], "arguments": {}}',
    '{"name": {"a": 1}}',
    "no JSON",
    '{"name": "calculator", "arguments": 3}',
    "[" * 60,
]


@pytest.mark.slow
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("script", ["5-grpo.py", "6-distill.py"])
def test_calls_that_are_none_do_not_end_a_run(script, call, tasks, brief_dir, run_here, tmp_path, monkeypatch):
    """The model begins with this call, and goes on by itself."""
    sequence = Session.sequence

    def scripted(self, prompt, seed=None):
        found = sequence(self, prompt, seed)
        found.forced.extend([TOOL_CALL, *encode(self.tokenizer, call), TOOL_CALL + 1, IM_END])
        return found

    monkeypatch.setattr(Session, "sequence", scripted)
    flags = ["--data", tasks, "--init_from", brief_dir, "--out_dir", tmp_path / "out", *SHORT, "--tools", "calculator"]
    flags += ["--teacher", brief_dir, "--mode", "on_policy"] if script == "6-distill.py" else []
    result = run_here(script, *flags, "--max_seq_len", 256, "--max_new_tokens", 150)
    assert result.status == 0, result.err
    assert [record["step"] for record in records(tmp_path / "out")] == [0, 1, 2]


# --------------------------------------------------------------------------------------- flags that do not go together

GRPO = {
    **{
        f"{flag} {value}": [f"--{flag}", value]
        for flag in ("questions", "generations", "max_new_tokens", "rollout_rows", "updates")
        for value in (0, -1, "x", "1e3", 10**30 if flag == "max_new_tokens" else "")
    },
    **{
        f"{flag} {value}": [f"--{flag}", value]
        for flag in ("beta", "clip_low", "clip_high", "learning_rate", "grad_clip")
        for value in ("nan", "inf", "-1", "x")
    },
    "loss x": ["--loss", "x"],
    "shard": ["--shard"],
    "shard auto": ["--shard", "--batch_size", "auto"],
    "no data": ["--data", "nowhere"],
    "texts": ["--data", "TEXTS"],
    "chats": ["--data", "CHATS"],
    "pairs": ["--data", "PAIRS"],
    "a file": ["--data", "FILE"],
    "mixed": ["--data", "TASKS", "TASKS"],
    "mix": ["--mix", "x=1"],
    "no model": ["--init_from", "nowhere"],
    "data for a model": ["--init_from", "TASKS"],
    "its own model": ["--out_dir", "MODEL"],
    "its own data": ["--out_dir", "TASKS"],
    "a file for its place": ["--out_dir", "FILE"],
    "rank -1": ["--lora_rank", -1],
    "targets": ["--lora_rank", 2, "--lora_targets", "lm_head"],
    "alpha": ["--lora_rank", 2, "--lora_alpha", "nan"],
    "resume nothing": ["--resume"],
}
DISTILL = {
    **{
        f"keep layers {value}": ["--keep_layers", *value]
        for value in ([-1], [0, 0], [1, 0], [99], [10**30], ["x"], [0.5])
    },
    **{f"keep ffn {value}": ["--keep_ffn", value] for value in (0, -1, 256, 10**30, "x")},
    **{f"temperature {value}": ["--temperature", value] for value in (0, -1, "nan", "inf", "x")},
    **{f"jsd {value}": ["--divergence", "jsd", "--jsd_beta", value] for value in (0, 1, 2, -1, "nan")},
    **{f"ce_weight {value}": ["--ce_weight", value] for value in (-1, "nan", "inf")},
    "divergence x": ["--divergence", "x"],
    "mode x": ["--mode", "x"],
    "preset and rank": ["--preset", "tiny", "--init_from", "MODEL", "--lora_rank", 2],
    "preset and layers": ["--preset", "tiny", "--keep_layers", 0],
    "layers and rank": ["--keep_layers", 0, "--lora_rank", 2],
    "questions for logits": ["--data", "TASKS"],
    "pairs for logits": ["--data", "PAIRS"],
    "texts on policy": ["--mode", "on_policy", "--data", "TEXTS"],
    "pairs on policy": ["--mode", "on_policy", "--data", "PAIRS"],
    "texts for answers": ["--mode", "text", "--data", "TEXTS"],
    "pairs for answers": ["--mode", "text", "--data", "PAIRS"],
    "neurons on policy": ["--mode", "on_policy", "--data", "TASKS", "--keep_ffn", 8],
    "shard on policy": ["--mode", "on_policy", "--data", "TASKS", "--shard"],
    "right ones of chats": ["--mode", "text", "--only_right"],
    "0 prompts": ["--mode", "text", "--prompts", 0],
    "a reward that is none": ["--mode", "on_policy", "--data", "TASKS", "--reward", "x"],
    "a tool that is none": ["--mode", "on_policy", "--data", "TASKS", "--tools", "x"],
    "no teacher": ["--teacher", "nowhere"],
    "data for a teacher": ["--teacher", "CHATS"],
    "a file for a teacher": ["--teacher", "FILE"],
    "over the teacher": ["--out_dir", "MODEL"],
    "too long for the teacher": ["--max_seq_len", 10**6],
    "no room for an answer": ["--mode", "on_policy", "--data", "TASKS", "--max_new_tokens", 64],
}


@pytest.fixture(scope="module")
def folders(data, chat_data, tasks, brief_dir, tmp_path_factory):
    pairs = make_pairs(12)
    folder = tmp_path_factory.mktemp("folders")
    (folder / "file").write_text("precious")
    found = {"TEXTS": data, "CHATS": chat_data, "TASKS": tasks, "MODEL": brief_dir, "FILE": folder / "file"}
    return found | {"PAIRS": write_data(folder / "dpo", pairs[4:], pairs[:4], kind="dpo")}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "name"), [("5-grpo.py", name) for name in GRPO] + [("6-distill.py", name) for name in DISTILL]
)
def test_flags_that_do_not_go_together(script, name, folders, run_here, tmp_path):
    more = GRPO[name] if script == "5-grpo.py" else DISTILL[name]
    own = ["--init_from", folders["MODEL"], "--out_dir", tmp_path / "out", *SHORT]
    own += ["--data", folders["TASKS" if script == "5-grpo.py" else "CHATS"]]
    own += ["--teacher", folders["MODEL"]] if script == "6-distill.py" else []
    result = run_here(script, *own, *[folders.get(word, word) for word in more])
    assert result.status == 2, (result.out, result.err)
    assert "error: " in result.err.splitlines()[-1]
    assert "Traceback" not in result.err
    assert not [path for path in tmp_path.rglob("*") if path.suffix == ".safetensors"]
    assert folders["FILE"].read_text() == "precious"


def test_documents_that_hold_no_answer_are_no_questions(folders, run_here, tmp_path):
    """Chats whose answers are all masked, as a stranger may make them."""
    chats = [(ids, [0] * len(ids)) for ids, _ in make_documents("sft", 8, seed=3)]
    write_data(tmp_path / "masked", chats[2:], chats[:2], kind="sft")
    own = ["--init_from", folders["MODEL"], "--teacher", folders["MODEL"], "--out_dir", tmp_path / "out", *SHORT]
    for mode in ("on_policy", "text", "logits"):
        result = run_here("6-distill.py", *own, "--mode", mode, "--data", tmp_path / "masked")
        assert result.error_line(status=2)

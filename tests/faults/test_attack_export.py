"""An attack on what is read from strangers and written for strangers: models, adapters, teachers, exports.

Allowed is one line that says what is wrong, or a right result; nothing is run, and no half of a file gets its name.
"""

import json
import logging
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from helpers import ROOT, SMALL_CONFIG, TIMEOUT, TOKENIZER, random_model
from safetensors.torch import load_file, save_file

import export
from base.cli import UserError
from engine.session import GenerationConfig
from model.chat import EOS, IM_END, SPECIAL_TOKENS, load_tokenizer
from model.checkpoint import check_model, load_model, load_outline, save_model
from model.gguf import write_modelfile
from model.lora import apply_lora

MEMORY = 2**28


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A chat model, and an adapter for it."""
    folder = tmp_path_factory.mktemp("saved")
    model = random_model(SMALL_CONFIG)
    model.stop_token_ids = [EOS, IM_END]
    save_model(folder / "sft", model, TOKENIZER)
    apply_lora(model, 2, targets=["q_proj"])
    save_model(folder / "lora", model, TOKENIZER, folder / "sft")
    for name in ("sft", "lora"):
        (folder / name / "sums.json").unlink()  # a stranger's files have the sums that suit him
    return folder


@pytest.fixture
def world(saved, tmp_path):
    """A copy of them to be spoilt, which shares what is not written anew."""
    shutil.copytree(saved / "sft", tmp_path / "sft", copy_function=os.link)
    shutil.copytree(saved / "lora", tmp_path / "lora", copy_function=os.link)
    return tmp_path


def change(path: Path, **changes):
    content = json.loads(path.read_text("utf-8")) | changes
    path.unlink()  # it shares its content
    path.write_text(json.dumps({name: value for name, value in content.items() if value != "GONE"}), "utf-8")


SIZES = [
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
]
SIZES += ["head_dim", "max_position_embeddings"]
BAD_CONFIGS = [
    *((size, value) for size in SIZES for value in (0, -1, 2**40, 1e300, "64", [64], True, 64.5)),
    *(("rms_norm_eps", value) for value in (-1, float("nan"), float("inf"), "x", [], 0)),
    *(("rope_theta", value) for value in (0, -1, float("nan"), float("inf"), "x", [])),
    *(
        ("rope_parameters", value)
        for value in (3, [], "x", {"rope_type": "yarn"}, {"rope_type": []}, {"rope_theta": None})
    ),
    *(("model_type", value) for value in (None, 3, [], {}, "gpt2", "../llama", "LLAMA", "qwen3\0", "glm4_moe")),
    *(("hidden_act", value) for value in ("relu", 3, [], {"a": 1})),
    *(("attention_bias", value) for value in (True, "x", 1)),
    *(("tie_word_embeddings", value) for value in ("no", 3, [])),
    *(("eos_token_id", value) for value in ("x", [[]], {}, -1, 2**70, [None], ["a"])),
    *(("quantization_config", value) for value in ({"quant_method": "gptq"}, 3, "x")),
    *(("layer_types", value) for value in (["sliding_attention"], 3, [[]], {"a": 1})),
]


@pytest.mark.parametrize(("field", "value"), BAD_CONFIGS, ids=str)
def test_a_strangers_config_is_read_or_refused_in_words(field, value, world):
    """Also what it may be read as takes no memory."""
    before = psutil.Process().memory_info().rss
    changes = {field: value} | ({"rope_parameters": "GONE"} if field == "rope_theta" else {})
    change(world / "sft/config.json", **changes)
    refusal, model = None, None
    try:
        load_outline(world / "sft")
        model = load_model(world / "sft")
    except UserError as error:
        refusal = str(error)
    if model:
        assert torch.isfinite(model.eval()(torch.arange(20, 30)[None])).all()
    else:
        assert refusal
        assert "\n" not in refusal
    assert psutil.Process().memory_info().rss < before + MEMORY


BAD_ADAPTERS = [
    *(("r", value) for value in (0, -1, 1.5, "2", None, [], True, 3, 2**16, 2**70)),
    *(("lora_alpha", value) for value in (0, -1, float("nan"), float("inf"), "4", None, [], 2**2000)),
    *(("lora_dropout", value) for value in (-1, 2, float("nan"), "x", [])),
    *(
        ("target_modules", value)
        for value in (
            [],
            "q_proj",
            ["x"],
            [3],
            [[]],
            {"q_proj": 1},
            ["lm_head"],
            None,
            "all-linear",
            ["../q_proj"],
            ["q_proj", "v_proj"],
        )
    ),
    *(("peft_type", value) for value in ("LOHA", 3, ["LORA"])),
    *(("use_dora", value) for value in (True, "x")),
    *(
        ("base_model_name_or_path", value)
        for value in (
            None,
            3,
            [],
            "",
            "\0",
            "\ud800",
            "a" * 5000,
            "/dev/zero",
            "/etc",
            "../" * 99,
            "http://x/y",
            "lora",
        )
    ),
]


@pytest.mark.parametrize(
    ("field", "value"), BAD_ADAPTERS, ids=lambda value: str(value)[:30].encode("ascii", "replace").decode()
)
def test_a_strangers_adapter_is_refused_in_words(field, value, world):
    before = psutil.Process().memory_info().rss
    change(world / "lora/adapter_config.json", **{field: value})
    with pytest.raises((UserError, OSError)) as error:
        load_model(world / "lora")
    assert "\n" not in str(error.value)
    assert psutil.Process().memory_info().rss < before + MEMORY


STOPS = [[99_999_999], [-5], [300], [], [[3]], ["x"], "x", None, 2.5, True, [4] * 10_000, {"a": 1}, [2**70]]


@pytest.mark.parametrize("ids", STOPS, ids=lambda ids: str(ids)[:30])
def test_stop_tokens_of_any_kind_in_a_modelfile(ids, world):
    change(world / "sft/generation_config.json", eos_token_id=ids)
    model = load_model(world / "sft")
    path = world / "Modelfile"
    if all(0 <= token_id < len(SPECIAL_TOKENS) for token_id in model.stop_token_ids):
        write_modelfile(path, model, Path("x.gguf"), load_tokenizer(TOKENIZER), vars(GenerationConfig()))
        stops = [line for line in path.read_text("utf-8").splitlines() if line.startswith("PARAMETER stop")]
        assert set(stops) <= {'PARAMETER stop "<|end_of_text|>"', 'PARAMETER stop "<|im_end|>"'}
        assert len(stops) == len(set(stops)) > 0
    else:
        with pytest.raises(UserError, match="not a control token"):
            write_modelfile(path, model, Path("x.gguf"), load_tokenizer(TOKENIZER), vars(GenerationConfig()))
        assert not path.exists()


TEMPLATES = {
    "none": b"",
    "a mistake": b"{% if %}",
    "an escape": b"{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "without end": b"{% for i in range(10**9) %}{% for j in range(10**9) %}x{% endfor %}{% endfor %}",
    "itself": b"{% include 'chat_template.jinja' %}",
    "a file": b"{% include '/etc/passwd' %}",
    "an error of its own": b"{{ raise_exception('x\ny') }}",
    "bytes": b"\xff\xfe",
    "a division": b"{{ 1 // 0 }}",
    "a name": b"{{ messages[0].nothing.nothing }}",
    "a large number": b"{{ 9**9**9 }}",
    "something else": b"{{ messages[0]['content'] }}",
}


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in TEMPLATES if name != "a large number"])
def test_a_template_that_is_none_is_not_exported(name, world, run_here):
    path = world / "sft/chat_template.jinja"
    path.unlink()
    path.write_bytes(TEMPLATES[name])
    result = run_here("export.py", world / "sft", "--to", "bf16", "--output", world / "out")
    assert result.error_line(status=result.status or 1)
    assert not (world / "out").exists()


TOKENIZERS = {
    "no merges": lambda content: content["model"].pop("merges"),
    "merges as texts": lambda content: content["model"].update(
        merges=[" ".join(pair) for pair in content["model"]["merges"]]
    ),
    "merges that are none": lambda content: content["model"].update(merges=[["x", "y"]]),
    "another kind": lambda content: content.update(
        model={"type": "WordLevel", "vocab": content["model"]["vocab"], "unk_token": "<unk>"}
    ),
    "another normalizer": lambda content: content.update(normalizer={"type": "Lowercase"}),
    "another splitting": lambda content: content.update(pre_tokenizer={"type": "Whitespace"}),
    "a word that becomes a control token": lambda content: content["added_tokens"].append(
        content["added_tokens"][4] | {"id": 4, "content": "the"}
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("to", ["gguf", "bf16"])
@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_tokenizer_of_another_kind_is_not_exported_as_ours(name, to, world, run_here):
    if to == "gguf":
        pytest.importorskip("gguf")
        pytest.importorskip("xllamacpp")
    path = world / "sft/tokenizer.json"
    content = json.loads(path.read_text("utf-8"))
    TOKENIZERS[name](content)
    path.unlink()
    path.write_text(json.dumps(content), "utf-8")
    result = run_here("export.py", world / "sft", "--to", to, "--output", world / "out")
    if result.status:
        assert result.error_line(status=result.status)
        assert not [*world.glob("out/*")]
    else:  # then what was exported encodes as it does: verify.py has looked
        assert "the tokens of" in result.out


NAMES = [
    "a b",
    "芥子",
    'a"b',
    "a'b",
    "$(id)",
    "a;b",
    "-rf",
    "{x}",
    "%s",
    "a#b",
    "a\nSYSTEM x",
    "a\r",
    "\x1b[2J",
    os.fsdecode(b"\xff"),
]


@pytest.mark.skipif(os.name == "nt", reason="names of POSIX")
@pytest.mark.parametrize("name", NAMES, ids=ascii)
def test_a_folders_name_says_nothing_in_a_modelfile_or_a_command(name, world, monkeypatch, capsys):
    (world / "sft").rename(world / name)
    monkeypatch.setattr(export, "export_gguf", lambda model, source, output, name, _: output / f"{name}-f16.gguf")
    monkeypatch.setattr(sys, "argv", ["export.py", str(world / name), "--to", "ollama", "--output", str(world / "out")])
    if not name.isprintable():
        with pytest.raises(UserError, match="cannot be shown"):
            export.main()
        return
    export.main()
    lines = (world / "out/Modelfile").read_text("utf-8").splitlines()
    assert lines[0] == f"FROM ./{name}-f16.gguf"
    assert {line.split()[0] for line in lines if line[:4].isupper()} == {"FROM", "TEMPLATE", "PARAMETER"}
    command = capsys.readouterr().out.strip().splitlines()[-1].removeprefix("next: ")
    said = subprocess.run(
        ["bash", "-c", f"ollama() {{ printf '%s\\n' \"$@\"; }}; {command}"], capture_output=True, text=True
    )
    assert said.stdout.splitlines() == ["create", name, "-f", str(world / "out/Modelfile")]


@pytest.mark.skipif(os.name == "nt", reason="links and pipes of POSIX")
@pytest.mark.parametrize("output", ["sft", "lora", "sft/x", "file", "file/x", ".", "pipe", "x" * 300, "link", "busy"])
@pytest.mark.slow
@pytest.mark.parametrize("to", ["gguf", "bf16"])
def test_places_where_nothing_may_be_put(output, to, world, run_here, monkeypatch):
    if to == "gguf":
        pytest.importorskip("gguf")
        pytest.importorskip("xllamacpp")
    monkeypatch.chdir(world)
    (world / "file").write_text("precious")
    os.mkfifo(world / "pipe")
    (world / "busy").mkdir()
    (world / "busy/file").write_text("precious")
    (world / "link").symlink_to(world / "busy")
    before = {path: path.read_bytes() for path in world.rglob("*") if path.is_file()}
    result = run_here("export.py", "sft", "--to", to, "--output", output)
    if result.status:
        assert result.error_line(status=result.status)
    else:  # a GGUF file goes beside what is there; a model into a folder of its own
        assert to == "gguf" or output == "sft/x"
    assert {path: path.read_bytes() for path in before} == before
    assert (world / "pipe").is_fifo()


# ------------------------------------------------------------------------------------------------------ interrupted


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
@pytest.mark.parametrize("to", ["gguf", "ollama", "bf16", "untied", "merged"])
def test_an_export_that_is_interrupted_leaves_nothing_by_its_name_or_the_whole(to, world):
    """At random moments, the file writing among them; then it is run to its end."""
    if to in ("gguf", "ollama"):
        pytest.importorskip("gguf")
        pytest.importorskip("xllamacpp")
    command = [sys.executable, ROOT / "export.py", world / "sft", "--to", to, "--output", world / "out"]
    command += ["--lora", world / "lora"] if to == "merged" else []
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    options = dict(cwd=world, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)

    def names() -> set[str]:
        return {path.name for path in (world / "out").glob("[!.]*")}

    begun = time.monotonic()
    process = subprocess.Popen(command, **options)
    assert process.wait(TIMEOUT) == 0, process.stderr.read()
    whole, seconds = names(), time.monotonic() - begun
    shutil.rmtree(world / "out")
    rng = random.Random(to)
    for number in (signal.SIGKILL, signal.SIGTERM, signal.SIGINT) * 2:
        process = subprocess.Popen(command, **options)
        time.sleep(rng.uniform(0.3, 1) * seconds)
        process.send_signal(number)
        _, err = process.communicate(timeout=TIMEOUT)
        assert "Traceback" not in err
        assert names() <= whole
        if "model.safetensors" in names():
            assert names() == whole
            check_model(world / "out")
        assert load_file(world / "sft/model.safetensors")
    process = subprocess.Popen(command, **options)
    assert process.wait(TIMEOUT) == 0, process.stderr.read()
    assert names() == whole


# ------------------------------------------------------------------------------------------------- a stranger's teacher

EVIL = 'open("pwned", "w").close()\nclass Model: pass\n'
TEACHERS = {  # changes of a GPT-2's config.json
    "code of its own": {"auto_map": {"AutoConfig": "evil.Model", "AutoModelForCausalLM": "evil.Model"}},
    "code of its own, of an unknown kind": {
        "model_type": "evil",
        "auto_map": {"AutoConfig": "evil.Model", "AutoModelForCausalLM": "evil.Model"},
    },
    "an unknown kind": {"model_type": "nothing"},
    "no kind": {"model_type": "GONE"},
    "an encoder": {"model_type": "bert"},
    **{
        f"{field} {value!r}": {field: value}
        for field in ("n_layer", "n_head", "n_embd")
        for value in (0, -1, "x", None, 1.5, [])
    },
    "a vocabulary of 7": {"vocab_size": 7},
    "an unknown activation": {"activation_function": "evil"},
    "GPTQ": {"quantization_config": {"quant_method": "gptq", "bits": 4}},
    "bitsandbytes": {"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}},
    "an unknown format": {"dtype": "float3"},
    "an attention from a hub": {"_attn_implementation": "evil/kernel"},
}


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    from transformers import GPT2Config, GPT2LMHeadModel

    folder = tmp_path_factory.mktemp("teacher") / "gpt2"
    sizes = dict(n_positions=64, n_embd=32, n_layer=1, n_head=2)
    GPT2LMHeadModel(GPT2Config(vocab_size=6400, bos_token_id=1, eos_token_id=2, **sizes)).save_pretrained(folder)
    shutil.copy(TOKENIZER / "tokenizer.json", folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", TEACHERS)
def test_a_strangers_teacher_teaches_or_is_refused_and_runs_no_code(
    name, gpt2, data, base_dir, tmp_path, run_here, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(logging, "raiseExceptions", False)  # its log holds another test's stderr
    shutil.copytree(gpt2, tmp_path / "gpt2")
    (tmp_path / "gpt2/evil.py").write_text(EVIL)
    change(tmp_path / "gpt2/config.json", **TEACHERS[name])
    flags = ["--data", data, "--init_from", base_dir, "--teacher", tmp_path / "gpt2", "--out_dir", tmp_path / "out"]
    result = run_here(
        "6-distill.py", *flags, "--max_seq_len", 64, "--max_steps", 1, "--batch_size", 2, "--eval_rows", 1
    )
    if result.status:
        assert result.status in (1, 2)  # 1: it loads, and has no finite number to say
        assert result.err.splitlines()[-1].startswith("error: ")  # after what transformers says
        assert not (tmp_path / "out/model.safetensors").exists()
    assert not list(tmp_path.rglob("pwned"))
    assert not (ROOT / "pwned").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    "spoil", ["cut", "a pickle", "none", "a header of 2^62", "other shapes", "NaN", "pytorch_model.bin"]
)
def test_a_teachers_weights(spoil, gpt2, data, base_dir, tmp_path, run_here, monkeypatch):
    monkeypatch.setattr(logging, "raiseExceptions", False)
    shutil.copytree(gpt2, tmp_path / "gpt2")
    path = tmp_path / "gpt2/model.safetensors"
    content = path.read_bytes()
    tensors = load_file(path)
    path.unlink()
    if spoil == "cut":
        path.write_bytes(content[:-1000])
    elif spoil == "a pickle":
        path.write_bytes(pickle.dumps({"x": 1}))
    elif spoil == "a header of 2^62":
        path.write_bytes((2**62).to_bytes(8, "little") + content[8:])
    elif spoil == "other shapes":
        save_file({name: tensor[:1].clone() for name, tensor in tensors.items()}, path, {"format": "pt"})
    elif spoil == "NaN":
        save_file({name: tensor * torch.nan for name, tensor in tensors.items()}, path, {"format": "pt"})
    elif spoil == "pytorch_model.bin":
        torch.save(tensors, path.with_name("pytorch_model.bin"))
    flags = ["--data", data, "--init_from", base_dir, "--teacher", tmp_path / "gpt2", "--out_dir", tmp_path / "out"]
    result = run_here(
        "6-distill.py", *flags, "--max_seq_len", 64, "--max_steps", 1, "--batch_size", 2, "--eval_rows", 1
    )
    assert result.status == (1 if spoil == "NaN" else 2)
    assert result.err.splitlines()[-1].startswith("error: ")

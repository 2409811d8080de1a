"""Other people's libraries take our folders as they are: transformers, PEFT, TRL, wandb; and what vLLM asks of them.

transformers, PEFT and wandb are there in every environment for tests; TRL is of requirements/interop.txt.
"""

import json
import time

import pytest
import torch
from helpers import SHORT_RUN, TIMEOUT, TOKENIZER, greedy, records, sharp_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

from model.chat import EOS, IM_END, encode_chat, load_tokenizer
from model.checkpoint import load_adapter, load_model, save_model
from model.LMConfig import PRESETS, LMConfig
from model.lora import apply_lora, lora_layers, merge_lora
from training.distillation import Divergence, divergence_sum

QUESTION = [{"role": "user", "content": "你好"}]


@pytest.fixture(scope="module")
def sft(tmp_path_factory):
    """A chat model in which no two tokens are nearly equally probable."""
    model = sharp_model(LMConfig(**PRESETS["tiny"]))
    model.stop_token_ids = [EOS, IM_END]
    folder = tmp_path_factory.mktemp("out") / "sft"
    save_model(folder, model, TOKENIZER)
    return folder


def our_answer(folder, n: int) -> list[int]:
    ids, _ = encode_chat(load_tokenizer(folder), QUESTION, add_generation_prompt=True)
    return greedy(load_model(folder).eval(), [ids], n)[0]


def test_generate_and_pipeline_answer_as_we_do(sft):
    network, tokenizer = AutoModelForCausalLM.from_pretrained(sft), AutoTokenizer.from_pretrained(sft)
    inputs = tokenizer.apply_chat_template(QUESTION, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    written = network.generate(**inputs, max_new_tokens=16, do_sample=False)[0, inputs.input_ids.shape[1] :].tolist()
    assert written == our_answer(sft, 16)
    chat = pipeline("text-generation", model=str(sft), device="cpu")
    answer = chat(QUESTION, max_new_tokens=16, do_sample=False)[0]["generated_text"][-1]
    assert answer == {"role": "assistant", "content": tokenizer.decode(written, skip_special_tokens=True)}


def test_peft_loads_and_merges_our_adapter_and_we_load_its(sft, tmp_path):
    from peft import LoraConfig, PeftModel, get_peft_model

    model = load_model(sft)
    apply_lora(model, 4)
    for layer in lora_layers(model).values():
        torch.nn.init.normal_(layer.lora_B.weight, std=0.02)
    save_model(tmp_path / "lora", model, TOKENIZER, sft)
    ids = torch.arange(20, 50)[None]
    with torch.no_grad():
        theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(sft), tmp_path / "lora")
        assert torch.allclose(theirs(ids).logits, model.eval()(ids), atol=1e-3)
        merged = theirs.merge_and_unload()
        merge_lora(model)
        assert torch.allclose(merged(ids).logits, model(ids), atol=1e-3)

        settings = LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        peft_model = get_peft_model(AutoModelForCausalLM.from_pretrained(sft), settings).eval()
        peft_model.save_pretrained(tmp_path / "theirs")
        model = load_model(sft).eval()
        load_adapter(model, tmp_path / "theirs", sft)
        assert torch.allclose(peft_model(ids).logits, model.eval()(ids), atol=1e-3)


def trl_flags(folder):
    return dict(
        output_dir=str(folder),
        max_steps=2,
        per_device_train_batch_size=2,
        learning_rate=1e-3,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        report_to="none",
        save_strategy="no",
        logging_steps=1,
        disable_tqdm=True,
    )


def assert_trained(trainer, folder, sft):
    """Two steps of finite losses; what TRL saves is a model of ours with other weights."""
    losses = [record["loss"] for record in trainer.state.log_history if "loss" in record]
    assert len(losses) == 2
    assert all(0 < loss < 20 for loss in losses)
    trainer.save_model(str(folder))
    before, after = load_model(sft).state_dict(), load_model(folder).state_dict()
    assert before.keys() == after.keys()
    assert not torch.equal(before["model.norm.weight"], after["model.norm.weight"])
    return losses


@pytest.mark.extra
def test_trl_fine_tunes_it(sft, tmp_path):
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    answer = [{"role": "assistant", "content": "你好！我是芥子。"}]
    rows = Dataset.from_list([{"messages": QUESTION + answer}] * 8)
    config = SFTConfig(**trl_flags(tmp_path / "run"), max_length=64)
    trainer = SFTTrainer(model=str(sft), args=config, train_dataset=rows)
    trainer.train()
    assert_trained(trainer, tmp_path / "trained", sft)


@pytest.mark.extra
def test_trl_learns_its_preferences(sft, tmp_path):
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    pair = {
        "prompt": QUESTION,
        "chosen": [{"role": "assistant", "content": "您好。"}],
        "rejected": [{"role": "assistant", "content": "哼。别烦我。"}],
    }
    config = DPOConfig(**trl_flags(tmp_path / "run"), max_length=64)
    trainer = DPOTrainer(model=str(sft), args=config, train_dataset=Dataset.from_list([pair] * 8))
    trainer.train()
    losses = assert_trained(trainer, tmp_path / "trained", sft)
    assert losses[0] == pytest.approx(0.6931, abs=1e-3)  # ln 2, where model and reference are one


@pytest.mark.extra
@pytest.mark.parametrize(("kind", "trl_beta"), [("forward", 0), ("reverse", 1), ("jsd", 0.3)])
def test_trl_means_the_same_by_a_divergence(kind, trl_beta, monkeypatch):
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    from trl.experimental.gkd import GKDTrainer

    torch.manual_seed(0)
    hidden, weight = torch.randn(40, 8, requires_grad=True), torch.randn(50, 8, requires_grad=True)
    teacher_hidden, teacher_weight, labels = torch.randn(40, 16), torch.randn(50, 16), torch.arange(40)
    how = Divergence(kind, temperature=1.5, jsd_beta=trl_beta)
    loss, _ = divergence_sum(hidden, weight, teacher_hidden, teacher_weight, labels, how)
    logits = hidden @ weight.T, teacher_hidden @ teacher_weight.T
    theirs = GKDTrainer.generalized_jsd_loss(*logits, beta=trl_beta, temperature=1.5, reduction="sum")
    torch.testing.assert_close(loss, theirs)
    torch.testing.assert_close(
        torch.autograd.grad(loss, (hidden, weight)), torch.autograd.grad(theirs, (hidden, weight))
    )


def test_wandb_writes_a_run_offline(data, tmp_path, run_here, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_SILENT", "true")
    flags = [*SHORT_RUN, "--max_steps", "2", "--data", data, "--out_dir", tmp_path / "run", "--device", "cpu"]
    result = run_here("1-pretrain.py", *flags, "--wandb", "offline")
    assert result.status == 0, result.err
    (run,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    deadline = time.monotonic() + TIMEOUT
    while b"learning_rate" not in run.read_bytes():  # its service, another process, writes when it finds the time
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.mark.extra
def test_tensorboard_shows_a_run_and_what_it_did_after_it_was_resumed(data, tmp_path, run_here):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    flags = [*SHORT_RUN, "--data", data, "--out_dir", tmp_path / "run", "--log_interval", "1", "--tensorboard"]
    assert run_here("1-pretrain.py", *flags, "--max_steps", "2").status == 0
    assert run_here("1-pretrain.py", *flags, "--max_steps", "3", "--resume").status == 0
    events = EventAccumulator(str(tmp_path / "tensorboard/run")).Reload()
    assert [event.step for event in events.Scalars("loss")] == [1, 2, 3]
    assert [event.value for event in events.Scalars("loss")] == [
        pytest.approx(record["loss"]) for record in records(tmp_path / "run") if "loss" in record
    ]


EXPERTS = dict(use_moe=True, moe_intermediate_size=32)
ARCHITECTURES = {  # vLLM's registry of text models has all four
    "LlamaForCausalLM": dict(qk_norm=False),
    "Qwen3ForCausalLM": {},
    "Glm4MoeForCausalLM": EXPERTS,
    "Qwen2MoeForCausalLM": EXPERTS | dict(scoring_func="softmax"),
}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_files_are_what_vllm_asks_for(architecture, tmp_path, run_here):
    """Not run in vLLM. It picks the class by `architectures`, reads safetensors by Hugging Face's names, the tokenizer
    by AutoTokenizer, the chat template from it, and stop tokens from generation_config.json."""
    model = sharp_model(LMConfig(**PRESETS["tiny"] | ARCHITECTURES[architecture]))
    model.stop_token_ids = [EOS, IM_END]
    save_model(tmp_path / "sft", model, TOKENIZER)
    assert run_here("export.py", tmp_path / "sft", "--to", "untied").status == 0
    folder = tmp_path / "sft-untied"
    config = json.loads((folder / "config.json").read_text("utf-8"))
    assert config["architectures"] == [architecture]
    assert config["tie_word_embeddings"] is False  # its Glm4Moe never ties
    expected = AutoModelForCausalLM.from_pretrained(folder)
    assert type(expected).__name__ == architecture
    assert "lm_head.weight" in load_file(folder / "model.safetensors")
    assert json.loads((folder / "generation_config.json").read_text("utf-8"))["eos_token_id"] == [EOS, IM_END]
    assert "<|im_start|>" in AutoTokenizer.from_pretrained(folder).chat_template

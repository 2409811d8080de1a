"""The divergences of 6-distill.py against their definitions, and teachers of every kind against their own logits."""

import json
import math

import numpy as np
import pytest
import torch
from helpers import TOKENIZER, make_documents, random_ids, random_model, write_data
from transformers import AutoConfig, AutoModelForCausalLM

from base.cli import UserError
from model.checkpoint import load_model, save_model
from model.LMConfig import PRESETS, LMConfig
from model.lora import apply_lora, lora_layers
from training import loss
from training.distillation import Divergence, divergence_sum, load_teacher, plain_divergence_sum
from training.machine import Machine
from training.packing import PackedDataset
from training.rollouts import PromptDataset

CPU = Machine(0, 1, torch.device("cpu"), torch.float32)
KINDS = [
    Divergence("forward"),
    Divergence("reverse", temperature=1.7),
    Divergence("jsd", jsd_beta=0.3, ce_weight=0.2),
    Divergence("forward", temperature=0.5, ce_weight=1.5),
]


def made_up(tokens: int = 9, vocabulary: int = 3, dtype=torch.float64) -> list[torch.Tensor]:
    """The arguments of divergence_sum, but for the last."""
    generator = torch.Generator().manual_seed(0)
    sizes = [(tokens, 4), (vocabulary, 4), (tokens, 6), (vocabulary, 6)]
    tensors = [torch.randn(*size, generator=generator, dtype=dtype) for size in sizes]
    return [*tensors, torch.randint(0, vocabulary, (tokens,), generator=generator)]


@pytest.mark.parametrize("how", KINDS)
def test_the_divergence_is_the_sum_over_all_tokens_that_could_come_next(how):
    hidden, weight, teacher_hidden, teacher_weight, labels = made_up()
    loss, metrics = divergence_sum(hidden, weight, teacher_hidden, teacher_weight, labels, how)

    def distribution(logits: list[float], temperature: float) -> list[float]:
        powers = [math.exp(x / temperature) for x in logits]
        return [x / sum(powers) for x in powers]

    total = 0.0
    pairs = zip((hidden @ weight.T).tolist(), (teacher_hidden @ teacher_weight.T).tolist(), labels.tolist())
    for i, (student, teacher, label) in enumerate(pairs):
        p, q = distribution(student, how.temperature), distribution(teacher, how.temperature)
        b = how.jsd_beta
        if how.kind == "jsd":
            m = [b * y + (1 - b) * x for x, y in zip(p, q)]
            distance = sum(b * y * math.log(y / z) + (1 - b) * x * math.log(x / z) for x, y, z in zip(p, q, m))
        else:
            a, other = (q, p) if how.kind == "forward" else (p, q)
            distance = sum(x * math.log(x / y) for x, y in zip(a, other))
        p, q = distribution(student, 1), distribution(teacher, 1)
        entropies = [-sum(x * math.log(x) for x in of) for of in (p, q)]
        same = p.index(max(p)) == q.index(max(q))
        expected = [distance, -math.log(p[label]), float(same), *entropies]
        assert metrics[:, i].tolist() == pytest.approx(expected, abs=1e-9)
        total += distance - how.ce_weight * math.log(p[label])
    assert loss.item() == pytest.approx(total)


@pytest.mark.parametrize("how", KINDS)
def test_its_gradient_is_that_of_finite_differences_and_of_autograd(how, monkeypatch):
    monkeypatch.setattr(loss, "LOSS_CHUNK", 4)  # the nine tokens are three chunks
    hidden, weight, *rest = made_up()
    hidden.requires_grad_(), weight.requires_grad_()
    torch.autograd.gradcheck(lambda h, w: divergence_sum(h, w, *rest, how)[0], (hidden, weight))
    for scale in (1.0, 3.0):
        found = torch.autograd.grad(scale * divergence_sum(hidden, weight, *rest, how)[0], (hidden, weight))
        plain = torch.autograd.grad(scale * plain_divergence_sum(hidden, weight, *rest, how), (hidden, weight))
        torch.testing.assert_close(found, plain)


@pytest.mark.parametrize("how", KINDS)
def test_no_number_is_lost_where_the_two_are_certain_of_different_tokens(how):
    hidden, weight, teacher_hidden, teacher_weight, labels = made_up(dtype=torch.float32)
    hidden = (100 * hidden).requires_grad_()
    loss, metrics = divergence_sum(hidden, weight, -100 * teacher_hidden, teacher_weight, labels, how)
    loss.backward()
    assert loss.isfinite()
    assert metrics.isfinite().all()
    assert hidden.grad.isfinite().all()


def test_a_student_that_says_what_the_teacher_says_has_nothing_to_learn():
    hidden, weight, _, _, labels = made_up(40, 50)
    for kind in ("forward", "reverse", "jsd"):
        h = hidden.clone().requires_grad_()
        loss, metrics = divergence_sum(h, weight, hidden, weight, labels, Divergence(kind))
        loss.backward()
        assert loss.item() == pytest.approx(0, abs=1e-12)
        assert h.grad.abs().max() < 1e-12
        assert metrics[2].min() == 1


def test_logits_of_all_tokens_never_exist_at_a_time(monkeypatch):
    monkeypatch.setattr(loss, "LOSS_CHUNK", 16)
    hidden, weight, *rest = made_up(64, 1000, torch.float32)
    hidden.requires_grad_(), weight.requires_grad_()
    largest = 0

    class Watching(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            result = function(*args, **kwargs or {})
            sizes = [x.numel() for x in torch.utils._pytree.tree_leaves(result) if isinstance(x, torch.Tensor)]
            largest = max([largest, *sizes])
            return result

    with Watching():
        divergence_sum(hidden, weight, *rest, Divergence())[0].backward()
    assert largest == 16 * 1000


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_16_bits_loss_and_gradient_are_nearly_those_of_32(dtype):
    hidden, weight, *rest = made_up(300, 500, torch.float32)
    hidden.requires_grad_(), weight.requires_grad_()
    how = Divergence("reverse", ce_weight=0.1)
    expected = divergence_sum(hidden, weight, *rest, how)[0]
    gradients = torch.autograd.grad(expected, (hidden, weight))
    with torch.autocast("cpu", dtype):
        loss = divergence_sum(hidden, weight, *rest, how)[0]
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected.item(), rel=1e-2)
    for found, right in zip(torch.autograd.grad(loss, (hidden, weight)), gradients):
        assert found.dtype == torch.float32
        assert (found - right).norm() < 0.02 * right.norm()


# ------------------------------------------------------------------------------------------------------------- teachers


def test_a_chat_is_a_question_up_to_its_last_answer(tmp_path):
    chats = make_documents("sft", 20, seed=4)
    folder = write_data(tmp_path / "sft", chats, chats[:2], kind="sft")
    tasks = PromptDataset(folder, "train", max_seq_len=4096, max_new_tokens=8)
    several = 0
    for question, (ids, mask) in enumerate(chats):
        prompt = tasks.prompt(question)
        assert ids[: len(prompt)] == prompt
        assert (mask[len(prompt) - 1], mask[len(prompt)]) == (0, 1)
        rest = mask[len(prompt) :]
        assert rest == [1] * sum(rest) + [0]  # one answer, and the line's end
        several += 1 in mask[: len(prompt)]
    assert several, "no chat has an answer before its last"


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> PackedDataset:
    """Packed chats, several in a row."""
    chats = make_documents("sft", 12, seed=3)
    folder = write_data(tmp_path_factory.mktemp("data") / "sft", chats, chats[:2], kind="sft")
    return PackedDataset(folder, "train", 128)


def save_ours(folder, **changes):
    model = random_model(LMConfig(**PRESETS["tiny"] | changes))
    save_model(folder, model, TOKENIZER)
    return model


def save_foreign(folder, model_type: str, **sizes):
    """A model of another architecture with our tokenizer."""
    torch.manual_seed(0)
    common = dict(vocab_size=6400, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
    common |= dict(bos_token_id=1, eos_token_id=2, pad_token_id=0, num_key_value_heads=2, head_dim=16)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **common | sizes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(6 if parameter.dim() > 1 else 1)
    model.save_pretrained(folder)
    (folder / "tokenizer.json").write_bytes((TOKENIZER / "tokenizer.json").read_bytes())
    return model


def assert_is_taught(teacher, alone, rows: PackedDataset, atol=1e-3):
    """The teacher's logits for packed rows are those of alone(ids (1, n)) for each document by itself."""
    batch = rows.batch(np.arange(len(rows)))
    logits = teacher.hidden(batch) @ teacher.weight.mT  # (B, T, V)
    assert logits.shape[-1] == 6400
    for index in range(len(batch.documents)):
        here = batch.document_index == index
        with torch.no_grad():
            expected = alone(batch.input_ids[here][None])[0, :, :6400]
        torch.testing.assert_close(logits[here].float(), expected.float(), atol=atol, rtol=0)


@pytest.mark.parametrize("preset", ["tiny", "tiny-moe"])
def test_a_model_of_ours_teaches(preset, rows, tmp_path):
    model = save_ours(tmp_path / "teacher", **PRESETS[preset])
    teacher = load_teacher(tmp_path / "teacher", "auto", CPU, rows)
    assert_is_taught(teacher, model, rows)
    assert not teacher.hidden(rows.batch(np.arange(1))).requires_grad


def test_an_adapter_teaches_with_its_base(rows, tmp_path):
    model = save_ours(tmp_path / "base")
    apply_lora(model, 4)
    for layer in lora_layers(model).values():
        torch.nn.init.normal_(layer.lora_B.weight, std=0.1)
    save_model(tmp_path / "lora", model, TOKENIZER, tmp_path / "base")
    base, adapted = load_model(tmp_path / "base").eval(), model.eval()
    ids = random_ids(1, 20)
    assert (base(ids) - adapted(ids)).abs().max() > 0.1, "the adapter changes nothing, so this shows nothing"
    assert_is_taught(load_teacher(tmp_path / "lora", "auto", CPU, rows), adapted, rows)


FOREIGN = {
    "gpt2": dict(n_positions=128, n_embd=32, n_layer=2, n_head=2),
    "gpt_neox": dict(tie_word_embeddings=False),
    "gemma": {},
    "llama": dict(rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 10_000.0}),  # not ours
    "qwen2": dict(vocab_size=6464),  # rows that only fill up
}


@pytest.mark.parametrize("model_type", FOREIGN)
def test_a_model_of_another_architecture_teaches(model_type, rows, tmp_path):
    model = save_foreign(tmp_path, model_type, **FOREIGN[model_type])
    teacher = load_teacher(tmp_path, "auto", CPU, rows)
    assert_is_taught(teacher, lambda ids: model(ids).logits, rows)


@pytest.mark.parametrize("name", ["tiny", "gpt_neox"])
def test_a_teacher_in_16_bits_says_nearly_the_same(name, rows, tmp_path):
    save_foreign(tmp_path, name) if name in FOREIGN else save_ours(tmp_path, **PRESETS[name])
    batch = rows.batch(np.arange(len(rows)))
    real = batch.document_index >= 0
    whole, half = (load_teacher(tmp_path, dtype, CPU, rows) for dtype in ("float32", "bfloat16"))
    assert half.weight.dtype == torch.bfloat16
    expected, found = (teacher.hidden(batch)[real].float() for teacher in (whole, half))
    assert (found - expected).norm() < 0.05 * expected.norm()


def test_who_cannot_teach_is_one_line(rows, tmp_path):
    with pytest.raises(UserError, match="no teacher in .*give --teacher DIR"):
        load_teacher(tmp_path / "nobody", "auto", CPU, rows)
    save_ours(tmp_path / "ours", max_position_embeddings=64)
    with pytest.raises(UserError, match="above the context of the teacher, 64"):
        load_teacher(tmp_path / "ours", "auto", CPU, rows)
    tokenizer = tmp_path / "ours" / "tokenizer.json"
    tokenizer.write_text(json.dumps(json.loads(tokenizer.read_text("utf-8")) | {"version": "2.0"}), "utf-8")
    with pytest.raises(UserError, match="another tokenizer"):
        load_teacher(tmp_path / "ours", "auto", CPU, rows)
    save_foreign(tmp_path / "capped", "gemma2", final_logit_softcapping=1.0)
    with pytest.raises(UserError, match="plain matrix product"):
        load_teacher(tmp_path / "capped", "auto", CPU, rows)
    (tmp_path / "capped" / "model.safetensors").rename(tmp_path / "capped" / "pytorch_model.bin")
    with pytest.raises(UserError, match="transformers cannot load the teacher"):
        load_teacher(tmp_path / "capped", "auto", CPU, rows)

"""Knowledge distillation: a teacher model, and the divergence of a student's distribution from the teacher's."""

import argparse
import hashlib
import itertools
import json
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from base.cli import UserError, fraction, not_negative, positive
from base.files import sha256
from corpus.prepared import META, writing_prepared
from model.chat import decode_chat, load_tokenizer, tokenizer_fingerprint, translate
from model.checkpoint import load_config, load_model, weight_files
from model.model import CausalLM
from model.operators import product_dtype
from training.balance import expert_balance
from training.loss import LossFunction, apply_head, loss_chunk, sum_batches
from training.machine import Machine
from training.packing import Batch, PackedDataset
from training.rollouts import (
    PromptDataset,
    Rollout,
    RolloutBatch,
    RolloutGenerator,
    RolloutSettings,
    learning_batches,
    rollout_metrics,
)

DISTILL_FLAGS = {  # name -> options of argparse's add_argument
    "--teacher": dict(type=Path, default=Path("out/teacher"), help="folder of a model or of an adapter"),
    "--mode": dict(
        choices=["text", "logits", "on_policy"], default="logits", help="what the student learns from, see above"
    ),
    "--divergence": dict(
        choices=["forward", "reverse", "jsd"], help="see training/distillation.py; else forward, on_policy reverse"
    ),
    "--jsd_beta": dict(type=fraction, default=0.5, help="of jsd, between forward (0) and reverse (1)"),
    "--temperature": dict(type=not_negative, default=1.0, help="divides the logits of both; of text, the teacher's"),
    "--ce_weight": dict(
        type=not_negative, default=0.0, help="of the cross-entropy of the labels, beside the divergence"
    ),
    "--teacher_dtype": dict(
        choices=["auto", "float32", "bfloat16", "float16"], default="auto", help="of its weights; auto: as --dtype"
    ),
    "--prompts": dict(type=positive, help="text: only so many of each split; without it, all"),
    "--only_right": dict(action="store_true", help="text: leave out answers whose --reward is not 1"),
    "--keep_layers": dict(nargs="+", type=int, metavar="N", help="start from these layers of --init_from, from 0"),
    "--keep_ffn": dict(
        type=positive, metavar="N", help="and from the N most active neurons of each feed-forward layer"
    ),
}
# Of each scored token, beside its loss; all but the divergence are of the distributions at temperature 1.
METRICS = ("divergence", "cross_entropy", "agreement", "student_entropy", "teacher_entropy")


def check_flags(args: argparse.Namespace):
    """UserError for flags that do not go together."""
    shrinks = args.keep_layers or args.keep_ffn
    if args.shard and args.mode != "logits":
        raise UserError(f"--mode {args.mode} generates, which needs the whole model in each process: omit --shard")
    if args.preset and (shrinks or args.lora_rank):
        raise UserError("--preset is a new student: there is nothing to keep or to adapt")
    if shrinks and args.lora_rank:
        raise UserError(
            "an adapter belongs to a model on disk: shrink and distill first, then give that to --lora_rank"
        )
    if args.keep_ffn and args.mode == "on_policy":
        raise UserError(
            "--keep_ffn measures on texts or chats which neurons are active; use it with --mode text or logits"
        )
    if not args.temperature and args.mode != "text":
        raise UserError("--temperature 0 is for --mode text, where the teacher then generates its most probable tokens")
    if args.jsd_beta in (0, 1):
        raise UserError("--jsd_beta 0 and 1 make every divergence 0: give --divergence forward or reverse")


# ------------------------------------------------------------------------------------------------------------ formulas


class Divergence(NamedTuple):
    """The divergence of the student's distribution p from the teacher's, q:

    forward  KL(q || p) = sum q ln(q / p): high where the student gives too little to what the teacher may say
    reverse  KL(p || q) = sum p ln(p / q): high where the student may say what the teacher never would
    jsd      beta KL(q || m) + (1 - beta) KL(p || m), m = beta q + (1 - beta) p: arXiv 2306.13649, eq. 1, which
             is 0 for beta 0 and 1

    Both distributions are softmax(logits / temperature) (arXiv 1503.02531, eq. 1). ce_weight adds so many times -ln p
    of the label, at temperature 1.
    """

    kind: str = "forward"
    temperature: float = 1.0
    jsd_beta: float = 0.5
    ce_weight: float = 0.0

    def of(self, log_p: Tensor, log_q: Tensor, p: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
        """The divergence of each row, (M,), in nats, and its gradient with respect to the logits of p, (M, V), after
        their division by the temperature. p and q, and their logarithms, are (M, V); p is overwritten.
        """
        if self.kind == "forward":
            return torch.linalg.vecdot(q, log_q - log_p), p.sub_(q)
        if self.kind == "reverse":
            log_ratio = log_p - log_q
            distance = own = torch.linalg.vecdot(p, log_ratio)
            return distance, p.mul_(log_ratio.sub_(own[:, None]))
        p_weight = 1 - self.jsd_beta  # of p in m
        log_m = (p_weight * p + self.jsd_beta * q).clamp_(min=torch.finfo(p.dtype).tiny).log_()
        log_ratio = log_p - log_m
        own = torch.linalg.vecdot(p, log_ratio)
        distance = self.jsd_beta * torch.linalg.vecdot(q, log_q - log_m) + p_weight * own
        return distance, p.mul_(log_ratio.sub_(own[:, None])).mul_(p_weight)


def plain_divergence_sum(
    hidden: Tensor, weight: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor, labels: Tensor, how: Divergence
) -> Tensor:
    """divergence_sum as a formula: by autograd, with all logits at once."""
    logits, teacher_logits = hidden @ weight.mT, teacher_hidden @ teacher_weight.mT  # (M, V)
    log_p, log_q = ((x / how.temperature).log_softmax(-1) for x in (logits, teacher_logits))
    p, q = log_p.exp(), log_q.exp()
    if how.kind == "jsd":
        log_m = (how.jsd_beta * q + (1 - how.jsd_beta) * p).log()
        losses = how.jsd_beta * q * (log_q - log_m) + (1 - how.jsd_beta) * p * (log_p - log_m)
    else:
        losses = q * (log_q - log_p) if how.kind == "forward" else p * (log_p - log_q)
    log_probs = logits.log_softmax(-1).gather(1, labels[:, None])
    return losses.sum() - how.ce_weight * log_probs.sum()


def divergence_sum(
    hidden: Tensor, weight: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor, labels: Tensor, how: Divergence
) -> tuple[Tensor, Tensor]:
    """The loss of all scored tokens, summed, and the METRICS of each, (5, M), which have no gradient; in float32.

    hidden (M, H) and weight (V, H), the student's, give its logits; teacher_hidden (M, H') and teacher_weight (V, H')
    the teacher's. labels (M,). Products are in autocast's dtype, if it is on.
    """
    learns = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    return DivergenceSum.apply(hidden, weight, teacher_hidden, teacher_weight, labels, how, learns)


class DivergenceSum(torch.autograd.Function):
    """The logits (M, V) of both models are computed, compared and turned into gradients for a chunk of tokens.

    The gradient is computed with the loss: otherwise the head, the largest product of a small model, would be computed
    twice. The gradient is not scaled yet, so that float16 would lose small numbers of it: it is in float32 instead.
    """

    @staticmethod
    def forward(ctx, hidden, weight, teacher_hidden, teacher_weight, labels, how: Divergence, learns: bool):
        dtype = product_dtype(hidden.device.type, hidden.dtype)
        narrow, teacher_narrow = weight.to(dtype), teacher_weight
        wide = torch.promote_types(dtype, torch.float32)
        d_dtype = wide if dtype == torch.float16 else dtype
        d_hidden = torch.empty_like(hidden) if learns else None
        d_weight = torch.zeros_like(weight) if learns and weight.requires_grad else None
        loss_sum = hidden.new_zeros((), dtype=wide)
        metrics = hidden.new_empty(len(METRICS), len(hidden), dtype=wide)
        chunk = loss_chunk(hidden.device, len(weight))
        for start in range(0, len(hidden), chunk):
            here = slice(start, start + chunk)
            h, label = hidden[here].to(dtype), labels[here, None]
            logits = (h @ narrow.mT).to(wide)  # (chunk, V)
            teacher_logits = (teacher_hidden[here] @ teacher_narrow.mT).to(wide)
            log_p, log_q = logits.log_softmax(-1), teacher_logits.log_softmax(-1)
            p, q = log_p.exp(), log_q.exp()
            log_prob = log_p.gather(1, label)[:, 0]
            best = teacher_logits.argmax(-1, keepdim=True)
            agreement = (logits.gather(1, best)[:, 0] == logits.amax(-1)).to(wide)
            entropies = -torch.linalg.vecdot(p, log_p), -torch.linalg.vecdot(q, log_q)
            d_label = p.clone() if how.ce_weight and learns else None
            if how.temperature != 1:
                log_p, log_q = ((x / how.temperature).log_softmax(-1) for x in (logits, teacher_logits))
                p, q = log_p.exp(), log_q.exp()
            distance, d_logits = how.of(log_p, log_q, p, q)
            loss_sum += (distance - how.ce_weight * log_prob).sum()
            metrics[:, here] = torch.stack((distance, -log_prob, agreement, *entropies))
            if not learns:
                continue
            d_logits.div_(how.temperature)
            if d_label is not None:
                d_label.scatter_add_(1, label, d_label.new_full(label.shape, -1))
                d_logits.add_(d_label, alpha=how.ce_weight)
            d_logits = d_logits.to(d_dtype)
            d_hidden[here] = d_logits @ weight.to(d_dtype)
            if d_weight is not None:
                d_weight += d_logits.mT @ h.to(d_dtype)
        ctx.save_for_backward(d_hidden, d_weight)
        ctx.mark_non_differentiable(metrics)
        return loss_sum, metrics

    @staticmethod
    def backward(ctx, d_loss: Tensor, _):
        d_hidden, d_weight = ctx.saved_tensors
        return d_hidden * d_loss, None if d_weight is None else d_weight * d_loss, *[None] * 5


# ------------------------------------------------------------------------------------------------------------- teachers


class Teacher(NamedTuple):
    """A frozen model with the student's vocabulary; the product of hidden state and weight is its logits."""

    hidden: Callable[[Batch], Tensor]  # packed rows -> (B, T, H')
    weight: Tensor  # (V, H')


def load_teacher(directory: Path, dtype: str, machine: Machine, data: PackedDataset) -> Teacher:
    """The model in `directory`: one of ours, an adapter on one, or another that transformers knows. dtype: of its
    weights; "auto": as in training.

    UserError where it has another tokenizer than the data, or where its context is shorter than a row.
    """
    check_teacher(directory)
    if tokenizer_fingerprint(directory) != data.tokenizer_sha256:
        raise UserError(
            f"the teacher in {directory} has another tokenizer than {data.paths}: its distribution is over other "
            "tokens. The student can learn from its answers: --mode text"
        )
    dtype = machine.dtype if dtype == "auto" else getattr(torch, dtype)
    if is_ours(directory):
        model = load_model(directory, machine.device)
        context = model.config.max_position_embeddings
        teacher = own_teacher(model.to(dtype))
    else:
        try:
            model = load_foreign(directory, machine.device, dtype)
            teacher = foreign_teacher(model, directory)
        except UserError:
            raise
        except Exception as error:  # an architecture's code can fail in any way
            reason = str(error).strip().partition("\n")[0]
            raise UserError(f"transformers cannot load the teacher in {directory}: {reason}") from None
        context = getattr(model.config, "max_position_embeddings", math.inf)
    if data.max_seq_len > context:
        raise UserError(f"--max_seq_len {data.max_seq_len} is above the context of the teacher, {context} tokens")
    if len(teacher.weight) < data.vocab_size:
        raise UserError(f"the teacher in {directory} has {len(teacher.weight)} tokens, its tokenizer {data.vocab_size}")
    return teacher._replace(weight=teacher.weight[: data.vocab_size])  # padding rows belong to no token


def check_teacher(directory: Path):
    """UserError where there is no teacher."""
    if not any((directory / name).exists() for name in ("config.json", "adapter_config.json")):
        raise UserError(f"no teacher in {directory}: give --teacher DIR, a model that is larger or knows more")
    if not (directory / "tokenizer.json").exists():
        raise UserError(f"the teacher in {directory} has no tokenizer.json")


def is_ours(directory: Path) -> bool:
    """Whether model.py can compute it."""
    if not (directory / "config.json").exists():
        return True  # an adapter
    try:
        load_config(directory)
    except UserError:
        return False
    return weight_files(directory)[0].exists()


def own_teacher(model: CausalLM) -> Teacher:
    model.eval().requires_grad_(False)

    @torch.no_grad()
    def hidden(batch: Batch) -> Tensor:
        return model.model(batch.input_ids, batch.position_ids, batch.cu_seqlens)

    return Teacher(hidden, model.lm_head.weight)


def load_foreign(directory: Path, device: torch.device, dtype: torch.dtype):
    """A model of an architecture of transformers that is not ours; neither code nor pickle of the folder is run."""
    from transformers import AutoModelForCausalLM  # seconds

    options = dict(use_safetensors=True, trust_remote_code=False, local_files_only=True, dtype=dtype)
    model = AutoModelForCausalLM.from_pretrained(directory, **options)
    return model.eval().requires_grad_(False).to(device)


@torch.no_grad()
def foreign_teacher(model, directory: Path) -> Teacher:
    """Any causal language model of transformers. UserError for one whose logits are not a plain matrix product, but,
    say, capped or scaled."""
    trunk, head = model.base_model, model.get_output_embeddings()
    weight = getattr(head, "weight", None)
    ids = torch.arange(16, device=model.device)[None]
    logits = model(ids).logits.float()
    product = None if weight is None else (trunk(ids).last_hidden_state @ weight.mT).float()
    if product is None or product.shape != logits.shape or (product - logits).abs().max() > 0.02 * logits.abs().max():
        raise UserError(
            f"the teacher in {directory} ({model.config.model_type}) does not compute its logits as a plain matrix "
            "product, and cannot be a teacher here"
        )

    @torch.no_grad()
    def hidden(batch: Batch) -> Tensor:
        """Unpacked, with a document per row and padding masked, because not all architectures accept packed rows."""
        if not batch.documents:  # with --shard, a process without rows
            return weight.new_zeros(*batch.input_ids.shape, weight.shape[1])
        real = batch.document_index >= 0
        document, position = batch.document_index[real], batch.position_ids[real]  # (tokens,)
        ids = batch.input_ids.new_zeros(len(batch.documents), int(position.max()) + 1)  # (documents, longest)
        seen = torch.zeros_like(ids)
        ids[document, position] = batch.input_ids[real]
        seen[document, position] = 1
        unpacked = trunk(input_ids=ids, attention_mask=seen).last_hidden_state  # (documents, longest, H')
        packed = unpacked.new_zeros(*batch.input_ids.shape, unpacked.shape[-1])
        packed[real] = unpacked[document, position]
        return packed

    return Teacher(hidden, weight)


# ------------------------------------------------------------------------------------------------------------- learning


def distillation_loss(
    model: CausalLM, batch: Batch, teacher: Teacher, how: Divergence
) -> tuple[Tensor, int, dict[str, Tensor]]:
    """A LossFunction but for the teacher, which reads the same rows."""
    positions, routing = batch.scored_positions(), []  # (M,)
    teacher_hidden = teacher.hidden(batch).flatten(0, 1)[positions]  # (M, H')

    def head(hidden: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        if len(weight) > len(teacher.weight):  # spare rows of an open model belong to no token
            weight = weight[: len(teacher.weight)]
        return divergence_sum(hidden, weight, teacher_hidden, teacher.weight, labels, how)

    loss_sum, figures = apply_head(model, batch, head, routing)
    balance, metrics = expert_balance(model, batch, routing)
    metrics |= dict(zip(METRICS, figures.sum(1)))
    if isinstance(batch, RolloutBatch):
        gap = (-figures[1] - batch.old_log_probs.flatten()[positions]).abs().sum()  # to the model that generated
        metrics |= {"gap": gap, "scored": batch.scored}
    return loss_sum + balance, batch.scored, metrics


@dataclass(frozen=True)
class AnswerSettings:
    """How a teacher answers prompts for --mode text."""

    prompts: int | None  # only so many of each split
    only_right: bool  # leave out answers whose reward is not 1
    temperature: float
    seed: int
    rollouts: RolloutSettings


def generate_answers(
    teacher: Path,
    train_set: PromptDataset,
    val_set: PromptDataset,
    settings: AnswerSettings,
    machine: Machine,
    cache: Path,
) -> Path:
    """A folder of sft data in `cache`: the teacher's answers to the prompts.

    Its name depends on all that the answers depend on, so that a later run reads what an earlier one generated. The
    teacher reads and generates with its own tokenizer. UserError for a teacher that the engine cannot run, or where no
    answer is left.
    """
    check_teacher(teacher)
    if not is_ours(teacher):
        raise UserError(
            f"the teacher in {teacher} is of an architecture that the engine does not generate with; let another "
            "program generate, and give the chats to: python data_process.py sft"
        )
    load_tokenizer(teacher).check_chats(teacher)
    is_other = tokenizer_fingerprint(teacher) != train_set.tokenizer_sha256
    if is_other and not train_set.tokenizer.is_own:
        raise UserError(
            f"{train_set.paths} has the chat format of an open model, which the teacher in {teacher} cannot read: take "
            "a teacher with the same tokenizer, or a student with Jiezi's"
        )
    if is_other and settings.rollouts.tools and not load_tokenizer(teacher).is_own:
        raise UserError(f"the teacher in {teacher} has another chat format than {train_set.paths}: omit --tools")
    if settings.only_right and not train_set.checked:
        raise UserError(f"{train_set.paths} contains chats: only rl data say which answers are right")
    folder = cache / answers_key(teacher, train_set, settings)
    if (folder / META).exists():
        return folder
    generator = RolloutGenerator(load_model(teacher, machine.device), settings.rollouts, machine, teacher)
    if machine.rank == 0:
        folder.parent.mkdir(parents=True, exist_ok=True)
    start, chats = time.perf_counter(), {}
    for data in (train_set, val_set):
        chats[data.split] = sum(machine.gather(list(chats_of(generator, data, settings))), [])
        if not chats[data.split]:
            right = " correctly" if settings.only_right else ""
            raise UserError(
                f"no prompt of {data.split} in {data.paths} was answered{right} within --max_new_tokens "
                f"{settings.rollouts.max_new_tokens} by the teacher in {teacher}"
            )
    if machine.rank == 0:
        with writing_prepared(folder, "sft", train_set.tokenizer_dir, masked=True) as prepared:
            prepared.meta["minutes_of_generation"] = (time.perf_counter() - start) / 60
            for split, found in chats.items():
                for _, ids, mask in sorted(found):
                    size = int(train_set.token_bytes[ids].sum())
                    prepared.add(split, [(np.array(ids, prepared.dtype).tobytes(), mask)], size)
        counts = {split: f"{len(found):,}" for split, found in chats.items()}
        print(f"the teacher's answers: {counts['train']} to learn from, {counts['val']} to validate -> {folder}")
    machine.gather(None)  # the others wait for the files
    return folder


def answers_key(teacher: Path, data: PromptDataset, settings: AnswerSettings) -> str:
    weights = [sha256(path) for pattern in ("*.safetensors", "tokenizer.json") for path in teacher.glob(pattern)]
    used = asdict(settings)
    del used["rollouts"]["rollout_rows"]
    content = json.dumps([data.fingerprint, data.weights, data.max_seq_len, weights, used])
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def chats_of(
    generator: RolloutGenerator, data: PromptDataset, settings: AnswerSettings
) -> Iterator[tuple[int, list[int], bytes]]:
    """The prompts that this process answers: the number of each, and a chat as ids and mask, in the prompts' tokenizer.
    An answer that did not end by itself would teach not to stop: it is left out.
    """
    prompts, rollouts = data.piece_document[: settings.prompts], settings.rollouts
    block = 8 * rollouts.rollout_rows  # generated together
    quiet = generator.machine.rank > 0 or None  # None: if there is no terminal
    for start in tqdm(range(0, len(prompts), block), unit_scale=block, unit=" prompts", disable=quiet):
        questions, seed = prompts[start : start + block], f"{settings.seed}/text"
        groups = generator.generate(data, questions, rollouts.generations, seed, settings.temperature)
        generator.score(data, groups)
        for one in (one for group in groups for one in group):
            if one.reply and (one.reward == 1 or not settings.only_right):
                yield one.question, *answered_chat(one, generator, data)


def answered_chat(one: Rollout, generator: RolloutGenerator, data: PromptDataset) -> tuple[list[int], bytes]:
    """Ids and mask of a prompt and its answer, in the prompts' tokenizer and chat format."""
    prompt, source, target = data.prompt(one.question), generator.tokenizer, data.tokenizer
    if target.is_own and not source.is_own:
        messages, tools = decode_chat(target, prompt)
        answer = {"role": "assistant", "content": one.reply.content, "reasoning_content": one.reply.reasoning}
        ids, mask = target.documents([{**message, "weight": 0} for message in messages] + [answer], tools)[0]
        return ids, bytes(mask)
    mask = bytes(len(prompt))
    for own, part in itertools.groupby(zip(one.sequence.tokens, one.sequence.chosen), lambda x: x[1]):
        new = [token for token, _ in part]
        if source.is_own:
            new = translate(new, source, target)
        prompt, mask = prompt + new, mask + bytes([own]) * len(new)
    return prompt, mask


# -------------------------------------------------------------------------------------------- the student's own answers


@torch.no_grad()
def validate_answers(
    generator: RolloutGenerator, data: PromptDataset, loss_fn: LossFunction, batch_size: int, rows: int | None
) -> dict[str, float]:
    """Means of loss_fn's METRICS over the student's own answers to questions of val; and how many are right."""
    model, groups = generator.model, generator.generate(data, data.first_questions(rows), 1, "validation")
    answers = [one for group in groups for one in group]
    batches = ((batch, {}) for batch in learning_batches(answers, data.max_seq_len, batch_size))
    model.eval()
    sums = sum_batches(model, loss_fn, batches, generator.machine)
    model.train()
    if sums["stopped"]:
        return {}
    figures = {f"val_{name}": sums[name] / max(sums["scored"], 1) for name in ("loss", *METRICS)}
    return figures | (generator.validate(data, rows) if data.checked else {})


def distillation_metrics(window: Counter, checked: bool) -> dict[str, float]:
    """A line of the log from sums over steps; checked: whether there were rewards."""
    summary = rollout_metrics(window)
    shown = ("length", "ended", "gap", "sampling_seconds", *(["reward"] if checked else []))
    means = {name: window[name] / max(window["count"], 1) for name in METRICS}
    return means | {name: summary[name] for name in shown}

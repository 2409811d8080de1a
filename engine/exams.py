"""Four-choice exams, as corpus/exams.py reads them: answered by log-likelihood, counted by subject."""

import pandas as pd
import torch
from tqdm import tqdm

from base.cli import UserError
from model.chat import ChatTokenizer, encode
from model.model import CausalLM

LETTERS = "abcd"
BLANK = "____"  # the place of the answer in a question, if there is one
BLOCK = 64  # questions whose options are sorted by length together

# ----------------------------------------------------------------------------------------------------------- answering


def answer_exam(
    model: CausalLM,
    tokenizer: ChatTokenizer,
    questions: pd.DataFrame,
    examples: pd.DataFrame,
    shots: int = 0,
    by: str = "text",
    batch_size: int = 16,
) -> pd.DataFrame:
    """The questions with the `chosen` option, whether it is `right`, and whether the prompt was truncated (`cut`).

    by "text": the option whose text has the highest log-likelihood per byte, in the question's blank or after it. The
    options are not listed: a small model has learned texts, not letters of options. by "letter": the options are
    listed, and the most probable letter is chosen. The first `shots` examples of the subject precede the question;
    UserError if there are fewer.
    """
    by_subject = {subject: table.head(shots).to_dict("records") for subject, table in examples.groupby("subject")}
    for subject in questions["subject"].unique():
        if len(by_subject.get(subject, [])) < shots:
            raise UserError(
                f"the dev part of {subject} holds {len(by_subject.get(subject, []))} questions, not {shots}"
            )
    rows = questions.to_dict("records")
    chosen, cut = [], []
    for start in tqdm(range(0, len(rows), BLOCK), unit_scale=BLOCK, unit=" questions", disable=None):
        options = []  # four per question
        for row in rows[start : start + BLOCK]:
            pairs, is_cut = encode_options(model, tokenizer, row, by_subject.get(row["subject"], []), by)
            options += pairs
            cut.append(is_cut)
        scores = torch.tensor(log_likelihoods(model, options, batch_size)).view(-1, len(LETTERS))
        if not scores.isfinite().all():
            raise UserError("the logits are NaN: the model's weights are not finite")
        if by == "text":
            sizes = [[len(row[letter].encode()) for letter in LETTERS] for row in rows[start : start + BLOCK]]
            scores /= torch.tensor(sizes)
        chosen += [LETTERS[best] for best in scores.argmax(1)]
    return questions.assign(chosen=chosen, right=questions["answer"] == chosen, cut=cut)


def encode_options(
    model: CausalLM, tokenizer: ChatTokenizer, row: dict, examples: list[dict], by: str
) -> tuple[list[tuple[list[int], list[int]]], bool]:
    """For each option the ids before it and its own; and whether the prompt was truncated. A prompt that exceeds the
    context loses examples first, then its beginning."""
    whole, context = examples, model.config.max_position_embeddings
    while True:
        pairs = encode_question(model.is_chat, tokenizer, row, examples, by)
        longest = max(len(before) + len(option) for before, option in pairs)
        if longest <= context or not examples:
            break
        examples = examples[1:]
    if (most := max(len(option) for _, option in pairs)) > context:
        question = row["question"][:40]
        raise UserError(f"an option of the question {question!r} has {most} tokens; the model's context is {context}")
    pairs = [(before[max(len(before) + len(option) - context, 0) :], option) for before, option in pairs]
    return pairs, longest > context or len(examples) < len(whole)


def encode_question(
    is_chat: bool, tokenizer: ChatTokenizer, row: dict, examples: list[dict], by: str
) -> list[tuple[list[int], list[int]]]:
    """For each option the ids before it and its own: as turns of a chat, or as plain text for a base model."""
    options = [option_of(row, letter, by) for letter in LETTERS]
    if is_chat:
        messages = []
        for example in examples:
            messages.append({"role": "user", "content": asked(example, by)})
            messages.append({"role": "assistant", "content": option_of(example, example["answer"], by)})
        messages.append({"role": "user", "content": asked(row, by)})
        answered = [[*messages, {"role": "assistant", "content": option}] for option in options]
        chats = [tokenizer.documents(chat)[-1] for chat in answered]
        before = tokenizer.prompt(messages, think=False)
        if any(ids[: len(before)] != before for ids, _ in chats):
            before = tokenizer.prompt(messages)
        pairs = []
        for ids, mask in chats:
            own = [token for token, trained in zip(ids[len(before) :], mask[len(before) :]) if trained]
            pairs.append((before, own if by == "text" else own[:-1]))  # a text ends where the option does
        return pairs
    texts = []
    for example in examples:
        before_answer, after_answer = around_answer(example, by)
        texts.append(before_answer + option_of(example, example["answer"], by) + after_answer)
    texts.append(around_answer(row, by)[0])
    text = "\n\n".join(texts)
    before = encode(tokenizer, text)
    pairs = []
    for option in options:
        # Encoded with the text before it, with which its first characters may share a token, as lm-evaluation-harness
        # does. An option that has no token of its own there is encoded alone.
        own = encode(tokenizer, text + option)[len(before) :] or encode(tokenizer, option)
        pairs.append(([*tokenizer.bos, *before], own))
    return pairs


def option_of(row: dict, letter: str, by: str) -> str:
    return letter.upper() if by == "letter" else row[letter]


def asked(row: dict, by: str) -> str:
    """The text of a question in the prompt."""
    if by == "text":
        return row["question"]
    listing = "".join(f"{letter.upper()}. {row[letter]}\n" for letter in LETTERS)
    return f"{row['question'].strip()}\n{listing}答案："


def around_answer(row: dict, by: str) -> tuple[str, str]:
    """The texts before and after the answer of a base model."""
    if by == "letter":
        return asked(row, by), ""
    before, _, after = row["question"].partition(BLANK)
    return before, after


@torch.inference_mode()
def log_likelihoods(model: CausalLM, pairs: list[tuple[list[int], list[int]]], batch_size: int) -> list[float]:
    """ln p(option | ids before it) of each pair (ids before it, option).

    Pairs with the same input, such as four letters after one question, share a row of a batch. Rows of similar length
    are batched together; padding comes after the end, where causal attention does not see it.
    """
    device = model.model.embed_tokens.weight.device
    rows: dict[tuple[int, ...], list[int]] = {}  # an input: the numbers of its pairs
    for number, (before, option) in enumerate(pairs):
        rows.setdefault((*before, *option[:-1]), []).append(number)
    inputs = sorted(rows, key=len)
    scores = [0.0] * len(pairs)
    for start in range(0, len(inputs), batch_size):
        part = inputs[start : start + batch_size]
        input_ids = torch.zeros(len(part), len(part[-1]), dtype=torch.long)  # (B, T)
        for b, ids in enumerate(part):
            input_ids[b, : len(ids)] = torch.tensor(ids)
        hidden = model.model(input_ids.to(device))  # (B, T, H)
        for b, ids in enumerate(part):
            for number in rows[ids]:
                option = torch.tensor(pairs[number][1], device=device)  # (n,)
                logits = model.lm_head(hidden[b, len(ids) - len(option) : len(ids)])  # (n, V)
                scores[number] = logits.float().log_softmax(-1).gather(1, option[:, None]).sum().item()
    return scores


# ------------------------------------------------------------------------------------------------------------- accuracy


def accuracy(results: pd.DataFrame, by: str) -> pd.DataFrame:
    """A row for each value of the column `by`: questions, accuracy, and its confidence interval (low, high)."""
    table = results.groupby(by)["right"].agg(questions="size", accuracy="mean")
    table["low"], table["high"] = wilson_interval(table["accuracy"], table["questions"])
    return table


def wilson_interval(p, n, z: float = 1.96):
    """The 95% confidence interval of a proportion p of n (Wilson 1927); p and n: numbers or columns."""
    centre = p + z * z / (2 * n)
    spread = z * (p * (1 - p) / n + z * z / (4 * n * n)) ** 0.5
    scale = 1 + z * z / n
    return (centre - spread) / scale, (centre + spread) / scale

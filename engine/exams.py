"""Multiple-choice exams in the layout of C-Eval and CMMLU: answered by log-likelihood, accuracy by subject.

FILE.csv                     question, A, B, C, D, answer (CMMLU: Question, …, Answer)
FOLDER or FILE.zip           such files, one per subject, in the parts dev, val and test:
    dev/law_dev.csv              few-shot examples (CMMLU: dev/law.csv)
    val/law_val.csv              the questions if test has no answers (C-Eval)
    test/law_test.csv            the questions if it has answers (CMMLU: test/law.csv)
"""

import io
import zipfile
import zlib
from pathlib import Path

import pandas as pd
import torch
from tokenizers import Tokenizer
from tqdm import tqdm

from base.cli import UserError
from base.files import read_json
from model.chat import BOS, IM_END, encode, encode_chat
from model.model import CausalLM

LETTERS = "abcd"
PARTS = ("test", "val", "", "dev")  # the first one with answers is evaluated; "": files outside the parts
BLANK = "____"  # the place of the answer in a question, if there is one
BLOCK = 64  # questions whose options are sorted by length together

# ------------------------------------------------------------------------------------------------------------- reading


def read_exam(path: str | Path) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The questions, and the examples of the dev part: columns subject, category, question, a, b, c, d, answer.

    UserError names the file, and the question, that cannot be read.
    """
    tables = [read_table(file, content) for file, content in csv_files(Path(path)).items()]
    if not tables:
        raise UserError(f"{path} holds no .csv file")
    questions = pd.concat(tables, ignore_index=True)
    answered = questions[questions["answer"] != ""]
    if answered.empty:
        raise UserError(f"{path} holds no answers")
    categories = {subject: name for name, subjects in ceval_categories().items() for subject in subjects}
    answered = answered.assign(category=answered["subject"].map(categories))
    part = next(part for part in PARTS if part in set(answered["part"]))
    return answered[answered["part"] == part].reset_index(drop=True), answered[answered["part"] == "dev"]


def ceval_categories() -> dict[str, list[str]]:
    """C-Eval's subjects by category. (CMMLU's have several categories each, so only subjects are reported.)"""
    return read_json(Path(__file__).with_suffix(".json"))


def csv_files(path: Path) -> dict[Path, bytes]:
    """The contents of a file, or of every .csv in a folder or zip file."""
    if path.is_dir():
        files = {file: file.read_bytes() for file in sorted(path.rglob("*.csv"))}
    elif zipfile.is_zipfile(path):
        try:
            with zipfile.ZipFile(path) as archive:
                names = [name for name in sorted(archive.namelist()) if name.endswith(".csv")]
                files = {path / name: archive.read(name) for name in names}
        except (zipfile.BadZipFile, zlib.error, OSError, EOFError, ValueError, RuntimeError) as error:
            raise UserError(f"{path} is damaged: {error}") from None
    elif path.is_file():
        files = {path: path.read_bytes()}
    else:
        raise UserError(f"{path}: no such file")
    # A Mac puts a hidden ._NAME beside every NAME.
    return {file: content for file, content in files.items() if not file.name.startswith(".")}


def read_table(file: Path, content: bytes) -> pd.DataFrame:
    """The rows of a CSV file, with column names and answers in lower case; a missing answer is ""."""
    try:
        table = pd.read_csv(io.BytesIO(content), dtype=str, keep_default_na=False, encoding="utf-8-sig")
    except ValueError as error:  # pandas' errors, and a wrong encoding
        raise UserError(f"{file} cannot be read as CSV in UTF-8: {str(error).strip()}") from None
    if not isinstance(table.index, pd.RangeIndex):  # pandas uses the first fields as an index
        raise UserError(f"{file} has rows with more fields than its first line")
    table.columns = table.columns.str.strip().str.lower()
    if not table.columns.is_unique:
        raise UserError(f"{file} has two columns {table.columns[table.columns.duplicated()][0]!r}")
    if table.empty:
        raise UserError(f"{file} contains no questions")
    for name in ("question", *LETTERS):
        missing = table[name] == "" if name in table else pd.Series(True, table.index)
        if missing.any():
            raise UserError(f"{file}: question {missing.idxmax() + 1} has no {name}")
    answers = table["answer"].str.strip().str.lower() if "answer" in table else pd.Series("", table.index)
    part = next((part for part in PARTS if part and part in (file.parent.name, file.stem.rpartition("_")[2])), "")
    if (answers != "").any() or not part:
        for number, answer in enumerate(answers, 1):
            if answer == "":
                raise UserError(f"{file}: question {number} has no answer")
            if answer not in [*LETTERS]:
                raise UserError(f"{file}: question {number} has the answer {answer!r}, which is not A, B, C or D")
    subject = file.stem.removesuffix(f"_{part}")
    return table[["question", *LETTERS]].assign(answer=answers, subject=subject, part=part)


# ----------------------------------------------------------------------------------------------------------- answering


def answer_exam(
    model: CausalLM,
    tokenizer: Tokenizer,
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
    model: CausalLM, tokenizer: Tokenizer, row: dict, examples: list[dict], by: str
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
    is_chat: bool, tokenizer: Tokenizer, row: dict, examples: list[dict], by: str
) -> list[tuple[list[int], list[int]]]:
    """For each option the ids before it and its own: as turns of a chat, or as plain text for a base model."""
    options = [option_of(row, letter, by) for letter in LETTERS]
    if is_chat:
        messages = []
        for example in examples:
            messages.append({"role": "user", "content": asked(example, by)})
            messages.append({"role": "assistant", "content": option_of(example, example["answer"], by)})
        messages.append({"role": "user", "content": asked(row, by)})
        before, _ = encode_chat(tokenizer, messages, add_generation_prompt=True)
        stop = [IM_END] if by == "text" else []  # the answer ends where the option does
        return [(before, [*encode(tokenizer, option), *stop]) for option in options]
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
        pairs.append(([BOS, *before], own))
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

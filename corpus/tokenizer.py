"""Training a tokenizer: SentencePiece BPE, and its fast twin for `tokenizers` and transformers."""

import io
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import sentencepiece
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors

from base.cli import UserError
from corpus.kinds import Document, cut
from model import chat

TEMPLATE = Path(chat.__file__).parent / "tokenizer" / "chat_template.jinja"
CONFIG = {
    "tokenizer_class": "PreTrainedTokenizerFast",  # with another, transformers 5 rebuilds the pipeline, and wrongly
    "bos_token": chat.SPECIAL_TOKENS[chat.BOS],
    "eos_token": chat.SPECIAL_TOKENS[chat.EOS],
    "pad_token": chat.SPECIAL_TOKENS[chat.EOS],
    "unk_token": chat.SPECIAL_TOKENS[0],
    "model_max_length": 2048,
    "add_prefix_space": False,
    "clean_up_tokenization_spaces": False,
}


def sample_texts(documents: Iterable[Document], max_bytes: float) -> list[str]:
    """The texts of the documents; of more than `max_bytes` UTF-8 bytes, a random sample, the same at each run."""
    sample = []
    size = 0
    limit = 2**64
    for document in documents:
        if document.key < limit:
            sample.append(document)
            size += document.size
        while size > max_bytes:
            limit //= 2
            sample = [document for document in sample if document.key < limit]
            size = sum(document.size for document in sample)
    return [document.parts[0][0].decode() for document in sample]


def fast_twin(pieces: list[str]) -> Tokenizer:
    """A `tokenizers.Tokenizer` that gives the same ids as the SentencePiece BPE model with these pieces."""
    ordinary = set(pieces[len(chat.SPECIAL_TOKENS) + 256 :])  # the first are the control tokens and the 256 bytes
    merges = []  # in the order in which they were learned, which is that of the pieces they make
    for piece in pieces:
        if piece in ordinary:
            halves = [(piece[:i], piece[i:]) for i in range(1, len(piece))]
            merges += [(left, right) for left, right in halves if left in ordinary and right in ordinary]
    vocabulary = {piece: token_id for token_id, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token=pieces[0], fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", "\u2581")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in chat.SPECIAL_TOKENS])
    bos = chat.SPECIAL_TOKENS[chat.BOS]
    tokenizer.post_processor = processors.TemplateProcessing(f"{bos} $A", f"{bos} $A {bos}:1 $B:1", [(bos, chat.BOS)])
    return tokenizer


def _short_lines(texts: list[str]) -> Iterator[str]:
    for text in texts:
        for line in text.split("\n"):
            yield from cut(line, 4096)


def train_pieces(texts: list[str], vocab_size: int, character_coverage: float, workers: int) -> bytes:
    """The file of a SentencePiece model. UserError where the text is too little or too rich for so many tokens."""
    special = chat.SPECIAL_TOKENS
    model_file = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_short_lines(texts),
            model_writer=model_file,
            model_type="bpe",
            vocab_size=vocab_size,
            character_coverage=character_coverage,
            byte_fallback=True,  # a character outside the vocabulary becomes its UTF-8 bytes
            normalization_rule_name="identity",  # text comes back as it went in
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,  # indents
            split_digits=True,  # a number is its digits, each a token
            max_sentence_length=2**16,
            unk_id=0,
            unk_piece=special[0],
            bos_id=chat.BOS,
            bos_piece=special[chat.BOS],
            eos_id=chat.EOS,
            eos_piece=special[chat.EOS],
            pad_id=-1,
            control_symbols=list(special[3:]),  # plain text never encodes to them, as it would to user-defined symbols
            num_threads=workers,
            minloglevel=2,
        )
    except (RuntimeError, ValueError) as error:
        if most := re.search(r"value <= (\d+)", str(error)):
            raise UserError(f"there is text for {most[1]} tokens only: give more, or --vocab_size {most[1]}") from None
        if least := re.search(r"\d+ vs (\d+)", str(error)):
            raise UserError(
                f"the characters of the text take {least[1]} tokens: give --vocab_size above that, or "
                f"--character_coverage below {character_coverage}, which leaves more rare ones to bytes"
            ) from None
        raise UserError(f"SentencePiece refuses this --vocab_size or --character_coverage: {error}") from None
    return model_file.getvalue()


def tokenizer_files(model: bytes) -> dict[str, bytes]:
    """The content of a tokenizer's folder, by name, for a SentencePiece model of train_pieces."""
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    twin = fast_twin([processor.id_to_piece(token_id) for token_id in range(len(processor))])
    return {
        "tokenizer.model": model,
        "tokenizer.json": twin.to_str(pretty=True).encode(),
        "tokenizer_config.json": (json.dumps(CONFIG, indent=2) + "\n").encode(),
        "chat_template.jinja": TEMPLATE.read_bytes(),
    }

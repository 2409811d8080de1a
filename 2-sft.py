"""Supervised fine-tuning: a model that continues texts learns to answer.

The data are chats. The model reads all of a chat, and is scored, by the loss of pretraining, on the assistant's words
and on the token that ends its turn: it learns to answer questions, not to ask them, and to stop. The mask comes with
the data (`python data_process.py show dataset/sft --index 0` marks the scored tokens). Chats are packed into rows as
texts are, and do not see each other. (InstructGPT, arXiv 2203.02155, step 1.)

    python data_process.py sft YOUR_CHATS.jsonl      chats -> dataset/sft
    python 2-sft.py                                  out/pretrain and dataset/sft -> out/sft
    torchrun --nproc_per_node 2 2-sft.py             the same in two processes
    python eval.py                                   talk to it
"""

from pathlib import Path

from base.cli import run
from model.checkpoint import load_model
from training.flags import parse_flags
from training.loop import train
from training.loss import next_token_loss
from training.machine import start_machine
from training.packing import open_data


def main():
    args = parse_flags(
        __doc__,
        data=Path("dataset/sft"),
        init_from=Path("out/pretrain"),
        out_dir=Path("out/sft"),
        epochs=2,
        batch_size=4,  # rows
        max_seq_len=1024,  # tokens in a row: a chat that is longer loses its end
        learning_rate=5e-4,
        min_learning_rate=5e-5,
        warmup_steps=20,
        weight_decay=0.01,
    )
    machine = start_machine(args)
    train_set, val_set = open_data(args, "sft")
    model = load_model(args.init_from)
    # The labels of all but the assistant's tokens are IGNORE, so the loss can be 1-pretrain.py's.
    train(args, machine, model, train_set, val_set, next_token_loss)


if __name__ == "__main__":
    run(main)

"""Supervised fine-tuning: a model that continues texts learns to answer.

The data are chats. The model reads all of a chat, but the loss counts only what the assistant says and the token that
ends its turn: the model learns to answer questions, not to ask them, and to stop. Chats are packed into rows as texts
are, and do not see each other. (InstructGPT, arXiv 2203.02155, step 1.)

    python data_process.py sft YOUR_CHATS.jsonl      chats -> dataset/sft
    python data_process.py show dataset/sft          a chat, with the tokens marked that the loss counts
    python 2-sft.py                                  out/pretrain and dataset/sft -> out/sft
    python 2-sft.py --nproc_per_node 2               the same in two processes
    python eval.py                                   talk to it
"""

from functools import partial
from pathlib import Path

from base.cli import run
from model.checkpoint import load_model
from model.model import CausalLM
from training.balance import expert_balance
from training.flags import ROPE_FLAGS, parse_flags, run_settings
from training.loop import Run
from training.loss import evaluate, token_log_probs
from training.machine import start_machine
from training.packing import Batch, open_data


def assistant_loss(model: CausalLM, batch: Batch):
    """The sum of -ln p(token | the chat so far) over the assistant's tokens, their number, and metrics.

    A label is the token that follows; where that is not the assistant's, it is IGNORE. So of the chat

        <|im_start|>user 1+1? <|im_end|> <|im_start|>assistant 2 <|im_end|>

    two tokens have a label, "2" and the <|im_end|> after it, and the rest is only read.
    """
    routing = []  # of a mixture of experts
    log_probs = token_log_probs(model, batch, routing)  # (M,): of the M tokens with a label
    balance, metrics = expert_balance(model, batch, routing)  # 0 for a dense model
    return balance - log_probs.sum(), batch.scored, metrics


def main():
    args = parse_flags(
        __doc__,
        ROPE_FLAGS,
        data=Path("dataset/sft"),
        init_from=Path("out/pretrain"),
        out_dir=Path("out/sft"),
        epochs=2,
        batch_size=4,  # rows
        max_seq_len=1024,  # tokens per row: a longer chat loses its end
        learning_rate=5e-4,
        min_learning_rate=5e-5,
        warmup_steps=20,
        weight_decay=0.01,
    )
    machine = start_machine(args.device, args.dtype, args.seed, args.shard, args.compile)
    train_set, val_set = open_data(args.data, args.mix, args.max_seq_len, "sft")
    model = load_model(args.init_from)

    training = Run(run_settings(args), machine, model, train_set)
    validate = partial(evaluate, model, assistant_loss, val_set, machine, training.batch_size)
    training.log_start(validate)
    with training:
        for rows in training.steps(args.batch_size * args.accumulation_steps * machine.world_size):
            training.forward_backward(assistant_loss, training.batches(rows))
            training.update()  # by the mean over the assistant's tokens of all processes
            training.log_step(validate)


if __name__ == "__main__":
    run(main)

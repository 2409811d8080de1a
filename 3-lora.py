"""LoRA: adapt a model by training a low-rank addition to its matrices and nothing else.

Every chosen matrix W is frozen and gets (alpha / r) B A beside it, with A of r rows and B of r columns: for r = 8 a few
percent of the weights are trained, so the optimizer needs almost no memory, the file is small, and one base model can
have many adapters. B starts at zero, so step 0 is exactly the base model (arXiv 2106.09685). Loss and data are those of
2-sft.py.

    python data_process.py sft YOUR_CHATS.jsonl --output dataset/lora    chats -> dataset/lora
    python 3-lora.py                                                     out/sft and dataset/lora -> out/lora
    python 3-lora.py --nproc_per_node 2                                the same in two processes
    python eval.py --model out/sft --lora out/lora                       base and adapter
    python export.py out/lora --to merged                                both as one model, in out/lora-merged
"""

from functools import partial
from pathlib import Path

from base.cli import run
from model.checkpoint import load_model
from model.lora import apply_lora
from training.flags import LORA_FLAGS, parse_flags, run_settings
from training.loop import Run
from training.loss import evaluate, next_token_loss
from training.machine import start_machine
from training.packing import open_data


def main():
    args = parse_flags(
        __doc__,
        LORA_FLAGS,
        data=Path("dataset/lora"),
        init_from=Path("out/sft"),
        out_dir=Path("out/lora"),
        epochs=3,
        batch_size=8,  # rows
        learning_rate=1e-3,  # ten times that of the whole model
        min_learning_rate=1e-4,
        warmup_steps=10,
        weight_decay=0.0,
        lora_rank=8,  # r
    )
    machine = start_machine(args.device, args.dtype, args.seed, args.shard, args.compile)
    train_set, val_set = open_data(args.data, args.mix, args.max_seq_len, "sft", "pretrain")
    model = load_model(args.init_from)
    # W x becomes W x + (alpha / r) B (A x). Only A and B have requires_grad, so that only they are trained and saved.
    apply_lora(model, args.lora_rank, args.lora_alpha, args.lora_dropout, args.lora_targets)

    training = Run(run_settings(args), machine, model, train_set)
    # Tokens that the assistant does not say have the label IGNORE, so this is 2-sft.py's loss.
    validate = partial(evaluate, model, next_token_loss, val_set, machine, training.batch_size)
    training.log_start(validate)  # B is zero: the loss of the base model
    with training:
        for rows in training.steps(args.batch_size * args.accumulation_steps * machine.world_size):
            training.forward_backward(next_token_loss, training.batches(rows))
            training.update()
            training.log_step(validate)


if __name__ == "__main__":
    run(main)

"""Pretraining: a model with random weights learns to predict the next token of a text.

Every position of every text is an exercise. The model sees the tokens so far and gives each of the V tokens of the
vocabulary a probability; the loss is -ln of the probability of the token that really follows (Bengio et al. 2003,
JMLR 3, eq. 1). A model that knows nothing gives each token 1/V, so its loss is ln V, 8.76 for V = 6400. What it learns
of language, facts and style is whatever makes that number fall.

    python data_process.py pretrain YOUR_FILES                  text -> dataset/pretrain
    python 1-pretrain.py                                        dataset/pretrain -> out/pretrain
    python 1-pretrain.py --nproc_per_node 2 --preset mini     the same in two processes: two GPUs, or two CPU cores
    python eval.py --model out/pretrain --prompt 春天           what it has learnt
"""

from pathlib import Path

from base.cli import run
from model.checkpoint import load_model
from model.LMConfig import PRESETS, LMConfig
from model.model import CausalLM
from training.flags import ROPE_FLAGS, parse_flags, run_settings
from training.loop import Run
from training.loss import evaluate, next_token_loss
from training.machine import start_machine
from training.packing import open_data
from training.sample import sample_text

# Measured on two CPU cores, docs/loss_en.md, section 2.
PRESET_HINT = "--preset small trains this size with Muon, and learns faster: after 60 steps loss 6.61 instead of 8.13"


def main():
    args = parse_flags(
        __doc__,
        ROPE_FLAGS
        | {
            "--sample_prompt": dict(help='what each validation continues; without it, a text\'s beginning; "": nothing')
        },
        data=Path("dataset/pretrain"),
        out_dir=Path("out/pretrain"),
        epochs=5,
        batch_size=8,  # rows of max_seq_len tokens, in each process
        accumulation_steps=1,
        max_seq_len=512,
        learning_rate=1e-4,
        min_learning_rate=1e-5,
    )
    machine = start_machine(args.device, args.dtype, args.seed, args.shard, args.compile)
    train_set, val_set = open_data(args.data, args.mix, args.max_seq_len, "pretrain", "sft")
    if args.init_from:  # continue with other data from a model that exists
        model = load_model(args.init_from)
    else:
        with machine.init_device():
            model = CausalLM(LMConfig(**PRESETS.get(args.preset, {}), **train_set.vocab))

    training = Run(run_settings(args), machine, model, train_set)
    if not args.preset and not args.init_from:
        training.log.info(f"hint     {PRESET_HINT}")

    def validate(rows: int | None) -> dict:
        figures = evaluate(model, next_token_loss, val_set, machine, training.batch_size, rows)
        return figures | sample_text(model, machine, val_set, args.sample_prompt)

    rows_per_step = args.batch_size * args.accumulation_steps * machine.world_size
    training.log_start(validate)  # the loss of random weights: ln V
    with training:  # saves at the end, also where Ctrl-C ends it
        for rows in training.steps(rows_per_step):  # follows the learning rate's cosine
            # The gradient of the loss, added up over micro-batches of batch_size rows, on each process.
            training.forward_backward(next_token_loss, training.batches(rows))
            # Its mean over all tokens of all processes, clipped; then a step of the optimizer.
            training.update()
            training.log_step(validate)


if __name__ == "__main__":
    run(main)

"""Pretraining: a model with random weights learns to tell the next token of a text.

Every position of every text is an exercise: the model sees the tokens so far and gives each of the V tokens of the
vocabulary a probability; the loss is -ln of the probability of the token that really follows (Bengio et al. 2003,
JMLR 3, eq. 1). A model that knows nothing has the loss ln V, 8.76 for V = 6400; what it learns of language, facts and
style is whatever makes that number fall.

    python data_process.py pretrain YOUR_FILES                  text -> dataset/pretrain
    python 1-pretrain.py                                        dataset/pretrain -> out/pretrain
    torchrun --nproc_per_node 2 1-pretrain.py --preset mini     the same in two processes: two GPUs, or two CPU cores
    python eval.py --model out/pretrain --prompt 春天           what it has learnt
"""

from pathlib import Path

from base.cli import run
from model.checkpoint import load_model
from model.LMConfig import PRESETS, LMConfig
from model.model import CausalLM
from training.flags import parse_flags
from training.loop import train
from training.loss import next_token_loss
from training.machine import start_machine
from training.packing import open_data


def main():
    args = parse_flags(
        __doc__,
        data=Path("dataset/pretrain"),
        out_dir=Path("out/pretrain"),
        epochs=5,
        batch_size=8,  # rows; times 512 tokens
        accumulation_steps=1,
        learning_rate=1e-4,
        min_learning_rate=1e-5,
    )
    machine = start_machine(args)
    train_set, val_set = open_data(args, "pretrain", "sft")
    if args.init_from:  # go on with other data from a model that exists
        model = load_model(args.init_from)
    else:
        with machine.init_device():
            model = CausalLM(LMConfig(**PRESETS[args.preset]) if args.preset else LMConfig())
    train(args, machine, model, train_set, val_set, next_token_loss)


if __name__ == "__main__":
    run(main)

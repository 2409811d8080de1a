"""LoRA: adapt a model by training a thin addition to its matrices and nothing else.

Every chosen matrix W is frozen and gets (alpha / r) B A beside it, with A of r rows and B of r columns: for r = 8 a few
per cent of the weights are trained, so the optimizer needs next to no memory, the file is small, and one base can wear
many adapters. B starts at zero: step 0 is the base model exactly (arXiv 2106.09685). Loss and data are 2-sft.py's.

    python data_process.py sft YOUR_CHATS.jsonl --output dataset/lora    chats -> dataset/lora
    python 3-lora.py                                                     out/sft and dataset/lora -> out/lora
    torchrun --nproc_per_node 2 3-lora.py                                the same in two processes
    python eval.py --model out/sft --lora out/lora                       base and adapter
    python 3-lora.py --merge out/merged                                  trains nothing; base + adapter -> a whole model
"""

from pathlib import Path

from base.cli import run
from model.checkpoint import load_model, replacing_model, save_model
from model.lora import apply_lora
from training.flags import LORA_FLAGS, parse_flags
from training.loop import train
from training.loss import next_token_loss
from training.machine import start_machine
from training.packing import open_data


def main():
    args = parse_flags(
        __doc__,
        LORA_FLAGS | {"--merge": dict(type=Path, metavar="DIR", help="write base and adapter as one model, and leave")},
        data=Path("dataset/lora"),
        init_from=Path("out/sft"),
        out_dir=Path("out/lora"),
        epochs=3,
        batch_size=8,
        learning_rate=1e-3,  # an adapter takes ten times what the whole model would
        min_learning_rate=1e-4,
        warmup_steps=10,
        weight_decay=0.0,
        lora_rank=8,
    )
    if args.merge:
        model = load_model(args.init_from, adapter=args.out_dir)
        with replacing_model(args.merge, [args.init_from, args.out_dir], "--merge") as new:
            save_model(new, model, args.init_from)
        print(f"{args.init_from} with the adapter of {args.out_dir}, merged -> {args.merge}")
        return
    machine = start_machine(args)
    train_set, val_set = open_data(args, "sft", "pretrain")
    model = load_model(args.init_from)
    apply_lora(model, args.lora_rank, args.lora_alpha, args.lora_dropout, args.lora_targets)
    train(args, machine, model, train_set, val_set, next_token_loss)


if __name__ == "__main__":
    run(main)

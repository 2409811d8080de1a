"""Time to a loss: how soon Jiezi gets to the bits per byte that the usual recipe needs ten minutes for.

    python data_process.py pretrain zh_train.jsonl.gz --output dataset/zh
    python -m bench.time_to_loss --data dataset/zh
    python -m bench.time_to_loss --data dataset/zh --ablations           what each part of the recipe is worth

The usual recipe: transformers' Llama, a text a row, cut and padded to 340 tokens, 8 rows a step, AdamW, a cosine from
5e-4. Ours: 1-pretrain.py in two processes with the flags below. Both models have about 8 M parameters and start from
random weights; seconds are those of training; both are validated alike, on the whole validation split.

The first answer is for the usual recipe's own shape: how many seconds Jiezi needs to its loss. The schedule has to fit
the time, so the time is halved, each time in a run of its own, until the loss is missed, and then the last two times
are brought within a fifth of each other. The second is for a shape of as many weights that was chosen for a minute.
"""

import argparse
import json
import math
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from base.cli import HelpFormatter, above_zero, run
from base.files import METRICS_FILE
from bench.contest import TOKENIZER, cpu_machine
from model.checkpoint import save_model
from model.LMConfig import LMConfig
from model.model import CausalLM
from training.flags import TRAINING_FLAGS
from training.loss import evaluate, next_token_loss
from training.packing import IGNORE, PackedDataset

USUAL = dict(hidden_size=320, intermediate_size=880, num_hidden_layers=5, num_attention_heads=5, num_key_value_heads=5)
# As many weights, arranged for few operations a token: an embedding is looked up, so where it is not the head's matrix
# it costs nothing; and a model that has seen 200,000 tokens has not learnt yet what needs depth.
OURS = dict(
    hidden_size=448,
    intermediate_size=1216,
    num_hidden_layers=1,
    num_attention_heads=7,
    num_key_value_heads=1,
    tie_word_embeddings=False,
)
RECIPE = dict(
    optimizer="muon",
    learning_rate=5e-3,
    min_learning_rate=5e-5,
    embedding_factor=10.0,
    warmup_steps=10,
    batch_size=2,
)
ADAMW = dict(optimizer="adamw", learning_rate=4e-3, min_learning_rate=4e-5)
TIED = dict(tie_word_embeddings=True)
SAME_SHAPE = USUAL | TIED | TRAINING_FLAGS["mini"] | dict(embedding_factor=1.0, batch_size=4, residual_std=None)
# What is changed in turn: flags of 1-pretrain.py, fields of LMConfig, or the standard deviation of the first weights of
# the output projections.
ABLATIONS = {
    "AdamW": ADAMW,
    "embedding no faster than the rest": dict(embedding_factor=1.0),
    "embedding 3 times as fast": dict(embedding_factor=3.0),
    "learning rate 3e-3": dict(learning_rate=3e-3, min_learning_rate=3e-5),
    "learning rate 1e-2": dict(learning_rate=1e-2, min_learning_rate=1e-4),
    "1,024 tokens a step": dict(batch_size=1),
    "4,096 tokens a step": dict(batch_size=4),
    "no warm-up": dict(warmup_steps=0),
    "no weight decay": dict(weight_decay=0.0),
    "no QK-norm": dict(qk_norm=False),
    "RoPE base 1,000": dict(rope_theta=1_000.0),
    "output projections not 0 at first": dict(residual_std=0.014),
    "shape: 384 x 2": dict(hidden_size=384, intermediate_size=1024, num_hidden_layers=2, num_attention_heads=6),
    "shape: 320 x 5, tied, as the usual": USUAL | TIED,
    "the same with AdamW": USUAL | TIED | ADAMW,
    "and 4,096 tokens a step": USUAL | TIED | ADAMW | dict(batch_size=4),
}


def usual_recipe(data: PackedDataset, minutes: float, rows: int = 8, rate: float = 5e-4) -> tuple[CausalLM, str]:
    """Trains transformers' Llama; returns its weights in our model, and what it did."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = LMConfig(**USUAL, qk_norm=False)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config.to_hf()))
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, fused=True)
    order = np.random.default_rng(0).permutation(len(data.piece_start))
    (texts,) = data.folders.values()
    seconds, steps, real = 0.0, 0, 0
    while seconds < 60 * minutes:
        start = time.perf_counter()
        input_ids = torch.zeros(rows, data.max_seq_len, dtype=torch.long)
        labels = torch.full_like(input_ids, IGNORE)
        for row, piece in enumerate(order[steps * rows % len(order) :][:rows]):
            first, length = data.piece_start[piece], data.piece_length[piece]
            tokens = torch.from_numpy(texts.tokens[first : first + length].astype(np.int64))
            input_ids[row, :length] = labels[row, :length] = tokens
            real += int(length)
        optimizer.param_groups[0]["lr"] = rate * (0.1 + 0.45 * (1 + math.cos(math.pi * seconds / (60 * minutes))))
        model(input_ids=input_ids, labels=labels, use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        steps, seconds = steps + 1, seconds + time.perf_counter() - start
    ours = CausalLM(config)
    ours.load_state_dict(model.state_dict())  # the names are the same
    computed = steps * rows * data.max_seq_len
    speed = f"{computed / seconds:,.0f} tok/s, {real / seconds:,.0f} of them text"
    return ours, f"{steps:,} steps, {real:,} tokens, {speed}"


def jiezi(data: Path, folder: Path, minutes: float, **changes) -> tuple[float, str]:
    """Runs 1-pretrain.py with RECIPE and `changes`; returns bits per byte, and what it did. folder: for its models."""
    out_dir = folder / "run"
    residual_std = changes.pop("residual_std", 0.0)
    fields = {name: changes.pop(name) for name in list(changes) if name in LMConfig.__dataclass_fields__}
    torch.manual_seed(0)
    model = CausalLM(LMConfig(**OURS | fields))
    for name, parameter in model.named_parameters():
        if residual_std is not None and name.endswith(("o_proj.weight", "down_proj.weight")):
            torch.nn.init.normal_(parameter, std=residual_std)
    init_from = folder / "init"
    save_model(init_from, model, TOKENIZER)
    flags = RECIPE | changes | dict(data=data, init_from=init_from, out_dir=out_dir, max_minutes=minutes)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "1-pretrain.py"]
    command += [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    command += ["--epochs", "1000", "--eval_interval", "1000000", "--save_interval", "1000000", "--eval_rows", "2"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    last = json.loads((out_dir / METRICS_FILE).read_text().splitlines()[-1])
    speed = last["tokens"] / (60 * minutes)
    return last["val_bits_per_byte"], f"{last['step']:,} steps, {last['tokens']:,} tokens, {speed:,.0f} tok/s"


def seconds_to_reach(reaches: Callable[[float], bool], minutes: float) -> float:
    """The shortest time, of those tried from `minutes` down, after which reaches(minutes) is true."""
    reached = minutes
    while reaches(reached / 2):
        reached /= 2
    missed = reached / 2
    while reached > 1.2 * missed:
        between = (reached * missed) ** 0.5
        if reaches(between):
            reached = between
        else:
            missed = between
    return 60 * reached


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("dataset/pretrain"), help="folder made by data_process.py")
    parser.add_argument("--minutes", type=above_zero, default=1.0, help="of training for Jiezi")
    parser.add_argument("--peer_minutes", type=above_zero, default=10.0, help="of training for the usual recipe")
    parser.add_argument("--ablations", action="store_true", help="change the recipe, one thing at a time")
    parser.add_argument("--only", nargs="+", default=[""], help="words: those ablations that hold one of them")
    parser.add_argument("--out_dir", type=Path, default=Path("out/time_to_loss"), help="where the models go")
    args = parser.parse_args()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads", flush=True)

    def show(name: str, minutes: float, bits_per_byte: float, what: str):
        print(f"{name:36}{60 * minutes:5.0f} s  {bits_per_byte:.3f} bits/byte  {what}", flush=True)

    if args.ablations:
        show("jiezi", args.minutes, *jiezi(args.data, args.out_dir, args.minutes))
        for name, changes in ABLATIONS.items():
            if any(word in name for word in args.only):
                show(name, args.minutes, *jiezi(args.data, args.out_dir, args.minutes, **changes))
        return
    model, what = usual_recipe(PackedDataset(args.data, "train", 340), args.peer_minutes)
    validation = PackedDataset(args.data, "val", 512)
    result = evaluate(model, next_token_loss, validation, cpu_machine(), batch_size=8)
    target = result["val_bits_per_byte"]
    show("usual recipe", args.peer_minutes, target, what)

    def reaches(minutes: float) -> bool:
        bits_per_byte, what = jiezi(args.data, args.out_dir, minutes, **SAME_SHAPE)
        show("jiezi, the same shape", minutes, bits_per_byte, what)
        return bits_per_byte <= target

    seconds = seconds_to_reach(reaches, args.peer_minutes)
    ratio = 60 * args.peer_minutes / seconds
    print(f"the same shape is at {target:.3f} after {seconds:.0f} s: {ratio:.1f} times as fast", flush=True)
    show("jiezi, a shape for a minute", args.minutes, *jiezi(args.data, args.out_dir, args.minutes))


if __name__ == "__main__":
    run(main)

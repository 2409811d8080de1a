"""How far a validation loss is off that was measured on few documents: the standard deviation over random samples.

python -m bench.validation MODEL DATA        a trained model, and prepared texts with a large validation split
"""

import argparse
import os
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from corpus.prepared import Prepared
from model.checkpoint import load_model

SAMPLES = 2000
SIZES = (3, 10, 30, 100, 300, 1000)  # documents of a sample


@torch.inference_mode()
def document_losses(folder: Path, data: Prepared, most: int) -> np.ndarray:
    """Sum of the loss in nats, and tokens, of each of the first `most` documents: (documents, 2)."""
    model = load_model(folder, torch.device("cpu")).eval()
    context = model.config.max_position_embeddings
    rows = []
    for index in range(min(most, len(data))):
        [(ids, mask)] = data.record(index)
        ids, mask = torch.tensor(ids.astype(np.int64))[: context + 1], mask[1 : context + 1]
        loss = F.cross_entropy(model(ids[None, :-1])[0].float(), ids[1:], reduction="none").numpy()
        rows.append((float((loss * mask).sum()), int(mask.sum())))
    return np.array(rows)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("--documents", type=int, default=2000)
    args = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("THREADS", 2)))
    table = document_losses(args.model, Prepared(args.data, "val"), args.documents)
    table = table[table[:, 1] > 0]
    rng = np.random.default_rng(0)
    print(
        f"{len(table):,} documents, {table[:, 1].sum():,.0f} tokens, loss {table[:, 0].sum() / table[:, 1].sum():.3f}"
    )
    for size in SIZES:
        samples = table[rng.integers(len(table), size=(SAMPLES, size))].sum(1)  # (SAMPLES, 2)
        losses = samples[:, 0] / samples[:, 1]
        print(f"{size:6,} documents, {samples[:, 1].mean():9,.0f} tokens: ± {losses.std():.3f}")


if __name__ == "__main__":
    main()

"""Hand a model over: to Ollama, LM Studio and llama.cpp, to engines on GPUs, to whoever wants one folder.

Whatever is written is read again by the program that it is for (llama.cpp, transformers) and held against the original,
log-probabilities, tokens and chat template, before it gets its name; what was compared is printed.

    python export.py out/dpo --to gguf                       one file, float16: llama.cpp, LM Studio, a phone
    python export.py out/dpo --to gguf --type q8_0           half of that
    python export.py out/dpo --to ollama                     the same file and a Modelfile: ollama create NAME
    python export.py out/lora --to merged                    the adapter merged into its base, as one model
    python export.py out/dpo --to bf16                       a Hugging Face model of half the size; or fp16
    python export.py out/dpo --to untied                     for engines that want input and output matrix apart

gguf and ollama need: pip install -r requirements/export.txt -c constraints.txt
"""

from base.cli import HelpFormatter, UserError, join_words, run  # first: it hears Ctrl-C while torch is loaded

# isort: split
import argparse
import functools
from pathlib import Path

import torch
from torch import nn

from base.files import write_file
from model.checkpoint import base_of, load_model, replacing_model, save_model
from model.gguf import WEIGHT_TYPES, write_gguf, write_modelfile
from model.model import CausalLM
from model.verify import verify_folder, verify_gguf


def export_gguf(model: CausalLM, args: argparse.Namespace, output: Path) -> Path:
    """One GGUF file in `output`, beside those that are there."""
    path = output / f"{args.model.resolve().name}-{args.type}.gguf"
    report = ""

    def write(temporary: Path):
        nonlocal report
        write_gguf(temporary, model, args.model, args.type)
        report = verify_gguf(temporary, model, args.model, args.type)

    write_file(path, write)
    print(f"{path}: {path.stat().st_size / 1e6:,.1f} MB\nverified in {report}")
    return path


def export_ollama(model: CausalLM, args: argparse.Namespace, output: Path):
    path = export_gguf(model, args, output)
    write_modelfile(output / "Modelfile", model, path)
    command = ["ollama", "create", args.model.resolve().name, "-f", str(output / "Modelfile")]
    print(f"{output / 'Modelfile'}; now: {join_words(command)}")


def export_folder(
    model: CausalLM, args: argparse.Namespace, output: Path, dtype: torch.dtype = torch.float32, untie: bool = False
):
    """A Hugging Face model in the place of `output`."""
    if untie:
        model.config.tie_word_embeddings = False
        model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    weight_type = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}[dtype]
    sources = [args.model, base_of(args.model), *([args.lora] if args.lora else [])]
    with replacing_model(output, sources, "--output") as new:
        save_model(new, model, args.model, dtype=dtype)
        report = verify_folder(new, model, args.model, weight_type)
    size = sum(path.stat().st_size for path in output.iterdir())
    print(f"{output}: {size / 1e6:,.1f} MB\nverified in {report}")


EXPORTS = {
    "gguf": export_gguf,
    "ollama": export_ollama,
    "fp16": functools.partial(export_folder, dtype=torch.float16),
    "bf16": functools.partial(export_folder, dtype=torch.bfloat16),
    "merged": export_folder,
    "untied": functools.partial(export_folder, untie=True),
}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter, allow_abbrev=False)
    parser.add_argument("model", type=Path, metavar="DIR", help="folder of a model")
    parser.add_argument("--to", required=True, choices=EXPORTS, help="what to make of it")
    parser.add_argument("--lora", type=Path, metavar="DIR", help="folder of an adapter, to merge first")
    parser.add_argument("--output", type=Path, metavar="DIR", help="without it, the model's folder and -TO")
    parser.add_argument("--type", choices=WEIGHT_TYPES, default="f16", help="of a GGUF file's matrices")
    args = parser.parse_args()
    if args.to == "merged" and not args.lora and base_of(args.model) == args.model:
        raise UserError(f"{args.model} contains no adapter to merge: give the adapter's folder, or --lora DIR")
    if not args.model.resolve().name.isprintable():  # a line of it could say something in a Modelfile
        raise UserError(f"the name {args.model.resolve().name!r} cannot be shown: rename the folder")
    model = load_model(args.model, adapter=args.lora)
    model.eval()
    default = args.model.parent / f"{args.model.resolve().name}-{args.to}"
    EXPORTS[args.to](model, args, args.output or default)


if __name__ == "__main__":
    run(main, less_memory="it holds the model twice; close other programs")

"""Convert a model for Ollama, LM Studio and llama.cpp, for inference engines on GPUs, or into one folder.

Whatever is written is loaded again by the program that it is for (llama.cpp or transformers) and compared with the
original, in log-probabilities, tokens and chat template, before it gets its name. The comparison is printed.

    python export.py out/dpo --to gguf                       one file, float16: llama.cpp, LM Studio, a phone
    python export.py out/dpo --to gguf --type q8_0           half of that size
    python export.py out/dpo --to ollama                     the same file and a Modelfile: ollama create NAME
    python export.py out/lora --to merged                    an adapter and its base model as one model
    python export.py out/sft --to merged --lora out/lora     the same, with the base model named
    python export.py out/dpo --to bf16                       a Hugging Face model of half the size; or fp16
    python export.py out/dpo --to untied                     for engines that need separate input and output matrices

gguf and ollama need: pip install -r requirements/export.txt -c constraints.txt
"""

from base.cli import HelpFormatter, UserError, join_words, next_step, run  # first: handles Ctrl-C while torch loads

# isort: split
import argparse
import functools
from pathlib import Path

import torch
from torch import nn

from base.files import write_file
from corpus.hub import model_folder
from engine.session import GenerationConfig, sampling_defaults
from model.chat import load_tokenizer
from model.checkpoint import base_of, load_model, replacing_model, save_model
from model.gguf import WEIGHT_TYPES, check_exportable, write_gguf, write_modelfile
from model.model import CausalLM
from model.verify import verify_folder, verify_gguf


def export_gguf(model: CausalLM, source: Path, output: Path, name: str, weight_type: str) -> Path:
    """One GGUF file in the folder `output`; other files there stay. source: the model's folder, with its tokenizer."""
    check_exportable(model.config, source)  # before the folder is made
    path = output / f"{name}-{weight_type}.gguf"
    report = ""

    def write(temporary: Path):
        nonlocal report
        write_gguf(temporary, model, source, weight_type)
        report = verify_gguf(temporary, model, source, weight_type)

    write_file(path, write)
    print(f"{path}: {path.stat().st_size / 1e6:,.1f} MB\nverified in {report}")
    return path


def export_ollama(model: CausalLM, source: Path, output: Path, name: str, weight_type: str):
    path = export_gguf(model, source, output, name, weight_type)
    sampling = vars(GenerationConfig(**sampling_defaults(model.generation_config)))
    write_modelfile(output / "Modelfile", model, path, load_tokenizer(source), sampling)
    command = ["ollama", "create", name, "-f", str(output / "Modelfile")]
    print(f"{output / 'Modelfile'}\nnext: {join_words(command)}")


def export_folder(
    model: CausalLM, source: Path, output: Path, *_, dtype: torch.dtype = torch.float32, untie: bool = False
):
    """A Hugging Face model, which replaces `output`."""
    if untie:
        model.config.tie_word_embeddings = False
        model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    weight_type = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}[dtype]
    with replacing_model(output, [source], "--output") as new:
        save_model(new, model, source, dtype=dtype, is_export=True)
        report = verify_folder(new, model, source, weight_type)
    size = sum(path.stat().st_size for path in output.iterdir())
    print(f"{output}: {size / 1e6:,.1f} MB\nverified in {report}\n{next_step('eval.py', '--model', output)}")


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
    parser.add_argument(
        "model",
        type=Path,
        metavar="DIR",
        help="folder of a model, or of an adapter, to be merged; or a hub's name",
    )
    parser.add_argument("--to", required=True, choices=EXPORTS, help="what to convert it to")
    parser.add_argument("--lora", type=Path, metavar="DIR", help="folder of an adapter to merge into the model first")
    parser.add_argument("--output", type=Path, metavar="DIR", help="without it, the model's folder and -TO")
    parser.add_argument("--type", choices=WEIGHT_TYPES, default="f16", help="of the matrices in a GGUF file")
    args = parser.parse_args()
    directory = model_folder(args.model)
    source = base_of(directory)
    if args.to == "merged" and not args.lora and source == directory:
        raise UserError(f"--to merged needs an adapter, and {args.model} is a model: add --lora DIR")
    name = (directory.resolve() if directory == args.model else args.model).name
    if not name.isprintable():  # a line break in it could add a line to the Modelfile
        raise UserError(f"the name {name!r} has characters that cannot be shown: rename the folder")
    beside = directory.parent if directory == args.model else Path("out")  # not in a hub's cache
    model = load_model(directory, adapter=args.lora).eval()
    EXPORTS[args.to](model, source, args.output or beside / f"{name}-{args.to}", name, args.type)


if __name__ == "__main__":
    run(main, less_memory="exporting holds the model in memory twice; close other programs")

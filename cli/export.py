"""``mmrec export`` and ``mmrec import``."""

import shlex
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from mmrec.cli.session import say
from mmrec.errors import InputError, did_you_mean

FORMATS = ("safetensors", "transformers", "onnx")
ForceOption = Annotated[bool, typer.Option("--force", help="Overwrite what is there.")]


def export(
    where: Annotated[Path, typer.Argument(metavar="RUN|CHECKPOINT", help="The model.")],
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A new or empty folder.")],
    to: Annotated[
        str,
        typer.Option(
            metavar="|".join(FORMATS),
            help="Weights alone; a folder for AutoModelForCausalLM; or a graph.",
        ),
    ],
    plain: Annotated[
        bool,
        typer.Option("--plain", help="For onnx: without the operators of onnxruntime itself."),
    ] = False,
    force: ForceOption = False,
) -> None:
    """Write a model for other programs: mmrec export runs/tiny-stdlib --to transformers out."""
    from mmrec.checkpoint.checkpoint import load_model
    from mmrec.checkpoint.manager import find_checkpoint
    from mmrec.checkpoint.outputs import check_output_folder

    if to not in FORMATS:
        hint = did_you_mean(to, FORMATS)
        raise InputError(f"--to must be one of {', '.join(FORMATS)}; got {to!r}{hint}")
    if plain and to != "onnx":
        raise InputError(f"--plain is for --to onnx; got --to {to}")
    check_output_folder(folder, option="DIR", force=force)
    loaded = load_model(find_checkpoint(where))
    if to == "safetensors":
        from mmrec.export.safetensors import export_safetensors as write
    elif to == "transformers":
        from mmrec.export.transformers import export_transformers as write
    else:
        from mmrec.export.onnx import export_onnx

        write = partial(export_onnx, is_plain=plain)
    write(loaded, folder)
    say(f"wrote {loaded.path} to {folder}: {', '.join(sorted(p.name for p in folder.iterdir()))}")


def import_(
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="What mmrec export or transformers wrote.")
    ],
    out: Annotated[
        Path | None, typer.Option(help="The checkpoint; by default DIR's name and .h5, here.")
    ] = None,
    force: ForceOption = False,
) -> None:
    """Read an exported model back, for generate, eval, finetune: mmrec import out."""
    from mmrec.checkpoint.checkpoint import save_checkpoint
    from mmrec.checkpoint.outputs import check_output
    from mmrec.export.safetensors import import_folder

    target = Path(f"{folder.resolve().name}.h5") if out is None else out
    inputs = folder.iterdir() if folder.is_dir() else ()
    check_output(target, "checkpoint", inputs=inputs, force=force)
    loaded = import_folder(folder)
    save_checkpoint(target, loaded.model, loaded.tokenizer, loaded.step, loaded.metadata)
    count = sum(p.numel() for p in loaded.model.parameters())
    command = shlex.join(["mmrec", "generate", str(target), "--prompt"])
    say(f'wrote {target}, {count / 1e6:.2f} M parameters; next: {command} "..."')

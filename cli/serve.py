"""``mmrec serve``."""

import re
from pathlib import Path
from typing import Annotated, Any

import typer

from mmrec.cli.options import (
    MODEL_HELP,
    ModelOption,
    ThreadsOption,
    WeightsOption,
    one_model,
    settings_options,
)
from mmrec.cli.session import say
from mmrec.config import ServerConfig
from mmrec.errors import InputError


@settings_options(ServerConfig.settings(), declared=ServerConfig.settings())
def serve(
    where: Annotated[
        Path | None,
        typer.Argument(metavar="[RUN|CHECKPOINT]", help=MODEL_HELP),
    ] = None,
    model: ModelOption = None,
    host: Annotated[
        str, typer.Option(help="Address to listen at; other machines reach 0.0.0.0.")
    ] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="Port; 0 takes one that is free.")
    ] = 8000,
    api_key: Annotated[
        str | None,
        typer.Option(
            envvar="MMREC_API_KEY",
            help="Key that requests must bring; needed where other machines reach the server.",
        ),
    ] = None,
    weights: WeightsOption = "float32",
    threads: ThreadsOption = None,
    chat_template: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Jinja template of chats; by default the model's own."),
    ] = None,
    **limits: Any,
) -> None:
    """Serve a model as OpenAI's API and as a page, for example: mmrec serve runs/tiny-book."""
    try:
        from mmrec.server.app import Server
        from mmrec.server.listen import is_loopback, listen, url
        from mmrec.server.listen import serve as serve_until_signal
        from mmrec.server.worker import warm_up
    except ImportError as error:
        if (error.name or "").startswith("mmrec"):
            raise
        raise InputError("mmrec serve needs packages: pip install 'mmrec[serve]'") from None
    from mmrec.checkpoint.manager import find_checkpoint
    from mmrec.data.chat_template import ChatTemplate, read_template
    from mmrec.inference.decoder import Decoder

    config = ServerConfig(**limits)
    if api_key is not None and not re.fullmatch(r"[!-~]+", api_key):
        raise InputError("--api-key must be of printable ASCII characters without spaces")
    if api_key is None and not is_loopback(host):
        raise InputError(
            f"other machines can reach --host {host}, so it needs --api-key, or MMREC_API_KEY"
        )
    path = find_checkpoint(one_model(where, model))
    source = None if chat_template is None else read_template(chat_template)
    with listen(host, port) as listener:  # first of all that takes time: the port may be taken
        decoder = Decoder.load(path, weights=weights, threads=threads)
        template, source = None, source or decoder.tokenizer.chat_template
        if source:
            name = f"--chat-template {chat_template}" if chat_template else f"that of {path}"
            template = ChatTemplate(source, decoder.tokenizer, name)
        warm_up(decoder)
        server = Server(
            decoder,
            _model_name(path),
            config,
            api_key=api_key,
            is_local=api_key is None,
            chat_template=template,
        )
        number = serve_until_signal(
            server,
            listener,
            config.shutdown_timeout,
            lambda: say(f"{_model_name(path)} (step {decoder.step:,}) at {url(listener)}"),
        )
    raise typer.Exit(128 + number)


def _model_name(path: Path) -> str:
    """The name of a run, or of a checkpoint outside of a run."""
    is_of_run = re.fullmatch(r"(best|last|step-\d+)\.h5", path.name)
    return (path.resolve().parent.name if is_of_run else path.stem) or path.stem

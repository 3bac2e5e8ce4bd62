"""Generate one text, piece by piece."""

from collections.abc import Iterator

from mmrec.inference.decoder import Decoder
from mmrec.inference.engine import Engine, Request

STEP_SECONDS = 0.005  # between two pieces


def generate(decoder: Decoder, request: Request) -> Iterator[str]:
    """Generate the text of a request.

    Args:
        decoder: the model.
        request: the request.

    Returns:
        An iterator over pieces of the text, which end between characters. It raises an InputError
        if the logits are not finite.

    Raises:
        InputError: the request does not suit the model.
    """
    engine = Engine(decoder, step_seconds=STEP_SECONDS)
    handle = engine.submit(request)

    def pieces() -> Iterator[str]:
        while not handle.is_finished:
            engine.step()
            yield from (piece.text for piece in handle.pieces() if piece.text)
        handle.result()

    return pieces()

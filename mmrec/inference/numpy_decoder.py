"""A model run token by token in plain NumPy, without Numba."""

import numpy as np

from mmrec.config import SamplingConfig
from mmrec.errors import InputError
from mmrec.inference.decoder import NO_STREAMS, NOTHING_DRAWN, Activations, Decoder, fill_top
from mmrec.kernels.decoder.arguments import (
    BROKEN,
    DECODE,
    READ,
    SCORE,
    STOPPED,
    Drawn,
    Streams,
)
from mmrec.kernels.decoder.reference import (
    Layers,
    hidden_step,
    product,
    split_parameters,
    split_state,
)
from mmrec.kernels.sampling.reference import (
    REPETITION_WINDOW,
    adjust_logits,
    draw,
    log_softmax,
    next_token_probabilities,
    uniform,
)


class NumpyDecoder(Decoder):
    """As ``Decoder`` with float32 weights on one thread. It needs no compiled code.

    Results are those of ``Decoder`` up to rounding: the mathematics is that of the kernel's
    references, and the random numbers are the same.
    """

    def _lay_out(self, parameters: dict[str, np.ndarray]) -> int:
        if self.weights != "float32":
            raise InputError(f"NumpyDecoder needs weights in float32; got {self.weights}")
        self._parameters = parameters
        self._layers = split_parameters(self.config, parameters)
        return sum(p.nbytes for name, p in parameters.items() if name != "ngram_embedding")

    def _run(
        self,
        task: int,
        values: np.ndarray,
        window: np.ndarray,
        steps: int,
        logits_rows: int,
        streams: Streams = NO_STREAMS,
        drawn: Drawn = NOTHING_DRAWN,
    ) -> Activations:
        """Do what the kernel does, for one stream after another."""
        logits = np.empty(0, np.float32)
        # exp overflows in a sigmoid that is 0; what is not finite is found in the logits
        with np.errstate(over="ignore", invalid="ignore"):
            for b, text in enumerate(window):
                states = split_state(self.config, values[b])
                if task == DECODE:
                    self._write(states, text, b, streams, drawn)
                    continue
                for t in range(steps):
                    end = REPETITION_WINDOW + t
                    logits = self._read(states, text[:end], has_logits=task != READ)
                    if task == SCORE:
                        logprobs = log_softmax(logits)
                        drawn.logprobs[b, t] = logprobs[text[end]]
                        fill_top(logprobs, drawn.top_tokens[b, t], drawn.top_logprobs[b, t])
        return Activations(logits, np.empty(0, np.float32))

    def _read(self, states: Layers, text: np.ndarray, *, has_logits: bool = True) -> np.ndarray:
        """Read the last token of a text; return the logits (V,) of the next one, or nothing."""
        context = np.maximum(text[-self.config.max_ngram :], 0).tolist()
        hidden = hidden_step(self.config, self._parameters, self._layers, states, context)
        return product(self._parameters["embedding"], hidden) if has_logits else hidden[:0]

    def _write(
        self, states: Layers, text: np.ndarray, b: int, streams: Streams, drawn: Drawn
    ) -> None:
        """Draw the tokens of stream ``b``; see ``Streams`` and ``Drawn``."""
        repetition, frequency, presence, temperature, *filters = streams.settings[b].tolist()
        top_k, top_p, min_p = filters
        sampling = SamplingConfig(
            repetition, frequency, presence, temperature, int(top_k), top_p, min_p
        )
        biases = slice(*streams.bias_bounds[b : b + 2])
        pairs = zip(streams.bias_tokens[biases], streams.bias_values[biases], strict=True)
        bias = {int(token): float(value) for token, value in pairs}
        counts = streams.counts[b] if streams.counts.size else None
        is_too_cold = temperature > 0 and 1 / temperature > np.finfo(np.float32).max
        for n in range(streams.limits[b]):
            logits = self._read(states, text)
            if is_too_cold or not np.isfinite(logits).all():
                drawn.status[b] = BROKEN
                return
            adjusted = adjust_logits(logits, sampling, text, counts, bias)
            number = uniform(int(streams.seeds[b]), int(streams.drawn[b]))
            token = draw(next_token_probabilities(adjusted, sampling), number)
            if token in (streams.end_token, streams.stop_tokens[b]):
                drawn.status[b] = STOPPED
                return
            if drawn.logprobs.shape[1]:
                logprobs = log_softmax(logits)
                drawn.logprobs[b, n] = logprobs[token]
                fill_top(logprobs, drawn.top_tokens[b, n], drawn.top_logprobs[b, n])
            drawn.tokens[b, n] = token
            text[:-1] = text[1:]
            text[-1] = token
            if counts is not None:
                counts[token] += 1
            streams.drawn[b] += 1
            drawn.counts[b] = n + 1

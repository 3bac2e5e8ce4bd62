"""Checkpoints: model, optimizer, random state and training progress in one HDF5 file.

docs/reference/file-formats.md describes the layout. A file contains no code, and nothing is
unpickled.
"""

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
from torch import Tensor, nn

from mmrec.checkpoint.hdf5 import (
    atomic_h5_file,
    read_array,
    read_attribute,
    read_json,
    write_array,
    write_json,
)
from mmrec.checkpoint.header import (
    KIND,
    SCHEMA,
    open_checkpoint,
    read_header,
    read_lora_settings,
    read_model_config,
    read_tokenizer,
)
from mmrec.checkpoint.weights import read_weight, write_weight
from mmrec.config import DEFAULT_MAX_TOKENS, NeuralCacheConfig, SamplingConfig
from mmrec.data.tokenizer import Tokenizer
from mmrec.errors import InputError
from mmrec.inference.decoder import Decoder
from mmrec.inference.engine import Request, complete, nth_seed
from mmrec.inference.generate import generate
from mmrec.inference.neural_cache import CachingDecoder
from mmrec.lora import apply_lora, lora_settings, merge_lora, merged_parameters
from mmrec.model import Model, State
from mmrec.runtime.distributed import SINGLE_PROCESS, ProcessGroup

MOMENTS = ("exp_avg", "exp_avg_sq", "momentum", "mean_square")
"""Optimizer moments by their names: two of AdamW and one of Muon as in torch, of the parameter's
shape; and that of RMSprop by row, (rows, 1)."""


@dataclass(frozen=True)
class LoadedModel:
    """A model that is ready for use, and what its checkpoint says about it."""

    path: Path
    model: Model
    """In evaluation mode."""
    tokenizer: Tokenizer
    step: int
    """Optimizer steps taken."""
    metadata: dict[str, Any]
    """preset, train (the training configuration), val (loss and bits per byte), fingerprint …"""

    _decoders: dict[Any, Decoder] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )
    """The decoder, by what the weights were when it was made, and the size of its cache."""

    @property
    def decoder(self) -> Decoder:
        """The model as generation uses it, made at first use and anew when weights change."""
        return self.decoder_with()

    def decoder_with(self, neural_cache: int = 0) -> Decoder:
        """As ``decoder``, with a neural cache of so many tokens; 0 is none.

        Raises:
            InputError: The number is out of its range.
        """
        key = *map(_fingerprint, self.model.parameters()), neural_cache
        if key not in self._decoders:
            size = NeuralCacheConfig(neural_cache).neural_cache
            self._decoders.clear()
            if size:
                made: Decoder = CachingDecoder.from_model(
                    self.model, self.tokenizer, neural_cache=size
                )
            else:
                made = Decoder.from_model(self.model, self.tokenizer)
            self._decoders[key] = made
        return self._decoders[key]

    def generate(
        self,
        prompt: str | Sequence[str] = "",
        *,
        max_tokens: int = DEFAULT_MAX_TOKENS,
        stop: Sequence[str] = (),
        seed: int | None = None,
        stream: bool = False,
        logit_bias: Mapping[int, float] | None = None,
        neural_cache: int = 0,
        **sampling: Any,
    ) -> str | list[str] | Iterator[str]:
        """Continue a prompt, or several at once.

        Args:
            prompt: Text to continue; may be empty. Of a list, all texts are generated together,
                which takes less time than one after another.
            max_tokens: Largest number of tokens to generate per text.
            stop: Texts that end the generation. They are not part of the output.
            seed: Equal seeds give equal text on the same machine; None differs at every call. Text
                i of a list has the seed ``seed + i``.
            stream: Return an iterator of pieces of text that appear as they are written.
            logit_bias: What is added to the logits of tokens by their ids, -100 to 100.
            neural_cache: Newest tokens of the text that are looked up besides the recurrent state;
                see ``mmrec.inference.neural_cache``. 0 looks up nothing.
            sampling: Settings of ``mmrec.config.SamplingConfig``: temperature, top_k, top_p,
                min_p, repetition_penalty, frequency_penalty, presence_penalty.

        Returns:
            The text that follows the prompt, a list of texts for a list of prompts, or an iterator
            of the pieces of one text.

        Raises:
            InputError: A setting is unknown or out of range, or the prompt holds a character that
                the tokenizer does not know.
        """
        is_list = isinstance(prompt, Sequence) and not isinstance(prompt, str)
        prompts = list(prompt) if is_list else [prompt]
        if not all(isinstance(text, str) for text in prompts):
            raise InputError(f"prompt must be a text or a list of texts; got {prompt!r}")
        if stream and is_list:
            raise InputError("stream needs one prompt, not a list; got both")
        request = Request(
            sampling=SamplingConfig.from_dict(sampling),
            max_tokens=max_tokens,
            stop=stop,
            seed=seed,
            logit_bias=logit_bias or {},
            return_state=False,
        )
        decoder = self.decoder_with(neural_cache)
        requests = [
            replace(request, prompt=str(text), seed=nth_seed(seed, index))
            for index, text in enumerate(prompts)
        ]
        if stream:
            return generate(decoder, requests[0])
        for request in requests:
            request.check(decoder)
        texts = [completion.text for completion in complete(decoder, requests)]
        return texts if is_list else texts[0]


def _fingerprint(p: Tensor) -> tuple[int, int, int]:
    """Numbers that differ after a change of a parameter. The sum shows one through NumPy."""
    version = 0 if p.is_inference() else p._version
    return p.data_ptr(), version, int(p.detach().reshape(-1).view(torch.int16).sum())


# ---- writing


def save_checkpoint(
    path: Path,
    model: Model,
    tokenizer: Tokenizer,
    step: int,
    metadata: dict[str, Any],
    *,
    optimizer: torch.optim.Optimizer | None = None,
    progress: dict[str, Any] | None = None,
    recurrent_state: State | None = None,
    raw_weights: Mapping[str, Tensor] | None = None,
    process_group: ProcessGroup = SINGLE_PROCESS,
) -> None:
    """Write a checkpoint, completely or not at all. In a distributed run, rank 0 writes.

    With an optimizer and progress the checkpoint can be resumed from. Without them it holds a model
    for use only, with LoRA factors merged into the weights.

    Args:
        path: The file to create or replace.
        model: Its parameters are stored by name in float32.
        tokenizer: Stored in full, so that the checkpoint can be used alone.
        step: Optimizer steps taken.
        metadata: Facts for a reader, as JSON values (see LoadedModel).
        optimizer: Its moments are stored in float32.
        progress: Position in the data, clock and history of the run, as JSON values.
        recurrent_state: The state from which the rows of the next batch continue, of all ranks.
        raw_weights: With an optimizer, the weights that training goes on from, by name, of those
            parameters of which the model holds an average.
        process_group: That of the model. One full parameter at a time exists in every process.

    Raises:
        StorageError: The system refused. An earlier file at ``path`` is intact.
    """
    tensors = _tensors(model, optimizer, raw_weights or {}, process_group)
    lora = lora_settings(model)
    try:
        if process_group.rank == 0:
            with atomic_h5_file(path, KIND, SCHEMA) as file:
                _write_header(file, model, tokenizer, step, metadata)
                for name, values in tensors:
                    write_array(file, name, values, compress=True)
                if optimizer is not None:
                    write_json(file, "progress", progress)
                    write_array(file, "rng", torch.get_rng_state().numpy())
                    if lora:
                        write_json(file, "lora", lora)
                    for name, x in _state_tensors(recurrent_state) if recurrent_state else ():
                        write_array(file, f"recurrent_state/{name}", x.numpy())
    finally:
        # Gathering a parameter needs all ranks, so all of them go to the end even if the write
        # failed in rank 0.
        for _ in tensors:
            pass


def save_compact(path: Path, loaded: LoadedModel, metadata: dict[str, Any]) -> None:
    """Write a model for use and for fine-tuning in a quarter of the bytes; see ``write_weight``.

    Args:
        path: The file to create or replace.
        loaded: The model, with its tokenizer and steps.
        metadata: Facts for a reader, as JSON values (see LoadedModel).

    Raises:
        StorageError: The system refused. An earlier file at ``path`` is intact.
    """
    with atomic_h5_file(path, KIND, SCHEMA) as file:
        _write_header(file, loaded.model, loaded.tokenizer, loaded.step, metadata)
        for name, value in merged_parameters(loaded.model):
            write_weight(file, name, value.detach().float().numpy(), compact=True)


def _write_header(
    file: h5py.File, model: Model, tokenizer: Tokenizer, step: int, metadata: dict[str, Any]
) -> None:
    """Write what ``mmrec.checkpoint.header`` reads."""
    file.attrs["step"] = step
    write_json(file, "config", asdict(model.config))
    write_json(file, "tokenizer", json.loads(tokenizer.to_json()))
    write_json(file, "metadata", metadata)


def _tensors(
    model: Model,
    optimizer: torch.optim.Optimizer | None,
    raw_weights: Mapping[str, Tensor],
    process_group: ProcessGroup,
) -> Iterator[tuple[str, np.ndarray]]:
    """Yield path and float32 values of the parameters, and with an optimizer of the rest."""
    if optimizer is None:
        for name, value in merged_parameters(model):
            yield f"model/{name}", process_group.full_tensor(value).float().numpy()
        return
    parameters = dict(model.named_parameters())
    for name, p in parameters.items():
        yield f"model/{name}", process_group.full_tensor(p.detach()).float().numpy()
    for name, x in raw_weights.items():
        yield f"raw/{name}", process_group.full_tensor(x.detach()).float().numpy()
    for name, p in parameters.items():
        state = optimizer.state.get(p, {})
        for moment in MOMENTS:
            if moment in state:
                moments = process_group.full_tensor(state[moment])
                yield f"optimizer/{moment}/{name}", moments.float().numpy()


def _state_tensors(state: State) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of a recurrent state by field, those of layer i as ``i/field``."""
    for name, value in state._asdict().items():
        if isinstance(value, Tensor):
            yield name, value
    for i, layer in enumerate(state.layers):
        yield from ((f"{i}/{name}", x) for name, x in layer._asdict().items() if x is not None)


# ---- reading a model


def load_model(path: Path) -> LoadedModel:
    """Read the model of a checkpoint. LoRA factors are merged into the weights.

    Args:
        path: The file.

    Raises:
        InputError: There is no complete checkpoint of this version at ``path``.
    """
    with open_checkpoint(path) as file:
        step, metadata = read_header(file)
        model = _read_model(file)
        return LoadedModel(path, model.eval(), read_tokenizer(file), step, metadata)


def _read_model(file: h5py.File) -> Model:
    config, lora = read_model_config(file), read_lora_settings(file)
    with torch.device("meta"):  # shapes are compared before anything is allocated
        model = Model(config)
        if lora:
            apply_lora(model, *lora)
    weights = {
        name: torch.from_numpy(read_weight(file, name, tuple(p.shape)))
        for name, p in model.named_parameters()
    }
    model.load_state_dict(weights, assign=True)
    merge_lora(model)
    return model.requires_grad_()


def _read_tensor(file: h5py.File, name: str, like: Tensor) -> Tensor:
    """Read a float32 tensor that must have the shape of another one."""
    return torch.from_numpy(read_array(file, name, np.float32, tuple(like.shape)))


# ---- reading the training state


class _StoredMoments(Mapping[str, dict[str, Tensor]]):
    """Moments by the name of their parameter, each read when it is asked for."""

    def __init__(self, file: h5py.File, model: nn.Module) -> None:
        self._file, self._parameters = file, dict(model.named_parameters())

    def __getitem__(self, name: str) -> dict[str, Tensor]:
        like, stored = self._parameters[name], _stored_moments(self._file, name)
        if not stored:
            raise KeyError(name)
        return {
            m: _read_tensor(self._file, f"optimizer/{m}/{name}", _like_moment(like, m))
            for m in stored
        }

    def __iter__(self) -> Iterator[str]:
        return (name for name in self._parameters if _stored_moments(self._file, name))

    def __len__(self) -> int:
        return sum(1 for _ in self)


def _like_moment(p: Tensor, moment: str) -> Tensor:
    """A tensor of the shape that a moment of a parameter has, and sharded as the parameter is."""
    return p.detach()[:, :1] if moment == "mean_square" else p


def _stored_moments(file: h5py.File, parameter: str) -> list[str]:
    return [m for m in MOMENTS if f"optimizer/{m}/{parameter}" in file]


@contextlib.contextmanager
def open_moments(
    path: Path, model: nn.Module
) -> Iterator[tuple[Mapping[str, dict[str, Tensor]], int]]:
    """Open the optimizer moments of a checkpoint.

    Args:
        path: The checkpoint.
        model: The model of the checkpoint.

    Yields:
        The moments as ``{parameter: {moment: tensor}}``, read one parameter at a time, and the
        steps that they have seen. An empty mapping and 0 if the checkpoint holds a model only.

    Raises:
        InputError: There is no complete checkpoint of this version at ``path``.
    """
    with open_checkpoint(path) as file:
        if "progress" not in file:
            yield {}, 0
            return
        progress = read_json(file, "progress") | {"step": read_attribute(file, "step", int)}
        yield _StoredMoments(file, model), _optimizer_steps(progress)


def _optimizer_steps(progress: dict[str, Any]) -> int:
    """Return the steps that the moments have seen, those before this run included."""
    return int(progress["step"]) + int(progress.get("optimizer_step_offset", 0))


def put_moments(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    moments: Mapping[str, dict[str, Tensor]],
    steps: int,
) -> None:
    """Replace the moments of an optimizer.

    Args:
        model: The model whose parameters the optimizer updates.
        optimizer: Changed in place.
        moments: The new moments as ``{parameter: {moment: tensor}}``. Others are removed.
        steps: The steps that they have seen.
    """
    optimizer.state.clear()
    parameters = dict(model.named_parameters())
    for name in moments:
        optimizer.state[parameters[name]] = {"step": torch.tensor(float(steps)), **moments[name]}


def restore_training_state(
    path: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    process_group: ProcessGroup = SINGLE_PROCESS,
    averages: dict[str, Tensor] | None = None,
) -> dict[str, Any]:
    """Restore weights, optimizer moments and torch's random state from a checkpoint.

    In a distributed run, rank 0 reads the file and scatters one tensor at a time.

    Args:
        path: The checkpoint.
        model: Changed in place. It gets the weights that training goes on from.
        optimizer: Changed in place.
        process_group: That of the model.
        averages: Changed in place: to the averages of the weights that the checkpoint holds, by
            name. None leaves them out.

    Returns:
        The progress that was saved, with ``step``.

    Raises:
        InputError: The checkpoint is damaged, or was written without a training state. Model and
            optimizer must not be used before another checkpoint is restored.
    """
    not_opened: Any = contextlib.nullcontext()
    with not_opened if process_group.rank else open_checkpoint(path) as file:

        def restore_(x: Tensor, group: str) -> Tensor:
            value = None if file is None else _read_tensor(file, f"{group}/{name}", x)
            return process_group.scatter_tensor_(x, value)

        stored = None if file is None else _read_progress(file, path, model)
        progress, rng, moments, averaged = process_group.broadcast_object(stored)  # type: ignore[misc]
        optimizer.state.clear()
        if averages is not None:
            averages.clear()
        for name, p in model.named_parameters():
            restore_(p.data, "raw" if name in averaged else "model")
            if name in averaged and averages is not None:
                averages[name] = restore_(torch.zeros_like(p), "model")
            if moments[name]:
                values = {
                    m: restore_(torch.zeros_like(_like_moment(p, m)), f"optimizer/{m}")
                    for m in moments[name]
                }
                steps = torch.tensor(float(_optimizer_steps(progress)))
                optimizer.state[p] = {"step": steps, **values}
        torch.set_rng_state(torch.from_numpy(rng))
        return progress


def read_progress(path: Path) -> dict[str, Any]:
    """Read the progress of a checkpoint, with ``step``, and none of its weights.

    Raises:
        InputError: There is no complete checkpoint with a training state at ``path``.
    """
    with open_checkpoint(path) as file:
        return _progress(file, path)


def _progress(file: h5py.File, path: Path) -> dict[str, Any]:
    if "progress" not in file:
        raise InputError(f"{path} holds a model but no training state: resume from last.h5")
    return read_json(file, "progress") | {"step": read_header(file)[0]}


def _read_progress(file: h5py.File, path: Path, model: nn.Module) -> Any:
    """Read progress, random state, the names of each parameter's moments, and what is averaged."""
    progress, names = _progress(file, path), [name for name, _ in model.named_parameters()]
    moments = {name: _stored_moments(file, name) for name in names}
    averaged = [name for name in names if f"raw/{name}" in file]
    return progress, read_array(file, "rng", np.uint8), moments, averaged


def read_recurrent_state(path: Path, initial_state: State) -> State | None:
    """Read the state from which the rows of the next batch continue.

    Args:
        path: The checkpoint.
        initial_state: A state of the shapes that are expected. It is overwritten.

    Returns:
        The state; None if the checkpoint holds none.

    Raises:
        InputError: There is no complete checkpoint at ``path``, or a shape differs.
    """
    with open_checkpoint(path) as file:
        if "recurrent_state" not in file:
            return None
        for name, x in _state_tensors(initial_state):
            stored = read_array(file, f"recurrent_state/{name}", x.numpy().dtype, tuple(x.shape))
            x.copy_(torch.from_numpy(stored))
        return initial_state

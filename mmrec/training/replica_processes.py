"""Replicas in processes of their own.

Python runs one thread of a process at a time. A step of a small model is hundreds of short
operations, between which its threads wait for each other, and the more threads there are, the
longer. Processes do not wait: each computes the gradients of its share of a batch in its own
interpreter. Memory that all of them map holds the parameters, so nothing is copied to them, and the
gradients that they return.

A process computes what a thread would have computed, bit for bit. A run can therefore begin with
threads, go on with processes as soon as they are ready, and go back to threads if one is killed.
"""

import io
import mmap
import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import mmrec
from mmrec.kernels._jit import CACHE_LINE
from mmrec.model import LayerState, Model, State
from mmrec.runtime import malloc
from mmrec.runtime.interrupts import STOP_SIGNALS
from mmrec.runtime.numeric import cdiv
from mmrec.training.replicas import ReplicaResult, Share, replica_gradients

MEMORY_BYTES = 300_000_000
"""What a process takes besides what its thread would take: Python, torch and the kernels, measured
with torch 2.13."""
EXIT_SECONDS = 5
"""Time after which a process that has closed its connection should have ended."""


def are_supported(model: Model) -> bool:
    """Whether processes can compute what threads compute.

    The system must have memory that processes share by a descriptor (Linux), and hooks of modules
    and parameters are of this process.

    Args:
        model: what they compute with.
    """
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    parts = (*model.modules(), *model.parameters())
    hooked = any(getattr(part, name, None) for part in parts for name in hooks)
    return hasattr(os, "memfd_create") and not hooked


class Place(NamedTuple):
    """Where a tensor lies in the shared memory."""

    offset: int
    """In bytes."""
    dtype: torch.dtype
    shape: torch.Size


class SharedMemory:
    """Memory that several processes map, with tensors in it."""

    def __init__(self, descriptor: int, size: int) -> None:
        """Map ``size`` bytes of the file behind a descriptor."""
        self._bytes = mmap.mmap(descriptor, size)

    def tensor(self, place: Place) -> Tensor:
        """The tensor at a place."""
        count = place.shape.numel()
        if not count:
            return torch.empty(place.shape, dtype=place.dtype)
        flat = torch.frombuffer(self._bytes, dtype=place.dtype, count=count, offset=place.offset)
        return flat.view(place.shape)


def lay_out(tensors: Sequence[Tensor], begin: int) -> tuple[list[Place], int]:
    """Places for tensors one after the other, each at the start of a cache line.

    Args:
        tensors: of which dtype and shape count.
        begin: the first free byte.

    Returns:
        A place for each, and the first byte after them.
    """
    places = []
    for x in tensors:
        begin = cdiv(begin, CACHE_LINE) * CACHE_LINE
        places.append(Place(begin, x.dtype, x.shape))
        begin += x.numel() * x.element_size()
    return places, begin


class GradientBuffer:
    """Where a process puts the gradient of a parameter: an array, or rows and their indices."""

    def __init__(self, p: Tensor, rows: int | None) -> None:
        """Describe the buffer, which has no memory yet.

        Args:
            p: the parameter.
            rows: the most rows that a sparse gradient has; None for a dense one.
        """
        self.shape, self.is_sparse = p.shape, rows is not None
        values = p.shape if rows is None else torch.Size([rows, *p.shape[1:]])
        self._likes = [torch.empty(values, dtype=p.dtype, device="meta")]
        if rows is not None:
            self._likes.append(torch.empty(rows, dtype=torch.int64, device="meta"))

    def lay_out(self, begin: int) -> int:
        """Find a place in shared memory from a byte on; return the first byte after it."""
        self._places, end = lay_out(self._likes, begin)
        return end

    def map(self, memory: SharedMemory) -> None:
        """Take the place in a process's mapping of that memory."""
        self._values, *self._indices = [memory.tensor(place) for place in self._places]

    def write(self, gradient: Tensor) -> int:
        """Store a gradient. Return its number of rows if it is sparse, else 0."""
        if not self.is_sparse:
            self._values.copy_(gradient)
            return 0
        values = gradient._values()
        self._values[: len(values)].copy_(values)
        self._indices[0][: len(values)].copy_(gradient._indices()[0])
        return len(values)

    def read(self, rows: int) -> Tensor:
        """The stored gradient, of so many rows if it is sparse; valid until the next ``write``."""
        if not self.is_sparse:
            return self._values
        indices = self._indices[0][:rows][None]
        return torch.sparse_coo_tensor(
            indices, self._values[:rows], self.shape, check_invariants=False
        )

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in vars(self).items() if k not in ("_values", "_indices")}


class _ModelPickler(pickle.Pickler):
    """Stores a model with its parameters by number, since they lie in shared memory."""

    def __init__(self, file: io.BytesIO, parameters: Sequence[nn.Parameter]) -> None:
        super().__init__(file, pickle.HIGHEST_PROTOCOL)
        self._numbers = {id(p): number for number, p in enumerate(parameters)}

    def persistent_id(self, obj: Any) -> int | None:
        return self._numbers.get(id(obj)) if isinstance(obj, nn.Parameter) else None


class _ModelUnpickler(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, parameters: Sequence[nn.Parameter]) -> None:
        super().__init__(file)
        self._parameters = parameters

    def persistent_load(self, pid: Any) -> nn.Parameter:
        return self._parameters[pid]


def _send(connection: Connection, *values: Any) -> None:
    connection.send_bytes(pickle.dumps(values, pickle.HIGHEST_PROTOCOL))


def _receive(connection: Connection) -> Any:
    return pickle.loads(connection.recv_bytes())


def _map_state(function: Callable[[Any], Any], state: State | None) -> State | None:
    """The state with a function applied to each of its arrays."""
    if state is None:
        return None

    def apply(x: Any) -> Any:
        return None if x is None else function(x)

    layers = [LayerState(*map(apply, layer)) for layer in state.layers]
    return State(function(state.recent_tokens), layers)


def _to_numpy(x: Tensor) -> Any:
    return x.detach().numpy()


def _map_share(function: Callable[[Any], Any], share: Share) -> Share:
    """The share with a function applied to each of its arrays."""
    soft_targets = share.soft_targets
    return share._replace(
        tokens=function(share.tokens),
        targets=function(share.targets),
        state=_map_state(function, share.state),
        soft_targets=None if soft_targets is None else function(soft_targets),
    )


class ReplicaProcesses:
    """Processes that compute the gradients of all shares of a batch but the first."""

    def __init__(
        self,
        model: Model,
        count: int,
        rows: int,
        seq_len: int,
        echo: Callable[[str], None] = lambda line: None,
    ) -> None:
        """Start the processes and return. They are ready some seconds later.

        The parameters move into shared memory. Whatever changes them must do so in place.

        Args:
            model: in training mode, with its precision set.
            count: how many.
            rows: sequences of a share; a process loads its kernels with shares of this shape.
            seq_len: tokens of a sequence.
            echo: called with a line for the user if a process fails.

        Raises:
            OSError: the system has no room for the processes or their memory.
            pickle.PicklingError: the model cannot be sent to another process.
        """
        parameters = list(model.parameters())
        self._echo, self._ready = echo, [False] * count
        self._connections: list[Connection] = []
        self._processes: list[subprocess.Popen[bytes]] = []
        places, size = lay_out(parameters, 0)
        ngrams = rows * seq_len * (model.config.max_ngram - 1)
        has_sparse = model.sparse_gradients and model.config.has_large_ngram_table
        self._gradients: list[list[GradientBuffer]] = []
        for _ in range(count):
            buffers = []
            for name, p in model.named_parameters():
                if p.requires_grad:
                    is_sparse = has_sparse and name == "ngram_embedding"
                    buffers.append(GradientBuffer(p, ngrams if is_sparse else None))
                    size = buffers[-1].lay_out(size)
            self._gradients.append(buffers)
        stored = io.BytesIO()
        try:
            _ModelPickler(stored, parameters).dump(model)
        except (AttributeError, TypeError) as error:  # what pickle raises for local functions
            raise pickle.PicklingError(str(error)) from None
        descriptor = os.memfd_create("mmrec-replicas")
        try:
            os.ftruncate(descriptor, size)
            memory = SharedMemory(descriptor, size)
            for p, place in zip(parameters, places, strict=True):
                shared = memory.tensor(place)
                shared.copy_(p.detach())
                p.data = shared
            requires_grad = [p.requires_grad for p in parameters]
            for buffers in self._gradients:
                connection = self._start(descriptor, size)
                setup = (places, requires_grad, buffers, stored.getvalue(), (rows, seq_len))
                _send(connection, *setup)
                for buffer in buffers:
                    buffer.map(memory)
        except BaseException:
            self.close()
            raise
        finally:
            os.close(descriptor)

    def _start(self, descriptor: int, size: int) -> Connection:
        """Start a process, which inherits a connection and the shared memory."""
        own, other = Pipe()
        self._connections.append(own)
        folder = str(Path(mmrec.__file__).parents[1])
        path = os.pathsep.join(filter(None, [folder, os.environ.get("PYTHONPATH")]))
        with other:
            process = subprocess.Popen(
                [sys.executable, "-m", __name__, str(other.fileno()), str(descriptor), str(size)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                pass_fds=[other.fileno(), descriptor],
                env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path},
                start_new_session=True,  # Ctrl-C is for this process, with which they end
            )
        self._processes.append(process)
        return own

    @property
    def pids(self) -> list[int]:
        """The numbers of the processes."""
        return [process.pid for process in self._processes]

    def are_ready(self, *, wait: bool = False) -> bool:
        """Whether the processes can take their shares; False, too, after one has failed.

        Args:
            wait: wait until they can, or one fails.
        """
        if not self._connections:
            return False
        try:
            for number, connection in enumerate(self._connections):
                if not self._ready[number] and (wait or connection.poll()):
                    problem, *_ = _receive(connection)
                    if problem:
                        raise ChildProcessError(problem)
                    self._ready[number] = True
        except (OSError, EOFError) as error:
            self._fail(self._describe(number, error))
        return bool(self._ready) and all(self._ready)

    def run(
        self,
        shares: Sequence[Share],
        tasks: Sequence[Callable[[], ReplicaResult]],
        run_tasks: Callable[[Sequence[Callable[[], ReplicaResult]]], list[ReplicaResult]],
    ) -> list[ReplicaResult]:
        """Compute the gradients of shares, the first one in this process.

        Args:
            shares: one more than there are processes.
            tasks: what computes each share in this process.
            run_tasks: runs tasks in threads: that of the first share, and those of processes that
                fail.

        Returns:
            The result for each share. The gradients are valid until the next call. An error or an
            interrupt ends the processes, so that no answer is left for the next call.
        """
        try:
            return self._run(shares, tasks, run_tasks)
        except BaseException:
            self.close()
            raise

    def _run(
        self,
        shares: Sequence[Share],
        tasks: Sequence[Callable[[], ReplicaResult]],
        run_tasks: Callable[[Sequence[Callable[[], ReplicaResult]]], list[ReplicaResult]],
    ) -> list[ReplicaResult]:
        failure = ""
        asked: list[int] = []
        for number, (share, connection) in enumerate(
            zip(shares[1:], self._connections, strict=True)
        ):
            try:
                _send(connection, _map_share(_to_numpy, share))
                asked.append(number)
            except OSError as error:
                failure = self._describe(number, error)
        results: dict[int, ReplicaResult] = {}
        [results[0]] = run_tasks(tasks[:1])
        for number in asked:
            try:
                problem, loss, sparse_rows, stored = _receive(self._connections[number])
                if problem:
                    raise ChildProcessError(problem)
                state = _map_state(torch.from_numpy, stored)
                assert state is not None
                buffers = zip(self._gradients[number], sparse_rows, strict=True)
                gradients = [buffer.read(rows) for buffer, rows in buffers]
                results[number + 1] = loss, gradients, state
            except (OSError, EOFError) as error:
                failure = self._describe(number, error)
        missing = [number for number in range(len(tasks)) if number not in results]
        if missing:
            self._fail(failure)
            results |= zip(missing, run_tasks([tasks[n] for n in missing]), strict=True)
        return [results[number] for number in range(len(tasks))]

    def _describe(self, number: int, error: BaseException) -> str:
        """Why a process does not answer."""
        if isinstance(error, ChildProcessError):
            return str(error)
        try:
            code = self._processes[number].wait(EXIT_SECONDS)
        except subprocess.TimeoutExpired:
            return "it closed its connection"
        return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"

    def _fail(self, reason: str) -> None:
        self._echo(
            f"note    a process that computes gradients failed ({reason}): threads go on, with the "
            "same bits"
        )
        self.close()

    def close(self) -> None:
        """End the processes, which have nothing to lose. Later calls do nothing."""
        for connection in self._connections:
            connection.close()
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.wait()
        self._connections, self._processes, self._ready = [], [], []


def serve(connection: Connection, descriptor: int, size: int) -> None:
    """Compute the gradients of shares until the other process closes the connection or ends.

    Args:
        connection: to the process that trains.
        descriptor: of the shared memory.
        size: of the shared memory, in bytes.
    """
    torch.set_num_threads(1)
    places, requires_grad, buffers, stored, shape = _receive(connection)
    memory = SharedMemory(descriptor, size)
    all_parameters = [
        nn.Parameter(memory.tensor(place), requires_grad=required)
        for place, required in zip(places, requires_grad, strict=True)
    ]
    model = _ModelUnpickler(io.BytesIO(stored), all_parameters).load()
    if model.activation_checkpointing:
        malloc.return_large_blocks()
    parameters = [p for p in all_parameters if p.requires_grad]
    for buffer in buffers:
        buffer.map(memory)
    trial = torch.zeros(shape, dtype=torch.int64)
    share = Share(trial, trial, 0, None, trial.numel())
    while True:
        try:
            loss, new_gradients, state = replica_gradients(model, parameters, share)
            rows = [b.write(g) for b, g in zip(buffers, new_gradients, strict=True)]
            del new_gradients
            answer = ("", loss, rows, _map_state(_to_numpy, state))
        except Exception as error:
            answer = (f"{type(error).__name__}: {error}", 0.0, [], None)
        _send(connection, *answer)
        [received] = _receive(connection)
        share = _map_share(torch.from_numpy, received)


def main() -> None:
    """Run a process of ``ReplicaProcesses``."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)  # the process that trains decides when to stop
    malloc.keep_freed_memory()
    connection, descriptor, size = map(int, sys.argv[1:])
    try:
        serve(Connection(connection), descriptor, size)
    except (EOFError, OSError):  # the other process has no more work, or has ended
        sys.exit()


if __name__ == "__main__":
    main()

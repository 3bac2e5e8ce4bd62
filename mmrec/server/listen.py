"""Listen on a port, answer requests, and stop tidily at a signal."""

import asyncio
import contextlib
import errno
import ipaddress
import os
import socket
from collections.abc import Callable, Iterator
from typing import Any

import uvicorn

from mmrec.errors import InputError
from mmrec.runtime.interrupts import StopSignal
from mmrec.server.app import Server

TICK_SECONDS = 0.05
"""How often a stop signal is looked for."""


def is_loopback(host: str) -> bool:
    """Whether only programs on this machine can reach a host.

    Raises:
        InputError: the host is unknown.
    """
    addresses = (address[4][0] for address in _addresses(host, 0))
    return all(ipaddress.ip_address(str(a).partition("%")[0]).is_loopback for a in addresses)


def listen(host: str, port: int) -> socket.socket:
    """Take a port. Clients that connect before requests are answered wait.

    Args:
        host: address or name.
        port: number; 0 takes one that is free.

    Raises:
        InputError: the host is unknown, or the port cannot be had.
    """
    family, _, _, _, address = _addresses(host, port)[0]
    try:
        listener = socket.create_server(address, family=family)
        # Connections inherit it. Without it the kernel holds back the first event of an answer
        # until the client has acknowledged its head, which clients do up to 40 ms later.
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return listener
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise InputError(
                f"--port {port} of {host} is taken by another program; give another number, or 0 "
                "for any that is free"
            ) from None
        reason = os.strerror(error.errno) if error.errno else error
        raise InputError(f"cannot listen at --host {host} --port {port}: {reason}") from None


def _addresses(host: str, port: int) -> list[Any]:
    try:
        return socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"--host must be an address or a name; {host!r}: {reason}") from None


def url(listener: socket.socket) -> str:
    """The address of the page of a server."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class WebServer(uvicorn.Server):
    """Uvicorn with what this server needs of it. Signals are left to mmrec."""

    def __init__(self, server: Server, shutdown_timeout: float) -> None:
        """Create it.

        Args:
            server: what answers.
            shutdown_timeout: seconds that requests have to end when it stops.
        """
        config = uvicorn.Config(
            server.app,
            lifespan="on",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            loop="asyncio",
            ws="none",
            # more than it takes: requests are ended before
            timeout_graceful_shutdown=int(shutdown_timeout) + 10,
        )
        super().__init__(config)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Handle no signals."""
        yield


def serve(
    server: Server,
    listener: socket.socket,
    shutdown_timeout: float,
    on_ready: Callable[[], object] = lambda: None,
) -> int:
    """Answer requests until a stop signal comes.

    Then no request is accepted any more. Those that run may end; after ``shutdown_timeout`` they
    are ended with an error.

    Args:
        server: what answers.
        listener: a bound socket; it is closed at the end.
        shutdown_timeout: in seconds.
        on_ready: called when requests are answered.

    Returns:
        The number of the signal.
    """
    web = WebServer(server, shutdown_timeout)

    async def run(stop: StopSignal) -> None:
        serving = asyncio.create_task(web.serve([listener]))
        while not (web.started or serving.done()):
            await asyncio.sleep(TICK_SECONDS)
        if not serving.done():
            on_ready()
        while not (stop.is_set() or serving.done()):
            await asyncio.sleep(TICK_SECONDS)
        server.refuse_requests()
        web.should_exit = True
        await asyncio.wait((serving,), timeout=shutdown_timeout)
        server.end_requests()
        await serving

    with listener, StopSignal() as stop:
        asyncio.run(run(stop))
    return stop.signal_number

"""A simulated provider as a process of its own, or as several that share one port."""

import asyncio
import contextlib
import importlib
import multiprocessing
import signal
import socket
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import replace

from headrace_shared.testing.behaviour import Behaviour
from headrace_shared.testing.simulated_provider import SimulatedProvider, listening_socket


def serve(
    behaviour: Behaviour, *, host: str, port: int, workers: int, announce: Callable[[str], None]
) -> None:
    """Serve until SIGINT or SIGTERM; `announce` is called once, with the base URL, when the port listens.

    `workers` processes share the port: each draws its failures from a seed of its own, and
    `GET /stats` at any of them sums up all.
    """
    shared = [listening_socket(host, port, shared=workers > 1)]
    port = shared[0].getsockname()[1]
    shared.extend(listening_socket(host, port, shared=True) for _ in range(workers - 1))
    private = [listening_socket("127.0.0.1", 0) for _ in shared] if workers > 1 else []
    peers = [f"http://127.0.0.1:{listening.getsockname()[1]}" for listening in private]
    own, *others = [
        ([shared[index], *private[index : index + 1]], replace(behaviour, seed=behaviour.seed + index))
        for index in range(workers)
    ]
    spawn = multiprocessing.get_context("spawn")
    processes = [
        spawn.Process(target=_run_worker, args=(sockets, changed, peers), daemon=True)
        for sockets, changed in others
    ]
    for process in processes:
        process.start()
    for sockets, _ in others:
        for listening in sockets:
            listening.close()
    url = f"http://{f'[{host}]' if ':' in host else host}:{port}/v1"
    try:
        _run(_serve(*own, peers, lambda: announce(url)))
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            process.join()


async def _serve(
    sockets: Sequence[socket.socket], behaviour: Behaviour, peers: Sequence[str], started: Callable[[], None]
) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    provider = SimulatedProvider(behaviour)
    provider.peers = tuple(peers)
    for listening in sockets:
        await provider.listen(listening)
    started()
    await stop.wait()
    await provider.close()


def _run_worker(sockets: Sequence[socket.socket], behaviour: Behaviour, peers: Sequence[str]) -> None:
    _run(_serve(sockets, behaviour, peers, lambda: None))


def _run(main: Coroutine[None, None, None]) -> None:
    """Run on uvloop where it is installed."""
    factory: Callable[[], asyncio.AbstractEventLoop] | None = None
    with contextlib.suppress(ImportError):
        factory = importlib.import_module("uvloop").new_event_loop
    with asyncio.Runner(loop_factory=factory) as runner:
        runner.run(main)

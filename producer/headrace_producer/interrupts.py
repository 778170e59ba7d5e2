"""What Ctrl-C does to a command that has started processes of its own."""

import asyncio
import signal


def cancel_on_signals() -> None:
    """End in order at Ctrl-C; a second one does not hurry, because half an end leaves servers behind."""
    task, loop = asyncio.current_task(), asyncio.get_running_loop()

    def cancel() -> None:
        if task is not None and not task.cancelling():
            task.cancel()

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        loop.add_signal_handler(number, cancel)

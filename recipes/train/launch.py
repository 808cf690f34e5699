"""Runs `trl sft` in the terminal, and leaves no process behind whatever happens to either of the two."""

import contextlib
import os
import signal
import subprocess
import sys
import time
import uuid

import psutil


MARK = "LAVIN_TRAIN_RUN"  # in the environment of all processes of a run: torchrun puts each rank in its own session
PATIENCE = 15  # seconds between asking a run to stop and killing it
STOP_SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


def run_watched(command: list[str]) -> int:
    """
    Runs a command with this terminal as its own. Ctrl-C, SIGTERM and a closed terminal stop it and its children; so
    does the end of this process, even by SIGKILL, for which another process waits.

    Returns:
        `int`: its exit code; 128 + N if signal N came, to it or to this process.
    """
    run = uuid.uuid4().hex
    received = []

    def remember(number, _):
        received.append(number)

    handlers = {
        number: signal.signal(number, remember)
        for number in STOP_SIGNALS
        if signal.getsignal(number) != signal.SIG_IGN  # nohup
    }
    guard = child = None
    try:
        # A session of its own: Ctrl-C comes to this process alone, and the run ends with one message.
        guard = subprocess.Popen([sys.executable, "-I", __file__, run], stdin=subprocess.PIPE, start_new_session=True)
        child = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, start_new_session=True, env={**os.environ, MARK: run}
        )
        while not received:
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(timeout=0.2)
                break
        if received:
            stop(run, PATIENCE)
            return 128 + received[0]
        code = child.wait()
        if code:
            stop(run, PATIENCE)  # ranks that wait for one that has failed
        return 128 - code if code < 0 else code
    finally:
        if child is not None and child.poll() is None:
            stop(run, PATIENCE)
        if guard is not None:
            guard.kill()  # before its pipe is closed, and without waiting for its imports on a busy machine
            guard.communicate()
        for number, handler in handlers.items():
            signal.signal(number, handler)


def watch():
    """The waiting process: when the launcher has gone without a word, it stops the run (`sys.argv[1]`)."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    if not sys.stdin.buffer.read():
        stop(sys.argv[1], PATIENCE)


def members(run: str) -> list[psutil.Process]:
    """The living processes of a run."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get(MARK) == run and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def stop(run: str, patience: float):
    """Asks all processes of a run to end (SIGTERM), and after `patience` seconds kills those that have not."""
    for process in members(run):
        with contextlib.suppress(psutil.Error):
            process.terminate()
    until = time.monotonic() + patience
    while (left := members(run)) and time.monotonic() < until:
        time.sleep(0.2)
    for process in left:
        with contextlib.suppress(psutil.Error):
            process.kill()


if __name__ == "__main__":
    watch()

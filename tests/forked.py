"""
`trl` and `lavin train` in processes forked from one in which torch, transformers and TRL are imported already.

What is run is the commands' own main, with arguments, environment, folder and output of its own; only the start of
another Python, of `trl sft` by accelerate and of each rank by torchrun, becomes a fork. Where that start is what is
tested (signals, kills, the command as it is installed), and where another Hub is asked, use a fresh process.

    done = forked.run(["trl", "sft", "--config", "sft.yaml"])
"""

import atexit
import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import traceback
from functools import cache
from pathlib import Path


SOCKET = "LAVIN_FORKED"  # in the environment of what is run, so that `lavin train` finds the server as well
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "DS_ACCELERATOR": "cpu",
    "TOKENIZERS_PARALLELISM": "false",
}
# What `trl sft` imports on its way to the first step; neither `lavin` nor DeepSpeed, which change what others do.
PRELOADED = (
    "accelerate.commands.launch",
    "torch.distributed.run",
    "trl.cli.main",
    "trl.scripts.dpo",
    "trl.scripts.sft",
    "trl.trainer.dpo_trainer",
    "trl.trainer.sft_trainer",
)


def run(command: list[str], cwd=None, env: dict | None = None, fresh=False) -> subprocess.CompletedProcess:
    """As `subprocess.run` of `trl ...` or `lavin ...`; `env` goes before this process's own; `fresh` forks nothing."""
    environment = {**os.environ, **ENVIRONMENT, **(env or {})}
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        if fresh:
            code = subprocess.run(
                command, cwd=cwd, env=environment, stdin=subprocess.DEVNULL, stdout=out, stderr=err, timeout=1800
            ).returncode
        else:
            environment[SOCKET] = _server()
            code = _ask(command, os.fspath(cwd or os.getcwd()), environment, out.fileno(), err.fileno())
        texts = []
        for file in (out, err):
            file.seek(0)
            texts.append(file.read().decode(errors="replace"))
    return subprocess.CompletedProcess(command, code, *texts)


def _ask(command: list[str], cwd: str, environment: dict, out: int, err: int) -> int:
    """Has a command run by the server, and waits for its exit code."""
    request = json.dumps({"command": list(map(str, command)), "cwd": cwd, "env": environment}).encode()
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(environment[SOCKET])
        socket.send_fds(connection, [len(request).to_bytes(8, "little")], [out, err])
        connection.sendall(request)
        answer = connection.recv(16)
    assert answer, "the process that runs it has died"
    return int(answer)


@cache
def _server() -> str:
    """Starts the server with the first run; it ends with this process."""
    place = tempfile.mkdtemp(prefix="lavin-forked-")
    path = os.path.join(place, "socket")
    process = subprocess.Popen(
        [sys.executable, __file__, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        env={**os.environ, **ENVIRONMENT},
    )  # fmt: skip
    atexit.register(_stop, process, place)
    assert process.stdout.readline() == b"ready\n"
    return path


def _stop(process, place):
    process.kill()
    process.wait()
    Path(place, "socket").unlink(missing_ok=True)
    os.rmdir(place)


# In the server


def serve(path: str):
    """Imports what takes long, then forks a process for each request. It has one thread, as forks want it."""
    sys.path.pop(0)  # this folder, which no command has there
    for name in PRELOADED:
        importlib.import_module(name)
    threads = [Path(task, "comm").read_text().strip() for task in Path("/proc/self/task").iterdir()]
    assert len(threads) - threads.count("jemalloc_bg_thd") == 1, threads  # pyarrow's allocator knows of forks
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()
        print("ready", flush=True)
        while sys.stdin not in select.select([listener, sys.stdin], [], [])[0]:  # until the tests have gone
            connection, _ = listener.accept()
            if os.fork() == 0:
                listener.close()
                _answer(connection)
            connection.close()
            signal.signal(signal.SIGCHLD, _reap)


def _reap(*_):
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        pass


def _answer(connection: socket.socket):
    """Starts what is asked for in a process of its own, waits for it, and sends its exit code."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    size, (out, err), *_ = socket.recv_fds(connection, 8, 2)
    size, request = int.from_bytes(size, "little"), b""
    while len(request) < size:
        request += connection.recv(size - len(request))
    request = json.loads(request)
    pid = _fork(lambda: _work(request, out, err))
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    connection.sendall(str(code).encode())
    os._exit(0)


def _fork(work) -> int:
    """A child that does this and ends as a Python does: 0, the number of `sys.exit`, or 1 after an error."""
    sys.stdout.flush()
    sys.stderr.flush()
    if pid := os.fork():
        return pid
    code = 1
    try:
        code = work() or 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
        if isinstance(error.code, str):
            print(error.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _work(request: dict, out: int, err: int) -> int:
    os.setsid()
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["env"])
    null = os.open(os.devnull, os.O_RDONLY)
    for source, target in ((null, 0), (out, 1), (err, 2)):
        os.dup2(source, target)
    sys.argv = request["command"]
    return {"trl": _trl, "lavin": _lavin}[Path(sys.argv[0]).name](sys.argv[1:])


def _trl(arguments: list[str]) -> int:
    import torch.distributed.run
    from accelerate.commands import launch
    from trl.cli.main import main

    launch.simple_launcher, torch.distributed.run.run = _one_process, _ranks
    return main(arguments)


def _one_process(arguments):
    """In place of `accelerate.commands.launch.simple_launcher`."""
    from accelerate.commands.launch import prepare_simple_launcher_cmd_env

    command, environment = prepare_simple_launcher_cmd_env(arguments)
    os.environ.update(environment)
    _script(command[1:])


def _script(arguments: list[str]):
    sys.argv = arguments
    runpy.run_path(arguments[0], run_name="__main__")


def _ranks(arguments):
    """In place of `torch.distributed.run.run`, on one machine. The first rank that fails ends the others."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    size = int(arguments.nproc_per_node)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), WORLD_SIZE=str(size), LOCAL_WORLD_SIZE=str(size))
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        import deepspeed  # noqa: F401  (once for all ranks)

    def rank_of(number: int):
        os.environ.update(RANK=str(number), LOCAL_RANK=str(number), GROUP_RANK="0")
        _script([arguments.training_script, *arguments.training_script_args])

    running = {_fork(lambda number=number: rank_of(number)) for number in range(size)}
    while running:
        pid, status = os.wait()
        running.discard(pid)
        if status:
            for other in running:
                os.kill(other, signal.SIGKILL)
            sys.exit(1)


def _lavin(arguments: list[str]) -> int:
    import multiprocessing

    from lavin.recipes.cli import main
    from lavin.recipes.train import settings, train

    def run_watched(command: list[str]) -> int:
        code = _ask(command, os.getcwd(), dict(os.environ), 1, 2)
        return 128 - code if code < 0 else code

    settings.get_context = lambda kind: multiprocessing.get_context("fork")
    train.run_watched = run_watched
    return main(arguments)


if __name__ == "__main__":
    serve(sys.argv[1])

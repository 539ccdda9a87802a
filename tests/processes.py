"""Scripts in processes of their own, that can be killed. They are forks of one that has imported torch already."""

import importlib
import multiprocessing
import os
import socket
import sys
import time

from support import cli

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["model", "train", "evaluate"])  # train and evaluate import their heavy parts when used


class Process:
    """`python <script>.py <arguments>` in a folder; `prepare` may change the script's modules before it starts."""

    def __init__(self, script, arguments, cwd, environment=None, prepare=None):
        self.output = cwd.with_name(f"{cwd.name}-{script}-{time.monotonic_ns()}.txt")
        options = (script, [str(a) for a in arguments], str(cwd), str(self.output), environment or {}, prepare)
        self.output.touch()
        self.process = FORKS.Process(target=_run, args=options)
        self.process.start()

    def wait(self):
        """The exit code and what was printed; a negative code is the signal that ended it."""
        self.process.join(120)
        if self.process.is_alive():
            self.process.kill()
            raise AssertionError(f"still running after two minutes: {self.text()}")
        return self.process.exitcode, self.text()

    def text(self):
        return self.output.read_text()

    def signal(self, number):
        if self.process.is_alive():
            os.kill(self.process.pid, number)

    def wait_for_lines(self, path, count):
        """Until a file has this many lines, or the process has ended."""
        while self.process.is_alive() and not (path.exists() and path.read_bytes().count(b"\n") >= count):
            time.sleep(0.005)


def _run(script, arguments, cwd, output, environment, prepare):
    descriptor = os.open(output, os.O_WRONLY)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdout, sys.stderr = open(1, "w", buffering=1), open(2, "w", buffering=1)
    os.chdir(cwd)
    os.environ.update(environment)
    import torch

    torch.set_num_threads(1)
    module = importlib.import_module(script)
    sys.argv = [f"{script}.py", *arguments]
    if prepare:
        prepare()
    cli.run_script(sys.argv[0], module.main)


def together(script, arguments, cwd, count=2, prepare=None):
    """The same script in `count` processes, with the environment that torchrun gives; a list of Process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    world = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [
        Process(script, arguments, cwd, world | {"RANK": str(r), "LOCAL_RANK": str(r)}, prepare) for r in range(count)
    ]

"""
Runs a script as a process of its own, as `python SCRIPT` does, but without waiting for its imports.

To import torch and matplotlib takes some three seconds, most of a short run. So a server process
imports them once, and each child is forked from it (multiprocessing's "forkserver").
"""
import multiprocessing
import multiprocessing.connection
import os
import resource
import runpy
import signal
import sys
import tempfile
import threading
from pathlib import Path

server = multiprocessing.get_context("forkserver")
server.set_forkserver_preload(["torch", "torch._dynamo", "numpy", "matplotlib.figure", "tiktoken"])
# For tests that start children from several threads: multiprocessing reads the exit status of any
# child whenever it starts another, and a status can be read only once.
lock = threading.Lock()


def become(argv, cwd, out, err, limit, env, missing):
    """Called in the child: makes it what `cd CWD; ENV python ARGV >OUT 2>ERR` would be."""
    for fd, path in ((1, out), (2, err)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), fd)
    os.chdir(cwd)
    os.environ.update(env)
    # whoever runs the tests may ignore Ctrl-C, and children would inherit that
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for package in missing:
        sys.modules[package] = None  # to import it then raises ImportError
    if limit:
        kind, value = limit
        resource.setrlimit(kind, (value, value))
    sys.argv = argv
    sys.path[0] = os.path.dirname(argv[0])
    runpy.run_path(argv[0], run_name="__main__")


class Child:
    """
    python argv in cwd, with the methods of subprocess.Popen that the tests use. limit is a pair
    (resource.RLIMIT_..., value); env holds more variables of the environment; missing names
    packages that seem not to be installed.
    """

    def __init__(self, argv, cwd, limit=None, env={}, missing=()):
        self.folder = tempfile.TemporaryDirectory()
        self.out = Path(self.folder.name, "out")
        self.err = Path(self.folder.name, "err")
        args = (argv, str(cwd), str(self.out), str(self.err), limit, env, missing)
        self.process = server.Process(target=become, args=args)
        with lock:
            self.process.start()

    def poll(self):
        with lock:
            return self.process.exitcode

    @property
    def returncode(self):
        return self.poll()

    def send_signal(self, number):
        os.kill(self.process.pid, number)

    def kill(self):
        with lock:
            self.process.kill()  # no error if it has ended by itself

    def stdout(self):
        """What it has printed so far."""
        return read(self.out)

    def communicate(self, timeout=150):
        """Waits for the end -> (stdout, stderr). A child that takes longer is killed: a failure."""
        if not multiprocessing.connection.wait([self.process.sentinel], timeout):
            self.kill()
            raise AssertionError(f"{self.process} still runs after {timeout} s")
        self.poll()
        return read(self.out), read(self.err)


def read(path):
    if not path.exists():  # the child has not got that far
        return ""
    return path.read_text(errors="replace")

"""Runs a script as its own process, forked from a server that has made its long imports: most of a short run."""
import multiprocessing
import multiprocessing.connection
import os
import resource
import runpy
import signal
import sys
import tempfile
import threading

server = multiprocessing.get_context("forkserver")
server.set_forkserver_preload(["torch", "torch._dynamo", "numpy", "matplotlib.pyplot", "tiktoken"])
lock = threading.Lock()  # an exit status can be read once, and starting a process reads those of the others


def script(argv, cwd, outputs, limit, env):
    for fd, path in zip((1, 2), outputs):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), fd)
    os.chdir(cwd)
    os.environ.update(env)
    for number in (signal.SIGTERM, signal.SIGHUP):  # whatever this machine ignores for who runs the tests
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if limit:
        resource.setrlimit(limit[0], (limit[1], limit[1]))
    sys.argv, sys.path[0] = argv, os.path.dirname(argv[0])
    runpy.run_path(argv[0], run_name="__main__")


class Child:
    """python argv in cwd, with the methods of subprocess.Popen that tests use. limit: (resource.RLIMIT_..., value)."""

    def __init__(self, argv, cwd, limit=None, env={}):
        self.folder = tempfile.TemporaryDirectory()
        self.outputs = [os.path.join(self.folder.name, name) for name in ("out", "err")]
        self.process = server.Process(target=script, args=(argv, str(cwd), self.outputs, limit, env))
        with lock:
            self.process.start()

    def poll(self):
        with lock:
            return self.process.exitcode

    returncode = property(poll)

    def send_signal(self, number):
        os.kill(self.process.pid, number)

    def kill(self):
        with lock:
            self.process.kill()  # no error where it has ended by itself

    def stdout(self):
        """What it has written so far."""
        return self.read(self.outputs[0])

    @staticmethod
    def read(path):
        if not os.path.exists(path):
            return ""
        with open(path, errors="replace") as f:
            return f.read()

    def communicate(self, timeout=150):
        """Waits for the end -> stdout, stderr. Too late an end is a failure, and leaves nothing that runs on."""
        if not multiprocessing.connection.wait([self.process.sentinel], timeout):
            self.kill()
            raise AssertionError(f"{self.process} still runs after {timeout} s")
        assert self.poll() is not None
        return [self.read(path) for path in self.outputs]

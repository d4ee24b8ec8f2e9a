"""Runs a script as its own process, forked from a server that has imported torch: most of a short run is that import."""
import multiprocessing
import os
import runpy
import sys
import tempfile

server = multiprocessing.get_context("forkserver")
server.set_forkserver_preload(["torch", "numpy", "matplotlib.pyplot", "tiktoken"])


def script(argv, cwd, outputs):
    for fd, path in zip((1, 2), outputs):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), fd)
    os.chdir(cwd)
    sys.argv, sys.path[0] = argv, os.path.dirname(argv[0])
    runpy.run_path(argv[0], run_name="__main__")


def communicate(argv, cwd, timeout):
    """python argv in cwd -> exit status, stdout, stderr."""
    with tempfile.TemporaryDirectory() as folder:
        outputs = [os.path.join(folder, name) for name in ("out", "err")]
        process = server.Process(target=script, args=(argv, str(cwd), outputs))
        process.start()
        process.join(timeout)
        assert process.exitcode is not None, f"{argv} still runs after {timeout} s"
        texts = []
        for path in outputs:
            with open(path, errors="replace") as f:
                texts.append(f.read())
        return process.exitcode, *texts

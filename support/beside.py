"""Several processes where one was started: the script starts itself again and joins the others, as under torchrun."""
import atexit
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time

from support.launch import launch

BESIDE = "REALIZ3D_BESIDE"              # environment variable: number of the process beside which this one was started


def with_others(count, threads):
    """Starts this script count - 1 times more, on the same machine, and joins them as torchrun would, with so many
    threads each; returns Launched, of rank 0. The others end when this one does, and say nothing but why they fail."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = dict(WORLD_SIZE=count, MASTER_ADDR="127.0.0.1", MASTER_PORT=port, OMP_NUM_THREADS=threads,
                  GLOO_SOCKET_IFNAME="lo0" if sys.platform == "darwin" else "lo")
    os.environ.update({name: str(value) for name, value in shared.items()})
    module = sys.modules["__main__"].__spec__                               # of python -m; None: a file
    script = ["-m", module.name] if module else sys.argv[:1]
    command = [sys.executable, *script, *sys.argv[1:], "--threads", str(threads)]
    others, joined = [], threading.Event()
    for rank in range(1, count):
        ranks = {"RANK": str(rank), "LOCAL_RANK": str(rank), BESIDE: str(os.getpid())}
        said = tempfile.TemporaryFile("w+")
        others.append((subprocess.Popen(command, env=os.environ | ranks, stdin=subprocess.DEVNULL,
                                        stdout=subprocess.DEVNULL, stderr=said), said))

    def watch():                        # over one that ends before it has joined, for which rank 0 would wait for hours
        while not joined.wait(0.2):
            for other, said in others:
                if other.poll() is not None:
                    print(f"error: a second process did not start ({last_line(said)}): train in one, with --threads",
                          file=sys.stderr)
                    os._exit(1)

    def tell():
        for other, said in others:
            try:
                failed = other.wait(timeout=5) not in (0, 130, 143)           # the last two: stopped like this one
            except subprocess.TimeoutExpired:
                continue
            if failed:
                print(f"the process beside this one ended with: {last_line(said) or other.returncode}", file=sys.stderr)
    threading.Thread(target=watch, daemon=True).start()
    atexit.register(tell)
    os.environ.update(RANK="0", LOCAL_RANK="0")
    launched = launch(threads)
    joined.set()
    return launched


def last_line(file):
    """The last line of an open file."""
    file.seek(0)
    return file.read().strip().split("\n")[-1]


def end_beside():
    """In a process that `with_others` started: sees to it that it ends with the one that started it, and leaves Ctrl-C
    to that one. Elsewhere nothing."""
    if BESIDE not in os.environ:
        return
    parent = int(os.environ.pop(BESIDE))
    signal.signal(signal.SIGINT, signal.SIG_IGN)            # the training loop listens to it

    def watch():
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)
    threading.Thread(target=watch, daemon=True).start()

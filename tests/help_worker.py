"""Prints, as JSON, what each program named on the command line says to --help: {path: [exit code, output]}.

Each runs in a fork of this process, which has imported PyTorch and SciPy, as that takes seconds, and nothing of the
project.
"""

import json
import os
import runpy
import sys
import tempfile

import scipy.spatial  # noqa: F401
import torch._dynamo  # noqa: F401


def said_by(path):
    """[exit code, output] of `python path --help`, with -m where it lies in a folder."""
    with tempfile.TemporaryFile("w+") as output:
        child = os.fork()
        if child == 0:
            os.dup2(output.fileno(), 1)
            os.dup2(output.fileno(), 2)
            sys.argv = [path, "--help"]
            try:
                runpy.run_module(path.removesuffix(".py").replace("/", "."), run_name="__main__", alter_sys=True)
            except SystemExit as ended:
                sys.stdout.flush()
                os._exit(ended.code or 0)  # at once: to take PyTorch down takes longer than the test
            except BaseException as error:
                print(repr(error), flush=True)
            os._exit(1)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        output.seek(0)
        return [code, output.read()]


if __name__ == "__main__":
    sys.path[0] = os.getcwd()
    print(json.dumps({path: said_by(path) for path in sys.argv[1:]}))

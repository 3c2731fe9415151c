"""Runs the command line in processes of its own that start at once, to be ended by signals: a script for tests.

    launcher.py SEED FILE SIGNALS -- ARGUMENTS

Starts `cli.py ARGUMENTS`, sends it the first of the comma-separated SIGNALS, starts it again, with --resume if FILE is
there, and so on; the last run may come to its end. A signal comes at a random moment after the run's first save of
FILE, every fourth SIGKILL at a random moment after its start. Saves fall due at every step. Prints the status of each
run, as subprocess has it.
"""

import os
import random
import signal
import sys
import time
from pathlib import Path

import torch

import cli
import prior.train  # noqa: F401 -- so that a process that is started has it already
import vqvae.train  # noqa: F401
from vqvae.common import engine

LONGEST_S = 0.15  # from the first save to the signal


def start(arguments: list[str]) -> int:
    pid = os.fork()
    if pid > 0:
        return pid
    status = 1
    try:
        torch.set_num_threads(1)
        engine.SAVE_EVERY_S = 0
        sys.argv = ["cli.py", *arguments]
        cli.main()
        status = 0
    except SystemExit as ended:
        status = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    finally:
        sys.stdout.flush()
        os._exit(status)


def wait_for_a_save(pid: int, path: Path, before: float) -> None:
    """Until FILE is newer than before, or the run is over."""
    while saved_at(path) == before and os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        time.sleep(0.005)


def saved_at(path: Path) -> float:
    return path.stat().st_mtime if path.exists() else 0.0


def main() -> None:
    seed, resume_file, signals, _, *arguments = sys.argv[1:]
    path, moments = Path(resume_file), random.Random(int(seed))
    for number, sent in enumerate([*map(int, filter(None, signals.split(","))), None]):
        before = saved_at(path)
        pid = start([*arguments, "--resume" if path.exists() else "--overwrite"])
        if sent is not None:
            if sent != signal.SIGKILL or number % 4 > 0:
                wait_for_a_save(pid, path, before)
            time.sleep(moments.uniform(0, LONGEST_S))
            os.kill(pid, sent)
        _, status = os.waitpid(pid, 0)
        print(f"status {os.waitstatus_to_exitcode(status)}", flush=True)


if __name__ == "__main__":
    main()

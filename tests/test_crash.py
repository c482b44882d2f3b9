"""The end of a process that cannot end as it should."""

import subprocess
import sys
import time

from llmd.crash import Deadline
from llmd.errors import ExitCode

STUCK = """
import sys, threading, time
from llmd.crash import Deadline, tell_of_crashes
from llmd.errors import ExitCode
tell_of_crashes()
threading.Thread(target=time.sleep, args=(60,)).start()  # no daemon thread: it would be waited for
Deadline().set(ExitCode.INTERNAL, 0.3)
time.sleep(60)
"""


def test_a_stuck_process_leaves_with_its_code():
    began_s = time.monotonic()
    run = subprocess.run([sys.executable, "-c", STUCK], capture_output=True, text=True, check=False, timeout=50)
    assert run.returncode == 70
    assert "the end takes too long" in run.stderr
    assert time.monotonic() - began_s < 40


def test_a_deadline_that_is_cancelled_kills_nobody():
    deadline = Deadline()
    deadline.cancel()
    deadline.set(ExitCode.INTERNAL, 0.05)
    deadline.set(ExitCode.DEVICE_GONE, 0.0)  # the first call counts
    deadline.cancel()
    time.sleep(0.1)


def test_a_fatal_signal_writes_stacks():
    program = (
        "from llmd.crash import tell_of_crashes; tell_of_crashes(); import os, signal; os.kill(os.getpid(), signal.SIGSEGV)"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=50)
    assert "Fatal Python error: Segmentation fault" in run.stderr

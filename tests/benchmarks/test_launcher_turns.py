"""The launcher's overhead by turns: a planted difference under a load that grows, and who runs when."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from benchmark_script import load_script


@pytest.fixture(scope="module")
def launcher():
    return load_script("launcher")


def test_a_planted_difference_is_found_under_a_load_that_grows(launcher):
    """0.1 s a cell and 0.02 s more on the other side; both slow down by half a per cent a turn."""
    turns = launcher.Turns()
    ends, now = {"bare": [], "launched": []}, 0.0
    for i in range(40):
        side, began = ("bare", "launched")[i % 2], now
        cell = (0.1 if side == "bare" else 0.12) * 1.005**i
        now += 0.7 * cell  # what was left of the cell that the last turn cut
        while now < began + 3.0:
            ends[side].append(now)
            now += cell
        turns.log.append((side, began, now))
    bare, launched, differences = turns.differences(ends, "bare", "launched")
    assert len(bare) == len(launched) == len(differences) == 39
    slower = 1.005**19.5  # in the middle; neighbours in both orders, so that the load's growth cancels
    # the growth of a turn is half a per cent of 0.1 s, 2.5 % of the difference, on either side of it
    np.testing.assert_allclose(np.median(differences), 0.02 * slower, rtol=0.05)
    ends["launched"] = ends["launched"][:3]  # too few in a turn for a median: none is made up
    assert turns.differences(ends, "bare", "launched") == ([], [], [])


def test_one_runs_at_a_time_and_the_last_to_the_end(launcher):
    code = "import time; time.sleep(60)"
    both = {side: subprocess.Popen([sys.executable, "-c", code]) for side in ("a", "b")}
    turns = launcher.Turns(seconds=0.0)
    try:
        pids = {side: process.pid for side, process in both.items()}
        running = []
        for _ in range(4):
            turns.look(pids)
            running.append([side for side, pid in pids.items() if not is_stopped(pid)])
        assert running == [["a"], ["b"], ["a"], ["b"]]
        turns.look({"a": pids["a"]})
        assert not is_stopped(pids["a"])
        turns.look({"a": pids["a"]})
        assert not is_stopped(pids["a"])
        assert [side for side, *_ in turns.log] == ["a", "b", "a", "b", "a"]
    finally:
        for process in both.values():
            process.send_signal(signal.SIGKILL)
            process.wait()


def is_stopped(pid: int) -> bool:
    """Waits until the kernel has done what the signal asks, which is at once but not in the same breath."""
    time.sleep(0.1)
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"

"""Claims: one owner at a time, whatever the clocks say, on a folder and on an object store."""

import json
import subprocess
import sys
import threading
import uuid

import pytest

from scaling import claims
from scaling.claims import ClaimLost, FolderStore, Keeper, ObjectStore, Observer, take


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture(params=["folder", "memory"])
def store(request, tmp_path):
    if request.param == "folder":
        return FolderStore(tmp_path / "attempts")
    return ObjectStore(f"memory://{uuid.uuid4().hex}/attempts")


def elsewhere(store, number, **fields):
    """Makes an attempt look as if another machine had begun it."""
    name = claims.attempt_name(number)
    store.replace(name, json.dumps({**json.loads(store.read(name)), "machine": "other", **fields}).encode())


def test_one_of_many_at_once_gets_the_claim(store):
    got, start = [], threading.Barrier(16)

    def run():
        start.wait()
        got.append(take(store, "c", Observer()))

    threads = [threading.Thread(target=run) for _ in range(16)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert len(got) == 16 and sum(c is not None for c in got) == 1
    assert store.names() == ["0001.json"]


def test_a_silent_claim_dies_by_the_lookers_clock_alone(store):
    clock = Clock()
    watcher = Observer(heartbeat=1.0, clock=clock)
    first = take(store, "c", Observer(heartbeat=1.0))
    elsewhere(store, 1, began=4e9)  # a clock a lifetime ahead
    assert take(store, "c", watcher) is None
    clock.now = 5.9  # PATIENCE is 6 heartbeats of 1 s
    assert take(store, "c", watcher) is None
    elsewhere(store, 1, beat=1)  # it lives: the count begins anew
    clock.now = 7.0
    assert take(store, "c", watcher) is None
    clock.now = 12.9
    assert take(store, "c", watcher) is None
    clock.now = 13.1
    second = take(store, "c", watcher)
    assert second.number == 2
    first.beat()  # it was only asleep
    with pytest.raises(ClaimLost):
        first.check()
    first.close("finished")  # says nothing any more
    assert [a["outcome"] for a in claims.read_attempts(store)] == ["preempted", None]
    second.close("finished")
    assert [a["outcome"] for a in claims.read_attempts(store)] == ["preempted", "finished"]


def test_one_who_slept_looks_before_it_writes(store):
    clock = Clock()
    claim = take(store, "c", Observer(heartbeat=1.0))
    claim.clock, claim.last = clock, clock()
    store.create("0002.json", store.read("0001.json"))
    claim.check()  # a heartbeat was due 0 s ago: nothing to look at
    clock.now = 2.1
    with pytest.raises(ClaimLost):
        claim.check()


def test_a_patient_claimants_own_heartbeat_counts(store):
    clock = Clock()
    watcher = Observer(heartbeat=1.0, clock=clock)
    take(store, "c", Observer(heartbeat=10.0))
    elsewhere(store, 1)
    assert take(store, "c", watcher) is None
    clock.now = 59.0
    assert take(store, "c", watcher) is None
    clock.now = 61.0
    assert take(store, "c", watcher).number == 2


def test_a_dead_process_of_this_machine_is_known_at_once(tmp_path):
    code = (
        "import sys; from scaling.claims import *; "
        f"sys.exit(take(FolderStore({str(tmp_path / 'a')!r}), 'c', Observer()) is None)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    store = FolderStore(tmp_path / "a")
    assert claims.outcome(claims.latest(store)[1]) is not None
    assert take(store, "c", Observer()).number == 2
    assert claims.outcome(claims.latest(store)[1]) is None and take(store, "c", Observer()) is None


def test_the_keeper_beats_tells_the_step_and_closes(store):
    observer = Observer(heartbeat=0.02)
    with Keeper(observer) as keeper, keeper.hold(store, "c") as claim:
        claim.at_step(6)
        claim.at_step(7)
        seen = threading.Event()
        for _ in range(500):
            if (claims.latest(store)[1]["step_beat"] or 0) > 0:
                break
            seen.wait(0.01)
        assert claims.latest(store)[1]["step"] == 7
        with keeper.hold(store, "c") as second:
            assert second is None
    assert claims.latest(store)[1]["outcome"] == "preempted"


def test_a_put_that_is_sent_again_meets_its_own_object():
    """s3 and gs may answer a retried conditional put with "exists" although it was ours that got through."""
    store = ObjectStore(f"memory://{uuid.uuid4().hex}")
    put = store.fs.pipe_file

    class Retrying:
        def __getattr__(self, name):
            return getattr(store_fs, name)

        def pipe_file(self, path, data, mode="overwrite"):
            put(path, data, mode=mode)
            if mode == "create":
                raise OSError("412 Precondition Failed")

    store_fs, store.fs = store.fs, Retrying()
    assert store.create("0001.json", b"mine") and not store.create("0001.json", b"other's")

"""Who trains a cell: a numbered file an attempt, so that every worker may be given the whole list.

The attempts of a cell are the files 0001.json, 0002.json, ... of one folder. Attempt n + 1 is begun by
creating its file, which storage lets one process do: the cell is then claimed. After that the claimant
alone writes the file: a counter that grows while it lives (the heartbeat), the step it has come to, and in
the end the outcome. Nothing is ever removed, so the files are also the log of attempts.

Nobody compares clocks. A claim is dead when its process, known by machine, id and start, is gone from the
machine that looks; or when its counter did not change while the looker's own monotonic clock went on by
``PATIENCE`` heartbeats. Who was only asleep finds attempt n + 1 at its next heartbeat, and stops.

The one thing asked of storage is a create that fails where the file exists: a hard link on a shared file
system, a conditional put (if-none-match) on ``gs://`` and ``s3://``.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path

from scaling.files import StorageError, explain_os_error, write_whole

HEARTBEAT = 10.0
"""Seconds between heartbeats."""
PATIENCE = 6
"""Heartbeats that may be missed."""
JOB = "SCALING_JOB"
"""Environment variable: the scheduler's name of the job that a worker runs in. It never runs one job twice
at a time, so that the claim of an earlier run of it is dead."""
OUTCOMES = ("finished", "diverged", "failed", "preempted", "released")


class ClaimLost(BaseException):
    """Another worker took the cell over: this one slept longer than a dead one would have."""


class FolderStore:
    """Attempts in a folder that all workers see."""

    def __init__(self, path: Path | str):
        self.path = Path(path)

    def names(self) -> list[str]:
        try:
            return sorted(n for n in os.listdir(self.path) if not n.startswith("."))
        except FileNotFoundError:
            return []

    def read(self, name: str) -> bytes | None:
        try:
            return (self.path / name).read_bytes()
        except FileNotFoundError:
            return None

    def create(self, name: str, data: bytes) -> bool:
        """Writes a whole new file; False where it exists. A link, unlike O_EXCL, never shows a part of it."""
        aside = self.path / f".{name}.{uuid.uuid4().hex}.tmp"
        try:
            write_whole(aside, data)
            os.link(aside, self.path / name)
        except FileExistsError:
            return (
                self.read(name) == data
            )  # ours, where an answer was lost on the way and the link tried again
        except OSError as error:
            raise StorageError(explain_os_error(error, self.path)) from error
        finally:
            with contextlib.suppress(OSError):
                aside.unlink(missing_ok=True)
        return True

    def replace(self, name: str, data: bytes) -> None:
        write_whole(self.path / name, data)

    def exists(self, name: str) -> bool:
        return (self.path / name).exists()


class ObjectStore:
    """Attempts below a URL of fsspec, whose file system can create conditionally (gs, s3, memory)."""

    def __init__(self, url: str):
        import fsspec

        self.fs, self.root = fsspec.core.url_to_fs(url.rstrip("/"), use_listings_cache=False)

    def names(self) -> list[str]:
        try:
            return sorted(str(p).rsplit("/", 1)[-1] for p in self.fs.ls(self.root, detail=False))
        except FileNotFoundError:
            return []

    def read(self, name: str) -> bytes | None:
        try:
            return self.fs.cat_file(f"{self.root}/{name}")
        except FileNotFoundError:
            return None

    def create(self, name: str, data: bytes) -> bool:
        """Writes a whole new object; False where it exists.

        Each file system has its own error for a failed condition, and a put that was sent again after a lost
        answer meets its own object: so what lies there decides.
        """
        try:
            self.fs.pipe_file(f"{self.root}/{name}", data, mode="create")
        except Exception:
            there = self.read(name)
            if there is None:
                raise
            return there == data
        return True

    def replace(self, name: str, data: bytes) -> None:
        self.fs.pipe_file(f"{self.root}/{name}", data)

    def exists(self, name: str) -> bool:
        return self.read(name) is not None


def machine() -> str:
    """This machine, this boot and this space of process ids: where a process id means something."""
    parts = [platform.node()]
    with contextlib.suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip()[:8])
        parts.append(str(os.stat("/proc/self/ns/pid").st_ino))
    return " ".join(parts)


def process_start(pid: int) -> str | None:
    """When a process of this machine began, in the kernel's ticks; None where it is gone (or not Linux)."""
    try:
        state, *rest = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if state in "ZX" else rest[18]


def is_gone(record: Mapping) -> bool:
    """Whether the claimant is of this machine and no longer there; False where that cannot be told."""
    if record["machine"] != machine() or record.get("started") is None:
        return False
    return process_start(record["pid"]) != record["started"]


def outcome(record: Mapping) -> str | None:
    """How an attempt ended, ``preempted`` where its process is gone without a word; None: under way?"""
    return record["outcome"] or ("preempted" if is_gone(record) else None)


def attempt_name(n: int) -> str:
    return f"{n:04d}.json"


def numbers(store) -> list[int]:
    """The attempts that were begun, in order."""
    return sorted(int(n[:-5]) for n in store.names() if n.endswith(".json") and n[:-5].isdigit())


def latest(store) -> tuple[int, dict | None]:
    """Number and content of the last attempt; (0, None) before the first."""
    number = max(numbers(store), default=0)
    data = store.read(attempt_name(number)) if number else None
    return number, None if data is None else json.loads(data)


def read_attempts(store) -> list[dict]:
    """All attempts in order; ``outcome`` of one that was taken over without a word is ``preempted``."""
    found = [{"attempt": n, **json.loads(store.read(attempt_name(n)))} for n in numbers(store)]
    for attempt in found[:-1]:
        attempt["outcome"] = attempt["outcome"] or "preempted"
    return found


class Observer:
    """What one process has seen of others' heartbeats."""

    def __init__(self, heartbeat: float = HEARTBEAT, clock=time.monotonic):
        self.heartbeat, self.clock, self.seen = heartbeat, clock, {}

    def is_dead(self, key: str, record: Mapping) -> bool:
        """Whether a claim without an outcome has died. ``key``: the cell's; the same at every look."""
        if is_gone(record) or of_job(os.environ.get(JOB))(record):
            return True
        sign, now = (record["owner"], record["beat"]), self.clock()
        if self.seen.get(key, (None,))[0] != sign:
            self.seen[key] = (sign, now)
        return now - self.seen[key][1] > PATIENCE * max(self.heartbeat, record["heartbeat"])


class Claim:
    """An attempt that this process holds.

    Attributes:
      number: of the attempt, from 1. step: what the next heartbeat tells.
    """

    def __init__(self, store, number: int, record: dict, clock=time.monotonic):
        self.store, self.number, self.record, self.clock = store, number, record, clock
        self.step: int | None = None
        self.first: tuple | None = None
        self.lost, self.lock, self.last = False, threading.Lock(), clock()

    def at_step(self, step: int) -> None:
        """Takes note of the training loop's progress: the first call is its start, the second its first step.

        Raises:
          ClaimLost: as ``check``.
        """
        first, self.step = self.first, step
        if first is None:
            self.first = (step, None)
        elif first[1] is None:
            self.first = (step, self.clock())  # the first step's time is the compiler's
            self.beat()
        self.check()

    def rate(self) -> float | None:
        """Steps a second since this attempt's first step."""
        if self.first is None or self.first[1] is None or self.step <= self.first[0]:
            return None
        return (self.step - self.first[0]) / max(1e-9, self.clock() - self.first[1])

    def beat(self) -> None:
        """Shows that the claimant lives, unless the claim is another's by now; then ``lost``.

        A write that storage refuses is made up for by the next; after ``PATIENCE`` of them it is lost too.
        """
        with self.lock:
            if self.lost or self.record["outcome"] is not None:
                return
            moved = self.step is not None and self.step != self.record["step"]
            self.record |= {"beat": self.record["beat"] + 1, "step": self.step}
            self.record["steps_per_second"] = self.rate()
            if moved and self.first is not None and self.first[1] is not None:
                self.record["step_beat"] = self.record["beat"]
            try:
                if self.store.exists(attempt_name(self.number + 1)):
                    self.lost = True
                    return
                self.store.replace(attempt_name(self.number), encode(self.record))
                self.last = self.clock()
            except Exception:  # each storage has errors of its own
                self.lost = self.clock() - self.last > PATIENCE * self.record["heartbeat"]

    def check(self) -> None:
        """To be called before anything is written; looks at storage where no heartbeat came for a while.

        Raises:
          ClaimLost: another has the cell.
        """
        if not self.lost and self.clock() - self.last > 2 * self.record["heartbeat"]:
            self.beat()
        if self.lost:
            raise ClaimLost(f"attempt {self.number} was taken over")

    def close(self, outcome: str, **words) -> None:
        """Ends the attempt; what it led to must be on disk. Nothing where the claim is lost or closed."""
        assert outcome in OUTCOMES, outcome
        with self.lock:
            if self.lost or self.record["outcome"] is not None:
                return
            if self.store.exists(attempt_name(self.number + 1)):
                self.lost = True
                return
            self.record |= {"outcome": outcome, "step": self.step, "ended": time.time(), **words}
            self.store.replace(attempt_name(self.number), encode(self.record))


def encode(record: Mapping) -> bytes:
    return json.dumps(record).encode()


def take(store, key: str, observer: Observer, purpose: str = "train") -> Claim | None:
    """Claims a cell; None where another has it.

    Args:
      store: of the cell's attempts. key: the cell's name. observer: of this process; looks again and again.
      purpose: ``train``, or what else must not meet a training.
    """
    number, last = latest(store)
    if number and (last is None or (last["outcome"] is None and not observer.is_dead(key, last))):
        return None
    record = {
        "owner": uuid.uuid4().hex,
        "machine": machine(),
        "pid": os.getpid(),
        "started": process_start(os.getpid()),
        "job": os.environ.get(JOB),
        "purpose": purpose,
        "heartbeat": observer.heartbeat,
        "beat": 0,
        "step": None,
        "step_beat": None,
        "began": time.time(),
        "outcome": None,
    }
    if not store.create(attempt_name(number + 1), encode(record)):
        return None
    return Claim(store, number + 1, record)


class Keeper:
    """The heart of a process: a thread that beats for every claim it holds and calls ``on_beat``."""

    def __init__(self, observer: Observer, on_beat=lambda: None):
        self.observer, self.claims, self.end, self.on_beat = observer, set(), threading.Event(), on_beat
        self.thread = threading.Thread(target=self._beat, daemon=True, name="heartbeat")

    def __enter__(self) -> Keeper:
        self.thread.start()
        return self

    def __exit__(self, *exc) -> None:
        self.end.set()
        self.thread.join()

    def _beat(self) -> None:
        while not self.end.wait(self.observer.heartbeat):
            for claim in list(self.claims):
                claim.beat()
            self.on_beat()

    @contextlib.contextmanager
    def hold(self, store, key: str, purpose: str = "train"):
        """Yields a claim, or None where another has the cell. One left open is closed as ``preempted``."""
        claim = take(store, key, self.observer, purpose)
        if claim is None:
            yield None
            return
        self.claims.add(claim)
        try:
            yield claim
        finally:
            self.claims.discard(claim)
            claim.close("preempted")


def of_process(pid: int) -> Callable[[Mapping], bool]:
    """Whether an attempt is that of a process of this machine."""
    return lambda record: (record["machine"], record["pid"]) == (machine(), pid)


def of_job(job: str | None) -> Callable[[Mapping], bool]:
    """Whether an attempt is that of a scheduler's job."""
    return lambda record: job is not None and record.get("job") == job


def close_for(store, is_theirs: Callable[[Mapping], bool], outcome: str, **words) -> bool:
    """Ends the attempt of a process or job that is known to have ended, on its behalf.

    Returns:
      Whether its attempt was the last one and open.
    """
    return amend(store, is_theirs, None, outcome, ended=time.time(), **words)


def amend(store, is_theirs: Callable[[Mapping], bool], was: str | None, outcome: str, **words) -> bool:
    """Gives the last attempt another outcome, where it is theirs and had ``was``; whether that is so."""
    number, last = latest(store)
    if not last or last["outcome"] != was or not is_theirs(last):
        return False
    store.replace(attempt_name(number), encode({**last, "outcome": outcome, **words}))
    return True

"""A hung rank is named and the run ended: heartbeats in the process group's store, compared on every rank."""

from __future__ import annotations

import os
import sys
import threading
import time
import traceback

import torch.distributed as dist

from train.parallel import World

EXIT = 75  # EX_TEMPFAIL: worth starting again


class Watchdog:
    """Counts what this rank has passed through (`at`), and from its own thread watches that all ranks go on.

    A rank that stands still keeps the others waiting in a collective: they have all passed more places than it has.
    When nothing has moved here for `seconds`, the rank or ranks that have come least far are named on stderr, with
    where they stand, and every rank exits with 75. A frozen or dead rank is named all the same: its last word is in
    the store.

    Args:
        seconds: 0 watches nothing, nor does a world of one rank.
        name: begins the message.
    """

    def __init__(self, world: World, seconds: float, name: str) -> None:
        self.world, self.seconds, self.name = world, seconds, name
        self.passed, self.place, self.factor = 0, "the start", 1.0
        self.since = time.monotonic()
        self.stopped = threading.Event()
        self.thread: threading.Thread | None = None

    def start(self) -> None:
        """Begin to watch."""
        if self.world.size == 1 or not self.seconds:
            return
        store = dist.distributed_c10d._get_default_store()
        # a connection of its own: another thread may wait in the shared one
        self.store = dist.PrefixStore("watchdog", store.clone() if hasattr(store, "clone") else store)
        self.waiter = threading.main_thread().ident
        self._publish()
        self.thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self.thread.start()

    def at(self, place: str, factor: float = 1.0) -> None:
        """This rank has come to `place`, the same on all ranks in the same order; it may take factor * seconds."""
        self.place, self.factor, self.since = place, factor, time.monotonic()
        self.passed += 1

    def stop(self) -> None:
        """Watch no more."""
        self.stopped.set()
        if self.thread is not None:
            self.thread.join()

    def _publish(self) -> None:
        self.store.set(str(self.world.rank), f"{self.passed}\t{self.place}")

    def _watch(self) -> None:
        while not self.stopped.wait(min(5.0, self.seconds / 10)):
            try:
                self._publish()
                if time.monotonic() - self.since > self.seconds * self.factor:
                    self._end()
            except RuntimeError:  # the store is gone with the rank that kept it: the collectives will say so
                return

    def _end(self) -> None:
        passed, places = {}, {}
        for rank in range(self.world.size):
            if rank == self.world.rank:
                passed[rank], places[rank] = self.passed, self.place
            elif self.store.check([str(rank)]):
                count, places[rank] = self.store.get(str(rank)).decode().split("\t")
                passed[rank] = int(count)
            else:
                passed[rank], places[rank] = -1, "before the start"
        least = min(passed.values())
        behind = [rank for rank, count in passed.items() if count == least]
        if self.world.rank in behind:  # where exactly is known to itself alone
            print(f"{self.name}: rank {self.world.rank} stands in {self._frame()}", file=sys.stderr, flush=True)
        if self.store.add("told", 1) == 1:
            print(self._message(behind, places), file=sys.stderr, flush=True)
        time.sleep(min(2.0, self.seconds))  # the others may have their own last word
        os._exit(EXIT)

    def _message(self, behind: list[int], places: dict[int, str]) -> str:
        spent = f"no progress for {self.seconds * self.factor:.0f} s"
        if len(behind) == self.world.size:
            who = f"all {self.world.size} ranks stand at {places[0]}"
            return f"{self.name}: {spent}: {who}; the last checkpoint is intact"
        who = f"rank {behind[0]} hangs" if len(behind) == 1 else f"ranks {', '.join(map(str, behind))} hang"
        ahead = next(place for rank, place in places.items() if rank not in behind)
        return (
            f"{self.name}: {spent}: {who} at {places[behind[0]]} while the others wait at {ahead}; "
            "the last checkpoint is intact"
        )

    def _frame(self) -> str:
        frame = sys._current_frames().get(self.waiter)
        if frame is None:
            return "no frame"
        last = traceback.extract_stack(frame)[-1]
        return f"{last.filename}:{last.lineno} ({last.name})"

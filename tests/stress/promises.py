"""What a data directory promises: what a restore from it has to have, which files have to stay in it, and when it has to name a gap.

A model beside the product: it knows what was acknowledged when, and reads nothing of a directory but names and HEADs.

A directory can hold files of segments of which none was restored from the other: a worker created one, or it was restored from elsewhere. The
files of such a segment are an era. A restore takes the newest whole snapshot, and all logs since, whichever era those are of.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from shmcache.supervisor import datadir
from shmcache.supervisor import format as fmt

Ancestors = dict[int, frozenset[int]]  # a segment, by header.created_ms -> those from whose files it came, in any number of steps


@dataclasses.dataclass(eq=False)
class Files:
    """A data directory, and what each of its files has to have."""

    path: Path
    places: int  # of a floor: what each key shows at least
    snapshots: dict[str, tuple[Any, int]] = dataclasses.field(default_factory=dict)  # name -> floor, era
    logged: list[Any] = dataclasses.field(default_factory=list)  # of each era, the floor of its snapshots' logs
    era: int = 0
    damaged: set[str] = dataclasses.field(default_factory=set)
    gap_behind: set[str] | None = None  # the log began again in the midst of a life: a restore from one of these, or from none, has a gap

    def __post_init__(self) -> None:
        if not self.logged:
            self.logged.append(np.zeros(self.places, np.int64))

    def listing(self) -> tuple[list[tuple[int, Path]], list[tuple[int, Path]]]:
        return fmt.listing(self.path) if self.path.exists() else ([], [])

    def names(self) -> set[str]:
        return {path.name for of_kind in self.listing() for _, path in of_kind}

    def is_empty(self) -> bool:
        return not self.names()

    def whole(self) -> list[str]:
        """Snapshots that a restore can use, the newest last."""
        return [path.name for _, path in self.listing()[0] if path.name not in self.damaged]

    def copied(self, path: Path) -> Files:
        """A copy at `path`, by links: nothing changes such a file in place (tamper() neither)."""
        shutil.copytree(self.path, path, copy_function=os.link)
        return Files(path, self.places, dict(self.snapshots), [logged.copy() for logged in self.logged], self.era, set(self.damaged), self.gap_behind)

    def promised(self, rows: Any) -> Any:
        """The floor after a restore; if nothing is there, of a segment that starts empty: what the rows have."""
        whole = self.whole()
        if whole:
            floor, era = self.snapshots[whole[-1]]
            return np.maximum(floor, self.logged[era])
        return np.append(rows, 0) if self.is_empty() else self.logged[self.era].copy()

    def has_gap(self) -> bool:
        """Does a restore have to say so?"""
        whole = self.whole()
        return self.gap_behind is not None and (not whole or whole[-1] in self.gap_behind)

    def restored(self) -> None:
        """A segment goes on from here."""
        whole = self.whole()
        if whole:
            self.era = self.snapshots[whole[-1]][1]

    def adopted(self) -> None:
        """By a segment that does not come from here."""
        self.logged.append(np.zeros(self.places, np.int64))
        self.era = len(self.logged) - 1

    def log(self, floor: Any, since: Any) -> bool:
        """What was acknowledged `since` is in a log here, whichever snapshot is restored: was anything?"""
        acknowledged = floor > since
        for logged in self.logged:
            logged[acknowledged] = floor[acknowledged]
        return bool(acknowledged.any())

    def damage(self, name: str, at: float, bit: int) -> None:
        """Flip a bit of a file; of its copies none."""
        path = self.path / name
        data = bytearray(path.read_bytes())
        data[int(at * len(data))] ^= 1 << bit
        path.with_name("damage").write_bytes(data)
        path.with_name("damage").rename(path)
        self.damaged.add(name)

    def remove(self, name: str) -> None:
        """A whole snapshot, by hand. The next one that is written may have its number again."""
        (self.path / name).unlink()
        del self.snapshots[name]
        if self.gap_behind is not None:
            self.gap_behind = self.gap_behind - {name}

    # ---- whose files these are ----

    def parents(self) -> set[int]:
        """Those whose files a restore takes."""
        whole = self.whole()
        head = datadir.head(self.path / whole[-1], "snapshot") if whole else {"log_from": 1}
        logs = [datadir.head(path, "log") for number, path in self.listing()[1] if number >= head["log_from"]]
        return {one["segment_created_ms"] for one in (head, *logs) if "segment_created_ms" in one}

    def others(self, segment: int, ancestors: Ancestors) -> set[str]:
        """Files that the segment has nothing of: they have to stay, as long as it lives. Whole snapshots, and the logs that they need."""
        own = ancestors[segment] | {segment}
        heads = {name: datadir.head(self.path / name, "snapshot") for name in self.whole()}
        theirs = {name: head["log_from"] for name, head in heads.items() if head["segment_created_ms"] not in own}
        if not theirs:
            return set()
        logs = {path.name for number, path in self.listing()[1] if number >= list(theirs.values())[-1]
                and datadir.head(path, "log").get("segment_created_ms", segment) not in own}  # fmt: skip
        return set(theirs) | logs

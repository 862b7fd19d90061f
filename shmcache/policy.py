"""`Policy`: how a segment stands in front of a store. What its handles do: stored.py, through.py, back.py.

    through    a write is stored, then cached
    around     a write is stored, and what was cached goes; the next miss loads it
    back       a write is cached and acknowledged; the supervisor stores it (supervisor/writeback.py)

With each a miss loads from the store, once for all processes of the host. The policy stands in the segment's header, so that no two workers
can disagree; a handle without a store reads what is cached, and is refused writes that would pass the store by.
"""

from __future__ import annotations

import dataclasses
import time
from typing import TYPE_CHECKING, Any

import msgpack

from shmcache import errors
from shmcache.core import _core, _dirty
from shmcache.segment import parse_size

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from shmcache.cache import Cache
    from shmcache.stores import Store

MODES = ("none", "through", "around", "back")  # by the header's number


@dataclasses.dataclass(frozen=True)
class Policy:
    """What create() and open() take as policy=; "through" is Policy("through"). Kept in the segment.

    Args:
        mode: "through", "around" or "back".
        timeout: seconds that a call of the store may take, and that a caller waits for another's.
        negative_ttl: seconds for which it is remembered that a key is not in the store; 0: it is asked each time.
        stale_ttl: seconds beyond its ttl for which a copy is given while one caller loads it anew, or the store is down.
        flush_every: back: seconds between two passes over what is to be stored.
        dirty_limit: back: bytes, or "64M", that may wait to be stored; who would write more waits. Never over a quarter of the slab memory.
            What the store refuses may be half as much, beside that; if all that waits fails, a sixteenth more may wait.
    """

    mode: str
    timeout: float = 5.0
    negative_ttl: float = 0.0
    stale_ttl: float = 0.0
    flush_every: float = 0.5
    dirty_limit: int | str | None = None

    def __post_init__(self) -> None:
        if self.mode not in MODES[1:]:
            raise errors.InvalidConfig(f"policy is 'through', 'around' or 'back', not {self.mode!r}")
        for name in ("timeout", "negative_ttl", "stale_ttl", "flush_every"):
            n = getattr(self, name)
            if isinstance(n, bool) or not isinstance(n, (int, float)) or not 0 <= n < 1e6 or (n == 0 and not name.endswith("_ttl")):
                raise errors.InvalidConfig(f"{name} of a policy is a number of seconds, above 0 but for a ttl, not {n!r}")
        if self.dirty_limit is not None:
            parse_size(self.dirty_limit, "dirty_limit")

    @property
    def number(self) -> int:
        """In the header."""
        return MODES.index(self.mode)

    @property
    def dirty_bytes(self) -> int:
        """dirty_limit in bytes; 0: as much as may be."""
        return 0 if self.dirty_limit is None else parse_size(self.dirty_limit, "dirty_limit")

    def packed(self) -> bytes:
        """For the header's configuration."""
        packed: bytes = msgpack.packb({"policy": dataclasses.asdict(self)})
        return packed


def unpacked(config: bytes) -> Policy:
    """Of packed()."""
    return Policy(**msgpack.unpackb(config)["policy"])


def policy_of(mapping: _core.Mapping) -> Policy | None:
    """Of a live segment; None: it stands before no store. Raises: NotASegment if it is damaged."""
    if mapping.settings()["policy"] == 0:
        return None
    try:
        return unpacked(mapping.config)
    except (ValueError, TypeError, KeyError, msgpack.UnpackException) as e:
        raise errors.NotASegment(f"the policy in the header of {mapping.name!r} is damaged ({e}): unlink it and create it again") from None


def check(policy: Policy, store: Store, tags: Callable[[bytes], Iterable[str]] | None = None) -> None:
    """Do they go together? Raises: InvalidConfig."""
    if policy.mode == "back" and tags is not None:
        raise errors.InvalidConfig("what is written back has no tags: take policy='through', or leave tags= out")
    if policy.mode == "back" and not store.ordered:
        raise errors.InvalidConfig(
            "write-back needs a store that takes versions, or what a killed supervisor had begun could undo newer writes: "
            "give SQLStore version_column=, or take policy='through'"
        )


def store_stats(cache: Cache) -> dict[str, Any]:
    """stats()["store"] of any handle on a segment that has a policy."""
    policy = policy_of(cache.mapping)
    assert policy is not None
    figures: dict[str, Any] = {"policy": policy.mode, **cache.store_counters()}
    if policy.mode == "back":
        header, now = cache.segment.header, time.time() * 1000

        def since(field: str) -> float | None:
            at = int(header[field])
            return max(0.0, now - at) / 1000 if at else None

        figures |= {
            "dirty_items": _dirty.Dirty(cache).items(), "dirty_bytes": int(header["dirty"]), "oldest_s": since("oldest_dirty_ms"),
            "failing_s": since("flush_failed_ms"), "refused": int(header["flush_refused"]),
        }  # fmt: skip
    return figures

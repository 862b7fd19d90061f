"""Figures as metrics by Prometheus' conventions: those of a segment, and as text. What a sidecar has besides: sidecar/metrics.py."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple


class Metric(NamedTuple):
    """name: without the prefix shmcache_; that of a counter ends with _total. values: (labels, the same ones for all, and the value)."""

    name: str
    kind: str  # counter, gauge
    text: str
    values: list[tuple[dict[str, str], float]]


COUNTERS = (
    ("hits", "Gets that found the key."), ("misses", "Gets that did not."), ("sets", "Values stored."), ("deletes", "Items deleted."),
    ("evictions", "Items removed to make room."), ("inline_evictions", "Of these by the writer that needed the room."),
    ("expirations", "Items removed because their time was over."), ("lock_waits", "Locks that a process slept for."),
    ("takeovers", "Locks taken over from the dead."), ("stalls", "Locks given up on after the limit."),
    ("locks_lost", "Blocks under cache.lock that ended after the lock's ttl."),
)  # fmt: skip


def of_segment(s: dict[str, Any]) -> Iterator[Metric]:
    """s: Cache.stats()."""
    label = {"segment": s["name"]}

    def gauge(name: str, text: str, value: float) -> Metric:
        return Metric(name, "gauge", text, [(label, value)])

    for name, text in COUNTERS:
        yield Metric(name + "_total", "counter", text, [(label, s[name])])
    yield Metric(
        "repairs_total", "counter", "What the dead left, put in order.", [({**label, "kind": k}, n) for k, n in s["repairs"].items()]
    )
    yield gauge("items", "Items stored.", s["items"])
    yield gauge("size_bytes", "Bytes of the segment.", s["size_bytes"])
    yield gauge("used_bytes", "Bytes of chunks and pages in use.", s["used_bytes"])
    yield gauge("processes", "Living processes.", len(s["processes"]))
    classes = [({**label, "cls": str(c["chunk_bytes"])}, c) for c in s["slab_classes"] if c["pages"]]
    yield Metric("class_pages", "gauge", "Pages, by slab class: bytes of its chunks.", [(labels, c["pages"]) for labels, c in classes])
    for kind in ("live", "free", "reserved"):
        text = f"Bytes of {kind} chunks, by slab class."
        yield Metric(f"class_{kind}_bytes", "gauge", text, [(labels, c[kind] * c["chunk_bytes"]) for labels, c in classes])
    supervisor, d = s["supervisor"], s["durability"]
    yield gauge("supervisor_up", "Is there a supervisor?", int(supervisor["alive"]))
    if supervisor["heartbeat_age_s"] is not None:
        yield gauge("supervisor_heartbeat_age_seconds", "Since it last looked round.", supervisor["heartbeat_age_s"])
    yield gauge("restoring", "Is it being restored?", int(d["restoring"]))
    if d["snapshot_age_s"] is not None:
        yield gauge("snapshot_age_seconds", "Age of the newest snapshot.", d["snapshot_age_s"])
    yield gauge("snapshot_writing", "Is one being written?", int(d["snapshot_writing_s"] is not None))
    yield gauge("snapshot_failed", "Did the last snapshot fail?", int(d["snapshot_failed"]))
    yield gauge("log_failed", "Can the log not be written?", int(d["log_failed"]))
    yield gauge("log_gaps", "Operations that neither log nor snapshot has.", d["log_gaps"])
    yield gauge("log_waiting_bytes", "Bytes in the processes' rings that the supervisor has not taken over.", d["log_waiting_bytes"])
    if s["store"] is not None:
        yield from of_store(label, s["store"])


def of_store(label: dict[str, str], d: dict[str, Any]) -> Iterator[Metric]:
    """Of stats()["store"]."""
    for name, text in (
        ("loads", "Keys asked of the store."), ("found", "Of these it had."), ("writes", "Keys written there."),
        ("errors", "Calls of the store that failed."),
    ):  # fmt: skip
        yield Metric(f"store_{name}_total", "counter", text, [(label, d[name])])
    if d["policy"] == "back":
        for name, text, value in (
            ("dirty_items", "Items that are not stored yet.", d["dirty_items"]), ("dirty_bytes", "Their bytes.", d["dirty_bytes"]),
            ("oldest_dirty_seconds", "How long the oldest of these has been.", d["oldest_s"] or 0),
            ("failing", "Does the store fail?", int(d["failing_s"] is not None)),
            ("refused", "Items that the store refuses.", d["refused"]),
        ):  # fmt: skip
            yield Metric(f"store_{name}", "gauge", text, [(label, value)])


def as_text(metrics: Iterable[Metric]) -> str:
    """Exposition text (format 0.0.4)."""
    lines = []
    for name, kind, text, values in metrics:
        lines += [f"# HELP shmcache_{name} {text}", f"# TYPE shmcache_{name} {kind}"]
        for labels, value in values:
            said = ",".join(f'{label}="{escaped(word)}"' for label, word in labels.items())
            lines.append(f"shmcache_{name}{{{said}}} {value}")
    return "\n".join(lines) + "\n"


def escaped(word: str) -> str:
    return word.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")

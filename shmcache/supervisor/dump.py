"""dump and load: a segment's items as a stream of msgpack maps, for ordinary tools.

Each item is a map {"key": bytes, "value": ..., "ttl": seconds or nil}. A value is what it is in msgpack: bytes, str, int, or what the
msgpack codec has made of it (its extension types as in codec.py). A value of the pickle codec is bytes under "pickle" instead of "value".
An item with tags has them under "tags". An item of a namespace has the namespace's name under "namespace", and under "key" its key there;
the sidecar's databases but the first are namespaces, "db:1" and so on. load() stores such an item with the generations that its tags and
its namespace have in the segment: what is loaded stands beside what the namespace has there already. Of a value with a stale time the ttl
is that until it is stale, and the stale time is not dumped. What a get would not find (stale, negative, of a tag that was invalidated, of a
namespace that was cleared) is left out. So are the generations: another segment has its own.

Dumps of earlier versions name no namespace: they have the generations, and keys that carry them, of what was cleared, too. load() stores
such an item as one with the namespace's name, if the generation that the dump has for that is the one that its key carries; else it is
left out, and load() says how many are. Items that come before their namespace's generation wait in a temporary file.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from typing import IO, TYPE_CHECKING, Any, BinaryIO

import msgpack

from shmcache import errors
from shmcache.codec import ENVELOPE, INT, MSGPACK, PICKLE, STR, open_envelope
from shmcache.core import _core, _stream
from shmcache.namespace import LONGEST_NAME
from shmcache.namespace import PREFIX as NAMESPACE_PREFIX
from shmcache.supervisor import format as fmt

if TYPE_CHECKING:
    from shmcache.cache import Cache
    from shmcache.namespace import Namespace

TAG_PREFIX = b"\x00tag\x00"  # of the keys of generations
MOST_BYTES = (1 << 32) - 1  # of one item in a stream
READ_BYTES = 1 << 20


def dump(
    cache: Cache, out: BinaryIO, prefix: bytes = b"", progress: Callable[[int, int], None] = lambda done, total: None
) -> int:
    """Write all items whose keys (in the segment: no namespace's, if it is not empty) begin with prefix: how many. Each is of one instant,
    together they are not. Raises: StripeBusy."""
    walk = _stream.Walk(cache)
    packer = msgpack.Packer(autoreset=False)
    n = 0
    while walk.block():
        now_ms = time.time() * 1000
        with memoryview(walk) as payload:
            for r in fmt.records(payload):
                if not r.key.startswith(prefix) or r.key.startswith(TAG_PREFIX):
                    continue
                name, generation, key = _in_namespace(r.key)
                if name and not (generation and cache._generation_there(NAMESPACE_PREFIX + name) == generation):
                    continue  # a generation, or what was cleared
                codec, value, expires_ms, tags = r.codec, r.value, r.expires_ms, None
                if codec == ENVELOPE:
                    try:
                        codec, negative, stale_ms, carried, value = open_envelope(value)
                    except errors.DamageError as e:
                        raise errors.DamageError(f"{r.key!r}: {e}") from None
                    expires_ms = max(0, expires_ms - stale_ms)
                    gone = any(cache._generation_there(TAG_PREFIX + tag.encode()) != generation for tag, generation in carried)
                    if negative or gone or (r.expires_ms and expires_ms <= now_ms):
                        continue
                    tags = [tag for tag, _ in carried]
                packer.pack_map_header(3 + bool(name) + bool(tags))
                if name:
                    packer.pack("namespace")
                    packer.pack(name)
                if tags:
                    packer.pack("tags")
                    packer.pack(tags)
                for part in ("key", key, "pickle" if codec == PICKLE else "value"):
                    packer.pack(part)
                out.write(packer.bytes())
                packer.reset()
                plain = value if codec == MSGPACK else msgpack.packb(_plain(codec, value), unicode_errors="surrogatepass")
                out.write(plain)
                packer.pack("ttl")
                packer.pack(max(0.001, (expires_ms - now_ms) / 1000) if r.expires_ms else None)
                n += 1
        out.write(packer.bytes())
        packer.reset()
        progress(walk.stripe, walk.n_stripes)
    return n


def _in_namespace(key: bytes) -> tuple[bytes, bytes, bytes]:
    """(the namespace's name, the generation that the key carries, the key in the namespace); (b"", b"", key) if it is in none. Of the key
    of a generation the last two are empty."""
    name, nul, rest = key.removeprefix(NAMESPACE_PREFIX).partition(b"\0")
    if not key.startswith(NAMESPACE_PREFIX) or not 0 < len(name) <= LONGEST_NAME or (nul and len(rest) < 8):
        return b"", b"", key
    return name, rest[:8], rest[8:]


def _plain(codec: int, value: bytes) -> Any:
    if codec == STR:
        return value.decode("utf-8", "surrogatepass")
    if codec == INT:
        return int.from_bytes(value, "little", signed=True)
    return value


def load(
    cache: Cache, source: BinaryIO, progress: Callable[[int], None] = lambda done: None, warn: Callable[[str], object] = lambda line: None
) -> int:
    """Set every item of a stream: how many. Those before an error are stored: progress() is told of each how many are. Of what
    earlier versions have dumped, items that come before their namespace's generation are stored last: not if set() raises.

    Raises: DamageError: this is no such stream, or it ends within an item; what set() raises.
    """
    n = 0
    spaces: dict[bytes | str, Namespace] = {}
    has_default = cache.mapping.settings()["default_ttl_ms"] > 0
    for item in _with_names(source, warn):
        ttl, tags, key, name = item.get("ttl"), item.get("tags"), item["key"], item.get("namespace")
        if name is not None:
            if name not in spaces:
                spaces[name] = cache.namespace(name)
            prefix = spaces[name].prefix()
            key = _core.own_key(prefix, key, "a key in a namespace") if key else prefix  # a Redis client may have an empty one
        if "pickle" in item:
            cache.set(key, _core.Encoded(PICKLE, item["pickle"]), ttl, tags)
        elif isinstance(item["value"], (bytes, str)) or (type(item["value"]) is int and -1 << 63 <= item["value"] < 1 << 63):
            cache.set(key, item["value"], ttl, tags)
        else:
            encoded = _core.Encoded(MSGPACK, msgpack.packb(item["value"], unicode_errors="surrogatepass"))
            cache.set(key, encoded, ttl, tags)
        if ttl is None and has_default:
            cache.persist(key)
        n += 1
        progress(n)
    return n


def _with_names(source: BinaryIO, warn: Callable[[str], object]) -> Iterator[dict[str, Any]]:
    """The items of a stream; of those that carry a namespace's generation the ones that it still had, with its name instead."""
    had: dict[bytes, list[Any]] = {}  # by name: those that came, of several dumps, one behind the other
    late: set[bytes] = set()  # names of which something waits, and so what comes after it
    n_cleared = 0
    failed: errors.DamageError | None = None
    with tempfile.SpooledTemporaryFile(max_size=READ_BYTES) as waiting:
        try:
            for item in _sound(source):
                name, generation, key = _in_namespace(_bytes(item["key"])) if item.get("namespace") is None else (b"", b"", b"")
                if not name:
                    yield item
                elif not generation:
                    had.setdefault(name, []).append(item.get("value"))
                elif name not in late and [generation] == had.get(name, [])[-1:]:
                    yield item | {"namespace": name, "key": key}
                else:
                    late.add(name)
                    waiting.write(msgpack.packb((len(had.get(name, [])), item), unicode_errors="surrogatepass"))
        except errors.DamageError as e:
            failed = e  # what comes before it is stored
        waiting.seek(0)
        for n_before, item in _items(waiting):
            name, generation, key = _in_namespace(_bytes(item["key"]))
            if generation in had.get(name, [])[max(n_before - 1, 0) : n_before + 1]:  # the one that stood there, or came next
                yield item | {"namespace": name, "key": key}
            else:
                n_cleared += 1
    if n_cleared:
        warn(f"{n_cleared:,} items were left out: their namespaces had been cleared, or the dump does not have the generations of these")
    if failed is not None:
        raise failed


def _bytes(key: bytes | str) -> bytes:
    return key if isinstance(key, bytes) else key.encode("utf-8", "surrogatepass")


def _sound(source: BinaryIO) -> Iterator[dict[str, Any]]:
    """The items of a stream. Raises: DamageError, also of one that is not such a map."""
    for number, item in enumerate(_items(source), 1):
        sound = isinstance(item, dict) and isinstance(item.get("key"), (bytes, str)) and ("value" in item) != ("pickle" in item)
        if not sound or not isinstance(item.get("pickle", b""), bytes):
            raise errors.DamageError(f'item {number} is no map of "key", "value" (or "pickle") and "ttl": is this the output of dump?')
        tags = item.get("tags")
        if not (tags is None or (isinstance(tags, list) and all(isinstance(tag, str) for tag in tags))):
            raise errors.DamageError(f"the tags of item {number} are no list of str: is this the output of dump?")
        if not isinstance(item.get("namespace"), (bytes, str, type(None))):
            raise errors.DamageError(f"the namespace of item {number} is no name: is this the output of dump?")
        yield item


def _items(source: IO[bytes]) -> Iterator[Any]:
    unpacker = msgpack.Unpacker(strict_map_key=False, max_buffer_size=MOST_BYTES, unicode_errors="surrogatepass")
    n = n_bytes = behind = 0
    while data := source.read(READ_BYTES):
        n_bytes += len(data)
        unpacker.feed(data)
        while True:
            try:
                item = unpacker.unpack()
            except msgpack.OutOfData:
                break
            except (ValueError, TypeError, RecursionError, msgpack.UnpackException) as e:
                raise errors.DamageError(f"behind item {n} comes what is no map ({type(e).__name__}): is it the output of dump?") from None
            n += 1
            behind = unpacker.tell()
            yield item
    if behind != n_bytes:
        raise errors.DamageError(f"the stream ends within item {n + 1}: it was cut; the items before it are stored")

"""How values become bytes, and come back equal and of the same type, or are refused.

bytes, str and int (64-bit) are the compiled core's own. Everything else goes through a codec, chosen when a cache is opened:

    msgpack   data only; reading it runs no code. What msgpack cannot tell apart (tuple from list ...) is an extension type here
    pickle    any object; reading it runs code that the segment's writers chose, so it is asked for by name

msgpack, numpy and pickle are imported at the first value that needs them.
"""

from __future__ import annotations

import sys

from shmcache import errors

TYPE_CHECKING = False  # typing would be a third of what a worker's import costs
if TYPE_CHECKING:
    import functools
    from collections.abc import Callable
    from typing import Any, Protocol

    Unpack = functools.partial[Any]

    class Codec(Protocol):
        """What Cache calls for a value that is not bytes, str or a 64-bit int."""

        name: str

        @property
        def unpack(self) -> Unpack | None:
            """What decode() does with MSGPACK's payload, if that is one compiled call (then of the core); it raises anything."""

        def encode(self, value: Any) -> tuple[int, bytes]:
            """(codec number, payload). Raises: UnsupportedValue."""

        def decode(self, number: int, payload: bytes) -> Any:
            """The value. Raises: CodecMismatch if this codec does not read that number; DamageError."""


# Stored in each item. Numbers are a format: never reused.
BYTES, STR, INT, MSGPACK, PICKLE = 0, 1, 2, 3, 4
ENVELOPE = 5  # a value of one of those, with tags, a stale time, or that there is nothing; opened by the core (core/envelope.pxd)

# What _look() finds: a value; one that is past its ttl, or to be computed anew early; that there is nothing; no item. As in envelope.pxd.
FRESH, STALE, NEGATIVE, ABSENT = 0, 1, 2, 3

# msgpack extension types. Numbers are a format: never reused.
TUPLE, SET, FROZENSET, BIGINT, DATETIME, DATE, TIME, TIMEDELTA, DECIMAL, UUID_, COMPLEX, NDARRAY, NPSCALAR, ORDERED = range(1, 15)

MAX_DEPTH = 100  # of containers; msgpack itself stops near 500, the interpreter's stack may stop earlier


def open_envelope(payload: bytes) -> tuple[int, bool, int, list[tuple[str, bytes]], bytes]:
    """(codec of what is inside, whether it is known that there is nothing, stale_ms, tags with their generations, what is inside).

    For tools; readers use the core's. Raises: DamageError.
    """
    import struct

    try:
        codec, flags, n_tags, stale_ms, _ = struct.unpack_from("<BBHII", payload)
        tags, at = [], 12
        for _ in range(n_tags):
            generation, n = struct.unpack_from("<8sB", payload, at)
            tags.append((payload[at + 9 : at + 9 + n].decode(), generation))
            at += 9 + n
    except (struct.error, UnicodeDecodeError) as e:
        raise errors.DamageError(f"the head of a value is damaged ({e}): delete the key") from None
    if codec >= ENVELOPE or flags & ~1 or n_tags > 16 or at > len(payload):
        raise errors.DamageError("the head of a value is damaged, or of a newer version: delete the key")
    return codec, bool(flags), stale_ms, tags, payload[at:]


def get_codec(name: str) -> Codec:
    """The codec of that name. Raises: InvalidConfig."""
    check_codec(name)
    return MsgpackCodec() if name == "msgpack" else PickleCodec()


def check_codec(name: str) -> None:
    """Raises: InvalidConfig if there is no codec of that name."""
    if name not in ("msgpack", "pickle"):
        raise errors.InvalidConfig(f"codec is 'msgpack' or 'pickle', not {name!r}")


def refuse(value: Any, why: str = "") -> errors.UnsupportedValue:
    kind = type(value)
    return errors.UnsupportedValue(
        f"{why or f'a {kind.__module__}.{kind.__qualname__} would not come back equal and of the same type'}: convert it to plain data, "
        'or open the cache with codec="pickle"'
    )


class MsgpackCodec:
    """msgpack with extension types for what it would change."""

    name = "msgpack"

    def __init__(self) -> None:
        import functools

        import msgpack

        self._ext_type = msgpack.ExtType
        self.unpack: Unpack = functools.partial(
            msgpack.unpackb, ext_hook=self._ext_hook, strict_map_key=False, unicode_errors="surrogatepass"
        )
        self._packb = msgpack.packb
        # msgpack has a dozen errors, and a damaged extension can meet any constructor's
        self._causes = (ValueError, TypeError, LookupError, ArithmeticError, AttributeError, ImportError, RecursionError, SyntaxError,
                        OSError, msgpack.UnpackException)  # fmt: skip
        self._depth = 0
        self._packers: dict[type, Callable[[Any], tuple[int, Any]]] = packers()

    def __reduce__(self) -> Any:
        return MsgpackCodec, ()

    def encode(self, value: Any) -> tuple[int, bytes]:
        try:
            return MSGPACK, self._pack(value)
        except errors.UnsupportedValue:
            raise
        except (RecursionError, ValueError) as e:
            raise refuse(value, f"this value is nested too deeply, refers to itself, or is too large ({e})") from None
        except (OverflowError, TypeError) as e:
            raise refuse(value, f"this value cannot be packed ({e})") from None
        finally:
            self._depth = 0

    def _pack(self, value: Any) -> bytes:
        try:
            packed: bytes = self._packb(value, default=self._default, strict_types=True, use_bin_type=True)
        except UnicodeEncodeError:  # a lone surrogate somewhere: every str of this value is marked
            packed = self._packb(
                value, default=self._default, strict_types=True, use_bin_type=True, unicode_errors="surrogatepass"
            )
        _refuse_buffers(value)
        return packed

    def _default(self, value: Any) -> Any:
        """What msgpack does not pack itself: an extension type, or a refusal."""
        packer = self._packers.get(type(value))
        if packer is None:
            packer = _numpy_packer(value)
            if packer is None:
                raise refuse(value)
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise ValueError("more than 100 levels")
        number, content = packer(value)
        data = content if isinstance(content, bytes) else self._pack(content)
        self._depth -= 1
        return self._ext_type(number, data)

    def decode(self, number: int, payload: bytes) -> Any:
        if number == PICKLE:
            raise errors.CodecMismatch('this value was pickled; to read it runs code: open the cache with codec="pickle" if you trust it')
        if number != MSGPACK:
            raise errors.CodecMismatch(f"this value was written by codec {number}, which this version does not know")
        try:
            return self.unpack(payload)
        except Exception as e:
            raise self.named(e) from None

    def named(self, error: Exception) -> Exception:
        """What is to be raised for an error of unpack(): DamageError for what damaged bytes can cause, anybody else's (a signal
        handler's, say) as it is."""
        if isinstance(error, (errors.ShmcacheError, TimeoutError)) or not isinstance(error, self._causes):
            return error
        return errors.DamageError(
            f"a msgpack value is damaged ({type(error).__name__}: {error}): run verify(), or delete the key"
        )

    def _ext_hook(self, number: int, data: bytes) -> Any:
        unpacker = _UNPACKERS.get(number)
        if unpacker is None:
            raise errors.DamageError(f"a value has the unknown extension type {number}: it is damaged, or of a newer version")
        return unpacker(self.unpack, data)


class PickleCodec:
    """Any object, by pickle protocol 5; reads what the msgpack codec wrote, too."""

    name = "pickle"
    unpack = None

    def __init__(self) -> None:
        self._msgpack: MsgpackCodec | None = None

    def encode(self, value: Any) -> tuple[int, bytes]:
        import pickle

        try:
            return PICKLE, pickle.dumps(value, protocol=5)
        except Exception as e:  # __reduce__ is anybody's code
            raise errors.UnsupportedValue(f"pickle refuses this {type(value).__qualname__} ({e})") from e

    def decode(self, number: int, payload: bytes) -> Any:
        if number == PICKLE:
            import pickle

            return pickle.loads(payload)
        if self._msgpack is None:
            self._msgpack = MsgpackCodec()
        return self._msgpack.decode(number, payload)


_BUFFERS = frozenset((bytearray, memoryview))


def _refuse_buffers(value: Any) -> None:
    """msgpack packs bytearray and memoryview as bytes without a word, strict_types or not.

    Called after packing, so the depth is known to be bounded; what goes through _default comes here by itself.
    """
    kind = type(value)
    if kind in _BUFFERS:
        raise refuse(value, f"a {kind.__name__} would come back as bytes")
    if kind is dict:
        _refuse_buffers(list(value))
        value = value.values()
    elif kind is not list:
        return
    types = set(map(type, value))
    if types & _BUFFERS or dict in types or list in types:
        for x in value:
            _refuse_buffers(x)


# ---- packing ------------------------------------------------------------------------------------------------------------------


def packers() -> dict[type, Callable[[Any], tuple[int, Any]]]:
    """(extension type, bytes or a value to pack) by exact type. Modules that a value needs are loaded already."""
    import datetime as dt
    from collections import OrderedDict

    made: dict[type, Callable[[Any], tuple[int, Any]]] = {
        tuple: lambda v: (TUPLE, list(v)),
        set: lambda v: (SET, list(v)),
        frozenset: lambda v: (FROZENSET, list(v)),
        int: lambda v: (BIGINT, v.to_bytes(v.bit_length() // 8 + 1, "little", signed=True)),
        complex: lambda v: (COMPLEX, [v.real, v.imag]),
        OrderedDict: lambda v: (ORDERED, [[k, x] for k, x in v.items()]),
        dt.datetime: lambda v: (DATETIME, [v.replace(tzinfo=None, fold=0).isoformat(), v.fold, _zone(v.tzinfo)]),
        dt.date: lambda v: (DATE, v.isoformat()),
        dt.time: lambda v: (TIME, [v.replace(tzinfo=None, fold=0).isoformat(), v.fold, _zone(v.tzinfo)]),
        dt.timedelta: lambda v: (TIMEDELTA, [v.days, v.seconds, v.microseconds]),
    }
    import decimal
    import uuid

    made[decimal.Decimal] = lambda v: (DECIMAL, str(v))
    made[uuid.UUID] = lambda v: (UUID_, v.bytes)
    return made


def _zone(zone: Any) -> Any:
    """None, [seconds, microseconds, name or None] of a fixed offset, or the key of a ZoneInfo."""
    import datetime as dt

    if zone is None:
        return None
    if type(zone) is dt.timezone:
        offset, *name = zone.__getinitargs__()  # type: ignore[attr-defined]  # as pickle does: tells a given name from none
        return [offset.days * 86400 + offset.seconds, offset.microseconds, name[0] if name else None]
    zoneinfo = sys.modules.get("zoneinfo")
    if zoneinfo is not None and type(zone) is zoneinfo.ZoneInfo and zone.key is not None:
        try:
            zone.__reduce__()
        except Exception as e:  # PicklingError: its data are a file's, whatever it is called
            raise errors.UnsupportedValue(f"the time zone {zone.key} is not the one of that name ({e}): convert the time to UTC") from None
        return zone.key
    raise refuse(zone, f"a time zone of type {type(zone).__qualname__} would not come back as it is")


def _numpy_packer(value: Any) -> Callable[[Any], tuple[int, Any]] | None:
    numpy = sys.modules.get("numpy")
    if numpy is None:
        return None
    if type(value) is numpy.ndarray:
        return _pack_array
    if isinstance(value, numpy.generic) and type(value).__module__ == "numpy":
        if isinstance(value, (numpy.str_, numpy.bytes_)) and len(value.item()) < len(value):
            raise errors.UnsupportedValue("numpy loses the NULs at the end of its strings, pickled or not: use a plain str or bytes")
        return lambda v: (NPSCALAR, _pack_array(numpy.asarray(v))[1])
    return None


def _pack_array(array: Any) -> tuple[int, Any]:
    if array.dtype.hasobject:
        raise refuse(array, "an array of objects would have to be pickled")
    if array.dtype.metadata or array.dtype.type.__module__ != "numpy":
        raise refuse(array, f"an array of dtype {array.dtype} would not come back as it is")
    fortran = array.flags.f_contiguous and not array.flags.c_contiguous
    dtype = array.dtype.descr if array.dtype.names else array.dtype.str
    if array.dtype.names and dtypes_differ(array.dtype, dtype):
        raise refuse(array, f"an array of dtype {array.dtype} would not come back as it is")
    return NDARRAY, [dtype, list(array.shape), fortran, array.tobytes("F" if fortran else "C")]


def dtypes_differ(dtype: Any, descr: Any) -> bool:
    import numpy

    try:
        return bool(numpy.dtype(descr) != dtype)
    except (TypeError, ValueError):
        return True


# ---- unpacking ----------------------------------------------------------------------------------------------------------------

def _unzone(zone: Any) -> Any:
    import datetime as dt

    if zone is None:
        return None
    if isinstance(zone, str):
        from zoneinfo import ZoneInfo

        return ZoneInfo(zone)
    offset = dt.timedelta(seconds=zone[0], microseconds=zone[1])
    return dt.timezone(offset) if zone[2] is None else dt.timezone(offset, zone[2])


def _datetime(unpack: Unpack, data: bytes) -> Any:
    import datetime as dt

    text, fold, zone = unpack(data)
    return dt.datetime.fromisoformat(text).replace(fold=fold, tzinfo=_unzone(zone))


def _time(unpack: Unpack, data: bytes) -> Any:
    import datetime as dt

    text, fold, zone = unpack(data)
    return dt.time.fromisoformat(text).replace(fold=fold, tzinfo=_unzone(zone))


def _date(unpack: Unpack, data: bytes) -> Any:
    import datetime as dt

    return dt.date.fromisoformat(unpack(data))


def _timedelta(unpack: Unpack, data: bytes) -> Any:
    import datetime as dt

    days, seconds, microseconds = unpack(data)
    return dt.timedelta(days, seconds, microseconds)


def _decimal(unpack: Unpack, data: bytes) -> Any:
    import decimal

    return decimal.Decimal(unpack(data))


def _uuid(unpack: Unpack, data: bytes) -> Any:
    import uuid

    return uuid.UUID(bytes=data)


def _ordered(unpack: Unpack, data: bytes) -> Any:
    from collections import OrderedDict

    return OrderedDict((k, v) for k, v in unpack(data))


def _descr(dtype: Any) -> Any:
    """A dtype's description with tuples where numpy wants them."""
    if isinstance(dtype, str):
        return dtype
    return [(tuple(f[0]) if isinstance(f[0], list) else f[0], _descr(f[1]), *(tuple(x) for x in f[2:])) for f in dtype]


def _ndarray(unpack: Unpack, data: bytes) -> Any:
    import numpy

    dtype, shape, fortran, content = unpack(data)
    made = numpy.dtype(_descr(dtype))
    if made.hasobject:
        raise errors.DamageError("an array of objects is not read from msgpack")
    return numpy.frombuffer(bytearray(content), made).reshape(shape, order="F" if fortran else "C")


def _npscalar(unpack: Unpack, data: bytes) -> Any:
    return _ndarray(unpack, data)[()]


def _complex(unpack: Unpack, data: bytes) -> Any:
    real, imag = unpack(data)
    return complex(real, imag)


_UNPACKERS: dict[int, Callable[[Unpack, bytes], Any]] = {
    TUPLE: lambda unpack, data: tuple(unpack(data)),
    SET: lambda unpack, data: set(unpack(data)),
    FROZENSET: lambda unpack, data: frozenset(unpack(data)),
    BIGINT: lambda _, data: int.from_bytes(data, "little", signed=True),
    COMPLEX: _complex,
    ORDERED: _ordered,
    DATETIME: _datetime,
    DATE: _date,
    TIME: _time,
    TIMEDELTA: _timedelta,
    DECIMAL: _decimal,
    UUID_: _uuid,
    NDARRAY: _ndarray,
    NPSCALAR: _npscalar,
}

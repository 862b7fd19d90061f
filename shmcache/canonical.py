"""The canonical bytes of a value: equal values of equal types, at every depth, have the same bytes in each process, whatever its hash seed.
Values that differ have different bytes. Nothing decodes them: a key is made of their digest.

    order       a dict, a set and a frozenset have none: their items are sorted by their bytes. A list and an OrderedDict have one, and so
                have their subclasses. What a `__reduce__` of its own lists in the order of a set has another key in each process
    sharing     plain data that is there twice counts as two equal values. Pickle tells these apart, by whether a str happens to be interned
    types       1, 1.0 and True are three values, "a" and b"a" are two
    numbers     0.0 and -0.0 differ, and so do Decimal("1.0") and Decimal("1.00"): a function can tell. Every nan is the same
    arrays      the dtype (with its byte order, its metadata and where its fields are), the shape and the items count; the order in
                memory and what pads do not. Of a subclass that does not reduce itself, and of a masked array, the class and the
                attributes (the mask is one) count, too
    classes     are their module and qualified name, and must be found there
    functions   are their module, qualified name, code, defaults, annotations, attributes, and what they close over; one of singledispatch
                is what is registered with it
    objects     are a class and a state, as pickle sees them; and what their class has as `__call__`. If a standard class says what
                pickle sees (Counter, Decimal, UUID, a frozen dataclass), attributes and slots of its subclass count, too. A proxy,
                which pickle sees as what it stands for, is refused

Functions and objects are only taken where any_object is true. The code of a function is the compiler's, without its place in the file; each
version of Python makes its own. `__main__` is the program: the name of its module if it was started by `-m`, else its file.
"""

from __future__ import annotations

import copyreg
import functools
import os
import struct
import sys
import types
from collections import OrderedDict

from shmcache import codec, errors
from shmcache.core import _core

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from typing import Any

    Identity = tuple[bytes, bool, list[tuple[Any, dict[type, Any]]]]

packers = functools.cache(codec.packers)
# Attributes of functions that say nothing else
MEMOIZED = ("_memoized", "cache_key", "forget")  # functools.wraps hands them on
OWN_ATTRIBUTES = (*MEMOIZED, "__wrapped__", "__annotations__", "cache_parameters")
DISPATCHING = ("__wrapped__", "register", "dispatch", "registry", "_clear_cache")
MAPS = ("_mmap", "filename", "offset", "mode")  # where the items of a memmap are
MASKS = ("_sharedmask",)  # is a masked array's mask a view of another's?
DISPATCHES = functools.singledispatch(len).__code__  # type: ignore[attr-defined]
DISPATCH = functools.singledispatch(len).dispatch.__code__
NAMED = ("enum", "logging")  # objects of these are what is known by their name


def canonical(value: Any, any_object: bool) -> bytes:
    """Of one value. any_object: of whatever type, else what the msgpack codec takes, and classes. Raises: UnsupportedValue."""
    leaf = _LEAVES.get(type(value))
    if leaf is not None:
        return leaf(value)
    return walked(value, Walk(any_object))


def identity(function: Any) -> Identity:
    """The canonical bytes of a function, and what may change them: does a variable that it closes over, or that a function in it does, have
    no value yet? What was registered with each function of singledispatch in it? Raises: UnsupportedValue."""
    walk = Walk(True)
    return walked(function, walk), walk.waits, walk.registrations


def walked(value: Any, walk: Walk) -> bytes:
    try:
        return walk.bytes_of(value)
    except RecursionError:
        raise codec.refuse(value, "this value is nested too deeply, or refers to itself") from None


class Walk:
    """One value's way to its bytes."""

    def __init__(self, any_object: bool, whole: Walk | None = None) -> None:
        self._any_object = any_object
        self._whole = whole or self  # the walk that this one is part of
        self.waits = False
        self.registrations: list[tuple[Any, dict[type, Any]]] = []
        self.annotating: dict[types.FunctionType, int] = {}  # whose annotations are being read
        # Objects and functions that were met, by id, with their number: the second time that stands for them. They are kept, or another
        # could get the id of one that is gone.
        self._met: dict[int, tuple[int, Any]] = {}

    def bytes_of(self, value: Any) -> bytes:
        """Raises: UnsupportedValue, RecursionError."""
        kind = type(value)
        leaf = _LEAVES.get(kind)
        if leaf is not None:
            return leaf(value)
        if kind is tuple:
            return self._items(b"t", value)
        if kind is list:
            return self._items(b"l", value)
        if kind is dict:
            return self._dict(b"d", value.items())
        if kind is set or kind is frozenset:
            return self._set(b"u" if kind is set else b"z", value)
        numpy = sys.modules.get("numpy")
        if numpy is not None and issubclass(kind, (numpy.ndarray, numpy.generic)):
            if kind is numpy.ndarray or (kind.__module__ == "numpy" and issubclass(kind, numpy.generic)):
                return self._array(b"a" if kind is numpy.ndarray else b"n", value)
            if self._any_object and package(by := reduced_by(kind)) == "numpy":
                left_out = MAPS if issubclass(kind, numpy.memmap) else MASKS if by is not numpy.ndarray else ()
                own = self._attributes(value, *left_out) + self._slots(value, by)
                return b"A" + self.bytes_of(found_as(kind)) + self._array(b"a", value) + own
        packer = packers().get(kind)
        if packer is not None:
            try:
                number, content = packer(value)
            except errors.UnsupportedValue:  # a time zone that is neither fixed nor one of zoneinfo's
                if not self._any_object:
                    raise
            else:
                return b"x%d:" % number + self.bytes_of(content)
        if issubclass(kind, type):
            return b"c" + self.bytes_of(found_as(value))
        if not self._any_object:
            raise codec.refuse(value, f"no key can be made of a {kind.__module__}.{kind.__qualname__}")
        return self._object(value)

    def _items(self, tag: bytes, values: Iterable[Any]) -> bytes:
        made = [self.bytes_of(value) for value in values]
        return b"%c%d:" % (tag, len(made)) + b"".join(made)

    def _alone(self, value: Any) -> bytes:
        """Of what is sorted: it refers to nothing beside it, for its place is not known yet."""
        return Walk(self._any_object, self._whole).bytes_of(value) if self._any_object else self.bytes_of(value)

    def _set(self, tag: bytes, values: Iterable[Any]) -> bytes:
        made = sorted([self._alone(value) for value in values])
        return b"%c%d:" % (tag, len(made)) + b"".join(made)

    def _dict(self, tag: bytes, items: Iterable[tuple[Any, Any]]) -> bytes:
        made = sorted([(self._alone(key), value) for key, value in items], key=_first)
        return b"%c%d:" % (tag, len(made)) + b"".join([key + self.bytes_of(value) for key, value in made])

    def _array(self, tag: bytes, value: Any) -> bytes:
        """Of an array, or one of numpy's scalars."""
        if issubclass(type(value), (str, bytes)):  # an array would lose the NULs at its end
            return tag + self.bytes_of(str.__str__(value) if issubclass(type(value), str) else bytes(value))
        array = sys.modules["numpy"].asarray(value)
        if array.dtype.metadata:
            tag += b"@" + self.bytes_of(dict(array.dtype.metadata))
        if array.dtype.names is not None:  # field by field: between them there may be bytes that mean nothing
            places = tuple(place for _, *place in (array.dtype.fields[name] for name in array.dtype.names))  # offsets, titles
            layout = (array.dtype.itemsize, array.dtype.isalignedstruct, places)
            head = tag + self.bytes_of((array.dtype.names, array.shape, array.dtype.type, layout))
            return head + b"".join([self._array(b"a", array[name]) for name in array.dtype.names])
        if array.dtype.hasobject:
            if not self._any_object:
                raise codec.refuse(array, "an array of objects would have to be pickled")
            dtype = "O" if array.dtype.char == "O" else array.dtype  # else of numpy's strings, which have parameters
            return tag + self.bytes_of((dtype, array.shape, array.ravel().tolist()))
        kind = array.dtype.type  # of another package, whose dtypes may all be called V2
        dtype = array.dtype.str if kind.__module__ == "numpy" else (array.dtype.str, found_as(kind))
        return tag + self.bytes_of((dtype, array.shape, items_of(array)))

    # ---- of any object ----

    def _object(self, value: Any) -> bytes:
        if issubclass(type(value), _core.Table):
            return b"k" + self.bytes_of(value.name)
        if issubclass(type(value), types.ModuleType):
            loaded: Any = sys.modules.get(value.__name__)
            if loaded is not value:
                raise errors.UnsupportedValue(f"no key can be made of the module {value.__name__}: it is not the one loaded by that name")
            return b"m" + self.bytes_of(module_name(value.__name__, vars(value)))
        met = self._met.get(id(value))
        if met is not None:
            return b"^%d:" % met[0]
        self._met[id(value)] = (len(self._met), value)
        if type(value) is types.FunctionType:
            return self._function(value)
        if type(value) is types.MethodType:
            return b"b" + self.bytes_of(value.__func__) + self.bytes_of(value.__self__)
        if type(value) is functools.singledispatchmethod:  # its cache of bound methods is no part of it
            return b"G" + self._attributes(value, "_method_cache")
        if type(value) is functools._lru_cache_wrapper:  # pickled by its name, which a decorator above it comes before
            return b"q" + self.bytes_of(value.__wrapped__) + self._attributes(value, *OWN_ATTRIBUTES)
        return self._reduced(value)

    def _attributes(self, value: Any, *but: str) -> bytes:
        """Of what has some."""
        made, own = [], getattr(value, "__dict__", {})
        for of_name, name, attribute in sorted([(self._alone(name), name, x) for name, x in own.items() if name not in but], key=_first):
            try:
                made.append(of_name + self.bytes_of(attribute))
            except errors.UnsupportedValue as e:
                of = getattr(value, "__qualname__", None) or type(value).__qualname__
                raise errors.UnsupportedValue(f"the attribute {name!r} of {of}: {e}") from None
        return b"o%d:" % len(made) + b"".join(made)

    def _slots(self, value: Any, base: type) -> bytes:
        """Of those that its class has beyond this one of its bases, and that have a value."""
        made = {}
        for i, kind in enumerate(type(value).__mro__):
            for name, member in () if kind in base.__mro__ else vars(kind).items():
                if isinstance(member, types.MemberDescriptorType):
                    try:
                        made[i, name] = member.__get__(value)
                    except AttributeError:  # it has no value
                        pass
        return b"s" + self._dict(b"d", made.items()) if made else b""

    def _function(self, function: types.FunctionType) -> bytes:
        memoized = vars(function).get("_memoized")
        if memoized is not None and memoized[0] is function:  # not another decorator's, which has taken over its attributes
            return b"w" + self.bytes_of(memoized[1]) + self._attributes(function, *OWN_ATTRIBUTES)
        where = (module_name(function.__module__, function.__globals__), function.__qualname__)
        registry = registry_of(function)
        if registry is not None:  # its cache of what it has dispatched is no part of it
            registered = dict(registry)
            self._whole.registrations.append((registry, registered))
            return b"D" + self.bytes_of((where, registered)) + self._attributes(function, *DISPATCHING)
        defaults = (function.__defaults__, function.__kwdefaults__)
        head = b"p" + self.bytes_of((where, code_digest(function.__code__), defaults))
        left_out = MEMOIZED if memoized is not None else ()
        return head + self._annotations(function) + self._cells(function) + self._attributes(function, *left_out)

    def _annotations(self, function: types.FunctionType) -> bytes:
        """Decorators read them. One of which no key can be made, a class of a function's own or what refers to itself, does not count: a
        function is not refused for what hardly any uses."""
        annotating = self._whole.annotating
        if function in annotating:  # one of its annotations refers to it
            return b"^%d:" % annotating[function]
        annotating[function] = len(annotating)
        try:
            made = [self._annotation(*item) for item in function.__annotations__.items()]
        except NameError:  # Python 3.14 evaluates them now, and one is of something that is only there for a type checker
            return b"?"
        finally:
            del annotating[function]
        return b"l%d:" % len(made) + b"".join(sorted(made))

    def _annotation(self, name: Any, annotation: Any) -> bytes:
        made = b""
        try:
            made = self._alone(name)
            return made + self._alone(annotation)
        except (errors.UnsupportedValue, RecursionError):
            return made + b"?"

    def _cells(self, function: types.FunctionType) -> bytes:
        """What a function closes over."""
        made = []
        for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
            try:
                value = cell.cell_contents
            except ValueError:  # it has no value yet
                self._whole.waits = True
                made.append(b"e")
                continue
            try:
                made.append(b"v" + self.bytes_of(value))
            except errors.UnsupportedValue as e:
                raise errors.UnsupportedValue(f"the variable {name!r} of the function around {function.__qualname__}: {e}") from None
        return b"".join(made)

    def _reduced(self, value: Any) -> bytes:
        kind, by = type(value), reduced_by(type(value))
        try:
            reduce = copyreg.dispatch_table.get(kind)
            if reduce is None and getattr(value.__reduce_ex__, "__self__", value) is not value:
                raise ReferenceError("it is a proxy: use the object that it stands for")
            made = reduce(value) if reduce is not None else value.__reduce_ex__(4)
            if isinstance(made, str):
                return b"g" + self.bytes_of(found_as(value, made))
            function, arguments, state, items, pairs, set_state = (*made, None, None, None, None)[: max(6, len(made))]
            items, pairs = list(items or ()), [(key, x) for key, x in pairs or ()]
            if by is object and reduce is None and from_python(getattr(kind.__getstate__, "__module__", None)):
                state = object.__getstate__(value)  # UUID's, and that of a dataclass, leave out what a subclass has
            elif by is functools.partial and reduce is None:  # None until somebody asks for its attributes, as functools.wraps does
                state = (*state[:3], state[3] or None)
            elif issubclass(kind, BaseException) and package(by) == "builtins":  # likewise
                state = state or None
        except (errors.ShmcacheError, RecursionError):
            raise
        except Exception as e:  # __reduce__ is anybody's code
            raise errors.UnsupportedValue(f"no key can be made of this {kind.__qualname__} ({e})") from e
        if reduce is None and by in (set, frozenset):  # of which it has made a list, in no order
            head = b"r" + self._constructor(function) + self._set(b"u", value) + self.bytes_of(state)
        else:
            head = b"r" + self._constructor(function) + self.bytes_of(arguments) + self.bytes_of(state)
        if set_state is not None:
            head += self.bytes_of(set_state)
        head += self._call(kind)
        if by is not kind and by is not object and from_python(by.__module__) and package(by) not in NAMED:
            own = getattr(value, "__dict__", ())
            head += self._attributes(value, *(name for name in own if isinstance(getattr(kind, name, None), functools.cached_property)))
            head += self._slots(value, by)
        ordered = not issubclass(kind, dict) or issubclass(kind, OrderedDict)
        return head + self._items(b"l", items) + (self._items(b"l", pairs) if ordered else self._dict(b"d", pairs))

    def _call(self, kind: type) -> bytes:
        """Of what objects of this class are called by, if it is not the compiled one of a class: they are used as functions."""
        base = next((base for base in kind.__mro__ if "__call__" in vars(base)), None)
        call = None if base is None else kind.__call__
        if call is None or (type(call) is types.WrapperDescriptorType and call.__objclass__ is base):
            return b""
        try:
            return self.bytes_of(call)
        except errors.UnsupportedValue as e:
            raise errors.UnsupportedValue(f"the __call__ of {kind.__qualname__}: {e}") from None

    def _constructor(self, function: Any) -> bytes:
        try:
            return self.bytes_of(found_as(function))
        except errors.UnsupportedValue:
            if isinstance(function, type):
                raise
            return self.bytes_of(function)  # a method of a class, which is another object each time


def items_of(array: Any) -> Any:
    """The bytes of its items, without what pads them: a long double of x86 has ten bytes that mean something, the others are left over."""
    numpy = sys.modules["numpy"]
    if array.dtype.char not in "gG" or numpy.finfo(array.dtype).nmant != 63:
        return array.tobytes()
    little = array.astype(array.dtype.newbyteorder("<")).reshape(-1)
    return little.view("u1").reshape(-1, numpy.dtype("g").itemsize)[:, :10].tobytes()


def reduced_by(kind: type) -> type:
    """The class that says what pickle sees of this one's objects."""
    return next(base for base in kind.__mro__ if "__reduce_ex__" in vars(base) or "__reduce__" in vars(base))


def package(kind: type) -> str:
    return kind.__module__.partition(".")[0]


def from_python(module: str | None) -> bool:
    """Is it a module of Python's own?"""
    return module is not None and module.partition(".")[0] in sys.stdlib_module_names


def registry_of(function: types.FunctionType) -> Any:
    """What is registered with it now and later, if it is of functools.singledispatch, or the `dispatch` of one that is."""
    if function.__code__ is DISPATCHES:
        return vars(function)["registry"]
    if function.__code__ is DISPATCH:  # a method of Python 3.13 has that alone
        return dict(zip(DISPATCH.co_freevars, function.__closure__ or (), strict=True))["registry"].cell_contents
    return None


def found_as(value: Any, called: str | None = None) -> tuple[str, str]:
    """The module and qualified name under which a class, or what else pickle names, is found. Raises: UnsupportedValue."""
    qualname = called or getattr(value, "__qualname__", None) or type(value).__qualname__
    name = getattr(value, "__module__", None) or "builtins"
    module = sys.modules.get(name)
    found: Any = module
    for part in qualname.split("."):
        found = getattr(found, part, None)
    if module is None or (found is not value and getattr(types, qualname, None) is not value):  # the second: NoneType
        raise errors.UnsupportedValue(f"no key can be made of {qualname}: it is not found by that name in its module")
    return module_name(name, vars(module)), qualname


def module_name(name: str | None, module: dict[str, Any]) -> str:
    """What a module of this name and these globals is called in a key. Of a session, or of -c, no more than `__main__` is known."""
    if name not in ("__main__", "__mp_main__"):  # the second: what multiprocessing's spawned children call their parent's
        return str(name)
    spec, file = module.get("__spec__"), module.get("__file__")
    if spec is not None and spec.name != "__main__":
        return str(spec.name)
    return f"__main__ of {os.path.abspath(file)}" if file else "__main__"


@functools.lru_cache(1024)
def code_digest(code: types.CodeType) -> bytes:
    """Of what a function does, not of where it stands."""
    from hashlib import blake2b

    return blake2b(_code(code), digest_size=16).digest()


def _code(code: types.CodeType) -> bytes:
    shape = (code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount, code.co_flags, code.co_code, code.co_exceptiontable,
             code.co_names, code.co_varnames, code.co_freevars, code.co_cellvars)  # fmt: skip
    return canonical(shape, False) + b"".join([_constant(constant) for constant in code.co_consts])


def _constant(constant: Any) -> bytes:
    return b"h" + code_digest(constant) if isinstance(constant, types.CodeType) else canonical(constant, True)


def _first(made: tuple[bytes, ...]) -> bytes:
    return made[0]


_NAN = struct.pack("<d", float("nan"))


def _float(value: float) -> bytes:
    return b"f" + (struct.pack("<d", value) if value == value else _NAN)


def _str(value: str) -> bytes:
    raw = value.encode("utf-8", "surrogatepass")
    return b"s%d:" % len(raw) + raw


_LEAVES: dict[type, Callable[[Any], bytes]] = {
    str: _str,
    int: lambda v: b"i%x:" % v,
    bytes: lambda v: b"y%d:" % len(v) + v,
    float: _float,
    bool: lambda v: b"T" if v else b"F",
    type(None): lambda v: b"N",
    complex: lambda v: b"j" + _float(v.real) + _float(v.imag),
    type(Ellipsis): lambda v: b"E",
    type(NotImplemented): lambda v: b"I",
}

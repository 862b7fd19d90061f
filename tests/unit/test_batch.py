"""How much a call of the store is given."""

from __future__ import annotations

import itertools

import pytest

from shmcache.supervisor import batch


def items(n, n_bytes=99):
    return [(b"k", 1, bytes(n_bytes), None, 1, 1, 128)] * n


def run(size, n_items, takes, fails=lambda n, total: False, n_bytes=99, at=0.0):
    """Store so many: (sizes of the batches that were stored, of those that failed, when that was)."""
    stored, failed, left = [], [], n_items
    while left:
        some = items(left, n_bytes)[: size.cut(items(left, n_bytes))]
        seconds = min(takes(len(some)), 1.01 * size.timeout)
        at += seconds
        if seconds > size.timeout or fails(len(some), len(some) * (n_bytes + 1)):
            size.failed(some, seconds, at)
            failed.append(len(some))
            assert len(failed) < 100
        else:
            size.stored(some, seconds, at)
            stored.append(len(some))
            left -= len(some)
    return stored, failed, at


def test_a_quick_store_gets_full_batches():
    assert run(batch.Size(1.0, 500), 1700, lambda n: 0.01)[:2] == ([500, 500, 500, 200], [])


def test_a_batch_has_one_row_at_least_and_no_more_bytes_than_it_may():
    size = batch.Size(1.0, 500)
    assert size.cut(items(10, batch.BYTES * 2)) == 1
    assert size.cut(items(100, batch.BYTES // 4 - 1)) == 4
    assert size.cut(items(2000, 1)) == 500
    assert size.cut(items(3) + items(1, batch.BYTES) + items(1)) == 3


@pytest.mark.parametrize("row_s", [0.003, 0.02, 0.3, 0.9])
def test_batches_shrink_until_one_fits_into_the_time(row_s):
    stored, failed, at = run(batch.Size(1.0, 500), 2000, lambda n: n * row_s)
    assert sum(stored) == 2000
    assert len(failed) <= 9
    assert max(stored) * row_s <= 1.0
    assert stored[len(stored) // 2] * row_s <= max(row_s, 0.5)  # not at the edge of it
    assert at < 2000 * row_s * 1.3 + 10


@pytest.mark.parametrize("failures", [0, 2, 5, 20])
@pytest.mark.parametrize("call_s", [0.2, 0.3, 0.49, 0.51, 0.6, 0.9])
def test_a_call_that_takes_its_time_whatever_the_rows_gets_many(call_s, failures):
    """Also behind a moment in which it was down."""
    size = batch.Size(1.0, 500)
    for at in range(failures):
        size.failed(items(1000)[: size.cut(items(1000))], 0.001, float(at))
    stored, failed, _ = run(size, 10_000, lambda n: call_s + n * 1e-5, at=20.0)
    assert failed == []
    assert len(stored) < 40  # 20 full ones


def test_batches_of_a_store_that_never_fails_stay_large():
    """Its calls take now 0.3, now 0.8 of the time limit."""
    seconds = itertools.cycle([0.3, 0.8, 0.5, 0.35, 0.7])
    assert run(batch.Size(1.0, 500), 10_000, lambda n: next(seconds))[:2] == ([500] * 20, [])


def test_batches_grow_when_the_store_is_quick_again():
    size = batch.Size(1.0, 500)
    run(size, 200, lambda n: n * 0.02)
    assert size.rows < 50
    stored, failed, _ = run(size, 20_000, lambda n: n * 1e-5, at=1e4)
    assert failed == []
    assert stored[10] == 500
    assert not size.limited


def test_a_store_that_takes_so_much_at_once_is_not_given_more_again_and_again():
    size = batch.Size(1.0, 500)
    fails = lambda n, total: total > 1_000_000  # noqa: E731
    stored, failed, _ = run(size, 3000, lambda n: 0.01, fails, n_bytes=9_999)
    assert len(failed) <= 5
    assert sum(stored) / len(stored) > 50  # of 100
    assert size.limited
    for hours in itertools.count(1):
        stored, more, _ = run(size, 3000, lambda n: 0.0, fails, n_bytes=9_999, at=3600.0 * hours)
        assert len(more) <= 3
        if size.hold == batch.LONGEST_HOLD:
            break
        assert hours < 20
    assert run(size, 3000, lambda n: 0.0, n_bytes=9_999, at=1e6)[1] == []
    assert (size.limited, size.hold) == (False, batch.HOLD)


def test_a_store_that_was_down_is_given_large_batches_again_at_once():
    """A row that fails alone says that it is not the size."""
    size = batch.Size(1.0, 500)
    for at in range(20):
        size.failed(items(1000)[: size.cut(items(1000))], 0.001, float(at))
    assert size.rows == 1
    stored, _, _ = run(size, 3000, lambda n: 0.001, at=20.0)
    assert stored[11] == 500


def test_a_batch_that_is_far_from_full_says_nothing_of_a_larger_one():
    size = batch.Size(1.0, 500)
    run(size, 400, lambda n: n * 0.02)
    rows = size.rows
    for at in range(1000):
        size.stored(items(1), 0.02, 1e6 + at)
    assert size.rows <= 2 * rows


@pytest.mark.parametrize("at_size", [1, 2, 4, 8, 16, 62, 250])
def test_a_store_that_was_down_for_a_moment_gets_full_batches_again_soon(at_size):
    """It came back while batches of this size were tried: that says nothing of the size."""
    size, at, many = batch.Size(1.0, 500), 0.0, items(1000, 33_000)
    while size.rows > at_size:
        size.failed(many[: size.cut(many)], 0.001, at)
        at += 0.001
    began = at
    while size.rows < 500 or size.bytes < batch.BYTES:
        size.stored(many[: size.cut(many)], 0.01, at)
        at += 0.01
        assert at - began < 15

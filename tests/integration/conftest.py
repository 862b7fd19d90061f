"""What tests of several modules here are given."""

from __future__ import annotations

import contextlib

import pytest

import shmcache
from tests.integration.service import Service


@pytest.fixture
def serve(name, tmp_path):
    services = []

    def go(*options, **more):
        services.append(Service(name, tmp_path, *options, **more))
        return services[-1]

    yield go
    for service in services:
        service.stop()
    with contextlib.suppress(shmcache.SegmentNotFound):
        shmcache.unlink(name)

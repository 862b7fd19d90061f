"""What tests of several modules here are given."""

from __future__ import annotations

import contextlib

import pytest

import shmcache
from tests.integration.service import Service
from tests.postgres import Missing, bouncer, postgres_server


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


@pytest.fixture(scope="session")
def postgres():
    try:
        with postgres_server() as url:
            yield url
    except Missing as e:
        pytest.skip(str(e))


@pytest.fixture(scope="session")
def pgbouncer(postgres):
    try:
        with bouncer(postgres) as url:
            yield url
    except Missing as e:
        pytest.skip(str(e))

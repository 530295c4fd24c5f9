"""Stores for exported models."""

import uuid
from collections.abc import Callable

import pytest


@pytest.fixture
def place() -> Callable[[str], str]:
    """Return URIs in a memory of this test's own."""
    name = uuid.uuid4().hex
    return lambda path: f"memory://{name}/{path}"

"""Fixtures of this room."""

import pytest
from helpers.outcomes import outcome


@pytest.fixture(scope="session")
def expected(recorded_run):
    """What a run that was never interrupted leaves behind."""
    return outcome(recorded_run)

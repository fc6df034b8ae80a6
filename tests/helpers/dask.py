"""Processes of a Dask cluster for tests."""

import os
import signal

import pytest


@pytest.fixture(scope="module", autouse=True)
def environment(tmp_path_factory):
    """Workers are processes of their own: they inherit this cache folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOODISTILL_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("OMP_NUM_THREADS", "1")
        yield


def end(*processes):
    for process in processes:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()

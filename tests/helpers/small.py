"""Runs with few calibration images, in which a student inherits in a tenth of a second.

`python tests/helpers/small.py SCRIPT ARGUMENTS` runs a script that way, in a process of its own.
"""

import runpy
import sys
from pathlib import Path

SMALL = __file__
FEW = (96, 1500, 500, 0)  # images, pixels, patches, seed


def make_small(patch=None):
    """Until `patch`, a `pytest.MonkeyPatch`, is undone; `run.json` says so, as of any setting."""
    from moodistill.teacher.samples import CalibrationConfig

    owner = CalibrationConfig.__init__
    if patch is None:
        owner.__defaults__ = FEW
    else:
        patch.setattr(owner, "__defaults__", FEW)


if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).parents[2])  # not this folder, whose `dask` is no package
    make_small()
    del sys.argv[0]
    runpy.run_path(sys.argv[0], run_name="__main__")

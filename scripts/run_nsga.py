"""Search for a Pareto front of smaller networks."""

import sys

from moodistill.cli import run_tool

if __name__ == "__main__":
    sys.exit(run_tool("run"))

"""Train a teacher."""

import sys

from moodistill.cli import run_tool

if __name__ == "__main__":
    sys.exit(run_tool("teacher"))

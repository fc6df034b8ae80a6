"""The command line: one function per command, which parses its options and calls the rooms below.

May know every room, and holds no logic of its own. Importing it loads no torch and no pymoo, so
that `--help` and `choose` answer at once: commands import what they need when they are called.
Begin with `program.COMMANDS`, the table of commands.
"""

from moodistill.cli.program import main, run_tool

__all__ = ["main", "run_tool"]

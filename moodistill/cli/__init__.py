"""The command line: one function a command, which loads what it needs and calls the rooms below.

Knows everything below it and holds no logic; importing it loads nothing heavy. Begin with
`program`, the table of commands.
"""

from moodistill.cli.program import main, run_tool

__all__ = ["main", "run_tool"]

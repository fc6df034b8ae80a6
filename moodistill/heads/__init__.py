"""What the outputs of a network mean: how they are scored, and how a student learns them.

Begin with `heads.Heads`. Answers and targets are arrays by the name of the output; a network with
one output calls it `OUTPUT`.
"""

from moodistill.heads.head import Head
from moodistill.heads.heads import Heads
from moodistill.heads.outputs import OUTPUT

__all__ = ["OUTPUT", "Head", "Heads"]

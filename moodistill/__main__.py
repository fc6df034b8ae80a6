"""`python -m moodistill`: the same as the `moodistill` program."""

import sys

from moodistill.cli import main

sys.exit(main())

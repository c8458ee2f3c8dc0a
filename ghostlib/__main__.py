"""``python -m ghostlib`` is the command ``ghostlib``."""

import sys

from ghostlib.cli import main

sys.exit(main())

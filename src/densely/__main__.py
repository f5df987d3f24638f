"""`python -m densely` is `densely`."""

import sys

from densely.cli import main

sys.exit(main())

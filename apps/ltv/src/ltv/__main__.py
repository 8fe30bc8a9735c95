"""`python -m ltv` is `ltv`."""

import sys

from ltv.cli import main

sys.exit(main())

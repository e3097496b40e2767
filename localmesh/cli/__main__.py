"""`python -m localmesh.cli` is the command `localmesh`."""

import sys

from localmesh.cli.main import main

sys.exit(main())

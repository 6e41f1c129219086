"""`python -m blip2rt` is the `blip2rt` command."""

import sys

from .cli import main

sys.exit(main())

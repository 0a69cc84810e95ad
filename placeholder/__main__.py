"""`python -m placeholder train ...` and `python -m placeholder predict ...`."""

import sys

from placeholder.service.cli import main

if __name__ == "__main__":
    sys.exit(main())

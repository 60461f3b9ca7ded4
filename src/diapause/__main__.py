"""`python -m diapause` is the command line."""

import sys

from diapause.cli.main import main

if __name__ == "__main__":
    sys.exit(main())

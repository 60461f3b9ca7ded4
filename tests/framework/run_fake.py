"""Run the fake program from anywhere: puts the repository on the path first."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.framework.fake_program import run

if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))

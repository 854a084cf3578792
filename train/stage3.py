"""Stage 3: `torchrun train/stage3.py`; see train/stage.py for the options."""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))  # works without installation

from train.stage import main

if __name__ == "__main__":
    sys.exit(main(3))

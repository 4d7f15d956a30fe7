"""What `accelerate launch train.py`, `torchrun train.py` and `python train.py` start: `distcnn train`."""

import sys

from distcnn.cli import main

sys.exit(main(["train", *sys.argv[1:]]))

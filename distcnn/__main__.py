"""`python -m distcnn` is `distcnn`."""

import sys

from distcnn.cli import main

if __name__ == "__main__":
    sys.exit(main())

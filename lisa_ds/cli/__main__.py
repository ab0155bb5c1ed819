"""Entry point of ``python -m lisa_ds.cli``, and so of ``deepspeed --module lisa_ds.cli check``."""

import sys

from lisa_ds.cli import main

if __name__ == "__main__":
    sys.exit(main())

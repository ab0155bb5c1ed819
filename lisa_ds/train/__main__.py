"""Entry point of a rank: ``deepspeed --module lisa_ds.train --lisa_config FILE``, from a checkout or without one."""

import sys

from lisa_ds.train.command import main

if __name__ == "__main__":
    sys.exit(main())

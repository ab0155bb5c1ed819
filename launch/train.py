"""Fine-tune a language model by LISA under DeepSpeed ZeRO-3, as one file describes it.

deepspeed launch/train.py --lisa_config FILE [--resume auto|PATH] [--force] [key=value ...]

On a machine without GPUs say how many ranks there shall be: deepspeed --num_gpus 2 launch/train.py ...
"""

import sys

from lisa_ds.train.command import main

if __name__ == "__main__":
    sys.exit(main())

"""`torchrun -m diptych.finetune.evaluation`: `diptych evaluate` under the name that launchers call."""

import sys

from diptych.finetune.evaluating.evaluate_split import main

if __name__ == "__main__":
    sys.exit(main())

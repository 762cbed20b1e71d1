"""Fine-tune a recipe: `accelerate launch [OPTIONS] launch/finetune.py RECIPE --out DIR`."""

import sys

from groundwork.launch.cli import main

if __name__ == "__main__":
    raise SystemExit(main(["finetune", *sys.argv[1:]]))

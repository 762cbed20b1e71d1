"""Pretrain a recipe: `deepspeed launch/pretrain.py RECIPE --out DIR [--set key.path=value ...]`."""

import sys

from groundwork.launch.cli import main

if __name__ == "__main__":
    raise SystemExit(main(["pretrain", *sys.argv[1:]]))

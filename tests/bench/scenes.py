"""Synthetic scenes per second on one core: `python tests/bench/scenes.py [--json FILE] [--quick]`.

One process, 96 pixels, one to six objects, as `groundwork shards build scenes` draws them by
default. `draw` is the scene, its colours, depth, instances and shadow masks, and its boxes and
texts; `encode` the JPEG and the four PNGs of a sample. The clock is that of the process, so other
work on the machine counts little; the last line is the median of the rounds.
"""

import argparse
import json
import platform
import random
import statistics
import time
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from groundwork.data.sources.scenes import ScenesConfig, scene_description, scene_sample
from groundwork.data.sources.scenes_facts import find_facts
from groundwork.data.sources.scenes_renderer import render
from groundwork.data.sources.scenes_texts import write_captions, write_questions

TARGET = 200


def draw(config: ScenesConfig, index: int, *, texts: bool) -> None:
    scene = scene_description(config, index)
    rendering = render(scene, config.image_size)
    if texts:
        facts, rng = find_facts(scene, rendering), random.Random(index)
        write_captions(facts, rng)
        write_questions(facts, rng)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer rounds")
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    arguments = parser.parse_args()
    config = ScenesConfig()
    rounds, scenes = (5, 100) if arguments.quick else (15, 300)
    steps = {
        "masks and colours": lambda i: draw(config, i, texts=False),
        "and boxes, texts": lambda i: draw(config, i, texts=True),
        "and encoding (whole samples)": lambda i: scene_sample(config, i),
    }
    rates: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(rounds + 1):
        for name, step in steps.items():
            begin = time.process_time()
            for index in range(number * scenes, (number + 1) * scenes):
                step(index)
            if number:  # the first round warms up
                rates[name].append(scenes / (time.process_time() - begin))
    table = Table("step", "scenes/s, median", "slowest", "fastest")
    for name, found in rates.items():
        table.add_row(name, *(f"{f(found):,.0f}" for f in (statistics.median, min, max)))
    Console().print(table)
    if arguments.json:
        record = {
            "image_size": config.image_size,
            "scenes_per_round": scenes,
            "rates_per_s": rates,
            "machine": platform.processor() or platform.machine(),
            "python": platform.python_version(),
            "numpy": np.__version__,
        }
        arguments.json.write_text(json.dumps(record, indent=1))
    drawn = statistics.median(rates["and boxes, texts"])
    print(f"scenes_per_s={drawn:.0f} target={TARGET} ratio={drawn / TARGET:.2f}")


if __name__ == "__main__":
    main()

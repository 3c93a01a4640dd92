"""Learn a task sequence: `accelerate launch train/continual.py RECIPE [key=value ...]`; the same as `llava-cmoe train`."""

from llava_cmoe.cli import main

if __name__ == "__main__":
    main("train")

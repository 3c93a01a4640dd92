"""Learn a task sequence: `accelerate launch train/continual.py RECIPE [KEY=VALUE ...]`; as `llava-cmoe train` does."""

from llava_cmoe.cli import main

if __name__ == "__main__":
    main("train")

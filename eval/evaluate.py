"""Measure what a run has learned: `accelerate launch eval/evaluate.py RUN`; as `llava-cmoe eval` does."""

from llava_cmoe.cli import main

if __name__ == "__main__":
    main("eval")

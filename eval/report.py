"""Tables and figures of runs: `python eval/report.py RUN [RUN ...]`; as `llava-cmoe report` does."""

from llava_cmoe.cli import main

if __name__ == "__main__":
    main("report")

"""`python -m llava_cmoe.cli`: the same command where no script is on the path."""

from llava_cmoe.cli import main

main()

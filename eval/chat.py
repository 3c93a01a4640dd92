"""Talk to a run about a picture: `python eval/chat.py RUN --image FILE`; as `llava-cmoe chat` does."""

from llava_cmoe.cli import main

if __name__ == "__main__":
    main("chat")

"""`python -m pipeline` is the command `agent-metadata`."""

from pipeline.cli import main

if __name__ == "__main__":
    main()

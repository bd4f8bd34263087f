"""The command `agent-metadata`: options and output, nothing else."""

from pipeline.cli.main import main

__all__ = ["main"]

"""The command `agent-metadata`: options and output, nothing else."""

from pipeline.cli.app import main

__all__ = ["main"]

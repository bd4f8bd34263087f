"""Coder's own table -> events topic, so that the pipeline can run beside coder's own batcher.

coder_table.py   a connection to the table: which rows changed, and which agents coder has notified
bridge.py        sends what changed as reports, and counts it as sent once Kafka has acknowledged it
"""

from pipeline.bridge.bridge import Bridge, Copied
from pipeline.bridge.coder_table import URL_SETTING, require_another_table

__all__ = ["URL_SETTING", "Bridge", "Copied", "require_another_table"]

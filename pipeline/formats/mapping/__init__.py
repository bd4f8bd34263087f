"""Reports out of records that were not made for this pipeline, by the settings table `[mapping]`."""

from pipeline.formats.mapping.compiled import CompiledMapping
from pipeline.formats.mapping.config import MappingConfig

__all__ = ["CompiledMapping", "MappingConfig"]

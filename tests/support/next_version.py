"""The roles as a later version, whose sinks know a second version of batches: `-m` this instead of pipeline.

What the versions differ in does not matter here, so version 2 has the fields of version 1.
"""

from pipeline.cli import main
from pipeline.core import batch

NEXT_VERSION = 2

if __name__ == "__main__":
    batch.BATCH_VERSION = NEXT_VERSION
    main()

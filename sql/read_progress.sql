-- Purpose: read how far partitions were applied, without waiting for anyone.
-- $1 text topic id, $2 int[] partitions.
-- Locks: none.
select partition, next_offset
from agent_metadata_progress
where topic_id = $1 and partition = any($2::int[])

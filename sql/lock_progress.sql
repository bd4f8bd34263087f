-- Purpose: lock and read how far partitions are applied; one without a row gets one at 0.
-- $1 text[] topic ids, $2 int[] partitions, $3 text[] topic names; of equal length, sorted by topic id.
-- Locks: the rows, until the transaction ends: another sink with the same partition waits here.
insert into agent_metadata_progress as held (topic_id, partition, topic, next_offset)
select topic_id, partition, topic, 0
from unnest($1::text[], $2::int[], $3::text[]) as given (topic_id, partition, topic)
on conflict (topic_id, partition) do update set topic = excluded.topic
returning topic_id, partition, next_offset

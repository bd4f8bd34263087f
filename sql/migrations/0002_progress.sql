-- Purpose: how far each partition is applied; written in the same transaction as the rows.
-- topic_id is Kafka's id of one incarnation of a topic: a topic that was deleted and made anew begins at 0 again.
-- For the batches topic, next_offset is the next batch to apply; for the events topic, the next source offset that no
-- applied window has covered.
-- Locks: none that others wait for; the table is new.
create table agent_metadata_progress (
    topic_id text not null,
    partition integer not null,
    topic text not null,
    next_offset bigint not null,
    updated_at timestamptz not null default now(),
    primary key (topic_id, partition)
) with (fillfactor = 20)

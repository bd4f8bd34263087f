-- Purpose: read the rows of some agents that were written since an earlier look, and by which transaction.
-- $1 uuid[] agent ids; $2 bigint as in bridge_agents.sql, which says what its expression means.
-- A row that was declared and never collected has no value yet, and is left out. Times are clamped to the years 1 to
-- 9999, as in read_rows.sql.
-- Locks: none that writers wait for.
-- Plan: the primary key, an index scan per agent.
select
    workspace_agent_id, key, value, error,
    least(collected_at, timestamptz '9999-12-31 23:59:59.999999+00') as collected_at,
    top - ((top - xmin::text::bigint) & 4294967295) as transaction_id
from
    workspace_agent_metadata,
    (select pg_snapshot_xmax(pg_current_snapshot())::text::bigint as top offset 0) as newest
where workspace_agent_id = any($1::uuid[])
    and top - ((top - xmin::text::bigint) & 4294967295) >= $2
    and collected_at > timestamptz '0001-01-01 00:00:00+00'
order by workspace_agent_id, key

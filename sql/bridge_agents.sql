-- Purpose: find the agents of which coder's batcher, or anybody, has written rows since an earlier look.
-- $1 bigint: the horizon of that look (bridge_horizon.sql); 0: all agents.
-- Guard: what counts is which transaction wrote a row, not collected_at. Several servers with clocks of their own write
--    collected_at, late and in any order; a row may even be written again with the same one, or with an older one.
--    xmin is the lower half of a transaction's id. The whole id is the highest one with that half which has begun, as
--    nothing visible is newer; so a row of an id long past may be found once more, but none is missed.
-- Locks: none that writers wait for.
-- Plan: reads the whole table, about as long as a comparison of collected_at would, for which there is no index either.
--    Values and scripts that are stored apart from their rows are not read.
select distinct workspace_agent_id
from
    workspace_agent_metadata,
    (select pg_snapshot_xmax(pg_current_snapshot())::text::bigint as top offset 0) as newest
where $1::bigint = 0 or top - ((top - xmin::text::bigint) & 4294967295) >= $1

-- Purpose: count rows, agents, and those of them whose newest value is older than $1 seconds.
-- $1 double precision, seconds.
-- Locks: none. Reads the whole table.
select
    coalesce(sum(pairs), 0)::bigint as rows,
    count(*) as agents,
    count(*) filter (where newest < now() - make_interval(secs => $1)) as stale_agents
from (
    select count(*) as pairs, max(collected_at) as newest
    from workspace_agent_metadata
    group by workspace_agent_id
) as agent

-- Purpose: count rows, agents, and those of them whose newest value is older than $1 seconds; name $2 of these, those
-- that fell silent last.
-- $1 double precision, seconds; $2 integer.
-- Times are clamped to the year 1, as in read_rows.sql, and in UTC: JSON has them in the session's time zone otherwise,
-- where the year 1 is BC, or has an offset with seconds.
-- Locks: none. Reads the whole table.
with agent as materialized (
    select workspace_agent_id as agent_id, count(*) as pairs, max(collected_at) as newest
    from workspace_agent_metadata
    group by workspace_agent_id
),
stale as materialized (
    select agent_id, newest from agent where newest < now() - make_interval(secs => $1)
),
shown as (
    select
        agent_id, name,
        to_char(
            greatest(newest, timestamptz '0001-01-01 00:00:00+00') at time zone 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS.US"Z"'
        ) as newest
    from (select * from stale order by newest desc, agent_id limit $2) as latest
        left join agent_metadata_names using (agent_id)
)
select
    coalesce(sum(pairs), 0)::bigint as rows,
    count(*) as agents,
    (select count(*) from stale) as stale_agents,
    (select coalesce(json_agg(shown order by newest desc, agent_id), '[]') from shown)::text as latest_stale
from agent

-- Purpose: compare the table of the search path (the shadow) with that in another schema (the live one), pair by pair.
-- live_schema is replaced by the other schema's quoted name. $1 double precision: pairs that differ, and changed on
--    either side in this many seconds, are counted apart, as the change may be on its way. $2 integer: names at most this
--    many pairs.
-- A pair that was declared and never reported has no value, and is not a difference.
-- Locks: none. Reads both tables.
with compared as (
    select
        coalesce(shadow.workspace_agent_id, live.workspace_agent_id) as agent_id,
        coalesce(shadow.key, live.key) as key,
        shadow.value as shadow_value,
        shadow.error as shadow_error,
        shadow.collected_at as shadow_at,
        live.value as live_value,
        live.error as live_error,
        live.collected_at as live_at
    from (select * from workspace_agent_metadata where collected_at > '0001-01-01 00:00:00+00') as shadow
    full join (select * from live_schema.workspace_agent_metadata where collected_at > '0001-01-01 00:00:00+00') as live
        on live.workspace_agent_id = shadow.workspace_agent_id and live.key = shadow.key
),
classified as (
    select
        *,
        case
            when (shadow_value, shadow_error) = (live_value, live_error) then 'same'
            when greatest(shadow_at, live_at) > now() - make_interval(secs => $1) then 'unsettled'
            when live_at is null then 'only_shadow'
            when shadow_at is null then 'only_live'
            else 'different'
        end as kind
    from compared
),
named as (
    select * from classified where kind in ('different', 'only_live') order by agent_id, key limit $2
)
select
    count(*) filter (where kind = 'same') as same,
    count(*) filter (where kind = 'different') as different,
    count(*) filter (where kind = 'only_live') as only_live,
    count(*) filter (where kind = 'only_shadow') as only_shadow,
    count(*) filter (where kind = 'unsettled') as unsettled,
    (select coalesce(json_agg(named), '[]') from named) as pairs
from classified

-- Purpose: name the columns that a new row needs besides those that the sink fills.
-- Guard: a domain may have a default of its own.
-- Locks: none.
select attname
from pg_attribute join pg_type on pg_type.oid = atttypid
where attrelid = 'workspace_agent_metadata'::regclass and attnum > 0 and not attisdropped
    and attnotnull and not atthasdef and attidentity = '' and typdefault is null
    and attname <> all(array['workspace_agent_id', 'key', 'value', 'error', 'collected_at'])
order by attnum

-- Purpose: tell whether the table is UNLOGGED, and whether it is coder's own.
-- Guard: coder's table has a foreign key, to its agents; the one that our migration makes has none.
-- Locks: none.
select relpersistence = 'u' as is_unlogged,
    exists (select from pg_constraint where conrelid = pg_class.oid and contype = 'f') as is_coders
from pg_class
where oid = 'workspace_agent_metadata'::regclass

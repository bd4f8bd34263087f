-- Purpose: read which file the table has now, and which it had when it was last known to be whole.
-- If it had none, a crash has emptied all UNLOGGED tables. If another: TRUNCATE, or a rewrite such as VACUUM FULL.
-- Locks: none.
select
    pg_relation_filenode(oid) as filenode,
    relpersistence = 'u' as is_unlogged,
    (select filenode from agent_metadata_epoch limit 1) as whole_filenode
from pg_class
where oid = 'workspace_agent_metadata'::regclass

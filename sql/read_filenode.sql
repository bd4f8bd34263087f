-- Purpose: read which file holds the table.
-- Locks: none.
select pg_relation_filenode('workspace_agent_metadata')

-- Purpose: record that the table was rewritten and not emptied: it is as whole as it was with its old file.
-- $1 oid: the old file.
-- Locks: the row.
update agent_metadata_epoch set filenode = pg_relation_filenode('workspace_agent_metadata') where filenode = $1

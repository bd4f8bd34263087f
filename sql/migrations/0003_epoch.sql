-- Purpose: tell whether workspace_agent_metadata was emptied under us: by a crash of Postgres, if it is UNLOGGED, or by
-- TRUNCATE. A crash empties this table too; TRUNCATE gives the other a new file.
-- One row: the file that workspace_agent_metadata had when it was last known to be whole.
-- Locks: none that others wait for; the table is new.
create unlogged table agent_metadata_epoch (filenode oid not null);
insert into agent_metadata_epoch values (pg_relation_filenode('workspace_agent_metadata'));

-- Purpose: make the table UNLOGGED: writes cost less WAL, and a crash of Postgres empties it.
-- Locks: the whole table, against readers and writers, while it is rewritten.
alter table workspace_agent_metadata set unlogged

-- Purpose: make the table LOGGED: a crash of Postgres keeps its rows.
-- Locks: the whole table, against readers and writers, while it is rewritten.
alter table workspace_agent_metadata set logged

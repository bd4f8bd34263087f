-- Purpose: find the two tables that shadow_diff.sql compares.
-- $1 text, the live schema.
-- Locks: none.
select
    quote_ident($1) as live_schema,
    to_regclass('workspace_agent_metadata')::oid as shadow,
    to_regclass(quote_ident($1) || '.workspace_agent_metadata')::oid as live

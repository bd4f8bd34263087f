-- Purpose: give each user the rights it needs in Postgres, and no others; docs/settings.md says who needs which.
-- Run by psql, as a superuser or as a member of the roles that own the database and the tables, with any of these
-- variables, each the name of an existing user:
--     psql "$DATABASE_URL" -v migrate=NAME -f grants.sql
--     psql "$DATABASE_URL" -v sink=NAME -v refill=NAME -v serve=NAME -v status=NAME -f grants.sql
--     psql "$AGENT_METADATA_BRIDGE_DATABASE_URL" -v bridge=NAME -f grants.sql
-- The first before `agent-metadata db migrate`, the second after it, when there are tables; the third in coder's own
-- database. Running it again is safe.
-- Schema: the first of the search path, as for the pipeline itself.
-- Guard: of workspace_agent_metadata only what reports change can be written. In coder's own table the other columns
--    hold, among other things, the scripts that agents run.
-- Locks: none that others wait for.
\set ON_ERROR_STOP on
\set QUIET on
begin;
select quote_ident(current_schema()) as in_schema \gset

\if :{?migrate}
grant connect on database :"DBNAME" to :"migrate";
grant usage, create on schema :in_schema to :"migrate";
\endif

\if :{?sink}
grant connect on database :"DBNAME" to :"sink";
grant usage on schema :in_schema to :"sink";
grant select,
    insert (workspace_agent_id, key, value, error, collected_at),
    update (value, error, collected_at)
    on workspace_agent_metadata to :"sink";
grant select, insert, update on agent_metadata_progress to :"sink";
grant select, insert, delete on agent_metadata_epoch to :"sink";
grant insert on agent_metadata_names to :"sink";
grant select on agent_metadata_migrations to :"sink";
\endif

\if :{?refill}
grant connect on database :"DBNAME" to :"refill";
grant usage on schema :in_schema to :"refill";
grant select,
    insert (workspace_agent_id, key, value, error, collected_at),
    update (value, error, collected_at)
    on workspace_agent_metadata to :"refill";
grant select, insert, delete on agent_metadata_epoch to :"refill";
grant insert on agent_metadata_names to :"refill";
grant select on agent_metadata_migrations to :"refill";
\endif

\if :{?serve}
grant connect on database :"DBNAME" to :"serve";
grant usage on schema :in_schema to :"serve";
grant select on workspace_agent_metadata, agent_metadata_names, agent_metadata_migrations to :"serve";
\endif

\if :{?status}
grant connect on database :"DBNAME" to :"status";
grant usage on schema :in_schema to :"status";
grant select on workspace_agent_metadata, agent_metadata_progress, agent_metadata_epoch, agent_metadata_names,
    agent_metadata_migrations to :"status";
\endif

-- xmin says which transaction wrote a row.
\if :{?bridge}
grant connect on database :"DBNAME" to :"bridge";
grant usage on schema :in_schema to :"bridge";
grant select (workspace_agent_id, key, value, error, collected_at, xmin) on workspace_agent_metadata to :"bridge";
\endif

commit;

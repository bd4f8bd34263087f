-- Purpose: metadatabatcher's table, name and columns; definitions get defaults, so that a value needs no definition.
-- Where coder has made the table already, it is left as it is.
-- fillfactor 50: every row is rewritten once a window; with room on its page the new version stays there (HOT), and
-- the primary key's index is not touched.
-- Locks: none that others wait for; the table is new.
create table if not exists workspace_agent_metadata (
    workspace_agent_id uuid not null,
    display_name varchar(127) not null default '',
    key varchar(127) not null,
    script varchar(65535) not null default '',
    value varchar(65535) not null default '',
    error varchar(65535) not null default '',
    timeout bigint not null default 0,
    interval bigint not null default 0,
    collected_at timestamptz not null default '0001-01-01 00:00:00+00',
    display_order integer not null default 0,
    primary key (workspace_agent_id, key)
) with (fillfactor = 50)

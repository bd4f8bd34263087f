"""Coder's own tables, for a pipeline that writes into coder's database."""

# As coder makes it: a definition has no defaults, and belongs to an agent.
CODERS_TABLES = """
create table workspace_agents (id uuid primary key);
create unlogged table workspace_agent_metadata (
    workspace_agent_id uuid not null references workspace_agents (id) on delete cascade,
    display_name varchar(127) not null,
    key varchar(127) not null,
    script varchar(65535) not null,
    value varchar(65535) not null default '',
    error varchar(65535) not null default '',
    timeout bigint not null,
    interval bigint not null,
    collected_at timestamptz not null default '0001-01-01 00:00:00+00',
    display_order integer not null default 0,
    primary key (workspace_agent_id, key)
);
insert into workspace_agents values ('00000000-0000-0000-0000-000000000001');
insert into workspace_agent_metadata
values ('00000000-0000-0000-0000-000000000001', 'CPU', 'cpu', 'top', '12%', '', 1, 10);
"""

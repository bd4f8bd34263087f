-- Notes every write of a row and every step of progress, in the transaction that makes it.
create table audit_rows (
    number bigint generated always as identity,
    agent_id uuid, key text, value text, collected_at timestamptz, went_back boolean
);
create function note_row() returns trigger language plpgsql as $$
begin
    insert into audit_rows (agent_id, key, value, collected_at, went_back) values (
        new.workspace_agent_id, new.key, new.value, new.collected_at,
        tg_op = 'UPDATE' and (
            new.collected_at < old.collected_at
            -- A value begins with the number of its report: with equal times, a lower one arrived earlier.
            or new.collected_at = old.collected_at
                and split_part(new.value, ' ', 1)::bigint < split_part(old.value, ' ', 1)::bigint
        )
    );
    return new;
end $$;
create trigger note_row after insert or update on workspace_agent_metadata for each row execute function note_row();

create table audit_progress (
    number bigint generated always as identity, topic_id text, partition int, before bigint, after bigint
);
create function note_progress() returns trigger language plpgsql as $$
begin
    if tg_op = 'INSERT' then
        insert into audit_progress (topic_id, partition, before, after)
            values (new.topic_id, new.partition, 0, new.next_offset);
    elsif new.next_offset <> old.next_offset then
        insert into audit_progress (topic_id, partition, before, after)
            values (new.topic_id, new.partition, old.next_offset, new.next_offset);
    end if;
    return new;
end $$;
create trigger note_progress after insert or update on agent_metadata_progress
    for each row execute function note_progress();

//! The statements, as PostgreSQL is told them, made once for a table.
//!
//! There are two of each step. The lean one says in its `WHERE` what has to hold, and has no row to show if that does not. What
//! follows then is the business of the other: it locks its rows first and so judges the newest state, where the lean one may have
//! judged an older snapshot (`protocol.md` 4). Nothing here talks to a server.
//!
//! A row is found by `s.id = ANY(ARRAY[i.id])` and not by `s.id = i.id`, which says the same: of that, a plan that is made while the table
//! has a row or two reads all of the table once for each batch, because that costs no more then, and it is kept while the table grows.

use sqlx::{AssertSqlSafe, SqlSafeStr, SqlStr};

use super::listener::DISPLACED;
use crate::database::{CLAIM, REMEMBER, SAME, millis};
use crate::pieces::SEARCH;

/// The clock, asked anew for each row, as a statement may have waited for one.
const NOW: &str = "(date_part('epoch', clock_timestamp()) * 1000)::int8";

/// How long a row that only a lock keeps stays for gc after the end of that lock, in milliseconds.
const STUB: i64 = 60_000;

/// A commit that need not be on the disk: a crash that undoes it frees a lock, and the fence holds without it.
const RELAXED: &str = "set_config('synchronous_commit', 'off', true)";

/// That the lock of `s` may be taken by `$2`: it is his already, or it is free and nobody else is next in line.
const FREE: &str = "(s.lock_token = $2 OR ((s.lock_until IS NULL OR s.lock_until <= {now}) AND
  (s.want_until IS NULL OR s.want_until <= {now} OR s.want_token = $2)))";

/// Takes the lock of `s` for `$2`; its length is `$3`.
const TAKE: &str =
    "lock_token = $2, lock_until = {now} + $3, lock_since = {now}, lock_lease = $3, lock_owner = $4, lock_process = $5,
  lock_handed = (s.lock_token = $2 AND s.lock_handed) IS TRUE,
  want_token = NULLIF(s.want_token, $2), want_until = CASE WHEN s.want_token = $2 THEN NULL ELSE s.want_until END";

/// Gives the lock of `s` to the one next in line, or to nobody. `{handed}` says whether that is a clean release.
const HAND_ON: &str = "(lock_token, lock_until, lock_since, lock_lease, lock_handed) =
    (SELECT s.want_token, n.now + {claim}, n.now, {claim}::int8, {handed} FROM (SELECT {now} AS now) n WHERE s.want_until > n.now),
  lock_owner = NULL, lock_process = NULL, want_token = NULL, want_until = NULL";

/// Tells the one who was handed a lock, on the channel of his process.
const TELL: &str = "pg_notify('sessionkit_' || to_hex(want_process), encode(told, 'hex') || ' ' || id)";

/// Tells the one next in line that somebody else is, now.
const DISPLACE: &str = "pg_notify('sessionkit_' || to_hex(want_process), '{displaced}' || encode(told, 'hex') || ' ' || id)";

/// The statements for one table.
#[derive(Debug)]
pub(crate) struct Statements {
    pub(crate) enter_existing: SqlStr,
    pub(crate) enter_any: SqlStr,
    /// For several sessions, or with a booking.
    pub(crate) enter: Both,
    /// For several sessions that are there and free.
    pub(crate) enter_free: SqlStr,
    pub(crate) insert: SqlStr,
    pub(crate) insert_locked: SqlStr,
    /// By: is it a write, does it close.
    pub(crate) change_one: [[SqlStr; 2]; 2],
    pub(crate) change: Both,
    /// For several sessions that are written and closed by their holders.
    pub(crate) change_held: SqlStr,
    pub(crate) look: SqlStr,
    pub(crate) remove: SqlStr,
    pub(crate) renew: SqlStr,
    pub(crate) release: SqlStr,
    pub(crate) leave: SqlStr,
    /// Finds and frees expired records, and what is left of others.
    pub(crate) gc: [[SqlStr; 2]; 2],
    pub(crate) list: SqlStr,
    pub(crate) locks: SqlStr,
}

/// One that waits for its row, and one that skips what is locked.
#[derive(Debug)]
pub(crate) struct Both {
    pub(crate) alone: SqlStr,
    pub(crate) batch: SqlStr,
}

/// Fills in what is named in braces.
fn fill(text: &str, names: &[(&str, &str)]) -> String {
    let filled = names.iter().fold(text.to_owned(), |text, (name, value)| text.replace(&format!("{{{name}}}"), value));
    filled.replace("{now}", NOW).replace("{claim}", &millis(CLAIM).to_string()).replace("{same}", &SAME.to_string())
}

impl Statements {
    /// `table` is quoted; `wait` is how long a statement waits for a row that somebody has locked, in milliseconds.
    pub(crate) fn new(table: &str, wait: i64, strict: bool) -> Self {
        let impatient = format!("set_config('lock_timeout', '{wait}', true)");
        let make = |text: &str, names: &[(&str, &str)]| {
            let names = [names, &[("t", table), ("impatient", &impatient), ("relaxed", RELAXED)]].concat();
            AssertSqlSafe(fill(text, &names)).into_sql_str()
        };
        let both = |text: &str, names: &[(&str, &str)]| Both {
            alone: make(text, &[names, &[("skip", "")]].concat()),
            batch: make(text, &[names, &[("skip", "SKIP LOCKED")]].concat()),
        };
        let stub = STUB.to_string();
        let displace = fill(DISPLACE, &[("displaced", DISPLACED)]);
        let names = [("free", FREE), ("take", TAKE), ("displace", &*displace), ("stub", &stub)];
        // Braces in what is filled in are filled in turn, as these come first.
        let change_one = |writes: bool, closes: bool| {
            let own = if strict {
                "CASE WHEN $3::bytea IS NULL THEN s.lock_until IS NULL OR s.lock_until <= {now}
                  ELSE s.lock_token = $3 AND s.lock_until > {now} END"
            } else {
                "(s.lock_token = $3 OR s.lock_until IS NULL OR s.lock_until <= {now})"
            };
            let writes = if writes { "data = $6, write_id = $5," } else { "" };
            let (closes, tells) = if closes { (", {hand_on}", TELL_ONE) } else { ("", "NULL::int8") };
            let names = [
                ("writes", writes),
                ("closes", closes),
                ("hand_on", HAND_ON),
                ("tells", tells),
                ("handed", "(s.lock_token = $3) IS TRUE"),
                ("own", own),
                ("tell", TELL),
            ];
            make(CHANGE_ONE, &names)
        };
        let strict = if strict { "true" } else { "false" };
        Self {
            enter_existing: make(ENTER_EXISTING, &names),
            enter_any: make(ENTER_ANY, &names),
            enter: both(ENTER, &names),
            enter_free: make(ENTER_FREE, &[]),
            insert: make(INSERT, &[]),
            insert_locked: make(INSERT_LOCKED, &[]),
            change_one: [
                [change_one(false, false), change_one(false, true)],
                [change_one(true, false), change_one(true, true)],
            ],
            change_held: make(CHANGE_HELD, &[]),
            change: both(CHANGE, &[("tell", TELL), ("strict", strict)]),
            look: make(LOOK, &[]),
            remove: make(REMOVE, &[("tell", TELL), ("remember", &millis(REMEMBER).to_string())]),
            renew: make(RENEW, &[("strict", strict), ("stub", &stub)]),
            release: make(RELEASE, &[("hand_on", HAND_ON), ("tells", TELL_ONE), ("tell", TELL), ("handed", "$3::bool")]),
            leave: make(LEAVE, &[("tell", TELL)]),
            gc: ["IS NOT NULL", "IS NULL"].map(|what| {
                [GC_FIND, GC_FREE].map(|sql| make(sql, &[("over", OVER), ("what", what), ("limit", &SEARCH.to_string())]))
            }),
            list: make(LIST, &[]),
            locks: make(LOCKS, &[]),
        }
    }
}

/// The table of a new database, `{t}`, with its index, `{i}`, in one statement: nobody ever sees a part of it.
pub(crate) fn schema(table: &str, index: &str) -> String {
    let parts = [CREATE, STORAGE, INDEX, COMMENT].map(|text| fill(text, &[("t", table), ("i", index)]));
    // Quoted as a text: between dollars, a name with their tag in it would end the body.
    format!("DO '{}'", format!("BEGIN\n{};\nEND", parts.join(";\n")).replace('\'', "''"))
}

/// What the table says about itself; the number is the version of its columns.
pub(crate) const VERSION: &str = "sessionkit 1";

// Half of each page is left free, so that the next version of a row lies beside it: no index is touched, and the update after cleans
// up. A row of which three versions fit in a page stays in it as a whole, as does one with 2 KiB of data: measured, that writes 13 %
// less log than one whose data lies in a table of its own, and does a fifth more cycles. A longer one is better off there: an open
// does not write its data anew.
const CREATE: &str = "CREATE TABLE {t} (
  id text COLLATE \"C\" PRIMARY KEY,
  data bytea,
  write_id bytea,
  expires_at int8 NOT NULL,
  expires_minute int8 NOT NULL,
  lock_token bytea,
  lock_until int8,
  lock_since int8,
  lock_lease int8,
  lock_process int8,
  lock_handed bool,
  lock_owner text,
  want_token bytea,
  want_until int8,
  want_process int8,
  want_since int8
) WITH (fillfactor = 50, toast_tuple_target = 2688)";

// To compress each longer record anew at each save took a tenth of the server's time.
const STORAGE: &str = "ALTER TABLE {t} ALTER COLUMN data SET STORAGE EXTERNAL";

const INDEX: &str = "CREATE INDEX {i} ON {t} (expires_minute)";

const COMMENT: &str = "COMMENT ON TABLE {t} IS 'sessionkit 1'";

// $1 key, $2 token, $3 lease, $4 owner, $5 process.
// Answers 1 taken, 2 absent, 3 busy, 4 ask again: the lean statement and its snapshot differ.
const ENTER_EXISTING: &str = "WITH u AS (
  UPDATE {t} AS s SET {take},
    expires_at = GREATEST(s.expires_at, {now} + 2 * $3::int8),
    expires_minute = GREATEST(s.expires_at, {now} + 2 * $3) / 60000
  WHERE s.id = $1 AND s.data IS NOT NULL AND s.expires_at > {now} AND {free} AND {impatient} IS NOT NULL
  RETURNING s.data, s.write_id, s.expires_at - {now} AS life, s.lock_handed, {relaxed})
SELECT 1::int2, data, write_id, life, lock_handed, NULL::text, NULL::int8, NULL::int8 FROM u
UNION ALL
SELECT CASE WHEN NOT live THEN 2::int2 WHEN left_over > 0 THEN 3::int2 ELSE 4::int2 END,
  NULL, NULL, NULL, NULL, lock_owner, lock_since, left_over FROM (
  SELECT data IS NOT NULL AND expires_at > now AS live, lock_owner, lock_since,
    GREATEST(lock_until - now, CASE WHEN want_token <> $2 THEN want_until - now END) AS left_over FROM (
    SELECT *, {now} AS now FROM {t} WHERE id = $1 AND NOT EXISTS (SELECT FROM u)) s) s";

// $6 whether the record is wanted, too. Writes a row for an absent id. The newest version of a row decides, whatever the snapshot.
const ENTER_ANY: &str = "WITH u AS (
  INSERT INTO {t} AS s (id, expires_at, expires_minute, lock_token, lock_until, lock_since, lock_lease, lock_owner, lock_process,
    lock_handed)
  VALUES ($1, {now} + $3::int8 + {stub}, ({now} + $3 + {stub}) / 60000, $2, {now} + $3, {now}, $3, $4, $5, false)
  ON CONFLICT (id) DO UPDATE SET {take},
    (expires_at, expires_minute) = (SELECT n.until, n.until / 60000 FROM (SELECT CASE
      WHEN s.data IS NULL AND s.write_id IS NULL THEN GREATEST(s.expires_at, {now} + $3 + {stub})
      WHEN $6 AND s.data IS NOT NULL AND s.expires_at > {now} THEN GREATEST(s.expires_at, {now} + 2 * $3)
      ELSE s.expires_at END AS until) n)
  WHERE {free}
  RETURNING CASE WHEN $6 AND s.expires_at > {now} THEN s.data END AS data, CASE WHEN $6 THEN s.write_id END AS write_id,
    s.expires_at - {now} AS life, s.lock_handed, {relaxed})
SELECT 1::int2, data, write_id, life, lock_handed, NULL::text, NULL::int8, NULL::int8 FROM u
UNION ALL
SELECT CASE WHEN left_over > 0 THEN 3::int2 ELSE 4::int2 END, NULL, NULL, NULL, NULL, lock_owner, lock_since, left_over FROM (
  SELECT lock_owner, lock_since,
    GREATEST(lock_until - now, CASE WHEN want_token <> $2 THEN want_until - now END) AS left_over FROM (
    SELECT *, {now} AS now FROM {t} WHERE id = $1 AND NOT EXISTS (SELECT FROM u)) s) s";

// $1 keys, $2 tokens, $3 leases, $4 owner, $5 process. Nobody holds or wants what is answered; the rest is the business of `ENTER`.
const ENTER_FREE: &str = "WITH z AS MATERIALIZED (SELECT {relaxed} AS z, {now} AS now),
r AS MATERIALIZED (
  SELECT i.id, i.token, i.lease, i.n
  FROM z, unnest($1::text[], $2::bytea[], $3::int8[]) WITH ORDINALITY AS i(id, token, lease, n), {t} s
  WHERE z.z IS NOT NULL AND s.id = ANY(ARRAY[i.id]) FOR NO KEY UPDATE OF s SKIP LOCKED)
UPDATE {t} AS s SET lock_token = r.token, lock_until = z.now + r.lease, lock_since = z.now, lock_lease = r.lease,
  lock_owner = $4::text, lock_process = $5::int8, lock_handed = false,
  expires_at = GREATEST(s.expires_at, z.now + 2 * r.lease), expires_minute = GREATEST(s.expires_at, z.now + 2 * r.lease) / 60000
FROM z, r
WHERE s.id = ANY(ARRAY[r.id]) AND s.data IS NOT NULL AND s.expires_at > z.now AND s.lock_token IS NULL AND s.want_token IS NULL
RETURNING r.n, s.data, s.write_id, s.expires_at - z.now";

// $1 keys, $2 tokens, $3 leases, $4 bookings, $5 wants (0 existing, 1 any, 2 the lock), $6 probes, $7 owner, $8 the process of its
// liveness lock, $9 the process that waits, $10 for how long.
// A process that is gone holds its lock no more. For some seconds after a start of the server nobody may have it again yet. Who has to
// give way to somebody who came before him is told, as nobody hands him the lock any more.
const ENTER: &str = "WITH i AS MATERIALIZED (
  SELECT * FROM unnest($1::text[], $2::bytea[], $3::int8[], $4::int8[], $5::int2[], $6::bool[], $10::int8[])
    WITH ORDINALITY AS i(id, token, lease, book, want, probe, waited, n)),
z AS MATERIALIZED (SELECT {impatient} AS z),
r AS MATERIALIZED (
  SELECT s.id, s.data IS NOT NULL AS filled, s.write_id, s.expires_at, s.lock_token, s.lock_until, s.lock_since, s.lock_owner,
    s.lock_process, s.lock_handed, s.want_token, s.want_until, s.want_process, s.want_since
  FROM z, {t} s WHERE z.z IS NOT NULL AND s.id = ANY($1) FOR NO KEY UPDATE OF s {skip}),
j1 AS MATERIALIZED (SELECT i.n, i.token, i.lease, i.book, i.want, i.probe, i.waited, r.*, {now} AS now FROM r JOIN i ON i.id = r.id),
j2 AS MATERIALIZED (SELECT *, filled AND expires_at > now AS live, (lock_token = token) IS TRUE AS own,
  (want_token IS NULL OR want_until <= now OR want_token = token OR (book > 0 AND want_process = $9::int8)) IS TRUE AS open,
  CASE WHEN lock_until IS NULL OR lock_until <= now THEN true
    WHEN NOT probe OR lock_process IS NULL OR lock_token = token THEN false
    WHEN pg_postmaster_start_time() > clock_timestamp() - interval '5 s' THEN false
    ELSE pg_try_advisory_xact_lock_shared(lock_process) END AS ended FROM j1),
j AS MATERIALIZED (SELECT *, (want <> 0 OR live) AND (own OR (ended AND open)) AS granted,
  (want <> 0 OR live) AND NOT (own OR (ended AND open)) AND book > 0 AND (open OR now - waited + {same} < want_since) IS TRUE
    AS books FROM j2),
u AS (
  UPDATE {t} s SET
    lock_token = CASE WHEN granted THEN j.token ELSE s.lock_token END,
    lock_until = CASE WHEN granted THEN j.now + j.lease ELSE s.lock_until END,
    lock_since = CASE WHEN granted THEN j.now ELSE s.lock_since END,
    lock_lease = CASE WHEN granted THEN j.lease ELSE s.lock_lease END,
    lock_owner = CASE WHEN granted THEN $7::text ELSE s.lock_owner END,
    lock_process = CASE WHEN granted THEN $8::int8 ELSE s.lock_process END,
    lock_handed = CASE WHEN granted THEN (j.own AND s.lock_handed) IS TRUE ELSE s.lock_handed END,
    want_token = CASE WHEN books THEN j.token WHEN s.want_token = j.token THEN NULL ELSE s.want_token END,
    want_until = CASE WHEN books THEN j.now + j.book WHEN s.want_token = j.token THEN NULL ELSE s.want_until END,
    want_process = CASE WHEN books THEN $9::int8 ELSE s.want_process END,
    want_since = CASE WHEN books AND (s.want_token = j.token) IS NOT TRUE THEN j.now - j.waited ELSE s.want_since END,
    expires_at = GREATEST(s.expires_at, CASE WHEN granted AND j.want <> 2 AND j.live THEN j.now + 2 * j.lease
      WHEN granted AND NOT j.filled AND j.write_id IS NULL THEN j.now + j.lease + {stub} END),
    expires_minute = GREATEST(s.expires_at, CASE WHEN granted AND j.want <> 2 AND j.live THEN j.now + 2 * j.lease
      WHEN granted AND NOT j.filled AND j.write_id IS NULL THEN j.now + j.lease + {stub} END) / 60000
  FROM j WHERE s.id = ANY(ARRAY[j.id]) AND (j.granted OR j.books)
  RETURNING s.id, CASE WHEN j.granted AND j.live AND j.want <> 2 THEN s.data END AS data, s.expires_at, s.lock_handed, {relaxed}),
m AS (
  INSERT INTO {t} AS s (id, expires_at, expires_minute, lock_token, lock_until, lock_since, lock_lease, lock_owner, lock_process,
    lock_handed)
  SELECT i.id, now + lease + {stub}, (now + lease + {stub}) / 60000, token, now + lease, now, lease, $7, $8, false
  FROM (SELECT *, {now} AS now FROM i WHERE want <> 0 AND '{skip}' = '' AND NOT EXISTS (SELECT FROM {t} s WHERE s.id = ANY(ARRAY[i.id]))) i
  ON CONFLICT (id) DO NOTHING RETURNING s.id, {relaxed})
SELECT CASE WHEN j.granted OR m.id IS NOT NULL THEN 1::int2
    WHEN j.id IS NOT NULL AND j.want = 0 AND NOT j.live THEN 2::int2
    WHEN j.id IS NOT NULL THEN 3::int2
    WHEN i.want = 0 AND NOT EXISTS (SELECT FROM {t} s WHERE s.id = ANY(ARRAY[i.id])) THEN 2::int2 ELSE 4::int2 END,
  u.data, CASE WHEN j.want <> 2 THEN j.write_id END, u.expires_at - j.now, u.lock_handed, j.lock_owner, j.lock_since,
  GREATEST(j.lock_until - j.now, CASE WHEN NOT j.open THEN j.want_until - j.now END), COALESCE(j.books, false),
  (SELECT count({displace}) FROM (SELECT j.id, j.want_token AS told, j.want_process WHERE j.books AND NOT j.open) told)
FROM i LEFT JOIN j ON j.n = i.n LEFT JOIN u ON u.id = i.id LEFT JOIN m ON m.id = i.id ORDER BY i.n";

// $1 key, $2 data, $3 write id, $4 length of life.
const INSERT: &str = "INSERT INTO {t} (id, data, write_id, expires_at, expires_minute)
VALUES ($1, $2, $3, {now} + $4::int8, ({now} + $4) / 60000) ON CONFLICT (id) DO NOTHING RETURNING true";

// $5 token, $6 lease, $7 owner, $8 process.
const INSERT_LOCKED: &str =
    "INSERT INTO {t} (id, data, write_id, expires_at, expires_minute, lock_token, lock_until, lock_since, lock_lease,
  lock_owner, lock_process, lock_handed)
VALUES ($1, $2, $3, {now} + $4::int8, ({now} + $4) / 60000, $5, {now} + $6::int8, {now}, $6, $7, $8, false)
ON CONFLICT (id) DO NOTHING RETURNING true";

// $1 key, $2 the write that it is based on, $3 token, none if the access is optimistic, $4 length of life, $5 write id, $6 data.
const CHANGE_ONE: &str = "WITH u AS (
  UPDATE {t} AS s SET {writes} expires_at = {now} + $4::int8, expires_minute = ({now} + $4) / 60000 {closes}
  WHERE s.id = $1 AND s.write_id = $2 AND s.data IS NOT NULL AND s.expires_at > {now} AND {own} AND {impatient} IS NOT NULL
  RETURNING s.id, s.lock_token AS told, s.want_process)
SELECT {tells} FROM u";

const TELL_ONE: &str = "(SELECT count({tell}) FROM u WHERE told IS NOT NULL AND want_process IS NOT NULL)";

// $1 keys, $2 tokens, $3 the writes that they are based on, $4 write ids, $5 data, $6 lengths of life. What is answered was written
// and let go by its holder, and nobody was next in line; the rest is the business of `CHANGE`.
const CHANGE_HELD: &str = "WITH z AS MATERIALIZED (SELECT {now} AS now),
r AS MATERIALIZED (
  SELECT i.*
  FROM unnest($1::text[], $2::bytea[], $3::bytea[], $4::bytea[], $5::bytea[], $6::int8[])
    WITH ORDINALITY AS i(id, token, base, wid, body, ttl, n), {t} s
  WHERE s.id = ANY(ARRAY[i.id]) FOR NO KEY UPDATE OF s SKIP LOCKED)
UPDATE {t} AS s SET data = r.body, write_id = r.wid, expires_at = z.now + r.ttl, expires_minute = (z.now + r.ttl) / 60000,
  lock_token = NULL, lock_until = NULL, lock_since = NULL, lock_lease = NULL, lock_owner = NULL, lock_process = NULL,
  lock_handed = NULL
FROM z, r
WHERE s.id = ANY(ARRAY[r.id]) AND s.write_id = r.base AND s.data IS NOT NULL AND s.expires_at > z.now AND s.lock_token = r.token
  AND s.want_token IS NULL
RETURNING r.n";

// $1 keys, $2 tokens, $3 leases (none if the access is optimistic), $4 bases (0 unseen, 1 absent, 2 written), $5 marks or writes
// that they are based on, $6 write ids (none for a touch), $7 data, $8 lengths of life, $9 whether they close, $10 owner,
// $11 process.
// Answers 1 applied, 2 applied before, 0 refused, 3 gone, 4 ask again.
const CHANGE: &str = "WITH i AS MATERIALIZED (
  SELECT * FROM unnest($1::text[], $2::bytea[], $3::int8[], $4::int2[], $5::bytea[], $6::bytea[], $7::bytea[], $8::int8[], $9::bool[])
    WITH ORDINALITY AS i(id, token, lease, basis, base, wid, body, ttl, closes, n)),
z AS MATERIALIZED (SELECT {impatient} AS z),
r AS MATERIALIZED (
  SELECT s.id, s.data IS NOT NULL AS filled, s.write_id, s.expires_at, s.lock_token, s.lock_until, s.want_token, s.want_until,
    s.want_process
  FROM z, {t} s WHERE z.z IS NOT NULL AND s.id = ANY($1) FOR NO KEY UPDATE OF s {skip}),
j1 AS MATERIALIZED (
  SELECT i.n, i.token, i.lease, i.basis, i.base, i.wid, i.ttl, i.closes, r.*, {now} AS now FROM r JOIN i ON i.id = r.id),
j2 AS MATERIALIZED (SELECT *, filled AND expires_at > now AS live, (lock_token = token) IS TRUE AS own,
  (lock_until > now) IS TRUE AS locked, (want_until > now) IS TRUE AS wanted FROM j1),
j3 AS MATERIALIZED (SELECT *, CASE
  WHEN wid IS NOT NULL AND live AND write_id = wid THEN 2
  WHEN basis = 2 THEN CASE
    WHEN NOT live THEN 3
    WHEN write_id <> base OR (locked AND NOT own) THEN 0
    WHEN {strict} AND lease IS NOT NULL AND NOT (own AND locked) THEN 0
    ELSE 1 END
  WHEN wid IS NULL THEN 3
  WHEN basis = 1 AND lease IS NOT NULL THEN CASE
    WHEN live THEN 0
    WHEN write_id IS NOT NULL AND write_id IS DISTINCT FROM base THEN 3
    WHEN NOT own OR ({strict} AND NOT locked) THEN 0
    ELSE 1 END
  WHEN write_id = wid THEN 3
  WHEN live OR (write_id IS NOT NULL AND write_id IS DISTINCT FROM base) OR (locked AND NOT own) THEN 0
  ELSE 1 END AS verdict FROM j2),
j4 AS MATERIALIZED (SELECT *,
  basis = 0 AND lease IS NOT NULL AND NOT closes AND verdict IN (1, 2) AND (own OR NOT locked) AS takes,
  lock_token IS NOT NULL AND (own OR (NOT locked AND lease IS NOT NULL)) AND (verdict = 3 OR (closes AND verdict IN (1, 2))) AS releases
  FROM j3),
j AS MATERIALIZED (SELECT *, releases AND wanted AS hands, releases AND NOT wanted AND verdict = 3 AND NOT filled AND write_id IS NULL
  AS empties FROM j4),
u AS (
  UPDATE {t} s SET
    data = CASE WHEN j.verdict = 1 AND j.wid IS NOT NULL THEN i.body ELSE s.data END,
    write_id = CASE WHEN j.verdict = 1 AND j.wid IS NOT NULL THEN j.wid ELSE s.write_id END,
    expires_at = CASE WHEN j.verdict = 1 THEN j.now + j.ttl ELSE s.expires_at END,
    expires_minute = CASE WHEN j.verdict = 1 THEN (j.now + j.ttl) / 60000 ELSE s.expires_minute END,
    lock_token = CASE WHEN takes THEN j.token WHEN hands THEN s.want_token WHEN releases THEN NULL ELSE s.lock_token END,
    lock_until = CASE WHEN takes THEN j.now + j.lease WHEN hands THEN j.now + {claim} WHEN releases THEN NULL ELSE s.lock_until END,
    lock_since = CASE WHEN takes OR hands THEN j.now WHEN releases THEN NULL ELSE s.lock_since END,
    lock_lease = CASE WHEN takes THEN j.lease WHEN hands THEN {claim} WHEN releases THEN NULL ELSE s.lock_lease END,
    lock_owner = CASE WHEN takes THEN $10::text WHEN releases THEN NULL ELSE s.lock_owner END,
    lock_process = CASE WHEN takes THEN $11::int8 WHEN releases THEN NULL ELSE s.lock_process END,
    lock_handed = CASE WHEN takes THEN false WHEN hands THEN j.own WHEN releases THEN NULL ELSE s.lock_handed END,
    want_token = CASE WHEN hands THEN NULL ELSE s.want_token END,
    want_until = CASE WHEN hands THEN NULL ELSE s.want_until END
  FROM j JOIN i ON i.n = j.n WHERE s.id = ANY(ARRAY[j.id]) AND (j.verdict = 1 OR j.takes OR j.releases) AND NOT j.empties),
d AS (DELETE FROM {t} s USING j WHERE s.id = ANY(ARRAY[j.id]) AND j.empties),
m AS (
  INSERT INTO {t} AS s (id, data, write_id, expires_at, expires_minute, lock_token, lock_until, lock_since, lock_lease, lock_owner,
    lock_process, lock_handed)
  SELECT i.id, i.body, i.wid, now + ttl, (now + ttl) / 60000, CASE WHEN takes THEN token END, CASE WHEN takes THEN now + lease END,
    CASE WHEN takes THEN now END, CASE WHEN takes THEN lease END, CASE WHEN takes THEN $10 END, CASE WHEN takes THEN $11 END,
    CASE WHEN takes THEN false END
  FROM (SELECT *, basis = 0 AND lease IS NOT NULL AND NOT closes AS takes, {now} AS now FROM i
    WHERE wid IS NOT NULL AND (basis = 0 OR (basis = 1 AND lease IS NULL))
      AND NOT EXISTS (SELECT FROM {t} s WHERE s.id = ANY(ARRAY[i.id]))) i
  ON CONFLICT (id) DO NOTHING RETURNING s.id)
SELECT CASE WHEN j.n IS NOT NULL THEN j.verdict WHEN m.id IS NOT NULL THEN 1
    WHEN EXISTS (SELECT FROM {t} s WHERE s.id = ANY(ARRAY[i.id])) THEN 4
    WHEN i.basis = 2 OR i.wid IS NULL THEN 3
    WHEN i.basis = 1 AND i.lease IS NOT NULL THEN 0 ELSE 4 END::int2,
  (SELECT count({tell}) FROM (SELECT j.id, j.want_token AS told, j.want_process WHERE j.hands AND j.want_process IS NOT NULL) told)
FROM i LEFT JOIN j ON j.n = i.n LEFT JOIN m ON m.id = i.id ORDER BY i.n";

// $1 key.
const LOOK: &str = "SELECT CASE WHEN expires_at > now THEN data END, write_id, expires_at - now FROM (
  SELECT data, write_id, expires_at, {now} AS now FROM {t} WHERE id = $1) s";

// $1 key, $2 token, $3 lease, $4 mark, $5 whether to leave a trace in any case, $6 whether it closes.
// Answers with the record that it removed; nothing at all if the row was changed meanwhile.
const REMOVE: &str = "WITH z AS MATERIALIZED (SELECT {impatient} AS z),
r AS MATERIALIZED (
  SELECT s.id, s.data, s.expires_at, s.lock_token, s.lock_lease, s.want_token, s.want_until, s.want_process
  FROM z, {t} s WHERE z.z IS NOT NULL AND s.id = $1 FOR NO KEY UPDATE OF s),
j1 AS MATERIALIZED (SELECT *, {now} AS now FROM r),
j AS MATERIALIZED (SELECT *, (want_until > now) IS TRUE AS wanted, $6::bool AND (lock_token = $2) IS TRUE AS releases,
  now + GREATEST({remember}, 2 * $3::int8, 2 * lock_lease) AS until FROM j1),
u AS (
  UPDATE {t} s SET data = NULL, write_id = $4::bytea, expires_at = j.until, expires_minute = j.until / 60000,
    lock_token = CASE WHEN NOT releases THEN s.lock_token WHEN wanted THEN s.want_token END,
    lock_until = CASE WHEN NOT releases THEN s.lock_until WHEN wanted THEN j.now + {claim} END,
    lock_since = CASE WHEN NOT releases THEN s.lock_since WHEN wanted THEN j.now END,
    lock_lease = CASE WHEN NOT releases THEN s.lock_lease WHEN wanted THEN {claim} END,
    lock_owner = CASE WHEN NOT releases THEN s.lock_owner END,
    lock_process = CASE WHEN NOT releases THEN s.lock_process END,
    lock_handed = CASE WHEN NOT releases THEN s.lock_handed WHEN wanted THEN true END,
    want_token = CASE WHEN releases THEN NULL ELSE s.want_token END,
    want_until = CASE WHEN releases THEN NULL ELSE s.want_until END
  FROM j WHERE s.id = ANY(ARRAY[j.id]) RETURNING s.id),
m AS (
  INSERT INTO {t} AS s (id, write_id, expires_at, expires_minute)
  SELECT $1, $4, until, until / 60000 FROM (SELECT {now} + GREATEST({remember}, 2 * $3) AS until) n
  WHERE $5::bool AND NOT EXISTS (SELECT FROM {t} s WHERE s.id = $1) ON CONFLICT (id) DO NOTHING RETURNING s.id)
SELECT CASE WHEN j.expires_at > j.now THEN j.data END, j.expires_at - j.now,
  (SELECT count({tell}) FROM (SELECT j.id, j.want_token AS told, j.want_process WHERE j.wanted AND j.want_process IS NOT NULL) told)
FROM j JOIN u ON true
UNION ALL SELECT NULL, NULL, 0 FROM m
UNION ALL SELECT NULL, NULL, 0 WHERE NOT $5 AND NOT EXISTS (SELECT FROM {t} s WHERE s.id = $1)";

// $1 keys, $2 tokens, $3 leases, $4 whether there is a record to keep alive, $5 process.
// Answers 1 renewed, 2 ended, 3 gone, 4 ask again.
const RENEW: &str = "WITH i AS MATERIALIZED (
  SELECT * FROM unnest($1::text[], $2::bytea[], $3::int8[], $4::bool[]) WITH ORDINALITY AS i(id, token, lease, protects, n)),
z AS MATERIALIZED (SELECT {impatient} AS z),
u AS (
  UPDATE {t} s SET lock_until = {now} + i.lease, lock_lease = i.lease, lock_process = $5::int8,
    (expires_at, expires_minute) = (SELECT n.until, n.until / 60000 FROM (SELECT CASE
      WHEN i.protects THEN GREATEST(s.expires_at, {now} + 2 * i.lease)
      WHEN s.data IS NULL AND s.write_id IS NULL THEN GREATEST(s.expires_at, {now} + i.lease + {stub})
      ELSE s.expires_at END AS until) n)
  FROM i, z WHERE z.z IS NOT NULL AND s.id = ANY(ARRAY[i.id]) AND s.lock_token = i.token AND (NOT {strict} OR s.lock_until > {now})
    AND (NOT i.protects OR (s.data IS NOT NULL AND s.expires_at > {now}))
  RETURNING i.n, {relaxed})
SELECT CASE WHEN u.n IS NOT NULL THEN 1::int2
  WHEN s.lock_token IS DISTINCT FROM i.token THEN 2::int2
  WHEN i.protects AND (s.data IS NULL OR s.expires_at <= {now}) THEN 3::int2
  WHEN {strict} AND s.lock_until <= {now} THEN 2::int2 ELSE 4::int2 END
FROM i LEFT JOIN u ON u.n = i.n LEFT JOIN {t} s ON s.id = ANY(ARRAY[i.id]) ORDER BY i.n";

// $1 key, $2 token, $3 whether it is clean. The row of a record or a trace only.
const RELEASE: &str = "WITH u AS (
  UPDATE {t} AS s SET {hand_on}
  WHERE s.id = $1 AND s.lock_token = $2 AND s.write_id IS NOT NULL AND s.lock_owner IS NOT NULL AND {impatient} IS NOT NULL
  RETURNING s.id, s.lock_token AS told, s.want_process, {relaxed})
SELECT {tells} FROM u";

// $1 key, $2 token, none for whoever holds it, $3 whether it is clean, $4 whether to give up only what nobody has come for. Answers
// whether there was a lock or a place to give up.
// Who was handed a lock and never came for it passes it on as he was given it.
const LEAVE: &str = "WITH z AS MATERIALIZED (SELECT {impatient} AS z),
r AS MATERIALIZED (
  SELECT s.id, s.data IS NOT NULL OR s.write_id IS NOT NULL AS stays, s.lock_token, s.lock_until, s.lock_owner, s.lock_handed,
    s.want_token, s.want_until, s.want_process
  FROM z, {t} s WHERE z.z IS NOT NULL AND s.id = $1 FOR NO KEY UPDATE OF s),
j1 AS MATERIALIZED (SELECT *, {now} AS now FROM r),
j2 AS MATERIALIZED (SELECT *, (lock_until > now) IS TRUE AS locked, (want_token = $2::bytea AND NOT $4::bool) IS TRUE AS wants,
  CASE WHEN $2 IS NULL THEN (lock_until > now) IS TRUE
    ELSE (lock_token = $2 AND (lock_owner IS NULL OR NOT $4)) IS TRUE END AS own,
  $3::bool AND (lock_owner IS NOT NULL OR lock_handed IS TRUE) AS clean FROM j1),
j3 AS MATERIALIZED (SELECT *, own AND (want_until > now) IS TRUE AND NOT wants AS hands FROM j2),
j AS MATERIALIZED (SELECT *, NOT stays AND NOT hands AND (own OR (wants AND NOT locked)) AS empties FROM j3),
u AS (
  UPDATE {t} s SET
    lock_token = CASE WHEN hands THEN s.want_token WHEN own THEN NULL ELSE s.lock_token END,
    lock_until = CASE WHEN hands THEN j.now + {claim} WHEN own THEN NULL ELSE s.lock_until END,
    lock_since = CASE WHEN hands THEN j.now WHEN own THEN NULL ELSE s.lock_since END,
    lock_lease = CASE WHEN hands THEN {claim} WHEN own THEN NULL ELSE s.lock_lease END,
    lock_owner = CASE WHEN own THEN NULL ELSE s.lock_owner END,
    lock_process = CASE WHEN own THEN NULL ELSE s.lock_process END,
    lock_handed = CASE WHEN hands THEN j.clean WHEN own THEN NULL ELSE s.lock_handed END,
    want_token = CASE WHEN hands OR wants THEN NULL ELSE s.want_token END,
    want_until = CASE WHEN hands OR wants THEN NULL ELSE s.want_until END
  FROM j WHERE s.id = ANY(ARRAY[j.id]) AND (j.own OR j.wants) AND NOT j.empties RETURNING {relaxed}),
d AS (DELETE FROM {t} s USING j WHERE s.id = ANY(ARRAY[j.id]) AND j.empties RETURNING {relaxed})
SELECT own OR wants, (SELECT count({tell}) FROM (SELECT j.id, j.want_token AS told, j.want_process WHERE j.hands AND j.want_process IS NOT NULL) told)
FROM j";

// Nobody needs the row any more.
const OVER: &str = "s.expires_at <= (SELECT now FROM n) AND (s.lock_until IS NULL OR s.lock_until <= (SELECT now FROM n))";

// The minute, which says no more than the deadline, is what the index can be searched for; what is freed is found by its key, and so
// does not name it. How many stands in the text: with a parameter a plan is made for a tenth of what may be over, which is to sort all
// of it.
const GC_FIND: &str = "WITH n AS MATERIALIZED (SELECT {now} AS now)
SELECT s.id FROM {t} s WHERE s.expires_minute <= (SELECT now / 60000 FROM n) AND {over} AND s.data {what}
ORDER BY s.expires_minute LIMIT {limit}";

// $1 the keys.
const GC_FREE: &str = "WITH n AS MATERIALIZED (SELECT {now} AS now),
r AS MATERIALIZED (SELECT s.id FROM {t} s WHERE s.id = ANY($1::text[]) AND {over} AND s.data {what} FOR UPDATE SKIP LOCKED),
d AS (DELETE FROM {t} s USING r WHERE s.id = ANY(ARRAY[r.id]) RETURNING s.id)
SELECT count(*), {relaxed} FROM d";

// $1 prefix, $2 the key behind which it begins, $3 how many. No key has a character behind the tilde.
const LIST: &str = "SELECT id, octet_length(data)::int8, expires_at - now FROM (
  SELECT id, data, expires_at, {now} AS now FROM {t}
  WHERE id >= $1 AND id < $1 || chr(127) AND id > $2 AND data IS NOT NULL AND expires_at > {now} ORDER BY id LIMIT $3) s";

// $1 prefix, $2 how many.
const LOCKS: &str = "SELECT id, lock_owner, lock_since, lock_until - now, (want_until > now) IS TRUE FROM (
  SELECT id, lock_owner, lock_since, lock_until, want_until, {now} AS now FROM {t}
  WHERE id >= $1 AND id < $1 || chr(127) AND lock_until > {now} ORDER BY id LIMIT $2) s";

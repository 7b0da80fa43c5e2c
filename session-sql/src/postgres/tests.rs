//! What travels together: a batch says of each member what the same request says alone.

use std::collections::BTreeMap;
use std::slice;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use conformance_tests::servers::Postgres as Server;
use session_core::leased::{Basis, Found, Renewed, Then, Verdict, Want};
use session_core::{Dsn, LeaseToken, Ttl, WriteId};

use crate::config::{SqlConfig, SqlServer};
use crate::connections::Connections;
use crate::database::{Action, Alter, Database, Enter, Entered, Owner, Remove, Renew};

fn server() -> &'static Server {
    static SERVER: OnceLock<Server> = OnceLock::new();
    SERVER.get_or_init(|| Server::start(&[]).expect("postgres starts; Debian has it in the package postgresql"))
}

async fn database(table: &str) -> Arc<dyn Database> {
    let config = SqlConfig::from_dsn(&Dsn::parse(&server().url()).unwrap()).unwrap();
    let config =
        config.with_table(table).with_timeout(Duration::from_secs(20)).with_connect_timeout(Duration::from_secs(20));
    let SqlServer::Postgres(address) = &config.server else { panic!("it is one") };
    let database = super::connect(address, &config, Owner::new().unwrap()).await.unwrap();
    database.create_table().await.unwrap();
    database
}

fn token() -> LeaseToken {
    LeaseToken::random().unwrap()
}

fn wid() -> WriteId {
    WriteId::random().unwrap()
}

fn enter(key: &str, token: LeaseToken, want: Want) -> Enter {
    Enter { key: key.into(), token, lease: 60_000, want, book: 0, waited: 0, probe: false }
}

fn write(key: &str, basis: Basis, token: Option<LeaseToken>, id: WriteId, data: &str, then: Then) -> Alter {
    let action = Action::Write { id, data: data.as_bytes().into(), ttl: Ttl::from_secs(900) };
    Alter { key: key.into(), basis, token, lease: token.map(|_| 60_000), action, then }
}

/// One of each that there may be, under a prefix: what is entered, and then what is changed.
struct Sample {
    entries: Vec<Enter>,
    changes: Vec<Alter>,
}

async fn sample(database: &dyn Database, table: &str, prefix: &str) -> Sample {
    let (mut entries, mut changes) = (Vec::new(), Vec::new());
    let key = |name: &str| format!("{prefix}{name}");
    let created = async |name: &str| {
        let id = wid();
        let create = write(&key(name), Basis::Unseen, None, id, "old", Then::Close);
        assert_eq!(database.change(&[create]).await.unwrap(), [Some(Verdict::Applied)]);
        id
    };
    let held = async |name: &str| {
        let holder = token();
        let held = database.enter(&[enter(&key(name), holder, Want::Any)]).await.unwrap();
        assert!(matches!(held[..], [Some(Entered::Granted { .. })]), "{held:?}");
        holder
    };
    let set = |name: &str, what: &str| {
        server().query(&format!("UPDATE {table} SET {what} WHERE id = '{}'", key(name))).unwrap();
    };
    let over = "expires_at = 60000, expires_minute = 1";
    let wanted = "want_token = 'somebody'::bytea, want_until = 1::int8 << 60, want_process = 7";
    for name in ["free", "free too", "held", "own", "booked", "expired", "ended", "wanted"] {
        created(name).await;
    }
    set("expired", over);
    held("ended").await;
    set("ended", "lock_until = 1");
    set("wanted", wanted);
    held("held").await;
    let own = held("own").await;
    held("booked").await;
    for name in ["free", "free too", "held", "missing", "expired", "ended", "wanted"] {
        entries.push(enter(&key(name), token(), Want::Existing));
    }
    entries.push(enter(&key("own"), own, Want::Existing));
    entries.push(Enter { book: 5_000, ..enter(&key("booked"), token(), Want::Existing) });

    for (name, then) in [("saved", Then::Close), ("kept", Then::Keep)] {
        let prev = created(name).await;
        changes.push(write(&key(name), Basis::Written(prev), Some(held(name).await), wid(), "new", then));
    }
    for (name, what) in [("expired when saved", over), ("wanted when saved", wanted), ("ended when saved", "lock_until = 1")]
    {
        let prev = created(name).await;
        changes.push(write(&key(name), Basis::Written(prev), Some(held(name).await), wid(), "new", Then::Close));
        set(name, what);
    }
    let prev = created("overtaken").await;
    held("overtaken").await;
    changes.push(write(&key("overtaken"), Basis::Written(prev), Some(token()), wid(), "new", Then::Close));
    created("other write").await;
    changes.push(write(
        &key("other write"),
        Basis::Written(wid()),
        Some(held("other write").await),
        wid(),
        "new",
        Then::Close,
    ));
    let done = created("repeated").await;
    changes.push(write(&key("repeated"), Basis::Written(wid()), Some(held("repeated").await), done, "new", Then::Close));
    // The repeat of the write that it is based on.
    let same = created("again").await;
    changes.push(write(&key("again"), Basis::Written(same), Some(held("again").await), same, "old", Then::Close));
    changes.push(write(&key("nowhere"), Basis::Written(wid()), Some(token()), wid(), "new", Then::Close));
    changes.push(write(&key("fresh"), Basis::Unseen, None, wid(), "new", Then::Close));
    changes.push(write(&key("fresh and kept"), Basis::Unseen, Some(token()), wid(), "new", Then::Keep));
    created("not fresh").await;
    changes.push(write(&key("not fresh"), Basis::Unseen, None, wid(), "new", Then::Close));
    let holder = held("stub").await;
    changes.push(write(&key("stub"), Basis::Absent { mark: None }, Some(holder), wid(), "new", Then::Close));
    changes.push(write(&key("lost stub"), Basis::Absent { mark: None }, Some(token()), wid(), "new", Then::Close));
    let prev = created("optimistic").await;
    changes.push(write(&key("optimistic"), Basis::Written(prev), None, wid(), "new", Then::Close));
    let prev = created("touched").await;
    changes.push(Alter {
        action: Action::Touch { ttl: Ttl::from_secs(1800) },
        ..write(&key("touched"), Basis::Written(prev), Some(held("touched").await), wid(), "", Then::Close)
    });
    let holder = held("touched stub").await;
    changes.push(Alter {
        action: Action::Touch { ttl: Ttl::from_secs(1800) },
        ..write(&key("touched stub"), Basis::Absent { mark: None }, Some(holder), wid(), "", Then::Close)
    });
    created("destroyed").await;
    let holder = held("destroyed").await;
    let removal = Remove { key: key("destroyed"), token: None, lease: 0, mark: wid(), trace: false, then: Then::Close };
    assert!(database.remove(&removal).await.unwrap().is_some());
    changes.push(write(&key("destroyed"), Basis::Written(wid()), Some(holder), wid(), "new", Then::Close));
    Sample { entries, changes }
}

/// What an answer says, without what differs from run to run.
fn said(entered: &Option<Entered>) -> String {
    match entered {
        Some(Entered::Granted { found, clean }) => {
            let found = match found {
                Found::Live { record, .. } => String::from_utf8_lossy(&record.data).into_owned(),
                other => format!("{other:?}"),
            };
            format!("granted {found} {clean}")
        }
        Some(Entered::Busy(busy)) => format!("busy {} {}", busy.booked, busy.holder.is_some()),
        other => format!("{other:?}"),
    }
}

/// The rows under a prefix, as far as they are the same from run to run.
fn rows(table: &str, prefix: &str) -> BTreeMap<String, String> {
    let sql = format!(
        "SELECT substr(id, {}), concat_ws(' ', encode(data, 'escape'), write_id IS NULL, lock_token IS NULL, lock_until IS NULL,
           lock_since IS NULL, lock_lease, lock_owner IS NULL, lock_handed, want_token IS NULL, want_until IS NULL,
           (expires_at - date_part('epoch', now()) * 1000)::int8 / 100000, expires_minute = expires_at / 60000)
         FROM {table} WHERE starts_with(id, '{prefix}')",
        prefix.len() + 1
    );
    let rows = server().query(&sql).unwrap();
    rows.into_iter().map(|row| (row[0].clone(), row[1].clone())).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_batch_has_the_outcome_of_each_of_its_members_alone() {
    let database = database("alone_or_not").await;
    let alone = sample(&*database, "alone_or_not", "alone ").await;
    let together = sample(&*database, "alone_or_not", "batch ").await;
    let entered = database.enter(&together.entries).await.unwrap();
    for (n, entry) in alone.entries.iter().enumerate() {
        let one = database.enter(std::slice::from_ref(entry)).await.unwrap();
        assert_eq!(said(&one[0]), said(&entered[n]), "{}", entry.key);
    }
    let changed = database.change(&together.changes).await.unwrap();
    for (n, change) in alone.changes.iter().enumerate() {
        let one = database.change(std::slice::from_ref(change)).await.unwrap();
        assert_eq!(one[0], changed[n], "{}", change.key);
    }
    let (alone, together) = (rows("alone_or_not", "alone "), rows("alone_or_not", "batch "));
    assert!(alone.len() > 15, "{alone:?}");
    assert_eq!(alone, together);
    let verdicts: Vec<_> = changed.into_iter().flatten().collect();
    for verdict in [Verdict::Applied, Verdict::AlreadyApplied, Verdict::Refused, Verdict::Gone] {
        assert!(verdicts.contains(&verdict), "no {verdict:?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_row_that_somebody_has_locked_is_left_out_of_a_batch_and_delays_nobody() {
    let database = database("skipped").await;
    let mut prev = Vec::new();
    for n in 0..8 {
        let id = wid();
        let create = write(&format!("s{n}"), Basis::Unseen, None, id, "old", Then::Close);
        database.change(&[create]).await.unwrap();
        prev.push(id);
    }
    let mut stranger = server().connect().unwrap();
    stranger.query("BEGIN; SELECT FROM skipped WHERE id = 's3' FOR UPDATE").unwrap();
    let tokens: Vec<_> = (0..8).map(|_| token()).collect();
    let entries: Vec<_> = (0..8).map(|n| enter(&format!("s{n}"), tokens[n], Want::Existing)).collect();
    let entered = database.enter(&entries).await.unwrap();
    let skipped = |n: usize| n == 3;
    for (n, entered) in entered.iter().enumerate() {
        assert_eq!(entered.is_none(), skipped(n), "{n}: {entered:?}");
    }
    let change = |n: usize| write(&format!("s{n}"), Basis::Written(prev[n]), Some(tokens[n]), wid(), "new", Then::Close);
    let changes: Vec<_> = (0..8).map(change).collect();
    let changed = database.change(&changes).await.unwrap();
    for (n, changed) in changed.iter().enumerate() {
        assert_eq!(*changed, (!skipped(n)).then_some(Verdict::Applied), "{n}");
    }
    stranger.query("ROLLBACK").unwrap();
    assert!(matches!(database.enter(&entries[3..4]).await.unwrap()[..], [Some(Entered::Granted { .. })]));
    assert_eq!(database.change(&changes[3..4]).await.unwrap(), [Some(Verdict::Applied)]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_member_that_the_table_refuses_takes_nothing_of_its_batch_with_it() {
    let database = database("poisoned").await;
    server().query("ALTER TABLE poisoned ADD CONSTRAINT never CHECK (data <> 'poison')").unwrap();
    let change = |n: usize| {
        let data = if n == 2 { "poison" } else { "good" };
        write(&format!("p{n}"), Basis::Unseen, None, wid(), data, Then::Close)
    };
    let changes: Vec<_> = (0..5).map(change).collect();
    let failure = database.change(&changes).await.unwrap_err();
    assert!(!failure.sent && !failure.passing, "it was refused as a whole: {failure:?}");
    assert!(!format!("{failure:?}").contains("poison"), "{failure:?}");
    assert!(rows("poisoned", "p").is_empty());
    for (n, change) in changes.iter().enumerate() {
        let one = database.change(std::slice::from_ref(change)).await;
        assert_eq!(one.is_ok(), n != 2, "{n}");
    }
    assert_eq!(rows("poisoned", "p").len(), 4);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn batches_of_the_same_rows_in_any_order_never_wait_for_each_other() {
    let database = database("crossed").await;
    let keys: Vec<_> = (0..32).map(|n| format!("c{n}")).collect();
    for key in &keys {
        database.change(&[write(key, Basis::Unseen, None, wid(), "old", Then::Close)]).await.unwrap();
    }
    let mut running = tokio::task::JoinSet::new();
    for task in 0..4 {
        let (database, mut keys) = (database.clone(), keys.clone());
        keys.rotate_left(task * 8);
        if task % 2 == 1 {
            keys.reverse();
        }
        running.spawn(async move {
            for _ in 0..50 {
                let mine = token();
                let entries: Vec<_> = keys.iter().map(|key| enter(key, mine, Want::Existing)).collect();
                let entered = database.enter(&entries).await.expect("nobody waits, so there is no deadlock");
                for (key, entered) in keys.iter().zip(entered) {
                    if let Some(Entered::Granted { .. }) = entered {
                        database.leave(key, mine, true).await.unwrap();
                    }
                }
            }
        });
    }
    while let Some(done) = running.join_next().await {
        done.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_refusal_is_of_the_newest_state_and_not_of_an_older_snapshot() {
    let database = database("snapshots").await;
    let (key, first, second) = ("k", wid(), wid());
    database.change(&[write(key, Basis::Unseen, None, first, "old", Then::Close)]).await.unwrap();
    // A copy of the write is still under way when its repeat comes: the repeat waits for the row, and has an older snapshot.
    let mut copy = server().connect().unwrap();
    let hex: String = second.to_bytes().iter().map(|byte| format!("{byte:02x}")).collect();
    copy.query(&format!("BEGIN; UPDATE snapshots SET data = 'new', write_id = '\\x{hex}' WHERE id = 'k'")).unwrap();
    let repeat = tokio::spawn({
        let database = database.clone();
        async move { database.change(&[write(key, Basis::Written(first), None, second, "new", Then::Close)]).await }
    });
    for _ in 0..1000 {
        if server().query("SELECT count(*) FROM pg_locks WHERE NOT granted").unwrap() != [["0"]] {
            break;
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    copy.query("COMMIT").unwrap();
    assert_eq!(repeat.await.unwrap().unwrap(), [Some(Verdict::AlreadyApplied)]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_place_next_in_line_is_of_who_has_waited_longest() {
    let [ours, theirs] = [database("seniority").await, database("seniority").await];
    ours.change(&[write("k", Basis::Unseen, None, wid(), "old", Then::Close)]).await.unwrap();
    let [holder, early, late, heir] = std::array::from_fn(|_| token());
    ours.enter(&[enter("k", holder, Want::Existing)]).await.unwrap();
    let next = async |database: &Arc<dyn Database>, token, waited| {
        let entry = Enter { book: 60_000, waited, ..enter("k", token, Want::Existing) };
        let told = database.enter(&[entry]).await.unwrap();
        matches!(&told[..], [Some(Entered::Busy(busy))] if busy.booked)
    };
    let mut waiter = ours.waiter(late).await.unwrap();
    assert!(next(&ours, late, 0).await, "nobody else has asked yet");
    // Whatever wakes a waiter beside messages, such as the connection that brings them, has done so by then.
    waiter.woken(Duration::from_secs(1)).await;
    assert!(next(&theirs, early, 60_000).await, "he came before");
    let told = tokio::time::timeout(Duration::from_secs(20), waiter.woken(Duration::from_secs(60)));
    let still_next = told.await.expect("whoever has to give way is told, as nobody will hand him the lock");
    assert!(!still_next, "and what he is told");
    assert!(!next(&ours, late, 30_000).await, "he asks again, and has not come earlier for that");
    assert!(next(&theirs, early, 60_001).await);
    assert!(next(&theirs, heir, 0).await, "the tasks of a process share its place");
    assert!(!next(&ours, late, 1).await, "clocks that are read twice decide nothing");
    assert!(ours.leave("k", holder, true).await.unwrap());
    assert_eq!(said(&theirs.enter(&[enter("k", heir, Want::Existing)]).await.unwrap()[0])[..7], *"granted");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whoever_leaves_is_told_whether_there_was_anything_to_leave() {
    let database = database("leaving").await;
    for key in ["k", "other"] {
        database.change(&[write(key, Basis::Unseen, None, wid(), "old", Then::Close)]).await.unwrap();
    }
    let [holder, next, nobody] = [token(), token(), token()];
    database.enter(&[enter("k", holder, Want::Existing)]).await.unwrap();
    database.enter(&[Enter { book: 60_000, ..enter("k", next, Want::Existing) }]).await.unwrap();
    for (key, token, left) in [
        ("k", nobody, false),
        ("other", holder, false),
        ("absent", holder, false),
        ("k", next, true),
        ("k", next, false),
        ("k", holder, true),
        ("k", holder, false),
    ] {
        assert_eq!(database.leave(key, token, true).await.unwrap(), left, "{key}");
    }
    assert_eq!(said(&database.enter(&[enter("k", nobody, Want::Existing)]).await.unwrap()[0])[..7], *"granted");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_has_expired_is_found_in_the_order_of_the_index_and_not_by_sorting_all_of_it() {
    // Before the table was ever analyzed, as after a migration.
    database("backlog").await;
    let backlog =
        "ALTER TABLE backlog SET (autovacuum_enabled = off); INSERT INTO backlog (id, data, expires_at, expires_minute)
        SELECT md5(n::text), repeat('x', 500)::bytea, n, 0 FROM generate_series(1, 100000) n";
    server().query(backlog).unwrap();
    let statements = super::Statements::new("backlog", 1000, false);
    let [[records, _], [traces, _]] = &statements.gc;
    // Also over the connections of an application, which are set up as it likes.
    for (set_up, find) in [(super::SETUP, records), (super::SETUP, traces), ("SET plan_cache_mode = auto", records)] {
        let plan = format!("{set_up}; PREPARE find AS {}; EXPLAIN EXECUTE find", find.as_str());
        let plan = server().query(&plan).unwrap().concat().join("\n");
        assert!(plan.contains("Index Scan using backlog_expires") && !plan.contains("Sort"), "{plan}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sessions_are_found_by_their_keys_also_by_plans_that_were_made_when_there_was_one() {
    let database = database("young").await;
    database.change(&[write("a", Basis::Unseen, None, wid(), "a", Then::Close)]).await.unwrap();
    server().query("ALTER TABLE young SET (autovacuum_enabled = off); ANALYZE young").unwrap();
    let statements = super::Statements::new("young", 1000, false);
    for (statement, parameters) in [
        (&statements.enter_free, 5),
        (&statements.enter.batch, 10),
        (&statements.change_held, 6),
        (&statements.change.batch, 11),
        (&statements.renew, 5),
        (&statements.remove, 6),
        (&statements.leave, 4),
        (&statements.gc[0][1], 1),
        (&statements.gc[1][1], 1),
    ] {
        let (statement, nothing) = (statement.as_str(), vec!["NULL"; parameters].join(", "));
        let plan = format!("{}; PREPARE s AS {statement}; EXPLAIN EXECUTE s ({nothing})", super::SETUP);
        let plan = server().query(&plan).unwrap().concat();
        let scans = plan.windows(2).filter(|lines| lines[0].contains(" on young"));
        let whole: Vec<_> =
            scans.filter(|lines| lines[0].contains("Scan") && !lines[1].contains("Index Cond: (id = ")).collect();
        assert!(whole.is_empty() && plan.iter().any(|line| line.contains("Index Cond")), "{}", plan.join("\n"));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_found_to_be_over_and_lives_again_is_spared_by_the_next_call() {
    let database = database("again").await;
    for key in ["a", "b", "c"] {
        database.change(&[write(key, Basis::Unseen, None, wid(), key, Then::Close)]).await.unwrap();
    }
    server().query("UPDATE again SET expires_at = 1, expires_minute = 0").unwrap();
    assert_eq!(database.gc(1).await.unwrap(), 1, "all three were found, and one has gone");
    // One is prolonged, and one is held by somebody, each without a word to whoever collects.
    let left = |sql: &str| server().query(sql).unwrap().concat();
    server()
        .query(
            "UPDATE again SET expires_at = 9e15::int8, expires_minute = 15e10::int8 WHERE id = (SELECT min(id) FROM again)",
        )
        .unwrap();
    server().query("UPDATE again SET lock_until = 9e15::int8 WHERE id = (SELECT max(id) FROM again)").unwrap();
    assert_eq!(database.gc(100).await.unwrap(), 0);
    assert_eq!(left("SELECT count(*) FROM again"), ["2"]);
    server().query("UPDATE again SET expires_at = 1, expires_minute = 0, lock_until = NULL").unwrap();
    assert_eq!(database.gc(100).await.unwrap(), 2);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_process_is_shown_from_the_first_lock_on_and_again_by_a_renewal() {
    let database = database("shown").await;
    // It waits for a moment at most, and a busy machine may take longer to connect.
    for _ in 0..20 {
        database.show_life().await;
    }
    database.change(&[write("k", Basis::Unseen, None, wid(), "old", Then::Close)]).await.unwrap();
    let holder = token();
    database.enter(&[enter("k", holder, Want::Existing)]).await.unwrap();
    let shown = || server().query("SELECT count(*) FROM shown WHERE lock_process IS NOT NULL").unwrap() == [["1"]];
    assert!(shown());
    server().query("UPDATE shown SET lock_process = NULL").unwrap();
    let renewal = Renew { key: "k".into(), token: holder, lease: 60_000, protects: true };
    assert_eq!(database.renew(&[renewal]).await.unwrap(), [Renewed::Renewed]);
    assert!(shown());
}

// Each request is a future of its own on the heap, which is copied there: what only a rare one needs has no place in it.
#[tokio::test]
async fn a_lone_request_carries_no_room_for_what_it_does_not_do() {
    let options = sqlx::postgres::PgConnectOptions::new_without_pgpass();
    let pool = sqlx::postgres::PgPoolOptions::new().connect_lazy_with(options.clone());
    let config = SqlConfig::from_dsn(&Dsn::parse("postgres://127.0.0.1/nowhere").unwrap()).unwrap();
    let database = super::Postgres::new(Connections::Shared(pool), options, &config, Owner::new().unwrap());
    let (entry, change) = (enter("key", token(), Want::Existing), write("key", Basis::Unseen, None, wid(), "", Then::Close));
    let (entry, change) = (database.enter(slice::from_ref(&entry)), database.change(slice::from_ref(&change)));
    let sizes = [size_of_val(&*entry), size_of_val(&*change)];
    assert!(sizes.iter().all(|size| *size < 2048), "{sizes:?}");
}

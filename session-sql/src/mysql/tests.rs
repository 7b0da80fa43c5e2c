//! Batches: each member has the outcome that it would have alone, and none waits for another.

use std::sync::OnceLock;
use std::time::{Duration, Instant};

use conformance_tests::servers::MariaDb;
use session_core::{Dsn, LeaseToken};

use super::*;

/// Longer than any of these tests takes.
const LEASE: i64 = 600_000;

fn server() -> &'static MariaDb {
    static SERVER: OnceLock<MariaDb> = OnceLock::new();
    SERVER.get_or_init(|| MariaDb::start(&[]).expect("mariadbd starts; Debian has it in the package mariadb-server-core"))
}

async fn database(table: &str, change: impl FnOnce(SqlConfig) -> SqlConfig) -> Arc<dyn Database> {
    let config = SqlConfig::from_dsn(&Dsn::parse(&server().url()).unwrap()).unwrap().with_table(table);
    let config = change(config.with_timeout(Duration::from_secs(20)).with_connect_timeout(Duration::from_secs(20)));
    let crate::config::SqlServer::MySql(address) = &config.server else { panic!("it is a server of this kind") };
    let database = connect(address, &config, Owner::new().unwrap()).await.unwrap();
    database.create_table().await.unwrap();
    database.check().await.unwrap();
    database
}

fn token() -> LeaseToken {
    LeaseToken::random().unwrap()
}

fn write(key: &str, basis: Basis, token: Option<LeaseToken>, exclusive: bool, then: Then) -> Alter {
    let id = WriteId::random().unwrap();
    let data = format!("written by {key}").into_bytes().into();
    let action = Action::Write { id, data, ttl: Ttl::from_secs(900) };
    Alter { key: key.into(), basis, token, lease: exclusive.then_some(LEASE), action, then }
}

fn name(change: &Alter) -> WriteId {
    let Action::Write { id, .. } = change.action else { panic!("it writes") };
    id
}

fn enter(key: &str) -> Enter {
    Enter { key: key.into(), token: token(), lease: LEASE, want: Want::Existing, book: 0, waited: 0, probe: false }
}

/// Makes a record and returns its last write.
async fn record(database: &dyn Database, key: &str) -> WriteId {
    let create = write(key, Basis::Unseen, None, true, Then::Close);
    assert_eq!(database.change(std::slice::from_ref(&create)).await.unwrap(), [Some(Verdict::Applied)]);
    name(&create)
}

/// What an opener is told, without what differs from one to the next.
fn shape(entered: &Entered) -> String {
    match entered {
        Entered::Absent => "absent".into(),
        Entered::Granted { found: Found::Live { record, .. }, clean } => {
            format!("granted {} {clean}", String::from_utf8_lossy(&record.data))
        }
        Entered::Granted { found, clean } => format!("granted {found:?} {clean}"),
        Entered::Busy(busy) => format!("busy {} {}", busy.holder.is_some(), busy.left > Duration::from_secs(60)),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn opens_of_a_batch_end_as_they_would_alone() {
    let database = database("opens", |config| config).await;
    let mut shapes = Vec::new();
    for round in ["a", "b"] {
        let key = |name: &str| format!("{round}-{name}");
        for name in ["free", "free-too", "held", "ended", "wanted", "wanted-free", "handed", "buried"] {
            record(&*database, &key(name)).await;
        }
        let mine = token();
        database.enter(&[Enter { token: mine, ..enter(&key("held")) }]).await.unwrap();
        database.enter(&[Enter { lease: 1, ..enter(&key("ended")) }]).await.unwrap();
        // Given up by its holder, for somebody who has not come for it.
        let (holder, next) = (token(), token());
        database.enter(&[Enter { token: holder, ..enter(&key("handed")) }]).await.unwrap();
        database.enter(&[Enter { token: next, book: LEASE, ..enter(&key("handed")) }]).await.unwrap();
        database.leave(&key("handed"), holder, true).await.unwrap();
        // Ended, with somebody next in line.
        database.enter(&[Enter { lease: 1, ..enter(&key("wanted")) }]).await.unwrap();
        for name in ["wanted", "wanted-free"] {
            server()
                .query(&format!(
                    "UPDATE sessionkit.opens SET want_token=x'00112233445566778899aabbccddeeff',want_until=1<<60 WHERE id='{}'",
                    key(name)
                ))
                .unwrap();
        }
        let removal = Remove {
            key: key("buried"),
            token: None,
            lease: 0,
            mark: WriteId::random().unwrap(),
            trace: false,
            then: Then::Close,
        };
        assert!(database.remove(&removal).await.unwrap().is_some());
        tokio::time::sleep(Duration::from_millis(20)).await;

        let mut entries: Vec<_> =
            ["free", "held", "ended", "wanted", "handed", "buried", "never", "wanted-free", "free-too"]
                .map(|name| enter(&key(name)))
                .into();
        entries.push(Enter { token: mine, ..enter(&key("held")) });
        entries.remove(1);
        entries.push(Enter { want: Want::Any, ..enter(&key("stub")) });
        let outcomes = if round == "a" {
            database.enter(&entries).await.unwrap()
        } else {
            let mut outcomes = Vec::new();
            for entry in &entries {
                outcomes.append(&mut database.enter(std::slice::from_ref(entry)).await.unwrap());
            }
            outcomes
        };
        let told =
            |entered: &Option<Entered>| entered.as_ref().map_or("skipped".into(), shape).replace(&format!("{round}-"), "");
        shapes.push(outcomes.iter().map(told).collect::<Vec<_>>());
    }
    // The fourth, whose lock is free for somebody else, may be left to be asked for again.
    let [mut joined, alone] = <[Vec<String>; 2]>::try_from(shapes).unwrap();
    if joined[2] == "skipped" {
        joined[2].clone_from(&alone[2]);
    }
    assert_eq!(joined, alone);
    assert_eq!(alone[0], "granted written by free false");
}

#[tokio::test(flavor = "multi_thread")]
async fn saves_of_a_batch_end_as_they_would_alone() {
    let database = database("saves", |config| config).await;
    let mut all = Vec::new();
    let mut expected = Vec::new();
    let mut add = |change: Alter, verdict| {
        all.push(change);
        expected.push(verdict);
    };
    // A lock of its own, given back and kept.
    for (key, then) in [("own-close", Then::Close), ("own-keep", Then::Keep)] {
        let last = record(&*database, key).await;
        let entry = enter(key);
        database.enter(std::slice::from_ref(&entry)).await.unwrap();
        add(write(key, Basis::Written(last), Some(entry.token), true, then), Some(Verdict::Applied));
    }
    // Under somebody else's lock, and after somebody else's write.
    let last = record(&*database, "foreign").await;
    database.enter(&[enter("foreign")]).await.unwrap();
    add(write("foreign", Basis::Written(last), Some(token()), true, Then::Close), None);
    record(&*database, "other-write").await;
    let entry = enter("other-write");
    database.enter(std::slice::from_ref(&entry)).await.unwrap();
    let other = WriteId::random().unwrap();
    add(write("other-write", Basis::Written(other), Some(entry.token), true, Then::Close), None);
    let last = record(&*database, "expired").await;
    let entry = enter("expired");
    database.enter(std::slice::from_ref(&entry)).await.unwrap();
    server().query("UPDATE sessionkit.saves SET expires_at=60000,expires_minute=1 WHERE id='expired'").unwrap();
    add(write("expired", Basis::Written(last), Some(entry.token), true, Then::Close), None);
    let last = record(&*database, "optimistic-held").await;
    database.enter(&[enter("optimistic-held")]).await.unwrap();
    add(write("optimistic-held", Basis::Written(last), None, false, Then::Close), None);
    record(&*database, "overtaken").await;
    add(write("overtaken", Basis::Written(WriteId::random().unwrap()), Some(token()), true, Then::Close), None);
    // What was applied before, and is now as the repeat of itself.
    let again = write("again", Basis::Unseen, None, true, Then::Close);
    database.change(std::slice::from_ref(&again)).await.unwrap();
    add(again.clone(), None);
    let last = record(&*database, "kept-again").await;
    let entry = enter("kept-again");
    database.enter(std::slice::from_ref(&entry)).await.unwrap();
    let kept = write("kept-again", Basis::Written(last), Some(entry.token), true, Then::Keep);
    assert_eq!(database.change(std::slice::from_ref(&kept)).await.unwrap(), [Some(Verdict::Applied)]);
    add(Alter { then: Then::Close, ..kept }, None);
    // The same of one that stays locked: the repeat of the write that it is based on.
    let last = record(&*database, "same").await;
    let entry = enter("same");
    database.enter(std::slice::from_ref(&entry)).await.unwrap();
    let mut same = write("same", Basis::Written(last), Some(entry.token), true, Then::Close);
    if let Action::Write { id, .. } = &mut same.action {
        *id = last;
    }
    add(same, None);
    // Optimistic ones, fresh ids, and one that is not fresh.
    let last = record(&*database, "optimistic").await;
    add(write("optimistic", Basis::Written(last), None, false, Then::Close), Some(Verdict::Applied));
    add(write("fresh", Basis::Unseen, None, true, Then::Close), Some(Verdict::Applied));
    let taken = token();
    add(write("fresh-taken", Basis::Unseen, Some(taken), true, Then::Keep), Some(Verdict::Applied));
    record(&*database, "not-fresh").await;
    add(write("not-fresh", Basis::Unseen, None, true, Then::Close), None);
    add(write("gone", Basis::Written(WriteId::random().unwrap()), Some(token()), true, Then::Close), None);
    // One that does not travel with the others.
    let last = record(&*database, "touched").await;
    let ttl = Ttl::from_secs(1);
    let action = Action::Touch { ttl };
    add(Alter { action, ..write("touched", Basis::Written(last), None, false, Then::Close) }, Some(Verdict::Applied));

    assert_eq!(database.change(&all).await.unwrap(), expected);
    // Whoever got no answer is told alone what became of his.
    let mut alone = Vec::new();
    for (change, _) in all.iter().zip(&expected).filter(|(_, verdict)| verdict.is_none()) {
        alone.append(&mut database.change(std::slice::from_ref(change)).await.unwrap());
    }
    use Verdict::{AlreadyApplied, Gone, Refused};
    assert_eq!(
        alone,
        [Refused, Refused, Gone, Refused, Refused, AlreadyApplied, AlreadyApplied, AlreadyApplied, Refused, Gone].map(Some)
    );
    for change in &all {
        let found = database.look(&change.key).await.unwrap();
        match (&change.action, &found) {
            (Action::Write { id, .. }, Found::Live { last, .. }) if last == id => {}
            (_, Found::Live { record, .. }) => assert_eq!(record.data, format!("written by {}", change.key).as_bytes()),
            (_, Found::Absent) => assert_eq!(change.key, "gone"),
            (_, Found::Buried { .. }) => assert_eq!(change.key, "expired"),
        }
    }
    let locks = database.locks("", 100).await.unwrap();
    let held: Vec<_> = locks.iter().map(|lock| &*lock.key).collect();
    assert_eq!(held, ["foreign", "fresh-taken", "optimistic-held", "other-write", "own-keep"]);
    database.leave("fresh-taken", taken, true).await.unwrap();
    assert_eq!(database.locks("fresh", 100).await.unwrap().len(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_save_in_a_batch_hands_its_lock_to_the_next_in_line() {
    let database = database("handing", |config| config).await;
    let (last, other) = (record(&*database, "one").await, record(&*database, "two").await);
    let (first, next) = (enter("one"), Enter { book: LEASE, ..enter("one") });
    database.enter(std::slice::from_ref(&first)).await.unwrap();
    let outcome = database.enter(std::slice::from_ref(&next)).await.unwrap();
    assert!(matches!(&outcome[..], [Some(Entered::Busy(busy))] if busy.booked), "{outcome:?}");
    let second = enter("two");
    database.enter(std::slice::from_ref(&second)).await.unwrap();
    let saves = [
        write("one", Basis::Written(last), Some(first.token), true, Then::Close),
        write("two", Basis::Written(other), Some(second.token), true, Then::Close),
    ];
    assert_eq!(database.change(&saves).await.unwrap(), [Some(Verdict::Applied); 2]);
    let late = database.enter(&[enter("one"), enter("two")]).await.unwrap();
    assert!(matches!(&late[..], [Some(Entered::Busy(_)), Some(Entered::Granted { .. })]), "{late:?}");
    let outcome = database.enter(std::slice::from_ref(&next)).await.unwrap();
    assert!(matches!(&outcome[..], [Some(Entered::Granted { clean: true, .. })]), "{outcome:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn each_save_of_a_batch_has_its_own_record_base_and_length_of_life() {
    let database = database("lives", |config| config).await;
    for lives in [[900; 5], [100, 200, 300, 400, 500]] {
        let mut saves = Vec::new();
        for (at, life) in lives.into_iter().enumerate() {
            let key = format!("{life}-{at}");
            let (last, entry) = (record(&*database, &key).await, enter(&key));
            database.enter(std::slice::from_ref(&entry)).await.unwrap();
            let mut save = write(&key, Basis::Written(last), Some(entry.token), true, Then::Close);
            let Action::Write { ttl, .. } = &mut save.action else { panic!("it writes") };
            *ttl = Ttl::from_secs(life);
            saves.push(save);
        }
        // The first two go on from each other's base, and the last has no lock.
        let [one, two] = [0, 1].map(|at: usize| saves[at].basis);
        (saves[0].basis, saves[1].basis) = (two, one);
        saves[4].token = Some(token());
        let verdicts = database.change(&saves).await.unwrap();
        for (at, (save, verdict)) in saves.iter().zip(verdicts).enumerate() {
            let Found::Live { last, record } = database.look(&save.key).await.unwrap() else { panic!("{at} is there") };
            if [0, 1, 4].contains(&at) {
                assert_eq!((verdict, last == name(save)), (None, false), "{at} is asked for again, alone");
                assert_eq!(database.change(std::slice::from_ref(save)).await.unwrap(), [Some(Verdict::Refused)], "{at}");
                continue;
            }
            assert_eq!((verdict, last), (Some(Verdict::Applied), name(save)), "{at}");
            assert_eq!(record.data, format!("written by {}", save.key).as_bytes());
            let left = record.ttl.as_duration().as_secs();
            assert!((lives[at] - 60..=lives[at]).contains(&left), "{at} lives for {left} of {} s", lives[at]);
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_place_next_in_line_is_of_who_has_waited_longest() {
    let [ours, theirs] = [database("seniority", |config| config).await, database("seniority", |config| config).await];
    record(&*ours, "k").await;
    let [holder, early, late, heir] = std::array::from_fn(|_| enter("k"));
    ours.enter(std::slice::from_ref(&holder)).await.unwrap();
    let next = async |database: &Arc<dyn Database>, entry: &Enter, waited| {
        let told = database.enter(&[Enter { book: LEASE, waited, ..entry.clone() }]).await.unwrap();
        matches!(&told[..], [Some(Entered::Busy(busy))] if busy.booked)
    };
    assert!(next(&ours, &late, 0).await, "nobody else has asked yet");
    assert!(next(&theirs, &early, 60_000).await, "he came before");
    assert!(!next(&ours, &late, 30_000).await, "he asks again, and has not come earlier for that");
    assert!(next(&theirs, &early, 60_001).await);
    // One task of a process asks for it, until it has not asked for a while.
    tokio::time::sleep(Duration::from_millis(30)).await;
    assert!(next(&theirs, &heir, 0).await, "the tasks of a process share its place");
    assert!(!next(&ours, &late, 1).await, "clocks that are read twice decide nothing");
    assert!(ours.leave("k", holder.token, true).await.unwrap());
    let outcome = theirs.enter(std::slice::from_ref(&heir)).await.unwrap();
    assert!(matches!(&outcome[..], [Some(Entered::Granted { .. })]), "{outcome:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn whoever_leaves_is_told_whether_there_was_anything_to_leave() {
    let database = database("leaving", |config| config).await;
    record(&*database, "k").await;
    record(&*database, "other").await;
    let (holder, next, nobody) = (enter("k"), Enter { book: LEASE, ..enter("k") }, enter("k"));
    database.enter(std::slice::from_ref(&holder)).await.unwrap();
    database.enter(std::slice::from_ref(&next)).await.unwrap();
    for (key, token, left) in [
        ("k", nobody.token, false),
        ("other", holder.token, false),
        ("absent", holder.token, false),
        ("k", next.token, true),
        ("k", next.token, false),
        ("k", holder.token, true),
        ("k", holder.token, false),
    ] {
        assert_eq!(database.leave(key, token, true).await.unwrap(), left, "{key}");
    }
    let outcome = database.enter(std::slice::from_ref(&nobody)).await.unwrap();
    assert!(matches!(&outcome[..], [Some(Entered::Granted { .. })]), "{outcome:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_locked_row_delays_only_itself() {
    let database = database("locked", |config| config).await;
    let mut saves = Vec::new();
    for number in 0..20 {
        let key = format!("row-{number:02}");
        let last = record(&*database, &key).await;
        saves.push(write(&key, Basis::Written(last), None, false, Then::Close));
    }
    let entries: Vec<_> = (0..20).map(|number| enter(&format!("row-{number:02}"))).collect();
    let mut somebody = server().connect().unwrap();
    somebody.query("START TRANSACTION; SELECT id FROM sessionkit.locked WHERE id='row-07' FOR UPDATE").unwrap();
    let began = Instant::now();
    let judged = database.change(&saves).await.unwrap();
    let entered = database.enter(&entries).await.unwrap();
    assert!(began.elapsed() < Duration::from_secs(15), "{:?}", began.elapsed());
    for (number, (judged, entered)) in judged.iter().zip(&entered).enumerate() {
        if number == 7 {
            assert!(judged.is_none() && entered.is_none(), "{judged:?} {entered:?}");
        } else {
            assert_eq!(*judged, Some(Verdict::Applied), "{number}");
            assert!(matches!(entered, Some(Entered::Granted { .. })), "{number}: {entered:?}");
        }
    }
    assert_eq!(database.gc(100).await.unwrap(), 0);
    somebody.query("COMMIT").unwrap();
    assert!(matches!(&database.enter(&entries[7..8]).await.unwrap()[..], [Some(Entered::Granted { .. })]));
}

#[tokio::test(flavor = "multi_thread")]
async fn gc_passes_by_a_row_that_somebody_has_locked() {
    let database = database("collected", |config| config).await;
    for key in ["old-1", "old-2", "old-3"] {
        record(&*database, key).await;
    }
    record(&*database, "young").await;
    server().query("UPDATE sessionkit.collected SET expires_at=1,expires_minute=0 WHERE id LIKE 'old%'").unwrap();
    let mut somebody = server().connect().unwrap();
    somebody.query("START TRANSACTION; SELECT id FROM sessionkit.collected WHERE id='old-2' FOR UPDATE").unwrap();
    assert_eq!(database.gc(1).await.unwrap(), 1);
    assert_eq!(database.gc(100).await.unwrap(), 1);
    assert_eq!(database.gc(100).await.unwrap(), 0);
    somebody.query("COMMIT").unwrap();
    assert_eq!(database.gc(100).await.unwrap(), 1);
    assert_eq!(server().query("SELECT id FROM sessionkit.collected").unwrap(), [["young"]]);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_found_to_be_over_and_lives_again_is_spared_by_the_next_call() {
    for (table, skips) in [("again", true), ("again_unskipped", false)] {
        let maker = database(table, |config| config).await;
        // One that was never checked takes the server for one that cannot pass by what is locked.
        let limit = Duration::from_secs(20);
        let config = SqlConfig::from_dsn(&Dsn::parse(&server().url()).unwrap()).unwrap().with_table(table);
        let link = Link::own(server().url().parse().unwrap(), 2, limit, limit);
        let unchecked: Arc<dyn Database> = Arc::new(MySql::new(link, &config, Owner::new().unwrap()));
        let database = if skips { maker } else { unchecked };
        let table = format!("sessionkit.{table}");
        for key in ["a", "b", "c"] {
            record(&*database, key).await;
        }
        let set = |what: &str| server().query(&format!("UPDATE {table} SET {what}")).unwrap();
        set("expires_at=1,expires_minute=0");
        assert_eq!(database.gc(1).await.unwrap(), 1, "all three were found, and one has gone");
        // One is prolonged, and one is held by somebody, each without a word to whoever collects.
        set("expires_at=9e15,expires_minute=15e10 ORDER BY id LIMIT 1");
        set("lock_token='0123456789abcdef',lock_until=9e15 ORDER BY id DESC LIMIT 1");
        assert_eq!(database.gc(100).await.unwrap(), 0);
        assert_eq!(server().query(&format!("SELECT COUNT(*) FROM {table}")).unwrap(), [["2"]]);
        set("expires_at=1,expires_minute=0,lock_token=NULL,lock_until=NULL");
        assert_eq!(database.gc(100).await.unwrap(), 2);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn batches_that_meet_lose_nothing() {
    let database = database("meeting", |config| config).await;
    let mut lasts = Vec::new();
    for number in 0..16 {
        lasts.push(record(&*database, &format!("row-{number:02}")).await);
    }
    // Each round several writers, in opposite orders, have a save for every row; one of them gets it.
    for _ in 0..20 {
        let mut tasks = tokio::task::JoinSet::new();
        for writer in 0..4 {
            let mut saves: Vec<_> = (lasts.iter().enumerate())
                .map(|(n, last)| write(&format!("row-{n:02}"), Basis::Written(*last), None, false, Then::Close))
                .collect();
            if writer % 2 == 1 {
                saves.reverse();
            }
            let database = database.clone();
            tasks.spawn(async move {
                let judged = database.change(&saves).await.unwrap();
                saves
                    .iter()
                    .zip(judged)
                    .filter(|(_, judged)| *judged == Some(Verdict::Applied))
                    .map(|(s, _)| s.clone())
                    .collect::<Vec<_>>()
            });
        }
        let mut applied = HashMap::new();
        while let Some(won) = tasks.join_next().await {
            for save in won.unwrap() {
                assert_eq!(applied.insert(save.key.clone(), name(&save)), None, "two were applied over one state");
            }
        }
        for (number, last) in lasts.iter_mut().enumerate() {
            let key = format!("row-{number:02}");
            let Found::Live { last: there, .. } = database.look(&key).await.unwrap() else { panic!("{key} is gone") };
            assert_eq!(applied.get(&key).copied().unwrap_or(*last), there, "what was said of {key} is what is there");
            *last = there;
        }
    }
}

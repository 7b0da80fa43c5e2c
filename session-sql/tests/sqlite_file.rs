//! What can happen to a file that is a database, and to the processes that share it.
#![cfg(feature = "sqlite")]
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::error::Error as _;
use std::fs::{self, File};
use std::io::{BufRead, BufReader, Write};
use std::num::NonZeroU32;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};
use rusqlite::Connection;
use session_core::{
    Dsn, Error, ErrorKind, Expect, OpenRequest, OpenSession, Record, Result, SessionHandler, SessionId, Ttl, WriteId,
    Written,
};
use session_sql::{Durability, SqlConfig, SqlHandler, SqlServer};
use tempfile::TempDir;

const LEASE: Duration = Duration::from_secs(10);
const LONG: Duration = Duration::from_secs(3600);

fn config(path: impl Into<PathBuf>) -> SqlConfig {
    SqlConfig::new(SqlServer::Sqlite(path.into())).with_create(true)
}

async fn connect(path: impl Into<PathBuf>) -> SqlHandler {
    SqlHandler::connect(config(path)).await.unwrap()
}

/// Tries to connect to what is no database of sessions, and returns what is said about it.
async fn refusal(config: SqlConfig) -> String {
    let error = SqlHandler::connect(config).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Config, "{error:?}");
    error.to_string()
}

fn id() -> SessionId {
    SessionId::generate().unwrap()
}

fn exclusive() -> OpenRequest {
    OpenRequest::exclusive(Duration::from_secs(5), LEASE)
}

fn record(data: &[u8]) -> Record {
    Record::new(data, Ttl::new(LONG))
}

async fn write(opened: &mut Box<dyn OpenSession>, data: &[u8]) -> Result<Written> {
    opened.write(&record(data), WriteId::random().unwrap()).await
}

async fn create(handler: &SqlHandler, id: &SessionId, data: &[u8]) {
    let mut opened = handler.open(id, &exclusive().expecting(Expect::Any)).await.unwrap();
    assert_eq!(write(&mut opened, data).await.unwrap(), Written::Applied);
    opened.close().await.unwrap();
}

async fn view(handler: &SqlHandler, id: &SessionId) -> Result<Option<Vec<u8>>> {
    let mut opened = handler.open(id, &OpenRequest::read_only()).await?;
    Ok(opened.read().await?.map(|record| record.data))
}

/// Adds one to the number in a session, under its lock.
async fn count_up(handler: &SqlHandler, id: &SessionId) -> Result<u64> {
    let mut opened = handler.open(id, &exclusive().expecting(Expect::Any)).await?;
    let number = opened.read().await?.map_or(0, |record| number(&record.data)) + 1;
    write(&mut opened, &numbered(number)).await?;
    opened.close().await?;
    Ok(number)
}

/// A payload that shows if a part of it is of another one.
fn numbered(number: u64) -> Vec<u8> {
    number.to_le_bytes().repeat(64 + number as usize % 400)
}

fn number(data: &[u8]) -> u64 {
    let number = u64::from_le_bytes(data[..8].try_into().unwrap());
    assert!(data == numbered(number), "the payload of number {number} is torn");
    number
}

/// Everything that an error shows of itself and of its causes.
fn keeps_secret(error: &Error, id: &SessionId) {
    let mut text = format!("{error} {error:?}");
    let mut cause = error.source();
    while let Some(error) = cause {
        text.push_str(&format!(" {error} {error:?}"));
        cause = error.source();
    }
    assert!(!text.contains(&id.as_str()[1..]), "an id is shown in {} characters of text", text.len());
}

/// A small file system in memory, which only the thread sees that made it, and those that it starts from then on.
struct SmallDisk {
    place: TempDir,
}

impl SmallDisk {
    fn new(options: &str) -> Self {
        let place = TempDir::new().unwrap();
        unshare(CloneFlags::CLONE_NEWNS).expect("these tests mount file systems: run them as root");
        let none: Option<&str> = None;
        mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none).expect("mounts can be kept private");
        mount(Some("tmpfs"), place.path(), Some("tmpfs"), MsFlags::empty(), Some(options))
            .expect("these tests mount file systems: run them as root, where mounting is allowed");
        Self { place }
    }

    fn database(&self) -> PathBuf {
        self.place.path().join("sessions.db")
    }

    fn make_read_only(&self) {
        let none: Option<&str> = None;
        let flags = MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY;
        // The threads of a handler that was dropped close the file in their own time.
        while let Err(error) = mount(none, self.place.path(), none, flags, none) {
            assert_eq!(error, nix::errno::Errno::EBUSY);
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    fn fill(&self) {
        let mut ballast = File::create(self.place.path().join("ballast")).unwrap();
        while ballast.write_all(&[0x55; 4096]).is_ok() {}
    }

    fn empty(&self) {
        // A child that another test starts at this moment keeps the room of what is only removed.
        File::create(self.place.path().join("ballast")).unwrap();
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = umount2(self.place.path(), MntFlags::MNT_DETACH);
    }
}

const CHILD: &str = "SESSION_SQLITE_CHILD";

/// Starts this executable again for one of its tests, which then finds the file in its environment.
fn child_of(test: &str, database: &Path) -> Child {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args([test, "--exact", "--nocapture", "--test-threads=1"]).env(CHILD, database);
    command.stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap()
}

fn child_place() -> Option<PathBuf> {
    std::env::var_os(CHILD).map(PathBuf::from)
}

/// The numbers that a child has printed, one in a line, until it was killed.
fn printed(child: &mut Child) -> impl Iterator<Item = u64> + use<> {
    let lines = BufReader::new(child.stdout.take().unwrap()).lines();
    lines.map_while(std::io::Result::ok).filter_map(|line| line.strip_prefix("did ")?.parse().ok())
}

fn did(number: u64) {
    // In a line of its own, whatever the harness of the tests has begun to say.
    println!("\ndid {number}");
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap()
}

/// Counts the transactions in the log of a database that has not been carried over into the file yet.
fn commits(database: &Path) -> usize {
    let mut log = database.as_os_str().to_owned();
    log.push("-wal");
    let log = fs::read(log).unwrap();
    let frames = log[32..].chunks_exact(24 + 4096);
    // A frame that ends a transaction says how many pages the file then has.
    frames.filter(|frame| frame[8..16] == log[16..24] && frame[4..8] != [0; 4]).count()
}

#[tokio::test]
async fn a_database_is_made_only_where_that_is_asked_for_and_for_its_owner_alone() {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("sessions.db");
    assert!(refusal(config(&path).with_create(false)).await.contains("create=on"));
    assert!(!path.exists());
    let handler = connect(&path).await;
    create(&handler, &id(), b"data").await;
    let files: Vec<_> = fs::read_dir(dir.path()).unwrap().map(|file| file.unwrap()).collect();
    assert!(files.len() >= 3, "a database, its log, and what belongs to it");
    for file in files {
        let mode = file.metadata().unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600, "{}", file.path().display());
    }
}

#[tokio::test]
async fn what_cannot_be_a_database_of_sessions_is_refused_with_the_cure_and_left_alone() {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("file");
    fs::write(&path, "this is a letter and not a database\n".repeat(100)).unwrap();
    let before = fs::read(&path).unwrap();
    assert!(refusal(config(&path)).await.contains("not a SQLite database"));
    assert_eq!(fs::read(&path).unwrap(), before);
    assert!(refusal(config(dir.path())).await.contains("not a file"));
    assert!(refusal(config(path.join("below a file"))).await.contains("no directory"));
    assert!(refusal(config(dir.path().join("no/directory"))).await.contains("directory"));
    assert!(refusal(config("relative.db")).await.contains("slash"));
    assert!(refusal(config(":memory:")).await.contains("slash"));
    assert!(refusal(config(dir.path().join("new.db")).with_table("other.sessions")).await.contains("schema"));
    let dsn = Dsn::parse("sqlite://relative.db").unwrap();
    assert!(SqlConfig::from_dsn(&dsn).unwrap_err().to_string().contains("three slashes"));
}

#[tokio::test]
async fn a_disk_that_cannot_be_written_is_refused_with_the_cure() {
    let disk = SmallDisk::new("size=4m");
    drop(connect(disk.database()).await);
    disk.make_read_only();
    assert!(refusal(config(disk.database())).await.contains("right to write"));
    assert!(refusal(config(disk.database().with_file_name("new.db"))).await.contains("right to write"));
}

#[tokio::test]
async fn a_table_that_is_somebody_elses_is_refused_and_left_alone() {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("application.db");
    let application = Connection::open(&path).unwrap();
    let theirs = "CREATE TABLE sessions (id INTEGER PRIMARY KEY, title TEXT); INSERT INTO sessions VALUES (1, 'opening');
        CREATE VIEW seen AS SELECT * FROM sessions; PRAGMA user_version = 7;";
    application.execute_batch(theirs).unwrap();
    let schema = |connection: &Connection| -> Vec<String> {
        let mut schema = connection.prepare("SELECT sql FROM sqlite_schema ORDER BY name").unwrap();
        schema.query_map([], |row| row.get(0)).unwrap().map(|sql| sql.unwrap()).collect()
    };
    let before = schema(&application);
    for table in ["sessions", "Sessions", "seen"] {
        for create in [true, false] {
            let said = refusal(config(&path).with_table(table).with_create(create)).await;
            assert!(said.contains("table="), "{table}: {said}");
        }
    }
    assert!(refusal(config(&path).with_table("ours").with_create(false)).await.contains("create=on"));
    assert_eq!(schema(&application), before);
    let handler = SqlHandler::connect(config(&path).with_table("main.ours")).await.unwrap();
    let id = id();
    create(&handler, &id, b"ours").await;
    assert_eq!(view(&handler, &id).await.unwrap().unwrap(), b"ours");
    let title: String = application.query_row("SELECT title FROM sessions", [], |row| row.get(0)).unwrap();
    let version: i64 = application.query_row("PRAGMA user_version", [], |row| row.get(0)).unwrap();
    assert_eq!((title.as_str(), version), ("opening", 7));
}

#[tokio::test]
async fn a_row_that_nobody_of_ours_wrote_is_corrupt_and_left_alone() {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("sessions.db");
    let handler = connect(&path).await;
    let [id, other] = [id(), id()];
    for id in [&id, &other] {
        create(&handler, id, b"data").await;
    }
    let program = Connection::open(&path).unwrap();
    let short = "UPDATE sessions SET write_id = x'0102', lock_token = x'03' WHERE id = ?1";
    assert_eq!(program.execute(short, [id.as_str()]).unwrap(), 1);
    for request in [exclusive(), OpenRequest::read_only()] {
        let error = handler.open(&id, &request).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Corrupt, "{error:?}");
        keeps_secret(&error, &id);
    }
    let left: (Vec<u8>, Vec<u8>) = program
        .query_row("SELECT write_id, data FROM sessions WHERE id = ?1", [id.as_str()], |row| Ok((row.get(0)?, row.get(1)?)))
        .unwrap();
    assert_eq!(left, (vec![1, 2], b"data".to_vec()));
    assert_eq!(view(&handler, &other).await.unwrap().unwrap(), b"data");
}

#[tokio::test]
async fn while_another_program_writes_for_long_reading_goes_on_and_saves_may_be_repeated() {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("sessions.db");
    let handler = SqlHandler::connect(config(&path).with_timeout(Duration::from_millis(200))).await.unwrap();
    let id = id();
    create(&handler, &id, b"before").await;
    let mut opened = handler.open(&id, &exclusive()).await.unwrap();
    let program = Connection::open(&path).unwrap();
    program.execute_batch("BEGIN IMMEDIATE").unwrap();
    let name = WriteId::random().unwrap();
    for _ in 0..2 {
        let error = opened.write(&record(b"after"), name).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Unavailable, "{error:?}");
        assert!(error.to_string().contains("locked by another program"), "{error}");
        keeps_secret(&error, &id);
        assert_eq!(view(&handler, &id).await.unwrap().unwrap(), b"before");
    }
    program.execute_batch("ROLLBACK").unwrap();
    assert_eq!(opened.write(&record(b"after"), name).await.unwrap(), Written::Applied);
    opened.close().await.unwrap();
    assert_eq!(view(&handler, &id).await.unwrap().unwrap(), b"after");
}

#[tokio::test]
async fn a_full_disk_refuses_a_save_and_keeps_what_was_there() {
    let disk = SmallDisk::new("size=4m");
    let handler = connect(disk.database()).await;
    let id = id();
    create(&handler, &id, b"before").await;
    let mut opened = handler.open(&id, &exclusive()).await.unwrap();
    disk.fill();
    let (large, name) = (vec![7; 500_000], WriteId::random().unwrap());
    for _ in 0..3 {
        let error = opened.write(&record(&large), name).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Unavailable, "{error:?}");
        assert!(error.to_string().contains("full"), "{error}");
        keeps_secret(&error, &id);
        assert_eq!(view(&handler, &id).await.unwrap().unwrap(), b"before");
    }
    disk.empty();
    assert_eq!(opened.write(&record(&large), name).await.unwrap(), Written::Applied);
    opened.close().await.unwrap();
    assert_eq!(view(&handler, &id).await.unwrap().unwrap(), large);
    let whole: String =
        Connection::open(disk.database()).unwrap().query_row("PRAGMA integrity_check", [], |row| row.get(0)).unwrap();
    assert_eq!(whole, "ok");
}

#[tokio::test]
async fn a_database_that_was_taken_away_is_not_written_where_nobody_finds_it() {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("sessions.db");
    let handler = connect(&path).await;
    let id = id();
    create(&handler, &id, b"data").await;
    for file in fs::read_dir(dir.path()).unwrap() {
        fs::rename(file.as_ref().unwrap().path(), file.unwrap().path().with_extension("away")).unwrap();
    }
    let mut opened = handler.open(&SessionId::generate().unwrap(), &exclusive().expecting(Expect::Fresh)).await.unwrap();
    let error = write(&mut opened, b"data").await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unavailable, "{error:?}");
    assert_eq!(view(&handler, &id).await.unwrap_err().kind(), ErrorKind::Unavailable);
    // Another one in its place is found without a restart.
    let other = connect(&path).await;
    create(&other, &id, b"other").await;
    assert_eq!(view(&handler, &id).await.unwrap().unwrap(), b"other");
    assert_eq!(write(&mut opened, b"data").await.unwrap(), Written::Applied);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_waits_at_the_same_moment_shares_a_transaction() {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("sessions.db");
    let handler = Arc::new(connect(&path).await);
    let before = commits(&path);
    let tasks: Vec<_> = (0..64)
        .map(|_| {
            let handler = handler.clone();
            tokio::spawn(async move {
                let id = id();
                for _ in 0..2 {
                    count_up(&handler, &id).await.unwrap();
                }
                assert_eq!(number(&view(&handler, &id).await.unwrap().unwrap()), 2);
            })
        })
        .collect();
    for task in tasks {
        task.await.unwrap();
    }
    // Each of 128 cycles opens, writes and closes.
    let made = commits(&path) - before;
    assert!(made > 0 && made < 128, "{made} transactions for 384 operations");
}

#[tokio::test]
async fn one_save_that_the_database_refuses_is_not_the_failure_of_those_beside_it() {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("sessions.db");
    let handler = Arc::new(connect(&path).await);
    let poisoned = id();
    let program = Connection::open(&path).unwrap();
    let trigger = format!(
        "CREATE TRIGGER poison BEFORE INSERT ON sessions WHEN NEW.id = '{0}' BEGIN SELECT RAISE(ABORT, 'not {0}'); END",
        poisoned.as_str()
    );
    program.execute_batch(&trigger).unwrap();
    program.execute_batch("BEGIN IMMEDIATE").unwrap();
    // All of them wait until the other program has done.
    let tasks: Vec<_> = (0..20)
        .map(|at| if at == 7 { poisoned.clone() } else { id() })
        .map(|id| {
            let handler = handler.clone();
            tokio::spawn(async move {
                let mut opened = handler.open(&id, &exclusive().expecting(Expect::Fresh)).await?;
                write(&mut opened, id.as_str().as_bytes()).await.map(|_| id)
            })
        })
        .collect();
    tokio::time::sleep(Duration::from_millis(50)).await;
    program.execute_batch("ROLLBACK").unwrap();
    let mut refused = 0;
    for task in tasks {
        match task.await.unwrap() {
            Ok(id) => assert_eq!(view(&handler, &id).await.unwrap().unwrap(), id.as_str().as_bytes()),
            Err(error) => {
                keeps_secret(&error, &poisoned);
                refused += 1;
            }
        }
    }
    assert_eq!(refused, 1);
    assert_eq!(view(&handler, &poisoned).await.unwrap(), None);
}

#[tokio::test]
async fn an_open_that_nobody_waits_for_any_more_takes_no_lock() {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("sessions.db");
    let handler = connect(&path).await;
    let id = id();
    create(&handler, &id, b"data").await;
    let program = Connection::open(&path).unwrap();
    program.execute_batch("BEGIN IMMEDIATE").unwrap();
    for _ in 0..20 {
        let open = tokio::time::timeout(Duration::from_millis(1), handler.open(&id, &exclusive())).await;
        assert!(open.is_err(), "the file is locked");
    }
    program.execute_batch("ROLLBACK").unwrap();
    // At once, and not when a lease has ended.
    let mut opened = handler.open(&id, &OpenRequest::exclusive(Duration::from_secs(2), LEASE)).await.unwrap();
    assert_eq!(opened.read().await.unwrap().unwrap().data, b"data");
    opened.close().await.unwrap();
}

#[test]
fn a_handler_serves_several_runtimes_and_leaves_nothing_open_behind() {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("sessions.db");
    let handler = Arc::new(runtime().block_on(connect(&path)));
    let id = id();
    for round in 1..=3 {
        let number = runtime().block_on(count_up(&handler, &id)).unwrap();
        assert_eq!(number, round);
    }
    let other = runtime();
    let held = other.block_on(handler.open(&id, &exclusive())).unwrap();
    drop(handler);
    // No runtime is entered here, and nothing is waited for.
    drop(held);
    drop(other);
    let ours = |link: PathBuf| link.starts_with(dir.path());
    let began = Instant::now();
    while fs::read_dir("/proc/self/fd").unwrap().any(|fd| fd.is_ok_and(|fd| fs::read_link(fd.path()).is_ok_and(ours))) {
        assert!(began.elapsed() < Duration::from_secs(10), "a thread goes on");
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn collecting_a_hundred_thousand_sessions_lets_others_work_meanwhile() {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("sessions.db");
    let handler = Arc::new(SqlHandler::connect(config(&path).with_durability(Durability::None)).await.unwrap());
    let expired = "WITH RECURSIVE n(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM n WHERE n < 100000)
        INSERT INTO sessions (id, data, write_id, expires_at, expires_minute)
        SELECT printf('expired%021d', n), zeroblob(200), randomblob(16), 1000 * n, 1000 * n / 60000 FROM n";
    Connection::open(&path).unwrap().execute_batch(expired).unwrap();
    let (done, cycles) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
    let worker = {
        let (handler, done, cycles) = (handler.clone(), done.clone(), cycles.clone());
        tokio::spawn(async move {
            let id = id();
            while !done.load(Ordering::Relaxed) {
                count_up(&handler, &id).await.unwrap();
                cycles.fetch_add(1, Ordering::Relaxed);
            }
        })
    };
    let before = cycles.load(Ordering::Relaxed);
    assert_eq!(handler.gc(NonZeroU32::new(10).unwrap()).await.unwrap(), 10);
    assert_eq!(handler.gc(NonZeroU32::MAX).await.unwrap(), 99_990);
    let during = cycles.load(Ordering::Relaxed) - before;
    done.store(true, Ordering::Relaxed);
    worker.await.unwrap();
    assert!(during >= 20, "{during} cycles were done meanwhile");
    assert_eq!(handler.gc(NonZeroU32::MAX).await.unwrap(), 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn expired_records_are_collected_before_what_is_left_of_others() {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("sessions.db");
    let handler = SqlHandler::connect(config(&path)).await.unwrap();
    let left = "WITH RECURSIVE n(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM n WHERE n < 20)
        INSERT INTO sessions (id, data, write_id, expires_at, expires_minute)
        SELECT printf('left%024d', n), CASE WHEN n > 17 THEN zeroblob(1) END, randomblob(16), n, 0 FROM n";
    Connection::open(&path).unwrap().execute_batch(left).unwrap();
    let freed = async || handler.gc(NonZeroU32::new(5).unwrap()).await.unwrap();
    assert_eq!((freed().await, freed().await), (3, 0), "three records among twenty rows, in batches of five");
    let rows: u32 =
        Connection::open(&path).unwrap().query_row("SELECT count(*) FROM sessions", [], |row| row.get(0)).unwrap();
    assert_eq!(rows, 10);
}

/// Counts up a session of its own, and tells of each number once it is saved.
fn work(database: &Path) {
    runtime().block_on(async {
        let handler = connect(database).await;
        let id = SessionId::parse(&format!("counted-by-everybody-{:05}", 0)).unwrap();
        loop {
            did(count_up(&handler, &id).await.unwrap());
        }
    });
}

#[test]
fn a_killed_writer_loses_nothing_that_was_acknowledged_and_tears_nothing() {
    if let Some(database) = child_place() {
        return work(&database);
    }
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("sessions.db");
    let runtime = runtime();
    let handler = runtime.block_on(connect(&path));
    let id = SessionId::parse(&format!("counted-by-everybody-{:05}", 0)).unwrap();
    let mut last = 0;
    for round in 0..100 {
        let mut child = child_of("a_killed_writer_loses_nothing_that_was_acknowledged_and_tears_nothing", &path);
        let mut printed = printed(&mut child);
        let first = printed.next().expect("the child has begun");
        assert!(first > last, "round {round}: {first} after {last}");
        std::thread::sleep(Duration::from_micros(round * 337 % 20_000));
        child.kill().unwrap();
        child.wait().unwrap();
        let told = printed.last().unwrap_or(first);
        last = number(&runtime.block_on(view(&handler, &id)).unwrap().unwrap());
        assert!(last == told || last == told + 1, "round {round}: {told} was acknowledged, {last} is there");
    }
    let whole: String = Connection::open(&path).unwrap().query_row("PRAGMA integrity_check", [], |row| row.get(0)).unwrap();
    assert_eq!(whole, "ok");
}

#[test]
fn a_killed_holder_frees_its_session_long_before_its_lease_ends() {
    if let Some(database) = child_place() {
        return runtime().block_on(async {
            let handler = connect(database).await;
            let id = SessionId::parse(&format!("held-by-a-child-{:010}", 0)).unwrap();
            let hour = OpenRequest::exclusive(Duration::ZERO, LONG);
            let _held = handler.open(&id, &hour.expecting(Expect::Any)).await.unwrap();
            did(1);
            std::future::pending::<()>().await;
        });
    }
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("sessions.db");
    let mut child = child_of("a_killed_holder_frees_its_session_long_before_its_lease_ends", &path);
    assert_eq!(printed(&mut child).next(), Some(1));
    let id = SessionId::parse(&format!("held-by-a-child-{:010}", 0)).unwrap();
    runtime().block_on(async {
        let handler = connect(&path).await;
        let patient = |wait| OpenRequest::exclusive(wait, LEASE).expecting(Expect::Any);
        // As long as it lives, nobody takes it for dead.
        let error = handler.open(&id, &patient(Duration::from_millis(1200))).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::LockTimeout, "{error:?}");
        assert!(error.holder().unwrap().process.contains(&format!("pid {}", child.id())), "{error:?}");
        child.kill().unwrap();
        child.wait().unwrap();
        handler.open(&id, &patient(Duration::from_secs(20))).await.unwrap().close().await.unwrap();
    });
}

#[test]
fn processes_that_share_a_file_all_get_their_turn() {
    const PROCESSES: usize = 6;
    if let Some(database) = child_place() {
        return runtime().block_on(async {
            let handler = Arc::new(connect(&database).await);
            let (id, mut done) = (id(), 0);
            while !database.with_extension("go").exists() {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
            while !database.with_extension("stop").exists() {
                done = count_up(&handler, &id).await.unwrap();
            }
            did(done);
        });
    }
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("sessions.db");
    drop(runtime().block_on(connect(&path)));
    let start = || child_of("processes_that_share_a_file_all_get_their_turn", &path);
    let mut children: Vec<_> = (0..PROCESSES).map(|_| start()).collect();
    std::thread::sleep(Duration::from_millis(300));
    File::create(path.with_extension("go")).unwrap();
    std::thread::sleep(Duration::from_secs(3));
    File::create(path.with_extension("stop")).unwrap();
    let shares: Vec<_> = children.iter_mut().map(|child| printed(child).last().unwrap()).collect();
    for mut child in children {
        assert!(child.wait().unwrap().success());
    }
    println!("shares of {PROCESSES} processes: {shares:?}");
    let (least, most) = (shares.iter().min().unwrap(), shares.iter().max().unwrap());
    assert!(least * 5 > *most, "{shares:?}");
}

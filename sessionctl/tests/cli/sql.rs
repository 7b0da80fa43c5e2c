//! Every command against SQL databases: a file, and real servers, which each test starts for itself.

use std::process::Stdio;
use std::time::{Duration, Instant};

use serde_json::json;

use crate::{Answer, Holder, new_id, run, sessionctl, start_hold};

/// A database of its own.
trait Database {
    fn start() -> Self;

    /// With options that begin with `&`.
    fn dsn(&self, options: &str) -> String;

    /// What nothing that is printed may show.
    fn password(&self) -> Option<&str> {
        None
    }

    /// How many rows the table has: records, traces, and locks of absent ids.
    fn rows(&self) -> u64;

    /// How many tables there are.
    fn tables(&self) -> u64;

    /// What tells one state of the only session from the next.
    fn state(&self) -> String;

    fn run(&self, command: &str, rest: &[&str]) -> Answer {
        let answer = run(&[&[command, self.dsn("").as_str()], rest].concat());
        if let Some(password) = self.password() {
            assert!(!answer.stdout.contains(password) && !answer.stderr.contains(password), "{answer:?}");
        }
        answer
    }

    fn hold(&self, id: &str) -> Holder {
        start_hold(&[&self.dsn(""), id])
    }
}

/// The same tests for each database: the cases that only a server has,
/// and how many flights a cycle takes, where that is counted.
macro_rules! every_command {
    ($database:ty, $over_a_server:expr, $counted:expr) => {
        #[test]
        fn values_are_set_counted_read_listed_and_removed() {
            super::values(&<$database as super::Database>::start());
        }

        #[test]
        fn a_lock_is_listed_with_its_holder_and_can_be_broken() {
            super::lock(&<$database as super::Database>::start());
        }

        #[test]
        fn what_has_expired_is_collected_and_the_rest_is_not() {
            super::gc(&<$database as super::Database>::start());
        }

        #[test]
        fn cases_run_in_tables_of_their_own_two_checks_at_once_and_leave_nothing() {
            super::check(&<$database as super::Database>::start(), $over_a_server);
        }

        #[test]
        fn nothing_is_lost_while_workers_are_stopped_and_killed() {
            super::hammer(&<$database as super::Database>::start());
        }

        #[test]
        fn the_control_group_loses_updates() {
            super::control_group(&<$database as super::Database>::start());
        }

        #[test]
        fn cycles_are_measured_beside_the_bare_client() {
            super::bench(&<$database as super::Database>::start(), $counted);
        }

        #[test]
        fn a_missing_table_is_a_matter_of_configuration_that_names_the_cure() {
            super::missing_table(&<$database as super::Database>::start());
        }
    };
}

use every_command;

/// A server that can be stopped under its clients.
trait Stops: Database {
    fn stop_immediate(&self);

    fn restart(&self);
}

/// The tests that only a server can be put to.
macro_rules! over_a_server {
    ($database:ty) => {
        #[test]
        fn a_server_that_stops_and_comes_back_in_the_middle_has_lost_nothing_and_is_used_again() {
            super::stop(&<$database as super::Database>::start());
        }

        #[test]
        fn whoever_waits_for_a_holder_that_was_killed_is_in_within_a_second() {
            super::killed_holder(&<$database as super::Database>::start());
        }
    };
}

use over_a_server;

mod sqlite {
    struct Sqlite(tempfile::TempDir);

    impl super::Database for Sqlite {
        fn start() -> Self {
            Self(tempfile::tempdir().unwrap())
        }

        fn dsn(&self, options: &str) -> String {
            format!("sqlite://{}/sessions.db?create=on{options}", self.0.path().display())
        }

        fn rows(&self) -> u64 {
            let connection = rusqlite::Connection::open(self.0.path().join("sessions.db")).unwrap();
            connection.query_row("SELECT count(*) FROM sessions", [], |row| row.get::<_, u32>(0)).unwrap().into()
        }

        fn state(&self) -> String {
            let connection = rusqlite::Connection::open(self.0.path().join("sessions.db")).unwrap();
            connection.query_row("SELECT hex(write_id) FROM sessions", [], |row| row.get(0)).unwrap()
        }

        fn tables(&self) -> u64 {
            let connection = rusqlite::Connection::open(self.0.path().join("sessions.db")).unwrap();
            let count = "SELECT count(*) FROM sqlite_schema WHERE type = 'table'";
            connection.query_row(count, [], |row| row.get::<_, u32>(0)).unwrap().into()
        }
    }

    super::every_command!(Sqlite, &[], None);
}

mod postgres {
    use conformance_tests::servers::Postgres;

    impl super::Database for Postgres {
        fn start() -> Self {
            Self::start(&[]).unwrap()
        }

        fn dsn(&self, options: &str) -> String {
            format!("{}?create=on&timeout=20s&connect_timeout=20s{options}", self.url())
        }

        fn password(&self) -> Option<&str> {
            Some(super::PASSWORD)
        }

        fn rows(&self) -> u64 {
            self.query("SELECT count(*) FROM sessions").unwrap()[0][0].parse().unwrap()
        }

        fn tables(&self) -> u64 {
            let count = "SELECT count(*) FROM pg_tables WHERE schemaname = 'public'";
            self.query(count).unwrap()[0][0].parse().unwrap()
        }

        fn state(&self) -> String {
            self.query("SELECT encode(write_id, 'hex') FROM sessions").unwrap()[0][0].clone()
        }
    }

    impl super::Stops for Postgres {
        fn stop_immediate(&self) {
            self.stop_immediate().unwrap();
        }

        fn restart(&self) {
            self.restart().unwrap();
        }
    }

    super::every_command!(Postgres, &super::OVER_A_SERVER, Some(2));
    super::over_a_server!(Postgres);
}

mod mariadb {
    use conformance_tests::servers::MariaDb;

    impl super::Database for MariaDb {
        fn start() -> Self {
            Self::start(&[]).unwrap()
        }

        fn dsn(&self, options: &str) -> String {
            format!("{}?create=on&timeout=20s&connect_timeout=20s{options}", self.url())
        }

        fn password(&self) -> Option<&str> {
            Some(super::PASSWORD)
        }

        fn rows(&self) -> u64 {
            self.query("SELECT count(*) FROM sessionkit.sessions").unwrap()[0][0].parse().unwrap()
        }

        fn tables(&self) -> u64 {
            let count = "SELECT count(*) FROM information_schema.tables WHERE table_schema = 'sessionkit'";
            self.query(count).unwrap()[0][0].parse().unwrap()
        }

        fn state(&self) -> String {
            self.query("SELECT HEX(write_id) FROM sessionkit.sessions").unwrap()[0][0].clone()
        }
    }

    impl super::Stops for MariaDb {
        /// It knows nothing between the end of its transactions and a kill.
        fn stop_immediate(&self) {
            self.kill().unwrap();
        }

        fn restart(&self) {
            self.restart().unwrap();
        }
    }

    super::every_command!(MariaDb, &super::OVER_A_SERVER, Some(2));
    super::over_a_server!(MariaDb);
}

/// That of the servers of the tests.
const PASSWORD: &str = "conformance";

/// A case that only a server can be held to, and its suite.
const OVER_A_SERVER: [(&str, &str); 1] = [("one_flight", "trips")];

fn values(database: &impl Database) {
    let id = new_id();
    assert_eq!(database.run("set", &[&id, "name", r#""Ada""#]).text(), "stored in a new session");
    assert_eq!(database.run("incr", &[&id, "n", "--times", "5"]).text(), "5");
    assert_eq!(database.run("get", &[&id, "name"]).text(), r#""Ada""#);
    let listed = database.run("ls", &["--json"]).object();
    assert!(listed["bytes"].as_u64() > Some(0) && listed["left_ms"].as_u64() > Some(0), "{listed}");
    assert_eq!(database.run("gc", &[]).text(), "0 freed");
    assert_eq!(database.run("rm", &[&id]).text(), "removed");
    database.run("rm", &[&id]).refused(1, "no such session");
    assert_eq!(database.run("ls", &[]).text(), "no sessions");
    // Looking for what is not there leaves nothing; the one that was there has left its trace.
    database.run("get", &[&new_id()]).refused(1, "no such session");
    assert_eq!(database.rows(), 1);
}

fn lock(database: &impl Database) {
    let id = new_id();
    database.run("set", &[&id, "n", "1"]).text();
    let holder = database.hold(&id);
    let waiter = sessionctl(&["incr", &database.dsn("&wait=30s"), &id, "n"]).stdout(Stdio::piped()).spawn().unwrap();
    let patience = Instant::now() + Duration::from_secs(20);
    // How many wait is not known where there is one place next in line; that nobody does is.
    let lock = loop {
        let lock = database.run("locks", &["--json"]).object();
        if lock["waiting"] != json!(0) || Instant::now() > patience {
            break lock;
        }
    };
    let pid = format!("pid {} on ", holder.child.id());
    assert!(lock["holder"].as_str().unwrap().starts_with(&pid), "{lock}");
    assert!(lock["waiting"].is_null() && lock["held_ms"].is_u64() && lock["lease_left_ms"].is_u64(), "{lock}");
    assert_eq!(database.run("unlock", &[lock["handle"].as_str().unwrap()]).text(), "unlocked");
    assert_eq!(Answer::of(waiter.wait_with_output().unwrap()).text(), "2");
    // Somebody else has been there, which a renewal finds out.
    assert_eq!(holder.end().0.code(), Some(1));
    database.run("unlock", &[&id]).refused(1, "nobody holds it");
}

fn gc(database: &impl Database) {
    let dsn = database.dsn("&ttl=300ms");
    for _ in 0..5 {
        run(&["set", &dsn, &new_id(), "n", "1"]).text();
    }
    let live = new_id();
    database.run("set", &[&live, "n", "1"]).text();
    std::thread::sleep(Duration::from_millis(400));
    assert_eq!(database.run("gc", &["--limit", "2"]).text(), "2 freed");
    assert_eq!(database.run("gc", &["--json"]).object(), json!({"freed": 3}));
    assert_eq!(database.run("gc", &[]).text(), "0 freed");
    assert_eq!((database.run("get", &[&live, "n"]).text(), database.rows()), ("1", 1));
}

fn check(database: &impl Database, over_a_server: &[(&str, &str)]) {
    let id = new_id();
    database.run("set", &[&id, "n", "1"]).text();
    let cases = [
        ("list_shows_the_living_only", "admin"),
        ("gc_respects_its_limit", "expiry"),
        ("acknowledged_write_survives_the_death_of_its_writer", "processes"),
        ("releasing_twice_succeeds", "lock"),
    ];
    for (only, suite) in cases.iter().chain(over_a_server) {
        let words = ["check", &database.dsn(""), "--only", only, "--json"];
        let other = sessionctl(&words).stdout(Stdio::piped()).spawn().unwrap();
        for answer in [run(&words), Answer::of(other.wait_with_output().unwrap())] {
            let lines = answer.objects();
            let (last, lines) = lines.split_last().unwrap();
            assert!(last["failed"] == json!(0) && !lines.is_empty(), "{lines:?}");
            assert!(lines.iter().all(|line| line["suite"] == json!(suite)), "{lines:?}");
        }
    }
    assert_eq!(database.run("get", &[&id]).text(), r#"{"n":1}"#);
    assert_eq!((database.rows(), database.tables()), (1, 1));
}

fn hammer(database: &impl Database) {
    let words = ["--processes", "3", "--tasks", "2", "--seconds", "2", "--kill", "2", "--stall", "2", "--lease", "300ms"];
    let answer = database.run("hammer", &[&words[..], &["--json"]].concat());
    let report = answer.object();
    assert_eq!((answer.status, &report["lost"]), (0, &json!(0)), "{answer:?}");
    assert!(report["acked"].as_u64() > Some(0), "{report}");
    assert_eq!(database.run("ls", &[]).text(), "no sessions");
}

fn stop(server: &impl Stops) {
    // Made beforehand, so that the workers find it.
    server.run("ls", &[]).text();
    let words = ["--processes", "3", "--tasks", "4", "--seconds", "8", "--lease", "500ms", "--hold", "1ms", "--json"];
    let dsn = server.dsn("");
    let hammer =
        sessionctl(&[&["hammer", &dsn], &words[..]].concat()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    std::thread::sleep(Duration::from_secs(3));
    server.stop_immediate();
    server.restart();
    // While the hammer still runs, what it writes goes on.
    let (patience, before) = (Instant::now() + Duration::from_secs(4), server.state());
    while server.state() == before {
        assert!(Instant::now() < patience, "nothing is written any more");
        std::thread::sleep(Duration::from_millis(20));
    }
    let answer = Answer::of(hammer.wait_with_output().unwrap());
    let report = answer.object();
    assert_eq!((answer.status, &report["lost"]), (0, &json!(0)), "{answer:?}");
    assert!(report["acked"].as_u64() > Some(0), "{report}");
}

fn killed_holder(server: &impl Stops) {
    let id = new_id();
    server.run("set", &[&id, "n", "0"]).text();
    // One time in three may meet a machine that has other things to do.
    let waits: Vec<_> = (0..3)
        .map(|_| {
            let mut holder = start_hold(&[&server.dsn("&lease=30s"), &id]);
            let words = ["incr", &server.dsn("&wait=25s&lease=30s"), &id, "n"];
            let waiter = sessionctl(&words).stdout(Stdio::piped()).spawn().unwrap();
            std::thread::sleep(Duration::from_millis(700));
            holder.child.kill().unwrap();
            holder.child.wait().unwrap();
            let killed = Instant::now();
            assert_eq!(Answer::of(waiter.wait_with_output().unwrap()).status, 0);
            killed.elapsed()
        })
        .collect();
    assert!(waits.iter().filter(|wait| **wait < Duration::from_secs(1)).count() >= 2, "{waits:?}");
    assert_eq!(server.run("get", &[&id, "n"]).text(), "3");
}

fn control_group(database: &impl Database) {
    let words = ["--access", "none", "--processes", "4", "--tasks", "4", "--seconds", "2", "--hold", "1ms", "--json"];
    let answer = database.run("hammer", &words);
    assert!(answer.object()["lost"].as_u64() > Some(0), "{answer:?}");
    assert_eq!(answer.status, 1);
}

fn bench(database: &impl Database, counted: Option<u64>) {
    database.run("ls", &[]).text();
    let lines = database.run("bench", &["--rounds", "1", "--round", "10ms", "--handovers", "3", "--json"]).objects();
    let of = |tasks: u64| {
        lines.iter().filter(move |line| line["tasks"] == json!(tasks)).map(|line| line["what"].as_str().unwrap())
    };
    for tasks in [1, 64] {
        let whats: Vec<_> = of(tasks).filter(|what| !what.contains("pgbench")).collect();
        assert_eq!(whats, ["floor", "cycle", "session", "unlocked", "cycle_vs_unlocked"]);
    }
    assert!(of(2).eq(["handover_processes", "handover_tasks"]));
    for line in &lines {
        match line["what"].as_str().unwrap() {
            "handover_processes" | "handover_tasks" => assert!(line["p50_us"].as_f64() > Some(0.0), "{line}"),
            "cycle_vs_unlocked" | "cycle_vs_pgbench" => assert!(line["ratio"].as_f64() > Some(0.0), "{line}"),
            // It connects anew for each round.
            "pgbench" => assert!(line["cycles_per_s"].as_f64() > Some(0.0) && line["trips"].is_null(), "{line}"),
            // Two flights each: what is locked costs no more of them than what is not.
            _ => assert!(line["cycles_per_s"].as_f64() > Some(0.0) && line["trips"].as_u64() == counted, "{line}"),
        }
    }
    assert_eq!(database.run("ls", &[]).text(), "no sessions");
}

fn missing_table(database: &impl Database) {
    let dsn = database.dsn("").replace("create=on", "create=off") + "&table=not_there";
    database.run("ls", &[]).text();
    run(&["ls", &dsn]).refused(2, "create=on");
}

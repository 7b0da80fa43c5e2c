//! Every command against a real memcached server, which each test starts for itself.

use std::process::Stdio;

use conformance_tests::servers::Memcached;
use serde_json::json;

use crate::{Answer, Holder, new_id, run, sessionctl, start_hold};

const PASSWORD: &str = "conformance";

/// A server, with a password that nothing that is printed may show or without.
struct Server(Memcached);

impl Server {
    fn new() -> Self {
        Self(Memcached::start_with_password(&[]).unwrap())
    }

    fn open() -> Self {
        Self(Memcached::start(&[]).unwrap())
    }

    fn newer() -> Self {
        Self(Memcached::start_newer(&[]).unwrap())
    }

    fn dsn(&self, options: &str) -> String {
        format!("{}{options}", self.0.url())
    }

    fn run(&self, command: &str, rest: &[&str]) -> Answer {
        let answer = run(&[&[command, self.dsn("").as_str()], rest].concat());
        assert!(!answer.stdout.contains(PASSWORD) && !answer.stderr.contains(PASSWORD), "{answer:?}");
        answer
    }

    fn hold(&self, id: &str) -> Holder {
        start_hold(&[&self.dsn(""), id])
    }

    /// How many live records there are, under whatever prefix.
    fn records(&self) -> usize {
        let mut wire = self.0.connect().unwrap();
        let keys = wire.keys().unwrap();
        let found = keys.iter().filter_map(|key| wire.get(key).unwrap());
        // Behind a payload stand the names of those who have destroyed it.
        let is_live = |data: &[u8]| {
            let number = |bytes: &[u8]| bytes.iter().fold(0, |number, byte| number << 8 | usize::from(*byte));
            data.starts_with(b"skm1") && data.len() == 26 + number(&data[20..24]) + number(&data[24..26])
        };
        found.filter(|item| is_live(&item.data)).count()
    }
}

#[test]
fn values_are_set_counted_read_listed_and_removed() {
    let (server, id) = (Server::new(), new_id());
    assert_eq!(server.run("set", &[&id, "name", r#""Ada""#]).text(), "stored in a new session");
    assert_eq!(server.run("incr", &[&id, "n", "--times", "5"]).text(), "5");
    assert_eq!(server.run("get", &[&id, "name"]).text(), r#""Ada""#);
    let listed = server.run("ls", &["--json"]).object();
    assert!(listed["bytes"].as_u64() > Some(0) && listed["left_ms"].as_u64() > Some(0), "{listed}");
    assert_ne!(listed["handle"], json!(id));
    assert_eq!(server.run("gc", &[]).text(), "0 freed");
    assert_eq!(server.run("rm", &[&id]).text(), "removed");
    server.run("rm", &[&id]).refused(1, "no such session");
    assert_eq!(server.run("ls", &[]).text(), "no sessions");
}

#[test]
fn a_live_id_is_never_listed() {
    let server = Server::new();
    for options in ["", "?hash_ids=off"] {
        let id = new_id();
        run(&["set", &server.dsn(options), &id, "n", "1"]).text();
        let holder = start_hold(&[&server.dsn(options), &id]);
        for command in ["ls", "locks"] {
            for format in [&[][..], &["--json"]] {
                let answer = run(&[&[command, server.dsn(options).as_str()], format].concat());
                assert_eq!(answer.status, 0, "{answer:?}");
                assert!(!answer.stdout.contains(&id) && !answer.stderr.contains(&id), "{command} {options}");
            }
        }
        let lock = run(&["locks", &server.dsn(options), "--json"]).object();
        let handle = lock["handle"].as_str().unwrap();
        assert_eq!(run(&["unlock", &server.dsn(options), handle]).text(), "unlocked");
        drop(holder);
        run(&["rm", &server.dsn(options), &id]).text();
    }
}

#[test]
fn a_lock_is_listed_with_its_holder_and_can_be_broken() {
    let (server, id) = (Server::new(), new_id());
    server.run("set", &[&id, "n", "1"]).text();
    let holder = server.hold(&id);
    let waiter = sessionctl(&["incr", &server.dsn("?wait=30s"), &id, "n"]).stdout(Stdio::piped()).spawn().unwrap();
    let lock = server.run("locks", &["--json"]).object();
    let pid = format!("pid {} on ", holder.child.id());
    assert!(lock["holder"].as_str().unwrap().starts_with(&pid), "{lock}");
    assert!(lock["held_ms"].is_u64() && lock["lease_left_ms"].is_u64(), "{lock}");
    assert_eq!(server.run("unlock", &[lock["handle"].as_str().unwrap()]).text(), "unlocked");
    assert_eq!(Answer::of(waiter.wait_with_output().unwrap()).text(), "2");
    // Somebody else has been there, which a renewal finds out.
    assert_eq!(holder.end().0.code(), Some(1));
    server.run("unlock", &[&id]).refused(1, "nobody holds it");
}

#[test]
fn cases_run_under_a_prefix_of_their_own_and_leave_no_record() {
    for server in [Server::new(), Server::newer()] {
        let id = new_id();
        server.run("set", &[&id, "n", "1"]).text();
        for (only, suite) in [
            ("one_flight", "trips"),
            ("list_shows_the_living_only", "admin"),
            ("acknowledged_write_survives_the_death_of_its_writer", "processes"),
            ("releasing_twice_succeeds", "lock"),
        ] {
            let lines = server.run("check", &["--only", only, "--json"]).objects();
            let (last, lines) = lines.split_last().unwrap();
            assert!(last["failed"] == json!(0) && !lines.is_empty(), "{lines:?}");
            assert!(lines.iter().all(|line| line["suite"] == json!(suite)), "{lines:?}");
        }
        assert_eq!(server.records(), 1);
        assert_eq!(server.run("get", &[&id]).text(), r#"{"n":1}"#);
    }
}

#[test]
fn round_trips_cannot_be_counted_where_no_proxy_can_stand() {
    let (one, other) = (Server::open(), Server::open());
    let dsn = format!("{},{}", one.dsn(""), other.0.address());
    run(&["check", &dsn, "--only", "open_is_one_flight"]).refused(2, "plain TCP");
}

#[test]
fn nothing_is_lost_while_workers_are_stopped_and_killed() {
    for server in [Server::new(), Server::newer()] {
        // No lease is shorter: the server counts in seconds.
        let words = ["--processes", "3", "--tasks", "2", "--sessions", "2", "--seconds", "6"];
        let faults = ["--kill", "3", "--stall", "3", "--lease", "2s", "--json"];
        let answer = server.run("hammer", &[&words[..], &faults].concat());
        let report = answer.object();
        assert_eq!((answer.status, &report["lost"]), (0, &json!(0)), "{answer:?}");
        assert!(report["acked"].as_u64() > Some(0), "{report}");
        assert_eq!(server.records(), 0);
    }
}

#[test]
fn the_control_group_loses_updates() {
    let server = Server::new();
    let words = ["--processes", "2", "--tasks", "2", "--seconds", "1", "--hold", "1ms", "--access", "none", "--json"];
    let answer = server.run("hammer", &words);
    assert!(answer.status == 1 && answer.object()["lost"].as_u64() > Some(0), "{answer:?}");
}

#[test]
fn a_wrong_password_and_a_server_that_is_away_are_told_apart() {
    let server = Server::new();
    let dsn = format!("memcache://sessionkit:wrong-secret@{}", server.0.address());
    let answer = run(&["ls", &dsn]);
    answer.refused(2, "password");
    assert!(!answer.stderr.contains("wrong-secret"), "{answer:?}");
    server.0.kill().unwrap();
    let away = server.run("ls", &[]);
    away.refused(3, "cannot be reached");
    assert!(away.stderr.contains(&server.0.address().to_string()), "{away:?}");
}

#[test]
fn cycles_are_measured_beside_the_bare_client_and_what_waiters_send_is_counted() {
    for server in [Server::open(), Server::newer()] {
        let words = ["--rounds", "1", "--round", "10ms", "--handovers", "3", "--json"];
        let lines = server.run("bench", &words).objects();
        let whats: Vec<_> =
            lines.iter().map(|line| (line["what"].as_str().unwrap(), line["tasks"].as_u64().unwrap())).collect();
        let names = ["floor", "cycle", "session", "unlocked", "cycle_vs_unlocked"];
        let mut expected: Vec<_> =
            [1, 64].into_iter().flat_map(|tasks| names.iter().map(move |name| (*name, tasks))).collect();
        expected.extend([("handover_processes", 2), ("handover_tasks", 2)]);
        expected.extend([("commands_of_waiters", 100), ("commands_of_waiters_apart", 100)]);
        assert_eq!(whats, expected);
        for line in &lines {
            match line["what"].as_str().unwrap() {
                "handover_processes" | "handover_tasks" => assert!(line["p50_us"].as_f64() > Some(0.0), "{line}"),
                "cycle_vs_unlocked" => assert!(line["ratio"].as_f64() > Some(0.0), "{line}"),
                // However many wait in a process, one asks for them: at most once a millisecond, and less and less often.
                "commands_of_waiters" => {
                    let rate = line["cycles_per_s"].as_f64().unwrap();
                    assert!(rate > 0.0 && rate < 1000.0, "{line}");
                }
                "commands_of_waiters_apart" => assert!(line["cycles_per_s"].as_f64() > Some(0.0), "{line}"),
                // Two flights each: what is locked costs no more of them than what is not.
                _ => assert!(line["cycles_per_s"].as_f64() > Some(0.0) && line["trips"] == json!(2), "{line}"),
            }
        }
        assert_eq!(server.records(), 0);
    }
}

#[test]
fn a_server_that_no_plain_program_can_log_in_to_gets_cycles_and_hand_overs() {
    let server = Server::new();
    let lines = server.run("bench", &["--rounds", "1", "--round", "5ms", "--handovers", "2", "--json"]).objects();
    let whats: Vec<_> = lines.iter().map(|line| line["what"].as_str().unwrap()).collect();
    assert_eq!(whats, ["cycle", "session", "cycle", "session", "handover_processes", "handover_tasks"]);
}

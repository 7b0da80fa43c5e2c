//! Every command against a real Redis server, which each test starts for itself.

use std::io::Read;
use std::process::Stdio;
use std::time::{Duration, Instant};

use conformance_tests::servers::Redis;
use serde_json::{Value, json};

use crate::{Answer, Holder, new_id, run, sessionctl, start_hold};

const PASSWORD: &str = "hunter2";

/// A server with a password, which nothing that is printed may show.
struct Server(Redis);

impl Server {
    fn new() -> Self {
        Self::with(&[])
    }

    fn with(options: &[&str]) -> Self {
        let password = format!("requirepass {PASSWORD}");
        Self(Redis::start(&[&[password.as_str()], options].concat()).unwrap())
    }

    fn dsn(&self, options: &str) -> String {
        format!("redis://:{PASSWORD}@127.0.0.1:{}/0{options}", self.0.port())
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
    fn records(&self) -> u64 {
        let count = "local n = 0 for _, key in ipairs(redis.call('KEYS', '*')) do \
                     if redis.call('TYPE', key).ok == 'string' and redis.call('GETRANGE', key, 0, 3) == 'skr1' then n = n + 1 end \
                     end return n";
        self.0.command(&["EVAL", count, "0"]).unwrap().parse().unwrap()
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
    assert_eq!(server.run("gc", &[]).text(), "0 freed");
    assert_eq!(server.run("rm", &[&id]).text(), "removed");
    server.run("rm", &[&id]).refused(1, "no such session");
    assert_eq!(server.run("ls", &[]).text(), "no sessions");
}

#[test]
fn a_lock_is_listed_with_holder_and_waiters_and_can_be_broken() {
    let (server, id) = (Server::new(), new_id());
    server.run("set", &[&id, "n", "1"]).text();
    let holder = server.hold(&id);
    let waiter = sessionctl(&["incr", &server.dsn("?wait=30s"), &id, "n"]).stdout(Stdio::piped()).spawn().unwrap();
    let patience = Instant::now() + Duration::from_secs(20);
    let lock = loop {
        let lock = server.run("locks", &["--json"]).object();
        if lock["waiting"] == json!(1) || Instant::now() > patience {
            break lock;
        }
    };
    let pid = format!("pid {} on ", holder.child.id());
    assert!(lock["holder"].as_str().unwrap().starts_with(&pid), "{lock}");
    assert!(lock["waiting"] == json!(1) && lock["held_ms"].is_u64() && lock["lease_left_ms"].is_u64(), "{lock}");
    assert_eq!(server.run("unlock", &[lock["handle"].as_str().unwrap()]).text(), "unlocked");
    assert_eq!(Answer::of(waiter.wait_with_output().unwrap()).text(), "2");
    // Somebody else has been there, which a renewal finds out.
    assert_eq!(holder.end().0.code(), Some(1));
    server.run("unlock", &[&id]).refused(1, "nobody holds it");
}

#[test]
fn cases_run_under_a_prefix_of_their_own_and_leave_no_record() {
    let server = Server::new();
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

#[test]
fn round_trips_cannot_be_counted_where_no_proxy_can_stand() {
    let server = Server::new();
    let dsn = format!("redis+unix://:{PASSWORD}@{}", server.0.socket_path().display());
    run(&["check", &dsn, "--only", "open_is_one_flight"]).refused(2, "plain TCP");
}

#[test]
fn nothing_is_lost_with_and_without_messages_while_workers_are_stopped_and_killed() {
    let server = Server::new();
    for options in ["", "?wake=poll"] {
        let words =
            ["--processes", "3", "--tasks", "2", "--seconds", "2", "--kill", "2", "--stall", "2", "--lease", "300ms"];
        let answer = run(&[&["hammer", server.dsn(options).as_str(), "--json"], &words[..]].concat());
        let report = answer.object();
        assert_eq!((answer.status, &report["lost"]), (0, &json!(0)), "{options} {answer:?}");
        assert!(report["acked"].as_u64() > Some(0), "{options} {report}");
    }
    assert_eq!(server.records(), 0);
}

#[test]
fn a_server_that_is_started_anew_in_the_middle_is_waited_for() {
    let server = Server::with(&["appendonly yes", "appendfsync always"]);
    let words = ["--processes", "2", "--tasks", "2", "--seconds", "4", "--kill", "1", "--lease", "500ms", "--json"];
    let hammer = sessionctl(&[&["hammer", server.dsn("").as_str()], &words[..]].concat())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    std::thread::sleep(Duration::from_millis(1500));
    server.0.kill().unwrap();
    std::thread::sleep(Duration::from_millis(300));
    server.0.restart().unwrap();
    let answer = Answer::of(hammer.wait_with_output().unwrap());
    let report = answer.object();
    assert_eq!((answer.status, &report["lost"]), (0, &json!(0)), "{answer:?}");
    assert!(report["acked"].as_u64() > Some(0), "{report}");
}

#[test]
fn a_password_is_on_no_command_line_of_a_worker() {
    let server = Server::new();
    let mut hammer = sessionctl(&["hammer", &server.dsn(""), "--processes", "2", "--seconds", "2", "--json"])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut seen = 0;
    while hammer.try_wait().unwrap().is_none() {
        // The workers are started by whichever thread; all of them are children of the process.
        for task in std::fs::read_dir(format!("/proc/{}/task", hammer.id())).into_iter().flatten().flatten() {
            let mut pids = String::new();
            let listed =
                std::fs::File::open(task.path().join("children")).and_then(|mut file| file.read_to_string(&mut pids));
            for pid in pids.split_whitespace().filter(|_| listed.is_ok()) {
                let words = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
                let words = String::from_utf8_lossy(&words).into_owned();
                // Before it has become this program it is still the parent's copy.
                if words.contains("__worker") {
                    assert!(!words.contains(PASSWORD), "{words}");
                    seen += 1;
                }
            }
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    assert!(seen > 0, "no worker was seen");
    let mut report = String::new();
    hammer.stdout.take().unwrap().read_to_string(&mut report).unwrap();
    assert_eq!(serde_json::from_str::<Value>(&report).unwrap()["lost"], json!(0));
}

#[test]
fn a_wrong_password_and_a_server_that_is_away_are_told_apart() {
    let server = Server::new();
    let dsn = format!("redis://:wrong-secret@127.0.0.1:{}/0", server.0.port());
    let answer = run(&["ls", &dsn]);
    answer.refused(2, "password");
    assert!(!answer.stderr.contains("wrong-secret"), "{answer:?}");
    server.0.kill().unwrap();
    server.run("ls", &[]).refused(3, "cannot be reached");
}

#[test]
fn cycles_are_measured_beside_the_bare_client_and_the_peer_and_their_round_trips_counted() {
    let server = Server::new();
    let lines = server.run("bench", &["--rounds", "1", "--round", "10ms", "--handovers", "3", "--json"]).objects();
    let whats: Vec<_> = lines.iter().map(|line| (line["what"].as_str().unwrap(), line["tasks"].as_u64().unwrap())).collect();
    let contenders = ["floor", "cycle", "session", "unlocked", "record", "peer", "peer_session"];
    let pairs = ["cycle_vs_unlocked", "record_vs_peer", "session_vs_peer_session", "session_vs_peer"];
    let names = [&contenders[..], &pairs].concat();
    let expected: Vec<_> = [1, 64].into_iter().flat_map(|tasks| names.iter().map(move |name| (*name, tasks))).collect();
    assert_eq!(whats, [expected, vec![("handover_processes", 2), ("handover_tasks", 2)]].concat());
    for line in &lines {
        match line["what"].as_str().unwrap() {
            "handover_processes" | "handover_tasks" => assert!(line["p50_us"].as_f64() > Some(0.0), "{line}"),
            pair if pairs.contains(&pair) => assert!(line["ratio"].as_f64() > Some(0.0), "{line}"),
            // Two flights each: what is locked costs no more of them than what is not.
            _ => assert!(line["cycles_per_s"].as_f64() > Some(0.0) && line["trips"] == json!(2), "{line}"),
        }
    }
    assert_eq!(server.records(), 0);
    let keys = server.0.command(&["KEYS", "*"]).unwrap();
    assert!(keys.lines().all(|key| key.starts_with("session:sessionctl-bench-") && key.contains(":ours:")), "{keys}");
}

#[test]
fn a_server_that_no_plain_program_knows_gets_cycles_and_hand_overs() {
    let server = Server::new();
    let dsn = format!("redis+unix://:{PASSWORD}@{}", server.0.socket_path().display());
    let lines = run(&["bench", &dsn, "--rounds", "1", "--round", "5ms", "--handovers", "2", "--json"]).objects();
    let whats: Vec<_> = lines.iter().map(|line| line["what"].as_str().unwrap()).collect();
    assert_eq!(whats, ["cycle", "session", "cycle", "session", "handover_processes", "handover_tasks"]);
}

//! `lab`: what it serves, what it measures, and whom it does not answer. The page itself is tested in a browser, in `tests/browser`.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use conformance_tests::servers::Redis;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};

use crate::{Store, new_id, run, sessionctl};

const STRATEGIES: [&str; 5] = ["no_lock", "exclusive", "early_release", "read_only", "merge"];

/// A running lab; told to end at the latest when it is dropped.
struct Lab {
    child: Child,
    port: u16,
    backends: Vec<String>,
}

/// What it answered.
struct Reply {
    status: u16,
    head: String,
    body: String,
}

impl Reply {
    #[track_caller]
    fn json(&self) -> Value {
        assert!(self.head.contains("content-type: application/json"), "{}", self.head);
        serde_json::from_str(&self.body).expect(&self.body)
    }

    #[track_caller]
    fn refused(&self, status: u16, code: &str) {
        assert_eq!((self.status, self.json()["error"]["code"].as_str()), (status, Some(code)), "{}", self.body);
    }
}

impl Lab {
    fn start(dsns: &[&str]) -> Self {
        let mut words = vec!["lab", "--port", "0", "--json"];
        words.extend(dsns.iter().flat_map(|dsn| ["--dsn", dsn]));
        let mut child = sessionctl(&words).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        let told: Value = serde_json::from_str(&line).expect("it says where it is");
        let port = told["url"].as_str().unwrap().trim_end_matches('/').rsplit_once(':').unwrap().1.parse().unwrap();
        let backends = serde_json::from_value(told["backends"].clone()).unwrap();
        Self { child, port, backends }
    }

    /// Sends what no browser would, if it is told to.
    fn send(&self, method: &str, path: &str, headers: &[(&str, &str)], body: &str) -> Reply {
        let mut stream = TcpStream::connect(("127.0.0.1", self.port)).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
        let mut text = format!("{method} {path} HTTP/1.1\r\nconnection: close\r\ncontent-length: {}\r\n", body.len());
        if headers.iter().all(|(name, _)| *name != "host") {
            text.push_str(&format!("host: 127.0.0.1:{}\r\n", self.port));
        }
        for (name, value) in headers {
            text.push_str(&format!("{name}: {value}\r\n"));
        }
        stream.write_all(format!("{text}\r\n{body}").as_bytes()).unwrap();
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer).unwrap();
        let answer = String::from_utf8(answer).unwrap();
        let (head, body) = answer.split_once("\r\n\r\n").expect(&answer);
        let status = head.split(' ').nth(1).unwrap().parse().unwrap();
        Reply { status, head: head.to_owned(), body: body.to_owned() }
    }

    #[track_caller]
    fn get(&self, path: &str) -> Value {
        let reply = self.send("GET", path, &[("accept", "application/json")], "");
        assert_eq!(reply.status, 200, "{path}: {}", reply.body);
        reply.json()
    }

    fn token(&self) -> String {
        self.get("/")["token"].as_str().unwrap().to_owned()
    }

    fn post(&self, path: &str, body: &Value) -> Reply {
        let token = self.token();
        self.send("POST", path, &[("content-type", "application/json"), ("x-lab-token", &token)], &body.to_string())
    }

    /// Runs something to its end, and returns the report.
    #[track_caller]
    fn job(&self, path: &str, wish: &Value) -> Value {
        let reply = self.post(path, wish);
        assert_eq!(reply.status, 202, "{}", reply.body);
        let address = reply.json()["url"].as_str().unwrap().to_owned();
        assert!(reply.head.contains(&format!("location: {address}")));
        let patience = Instant::now() + Duration::from_secs(60);
        loop {
            let report = self.get(&address);
            if report["state"] != "running" {
                return report;
            }
            assert!(Instant::now() < patience, "{report}");
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    fn run(&self, backend: &str, strategy: &str) -> Value {
        let wish = json!({"backend": backend, "strategy": strategy, "requests": 20, "work_ms": 15});
        let mut report = self.job("/runs", &wish);
        assert_eq!(report["state"], "done", "{report}");
        report["runs"][0].take()
    }

    fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.child.id().try_into().unwrap()), signal).unwrap();
    }

    /// Ends it, and returns what it said on stderr.
    fn end(mut self) -> String {
        self.signal(Signal::SIGTERM);
        assert!(self.child.wait().unwrap().success());
        let mut said = String::new();
        self.child.stderr.take().unwrap().read_to_string(&mut said).unwrap();
        said
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        // Told, and not killed: it has a directory to remove.
        if matches!(self.child.try_wait(), Ok(None)) {
            self.signal(Signal::SIGTERM);
        }
        let _ = self.child.wait();
    }
}

fn number(value: &Value) -> u64 {
    value.as_u64().unwrap_or_else(|| panic!("{value} is no number"))
}

#[test]
fn page_and_numbers_have_one_address() {
    let lab = Lab::start(&[]);
    let accept = "text/html,application/xhtml+xml,*/*;q=0.8";
    for path in ["/", "/compare", "/sessions"] {
        let page = lab.send("GET", path, &[("accept", accept)], "");
        assert!(page.status == 200 && page.head.contains("content-type: text/html"), "{path} {}", page.head);
        let numbers = lab.send("GET", &format!("{path}?format=json"), &[("accept", accept)], "");
        assert!(numbers.json().is_object(), "{path}");
        assert_eq!(
            lab.get(path).as_object().map(|object| object.len()),
            numbers.json().as_object().map(|object| object.len())
        );
    }
    let run = lab.job("/runs", &json!({"backend": "file", "strategy": "merge", "works_ms": [1, 2]}));
    let path = format!("/runs/{}", run["id"]);
    assert!(lab.send("GET", &path, &[("accept", accept)], "").body.starts_with("<!doctype html>"));
    assert_eq!(lab.get(&format!("{path}?format=json")), run);
    for file in ["/lab.css", "/lab.js", "/lanes.js", "/icon.svg"] {
        assert_eq!(lab.send("GET", file, &[], "").status, 200, "{file}");
    }
}

#[test]
fn without_a_lock_updates_are_lost_and_with_each_of_our_strategies_none() {
    let lab = Lab::start(&[]);
    assert_eq!(lab.backends, ["file", "sqlite", "memory"]);
    for backend in &lab.backends {
        for strategy in STRATEGIES {
            let run = lab.run(backend, strategy);
            let lanes = run["lanes"].as_array().unwrap();
            let lost = lanes.iter().filter(|lane| lane["lost"] == true).count() as u64;
            assert_eq!(number(&run["lost"]), lost, "{backend} {strategy}");
            assert_eq!(number(&run["expected"]) - number(&run["found"]), lost, "{backend} {strategy}");
            assert_eq!(number(&run["expected"]), if strategy == "read_only" { 1 } else { 20 });
            assert_eq!(lost > 0, strategy == "no_lock", "{backend} {strategy}: {}", run["sentence"]);
            for lane in lanes {
                assert!(lane["arrived_us"].as_u64() <= lane["queued_us"].as_u64(), "{lane}");
                assert!(lane["opened_us"].as_u64() <= lane["done_us"].as_u64(), "{lane}");
                assert!(number(&lane["work_ended_us"]) - number(&lane["work_began_us"]) >= 15_000, "{lane}");
            }
        }
    }
}

#[test]
fn in_the_articles_case_the_fourth_request_waits_for_the_other_three_only_under_the_lock() {
    // Without syncs: whoever waits for a save would else wait for whatever the disk has to do.
    let place = tempfile::tempdir().unwrap();
    let lab = Lab::start(&[&format!("file://{}/sessions?durability=none", place.path().display())]);
    let report = lab.job("/compare", &json!({"backend": "file", "works_ms": [20, 30, 25, 10]}));
    let runs = report["runs"].as_array().unwrap();
    let names: Vec<_> = runs.iter().map(|run| run["strategy"].as_str().unwrap()).collect();
    assert_eq!(names, STRATEGIES);
    let waited = |name: &str| number(&runs.iter().find(|run| run["strategy"] == name).unwrap()["wait_last_us"]);
    // A sleep is never shorter than it was asked for; what precedes the wait are microseconds.
    assert!(waited("exclusive") >= 74_000, "{report}");
    for other in ["no_lock", "early_release", "read_only", "merge"] {
        assert!(waited(other) < waited("exclusive"), "{other}");
    }
    for run in runs {
        let all = if run["strategy"] == "exclusive" { 85_000 } else { 30_000 };
        assert!(number(&run["total_us"]) >= all, "{run}");
    }
}

#[test]
fn nobody_elses_page_is_answered() {
    let lab = Lab::start(&[]);
    let port = lab.port;
    for host in
        ["evil.example".into(), format!("evil.example:{port}"), format!("127.0.0.1:{}", port ^ 1), "127.0.0.1".into()]
    {
        lab.send("GET", "/?format=json", &[("host", &host)], "").refused(421, "foreign_host");
    }
    for origin in ["http://evil.example", "null", "https://127.0.0.1", "http://localhost:1"] {
        lab.send("GET", "/sessions?format=json", &[("origin", origin)], "").refused(403, "foreign_page");
    }
    for site in ["cross-site", "same-site"] {
        lab.send("GET", "/lab.js", &[("sec-fetch-site", site)], "").refused(403, "foreign_page");
        let link = [("sec-fetch-site", site), ("sec-fetch-mode", "navigate"), ("sec-fetch-dest", "document")];
        assert_eq!(lab.send("GET", "/", &link, "").status, 200);
        lab.send("GET", "/?format=json", &link, "").refused(403, "foreign_page");
        let frame = [("sec-fetch-site", site), ("sec-fetch-mode", "navigate"), ("sec-fetch-dest", "iframe")];
        lab.send("GET", "/", &frame, "").refused(403, "foreign_page");
    }
    let reply = lab.send("GET", "/", &[], "");
    for header in [
        "content-security-policy: default-src 'none'; script-src 'self';",
        "frame-ancestors 'none'",
        "x-content-type-options: nosniff",
        "cross-origin-resource-policy: same-origin",
        "cache-control: no-store",
    ] {
        assert!(reply.head.contains(header), "{header} in {}", reply.head);
    }
    assert!(!reply.head.contains("unsafe-") && !reply.head.contains("access-control"), "{}", reply.head);
    assert!(
        !reply.body.contains("<style") && !reply.body.contains("onclick") && !reply.body.contains("://"),
        "{}",
        reply.body
    );
}

#[test]
fn a_forged_form_changes_nothing() {
    let (store, id) = (Store::new(), new_id());
    store.run("set", &[&id, "n", "1"]).text();
    let _holder = store.hold(&id, &[]);
    let lab = Lab::start(&[&store.dsn("")]);
    let token = lab.token();
    let own = format!("http://127.0.0.1:{}", lab.port);
    let wish = json!({"backend": "file", "strategy": "no_lock", "requests": 1, "work_ms": 1}).to_string();
    let (json, form) = (("content-type", "application/json"), ("content-type", "application/x-www-form-urlencoded"));
    for path in ["/runs", "/compare", "/sessions/hold", "/sessions/release"] {
        lab.send("POST", path, &[json], &wish).refused(403, "no_token");
        lab.send("POST", path, &[json, ("x-lab-token", "guess")], &wish).refused(403, "no_token");
        lab.send("POST", path, &[form], "backend=file").refused(403, "no_token");
        lab.send("POST", path, &[("content-type", "text/plain"), ("x-lab-token", &token)], &wish).refused(422, "invalid");
        for page in [("origin", "http://evil.example"), ("origin", "null"), ("sec-fetch-site", "cross-site")] {
            lab.send("POST", path, &[json, ("x-lab-token", &token), page], &wish).refused(403, "foreign_page");
        }
        // By a link, as an image, as a script.
        assert!(matches!(lab.send("GET", path, &[("accept", "image/*")], "").status, 200 | 404 | 405));
    }
    lab.send("GET", "/runs/1?format=json", &[], "").refused(404, "not_found");
    assert_eq!(lab.get("/sessions")["sessions"].as_array().unwrap().len(), 1);
    let ours = [json, ("x-lab-token", token.as_str()), ("origin", own.as_str()), ("sec-fetch-site", "same-origin")];
    assert_eq!(lab.send("POST", "/runs", &ours, &wish).status, 202);
}

#[test]
fn markup_comes_back_from_nowhere_and_reaches_no_store() {
    let markup = "<img src=x onerror=alert(1)>";
    let encoded = "%3Cimg%20src%3Dx%20onerror%3Dalert(1)%3E";
    let lab = Lab::start(&["memory://"]);
    for path in [
        format!("/runs/{encoded}"),
        format!("/compare/{encoded}"),
        format!("/{encoded}"),
        format!("/sessions?backend={encoded}&format=json"),
    ] {
        let reply = lab.send("GET", &path, &[("accept", "text/html")], "");
        assert!(matches!(reply.status, 404 | 422) && reply.head.contains("application/json"), "{path} {}", reply.head);
        assert!(!reply.body.contains('<') && !reply.body.contains("onerror"), "{path} {}", reply.body);
    }
    for (path, body) in [
        ("/sessions/release", json!({"backend": "memory", "handle": markup})),
        ("/sessions/release", json!({"backend": markup, "handle": "x"})),
        ("/sessions/hold", json!({"backend": markup})),
        ("/runs", json!({"backend": "memory", "strategy": markup, "requests": 1, "work_ms": 1})),
        ("/runs", json!({"backend": "memory", markup: 1})),
    ] {
        let reply = lab.post(path, &body);
        assert!(!reply.body.contains('<') && !reply.body.contains("onerror"), "{path} {}", reply.body);
    }
    assert_eq!(lab.end(), "");
}

#[test]
fn neither_ids_nor_values_leave_the_lab_and_a_handle_is_no_id() {
    for options in ["", "?hash_ids=off"] {
        let (store, id) = (Store::new(), new_id());
        store.run_with(options, "set", &[&id, "secret", r#""hunter2""#]).text();
        let listed = store.run_with(options, "ls", &["--json"]).object();
        let holder = store.hold_with(options, &id, &[]);
        let lab = Lab::start(&[&store.dsn(options)]);
        let listing = lab.get("/sessions");
        let lock = &listing["locks"][0];
        let handle = lock["handle"].as_str().unwrap();
        assert_eq!(listing["sessions"][0]["handle"], lock["handle"]);
        assert!(lock["holder"].as_str().unwrap().contains(&holder.child.id().to_string()), "{listing}");
        assert!(lock["held_ms"].is_u64() && lock["waiting"] == 0 && lock["ours"] == false, "{listing}");
        // The lock of the kernel is not the lab's to take, and it says whose it is.
        let reply = lab.post("/sessions/release", &json!({"backend": "file", "handle": handle})).json();
        assert_eq!(reply["released"], false, "{reply}");
        assert!(reply["reason"].as_str().unwrap().contains(&format!("pid {}", holder.child.id())), "{reply}");
        // Neither an id nor what the store calls it is a handle.
        for name in [&id, listed["handle"].as_str().unwrap()] {
            let reply = lab.post("/sessions/release", &json!({"backend": "file", "handle": name})).json();
            assert_eq!(reply["reason"], "Nobody holds it any more.");
        }
        run(&["get", &store.dsn(options), &format!("{handle:0>24}")]).refused(1, "no such session");
        let everything = format!("{listing}{}{}", lab.get("/"), lab.run("file", "exclusive"));
        assert!(!everything.contains(&id) && !everything.contains("hunter2"), "{everything}");
        assert!(!everything.contains(listed["handle"].as_str().unwrap()), "{everything}");
    }
}

#[test]
fn a_session_held_for_show_has_a_queue_and_is_released_by_its_handle() {
    let redis = Redis::start(&[]).unwrap();
    let lab = Lab::start(&["memory://", &redis.url()]);
    for backend in ["memory", "redis"] {
        let held = lab.post("/sessions/hold", &json!({"backend": backend}));
        assert_eq!(held.status, 201, "{}", held.body);
        let handle = held.json()["handle"].as_str().unwrap().to_owned();
        let address = format!("/sessions?backend={backend}");
        let of =
            |listing: &Value| listing["locks"].as_array().unwrap().iter().find(|lock| lock["handle"] == *handle).cloned();
        let patience = Instant::now() + Duration::from_secs(10);
        let lock = loop {
            let lock = of(&lab.get(&address)).expect("it is held");
            if lock["waiting"] == 2 || Instant::now() > patience {
                break lock;
            }
        };
        assert!(lock["waiting"] == 2 && lock["ours"] == true && lock["lease_left_ms"].is_u64(), "{lock}");
        let wish = json!({"backend": backend, "handle": handle});
        assert_eq!(lab.post("/sessions/release", &wish).json()["released"], true);
        while lab.get(&address)["sessions"] != json!([]) {
            assert!(Instant::now() < patience, "two waiters hold it for a moment each, and then it is gone");
        }
        assert_eq!(of(&lab.get(&address)), None);
        assert_eq!(lab.post("/sessions/release", &wish).json()["released"], false);
    }
}

#[test]
fn a_lock_of_somebody_else_is_taken_where_a_lock_can_be() {
    let redis = Redis::start(&[]).unwrap();
    let id = new_id();
    run(&["set", &redis.url(), &id, "n", "1"]).text();
    let holder = crate::start_hold(&[&redis.url(), &id]);
    let lab = Lab::start(&[&redis.url()]);
    let handle = lab.get("/sessions")["locks"][0]["handle"].clone();
    let reply = lab.post("/sessions/release", &json!({"backend": "redis", "handle": handle})).json();
    assert_eq!(reply["released"], true, "{reply}");
    assert_eq!(run(&["incr", &redis.url(), &id, "n"]).text(), "2");
    assert_eq!(holder.end().0.code(), Some(1));
}

#[test]
fn what_a_store_says_is_for_the_terminal_and_the_page_gets_a_number() {
    let redis = Redis::start(&["requirepass hunter2"]).unwrap();
    let dsn = format!("redis://:hunter2@127.0.0.1:{}/0?timeout=1s", redis.port());
    let lab = Lab::start(&["memory://", &dsn]);
    assert!(!lab.get("/").to_string().contains("hunter2"));
    redis.kill().unwrap();
    let reply = lab.send("GET", "/sessions?backend=redis&format=json", &[], "");
    reply.refused(503, "store");
    let number = reply.json()["error"]["correlation"].as_str().unwrap().to_owned();
    let said = format!("The store did not do it. The terminal of the lab says more, under {number}.");
    assert_eq!(reply.json()["error"]["message"], said);
    let report = lab.job("/runs", &json!({"backend": "redis", "strategy": "merge", "works_ms": [1]}));
    let run = &report["runs"][0];
    assert_eq!((&report["state"], &run["state"]), (&json!("failed"), &json!("failed")));
    let other = run["correlation"].as_str().unwrap().to_owned();
    let log = lab.end();
    assert!(log.contains(&number) && log.contains(&other) && !log.contains("hunter2"), "{log}");
}

#[test]
fn wishes_beyond_the_limits_are_refused_and_so_is_a_second_run() {
    let lab = Lab::start(&["memory://"]);
    for wish in [
        json!({"backend": "memory", "strategy": "merge", "requests": 201, "work_ms": 1}),
        json!({"backend": "memory", "strategy": "merge", "works_ms": [9999]}),
        json!({"backend": "memory", "requests": 1, "work_ms": 1}),
        json!({"backend": "file", "strategy": "merge", "works_ms": [1]}),
        json!([1]),
    ] {
        lab.post("/runs", &wish).refused(422, "invalid");
    }
    let huge = json!({"backend": "x".repeat(20_000)});
    lab.post("/runs", &huge).refused(422, "invalid");
    let long = json!({"backend": "memory", "strategy": "exclusive", "works_ms": [2000]});
    assert_eq!(lab.post("/runs", &long).status, 202);
    lab.post("/runs", &long).refused(409, "busy");
    assert_eq!(lab.get("/")["busy"], true);
    let running = lab.get("/runs/1");
    assert!(running["state"] == "running" && running["runs"][0]["lost"].is_null(), "{running}");
}

#[test]
fn its_directory_vanishes_with_it_even_in_the_middle_of_a_run() {
    let place = tempfile::tempdir().unwrap();
    let mut child = sessionctl(&["lab", "--port", "0", "--json"])
        .env("TMPDIR", place.path())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut line = String::new();
    BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
    let told: Value = serde_json::from_str(&line).unwrap();
    let port = told["url"].as_str().unwrap().trim_end_matches('/').rsplit_once(':').unwrap().1.parse().unwrap();
    let lab = Lab { child, port, backends: Vec::new() };
    assert_eq!(place.path().read_dir().unwrap().count(), 1);
    for backend in ["file", "sqlite"] {
        assert_eq!(lab.post("/sessions/hold", &json!({"backend": backend})).status, 201);
    }
    let wish = json!({"backend": "file", "strategy": "exclusive", "requests": 100, "work_ms": 500});
    assert_eq!(lab.post("/runs", &wish).status, 202);
    lab.end();
    assert_eq!(place.path().read_dir().unwrap().count(), 0);
}

#[test]
fn without_a_command_the_lab_is_meant_and_a_taken_port_is_named_with_the_cure() {
    // If somebody else has it, so much the better.
    let _taken = TcpListener::bind(("127.0.0.1", 3000));
    run(&[]).refused(2, "port 3000 is taken; --port 0 takes a free one");
}

#[test]
fn a_store_that_is_away_is_left_out_and_asked_again() {
    run(&["lab", "--port", "0", "--dsn", "redis://:hunter2@127.0.0.1:1/0"]).refused(3, "cannot be reached");
    run(&["lab", "--port", "0", "--dsn", "ftp://x"]).refused(2, "unknown scheme");
    let redis = Redis::start(&[]).unwrap();
    redis.kill().unwrap();
    let lab = Lab::start(&["memory://", &redis.url()]);
    let answers = || lab.get("/")["backends"][1]["answers"].clone();
    assert_eq!(answers(), false);
    redis.restart().unwrap();
    assert_eq!(answers(), true);
    assert_eq!(lab.run("redis", "exclusive")["lost"], 0);
    assert!(lab.end().contains("goes on without redis://127.0.0.1"));
}

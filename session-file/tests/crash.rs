//! Many writers at once that are killed at any moment, and holders that are killed or stopped while others wait.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod support;

use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, ChildStdin, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant, SystemTime};

use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{Id, WaitPidFlag, waitid};
use nix::unistd::Pid;
use session_core::{ErrorKind, Expect, OpenRequest, SessionHandler, SessionId, Ttl, WriteId, Written};
use session_file::{Durability, FileConfig, FileHandler};
use support::{
    Chance, LEASE, Place, child_of, child_place, create, id, is_free, number, numbered, record, tree, view, write,
};

/// Sessions that only grow, and one more that is created and destroyed all the time.
const SESSIONS: usize = 4;
const KILLS: usize = 200;
const WRITERS: usize = 3;
/// The lock of a killed process is free within this time, while others who want it are alive and wait for no disk.
const SOON: Duration = Duration::from_secs(2);

/// How late a sleep of this thread wakes up: what a time that was measured beside it may be too long, whoever is to blame.
struct Lateness {
    stop: std::sync::mpsc::Sender<()>,
    thread: JoinHandle<Duration>,
}

impl Lateness {
    fn watch() -> Self {
        let (stop, stopped) = channel();
        let step = Duration::from_millis(10);
        let thread = std::thread::spawn(move || {
            let mut sum = Duration::ZERO;
            loop {
                let started = Instant::now();
                if stopped.recv_timeout(step) != Err(std::sync::mpsc::RecvTimeoutError::Timeout) {
                    return sum;
                }
                sum += started.elapsed().saturating_sub(step + Duration::from_millis(2));
            }
        });
        Self { stop, thread }
    }

    fn end(self) -> Duration {
        let _ = self.stop.send(());
        self.thread.join().unwrap()
    }
}

/// A process that says lines; killed with this value.
struct Process {
    child: Child,
    input: ChildStdin,
    lines: Receiver<String>,
    reader: Option<JoinHandle<()>>,
}

impl Process {
    /// Runs `test` again; `told` sees each line before it can be received.
    fn start(test: &str, place: &str, told: impl Fn(&str) + Send + 'static) -> Self {
        let mut command = child_of(test, place);
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        let (sender, lines) = channel();
        let output = BufReader::new(child.stdout.take().unwrap());
        let reader = std::thread::spawn(move || {
            for line in output.lines().map_while(Result::ok) {
                if let Some((_, line)) = line.split_once('>') {
                    told(line);
                    let _ = sender.send(line.to_owned());
                }
            }
        });
        let input = child.stdin.take().unwrap();
        Self { child, input, lines, reader: Some(reader) }
    }

    fn pid(&self) -> Pid {
        Pid::from_raw(self.child.id() as i32)
    }

    fn line(&self) -> String {
        self.lines.recv_timeout(Duration::from_secs(30)).expect("the child says something")
    }

    fn go_on(&mut self) {
        self.input.write_all(b"\n").unwrap();
    }

    /// Kills it, and returns when it is gone and all that it had said was heard.
    fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
        if let Some(reader) = self.reader.take() {
            reader.join().unwrap();
        }
    }

    /// Stops it, and returns when it stands still.
    fn stop(&self) {
        kill(self.pid(), Signal::SIGSTOP).unwrap();
        waitid(Id::Pid(self.pid()), WaitPidFlag::WSTOPPED | WaitPidFlag::WNOWAIT).unwrap();
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The child's side: a line in one call, so that a kill leaves it whole or not said.
fn say(line: &str) {
    std::io::stdout().write_all(format!(">{line}\n").as_bytes()).unwrap();
    std::io::stdout().flush().unwrap();
}

fn wait_for_parent() {
    if std::io::stdin().read_line(&mut String::new()).unwrap() == 0 {
        std::process::exit(0);
    }
}

/// A runtime whose thread does nothing else, while the caller may block.
fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap()
}

fn soon() -> OpenRequest {
    OpenRequest::exclusive(SOON, LEASE)
}

fn patient() -> OpenRequest {
    OpenRequest::exclusive(Duration::from_secs(30), LEASE)
}

fn handler(dir: &Path, durability: Durability) -> FileHandler {
    FileHandler::open_dir(FileConfig::new(dir).with_durability(durability)).unwrap()
}

/// Runs in a child: counts up in one session after the other until it is killed, and says each number once it is acknowledged.
fn write_for_ever(place: &str, durability: Durability) {
    let parts: Vec<&str> = place.split('|').collect();
    let (dir, mut chance) = (Path::new(parts[0]), Chance::from_seed(parts[1].parse().unwrap()));
    let ids: Vec<SessionId> = parts[2..].iter().map(|id| SessionId::parse(id).unwrap()).collect();
    runtime().block_on(async {
        let handler = handler(dir, durability);
        let mut seen = [0; SESSIONS];
        loop {
            let session = chance.below(ids.len() as u64) as usize;
            let length = 1 + chance.below(20_000) as usize;
            if session == SESSIONS {
                // Killed between any two of these, it may leave anything but a torn record.
                let mut opened = handler.open(&ids[session], &patient().expecting(Expect::Any)).await.unwrap();
                if let Some(record) = opened.read().await.unwrap() {
                    number(session as u64, &record.data);
                    opened.destroy().await.unwrap();
                } else {
                    let _ = write(&mut opened, &numbered(session as u64, 1, length)).await.unwrap();
                }
                opened.close().await.unwrap();
                continue;
            }
            let mut opened = handler.open(&ids[session], &patient()).await.unwrap();
            let before = number(session as u64, &opened.read().await.unwrap().unwrap().data);
            assert!(before >= seen[session], "session {session} went back");
            if chance.below(4) == 0 {
                opened.touch(Ttl::from_secs(3600 + before)).await.unwrap();
            }
            seen[session] = before + 1;
            write(&mut opened, &numbered(session as u64, before + 1, length)).await.unwrap();
            say(&format!("{session} {}", before + 1));
            opened.close().await.unwrap();
        }
    });
}

/// What the writers have said of each session: the highest number, and how many there were.
#[derive(Default)]
struct Said([(AtomicU64, AtomicU64); SESSIONS]);

impl Said {
    fn note(&self, line: &str) {
        let (session, number) = line.split_once(' ').unwrap();
        let (highest, count) = &self.0[session.parse::<usize>().unwrap()];
        highest.fetch_max(number.parse().unwrap(), Ordering::SeqCst);
        count.fetch_add(1, Ordering::SeqCst);
    }
}

fn kill_writers(test: &'static str, durability: Durability) {
    if let Some(place) = child_place() {
        return write_for_ever(&place, durability);
    }
    let (place, mut chance, runtime) = (Place::new(), Chance::new(), runtime());
    let handler = handler(&place.dir(), durability);
    let ids: Vec<SessionId> = std::iter::repeat_with(id).take(SESSIONS + 1).collect();
    runtime.block_on(async {
        for (session, id) in ids[..SESSIONS].iter().enumerate() {
            create(&handler, id, &numbered(session as u64, 0, 100)).await;
        }
    });
    let said = Arc::new(Said::default());
    let names = ids.iter().map(SessionId::as_str).collect::<Vec<_>>().join("|");
    let start = |chance: &mut Chance| {
        let told = format!("{}|{}|{names}", place.dir().display(), chance.next());
        let said = Arc::clone(&said);
        Process::start(test, &told, move |line| said.note(line))
    };
    let mut writers: Vec<Process> = (0..WRITERS).map(|_| start(&mut chance)).collect();
    let mut last = [0; SESSIONS];
    for round in 0..KILLS {
        let victim = chance.below(WRITERS as u64) as usize;
        if round % 2 == 0 {
            // At work for sure; otherwise perhaps at its start.
            writers[victim].line();
        }
        std::thread::sleep(Duration::from_micros(chance.below(4000)));
        writers[victim].kill();
        let started = Instant::now();
        runtime.block_on(async {
            let session = round % SESSIONS;
            let said = said.0[session].0.load(Ordering::SeqCst);
            let seen = number(session as u64, &view(&handler, &ids[session]).await.unwrap().expect("it is there"));
            assert!(seen >= said, "round {round}: {said} was acknowledged, {seen} is there");
            let lateness = Lateness::watch();
            let opened = handler.open(&ids[session], &patient()).await;
            let took = started.elapsed().saturating_sub(lateness.end());
            let mut opened = opened.unwrap();
            assert!(took < SOON || durability > Durability::None, "round {round}: the lock was free after {took:?}");
            let locked = number(session as u64, &opened.read().await.unwrap().expect("it is there").data);
            assert!(locked >= seen && locked >= last[session], "round {round}: it went back");
            last[session] = locked;
            opened.close().await.unwrap();
            if let Some(data) = view(&handler, &ids[SESSIONS]).await.unwrap() {
                number(SESSIONS as u64, &data);
            }
        });
        writers[victim] = start(&mut chance);
    }
    writers.iter_mut().for_each(Process::kill);
    runtime.block_on(async {
        let mut unsaid = 0;
        for (session, id) in ids[..SESSIONS].iter().enumerate() {
            let mut opened = handler.open(id, &soon()).await.unwrap();
            let (highest, count) = &said.0[session];
            let seen = number(session as u64, &opened.read().await.unwrap().unwrap().data);
            assert!(seen >= highest.load(Ordering::SeqCst));
            // Each number is one write, so a lost update would leave fewer than were said.
            unsaid += seen.checked_sub(count.load(Ordering::SeqCst)).expect("no acknowledged write is lost");
            assert!(count.load(Ordering::SeqCst) > 20, "session {session} was hardly written");
            opened.close().await.unwrap();
        }
        assert!(unsaid <= (KILLS + WRITERS) as u64, "{unsaid} writes were not acknowledged, more than there were kills");
        let mut opened = handler.open(&ids[SESSIONS], &soon().expecting(Expect::Any)).await.unwrap();
        opened.read().await.unwrap();
        write(&mut opened, b"afterwards").await.unwrap();
        opened.close().await.unwrap();
    });
    let files = tree(&place.dir());
    assert_eq!(files.len(), SESSIONS + 1, "the killed left nothing behind");
    assert!(files.iter().all(|path| is_free(path)));
}

#[test]
fn killed_writers_lose_nothing_that_was_acknowledged_without_syncs() {
    kill_writers("killed_writers_lose_nothing_that_was_acknowledged_without_syncs", Durability::None);
}

#[test]
fn killed_writers_lose_nothing_that_was_acknowledged_with_data_synced() {
    kill_writers("killed_writers_lose_nothing_that_was_acknowledged_with_data_synced", Durability::Data);
}

#[test]
fn killed_writers_lose_nothing_that_was_acknowledged_with_all_synced() {
    kill_writers("killed_writers_lose_nothing_that_was_acknowledged_with_all_synced", Durability::Full);
}

/// Runs in a child: holds a session, and saves when told.
fn hold(place: &str) {
    let (dir, id) = place.split_once('|').unwrap();
    let id = SessionId::parse(id).unwrap();
    runtime().block_on(async {
        let handler = handler(Path::new(dir), Durability::None);
        let mut opened = handler.open(&id, &patient()).await.unwrap();
        say("held");
        wait_for_parent();
        let saved = opened.write(&record(b"of the stopped"), WriteId::random().unwrap()).await.unwrap();
        opened.close().await.unwrap();
        say(if saved == Written::Applied { "applied" } else { "not applied" });
    });
}

#[test]
fn a_killed_holder_lets_the_first_of_another_process_in_within_a_second() {
    if let Some(place) = child_place() {
        return hold(&place);
    }
    let (place, id, runtime) = (Place::new(), id(), runtime());
    let handler = place.handler();
    let told = format!("{}|{}", place.dir().display(), id.as_str());
    runtime.block_on(create(&handler, &id, b"before"));
    for _ in 0..10 {
        let mut holder =
            Process::start("a_killed_holder_lets_the_first_of_another_process_in_within_a_second", &told, |_| {});
        assert_eq!(holder.line(), "held");
        let waiter = {
            let (handler, id) = (handler.clone(), id.clone());
            runtime.spawn(async move {
                let mut opened = handler.open(&id, &patient()).await.unwrap();
                let now = Instant::now();
                assert_eq!(opened.read().await.unwrap().unwrap().data, b"before");
                opened.close().await.unwrap();
                now
            })
        };
        runtime.block_on(async {
            while handler.admin().unwrap().locks(support::many()).await.unwrap()[0].waiting != Some(1) {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        });
        let (lateness, killed) = (Lateness::watch(), Instant::now());
        holder.kill();
        let came = runtime.block_on(waiter).unwrap();
        let took = came.duration_since(killed).saturating_sub(lateness.end());
        assert!(took < Duration::from_secs(1), "{took:?}");
    }
}

#[test]
fn the_line_of_a_former_holder_is_not_taken_for_that_of_the_next() {
    let (place, id) = (Place::new(), id());
    let handler = place.handler();
    runtime().block_on(async {
        create(&handler, &id, b"before").await;
        let mut first = handler.open(&id, &patient()).await.unwrap();
        let held = first.held().unwrap().clone();
        held.lock.renew(&[held.lease]).await.remove(0).unwrap();
        first.close().await.unwrap();
        tokio::time::sleep(Duration::from_secs(1)).await;
        let (before, _second) = (SystemTime::now(), handler.open(&id, &patient()).await.unwrap());
        let error = handler.open(&id, &OpenRequest::exclusive(Duration::ZERO, LEASE)).await.unwrap_err();
        let since = error.holder().expect("the holder is known").since;
        assert!(since >= before - Duration::from_millis(50), "{error}: but it was opened only now");
    });
}

#[test]
fn a_stopped_holder_is_named_to_those_whose_wait_ends_in_time() {
    if let Some(place) = child_place() {
        return hold(&place);
    }
    let (place, id, runtime) = (Place::new(), id(), runtime());
    let handler = place.handler();
    runtime.block_on(create(&handler, &id, b"before"));
    let told = format!("{}|{}", place.dir().display(), id.as_str());
    let mut holder = Process::start("a_stopped_holder_is_named_to_those_whose_wait_ends_in_time", &told, |_| {});
    assert_eq!(holder.line(), "held");
    let held_at = SystemTime::now();
    holder.stop();
    std::thread::sleep(Duration::from_secs(2));
    for wait in [0, 1, 300, 1000].map(Duration::from_millis) {
        let (waited, slept) = runtime.block_on(async {
            let started = Instant::now();
            let sleep = tokio::spawn(async move {
                tokio::time::sleep(wait).await;
                started.elapsed()
            });
            let error = handler.open(&id, &OpenRequest::exclusive(wait, LEASE)).await.unwrap_err();
            let waited = started.elapsed();
            assert_eq!(error.kind(), ErrorKind::LockTimeout, "{error:?}");
            let named = error.holder().expect("the holder is known");
            assert!(named.process.contains(&holder.pid().to_string()), "{} is not {}", named.process, holder.pid());
            let off = match named.since.duration_since(held_at) {
                Ok(after) => after,
                Err(before) => before.duration(),
            };
            assert!(off < Duration::from_secs(1), "it is said to be held since {off:?} off");
            support::keeps_secret(&error, &id);
            (waited, sleep.await.unwrap())
        });
        let off = waited.abs_diff(slept);
        assert!(off < Duration::from_millis(250), "a wait of {wait:?} took {waited:?}, a sleep {slept:?}");
        assert!(waited >= wait, "a wait of {wait:?} took {waited:?}");
    }
    assert_eq!(runtime.block_on(view(&handler, &id)).unwrap().unwrap(), b"before", "a reader does not wait");
    kill(holder.pid(), Signal::SIGCONT).unwrap();
    holder.go_on();
    assert_eq!(holder.line(), "applied");
    assert_eq!(runtime.block_on(view(&handler, &id)).unwrap().unwrap(), b"of the stopped");
}

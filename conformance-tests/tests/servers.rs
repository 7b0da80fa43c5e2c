//! The servers do what they say: they come up, stand still, die, come back with their data, and never outlive a test.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use conformance_tests::servers::Redis;

const SOON: Duration = Duration::from_millis(300);
const LONG: Duration = Duration::from_secs(20);

/// Waits for what happens without us.
#[track_caller]
fn eventually(what: &str, mut happened: impl FnMut() -> bool) {
    let end = Instant::now() + LONG;
    while !happened() {
        assert!(Instant::now() < end, "{what} did not happen");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// A client that knows lines.
fn connect(redis: &Redis) -> io::Result<BufReader<TcpStream>> {
    let stream = TcpStream::connect(redis.address())?;
    stream.set_read_timeout(Some(LONG))?;
    Ok(BufReader::new(stream))
}

fn line(client: &mut BufReader<TcpStream>) -> io::Result<String> {
    let mut line = String::new();
    client.read_line(&mut line)?;
    Ok(line.trim_end().to_owned())
}

fn ask(client: &mut BufReader<TcpStream>, command: &str) -> io::Result<String> {
    client.get_mut().write_all(format!("{command}\r\n").as_bytes())?;
    line(client)
}

#[test]
fn a_server_answers_on_its_port_and_on_its_socket() -> io::Result<()> {
    let redis = Redis::start(&[])?;
    assert_eq!(ask(&mut connect(&redis)?, "PING")?, "+PONG");
    assert_eq!(redis.command(&["PING"])?, "PONG");
    assert_eq!(redis.url(), format!("redis://127.0.0.1:{}/0", redis.port()));
    assert!(redis.socket_path().exists());
    let information = redis.command(&["INFO", "server"])?;
    let process = format!("process_id:{}", redis.pid().expect("it runs"));
    assert!(information.lines().any(|line| line == process), "{process} is not in {information}");
    Ok(())
}

#[test]
fn replies_of_every_kind_come_back_as_text() -> io::Result<()> {
    let redis = Redis::start(&[])?;
    assert_eq!(redis.command(&["GET", "absent"])?, "");
    assert_eq!(redis.command(&["SET", "text", "two\r\nlines"])?, "OK");
    assert_eq!(redis.command(&["GET", "text"])?, "two\r\nlines");
    assert_eq!(redis.command(&["RPUSH", "list", "1", "", "3"])?, "3");
    assert_eq!(redis.command(&["LRANGE", "list", "0", "-1"])?, "1\n\n3");
    let refused = redis.command(&["INCR", "text"]).expect_err("it is no number");
    assert_eq!(refused.to_string(), "ERR value is not an integer or out of range");
    Ok(())
}

#[test]
fn an_option_is_a_line_of_the_configuration() -> io::Result<()> {
    let redis = Redis::start(&["requirepass secret", "maxmemory 10mb", "user alice on >hers ~app:* +get"])?;
    let mut client = connect(&redis)?;
    assert!(ask(&mut client, "GET color")?.starts_with("-NOAUTH"));
    assert_eq!(ask(&mut client, "AUTH secret")?, "+OK");
    assert_eq!(ask(&mut client, "SET color green")?, "+OK");
    assert_eq!(ask(&mut client, "AUTH alice hers")?, "+OK");
    assert!(ask(&mut client, "GET color")?.starts_with("-NOPERM"));
    assert_eq!(redis.command(&["GET", "color"])?, "green");
    assert_eq!(redis.command(&["CONFIG", "GET", "maxmemory"])?, "maxmemory\n10485760");
    assert!(!format!("{redis:?}").contains("secret"));
    Ok(())
}

#[test]
fn an_option_that_the_server_refuses_is_an_error_with_its_words() {
    let refused = Redis::start(&["maxmemory plenty"]).expect_err("there is no such number");
    assert!(refused.to_string().contains("maxmemory plenty"), "{refused}");
}

#[test]
fn a_frozen_server_accepts_and_says_nothing_until_it_goes_on() -> io::Result<()> {
    let redis = Redis::start(&[])?;
    let mut before = connect(&redis)?;
    redis.freeze()?;
    let mut after = connect(&redis)?;
    for client in [&mut before, &mut after] {
        client.get_mut().write_all(b"PING\r\n")?;
        client.get_mut().set_read_timeout(Some(SOON))?;
        let silence = client.read(&mut [0]).expect_err("it stands still");
        assert_eq!(silence.kind(), io::ErrorKind::WouldBlock);
        client.get_mut().set_read_timeout(Some(LONG))?;
    }
    redis.resume()?;
    assert_eq!((line(&mut before)?, line(&mut after)?), ("+PONG".to_owned(), "+PONG".to_owned()));
    Ok(())
}

#[test]
fn a_killed_server_refuses_and_comes_back_at_its_place_with_what_it_had_on_disk() -> io::Result<()> {
    let (durable, fleeting) = (Redis::start(&["appendonly yes"])?, Redis::start(&[])?);
    for (redis, after) in [(&durable, "green"), (&fleeting, "")] {
        let address = redis.address();
        redis.command(&["SET", "color", "green"])?;
        let mut client = connect(redis)?;
        assert_eq!(ask(&mut client, "PING")?, "+PONG");
        let first = redis.pid();
        redis.kill()?;
        redis.kill()?;
        assert_eq!(redis.pid(), None);
        assert_eq!(line(&mut client)?, "", "the connection is not closed");
        assert_eq!(connect(redis).expect_err("nobody listens").kind(), io::ErrorKind::ConnectionRefused);
        assert_eq!(redis.freeze().expect_err("nobody is there").kind(), io::ErrorKind::NotConnected);
        assert!(redis.command(&["PING"]).is_err());
        redis.restart()?;
        assert_eq!(redis.address(), address);
        assert_ne!(redis.pid(), first);
        assert_eq!(ask(&mut connect(redis)?, "PING")?, "+PONG");
        assert_eq!(redis.command(&["GET", "color"])?, after);
    }
    Ok(())
}

#[test]
fn a_frozen_server_can_be_killed_restarted_and_dropped() -> io::Result<()> {
    let redis = Redis::start(&[])?;
    redis.freeze()?;
    redis.kill()?;
    redis.restart()?;
    redis.freeze()?;
    redis.restart()?;
    redis.freeze()?;
    let (pid, directory) = (redis.pid().expect("it runs"), redis.directory().to_owned());
    drop(redis);
    assert!(!runs(pid) && !directory.exists());
    Ok(())
}

#[test]
fn a_port_that_somebody_else_took_is_told() -> io::Result<()> {
    let redis = Redis::start(&[])?;
    redis.kill()?;
    let thief = TcpListener::bind(redis.address())?;
    assert_eq!(redis.restart().expect_err("the port is taken").kind(), io::ErrorKind::AddrInUse);
    drop(thief);
    redis.restart()
}

#[test]
fn servers_of_the_same_moment_do_not_meet() -> io::Result<()> {
    let start = |number: usize| {
        let redis = Redis::start(&[])?;
        redis.command(&["SET", "number", &number.to_string()])?;
        io::Result::Ok(redis)
    };
    let servers: Vec<Redis> = std::thread::scope(|threads| {
        let starting: Vec<_> = (0..8).map(|number| threads.spawn(move || start(number))).collect();
        starting.into_iter().map(|thread| thread.join().expect("no start panics")).collect::<io::Result<_>>()
    })?;
    for (number, redis) in servers.iter().enumerate() {
        assert_eq!(redis.command(&["GET", "number"])?, number.to_string());
        assert_eq!(ask(&mut connect(redis)?, "GET number")?, "$1");
    }
    Ok(())
}

#[test]
fn a_monitor_tells_each_command_once() -> io::Result<()> {
    let redis = Redis::start(&[])?;
    redis.command(&["SET", "before", "1"])?;
    let (mut monitor, mut other) = (redis.monitor()?, redis.monitor()?);
    let mut client = connect(&redis)?;
    for _ in 0..3 {
        ask(&mut client, "INCR counter")?;
    }
    let told = monitor.lines()?;
    assert_eq!(told.len(), 3, "{told:?}");
    assert!(told.iter().all(|line| line.ends_with(r#"] "INCR" "counter""#)), "{told:?}");
    assert_eq!(monitor.lines()?, [""; 0]);
    redis.command(&["EVAL", "return redis.call('GET', 'counter')", "0"])?;
    let told = monitor.lines()?;
    assert!(told.iter().any(|line| line.ends_with(r#" lua] "GET" "counter""#)), "{told:?}");
    assert_eq!(other.lines()?.len(), 3 + told.len());
    Ok(())
}

/// Tells this executable what to do when a test starts it anew, for that same test.
const PART: &str = "PART_OF_A_TEST_OF_SERVERS";

/// Begins what the other process says; the test runner talks too.
const MARK: &str = "@told ";

fn start_part(test: &str, part: &str) -> Command {
    let mut command = Command::new(std::env::current_exe().expect("this executable is known"));
    command.args([test, "--exact", "--nocapture"]).env(PART, part).stdin(Stdio::null()).stdout(Stdio::piped());
    command
}

fn tell(word: &str) {
    println!("\n{MARK}{word}");
}

fn told(output: impl io::Read) -> String {
    let mut lines = BufReader::new(output).lines().map_while(Result::ok);
    lines.find_map(|line| line.strip_prefix(MARK).map(str::to_owned)).expect("the other process tells something")
}

/// Says whether a process is there; one that only waits to be buried is not.
fn runs(pid: u32) -> bool {
    let status = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    status.rsplit_once(") ").is_some_and(|(_, state)| !state.starts_with('Z'))
}

#[test]
fn a_server_ends_with_the_process_that_started_it_however_that_ends() -> io::Result<()> {
    if let Ok(part) = std::env::var(PART) {
        let redis = Redis::start(&[])?;
        if part.contains("frozen") {
            redis.freeze()?;
        }
        tell(&format!("{} {}", redis.pid().expect("it runs"), redis.directory().display()));
        if part.contains("exits") {
            std::process::exit(0);
        }
        loop {
            std::thread::park();
        }
    }
    let test = "a_server_ends_with_the_process_that_started_it_however_that_ends";
    for part in ["killed", "killed, server frozen", "exits", "exits, server frozen"] {
        let mut parent = start_part(test, part).spawn()?;
        let words = told(parent.stdout.take().expect("it was piped"));
        let (pid, directory) = words.split_once(' ').expect("two words");
        let (pid, directory): (u32, PathBuf) = (pid.parse().expect("a number"), directory.into());
        if part.contains("killed") {
            assert!(runs(pid), "{part}: it does not run");
            parent.kill()?;
        }
        parent.wait()?;
        eventually(&format!("{part}: the end of the server"), || !runs(pid));
        eventually(&format!("{part}: the end of its directory"), || !directory.exists());
    }
    Ok(())
}

#[test]
fn a_missing_program_is_an_error_that_names_its_package() -> io::Result<()> {
    if std::env::var_os(PART).is_some() {
        let missing = Redis::start(&[]).expect_err("there is no such program on the path");
        assert_eq!(missing.kind(), io::ErrorKind::NotFound);
        tell(&missing.to_string());
        return Ok(());
    }
    let empty = tempfile::tempdir()?;
    let test = "a_missing_program_is_an_error_that_names_its_package";
    let output = start_part(test, "without a path").env("PATH", empty.path()).output()?;
    assert!(output.status.success());
    let text = told(output.stdout.as_slice());
    assert!(text.contains("redis-server (Debian package redis-server)"), "{text}");
    Ok(())
}

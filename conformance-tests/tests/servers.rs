//! The servers do what they say: they come up, stand still, die, come back with their data, and never outlive a test.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use conformance_tests::servers::{MariaDb, Memcached, PgBouncer, Postgres, Redis, RedisCluster, RedisSentinel};

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

/// The client of the server's own package, which knows TLS.
fn redis_cli(redis: &Redis, words: &[&str]) -> io::Result<String> {
    let port = redis.port().to_string();
    let output = Command::new("redis-cli").args(["-h", "localhost", "-p", &port]).args(words).output()?;
    Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

#[test]
fn a_server_with_tls_is_trusted_by_who_trusts_its_authority_and_by_nobody_else() -> io::Result<()> {
    let (redis, other) = (Redis::start_tls(&[])?, Redis::start_tls(&[])?);
    assert_eq!(redis.url(), format!("rediss://127.0.0.1:{}/0", redis.port()));
    let path = |redis: &Redis| redis.ca_path().expect("it has one").display().to_string();
    assert_eq!(redis_cli(&redis, &["--tls", "--cacert", &path(&redis), "PING"])?, "PONG");
    assert_ne!(redis_cli(&redis, &["--tls", "--cacert", &path(&other), "PING"])?, "PONG");
    assert_ne!(redis_cli(&redis, &["PING"])?, "PONG");
    assert_eq!(redis.command(&["PING"])?, "PONG");
    redis.restart()?;
    assert_eq!(redis_cli(&redis, &["--tls", "--cacert", &path(&redis), "PING"])?, "PONG");
    assert_eq!(Redis::start(&[])?.ca_path(), None);
    Ok(())
}

fn ports(nodes: &[&Redis]) -> Vec<u16> {
    nodes.iter().map(|node| node.port()).collect()
}

#[test]
fn a_cluster_replaces_a_master_that_dies_and_takes_it_back_as_a_replica() -> io::Result<()> {
    let cluster = RedisCluster::start(3, 1)?;
    assert_eq!((cluster.nodes().len(), cluster.addresses().len()), (6, 6));
    let first = ports(&cluster.masters()?);
    assert_eq!(first, ports(&cluster.nodes()[..3].iter().collect::<Vec<_>>()));
    let mut owners: Vec<_> =
        ["a", "b", "c"].map(|key| cluster.master_of(key).map(Redis::port)).into_iter().collect::<io::Result<_>>()?;
    for (key, owner) in ["a", "b", "c"].into_iter().zip(&owners) {
        let node = cluster.master_of(key)?;
        assert_eq!(node.port(), *owner);
        assert_eq!(node.command(&["SET", key, "green"])?, "OK");
        assert_eq!(node.command(&["WAIT", "1", "5000"])?, "1");
    }
    owners.sort_unstable();
    owners.dedup();
    assert_eq!(owners.len(), 3, "the three keys were chosen to live on three nodes");

    let dead = cluster.kill_master_of("a")?;
    assert!(!dead.is_up());
    cluster.wait_until_whole()?;
    let heir = cluster.master_of("a")?;
    assert_ne!(heir.port(), dead.port());
    assert_eq!(heir.command(&["GET", "a"])?, "green");
    let second = ports(&cluster.masters()?);
    assert!(second.len() == 3 && second != first, "{first:?} {second:?}");

    dead.restart()?;
    cluster.wait_until_whole()?;
    assert_eq!(ports(&cluster.masters()?), second);
    let role = dead.command(&["ROLE"])?;
    assert!(role.starts_with("slave\n"), "{role}");
    Ok(())
}

#[test]
fn a_cluster_replaces_a_master_that_stands_still() -> io::Result<()> {
    let cluster = RedisCluster::start(3, 1)?;
    let frozen = cluster.master_of("key")?;
    frozen.freeze()?;
    cluster.wait_until_whole()?;
    let heir = cluster.master_of("key")?;
    assert_ne!(heir.port(), frozen.port());
    frozen.resume()?;
    cluster.wait_until_whole()?;
    assert_eq!(cluster.master_of("key")?.port(), heir.port());
    let moved = frozen.command(&["GET", "key"]).expect_err("it is no master any more");
    assert!(moved.to_string().starts_with("MOVED "), "{moved}");
    Ok(())
}

#[test]
fn a_slot_that_moves_asks_and_then_has_moved() -> io::Result<()> {
    let cluster = RedisCluster::start_with(2, 0, &["requirepass secret", "masterauth secret"])?;
    let old = cluster.master_of("key")?;
    let new = cluster.nodes().iter().find(|node| node.port() != old.port()).expect("there are two");
    old.command(&["SET", "key", "green"])?;
    let mut between = String::new();
    cluster.move_slot_of("key", new, || {
        between = old.command(&["GET", "key"]).expect_err("it is there no more").to_string();
        Ok(())
    })?;
    assert!(between.starts_with("ASK ") && between.ends_with(&new.address().to_string()), "{between}");
    let after = old.command(&["GET", "key"]).expect_err("it is there no more").to_string();
    assert!(after.starts_with("MOVED ") && after.ends_with(&new.address().to_string()), "{after}");
    assert_eq!(new.command(&["GET", "key"])?, "green");
    assert_eq!(cluster.master_of("key")?.port(), new.port());
    Ok(())
}

#[test]
fn sentinels_replace_a_master_that_dies_and_take_it_back_as_a_replica() -> io::Result<()> {
    let group = RedisSentinel::start()?;
    let first = group.master()?;
    assert_eq!(first.port(), group.nodes()[0].port());
    assert_eq!((group.nodes().len(), group.sentinels().len(), group.addresses().len()), (3, 3, 3));
    first.command(&["SET", "color", "green"])?;
    assert_eq!(first.command(&["WAIT", "2", "5000"])?, "2");

    assert_eq!(group.kill_master()?.port(), first.port());
    group.wait_until_whole()?;
    let second = group.master()?;
    assert_ne!(second.port(), first.port());
    assert_eq!(second.command(&["GET", "color"])?, "green");
    let address = ["SENTINEL", "GET-MASTER-ADDR-BY-NAME", group.master_name()];
    for sentinel in group.sentinels() {
        assert_eq!(sentinel.command(&address)?, format!("127.0.0.1\n{}", second.port()));
    }

    first.restart()?;
    group.wait_until_whole()?;
    assert_eq!(group.master()?.port(), second.port());
    let role = first.command(&["ROLE"])?;
    assert!(role.starts_with("slave\n"), "{role}");
    Ok(())
}

#[test]
fn sentinels_replace_a_master_that_stands_still() -> io::Result<()> {
    let group = RedisSentinel::start()?;
    let frozen = group.master()?;
    frozen.freeze()?;
    group.wait_until_whole()?;
    let heir = group.master()?;
    assert_ne!(heir.port(), frozen.port());
    frozen.resume()?;
    group.wait_until_whole()?;
    assert_eq!(group.master()?.port(), heir.port());
    Ok(())
}

/// Says whether the server does something within a moment.
fn says_nothing(answer: impl FnOnce() + Send + 'static) -> bool {
    let (done, wait) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        answer();
        let _ = done.send(());
    });
    wait.recv_timeout(SOON).is_err()
}

#[test]
fn postgres_answers_on_its_port_and_on_its_socket() -> io::Result<()> {
    let postgres = Postgres::start(&[])?;
    assert_eq!(postgres.url(), format!("postgres://sessionkit:conformance@{}/sessionkit", postgres.address()));
    assert_eq!(postgres.url_of("a", "b:c"), format!("postgres://a:b%3Ac@{}/sessionkit", postgres.address()));
    assert!(postgres.socket_path().exists());
    assert_eq!(
        postgres.query("SELECT current_user, current_database(), inet_server_port()")?,
        [["postgres", "sessionkit", ""]]
    );
    let owned = postgres
        .query("SELECT rolname FROM pg_database d JOIN pg_roles r ON r.oid = datdba WHERE datname = 'sessionkit'")?;
    assert_eq!(owned, [["sessionkit"]]);
    let psql = |url: &str| Command::new("psql").args([url, "-Atc", "CREATE TABLE t (n int); SELECT current_user"]).output();
    let output = psql(&postgres.url())?;
    assert_eq!(String::from_utf8_lossy(&output.stdout), "CREATE TABLE\nsessionkit\n", "{output:?}");
    let output = psql(&postgres.url_of("sessionkit", "wrong"))?;
    assert!(String::from_utf8_lossy(&output.stderr).contains("password authentication failed"), "{output:?}");
    Ok(())
}

#[test]
fn rows_of_postgres_come_back_as_text() -> io::Result<()> {
    let postgres = Postgres::start(&[])?;
    assert_eq!(postgres.query("CREATE TABLE colors (id int PRIMARY KEY, color text)")?, [[""; 0]; 0]);
    postgres.query("INSERT INTO colors VALUES (1, 'grün'), (2, NULL), (3, E'two\\nlines')")?;
    let rows = postgres.query("SELECT * FROM colors ORDER BY id; SELECT 'more'")?;
    assert_eq!(rows, [vec!["1", "grün"], vec!["2", ""], vec!["3", "two\nlines"], vec!["more"]]);
    let mut connection = postgres.connect()?;
    let refused = connection.query("INSERT INTO colors VALUES (1, 'red')").expect_err("the key is there");
    assert!(refused.to_string().starts_with("23505: duplicate key"), "{refused}");
    assert_eq!(connection.query("SELECT count(*) FROM colors")?, [["3"]]);
    let me = connection.query("SELECT pg_backend_pid()")?;
    postgres.query(&format!("SELECT pg_terminate_backend({}, 5000)", me[0][0]))?;
    let ended = connection.query("SELECT 1").expect_err("somebody has ended it");
    assert!(ended.to_string().starts_with("57P01: "), "{ended}");
    Ok(())
}

#[test]
fn an_option_of_postgres_is_a_line_of_the_configuration() -> io::Result<()> {
    let postgres = Postgres::start(&["fsync = on", "work_mem = '3MB'"])?;
    assert_eq!(postgres.query("SHOW fsync; SHOW work_mem; SHOW max_connections")?, [["on"], ["3MB"], ["200"]]);
    let refused = Postgres::start(&["work_mem = plenty"]).expect_err("there is no such number");
    assert!(refused.to_string().contains("invalid value for parameter \"work_mem\": \"plenty\""), "{refused}");
    Ok(())
}

#[test]
fn a_frozen_postgres_accepts_and_says_nothing_until_it_goes_on() -> io::Result<()> {
    let postgres = Arc::new(Postgres::start(&[])?);
    let mut before = postgres.connect()?;
    before.query("BEGIN; CREATE TABLE colors (color text)")?;
    postgres.freeze()?;
    assert!(!postgres.is_up());
    TcpStream::connect(postgres.address())?;
    let shared = Arc::clone(&postgres);
    assert!(says_nothing(move || drop(shared.query("SELECT 1"))), "a new connection is answered");
    let asking = std::thread::spawn(move || before.query("INSERT INTO colors VALUES ('green'); COMMIT").map(|_| before));
    std::thread::sleep(SOON);
    assert!(!asking.is_finished(), "an old connection is answered");
    postgres.resume()?;
    asking.join().expect("it does not panic")?;
    assert_eq!(postgres.query("SELECT * FROM colors")?, [["green"]]);
    Ok(())
}

#[test]
fn a_killed_postgres_refuses_and_comes_back_at_its_place_with_what_it_has_acknowledged() -> io::Result<()> {
    let postgres = Postgres::start(&[])?;
    postgres.query("CREATE TABLE colors (color text)")?;
    let ends: [(&str, &dyn Fn() -> io::Result<()>); 3] = [
        ("killed", &|| postgres.kill()),
        ("frozen and killed", &|| postgres.freeze().and_then(|()| postgres.kill())),
        ("stopped", &|| postgres.stop_immediate()),
    ];
    for (name, end) in ends {
        let (address, pid) = (postgres.address(), postgres.pid());
        postgres.query(&format!("INSERT INTO colors VALUES ('{name}')"))?;
        let mut lost = postgres.connect()?;
        lost.query("BEGIN; INSERT INTO colors VALUES ('lost')")?;
        // Who is stopped in the middle of an answer does not begin another.
        std::thread::sleep(SOON);
        end()?;
        postgres.kill()?;
        postgres.stop_immediate()?;
        assert_eq!((postgres.pid(), postgres.is_up()), (None, false));
        let told = lost.query("COMMIT").expect_err("nobody is there");
        assert_eq!(told.to_string().starts_with("57P01: "), name == "stopped", "{name}: {told}");
        assert_eq!(TcpStream::connect(address).expect_err("nobody listens").kind(), io::ErrorKind::ConnectionRefused);
        assert_eq!(postgres.freeze().expect_err("nobody is there").kind(), io::ErrorKind::NotConnected);
        postgres.restart()?;
        assert_eq!(postgres.address(), address);
        assert_ne!(postgres.pid(), pid);
        let kept = postgres.query(&format!("SELECT count(*) FROM colors WHERE color IN ('{name}', 'lost')"))?;
        assert_eq!(kept, [["1"]], "{name}");
    }
    // Without an end in between, and while one of its processes does something that takes longer.
    let (mut busy, pid) = (postgres.connect()?, postgres.pid());
    let busy = std::thread::spawn(move || busy.query("SELECT pg_sleep(100)"));
    eventually("the long query", || {
        postgres.query("SELECT FROM pg_stat_activity WHERE query = 'SELECT pg_sleep(100)'").is_ok_and(|rows| rows.len() == 1)
    });
    postgres.restart()?;
    assert_ne!(postgres.pid(), pid);
    busy.join().expect("it does not panic").expect_err("it was killed");
    assert_eq!(postgres.query("SELECT count(*) FROM colors")?, [["3"]]);
    Ok(())
}

#[test]
fn a_port_that_somebody_else_took_from_postgres_is_told() -> io::Result<()> {
    let postgres = Postgres::start(&[])?;
    postgres.kill()?;
    let thief = TcpListener::bind(postgres.address())?;
    assert_eq!(postgres.restart().expect_err("the port is taken").kind(), io::ErrorKind::AddrInUse);
    drop(thief);
    postgres.restart()
}

#[test]
fn mariadb_answers_on_its_port_and_on_its_socket() -> io::Result<()> {
    let mariadb = MariaDb::start(&[])?;
    assert_eq!(mariadb.url(), format!("mysql://sessionkit:conformance@{}/sessionkit", mariadb.address()));
    assert_eq!(mariadb.url_of("a", "b:c"), format!("mysql://a:b%3Ac@{}/sessionkit", mariadb.address()));
    assert!(mariadb.socket_path().exists());
    let me = mariadb.query("SELECT current_user(), database(), @@port, @@character_set_server")?;
    assert_eq!(me, [["root@localhost", "sessionkit", &mariadb.port().to_string(), "utf8mb4"]]);
    let mut client = TcpStream::connect(mariadb.address())?;
    client.set_read_timeout(Some(LONG))?;
    let mut greeting = [0; 40];
    client.read_exact(&mut greeting)?;
    assert!(String::from_utf8_lossy(&greeting).contains("-MariaDB"), "{greeting:?}");

    let matches =
        "SELECT authentication_string = PASSWORD('conformance') FROM mysql.user WHERE user = 'sessionkit' AND host = '%'";
    assert_eq!(mariadb.query(matches)?, [["1"]]);
    let nobody = mariadb.query("SELECT count(*) FROM mysql.user WHERE user = ''")?;
    assert_eq!(nobody, [["0"]], "who names no user is let in");
    // What it does is done with the rights of that user.
    let procedure = "CREATE TABLE t (n int); INSERT INTO t VALUES (1); CREATE INDEX i ON t (n)";
    mariadb.query(&format!("CREATE DEFINER = sessionkit@'%' PROCEDURE p() BEGIN {procedure}; END; CALL p()"))?;
    assert_eq!(mariadb.query("SELECT * FROM t")?, [["1"]]);
    mariadb.query("CREATE DEFINER = sessionkit@'%' PROCEDURE q() SELECT count(*) FROM mysql.user")?;
    let denied = mariadb.query("CALL q()").expect_err("it may not look there");
    assert!(denied.to_string().starts_with("1142 (42000): SELECT command denied"), "{denied}");
    Ok(())
}

#[test]
fn rows_of_mariadb_come_back_as_text() -> io::Result<()> {
    let mariadb = MariaDb::start(&[])?;
    assert_eq!(mariadb.query("CREATE TABLE colors (id int PRIMARY KEY, color text)")?, [[""; 0]; 0]);
    mariadb.query("INSERT INTO colors VALUES (1, 'grün'), (2, NULL), (3, 'two\\nlines'), (4, '')")?;
    let rows = mariadb.query("SELECT * FROM colors ORDER BY id; DO 1; SELECT 'more'")?;
    assert_eq!(rows, [vec!["1", "grün"], vec!["2", ""], vec!["3", "two\nlines"], vec!["4", ""], vec!["more"]]);
    for length in [250, 251, 70_000, 15 << 20] {
        let row = mariadb.query(&format!("SELECT '{}', 1", "x".repeat(length)))?;
        assert_eq!((row[0][0].len(), row[0][1].as_str()), (length, "1"));
    }
    mariadb.query("SET GLOBAL max_allowed_packet = 64 << 20")?;
    for length in [(16 << 20) - 9, (16 << 20) - 5, 16 << 20, 40 << 20] {
        let row = mariadb.query(&format!("SELECT repeat('x', {length}), 1"))?;
        assert_eq!((row[0][0].len(), row[0][1].as_str()), (length, "1"));
    }
    let mut connection = mariadb.connect()?;
    let refused =
        connection.query("INSERT INTO colors VALUES (1, 'red'); DELETE FROM colors").expect_err("the key is there");
    assert!(refused.to_string().starts_with("1062 (23000): Duplicate entry"), "{refused}");
    let me = connection.query("SELECT count(*), connection_id() FROM colors")?;
    assert_eq!(me[0][0], "4");
    mariadb.query(&format!("KILL {}", me[0][1]))?;
    connection.query("SELECT 1").expect_err("somebody has ended it");
    Ok(())
}

#[test]
fn an_option_of_mariadb_is_a_line_of_the_configuration() -> io::Result<()> {
    let mariadb = MariaDb::start(&["innodb_flush_log_at_trx_commit = 1", "max_connections = 20"])?;
    assert_eq!(mariadb.query("SELECT @@innodb_flush_log_at_trx_commit, @@max_connections")?, [["1", "20"]]);
    let refused = MariaDb::start(&["plenty = 1"]).expect_err("there is no such option");
    assert!(refused.to_string().contains("unknown variable 'plenty=1'"), "{refused}");
    Ok(())
}

#[test]
fn a_frozen_mariadb_accepts_and_says_nothing_until_it_goes_on() -> io::Result<()> {
    let mariadb = Arc::new(MariaDb::start(&[])?);
    let mut before = mariadb.connect()?;
    before.query("CREATE TABLE colors (color text); BEGIN")?;
    mariadb.freeze()?;
    assert!(!mariadb.is_up());
    TcpStream::connect(mariadb.address())?;
    let shared = Arc::clone(&mariadb);
    assert!(says_nothing(move || drop(shared.query("SELECT 1"))), "a new connection is answered");
    let asking = std::thread::spawn(move || before.query("INSERT INTO colors VALUES ('green'); COMMIT").map(|_| before));
    std::thread::sleep(SOON);
    assert!(!asking.is_finished(), "an old connection is answered");
    mariadb.resume()?;
    asking.join().expect("it does not panic")?;
    assert_eq!(mariadb.query("SELECT * FROM colors")?, [["green"]]);
    Ok(())
}

#[test]
fn a_killed_mariadb_refuses_and_comes_back_at_its_place_with_what_it_has_acknowledged() -> io::Result<()> {
    let mariadb = MariaDb::start(&[])?;
    mariadb.query("CREATE TABLE colors (color text)")?;
    for name in ["killed", "frozen and killed", "restarted", "frozen and restarted"] {
        let (address, pid) = (mariadb.address(), mariadb.pid());
        mariadb.query(&format!("INSERT INTO colors VALUES ('{name}')"))?;
        let mut lost = mariadb.connect()?;
        lost.query("BEGIN; INSERT INTO colors VALUES ('lost')")?;
        if name.contains("frozen") {
            mariadb.freeze()?;
        }
        if name.contains("killed") {
            mariadb.kill()?;
            mariadb.kill()?;
            assert_eq!((mariadb.pid(), mariadb.is_up()), (None, false));
            assert_eq!(TcpStream::connect(address).expect_err("nobody listens").kind(), io::ErrorKind::ConnectionRefused);
            assert_eq!(mariadb.freeze().expect_err("nobody is there").kind(), io::ErrorKind::NotConnected);
            assert!(mariadb.query("SELECT 1").is_err());
        }
        mariadb.restart()?;
        lost.query("COMMIT").expect_err("it is another server");
        assert_eq!(mariadb.address(), address);
        assert_ne!(mariadb.pid(), pid);
        let kept = mariadb.query(&format!("SELECT count(*) FROM colors WHERE color IN ('{name}', 'lost')"))?;
        assert_eq!(kept, [["1"]], "{name}");
    }
    mariadb.kill()?;
    let thief = TcpListener::bind(mariadb.address())?;
    assert_eq!(mariadb.restart().expect_err("the port is taken").kind(), io::ErrorKind::AddrInUse);
    drop(thief);
    mariadb.restart()
}

#[test]
fn pgbouncer_lends_one_connection_to_many_clients_a_transaction_each() -> io::Result<()> {
    let postgres = Postgres::start(&[])?;
    let bouncer = PgBouncer::start(&postgres, &["default_pool_size = 1"])?;
    assert_eq!(bouncer.url(), format!("postgres://sessionkit:conformance@{}/sessionkit", bouncer.address()));
    assert!(bouncer.socket_path().exists());
    bouncer.query("CREATE TABLE colors (color text)")?;
    assert_eq!(postgres.query("SELECT count(*) FROM colors")?, [["0"]]);

    let (mut first, mut second) = (bouncer.connect()?, bouncer.connect()?);
    let mine = "SELECT pg_backend_pid(), current_user";
    assert_eq!(first.query(mine)?, second.query(mine)?);
    assert_eq!(first.query(mine)?, bouncer.query(mine)?);
    // It is lent until the transaction ends.
    first.query("BEGIN; INSERT INTO colors VALUES ('green')")?;
    let waiting = std::thread::spawn(move || second.query("SELECT color FROM colors"));
    let is_waiting = || {
        let clients = bouncer.console("SHOW CLIENTS")?;
        io::Result::Ok(clients.iter().flatten().any(|value| value == "waiting"))
    };
    eventually("the second client's wait", || is_waiting().is_ok_and(|waits| waits));
    std::thread::sleep(SOON);
    assert!(!waiting.is_finished());
    first.query("COMMIT")?;
    assert_eq!(waiting.join().expect("it does not panic")?, [["green"]]);

    let psql = |url: &str| Command::new("psql").args([url, "-Atc", "SELECT current_user"]).output();
    let output = psql(&bouncer.url())?;
    assert_eq!(String::from_utf8_lossy(&output.stdout), "sessionkit\n", "{output:?}");
    for url in [bouncer.url_of("sessionkit", "wrong"), bouncer.url_of("postgres", "")] {
        let output = psql(&url)?;
        assert!(!output.status.success(), "{url}: {output:?}");
    }
    Ok(())
}

#[test]
fn pgbouncer_and_the_server_behind_it_stand_still_and_end_each_by_itself() -> io::Result<()> {
    let postgres = Postgres::start(&[])?;
    let bouncer = Arc::new(PgBouncer::start(&postgres, &["pool_mode = session"])?);
    let (mode, refused) = (bouncer.console("SHOW CONFIG")?, PgBouncer::start(&postgres, &["pool_mode = plenty"]));
    assert!(mode.iter().any(|row| row[..2] == ["pool_mode", "session"]), "{mode:?}");
    let refused = refused.expect_err("there is no such mode");
    assert!(refused.to_string().contains("plenty"), "{refused}");

    let asks = |bouncer: &Arc<PgBouncer>| {
        let shared = Arc::clone(bouncer);
        move || drop(shared.query("SELECT 1"))
    };
    bouncer.freeze()?;
    assert!(!bouncer.is_up() && postgres.is_up());
    assert!(says_nothing(asks(&bouncer)), "a frozen pool answers");
    bouncer.resume()?;
    assert_eq!(bouncer.query("SELECT 1")?, [["1"]]);
    postgres.freeze()?;
    assert!(says_nothing(asks(&bouncer)), "a frozen server answers");
    postgres.resume()?;
    assert_eq!(bouncer.query("SELECT 1")?, [["1"]]);

    let (address, pid) = (bouncer.address(), bouncer.pid());
    let mut lost = bouncer.connect()?;
    lost.query("BEGIN; CREATE TABLE lost ()")?;
    bouncer.kill()?;
    bouncer.kill()?;
    assert_eq!(bouncer.pid(), None);
    assert_eq!(TcpStream::connect(address).expect_err("nobody listens").kind(), io::ErrorKind::ConnectionRefused);
    let thief = TcpListener::bind(address)?;
    assert_eq!(bouncer.restart().expect_err("the port is taken").kind(), io::ErrorKind::AddrInUse);
    drop(thief);
    bouncer.restart()?;
    assert_eq!(bouncer.address(), address);
    assert_ne!(bouncer.pid(), pid);
    lost.query("COMMIT").expect_err("nobody is there");
    assert!(bouncer.query("SELECT FROM lost").is_err());

    postgres.restart()?;
    // The connections of before are found dead one after another.
    eventually("a connection to the new server", || bouncer.query("SELECT 1").is_ok());
    Ok(())
}

/// One of each version.
fn both(options: &[&str]) -> io::Result<[Memcached; 2]> {
    Ok([Memcached::start(options)?, Memcached::start_newer(options)?])
}

#[test]
fn memcached_answers_on_its_port_in_both_versions() -> io::Result<()> {
    for memcached in both(&[])? {
        assert_eq!(memcached.url(), format!("memcache://{}", memcached.address()));
        let mut connection = memcached.connect()?;
        assert_eq!(connection.get("color")?, None);
        connection.set("color", 7, 60, b"two\r\nlines")?;
        let item = connection.get("color")?.expect("it was just stored");
        assert_eq!((item.flags, item.data.as_slice()), (7, b"two\r\nlines".as_slice()));
        connection.set("a:b%c", 0, 0, b"")?;
        let mut keys = connection.keys()?;
        keys.sort_unstable();
        assert_eq!(keys, ["a:b%c", "color"]);
        assert!(connection.delete("color")? && !connection.delete("color")?);
        assert_eq!(memcached.get("color")?, None);
        let refused = connection.ask("get").expect_err("a key is missing");
        assert!(refused.to_string().contains("ERROR"), "{refused}");
        let stats = connection.stats("")?;
        assert_eq!(stats["version"], memcached.version()?);
        assert_eq!(stats["pid"], memcached.pid().expect("it runs").to_string());
        assert_eq!(stats["curr_items"], "1");
    }
    Ok(())
}

#[test]
fn the_newer_memcached_takes_the_number_of_a_change_from_its_client() -> io::Result<()> {
    let memcached = Memcached::start_newer(&[])?;
    let mut connection = memcached.connect()?;
    assert_eq!(connection.ask("ms color 5 E77 c\r\ngreen")?, "HD c77");
    assert_eq!(connection.get("color")?.map(|item| item.cas), Some(77));
    Ok(())
}

#[test]
fn an_option_of_memcached_is_one_of_its_command_line() -> io::Result<()> {
    let memcached = Memcached::start(&["-m 8", "-I 2m"])?;
    let settings = memcached.stats("settings")?;
    assert_eq!((settings["maxbytes"].as_str(), settings["item_size_max"].as_str()), ("8388608", "2097152"));
    let refused = Memcached::start(&["-I 1"]).expect_err("an item has more bytes than that");
    assert!(refused.to_string().contains("tem max size cannot be less than"), "{refused}");
    Ok(())
}

#[test]
fn a_flood_of_memcached_evicts_what_is_not_read() -> io::Result<()> {
    for memcached in both(&["-m 2"])? {
        let mut connection = memcached.connect()?;
        connection.set("old", 0, 0, &[b'x'; 100])?;
        connection.flood((0..20_000).map(|number| format!("new-{number}")), &[b'x'; 100])?;
        assert_eq!(connection.get("old")?, None);
        assert!(connection.get("new-19999")?.is_some());
        assert_ne!(connection.stats("")?["evictions"], "0");
    }
    Ok(())
}

#[test]
fn a_memcached_with_a_password_lets_in_who_knows_it() -> io::Result<()> {
    let memcached = Memcached::start_with_password(&[])?;
    assert_eq!(memcached.url(), format!("memcache://sessionkit:conformance@{}", memcached.address()));
    memcached.connect()?.set("color", 0, 0, b"green")?;
    assert!(memcached.get("color")?.is_some());
    let mut stranger = BufReader::new(TcpStream::connect(memcached.address())?);
    stranger.get_mut().set_read_timeout(Some(LONG))?;
    assert!(ask(&mut stranger, "get color")?.starts_with("CLIENT_ERROR"));
    assert!(!format!("{memcached:?}").contains("conformance"));
    memcached.restart()
}

#[test]
fn no_memcached_is_root() -> io::Result<()> {
    for memcached in both(&[])? {
        let status = std::fs::read_to_string(format!("/proc/{}/status", memcached.pid().expect("it runs")))?;
        let users = status.lines().find_map(|line| line.strip_prefix("Uid:")).expect("it is somebody");
        assert!(users.split_whitespace().all(|user| user != "0"), "{users}");
    }
    Ok(())
}

#[test]
fn a_frozen_memcached_accepts_and_says_nothing_until_it_goes_on() -> io::Result<()> {
    let memcached = Arc::new(Memcached::start(&[])?);
    let mut before = memcached.connect()?;
    before.set("color", 0, 0, b"green")?;
    memcached.freeze()?;
    assert!(!memcached.is_up());
    let shared = Arc::clone(&memcached);
    assert!(says_nothing(move || drop(shared.get("color"))), "a new connection is answered");
    let asking = std::thread::spawn(move || before.get("color"));
    std::thread::sleep(SOON);
    assert!(!asking.is_finished(), "an old connection is answered");
    memcached.resume()?;
    assert_eq!(asking.join().expect("it does not panic")?.map(|item| item.data), Some(b"green".to_vec()));
    Ok(())
}

#[test]
fn a_memcached_that_ended_refuses_and_comes_back_at_its_place_and_empty() -> io::Result<()> {
    for memcached in both(&[])? {
        let ends: [(&str, &dyn Fn() -> io::Result<()>); 4] = [
            ("killed", &|| memcached.kill()),
            ("stopped", &|| memcached.stop()),
            ("frozen and killed", &|| memcached.freeze().and_then(|()| memcached.kill())),
            ("frozen and stopped", &|| memcached.freeze().and_then(|()| memcached.stop())),
        ];
        for (name, end) in ends {
            let (address, pid) = (memcached.address(), memcached.pid());
            let mut connection = memcached.connect()?;
            connection.set("color", 0, 0, b"green")?;
            end()?;
            memcached.kill()?;
            memcached.stop()?;
            assert_eq!((memcached.pid(), memcached.is_up()), (None, false), "{name}");
            assert!(connection.get("color").is_err(), "{name}");
            assert_eq!(TcpStream::connect(address).expect_err("nobody listens").kind(), io::ErrorKind::ConnectionRefused);
            assert_eq!(memcached.freeze().expect_err("nobody is there").kind(), io::ErrorKind::NotConnected);
            memcached.restart()?;
            assert_eq!(memcached.address(), address);
            assert_ne!(memcached.pid(), pid);
            assert_eq!(memcached.get("color")?, None, "{name}");
        }
    }
    Ok(())
}

#[test]
fn a_port_that_somebody_else_took_from_memcached_is_told() -> io::Result<()> {
    let memcached = Memcached::start(&[])?;
    memcached.kill()?;
    let thief = TcpListener::bind(memcached.address())?;
    assert_eq!(memcached.restart().expect_err("the port is taken").kind(), io::ErrorKind::AddrInUse);
    drop(thief);
    memcached.restart()
}

#[test]
fn sql_servers_of_the_same_moment_do_not_meet() -> io::Result<()> {
    let start = |number: usize| {
        let (postgres, mariadb) = (Postgres::start(&[])?, MariaDb::start(&[])?);
        postgres.query(&format!("CREATE TABLE numbers AS SELECT {number} AS number"))?;
        mariadb.query(&format!("CREATE TABLE numbers AS SELECT {number} AS number"))?;
        io::Result::Ok((postgres, mariadb))
    };
    let servers: Vec<_> = std::thread::scope(|threads| {
        let starting: Vec<_> = (0..5).map(|number| threads.spawn(move || start(number))).collect();
        starting.into_iter().map(|thread| thread.join().expect("no start panics")).collect::<io::Result<_>>()
    })?;
    for (number, (postgres, mariadb)) in servers.iter().enumerate() {
        assert_eq!(postgres.query("SELECT number FROM numbers")?, [[number.to_string()]]);
        assert_eq!(mariadb.query("SELECT number FROM numbers")?, [[number.to_string()]]);
    }
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

/// Starts a server with a child of its own, which writes a snapshot for minutes, and returns the ids of both.
fn start_with_a_child() -> io::Result<(Redis, [u32; 2])> {
    // In microseconds: longer than anything here waits for its end.
    let redis = Redis::start(&["rdb-key-save-delay 100000000"])?;
    redis.command(&["SET", "color", "green"])?;
    redis.command(&["BGSAVE"])?;
    let pid = redis.pid().expect("it runs");
    let children = std::fs::read_to_string(format!("/proc/{pid}/task/{pid}/children"))?;
    let child = children.trim().parse().expect("one child");
    Ok((redis, [pid, child]))
}

#[test]
fn what_a_server_has_forked_ends_with_it() -> io::Result<()> {
    let (redis, [server, child]) = start_with_a_child()?;
    let directory = redis.directory().to_owned();
    assert!(runs(server) && runs(child));
    drop(redis);
    assert!(!runs(server));
    eventually("the end of the child", || !runs(child));
    assert!(!directory.exists());
    Ok(())
}

#[test]
fn a_server_ends_with_the_process_that_started_it_however_that_ends() -> io::Result<()> {
    if let Ok(part) = std::env::var(PART) {
        let (redis, [server, child]) = start_with_a_child()?;
        if part.contains("frozen") {
            redis.freeze()?;
        }
        tell(&format!("{server} {child} {}", redis.directory().display()));
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
        let [server, child, directory] = words.splitn(3, ' ').collect::<Vec<_>>()[..] else { panic!("told {words}") };
        let pids = [server, child].map(|pid| pid.parse().expect("a number"));
        if part.contains("killed") {
            assert!(pids.into_iter().all(runs), "{part}: they do not run");
            parent.kill()?;
        }
        parent.wait()?;
        eventually(&format!("{part}: the end of the server and its child"), || !pids.into_iter().any(runs));
        eventually(&format!("{part}: the end of its directory"), || !Path::new(directory).exists());
    }
    Ok(())
}

/// Returns every process that a process has forked, and itself.
fn family(pid: u32) -> io::Result<Vec<u32>> {
    let mut family = vec![pid];
    for thread in std::fs::read_dir(format!("/proc/{pid}/task"))? {
        let children = std::fs::read_to_string(thread?.path().join("children"))?;
        family.extend(children.split_whitespace().map(|child| child.parse::<u32>().expect("a number")));
    }
    Ok(family)
}

/// Returns the number of the segment of shared memory that a server of PostgreSQL has outside its directory.
fn segment(postgres: &Postgres) -> io::Result<String> {
    let lock = std::fs::read_to_string(postgres.directory().join("data/postmaster.pid"))?;
    let line = lock.lines().nth(6).expect("the key and the number of a segment");
    Ok(line.split_whitespace().last().expect("two numbers").to_owned())
}

/// Says whether the machine has that segment.
fn has_segment(number: &str) -> bool {
    let table = std::fs::read_to_string("/proc/sysvipc/shm").expect("a table of segments");
    table.lines().any(|line| line.split_whitespace().nth(1) == Some(number))
}

#[test]
fn nothing_is_left_of_a_postgres_however_its_test_ends() -> io::Result<()> {
    let start = || {
        let postgres = Postgres::start(&[])?;
        let mut idle = postgres.connect()?;
        idle.query("CREATE TABLE t (n int)")?;
        let family = family(postgres.pid().expect("it runs"))?;
        assert!(family.len() > 4, "it has forked only {family:?}");
        let segment = segment(&postgres)?;
        assert!(has_segment(&segment));
        io::Result::Ok((postgres, idle, family, segment))
    };
    if let Ok(part) = std::env::var(PART) {
        let (postgres, _idle, family, segment) = start()?;
        if part.contains("frozen") {
            postgres.freeze()?;
        }
        if part.contains("server killed") {
            postgres.kill()?;
        }
        tell(&format!("{segment} {} {family:?}", postgres.directory().display()));
        if part.contains("exits") {
            std::process::exit(0);
        }
        loop {
            std::thread::park();
        }
    }
    for part in ["killed", "killed, server frozen", "killed, server killed", "exits"] {
        let mut parent = start_part("nothing_is_left_of_a_postgres_however_its_test_ends", part).spawn()?;
        let words = told(parent.stdout.take().expect("it was piped"));
        let [segment, directory, family] = words.splitn(3, ' ').collect::<Vec<_>>()[..] else { panic!("told {words}") };
        let family: Vec<u32> =
            family.trim_matches(['[', ']']).split(", ").map(|pid| pid.parse().expect("a number")).collect();
        if part.contains("killed") {
            assert!(Path::new(directory).exists());
            // Others may be just ending: each question has a process of its own.
            assert_ne!(runs(family[0]), part.contains("server killed"), "{part}");
            parent.kill()?;
        }
        parent.wait()?;
        eventually(&format!("{part}: the end of all"), || !family.iter().any(|pid| runs(*pid)));
        eventually(&format!("{part}: the end of its directory"), || !Path::new(directory).exists());
        assert!(!has_segment(segment), "{part}: its shared memory is left");
    }

    let (postgres, _idle, family, segment) = start()?;
    let directory = postgres.directory().to_owned();
    drop(postgres);
    assert!(!family.iter().any(|pid| runs(*pid)) && !directory.exists() && !has_segment(&segment));
    Ok(())
}

#[test]
fn nothing_is_left_of_a_mariadb_whose_test_is_killed() -> io::Result<()> {
    let test = "nothing_is_left_of_a_mariadb_whose_test_is_killed";
    if let Ok(part) = std::env::var(PART) {
        let mariadb = MariaDb::start(&[])?;
        mariadb.query("CREATE TABLE t (n int)")?;
        if part.contains("frozen") {
            mariadb.freeze()?;
        }
        tell(&format!("{} {}", mariadb.pid().expect("it runs"), mariadb.directory().display()));
        loop {
            std::thread::park();
        }
    }
    for part in ["busy", "frozen"] {
        let mut parent = start_part(test, part).spawn()?;
        let words = told(parent.stdout.take().expect("it was piped"));
        let (pid, directory) = words.split_once(' ').expect("two words");
        let pid = pid.parse().expect("a number");
        assert!(runs(pid));
        parent.kill()?;
        parent.wait()?;
        eventually(&format!("{part}: the end of the server"), || !runs(pid));
        eventually(&format!("{part}: the end of its directory"), || !Path::new(directory).exists());
    }
    Ok(())
}

#[test]
fn nothing_is_left_of_a_memcached_whose_test_is_killed() -> io::Result<()> {
    let test = "nothing_is_left_of_a_memcached_whose_test_is_killed";
    if std::env::var_os(PART).is_some() {
        let [older, newer] = both(&[])?;
        newer.freeze()?;
        let [older, newer] = [&older, &newer].map(|one| format!("{} {}", one.pid().unwrap_or(0), one.directory().display()));
        tell(&format!("{older} {newer}"));
        loop {
            std::thread::park();
        }
    }
    let mut parent = start_part(test, "both").spawn()?;
    let words = told(parent.stdout.take().expect("it was piped"));
    let [older, its, newer, others] = words.split(' ').collect::<Vec<_>>()[..] else { panic!("told {words}") };
    let pids = [older, newer].map(|pid| pid.parse().expect("a number"));
    assert!(pids.into_iter().all(runs));
    parent.kill()?;
    parent.wait()?;
    eventually("the end of both servers", || !pids.into_iter().any(runs));
    eventually("the end of their directories", || ![its, others].into_iter().any(|place| Path::new(place).exists()));
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

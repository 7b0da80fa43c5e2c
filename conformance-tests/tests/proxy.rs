//! The proxy does what it says: each fault is shown on a server that answers line by line, and the counters are exact.

use std::io;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use conformance_tests::proxy::{CountFrom, Direction, Hold, Proxy};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{TcpListener, TcpStream};
use tokio::time::timeout;

const SOON: Duration = Duration::from_millis(300);
const LONG: Duration = Duration::from_secs(5);

/// Answers `word` with `re:word`, line by line, and remembers what it was told, in order.
struct Toy {
    address: String,
    told: Arc<Mutex<Vec<String>>>,
}

impl Toy {
    async fn start() -> io::Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let address = listener.local_addr()?.to_string();
        let told = Arc::new(Mutex::new(Vec::new()));
        let log = Arc::clone(&told);
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let log = Arc::clone(&log);
                tokio::spawn(async move {
                    let (read, mut write) = stream.into_split();
                    let mut lines = BufReader::new(read).lines();
                    while let Ok(Some(line)) = lines.next_line().await {
                        log.lock().expect("no test panics while it logs").push(line.clone());
                        if write.write_all(format!("re:{line}\n").as_bytes()).await.is_err() {
                            return;
                        }
                    }
                });
            }
        });
        Ok(Self { address, told })
    }

    fn told(&self) -> Vec<String> {
        self.told.lock().expect("no test panics while it logs").clone()
    }

    async fn was_told(&self, lines: &[&str]) {
        let end = Instant::now() + LONG;
        while self.told() != lines {
            assert!(Instant::now() < end, "told {:?}, expected {lines:?}", self.told());
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    }
}

struct Client(BufReader<TcpStream>);

impl Client {
    async fn connect(proxy: &Proxy) -> io::Result<Self> {
        Ok(Self(BufReader::new(TcpStream::connect(proxy.address()).await?)))
    }

    async fn send(&mut self, text: &str) -> io::Result<()> {
        self.0.write_all(text.as_bytes()).await
    }

    /// Returns one line, or the empty string at the end of the stream.
    async fn line(&mut self) -> io::Result<String> {
        let mut line = String::new();
        timeout(LONG, self.0.read_line(&mut line)).await??;
        Ok(line)
    }

    async fn ask(&mut self, word: &str) -> io::Result<String> {
        self.send(&format!("{word}\n")).await?;
        self.line().await
    }

    /// Everything that comes until the connection ends, which it must.
    async fn rest(&mut self) -> String {
        let mut all = Vec::new();
        let mut buffer = [0; 1024];
        loop {
            match timeout(LONG, self.0.read(&mut buffer)).await.expect("the connection was not cut") {
                Ok(n @ 1..) => all.extend_from_slice(&buffer[..n]),
                _ => return String::from_utf8(all).expect("the toy answers in ASCII"),
            }
        }
    }

    async fn hears_nothing(&mut self) {
        let mut byte = [0; 1];
        assert!(timeout(SOON, self.0.read(&mut byte)).await.is_err(), "something came");
    }
}

async fn pair() -> io::Result<(Toy, Proxy)> {
    let toy = Toy::start().await?;
    let proxy = Proxy::start(toy.address.clone()).await?;
    Ok((toy, proxy))
}

#[tokio::test]
async fn what_no_fault_touches_arrives_whole_and_counted() -> io::Result<()> {
    let (toy, proxy) = pair().await?;
    let mut client = Client::connect(&proxy).await?;
    assert_eq!(client.ask("one").await?, "re:one\n");
    assert_eq!((proxy.bytes(Direction::ToServer), proxy.bytes(Direction::ToClient)), (4, 7));
    assert_eq!((proxy.connections(), proxy.open_connections(), proxy.round_trips()), (1, 1, 1));
    let long = "x".repeat(300_000);
    assert_eq!(client.ask(&long).await?, format!("re:{long}\n"));
    assert_eq!(proxy.bytes(Direction::ToServer), 4 + 300_001);
    toy.was_told(&["one", &long]).await;
    // The end of the client's half is passed on, and the server's answer to it as well.
    client.0.shutdown().await?;
    assert_eq!(client.line().await?, "");
    Ok(())
}

#[tokio::test]
async fn a_round_trip_is_a_flight_however_many_requests_or_packets_it_has() -> io::Result<()> {
    let (_toy, proxy) = pair().await?;
    let mut client = Client::connect(&proxy).await?;
    for _ in 0..50 {
        client.ask("alone").await?;
    }
    assert_eq!(proxy.round_trips(), 50);

    proxy.reset_counters();
    assert_eq!((proxy.round_trips(), proxy.bytes(Direction::ToServer), proxy.connections()), (0, 0, 0));
    client.send("a\nb\nc\n").await?;
    for _ in 0..3 {
        client.line().await?;
    }
    assert_eq!(proxy.round_trips(), 1, "three requests in one packet are one trip");

    // No answer comes between the parts of one line, however long they take.
    for part in ["in ", "three ", "parts\n"] {
        client.send(part).await?;
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    client.line().await?;
    assert_eq!(proxy.round_trips(), 2);

    // Each connection makes its own.
    let mut other = Client::connect(&proxy).await?;
    let (mine, others) = tokio::join!(client.ask("x"), other.ask("y"));
    mine.and(others)?;
    assert_eq!((proxy.round_trips(), proxy.connections(), proxy.open_connections()), (4, 1, 2));
    Ok(())
}

#[tokio::test]
async fn there_is_no_silence_while_the_server_has_the_next_word() -> io::Result<()> {
    let (_toy, proxy) = pair().await?;
    let silence = || proxy.silence(Duration::from_millis(20), SOON);
    assert!(silence().await, "nobody is there");
    let mut client = Client::connect(&proxy).await?;
    assert!(!silence().await, "nothing has been said on a new connection");
    assert_eq!(client.ask("one").await?, "re:one\n");
    assert!(silence().await, "all is answered");
    client.send("tw").await?;
    assert!(!silence().await, "half a request is not answered");
    client.send("o\n").await?;
    assert_eq!(client.line().await?, "re:two\n");
    let mut other = Client::connect(&proxy).await?;
    other.send("thr").await?;
    assert!(!silence().await, "the other is not answered");
    drop(other);
    assert!(silence().await, "nobody waits for an answer any more");
    Ok(())
}

#[tokio::test]
async fn a_cut_lets_exactly_so_many_bytes_of_a_request_pass() -> io::Result<()> {
    let request = "12\n45\n";
    for bytes in 0..=6 {
        let (toy, proxy) = pair().await?;
        let mut client = Client::connect(&proxy).await?;
        proxy.cut(Direction::ToServer, bytes, CountFrom::Connection);
        client.send(request).await?;
        client.rest().await;
        assert_eq!(proxy.cuts(), 1);
        // A line without its end is a line to the toy, if the stream ends there.
        let told: Vec<&str> = request[..usize::try_from(bytes).unwrap()].lines().collect();
        toy.was_told(&told).await;
        // It happens once.
        assert_eq!(Client::connect(&proxy).await?.ask("again").await?, "re:again\n");
    }
    Ok(())
}

#[tokio::test]
async fn a_cut_lets_exactly_so_many_bytes_of_a_reply_pass() -> io::Result<()> {
    for bytes in 0..=8u64 {
        let (toy, proxy) = pair().await?;
        let mut client = Client::connect(&proxy).await?;
        client.ask("before").await?;
        proxy.cut(Direction::ToClient, bytes, CountFrom::Now);
        client.send("word\n").await?;
        let whole = "re:word\n";
        let passed = usize::try_from(bytes).unwrap();
        assert_eq!(client.rest().await, whole[..passed]);
        toy.was_told(&["before", "word"]).await;
    }
    Ok(())
}

#[tokio::test]
async fn a_cut_counts_from_now_over_all_connections_or_from_the_beginning_of_each() -> io::Result<()> {
    let (toy, proxy) = pair().await?;
    let (mut a, mut b) = (Client::connect(&proxy).await?, Client::connect(&proxy).await?);
    a.ask("aaaa").await?;
    proxy.cut(Direction::ToServer, 7, CountFrom::Now);
    a.ask("aaaa").await?;
    b.send("bbbb\n").await?;
    b.rest().await;
    toy.was_told(&["aaaa", "aaaa", "bb"]).await;

    proxy.cut(Direction::ToServer, 12, CountFrom::Connection);
    let mut c = Client::connect(&proxy).await?;
    c.ask("cccc").await?;
    assert_eq!(proxy.cuts(), 1);
    a.send("aaaa\n").await?;
    a.rest().await;
    assert_eq!(proxy.cuts(), 2);
    assert_eq!(c.ask("c").await?, "re:c\n");
    Ok(())
}

#[tokio::test]
async fn cut_all_ends_what_is_open_and_nothing_else() -> io::Result<()> {
    let (_toy, proxy) = pair().await?;
    let mut clients = Vec::new();
    for _ in 0..3 {
        let mut client = Client::connect(&proxy).await?;
        client.ask("here").await?;
        clients.push(client);
    }
    proxy.cut_all();
    for client in &mut clients {
        assert_eq!(client.rest().await, "");
    }
    assert_eq!(Client::connect(&proxy).await?.ask("new").await?, "re:new\n");
    Ok(())
}

#[tokio::test]
async fn a_delay_holds_up_one_direction_keeps_the_order_and_ends() -> io::Result<()> {
    let (toy, proxy) = pair().await?;
    let mut client = Client::connect(&proxy).await?;
    let delay = Duration::from_millis(150);
    proxy.delay(Direction::ToClient, delay, delay * 2);
    let start = Instant::now();
    for word in ["1\n", "2\n", "3\n"] {
        client.send(word).await?;
    }
    toy.was_told(&["1", "2", "3"]).await;
    let told_after = start.elapsed();
    assert_eq!([client.line().await?, client.line().await?, client.line().await?].concat(), "re:1\nre:2\nre:3\n");
    assert!(start.elapsed() >= delay, "it came after {:?}", start.elapsed());
    assert!(told_after < start.elapsed(), "the other direction was held up as well");
    proxy.delay(Direction::ToClient, Duration::ZERO, Duration::ZERO);
    proxy.delay(Direction::ToServer, delay, delay);
    let start = Instant::now();
    client.send("4\n").await?;
    tokio::time::sleep(delay / 3).await;
    assert_eq!(toy.told().len(), 3);
    assert_eq!(client.line().await?, "re:4\n");
    assert!(start.elapsed() >= delay);
    Ok(())
}

#[tokio::test]
async fn what_is_swallowed_never_arrives_and_the_connection_stays_open() -> io::Result<()> {
    let (toy, proxy) = pair().await?;
    let mut client = Client::connect(&proxy).await?;
    proxy.swallow(Direction::ToClient);
    client.send("heard\n").await?;
    toy.was_told(&["heard"]).await;
    client.hears_nothing().await;
    assert_eq!((proxy.swallowed(), proxy.open_connections()), (9, 1));
    proxy.heal();
    // A stream with a hole in it stays mute; a new one is whole.
    client.send("later\n").await?;
    client.hears_nothing().await;
    assert_eq!(Client::connect(&proxy).await?.ask("new").await?, "re:new\n");

    let mut other = Client::connect(&proxy).await?;
    proxy.swallow(Direction::ToServer);
    other.send("lost\n").await?;
    other.hears_nothing().await;
    toy.was_told(&["heard", "later", "new"]).await;
    Ok(())
}

#[tokio::test]
async fn only_the_next_reply_is_swallowed() -> io::Result<()> {
    let (toy, proxy) = pair().await?;
    let mut client = Client::connect(&proxy).await?;
    proxy.swallow_next_reply();
    client.send("one\n").await?;
    toy.was_told(&["one"]).await;
    client.hears_nothing().await;
    assert_eq!(client.ask("two").await?, "re:two\n");
    Ok(())
}

#[tokio::test]
async fn a_freeze_stops_everything_and_a_thaw_delivers_it() -> io::Result<()> {
    let (toy, proxy) = pair().await?;
    let mut client = Client::connect(&proxy).await?;
    client.ask("before").await?;
    proxy.freeze();
    client.send("during\n").await?;
    client.hears_nothing().await;
    let mut late = Client::connect(&proxy).await?;
    late.send("new\n").await?;
    late.hears_nothing().await;
    assert_eq!(toy.told(), ["before"]);
    proxy.thaw();
    assert_eq!((client.line().await?, late.line().await?), ("re:during\n".into(), "re:new\n".into()));
    Ok(())
}

#[tokio::test]
async fn connections_are_refused_and_then_accepted_on_the_same_port() -> io::Result<()> {
    let (_toy, proxy) = pair().await?;
    let mut client = Client::connect(&proxy).await?;
    client.ask("before").await?;
    for _ in 0..2 {
        proxy.refuse().await;
        let error = TcpStream::connect(proxy.address()).await.expect_err("the connection was not refused");
        assert_eq!(error.kind(), io::ErrorKind::ConnectionRefused);
    }
    assert_eq!(client.rest().await, "");
    proxy.accept_again().await?;
    assert_eq!(Client::connect(&proxy).await?.ask("after").await?, "re:after\n");
    Ok(())
}

#[tokio::test]
async fn a_request_is_held_back_and_delivered_after_later_ones() -> io::Result<()> {
    let (toy, proxy) = pair().await?;
    let mut held = proxy.hold_request("slow", Hold::Instead);
    let mut client = Client::connect(&proxy).await?;
    assert_eq!(client.ask("quick").await?, "re:quick\n");
    client.send("slow one\n").await?;
    assert_eq!(client.rest().await, "", "the client has to learn that its connection is gone");
    assert_eq!(held.caught(LONG).await?, b"slow one\n");
    assert_eq!(Client::connect(&proxy).await?.ask("later").await?, "re:later\n");
    assert_eq!(toy.told(), ["quick", "later"]);
    assert_eq!(held.deliver(b"", LONG).await?, b"re:slow one\n");
    assert_eq!(held.deliver(b"login\n", LONG).await?, b"re:slow one\n");
    assert_eq!(toy.told(), ["quick", "later", "slow one", "login", "slow one"]);
    Ok(())
}

#[tokio::test]
async fn a_copy_of_a_request_is_delivered_a_second_time() -> io::Result<()> {
    let (toy, proxy) = pair().await?;
    let mut held = proxy.hold_request("", Hold::Copy);
    let mut client = Client::connect(&proxy).await?;
    assert_eq!(client.ask("first").await?, "re:first\n");
    assert_eq!(client.ask("second").await?, "re:second\n");
    assert_eq!(held.caught(LONG).await?, b"first\n");
    assert_eq!(held.deliver(b"", LONG).await?, b"re:first\n");
    assert_eq!(toy.told(), ["first", "second", "first"]);
    let mut never = proxy.hold_request("absent", Hold::Copy);
    assert_eq!(never.caught(SOON).await.expect_err("nothing was sent").kind(), io::ErrorKind::TimedOut);
    proxy.heal();
    assert_eq!(never.caught(SOON).await.expect_err("it was healed").kind(), io::ErrorKind::NotFound);
    Ok(())
}

#[tokio::test]
async fn a_server_that_is_not_there_ends_the_connection_and_the_proxy_ends_with_its_value() -> io::Result<()> {
    let proxy = Proxy::start("127.0.0.1:1").await?;
    assert_eq!(Client::connect(&proxy).await?.rest().await, "");
    let (_toy, proxy) = pair().await?;
    let mut client = Client::connect(&proxy).await?;
    client.ask("here").await?;
    drop(proxy);
    assert_eq!(client.rest().await, "");
    Ok(())
}

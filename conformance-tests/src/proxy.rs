//! A network that misbehaves on purpose: a proxy on the loopback that cuts, delays, swallows, freezes, refuses, and delivers
//! late, and that counts what passes.
//!
//! It knows bytes and directions, not protocols. Faults are armed while it runs; each says when it ends.

use std::collections::VecDeque;
use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::sync::{Notify, mpsc, oneshot, watch};
use tokio::task::{JoinHandle, JoinSet};
use tokio::time::{Instant, sleep_until, timeout};

use crate::harness::Rng;

/// The way that bytes go.
#[allow(clippy::exhaustive_enums, reason = "a stream has two directions")]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// From the client under test to the server.
    ToServer,
    /// From the server to the client under test.
    ToClient,
}

/// Where the bytes before a [`cut`](Proxy::cut) are counted from.
#[allow(clippy::exhaustive_enums, reason = "there is no third beginning")]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CountFrom {
    /// From this call on, over all connections together.
    Now,
    /// From the beginning of each connection, old ones included.
    Connection,
}

/// What becomes of a request that [`hold_request`](Proxy::hold_request) keeps.
#[allow(clippy::exhaustive_enums, reason = "a request arrives now or it does not")]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hold {
    /// It goes to the server as usual; a copy is kept, as a network does that delivers twice.
    Copy,
    /// It does not reach the server, and the client's connection is cut, as by a network that delivers late.
    Instead,
}

/// How much of a request or a reply may be quiet before it counts as complete, where only silence can tell.
const QUIET: Duration = Duration::from_millis(30);

/// A proxy between a client under test and its server.
///
/// It listens on a loopback port of its own until it is dropped, which cuts everything that is still connected.
#[derive(Debug)]
pub struct Proxy {
    address: SocketAddr,
    shared: Arc<Shared>,
    // Bound and never listening: it keeps the port ours while connections are refused.
    _reserved: TcpSocket,
    accepting: Mutex<Option<JoinHandle<()>>>,
}

impl Proxy {
    /// Listens on a free loopback port and forwards to `upstream` (`host:port`), which need not be there yet.
    ///
    /// # Errors
    /// Those of the operating system.
    pub async fn start(upstream: impl Into<String>) -> io::Result<Self> {
        Self::start_seeded(upstream, 0).await
    }

    /// Does the same with a seed for what is random: the length of each [delay](Self::delay).
    ///
    /// # Errors
    /// Those of the operating system.
    pub async fn start_seeded(upstream: impl Into<String>, seed: u64) -> io::Result<Self> {
        let reserved = bind(SocketAddr::from(([127, 0, 0, 1], 0)))?;
        let address = reserved.local_addr()?;
        let shared = Arc::new(Shared {
            upstream: upstream.into(),
            rules: Mutex::new(Rules::new(Rng::new(seed))),
            bytes: [AtomicU64::new(0), AtomicU64::new(0)],
            connections: AtomicU64::new(0),
            open: AtomicU64::new(0),
            trips: AtomicU64::new(0),
            unanswered: AtomicU64::new(0),
            frozen: watch::Sender::new(false),
            cut_all: watch::Sender::new(0),
        });
        let accepting = tokio::spawn(accept(bind(address)?.listen(1024)?, Arc::clone(&shared)));
        Ok(Self { address, shared, _reserved: reserved, accepting: Mutex::new(Some(accepting)) })
    }

    /// Returns where clients have to connect.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Lets `bytes` more bytes of `direction` pass and then cuts the connection that carried the last of them, both ways, once.
    /// With zero, the next byte is what cuts. It replaces a cut of the same direction that has not happened yet.
    pub fn cut(&self, direction: Direction, bytes: u64, from: CountFrom) {
        self.rules().cut[direction as usize] = Some(Cut { left: bytes, from });
    }

    /// How many connections a [`cut`](Self::cut) has ended since the counters were reset.
    #[must_use]
    pub fn cuts(&self) -> u64 {
        self.rules().cuts
    }

    /// Cuts every connection that is open now.
    pub fn cut_all(&self) {
        self.shared.cut_all.send_modify(|n| *n += 1);
    }

    /// Delays everything that goes in `direction` by a random time from `least` to `most`, in order, until it is called again
    /// with zeros.
    pub fn delay(&self, direction: Direction, least: Duration, most: Duration) {
        self.rules().delay[direction as usize] = (least, most);
    }

    /// Swallows everything that goes in `direction` from now on: the connections stay open and the bytes are gone.
    /// [`heal`](Self::heal) ends it, for connections that nothing was swallowed from; the others stay mute, since a stream with
    /// a hole in it is worse than none.
    pub fn swallow(&self, direction: Direction) {
        self.rules().swallow[direction as usize] = Swallow::All;
    }

    /// Swallows the next reply, on whichever connection it comes: what the server sends until the client sends again.
    pub fn swallow_next_reply(&self) {
        self.rules().swallow[Direction::ToClient as usize] = Swallow::Next;
    }

    /// How many bytes were swallowed since the counters were reset.
    #[must_use]
    pub fn swallowed(&self) -> u64 {
        self.rules().swallowed
    }

    /// Stops all traffic in both directions. Connections stay open and new ones are accepted, as by a server that was stopped
    /// with a signal; what is sent arrives after the [`thaw`](Self::thaw).
    pub fn freeze(&self) {
        self.shared.frozen.send_replace(true);
    }

    /// Ends a [`freeze`](Self::freeze).
    pub fn thaw(&self) {
        self.shared.frozen.send_replace(false);
    }

    /// Refuses new connections, as a port does that nobody listens on, and cuts the open ones. Doing it twice is no error.
    pub async fn refuse(&self) {
        let accepting = lock(&self.accepting).take();
        if let Some(task) = accepting {
            task.abort();
            // The listener is closed when the task is gone, not when it was asked to go.
            let _ = task.await;
        }
        self.cut_all();
    }

    /// Ends a [`refuse`](Self::refuse).
    ///
    /// # Errors
    /// Those of the operating system.
    pub async fn accept_again(&self) -> io::Result<()> {
        let mut accepting = lock(&self.accepting);
        if accepting.is_none() {
            *accepting = Some(tokio::spawn(accept(bind(self.address)?.listen(1024)?, Arc::clone(&self.shared))));
        }
        Ok(())
    }

    /// Keeps the next request that contains `needle` (any, if that is empty) for a delivery later than its time. A request that
    /// is told by its content must arrive in one piece, so it must be short.
    #[must_use = "without it the request cannot be delivered"]
    pub fn hold_request(&self, needle: impl Into<Vec<u8>>, hold: Hold) -> HeldRequest {
        let (sender, receiver) = oneshot::channel();
        self.rules().holds.push_back(Holding { needle: needle.into(), hold, sender });
        HeldRequest { upstream: self.shared.upstream.clone(), state: HeldState::Expected(receiver) }
    }

    /// Ends every fault that was armed: cuts, delays, swallowing, freezing and requests that were to be held. It does not
    /// [accept again](Self::accept_again).
    pub fn heal(&self) {
        let mut rules = self.rules();
        *rules = Rules { cuts: rules.cuts, swallowed: rules.swallowed, ..Rules::new(rules.random.clone()) };
        drop(rules);
        self.thaw();
    }

    /// How many **round trips** were made since the counters were reset: a request flight begins with the first bytes of a
    /// connection, and with every byte to the server that follows a byte to the client. However many packets or commands it
    /// has, it is one.
    #[must_use]
    pub fn round_trips(&self) -> u64 {
        self.shared.trips.load(Ordering::SeqCst)
    }

    /// How many bytes came from the sender of `direction` since the counters were reset, those included that a fault then
    /// kept back.
    #[must_use]
    pub fn bytes(&self, direction: Direction) -> u64 {
        self.shared.bytes[direction as usize].load(Ordering::SeqCst)
    }

    /// How many connections were accepted since the counters were reset.
    #[must_use]
    pub fn connections(&self) -> u64 {
        self.shared.connections.load(Ordering::SeqCst)
    }

    /// How many connections are open.
    #[must_use]
    pub fn open_connections(&self) -> u64 {
        self.shared.open.load(Ordering::SeqCst)
    }

    /// Waits until no byte has passed for `length` and nothing is unanswered: what a first use does in the background, such as to make
    /// another connection, is over then, however long the server takes for it. Returns whether there was such a silence within `limit`.
    pub async fn silence(&self, length: Duration, limit: Duration) -> bool {
        let passed = || [Direction::ToServer, Direction::ToClient].map(|way| self.bytes(way));
        let until = Instant::now() + limit;
        let (mut last, mut since) = (passed(), Instant::now());
        loop {
            sleep_until(since + length).await;
            let now = passed();
            if now == last && self.shared.unanswered.load(Ordering::SeqCst) == 0 {
                return true;
            }
            (last, since) = (now, Instant::now());
            if since > until {
                return false;
            }
        }
    }

    /// Sets all counters to zero. A connection stays in the middle of the trip that it is in.
    pub fn reset_counters(&self) {
        let mut rules = self.rules();
        rules.cuts = 0;
        rules.swallowed = 0;
        for counter in [&self.shared.trips, &self.shared.connections].into_iter().chain(&self.shared.bytes) {
            counter.store(0, Ordering::SeqCst);
        }
    }

    fn rules(&self) -> MutexGuard<'_, Rules> {
        lock(&self.shared.rules)
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        if let Some(task) = lock(&self.accepting).take() {
            task.abort();
        }
        self.cut_all();
    }
}

/// A request that the proxy keeps, or will keep.
#[derive(Debug)]
pub struct HeldRequest {
    upstream: String,
    state: HeldState,
}

#[derive(Debug)]
enum HeldState {
    Expected(oneshot::Receiver<Vec<u8>>),
    Here(Vec<u8>),
}

impl HeldRequest {
    /// Waits until the request has come, and returns its bytes.
    ///
    /// # Errors
    /// `TimedOut` if it has not come within `limit`, `NotFound` if the proxy was healed or dropped before.
    pub async fn caught(&mut self, limit: Duration) -> io::Result<&[u8]> {
        if let HeldState::Expected(receiver) = &mut self.state {
            let bytes = timeout(limit, receiver).await.map_err(|_| io::Error::from(io::ErrorKind::TimedOut))?;
            self.state = HeldState::Here(bytes.map_err(|_| io::Error::from(io::ErrorKind::NotFound))?);
        }
        match &self.state {
            HeldState::Here(bytes) => Ok(bytes),
            HeldState::Expected(_) => Err(io::ErrorKind::NotFound.into()),
        }
    }

    /// Delivers the request to the server on a connection of its own, after `prelude` (what the protocol wants first, such as a
    /// login; often nothing), and returns what the server answers to the request. It can be delivered more than once.
    ///
    /// # Errors
    /// Those of [`caught`](Self::caught), and of the operating system.
    pub async fn deliver(&mut self, prelude: &[u8], limit: Duration) -> io::Result<Vec<u8>> {
        let request = self.caught(limit).await?.to_vec();
        let mut server = TcpStream::connect(&self.upstream).await?;
        if !prelude.is_empty() {
            server.write_all(prelude).await?;
            answer(&mut server, limit).await?;
        }
        server.write_all(&request).await?;
        answer(&mut server, limit).await
    }
}

/// Reads what comes until it is quiet.
async fn answer(server: &mut TcpStream, limit: Duration) -> io::Result<Vec<u8>> {
    let mut all = Vec::new();
    let mut buffer = vec![0; 64 * 1024];
    let mut patience = limit;
    loop {
        match timeout(patience, server.read(&mut buffer)).await {
            Ok(Ok(0)) => return Ok(all),
            Ok(Ok(n)) => all.extend_from_slice(&buffer[..n]),
            Ok(Err(e)) => return Err(e),
            Err(_) if all.is_empty() => return Err(io::ErrorKind::TimedOut.into()),
            Err(_) => return Ok(all),
        }
        patience = QUIET;
    }
}

struct Shared {
    upstream: String,
    rules: Mutex<Rules>,
    bytes: [AtomicU64; 2],
    connections: AtomicU64,
    open: AtomicU64,
    trips: AtomicU64,
    /// The connections on which the server has the next word: it was asked, or has not said yet that it is there.
    unanswered: AtomicU64,
    frozen: watch::Sender<bool>,
    cut_all: watch::Sender<u64>,
}

impl fmt::Debug for Shared {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Shared").field("upstream", &self.upstream).finish_non_exhaustive()
    }
}

struct Rules {
    cut: [Option<Cut>; 2],
    delay: [(Duration, Duration); 2],
    swallow: [Swallow; 2],
    holds: VecDeque<Holding>,
    random: Rng,
    cuts: u64,
    swallowed: u64,
}

impl Rules {
    fn new(random: Rng) -> Self {
        Self {
            cut: [None, None],
            delay: [(Duration::ZERO, Duration::ZERO); 2],
            swallow: [Swallow::Nothing; 2],
            holds: VecDeque::new(),
            random,
            cuts: 0,
            swallowed: 0,
        }
    }
}

struct Cut {
    left: u64,
    from: CountFrom,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Swallow {
    Nothing,
    Next,
    All,
}

struct Holding {
    needle: Vec<u8>,
    hold: Hold,
    sender: oneshot::Sender<Vec<u8>>,
}

/// What the two pumps of one connection know together.
struct Connection {
    shared: Arc<Shared>,
    flight: Mutex<Flight>,
    over: Notify,
}

#[derive(Default)]
struct Flight {
    /// Bytes seen in each direction since the connection began.
    seen: [u64; 2],
    /// Whether the last bytes went to the server.
    asking: bool,
    /// Whether the last bytes came from the server; there may have been none yet.
    answered: bool,
    /// Nothing more passes in this direction.
    mute: [bool; 2],
    /// The reply that is coming is swallowed, until the client sends again.
    reply_swallowed: bool,
    /// A copy of the request in flight, for whoever holds it.
    copy: Option<(Vec<u8>, oneshot::Sender<Vec<u8>>)>,
}

/// What becomes of one chunk.
struct Verdict {
    pass: usize,
    due: Instant,
    then: Then,
}

enum Then {
    GoOn,
    Cut,
    /// The chunk, and what follows it until it is quiet, is kept for later; then the connection is cut.
    Keep(oneshot::Sender<Vec<u8>>),
}

enum Parcel {
    Bytes(Vec<u8>, Instant),
    End,
    Cut,
}

impl Connection {
    fn new(shared: &Arc<Shared>) -> Arc<Self> {
        shared.unanswered.fetch_add(1, Ordering::SeqCst);
        Arc::new(Self { shared: Arc::clone(shared), flight: Mutex::default(), over: Notify::new() })
    }

    fn judge(&self, direction: Direction, chunk: &[u8]) -> Verdict {
        let way = direction as usize;
        self.shared.bytes[way].fetch_add(chunk.len() as u64, Ordering::SeqCst);
        let mut flight = lock(&self.flight);
        let mut rules = lock(&self.shared.rules);
        let seen_before = flight.seen[way];
        flight.seen[way] += chunk.len() as u64;
        let (least, most) = rules.delay[way];
        let due = Instant::now() + least + rules.random.duration(most.saturating_sub(least));
        let mut verdict = Verdict { pass: chunk.len(), due, then: Then::GoOn };

        match direction {
            Direction::ToServer => {
                if !std::mem::replace(&mut flight.asking, true) {
                    self.shared.trips.fetch_add(1, Ordering::SeqCst);
                }
                if std::mem::take(&mut flight.answered) {
                    self.shared.unanswered.fetch_add(1, Ordering::SeqCst);
                }
                flight.reply_swallowed = false;
                if let Some((copy, _)) = &mut flight.copy {
                    copy.extend_from_slice(chunk);
                } else if let Some(at) = rules.holds.iter().position(|holding| contains(chunk, &holding.needle)) {
                    let holding = rules.holds.remove(at).expect("its position was just found");
                    match holding.hold {
                        Hold::Copy => flight.copy = Some((chunk.to_vec(), holding.sender)),
                        Hold::Instead => return Verdict { pass: 0, due, then: Then::Keep(holding.sender) },
                    }
                }
            }
            Direction::ToClient => {
                flight.asking = false;
                if !std::mem::replace(&mut flight.answered, true) {
                    self.shared.unanswered.fetch_sub(1, Ordering::SeqCst);
                }
                if let Some((copy, sender)) = flight.copy.take() {
                    // Whoever waited for it may have gone, which is no fault of the connection.
                    let _ = sender.send(copy);
                }
                if rules.swallow[way] == Swallow::Next {
                    rules.swallow[way] = Swallow::Nothing;
                    flight.reply_swallowed = true;
                }
            }
        }

        flight.mute[way] |= rules.swallow[way] == Swallow::All;
        if flight.mute[way] || (direction == Direction::ToClient && flight.reply_swallowed) {
            rules.swallowed += chunk.len() as u64;
            verdict.pass = 0;
            return verdict;
        }

        let cut_at = rules.cut[way].as_mut().and_then(|cut| {
            let left = match cut.from {
                CountFrom::Now => cut.left,
                CountFrom::Connection => cut.left.saturating_sub(seen_before),
            };
            let crossed = chunk.len() as u64 >= left;
            if cut.from == CountFrom::Now {
                cut.left = cut.left.saturating_sub(chunk.len() as u64);
            }
            crossed.then_some(left)
        });
        if let Some(left) = cut_at {
            rules.cut[way] = None;
            rules.cuts += 1;
            verdict.pass = usize::try_from(left).unwrap_or(usize::MAX).min(chunk.len());
            verdict.then = Then::Cut;
        }
        verdict
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        if !lock(&self.flight).answered {
            self.shared.unanswered.fetch_sub(1, Ordering::SeqCst);
        }
    }
}

fn contains(chunk: &[u8], needle: &[u8]) -> bool {
    needle.is_empty() || chunk.windows(needle.len()).any(|window| window == needle)
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // A panic of a test must not turn into a second one in the proxy.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn bind(address: SocketAddr) -> io::Result<TcpSocket> {
    let socket = TcpSocket::new_v4()?;
    socket.set_reuseaddr(true)?;
    socket.set_reuseport(true)?;
    socket.bind(address)?;
    Ok(socket)
}

async fn accept(listener: TcpListener, shared: Arc<Shared>) {
    // Connections outlive the listener, so that refusing new ones is a fault of its own; they end with `cut_all`.
    while let Ok((client, _)) = listener.accept().await {
        shared.connections.fetch_add(1, Ordering::SeqCst);
        let cut = shared.cut_all.subscribe();
        let shared = Arc::clone(&shared);
        shared.open.fetch_add(1, Ordering::SeqCst);
        tokio::spawn(async move {
            serve(client, &shared, cut).await;
            shared.open.fetch_sub(1, Ordering::SeqCst);
        });
    }
}

async fn serve(client: TcpStream, shared: &Arc<Shared>, mut cut: watch::Receiver<u64>) {
    let connection = Connection::new(shared);
    let Ok(server) = TcpStream::connect(&shared.upstream).await else { return };
    // A proxy that waits for more bytes would measure its own delay.
    let _ = (client.set_nodelay(true), server.set_nodelay(true));
    let (client_read, client_write) = client.into_split();
    let (server_read, server_write) = server.into_split();
    let mut pumps = JoinSet::new();
    for (direction, read, write) in
        [(Direction::ToServer, client_read, server_write), (Direction::ToClient, server_read, client_write)]
    {
        let (sender, receiver) = mpsc::unbounded_channel();
        pumps.spawn(take_in(Arc::clone(&connection), direction, read, sender));
        pumps.spawn(give_out(Arc::clone(&connection), write, receiver));
    }
    let all_ended = async { while pumps.join_next().await.is_some() {} };
    tokio::select! {
        () = all_ended => {}
        () = connection.over.notified() => {}
        _ = cut.changed() => {}
    }
}

async fn take_in(
    connection: Arc<Connection>,
    direction: Direction,
    mut from: OwnedReadHalf,
    to: mpsc::UnboundedSender<Parcel>,
) {
    let mut buffer = vec![0; 64 * 1024];
    loop {
        let n = match from.read(&mut buffer).await {
            Ok(n) if n > 0 => n,
            _ => {
                let _ = to.send(Parcel::End);
                return;
            }
        };
        let verdict = connection.judge(direction, &buffer[..n]);
        if verdict.pass > 0 {
            let _ = to.send(Parcel::Bytes(buffer[..verdict.pass].to_vec(), verdict.due));
        }
        match verdict.then {
            Then::GoOn => {}
            Then::Cut => {
                let _ = to.send(Parcel::Cut);
                return;
            }
            Then::Keep(sender) => {
                let mut kept = buffer[..n].to_vec();
                while let Ok(Ok(n @ 1..)) = timeout(QUIET, from.read(&mut buffer)).await {
                    kept.extend_from_slice(&buffer[..n]);
                }
                let _ = sender.send(kept);
                let _ = to.send(Parcel::Cut);
                return;
            }
        }
    }
}

async fn give_out(connection: Arc<Connection>, mut to: OwnedWriteHalf, mut parcels: mpsc::UnboundedReceiver<Parcel>) {
    let mut frozen = connection.shared.frozen.subscribe();
    while let Some(parcel) = parcels.recv().await {
        if let Parcel::Bytes(_, due) = &parcel {
            sleep_until(*due).await;
        }
        if frozen.wait_for(|frozen| !frozen).await.is_err() {
            return;
        }
        match parcel {
            Parcel::Bytes(bytes, _) => {
                if to.write_all(&bytes).await.is_err() {
                    connection.over.notify_one();
                    return;
                }
            }
            Parcel::End => {
                let _ = to.shutdown().await;
                return;
            }
            Parcel::Cut => {
                connection.over.notify_one();
                return;
            }
        }
    }
}

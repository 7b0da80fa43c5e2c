//! One connection: how it begins, and how a batch goes over it.
//!
//! Framing and parsing are the client crate's. The connection is made here, because the crate's own pool says neither which life
//! of a server a connection belongs to nor how to log in. Whether to ask again is not known here.

use std::io;
use std::net::TcpStream as Probe;
use std::sync::Arc;
use std::time::{Duration, Instant};

use memcache::exp::{AsyncMetaConnection, Error as ClientError, MetaCommand, MetaOp, ReturnCode, parse_meta_result};
use session_core::{ErrorKind, WriteId};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::net::TcpStream;
use tokio::runtime::{Handle, Id};

use crate::transport::{Answer, Command, Failure, Flight, Item, Life, Read, When};

/// The first version whose meta commands are ours.
const OLDEST: (u64, u64, u64) = (1, 6, 10);
/// The first version that takes a number of the client's choice for what it stores.
const CHOSEN: (u64, u64, u64) = (1, 6, 27);

/// Has the server list its keys. It does so for one at a time.
const LIST: &[u8] = b"lru_crawler metadump hash\r\n";
/// How long to wait for others who have it list its keys, and how often to ask.
const PATIENCE: Duration = Duration::from_secs(10);
const PAUSE: Duration = Duration::from_millis(5);

/// What an item has beside key and value at most, in the eyes of the server.
const OVERHEAD: usize = 64;

/// Times of more seconds are read as points in time.
const LONGEST_SPAN: u64 = 30 * 24 * 3600;

/// How long a connection that carried a batch is taken to be open.
const WARM: Duration = Duration::from_millis(2);

/// Later than any deadline: for which items the mark is given. A point in time that fits into the 31 bits that servers read.
const ALWAYS: &str = "R2147483647";

/// What a server says of itself.
#[derive(Debug)]
pub(crate) struct Facts {
    pub(crate) life: Life,
    /// Whether the numbers of items are chosen by us, and never come again.
    pub(crate) chosen: bool,
    pub(crate) item_limit: usize,
    /// Its time, in seconds since 1970, when it was asked.
    time: u64,
    asked: Instant,
}

impl Facts {
    /// Says why a flight cannot be sent to this server, if it cannot.
    pub(crate) fn judge(&self, flight: &Flight) -> Result<(), Failure> {
        if flight.life.is_some_and(|life| life != self.life) && !self.chosen {
            return Err(Failure::restarted());
        }
        for command in &flight.commands {
            if let Command::Set { key, value, .. } = command
                && key.len() + value.len() + OVERHEAD > self.item_limit
            {
                let message = format!("it holds items of {} bytes at most; see its option -I", self.item_limit);
                return Err(Failure::new(ErrorKind::TooLarge, message));
            }
        }
        Ok(())
    }

    fn now(&self) -> u64 {
        self.time + self.asked.elapsed().as_secs()
    }
}

/// A connection that is in step: nothing is under way.
pub(crate) struct Connection {
    meta: AsyncMetaConnection,
    /// The same socket, to see whether the peer has closed it; the client does not tell.
    probe: Probe,
    runtime: Id,
    pub(crate) facts: Arc<Facts>,
    pub(crate) idle_since: Instant,
}

impl Connection {
    /// Connects, logs in, and asks the server about itself.
    pub(crate) async fn open(host: &str, port: u16, login: Option<(&str, &str)>) -> Result<Self, Failure> {
        let unreachable = |error| Failure::unavailable("it cannot be reached").with_source(error);
        let mut stream = TcpStream::connect((host, port)).await.map_err(unreachable)?;
        stream.set_nodelay(true).map_err(unreachable)?;
        let facts = Arc::new(greet(&mut stream, login).await?);
        let stream = stream.into_std().map_err(unreachable)?;
        let probe = stream.try_clone().map_err(unreachable)?;
        let meta = AsyncMetaConnection::from_stream(TcpStream::from_std(stream).map_err(unreachable)?);
        Ok(Self { meta, probe, runtime: Handle::current().id(), facts, idle_since: Instant::now() })
    }

    /// Whether it may carry another batch: the peer has not closed it, nothing has come unasked, and its runtime is this one.
    pub(crate) fn is_usable(&self, oldest: Duration) -> bool {
        let quiet = || matches!(self.probe.peek(&mut [0]), Err(error) if error.kind() == io::ErrorKind::WouldBlock);
        let idle = self.idle_since.elapsed();
        // The look costs as much as a command. What has just been used is not worth it: if it broke since, that will be seen.
        self.runtime == Handle::current().id() && idle < oldest && (idle < WARM || quiet())
    }

    /// Sends a batch and reads its answers. After a failure the connection is out of step.
    pub(crate) async fn exchange(&mut self, commands: Vec<Command>) -> Result<Vec<Answer>, Failure> {
        let commands: Vec<_> = commands.into_iter().map(|command| self.encode(command)).collect::<Result<_, _>>()?;
        let responses = self.meta.execute_batch(&commands).await.map_err(refused)?;
        let mut answers = Vec::with_capacity(responses.len());
        for response in responses {
            answers.push(parse_meta_result(response).map_err(refused).and_then(|result| {
                Ok(match result.rc {
                    ReturnCode::Va | ReturnCode::Hd if result.ttl.is_some() => Answer::Item(Item {
                        cas: result.cas.unwrap_or_default(),
                        seconds: result.ttl.and_then(|seconds| u64::try_from(seconds).ok()),
                        size: result.size.unwrap_or_default(),
                        marked: result.busy,
                        value: result.value.unwrap_or_default(),
                    }),
                    ReturnCode::Hd => Answer::Done(result.cas.unwrap_or_default()),
                    ReturnCode::En | ReturnCode::Nf => Answer::Absent,
                    ReturnCode::Ex => Answer::Changed,
                    ReturnCode::Ns => Answer::NotStored,
                    _ => return Err(Failure::unexpected("it answered with something that belongs to no command")),
                })
            })?);
        }
        Ok(answers)
    }

    fn encode(&self, command: Command) -> Result<MetaCommand, Failure> {
        Ok(match command {
            Command::Get { key, what } => {
                let get = MetaCommand::new(MetaOp::Get, key.as_bytes()).flag("c").flag("t");
                match what {
                    Read::Value => get.flag("v"),
                    Read::ValueAndMark => get.flag("v").flag(ALWAYS),
                    Read::Mark => get.flag(ALWAYS),
                    Read::Size => get.flag("s"),
                }
            }
            Command::Set { key, value, when, seconds } => {
                let set = MetaCommand::new(MetaOp::Set, key.as_bytes()).value(value).flag("c");
                let set = match when {
                    When::Absent => set.flag("ME"),
                    When::Unchanged(cas) => set.flag(format!("C{cas}")),
                    When::Append => set.flag("MA"),
                    When::AppendUnchanged(cas) => set.flag("MA").flag(format!("C{cas}")),
                };
                let set = if self.facts.chosen { set.flag(format!("E{}", number()?)) } else { set };
                let until = if seconds > LONGEST_SPAN { self.facts.now() + seconds } else { seconds };
                set.flag(format!("T{until}"))
            }
            Command::Delete { key, unchanged } => {
                let delete = MetaCommand::new(MetaOp::Delete, key.as_bytes());
                match unchanged {
                    Some(cas) => delete.flag(format!("C{cas}")),
                    None => delete,
                }
            }
        })
    }

    /// Has the server list its keys. The connection is used up by it.
    pub(crate) async fn keys(
        self,
        prefix: &str,
        limit: Duration,
        key: &mut (dyn for<'k> FnMut(&'k str) + Send + '_),
    ) -> Result<(), Failure> {
        let lost = |error| Failure::unavailable("the connection broke while it listed its keys").with_source(error);
        let mut reader = BufReader::new(TcpStream::from_std(self.into_std().map_err(lost)?).map_err(lost)?);
        reader.write_all(LIST).await.map_err(lost)?;
        let mut line = String::new();
        let patient_until = Instant::now() + PATIENCE;
        loop {
            line.clear();
            let read = tokio::time::timeout(limit, reader.read_line(&mut line)).await;
            let read = read.map_err(|_| Failure::unavailable("it stopped in the middle of the list of its keys"))?;
            if read.map_err(lost)? == 0 {
                return Err(Failure::unavailable("the connection was closed while it listed its keys"));
            }
            let mut words = line.split_whitespace();
            match words.next() {
                Some("END") => return Ok(()),
                Some("BUSY") if Instant::now() > patient_until => {
                    return Err(Failure::unavailable("it is busy listing its keys for somebody else"));
                }
                Some("BUSY") => {
                    tokio::time::sleep(PAUSE).await;
                    reader.write_all(LIST).await.map_err(lost)?;
                }
                Some(word) => match word.strip_prefix("key=").and_then(plain) {
                    Some(found) if found.starts_with(prefix) => key(&found),
                    Some(_) => {}
                    None => {
                        let message = "it does not list its keys; start it without -o no_lru_crawler";
                        return Err(Failure::new(ErrorKind::Unsupported, message));
                    }
                },
                None => {}
            }
        }
    }

    fn into_std(self) -> io::Result<Probe> {
        // What the client has of the socket goes; the socket stays.
        drop(self.meta);
        Ok(self.probe)
    }
}

/// Takes the percent signs from a key, as a listing has it.
fn plain(text: &str) -> Option<String> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((&byte, tail)) = rest.split_first() {
        rest = tail;
        if byte == b'%' {
            let hex = std::str::from_utf8(tail.get(..2)?).ok()?;
            bytes.push(u8::from_str_radix(hex, 16).ok()?);
            rest = &tail[2..];
        } else {
            bytes.push(byte);
        }
    }
    // A key that is no text is nobody of ours.
    Some(String::from_utf8(bytes).unwrap_or_default())
}

/// Returns a number for an item that no other item ever had.
fn number() -> Result<u64, Failure> {
    let random = WriteId::random().map_err(|error| Failure::new(error.kind(), "the operating system gave no randomness"))?;
    let [a, b, c, d, e, f, g, h, ..] = random.to_bytes();
    Ok((u64::from_le_bytes([a, b, c, d, e, f, g, h]) >> 1).max(1))
}

/// Logs in, and reads what the server says of itself.
async fn greet(stream: &mut TcpStream, login: Option<(&str, &str)>) -> Result<Facts, Failure> {
    let lost = |error| Failure::unavailable("the connection broke while it was greeted").with_source(error);
    let mut hello = Vec::new();
    if let Some((user, password)) = login {
        let words = format!("{user} {password}");
        hello.extend_from_slice(format!("set auth 0 0 {}\r\n{words}\r\n", words.len()).as_bytes());
    }
    hello.extend_from_slice(b"stats\r\nstats settings\r\n");
    stream.write_all(&hello).await.map_err(lost)?;
    let mut reader = BufReader::new(stream);
    let mut line = String::new();
    let mut said = Said::default();
    let mut ends = 0;
    while ends < 2 {
        line.clear();
        if reader.read_line(&mut line).await.map_err(lost)? == 0 {
            return Err(Failure::unavailable("it closed the connection at once; it may have too many (its option -c)"));
        }
        let text = line.trim_end();
        let mut words = text.splitn(3, ' ');
        match (words.next(), words.next(), words.next()) {
            (Some("STAT"), Some(name), Some(value)) => said.hear(name, value),
            (Some("END"), ..) => ends += 1,
            (Some("STORED"), ..) if login.is_some() => {}
            _ if login.is_some() && (text.contains("unauthenticated") || text.contains("authentication failure")) => {
                return Err(Failure::new(ErrorKind::Config, "it refuses this user and password"));
            }
            _ if text.contains("unauthenticated") => {
                let message = "it asks for a user and a password; write memcache://user:password@host";
                return Err(Failure::new(ErrorKind::Config, message));
            }
            _ => return Err(Failure::new(ErrorKind::Config, "it does not speak the text protocol of memcached")),
        }
    }
    said.facts()
}

#[derive(Default)]
struct Said {
    version: Option<(u64, u64, u64)>,
    process: Option<u64>,
    time: Option<u64>,
    uptime: Option<u64>,
    item_limit: Option<usize>,
    cas: bool,
}

impl Said {
    fn hear(&mut self, name: &str, value: &str) {
        match name {
            "version" => self.version = version(value),
            "pid" => self.process = value.parse().ok(),
            "time" => self.time = value.parse().ok(),
            "uptime" => self.uptime = value.parse().ok(),
            "item_size_max" => self.item_limit = value.parse().ok(),
            "cas_enabled" => self.cas = value == "yes",
            _ => {}
        }
    }

    fn facts(self) -> Result<Facts, Failure> {
        let refuse = |message: &'static str| Err(Failure::new(ErrorKind::Config, message));
        let Some(version) = self.version else { return refuse("it does not say which version of memcached it is") };
        if version < OLDEST {
            return refuse("it is older than memcached 1.6.10, which is the first whose meta commands can be used");
        }
        if !self.cas {
            return refuse("its option -C forbids to compare items, without which an update could be lost");
        }
        let (Some(process), Some(time), Some(uptime)) = (self.process, self.time, self.uptime) else {
            return refuse("it does not say since when it runs");
        };
        Ok(Facts {
            life: Life { process, started: time.saturating_sub(uptime) },
            chosen: version >= CHOSEN,
            item_limit: self.item_limit.unwrap_or(1 << 20),
            time,
            asked: Instant::now(),
        })
    }
}

fn version(text: &str) -> Option<(u64, u64, u64)> {
    let mut numbers = text.split(|c: char| !c.is_ascii_digit()).map(str::parse);
    let mut next = || numbers.next()?.ok();
    Some((next()?, next()?, next()?))
}

/// Draws the conclusion from what the client says of a batch that was sent. Its own words may hold a key, and are left out.
fn refused(error: ClientError) -> Failure {
    match error {
        ClientError::Io(error) => {
            Failure::unavailable("the connection broke before the answer").with_source(error).after_sending(true)
        }
        ClientError::Server(text) if text.contains("out of memory") => {
            Failure::unavailable("it has no memory for the item; see its option -m").after_sending(true)
        }
        ClientError::Server(text) if text.contains("too large") => {
            Failure::new(ErrorKind::TooLarge, "it has become less patient with large items; see its option -I")
                .after_sending(true)
        }
        ClientError::Rejected(_) => Failure::unexpected("it does not understand a command"),
        _ => Failure::unexpected("it answered with something that cannot be read"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_compared_as_numbers() {
        assert_eq!(version("1.6.18"), Some((1, 6, 18)));
        assert_eq!(version("1.6.40-rc1"), Some((1, 6, 40)));
        assert!(version("1.6.9").unwrap() < OLDEST && version("1.6.27").unwrap() >= CHOSEN);
        assert_eq!(version("one"), None);
    }

    #[test]
    fn listed_keys_lose_their_percent_signs() {
        assert_eq!(plain("app%3alock.a%2Cb").as_deref(), Some("app:lock.a,b"));
        assert_eq!(plain("%zz"), None);
        assert_eq!(plain("%"), None);
        assert_eq!(plain("%ff").as_deref(), Some(""));
    }

    #[test]
    fn a_number_fits_into_63_bits_and_is_not_zero() {
        for _ in 0..1000 {
            assert!((1..1 << 63).contains(&number().expect("there is randomness")));
        }
    }
}

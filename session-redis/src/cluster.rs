//! A Redis Cluster: which server has a slot, and what to do when it says that another one does.
//!
//! The routing is ours because the client's own repeats a command after a broken connection without saying so, and a write that is
//! refused may only be called refused if it was sent once (`protocol.md` 4). A redirection is a refusal before anything was done, so
//! it is followed here.

use std::collections::HashMap;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use redis::{Client, Cmd, Pipeline, RedisError, ServerErrorKind, Value};

use crate::answers::spread;
use crate::link::{Failure, Link, Maker, Timeouts, error_kind};
use crate::replicas::Replicas;

/// How often a request follows redirections or waits for a slot that is moving.
const HOPS: u32 = 6;
/// How long a request waits for a slot that is moving before it asks again.
const MOVING: Duration = Duration::from_millis(25);
/// A map of the slots that is younger is not asked for again.
const FRESH: Duration = Duration::from_millis(100);

/// Makes a client for a host and a port, with everything else as configured.
pub(crate) type ClientAt = Box<dyn Fn(&str, u16) -> Result<Client, RedisError> + Send + Sync>;

pub(crate) struct Cluster {
    seeds: Vec<(String, u16)>,
    client_at: ClientAt,
    timeouts: Timeouts,
    wait: Option<(u32, Duration)>,
    state: Mutex<State>,
    refreshing: tokio::sync::Mutex<()>,
}

#[derive(Default)]
struct State {
    /// Sorted by their last slot.
    ranges: Vec<Range>,
    nodes: HashMap<String, Arc<Node>>,
    refreshed: Option<Instant>,
}

#[derive(Clone)]
struct Range {
    first: u16,
    last: u16,
    address: String,
}

/// A server of the cluster.
#[derive(Debug)]
pub(crate) struct Node {
    pub(crate) link: Link,
    pub(crate) replicas: Option<Replicas>,
}

impl Cluster {
    pub(crate) fn new(
        seeds: Vec<(String, u16)>,
        client_at: ClientAt,
        timeouts: Timeouts,
        wait: Option<(u32, Duration)>,
    ) -> Self {
        Self { seeds, client_at, timeouts, wait, state: Mutex::default(), refreshing: tokio::sync::Mutex::default() }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn node(&self, address: &str) -> Result<Arc<Node>, Failure> {
        if let Some(node) = self.state().nodes.get(address) {
            return Ok(node.clone());
        }
        let (host, port) = split(address)
            .ok_or_else(|| Failure::unexpected("the cluster named a server by something that is no address"))?;
        let maker = || {
            let client = (self.client_at)(host, port)
                .map_err(|_| Failure::unexpected("the cluster named a server whose address cannot be used"))?;
            Ok(Maker::Client(Box::new(client)))
        };
        let replicas = match self.wait {
            Some((count, limit)) => Some(Replicas::new(Link::new(maker()?, self.timeouts), count, limit)),
            None => None,
        };
        let node = Arc::new(Node { link: Link::new(maker()?, self.timeouts), replicas });
        Ok(self.state().nodes.entry(address.to_owned()).or_insert(node).clone())
    }

    /// Returns the server that has `slot`, as far as is known.
    pub(crate) async fn owner(&self, slot: u16) -> Result<Arc<Node>, Failure> {
        if self.state().refreshed.is_none() {
            self.refresh().await?;
        }
        let address = {
            let state = self.state();
            let index = state.ranges.partition_point(|range| range.last < slot);
            state.ranges.get(index).filter(|range| range.first <= slot).map(|range| range.address.clone())
        };
        match address {
            Some(address) => self.node(&address),
            None => {
                // Asked again by the next request.
                self.state().refreshed = None;
                Err(Failure::uncovered())
            }
        }
    }

    /// Asks any server that answers who has which slots.
    pub(crate) async fn refresh(&self) -> Result<(), Failure> {
        let _one = self.refreshing.lock().await;
        if self.state().refreshed.is_some_and(|at| at.elapsed() < FRESH) {
            return Ok(());
        }
        let mut addresses: Vec<String> = {
            let state = self.state();
            let mut known: Vec<_> = state.ranges.iter().map(|range| range.address.clone()).collect();
            known.dedup();
            known.extend(state.nodes.keys().cloned());
            known
        };
        addresses.extend(self.seeds.iter().map(|(host, port)| join(host, *port)));
        let mut seen = std::collections::HashSet::new();
        addresses.retain(|address| seen.insert(address.clone()));
        let mut commands = Pipeline::new();
        commands.cmd("CLUSTER").arg("SLOTS");
        let mut last = None;
        for address in addresses {
            let asked = match self.node(&address) {
                Ok(node) => node.link.ask(&commands).await,
                Err(failure) => Err(failure),
            };
            match asked {
                Ok(answers) => match answers.into_iter().next() {
                    Some(Value::ServerError(error)) => last = Some(Failure::refused(&error)),
                    Some(answer) => match ranges(&answer, &address) {
                        Some(ranges) if !ranges.is_empty() => {
                            let mut state = self.state();
                            let seeds = &self.seeds;
                            state.nodes.retain(|address, _| {
                                ranges.iter().any(|range| range.address == *address)
                                    || seeds.iter().any(|(host, port)| join(host, *port) == *address)
                            });
                            state.ranges = ranges;
                            state.refreshed = Some(Instant::now());
                            return Ok(());
                        }
                        _ => last = Some(Failure::uncovered()),
                    },
                    None => {}
                },
                Err(failure) => last = Some(failure),
            }
        }
        Err(last.unwrap_or_else(Failure::uncovered))
    }

    /// Sends commands that all belong to `slot` to the server that has it.
    pub(crate) async fn ask(&self, slot: u16, commands: &Pipeline) -> Result<Vec<Value>, Failure> {
        let mut node = self.owner(slot).await?;
        let mut asking = false;
        for hop in 0.. {
            let answers = if asking {
                let mut redirected = Pipeline::with_capacity(2 * commands.len());
                for command in commands.cmd_iter() {
                    redirected.cmd("ASKING").add_command(command.clone());
                }
                let answers = node.link.ask(&redirected).await;
                answers.map(|answers| answers.into_iter().skip(1).step_by(2).collect())
            } else {
                node.link.ask(commands).await
            };
            let answers: Vec<Value> = match answers {
                Ok(answers) => answers,
                Err(failure) => {
                    // The server may be gone and another one have its slots.
                    let _ = self.refresh().await;
                    return Err(failure);
                }
            };
            let redirection = answers.iter().find_map(|answer| match answer {
                Value::ServerError(error) => match error.kind() {
                    Some(kind @ (ServerErrorKind::Moved | ServerErrorKind::Ask)) => {
                        let target = error.details().and_then(|details| details.split_ascii_whitespace().nth(1));
                        Some((kind, target.unwrap_or_default().to_owned()))
                    }
                    Some(kind @ (ServerErrorKind::TryAgain | ServerErrorKind::ClusterDown)) => Some((kind, String::new())),
                    _ => None,
                },
                _ => None,
            });
            match redirection {
                None => return Ok(answers),
                Some(_) if hop == HOPS => return Ok(answers),
                Some((ServerErrorKind::Moved, target)) => {
                    asking = false;
                    self.moved(slot, &target);
                    node = self.node(&target)?;
                }
                Some((ServerErrorKind::Ask, target)) => {
                    asking = true;
                    node = self.node(&target)?;
                }
                Some(_) => {
                    asking = false;
                    tokio::time::sleep(MOVING).await;
                    let _ = self.refresh().await;
                    node = self.owner(slot).await?;
                }
            }
        }
        unreachable!("the last hop returns")
    }

    /// Sends a change that counts only once enough replicas have it to the server that has `slot`.
    pub(crate) async fn ask_with_replicas(&self, slot: u16, change: Cmd) -> Result<Value, Failure> {
        let node = self.owner(slot).await?;
        let asked = Replicas::of(node.replicas.as_ref())?.ask(change).await;
        let moved = |answer: &Value| matches!(error_kind(answer), Some(ServerErrorKind::Moved | ServerErrorKind::Ask));
        match asked {
            Ok(answered) if moved(&answered.answer) => {
                let _ = self.refresh().await;
                Err(Failure::uncovered())
            }
            Ok(answered) => answered.enough(),
            Err(failure) => {
                let _ = self.refresh().await;
                Err(failure)
            }
        }
    }

    /// Sends one command to each of these slots, in one flight to each server.
    pub(crate) async fn ask_many(&self, commands: Vec<(u16, Cmd)>) -> Vec<Result<Value, Failure>> {
        let mut flights: HashMap<usize, (Arc<Node>, Vec<usize>, Pipeline)> = HashMap::new();
        let mut outcomes: Vec<Option<Result<Value, Failure>>> = commands.iter().map(|_| None).collect();
        for (index, (slot, command)) in commands.into_iter().enumerate() {
            match self.owner(slot).await {
                Ok(node) => {
                    let flight =
                        flights.entry(Arc::as_ptr(&node).addr()).or_insert_with(|| (node, Vec::new(), Pipeline::new()));
                    flight.1.push(index);
                    flight.2.add_command(command);
                }
                Err(failure) => outcomes[index] = Some(Err(failure)),
            }
        }
        for (node, indices, flight) in flights.into_values() {
            let answers = spread(node.link.ask(&flight).await, indices.len());
            if answers.iter().any(|answer| !matches!(answer, Ok(Value::Int(_)))) {
                let _ = self.refresh().await;
            }
            for (index, answer) in indices.into_iter().zip(answers) {
                outcomes[index] = Some(answer);
            }
        }
        outcomes.into_iter().map(|outcome| outcome.unwrap_or_else(|| Err(Failure::uncovered()))).collect()
    }

    /// Learns from a redirection, and asks for the whole map with the next request.
    fn moved(&self, slot: u16, target: &str) {
        let mut state = self.state();
        let index = state.ranges.partition_point(|range| range.last < slot);
        if let Some(range) = state.ranges.get(index).cloned().filter(|range| range.first <= slot) {
            let mut parts = Vec::with_capacity(3);
            if range.first < slot {
                parts.push(Range { last: slot - 1, ..range.clone() });
            }
            parts.push(Range { first: slot, last: slot, address: target.to_owned() });
            if slot < range.last {
                parts.push(Range { first: slot + 1, ..range });
            }
            state.ranges.splice(index..=index, parts);
        }
        if state.refreshed.is_some_and(|at| at.elapsed() >= FRESH) {
            state.refreshed = None;
        }
    }

    /// Returns every server that has slots.
    pub(crate) async fn masters(&self) -> Result<Vec<Arc<Node>>, Failure> {
        self.refresh().await?;
        let mut addresses: Vec<_> = self.state().ranges.iter().map(|range| range.address.clone()).collect();
        addresses.sort();
        addresses.dedup();
        addresses.iter().map(|address| self.node(address)).collect()
    }

    /// Returns a client of a server that answers: in a cluster a message reaches the subscribers of every server.
    pub(crate) async fn any_client(&self) -> Result<Client, RedisError> {
        let refused = || RedisError::from((redis::ErrorKind::ClusterConnectionNotFound, "no server of the cluster answers"));
        // Asks somebody, so that what is known is no older than that.
        self.state().refreshed = None;
        self.refresh().await.map_err(|_| refused())?;
        let mut commands = Pipeline::new();
        commands.cmd("PING");
        for node in self.masters().await.map_err(|_| refused())? {
            if node.link.ask(&commands).await.is_ok() {
                return node.link.maker().client().await;
            }
        }
        Err(refused())
    }
}

impl fmt::Debug for Cluster {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Cluster").field("servers", &self.state().nodes.len()).finish_non_exhaustive()
    }
}

fn join(host: &str, port: u16) -> String {
    format!("{host}:{port}")
}

fn split(address: &str) -> Option<(&str, u16)> {
    // A bus port may follow, and an IPv6 address has colons of its own.
    let (host, port) = address.split('@').next()?.rsplit_once(':')?;
    Some((host.trim_start_matches('[').trim_end_matches(']'), port.parse().ok()?))
}

/// Reads the answer to `CLUSTER SLOTS`; a server that does not know its own name is the one that was asked.
fn ranges(answer: &Value, asked: &str) -> Option<Vec<Range>> {
    let asked = split(asked).map(|(host, _)| host)?;
    let Value::Array(entries) = answer else { return None };
    let mut ranges = Vec::with_capacity(entries.len());
    for entry in entries {
        let Value::Array(parts) = entry else { return None };
        let [Value::Int(first), Value::Int(last), Value::Array(master), ..] = parts.as_slice() else { return None };
        let [host, Value::Int(port), ..] = master.as_slice() else { return None };
        let host = match host {
            Value::BulkString(host) if !host.is_empty() => std::str::from_utf8(host).ok()?,
            Value::SimpleString(host) if !host.is_empty() => host,
            _ => asked,
        };
        ranges.push(Range {
            first: u16::try_from(*first).ok()?,
            last: u16::try_from(*last).ok()?,
            address: join(host, u16::try_from(*port).ok()?),
        });
    }
    ranges.sort_by_key(|range| range.last);
    Some(ranges)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn slots(first: i64, last: i64, host: &str, port: i64) -> Value {
        let server = Value::Array(vec![Value::BulkString(host.into()), Value::Int(port), Value::BulkString("id".into())]);
        Value::Array(vec![Value::Int(first), Value::Int(last), server])
    }

    fn cluster(ranges: Vec<Range>) -> Cluster {
        let timeouts = Timeouts { connect: Duration::from_secs(1), answer: Duration::from_secs(1) };
        let cluster = Cluster::new(vec![], Box::new(|host, port| Client::open((host, port))), timeouts, None);
        cluster.state().ranges = ranges;
        cluster.state().refreshed = Some(Instant::now());
        cluster
    }

    #[test]
    fn the_map_of_the_slots_is_read_and_a_nameless_server_is_the_one_that_was_asked() {
        let answer = Value::Array(vec![slots(5461, 16383, "h2", 7001), slots(0, 5460, "", 7000)]);
        let ranges = ranges(&answer, "h1:7009").unwrap();
        let found: Vec<_> = ranges.iter().map(|range| (range.first, range.last, range.address.as_str())).collect();
        assert_eq!(found, [(0, 5460, "h1:7000"), (5461, 16383, "h2:7001")]);
        assert!(super::ranges(&Value::Nil, "h1:1").is_none());
        assert_eq!(split("[::1]:7000@17000"), Some(("::1", 7000)));
        assert_eq!(split("nothing"), None);
    }

    #[tokio::test]
    async fn a_redirection_moves_one_slot_and_no_other() {
        let cluster = cluster(vec![Range { first: 0, last: 16383, address: "h1:1".into() }]);
        cluster.moved(100, "h2:2");
        cluster.moved(0, "h3:3");
        let found: Vec<_> =
            cluster.state().ranges.iter().map(|range| (range.first, range.last, range.address.clone())).collect();
        let expected: Vec<(u16, u16, String)> =
            vec![(0, 0, "h3:3".into()), (1, 99, "h1:1".into()), (100, 100, "h2:2".into()), (101, 16383, "h1:1".into())];
        assert_eq!(found, expected);
    }

    #[tokio::test]
    async fn a_slot_that_nobody_has_is_an_error_and_is_asked_for_again() {
        let cluster = cluster(vec![Range { first: 0, last: 10, address: "h1:1".into() }]);
        assert!(cluster.owner(11).await.is_err());
        assert!(cluster.state().refreshed.is_none());
    }
}

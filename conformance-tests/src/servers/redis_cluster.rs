//! A Redis Cluster of its own for each test: masters that share the slots, and replicas that take over.
//!
//! It is put together by hand, command by command, which takes as long as the nodes wait for each other anyway. Nothing here
//! knows a client.

use std::collections::BTreeSet;
use std::io;
use std::net::SocketAddr;

use super::process::{Seen, on_free_ports, wait_until};
use super::redis::{Redis, Role};

const SLOTS: usize = 16_384;

/// Short times, so that a test sees a failover within a few seconds; and data on disk, so that a master that comes back has not
/// forgotten what it owns.
const SETTINGS: &[&str] = &[
    "cluster-node-timeout 1000",
    "cluster-replica-validity-factor 0",
    "cluster-allow-replica-migration no",
    "repl-diskless-sync-delay 0",
    "appendonly yes",
];

/// A Redis Cluster.
///
/// Dropping it kills every node and removes their data. Each node can be frozen, killed and restarted by itself.
#[derive(Debug)]
pub struct RedisCluster {
    nodes: Vec<Redis>,
}

impl RedisCluster {
    /// Starts a cluster and returns once it is [whole](Self::wait_until_whole), which takes some two seconds: a node of a cluster
    /// waits for so long before it accepts writes.
    ///
    /// # Errors
    /// As [`Redis::start`]; `TimedOut` if it does not become whole.
    pub fn start(masters: usize, replicas_per_master: usize) -> io::Result<Self> {
        Self::start_with(masters, replicas_per_master, &[])
    }

    /// Does the same with more lines for the configuration of each node. Besides `requirepass` the nodes need `masterauth`, to
    /// follow each other.
    ///
    /// # Errors
    /// As [`start`](Self::start).
    pub fn start_with(masters: usize, replicas_per_master: usize, options: &[&str]) -> io::Result<Self> {
        let settings = [SETTINGS, options].concat();
        on_free_ports(|| {
            let nodes = (0..masters * (1 + replicas_per_master)).map(|_| Redis::prepare(Role::Node, &settings));
            let cluster = Self { nodes: nodes.collect::<io::Result<_>>()? };
            cluster.nodes.iter().try_for_each(Redis::spawn)?;
            cluster.nodes.iter().try_for_each(Redis::wait)?;
            cluster.join(masters)?;
            Ok(cluster)
        })
    }

    /// Makes one cluster of the nodes, of which the first `masters` are to be masters.
    fn join(&self, masters: usize) -> io::Result<()> {
        for (number, node) in self.nodes.iter().enumerate() {
            // Different from the beginning: two masters of the same epoch would have to settle that first.
            node.command(&["CLUSTER", "SET-CONFIG-EPOCH", &(number + 1).to_string()])?;
            if number < masters {
                let (first, last) = (SLOTS * number / masters, SLOTS * (number + 1) / masters - 1);
                node.command(&["CLUSTER", "ADDSLOTSRANGE", &first.to_string(), &last.to_string()])?;
            }
            // Everybody, not just one: gossip would take seconds.
            for other in &self.nodes[..number] {
                let (port, bus) = (other.port().to_string(), other.bus_port().to_string());
                node.command(&["CLUSTER", "MEET", "127.0.0.1", &port, &bus])?;
            }
        }
        for (number, node) in self.nodes.iter().enumerate().skip(masters) {
            let master = self.nodes[number % masters].command(&["CLUSTER", "MYID"])?;
            wait_until("a replica knows its master", || {
                Ok(match node.command(&["CLUSTER", "REPLICATE", &master]) {
                    Ok(_) => Seen::Done,
                    Err(error) => Seen::NotYet(error.to_string()),
                })
            })?;
        }
        wait_until("each node of the cluster knows all", || {
            for node in &self.nodes {
                let seen = node.command(&["CLUSTER", "NODES"])?;
                let lines: Vec<Line> = seen.lines().filter_map(Line::parse).collect();
                let masters_seen = lines.iter().filter(|line| line.is_master).count();
                if lines.len() != self.nodes.len() || masters_seen != masters {
                    return Ok(Seen::NotYet(seen));
                }
            }
            Ok(Seen::Done)
        })?;
        self.wait_until_whole()
    }

    /// Returns every node, whatever has become of it. In the beginning the masters come first.
    #[must_use]
    pub fn nodes(&self) -> &[Redis] {
        &self.nodes
    }

    /// Returns the address of every node.
    #[must_use]
    pub fn addresses(&self) -> Vec<SocketAddr> {
        self.nodes.iter().map(Redis::address).collect()
    }

    /// Returns `redis+cluster://host:port,host:port…` with every node.
    #[must_use]
    pub fn url(&self) -> String {
        let addresses: Vec<_> = self.nodes.iter().map(|node| node.address().to_string()).collect();
        format!("redis+cluster://{}", addresses.join(","))
    }

    /// Returns the nodes that own slots, as the nodes that are up know it, and are up themselves.
    ///
    /// # Errors
    /// As [`Redis::command`].
    pub fn masters(&self) -> io::Result<Vec<&Redis>> {
        let owners: BTreeSet<_> = owners(&self.views()?).into_iter().flatten().collect();
        Ok(self.nodes.iter().filter(|node| owners.contains(&node.address()) && node.is_up()).collect())
    }

    /// Returns the node that owns the slot of `key`, as the nodes that are up know it. It may be down and not yet replaced.
    ///
    /// # Errors
    /// `NotFound` if the slot has no owner; otherwise as [`Redis::command`].
    pub fn master_of(&self, key: &str) -> io::Result<&Redis> {
        let slot = self.slot_of(key)?;
        let owner = owners(&self.views()?)[slot];
        let node = self.nodes.iter().find(|node| Some(node.address()) == owner);
        node.ok_or_else(|| io::Error::new(io::ErrorKind::NotFound, format!("slot {slot} has no owner")))
    }

    /// Kills the node that owns the slot of `key` and returns it. [`wait_until_whole`](Self::wait_until_whole) waits for its
    /// replacement.
    ///
    /// # Errors
    /// As [`master_of`](Self::master_of).
    pub fn kill_master_of(&self, key: &str) -> io::Result<&Redis> {
        let master = self.master_of(key)?;
        master.kill()?;
        Ok(master)
    }

    /// Moves the slot of `key`, with all its keys, to the master `target`, as a resharding does. `between` is called when the keys
    /// have moved and the slot has not: then the old owner answers `ASK`, and after this call `MOVED`.
    ///
    /// # Errors
    /// As [`master_of`](Self::master_of); what `between` returns leaves the slot half way.
    pub fn move_slot_of(&self, key: &str, target: &Redis, between: impl FnOnce() -> io::Result<()>) -> io::Result<()> {
        let slot = self.slot_of(key)?.to_string();
        let source = self.master_of(key)?;
        let (from, to) = (source.command(&["CLUSTER", "MYID"])?, target.command(&["CLUSTER", "MYID"])?);
        if from == to {
            return between();
        }
        target.command(&["CLUSTER", "SETSLOT", &slot, "IMPORTING", &from])?;
        source.command(&["CLUSTER", "SETSLOT", &slot, "MIGRATING", &to])?;
        loop {
            let keys = source.command(&["CLUSTER", "GETKEYSINSLOT", &slot, "100"])?;
            if keys.is_empty() {
                break;
            }
            for key in keys.lines() {
                source.migrate(key, target)?;
            }
        }
        between()?;
        // The new owner first, as the documentation of Redis wants it: whoever asks the others meanwhile is sent in circles, not
        // into a hole.
        target.command(&["CLUSTER", "SETSLOT", &slot, "NODE", &to])?;
        for node in self.masters()? {
            node.command(&["CLUSTER", "SETSLOT", &slot, "NODE", &to])?;
        }
        self.wait_until_whole()
    }

    /// Returns once the nodes that are up agree that each slot has an owner that is up, and each other node that is up follows
    /// one: after a kill, that is when a replica has taken over; after a restart, when the node has found its place.
    ///
    /// # Errors
    /// `TimedOut` if that does not come about.
    pub fn wait_until_whole(&self) -> io::Result<()> {
        wait_until("the cluster is whole", || {
            let views = self.views()?;
            let owners = owners(&views);
            let masters = self.masters()?;
            for (slot, owner) in owners.iter().enumerate() {
                if !masters.iter().any(|master| Some(master.address()) == *owner) {
                    return Ok(Seen::NotYet(format!("slot {slot} has no owner that is up")));
                }
            }
            for (node, view) in self.nodes.iter().filter(|node| node.is_up()).zip(&views) {
                let state = node.value(&["CLUSTER", "INFO"], "cluster_state")?;
                if state != "ok" || self::owners(std::slice::from_ref(view)) != owners {
                    return Ok(Seen::NotYet(format!("{} says {state}, and {view:?}", node.address())));
                }
                if masters.iter().any(|master| master.address() == node.address()) {
                    continue;
                }
                let link = node.value(&["INFO", "replication"], "master_link_status")?;
                if link != "up" {
                    return Ok(Seen::NotYet(format!("the link of {} is {link}", node.address())));
                }
            }
            Ok(Seen::Done)
        })
    }

    fn slot_of(&self, key: &str) -> io::Result<usize> {
        let node = self.nodes.iter().find(|node| node.is_up()).ok_or(io::ErrorKind::NotConnected)?;
        node.command(&["CLUSTER", "KEYSLOT", key])?.parse().map_err(io::Error::other)
    }

    /// Returns what each node that is up knows.
    fn views(&self) -> io::Result<Vec<Vec<Line>>> {
        let up = self.nodes.iter().filter(|node| node.is_up());
        up.map(|node| Ok(node.command(&["CLUSTER", "NODES"])?.lines().filter_map(Line::parse).collect())).collect()
    }
}

/// Returns the owner of each slot. Of two, the one of the later epoch is right: the other has not heard of it yet.
fn owners(views: &[Vec<Line>]) -> Vec<Option<SocketAddr>> {
    let mut lines: Vec<_> = views.iter().flatten().collect();
    lines.sort_by_key(|line| line.epoch);
    let mut owners = vec![None; SLOTS];
    for line in lines {
        for (first, last) in &line.slots {
            owners[*first..=*last].fill(Some(line.address));
        }
    }
    owners
}

/// What a node knows of another, or of itself.
#[derive(Debug)]
struct Line {
    address: SocketAddr,
    is_master: bool,
    epoch: u64,
    slots: Vec<(usize, usize)>,
}

impl Line {
    /// Reads a line of `CLUSTER NODES`; `None` if that is a node which has not introduced itself yet.
    fn parse(line: &str) -> Option<Self> {
        let words: Vec<_> = line.split(' ').collect();
        let [_, address, flags, _, _, _, epoch, _, slots @ ..] = words.as_slice() else { return None };
        if flags.contains("handshake") || flags.contains("noaddr") {
            return None;
        }
        // Slots on the move stand in brackets; they belong to the old owner until they have moved.
        let slots = slots.iter().filter(|slots| !slots.starts_with('[')).map(|slots| {
            let (first, last) = slots.split_once('-').unwrap_or((slots, slots));
            Some((first.parse().ok()?, last.parse().ok()?))
        });
        Some(Self {
            address: address.split('@').next()?.parse().ok()?,
            is_master: flags.split(',').any(|flag| flag == "master"),
            epoch: epoch.parse().ok()?,
            slots: slots.collect::<Option<_>>()?,
        })
    }
}

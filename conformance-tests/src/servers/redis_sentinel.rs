//! Redis under Sentinel, of its own for each test: one master, two replicas, and three sentinels who put a replica in the place of
//! a master that is gone.
//!
//! Nothing here knows a client.

use std::collections::HashMap;
use std::io;
use std::net::SocketAddr;

use super::process::{Seen, on_free_ports, wait_until};
use super::redis::{Redis, Role};

const NAME: &str = "mymaster";

const REPLICAS: usize = 2;

const SENTINELS: usize = 3;

/// How many sentinels have to agree that the master is gone.
const QUORUM: usize = 2;

/// Data on disk, so that a master that comes back before it was replaced has not forgotten it.
const SETTINGS: &[&str] = &["repl-diskless-sync-delay 0", "appendonly yes"];

/// In milliseconds; the defaults are made for hosts that are far apart.
const HASTE: &[&str] = &["info-period", "200", "ping-period", "100", "ask-period", "100", "publish-period", "200"];

/// One master, two replicas and three sentinels, of which two have to agree.
///
/// Dropping it kills all six and removes their data. Each can be frozen, killed and restarted by itself.
#[derive(Debug)]
pub struct RedisSentinel {
    nodes: Vec<Redis>,
    sentinels: Vec<Redis>,
}

impl RedisSentinel {
    /// Starts all six and returns once everybody [knows everybody](Self::wait_until_whole). A master that does not answer for half
    /// a second is down.
    ///
    /// # Errors
    /// As [`Redis::start`]; `TimedOut` if they do not find each other.
    pub fn start() -> io::Result<Self> {
        on_free_ports(|| {
            let master = Redis::prepare(Role::Plain, SETTINGS)?;
            let follow = format!("replicaof 127.0.0.1 {}", master.port());
            let settings = [SETTINGS, &[&follow]].concat();
            let mut nodes = vec![master];
            for _ in 0..REPLICAS {
                nodes.push(Redis::prepare(Role::Plain, &settings)?);
            }
            nodes.iter().try_for_each(Redis::spawn)?;
            nodes.iter().try_for_each(Redis::wait)?;
            // A sentinel that comes too early would miss them, and look again much later.
            wait_until("the replicas follow", || followers(&nodes[0], &nodes))?;

            let settings = [
                format!("sentinel monitor {NAME} 127.0.0.1 {} {QUORUM}", nodes[0].port()),
                format!("sentinel down-after-milliseconds {NAME} 500"),
                format!("sentinel failover-timeout {NAME} 2000"),
                format!("sentinel parallel-syncs {NAME} {REPLICAS}"),
            ];
            let settings: Vec<&str> = settings.iter().map(String::as_str).collect();
            let sentinels = (0..SENTINELS).map(|_| Redis::prepare(Role::Sentinel, &settings));
            let sentinels: Vec<Redis> = sentinels.collect::<io::Result<_>>()?;
            sentinels.iter().try_for_each(Redis::spawn)?;
            let group = Self { nodes, sentinels };
            for sentinel in &group.sentinels {
                sentinel.wait()?;
                sentinel.command(&[&["SENTINEL", "DEBUG"], HASTE].concat())?;
            }
            group.wait_until_whole()?;
            Ok(group)
        })
    }

    /// Returns the master and its replicas, whatever has become of them. In the beginning the master comes first.
    #[must_use]
    pub fn nodes(&self) -> &[Redis] {
        &self.nodes
    }

    /// Returns the sentinels. What [`Redis::command`] says of keys is not for them.
    #[must_use]
    pub fn sentinels(&self) -> &[Redis] {
        &self.sentinels
    }

    /// Returns the addresses of the sentinels.
    #[must_use]
    pub fn addresses(&self) -> Vec<SocketAddr> {
        self.sentinels.iter().map(Redis::address).collect()
    }

    /// Returns the name of the master.
    #[must_use]
    pub fn master_name(&self) -> &'static str {
        NAME
    }

    /// Returns `redis+sentinel://host:port,host:port,host:port/name` with every sentinel.
    #[must_use]
    pub fn url(&self) -> String {
        let addresses: Vec<_> = self.addresses().iter().map(ToString::to_string).collect();
        format!("redis+sentinel://{}/{NAME}", addresses.join(","))
    }

    /// Returns the master, as the sentinels that are up know it. It may be down and not yet replaced.
    ///
    /// # Errors
    /// `NotFound` if no sentinel is up; otherwise as [`Redis::command`].
    pub fn master(&self) -> io::Result<&Redis> {
        // The others have not heard of it yet.
        let newest = self.views()?.into_iter().max_by_key(|view| view.epoch);
        let node = newest.and_then(|view| self.nodes.iter().find(|node| node.port() == view.port));
        node.ok_or_else(|| io::Error::new(io::ErrorKind::NotFound, "no sentinel that is up knows the master"))
    }

    /// Kills the master and returns it. [`wait_until_whole`](Self::wait_until_whole) waits for its replacement.
    ///
    /// # Errors
    /// As [`master`](Self::master).
    pub fn kill_master(&self) -> io::Result<&Redis> {
        let master = self.master()?;
        master.kill()?;
        Ok(master)
    }

    /// Returns once the sentinels that are up agree on a master that is up, know each other and its replicas, and every other node
    /// that is up follows it: after a kill, that is when a replica has taken over; after a restart, when the node has found its
    /// place.
    ///
    /// # Errors
    /// `TimedOut` if that does not come about.
    pub fn wait_until_whole(&self) -> io::Result<()> {
        wait_until("the sentinels agree", || {
            let master = self.master()?;
            for view in self.views()? {
                let all = view.others == SENTINELS - 1 && view.replicas == REPLICAS;
                if view.port != master.port() || view.flags != "master" || !all {
                    return Ok(Seen::NotYet(format!("{view:?}")));
                }
            }
            if !master.is_up() {
                return Ok(Seen::NotYet("the master is down".to_owned()));
            }
            followers(master, &self.nodes)
        })
    }

    /// Returns what each sentinel that is up knows.
    fn views(&self) -> io::Result<Vec<View>> {
        let up = self.sentinels.iter().filter(|sentinel| sentinel.is_up());
        up.map(|sentinel| View::parse(&sentinel.command(&["SENTINEL", "MASTER", NAME])?)).collect()
    }
}

/// Sees whether `master` is one and every other of `nodes` that is up follows it.
fn followers(master: &Redis, nodes: &[Redis]) -> io::Result<Seen> {
    let information = ["INFO", "replication"];
    for node in nodes.iter().filter(|node| node.is_up()) {
        let role = node.value(&information, "role")?;
        let fact = match (node.port() == master.port(), role.as_str()) {
            (true, "master") => continue,
            (false, "slave") => {
                let port = node.value(&information, "master_port")?;
                let link = node.value(&information, "master_link_status")?;
                if port == master.port().to_string() && link == "up" {
                    continue;
                }
                format!("it follows {port} and its link is {link}")
            }
            _ => format!("it is a {role}"),
        };
        return Ok(Seen::NotYet(format!("{} is not in its place: {fact}", node.address())));
    }
    Ok(Seen::Done)
}

/// What a sentinel knows of the master.
#[derive(Debug)]
struct View {
    port: u16,
    /// `master`, and more words if there is something wrong with it.
    flags: String,
    epoch: u64,
    replicas: usize,
    others: usize,
}

impl View {
    /// Reads the reply of `SENTINEL MASTER`: names and values in turn.
    fn parse(reply: &str) -> io::Result<Self> {
        let lines: Vec<_> = reply.lines().collect();
        let values: HashMap<_, _> = lines.chunks_exact(2).map(|pair| (pair[0], pair[1])).collect();
        let read = || {
            Some(Self {
                port: values.get("port")?.parse().ok()?,
                flags: (*values.get("flags")?).to_owned(),
                epoch: values.get("config-epoch")?.parse().ok()?,
                replicas: values.get("num-slaves")?.parse().ok()?,
                others: values.get("num-other-sentinels")?.parse().ok()?,
            })
        };
        read().ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, format!("expected a master, got {reply}")))
    }
}

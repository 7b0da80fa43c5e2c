//! One server or a Cluster: to whom a flight goes.
//!
//! Nothing is sent a second time here, except where a server said that another one has the session.

use redis::{Client, Cmd, Pipeline, RedisError, Value};

use crate::answers::spread;
use crate::cluster::Cluster;
use crate::layout::Keys;
use crate::link::{Failure, Link};
use crate::replicas::Replicas;

#[derive(Debug)]
pub(crate) enum Servers {
    One { link: Link, replicas: Option<Replicas> },
    Cluster(Cluster),
}

impl Servers {
    /// Sends a greeting to every server, and returns what a single one answered. The servers of a Cluster answer to nobody: whoever
    /// needs one that is down now asks it again.
    pub(crate) async fn greet(&self, greeting: &Pipeline) -> Result<Vec<Value>, Failure> {
        match self {
            Self::One { link, .. } => link.ask(greeting).await,
            Self::Cluster(cluster) => {
                for node in cluster.masters().await? {
                    let _ = node.link.ask(greeting).await;
                }
                Ok(Vec::new())
            }
        }
    }

    /// Returns a client of a server that answers.
    pub(crate) async fn client(&self) -> Result<Client, RedisError> {
        match self {
            Self::One { link, .. } => link.maker().client().await,
            Self::Cluster(cluster) => cluster.any_client().await,
        }
    }

    /// Sends commands of one session in one flight.
    pub(crate) async fn ask(&self, keys: &Keys, commands: &Pipeline) -> Result<Vec<Value>, Failure> {
        match self {
            Self::One { link, .. } => link.ask(commands).await,
            // On the heap, so that whoever has one server does not carry the room for it.
            Self::Cluster(cluster) => Box::pin(cluster.ask(keys.slot(), commands)).await,
        }
    }

    /// Sends commands of any sessions in one flight, where there is one server for all of them.
    pub(crate) async fn ask_one(&self, commands: &Pipeline) -> Result<Vec<Value>, Failure> {
        match self {
            Self::One { link, .. } => link.ask(commands).await,
            Self::Cluster(_) => Err(Failure::unexpected("no server of a cluster has all sessions")),
        }
    }

    /// Sends a change that counts only once enough replicas have it.
    pub(crate) async fn ask_with_replicas(&self, keys: &Keys, change: Cmd) -> Result<Value, Failure> {
        // On the heap, as above.
        Box::pin(async {
            match self {
                Self::One { replicas, .. } => Replicas::of(replicas.as_ref())?.ask(change).await?.enough(),
                Self::Cluster(cluster) => cluster.ask_with_replicas(keys.slot(), change).await,
            }
        })
        .await
    }

    /// Sends one command each for many sessions, named by their slots, in one flight to each server.
    pub(crate) async fn ask_many(&self, commands: Vec<(u16, Cmd)>) -> Vec<Result<Value, Failure>> {
        match self {
            Self::One { link, .. } => {
                let mut flight = Pipeline::with_capacity(commands.len());
                for (_, command) in commands.iter().cloned() {
                    flight.add_command(command);
                }
                spread(link.ask(&flight).await, commands.len())
            }
            Self::Cluster(cluster) => cluster.ask_many(commands).await,
        }
    }

    /// Sends commands to the server at `place` in the order of a listing; `None` behind the last.
    pub(crate) async fn ask_at(&self, place: usize, commands: &Pipeline) -> Result<Option<Vec<Value>>, Failure> {
        match self {
            Self::One { link, .. } if place == 0 => link.ask(commands).await.map(Some),
            Self::One { .. } => Ok(None),
            Self::Cluster(cluster) => match cluster.masters().await?.get(place) {
                Some(node) => node.link.ask(commands).await.map(Some),
                None => Ok(None),
            },
        }
    }
}

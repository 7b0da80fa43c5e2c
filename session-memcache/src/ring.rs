//! Which server keeps a session? Consistent hashing on the id alone, so that all its items are on one server.
//!
//! This is libmemcached's weighted ketama: 160 points for each server of average weight, on a circle of 32 bits. Nothing here
//! knows whether a server answers.

use md5::{Digest, Md5};

/// The points of an average server.
const POINTS: usize = 160;
/// How many of them one digest gives.
const EACH: usize = 4;
/// The port that libmemcached leaves out of a server's name.
const PORT: u16 = 11211;

/// The circle.
#[derive(Debug)]
pub(crate) struct Ring {
    /// Where each point lies, and whose it is; in order.
    points: Vec<(u32, usize)>,
    servers: usize,
}

impl Ring {
    /// Places servers by host, port and weight.
    pub(crate) fn new<'a>(servers: impl IntoIterator<Item = (&'a str, u16, u32)>) -> Self {
        let servers: Vec<_> = servers.into_iter().collect();
        let total: f64 = servers.iter().map(|(_, _, weight)| f64::from(*weight)).sum();
        let mut points = Vec::with_capacity(POINTS * servers.len());
        for (server, (host, port, weight)) in servers.iter().enumerate() {
            let share = f64::from(*weight) / total * servers.len() as f64;
            let digests = (share * (POINTS / EACH) as f64 + 1e-10).floor() as usize;
            for n in 0..digests {
                let name = if *port == PORT { format!("{host}-{n}") } else { format!("{host}:{port}-{n}") };
                let digest = Md5::digest(name.as_bytes());
                points.extend(digest.chunks_exact(4).map(|four| (word(four), server)));
            }
        }
        points.sort_unstable();
        Self { points, servers: servers.len() }
    }

    /// Returns the server of an id, passing over those that `skip` says are not to be asked; if that is all of them, over none.
    pub(crate) fn server(&self, id: &str, skip: impl Fn(usize) -> bool) -> usize {
        if self.servers == 1 {
            return 0;
        }
        let at = word(&Md5::digest(id.as_bytes())[..4]);
        let first = self.points.partition_point(|(point, _)| *point < at);
        let around = || self.points[first..].iter().chain(&self.points[..first]).map(|(_, server)| *server);
        around().find(|server| !skip(*server)).or_else(|| around().next()).unwrap_or(0)
    }
}

fn word(four: &[u8]) -> u32 {
    u32::from_le_bytes([four[0], four[1], four[2], four[3]])
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shares(ring: &Ring, servers: usize) -> Vec<usize> {
        let mut shares = vec![0; servers];
        for n in 0..20_000 {
            shares[ring.server(&format!("session-{n}"), |_| false)] += 1;
        }
        shares
    }

    #[test]
    fn each_server_has_the_share_of_its_weight() {
        let ring = Ring::new([("a", 1, 1), ("b", 2, 1), ("c", 3, 2)]);
        let shares = shares(&ring, 3);
        for (share, expected) in shares.iter().zip([5000, 5000, 10_000]) {
            assert!(share.abs_diff(expected) < expected / 4, "{shares:?}");
        }
    }

    #[test]
    fn a_server_more_or_less_moves_only_its_own_share() {
        let two = Ring::new([("a", 1, 1), ("b", 2, 1)]);
        let three = Ring::new([("a", 1, 1), ("b", 2, 1), ("c", 3, 1)]);
        for n in 0..5000 {
            let id = format!("session-{n}");
            let (before, after) = (two.server(&id, |_| false), three.server(&id, |_| false));
            assert!(after == before || after == 2, "it moved between servers that were there before");
            assert_eq!(three.server(&id, |server| server == 2), before, "passing over a server is as if it were not there");
        }
        let id = "0123456789abcdefghijkl";
        assert_eq!(three.server(id, |_| true), three.server(id, |_| false));
    }

    #[test]
    fn the_circle_is_that_of_libmemcached() {
        assert_eq!(Ring::new([("a", PORT, 1), ("b", PORT, 1)]).points.len(), 2 * POINTS);
        assert_eq!(word(&Md5::digest(b"")[..4]), 0xd98c_1dd4);
    }
}

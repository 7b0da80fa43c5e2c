//! What a case and its processes say to each other, and the records that they write.

use std::time::Duration;

use serde::{Deserialize, Serialize};
use session_core::{Error, Record, Ttl};

/// A worker waits for a lock for longer than any case lasts that goes well.
pub(super) const LONG: Duration = Duration::from_secs(50);

/// What a case asks of a process.
#[derive(Debug, Serialize, Deserialize)]
pub(super) enum Order {
    /// Open and keep it.
    Open {
        id: String,
        wait: Duration,
        lease: Duration,
        any: bool,
    },
    Read,
    Write(String),
    Save(String),
    Close,
    /// Read without a lock.
    Look(String),
    /// Open, create if it is absent, close.
    Create {
        id: String,
        lease: Duration,
        text: String,
    },
    /// Append ids of its own until told to stop, or so many.
    Append {
        id: String,
        writer: String,
        lease: Duration,
        times: u64,
    },
    /// Replace the record by ever newer ones until told to stop.
    Rewrite {
        id: String,
        lease: Duration,
        from: u64,
        tell: bool,
    },
    Stop,
}

/// What a process answers.
#[derive(Debug, PartialEq, Serialize, Deserialize)]
pub(super) enum Answer {
    Done,
    Record(Option<String>),
    Created,
    /// This write was acknowledged.
    Acked(u64),
    /// This write was sent and nobody knows.
    Unsure(u64),
    Refused {
        kind: String,
        text: String,
    },
}

impl Answer {
    pub(super) fn refused(error: &Error) -> Self {
        Self::Refused { kind: error.kind().as_str().into(), text: format!("{error:?}") }
    }
}

pub(super) fn name_of(order: &Order) -> &'static str {
    match order {
        Order::Open { .. } => "open",
        Order::Read => "read",
        Order::Write(_) => "write",
        Order::Save(_) => "save",
        Order::Close => "close",
        Order::Look(_) => "a view",
        Order::Create { .. } => "a creation",
        Order::Append { .. } => "an append",
        Order::Rewrite { .. } => "a rewrite",
        Order::Stop => "stop",
    }
}

pub(super) fn record(text: &str) -> Record {
    Record::new(text, Ttl::from_secs(1200))
}

pub(super) fn text_of(record: Option<Record>) -> Option<String> {
    record.map(|record| String::from_utf8_lossy(&record.data).into_owned())
}

/// The `n`th of a series of records whose lengths differ and which say in every byte which one they are.
pub(super) fn edition(n: u64) -> String {
    let filler = char::from(b'a' + u8::try_from(n % 26).expect("a remainder of 26"));
    let length = usize::try_from(200 + n * 7919 % 60_000).expect("a remainder of 60,000");
    format!("{n:012}{}", filler.to_string().repeat(length))
}

/// Returns which one of the series this is, if it is one.
pub(super) fn edition_of(text: &str) -> Option<u64> {
    let n = text.get(..12)?.parse().ok()?;
    (edition(n) == text).then_some(n)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_edition_is_told_from_every_mixture_of_two() {
        for n in [0, 1, 25, 26, 999] {
            assert_eq!(edition_of(&edition(n)), Some(n));
            let (old, new) = (edition(n), edition(n + 1));
            for cut in [0, 5, 12, 13, 100, 211] {
                let mixture = [&new[..cut], &old[cut..]].concat();
                assert!([None, Some(n)].contains(&edition_of(&mixture)), "{n} cut at {cut}");
            }
            assert_eq!(edition_of(&old[..old.len() - 1]), None);
        }
    }
}

//! Whether a write is in order, and what is stored if it is.
//!
//! Nothing here waits: both are parts of one atomic step, unless a flaw has them apart.

use std::time::Instant;

use session_core::{Access, ErrorKind, Expect, Record, Result, WriteId};

use super::opening::Opening;
use super::queue::Latch;
use super::{AGES, Cell, Store, Stored, fail};
use crate::liars::Flaw;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Base {
    /// Absent, with the trace of a destruction if there is one.
    Absent(Option<WriteId>),
    /// The record with this last write.
    Record(WriteId),
    /// Nothing more can be written.
    Spent(ErrorKind),
}

pub(super) enum Verdict {
    Apply,
    Already,
}

impl Store {
    /// Decides whether a write of `me` under `wid` is in order.
    pub(super) fn judge(
        &self,
        cell: &Cell,
        latch: &Latch,
        me: &Opening,
        wid: WriteId,
        touch: bool,
        now: Instant,
    ) -> Result<Verdict> {
        let operation = if touch { "touch" } else { "write" };
        let exclusive = matches!(me.access, Access::Exclusive { .. });
        let first_of_fresh = me.expect == Expect::Fresh && !me.wrote;
        let late = if exclusive && !first_of_fresh { ErrorKind::Fenced } else { ErrorKind::Conflict };
        let refuse = |kind| Err(fail(kind, operation));
        let revives = self.is(Flaw::WriteRevives) || (touch && self.is(Flaw::TouchRevives));
        let live = if revives { cell.record.as_ref() } else { cell.live(now) };
        let token = me.token();
        let mine = latch.is_of(token);
        let others = latch.held(now).is_some() && !mine;

        if let Base::Spent(kind) = me.base {
            return refuse(kind);
        }
        match self.flaw {
            Flaw::NoFence => return Ok(Verdict::Apply),
            Flaw::TouchIsUnfenced if touch && live.is_some() => return Ok(Verdict::Apply),
            Flaw::OwnerIsEnough if exclusive && !first_of_fresh => {
                return if others { refuse(late) } else { Ok(Verdict::Apply) };
            }
            Flaw::FencePerOpening
                if exclusive && !first_of_fresh && !mine && !touch && live.is_some_and(|record| record.by == me.name) =>
            {
                return Ok(Verdict::Already);
            }
            Flaw::RepeatIsAppliedAgain if me.sent.contains(&wid) => return Ok(Verdict::Apply),
            Flaw::UnlockLeavesHolderIn if exclusive && !mine && live.is_some() => return Ok(Verdict::Apply),
            _ => {}
        }
        if !touch && live.is_some_and(|record| record.wid == wid) {
            return if self.is(Flaw::RepeatIsRefused) { refuse(late) } else { Ok(Verdict::Already) };
        }
        if exclusive
            && !first_of_fresh
            && (self.strict || self.is(Flaw::StrictByStealth))
            && !(mine && latch.held(now).is_some())
        {
            return refuse(late);
        }
        let blocked = others
            && !self.is(Flaw::VersionIsEnough)
            && !(self.is(Flaw::OptimismIgnoresHolder) && matches!(me.access, Access::Optimistic));
        match (me.base, live) {
            (Base::Record(_), None) => refuse(ErrorKind::Gone),
            (Base::Record(_), Some(_)) if blocked => refuse(late),
            (Base::Record(version), Some(record)) => {
                if record.version == version || (self.is(Flaw::OptimismIgnoresVersion) && !exclusive) {
                    Ok(Verdict::Apply)
                } else {
                    refuse(late)
                }
            }
            (Base::Absent(_), None) if touch && !self.is(Flaw::TouchCreates) => refuse(ErrorKind::Gone),
            (Base::Absent(_), _) if me.expect == Expect::Existing && !self.is(Flaw::ExistingCreates) => {
                refuse(ErrorKind::Gone)
            }
            (Base::Absent(_), Some(_)) if self.is(Flaw::FreshReplaces) && first_of_fresh => Ok(Verdict::Apply),
            (Base::Absent(_), Some(_)) if self.is(Flaw::FreshConflictIsGone) && first_of_fresh => refuse(ErrorKind::Gone),
            (Base::Absent(_), Some(_)) => refuse(late),
            (Base::Absent(_), None) if blocked => refuse(late),
            (Base::Absent(_), None) if !exclusive || first_of_fresh => {
                if cell.grave.is_some() {
                    refuse(ErrorKind::Conflict)
                } else {
                    Ok(Verdict::Apply)
                }
            }
            (Base::Absent(grave), None) => match cell.grave.map(|(name, _)| name) {
                _ if self.is(Flaw::ExistingCreates) => Ok(Verdict::Apply),
                now if now != grave => refuse(ErrorKind::Gone),
                _ if mine => Ok(Verdict::Apply),
                _ => refuse(late),
            },
            (Base::Spent(kind), _) => refuse(kind),
        }
    }

    /// Puts the record in.
    pub(super) fn apply(&self, cell: &mut Cell, by: WriteId, record: &Record, wid: WriteId, now: Instant) {
        let life = match self.flaw {
            Flaw::LivesForEver => AGES,
            Flaw::DiesEarly => record.ttl.as_duration() / 2,
            _ => record.ttl.as_duration(),
        };
        let mut data = record.data.clone();
        match self.flaw {
            Flaw::BytesEndAtNul => data.truncate(data.iter().position(|byte| *byte == 0).unwrap_or(data.len())),
            Flaw::BytesAreCut => data.truncate(60 * 1024),
            Flaw::BytesBecomeText => data = String::from_utf8_lossy(&data).into_owned().into_bytes(),
            _ => {}
        }
        let before = cell.live(now);
        let first_deadline = before.map_or(now + life, |before| before.first_deadline);
        let version = if self.is(Flaw::VersionIsACounter) {
            let count = before.map_or(0, |before| u128::from_le_bytes(before.version.to_bytes()));
            WriteId::from_bytes((count + 1).to_le_bytes())
        } else {
            wid
        };
        let deadline = if self.is(Flaw::WriteKeepsDeadline) { first_deadline } else { now + life };
        let before = before.map(|before| before.data.clone());
        cell.record = Some(Stored { data, ttl: record.ttl, deadline, first_deadline, wid, version, by, before });
        cell.grave = None;
    }
}

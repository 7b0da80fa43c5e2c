//! The row of a session, and what each step makes of it.
//!
//! Nothing here knows a statement: a step gets the row as it stands and the instant, and leaves the row as it is to be. What makes it
//! atomic is the transaction around it.

use session_core::leased::{Basis, Renewed, Then, Verdict, Want};
use session_core::{LeaseToken, WriteId};

use crate::database::{Action, Alter, Busy, CLAIM, Enter, Owner, REMEMBER, Remove, Renew, SAME, holder, millis, span};

/// Whose locks they are, and how others can see that he has ended, if they can.
#[derive(Debug)]
pub(super) struct Who {
    pub(super) owner: Owner,
    /// Whether the lock is held by which they see it.
    pub(super) proven: bool,
}

/// The columns, without the bytes of the record.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Row {
    /// The number of the row if it is in the table.
    pub(super) number: Option<i64>,
    /// Whether there are bytes: a record, live or not.
    pub(super) data: bool,
    pub(super) write_id: Option<WriteId>,
    pub(super) expires_at: i64,
    pub(super) lock: Option<Lock>,
    pub(super) next: Option<Next>,
}

/// Who holds the lock.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Lock {
    pub(super) token: LeaseToken,
    pub(super) until: i64,
    pub(super) since: i64,
    pub(super) lease: i64,
    /// Unknown as long as nobody has come for a lock that was handed on.
    pub(super) owner: Option<String>,
    pub(super) process: Option<i64>,
    pub(super) handed: bool,
}

/// Who is next in line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Next {
    pub(super) token: LeaseToken,
    pub(super) until: i64,
    pub(super) process: i64,
    /// Since when he waits.
    pub(super) since: i64,
}

/// What a request for a lock is told.
#[derive(Debug)]
pub(super) enum Answer {
    Absent,
    Granted { clean: bool },
    Busy(Busy),
}

impl Row {
    /// Returns the last write of the record if it is live.
    pub(super) fn live(&self, now: i64) -> Option<WriteId> {
        self.write_id.filter(|_| self.data && self.expires_at > now)
    }

    /// Returns the name of what was here: a destroyed record, for its time, or one that has expired.
    pub(super) fn trace(&self, now: i64) -> Option<WriteId> {
        self.write_id.filter(|_| self.data != (self.expires_at > now))
    }

    /// Whether there is nothing in it that anybody could ask for.
    pub(super) fn is_empty(&self, now: i64) -> bool {
        !self.data && self.trace(now).is_none() && self.lock.is_none()
    }

    fn holds(&self, token: Option<LeaseToken>) -> bool {
        self.lock.as_ref().is_some_and(|lock| Some(lock.token) == token)
    }

    fn is_held(&self, now: i64) -> bool {
        self.lock.as_ref().is_some_and(|lock| lock.until > now)
    }

    /// Takes the lock if it is free, or a place in line if the request asks for one. `gone` says of a process whether it has ended.
    pub(super) fn enter(&mut self, entry: &Enter, who: &Who, now: i64, gone: impl Fn(i64) -> bool) -> Answer {
        let live = self.live(now).is_some();
        if entry.want == Want::Existing && !live {
            // What was handed to somebody who has nothing to do here is for the next one.
            self.leave(entry.token, true, now);
            return Answer::Absent;
        }
        let own = self.holds(Some(entry.token));
        let ended =
            |lock: &Lock| entry.probe && lock.process.is_some_and(|process| process != who.owner.process && gone(process));
        let free = own || !self.is_held(now) || self.lock.as_ref().is_some_and(ended);
        self.next
            .take_if(|next| next.until <= now || entry.probe && next.process != who.owner.process && gone(next.process));
        let others = self.next.as_ref().is_some_and(|next| next.token != entry.token);
        // Who waits goes before who comes.
        if !free || others && !own {
            return Answer::Busy(self.book(entry, who, now));
        }
        self.next.take_if(|next| next.token == entry.token);
        let clean = own && self.lock.as_ref().is_some_and(|lock| lock.handed);
        self.take(entry.token, entry.lease, who, clean, now);
        if live && entry.want != Want::Lock {
            self.prolong(entry.lease, now);
        }
        Answer::Granted { clean }
    }

    fn book(&mut self, entry: &Enter, who: &Who, now: i64) -> Busy {
        let mine = self.next.as_ref().is_some_and(|next| next.token == entry.token);
        let since = now - entry.waited;
        let open = self
            .next
            .as_ref()
            .is_none_or(|next| next.process == who.owner.process || since.saturating_add(SAME) < next.since);
        let booked = entry.book > 0 && (mine || open);
        // A place that has not lost half of its time need not be written anew with each question.
        if booked && !(mine && self.next.as_ref().is_some_and(|next| next.until - now > entry.book / 2)) {
            let since = self.next.as_ref().filter(|_| mine).map_or(since, |next| next.since);
            self.next = Some(Next { token: entry.token, until: now + entry.book, process: who.owner.process, since });
        }
        let lock = self.lock.as_ref().filter(|lock| lock.until > now);
        Busy {
            holder: lock.and_then(|lock| holder(lock.owner.clone(), Some(lock.since))),
            left: span(lock.map_or(0, |lock| lock.until - now)),
            booked,
        }
    }

    fn take(&mut self, token: LeaseToken, lease: i64, who: &Who, handed: bool, now: i64) {
        let since =
            self.lock.as_ref().filter(|lock| lock.token == token && lock.owner.is_some()).map_or(now, |lock| lock.since);
        let (owner, process) = (Some(who.owner.text.clone()), who.proven.then_some(who.owner.process));
        self.lock = Some(Lock { token, until: now + lease, since, lease, owner, process, handed });
        self.remember(now);
    }

    /// Lets a row that is nothing but a lock outlive it, so that gc does not take it from a holder who is a little late.
    fn remember(&mut self, now: i64) {
        if !self.data && self.trace(now).is_none() {
            self.write_id = None;
            let until = self.lock.as_ref().map_or(now, |lock| lock.until);
            self.expires_at = until + millis(REMEMBER);
        }
    }

    fn prolong(&mut self, lease: i64, now: i64) {
        self.expires_at = self.expires_at.max(now + 2 * lease);
    }

    /// Judges a change by the table at [`Step`](session_core::leased::Step), and applies it but for its bytes.
    pub(super) fn change(&mut self, change: &Alter, who: &Who, strict: bool, now: i64) -> Verdict {
        let verdict = self.judge(change, strict, now);
        if verdict == Verdict::Refused {
            return verdict;
        }
        if verdict == Verdict::Applied {
            let ttl = match change.action {
                Action::Write { id, ttl, .. } => {
                    (self.data, self.write_id) = (true, Some(id));
                    ttl
                }
                Action::Touch { ttl } => ttl,
            };
            self.expires_at = now + millis(ttl.as_duration());
        }
        let own = self.holds(change.token);
        if verdict == Verdict::Gone || change.then == Then::Close {
            if own {
                self.release(true, now);
            }
        } else if let (true, Some(token), Some(lease)) = (change.takes(), change.token, change.lease)
            && (own || !self.is_held(now))
        {
            self.take(token, lease, who, false, now);
        }
        verdict
    }

    fn judge(&self, change: &Alter, strict: bool, now: i64) -> Verdict {
        let (live, trace) = (self.live(now), self.trace(now));
        let id = match change.action {
            Action::Write { id, .. } => Some(id),
            Action::Touch { .. } if matches!(change.basis, Basis::Written(_)) => None,
            Action::Touch { .. } => return Verdict::Gone,
        };
        if live.is_some() && live == id {
            return Verdict::AlreadyApplied;
        }
        let exclusive = change.lease.is_some();
        let own = self.holds(change.token);
        let foreign = !own && self.is_held(now);
        match change.basis {
            Basis::Written(_) if live.is_none() => return Verdict::Gone,
            Basis::Written(prev) if live != Some(prev) || foreign => return Verdict::Refused,
            Basis::Written(_) => {}
            Basis::Absent { .. } if exclusive && live.is_some() => return Verdict::Refused,
            // Something was created and has ended since, so the id is not as absent as it was found.
            Basis::Absent { mark } if exclusive && trace.is_some() && trace != mark => return Verdict::Gone,
            Basis::Absent { .. } if exclusive && !own => return Verdict::Refused,
            Basis::Absent { .. } if exclusive => {}
            // The repeat of a create whose record has expired meanwhile must not create it anew.
            Basis::Absent { .. } | Basis::Unseen if trace.is_some() && trace == id => return Verdict::Gone,
            Basis::Absent { .. } | Basis::Unseen if live.is_some() || foreign => return Verdict::Refused,
            // What has expired before it was looked at is as good as absent; what was destroyed is not.
            Basis::Absent { mark } if self.data && trace == mark => return Verdict::Applied,
            Basis::Absent { .. } | Basis::Unseen if trace.is_some() => return Verdict::Refused,
            Basis::Absent { .. } | Basis::Unseen => return Verdict::Applied,
        }
        let ended = !own || !self.is_held(now);
        if strict && exclusive && ended { Verdict::Refused } else { Verdict::Applied }
    }

    /// Leaves the trace of a removed record. A row that is not there and is to leave none stays away.
    pub(super) fn remove(&mut self, removal: &Remove, now: i64) {
        if self.number.is_some() || removal.trace {
            let lease = self.lock.as_ref().map_or(0, |lock| lock.lease).max(removal.lease);
            (self.data, self.write_id) = (false, Some(removal.mark));
            self.expires_at = now + millis(REMEMBER).max(2 * lease);
        }
        if removal.then == Then::Close && self.holds(removal.token) {
            self.release(true, now);
        }
    }

    pub(super) fn renew(&mut self, renewal: &Renew, strict: bool, now: i64) -> Renewed {
        if !self.holds(Some(renewal.token)) || strict && !self.is_held(now) {
            return Renewed::Ended;
        }
        if renewal.protects && self.live(now).is_none() {
            return Renewed::Gone;
        }
        if let Some(lock) = &mut self.lock {
            lock.until = now + renewal.lease;
        }
        self.remember(now);
        if renewal.protects {
            self.prolong(renewal.lease, now);
        }
        Renewed::Renewed
    }

    /// Gives up the lock or the place of `token`.
    pub(super) fn leave(&mut self, token: LeaseToken, clean: bool, now: i64) {
        self.next.take_if(|next| next.token == token);
        if self.holds(Some(token)) {
            self.release(clean, now);
        }
    }

    /// Takes the lock from whoever has it.
    pub(super) fn unlock(&mut self, now: i64) -> bool {
        let held = self.is_held(now);
        if held {
            self.release(false, now);
        }
        held
    }

    /// Gives the lock to the one next in line, for a moment in which he has to come for it.
    fn release(&mut self, clean: bool, now: i64) {
        let Some(lock) = self.lock.take() else { return };
        // Whoever never came for it did nothing under it, so it is as clean for the next as it was for him.
        let clean = clean && (lock.owner.is_some() || lock.handed);
        if let Some(next) = self.next.take().filter(|next| next.until > now) {
            self.lock = Some(Lock {
                token: next.token,
                until: now + millis(CLAIM),
                since: now,
                lease: lock.lease,
                owner: None,
                process: Some(next.process),
                handed: clean,
            });
            self.remember(now);
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests {
    use session_core::leased::Want;

    use super::*;

    fn who(process: i64) -> Who {
        let owner = Owner { text: format!("pid {process}"), process };
        Who { owner, proven: true }
    }

    fn asks(token: LeaseToken, waited: i64) -> Enter {
        Enter { key: "k".into(), token, lease: 60_000, want: Want::Any, book: 1500, waited, probe: false }
    }

    #[test]
    fn the_place_next_in_line_is_of_who_has_waited_longest() {
        let [holder, early, late, heir] = std::array::from_fn(|_| LeaseToken::random().unwrap());
        let mut row = Row::default();
        let mut enter = |entry: Enter, process, now| match row.enter(&entry, &who(process), now, |_| false) {
            Answer::Granted { .. } => "granted",
            Answer::Busy(busy) if busy.booked => "next",
            Answer::Busy(_) => "behind",
            Answer::Absent => "absent",
        };
        assert_eq!(enter(Enter { book: 0, ..asks(holder, 0) }, 1, 0), "granted");
        assert_eq!(enter(asks(late, 1), 2, 100), "next", "nobody else has asked yet");
        assert_eq!(enter(asks(early, 99), 3, 101), "next", "he waits since 2, the other since 99");
        assert_eq!(enter(asks(late, 800), 2, 899), "behind", "he asks again, and has not come earlier for that");
        assert_eq!(enter(asks(early, 898), 3, 900), "next");
        assert_eq!(enter(asks(heir, 0), 3, 901), "next", "the tasks of a process share its place");
        // Both came at nearly the same moment; clocks that are read twice decide nothing between them.
        assert_eq!(enter(asks(late, 1), 2, 902), "behind");
        assert_eq!(enter(asks(late, 2), 2, 902), "behind");
    }
}

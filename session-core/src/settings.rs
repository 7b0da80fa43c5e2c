//! How a [`Sessions`](crate::Sessions) behaves: every number with its default, and where a DSN sets it.

use std::sync::Arc;
use std::time::Duration;

use crate::clock::{Clock, SystemClock};
use crate::codec::Codec;
use crate::dsn::Dsn;
use crate::error::{Error, ErrorKind, Result};
use crate::handler::SessionHandler;
use crate::sessions::Sessions;

pub(crate) const MAX_WAIT: Duration = Duration::from_secs(600);
pub(crate) const MIN_LEASE: Duration = Duration::from_millis(10);
pub(crate) const MAX_LEASE: Duration = Duration::from_secs(24 * 3600);

/// The settings of a [`Sessions`](crate::Sessions), checked by [`build`](Self::build).
///
/// Every default is meant for production.
#[derive(Clone, Debug)]
#[must_use]
pub struct SessionsBuilder {
    handler: Arc<dyn SessionHandler>,
    pub(crate) settings: Settings,
}

#[derive(Clone, Debug)]
pub(crate) struct Settings {
    pub(crate) ttl: Duration,
    pub(crate) absolute_ttl: Option<Duration>,
    pub(crate) locking: bool,
    pub(crate) lease: Duration,
    pub(crate) wait: Duration,
    pub(crate) queue: usize,
    pub(crate) max_hold: Duration,
    pub(crate) codec: Codec,
    pub(crate) max_bytes: usize,
    pub(crate) touch_after: f64,
    pub(crate) grace: Duration,
    pub(crate) clock: Arc<dyn Clock>,
}

impl SessionsBuilder {
    pub(crate) fn new(handler: Arc<dyn SessionHandler>) -> Self {
        let settings = Settings {
            ttl: Duration::from_secs(24 * 60),
            absolute_ttl: Some(Duration::from_secs(8 * 3600)),
            locking: true,
            lease: Duration::from_secs(30),
            wait: Duration::from_secs(10),
            queue: 64,
            max_hold: Duration::from_secs(10 * 60),
            codec: Codec::default(),
            max_bytes: 256 * 1024,
            touch_after: 0.1,
            grace: Duration::from_secs(30),
            clock: Arc::new(SystemClock),
        };
        Self { handler, settings }
    }

    /// Sets the idle time-out: how long a session lives after its last use. Default 24 minutes.
    pub fn ttl(mut self, ttl: Duration) -> Self {
        self.settings.ttl = ttl;
        self
    }

    /// Sets the absolute time-out: how long a session lives after its creation or its last [`elevate`](crate::Session::elevate),
    /// used or not, by the wall clock of this process. Default 8 hours; `None` for no limit.
    pub fn absolute_ttl(mut self, ttl: Option<Duration>) -> Self {
        self.settings.absolute_ttl = ttl;
        self
    }

    /// Sets whether [`open`](Sessions::open) takes the lock. Without it a race is a [`Conflict`](ErrorKind::Conflict), not a loss.
    /// Default on.
    pub fn locking(mut self, locking: bool) -> Self {
        self.settings.locking = locking;
        self
    }

    /// Sets how long a lock lasts if this process dies; renewed at a third of it while a session is open. 10 ms to
    /// 24 hours; default 30 s.
    pub fn lease(mut self, lease: Duration) -> Self {
        self.settings.lease = lease;
        self
    }

    /// Sets how long an open waits for the lock, the queue of this process included. At most 10 minutes; default 10 s.
    pub fn wait(mut self, wait: Duration) -> Self {
        self.settings.wait = wait;
        self
    }

    /// Sets how many tasks of this process may wait for one session; one more is [`Busy`](ErrorKind::Busy). Default 64.
    pub fn queue(mut self, limit: usize) -> Self {
        self.settings.queue = limit;
        self
    }

    /// Sets after how long a session that is still open is no longer renewed, so that a hung task does not hold it for ever.
    /// Default 10 minutes.
    pub fn max_hold(mut self, max_hold: Duration) -> Self {
        self.settings.max_hold = max_hold;
        self
    }

    /// Sets the codec of new sessions; an existing one keeps the codec that its envelope names. Default MessagePack.
    pub fn codec(mut self, codec: Codec) -> Self {
        self.settings.codec = codec;
        self
    }

    /// Sets how large the stored form of a session may be; a larger one is [`TooLarge`](ErrorKind::TooLarge) before any store
    /// sees it. Default 256 KiB.
    pub fn max_bytes(mut self, bytes: usize) -> Self {
        self.settings.max_bytes = bytes;
        self
    }

    /// Sets which share of its idle time must be used up before an unchanged session is touched. Default 0.1.
    pub fn touch_after(mut self, share: f64) -> Self {
        self.settings.touch_after = share;
        self
    }

    /// Sets how long the old id of a [`rotate`](crate::Session::rotate) still works once the new one was seen. Default 30 s.
    pub fn grace(mut self, grace: Duration) -> Self {
        self.settings.grace = grace;
        self
    }

    /// Sets the wall clock that absolute time-outs go by.
    pub fn clock(mut self, clock: Arc<dyn Clock>) -> Self {
        self.settings.clock = clock;
        self
    }

    /// Takes the common options of `dsn` that concern sessions; what it does not name stays as it is. `absolute_ttl=0s` means no
    /// limit.
    ///
    /// # Errors
    /// [`Config`](ErrorKind::Config) that names the option.
    pub fn options_from(mut self, dsn: &Dsn) -> Result<Self> {
        let settings = &mut self.settings;
        let set = |name, target: &mut Duration| -> Result<()> {
            if let Some(value) = dsn.duration(name)? {
                *target = value;
            }
            Ok(())
        };
        set("ttl", &mut settings.ttl)?;
        set("lease", &mut settings.lease)?;
        set("wait", &mut settings.wait)?;
        set("max_hold", &mut settings.max_hold)?;
        if let Some(ttl) = dsn.duration("absolute_ttl")? {
            settings.absolute_ttl = (!ttl.is_zero()).then_some(ttl);
        }
        if let Some(locking) = dsn.flag("locking")? {
            settings.locking = locking;
        }
        if let Some(queue) = dsn.number("queue", 0..=1_000_000)? {
            settings.queue = usize::try_from(queue).unwrap_or(usize::MAX);
        }
        if let Some(bytes) = dsn.number("max_bytes", 64..=1 << 30)? {
            settings.max_bytes = usize::try_from(bytes).unwrap_or(usize::MAX);
        }
        if let Some(codec) = dsn.option("codec") {
            settings.codec = Codec::from_name(codec)?;
        }
        Ok(self)
    }

    /// Checks the settings and makes the `Sessions`. No trip is made.
    ///
    /// # Errors
    /// [`Config`](ErrorKind::Config) that names the setting and its range.
    pub fn build(self) -> Result<Sessions> {
        let settings = &self.settings;
        let refuse = |ok: bool, message: &'static str| {
            if ok { Ok(()) } else { Err(Error::new(ErrorKind::Config, "sessions", message)) }
        };
        let year = Duration::from_secs(366 * 24 * 3600);
        refuse(settings.ttl >= Duration::from_millis(1) && settings.ttl <= year * 10, "ttl must be 1ms to ten years")?;
        refuse((MIN_LEASE..=MAX_LEASE).contains(&settings.lease), "lease must be 10ms to 24h")?;
        refuse(settings.wait <= MAX_WAIT, "wait must be at most 10m")?;
        refuse(settings.max_hold >= settings.lease, "max_hold must be at least one lease")?;
        refuse((0.0..=1.0).contains(&settings.touch_after), "touch_after is a share, 0.0 to 1.0")?;
        refuse(settings.grace <= Duration::from_secs(300), "grace must be at most 5m")?;
        refuse(settings.absolute_ttl.is_none_or(|ttl| ttl >= Duration::from_secs(1)), "absolute_ttl must be at least 1s")?;
        Ok(Sessions::from_parts(self.handler, self.settings))
    }
}

//! How long a record may live: a length of time, kept apart from the instants that stores compute from it.

use std::time::Duration;

/// A length of life, 1 ms to ten years, in whole milliseconds.
///
/// Stores that count in coarser units round up, through [`as_secs_ceil`](Self::as_secs_ceil): a record lives at least its
/// `Ttl`, and at most one second longer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Ttl(u64);

impl Ttl {
    /// The shortest.
    pub const MIN: Self = Self(1);
    /// The longest: ten years of 365 days.
    pub const MAX: Self = Self(10 * 365 * 24 * 3600 * 1000);

    /// Takes `duration`, brought into range and rounded up to a millisecond.
    #[must_use]
    pub fn new(duration: Duration) -> Self {
        let millis = duration.as_nanos().div_ceil(1_000_000);
        Self(u64::try_from(millis).unwrap_or(u64::MAX).clamp(Self::MIN.0, Self::MAX.0))
    }

    /// Takes whole seconds, brought into range.
    #[must_use]
    pub fn from_secs(secs: u64) -> Self {
        Self::new(Duration::from_secs(secs))
    }

    /// Returns milliseconds.
    #[must_use]
    pub const fn as_millis(self) -> u64 {
        self.0
    }

    /// Returns seconds, rounded up.
    #[must_use]
    pub const fn as_secs_ceil(self) -> u64 {
        self.0.div_ceil(1000)
    }

    /// Returns a `Duration`.
    #[must_use]
    pub const fn as_duration(self) -> Duration {
        Duration::from_millis(self.0)
    }
}

impl From<Duration> for Ttl {
    fn from(duration: Duration) -> Self {
        Self::new(duration)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_ttl_rounds_up_and_stays_in_range() {
        assert_eq!(Ttl::new(Duration::ZERO), Ttl::MIN);
        assert_eq!(Ttl::new(Duration::from_nanos(1)), Ttl::MIN);
        assert_eq!(Ttl::new(Duration::from_micros(1001)).as_millis(), 2);
        assert_eq!(Ttl::new(Duration::MAX), Ttl::MAX);
        assert_eq!(Ttl::new(Duration::from_millis(1001)).as_secs_ceil(), 2);
        assert_eq!(Ttl::from_secs(u64::MAX), Ttl::MAX);
    }
}

//! What happens to sessions, for those who run them: spans and events for `tracing`, numbers for `metrics`.
//!
//! This layer sees ids and payloads pass and names neither: what it tells is the backend, the operation, the outcome and how
//! long it took.

use std::num::NonZeroU32;
use std::sync::Arc;
use std::time::{Duration, Instant};

use async_trait::async_trait;
use metrics::{Key, Label, Level, Metadata, Unit, describe_counter, describe_histogram, with_recorder};
use tracing::{Instrument, Span, debug, debug_span, field, warn};

use crate::error::{ErrorKind, Result};
use crate::handler::{Access, Expect, OpenRequest, OpenSession, SessionAdmin, SessionHandler};
use crate::id::SessionId;
use crate::lock::Held;
use crate::record::{Change, Record, WriteId, Written};
use crate::ttl::Ttl;

const WAIT: &str = "sessionkit_lock_wait_seconds";
const HOLD: &str = "sessionkit_lock_hold_seconds";
const OPERATIONS: &str = "sessionkit_operations_total";
const COLLECTED: &str = "sessionkit_gc_freed_total";

/// Tells `tracing` and `metrics` what passes through.
///
/// | metric | kind | labels | |
/// |---|---|---|---|
/// | `sessionkit_lock_wait_seconds` | histogram | `backend` | how long exclusive opens took, those that timed out included |
/// | `sessionkit_lock_hold_seconds` | histogram | `backend` | from an exclusive open to the end of its hold |
/// | `sessionkit_operations_total` | counter | `backend`, `operation`, `outcome` | every call |
/// | `sessionkit_gc_freed_total` | counter | `backend` | expired sessions that were collected |
///
/// An operation is `open`, `read`, `write`, `touch`, `save`, `destroy`, `close`, `gc` or, for an opening that was dropped
/// unclosed, `drop`. An outcome is a success (`ok`, `found`, `absent`, `removed`, `applied`, `already_applied`, `abandoned`), the
/// [kind](ErrorKind::as_str) of an error, or `cancelled` for a future that was dropped.
///
/// Each call runs in a span `sessionkit` of level `DEBUG` with the same three fields. A failure is an event of level `WARN`
/// where a person should look (the store does not answer, or answers what it should not), otherwise of level `DEBUG`.
#[derive(Clone, Debug)]
pub struct Observe<H> {
    inner: H,
    names: Arc<Names>,
}

impl<H> Observe<H> {
    /// Puts the layer before `inner`; `backend` is what metrics and spans call it.
    pub fn new(inner: H, backend: &'static str) -> Self {
        describe_histogram!(WAIT, Unit::Seconds, "How long exclusive opens took");
        describe_histogram!(HOLD, Unit::Seconds, "How long sessions were held");
        describe_counter!(OPERATIONS, "Calls by operation and outcome");
        describe_counter!(COLLECTED, "Expired sessions that were collected");
        Self { inner, names: Arc::new(Names::new(backend)) }
    }
}

#[async_trait]
#[deny(clippy::missing_trait_methods)]
impl<H: SessionHandler> SessionHandler for Observe<H> {
    async fn open(&self, id: &SessionId, request: &OpenRequest) -> Result<Box<dyn OpenSession>> {
        let locks = matches!(request.access, Access::Exclusive { .. }) && request.expect != Expect::Fresh;
        let call = Call::begin(&self.names, "open");
        call.span.record("access", access_name(request.access));
        let began = call.began;
        let outcome = call.run(self.inner.open(id, request), |_| "ok").await;
        let ended = Instant::now();
        if locks && !outcome.as_ref().is_err_and(|error| error.kind() == ErrorKind::Unsupported) {
            Names::time(&self.names.wait, ended - began);
        }
        let held_since = locks.then_some(ended);
        let existing = request.expect == Expect::Existing;
        outcome.map(|inner| {
            let names = Arc::clone(&self.names);
            Box::new(Observed { inner, names, existing, held_since, closed: false }) as Box<dyn OpenSession>
        })
    }

    async fn gc(&self, limit: NonZeroU32) -> Result<u64> {
        let freed = Call::begin(&self.names, "gc").run(self.inner.gc(limit), |_| "ok").await?;
        Names::add(&self.names.collected, freed);
        Ok(freed)
    }

    fn admin(&self) -> Option<&dyn SessionAdmin> {
        self.inner.admin()
    }
}

#[derive(Debug)]
struct Observed {
    inner: Box<dyn OpenSession>,
    names: Arc<Names>,
    existing: bool,
    held_since: Option<Instant>,
    closed: bool,
}

impl Observed {
    fn hold_ends(&mut self) {
        if let Some(since) = self.held_since.take() {
            Names::time(&self.names.hold, since.elapsed());
        }
    }

    /// Notes what an outcome means for the hold: it begins with the first write of a fresh id, and a refusal ends it.
    fn after_change<T>(&mut self, outcome: &Result<T>) {
        match outcome {
            Ok(_) if self.held_since.is_none() && self.inner.held().is_some() => self.held_since = Some(Instant::now()),
            Err(error) if !error.kind().keeps_opening() && error.kind() != ErrorKind::Unsupported => self.hold_ends(),
            _ => {}
        }
    }
}

#[async_trait]
#[deny(clippy::missing_trait_methods)]
impl OpenSession for Observed {
    async fn read(&mut self) -> Result<Option<Record>> {
        let call = Call::begin(&self.names, "read");
        let outcome = call.run(self.inner.read(), |record| if record.is_some() { "found" } else { "absent" }).await;
        if matches!(outcome, Ok(None)) && self.existing && self.inner.held().is_none() {
            // An absent id was answered without a lock.
            self.held_since = None;
        }
        outcome
    }

    async fn write(&mut self, record: &Record, id: WriteId) -> Result<Written> {
        let outcome = Call::begin(&self.names, "write").run(self.inner.write(record, id), written_name).await;
        self.after_change(&outcome);
        outcome
    }

    async fn destroy(&mut self) -> Result<Option<Record>> {
        let call = Call::begin(&self.names, "destroy");
        call.run(self.inner.destroy(), |record| if record.is_some() { "removed" } else { "absent" }).await
    }

    async fn close(&mut self) -> Result<()> {
        let outcome = Call::begin(&self.names, "close").run(self.inner.close(), |()| "ok").await;
        self.closed = true;
        self.hold_ends();
        outcome
    }

    async fn touch(&mut self, ttl: Ttl) -> Result<Written> {
        let outcome = Call::begin(&self.names, "touch").run(self.inner.touch(ttl), written_name).await;
        self.after_change(&outcome);
        outcome
    }

    async fn save(&mut self, change: &Change, id: WriteId) -> Result<Written> {
        let outcome = Call::begin(&self.names, "save").run(self.inner.save(change, id), written_name).await;
        if !outcome.as_ref().is_err_and(|error| error.kind().keeps_opening()) {
            self.closed = true;
            self.hold_ends();
        }
        outcome
    }

    fn held(&self) -> Option<&Held> {
        self.inner.held()
    }
}

impl Drop for Observed {
    fn drop(&mut self) {
        if !self.closed && self.held_since.is_some() {
            self.names.count("drop", "abandoned");
            self.hold_ends();
        }
    }
}

/// One call under way. Dropped before its end, it counts as cancelled.
struct Call<'a> {
    names: &'a Names,
    operation: &'static str,
    span: Span,
    began: Instant,
    ended: bool,
}

impl<'a> Call<'a> {
    fn begin(names: &'a Names, operation: &'static str) -> Self {
        let span =
            debug_span!("sessionkit", backend = names.backend, operation, access = field::Empty, outcome = field::Empty);
        Self { names, operation, span, began: Instant::now(), ended: false }
    }

    async fn run<T>(mut self, call: impl Future<Output = Result<T>>, name: impl FnOnce(&T) -> &'static str) -> Result<T> {
        let outcome = call.instrument(self.span.clone()).await;
        match &outcome {
            Ok(answer) => self.end(name(answer)),
            Err(error) => {
                self.end(error.kind().as_str());
                self.failed(error.kind(), self.began.elapsed());
            }
        }
        outcome
    }

    fn end(&mut self, outcome: &'static str) {
        self.ended = true;
        self.span.record("outcome", outcome);
        self.names.count(self.operation, outcome);
    }

    // The text of the error stays out: it may come from a handler that does not keep its promise about ids.
    fn failed(&self, kind: ErrorKind, took: Duration) {
        let (backend, operation, outcome) = (self.names.backend, self.operation, kind.as_str());
        let took_ms = u64::try_from(took.as_millis()).unwrap_or(u64::MAX);
        match kind {
            ErrorKind::Unavailable | ErrorKind::Unknown | ErrorKind::Corrupt | ErrorKind::Config | ErrorKind::Unexpected => {
                warn!(parent: &self.span, backend, operation, outcome, took_ms, "a session call failed")
            }
            ErrorKind::LockTimeout
            | ErrorKind::Busy
            | ErrorKind::Fenced
            | ErrorKind::Gone
            | ErrorKind::Conflict
            | ErrorKind::TooLarge
            | ErrorKind::Unsupported => {
                debug!(parent: &self.span, backend, operation, outcome, took_ms, "a session call was refused")
            }
        }
    }
}

impl Drop for Call<'_> {
    fn drop(&mut self) {
        if !self.ended {
            self.end("cancelled");
        }
    }
}

/// What metrics are called, put together once: a request tells five of them.
#[derive(Debug)]
struct Names {
    backend: &'static str,
    wait: Key,
    hold: Key,
    collected: Key,
    usual: [(&'static str, &'static str, Key); USUAL.len()],
}

/// What nearly every call is, by operation and outcome.
const USUAL: [(&str, &str); 6] =
    [("open", "ok"), ("read", "found"), ("save", "applied"), ("touch", "applied"), ("close", "ok"), ("read", "absent")];

static METADATA: Metadata<'static> = Metadata::new(module_path!(), Level::INFO, Some(module_path!()));

impl Names {
    fn new(backend: &'static str) -> Self {
        let of_backend = |name: &'static str| Key::from_parts(name, vec![Label::new("backend", backend)]);
        Self {
            backend,
            wait: of_backend(WAIT),
            hold: of_backend(HOLD),
            collected: of_backend(COLLECTED),
            usual: USUAL.map(|(operation, outcome)| (operation, outcome, Self::operation(backend, operation, outcome))),
        }
    }

    fn operation(backend: &'static str, operation: &'static str, outcome: &'static str) -> Key {
        let labels =
            vec![Label::new("backend", backend), Label::new("operation", operation), Label::new("outcome", outcome)];
        Key::from_parts(OPERATIONS, labels)
    }

    fn count(&self, operation: &'static str, outcome: &'static str) {
        match self.usual.iter().find(|usual| (usual.0, usual.1) == (operation, outcome)) {
            Some((_, _, key)) => Self::add(key, 1),
            None => Self::add(&Self::operation(self.backend, operation, outcome), 1),
        }
    }

    fn add(key: &Key, count: u64) {
        with_recorder(|recorder| recorder.register_counter(key, &METADATA)).increment(count);
    }

    fn time(key: &Key, took: Duration) {
        with_recorder(|recorder| recorder.register_histogram(key, &METADATA)).record(took);
    }
}

fn written_name(written: &Written) -> &'static str {
    match written {
        Written::Applied => "applied",
        Written::AlreadyApplied => "already_applied",
    }
}

fn access_name(access: Access) -> &'static str {
    match access {
        Access::Exclusive { .. } => "exclusive",
        Access::ReadOnly => "read_only",
        Access::Optimistic => "optimistic",
        Access::Destroy => "destroy",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::MemoryHandler;
    use metrics::{Counter, CounterFn, Gauge, Histogram, HistogramFn, Key, KeyName, Metadata, Recorder, SharedString};
    use std::collections::BTreeMap;
    use std::fmt;
    use std::pin::pin;
    use std::sync::atomic::{AtomicU64, Ordering};
    use std::sync::{Arc, Mutex};
    use std::task::{Context, Waker};
    use tracing::span::{Attributes, Id};
    use tracing::subscriber::Subscriber;

    const PAYLOAD: &str = "payload-marker";
    const LEASE: Duration = Duration::from_secs(30);

    /// Keeps everything that it is told: metrics by name and labels, spans and events as text.
    #[derive(Clone, Default)]
    struct Seen {
        counts: Arc<Mutex<BTreeMap<String, u64>>>,
        times: Arc<Mutex<BTreeMap<String, Vec<f64>>>>,
        text: Arc<Mutex<String>>,
        spans: Arc<AtomicU64>,
    }

    struct Metric(Seen, String);

    fn name_of(key: &Key) -> String {
        let labels: Vec<_> = key.labels().map(|label| format!("{}={}", label.key(), label.value())).collect();
        format!("{}{{{}}}", key.name(), labels.join(","))
    }

    impl CounterFn for Metric {
        fn increment(&self, value: u64) {
            *self.0.counts.lock().unwrap().entry(self.1.clone()).or_default() += value;
        }

        fn absolute(&self, _: u64) {
            panic!("counters only count");
        }
    }

    impl HistogramFn for Metric {
        fn record(&self, value: f64) {
            self.0.times.lock().unwrap().entry(self.1.clone()).or_default().push(value);
        }
    }

    impl Recorder for Seen {
        fn describe_counter(&self, _: KeyName, _: Option<Unit>, _: SharedString) {}

        fn describe_gauge(&self, _: KeyName, _: Option<Unit>, _: SharedString) {}

        fn describe_histogram(&self, _: KeyName, _: Option<Unit>, _: SharedString) {}

        fn register_counter(&self, key: &Key, _: &Metadata<'_>) -> Counter {
            Counter::from_arc(Arc::new(Metric(self.clone(), name_of(key))))
        }

        fn register_gauge(&self, _: &Key, _: &Metadata<'_>) -> Gauge {
            panic!("there is no gauge");
        }

        fn register_histogram(&self, key: &Key, _: &Metadata<'_>) -> Histogram {
            Histogram::from_arc(Arc::new(Metric(self.clone(), name_of(key))))
        }
    }

    impl field::Visit for Seen {
        fn record_debug(&mut self, field: &field::Field, value: &dyn fmt::Debug) {
            use std::fmt::Write;
            write!(self.text.lock().unwrap(), " {field}={value:?}").unwrap();
        }
    }

    impl Subscriber for Seen {
        fn enabled(&self, _: &tracing::Metadata<'_>) -> bool {
            true
        }

        fn new_span(&self, span: &Attributes<'_>) -> Id {
            self.text.lock().unwrap().push_str(&format!("\nspan {}", span.metadata().name()));
            span.record(&mut self.clone());
            Id::from_u64(1 + self.spans.fetch_add(1, Ordering::Relaxed))
        }

        fn record(&self, _: &Id, values: &tracing::span::Record<'_>) {
            values.record(&mut self.clone());
        }

        fn record_follows_from(&self, _: &Id, _: &Id) {}

        fn event(&self, event: &tracing::Event<'_>) {
            self.text.lock().unwrap().push_str(&format!("\nevent {}", event.metadata().level()));
            event.record(&mut self.clone());
        }

        fn enter(&self, _: &Id) {}

        fn exit(&self, _: &Id) {}
    }

    impl Seen {
        fn count(&self, operation: &str, outcome: &str) -> u64 {
            let name = format!("{OPERATIONS}{{backend=test,operation={operation},outcome={outcome}}}");
            self.counts.lock().unwrap().get(&name).copied().unwrap_or(0)
        }

        fn times(&self, name: &str) -> Vec<f64> {
            self.times.lock().unwrap().get(&format!("{name}{{backend=test}}")).cloned().unwrap_or_default()
        }
    }

    /// Runs `work` with everything that it reports kept.
    fn watch(work: impl AsyncFnOnce(Observe<MemoryHandler>)) -> Seen {
        let seen = Seen::default();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
        let watched =
            || metrics::with_local_recorder(&seen, || runtime.block_on(work(Observe::new(MemoryHandler::new(), "test"))));
        tracing::subscriber::with_default(seen.clone(), watched);
        seen
    }

    fn exclusive(wait: Duration) -> OpenRequest {
        OpenRequest::exclusive(wait, LEASE)
    }

    fn record() -> Record {
        Record::new(PAYLOAD.as_bytes(), Ttl::MAX)
    }

    fn wid() -> WriteId {
        WriteId::random().unwrap()
    }

    async fn create(handler: &Observe<MemoryHandler>) -> SessionId {
        let id = SessionId::generate().unwrap();
        let mut fresh = handler.open(&id, &exclusive(LEASE).expecting(Expect::Fresh)).await.unwrap();
        fresh.save(&Change::Write(record()), wid()).await.unwrap();
        id
    }

    #[test]
    fn every_outcome_is_counted_under_its_operation() {
        let seen = watch(async |handler| {
            let id = create(&handler).await;
            let mut a = handler.open(&id, &exclusive(LEASE)).await.unwrap();
            a.read().await.unwrap();
            let write = wid();
            a.write(&record(), write).await.unwrap();
            a.write(&record(), write).await.unwrap();
            a.touch(Ttl::MAX).await.unwrap();
            let mut o = handler.open(&id, &OpenRequest::optimistic()).await.unwrap();
            o.write(&record(), wid()).await.unwrap_err();
            handler.open(&id, &exclusive(Duration::ZERO)).await.unwrap_err();
            handler.admin().unwrap().unlock(&id).await.unwrap();
            let mut b = handler.open(&id, &exclusive(LEASE)).await.unwrap();
            a.save(&Change::Write(record()), wid()).await.unwrap_err();
            let mut logout = handler.open(&id, &OpenRequest::destroy()).await.unwrap();
            logout.destroy().await.unwrap();
            logout.destroy().await.unwrap();
            logout.close().await.unwrap();
            b.save(&Change::Write(record()), wid()).await.unwrap_err();
            let mut absent = handler.open(&id, &exclusive(LEASE)).await.unwrap();
            absent.read().await.unwrap();
            handler.gc(NonZeroU32::MAX).await.unwrap();
        });
        let expected = [
            ("open", "ok", 6),
            ("open", "lock_timeout", 1),
            ("read", "found", 1),
            ("read", "absent", 1),
            ("write", "applied", 1),
            ("write", "already_applied", 1),
            ("write", "conflict", 1),
            ("touch", "applied", 1),
            ("save", "applied", 1),
            ("save", "fenced", 1),
            ("save", "gone", 1),
            ("destroy", "removed", 1),
            ("destroy", "absent", 1),
            ("close", "ok", 1),
            ("gc", "ok", 1),
        ];
        for (operation, outcome, count) in expected {
            assert_eq!(seen.count(operation, outcome), count, "{operation} {outcome}");
        }
        let all: u64 =
            seen.counts.lock().unwrap().iter().filter(|(name, _)| name.starts_with(OPERATIONS)).map(|(_, n)| n).sum();
        assert_eq!(all, expected.iter().map(|(_, _, count)| count).sum::<u64>());
    }

    #[test]
    fn the_wait_for_a_lock_and_its_hold_are_measured_in_seconds() {
        let (wait, hold) = (Duration::from_millis(20), Duration::from_millis(40));
        let seen = watch(async |handler| {
            let id = create(&handler).await;
            let holder = handler.open(&id, &exclusive(LEASE)).await.unwrap();
            handler.open(&id, &exclusive(wait)).await.unwrap_err();
            tokio::time::sleep(hold - wait).await;
            drop(holder);
            handler.open(&id, &exclusive(LEASE)).await.unwrap().close().await.unwrap();
            let absent = SessionId::generate().unwrap();
            handler.open(&absent, &exclusive(LEASE)).await.unwrap().read().await.unwrap();
            handler.open(&id, &OpenRequest::read_only()).await.unwrap().read().await.unwrap();
        });
        let (waits, holds) = (seen.times(WAIT), seen.times(HOLD));
        assert_eq!((waits.len(), holds.len()), (4, 2), "a fresh id, a view and an absent id hold nothing");
        assert!(waits[1] >= wait.as_secs_f64() && waits[0] < waits[1], "{waits:?}");
        assert!(holds[0] >= hold.as_secs_f64() && holds[1] < holds[0], "{holds:?}");
        assert_eq!(seen.count("drop", "abandoned"), 1);
    }

    #[test]
    fn the_first_write_of_a_fresh_id_begins_a_hold() {
        let seen = watch(async |handler| {
            let id = SessionId::generate().unwrap();
            let mut fresh = handler.open(&id, &exclusive(LEASE).expecting(Expect::Fresh)).await.unwrap();
            fresh.write(&record(), wid()).await.unwrap();
            assert!(fresh.held().is_some());
            fresh.save(&Change::Nothing, wid()).await.unwrap();
        });
        assert_eq!((seen.times(WAIT).len(), seen.times(HOLD).len()), (0, 1));
    }

    #[test]
    fn a_refusal_ends_the_hold() {
        let seen = watch(async |handler| {
            let id = create(&handler).await;
            let mut a = handler.open(&id, &exclusive(LEASE)).await.unwrap();
            handler.open(&id, &OpenRequest::destroy()).await.unwrap().destroy().await.unwrap();
            a.write(&record(), wid()).await.unwrap_err();
        });
        assert_eq!((seen.times(HOLD).len(), seen.count("write", "gone"), seen.count("drop", "abandoned")), (1, 1, 0));
    }

    #[test]
    fn a_call_whose_future_is_dropped_counts_as_cancelled() {
        let seen = watch(async |handler| {
            let id = create(&handler).await;
            let _holder = handler.open(&id, &exclusive(LEASE)).await.unwrap();
            let request = exclusive(LEASE);
            let mut waiting = pin!(handler.open(&id, &request));
            assert!(waiting.as_mut().poll(&mut Context::from_waker(Waker::noop())).is_pending());
        });
        assert_eq!(seen.count("open", "cancelled"), 1);
    }

    #[test]
    fn neither_ids_nor_payloads_are_told_to_anybody() {
        let ids = Arc::new(Mutex::new(Vec::new()));
        let kept = ids.clone();
        let seen = watch(async move |handler| {
            let id = create(&handler).await;
            kept.lock().unwrap().push(id.clone());
            let mut a = handler.open(&id, &exclusive(LEASE)).await.unwrap();
            a.read().await.unwrap();
            handler.open(&id, &exclusive(Duration::ZERO)).await.unwrap_err();
            handler.open(&id, &OpenRequest::optimistic()).await.unwrap().write(&record(), wid()).await.unwrap_err();
            a.save(&Change::Write(record()), wid()).await.unwrap();
            handler.open(&id, &OpenRequest::destroy()).await.unwrap().destroy().await.unwrap();
            assert!(!format!("{handler:?} {a:?}").contains(id.as_str()));
        });
        let text = seen.text.lock().unwrap().clone();
        let counts = format!("{:?} {:?}", seen.counts.lock().unwrap(), seen.times.lock().unwrap());
        // What is searched must be the text in which an id would be found.
        for told in ["span sessionkit", "event DEBUG", "backend=\"test\"", "access=\"exclusive\"", "outcome=\"conflict\""] {
            assert!(text.contains(told), "{told} is not in {text}");
        }
        assert!(counts.contains("outcome=lock_timeout"));
        for secret in ids.lock().unwrap().iter().map(SessionId::as_str).chain([PAYLOAD]) {
            assert!(!text.contains(secret) && !counts.contains(secret));
        }
    }
}
